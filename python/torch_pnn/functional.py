"""The perturbation layer as functions of tensors, on the registered operators.

`perturb_conv2d` is the plain layer, `perturb_norm_conv2d` the layer with batch normalisation inside, and
`perturbation_mask` writes a seed's masks out. All of them script with ``torch.jit.script``. The same functions in plain
PyTorch, as the definition, stand in `torch_pnn.reference`.

Each public function has a twin whose name ends in ``_script``: TorchScript compiles that one, since it has no
keyword-only arguments with defaults. In eager mode and under ``torch.compile`` both go to the same body.

As PyTorch's own functions they follow the ``__torch_function__`` protocol: ``torch.fx.symbolic_trace`` records a call
of them as one node, and tensor subclasses see the call before it is carried out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _library  # noqa: F401  (registers the operators)

__all__ = ["perturb_conv2d", "perturb_norm_conv2d", "perturbation_mask"]

# Looked up once: a search through torch.ops in each call costs as much as its dispatch.
_PERTURB_CONV2D = torch.ops.torch_pnn.perturb_conv2d.default
_PERTURB_NORM_CONV2D = torch.ops.torch_pnn.perturb_norm_conv2d.default

# --------------------------------------------------------------------------------------------------------------------
# Errors: a call goes straight to the operator, and only one that failed is looked at more closely
# --------------------------------------------------------------------------------------------------------------------

_TENSORS = ("input", "weight", "bias", "norm_weight", "norm_bias", "running_mean", "running_var", "mask")
_REQUIRED = ("input", "weight")
_INTEGERS = ("masks", "groups", "channels", "height", "width")
_FLOATS = ("level", "eps", "momentum")
_BOOLS = ("shared_masks", "training")


def check_is_dense_tensor(name: str, value: Any) -> None:
    """Refuses what is no tensor, and nested tensors, which fail on the first question for their size.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it is a nested tensor.
    """
    if isinstance(value, Tensor):
        if value.is_nested:
            raise ValueError(
                f"{name} is a nested tensor, it should be a dense one: give the layer one image at a time, or pad them "
                "with torch.nested.to_padded_tensor"
            )
    elif not hasattr(value, "dim"):  # what torch.fx traces with is no tensor, but acts as one
        raise TypeError(f"{name} is {type(value).__name__}, it should be a tensor")


def _check_types(arguments: dict[str, Any]) -> None:
    """Refuses arguments of the wrong Python type, in a sentence."""
    for name, value in arguments.items():
        found = type(value).__name__
        if name in _TENSORS and isinstance(value, Tensor):
            check_is_dense_tensor(name, value)
        if name in _TENSORS and not isinstance(value, Tensor) and (value is not None or name in _REQUIRED):
            optional = "" if name in _REQUIRED else " or None"
            raise TypeError(f"{name} is {found}, it should be a tensor{optional}")
        if name in _INTEGERS and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))):
            raise TypeError(f"{name} is {found}, it should be an int")
        if name in _FLOATS and (isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat))):
            raise TypeError(f"{name} is {found}, it should be a number")
        if name in _BOOLS and not isinstance(value, bool):
            raise TypeError(f"{name} is {found}, it should be True or False")
        if name == "noise" and not isinstance(value, str):
            raise TypeError(f'noise is {found}, it should be "uniform", "normal", "waves" or None')
        if name == "activation" and not isinstance(value, str):
            raise TypeError(f"activation is {found}, it should be a str")
        if name == "dtype" and not isinstance(value, torch.dtype):
            raise TypeError(f"dtype is {found}, it should be a torch.dtype")
        if name == "seed" and isinstance(value, Tensor):
            if value.dtype != torch.int64:
                raise TypeError(f"seed has type {value.dtype}, it should be int64")
            if value.numel() != 1:
                raise ValueError(f"seed has size {list(value.shape)}, it should have exactly one element")
        if name == "stride":
            pair = value if isinstance(value, (tuple, list)) else [value]
            if any(isinstance(step, bool) or not isinstance(step, (int, torch.SymInt)) for step in pair):
                raise TypeError(f"stride is {value!r}, it should be one int or two")
            if len(pair) not in (1, 2):
                raise ValueError(f"stride is {value!r}, it should be one int or two")


def _explained(error: Exception, arguments: dict[str, Any]) -> Exception:
    """What to raise in place of an operator's error: Python's own types where they fit, else the error itself."""
    if isinstance(error, torch.OutOfMemoryError):
        return error
    try:
        _check_types(arguments)
    except (TypeError, ValueError) as found:
        return found
    if isinstance(error, NotImplementedError):
        return error
    operator, colon, sentence = str(error).partition(": ")
    if not colon or not operator.startswith("torch_pnn"):
        return error
    sentence = sentence.split("\nException raised from", 1)[0]
    if "out of memory" in sentence or "can't allocate memory" in sentence:
        return torch.OutOfMemoryError(sentence)
    about_type = " has type " in sentence or " is quantized " in sentence or sentence.startswith("dtype is ")
    return TypeError(sentence) if about_type else ValueError(sentence)


def _scripts_as(twin: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes TorchScript compile `twin` wherever the decorated function is called.

    This is the hook by which ``torch.jit.script_if_tracing`` names the function behind its wrapper; the compiler wants
    both to have the same name.
    """

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        twin.__name__ = function.__name__
        setattr(function, "__script_if_tracing_wrapper", True)
        setattr(function, "__original_fn", twin)
        return function

    return mark


