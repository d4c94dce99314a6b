"""A run that is interrupted goes on from its checkpoint to the bits that it would have had."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from ablation_support import tiny_data, tiny_study
from torch import nn

from torch_pnn.ablation import checkpoint, training
from torch_pnn.ablation.checkpoint import Checkpoint

TIMES = ("seconds", "seconds_per_epoch", "peak_memory_bytes", "continued_after")


class Killed(BaseException):
    """Stands for the end of the process."""


def _train(study, arm="pnn", path=None, dies_after=None, seed=0, **more):
    """The result and the epochs' rows; with ``dies_after``, only the rows."""
    rows = []

    def on_epoch(row):
        rows.append(row)
        if len(rows) == dies_after:
            raise Killed

    try:
        return training.train(study, arm, seed, tiny_data(), on_epoch, checkpoint=path, **more), rows
    except Killed:
        return None, rows


def _timeless(row):
    return {name: value for name, value in row.items() if name not in TIMES}


@pytest.fixture
def restless(monkeypatch):
    """Every network draws from the default generator in training, as dropout does."""
    plain = training.build

    def build(*arguments):
        built = plain(*arguments)
        built.model.register_module("noise", nn.Dropout(0.3))
        built.model.register_forward_pre_hook(lambda model, inputs: (model.noise(inputs[0]),))
        return built

    monkeypatch.setattr(training, "build", build)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "adam", "learning_rate": 0.01},
        {"optimizer": "adamw", "learning_rate": 0.01, "precision": "bfloat16", "decay": "constant"},
        {"momentum": 0.0, "precision": "float16", "decay": "steps", "milestones": (2,)},
    ],
    ids=["sgd", "adam", "adamw in bfloat16", "float16"],
)
@pytest.mark.parametrize("arm", ["pnn", "lbcnn"])
def test_it_goes_on_to_the_same_bits_wherever_it_stopped(tmp_path, restless, arm, settings):
    study = tiny_study(epochs=4, **settings)
    whole, curve = _train(study, arm)
    path = tmp_path / "run"
    # Killed after the row of epoch 2 and before its checkpoint, then after epoch 3 of what went on from epoch 1.
    assert _train(study, arm, path, dies_after=2)[0] is None
    assert _train(study, arm, path, dies_after=3)[0] is None
    cut, again = _train(study, arm, path)
    assert cut["continued_after"] == [1, 2]
    assert _timeless(cut) == _timeless(whole)
    assert [_timeless(row) for row in again] == [_timeless(row) for row in curve]
    assert cut["seconds"] > 0
    assert whole["final_sha256"] != whole["initial_sha256"]


def test_interrupted_after_its_last_epoch_it_is_measured_again(tmp_path):
    study = tiny_study(epochs=2)
    whole, _ = _train(study, path=tmp_path / "run")
    again, rows = _train(study, path=tmp_path / "run")  # nobody removed the checkpoint
    assert again["continued_after"] == [2]
    assert _timeless(again) == _timeless(whole)
    assert len(rows) == 2


def test_without_the_generators_state_the_bits_differ(tmp_path, restless, monkeypatch):
    study = tiny_study(epochs=3)
    whole, _ = _train(study)
    _train(study, path=tmp_path / "run", dies_after=2)
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    assert _train(study, path=tmp_path / "run")[0]["final_sha256"] != whole["final_sha256"]


@pytest.mark.parametrize("other", [{"seed": 1}, {"arm": "control"}, {"study": tiny_study(epochs=5)}])
def test_the_checkpoint_of_another_run_is_not_used(tmp_path, other):
    path = tmp_path / "run"
    _train(tiny_study(epochs=4), path=path, dies_after=3)
    settings = {"study": tiny_study(epochs=4), **other}
    row, _ = _train(path=path, **settings)
    assert row["continued_after"] == []
    assert _timeless(row) == _timeless(_train(**settings)[0])


def test_a_network_that_begins_otherwise_begins_anew(tmp_path, monkeypatch):
    study = tiny_study(epochs=3)
    _train(study, path=tmp_path / "run", dies_after=2)
    plain = training.build

    def changed(*arguments):
        built = plain(*arguments)
        with torch.no_grad():
            next(built.model.parameters()).mul_(1.5)
        return built

    monkeypatch.setattr(training, "build", changed)
    assert _train(study, path=tmp_path / "run")[0]["continued_after"] == []


def _state():
    return {
        "numbers": [1, 2.5, None, "word", {"3": True}],
        "groups": {0: {"betas": (0.9, 0.999)}},
        "tensors": {
            str(dtype): torch.arange(7).to(dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8)
        },
        "odd": torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
    }


def _same(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and all(map(_same, first, second))
    return first == second


def test_a_state_comes_back_as_it_was(tmp_path):
    kept = Checkpoint(tmp_path / "run", {"seed": 1})
    assert kept.load() is None
    kept.save(_state())
    assert _same(Checkpoint(tmp_path / "run", {"seed": 1}).load(), _state())
    assert Checkpoint(tmp_path / "run", {"seed": 2}).load() is None


def test_of_two_files_the_newest_whole_one_counts(tmp_path):
    path = tmp_path / "run"
    for number in range(5):
        Checkpoint(path, {}).save({"number": number})  # each by another process
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run.a", "run.b"]
    assert Checkpoint(path, {}).load() == {"number": 4}
    newest = max(tmp_path.iterdir(), key=lambda entry: entry.read_bytes()[:40])
    whole = newest.read_bytes()
    for damaged in (whole[:-1], whole[:90], b"", whole[:-5] + b"\0" + whole[-4:], b"\0" * len(whole)):
        newest.write_bytes(damaged)
        assert Checkpoint(path, {}).load() == {"number": 3}
    for slot in tmp_path.iterdir():
        slot.write_bytes(b"torch-pnn checkpoint 1 x\n")
    assert Checkpoint(path, {}).load() is None
    Checkpoint(path, {}).save({"number": 9})
    assert Checkpoint(path, {}).load() == {"number": 9}
    assert checkpoint.exists(path)
    (tmp_path / ".run.left").write_bytes(b"")  # by a process that was killed while it wrote
    (tmp_path / ".run2.other").write_bytes(b"")
    checkpoint.remove(path)
    assert not checkpoint.exists(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [".run2.other"]


def test_killed_while_saving_the_one_before_is_left(tmp_path, monkeypatch):
    path = tmp_path / "run"
    kept = Checkpoint(path, {})
    kept.save({"number": 1})
    kept.save({"number": 2})

    def dies(*_):
        raise Killed

    for name in ("rename", "unlink"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, dies)
            with pytest.raises(Killed):
                kept.save({"number": 3})
        assert Checkpoint(path, {}).load() == {"number": 2}


def test_a_full_disk_is_said_and_the_run_goes_on(tmp_path, monkeypatch):
    def full(self, state):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Checkpoint, "save", full)
    said = []
    row, _ = _train(tiny_study(epochs=2), path=tmp_path / "run", on_trouble=said.append)
    assert row["status"] == "finished"
    assert said[0].startswith("can't write the checkpoint of pnn, seed 0: no space left on device; it goes on without")
