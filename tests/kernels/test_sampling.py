"""sample_tokens in every lane."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from sdvg_kernels import sample_tokens
from sdvg_kernels.sampling import reference
from sdvg_kernels.testing import Lane


def _keys(rows: int, device: str = "cpu", seed: int = 7) -> dict[str, Tensor]:
    return {
        "seeds": torch.full((rows,), seed - 2**40, device=device),
        "sequences": torch.arange(rows, device=device) // 3,
        "positions": torch.arange(rows, dtype=torch.int32, device=device) % 3 + 1000,
    }


def _expected(
    logits: Tensor,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 7,
) -> list[int]:
    """Choose row by row in float64, by the words of the contract."""
    keys = _keys(len(logits), seed=seed)
    noise = reference.exponential(*keys.values(), logits.shape[1])
    chosen = []
    for n in range(len(logits)):
        x = logits[n].float().cpu()
        if uncond is not None:
            u = uncond[n].float().cpu()
            x = u + torch.tensor(guidance, dtype=torch.float32) * (x - u)
        if temperature == 0:
            chosen.append(int((x == x.max()).nonzero()[0]))
            continue
        kept = torch.ones_like(x, dtype=torch.bool)
        if top_k is not None:
            kept &= x >= x.sort(descending=True).values[min(top_k, len(x)) - 1]
        chance = (x.double() / temperature).masked_fill(~kept, -torch.inf).softmax(0)
        if top_p < 1:
            above = torch.stack([chance[x > value].sum() for value in x])
            kept &= above < top_p
        score = (x.double() / temperature - noise[n].log()).masked_fill(~kept, -torch.inf)
        chosen.append(int(score.argmax()))
    return chosen


@pytest.mark.parametrize(
    "warp",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 1},
        {"temperature": 1.3, "top_k": 37},
        {"temperature": 0.9, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 50, "top_p": 0.9},
        {"top_k": 10**6},
    ],
)
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_the_token_is_the_float64_references(
    warp: dict[str, float], guidance: float | None, lane: Lane, random: torch.Generator
) -> None:
    logits, uncond = (4 * torch.randn(6, 337, generator=random) for _ in range(2))
    options = warp if guidance is None else {**warp, "uncond": uncond, "guidance": guidance}
    expected = _expected(logits, **options)
    on_device = {k: v.to(lane.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    token = sample_tokens(
        logits.to(lane.device),
        **_keys(6, lane.device),
        **on_device,
        implementation=lane.implementation,
    )
    assert token.tolist() == expected


# one in each launch; 20000 is searched tile by tile
@pytest.mark.parametrize("vocabulary", [1, 3, 1025, 5000, 16384, 20000])
def test_all_sizes_of_vocabulary_agree(
    vocabulary: int, lane: Lane, random: torch.Generator
) -> None:
    logits = (3 * torch.randn(2, vocabulary, generator=random)).bfloat16()
    options = {"temperature": 0.8, "top_k": 800, "top_p": 0.95}
    token = sample_tokens(
        logits.to(lane.device),
        **_keys(2, lane.device),
        **options,
        implementation=lane.implementation,
    )
    # in float64 from the same noise
    noise = reference.exponential(*_keys(2).values(), vocabulary)
    kept = reference.warped(logits.float(), 0.8, min(800, vocabulary - 1), 0.95)
    assert token.tolist() == (kept - noise.log()).argmax(1).tolist()


def test_ties_are_kept_together(lane: Lane) -> None:
    # the third largest is one of four; nothing else may come
    logits = torch.tensor([[2.0, 1.0, -0.0, 0.0, 0.0, 0.0, -1.0]], device=lane.device)
    rows = logits.expand(32, -1)
    for warp in ({"top_k": 3}, {"top_p": 0.5}):
        keys = _keys(32, lane.device)
        keys["positions"] = torch.arange(32, device=lane.device)
        run = {"temperature": 4.0, "implementation": lane.implementation}
        token = sample_tokens(rows, **keys, **warp, **run)
        assert set(token.tolist()) == {0, 1, 2, 3, 4, 5}


def test_of_equal_scores_the_lowest_id_wins(lane: Lane) -> None:
    logits = torch.zeros(1, 5000, device=lane.device)
    logits[0, [4200, 4999]] = 1
    token = sample_tokens(logits, temperature=0.0, implementation=lane.implementation)
    assert token.tolist() == [4200]


def test_a_banned_token_never_comes(lane: Lane) -> None:
    logits, uncond = torch.zeros(2, 40, 4, device=lane.device)
    logits[:, 1:3] = -math.inf
    uncond[:, 2:] = -math.inf
    uncond[:, 3] = 0
    keys = _keys(40, lane.device)
    run = {"guidance": 5.0, "implementation": lane.implementation}
    assert set(sample_tokens(logits, uncond=uncond, **keys, **run).tolist()) == {0, 3}


def test_a_row_without_a_distribution_gives_minus_one(lane: Lane) -> None:
    logits = torch.zeros(5, 1300, device=lane.device)
    logits[0, 1200] = math.nan
    logits[1, 3] = math.inf
    logits[2] = -math.inf
    logits[3, 1:] = -math.inf
    for temperature in (0.0, 1.0):
        options = {"temperature": temperature, "top_k": 3, "implementation": lane.implementation}
        token = sample_tokens(logits, **_keys(5, lane.device), **options).tolist()
        assert token[:4] == [-1, -1, -1, 0]
        assert token[4] >= 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_go_where_the_index_says(
    dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    logits = torch.randn(5, 50, generator=random).to(lane.device)
    out = torch.full((3, 4), -7, dtype=dtype, device=lane.device)
    index = torch.tensor([11, -1, 0, 12, 5], dtype=torch.int32, device=lane.device)
    keys = _keys(5, lane.device)
    run = {"implementation": lane.implementation}
    token = sample_tokens(logits, **keys, **run)
    assert sample_tokens(logits, **keys, out=out, index=index, **run) is out
    expected = torch.full((12,), -7, dtype=dtype)
    expected[[11, 0, 5]] = token.cpu()[[0, 2, 4]].to(dtype)
    assert torch.equal(out.cpu().view(-1), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_strided_logits_of_any_float_are_read(
    dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    around = torch.full((600, 9), math.nan, dtype=dtype, device=lane.device)
    logits = around.T[2:8:2, 100:500:2].copy_(torch.randn(3, 200, generator=random))
    # a number whose low 32 bits are those of the other lanes, and keys read with a stride
    positions = torch.arange(6, device=lane.device)[::2] % 3 + 1000 + 2**32
    keys = {**_keys(3, lane.device), "positions": positions}
    plain = {**_keys(3), "positions": (torch.arange(6)[::2] % 3 + 1000).int()}
    token = sample_tokens(logits, **keys, top_k=20, implementation=lane.implementation)
    same = sample_tokens(
        logits.float().cpu().contiguous(), **plain, top_k=20, implementation="reference"
    )
    assert torch.equal(token.cpu(), same)


def test_what_runs_beside_a_row_leaves_no_trace(lane: Lane, random: torch.Generator) -> None:
    logits = torch.randn(7, 90, generator=random).to(lane.device)
    keys = _keys(7, lane.device)
    run = {"top_p": 0.9, "implementation": lane.implementation}
    together = sample_tokens(logits, **keys, **run)
    assert torch.equal(sample_tokens(logits, **keys, **run), together)
    for n in (0, 4):
        alone = sample_tokens(
            logits[n : n + 1], **{k: v[n : n + 1] for k, v in keys.items()}, **run
        )
        assert torch.equal(alone, together[n : n + 1])
    keys["seeds"] = keys["seeds"] + 1
    assert not torch.equal(sample_tokens(logits, **keys, **run), together)


def test_noise_is_philox_as_published() -> None:
    # the known answer of Random123, all words 0, for philox4x32-10
    answer = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    zero = torch.zeros(1, dtype=torch.int64)
    noise = reference.exponential(zero, zero, zero, 4)
    bits = [round(float(-torch.expm1(-value)) * 2**32 - 0.5) for value in noise[0]]
    assert tuple(bits) == answer


def test_frequencies_are_those_of_the_distribution(random: torch.Generator) -> None:
    # chi-square with 99.9% quantiles of 11, 4 and 7 degrees of freedom
    logits, uncond = torch.randn(2, 12, generator=random)
    count = 6000
    keys = {
        "seeds": torch.full((count,), 5),
        "sequences": torch.arange(count) // 200,
        "positions": torch.arange(count) % 200,
    }
    x = uncond + 2.0 * (logits - uncond)
    for warp, kept, quantile in (
        ({}, 12, 31.3),
        ({"top_k": 5}, 5, 18.5),
        ({"temperature": 1.5, "top_k": 8}, 8, 24.3),
    ):
        token = sample_tokens(
            logits.expand(count, -1), uncond=uncond.expand(count, -1), guidance=2.0, **keys, **warp
        )
        scores = x.double() / warp.get("temperature", 1.0)
        order = scores.argsort(descending=True)[:kept]
        chance = scores[order].softmax(0) * count
        found = Counter(token.tolist())
        assert sum(found[int(i)] for i in order) == count
        seen = torch.tensor([found[int(i)] for i in order], dtype=torch.float64)
        assert ((seen - chance).square() / chance).sum() < quantile


def test_warpers_are_those_of_transformers(random: torch.Generator) -> None:
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    x = 3 * torch.randn(4, 200, generator=random)
    theirs = logits_process.TemperatureLogitsWarper(0.7)(None, x.double())
    theirs = logits_process.TopKLogitsWarper(60)(None, theirs)
    theirs = logits_process.TopPLogitsWarper(0.9)(None, theirs)
    ours = reference.warped(x, 0.7, 60, 0.9)
    assert torch.equal(ours.isinf(), theirs.isinf())
    torch.testing.assert_close(ours, theirs)


def test_no_rows_give_no_tokens(lane: Lane) -> None:
    logits = torch.empty(0, 9, device=lane.device)
    token = sample_tokens(logits, **_keys(0, lane.device), implementation=lane.implementation)
    assert token.shape == (0,)


def test_opcheck(random: torch.Generator) -> None:
    logits, uncond = torch.randn(2, 3, 9, generator=random)
    out, index = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([0, -1, 5])
    torch.library.opcheck(
        torch.ops.sdvg_kernels.sample_tokens,
        (logits, uncond, *_keys(3).values(), 2.0, 1.0, 4, 0.9, index, out, "reference"),
    )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logits": torch.zeros(3)}, ValueError, "logits must be [N, V] with 1 <= V < 2^31"),
        ({"logits": torch.zeros(3, 2).int()}, TypeError, "logits must be floating, got torch.int"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and at least 0, got -1.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite and at least 0"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0; None keeps all tokens"),
        ({"top_p": 0.0}, ValueError, "top_p must lie in (0, 1], got 0.0"),
        ({"guidance": 2.0}, ValueError, "guidance must be 1 without uncond, got 2.0; give uncond"),
        (
            {"uncond": torch.zeros(3, 3)},
            ValueError,
            "uncond must have the shape of logits, got",
        ),
        ({"uncond": torch.zeros(3, 2).half()}, TypeError, "uncond must have the dtype of logits"),
        ({"seeds": None}, ValueError, "seeds must be given unless temperature is 0, got None"),
        ({"seeds": torch.zeros(3).int()}, TypeError, "seeds must be int64, got torch.int32"),
        (
            {"positions": torch.zeros(2).int()},
            ValueError,
            "positions must be [N], one a row, got",
        ),
        ({"out": torch.zeros(3)}, TypeError, "out must be int32 or int64, got torch.float32"),
        (
            {"out": torch.zeros(4).int()},
            ValueError,
            "out must have a place for each row without",
        ),
        (
            {"out": torch.zeros(3, 2).int().T},
            ValueError,
            "out must be contiguous, got (1, 2)",
        ),
        ({"index": torch.zeros(3).int()}, ValueError, "index must come with out, got it alone"),
        ({"implementation": "cuda"}, ValueError, "implementation must be one of 'reference'"),
    ],
)
def test_bad_input_gets_one_sentence(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    options = {"logits": torch.zeros(3, 2), **_keys(3), **change}
    with pytest.raises(error) as caught:
        sample_tokens(options.pop("logits"), **options)
    assert str(caught.value).startswith(f"sample_tokens: {text}")


@pytest.mark.gpu
def test_a_graph_replays_with_new_logits_and_keys(random: torch.Generator) -> None:
    logits = torch.zeros(6, 337, device="cuda")
    keys, out = _keys(6, "cuda"), torch.zeros(6, dtype=torch.int64, device="cuda")
    index = torch.arange(6, device="cuda")
    options = {"top_k": 50, "top_p": 0.9, "out": out, "index": index}
    sample_tokens(logits, **keys, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_tokens(logits, **keys, **options)
    for seed in (1, 2):
        fresh = 4 * torch.randn(6, 337, generator=random)
        logits.copy_(fresh)
        keys["seeds"].fill_(seed - 2**40)
        index.copy_(torch.randperm(6, generator=random))
        graph.replay()
        expected = _expected(fresh, top_k=50, top_p=0.9, seed=seed)
        assert out[index].tolist() == expected


@pytest.mark.gpu
def test_tokens_are_the_same_on_both_devices(random: torch.Generator) -> None:
    logits, uncond = (4 * torch.randn(48, 20000, generator=random) for _ in range(2))
    options = {"guidance": 3.0, "temperature": 1.1, "top_k": 2000, "top_p": 0.97}
    here = sample_tokens(logits, uncond=uncond, **_keys(48), **options)
    there = sample_tokens(logits.cuda(), uncond=uncond.cuda(), **_keys(48, "cuda"), **options)
    assert torch.equal(here, there.cpu())
