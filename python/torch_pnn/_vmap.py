"""Batching rules: what ``torch.vmap`` does with each operator, so that a vmapped call is again one call of a kernel.

The vmapped dimension, of S samples, is folded into a dimension that the operator has. Three folds serve every call:

* into the batch, where only images (and their gradients) differ from sample to sample: S*B images;
* into the outputs, where only weight and bias differ: S*T outputs, the images are read once;
* into the groups otherwise: S*C channels and S*T outputs in S*groups groups, where sample s owns its own channels,
  outputs, masks and statistics. A seed's masks belong to channel numbers, so there they are written out, unless they
  are shared by all channels.

A kernel's results don't depend on how images, outputs and groups are put together, so neither do a vmapped call's:
with a mask of its own a sample's output has the bits that it has alone. The rules call the operators, not the kernels:
gradients, autocast and further transforms apply to the folded call.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _fakes

__all__ = ["register"]

Results = tuple[Any, Any]
"""What a batching rule returns: the outputs, and the vmapped dimension of each (None where it has none)."""


@dataclasses.dataclass
class _Call:
    """A vmapped call: its arguments by name, and where the tensors among them have the vmapped dimension.

    Attributes:
        samples: S, the size of the vmapped dimension.
        arguments: all arguments by name; tensors with their vmapped dimension.
        dims: the vmapped dimension of each tensor that has one.
    """

    samples: int
    arguments: dict[str, Any]
    dims: dict[str, int]

    def with_samples_first(self, name: str) -> Tensor | None:
        """The tensor as [S, ...], without a copy: one that is the same for all samples gets a stride of 0."""
        tensor = self.arguments[name]
        if tensor is None:
            return None
        dim = self.dims.get(name)
        return tensor.expand(self.samples, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    def merged(self, name: str, dim: int = 0) -> Tensor | None:
        """The tensor with the samples merged into its dimension `dim`, as the slower part of the index."""
        tensor = self.with_samples_first(name)
        return None if tensor is None else tensor.movedim(0, dim).flatten(dim, dim + 1)

    def only(self, *names: str) -> bool:
        """Whether no other tensor differs from sample to sample."""
        return self.dims.keys() <= set(names)

    def sample(self, index: int) -> dict[str, Any]:
        """The arguments of one sample's own call."""
        return {
            name: value.select(self.dims[name], index) if name in self.dims else value
            for name, value in self.arguments.items()
        }

    def size(self, name: str, dim: int) -> int:
        """A size of one sample's tensor."""
        tensor = self.arguments[name]
        vmapped = self.dims.get(name)
        return tensor.shape[dim + 1 if vmapped is not None and vmapped <= dim else dim]


def _into_groups(call: _Call, *, mask_per_channel: bool = False) -> dict[str, Any]:
    """The arguments of the call in which every sample has groups of its own.

    Args:
        call: the vmapped call.
        mask_per_channel: whether a mask that all channels share is written out for each of them, because its gradient
            is to be told apart by sample.
    """
    arguments = dict(call.arguments)
    for name in ("grad_output", "input"):
        if name in arguments:
            arguments[name] = call.merged(name, 1)
    vectors = ("norm_weight", "norm_bias", "running_mean", "running_var", "mean", "variance")
    for name in ("weight", "bias", *vectors):
        if name in arguments:
            arguments[name] = call.merged(name)
    arguments["groups"] = call.samples * arguments["groups"]

    channels, mask, seed = call.size("input", 1), arguments["mask"], arguments["seed"]
    if seed is not None and mask is None and not ("seed" not in call.dims and arguments["shared_masks"]):
        own = torch.float64 if arguments["input"].dtype == torch.float64 else torch.float32
        height, width = call.size("input", 2), call.size("input", 3)
        options = (arguments["masks"], height, width, arguments["shared_masks"], arguments["noise"], own)
        mask = torch.stack(
            [
                torch.ops.torch_pnn.perturbation_mask(one, channels, *options)
                for one in (seed.unbind(call.dims["seed"]) if "seed" in call.dims else [seed])
            ]
        )
        arguments["seed"] = None
        mask = mask.expand(call.samples, *mask.shape[1:])
    elif mask is not None and (
        "mask" in call.dims or mask_per_channel or call.size("mask", 0) != 1 or seed is not None
    ):
        mask = call.with_samples_first("mask")
        assert mask is not None
    else:
        return arguments
    if mask.dim() == 5 and mask.shape[1] == 1:
        mask = mask.expand(-1, channels, -1, -1, -1)
    arguments["mask"] = mask.flatten(0, 1)
    return arguments


def _operator(name: str) -> Any:
    return getattr(torch.ops.torch_pnn, name).default


def _outputs_folded(call: _Call) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]]:
    """The arguments of the call with all samples' outputs, and what brings its output to [S, B, T, H', W']."""
    groups, samples = call.arguments["groups"], call.samples
    arguments = dict(call.arguments)
    for name in ("weight", "bias"):
        values = call.with_samples_first(name)
        if values is not None:
            outputs = values.shape[1] // groups
            arguments[name] = values.unflatten(1, (groups, outputs)).transpose(0, 1).flatten(0, 2)
    outputs = call.size("weight", 0) // groups

    def separate(output: Tensor) -> Tensor:
        return output.unflatten(1, (groups, samples, outputs)).movedim(2, 0).flatten(2, 3)

    return arguments, separate


