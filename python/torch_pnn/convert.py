"""Turns a model's convolutions into perturbation layers, and says what it did.

`convert` walks a model, decides for every convolution whether it becomes a `PerturbConv2d`, builds all replacements and
only then puts them in place, so that a refused call leaves the model as it was. The decisions, each with its reason,
are kept in the model's attribute `conversion`. `torch_pnn.restore` is the way back. The parts are in `conversion/`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .conversion.record import RECORD, Conversion, ConversionRow, merged
from .conversion.rules import Predicate, convolutions, count, decide, geometry
from .conversion.swap import carry_over, remember, swap
from .conversion.trace import Trace, rehearse, trace
from .presets import build_perturbation, layer_options

__all__ = ["Conversion", "ConversionRow", "convert", "layer_seed"]

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def layer_seed(seed: int, name: str) -> int:
    """The seed of one layer of a network: stable under wrapping, and different for every name.

    It is the first 8 bytes, little-endian, of SHA-256(seed as 8 bytes, little-endian, two's complement || name in
    UTF-8), where the name has lost the prefixes that wrappers add: leading `module` (DataParallel,
    DistributedDataParallel), and `_orig_mod`, `_fsdp_wrapped_module`, `_checkpoint_wrapped_module` anywhere.

    Args:
        seed: An int in [-2**63, 2**64).
        name: The layer's qualified name in the model.

    Returns:
        An int in [0, 2**64).

    Raises:
        TypeError: `seed` is not an int (bool is not taken for one), or `name` is not a str.
        ValueError: `seed` is out of range.

    Examples:
        >>> layer_seed(0, "layer1.0.conv1") == layer_seed(0, "module._orig_mod.layer1.0.conv1")
        True
        >>> hex(layer_seed(1, "conv"))
        '0xd07e8b6a3e9d8c51'
    """
    _check_seed(seed)
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}, should be a str")
    digest = hashlib.sha256((seed % 2**64).to_bytes(8, "little") + _plain_name(name).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def convert(
    model: nn.Module,
    *,
    inplace: bool = False,
    seed: int | None = None,
    predicate: Predicate | None = None,
    preset: str | None = None,
    example_input: Any = None,
    dry_run: bool = False,
    keep_original: bool = False,
    **options: Any,
) -> Any:
    """Replaces a model's 2-d convolutions by perturbation layers with the same channels and the same output sizes.

    Left as they are, with the reason in the table: the stem (the convolutions that read the model's input), 1x1
    convolutions of any stride, depthwise and transposed ones, 1-d and 3-d ones, subclasses of `nn.Conv2d`, lazy ones
    whose sizes aren't known yet, and those whose weight is computed (parametrized, weight-normed, pruned), shared
    with another module or read by other code than their own forward, as in `F.conv2d(x, self.conv.weight)`: a
    perturbation layer's weight has another shape and another meaning. Grouped convolutions keep their grouping. A
    module used in several places stays one module. Forward and backward hooks (their handles too), data type, device,
    train/eval mode and `requires_grad` carry over. Weights start anew, as `PerturbConv2d` initialises them: a 3x3
    kernel's numbers mean nothing to a 1x1 product. Make the optimizer after the conversion.

    With `example_input` the model is run twice, on a copy in evaluation mode: once as it is, once converted. The first
    run finds the stem: a convolution belongs to it when what it reads comes from the model's input alone, through no
    other weight of two or more dimensions (normalising or cropping the image doesn't count). It also sees every use of
    a convolution's weight outside its own forward. The second run finds convolutions that can't be replaced because the
    model asks for the class `nn.Conv2d` or holds them where `convert` can't reach (in a closure, say). Without
    `example_input` the first convolution in the order of registration is taken for the stem, which is right for most
    published models and wrong for one with several branches at its input or one that registers its layers in another
    order than it calls them; and uses of a weight are seen where a method spells them out (`self.conv.weight`).

    A second conversion changes nothing: what an earlier one left stays left, unless a predicate says otherwise.
    `torch_pnn.restore` puts the convolutions back, with their weights where `keep_original` was set.

    Args:
        model: The model; itself a convolution is fine too.
        inplace: Change `model`; else a deep copy is made and changed. Where the model itself is replaced (it is a
            convolution and `predicate` asks for it), the new layer is returned in both cases.
        seed: From it and each layer's name the masks' seeds are derived (`layer_seed`). None: each layer draws a
            seed from PyTorch's default generator.
        predicate: Called as `predicate(name, module)` for each convolution; True converts it, False leaves it, None
            lets the rules above decide. It can't make convertible what isn't (transposed, lazy, ...).
        preset: Name of a published variant: "paper", "juefeix2018" or "klachko2018". See `torch_pnn.presets`.
        example_input: A tensor, a tuple of positional arguments, or a dict of keyword arguments of the model.
        dry_run: Return the table of what would happen, and touch nothing.
        keep_original: Each new layer holds the convolution that it replaced, so that `torch_pnn.restore` gives the
            original weights back. They take their memory meanwhile, also in copies and pickles of the model. Off, only
            the kind and the sizes of the convolutions are noted, and restored ones have fresh weights.
        **options: Keywords of `PerturbConv2d` for every layer: masks, level, noise, activation, shared_masks, norm,
            downsample, train_masks, mask_size, and mixing. They win over the preset's. Trained masks have a fixed size:
            with `train_masks=True` and `example_input` each layer's is taken from the run.

    Returns:
        The converted model, whose attribute `conversion` is a `Conversion`; with `dry_run` the `Conversion` alone.

    Raises:
        TypeError: `model` isn't an `nn.Module` or is a scripted one, `predicate` isn't callable or doesn't return a
            bool or None, `seed` isn't an int, an option is unknown.
        ValueError: `preset` is unknown, `seed` is out of range, an option's value is refused by a layer (the message
            names the layer), `example_input` doesn't run through the model, or the model has an attribute
            `conversion` of its own.
        RuntimeError: The model can't be copied (use `inplace=True`), or doesn't run `example_input` once converted.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
        >>> pnn = convert(net, seed=0, preset="juefeix2018")
        >>> [row.name for row in pnn.conversion.converted], pnn(torch.zeros(1, 3, 9, 9)).shape
        (['2'], torch.Size([1, 16, 5, 5]))
        >>> print(convert(net, dry_run=True))
        module  kind    geometry        became     parameters    why
        ------  ------  --------------  ---------  ------------  -------------------------------------------------
        0       Conv2d  3->8, 3x3       left       224           stem: the first convolution in registration order
        2       Conv2d  8->16, 3x3, s2  converted  1,168 -> 144  PerturbConv2d
        1 would be converted, 1 left; parameters of the model 1,392 -> 368

    Source: arXiv 1806.01817; which layers stay convolutions, github.com/juefeix/pnn.pytorch (models/naiveresnet.py).
    """
    check_model(model)
    merged_options = layer_options(preset, **options)
    if seed is not None:
        _check_seed(seed)
    if predicate is not None and not callable(predicate):
        raise TypeError(
            f"predicate is {predicate!r}, should be a function of (name, module) that returns a bool or None"
        )
    for flag, value in (("inplace", inplace), ("dry_run", dry_run), ("keep_original", keep_original)):
        if not isinstance(value, bool):
            raise TypeError(f"{flag} is {value!r}, should be True or False")
    previous = getattr(model, RECORD, None)
    if previous is not None and not isinstance(previous, Conversion):
        raise ValueError(
            f"model has an attribute 'conversion' of type {type(previous).__name__}, which is where convert keeps its "
            "table; rename the attribute"
        )

    found = convolutions(model)
    seen = None if example_input is None else trace(model, example_input, found)
    verdicts = decide(model, found, predicate, seen, previous)
    seeds = {name: None if seed is None else layer_seed(seed, name) for name in verdicts if verdicts[name] is None}
    if seen is not None:
        verdicts.update(_rehearsed(found, seeds, merged_options, seen))
    if not inplace and not dry_run:
        try:
            model = copy.deepcopy(model)
        except Exception as error:
            raise RuntimeError(
                f"model can't be copied ({type(error).__name__}: {error}); inplace=True converts it without a copy"
            ) from error

    before = count(model)
    plan: dict[nn.Module, nn.Module] = {}
    rows = []
    for module, (name, *aliases) in convolutions(model).items():
        size = count(module)
        row = ConversionRow(
            name,
            type(module).__name__,
            geometry(module),
            False,
            verdicts[name] or "",
            size,
            size,
            None,
            tuple(aliases),
        )
        if verdicts[name] is None:
            new = _replacement(name, module, seeds[name], merged_options, seen, on_meta=dry_run)
            plan[module] = new
            row = replace(row, converted=True, reason=type(new).__name__, parameters_after=count(new), seed=seeds[name])
        rows.append(row)
    after = before + sum(row.parameters_after - row.parameters_before for row in rows)
    record = Conversion(tuple(rows), before, after, seed, preset, dict(merged_options), dry_run, keep_original)
    if dry_run:
        return record

    for old, new in plan.items():
        remember(new, old, keep_original)
        carry_over(old, new)
    model = swap(model, plan)
    setattr(model, RECORD, merged(previous, record))
    return model


def _rehearsed(
    found: Mapping[nn.Module, tuple[str, ...]],
    seeds: Mapping[str, int | None],
    options: Mapping[str, Any],
    seen: Trace,
) -> dict[str, str]:
    """Why replacements that the rules ask for wouldn't do their convolutions' work; leaves the generators alone."""
    devices = {module.weight.device for module in found if isinstance(module, nn.Conv2d)}
    with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
        replacements = {
            name: _replacement(name, module, seeds[name], options, seen, on_meta=False)
            for module, (name, *_) in found.items()
            if name in seeds
        }
    return rehearse(seen, replacements) if replacements else {}


def check_model(model: Any) -> None:
    """Refuses what is no `nn.Module` and what can't be changed."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a scripted module, which can't be changed any more; convert it first, then script it")
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"of type {type(model).__name__}"
        raise TypeError(f"model is {what}, should be an nn.Module")


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}, should be an int in [-2**63, 2**64) or None")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}, should be in [-2**63, 2**64)")


def _plain_name(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def _replacement(
    name: str,
    module: Any,
    seed: int | None,
    options: Mapping[str, Any],
    seen: Trace | None,
    *,
    on_meta: bool,
) -> nn.Module:
    options = dict(options)
    if options.get("train_masks") and options.get("mask_size") is None:
        if seen is None:
            raise ValueError(
                "train_masks=True needs masks of a known size: give example_input, from which each layer's size is "
                "taken, or mask_size=(H, W)"
            )
        sizes = sorted(set(seen.sizes.get(name, ())))
        if not sizes:
            raise ValueError(
                f"{name}: train_masks=True needs the size of its masks, but example_input's run never reached it; "
                "give mask_size=(H, W), or leave it by the predicate"
            )
        if len(sizes) > 1:
            listed = ", ".join(f"{height}x{width}" for height, width in sizes)
            raise ValueError(
                f"{name}: train_masks=True needs masks of one size, but this module reads several ({listed}); leave "
                "it by the predicate"
            )
        options["mask_size"] = sizes[0]
    try:
        return build_perturbation(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.bias is not None,
            module.padding_mode,
            "meta" if on_meta else module.weight.device,
            module.weight.dtype,
            seed=seed,
            **options,
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name or 'the model'}: {error}") from error
