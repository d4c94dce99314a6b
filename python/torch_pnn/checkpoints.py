"""Loading what the published PNN code saved.

Two families of modules were published, and their files differ in what matters most, the masks:

- `NoiseLayer` (github.com/juefeix/pnn.pytorch): `layers.1` is the BatchNorm2d, `layers.2` the 1x1. The mask, [C, H, W]
  with the level already in it, is drawn at the first forward and, on a GPU, belongs to no parameter or buffer: a
  `state_dict` of that code does **not** hold it. Such a file is not the network that was trained. It loads here only
  together with the masks (from the process that trained it), or, on request, with new ones to be trained further.
- `PerturbLayer` (github.com/michaelklachko/pnn.pytorch and juefeix/pnn.pytorch.update): `noise` [1, C or 1, M, H, W] is
  a parameter, without the level, so its files hold the masks; the level stands only in the training command.

`adopt` replaces such modules inside a model built with the published code; `load_noise_resnet` needs none of that
code and makes one of our networks from a file of its residual networks. `read` opens files safely.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from . import models
from .convert import _check_seed, layer_seed
from .modules import PerturbConv2d

__all__ = ["MissingMasksError", "adopt", "load_noise_resnet", "noise_layers", "read"]

_ACTIVATIONS: Mapping[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.Identity: "identity",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}
_DEPTHS: Mapping[tuple[bool, tuple[int, ...]], Callable[..., models.ResNet]] = {
    (False, (2, 2, 2, 2)): models.noise_resnet18,
    (False, (3, 4, 6, 3)): models.noise_resnet34,
    (True, (3, 4, 6, 3)): models.noise_resnet50,
    (True, (3, 4, 23, 3)): models.noise_resnet101,
    (True, (3, 8, 36, 3)): models.noise_resnet152,
}


class MissingMasksError(ValueError):
    """The checkpoint doesn't hold its perturbation masks, and none were given."""


def read(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Reads a checkpoint's tensors, running none of the code that a pickle may carry.

    Entries called `state_dict`, `model` or `net` are looked into, and the prefix `module.` of DataParallel is dropped.

    Args:
        path: A file of `torch.save`.

    Returns:
        Names and tensors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds a whole pickled model, or no tensors by name.

    Examples:
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model_epoch_1.pth")
        ...     torch.save({"state_dict": {"module.linear.bias": torch.zeros(2)}}, path)
        ...     read(path)
        {'linear.bias': tensor([0., 0.])}
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{os.fspath(path)} can't be read as a file of tensors ({type(error).__name__}). Where it holds a whole "
            "pickled model (the code of 2018 saved those too), load it once with the code that wrote it and save its "
            "state_dict()"
        ) from error
    return _state_dict(content, os.fspath(path))


