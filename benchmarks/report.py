"""Write the tables and plots of benchmarks/README.md from results/<gpu>/*.json: `make report`.

    python -m benchmarks.report [--results DIR] [--readme FILE]

Every figure on the page is one of a result file or a quotient of two of them. What was not measured
stands there as not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness import RESULTS, Row
from benchmarks.machine import ROOT
from benchmarks.targets import TARGETS, Target, case

BEGIN, END = "<!-- make report: begin -->", "<!-- make report: end -->"
# the GPU that the targets are for
TARGET_GPU = "H200"


def main(arguments: Sequence[str]) -> int:
    """Write plots beside the results and the tables between the page's markers; return 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of <gpu>/*.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "benchmarks" / "README.md")
    given = parser.parse_args(arguments)
    runs = read(given.results)
    for folder, rows in runs.items():
        plot(rows, folder)
    text = page(runs, given.readme.parent)
    given.readme.write_text(replaced(given.readme.read_text(), text))
    print(f"{given.readme}: {sum(map(len, runs.values()))} rows of {len(runs)} GPUs")
    return 0


def read(results: Path) -> dict[Path, list[Row]]:
    """Return the rows of each GPU's folder that has any, from its bench_*.json.

    Raises: ValueError when a row was not verified or is no GPU's.
    """
    runs: dict[Path, list[Row]] = {}
    for path in sorted(results.glob("*/bench_*.json")):
        for entry in json.loads(path.read_text()):
            row = Row(**entry)
            if row.verified is not True or row.gpu == "cpu":
                raise ValueError(f"report: {path} must hold verified rows of a GPU, got {row}")
            runs.setdefault(path.parent, []).append(row)
    return runs


def replaced(readme: str, text: str) -> str:
    """Return the page with `text` between its markers.

    Raises: ValueError when the page has not one of each, in order.
    """
    if (
        readme.count(BEGIN) != 1
        or readme.count(END) != 1
        or readme.index(BEGIN) > readme.index(END)
    ):
        raise ValueError(f"report: the page must have one {BEGIN} before one {END}")
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def page(runs: dict[Path, list[Row]], beside: Path) -> str:
    """Return the generated part of the page; links are relative to the folder `beside`."""
    aimed = [row for rows in runs.values() for row in rows if TARGET_GPU in row.gpu]
    text = [f"## Targets on one {TARGET_GPU}", "", *_targets(aimed)]
    if not runs:
        text += ["", "No GPU has been measured yet: there is no file in `results/<gpu>/`."]
    for folder, rows in runs.items():
        text += ["", f"## {rows[0].gpu}", "", *_provenance(rows), ""]
        link = Path(os.path.relpath(folder, beside)).as_posix()
        text += [f"![Time against the limits of {rows[0].gpu}]({link}/roofline.png)"]
        for op in dict.fromkeys(row.op for row in rows):
            mine = [row for row in rows if row.op == op]
            text += ["", f"### {op}", "", *_op_table(mine, rows)]
        pages = ", ".join(f"[{p.stem}]({link}/{p.name})" for p in sorted(folder.glob("bench_*.md")))
        text += ["", f"Peers' own rows, and what was left out and why: {pages}."]
    return "\n".join(text) + "\n"


def _targets(rows: Sequence[Row]) -> list[str]:
    """Return the target table: each with its worst and best figure, or "not measured"."""
    table = ["| op, shape | target | measured | met |", "|---|---|---|---|"]
    for target in TARGETS:
        about = [row for row in rows if target.judge(row, rows)]
        judged = [found for row in best(about) if (found := target.judge(row, rows))]
        if judged:
            figures = sorted(figure for figure, _ in judged)
            span = " to ".join(dict.fromkeys(_figure(target, f) for f in (figures[0], figures[-1])))
            kept = sum(holds for _, holds in judged)
            said = "yes" if kept == len(judged) else f"{kept} of {len(judged)} shapes"
        else:
            span, said = "not measured", "not measured"
        table.append(f"| {target.what} | {target.bound} | {span} | {said} |")
    return table


def best(rows: Sequence[Row]) -> list[Row]:
    """Return our fastest row of each case."""
    ours = [row for row in rows if not row.peer]
    return [row for row in ours if row.us == min(r.us for r in case(row, rows) if not r.peer)]


def _figure(target: Target, value: float) -> str:
    if "%" in target.bound:
        return f"{value:.0%}"
    units = {"us": ".2f", "ms": ".0f", "s": ".2f", "FPS": ".1f"}
    for unit in target.bound.split():
        if unit in units:
            return f"{value:{units[unit]}} {unit}"
    return f"{value:.2f}x"