def _seed_tensor(seed: Tensor | int, device: torch.device | None) -> Tensor:
    """A seed as the operators take it: one int64, ints as two's complement of 64 bits."""
    if isinstance(seed, Tensor):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {type(seed).__name__}, it should be an int or an int64 tensor with one element")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}, it should be in [-2**63, 2**64)")
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed], dtype=torch.int64, device=device)


def _check_source(mask: Tensor | None, seed: Any, noise: str | None) -> None:
    """Exactly one source of masks, or by noise=None none at all."""
    if noise is None:
        if mask is not None or seed is not None:
            given = "mask" if mask is not None else "seed"
            raise ValueError(f"{given} is given, it should be None where noise is None (no perturbation)")
    elif mask is None and seed is None:
        raise ValueError("mask and seed are both None, exactly one of them should be given (noise=None for neither)")
    elif mask is not None and seed is not None:
        raise ValueError("mask and seed are both given, exactly one of them should be")


def _script_seed(mask: Tensor | None, seed: Tensor | int | None, noise: str | None, input: Tensor) -> Tensor | None:
    """The seed as the operators take it, in TorchScript: `_check_source` and `_seed_tensor` in its subset of Python."""
    result: Tensor | None = None
    if isinstance(seed, int):
        result = torch.tensor([seed], dtype=torch.int64, device=input.device)
    elif isinstance(seed, Tensor):
        result = seed
    given = int(mask is not None) + int(result is not None)
    if given != (0 if noise is None else 1):
        raise ValueError("exactly one of mask and seed should be given, and neither where noise is None")
    return result


# --------------------------------------------------------------------------------------------------------------------
# The plain layer
# --------------------------------------------------------------------------------------------------------------------


