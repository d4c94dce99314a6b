"""docs/zoo.md, which table.py writes, still says what a conversion does."""

import pytest
from zoo_models import ZOO

table = pytest.importorskip("table")
PAGE = table.PAGE.read_text(encoding="utf-8")
ROWS = PAGE.splitlines()


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "squeezenet1_1", "fcn_resnet50"])
def test_rows_agree(name):
    pytest.importorskip("torchvision")
    (model,) = [model for model in ZOO if model.package == "torchvision" and model.name == name]
    sizes = table.sizes_of(model)
    start = f"{table.row_start(model, sizes)} | {table.reasons(sizes.conversion)} | "
    assert sum(row.startswith(start) for row in ROWS) == 1


def test_forced_rows_agree():
    pytest.importorskip("torchvision")
    (model,) = [model for model in ZOO if model.package == "torchvision" and model.name == "convnext_tiny"]
    assert table.row_start(model, table.sizes_of(model, table.depthwise_too)) + " |" in ROWS


def test_multiply_adds_of_one_layer():
    """The stem 3 -> 64 of 7x7 at 112², a block of 64 -> 64 at 56²: by hand, from the published geometry."""
    pytest.importorskip("torchvision")
    (model,) = [model for model in ZOO if model.package == "torchvision" and model.name == "resnet18"]
    sizes = table.sizes_of(model)
    stem, pixels, total, converted = 3 * 64 * 49 * 112**2, 56**2, 0, 0
    for stage in range(4):
        width, area = 64 << stage, pixels >> (2 * stage)
        for number in range(4):
            first = stage > 0 and number == 0
            total += width * (width >> first) * 9 * area
            converted += width * (width >> first) * area * (4 if first else 1)  # before it pools
        total += (stage > 0) * width * (width // 2) * area
        converted += (stage > 0) * width * (width // 2) * area
    assert sizes.before == stem + total + 512 * 1000
    assert sizes.after == stem + converted + 512 * 1000


def test_every_model_has_a_row_and_nothing_is_lost():
    for model in ZOO:
        assert f"\n| {model.package} {model.name} | {model.whole_size}² | " in PAGE
    assert "✗" not in PAGE
    for text in (table.INTRODUCTION, table.FORCED, table.REASONS):
        assert text in PAGE


def test_marks_agree_with_the_flags_of_the_tests():
    """What test_zoo.py leaves out is what the page says never worked."""
    for model in ZOO:
        (row,) = [row for row in ROWS if row.startswith(f"| {model.package} {model.name} |") and row.count("|") == 8]
        marks = row.split(" | ")[-1].removesuffix(" |").split(" ")
        assert [mark == "✓" for mark in marks] == [model.script, model.trace, model.export], row
