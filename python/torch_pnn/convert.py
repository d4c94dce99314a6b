"""Turns a model's convolutions into perturbation layers, and says what it did.

`convert` walks a model, decides for every convolution whether it becomes a `PerturbConv2d`, builds all replacements and
only then puts them in place, so that a refused call leaves the model as it was. The decisions, each with its reason,
are kept in the model's attribute `conversion`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from .modules import LBConv2d, PerturbConv2d
from .presets import PerturbMixConv2d, build_perturbation, layer_options

__all__ = ["Conversion", "ConversionRow", "convert", "layer_seed"]

Predicate = Callable[[str, nn.Module], "bool | None"]

_RECORD = "conversion"
_STEM_TRACED = "stem: it reads the model's input"
_STEM_GUESSED = "stem: the first convolution in registration order"
_BY_PREDICATE = "left by the predicate"
_CHOSEN = (_STEM_TRACED, _STEM_GUESSED, _BY_PREDICATE)
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_OWN_LAYERS = (PerturbConv2d, LBConv2d, PerturbMixConv2d)
_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True)
class ConversionRow:
    """One convolution of the model and what became of it.

    Attributes:
        name: Its qualified name, the first one where it is used in several places; "" for the model itself.
        kind: The class it had.
        geometry: Channels, kernel, stride and so on in short.
        converted: Whether it became a perturbation layer.
        reason: Why it was left, or what replaced it.
        parameters_before: Its parameters.
        parameters_after: The same after conversion.
        seed: The seed of its masks, where `convert` was given one.
        aliases: Other names of the same module.
    """

    name: str
    kind: str
    geometry: str
    converted: bool
    reason: str
    parameters_before: int
    parameters_after: int
    seed: int | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversion:
    """What `convert` did to a model, or with `dry_run` would do. `str()` of it is a table.

    Attributes:
        rows: A row per convolution, in the order of registration.
        parameters_before: Parameters of the whole model (shared ones once) before.
        parameters_after: The same after.
        seed: The seed that was given.
        preset: The preset that was given.
        options: The options that the layers were made with.
        dry_run: Whether this is only a plan.
    """

    rows: tuple[ConversionRow, ...]
    parameters_before: int
    parameters_after: int
    seed: int | None
    preset: str | None
    options: Mapping[str, Any]
    dry_run: bool

    @property
    def converted(self) -> tuple[ConversionRow, ...]:
        """The rows of what was converted."""
        return tuple(row for row in self.rows if row.converted)

    @property
    def left(self) -> tuple[ConversionRow, ...]:
        """The rows of what was left as it is."""
        return tuple(row for row in self.rows if not row.converted)

    def __str__(self) -> str:
        header = ("module", "kind", "geometry", "became", "parameters", "why")
        table = [header]
        for row in self.rows:
            name = row.name or "(the model)"
            if row.aliases:
                name += f" (+{len(row.aliases)})"
            counts = f"{row.parameters_before:,}"
            if row.converted:
                counts += f" -> {row.parameters_after:,}"
            became = "converted" if row.converted else "left"
            table.append((name, row.kind, row.geometry, became, counts, row.reason))
        widths = [max(len(line[column]) for line in table) for column in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        verb = "would be converted" if self.dry_run else "converted"
        lines.append(
            f"{len(self.converted)} {verb}, {len(self.left)} left; "
            f"parameters of the model {self.parameters_before:,} -> {self.parameters_after:,}"
        )
        return "\n".join(lines)


def layer_seed(seed: int, name: str) -> int:
    """The seed of one layer of a network: stable under wrapping, and different for every name.

    It is the first 8 bytes, little-endian, of SHA-256(seed as 8 bytes, little-endian, two's complement || name in
    UTF-8), where the name has lost the prefixes that wrappers add: leading `module` (DataParallel,
    DistributedDataParallel), and `_orig_mod`, `_fsdp_wrapped_module`, `_checkpoint_wrapped_module` anywhere.

    Args:
        seed: An int in [-2**63, 2**64).
        name: The layer's qualified name in the model.

    Returns:
        An int in [0, 2**64).

    Raises:
        TypeError: `seed` is not an int (bool is not taken for one), or `name` is not a str.
        ValueError: `seed` is out of range.

    Examples:
        >>> layer_seed(0, "layer1.0.conv1") == layer_seed(0, "module._orig_mod.layer1.0.conv1")
        True
        >>> hex(layer_seed(1, "conv"))
        '0xd07e8b6a3e9d8c51'
    """
    _check_seed(seed)
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}, should be a str")
    digest = hashlib.sha256((seed % 2**64).to_bytes(8, "little") + _plain_name(name).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def convert(
    model: nn.Module,
    *,
    inplace: bool = False,
    seed: int | None = None,
    predicate: Predicate | None = None,
    preset: str | None = None,
    example_input: Any = None,
    dry_run: bool = False,
    **options: Any,
) -> Any:
    """Replaces a model's 2-d convolutions by perturbation layers with the same channels and the same output sizes.

    Left as they are, with the reason in the table: the stem (the convolutions that read the model's input), 1x1
    convolutions of any stride, depthwise and transposed ones, 1-d and 3-d ones, subclasses of `nn.Conv2d`, lazy ones
    whose sizes aren't known yet, and those whose weight is computed (parametrized, weight-normed, pruned) or shared
    with another module. Grouped convolutions keep their grouping. A module used in several places stays one module.
    Forward and backward hooks (their handles too), data type, device, train/eval mode and `requires_grad` carry over.
    Weights start anew, as `PerturbConv2d` initialises them: a 3x3 kernel's numbers mean nothing to a 1x1 product.

    The stem is found by running `example_input` through a copy of the model in evaluation mode: a convolution belongs
    to it when what it reads comes from the model's input alone, through no other weight of two or more dimensions
    (normalising or cropping the image doesn't count). Without `example_input` the first convolution in the order of
    registration is taken for the stem, which is right for most published models and wrong for one with several
    branches at its input or one that registers its layers in another order than it calls them.

    A second conversion changes nothing: what an earlier one left stays left, unless a predicate says otherwise.

    Args:
        model: The model; itself a convolution is fine too.
        inplace: Change `model`; else a deep copy is made and changed. Where the model itself is replaced (it is a
            convolution and `predicate` asks for it), the new layer is returned in both cases.
        seed: From it and each layer's name the masks' seeds are derived (`layer_seed`). None: each layer draws a
            seed from PyTorch's default generator.
        predicate: Called as `predicate(name, module)` for each convolution; True converts it, False leaves it, None
            lets the rules above decide. It can't make convertible what isn't (transposed, lazy, ...).
        preset: Name of a published variant: "paper", "juefeix2018" or "klachko2018". See `torch_pnn.presets`.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments of the model.
        dry_run: Return the table of what would happen, and touch nothing.
        **options: Keywords of `PerturbConv2d` for every layer: masks, level, noise, activation, shared_masks, norm,
            downsample, train_masks, mask_size, and mixing. They win over the preset's. Trained masks have a fixed size:
            with `train_masks=True` and `example_input` each layer's is taken from the run.

    Returns:
        The converted model, whose attribute `conversion` is a `Conversion`; with `dry_run` the `Conversion` alone.

    Raises:
        TypeError: `model` isn't an `nn.Module` or is a scripted one, `predicate` isn't callable or doesn't return a
            bool or None, `seed` isn't an int, an option is unknown.
        ValueError: `preset` is unknown, `seed` is out of range, an option's value is refused by a layer (the message
            names the layer), `example_input` doesn't run through the model, or the model has an attribute
            `conversion` of its own.
        RuntimeError: The model can't be copied (use `inplace=True`).

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        >>> pnn = convert(net, seed=0, preset="juefeix2018")
        >>> [row.name for row in pnn.conversion.converted], pnn(torch.zeros(1, 3, 9, 9)).shape
        (['2'], torch.Size([1, 16, 5, 5]))
        >>> print(convert(net, dry_run=True))
        module  kind    geometry        became     parameters    why
        ------  ------  --------------  ---------  ------------  -------------------------------------------------
        0       Conv2d  3->8, 3x3       left       224           stem: the first convolution in registration order
        2       Conv2d  8->16, 3x3, s2  converted  1,168 -> 144  PerturbConv2d
        1 would be converted, 1 left; parameters of the model 1,392 -> 368

    Source: arXiv 1806.01817; which layers stay convolutions, github.com/juefeix/pnn.pytorch (models/naiveresnet.py).
    """
    _check_model(model)
    merged = layer_options(preset, **options)
    if seed is not None:
        _check_seed(seed)
    if predicate is not None and not callable(predicate):
        raise TypeError(
            f"predicate is {predicate!r}, should be a function of (name, module) that returns a bool or None"
        )
    for flag, value in (("inplace", inplace), ("dry_run", dry_run)):
        if not isinstance(value, bool):
            raise TypeError(f"{flag} is {value!r}, should be True or False")
    previous = getattr(model, _RECORD, None)
    if previous is not None and not isinstance(previous, Conversion):
        raise ValueError(
            f"model has an attribute 'conversion' of type {type(previous).__name__}, which is where convert keeps its "
            "table; rename the attribute"
        )

    trace = None if example_input is None else _trace(model, example_input)
    verdicts = _decide(model, _convolutions(model), predicate, trace, previous)
    if not inplace and not dry_run:
        try:
            model = copy.deepcopy(model)
        except Exception as error:
            raise RuntimeError(
                f"model can't be copied ({type(error).__name__}: {error}); inplace=True converts it without a copy"
            ) from error

    before = _count(model)
    plan: list[tuple[nn.Module, nn.Module]] = []
    rows = []
    for module, (name, *aliases) in _convolutions(model).items():
        size = _count(module)
        row = ConversionRow(
            name,
            type(module).__name__,
            _geometry(module),
            False,
            verdicts[name] or "",
            size,
            size,
            None,
            tuple(aliases),
        )
        if verdicts[name] is None:
            own_seed = None if seed is None else layer_seed(seed, name)
            new = _replacement(name, module, own_seed, merged, trace, on_meta=dry_run)
            plan.append((module, new))
            row = replace(row, converted=True, reason=type(new).__name__, parameters_after=_count(new), seed=own_seed)
        rows.append(row)
    after = before + sum(row.parameters_after - row.parameters_before for row in rows)
    record = Conversion(tuple(rows), before, after, seed, preset, dict(merged), dry_run)
    if dry_run:
        return record

    for old, new in plan:
        _carry_over(old, new)
    model = _swap(model, dict(plan))
    setattr(model, _RECORD, _merged_record(previous, record))
    return model


def _check_model(model: Any) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a scripted module, which can't be changed any more; convert it first, then script it")
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"of type {type(model).__name__}"
        raise TypeError(f"model is {what}, should be an nn.Module")


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}, should be an int in [-2**63, 2**64) or None")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}, should be in [-2**63, 2**64)")


def _plain_name(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def _count(module: nn.Module) -> int:
    return sum(
        parameter.numel()
        for parameter in module.parameters()
        if not isinstance(parameter, nn.parameter.UninitializedParameter)
    )


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _convolutions(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every convolution outside our own layers, with all its names, in the order of registration."""
    names: dict[nn.Module, list[str]] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        if isinstance(module, _OWN_LAYERS):
            return
        if _is_convolution(module):
            names.setdefault(module, []).append(prefix)
            return
        for key, child in module._modules.items():
            if child is not None:
                visit(child, f"{prefix}.{key}" if prefix else key)

    visit(model, "")
    return {module: tuple(found) for module, found in names.items()}


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _geometry(module: Any) -> str:
    """The convolution's geometry in short; what is default is left out."""

    def both(value: tuple[int, ...]) -> str:
        return str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))

    words = [f"{module.in_channels}->{module.out_channels}", "x".join(map(str, module.kernel_size))]
    if any(step != 1 for step in module.stride):
        words.append("s" + both(module.stride))
    if any(step != 1 for step in module.dilation):
        words.append("d" + both(module.dilation))
    if module.groups != 1:
        words.append(f"g{module.groups}")
    return ", ".join(words)