def _perturb_conv2d(call: _Call) -> Results:
    operator = _operator("perturb_conv2d")
    if call.only("input"):
        folded = call.arguments | {"input": call.merged("input")}
        return operator(**folded).unflatten(0, (call.samples, call.size("input", 0))), 0
    if call.only("weight", "bias"):
        folded, separate = _outputs_folded(call)
        return separate(operator(**folded)), 0
    return operator(**_into_groups(call)).unflatten(1, (call.samples, call.size("weight", 0))), 1


def _perturb_norm_conv2d(call: _Call) -> Results:
    operator = _operator("perturb_norm_conv2d")
    if call.only("input") and not call.arguments["training"]:
        output, mean, variance = operator(**(call.arguments | {"input": call.merged("input")}))
        output = output.unflatten(0, (call.samples, call.size("input", 0)))
        return (output, mean, variance), (0, None, None)
    if call.only("weight", "bias"):
        folded, separate = _outputs_folded(call)
        output, mean, variance = operator(**folded)
        return (separate(output), mean, variance), (0, None, None)
    output, mean, variance = operator(**_into_groups(call))
    output = output.unflatten(1, (call.samples, call.size("weight", 0)))
    return (output, mean.unflatten(0, (call.samples, -1)), variance.unflatten(0, (call.samples, -1))), (1, 0, 0)


def _backward(name: str, call: _Call) -> Results:
    """The rule of both backward operators; the gradients come in the order input, weight, …, mask."""
    wanted: Sequence[bool] = call.arguments["output_mask"]
    operator, samples, count = _operator(name), call.samples, len(wanted)
    if call.only("grad_output", "input") and not any(wanted[1:]) and not call.arguments.get("training"):
        folded = {key: call.merged(key) for key in ("grad_output", "input")}
        grad_input, *others = operator(**(call.arguments | folded))
        if wanted[0]:
            grad_input = grad_input.unflatten(0, (samples, call.size("input", 0)))
        return (grad_input, *others), (0 if wanted[0] else None, *(None for _ in others))
    shares_masks = call.arguments["mask"] is not None and call.size("mask", 0) == 1
    gradients = list(operator(**_into_groups(call, mask_per_channel=wanted[-1])))
    for i, asked in enumerate(wanted):
        if asked:
            dim = 1 if i == 0 else 0
            gradients[i] = gradients[i].unflatten(dim, (samples, gradients[i].shape[dim] // samples))
    if wanted[-1] and shares_masks:
        gradients[-1] = gradients[-1].sum(1, keepdim=True)
    return tuple(gradients), tuple((1 if i == 0 else 0) if wanted[i] else None for i in range(count))


def _perturbation_mask(call: _Call) -> Results:
    operator = _operator("perturbation_mask")
    return torch.stack([operator(**call.sample(i)) for i in range(call.samples)]), 0


_RULES: dict[str, Callable[[_Call], Results]] = {
    "perturb_conv2d": _perturb_conv2d,
    "_perturb_conv2d_backward": lambda call: _backward("_perturb_conv2d_backward", call),
    "perturb_norm_conv2d": _perturb_norm_conv2d,
    "_perturb_norm_conv2d_backward": lambda call: _backward("_perturb_norm_conv2d_backward", call),
    "perturbation_mask": _perturbation_mask,
}


def _no_samples(name: str, call: _Call) -> Results:
    """The empty results of no samples: a call can't have 0 groups."""
    sizes = {
        key: [size for d, size in enumerate(call.arguments[key].shape) if d != dim] for key, dim in call.dims.items()
    }
    one = {key: call.arguments[key].new_empty(size) for key, size in sizes.items()}
    found = _fakes.FAKES[name](**(call.arguments | one))
    if isinstance(found, Tensor):
        return found.new_empty((0, *found.shape)), 0
    return tuple(result.new_empty((0, *result.shape)) for result in found), tuple(0 for _ in found)


def _kernel(name: str, rule: Callable[[_Call], Results]) -> Callable[..., Results]:
    """The rule as PyTorch calls it: with positional arguments, of which trailing ones may be left to their defaults."""
    parameters = inspect.signature(_fakes.FAKES[name]).parameters
    names = tuple(parameters)
    defaults = {key: value.default for key, value in parameters.items()}

    def kernel(info: Any, in_dims: Sequence[Any], *args: Any) -> Results:
        dims = {key: dim for key, dim in zip(names, in_dims) if isinstance(dim, int)}
        call = _Call(info.batch_size, defaults | dict(zip(names, args)), dims)
        if call.samples == 0 and not call.only("input"):
            return _no_samples(name, call)
        try:
            return rule(call)
        except RuntimeError:
            # A wrong call should be told in the sizes that the caller sees, which are those of one sample.
            if call.samples > 0:
                _operator(name)(**call.sample(0))
            raise

    return kernel


def register(library: torch.library.Library) -> None:
    """Registers the batching rules of all operators that take tensors."""
    for name, rule in _RULES.items():
        torch.library.register_vmap(f"torch_pnn::{name}", _kernel(name, rule), lib=library)
