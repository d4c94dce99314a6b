"""The operators in standard ONNX operators: what ``torch.onnx.export`` puts where it meets one of ours.

ONNX has no integers that Philox could run on everywhere, so a seed's masks are stored, as an initializer for the
largest image, and the part that an image meets is sliced off. The sizes go through a small table that holds the numbers
from 0 to the largest: a larger image is an index outside it, and the runtime's error names the node, whose name says
the limit. (Without the table Slice would clip, and Add might broadcast what is left without a word.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch import fx

from . import _mask_sizes, reference

__all__ = ["translations"]

_SIXTEEN_BITS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _same(u: Any) -> Any:
    return u


def _gelu(u: Any) -> Any:
    half, one, root = (_scalar(value, u.dtype) for value in (0.5, 1.0, math.sqrt(0.5)))
    return op.Mul(op.Mul(u, half), op.Add(op.Erf(op.Mul(u, root)), one))


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "identity": _same,
    "relu": lambda u: op.Relu(u),
    "leaky_relu": lambda u: op.LeakyRelu(u, alpha=0.01),
    "elu": lambda u: op.Elu(u, alpha=1.0),
    "selu": lambda u: op.Selu(u, alpha=reference.SELU_ALPHA, gamma=reference.SELU_SCALE),
    "gelu": _gelu,
    "silu": lambda u: op.Mul(u, op.Sigmoid(u)),
    "tanh": lambda u: op.Tanh(u),
    "sigmoid": lambda u: op.Sigmoid(u),
    "hardtanh": lambda u: op.Clip(u, _scalar(-1.0, u.dtype), _scalar(1.0, u.dtype)),
}


def _scalar(value: float, dtype: ir.DataType) -> Any:
    return op.Constant(value=ir.tensor(np.array(value, dtype=dtype.numpy())))


def _integers(*values: int) -> Any:
    return op.Constant(value=ir.tensor(np.array(values, dtype=np.int64)))


def _cast(value: Any, dtype: ir.DataType) -> Any:
    if value.dtype == dtype:
        return value
    result = op.Cast(value, to=dtype)
    result.dtype = dtype
    return result


def _typed(result: Any, dtype: ir.DataType) -> Any:
    """The same value with its type noted: the recorder infers none."""
    result.dtype = dtype
    return result


# --------------------------------------------------------------------------------------------------------------------
# What the exporter's values tell about the graph they come from
# --------------------------------------------------------------------------------------------------------------------


def _fx_node(value: Any) -> fx.Node | None:
    """The node of the traced graph that a value stems from."""
    node = value.meta.get("node")
    producer = value.producer()
    return producer.meta.get("node") if node is None and producer is not None else node


def _graph_of(values: Sequence[Any]) -> fx.Graph:
    for value in values:
        node = None if value is None else _fx_node(value)
        if node is not None:
            return node.graph
    raise RuntimeError("torch_pnn: this version of torch.onnx.export doesn't say which graph it translates")


def _sizes(value: Any, graph: fx.Graph) -> list[Any]:
    """Rows and columns of an image, symbolic where they are: the exporter's values hold symbols by their text."""
    known: dict[str, Any] = {}
    for node in graph.nodes:
        found = node.meta.get("val")
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor):
                symbols: list[Any] = [size for size in tensor.shape if isinstance(size, torch.SymInt)]
                known.update({str(size.node): size for size in symbols})
    return [size if isinstance(size, int) else known[str(size.value)] for size in value.shape.dims[-2:]]


def _layer(seed: Any, input: Any, graph: fx.Graph) -> str:
    """The name of the layer that reads this seed and this input."""
    readers = [node for node in graph.nodes if seed.name in [argument.name for argument in node.all_input_nodes]]
    for node in readers:
        if input is None or input.name in [argument.name for argument in node.all_input_nodes]:
            return _mask_sizes.layer_name(node)
    return str(seed.name)


