"""The command line: ``torch-pnn ablate | report | info``, also ``python -m torch_pnn``.

Exit status: 0 done; 1 it could not be done (the reason is one line on standard error); 2 the command itself is wrong;
130 interrupted by Ctrl-C. Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import io
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ablation.study import Study

EPILOG = """\
examples:
  torch-pnn ablate --out results              compare CNN, LBCNN, PNN and PNN's control on handwritten digits
  torch-pnn ablate --out look --quick         the same in under a minute; too few seeds for a verdict
  torch-pnn report results                    make the report again from the raw rows
  torch-pnn info                              versions, and what computes here
"""

#: More processes than this would mostly wait for memory; --jobs overrides it.
MOST_JOBS = 8


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    if value > 100_000:
        raise argparse.ArgumentTypeError(f"{text} is above 100000")
    return value


def _folder(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("a folder's name is needed, not nothing")
    return Path(text)


class _Version(argparse.Action):
    """Asks for the version only when it is wanted: it needs PyTorch to be loaded."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from .ablation.environment import describe

        print(f"torch-pnn {describe()['torch_pnn']}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torch-pnn",
        description="Perturbative neural networks: studies, reports, and what is installed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    ablate = commands.add_parser(
        "ablate",
        help="train the arms of a study and write a report",
        description="Trains every arm of a study with every seed, then writes DIR/report.html (open it in a browser), "
        "DIR/results.jsonl (a row per arm and seed) and DIR/epochs.jsonl (a row per epoch). Interrupted, the same "
        "command goes on where it stopped.",
    )
    ablate.add_argument("study", nargs="?", default="digits", help="the study (default: digits, the only one so far)")
    ablate.add_argument(
        "--out", metavar="DIR", required=True, type=_folder, help="the folder for results; made where missing"
    )
    ablate.add_argument(
        "--quick", action="store_true", help="fewer seeds and epochs: under a minute, too few for a verdict"
    )
    ablate.add_argument("--seeds", metavar="N", type=_positive, help="run seeds 0 to N-1 in place of the study's")
    ablate.add_argument("--epochs", metavar="N", type=_positive, help="train for N epochs in place of the study's")
    ablate.add_argument("--arms", metavar="A,B,...", help="run only these arms; the compared pair must be among them")
    ablate.add_argument(
        "--jobs",
        metavar="N",
        type=_positive,
        help=f"runs side by side (default: one a core, {MOST_JOBS} at most); the results don't depend on it",
    )

    report = commands.add_parser(
        "report",
        help="make the report again from the raw rows",
        description="Prints the table and writes DIR/report.html from the rows in DIR; trains nothing.",
    )
    report.add_argument("directory", metavar="DIR", type=_folder, help="a folder that torch-pnn ablate wrote")

    commands.add_parser(
        "info",
        help="show versions, libraries and what computes here",
        description="Shows versions, the compiled libraries found, the instruction set in use, the CUDA half and "
        "the number of threads.",
    )
    return parser


def _study(arguments: argparse.Namespace) -> Study:
    """The study that the arguments ask for."""
    from .ablation.arms import CATALOGUE, find_arm
    from .ablation.errors import UsageError
    from .ablation.ready import find_study

    study = find_study(arguments.study, quick=arguments.quick)
    changes: dict[str, Any] = {}
    if arguments.seeds is not None:
        changes["seeds"] = tuple(range(arguments.seeds))
    if arguments.epochs is not None:
        changes["schedule"] = dataclasses.replace(study.schedule, epochs=arguments.epochs)
    if arguments.arms is not None:
        wanted = [name.strip() for name in arguments.arms.split(",")]
        unknown = [name for name in wanted if name not in CATALOGUE]
        if unknown:
            raise UsageError(f"unknown arm {unknown[0]!r}; there is: {', '.join(CATALOGUE)}")
        if len(set(wanted)) != len(wanted):
            raise UsageError(f"--arms {arguments.arms} names an arm twice")
        lacking = [name for name in (study.question.candidate, study.question.control) if name not in wanted]
        if lacking:
            raise UsageError(
                f"--arms {arguments.arms} lacks {' and '.join(lacking)}: the study compares {study.question.candidate} "
                f"with {study.question.control}"
            )
        changes["arms"] = tuple(map(find_arm, wanted))
    return dataclasses.replace(study, **changes)


