"""The benchmark suite: its statistics, what it compares, what it writes. Nothing here is timed for its own sake."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import contestants  # noqa: E402
import report  # noqa: E402
import rows  # noqa: E402
import timing  # noqa: E402

from torch_pnn import functional, models  # noqa: E402

# ---- statistics ----


def test_ratio_is_of_medians_and_its_interval_encloses_it():
    ratio = timing.compare([1.0, 5.0, 3.0, 4.0, 2.0], [(1.0, [2.0, 2.0, 2.0, 2.0, 2.0])])
    assert ratio.value == 1.5
    assert 0.5 <= ratio.low < 1.5 < ratio.high <= 2.5
    assert ratio.meets(0.9) == (ratio.low <= 0.9)


def test_interval_is_paired_by_round():
    """A machine that slows down for both sides of a round leaves the ratio's interval narrow."""
    drift = [1.0 + 0.3 * i for i in range(20)]
    paired = timing.compare([2 * t for t in drift], [(1.0, drift)])
    assert (paired.value, paired.low, paired.high) == pytest.approx((2.0, 2.0, 2.0))
    apart = timing.compare([2 * t for t in drift], [(1.0, drift[::-1])])
    assert apart.high - apart.low > 0.5


def test_interval_covers_the_true_ratio_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(100):
        ours, theirs = (torch.randn(25, generator=generator).mul(0.1).exp().tolist() for _ in range(2))
        ratio = timing.compare(ours, [(1.0, theirs)], seed=trial)
        hits += ratio.low <= 1.0 <= ratio.high
    assert 90 <= hits <= 100  # bootstrap intervals of medians err on the wide side


def test_floor_is_the_larger_of_both_ceilings():
    case = contestants.Case(1, 1024, 32, 1024, 1)
    assert case.flops == 2 * contestants.MM**3
    times = timing.Times({"forward, ours, contiguous": [3.0], "mm": [2.0], "copy": [1.0]})
    measured = rows.Measured(case, times)
    assert measured.compute_bound and measured.floor("forward, ours, contiguous").value == 1.5
    times.seconds["copy"] = [6.0]
    assert not measured.compute_bound and measured.floor("forward, ours, contiguous").value == 0.5


def test_better_layout_is_chosen_by_medians():
    times = timing.Times({"a, contiguous": [1.0, 9.0, 9.0], "a, channels_last": [4.0, 4.0, 4.0], "ours": [2.0] * 3})
    measured = rows.Measured(rows.SMALL_CASE, times)
    assert measured.ratio("ours", *rows.both_layouts("a")).value == 0.5


def test_geometric_mean():
    ratios = [timing.compare([r], [(1.0, [1.0])]) for r in (0.5, 2.0, 8.0)]
    assert timing.geometric_mean(ratios).value == pytest.approx(2.0)
    with pytest.raises(ValueError, match="no ratios"):
        timing.geometric_mean([])


@pytest.mark.parametrize("others", [[], [(1.0, [1.0])], [(1.0, [])]])
def test_series_of_other_lengths_are_refused(others):
    with pytest.raises(ValueError, match="equally many"):
        timing.compare([1.0, 2.0], others)


def test_everything_is_timed_in_every_round_and_the_order_turns():
    order = []
    calls = {name: timing.Contestant(lambda name=name: order.append(name)) for name in "abc"}
    times = timing.alternate(calls, timing.Effort(rounds=4, sample=0.0, budget=60.0))
    assert all(len(series) == 4 for series in times.seconds.values())
    warm_up = len(order) - 12
    assert order[warm_up:] == list("abcbcacababc")


def test_budget_leaves_rounds_out():
    calls = {"slow": timing.Contestant(lambda: __import__("time").sleep(0.01))}
    times = timing.alternate(calls, timing.Effort(rounds=50, sample=0.0, budget=0.05, fewest=3))
    assert 3 <= len(times.seconds["slow"]) <= 5


def test_gradients_are_recorded_only_where_asked():
    seen = []
    for grad in (False, True):
        timing.Contestant(lambda: seen.append(torch.is_grad_enabled()), grad).repeat(1)
    assert seen == [False, True]


# ---- contestants ----


