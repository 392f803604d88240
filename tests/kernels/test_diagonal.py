"""diagonal_mask and diagonal_attention in every lane, against the rule read token by token."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

from sdvg_kernels import DiagonalSchedule, TokenGrid, diagonal_attention, diagonal_mask
from sdvg_kernels import diagonal_schedule as schedule
from sdvg_kernels.testing import Lane, assert_within_budget

MODES = ("spatial", "spatiotemporal", "zipar")
GRIDS = ((1, 4), (3, 1), (2, 3), (3, 4))


def token_passes(made: DiagonalSchedule) -> dict[int, int]:
    """Return the pass of each slot's token, from the outputs alone; others are not of a grid."""
    return {
        output: step
        for step, outputs in enumerate(made.outputs.tolist())
        for output in outputs
        if output >= 0
    }


def brute_force(
    slot: int, step: int, size: int, passes: dict[int, int], pad: int = 0
) -> list[bool]:
    """Return which slots an entry sees."""
    return [
        pad <= key <= slot and (key == slot or key not in passes or passes[key] < step)
        for key in range(size)
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_every_entry_of_every_pass_sees_what_the_rule_says(
    height: int, width: int, mode: str, lane: Lane
) -> None:
    for k, (row_start, extra) in itertools.product(
        range(1, width + 1), (("newest", 0), ("above", 2), ("eol", 0), ("eol", 1))
    ):
        made = schedule(
            2, height, width, k, mode, row_start, prefix=3, extra=extra, final_fill=True
        )
        passes = token_passes(made)
        # all passes as a batch: sequences at different passes in one launch
        got = diagonal_mask(
            made.slots.to(lane.device),
            made.steps.to(lane.device),
            made.grid,
            made.size + 2,
            implementation=lane.implementation,
        )
        expected = [
            [brute_force(slot, step, made.size + 2, passes) for slot in slots]
            for step, slots in enumerate(made.slots.tolist())
        ]
        assert torch.equal(got.cpu(), torch.tensor(expected)), (k, row_start, extra)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_seen_lies_in_the_cache(mode: str) -> None:
    # every slot that an entry sees was fed in an earlier pass, or is fed in this one
    for k, row_start, extra in itertools.product((1, 2, 3, 5), ("newest", "eol"), (0, 2)):
        made = schedule(3, 4, 5, k, mode, row_start, prefix=2, extra=extra, final_fill=True)
        sees = diagonal_mask(made.slots, made.steps, made.grid, made.size)
        true, held = {0}, {0}
        for step, slots in enumerate(made.slots.tolist()):
            entries = made.sources[step].tolist()
            here = dict(zip(slots, entries, strict=True))
            held |= set(slots)
            for slot, source in here.items():
                true = true | {slot} if slot == source else true - {slot}
            for slot, row in zip(slots, sees[step], strict=True):
                seen = set(row.nonzero()[:, 0].tolist())
                assert seen <= held
                # a stand-in is seen by nobody but itself
                assert seen - {slot} <= true


def test_raster_decoding_sees_all_that_is_before(lane: Lane) -> None:
    made = schedule(2, 3, 4, 4, extra=1, prefix=2, row_start="eol")
    sees = diagonal_mask(
        made.slots.to(lane.device),
        made.steps.to(lane.device),
        made.grid,
        made.size,
        implementation=lane.implementation,
    )
    causal = torch.arange(made.size) <= made.slots[..., None]
    assert torch.equal(sees.cpu(), causal)


@pytest.mark.parametrize("size", [1, 40, 43, 300])
def test_masks_of_each_form_say_the_same(size: int, lane: Lane) -> None:
    made = schedule(2, 4, 5, 2, row_start="newest", prefix=2)
    at = [3, 11, 20]
    slots, steps = (table[at].to(lane.device) for table in (made.slots, made.steps))
    pad = torch.tensor([0, 1, 9], dtype=torch.int32, device=lane.device)
    run = functools.partial(
        diagonal_mask,
        slots,
        steps,
        made.grid,
        size,
        cache_leftpad=pad,
        implementation=lane.implementation,
    )
    passes = token_passes(made)
    expected = torch.tensor(
        [
            [brute_force(slot, step, size, passes, first) for slot in made.slots[step].tolist()]
            for step, first in zip(at, pad.tolist(), strict=True)
        ]
    )
    assert torch.equal(run().cpu(), expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        added = run(dtype=dtype)
        lowest = torch.finfo(dtype).min
        assert torch.equal(added.cpu(), torch.where(expected, 0.0, lowest).to(dtype))
    bits = run(packed=True)
    assert bits.shape == (3, slots.shape[1], -(-size // 8))
    unpacked = np.unpackbits(bits.cpu().numpy(), axis=2, bitorder="little")[..., :size]
    assert torch.equal(torch.from_numpy(unpacked).bool(), expected)


def test_strided_tables_and_an_expanded_step_are_read(lane: Lane) -> None:
    made = schedule(1, 4, 5, 2)
    around = torch.full((40, 9), -7, dtype=torch.int32)
    slots = around.T[:2, 5 : 5 + 2 * made.slots.shape[1] : 2].copy_(made.slots[[3, 9]])
    steps = torch.tensor([3, 9], dtype=torch.int32)[:, None].expand_as(slots)
    got = diagonal_mask(
        slots.to(lane.device),
        steps.to(lane.device),
        made.grid,
        made.size,
        implementation=lane.implementation,
    )
    plain = diagonal_mask(made.slots[[3, 9]], made.steps[[3, 9]], made.grid, made.size)
    # padding sees nothing, whatever its step
    assert torch.equal(got.cpu(), plain)


def inputs(
    slots: torch.Tensor,
    steps: torch.Tensor,
    grid: TokenGrid,
    size: int,
    heads: tuple[int, int],
    dim: int,
    random: torch.Generator,
    lane: Lane,
    dtype: torch.dtype = torch.float32,
    pad: torch.Tensor | None = None,
    published: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, K, V with NaN in what no entry sees, and who sees what [B, T, S]."""
    batch, rows = slots.shape
    sees = diagonal_mask(slots, steps, grid, size, cache_leftpad=pad)
    if published:
        sees = torch.arange(size) <= slots[..., None]
    made = (
        torch.randn(batch, length, count, dim, generator=random)
        for length, count in ((rows, heads[0]), (size, heads[1]), (size, heads[1]))
    )
    query, *caches = (tensor.to(dtype) for tensor in made)
    for cache in caches:
        cache[~sees.any(1)] = torch.nan
    query, *caches, sees = (tensor.to(lane.device) for tensor in (query, *caches, sees))
    return query, *caches, sees


def attention(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor
) -> torch.Tensor:
    """Return plain attention by a dense mask, head by head, in query's dtype."""
    k, v = k.nan_to_num(0), v.nan_to_num(0)
    group = query.shape[2] // k.shape[2]
    k, v = (tensor.repeat_interleave(group, 2).transpose(1, 2) for tensor in (k, v))
    logits = query.transpose(1, 2) @ k.transpose(2, 3) * query.shape[3] ** -0.5
    logits = logits.masked_fill(~sees[:, None], -torch.inf)
    weights = logits.softmax(-1).masked_fill(~sees[:, None].any(-1, keepdim=True), 0)
    return (weights @ v).transpose(1, 2)


def check(
    out: torch.Tensor, query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor
) -> None:
    """Assert that `out` is within its budget."""
    exact = attention(query.double(), k.double(), v.double(), sees)
    assert_within_budget(out, attention(query, k, v, sees), exact)
    assert out.is_contiguous()


@pytest.mark.parametrize(
    ("heads", "dim", "published"),
    [
        ((2, 2), 64, False),
        ((4, 1), 64, True),
        ((3, 1), 100, False),
        ((4, 2), 128, False),
    ],
)
@pytest.mark.parametrize(
    ("mode", "row_start", "extra"),
    [("spatial", "newest", 3), ("spatiotemporal", "above", 0), ("zipar", "eol", 1)],
)
def test_attention_equals_a_dense_mask(
    mode: str,
    row_start: str,
    extra: int,
    heads: tuple[int, int],
    dim: int,
    published: bool,
    lane: Lane,
    random: torch.Generator,
) -> None:
    made = schedule(2, 5, 7, 2, mode, row_start, prefix=19, extra=extra)
    # sequences at different passes
    at = [9, made.frame_starts[1], len(made.slots) - 2]
    slots, steps = made.slots[at], made.steps[at]
    size = made.size + 3
    query, k, v, sees = inputs(
        slots, steps, made.grid, size, heads, dim, random, lane, published=published
    )
    out = diagonal_attention(
        query,
        k,
        v,
        slots.to(lane.device),
        steps.to(lane.device),
        made.grid,
        mode="published" if published else "exact",
        implementation=lane.implementation,
    )
    check(out, query, k, v, sees)
