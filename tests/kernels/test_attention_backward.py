"""Gradients of block_causal_attention in every lane, against autograd over logical tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sdvg_kernels import block_causal_attention, dense_attention, stage_
from sdvg_kernels.attention import KeyBias, api, config
from sdvg_kernels.testing import Lane, assert_within_budget, logical_attention
from tests.kernels.test_attention import CASES, GPU, KREA, Case, Inputs, make

NAMES = ("query", "k_cache", "v_cache")
CHOSEN = (
    "one token", "odd sizes", "lengths differ", "sink and wrapped ring", "sink wider than a tile",
    "window within the block", "sink, window, wrapped", "last block partial",
    "blocks across tiles", "blocks, wrapped", "query longer than the ring", "grouped blocks",
    "bias before each block", "bias on a range", "before the start", "before the start, blocks",
)  # fmt: skip
MORE = {
    "a context, the newest block apart": Case((72, 60), 24, 96, block_size=12, window=36),
    "teacher forcing": Case((48,), 48, 48, block_size=12, sink=12, window=24),
    "a block sees itself alone": Case((36,), 36, 36, block_size=12, window=12),
    "grouped, whole tiles": Case((40,), 33, 40, heads=4, heads_cached=2),
    "head dim 128, grouped, wrapped": Case((97,), 22, 60, 5, 30, 6, 4, 2, 128, KREA),
}
ALL = {name: CASES[name] for name in CHOSEN} | MORE


def tokens(like: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Random numbers, rounded to the dtype of `like`, on its device."""
    return torch.randn(like.shape, generator=random).to(like)