def _constant_behind(seed: Any) -> Callable[[], torch.Tensor]:
    """A seed's value, which the exporter knows only after it has translated all nodes."""
    origin = seed
    while (producer := origin.producer()) is not None and producer.op_type in ("Identity", "Cast"):
        origin = producer.inputs[0]

    def value() -> torch.Tensor:
        if origin.const_value is None:
            raise ValueError(
                f"the seed {seed.name} is no constant of the program but computed or given at run time, it should be a "
                "buffer or a number: ONNX stores the masks, not the seed"
            )
        return torch.from_numpy(origin.const_value.numpy().reshape(-1)[:1].astype(np.int64))

    return value


# --------------------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------------------


def _stored_masks(
    seed: Any,
    name: str,
    channels: int,
    masks: int,
    grid: _mask_sizes.Grid,
    shared_masks: bool,
    noise: str,
    level: float | None,
    dtype: ir.DataType,
) -> Any:
    """An initializer with the seed's masks: [C or 1, M, rows, columns].

    With a level they are multiplied by it, to be added: one mask a channel then lies as [1, C or 1, rows, columns].
    """
    value_of = _constant_behind(seed)
    rows = 1 if shared_masks else channels
    leading = (1, rows) if level is not None and masks == 1 else (rows, masks)
    shape = (*leading, grid.height, grid.width)

    def values() -> ir.Tensor:
        mask = reference.perturbation_mask(
            value_of(), channels, masks, grid.height, grid.width, shared_masks=shared_masks, noise=noise
        )
        wide = mask.to(torch.float64) if dtype == ir.DataType.DOUBLE else mask
        numbers = (wide if level is None else wide * level).reshape(shape).numpy()
        return ir.tensor(numbers.astype(dtype.numpy()), name=name)

    result = op.Constant(value=ir.LazyTensor(values, dtype, ir.Shape(shape), name=name))
    result.name = name
    return _typed(result, dtype)


def _limited(size: Any, most: int, name: str) -> Any:
    """A size [1] as it is; a node of this name fails where it is larger than `most`."""
    table = op.Constant(value=ir.tensor(np.arange(most + 1, dtype=np.int64)))
    result = op.Gather(table, size, axis=0)
    result.producer().name = name
    return result


def _sliced_masks(masks: Any, sizes: Any, grid: _mask_sizes.Grid, stride: Sequence[int], label: str) -> Any:
    """The part of stored masks that an image of `sizes` [2] meets, at every stride-th pixel."""
    ends, axes, steps = [], [], []
    for axis, (most, name) in enumerate(((grid.height, "rows"), (grid.width, "columns"))):
        if not grid.dynamic[axis] and stride[axis] == 1:
            continue
        axes.append(axis + 2)
        steps.append(stride[axis])
        if grid.dynamic[axis]:
            ends.append(_limited(op.Gather(sizes, _integers(axis), axis=0), most, f"{label}_{name}"))
        else:
            ends.append(_integers(most))
    if not axes:
        return masks
    end = ends[0] if len(ends) == 1 else op.Concat(*ends, axis=0)
    return _typed(op.Slice(masks, _integers(*[0] * len(axes)), end, _integers(*axes), _integers(*steps)), masks.dtype)


# --------------------------------------------------------------------------------------------------------------------
# The layer
# --------------------------------------------------------------------------------------------------------------------


class _Limits:
    """What the table knows: the largest image, and the names that it gave.

    Attributes:
        max_size: its rows and columns, or None.
    """

    def __init__(self, max_size: tuple[int, int] | None) -> None:
        self.max_size = max_size
        self._given: dict[str, int] = {}

    def grid(self, sizes: Sequence[Any], graph: fx.Graph) -> _mask_sizes.Grid:
        """The masks' size for a layer that meets images of these sizes."""
        return _mask_sizes.grid_of(sizes, _mask_sizes.image_limits(graph, self.max_size))

    def masks_name(self, layer: str, grid: _mask_sizes.Grid) -> str:
        """A name for an initializer that no other has: a layer may be called more than once."""
        name = f"{layer}_masks_{grid.height}x{grid.width}"
        count = self._given[name] = self._given.get(name, 0) + 1
        return name if count == 1 else f"{name}_{count}"

    def label(self, layer: str, grid: _mask_sizes.Grid) -> str:
        """How the nodes are called that fail in larger images."""
        return _mask_sizes.limit_name(self.max_size, grid, layer)


