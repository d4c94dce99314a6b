"""PyTorch's quantisation tools leave our layers in floating point, or refuse them; none drops the perturbation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from torch_pnn import LBConv2d, PerturbConv2d

quantization = pytest.importorskip("torch.ao.quantization")
quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.backends.quantized.supported_engines, reason="no quantised kernels in this PyTorch"),
]


@pytest.fixture(autouse=True)
def engine():
    """The kernels that every processor has, where there are any others than none."""
    before = torch.backends.quantized.engine
    engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    torch.backends.quantized.engine = "qnnpack" if "qnnpack" in engines else engines[0]
    yield torch.backends.quantized.engine
    torch.backends.quantized.engine = before


def network():
    return nn.Sequential(
        PerturbConv2d(3, 8, 3, norm=True, seed=1),
        nn.ReLU(),
        LBConv2d(8, 4, seed=2),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
    ).eval()


def test_dynamic_quantisation_takes_the_linear_layers_alone():
    model, x = network(), torch.randn(2, 3, 8, 8)
    quantised = quantization.quantize_dynamic(model)
    assert type(quantised[0]) is PerturbConv2d and type(quantised[2]) is LBConv2d
    assert "quantized" in type(quantised[4]).__module__
    assert torch.equal(quantised[:4](x), model[:4](x))
    torch.testing.assert_close(quantised(x), model(x), rtol=0.1, atol=0.1)
    # Named explicitly our layers stay as well: there is nothing to put in their place.
    named = quantization.quantize_dynamic(model, {nn.Linear, PerturbConv2d, LBConv2d})
    assert type(named[0]) is PerturbConv2d and torch.equal(named[:4](x), model[:4](x))


def test_fusing_for_quantisation_is_refused():
    model = nn.Sequential(PerturbConv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    for names in (["0", "1"], ["0", "1", "2"]):
        with pytest.raises(AssertionError, match="did not find fuser method for: .*PerturbConv2d"):
            quantization.fuse_modules(model, names)


def test_static_quantisation_around_our_layers(engine):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(quantization.QuantStub(), nn.Conv2d(3, 4, 3), quantization.DeQuantStub())
            self.body = PerturbConv2d(4, 6, 3, norm=True, seed=1)
            self.head = nn.Sequential(quantization.QuantStub(), nn.Conv2d(6, 2, 3), quantization.DeQuantStub())

        def forward(self, x):
            return self.head(self.body(self.stem(x)))

    model, x = Net().eval(), torch.rand(4, 3, 9, 9)
    model.qconfig = quantization.get_default_qconfig(engine)
    model.body.qconfig = None
    prepared = quantization.prepare(model)
    prepared(x)
    converted = quantization.convert(prepared)
    assert type(converted.body) is PerturbConv2d and type(converted.body.norm) is nn.BatchNorm2d
    assert "quantized" in type(converted.head[1]).__module__
    torch.testing.assert_close(converted(x), model(x), rtol=0.1, atol=0.1)


def test_graph_mode_quantisation_keeps_our_layers_in_floating_point(engine):
    model, x = network(), torch.rand(4, 3, 8, 8)
    mapping = quantization.get_default_qconfig_mapping(engine)
    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (x,))
    prepared(x)
    converted = quantize_fx.convert_fx(prepared)
    kinds = {type(module) for module in converted.modules()}
    assert {PerturbConv2d, LBConv2d} <= kinds
    torch.testing.assert_close(converted(x), model(x), rtol=0.1, atol=0.2)


def test_what_knows_convolutions_does_not_take_ours_for_one():
    assert not isinstance(PerturbConv2d(3, 4, 3), nn.Conv2d) and not isinstance(LBConv2d(3, 4), nn.Conv2d)
