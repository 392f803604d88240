"""What tests of the ops share, shipped so that users can test their own GPU.

python -m sdvg_kernels.testing      # checks every implementation that this machine has
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from sdvg_kernels import (
    _ops,
    block_causal_attention,
    commit_,
    compact_,
    gated_residual_layer_norm,
    implementations,
    norm_rope,
    norm_rope_stage_,
    preprocess_frames,
    quantize_rows,
    rms_norm_silu,
    rollback_,
    rope_table,
    route_blocks,
    select_,
    stage_,
)
from sdvg_kernels._check import triton_reason
from sdvg_kernels.attention import KeyBias, e4m3

if TYPE_CHECKING:
    from sdvg_kernels._gluon import GluonLane as GluonLane
    from sdvg_kernels._gluon import LaneFault as LaneFault

# --- the host lane: the CUDA sources, run on CPU tensors thread by thread ---


def host_lane_missing() -> str:
    """Return why `implementation="host"` cannot run here, or ""."""
    extension, reason = _ops.load_extension()
    return "" if extension is not None else f"the host lane needs sdvg_kernels._C: {reason}"


@contextlib.contextmanager
def host_lane_order(order: int) -> Iterator[None]:
    """Run the host lane's blocks, and the threads of each phase, in another order meanwhile.

    Arguments:
        order: 0 forward, 1 backward, anything else shuffled with that seed. A kernel that misses a
            barrier, or whose blocks overlap, gives other bytes in another order.

    Raises: RuntimeError where the host lane is not built.
    """
    extension, _ = _ops.load_extension()
    if extension is None:
        raise RuntimeError(host_lane_missing())
    extension.set_host_order(order)
    try:
        yield
    finally:
        extension.set_host_order(0)


# --- the Gluon lane: a Hopper kernel's own source, its partitions as threads ---


def __getattr__(name: str) -> object:
    # imported when asked for: it needs Triton
    if name in ("GluonLane", "LaneFault"):
        from sdvg_kernels import _gluon

        return getattr(_gluon, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# --- lanes: where an implementation runs ---


class Lane(NamedTuple):
    """An implementation of the Python-launched ops, and the device that it runs on here."""

    name: str
    device: str
    implementation: str


def lanes() -> list[Lane]:
    """Return this machine's lanes: the references, Triton's interpreter if it is on, the GPU's."""
    found = [Lane("reference", "cpu", "reference")]
    if not triton_reason("cpu"):
        found.append(Lane("interpreter", "cpu", "triton"))
    if torch.cuda.is_available():
        found.append(Lane("reference-cuda", "cuda", "reference"))
        if not triton_reason("cuda"):
            found.append(Lane("triton", "cuda", "triton"))
    return found


# --- attention: inputs by logical content, and what they must give ---