class _Layer:
    """Emits the nodes of one layer.

    Attributes:
        compute: the type that computes.
        product: the type of the product's operands: the weight's.
        maps: a, [B, K, H', W'].
    """

    def __init__(
        self,
        limits: _Limits,
        input: Any,
        weight: Any,
        mask: Any,
        seed: Any,
        masks: int,
        shared_masks: bool,
        noise: str,
        level: float,
        activation: str,
        stride: Sequence[int],
        groups: int,
    ) -> None:
        self.compute = ir.DataType.DOUBLE if input.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
        self.product = weight.dtype
        self.groups = groups
        self.weight = weight
        pair = (stride[0], stride[-1])
        channels = int(input.shape[1])
        x = input
        if pair != (1, 1):
            ends = _integers(*[np.iinfo(np.int64).max] * 2)
            x = _typed(op.Slice(x, _integers(0, 0), ends, _integers(2, 3), _integers(*pair)), input.dtype)
        u = _cast(x, self.compute)
        offset = None
        if mask is not None:
            masks = int(mask.shape[1])
            offset = op.Mul(_cast(mask, self.compute), _scalar(level, self.compute))
            if masks == 1:
                offset = op.Transpose(offset, perm=[1, 0, 2, 3])
            exact = _mask_sizes.Grid(int(mask.shape[2]), int(mask.shape[3]))
            offset = _sliced_masks(_typed(offset, self.compute), None, exact, pair, "")
        elif seed is not None:
            graph = _graph_of([seed, input, weight])
            grid = limits.grid(_sizes(input, graph), graph)
            layer = _layer(seed, input, graph)
            name = limits.masks_name(layer, grid)
            offset = _stored_masks(seed, name, channels, masks, grid, shared_masks, noise, level, self.compute)
            sizes = op.Shape(input, start=2, end=4) if any(grid.dynamic) else None
            offset = _sliced_masks(offset, sizes, grid, pair, limits.label(layer, grid))
        if masks == 1:  # the maps are the channels: [1, C or 1, H, W] needs no fifth dimension
            if offset is not None:
                u = op.Add(u, offset)
            self.maps = _ACTIVATIONS[activation](_typed(u, self.compute))
        else:
            wide = op.Unsqueeze(u, _integers(2))
            if offset is not None:
                wide = op.Add(wide, offset)
            else:
                wide = op.Expand(wide, _integers(1, 1, masks, 1, 1))
            a = _ACTIVATIONS[activation](_typed(wide, self.compute))
            shape = op.Concat(
                op.Shape(u, start=0, end=1), _integers(channels * masks), op.Shape(u, start=2, end=4), axis=0
            )
            self.maps = op.Reshape(a, shape, allowzero=1)
        _typed(self.maps, self.compute)

    def per_map(self, vector: Any) -> Any:
        """A value a map [K] to be used with [B, K, H', W']."""
        return op.Reshape(vector, _integers(1, -1, 1, 1))

    def mixed(self, maps: Any, weight: Any, offset: Any) -> Any:
        """The 1x1 convolution: operands rounded to the weight's type, sums in the type that computes."""
        if self.product in _SIXTEEN_BITS:
            maps = _cast(_cast(maps, self.product), self.compute)
            weight = _cast(_cast(weight, self.product), self.compute)
        offset = None if offset is None else _cast(offset, self.compute)
        result = op.Conv(maps, weight, offset, kernel_shape=[1, 1], group=self.groups)
        return _cast(_typed(result, self.compute), self.product)