def noise_layers(checkpoint: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the `NoiseLayer` modules that a state dict of the published code belongs to.

    Args:
        checkpoint: Names and tensors.

    Returns:
        Names such as "layer1.0.layers.0", in the state dict's order.

    Examples:
        >>> layer = {"layers.1.running_mean": torch.zeros(4), "layers.2.weight": torch.zeros(8, 4, 1, 1)}
        >>> noise_layers({f"block.{name}": tensor for name, tensor in layer.items()})
        ('block',)
    """
    state = _state_dict(checkpoint, "checkpoint")
    found = []
    for key, weight in state.items():
        if not key.endswith("layers.2.weight") or weight.dim() != 4 or weight.shape[2:] != (1, 1):
            continue
        name = key[: -len("layers.2.weight")]
        mean = state.get(f"{name}layers.1.running_mean")
        if mean is not None and mean.numel() == weight.shape[1] and f"{name}layers.0.weight" not in state:
            found.append(name.rstrip("."))
    return tuple(found)


def adopt(
    model: nn.Module,
    *,
    noise: Mapping[str, torch.Tensor] | None = None,
    new_masks_seed: int | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Replaces the published code's perturbation modules in a model by ours; weights, statistics and masks are kept.

    `NoiseLayer` becomes a `PerturbConv2d`, `PerturbLayer` a sequence that begins with one. They are recognised by their
    class's name and their children, so that the published code is neither needed nor imported here. The model then
    computes what it computed before, with masks that are saved.

    Args:
        model: A model of the published code.
        noise: For `NoiseLayer` modules without a mask: each one's by its name, [C, H, W], the level included.
        new_masks_seed: Where masks are missing, draw new ones by seed (at the module's level) instead of refusing. The
            result is another network, to be trained further.
        inplace: Change `model`; else a deep copy.

    Returns:
        The model.

    Raises:
        TypeError: `model` isn't an `nn.Module`, or `new_masks_seed` isn't an int.
        ValueError: There is nothing to replace, a mask's shape doesn't fit, or a module is of a form that has no
            counterpart here (the message names it).
        MissingMasksError: Masks are missing and neither `noise` nor `new_masks_seed` is given.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}, should be an nn.Module")
    if new_masks_seed is not None:
        _check_seed(new_masks_seed)
    noise = dict(noise or {})
    if not inplace:
        model = copy.deepcopy(model)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__ in ("NoiseLayer", "PerturbLayer", "PerturbLayerFirst")
        and isinstance(getattr(module, "noise", None), torch.Tensor)
    ]
    if not found:
        raise ValueError("model has no NoiseLayer or PerturbLayer with a mask: there is nothing to adopt")
    missing = [
        name
        for name, module in found
        if type(module).__name__ == "NoiseLayer" and module.noise.numel() == 0 and name not in noise
    ]
    if missing and new_masks_seed is None:
        raise MissingMasksError(_missing_message("model", missing))
    plan: dict[str, nn.Module] = {}
    for name, module in found:
        if type(module).__name__ == "NoiseLayer":
            mask = noise.get(name, module.noise)
            seed = None if new_masks_seed is None else layer_seed(new_masks_seed, name)
            plan[name] = _from_noise_layer(name, module, mask, seed)
        else:
            plan[name] = _from_perturb_layer(name, module)
    for name, new in plan.items():
        if name == "":
            return new
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = new
    return model


def load_noise_resnet(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    noise: Mapping[str, torch.Tensor] | None = None,
    new_masks_seed: int | None = None,
) -> models.ResNet:
    """Makes the network of a published residual network's checkpoint, without the published code.

    Depth, width, stem, channels and classes are read off the tensors. The layers' biases, which our blocks don't have,
    go into the running mean of the normalisation that follows; that changes nothing but the last digits.

    Args:
        checkpoint: A file of the published code (see `read`) or its state dict.
        noise: The masks that the checkpoint lacks, by the layers' names ("layer1.0.layers.0"), each [C, H, W] with the
            level in it.
        new_masks_seed: Where masks are missing, draw new ones by seed at level 0.1 instead of refusing. The result is
            another network, to be trained further.

    Returns:
        The network, in training mode.

    Raises:
        MissingMasksError: Masks are missing and neither `noise` nor `new_masks_seed` is given.
        ValueError: The checkpoint isn't one of the published residual networks, or lacks a tensor, or has one too many.
        FileNotFoundError: There is no such file.
        TypeError: `new_masks_seed` isn't an int.
    """
    if isinstance(checkpoint, (str, os.PathLike)):
        what, state = os.fspath(checkpoint), read(checkpoint)
    else:
        what, state = "checkpoint", _state_dict(checkpoint, "checkpoint")
    if new_masks_seed is not None:
        _check_seed(new_masks_seed)
    stem, classifier = state.get("pre_layers.0.weight"), state.get("linear.weight")
    if stem is None or classifier is None or stem.dim() != 4 or stem.shape[2] not in (3, 7):
        raise ValueError(
            f"{what} isn't one of the published residual networks: they have pre_layers.0.weight [width, C, 7, 7] (or "
            "3, 3) and linear.weight"
        )
    depths = tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")}) for stage in (1, 2, 3, 4)
    )
    bottleneck = "layer1.0.layers.7.weight" in state
    build = _DEPTHS.get((bottleneck, depths))
    if build is None:
        raise ValueError(
            f"{what} has stages of {depths} blocks ({'bottleneck' if bottleneck else 'basic'}), which is none of the "
            "published depths 18, 34, 50, 101 and 152"
        )
    names = noise_layers(state)
    masks = dict(noise or {})
    for name in names:
        held = state.pop(f"{name}.noise", None)
        if name not in masks and held is not None and held.numel():
            masks[name] = held
    missing = [name for name in names if name not in masks]
    if missing and new_masks_seed is None:
        raise MissingMasksError(_missing_message(what, missing))

    model = build(
        classifier.shape[0],
        in_channels=stem.shape[1],
        width=stem.shape[0],
        stem="imagenet" if stem.shape[2] == 7 else "cifar",
        layer="perturb",
        preset="juefeix2018",
        seed=new_masks_seed,
    )
    _fill(model, state, bottleneck, what)
    for name in names:
        if name in masks:
            target = _our_name(name, bottleneck)
            parent, _, child = target.rpartition(".")
            old: Any = model.get_submodule(target)
            setattr(
                model.get_submodule(parent), child, _with_mask(old, _noise_mask(name, masks[name], old.in_channels))
            )
    return model


_PLACES = {
    False: {"0": "layer1", "2": "norm1", "4": "layer2", "5": "norm2"},
    True: {"0": "reduce", "1": "norm1", "3": "layer", "5": "norm2", "7": "expand", "8": "norm3"},
}
_TOP = {"pre_layers": "stem", "linear": "classifier"}
_INNER = {"layers.1": "norm", "layers.2": ""}


def _our_name(name: str, bottleneck: bool) -> str:
    """The name that a published module or tensor has in our networks; "" where there is none."""
    parts = name.split(".")
    if parts[0] in _TOP:
        return ".".join([_TOP[parts[0]], *parts[1:]])
    if len(parts) < 4 or parts[2] != "layers":
        return name
    place = _PLACES[bottleneck].get(parts[3])
    if place is None:
        return ""
    rest = parts[4:]
    if rest[:1] == ["layers"]:
        inner = _INNER.get(".".join(rest[:2]))
        if inner is None:
            return ""
        rest = [*([inner] if inner else []), *rest[2:]]
    return ".".join([*parts[:2], place, *rest])


def _fill(model: models.ResNet, state: Mapping[str, torch.Tensor], bottleneck: bool, what: str) -> None:
    """Copies the published tensors to their places; every one must have a place, and every place a tensor."""
    follower = {"layer1": "norm1", "layer2": "norm2", "layer": "norm2"}
    ours = model.state_dict(keep_vars=True)
    awaited = {name for name in ours if not name.endswith(("mask_seed", "mask_version", "num_batches_tracked"))}
    biases = []
    with torch.no_grad():
        for theirs, tensor in state.items():
            name = _our_name(theirs, bottleneck)
            layer, _, leaf = name.rpartition(".")
            if leaf == "bias" and name not in ours and f"{layer}.weight" in ours:
                block, _, place = layer.rpartition(".")
                biases.append((f"{block}.{follower[place]}.running_mean", tensor))
                continue
            if name not in ours:
                raise ValueError(f"{what} doesn't fit the published residual networks: no place for {theirs}")
            if ours[name].shape != tensor.shape:
                raise ValueError(
                    f"{what}: {theirs} has shape {tuple(tensor.shape)}, should be {tuple(ours[name].shape)}"
                )
            ours[name].copy_(tensor)
            awaited.discard(name)
        if awaited:
            lacking = {_our_name(theirs, bottleneck): theirs for theirs in _published_names(model, bottleneck)}
            name = min(awaited)
            raise ValueError(
                f"{what} doesn't fit the published residual networks: {lacking.get(name, name)} is missing"
            )
        for name, bias in biases:
            ours[name].sub_(bias)


def _published_names(model: models.ResNet, bottleneck: bool) -> Iterable[str]:
    """The published names of the model's tensors, for messages."""
    places = {ours: theirs for theirs, ours in _PLACES[bottleneck].items()}
    top = {ours: theirs for theirs, ours in _TOP.items()}
    for name in model.state_dict():
        parts = name.split(".")
        if parts[0] in top:
            yield ".".join([top[parts[0]], *parts[1:]])
        elif len(parts) > 3 and parts[2] in places:
            rest = parts[3:]
            if parts[2].startswith("layer"):
                rest = ["layers", "1", *rest[1:]] if rest[0] == "norm" else ["layers", "2", *rest]
            yield ".".join([*parts[:2], "layers", places[parts[2]], *rest])
        else:
            yield name


def _with_mask(layer: PerturbConv2d, mask: torch.Tensor) -> PerturbConv2d:
    """The layer with a given mask, the level already in it, in the place of its seed's."""
    new = PerturbConv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        bias=layer.bias is not None,
        activation=layer.activation,
        level=1.0,
        mask=mask,
        norm=layer.norm is not None,
        downsample=layer.downsample,
    )
    new.weight, new.bias, new.norm = layer.weight, layer.bias, layer.norm
    return new.train(layer.training)


