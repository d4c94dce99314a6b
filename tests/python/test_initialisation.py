"""Initial weights keep the signal's scale: the moments behind them, one layer, and 50 layers in a row."""

import math

import pytest
import torch
from torch import nn

from torch_pnn import LBConv2d, PerturbConv2d, functional, initialisation, reference

ACTIVATIONS = list(reference.ACTIVATIONS)


def lattice_moment(activation, level, noise):
    """E[activation(x + level N)^2] over every value of a mask and a fine grid for x ~ N(0, 1)."""
    if noise == "normal":
        counts = torch.ones(1, dtype=torch.float64)
        for _ in range(8):
            counts = torch.nn.functional.conv1d(
                counts.view(1, 1, -1), torch.ones(1, 1, 256, dtype=torch.float64), padding=255
            ).flatten()
        values = (torch.arange(2041, dtype=torch.float64) - 1020) / math.sqrt(43690)
        values, counts = values[::8], counts[::8]
    else:
        values = (2 * torch.arange(256, dtype=torch.float64) - 255) / 256
        counts = torch.ones(256, dtype=torch.float64)
    x = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    weights = torch.exp(-x.square() / 2)
    a = reference.ACTIVATIONS[activation](x + level * values.unsqueeze(1))
    per_value = (a.square() * weights).sum(1) / weights.sum()
    return float((per_value * counts).sum() / counts.sum())


@pytest.mark.parametrize("noise", ["uniform", "waves", "normal"])
@pytest.mark.parametrize("level", [0.0, 0.1, 1.0, 4.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_moment_is_that_of_the_masks(activation, level, noise):
    # The sums of eight bytes are taken as normal: their tails are a little lighter.
    tolerance = 5e-3 if noise == "normal" and level > 0 else 2e-4
    moment = initialisation.second_moment(activation, level, noise)
    assert moment == pytest.approx(lattice_moment(activation, level, noise), rel=tolerance)


def test_second_moment_of_tensors():
    assert initialisation.second_moment("identity", 2.0, "tensor", 0.5, 1.5) == pytest.approx(1 + 9 + 1)
    shifted = initialisation.second_moment("relu", 1.0, "tensor", 1.0, 0.0)
    x = torch.randn(10**6, dtype=torch.float64)
    assert shifted == pytest.approx(float((x + 1).relu().square().mean()), rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(("swish",), "activation is 'swish'"), (("relu", 0.1, "pink"), "noise is 'pink'"), (("relu", math.inf), "finite")],
)
def test_second_moment_refuses(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        initialisation.second_moment(*arguments)


@pytest.mark.parametrize("moment", [0.0, -1.0, math.inf, math.nan])
def test_initialise_refuses(moment):
    weight = torch.ones(2, 2, 1, 1)
    with pytest.raises(ValueError, match="moment is"):
        initialisation.initialise_(weight, moment)
    assert bool((weight == 1).all())


def rms(tensor):
    return float(tensor.detach().double().square().mean().sqrt())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"masks": 8},
        {"masks": 4, "shared_masks": True, "level": 1.0},
        {"level": 4.0, "noise": "normal"},
        {"level": 1.0, "noise": "waves", "groups": 4},
        {"norm": True, "masks": 4},
    ],
)
def test_one_layer_keeps_the_scale(activation, options):
    layer = PerturbConv2d(256, 1024, 3, padding=1, activation=activation, **options)
    y = layer(torch.randn(2, 256, 12, 12))
    assert rms(y) == pytest.approx(1, rel=0.12)


def test_given_masks_are_measured():
    mask = 3 * torch.randn(256, 1, 12, 12) + 1
    layer = PerturbConv2d(256, 1024, 3, padding=1, mask=mask, level=1.0)
    assert rms(layer(torch.randn(2, 256, 12, 12))) == pytest.approx(1, rel=0.12)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_lbc_keeps_the_scale(sparsity):
    layer = LBConv2d(64, 1024, sparsity=sparsity, anchors=256)
    assert rms(layer(torch.randn(2, 64, 16, 16))[:, :, 1:-1, 1:-1]) == pytest.approx(1, rel=0.12)


def chain(depth, width, **options):
    return nn.Sequential(*(PerturbConv2d(width, width, 3, padding=1, **options) for _ in range(depth)))


# The bounds are for the product of 50 layers, each of which may be off by its weights' finite number.
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"masks": 4},
        {"masks": 4, "shared_masks": True, "noise": "waves"},
        {"activation": "identity"},
        {"activation": "leaky_relu", "level": 0.5},
        {"activation": "tanh"},
        {"activation": "elu"},
        {"noise": None},
        {"norm": True},
        {"norm": True, "masks": 4, "activation": "tanh", "level": 1.0},
    ],
)
def test_fifty_layers_keep_the_scale(options):
    model = chain(50, 128, **options)
    x = torch.randn(4, 128, 8, 8, requires_grad=True)
    scales = []
    for layer in model:
        layer.register_forward_hook(lambda _, inputs, output: scales.append(rms(output)))
    y = model(x)
    assert 0.4 < min(scales) and max(scales) < 2.5, (min(scales), max(scales))
    y.backward(torch.randn_like(y))
    gradient = rms(x.grad)
    gradients = [rms(layer.weight.grad) for layer in model]
    if options.get("activation", "relu") in ("relu", "identity", "leaky_relu") and not options.get("norm"):
        # Of these the gradient's second moment shrinks by 1 + level^2/3 a layer: the masks' share of the signal.
        level = options.get("level", 0.1) if options.get("noise", "uniform") else 0.0
        expected = (1 + level**2 / 3) ** -25
        assert 0.3 < gradient / expected < 3, gradient / expected
        assert max(gradients) < 10 / expected * min(gradients)
    assert math.isfinite(gradient) and gradient > 0


def test_the_usual_start_would_lose_it():
    """The contrast that the tests above need: with `nn.Conv2d`'s own start only the last masks are heard at the end."""
    model = chain(50, 64)
    for layer in model:
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
    assert rms(model(torch.randn(2, 64, 8, 8))) < 0.1


def test_bias_starts_at_zero_and_weights_are_bounded():
    layer = PerturbConv2d(16, 8, 3, masks=2, level=1.0)
    bound = math.sqrt(3 / (32 * initialisation.second_moment("relu", 1.0)))
    assert bool((layer.bias == 0).all())
    assert layer.weight.abs().max() <= bound and layer.weight.abs().max() > 0.9 * bound


def test_moments_of_the_masks_are_what_the_formula_takes():
    mask = functional.perturbation_mask(1, 64, 4, 64, 64).double()
    assert float(mask.std()) == pytest.approx(initialisation._LATTICE_DEVIATION, rel=1e-3)
