"""Model conversion: which convolutions are replaced, what carries over, what the table says, and every refusal."""

import copy
import hashlib
import io
import itertools
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from torch_pnn.convert import Conversion, convert, layer_seed
from torch_pnn.modules import PerturbConv2d
from torch_pnn.presets import PerturbMixConv2d


def everything(name, module):
    return True


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def reason_of(model, name, **options):
    plan = convert(model, dry_run=True, **options)
    row = {row.name: row for row in plan.rows}[name]
    assert not row.converted
    return row.reason


# What is converted


def test_defaults_leave_the_stem_and_1x1():
    net = small_net()
    pnn = convert(net)
    assert [row.name for row in pnn.conversion.converted] == ["3", "7"]
    assert [type(pnn[i]) for i in (0, 3, 5, 7)] == [nn.Conv2d, PerturbConv2d, nn.Conv2d, PerturbConv2d]
    assert type(net[3]) is nn.Conv2d and not hasattr(net, "conversion")
    assert pnn[7].groups == 3
    assert pnn[3].bias is not None
    assert pnn(torch.randn(2, 3, 11, 13)).shape == (2, 5)


GEOMETRIES = [
    (kernel, stride, padding, dilation, mode)
    for kernel, stride, padding, dilation, mode in itertools.product(
        (2, 3, (1, 5), (3, 2)), (1, 2, 3, (1, 2)), (0, 1, (2, 0)), (1, 2, (1, 3)), ("zeros", "reflect")
    )
]


@pytest.mark.parametrize("downsample", ["max", "avg", "subsample"])
def test_output_sizes_are_the_convolutions(downsample):
    ran = 0
    for kernel, stride, padding, dilation, mode in GEOMETRIES:
        conv = nn.Conv2d(2, 4, kernel, stride, padding, dilation, padding_mode=mode)
        layer = convert(conv, predicate=everything, downsample=downsample)
        assert isinstance(layer, PerturbConv2d)
        for size in ((13, 15), (14, 16)):
            input = torch.randn(1, 2, *size)
            assert layer(input).shape == conv(input).shape, (kernel, stride, padding, dilation, mode, size)
            ran += 1
    assert ran == 2 * len(GEOMETRIES)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [2, 3, (4, 1)])
def test_padding_by_name(padding, kernel):
    conv = nn.Conv2d(2, 3, kernel, padding=padding)
    input = torch.randn(2, 2, 7, 6)
    assert convert(conv, predicate=everything)(input).shape == conv(input).shape


def test_gradients_are_finite_and_steps_lower_the_loss():
    torch.manual_seed(0)
    pnn = convert(small_net(), seed=1, preset="juefeix2018", example_input=torch.zeros(1, 3, 8, 8))
    input, target = torch.randn(16, 3, 8, 8), torch.randint(5, (16,))
    optimizer = torch.optim.Adam(pnn.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(pnn(input), target)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in pnn.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# The stem


class TwoStems(nn.Module):
    """Two convolutions read the image, one of them after a normalisation; registration order is not call order."""

    def __init__(self):
        super().__init__()
        self.late = nn.Conv2d(11, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 5, padding=2)

    def forward(self, image):
        scaled = self.norm((image - 0.5) * 2)
        return self.late(torch.cat([self.left(scaled), self.right(image), image], 1))


def test_stem_is_what_reads_the_input():
    plan = convert(TwoStems(), example_input=torch.zeros(1, 3, 6, 6), dry_run=True)
    assert {row.name: row.reason for row in plan.left} == {
        "left": "stem: it reads the model's input",
        "right": "stem: it reads the model's input",
    }
    assert [row.name for row in plan.converted] == ["late"]


def test_stem_without_an_example_is_the_first_registered():
    plan = convert(TwoStems(), dry_run=True)
    assert {row.name: row.reason for row in plan.left} == {"late": "stem: the first convolution in registration order"}


class Arguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3)
        self.second = nn.Conv2d(3, 3, 3)

    def forward(self, image, scale):
        return self.second(self.first(image) * scale)


