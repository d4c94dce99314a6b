"""Models whose code looks at its convolutions: what stays right is converted, what would go wrong is left and named."""

import functools
import re
from collections import OrderedDict, deque, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_pnn.convert import convert
from torch_pnn.modules import PerturbConv2d

INPUT = torch.zeros(2, 3, 9, 8)


class Net(nn.Module):
    """A stem and a convolution; the subclasses differ in how they call the latter."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x):
        return self.conv(self.stem(x))


def reason_of(model, example=INPUT, name="conv"):
    """Why it was left, None where it was converted; the plan and the deed agree, and the result runs."""
    plan = convert(model, example_input=example, dry_run=True)
    done = convert(model, example_input=example)
    assert done.conversion.rows == plan.rows
    assert done(INPUT).shape == model(INPUT).shape
    row = {row.name: row for row in plan.rows}[name]
    assert isinstance(done.get_submodule(name), PerturbConv2d) == row.converted
    return None if row.converted else row.reason


# Code that uses the weight


class ByFunction(Net):
    def forward(self, x):
        return F.conv2d(self.stem(x), self.conv.weight, self.conv.bias, padding=1)


class ByLocalName(Net):
    def forward(self, x):
        for layer in (self.stem, self.conv):
            x = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
        return x


class ByMethod(Net):
    def forward(self, x):
        x = self.stem(x)
        return self.conv._conv_forward(x, self.conv.weight * 2, self.conv.bias)


class BesidesCalling(Net):
    def forward(self, x):
        return self.conv(self.stem(x)) + self.conv.weight.sum()


class ByShape(Net):
    def forward(self, x):
        pad = self.conv.weight.shape[-1] // 2
        return self.conv(F.pad(self.stem(x), [pad, pad, pad, pad]))


class ByData(Net):
    def forward(self, x):
        return F.conv2d(self.stem(x), self.conv.weight.data, padding=1)


@pytest.mark.parametrize("kind", [ByFunction, ByLocalName, ByMethod, BesidesCalling, ByShape, ByData])
def test_uses_of_the_weight_are_seen_in_a_run(kind):
    assert "weight is" in reason_of(kind())
    assert "its weight is used outside its own forward (by " in str(convert(kind(), example_input=INPUT, dry_run=True))


@pytest.mark.parametrize("kind", [ByFunction, ByMethod, BesidesCalling, ByShape, ByData])
def test_uses_that_are_spelt_out_are_seen_without_a_run(kind):
    assert reason_of(kind(), None) == f"its weight is read by {kind.__name__}.forward (self.conv.weight)"


class InABranch(Net):
    """A run in evaluation mode doesn't come by."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.conv])

    def forward(self, x):
        x = self.stem(x)
        return self.blocks[0](x) if not self.training else F.conv2d(x, self.blocks[0].weight, padding=1)


@pytest.mark.parametrize("example", [None, INPUT], ids=["code", "code and run"])
def test_uses_in_a_branch_that_no_run_takes(example):
    assert reason_of(InABranch(), example) == "its weight is read by InABranch.forward (self.blocks[0].weight)"


class InAnInnerFunction(Net):
    """As for `torch.utils.checkpoint`; the path goes through a ModuleDict."""

    def __init__(self):
        super().__init__()
        self.table = nn.ModuleDict({"last": self.conv})

    def forward(self, x):
        def rest(x):
            return F.conv2d(x, self.table["last"].weight, padding=1)

        return rest(self.stem(x))


def test_uses_in_an_inner_function_and_under_a_key():
    reason = reason_of(InAnInnerFunction(), None)
    assert reason == "its weight is read by InAnInnerFunction.forward (self.table['last'].weight)"


class InAHelper(Net):
    def penalty(self):
        return self.conv.weight.abs().sum()


def test_uses_in_other_methods():
    assert reason_of(InAHelper(), None) == "its weight is read by InAHelper.penalty (self.conv.weight)"


def test_a_predicate_overrules_it():
    model = InAHelper()
    assert isinstance(convert(model, predicate=lambda name, m: name == "conv").conv, PerturbConv2d)


def test_overruled_and_wrong_is_an_error_and_changes_nothing():
    model = ByMethod()
    with pytest.raises(RuntimeError, match="not with perturbation layers in their place .*_conv_forward.*predicate"):
        convert(model, inplace=True, predicate=lambda name, m: name == "conv", example_input=INPUT)
    assert type(model.conv) is nn.Conv2d and not hasattr(model, "conversion")