class RingCache(NamedTuple):
    """K and V caches [B, S, Hk, D] whose unused slots are NaN, and their lengths [B] int32."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cache_seqlens: torch.Tensor


def ring_cache(
    keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], slots: int, sink: int = 0
) -> RingCache:
    """Write each sequence's logical tokens [L_b, Hk, D] into a ring of `slots` slots.

    Slot of token `t`: `t` if `t < sink`, else `sink + (t - sink) % (slots - sink)`. The rest: NaN.
    """
    caches = []
    for sequences in (keys, values):
        cache = sequences[0].new_full((len(sequences), slots, *sequences[0].shape[1:]), torch.nan)
        for row, sequence in zip(cache, sequences, strict=True):
            token = torch.arange(len(sequence), device=sequence.device)
            held = (token < sink) | (token >= len(sequence) - (slots - sink))
            ring = sink + (token - sink) % (slots - sink)
            row[torch.where(token < sink, token, ring)[held]] = sequence[held]
        caches.append(cache)
    lengths = [len(sequence) for sequence in keys]
    return RingCache(*caches, torch.tensor(lengths, dtype=torch.int32, device=keys[0].device))


def logical_attention(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    *,
    slots: int,
    block_size: int | None = None,
    sink: int = 0,
    window: int | None = None,
    softmax_scale: float | None = None,
    key_bias: KeyBias | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `block_causal_attention` (out [B, T, H, D], lse [B, H, T]) from logical tokens.

    Knows nothing of slots but their number: every row has a mask over its sequence's tokens, as the
    contract words it. In float64 it is the truth; in query's smaller dtype it is plain PyTorch.
    """
    batch, rows, heads, dim = query.shape
    device = query.device
    out = torch.zeros_like(query)
    lse = query.new_full((batch, heads, rows), -torch.inf)
    block_size = block_size or max(rows, 1)
    for b, (key, value) in enumerate(zip(keys, values, strict=True)):
        length = len(key)
        token = torch.arange(length, device=device)
        row = torch.arange(rows, device=device)[:, None]
        begin = length - rows + row // block_size * block_size
        end = (begin + block_size).clamp(max=length)
        sees = (token < end) & (length - rows + row >= 0)
        if window is not None:
            sees &= (token < sink) | (token >= end - window)
        sees &= (token < sink) | (token >= length - (slots - sink))
        group = heads // key.shape[1]
        for h in range(heads):
            logits = query[b, :, h] @ key[:, h // group].T
            logits = logits * (dim**-0.5 if softmax_scale is None else softmax_scale)
            if key_bias is not None:
                stop = begin if key_bias.stop is None else key_bias.stop
                biased = (token >= key_bias.start) & (token < stop)
                logits = torch.where(biased, logits + key_bias.bias, logits)
            logits = logits.masked_fill(~sees, -torch.inf)
            seen = sees.any(1)
            out[b, seen, h] = logits[seen].softmax(-1) @ value[:, h // group]
            lse[b, h] = logits.logsumexp(-1)
    return out, lse


def assert_within_budget(
    actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor, what: str = "output"
) -> None:
    """Assert that `actual` is at most twice as far from `exact` (float64) as `same_dtype` is.

    One rounding of the largest value is added: where plain PyTorch happens to be exact, nothing
    else could pass. In float32 it is four, of 1 at least: a GPU's own exp2 and log2 are within
    2^-22, two roundings each (PTX ISA, ex2.approx and lg2.approx). Values that are not finite must
    be the same in `actual` as in `exact`. Source: flash-attention's test suite.
    """
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, not {exact.shape}"
    assert actual.dtype == same_dtype.dtype, f"{what}: {actual.dtype}, not {same_dtype.dtype}"
    finite = exact.isfinite()
    other = torch.where(finite, 0, exact)
    got = torch.where(finite, 0, actual.to(exact))
    assert torch.equal(got.nan_to_num(7.0), other.nan_to_num(7.0)), f"{what}: other infinities"
    if not finite.any():
        return
    error = (actual.to(exact) - exact)[finite].abs().max().item()
    allowed = 2 * (same_dtype.to(exact) - exact)[finite].abs().max().item()
    rounding = torch.finfo(actual.dtype).eps
    largest = exact[finite].abs().max().item()
    allowed += 4 * rounding * max(largest, 1.0) if rounding < 2**-22 else rounding * largest
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def signal_to_noise(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the signal to noise of `out` in dB: 10 log10(|exact|^2 / |out - exact|^2).

    NaN where `out` has one, so that `>=` fails.
    """
    noise = (out - exact).square().sum() / exact.square().sum()
    return -10 * noise.log10().item()


@functools.cache
def fails_alone(implementation: str, seconds: float = 90.0) -> str:
    """Return "" or how attention by `implementation` fails on this GPU in a process of its own.

    A kernel that waits for ever ends with its process alone: what no GPU has run yet is tried so
    before others share a process with it. Tiles of several key blocks fill the machine more than
    once: where programs share tiles, that is part of it.
    """
    code = f"from sdvg_kernels import testing; testing._attend_alone({implementation!r})"
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"it did not come back within {seconds:g} s"
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return f"it failed in a process of its own: {said[-1]}" if done.returncode else ""


def _attend_alone(implementation: str) -> None:
    """Assert that one frame of Wan 1.3B over three is within its budget, in 8 bits to 25 dB."""
    random = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, tokens, 12, 128, generator=random, device="cuda").bfloat16()
        for tokens in (1560, 4680, 4680)
    )
    lengths = torch.full((1,), 4680, dtype=torch.int32, device="cuda")
    eight_bits = implementation == "hopper_fp8"
    caches = {"k_cache": key, "v_cache": value}
    if eight_bits:
        caches = e4m3.quantised_cache(key, value).arguments()
    out = block_causal_attention(
        query, **caches, cache_seqlens=lengths, implementation=implementation
    )
    plain, exact = (
        block_causal_attention(
            *(tensor.to(dtype) for tensor in (query, key, value)),
            lengths,
            implementation="reference",
        )
        for dtype in (torch.bfloat16, torch.float64)
    )
    if eight_bits:
        decibels = signal_to_noise(out, exact)
        assert decibels >= 25, f"signal to noise is {decibels:.1f} dB"
    else:
        assert_within_budget(out, plain, exact)


# --- self-check ---


def main() -> int:
    """Check every lane of this machine on a few inputs; print a table; return 1 if one is wrong."""
    # it imports this module
    from sdvg_kernels import _self_check_tokens as _tokens

    failed = False
    for lane in lanes():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for rows, sink, window, block_size in ((7, 0, None, None), (40, 3, 24, 16)):
                what = f"block_causal_attention {lane.name} {str(dtype)[6:]} T={rows}"
                failed |= not _report(
                    what, _check_attention, lane, dtype, rows, sink, window, block_size
                )
            what = f"diagonal_attention {lane.name} {str(dtype)[6:]}"
            failed |= not _report(what, _tokens.check_diagonal, lane, dtype)
            what = f"tree_attention {lane.name} {str(dtype)[6:]}"
            failed |= not _report(what, _tokens.check_tree_attention, lane, dtype)
            what = f"norm_rope_stage_ {lane.name} {str(dtype)[6:]}"
            failed |= not _report(what, _check_rope, lane, dtype)
            what = f"gated_residual_layer_norm {lane.name} {str(dtype)[6:]}"
            failed |= not _report(what, _check_modulation, lane, dtype)
            if lane.device == "cpu" or not implementations()["quantize"][lane.implementation]:
                what = f"quantize_rows {lane.name} {str(dtype)[6:]}"
                failed |= not _report(what, _check_quantize, lane, dtype)
            what = f"rms_norm_silu {lane.name} {str(dtype)[6:]}"
            failed |= not _report(what, _check_norm_silu, lane, dtype)
            what = f"preprocess_frames {lane.name} {str(dtype)[6:]}"
            failed |= not _report(what, _check_frames, lane, dtype)
        failed |= not _report(f"route_blocks {lane.name}", _check_routing, lane)
        failed |= not _report(f"sample_tokens {lane.name}", _tokens.check_sampling, lane)
        failed |= not _report(f"verify_* {lane.name}", _tokens.check_verification, lane)
        failed |= not _report(f"expand_tree, build_tree {lane.name}", _tokens.check_tree, lane)
        failed |= not _report(f"steps of a tree {lane.name}", _tokens.check_tree_step, lane)
    cache_lanes = [] if host_lane_missing() else [("host", "cpu")]
    if torch.cuda.is_available():
        cache_lanes += [("reference", "cuda")]
        cache_lanes += [] if host_lane_missing() else [("cuda", "cuda")]
    for implementation, device in cache_lanes:
        what = f"cache ops {implementation} on {device}"
        failed |= not _report(what, _check_cache, implementation, device)
    return int(failed)


def _report(what: str, check: Callable[..., None], *arguments: object) -> bool:
    """Run a check, print a line, and return whether it held."""
    try:
        check(*arguments)
    except AssertionError as error:
        print(f"{what:50} WRONG: {error}")
        return False
    print(f"{what:50} ok")
    return True


def _check_attention(
    lane: Lane, dtype: torch.dtype, rows: int, sink: int, window: int | None, block_size: int | None
) -> None:
    """Assert that attention over a full and a wrapped ring is within its budget."""
    random = torch.Generator().manual_seed(0)
    keys, values = (
        [torch.randn(length, 2, 64, generator=random, dtype=torch.float64) for length in (50, 97)]
        for _ in range(2)
    )
    query = torch.randn(2, rows, 4, 64, generator=random, dtype=torch.float64)
    query, *tokens = (tensor.to(lane.device, dtype) for tensor in (query, *keys, *values))
    keys, values = tokens[:2], tokens[2:]
    options = {"sink": sink, "window": window, "block_size": block_size}
    out = block_causal_attention(
        query, *ring_cache(keys, values, 70, sink), **options, implementation=lane.implementation
    )
    plain, _ = logical_attention(query, keys, values, slots=70, **options)
    exact, _ = logical_attention(
        query.double(),
        [key.double() for key in keys],
        [value.double() for value in values],
        slots=70,
        **options,
    )
    assert_within_budget(out, plain, exact)


def _check_rope(lane: Lane, dtype: torch.dtype) -> None:
    """Assert that a block is rotated within its budget and lies in the slots of a wrapped ring."""
    random = torch.Generator().manual_seed(0)
    grid, length, sink, slots = (2, 1, 3), 34, 3, 12
    wide = [torch.randn(1, 6, heads, 128, generator=random).double() for heads in (4, 2, 2)]
    query, key, value = (tensor.to(lane.device, dtype) for tensor in wide)
    wide = [tensor.double() for tensor in (query, key)]
    tables = [rope_table(64, 128, dtype=kind) for kind in (torch.float32, torch.float64)]
    tables = [table.to(lane.device) for table in tables]
    caches = [torch.full((1, slots, 2, 128), torch.nan).to(key) for _ in range(2)]
    lengths = torch.tensor([length], dtype=torch.int32, device=lane.device)
    weights = {
        "query_weight": torch.rand(512, generator=random).to(query),
        "key_weight": torch.rand(256, generator=random).to(query),
    }
    options = {"start_frame": 11, "implementation": lane.implementation}
    out = norm_rope_stage_(
        query, key, value, *caches, lengths, tables[0], grid, **weights, sink=sink, **options
    )
    options["implementation"] = "reference"
    exact = norm_rope(
        *wide, tables[1], grid, **{name: x.double() for name, x in weights.items()}, **options
    )
    # plain PyTorch rounds the norm's output, then what is rotated
    normed = [
        F.rms_norm(x.flatten(2), (x[0, 0].numel(),), weight, 1e-6).view_as(x).double()
        for x, weight in zip((query, key), weights.values(), strict=True)
    ]
    plain = [x.to(dtype) for x in norm_rope(*normed, tables[1], grid, **options)]
    token = torch.arange(length, length + 6, device=lane.device)
    slot = sink + (token - sink) % (slots - sink)
    assert_within_budget(out, plain[0], exact[0], "query")
    assert_within_budget(caches[0][:, slot], plain[1], exact[1], "key")
    assert torch.equal(caches[1][:, slot], value), "V is not the value"
    for name, cache in zip("KV", caches, strict=True):
        cache[:, slot] = torch.nan
        assert cache.isnan().all(), f"{name}: another slot was written"


def _check_modulation(lane: Lane, dtype: torch.dtype) -> None:
    """Assert that a gated residual and its modulated norm are within their budgets."""
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 9, 640, generator=random).to(lane.device, dtype) for _ in range(2))
    rows = torch.randn(2, 3, 6, 640, generator=random).to(lane.device)
    table = torch.randn(6, 640, generator=random).to(lane.device)
    residual, normed = gated_residual_layer_norm(
        x, y, *((rows[:, :, i], table[i]) for i in range(3)), implementation=lane.implementation
    )

    def plain(wide: torch.dtype, rounded: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        each = (rows.to(wide) + table.to(wide)).repeat_interleave(3, 1)
        gate, shift, scale = each[:, :, :3].unbind(2)
        summed = (x.to(wide) + y.to(wide) * gate).to(rounded)
        # the norm is of the residual as it was stored
        norm = F.layer_norm(residual.to(wide), (640,), eps=1e-6) * (1 + scale) + shift
        return summed, norm.to(rounded)

    names = ("residual", "norm")
    exact = plain(torch.float64, torch.float64)
    for name, *values in zip(
        names, (residual, normed), plain(torch.float32, dtype), exact, strict=True
    ):
        assert_within_budget(*values, name)


def _check_quantize(lane: Lane, dtype: torch.dtype) -> None:
    """Assert that rows are rounded, bit for bit, as the reference rounds them on the CPU."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 600, generator=random).to(dtype)
    x[1] = 0
    out = quantize_rows(x.to(lane.device), implementation=lane.implementation)
    expected = quantize_rows(x, implementation="reference")
    for name, got, want in zip(("values", "scales"), out, expected, strict=True):
        assert torch.equal(got.cpu().float(), want.float()), f"{name} are not the reference's"


def _check_norm_silu(lane: Lane, dtype: torch.dtype) -> None:
    """Assert that a sum and the SiLU of its norm are within their budgets."""
    random = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 50, 96, generator=random).to(lane.device, dtype) for _ in "xr")
    weight, bias = (torch.randn(96, generator=random).to(lane.device, dtype) for _ in "wb")
    total = torch.empty_like(x)
    added = {"bias": bias, "residual": residual, "total": total}
    out = rms_norm_silu(x, weight, **added, implementation=lane.implementation)

    def plain(wide: torch.dtype, rounded: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        summed = (x.to(wide) + bias.to(wide) + residual.to(wide)).to(rounded)
        # the norm is of the sum as it was stored
        norm = F.normalize(total.to(wide), dim=-1) * 96**0.5 * weight.to(wide)
        return summed, F.silu(norm).to(rounded)

    exact = plain(torch.float64, torch.float64)
    for name, *values in zip(
        ("sum", "norm"), (total, out), plain(torch.float32, dtype), exact, strict=True
    ):
        assert_within_budget(*values, name)


def _check_frames(lane: Lane, dtype: torch.dtype) -> None:
    """Assert that frames become, bit for bit, what the reference makes of them on the CPU."""
    random = torch.Generator().manual_seed(0)
    video = torch.randn(1, 3, 2, 50, 83, generator=random).to(dtype)
    out = preprocess_frames(video.to(lane.device), 35, implementation=lane.implementation)
    same = torch.equal(out.cpu(), preprocess_frames(video, 35, implementation="reference"))
    assert same, "the levels are not the reference's"


def _check_routing(lane: Lane) -> None:
    """Assert that a threshold, a NaN and a first block decide as they should."""
    rewards = torch.tensor(
        [[0.5, 0.7], [0.1, 2.0], [torch.nan, 1.0], [1.0, 1.0]], device=lane.device
    )
    first = torch.tensor([False, False, False, True], device=lane.device)
    accept = route_blocks(rewards, 0.5, first, implementation=lane.implementation)
    assert accept.tolist() == [True, False, False, False], f"accept is {accept.tolist()}"


def _check_cache(implementation: str, device: str) -> None:
    """Assert that the cache ops leave, bit for bit, what the reference leaves on the CPU."""
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(3, 2, 9, 2, 8, generator=random) for _ in range(2)]
    made += [torch.randn(3, 2, 4, 2, 8, generator=random) for _ in range(2)]

    def run(how: str, where: str) -> list[torch.Tensor]:
        # one sequence within the sink, one after several rounds
        lengths = torch.tensor([1, 30], dtype=torch.int32, device=where)
        accept = torch.tensor([True, False], device=where)
        path = torch.tensor([[2, 0, -1], [3, 1, 2]], dtype=torch.int32, device=where)
        k, v, key, value = (tensor.to(where, copy=True) for tensor in made)
        undo = torch.empty_like(key), torch.empty_like(value)
        stage_(k, v, key, value, lengths, sink=2, undo=undo, implementation=how)
        rollback_(k, v, lengths, accept, undo, sink=2, implementation=how)
        commit_(lengths, accept, 4, implementation=how)
        compact_(k, v, lengths, path, sink=2, implementation=how)
        select_(accept, [key[0]], [value[0]], implementation=how)
        return [tensor.cpu() for tensor in (k, v, *undo, lengths, key)]

    names = ("k_cache", "v_cache", "undo[0]", "undo[1]", "lengths", "draft")
    for name, got, want in zip(
        names, run(implementation, device), run("reference", "cpu"), strict=True
    ):
        assert torch.equal(got, want), f"{name} is not what the reference leaves"


if __name__ == "__main__":
    sys.exit(main())