def _fixed_reason(module: Any) -> str | None:
    """Why the module can't be converted whatever a predicate says; None where it can."""
    dimensions = {nn.Conv1d: "1-d", nn.Conv3d: "3-d"}
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed convolution"
    for kind, words in dimensions.items():
        if isinstance(module, kind):
            return f"{words} convolution"
    if not isinstance(module, nn.Conv2d):
        return f"{_class_name(module)} is not an nn.Conv2d"
    parameters: list[Any] = list(module.parameters())
    if any(nn.parameter.is_lazy(parameter) for parameter in parameters):
        return "lazy: its sizes aren't known until the model has run once"
    if parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        how = sorted({type(step).__name__.lstrip("_") for steps in lists.values() for step in steps})
        return f"its weight is computed by a parametrization ({', '.join(how)})"
    if "weight" not in module._parameters:
        return "its weight is computed by a hook (weight_norm, spectral_norm or pruning)"
    if type(module) is not nn.Conv2d:
        for method in ("forward", "_conv_forward"):
            if getattr(type(module), method) is not getattr(nn.Conv2d, method):
                return f"subclass {_class_name(module)} with a {method} of its own"
    if module.weight.dtype not in _FLOATING:
        return f"its data type {module.weight.dtype} has no perturbation layer"
    return None