@pytest.mark.parametrize("masks", [1, 3])
def test_all_contestants_of_the_layer_compute_the_same(masks):
    layer = contestants.Layer(contestants.Case(2, 4, 5, 6, masks))
    expected = functional.perturb_conv2d(
        layer.x["contiguous"], layer.weight, layer.bias, mask=layer.mask, level=contestants.LEVEL
    )
    found = layer.ours(("forward",)) | layer.ours(("forward",), "uniform")
    assert len(found) == 4
    for contestant in found.values():
        torch.testing.assert_close(contestant.call(), expected)
    for layout, x in layer.x.items():
        plain = contestants.plain_layer(x, layer.weight, layer.bias, layer.mask)
        torch.testing.assert_close(plain, expected, msg=layout)
    for name, contestant in layer.plain().items():
        ours = layer.ours(("training",))[name.replace("plain", "ours")]
        torch.testing.assert_close(contestant.call(), ours.call(), rtol=1e-4, atol=1e-4)


def test_every_contestant_runs_on_an_odd_size():
    layer = contestants.Layer(contestants.Case(1, 3, 5, 7, 2))
    both = rows.BOTH
    found = layer.ours(both) | layer.ours(both, "waves") | layer.ours(both, "normal") | layer.ours_bfloat16(both)
    found |= layer.ours_normalised() | layer.bare(both) | layer.conv3x3() | layer.ceilings()
    found |= contestants.Layer(contestants.Case(1, 3, 5, 7, 1)).overhead()
    for name, contestant in found.items():
        assert contestant.repeat(1) > 0, name


@pytest.mark.parametrize("preset", ["juefeix2018", "paper"])
def test_plain_network_computes_what_ours_does(preset):
    torch.manual_seed(0)
    ours = models.noise_resnet18(width=4, preset=preset, seed=3, masks=2).double()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    before = copy.deepcopy(ours.state_dict())
    plain = contestants.plain_network(ours, images[:1])
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())
    assert not any(type(module).__name__ == "PerturbConv2d" for module in plain.modules())
    torch.testing.assert_close(plain(images), ours(images))
    labels = torch.tensor([0, 1, 2, 3])
    steps = [contestants.training_step(network, images, labels) for network in (ours, plain)]
    for step in steps:
        step()
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in ours.parameters())
    by_name = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(by_name[name], parameter, msg=name)


@pytest.mark.slow
def test_network_contestants():
    # Narrower, oneDNN's 1x1 convolutions of a channels_last input under a stride write past their memory (its issue
    # 6035): the process crashes, or hangs.
    found = contestants.networks(batch=2, width=16)
    assert sorted(found) == sorted(
        f"step, {kind}, {layout}" for kind in ("ours", "plain", "3x3") for layout in contestants.LAYOUTS
    )
    assert all(contestant.grad for contestant in found.values())
    found["step, ours, channels_last"].repeat(1)


def test_compiled_network_contestants():
    found = contestants.compiled_networks(batch=2, width=4)
    assert {name: contestant.grad for name, contestant in found.items()} == {
        "inference, eager": False,
        "step, eager": True,
        "inference, compiled": False,
        "step, compiled": True,
    }
    assert found["inference, eager"].call().shape == (2, 10)


@pytest.mark.parametrize("text", ["", "1,2,3,4", "1,2,3,4,5,6", "1,2,0,4,5", "1,2,-3,4,5", "a,2,3,4,5", "1.5,2,3,4,5"])
def test_bad_cases_are_refused(text):
    with pytest.raises(ValueError, match="five positive integers"):
        contestants.parse_case(text)


# ---- rows and report ----


def fake_results(lines):
    return {
        "machine": {
            "processor": "A CPU",
            "threads": 2,
            "isa": "avx2",
            "torch": "2",
            "torch_pnn": "0",
            "system": "Linux",
        },
        "date": "2000-01-02",
        "command": "make bench",
        "seconds": 1.0,
        "load_before": 0.1,
        "cases": [
            {
                "case": "(1,2,3,4,5)",
                "flops": 10,
                "bytes": 20,
                "mm_gflops": 100.0,
                "copy_gbytes": 10.0,
                "floor_seconds": 0.5,
                "bound_by": "product",
                "median_seconds": {"forward, ours, contiguous": 1.0},
            }
        ],
        "lines": [report.line_record(line) for line in lines],
    }


