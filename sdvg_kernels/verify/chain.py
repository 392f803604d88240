"""`verify_chain` in Triton: one program walks down the chain of one sequence.

    token i is accepted where coin(i) q(x) <= p(x); behind the last, or in place of the rejected
    one: argmax of log max(0, p - q) - log E, and of log p - log E where nothing was rejected

p and q at the drafted tokens come from `rows`: of the target's rows, and of the drafter's or its
probabilities. Layout: draft to q_chances [B, n]; logits, uncond [B, n + 1, V]; guess, guess_uncond
[B, n, V]; path [B, P]; the others [B].
"""

# a Triton kernel's arguments have no Python types
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from sdvg_kernels import _warp
from sdvg_kernels._budget import Compilation
from sdvg_kernels._device import on
from sdvg_kernels.verify import config
from sdvg_kernels.verify.reference import SUM_TOLERANCE, Keys, Warp
from sdvg_kernels.verify.rows import Rows, launch_rows, new_rows

# what the drafter gives: it is certain of its token; or logits; or probabilities
CERTAIN, LOGITS, PROBS = (tl.constexpr(kind) for kind in range(3))


@triton.jit
def sums_kernel(
    probs,
    draft,
    masses,
    chances,
    stride_pb,
    stride_pn,
    stride_pv,
    N,
    V,
    tolerance,
    BV: tl.constexpr,
):
    """Write the sum of row (sequence, i), -1 if it is not 1, and its share at the drafted token."""
    i_b = tl.program_id(0).to(tl.int64)
    i_n = tl.program_id(1)
    i_r = i_b * N + i_n
    p_p = probs + i_b * stride_pb + i_n.to(tl.int64) * stride_pn
    # [BV]
    b_sum = tl.zeros([BV], tl.float32)
    b_bad = tl.zeros([BV], tl.int32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_p = tl.load(p_p + o_v.to(tl.int64) * stride_pv, mask=o_v < V, other=0.0).to(tl.float32)
        # a NaN is not 0 or more either
        b_bad |= (b_p >= 0).to(tl.int32) ^ 1
        b_sum += b_p
    mass = tl.sum(b_sum, 0)
    is_bad = (tl.max(b_bad, 0) > 0) | (tl.abs(mass - 1) > tolerance)
    tl.store(masses + i_r, tl.where(is_bad, -1.0, mass))
    x = tl.load(draft + i_r).to(tl.int64)
    is_inside = (x >= 0) & (x < V)
    share = tl.load(p_p + x * stride_pv, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(chances + i_r, share / mass)


@triton.jit
def _race(
    p_c,
    p_u,
    V,
    stride_cv,
    stride_uv,
    guidance,
    inverse_temperature,
    least,
    seed,
    sequence,
    position,
    lost,
    BR: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
    IS_WARPED: tl.constexpr,
    IS_GREEDY: tl.constexpr,
):
    """Return the token that wins the row's race without `lost`."""
    # [BR]
    b_best = tl.full([BR], float("-inf"), tl.float32)
    b_token = tl.full([BR], 0x7FFFFFFF, tl.int32)
    for i_v in range(0, V, BR):
        b_s = _warp.scores(
            p_c, p_u, i_v, V, stride_cv, stride_uv, guidance, inverse_temperature, least, seed,
            sequence, position, BR, HAS_UNCOND, IS_WARPED, IS_GREEDY,
        )  # fmt: skip
        o_r = i_v + tl.arange(0, BR)
        b_s = tl.where(o_r == lost, float("-inf"), b_s)
        b_token = tl.where(b_s > b_best, o_r, b_token)
        b_best = tl.maximum(b_best, b_s)
    return _warp.winner(b_best, b_token)


@triton.jit
def chain_kernel(
    draft,
    tops,
    masses,
    leasts,
    chances,
    q_tops,
    q_masses,
    q_leasts,
    q_chances,
    logits,
    uncond,
    guess,
    guess_uncond,
    seeds,
    sequences,
    positions,
    path,
    counts,
    out,
    stride_cb,
    stride_cn,
    stride_cv,
    stride_ub,
    stride_un,
    stride_uv,
    stride_gb,
    stride_gn,
    stride_gv,
    stride_wb,
    stride_wn,
    stride_wv,
    N,
    V,
    levels,
    depth,
    guidance,
    inverse_temperature,
    top_k,
    top_p,
    BP: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,
    DRAFTER: tl.constexpr,
    HAS_UNCOND: tl.constexpr,
    HAS_GUESS_UNCOND: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    IS_GREEDY: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Write the path, the count and the token of sequence `program_id(0)`."""
    i_b = tl.program_id(0).to(tl.int64)
    p_mass = masses + i_b * N
    q_mass = q_masses + i_b * N
    seed, sequence, position = 0, 0, 0
    if not IS_GREEDY:
        seed = tl.load(seeds + i_b)
        sequence = tl.load(sequences + i_b).to(tl.int32)
        position = tl.load(positions + i_b).to(tl.int32)
    level = tl.full([], 0, tl.int32)
    is_bad = tl.full([], 0, tl.int32)
    is_rejected = tl.full([], 0, tl.int32)
    # what could have come, where nothing is left for the race
    spare = tl.full([], -1, tl.int32)
    x = tl.full([], -1, tl.int64)
    goes = tl.full([], 0, tl.int32)
    if levels > 0:
        goes = tl.full([], 1, tl.int32)
    while goes > 0:
        goes = tl.full([], 0, tl.int32)
        at = i_b * N + level
        is_bad = (tl.load(p_mass + level) < 0).to(tl.int32)
        x = tl.load(draft + at).to(tl.int64)
        if DRAFTER != CERTAIN:
            is_bad |= (tl.load(q_mass + level) < 0).to(tl.int32)
        if IS_GREEDY:
            is_taken = x == tl.load(leasts + at)
        else:
            p = tl.load(chances + at)
            q = 1.0
            if DRAFTER != CERTAIN:
                q = tl.load(q_chances + at)
            coin = _warp.coin(seed, sequence, position + level)
            is_taken = (p > 0) & (coin * q <= p)
            spare = tl.where(p > 0, x, -1).to(tl.int32)
        if is_bad == 0:
            if is_taken:
                level += 1
                goes = (level < levels).to(tl.int32)
            else:
                is_rejected = tl.full([], 1, tl.int32)
    p_c = logits + i_b * stride_cb + level.to(tl.int64) * stride_cn
    p_u = logits
    if HAS_UNCOND:
        p_u = uncond + i_b * stride_ub + level.to(tl.int64) * stride_un
    least = tl.full([], 0, tl.int32)
    if is_rejected:
        least = tl.load(leasts + i_b * N + level)
    elif is_bad == 0:
        b_x, top, is_lost = _warp.peak(
            p_c, p_u, V, stride_cv, stride_uv, guidance, BV, HAS_UNCOND, IS_WHOLE
        )
        is_bad = is_lost.to(tl.int32)
        if is_bad == 0:
            least = _warp.threshold(
                b_x, top, p_c, p_u, V, stride_cv, stride_uv, guidance, inverse_temperature, top_k,
                top_p, BV, HAS_UNCOND, HAS_TOP_K, HAS_TOP_P, IS_WHOLE,
            ).to(tl.int32)  # fmt: skip
    token = tl.full([], -1, tl.int32)
    if is_bad == 0:
        # what was rejected for certain does not come
        lost = tl.where(is_rejected > 0, x, -1)
        if IS_GREEDY:
            token = least
            if is_rejected == 0:
                token = _race(
                    p_c, p_u, V, stride_cv, stride_uv, guidance, inverse_temperature, least, seed,
                    sequence, position + level, lost, BR, HAS_UNCOND, False, True,
                )  # fmt: skip
        elif DRAFTER == CERTAIN:
            token = _race(
                p_c, p_u, V, stride_cv, stride_uv, guidance, inverse_temperature, least, seed,
                sequence, position + level, lost, BR, HAS_UNCOND, HAS_TOP_K or HAS_TOP_P, False,
            )  # fmt: skip
        elif is_rejected:
            top, mass = tl.load(tops + i_b * N + level), tl.load(p_mass + level)
            q_peak, q_least, q_total = 0.0, tl.full([], 0, tl.int32), tl.load(q_mass + level)
            p_g = guess + i_b * stride_gb + level.to(tl.int64) * stride_gn
            p_w = guess
            if DRAFTER == LOGITS:
                q_peak, q_least = (
                    tl.load(q_tops + i_b * N + level),
                    tl.load(q_leasts + i_b * N + level),
                )
                if HAS_GUESS_UNCOND:
                    p_w = guess_uncond + i_b * stride_wb + level.to(tl.int64) * stride_wn
            # [BR]
            b_best = tl.full([BR], float("-inf"), tl.float32)
            b_token = tl.full([BR], 0x7FFFFFFF, tl.int32)
            for i_v in range(0, V, BR):
                o_r = i_v + tl.arange(0, BR)
                m_r = o_r < V
                b_r = _warp.guided(p_c, p_u, o_r, m_r, stride_cv, stride_uv, guidance, HAS_UNCOND)
                b_p = _warp.weight(b_r, least, top, inverse_temperature) / mass
                if DRAFTER == LOGITS:
                    b_g = _warp.guided(
                        p_g, p_w, o_r, m_r, stride_gv, stride_wv, guidance, HAS_GUESS_UNCOND
                    )
                    b_q = _warp.weight(b_g, q_least, q_peak, inverse_temperature) / q_total
                else:
                    b_q = tl.load(p_g + o_r.to(tl.int64) * stride_gv, mask=m_r, other=0.0)
                    b_q = b_q.to(tl.float32) / q_total
                b_left = b_p - b_q
                b_s = tl.log(tl.where(b_left > 0, b_left, 1.0))
                b_s -= _warp.log_exponential(seed, sequence, position + level, i_v, BR)
                b_s = tl.where(b_left > 0, b_s, float("-inf"))
                b_token = tl.where(b_s > b_best, o_r, b_token)
                b_best = tl.maximum(b_best, b_s)
            token = _warp.winner(b_best, b_token)
        else:
            token = _race(
                p_c, p_u, V, stride_cv, stride_uv, guidance, inverse_temperature, least, seed,
                sequence, position + level, lost, BR, HAS_UNCOND, HAS_TOP_K or HAS_TOP_P, False,
            )  # fmt: skip
        token = tl.where(token == 0x7FFFFFFF, spare, token)
    # [BP]
    o_p = tl.arange(0, BP)
    b_path = tl.where((o_p <= level) & (token >= 0), o_p, -1)
    tl.store(path + i_b * (depth + 1) + o_p, b_path, mask=o_p <= depth)
    tl.store(counts + i_b, tl.where(token >= 0, level + 1, 0))
    tl.store(out + i_b, token.to(tl.int64))


def verify_chain(
    draft: torch.Tensor,
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    draft_probs: torch.Tensor | None,
    uncond: torch.Tensor | None,
    draft_uncond: torch.Tensor | None,
    keys: Keys,
    warp: Warp,
    *,
    depth: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (path, counts, tokens) by the rule of Leviathan et al."""
    batch, drafted = draft.shape
    vocabulary = logits.shape[2]
    path = logits.new_empty((batch, depth + 1), dtype=torch.int32)
    counts = logits.new_empty(batch, dtype=torch.int32)
    out = logits.new_empty(batch, dtype=torch.int64)
    if batch == 0:
        return path, counts, out
    is_greedy = warp.temperature == 0
    drafter, guess, guess_uncond = CERTAIN, None, None
    if not is_greedy and draft_logits is not None:
        drafter, guess, guess_uncond = LOGITS, draft_logits, draft_uncond
    elif not is_greedy and draft_probs is not None:
        drafter, guess = PROBS, draft_probs
    levels = min(depth, drafted)
    launch = config.row_launch(vocabulary)
    draft = draft.contiguous()
    keys = Keys(*(None if key is None else key.contiguous() for key in keys))
    device = logits.device
    with on(device):
        rows = launch_rows(logits, uncond, draft, None, keys, warp, levels, rule="exact")
        q_rows = rows
        if drafter == LOGITS:
            q_rows = launch_rows(guess, guess_uncond, draft, None, keys, warp, levels, rule="exact")
        elif drafter == PROBS:
            q_rows = _launch_sums(guess, draft, levels)
        chain_kernel[(batch,)](
            draft=draft,
            tops=rows.tops,
            masses=rows.masses,
            leasts=rows.leasts,
            chances=rows.chances,
            q_tops=q_rows.tops,
            q_masses=q_rows.masses,
            q_leasts=q_rows.leasts,
            q_chances=q_rows.chances,
            logits=logits,
            uncond=uncond,
            guess=guess,
            guess_uncond=guess_uncond,
            seeds=keys.seeds,
            sequences=keys.sequences,
            positions=keys.positions,
            path=path,
            counts=counts,
            out=out,
            **_strides("c", logits),
            **_strides("u", uncond),
            **_strides("g", guess),
            **_strides("w", guess_uncond),
            N=drafted,
            V=vocabulary,
            levels=levels,
            depth=depth,
            guidance=warp.guidance,
            inverse_temperature=1.0 if is_greedy else 1.0 / warp.temperature,
            top_k=warp.top_k,
            top_p=warp.top_p,
            BP=triton.next_power_of_2(depth + 1),
            BV=launch.BV,
            BR=launch.BR,
            DRAFTER=drafter.value,
            HAS_UNCOND=uncond is not None,
            HAS_GUESS_UNCOND=guess_uncond is not None,
            HAS_TOP_K=warp.top_k > 0 and not is_greedy,
            HAS_TOP_P=warp.top_p < 1 and not is_greedy,
            IS_GREEDY=is_greedy,
            IS_WHOLE=launch.IS_WHOLE,
            num_warps=launch.num_warps,
            enable_fp_fusion=False,
        )
    return path, counts, out


def _launch_sums(probs: torch.Tensor, draft: torch.Tensor, levels: int) -> Rows:
    """Return what is read of the drafter's probabilities: their sums, and shares of its tokens."""
    batch, drafted = draft.shape
    rows = new_rows(probs, drafted)
    if levels:
        launch = config.SUMS
        sums_kernel[(batch, levels)](
            probs=probs,
            draft=draft,
            masses=rows.masses,
            chances=rows.chances,
            **_strides("p", probs),
            N=drafted,
            V=probs.shape[2],
            tolerance=SUM_TOLERANCE,
            BV=launch.BV,
            num_warps=launch.num_warps,
        )
    return rows


def _strides(name: str, tensor: torch.Tensor | None) -> dict[str, int]:
    """Return the strides of a tensor [B, n, V] as the kernel's arguments."""
    strides = (0, 0, 0) if tensor is None else tensor.stride()
    return {f"stride_{name}{axis}": stride for axis, stride in zip("bnv", strides, strict=True)}


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield the shipped configurations for `arch`: guided with both thresholds, or plain."""
    sums = config.SUMS
    yield Compilation(
        kernel=sums_kernel,
        arch=arch,
        config=f"bf16 BV{sums.BV}",
        signature={"probs": "*bf16", "draft": "*i64", "masses": "*fp32", "chances": "*fp32"}
        | dict.fromkeys(("stride_pb", "stride_pn", "N", "V"), "i32")
        | {"tolerance": "fp32"},
        constants={"stride_pv": 1, "BV": sums.BV},
        divisible=("probs", "stride_pb", "stride_pn", "V"),
        num_warps=sums.num_warps,
        num_stages=3,
        budget=config.ROW_BUDGET,
    )
    strides = tuple(f"stride_{of}{axis}" for of in "cugw" for axis in "bn")
    logits = ("logits", "uncond", "guess", "guess_uncond")
    pointers = dict.fromkeys(logits, "*bf16") | dict.fromkeys(("draft", "seeds", "out"), "*i64")
    pointers |= dict.fromkeys(
        ("tops", "masses", "chances", "q_tops", "q_masses", "q_chances"), "*fp32"
    )
    whole = ("leasts", "q_leasts", "sequences", "positions", "path", "counts")
    pointers |= dict.fromkeys(whole, "*i32")
    drafters = {"certain": CERTAIN, "logits": LOGITS, "probs": PROBS}
    drafters |= {"plain": CERTAIN, "greedy": CERTAIN}
    cases = [(launch, "logits") for launch in (*config.WHOLE, config.TILED)]
    cases += [(config.WHOLE[-1], drafter) for drafter in drafters if drafter != "logits"]
    for launch, drafter in cases:
        warps = drafter not in ("plain", "greedy")
        absent = () if warps else ("uncond",)
        absent += {"logits": (), "probs": ("guess_uncond",)}.get(drafter, ("guess", "guess_uncond"))
        yield Compilation(
            kernel=chain_kernel,
            arch=arch,
            config=f"bf16 {drafter} BV{launch.BV}" + ("" if launch.IS_WHOLE else " tiled"),
            signature=pointers
            | dict.fromkeys((*strides, "N", "V", "levels", "depth", "top_k"), "i32")
            | dict.fromkeys(("guidance", "inverse_temperature", "top_p"), "fp32"),
            constants=dict.fromkeys((f"stride_{of}v" for of in "cugw"), 1)
            | {
                "BP": 8,
                "BV": launch.BV,
                "BR": launch.BR,
                "DRAFTER": drafters[drafter].value,
                "HAS_UNCOND": warps,
                "HAS_GUESS_UNCOND": drafter == "logits",
                "HAS_TOP_K": warps,
                "HAS_TOP_P": warps,
                "IS_GREEDY": drafter == "greedy",
                "IS_WHOLE": launch.IS_WHOLE,
            }
            | dict.fromkeys(absent),
            divisible=(*logits, *strides, "V"),
            num_warps=launch.num_warps,
            num_stages=3,
            budget=config.WALK_BUDGET,
            enable_fp_fusion=False,
        )
