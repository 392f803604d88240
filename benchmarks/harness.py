"""Verify, then measure: the one way in which a figure of this project comes about.

A benchmark yields cases. A case holds candidates (our implementations and their peers) for the same
inputs. For each case, every candidate is checked against the reference, captured in a CUDA graph,
replayed once and checked again; then all of them are timed in turn, round by round, with the L2
cache cold, and the medians are written. A candidate that fails its check gets no row: for one of
ours the benchmark ends with exit code 1, for a peer the reason is printed.

On a CPU (`--device cpu`) the same code runs small cases without graphs: a smoke lane, whose rows go
nowhere unless `--out` says where, and never into benchmarks/results.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.machine import ROOT, clocks, commit, slug, versions
from sdvg.models.capture import Recorder

RESULTS = ROOT / "benchmarks" / "results"


class Row(NamedTuple):
    """One figure. Also the order of the keys in a result file."""

    op: str
    # the sizes, in words: "B=1 T=4680 ..."
    shape: str
    dtype: str
    implementation: str
    # whether somebody else wrote it, or it is what the op replaces
    peer: bool
    # median microseconds of one call
    us: float
    # of the arithmetic and of the bytes (read plus written) that the op must do, whatever the
    # implementation does
    tflops: float | None
    gbps: float | None
    # the least time that the measured limits allow / us
    limit_share: float | None
    # the fastest peer of the case, and its time / us: above 1 we are faster
    best_peer: str | None
    ratio: float | None
    # what this machine gave a large copy, a bf16 product and a launch of nothing in this run
    limits: dict[str, float]
    # always True: what was not verified is not written
    verified: bool
    gpu: str
    commit: str
    # versions, and clocks and power read while the case ran
    versions: dict[str, str | float]


@dataclass(frozen=True)
class Candidate:
    """One way to do a case's work."""

    name: str
    # does the work once and returns what `check` looks at; captured in a CUDA graph unless the case
    # says otherwise
    run: Callable[[], object]
    # raises AssertionError when the output is wrong
    check: Callable[[object], None]
    peer: bool = False
    # puts the state back before each checked run, for work that changes its input
    reset: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Case:
    """One op at one shape, with everybody who can do it."""

    op: str
    shape: str
    dtype: str
    candidates: Sequence[Candidate]
    # what the op must compute and move (read plus written); None: it is not that kind of work
    flops: float | None = None
    bytes: float | None = None
    # calls are timed by the wall clock, host work included, instead of by CUDA graphs
    wall: bool = False
    # one run does this many units of work; the row is about one
    units: int = 1
    # rounds that are timed even where they take long
    at_least: int = 5
    # candidates that could not be built: name -> why
    left_out: Mapping[str, str] = field(default_factory=dict)


class Plan(NamedTuple):
    """A case to be: built when its turn comes, freed before the next."""

    what: str
    build: Callable[[], Case]


class Unavailable(Exception):
    """What cannot run on this machine; the message says why."""


