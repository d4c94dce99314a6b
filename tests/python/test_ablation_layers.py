"""The layers that arms put in a convolution's place, against compositions of PyTorch's own functions; their masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_pnn import functional
from torch_pnn.ablation import layers
from torch_pnn.ablation.layers import FrozenConv2d, Place, ShiftConv2d, make_layer, make_masks, set_masks
from torch_pnn.presets import PerturbMixConv2d

GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
    {"kernel_size": 3, "padding": 0, "stride": 2},
    {"kernel_size": (1, 3), "padding": "same"},
    {"kernel_size": 5, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "groups": 3},
]


def _place(convolution, image):
    """Where the convolution would stand, with the size of its padded grid as its own output of stride 1 has it."""
    with torch.no_grad():
        plain = nn.Conv2d(1, 1, convolution.kernel_size, 1, convolution.padding, convolution.dilation)
        return Place("there", (tuple(plain(image[:1, :1]).shape[-2:]),))


# --------------------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", layers.NOISES)
@pytest.mark.parametrize("shared", [False, True])
def test_masks_are_fixed_by_their_seed_and_size(noise, shared):
    masks = make_masks(noise, 2**64 - 5, 3, 2, 7, 9, shared=shared)
    assert masks.shape == (1 if shared else 3, 2, 7, 9)
    assert masks.dtype == torch.float32
    assert torch.equal(masks, make_masks(noise, 2**64 - 5, 3, 2, 7, 9, shared=shared))
    assert not torch.equal(masks, make_masks(noise, 2**64 - 6, 3, 2, 7, 9, shared=shared))
    maps = masks.flatten(0, 1)
    assert not any(torch.equal(a, b) for k, a in enumerate(maps) for b in maps[:k])
    if noise in layers.RECIPES:
        seed = torch.tensor([-5])
        assert torch.equal(masks, functional.perturbation_mask(seed, 3, 2, 7, 9, shared_masks=shared, noise=noise))


def _neighbours_agree(masks):
    """Correlation of each pixel with the one beside it and the one below, over all maps."""
    pairs = [(masks[..., 1:], masks[..., :-1]), (masks[..., 1:, :], masks[..., :-1, :])]
    return [float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) for a, b in pairs]


def test_shuffled_waves_have_the_waves_values_and_no_order():
    waves, shuffled = (make_masks(noise, 3, 16, 2, 32, 32).double() for noise in ("waves", "waves-shuffled"))
    assert torch.equal(waves.flatten(2).sort().values, shuffled.flatten(2).sort().values)
    assert min(_neighbours_agree(waves)) > 0.5
    # 16·2·31·32 pairs: three standard deviations of no correlation at all are 0.017.
    assert max(map(abs, _neighbours_agree(shuffled))) < 0.017

    # A permutation for each map: a common one would keep the values that two maps have at one pixel together.
    def pairs(masks):
        first, second = masks.flatten(2).flatten(0, 1)[:2]
        return (first * 1000 + second).sort().values

    assert not torch.equal(pairs(waves), pairs(shuffled))
    common = waves.flatten(2)[..., torch.randperm(1024)]
    assert torch.equal(pairs(waves), pairs(common))


def test_a_constant_is_one_value_of_the_lattice_for_each_map():
    masks = make_masks("constant", 11, 64, 4, 5, 6)
    assert torch.equal(masks, masks[..., :1, :1].expand_as(masks))
    values = masks[..., 0, 0]
    assert torch.equal(values, make_masks("uniform", 11, 64, 4, 5, 6)[..., 0, 0])
    raw = (values * 256 + 255) / 2
    assert torch.equal(raw, raw.round()) and 0 <= raw.min() and raw.max() <= 255
    assert len(raw.unique()) > 100


def test_a_continuous_uniform_mask_is_one():
    stats = pytest.importorskip("scipy.stats")
    values = make_masks("uniform-continuous", 5, 8, 4, 32, 32).flatten().double()
    assert stats.kstest(values.numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.01
    lattice = (values * 256 + 255) / 2
    assert (lattice != lattice.round()).float().mean() > 0.99


def test_unknown_noise():
    with pytest.raises(ValueError, match="noise is 'pink', it should be one of 'uniform'"):
        make_masks("pink", 0, 1, 1, 2, 2)


@pytest.mark.parametrize("noise", layers.NOISES)
@pytest.mark.parametrize("preset", ["juefeix2018", "klachko2018"])
def test_setting_masks_gives_what_a_layer_made_with_the_seed_has(noise, preset):
    convolution, place = nn.Conv2d(4, 8, 3, padding=1), Place("there", ((6, 5),))
    options = {"preset": preset, "noise": noise}
    layer, other = (make_layer("perturb", convolution, place, seed=seed, options=options) for seed in (1, 2**63 + 9))
    before, wanted = (layers.perturbation_of(x).perturbation(6, 5).clone() for x in (layer, other))
    assert not torch.equal(before, wanted)
    set_masks(layer, noise, 2**63 + 9)
    assert torch.equal(layers.perturbation_of(layer).perturbation(6, 5), wanted)
    set_masks(layer, noise, 1)
    assert torch.equal(layers.perturbation_of(layer).perturbation(6, 5), before)


def test_setting_masks_leaves_layers_without_any():
    for kind, options in (("perturb", {"level": 0}), ("conv1x1", {}), ("separable", {}), ("shift", {})):
        layer = make_layer(kind, nn.Conv2d(4, 8, 3, padding=1), Place("there"), seed=1, options=options)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        set_masks(layer, "uniform", 5)
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


# --------------------------------------------------------------------------------------------------------------------
# Every kind
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", layers.LAYERS)
def test_every_kind_keeps_the_convolutions_output_size_and_learns(kind, geometry):
    convolution = nn.Conv2d(6, 9, **geometry)
    image = torch.randn(2, 6, 11, 10)
    if kind == "lbc" and convolution.groups > 1:
        with pytest.raises(ValueError, match="groups is 3, it should be 1 for the layer 'lbc'"):
            make_layer(kind, convolution, _place(convolution, image), seed=0)
        return
    layer = make_layer(kind, convolution, _place(convolution, image), seed=0)
    output = layer(image)
    assert output.shape == convolution(image).shape
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    last = layer[-1] if isinstance(layer, nn.Sequential) else layer
    assert (last.bias is None) == (convolution.bias is None)


@pytest.mark.parametrize("noise", ["waves-shuffled", "constant", "uniform-continuous"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_held_masks_fit_the_padded_grid(noise, geometry):
    convolution, image = nn.Conv2d(6, 9, **geometry), torch.randn(2, 6, 11, 10)
    place = _place(convolution, image)
    layer = make_layer("perturb", convolution, place, seed=4, options={"noise": noise, "masks": 2})
    assert layer(image).shape == convolution(image).shape
    assert torch.equal(layer.mask, make_masks(noise, 4, 6, 2, *place.sizes[0]))


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), ((1, 3), 1), (2, 1), (3, 2), (5, 1)])
@pytest.mark.parametrize("channels", [30, 9, 4])
def test_shift_is_a_roll_with_zeros(kernel, dilation, channels):
    layer = ShiftConv2d(channels, 4, kernel, 1, "same", dilation)
    image = torch.randn(2, channels, 9, 8)
    rows, columns = layer.kernel_size
    each = channels // (rows * columns)
    expected = image.clone()
    channel = 0
    for row in range(rows):
        for column in range(columns):
            down, right = ((row - (rows - 1) // 2) * dilation, (column - (columns - 1) // 2) * dilation)
            for _ in range(each):
                moved = torch.roll(image[:, channel], (-down, -right), dims=(1, 2))
                for y in range(9):
                    for x in range(8):
                        if not (0 <= y + down < 9 and 0 <= x + right < 8):
                            moved[:, y, x] = 0
                expected[:, channel] = moved
                channel += 1
    assert torch.equal(layer.shifted(image), expected)
    assert torch.equal(layer.shifted(image[0]), expected[0])


def test_shift_of_an_image_smaller_than_the_distance_is_zero():
    layer = ShiftConv2d(9, 1, 3, 1, 4, 4)
    image = torch.ones(1, 9, 2, 2)
    shifted = layer.shifted(image)
    assert torch.equal(shifted[:, 4], image[:, 4])
    assert shifted.sum() == 4


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["frozen-conv", "shift"])
@pytest.mark.parametrize("training", [True, False])
def test_frozen_filters_and_shifts_are_followed_by_the_pnns_chain(kind, stride, training):
    convolution = nn.Conv2d(18, 5, 3, stride, 1).double()
    layer = make_layer(kind, convolution, Place("there"), seed=7).train(training)
    nn.init.uniform_(layer.norm.weight, 0.5, 2)
    nn.init.uniform_(layer.norm.bias, -1, 1)
    image = torch.randn(3, 18, 7, 6, dtype=torch.float64)
    maps = layer.shifted(image) if kind == "shift" else F.conv2d(image, layer.filters, padding=1)
    norm = nn.BatchNorm2d(18).double().train(training)
    norm.load_state_dict(layer.norm.state_dict())
    mixed = F.conv2d(norm(F.relu(maps)), layer.weight, layer.bias)
    expected = F.max_pool2d(mixed, stride, ceil_mode=True) if stride > 1 else mixed
    assert torch.allclose(layer(image), expected, rtol=1e-12, atol=1e-12)


def test_frozen_filters_stay_and_cost_what_they_store():
    layer = make_layer("frozen-conv", nn.Conv2d(8, 4, 3, padding=1), Place("there"), seed=3)
    before = layer.filters.clone()
    image = torch.randn(4, 8, 6, 6)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(image).square().sum().backward()
    optimizer.step()
    assert layer.filters.grad is None
    assert "filters" not in dict(layer.named_parameters())
    assert torch.equal(layer.filters, before)
    assert layer.mask_bytes == 8 * 8 * 9 * 4
    assert layer.multiply_adds(6, 6) == 36 * (8 * 8 * 9 + 8 * 4)
    # As many learnable parameters as the PNN's layer, under the same names; another seed, other filters.
    pnn = make_layer("perturb", nn.Conv2d(8, 4, 3, padding=1), Place("there"), seed=3, options={"norm": True})
    assert {n: p.shape for n, p in layer.named_parameters()} == {n: p.shape for n, p in pnn.named_parameters()}
    other = FrozenConv2d(8, 4, 3, 1, 1, filters_seed=4)
    assert not torch.equal(other.filters, before)
    # Responses keep the input's variance.
    wide = FrozenConv2d(64, 4, 3, 1, 1, filters_seed=4)
    response = F.conv2d(torch.randn(8, 64, 12, 12), wide.filters)
    assert 0.9 < float(response.var()) < 1.1


def test_depthwise_frozen_filters_read_their_own_channel():
    options = {"depthwise": True, "norm": False, "activation": "identity"}
    layer = make_layer("frozen-conv", nn.Conv2d(4, 4, 3, padding=1), Place("there"), seed=3, options=options)
    assert layer.filters.shape == (4, 1, 3, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4).reshape(4, 4, 1, 1))
        image = torch.zeros(1, 4, 5, 5)
        image[0, 2] = torch.randn(5, 5)
        output = layer(image)
    assert output[0, 2].abs().sum() > 0
    assert output[0, [0, 1, 3]].abs().sum() == 0


def test_separable_is_depthwise_then_pointwise():
    layer = make_layer("separable", nn.Conv2d(8, 4, 3, 2, 1, bias=False), Place("there"), seed=3)
    assert sum(p.numel() for p in layer.parameters()) == 8 * 9 + 2 * 8 + 8 * 4
    assert layer[0].groups == 8 and layer[0].stride == (2, 2)


@pytest.mark.parametrize(
    ("position", "inside"), [("before", True), ("before-only", True), ("after", False), ("none", False), (True, True)]
)
def test_norm_positions_inside_of_the_layer(position, inside):
    options = {"preset": "paper", "norm": position}
    layer = make_layer("perturb", nn.Conv2d(4, 4, 3), Place("there"), seed=0, options=options)
    assert (layer.norm is not None) == inside


def test_trained_masks_begin_as_the_seeds():
    convolution, place = nn.Conv2d(4, 8, 3, padding=1), Place("there", ((6, 5),))
    for noise in layers.NOISES:
        layer = make_layer("perturb", convolution, place, seed=9, train_masks=True, options={"noise": noise})
        assert isinstance(layer.mask, nn.Parameter)
        assert torch.equal(layer.mask, make_masks(noise, 9, 4, 1, 6, 5))
    mixing = make_layer("perturb", convolution, place, seed=9, train_masks=True, options={"preset": "klachko2018"})
    assert isinstance(mixing, PerturbMixConv2d) and isinstance(mixing.perturb.mask, nn.Parameter)


@pytest.mark.parametrize(
    ("kind", "options", "error", "words"),
    [
        ("dense", {}, ValueError, "layer is 'dense', it should be one of 'conv', 'perturb'"),
        ("conv", {"level": 1}, TypeError, "option 'level' doesn't belong to the layer 'conv'"),
        ("shift", {"masks": 2}, TypeError, "option 'masks' doesn't belong to the layer 'shift'"),
        ("frozen-conv", {"norm": "middle"}, ValueError, "norm is 'middle', it should be one of 'before'"),
        ("perturb", {"noise": "pink"}, ValueError, "noise is 'pink', it should be one of"),
        ("perturb", {"levle": 2}, TypeError, "unknown option 'levle'.*did you mean 'level'"),
        ("perturb", {"preset": "papre"}, ValueError, "preset is 'papre'"),
        ("perturb", {"noise": "constant"}, ValueError, r"masks of the kind constant have one size.*\(6×5, 3×3\)"),
    ],
)
def test_refusals(kind, options, error, words):
    place = Place("there", ((6, 5), (3, 3)))
    with pytest.raises(error, match=words):
        make_layer(kind, nn.Conv2d(4, 8, 3, padding=1), place, seed=0, options=options)


def test_trained_masks_need_one_size():
    with pytest.raises(ValueError, match="trained masks have one size, and the layer works on several"):
        make_layer("perturb", nn.Conv2d(4, 8, 3), Place("there", ((6, 5), (3, 3))), seed=0, train_masks=True)
