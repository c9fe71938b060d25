"""``python -m bench.render RESULTS.json [--readme README.md]``: the JSON of a run as Markdown tables."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
GPU_BEGIN, GPU_END = "<!-- bench:gpu:begin -->", "<!-- bench:gpu:end -->"
OURS = "ours"

SHAPES = {
    "small400": "400 small tensors",
    "resnet18": "ResNet-18",
    "vit_s16": "ViT-S/16",
    "resnet50": "ResNet-50",
    "vit_b16": "ViT-B/16",
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


# Of one shape, algorithm and base rule: what was measured, by contender.
Rows = dict[tuple[str, str, str], dict[str, dict[str, Any]]]


def _contests(benchmarks: list[dict[str, Any]], kind: str) -> tuple[Rows, list[str]]:
    """The rows of a kind, and the contenders that are not ours."""
    rows: Rows = {}
    contenders: list[str] = []
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if info.get("kind") == kind:
            entry = {**info, "ms": 1e3 * benchmark["stats"]["median"]}
            rows.setdefault((info["shape"], info["algorithm"], info["base"]), {})[info["contender"]] = entry
            if info["contender"] not in contenders and info["contender"] != OURS:
                contenders.append(info["contender"])
    return rows, contenders


def _labels(key: tuple[str, str, str], row: dict[str, dict[str, Any]]) -> list[str]:
    shape, algorithm, base = key
    info = next(iter(row.values()))
    label = f"{SHAPES.get(shape, shape)} ({_count(info['params'])}, {info['tensors']} tensors)"
    return [label, f"{WORDS[algorithm]} + {WORDS[base]}"]


def _steps(benchmarks: list[dict[str, Any]], kind: str, text: str) -> list[str]:
    rows, contenders = _contests(benchmarks, kind)
    if not rows:
        return []
    body = []
    for key, row in rows.items():
        ours = row.get(OURS)
        cells = ["-", "-", "-"]
        if ours is not None:
            host = ours["host_us"]
            cells = [f"{ours['ms']:.2f}", f"{ours['gb_per_s']:.1f} ({ours['copy_share']:.0%})", f"{host:.0f}"]
        ratios = [_ratio(row.get(name)) for name in contenders]
        body.append([*_labels(key, row), *cells, *ratios])
    head = ["model", "step", "ours, ms", "GB/s (of a copy)", "host, us", *contenders]
    noise = [row[OURS]["ratio"] for row in rows.values() if OURS in row and row[OURS]["ratio"] is not None]
    if noise:
        text += f" Ours against itself: {min(noise):.2f} to {max(noise):.2f}."
    return [text, "", *_table(head, body), ""]


def _ratio(info: dict[str, Any] | None) -> str:
    if info is None:
        return "-"
    # Without ours there is nothing to relate to.
    return f"{info['ms']:.2f} ms" if info["ratio"] is None else f"{info['ratio']:.2f}"


def _hosts(benchmarks: list[dict[str, Any]]) -> list[str]:
    rows, contenders = _contests(benchmarks, "step")
    columns = [OURS, *contenders]
    body = []
    for key, row in rows.items():
        times = [row[name]["host_us"] if name in row else None for name in columns]
        body.append([*_labels(key, row), *("-" if us is None else f"{us:.0f}" for us in times)])
    if not body:
        return []
    text = "Host time of a step, us: until it returns, on an idle device and as many tensors of one element."
    return [text, "", *_table(["model", "step", *columns], body), ""]


def _kernels(benchmarks: list[dict[str, Any]], backends: list[str]) -> list[str]:
    rows: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if info.get("kind") == "kernel":
            rows.setdefault((info["op"], info["shape"], info["dtype"]), {})[info["backend"]] = info
    body = []
    for (op, shape, dtype), row in rows.items():
        info = next(iter(row.values()))
        label = f"{SHAPES.get(shape, shape)}, {dtype}" + (f", {info['tensors']} tensors" * (info["tensors"] > 1))
        cells = []
        for backend in backends:
            one = row.get(backend)
            cells += (
                ["-", "-"] if one is None else [f"{one['us']:.1f}", f"{one['gb_per_s']:.0f} ({one['copy_share']:.0%})"]
            )
        body.append([op, label, f"{info['bytes_per_param']}", *cells])
    if not body:
        return []
    head = ["op", "parameters", "bytes a parameter"]
    head += [cell for backend in backends for cell in (f"{backend}, us", "GB/s (of a copy)")]
    text = "Each op alone, its calls waiting in the device's queue, over buffers that no cache holds."
    return [text, "", *_table(head, body), ""]


def _iterations(benchmarks: list[dict[str, Any]]) -> list[str]:
    body = []
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if info.get("kind") == "iteration":
            label = f"{SHAPES.get(info['model'], info['model'])} ({_count(info['params'])}), batch {info['batch']}"
            cells = [f"{1e3 * benchmark['stats']['median']:.1f}", f"{info['plain_ms']:.1f}", f"{info['ratio']:.3f}"]
            if "peak_gib" in info:
                label += f", {WORDS[info['base']]}" + (", loss not finite" * (not info["finite"]))
                cells += [f"{info['peak_gib']:.2f}", f"{info['plain_peak_gib']:.2f}"]
            body.append([label, info["contender"], *cells])
    if not body:
        return []
    head = ["model", "optimizer", "SAM iteration, ms", "two forward and backward, ms", "ratio"]
    text = "A whole SAM iteration (SGD-m) against two plain forward and backward passes."
    if len(body[0]) > len(head):
        head += ["peak, GiB", "peak of the two, GiB"]
        text = "A whole SAM iteration, bf16 autocast, against two plain forward and backward passes."
    return [text, "", *_table(head, body), ""]


def _family(benchmarks: list[dict[str, Any]]) -> list[str]:
    body = []
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if info.get("kind") == "family":
            label = f"{SHAPES.get(info['shape'], info['shape'])} ({_count(info['params'])}), {WORDS[info['base']]}"
            body.append(
                [
                    label,
                    info["step"],
                    f"{info['bytes_per_param']}",
                    f"{1e3 * benchmark['stats']['median']:.2f}",
                    f"{info['gb_per_s']:.1f} ({info['copy_share']:.0%})",
                    f"{info['naive_ratio']:.2f}",
                    f"{info['bare_ratio']:.2f}",
                ]
            )
    if not body:
        return []
    head = ["model", "step", "bytes a parameter", "ours, ms", "GB/s (of a copy)", "loop", "over the base step alone"]
    text = (
        "Every kind of step, gradients given. Loop: its time relative to ours. The last column: ours relative to one "
        "launch of the same fused rule, without check, norm or second pass."
    )
    return [text, "", *_table(head, body), ""]


def _environment(results: dict[str, Any]) -> list[str]:
    env = results["environment"]
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in env["versions"].items())
    line = (
        f"{env['device']}, {env['cores']} cores, {env['threads']} threads; {versions}; "
        f"commit {env['commit']}; {env['date']}; `{env['command']}`"
    )
    rates = [b["extra_info"]["copy_gb_per_s"] for b in results["benchmarks"] if "copy_gb_per_s" in b["extra_info"]]
    if rates:
        line += f"; a copy of {env.get('copy_mb', 102)} MB, beside each row: {min(rates):.1f} to {max(rates):.1f} GB/s"
    notes = [f"Left out: {reason}." for reason in env.get("left_out", [])]
    notes += [f"Failed: {reason}." for reason in env.get("failed", [])]
    return [line + ".", *(line for note in notes for line in ("", note))]


STEPS = (
    "One step, both passes, gradients given. The columns after ours are times relative to ours: 2.00 takes "
    "twice as long, below 1.00 it is faster. Host is the time of a step on as many tensors of one element."
)
GPU_STEPS = (
    "One step, both passes, gradients given, steps following one another: the time of the device or of the host, "
    "whichever is slower. The columns after ours are times relative to ours: 2.00 takes twice as long, below 1.00 it "
    "is faster. Host is the time until a step returns, on as many tensors of one element."
)
GRAPHS = "The same step replayed as a CUDA graph. Host is the time until a replay returns."


def render(results: dict[str, Any]) -> str:
    """The tables of a run; every row that was measured, whoever won it."""
    benchmarks, env = results["benchmarks"], results["environment"]
    lines: list[str] = []
    if env.get("device_type") != "cuda":
        lines += _steps(benchmarks, "step", STEPS)
    else:
        if env["dry_run"]:
            lines += ["Dry run on a CPU: these numbers mean nothing.", ""]
        lines += [f"Ours runs on its backend {env['backends'][0]} where none is named.", ""]
        lines += _kernels(benchmarks, env["backends"])
        lines += _steps(benchmarks, "step", GPU_STEPS)
        lines += _hosts(benchmarks)
        lines += _steps(benchmarks, "graph", GRAPHS)
    return "\n".join([*lines, *_family(benchmarks), *_iterations(benchmarks), *_environment(results)])


def markers(results: dict[str, Any]) -> tuple[str, str]:
    """Where the tables of a run belong.

    Raises:
        ValueError: for a dry run, which belongs nowhere.
    """
    if results["environment"].get("dry_run"):
        raise ValueError("a dry run's numbers mean nothing: they do not go into a README")
    return (GPU_BEGIN, GPU_END) if results["environment"].get("device_type") == "cuda" else (BEGIN, END)


def insert(readme: str, table: str, begin: str = BEGIN, end: str = END) -> str:
    """``readme`` with ``table`` between its markers.

    Raises:
        ValueError: when there are no markers.
    """
    before, found_begin, rest = readme.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"no markers {begin} and {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.render", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path, help="write between its markers instead of printing")
    args = parser.parse_args()
    results = load(args.results)
    table = render(results)
    if args.readme is None:
        print(table)
    else:
        text = args.readme.read_text(encoding="utf-8")
        args.readme.write_text(insert(text, table, *markers(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
