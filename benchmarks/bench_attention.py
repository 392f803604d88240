"""`block_causal_attention` at the shapes of streaming video, against every attention that is here.

Wan at 480 x 832 has 1,560 tokens a latent frame; a block is 3 frames. 12 heads are the 1.3B model,
40 the 14B one. Diagonal decoding asks for few rows over many keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.harness import Bench, Candidate, Case, Plan, Unavailable, main
from benchmarks.peers import Attention, Peer, attention_peers
from sdvg_kernels import block_causal_attention, implementations
from sdvg_kernels.attention import e4m3
from sdvg_kernels.testing import assert_within_budget, fails_alone, signal_to_noise

FRAME = 1560
BLOCK = 3 * FRAME


class Shape(NamedTuple):
    """One attention problem; all counts in tokens."""

    batch: int
    rows: int
    heads: int
    # slots of the ring; `length` logical tokens, the query included
    slots: int
    length: int
    dim: int = 128
    sink: int = 0
    window: int | None = None
    # query blocks of rows / blocks tokens
    blocks: int = 1
    # FlexAttention compiles for each shape, which takes seconds: not everywhere
    flex: bool = False

    def __str__(self) -> str:
        text = f"B={self.batch} T={self.rows} H={self.heads} D={self.dim} S={self.slots}"
        if self.length != self.slots:
            text += f" L={self.length}"
        if self.sink:
            text += f" sink={self.sink}"
        if self.window is not None:
            text += f" window={self.window}"
        return text + (f" blocks={self.blocks}" if self.blocks > 1 else "")

    def visible(self) -> torch.Tensor:
        """Return which slots each block sees, bool [blocks, S], from the ring's definition."""
        seen = torch.zeros(self.blocks, self.slots, dtype=torch.bool)
        ring = self.slots - self.sink
        tokens = torch.arange(self.length)
        slots = torch.where(tokens < self.sink, tokens, self.sink + (tokens - self.sink) % ring)
        held = (tokens < self.sink) | (tokens >= self.length - ring)
        for block in range(self.blocks):
            end = self.length - (self.blocks - 1 - block) * (self.rows // self.blocks)
            sees = held & (tokens < end)
            if self.window is not None:
                sees &= (tokens < self.sink) | (tokens >= end - self.window)
            seen[block, slots[sees]] = True
        return seen


def shapes(cpu: bool, quick: bool) -> list[Shape]:
    """Return the problems, the ones that matter most first."""
    if cpu:
        return [
            Shape(1, 12, 2, 36, 36, dim=64),
            Shape(2, 12, 2, 40, 57, dim=64, sink=4, window=24),
            Shape(1, 24, 2, 48, 48, dim=64, window=24, blocks=2),
            Shape(1, 1, 2, 50, 50, dim=64),
            Shape(1, 24, 2, 9, 27, dim=64),
        ]
    keys = (4680, 32760) if quick else (4680, 9360, 18720, 32760)
    steady = [
        Shape(1, BLOCK, heads, s, s, flex=s == 32760 or (heads == 12 and s != 9360))
        for heads in (12, 40)
        for s in keys
    ]
    frame = [Shape(1, FRAME, 12, 9360, 9360, flex=True)]
    # the lazy commit: three pending blocks in one pass, each sees a window of 21 frames
    seen = 21 * FRAME
    slots = seen + 2 * BLOCK
    pending = [
        Shape(1, 3 * BLOCK, heads, slots, slots, window=seen, blocks=3, flex=True)
        for heads in (12, 40)
    ]
    few = [
        Shape(1, rows, heads, 16384, 16384, flex=(rows, heads) == (16, 12))
        for heads in (12, 40)
        for rows in (1, 16, 64)
    ]
    # a sink of one block and a window of four, wrapped; the ring has one block to spare
    ring = {"slots": 6 * BLOCK, "length": 8 * BLOCK + FRAME, "sink": BLOCK, "window": 4 * BLOCK}
    wrapped = [Shape(1, BLOCK, heads, **ring, flex=heads == 12) for heads in (12, 40)]
    batched = [Shape(2, BLOCK, heads, s, s) for heads in (12, 40) for s in keys]
    narrow = [Shape(1, BLOCK, 24, 18720, 18720, dim=64)]
    narrow += [Shape(1, rows, 16, 16384, 16384, dim=64) for rows in (1, 16)]
    # cross-attention to a text of 512: dense_attention's ring, full to its last slot
    text = [Shape(1, BLOCK, heads, 512, 10 * 512) for heads in (12, 40)]
    return steady + frame + pending + few + wrapped + batched + narrow + text


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases."""
    for peer in attention_peers(bench.device):
        if not peer.reason:
            bench.notes.append(f"{peer.name}: {peer.what} ({peer.version})")
        else:
            bench.notes.append(f"{peer.name}: not here, it {peer.reason}")
    for shape in shapes(bench.device.type == "cpu", bench.quick):
        yield Plan(f"block_causal_attention {shape}", partial(case, bench, shape))
        if (shape.batch, shape.rows, shape.slots) == (1, BLOCK, 32760):
            what = f"block_causal_attention in 8 bits {shape}"
            yield Plan(what, partial(case, bench, shape, eight_bits=True))


def case(bench: Bench, shape: Shape, *, eight_bits: bool = False) -> Case:
    """Return one problem with fresh random inputs, ours and every peer that is here.

    With `eight_bits`: those that compute in 8 bits, held to 25 dB of signal to noise, and ours in
    16 bits for comparison.
    """
    device, cpu = bench.device, bench.device.type == "cpu"
    names, peers, left_out = _who(shape, device, eight_bits)
    dtype = torch.float32 if cpu else torch.bfloat16
    visible = shape.visible()
    sizes = (shape.batch, shape.slots, shape.heads, shape.dim)
    query = torch.randn(shape.batch, shape.rows, *sizes[2:], dtype=dtype, device=device)
    k_cache, v_cache = (torch.randn(sizes, dtype=dtype, device=device) for _ in range(2))
    # what nobody sees is large, so that one leaked slot shows
    for cache in (k_cache, v_cache):
        cache[:, ~visible.any(0).to(device)] = 1e4
    lengths = torch.full((shape.batch,), shape.length, dtype=torch.int32, device=device)
    contract = {
        "block_size": shape.rows // shape.blocks,
        "sink": shape.sink,
        "window": shape.window,
    }

    exact = block_causal_attention(
        *(tensor.double() for tensor in (query, k_cache, v_cache)),
        lengths,
        **contract,
        implementation="reference",
    )
    gather = partial(block_by_block, runs=[runs_of(row) for row in visible])
    plain = gather(eager, query, k_cache, v_cache)

    def check(out: object) -> None:
        assert_within_budget(out, plain, exact)

    out = torch.empty_like(query)

    def check_noise(out: object) -> None:
        decibels = signal_to_noise(out, exact)
        assert decibels >= 25, f"signal to noise is {decibels:.1f} dB, must be 25"

    def ours(name: str) -> Candidate:
        caches = {"k_cache": k_cache, "v_cache": v_cache}
        if _is_eight_bits(name):
            caches = e4m3.quantised_cache(k_cache, v_cache).arguments()

        def run() -> torch.Tensor:
            block_causal_attention(
                query, **caches, cache_seqlens=lengths, **contract, out=out, implementation=name
            )
            return out

        said = f"{name} (bfloat16)" if eight_bits and not _is_eight_bits(name) else name
        held = check_noise if _is_eight_bits(name) else check
        return Candidate(said, run, held, reset=lambda: out.fill_(torch.nan))

    candidates = [ours(name) for name in names]
    seen = visible.to(device)
    for peer in peers:
        attend = peer.build()
        run = _with_mask(attend, seen) if peer.masks else partial(gather, attend)
        held = check_noise if eight_bits else check
        candidates.append(
            Candidate(peer.name, partial(run, query, k_cache, v_cache), held, peer=True)
        )

    pairs = int(visible.sum()) * (shape.rows // shape.blocks)
    touched = int(visible.any(0).sum())
    values = shape.batch * shape.heads * shape.dim
    return Case(
        op="block_causal_attention",
        shape=str(shape),
        dtype="float8_e4m3fn" if eight_bits else str(dtype).removeprefix("torch."),
        candidates=candidates,
        flops=4 * values * pairs,
        bytes=2 * values * (shape.rows + touched) * query.element_size(),
        left_out=left_out,
    )


def _is_eight_bits(implementation: str) -> bool:
    return implementation.endswith("_fp8")


def _who(
    shape: Shape, device: torch.device, eight_bits: bool
) -> tuple[list[str], list[Peer], dict[str, str]]:
    """Return our implementations, the peers, and why others are left out.

    Raises: Unavailable where somebody in 8 bits is asked for and there is nobody.
    """
    names, peers, left_out = [], [], {}
    for name, reason in implementations()["attention"].items():
        # the reference is what serves a CPU, and no candidate on a GPU
        if (name == "reference") is not (device.type == "cpu"):
            continue
        # what no GPU has passed yet must not keep the others from their figures
        if name in ("hopper", "hopper_fp8") and not reason:
            reason = fails_alone(name, 60.0)
        if reason:
            left_out[name] = reason
        elif eight_bits or not _is_eight_bits(name):
            names.append(name)
    for peer in attention_peers(device):
        if peer.quantized is not eight_bits:
            continue
        reason = peer.reason
        if peer.name == "flex" and not reason and not shape.flex:
            reason = "compiled for some of the shapes only, to save time"
        if reason:
            left_out[peer.name] = reason
        else:
            peers.append(peer)
    if eight_bits and not peers and not any(map(_is_eight_bits, names)):
        listed = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise Unavailable(f"nobody computes in 8 bits here: {listed}")
    return names, peers, left_out


def runs_of(visible: torch.Tensor) -> list[slice]:
    """Return the runs of True in bool [S]."""
    edges = torch.diff(visible.int(), prepend=torch.zeros(1), append=torch.zeros(1))
    starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return [slice(a, b) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]


def block_by_block(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    runs: list[list[slice]],
) -> torch.Tensor:
    """Return what an attention without masks gives: a call a block, on the keys it sees."""
    outs = []
    for rows, slots in zip(query.chunk(len(runs), dim=1), runs, strict=True):
        key, value = (
            torch.cat([cache[:, part] for part in slots], 1)
            if len(slots) > 1
            else cache[:, slots[0]]
            for cache in (k_cache, v_cache)
        )
        outs.append(attend(rows, key, value, None))
    return torch.cat(outs, 1) if len(outs) > 1 else outs[0]


def _with_mask(attend: Attention, visible: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda query, k_cache, v_cache: attend(query, k_cache, v_cache, visible)


def eager(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: None
) -> torch.Tensor:
    """Return softmax(Q K^T / sqrt(D)) V in the inputs' own dtype: the budget's yardstick."""
    out = torch.empty_like(query)
    for batch in range(query.shape[0]):
        for head in range(query.shape[2]):
            logits = (query[batch, :, head] * query.shape[-1] ** -0.5) @ key[batch, :, head].T
            out[batch, :, head] = logits.softmax(-1) @ value[batch, :, head]
    return out


if __name__ == "__main__":
    sys.exit(main("bench_attention", plans, sys.argv[1:]))