def _perturb_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | int | None,
    masks: int,
    shared_masks: bool,
    noise: str | None,
    level: float,
    activation: str,
    stride: int | Sequence[int],
    groups: int,
) -> Tensor:
    """The body of `perturb_conv2d`."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input is {type(input).__name__}, it should be a tensor")
    if (mask is None) == (seed is None) or noise is None:
        _check_source(mask, seed, noise)
        noise = "uniform"  # not read
    if seed is not None and not isinstance(seed, Tensor):
        seed = _seed_tensor(seed, input.device)
    image = input.dim() == 3
    try:
        output = _PERTURB_CONV2D(
            input.unsqueeze(0) if image else input,
            weight,
            bias,
            mask,
            seed,
            masks,
            shared_masks,
            noise,
            level,
            activation,
            stride,
            groups,
        )
    except (AttributeError, RuntimeError) as error:
        names = ("input", "weight", "bias", "mask", "masks", "shared_masks", "noise", "level", "activation", "stride")
        values = (input, weight, bias, mask, masks, shared_masks, noise, level, activation, stride)
        raise _explained(error, dict(zip(names, values, strict=True)) | {"groups": groups, "seed": seed}) from error
    return output.squeeze(0) if image else output


def _perturb_conv2d_script(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    seed: Tensor | int | None = None,
    masks: int = 1,
    shared_masks: bool = False,
    noise: str | None = "uniform",
    level: float = 1.0,
    activation: str = "relu",
    stride: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    if not torch.jit.is_scripting():
        return _perturb_conv2d(
            input, weight, bias, mask, seed, masks, shared_masks, noise, level, activation, stride, groups
        )
    seed_tensor = _script_seed(mask, seed, noise, input)
    kind = "uniform" if noise is None else noise
    pair = [stride, stride] if isinstance(stride, int) else [stride[0], stride[1]]
    image = input.dim() == 3
    if image:
        input = input.unsqueeze(0)
    output = torch.ops.torch_pnn.perturb_conv2d(
        input, weight, bias, mask, seed_tensor, masks, shared_masks, kind, level, activation, pair, groups
    )
    return output.squeeze(0) if image else output


@_scripts_as(_perturb_conv2d_script)
def perturb_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    seed: Tensor | int | None = None,
    masks: int = 1,
    shared_masks: bool = False,
    noise: str | None = "uniform",
    level: float = 1.0,
    activation: str = "relu",
    stride: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Adds fixed masks to the input, applies the activation and mixes the results with a 1x1 weight.

    For k = c*M + m: y[b, t, q] = bias[t] + sum over k of weight[t, k] * activation(x[b, c, p] + level * N[c, m, p]),
    where p is the input pixel (i*stride, j*stride) of output pixel q = (i, j). With groups, outputs and channels pair
    only inside a group. The M times larger response maps are never stored. (Juefei-Xu, Boddeti, Savvides,
    "Perturbative Neural Networks", CVPR 2018.)

    Args:
        input: [B, C, H, W] or [C, H, W]; float32, float64, bfloat16 or float16.
        weight: [T, C/groups * M, 1, 1]; input's type, or bfloat16 or float16 beside a float32 input.
        bias: [T], weight's type.
        mask: N, [C or 1, M, H, W], float32 or input's type; 1 = the same masks for every channel. Its gradient is
            computed where asked for. `masks`, `shared_masks` and `noise` are not read then.
        seed: of masks that are computed and never stored: an int in [-2**63, 2**64) or an int64 tensor with one
            element. Exactly one of `mask` and `seed` is given.
        masks: M, masks per channel, with `seed`.
        shared_masks: with `seed`, the same M masks for every channel.
        noise: "uniform" (256 values in (-1, 1), variance 1/3), "normal" (variance 1) or "waves" (the 256 values as a
            triangle wave per map). None = no perturbation, then neither `mask` nor `seed` may be given.
        level: factor of the mask.
        activation: identity, relu, leaky_relu, elu, selu, gelu, silu, tanh, sigmoid or hardtanh.
        stride: rows and columns; the result at every stride-th pixel, computed only there.
        groups: divides C and T.

    Returns:
        [B, T, ceil(H/stride), ceil(W/stride)] (without B for a [C, H, W] input) in weight's type; channels_last where
        the input is.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: sizes don't fit together, or an option is out of its range.

    Example:
        >>> x, weight = torch.tensor([[[[1.0, -2.0]]]]), torch.tensor([[[[3.0]]]])
        >>> perturb_conv2d(x, weight, mask=torch.tensor([[[[0.5, 2.5]]]]))
        tensor([[[[4.5000, 1.5000]]]])
        >>> perturb_conv2d(x, weight, seed=7, level=0.1).shape
        torch.Size([1, 1, 1, 2])
    """
    if has_torch_function_variadic(input, weight, bias, mask, seed):
        return handle_torch_function(
            perturb_conv2d,
            (input, weight, bias, mask, seed),
            input,
            weight,
            bias,
            mask=mask,
            seed=seed,
            masks=masks,
            shared_masks=shared_masks,
            noise=noise,
            level=level,
            activation=activation,
            stride=stride,
            groups=groups,
        )
    return _perturb_conv2d(
        input, weight, bias, mask, seed, masks, shared_masks, noise, level, activation, stride, groups
    )


# --------------------------------------------------------------------------------------------------------------------
# The layer with batch normalisation inside
# --------------------------------------------------------------------------------------------------------------------


