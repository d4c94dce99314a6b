"""The checks of the GPU's machine code and of the kernels' coverage can fail: doctored input, planted bugs."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(f"pnn_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gates = load("tests/cuda/gates.py")
coverage = load("tests/cuda/coverage.py")
sys.path.insert(0, str(ROOT / "tests" / "cuda"))  # which steps.py imports from
steps = load("tests/cuda/steps.py")

FORWARD = (
    "_ZN8pnn_cuda43_GLOBAL__N__18e2d785_10_forward_cu_ba11fff314forward_kernelI"
    "NS_8bfloat16ENS_5LargeEEEvNS_5LayerElNS_7DividerES6_"
)
NAME, PLACE = "forward bfloat16 Large", "forward bfloat16 Large on sm_90"
SASS = f"""
Fatbin elf code:
================
arch = sm_90

        code for sm_90
        .target        sm_90

                Function : {FORWARD}
        .headerflags        @"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R3], [R4.64] ; /* 0x0000000403037fae */
        /*0020*/                   LDSM.16.M88.4 R4, [R8] ;            /* 0x000000000804783b */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R4, R8, RZ ; /* 0x000000080404723c */
        /*0040*/                   CALL.REL.NOINC 0x60 ;               /* 0x0000000000087944 */
        /*0050*/             @!UPT EXIT ;                              /* 0x000000000000794d */
        /*0060*/                   EXIT ;                              /* 0x000000000000794d */
"""
USAGE = f"""
arch = sm_90
Resource usage:
 Common:
  GLOBAL:0
 Function {FORWARD}:
  REG:185 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[2]:12 CONSTANT[0]:1200 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SHAPES = {NAME: (256, 86016)}
FITTING = {(NAME, 90): 1}


def failures(sass: str = SASS, usage: str = USAGE, fitting: int = 1) -> list[str]:
    return gates.check(gates.read_code(sass), gates.read_resources(usage), SHAPES, {(NAME, 90): fitting})


def test_sound_code_passes_and_is_counted() -> None:
    assert failures() == []
    counted = {"LDC": 1, "LDGSTS": 1, "LDSM": 1, "HMMA": 1, "CALL_NEXT": 1, "EXIT": 2}
    assert gates.read_code(SASS) == {(NAME, 90): Counter(counted)}
    assert gates.read_resources(USAGE) == {(NAME, 90): gates.Resources(185)}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("LDC R1, c[0x0][0x28]", "LDL R1, [R2]", "LDL, local memory"),
        ("LDC R1, c[0x0][0x28]", "STL.64 [R2], R4", "STL, local memory"),
        ("CALL.REL.NOINC 0x60", "CALL.REL.NOINC 0x50", "CALL, a function that was not inlined"),
        ("CALL.REL.NOINC 0x60", "CALL.ABS.NOINC R4", "CALL, a function that was not inlined"),
        ("LDC R1, c[0x0][0x28]", "@P3 DFMA R2, R4, R6, R8", "DFMA, double precision"),
        ("LDC R1, c[0x0][0x28]", "DSETP.GT.AND P0, PT, R2, RZ, PT", "DSETP, double precision"),
        ("LDGSTS.E.BYPASS", "LDG.E", "no LDGSTS"),
        ("LDSM.16", "LDS", "no LDSM"),
        ("HMMA.16816", "FFMA", "no HMMA"),
    ],
)
def test_each_forbidden_or_missing_instruction_is_seen(old: str, new: str, message: str) -> None:
    assert old in SASS
    assert failures(SASS.replace(old, new)) == [f"{PLACE}: {message}"]


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("7forward_kernelINS_4tf32ENS_5SmallELNS_3WayE0EEE", "forward tf32 Small"),
        ("7forward_kernelINS_4tf32ENS_5SmallELNS_3WayE1EEE", "forward tf32 Small pixels"),
        (
            "15weight_gradient_kernelIfNS_5LargeELNS_7FastestE1ELNS_3WayE2EEE",
            "weight_gradient float Large rows channels",
        ),
        (
            "14input_gradient_kernelIfNS_5SmallELNS_7FastestE0ELNS_3WayE2EEE",
            "input_gradient float Small depth channels",
        ),
        ("14input_gradient_kernelIfNS_5SmallELNS_7FastestE0ELNS_3WayE0EEE", "input_gradient float Small depth"),
        (
            "20forward_wgmma_kernelINS_8bfloat16ENS0_4WideELNS_7ReadingE2EEEvNS_5LayerElNS_7DividerES6_",
            "forward_wgmma bfloat16 Wide elements",
        ),
        ("19wgmma_weight_kernelINS_7float16ENS0_6NarrowEEEvNS_5LayerENS_6MatrixEPT_", "wgmma_weight float16 Narrow"),
        # Those of normalised layers.
        (
            "20forward_wgmma_kernelINS_8bfloat16ENS0_4WideELNS_7ReadingE0ELb1EEEvNS_5LayerE",
            "forward_wgmma bfloat16 Wide pixels centred",
        ),
        (
            "20forward_wgmma_kernelINS_8bfloat16ENS0_4WideELNS_7ReadingE0ELb0EEEvNS_5LayerE",
            "forward_wgmma bfloat16 Wide pixels",
        ),
        (
            "27input_gradient_wgmma_kernelINS_7float16ENS0_6NarrowELNS_7FastestE1ELNS_3WayE2ELb1EEEvNS_5LayerE",
            "input_gradient_wgmma float16 Narrow rows channels affine",
        ),
        ("20moments_plain_kernelIfLNS_7ReadingE1EEEvNS_5LayerE", "moments_plain float channels"),
        ("19wgmma_weight_kernelINS_7float16ELi64ELi64ELb1EEEvNS_11WeightOrderE", "wgmma_weight float16"),
    ],
)
def test_kernels_are_named_as_they_are_listed(mangled: str, name: str) -> None:
    assert gates.short_name(mangled) == name


