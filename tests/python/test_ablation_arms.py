"""The arms: pairing, masks between steps and in the test, widths, costs, sweeps; and that each of them learns."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from ablation_support import tiny_data, tiny_study
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from torch_pnn.ablation import arms, data, layers, networks
from torch_pnn.ablation.arms import CATALOGUE, find_arm, sweep
from torch_pnn.ablation.errors import UsageError
from torch_pnn.ablation.layers import make_masks, perturbation_of
from torch_pnn.ablation.study import Arm, DataSettings
from torch_pnn.convert import layer_seed
from torch_pnn.modules import LBConv2d, PerturbConv2d

#: Arms that learn what the PNN learns, under the same names.
FAMILY = [name for name, arm in CATALOGUE.items() if arm.weights_from == "pnn"]


def _build(study, arm, seed=0, dataset=None):
    """An arm of the catalogue, or one made here, for one seed."""
    chosen = find_arm(arm) if isinstance(arm, str) else arm
    others = tuple(item for item in study.arms if item.name != chosen.name)
    study = dataclasses.replace(study, arms=(*others, chosen))
    return arms.build(study, chosen.name, study.streams(seed), dataset or tiny_data())


def _parameters(built):
    return dict(built.model.named_parameters())


def _masks(built):
    """Every layer's masks, written out for the size that it works on."""
    found = {}
    for slot in built.slots:
        layer = perturbation_of(slot.layer)
        assert layer is not None
        size = layer.mask.shape[2:] if layer.mask is not None else (8, 8)
        found[slot.name] = layer.perturbation(*size).detach().clone()
    return found


def _equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# --------------------------------------------------------------------------------------------------------------------
# Pairing
# --------------------------------------------------------------------------------------------------------------------


def test_the_names_are_those_that_studies_use():
    assert (
        list(CATALOGUE)
        == (
            "cnn cnn-params cnn-macs lbcnn pnn pnn-paper pnn-klachko2018 control conv1x1 redrawn waves waves-shuffled "
            "constant other-masks trained frozen-conv shift separable uniform-continuous normal"
        ).split()
    )
    assert all(arm.title and arm.summary.endswith(".") and arm.name == name for name, arm in CATALOGUE.items())
    assert {"control", "waves", "redrawn", "frozen-conv", "shift"} < set(FAMILY)


@pytest.mark.parametrize("network", ["resnet", "lenet"])
@pytest.mark.parametrize("arm", FAMILY)
def test_paired_arms_start_from_the_same_bits(network, arm):
    study = tiny_study(network=network, width=8)
    pnn, other = _parameters(_build(study, "pnn", 5)), _parameters(_build(study, arm, 5))
    extra = {name for name in other if name.endswith(".mask")}
    assert (arm == "trained") == bool(extra)
    assert pnn.keys() == other.keys() - extra
    for name, parameter in pnn.items():
        assert torch.equal(parameter, other[name]), name
    assert not _equal(pnn, _parameters(_build(study, "pnn", 6)))


@pytest.mark.parametrize("arm", CATALOGUE)
def test_every_arm_of_a_width_shares_what_stands_around_its_layers(arm):
    study = tiny_study(width=8)
    cnn, built = _build(study, "cnn", 5), _build(study, arm, 5)
    inner = tuple(place.name for place in networks.find_places("resnet", 10, (1, 8, 8), 8, {}).inner)
    around = {n: p for n, p in _parameters(cnn).items() if not n.startswith(inner)}
    assert len(around) > 15
    if CATALOGUE[arm].match:
        assert built.width < 8
        return
    assert _equal(around, {n: p for n, p in _parameters(built).items() if not n.startswith(inner)})
    # The same convolutions are replaced, and none but those.
    assert tuple(slot.name for slot in built.slots) == (() if CATALOGUE[arm].layer == "conv" else inner)
    assert all(built.model.get_submodule(slot.name) is slot.layer for slot in built.slots)