@pytest.mark.parametrize(
    "example", [(torch.zeros(1, 3, 8, 8), 2.0), {"image": torch.zeros(1, 3, 8, 8), "scale": 2.0}], ids=["tuple", "dict"]
)
def test_example_arguments(example):
    assert [row.name for row in convert(Arguments(), example_input=example, dry_run=True).left] == ["first"]


def test_tracing_leaves_the_model_and_the_generator_alone():
    net = small_net().train()
    state = copy.deepcopy(net.state_dict())
    generator = torch.get_rng_state()
    convert(net, example_input=torch.ones(2, 3, 8, 8), dry_run=True)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), net.state_dict().values(), strict=True))
    assert all(module.training for module in net.modules())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_tracing_runs_in_evaluation_mode():
    """In training mode batch normalisation refuses a single value for each channel."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))
    plan = convert(model.train(), example_input=torch.zeros(1, 3, 8, 8), dry_run=True)
    assert [row.name for row in plan.converted] == ["3"]


@pytest.mark.parametrize("example", [torch.zeros(1, 4, 8, 8), "image", (), [1, 2]])
def test_example_that_does_not_fit(example):
    with pytest.raises(ValueError, match="example_input"):
        convert(small_net(), example_input=example)


# What is left, and why


class Custom(nn.Conv2d):
    pass


class CustomForward(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 2


def after_a_stem(module):
    return nn.Sequential(nn.Conv2d(3, 4, 3), module)


def weight_normed(module):
    return parametrizations.weight_norm(module)


def pruned(module):
    prune.l1_unstructured(module, "weight", 0.5)
    return module


@pytest.mark.parametrize(
    "module, words, predicate_wins",
    [
        (lambda: nn.Conv2d(4, 8, 1), "1x1 convolution", True),
        (lambda: nn.Conv2d(4, 8, 1, stride=2), "1x1 convolution", True),
        (lambda: nn.Conv2d(4, 8, 3, groups=4), "depthwise convolution", True),
        (lambda: Custom(4, 8, 3), "subclass .*Custom of nn.Conv2d", True),
        (lambda: CustomForward(4, 8, 3), "subclass .*CustomForward with a forward of its own", False),
        (lambda: nn.ConvTranspose2d(4, 8, 3), "transposed convolution", False),
        (lambda: nn.Conv1d(4, 8, 3), "1-d convolution", False),
        (lambda: nn.Conv3d(4, 8, 3), "3-d convolution", False),
        (lambda: nn.LazyConv2d(8, 3), "lazy: its sizes aren't known until the model has run once", False),
        (lambda: weight_normed(nn.Conv2d(4, 8, 3)), r"computed by a parametrization \(WeightNorm\)", False),
        (lambda: pruned(nn.Conv2d(4, 8, 3)), "computed by a hook", False),
        (lambda: nn.Conv2d(4, 8, 3, dtype=torch.complex64), "data type torch.complex64", False),
    ],
)
def test_left_with_a_reason(module, words, predicate_wins):
    model = after_a_stem(module())
    row = convert(model, dry_run=True).rows[1]
    assert not row.converted

    assert re.search(words, row.reason), row.reason
    assert convert(model, dry_run=True, predicate=lambda name, m: name == "1").rows[1].converted is predicate_wins
    assert re.search(words, str(convert(model, dry_run=True)))
    kind = type(model[1])
    assert type(convert(model, inplace=True)[1]) is kind


def test_shared_weight_is_left():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[2].weight = model[1].weight
    assert reason_of(model, "1") == "its parameters are shared by 1, 2"
    assert reason_of(model, "2") == "its parameters are shared by 1, 2"


def test_lazy_layer_is_converted_once_it_knows_its_size():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(8, 3))
    pnn = convert(model)
    assert not pnn.conversion.converted
    pnn(torch.zeros(1, 3, 8, 8))
    assert isinstance(convert(pnn)[1], PerturbConv2d)


def test_predicate_overrides_and_none_means_the_rules():
    model = small_net()
    wanted = {"0": True, "3": False, "5": None, "7": None}
    seen = []

    def predicate(name, module):
        seen.append((name, module))
        return wanted[name]

    plan = convert(model, predicate=predicate, dry_run=True)
    assert [row.name for row in plan.converted] == ["0", "7"]
    assert {row.name: row.reason for row in plan.left} == {"3": "left by the predicate", "5": "1x1 convolution"}
    assert seen == [(name, model[int(name)]) for name in wanted]
    pnn = convert(model, predicate=predicate)
    assert [module for _, module in seen[4:]] == [module for _, module in seen[:4]]
    assert isinstance(pnn[0], PerturbConv2d)


# What carries over


def test_dtype_mode_and_requires_grad_carry_over():
    model = small_net().double().eval()
    model[3].weight.requires_grad_(False)
    model[7].bias.requires_grad_(False)
    pnn = convert(model, norm=True)
    assert pnn[3].weight.dtype == torch.float64 and pnn[3].bias.dtype == torch.float64
    assert not pnn[3].training and not pnn[3].norm.training
    assert not pnn[3].weight.requires_grad and pnn[3].bias.requires_grad
    assert not pnn[3].norm.weight.requires_grad
    assert pnn[7].weight.requires_grad and not pnn[7].bias.requires_grad
    assert pnn(torch.zeros(1, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


def test_meta_device_carries_over():
    with torch.device("meta"):
        model = small_net()
    pnn = convert(model, seed=0)
    assert all(tensor.is_meta for tensor in (*pnn.parameters(), *pnn.buffers()))


def test_hooks_and_their_handles_carry_over():
    model = small_net()
    calls = []
    before = model[3].register_forward_pre_hook(lambda m, args: calls.append(("pre", type(m))))
    after = model[3].register_forward_hook(
        lambda m, args, kwargs, output: calls.append(("post", type(m))), with_kwargs=True
    )
    backward = model[3].register_full_backward_hook(lambda m, gi, go: calls.append(("backward", type(m))))
    convert(model, inplace=True)
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    assert calls == [(when, PerturbConv2d) for when in ("pre", "post", "backward")]
    for handle in (before, after, backward):
        handle.remove()
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    assert len(calls) == 3


def test_shared_modules_stay_shared():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict(
        {"stem": nn.Conv2d(3, 4, 3), "a": nn.Sequential(shared, nn.ReLU()), "b": nn.ModuleList([shared])}
    )
    pnn = convert(model, seed=5)
    assert pnn["a"][0] is pnn["b"][0] and isinstance(pnn["a"][0], PerturbConv2d)
    (row,) = pnn.conversion.converted
    assert row.name == "a.0" and row.aliases == ("b.0",)
    assert row.seed == layer_seed(5, "a.0")


class Aliases(nn.Module):
    """Refers to its layers outside the registered children too."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.conv = nn.Conv2d(4, 4, 3)
        self.in_a_list = [self.conv, "other"]
        self.in_a_dict = {"conv": self.conv}
        self.in_a_tuple = (self.conv, 1)
        self.the_same_tuple = self.in_a_tuple
        self.in_a_tuple_in_a_dict = {"pair": (1, [self.conv])}
        self.loop = [self.in_a_list]
        self.loop.append(self.loop)
        self.__dict__["plain"] = self.conv


