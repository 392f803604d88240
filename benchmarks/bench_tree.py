"""`expand_tree` and `build_tree` at the sizes of LlamaGen's drafter, against PyTorch's own ops.

The peer is EAGLE-2's drafting in eager PyTorch without its reads on the host: `log_softmax` and
`topk` for a level, `topk`, `sort` and `searchsorted` for the tree, its mask by a gather a level,
captured in one CUDA graph. Of equal candidates it takes any, so that its output is checked by its
scores. The draft of a tree is all levels and the tree, without the drafter's passes between them.
GB/s are of the logits, once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Bench, Candidate, Case, Plan, main
from sdvg_kernels import build_tree, expand_tree, implementations


class Size(NamedTuple):
    """How a tree is drafted: sequences, tokens of the vocabulary, beams of a level, nodes."""

    batch: int
    vocabulary: int = 16384
    top_k: int = 10
    levels: int = 5
    nodes: int = 59
    guidance: float = 7.5

    def __str__(self) -> str:
        return f"B={self.batch} V={self.vocabulary} K={self.top_k} guidance={self.guidance:g}"


# one level's candidates: tokens, scores and parents
Level = tuple[Tensor, Tensor, Tensor]
Expand = Callable[..., tuple[Tensor, Tensor, Tensor]]


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases: a level, the tree of all levels, and both."""
    if bench.device.type == "cpu":
        sizes = [Size(2, vocabulary=300, top_k=3, levels=3, nodes=12, guidance=2.0)]
    else:
        sizes = [Size(1), Size(16)]
        if not bench.quick:
            sizes += [Size(1, vocabulary=65536, guidance=3.0)]
    for size in sizes:
        yield Plan(f"expand_tree {size}", partial(_level, bench, size))
        yield Plan(f"build_tree {size}", partial(_tree, bench, size))
        yield Plan(f"draft of a tree {size}", partial(_draft, bench, size))


def _logits(bench: Bench, size: Size, beams: int) -> tuple[Tensor, Tensor]:
    """Return logits with and without the condition, near each other as a model's are."""
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    shape = (size.batch, beams, size.vocabulary)
    uncond = 2 * torch.randn(shape, device=bench.device)
    logits = uncond + 0.5 * torch.randn(shape, device=bench.device)
    return logits.to(dtype), uncond.to(dtype)


def _close(got: Tensor, want: Tensor) -> None:
    error = (got.double() - want.double()).abs().max().item()
    assert error < 1e-4, f"a score is {error:.3g} off"


def _case(
    bench: Bench,
    op: str,
    shape: str,
    ours: Callable[[str], object],
    check: Callable[[object], None],
    peer: Candidate,
    logits: list[tuple[Tensor, Tensor]],
) -> Case:
    """Return the case of all implementations, the reference as a peer on a GPU, and eager."""
    on_cpu = bench.device.type == "cpu"
    # a tree is made of float32 scores
    dtype = logits[0][0].dtype if logits else torch.float32
    available = implementations()["tree"]
    names = ["reference"] if on_cpu else [name for name, reason in available.items() if not reason]
    return Case(
        op=op,
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        candidates=[
            *(
                Candidate(name, partial(ours, name), check, name == "reference" and not on_cpu)
                for name in names
            ),
            peer,
        ],
        bytes=sum(x.numel() * x.element_size() for pair in logits for x in pair) or None,
        left_out={} if on_cpu else {name: reason for name, reason in available.items() if reason},
    )


def _level(bench: Bench, size: Size) -> Case:
    logits, uncond = _logits(bench, size, size.top_k)
    above = -torch.rand(size.batch, size.top_k, device=bench.device)
    options = {"top_k": size.top_k, "guidance": size.guidance}
    made = expand_tree(
        logits.cpu(), above.cpu(), uncond=uncond.cpu(), **options, implementation="reference"
    )
    tokens, scores, beams = (tensor.to(bench.device) for tensor in made)

    def near(out: object) -> None:
        _close(out[1], scores)
        _close(out[1].gather(1, out[2].long()), scores.gather(1, beams.long()))

    def check(out: object) -> None:
        assert torch.equal(out[0], tokens), "not the likeliest tokens"
        near(out)

    def ours(name: str) -> object:
        return expand_tree(logits, above, uncond=uncond, **options, implementation=name)

    eager = partial(_eager_level, logits, above, uncond=uncond, **options)
    return _case(
        bench, "expand_tree", f"{size} W={size.top_k}", ours, check,
        Candidate("eager", eager, near, peer=True), [(logits, uncond)],
    )  # fmt: skip


