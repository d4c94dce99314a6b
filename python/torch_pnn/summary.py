"""What a model costs, layer by layer: `summary`.

The model runs once, in evaluation mode and without gradients, and every operator that PyTorch carries out is counted
for the module that is running, whether a module or a function called it. Products are counted by the formulas of
``torch.utils.flop_counter``, which know our operators too; two of its operations are one multiply-add.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ._costs import Costs, called_costs
from .modules import LBConv2d, PerturbConv2d

__all__ = ["Summary", "SummaryRow", "summary"]

_NUMBERS = ("parameters", "mask_bytes", "multiply_adds", "adds", "activations")
_TITLES = ("parameters", "mask bytes", "multiply-adds", "adds", "activations")

# --------------------------------------------------------------------------------------------------------------------
# The result
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """What one module costs, without its children.

    Attributes:
        name: its qualified name; empty for the model itself.
        kind: its class.
        output_size: the size of its (first) output tensor, at its last call; () where there was none.
        masks: how fixed masks are held: "seed" (computed, never stored), "stored", "trained", "filters" (fixed
            ones, as of `LBConv2d`); empty where there are none.
        parameters: learnable numbers of its own; a parameter that several modules share counts for the first.
        mask_bytes: bytes of fixed masks or filters that it stores; 8 for a seed.
        multiply_adds: of convolutions, matrix products, attention and perturbation layers.
        adds: further additions: masks, biases, shifts of normalisations, sums of tensors.
        activations: values of activation functions.
        calls: how often it ran.
    """

    name: str
    kind: str
    output_size: tuple[int, ...]
    masks: str
    parameters: int
    mask_bytes: int
    multiply_adds: int
    adds: int
    activations: int
    calls: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a model costs; `str()` of it is a table.

    Attributes:
        rows: a row for every module that costs something, in the order of registration.
        parameters: the rows' sum; as for the next four.
        mask_bytes: see there.
        multiply_adds: see there.
        adds: see there.
        activations: see there.
    """

    rows: tuple[SummaryRow, ...]

    @property
    def parameters(self) -> int:
        """Learnable numbers of the model."""
        return sum(row.parameters for row in self.rows)

    @property
    def mask_bytes(self) -> int:
        """Bytes of fixed masks and filters that the model stores."""
        return sum(row.mask_bytes for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of all products."""
        return sum(row.multiply_adds for row in self.rows)

    @property
    def adds(self) -> int:
        """Additions outside of products."""
        return sum(row.adds for row in self.rows)

    @property
    def activations(self) -> int:
        """Values of activation functions."""
        return sum(row.activations for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The sums by name and, under "rows", each row as a dict: ready for JSON."""
        return {name: getattr(self, name) for name in _NUMBERS} | {
            "rows": [dataclasses.asdict(row) | {"output_size": list(row.output_size)} for row in self.rows]
        }

    def to_markdown(self) -> str:
        """The table in Markdown."""
        head, *lines = self._cells()
        rule = ["---"] * 4 + ["---:"] * len(_NUMBERS)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))

    def _cells(self) -> list[list[str]]:
        lines = [["layer", "kind", "output", "masks", *_TITLES]]
        for row in self.rows:
            size = "x".join(map(str, row.output_size))
            numbers = [f"{getattr(row, name):,}" for name in _NUMBERS]
            lines.append([row.name or "(model)", row.kind, size, row.masks, *numbers])
        lines.append(["sum", "", "", "", *(f"{getattr(self, name):,}" for name in _NUMBERS)])
        return lines

    def __str__(self) -> str:
        lines = self._cells()
        widths = [max(len(cells[column]) for cells in lines) for column in range(len(lines[0]))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 4 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(cells, widths))
            ).rstrip()
            for cells in lines
        )


# --------------------------------------------------------------------------------------------------------------------
# What operators cost
# --------------------------------------------------------------------------------------------------------------------