def measure(
    runs: Mapping[str, Callable[[], object]],
    seconds: float,
    device: torch.device,
    *,
    at_least: int = 5,
    sample: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return each run's median microseconds: all timed in turn, for `seconds`, `at_least` rounds.

    On a GPU the runs are enqueued behind a read of a buffer of four times the L2 cache (read, not
    written: lines that had to be written back would be charged to whoever comes next), between two
    events; the host runs ahead, so launches cost nothing. On a CPU each run is timed by the wall
    clock. `sample` is called while the work is in flight.
    """
    if device.type == "cpu":
        timer = _wall_times
    else:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        cold = torch.zeros(max(4 * l2, 1 << 26) // 4, device=device)

        def timer(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
            return _event_times(runs, rounds, cold, sample)

    began = time.perf_counter()
    timer(runs, 1)
    rounds = round(seconds / max(time.perf_counter() - began, 1e-6))
    times = timer(runs, min(max(rounds, at_least), 300))
    return {name: statistics.median(values) for name, values in times.items()}


def _turns(runs: Mapping[str, object], rounds: int) -> Iterator[str]:
    """Yield the names round by round, each round beginning with another one."""
    names = list(runs)
    for i in range(rounds):
        first = i % len(names)
        yield from names[first:] + names[:first]


def _wall_times(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in _turns(runs, rounds):
        _synchronize()
        began = time.perf_counter()
        runs[name]()
        _synchronize()
        times[name].append((time.perf_counter() - began) * 1e6)
    return times


def _event_times(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    cold: torch.Tensor,
    sample: Callable[[], None],
) -> dict[str, list[float]]:
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for name in _turns(runs, rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cold.sum()
        begin.record()
        runs[name]()
        end.record()
        marks[name].append((begin, end))
    sample()
    torch.cuda.synchronize()
    return {name: [b.elapsed_time(e) * 1e3 for b, e in pairs] for name, pairs in marks.items()}


def capture(
    run: Callable[[], object], reset: Callable[[], None] = lambda: None
) -> tuple[Callable[[], object], object]:
    """Return (replay, the output that it writes) of `run`, warmed up, captured in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            # work that goes on from its own output must not wander off
            reset()
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    # a peer that cannot be captured must not break what comes after it
    out, replay = Recorder().record(run, torch.device("cuda", torch.cuda.current_device()))
    return replay, out


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Bench:
    """One benchmark's run: verifies, times, prints and writes case by case.

    Args:
        name: the stem of the result files.
        device: "cuda" or "cpu".
        out: folder of the result files, written after each case; None: none are written.
        quick: half as many rounds, and fewer cases where a benchmark says so.
        budget: seconds after which no further case is begun; those are named as left out.

    Raises:
        Unavailable: no CUDA device, or CPU figures into the results of GPUs.
    """

    def __init__(
        self, name: str, device: str, out: Path | None, *, quick: bool = False, budget: float = 1e9
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise Unavailable(
                "device must be here, got 'cuda' without a GPU; --device cpu is the smoke lane"
            )
        if (
            device == "cpu"
            and out is not None
            and RESULTS in [out.resolve(), *out.resolve().parents]
        ):
            raise Unavailable(
                f"out must lie outside {RESULTS.relative_to(ROOT)} for cpu, got {out}"
            )
        self.name, self.out, self.quick = name, out, quick
        self.device = torch.device(device)
        self.deadline = time.monotonic() + budget
        self.rows: list[Row] = []
        # what the page says beside its rows
        self.notes: list[str] = []
        self.left_out: list[str] = []
        self.failed: list[str] = []
        self.gpu = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        self.commit = commit()
        self.versions = versions()
        self.limits = self._measure_limits()
        self._free()

    @property
    def late(self) -> bool:
        """Whether the time budget is spent."""
        return time.monotonic() > self.deadline

    def run(self, plans: Iterable[Plan]) -> int:
        """Run all cases that the budget allows; return the exit code: 0, or 1 after any failure."""
        for plan in plans:
            if self.late:
                self._say_left_out(plan.what, "the time budget was spent")
                continue
            try:
                self._run_case(plan.build())
            except Unavailable as reason:
                self._say_left_out(plan.what, str(reason))
            except Exception as error:
                traceback.print_exc()
                self._fail(f"{plan.what}: {_sentence(error)}")
            self._free()
        self._write()
        return 1 if self.failed else 0

    def _free(self) -> None:
        """Give back what a case held: gigabytes of a GPU."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _run_case(self, case: Case) -> None:
        seconds = 0.15 if self.quick else 0.3
        ready: dict[str, Callable[[], object]] = {}
        for name, reason in case.left_out.items():
            self._say_left_out(name, reason)
        sound = True
        for candidate in case.candidates:
            what = f"{case.op} {case.shape} {candidate.name}"
            try:
                ready[candidate.name] = self._verified(candidate, case.wall)
            except Exception as error:
                if candidate.peer:
                    self._say_left_out(what, _sentence(error))
                else:
                    traceback.print_exc()
                    self._fail(f"{what}: {_sentence(error)}")
                    sound = False
        # nobody is timed beside one of ours that is wrong
        if not ready or not sound:
            return
        state: dict[str, str | float] = {}
        wall = torch.device("cpu") if case.wall else self.device
        times = measure(
            ready,
            seconds,
            wall,
            at_least=case.at_least,
            sample=lambda: state.update(clocks()),
        )
        others = {c.name for c in case.candidates if c.peer}
        peers = {name: us for name, us in times.items() if name in others}
        best = min(peers, key=peers.__getitem__, default=None)
        for name, us in times.items():
            us /= case.units
            least = self._least_us(case)
            row = Row(
                op=case.op,
                shape=case.shape,
                dtype=case.dtype,
                implementation=name,
                peer=name in others,
                us=us,
                tflops=case.flops and case.flops / us / 1e6,
                gbps=case.bytes and case.bytes / us / 1e3,
                limit_share=least and least / us,
                best_peer=best,
                ratio=peers[best] / case.units / us if best else None,
                limits=self.limits,
                verified=True,
                gpu=self.gpu,
                commit=self.commit,
                versions={**self.versions, **state},
            )
            self.rows.append(row)
            print(line(row), flush=True)
        self._write()

    def _verified(self, candidate: Candidate, wall: bool) -> Callable[[], object]:
        """Return what is to be timed, its output found right, eagerly and in the graph."""
        candidate.reset()
        out = candidate.run()
        _synchronize()
        candidate.check(out)
        if wall or self.device.type == "cpu":
            return candidate.run
        replay, out = capture(candidate.run, candidate.reset)
        candidate.reset()
        replay()
        torch.cuda.synchronize()
        candidate.check(out)
        return replay

    def _least_us(self, case: Case) -> float | None:
        """Return the time under which the measured limits do not let the case's work go."""
        bounds = [
            work / rate
            for work, rate in (
                (case.flops, self.limits["TFLOP/s"] * 1e6),
                (case.bytes, self.limits["GB/s"] * 1e3),
            )
            if work
        ]
        return max(bounds, default=None)

    def _measure_limits(self) -> dict[str, float]:
        """Measure a large copy, a bf16 product (random data) and a launch of next to nothing."""
        cuda, device = self.device.type == "cuda", self.device
        size = 1 << 23
        if cuda:
            # 2 GB, or an eighth of what is free
            size = min(1 << 31, torch.cuda.mem_get_info()[0] // 8)
        source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        # 8192 divides into whole tiles and waves enough; a CPU has no business with more than a
        # smoke test
        n, dtype = (8192, torch.bfloat16) if cuda else (256, torch.float32)
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        product = torch.empty_like(a)
        work: dict[str, Callable[[], object]] = {
            "copy": lambda: target.copy_(source),
            "product": lambda: torch.mm(a, b, out=product),
            "launch": lambda: target[:1].zero_(),
        }
        runs = {name: capture(run)[0] if cuda else run for name, run in work.items()}
        us = measure(runs, 1.0 if cuda else 0.01, device)
        limits = {
            "GB/s": 2 * size / us["copy"] / 1e3,
            "TFLOP/s": 2 * n**3 / us["product"] / 1e6,
            "us for a launch": us["launch"],
        }
        print(
            f"{self.name} on {self.gpu}, commit {self.commit}; limits measured now: "
            + ", ".join(f"{value:.4g} {unit}" for unit, value in limits.items()),
            flush=True,
        )
        return limits

    def _say_left_out(self, what: str, reason: str) -> None:
        entry = f"{what}: {reason}"
        # what no case has is said once
        if entry not in self.left_out:
            self.left_out.append(entry)
            print(f"left out: {entry}", flush=True)

    def _fail(self, what: str) -> None:
        self.failed.append(what)
        print(f"FAILED, no figure: {what}", flush=True)

    def _write(self) -> None:
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        rows = [row._asdict() for row in self.rows]
        _replace(self.out / f"{self.name}.json", json.dumps(rows, indent=1) + "\n")
        _replace(self.out / f"{self.name}.md", self._table())

    def _table(self) -> str:
        """Return the rows as a page to read."""
        limits = ", ".join(f"{value:.4g} {unit}" for unit, value in self.limits.items())
        versions = ", ".join(f"{name} {value}" for name, value in self.versions.items())
        text = [
            f"# {self.name} on {self.gpu}\n",
            f"Commit {self.commit}; {versions}. Limits measured in this run: {limits}.",
            "Ratio: time of the best peer / time of the row; above 1 the row is faster.\n",
            "| op | shape | dtype | implementation | us | TFLOP/s | GB/s | % of limit"
            " | best peer | ratio | SM MHz | W |",
            "|---|---|---|---|---:|---:|---:|---:|---|---:|---:|---:|",
        ]
        for row in self.rows:
            cells = [row.op, row.shape, row.dtype, row.implementation, *_figures(row)]
            cells += [_number(row.ratio, ".2f")]
            cells += [_number(row.versions.get(name), ".0f") for name in ("sm_mhz", "watts")]
            text.append("| " + " | ".join(cells) + " |")
        said = {
            "Peers": self.notes,
            "Left out": self.left_out,
            "Failed, no figure": self.failed,
        }
        for title, lines in said.items():
            if lines:
                text += [f"\n{title}:\n", *(f"- {entry}" for entry in lines)]
        return "\n".join(text) + "\n"


def line(row: Row) -> str:
    """Return a row for the terminal: `us | TFLOP/s | GB/s | % of limit | best peer`."""
    what = f"{row.op} {row.shape} {row.dtype} {row.implementation}"
    us, tflops, gbps, share, best = _figures(row)
    ratio = f" {row.ratio:.2f}x" if row.ratio is not None else ""
    return f"{what:<86} {us:>10} us | {tflops:>6} | {gbps:>6} | {share:>5} | {best}{ratio}"


def _figures(row: Row) -> list[str]:
    share = "-" if row.limit_share is None else f"{row.limit_share:.1%}"
    us = _number(row.us, ".2f" if row.us < 1000 else ".0f")
    tflops, gbps = _number(row.tflops, ".1f"), _number(row.gbps, ".0f")
    return [us, tflops, gbps, share, row.best_peer or "-"]


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _replace(path: Path, text: str) -> None:
    """Write aside and rename: whoever reads, reads a whole file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _sentence(error: Exception) -> str:
    """Return the first line of an error's message with its kind."""
    first = next(iter(str(error).strip().splitlines()), "")
    return (
        first if isinstance(error, AssertionError) and first else f"{type(error).__name__}: {first}"
    )


def main(name: str, plans: Callable[[Bench], Iterable[Plan]], arguments: Sequence[str]) -> int:
    """Run one benchmark from the command line; return its exit code (2: it cannot run as asked)."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/<gpu>)")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds (default 600)")
    given = parser.parse_args(arguments)
    out = given.out
    if out is None and given.device == "cuda" and torch.cuda.is_available():
        out = RESULTS / slug(torch.cuda.get_device_name())
    torch.manual_seed(0)
    if given.device == "cpu":
        # smoke cases are too small for more
        torch.set_num_threads(1)
    try:
        bench = Bench(name, given.device, out, quick=given.quick, budget=given.budget)
    except Unavailable as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    with torch.no_grad():
        return bench.run(plans(bench))
