"""`sample_tokens`: from many rows of logits to token ids in one launch, where they are wanted."""

from __future__ import annotations

import functools
import math

import torch

from sdvg_kernels import _ops
from sdvg_kernels._check import (
    by_preference,
    require,
    require_dtype,
    require_implementation,
    triton_reason,
)
from sdvg_kernels.sampling import reference

_OP = "sample_tokens"
_value = functools.partial(require, _OP)
_type = functools.partial(require_dtype, _OP)
_INTEGERS = (torch.int32, torch.int64)


def sample_tokens(
    logits: torch.Tensor,
    *,
    seeds: torch.Tensor | None = None,
    sequences: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    uncond: torch.Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    out: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Sample one token id for each row, by noise that is keyed: what ran before leaves no trace.

    Equals, row by row, with `E` standard exponential noise (an exponential race):

        x = uncond + guidance * (logits - uncond)          # where there is `uncond`; in float32
        x = TopPLogitsWarper(top_p)(TopKLogitsWarper(top_k)(x / temperature))
        token = (x - E.log()).argmax()                     # temperature 0: x.argmax()

    in the order of transformers' warpers. Tokens tied with the k-th largest logit, or with the last
    of the top-p mass, are all kept; of equal scores the lowest id wins. A token of -inf in `logits`
    is never chosen, whatever `uncond` says. A row that has no distribution (it holds NaN, or its
    largest logit is not finite) gives -1.

    `E = -log(1 - (bits + 1/2) / 2^32)`, the bits of token `v` being word `v % 4` of Philox 4x32-10
    with key `seeds` and counter `(v // 4, positions, sequences, 0)`. Top-k and greedy choices are
    exact everywhere; masses and the race are computed in float32 by Triton, float64 by the
    reference.

    Args:
        logits: [N, V] floating, any strides, 1 <= V < 2^31. Float64 is rounded to float32.
        seeds, sequences, positions: [N] integers that key the noise, in their low 64, 32 and 32
            bits: int64, int32 or int64, int32 or int64. Not needed at temperature 0.
        uncond: [N, V] logits without the condition, of logits' dtype.
        guidance: 1 is no guidance; needs `uncond` otherwise.
        temperature: 0 takes the likeliest token.
        top_k: how many tokens stay; None: all.
        top_p: the mass of what stays, in (0, 1].
        out: contiguous int32 or int64, any shape; None: a new [N] int64.
        index: [N] int32 or int64, row r goes to `out.view(-1)[index[r]]`; no two to one place. A
            row whose index lies outside (-1, say) is not computed. None: row r goes to place r.
        implementation: "triton" or "reference"; None: Triton on CUDA, else the reference.

    Returns:
        `out`.

    Raises:
        ValueError (shape, value), TypeError (dtype), NotImplementedError (cannot run here).

    Mutates: `out`.
    Deterministic; no host synchronisation; safe in a CUDA graph.
    Cost: one program a row. A row of up to 16384 tokens is read twice, and thresholds are searched
    in registers; a longer one is read once for each of the up to 32 steps of a search.
    """
    shape = logits.shape
    _value(
        len(shape) == 2 and 0 < shape[1] < 2**31, "logits", "be [N, V] with 1 <= V < 2^31", shape
    )
    _type(logits.dtype.is_floating_point, "logits", "be floating", logits.dtype)
    device, rows = logits.device, shape[0]
    good = 0 <= temperature < math.inf
    _value(good, "temperature", "be finite and at least 0", temperature)
    _value(math.isfinite(guidance), "guidance", "be finite", guidance)
    _value(top_k is None or top_k >= 1, "top_k", "be at least 1", top_k, "None keeps all tokens")
    _value(0 < top_p <= 1, "top_p", "lie in (0, 1]", top_p)
    if uncond is None:
        _value(guidance == 1, "guidance", "be 1 without uncond", guidance, "give uncond")
    else:
        _value(uncond.shape == shape, "uncond", "have the shape of logits", uncond.shape)
        same = uncond.dtype is logits.dtype
        _type(same, "uncond", "have the dtype of logits", uncond.dtype)
        _value(uncond.device == device, "uncond", "be on logits' device", uncond.device)
    keys = (("seeds", seeds), ("sequences", sequences), ("positions", positions))
    for name, key in keys:
        if key is None:
            _value(temperature == 0, name, "be given unless temperature is 0", None)
            continue
        _integers(name, key, rows, device)
    if seeds is not None:
        _type(seeds.dtype == torch.int64, "seeds", "be int64", seeds.dtype)
    if out is None:
        _value(index is None, "index", "come with out", "it alone", "give out")
        out = torch.empty(rows, dtype=torch.int64, device=device)
    else:
        _type(out.dtype in _INTEGERS, "out", "be int32 or int64", out.dtype)
        _value(out.is_contiguous(), "out", "be contiguous", out.stride(), "call .contiguous()")
        _value(out.device == device, "out", "be on logits' device", out.device)
    if index is None:
        places = out.numel()
        _value(places == rows, "out", "have a place for each row without index", places)
    else:
        _integers("index", index, rows, device)
    available = _available(device.type)
    chosen = require_implementation(_OP, implementation, available, f"{device.type} tensors")
    torch.ops.sdvg_kernels.sample_tokens(
        logits,
        uncond,
        seeds,
        sequences,
        positions,
        float(guidance),
        float(temperature),
        # as many as there are: nothing to leave out
        0 if top_k is None or top_k >= shape[1] else top_k,
        float(top_p),
        index,
        out,
        chosen,
    )
    return out


def _integers(name: str, tensor: torch.Tensor, rows: int, device: torch.device) -> None:
    _type(tensor.dtype in _INTEGERS, name, "be int32 or int64", tensor.dtype)
    _value(tensor.shape == (rows,), name, "be [N], one a row", tensor.shape)
    _value(tensor.device == device, name, "be on logits' device", tensor.device)


@functools.cache
def _available(device: str) -> dict[str, str]:
    """Return implementation -> "" or why it cannot run on `device`, in order of preference."""
    reason = triton_reason(device)
    return by_preference(device, reason)


def implementations() -> dict[str, str]:
    """Return implementation -> "" or why it is not available here, by preference."""
    if torch.cuda.is_available():
        return dict(_available("cuda"))
    return {"triton": "no CUDA device is available", "reference": ""}


def _run(
    logits: torch.Tensor,
    uncond: torch.Tensor | None,
    seeds: torch.Tensor | None,
    sequences: torch.Tensor | None,
    positions: torch.Tensor | None,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    index: torch.Tensor | None,
    out: torch.Tensor,
    implementation: str,
) -> None:
    """Run the chosen implementation."""
    options = {
        "guidance": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "index": index,
        "out": out,
    }
    keys = (seeds, sequences, positions)
    if implementation == "reference":
        reference.sample_tokens(logits, uncond, *keys, **options)
        return
    from sdvg_kernels.sampling import kernel

    kernel.sample_tokens(logits, uncond, *keys, **options)


_ops.implement("sample_tokens", cpu=_run, cuda=_run)
