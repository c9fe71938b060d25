"""``python -m bench.render RESULTS.json [--readme README.md]``: the JSON of a run as Markdown tables."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
OURS = "ours"

SHAPES = {
    "small400": "400 small tensors",
    "resnet18": "ResNet-18",
    "vit_s16": "ViT-S/16",
    "resnet50": "ResNet-50",
    "gpt2_small": "GPT-2 small",
}
WORDS = {"sam": "SAM", "asam": "ASAM", "sgd": "SGD-m", "adamw": "AdamW"}


def load(path: Path) -> dict[str, Any]:
    """A run as ``python -m bench`` wrote it."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results


def _count(n: int) -> str:
    return f"{n / 1e6:.1f}M" if n >= 1e6 else f"{n / 1e3:.0f}k"


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    align = ["---" if i < 2 else "---:" for i in range(len(head))]
    return ["| " + " | ".join(line) + " |" for line in (head, align, *body)]


def _steps(benchmarks: list[dict[str, Any]]) -> list[str]:
    rows: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    contenders: list[str] = []
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if info.get("kind") == "step":
            entry = {**info, "ms": 1e3 * benchmark["stats"]["median"]}
            rows.setdefault((info["shape"], info["algorithm"], info["base"]), {})[info["contender"]] = entry
            if info["contender"] not in contenders and info["contender"] != OURS:
                contenders.append(info["contender"])
    if not rows:
        return []
    body = []
    for (shape, algorithm, base), row in rows.items():
        ours = row.get(OURS)
        cells = ["-", "-", "-"]
        if ours is not None:
            host = ours["host_us"]
            cells = [f"{ours['ms']:.2f}", f"{ours['gb_per_s']:.1f} ({ours['copy_share']:.0%})", f"{host:.0f}"]
        ratios = [f"{row[name]['ratio']:.2f}" if name in row else "-" for name in contenders]
        any_row = next(iter(row.values()))
        label = f"{SHAPES.get(shape, shape)} ({_count(any_row['params'])}, {any_row['tensors']} tensors)"
        body.append([label, f"{WORDS[algorithm]} + {WORDS[base]}", *cells, *ratios])
    head = ["model", "step", "ours, ms", "GB/s (of a copy)", "host, us", *contenders]
    noise = [row[OURS]["ratio"] for row in rows.values() if OURS in row]
    text = [
        "One step, both passes, gradients given. The columns after ours are times relative to ours: 2.00 takes "
        "twice as long, below 1.00 it is faster. Host is the time of a step on as many tensors of one element."
    ]
    if noise:
        text[0] += f" Ours against itself: {min(noise):.2f} to {max(noise):.2f}."
    return [*text, "", *_table(head, body), ""]


def _iterations(benchmarks: list[dict[str, Any]]) -> list[str]:
    body = []
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if info.get("kind") == "iteration":
            label = f"{info['model']} ({_count(info['params'])}), batch {info['batch']}"
            times = [f"{1e3 * benchmark['stats']['median']:.1f}", f"{info['plain_ms']:.1f}", f"{info['ratio']:.3f}"]
            body.append([label, info["contender"], *times])
    if not body:
        return []
    head = ["model", "optimizer", "SAM iteration, ms", "two forward and backward, ms", "ratio"]
    return ["A whole SAM iteration (SGD-m) against two plain forward and backward passes.", "", *_table(head, body), ""]


def _environment(results: dict[str, Any]) -> list[str]:
    env = results["environment"]
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in env["versions"].items())
    line = (
        f"{env['device']}, {env['cores']} cores, {env['threads']} threads; {versions}; "
        f"commit {env['commit']}; {env['date']}; `{env['command']}`"
    )
    rates = [b["extra_info"]["copy_gb_per_s"] for b in results["benchmarks"] if "copy_gb_per_s" in b["extra_info"]]
    if rates:
        line += f"; a copy of 102 MB, beside each row: {min(rates):.1f} to {max(rates):.1f} GB/s"
    left_out = [f"Left out: {reason}." for reason in env.get("left_out", [])]
    return [line + ".", *(line for reason in left_out for line in ("", reason))]


def render(results: dict[str, Any]) -> str:
    """The tables of a run; every row that was measured, whoever won it."""
    benchmarks = results["benchmarks"]
    return "\n".join([*_steps(benchmarks), *_iterations(benchmarks), *_environment(results)])


def insert(readme: str, table: str) -> str:
    """``readme`` with ``table`` between its markers.

    Raises:
        ValueError: when there are no markers.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.render", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path, help="write between its markers instead of printing")
    args = parser.parse_args()
    table = render(load(args.results))
    if args.readme is None:
        print(table)
    else:
        text = args.readme.read_text(encoding="utf-8")
        args.readme.write_text(insert(text, table), encoding="utf-8")


if __name__ == "__main__":
    main()
