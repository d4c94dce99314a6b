"""`restore`: what comes back, what happened to it in between, and every refusal."""

import copy
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import torch_pnn
from torch_pnn.convert import convert, layer_seed
from torch_pnn.modules import PerturbConv2d
from torch_pnn.presets import PerturbMixConv2d
from torch_pnn.restore import restore


def everything(name, module):
    return True


def small_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, (3, 5), 2, (1, 2), padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding="same", dilation=2, groups=4, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


GEOMETRY = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)


def same_architecture(one, other):
    assert [(name, type(module)) for name, module in one.named_modules()] == [
        (name, type(module)) for name, module in other.named_modules()
    ]
    for first, second in zip(one.modules(), other.modules(), strict=True):
        if isinstance(first, nn.Conv2d):
            assert all(getattr(first, what) == getattr(second, what) for what in GEOMETRY)
            assert (first.bias is None) == (second.bias is None)


def same_state(one, other):
    assert list(one.state_dict()) == list(other.state_dict())
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# With the weights kept


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm": True}, {"preset": "klachko2018", "masks": 2}], ids=str)
def test_kept_weights_come_back(inplace, options):
    net = small_net()
    before = copy.deepcopy(net)
    pnn = convert(net, seed=1, keep_original=True, inplace=inplace, **options)
    assert pnn.conversion.keep_original and len(pnn.conversion.converted) == 2
    back = restore(pnn, inplace=inplace)
    assert (back is pnn) == inplace
    assert isinstance(pnn[3], PerturbConv2d | PerturbMixConv2d) != inplace
    same_architecture(back, before)
    assert same_state(back, before)
    input = torch.randn(2, 3, 9, 10)
    assert torch.equal(back.eval()(input), before.eval()(input))
    assert not hasattr(back, "conversion")


def test_inplace_gives_the_very_modules_back():
    net = small_net()
    convolutions, weights = [net[3], net[5]], [net[3].weight, net[5].weight]
    convert(net, inplace=True, keep_original=True)
    restore(net, inplace=True)
    assert all(a is b for a, b in zip((net[3], net[5]), convolutions, strict=True))
    assert all(a is b for a, b in zip((net[3].weight, net[5].weight), weights, strict=True))


def test_no_warning_with_kept_weights():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore(convert(small_net(), keep_original=True))


# Without


def test_fresh_weights_by_default_and_a_warning():
    net = small_net()
    pnn = convert(net, seed=1)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="2 of 2 restored convolutions have fresh weights.*keep_original=True"):
        back = restore(pnn)
    same_architecture(back, net)
    assert not torch.equal(back[3].weight, net[3].weight)
    assert torch.equal(back[0].weight, net[0].weight) and torch.equal(back[8].weight, net[8].weight)
    torch.manual_seed(3)
    drawn = nn.Conv2d(8, 8, (3, 5), 2, (1, 2), padding_mode="reflect")
    assert torch.equal(back[3].weight, drawn.weight) and torch.equal(back[3].bias, drawn.bias)
    back.load_state_dict(net.state_dict())
    assert same_state(back, net)


def test_without_weights_nothing_is_held():
    net = small_net()
    state = copy.deepcopy(net.state_dict())
    pnn = convert(net, inplace=True)
    assert pnn[3]._original.module.weight.is_meta and pnn[3]._original.module.bias.is_meta
    held = io.BytesIO()
    torch.save(convert(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(128, 128, 3))), held)
    assert held.tell() < 128 * 128 * 4 * 2  # V, and not nine times as much
    kept = io.BytesIO()
    torch.save(convert(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(128, 128, 3)), keep_original=True), kept)
    assert kept.tell() > 128 * 128 * 4 * 10
    assert torch.equal(net[0].weight, state["0.weight"])


def test_a_convolution_that_the_caller_holds_stays_whole():
    net = small_net()
    conv = net[3]
    handle = conv.register_forward_hook(lambda m, i, o: None)
    convert(net, inplace=True)
    assert not conv.weight.is_meta and conv(torch.randn(1, 8, 5, 5)).shape == (1, 8, 3, 3)
    handle.remove()


# What happens in between


def test_originals_are_not_counted_moved_saved_or_trained():
    net = small_net()
    plain, kept = convert(net, seed=1), convert(net, seed=1, keep_original=True)
    assert [name for name, _ in kept.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(kept.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in kept.named_modules()] == [name for name, _ in plain.named_modules()]
    assert kept.conversion.parameters_after == plain.conversion.parameters_after
    optimizer = torch.optim.SGD(kept.parameters(), 0.5)
    kept(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert torch.equal(restore(kept)[3].weight, net[3].weight)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pnn: pickle.loads(pickle.dumps(pnn))], ids=["copy", "pickle"])
