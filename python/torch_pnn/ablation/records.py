"""The folder of a study: what is kept, how an interrupted study goes on, and what is refused.

    DIR/study.json      the settings, their fingerprint, the data and its digest, every command that added rows
    DIR/results.jsonl   a row per arm and seed, appended when that run has ended
    DIR/epochs.jsonl    a row per epoch of each run, appended when it has passed
    DIR/index.sqlite    the rows again, for queries (see ``index``); may be deleted at any time
    DIR/running/        while runs are going on: their claims (see ``claims``) and checkpoints (see ``checkpoint``)
    DIR/report.html     made from study.json and the rows, and from nothing else

While runs are going on, rows are only ever appended, whole lines at a time. A later row of the same run, or of the same
epoch, takes the earlier one's place; when a command begins and when it ends, replaced rows are taken out. A process
that is killed can leave half a row at a file's end, which the next one cuts off, and a run that has not ended, which
the next one continues from its checkpoint.

Several processes may work in one folder, on one machine or several. The first one (it holds the claim ``main``) appends
to the two files above; each other one to two files of its own, ``results.<process>.jsonl`` and
``epochs.<process>.jsonl``, because appending to one file from two machines can lose lines on network file systems. They
are moved into the two main files when their process has ended, by whichever process ends after it or begins next.
Whoever reads the folder takes all of them together.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import checkpoint as checkpoints
from . import claims
from .errors import AblationError, RecordsError, UsageError, describe_os_error
from .index import Index
from .study import Study

FORMAT = 2
Row = dict[str, Any]
Run = tuple[str, int]

#: The two kinds of rows, by the stem of their file's name.
KINDS = ("results", "epochs")
#: What differs between two rows of the same epoch computed twice.
_TIMES = ("seconds",)
#: The index is brought up to date at every result, and between two of them at most so often, in seconds.
INDEX_SECONDS = 5.0


def _run_of(row: Row) -> Run:
    return row["arm"], row["seed"]


def _merged(rows: Iterable[Row], kind: str) -> list[Row]:
    """The rows that count, each where the first of its run (or epoch) stood.

    A later one replaces an earlier one, but a run that broke does not replace one that ended.
    """
    kept: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = _run_of(row) if kind == "results" else (*_run_of(row), row.get("epoch"))
        if not (row.get("status") == "broken" and kept.get(key, row).get("status") != "broken"):
            kept[key] = row
    return list(kept.values())


@dataclass
class Records:
    """Everything that a folder holds, as the report needs it.

    Attributes:
        directory: the folder.
        study: its settings.
        data_sha256: of the images and labels that the rows were computed on.
        invocations: the commands that wrote rows, oldest first: command, environment, when, runs side by side.
        results: a row for each run that ended or broke, in the order in which they did.
        epochs: a row for each epoch of each run.
        data: what the data is: name, description, class_names, task, train_count, test_count, validation_count,
            unreadable.
        metric: what ``accuracy`` is: "accuracy", "mAP" or "mAP@0.5".
    """

    directory: Path
    study: Study
    data_sha256: str
    invocations: list[Row]
    results: list[Row]
    epochs: list[Row]
    data: Row = field(default_factory=dict)
    metric: str = "accuracy"

    def of_arm(self, arm: str) -> list[Row]:
        """The runs of an arm that ended or broke, by seed."""
        return sorted((row for row in self.results if row["arm"] == arm), key=lambda row: row["seed"])

    def scores(self, arm: str) -> dict[int, float]:
        """Seed -> score on the whole test set, over the arm's runs that learned to the end."""
        return {row["seed"]: row["accuracy"] for row in self.of_arm(arm) if row["status"] == "finished"}

    def correct(self, arm: str) -> dict[int, int]:
        """Seed -> number of correct test images, where the metric counts images."""
        finished = [row for row in self.of_arm(arm) if row["status"] == "finished"]
        return {row["seed"]: row["correct"] for row in finished if row["correct"] is not None}

    @property
    def environments(self) -> list[Row]:
        """The environments of the commands that computed rows, oldest first."""
        numbers = sorted({row["invocation"] for row in self.results})
        return [self.invocations[number]["environment"] for number in numbers if number < len(self.invocations)]

    @property
    def missing(self) -> list[Run]:
        """The runs that have no row yet."""
        done = {_run_of(row) for row in self.results}
        return [run for run in self.study.runs if run not in done]


