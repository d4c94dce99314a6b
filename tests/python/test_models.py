"""The networks, the count of what they cost, and the search for a width."""

import inspect

import pytest
import torch
from torch import nn

from torch_pnn import models
from torch_pnn.convert import convert, layer_seed
from torch_pnn.modules import LBConv2d, PerturbConv2d
from torch_pnn.presets import PRESETS, PerturbMixConv2d

LAYERS = ["perturb", "conv", "lbc", "conv1x1"]
RESNETS = {
    models.noise_resnet18: (2, 2, 2, 2),
    models.noise_resnet34: (3, 4, 6, 3),
    models.noise_resnet50: (3, 4, 6, 3),
    models.noise_resnet101: (3, 4, 23, 3),
    models.noise_resnet152: (3, 8, 36, 3),
}


def parameters_of(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# Shapes


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 8), (11, 7), (28, 28)])
def test_lenet_takes_any_size(layer, size):
    model = models.lenet(7, width=4, layer=layer).eval()
    assert model(torch.zeros(2, 1, *size)).shape == (2, 7)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (32, 32), (17, 33)])
def test_cifarnet_takes_any_size(layer, size):
    model = models.cifarnet(5, width=2, layer=layer, in_channels=2).eval()
    assert model(torch.zeros(1, 2, *size)).shape == (1, 5)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "stem, size", [("cifar", (8, 8)), ("cifar", (9, 13)), ("imagenet", (32, 32)), ("imagenet", (33, 47))]
)
def test_resnet_sizes_are_the_convolutional_ones(layer, stem, size):
    input = torch.zeros(2, 3, *size)
    sizes = []
    for kind in ("conv", layer):
        model = models.noise_resnet18(6, width=2, stem=stem, layer=kind).eval()
        assert model(input).shape == (2, 6)
        x, seen = model.stem(input), []
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            x = stage(x)
            seen.append(x.shape)
        sizes.append(seen)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("build, depths", RESNETS.items(), ids=lambda value: getattr(value, "__name__", None))
def test_depths(build, depths):
    model = build(width=1, layer="conv1x1")
    assert tuple(len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)) == depths


def test_conv_resnets_have_he_et_als_parameter_counts():
    """With the ImageNet stem and convolutions these are the published networks, to the parameter."""
    published = {
        models.noise_resnet18: 11_689_512,
        models.noise_resnet34: 21_797_672,
        models.noise_resnet50: 25_557_032,
    }
    for build, count in published.items():
        with torch.device("meta"):
            model = build(1000, stem="imagenet", layer="conv")
        assert parameters_of(model) == count


def test_stem_shortcuts_and_classifier_stay():
    model = models.noise_resnet18(width=2, layer="perturb")
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert kinds.pop("stem.0") is nn.Conv2d and kinds.pop("classifier") is nn.Linear
    assert len(kinds) == 3 and all(model.get_submodule(name).kernel_size == (1, 1) for name in kinds)
    assert sum(isinstance(module, PerturbConv2d) for module in model.modules()) == 16


@pytest.mark.parametrize("build", [models.lenet, models.cifarnet, models.noise_resnet18, models.noise_resnet50])
@pytest.mark.parametrize("layer, kind", [("perturb", PerturbConv2d), ("lbc", LBConv2d)])
def test_kind_of_inner_layer(build, layer, kind):
    model = build(width=2, layer=layer)
    assert any(isinstance(module, kind) for module in model.modules())
    other = LBConv2d if kind is PerturbConv2d else PerturbConv2d
    assert not any(isinstance(module, other) for module in model.modules())


def test_signatures_agree_with_the_documented_ones():
    for build in RESNETS:
        parameters = inspect.signature(build).parameters
        assert list(parameters)[:5] == ["num_classes", "in_channels", "width", "stem", "layer"]
        assert parameters["num_classes"].default == 10 and parameters["width"].default == 64


# Options


