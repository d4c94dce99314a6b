"""Carries out the runs of a study that have no result yet, one after another or several side by side.

Runs are independent of each other, each has one intra-operator thread, and on small images two such runs side by side
use two cores better than one run with two threads. Where more than one is wanted, each worker is a process of its own
(see ``worker``); only this process writes rows. Several commands may work in one folder: each claims the runs that it
does (see ``records.Store.claim``). Under torchrun, one run is spread over all processes (see ``distributed``).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from . import distributed
from .data import Dataset
from .errors import AblationError, UsageError
from .loggers import Loggers
from .progress import Progress
from .records import Row, Run, Store
from .study import Study
from .worker import attempt, broken, now_and_then


def shard(runs: Sequence[Run], number: int, of: int) -> list[Run]:
    """One of ``of`` disjoint parts of the runs, for the tasks of a job array.

    Args:
        runs: seed by seed, the arms in order.
        number: which part, from 1.
        of: how many parts there are.

    Raises:
        UsageError: there is no such part.

    Example:
        >>> runs = [(arm, seed) for seed in (0, 1) for arm in ("pnn", "control")]
        >>> shard(runs, 1, 2), shard(runs, 2, 2)
        ([('pnn', 0), ('control', 1)], [('control', 0), ('pnn', 1)])
    """
    if not 1 <= number <= of:
        raise UsageError(f"--shard {number}/{of}: there are parts 1 to {of}")
    # Each round of ``of`` runs is handed out one further on, so that a part doesn't get the same arm every time.
    return [run for place, run in enumerate(runs) if (place + place // of) % of == number - 1]


def execute(
    study: Study,
    data: Dataset,
    store: Store | None,
    progress: Progress,
    jobs: int,
    *,
    runs: Sequence[Run] | None = None,
    loggers: Loggers | None = None,
) -> None:
    """Trains every run that the store lacks and that no other process is doing.

    Args:
        study: the settings.
        data: the study's data.
        store: receives the rows; None in the processes of torchrun beside the first.
        progress: is told of each epoch and run.
        jobs: runs side by side; 1 = all in this process.
        runs: those to choose from; None = all of the study's.
        loggers: are told of each epoch and run too.

    Raises:
        AblationError: rows can't be written, or workers can't be had.
    """
    if distributed.is_active():
        _together(study, data, store, progress, runs, loggers)
        return
    assert store is not None
    with _interrupted_by_sigterm():
        _by_itself(study, data, store, progress, jobs, runs, loggers)


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """The signal with which a job's time ends does what Ctrl-C does: claims are given free at once."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _by_itself(
    study: Study,
    data: Dataset,
    store: Store,
    progress: Progress,
    jobs: int,
    runs: Sequence[Run] | None,
    loggers: Loggers | None,
) -> None:
    """The runs in this process, or in workers of its own."""
    left = [run for run in store.records.missing if runs is None or run in set(runs)]
    jobs = min(jobs, len(left))
    if jobs > 1:
        _Pool(study, data, store, progress, runs, loggers).run(jobs)
        return
    book = _Book(store, progress, loggers)
    while (run := store.claim(runs)) is not None:
        told = now_and_then(functools.partial(progress.step, run))
        path = store.checkpoint(run)
        row = attempt(study, run[0], run[1], data, book.epoch, checkpoint=path, on_step=told, on_trouble=progress.say)
        book.result(row)


def _together(
    study: Study,
    data: Dataset,
    store: Store | None,
    progress: Progress,
    runs: Sequence[Run] | None,
    loggers: Loggers | None,
) -> None:
    """The runs one after another, each in all processes of torchrun; the first claims and writes.

    A run that breaks in one process would leave the others waiting, so it ends them all, and torchrun says so.
    """
    from .training import train

    book = None if store is None else _Book(store, progress, loggers)
    while True:
        run: Run | None = distributed.broadcast(None if store is None else store.claim(runs), study.device)
        if run is None:
            return
        if store is None or book is None:
            train(study, run[0], run[1], data, lambda row: None)
            continue
        told = now_and_then(functools.partial(progress.step, run))
        path = store.checkpoint(run)
        row = train(study, run[0], run[1], data, book.epoch, checkpoint=path, on_step=told, on_trouble=progress.say)
        book.result(row)