LINES = [
    rows.Line("norm", "contiguous", "(1,2,3,4,5)", timing.Ratio(1.0, 0.9, 1.1), 1.12, "compute-bound"),
    rows.Line("norm", "channels_last", "(1,2,3,4,5)", timing.Ratio(1.2, 1.1, 1.3), 1.12),
    rows.Line("norm", "channels_last", "(5,4,3,2,1)", timing.Ratio(1.3, 1.2, 1.4), 1.12),
    rows.Line("seeds", "uniform", "(1,2,3,4,5)", timing.Ratio(1.0, 1.0, 1.0)),
    rows.Line("kept-bytes", "stored", "(1,2,3,4,5)", timing.Ratio(1000, 1000, 1000), 999, "", "bytes"),
]


def test_verdicts():
    assert [line.met for line in LINES] == [True, True, False, None, False]
    marks = [report.mark(line.met, line.value.value, line.target) for line in LINES]
    assert marks == ["met", "met by interval", "MISSED", "", "MISSED"]
    text = report.verdict(fake_results(LINES))
    assert "norm               1 of 3 MISSED, 1 by the interval's lower end alone" in text
    assert "2 of 4 targets met" in text


def test_markdown_has_every_line():
    text = report.markdown(fake_results(LINES))
    assert text.count("| contiguous |") == 1 and text.count("| channels_last |") == 2
    assert "1,000 bytes | 999 | MISSED" in text and "| (1,2,3,4,5) | 0.000 |" in text


def test_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    assert report.plot(fake_results(LINES), tmp_path)
    assert (tmp_path / "ratios.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "ratios.svg").read_text(encoding="utf-8")
    assert not report.plot(fake_results(LINES[-1:]), tmp_path)  # no ratio


def test_record_replaces_the_figures_and_nothing_else(tmp_path):
    document = tmp_path / "docs" / "kernels.md"
    document.parent.mkdir()
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    written = report.record(fake_results(LINES), tmp_path)
    assert written == [Path("benchmarks/results/2000-01-02-a-cpu-2t.md"), Path("docs/kernels.md")]
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "2000-01-02, A CPU" in text and "2.00 × floor" in text
    document.write_text("no place\n", encoding="utf-8")
    with pytest.raises(OSError, match="figures: begin"):
        report.record(fake_results(LINES), tmp_path)


def test_documents_have_a_place_for_figures():
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert text.count(report.BEGIN) == 1 and text.count(report.END) == 1


def test_memory_limits_hold_in_a_small_case():
    case = contestants.Case(4, 16, 9, 24, 3)
    effort = timing.Effort(1, 0.0, 1.0)
    lines = [*rows._kept(effort, True, [case]), *rows._memory(effort, True, [case])]
    assert len(lines) == 9
    assert all(line.met is not False for line in lines), [line for line in lines if line.met is False]


def run_bench(*arguments, **environment):
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "python"), **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_whole_program(tmp_path):
    long = ("network", "network-compiled", "libpnn", "training-compiled", "overhead")
    wanted = [name for name in rows.ROWS if name not in long]
    chosen = [argument for name in wanted for argument in ("--row", name)]
    done = run_bench("--quick", "--rounds", 2, "--case", "8,4,6,5,1", *chosen, "--out", tmp_path / "new" / "folder")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "new" / "folder" / "results.json").read_text(encoding="utf-8"))
    assert {line["row"] for line in results["lines"]} == set(wanted)
    assert results["command"].startswith("make bench ARGS='--quick --case 8,4,6,5,1 --row forward-1x1")
    (case,) = results["cases"]
    assert case["rounds"] == 2 and case["mm_gflops"] > 0 and case["copy_gbytes"] > 0
    assert all(math.isfinite(line["value"]) for line in results["lines"])
    for line in results["lines"]:
        assert line["low"] <= line["value"] <= line["high"]
        if line["target"] is not None:
            assert line["met"] == (line["low"] <= line["target"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--case", "1,2"], "five positive integers"),
        (["--row", "speed"], "invalid choice"),
        (["--threads", "0"], "--threads is 0, it should be at least 1"),
        (["--rounds", "-3"], "--rounds is -3, it should be at least 1"),
        (["--out", "/proc/nowhere"], "--out /proc/nowhere"),
    ],
)
def test_bad_options_end_before_anything_is_measured(arguments, sentence):
    done = run_bench(*arguments)
    assert done.returncode == 2 and sentence in done.stderr and "GFLOP" not in done.stdout


@pytest.mark.slow
def test_list_names_every_row():
    done = run_bench("--list")
    assert done.returncode == 0 and all(name in done.stdout for name in rows.ROWS)