def test_pairing_does_not_rest_on_how_the_layers_draw_their_weights(monkeypatch):
    plain = arms._network

    def restless(study, arm, streams, *rest):
        return plain(study, arm, {name: seed + len(arm.name) for name, seed in streams.items()}, *rest)

    monkeypatch.setattr(arms, "_network", restless)
    study = tiny_study(width=8)
    pnn, other = _parameters(_build(study, "pnn", 5)), _parameters(_build(study, "control", 5))
    assert _equal(pnn, other)


def test_a_layers_weights_do_not_hang_on_the_layers_before_it():
    """So that a network whose stem is a layer too has the others' weights."""
    plain, more = (_build(tiny_study(options={"stem_layer": stem}), "pnn") for stem in (False, True))
    weights = [{slot.name: slot.layer.weight for slot in built.slots} for built in (plain, more)]
    assert weights[1].pop("stem.0") is not None
    assert _equal(*weights)


def test_shared_weights_leave_trained_masks():
    def net():
        net = nn.Linear(2, 2)
        net.mask = nn.Parameter(torch.rand(2))
        return net

    target, source = net(), net()
    mask = target.mask.detach().clone()
    assert arms.share_weights(target, source) == 2
    assert torch.equal(target.weight, source.weight) and torch.equal(target.mask, mask)


