"""Tables of studies: the terminal's, CSV, Markdown and LaTeX, and the figures in them."""

from __future__ import annotations

import csv
import dataclasses
import io
import re

import pytest
from ablation_rows import MEANS, fail, large, make_records

from torch_pnn.ablation import tables
from torch_pnn.ablation.errors import AblationError
from torch_pnn.ablation.tables import Table

SMALL = {"cnn": 0.975, "pnn": 0.965, "control": 0.93, "waves": 0.966}


@pytest.fixture(scope="module")
def small():
    made = make_records(SMALL, total=360, seeds=8, other_seeds=6, deviation=0.004, shifts=(1, 2))
    return made, tables.evaluate(made)


def test_verdict_first_then_the_table(small):
    made, result = small
    lines = tables.text_report(made, result).splitlines()
    assert lines[0].startswith("PNN is better than its control without noise by ")
    head, rule, *body = lines[2:8]
    assert {len(head), len(rule), *map(len, body)} == {len(rule)}
    assert [line.split("  ")[0] for line in body] == ["CNN", "PNN", "control", "PNN, waves"]
    assert "(control)" in body[2]
    assert "correct answers over all 360 test images" in lines[9]


def test_figures_of_an_arm_are_those_of_its_rows(small):
    made, result = small
    rows = [row for row in made.results if row["arm"] == "waves"]
    arm = result.find("waves")
    assert arm.accuracy.mean == pytest.approx(sum(row["correct"] for row in rows) / (360 * len(rows)))
    control = {row["seed"]: row["correct"] for row in made.results if row["arm"] == "control"}
    assert arm.difference.values == tuple(100 * (row["correct"] - control[row["seed"]]) / 360 for row in rows)
    assert arm.shifted["1"][2] == pytest.approx(100 * (rows[2]["shifted"]["1"] - rows[2]["accuracy"]))
    assert arm.per_class[3] == pytest.approx(sum(row["per_class"][3] for row in rows) / len(rows))
    assert arm.best.count == 6


def test_families_are_the_other_arms_and_each_sweep():
    result = tables.evaluate(large())
    comparisons = {arm.arm: arm.difference.comparisons for arm in result.arms if arm.difference is not None}
    assert comparisons["pnn"] == 1
    assert comparisons["cnn"] == len(MEANS) - 2
    assert comparisons["waves level 4"] == 14
    assert comparisons["pnn norm none"] == 2
    assert "10 for the 14 other arms (there are 6)" in tables.too_few(large().study)


def test_arms_csv_holds_plain_numbers(small):
    made, result = small
    rows = list(csv.DictReader(io.StringIO(tables.arms_csv(made, result))))
    assert [row["arm"] for row in rows] == list(SMALL)
    pnn = rows[1]
    assert float(pnn["difference_points"]) == result.primary.mean
    assert float(pnn["t95_low"]) == result.primary.low
    assert float(pnn["sign_flip_p"]) == 2 / 2**8
    assert pnn["verdict"] == "better"
    assert float(pnn["shift_2_minus_test_points"]) < 0
    assert rows[2]["difference_points"] == ""
    assert {len(row) for row in rows} == {len(rows[0])}
    assert None not in rows[0]


def test_runs_csv_holds_every_run(small):
    made, _ = small
    broken = fail(made, "waves", 1, "broken", "RuntimeError: =1+1\nand more")
    rows = list(csv.DictReader(io.StringIO(tables.runs_csv(broken))))
    assert len(rows) == len(made.study.runs)
    (row,) = [row for row in rows if row["status"] == "broken"]
    assert (row["arm"], row["seed"], row["accuracy"]) == ("waves", "1", "")
    assert sum(int(row["correct"] or 0) for row in rows) == sum(row["correct"] or 0 for row in broken.results)


def test_a_spreadsheet_takes_no_text_for_a_formula():
    assert "'=1+1" in tables._csv(["a"], [["=1+1"]])
    assert tables._csv(["a"], [[-1.5]]) == "a\n-1.5\n"


def test_markdown_keeps_its_columns():
    text = tables.to_markdown(Table("C|D", ("a", "b"), (("x | y", "`_1_`"), ("*", "2"))))
    lines = text.splitlines()[2:]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {3}
    assert r"x \| y" in lines[2]


def test_latex_is_whole_and_escaped(small):
    made, result = small
    arms = [dataclasses.replace(result.arms[0], title=r"50 % & #1 {a_b} ~^\ $x$"), *result.arms[1:]]
    text = tables.to_latex(tables.score_table(made, result, arms), "x")
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert re.findall(r"\\(?:begin|end)\{\w+\}", body) == [
        r"\begin{table}", r"\begin{tabular}", r"\end{tabular}", r"\end{table}"
    ]  # fmt: skip
    assert [body.count(rf"\{rule}") for rule in ("toprule", "midrule", "bottomrule")] == [1, 1, 1]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    columns = len(re.search(r"\\begin\{tabular\}\{(l r*|lr*)\}", body)[1])
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {columns - 1}
    assert r"50 \% \& \#1 \{a\_b\} \textasciitilde{}\textasciicircum{}\textbackslash{} \$x\$" in body
    depth = 0
    for letter in re.sub(r"\\[{}]", "", body):
        depth += (letter == "{") - (letter == "}")
        assert depth >= 0
    assert depth == 0
    outside = re.sub(r"\\.", "", body.replace("$\\pm$", "").replace("$-$", "").replace(r"$\times$", ""))
    assert not set("$%#_~^<>|") & set(outside)
    assert body.isascii()


def test_classes(small):
    made, result = small
    table = tables.class_table(made, result, result.main)
    assert table.head[:4] == ("class", "PNN", "control", "difference, points")
    assert [row[0] for row in table.rows] == made.data["class_names"]
    many = dataclasses.replace(made, results=[{**row, "per_class": [0.1 * (row["seed"] + 1)] * 99 + [None]}
                                              for row in made.results])  # fmt: skip
    result = tables.evaluate(many)
    table = tables.class_table(many, result, result.main)
    assert len(table.rows) == tables.CLASSES_SHOWN
    assert "25 classes of 100" in table.caption
    assert result.find("pnn").per_class[99] is None
    assert len(tables.classes_csv(many, result).splitlines()) == 101


def test_the_files_of_a_study(small, tmp_path):
    made, result = small
    made = dataclasses.replace(made, directory=tmp_path)
    folder = tables.write(made, result)
    names = {path.name for path in folder.iterdir()}
    assert {"arms.csv", "runs.csv", "classes.csv", "scores.md", "scores.tex", "costs.md", "seeds.tex"} <= names
    assert (folder / "scores.md").read_text(encoding="utf-8").startswith("Accuracy, and paired")
    assert {"sweep-level.md", "sweep-noise.tex"} <= set(tables.files(large(), tables.evaluate(large())))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "tables").write_text("a file")
    with pytest.raises(AblationError, match="can't make .*tables"):
        tables.write(dataclasses.replace(made, directory=tmp_path / "x"), result)


def test_failed_runs_and_unreadable_images_reach_the_terminal(small):
    made = fail(small[0], "pnn", 2)
    made.results[0]["unreadable"] = ["a.jpg", "b.jpg"]
    text = tables.text_report(made, tables.evaluate(made))
    assert "PNN, seed 2: the loss became nan in epoch 2" in text
    assert "2 images could not be read and were left out: a.jpg, b.jpg" in text