def test_aliases_in_plain_attributes_follow():
    model = convert(Aliases())
    assert isinstance(model.conv, PerturbConv2d)
    assert model.in_a_list[0] is model.conv and model.in_a_dict["conv"] is model.conv
    assert model.in_a_tuple_in_a_dict["pair"][1][0] is model.conv
    assert model.in_a_tuple is model.the_same_tuple
    assert model.in_a_tuple[0] is model.conv and model.__dict__["plain"] is model.conv


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_models_of_other_kinds_around_and_inside():
    inner = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), inner)
    pnn = convert(model)
    assert isinstance(pnn[1], PerturbConv2d) and pnn(torch.zeros(1, 3, 8, 8)).shape == (1, 8, 4, 4)

    graph = convert(torch.fx.symbolic_trace(small_net()), seed=1)
    assert len(graph.conversion.converted) == 2
    assert graph(torch.randn(1, 3, 8, 8)).shape == (1, 5)

    wrapped = convert(torch.nn.DataParallel(small_net()), seed=2)
    assert int(wrapped.module[3].mask_seed) == int(convert(small_net(), seed=2)[3].mask_seed)


def test_the_model_itself():
    conv = nn.Conv2d(3, 4, 3)
    assert type(convert(conv)) is nn.Conv2d
    layer = convert(conv, inplace=True, predicate=everything)
    assert isinstance(layer, PerturbConv2d) and layer.conversion.converted[0].name == ""
    assert "(the model)" in str(layer.conversion)


