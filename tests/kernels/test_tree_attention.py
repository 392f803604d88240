"""tree_attention: chains and trees over the cache, by brute force and by plain attention."""

from __future__ import annotations

import functools
import importlib
import itertools
from typing import NamedTuple

import pytest
import torch

from sdvg_kernels import _few_rows, tree_attention
from sdvg_kernels.masked import config
from sdvg_kernels.testing import Lane, assert_within_budget


class Made(NamedTuple):
    """What the op takes, and who sees which slot, bool [B, T, S]."""

    query: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor
    sees: torch.Tensor


def words_of(bits: list[set[int]], words: int) -> list[list[int]]:
    """Return each entry's set of bits as int32 words."""
    unsigned = [
        [sum(1 << bit % 32 for bit in entry if bit // 32 == word) for word in range(words)]
        for entry in bits
    ]
    return [[word - (word >> 31 << 32) for word in entry] for entry in unsigned]


def tree(nodes: int, chain: int, start: int, rows: int, random: torch.Generator) -> list[set[int]]:
    """Return the bits of a chain from 0, of a random tree from `start`, and of padding."""
    bits = [set(range(i + 1)) for i in range(chain)]
    before = set(range(chain))
    for j in range(nodes):
        parent = int(torch.randint(j, (), generator=random)) if j else None
        above = before if parent is None else bits[chain + parent]
        bits.append(above | {start + j})
    return [*bits, *[set()] * (rows - len(bits))]


def make(
    lengths: list[int],
    bits: list[list[set[int]]],
    words: int,
    size: int,
    heads: tuple[int, int],
    dim: int,
    random: torch.Generator,
    lane: Lane,
    dtype: torch.dtype = torch.float32,
    pad: list[int] | None = None,
) -> Made:
    """Return inputs with NaN in every slot that no entry of a sequence sees."""
    rows, batch = len(bits[0]), len(lengths)
    sees = torch.zeros(batch, rows, size, dtype=torch.bool)
    for b, t in itertools.product(range(batch), range(rows)):
        first = pad[b] if pad else 0
        seen = set(range(first, lengths[b])) if bits[b][t] else set()
        seen |= {lengths[b] + bit for bit in bits[b][t]}
        sees[b, t, [slot for slot in seen if slot < size]] = True
    tensors = [
        torch.randn(batch, length, count, dim, generator=random).to(dtype)
        for length, count in ((rows, heads[0]), (size, heads[1]), (size, heads[1]))
    ]
    for cache in tensors[1:]:
        cache[~sees.any(1)] = torch.nan
    mask = torch.tensor([words_of(entries, words) for entries in bits], dtype=torch.int32)
    tensors += [torch.tensor(lengths, dtype=torch.int32), mask, sees]
    return Made(*(tensor.to(lane.device) for tensor in tensors))


def example(
    lane: Lane,
    random: torch.Generator,
    heads: tuple[int, int] = (2, 1),
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> Made:
    """Return sequences of different lengths: a tree behind a chain, and one at the start."""
    bits = [tree(7, 2, 32, 10, random), tree(10, 0, 0, 10, random)]
    return make([37, 0], bits, 2, 72, heads, dim, random, lane, dtype, **options)


def run(lane: Lane, made: Made, **options: object) -> torch.Tensor:
    """Return the op's output."""
    options = {"implementation": lane.implementation, **options}
    return tree_attention(*made[:5], **options)


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


def check(out: torch.Tensor, made: Made) -> None:
    """Assert that `out` is within its budget, and 0 where nothing is seen."""
    query, k, v, _, _, sees = made
    exact = attention(query.double(), k.double(), v.double(), sees)
    assert_within_budget(out, attention(query, k, v, sees), exact)
    assert not out[~sees.any(2)].any()
    assert out.is_contiguous()


def test_entries_see_the_committed_slots_and_those_of_their_bits(random: torch.Generator) -> None:
    # the contract in words, slot by slot: a chain, a tree with a highest bit, padding
    bits = [{0}, {0, 1}, {0, 1, 32}, {0, 1, 32, 33}, {0, 1, 32, 34}, {0, 1, 63}, set()]
    mask = torch.tensor([words_of(bits, 2)] * 2, dtype=torch.int32)
    lengths, pad = torch.tensor([[5, 0], [2, 0]], dtype=torch.int32)
    query = torch.randn(2, 7, 4, 8, generator=random, dtype=torch.float64)
    k, v = (torch.randn(2, 70, 2, 8, generator=random, dtype=torch.float64) for _ in range(2))
    out = tree_attention(query, k, v, lengths, mask, cache_leftpad=pad)
    for b, (length, first) in enumerate(zip(lengths.tolist(), pad.tolist(), strict=True)):
        for t, entry in enumerate(bits):
            seen = [*range(first, length), *(length + bit for bit in entry)] if entry else []
            for h in range(4):
                weights = (k[b, seen, h // 2] @ query[b, t, h] * 8**-0.5).softmax(0)
                expected = weights @ v[b, seen, h // 2]
                assert_within_budget(out[b, t, h], expected, expected)


@pytest.mark.parametrize(
    ("heads", "dim"), [((2, 2), 64), ((4, 1), 64), ((3, 1), 100), ((4, 2), 128)]
)
def test_attention_equals_a_dense_mask(
    heads: tuple[int, int], dim: int, lane: Lane, random: torch.Generator
) -> None:
    made = example(lane, random, heads, dim)
    check(run(lane, made), made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_within_twice_plain_pytorch(
    dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    made = example(lane, random, (4, 2), dtype=dtype)
    check(run(lane, made), made)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 31, 33])
def test_bits_are_found_wherever_the_tree_begins(
    length: int, lane: Lane, random: torch.Generator
) -> None:
    # of three words, the first and the last bit of each
    edges = (0, 31, 32, 63, 64, 95)
    bits = [[{bit} for bit in edges] + [set(edges), {31, 64}]]
    # to the end of the cache, and beyond
    for size in (length + 96, length + 70):
        made = make([length], bits, 3, size, (1, 1), 64, random, lane)
        behind = made.k.new_full((1, 50, 1, 64), torch.nan)
        k, v = (torch.cat((cache, behind), 1)[:, :size] for cache in (made.k, made.v))
        check(run(lane, made._replace(k=k, v=v)), made)


@pytest.mark.parametrize(
    ("splits", "dim", "combined"),
    [
        (1, 64, "last program"),
        (2, 64, "last program"),
        (2, 64, "second launch"),
        (5, 100, "last program"),
    ],
)
def test_the_number_of_splits_changes_only_rounding(
    splits: int,
    dim: int,
    combined: str,
    lane: Lane,
    random: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if combined == "second launch":
        if lane.implementation != "triton":
            pytest.skip("the reference combines nothing")
        combine = importlib.import_module("sdvg_kernels._combine")
        monkeypatch.setattr(combine, "choose", lambda *_: combine.COMBINE)
    made = example(lane, random, (3, 1), dim)
    out = run(lane, made, num_splits=splits)
    check(out, made)
    assert torch.equal(run(lane, made, num_splits=splits), out)


def test_programs_may_finish_in_any_order(
    lane: Lane, random: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lane.name != "interpreter":
        pytest.skip("the order of a GPU's programs is its own")
    interpreter = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    tickets = importlib.import_module("sdvg_kernels._tickets")
    set_grid_idx = interpreter.set_grid_idx
    made = example(lane, random, (1, 1))
    first = run(lane, made, num_splits=3)
    # sequences x splits
    order = [5, 1, 3, 0, 4, 2]
    monkeypatch.setattr(interpreter, "set_grid_idx", lambda x, y, z: set_grid_idx(order[x], y, z))
    assert torch.equal(run(lane, made, num_splits=3), first)
    assert not tickets._POOLS[made.query.device].take(0, 6).any()


def test_a_batch_equals_its_sequences_one_by_one(lane: Lane, random: torch.Generator) -> None:
    made = example(lane, random)
    out = run(lane, made, num_splits=2)
    for b in range(2):
        alone = run(lane, Made(*(tensor[b : b + 1] for tensor in made)), num_splits=2)
        torch.testing.assert_close(out[b : b + 1], alone, rtol=0, atol=1e-6)


def test_padded_prompts_and_other_cache_rows_are_read_in_place(
    lane: Lane, random: torch.Generator
) -> None:
    # the second sequence's padding is longer than what is committed
    pad = [17, 20]
    made = example(lane, random, (2, 2), pad=pad)
    query, k, v, lengths, mask, _ = made
    # of a cache of 3 rows and twice the slots: rows 2 and 0, every other slot
    index = torch.tensor([2, 0], dtype=torch.int32, device=lane.device)
    wide = [
        cache.new_full((3, 2 * cache.shape[1], *cache.shape[2:]), torch.nan) for cache in (k, v)
    ]
    for large, cache in zip(wide, (k, v), strict=True):
        large[[2, 0], ::2] = cache
    around = query.new_full((2, query.shape[1], 3, 128), torch.nan)
    strided = around[:, :, 1:, 32:96].copy_(query)
    # words in the middle dim, entries in the last
    turned = mask.new_full((2, 3, 2 * mask.shape[1]), -1)[:, 1:, ::2].mT.copy_(mask)
    caches = (large[:, ::2] for large in wide)
    out = run(
        lane,
        Made(strided, *caches, lengths, turned, made.sees),
        cache_batch_idx=index,
        cache_leftpad=torch.tensor(pad, dtype=torch.int32, device=lane.device),
    )
    check(out, made)


def test_a_sequence_of_padding_reads_nothing(lane: Lane, random: torch.Generator) -> None:
    bits = [[set()] * 3, [{0}, set(), {0, 1}]]
    made = make([30, 20], bits, 1, 40, (2, 1), 64, random, lane)
    assert made.k[0].isnan().all()
    check(run(lane, made, num_splits=2), made)


def test_a_nan_that_is_seen_is_not_hidden(lane: Lane, random: torch.Generator) -> None:
    made = example(lane, random)
    made.v[0, 0] = torch.nan
    # the last node of the second sequence's tree is seen by nobody else
    made.k[1, 9] = torch.nan
    out = run(lane, made)
    assert out[0][made.sees[0].any(1)].isnan().all()
    assert out[1].isnan().any(-1).any(-1).nonzero()[:, 0].tolist() == [9]


def test_more_rows_than_a_tile_and_more_words_than_a_tile_of_keys(
    lane: Lane, random: torch.Generator
) -> None:
    bits = [tree(20, 3, 32, 23, random)]
    bits[0][20] |= {100}
    made = make([23], bits, 4, 140, (2, 1), 64, random, lane)
    check(run(lane, made), made)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_entries_give_nothing(shape: tuple[int, int], lane: Lane) -> None:
    query = torch.zeros(*shape, 2, 64, device=lane.device)
    cache = torch.zeros(shape[0], 9, 2, 64, device=lane.device)
    lengths = torch.zeros(shape[0], dtype=torch.int32, device=lane.device)
    mask = torch.zeros(*shape, 1, dtype=torch.int32, device=lane.device)
    out = run(lane, Made(query, cache, cache, lengths, mask, mask))
    assert out.shape == query.shape


def test_opcheck(random: torch.Generator) -> None:
    made = example(Lane("reference", "cpu", "reference"), random)
    pad, index = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.sdvg_kernels.tree_attention, (*made[:5], index, pad, 0.1, None, "reference")
    )


GOOD = {
    "query": torch.zeros(2, 3, 4, 64),
    "k_cache": torch.zeros(2, 9, 2, 64),
    "v_cache": torch.zeros(2, 9, 2, 64),
    "lengths": torch.zeros(2, dtype=torch.int32),
    "mask": torch.zeros(2, 3, 2, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"query": torch.zeros(2, 3, 64)},
            ValueError,
            "query must be [B, T, H, D], got [2, 3, 64]",
        ),
        (
            {"k_cache": torch.zeros(2, 9, 2, 32)},
            ValueError,
            "k_cache must be [Bc, S, Hk, D] with query's D and a slot at least, got [2, 9, 2, 32]",
        ),
        (
            {"v_cache": torch.zeros(2, 8, 2, 64)},
            ValueError,
            "v_cache must have the shape of k_cache, got [2, 8, 2, 64]",
        ),
        (
            {"query": torch.zeros(2, 3, 3, 64)},
            ValueError,
            "k_cache must have a number of heads that divides query's, got [2, 9, 2, 64]",
        ),
        (
            {"k_cache": torch.zeros(2, 9, 2, 64).half()},
            TypeError,
            "k_cache must have query's dtype, got torch.float16",
        ),
        (
            {"query": GOOD["query"].int()},
            TypeError,
            "query must be bfloat16, float16, float32 or float64, got torch.int32",
        ),
        (
            {"k_cache": torch.zeros(3, 9, 2, 64), "v_cache": torch.zeros(3, 9, 2, 64)},
            ValueError,
            "k_cache must have query's B, got [3, 9, 2, 64]; or pass cache_batch_idx",
        ),
        (
            {"cache_batch_idx": torch.zeros(2)},
            TypeError,
            "cache_batch_idx must be int32, got torch.float32",
        ),
        (
            {"cache_leftpad": torch.zeros(3, dtype=torch.int32)},
            ValueError,
            "cache_leftpad must be [B] of query, got [3]",
        ),
        (
            {"lengths": torch.zeros(1, dtype=torch.int32)},
            ValueError,
            "lengths must be [B] of query, got [1]",
        ),
        ({"lengths": torch.zeros(2).long()}, TypeError, "lengths must be int32, got torch.int64"),
        (
            {"lengths": torch.zeros(2, 2, dtype=torch.int32)[:, 0]},
            ValueError,
            "lengths must be contiguous, got (2,); call .contiguous()",
        ),
        ({"mask": torch.zeros(2, 3, 2)}, TypeError, "mask must be int32, got torch.float32"),
        (
            {"mask": torch.zeros(2, 3, 0, dtype=torch.int32)},
            ValueError,
            "mask must be [B, T, W] with query's B and T and a word at least, got [2, 3, 0]",
        ),
        ({"num_splits": 0}, ValueError, "num_splits must be at least 1 or None, got 0"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite, got nan"),
        (
            {"query": torch.zeros(2, 3, 64, 4).mT},
            ValueError,
            "query, k_cache and v_cache must be contiguous in the last dim, got another stride; "
            "call .contiguous()",
        ),
        (
            {"implementation": "cuda"},
            ValueError,
            "implementation must be one of 'reference', 'triton', got 'cuda'",
        ),
    ],
)
def test_bad_input_gets_one_sentence(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        tree_attention(**{**GOOD, **change})
    assert str(caught.value) == f"tree_attention: {text}"


def test_triton_says_what_it_cannot_run() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("on a GPU machine the interpreter is off")
    tables = {"lengths": GOOD["lengths"][:1], "mask": GOOD["mask"][:1, :2]}
    call = functools.partial(tree_attention, **tables, implementation="triton")
    query, cache = torch.zeros(1, 2, 1, 96), torch.zeros(1, 5, 1, 96)
    with pytest.raises(NotImplementedError, match="the Triton kernel has head dim 64, 100 and 128"):
        call(query, cache, cache)
    # rows of 100 that no 8 bytes align
    odd = torch.zeros(1, 5, 1, 101)[..., :100]
    with pytest.raises(NotImplementedError, match="strides that are multiples of 4"):
        call(torch.zeros(1, 2, 1, 100), odd, odd)
    with pytest.raises(NotImplementedError, match=r"no torch\.float64"):
        call(*(torch.zeros(1, n, 1, 64).double() for n in (2, 5, 5)))


def test_launches_exist_for_every_head_dim_and_fill_the_machine() -> None:
    for capability, dim, dtype, rows in itertools.product(
        ((8, 0), (9, 0), (10, 0), (12, 0), None),
        _few_rows.HEAD_DIMS,
        _few_rows.DTYPES,
        (1, 17, 640),
    ):
        assert config.choose(capability, dim, dtype, rows).BT >= 16
    # Cosmos on an H200: 8 heads of keys, 64 entries of 4 heads
    launch = config.choose((9, 0), 128, torch.bfloat16, 256)
    tile_bytes = 2 * launch.BS * 128 * 2
    assert config.splits(launch, 8 * 2, 12800 // launch.BS, 132, tile_bytes) == 8
    # LlamaGen with guidance: a second launch would cost more than a split saves
    launch = config.choose((9, 0), 64, torch.bfloat16, 64)
    assert config.splits(launch, 2 * 20, 1144 // launch.BS, 132, 2 * launch.BS * 64 * 2) == 1


def _on_gpu(
    lengths: list[int],
    size: int,
    heads: tuple[int, int],
    dim: int,
    random: torch.Generator,
    *,
    nodes: int = 59,
    words: int = 3,
) -> Made:
    """Return a pass of 5 + `nodes` entries, one of padding, in bfloat16."""
    lane = Lane("triton", "cuda", "triton")
    bits = [tree(nodes, 5 * (b % 2), 32, nodes + 6, random) for b in range(len(lengths))]
    return make(lengths, bits, words, size, heads, dim, random, lane, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize(
    ("lengths", "size", "heads", "dim", "nodes", "words"),
    [
        ([1000, 517], 1144, (20, 20), 64, 59, 3),
        ([12600, 12704], 12800, (32, 8), 128, 59, 3),
        ([900, 3], 1300, (32, 32), 100, 40, 3),
        ([700], 1100, (4, 4), 128, 150, 8),
        ([801], 900, (8, 2), 64, 3, 2),
    ],
)
def test_real_shapes_on_the_gpu_equal_a_dense_mask(
    lengths: list[int],
    size: int,
    heads: tuple[int, int],
    dim: int,
    nodes: int,
    words: int,
    splits: int | None,
    random: torch.Generator,
) -> None:
    made = _on_gpu(lengths, size, heads, dim, random, nodes=nodes, words=words)
    lane = Lane("triton", "cuda", "triton")
    out = run(lane, made, num_splits=splits)
    check(out, made)
    assert torch.equal(run(lane, made, num_splits=splits), out)


@pytest.mark.gpu
def test_a_graph_replays_another_tree(random: torch.Generator) -> None:
    made = _on_gpu([300, 411], 600, (8, 4), 64, random)
    tree_attention(*made[:5])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tree_attention(*made[:5])
    for lengths in ([17, 505], [430, 0]):
        other = _on_gpu(lengths, 600, (8, 4), 64, random)
        for mine, its in zip(made, other, strict=True):
            mine.copy_(its)
        graph.replay()
        check(out, made)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31_are_read(random: torch.Generator) -> None:
    # the last row of a cache of 4.3 GB
    made = _on_gpu([900], 1024, (2, 2), 64, random)
    wide = [torch.zeros(1 << 14, 1024, 2, 64, dtype=torch.bfloat16, device="cuda")]
    wide[0][-1] = made.k[0]
    index = torch.tensor([len(wide[0]) - 1], dtype=torch.int32, device="cuda")
    made = made._replace(v=made.k)
    out = tree_attention(
        made.query, wide[0], wide[0], made.lengths, made.mask, cache_batch_idx=index
    )
    check(out, made)


@pytest.mark.gpu
def test_the_gpu_serves_with_triton() -> None:
    assert not _few_rows.available("cuda")["triton"]
    assert next(iter(_few_rows.available("cuda"))) == "triton"
