"""`diagonal_attention` and `diagonal_mask` at the passes of MineWorld, Cosmos and LlamaGen.

One layer's attention in the middle of the last frame. GB/s are of what must be read, the K/V of the
slots that some entry sees, once, and of query and output: 100% of the measured copy is the time to
read the visible cache once. The peers are torch's attention with the dense mask, over the slots up
to the newest one and, as the released loops do it, over the whole cache; the mask is made outside
of the timed region.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.harness import Bench, Candidate, Case, Plan, main
from sdvg_kernels import (
    DiagonalSchedule,
    diagonal_attention,
    diagonal_mask,
    diagonal_schedule,
    implementations,
)
from sdvg_kernels.testing import assert_within_budget


class Size(NamedTuple):
    """A model's layer, its grid, and how it is decoded."""

    name: str
    heads: int
    heads_cached: int
    dim: int
    frames: int
    height: int
    width: int
    k: int
    mode: str = "spatial"
    prefix: int = 1
    extra: int = 0
    batch: int = 1

    def schedule(self, device: torch.device) -> DiagonalSchedule:
        """Return the passes."""
        sizes = (self.frames, self.height, self.width, self.k)
        layout = {"prefix": self.prefix, "extra": self.extra, "device": device}
        return diagonal_schedule(*sizes, self.mode, "newest", **layout)

    def __str__(self) -> str:
        text = f"{self.name} {self.mode} k={self.k} B={self.batch} H={self.heads}"
        return f"{text} Hk={self.heads_cached} D={self.dim}"


# 15 frames after one of context; three latent frames after two; an image
_MINEWORLD = Size("MineWorld-300M", 16, 4, 64, 15, 14, 24, 2, prefix=347, extra=11)
_COSMOS = Size("Cosmos-4B", 32, 8, 128, 3, 40, 64, 2, prefix=5120)
_LLAMAGEN = Size("LlamaGen-3B", 32, 32, 100, 1, 24, 24, 2, prefix=120, batch=2)
_SMALL = Size("tiny", 4, 2, 64, 2, 4, 6, 2, prefix=9, extra=1, batch=2)


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases."""
    if bench.device.type == "cpu":
        sizes = [_SMALL, _SMALL._replace(mode="spatiotemporal", dim=100)]
    else:
        sizes = [_MINEWORLD, _COSMOS, _LLAMAGEN]
        sizes += [size._replace(mode="spatiotemporal", k=1) for size in sizes[:2]]
        if not bench.quick:
            # raster decoding, and four sequences
            sizes += [size._replace(k=size.width) for size in sizes[:3]]
            sizes += [size._replace(batch=4) for size in sizes[:2]]
    for size in sizes:
        yield Plan(f"diagonal_attention {size}", partial(_attention, bench, size))
    yield Plan(f"diagonal_mask {sizes[0]}", partial(_mask, bench, sizes[0]))


def _pass(size: Size, device: torch.device) -> tuple[DiagonalSchedule, torch.Tensor, torch.Tensor]:
    """Return the schedule, and slots and steps [B, T] of a pass in the middle of the last frame."""
    made = size.schedule(device)
    at = (made.frame_starts[-1] + made.frame_ends[-1]) // 2
    slots, steps = (
        table[at, : made.buckets[at]].expand(size.batch, -1) for table in (made.slots, made.steps)
    )
    return made, slots, steps


def _dense(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor
) -> torch.Tensor:
    """Return torch's attention with a mask [B, T, S]."""
    tensors = (tensor.transpose(1, 2) for tensor in (query, k, v))
    out = F.scaled_dot_product_attention(*tensors, attn_mask=sees[:, None], enable_gqa=True)
    return out.transpose(1, 2)


def _attention(bench: Bench, size: Size) -> Case:
    device = bench.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    made, slots, steps = _pass(size, device)
    query, k, v = (
        torch.randn(size.batch, length, heads, size.dim, dtype=dtype, device=device)
        for length, heads in (
            (slots.shape[1], size.heads),
            (made.size, size.heads_cached),
            (made.size, size.heads_cached),
        )
    )
    sees = diagonal_mask(slots, steps, made.grid, made.size, implementation="reference")
    fed = slots[0] >= 0
    plain, exact = (
        _dense(*(tensor.to(kind) for tensor in (query, k, v)), sees)[:, fed]
        for kind in (dtype, torch.float64)
    )

    def check(out: object) -> None:
        # what padding gives is the op's own: torch's mask of nothing may be NaN
        assert_within_budget(out[:, fed], plain, exact)

    names, left_out = _who(bench)
    ours = [
        Candidate(
            name,
            partial(diagonal_attention, query, k, v, slots, steps, made.grid, implementation=name),
            check,
        )
        for name in names
    ]
    used = int(slots.max()) + 1
    near = (query, k[:, :used], v[:, :used], sees[..., :used].contiguous())
    peers = [
        Candidate("sdpa, mask, slots so far", partial(_dense, *near), check, peer=True),
        Candidate("sdpa, mask, whole cache", partial(_dense, query, k, v, sees), check, peer=True),
    ]
    seen = int(sees.any(1).sum())
    rows = size.batch * int(fed.sum())
    values = 2 * seen * size.heads_cached + 2 * rows * size.heads
    return Case(
        op="diagonal_attention",
        shape=f"{size} T={int(fed.sum())} S={made.size} seen={seen // size.batch}",
        dtype=str(dtype).removeprefix("torch."),
        candidates=[*ours, *peers],
        flops=4 * int(sees.sum()) * size.heads * size.dim,
        bytes=values * size.dim * dtype.itemsize,
        left_out=left_out,
    )


def _mask(bench: Bench, size: Size) -> Case:
    made, slots, steps = _pass(size, bench.device)
    expected = diagonal_mask(slots, steps, made.grid, made.size, implementation="reference")

    def check(out: object) -> None:
        assert torch.equal(out, expected), "not the reference's mask"

    names, left_out = _who(bench)
    run = partial(diagonal_mask, slots, steps, made.grid, made.size)
    ours = [Candidate(name, partial(run, implementation=name), check) for name in names]
    if bench.device.type != "cpu":
        eager = partial(run, implementation="reference")
        ours.append(Candidate("eager", eager, check, peer=True))
    return Case(
        op="diagonal_mask",
        shape=f"{size} T={slots.shape[1]} S={made.size}",
        dtype="bool",
        candidates=ours,
        bytes=expected.numel(),
        left_out=left_out,
    )


def _who(bench: Bench) -> tuple[list[str], dict[str, str]]:
    """Return our implementations here, and why others are left out."""
    if bench.device.type == "cpu":
        return ["reference"], {}
    available = implementations()["diagonal"]
    return ["triton"], {"triton": available["triton"]} if available["triton"] else {}


if __name__ == "__main__":
    sys.exit(main("bench_diagonal", plans, sys.argv[1:]))