# Repeating, planning, keeping


def test_second_conversion_changes_nothing():
    for options in ({}, {"predicate": lambda name, m: name == "0"}, {"example_input": torch.zeros(1, 3, 8, 8)}):
        once = convert(small_net(), seed=3, **options)
        twice = convert(once, seed=4)
        assert twice.conversion == once.conversion
        assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
        assert all(
            torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values(), strict=True)
        )


def test_second_conversion_of_two_stems_and_of_mixing_layers():
    model = convert(TwoStems(), example_input=torch.zeros(1, 3, 6, 6), preset="klachko2018", masks=2)
    assert isinstance(model.late, PerturbMixConv2d)
    again = convert(model)
    assert type(again.left) is nn.Conv2d and type(again.right) is nn.Conv2d
    assert again.conversion == model.conversion


def test_a_later_predicate_extends_the_table():
    first = convert(small_net())
    second = convert(first, predicate=lambda name, m: True if name == "5" else None)
    assert {row.name for row in second.conversion.converted} == {"3", "5", "7"}
    assert second.conversion.parameters_before == sum(p.numel() for p in small_net().parameters())
    assert second.conversion.parameters_after == sum(p.numel() for p in second.parameters())


def test_dry_run_touches_nothing():
    model = small_net()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    generator = torch.get_rng_state()
    plan = convert(model, dry_run=True, inplace=True, norm=True)
    assert isinstance(plan, Conversion) and plan.dry_run
    assert torch.equal(generator, torch.get_rng_state())
    assert [type(module) for module in model.modules()] == types and not hasattr(model, "conversion")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    done = convert(model, norm=True).conversion
    assert done.rows == plan.rows and done.parameters_after == plan.parameters_after
    assert "2 would be converted, 2 left" in str(plan) and "2 converted, 2 left" in str(done)


def test_parameter_counts():
    model = small_net()
    pnn = convert(model, masks=3, norm=True)
    record = pnn.conversion
    assert record.parameters_before == sum(p.numel() for p in model.parameters())
    assert record.parameters_after == sum(p.numel() for p in pnn.parameters())
    rows = {row.name: row for row in record.rows}
    assert rows["3"].parameters_before == 8 * 8 * 9 + 8
    assert rows["3"].parameters_after == 8 * 8 * 3 + 8 + 2 * 8 * 3


def test_table_survives_copying_pickling_and_saving():
    pnn = convert(small_net(), seed=9)
    assert copy.deepcopy(pnn).conversion == pnn.conversion
    assert pickle.loads(pickle.dumps(pnn)).conversion == pnn.conversion
    buffer = io.BytesIO()
    torch.save(pnn.state_dict(), buffer)
    buffer.seek(0)
    fresh = convert(small_net())
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    pnn.eval(), fresh.eval()
    input = torch.randn(2, 3, 8, 8)
    assert torch.equal(pnn(input), fresh(input))


