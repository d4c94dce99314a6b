"""Presets: their options, what they build, and what is refused."""

import doctest
import importlib

import pytest
import torch
from torch import nn

from torch_pnn.convert import convert
from torch_pnn.modules import PerturbConv2d
from torch_pnn.presets import LAYER_OPTIONS, PRESETS, PerturbMixConv2d, build_perturbation, layer_options


@pytest.mark.parametrize("module", ["presets", "convert", "models", "checkpoints"])
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(f"torch_pnn.{module}"))
    assert result.attempted > 0 and result.failed == 0


def test_names():
    assert set(PRESETS) == {"paper", "juefeix2018", "klachko2018"}
    for name, preset in PRESETS.items():
        assert preset.name == name and preset.summary and preset.source
        assert set(preset.options) <= set(LAYER_OPTIONS)


def test_the_published_values():
    assert layer_options("paper")["norm"] is False
    authors = layer_options("juefeix2018")
    assert (authors["norm"], authors["level"], authors["masks"], authors["downsample"]) == (True, 0.1, 1, "max")
    klachko = layer_options("klachko2018")
    assert (klachko["masks"], klachko["mixing"], klachko["norm"], klachko["level"]) == (64, True, False, 0.5)


def test_options_win_and_presets_stay():
    assert layer_options("juefeix2018", level=1.5, masks=3)["level"] == 1.5
    assert layer_options("juefeix2018")["level"] == 0.1
    with pytest.raises(TypeError):
        PRESETS["paper"].options["level"] = 2.0
    assert layer_options() == {}


def test_juefeix2018_is_perturb_relu_batchnorm_1x1():
    """The composition of the published module, written out, on the same weights."""
    torch.manual_seed(0)
    layer = build_perturbation(4, 6, 1, seed=3, **layer_options("juefeix2018"))
    assert type(layer) is PerturbConv2d
    from torch_pnn.functional import perturbation_mask

    input = torch.randn(3, 4, 5, 7)
    mask = perturbation_mask(3, 4, 1, 5, 7)
    norm = nn.BatchNorm2d(4)
    hidden = norm(torch.relu(input + 0.1 * mask[:, 0]))
    expected = nn.functional.conv2d(hidden, layer.weight, layer.bias)
    torch.testing.assert_close(layer(input), expected)


def test_klachko2018_is_masks_relu_grouped_batchnorm_relu_mixing():
    torch.manual_seed(0)
    layer = build_perturbation(3, 6, 3, padding=1, seed=8, **layer_options("klachko2018", masks=5))
    assert type(layer) is PerturbMixConv2d
    assert layer.perturb.groups == 3 and layer.perturb.weight.shape == (6, 5, 1, 1)
    assert layer.mix.weight.shape == (6, 6, 1, 1)
    from torch_pnn.functional import perturbation_mask

    input = torch.randn(4, 3, 6, 6)
    mask = perturbation_mask(8, 3, 5, 6, 6)
    hidden = torch.relu(input[:, :, None] + 0.5 * mask).flatten(1, 2)
    hidden = nn.functional.conv2d(hidden, layer.perturb.weight, groups=3)
    hidden = torch.relu(nn.BatchNorm2d(6)(hidden))
    expected = nn.functional.conv2d(hidden, layer.mix.weight, layer.mix.bias)
    torch.testing.assert_close(layer(input), expected)


def test_mixing_with_one_mask_adds_nothing():
    assert type(build_perturbation(3, 6, 3, mixing=True)) is PerturbConv2d


@pytest.mark.parametrize(
    "in_channels, out_channels, groups, expected", [(4, 8, 1, 4), (6, 4, 1, 2), (4, 8, 2, 4), (5, 7, 1, 1)]
)
def test_mixing_groups(in_channels, out_channels, groups, expected):
    layer = PerturbMixConv2d(in_channels, out_channels, 3, groups=groups, masks=2)
    assert layer.perturb.groups == expected and layer.mix.groups == groups
    assert layer(torch.zeros(1, in_channels, 5, 5)).shape == (1, out_channels, 3, 3)


@pytest.mark.parametrize("activation", ["relu", "tanh", "identity", "gelu"])
def test_mixing_uses_the_activation_twice(activation):
    layer = PerturbMixConv2d(2, 4, 3, masks=2, activation=activation)
    expected = getattr(nn.functional, activation, lambda x: x)
    input = torch.randn(5)
    assert torch.equal(layer.activation(input), expected(input))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_train_through_convert(preset):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1))
    pnn = convert(model, preset=preset, seed=0)
    output = pnn(torch.randn(4, 1, 9, 9))
    assert output.shape == (4, 8, 1, 1)
    output.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in pnn.parameters())
    assert preset in repr(pnn.conversion.preset)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        (("pnn",), ValueError, "preset is 'pnn', should be one of 'paper', 'juefeix2018', 'klachko2018' or None"),
        ((1,), ValueError, "preset is 1"),
        ((["paper"],), ValueError, "preset is"),
    ],
)
def test_unknown_presets(arguments, error, words):
    with pytest.raises(error, match=words):
        layer_options(*arguments)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"masc": 1}, "unknown option 'masc'.*did you mean 'masks'"),
        ({"sparsity": 0.5}, "unknown option 'sparsity'"),
        ({"seed": 1}, "unknown option 'seed'"),
        ({"mask": None}, "'mask' is one layer's tensor"),
    ],
)
def test_unknown_options(options, words):
    with pytest.raises(TypeError, match=words):
        layer_options("paper", **options)
