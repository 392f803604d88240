"""`sample_tokens` in Triton: one program guides, warps and samples one row.

    x = u + guidance (c - u)
    kept = x at least the k-th largest, and at least the largest t of mass(x >= t) >= p mass(kept)
    token = argmax over kept of x / temperature - log E,   E = -log(1 - uniform)

How thresholds are found, and where noise comes from: `_warp`, which verification shares.
Layout: logits, uncond [N, V]; seeds, sequences, positions, index [N]; out flat.
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sdvg_kernels import _warp
from sdvg_kernels._budget import Compilation
from sdvg_kernels._device import on
from sdvg_kernels.sampling import config


@triton.jit
def sample_kernel(
    logits,
    uncond,
    seeds,
    sequences,
    positions,
    index,
    out,
    stride_cn,
    stride_cv,
    stride_un,
    stride_uv,
    stride_sn,
    stride_qn,
    stride_pn,
    stride_in,
    V,
    OUT,
    guidance,
    inverse_temperature,
    top_k,
    top_p,
    BV: tl.constexpr,
    BR: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    IS_GREEDY: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Write the token of row `program_id(0)`, or -1 for a row that has no distribution."""
    i_n = tl.program_id(0).to(tl.int64)
    i_out = i_n
    if HAS_INDEX:
        i_out = tl.load(index + i_n * stride_in).to(tl.int64)
    if (i_out >= 0) & (i_out < OUT):
        p_c = logits + i_n * stride_cn
        p_u = logits
        if HAS_UNCOND:
            p_u = uncond + i_n * stride_un
        b_x, top, is_bad = _warp.peak(
            p_c, p_u, V, stride_cv, stride_uv, guidance, BV, HAS_UNCOND, IS_WHOLE
        )
        token = tl.full([], -1, tl.int32)
        if is_bad == 0:
            least = _warp.threshold(
                b_x, top, p_c, p_u, V, stride_cv, stride_uv, guidance, inverse_temperature, top_k,
                top_p, BV, HAS_UNCOND, HAS_TOP_K, HAS_TOP_P, IS_WHOLE,
            )  # fmt: skip
            seed, sequence, position = 0, 0, 0
            if not IS_GREEDY:
                seed = tl.load(seeds + i_n * stride_sn)
                sequence = tl.load(sequences + i_n * stride_qn).to(tl.int32)
                position = tl.load(positions + i_n * stride_pn).to(tl.int32)
            # [BR]
            b_best = tl.full([BR], float("-inf"), tl.float32)
            b_token = tl.full([BR], 0x7FFFFFFF, tl.int32)
            for i_v in range(0, V, BR):
                b_s = _warp.scores(
                    p_c, p_u, i_v, V, stride_cv, stride_uv, guidance, inverse_temperature, least,
                    seed, sequence, position, BR, HAS_UNCOND, HAS_TOP_K or HAS_TOP_P, IS_GREEDY,
                )  # fmt: skip
                b_token = tl.where(b_s > b_best, i_v + tl.arange(0, BR), b_token)
                b_best = tl.maximum(b_best, b_s)
            token = _warp.winner(b_best, b_token)
        tl.store(out + i_out, token.to(out.dtype.element_ty))


def sample_tokens(
    logits: torch.Tensor,
    uncond: torch.Tensor | None,
    seeds: torch.Tensor | None,
    sequences: torch.Tensor | None,
    positions: torch.Tensor | None,
    *,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    index: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write the chosen ids into `out`."""
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    launch = config.launch(vocabulary)
    device = logits.device
    is_greedy = temperature == 0
    with on(device):
        sample_kernel[(rows,)](
            logits=logits,
            uncond=uncond,
            seeds=seeds,
            sequences=sequences,
            positions=positions,
            index=index,
            out=out,
            stride_cn=logits.stride(0),
            stride_cv=logits.stride(1),
            stride_un=0 if uncond is None else uncond.stride(0),
            stride_uv=0 if uncond is None else uncond.stride(1),
            stride_sn=0 if seeds is None else seeds.stride(0),
            stride_qn=0 if sequences is None else sequences.stride(0),
            stride_pn=0 if positions is None else positions.stride(0),
            stride_in=0 if index is None else index.stride(0),
            V=vocabulary,
            OUT=out.numel(),
            guidance=guidance,
            inverse_temperature=1.0 if is_greedy else 1.0 / temperature,
            top_k=top_k,
            top_p=top_p,
            BV=launch.BV,
            BR=launch.BR,
            HAS_UNCOND=uncond is not None,
            HAS_INDEX=index is not None,
            HAS_TOP_K=top_k > 0 and not is_greedy,
            HAS_TOP_P=top_p < 1 and not is_greedy,
            IS_GREEDY=is_greedy,
            IS_WHOLE=launch.IS_WHOLE,
            num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield the shipped configurations for `arch`, with guidance and both thresholds."""
    strides = ("stride_cn", "stride_un", "stride_sn", "stride_qn", "stride_pn", "stride_in")
    for launch in (*config.WHOLE, config.TILED):
        yield Compilation(
            kernel=sample_kernel,
            arch=arch,
            config=f"bf16 BV{launch.BV} BR{launch.BR}",
            signature={"logits": "*bf16", "uncond": "*bf16", "seeds": "*i64", "out": "*i64"}
            | dict.fromkeys(("sequences", "positions", "index"), "*i32")
            | dict.fromkeys((*strides, "V", "OUT", "top_k"), "i32")
            | dict.fromkeys(("guidance", "inverse_temperature", "top_p"), "fp32"),
            constants={
                "stride_cv": 1,
                "stride_uv": 1,
                "BV": launch.BV,
                "BR": launch.BR,
                "HAS_UNCOND": True,
                "HAS_INDEX": True,
                "HAS_TOP_K": True,
                "HAS_TOP_P": True,
                "IS_GREEDY": False,
                "IS_WHOLE": launch.IS_WHOLE,
            },
            divisible=("logits", "uncond", "stride_cn", "stride_un", "V"),
            num_warps=launch.num_warps,
            num_stages=3,
            budget=config.BUDGET,
            enable_fp_fusion=False,
        )
