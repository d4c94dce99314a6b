"""What stands in where a compiled part is missing: kernels on the plain-PyTorch reference, derivatives, autocast.

`register_kernels` covers every device that has no kernel of ours (mps, xpu, cuda without its half of the library, and
the CPU where the library could not be loaded): one registration, at the dispatch key that PyTorch asks last, so a
device's own kernel takes over as soon as it is registered. `register_derivatives` covers a PyTorch that none of the
compiled autograd libraries fits.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._fakes import suggest_memory_format

__all__ = ["register_derivatives", "register_kernels"]

_OPERATORS = (
    "perturb_conv2d",
    "_perturb_conv2d_backward",
    "perturb_norm_conv2d",
    "_perturb_norm_conv2d_backward",
    "perturbation_mask",
)
_AUTOCAST_DEVICES = ("cpu", "cuda")


class _Once:
    """Warns once for each device."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def tell(self, device: str) -> None:
        with self._lock:
            if device in self._told:
                return
            self._told.add(device)
        warnings.warn(
            f"torch_pnn has no kernels for the device {device!r} here, so its operators run there on the plain-PyTorch "
            f"reference: the same results, slower and with more memory",
            RuntimeWarning,
            stacklevel=4,
        )


def _in_format_of(result: Tensor, input: Tensor) -> Tensor:
    """The result with the strides that the shape function promised."""
    expected = torch.empty(result.shape, device="meta", memory_format=suggest_memory_format(input))
    if result.stride() == expected.stride():
        return result
    return torch.empty(
        result.shape, dtype=result.dtype, device=result.device, memory_format=suggest_memory_format(input)
    ).copy_(result)


