"""Exported programs and ONNX files that need less than the library: standard ATen operators, standard ONNX operators.

A program of ``torch.export`` that holds the layer holds our operators, with a seed of eight bytes for the masks, at any
image size; it runs wherever torch_pnn is installed, in C++ too. Where it is not:

* `decompose` rewrites a program in standard ATen operators, which PyTorch alone loads, runs, trains and compiles.
* `onnx` writes an ONNX file of standard operators; `onnx_translations` is the table behind it, for
  ``torch.onnx.export``.

Example:
    >>> import torch_pnn
    >>> program = torch.export.export(torch_pnn.PerturbConv2d(3, 8, 3, padding=1, seed=1), (torch.zeros(2, 3, 8, 8),))
    >>> [str(node.target) for node in decompose(program, max_size=(8, 8)).graph.nodes if node.op == "call_function"]
    ['aten.mul.Tensor', 'aten.transpose.int', 'aten.add.Tensor', 'aten.relu.default', 'aten.conv2d.default']
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument

from . import _library, _mask_sizes, reference
from ._decompositions import DECOMPOSITIONS

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

__all__ = ["decompose", "decompositions", "onnx", "onnx_translations"]


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Our operators in standard ATen operators, as PyTorch's tables of decompositions hold them.

    For ``ExportedProgram.run_decompositions`` (which `decompose` calls), ``torch._inductor`` and AOTAutograd backends.
    Masks by seed are computed by Philox in integer ATen operators: the same bits as ours, at every image size.

    Returns:
        Functions by operator overload.

    Example:
        >>> len(decompositions())
        5
    """
    return {getattr(torch.ops.torch_pnn, name).default: function for name, function in DECOMPOSITIONS.items()}


def decompose(program: ExportedProgram, *, max_size: int | tuple[int, int] | None = None) -> ExportedProgram:
    """A program in which standard ATen operators alone stand for ours: it loads and runs without this library.

    Parameters, buffers, inputs, outputs and their names stay; the program given is left as it is. All other operators
    stay too: call ``run_decompositions()`` on the result for Core ATen. Response maps are stored in such a program, M
    times the input, and it is slower than ours.

    Args:
        program: of ``torch.export.export``, or loaded; also one that holds forward and backward.
        max_size: (rows, columns) of the largest image, or an int for both. None: masks are computed from their seeds in
            integer operators, some three hundred nodes a layer, at every image size. A size: masks are constants in the
            program (4·C·M·rows·columns bytes a layer), which is shorter and faster, and images up to that size are
            taken.

    Returns:
        The new program.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: with `max_size`, an image is larger, a seed is no constant of the program, or a size stays without
            an upper bound.

    Example:
        >>> import torch_pnn
        >>> layer = torch_pnn.PerturbConv2d(3, 8, 3, padding=1, seed=1)
        >>> x = torch.randn(2, 3, 9, 9)
        >>> plain = decompose(torch.export.export(layer, (x,)))
        >>> torch.allclose(plain.module()(x), layer(x), atol=1e-5)
        True
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"program is {type(program).__name__}, it should be a torch.export.ExportedProgram: call "
            "torch.export.export(model, args) first"
        )
    limit = _mask_sizes.checked_max_size(max_size)
    if limit is not None:
        program = _with_stored_masks(program, limit)
    return program.run_decompositions(decompositions())


# --------------------------------------------------------------------------------------------------------------------
# Seeds become constants
# --------------------------------------------------------------------------------------------------------------------


def _name_of(node: fx.Node) -> str | None:
    """Which of our operators a node calls."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == _library.NAMESPACE:
        return target._schema.name.partition("::")[2]
    return None


def _arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by the schema's names, defaults included."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    found = {}
    for position, argument in enumerate(target._schema.arguments):
        given = node.kwargs.get(argument.name, argument.default_value)
        found[argument.name] = node.args[position] if position < len(node.args) else given
    return found


