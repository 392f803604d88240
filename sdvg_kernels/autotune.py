"""Measures the launch choices of the Triton ops on this GPU, and writes the best ones down.

    python -m sdvg_kernels.autotune [--op attention] [--out tuned.json]

An op takes part with `candidates` in its config.py, a choice through `_tuned.choose`, and a
function in `WORKLOADS` here. Every candidate runs every workload of its key; one that does not
compile, or whose output is not what the reference gives, is left out. Another launch replaces the
default where it is at least 2% faster, by the geometric mean over the workloads. The default place
is where `_tuned.py` looks; a file elsewhere is named by SDVG_TUNED.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from sdvg_kernels import (
    _tuned,
    block_causal_attention,
    gated_residual_layer_norm,
    norm_rope,
    rope_table,
)
from sdvg_kernels.testing import assert_within_budget

# less is noise
_GAIN = 0.98


class Workload(NamedTuple):
    """One shape of one choice: how to run it with the launch in force, and what it must give."""

    op: str
    key: str
    shape: str
    candidates: tuple[object, ...]
    run: Callable[[], object]
    check: Callable[[object], None]


class Choice(NamedTuple):
    """The best launch of a key, and its time as a share of the default's."""

    launch: object
    share: float


# GPU -> workloads of one op, those of one key behind each other
WORKLOADS: dict[str, Callable[[torch.device], Iterator[Workload]]] = {}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write; return the exit code, 1 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m sdvg_kernels.autotune", description=__doc__)
    parser.add_argument("--op", choices=sorted(WORKLOADS), action="append", help="default: all")
    parser.add_argument("--out", type=Path, help="default: where sdvg_kernels looks")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("autotune: it must run on a CUDA GPU, got none that torch finds", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = str(_tuned.gpu_name(device))
    path = options.out or _tuned.path_of(gpu)
    # what an older file says is no default
    os.environ["SDVG_TUNED"] = "off"
    _tuned.forget()
    chosen = {
        op: tune(WORKLOADS[op](device), milliseconds) for op in options.op or sorted(WORKLOADS)
    }
    write(path, gpu, chosen)
    print(f"written to {path}")
    return 0


def tune(
    workloads: Iterator[Workload], timer: Callable[[Callable[[], object]], float]
) -> dict[str, Choice]:
    """Return the choice of each key; `timer` gives a call's time, in any unit."""
    # (key, index of the candidate) -> shares of the default's time; None: it failed
    shares: dict[str, list[list[float] | None]] = {}
    launches: dict[str, tuple[object, ...]] = {}
    for work in workloads:
        launches[work.key] = work.candidates
        mine = shares.setdefault(work.key, [[] for _ in work.candidates])
        default = math.nan
        for i, launch in enumerate(work.candidates):
            row = mine[i]
            if row is None:
                continue
            try:
                with _tuned.force(work.op, work.key, launch):
                    work.check(work.run())
                    time = timer(work.run)
            # a launch that does not fit raises what the compiler or the driver likes
            except Exception as error:
                if i == 0:
                    raise
                mine[i] = None
                print(f"{work.op} {work.key}: {_tuned.numbers(launch)} left out: {error}")
                continue
            default = time if i == 0 else default
            row.append(time / default)
    chosen = {}
    for key, rows in shares.items():
        means = [math.inf if row is None else _mean(row) for row in rows]
        best = min(range(len(means)), key=means.__getitem__)
        best = best if means[best] < _GAIN else 0
        chosen[key] = Choice(launches[key][best], means[best])
        print(f"{key:24} {means[best]:6.3f} of the default's time: {launches[key][best]}")
    return chosen


def _mean(shares: list[float]) -> float:
    return math.exp(sum(map(math.log, shares)) / len(shares))


def milliseconds(run: Callable[[], object]) -> float:
    """Return the median time of a call on the GPU, from a graph, L2 flushed before each."""
    from triton.testing import do_bench

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return float(do_bench(graph.replay, warmup=10, rep=50, return_mode="median"))


def write(path: Path, gpu: str, chosen: dict[str, dict[str, Choice]]) -> None:
    """Write the file as a whole; the choices of ops that it holds already, and still fit, stay."""
    table = _tuned.stamp(gpu)
    choices: dict[str, object] = {}
    if path.exists():
        old = json.loads(path.read_text())
        if all(old.get(name) == value for name, value in table.items()):
            choices = old["choices"]
    for op, keys in chosen.items():
        choices[op] = {
            key: {"launch": _tuned.numbers(choice.launch), "share": round(choice.share, 4)}
            for key, choice in keys.items()
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(table | {"choices": choices}, indent=1) + "\n")
    os.replace(partial, path)
    _tuned.forget()


# --- the ops' workloads ---


def _attention(device: torch.device) -> Iterator[Workload]:
    """Yield streaming video and diagonal decoding: (T, S, H, D) by key."""
    from sdvg_kernels.attention import config

    arch = {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)
    shapes: dict[tuple[int, int | None], list[tuple[int, int, int]]] = {
        (dim, most): [(rows, 16384, heads) for rows in tokens for heads in (12, 40)]
        for dim in (128, 64)
        for most, tokens in ((16, (1, 16)), (64, (64,)))
    }
    shapes[128, None] = [(1560, 9360, 12), (4680, 9360, 12), (4680, 32760, 12)]
    for (dim, most), cases in shapes.items():
        for rows, slots, heads in cases:
            yield _attend(
                device,
                (rows, slots, heads, dim),
                config.key(dim, False, most),
                config.candidates(arch, dim, False, most),
            )


def _attend(
    device: torch.device,
    shape: tuple[int, int, int, int],
    key: str,
    candidates: tuple[object, ...],
) -> Workload:
    rows, slots, heads, dim = shape
    random = torch.Generator(device).manual_seed(0)

    def tensor(tokens: int) -> torch.Tensor:
        made = torch.randn(1, tokens, heads, dim, generator=random, device=device)
        return made.to(torch.bfloat16)

    inputs = [tensor(rows), tensor(slots), tensor(slots)]
    lengths = torch.full((1,), slots, dtype=torch.int32, device=device)

    def run(implementation: str = "triton", dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        wide = [tensor.to(dtype) for tensor in inputs]
        return block_causal_attention(*wide, lengths, implementation=implementation)

    shape_text = f"T={rows} S={slots} H={heads} D={dim}"
    return _verified("attention", key, shape_text, candidates, run)


def _modulation(
    device: torch.device, tokens: int = 4680, widths: tuple[int, ...] = (1536, 3072, 5120)
) -> Iterator[Workload]:
    """Yield the fused op on a block of three frames at the widths of Wan."""
    from sdvg_kernels.modulation import config

    random = torch.Generator(device).manual_seed(0)
    for width in widths:
        x, y = (torch.randn(1, tokens, width, generator=random, device=device) for _ in range(2))
        rows = [torch.randn(1, 3, width, generator=random, device=device) for _ in range(3)]

        def run(
            implementation: str = "triton",
            dtype: torch.dtype = torch.bfloat16,
            inputs: tuple[torch.Tensor, ...] = (x.bfloat16(), y.bfloat16(), *rows),
        ) -> tuple[torch.Tensor, torch.Tensor]:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            x, y = (tensor.to(dtype) for tensor in inputs[:2])
            vectors = (tensor.to(wide) for tensor in inputs[2:])
            return gated_residual_layer_norm(x, y, *vectors, implementation=implementation)

        most = next(most for most, _ in config.LAUNCHES if width <= most)
        key, found = config.key(most), config.candidates(most)
        yield _verified("modulation", key, f"T={tokens} F=3 C={width}", found, run)


def _rope(
    device: torch.device,
    grid: tuple[int, int, int] = (3, 30, 52),
    all_heads: tuple[int, ...] = (12, 24, 40),
) -> Iterator[Workload]:
    """Yield a block of three frames at the widths of Wan."""
    from sdvg_kernels.rope import config

    random = torch.Generator(device).manual_seed(0)
    tables = {
        dtype: rope_table(1024, 128, dtype=dtype, device=device)
        for dtype in (torch.float32, torch.float64)
    }
    for heads in all_heads:
        shape = (1, math.prod(grid), heads, 128)
        query, key = (
            torch.randn(shape, generator=random, device=device).bfloat16() for _ in range(2)
        )
        weights = [torch.rand(heads * 128, generator=random, device=device) for _ in range(2)]

        def run(
            implementation: str = "triton",
            dtype: torch.dtype = torch.bfloat16,
            inputs: tuple[torch.Tensor, ...] = (query, key, *weights),
        ) -> tuple[torch.Tensor, torch.Tensor]:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            query, key = (tensor.to(dtype) for tensor in inputs[:2])
            return norm_rope(
                query,
                key,
                tables[wide],
                grid,
                query_weight=inputs[2].to(wide),
                key_weight=inputs[3].to(wide),
                implementation=implementation,
            )

        channels = 128 << (heads - 1).bit_length()
        most = next(most for most, _ in config.LAUNCHES[128] if most is None or channels <= most)
        found = config.candidates(128, most)
        yield _verified("rope", config.key(128, most), f"T={shape[1]} H={heads} D=128", found, run)


def _verified(
    op: str,
    key: str,
    shape: str,
    candidates: tuple[object, ...],
    run: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
) -> Workload:
    """Return the workload that `run()` is, held to `run("reference")` and the same in float64."""
    plain, exact = run("reference"), run("reference", torch.float64)

    def check(out: object) -> None:
        found = [x if isinstance(x, tuple) else (x,) for x in (out, plain, exact)]
        for one, same, true in zip(*found, strict=True):
            assert_within_budget(one, same, true)

    return Workload(op, key, shape, candidates, run, check)


WORKLOADS |= {"attention": _attention, "modulation": _modulation, "rope": _rope}


if __name__ == "__main__":
    sys.exit(main())
