"""Loggers: what they are told, that nothing is sent by itself, and that a study does not depend on them."""

from __future__ import annotations

import sys
import types
from typing import ClassVar

import pytest
from ablation_support import tiny_data, tiny_study

from torch_pnn.ablation import loggers, runner
from torch_pnn.ablation.errors import AblationError, UsageError
from torch_pnn.ablation.progress import Silence
from torch_pnn.ablation.records import Store


def _epoch(epoch, **changes):
    return {"study": "s", "arm": "a/b", "seed": 1, "epoch": epoch, "train_loss": 2.0, "test_loss": None, **changes}


RESULT = {"study": "s", "arm": "a/b", "seed": 1, "status": "finished", "problem": None, "accuracy": 0.5, "shifted": {}}


class Own:
    """A logger of somebody's own."""

    told: ClassVar[list] = []

    def __init__(self, directory, study):
        self.told.append(("begin", directory.name, study.name))

    def epoch(self, row):
        self.told.append(("epoch", row["arm"], row["epoch"]))

    def result(self, row):
        self.told.append(("result", row["arm"], row["status"]))

    def close(self):
        self.told.append(("close",))


class Broken(Own):
    """One that fails."""

    def epoch(self, row):
        raise RuntimeError("no\n connection")


def test_somebodys_own_is_told_of_everything_and_a_broken_one_is_left_out(tmp_path):
    Own.told.clear()
    said, study = [], tiny_study(seeds=(0,), epochs=2)
    told = loggers.Loggers([f"{__name__}:Own", f"{__name__}:Broken"], tmp_path, study, said.append)
    with Store(tmp_path, study, "ab" * 32, {"environment": {}}) as store:
        runner.execute(study, tiny_data(), store, Silence(), 1, loggers=told)
    told.close()
    begin = ("begin", tmp_path.name, "digits")
    runs = [[("epoch", arm, 1), ("epoch", arm, 2), ("result", arm, "finished")] for arm in ("pnn", "control")]
    assert Own.told == [begin, begin, *runs[0], *runs[1], ("close",)]
    assert said == [
        f"logger {__name__}:Broken failed and is left out (RuntimeError: no connection); the runs go on",
    ]


def test_unknown_and_missing(tmp_path, monkeypatch):
    for name, words in {
        "tensorbord": "unknown logger 'tensorbord'; there is: tensorboard, wandb, or module:Class of your own",
        "nowhere:Class": "nowhere:Class can't be had",
        "json:Class": "json:Class can't be had",
    }.items():
        with pytest.raises(UsageError, match=words):
            loggers.Loggers([name], tmp_path, tiny_study(), print)
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(AblationError, match=f"pip install {name}"):
            loggers.Loggers([name], tmp_path, tiny_study(), print)


class _Run:
    def __init__(self, **settings):
        self.settings, self.logged, self.summary, self.exit_code = settings, [], {}, None

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package wandb; the runs that were begun."""
    runs = []

    def init(**settings):
        runs.append(_Run(**settings))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return runs


def test_weights_and_biases_stays_here_unless_it_is_asked_to_send(tmp_path, wandb, monkeypatch):
    logger = loggers.WeightsAndBiases(tmp_path, tiny_study())
    for epoch in (2, 1, 2):  # a run that goes on tells its epochs again
        logger.epoch(_epoch(epoch))
    assert not wandb
    logger.result(RESULT)
    logger.result({**RESULT, "status": "diverged"})
    logger.close()
    first, second = wandb
    assert first.settings["mode"] == "offline"
    assert first.settings["dir"] == str(tmp_path)
    assert (first.settings["group"], first.settings["name"]) == ("digits", "a/b, seed 1")
    assert first.logged == [(1, {"train_loss": 2.0}), (2, {"train_loss": 2.0})]
    assert first.summary["accuracy"] == 0.5
    assert (first.exit_code, second.exit_code) == (0, 1)
    monkeypatch.setenv("WANDB_MODE", "online")
    logger.result(RESULT)
    assert wandb[2].settings["mode"] == "online"


def test_weights_and_biases_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logger = loggers.WeightsAndBiases(tmp_path, tiny_study())
    logger.epoch(_epoch(1))
    logger.result(RESULT)
    logger.close()
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = loggers.TensorBoard(tmp_path, tiny_study())
    logger.epoch(_epoch(1))
    logger.close()  # interrupted; another command goes on
    logger = loggers.TensorBoard(tmp_path, tiny_study())
    for epoch in (1, 2):
        logger.epoch(_epoch(epoch, test_score=epoch / 4))
    logger.result(RESULT)
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "a_b" / "seed 1"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("test_score")] == [(1, 0.25), (2, 0.5)]
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2]


def test_every_logger_has_the_methods_of_the_protocol():
    for kind in (*loggers.LOGGERS.values(), Own):
        for name in ("epoch", "result", "close"):
            assert callable(getattr(kind, name))
