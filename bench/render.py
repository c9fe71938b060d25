"""``python -m bench.render RESULTS.json [--write]``: a run as Markdown tables, printed or put into the pages."""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from .contenders import BARE, OURS

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
GPU_BEGIN, GPU_END = "<!-- bench:gpu:begin -->", "<!-- bench:gpu:end -->"
ROOT = Path(__file__).resolve().parents[1]
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"

WORDS = {
    "small400": "400 small tensors", "resnet18": "ResNet-18", "vit_s16": "ViT-S/16", "resnet50": "ResNet-50",
    "vit_b16": "ViT-B/16", "gpt2_small": "GPT-2 small",
    "sam": "SAM", "asam": "ASAM", "sgd": "SGD-m", "adamw": "AdamW",
}  # fmt: skip

STEPS = (
    "One step, both passes, gradients given. The columns after ours are times relative to ours: 2.00 takes "
    "twice as long, below 1.00 it is faster. Host is the time of a step on as many tensors of one element."
)
SHORT = (
    "The optimizer's part of a SAM step on the CPU, both passes, gradients given. After ours: times relative to it, "
    "above 1.00 slower than ours."
)
GPU_STEPS = STEPS + " Steps follow one another: the time is the device's or the host's, whichever is longer."
GRAPHS = "The same step replayed as a CUDA graph. Host is the time until a replay returns."
HOSTS = "Host time of a step, us: until it returns, on an idle device and as many tensors of one element."
OPS = "Each op alone, over parameters that no cache holds; on a GPU the device's time."
KINDS = (
    "Every kind of step, gradients given. Loop: its time relative to ours. The last column: ours relative to one "
    "launch of the same fused rule, without check, norm or second pass."
)
# What a kernel is to reach of a copy's bandwidth on a GPU, where it moves so many bytes that its start does not count.
BAR, BAR_BYTES = 0.92, 400e6
DRY = "DRY RUN on the CPU: the numbers mean nothing."

Row = dict[str, Any]


def _word(name: str) -> str:
    return WORDS.get(name, name)


def _size(row: Row) -> str:
    n = row["params"]
    return f"{_word(row['shape'])} ({n / 1e6:.1f}M" if n >= 1e6 else f"{_word(row['shape'])} ({n / 1e3:.0f}k"


def _rate(row: Row) -> str:
    return f"{row['gb_per_s']:.1f} ({row['copy_share']:.0%})"


def _ratio(row: Row, to: str) -> float | None:
    """A row's time relative to one that it took turns with; None where that one failed."""
    return row["ms"] / row["beside_ms"][to] if to in row["beside_ms"] else None


def _table(text: str, head: list[str], body: list[list[str]]) -> list[str]:
    align = ["---" if i < 2 else "---:" for i in range(len(head))]
    return [text, "", *("| " + " | ".join(line) + " |" for line in (head, align, *body)), ""]


