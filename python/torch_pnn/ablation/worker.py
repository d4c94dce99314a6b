"""A process that trains one run after another for the runner: ``python -m torch_pnn.ablation.worker``.

It reads JSON lines from standard input: first ``{"study": …, "data_sha256": …}``, then ``{"arm": …, "seed": …}`` for
each run. It writes JSON lines to what was its standard output: ``{"ready": true}``, ``{"epoch": row}``, ``{"result":
row}``, or ``{"refused": sentence}``. It ends when its input ends, or when nobody reads its output any more: a killed
runner leaves no workers behind.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, TextIO

from .data import load
from .errors import AblationError
from .study import Study


def attempt(study: Study, arm: str, seed: int, data: Any, on_epoch: Any) -> dict[str, Any]:
    """``training.train``, where a run that breaks becomes a row with its reason, so that the other runs go on."""
    from .training import train

    try:
        return train(study, arm, seed, data, on_epoch)
    except AblationError:
        raise
    except (RuntimeError, ValueError, TypeError, ArithmeticError, MemoryError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or "no reason given"
        return {
            "study": study.name,
            "arm": arm,
            "seed": seed,
            "status": "broken",
            "problem": f"{type(error).__name__}: {reason}",
            "accuracy": None,
            "correct": None,
            "total": data.test_count,
            "epochs": 0,
        }


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answers requests until there are none left."""

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message, allow_nan=False) + "\n")
        answers.flush()

    head = requests.readline()
    if not head:
        return
    settings = json.loads(head)
    try:
        study = Study.from_json(settings["study"])
        data = load(study.data)
        if data.sha256 != settings["data_sha256"]:
            raise AblationError("a worker process read other data than the command that started it")
        send({"ready": True})
        for line in requests:
            task = json.loads(line)
            row = attempt(study, task["arm"], task["seed"], data, lambda row: send({"epoch": row}))
            send({"result": row})
    except AblationError as error:
        send({"refused": str(error)})


def main() -> int:
    """Entry point. Standard output is kept for answers alone: whatever a library prints goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the runner, which ends its workers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        serve(sys.stdin, answers)
    except BrokenPipeError:
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