@pytest.mark.parametrize("build", [models.lenet, models.cifarnet, models.noise_resnet18, models.noise_resnet50])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets(build, preset):
    options = {"masks": 2} if preset == "klachko2018" else {}
    model = build(width=2, preset=preset, seed=1, **options)
    layers = [module for module in model.modules() if isinstance(module, PerturbConv2d)]
    assert all((layer.norm is not None) == (preset == "juefeix2018") for layer in layers)
    assert all(layer.level == PRESETS[preset].options["level"] for layer in layers)
    mixing = [module for module in model.modules() if isinstance(module, PerturbMixConv2d)]
    assert len(mixing) == (len(layers) if preset == "klachko2018" else 0)
    channels = 1 if build is models.lenet else 3
    model(torch.randn(2, channels, 16, 16)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_options_reach_the_layers():
    model = models.lenet(width=2, masks=3, level=0.7, noise="waves", activation="tanh", shared_masks=True)
    for layer in (module for module in model.modules() if isinstance(module, PerturbConv2d)):
        assert (layer.masks, layer.level, layer.noise, layer.activation) == (3, 0.7, "waves", "tanh")
        assert layer.shared_masks
    model = models.lenet(width=2, layer="lbc", sparsity=0.75, anchors=5)
    for layer in (module for module in model.modules() if isinstance(module, LBConv2d)):
        assert layer.sparsity == 0.75 and layer.anchors == 5


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"layer": "pnn"}, ValueError, "layer is 'pnn', should be one of"),
        ({"layer": None}, ValueError, "layer is None"),
        ({"preset": "papre"}, ValueError, "preset is 'papre'"),
        ({"preset": "paper", "layer": "conv"}, ValueError, "preset is 'paper', which is for layer='perturb'"),
        ({"levle": 1}, TypeError, "unknown option 'levle'"),
        ({"layer": "conv", "masks": 2}, TypeError, "option 'masks' doesn't belong to the layer 'conv'"),
        ({"layer": "conv1x1", "sparsity": 0.5}, TypeError, "option 'sparsity' doesn't belong to the layer 'conv1x1'"),
        ({"layer": "lbc", "masks": 2}, TypeError, "option 'masks' doesn't belong to the layer 'lbc'"),
        ({"width": 0}, ValueError, "width is 0, should be a positive number"),
        ({"width": -0.5}, ValueError, "width is -0.5, should be a positive number"),
        ({"width": float("inf")}, ValueError, "width is inf, should be a positive number"),
        ({"width": "2"}, ValueError, "width is '2', should be a positive number"),
        ({"num_classes": -1}, ValueError, "num_classes is -1"),
        ({"in_channels": True}, ValueError, "in_channels is True"),
        ({"seed": "a"}, TypeError, "seed is 'a'"),
        ({"seed": 2**64}, ValueError, "seed is 18446744073709551616"),
        ({"masks": 0}, ValueError, "masks"),
    ],
)
@pytest.mark.parametrize("build", [models.lenet, models.cifarnet, models.noise_resnet18, models.noise_resnet50])
def test_refusals(build, arguments, error, words):
    with pytest.raises(error, match=words):
        build(**{"width": 2, **arguments})


def test_unknown_stem():
    with pytest.raises(ValueError, match="stem is 'mnist', should be 'cifar' or 'imagenet'"):
        models.noise_resnet18(stem="mnist")


# Seeds


@pytest.mark.parametrize("build", [models.lenet, models.noise_resnet18, models.noise_resnet50])
def test_layers_have_seeds_of_their_own_names(build):
    model = build(width=2, seed=21)
    found = {name: int(m.mask_seed) for name, m in model.named_modules() if isinstance(m, PerturbConv2d)}
    assert len(set(found.values())) == len(found) > 1
    assert all(stored % 2**64 == layer_seed(21, name) for name, stored in found.items())
    again = build(width=2, seed=21)
    assert found == {name: int(m.mask_seed) for name, m in again.named_modules() if isinstance(m, PerturbConv2d)}


def test_seed_does_not_touch_the_weights():
    """Weights come from PyTorch's generator, masks from the seed, so the two vary separately."""
    built = []
    for seed in (1, 1, 2):
        torch.manual_seed(5)
        built.append(models.lenet(width=4, seed=seed).state_dict())
    for name in built[0]:
        same = torch.equal(built[0][name], built[2][name])
        assert torch.equal(built[0][name], built[1][name])
        assert same != name.endswith("mask_seed")


def test_reset_keeps_the_seed():
    model = models.lenet(width=2, seed=3)
    layer = next(m for m in model.modules() if isinstance(m, PerturbConv2d))
    before = int(layer.mask_seed)
    layer.reset_parameters()
    assert int(layer.mask_seed) == before