def test_double_kernels_may_use_double_and_moments_and_copies_need_no_tile() -> None:
    double = SASS.replace("INS_8bfloat16ENS_5LargeEEE", "IdNS_5SmallEEE").replace("HMMA.16816", "DFMA")
    assert gates.check(
        gates.read_code(double), {("forward double Small", 90): gates.Resources(8)}, {"forward double Small": (1, 1)},
        {("forward double Small", 90): 1},
    ) == []  # fmt: skip
    moments = {("moments float", 90): Counter({"FFMA": 3})}
    resources, fitting = {("moments float", 90): gates.Resources(8)}, {("moments float", 90): 1}
    assert gates.check(moments, resources, {"moments float": (1, 1)}, fitting) == []
    copy = ("channels_last", 90)
    assert gates.check({copy: Counter({"LDG": 3})}, {copy: gates.Resources(8)}, {copy[0]: (1, 1)}, {copy: 1}) == []
    # What finishes each channel may call and use double, and still not spill.
    finish = {("norm", 90): Counter({"CALL": 1, "DFMA": 1})}
    assert gates.check(finish, {("norm", 90): gates.Resources(8)}, {}, {}) == []
    assert gates.check(finish, {("norm", 90): gates.Resources(8, 16)}, {}, {}) != []


WGMMA = "forward_wgmma bfloat16 Wide pixels"


def wgmma_failures(sass: str) -> list[str]:
    code = {(WGMMA, 90): gates.read_code(SASS.replace("        /*0030*/", sass + "        /*0030*/"))[NAME, 90]}
    for operation in ("HMMA", "LDSM"):
        del code[WGMMA, 90][operation]
    # Another kernel, so that there is code for another architecture, which has none of this one.
    code["norm", 80] = Counter({"FFMA": 1})
    resources = {(WGMMA, 90): gates.Resources(8), ("norm", 80): gates.Resources(8)}
    found: list[str] = gates.check(code, resources, {WGMMA: (256, 132096)}, {(WGMMA, 90): 1})
    return found


