"""The command line: what it prints and writes, and one clear line for everything that can't be done."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ablation_support import command, environment

from torch_pnn import cli
from torch_pnn.ablation import files, records
from torch_pnn.ablation.study import SEEDS_TO_DECIDE

TINY = ("--epochs", "1", "--seeds", "2", "--arms", "pnn,control")


def _rows(folder, name="results.jsonl"):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def _bits(folder):
    """What must be equal between two computations of the same study."""
    rows = _rows(folder)
    return {(row["arm"], row["seed"]): (row["correct"], row["initial_sha256"], row["final_sha256"]) for row in rows}


def _run(*arguments):
    """The command inside this process."""
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """A tiny study's folder and what the command printed; computed once, for reading alone."""
    folder = tmp_path_factory.mktemp("computed") / "results"
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        assert _run("ablate", "--out", folder, "--jobs", 1, *TINY) == 0
    return folder, output.getvalue(), errors.getvalue()


@pytest.fixture
def finished(computed, tmp_path):
    """A tiny study's folder, to do with as a test likes."""
    return Path(shutil.copytree(computed[0], tmp_path / "results"))


@pytest.fixture
def no_training(monkeypatch):
    """Fails a test that would begin to train, instead of letting it."""
    from torch_pnn.ablation import runner

    monkeypatch.setattr(runner, "execute", lambda *_, **__: pytest.fail("it began to train"))


def test_a_study_from_end_to_end(computed):
    folder, output, errors = computed
    assert sorted(path.name for path in folder.iterdir()) == [
        "epochs.jsonl",
        "index.sqlite",
        "report.html",
        "results.jsonl",
        "study.json",
        "tables",
    ]
    lines = output.splitlines()
    assert lines[0].startswith("Undecided: 2 seeds can't decide between PNN and its control without noise")
    assert lines[-1].endswith(f"report: {folder}/report.html")
    assert "[1/4]" in errors
    rows = _rows(folder)
    assert [(row["arm"], row["seed"]) for row in rows] == [("pnn", 0), ("control", 0), ("pnn", 1), ("control", 1)]
    for row in rows:
        assert row["status"] == "finished"
        assert row["total"] == 599
        assert row["accuracy"] == row["correct"] / 599
        assert {"parameters", "mask_bytes", "macs", "seconds_per_epoch"} <= row.keys()
    assert len(_rows(folder, "epochs.jsonl")) == 4
    # Paired: the same weights and seeds at the start, other ones in the end.
    assert rows[0]["initial_sha256"] == rows[1]["initial_sha256"] != rows[2]["initial_sha256"]
    assert rows[0]["final_sha256"] != rows[1]["final_sha256"]
    assert "<svg" in (folder / "report.html").read_text(encoding="utf-8")


def test_going_on_keeps_what_is_finished(finished, capsys):
    folder = finished
    before = (folder / "results.jsonl").read_bytes()
    study_before = (folder / "study.json").read_bytes()
    assert _run("ablate", "--out", folder, "--jobs", 1, *TINY) == 0
    printed = capsys.readouterr()
    assert "4 of 4 runs were finished before and are kept" in printed.err
    assert (folder / "results.jsonl").read_bytes() == before
    assert (folder / "study.json").read_bytes() == study_before
    # Half of the last line away, as after a power failure: that run is done again, to the same bits.
    bits = _bits(folder)
    (folder / "results.jsonl").write_bytes(before[:-9])
    assert _run("ablate", "--out", folder, "--jobs", 1, *TINY) == 0
    assert "3 of 4 runs were finished before and are kept; 1 interrupted" in capsys.readouterr().err
    assert _bits(folder) == bits


def test_the_report_is_made_again_from_the_rows(computed, finished, capsys):
    folder = finished
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert _run("report", folder) == 0
    assert capsys.readouterr().out.splitlines()[:8] == computed[1].splitlines()[:8]
    assert (folder / "report.html").read_bytes() == page


def test_another_study_in_the_folder_is_refused(finished, capsys):
    folder = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert _run("ablate", "--out", folder, "--quick") == 2
    error = capsys.readouterr().err
    assert "holds the results of another study (" in error
    assert "epochs 1, not 6" in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_report_that_can_not_be_written(finished, capsys):
    folder = finished
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    assert _run("report", folder) == 1
    assert "can't write" in (error := capsys.readouterr().err)
    assert "report.html: is a directory" in error
    assert sorted(path.name for path in folder.iterdir()) == [
        "epochs.jsonl",
        "index.sqlite",
        "report.html",
        "results.jsonl",
        "study.json",
        "tables",
    ]


