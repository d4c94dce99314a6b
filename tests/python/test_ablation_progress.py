"""The bar and the lines: what they say, and how long they think it takes."""

from __future__ import annotations

import io
import os
import select
import struct

import pytest

from torch_pnn.ablation import progress

RUN = {"arm": "pnn", "seed": 0, "status": "finished", "accuracy": 0.5, "correct": 1, "total": 2, "seconds": 1.0}
PENDING = [("pnn", seed) for seed in range(3)]


def _row(epoch=None, **changes):
    return {**RUN, **({} if epoch is None else {"epoch": epoch, "test_score": 0.25}), **changes}


def test_lines_tell_the_time_left():
    stream, now = io.StringIO(), [100.0]
    lines = progress.Lines(PENDING, 4, 2, stream, clock=lambda: now[0])
    for seed in range(3):
        for epoch in (1, 2):
            now[0] += 10
            lines.step(("pnn", seed), epoch - 0.5)
            lines.epoch(_row(epoch, seed=seed))
        lines.result(_row(seed=seed))
    lines.say("done")
    lines.close()
    assert stream.getvalue().splitlines() == [
        "[2/4] pnn, seed 0: 50.00 % (1/2), about 40 s left",
        "[3/4] pnn, seed 1: 50.00 % (1/2), about 20 s left",
        "[4/4] pnn, seed 2: 50.00 % (1/2)",
        "done",
    ]


def test_long_epochs_get_lines_of_their_own():
    stream, now = io.StringIO(), [0.0]
    lines = progress.Lines(PENDING[:1], 1, 5, stream, clock=lambda: now[0])
    lines.epoch(_row(1, seconds=39.0), again=True)  # passed before: nothing is known of this machine's speed
    for epoch in (2, 3, 4):
        now[0] += 40
        lines.epoch(_row(epoch, seconds=39.0))
    assert stream.getvalue() == "pnn, seed 0: epoch 3 of 5, 25.00 %, about 1 min 20 s left\n"


def test_slow_arms_count_for_more():
    now = [0.0]
    estimate = progress.Estimate([("fast", 0), ("slow", 0), ("slow", 1)], 2, lambda: now[0])
    assert estimate.seconds_left() is None
    now[0] += 1
    estimate.epoch({"arm": "fast", "seed": 0, "epoch": 1, "seconds": 1.0})
    assert estimate.seconds_left() == 5.0  # of the slow arm nothing is known yet
    now[0] += 10
    estimate.epoch({"arm": "slow", "seed": 0, "epoch": 1, "seconds": 10.0})
    assert estimate.seconds_left() == pytest.approx(1 + 10 + 20)
    estimate.step(("slow", 0), 1.5)
    assert estimate.seconds_left() == pytest.approx(1 + 5 + 20)
    estimate.step(("nobody", 7), 1.5)
    estimate.result({"arm": "slow", "seed": 0})
    assert estimate.seconds_left() == pytest.approx(1 + 20)


def test_two_workers_are_twice_as_fast():
    now = [0.0]
    estimate = progress.Estimate([("a", 0), ("a", 1), ("a", 2), ("a", 3)], 1, lambda: now[0])
    now[0] = 10.0
    for seed in (0, 1):
        estimate.epoch({"arm": "a", "seed": seed, "epoch": 1, "seconds": 10.0})
    assert estimate.seconds_left() == 10.0


def test_a_run_that_stops_early_shortens_the_time_left():
    stream, now = io.StringIO(), [0.0]
    lines = progress.Lines(PENDING[:2], 2, 10, stream, clock=lambda: now[0])
    now[0] = 5.0
    lines.epoch(_row(1))
    lines.result(_row(status="diverged", problem="NaN"))
    assert stream.getvalue() == "[1/2] pnn, seed 0: diverged: NaN, about 50 s left\n"


def test_a_score_without_counts():
    assert progress.outcome(_row(accuracy=0.5, correct=None)) == "50.00 %"


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal():
    pytest.importorskip("tqdm")
    stream = _Terminal()
    bar = progress.make_progress(PENDING[:2], runs=2, epochs=2, stream=stream)
    assert isinstance(bar, progress.Bar)
    bar.step(("pnn", 0), 0.5)
    for epoch in (1, 2):
        bar.epoch(_row(epoch))
    bar.result(_row())
    bar.result(_row(seed=1, status="diverged", problem="the loss became nan"))
    bar.close()
    text = stream.getvalue()
    assert "run 0/2" in text
    assert "left" in text
    assert "pnn, seed 1: diverged: the loss became nan" in text
    assert "100 %" in text


def test_only_the_first_process_of_several_shows_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    stream = io.StringIO()
    shown = progress.make_progress(PENDING, 3, 1, stream)
    shown.step(("pnn", 0), 0.5)
    shown.epoch(_row(1))
    shown.result(_row())
    shown.say("hello")
    shown.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("size, kind", [((24, 80), progress.Bar), ((0, 0), progress.Lines), ((24, 20), progress.Lines)])
def test_a_terminal_without_room_gets_lines(size, kind):
    pytest.importorskip("tqdm")
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    with open(slave, "w") as stream:
        shown = progress.make_progress(PENDING[:1], runs=1, epochs=1, stream=stream)
        shown.say("hello")
        shown.close()
        stream.flush()
        written = b""
        while b"hello" not in written or (kind is progress.Bar and b"left" not in written):
            assert select.select([master], [], [], 30)[0], written
            written += os.read(master, 10000)
    os.close(master)
    assert isinstance(shown, kind)
    assert (b"left" in written) == (kind is progress.Bar)
