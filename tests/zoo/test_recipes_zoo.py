"""The pages of docs/recipes that need other people's packages: here these must be installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import recipes_support

PAGES = [page for page in recipes_support.pages() if page.needs and page.program]
REQUIREMENTS = recipes_support.ROOT / "requirements" / "zoo.txt"
INSTALLED = {"torchvision", *re.findall(r"^([\w-]+)", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.stem)
def test_the_page_runs(page: recipes_support.Page, tmp_path: Path) -> None:
    missing = page.missing()
    assert not INSTALLED.intersection(missing), f"requirements/zoo.txt is not installed: {', '.join(missing)} missing"
    if missing:
        pytest.skip(f"{page.path.name} needs {', '.join(missing)}, of requirements/interchange.txt")
    page.run(tmp_path)
