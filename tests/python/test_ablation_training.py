"""One run of an arm: pairing, determinism, exact accuracy, divergence; and the data and arms that it is made of."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch
from ablation_support import tiny_data, tiny_study
from torch import nn

from torch_pnn import PerturbConv2d
from torch_pnn.ablation import arms, data, memory, training
from torch_pnn.ablation.data import Dataset
from torch_pnn.ablation.errors import UsageError
from torch_pnn.ablation.study import DataSettings, Schedule
from torch_pnn.ablation.worker import attempt


def _train(study, arm, seed, dataset=None, epochs=None):
    rows = [] if epochs is None else epochs
    return training.train(study, arm, seed, dataset or tiny_data(), rows.append)


def _build(study, arm, seed, dataset):
    return arms.build(study, arm, study.streams(seed), dataset)


def _same_but_for_time(first, second):
    timings = ("seconds", "seconds_per_epoch", "peak_memory_bytes")
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
    schedule = Schedule(epochs=10, warmup_epochs=2, learning_rate=0.5)
    rates = [training.learning_rate(schedule, step, 7) for step in range(70)]
    assert max(rates) == rates[13] == 0.5
    assert all(a < b for a, b in zip(rates[:13], rates[1:14], strict=True))
    assert all(a > b for a, b in zip(rates[13:], rates[14:], strict=False))
    assert 0 <= rates[-1] < 1e-12


def test_learning_rate_in_steps_and_constant():
    schedule = Schedule(epochs=6, warmup_epochs=1, learning_rate=0.5, decay="steps", milestones=(2, 4), factor=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], 0.1)
    for epoch in range(6):
        if epoch:  # the first one is the warm-up
            assert training.learning_rate(schedule, 5 * epoch, 5) == pytest.approx(optimizer.param_groups[0]["lr"])
            assert training.learning_rate(schedule, 5 * epoch + 4, 5) == training.learning_rate(schedule, 5 * epoch, 5)
        optimizer.step()
        theirs.step()
    constant = dataclasses.replace(schedule, decay="constant")
    assert {training.learning_rate(constant, step, 5) for step in range(4, 30)} == {0.5}
    with pytest.raises(UsageError, match="unknown decay 'linear'; there is: cosine, steps, constant"):
        training.learning_rate(dataclasses.replace(schedule, decay="linear"), 29, 5)


def test_small_things_and_masks_are_not_decayed():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    for name, kind in {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.items():
        schedule = Schedule(optimizer=name)
        optimizer = training.make_optimizer(model, schedule)
        assert type(optimizer) is kind
        decayed, plain = optimizer.param_groups
        assert decayed["weight_decay"] == schedule.weight_decay
        assert [p.ndim for p in decayed["params"]] == [4, 2]
        assert plain["weight_decay"] == 0
        assert [p.ndim for p in plain["params"]] == [1, 1, 1, 1]
    trained = PerturbConv2d(2, 3, 1, train_masks=True, mask_size=(4, 4), norm=True)
    decayed, plain = training.make_optimizer(trained, Schedule()).param_groups
    assert [p is trained.weight for p in decayed["params"]] == [True]
    assert any(p is trained.mask for p in plain["params"])
    with pytest.raises(UsageError, match="unknown optimizer 'lion'; there is: sgd, adam, adamw"):
        training.make_optimizer(model, Schedule(optimizer="lion"))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_in_full_precision_weights(precision):
    full, half = (_train(tiny_study(epochs=2, precision=p), "pnn", 0) for p in ("float32", precision))
    assert half["status"] == "finished"
    assert half["initial_sha256"] == full["initial_sha256"]
    assert half["final_sha256"] != full["final_sha256"]
    assert half["test_loss"] == pytest.approx(full["test_loss"], rel=0.1)
    with pytest.raises(UsageError, match="unknown precision 'float8'"):
        _train(tiny_study(precision="float8"), "pnn", 0)


class _Scripted(Dataset):
    """A data set whose scores are known beforehand: after an epoch so many images show what is always answered."""

    def __init__(self, validation, test, shifts=()):
        super().__init__(
            "scripted", "", ("a", "b"), counts=(8, 10, 10), sha256="0", image_shape=(1, 8, 8), shifts=shifts
        )
        self.script = {"validation": validation, "test": test}
        self.epoch, self.asked = 0, []

    def train_batches(self, batch_size, *, epoch, **_):
        self.epoch = epoch
        yield torch.zeros(8, 1, 8, 8), torch.tensor([0, 1] * 4)

    def test_batches(self, which, batch_size, device="cpu"):
        self.asked.append((self.epoch, which))
        right = self.script.get(which, self.script["test"])[self.epoch - 1]
        yield torch.zeros(10, 1, 8, 8), torch.tensor([1] * right + [0] * (10 - right))

    _train = _test = None


class _AlwaysOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([-50.0, 50.0]))

    def forward(self, x):
        return self.bias.expand(len(x), 2)


@pytest.fixture
def scripted(monkeypatch):
    """Trains a network that always answers 1, and says what was asked of the data."""
    built = arms.build

    def build(*arguments):
        return dataclasses.replace(built(*arguments), model=_AlwaysOne())

    monkeypatch.setattr(training, "build", build)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)

    def run(dataset, **settings):
        rows = []
        study = tiny_study(epochs=5, **settings)
        return training.train(study, "pnn", 0, dataset, rows.append), rows

    return run


def test_the_validation_images_choose_the_best_epoch(scripted):
    row, rows = scripted(_Scripted(validation=[2, 7, 5, 7, 1], test=[1, 3, 9, 8, 4]))
    assert (row["accuracy"], row["correct"], row["total"]) == (0.4, 4, 10)
    assert (row["best_epoch"], row["best_accuracy"]) == (2, 0.3)  # the first of two equals, whatever the test says
    assert [r["validation_score"] for r in rows] == [0.2, 0.7, 0.5, 0.7, 0.1]
    assert [r["test_score"] for r in rows] == [0.1, 0.3, 0.9, 0.8, 0.4]
    assert row["per_class"] == [0.0, 1.0]
    assert row["shifted"] == {}


def test_the_test_set_is_measured_as_often_as_asked(scripted):
    dataset = _Scripted(validation=[2, 1, 1, 7, 1], test=[1, 3, 9, 8, 4])
    row, rows = scripted(dataset, test_every=2)
    # After every second epoch, the first best (1), the next best (4, due anyway) and the last.
    assert [r["test_score"] for r in rows] == [0.1, 0.3, None, 0.8, 0.4]
    assert (row["best_epoch"], row["best_accuracy"], row["accuracy"]) == (4, 0.8, 0.4)
    assert [epoch for epoch, which in dataset.asked if which == "test"] == [1, 2, 4, 5]
    assert rows[2]["test_loss"] is rows[2]["test_correct"] is rows[2]["test_accuracy"] is None


def test_shifted_images_are_measured_once_at_the_end(scripted):
    dataset = _Scripted([1] * 5, [3] * 5, shifts=(1, 2))
    row, _ = scripted(dataset)
    assert row["shifted"] == {"1": 0.3, "2": 0.3}
    assert [item for item in dataset.asked if item[1].startswith("shift")] == [(5, "shift 1"), (5, "shift 2")]


def test_masks_are_changed_before_steps_and_for_tests(monkeypatch):
    told = []

    class Told(arms.Built):
        def before_step(self, step):
            told.append(step)

        @contextlib.contextmanager
        def for_test(self):
            told.append("test")
            yield
            told.append("over")

    plain = arms.build

    def build(*arguments):
        built = plain(*arguments)
        return Told(**{f.name: getattr(built, f.name) for f in dataclasses.fields(arms.Built)})

    monkeypatch.setattr(training, "build", build)
    _train(tiny_study(epochs=2, batch_size=32), "pnn", 0)
    assert told == [0, 1, "test", "over", 2, 3, "test", "over"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the highest size")
def test_peak_memory_is_that_of_the_run_alone():
    peak = memory.Peak(torch.device("cpu"))
    hog = torch.ones(64 << 20, dtype=torch.uint8)
    assert 60 << 20 < peak.bytes() < 200 << 20
    del hog
    assert peak.bytes() > 60 << 20
    assert memory.Peak(torch.device("cpu")).bytes() < 30 << 20


def test_unknown_names():
    dataset = tiny_data()
    with pytest.raises(UsageError, match="unknown arm 'ppn'"):
        _build(tiny_study(), "ppn", 0, dataset)
    with pytest.raises(UsageError, match="unknown network 'vgg'"):
        _build(tiny_study(network="vgg"), "pnn", 0, dataset)
    with pytest.raises(UsageError, match="unknown data set 'letters'; there is: digits"):
        data.load(DataSettings("letters"))
