"""tests/cuda/predictions.py: what its figures must obey, and that docs/cuda.md holds them as they are now."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def predictions() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pnn_predictions", ROOT / "tests/cuda/predictions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_page_holds_the_tables_as_they_are_computed(predictions: ModuleType) -> None:
    written = (ROOT / "docs/cuda.md").read_text(encoding="utf-8")
    between = written.split(predictions.BEGIN)[1].split(predictions.END)[0]
    assert between == predictions.page(), "python tests/cuda/predictions.py --write"


def test_bytes_and_flops_of_a_case_by_hand(predictions: ModuleType) -> None:
    case = (2, 3, 8, 5, 4)  # 128 pixels, 12 maps
    forward = predictions.predict(case, "float32", "forward")
    assert forward.bytes == (3 * 128 + 5 * 128 + 5 * 12) * 4
    assert forward.flops == 2 * 12 * 128 * 5
    inputs = predictions.predict(case, "bfloat16", "input_gradient")
    assert inputs.bytes == (5 * 128 + 2 * 3 * 128 + 5 * 12) * 2  # reads g, x, V and writes dx
    assert inputs.flops == forward.flops
    weights = predictions.predict(case, "bfloat16", "weight_gradient")
    # Reads g and x; one piece of the sum, written in float32, read again and stored.
    assert weights.bytes == (5 * 128 + 3 * 128) * 2 + 5 * 12 * 4 + 2 * 5 * 12 * 2
    assert forward.intensity == forward.flops / forward.bytes


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("norm", [False, True])
def test_passes_add_up_and_no_resource_is_exceeded(predictions: ModuleType, dtype: str, norm: bool) -> None:
    for case in predictions.CASES:
        for layout in ("contiguous", "channels_last"):
            parts = [
                predictions.predict(case, dtype, d, layout, norm=norm)
                for d in ("forward", "input_gradient", "weight_gradient")
            ]
            both = predictions.predict(case, dtype, "forward+backward", layout, norm=norm)
            assert both.time_us == pytest.approx(sum(p.time_us for p in parts))
            assert both.flops == sum(p.flops for p in parts)
            for p in [*parts, both]:
                longest = max(p.memory_us, p.l2_us, p.product_us, p.issue_us, p.shared_us)
                assert p.time_us >= longest + predictions.LAUNCH_US * p.launches - 1e-9
                assert p.time_us >= p.flops / predictions.FLOPS[dtype] * 1e6
                assert p.time_us >= p.bytes / predictions.DEVICE_BYTES * 1e6
                assert p.bound


def test_asynchronous_products_are_predicted_of_layers_that_can_have_them(predictions: ModuleType) -> None:
    launches = {"forward": 2, "input_gradient": 2, "weight_gradient": 2}  # V's copy first, or the pieces' sum behind
    for case in predictions.CASES:
        for dtype in ("bfloat16", "float16"):
            for direction in launches:
                assert predictions.wgmma_kernels(case, dtype, direction, "contiguous")
                both = [predictions.predict(case, dtype, direction, wgmma=wgmma) for wgmma in (False, True)]
                # 14 x 14 and 7 x 7 pixels are no whole runs of 16 bytes: copied before the weight gradient.
                copied = direction == "weight_gradient" and case[2] % 4 != 0
                assert both[1].flops == both[0].flops and both[1].launches == launches[direction] + copied
                assert both[1].time_us >= both[1].flops / predictions.FLOPS[dtype] * 1e6
                assert both[1].time_us < 1.5 * both[0].time_us
                # Normalised layers have them too, and more to do before and behind.
                normed = [
                    predictions.predict(case, dtype, direction, norm=True, wgmma=wgmma) for wgmma in (False, True)
                ]
                assert normed[1].flops == both[1].flops and normed[1].time_us < 1.5 * normed[0].time_us
                assert normed[1].time_us >= both[1].time_us and normed[1].launches >= both[1].launches
        for direction in launches:
            assert not predictions.wgmma_kernels(case, "float32", direction, "contiguous")
    one = (32, 40, 8, 48, 1)
    assert not predictions.wgmma_kernels((*one[:3], 32, 1), "bfloat16", "forward", "contiguous")  # few outputs
    assert not predictions.wgmma_kernels(one, "bfloat16", "forward", "contiguous")  # maps in no whole sixteens
    assert not predictions.wgmma_kernels((4, 64, 8, 64, 128), "bfloat16", "input_gradient", "contiguous")  # many masks
    uneven = (32, 36, 7, 36, 4)  # neither pixels nor channels in runs of 16 bytes, nor a copy's
    assert not predictions.wgmma_kernels(uneven, "bfloat16", "weight_gradient", "contiguous")
    assert not predictions.copies(uneven, "bfloat16", "contiguous", "weight_gradient")


def test_normalising_costs_and_more_masks_cost(predictions: ModuleType) -> None:
    case = (32, 64, 56, 64, 1)
    for dtype in predictions.DTYPES:
        plain = predictions.predict(case, dtype, "forward").time_us
        assert predictions.predict(case, dtype, "forward", norm=True).time_us > plain
        assert predictions.predict((*case[:4], 4), dtype, "forward").time_us > plain


def test_unknown_arguments_are_refused(predictions: ModuleType) -> None:
    for arguments in (("float64", "forward"), ("float32", "sideways"), ("float32", "forward", "nhwc")):
        with pytest.raises(ValueError, match="unknown dtype"):
            predictions.predict((1, 1, 1, 1, 1), *arguments)
