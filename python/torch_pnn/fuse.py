"""Folds batch normalisation that follows a layer into the layer's weight and bias, for a model that is only evaluated.

In evaluation a batch normalisation is z = s*y + t for each output, s = gamma / sqrt(variance + eps) and
t = beta - s*mean, so that a layer y = bias + V*a takes it in with other numbers: V' = s*V, bias' = s*bias + t.
Where the layer pools with the maximum in between, that holds for s >= 0 alone: a negative s makes a minimum of it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from .conversion.swap import forget
from .modules import LBConv2d, PerturbConv2d

__all__ = ["Fusion", "FusionRow", "fuse"]

Model = TypeVar("Model", bound=nn.Module)

_RECORD = "fusion"
_LAYERS: tuple[type[nn.Module], ...] = (PerturbConv2d, LBConv2d, nn.Conv2d)
_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm2d, nn.SyncBatchNorm)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclasses.dataclass(frozen=True)
class FusionRow:
    """A layer and a normalisation that follows it, and what became of them.

    Attributes:
        layer: the layer's qualified name.
        norm: the normalisation's; `<layer>.norm` for one inside of a layer.
        fused: whether it was folded.
        reason: why it was left; empty where it was folded.
    """

    layer: str
    norm: str
    fused: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Fusion:
    """What `fuse` did to a model; `str()` of it is a table.

    Attributes:
        rows: a row for each pair, in the order in which the model runs.
    """

    rows: tuple[FusionRow, ...]

    @property
    def fused(self) -> tuple[FusionRow, ...]:
        """The pairs that were folded."""
        return tuple(row for row in self.rows if row.fused)

    @property
    def left(self) -> tuple[FusionRow, ...]:
        """The pairs that were left, with reasons."""
        return tuple(row for row in self.rows if not row.fused)

    def __str__(self) -> str:
        table = [("layer", "normalisation", "became", "why")]
        table += [(row.layer, row.norm, "fused" if row.fused else "left", row.reason) for row in self.rows]
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
        return "\n".join([*lines, f"{len(self.fused)} fused, {len(self.left)} left"])


# --------------------------------------------------------------------------------------------------------------------
# Which normalisation follows which layer
# --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Hooks stay away from what a tracer puts through the model."""
    held = [(module, table, getattr(module, table)) for module in model.modules() for table in _HOOKS]
    try:
        for module, table, _ in held:
            setattr(module, table, OrderedDict())
        yield
    finally:
        for module, table, hooks in held:
            setattr(module, table, hooks)


def _traced_pairs(model: nn.Module) -> tuple[list[tuple[str, str, str]], Counter[str]]:
    """The pairs of a model's graph, each with the reason for which it can't be folded, and how often modules run."""
    try:
        with _without_hooks(model):
            graph = fx.Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"torch.fx can't trace the model ({type(error).__name__}: {error}), so what follows what is unknown: name "
            'the pairs, as pairs=[("layer1.conv", "layer1.bn"), ...]'
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or type(modules.get(str(node.target))) not in _NORMS:
            continue
        sources = node.all_input_nodes
        before = sources[0] if len(sources) == 1 else None
        if before is None or before.op != "call_module" or not _is_layer(modules.get(str(before.target))):
            continue
        layer, norm = str(before.target), str(node.target)
        reason = ""
        if len(before.users) > 1:
            reason = "the layer's output is used elsewhere too"
        elif layer in read or norm in read:
            reason = "the model reads its tensors itself"
        elif any(_hooked(modules[name]) for name in _around(layer) ^ _around(norm)):
            reason = "a module around one of the two has hooks"
        pairs.append((layer, norm, reason))
    return pairs, calls


def _around(name: str) -> set[str]:
    """The names of the modules that hold a module."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(len(parts))}


def _is_layer(module: nn.Module | None) -> bool:
    """Whether a module is of one of the classes that are known, parametrized or not."""
    if module is None:
        return False
    kind = type(module)
    return kind in _LAYERS or (parametrize.is_parametrized(module) and kind.__bases__[0] in _LAYERS)


def _named_pairs(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Pairs as the caller names them, checked."""
    modules = dict(model.named_modules(remove_duplicate=False))
    checked = []
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"pairs has {pair!r}, it should have pairs of names (layer, normalisation)")
        for name, wanted, kinds in zip(pair, (_is_layer, lambda m: type(m) in _NORMS), (_LAYERS, _NORMS)):
            if name not in modules:
                raise ValueError(f"pairs has {name!r}, which is no module of the model")
            if not wanted(modules[name]):
                known = ", ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"pairs has {name!r}, a {type(modules[name]).__name__}, it should be one of {known}")
        checked.append((pair[0], pair[1], ""))
    twice = [norm for norm, times in Counter(norm for _, norm, _ in checked).items() if times > 1]
    if twice:
        raise ValueError(f"pairs has {twice[0]!r} twice")
    return checked