@pytest.mark.parametrize("keep", [False, True])
def test_copies_and_pickles_can_be_restored(copied, keep):
    net = small_net()
    pnn = convert(net, keep_original=keep)
    twin = copied(pnn)
    assert twin[3]._original.module is not pnn[3]._original.module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = restore(twin, inplace=True)
    same_architecture(back, net)
    assert same_state(back, net) == keep
    assert isinstance(pnn[3], PerturbConv2d)
    with torch.no_grad():
        back[3].weight.zero_()
    assert not keep or torch.equal(restore(pnn)[3].weight, net[3].weight)


def test_saved_and_loaded_as_a_whole():
    pnn = convert(small_net(), keep_original=True)
    buffer = io.BytesIO()
    torch.save(pnn, buffer)
    buffer.seek(0)
    assert same_state(restore(torch.load(buffer, weights_only=False)), restore(pnn))


def test_a_state_dict_brings_no_originals():
    net, other = small_net(), small_net()
    pnn = convert(net, keep_original=True)
    pnn.load_state_dict(convert(other, keep_original=True).state_dict())
    assert torch.equal(restore(pnn)[3].weight, net[3].weight)
    assert torch.equal(restore(pnn)[0].weight, other[0].weight)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.filterwarnings("ignore:.*fresh weights")
def test_type_device_mode_and_requires_grad_are_the_layers(keep):
    pnn = convert(small_net().eval(), keep_original=keep).double()
    pnn[3].train()
    pnn[3].bias.requires_grad_(False)
    pnn[5].weight.requires_grad_(False)
    back = restore(pnn)
    assert all(p.dtype == torch.float64 for p in back.parameters())
    assert back[3].training and not back[5].training
    assert back[3].weight.requires_grad and not back[3].bias.requires_grad and not back[5].weight.requires_grad
    assert restore(pnn.to("meta"))[3].weight.is_meta
    empty = restore(convert(small_net(), keep_original=keep).to("meta").to_empty(device="cpu"))
    assert empty[3].weight.device.type == "cpu"


def test_a_model_on_meta():
    with torch.device("meta"):
        net = small_net()
    back = restore(convert(net, keep_original=True))
    same_architecture(back, net)
    assert all(p.is_meta for p in back.parameters())


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.filterwarnings("ignore:.*fresh weights")
def test_hooks_go_there_and_back(keep):
    net = small_net()
    calls = []
    handles = [net[3].register_forward_hook(lambda m, i, o: calls.append(("early", type(m))))]
    convert(net, inplace=True, keep_original=keep)
    handles.append(net[3].register_forward_pre_hook(lambda m, i: calls.append(("late", type(m)))))
    handles.append(net[3].register_full_backward_hook(lambda m, gi, go: calls.append(("backward", type(m)))))
    restore(net, inplace=True)
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    assert calls == [("late", nn.Conv2d), ("early", nn.Conv2d), ("backward", nn.Conv2d)]
    for handle in handles:
        handle.remove()
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    assert len(calls) == 3


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.filterwarnings("ignore:.*fresh weights")
def test_hooks_that_were_cleared_meanwhile_stay_away(keep):
    """By the common way of clearing them, which puts another table in the old one's place."""
    net = small_net()
    net[3].register_forward_hook(lambda m, i, o: pytest.fail("called"))
    convert(net, inplace=True, keep_original=keep)
    net[3]._forward_hooks = OrderedDict()
    restore(net, inplace=True)(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.filterwarnings("ignore:.*fresh weights")
def test_shared_modules_and_aliases(keep):
    shared = nn.Conv2d(4, 4, 3, padding=1)
    net = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "a": nn.Sequential(shared), "b": nn.ModuleList([shared])})
    net.alias = {"one": [shared]}
    pnn = convert(net, keep_original=keep)
    assert isinstance(pnn.alias["one"][0], PerturbConv2d)
    back = restore(pnn)
    assert type(back["a"][0]) is nn.Conv2d
    assert back["a"][0] is back["b"][0] and back.alias["one"][0] is back["a"][0]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_layer_that_was_changed_since():
    """Parametrized, pruned or weight-normed: the layer goes, and what computes its weight with it."""
    net = small_net()
    for change in (
        parametrizations.weight_norm,
        nn.utils.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ):
        pnn = convert(net, keep_original=True)
        change(pnn[3])
        back = restore(pnn, inplace=True)
        assert same_state(back, net)
        assert torch.equal(back.eval()(torch.ones(1, 3, 8, 8)), net.eval()(torch.ones(1, 3, 8, 8)))


