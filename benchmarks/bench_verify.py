"""Token verification at the sizes of LlamaGen's trees, against PyTorch's own ops.

The peer is what LANTERN's and EAGLE's code do, without their reads on the host: every row becomes a
distribution in eager PyTorch (top-k by `topk`), then levels and siblings are walked with one coin a
node, captured in one CUDA graph. Its noise has no key, so that its output is only checked to be a
path and a token that may come; it knows the exact rule and no other, and stands beside all.
GB/s are of the logits of inner nodes and of the last node, once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Bench, Candidate, Case, Plan, main
from sdvg_kernels import (
    TokenTree,
    Verified,
    implementations,
    verify_chain,
    verify_relaxed,
    verify_tree,
    verify_typical,
)


class Size(NamedTuple):
    """Trees of one launch, and how their rows are processed."""

    batch: int
    vocabulary: int = 16384
    nodes: int = 59
    children: int = 4
    top_k: int | None = None
    guidance: float = 1.0
    neighbours: int = 1000

    def __str__(self) -> str:
        text = f"B={self.batch} V={self.vocabulary} N={self.nodes}"
        if self.guidance != 1:
            text += f" guidance={self.guidance:g}"
        return text if self.top_k is None else f"{text} top_k={self.top_k}"


class Inputs(NamedTuple):
    """A tree whose tokens are the likeliest of their rows, and all that decides about it."""

    tree: TokenTree
    depth: int
    logits: Tensor
    uncond: Tensor | None
    keys: dict[str, Tensor]


RULES = ("verify_chain", "verify_tree", "verify_tree coupled", "verify_relaxed", "verify_typical")


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases: every rule at every size, and short chains."""
    if bench.device.type == "cpu":
        sizes = [Size(2, 300, 9, 3, 20, 2.0, 30)]
    else:
        sizes = [Size(16), Size(16, top_k=2000, guidance=7.5)]
        if not bench.quick:
            sizes += [Size(1, top_k=2000, guidance=7.5), Size(16, 64000)]
    for size in sizes:
        for rule in RULES:
            yield Plan(f"{rule} {size}", partial(_case, bench, size, rule))
        short = size._replace(nodes=6)
        yield Plan(f"verify_chain {short}", partial(_case, bench, short, "verify_chain"))


