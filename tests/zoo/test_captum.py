"""Captum's attribution methods on networks of our layers, beside the same network in plain PyTorch modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from torch_pnn import LBConv2d, PerturbConv2d, functional

attr = pytest.importorskip("captum.attr")


class Plain(nn.Module):
    """What a `PerturbConv2d` computes, in modules that Captum knows one by one."""

    def __init__(self, layer, height, width):
        super().__init__()
        self.register_buffer(
            "shift",
            layer.level
            * functional.perturbation_mask(
                layer.mask_seed, layer.in_channels, layer.masks, height, width, dtype=torch.float64
            ),
        )
        self.activation = nn.ReLU()
        self.mix = nn.Conv2d(layer.in_channels * layer.masks, layer.out_channels, 1, dtype=torch.float64)
        with torch.no_grad():
            self.mix.weight.copy_(layer.weight)
            self.mix.bias.copy_(layer.bias)

    def forward(self, x):
        return self.mix(self.activation((x.unsqueeze(2) + self.shift).flatten(1, 2)))


@pytest.fixture
def networks():
    """A network of our layers and the plain one of the same weights, in float64."""
    layer1 = PerturbConv2d(3, 6, 3, padding=1, masks=2, seed=1, dtype=torch.float64)
    layer2 = PerturbConv2d(6, 5, 3, padding=1, masks=2, seed=2, dtype=torch.float64)
    head = nn.Linear(5, 4, dtype=torch.float64)

    def network(first, second):
        return nn.Sequential(first, nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()

    return network(layer1, layer2), network(Plain(layer1, 8, 8), Plain(layer2, 8, 8))


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


METHODS = {
    "Saliency": lambda model, x: attr.Saliency(model).attribute(x, target=1),
    "InputXGradient": lambda model, x: attr.InputXGradient(model).attribute(x, target=1),
    "IntegratedGradients": lambda model, x: attr.IntegratedGradients(model).attribute(x, target=1, n_steps=20),
    "Occlusion": lambda model, x: attr.Occlusion(model).attribute(x, (3, 4, 4), strides=(3, 4, 4), target=1),
    "FeatureAblation": lambda model, x: attr.FeatureAblation(model).attribute(
        x, target=1, feature_mask=torch.arange(4).reshape(1, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    ),
    "GradientShap": lambda model, x: attr.GradientShap(model).attribute(
        x, baselines=torch.zeros(2, 3, 8, 8, dtype=torch.float64), n_samples=3, target=1
    ),
    "NoiseTunnel": lambda model, x: attr.NoiseTunnel(attr.Saliency(model)).attribute(x, nt_samples=3, target=1),
}


def seeded(method, *arguments):
    torch.manual_seed(0)
    np.random.seed(0)  # GradientShap chooses baselines by it
    return method(*arguments)


@pytest.mark.parametrize("name", METHODS)
def test_methods_on_the_input(name, networks, x):
    ours, plain = networks
    found, wanted = (seeded(METHODS[name], model, x) for model in (ours, plain))
    assert found.abs().sum() > 0
    torch.testing.assert_close(found, wanted)


def test_integrated_gradients_are_complete(networks, x):
    ours, _ = networks
    baseline = torch.zeros_like(x)
    method = attr.IntegratedGradients(ours)
    found, delta = method.attribute(x, baseline, target=2, n_steps=400, return_convergence_delta=True)
    difference = (ours(x) - ours(baseline))[:, 2]
    torch.testing.assert_close(found.sum((1, 2, 3)), difference, rtol=0.02, atol=1e-3)
    assert delta.abs().max() < 0.02


LAYER_METHODS = {
    "LayerActivation": lambda model: (attr.LayerActivation(model, model[0]), {}),
    "LayerGradCam": lambda model: (attr.LayerGradCam(model, model[2]), {"target": 1}),
    "LayerGradientXActivation": lambda model: (attr.LayerGradientXActivation(model, model[0]), {"target": 1}),
    "LayerIntegratedGradients": lambda model: (
        attr.LayerIntegratedGradients(model, model[0]),
        {"target": 1, "n_steps": 10},
    ),
    "LayerConductance": lambda model: (attr.LayerConductance(model, model[0]), {"target": 1, "n_steps": 10}),
    "InternalInfluence": lambda model: (attr.InternalInfluence(model, model[0]), {"target": 1, "n_steps": 10}),
}


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_methods_on_a_layer(name, networks, x):
    found, wanted = (method.attribute(x, **options) for method, options in map(LAYER_METHODS[name], networks))
    assert found.abs().sum() > 0
    torch.testing.assert_close(found, wanted)


def test_grad_cam_is_scaled_to_the_image(networks, x):
    ours, _ = networks
    cam = attr.LayerGradCam(ours, ours[2]).attribute(x, target=1)
    assert cam.shape == (2, 1, 8, 8)
    assert attr.LayerAttribution.interpolate(cam, (16, 16)).shape == (2, 1, 16, 16)
    guided = attr.GuidedGradCam(ours, ours[2]).attribute(x, target=1)
    assert guided.shape == x.shape and guided.isfinite().all()


def identity_network(first_activation, module):
    """Layers without an activation of their own, with the activation as a module between them."""
    layer1 = PerturbConv2d(3, 6, 3, padding=1, activation=first_activation, seed=1, dtype=torch.float64)
    layer2 = PerturbConv2d(6, 4, 3, padding=1, activation="identity", seed=2, dtype=torch.float64)
    return nn.Sequential(layer1, *module, layer2, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


# Methods with rules of their own for activation modules (DeepLift, guided backpropagation, deconvolution) can't see the
# activation inside of a layer: its ordinary derivative is used there. What that means is fixed by the next tests.
def test_guided_backpropagation_changes_the_modules_alone(networks, x):
    ours, plain = networks
    found, wanted = (attr.GuidedBackprop(model).attribute(x, target=1) for model in (ours, plain))
    assert found.isfinite().all() and not torch.allclose(found, wanted)
    model = identity_network("identity", [nn.ReLU()])
    # By hand: of the only activation, a module, the gradient passes where it and the input are positive.
    hidden = model[0](x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(model[2:](hidden.relu())[:, 1].sum(), hidden)
    leaf = x.clone().requires_grad_()
    (by_hand,) = torch.autograd.grad(model[0](leaf), leaf, grad.clamp_min(0))
    torch.testing.assert_close(attr.GuidedBackprop(model).attribute(x, target=1), by_hand)
    assert attr.Deconvolution(model).attribute(x, target=1).isfinite().all()


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")
def test_deep_lift_is_complete_where_activations_are_modules(x):
    baseline = torch.zeros_like(x)
    model = identity_network("identity", [nn.ReLU()])
    found, delta = attr.DeepLift(model).attribute(x, baseline, target=1, return_convergence_delta=True)
    assert delta.abs().max() < 1e-10
    torch.testing.assert_close(found.sum((1, 2, 3)), (model(x) - model(baseline))[:, 1])
    # With the activation inside, its contributions are those of a derivative: finite, not complete.
    inside = identity_network("relu", [nn.ReLU()])
    found, delta = attr.DeepLift(inside).attribute(x, baseline, target=1, return_convergence_delta=True)
    assert found.isfinite().all() and delta.abs().max() > 1e-4


def test_hooks_of_methods_leave_nothing_behind(networks, x):
    ours, _ = networks
    wanted = ours(x)
    attr.LayerGradCam(ours, ours[2]).attribute(x, target=1)
    attr.GuidedBackprop(ours).attribute(x, target=1)
    assert torch.equal(ours(x), wanted)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in ours.modules())


@pytest.mark.parametrize("norm", [False, True])
def test_other_layers_of_ours(norm):
    model = nn.Sequential(
        PerturbConv2d(3, 6, 3, 2, 1, norm=norm), nn.ReLU(), LBConv2d(6, 4), nn.Flatten(), nn.Linear(64, 3)
    )
    model.eval()
    x = torch.randn(2, 3, 8, 8)
    for layer in (model[0], model[2]):
        assert attr.LayerGradCam(model, layer).attribute(x, target=0).shape == (2, 1, 4, 4)
    found = attr.IntegratedGradients(model).attribute(x, target=0, n_steps=5)
    assert found.shape == x.shape and found.abs().sum() > 0
