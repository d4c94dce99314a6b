"""Writes docs/zoo.md: what `torch_pnn.convert` does to the models of the zoo.

    python tests/zoo/table.py                 the whole page (some minutes)
    python tests/zoo/table.py resnet18 vgg11  these rows alone, to the terminal

The sizes are those of the published models, which run on the meta device where that is possible, so that they cost
neither time nor memory; whether TorchScript and torch.export take a model is tried on the zoo's small ones.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zoo_models import ZOO, Model, call, positional_and_keyword

from torch_pnn.convert import Conversion, convert

PAGE = Path(__file__).resolve().parents[2] / "docs" / "zoo.md"
MOBILE = ("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny")

INTRODUCTION = """\
# Models that others wrote, converted

What `torch_pnn.convert(model, example_input=...)` does to one model of each family, with its defaults: one mask a
channel; the stem, 1×1 and depthwise convolutions stay. Multiply-adds are those of convolutions, linear layers and
attention for one image, ours counted at every pixel where the 1×1 product is computed: with the default
`downsample="max"` a layer with a stride works at full resolution and then pools, which `downsample="subsample"` saves.
The last column says whether `torch.jit.script`, `torch.jit.trace` and `torch.export.export` take a small model of the
family: ✓ before and after the conversion, – neither before nor after (nothing of the zoo is lost by the conversion).

How it is tested: tests/zoo/test_zoo.py converts a small model of each family and compares output sizes at several image
sizes, checks that gradients are finite and that a few steps lower the loss, that scripted, traced and exported models
give the same values, that a second conversion changes nothing, and that `torch_pnn.restore` brings the convolutions and
their weights back.
"""

FORCED = """\
## Depthwise convolutions too

Families that are built from depthwise convolutions are left almost as they are. A predicate converts these as well:
`convert(model, predicate=lambda name, module: True if module.groups > 1 else None)`.
"""

REASONS = """\
## Why convolutions stay

`convert(model, dry_run=True)` prints a row for each convolution of your model, with its reason. Those of the zoo, and
what to do about them:

