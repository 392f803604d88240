"""What lies between the passes of speculative decoding, at LlamaGen-XL's size with guidance.

The peer is the same in eager PyTorch, captured in one CUDA graph: the reference. A step is all that
one needs with five levels of ten beams and 59 nodes, without the passes, the levels and the tree:
`draft_entries`, four times `beam_entries`, `tree_entries`, `commit_tree_`; a step that is skipped
selects a path, too. What a commit changes is put back before, by both. GB/s are of features, read
and written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Bench, Candidate, Case, Plan, main
from sdvg_kernels import (
    FrameLayout,
    TokenTree,
    TreeState,
    beam_entries,
    commit_tree_,
    draft_entries,
    implementations,
    path_similarity,
    select_path,
    tree_entries,
)

# a prompt of 120, one frame of 576 tokens
LAYOUT = FrameLayout(120, 576, 0, 0)


class Size(NamedTuple):
    """A batch with two rows a sequence; a tree; tokens that a skipped step has left behind."""

    batch: int
    width: int = 1280
    top_k: int = 10
    levels: int = 5
    nodes: int = 59
    chain: int = 0

    def __str__(self) -> str:
        return f"B={self.batch} D={self.width} K={self.top_k} N={self.nodes} chain={self.chain}"


class Step(NamedTuple):
    """What a step's ops take, made once."""

    state: TreeState
    # [3, R]: the state's `known`, `lengths` and `drafted`, and what they were
    places: Tensor
    before: Tensor
    tree: TokenTree
    skipping: Tensor
    tokens: Tensor
    scores: Tensor
    beams: Tensor
    features: Tensor
    mask: Tensor
    path: Tensor
    counts: Tensor
    drawn: Tensor
    # LlamaGen's are of 8 numbers
    codebook: Tensor
    out: Tensor
    chain: Tensor


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases: each op, and all of a step."""
    if bench.device.type == "cpu":
        sizes = [Size(2, 16, 3, 3, 12, 2)]
    else:
        sizes = [Size(1), Size(1, chain=5)]
        if not bench.quick:
            sizes += [Size(16), Size(16, chain=5)]
    for size in sizes:
        for name, run, features in (
            ("draft_entries", _drafted, 2 * _pairs(size)),
            ("beam_entries", _grown, 2 * size.top_k),
            ("tree_entries", _fed, 0),
            ("select_path, path_similarity", _selected, 0),
            ("commit_tree_", _committed, 2 * (size.chain + size.levels)),
            ("a step's entries and commit", _step, None),
        ):
            yield Plan(f"{name} {size}", partial(_case, bench, size, name, run, features))


def _pairs(size: Size) -> int:
    """Return the entries of the drafter's first pass."""
    return size.chain + size.levels + 2