# Code that asks for what a perturbation layer has too


class ByAttributes(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(self.conv.out_channels)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x):
        conv = self.conv
        x = self.stem(x.to(self.conv.weight.dtype).to(conv.weight.device))
        assert x.shape[1] == conv.in_channels and conv.weight.dim() == 4 and conv.weight.is_floating_point()
        assert conv.bias.shape[0] == conv.out_channels and conv.groups == 1 and conv.padding_mode == "zeros"
        size = [x.shape[axis + 2] + 2 * conv.padding[axis] for axis in (0, 1)]
        size = [
            (size[axis] - conv.dilation[axis] * (conv.kernel_size[axis] - 1) - 1) // conv.stride[axis] + 1
            for axis in (0, 1)
        ]
        y = self.norm(conv(x.to(conv.weight)))
        assert list(y.shape[-2:]) == size
        return y


@pytest.mark.parametrize("example", [None, INPUT], ids=["code", "code and run"])
def test_attributes_that_hold_for_both_are_no_reason(example):
    assert reason_of(ByAttributes(), example) is None


def test_building_on_a_converted_layer():
    """Init code that runs after a conversion finds the sizes it wants."""
    body = convert(Net())
    head = nn.Conv2d(body.conv.out_channels, 2 * body.conv.in_channels, body.conv.kernel_size, body.conv.stride)
    assert nn.Sequential(body, head)(INPUT).shape == (2, 8, 7, 6)


def test_apply_with_an_initialisation_passes_the_layers_by():
    model = convert(Net(), seed=1)
    before = model.conv.weight.clone()

    def initialise(module):
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 7.0)

    model.apply(initialise)
    assert torch.equal(model.conv.weight, before) and (model.stem.weight == 7).all()


class Penalised(Net):
    def forward(self, x):
        return self.conv(self.stem(x)), sum(p.numel() for p in self.parameters())


def test_counting_parameters_is_no_reason():
    plan = convert(Penalised(), example_input=INPUT, dry_run=True)
    assert [row.name for row in plan.converted] == ["conv"]


def test_hooks_of_the_convolution_may_read_it():
    model = Net()
    model.conv.register_forward_pre_hook(lambda m, args: m.weight.sum() and None)
    model.conv.register_forward_hook(lambda m, args, output: output + m.weight.sum())
    assert reason_of(model) is None


class HeldAsParameter(Net):
    def __init__(self):
        super().__init__()
        self.kernel = self.conv.weight

    def forward(self, x):
        return F.conv2d(self.stem(x), self.kernel, padding=1)


class HeldInAList(Net):
    def __init__(self):
        super().__init__()
        self.kernels = [("first", {"kernel": self.conv.weight})]
        self.kernels.append(self.kernels)

    def forward(self, x):
        return F.conv2d(self.stem(x), self.kernels[0][1]["kernel"], padding=1)


@pytest.mark.parametrize("kind, holder", [(HeldAsParameter, r"\(the model\), conv"), (HeldInAList, "conv, kernels")])
def test_weights_that_init_code_laid_by(kind, holder):
    assert re.fullmatch(f"its parameters are shared by {holder}", reason_of(kind(), None))


# Code that asks for the class, or holds the convolution elsewhere


class ByClass(Net):
    def forward(self, x):
        for layer in self.children():
            if isinstance(layer, nn.Conv2d):
                x = layer(x)
        return F.pad(x, [0, 0, 0, 0, 0, 6 - x.shape[1]])


def test_a_model_that_asks_for_the_class():
    assert reason_of(ByClass()) == "the model doesn't call it any more when it is no nn.Conv2d"


class InAPartial(Net):
    def __init__(self):
        super().__init__()
        self.run = functools.partial(self.conv)

    def forward(self, x):
        return self.run(self.stem(x))


class InABoundMethod(Net):
    def __init__(self):
        super().__init__()
        self.run = self.conv.__call__

    def forward(self, x):
        return self.run(self.stem(x))


class InAClosure(Net):
    def __init__(self):
        super().__init__()
        conv = self.conv
        self.run = lambda x: conv(x)

    def forward(self, x):
        return self.run(self.stem(x))