def test_a_diverged_run_is_said_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    from torch_pnn.ablation import training

    build = training.build

    def poisoned(chosen, arm, streams, data):
        built = build(chosen, arm, streams, data)
        if arm == "pnn":
            with torch.no_grad():
                built.model.classifier.bias.fill_(float("nan"))
        return built

    monkeypatch.setattr(training, "build", poisoned)
    assert _run("ablate", "--out", tmp_path / "d", "--jobs", 1, *TINY) == 0
    printed = capsys.readouterr()
    assert "pnn, seed 0: diverged: the loss became" in printed.err
    assert "PNN, seed 1: the loss became" in printed.out
    assert printed.out.startswith("Undecided: no seed has finished both")
    assert [row["status"] for row in _rows(tmp_path / "d")] == ["diverged", "finished"] * 2
    assert [row["epochs"] for row in _rows(tmp_path / "d")] == [0, 1] * 2
    # It would diverge again: it is kept.
    assert _run("ablate", "--out", tmp_path / "d", "--jobs", 1, *TINY) == 0
    assert "4 of 4 runs were finished before" in capsys.readouterr().err
    assert "left out of every mean and pair" in (tmp_path / "d" / "report.html").read_text(encoding="utf-8")


def test_a_run_that_breaks_is_said_and_done_again(tmp_path, capsys, monkeypatch):
    from torch_pnn.ablation import training

    build = training.build

    def fail_once(chosen, arm, streams, data):
        if (arm, streams["masks"]) == ("control", 0):
            raise RuntimeError("out of\nluck")
        return build(chosen, arm, streams, data)

    monkeypatch.setattr(training, "build", fail_once)
    assert _run("ablate", "--out", tmp_path / "b", "--jobs", 1, *TINY) == 1
    printed = capsys.readouterr()
    assert "1 of 4 runs broke (control, seed 0: RuntimeError: out of luck)" in printed.err.splitlines()[-1]
    statuses = {(row["arm"], row["seed"]): row["status"] for row in _rows(tmp_path / "b")}
    assert statuses == {
        ("pnn", 0): "finished",
        ("control", 0): "broken",
        ("pnn", 1): "finished",
        ("control", 1): "finished",
    }
    monkeypatch.setattr(training, "build", build)
    assert _run("ablate", "--out", tmp_path / "b", "--jobs", 1, *TINY) == 0
    assert [row["status"] for row in records.read(tmp_path / "b").results] == ["finished"] * 4


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "required: command"),
        (("abate",), "invalid choice: 'abate'"),
        (("ablate",), "required: --out"),
        (("ablate", "--out"), "expected one argument"),
        (("ablate", "--out", "x", "--seeds", "0"), "--seeds: 0 is below 1"),
        (("ablate", "--out", "x", "--seeds", "-3"), "--seeds: -3 is below 1"),
        (("ablate", "--out", "x", "--seeds", "six"), "--seeds: 'six' is not a whole number"),
        (("ablate", "--out", "x", "--seeds", "1.5"), "--seeds: '1.5' is not a whole number"),
        (("ablate", "--out", "x", "--seeds", "10000000"), "--seeds: 10000000 is above 100000"),
        (("ablate", "--out", "x", "--epochs", "0"), "--epochs: 0 is below 1"),
        (("ablate", "--out", "x", "--jobs", "0"), "--jobs: 0 is below 1"),
        (("ablate", "--out", "x", "--sedes", "3"), "unrecognized arguments: --sedes"),
        (("ablate", "--out", ""), "--out: a folder's name is needed"),
        (("report",), "required: DIR"),
        (("report", ""), "DIR: a folder's name is needed"),
        (("info", "more"), "unrecognized arguments: more"),
    ],
)
def test_wrong_usage(arguments, words, capsys, tmp_path, monkeypatch, no_training):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        _run(*arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert words in error.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (("ablate", "digit", "--out", "x"), 2, "unknown study 'digit' (did you mean digits?)"),
        (("ablate", "--out", "x", "--arms", "pnn,ctrl"), 2, "unknown arm 'ctrl'; there is: cnn, cnn-params"),
        (("ablate", "--out", "x", "--arms", ""), 2, "unknown arm ''"),
        (("ablate", "--out", "x", "--arms", "pnn,pnn,control"), 2, "names an arm twice"),
        (("ablate", "--out", "x", "--arms", "cnn,pnn"), 2, "lacks control: the study compares pnn with control"),
        (
            ("ablate", "--out", "x", "--logger", "tensorbord"),
            2,
            "unknown logger 'tensorbord'; there is: tensorboard, wandb",
        ),
        (
            ("ablate", "--out", "x", "--logger", "nowhere:X"),
            2,
            "--logger nowhere:X can't be had: No module named 'nowhere'",
        ),
        (("ablate", "mnist", "--out", "x"), 2, "where does mnist lie? Name its folder with --data"),
        (("ablate", "mnist", "--out", "x", "--data", "none"), 2, "there is no folder none"),
        (("report", "x"), 1, "x is no folder; torch-pnn ablate --out x makes one"),
        (("report", "."), 1, ". holds no study (study.json is missing)"),
        (("ablate", "--out", "/proc/torch-pnn"), 1, "can't write into --out /proc/torch-pnn: no such file"),
        (("ablate", "--out", "/dev/null"), 1, "--out /dev/null is a file"),
        (("ablate", "--out", "/dev/null/x"), 1, "--out /dev/null/x is a file (or lies inside one)"),
        (("ablate", "--out", "n" * 300), 1, "file name too long"),
        (("report", "n" * 300), 1, "file name too long"),
    ],
)
def test_what_can_not_be_done_is_one_line(arguments, status, words, capsys, tmp_path, monkeypatch, no_training):
    monkeypatch.chdir(tmp_path)
    assert _run(*arguments) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("torch-pnn: ")
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(tmp_path, capsys):
    tmp_path.chmod(0o500)
    try:
        assert _run("ablate", "--out", tmp_path / "x") == 1
    finally:
        tmp_path.chmod(0o700)
    assert "permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module, package",
    [("sklearn", "scikit-learn"), ("scipy", "scipy"), ("matplotlib", "matplotlib"), ("yaml", "pyyaml")],
)
def test_a_missing_package_is_named_before_any_training(module, package, capsys, tmp_path, monkeypatch, no_training):
    monkeypatch.setitem(sys.modules, module, None)
    assert _run("ablate", "--out", tmp_path / "x") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"torch-pnn: {package} is needed for ")
    assert error.endswith(f"pip install {package}\n")
    assert not list(tmp_path.iterdir())


