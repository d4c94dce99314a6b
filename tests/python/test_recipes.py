"""Every page of docs/recipes runs as it stands there, and the gallery's index leads to each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import recipes_support

PAGES = recipes_support.pages()
INDEX = (recipes_support.FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.program], ids=lambda page: page.path.stem)
def test_the_page_runs(page: recipes_support.Page, tmp_path: Path) -> None:
    missing = page.missing()
    if missing:
        pytest.skip(f"{page.path.name} needs {', '.join(missing)}; tier zoo runs it")
    page.run(tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.stem)
def test_the_page_is_well_formed(page: recipes_support.Page) -> None:
    text = page.path.read_text(encoding="utf-8")
    assert re.match(r"(<!-- needs: \w+(, \w+)* -->\n\n?)?# \S", text), "a title first, after the line with the needs"
    fences = [line for line in text.splitlines() if line.lstrip().startswith("```")]
    assert len(fences) % 2 == 0, "a block is not closed"
    assert all(re.fullmatch(r"```(python|console|cpp|cmake|c|text)", fence) for fence in fences[::2])
    assert all(fence == "```" for fence in fences[1::2])


def test_the_index_links_every_page_and_no_other() -> None:
    linked = re.findall(r"^- \[[^\]]+\]\((\S+\.md)\)", INDEX, re.MULTILINE)
    assert len(linked) == len(set(linked)), "a page is linked twice"
    assert {page.path.name for page in PAGES} == set(linked)


def test_a_failing_block_is_found_with_the_line_of_the_page(tmp_path: Path) -> None:
    path = recipes_support.FOLDER / "page.md"
    text = "# Title\n\n```python\nx = 1\n```\n\n```cpp\nnot python\n```\n\n```python\nassert x == 2\n```\n"
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    page = recipes_support.read(tmp_path / "page.md")
    assert page.needs == ()
    page = recipes_support.Page(path, page.needs, page.program)
    with pytest.raises(AssertionError, match=r"(?s)page.md failed:.*line 12.*assert x == 2"):
        page.run(tmp_path)


def test_needs_are_read_from_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("<!-- needs: torch, no_such_module -->\n# Title\n", encoding="utf-8")
    page = recipes_support.read(tmp_path / "page.md")
    assert page.needs == ("torch", "no_such_module") and page.missing() == ["no_such_module"] and page.program == ""
