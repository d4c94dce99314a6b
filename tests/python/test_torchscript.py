"""TorchScript: scripted, traced, frozen, saved and loaded layers compute the same bits and train."""

import copy
import io

import pytest
import torch
from torch import nn

from torch_pnn import LBConv2d, PerturbConv2d, _library

OPTIONS = [
    {},
    {"noise": None},
    {"level": 0.0},
    {"noise": "normal", "activation": "gelu", "masks": 3, "groups": 2},
    {"noise": "waves", "shared_masks": True, "masks": 2, "bias": False},
    {"stride": 2},
    {"stride": (2, 1), "downsample": "avg"},
    {"stride": 2, "downsample": "subsample"},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": "same", "dilation": 2},
    {"padding": 0},
    {"mask_size": (6, 7)},
    {"mask_size": (6, 7), "train_masks": True},
    {"mask": torch.randn(1, 1, 6, 7)},
    {"seed": 2**64 - 1},
    {"norm": True},
    {"norm": True, "masks": 2, "stride": 2, "downsample": "subsample", "mask_size": (6, 7)},
]


def saved_and_loaded(scripted):
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    return torch.jit.load(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("options", OPTIONS)
def test_scripted_layers_compute_the_same_bits_and_train(options):
    layer = PerturbConv2d(**({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1} | options))
    scripted = torch.jit.script(copy.deepcopy(layer))
    loaded = saved_and_loaded(scripted)
    x = torch.randn(2, 4, 6, 7)
    for training in (True, False):
        expected = copy.deepcopy(layer).train(training)
        expected_input = x.clone().requires_grad_()
        y = expected(expected_input)
        y.square().sum().backward()
        for other in (saved_and_loaded(scripted), saved_and_loaded(loaded)):
            other.train(training)
            input = x.clone().requires_grad_()
            z = other(input)
            assert torch.equal(z, y)
            z.square().sum().backward()
            if _library.status().autograd == "loaded":
                assert torch.equal(input.grad, expected_input.grad)
            gradients = {name: p.grad for name, p in other.named_parameters()}
            for name, p in expected.named_parameters():
                assert torch.equal(gradients[name], p.grad), name
            for name, value in expected.state_dict().items():
                assert torch.equal(other.state_dict()[name], value), name
    assert torch.equal(scripted.eval()(x[0]), layer.eval()(x[0]))


@pytest.mark.parametrize(
    "settings",
    [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"affine": False, "momentum": 0.3}],
)
def test_scripted_norms_keep_their_settings(settings):
    layer = PerturbConv2d(3, 4, 3, padding=1, norm=True)
    layer.norm = nn.BatchNorm2d(3, **settings)
    scripted = torch.jit.script(copy.deepcopy(layer))
    for _ in range(3):
        x = torch.randn(2, 3, 5, 5)
        assert torch.equal(scripted.train()(x), layer.train()(x))
        assert torch.equal(scripted.eval()(x), layer.eval()(x))
    for name, value in layer.norm.state_dict().items():
        assert torch.equal(scripted.norm.state_dict()[name], value)


class Doubled(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(input)


@pytest.mark.parametrize("norm", [nn.Identity(), nn.InstanceNorm2d(6)])
@pytest.mark.parametrize("activation", ["relu", "identity", "silu"])
def test_scripted_layers_call_a_replaced_norm(norm, activation):
    layer = PerturbConv2d(3, 4, 3, padding=1, norm=True, masks=2, activation=activation)
    layer.norm = norm
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(torch.jit.script(copy.deepcopy(layer))(x), layer(x))


def test_traced_layers_compute_the_same_bits_at_other_sizes():
    model = nn.Sequential(PerturbConv2d(3, 8, 3, 2, 1, norm=True), PerturbConv2d(8, 4, 3, masks=2)).eval()
    traced = torch.jit.trace(model, torch.randn(1, 3, 16, 16))
    for size in ((1, 3, 16, 16), (3, 3, 21, 9)):
        x = torch.randn(size)
        assert torch.equal(saved_and_loaded(traced)(x), model(x))


@pytest.mark.parametrize("way", ["freeze", "optimize_for_inference"])
def test_frozen_layers_compute_the_same(way):
    model = nn.Sequential(PerturbConv2d(3, 8, 3, 2, 1, norm=True), PerturbConv2d(8, 4, 3, masks=2)).eval()
    frozen = getattr(torch.jit, way)(torch.jit.script(copy.deepcopy(model)))
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(frozen(x), model(x))


def test_a_seed_survives_script_and_save():
    layer = PerturbConv2d(3, 4, 3, seed=2**63 + 5)
    loaded = saved_and_loaded(torch.jit.script(copy.deepcopy(layer)))
    assert torch.equal(loaded.mask_seed, layer.mask_seed) and loaded.mask_version.item() == 1
    fresh = PerturbConv2d(3, 4, 3)
    fresh.load_state_dict(loaded.state_dict())
    x = torch.randn(1, 3, 6, 6)
    assert torch.equal(fresh(x), loaded(x))


def test_scripting_leaves_the_layer_as_it_was():
    layer = PerturbConv2d(3, 4, 3, padding=1, norm=True)
    scripted = torch.jit.script(layer)
    assert type(layer) is PerturbConv2d and layer.norm is not None
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(copy.deepcopy(layer)(x), scripted(x))


def test_lbc_scripts_and_traces():
    layer = LBConv2d(3, 4, stride=2, seed=2**64 - 1)
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(saved_and_loaded(torch.jit.script(copy.deepcopy(layer)))(x), layer(x))
    assert torch.equal(torch.jit.trace(layer, x)(x), layer(x))


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.zeros(1, 4, 8, 8), "it should have 3 channels"),
        (torch.zeros(8, 8), "it should be"),
        (torch.zeros(1, 3, 2, 2), "larger"),
    ],
)
def test_scripted_layers_refuse_with_the_same_sentence(x, sentence):
    scripted = torch.jit.script(PerturbConv2d(3, 4, 3))
    with pytest.raises(Exception, match=sentence):
        scripted(x)


def test_scripted_layers_refuse_other_sizes_than_the_masks():
    scripted = torch.jit.script(PerturbConv2d(3, 4, 3, padding=1, mask_size=8))
    with pytest.raises(Exception, match="it should be 8x8"):
        scripted(torch.zeros(1, 3, 1, 1))
