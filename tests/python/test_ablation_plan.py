"""The dry run: what a study would do and cost, and that it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from ablation_support import changed, tiny_data, tiny_study

from torch_pnn import cli
from torch_pnn.ablation import arms, files, plan, records, training
from torch_pnn.ablation.data import CLASSIFICATION, DETECTION, MULTILABEL, TensorDataset
from torch_pnn.ablation.errors import UsageError
from torch_pnn.ablation.statistics import resolvable_difference
from torch_pnn.ablation.study import Study


def _run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def _plan(study, **changes):
    data = tiny_data()
    options = {"jobs": 2, "runs": study.runs, **changes}
    return plan.make(study, data, **options)


def test_what_a_plan_counts():
    study = tiny_study(arms=("cnn", "pnn", "control"), seeds=(0, 1, 2, 3), other_seeds=(0, 1), epochs=3, batch_size=10)
    made = _plan(study)
    assert [(arm.name, arm.seeds, arm.left) for arm in made.arms] == [("cnn", 2, 2), ("pnn", 4, 4), ("control", 4, 4)]
    assert made.runs == made.left == 10
    assert made.steps_per_epoch == math.ceil(64 / 10)
    for arm in made.arms:
        built = arms.build(study, arm.name, study.streams(0), tiny_data())
        assert (arm.parameters, arm.macs, arm.mask_bytes, arm.width) == (
            built.parameters,
            built.macs,
            built.mask_bytes,
            built.width,
        )
        assert arm.step_seconds > 0
        assert arm.run_seconds > 3 * 7 * arm.step_seconds
    assert made.seconds == pytest.approx(sum(arm.left * arm.run_seconds for arm in made.arms) / 2)
    shown = plan.text(made)
    assert "10 runs, 30 epochs, 210 steps\n" in shown
    assert "seeds      4 for the compared pair (0 to 3), 2 for the other arms" in shown
    assert re.search(r"^cnn +2 +4 ", shown, re.MULTILINE)


def test_the_time_of_unequal_runs():
    arm = plan.ArmPlan("pnn", 1, 1, 4, 1, 1, 0, 1.0, 100.0, None)
    made = plan.Plan(tiny_study(), tiny_data(), (arm, dataclasses.replace(arm, run_seconds=10.0)), 8, "", 1, ())
    assert made.seconds == 100.0  # more processes than runs: the longest one
    assert dataclasses.replace(made, jobs=1).seconds == 110.0
    assert dataclasses.replace(made, arms=(dataclasses.replace(arm, left=0),)).seconds == 0.0


def test_images_that_are_tested():
    study = changed(tiny_study(), epochs=7)
    data = tiny_data()
    assert plan.images_tested(study, data) == 7 * 32
    assert plan.images_tested(changed(study, shifts=(1, 2)), data) == (7 + 8) * 32
    assert plan.images_tested(changed(study, test_every=3), data) == 3 * 32
    assert plan.images_tested(changed(study, test_every=7), data) == 32


def test_runs_that_are_done_are_not_planned():
    study = tiny_study()
    row = {"arm": "pnn", "seed": 1, "status": "finished", "accuracy": 0.5, "correct": 16, "total": 32}
    found = records.Records(None, study, "0", [], [row], [])
    made = _plan(study, records=found)
    assert [arm.left for arm in made.arms] == [1, 2]
    assert "3 runs are left" in plan.text(made)
    part = _plan(study, runs=study.runs[:1], shard="part 1 of 4")
    assert part.left == 1
    assert "this command does part 1 of 4" in plan.text(part)


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "LEAST_SECONDS", 0.0)
    tiny = ("--epochs", 1, "--seeds", 2, "--arms", "pnn,control")
    assert _run("ablate", "--dry-run", *tiny) == 0
    alone = capsys.readouterr().out
    assert "Study digits: " in alone
    assert "4 runs, 4 epochs, 152 steps" in alone
    assert _run("ablate", "--dry-run", "--out", "none", *tiny) == 0
    assert not list(tmp_path.iterdir())
    capsys.readouterr()
    assert _run("ablate", "--out", "some", "--jobs", 1, *tiny) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "some").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert _run("ablate", "--dry-run", "--out", "some", *tiny) == 0
    assert "nothing is left to be done" in capsys.readouterr().out
    assert _run("ablate", "--dry-run", "--out", "some", *tiny[:-2]) == 2
    assert "some holds the results of another study" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "some").rglob("*") if path.is_file()} == before


def test_an_arm_that_can_not_be_built_is_said_before_any_training(tmp_path, monkeypatch, capsys):
    from torch_pnn.ablation import runner

    monkeypatch.setattr(runner, "execute", lambda *_, **__: pytest.fail("it began to train"))
    monkeypatch.chdir(tmp_path)
    wrong = ("--set", "arms.waves.options.levl=1", "--seeds", 2)
    for more in (("--out", "x"), ("--dry-run",)):
        assert _run("ablate", *more, *wrong) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("torch-pnn: arm 'waves', layer layer1.0.layer1 of resnet: unknown option 'levl'")
        assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_parts_of_a_study_share_a_folder(tmp_path, capsys):
    tiny = ("--epochs", 1, "--seeds", 2, "--arms", "pnn,control", "--jobs", 1)
    assert _run("ablate", "--out", tmp_path / "s", *tiny, "--shard", "1/2") == 0
    assert len(records.read(tmp_path / "s").results) == 2
    assert _run("ablate", "--out", tmp_path / "s", *tiny, "--shard", "2/2") == 0
    assert len(records.read(tmp_path / "s").results) == 4
    assert records.read(tmp_path / "s").missing == []


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3", ""])
def test_parts_that_there_are_not(text, capsys):
    with pytest.raises(SystemExit) as ended:
        _run("ablate", "--out", "x", f"--shard={text}")
    assert ended.value.code == 2
    assert "is no part such as 2/8" in capsys.readouterr().err


def test_showing_studies(tmp_path, monkeypatch, capsys):
    assert _run("studies") == 0
    listed = capsys.readouterr().out
    assert listed.splitlines()[0] == "digits               Handwritten digits, 8×8 pixels"
    assert _run("studies", "show", "digits") == 0
    shown = capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(shown, encoding="utf-8")
    assert _run("studies", "show", "mine.yaml", "--full") == 0
    full = capsys.readouterr().out
    assert "  warmup_epochs: 2.0\n" in full
    assert "  momentum: 0.9\n" in full
    (tmp_path / "mine.yaml").write_text(full, encoding="utf-8")
    assert _run("studies", "show", "mine.yaml", "--full") == 0
    assert capsys.readouterr().out == full
    assert _run("studies", "show", "digit") == 2
    assert "did you mean digits?" in capsys.readouterr().err
    assert _run("studies", "show", "none.yaml") == 2
    assert capsys.readouterr().err == "torch-pnn: none.yaml: there is no such file\n"
    assert _run("studies", "keys") == 0
    assert "| `epochs` | a whole number from 1 | `12` |" in capsys.readouterr().out
    assert _run("studies", "arms") == 0
    assert capsys.readouterr().out.startswith("cnn ")


def test_a_study_file_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("arms: [pnn, control]\nseeds: 2\nschedule: {epochs: 1, warmup_epochs: 0.5}\n")
    options = ("--jobs", 1, "--set", "model.width=4", "--set", "arms.pnn.level=0.5")
    assert _run("ablate", "mine.yaml", "--out", "out", *options) == 0
    found = records.read(tmp_path / "out").study
    assert isinstance(found, Study)
    assert (found.name, found.model.width, found.arm("pnn").options["level"]) == ("mine", 4, 0.5)
    capsys.readouterr()
    (tmp_path / "mine.yaml").write_text("arms: [pnn, control]\nseeds: two\n")
    assert _run("ablate", "mine.yaml", "--out", "out", *options) == 2
    assert capsys.readouterr().err.startswith('torch-pnn: mine.yaml:2: seeds is "two", a whole number from 1')
    assert _run("ablate", "--out", "x", "--data", "") == 2
    assert not (tmp_path / "x").exists()


def test_a_device_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for more in (("--out", tmp_path / "x"), ("--dry-run",)):
        assert _run("ablate", *more, "--set", "device=cuda") == 1
        assert "the study computes on cuda, and PyTorch finds no such device here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_arm_that_breaks_in_the_making_is_named(monkeypatch):
    study = tiny_study()

    def broken(*_):
        raise ValueError("no such\nthing")

    monkeypatch.setattr(training, "build", broken)
    with pytest.raises(UsageError, match="^the arm pnn can't be built: no such thing$"):
        _plan(study)


def _scores(pairs):
    rows = []
    for seed, (first, second) in enumerate(pairs):
        for arm, score in (("pnn", first), ("control", second)):
            rows.append(
                {"arm": arm, "seed": seed, "status": "finished", "accuracy": score, "correct": None, "total": 9}
            )
    return rows


def test_what_the_seeds_can_resolve():
    few = " ".join(plan.resolution(tiny_study(seeds=(0, 1, 2)), None))
    assert few == "3 seeds can't decide between pnn and control: the sign-flip test needs 6"
    study = tiny_study(arms=("pnn", "control", "cnn", "lbcnn"), seeds=tuple(range(10)), other_seeds=tuple(range(6)))
    assumed = plan.resolution(study, None)
    smallest = resolvable_difference(10, plan.ASSUMED_DEVIATION)
    assert assumed[0].startswith(
        f"10 seeds find a difference of {smallest:.2f} points between pnn and control with 80 %"
    )
    assert "if paired differences deviate by 0.50 points (an assumption" in assumed[2]
    assert assumed[-1] == "2 other arms: 6 seeds show differences, 7 can decide (2 comparisons)"
    enough = plan.resolution(dataclasses.replace(study, other_seeds=()), None)
    assert (
        enough[-1]
        == f"2 other arms: 10 seeds find a difference of {resolvable_difference(10, 0.5, comparisons=2):.2f} points"
    )
    swept = dataclasses.replace(study, arms=(*study.arms, *arms.sweep(study.arm("pnn"), "level", (0.5, 1, 2))))
    assert plan.resolution(swept, None)[-2:] == (
        assumed[-1],
        "the sweep over level, 3 arms: 6 seeds show differences, 7 can decide (3 comparisons)",
    )
    # With results, their own deviation: differences of 2, 4 and 6 points deviate by 2.
    found = records.Records(None, study, "0", [], _scores([(0.52, 0.5), (0.54, 0.5), (0.56, 0.5)]), [])
    piloted = plan.resolution(study, found)
    assert "if paired differences deviate by 2.00 points (as the 3 pairs that are there do)" in piloted[2]
    assert piloted[0].startswith(f"10 seeds find a difference of {resolvable_difference(10, 2.0):.2f} points ")
    assert piloted[3].startswith("so 'equivalent within ±0.5 points' is out of reach")


class _Boxes(TensorDataset):
    """Images with a box each, as torchvision's detectors take them."""

    def _train(self, *arguments):
        return map(self._listed, super()._train(*arguments))

    def _test(self, *arguments):
        return map(self._listed, super()._test(*arguments))

    def _listed(self, batch):
        images, labels = batch
        return list(images), [
            {
                "boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]),
                "labels": label.reshape(1) + 1,
                "difficult": torch.zeros(1, dtype=torch.bool),
            }
            for label in labels
        ]


