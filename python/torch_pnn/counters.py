"""Our layers for the counters of fvcore, thop and ptflops, each by that package's own conventions.

Without these tables the packages leave our layers' products out; fvcore alone says so.
`torch_pnn.summary` and ``torch.utils.flop_counter`` need none. None of the packages is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._costs import Costs, bound, called_costs, forward_costs
from .modules import LBConv2d, PerturbConv2d

__all__ = ["fvcore_handlers", "ptflops_hooks", "thop_ops"]

_OPERATORS = ("perturb_conv2d", "perturb_norm_conv2d")


def _module_costs(module: nn.Module, input: Tensor, output: Tensor) -> Costs:
    """What a call of one of our layers costs, from what went in and came out."""
    images = input.shape[0] if input.dim() == 4 else 1
    bias = 0 if getattr(module, "bias", None) is None else 1
    if isinstance(module, LBConv2d):
        products = images * module.multiply_adds(input.shape[-2], input.shape[-1])
        pixels = images * output.shape[-2] * output.shape[-1]
        return Costs(products, bias * output.numel(), pixels * module.anchors)
    assert isinstance(module, PerturbConv2d)
    outputs, columns = module.weight.shape[:2]
    products = images * module.multiply_adds(input.shape[-2], input.shape[-1])
    pixels = products // (outputs * columns) if outputs * columns else 0
    return forward_costs(
        (outputs, columns),
        (1, outputs, pixels),
        module.groups,
        masked=module.noise is not None and module.level != 0,
        normed=module.norm is not None,
        bias=bool(bias),
        activation=module.activation,
    )


def fvcore_handlers() -> dict[str, Callable[[list[Any], list[Any]], Any]]:
    """Handlers of our operators for ``fvcore.nn.FlopCountAnalysis``, which counts a multiply-add as one.

    Returns:
        Handlers by the operators' names, for ``set_op_handle``.

    Example:
        >>> sorted(fvcore_handlers())
        ['torch_pnn::perturb_conv2d', 'torch_pnn::perturb_norm_conv2d', 'torch_pnn::perturbation_mask']

        ``FlopCountAnalysis(model, x).set_op_handle(**fvcore_handlers()).total()``
    """

    def handler(inputs: list[Any], outputs: list[Any]) -> int:
        # Values of a traced graph: the first output's and the weight's sizes are all that is needed.
        size, weight = outputs[0].type().sizes(), inputs[1].type().sizes()
        return math.prod(size) * weight[1]

    def nothing(inputs: list[Any], outputs: list[Any]) -> int:
        return 0

    return {f"torch_pnn::{name}": handler for name in _OPERATORS} | {"torch_pnn::perturbation_mask": nothing}


def thop_ops() -> dict[type[nn.Module], Callable[[Any, Sequence[Tensor], Tensor], None]]:
    """Our layers for ``thop.profile(..., custom_ops=thop_ops())``, which counts products without biases.

    Returns:
        Hooks by module class.

    Example:
        >>> sorted(layer.__name__ for layer in thop_ops())
        ['LBConv2d', 'PerturbConv2d']
    """

    def count(module: Any, inputs: Sequence[Tensor], output: Tensor) -> None:
        module.total_ops += _module_costs(module, inputs[0], output).multiply_adds

    return {PerturbConv2d: count, LBConv2d: count}


def ptflops_hooks() -> dict[Any, Callable[..., Any]]:
    """Our layers for ``ptflops.get_model_complexity_info(..., custom_modules_hooks=ptflops_hooks())``.

    Its "pytorch" backend looks up the modules in the result and counts, by its convention, element-wise operations like
    multiply-adds: masks, biases and activations too. Its "aten" backend looks up the operators, and counts products and
    biases alone.

    Returns:
        Hooks by module class and by operator.

    Example:
        >>> len(ptflops_hooks())
        4
    """

    def module_hook(module: Any, inputs: Sequence[Tensor], output: Tensor) -> None:
        costs = _module_costs(module, inputs[0], output)
        # Activations that are called as functions of PyTorch are seen by ptflops itself.
        called = isinstance(module, LBConv2d) or (module.norm is not None and not module._norm_is_plain())
        module.__flops__ += costs.multiply_adds + costs.adds + (0 if called else costs.activations)

    def operator_hook(name: str) -> Callable[[Sequence[Any], Sequence[Tensor]], int]:
        def count(inputs: Sequence[Any], outputs: Sequence[Tensor]) -> int:
            bias = bound(name, inputs, {})["bias"]
            products = called_costs(name, inputs, {}, outputs[0].shape).multiply_adds
            return products + (0 if bias is None else outputs[0].numel())

        return count

    hooks: dict[Any, Callable[..., Any]] = {PerturbConv2d: module_hook, LBConv2d: module_hook}
    hooks.update({getattr(torch.ops.torch_pnn, name): operator_hook(name) for name in _OPERATORS})
    return hooks
