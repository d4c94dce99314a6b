"""Which convolutions a model has, and which of them stay convolutions and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..modules import LBConv2d, PerturbConv2d
from ..presets import PerturbMixConv2d
from .reads import read_in_code
from .record import Conversion
from .swap import INTERNAL
from .trace import SEEN_IN_A_RUN, Trace

__all__ = ["OWN_LAYERS", "Predicate", "convolutions", "count", "decide", "geometry"]

Predicate = Callable[[str, nn.Module], "bool | None"]

OWN_LAYERS = (PerturbConv2d, LBConv2d, PerturbMixConv2d)
"""Our own layers; what is inside them is not a model's convolution."""

_STEM_TRACED = "stem: it reads the model's input"
_STEM_GUESSED = "stem: the first convolution in registration order"
_BY_PREDICATE = "left by the predicate"
_STAYS = (_STEM_TRACED, _STEM_GUESSED, _BY_PREDICATE, *SEEN_IN_A_RUN)  # reasons that a later conversion couldn't find
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def count(module: nn.Module) -> int:
    """Parameters of a module, shared ones once, those of unknown size not at all."""
    return sum(
        parameter.numel()
        for parameter in module.parameters()
        if not isinstance(parameter, nn.parameter.UninitializedParameter)
    )


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def convolutions(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every convolution outside our own layers, with all its names, in the order of registration."""
    names: dict[nn.Module, list[str]] = {}

    def visit(module: nn.Module, prefix: str) -> None:
        if isinstance(module, OWN_LAYERS):
            return
        if _is_convolution(module):
            names.setdefault(module, []).append(prefix)
            return
        for key, child in module._modules.items():
            if child is not None:
                visit(child, f"{prefix}.{key}" if prefix else key)

    visit(model, "")
    return {module: tuple(found) for module, found in names.items()}


def geometry(module: Any) -> str:
    """A convolution's geometry in short; what is default is left out."""

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


def decide(
    model: nn.Module,
    names: Mapping[nn.Module, tuple[str, ...]],
    predicate: Predicate | None,
    trace: Trace | None,
    previous: Conversion | None,
) -> dict[str, str | None]:
    """For each convolution, by its first name, the reason why it is left, or None where it is converted."""
    owners = _owners(model)
    if trace is not None:
        stem = {module: _STEM_TRACED for module, found in names.items() if found[0] in trace.stem}
    else:
        stem = {module: _STEM_GUESSED for module in list(names)[:1]}
        if any(isinstance(module, OWN_LAYERS) for module in model.modules()):
            first = next(
                module for module in model.modules() if isinstance(module, OWN_LAYERS) or _is_convolution(module)
            )
            if isinstance(first, OWN_LAYERS):
                stem = {}
    left_before = {row.name: row.reason for row in (previous.left if previous else ()) if row.reason.startswith(_STAYS)}
    reads = dict(read_in_code(model, names))
    if trace is not None:
        reads.update((module, trace.reads[found[0]]) for module, found in names.items() if found[0] in trace.reads)

    reasons: dict[str, str | None] = {}
    for module, found in names.items():
        name = found[0]
        reason = _fixed_reason(module)
        verdict = None if predicate is None else predicate(name, module)
        if verdict is not None and not isinstance(verdict, bool):
            raise TypeError(f"predicate returned {verdict!r} for {name!r}, should return True, False or None")
        if reason is None and verdict is None:
            reason = left_before.get(name) or _default_reason(module, owners, stem, reads)
        elif reason is None and verdict is False:
            reason = _BY_PREDICATE
        reasons[name] = reason
    return reasons


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Which modules have a parameter, by its id; and which of their attributes hold it, in lists or dicts too."""
    owners: dict[int, list[str]] = {}

    def note(value: Any, place: str, seen: set[int]) -> None:
        if isinstance(value, nn.Parameter):
            owners.setdefault(id(value), []).append(place)
        elif isinstance(value, (list, tuple, dict)) and id(value) not in seen:
            seen.add(id(value))
            for item in value.values() if isinstance(value, dict) else value:
                note(item, place, seen)

    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            note(parameter, name or "(the model)", set())
        for key, value in module.__dict__.items():
            if key not in INTERNAL:
                note(value, f"{name}.{key}" if name else key, set())
    return owners


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
    for method in ("forward", "_conv_forward"):
        if method in module.__dict__:
            return f"its {method} was replaced on the module itself"
    if module.weight.dtype not in _FLOATING:
        return f"its data type {module.weight.dtype} has no perturbation layer"
    return None


def _default_reason(
    module: Any, owners: Mapping[int, list[str]], stem: Mapping[nn.Module, str], reads: Mapping[nn.Module, str]
) -> str | None:
    """Why the rules leave the module; None where they convert it."""
    if type(module) is not nn.Conv2d:
        return f"subclass {_class_name(module)} of nn.Conv2d"
    shared = sorted({owner for p in module._parameters.values() if p is not None for owner in owners[id(p)]})
    if len(shared) > 1:
        return f"its parameters are shared by {', '.join(shared)}"
    if module in reads:
        return reads[module]
    if module in stem:
        return stem[module]
    if module.groups > 1 and module.groups == module.in_channels:
        return "depthwise convolution"
    if all(size == 1 for size in module.kernel_size):
        return "1x1 convolution"
    return None


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