class Scaled(nn.Conv2d):
    """A subclass that only a predicate converts; it has a parameter and a buffer of its own."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scale = nn.Parameter(torch.full((1,), 3.0))
        self.register_buffer("seen", torch.full((1,), 4.0))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.filterwarnings("ignore:.*fresh weights")
def test_subclasses_come_back_as_themselves(keep):
    net = nn.Sequential(Scaled(3, 4, 3), Scaled(4, 4, 3))
    back = restore(convert(net, predicate=everything, keep_original=keep))
    assert type(back[0]) is Scaled and type(back[1]) is Scaled
    assert back[1].scale.item() == 3.0 and back[1].seen.item() == 4.0
    assert torch.equal(back[1].weight, net[1].weight) == keep


# Parts, wholes, and repetition


def test_a_part_and_a_whole():
    pnn = convert(small_net(), keep_original=True)
    part = restore(pnn[3])
    assert type(part) is nn.Conv2d
    around = nn.Sequential(pnn, PerturbConv2d(3, 3, 3))
    back = restore(around)
    assert type(back[0][3]) is nn.Conv2d and isinstance(back[1], PerturbConv2d)
    assert not hasattr(back[0], "conversion") and hasattr(pnn, "conversion")


def test_the_model_itself():
    conv = nn.Conv2d(3, 4, 3)
    layer = convert(conv, predicate=everything, keep_original=True)
    back = restore(layer, inplace=True)
    assert type(back) is nn.Conv2d and torch.equal(back.weight, conv.weight)


def test_there_and_back_and_there_again():
    net = small_net()
    first = convert(net, seed=5, keep_original=True)
    second = convert(restore(first), seed=5, keep_original=True)
    assert second.conversion == first.conversion
    assert int(second[3].mask_seed) % 2**64 == layer_seed(5, "3")
    assert same_state(restore(second), net)


def test_two_conversions_with_and_without_the_weights():
    net = small_net()
    pnn = convert(convert(net, keep_original=True), predicate=lambda name, m: True if name == "0" else None)
    with pytest.warns(UserWarning, match="1 of 3 restored"):
        back = restore(pnn)
    assert torch.equal(back[3].weight, net[3].weight) and not torch.equal(back[0].weight, net[0].weight)


def test_a_conversion_that_converted_nothing():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    pnn = convert(net)
    back = restore(pnn)
    assert hasattr(pnn, "conversion") and not hasattr(back, "conversion")
    assert same_state(back, net)


def test_graph_modules_and_wrappers():
    net = small_net()
    graph = convert(torch.fx.symbolic_trace(net), keep_original=True)
    input = torch.randn(2, 3, 8, 8)
    assert torch.equal(restore(graph).eval()(input), net.eval()(input))
    wrapped = convert(nn.DataParallel(net), keep_original=True)
    assert type(restore(wrapped).module[3]) is nn.Conv2d


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("keep", [False, True])
def test_scripted_exported_and_compiled_like_any_other(keep):
    pnn = convert(small_net(), seed=1, keep_original=keep).eval()
    input = torch.randn(2, 3, 8, 8)
    expected = pnn(input)
    assert torch.equal(torch.jit.script(pnn)(input), expected)
    assert torch.equal(torch.jit.trace(pnn, input)(input), expected)
    assert torch.equal(torch.export.export(pnn, (input,)).module()(input), expected)
    assert torch.equal(torch.compile(pnn, backend="eager", fullgraph=True)(input), expected)


# Refusals


@pytest.mark.parametrize(
    "model, error, words",
    [
        ("net", TypeError, "model is of type str, should be an nn.Module"),
        (nn.Conv2d, TypeError, "model is the class Conv2d, should be an nn.Module"),
        (nn.Sequential(nn.Conv2d(3, 3, 3)), ValueError, "no layer that torch_pnn.convert made"),
        (PerturbConv2d(3, 3, 3), ValueError, "no layer that torch_pnn.convert made"),
    ],
)
def test_refusals(model, error, words):
    with pytest.raises(error, match=words):
        restore(model)


def test_after_a_fusion():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)).eval()
    pnn = convert(net, keep_original=True)
    fused = torch_pnn.fuse(pnn)
    with pytest.raises(ValueError, match="^1: torch_pnn.fuse folded the normalisation .*restore first, then fuse"):
        restore(fused)
    with pytest.raises(ValueError, match="^0.1: torch_pnn.fuse"):
        restore(nn.Sequential(fused))
    assert isinstance(fused[1], PerturbConv2d) and isinstance(fused[3], PerturbConv2d)
    assert same_state(restore(pnn), net)


def test_bad_flags():
    pnn = convert(small_net())
    with pytest.raises(TypeError, match="inplace is 1, should be True or False"):
        restore(pnn, inplace=1)
    with pytest.raises(TypeError, match="keep_original is 'yes', should be True or False"):
        convert(small_net(), keep_original="yes")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_models_are_refused():
    with pytest.raises(TypeError, match="scripted module"):
        restore(torch.jit.script(convert(small_net())))


def test_a_model_that_can_not_be_copied():
    class Uncopiable(nn.Sequential):
        def __deepcopy__(self, memo):
            raise ValueError("holds a socket")

    model = Uncopiable(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    convert(model, inplace=True, keep_original=True)
    with pytest.raises(RuntimeError, match="can't be copied.*inplace=True"):
        restore(model)
    assert type(restore(model, inplace=True)[1]) is nn.Conv2d


def test_it_is_public():
    assert torch_pnn.restore is restore