def _data_like(study):
    """A few random images of the study's kind."""
    kind = study.data.name
    channels, side, classes = {"digits": (1, 8, 10), "mnist": (1, 28, 10), "cifar10": (3, 32, 10)}.get(
        kind, (3, 64, 20)
    )
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(12, channels, side, side, generator=generator)
    labels = torch.arange(12) % classes
    names = [f"class {number}" for number in range(classes)]
    if kind == "voc-classification":
        labels = torch.randint(0, 2, (12, classes), generator=generator).float()
    form = _Boxes if kind == "voc-detection" else TensorDataset
    task = {"voc-classification": MULTILABEL, "voc-detection": DETECTION}.get(kind, CLASSIFICATION)
    shifts = study.data.shifts
    return form(
        kind, "Random images.", names, (pictures[:8], labels[:8]), (pictures[8:], labels[8:]), task=task, shifts=shifts
    )


@pytest.mark.parametrize("name", files.ready_names())
def test_every_ready_made_study_can_be_planned(name, monkeypatch, capsys):
    """Every arm of every study is built, trained for a step and tested, in little."""
    if name == "voc-detection":
        pytest.importorskip("torchvision", reason="torchvision has the detectors")
    monkeypatch.setattr(plan, "LEAST_STEPS", 0)
    monkeypatch.setattr(plan, "LEAST_SECONDS", 0.0)
    settings = ["device=cpu", "precision=float32", "threads=1"]
    if files.load(name).model.width:
        settings.append("model.width=8")
    study = files.load(name, settings=settings)
    made = plan.make(study, _data_like(study), jobs=1, runs=study.runs)
    assert made.runs == made.left == len(study.runs)
    shown = plan.text(made)
    for arm in study.arms:
        assert f"\n{arm.name} " in shown
    # What is compared with equal cost has about equal cost.
    for arm in study.arms:
        if arm.match and arm.match in study.arm_names:
            cost = arm.match_by
            mine, other = (getattr(next(a for a in made.arms if a.name == n), cost) for n in (arm.name, arm.match))
            assert 0.6 < mine / other < 1.6
    if study.question.control == "control":
        pair = [next(a for a in made.arms if a.name == n) for n in (study.question.candidate, study.question.control)]
        assert pair[0].parameters == pair[1].parameters