def test_asynchronous_products_must_be_there_and_overlap() -> None:
    product = "        /*0022*/  HGMMA.64x256x16.F32.BF16 R24, R152, gdesc[UR20], R24, gsb0 ;\n"
    one = "        /*0024*/  WARPGROUP.DEPBAR.LE gsb0, 0x3 ;\n"
    every = one.replace("0x3", "0x0")
    assert wgmma_failures((product + one) * 4 + every) == []
    where = f"{WGMMA} on sm_90"
    assert wgmma_failures((product + every) * 4) == [f"{where}: 4 waits for all products, which run one by one"]
    assert wgmma_failures("") == [f"{where}: no HGMMA"]


def test_an_operand_stays_until_a_wait() -> None:
    product = "HGMMA.64x64x16.F32.BF16 R24, R64, gdesc[UR20].tnspB, R24, gsb0"
    wait, load = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "@P0 LDG.E.128 R60, desc[UR16][R2.64]"
    near, over = "MOV R68, R2", "IMAD.WIDE.U32 R66, R2, R3, RZ"

    def count(*texts: str) -> int:
        return int(gates.overwritten([(16 * i, text) for i, text in enumerate(texts)]))

    assert count(product, near, load, wait, over) == 0
    assert count(product, near, over, wait) == 1
    assert count(over, product, wait) == 0
    assert count(over, product, "@P1 BRA 0x0", wait) == 1  # around the loop
    assert count(product, "@P1 BRA 0x30", wait, over, "EXIT") == 1  # past the wait
    assert count(product, "BRA 0x20", wait, over, "EXIT") == 0
    where = f"{WGMMA} on sm_90"
    lines = [product, over, wait, wait, "HGMMA.64x64x16.F32 R24, R4, gdesc[UR20], R24", wait]
    text = "".join(f"        /*{0x100 + 16 * i:04x}*/  {line} ;\n" for i, line in enumerate(lines))
    assert wgmma_failures(text) == [f"{where}: 1 products whose operand is overwritten meanwhile"]


def test_kernels_of_one_architecture_are_in_the_tables_alone() -> None:
    code = {(WGMMA, 90): Counter({"HGMMA": 4}), (NAME, 80): Counter({"HMMA": 1}), (NAME, 90): Counter({"HMMA": 2})}
    resources = {key: gates.Resources(100) for key in code}
    lines = gates.tables("13.0", code, resources, {NAME: (256, 1), WGMMA: (256, 2)}, dict.fromkeys(code, 1))
    assert [line.split() for line in lines if line.startswith(WGMMA)] == [
        [*WGMMA.split(), "256", "2", "-", "-", "100", "1"],
        [*WGMMA.split(), *"-----", "4", "4", "0", "0", "0"],
    ]


def test_spilled_registers_are_seen() -> None:
    assert failures(usage=USAGE.replace("STACK:0", "STACK:8")) == [f"{PLACE}: 8 bytes of stack, 0 of local memory"]
    assert failures(usage=USAGE.replace("LOCAL:0", "LOCAL:4")) == [f"{PLACE}: 0 bytes of stack, 4 of local memory"]
    assert failures(usage="") == [f"{PLACE}: no figures of its registers"]


def test_a_block_that_fits_nowhere_is_seen() -> None:
    assert failures(fitting=0) == [f"{PLACE}: a block needs more than a multiprocessor has"]


def test_kernels_missing_from_either_side_are_seen() -> None:
    assert failures("") == ["no machine code"]
    both = {(NAME, 90): Counter({"LDGSTS": 1, "LDSM": 1, "HMMA": 1})}
    resources = {(NAME, 90): gates.Resources(8)}
    listed = {**SHAPES, "forward float Small": (128, 53248)}
    assert gates.check(both, resources, listed, FITTING) == [
        "forward float Small on sm_90: listed, but not in the machine code"
    ]
    assert gates.check(both, resources, {}, {}) == [f"{PLACE}: in the machine code, but not listed (list_kernels.cc)"]