def _seeded(graph: fx.Graph) -> list[fx.Node]:
    """The calls of our operators that compute masks from a seed."""
    found = []
    for node in graph.nodes:
        if _name_of(node) in DECOMPOSITIONS and _arguments(node)["seed"] is not None:
            found.append(node)
    return found


def _constants(program: ExportedProgram) -> dict[str, Tensor]:
    """The tensors that a program holds, by the names of their placeholders."""
    held = {**program.state_dict, **program.constants}
    return {
        spec.arg.name: held[spec.target]
        for spec in program.graph_signature.input_specs
        if isinstance(spec.arg, TensorArgument) and isinstance(held.get(spec.target or ""), Tensor)
    }


def _constant_value(node: fx.Node, constants: Mapping[str, Tensor], layer: str) -> Tensor:
    """A seed's value, computed from what the program holds."""
    if node.op == "placeholder" and node.name in constants:
        return constants[node.name].detach()
    if node.op != "call_function":
        raise ValueError(
            f"the seed of {layer} is an input of the program ({node.name}), it should be a buffer or a number where "
            "masks are to be stored: leave max_size out and they are computed from the seed"
        )
    given = fx.map_arg((node.args, node.kwargs), lambda source: _constant_value(source, constants, layer))
    assert callable(node.target)
    return node.target(*given[0], **given[1])


def _grid(node: fx.Node, limits: dict[Any, int]) -> _mask_sizes.Grid:
    """The size of the masks that a call needs."""
    arguments = _arguments(node)
    if "input" in arguments:
        sizes = arguments["input"].meta["val"].shape[2:]
    else:
        sizes = [
            size.meta["val"] if isinstance(size, fx.Node) else size
            for size in (arguments["height"], arguments["width"])
        ]
    return _mask_sizes.grid_of(sizes, limits)


def _checked_seeds(program: ExportedProgram, max_size: tuple[int, int] | None) -> None:
    """Refuses programs whose masks can't be stored."""
    limits = _mask_sizes.image_limits(program.graph, max_size)
    constants = _constants(program)
    for node in _seeded(program.graph):
        _constant_value(_arguments(node)["seed"], constants, _mask_sizes.layer_name(node))
        _grid(node, limits)


def _with_stored_masks(program: ExportedProgram, max_size: tuple[int, int]) -> ExportedProgram:
    """The same program with masks in place of seeds, limited to images of `max_size`."""
    # Flattens regions without gradients or with autocast, in which layers might stand, and copies the graph.
    program = program.run_decompositions({})
    graph = program.graph
    limits = _mask_sizes.image_limits(graph, max_size)
    constants = _constants(program)
    added: dict[tuple[Any, ...], fx.Node] = {}
    specs: list[InputSpec] = []
    tensors: dict[str, Any] = dict(program.constants)
    first = next(iter(graph.nodes))
    for node in _seeded(graph):
        arguments = _arguments(node)
        layer = _mask_sizes.layer_name(node)
        grid = _grid(node, limits)
        channels = arguments["channels"] if "channels" in arguments else int(arguments["input"].meta["val"].shape[1])
        kind = (channels, arguments["masks"], grid.height, grid.width, arguments["shared_masks"], arguments["noise"])
        key = (arguments["seed"], *kind)
        if key not in added:
            seed = _constant_value(arguments["seed"], constants, layer)
            values = reference.perturbation_mask(seed, *kind[:4], shared_masks=kind[4], noise=kind[5])
            target = f"{layer}_masks_{grid.height}x{grid.width}_of_images_up_to_{max_size[0]}x{max_size[1]}"
            while target in tensors:
                target += "_"
            tensors[target] = values
            with graph.inserting_before(first):
                placeholder = graph.placeholder(f"b_{target}")
            with _fake_mode(arguments["seed"]):
                placeholder.meta["val"] = torch.empty(values.shape, device=values.device)
            specs.append(InputSpec(InputKind.BUFFER, TensorArgument(placeholder.name), target, persistent=False))
            added[key] = placeholder
        _put_mask(node, arguments, added[key], grid)
    return _rebuilt(program, specs, tensors, limits)


