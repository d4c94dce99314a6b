"""Processes that are killed at random moments, full disks, broken images: nothing but the running epoch is lost."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from ablation_support import tiny_data, tiny_study

from torch_pnn.ablation import runner, training
from torch_pnn.ablation.errors import AblationError, UsageError
from torch_pnn.ablation.progress import Silence
from torch_pnn.ablation.records import Store, read, read_rows
from torch_pnn.ablation.worker import attempt

SHA = "ab" * 32
TIMES = ("seconds", "seconds_per_epoch", "peak_memory_bytes", "continued_after", "invocation")


def _open(folder, study):
    return Store(folder, study, SHA, {"command": "", "started": "", "jobs": 1, "environment": {}})


def _execute(folder, study, data=None):
    with _open(folder, study) as store:
        runner.execute(study, data or tiny_data(), store, Silence(), 1)


def _timeless(rows):
    return sorted(
        ({name: value for name, value in row.items() if name not in TIMES} for row in rows),
        key=lambda row: (row["arm"], row["seed"], row.get("epoch", 0)),
    )


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path):
    study = tiny_study(epochs=6, batch_size=8, seeds=(0,))
    generator = random.Random(2018)
    torch.set_num_threads(1)  # a forked child has no other thread
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _execute(whole, study)
    context = multiprocessing.get_context("fork")

    def rows():
        return (cut / "epochs.jsonl").read_bytes().count(b"\n") if (cut / "epochs.jsonl").exists() else 0

    kills, end = 0, time.monotonic() + 240
    while True:
        process = context.Process(target=_execute, args=(cut, study))
        process.start()
        before = rows()
        while process.is_alive() and rows() < before + 1:
            time.sleep(0.001)
        if generator.random() < 0.8:
            process.join(generator.uniform(0, 0.05))
        assert time.monotonic() < end
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        # What was seen in the file is still there.
        assert len(read(cut).epochs) >= before + 1
    assert process.exitcode == 0
    assert kills >= 5
    assert _timeless(read(cut).results) == _timeless(read(whole).results)
    assert _timeless(read_rows(cut / "epochs.jsonl")[0]) == _timeless(read(whole).epochs)
    assert len(read_rows(cut / "results.jsonl")[0]) == 2
    # Most of them were continued; those that were killed in their first epoch began anew.
    assert sum(len(row["continued_after"]) for row in read(cut).results) >= kills // 2
    assert {entry.name for entry in cut.iterdir()} == {entry.name for entry in whole.iterdir()}


@pytest.mark.parametrize(
    "error, problem",
    [
        (OSError(5, "Input/output error", "images/7.png"), "images/7.png: input/output error"),
        (AblationError("images/7.png can't be decoded"), "images/7.png can't be decoded"),
        (MemoryError(), "MemoryError: no reason given"),
        (KeyError("weight"), "KeyError: 'weight'"),
        (torch.OutOfMemoryError("no memory\n left"), "OutOfMemoryError: no memory left"),
    ],
)
def test_a_run_that_breaks_is_a_row_and_the_others_go_on(tmp_path, monkeypatch, error, problem):
    plain = training.build

    def build(study, arm, streams, data):
        if arm == "pnn" and streams["order"] == 0:
            raise error
        return plain(study, arm, streams, data)

    monkeypatch.setattr(training, "build", build)
    _execute(tmp_path, tiny_study())
    rows = {(row["arm"], row["seed"]): row for row in read(tmp_path).results}
    assert (rows["pnn", 0]["status"], rows["pnn", 0]["problem"]) == ("broken", problem)
    assert [row["status"] for row in rows.values()].count("finished") == 3
    monkeypatch.undo()
    _execute(tmp_path, tiny_study())
    assert [row["status"] for row in read_rows(tmp_path / "results.jsonl")[0]] == ["finished"] * 4


def test_a_study_that_can_not_be_carried_out_ends_at_once(tmp_path):
    with pytest.raises(UsageError, match="unknown optimizer 'lion'"):
        attempt(tiny_study(optimizer="lion"), "pnn", 0, tiny_data(), lambda row: None)


def test_images_that_can_not_be_read_are_named_beside_the_result(monkeypatch):
    data = tiny_data()
    monkeypatch.setattr(type(data), "unreadable", ("cat/3.jpeg: truncated",))
    row = training.train(tiny_study(), "pnn", 0, data, lambda row: None)
    assert row["unreadable"] == ["cat/3.jpeg: truncated"]


def test_a_full_disk_stops_no_run(tmp_path, monkeypatch):
    """From the second epoch on nothing can be written, until the third run; then all of it is."""
    study, said, epochs = tiny_study(epochs=2), [], []
    write, full = os.write, [False]

    def limited(descriptor, content):
        if full[0] and not content.startswith(b'{"machine'):
            raise OSError(28, "No space left on device")
        return write(descriptor, content)

    class Watch(Silence):
        def epoch(self, row, *, again=False):
            epochs.append(row)
            full[0] = 2 <= len(epochs) < 5

    monkeypatch.setattr(os, "write", limited)
    with _open(tmp_path, study) as store:
        store.on_trouble = said.append
        runner.execute(study, tiny_data(), store, Watch(), 1)
    assert len(said) == 2
    assert "epochs.jsonl: no space left on device; the runs go on" in said[0] or "results.jsonl" in said[0]
    assert said[1] == "rows can be written again; none was lost"
    records = read(tmp_path)
    assert len(records.epochs) == 8
    assert [row["status"] for row in records.results] == ["finished"] * 4
    assert records.invocations[0]["troubles"] == [said[0].split(";")[0]]
