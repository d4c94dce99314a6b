"""One run of an arm: pairing, determinism, exact accuracy, divergence; and the data and arms that it is made of."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ablation_support import changed, tiny_data, tiny_study
from torch import nn

from torch_pnn.ablation import arms, data, training
from torch_pnn.ablation.errors import UsageError
from torch_pnn.ablation.ready import STUDIES
from torch_pnn.ablation.study import DataSettings
from torch_pnn.ablation.worker import attempt


def _train(study, arm, seed, dataset=None, epochs=None):
    rows = [] if epochs is None else epochs
    return training.train(study, arm, seed, dataset or tiny_data(), rows.append)


def _build(study, arm, seed, dataset):
    return arms.build(study, arm, study.streams(seed), dataset)


def _same_but_for_time(first, second):
    timings = ("seconds", "seconds_per_epoch")
    return {k: v for k, v in first.items() if k not in timings} == {k: v for k, v in second.items() if k not in timings}


@pytest.mark.parametrize("arm", list(arms.CATALOGUE))
def test_a_run_done_twice_gives_the_same_bits(arm):
    study = tiny_study(epochs=2)
    curves = [], []
    first, second = (_train(study, arm, 3, epochs=rows) for rows in curves)
    assert _same_but_for_time(first, second)
    assert first["status"] == "finished"
    assert first["initial_sha256"] != first["final_sha256"]
    assert all(_same_but_for_time(a, b) for a, b in zip(*curves, strict=True))
    assert [row["epoch"] for row in curves[0]] == [1, 2]
    other = _train(study, arm, 4)
    assert other["initial_sha256"] != first["initial_sha256"]


def test_the_bits_do_not_depend_on_what_ran_before_or_on_threads():
    study = tiny_study()
    first = _train(study, "pnn", 0)
    threads = torch.get_num_threads()
    torch.manual_seed(99)
    torch.randn(17)
    state = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        assert _train(study, "pnn", 0)["final_sha256"] == first["final_sha256"]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("network", list(arms.NETWORKS))
@pytest.mark.parametrize("arm", ["control", "waves"])
def test_paired_arms_start_from_the_same_bits(network, arm):
    study = tiny_study(network=network, width=8)
    dataset = tiny_data()
    pnn = dict(_build(study, "pnn", 5, dataset).model.named_parameters())
    other = dict(_build(study, arm, 5, dataset).model.named_parameters())
    assert pnn.keys() == other.keys()
    for name, parameter in pnn.items():
        assert torch.equal(parameter, other[name]), name


def test_pairing_does_not_rest_on_how_the_layers_draw_their_weights(monkeypatch):
    plain = arms._network

    def restless(study, arm, streams, *rest):
        return plain(study, arm, {name: seed + len(arm.name) for name, seed in streams.items()}, *rest)

    monkeypatch.setattr(arms, "_network", restless)
    study, dataset = tiny_study(width=8), tiny_data()
    pnn = dict(_build(study, "pnn", 5, dataset).model.named_parameters())
    other = dict(_build(study, "control", 5, dataset).model.named_parameters())
    assert all(torch.equal(parameter, other[name]) for name, parameter in pnn.items())


def test_the_control_differs_in_its_output_by_the_noise_alone():
    study, dataset = tiny_study(width=8), tiny_data()
    with torch.no_grad():
        outputs = {}
        for arm in ("pnn", "control", "waves"):
            outputs[arm] = _build(study, arm, 1, dataset).model(next(dataset.test_batches("test", 1000))[0])
    assert not torch.equal(outputs["pnn"], outputs["control"])
    assert not torch.equal(outputs["pnn"], outputs["waves"])
    quiet = dataclasses.replace(arms.CATALOGUE["pnn"], options={**arms.CATALOGUE["pnn"].options, "level": 0.0})
    model = arms._network(study, quiet, study.streams(1), 8, 1, 10)
    arms.share_weights(model, _build(study, "pnn", 1, dataset).model)
    with torch.no_grad():
        assert torch.equal(model(next(dataset.test_batches("test", 1000))[0]), outputs["control"])


@pytest.mark.parametrize("network", list(arms.NETWORKS))
def test_costs_of_the_arms(network):
    study, dataset = tiny_study(network=network, width=16), tiny_data()
    built = {name: _build(study, name, 0, dataset) for name in arms.CATALOGUE}
    assert built["pnn"].parameters == built["control"].parameters == built["waves"].parameters
    assert built["pnn"].macs == built["control"].macs == built["waves"].macs
    assert built["cnn"].parameters > 3 * built["pnn"].parameters
    # As near as whole channels allow: a wider or narrower one is further off.
    narrow = built["cnn-params"]
    target = built["pnn"].parameters
    assert 0 < narrow.width < 16
    for width in (narrow.width - 1, narrow.width + 1):
        if width:
            off = arms._learnable(arms._network(study, arms.CATALOGUE["cnn"], study.streams(0), width, 1, 10)) - target
            assert abs(narrow.parameters - target) <= abs(off)
    assert built["cnn"].mask_bytes == built["cnn-params"].mask_bytes == 0
    assert built["lbcnn"].mask_bytes > built["pnn"].mask_bytes > 0


def test_every_arm_sees_the_same_batches(monkeypatch):
    seen = {}

    class Spy(nn.Module):
        def __init__(self, arm):
            super().__init__()
            self.linear = nn.Linear(64, 10)
            self.arm = arm

        def forward(self, images):
            if self.training:
                seen.setdefault(self.arm, []).append(images.clone())
            return self.linear(images.flatten(1))

    def build(study, arm, seed, dataset):
        torch.manual_seed(len(arm))  # another state of the default generator for each arm
        return arms.Built(Spy(arm), 1, 1, 0, 1)

    monkeypatch.setattr(training, "build", build)
    study = tiny_study(epochs=2, batch_size=24)
    dataset = tiny_data()
    for arm in ("pnn", "cnn-params"):
        _train(study, arm, 7, dataset)
    assert [len(batch) for batch in seen["pnn"]] == [24, 24, 16] * 2
    for first, second in zip(seen["pnn"], seen["cnn-params"], strict=True):
        assert torch.equal(first, second)
    # Every image once an epoch, in another order each epoch.
    first_epoch, second_epoch = torch.cat(seen["pnn"][:3]), torch.cat(seen["pnn"][3:])
    assert not torch.equal(first_epoch, second_epoch)
    sums = [epoch.flatten(1).sum(1).sort().values for epoch in (first_epoch, second_epoch)]
    assert torch.equal(*sums)
    assert len(sums[0].unique()) == 64


def test_a_diverged_run_is_recorded_and_stops():
    rows = []
    row = _train(tiny_study(learning_rate=1e30, epochs=5), "cnn", 0, epochs=rows)
    assert row["status"] == "diverged"
    assert "the loss became" in row["problem"] or "the test loss became" in row["problem"]
    assert row["accuracy"] is None
    assert row["correct"] is None
    assert row["epochs"] == len(rows) < 5


def test_a_run_that_breaks_becomes_a_row(monkeypatch):
    def fail(*_):
        raise RuntimeError("no such\n  thing")

    monkeypatch.setattr(training, "build", fail)
    row = attempt(tiny_study(), "pnn", 1, tiny_data(), None)
    assert (row["status"], row["problem"]) == ("broken", "RuntimeError: no such thing")


def test_learning_rate_rises_and_falls_to_zero():
    study = changed(STUDIES["digits"], epochs=10, warmup_epochs=2, learning_rate=0.5)
    rates = [training.learning_rate(study, step, 7) for step in range(70)]
    assert max(rates) == rates[13] == 0.5
    assert all(a < b for a, b in zip(rates[:13], rates[1:14], strict=True))
    assert all(a > b for a, b in zip(rates[13:], rates[14:], strict=False))
    assert 0 <= rates[-1] < 1e-12


def test_small_things_are_not_decayed():
    study = tiny_study()
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    decayed, plain = training._optimizer(model, study).param_groups
    assert decayed["weight_decay"] == study.schedule.weight_decay
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert plain["weight_decay"] == 0
    assert [p.ndim for p in plain["params"]] == [1, 1, 1, 1]


def test_unknown_names():
    dataset = tiny_data()
    with pytest.raises(UsageError, match="unknown arm 'ppn'"):
        _build(tiny_study(), "ppn", 0, dataset)
    with pytest.raises(UsageError, match="unknown network 'vgg'"):
        _build(tiny_study(network="vgg"), "pnn", 0, dataset)
    with pytest.raises(UsageError, match="unknown data set 'letters'; there is: digits"):
        data.load(DataSettings("letters"))