def _check_tensors(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses layouts and mixed devices, which the reference would fail on with a message about something else."""
    named = dict(zip(_argument_names(name), args)) | dict(kwargs)
    given = {argument: value for argument, value in named.items() if isinstance(value, Tensor)}
    first = next(iter(given))
    for argument, tensor in given.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
            raise RuntimeError(f"torch_pnn::{name}: {argument} is {kind}, it should be dense (strided)")
        if tensor.device != given[first].device:
            raise RuntimeError(
                f"torch_pnn::{name}: {argument} is on {tensor.device}, it should be on {given[first].device} like "
                f"{first}: move both to one device"
            )


def _argument_names(name: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.torch_pnn, name).default._schema.arguments]


def _refuse_nested(name: str) -> Callable[..., Any]:
    """A kernel for nested tensors, which PyTorch would refuse with a list of all backends."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(_argument_names(name), args)) | kwargs
        nested = [argument for argument, value in named.items() if isinstance(value, Tensor) and value.is_nested]
        raise RuntimeError(
            f"torch_pnn::{name}: {nested[0]} is a nested tensor, it should be a dense one: give the layer one image at "
            f"a time, or pad them with torch.nested.to_padded_tensor"
        )

    return kernel


def _kernel(name: str, silent: str | None, once: _Once) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        from . import reference

        _check_tensors(name, args, kwargs)
        device = args[0].device.type
        if device != silent:
            once.tell(device)
        try:
            result = reference.OPERATORS[name](*args, **kwargs)
        except RuntimeError as error:
            if str(error).startswith("torch_pnn::") or isinstance(error, torch.OutOfMemoryError):
                raise
            raise RuntimeError(f"torch_pnn::{name}: {error}") from error
        if name == "perturbation_mask":
            return result
        if name == "perturb_conv2d":
            return _in_format_of(result, args[0])
        if name == "perturb_norm_conv2d":
            return _in_format_of(result[0], args[0]), *result[1:]
        grad_input = result[0] if result[0].dim() != 4 else _in_format_of(result[0], args[1])
        return grad_input, *(gradient.contiguous() for gradient in result[1:])

    kernel.__name__ = name
    return kernel


def _setting(variable: str, default: bool) -> Callable[[bool | None], bool]:
    """A setting that an environment variable starts: takes the new value, or None to ask only, and returns it."""
    given = os.environ.get(variable, "")
    state = [given != "0" if given else default]

    def ask(value: bool | None = None) -> bool:
        if value is not None:
            state[0] = value
        return state[0]

    return ask


def register_kernels(library: torch.library.Library, *, with_cpu: bool) -> None:
    """Registers kernels on the reference for every device without kernels of its own.

    Args:
        library: the fragment of the operators' namespace to register in.
        with_cpu: whether the CPU is one of them; then the functions that ask the library about itself are given too.
    """
    once = _Once()
    for name in _OPERATORS:
        library.impl(name, _kernel(name, "cpu" if with_cpu else None, once), "CompositeExplicitAutograd")
        for key in ("NestedTensorCPU", "NestedTensorCUDA"):
            library.impl(name, _refuse_nested(name), key)
    if with_cpu:
        library.impl("_isa_name", lambda: "none", "CompositeExplicitAutograd")
        library.impl("_library_version", lambda: "none", "CompositeExplicitAutograd")
        library.impl("_allow_tf32", _setting("TORCH_PNN_ALLOW_TF32", False), "CompositeExplicitAutograd")
        library.impl("_allow_wgmma", _setting("TORCH_PNN_ALLOW_WGMMA", True), "CompositeExplicitAutograd")


# --------------------------------------------------------------------------------------------------------------------
# Derivatives and autocast, where no compiled autograd library fits
# --------------------------------------------------------------------------------------------------------------------


def _save(saved: Sequence[int]) -> Callable[..., None]:
    """A setup function that keeps the inputs at these positions as tensors and the rest as they are."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        extra: tuple[Tensor, ...] = ()
        if isinstance(output, tuple):
            extra = output[1:]
            ctx.mark_non_differentiable(*extra)
            ctx.set_materialize_grads(False)
        ctx.options = [None if i in saved else value for i, value in enumerate(inputs)]
        ctx.save_for_backward(*(inputs[i] for i in saved), *extra)

    return setup


def _restore(ctx: Any, saved: Sequence[int]) -> tuple[list[Any], tuple[Tensor, ...]]:
    inputs = list(ctx.options)
    for i, tensor in zip(saved, ctx.saved_tensors):
        inputs[i] = tensor
    return inputs, ctx.saved_tensors[len(saved) :]


def _through_reference(ctx: Any, name: str, inputs: list[Any], grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients as differentiable functions of the inputs, for derivatives of derivatives."""
    from . import reference

    # One input may have been computed from another; aliases keep to the partial derivatives.
    inputs = [value.view_as(value) if isinstance(value, Tensor) else value for value in inputs]
    output = reference.OPERATORS[name](*inputs)
    output = output[0] if isinstance(output, tuple) else output
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    found = torch.autograd.grad(output, [inputs[i] for i in wanted], grad, create_graph=True, allow_unused=True)
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(wanted, found):
        gradients[i] = gradient
    return tuple(gradients)


_PLAIN_SAVED = (0, 1, 2, 3, 4)  # input, weight, bias, mask, seed
_NORM_SAVED = (0, 1, 2, 3, 4, 5, 6, 7, 8)  # input, weight, bias, gamma, beta, running mean and variance, mask, seed


def _needs(ctx: Any, count: int) -> tuple[bool, ...]:
    """Which inputs need a gradient; the dispatcher drops trailing arguments that have their default value."""
    return (*ctx.needs_input_grad, *(False,) * (count - len(ctx.needs_input_grad)))


def _plain_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, _ = _restore(ctx, _PLAIN_SAVED)
    if torch.is_grad_enabled():
        return _through_reference(ctx, "perturb_conv2d", inputs, grad)
    input, weight, _bias, mask, seed, *options = inputs
    needs = _needs(ctx, len(inputs))
    asked = [bool(needs[i]) for i in (0, 1, 2, 3)]
    result = torch.ops.torch_pnn._perturb_conv2d_backward(grad, input, weight, mask, seed, *options, asked)
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i in range(4):
        gradients[i] = result[i] if asked[i] else None
    return tuple(gradients)


def _norm_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    inputs, (mean, variance) = _restore(ctx, _NORM_SAVED)
    if grad is None:
        return (None,) * len(inputs)
    if torch.is_grad_enabled():
        return _through_reference(ctx, "perturb_norm_conv2d", inputs, grad)
    input, weight, _bias, gamma, beta, _mean, _variance, mask, seed, *options = inputs
    needs = _needs(ctx, len(inputs))
    positions = (0, 1, 2, 3, 4, 7)
    asked = [bool(needs[i]) for i in positions]
    result = torch.ops.torch_pnn._perturb_norm_conv2d_backward(
        grad, input, weight, gamma, beta, mean, variance, mask, seed, *options, asked
    )
    gradients: list[Tensor | None] = [None] * len(inputs)
    for position, wanted, gradient in zip(positions, asked, result):
        gradients[position] = gradient if wanted else None
    return tuple(gradients)


def _autocast_kernel(name: str, device: str, key: str) -> Callable[..., Any]:
    """Casts weight and bias, the arguments at 1 and 2, to the type that autocast has for the device.

    An input of the other 16-bit type follows, since no kernel takes it beside such a weight.
    """
    mask_at = _argument_names(name).index("mask")

    def follow(arguments: list[Any], kwargs: dict[str, Any]) -> None:
        input, dtype = arguments[0], torch.get_autocast_dtype(device)
        if input.dtype not in (torch.bfloat16, torch.float16) or input.dtype == dtype or input.device.type != device:
            return
        arguments[0] = input.to(dtype)
        mask = arguments[mask_at] if len(arguments) > mask_at else kwargs.get("mask")
        if mask is None or mask.dtype != input.dtype:
            return
        if "mask" in kwargs:
            kwargs["mask"] = mask.float()
        else:
            arguments[mask_at] = mask.float()

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device)) if tensor.device.type == device else tensor

    def kernel(*args: Any, **kwargs: Any) -> Any:
        arguments = list(args)
        arguments[1:3] = [cast(tensor) for tensor in arguments[1:3]]
        if "bias" in kwargs:
            kwargs["bias"] = cast(kwargs["bias"])
        follow(arguments, kwargs)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return getattr(torch.ops.torch_pnn, name)(*arguments, **kwargs)

    return kernel


def register_derivatives(library: torch.library.Library) -> None:
    """Registers gradients and autocast from Python."""
    torch.library.register_autograd(
        "torch_pnn::perturb_conv2d", _plain_backward, setup_context=_save(_PLAIN_SAVED), lib=library
    )
    torch.library.register_autograd(
        "torch_pnn::perturb_norm_conv2d", _norm_backward, setup_context=_save(_NORM_SAVED), lib=library
    )
    for device in _AUTOCAST_DEVICES:
        key = f"Autocast{device.upper()}"
        for name in ("perturb_conv2d", "perturb_norm_conv2d"):
            library.impl(name, _autocast_kernel(name, device, key), key)