def _inputs(bench: Bench, size: Size, rule: str) -> Inputs:
    """Return a chain, or a tree whose nodes have `children` each as far as they go."""
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    shape = (size.batch, size.nodes, size.vocabulary)
    logits = (3 * torch.randn(shape, device=bench.device)).to(dtype)
    uncond = None
    if size.guidance != 1:
        # near each other, as a model's are
        uncond = (logits + 0.3 * torch.randn(shape, device=bench.device)).to(dtype)
    width = 1 if rule == "verify_chain" else size.children
    parents = [(node - 1) // width if node else -1 for node in range(size.nodes)]
    ranks = torch.tensor([(node - 1) % width for node in range(size.nodes)], device=bench.device)
    above = torch.tensor(parents, device=bench.device).clamp(min=0)
    best = logits.topk(width, 2).indices
    tokens = best[:, above, ranks.clamp(min=0)]
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    keys = {
        "seeds": torch.full((size.batch,), 5, device=bench.device),
        "sequences": torch.arange(size.batch, device=bench.device),
        "positions": torch.full((size.batch,), 100, device=bench.device),
    }
    return Inputs(TokenTree.from_parents(tokens, parents), max(depths), logits, uncond, keys)


def _verify(
    rule: str, size: Size, table: Tensor, inputs: Inputs, implementation: str | None
) -> Verified:
    tree, depth, logits, uncond, keys = inputs
    options = {**keys, "uncond": uncond, "guidance": size.guidance, "top_k": size.top_k}
    options |= {"implementation": implementation, "depth": depth}
    if rule == "verify_chain":
        return verify_chain(tree.tokens[:, 1:], logits, **options)
    if rule == "verify_relaxed":
        return verify_relaxed(tree, logits, table, delta=0.2, **options)
    if rule == "verify_typical":
        return verify_typical(tree, logits, epsilon=0.09, alpha=0.3, **options)
    return verify_tree(tree, logits, coupled=rule.endswith("coupled"), **options)


def _case(bench: Bench, size: Size, rule: str) -> Case:
    on_cpu = bench.device.type == "cpu"
    inputs = _inputs(bench, size, rule)
    shift = torch.arange(1, size.neighbours + 1, device=bench.device)
    every = torch.arange(size.vocabulary, device=bench.device)[:, None]
    # scattered, as a codebook's neighbours are
    table = ((every + 97 * shift) % size.vocabulary).to(torch.uint16)
    here = Inputs(
        TokenTree(*(field.cpu() for field in inputs.tree)),
        inputs.depth,
        inputs.logits.cpu(),
        None if inputs.uncond is None else inputs.uncond.cpu(),
        {name: key.cpu() for name, key in inputs.keys.items()},
    )
    expected = _verify(rule, size, table.cpu(), here, "reference")

    def check(out: object) -> None:
        for name, got, want in zip(Verified._fields, out, expected, strict=True):
            assert torch.equal(got.cpu(), want), f"{name} is not the reference's"

    def among(out: object) -> None:
        path, token = (tensor.cpu().long() for tensor in out)
        parents = here.tree.parents.long()
        for level in range(1, path.shape[1]):
            node, before = path[:, level], path[:, level - 1]
            above = parents.gather(1, node.clamp(min=0)[:, None])[:, 0]
            assert ((node < 0) | (above == before)).all(), "no path of the tree"
        assert ((token >= 0) & (token < size.vocabulary)).all(), "no token"

    available = implementations()["verify"]
    names = ["reference"] if on_cpu else [name for name, reason in available.items() if not reason]
    # the reference reads back: it has no place in a graph
    names = [name for name in names if on_cpu or name != "reference"]
    ours = [
        Candidate(name, partial(_verify, rule, size, table, inputs, name), check) for name in names
    ]
    eager = Candidate("eager", partial(_eager, inputs, size), among, peer=True)
    # a leaf's row is read where the walk ends at it
    first = here.tree.first_child.long()
    last = expected.path.amax(1).clamp(min=0).long()
    rows = int((first >= 0).sum() + (first.gather(1, last[:, None]) < 0).sum())
    row = size.vocabulary * inputs.logits.element_size() * (1 if inputs.uncond is None else 2)
    return Case(
        op=rule,
        shape=str(size),
        dtype=str(inputs.logits.dtype).removeprefix("torch."),
        candidates=[*ours, eager],
        bytes=rows * row,
        left_out={} if on_cpu else {name: reason for name, reason in available.items() if reason},
    )


def _eager(inputs: Inputs, size: Size) -> tuple[Tensor, Tensor]:
    """Return (path, token) by the exact rule as eager PyTorch finds it."""
    tree, depth, logits, uncond, _ = inputs
    x = logits.float()
    if uncond is not None:
        x = uncond.float() + size.guidance * (x - uncond.float())
    if size.top_k is not None:
        x = x.masked_fill(x < x.topk(size.top_k, 2).values[:, :, -1:], -torch.inf)
    chances = x.softmax(2)
    every = torch.arange(size.batch, device=x.device)
    node = torch.zeros_like(every)
    goes = torch.ones_like(every, dtype=torch.bool)
    left = chances[:, 0]
    path = [node]
    width = 1 if size.nodes - 1 == depth else size.children
    for level in range(depth + 1):
        left = torch.where(goes[:, None], chances[every, node], left)
        if level == depth:
            break
        coin, scanned = torch.rand_like(left[:, 0]), torch.zeros_like(left[:, 0])
        child = torch.where(goes, tree.first_child[every, node].long(), -1)
        found = torch.full_like(child, -1)
        for _ in range(width):
            there = child >= 0
            at = child.clamp(min=0)
            token = tree.tokens[every, at]
            scanned = scanned + chances[every, node, token] * there
            hit = there & (coin <= scanned)
            found = torch.where(hit, child, found)
            out = (there & ~hit)[:, None]
            left = torch.where(out, left.scatter(1, token[:, None], 0.0), left)
            child = torch.where(there & ~hit, tree.next_sibling[every, at].long(), -1)
        goes = found >= 0
        node = torch.where(goes, found, node)
        path.append(found)
    return torch.stack(path, 1), (left / torch.empty_like(left).exponential_()).argmax(1)


if __name__ == "__main__":
    sys.exit(main("bench_verify", plans, sys.argv[1:]))
