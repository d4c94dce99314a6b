"""The study's folder: whatever a killed process leaves behind is mended, and other studies' folders are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import stat
import subprocess
import sys

import pytest
from ablation_support import environment, tiny_study

from torch_pnn.ablation import files
from torch_pnn.ablation.errors import AblationError, UsageError
from torch_pnn.ablation.records import Store, read, read_rows, write_whole
from torch_pnn.ablation.study import PLACE_OF_DATA, Study

SHA = "ab" * 32


def _invocation(**changes):
    return {
        "command": "torch-pnn ablate",
        "started": "now",
        "jobs": 1,
        "environment": {"operators": "compiled"},
        **changes,
    }


def _result(arm, seed, status="finished", epochs=1):
    return {
        "arm": arm,
        "seed": seed,
        "status": status,
        "problem": None,
        "accuracy": 0.5,
        "correct": 5,
        "total": 10,
        "epochs": epochs,
    }


def _epoch(arm, seed, epoch=1):
    return {"arm": arm, "seed": seed, "epoch": epoch, "test_accuracy": 0.5}


def _store(folder, study=None, sha=SHA):
    return Store(folder, study or tiny_study(), sha, _invocation())


def _fill(store, *runs):
    for arm, seed in runs:
        store.add_epoch(_epoch(arm, seed))
        store.add_result(_result(arm, seed))


def test_rows_come_back(tmp_path):
    with _store(tmp_path / "new" / "folder") as store:
        _fill(store, ("pnn", 0), ("control", 0))
    records = read(tmp_path / "new" / "folder")
    assert records.study == tiny_study()
    assert [(row["arm"], row["seed"]) for row in records.results] == [("pnn", 0), ("control", 0)]
    assert records.missing == [("pnn", 1), ("control", 1)]
    assert records.correct("pnn") == {0: 5}
    assert len(records.epochs) == 2


@pytest.mark.parametrize("cut", [1, 7, 30])
@pytest.mark.parametrize("name", ["results.jsonl", "epochs.jsonl"])
def test_half_a_last_line_is_dropped_and_its_run_done_again(tmp_path, name, cut):
    with _store(tmp_path) as store:
        _fill(store, ("pnn", 0), ("control", 0))
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-cut])
    before = path.read_bytes()
    assert len(read(tmp_path).results) == (1 if name == "results.jsonl" else 2)  # reading changes nothing
    assert path.read_bytes() == before
    with _store(tmp_path) as store:
        assert store.records.missing == [("control", 0), ("pnn", 1), ("control", 1)]
        assert store.dropped == 1
        _fill(store, ("control", 0))
    for file in ("results.jsonl", "epochs.jsonl"):
        rows, half = read_rows(tmp_path / file)
        assert not half
        assert [(row["arm"], row["seed"]) for row in rows] == [("pnn", 0), ("control", 0)]


def test_epochs_of_a_run_that_never_ended_are_kept_once(tmp_path):
    study = tiny_study(epochs=3)
    with _store(tmp_path, study) as store:
        _fill(store, ("pnn", 0))  # claims one epoch, as a run that diverged would
        store.add_epoch(_epoch("control", 0))
        store.add_epoch({**_epoch("control", 0, 2), "test_accuracy": 0.1, "seconds": 1.0})
        store.checkpoint(("control", 0)).with_name("control, seed 0.checkpoint.a").write_bytes(b"")
    with _store(tmp_path, study) as store:
        assert (store.continued, store.dropped) == (1, 0)
        assert ("control", 0) in store.records.missing
        # It goes on from its first epoch: what was there is not written again, what differs takes its place.
        assert not store.add_epoch(_epoch("control", 0))
        assert store.add_epoch({**_epoch("control", 0, 2), "test_accuracy": 0.7, "seconds": 2.0})
        assert not store.add_epoch({**_epoch("control", 0, 2), "test_accuracy": 0.7, "seconds": 3.0})
        assert store.add_epoch(_epoch("control", 0, 3))
        store.add_result(_result("control", 0, epochs=3))
        assert not store.checkpoint(("control", 0)).with_name("control, seed 0.checkpoint.a").exists()
    rows, _ = read_rows(tmp_path / "epochs.jsonl")
    assert [(row["arm"], row["epoch"], row["test_accuracy"]) for row in rows] == [
        ("pnn", 1, 0.5),
        ("control", 1, 0.5),
        ("control", 2, 0.7),
        ("control", 3, 0.5),
    ]
    with _store(tmp_path, study) as store:
        assert ("control", 0) not in store.records.missing
        assert (store.continued, store.dropped) == (0, 0)


def test_a_line_of_noise_at_the_end_is_dropped_but_not_elsewhere(tmp_path):
    with _store(tmp_path) as store:
        _fill(store, ("pnn", 0), ("control", 0))
    path = tmp_path / "results.jsonl"
    whole = path.read_text()
    path.write_text(whole + "\0\0\0\0\n")
    with _store(tmp_path) as store:
        assert len(store.records.results) == 2
    lines = whole.splitlines(keepends=True)
    damaged = lines[0][:20] + "\n" + lines[1]
    path.write_text(damaged)
    with pytest.raises(AblationError, match=r"results\.jsonl, line 1 is not a row"):
        _store(tmp_path)
    assert path.read_text() == damaged
    path.write_text('{"arm": 3, "seed": "x"}\n' + lines[1])
    with pytest.raises(AblationError, match="line 1"):
        read(tmp_path)


def test_a_run_that_broke_is_done_again_and_one_that_diverged_is_not(tmp_path):
    with _store(tmp_path) as store:
        store.add_epoch(_epoch("pnn", 0))
        store.add_result(_result("pnn", 0, "diverged"))
        store.add_result(_result("control", 0, "broken", epochs=0))
    with _store(tmp_path) as store:
        assert [row["status"] for row in store.records.results] == ["diverged"]
        assert ("control", 0) in store.records.missing
        assert store.records.correct("pnn") == {}
        assert store.claim([("control", 0)]) == ("control", 0)
        store.add_epoch(_epoch("control", 0))
        store.add_result(_result("control", 0))
    rows, _ = read_rows(tmp_path / "results.jsonl")
    assert [(row["arm"], row["status"]) for row in rows] == [("pnn", "diverged"), ("control", "finished")]


def test_a_run_that_breaks_is_not_tried_twice_by_one_command(tmp_path):
    with _store(tmp_path) as store:
        run = store.claim()
        store.add_result(_result(*run, "broken", epochs=0))
        assert store.claim() != run
        assert read(tmp_path).of_arm(run[0])[0]["status"] == "broken"


def test_another_study_is_refused_with_what_differs(tmp_path):
    with _store(tmp_path) as store:
        _fill(store, ("pnn", 0))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=r"another study \(seeds 0,1, not 0,1,2; schedule.epochs 1, not 4\)"):
        _store(tmp_path, tiny_study(epochs=4, seeds=(0, 1, 2)))
    with pytest.raises(UsageError, match="other data"):
        _store(tmp_path, sha="cd" * 32)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_results_without_a_study_are_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"holds a results\.jsonl but no study\.json"):
        _store(tmp_path)


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with _store(tmp_path):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ('{"format": 99}', "format 99"),
        ("\xff\xfe", "damaged|not text"),
    ],
)
def test_a_damaged_study_file_is_refused(tmp_path, content, words):
    (tmp_path / "study.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(AblationError, match=words):
        read(tmp_path)
    with pytest.raises(AblationError, match=words):
        _store(tmp_path)


def test_a_study_of_a_later_version_is_refused(tmp_path):
    with _store(tmp_path):
        pass
    head = json.loads((tmp_path / "study.json").read_text())
    head["study"]["novelty"] = 1
    (tmp_path / "study.json").write_text(json.dumps(head))
    with pytest.raises(AblationError, match="settings differ from this version's: novelty"):
        read(tmp_path)


def test_reading_no_study(tmp_path):
    with pytest.raises(AblationError, match="holds no study"):
        read(tmp_path)
    with pytest.raises(AblationError, match="is no folder"):
        read(tmp_path / "nowhere")


def test_the_folder_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    for folder in (path, path / "below"):
        with pytest.raises(AblationError, match="is a file"):
            _store(folder)
    assert path.read_text() == "mine"


def test_the_folder_can_not_be_written():
    # Nobody, root included, can make a file there.
    from pathlib import Path

    with pytest.raises(AblationError, match="can't write into --out /proc"):
        _store(Path("/proc/torch-pnn"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_the_folder_is_read_only(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(AblationError, match="permission denied"):
            _store(tmp_path / "new")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("mended", [True, False])
def test_a_full_disk_is_said_and_the_runs_go_on(tmp_path, mended):
    # A limit on the size of files stands for a full disk: the write comes back short, then fails.
    script = f"""
