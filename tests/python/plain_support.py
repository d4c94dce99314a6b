"""The modules on plain PyTorch in float64, to compare with: values, and gradients of the input and every parameter."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn

from torch_pnn import functional, reference


@contextlib.contextmanager
def plain_pytorch() -> Iterator[None]:
    """Within it every module of ours runs on `torch_pnn.reference`, and no operator of ours is called."""
    names = ("perturb_conv2d", "perturb_norm_conv2d", "perturbation_mask")
    with mock.patch.multiple(functional, **{name: getattr(reference, name) for name in names}):
        yield


@dataclasses.dataclass
class Step:
    """One forward and backward pass.

    Attributes:
        output: what the model returned.
        input: the input's gradient.
        parameters: each parameter's gradient by name.
        buffers: what the state_dict holds afterwards beside the parameters.
    """

    output: Tensor
    input: Tensor | None
    parameters: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def step(model: nn.Module | Callable[[Tensor], Tensor], x: Tensor) -> Step:
    """Runs the model once and goes back from a fixed random cotangent."""
    input = x.detach().clone().requires_grad_()
    output = model(input)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (output * cotangent.to(output.dtype)).sum().backward()
    named = dict(model.named_parameters()) if isinstance(model, nn.Module) else {}
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    gradients = {name: parameter.grad for name, parameter in named.items()}
    for parameter in named.values():
        parameter.grad = None
    buffers = {name: value.clone() for name, value in state.items() if name not in named}
    return Step(output.detach(), input.grad, gradients, buffers)


def reference_step(model: nn.Module, x: Tensor) -> Step:
    """The same of a float64 copy of the model on plain PyTorch; the model stays as it is."""
    with plain_pytorch():
        return step(copy.deepcopy(model).double(), x.double())


def assert_same_step(found: Step, expected: Step, *, rtol: float, atol: float, buffers: bool = True) -> None:
    """Compares values, the input's gradient and all parameters' gradients."""

    def compare(name: str, value: Tensor | None, wanted: Tensor | None) -> None:
        assert (value is None) == (wanted is None), name
        if value is None or wanted is None:
            return
        # A tensor's largest entry sets the scale: single entries may be the difference of large ones.
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(
            value.to(wanted.dtype), wanted, rtol=rtol, atol=atol * max(scale, 1.0), msg=lambda text: f"{name}: {text}"
        )

    compare("output", found.output, expected.output)
    compare("gradient of input", found.input, expected.input)
    for name, gradient in expected.parameters.items():
        compare(f"gradient of {name}", found.parameters[name], gradient)
    if buffers:
        for name, value in expected.buffers.items():
            compare(name, found.buffers[name], value)
