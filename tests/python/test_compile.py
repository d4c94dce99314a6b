"""torch.compile: whole graphs with our operators in them, forward and backward, and no recompilation without reason."""

from __future__ import annotations

import copy

import pytest
import torch
from graphs_support import check_against_reference, layers, operators
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

from torch_pnn import LBConv2d, PerturbConv2d, functional, models

OPTIONS = [
    {},
    {"norm": True},
    {"noise": "normal", "activation": "gelu", "masks": 3},
    {"shared_masks": True, "masks": 2, "bias": False},
    {"downsample": "avg"},
    {"downsample": "subsample", "norm": True},
    {"noise": None},
    {"mask_size": (12, 10), "train_masks": True},
]
SIZES = ((2, 3, 12, 10), (3, 3, 12, 10), (5, 3, 9, 17))


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No graphs from other tests, which would count towards the limit of recompilations."""
    torch.compiler.reset()


class Graphs:
    """A backend that runs what AOTAutograd traced, and keeps the names of our operators in each graph.

    Attributes:
        forward: a list of names for each compilation.
        backward: likewise.
    """

    def __init__(self):
        self.forward = []
        self.backward = []
        self.backend = aot_autograd(fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward))

    def _keep(self, where):
        def compiler(graph_module, inputs):
            where.append(operators(graph_module))
            return make_boxed_func(graph_module.forward)

        return compiler


def use_functorch():
    """After a first transform functorch's state stays for the rest of the process."""
    torch.func.grad(lambda x: functional.perturb_conv2d(x, torch.ones(1, 1, 1, 1), seed=1).sum())(
        torch.ones(1, 1, 2, 2)
    )


CALLS = [(options, True) for options in OPTIONS] + [(OPTIONS[1], False), (OPTIONS[7], False)]


@pytest.mark.parametrize(
    ("options", "dynamic"), [pytest.param(*call, marks=[pytest.mark.slow] * (n > 1)) for n, call in enumerate(CALLS)]
)
def test_our_operators_are_in_both_graphs_and_right(options, dynamic):
    model = layers(**options)
    compiled_model, graphs = copy.deepcopy(model), Graphs()
    compiled = torch.compile(compiled_model, fullgraph=True, backend=graphs.backend, dynamic=dynamic)
    first = "perturb_norm_conv2d" if options.get("norm") else "perturb_conv2d"
    for size in SIZES[:1] if "mask_size" in options else SIZES:
        # In training the running statistics move, of which only the batch's moments are compared.
        check_against_reference(compiled, dict(compiled_model.named_parameters()), model, torch.randn(size))
    for names in graphs.forward:
        assert names == [first, "perturb_conv2d"]
    for names in graphs.backward:
        assert names == ["_perturb_conv2d_backward", f"_{first}_backward"]
    assert len(graphs.forward) == len(graphs.backward)
    if dynamic:
        assert len(graphs.forward) == 1
    else:
        assert len(graphs.forward) == (1 if "mask_size" in options else 3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_they_stay_in_the_graphs_after_a_transform(dynamic):
    use_functorch()
    graphs = Graphs()
    model = layers(norm=True)
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend, dynamic=dynamic)
    compiled(torch.randn(2, 3, 8, 8, requires_grad=True)).sum().backward()
    assert graphs.forward == [["perturb_norm_conv2d", "perturb_conv2d"]]
    assert graphs.backward == [["_perturb_conv2d_backward", "_perturb_norm_conv2d_backward"]]


def test_evaluation_and_inference_compile():
    model = layers(norm=True).eval()
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    with torch.inference_mode():
        assert torch.equal(compiled(x), model(x))
    assert all(names == ["perturb_norm_conv2d", "perturb_conv2d"] for names in graphs.forward)


def test_running_statistics_follow():
    model = layers(norm=True)
    compiled_model = copy.deepcopy(model)
    compiled = torch.compile(compiled_model, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in SIZES:
        x = torch.randn(size)
        assert torch.equal(compiled(x), model(x))
    for name, value in model.state_dict().items():
        assert torch.equal(compiled_model.state_dict()[name], value), name


def test_layers_with_other_seeds_share_one_graph():
    counter = CompileCounterWithBackend("eager")
    run = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend=counter, dynamic=True)
    for seed in range(12):
        layer = PerturbConv2d(4, 4, 3, padding=1, seed=seed, norm=True)
        x = torch.randn(2 + seed % 3, 4, 8 + seed, 9)
        assert torch.equal(run(layer, x), copy.deepcopy(layer)(x))
        layer.reseed(seed + 100)
        assert torch.equal(run(layer, x), copy.deepcopy(layer)(x))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_deep_network_is_one_graph_for_all_batches():
    model = models.noise_resnet18(10, width=4, seed=1).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 7):
            x = torch.randn(batch, 3, 32, 32)
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


def test_functions_with_a_seed_as_a_number_compile():
    weight = torch.randn(4, 3, 1, 1)
    compiled = torch.compile(
        lambda x: functional.perturb_conv2d(x, weight, seed=2**63 + 1, level=0.3), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(compiled(x), functional.perturb_conv2d(x, weight, seed=2**63 + 1, level=0.3))
    masks = torch.compile(lambda s: functional.perturbation_mask(s, 3, 2, 4, 5), fullgraph=True, backend="aot_eager")
    seed = torch.tensor([7])
    assert torch.equal(masks(seed), functional.perturbation_mask(7, 3, 2, 4, 5))


def test_wrong_input_fails_with_our_sentence_while_compiling():
    compiled = torch.compile(PerturbConv2d(3, 4, 3, padding=1), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"it should have 3 channels"):
        compiled(torch.zeros(1, 4, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", OPTIONS[1:4])
def test_inductor_gives_values_and_gradients_of_the_reference(options, dynamic):
    model = layers(**options)
    compiled_model = copy.deepcopy(model)
    compiled = torch.compile(compiled_model, fullgraph=True, dynamic=dynamic)
    for size in SIZES[:2] if dynamic else SIZES[:1]:
        check_against_reference(compiled, dict(compiled_model.named_parameters()), model, torch.randn(size))


@pytest.mark.slow
def test_inductor_keeps_channels_last_and_compiles_what_is_around():
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        PerturbConv2d(8, 8, 3, padding=1, norm=True, seed=4),
        LBConv2d(8, 8, seed=5),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    ).to(memory_format=torch.channels_last)
    compiled_model = copy.deepcopy(model)
    compiled = torch.compile(compiled_model, fullgraph=True)
    x = torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last)
    y, z = model(x), compiled(x)
    torch.testing.assert_close(z, y)
    assert z.stride() == y.stride()
    y.square().sum().backward()
    z.square().sum().backward()
    for name, parameter in model.named_parameters():
        found = compiled_model.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, atol=2e-4, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_compiled_code_may_lay_our_operators_tensors_out_as_it_likes():
    # Without the tag Inductor copies every layer's input to the strides of the trace.
    for name in ("perturb_conv2d", "perturb_norm_conv2d", "_perturb_conv2d_backward"):
        assert torch.Tag.flexible_layout in getattr(torch.ops.torch_pnn, name).default.tags
