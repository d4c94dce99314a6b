"""Finds code that takes a convolution's weight into its own hands, such as `F.conv2d(x, self.conv.weight)`.

A perturbation layer's weight is [T, C/groups * M, 1, 1] and belongs behind its masks and its activation; code that
reads it as a convolution's would compute something else, perhaps without an error. Two ways to see such code complement
each other: `conversion.trace` watches a run of the model, which sees every read that happens in it; here the methods of
the model's own classes are read as text, which needs no example and also sees branches that no run takes, but only
where the path is spelt out, as in `self.conv.weight` or `self.blocks[0].weight`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from torch import nn

__all__ = ["HARMLESS", "read_in_code"]

Path = tuple["str | tuple[Any]", ...]
"""The way from `self` to a module: a name is an attribute, a tuple of one value an index or a key."""

HARMLESS = frozenset(
    """
    data_ptr device dim dtype element_size get_device grad grad_fn is_complex is_contiguous is_cpu is_cuda
    is_floating_point is_leaf is_meta is_quantized is_sparse itemsize layout names ndim ndimension nelement new_empty
    new_full new_ones new_tensor new_zeros numel output_nr requires_grad requires_grad_ retains_grad untyped_storage
    _version __hash__ __len__ __repr__ __format__
    """.split()
)
"""What may be asked of a weight without its being used as a convolution's: the answers hold for the new weight too."""

_BEFORE_THE_RUN = frozenset(
    "__init__ reset_parameters _reset_parameters init_weights _init_weights initialize_weights extra_repr".split()
)
"""Methods that run before a conversion, or whose work it does anew."""


def read_in_code(model: nn.Module, names: Mapping[nn.Module, tuple[str, ...]]) -> Iterator[tuple[nn.Module, str]]:
    """Convolutions whose weight is read in a method of the model's classes, with the reason to leave them."""
    for module in model.modules():
        if module in names:
            continue
        kind: Any = type(module)
        for method, path in _reads_of(kind):
            found: Any = module
            for step in path:
                try:
                    found = found[step[0]] if isinstance(step, tuple) else getattr(found, step)
                except Exception:  # a path that this instance doesn't have
                    found = None
                    break
            if isinstance(found, nn.Module) and found in names:
                yield found, f"its weight is read by {kind.__name__}.{method} ({_spelt(path)}.weight)"


def _spelt(path: Path) -> str:
    return "self" + "".join(f"[{step[0]!r}]" if isinstance(step, tuple) else f".{step}" for step in path)


@functools.cache
def _reads_of(kind: Any) -> tuple[tuple[str, Path], ...]:
    """(method, path) for each `self.path.weight` in the class's methods; those of PyTorch itself are not looked at."""
    found: dict[tuple[str, Path], None] = {}
    seen: set[str] = set()
    for base in kind.__mro__:
        if base is object or base.__module__.split(".")[0] == "torch":
            continue
        for name, method in vars(base).items():
            if name in seen or name in _BEFORE_THE_RUN:
                continue
            seen.add(name)
            function = inspect.unwrap(method) if callable(method) else None
            if isinstance(function, FunctionType) and "weight" in _names_in(function.__code__):
                found.update(((name, path), None) for path in _paths(function))
    return tuple(found)


def _names_in(code: CodeType) -> set[str]:
    """The names that the code and the functions inside it look up: a quick sieve before the text is read."""
    return set(code.co_names).union(*(_names_in(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _paths(function: Callable[..., Any]) -> Iterator[Path]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # made by exec, or in a file that is gone
        return
    harmless = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in HARMLESS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in harmless:
            path = _path(node.value)
            if path:
                yield path


def _path(node: ast.expr) -> Path | None:
    """The steps of `self.a.b[0]`; () for `self`, None for anything else."""
    if isinstance(node, ast.Name):
        return () if node.id == "self" else None
    if isinstance(node, ast.Attribute):
        inner = _path(node.value)
        return None if inner is None else (*inner, node.attr)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        inner = _path(node.value)
        return None if inner is None else (*inner, (node.slice.value,))
    return None
