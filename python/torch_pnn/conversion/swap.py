"""Puts modules in each other's place, with what belongs to the place: mode, requires_grad, hooks, the way back.

A layer that `convert` made knows the convolution that it stands for, as an `Original` in its `__dict__`: outside the
layer's children, so that parameters(), state_dict(), to(), an optimizer or DistributedDataParallel don't see it, and
inside the layer, so that it is copied and pickled with it and is there wherever the layer goes.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..modules import PerturbConv2d
from ..presets import PerturbMixConv2d

__all__ = ["INTERNAL", "Original", "carry_back", "carry_over", "forget", "original_of", "remember", "swap"]

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
INTERNAL = frozenset(nn.Module().__dict__)  # the attributes of every module, which nn.Module keeps for itself
_ORIGINAL = "_original"
_DRAWN = ("weight", "bias")  # the parameters that a convolution's reset_parameters draws


class Original:
    """The convolution that a perturbation layer stands for; a holder that isn't a module, so that no one walks into it.

    Attributes:
        module: The convolution: the model's own with its weights, or an empty copy of it on the meta device.
        kept: Whether it is the model's own.
    """

    __slots__ = ("kept", "module")

    def __init__(self, module: nn.Module, kept: bool) -> None:
        self.module = module
        self.kept = kept


def original_of(module: nn.Module) -> Original | None:
    """What a layer that `convert` made stands for; None for any other module."""
    found = module.__dict__.get(_ORIGINAL)
    return found if isinstance(found, Original) else None


def remember(new: nn.Module, old: nn.Module, keep: bool) -> None:
    """Notes in a new layer which convolution it stands for, with its weights (`keep`) or without."""
    if not keep:
        old = _emptied(old)
    new.__dict__[_ORIGINAL] = Original(old, keep)


def forget(layer: nn.Module) -> None:
    """Drops what a layer stands for, where something else has changed that a convolution in its place would need."""
    layer.__dict__.pop(_ORIGINAL, None)


def _emptied(module: nn.Module) -> nn.Module:
    """A copy of the module without its weights; the module itself, which the caller may hold, stays whole."""
    empty = copy.copy(module)
    empty._buffers, empty._modules = dict(module._buffers), dict(module._modules)
    empty._parameters = dict(module._parameters)
    for name in _DRAWN:
        tensor = module._parameters.get(name)
        if tensor is not None:
            nothing = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            empty._parameters[name] = nn.Parameter(nothing, tensor.requires_grad)
    return empty


def carry_over(old: Any, new: Any) -> None:
    """Mode, requires_grad and hooks of the old module; the hook tables themselves, so that handles stay good."""
    new.train(old.training)
    fixed = {id(p) for layer in new.modules() if isinstance(layer, PerturbConv2d) for p in _masks_of(layer)}
    output_bias = _mixing(new).bias
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


def carry_back(layer: Any, original: Original) -> nn.Module:
    """The convolution that the layer stands for, ready to take its place: mode, device, type, requires_grad, hooks.

    Where its weights weren't kept, it is initialised as a new one.
    """
    module: Any = original.module
    weight = _mixing(layer).weight
    if original.kept:
        module.to(device=weight.device, dtype=weight.dtype)
    else:
        for name in _DRAWN:
            tensor = module._parameters.get(name)
            if tensor is not None:
                module._parameters[name] = nn.Parameter(torch.empty(tensor.shape, dtype=weight.dtype))
        module.reset_parameters()
        module.to(device=weight.device, dtype=weight.dtype)
    module.train(layer.training)
    bias = _mixing(layer).bias
    module.weight.requires_grad_(weight.requires_grad)
    if module.bias is not None and bias is not None:
        module.bias.requires_grad_(bias.requires_grad)
    for table in _HOOK_TABLES:
        setattr(module, table, getattr(layer, table))
    for key, hook in list(module._forward_pre_hooks.items()):
        if type(hook).__module__.startswith("torch.nn.utils."):  # it computes the layer's weight: pruning, weight_norm
            del module._forward_pre_hooks[key]
    module._is_full_backward_hook = layer._is_full_backward_hook
    return module


def _mixing(layer: Any) -> Any:
    """The part of a layer that has the last 1x1 weight and the output's bias."""
    return layer.mix if isinstance(layer, PerturbMixConv2d) else layer


def _masks_of(layer: PerturbConv2d) -> Iterator[torch.Tensor]:
    mask = getattr(layer, "mask", None)
    if isinstance(mask, torch.Tensor):
        yield mask


def swap(model: nn.Module, plan: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts the new modules wherever the old ones are referred to and returns the model, or what replaces it itself.

    That is: among the children of all modules, and in their other attributes, there also inside lists, tuples (named
    ones too), dicts, sets and deques. Closures, partial functions and objects of other classes are left alone.
    """
    if model in plan:
        return plan[model]

    done: dict[int, Any] = {}
    alive = []  # so that no new object gets the id of one in `done`

    def swapped(value: Any) -> Any:
        """The value with old modules replaced; the same object where nothing is to be done or it can be changed."""
        if isinstance(value, nn.Module):
            return plan.get(value, value)
        if not isinstance(value, (list, dict, tuple, set, frozenset, deque)):
            return value
        if id(value) in done:
            return done[id(value)]
        done[id(value)] = value
        alive.append(value)
        if isinstance(value, dict):
            for key in [key for key in value if isinstance(key, nn.Module) and key in plan]:
                _rename(value, key, plan[key])
            for key in value:
                changed = swapped(value[key])
                if changed is not value[key]:
                    value[key] = changed
        elif isinstance(value, (list, deque)):
            for place, item in enumerate(value):
                changed = swapped(item)
                if changed is not item:
                    value[place] = changed
        elif isinstance(value, (set, frozenset)):
            if any(isinstance(item, nn.Module) and item in plan for item in value):
                done[id(value)] = type(value)(swapped(item) for item in value)
        else:
            items = tuple(swapped(item) for item in value)
            if any(a is not b for a, b in zip(items, value, strict=True)):
                named: Any = getattr(type(value), "_make", type(value))
                done[id(value)] = named(items)
        return done[id(value)]

    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is not None and child in plan:
                module._modules[key] = plan[child]
        for key, value in list(module.__dict__.items()):
            if key in INTERNAL:
                continue
            changed = swapped(value)
            if changed is not value:
                module.__dict__[key] = changed
    return model


def _rename(table: dict[Any, Any], old: Any, new: Any) -> None:
    """Puts another key in a key's place; the order stays."""
    items = list(table.items())
    table.clear()
    table.update((new if key is old else key, value) for key, value in items)
