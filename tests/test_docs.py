"""The documentation: every Python block of every page runs as it stands there, and nothing is said twice."""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import sys
import types
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)]
# What a page may import that is no dependency of the tests: without it the page is skipped.
INTEGRATIONS = {"accelerate", "ignite", "lightning", "transformers"}


def blocks(page: Path) -> list[tuple[int, str]]:
    """What stands between ```python and ```: the number of its first line, and the code."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def imported(page: Path) -> set[str]:
    """The packages that the blocks of a page import."""
    nodes = [node for _, code in blocks(page) for node in ast.walk(ast.parse(code))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT).with_suffix(""))


def with_code() -> list[object]:
    marks = {True: pytest.mark.slow, False: ()}  # importing a trainer takes seconds
    return [
        pytest.param(page, id=name_of(page), marks=marks[bool(imported(page) & INTEGRATIONS)])
        for page in PAGES
        if blocks(page)
    ]


@pytest.mark.parametrize("page", with_code())
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page in their order, in one namespace."""
    for package in sorted(imported(page) & INTEGRATIONS):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # classes of a page can be pickled
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        if "loops" not in page.parts:  # there other packages are at work, which may warn
            warnings.simplefilter("error", UserWarning)
        for line, code in blocks(page):
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), vars(module))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_is_overlooked(page: Path) -> None:
    """A block that is indented or not closed would not run."""
    assert page.read_text(encoding="utf-8").count("```python") == len(blocks(page))


def test_nothing_is_said_twice() -> None:
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    paragraphs = [part.strip() for page in pages for part in re.split(r"\n\s*\n", page.read_text(encoding="utf-8"))]
    assert [part for part, times in Counter(paragraphs).items() if times > 1 and len(part) > 60] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Of the pages outside of docs/, whose links Sphinx checks."""
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_minimal_example(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "examples" / "minimal.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        runpy.run_path(str(path), run_name="__main__")
    # A quarter is what guessing gets.
    assert float(capsys.readouterr().out.rpartition(" ")[2].rstrip("%\n")) > 65