def _ablate(arguments: argparse.Namespace, command: str) -> int:
    from .ablation import data as datasets
    from .ablation import environment as environments
    from .ablation import report, runner, tables
    from .ablation.errors import AblationError, require
    from .ablation.progress import duration, make_progress
    from .ablation.records import Store, describe_data
    from .ablation.tasks import find_task

    study = _study(arguments)
    # Before minutes of training, not after: what the report will need.
    require("scipy", "scipy", "the intervals and tests of the report")
    require("matplotlib", "matplotlib", "the report's plots")
    data = datasets.load(study.data)
    environment = environments.describe()
    jobs = arguments.jobs or min(environment["cores"], MOST_JOBS)
    invocation = {
        "command": command,
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "jobs": min(jobs, len(study.runs)),
        "environment": environment,
    }
    noted = describe_data(data)
    with Store(arguments.out, study, data.sha256, invocation, noted, find_task(data).metric) as store:
        done = len(study.runs) - len(store.records.missing)
        progress = make_progress(store.records.missing, len(study.runs), study.schedule.epochs)
        store.on_trouble = progress.say
        started = time.monotonic()
        try:
            if environment["operators"] != "compiled":
                progress.say(f"torch-pnn: {environments.operators_sentence(environment)}")
            if done or store.dropped or store.continued:
                again = f"; {store.dropped} interrupted runs are done again" if store.dropped else ""
                on = f"; {store.continued} interrupted runs go on from their last epoch" if store.continued else ""
                progress.say(
                    f"torch-pnn: {done} of {len(study.runs)} runs were finished before and are kept{on}{again}"
                )
            runner.execute(study, data, store, progress, jobs)
        except KeyboardInterrupt:
            progress.close()
            kept = len(study.runs) - len(store.records.missing)
            raise AblationError(
                f"interrupted; {kept} of {len(study.runs)} runs are kept in {arguments.out}, and the same "
                f"command goes on from there"
            ) from KeyboardInterrupt()
        finally:
            progress.close()
        path = report.write(store.records, data)
        result = tables.evaluate(store.records)
        print(tables.text_report(store.records, result))
        print()
        trained = len(study.runs) - done
        taken = f"{trained} runs in {duration(time.monotonic() - started)}; " if trained else ""
        print(f"{taken}report: {path}")
        broken = [row for row in store.records.results if row["status"] == "broken"]
    if broken:
        raise AblationError(
            f"{len(broken)} of {len(study.runs)} runs broke ({broken[0]['arm']}, seed {broken[0]['seed']}: "
            f"{broken[0]['problem']}); the same command tries them again"
        )
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from .ablation import data as datasets
    from .ablation import records, report, tables
    from .ablation.errors import AblationError

    found = records.read(arguments.directory)
    data = datasets.load(found.study.data)
    if data.sha256 != found.data_sha256:
        raise AblationError(
            f"{arguments.directory} holds results on other data than is installed here (scikit-learn's version?)"
        )
    path = report.write(found, data)
    print(tables.text_report(found, tables.evaluate(found)))
    print()
    print(f"report: {path}")
    return 0


def _info() -> int:
    import torch

    from . import _library
    from .ablation import environment as environments

    status = _library.status()
    environment = environments.describe()
    compiled = status.ops == "loaded"
    lines = {
        "torch-pnn": environment["torch_pnn"],
        "PyTorch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}",
        "Python": f"{environment['python']} on {environment['system']} {environment['machine']}",
        "operators": f"compiled (libpnn {status.library_version})"
        if compiled
        else f"plain-PyTorch reference: right, but slow and large ({status.ops_error})",
        "operator library": status.ops_path if compiled else f"looked for {status.ops_path}",
        "derivatives": "compiled"
        if status.autograd == "loaded"
        else f"registered from Python ({status.autograd_error})",
        "instruction set": status.isa if compiled else "whatever PyTorch uses",
        "CUDA half": status.cuda,
        "threads": f"{torch.get_num_threads()} in an operator, {environment['cores']} cores",
        "for ablate": ", ".join(
            f"{name} {environments.version(name) or 'missing'}"
            for name in ("scikit-learn", "scipy", "matplotlib", "tqdm", "numpy")
        ),
    }
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:{width}}  {text}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: as on the command line, without the program's name; None takes them from there.

    Returns:
        The exit status.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _parser().parse_args(given)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without ± shows a question mark
    from .ablation.errors import AblationError

    try:
        if parsed.command == "ablate":
            status = _ablate(parsed, shlex.join(["torch-pnn", *given]))
        elif parsed.command == "report":
            status = _report(parsed)
        else:
            status = _info()
        sys.stdout.flush()
        return status
    except AblationError as error:
        print(f"torch-pnn: {error}", file=sys.stderr)
        return 130 if isinstance(error.__cause__, KeyboardInterrupt) else error.exit_status
    except KeyboardInterrupt:
        print("torch-pnn: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _give_up_output()  # the reader went away (a pager, head)
        return 1
    except OSError as error:
        from .ablation.errors import describe_os_error

        _give_up_output()
        where = f"{error.filename}: " if error.filename else ""
        print(f"torch-pnn: {where}{describe_os_error(error)}", file=sys.stderr)
        return 1


def _give_up_output() -> None:
    """Sends what is left to print nowhere, so that it does not fail once more when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
