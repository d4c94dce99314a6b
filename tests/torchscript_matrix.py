"""Scripted and traced models written by each PyTorch, loaded, run and trained in each other: the table of a page.

    python tests/torchscript_matrix.py PYTHON [PYTHON ...]                      prints the table
    python tests/torchscript_matrix.py --page docs/torchscript.md PYTHON ...    writes it into the page, too

Each PYTHON is an interpreter that has a PyTorch (2.11 or newer). The operators are built once, against the first, and
the derivatives once for each, into build/torchscript-matrix: the set of files that a wheel for all of them would carry.
`--libraries DIR` takes them from a folder instead.

Every PyTorch writes five models (MODELS), scripted and traced, with an input, the output in evaluation, and in training
the gradients of the input and of every parameter; every PyTorch loads all of these files and compares.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- torchscript_matrix.py: begin -->", "<!-- torchscript_matrix.py: end -->"
OURS = ("plain", "norm", "masks", "pooled")  # nothing but our operators and what PyTorch computes exactly
MODELS = (*OURS, "network")
WAYS = ("scripted", "traced")


# ---- in each PyTorch ----


def make_model(name: str) -> Any:
    """One of MODELS, the same in every PyTorch: its weights are drawn from our own generator."""
    import torch
    from torch import nn

    import torch_pnn

    if name == "plain":
        model: nn.Module = torch_pnn.PerturbConv2d(3, 6, 3, padding=1, masks=2, noise="waves", seed=1)
    elif name == "norm":
        model = torch_pnn.PerturbConv2d(4, 6, 3, 2, 1, groups=2, norm=True, downsample="subsample", seed=2)
        model = nn.Sequential(torch_pnn.PerturbConv2d(3, 4, 1, activation="gelu", noise="normal", seed=3), model)
    elif name == "masks":
        model = torch_pnn.PerturbConv2d(3, 6, 3, padding=1, mask_size=(9, 8), train_masks=True, seed=4)
    elif name == "pooled":
        model = torch_pnn.PerturbConv2d(3, 6, 3, 2, padding=2, padding_mode="reflect", shared_masks=True, seed=5)
    else:
        model = torch_pnn.models.noise_resnet18(width=4, preset="juefeix2018", seed=6)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() == 4:
                rows, columns = parameter.shape[0], parameter[0].numel()
                values = torch_pnn.reference.perturbation_mask(number, 1, 1, rows, columns)
                parameter.copy_(values.reshape(parameter.shape) * columns**-0.5)
    return model


def run_model(model: Any, x: Any) -> dict[str, Any]:
    """The output in evaluation, and in training the gradients of the input and of every parameter."""
    import torch

    with torch.no_grad():
        result = {"output": model.eval()(x).clone()}
    input = x.clone().requires_grad_()
    y = model.train()(input)
    result["trained output"] = y.detach().clone()
    weights = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).remainder(7) - 3
    (y * weights).sum().backward()
    result["gradient of input"] = input.grad
    for name, parameter in model.named_parameters():
        result[f"gradient of {name}"] = parameter.grad
        parameter.grad = None
    return result


def write(folder: Path) -> None:
    """Saves every model with what it computes here."""
    import copy

    import torch

    for name in MODELS:
        torch.manual_seed(0)
        model = make_model(name)
        x = torch.randn(2, 3, 9, 8)
        for way in WAYS:
            made = copy.deepcopy(model)
            # A trace is of training: what it computes in evaluation is not this model's.
            made = torch.jit.script(made) if way == "scripted" else torch.jit.trace(made.train(), x, check_trace=False)
            torch.jit.save(made, str(folder / f"{name}-{way}.pt"))
            # What is compared with is what a fresh copy from the file computes.
            values = run_model(torch.jit.load(str(folder / f"{name}-{way}.pt")), x)
            torch.save({"input": x, "values": values}, folder / f"{name}-{way}-data.pt")


def compare(folder: Path) -> str:
    """Loads the models in `folder` and says how their results differ from those written beside them."""
    import torch

    import torch_pnn  # noqa: F401  (registers the operators that the files call)

    worst, same = 0.0, True
    for name in MODELS:
        for way in WAYS:
            data = torch.load(folder / f"{name}-{way}-data.pt", weights_only=True)
            found = run_model(torch.jit.load(str(folder / f"{name}-{way}.pt")), data["input"])
            # The largest entry of all sets the scale: a bias before a normalisation has a gradient of rounding errors.
            scale = max(float(value.abs().max()) for value in data["values"].values())
            for what, expected in data["values"].items():
                value = found[what]
                if value is None:
                    return f"{name}, {way}: no {what}"
                if torch.equal(value, expected):
                    continue
                same = same and name not in OURS
                worst = max(worst, float((value - expected).abs().max()) / scale)
    if worst > 1e-4:
        return f"differs by {worst:.1e}"
    return "same bits" if same else f"within {worst:.0e}"


def eager() -> str:
    """Forward and backward of every model in this PyTorch, against plain PyTorch in float64."""
    from unittest import mock

    import torch

    from torch_pnn import functional, reference

    names = ("perturb_conv2d", "perturb_norm_conv2d", "perturbation_mask")
    for name in MODELS:
        torch.manual_seed(0)
        model = make_model(name).double()
        x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        found = run_model(model, x)
        model.load_state_dict(state)
        with mock.patch.multiple(functional, **{each: getattr(reference, each) for each in names}):
            expected = run_model(model, x)
        for what, value in expected.items():
            scale = max(float(value.abs().max()), 1.0)
            if float((found[what] - value).abs().max()) > 1e-8 * scale:
                return f"{name}: {what} differs"
    return "ok"


def about() -> dict[str, str]:
    """This PyTorch, and which of our libraries run in it."""
    import torch

    from torch_pnn import _library

    status = _library.status()
    return {"torch": torch.__version__, "ops": status.ops, "autograd": status.autograd, "isa": status.isa}


def child(role: str, folder: Path) -> None:
    """One step in a process of its own; prints its result as JSON on the last line."""
    import warnings

    warnings.simplefilter("ignore")
    if role == "about":
        print(json.dumps(about() | {"eager": eager()}))
    elif role == "write":
        write(folder)
        print(json.dumps("written"))
    else:
        print(json.dumps(compare(folder)))


# ---- the table ----


def call(python: str, libraries: Path, role: str, folder: Path) -> Any:
    """Runs a step with an interpreter; its error's last line where it fails."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "python"),
        "TORCH_PNN_LIBRARY_DIR": str(libraries),
        "TORCH_PNN_REQUIRE_OPS": "1",
    }
    command = [python, __file__, "--child", role, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no output"]
    if done.returncode != 0 and role in ("about", "write"):
        sys.exit(f"{python} {role}: " + "\n".join(lines[-20:]))
    return json.loads(lines[-1]) if done.returncode == 0 else f"fails: {lines[-1]}"


def build(pythons: Sequence[str], cmake: str) -> Path:
    """Builds the operators against the first PyTorch and the derivatives against each; returns the folder of all."""
    base = ROOT / "build" / "torchscript-matrix"
    libraries = base / "lib"
    libraries.mkdir(parents=True, exist_ok=True)
    for number, python in enumerate(pythons):
        tree = base / f"tree{number}"
        options = ["-DPNN_TORCH=ON", "-DPNN_SHARED=OFF", f"-DPython_EXECUTABLE={python}"]
        targets = ["torch_pnn_autograd"] + (["torch_pnn_ops"] if number == 0 else [])
        ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(cmake).parent), os.environ.get("PATH", "")]))
        make = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(tree), *make, *options], check=True)
        subprocess.run([cmake, "--build", str(tree), "--target", *targets], check=True)
        for file in (tree / "lib").glob("libtorch_pnn_*.so"):
            if number == 0 or "autograd" in file.name:
                shutil.copy2(file, libraries)
    return libraries