def _fake_mode(node: fx.Node) -> Any:
    return node.meta["val"].fake_mode


def _put_mask(node: fx.Node, arguments: dict[str, Any], mask: fx.Node, grid: _mask_sizes.Grid) -> None:
    """Gives a call the part of stored masks that its image meets."""
    aten = torch.ops.aten
    graph = node.graph

    def call(target: Any, *given: Any) -> fx.Node:
        result = graph.call_function(target, given)
        values = fx.map_arg(given, lambda source: source.meta["val"])
        with _fake_mode(mask):
            result.meta["val"] = target(*values)
        return result

    device = mask.meta["val"].device
    with graph.inserting_before(node):
        for axis, name in ((0, "height"), (1, "width")):
            if not grid.dynamic[axis]:
                continue
            size = arguments[name] if name in arguments else call(aten.sym_size.int, arguments["input"], axis + 2)
            # Rows by their numbers and not a slice, which would clip where an image is too large.
            numbers = graph.call_function(aten.arange.default, (size,), {"dtype": torch.int64, "device": device})
            with _fake_mode(mask):
                numbers.meta["val"] = aten.arange.default(size.meta["val"], dtype=torch.int64, device=device)
            mask = call(aten.index_select.default, mask, axis + 2, numbers)
        if "channels" in arguments:  # perturbation_mask
            dtype = arguments["dtype"]
            result = call(aten.clone.default, mask) if dtype is None else call(aten.to.dtype, mask, dtype, False, True)
            node.replace_all_uses_with(result)
            graph.erase_node(node)
            return
    keywords = arguments | {"mask": mask, "seed": None}
    node.args, node.kwargs = tuple(keywords.values()), {}


def _rebuilt(
    program: ExportedProgram, specs: Sequence[InputSpec], constants: dict[str, Any], limits: dict[Any, int]
) -> ExportedProgram:
    """The program around its changed graph, with the new constants first and smaller ranges of sizes."""
    from torch.utils._sympy.value_ranges import ValueRanges

    signature = program.graph_signature
    ranges = dict(program.range_constraints)
    for symbol, limit in limits.items():
        if symbol in ranges:
            ranges[symbol] = ValueRanges(ranges[symbol].lower, min(ranges[symbol].upper, limit))
    results = program.graph.output_node().args[0]
    assert isinstance(results, Sequence)
    # The signature knows outputs by their names, and masks may be outputs themselves.
    outputs = [
        dataclasses.replace(spec, arg=TensorArgument(result.name))
        if isinstance(spec.arg, TensorArgument) and isinstance(result, fx.Node)
        else spec
        for spec, result in zip(signature.output_specs, results)
    ]
    program.graph.lint()
    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=ExportGraphSignature([*specs, *signature.input_specs], outputs),
        state_dict=program.state_dict,
        range_constraints=ranges,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=constants,
        verifiers=program.verifiers,
    )


# --------------------------------------------------------------------------------------------------------------------
# ONNX
# --------------------------------------------------------------------------------------------------------------------


