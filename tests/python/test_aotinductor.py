"""AOTInductor packages: run from Python, from a C++ program without Python, and, decomposed, without our library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpp_support import build, output_of, run_program
from graphs_support import expected, image_sizes, layers
from operators_support import needs_compiled

from torch_pnn import export

SOURCE = "cpp_aotinductor"
SIZES = ((2, 3, 16, 16), (3, 3, 11, 24), (1, 3, 32, 9))

pytestmark = [
    pytest.mark.slow,
    needs_compiled,
    pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Packages:
    """A model as AOTInductor packages, with what it computes.

    Attributes:
        model: in evaluation mode.
        operators: the package with our operators in it.
        stored: the package of the decomposed program with stored masks.
        data: file by package, for the C++ program.
    """

    def __init__(self, folder):
        torch.manual_seed(0)
        self.model = layers(norm=True).eval()
        inputs = [torch.randn(size) for size in SIZES]
        self.inputs = inputs
        program = torch.export.export(self.model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=image_sizes(8))
        self.operators = self._compiled(program, folder / "operators.pt2")
        self.stored = self._compiled(export.decompose(program, max_size=(32, 24)), folder / "stored.pt2")
        data = {f"input.{n}": x for n, x in enumerate(inputs)}
        data |= {f"expected.{n}": self.model(x).detach() for n, x in enumerate(inputs)}
        self.data = {self.operators: folder / "exact.pt", self.stored: folder / "near.pt"}
        for path, tolerance in zip(self.data.values(), (0.0, 2e-5)):
            torch.save(data | {"tolerance": torch.tensor(tolerance, dtype=torch.float64)}, path)

    def _compiled(self, program, path):
        # The wrapper's optimisation takes a minute and the tests none of it.
        quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
        return torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=quick)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return Packages(tmp_path_factory.mktemp("aotinductor"))


def test_a_package_runs_from_python_at_every_size(packages):
    for path, exact in ((packages.operators, True), (packages.stored, False)):
        run = torch._inductor.aoti_load_package(path)
        for x in packages.inputs:
            right, _ = expected(packages.model, x)
            torch.testing.assert_close(run(x).double(), right, atol=2e-5, rtol=2e-5)
            if exact:
                assert torch.equal(run(x), packages.model(x))
    assert torch._inductor.aoti_load_package(packages.operators)(torch.zeros(1, 3, 50, 60)).shape == (1, 4, 25, 30)


def test_a_package_runs_in_a_program_without_python(packages, tmp_path):
    program = build(SOURCE, tmp_path) / "program"
    for path, data in packages.data.items():
        said = output_of(program, path, data)
        assert said.count("ok    an image of") == len(SIZES) and "WRONG" not in said, said
        assert "ok    no Python is loaded" in said
    (tmp_path / "none.pt2").write_bytes(b"no package")
    done = run_program(program, tmp_path / "none.pt2", packages.data[packages.stored])
    assert done.returncode == 3 and done.stderr


def run_without_the_library(path, height=16, width=16, **more):
    code = f"""
import sys, torch
x = torch.zeros(2, 3, {height}, {width})
print("size", list(torch._inductor.aoti_load_package({str(path)!r})(x).shape))
assert not any(name.startswith("torch_pnn") for name in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(path).parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_decomposed_package_needs_no_library(packages):
    done = run_without_the_library(packages.stored)
    assert done.returncode == 0 and "size [2, 4, 8, 8]" in done.stdout, done.stderr[-3000:]


def test_a_larger_image_than_a_decomposed_package_holds_masks_for_is_refused(packages):
    # Inductor's own check throws within a parallel region, which ends the process; the one of the inputs raises.
    done = run_without_the_library(packages.stored, 50, 60)
    assert done.returncode != 0 and "size" not in done.stdout, done.stderr[-3000:]  # its words, where threads let it
    for height, width, sentence in ((50, 16, "2, expected to be <= 32"), (16, 60, "3, expected to be <= 24")):
        done = run_without_the_library(packages.stored, height, width, AOTI_RUNTIME_CHECK_INPUTS="1")
        assert done.returncode == 1 and f"dim value is too large at {sentence}" in done.stderr, done.stderr[-3000:]


def test_a_package_without_the_library_says_what_it_needs(packages):
    done = run_without_the_library(packages.operators)
    assert done.returncode != 0 and "torch_pnn::perturb" in done.stderr, done.stderr[-3000:]