def _statistics(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A vector of the normalisation in the type that statistics have beside the input."""
    return vector if vector is None or vector.dtype == dtype else vector.to(dtype)


def _update_running_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    pixels: int,
    momentum: float,
) -> None:
    """Moves running statistics towards a batch's, in place: the variance with n/(n - 1), nothing where n is 0."""
    # Detached and not under no_grad: torch.export keeps that as a region, and can't load a program with one.
    if pixels > 1:
        # Both are computed before either is written: a statistic that can't be written leaves the other alone too.
        new_mean: Tensor | None = None
        if running_mean is not None:
            new_mean = running_mean.detach().mul(1.0 - momentum).add(mean.detach(), alpha=momentum)
        if running_var is not None:
            factor = momentum * (pixels / (pixels - 1))
            new_var = running_var.detach().mul(1.0 - momentum).add(variance.detach(), alpha=factor)
            running_var.detach().copy_(new_var)
        if running_mean is not None and new_mean is not None:
            running_mean.detach().copy_(new_mean)


def _check_running(name: str, running: Any, weight: Any, groups: Any) -> None:
    """Refuses running statistics that could not be updated after the operator ran."""
    if running is None:
        return
    if not isinstance(running, Tensor):
        raise TypeError(f"{name} is {type(running).__name__}, it should be a tensor or None")
    if not running.is_floating_point():
        raise TypeError(f"{name} has type {running.dtype}, it should be a floating-point type")
    well_formed = isinstance(weight, Tensor) and weight.dim() == 4 and isinstance(groups, int)
    if well_formed and (running.dim() != 1 or running.shape[0] != weight.shape[1] * groups):
        raise ValueError(
            f"{name} has size {list(running.shape)}, it should be [{weight.shape[1] * groups}]: one value a map"
        )


def _perturb_norm_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    mask: Tensor | None,
    seed: Tensor | int | None,
    masks: int,
    shared_masks: bool,
    noise: str | None,
    level: float,
    activation: str,
    stride: int | Sequence[int],
    groups: int,
) -> Tensor:
    """The body of `perturb_norm_conv2d`."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input is {type(input).__name__}, it should be a tensor")
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float, torch.SymFloat)):
        raise TypeError(f"momentum is {type(momentum).__name__}, it should be a number")
    if not isinstance(training, bool):
        raise TypeError(f"training is {type(training).__name__}, it should be True or False")
    if (mask is None) == (seed is None) or noise is None:
        _check_source(mask, seed, noise)
        noise = "uniform"  # not read
    if seed is not None and not isinstance(seed, Tensor):
        seed = _seed_tensor(seed, input.device)
    if not training and (running_mean is None or running_var is None):
        name = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{name} is None, it should be given where training is False")
    _check_running("running_mean", running_mean, weight, groups)
    _check_running("running_var", running_var, weight, groups)
    image = input.dim() == 3
    statistics = torch.float64 if input.dtype == torch.float64 else torch.float32
    # When training, the running statistics stay out of the call: they are about to change, and what autograd keeps for
    # the backward pass must not.
    try:
        output, mean, variance = _PERTURB_NORM_CONV2D(
            input.unsqueeze(0) if image else input,
            weight,
            bias,
            _statistics(norm_weight, statistics),
            _statistics(norm_bias, statistics),
            None if training else _statistics(running_mean, statistics),
            None if training else _statistics(running_var, statistics),
            mask,
            seed,
            training,
            eps,
            masks,
            shared_masks,
            noise,
            level,
            activation,
            stride,
            groups,
        )
    except (AttributeError, RuntimeError) as error:
        names = ("input", "weight", "bias", "norm_weight", "norm_bias", "training", "eps", "mask", "masks")
        values = (input, weight, bias, norm_weight, norm_bias, training, eps, mask, masks)
        arguments = dict(zip(names, values, strict=True)) | {"shared_masks": shared_masks, "noise": noise}
        arguments |= {"level": level, "activation": activation, "stride": stride, "groups": groups, "seed": seed}
        raise _explained(error, arguments) from error
    if training:
        pixels = output.shape[0] * output.shape[2] * output.shape[3]
        try:
            _update_running_statistics(running_mean, running_var, mean, variance, pixels, momentum)
        except RuntimeError as error:
            if "vmap: " in str(error):
                raise ValueError(
                    "running_mean and running_var can't be updated inside torch.vmap, where every sample has its own "
                    "statistics: use evaluation mode, let torch.func.replace_all_batch_norm_modules_ remove them, or "
                    "give every sample running ones of its own, as torch.func.stack_module_state does"
                ) from error
            raise
    return output.squeeze(0) if image else output


def _perturb_norm_conv2d_script(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    seed: Tensor | int | None = None,
    masks: int = 1,
    shared_masks: bool = False,
    noise: str | None = "uniform",
    level: float = 1.0,
    activation: str = "relu",
    stride: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    if not torch.jit.is_scripting():
        return _perturb_norm_conv2d(
            input,
            weight,
            bias,
            norm_weight,
            norm_bias,
            running_mean,
            running_var,
            training,
            momentum,
            eps,
            mask,
            seed,
            masks,
            shared_masks,
            noise,
            level,
            activation,
            stride,
            groups,
        )
    seed_tensor = _script_seed(mask, seed, noise, input)
    kind = "uniform" if noise is None else noise
    pair = [stride, stride] if isinstance(stride, int) else [stride[0], stride[1]]
    if not training and (running_mean is None or running_var is None):
        raise ValueError("running_mean and running_var should be given where training is False")
    maps = weight.shape[1] * groups
    if running_mean is not None and (running_mean.dim() != 1 or running_mean.shape[0] != maps):
        raise ValueError("running_mean should have one value a map")
    if running_var is not None and (running_var.dim() != 1 or running_var.shape[0] != maps):
        raise ValueError("running_var should have one value a map")
    image = input.dim() == 3
    if image:
        input = input.unsqueeze(0)
    statistics = torch.float64 if input.dtype == torch.float64 else torch.float32
    output, mean, variance = torch.ops.torch_pnn.perturb_norm_conv2d(
        input,
        weight,
        bias,
        _statistics(norm_weight, statistics),
        _statistics(norm_bias, statistics),
        None if training else _statistics(running_mean, statistics),
        None if training else _statistics(running_var, statistics),
        mask,
        seed_tensor,
        training,
        eps,
        masks,
        shared_masks,
        kind,
        level,
        activation,
        pair,
        groups,
    )
    if training:
        pixels = output.shape[0] * output.shape[2] * output.shape[3]
        _update_running_statistics(running_mean, running_var, mean, variance, pixels, momentum)
    return output.squeeze(0) if image else output


@_scripts_as(_perturb_norm_conv2d_script)
def perturb_norm_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    seed: Tensor | int | None = None,
    masks: int = 1,
    shared_masks: bool = False,
    noise: str | None = "uniform",
    level: float = 1.0,
    activation: str = "relu",
    stride: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Perturb, activate, normalise, mix: the layer with batch normalisation of the response maps inside.

    Equal to `perturb_conv2d` with activation(u) replaced by
    norm_weight * (activation(u) - mean) / sqrt(variance + eps) + norm_bias, per map k, where the moments run over the
    batch and the computed pixels (the kept ones under a stride). This is the chain of the authors' published layer.

    Args:
        input: [B, C, H, W] or [C, H, W]; as for `perturb_conv2d`.
        weight: [T, C/groups * M, 1, 1].
        bias: [T], or None.
        norm_weight: gamma, [K] for the K = C*M maps, or None for 1. It and the next three are float32 (float64 beside
            a float64 input); other floating-point types are converted.
        norm_bias: beta, [K], or None for 0.
        running_mean: [K]; read where `training` is False, else updated in place; None = not kept.
        running_var: [K], likewise.
        training: whether the moments are those of this batch (True) or the running ones.
        momentum: the weight of this batch in the running statistics; the variance enters with n/(n - 1).
        eps: added to the variance.
        mask: see `perturb_conv2d`, as for all arguments that follow.
        seed: an int, or an int64 tensor with one element.
        masks: M.
        shared_masks: the same masks for every channel.
        noise: "uniform", "normal", "waves" or None.
        level: factor of the mask.
        activation: its name.
        stride: rows and columns.
        groups: divides C and T.

    Returns:
        [B, T, H', W'] as for `perturb_conv2d`.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: sizes don't fit together, an option is out of its range, or a training batch has a single pixel.

    Example:
        >>> x, weight = torch.tensor([[[[0.0, 2.0]]]]), torch.ones(1, 1, 1, 1)
        >>> perturb_norm_conv2d(x, weight, None, None, None, None, None, training=True, noise=None, eps=0.0)
        tensor([[[[-1.,  1.]]]])
    """
    tensors = (input, weight, bias, norm_weight, norm_bias, running_mean, running_var)
    if has_torch_function_variadic(*tensors, mask, seed):
        return handle_torch_function(
            perturb_norm_conv2d,
            (*tensors, mask, seed),
            *tensors,
            training=training,
            momentum=momentum,
            eps=eps,
            mask=mask,
            seed=seed,
            masks=masks,
            shared_masks=shared_masks,
            noise=noise,
            level=level,
            activation=activation,
            stride=stride,
            groups=groups,
        )
    return _perturb_norm_conv2d(
        input,
        weight,
        bias,
        norm_weight,
        norm_bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        mask,
        seed,
        masks,
        shared_masks,
        noise,
        level,
        activation,
        stride,
        groups,
    )


