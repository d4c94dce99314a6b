"""TorchScript: scripted, traced, frozen, saved and loaded layers compute the same bits and train."""

import copy
import io

import pytest
import torch
from operators_support import needs_derivatives
from plain_support import assert_same_step, reference_step, step
from torch import nn

from torch_pnn import (
    LBConv2d,
    PerturbBasicBlock,
    PerturbBottleneck,
    PerturbConv2d,
    _library,
    convert,
    functional,
    models,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # 2.13's words about TorchScript
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),  # 2.14's
]

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
    {"mask": torch.linspace(-1, 1, 42).reshape(1, 1, 6, 7)},
    {"seed": 2**64 - 1},
    {"norm": True},
    {"norm": True, "masks": 2, "stride": 2, "downsample": "subsample", "mask_size": (6, 7)},
    {"norm": True, "noise": None, "groups": 2, "bias": False},
    {"shared_masks": True, "masks": 3, "mask_size": (6, 7), "train_masks": True, "level": -0.5},
    {"padding": -1, "kernel_size": 1},
    {"padding": 2, "padding_mode": "circular", "kernel_size": (1, 3)},
    {"padding": (0, 3), "padding_mode": "replicate", "dilation": (1, 2), "stride": (1, 3), "downsample": "avg"},
    *(
        {"activation": name}
        for name in ("identity", "leaky_relu", "elu", "selu", "silu", "tanh", "sigmoid", "hardtanh")
    ),
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


def by_script(model, x):
    return saved_and_loaded(torch.jit.script(copy.deepcopy(model)))


def by_trace(model, x):
    # A second run to check the trace would move running statistics once more.
    return saved_and_loaded(torch.jit.trace(copy.deepcopy(model), x, check_trace=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", [by_script, by_trace])
def test_layers_in_sixteen_bits_compute_the_same_bits(way, dtype):
    layer = PerturbConv2d(4, 6, 3, 2, 1, norm=True, mask_size=(6, 7)).to(dtype).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    expected, found = step(copy.deepcopy(layer), x), step(way(layer, x), x)
    assert torch.equal(found.output, expected.output) and found.output.dtype == dtype
    assert found.output.is_contiguous(memory_format=torch.channels_last)
    for name, gradient in expected.parameters.items():
        assert torch.equal(found.parameters[name], gradient), name


@needs_derivatives
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", [by_script, by_trace])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_layers_give_the_references_values_and_gradients(options, way):
    layer = PerturbConv2d(**({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1} | options))
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    model = layer.double()
    expected = reference_step(model, x)
    assert_same_step(step(way(model, x), x), expected, rtol=1e-10, atol=1e-12, buffers=way is by_script)


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", [by_script, by_trace])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "seed": 2**64 - 1},
        {"kernel_size": (3, 1), "padding": "same", "dilation": 2, "bias": False},
        {"padding": "valid", "anchors": 7, "sparsity": 0.9},
        *({"activation": name} for name in ("identity", "leaky_relu", "elu", "selu", "gelu", "silu", "tanh")),
        *({"activation": name} for name in ("sigmoid", "hardtanh")),
    ],
    ids=str,
)
def test_lbc_gives_the_references_values_and_gradients(options, way):
    layer = LBConv2d(3, 4, **options).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    expected = reference_step(layer, x)
    found = step(way(layer, x), x)
    assert_same_step(found, expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(by_trace(layer, x)(x[:1]), layer(x[:1]))


MODELS = {
    "basic block": lambda: PerturbBasicBlock(3, 6, stride=2, masks=2, seed=1),
    "bottleneck": lambda: PerturbBottleneck(3, 2, stride=(1, 2), norm=True),
    "lenet": lambda: models.lenet(in_channels=3, width=4, masks=2),
    "cifarnet": lambda: models.cifarnet(width=4, layer="lbc"),
    "noise_resnet18": lambda: models.noise_resnet18(width=4, preset="juefeix2018"),
    "imagenet stem": lambda: models.noise_resnet18(width=2, noise="waves", stem="imagenet"),
    "converted": lambda: convert(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2)),
        seed=1,
    ),
}


@pytest.mark.slow
@needs_derivatives
@pytest.mark.parametrize("way", [by_script, by_trace])
@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_references_values_and_gradients(name, way):
    model = MODELS[name]().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for training in (True, False):
        model.train(training)
        expected = reference_step(model, x)
        found = step(way(model, x), x)
        # Tracing runs the model once, which moves the running statistics of the trace.
        assert_same_step(found, expected, rtol=1e-7, atol=1e-9, buffers=way is by_script)


@pytest.mark.slow
@needs_derivatives
@pytest.mark.parametrize("name", MODELS)
def test_frozen_models_give_the_references_values_and_input_gradients(name):
    model = MODELS[name]().double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = reference_step(model, x)
    frozen = saved_and_loaded(torch.jit.freeze(torch.jit.script(copy.deepcopy(model))))
    assert not list(frozen.parameters())
    input = x.clone().requires_grad_()
    for _ in range(3):  # the profiling executor compiles its own graph after the first runs
        y = frozen(input)
        torch.testing.assert_close(y, expected.output, rtol=1e-9, atol=1e-10)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (y * cotangent).sum().backward()
    torch.testing.assert_close(input.grad, expected.input, rtol=1e-7, atol=1e-9)


# In float32 the pass lays PyTorch's own convolutions out for oneDNN, whose opaque tensors no operator of ours takes.
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", [by_script, by_trace])
def test_models_optimised_for_inference_compute_the_same(name, way):
    model = MODELS[name]().eval()
    x = torch.randn(2, 3, 32, 32)
    optimised = torch.jit.optimize_for_inference(way(model, x))
    expected = reference_step(model, x).output
    with torch.no_grad():
        for size in (x, x, x[:1], x):
            y = optimised(size)
            torch.testing.assert_close(y.double(), expected[: len(size)], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@needs_derivatives
def test_a_loaded_model_trains_as_the_eager_one():
    eager = MODELS["noise_resnet18"]()
    loaded = by_script(eager, None)
    x, target = torch.randn(4, 3, 8, 8), torch.tensor([1, 2, 3, 4])
    losses = []
    for model in (eager, loaded):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(4):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[:4] == losses[4:] and losses[3] < losses[0]
    for name, value in eager.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_parts_of_a_script_may_be_ours():
    """A script of somebody else's that calls the functional form, with an int and with a tensor as its seed."""

    @torch.jit.script
    def plain(x: torch.Tensor, weight: torch.Tensor, seed: torch.Tensor):
        return torch.ops.torch_pnn.perturb_conv2d(x, weight, None, None, seed, 2, False, "waves", 0.1, "silu", [1, 2])

    x, weight, seed = torch.randn(2, 3, 5, 6), torch.randn(4, 6, 1, 1), torch.tensor([7])
    expected = functional.perturb_conv2d(
        x, weight, seed=7, masks=2, noise="waves", level=0.1, activation="silu", stride=(1, 2)
    )
    assert torch.equal(plain(x, weight, seed), expected)


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
