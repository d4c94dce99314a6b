"""Runs an example through a copy of the model, and reports what the rules of conversion need to know.

The run shows which convolutions read the model's input, at which sizes each one works, and which ones' weights are used
by other code than their own forward. A second run, with the replacements in place, shows which of them would not be
called: code that asks `isinstance(layer, nn.Conv2d)` or that holds a reference of its own to the convolution.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from .reads import HARMLESS
from .swap import swap

__all__ = ["SEEN_IN_A_RUN", "Trace", "padded_size", "rehearse", "trace"]

_USED = "its weight is used outside its own forward"
_SHARED = "a function or an object that a copy of the model shares with it calls this module"
_OUT_OF_REACH = "a function or an object that convert can't change refers to this module and calls it"
_NOT_CALLED = "the model doesn't call it any more when it is no nn.Conv2d"
SEEN_IN_A_RUN = (_USED, _SHARED, _OUT_OF_REACH, _NOT_CALLED)
"""How the reasons begin that only a run can give."""

_MAY_STAND_BESIDE = frozenset(("to", "type_as", "copy_", "expand_as", "zeros_like"))


@dataclass
class Trace:
    """What a run of the example input showed.

    Attributes:
        clone: The copy of the model that ran.
        args: The example's positional arguments.
        kwargs: Its keyword arguments.
        stem: Names of the convolutions that read the model's input.
        sizes: The padded sizes that each convolution reads, in the order of the calls.
        reads: For convolutions whose weight is used outside their own forward, the reason to leave them.
        called: Names of the convolutions that were called.
    """

    clone: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stem: set[str] = field(default_factory=set)
    sizes: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Runs the example through the copy once more.

        Raises:
            Exception: Whatever the model raises.
        """
        devices = {p.device for p in (*self.clone.parameters(), *self.clone.buffers()) if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            self.clone(*self.args, **self.kwargs)


class _Origin(TorchDispatchMode):
    """Marks each tensor that depends on the model's input as raw (through no weight) or learned."""

    def __init__(self, inputs: Iterable[torch.Tensor], weights: set[int]) -> None:
        super().__init__()
        self.learned = WeakTensorKeyDictionary()
        for tensor in inputs:
            self.learned[tensor] = False
        self.weights = weights

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        known = [self.learned[tensor] for tensor in tensors if tensor in self.learned]
        if known:
            learned = any(known) or any(id(tensor) in self.weights for tensor in tensors)
            for value in tree_flatten(result)[0]:
                if isinstance(value, torch.Tensor):
                    self.learned[value] = learned
        return result


class _WeightReads(TorchFunctionMode):
    """Notes which of PyTorch's functions get a convolution's weight while the convolution itself isn't running."""

    def __init__(self, weights: Mapping[int, str], running: list[str]) -> None:
        super().__init__()
        self.weights = weights
        self.running = running
        self.found: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        what = getattr(func, "__name__", str(func))
        if what in ("__get__", "__set__"):  # Tensor.shape and the like: the descriptor has the name
            what = getattr(getattr(func, "__self__", None), "__name__", what)
        if what not in HARMLESS:
            for place, value in enumerate(tree_flatten((args, kwargs))[0]):
                name = self.weights.get(id(value)) if isinstance(value, torch.Tensor) else None
                if name is None or name in self.running or (place > 0 and what in _MAY_STAND_BESIDE):
                    continue
                self.found.setdefault(name, f"{_USED} (by {what})")
        return func(*args, **kwargs)


def trace(model: nn.Module, example_input: Any, names: Mapping[nn.Module, tuple[str, ...]]) -> Trace:
    """Runs the example input through a copy of the model in evaluation mode.

    Args:
        model: The model; it is left as it is.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        names: The model's convolutions with their names.

    Raises:
        RuntimeError: The model can't be copied.
        ValueError: The example has no tensor, or doesn't run.
    """
    try:
        clone = copy.deepcopy(model)
    except Exception as error:
        raise RuntimeError(
            f"model can't be copied to run example_input through it ({type(error).__name__}: {error}); leave "
            "example_input out"
        ) from error
    clone.eval()
    args: tuple[Any, ...] = example_input if isinstance(example_input, tuple) else (example_input,)
    kwargs: dict[str, Any] = {}
    if isinstance(example_input, Mapping):
        args, kwargs = (), dict(example_input)
    inputs = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    if not inputs:
        raise ValueError(
            f"example_input is a {type(example_input).__name__} without a tensor, should be a tensor, a tuple of "
            "positional arguments or a dict of keyword arguments of the model"
        )
    weights = {
        id(tensor)
        for module in clone.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None and not nn.parameter.is_lazy(tensor) and tensor.dim() >= 2
    }
    seen = Trace(clone, args, kwargs)
    running: list[str] = []
    origin = _Origin(inputs, weights)
    copies = dict(clone.named_modules(remove_duplicate=False))
    own = {
        id(weight): found[0]
        for found in names.values()
        if (weight := copies[found[0]]._parameters.get("weight")) is not None
    }
    reads = _WeightReads(own, running)

    def enter(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(name)
        seen.called.add(name)
        source = args[0] if args else kwargs.get("input")
        if not isinstance(source, torch.Tensor):
            return
        if origin.learned.get(source) is False:
            seen.stem.add(name)
        if isinstance(module, nn.Conv2d) and source.dim() in (3, 4):
            seen.sizes.setdefault(name, []).append(padded_size(module, source.shape[-2], source.shape[-1]))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running.pop()

    def astray(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        reads.found[name] = _SHARED

    handles = []
    for original, found in names.items():
        module = copies[found[0]]
        handles += [
            module.register_forward_pre_hook(functools.partial(enter, found[0]), with_kwargs=True, prepend=True),
            module.register_forward_hook(leave, always_call=True),
            original.register_forward_pre_hook(functools.partial(astray, found[0])),
        ]
    try:
        with origin, reads:
            seen.run()
    except Exception as error:
        raise ValueError(
            f"example_input doesn't run through the model in evaluation mode ({type(error).__name__}: {error}); give "
            "what the model takes: a tensor, a tuple of positional arguments or a dict of keyword arguments"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    seen.reads = reads.found
    return seen


def rehearse(seen: Trace, replacements: Mapping[str, nn.Module]) -> dict[str, str]:
    """Runs the example again, with replacements in the copy, to see whether each is called where its convolution was.

    Args:
        seen: The first run; its copy of the model is changed.
        replacements: The new modules by their convolutions' names.

    Returns:
        For each name whose replacement wouldn't do the convolution's work, the reason to leave it.

    Raises:
        RuntimeError: The model doesn't run with the replacements.
    """
    copies = dict(seen.clone.named_modules(remove_duplicate=False))
    called: set[tuple[str, str]] = set()

    def watch(which: str, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        called.add((which, name))

    plan = {copies[name]: new for name, new in replacements.items()}
    for name, new in replacements.items():
        copies[name].register_forward_pre_hook(functools.partial(watch, "old", name))
        new.register_forward_pre_hook(functools.partial(watch, "new", name))
    seen.clone = swap(seen.clone, plan)
    seen.clone.eval()
    try:
        seen.run()
    except Exception as error:
        raise RuntimeError(
            f"the model runs example_input with its convolutions, but not with perturbation layers in their place "
            f"({type(error).__name__}: {error}); leave the convolution whose attributes it uses by the predicate"
        ) from error
    reasons = {}
    for name in replacements:
        if ("old", name) in called:
            reasons[name] = _OUT_OF_REACH
        elif name in seen.called and ("new", name) not in called:
            reasons[name] = _NOT_CALLED
    return reasons


def padded_size(module: nn.Conv2d, height: int, width: int) -> tuple[int, int]:
    """The size of the padded grid on which the replacement's masks live: H + 2p - d(k - 1) along each axis."""
    sizes = []
    for axis, size in enumerate((height, width)):
        extent = module.dilation[axis] * (module.kernel_size[axis] - 1)
        if isinstance(module.padding, str):
            sizes.append(size if module.padding == "same" else size - extent)
        else:
            sizes.append(size + 2 * module.padding[axis] - extent)
    return sizes[0], sizes[1]