| reason | where | what to do |
| --- | --- | --- |
| stem: it reads the model's input | every model | on purpose, as in the published networks; a predicate converts it |
| 1x1 convolution | bottlenecks, mixing layers | it is the 1×1 product already; a predicate puts masks before it |
| depthwise convolution | mobile families, ConvNeXt | a predicate converts it, see above |
| transposed convolution | decoders (monai UNet) | there is no perturbation layer that enlarges the image |
| subclass … with a forward of its own | timm's `Conv2dSame`, `ScaledStdConv2d` | build the model without them |
| its weight is read by other code | timm's RepVGG, to fuse layers | a predicate, if you never call that code |
"""


def depthwise_too(name: str, module: nn.Module) -> bool | None:
    """The predicate of the second table."""
    return True if getattr(module, "groups", 1) > 1 else None


@dataclass(frozen=True)
class Sizes:
    """What a conversion does to a published model."""

    conversion: Conversion
    before: int
    after: int

    def cells(self) -> list[str]:
        """Convolutions, parameters and multiply-adds, as the table writes them."""
        record = self.conversion
        return [
            f"{len(record.converted)} of {len(record.rows)}",
            f"{record.parameters_before / 1e6:.2f} → {record.parameters_after / 1e6:.2f}",
            f"{self.before / 1e9:.2f} → {self.after / 1e9:.2f}",
        ]


def sizes_of(model: Model, predicate: Callable[[str, nn.Module], bool | None] | None = None) -> Sizes:
    """Converts the published model and counts; multiply-adds after are those before with each layer's exchanged."""
    device = "meta" if model.on_meta else "cpu"
    torch.manual_seed(0)
    try:
        with torch.device(device):
            net = model.whole().eval()
    except NotImplementedError:  # its constructor computes with tensors
        net = model.whole().eval().to(device)
    arguments = model.arguments(model.images(1, (model.whole_size, model.whole_size), device))
    pnn = convert(net, seed=0, example_input=arguments, predicate=predicate)
    exchanged = [0, 0]

    def watch(layer: Any) -> Callable[..., None]:
        def hook(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            batch = output.shape[0] if output.dim() == 4 else 1
            pixels = output.shape[-2] * output.shape[-1]
            exchanged[0] += batch * pixels * module.weight.numel()
            exchanged[1] += batch * layer.multiply_adds(args[0].shape[-2], args[0].shape[-1])

        return hook

    for row in pnn.conversion.converted:
        net.get_submodule(row.name).register_forward_hook(watch(pnn.get_submodule(row.name)))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        call(net, arguments)
    before = counter.get_total_flops() // 2
    return Sizes(pnn.conversion, before, before - exchanged[0] + exchanged[1])


def works(what: Callable[[], Any]) -> bool:
    """Whether a transformation goes through."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            what()
    except Exception:
        return False
    return True


def transformations(model: Model) -> str:
    """✓ or – for script, trace and export, of the small model before and after; ✗ where the conversion loses one."""
    net = model.small().eval()
    arguments = model.arguments(model.images(2))
    pnn = convert(net, seed=0, example_input=arguments)
    args, kwargs = positional_and_keyword(arguments)
    example = {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}

    def marks(net: nn.Module) -> list[bool]:
        return [
            works(lambda: torch.jit.script(net)),
            works(lambda: torch.jit.trace(net, **example, check_trace=False, strict=False)),
            works(lambda: torch.export.export(net, args, kwargs)),
        ]

    signs = {(True, True): "✓", (False, False): "–", (True, False): "✗", (False, True): "✓"}
    return " ".join(signs[pair] for pair in zip(marks(net), marks(pnn), strict=True))


def reasons(record: Conversion) -> str:
    """Why convolutions were left, in short, with their numbers."""
    short: Counter[str] = Counter()
    for row in record.left:
        word = row.reason.split(":")[0].split(" (")[0]
        if word.startswith("subclass"):
            word = word.rsplit(".", 1)[-1]
        elif word.startswith("its weight is read"):
            word = "whose weight other code reads"
        short[word] += 1
    return ", ".join(f"{count} {word}" for word, count in short.most_common()) or "none"


def lines(models: tuple[Model, ...]) -> list[str]:
    """The first table."""
    table = [
        "| model | image | converted | parameters (M) | multiply-adds (G) | left | script, trace, export |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model in models:
        sizes = sizes_of(model)
        cells = [row_start(model, sizes), reasons(sizes.conversion), transformations(model)]
        table.append(" | ".join(cells) + " |")
        print(table[-1], file=sys.stderr, flush=True)
    return table


def row_start(model: Model, sizes: Sizes) -> str:
    """The part of a row that says sizes."""
    return " | ".join([f"| {model.package} {model.name}", f"{model.whole_size}²", *sizes.cells()])


def forced_lines() -> list[str]:
    """The second table."""
    table = [
        "| model | image | converted | parameters (M) | multiply-adds (G) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for model in ZOO:
        if model.package == "torchvision" and model.name in MOBILE:
            table.append(row_start(model, sizes_of(model, depthwise_too)) + " |")
    return table


def versions() -> str:
    """The versions that the page's figures were made with."""
    import importlib.metadata as metadata

    packages = ("torch", *dict.fromkeys(model.package for model in ZOO))
    return ", ".join(f"{name} {metadata.version(name).split('+')[0]}" for name in packages)


def main() -> None:
    """Writes the page, or prints some rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of models; all, and the page, without any")
    wanted = parser.parse_args().models
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    if wanted:
        print("\n".join(lines(tuple(model for model in ZOO if model.name in wanted))))
        return
    page = [
        INTRODUCTION,
        f"Made by `python tests/zoo/table.py` with {versions()}.",
        "",
        *lines(ZOO),
        "",
        FORCED,
        *forced_lines(),
        "",
        REASONS.rstrip(),
    ]
    PAGE.write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
