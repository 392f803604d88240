"""`tree_attention` at the target passes of speculative decoding: LlamaGen-XL, and a long context.

One layer's attention of a chain of 5 and a tree of 59 nodes over a cache that is full but for their
slots. GB/s are of what must be read, the K/V of the slots that some entry sees, once, and of query
and output: 100% of the measured copy is the time to read the visible cache once. The peer is
torch's attention with the dense mask, which is made outside of the timed region.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.harness import Bench, Candidate, Case, Plan, main
from sdvg_kernels import TokenTree, implementations, tree_attention
from sdvg_kernels.testing import assert_within_budget


class Size(NamedTuple):
    """A model's layer and cache, and what a pass feeds."""

    name: str
    batch: int
    heads: int
    heads_cached: int
    dim: int
    slots: int
    chain: int = 5
    nodes: int = 59

    def __str__(self) -> str:
        text = f"{self.name} B={self.batch} T={self.chain + self.nodes} H={self.heads}"
        return f"{text} Hk={self.heads_cached} D={self.dim} S={self.slots}"


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases."""
    if bench.device.type == "cpu":
        sizes = [Size("tiny", 2, 4, 2, 64, 150, chain=2, nodes=13)]
    else:
        # with guidance an image is two sequences
        xl = Size("LlamaGen-XL", 1, 20, 20, 64, 1144)
        sizes = [xl, xl._replace(batch=2), Size("Cosmos-4B", 1, 32, 8, 128, 12800)]
        if not bench.quick:
            sizes += [xl._replace(batch=16), Size("LlamaGen-3B", 2, 32, 32, 100, 1144)]
    for size in sizes:
        yield Plan(f"tree_attention {size}", partial(_attention, bench, size))


def _words(size: Size) -> torch.Tensor:
    """Return the mask [T, W] int32: a chain in word 0, a tree of three children each behind it."""
    parents = torch.tensor([-1, *((node - 1) // 3 for node in range(1, size.nodes))])
    tree = TokenTree.from_parents(torch.zeros_like(parents), parents).mask[0]
    chain = torch.zeros(size.chain, 1 + tree.shape[-1], dtype=torch.int32)
    chain[:, 0] = (1 << torch.arange(1, size.chain + 1)) - 1
    before = tree.new_full((size.nodes, 1), (1 << size.chain) - 1)
    return torch.cat((chain, torch.cat((before, tree), 1)))


def _sees(mask: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """Return who sees which slot, bool [T, S]: all before `length`, and the bits of mask [T, W]."""
    bits = (mask[..., None] >> torch.arange(32, device=mask.device)) & 1 == 1
    behind = F.pad(bits.flatten(1), (length, size))[:, :size]
    return behind | (torch.arange(size, device=mask.device) < length)


def _dense(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor
) -> torch.Tensor:
    """Return torch's attention with a mask [T, S]."""
    tensors = (tensor.transpose(1, 2) for tensor in (query, k, v))
    return F.scaled_dot_product_attention(*tensors, attn_mask=sees, enable_gqa=True).transpose(1, 2)


def _attention(bench: Bench, size: Size) -> Case:
    device = bench.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    words = _words(size).to(device)
    entries = len(words)
    length = size.slots - 32 * words.shape[1]
    query, k, v = (
        torch.randn(size.batch, tokens, heads, size.dim, dtype=dtype, device=device)
        for tokens, heads in (
            (entries, size.heads),
            (size.slots, size.heads_cached),
            (size.slots, size.heads_cached),
        )
    )
    mask = words.expand(size.batch, -1, -1).contiguous()
    lengths = torch.full((size.batch,), length, dtype=torch.int32, device=device)
    sees = _sees(words, length, size.slots)
    plain, exact = (
        _dense(*(tensor.to(kind) for tensor in (query, k, v)), sees)
        for kind in (dtype, torch.float64)
    )

    def check(out: object) -> None:
        assert_within_budget(out, plain, exact)

    names, left_out = ["reference"], {}
    if device.type != "cpu":
        reason = implementations()["masked"]["triton"]
        names, left_out = ["triton"], {"triton": reason} if reason else {}
    run = partial(tree_attention, query, k, v, lengths, mask)
    ours = [Candidate(name, partial(run, implementation=name), check) for name in names]
    used = int(sees.any(0).nonzero().max()) + 1
    near = (query, k[:, :used], v[:, :used], sees[:, :used].contiguous())
    peer = Candidate("sdpa, mask", partial(_dense, *near), check, peer=True)
    seen = int(sees.any(0).sum())
    values = 2 * seen * size.heads_cached + 2 * entries * size.heads
    return Case(
        op="tree_attention",
        shape=f"{size} seen={seen}",
        dtype=str(dtype).removeprefix("torch."),
        candidates=[*ours, peer],
        flops=4 * size.batch * int(sees.sum()) * size.heads * size.dim,
        bytes=size.batch * values * size.dim * dtype.itemsize,
        left_out=left_out,
    )


if __name__ == "__main__":
    sys.exit(main("bench_tree_attention", plans, sys.argv[1:]))