def _default_reason(module: Any, owners: Mapping[int, list[str]], stem: Mapping[nn.Module, str]) -> str | None:
    """Why the rules leave the module; None where they convert it."""
    if type(module) is not nn.Conv2d:
        return f"subclass {_class_name(module)} of nn.Conv2d"
    shared = sorted({owner for p in module._parameters.values() if p is not None for owner in owners[id(p)]})
    if len(shared) > 1:
        return f"its parameters are shared by {', '.join(shared)}"
    if module in stem:
        return stem[module]
    if module.groups > 1 and module.groups == module.in_channels:
        return "depthwise convolution"
    if all(size == 1 for size in module.kernel_size):
        return "1x1 convolution"
    return None


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _decide(
    model: nn.Module,
    names: Mapping[nn.Module, tuple[str, ...]],
    predicate: Predicate | None,
    trace: _Trace | None,
    previous: Conversion | None,
) -> dict[str, str | None]:
    """For each convolution, by its first name, the reason why it is left, or None where it is converted."""
    owners: dict[int, list[str]] = {}
    for owner_name, owner in model.named_modules():
        for parameter in owner._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(owner_name)
    if trace is not None:
        stem = {module: _STEM_TRACED for module, found in names.items() if found[0] in trace.stem}
    else:
        stem = {module: _STEM_GUESSED for module in list(names)[:1]}
        if any(isinstance(module, _OWN_LAYERS) for module in model.modules()):
            first = next(
                module for module in model.modules() if isinstance(module, _OWN_LAYERS) or _is_convolution(module)
            )
            if isinstance(first, _OWN_LAYERS):
                stem = {}
    left_before = {} if previous is None else {row.name: row.reason for row in previous.left if row.reason in _CHOSEN}

    reasons: dict[str, str | None] = {}
    for module, found in names.items():
        name = found[0]
        reason = _fixed_reason(module)
        verdict = None if predicate is None else predicate(name, module)
        if verdict is not None and not isinstance(verdict, bool):
            raise TypeError(f"predicate returned {verdict!r} for {name!r}, should return True, False or None")
        if reason is None and verdict is None:
            reason = left_before.get(name) or _default_reason(module, owners, stem)
        elif reason is None and verdict is False:
            reason = _BY_PREDICATE
        reasons[name] = reason
    return reasons


