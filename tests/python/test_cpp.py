"""The operators in C++ programs by their header (tests/cpp_eager), and what finding and missing them says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from cpp_support import TESTS, build, output_of, package, tool
from operators_support import needs_derivatives

from torch_pnn import PerturbConv2d, _library, functional

pytestmark = [pytest.mark.slow, needs_derivatives]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `program` and `without`."""
    return build("cpp_eager", tmp_path_factory.mktemp("cpp_eager"))


def data_of_functions() -> dict[str, torch.Tensor]:
    input, weight, bias = torch.randn(2, 3, 5, 4), torch.randn(4, 6, 1, 1), torch.randn(4)
    mask = torch.randn(3, 2, 5, 4)
    data = {"input": input.clone(), "weight": weight.clone(), "bias": bias, "mask": mask}
    by_seed = {"seed": 2**64 - 3, "masks": 2, "noise": "waves", "level": 0.5, "activation": "silu", "stride": (1, 2)}
    y = functional.perturb_conv2d(input.requires_grad_(), weight.requires_grad_(), bias, **by_seed)
    y.square().sum().backward()
    data |= {"by_seed": y.detach(), "by_seed.input": input.grad, "by_seed.weight": weight.grad}
    with torch.no_grad():
        data["by_mask"] = functional.perturb_conv2d(input, weight, bias, mask=mask)
        data["plain"] = functional.perturb_conv2d(input, weight, noise=None, masks=2)
        data["image"] = functional.perturb_conv2d(input[0], weight, bias, **by_seed)
        data["written"] = functional.perturbation_mask(
            2**64 - 3, 3, 2, 5, 4, shared_masks=True, noise="normal", dtype=torch.float64
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            data["autocast"] = functional.perturb_conv2d(input, weight, bias, seed=5, masks=2)
    return data


def data_of_training() -> dict[str, torch.Tensor]:
    layer = PerturbConv2d(3, 4, 3, padding=1, masks=2, seed=7, norm=True)
    x, target = torch.randn(3, 3, 6, 5), torch.randn(3, 4, 6, 5)
    data = {"train.input": x, "train.target": target}
    data |= {"train.weight": layer.weight.detach().clone(), "train.bias": layer.bias.detach().clone()}
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(5):
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(layer(x), target).backward()
        optimiser.step()
    data |= {"after.weight": layer.weight.detach(), "after.bias": layer.bias.detach()}
    data |= {"after.norm_weight": layer.norm.weight.detach(), "after.norm_bias": layer.norm.bias.detach()}
    data |= {"after.running_mean": layer.norm.running_mean, "after.running_var": layer.norm.running_var}
    return data | {"after.output": layer.eval()(x).detach()}


REFUSALS = [
    "torch_pnn: 0 of mask and seed are given, it should be exactly one of them, or neither where noise is nullopt",
    "torch_pnn::perturb_conv2d: input has type int64, it should be float32, float64, bfloat16 or float16",
    "torch_pnn::perturb_conv2d: input is sparse or opaque, it should be dense (strided): call to_dense() on it",
    "torch_pnn::perturb_conv2d: weight has size [2, 2, 1, 1], it should be [2, 3, 1, 1]",
    "torch_pnn::perturb_norm_conv2d: running_mean is None, it should be given when training is False",
    "torch_pnn::perturb_conv2d: noise is 'pink', it should be one of uniform, normal, waves",
]


def test_the_functions_compute_what_python_does(programs: Path, tmp_path: Path) -> None:
    torch.save(data_of_functions() | data_of_training(), tmp_path / "data.pt")
    said = output_of(programs / "program", tmp_path / "data.pt")
    assert "WRONG" not in said and said.count("ok ") >= 18, said
    assert f"libpnn {_library.status().library_version} on {_library.status().isa}" in said
    refused = [line.removeprefix("refused: ") for line in said.splitlines() if line.startswith("refused: ")]
    assert len(refused) == len(REFUSALS)
    for sentence, expected in zip(refused, REFUSALS):
        assert sentence.startswith(expected), sentence


def test_without_the_libraries_the_header_says_what_to_link(programs: Path, tmp_path: Path) -> None:
    torch.jit.script(PerturbConv2d(3, 4, 3)).save(str(tmp_path / "model.pt"))
    said = output_of(programs / "without", tmp_path / "model.pt")
    assert "ok    no derivatives are loaded" in said
    assert "refused: torch_pnn::perturb_conv2d is not registered: link torch_pnn::torch_pnn (find_package" in said
    assert "Unknown builtin op: torch_pnn::perturb_conv2d." in said


def test_the_recipe_compiles(tmp_path: Path) -> None:
    """The blocks of docs/recipes/cpp.md, put together: what stands outside functions, and the rest inside one each."""
    page = (TESTS.parent / "docs/recipes/cpp.md").read_text(encoding="utf-8")
    includes, outside, inside = [], [], []
    for number, block in enumerate(re.findall(r"^```cpp\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)):
        includes += [line for line in block.splitlines() if line.startswith("#include")]
        rest = "\n".join(line for line in block.splitlines() if not line.startswith("#include"))
        declared, brace, statements = rest.partition("};\n") if "struct " in rest else ("", "", rest)
        outside.append(declared + brace)
        inside.append(f"void part{number}([[maybe_unused]] at::Tensor x, [[maybe_unused]] at::Tensor target) {{ {{\n")
        inside.append(statements + "\n} }\n")
    source = tmp_path / "recipe.cpp"
    source.write_text("\n".join([*includes, *outside, *inside]), encoding="utf-8")
    root = Path(torch.__file__).parent / "include"
    standard = "c++20" if torch.__version__ >= "2.14" else "c++17"
    folders = ["-isystem", root, "-isystem", root / "torch/csrc/api/include", "-I", TESTS.parent / "csrc/torch/include"]
    output_of(tool("c++"), "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-std={standard}", *folders, source)


def configured(tmp_path: Path, torch_root: Path) -> str:
    done = subprocess.run(
        [tool("cmake"), "-S", str(TESTS / "cpp_eager"), "-B", str(tmp_path / "build"), package(tmp_path),
         f"-DTORCH_PNN_TORCH_ROOT={torch_root}"],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    return " ".join(done.stderr.split())


def test_a_libtorch_that_is_too_old_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "libtorch"
    (root / "lib").mkdir(parents=True)
    (root / "include/torch/headeronly").mkdir(parents=True)
    (root / "lib/libtorch_cpu.so").touch()
    (root / "include/torch/headeronly/version.h").write_text(
        "#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 10\n#define TORCH_VERSION_PATCH 1\n",
        encoding="utf-8",
    )
    assert "LibTorch 2.10 is too old: it should be 2.11 or newer" in configured(tmp_path, root)


def test_a_folder_without_libtorch_is_named(tmp_path: Path) -> None:
    said = configured(tmp_path, tmp_path / "nothing")
    assert "no LibTorch 2.11 or newer: TORCH_PNN_TORCH_ROOT is" in said
    assert "it should name the folder that holds lib/libtorch_cpu.so" in said