def _from_noise_layer(name: str, module: Any, mask: torch.Tensor, seed: int | None) -> PerturbConv2d:
    steps = list(getattr(module, "layers", ()))
    kinds = [type(step) for step in steps]
    if kinds != [nn.ReLU, nn.BatchNorm2d, nn.Conv2d]:
        raise ValueError(
            f"{name}: a NoiseLayer of {', '.join(kind.__name__ for kind in kinds)}, should be of ReLU, BatchNorm2d and "
            "Conv2d"
        )
    _, norm, mix = steps
    options: dict[str, Any] = {"level": float(module.level), "seed": seed}
    if mask.numel():
        options = {"level": 1.0, "mask": _noise_mask(name, mask, mix.in_channels)}
    new = PerturbConv2d(
        mix.in_channels,
        mix.out_channels,
        1,
        bias=mix.bias is not None,
        device=mix.weight.device,
        dtype=mix.weight.dtype,
        norm=True,
        **options,
    )
    new.norm = norm
    _take_weights(new, mix)
    return new.train(module.training)


def _from_perturb_layer(name: str, module: Any) -> nn.Sequential:
    steps = list(module.layers)
    if not steps or type(steps[0]) is not nn.Conv2d or steps[0].kernel_size != (1, 1):
        raise ValueError(
            f"{name}: a {type(module).__name__} whose 1x1 isn't the first of its layers (it normalises before the "
            "activation) has no counterpart here; leave it as it is"
        )
    mix = steps[0]
    kind = type(module.act) if module.use_act else nn.Identity
    if kind not in _ACTIVATIONS:
        raise ValueError(
            f"{name}: its activation {kind.__name__} has no counterpart, should be one of "
            f"{', '.join(sorted(known.__name__ for known in _ACTIVATIONS))}"
        )
    masks = module.noise.shape[2] if module.noise.dim() == 5 else 0
    if masks == 0 or mix.in_channels % masks or module.noise.shape[1] not in (1, mix.in_channels // masks):
        raise ValueError(
            f"{name}: its noise has shape {tuple(module.noise.shape)}, should be [1, C or 1, M, H, W] with C*M = "
            f"{mix.in_channels}"
        )
    new = PerturbConv2d(
        mix.in_channels // masks,
        mix.out_channels,
        1,
        groups=mix.groups,
        bias=mix.bias is not None,
        device=mix.weight.device,
        dtype=mix.weight.dtype,
        masks=masks,
        shared_masks=module.noise.shape[1] == 1,
        level=float(module.level),
        activation=_ACTIVATIONS[kind],
        mask=module.noise.detach()[0].clone(),
        train_masks=bool(module.train_masks),
    )
    _take_weights(new, mix)
    rest = steps[1:] + (list(module.mix_layers) if module.mix_maps else [])
    return nn.Sequential(new, *rest).train(module.training)


def _take_weights(new: PerturbConv2d, mix: nn.Conv2d) -> None:
    with torch.no_grad():
        new.weight.copy_(mix.weight)
        new.weight.requires_grad_(mix.weight.requires_grad)
        if mix.bias is not None and new.bias is not None:
            new.bias.copy_(mix.bias)
            new.bias.requires_grad_(mix.bias.requires_grad)


def _noise_mask(name: str, noise: torch.Tensor, channels: int) -> torch.Tensor:
    """A NoiseLayer's mask, [C, H, W] (or with a leading 1), as ours, [C, 1, H, W]."""
    if noise.dim() == 4 and noise.shape[0] == 1:
        noise = noise[0]
    if noise.dim() != 3 or noise.shape[0] != channels:
        raise ValueError(f"{name}: its noise has shape {tuple(noise.shape)}, should be [{channels}, H, W]")
    return noise.detach().clone().unsqueeze(1)


def _missing_message(what: str, names: Iterable[str]) -> str:
    names = list(names)
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{what} doesn't hold the perturbation masks of {len(names)} layers ({some}). The published code draws them at "
        "the first forward and keeps them out of its state_dict, so this alone is not the network that was trained. "
        "Either give them, noise={name: tensor [C, H, W]}, taken from the process that trained it (each NoiseLayer's "
        "attribute `noise`), or give new_masks_seed=... to draw new masks and train further"
    )


def _state_dict(content: Any, what: str) -> dict[str, torch.Tensor]:
    for key in ("state_dict", "model", "net"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{what} holds no tensors by name, should be a state_dict or hold one")
    state = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    while all(name.startswith("module.") for name in state):
        state = {name[len("module.") :]: value for name, value in state.items()}
    return state
