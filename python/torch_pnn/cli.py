"""The command line: ``torch-pnn ablate | report | studies | info``, also ``python -m torch_pnn``.

Exit status: 0 done; 1 it could not be done (the reason is one line on standard error); 2 the command itself, or the
study's file, is wrong; 130 interrupted by Ctrl-C. Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import io
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ablation.data import Dataset
    from .ablation.records import Run, Store
    from .ablation.study import Study

EPILOG = """\
examples:
  torch-pnn ablate --out results              compare CNN, LBCNN, PNN and PNN's control on handwritten digits
  torch-pnn ablate --out look --quick         the same in under a minute; too few seeds for a verdict
  torch-pnn ablate mine.yaml --dry-run        what a study of your own would do and how long it would take
  torch-pnn studies show digits > mine.yaml   a study to begin with
  torch-pnn report results                    make the report again from the raw rows
  torch-pnn info                              versions, and what computes here
"""

ABLATE_EPILOG = """\
examples:
  torch-pnn ablate --out results                                 the study digits: about three minutes on two cores
  torch-pnn ablate mnist --data ~/data --dry-run                 what it would do, how long, and what it can resolve
  torch-pnn ablate mnist --data ~/data --out mnist --jobs 4
  torch-pnn ablate mine.yaml --out mine --set schedule.epochs=3 --set data.shifts=1,2 --set arms.pnn.level=0.5
  torch-pnn ablate cifar10 --out shared --shard 2/8              the second of eight tasks of a job array
  torchrun --nproc-per-node 8 -m torch_pnn ablate imagenet-folder --out imagenet     each run on eight processes

STUDY is a ready-made study (torch-pnn studies lists them) or a .yaml file (docs/studies/README.md tells every key).
"""

STUDIES_EPILOG = """\
examples:
  torch-pnn studies                           the ready-made studies
  torch-pnn studies show mnist                the file of one, with what it asks, where it is from and how long it takes
  torch-pnn studies show mine.yaml --full     a study with everything that it takes over from others and from defaults
  torch-pnn studies arms                      the arms that a study can name
  torch-pnn studies keys                      every key of a study's file: what it takes, its default, its meaning
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


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no part such as 2/8: the second of eight")
    return int(match[1]), int(match[2])