def _provenance(rows: Sequence[Row]) -> list[str]:
    """Return what the rows have in common: commit, versions, limits."""
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    names = ("driver", "cuda", "cudnn", "torch", "triton", "python")
    versions = dict.fromkeys(
        f"{name} {row.versions[name]}" for row in rows for name in names if name in row.versions
    )
    text = [f"Commit {commits}; {', '.join(versions)}. Limits measured in the same runs:"]
    limits = {name: [row.limits[name] for row in rows] for name in rows[0].limits}
    spans = (
        f"{min(values):.4g} {name}"
        if min(values) == max(values)
        else f"{min(values):.4g} to {max(values):.4g} {name}"
        for name, values in limits.items()
    )
    return [*text, ", ".join(spans) + "."]


def _op_table(mine: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """Return the table of one op: ours at each shape, with the targets that are about it."""
    table = [
        "| shape | dtype | implementation | us | rate | % of limit | best peer | ratio | target |",
        "|---|---|---|---:|---:|---:|---|---:|---|",
    ]
    for row in mine:
        if row.peer:
            continue
        share = "-" if row.limit_share is None else f"{row.limit_share:.0%}"
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        us = f"{row.us:.2f}" if row.us < 100 else f"{row.us:.0f}"
        cells = [row.shape, row.dtype, row.implementation, us, _rate(row), share]
        cells += [row.best_peer or "-", ratio, _met(row, rows)]
        table.append(f"| {' | '.join(cells)} |")
    return table


def _rate(row: Row) -> str:
    """Return the rate that the limits hold back: of arithmetic, or of bytes."""
    if row.tflops and row.tflops / row.limits["TFLOP/s"] >= (row.gbps or 0) / row.limits["GB/s"]:
        return f"{row.tflops:.0f} TFLOP/s"
    return f"{row.gbps:.0f} GB/s" if row.gbps else "-"


def _met(row: Row, rows: Sequence[Row]) -> str:
    """Return the targets about the row, each with whether it is met."""
    if TARGET_GPU not in row.gpu:
        return ""
    found = ((target, target.judge(row, rows)) for target in TARGETS)
    return "; ".join(
        f"{target.bound}: {'met' if judged[1] else 'not met'} ({_figure(target, judged[0])})"
        for target, judged in found
        if judged
    )


def plot(rows: Sequence[Row], folder: Path) -> None:
    """Write roofline.png and roofline.svg: ours under the measured limits, by arithmetic a byte."""
    import matplotlib

    matplotlib.use("Agg")
    # the same rows give the same bytes
    matplotlib.rcParams["svg.hashsalt"] = "roofline"
    from matplotlib import pyplot

    figure, (roof, moves) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    copy, product = (max(row.limits[name] for row in rows) for name in ("GB/s", "TFLOP/s"))
    ours = best(rows)
    computing = [row for row in ours if row.tflops and row.gbps]
    moving = [row for row in ours if row.gbps and not row.tflops]

    at = [1e3 * row.tflops / row.gbps for row in computing]
    span = [min([1.0, *at]) / 2, max([1e4, *at]) * 2]
    ridge = 1e3 * product / copy
    edges = [span[0], ridge, span[1]]
    roof.plot(edges, [min(x * copy / 1e3, product) for x in edges], color="black")
    for name, points in _grouped(computing):
        xs = [1e3 * row.tflops / row.gbps for row in points]
        roof.scatter(xs, [row.tflops for row in points], s=18, label=name)
    roof.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s")
    roof.set_title("Arithmetic, under the measured product and copy")

    for name, points in _grouped(moving):
        sizes = [row.gbps * row.us / 1e3 for row in points]
        moves.scatter(sizes, [row.gbps for row in points], s=18, label=name)
    moves.axhline(copy, color="black")
    moves.set(xscale="log", xlabel="MB read and written", ylabel="GB/s", ylim=(0, copy * 1.1))
    moves.set_title("Moves, under the measured copy")
    for axes in (roof, moves):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.suptitle(rows[0].gpu)
    figure.savefig(folder / "roofline.png", dpi=110, metadata={"Software": None})
    figure.savefig(folder / "roofline.svg", metadata={"Date": None})
    pyplot.close(figure)


def _grouped(rows: Sequence[Row]) -> Iterable[tuple[str, list[Row]]]:
    """Yield (op and implementation, its rows)."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.op}, {row.implementation}", []).append(row)
    return groups.items()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
