"""The modules `PerturbConv2d` and `LBConv2d`, which stand where an `nn.Conv2d` stood.

`PerturbConv2d` is the layer of Perturbative Neural Networks (Juefei-Xu, Boddeti, Savvides, CVPR 2018): fixed masks are
added to the input, an activation follows, and a learnable 1x1 weight mixes the results. `LBConv2d` is that of Local
Binary Convolutional Neural Networks (Juefei-Xu, Boddeti, Savvides, CVPR 2017): fixed sparse ternary filters, an
activation, a learnable 1x1 weight.

Geometry, for both axes alike, with e = dilation * (kernel_size - 1): the input is padded by padding - floor(e/2) before
and padding - ceil(e/2) behind (a negative number crops), the layer runs on that grid, and windows of `stride` pixels,
clipped at the edge, are pooled. The output then has the size that `nn.Conv2d` gives.
"""

import contextlib
import math
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import functional, initialisation

__all__ = ["MASK_VERSION", "LBConv2d", "PerturbConv2d"]

MASK_VERSION = 1
"""Version of the generator that turns seeds into masks; it is saved with every layer, and an unknown one is refused."""

ACTIVATIONS = (
    "identity",
    "relu",
    "leaky_relu",
    "elu",
    "selu",
    "gelu",
    "silu",
    "tanh",
    "sigmoid",
    "hardtanh",
)
_NOISES = ("uniform", "normal", "waves")
_DOWNSAMPLES = ("max", "avg", "subsample")
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_DEFAULT_LEVEL = 0.1

# --------------------------------------------------------------------------------------------------------------------
# Checks of arguments
# --------------------------------------------------------------------------------------------------------------------


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(name: str, value: Any, least: int) -> int:
    if not _is_int(value):
        raise TypeError(f"{name} is {value!r}, it should be an int")
    if value < least:
        raise ValueError(f"{name} is {value}, it should be at least {least}")
    return value


def _pair(name: str, value: Any, least: int | None) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) == 1:
        pair = pair * 2
    if not all(_is_int(entry) for entry in pair):
        raise TypeError(f"{name} is {value!r}, it should be an int or a pair of ints")
    if len(pair) != 2:
        raise ValueError(f"{name} is {value!r}, it should be an int or a pair of ints")
    if least is not None and min(pair) < least:
        raise ValueError(f"{name} is {value!r}, it should be at least {least}")
    return pair


def _padding(value: Any, stride: tuple[int, int]) -> str | tuple[int, int]:
    """A padding as `nn.Conv2d` takes it; ints may be negative, which crops."""
    if not isinstance(value, str):
        return _pair("padding", value, None)
    if value not in ("same", "valid"):
        raise ValueError(f"padding is {value!r}, it should be 'same', 'valid', an int or a pair of ints")
    if value == "same" and stride != (1, 1):
        raise ValueError(f"padding is 'same', it should be numbers where stride is {stride}")
    return value


def _choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, it should be one of {', '.join(map(repr, choices))}")
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, it should be one of {', '.join(map(repr, choices))}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, it should be True or False")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}, it should be a number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, it should be finite")
    return float(value)


def _optional_seed(value: Any) -> int | None:
    if value is None:
        return None
    if not _is_int(value):
        raise TypeError(f"seed is {value!r}, it should be an int in [-2**63, 2**64) or None")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"seed is {value}, it should be in [-2**63, 2**64)")
    return value


def _is_float32(value: int) -> bool:
    """Whether an integer is the value of a float32."""
    return int(struct.unpack("f", struct.pack("f", value))[0]) == value


def _draw_seed() -> Tensor:
    """A seed from PyTorch's default generator."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device="cpu")


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype is {dtype!r}, it should be float32, float64, bfloat16 or float16")


@contextlib.contextmanager
def _silent_tracer() -> Iterator[None]:
    """Without torch.jit.trace's warnings about our checks of sizes: what it records computes the same at any size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check_convolved(name: str, value: Any, weight: Tensor) -> None:
    """Refuses, in the operators' words, what PyTorch's convolutions fail on with words about something else."""
    functional.check_is_dense_tensor(name, value)
    if not isinstance(value, Tensor):
        return
    if value.is_quantized:
        kind = str(value.dtype).removeprefix("torch.")
        raise TypeError(
            f"{name} is quantized ({kind}), it should be float32, float64, bfloat16 or float16: call dequantize() on it"
        )
    if value.dtype not in _FLOATING:
        kind = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name} has type {kind}, it should be float32, float64, bfloat16 or float16")
    if value.layout != torch.strided and not value.is_mkldnn:
        raise ValueError(f"{name} is sparse or opaque, it should be dense (strided): call to_dense() on it")
    if value.device != weight.device:
        raise ValueError(
            f"{name} is on {value.device} and weight on {weight.device}, they should be on the same device"
        )
    if value.dtype != weight.dtype and not torch.is_autocast_enabled(value.device.type):
        found, own = (str(dtype).removeprefix("torch.") for dtype in (weight.dtype, value.dtype))
        raise TypeError(f"weight has type {found}, it should be the input's {own}")


# --------------------------------------------------------------------------------------------------------------------
# Parts of the forward pass, in the subset of Python that TorchScript compiles
# --------------------------------------------------------------------------------------------------------------------