def slots_of(case: Case, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots that hold a token, and which."""
    token = torch.arange(length)
    ring = case.slots - case.sink
    held = (token < case.sink) | (token >= length - ring)
    slot = torch.where(token < case.sink, token, case.sink + (token - case.sink) % ring)
    return slot[held], token[held]


def in_slots(
    case: Case, inputs: Inputs, gradients: list[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Gradients of query and caches from those of query, keys and values; unused slots get 0."""
    batch = len(case.lengths)
    caches = []
    for part in (gradients[1 : 1 + batch], gradients[1 + batch :]):
        cache = torch.zeros_like(inputs.cache.k_cache, dtype=dtype)
        for b, (gradient, length) in enumerate(zip(part, case.lengths, strict=True)):
            slot, token = slots_of(case, length)
            cache[b, slot] = gradient[token]
        caches.append(cache)
    return [gradients[0], *caches]


def truth(
    case: Case, inputs: Inputs, grad_out: torch.Tensor, grad_lse: torch.Tensor, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Gradients of query and caches by autograd over logical tokens, in `dtype`."""
    wide = [x.detach().to(dtype) for x in (inputs.query, *inputs.keys, *inputs.values)]
    wide = [x.requires_grad_() for x in wide]
    batch = len(inputs.keys)
    with torch.enable_grad():
        out, lse = logical_attention(
            wide[0], wide[1 : 1 + batch], wide[1 + batch :], slots=case.slots, **case.options
        )
    outside = (grad_out.to(dtype), grad_lse.to(dtype))
    found = torch.autograd.grad((out, lse), wide, outside, materialize_grads=True)
    return in_slots(case, inputs, list(found), dtype)


def by_hand(
    case: Case, inputs: Inputs, grad_out: torch.Tensor, grad_lse: torch.Tensor
) -> list[torch.Tensor]:
    """The same in the inputs' dtype by FlashAttention-2's formula, as PyTorch's fused kernels do.

    It subtracts rowsum(dout out) where autograd has the row sum of p (dout V^T) itself: where the
    two cancel, as over a single key, this errs by a rounding of both and autograd does not.
    """
    bias = case.key_bias or KeyBias(0.0)
    scale = case.dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    found = [torch.zeros_like(x) for x in (inputs.query, *inputs.keys, *inputs.values)]
    batch, group = len(case.lengths), case.heads // case.heads_cached
    for b, length in enumerate(case.lengths):
        token = torch.arange(length)
        row = length - case.rows + torch.arange(case.rows)[:, None]
        size = case.block_size or case.rows
        begin = length - case.rows + torch.arange(case.rows)[:, None] // size * size
        end = (begin + size).clamp(max=length)
        kept = token >= torch.clamp(
            end - (case.window or 10**6), min=length - case.slots + case.sink
        )
        sees = (row >= 0) & (token < end) & (kept | (token < case.sink))
        biased = (token >= bias.start) & (token < (begin if bias.stop is None else bias.stop))
        sees, biased = sees.to(inputs.query.device), biased.to(inputs.query.device)
        for h in range(case.heads):
            query, grad = inputs.query[b, :, h], grad_out[b, :, h]
            key, value = inputs.keys[b][:, h // group], inputs.values[b][:, h // group]
            logits = torch.where(biased, query @ key.T * scale + bias.bias, query @ key.T * scale)
            weights = logits.masked_fill(~sees, -torch.inf).softmax(-1)
            weights = weights.masked_fill(~sees.any(1, keepdim=True), 0)
            delta = (grad * (weights @ value)).sum(1) - grad_lse[b, h].to(grad)
            grad_logits = weights * (grad @ value.T - delta[:, None])
            found[0][b, :, h] = grad_logits @ key * scale
            found[1 + b][:, h // group] += grad_logits.T @ query * scale
            found[1 + batch + b][:, h // group] += weights.T @ grad
    return in_slots(case, inputs, found, inputs.query.dtype)


def gradients(
    inputs: Inputs,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    lane: Lane,
    **options: object,
) -> tuple[torch.Tensor, ...]:
    """The op's gradients of query and caches."""
    given = [x.detach().requires_grad_() for x in (inputs.query, *inputs.cache[:2])]
    out, lse = block_causal_attention(
        *given,
        inputs.cache.cache_seqlens,
        **options,
        return_lse=True,
        implementation=lane.implementation,
    )
    return torch.autograd.grad((out, lse), given, (grad_out, grad_lse))


def check(case: Case, inputs: Inputs, lane: Lane, random: torch.Generator) -> None:
    """Assert that the op's gradients are within their budgets."""
    grad_out = tokens(inputs.query, random)
    batch, rows, heads, _ = inputs.query.shape
    grad_lse = torch.randn(batch, heads, rows, generator=random).to(lane.device)
    actual = gradients(inputs, grad_out, grad_lse, lane, **case.options)
    exact = truth(case, inputs, grad_out, grad_lse, torch.float64)
    plain = (
        truth(case, inputs, grad_out, grad_lse, inputs.query.dtype),
        by_hand(case, inputs, grad_out, grad_lse),
    )
    for i, name in enumerate(NAMES):
        # PyTorch's own two ways: what the worse one errs
        errors = [
            (way[i] - exact[i]).abs().max().item() if exact[i].numel() else 0 for way in plain
        ]
        worse = plain[errors.index(max(errors))][i]
        assert_within_budget(actual[i], worse, exact[i], f"gradient of {name}")


@pytest.mark.parametrize("name", ALL)
def test_equals_autograd_over_logical_tokens(
    name: str, lane: Lane, random: torch.Generator
) -> None:
    # slots that hold no token are NaN: their gradient is 0
    case = ALL[name]
    check(case, make(case, random, lane), lane, random)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sink, window, wrapped", "grouped, whole tiles"])
def test_half_precision_is_within_twice_plain_pytorch(
    name: str, dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    case = ALL[name]
    check(case, make(case, random, lane, dtype), lane, random)


def test_of_a_sum_alone_without_lse(lane: Lane, random: torch.Generator) -> None:
    # what autograd gives then has no strides: one 1 for all
    case = CASES["last block partial"]
    inputs = make(case, random, lane)
    given = [x.detach().requires_grad_() for x in (inputs.query, *inputs.cache[:2])]
    options = {**case.options, "implementation": lane.implementation}
    out = block_causal_attention(*given, inputs.cache.cache_seqlens, **options)
    actual = torch.autograd.grad(out.sum(), given)
    ones = torch.ones_like(inputs.query)
    exact = truth(case, inputs, ones, torch.zeros_like(ones[..., 0]).transpose(1, 2), torch.float64)
    for name, got, wanted in zip(NAMES, actual, exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5, msg=name)


def test_two_calls_merged_by_lse_equal_one(lane: Lane, random: torch.Generator) -> None:
    # rows over the blocks before their own, and over their own: what training merges
    case = Case((36,), 24, 36, sink=4, window=20, block_size=8)
    inputs = make(case, random, lane)
    given = [x.detach().requires_grad_() for x in (inputs.query, *inputs.cache[:2])]
    query, key, value = given
    how = {"return_lse": True, "implementation": lane.implementation}
    lengths = inputs.cache.cache_seqlens
    how["block_size"] = 8
    whole, _ = block_causal_attention(*given, lengths, sink=4, window=20, **how)
    before, lse = block_causal_attention(*given, lengths - 8, sink=4, window=12, **how)
    own = [x[:, 12:].contiguous() for x in (key, value)]
    itself, own_lse = block_causal_attention(query, *own, lengths - 12, window=8, **how)
    weights = torch.stack((lse, own_lse)).softmax(0).transpose(2, 3)[..., None]
    merged = weights[0] * before + weights[1] * itself
    grad = tokens(merged, random)
    for one, two in zip(
        *(torch.autograd.grad(x, given, grad) for x in (whole, merged)), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-6)


def test_strided_inputs_and_gradients(lane: Lane, random: torch.Generator) -> None:
    case = Case((40, 31), 9, 44, sink=3, window=20, block_size=4)
    inputs = make(case, random, lane)
    # [B, H, T, D] in memory for the query, layers around the caches, NaN between
    query = inputs.query.new_full((2, 2, 10, 64), torch.nan).transpose(1, 2)[:, :9]
    layers = inputs.query.new_full((2, 2, 44, 3, 2, 64), torch.nan)
    with torch.no_grad():
        query.copy_(inputs.query)
        layers[0, :, :, 1], layers[1, :, :, 1] = inputs.cache[:2]
    strided = replace(
        inputs,
        query=query,
        cache=inputs.cache._replace(k_cache=layers[0, :, :, 1], v_cache=layers[1, :, :, 1]),
    )
    grad_out = torch.randn(2, 64, 2, 9, generator=random).to(lane.device).permute(0, 3, 2, 1)
    grad_lse = torch.randn(2, 9, 2, generator=random).to(lane.device).transpose(1, 2)
    got = gradients(strided, grad_out, grad_lse, lane, **case.options)
    same = gradients(inputs, grad_out.contiguous(), grad_lse.contiguous(), lane, **case.options)
    for one, two in zip(got, same, strict=True):
        # products of strided tensors may add up in another order
        torch.testing.assert_close(one, two, rtol=0, atol=2e-6)


def test_what_no_row_sees_is_not_read_and_gets_zero(lane: Lane, random: torch.Generator) -> None:
    # the ring still holds them, but they are out of the window; rows before the sequence
    case = Case((60, 5), 9, 64, sink=3, window=20)
    inputs = make(case, random, lane)
    for cache in inputs.cache[:2]:
        cache[0, 3:40] = torch.nan
    grad_out, grad_lse = tokens(inputs.query, random), torch.zeros(2, 2, 9, device=lane.device)
    calm = gradients(inputs, grad_out, grad_lse, lane, **case.options)
    grad_out[1, :4] = grad_lse[1, :, :4] = torch.nan
    query, *caches = gradients(inputs, grad_out, grad_lse, lane, **case.options)
    assert (query[1, :4] == 0).all()
    for gradient in caches:
        assert (gradient[0, 3:40] == 0).all()
        assert (gradient[1, 5:] == 0).all()
    for one, two in zip(calm, (query, *caches), strict=True):
        assert torch.equal(one, two)
        assert one.isfinite().all()


def test_rows_before_the_sequence_get_zero_whatever_the_bias(
    lane: Lane, random: torch.Generator
) -> None:
    # 2^bias is infinite, over a tile of keys that needs no mask
    case = Case((20,), 24, 32, key_bias=KeyBias(100.0, 0, 32))
    inputs = make(case, random, lane)
    query, options = inputs.query.requires_grad_(), {"implementation": lane.implementation}
    out = block_causal_attention(query, *inputs.cache, **case.options, **options)
    (gradient,) = torch.autograd.grad(out, query, tokens(out, random))
    assert gradient.isfinite().all()
    assert (gradient[:, :4] == 0).all()


def test_runs_repeat_and_only_what_is_asked_for_is_computed(
    lane: Lane, random: torch.Generator
) -> None:
    case = CASES["grouped blocks"]
    inputs = make(case, random, lane)
    grad = tokens(inputs.query, random)
    grad_lse = torch.zeros(2, 6, 7, device=lane.device)
    both = [gradients(inputs, grad, grad_lse, lane, **case.options) for _ in range(2)]
    assert all(map(torch.equal, *both))
    for wanted in ((0,), (2,)):
        given = [inputs.query, *inputs.cache[:2]]
        given = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(given)]
        options = {**case.options, "implementation": lane.implementation}
        out = block_causal_attention(*given, inputs.cache.cache_seqlens, **options)
        found = torch.autograd.grad(out, [given[i] for i in wanted], grad)
        assert all(map(torch.equal, found, (both[0][i] for i in wanted)))


def test_sequences_that_share_a_row_of_the_cache_add_up(
    lane: Lane, random: torch.Generator
) -> None:
    case = Case((30, 22), 6, 32)
    inputs = make(case, random, lane)
    order = torch.tensor([1, 0, 1], dtype=torch.int32, device=lane.device)
    k_cache, v_cache, lengths = inputs.cache
    query = torch.randn(3, 6, 2, 64, generator=random).to(lane.device)
    grad = tokens(query, random)
    found = []
    for rows in (order, None):
        given = [x.detach().requires_grad_() for x in (query, k_cache, v_cache)]
        caches = given[1:] if rows is not None else [x[order.long()] for x in given[1:]]
        out = block_causal_attention(
            given[0],
            *caches,
            lengths[order],
            cache_batch_idx=rows,
            implementation=lane.implementation,
        )
        found.append(torch.autograd.grad(out, given, grad))
    assert all(map(torch.equal, *found))


def test_dense_attention_has_gradients(lane: Lane, random: torch.Generator) -> None:
    query, key, value = (
        torch.randn(1, n, 2, 64, generator=random).to(lane.device).requires_grad_()
        for n in (20, 9, 9)
    )
    out = dense_attention(query, key, value, implementation=lane.implementation)
    grad = tokens(out, random)
    wide = [x.detach().double().transpose(1, 2).requires_grad_() for x in (query, key, value)]
    exact = torch.nn.functional.scaled_dot_product_attention(*wide)
    exact = torch.autograd.grad(exact, wide, grad.double().transpose(1, 2))
    for got, wanted in zip(torch.autograd.grad(out, (query, key, value), grad), exact, strict=True):
        torch.testing.assert_close(got.double(), wanted.transpose(1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 2, 64), (2, 0, 2, 64)])
def test_gradients_of_nothing(shape: tuple[int, ...], lane: Lane) -> None:
    query = torch.empty(shape, device=lane.device).requires_grad_()
    cache = torch.ones(shape[0], 8, 2, 64, device=lane.device).requires_grad_()
    lengths = torch.full(shape[:1], 4, dtype=torch.int32, device=lane.device)
    out = block_causal_attention(query, cache, cache, lengths, implementation=lane.implementation)
    for gradient in torch.autograd.grad(out.sum(), (query, cache)):
        assert (gradient == 0).all()


# --- autograd ---

_DOUBLE = Case((13, 2), 6, 9, sink=2, window=5, block_size=4, heads=4, dim=5, key_bias=KREA)


def _doubles(random: torch.Generator) -> tuple[list[torch.Tensor], torch.Tensor]:
    inputs = make(_DOUBLE, random, dtype=torch.float64)
    k_cache, v_cache, lengths = inputs.cache
    # finite: gradcheck moves every input
    given = (inputs.query, k_cache.nan_to_num(1.0), v_cache.nan_to_num(1.0))
    return [x.requires_grad_() for x in given], lengths


def test_gradcheck_of_the_reference(random: torch.Generator) -> None:
    given, lengths = _doubles(random)

    def attend(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = block_causal_attention(*tensors, lengths, **_DOUBLE.options, return_lse=True)
        # rows before the sequence have -inf
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(attend, given)


def test_opcheck_and_a_compiled_loss(random: torch.Generator) -> None:
    given, lengths = _doubles(random)
    mask = (4, 2, 5, 0.3, *KREA)
    forward = torch.ops.sdvg_kernels.block_causal_attention_forward
    torch.library.opcheck(forward, (*given, lengths, *mask, None, "reference"))
    with torch.no_grad():
        out, lse = forward(*given, lengths, *mask, None, "reference")
    saved = [x.detach() for x in (out, lse, *given, lengths, out, lse)]
    backward = torch.ops.sdvg_kernels.block_causal_attention_backward
    for needed in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(backward, (*saved, *mask, *needed, "reference"))

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        out, lse = block_causal_attention(*tensors, lengths, block_size=4, return_lse=True)
        return out.square().sum() + lse[0].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    one, two = (torch.autograd.grad(f(*given), given) for f in (compiled, loss))
    assert all(map(torch.equal, one, two))


def test_what_has_no_gradient_is_refused_in_a_sentence() -> None:
    query, cache = torch.zeros(2, 3, 4, 64), torch.zeros(2, 8, 2, 64)
    lengths = torch.full((2,), 3, dtype=torch.int32)
    given = {"query": query.requires_grad_(), "cache_seqlens": lengths}
    caches = {"k_cache": cache, "v_cache": cache}
    remedy = "call it under torch.no_grad()"
    with pytest.raises(ValueError, match="out must be None where gradients are recorded") as caught:
        block_causal_attention(**given, **caches, out=torch.empty_like(query))
    assert str(caught.value).endswith(remedy)
    eight = {name: value.to(torch.float8_e4m3fn) for name, value in caches.items()}
    scales = dict.fromkeys(("k_scale", "v_scale"), torch.ones(2, 8, 2))
    with pytest.raises(TypeError, match="k_cache must have query's dtype where gradients"):
        block_causal_attention(**given, **eight, **scales)
    with torch.no_grad():
        block_causal_attention(**given, **caches, out=torch.empty_like(query))
        block_causal_attention(**given, **eight, **scales)
    out = block_causal_attention(**given, **caches)
    (once,) = torch.autograd.grad(out.square().sum(), given["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="its gradient must not be differentiated again"):
        once.sum().backward()


def test_a_cache_written_before_the_backward_is_an_error() -> None:
    query = torch.zeros(1, 2, 1, 8, requires_grad=True)
    cache, lengths = torch.zeros(1, 1, 6, 1, 8), torch.tensor([2], dtype=torch.int32)
    out = block_causal_attention(query, cache[0], cache[0], lengths)
    block = torch.ones(1, 1, 2, 1, 8)
    stage_(cache, cache.clone(), block, block, lengths)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_where_no_gradient_is_recorded_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    query, cache = torch.zeros(1, 2, 1, 8), torch.zeros(1, 4, 1, 8)
    lengths = torch.tensor([2], dtype=torch.int32)
    asked = []
    run = api.reference.block_causal_attention

    def spy(*tensors: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(options["return_lse"])
        return run(*tensors, **options)

    monkeypatch.setattr(api.reference, "block_causal_attention", spy)
    block_causal_attention(query, cache, cache, lengths)
    query.requires_grad_()
    with torch.no_grad():
        assert block_causal_attention(query, cache, cache, lengths).grad_fn is None
    assert block_causal_attention(query, cache, cache, lengths).grad_fn is not None
    assert asked == [False, False, True]


# --- configurations ---


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_every_gpu_has_launches_of_the_backward(capability: tuple[int, int]) -> None:
    for dim in api.HEAD_DIMS:
        for dtype in api.DTYPES:
            for launch in config.choose_backward(capability, dim, dtype):
                assert launch.reason
                # dots take 16 at least
                assert min(launch.BT, launch.BS) >= 16


# --- GPU only ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", api.DTYPES, ids=str)
@pytest.mark.parametrize("dim", api.HEAD_DIMS)
@pytest.mark.parametrize("rows", [48, 300])
def test_shipped_configurations_are_exact_on_the_gpu(
    rows: int, dim: int, dtype: torch.dtype, random: torch.Generator
) -> None:
    case = Case((700, 301), rows, 520, 20, 333, 100, 4, 2, dim)
    for biased in (case, replace(case, key_bias=KREA), replace(case, heads=2, window=None)):
        check(biased, make(biased, random, GPU, dtype), GPU, random)


@pytest.mark.gpu
def test_offsets_past_2_to_the_31_are_read_right(random: torch.Generator) -> None:
    case = Case((300,), 16, 300)
    inputs = make(case, random, GPU, torch.bfloat16)
    # K and V share 5 GB: the last slots are 2^31 elements on
    token, slot = 2 * 64, 2**23
    memory = torch.empty(300 * slot, dtype=torch.bfloat16, device="cuda")
    k_cache, v_cache = (
        memory.as_strided((1, 300, 2, 64), (0, slot, 64, 1), offset) for offset in (0, token)
    )
    k_cache.copy_(inputs.cache.k_cache)
    v_cache.copy_(inputs.cache.v_cache)
    far = replace(inputs, cache=inputs.cache._replace(k_cache=k_cache, v_cache=v_cache))
    grad_out = tokens(inputs.query, random)
    grad_lse = torch.randn(1, 2, 16, generator=random).cuda()
    found = (gradients(which, grad_out, grad_lse, GPU) for which in (far, inputs))
    assert all(map(torch.equal, *found))


@pytest.mark.gpu
def test_a_graph_replays_forward_and_backward_on_new_lengths(random: torch.Generator) -> None:
    long, short = (Case((n,), 16, 70, sink=6, window=40, block_size=8) for n in (150, 61))
    fixed = make(long, random, GPU)
    fixed = [x.clone() for x in (fixed.query, *fixed.cache)]
    given = [x.requires_grad_() for x in fixed[:3]]
    grad = tokens(fixed[0].detach(), random)

    def run() -> tuple[torch.Tensor, ...]:
        out = block_causal_attention(
            *given, fixed[3], sink=6, window=40, block_size=8, implementation="triton"
        )
        return torch.autograd.grad(out, given, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    none = torch.zeros(1, 2, 16, device="cuda")
    for case in (short, long):
        inputs = make(case, random, GPU)
        with torch.no_grad():
            for tensor, new in zip(fixed, (inputs.query, *inputs.cache), strict=True):
                tensor.copy_(new)
        graph.replay()
        eager = gradients(inputs, grad, none, GPU, **case.options)
        assert all(map(torch.equal, found, eager))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["hopper", "triton"])
def test_every_forward_has_the_triton_backward(
    implementation: str, random: torch.Generator
) -> None:
    if reason := api.implementations()[implementation]:
        pytest.skip(reason)
    case = Case((700,), 300, 520, 20, 333, 100, dim=128)
    lane = Lane(implementation, "cuda", implementation)
    check(case, make(case, random, lane, torch.bfloat16), lane, random)