def _make(bench: Bench, size: Size) -> Step:
    """Return a step in the middle of a frame, of which all but the last level are accepted."""
    rows, slots = 2 * size.batch, LAYOUT.prefix + LAYOUT.tokens
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    where = {"device": bench.device}
    integers = partial(torch.randint, **where)
    places = torch.full((3, rows), 400, dtype=torch.int32, **where)
    places[1] -= 1 + size.chain
    places[2] -= _pairs(size)
    state = TreeState(
        integers(0, 16384, (rows, slots + 1)),
        torch.randn(rows, slots + 1, size.width, **where).to(dtype),
        *places,
    )
    words = -(-(size.levels - 1) * size.top_k // 32)
    shape = (size.batch, size.top_k**2)
    parents = torch.tensor([-1, *range(size.levels - 1), *([0] * (size.nodes - size.levels))])
    kept = torch.arange(1, size.levels + 1, dtype=torch.int32, **where)
    entries = size.chain + size.nodes
    return Step(
        state,
        places,
        places.clone(),
        TokenTree.from_parents(integers(0, 16384, (size.batch, size.nodes)), parents),
        torch.zeros(size.batch, dtype=torch.bool, **where),
        integers(0, 16384, shape),
        -torch.rand(shape, **where),
        torch.rand(shape, **where).argsort(1)[:, : size.top_k].int().contiguous(),
        torch.randn(rows, size.top_k, size.width, **where).to(dtype),
        integers(0, 2**31 - 1, (rows, size.top_k, words)).int(),
        kept.expand(size.batch, -1).contiguous(),
        torch.full((size.batch,), size.levels, dtype=torch.int32, **where),
        integers(0, 16384, (size.batch,)),
        torch.nn.functional.normalize(torch.randn(16384, 8, **where), dim=1),
        torch.randn(rows, entries, size.width, **where).to(dtype),
        torch.full((rows,), size.chain, dtype=torch.int32, **where),
    )


def _drafted(size: Size, step: Step, how: str) -> Sequence[Tensor]:
    return draft_entries(step.state, LAYOUT, _pairs(size), implementation=how)


def _grown(size: Size, step: Step, how: str, level: int = 1) -> Sequence[Tensor]:
    return beam_entries(
        step.state.known, step.tokens, step.scores, step.beams, step.features, step.mask,
        level=level, words=step.mask.shape[2], implementation=how,
    )  # fmt: skip


def _fed(size: Size, step: Step, how: str) -> Sequence[Tensor]:
    return tree_entries(
        step.state, LAYOUT, step.tree, step.skipping, size.chain, implementation=how
    )


def _selected(size: Size, step: Step, how: str) -> Sequence[Tensor]:
    keys = dict.fromkeys(("seeds", "sequences"), step.drawn)
    positions = step.places[0, : size.batch]
    return [
        *select_path(
            step.tree, ~step.skipping, size.levels, **keys, positions=positions, implementation=how
        ),
        path_similarity(step.tree, step.codebook, stride=2, implementation=how),
    ]


def _committed(size: Size, step: Step, how: str) -> Sequence[Tensor]:
    step.places.copy_(step.before)
    moves = commit_tree_(
        step.state, LAYOUT, step.tree.tokens, step.path, step.counts, drawn=step.drawn,
        chain=step.chain, out=step.out, implementation=how,
    )  # fmt: skip
    ids, features, *places = step.state
    return [moves, *places, ids[:, :-1], features[:, :-1]]


def _step(size: Size, step: Step, how: str) -> Sequence[Tensor]:
    step.places.copy_(step.before)
    found = list(_drafted(size, step, how))
    for level in range(size.levels - 1):
        found += _grown(size, step, how, level)
    return [*found, *_fed(size, step, how), *_committed(size, step, how)]


def _case(
    bench: Bench,
    size: Size,
    name: str,
    run: Callable[[Size, Step, str], Sequence[Tensor]],
    features: int | None,
) -> Case:
    step = _make(bench, size)
    expected = [part.clone() for part in run(size, step, "reference")]

    def check(out: object) -> None:
        for got, want in zip(out, expected, strict=True):
            if got.dtype == torch.float32 and name.startswith("select_path"):
                assert (got - want).abs().max() < 1e-5, "another similarity"
            else:
                assert torch.equal(got, want), "not the reference's"

    on_cpu = bench.device.type == "cpu"
    available = implementations()["tree_step"]
    names = ["reference"] if on_cpu else [how for how, reason in available.items() if not reason]
    moved = None if not features else features * 2 * size.batch * size.width
    return Case(
        op=name,
        shape=str(size),
        dtype=str(step.out.dtype).removeprefix("torch."),
        candidates=[
            Candidate(how, partial(run, size, step, how), check, how == "reference" and not on_cpu)
            for how in names
        ],
        bytes=None if moved is None else moved * step.out.element_size(),
        left_out={} if on_cpu else {how: reason for how, reason in available.items() if reason},
    )


if __name__ == "__main__":
    sys.exit(main("bench_tree_step", plans, sys.argv[1:]))
