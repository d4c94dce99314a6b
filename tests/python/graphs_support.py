"""Models for the tests of compiled and exported graphs, and what they should compute: the reference, in float64."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from torch_pnn import LBConv2d, PerturbConv2d, reference

EAGER_TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
"""For a few float32 layers of unit scale beside float64."""


def layers(**options: Any) -> nn.Sequential:
    """Two layers with a stride that pools, groups, several masks and two kinds of noise; `options` are the first's."""
    return nn.Sequential(
        PerturbConv2d(3, 8, 3, 2, 1, **({"seed": 1} | options)),
        PerturbConv2d(8, 4, 3, padding=1, masks=2, groups=2, noise="waves", seed=2),
    )


def image_sizes(least: int = 4, most: int | None = None) -> tuple[dict[int, Any], ...]:
    """Dynamic batch, rows and columns for ``torch.export.export``."""
    return (
        {
            0: Dim("batch", min=1),
            2: Dim("rows", min=least, max=most),
            3: Dim("columns", min=least, max=most),
        },
    )


def double_layer(layer: PerturbConv2d, x: Tensor) -> Tensor:
    """What a layer computes on float64 input, by the reference; the layer's parameters are float64."""
    left, right, top, bottom = layer._pads
    grid = F.pad(x, (left, right, top, bottom))
    silent = layer.noise is None or layer.level == 0
    held = layer.mask is not None
    keywords = {
        "mask": layer.mask if held and not silent else None,
        "seed": None if silent or held else layer.mask_seed,
        "noise": layer.noise,
        "masks": layer.masks,
        "shared_masks": layer.shared_masks,
        "level": layer.level,
        "activation": layer.activation,
        "groups": layer.groups,
        "stride": layer.stride if layer.downsample == "subsample" else 1,
    }
    if layer.norm is None:
        y = reference.perturb_conv2d(grid, layer.weight, layer.bias, **keywords)
    else:
        norm = layer.norm
        y = reference.perturb_norm_conv2d(
            *(grid, layer.weight, layer.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var),
            **keywords,
            training=norm.training,
            eps=norm.eps,
        )
    if layer.stride == (1, 1) or layer.downsample == "subsample":
        return y
    if layer.downsample == "max":
        return F.max_pool2d(y, layer.stride, layer.stride, ceil_mode=True)
    return F.avg_pool2d(y, layer.stride, layer.stride, ceil_mode=True, count_include_pad=False)


def expected(model: nn.Sequential, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's output in float64, and the gradients of mean(output**2): those of parameters by name, and "input"."""
    twin = copy.deepcopy(model).double()
    leaf = x.double().requires_grad_()
    y = leaf
    for module in twin:
        y = double_layer(module, y) if isinstance(module, PerturbConv2d) else module(y)
    y.square().mean().backward()
    gradients = {name: value.grad for name, value in twin.named_parameters() if value.grad is not None}
    assert leaf.grad is not None
    return y.detach(), gradients | {"input": leaf.grad}


def check_against_reference(run: Any, parameters: dict[str, Tensor], model: nn.Sequential, x: Tensor) -> None:
    """Compares values and gradients of `run`, a form of `model` with these parameters, with the float64 reference."""
    y, gradients = expected(model, x)
    leaf = x.clone().requires_grad_()
    for parameter in parameters.values():
        parameter.grad = None
    z = run(leaf)
    torch.testing.assert_close(z.double(), y, **EAGER_TOLERANCE)
    z.square().mean().backward()
    found = {name: value.grad for name, value in parameters.items()} | {"input": leaf.grad}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name].double(), gradient, **EAGER_TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def operators(graph_module: Any) -> list[str]:
    """The names of our operators in a graph and its subgraphs."""
    return [
        str(node.target).removeprefix("torch_pnn.").removesuffix(".default")
        for module in graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if "torch_pnn" in str(node.target)
    ]


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Through a file."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return torch.export.load(io.BytesIO(buffer.getvalue()))


def every_layer(activations: Sequence[str]) -> nn.ModuleDict:
    """Layers [B, 4, H, W] -> [B, T, H', W'] that cover every option that changes a graph."""
    found: dict[str, nn.Module] = {}
    noises = ("uniform", "normal", "waves")
    for i, name in enumerate(activations):
        found[name] = PerturbConv2d(
            *(4, 6, 3),
            padding=1,
            activation=name,
            noise=noises[i % 3],
            masks=1 + i % 2,
            groups=1 + i % 3 % 2,
            shared_masks=i % 4 == 1,
            norm=i % 3 == 2,
            level=1.0,
            seed=i,
        )
    found["pooled"] = PerturbConv2d(4, 6, 3, 2, 1, seed=20)
    found["averaged"] = PerturbConv2d(4, 6, 3, (2, 1), 1, downsample="avg", padding_mode="reflect", seed=21)
    found["subsampled"] = PerturbConv2d(4, 6, 3, (2, 3), 1, downsample="subsample", masks=2, norm=True, seed=22)
    found["cropped"] = PerturbConv2d(4, 6, 3, bias=False, seed=23)
    found["padded"] = PerturbConv2d(4, 6, 1, padding=2, masks=3, seed=24)
    found["silent"] = PerturbConv2d(4, 6, 3, padding=1, masks=3, noise=None)
    found["plain"] = PerturbConv2d(4, 6, 3, padding=1, level=0.0)
    found["replaced"] = PerturbConv2d(4, 6, 3, padding=1, masks=2, norm=True, seed=25)
    found["replaced"].norm = nn.InstanceNorm2d(8)
    found["binary"] = LBConv2d(4, 6, 3, 2, 1, seed=26)
    result = nn.ModuleDict(found)
    for module in result.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return result.eval()


class Branches(nn.Module):
    """All modules of a dictionary on one input: a dictionary of outputs."""

    def __init__(self, branches: nn.ModuleDict) -> None:
        super().__init__()
        self.branches = branches

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        """The outputs by the modules' names."""
        return {name: module(input) for name, module in self.branches.items()}
