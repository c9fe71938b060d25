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
INTEGRATIONS = {"accelerate", "ignite", "lightning", "skorch", "transformers"}
# What torchrun tells a script, of one process.
TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


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
    params = []
    for page in filter(blocks, PAGES):
        # Importing a trainer takes seconds, compiling more.
        slow = imported(page) & INTEGRATIONS or any("torch.compile(" in code for _, code in blocks(page))
        params.append(pytest.param(page, id=name_of(page), marks=pytest.mark.slow if slow else ()))
    return params


@pytest.mark.parametrize("page", with_code())
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page in their order, in one namespace; and nobody warns of what a page does."""
    for package in sorted(imported(page) & INTEGRATIONS):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # classes of a page can be pickled
    monkeypatch.chdir(tmp_path)
    if any("init_process_group(" in code for _, code in blocks(page)):
        for name, value in TORCHRUN.items():
            monkeypatch.setenv(name, value)
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for line, code in blocks(page):
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), vars(module))
    # Other packages may warn of what they do themselves.
    assert [f"{w.filename}:{w.lineno}: {w.message}" for w in seen if w.filename == str(page)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_is_overlooked(page: Path) -> None:
    """A block that is indented or not closed would not run."""
    assert page.read_text(encoding="utf-8").count("```python") == len(blocks(page))


def test_the_readme_is_short_and_shows_what_docs_has() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 120
    accuracies = re.findall(r"\d+\.\d+ ± \d+\.\d+", text)
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert len(accuracies) == 42
    assert [accuracy for accuracy in accuracies if accuracy not in results] == []


def public_names(module: Path) -> list[str]:
    """``__all__`` as it is written: the packages that a module imports need not be installed."""
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no __all__")


def test_every_public_name_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    module, documented = "", set()
    for kind, name in re.findall(r"^\.\. (?:auto|current)(class|function|module):: (\S+)$", reference, re.MULTILINE):
        module = name if kind == "module" else module
        documented.add(name if kind == "module" else f"{module}.{name}")
    package = ROOT / "sharpkern"
    integrations = sorted((package / "integrations").glob("[!_]*.py"))
    assert {path.stem for path in integrations} == INTEGRATIONS
    files = [package / "__init__.py", package / "analysis" / "__init__.py", package / "policy.py", *integrations]
    public = {
        ".".join([*path.relative_to(ROOT).with_suffix("").parts, name]).replace(".__init__", "")
        for path in files
        for name in public_names(path)
    }
    assert public - documented == {"sharpkern.__version__"}


def test_nothing_is_said_twice() -> None:
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    # Without code, and without what bench.render writes.
    left_out = re.compile(r"^```.*?^```$|^<!-- (bench:\w*:?)begin.*?^<!-- \1end", flags=re.M | re.S)
    texts = [left_out.sub("", page.read_text(encoding="utf-8")) for page in pages]
    paragraphs = Counter(part.strip() for text in texts for part in re.split(r"\n\s*\n", text))
    assert [part for part, times in paragraphs.items() if times > 1 and len(part) > 60] == []


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
