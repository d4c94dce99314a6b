"""Models in bfloat16, float16 and float64, and in channels_last: values, gradients, types and layouts."""

from __future__ import annotations

import copy

import pytest
import torch
from plain_support import assert_same_step, reference_step, step
from torch import nn

from torch_pnn import LBConv2d, PerturbBasicBlock, PerturbConv2d, models

# rounding of the maps, the weight and the results, in units of the largest result
TOLERANCE = {torch.bfloat16: 4 * 2.0**-8, torch.float16: 4 * 2.0**-11}
WAYS = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to with device": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "double": (lambda m: m.double(), torch.float64),
}
OPTIONS = [
    {},
    {"noise": None},
    {"masks": 2, "noise": "normal", "activation": "gelu"},
    {"noise": "waves", "shared_masks": True, "stride": 2},
    {"mask_size": (8, 7)},
    {"mask": torch.linspace(-1, 1, 56).reshape(1, 1, 8, 7)},
    {"mask_size": (8, 7), "train_masks": True},
    {"norm": True},
    {"groups": 3, "downsample": "avg", "stride": (1, 2)},
]


def layer_of(**options):
    return PerturbConv2d(3, 6, 3, padding=1, **({"seed": 5} | options if "mask" not in options else options))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layers_convert_and_compute(options, way):
    convert, dtype = WAYS[way]
    layer = layer_of(**options)
    seed = layer.mask_seed.clone() if layer.mask_seed is not None else None
    assert convert(layer) is layer
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.mask_version.dtype == torch.int64
    assert seed is None or (torch.equal(layer.mask_seed, seed) and layer.mask_seed.dtype == torch.int64)
    x = torch.randn(2, 3, 8, 7).to(dtype)
    found = step(layer, x)
    assert found.output.dtype == found.input.dtype == dtype
    assert all(gradient.dtype == dict(layer.named_parameters())[n].dtype for n, gradient in found.parameters.items())
    tolerance = TOLERANCE.get(dtype, 1e-12)
    # relu's derivative may jump where the masks' own rounding moves a value across 0; seeds' masks are exact.
    assert_same_step(found, reference_step(layer, x), rtol=tolerance, atol=4 * tolerance, buffers=False)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("noise", ["uniform", "waves"])
def test_converted_masks_are_the_seeds_to_the_bit(noise, dtype):
    """The lattice's 256 values are exact in every type, so a held mask loses nothing on the way there and back."""
    layer = layer_of(noise=noise, mask_size=(8, 7))
    expected = layer.mask.clone()
    assert torch.equal(layer.to(dtype).mask.float(), expected)
    assert torch.equal(layer.float().mask, expected)
    by_seed = layer_of(noise=noise).to(dtype)
    x = torch.randn(2, 3, 8, 7).to(dtype)
    by_seed.load_state_dict(layer.to(dtype).state_dict(), strict=False)
    assert torch.equal(by_seed(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_layers_are_made_in_a_type(dtype):
    layer = PerturbConv2d(3, 6, 3, seed=1, norm=True, dtype=dtype)
    lbc = LBConv2d(3, 6, seed=1, dtype=dtype)
    assert {p.dtype for p in (*layer.parameters(), *lbc.parameters(), lbc.anchor_weight)} == {dtype}
    for module in (layer, lbc):
        y = module(torch.randn(2, 3, 9, 8, dtype=dtype))
        assert y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize("way", ["half", "bfloat16"])
def test_networks_in_sixteen_bits_train(way):
    convert, dtype = WAYS[way]
    model = convert(models.noise_resnet18(width=4, preset="juefeix2018"))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    x, target = torch.randn(8, 3, 8, 8).to(dtype), torch.arange(8)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x).float(), target)
        optimiser.zero_grad()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


CHANNELS_LAST = torch.channels_last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        *(lambda o=o: layer_of(**o) for o in OPTIONS),
        lambda: LBConv2d(3, 6, seed=1),
        # 16 channels before the shortcut's 1x1 convolution: see narrow networks in docs/troubleshooting.md.
        lambda: nn.Sequential(nn.Conv2d(3, 16, 1), PerturbBasicBlock(16, 20, stride=2, norm=True)),
    ],
)
def test_channels_last_models_keep_the_layout(make, dtype):
    model = make().to(dtype)
    like = copy.deepcopy(model)
    assert model.to(memory_format=CHANNELS_LAST) is model
    x = torch.randn(2, 3, 8, 7).to(dtype)
    expected = step(like, x)
    input = x.contiguous(memory_format=CHANNELS_LAST).requires_grad_()
    y = model(input)
    assert y.is_contiguous(memory_format=CHANNELS_LAST) and not y.is_contiguous()
    found = step(model, input)
    tolerance = TOLERANCE.get(dtype, 1e-5)
    assert_same_step(found, expected, rtol=tolerance, atol=tolerance, buffers=False)
    assert found.input.is_contiguous(memory_format=CHANNELS_LAST)
    # A contiguous input into a channels_last model, and the other way round.
    torch.testing.assert_close(model(x), expected.output, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(like(input), expected.output, rtol=tolerance, atol=tolerance)


def test_channels_last_gives_the_same_bits_forward():
    model = layer_of(masks=2).eval()
    x = torch.randn(2, 3, 8, 7)
    y = model(x)
    assert torch.equal(model.to(memory_format=CHANNELS_LAST)(x.contiguous(memory_format=CHANNELS_LAST)), y)


def test_channels_last_networks_keep_the_layout_to_the_end():
    model = models.noise_resnet18(width=4).eval().to(memory_format=CHANNELS_LAST)
    seen = []
    for module in model.modules():
        if isinstance(module, PerturbConv2d):
            module.register_forward_hook(lambda m, args, y: seen.append(y.is_contiguous(memory_format=CHANNELS_LAST)))
    model(torch.randn(2, 3, 16, 16).contiguous(memory_format=CHANNELS_LAST))
    assert seen and all(seen)