def test_a_changed_table_is_seen() -> None:
    code, resources = gates.read_code(SASS), gates.read_resources(USAGE)
    lines = gates.tables("13.0.88", code, resources, SHAPES, FITTING)
    assert gates.compare(lines, lines) == ([], "")
    for old, new in (("  185     1", "  184     1"), ("      7      1", "      8      1"), ("  86016", "  86018")):
        other = [line.replace(old, new) for line in lines]
        assert other != lines
        assert len(gates.compare(other, lines)[0]) == 1
    assert len(gates.compare(lines[:-1], lines)[0]) == 1  # a new kernel
    assert gates.compare([*lines, "forward old  1"], lines)[0] == ["gone: forward old  1"]
    assert "of another compiler" in gates.compare(["# nvcc 13.1.0", *lines[1:]], lines)[1]
    assert "of other architectures" in gates.compare([lines[0], "kernel", *lines[2:]], lines)[1]


def test_the_committed_table_holds_every_architecture() -> None:
    text = (ROOT / "tests/cuda/kernels.txt").read_text(encoding="utf-8")
    for architecture in (80, 86, 89, 90, 100, 120):
        assert f"sm_{architecture} " in text or f"sm_{architecture}\n" in text


# ---- planted bugs, compiled ----

PLANTED = r"""
// Kernels that break one gate each; named as the tiled ones are.
#include <cuda_runtime.h>
namespace pnn_cuda {
namespace {
__device__ __noinline__ float called(float x, int n) { for (int i = 0; i < n; i++) x = x * x + 1; return x; }
template <class T> __global__ void forward_kernel(float *y, int n) { y[0] = called(y[1], n); }
template <class T> __global__ void input_gradient_kernel(float *y, int n) {
  float local[64];
  for (int i = 0; i < 64; i++) local[i] = y[i];
  for (int i = 0; i < 64; i++) local[(i * n) & 63] += y[i];
  for (int i = 0; i < 64; i++) y[i] = local[(i * 7 + n) & 63];
}
template <class T> __global__ void moments_kernel(float *y, int) { y[0] = float(double(y[1]) * y[2] + y[3]); }
template __global__ void forward_kernel<float>(float *, int);
template __global__ void input_gradient_kernel<float>(float *, int);
template __global__ void moments_kernel<float>(float *, int);
}
}
"""


def nvcc() -> str | None:
    return shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")


@pytest.mark.slow
@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.skipif(gates.find_tool("cuobjdump") is None, reason="no cuobjdump (requirements/cuda.txt)")
@pytest.mark.parametrize("architecture", [80, 90])
def test_gates_see_what_is_planted_in_compiled_kernels(tmp_path: Path, architecture: int) -> None:
    source = tmp_path / "planted.cu"
    source.write_text(PLANTED, encoding="utf-8")
    compiler = nvcc()
    assert compiler is not None
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    subprocess.run([compiler, code, "-c", source, "-o", tmp_path / "planted.o"], check=True, capture_output=True)
    found, resources = gates.read_objects(tmp_path, 1)
    names = {name for name, _ in found}
    assert names == {"forward float", "input_gradient float", "moments float"}
    listed = dict.fromkeys(sorted(names), (128, 0))
    wrong = gates.check(found, resources, listed, dict.fromkeys(found, 1))
    place = f"on sm_{architecture}"
    assert f"forward float {place}: CALL, a function that was not inlined" in wrong
    assert f"forward float {place}: no LDGSTS" in wrong
    assert f"input_gradient float {place}: LDL, local memory" in wrong
    assert any(line.startswith(f"input_gradient float {place}: 256 bytes of stack") for line in wrong)
    assert [line for line in wrong if "moments" in line and "double precision" in line] != []


# ---- coverage ----


def report(counts: dict[int, int], file: str = "cuda/a.h") -> dict[str, object]:
    lines = [{"line_number": number, "count": count} for number, count in counts.items()]
    return {"current_working_directory": str(ROOT), "files": [{"file": file, "lines": lines}]}


def test_lines_that_no_test_runs_are_named() -> None:
    text = "int f() {\n  if (a) return 1;\n  return 0;\n  abort(); /* not covered: the check above refuses it */\n}\n"
    assert coverage.failures_of(text, {1: 1, 2: 5, 3: 1, 4: 0}) == []
    assert coverage.failures_of(text, {1: 1, 2: 5, 3: 0, 4: 0}) == [(3, "no test runs: return 0;")]
    ((number, what),) = coverage.failures_of(text, {4: 2})
    assert number == 4 and what.startswith("is run, so it should not be excluded")
    assert coverage.failures_of("g(); /* not covered: */", {1: 0}) != []  # without a reason