def describe_data(data: Any) -> Row:
    """What study.json tells about a data set: JSON values.

    Args:
        data: a ``data.Dataset``.
    """
    return {
        "name": data.name,
        "description": data.description,
        "class_names": list(data.class_names),
        "task": data.task,
        "train_count": data.train_count,
        "test_count": data.test_count,
        "validation_count": data.validation_count,
        "unreadable": list(data.unreadable),
    }


def _parse(path: Path, content: bytes) -> tuple[list[Row], int]:
    """The rows of a file's content, and the length of the part that holds them."""
    lines = content.split(b"\n")
    half = lines.pop()  # empty where the last line is whole
    rows: list[Row] = []
    length = 0
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("arm"), str) or type(row.get("seed")) is not int:
                raise ValueError
        except ValueError:
            if number == len(lines) and not half:
                break
            raise AblationError(
                f"{path}, line {number} is not a row of results; nothing was changed. Remove that line to "
                f"have its run done again"
            ) from None
        rows.append(row)
        length += len(line) + 1
    return rows, length


def read_rows(path: Path) -> tuple[list[Row], bool]:
    """The rows of a JSONL file, and whether its last line was only half written.

    A file that is not there has no rows. The half-written last line is left out.

    Raises:
        AblationError: the file can't be read, or another line than the last is damaged.
    """
    content = _content(path)
    rows, length = _parse(path, content)
    return rows, length < len(content)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise AblationError(f"can't read {path}: {describe_os_error(error)}") from error


def _files(directory: Path, kind: str) -> list[Path]:
    """The files that hold rows of a kind: the main one first."""
    others = glob.glob(f"{glob.escape(str(directory))}/{kind}.*.jsonl")
    return [directory / f"{kind}.jsonl", *map(Path, sorted(others))]


