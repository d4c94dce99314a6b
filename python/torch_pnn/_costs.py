"""What the operators compute, as formulas of sizes: for PyTorch's FLOP counter, `summary` and `counters` alike.

Importing this module registers the operators with ``torch.utils.flop_counter``, whose modes copy the registry when they
are made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _library  # noqa: F401  (registers the operators)

__all__ = ["Costs", "bound", "called_costs", "forward_costs"]


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a call computes.

    Attributes:
        multiply_adds: of products.
        adds: additions of masks and biases, and subtractions of means where maps are normalised.
        activations: values of activation functions.
    """

    multiply_adds: int = 0
    adds: int = 0
    activations: int = 0

    def __add__(self, other: Costs) -> Costs:
        return Costs(
            self.multiply_adds + other.multiply_adds,
            self.adds + other.adds,
            self.activations + other.activations,
        )


def forward_costs(
    weight_size: Sequence[int],
    output_size: Sequence[int],
    groups: int,
    *,
    masked: bool,
    normed: bool,
    bias: bool,
    activation: str,
) -> Costs:
    """The costs of a call of a forward operator; under a stride only the pixels that are computed count.

    Args:
        weight_size: [T, C/groups * M, 1, 1].
        output_size: [B, T, H', W'].
        groups: the number of groups.
        masked: whether there are masks to be added.
        normed: whether maps are normalised.
        bias: whether there is a bias.
        activation: the activation's name.

    Example:
        >>> forward_costs((8, 6, 1, 1), (1, 8, 5, 5), 1, masked=True, normed=False, bias=True, activation="relu")
        Costs(multiply_adds=1200, adds=350, activations=150)
    """
    outputs = math.prod(output_size)
    maps = weight_size[1] * groups * output_size[0] * math.prod(output_size[2:])
    return Costs(
        multiply_adds=outputs * weight_size[1],
        adds=maps * (int(masked) + int(normed)) + (outputs if bias else 0),
        activations=0 if activation == "identity" else maps,
    )


def bound(operator: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names in the operator's schema, defaults filled in.

    Example:
        >>> call = bound("perturb_conv2d", ("x", "V"), {"groups": 2})
        >>> call["weight"], call["groups"], call["masks"]
        ('V', 2, 1)
    """
    schema = getattr(torch.ops.torch_pnn, operator).default._schema
    values = {argument.name: argument.default_value for argument in schema.arguments}
    values.update(zip(values, args))
    values.update(kwargs)
    return values


def called_costs(operator: str, args: Sequence[Any], kwargs: Mapping[str, Any], output_size: Sequence[int]) -> Costs:
    """The costs of a call of "perturb_conv2d" or "perturb_norm_conv2d" with these arguments."""
    call = bound(operator, args, kwargs)
    return forward_costs(
        call["weight"].shape,
        output_size,
        call["groups"],
        masked=call["mask"] is not None or call["seed"] is not None,
        normed=operator == "perturb_norm_conv2d",
        bias=call["bias"] is not None,
        activation=call["activation"],
    )


# --------------------------------------------------------------------------------------------------------------------
# PyTorch's counter: two operations a multiply-add, of products alone, as for its convolutions
# --------------------------------------------------------------------------------------------------------------------


def _product(call: Mapping[str, Any], size: Sequence[int]) -> int:
    """Operations of one product of the weight with as many pixels as a tensor [B, T, H', W'] has."""
    return 2 * math.prod(size) * call["weight"][1]


@register_flop_formula(torch.ops.torch_pnn.perturb_conv2d)
def _perturb_conv2d(*args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    return _product(bound("perturb_conv2d", args, kwargs), out_shape)


@register_flop_formula(torch.ops.torch_pnn.perturb_norm_conv2d)
def _perturb_norm_conv2d(*args: Any, out_shape: Sequence[Sequence[int]], **kwargs: Any) -> int:
    return _product(bound("perturb_norm_conv2d", args, kwargs), out_shape[0])


@register_flop_formula(torch.ops.torch_pnn._perturb_conv2d_backward)
def _perturb_conv2d_backward(*args: Any, out_shape: Any, **kwargs: Any) -> int:
    call = bound("_perturb_conv2d_backward", args, kwargs)
    of_input, of_weight, _, of_mask = call["output_mask"]
    # One product gives the maps' gradient, for input and mask together; one more gives the weight's.
    return (int(of_input or of_mask) + int(of_weight)) * _product(call, call["grad_output"])


@register_flop_formula(torch.ops.torch_pnn._perturb_norm_conv2d_backward)
def _perturb_norm_conv2d_backward(*args: Any, out_shape: Any, **kwargs: Any) -> int:
    call = bound("_perturb_norm_conv2d_backward", args, kwargs)
    of_input, of_weight, _, of_norm_weight, _, of_mask = call["output_mask"]
    of_maps = of_input or of_mask
    # The weight's product also gives the normalisation's gradient and, in training, what the maps' gradient owes to
    # the batch's moments (docs/decisions/0003-batch-normalisation-inside.md).
    correlated = of_weight or of_norm_weight or (of_maps and call["training"])
    return (int(of_maps) + int(correlated)) * _product(call, call["grad_output"])