def _activate(u: Tensor, activation: str) -> Tensor:
    """The activation of that name, applied to the response maps where they are formed explicitly."""
    if activation == "relu":
        return F.relu(u)
    elif activation == "leaky_relu":
        return F.leaky_relu(u)
    elif activation == "elu":
        return F.elu(u)
    elif activation == "selu":
        return F.selu(u)
    elif activation == "gelu":
        return F.gelu(u)
    elif activation == "silu":
        return F.silu(u)
    elif activation == "tanh":
        return torch.tanh(u)
    elif activation == "sigmoid":
        return torch.sigmoid(u)
    elif activation == "hardtanh":
        return F.hardtanh(u)
    return u


def _pad(input: Tensor, pads: tuple[int, int, int, int], padding_mode: str) -> Tensor:
    """Pads by (left, right, top, bottom); negative numbers crop. On each axis both have the same sign."""
    left, right, top, bottom = pads
    if padding_mode == "zeros":
        return F.pad(input, [left, right, top, bottom])
    height, width = input.shape[-2], input.shape[-1]
    cropped = input[..., max(-top, 0) : height - max(-bottom, 0), max(-left, 0) : width - max(-right, 0)]
    return F.pad(cropped, [max(left, 0), max(right, 0), max(top, 0), max(bottom, 0)], mode=padding_mode)


def _pool(input: Tensor, stride: tuple[int, int], downsample: str) -> Tensor:
    """Maximum or mean over windows of `stride` pixels that are clipped at the edge."""
    if not torch.jit.is_scripting() and torch.compiler.is_compiling():
        return _traced_pool(input, stride, downsample)
    if downsample == "max":
        return F.max_pool2d(input, stride, stride, ceil_mode=True)
    return F.avg_pool2d(input, stride, stride, ceil_mode=True, count_include_pad=False)


def _traced_pool(input: Tensor, stride: tuple[int, int], downsample: str) -> Tensor:
    """The same for torch.compile and torch.export: PyTorch's ceil_mode would tie a graph to even or to odd sizes."""
    behind = [0, stride[1] - 1, 0, stride[0] - 1]
    if downsample == "max":
        return F.max_pool2d(F.pad(input, behind, value=-math.inf), stride, stride)
    counts = F.pad(torch.ones_like(input[..., :1, :, :]), behind)
    sums = F.avg_pool2d(F.pad(input, behind), stride, stride, divisor_override=1)
    return sums / F.avg_pool2d(counts, stride, stride, divisor_override=1)


def _traced_as_leaf(module: nn.Module, input: Any) -> Any:
    """The node of a call of the module, for ``torch.fx.symbolic_trace``.

    A tracer takes the modules of ``torch.nn`` alone as leaves and goes through all others, whose questions for an
    input's size it can't answer. So our layers say themselves, to every tracer, that they are leaves.

    Raises:
        ValueError: the module is what is being traced, so that there is nothing to be a leaf of.
    """
    if input.tracer.root is module:
        raise ValueError(
            f"torch.fx can't trace a {type(module).__name__} by itself, which is one node of a graph: trace a module "
            "that holds it, for example nn.Sequential(layer)"
        )
    return input.tracer.create_proxy("call_module", input.tracer.path_of_module(module), (input,), {})