# --------------------------------------------------------------------------------------------------------------------
# Whether it can be folded
# --------------------------------------------------------------------------------------------------------------------


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, table) for table in _HOOKS)


def _norm_reason(norm: Any) -> str:
    """Why a normalisation is no fixed affine map; empty where it is one."""
    if norm.training:
        return "the normalisation is in training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "the normalisation keeps no running statistics"
    if parametrize.is_parametrized(norm) or not {"weight", "bias"} <= norm._parameters.keys():
        return "the normalisation's weight is computed (a parametrization or pruning): remove that first"
    if _hooked(norm):
        return "the normalisation has hooks, which would no longer run"
    return ""


def _layer_reason(layer: Any) -> str:
    """Why a layer's weight and bias can't be replaced; empty where they can."""
    if parametrize.is_parametrized(layer) or not {"weight", "bias"} <= layer._parameters.keys():
        return "the layer's weight is computed (a parametrization or pruning): remove that first"
    if _hooked(layer):
        return "the layer has hooks, which would see other values"
    return ""


def _reason(layer: Any, norm: Any, owners: Counter[int], calls: Counter[str], names: tuple[str, str]) -> str:
    """Why a pair can't be folded; empty where it can."""
    reason = _norm_reason(norm) or _layer_reason(layer)
    if reason:
        return reason
    if norm.num_features != layer.out_channels:
        return f"the normalisation is of {norm.num_features} channels, the layer has {layer.out_channels}"
    if any(calls[name] > 1 for name in names) or owners[id(layer)] > 1 or owners[id(norm)] > 1:
        return "one of the two is used more than once"
    if any(owners[id(tensor)] > 1 for tensor in (layer.weight, layer.bias) if tensor is not None):
        return "the layer's weight or bias is another module's too"
    pools = isinstance(layer, PerturbConv2d) and layer.downsample == "max" and layer.stride != (1, 1)
    if pools and not layer.weight.is_meta and bool((_scale(norm) < 0).any()):
        return "the layer pools with the maximum and the normalisation has a negative weight"
    return ""


def _inside_reason(layer: PerturbConv2d, owners: Counter[int]) -> str:
    """Why the normalisation inside of a layer can't be folded; empty where it can."""
    if type(layer.norm) not in _NORMS:
        return f"the normalisation is a {type(layer.norm).__name__}"
    reason = _norm_reason(layer.norm) or _layer_reason(layer)
    if reason:
        return reason
    if any(owners[id(held)] > 1 for held in (layer.norm, layer.weight, layer.bias) if held is not None):
        return "the normalisation, the layer's weight or its bias is another module's too"
    return ""


def _owners(model: nn.Module) -> Counter[int]:
    """How many places of the model hold each module, parameter and buffer."""
    held: Counter[int] = Counter()
    for module in model.modules():
        held.update(id(child) for child in module._modules.values() if child is not None)
        tensors = (*module._parameters.values(), *module._buffers.values())
        held.update(id(tensor) for tensor in tensors if tensor is not None)
    return held


# --------------------------------------------------------------------------------------------------------------------
# Folding
# --------------------------------------------------------------------------------------------------------------------


def _scale(norm: Any) -> Tensor:
    """s, in float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.double()


def _shift(norm: Any) -> Tensor:
    """t, in float64."""
    shift = -norm.running_mean.double() * _scale(norm)
    return shift if norm.bias is None else shift + norm.bias.double()


def _replace(layer: Any, weight: Tensor, bias: Tensor) -> None:
    """Gives a layer new values: the weight in its place, so that whoever holds the parameter sees them too."""
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)
    else:
        learnt = layer.weight.requires_grad
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=learnt)


def _fold_after(layer: Any, norm: Any) -> None:
    """Folds a normalisation of the layer's outputs."""
    scale, shift = _scale(norm), _shift(norm)
    bias = shift if layer.bias is None else scale * layer.bias.double() + shift
    _replace(layer, scale.reshape(-1, 1, 1, 1) * layer.weight.double(), bias)