@pytest.mark.parametrize("preset", [None, "paper", "juefeix2018", "klachko2018"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripting_and_tracing_after_conversion(preset):
    options = {"masks": 2} if preset == "klachko2018" else {}
    pnn = convert(small_net(), seed=2, preset=preset, **options).eval()
    input = torch.randn(2, 3, 8, 8)
    expected = pnn(input)
    assert torch.equal(torch.jit.script(pnn)(input), expected)
    assert torch.equal(torch.jit.trace(pnn, input)(input), expected)


# Seeds


def independent_seed(seed, name):
    message = (seed & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little") + name.encode("utf-8")
    digest = bytearray(hashlib.sha256(message).digest()[:8])
    return sum(byte << (8 * place) for place, byte in enumerate(digest))


@pytest.mark.parametrize("seed", [0, 1, 12345, -1, -(2**63), 2**63, 2**64 - 1])
def test_layer_seeds(seed):
    pnn = convert(small_net(), seed=seed)
    for index in ("3", "7"):
        expected = independent_seed(seed, index)
        assert layer_seed(seed, index) == expected
        stored = int(pnn[int(index)].mask_seed)
        assert stored % 2**64 == expected
    assert int(pnn[3].mask_seed) != int(pnn[7].mask_seed)


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.block.conv",
        "_orig_mod.block.conv",
        "module._orig_mod.block.conv",
        "_orig_mod.module.block.conv",
        "block._orig_mod.conv",
        "_fsdp_wrapped_module.block._fsdp_wrapped_module.conv",
        "block._checkpoint_wrapped_module.conv",
    ],
)
def test_wrapper_prefixes_do_not_change_seeds(wrapped):
    assert layer_seed(7, wrapped) == independent_seed(7, "block.conv")


def test_a_module_named_module_inside_keeps_its_name():
    assert layer_seed(7, "block.module.conv") == independent_seed(7, "block.module.conv")


def test_wrapped_model_gets_the_same_masks():
    plain = convert(small_net(), seed=11)
    wrapped = convert(nn.Sequential(), seed=11)
    wrapped.module = small_net()
    wrapped = convert(wrapped, seed=11)
    assert int(wrapped.module[3].mask_seed) == int(plain[3].mask_seed)


def test_without_a_seed_the_default_generator_decides():
    torch.manual_seed(4)
    first = convert(small_net())
    second = convert(small_net())
    torch.manual_seed(4)
    again = convert(small_net())
    assert int(first[3].mask_seed) == int(again[3].mask_seed) != int(second[3].mask_seed)


# Trained masks


def test_trained_masks_take_their_sizes_from_the_run():
    pnn = convert(small_net(), train_masks=True, masks=2, example_input=torch.zeros(1, 3, 9, 8))
    assert pnn[3].mask.shape == (8, 2, 9, 8)
    assert pnn[7].mask.shape[-2:] == (5, 4)
    assert pnn[3].mask.requires_grad
    pnn(torch.randn(2, 3, 9, 8)).sum().backward()
    assert pnn[3].mask.grad.isfinite().all()


@pytest.mark.parametrize(
    "options, size",
    [
        ({"padding": 0}, (7, 8)),
        ({"padding": (2, 3)}, (11, 14)),
        ({"padding": 1, "dilation": 2}, (7, 8)),
        ({"padding": "same"}, (9, 10)),
        ({"padding": "valid", "dilation": (1, 2)}, (7, 6)),
        ({"stride": 2, "padding": 1}, (9, 10)),
    ],
)
def test_trained_masks_have_the_padded_size(options, size):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, **options))
    input = torch.randn(1, 3, 9, 10)
    pnn = convert(model, train_masks=True, example_input=input)
    assert tuple(pnn[1].mask.shape) == (4, 1, *size)
    assert pnn(input).shape == model(input).shape