def _all_rows(directory: Path, kind: str) -> list[Row]:
    return [row for path in _files(directory, kind) for row in read_rows(path)[0]]


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
        records = Records(
            directory,
            study,
            str(head["data_sha256"]),
            list(head["invocations"]),
            [],
            [],
            dict(head["data"]),
            str(head["metric"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{error.args[0]}" if type(error) is ValueError else "it is damaged"
        raise AblationError(f"can't use {path}: {reason}; choose another folder") from error
    records.results = _merged(_all_rows(directory, "results"), "results")
    records.epochs = _merged(_all_rows(directory, "epochs"), "epochs")
    return records


class _Writer:
    """Appends whole lines to a file; what can't be written now is kept and tried again with the next line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.waiting = b""

    def append(self, text: str, *, sync: bool) -> OSError | None:
        """Appends text; returns why it, or earlier text, could not be written.

        A write that stopped in the middle of a line is continued there.
        """
        self.waiting += text.encode()
        try:
            while self.waiting:
                self.waiting = self.waiting[os.write(self._descriptor, self.waiting) :]
            if sync:
                os.fsync(self._descriptor)
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


class _Reader:
    """Reads what others append to a file, from where it stopped the last time."""

    def __init__(self, path: Path) -> None:
        self.path, self._position, self._inode = path, 0, -1

    def new_rows(self) -> list[Row]:
        try:
            with open(self.path, "rb") as file:
                state = os.fstat(file.fileno())
                if state.st_ino != self._inode or state.st_size < self._position:  # put in order meanwhile
                    self._position, self._inode = 0, state.st_ino
                file.seek(self._position)
                content = file.read()
        except OSError:
            return []  # moved into the main file, where they are found again
        rows, length = _parse(self.path, content[: content.rfind(b"\n") + 1])
        self._position += length
        return rows


class Store:
    """The folder while a study is running.

    Use as a context manager. The folder is made where it is missing, checked to belong to this study, and cleared of
    what an interrupted process left half written. Other processes may hold it too; a run is done by the one that has
    claimed it (``claim``).

    Args:
        directory: the folder.
        study: the study that is to run.
        data_sha256: of the data that it will run on.
        invocation: what to note about this command (see ``Records.invocations``).
        data: what to note about the data (see ``describe_data``).
        metric: what the scores are.

    Attributes:
        records: what the folder held at the start and what was added since, by this process and, as far as they have
            been looked at, by others.
        continued: runs that were interrupted before and go on from a checkpoint.
        dropped: runs that were interrupted before and begin anew.
        on_trouble: is told, in a sentence, that rows can't be written for now.

    Raises:
        AblationError: the folder can't be made, read or written, or it belongs to another study.
    """

    def __init__(
        self,
        directory: Path,
        study: Study,
        data_sha256: str,
        invocation: Row,
        data: Row | None = None,
        metric: str = "accuracy",
    ) -> None:
        self.directory = directory
        self.on_trouble: Callable[[str], None] = lambda sentence: None
        self.name = claims.writer_name()
        self._running = directory / "running"
        self._claims: dict[Run, claims.Claim] = {}
        self._writers: dict[str, _Writer] = {}
        self._readers: dict[Path, _Reader] = {}
        self._trouble: str | None = None
        self._heart: claims.Heart | None = None
        self._main: claims.Claim | None = None
        self._self: claims.Claim | None = None
        self._index = Index(directory)
        self._indexed = 0.0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._open(study, data_sha256, invocation, data or {}, metric)
        except (FileExistsError, NotADirectoryError):
            self._let_go()
            raise AblationError(f"--out {directory} is a file (or lies inside one), a folder is needed") from None
        except OSError as error:
            self._let_go()
            raise AblationError(f"can't write into --out {directory}: {describe_os_error(error)}") from error
        except BaseException:
            self._let_go()
            raise

    # Opening

    def _open(self, study: Study, data_sha256: str, invocation: Row, data: Row, metric: str) -> None:
        self._check(study, data_sha256)  # before anything is written
        self._running.mkdir(exist_ok=True)
        self._heart = claims.Heart()
        with claims.exclusive(self._running / "study.claim"):
            known = self._check(study, data_sha256)
            self.records = known or Records(self.directory, study, data_sha256, [], [], [], data, metric)
            self._self = claims.acquire(self._running / f"{self.name}.claim")
            self._main = claims.acquire(self._running / "main.claim")
            if self._main is not None:
                self._tidy()
                self.records.results = _merged(_all_rows(self.directory, "results"), "results")
                self.records.epochs = _merged(_all_rows(self.directory, "epochs"), "epochs")
            self._set_aside_unfinished()
            if self.records.missing or not self.records.invocations:
                self.records.invocations.append(invocation)
            self._invocation = len(self.records.invocations) - 1
            self._write_head()
        for claim in (self._self, self._main):
            if claim is not None:
                self._heart.add(claim)
        self._open_writers()
        self._refresh_index()

    def _open_writers(self) -> None:
        for kind in KINDS:
            name = f"{kind}.jsonl" if self._main is not None else f"{kind}.{self.name}.jsonl"
            waiting = self._writers[kind].waiting if kind in self._writers else b""
            self._writers[kind] = _Writer(self.directory / name)
            self._writers[kind].waiting = waiting

    def _check(self, study: Study, data_sha256: str) -> Records | None:
        """What the folder holds, if it is this study's; None where it holds nothing."""
        directory = self.directory
        if not (directory / "study.json").exists():
            for name in ("results.jsonl", "epochs.jsonl", "report.html"):
                if (directory / name).exists():
                    raise UsageError(
                        f"{directory} holds a {name} but no study.json, so it is not known what it belongs "
                        f"to; choose another --out"
                    )
            return None
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
        return records

    def _write_head(self) -> None:
        records = self.records
        head = {
            "format": FORMAT,
            "fingerprint": records.study.fingerprint(),
            "study": records.study.to_json(),
            "data_sha256": records.data_sha256,
            "data": records.data,
            "metric": records.metric,
            "invocations": records.invocations,
        }
        write_whole(self.directory / "study.json", json.dumps(head, indent=1, allow_nan=False) + "\n")

    def _tidy(self) -> None:
        """Puts the main files in order: no half rows, no replaced rows, and the rows of processes that have ended."""
        for kind in KINDS:
            path = self.directory / f"{kind}.jsonl"
            content = _content(path)
            _, length = _parse(path, content)
            if length < len(content):
                os.truncate(path, length)
        for kind in ("epochs", "results"):  # in this order: a result is never without its epochs
            for path in _files(self.directory, kind)[1:]:
                name = path.name.removeprefix(f"{kind}.").removesuffix(".jsonl")
                if name == self.name or not claims.is_live(self._running / f"{name}.claim"):
                    self._take_in(path, self.directory / f"{kind}.jsonl")
            main = self.directory / f"{kind}.jsonl"
            rows = read_rows(main)[0]
            if len(kept := _merged(rows, kind)) < len(rows):
                write_whole(main, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
        claims.sweep(self._running)

    @staticmethod
    def _take_in(path: Path, main: Path) -> None:
        content = _content(path)
        _, length = _parse(path, content)
        # What an interrupted move left there is left out.
        known = set(_content(main).splitlines())
        lines = [line for line in content[:length].splitlines() if line not in known]
        descriptor = os.open(main, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            rest = b"".join(line + b"\n" for line in lines)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        path.unlink(missing_ok=True)

    def _set_aside_unfinished(self) -> None:
        """Takes the runs that did not end out of ``records``: they are to be done."""
        records = self.records
        wanted = set(records.study.runs)
        counts: dict[Run, int] = {}
        for row in records.epochs:
            counts[_run_of(row)] = counts.get(_run_of(row), 0) + 1
        kept = {}
        for row in records.results:
            run = _run_of(row)
            if run in wanted and row.get("status") in ("finished", "diverged") and counts.get(run, 0) >= row["epochs"]:
                kept[run] = row
        begun = ({_run_of(row) for row in records.results} | set(counts)) & wanted - set(kept)
        saved = {run for run in wanted if checkpoints.exists(self.checkpoint(run))}
        for run in saved & set(kept):
            checkpoints.remove(self.checkpoint(run))
        self.continued = len(saved - set(kept))
        self.dropped = len(begun - saved)
        records.results = list(kept.values())
        records.epochs = [row for row in records.epochs if _run_of(row) in wanted]
        self._known_epochs = {(*_run_of(row), row["epoch"]): row for row in records.epochs}
        self._seen_results = {_run_of(row) for row in records.results}

    # Sharing the runs

    def _file_stem(self, run: Run) -> str:
        return f"{urllib.parse.quote(run[0], safe=' ')}, seed {run[1]}"

    def checkpoint(self, run: Run) -> Path:
        """Where a run keeps its checkpoint; ``add_result`` removes it when the run has ended."""
        return self._running / f"{self._file_stem(run)}.checkpoint"

    def claim(self, runs: Sequence[Run] | None = None) -> Run | None:
        """Claims the next run that has no result and that no other process is doing.

        Args:
            runs: those to choose from, in order; None = all of the study's.

        Returns:
            None where there is none left.
        """
        for run in self.records.study.runs if runs is None else runs:
            if run in self._seen_results or run in self._claims:
                continue
            try:
                claim = claims.acquire(self._running / f"{self._file_stem(run)}.claim")
            except OSError as error:
                raise RecordsError(f"can't write into {self._running}: {describe_os_error(error)}") from error
            if claim is None:
                continue
            self.refresh()
            if run in self._seen_results:  # another process ended it just before
                claim.release()
                continue
            assert self._heart is not None
            self._claims[run] = claim
            self._heart.add(claim)
            return run
        return None

    def release(self, run: Run) -> None:
        """Gives a claimed run free."""
        claim = self._claims.pop(run, None)
        if claim is not None and self._heart is not None:
            self._heart.release(claim)

    def refresh(self) -> None:
        """Takes in the rows that other processes have appended meanwhile."""
        mine = {writer.path for writer in self._writers.values()}
        for kind in ("epochs", "results"):
            for path in _files(self.directory, kind):
                if path in mine:
                    continue
                for row in self._readers.setdefault(path, _Reader(path)).new_rows():
                    self._note(kind, row)

    def _note(self, kind: str, row: Row) -> None:
        """Adds another process's row to the records."""
        run = _run_of(row)
        if kind == "epochs":
            key = (*run, row["epoch"])
            if key not in self._known_epochs:
                self.records.epochs.append(row)
                self._known_epochs[key] = row
        elif run not in self._seen_results and row.get("invocation", -1) >= self._invocation_floor(row):
            self.records.results.append(row)
            self._seen_results.add(run)

    def _invocation_floor(self, row: Row) -> int:
        """Runs that broke before this command began are to be done again; those that broke since are not."""
        return self._invocation if row.get("status") == "broken" else -1

    # Writing

    def add_epoch(self, row: Row) -> bool:
        """Appends a row of epochs.jsonl, unless it is there: a run that goes on tells its earlier epochs again.

        Returns:
            False where it was there.
        """
        key = (*_run_of(row), row["epoch"])
        known = self._known_epochs.get(key)
        if known is not None and _without_times(known) == _without_times(row):
            return False
        self._append("epochs", row, sync=False)
        self._known_epochs[key] = row
        if known is None:
            self.records.epochs.append(row)
        else:
            self.records.epochs[self.records.epochs.index(known)] = row
        if time.monotonic() - self._indexed > INDEX_SECONDS:
            self._refresh_index()
        return True

    def add_result(self, row: Row) -> None:
        """Appends a row of results.jsonl, after all epochs of its run, and sees both onto the disk."""
        run = _run_of(row)
        row = {**row, "invocation": self._invocation}
        self._append("epochs", None, sync=True)
        self._append("results", row, sync=True)
        self.records.results.append(row)
        self._seen_results.add(run)
        if row["status"] != "broken" and self._trouble is None:
            checkpoints.remove(self.checkpoint(run))
        self.release(run)
        self._refresh_index()

    def _append(self, kind: str, row: Row | None, *, sync: bool) -> None:
        if self._main is not None and not self._main.is_mine():
            # This process slept for longer than a lease, and another one has the main files now.
            self._main = None
            for writer in self._writers.values():
                writer.close()
            self._open_writers()
        text = "" if row is None else json.dumps(row, allow_nan=False) + "\n"
        error = self._writers[kind].append(text, sync=sync)
        waiting = any(writer.waiting for writer in self._writers.values())
        if error is not None and self._trouble is None:
            self._trouble = f"can't write {self._writers[kind].path}: {describe_os_error(error)}"
            self.on_trouble(f"{self._trouble}; the runs go on, and their rows are written once that is mended")
            self.records.invocations[self._invocation].setdefault("troubles", []).append(self._trouble)
        elif self._trouble is not None and not waiting:
            self._trouble = None
            self.on_trouble("rows can be written again; none was lost")

    def _refresh_index(self) -> None:
        if self._main is not None:
            self._index.refresh()
            self._indexed = time.monotonic()

    # Closing

    def close(self) -> None:
        """Writes what is still waiting, puts the rows in order and gives the claims free.

        Raises:
            RecordsError: rows could not be written.
        """
        lost = None
        for kind in KINDS:
            if kind in self._writers and self._writers[kind].waiting:
                error = self._writers[kind].append("", sync=True)
                if error is not None:
                    lost = f"can't write {self._writers[kind].path}: {describe_os_error(error)}"
        if self._writers and self.records.invocations[self._invocation].get("troubles"):
            with contextlib.suppress(AblationError, OSError), claims.exclusive(self._running / "study.claim", 5.0):
                current = read(self.directory)
                current.invocations[self._invocation] = self.records.invocations[self._invocation]
                self.records.invocations = current.invocations
                self._write_head()
        self._let_go()
        if lost is not None:
            raise RecordsError(
                f"{lost}; finished runs that were written are kept, and the same command goes on from there once that "
                f"is mended"
            )

    def _let_go(self) -> None:
        for writer in self._writers.values():
            writer.close()
        opened = bool(self._writers)
        self._writers.clear()
        for run in list(self._claims):
            self.release(run)
        if opened:
            self._merge_at_the_end()
        self._index.close()
        if self._heart is not None:
            self._heart.stop()
            self._heart = None
        for claim in (self._self, self._main):
            if claim is not None:
                claim.release()
        with contextlib.suppress(OSError):
            self._running.rmdir()

    def _merge_at_the_end(self) -> None:
        """Moves rows of ended processes into the main files, if this process may; if not, another one does later."""
        assert self._heart is not None
        if self._self is not None:
            self._heart.release(self._self)
            self._self = None
        with contextlib.suppress(OSError, AblationError):
            for _ in range(10):
                if self._main is None:
                    self._main = claims.acquire(self._running / "main.claim")
                    if self._main is None:
                        return  # it will look for the rows of ended processes after giving that claim free
                    self._heart.add(self._main)
                self._tidy()
                self._index.refresh()
                self._heart.release(self._main)
                self._main = None
                if not self._left_behind():
                    return

    def _left_behind(self) -> bool:
        """Whether a process ended while this one was the main one and left its rows to it."""
        for kind in KINDS:
            for path in _files(self.directory, kind)[1:]:
                name = path.name.removeprefix(f"{kind}.").removesuffix(".jsonl")
                if not claims.is_live(self._running / f"{name}.claim"):
                    return True
        return False

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(RecordsError):
                self.close()


def _without_times(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in _TIMES}