# --------------------------------------------------------------------------------------------------------------------
# Masks written out
# --------------------------------------------------------------------------------------------------------------------


def _perturbation_mask_script(
    seed: Tensor | int,
    channels: int,
    masks: int,
    height: int,
    width: int,
    shared_masks: bool = False,
    noise: str = "uniform",
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    if not torch.jit.is_scripting():
        return _perturbation_mask(seed, channels, masks, height, width, shared_masks, noise, dtype, device)
    if isinstance(seed, int):
        seed_tensor = torch.tensor([seed], dtype=torch.int64, device=device)
    else:
        seed_tensor = seed
        if device is not None:
            seed_tensor = seed_tensor.to(device)
    return torch.ops.torch_pnn.perturbation_mask(
        seed_tensor, channels, masks, height, width, shared_masks, noise, dtype
    )


def _perturbation_mask(
    seed: Tensor | int,
    channels: int,
    masks: int,
    height: int,
    width: int,
    shared_masks: bool,
    noise: str,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Tensor:
    """The body of `perturbation_mask`."""
    seed = _seed_tensor(seed, None if device is None else torch.device(device))
    if device is not None:
        seed = seed.to(device)
    try:
        return torch.ops.torch_pnn.perturbation_mask(seed, channels, masks, height, width, shared_masks, noise, dtype)
    except RuntimeError as error:
        names = ("seed", "channels", "masks", "height", "width", "shared_masks", "noise", "dtype")
        values = (seed, channels, masks, height, width, shared_masks, noise, dtype)
        raise _explained(error, dict(zip(names, values, strict=True))) from error


@_scripts_as(_perturbation_mask_script)
def perturbation_mask(
    seed: Tensor | int,
    channels: int,
    masks: int,
    height: int,
    width: int,
    *,
    shared_masks: bool = False,
    noise: str = "uniform",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """A seed's masks, written out: the values that the layer computes from the seed.

    A mask for a larger image continues the smaller one's, and a value depends on nothing but the seed, its kind and
    its own coordinates: it is the same on every machine. docs/masks.md has the formulas.

    Args:
        seed: an int in [-2**63, 2**64) or an int64 tensor with one element.
        channels: C, input channels.
        masks: M, masks per channel.
        height: rows.
        width: columns.
        shared_masks: the same M masks for every channel.
        noise: "uniform" (256 values in (-1, 1), variance 1/3), "normal" (variance 1, |N| < 4.89) or "waves" (the 256
            values as a triangle wave per map, wavelengths of 4 to 64 pixels along each axis).
        dtype: of the result: float32, float64, bfloat16 or float16. Values are rounded once to it, which changes none
            of uniform and waves.
        device: of the result; by default the seed's, or PyTorch's default device for an int.

    Returns:
        [C, M, height, width], or [1, M, height, width] with shared masks.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a size is negative, or an option is out of its range.

    Example:
        >>> perturbation_mask(7, channels=1, masks=1, height=1, width=3).flatten() * 256
        tensor([-165.,   55.,  129.])
    """
    # (torch.fx's stand-ins for sizes have the protocol too.)
    if has_torch_function_variadic(seed, height, width):
        return handle_torch_function(
            perturbation_mask,
            (seed, height, width),
            seed,
            channels,
            masks,
            height,
            width,
            shared_masks=shared_masks,
            noise=noise,
            dtype=dtype,
            device=device,
        )
    return _perturbation_mask(seed, channels, masks, height, width, shared_masks, noise, dtype, device)