def table(pythons: Sequence[str], libraries: Path) -> str:
    """Runs everything; a row for each PyTorch that wrote, a column for each that loaded."""
    with tempfile.TemporaryDirectory() as temporary:
        facts = [call(python, libraries, "about", Path(temporary)) for python in pythons]
        folders = []
        for number, python in enumerate(pythons):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            call(python, libraries, "write", folder)
            folders.append(folder)
        names = [fact["torch"] for fact in facts]
        lines = [f"| written by \\ loaded by | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
        for name, folder in zip(names, folders):
            cells = [call(python, libraries, "compare", folder) for python in pythons]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("| **eager, against the reference** | " + " | ".join(fact["eager"] for fact in facts) + " |")
        lines.append("| derivatives | " + " | ".join(fact["autograd"] for fact in facts) + " |")
        return "\n".join(lines) + f"\n\n{datetime.date.today()}, on {facts[0]['isa']}.\n"


def main() -> int:
    """Prints the table; the exit status is 1 where a file did not load or a result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="an interpreter with a PyTorch")
    parser.add_argument("--page", type=Path, help="the page whose table is replaced")
    parser.add_argument("--libraries", type=Path, help="a folder with the operators and derivatives for all of them")
    parser.add_argument("--cmake", default=shutil.which("cmake") or "cmake", help="CMake 3.30 or newer")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.child:
        child(parsed.child[0], Path(parsed.child[1]))
        return 0
    if not parsed.pythons:
        parser.error("name at least one interpreter")
    libraries = parsed.libraries or build(parsed.pythons, parsed.cmake)
    text = table(parsed.pythons, libraries.absolute())
    print(text)
    if parsed.page:
        page = parsed.page.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        parsed.page.write_text(f"{before}{BEGIN}\n{text}{END}{rest.split(END)[1]}", encoding="utf-8")
    return 1 if "fails" in text or "differs" in text or ": no " in text else 0


if __name__ == "__main__":
    sys.exit(main())