def test_without_tqdm_there_are_lines(monkeypatch):
    from torch_pnn.ablation import progress

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    assert isinstance(progress.make_progress([("pnn", 0)], 1, 1, stream), progress.Lines)
    assert "pip install tqdm" in stream.getvalue()


def test_info(capsys):
    assert _run("info") == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert {
        "torch-pnn",
        "PyTorch",
        "Python",
        "operators",
        "derivatives",
        "instruction set",
        "CUDA half",
        "threads",
    } <= lines.keys()
    assert importlib.metadata.version("torch").split("+")[0] in lines["PyTorch"]


def test_help_names_every_command_and_option(capsys):
    for arguments, words in (
        ((), ("ablate", "report", "info", "--version")),
        (("ablate",), ("--out", "--quick", "--seeds", "--epochs", "--arms", "--jobs", "report.html", "results.jsonl")),
    ):
        with pytest.raises(SystemExit) as ended:
            _run(*arguments, "--help")
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        for word in words:
            assert word in printed


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        _run("--version")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("torch-pnn ")


def test_the_default_study_can_decide():
    for name in files.ready_names():
        chosen = files.load(name)
        assert len(chosen.seeds) >= SEEDS_TO_DECIDE, name
        assert chosen.question.candidate in chosen.arm_names
        assert chosen.question.control in chosen.arm_names


def test_an_unwritable_result_is_an_error_and_not_a_traceback():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "torch_pnn", "info"],
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "torch-pnn: no space left on device"
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "torch_pnn", "info"],
            env=environment(),
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        os.close(writing)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.slow
def test_workers_give_the_same_bits_as_one_process(tmp_path):
    for jobs in (1, 3):
        done = command("ablate", "--out", tmp_path / str(jobs), "--jobs", jobs, *TINY)
        assert done.returncode == 0, done.stderr
    assert _bits(tmp_path / "1") == _bits(tmp_path / "3")
    assert len(_bits(tmp_path / "1")) == 4