def test_lbc_filters_come_from_the_seed():
    filters = []
    for seed in (1, 1, 2):
        model = models.lenet(width=4, layer="lbc", seed=seed)
        filters.append([b.clone() for b in model.buffers() if b.dim() == 4])
    assert filters[0]
    assert all(torch.equal(a, b) for a, b in zip(filters[0], filters[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(filters[0], filters[2], strict=True))


# Training and scripting


@pytest.mark.parametrize("layer", LAYERS)
def test_a_few_steps_lower_the_loss(layer):
    torch.manual_seed(0)
    model = models.lenet(4, width=4, layer=layer, seed=0)
    input, target = torch.randn(16, 1, 8, 8), torch.arange(16) % 4
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(input), target)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("build", [models.lenet, models.cifarnet, models.noise_resnet18, models.noise_resnet50])
@pytest.mark.parametrize("layer", ["perturb", "lbc"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripting(build, layer):
    model = build(width=2, layer=layer, seed=4).eval()
    input = torch.randn(2, 1 if build is models.lenet else 3, 8, 8)
    assert torch.equal(torch.jit.script(model)(input), model(input))


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("build", [models.noise_resnet101, models.noise_resnet152])
def test_deep_networks_run_forward_and_backward(build, layer):
    torch.manual_seed(0)
    model = build(3, width=2, layer=layer)
    output = model(torch.randn(4, 3, 8, 8))
    output.square().mean().backward()
    assert output.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_conversion_of_a_perturbation_network_changes_nothing():
    model = models.noise_resnet18(width=2)
    assert convert(model).conversion.converted == ()


# Costs


def test_costs_of_a_convolution():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 2, 2, groups=2))
    counted = models.costs(model, (3, 9, 9))
    assert [row.macs for row in counted.layers] == [8 * 25 * 27, 8 * 25 * 2 * 4]
    assert counted.parameters == parameters_of(model) and counted.mask_bytes == 0


def test_costs_of_groups():
    assert models.costs(nn.Conv2d(4, 8, 3, groups=2), (4, 5, 5)).macs == 9 * 8 * 2 * 9
    assert models.costs(PerturbConv2d(4, 8, 3, groups=2, masks=3), (4, 5, 5)).macs == 9 * 8 * 2 * 3


@pytest.mark.parametrize("downsample, pixels", [("max", 81), ("avg", 81), ("subsample", 25)])
def test_costs_of_a_perturbation_count_the_computed_pixels(downsample, pixels):
    layer = PerturbConv2d(4, 6, 3, 2, 1, masks=5, downsample=downsample)
    counted = models.costs(layer, (4, 9, 9))
    assert counted.macs == pixels * 6 * 4 * 5
    assert counted.parameters == 6 * 20 + 6
    assert counted.mask_bytes == 8


def test_costs_of_a_padded_perturbation():
    layer = PerturbConv2d(2, 3, 3, 1, 2)
    assert models.costs(layer, (2, 5, 6)).macs == 7 * 8 * 3 * 2


def test_costs_of_stored_masks():
    stored = PerturbConv2d(4, 6, 3, padding=1, masks=2, mask=torch.zeros(4, 2, 7, 7))
    assert models.costs(stored, (4, 7, 7)).mask_bytes == 4 * 2 * 49 * 4
    shared = PerturbConv2d(4, 6, 3, padding=1, masks=2, mask=torch.zeros(1, 2, 7, 7), shared_masks=True)
    assert models.costs(shared, (4, 7, 7)).mask_bytes == 2 * 49 * 4
    trained = PerturbConv2d(4, 6, 3, padding=1, mask_size=(7, 7), train_masks=True)
    counted = models.costs(trained, (4, 7, 7))
    assert counted.mask_bytes == 0 and counted.parameters == 6 * 4 + 6 + 4 * 49
    assert models.costs(PerturbConv2d(4, 6, 3, noise=None), (4, 7, 7)).mask_bytes == 0


def test_costs_of_an_lbc_layer():
    layer = LBConv2d(4, 6, anchors=5)
    counted = models.costs(layer, (4, 7, 7))
    assert counted.macs == 49 * (5 * 4 * 9 + 5 * 6)
    assert counted.parameters == 5 * 6 + 6
    assert counted.mask_bytes == sum(b.numel() * b.element_size() for b in layer.buffers() if b.dim() == 4)


def test_costs_count_shared_things_once_and_calls_twice():
    shared = nn.Conv2d(2, 2, 3, padding=1)
    counted = models.costs(nn.Sequential(shared, nn.ReLU(), shared), (2, 4, 4))
    assert counted.parameters == parameters_of(shared)
    assert counted.macs == 2 * 16 * 2 * 18


def test_costs_count_tied_parameters_once():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, bias=False), nn.Conv2d(2, 2, 3, bias=False))
    model[1].weight = model[0].weight
    counted = models.costs(model, (2, 6, 6))
    assert counted.parameters == 36 and counted.macs == 36 * 16 + 36 * 4


