"""`rms_norm_silu` at the sizes of Wan's decoder, against diffusers' chain and torch's own norm.

All work on channels-last rows and write into a new tensor. GB/s are of the rows that the op must
read and write: x and the output, and where it adds before the norm the residual and the sum too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.harness import Bench, Candidate, Case, Plan, main
from sdvg_kernels import implementations, rms_norm_silu
from sdvg_kernels.testing import assert_within_budget

# rows of a large case that are checked: every 997th
STEP = 997


class Size(NamedTuple):
    """A decoded block at one stage, in pixels."""

    channels: int
    frames: int
    height: int
    width: int

    @property
    def rows(self) -> int:
        """Pixels of the block."""
        return self.frames * self.height * self.width

    def __str__(self) -> str:
        return f"N={self.rows} C={self.channels}"


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases."""
    if bench.device.type == "cpu":
        sizes = [Size(96, 2, 6, 8)]
    else:
        sizes = [Size(96, 12, 480, 832), Size(192, 12, 240, 416), Size(384, 6, 120, 208)]
        if not bench.quick:
            # Wan 2.2
            sizes += [Size(256, 12, 240, 416), Size(1024, 6, 60, 104)]
    for size in sizes:
        yield Plan(f"rms_norm_silu {size}", partial(_norm, bench, size))
        yield Plan(f"rms_norm_silu of a sum {size}", partial(_sum, bench, size))


class _Rows:
    """What a call gets."""

    def __init__(self, bench: Bench, size: Size) -> None:
        dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
        shape, like = (1, size.rows, size.channels), {"dtype": dtype, "device": bench.device}
        self.x, self.residual = (torch.randn(shape, **like) for _ in range(2))
        self.weight, self.bias = (torch.randn(size.channels, **like) for _ in range(2))
        self.root = size.channels**0.5

    def seen(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows that are checked."""
        return rows[:, ::STEP] if rows.shape[1] > 100 * STEP else rows


def _norm(bench: Bench, size: Size) -> Case:
    rows = _Rows(bench, size)
    x = rows.seen(rows.x)
    exact = rms_norm_silu(x.double(), rows.weight.double(), implementation="reference")
    plain = _by_normalize(x, rows)

    def check(out: object) -> None:
        assert_within_budget(rows.seen(out), plain, exact)

    def run(name: str) -> torch.Tensor:
        return rms_norm_silu(rows.x, rows.weight, implementation=name)

    chains = {
        "diffusers' chain": lambda: _by_normalize(rows.x, rows),
        "rms_norm, silu": lambda: _by_rms_norm(rows.x, rows),
    }
    return _case(bench, "rms_norm_silu", size, rows, run, chains, check, 2)


def _sum(bench: Bench, size: Size) -> Case:
    rows = _Rows(bench, size)
    parts = tuple(rows.seen(part).double() for part in (rows.x, rows.residual))
    exact = parts[0] + rows.bias.double() + parts[1]
    plain = (exact.float()).to(rows.x.dtype)
    total = torch.empty_like(rows.x)

    def check(out: object) -> None:
        summed, normed = (rows.seen(part) for part in out)
        # eager rounds after each of the two additions
        assert_within_budget(summed, plain * (1 + torch.finfo(plain.dtype).eps), exact, "sum")
        # of the sum as this candidate rounded it
        wide = rms_norm_silu(summed.double(), rows.weight.double(), implementation="reference")
        assert_within_budget(normed, _by_normalize(summed, rows), wide, "norm")

    def run(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        added = {"bias": rows.bias, "residual": rows.residual, "total": total}
        return total, rms_norm_silu(rows.x, rows.weight, **added, implementation=name)

    def chain(
        norm: Callable[[torch.Tensor, _Rows], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        summed = rows.x + rows.bias + rows.residual
        return summed, norm(summed, rows)

    chains = {
        "diffusers' chain": partial(chain, _by_normalize),
        "rms_norm, silu": partial(chain, _by_rms_norm),
    }
    return _case(bench, "rms_norm_silu of a sum", size, rows, run, chains, check, 4)


def _by_normalize(x: torch.Tensor, rows: _Rows) -> torch.Tensor:
    """Return what diffusers' `WanRMS_norm` and SiLU do, rounding as they round."""
    normed = F.normalize(x.float(), dim=-1).to(x.dtype)
    return F.silu(normed * rows.root * rows.weight)


def _by_rms_norm(x: torch.Tensor, rows: _Rows) -> torch.Tensor:
    return F.silu(F.rms_norm(x, x.shape[2:], rows.weight, 1e-12))


def _case(
    bench: Bench,
    op: str,
    size: Size,
    rows: _Rows,
    run: Callable[[str], object],
    chains: dict[str, Callable[[], object]],
    check: Callable[[object], None],
    passes: int,
) -> Case:
    """Return the case with ours for the device; on a GPU the reference is a peer."""
    available = implementations()["norm_silu"]
    on_cpu = bench.device.type == "cpu"
    names = ["reference"] if on_cpu else [name for name, reason in available.items() if not reason]
    candidates = [
        Candidate(name, partial(run, name), check, peer=name == "reference" and not on_cpu)
        for name in names
    ]
    candidates += [Candidate(name, chain, check, peer=True) for name, chain in chains.items()]
    if not on_cpu:
        torch._dynamo.reset()
        compiled = torch.compile(chains["rms_norm, silu"], dynamic=False)
        candidates.append(Candidate("rms_norm, silu, compiled", compiled, check, peer=True))
    return Case(
        op=op,
        shape=str(size),
        dtype=str(rows.x.dtype).removeprefix("torch."),
        candidates=candidates,
        bytes=passes * rows.x.numel() * rows.x.dtype.itemsize,
        left_out={} if on_cpu else {name: reason for name, reason in available.items() if reason},
    )


if __name__ == "__main__":
    sys.exit(main("bench_norm_silu", plans, sys.argv[1:]))