def onnx_translations(*, max_size: int | tuple[int, int] | None = None) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Our operators in standard ONNX operators, for ``torch.onnx.export(..., custom_translation_table=...)``.

    A layer becomes Add (the masks), its activation and a 1x1 Conv, with Slice under a stride, Unsqueeze and Reshape
    where M > 1, and Sub in front of the Conv where it normalises. A seed's masks become an initializer that is sliced
    to the image. In a larger image than they are made for, the run fails in a node whose name begins with
    ``perturb_mask_limit_<rows>x<columns>_exceeded_in_`` and goes on with the layer's name.

    Args:
        max_size: (rows, columns) of the largest image, the model's input; layers behind a stride store smaller masks.
            Needed where the image's size is dynamic and its ``torch.export.Dim`` has no maximum.

    Returns:
        Functions by operator overload.

    Raises:
        ImportError: the packages onnx and onnxscript are not installed.
        TypeError: `max_size` is no pair of ints.
        ValueError: it is not positive.
    """
    limit = _mask_sizes.checked_max_size(max_size)
    try:
        from . import _onnx
    except ImportError as error:
        raise ImportError(
            f"ONNX export needs the packages onnx and onnxscript: pip install onnxscript ({error})"
        ) from error
    return _onnx.translations(limit)


def onnx(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    path: str | os.PathLike[str] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    max_size: int | tuple[int, int] | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> ONNXProgram:
    """Exports a model that holds our layers to ONNX, in standard operators.

    It is ``torch.onnx.export`` with `onnx_translations`. The model is exported in the mode it is in: call ``eval()``
    first.

    Args:
        model: a module, or a program of ``torch.export``.
        args: example inputs of a module.
        path: the file to write; None writes none.
        kwargs: example inputs by name.
        max_size: (rows, columns) of the largest image, or an int for both; see `onnx_translations`.
        dynamic_shapes: as ``torch.export.export`` takes it, for a module.
        **options: of ``torch.onnx.export``, such as input_names, output_names, opset_version, optimize, external_data;
            a custom_translation_table is joined with ours.

    Returns:
        The ``torch.onnx.ONNXProgram``.

    Raises:
        ImportError: the packages onnx and onnxscript are not installed.
        TypeError: an argument has a wrong type.
        ValueError: masks can't be stored: an image is larger than `max_size`, a seed is no constant of the model, or
            the image's size is dynamic without an upper bound.

    Example:
        >>> import torch_pnn
        >>> layer = torch_pnn.PerturbConv2d(3, 8, 3, padding=1, seed=1).eval()
        >>> any_size = torch.export.Dim.DYNAMIC
        >>> options = {"max_size": 64, "dynamic_shapes": ({0: any_size, 2: any_size, 3: any_size},)}
        >>> onnx(layer, (torch.zeros(2, 3, 16, 16),), "layer.onnx", **options)  # doctest: +SKIP
    """
    table = onnx_translations(max_size=max_size)
    table.update(options.pop("custom_translation_table", None) or {})
    if isinstance(model, ExportedProgram):
        if args or kwargs or dynamic_shapes is not None:
            raise TypeError("model is an exported program, then args, kwargs and dynamic_shapes should be left out")
        program = model
    elif isinstance(model, torch.nn.Module):
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    else:
        raise TypeError(f"model is {type(model).__name__}, it should be a module or a torch.export.ExportedProgram")
    _checked_seeds(program, _mask_sizes.checked_max_size(max_size))
    saving = {
        "include_initializers": options.pop("export_params", True),
        "keep_initializers_as_inputs": options.pop("keep_initializers_as_inputs", False),
        "external_data": options.pop("external_data", True),
    }
    result = torch.onnx.export(program, dynamo=True, custom_translation_table=table, **options)
    assert result is not None
    _name_limits(result)
    if path is not None:
        result.save(path, **saving)
    return result


_STORED = re.compile(r"(\w+)_masks_\d+x\d+_of_images_up_to_(\d+)x(\d+)_*")


def _name_limits(program: ONNXProgram) -> None:
    """Names the nodes that take an image's part of masks which `decompose` stored, as `onnx_translations` does."""
    for node in program.model.graph:
        if node.op_type != "Gather":
            continue
        source, axis = node.inputs[0], "rows"
        inner = None if source is None else source.producer()
        if inner is not None and inner.op_type == "Gather":
            source, axis = inner.inputs[0], "columns"
        found = None if source is None else _STORED.fullmatch(source.name or "")
        if found is not None:
            layer, height, width = found.groups()
            limit = (int(height), int(width))
            node.name = f"{_mask_sizes.limit_name(limit, _mask_sizes.Grid(*limit), layer)}_{axis}"