def _candidates(size: Size, logits: list[tuple[Tensor, Tensor]], expand: Expand) -> list[Tensor]:
    """Return tokens, scores and parents [B, M] of all levels, each from the best of the last."""
    found: list[Level] = []
    scores, begin = None, 0
    parents = torch.full(
        (size.batch, size.top_k), -1, dtype=torch.int32, device=logits[0][0].device
    )
    for x, uncond in logits:
        tokens, totals, beams = expand(
            x, scores, top_k=size.top_k, uncond=uncond, guidance=size.guidance
        )
        found.append((tokens, totals, parents))
        scores = totals.gather(1, beams.long())
        parents = (beams + begin).repeat_interleave(size.top_k, 1)
        begin += tokens.shape[1]
    return [torch.cat(part, 1) for part in zip(*found, strict=True)]


def _inputs(bench: Bench, size: Size) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Return the logits of each level, and roots."""
    beams = [1] + [size.top_k] * (size.levels - 1)
    logits = [_logits(bench, size, count) for count in beams]
    return logits, torch.arange(size.batch, device=bench.device)


def _tree(bench: Bench, size: Size) -> Case:
    logits, root = _inputs(bench, size)
    tokens, scores, parents = _candidates(
        size, logits, partial(expand_tree, implementation="reference")
    )
    given = (root, tokens, scores, parents)
    want = build_tree(*(x.cpu() for x in given), size=size.nodes, implementation="reference")

    def check(out: object) -> None:
        for name, got, expected in zip(want._fields, out, want, strict=True):
            assert torch.equal(got.cpu(), expected), f"{name} is not the reference's"

    best = scores.topk(size.nodes - 1, 1).values

    def near(out: object) -> None:
        _close(out[0].sort(1, descending=True).values, best)

    def ours(name: str) -> object:
        return build_tree(*given, size=size.nodes, implementation=name)

    shape = f"B={size.batch} M={tokens.shape[1]} N={size.nodes} from V={size.vocabulary}"
    eager = partial(_eager_tree, *given, size)
    return _case(
        bench, "build_tree", shape, ours, check, Candidate("eager", eager, near, peer=True), []
    )


def _draft(bench: Bench, size: Size) -> Case:
    logits, root = _inputs(bench, size)
    pairs = [(x.cpu(), u.cpu()) for x, u in logits]
    expand = partial(expand_tree, implementation="reference")
    best = _candidates(size, pairs, expand)[1].topk(size.nodes - 1, 1).values

    def near(out: object) -> None:
        scores, depths = out
        _close(scores.topk(size.nodes - 1, 1).values.cpu(), best)
        assert int(depths.min()) == 0, "a tree with padding"

    def ours(name: str) -> object:
        found = _candidates(size, logits, partial(expand_tree, implementation=name))
        tree = build_tree(root, *found, size=size.nodes, implementation=name)
        return found[1], tree.depths

    def eager() -> object:
        found = _candidates(size, logits, _eager_level)
        return found[1], _eager_tree(root, *found, size)[3]

    shape = f"{size} levels={size.levels} N={size.nodes}"
    peer = Candidate("eager", eager, near, peer=True)
    return _case(bench, "draft of a tree", shape, ours, near, peer, logits)


def _eager_level(
    logits: Tensor, above: Tensor | None, *, top_k: int, uncond: Tensor, guidance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Expand a level as eager PyTorch does."""
    x = uncond.float() + guidance * (logits.float() - uncond.float())
    chances, tokens = x.log_softmax(2).topk(top_k, 2)
    if above is not None:
        chances = chances + above[:, :, None]
    scores = chances.flatten(1)
    return tokens.flatten(1), scores, scores.topk(top_k, 1).indices.int()


def _eager_tree(
    root: Tensor, tokens: Tensor, scores: Tensor, parents: Tensor, size: Size
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return chosen scores, tokens, parents, depths and mask (bool) as eager PyTorch finds them."""
    chosen = scores.topk(size.nodes - 1, 1).indices.sort(1).values
    above = parents.gather(1, chosen).long()
    places = torch.searchsorted(chosen, above) + 1
    places = places.masked_fill(above < 0, 0)
    nodes = torch.cat((root[:, None], tokens.gather(1, chosen)), 1)
    line = torch.nn.functional.pad(places, (1, 0))
    mask = torch.eye(size.nodes, dtype=torch.bool, device=root.device).expand(len(root), -1, -1)
    for _ in range(size.levels):
        mask = mask | mask.gather(1, line[:, :, None].expand_as(mask))
    return scores.gather(1, chosen), nodes, mask, mask.sum(2) - 1


if __name__ == "__main__":
    sys.exit(main("bench_tree", plans, sys.argv[1:]))