def _grouped(rows: list[Row], *keys: str) -> tuple[list[dict[str, Row]], list[str]]:
    """Rows that agree in these keys, by contender; and the contenders in order."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), {})[row["contender"]] = row
    return list(groups.values()), list(dict.fromkeys(row["contender"] for row in rows))


def _labels(row: Row) -> list[str]:
    return [f"{_size(row)}, {row['tensors']} tensors)", f"{_word(row['method'])} + {_word(row['base'])}"]


def _contests(rows: list[Row], text: str, short: bool = False) -> list[str]:
    groups, names = _grouped(rows, "shape", "method", "base")
    head = ["model", "step", "ours, ms", *["GB/s (of a copy)", "host, us"] * (not short)]
    body = []
    for group in groups:
        ours = group.get(OURS)
        cells = [f"{ours['ms']:.2f}", _rate(ours), f"{ours['host_us']:.0f}"] if ours else ["-", "-", "-"]
        cells = cells[: len(head) - 2]
        for row in [group.get(name) for name in names if name != OURS]:
            # Without ours there is nothing to relate to.
            ratio = None if row is None else _ratio(row, OURS)
            cells.append("-" if row is None else f"{row['ms']:.2f} ms" if ratio is None else f"{ratio:.2f}")
        body.append([*_labels(next(iter(group.values()))), *cells])
    noise = [ratio for row in rows if row["contender"] == OURS if (ratio := _ratio(row, OURS)) is not None]
    if noise and not short:
        text += f" Ours against itself: {min(noise):.2f} to {max(noise):.2f}."
    return _table(text, head + [name for name in names if name != OURS], body)


def _hosts(rows: list[Row]) -> list[str]:
    groups, names = _grouped(rows, "shape", "method", "base")
    body = []
    for group in groups:
        times = [group[name]["host_us"] if name in group else None for name in names]
        body.append([*_labels(next(iter(group.values()))), *("-" if us is None else f"{us:.0f}" for us in times)])
    return _table(HOSTS, ["model", "step", *names], body)


def _first_of_each_size(rows: list[Row]) -> list[Row]:
    """The rows of SAM that the README shows: at every size with the first base that was timed there."""
    rows = [row for row in rows if row["kind"] == "step" and row["method"] == "sam"]
    bases = {row["shape"]: row["base"] for row in reversed(rows)}
    return [row for row in rows if row["base"] == bases[row["shape"]]]


def _kernels(rows: list[Row]) -> list[str]:
    groups, backends = _grouped(rows, "method", "shape", "dtype")
    body = []
    for group in groups:
        row = next(iter(group.values()))
        label = f"{_word(row['shape'])}, {row['dtype']}" + (f", {row['tensors']} tensors" * (row["tensors"] > 1))
        cells = [row["method"], label, f"{row['bytes_per_param']}"]
        for backend in backends:
            cells += [f"{1e3 * row['ms']:.1f}", _rate(row)] if (row := group.get(backend)) else ["-", "-"]
        body.append(cells)
    head = ["op", "parameters", "bytes a parameter"]
    return _table(OPS, [*head, *(c for backend in backends for c in (f"{backend}, us", "GB/s (of a copy)"))], body)


def _bar(rows: list[Row]) -> list[str]:
    """Of each backend: which kernels are below the bar; and the fixed cost of those that move too little for it."""
    lines = []
    for backend in dict.fromkeys(row["contender"] for row in rows):
        mine = [row for row in rows if row["contender"] == backend]
        moved = {id(row): row["bytes_per_param"] * row["params"] for row in mine}
        large = [row for row in mine if moved[id(row)] >= BAR_BYTES]
        below = [row for row in large if row["copy_share"] < BAR]
        fixed = [1e3 * row["ms"] * (1 - row["copy_share"]) for row in mine if moved[id(row)] < BAR_BYTES]
        line = (
            f"{backend}: {len(large) - len(below)} of {len(large)} kernels that move {BAR_BYTES / 1e6:.0f} MB or more "
        )
        line += f"reach {BAR:.0%} of a copy"
        shares = [f"{row['method']} {_word(row['shape'])} {row['dtype']} {row['copy_share']:.1%}" for row in below]
        line += f"; below: {', '.join(shares)}." if below else "."
        if fixed:
            line += (
                f" The {len(fixed)} others take {statistics.median(fixed):.1f} us, the median, longer than their bytes."
            )
        lines += [line, ""]
    return lines


def _kinds(rows: list[Row]) -> list[str]:
    body = []
    for row in rows:
        cells = [f"{_size(row)}), {_word(row['base'])}", row["method"], f"{row['bytes_per_param']}"]
        ratios = [row["beside_ms"]["loop"] / row["ms"], row["ms"] / row["beside_ms"][BARE]]
        body.append([*cells, f"{row['ms']:.2f}", _rate(row), *(f"{ratio:.2f}" for ratio in ratios)])
    head = ["model", "step", "bytes a parameter", "ours, ms", "GB/s (of a copy)", "loop", "over the base step alone"]
    return _table(KINDS, head, body)


def _iterations(rows: list[Row]) -> list[str]:
    peaks = any("peak_gib" in row for row in rows)
    body = []
    for row in rows:
        label = f"{_size(row)}), batch {row['batch']}" + f", {_word(row['base'])}" * peaks
        label += ", loss not finite" * (not row.get("finite", True))
        plain = row["beside_ms"]["plain"]
        cells = [label, row["contender"], f"{row['ms']:.1f}", f"{plain:.1f}", f"{row['ms'] / plain:.3f}"]
        body.append(cells + ([f"{row['peak_gib']:.2f}", f"{row['plain_peak_gib']:.2f}"] if peaks else []))
    head = ["model", "optimizer", "SAM iteration, ms", "two forward and backward, ms", "ratio"]
    head += ["peak, GiB", "peak of the two, GiB"] * peaks
    how = ", bf16 autocast," if peaks else " (SGD-m)"
    return _table(f"A whole SAM iteration{how} against two plain forward and backward passes.", head, body)


def _environment(results: dict[str, Any]) -> list[str]:
    env = results["environment"]
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in env["versions"].items())
    line = f"{env['device']}, {env['cores']} cores, {env['threads']} threads; {versions}; "
    line += f"commit {env['commit']}; {env['date']}; `{env['command']}`"
    if rates := [row["copy_gb_per_s"] for row in results["rows"] if row["copy_gb_per_s"] is not None]:
        line += f"; a copy of {env['copy_mb']} MB, beside each row: {min(rates):.1f} to {max(rates):.1f} GB/s"
    notes = [f"Left out: {reason}." for reason in env["left_out"]] + [f"Failed: {what}." for what in env["failed"]]
    return [line + ".", *(line for note in notes for line in ("", note))]


def render(results: dict[str, Any]) -> str:
    """The tables of a run; every row that was measured, whoever won it."""
    env, cuda = results["environment"], results["environment"]["device_type"] == "cuda"
    lines = [DRY, ""] * env["dry_run"]
    lines += [f"Ours runs on its backend {env['backends'][0]} where none is named.", ""] * cuda
    tables = [("kernel", _kernels), ("step", partial(_contests, text=GPU_STEPS if cuda else STEPS))]
    tables += [("step", _hosts)] * cuda
    tables += [("graph", partial(_contests, text=GRAPHS)), ("kind", _kinds), ("iteration", _iterations)]
    for kind, table in tables:
        if rows := [row for row in results["rows"] if row["kind"] == kind]:
            lines += table(rows)
            lines += _bar(rows) if cuda and kind == "kernel" else []
    lines += _environment(results)
    return "\n".join(lines + ["", DRY] * env["dry_run"])


def summary(results: dict[str, Any]) -> str:
    """What the README shows of a run on the CPU: SAM at every size, whole iterations, the machine."""
    env = results["environment"]
    ratios: dict[str, list[str]] = {}
    for row in results["rows"]:
        if row["kind"] == "iteration":
            ratios.setdefault(_word(row["shape"]), []).append(f"{row['contender']} {_ratio(row, 'plain'):.2f}")
    lines = _contests(_first_of_each_size(results["rows"]), SHORT, short=True)
    whole = "; ".join(f"{model}: {', '.join(of)}" for model, of in ratios.items())
    line = f"A whole SAM iteration over two forward and backward passes: {whole}. " if whole else ""
    line += f"{env['device']}, torch {env['versions']['torch']}, commit {env['commit'][:9]}, `{env['command']}`."
    return "\n".join([*lines, line])


def pages(results: dict[str, Any]) -> dict[Path, tuple[str, str, str]]:
    """Where the tables of a run belong: for every page the markers, and what stands between them.

    Raises:
        ValueError: for a dry run, which belongs nowhere.
    """
    if results["environment"]["dry_run"]:
        raise ValueError("a dry run's numbers mean nothing: they go into no page")
    if results["environment"]["device_type"] == "cuda":
        return {PAGE: (GPU_BEGIN, GPU_END, render(results))}
    return {PAGE: (BEGIN, END, render(results)), README: (BEGIN, END, summary(results))}


def insert(page: str, begin: str, end: str, tables: str) -> str:
    """``page`` with ``tables`` between its markers; ValueError when there are none."""
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"no markers {begin} and {end}")
    return f"{before}{begin}\n{tables}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.render", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md and README.md")
    args = parser.parse_args()
    try:
        results = json.loads(args.results.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"{args.results}: {error}")
    if not args.write:
        print(render(results))
        return
    for page, between in pages(results).items():
        page.write_text(insert(page.read_text(encoding="utf-8"), *between), encoding="utf-8")


if __name__ == "__main__":
    main()