class _Version(argparse.Action):
    """Asks for the version only when it is wanted: it needs PyTorch to be loaded."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from .ablation.environment import describe

        print(f"torch-pnn {describe()['torch_pnn']}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="torch-pnn",
        description="Perturbative neural networks: studies, reports, and what is installed.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    ablate = commands.add_parser(
        "ablate",
        help="train the arms of a study and write a report",
        description="Trains every arm of a study with every seed, then writes DIR/report.html (open it in a browser), "
        "DIR/results.jsonl\n(a row per arm and seed) and DIR/epochs.jsonl (a row per epoch). Interrupted, the same "
        "command goes on where it stopped.",
        epilog=ABLATE_EPILOG,
        formatter_class=raw,
    )
    ablate.add_argument(
        "study",
        nargs="?",
        metavar="STUDY",
        default="digits",
        help="a ready-made study or a .yaml file (default: digits)",
    )
    ablate.add_argument("--out", metavar="DIR", type=_folder, help="the folder for results; made where missing")
    ablate.add_argument(
        "--dry-run",
        action="store_true",
        help="show runs, costs, estimated time and what the seeds can resolve; train nothing, write nothing",
    )
    ablate.add_argument(
        "--quick", action="store_true", help="fewer seeds, epochs and images: a look, too little for a verdict"
    )
    ablate.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="change a key of the study, such as schedule.epochs=3; as often as wanted",
    )
    ablate.add_argument("--seeds", metavar="N", type=_positive, help="run seeds 0 to N-1 in place of the study's")
    ablate.add_argument("--epochs", metavar="N", type=_positive, help="train for N epochs in place of the study's")
    ablate.add_argument("--arms", metavar="A,B,...", help="run only these arms; the compared pair must be among them")
    ablate.add_argument("--data", metavar="DIR", help="where the images lie: a folder or an archive")
    ablate.add_argument(
        "--jobs",
        metavar="N",
        type=_positive,
        help=f"runs side by side (default: one a core, {MOST_JOBS} at most, one on a graphics card); the results don't "
        "depend on it",
    )
    ablate.add_argument(
        "--shard", metavar="I/N", type=_shard, help="do the I-th of N parts of the runs; all may share one --out"
    )
    ablate.add_argument(
        "--logger",
        metavar="NAME",
        action="append",
        default=[],
        dest="loggers",
        help="tell tensorboard, wandb or module:Class of each epoch; as often as wanted",
    )

    report = commands.add_parser(
        "report",
        help="make the report again from the raw rows",
        description="Prints the table and writes DIR/report.html from the rows in DIR; trains nothing. With several "
        "folders, compares their studies.",
    )
    report.add_argument(
        "directories", metavar="DIR", type=_folder, nargs="+", help="a folder that torch-pnn ablate wrote"
    )

    studies = commands.add_parser(
        "studies",
        help="list the ready-made studies, or show one",
        description="Lists the ready-made studies, shows the file of one, or tells every key of such a file.",
        epilog=STUDIES_EPILOG,
        formatter_class=raw,
    )
    about = studies.add_subparsers(dest="about", metavar="what")
    show = about.add_parser("show", help="print a study's file", description="Prints a study's file.")
    show.add_argument("name", metavar="STUDY", help="a ready-made study or a .yaml file")
    show.add_argument("--full", action="store_true", help="with every key, and what it takes over from other studies")
    about.add_parser("arms", help="list the arms of the catalogue", description="The arms that a study can name.")
    about.add_parser("keys", help="tell every key", description="Every key that a study's file may have.")

    commands.add_parser(
        "info",
        help="show versions, libraries and what computes here",
        description="Shows versions, the compiled libraries found, the instruction set in use, the CUDA half and "
        "the number of threads.",
    )
    return parser


def _require_yaml() -> None:
    from .ablation.errors import require

    require("yaml", "pyyaml", "studies, which are YAML files")


def _study(arguments: argparse.Namespace) -> Study:
    """The study that the arguments ask for."""
    from .ablation.errors import UsageError

    _require_yaml()
    from .ablation import files

    settings = list(arguments.settings)
    if arguments.seeds is not None:
        settings.append(f"seeds={arguments.seeds}")
    if arguments.epochs is not None:
        settings.append(f"schedule.epochs={arguments.epochs}")
    study = files.load(arguments.study, quick=arguments.quick, settings=settings)
    if arguments.data is not None:
        if not arguments.data:
            raise UsageError("--data needs a folder's or an archive's name, not nothing")
        study = dataclasses.replace(study, data=dataclasses.replace(study.data, root=arguments.data))
    return study if arguments.arms is None else _chosen(study, arguments.arms)


def _chosen(study: Study, names: str) -> Study:
    """The study with some of its arms, or others of the catalogue."""
    from .ablation.arms import CATALOGUE, find_arm
    from .ablation.errors import UsageError

    wanted = [name.strip() for name in names.split(",")]
    known = list(dict.fromkeys([*study.arm_names, *CATALOGUE]))
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UsageError(f"unknown arm {unknown[0]!r}; there is: {', '.join(known)}")
    if len(set(wanted)) != len(wanted):
        raise UsageError(f"--arms {names} names an arm twice")
    question = study.question
    lacking = [name for name in (question.candidate, question.control) if name not in wanted]
    if lacking:
        raise UsageError(
            f"--arms {names} lacks {' and '.join(lacking)}: the study compares {question.candidate} with "
            f"{question.control}"
        )
    arms = tuple(study.arm(name) if name in study.arm_names else find_arm(name) for name in wanted)
    return dataclasses.replace(study, arms=arms)


def _check_arms(study: Study, data: Dataset) -> None:
    """Builds each arm once: what is wrong with one should be said before the others have trained for hours."""
    import torch

    from .ablation.arms import build
    from .ablation.errors import UsageError

    for name in study.arm_names:
        try:
            with torch.random.fork_rng(devices=[]):
                build(study, name, study.streams(study.seeds[0]), data)
        except (ValueError, TypeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"the arm {name} can't be built: {reason}") from error


def _runs(study: Study, shard: tuple[int, int] | None) -> list[Run]:
    from .ablation.runner import shard as part

    return study.runs if shard is None else part(study.runs, *shard)


def _jobs(arguments: argparse.Namespace, study: Study, runs: int) -> int:
    from .ablation import distributed, environment

    if distributed.is_active():
        return 1
    usual = 1 if study.device.startswith("cuda") else min(max(1, environment.cores() // study.threads), MOST_JOBS)
    return max(1, min(arguments.jobs or usual, runs))


def _check_device(study: Study) -> None:
    import torch

    from .ablation.errors import AblationError

    if study.device.startswith("cuda") and not torch.cuda.is_available():
        raise AblationError(
            f"the study computes on {study.device}, and PyTorch finds no such device here; --set device=cpu takes the "
            f"processor"
        )


def _plan(arguments: argparse.Namespace) -> int:
    """The dry run."""
    from .ablation import data as datasets
    from .ablation import plan, records
    from .ablation.errors import UsageError, require

    study = _study(arguments)
    _check_device(study)
    require("scipy", "scipy", "what the seeds can resolve")
    data = datasets.load(study.data)
    found = None
    if arguments.out is not None and (arguments.out / "study.json").exists():
        found = records.read(arguments.out)
        if found.study.fingerprint() != study.fingerprint() or found.data_sha256 != data.sha256:
            differences = "; ".join(found.study.differences(study)) or "other data"
            raise UsageError(
                f"{arguments.out} holds the results of another study ({differences}); choose another --out"
            )
    runs = _runs(study, arguments.shard)
    shard = "part {} of {}".format(*arguments.shard) if arguments.shard else ""
    print(
        plan.text(
            plan.make(study, data, jobs=_jobs(arguments, study, len(runs)), runs=runs, shard=shard, records=found)
        )
    )
    return 0


@contextlib.contextmanager
def _store(
    arguments: argparse.Namespace, study: Study, data: Dataset, command: str, jobs: int
) -> Iterator[Store | None]:
    """The folder, open for this command; None in the processes of torchrun beside the first, which alone writes."""
    from .ablation import distributed
    from .ablation import environment as environments
    from .ablation.records import Store, describe_data
    from .ablation.tasks import find_task

    distributed.start(study.device)
    try:
        if distributed.rank() != 0:
            yield None
            return
        invocation = {
            "command": command,
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "jobs": jobs,
            "environment": environments.describe(),
        }
        metric = find_task(data).metric
        with Store(arguments.out, study, data.sha256, invocation, describe_data(data), metric) as store:
            yield store
    finally:
        distributed.stop()


def _ablate(arguments: argparse.Namespace, command: str) -> int:
    from .ablation import data as datasets
    from .ablation import environment as environments
    from .ablation import report, runner, tables
    from .ablation.errors import AblationError, require
    from .ablation.loggers import Loggers, find_logger
    from .ablation.progress import duration, make_progress

    study = _study(arguments)
    _check_device(study)
    # Before minutes of training, not after: what loggers and the report will need.
    for name in arguments.loggers:
        find_logger(name)
    require("scipy", "scipy", "the intervals and tests of the report")
    require("matplotlib", "matplotlib", "the report's plots")
    data = datasets.load(study.data)
    _check_arms(study, data)
    runs = _runs(study, arguments.shard)
    jobs = _jobs(arguments, study, len(runs))
    with _store(arguments, study, data, command, jobs) as store:
        missing = store.records.missing if store is not None else []
        pending = [run for run in missing if run in set(runs)]
        done = len(runs) - len(pending)
        progress = make_progress(pending, len(runs), study.schedule.epochs)
        loggers = None
        started = time.monotonic()
        try:
            if store is None:
                runner.execute(study, data, None, progress, jobs, runs=runs)
                return 0
            store.on_trouble = progress.say
            loggers = Loggers(arguments.loggers, arguments.out, study, progress.say)
            environment = environments.describe()
            if environment["operators"] != "compiled":
                progress.say(f"torch-pnn: {environments.operators_sentence(environment)}")
            if done or store.dropped or store.continued:
                again = f"; {store.dropped} interrupted runs are done again" if store.dropped else ""
                on = f"; {store.continued} interrupted runs go on from their last epoch" if store.continued else ""
                progress.say(f"torch-pnn: {done} of {len(runs)} runs were finished before and are kept{on}{again}")
            runner.execute(study, data, store, progress, jobs, runs=runs, loggers=loggers)
        except KeyboardInterrupt:
            progress.close()
            if store is None:
                raise
            kept = len(study.runs) - len(store.records.missing)
            raise AblationError(
                f"interrupted; {kept} of {len(study.runs)} runs are kept in {arguments.out}, and the same "
                f"command goes on from there"
            ) from KeyboardInterrupt()
        finally:
            progress.close()
            if loggers is not None:
                loggers.close()
        store.refresh()
        path = report.write(store.records, data)
        result = tables.evaluate(store.records)
        print(tables.text_report(store.records, result))
        print()
        trained = len(runs) - done
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
    from .ablation import compare, report

    folders = arguments.directories
    path, text = report.rebuild(folders[0]) if len(folders) == 1 else compare.rebuild(folders)
    print(text)
    print()
    print(f"report: {path}")
    return 0


def _studies(arguments: argparse.Namespace) -> int:
    _require_yaml()
    from .ablation import files, keys
    from .ablation.arms import CATALOGUE

    if arguments.about == "keys":
        print(keys.reference(), end="")
    elif arguments.about == "arms":
        width = max(map(len, CATALOGUE))
        for name, arm in CATALOGUE.items():
            print(f"{name:{width}}  {arm.summary}")
    elif arguments.about == "show" and arguments.full:
        print(files.dump(files.load(arguments.name)), end="")
    elif arguments.about == "show":
        print(files.text_of(arguments.name), end="")
    else:
        names = files.ready_names()
        width = max(map(len, names))
        for name in names:
            print(f"{name:{width}}  {files.load(name).title}")
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
            for name in ("scikit-learn", "scipy", "matplotlib", "tqdm", "numpy", "pyyaml")
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
    parser = _parser()
    parsed = parser.parse_args(given)
    if parsed.command == "ablate" and parsed.out is None and not parsed.dry_run:
        parser.error("ablate: the following arguments are required: --out (or --dry-run)")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without ± shows a question mark
    from .ablation.errors import AblationError

    try:
        if parsed.command == "ablate":
            status = _plan(parsed) if parsed.dry_run else _ablate(parsed, shlex.join(["torch-pnn", *given]))
        elif parsed.command == "report":
            status = _report(parsed)
        elif parsed.command == "studies":
            status = _studies(parsed)
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