class _Book:
    """Everybody who is told of a row."""

    def __init__(self, store: Store, progress: Progress, loggers: Loggers | None) -> None:
        self._store, self._progress, self._loggers = store, progress, loggers

    def epoch(self, row: Row) -> None:
        self._progress.epoch(row, again=not self._store.add_epoch(row))
        if self._loggers is not None:
            self._loggers.epoch(row)

    def result(self, row: Row) -> None:
        self._store.add_result(row)
        self._progress.result(row)
        if self._loggers is not None:
            self._loggers.result(row)


class _Worker:
    """One worker process, and a thread that carries its answers into the pool's queue."""

    def __init__(self, number: int, head: Row, threads: int, answers: queue.Queue[tuple[_Worker, Row | None]]) -> None:
        self.number = number
        self.task: Run | None = None
        self.was_ready = False
        # What it says on standard error is kept out of the way and shown only if it dies.
        self._errors: IO[bytes] = tempfile.TemporaryFile()
        package_parent = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([package_parent, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "torch_pnn.ablation.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            raise AblationError(f"can't start a worker process: {error}; --jobs 1 does without") from error
        threading.Thread(target=self._listen, args=(answers,), daemon=True).start()
        self._send(head)

    def _listen(self, answers: queue.Queue[tuple[_Worker, Row | None]]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                answers.put((self, json.loads(line)))
            except ValueError:
                break
        answers.put((self, None))

    def _send(self, message: Row) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: the listening thread says so

    def give(self, run: Run, checkpoint: Path) -> None:
        self.task = run
        self._send({"arm": run[0], "seed": run[1], "checkpoint": str(checkpoint.absolute())})

    def last_words(self) -> str:
        """Why it ended, as far as that can be known."""
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "it stopped answering"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        if code == -9:
            return "it was ended by signal 9, as the system does where memory runs out"
        how = f"it was ended by signal {-code}" if code < 0 else f"it ended with status {code}"
        return f"{how}: {lines[-1]}" if lines and code > 0 else how

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._errors):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    pass


class _Pool:
    """Hands runs to workers and their rows to the store."""

    def __init__(
        self,
        study: Study,
        data: Dataset,
        store: Store,
        progress: Progress,
        runs: Sequence[Run] | None,
        loggers: Loggers | None,
    ) -> None:
        self._study, self._data, self._store, self._progress = study, data, store, progress
        self._runs, self._book = runs, _Book(store, progress, loggers)
        self._answers: queue.Queue[tuple[_Worker, Row | None]] = queue.Queue()
        self._workers: list[_Worker] = []
        self._started = 0

    def _start(self) -> None:
        head = {"study": self._study.to_json(), "data_sha256": self._data.sha256}
        self._workers.append(_Worker(self._started, head, self._study.threads, self._answers))
        self._started += 1

    def run(self, jobs: int) -> None:
        try:
            for _ in range(jobs):
                self._start()
            idle: set[_Worker] = set()
            while len(idle) < len(self._workers):
                worker, answer = self._answers.get()
                if answer is None:
                    self._workers.remove(worker)
                    idle.discard(worker)
                    words = worker.last_words()
                    worker.end()
                    if not worker.was_ready:
                        raise AblationError(f"a worker process could not start: {words}; --jobs 1 does without")
                    if worker.task is not None:
                        self._book.result(broken(self._study, *worker.task, f"its process died ({words})"))
                        self._start()
                elif "epoch" in answer:
                    self._book.epoch(answer["epoch"])
                elif "at" in answer:
                    arm, seed, epochs = answer["at"]
                    self._progress.step((arm, seed), epochs)
                elif "trouble" in answer:
                    self._progress.say(answer["trouble"])
                elif "refused" in answer:
                    raise AblationError(answer["refused"])
                else:
                    if "result" in answer:
                        self._book.result(answer["result"])
                    worker.was_ready, worker.task = True, None
                    run = self._store.claim(self._runs)
                    if run is None:
                        idle.add(worker)
                    else:
                        worker.give(run, self._store.checkpoint(run))
        finally:
            for worker in self._workers:
                worker.end()