def _start(folder, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "torch_pnn", "ablate", "--out", str(folder), *map(str, arguments)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def _wait_for_rows(folder, process, count, name="results.jsonl"):
    path = Path(folder) / name
    end = time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "no row came"
        time.sleep(0.02)


def _children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def _wait_until_gone(pids):
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, "a worker outlived its runner"
        time.sleep(0.05)


LONGER = ("--epochs", "2", "--seeds", "3", "--arms", "pnn,control")


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(tmp_path, jobs):
    whole = command("ablate", "--out", tmp_path / "whole", "--jobs", 1, *LONGER)
    assert whole.returncode == 0, whole.stderr
    process = _start(tmp_path / "cut", "--jobs", jobs, *LONGER)
    try:
        _wait_for_rows(tmp_path / "cut", process, 3, "epochs.jsonl")
        workers = _children(process)
        assert len(workers) == (0 if jobs == 1 else 2)
    finally:
        process.kill()
        process.communicate()
    _wait_until_gone(workers)
    kept = _bits(tmp_path / "cut")
    assert len(kept) < 6
    again = command("ablate", "--out", tmp_path / "cut", "--jobs", jobs, *LONGER)
    assert again.returncode == 0, again.stderr
    assert _bits(tmp_path / "cut") == _bits(tmp_path / "whole")
    assert kept.items() <= _bits(tmp_path / "cut").items()
    assert len(_rows(tmp_path / "cut", "epochs.jsonl")) == 12


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_job_s_end_say_how_to_go_on(tmp_path, end):
    # A shell has its background jobs ignore SIGINT, and their children inherit that: the tests may be such a job.
    process = _start(
        tmp_path / "x", "--jobs", 2, *LONGER, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    _wait_for_rows(tmp_path / "x", process, 1)
    workers = _children(process)
    if end == signal.SIGINT:
        os.killpg(process.pid, end)  # as a terminal does: to all of them
    else:
        process.terminate()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("torch-pnn: interrupted; ")
    assert "the same command goes on from there" in errors
    _wait_until_gone(workers)
    left = list((tmp_path / "x" / "running").glob("*"))
    assert all(".checkpoint." in path.name for path in left)  # no claim is left behind


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_own_run_alone(tmp_path):
    process = _start(tmp_path / "x", "--jobs", 2, *LONGER)
    _wait_for_rows(tmp_path / "x", process, 1, "epochs.jsonl")
    os.kill(_children(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "its process died (it was ended by signal 9, as the system does where memory runs out)" in errors
    states = [row["status"] for row in _rows(tmp_path / "x")]
    assert sorted(states) == ["broken"] + ["finished"] * 5
    again = command("ablate", "--out", tmp_path / "x", "--jobs", 1, *LONGER)
    assert again.returncode == 0, again.stderr
    assert [row["status"] for row in records.read(tmp_path / "x").results] == ["finished"] * 6


@pytest.mark.slow
def test_a_full_disk_is_said_and_in_the_end_it_is_an_error(tmp_path):
    assert command("ablate", "--out", tmp_path / "x", *LONGER, "--shard", "1/6").returncode == 0
    size = (tmp_path / "x" / "study.json").stat().st_size + 2000  # not enough for all results, nor for a checkpoint

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    process = _start(tmp_path / "x", "--jobs", 1, *LONGER, preexec_fn=small_files)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "can't write the checkpoint of " in errors
    assert "[6/6]" in errors
    assert errors.splitlines()[-1].startswith("torch-pnn: can't write")
    again = command("ablate", "--out", tmp_path / "x", "--jobs", 1, *LONGER)
    assert again.returncode == 0, again.stderr
    assert "runs were finished before and are kept" in again.stderr
    assert len(_bits(tmp_path / "x")) == 6


@pytest.mark.slow
def test_the_stand_in_for_the_compiled_operators_is_said_loudly(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    done = command(
        "ablate", "--out", tmp_path / "x", *TINY, TORCH_PNN_LIBRARY_DIR=str(empty), TORCH_PNN_REQUIRE_OPS="0"
    )
    assert done.returncode == 0, done.stderr
    assert "NOT computed by the compiled operators" in done.stderr
    page = (tmp_path / "x" / "report.html").read_text(encoding="utf-8")
    assert page.index("NOT computed by the compiled operators") < page.index("<svg")


@pytest.mark.slow
def test_a_second_command_in_the_same_folder_shares_the_runs(tmp_path):
    process = _start(tmp_path / "x", "--jobs", 1, *LONGER)
    try:
        _wait_for_rows(tmp_path / "x", process, 1, "epochs.jsonl")
        second = command("ablate", "--out", tmp_path / "x", "--jobs", 1, *LONGER)
        assert second.returncode == 0, second.stderr
        process.communicate(timeout=300)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    found = records.read(tmp_path / "x")
    assert [row["status"] for row in found.results] == ["finished"] * 6
    assert found.missing == []


def test_output_without_unicode(finished):
    folder = finished
    done = command("report", folder, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "Undecided" in done.stdout


def test_reports_are_written_whole(finished, monkeypatch, capsys):
    folder = finished
    page = (folder / "report.html").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert _run("report", folder) == 1
    assert "no space left on device" in capsys.readouterr().err
    assert (folder / "report.html").read_bytes() == page
    assert len(list(folder.iterdir())) == 6