def _replacement(
    name: str,
    module: Any,
    seed: int | None,
    options: Mapping[str, Any],
    trace: _Trace | None,
    *,
    on_meta: bool,
) -> nn.Module:
    options = dict(options)
    if options.get("train_masks") and options.get("mask_size") is None:
        if trace is None:
            raise ValueError(
                "train_masks=True needs masks of a known size: give example_input, from which each layer's size is "
                "taken, or mask_size=(H, W)"
            )
        size = trace.sizes.get(name)
        if size is None:
            raise ValueError(
                f"{name}: train_masks=True needs the size of its masks, but example_input's run never reached it; "
                "give mask_size=(H, W), or leave it by the predicate"
            )
        options["mask_size"] = size
    try:
        return build_perturbation(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.bias is not None,
            module.padding_mode,
            "meta" if on_meta else module.weight.device,
            module.weight.dtype,
            seed=seed,
            **options,
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name or 'the model'}: {error}") from error


def _carry_over(old: Any, new: Any) -> None:
    """Mode, requires_grad and hooks of the old module; the hook tables themselves, so that handles stay good."""
    new.train(old.training)
    fixed = {id(p) for layer in new.modules() if isinstance(layer, PerturbConv2d) for p in _masks_of(layer)}
    output_bias = new.mix.bias if isinstance(new, PerturbMixConv2d) else new.bias
    for parameter in new.parameters():
        if id(parameter) in fixed:
            continue
        source = old.bias if parameter is output_bias and old.bias is not None else old.weight
        parameter.requires_grad_(source.requires_grad)
    for table in _HOOK_TABLES:
        own = getattr(new, table)
        carried = getattr(old, table)
        carried.update(own)
        setattr(new, table, carried)
    new._is_full_backward_hook = old._is_full_backward_hook


