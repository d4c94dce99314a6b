"""The folder of a study: what is kept, how an interrupted study goes on, and what is refused.

    DIR/study.json      the settings, their fingerprint, the data's fingerprint, and every command that added to the
    folder DIR/results.jsonl   a row per arm and seed, written when that run has ended
    DIR/epochs.jsonl    a row per epoch of each run
    DIR/report.html     made from the three above, and from nothing else

The folder itself is locked by the process that is writing. Rows are appended whole and flushed to the disk. A process
that is killed can leave half a row at a file's end and the epochs of a run that never ended: both are dropped when the
study goes on, and that run is done again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import AblationError, UsageError, describe_os_error
from .study import Study

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
Row = dict[str, Any]


def _run_of(row: Row) -> tuple[str, int]:
    return row["arm"], row["seed"]


@dataclass
class Records:
    """Everything that a folder holds, as the report needs it.

    Attributes:
        directory: the folder.
        study: its settings.
        data_sha256: of the images and labels that the rows were computed on.
        invocations: the commands that wrote rows, oldest first: command, environment, when, runs side by side.
        results: rows of results.jsonl, in the order in which the runs ended.
        epochs: rows of epochs.jsonl.
    """

    directory: Path
    study: Study
    data_sha256: str
    invocations: list[Row]
    results: list[Row]
    epochs: list[Row]

    def of_arm(self, arm: str) -> list[Row]:
        """The finished runs of an arm, by seed."""
        return sorted((row for row in self.results if row["arm"] == arm), key=lambda row: row["seed"])

    def correct(self, arm: str) -> dict[int, int]:
        """Seed -> number of correct test images, over the arm's runs that learned to the end."""
        return {row["seed"]: row["correct"] for row in self.of_arm(arm) if row["status"] == "finished"}

    @property
    def environments(self) -> list[Row]:
        """The environments of the commands that computed rows, oldest first."""
        numbers = sorted({row["invocation"] for row in self.results})
        return [self.invocations[number]["environment"] for number in numbers if number < len(self.invocations)]

    @property
    def missing(self) -> list[tuple[str, int]]:
        """The runs that have no row yet."""
        done = {_run_of(row) for row in self.results}
        return [run for run in self.study.runs if run not in done]


