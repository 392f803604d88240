"""The part of `sdvg_kernels.testing`'s self-check that is about token models' ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sdvg_kernels import (
    FrameLayout,
    TokenTree,
    TreeState,
    beam_entries,
    build_tree,
    commit_tree_,
    diagonal_attention,
    diagonal_mask,
    diagonal_schedule,
    draft_entries,
    expand_tree,
    sample_tokens,
    select_path,
    tree_attention,
    tree_entries,
    verify_chain,
    verify_relaxed,
    verify_tree,
    verify_typical,
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


def check_verification(lane: Lane) -> None:
    """Assert that every rule keeps what the reference keeps on the CPU."""
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(5, 4, 300, generator=random)
    uncond = logits + 0.3 * torch.randn(5, 4, 300, generator=random)
    likely = logits.topk(2, 2).indices
    tokens = torch.stack((likely[:, 0, 0], likely[:, 0, 0], likely[:, 0, 1], likely[:, 1, 0]), 1)
    # nine others of each token, no two the same
    table = ((torch.arange(300)[:, None] + 7 * torch.arange(1, 10)) % 300).int()

    def run(how: str, where: str) -> list[torch.Tensor]:
        x, u, near = (tensor.to(where) for tensor in (logits, uncond, table))
        tree = TokenTree.from_parents(tokens.to(where), [-1, 0, 0, 1])
        keys = {name: torch.arange(5, device=where) for name in ("seeds", "sequences", "positions")}
        given = {**keys, "uncond": u, "guidance": 2.0, "top_k": 90, "implementation": how}
        chain = {"draft_logits": x[:, :3], "draft_uncond": u[:, :3]}
        return [
            *verify_tree(tree, x, **given),
            *verify_tree(tree, x, coupled=True, **given),
            *verify_relaxed(tree, x, near, delta=0.3, **given),
            *verify_typical(tree, x, epsilon=0.1, alpha=0.3, **given),
            *verify_chain(tree.tokens[:, 1:], x, **chain, **given),
        ]

    for got, want in zip(
        run(lane.implementation, lane.device), run("reference", "cpu"), strict=True
    ):
        assert torch.equal(got.cpu(), want), "paths or tokens are not the reference's"


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


def check_tree_step(lane: Lane) -> None:
    """Assert that what two sequences are fed and commit is, bit for bit, the reference's."""
    random = torch.Generator().manual_seed(0)
    layout, parents = FrameLayout(4, 9, 2, 1), [-1, 0, 0, 1, 1]
    # a chain of 2 and none, two rows each
    places = torch.tensor([[9, 12], [6, 11], [5, 10]], dtype=torch.int32).repeat(1, 2)
    ids = torch.randint(50, (4, 25), generator=random)
    features = torch.randn(4, 25, 40, generator=random)
    tokens = torch.randint(20, (2, 5), generator=random)
    seen = torch.randn(4, 7, 40, generator=random)
    scores = torch.randn(2, 4, generator=random)

    def run(how: str, where: str) -> list[torch.Tensor]:
        state = TreeState(*(x.to(where, copy=True) for x in (ids, features, *places)))
        tree = TokenTree.from_parents(tokens.to(where), parents)
        rest = torch.zeros(2, dtype=torch.bool, device=where)
        beams = torch.tensor([[3, 0], [2, 1]], dtype=torch.int32, device=where)
        drafted = draft_entries(state, layout, 5, implementation=how)
        grown = beam_entries(
            state.known, tree.tokens[:, :4].contiguous(), scores.to(where), beams,
            drafted.features[:, :2], drafted.mask[:, :2].contiguous(), level=1, words=1,
            implementation=how,
        )  # fmt: skip
        fed = tree_entries(state, layout, tree, rest, 2, implementation=how)
        keys = torch.arange(2, device=where)
        path, counts = select_path(
            tree, ~rest, 2, seeds=keys, sequences=keys, positions=keys.int(), implementation=how
        )
        moves = commit_tree_(
            state, layout, tree.tokens, path, counts, drawn=keys, chain=fed.chain,
            out=seen.to(where), implementation=how,
        )  # fmt: skip
        kept = (state.ids[:, :-1], state.features[:, :-1], *state[2:])
        return [*drafted, *grown, *fed, path, counts, moves, *kept]

    for got, want in zip(
        run(lane.implementation, lane.device), run("reference", "cpu"), strict=True
    ):
        assert torch.equal(got.cpu(), want), "a step between passes is not the reference's"