class PerturbConv2d(nn.Module):
    """The perturbation layer, in the place of an `nn.Conv2d`: fixed masks, activation, learnable 1x1.

    y = pool(bias + weight * activation(pad(x) + level * N)), with M masks N for each input channel. Kernel size,
    padding and dilation only set the output's size, which is the one that `nn.Conv2d` gives; the weight is 1x1. It has
    `nn.Conv2d`'s attributes but is no subclass of it: tools that know convolutions would drop the perturbation.

    Masks are fixed when the layer is made, the same in training and evaluation, and saved with it: as a seed of 8
    bytes, from which they are computed at any image size (a larger image's mask continues a smaller one's), or, with
    `mask` or `mask_size`, as a tensor of one size. A layer without a given seed draws one from PyTorch's default
    generator. The bias starts at 0, the weight so that the output keeps the input's scale (docs/initialisation.md).

    Args:
        in_channels: C.
        out_channels: T.
        kernel_size: an int or a pair (rows, columns), as for all sizes here.
        stride: of the output.
        padding: as `nn.Conv2d`: numbers (negative ones too), "same" or "valid".
        dilation: as `nn.Conv2d`.
        groups: divides C and T; outputs and channels pair only inside a group.
        bias: whether a bias is added.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: where parameters are made.
        dtype: of the parameters: float32, float64, bfloat16 or float16.
        masks: M, masks per input channel.
        level: factor of the masks; 0 = no perturbation.
        noise: "uniform" (256 values in (-1, 1)), "normal" (standard deviation 1) or "waves" (the 256 values as triangle
            waves; better than noise at equal cost on MNIST and CIFAR-10, docs/studies/first-results.md); None = no
            perturbation, the control: same modules, same initial weights as "uniform" at this level.
        activation: identity, relu, leaky_relu, elu, selu, gelu, silu, tanh, sigmoid or hardtanh.
        seed: of the masks, an int in [-2**63, 2**64); None draws one.
        shared_masks: the same M masks for every channel.
        mask: a tensor [C or 1, M, H, W] to be used instead of a seed's masks; H and W are those of the padded grid
            (the image's own for padding = dilation * (kernel_size - 1) / 2, the usual case).
        mask_size: (H, W) of the padded grid: the seed's masks are written out and held as a tensor.
        train_masks: whether the masks are learnt; needs `mask` or `mask_size`.
        norm: whether the maps are batch-normalised before the 1x1; then `self.norm` is an `nn.BatchNorm2d(C * M)`
            whose own settings are honoured. One replaced by SyncBatchNorm or a subclass, or with hooks, is called as it
            is, at the cost of forming all maps.
        downsample: what pools under a stride: "max", "avg" or "subsample" (every stride-th pixel, nothing else is
            computed).

    Shape:
        Input [B, C, H, W] or [C, H, W]; output [B, T, H', W'] or [T, H', W'] as `nn.Conv2d`.

    Attributes:
        weight: V, [T, C/groups * M, 1, 1]; column c * M + m belongs to channel c of the group and mask m.
        bias: [T], or None.
        mask_seed: a buffer of one int64: the seed, in two's complement; None where `mask` was given.
        mask_version: a buffer of one int64: the generator's version.
        mask: the masks, where they are held as a tensor (a parameter if trained, else a buffer), else None.
        norm: the normalisation, or None.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument is out of its range, or arguments contradict each other.

    Example:
        >>> layer = PerturbConv2d(3, 8, kernel_size=3, stride=2, padding=1, masks=4, seed=1)
        >>> layer(torch.zeros(1, 3, 32, 32)).shape, tuple(layer.weight.shape)
        (torch.Size([1, 8, 16, 16]), (8, 12, 1, 1))
        >>> sorted(layer.state_dict())
        ['bias', 'mask_seed', 'mask_version', 'weight']
    """

    __constants__ = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "masks",
        "noise",
        "activation",
        "shared_masks",
        "train_masks",
        "downsample",
        "_pads",
        "_fuses_norm_in_script",
    )
    __jit_ignored_attributes__ = ("seed", "_known_seed")
    __jit_unused_properties__ = ("mask_bytes",)

    bias: Tensor | None
    if TYPE_CHECKING:  # TorchScript would take these annotations and save the buffers as plain attributes.
        mask: Tensor | None
        mask_seed: Tensor | None
        mask_version: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        masks: int = 1,
        level: float = 0.1,
        noise: str | None = "uniform",
        activation: str = "relu",
        seed: int | None = None,
        shared_masks: bool = False,
        mask: Tensor | None = None,
        mask_size: int | tuple[int, int] | None = None,
        train_masks: bool = False,
        norm: bool = False,
        downsample: str = "max",
    ) -> None:
        super().__init__()
        self.in_channels = _count("in_channels", in_channels, 0)
        self.out_channels = _count("out_channels", out_channels, 0)
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.padding = _padding(padding, self.stride)
        self.dilation = _pair("dilation", dilation, 1)
        self.groups = _count("groups", groups, 1)
        if in_channels % groups != 0 or out_channels % groups != 0:
            raise ValueError(
                f"groups is {groups}, it should divide in_channels = {in_channels} and out_channels = {out_channels}"
            )
        self.padding_mode = _choice("padding_mode", padding_mode, _PADDING_MODES)
        self.transposed = False
        self.output_padding = (0, 0)
        self.masks = _count("masks", masks, 1)
        self.level = _number("level", level)
        self.noise = None if noise is None else _choice("noise", noise, _NOISES)
        self.activation = _choice("activation", activation, ACTIVATIONS)
        self.seed = _optional_seed(seed)
        self._known_seed: int | None = None
        self.shared_masks = _flag("shared_masks", shared_masks)
        self.train_masks = _flag("train_masks", train_masks)
        self.downsample = _choice("downsample", downsample, _DOWNSAMPLES)
        self._pads = self._net_pads()
        self._fuses_norm_in_script = False
        _flag("bias", bias)
        _flag("norm", norm)
        _check_dtype(dtype)
        held = self._checked_mask(mask, mask_size)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        columns = in_channels // groups * masks
        self.weight = nn.Parameter(torch.empty((out_channels, columns, 1, 1), **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **factory)) if bias else None)
        one = torch.ones(1, dtype=torch.int64, device=self.weight.device)
        self.register_buffer("mask_seed", None if mask is not None else torch.zeros_like(one))
        self.register_buffer("mask_version", one * MASK_VERSION)
        if mask is not None and held is not None:
            # A float32 mask may stand beside every type; any other is brought to the layer's.
            own = torch.float32 if held.dtype == torch.float32 else self.weight.dtype
            held = held.to(device=self.weight.device, dtype=own, copy=True)
        elif held is not None:
            held = torch.empty_like(held, device=self.weight.device)
        if held is not None and train_masks:
            self.mask = nn.Parameter(held)
        else:
            self.register_buffer("mask", held)
        self.norm = nn.BatchNorm2d(in_channels * masks, **factory) if norm else None
        self.reset_parameters()

    def _net_pads(self) -> tuple[int, int, int, int]:
        """What is padded on the left, right, top and bottom, as `F.pad` takes it; negative numbers crop."""
        pads: list[int] = []
        for axis in (1, 0):
            extent = self.dilation[axis] * (self.kernel_size[axis] - 1)
            if self.padding == "same":
                pads += [0, 0]
                continue
            padding = 0 if isinstance(self.padding, str) else self.padding[axis]
            pads += [padding - extent // 2, padding - (extent + 1) // 2]
        return pads[0], pads[1], pads[2], pads[3]

    def _checked_mask(self, mask: Any, mask_size: Any) -> Tensor | None:
        """The tensor that holds the masks, if any does: the given one, or an empty one of `mask_size`."""
        size = None if mask_size is None else _pair("mask_size", mask_size, 0)
        if mask is not None and size is not None:
            raise ValueError("mask and mask_size are both given, it should be one of them: a mask has its own size")
        if self.train_masks and mask is None and size is None:
            raise ValueError("train_masks is True, then mask or mask_size=(H, W) should be given: masks have one size")
        rows = 1 if self.shared_masks else self.in_channels
        if mask is None:
            if size is None or self.noise is None or self.level == 0:
                return None
            return torch.empty((rows, self.masks, *size), dtype=torch.float32, device="meta")
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask is {type(mask).__name__}, it should be a tensor [C or 1, M, H, W] or None")
        if not mask.is_floating_point():
            raise TypeError(f"mask has type {mask.dtype}, it should be a floating-point type")
        if self.seed is not None:
            raise ValueError("mask and seed are both given, it should be one of them: a given mask needs no seed")
        if self.noise is None:
            raise ValueError("mask is given, it should be None where noise is None (no perturbation)")
        if mask.dim() != 4 or mask.shape[1] != self.masks or mask.shape[0] not in (1, rows):
            raise ValueError(
                f"mask has size {list(mask.shape)}, it should be [{rows}{'' if rows == 1 else ' or 1'}, {self.masks}, "
                f"H, W] for in_channels = {self.in_channels}, masks = {self.masks}, shared_masks = {self.shared_masks}"
            )
        self.shared_masks = mask.shape[0] == 1
        return mask.detach()

    def reset_parameters(self) -> None:
        """Draws the weight anew, sets the bias to 0, restores the given seed or draws one, and resets the norm.

        Needed after `to_empty`. A mask that was given as a tensor stays as it is.
        """
        if self.norm is not None:
            self.norm.reset_parameters()
            moment = 1.0
        else:
            moment = self._second_moment()
        initialisation.initialise_(self.weight, moment)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        with torch.no_grad():
            self.mask_version.fill_(MASK_VERSION)
        if self.weight.is_meta:
            return
        # Drawn in any case, so that a given seed or mask changes the masks and nothing else that is drawn.
        drawn = _draw_seed()
        if self.mask_seed is not None:
            with torch.no_grad():
                self.mask_seed.copy_(drawn)
            self._known_seed = None
            if self.seed is not None:
                self._write_seed(self.seed)
            self._settle_seed()
            self._write_mask()

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> "PerturbConv2d":
        """What `to`, `half`, `to_empty` and the like come down to; off the meta device, fixed values are made again.

        `to_empty` leaves memory as it is. A weight that nobody set shows; a seed that is whatever lay there does not,
        and `torch.nn.utils.skip_init` is made for callers who set the weight alone.
        """
        was_meta = self.mask_version.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.mask_version.is_meta:
            self._restore_masks()
        return self

    def _restore_masks(self) -> None:
        """Writes the generator's version, the given seed or one drawn now, and the masks of it where they are held."""
        with torch.no_grad():
            self.mask_version.fill_(MASK_VERSION)
            if self.mask_seed is not None and self.seed is None:
                self.mask_seed.copy_(_draw_seed())
        if self.mask_seed is not None:
            if self.seed is not None:
                self._write_seed(self.seed)
            self._write_mask()
        elif self.mask is not None:
            warnings.warn(
                "torch_pnn: a layer's mask was given as a tensor and lost its values on the meta device: load a "
                "state_dict, or copy the values into layer.mask",
                RuntimeWarning,
                stacklevel=4,
            )

    def reseed(self, seed: int) -> None:
        """Gives the layer other masks: those of this seed.

        Args:
            seed: an int in [-2**63, 2**64).

        Raises:
            TypeError: the seed is no int.
            ValueError: it is out of range, or the layer's masks were given as a tensor.

        Example:
            >>> layer = PerturbConv2d(3, 8, 3, padding=1)
            >>> layer.reseed(2**64 - 1)
            >>> layer.mask_seed
            tensor([-1])
        """
        if self.mask_seed is None:
            raise ValueError(f"seed is {seed!r}, but this layer's masks were given as a tensor: set `mask` instead")
        if seed is None:
            raise TypeError("seed is None, it should be an int in [-2**63, 2**64)")
        self.seed = _optional_seed(seed)
        self._write_seed(seed)
        self._write_mask()

    def _write_seed(self, seed: int) -> None:
        assert self.mask_seed is not None
        self._known_seed = seed - 2**64 if seed >= 2**63 else seed
        with torch.no_grad():
            self.mask_seed.fill_(self._known_seed)

    def _settle_seed(self) -> None:
        """Takes note of the seed, or undoes what averaging did to it.

        Averages of models (``torch.optim.swa_utils.AveragedModel(..., use_buffers=True)`` and the like) run over
        integer buffers too, in float32: of a seed they leave 24 bits, which is another seed, with other masks. Averaged
        values are recognised by being float32 numbers near the known one; any other value was meant.
        """
        seed = self.mask_seed
        if type(seed) is not Tensor or seed.is_meta or seed.numel() != 1 or _get_current_dispatch_mode() is not None:
            return  # nothing to read, or nothing that may be read: a fake tensor, a mode that makes others so
        found, known = int(seed), self._known_seed
        # Rounding adds up from step to step until the model's own value pulls it back: some 2^-24/(1 - decay) in all.
        if known is not None and 0 < abs(found - known) <= 1 + (abs(known) >> 7) and _is_float32(found):
            warnings.warn(
                f"torch_pnn: mask_seed was {known} and is {found}, as an average of equal integers comes out in "
                "float32: it is set back, since the masks would be others. To change a layer's seed call its reseed()",
                RuntimeWarning,
                stacklevel=3,
            )
            with torch.no_grad():
                seed.fill_(known)
        else:
            self._known_seed = found

    def train(self, mode: bool = True) -> "PerturbConv2d":
        """As of every module; a seed that was averaged is set back first."""
        self._settle_seed()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take: with the seed noted, so that a copy knows which one it was."""
        self._settle_seed()
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled layer, older ones too."""
        super().__setstate__(state)
        self.__dict__.setdefault("_known_seed", None)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Saves parameters and buffers; a seed that was averaged is set back first."""
        self._settle_seed()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _write_mask(self) -> None:
        """Writes the seed's masks into the tensor that holds them, where one does."""
        if self.mask is None or self.mask_seed is None or self.mask.is_meta or self.noise is None:
            return
        height, width = self.mask.shape[2:]
        with torch.no_grad():
            values = functional.perturbation_mask(
                self.mask_seed,
                self.in_channels,
                self.masks,
                height,
                width,
                shared_masks=self.shared_masks,
                noise=self.noise,
            )
            self.mask.copy_(values)

    def _second_moment(self) -> float:
        """E[a^2] of the maps for an input of unit scale. A control takes that of the layer it is the control of."""
        if self.mask is not None and self.mask_seed is None and not self.mask.is_meta and self.mask.numel() > 0:
            values = self.mask.detach().double()
            return initialisation.second_moment(
                self.activation, self.level, "tensor", float(values.mean()), float(values.std(correction=0))
            )
        level = self.level if self.level != 0 else _DEFAULT_LEVEL
        return initialisation.second_moment(self.activation, level, self.noise or "uniform")

    def perturbation(self, height: int, width: int) -> Tensor | None:
        """The masks N that an image of the padded grid's size meets, without the level.

        Args:
            height: rows of the padded grid.
            width: its columns.

        Returns:
            [C or 1, M, height, width] in float32 (a held mask in its own type), or None without perturbation.

        Raises:
            ValueError: the layer holds masks of another size.

        Example:
            >>> PerturbConv2d(3, 8, 3, padding=1, masks=2).perturbation(5, 6).shape
            torch.Size([3, 2, 5, 6])
        """
        if self.noise is None or self.level == 0:
            return None
        if self.mask is not None:
            if tuple(self.mask.shape[2:]) != (height, width):
                raise ValueError(
                    f"size is {height}x{width}, it should be the held masks' {self.mask.shape[2]}x{self.mask.shape[3]}"
                )
            return self.mask
        return functional.perturbation_mask(
            self.mask_seed,
            self.in_channels,
            self.masks,
            height,
            width,
            shared_masks=self.shared_masks,
            noise=self.noise,
        )

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds of the 1x1 product for one image, at every pixel that is computed (before any pooling).

        Args:
            height: the image's rows.
            width: its columns.

        Example:
            >>> PerturbConv2d(3, 8, 3, padding=1, masks=2).multiply_adds(10, 10)
            4800
        """
        left, right, top, bottom = self._pads
        rows, columns = height + top + bottom, width + left + right
        if self.downsample == "subsample":
            rows, columns = -(-rows // self.stride[0]), -(-columns // self.stride[1])
        return max(rows, 0) * max(columns, 0) * self.weight.numel()

    @property
    def mask_bytes(self) -> int:
        """Bytes of fixed masks that the layer stores: 8 for a seed, 0 without perturbation or for trained masks.

        Example:
            >>> PerturbConv2d(3, 8, 3).mask_bytes, PerturbConv2d(3, 8, 3, mask_size=(4, 4)).mask_bytes
            (8, 192)
        """
        if self.noise is None or self.level == 0 or self.train_masks or isinstance(self.mask, nn.Parameter):
            return 0
        return 8 if self.mask is None else self.mask.numel() * self.mask.element_size()

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output; see the class for shapes."""
        if not torch.jit.is_scripting():
            if isinstance(input, fx.Proxy):
                return _traced_as_leaf(self, input)
            if type(input) is not Tensor or input.is_nested:
                functional.check_is_dense_tensor("input", input)
            if torch.jit.is_tracing():
                with _silent_tracer():
                    return self._checked_forward(input)
        return self._checked_forward(input)

    def _checked_forward(self, input: Tensor) -> Tensor:
        """Checks sizes, pads, runs the operator and pools."""
        size = input.shape
        if len(size) != 3 and len(size) != 4:
            raise ValueError(
                f"input has size {list(size)}, it should be [B, {self.in_channels}, H, W] or [{self.in_channels}, H, W]"
            )
        if size[-3] != self.in_channels:
            raise ValueError(f"input has size {list(size)}, it should have {self.in_channels} channels (in_channels)")
        grid = input
        left, right, top, bottom = self._pads
        height, width = size[-2] + top + bottom, size[-1] + left + right
        if left != 0 or right != 0 or top != 0 or bottom != 0:
            if height < 1 or width < 1:
                raise ValueError(
                    f"input has size {list(size)}, with kernel_size {self.kernel_size}, padding {self.padding} "
                    f"and dilation {self.dilation} its output would be {height}x{width}, it should be larger"
                )
            grid = _pad(input, self._pads, self.padding_mode)
        if torch.jit.is_scripting():
            weight, bias, stored, computed = self.weight, self.bias, self.mask, self.mask_seed
        else:
            weight, bias, stored, computed = self._tensors()
        mask: Tensor | None = None
        seed: Tensor | None = None
        noise: str | None = self.noise
        if self.level == 0.0:
            noise = None
        if noise is not None:
            mask = stored
            if mask is None:
                seed = computed
            elif mask.shape[2] != height or mask.shape[3] != width:
                raise ValueError(
                    f"input has size {list(size)}, which is {height}x{width} with its padding, it should be "
                    f"{mask.shape[2]}x{mask.shape[3]} with it: the layer's masks have that one size"
                )
        stride = (1, 1)
        if self.downsample == "subsample":
            stride = self.stride
        if self.norm is None:
            output = functional.perturb_conv2d(
                grid,
                weight,
                bias,
                mask=mask,
                seed=seed,
                masks=self.masks,
                shared_masks=self.shared_masks,
                noise=noise,
                level=self.level,
                activation=self.activation,
                stride=stride,
                groups=self.groups,
            )
        else:
            output = self._normalised(grid, weight, bias, mask, seed, noise, stride)
        if (self.stride[0] == 1 and self.stride[1] == 1) or self.downsample == "subsample":
            return output
        return _pool(output, self.stride, self.downsample)

    def _tensors(self) -> tuple[Any, Any, Any, Any]:
        """`weight`, `bias`, `mask` and `mask_seed`, or what parametrizations compute in their place.

        `nn.Module` looks into its dictionaries where Python has looked for an attribute in vain: four of those took a
        sixth of a small call.
        """
        parameters, buffers = self._parameters, self._buffers
        try:
            return parameters["weight"], parameters["bias"], buffers["mask"], buffers["mask_seed"]
        except KeyError:
            return self.weight, self.bias, self.mask, self.mask_seed

    def _normalised(
        self,
        grid: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        seed: Tensor | None,
        noise: str | None,
        stride: tuple[int, int],
    ) -> Tensor:
        """The layer with its normalisation: inside the operator, or by calling `self.norm` where that is not plain."""
        if torch.jit.is_scripting():
            if self._fuses_norm_in_script:
                return self._fused(grid, weight, bias, mask, seed, noise, stride)
            else:
                return self._unfused(grid, weight, bias, mask, seed, noise, stride)
        elif self._norm_is_plain():
            return self._fused(grid, weight, bias, mask, seed, noise, stride)
        else:
            return self._unfused(grid, weight, bias, mask, seed, noise, stride)

    def _norm_is_plain(self) -> bool:
        """Whether the norm is an `nn.BatchNorm2d` and nothing but that, so that the operator may stand in for it."""
        norm = self.norm
        return type(norm) is nn.BatchNorm2d and not (
            norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
        )

    def __prepare_scriptable__(self) -> "PerturbConv2d":
        """Called by ``torch.jit.script``, which can't ask for a module's class itself."""
        self._fuses_norm_in_script = self._norm_is_plain()
        return self

    def _fused(
        self,
        grid: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        seed: Tensor | None,
        noise: str | None,
        stride: tuple[int, int],
    ) -> Tensor:
        """Does what `nn.BatchNorm2d.forward` does to the maps and to its own statistics, in one operator."""
        assert self.norm is not None
        tracked = self.norm.num_batches_tracked
        updates = self.norm.training and self.norm.track_running_stats
        momentum = 0.0
        if self.norm.momentum is not None:
            momentum = self.norm.momentum
        elif updates and tracked is not None:
            momentum = 1.0 / (float(tracked) + 1.0)
        running_mean: Tensor | None = self.norm.running_mean
        running_var: Tensor | None = self.norm.running_var
        training = self.norm.training or (running_mean is None and running_var is None)
        if self.norm.training and not self.norm.track_running_stats:
            running_mean = None
            running_var = None
        output = functional.perturb_norm_conv2d(
            grid,
            weight,
            bias,
            self.norm.weight,
            self.norm.bias,
            running_mean,
            running_var,
            training=training,
            momentum=momentum,
            eps=self.norm.eps,
            mask=mask,
            seed=seed,
            masks=self.masks,
            shared_masks=self.shared_masks,
            noise=noise,
            level=self.level,
            activation=self.activation,
            stride=stride,
            groups=self.groups,
        )
        if updates and tracked is not None:
            tracked.add_(1)
        return output

    def _unfused(
        self,
        grid: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        seed: Tensor | None,
        noise: str | None,
        stride: tuple[int, int],
    ) -> Tensor:
        """Forms all response maps, calls `self.norm` on them and mixes them."""
        assert self.norm is not None
        image = grid.dim() == 3
        if image:
            grid = grid.unsqueeze(0)
        height, width = grid.shape[-2], grid.shape[-1]
        if seed is not None and noise is not None:
            mask = functional.perturbation_mask(
                seed, self.in_channels, self.masks, height, width, shared_masks=self.shared_masks, noise=noise
            )
        u = grid.unsqueeze(2)
        if mask is not None:
            wide = mask.to(torch.float64) if grid.dtype == torch.float64 else mask.to(torch.float32)
            u = (u + self.level * wide).to(grid.dtype)
        u = u.expand(grid.shape[0], self.in_channels, self.masks, height, width)
        if stride[0] != 1 or stride[1] != 1:
            u = u[:, :, :, :: stride[0], :: stride[1]]
        maps = self.norm(_activate(u.flatten(1, 2), self.activation))
        output = F.conv2d(maps, weight, bias, groups=self.groups)
        return output.squeeze(0) if image else output

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuses masks of another generator and seeds that are none; of such a layer nothing is loaded."""
        refusal = None
        version = state_dict.get(prefix + "mask_version")
        if isinstance(version, Tensor) and not version.is_meta:
            if version.numel() != 1 or int(version) != MASK_VERSION:
                refusal = (
                    f"{prefix}mask_version is {version.tolist()}, it should be [{MASK_VERSION}]: the masks were made "
                    "by a generator that this version of torch_pnn doesn't have"
                )
        seed = state_dict.get(prefix + "mask_seed")
        if self.mask_seed is not None and isinstance(seed, Tensor):
            if seed.dtype != torch.int64 or seed.numel() != 1:
                refusal = f"{prefix}mask_seed has type {seed.dtype} and size {list(seed.shape)}, it should be one int64"
        if refusal is not None:
            error_msgs.append(refusal)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._known_seed = None
        self._settle_seed()

    def extra_repr(self) -> str:
        """The arguments that are not defaults, as `nn.Conv2d` shows them."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        if self.padding != (0, 0):
            parts.append(f"padding={self.padding!r}")
        if self.dilation != (1, 1):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode!r}")
        parts.append(f"masks={self.masks}, level={self.level:g}, noise={self.noise!r}, activation={self.activation!r}")
        if self.seed is not None:
            parts.append(f"seed={self.seed}")
        if self.shared_masks:
            parts.append("shared_masks=True")
        if self.mask is not None:
            parts.append(f"mask_size={tuple(self.mask.shape[2:])}")
        if self.train_masks:
            parts.append("train_masks=True")
        if self.stride != (1, 1):
            parts.append(f"downsample={self.downsample!r}")
        return ", ".join(parts)