def read_rows(path: Path) -> tuple[list[Row], bool]:
    """The rows of a JSONL file, and whether its last line was only half written.

    A file that is not there has no rows. The half-written last line is left out.

    Raises:
        AblationError: the file can't be read, or another line than the last is damaged.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], False
    except OSError as error:
        raise AblationError(f"can't read {path}: {describe_os_error(error)}") from error
    lines = content.split(b"\n")
    rest = lines.pop()  # empty where the last line is whole
    half = bool(rest)
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("arm"), str) or type(row.get("seed")) is not int:
                raise ValueError
        except ValueError:
            if number == len(lines) and not half:
                return rows, True
            raise AblationError(
                f"{path}, line {number} is not a row of results; nothing was changed. Remove that line to "
                f"have its run done again"
            ) from None
        rows.append(row)
    return rows, half


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader finds the old content or the new, never a part.

    Raises:
        AblationError: the operating system's reason, in one sentence.
    """
    temporary = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; results are as public as any other file of the user.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise AblationError(f"can't write {path}: {describe_os_error(error)}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _rows_text(rows: list[Row]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def read(directory: Path) -> Records:
    """Reads a study's folder and changes nothing in it.

    Raises:
        AblationError: there is no study in it, or it is damaged.
    """
    path = directory / "study.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        what = "is no folder" if not directory.is_dir() else "holds no study (study.json is missing)"
        raise AblationError(f"{directory} {what}; torch-pnn ablate --out {directory} makes one") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = describe_os_error(error) if isinstance(error, OSError) else "it is not text"
        raise AblationError(f"can't read {path}: {reason}") from error
    try:
        head = json.loads(text)
        if head["format"] != FORMAT:
            raise AblationError(f"{path} has format {head['format']}, this version reads format {FORMAT}")
        study = Study.from_json(head["study"])
        invocations, data_sha256 = list(head["invocations"]), str(head["data_sha256"])
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{error.args[0]}" if type(error) is ValueError else "it is damaged"
        raise AblationError(f"can't use {path}: {reason}; choose another folder") from error
    results, _ = read_rows(directory / "results.jsonl")
    epochs, _ = read_rows(directory / "epochs.jsonl")
    return Records(directory, study, data_sha256, invocations, results, epochs)


class Store:
    """The folder while a study is running: the only writer of its rows.

    Use as a context manager. The folder is made where it is missing, locked against a second writer, checked to belong
    to this study, and cleared of what an interrupted run left half done.

    Args:
        directory: the folder.
        study: the study that is to run.
        data_sha256: of the data that it will run on.
        invocation: what to note about this command (see ``Records.invocations``).

    Raises:
        AblationError: the folder can't be made, read or written; it belongs to another study; another process has it.
    """

    def __init__(self, directory: Path, study: Study, data_sha256: str, invocation: Row) -> None:
        self.directory = directory
        self.dropped = 0
        self._streams: dict[str, int] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        except (FileExistsError, NotADirectoryError):
            raise AblationError(f"--out {directory} is a file (or lies inside one), a folder is needed") from None
        except OSError as error:
            raise AblationError(f"can't write into --out {directory}: {describe_os_error(error)}") from error
        try:
            self._claim()
            self.records = self._open(study, data_sha256, invocation)
            for name in ("results.jsonl", "epochs.jsonl"):
                self._streams[name] = os.open(
                    directory / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666
                )
        except OSError as error:
            self.close()
            raise AblationError(f"can't write into --out {directory}: {describe_os_error(error)}") from error
        except BaseException:
            self.close()
            raise

    def _claim(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise AblationError(
                    f"another torch-pnn is writing into {self.directory}; wait for it or choose another --out"
                ) from None
            # A file system without locks: go on without.

    def _open(self, study: Study, data_sha256: str, invocation: Row) -> Records:
        directory = self.directory
        if not (directory / "study.json").exists():
            for name in ("results.jsonl", "epochs.jsonl", "report.html"):
                if (directory / name).exists():
                    raise UsageError(
                        f"{directory} holds a {name} but no study.json, so it is not known what it belongs "
                        f"to; choose another --out"
                    )
            records = Records(directory, study, data_sha256, [], [], [])
        else:
            records = read(directory)
            if records.study.fingerprint() != study.fingerprint():
                differences = "; ".join(records.study.differences(study))
                raise UsageError(
                    f"{directory} holds the results of another study ({differences}); choose another --out, or "
                    f"give the settings that it was begun with"
                )
            if records.data_sha256 != data_sha256:
                raise UsageError(
                    f"{directory} holds results on other data: the images or their split have changed since "
                    f"(scikit-learn's version?); choose another --out"
                )
        self._sweep(records)
        if records.missing or not records.invocations:
            records.invocations.append(invocation)
        head = {
            "format": FORMAT,
            "fingerprint": study.fingerprint(),
            "study": study.to_json(),
            "data_sha256": data_sha256,
            "invocations": records.invocations,
        }
        write_whole(directory / "study.json", json.dumps(head, indent=1, allow_nan=False) + "\n")
        return records

    def _sweep(self, records: Records) -> None:
        """Keeps whole, ended runs; drops halves and the runs that broke, so that they are done again."""
        results, half_result = read_rows(self.directory / "results.jsonl")
        epochs, half_epoch = read_rows(self.directory / "epochs.jsonl")
        wanted = set(records.study.runs)
        counts: dict[tuple[str, int], int] = {}
        for row in epochs:
            counts[_run_of(row)] = counts.get(_run_of(row), 0) + 1
        kept: dict[tuple[str, int], Row] = {}
        for row in results:
            run = _run_of(row)
            if run in wanted and row.get("status") in ("finished", "diverged") and counts.get(run, 0) == row["epochs"]:
                kept[run] = row
        records.results = list(kept.values())
        records.epochs = [row for row in epochs if _run_of(row) in kept]
        started = {_run_of(row) for row in results} | set(counts)
        self.dropped = len(started - set(kept)) or int(half_result or half_epoch)
        if half_result or len(records.results) != len(results):
            write_whole(self.directory / "results.jsonl", _rows_text(records.results))
        if half_epoch or len(records.epochs) != len(epochs):
            write_whole(self.directory / "epochs.jsonl", _rows_text(records.epochs))

    def _append(self, name: str, row: Row, *, sync: bool) -> None:
        data = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            while data:
                data = data[os.write(self._streams[name], data) :]
            if sync:
                os.fsync(self._streams[name])
        except OSError as error:
            raise AblationError(
                f"can't write {self.directory / name}: {describe_os_error(error)}; finished runs are kept, and the "
                f"same command goes on from there once that is mended"
            ) from error

    def add_epoch(self, row: Row) -> None:
        """Appends a row of epochs.jsonl."""
        self._append("epochs.jsonl", row, sync=False)
        self.records.epochs.append(row)

    def add_result(self, row: Row) -> None:
        """Appends a row of results.jsonl, after all epochs of its run, and sees both onto the disk."""
        row = {**row, "invocation": len(self.records.invocations) - 1}
        with contextlib.suppress(OSError):
            os.fsync(self._streams["epochs.jsonl"])
        self._append("results.jsonl", row, sync=True)
        self.records.results.append(row)

    def close(self) -> None:
        """Gives the folder free."""
        for descriptor in [*self._streams.values(), self._lock]:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._streams.clear()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