_OURS = {
    torch.ops.torch_pnn.perturb_conv2d: "perturb_conv2d",
    torch.ops.torch_pnn.perturb_norm_conv2d: "perturb_norm_conv2d",
}
_FORMULAS = dict(flop_registry)
# Attention as it runs on processors: it has no formula of its own there.
_FORMULAS[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = flop_registry[
    torch.ops.aten._scaled_dot_product_flash_attention
]
# Operators with a bias, and where it stands among the arguments.
_BIASED = {
    torch.ops.aten.convolution: 2,
    torch.ops.aten._convolution: 2,
    torch.ops.aten.addmm: 0,
    torch.ops.aten.baddbmm: 0,
}
# One multiplication and one addition a value; the multiplication is left out, as the products' counts leave it out.
_NORMALISATIONS = (
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "batch_norm_with_update",
    "batch_norm_no_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "native_layer_norm",
    "native_group_norm",
    "_fused_rms_norm",
)
_ADDITIONS = ("add", "add_", "sub", "sub_", "rsub")
_ACTIVATIONS = (
    "relu",
    "relu6",
    "leaky_relu",
    "_prelu_kernel",
    "elu",
    "celu",
    "selu",
    "gelu",
    "silu",
    "mish",
    "tanh",
    "sigmoid",
    "hardtanh",
    "hardsigmoid",
    "hardswish",
    "log_sigmoid_forward",
    "softplus",
    "threshold",
    "glu",
    "_softmax",
    "_log_softmax",
)


def _packets(names: Sequence[str], in_place: bool = False) -> frozenset[Any]:
    """The operators of these names that this PyTorch has."""
    every = [*names, *(f"{name}_" for name in names)] if in_place else names
    return frozenset(getattr(torch.ops.aten, name) for name in every if hasattr(torch.ops.aten, name))


_NORMALISES = _packets(_NORMALISATIONS)
_ADDS = _packets(_ADDITIONS)
_ACTIVATES = _packets(_ACTIVATIONS, in_place=True)
_KNOWN = _OURS.keys() | _FORMULAS.keys() | _ADDS | _NORMALISES | _ACTIVATES


def _first_tensor(value: Any) -> Tensor | None:
    """The first tensor in an output, however nested."""
    if isinstance(value, Tensor):
        return value
    for leaf in torch.utils._pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            return leaf
    return None


def _costs_of(packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Costs | None:
    """What a call of an operator costs; None for an operator that is unknown here."""
    if packet in _OURS:
        name = _OURS[packet]
        return called_costs(name, args, kwargs, (output if name == "perturb_conv2d" else output[0]).shape)
    first = _first_tensor(output)
    size = 0 if first is None else first.numel()
    if packet in _FORMULAS:
        place = _BIASED.get(packet)
        bias = None if place is None else (args[place] if len(args) > place else kwargs.get("bias"))
        flops = int(_FORMULAS[packet](*args, **kwargs, out_val=output))
        return Costs(multiply_adds=flops // 2, adds=0 if bias is None else size)
    if packet in _ADDS:
        # Tensors of indices and counters are not what a model computes.
        return Costs(adds=size if first is not None and first.is_floating_point() else 0)
    if packet in _NORMALISES:
        return Costs(adds=size)
    if packet in _ACTIVATES:
        return Costs(activations=size)
    return None


class _Counter(TorchDispatchMode):
    """Adds up what operators cost, for the module that is on top of the stack."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = [""]
        self.costs: dict[str, Costs] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        packet = func._overloadpacket
        if packet not in _KNOWN and func is not torch.ops.prim.device.default:
            # Inside of torch.inference_mode composed operators arrive here whole.
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        costs = _costs_of(packet, args, kwargs, output)
        if costs is not None:
            name = self.stack[-1]
            self.costs[name] = self.costs.get(name, Costs()) + costs
        return output


# --------------------------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------------------------


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)
    )


def _zeros(model: nn.Module, input_size: Any) -> list[Tensor]:
    """One example of each input, on the model's device and in its type."""
    if _is_size(input_size):
        sizes = [tuple(input_size)]
    elif isinstance(input_size, Sequence) and input_size and all(_is_size(size) for size in input_size):
        sizes = [tuple(size) for size in input_size]
    else:
        raise ValueError(
            f"input_size is {input_size!r}, it should be a size without the batch, as (channels, height, width), or a "
            "sequence of such sizes for a model with several inputs"
        )
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return [torch.zeros(1, *size, dtype=like.dtype, device=like.device) for size in sizes]


def _call(model: nn.Module, input_size: Any, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of the run."""
    if (input_size is None) == (inputs is None):
        given = "both None" if inputs is None else "both given"
        raise ValueError(f"input_size and inputs are {given}, it should be one of them")
    if inputs is None:
        return tuple(_zeros(model, input_size)), {}
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return tuple(inputs), {}
    raise TypeError(f"inputs is {type(inputs).__name__}, it should be a tensor, a tuple of arguments or a dict of them")


def _differs(buffer: Tensor, value: Tensor) -> bool:
    """Whether a buffer's values were changed; False where it has none."""
    return type(buffer) is Tensor and not buffer.is_meta and not torch.equal(buffer, value)


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards modes, buffers and random generators are as they were."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = {id(b): (b, b.clone()) for _, held in buffers for b in held.values() if b is not None}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    devices = sorted(
        {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    )
    try:
        model.eval()
        # The fused encoder layers run as one operator, which no formula knows.
        torch.backends.mha.set_fastpath_enabled(False)
        # Compilers see nothing of a counter, and their graphs would not show modules.
        with torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for module, held in buffers:
                module._buffers.update(held)
            for buffer, value in values.values():
                if _differs(buffer, value):
                    buffer.copy_(value)


def _masks(module: nn.Module) -> tuple[str, int]:
    """How a module holds fixed masks, and their bytes."""
    if not isinstance(module, PerturbConv2d) or module.noise is None or module.level == 0:
        filters = getattr(module, "mask_bytes", 0)
        filters = filters if isinstance(filters, int) and not isinstance(filters, bool) else 0
        return ("filters", filters) if filters or isinstance(module, LBConv2d) else ("", 0)
    if module.train_masks or isinstance(module.mask, nn.Parameter):  # (or the result of a parametrization of one)
        return "trained", module.mask_bytes
    return ("seed" if module.mask is None else "stored"), module.mask_bytes


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}, should be an nn.Module")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"the parameter {name!r} has no size yet: run the model once before, on any input")


def summary(model: nn.Module, input_size: Any = None, *, inputs: Any = None) -> Summary:
    """Counts what a model learns, stores as fixed masks, and computes for one example, layer by layer.

    The model runs once, in evaluation mode, and is afterwards as it was: training flags, buffers and PyTorch's random
    generators too. Counted are

    - learnable parameters (`requires_grad`), and bytes of fixed masks and filters: 8 where a seed stands for them (a
      module of your own that stores such says how many as its attribute `mask_bytes`);
    - multiply-adds of convolutions, linear layers, other matrix products, attention and perturbation layers (at every
      pixel that they compute, which with pooling is before it), by the formulas of ``torch.utils.flop_counter``;
    - adds outside of those: masks, biases, one for each value that is normalised, sums of tensors (shortcuts);
    - activations: values of activation functions, softmax among them.

    Pooling, products of single values, padding and copies are not counted. What runs is attributed to the innermost
    module. A model on the meta device is counted without being computed.

    Args:
        model: the model.
        input_size: the input's size without the batch, (channels, height, width) for an image; or a sequence of sizes
            for a model with several inputs. They are zeros in the model's type, a batch of one.
        inputs: instead, what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
            The counts are then of the whole batch.

    Returns:
        The counts: `rows`, the sums as attributes, a table as `str`, `to_dict()` and `to_markdown()`.

    Raises:
        TypeError: `model` isn't an `nn.Module`, `inputs` no tensor, tuple or dict.
        ValueError: not exactly one of `input_size` and `inputs` is given, `input_size` is no size, a lazy layer has not
            run yet, or the inputs don't run through the model.

    Example:
        >>> model = nn.Sequential(PerturbConv2d(3, 8, 3, padding=1, masks=2), nn.ReLU(), nn.Flatten(),
        ...                       nn.Linear(8 * 16, 10))
        >>> print(summary(model, (3, 4, 4)))
        layer  kind           output   masks  parameters  mask bytes  multiply-adds  adds  activations
        0      PerturbConv2d  1x8x4x4  seed           56           8            768   224           96
        1      ReLU           1x8x4x4                  0           0              0     0          128
        3      Linear         1x10                 1,290           0          1,280    10            0
        sum                                        1,346           8          2,048   234          224
    """
    _check(model)
    args, kwargs = _call(model, input_size, inputs)
    counter = _Counter()
    outputs: dict[str, tuple[int, ...]] = {}
    calls: dict[str, int] = {}
    # A hook on the normalisation inside of a layer would keep it from running in the layer's operator.
    inner = {module.norm for module in model.modules() if isinstance(module, PerturbConv2d) and module.norm is not None}
    handles = []
    for name, module in model.named_modules():
        if module in inner:
            continue

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            counter.stack.append(name)

        def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            counter.stack.pop()
            first = _first_tensor(output)
            outputs[name] = () if first is None else tuple(first.shape)
            calls[name] = calls.get(name, 0) + 1

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with _undisturbed(model), counter:
            model(*args, **kwargs)
    except Exception as error:
        what = "inputs" if input_size is None else f"an example of input_size {input_size}"
        raise ValueError(f"{what} doesn't run through the model ({type(error).__name__}: {error})") from error
    finally:
        for handle in handles:
            handle.remove()

    seen: set[int] = set()
    rows = []
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None and p.requires_grad and id(p) not in seen]
        seen.update(id(p) for p in own)
        masks, mask_bytes = _masks(module)
        costs = counter.costs.get(name, Costs())
        row = SummaryRow(
            name,
            type(module).__name__,
            outputs.get(name, ()),
            masks,
            sum(p.numel() for p in own),
            mask_bytes,
            costs.multiply_adds,
            costs.adds,
            costs.activations,
            calls.get(name, 0),
        )
        if any(getattr(row, number) for number in _NUMBERS):
            rows.append(row)
    return Summary(tuple(rows))