def test_instances_and_objects_are_added_up() -> None:
    twice = report({1: 0, 2: 3})
    twice["files"][0]["lines"] += [{"line_number": 1, "count": 4}]  # type: ignore[index]
    total = coverage.add_up([twice, report({2: 1, 5: 0}), report({9: 0}, "csrc/b.h")], ROOT / "cuda")
    assert total == {ROOT / "cuda/a.h": {1: 4, 2: 4, 5: 0}}


# A loop of one step: the barrier may be jumped over, and so may the operand (0x90), which is longer.
LOOP = """
                Function : _ZN8pnn_cuda1_14forward_kernelI
        /*0000*/                   MOV R1, R2 ;
        /*0010*/              @!P0 BRA 0x40 ;
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], [R4.64] ;
        /*0040*/              @!P1 BRA 0x90 ;
{operand}
        /*0090*/                   LDGDEPBAR ;
{product}
        /*0200*/               @P2 BRA 0x10 ;
        /*0210*/                   EXIT ;
"""
OPERAND = """
        /*0050*/                   PRMT R1, R2, 0x7634, R3 ;
        /*0060*/                   STS.128 [R3], R4 ;
        /*0070*/                   STS.128 [R3+0x10], R4 ;
        /*0080*/                   MOV R1, R2 ;
"""
LOADS = "\n".join(f"        /*{0x50 + i:04x}*/                   LDS.U16 R{i}, [R3] ;" for i in range(1, 17))
PRODUCT = "\n".join(
    f"        /*{0x100 + 16 * i:04x}*/                   HMMA.16816.F32.BF16 R4, R4 ;" for i in range(8)
)


def step(operand: str = LOADS + OPERAND, product: str = PRODUCT, kernel: str = "forward") -> float | None:
    code = steps.read_kernels(LOOP.format(operand=operand, product=product))["forward"]
    return steps.count(code, kernel, "bfloat16")


def test_the_shortest_way_that_does_the_work_is_counted() -> None:
    # Two jumps over something, barrier and copy, 20 for the operand, LDGDEPBAR, the product, the jump back.
    assert step() == 2 + 2 + 20 + 1 + 8 + 1
    assert step(kernel="input_gradient") == 2 + 2 + 1 + 8 + 1  # makes no operand, so it may jump over it
    with_more = PRODUCT + "\n        /*0190*/                   MOV R1, R2 ;"
    assert step(product=with_more) == 35


def test_the_steps_of_asynchronous_products_are_told_apart_by_their_loads() -> None:
    def loop(first: int, loads: int, products: int = 4) -> str:
        texts = ["BAR.SYNC 0x0", "LDGSTS.E [R3], [R4]", *["LDG.E R1, desc[UR4][R2.64]"] * loads]
        texts += ["HGMMA.64x64x16.F32.BF16 R24, R152, gdesc[UR20], R24, gsb0"] * products + [f"@P0 BRA 0x{first:x}"]
        return "\n".join(f"        /*{first + 16 * i:04x}*/                   {t} ;" for i, t in enumerate(texts))

    text = "                Function : _ZN8pnn_cuda1_14forward_kernelI\n" + "\n".join(
        [loop(0, 16), loop(0x400, 2), loop(0x800, 1, products=3), "        /*0900*/                   EXIT ;"]
    )
    code = steps.read_kernels(text)["forward"]
    assert steps.count_wgmma(code) == {1: 2 + 16 + 4 + 1, 8: 2 + 2 + 4 + 1, 16: None}  # the last lacks a product
    assert steps.count_wgmma([]) == {}


def test_a_step_that_does_not_do_the_work_is_not_counted() -> None:
    assert step(operand=OPERAND) is None  # nothing is loaded
    assert step(product="") is None  # nothing multiplies, so there is no loop
    assert step(product=PRODUCT.splitlines()[0]) is None
