"""The part of `sdvg_kernels.testing`'s self-check that is about token models' ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sdvg_kernels import (
    TokenTree,
    build_tree,
    diagonal_attention,
    diagonal_mask,
    diagonal_schedule,
    expand_tree,
    sample_tokens,
    tree_attention,
)
from sdvg_kernels.testing import Lane, assert_within_budget


def check_diagonal(lane: Lane, dtype: torch.dtype) -> None:
    """Assert that two passes in one batch see what their mask says, and nothing else."""
    random = torch.Generator().manual_seed(0)
    made = diagonal_schedule(2, 5, 7, 2, row_start="newest", prefix=19, device=lane.device)
    slots, steps = made.slots[[9, 25]], made.steps[[9, 25]]
    size = made.size
    sees = diagonal_mask(slots, steps, made.grid, size, implementation=lane.implementation)
    wide = [torch.randn(2, slots.shape[1], 4, 64, generator=random)]
    wide += [torch.randn(2, size, 2, 64, generator=random) for _ in range(2)]
    query, k, v = (tensor.to(lane.device, dtype) for tensor in wide)
    k[~sees.any(1)] = torch.nan
    v[~sees.any(1)] = torch.nan
    out = diagonal_attention(
        query, k, v, slots, steps, made.grid, implementation=lane.implementation
    )
    assert not out[slots < 0].any(), "padding is not 0"

    def plain(kind: torch.dtype) -> torch.Tensor:
        tensors = (x.nan_to_num().to(kind).transpose(1, 2) for x in (query, k, v))
        out = F.scaled_dot_product_attention(*tensors, attn_mask=sees[:, None], enable_gqa=True)
        return out.transpose(1, 2)[slots >= 0]

    assert_within_budget(out[slots >= 0], plain(dtype), plain(torch.float64))


def check_tree_attention(lane: Lane, dtype: torch.dtype) -> None:
    """Assert that a tree at two lengths sees the committed slots and its own, and nothing else."""
    random = torch.Generator().manual_seed(0)
    nodes = torch.arange(20)
    parents = torch.where(nodes > 0, (nodes - 1) // 2, -1)
    words = TokenTree.from_parents(nodes, parents).mask[0]
    # one entry of padding
    words = F.pad(words, (0, 0, 0, 1))
    lengths = torch.tensor([37, 0], dtype=torch.int32)
    slot = torch.arange(70) - lengths[:, None, None]
    bits = (words >> slot.clamp(0, 31)) & 1 == 1
    fed = (words != 0).squeeze(1)
    sees = (torch.where(slot < 0, True, bits & (slot < 32)) & fed[:, None]).to(lane.device)
    query, k, v = (
        torch.randn(2, tokens, heads, 64, generator=random).to(lane.device, dtype)
        for tokens, heads in ((21, 4), (70, 2), (70, 2))
    )
    k[~sees.any(1)] = torch.nan
    v[~sees.any(1)] = torch.nan
    mask, lengths = words.expand(2, -1, -1).to(lane.device), lengths.to(lane.device)
    out = tree_attention(query, k, v, lengths, mask, implementation=lane.implementation)
    assert not out[:, -1].any(), "padding is not 0"

    def plain(kind: torch.dtype) -> torch.Tensor:
        tensors = (x.nan_to_num().to(kind).transpose(1, 2) for x in (query, k, v))
        out = F.scaled_dot_product_attention(*tensors, attn_mask=sees[:, None], enable_gqa=True)
        return out.transpose(1, 2)[:, :-1]

    assert_within_budget(out[:, :-1], plain(dtype), plain(torch.float64))


def check_sampling(lane: Lane) -> None:
    """Assert that guided rows, top-k and top-p give the reference's tokens on the CPU."""
    random = torch.Generator().manual_seed(0)
    logits, uncond = (4 * torch.randn(6, 700, generator=random) for _ in range(2))
    keys = {name: torch.arange(6) for name in ("seeds", "sequences", "positions")}
    warp = {"guidance": 2.0, "temperature": 0.9, "top_k": 90, "top_p": 0.9}
    want = sample_tokens(logits, uncond=uncond, **keys, **warp, implementation="reference")
    logits, uncond = logits.to(lane.device), uncond.to(lane.device)
    keys = {name: key.to(lane.device) for name, key in keys.items()}
    got = sample_tokens(logits, uncond=uncond, **keys, **warp, implementation=lane.implementation)
    assert torch.equal(got.cpu(), want), f"tokens are {got.tolist()}, not {want.tolist()}"


def check_tree(lane: Lane) -> None:
    """Assert that a level of candidates and their tree are the reference's on the CPU."""
    logits = torch.randn(2, 5, 700, generator=torch.Generator().manual_seed(0))

    def run(how: str, where: str) -> list[torch.Tensor]:
        tokens, scores, beams = expand_tree(logits.to(where), top_k=4, implementation=how)
        found = (beams[:, 0], tokens, scores, torch.full_like(tokens, -1))
        return [tokens, beams, *build_tree(*found, size=9, implementation=how)]

    for got, want in zip(
        run(lane.implementation, lane.device), run("reference", "cpu"), strict=True
    ):
        assert torch.equal(got.cpu(), want), "a level or its tree is not the reference's"
