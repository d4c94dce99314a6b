"""The way back from `torch_pnn.convert`: convolutions in the places of the layers that it made."""

from __future__ import annotations

import copy
import warnings

from torch import nn

from .conversion.record import RECORD, Conversion
from .conversion.swap import Original, carry_back, original_of, swap
from .convert import check_model
from .modules import PerturbConv2d
from .presets import PerturbMixConv2d

__all__ = ["restore"]


def restore(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Undoes `convert`: the convolutions are back at their places.

    What their weights are depends on how the model was converted. With `convert(keep_original=True)` each layer holds
    the very convolution that it replaced, and that one returns, with the weights of the time of conversion: nothing
    trains them meanwhile. By default `convert` notes only kind and sizes, since what a perturbation layer saves in
    parameters would else be held, copied and pickled all the same; the restored convolutions then have fresh weights
    from PyTorch's default generator, and a warning says so. A state_dict of the unconverted model loads in both cases.

    Device, data type, train/eval mode and `requires_grad` are those that the layer has now; hooks move back, also those
    that were registered after the conversion, and their handles stay good. A layer used in several places becomes one
    convolution in all of them. What the layer has learnt is dropped with it. Layers that `convert` didn't make stay.

    Where the originals live in between: in the layer, but not among its children. So copies, pickles and
    `torch.save(model)` have them; `parameters()`, `state_dict()`, `to()`, an optimizer and DistributedDataParallel
    don't see them. Only `restore` moves them to the device where the layer is then. FSDP doesn't shard them: restore
    before wrapping.

    Args:
        model: A converted model, a part of one, or a model with converted parts.
        inplace: Change `model`; else a deep copy is made and changed. Where the model itself was converted, the
            convolution is returned in both cases.

    Returns:
        The model with its convolutions, without the attribute `conversion`.

    Raises:
        TypeError: `model` isn't an `nn.Module` or is a scripted one, or `inplace` isn't a bool.
        ValueError: `convert` made no layer of this model, or `torch_pnn.fuse` folded a normalisation into one since.
        RuntimeError: The model can't be copied (use `inplace=True`).

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import torch_pnn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3))
        >>> pnn = torch_pnn.convert(net, keep_original=True)
        >>> back = restore(pnn)
        >>> type(pnn[2]).__name__, type(back[2]).__name__, torch.equal(back[2].weight, net[2].weight)
        ('PerturbConv2d', 'Conv2d', True)
    """
    check_model(model)
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace is {inplace!r}, should be True or False")
    if not _converted(model) and not any(_has_record(module) for module in model.modules()):
        raise ValueError("model has no layer that torch_pnn.convert made, so there is nothing to restore")
    if fused := _fused(model):
        raise ValueError(
            f"{', '.join(fused)}: torch_pnn.fuse folded the normalisation behind this layer into it, and a convolution "
            "in its place would lack it; restore first, then fuse"
        )
    if not inplace:
        try:
            model = copy.deepcopy(model)
        except Exception as error:
            raise RuntimeError(
                f"model can't be copied ({type(error).__name__}: {error}); inplace=True restores it without a copy"
            ) from error
    for module in model.modules():
        if _has_record(module):
            delattr(module, RECORD)
    layers = _converted(model)
    plan = {layer: carry_back(layer, original) for layer, original in layers.items()}
    fresh = sum(not original.kept for original in layers.values())
    if fresh:
        warnings.warn(
            f"{fresh} of {len(layers)} restored convolutions have fresh weights: convert keeps the original ones only "
            "with keep_original=True",
            stacklevel=2,
        )
    return swap(model, plan)


def _converted(model: nn.Module) -> dict[nn.Module, Original]:
    """The layers that `convert` made, with what they stand for."""
    return {module: original for module in model.modules() if (original := original_of(module)) is not None}


def _fused(model: nn.Module) -> list[str]:
    """Names of layers that were converted, by the tables, and don't know any more what they stand for."""
    names = []
    for prefix, owner in model.named_modules():
        if not _has_record(owner):
            continue
        inside = dict(owner.named_modules(remove_duplicate=False))
        for row in owner.__dict__[RECORD].converted:
            layer = inside.get(row.name)
            if isinstance(layer, (PerturbConv2d, PerturbMixConv2d)) and original_of(layer) is None:
                names.append(f"{prefix}.{row.name}" if prefix else row.name or "the model")
    return names


def _has_record(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get(RECORD), Conversion)