def test_weights_hang_on_one_stream_and_masks_on_another():
    study, dataset = tiny_study(width=8), tiny_data()

    def build(arm, initialisation, masks):
        streams = {"initialisation": initialisation, "masks": masks, "order": 0, "augmentation": 0}
        return arms.build(study, arm, streams, dataset)

    first, weights, masks = build("pnn", 1, 1), build("pnn", 2, 1), build("pnn", 1, 2)
    assert _equal(_masks(first), _masks(weights)) and not _equal(_masks(first), _masks(masks))
    assert _equal(_parameters(first), _parameters(masks)) and not _equal(_parameters(first), _parameters(weights))
    for arm, name in (("lbcnn", "anchor_weight"), ("frozen-conv", "filters")):
        first, weights, masks = (
            [value for key, value in build(arm, *seeds).model.state_dict().items() if key.endswith(name)]
            for seeds in ((1, 1), (2, 1), (1, 2))
        )
        assert len(first) == 6
        assert all(torch.equal(a, b) for a, b in zip(first, weights, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(first, masks, strict=True))


def test_the_pnn_has_the_masks_of_the_converted_network():
    built = _build(tiny_study(width=8), "pnn", 3)
    for slot in built.slots:
        assert slot.layer.seed == layer_seed(3, slot.name)


def test_the_control_differs_in_its_output_by_the_noise_alone():
    study, dataset = tiny_study(width=8), tiny_data()
    images = next(dataset.test_batches("test", 100))[0]
    with torch.no_grad():
        outputs = {name: _build(study, name, 1).model(images) for name in ("pnn", "control", "waves")}
        assert not torch.equal(outputs["pnn"], outputs["control"])
        assert not torch.equal(outputs["pnn"], outputs["waves"])
        quiet = _build(study, "pnn", 1)
        for slot in quiet.slots:
            slot.layer.level = 0.0
        assert torch.equal(quiet.model(images), outputs["control"])


def test_masks_of_each_kind_are_in_the_network():
    study = tiny_study(width=8)
    for name in ("waves-shuffled", "constant", "uniform-continuous"):
        for slot in (built := _build(study, name, 2)).slots:
            mask = slot.layer.mask
            assert torch.equal(mask, make_masks(name, layer_seed(2, slot.name), *mask.shape)), name
        assert {tuple(slot.layer.mask.shape[2:]) for slot in built.slots} == {(8, 8), (4, 4), (2, 2)}
    shuffled, waves = _masks(_build(study, "waves-shuffled", 2)), _build(study, "waves", 2)
    for slot in waves.slots:
        size = shuffled[slot.name].shape[2:]
        values = slot.layer.perturbation(*size).flatten(2).sort().values
        assert torch.equal(values, shuffled[slot.name].flatten(2).sort().values)


def test_normal_masks_have_the_deviation_of_the_uniform_ones():
    study = tiny_study(width=16)
    spread = {}
    for name in ("pnn", "normal", "uniform-continuous"):
        layers_of = [slot.layer for slot in _build(study, name).slots]
        values = [
            layer.level * layer.perturbation(*(layer.mask.shape[2:] if layer.mask is not None else (64, 64)))
            for layer in layers_of
        ]
        spread[name] = float(torch.cat([value.flatten() for value in values]).std())
    assert spread["pnn"] == pytest.approx(0.1 * 3**-0.5, rel=0.01)
    assert spread["normal"] == pytest.approx(spread["pnn"], rel=0.01)
    assert spread["uniform-continuous"] == pytest.approx(spread["pnn"], rel=0.05)


# --------------------------------------------------------------------------------------------------------------------
# Masks between steps and in the test
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", layers.NOISES)
def test_redrawn_masks_hang_on_the_seed_and_the_step_alone(noise):
    study = tiny_study(width=8)
    arm = dataclasses.replace(find_arm("redrawn"), options={"preset": "juefeix2018", "noise": noise})
    built, again = _build(study, arm, 4), _build(study, arm, 4)
    fixed = _masks(built)
    # A layer that is built with the step's seed.
    step = dataclasses.replace(arm, masks="fixed")
    streams = study.streams(4) | {"masks": layer_seed(4, "step 7")}
    expected = arms.build(dataclasses.replace(study, arms=(step,)), step.name, streams, tiny_data())
    for number in (0, 1, 7):
        built.before_step(number)
    again.before_step(7)
    assert _equal(_masks(built), _masks(expected))
    assert _equal(_masks(built), _masks(again))
    assert not any(torch.equal(mask, fixed[name]) for name, mask in _masks(built).items())
    with built.for_test():
        assert _equal(_masks(built), fixed)
    assert _equal(_masks(built), _masks(expected))


@pytest.mark.parametrize("noise", layers.NOISES)
def test_other_masks_while_testing(noise):
    study = tiny_study(width=8)
    arm = dataclasses.replace(find_arm("other-masks"), options={"preset": "juefeix2018", "noise": noise})
    built = _build(study, arm, 4)
    state = {name: value.clone() for name, value in built.model.state_dict().items()}
    before = _masks(built)
    built.before_step(3)
    assert _equal(before, _masks(built))
    with pytest.raises(KeyError), built.for_test(), torch.inference_mode():
        assert not any(torch.equal(mask, before[name]) for name, mask in _masks(built).items())
        other = {name: mask.clone() for name, mask in _masks(built).items()}
        raise KeyError
    assert _equal(before, _masks(built))
    assert _equal(state, dict(built.model.state_dict()))
    with built.for_test():
        assert _equal(other, _masks(built))
    built.model.train()
    copied = copy.deepcopy(built.model)
    assert _equal(state, dict(copied.state_dict()))
    assert all(slot.layer.seed == layer_seed(4, slot.name) for slot in built.slots if noise in layers.RECIPES)


@pytest.mark.parametrize("arm", ["pnn", "control", "trained", "cnn", "shift", "frozen-conv", "waves-shuffled"])
def test_other_arms_keep_their_masks(arm):
    built = _build(tiny_study(width=8), arm)
    before = {name: value.clone() for name, value in built.model.state_dict().items()}
    built.before_step(5)
    with built.for_test():
        assert _equal(before, dict(built.model.state_dict()))


def _steps(built, optimizer, batches, first):
    for step, (images, labels) in enumerate(batches, first):
        built.before_step(step)
        optimizer.zero_grad()
        F.cross_entropy(built.model(images), labels).backward()
        optimizer.step()


@pytest.mark.parametrize("arm", CATALOGUE)
def test_a_run_goes_on_from_its_state_to_the_last_bit(arm):
    study, dataset = tiny_study(width=4), tiny_data()
    batches = list(dataset.train_batches(16, epoch=1, order=0, augmentation=0))
    whole = _build(study, arm, 2)
    optimizer = torch.optim.SGD(whole.model.parameters(), 0.05, momentum=0.9)
    _steps(whole, optimizer, batches[:2], 0)
    file = io.BytesIO()
    torch.save((whole.model.state_dict(), optimizer.state_dict()), file)
    _steps(whole, optimizer, batches[2:], 2)
    file.seek(0)
    model, state = torch.load(file, weights_only=True)
    resumed = _build(study, arm, 2)
    resumed.model.load_state_dict(model)
    other = torch.optim.SGD(resumed.model.parameters(), 0.05, momentum=0.9)
    other.load_state_dict(state)
    _steps(resumed, other, batches[2:], 2)
    assert _equal(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    unpickled = pickle.loads(pickle.dumps(whole.model))
    assert _equal(dict(whole.model.state_dict()), dict(unpickled.state_dict()))


# --------------------------------------------------------------------------------------------------------------------
# Costs and widths
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", CATALOGUE)
def test_costs_are_those_that_pytorch_counts(arm):
    study, dataset = tiny_study(width=8), tiny_data()
    built = _build(study, arm)
    learnable = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    assert built.parameters == learnable
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        built.model.eval()(next(dataset.test_batches("test", 1))[0])
    assert built.macs == counter.get_total_flops() // 2
    stored = 0
    for module in built.model.modules():
        if isinstance(module, LBConv2d):
            stored += module.anchor_weight.numel() * 4
        elif isinstance(module, layers.FrozenConv2d):
            stored += module.filters.numel() * 4
        elif isinstance(module, PerturbConv2d) and isinstance(getattr(module, "mask", None), nn.Parameter):
            pass
        elif isinstance(module, PerturbConv2d) and module.noise is not None and module.level != 0:
            stored += 8 if module.mask is None else module.mask.numel() * 4
    assert built.mask_bytes == stored


def test_costs_of_the_small_network_by_hand():
    """Width 16 on 8×8 pixels: maps of 16, 16→32, 32→64 channels, on 64, 64→16, 16→4 pixels."""
    study = tiny_study(width=16)
    channels = [(16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    pixels = [64, 64, 64, 16, 16, 4]  # that the PNN's layers compute: they pool afterwards
    outputs = [64, 64, 16, 16, 4, 4]
    around = 9 * 16 + 2 * 16 + 2 * sum(t for _, t in channels) + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64 + 64 * 10 + 10
    macs = 9 * 16 * 64 + 16 * 32 * 16 + 32 * 64 * 4 + 64 * 10
    products = sum(c * t for c, t in channels)
    norms = 2 * sum(c for c, _ in channels)
    run = sum(c * t * p for (c, t), p in zip(channels, pixels, strict=True))
    dense = sum(9 * c * c * p for (c, _), p in zip(channels, pixels, strict=True))
    binary = sum((9 * c + t) * t * p for (c, t), p in zip(channels, outputs, strict=True))
    expected = {
        "cnn": (
            around + 9 * products,
            macs + sum(9 * c * t * p for (c, t), p in zip(channels, outputs, strict=True)),
            0,
        ),
        "pnn": (around + products + norms, macs + run, 6 * 8),
        "control": (around + products + norms, macs + run, 0),
        "conv1x1": (around + products, macs + run, 0),
        "frozen-conv": (around + products + norms, macs + run + dense, 4 * sum(9 * c * c for c, _ in channels)),
        "shift": (around + products + norms, macs + run, 0),
        "separable": (
            around + products + norms + sum(9 * c for c, _ in channels),
            macs + sum((9 + t) * c * p for (c, t), p in zip(channels, outputs, strict=True)),
            0,
        ),
        "lbcnn": (
            around + sum(t * t for _, t in channels),
            macs + binary,
            4 * sum(9 * c * t for c, t in channels),
        ),
        "trained": (
            around + products + norms + sum(c * p for (c, _), p in zip(channels, pixels, strict=True)),
            macs + run,
            0,
        ),
        "constant": (
            around + products + norms,
            macs + run,
            4 * sum(c * p for (c, _), p in zip(channels, pixels, strict=True)),
        ),
    }
    for name, numbers in expected.items():
        built = _build(study, name)
        assert (built.parameters, built.macs, built.mask_bytes) == numbers, name


@pytest.mark.parametrize(("name", "cost"), [("cnn-params", "parameters"), ("cnn-macs", "macs")])
@pytest.mark.parametrize("network", ["resnet", "lenet"])
def test_matched_widths_are_the_nearest_there_are(network, name, cost):
    study = tiny_study(network=network, width=16)
    target = getattr(_build(study, "pnn"), cost)
    built = _build(study, name)
    assert built.matched == getattr(built, cost) / target
    assert abs(built.matched - 1) < 0.06
    assert 0 < built.width < 16
    for steps in range(1, 129):
        if abs(steps / 8 - built.width) > 1:
            continue
        other = _build(tiny_study(network=network, width=steps / 8), "cnn")
        assert abs(getattr(other, cost) - target) >= abs(getattr(built, cost) - target), steps / 8
    assert _build(study, "cnn").matched is None


def test_match_refusals(tmp_path, monkeypatch):
    (tmp_path / "fixed_network.py").write_text(
        "from torch import nn\n\ndef net(classes):\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    study = tiny_study(network="fixed_network:net")
    assert _build(study, "pnn").width == 0
    with pytest.raises(UsageError, match="'cnn-params' is matched to pnn by its width, and the network"):
        _build(study, "cnn-params")
    wrong = dataclasses.replace(find_arm("cnn-params"), match_by="time")
    with pytest.raises(UsageError, match="match_by is 'time', it should be parameters or macs"):
        _build(tiny_study(), wrong)


# --------------------------------------------------------------------------------------------------------------------
# Options of the network, positions of the normalisation, sweeps
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["cnn", "pnn", "control"])
def test_a_frozen_stem_is_the_same_in_every_arm_and_no_parameter(arm):
    frozen, plain = (_build(tiny_study(options=options), arm) for options in ({"stem_frozen": True}, {}))
    stem = frozen.model.stem[0].weight
    assert not stem.requires_grad
    assert torch.equal(stem, plain.model.stem[0].weight)
    assert frozen.parameters == plain.parameters - stem.numel()
    assert frozen.mask_bytes == plain.mask_bytes + stem.numel() * 4
    assert frozen.macs == plain.macs


def test_the_stem_can_be_a_layer_too():
    built = _build(tiny_study(options={"stem_layer": True}), "pnn")
    assert isinstance(built.model.stem[0], PerturbConv2d)
    assert built.slots[0].name == "stem.0" and len(built.slots) == 7
    with pytest.raises(UsageError, match="has both stem_frozen and stem_layer"):
        _build(tiny_study(options={"stem_frozen": True, "stem_layer": True}), "pnn")
    with pytest.raises(UsageError, match="model.options.stem_frozen is 1, it should be true or false"):
        _build(tiny_study(options={"stem_frozen": 1}), "pnn")


@pytest.mark.parametrize(
    ("position", "inside", "behind"),
    [("before", True, True), ("after", False, True), ("before-only", True, False), ("none", False, False)],
)
def test_positions_of_the_normalisation(position, inside, behind):
    (arm,) = sweep(find_arm("pnn"), "norm", (position,))
    model = _build(tiny_study(width=8), arm).model
    for block in (model.layer1[0], model.layer2[0], model.layer3[0]):
        for layer, norm in ((block.layer1, block.norm1), (block.layer2, block.norm2)):
            assert (layer.norm is not None) == inside
            assert type(norm) is (nn.BatchNorm2d if behind else nn.Identity)
        shortcut = block.shortcut
        assert isinstance(shortcut, nn.Identity) or isinstance(shortcut[1], nn.BatchNorm2d)
    assert isinstance(model.stem[1], nn.BatchNorm2d)


def test_sweeps():
    pnn = find_arm("pnn")
    for setting, usual in arms.SWEEPS.items():
        swept = sweep(pnn, setting)
        assert [arm.value for arm in swept] == list(usual)
        for arm in swept:
            assert arm.group == setting and arm.name == f"pnn {setting} {arm.value}" and arm.title and arm.phrase
            built = _build(tiny_study(), arm)
            layer = built.slots[0].layer
            if setting == "norm":
                continue
            if setting == "noise":
                assert built.noise == arm.value
                assert layer.level == (pytest.approx(0.1 * 3**-0.5, rel=1e-4) if arm.value == "normal" else 0.1)
            else:
                assert getattr(layer, setting) == arm.value
    waves = sweep(find_arm("waves"), "level", (1, 0.02))
    assert [arm.name for arm in waves] == ["waves level 1", "waves level 0.02"]
    assert waves[0].options == {"preset": "juefeix2018", "noise": "waves", "level": 1}
    # Paired with the arm that their base is paired with.
    pnn = _parameters(_build(tiny_study(), "pnn"))
    assert _equal(pnn, _parameters(_build(tiny_study(), waves[0])))
    assert _equal(pnn, _parameters(_build(tiny_study(), sweep(find_arm("pnn"), "level", (4,))[0])))


@pytest.mark.parametrize(
    ("base", "setting", "value", "words"),
    [
        ("pnn", "colour", 1, "'colour' can't be swept; there is: level, masks, activation, noise, norm"),
        ("cnn", "level", 1, "level can't be swept for the arm 'cnn', whose layer 'conv' has no masks"),
        ("pnn", "level", "loud", "level can't be 'loud'"),
        ("pnn", "level", True, "level can't be True"),
        ("pnn", "masks", 0, "masks can't be 0"),
        ("pnn", "masks", 1.5, "masks can't be 1.5"),
        ("pnn", "noise", "pink", "noise can't be 'pink'"),
        ("pnn", "activation", "swish", "activation can't be 'swish'"),
        ("pnn", "norm", 3, "norm can't be 3"),
    ],
)
def test_sweep_refusals(base, setting, value, words):
    with pytest.raises(UsageError, match=words):
        sweep(find_arm(base), setting, (value,))


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        (Arm("mine", layer="dense"), "arm 'mine': layer is 'dense', it should be one of conv"),
        (Arm("mine", masks="lost"), "arm 'mine': masks is 'lost', it should be one of fixed"),
        (Arm("mine", layer="conv", masks="other"), "arm 'mine': masks is 'other', and the layer 'conv' has none"),
        (Arm("mine", options={"levle": 1}), "arm 'mine', layer layer1.0.layer1 of resnet: unknown option 'levle'"),
        (Arm("mine", options={"level": "x"}), "arm 'mine', layer layer1.0.layer1 of resnet: level is 'x'"),
        (Arm("mine", weights_from="nobody"), "unknown arm 'nobody'; there is: cnn"),
    ],
)
def test_refusals(arm, words):
    with pytest.raises(UsageError, match=words):
        _build(tiny_study(), arm)


# --------------------------------------------------------------------------------------------------------------------
# Learning
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", CATALOGUE)
def test_every_arm_learns_the_digits_in_an_epoch(arm):
    pytest.importorskip("sklearn")
    digits = data.load(DataSettings("digits"))
    torch.manual_seed(0)
    built = _build(tiny_study(width=8), arm, 1, digits)
    optimizer = torch.optim.SGD(built.model.parameters(), 0.05, momentum=0.9)

    def loss():
        built.model.train()  # by the batch's own statistics: running ones lag behind
        with torch.no_grad(), built.for_test():
            return float(F.cross_entropy(built.model(images), labels))

    images, labels = next(digits.test_batches("test", 256))
    before = loss()
    _steps(built, optimizer, digits.train_batches(32, epoch=1, order=0, augmentation=0), 0)
    assert loss() < 0.6 * before
