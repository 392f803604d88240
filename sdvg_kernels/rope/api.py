"""`norm_rope`, `norm_rope_stage_`: QK-norm over all heads, 3-D RoPE, and the cache write, fused."""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import TypeAlias

import torch

from sdvg_kernels import _ops
from sdvg_kernels._check import message, require_implementation, triton_reason
from sdvg_kernels.rope import reference

HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_REMEDY = "call .contiguous()"
# one program holds a row's query and key in registers
MAX_CHANNELS = 8192
E4M3 = torch.float8_e4m3fn
_LOG = logging.getLogger("sdvg_kernels")

# (frames, height, width) of the tokens of a call
Grid: TypeAlias = tuple[int, int, int]


def rope_table(
    max_positions: int,
    head_dim: int,
    theta: float = 10000.0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Return the cosines and sines of Wan's 3-D RoPE, from float64 angles, rounded once.

    With `c = head_dim // 2` pairs of channels, the first `c - 2 * (c // 3)` turn with the frame,
    the next `c // 3` with the row, the last `c // 3` with the column (22, 21, 21 of 64). Pair `i`
    of the `n` of an axis turns by `position * theta ** (-i / n)` radians.

    Args:
        max_positions: frames, rows and columns that have an angle: positions below it.
        head_dim: even.
        theta: the base of the angles.
        dtype: torch.float32; torch.float64 for the reference on float64 tensors.
        device: where the table lies.

    Returns:
        [max_positions, head_dim]: row p holds the cosines of position p for all pairs, then the
        sines (the layout that vLLM and FlashInfer call cos_sin_cache).

    Raises: ValueError (value), TypeError (dtype).
    Source: Wan2.1 (rope_params, rope_apply), which keeps the same angles in complex128.
    """
    op = "rope_table"
    if max_positions < 1:
        raise _value(op, "max_positions", "be at least 1", max_positions)
    if head_dim < 2 or head_dim % 2:
        raise _value(op, "head_dim", "be even and at least 2", head_dim)
    if not theta > 0:
        raise _value(op, "theta", "be positive", theta)
    if dtype not in (torch.float32, torch.float64):
        raise _type(op, "dtype", "be float32 or float64", dtype)
    return reference.rope_table(max_positions, head_dim, theta, dtype, device)


def norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    table: torch.Tensor,
    grid: Grid,
    *,
    query_weight: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    start_frame: int | torch.Tensor = 0,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of query and key over all heads' channels, then interleaved 3-D RoPE.

    Equals, for query with H heads and for key with Hk, in float32 and rounded once:

        x = F.rms_norm(x.flatten(2), (H * D,), weight, eps).unflatten(2, (H, D))
        a, b = x[..., 0::2], x[..., 1::2]
        x[..., 0::2], x[..., 1::2] = a * cos - b * sin, a * sin + b * cos

    Token `i` is at frame `start_frame + i // (height * width)`, row `i // width % height` and
    column `i % width`; cos and sin are the rows of `table` at these three, each for its own pairs.
    A frame that the table does not have is a ValueError where the host knows it; where only the
    device does, the channels that turn with the frame are NaN.

    Args:
        query: [B, T, H, D], D 64 or 128 (the reference: any even one), bfloat16, float16 or float32
            (the reference: float64 too).
        key: [B, T, Hk, D] of query's dtype. Both may have any strides with a dense last dim: views
            of one fused projection are fine.
        table: [P, D] of `rope_table`, float32 (float64 with float64 query).
        grid: (frames, height, width) of the tokens, `T = frames * height * width`; any number of
            blocks.
        query_weight, key_weight: [H * D], [Hk * D], of one floating dtype; None, both: no norm.
        eps: added to the mean square.
        start_frame: the first token's frame: an int, or [B] int32 on query's device, one for each
            sequence and read by the kernel.
        implementation: "triton" or "reference"; one that is asked for never falls back. None:
            Triton on CUDA for head dim 64 and 128 and up to 8192 channels, else the reference, and
            a warning is logged.

    Returns:
        rotated query [B, T, H, D] and key [B, T, Hk, D], contiguous, in query's dtype.

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here).

    Deterministic; no host synchronisation; safe in a CUDA graph.
    Source: Wan2.1's WanSelfAttention; Self-Forcing's causal_rope_apply (arXiv 2506.08009).
    Cost: reads and writes query and key once.
    """
    op = "norm_rope"
    _check_rows(op, query, key, table, grid, query_weight, key_weight, start_frame)
    per_sequence = isinstance(start_frame, torch.Tensor)
    frame, offsets = (0, start_frame) if per_sequence else (start_frame, None)
    return torch.ops.sdvg_kernels.norm_rope(
        query,
        key,
        table,
        query_weight,
        key_weight,
        eps,
        grid[1],
        grid[2],
        frame,
        offsets,
        _choose(op, query, None, implementation),
    )


def norm_rope_stage_(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    grid: Grid,
    *,
    query_weight: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    start_frame: int | torch.Tensor | None = None,
    sink: int = 0,
    cache_batch_idx: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """`norm_rope`, with the rotated key and the value written into a ring KV cache.

    Equals, for each sequence i, with b = cache_batch_idx[i] (default i):

        query, key = norm_rope(query, key, ...)
        slot = slots_of(lengths[b] + arange(T))      # t, or sink + (t - sink) % (S - sink)
        k_cache[b, slot], v_cache[b, slot] = key[i], value[i]

    With e4m3 caches each row of D values, in float32, is multiplied by `448 / amax`, rounded to
    nearest even, and written with the factor `amax * (1 / 448)` beside it: `k_cache * k_scale` is
    the key. Both factors are 1 where no value reaches 2^-100. Rows are staged, not committed:
    `lengths` stays. There is no undo log; to keep the rows that are overwritten, call `norm_rope`,
    then `stage_` with `undo=`.

    Args:
        query, key, table, grid, query_weight, key_weight, eps, implementation: as of `norm_rope`;
            `T <= S - sink`.
        value: [B, T, Hk, D] of query's dtype, any strides with a dense last dim.
        k_cache, v_cache: [Bc, S, Hk, D] of query's dtype or both float8_e4m3fn (Triton: compute
            capability 8.9), any strides with a dense last dim; a layer of a [layers, Bc, S, Hk, D]
            cache. An e4m3 v_cache may lie transposed, as `block_causal_attention` by "hopper_fp8"
            reads it: `v.permute(0, 3, 1, 2)` of a v [Bc, Hk, D, S]; a row's bytes are then apart.
        lengths: [Bc] int32 on query's device, contiguous: committed tokens of each cached sequence;
            the first staged token comes after them.
        start_frame: as of `norm_rope`; None: `lengths[b] // (height * width)`, the frame that the
            sequence has come to.
        sink: first tokens that are never evicted, `0 <= sink < S`.
        cache_batch_idx: [B] int32, the cache row of each sequence, distinct; None: row b, and
            `Bc == B`.
        k_scale, v_scale: [Bc, S, Hk] float32, contiguous; with e4m3 caches, and only with them.

    Values on the device are preconditions: cache_batch_idx distinct and in range, lengths at least
    0. Broken, they are a ValueError of the reference on the CPU; Triton writes nothing for a
    sequence that the cache does not have, and its query is NaN.

    Returns:
        rotated query [B, T, H, D], contiguous.

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here).

    Mutates: k_cache, v_cache, k_scale, v_scale at the staged slots, and nothing else.
    Deterministic; no host synchronisation; safe in a CUDA graph.
    Cost: reads query, key and value once, writes as many values once.
    """
    op = "norm_rope_stage_"
    _check_rows(op, query, key, table, grid, query_weight, key_weight, start_frame)
    _check_cache(op, query, key, value, k_cache, v_cache, lengths, sink, cache_batch_idx)
    _check_scales(op, k_cache, k_scale, v_scale)
    per_sequence = isinstance(start_frame, torch.Tensor)
    frame, offsets = (0, start_frame) if per_sequence else (start_frame, None)
    return torch.ops.sdvg_kernels.norm_rope_stage_(
        query,
        key,
        value,
        k_cache,
        v_cache,
        lengths,
        table,
        query_weight,
        key_weight,
        k_scale,
        v_scale,
        eps,
        grid[1],
        grid[2],
        frame,
        offsets,
        sink,
        cache_batch_idx,
        _choose(op, query, k_cache.dtype, implementation),
    )


# the checks build a message only when it is raised: both ops run once per layer and step


def _value(op: str, argument: str, rule: str, got: object, remedy: str = "") -> ValueError:
    return ValueError(message(op, argument, rule, got, remedy))


def _type(op: str, argument: str, rule: str, got: object) -> TypeError:
    return TypeError(message(op, argument, rule, got))


def _check_rows(
    op: str,
    query: torch.Tensor,
    key: torch.Tensor,
    table: torch.Tensor,
    grid: Grid,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    start_frame: int | torch.Tensor | None,
) -> None:
    """Raise unless what both ops take is as their contract says."""
    shape, dtype, device = query.shape, query.dtype, query.device
    if len(shape) != 4 or shape[2] < 1 or shape[3] < 2 or shape[3] % 2:
        raise _value(op, "query", "be [B, T, H, D] with heads and an even D", shape)
    if dtype not in DTYPES and dtype != torch.float64:
        raise _type(op, "query", "be bfloat16, float16, float32 or float64", dtype)
    batch, rows, heads, dim = shape
    _check_tensor(op, "key", key, dtype, device)
    other = key.shape
    alike = len(other) == 4 and other[0] == batch and other[1] == rows and other[3] == dim
    if not alike or other[2] < 1 or heads % other[2]:
        rule = f"be [B, T, Hk, D] = [{batch}, {rows}, Hk, {dim}] with Hk a divisor of H = {heads}"
        raise _value(op, "key", rule, other)
    if query.stride(3) != 1 or key.stride(3) != 1:
        name = "key" if query.stride(3) == 1 else "query"
        raise _value(op, name, "be contiguous in the last dim", "another stride", _REMEDY)
    table_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    _check_tensor(op, "table", table, table_dtype, device)
    if table.dim() != 2 or table.shape[1] != dim or not table.shape[0] or not table.is_contiguous():
        raise _value(op, "table", f"be [P, D = {dim}], contiguous, as of rope_table", table.shape)
    sound = len(grid) == 3 and grid[0] >= 0 and grid[1] >= 1 and grid[2] >= 1
    if not sound or grid[0] * grid[1] * grid[2] != rows:
        rule = f"be (frames, height, width) of T = {rows} tokens"
        raise _value(op, "grid", rule, tuple(grid))
    if (query_weight is None) != (key_weight is None):
        given = "query_weight" if key_weight is None else "key_weight"
        raise _value(op, "query_weight and key_weight", "be given both or neither", f"only {given}")
    if query_weight is not None and key_weight is not None:
        for name, weight, channels in (
            ("query_weight", query_weight, heads * dim),
            ("key_weight", key_weight, other[2] * dim),
        ):
            if weight.shape != (channels,) or not weight.is_contiguous():
                raise _value(op, name, f"be [{channels}], contiguous", weight.shape)
            if not weight.dtype.is_floating_point:
                raise _type(op, name, "be floating", weight.dtype)
            if weight.device != device:
                raise _value(op, name, "be on query's device", weight.device)
        if query_weight.dtype is not key_weight.dtype:
            raise _type(op, "key_weight", "have query_weight's dtype", key_weight.dtype)
    _check_positions(op, start_frame, grid, table.shape[0], batch, device)


def _check_positions(
    op: str,
    start_frame: int | torch.Tensor | None,
    grid: Grid,
    places: int,
    batch: int,
    device: torch.device,
) -> None:
    """Raise unless the table has the positions, as far as the host knows them."""
    if max(grid) > places:
        rule = f"stay within the table's {places} positions"
        raise _value(op, "grid", rule, tuple(grid), "make a longer rope_table")
    if isinstance(start_frame, torch.Tensor):
        _check_index(op, "start_frame", start_frame, batch, device)
    elif start_frame is not None and not 0 <= start_frame <= places - grid[0]:
        rule = f"lie in [0, {places - grid[0]}], so that the table holds {grid[0]} frames from it"
        raise _value(op, "start_frame", rule, start_frame, "make a longer rope_table")


def _check_index(
    op: str, name: str, tensor: torch.Tensor, count: int, device: torch.device, size: str = "B"
) -> None:
    """Raise unless the tensor is [count] int32, contiguous, on the device."""
    if tensor.dtype is not torch.int32:
        raise _type(op, name, "be int32", tensor.dtype)
    if tensor.shape != (count,) or not tensor.is_contiguous():
        raise _value(op, name, f"be [{size}], contiguous, with {size} = {count}", tensor.shape)
    if tensor.device != device:
        raise _value(op, name, "be on query's device", tensor.device)


def _check_tensor(
    op: str, name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.dtype is not dtype:
        rule = f"be {dtype}" if name == "table" else f"have query's dtype {dtype}"
        raise _type(op, name, rule, tensor.dtype)
    if tensor.device != device:
        raise _value(op, name, "be on query's device", tensor.device)


def _check_cache(
    op: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    sink: int,
    cache_batch_idx: torch.Tensor | None,
) -> None:
    """Raise unless value, caches and what says where they are written fit query and key."""
    device, shape, cached = query.device, key.shape, k_cache.shape
    _check_tensor(op, "value", value, query.dtype, device)
    if value.shape != shape:
        raise _value(op, "value", f"have key's shape {list(shape)}", value.shape)
    fits = len(cached) == 4 and cached[2] == shape[2] and cached[3] == shape[3]
    if not fits or cached[1] < 1:
        rule = f"be [Bc, S, Hk, D] with key's Hk, D = {list(shape[2:])} and at least one slot"
        raise _value(op, "k_cache", rule, cached)
    if v_cache.shape != cached:
        raise _value(op, "v_cache", f"have k_cache's shape {list(cached)}", v_cache.shape)
    if k_cache.dtype is not query.dtype and k_cache.dtype is not E4M3:
        raise _type(op, "k_cache", "have query's dtype or be float8_e4m3fn", k_cache.dtype)
    if v_cache.dtype is not k_cache.dtype:
        raise _type(op, "v_cache", "have k_cache's dtype", v_cache.dtype)
    if k_cache.device != device or v_cache.device != device:
        got = f"{k_cache.device} and {v_cache.device}"
        raise _value(op, "k_cache and v_cache", "be on query's device", got)
    transposed = v_cache.dtype is E4M3 and v_cache.stride(1) == 1
    dense = v_cache.stride(3) == 1 or transposed
    if value.stride(3) != 1 or k_cache.stride(3) != 1 or not dense:
        which, rule = "value, k_cache and v_cache", "be contiguous in the last dim"
        raise _value(op, which, rule, "another stride", _REMEDY)
    if not 0 <= sink < cached[1]:
        raise _value(op, "sink", f"be at least 0 and less than S = {cached[1]}", sink)
    if shape[1] > cached[1] - sink:
        raise _value(op, "query", f"have at most S - sink = {cached[1] - sink} tokens", shape[1])
    _check_index(op, "lengths", lengths, cached[0], device, "Bc")
    if cache_batch_idx is not None:
        _check_index(op, "cache_batch_idx", cache_batch_idx, shape[0], device)
    elif cached[0] != shape[0]:
        rule, remedy = f"have query's B = {shape[0]}", "or pass cache_batch_idx"
        raise _value(op, "k_cache", rule, cached, remedy)


def _check_scales(
    op: str, k_cache: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None
) -> None:
    """Raise unless both scales are there with e4m3 caches, and neither without."""
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is None) == (k_cache.dtype is E4M3):
            rule = "be given with float8_e4m3fn caches and only with them"
            got = f"{'none' if scale is None else 'one'} for {k_cache.dtype}"
            raise _value(op, name, rule, got)
        if scale is not None:
            if scale.shape != k_cache.shape[:3] or not scale.is_contiguous():
                rule = f"be [Bc, S, Hk] = {list(k_cache.shape[:3])}, contiguous"
                raise _value(op, name, rule, scale.shape)
            if scale.dtype is not torch.float32:
                raise _type(op, name, "be float32", scale.dtype)
            if scale.device != k_cache.device:
                raise _value(op, name, "be on query's device", scale.device)


def _choose(
    op: str,
    query: torch.Tensor,
    stored: torch.dtype | None,
    implementation: str | None,
) -> str:
    """Return which implementation runs; a reference that nobody asked for is logged once."""
    device = query.device
    heads, dim = query.shape[2:]
    available = _available(device, heads, dim, query.dtype, stored is E4M3)
    if implementation is None:
        chosen = next(iter(available))
        if not (reason := available[chosen]):
            return chosen
        _warn_once(op, device.type, reason)
    where = f"{device.type} tensors of {heads} x {dim} channels and {query.dtype}"
    return require_implementation(op, implementation, available, where)


@functools.cache
def _available(
    device: torch.device, heads: int, dim: int, dtype: torch.dtype, e4m3: bool
) -> dict[str, str]:
    """Return implementation -> "" or why it cannot run on such tensors, by preference."""
    reason = triton_reason(device.type)
    if not reason and dim not in HEAD_DIMS:
        reason = f"the Triton kernel has head dim {' and '.join(map(str, HEAD_DIMS))}"
    if not reason and heads * dim > MAX_CHANNELS:
        reason = f"the Triton kernel has at most {MAX_CHANNELS} channels"
    if not reason and dtype not in DTYPES:
        reason = f"the Triton kernel has no {dtype}"
    if not reason and e4m3 and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            reason = "e4m3 needs compute capability 8.9, this device has {}.{}".format(*capability)
    if device.type == "cpu":
        # the interpreter is for tests: never the default
        return {"reference": "", "triton": reason}
    return {"triton": reason, "reference": ""}


@functools.cache
def _warn_once(op: str, device: str, reason: str) -> None:
    _LOG.warning("%s: the reference serves %s tensors here: %s", op, device, reason)


def implementations() -> dict[str, str]:
    """Return implementation -> "" or why it is not available here, by preference."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        return dict(_available(device, 1, HEAD_DIMS[0], DTYPES[0], False))
    return {"triton": "no CUDA device is available", "reference": ""}


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    table: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
    height: int,
    width: int,
    start_frame: int,
    frame_offsets: torch.Tensor | None,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the chosen implementation of `norm_rope`."""
    return _module(implementation).norm_rope(
        query,
        key,
        table,
        query_weight,
        key_weight,
        eps=eps,
        height=height,
        width=width,
        start_frame=start_frame,
        frame_offsets=frame_offsets,
    )


def _run_stage(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    eps: float,
    height: int,
    width: int,
    start_frame: int | None,
    frame_offsets: torch.Tensor | None,
    sink: int,
    cache_batch_idx: torch.Tensor | None,
    implementation: str,
) -> torch.Tensor:
    """Run the chosen implementation of `norm_rope_stage_`."""
    return _module(implementation).norm_rope_stage_(
        query,
        key,
        value,
        k_cache,
        v_cache,
        lengths,
        table,
        query_weight,
        key_weight,
        k_scale,
        v_scale,
        eps=eps,
        height=height,
        width=width,
        start_frame=start_frame,
        frame_offsets=frame_offsets,
        sink=sink,
        cache_batch_idx=cache_batch_idx,
    )


def _module(implementation: str) -> ModuleType:
    if implementation == "reference":
        return reference
    from sdvg_kernels.rope import kernel

    return kernel


_ops.implement("norm_rope", cpu=_run, cuda=_run)
_ops.implement("norm_rope_stage_", cpu=_run_stage, cuda=_run_stage)
