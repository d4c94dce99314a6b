"""Several processes in one folder: who does what, what becomes of the dead, and that every row arrives once."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time

import pytest
from ablation_support import tiny_study

from torch_pnn.ablation import claims
from torch_pnn.ablation.errors import UsageError
from torch_pnn.ablation.records import Store, read, read_rows
from torch_pnn.ablation.runner import shard

SHA = "ab" * 32
#: What a folder holds when nobody is at work in it.
FILES = {"epochs.jsonl", "index.sqlite", "results.jsonl", "study.json"}


def _store(folder, study):
    return Store(folder, study, SHA, {"command": "", "started": "", "jobs": 1, "environment": {}})


def _do(store, run):
    store.add_epoch({"arm": run[0], "seed": run[1], "epoch": 1, "test_accuracy": 0.5, "by": store.name})
    store.add_result({"arm": run[0], "seed": run[1], "status": "finished", "accuracy": 0.5, "epochs": 1})


@pytest.fixture(scope="module")
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def _write(path, **changes):
    """A claim of this machine, as another process would leave it."""
    claim = claims.acquire(path)
    owner = json.loads(path.read_text())
    path.write_text(json.dumps({**owner, "token": "other", **changes}))
    assert not claim.is_mine()


def test_one_process_has_it_until_it_gives_it_free(tmp_path):
    path = tmp_path / "a.claim"
    first = claims.acquire(path)
    assert first.is_mine()
    assert claims.is_live(path)
    assert claims.acquire(path) is None
    first.release()
    assert not path.exists()
    second = claims.acquire(path)
    first.release()  # no longer its own: nothing happens
    assert second.is_mine()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.claim"]


def test_a_dead_process_has_nothing(tmp_path, dead):
    path = tmp_path / "a.claim"
    _write(path, pid=dead)
    assert not claims.is_live(path)
    assert claims.acquire(path).is_mine()


@pytest.mark.skipif(claims._process_start(os.getpid()) is None, reason="the system does not tell when a process began")
def test_a_process_number_that_was_used_again(tmp_path):
    path = tmp_path / "a.claim"
    _write(path)
    assert claims.acquire(path) is None
    _write(tmp_path / "b.claim", start="1")
    assert claims.acquire(tmp_path / "b.claim") is not None


@pytest.mark.parametrize("content", ["elsewhere", "", "{", "[]"])
def test_where_the_process_is_not_known_the_age_decides(tmp_path, content):
    path = tmp_path / "a.claim"
    if content == "elsewhere":
        _write(path, machine="another", pid=1)
    else:
        path.write_text(content)
    assert claims.acquire(path) is None
    old = time.time() - claims.LEASE + 20
    os.utime(path, (old, old))
    assert claims.acquire(path) is None
    old -= 40
    os.utime(path, (old, old))
    assert claims.acquire(path).is_mine()


def test_the_heart_keeps_it_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT", 0.02)
    heart, claim = claims.Heart(), claims.acquire(tmp_path / "a.claim")
    heart.add(claim)
    os.utime(claim.path, (0, 0))
    end = time.monotonic() + 30
    while claim.path.stat().st_mtime == 0:
        assert time.monotonic() < end
        time.sleep(0.01)
    heart.stop()
    assert not claim.path.exists()


@pytest.mark.parametrize("hard_links", [True, False])
def test_of_many_that_want_a_dead_claim_one_gets_it(tmp_path, dead, monkeypatch, hard_links):
    if not hard_links:

        def link(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    for attempt in range(20):
        path = tmp_path / f"{attempt}.claim"
        path.write_text(json.dumps({"machine": claims._machine(), "pid": dead, "start": "1", "token": "x"}))
        start, got = threading.Barrier(8), []

        def try_it(path=path, start=start, got=got):
            start.wait()
            claim = claims.acquire(path)
            if claim is not None and claim.is_mine():
                got.append(claim)

        threads = [threading.Thread(target=try_it) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(claim.is_mine() for claim in got) <= 1
        assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_sweeping_leaves_the_living_alone(tmp_path, dead):
    mine = claims.acquire(tmp_path / "mine.claim")
    _write(tmp_path / "dead.claim", pid=dead)
    (tmp_path / "run.checkpoint.a").write_text("x")
    for name, age in {".young": 0, ".old": 2 * claims.LEASE}.items():
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    claims.sweep(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"mine.claim", "run.checkpoint.a", ".young"}
    assert mine.is_mine()


def test_waiting_for_a_claim(tmp_path):
    path = tmp_path / "a.claim"
    order = []
    held = claims.acquire(path)

    def second():
        with claims.exclusive(path, 30):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    time.sleep(0.1)
    order.append("first")
    held.release()
    thread.join()
    assert order == ["first", "second"]
    _write(path)
    begun = time.monotonic()
    with claims.exclusive(path, 0.1):
        assert time.monotonic() - begun >= 0.1


def test_two_in_a_folder_share_the_runs(tmp_path):
    study = tiny_study(seeds=(0, 1, 2))
    done = {"first": [], "second": []}
    with _store(tmp_path, study) as first:
        with _store(tmp_path, study) as second:
            for name, store in (("first", first), ("second", second)) * 2:
                run = store.claim()
                done[name].append(run)
                _do(store, run)
            held = first.claim()
            assert second.claim([held]) is None  # it is being done
            assert second.claim() not in (held, None)
        assert len(list(tmp_path.glob("results.*.jsonl"))) == 1  # the main files are the first one's
        assert len(read(tmp_path).results) == 4  # and a reader finds all of them
        first.refresh()
        assert len(first.records.results) == 4
    assert not set(done["first"]) & set(done["second"])
    assert {entry.name for entry in tmp_path.iterdir()} == FILES
    for name in ("results.jsonl", "epochs.jsonl"):
        rows, _ = read_rows(tmp_path / name)
        assert sorted((row["arm"], row["seed"]) for row in rows) == sorted(done["first"] + done["second"])
    records = read(tmp_path)
    assert len(records.invocations) == 2
    assert {row["invocation"] for row in records.results} == {0, 1}
    assert len(records.missing) == 2


@pytest.mark.parametrize("who", ["main", "other"])
def test_one_that_was_killed_leaves_its_rows_to_the_others(tmp_path, who, dead):
    study = tiny_study(seeds=(0, 1, 2))
    first, second = _store(tmp_path, study), _store(tmp_path, study)
    _do(first, first.claim())
    _do(second, second.claim())
    held = first.claim(), second.claim()
    killed, left = (first, second) if who == "main" else (second, first)
    # What a killed process leaves: its claims, with its number, and half a line.
    killed._heart._stopped.set()
    for path in (tmp_path / "running").glob("*.claim"):
        if json.loads(path.read_text())["token"] in [c._token for c in killed._heart._claims]:
            path.write_text(path.read_text().replace(f'"pid": {os.getpid()}', f'"pid": {dead}'))
    for writer in killed._writers.values():
        writer.append('{"arm": "p', sync=False)
        writer.close()
    run = left.claim()
    assert run in held  # the killed one's comes first again
    _do(left, run)
    left.close()
    with _store(tmp_path, study) as third:
        assert len(third.records.results) == 3
        assert {(row["arm"], row["seed"]) for row in third.records.results} == set(study.runs) - set(
            third.records.missing
        )
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "epochs.jsonl",
        "index.sqlite",
        "results.jsonl",
        "study.json",
    }


def test_one_that_slept_too_long_writes_elsewhere(tmp_path):
    study = tiny_study(seeds=(0, 1))
    with _store(tmp_path, study) as sleeper:
        _do(sleeper, sleeper.claim())
        (tmp_path / "running" / "main.claim").unlink()  # taken over
        with _store(tmp_path, study) as other:
            assert other._main is not None
            _do(sleeper, sleeper.claim())
            _do(other, other.claim())
            assert len(list(tmp_path.glob("results.*.jsonl"))) == 1
    assert len(read_rows(tmp_path / "results.jsonl")[0]) == 3


def _work(folder, study, done, stuck):
    """A process that does runs until none is left, or sticks in its second one."""
    with _store(folder, study) as store:
        while (run := store.claim()) is not None:
            done.put(run)
            time.sleep(random.uniform(0, 0.02))
            if stuck and store.records.results:
                stuck.set()
                time.sleep(1000)
            _do(store, run)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_many_processes_do_every_run_once(tmp_path):
    """Five at once, the first of which is killed in the middle of a run; a sixth does what it left."""
    study = tiny_study(seeds=tuple(range(20)))
    context = multiprocessing.get_context("fork")
    done, stuck, folder = context.Queue(), context.Event(), tmp_path / "study"

    def start(event=None):
        process = context.Process(target=_work, args=(folder, study, done, event))
        process.start()
        return process

    first = start(stuck)
    assert stuck.wait(60)
    others = [start() for _ in range(4)]
    for process in others:
        process.join(120)
    assert [process.exitcode for process in others] == [0] * 4
    first.kill()
    first.join()
    assert len(read(folder).missing) == 1
    last = start()
    last.join(60)
    assert last.exitcode == 0
    runs = [done.get(timeout=10) for _ in range(41)]
    assert done.empty()
    assert len(set(runs)) == 40  # the one that was killed stuck in a run, which was done again
    for name in ("results.jsonl", "epochs.jsonl"):
        rows = read_rows(folder / name)[0]
        assert sorted((row["arm"], row["seed"]) for row in rows) == sorted(study.runs)
    assert len({row["by"] for row in read(folder).epochs}) > 3
    assert len(read(folder).invocations) == 6
    assert {entry.name for entry in folder.iterdir()} == FILES


def test_parts_of_a_study_are_disjoint_and_whole():
    for arms, seeds in ((2, 5), (3, 4), (6, 10)):
        runs = [(f"arm {arm}", seed) for seed in range(seeds) for arm in range(arms)]
        for of in range(1, 9):
            parts = [shard(runs, number, of) for number in range(1, of + 1)]
            assert sorted(run for part in parts for run in part) == sorted(runs)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            if arms % of == 0:  # no part is one arm's alone
                assert all(len({arm for arm, _ in part}) == min(arms, len(part)) for part in parts)
    for number, of in ((0, 2), (3, 2), (1, 0)):
        with pytest.raises(UsageError, match=f"--shard {number}/{of}: there are parts 1 to {of}"):
            shard(runs, number, of)
