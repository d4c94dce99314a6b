"""Carries out the runs of a study that have no result yet, one after another or several side by side.

Runs are independent of each other, each has one intra-operator thread, and on small images two such runs side by side
use two cores better than one run with two threads. Where more than one is wanted, each worker is a process of its own
(see ``worker``); only this process writes the study's folder.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import IO, Any

from .data import Dataset
from .errors import AblationError
from .progress import Progress
from .records import Row, Store
from .study import Study
from .worker import attempt


def execute(study: Study, data: Dataset, store: Store, progress: Progress, jobs: int) -> None:
    """Trains every run that the store lacks.

    Args:
        study: the settings.
        data: the study's data.
        store: receives the rows.
        progress: is told of each epoch and run.
        jobs: runs side by side; 1 = all in this process.

    Raises:
        AblationError: rows can't be written, or workers can't be had.
    """
    pending = deque(store.records.missing)
    jobs = min(jobs, len(pending))
    if jobs > 1:
        _Pool(study, data, store, progress).run(pending, jobs)
        return

    def on_epoch(row: Row) -> None:
        store.add_epoch(row)
        progress.epoch(row)

    for arm, seed in pending:
        row = attempt(study, arm, seed, data, on_epoch)
        store.add_result(row)
        progress.result(row)


class _Worker:
    """One worker process, and a thread that carries its answers into the pool's queue."""

    def __init__(self, number: int, head: Row, threads: int, answers: queue.Queue[tuple[_Worker, Row | None]]) -> None:
        self.number = number
        self.task: tuple[str, int] | None = None
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

    def give(self, arm: str, seed: int) -> None:
        self.task = arm, seed
        self._send({"arm": arm, "seed": seed})

    def last_words(self) -> str:
        """Why it ended, as far as that can be known."""
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "it stopped answering"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
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

    def __init__(self, study: Study, data: Dataset, store: Store, progress: Progress) -> None:
        self._study, self._data, self._store, self._progress = study, data, store, progress
        self._answers: queue.Queue[tuple[_Worker, Row | None]] = queue.Queue()
        self._workers: list[_Worker] = []

    def run(self, pending: deque[tuple[str, int]], jobs: int) -> None:
        head = {"study": self._study.to_json(), "data_sha256": self._data.sha256}
        left = len(pending)
        started = 0
        try:
            for _ in range(jobs):
                self._workers.append(_Worker(started, head, self._study.threads, self._answers))
                started += 1
            while left:
                worker, answer = self._answers.get()
                if answer is None:
                    self._workers.remove(worker)
                    words = worker.last_words()
                    worker.end()
                    if not worker.was_ready:
                        raise AblationError(f"a worker process could not start: {words}; --jobs 1 does without")
                    if worker.task is not None:
                        self._finish(self._lost(worker.task, words))
                        left -= 1
                    if pending:
                        self._workers.append(_Worker(started, head, self._study.threads, self._answers))
                        started += 1
                elif "epoch" in answer:
                    self._store.add_epoch(answer["epoch"])
                    self._progress.epoch(answer["epoch"])
                elif "refused" in answer:
                    raise AblationError(answer["refused"])
                else:
                    if "result" in answer:
                        self._finish(answer["result"])
                        left -= 1
                    worker.was_ready, worker.task = True, None
                    if pending:
                        worker.give(*pending.popleft())
        finally:
            for worker in self._workers:
                worker.end()

    def _finish(self, row: Row) -> None:
        self._store.add_result(row)
        self._progress.result(row)

    def _lost(self, run: tuple[str, int], words: str) -> dict[str, Any]:
        return {
            "study": self._study.name,
            "arm": run[0],
            "seed": run[1],
            "status": "broken",
            "problem": f"its process died ({words})",
            "accuracy": None,
            "correct": None,
            "total": self._data.test_count,
            "epochs": 0,
        }