def _masks_of(layer: PerturbConv2d) -> Iterator[torch.Tensor]:
    mask = getattr(layer, "mask", None)
    if isinstance(mask, torch.Tensor):
        yield mask


def _swap(model: nn.Module, plan: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts the new modules wherever the old ones are referred to and returns the model, or what replaces it itself."""
    if model in plan:
        return plan[model]

    done: dict[int, Any] = {}

    def swapped(value: Any) -> Any:
        """The value with old modules replaced, in plain containers too; the same object where nothing is to be done."""
        if isinstance(value, nn.Module):
            return plan.get(value, value)
        if type(value) not in (list, dict, tuple):
            return value
        if id(value) in done:
            return done[id(value)]
        done[id(value)] = value
        if type(value) is list:
            value[:] = [swapped(item) for item in value]
        elif type(value) is dict:
            for key in value:
                value[key] = swapped(value[key])
        else:
            changed = tuple(swapped(item) for item in value)
            if any(a is not b for a, b in zip(changed, value, strict=True)):
                done[id(value)] = changed
        return done[id(value)]

    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is not None and child in plan:
                module._modules[key] = plan[child]
        for key, value in list(module.__dict__.items()):
            if key in _INTERNAL:
                continue
            changed = swapped(value)
            if changed is not value:
                module.__dict__[key] = changed
    return model


_INTERNAL = frozenset(nn.Module().__dict__)


def _merged_record(previous: Conversion | None, record: Conversion) -> Conversion:
    """The table after a repeated conversion: what was converted earlier stays in it."""
    if previous is None:
        return record
    if not record.converted:
        return previous
    rows = {row.name: row for row in previous.rows}
    rows.update({row.name: row for row in record.rows})
    return replace(record, rows=tuple(rows.values()), parameters_before=previous.parameters_before)


@dataclass
class _Trace:
    """What a run of the example input showed: names of the stem's convolutions, and the padded size each one reads."""

    stem: set[str]
    sizes: dict[str, tuple[int, int]]


class _Origin(TorchDispatchMode):
    """Marks each tensor that depends on the model's input as raw (through no weight) or learned."""

    def __init__(self, inputs: list[torch.Tensor], weights: set[int]) -> None:
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


def _trace(model: nn.Module, example_input: Any) -> _Trace:
    """Runs the example input through a copy of the model in evaluation mode."""
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
    trace = _Trace(set(), {})
    origin = _Origin(inputs, weights)

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            source = args[0] if args else kwargs.get("input")
            if not isinstance(source, torch.Tensor):
                return
            if origin.learned.get(source) is False:
                trace.stem.add(name)
            if isinstance(module, nn.Conv2d) and source.dim() in (3, 4):
                trace.sizes[name] = _padded_size(module, source.shape[-2], source.shape[-1])

        return hook

    for module, found in _convolutions(clone).items():
        module.register_forward_pre_hook(watch(found[0]), with_kwargs=True)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), origin:
            clone(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"example_input doesn't run through the model in evaluation mode ({type(error).__name__}: {error}); give "
            "what the model takes: a tensor, a tuple of positional arguments or a dict of keyword arguments"
        ) from error
    return trace


def _padded_size(module: nn.Conv2d, height: int, width: int) -> tuple[int, int]:
    """The size of the padded grid on which the replacement's masks live: H + 2p - d(k - 1) along each axis."""
    sizes = []
    for axis, size in enumerate((height, width)):
        extent = module.dilation[axis] * (module.kernel_size[axis] - 1)
        if isinstance(module.padding, str):
            sizes.append(size if module.padding == "same" else size - extent)
        else:
            sizes.append(size + 2 * module.padding[axis] - extent)
    return sizes[0], sizes[1]