def test_costs_leave_the_model_alone():
    model = models.noise_resnet18(width=2, preset="juefeix2018")
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    models.costs(model, (3, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_costs_of_frozen_parameters():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert models.costs(nn.Sequential(nn.Flatten(), *model), (3, 1, 1)).parameters == 10


@pytest.mark.parametrize("layer", LAYERS)
def test_sums_are_the_layers(layer):
    model = models.noise_resnet50(width=2, layer=layer)
    counted = models.costs(model, (3, 8, 8))
    assert counted.parameters == parameters_of(model) == sum(row.parameters for row in counted.layers)
    assert counted.macs == sum(row.macs for row in counted.layers) > 0
    assert counted.mask_bytes == sum(row.mask_bytes for row in counted.layers)
    lines = str(counted).splitlines()
    assert len(lines) == len(counted.layers) + 2 and f"{counted.macs:,}" in lines[-1]


def test_perturbation_is_cheaper_than_convolution():
    conv, perturb = (
        models.costs(models.noise_resnet18(width=4, layer=layer), (3, 8, 8)) for layer in ("conv", "perturb")
    )
    assert perturb.parameters < conv.parameters / 4 and perturb.macs < conv.macs


@pytest.mark.parametrize("size", [(3, 8), (3, 8, 8, 8), 8, "388", (3, 8.0, 8), (3, -1, 8), None, (True, 8, 8)])
def test_costs_refuse_wrong_sizes(size):
    with pytest.raises(ValueError, match="input_size is .*should be"):
        models.costs(nn.Conv2d(3, 3, 3), size)


def test_costs_refuse_what_does_not_run():
    with pytest.raises(TypeError, match="model is of type str"):
        models.costs("model", (3, 8, 8))
    model = nn.Conv2d(3, 3, 3)
    with pytest.raises(ValueError, match="doesn't run through the model"):
        models.costs(model, (4, 8, 8))
    assert not model._forward_hooks and model.training


# Widths


@pytest.mark.parametrize("target", [1, 20, 1000, 12345])
def test_match_width_is_the_nearest(target):
    def build(width):
        return nn.Linear(width, 2 * width)

    counts = {width: parameters_of(build(width)) for width in range(1, 101)}
    best = min(counts, key=lambda width: (abs(counts[width] - target), width))
    assert models.match_width(build, target) == best


def test_match_width_keeps_to_its_limits():
    def build(width):
        return nn.Linear(width, width)

    assert models.match_width(build, 10**9, maximum=17) == 17
    assert models.match_width(build, 1, minimum=5) == 5
    assert models.match_width(build, 900, minimum=3, maximum=3) == 3


def test_match_width_leaves_the_generator_alone():
    state = torch.get_rng_state()
    models.match_width(lambda width: nn.Linear(width, width), 500)
    assert torch.equal(state, torch.get_rng_state())


def test_match_width_meets_a_perturbation_network():
    target = parameters_of(models.noise_resnet18(width=16))
    width = models.match_width(lambda width: models.noise_resnet18(width=width, layer="conv"), target)
    count = parameters_of(models.noise_resnet18(width=width, layer="conv"))
    assert 1 < width < 16 and abs(count - target) < 0.3 * target


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"build": 3}, TypeError, "build is 3"),
        ({"target_parameters": 0}, ValueError, "target_parameters is 0, should be positive"),
        ({"minimum": 0}, ValueError, "minimum and maximum are 0 and 4096"),
        ({"minimum": 9, "maximum": 8}, ValueError, "minimum and maximum are 9 and 8"),
    ],
)
def test_match_width_refusals(arguments, error, words):
    with pytest.raises(error, match=words):
        models.match_width(**{"build": lambda w: nn.Linear(w, w), "target_parameters": 10, **arguments})
