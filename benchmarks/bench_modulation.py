"""The modulation ops at the sizes of Wan 1.3B, 5B and 14B, against the eager chains of pipelines.

The chains compute in float32 between casts, op by op, with the modulation given for each frame
(Self-Forcing) or expanded to each token (diffusers); the first also compiled. All of them add the
block's table. GB/s are of the token rows that the op must read and write.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.harness import Bench, Candidate, Case, Plan, main
from benchmarks.peers import eager_norm, eager_residual
from sdvg_kernels import (
    gated_residual,
    gated_residual_layer_norm,
    implementations,
    modulated_layer_norm,
)
from sdvg_kernels.testing import assert_within_budget


class Size(NamedTuple):
    """A model's block of tokens."""

    name: str
    channels: int
    frames: int = 3
    frame: int = 1560
    batch: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of the block."""
        return self.frames * self.frame

    def __str__(self) -> str:
        return f"{self.name} B={self.batch} T={self.tokens} F={self.frames} C={self.channels}"


class Block:
    """The rows of one block, and its modulation: the timestep's [B, F, 6, C], a table [6, C]."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size = size
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        shape = (size.batch, size.tokens, size.channels)
        self.x, self.y = (torch.randn(shape, dtype=self.dtype, device=device) for _ in range(2))
        rows = torch.randn(size.batch, size.frames, 6, size.channels, device=device)
        table = torch.randn(6, size.channels, device=device)
        # (shift, scale, gate): rows and table
        self.frames = [(rows[:, :, i], table[i]) for i in range(3)]
        expanded = rows.repeat_interleave(size.frame, 1)
        self.per_token = [(expanded[:, :, i], table[i]) for i in range(3)]


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases."""
    if bench.device.type == "cpu":
        sizes = [Size("tiny", 128, frames=2, frame=3)]
    else:
        sizes = [Size("1.3B", 1536), Size("14B", 5120), Size("5B", 3072)]
        if not bench.quick:
            sizes += [Size("1.3B", 1536, frames=1), Size("14B", 5120, batch=2)]
    for size in sizes:
        for op in (_norm, _residual, _both):
            yield Plan(f"{op.__name__.strip('_')} {size}", partial(op, bench, size))


def _norm(bench: Bench, size: Size) -> Case:
    block = Block(size, bench.device)
    exact = modulated_layer_norm(
        block.x.double(), *_double(block.frames[:2]), implementation="reference"
    )

    def chain(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        return eager_norm(block.x, *(rows + table for rows, table in pairs[:2]))

    plain = chain(block.frames)

    def run(name: str) -> torch.Tensor:
        return modulated_layer_norm(block.x, *block.frames[:2], implementation=name)

    def check(out: object) -> None:
        assert_within_budget(out, plain, exact)

    return _case(bench, "modulated_layer_norm", block, run, chain, check, 2)


def _residual(bench: Bench, size: Size) -> Case:
    block = Block(size, bench.device)
    (gate,) = _double(block.frames[2:])
    exact = gated_residual(block.x.double(), block.y.double(), gate, implementation="reference")

    def chain(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        return eager_residual(block.x, block.y, pairs[2][0] + pairs[2][1])

    plain = chain(block.frames)

    def run(name: str) -> torch.Tensor:
        return gated_residual(block.x, block.y, block.frames[2], implementation=name)

    def check(out: object) -> None:
        assert_within_budget(out, plain, exact)

    return _case(bench, "gated_residual", block, run, chain, check, 3)


def _both(bench: Bench, size: Size) -> Case:
    block = Block(size, bench.device)
    shift, scale, gate = block.frames
    doubled = _double(block.frames)
    exact = gated_residual(
        block.x.double(), block.y.double(), doubled[2], implementation="reference"
    )

    def chain(
        pairs: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [rows + table for rows, table in pairs]
        residual = eager_residual(block.x, block.y, rows[2])
        return residual, eager_norm(residual, *rows[:2])

    plain, _ = chain(block.frames)

    def run(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return gated_residual_layer_norm(block.x, block.y, gate, shift, scale, implementation=name)

    def check(out: object) -> None:
        residual, normed = out
        assert_within_budget(residual, plain, exact, "residual")
        # of the residual as this candidate rounded it
        rows = [rows + table for rows, table in block.frames[:2]]
        exact_norm = modulated_layer_norm(
            residual.double(), *doubled[:2], implementation="reference"
        )
        assert_within_budget(normed, eager_norm(residual, *rows), exact_norm, "norm")

    return _case(bench, "gated_residual_layer_norm", block, run, chain, check, 4)


def _double(
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(rows.double(), table.double()) for rows, table in pairs]


def _case(
    bench: Bench,
    op: str,
    block: Block,
    run: Callable[[str], object],
    chain: Callable[[list[tuple[torch.Tensor, torch.Tensor]]], object],
    check: Callable[[object], None],
    passes: int,
) -> Case:
    """Return the case with ours for the device; on a GPU the reference is a peer."""
    available = implementations()["modulation"]
    on_cpu = bench.device.type == "cpu"
    names = ["reference"] if on_cpu else [name for name, reason in available.items() if not reason]
    ours = [
        Candidate(name, partial(run, name), check, peer=name == "reference" and not on_cpu)
        for name in names
    ]

    def by_frame() -> object:
        return chain(block.frames)

    peers = [
        Candidate("eager, by frame", by_frame, check, peer=True),
        Candidate("eager, by token", partial(chain, block.per_token), check, peer=True),
    ]
    if not on_cpu:
        torch._dynamo.reset()
        compiled = torch.compile(by_frame, dynamic=False)
        peers.append(Candidate("compiled, by frame", compiled, check, peer=True))
    return Case(
        op=op,
        shape=str(block.size),
        dtype=str(block.dtype).removeprefix("torch."),
        candidates=[*ours, *peers],
        bytes=passes * block.x.numel() * block.dtype.itemsize,
        left_out={} if on_cpu else {name: reason for name, reason in available.items() if reason},
    )


if __name__ == "__main__":
    sys.exit(main("bench_modulation", plans, sys.argv[1:]))
