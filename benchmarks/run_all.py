"""Run all benchmarks, each in its own process: `python -m benchmarks.run_all [--part P] [--quick]`.

A benchmark that fails, crashes the driver's context or hangs takes no other with it; what it had
measured is already written. The exit code is 1 if any of them failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import ROOT

# of token models; all others are of video models. A part ends within ten minutes
TOKENS = (
    "diagonal", "masked", "sampling", "speculate", "tokens", "tree", "tree_attention", "tree_step",
    "verify",
)  # fmt: skip
PARTS = ("video", "tokens")
# seconds after which a benchmark begins no further case; a part's, with the starts of its
# processes, 10 s each, and last cases, are ten minutes
BUDGETS = {
    "bench_attention": 80.0, "bench_attention_backward": 60.0, "bench_cache": 30.0,
    "bench_loop": 45.0, "bench_speculate": 40.0, "bench_tokens": 25.0, "bench_vae": 40.0,
}  # fmt: skip
# ... of those that are not named
BUDGET = 15.0
# what a last case may take beyond the budget before the process is ended
GRACE = 60.0


def budgets(*parts: str) -> dict[str, float]:
    """Return each benchmark (a file bench_*.py in this folder) of the parts, and its seconds."""
    found = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    return {
        name: BUDGETS.get(name, BUDGET)
        for name in found
        if PARTS[name.removeprefix("bench_") in TOKENS] in (parts or PARTS)
    }


def run(name: str, arguments: Sequence[str], limit: float) -> int:
    """Run one benchmark; return its exit code, or 124 when it was ended after `limit` seconds."""
    path = os.pathsep.join(
        [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-u", "-m", f"benchmarks.{name}", *arguments]
    try:
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(command, timeout=limit, env=environment, cwd=ROOT).returncode
    except subprocess.TimeoutExpired:
        return 124


def main(arguments: Sequence[str]) -> int:
    """Run all benchmarks and say how each ended; return 0, or 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/<gpu>)")
    parser.add_argument("--part", choices=PARTS, action="append", default=[], help="default: all")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    given = parser.parse_args(arguments)
    passed = ["--device", given.device] + (["--quick"] if given.quick else [])
    if given.out is not None:
        passed += ["--out", str(given.out)]

    ends: dict[str, int] = {}
    for name, budget in budgets(*given.part).items():
        began = time.monotonic()
        print(f"== {name}", flush=True)
        ends[name] = run(name, [*passed, "--budget", str(budget)], budget + GRACE)
        print(f"== {name} took {time.monotonic() - began:.0f} s", flush=True)
    words = {0: "all figures verified", 2: "cannot run here", 124: "ended, it took too long"}
    for name, code in ends.items():
        print(f"{name}: {words.get(code, f'failed with exit code {code}')}", flush=True)
    return 1 if any(ends.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
