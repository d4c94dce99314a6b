"""How large the masks are that a traced graph needs: the bound of a layer's image size, given that of the model's.

A graph with dynamic image sizes computes masks from their seeds at whatever size comes. Where masks have to be stored
instead (in ONNX; in a decomposition that asks for it), each layer gets the size that it meets when the model's image is
as large as named: layers behind a stride get smaller ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Grid", "checked_max_size", "grid_of", "image_limits", "layer_name", "limit_name"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The size of a layer's masks.

    Attributes:
        height: rows, at the largest image.
        width: columns.
        dynamic: whether rows and columns vary with the image.
    """

    height: int
    width: int
    dynamic: tuple[bool, bool] = (False, False)


def checked_max_size(max_size: Any) -> tuple[int, int] | None:
    """`max_size` as a pair, or None.

    Raises:
        TypeError: it is neither an int, nor a pair of ints, nor None.
        ValueError: it is not positive.
    """
    if max_size is None:
        return None
    pair = tuple(max_size) if isinstance(max_size, (tuple, list)) else (max_size, max_size)
    if len(pair) != 2 or not all(isinstance(size, int) and not isinstance(size, bool) for size in pair):
        raise TypeError(f"max_size is {max_size!r}, it should be a pair (rows, columns) of the largest image, or None")
    if min(pair) < 1:
        raise ValueError(f"max_size is {max_size!r}, it should be at least 1")
    return pair


def _largest(expression: Any, symbol: Any, least: int, limit: int) -> int:
    """The largest value of the symbol at which an expression that grows with it is at most `limit`."""
    low, high = least, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(expression.subs(symbol, middle)) <= limit else (low, middle - 1)
    return low


def image_limits(graph: fx.Graph, max_size: tuple[int, int] | None) -> dict[Any, int]:
    """The largest value of each symbol in the sizes of the model's images, where `max_size` sets one.

    Images are the inputs with four dimensions or, where there are none, those with three; their last two are meant.

    Args:
        graph: traced, its placeholders with fake tensors.
        max_size: rows and columns.

    Returns:
        Limits by sympy symbol.

    Raises:
        ValueError: an image of the trace is larger.
    """
    limits: dict[Any, int] = {}
    if max_size is None:
        return limits
    values = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    # Parameters and buffers have fixed sizes, so what is symbolic is a model's input.
    inputs = [value for value in values if isinstance(value, Tensor) and _is_symbolic(value)]
    images = [value for value in inputs if value.dim() == 4] or [value for value in inputs if value.dim() == 3]
    for image in images:
        for size, limit, axis in zip(image.shape[-2:], max_size, ("rows", "columns")):
            if not isinstance(size, torch.SymInt):
                if size > limit:
                    raise ValueError(f"max_size is {max_size}, it should be no smaller than the image's {size} {axis}")
                continue
            expression = size.node.expr
            symbols = list(expression.free_symbols)
            if len(symbols) == 1:
                least = int(size.node.shape_env.bound_sympy(symbols[0]).lower)
                found = _largest(expression, symbols[0], least, limit)
                if int(expression.subs(symbols[0], found)) > limit:
                    raise ValueError(
                        f"max_size is {max_size}, it should be no smaller than the smallest image that the program "
                        f"takes, of {expression.subs(symbols[0], found)} {axis}"
                    )
                limits[symbols[0]] = min(found, limits.get(symbols[0], found))
    return limits


def _is_symbolic(value: Tensor) -> bool:
    return any(isinstance(size, torch.SymInt) for size in value.shape)


def _bound(size: Any, limits: dict[Any, int]) -> int:
    """The most that a size can be."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

    environment = size.node.shape_env
    ranges = {}
    for symbol in size.node.expr.free_symbols:
        known = environment.bound_sympy(symbol)
        limit = limits.get(symbol)
        upper = known.upper if limit is None else min(known.upper, limit)
        ranges[symbol] = ValueRanges(min(known.lower, upper), upper)
    upper = bound_sympy(size.node.expr, ranges).upper
    if not upper.is_Integer:
        raise ValueError(
            f"the image's size is dynamic and has no upper bound (a layer meets {size.node.expr}), so no masks can be "
            "stored for it: give max_size=(rows, columns) of the largest image, or a maximum to its torch.export.Dim"
        )
    return int(upper)


def grid_of(sizes: Sequence[Any], limits: dict[Any, int]) -> Grid:
    """The masks' size for a layer that meets images of these sizes.

    Args:
        sizes: rows and columns, symbolic or not.
        limits: of `image_limits`.

    Raises:
        ValueError: a size has no upper bound.
    """
    height, width = (_bound(size, limits) for size in sizes)
    dynamic = [isinstance(size, torch.SymInt) for size in sizes]
    return Grid(height, width, (dynamic[0], dynamic[1]))


def layer_name(node: fx.Node) -> str:
    """The name of the module in which a node was traced, as an identifier; of the node itself where there is none."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    name = paths[-1] if paths and paths[-1] else node.name
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def limit_name(max_size: tuple[int, int] | None, grid: Grid, layer: str) -> str:
    """What a node is called that fails where an image is larger than the masks of a layer are made for."""
    height, width = (grid.height, grid.width) if max_size is None else max_size
    return f"perturb_mask_limit_{height}x{width}_exceeded_in_{layer}"