def _fold_inside(layer: PerturbConv2d) -> None:
    """Folds the normalisation of the response maps: of map k the columns k of V, and its shift into the bias."""
    norm = layer.norm
    groups, outputs = layer.groups, layer.out_channels
    # One row of scales and of shifts a group; an output takes its group's.
    rows = torch.arange(outputs, device=layer.weight.device) // max(outputs // groups, 1)
    scale, shift = (vector.reshape(groups, -1)[rows] for vector in (_scale(norm), _shift(norm)))
    matrix = layer.weight.double().flatten(1)
    bias = (matrix * shift).sum(1)
    if layer.bias is not None:
        bias = bias + layer.bias.double()
    _replace(layer, (matrix * scale).reshape(layer.weight.shape), bias)
    layer.norm = None


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent)._modules[last] = module


def fuse(
    model: Model, *, inplace: bool = False, pairs: Iterable[tuple[str, str]] | None = None, inside: bool = False
) -> Model:
    """Folds batch normalisations into the layers before them, for evaluation.

    An `nn.BatchNorm2d` (or `nn.SyncBatchNorm`) whose only input is the output of a `PerturbConv2d`, `LBConv2d` or
    `nn.Conv2d` goes into that layer's weight and bias, computed in float64, and an `nn.Identity` takes its place. The
    pairs are found with ``torch.fx``; a model that it can't trace needs them named. A pair that can't be folded (it is
    used twice, has hooks, is parametrized or pruned, is in training mode, or the layer pools with the maximum and the
    normalisation has a negative weight) is left, with the reason in the table.

    The normalisation inside of a layer with `norm=True` stays: in evaluation the operator subtracts the mean in
    passing, which costs next to nothing, and is more accurate so (docs/decisions/0003-batch-normalisation-inside.md).
    `inside=True` folds it too, for a model that has to do without: what is computed is then that of a `norm=False`
    layer, and where maps are nearly constant digits are lost.

    Args:
        model: in evaluation mode.
        inplace: whether the model itself is changed, or a deep copy.
        pairs: names (layer, normalisation) of pairs to be folded, instead of those that are found.
        inside: whether normalisation inside of layers is folded too.

    Returns:
        The model; its attribute `fusion` is the table of what was folded and what was left.

    Raises:
        TypeError: `model` isn't an `nn.Module`, or `pairs` doesn't hold pairs of names.
        ValueError: the model is in training mode, can't be traced, or a name in `pairs` is none of a fitting module.

    Example:
        >>> model = nn.Sequential(PerturbConv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> fused = fuse(model)
        >>> print(fused.fusion)
        layer  normalisation  became  why
        0      1              fused
        1 fused, 0 left
        >>> x = torch.randn(1, 3, 16, 16)
        >>> torch.allclose(fused(x), model(x), atol=1e-6)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}, should be an nn.Module")
    if model.training:
        raise ValueError(
            "the model is in training mode, where normalisation depends on the batch: call model.eval() first"
        )
    found, calls = _traced_pairs(model) if pairs is None else (_named_pairs(model, pairs), Counter())
    if not inplace:
        model = copy.deepcopy(model)
    owners = _owners(model)
    rows = []
    with torch.no_grad():
        for layer_name, norm_name, known in found:
            layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
            reason = known or _reason(layer, norm, owners, calls, (layer_name, norm_name))
            if not reason:
                _fold_after(layer, norm)
                _put(model, norm_name, nn.Identity().eval())
                forget(layer)  # the convolution that it stood for had the normalisation behind it
            rows.append(FusionRow(layer_name, norm_name, not reason, reason))
        for name, layer in model.named_modules() if inside else ():
            if isinstance(layer, PerturbConv2d) and layer.norm is not None:
                reason = _inside_reason(layer, owners)
                if not reason:
                    _fold_inside(layer)
                rows.append(FusionRow(name, f"{name}.norm" if name else "norm", not reason, reason))
    setattr(model, _RECORD, Fusion(tuple(rows)))
    return model