import resource, signal, sys
from pathlib import Path
from ablation_support import tiny_study
from test_ablation_records import _epoch, _result, _store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from torch_pnn.ablation.errors import AblationError
store = _store(Path({str(tmp_path)!r}), tiny_study(seeds=tuple(range(100))))
store.on_trouble = print
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
for seed in range(100):
    if seed == 95 and "mended" in sys.argv:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    store.add_epoch(_epoch("pnn", seed))
    store.add_result(_result("pnn", seed))
try:
    store.close()
except AblationError as error:
    print(error)
    sys.exit(7)
"""
    here = os.path.dirname(__file__)
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join([here, variables["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", script, "mended" if mended else ""],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert re.fullmatch(
        r"can't write .*\.jsonl: file too large; the runs go on, and their rows are written once .*", lines[0]
    )
    records = read(tmp_path)
    if mended:  # the half line was continued, and nothing is missing
        assert done.returncode == 0, done.stderr
        assert lines[1:] == ["rows can be written again; none was lost"]
        assert [len(read_rows(tmp_path / f"{kind}.jsonl")[0]) for kind in ("results", "epochs")] == [100, 100]
        assert records.invocations[0]["troubles"] == [lines[0].split(";")[0]]
        return
    assert done.returncode == 7, done.stderr
    assert len(lines) == 2
    assert "file too large; finished runs that were written are kept" in lines[1]
    with _store(tmp_path, tiny_study(seeds=tuple(range(100)))) as store:
        kept = len(store.records.results)
        assert 10 < kept < 100
        assert store.dropped >= 1
        assert all(row["status"] == "finished" for row in store.records.results)


def test_writing_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "old")
    assert stat.S_IMODE(path.stat().st_mode) & 0o400
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(AblationError, match="file too large"):
            write_whole(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def _other(value):
    """Something else of the same type."""
    if isinstance(value, tuple):
        return (*value, value[-1] if value else 1)
    if isinstance(value, bool):
        return not value
    return {**value, "x": 1} if isinstance(value, dict) else value + ("x" if isinstance(value, str) else 1)


def test_every_setting_is_part_of_the_fingerprint():
    study = files.load("digits")
    for field in dataclasses.fields(Study):
        value = getattr(study, field.name)
        others = (
            [
                dataclasses.replace(value, **{inner.name: _other(getattr(value, inner.name))})
                for inner in dataclasses.fields(value)
            ]
            if dataclasses.is_dataclass(value)
            else [_other(value)]
        )
        for other in others:
            changed = dataclasses.replace(study, **{field.name: other})
            places = [
                dataclasses.replace(study.data, **{place: _other(getattr(study.data, place))})
                for place in PLACE_OF_DATA
            ]
            if other in places:  # where the images lie does not matter
                assert changed.fingerprint() == study.fingerprint()
                assert study.differences(changed) == []
            else:
                assert changed.fingerprint() != study.fingerprint(), field.name
                assert len(study.differences(changed)) == 1


def test_quick_studies_are_smaller():
    for name in files.ready_names():
        full, quick = files.load(name), files.load(name, quick=True)
        assert len(quick.seeds) * quick.schedule.epochs * 3 < len(full.seeds) * full.schedule.epochs
        assert quick.arms == full.arms
    with pytest.raises(UsageError, match=r"unknown study 'digit' \(did you mean digits\?\); there is: digits"):
        files.load("digit")