class LBConv2d(nn.Module):
    """The local binary convolution layer: fixed sparse ternary filters, an activation, a learnable 1x1.

    y = bias + weight * activation(conv2d(x, anchors)). The filters ("anchors") hold 0, 1 and -1; an exact share
    `sparsity` of all their entries is 0, drawn without replacement, the others are 1 or -1 with equal chance. They are
    saved with the layer and not trained. (Juefei-Xu, Boddeti, Savvides, "Local Binary Convolutional Neural Networks",
    CVPR 2017.)

    Args:
        in_channels: C.
        out_channels: T.
        kernel_size: an int or a pair (rows, columns), as for all sizes here.
        stride: of the filters.
        padding: as `nn.Conv2d`: numbers, "same" or "valid".
        dilation: of the filters.
        bias: whether the 1x1 has a bias.
        anchors: the number of fixed filters; `out_channels` by default.
        sparsity: the share of zeros among the filters' entries, from 0 to 1.
        activation: as `PerturbConv2d`.
        seed: of the filters, an int in [-2**63, 2**64); None draws them from PyTorch's default generator.
        device: where parameters are made.
        dtype: of the parameters.

    Shape:
        Input [B, C, H, W] or [C, H, W]; output [B, T, H', W'] or [T, H', W'] as `nn.Conv2d`.

    Attributes:
        weight: [T, anchors, 1, 1].
        bias: [T], or None.
        anchor_weight: a buffer [anchors, C, rows, columns]: the filters.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument is out of its range, or arguments contradict each other.

    Example:
        >>> layer = LBConv2d(3, 8, sparsity=0.5, seed=0)
        >>> layer(torch.zeros(1, 3, 32, 32)).shape, float((layer.anchor_weight == 0).float().mean())
        (torch.Size([1, 8, 32, 32]), 0.5)
    """

    __constants__ = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "anchors",
        "activation",
    )
    __jit_ignored_attributes__ = ("seed",)
    __jit_unused_properties__ = ("mask_bytes",)

    bias: Tensor | None
    anchor_weight: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 1,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        *,
        anchors: int | None = None,
        sparsity: float = 0.5,
        activation: str = "relu",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = _count("in_channels", in_channels, 0)
        self.out_channels = _count("out_channels", out_channels, 0)
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.padding = _padding(padding, self.stride)
        if not isinstance(self.padding, str) and min(self.padding) < 0:
            raise ValueError(f"padding is {padding!r}, it should not be negative")
        self.dilation = _pair("dilation", dilation, 1)
        self.groups = 1
        self.padding_mode = "zeros"
        self.transposed = False
        self.output_padding = (0, 0)
        self.anchors = _count("anchors", out_channels if anchors is None else anchors, 0)
        self.sparsity = _number("sparsity", sparsity)
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity is {sparsity}, it should be from 0 to 1")
        self.activation = _choice("activation", activation, ACTIVATIONS)
        self.seed = _optional_seed(seed)
        _flag("bias", bias)
        _check_dtype(dtype)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty((out_channels, self.anchors, 1, 1), **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **factory)) if bias else None)
        self.register_buffer("anchor_weight", torch.empty((self.anchors, in_channels, *self.kernel_size), **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the 1x1 weight and, with the given seed or anew, the filters; sets the bias to 0.

        Needed after `to_empty`.
        """
        taps = self.in_channels * self.kernel_size[0] * self.kernel_size[1]
        # Of x ~ N(0, 1) a filter's response has the variance that is the number of its non-zero entries.
        spread = math.sqrt(max(taps * (1 - self.sparsity), 1.0))
        moment = initialisation.second_moment(self.activation, 1.0, "tensor", 0.0, math.sqrt(spread**2 - 1))
        initialisation.initialise_(self.weight, moment)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if not self.anchor_weight.is_meta:
            self._draw_anchors()

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> "LBConv2d":
        """Draws the filters when the layer leaves the meta device, as `PerturbConv2d` does its masks."""
        was_meta = self.anchor_weight.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.anchor_weight.is_meta:
            self._draw_anchors()
        return self

    def reseed(self, seed: int) -> None:
        """Gives the layer other filters: those of this seed.

        Args:
            seed: an int in [-2**63, 2**64).

        Raises:
            TypeError: the seed is no int.
            ValueError: it is out of range.
        """
        if seed is None:
            raise TypeError("seed is None, it should be an int in [-2**63, 2**64)")
        self.seed = _optional_seed(seed)
        if not self.anchor_weight.is_meta:
            self._draw_anchors()

    def _draw_anchors(self) -> None:
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        entries = self.anchor_weight.numel()
        order = torch.randperm(entries, generator=generator, device="cpu")
        signs = torch.randint(0, 2, (entries,), generator=generator, device="cpu") * 2 - 1
        signs[order[: round(self.sparsity * entries)]] = 0
        with torch.no_grad():
            self.anchor_weight.copy_(signs.reshape(self.anchor_weight.shape))

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds for one image, of the fixed filters (as dense ones) and of the 1x1 product.

        Args:
            height: the image's rows.
            width: its columns.

        Example:
            >>> LBConv2d(3, 8, anchors=4).multiply_adds(10, 10)
            14000
        """
        sizes = []
        for axis, size in enumerate((height, width)):
            extent = self.dilation[axis] * (self.kernel_size[axis] - 1)
            if self.padding == "same":
                sizes.append(size)
                continue
            padding = 0 if isinstance(self.padding, str) else self.padding[axis]
            sizes.append(max((size + 2 * padding - extent - 1) // self.stride[axis] + 1, 0))
        return sizes[0] * sizes[1] * (self.anchor_weight.numel() + self.weight.numel())

    @property
    def mask_bytes(self) -> int:
        """Bytes of fixed filters that the layer stores."""
        return self.anchor_weight.numel() * self.anchor_weight.element_size()

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output; see the class for shapes."""
        if not torch.jit.is_scripting():
            if isinstance(input, fx.Proxy):
                return _traced_as_leaf(self, input)
            _check_convolved("input", input, self.weight)
            if torch.jit.is_tracing():
                with _silent_tracer():
                    return self._checked_forward(input)
        return self._checked_forward(input)

    def _checked_forward(self, input: Tensor) -> Tensor:
        """Checks the size and convolves twice."""
        if (input.dim() != 3 and input.dim() != 4) or input.shape[-3] != self.in_channels:
            raise ValueError(
                f"input has size {list(input.shape)}, it should be [B, {self.in_channels}, H, W] or "
                f"[{self.in_channels}, H, W]"
            )
        # 0, 1 and -1 are exact in every type; FSDP2's mixed precision casts the input and parameters, but no buffers.
        anchors = self.anchor_weight.to(input.dtype)
        responses = F.conv2d(input, anchors, None, self.stride, self.padding, self.dilation)
        return F.conv2d(_activate(responses, self.activation), self.weight, self.bias)

    def extra_repr(self) -> str:
        """The arguments that are not defaults, as `nn.Conv2d` shows them."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        parts.append(f"padding={self.padding!r}")
        if self.dilation != (1, 1):
            parts.append(f"dilation={self.dilation}")
        if self.bias is None:
            parts.append("bias=False")
        parts.append(f"anchors={self.anchors}, sparsity={self.sparsity:g}, activation={self.activation!r}")
        if self.seed is not None:
            parts.append(f"seed={self.seed}")
        return ", ".join(parts)