def test_trained_masks_without_a_size():
    with pytest.raises(ValueError, match="train_masks=True needs .* example_input"):
        convert(small_net(), train_masks=True)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.unused = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.stem(x)


def test_trained_masks_of_a_layer_that_never_ran():
    with pytest.raises(ValueError, match="unused: train_masks=True needs the size"):
        convert(Unused(), train_masks=True, example_input=torch.zeros(1, 3, 8, 8))


# Refusals


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"model": "net"}, TypeError, "model is of type str, should be an nn.Module"),
        ({"model": nn.Conv2d}, TypeError, "model is the class Conv2d, should be an nn.Module"),
        ({"seed": True}, TypeError, "seed is True"),
        ({"seed": 1.0}, TypeError, "seed is 1.0"),
        ({"seed": 2**64}, ValueError, r"should be in \[-2\*\*63, 2\*\*64\)"),
        ({"seed": -(2**63) - 1}, ValueError, r"should be in \[-2\*\*63, 2\*\*64\)"),
        ({"predicate": "conv"}, TypeError, "predicate is 'conv'"),
        ({"predicate": lambda name, m: "yes"}, TypeError, "predicate returned 'yes' for '0'"),
        ({"preset": "papre"}, ValueError, "preset is 'papre', should be one of 'paper'"),
        ({"preset": 3}, ValueError, "preset is 3"),
        ({"levle": 0.1}, TypeError, "unknown option 'levle'.*did you mean 'level'"),
        ({"mask": torch.zeros(1)}, TypeError, "option 'mask' is one layer's tensor"),
        ({"inplace": 1}, TypeError, "inplace is 1"),
        ({"dry_run": None}, TypeError, "dry_run is None"),
        ({"mixing": "yes"}, TypeError, "mixing is 'yes'"),
        ({"masks": 0}, ValueError, "^3: .*masks"),
    ],
)
def test_refusals_change_nothing(arguments, error, words):
    model = small_net()
    types = [type(module) for module in model.modules()]
    with pytest.raises(error, match=words):
        convert(**{"model": model, "inplace": True, **arguments})
    assert [type(module) for module in model.modules()] == types


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_models_are_refused():
    with pytest.raises(TypeError, match="scripted module"):
        convert(torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 3))))


def test_an_attribute_of_the_same_name_is_not_overwritten():
    model = small_net()
    model.register_module("conversion", nn.ReLU())
    with pytest.raises(ValueError, match="attribute 'conversion' of type ReLU"):
        convert(model)


def test_a_model_that_can_not_be_copied():
    class Uncopiable(nn.Sequential):
        def __deepcopy__(self, memo):
            raise ValueError("holds a socket")

    model = Uncopiable(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    with pytest.raises(RuntimeError, match="can't be copied.*inplace=True"):
        convert(model)
    assert isinstance(convert(model, inplace=True)[1], PerturbConv2d)


# Models that others wrote


def shapes_inside(model, input):
    """The output sizes of all modules, in the order of their calls."""
    seen = []
    handles = [m.register_forward_hook(lambda m, i, o: seen.append(o.shape)) for m in model.modules()]
    model(input)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchvision_resnet18():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    input = torch.randn(4, 3, 64, 64)
    pnn = convert(model, seed=0, example_input=input[:1])
    assert {row.name for row in pnn.conversion.left} == {
        "conv1", "layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0",
    }  # fmt: skip
    assert len(pnn.conversion.converted) == 16
    assert shapes_inside(pnn.eval(), input) == shapes_inside(model.eval(), input)
    scripted = torch.jit.script(pnn)
    assert torch.equal(scripted(input), pnn(input))
    pnn.train()
    optimizer = torch.optim.SGD(pnn.parameters(), 0.05)
    target = torch.randint(10, (4,))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(pnn(input), target)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in pnn.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