def translations(max_size: tuple[int, int] | None) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The table for ``torch.onnx.export(custom_translation_table=...)``."""
    limits = _Limits(max_size)

    def perturb_conv2d(
        input: Any,
        weight: Any,
        bias: Any = None,
        mask: Any = None,
        seed: Any = None,
        masks: int = 1,
        shared_masks: bool = False,
        noise: str = "uniform",
        level: float = 1.0,
        activation: str = "relu",
        stride: Any = (1, 1),
        groups: int = 1,
    ) -> Any:
        layer = _Layer(limits, input, weight, mask, seed, masks, shared_masks, noise, level, activation, stride, groups)
        return layer.mixed(layer.maps, weight, bias)

    def perturb_norm_conv2d(
        input: Any,
        weight: Any,
        bias: Any,
        norm_weight: Any,
        norm_bias: Any,
        running_mean: Any,
        running_var: Any,
        mask: Any = None,
        seed: Any = None,
        training: bool = True,
        eps: float = 1e-5,
        masks: int = 1,
        shared_masks: bool = False,
        noise: str = "uniform",
        level: float = 1.0,
        activation: str = "relu",
        stride: Any = (1, 1),
        groups: int = 1,
    ) -> Any:
        layer = _Layer(limits, input, weight, mask, seed, masks, shared_masks, noise, level, activation, stride, groups)
        compute = layer.compute
        axes = _integers(0, 2, 3)
        if training:
            mean = op.ReduceMean(layer.maps, axes, keepdims=0)
        else:
            mean = op.Identity(running_mean)
        centred = _typed(op.Sub(layer.maps, layer.per_map(mean)), compute)
        if training:
            variance = op.ReduceMean(op.Mul(centred, centred), axes, keepdims=0)
        else:
            variance = op.Identity(running_var)
        scale = op.Reciprocal(op.Sqrt(op.Add(variance, _scalar(eps, compute))))
        if norm_weight is not None:
            scale = op.Mul(scale, norm_weight)
        # The weight as [groups, T/groups, K/groups], beside vectors over the maps as [groups, 1, K/groups].
        outputs, columns = int(weight.shape[0]), int(weight.shape[1])
        v = op.Reshape(_cast(weight, compute), _integers(groups, outputs // groups, columns))
        rows = _integers(groups, 1, columns)
        scaled = op.Reshape(op.Mul(v, op.Reshape(scale, rows)), _integers(outputs, columns, 1, 1))
        offset = None if bias is None else _cast(bias, compute)
        if norm_bias is not None:
            shift = op.ReduceSum(op.Mul(v, op.Reshape(norm_bias, rows)), _integers(2), keepdims=0)
            shift = _typed(op.Reshape(shift, _integers(outputs)), compute)
            offset = shift if offset is None else _typed(op.Add(offset, shift), compute)
        return layer.mixed(centred, _typed(scaled, compute), offset), mean, variance

    def perturbation_mask(
        seed: Any,
        channels: int,
        masks: int,
        height: Any,
        width: Any,
        shared_masks: bool = False,
        noise: str = "uniform",
        dtype: Any = None,
    ) -> Any:
        graph = _graph_of([seed, height, width])
        symbolic, dims = [], []
        for size in (height, width):
            node = _fx_node(size) if isinstance(size, ir.Value) else None
            symbolic.append(size if node is None else node.meta["val"])
            dims.append(_integers(size) if node is None else op.Reshape(size, _integers(1)))
        grid = limits.grid(symbolic, graph)
        kind = ir.DataType.FLOAT if dtype is None or dtype == -1 else ir.DataType(int(dtype))
        layer = _layer(seed, None, graph)
        name = limits.masks_name(layer, grid)
        stored = _stored_masks(seed, name, channels, masks, grid, shared_masks, noise, None, kind)
        sizes = op.Concat(*dims, axis=0) if any(grid.dynamic) else None
        result = _sliced_masks(stored, sizes, grid, (1, 1), limits.label(layer, grid))
        return op.Identity(result) if result is stored else result

    operators = torch.ops.torch_pnn
    return {
        operators.perturb_conv2d.default: perturb_conv2d,
        operators.perturb_norm_conv2d.default: perturb_norm_conv2d,
        operators.perturbation_mask.default: perturbation_mask,
    }