class Holder:
    def __init__(self, conv):
        self.conv = conv


class InAnObject(Net):
    def __init__(self):
        super().__init__()
        self.holder = Holder(self.conv)

    def forward(self, x):
        return self.holder.conv(self.stem(x))


@pytest.mark.parametrize("kind", [InAPartial, InABoundMethod, InAClosure, InAnObject])
def test_references_out_of_reach(kind):
    model = kind()
    reason = convert(model, example_input=INPUT, dry_run=True).rows[1].reason
    assert "calls" in reason and ("refers to this module" in reason or "copy of the model shares" in reason)
    convert(model, example_input=INPUT, inplace=True)
    assert type(model.conv) is nn.Conv2d and model(INPUT).shape == (2, 6, 9, 8)
    assert not model.conv._forward_pre_hooks and not model.conv._forward_hooks


@pytest.mark.parametrize("kind", [ByLocalName, ByClass, InAPartial, InABoundMethod])
def test_what_a_run_showed_is_remembered(kind):
    once = convert(kind(), example_input=INPUT)
    twice = convert(once)
    assert type(twice.conv) is nn.Conv2d and twice.conversion == once.conversion


Pair = namedtuple("Pair", "conv other")


class InContainers(Net):
    def __init__(self):
        super().__init__()
        self.ordered = OrderedDict(conv=self.conv)
        self.named = Pair(self.conv, 1)
        self.queue = deque([self.conv, 2])
        self.as_set = {self.conv, 3}
        self.frozen = frozenset([self.conv])
        self.key = {self.conv: "conv", self.stem: "stem"}
        self.nested = [(1, {"here": self.named})]

    def forward(self, x):
        return self.ordered["conv"](self.stem(x))


def test_references_in_containers_follow():
    model = InContainers()
    assert reason_of(model) is None
    convert(model, inplace=True)
    conv = model.conv
    assert isinstance(conv, PerturbConv2d)
    assert model.ordered["conv"] is conv and model.queue[0] is conv and conv in model.as_set and conv in model.frozen
    assert model.named == Pair(conv, 1) and type(model.named) is Pair
    assert list(model.key) == [conv, model.stem] and model.key[conv] == "conv"
    assert model.nested[0][1]["here"].conv is conv


def test_a_forward_on_the_module_itself():
    model = Net()
    inner = model.conv.forward
    model.conv.forward = lambda x: inner(x) * 2
    assert reason_of(model) == "its forward was replaced on the module itself"
    assert not convert(model, predicate=lambda name, m: True).conversion.rows[1].converted


class Varying(Net):
    def forward(self, x):
        return self.conv(self.stem(x)).mean() + self.conv(self.stem(x[..., ::2])).mean()


def test_trained_masks_and_several_sizes():
    with pytest.raises(ValueError, match=r"conv: train_masks=True .* several \(9x4, 9x8\); leave it by the predicate"):
        convert(Varying(), train_masks=True, example_input=INPUT)
    pnn = convert(Varying(), example_input=INPUT)
    assert isinstance(pnn.conv, PerturbConv2d)


def test_the_generators_are_left_alone_by_both_runs():
    torch.manual_seed(5)
    expected = convert(Net()).conv.weight
    torch.manual_seed(5)
    assert torch.equal(convert(Net(), example_input=INPUT).conv.weight, expected)


def test_a_compiled_model():
    model = torch.compile(Net(), backend="eager")
    pnn = convert(model, example_input=INPUT, seed=3)
    assert isinstance(pnn.conv, PerturbConv2d) and pnn(INPUT).shape == (2, 6, 9, 8)
    assert int(pnn.conv.mask_seed) == int(convert(Net(), seed=3).conv.mask_seed)


def test_markdown():
    model = Net()
    lines = convert(model, example_input=INPUT, dry_run=True).markdown().splitlines()
    assert lines[0] == "| module | kind | geometry | became | parameters | why |"
    assert lines[2] == "| stem | Conv2d | 3->4, 3x3 | left | 112 | stem: it reads the model's input |"
    assert lines[3] == "| conv | Conv2d | 4->6, 3x3 | converted | 222 -> 30 | PerturbConv2d |"
    assert lines[-1].startswith("1 would be converted, 1 left")
    plan = convert(model, dry_run=True)
    assert plan._repr_markdown_() == plan.markdown()
