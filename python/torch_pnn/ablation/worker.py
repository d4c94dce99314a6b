"""A process that trains one run after another for the runner: ``python -m torch_pnn.ablation.worker``.

It reads JSON lines from standard input: first ``{"study": …, "data_sha256": …}``, then ``{"arm": …, "seed": …,
"checkpoint": path}`` for each run. It writes JSON lines to what was its standard output: ``{"ready": true}``,
``{"at": [arm, seed, epochs]}`` once a second, ``{"epoch": row}``, ``{"trouble": sentence}``, ``{"result": row}``, or
``{"refused": sentence}``. It ends as soon as its input ends, in the middle of an epoch too: a killed runner leaves no
workers behind.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from .data import load
from .errors import AblationError, RecordsError, UsageError, describe_os_error
from .study import Study

Row = dict[str, Any]

#: Seconds between two reports from inside an epoch.
REPORT_SECONDS = 1.0


def attempt(study: Study, arm: str, seed: int, data: Any, on_epoch: Callable[[Row], None], **more: Any) -> Row:
    """``training.train``, where a run that breaks becomes a row with its reason, so that the other runs go on.

    Raises:
        UsageError: the study itself can't be carried out.
        RecordsError: its rows can't be written.
    """
    from .training import train

    try:
        return train(study, arm, seed, data, on_epoch, **more)
    except (UsageError, RecordsError, BrokenPipeError):
        raise
    except AblationError as error:
        reason = str(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        reason = f"{where}{describe_os_error(error)}"
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no reason given'}"
    return broken(study, arm, seed, reason)


def broken(study: Study, arm: str, seed: int, problem: str) -> Row:
    """The row of a run that broke."""
    return {
        "study": study.name,
        "arm": arm,
        "seed": seed,
        "status": "broken",
        "problem": problem,
        "accuracy": None,
        "correct": None,
        "total": None,
        "epochs": 0,
    }


def now_and_then(tell: Callable[[float], None], seconds: float = REPORT_SECONDS) -> Callable[[float], None]:
    """Passes a figure on, but not more often than every ``seconds``."""
    last = time.monotonic()

    def on_step(epochs: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            tell(epochs)

    return on_step


def serve(requests: Callable[[], str | None], answers: TextIO) -> None:
    """Answers requests until there are none left.

    Args:
        requests: gives the next line; None at the end.
        answers: receives the answers.
    """

    def send(message: Row) -> None:
        answers.write(json.dumps(message, allow_nan=False) + "\n")
        answers.flush()

    head = requests()
    if not head:
        return
    settings = json.loads(head)
    try:
        study = Study.from_json(settings["study"])
        data = load(study.data)
        if data.sha256 != settings["data_sha256"]:
            raise AblationError("a worker process read other data than the command that started it")
        send({"ready": True})
        while line := requests():
            task = json.loads(line)
            run = task["arm"], task["seed"]
            path = Path(task["checkpoint"]) if task.get("checkpoint") else None
            row = attempt(
                study,
                *run,
                data,
                lambda row: send({"epoch": row}),
                checkpoint=path,
                on_step=now_and_then(lambda epochs, run=run: send({"at": [*run, epochs]})),  # type: ignore[misc]
                on_trouble=lambda sentence: send({"trouble": sentence}),
            )
            send({"result": row})
    except AblationError as error:
        send({"refused": str(error)})


def _read_ahead(stream: TextIO) -> Callable[[], str | None]:
    """Reads lines in a thread of its own, which ends the process when the other side has gone."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines.get


def main() -> int:
    """Entry point. Standard output is kept for answers alone: whatever a library prints goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the runner, which ends its workers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        serve(_read_ahead(sys.stdin), answers)
    except BrokenPipeError:
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
