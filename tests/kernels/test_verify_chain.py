"""verify_chain in every lane."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdvg_kernels import TokenTree, Verified, sample_tokens, verify_chain, verify_tree
from sdvg_kernels.testing import Lane
from sdvg_kernels.verify import reference
from tests.kernels.drafts import Warped, distribution, keys, p_value

DRAFTERS = pytest.mark.parametrize("drafter", ["certain", "logits", "probs"])


def _same(left: Verified, right: Verified) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(left, right, strict=True))


def _drafted(
    drafter: str, guess: Tensor, guess_uncond: Tensor | None, warp: Warped, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return tokens drawn from a drafter's logits [B, n, V], and what tells the op of it."""
    batch, count, vocabulary = guess.shape
    rows = {
        "seeds": torch.full((batch * count,), seed, device=guess.device),
        "sequences": torch.arange(batch * count, device=guess.device),
        "positions": torch.zeros(batch * count, dtype=torch.int32, device=guess.device),
    }
    options = warp._asdict()
    uncond = None if guess_uncond is None else guess_uncond.reshape(-1, vocabulary)
    options["uncond"] = uncond
    if uncond is None:
        options["guidance"] = 1.0
    draft = sample_tokens(guess.reshape(-1, vocabulary), **rows, **options)
    draft = draft.view(batch, count)
    if drafter == "certain":
        return draft, {}
    if drafter == "logits":
        given = {"draft_logits": guess}
        return draft, given if uncond is None else given | {"draft_uncond": guess_uncond}
    how = reference.Warp(options["guidance"], warp.temperature, warp.top_k or 0, warp.top_p)
    left, _ = reference.processed(guess.reshape(-1, vocabulary), uncond, how)
    return draft, {"draft_probs": left.softmax(1).view(guess.shape).float()}


def _walked(
    draft: Tensor, logits: Tensor, q: Tensor | None, keyed: dict[str, Tensor], warp: Warped
) -> tuple[list[int], list[int]]:
    """Return (counts, tokens) by the rule of Leviathan et al., in its own words."""
    counts, tokens = [], []
    for b in range(len(logits)):
        key = reference.Keys(*(value[b : b + 1].cpu() for value in keyed.values()))
        level, left = 0, None
        while left is None:
            uncond = None if warp.uncond is None else warp.uncond[b, level]
            p = distribution(logits[b, level], uncond, warp)
            noise = key.at(torch.tensor([0]), level)
            if level == draft.shape[1]:
                left = p
                break
            x = int(draft[b, level])
            guess = torch.zeros_like(p)
            guess[x] = 1
            if q is not None:
                guess = q[b, level].double().cpu()
            coin = reference.uniform(noise, 1, torch.device("cpu")).item()
            if p[x] > 0 and coin <= p[x] / guess[x]:
                level += 1
            else:
                left = (p - guess).clamp(min=0)
        counts.append(level + 1)
        tokens.append(int(reference.race(left.log()[None], noise, torch.tensor([-1]))))
    return counts, tokens


@DRAFTERS
@pytest.mark.parametrize(
    ("vocabulary", "warp"),
    [(6, {}), (9, {"temperature": 0.8, "top_k": 6, "guidance": 1.5}), (4200, {"top_k": 4000})],
)
def test_tokens_are_accepted_and_replaced_by_the_rule(
    drafter: str, vocabulary: int, warp: dict[str, float], lane: Lane, random: torch.Generator
) -> None:
    batch = 150 if lane.name != "interpreter" else 5
    batch, count = (2, 2) if vocabulary > 1000 else (batch, 3)
    logits, uncond = torch.randn(2, batch, count + 1, vocabulary, generator=random)
    near = 0.5 * torch.randn(2, batch, count, vocabulary, generator=random)
    guess, guess_uncond = logits[:, :-1] + near[0], uncond[:, :-1] + near[1]
    if vocabulary > 1000:
        for each in (logits, guess):
            each[:, :, ::2050] += 12
    warped = Warped(uncond if "guidance" in warp else None, **warp)
    given_uncond = None if warped.uncond is None else guess_uncond
    draft, given = _drafted(drafter, guess, given_uncond, warped, 5)
    _, probs = _drafted("probs", guess, given_uncond, warped, 5)
    q = None if drafter == "certain" else probs["draft_probs"]
    counts, tokens = _walked(draft, logits, q, keys(batch), warped)
    options = warped._asdict() | given
    out = verify_chain(
        draft.to(lane.device),
        logits.to(lane.device),
        **keys(batch, lane.device),
        **{k: v.to(lane.device) if isinstance(v, Tensor) else v for k, v in options.items()},
        implementation=lane.implementation,
    )
    assert out.counts.tolist() == counts
    assert out.tokens.tolist() == tokens
    places = torch.arange(count + 1)
    assert torch.equal(out.path.cpu(), torch.where(places < out.counts.cpu()[:, None], places, -1))
    assert max(counts) > 1


@DRAFTERS
@pytest.mark.parametrize(
    "where", [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_what_comes_out_is_distributed_as_the_targets_own_tokens(drafter: str, where: str) -> None:
    # the second row's logits depend on the first token, as a model's do
    count, vocabulary = 110_000, 6
    random = torch.Generator().manual_seed(4)
    first, second = torch.randn(vocabulary, generator=random), torch.randn(6, 6, generator=random)
    uncond, guesses = torch.randn(6, generator=random), torch.randn(2, 6, generator=random)
    warp = Warped(uncond, guidance=1.5, temperature=0.9, top_k=5)
    guess = guesses.to(where).expand(count, 2, -1)
    guess_uncond = uncond.to(where).expand(count, 2, -1)
    draft, given = _drafted(drafter, guess, guess_uncond, warp, 6)
    logits = torch.zeros(count, 3, vocabulary, device=where)
    logits[:, 0] = first.to(where)
    logits[:, 1] = second.to(where)[draft[:, 0]]
    keyed = {
        "seeds": torch.full((count,), 11, device=where),
        "sequences": torch.arange(count, device=where) // 1000,
        "positions": torch.arange(count, device=where) % 1000 * 3,
    }
    options = warp._asdict() | given | {"uncond": uncond.to(where).expand(count, 3, -1)}
    out = verify_chain(draft, logits, **keyed, **options)
    counts, tokens, draft = out.counts.cpu(), out.tokens.cpu(), draft.cpu()
    came = torch.where(counts > 1, draft[:, 0], tokens)
    assert p_value(came.bincount(minlength=6), distribution(first, uncond, warp)) > 0.01
    came = torch.where(counts > 2, draft[:, 1], tokens)
    for x in range(vocabulary):
        behind = (counts > 1) & (draft[:, 0] == x)
        if behind.any():
            chances = distribution(second[x], uncond, warp)
            assert p_value(came[behind].bincount(minlength=6), chances) > 0.01
    behind = counts > 2
    chances = distribution(torch.zeros(6), uncond, warp)
    assert p_value(tokens[behind].bincount(minlength=6), chances) > 0.01


def test_a_certain_chain_is_a_tree_without_siblings(lane: Lane, random: torch.Generator) -> None:
    logits = torch.randn(4, 4, 5, generator=random)
    draft = logits[:, :-1].topk(2).indices[:, :, 1]
    tokens = torch.cat((draft[:, :1], draft), 1)
    tree = TokenTree.from_parents(tokens.to(lane.device), [-1, 0, 1, 2])
    logits, draft = logits.to(lane.device), draft.to(lane.device)
    for depth in (None, 1):
        run = {"depth": depth, "top_k": 4, "implementation": lane.implementation}
        run |= keys(4, lane.device)
        assert _same(verify_chain(draft, logits, **run), verify_tree(tree, logits, **run))


@DRAFTERS
def test_at_temperature_0_the_likeliest_tokens_are_accepted(drafter: str, lane: Lane) -> None:
    logits = torch.zeros(3, 3, 5, device=lane.device)
    # of equally likely ones the lowest
    logits[:, 0, 2:4], logits[:, 1, 1], logits[:, 2, 4] = 1, 1, 1
    draft = torch.tensor([[2, 1], [2, 3], [3, 1]], dtype=torch.int32, device=lane.device)
    given = {"draft_logits": logits[:, 1:], "draft_probs": logits[:, :2]}
    given = {name: value for name, value in given.items() if name == f"draft_{drafter}"}
    run = {"temperature": 0, "implementation": lane.implementation}
    out = verify_chain(draft, logits, **given, **run)
    assert out.counts.tolist() == [3, 2, 1]
    assert out.tokens.tolist() == [4, 1, 2]


def test_probabilities_that_do_not_sum_to_1_are_no_distribution(lane: Lane) -> None:
    logits = torch.zeros(6, 2, 4, device=lane.device)
    probs = torch.full((6, 1, 4), 0.25, device=lane.device)
    probs[1] = 0.2
    probs[2, 0, 0] = math.nan
    probs[3, 0, :2] = torch.tensor([-0.5, 1.0], device=lane.device)
    # rounded as 8 bits are
    probs[4, 0, 0] = 0.252
    draft = torch.ones(6, 1, dtype=torch.int64, device=lane.device)
    logits[5, 0, 3] = math.nan
    run = {**keys(6, lane.device), "implementation": lane.implementation}
    out = verify_chain(draft, logits, draft_probs=probs, **run)
    assert (out.tokens < 0).tolist() == [False, True, True, True, False, True]
    assert (out.counts == 0).tolist() == [False, True, True, True, False, True]
    with pytest.raises(ValueError, match=r"^verify_chain: logits .* sequences \[1, 2, 3, 5\]; it"):
        out.check("verify_chain")


def test_an_id_outside_the_vocabulary_is_rejected(lane: Lane, random: torch.Generator) -> None:
    logits = torch.randn(2, 2, 4, generator=random).to(lane.device)
    draft = torch.tensor([[-1], [4]], device=lane.device)
    run = {**keys(2, lane.device), "implementation": lane.implementation}
    expected = sample_tokens(logits[:, 0], **run)
    for given in ({}, {"draft_logits": logits[:, :1]}, {"draft_probs": logits[:, :1].softmax(2)}):
        out = verify_chain(draft, logits, **given, **run)
        assert out.counts.max() < 2
        if not given:
            assert torch.equal(out.tokens, expected)


def test_strided_chains_of_any_float_are_read(lane: Lane, random: torch.Generator) -> None:
    wide = torch.randn(7, 4, 40, generator=random).to(lane.device, torch.bfloat16)
    logits, guess = wide[1:6:2, :3, :39:3], wide.transpose(0, 1)[:3, 2:4, 1:40:3]
    draft = torch.arange(12, device=lane.device).view(3, 4)[:, ::2]
    run = {"top_k": 11, "implementation": lane.implementation}
    out = verify_chain(draft, logits, draft_logits=guess, **keys(3, lane.device), **run)
    plain = (draft.cpu(), logits.float().cpu().contiguous())
    run["implementation"] = "reference"
    want = verify_chain(*plain, draft_logits=guess.float().cpu().contiguous(), **keys(3), **run)
    assert _same(out, want)


def test_no_sequences_and_no_draft_give_what_they_can(lane: Lane, random: torch.Generator) -> None:
    run = {"implementation": lane.implementation}
    draft = torch.empty(0, 2, dtype=torch.int64, device=lane.device)
    logits = torch.empty(0, 3, 9, device=lane.device)
    out = verify_chain(draft, logits, **keys(0, lane.device), **run)
    assert [list(field.shape) for field in out] == [[0, 3], [0], [0]]
    draft = torch.empty(5, 0, dtype=torch.int64, device=lane.device)
    logits = torch.randn(5, 1, 9, generator=random).to(lane.device)
    run |= keys(5, lane.device)
    for given in ({}, {"draft_logits": logits[:, :0]}, {"draft_probs": logits[:, :0]}):
        out = verify_chain(draft, logits, **given, **run)
        assert torch.equal(out.tokens, sample_tokens(logits[:, 0], **run))
        assert out.path.tolist() == [[0]] * 5


def test_opcheck(random: torch.Generator) -> None:
    logits, uncond = torch.randn(2, 3, 4, 9, generator=random)
    draft, guess = torch.randint(9, (3, 3), generator=random), logits[:, 1:]
    tail = (*keys(3).values(), 2.0, 1.0, 4, 0.9, 3, "reference")
    torch.library.opcheck(
        torch.ops.sdvg_kernels.verify_chain, (draft, logits, guess, None, uncond, None, *tail)
    )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logits": torch.zeros(2, 4)}, ValueError, "logits must be [B, n + 1, V] with at least"),
        ({"draft": torch.zeros(2, 3).long()}, ValueError, "draft must be [B, n] for logits [B, n"),
        ({"draft": torch.zeros(2, 2)}, TypeError, "draft must be int32 or int64, got torch.float"),
        (
            {"draft_logits": torch.zeros(2, 2, 4), "draft_probs": torch.zeros(2, 2, 4)},
            ValueError,
            "draft_probs must come without draft_logits, got both",
        ),
        ({"draft_logits": torch.zeros(2, 3, 4)}, ValueError, "draft_logits must be [B, n, V] for"),
        ({"draft_probs": torch.zeros(2, 2, 4).int()}, TypeError, "draft_probs must be floating"),
        ({"draft_uncond": torch.zeros(2, 2, 4)}, ValueError, "draft_uncond must come with draft_l"),
        ({"sequences": None}, ValueError, "sequences must be given unless temperature is 0, got"),
        ({"depth": -2}, ValueError, "depth must be at least 0, got -2"),
        ({"implementation": "host"}, ValueError, "implementation must be one of 'reference', 'tri"),
    ],
)
def test_bad_input_gets_one_sentence(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    options = {"draft": torch.zeros(2, 2).long(), "logits": torch.zeros(2, 3, 4), **keys(2)}
    with pytest.raises(error) as caught:
        verify_chain(**{**options, **change})
    assert str(caught.value).startswith(f"verify_chain: {text}")


@pytest.mark.gpu
@DRAFTERS
def test_a_graph_replays_and_both_devices_accept_the_same(
    drafter: str, random: torch.Generator
) -> None:
    warp = Warped(temperature=0.7, top_k=2000)

    def made(seed: int) -> dict[str, Tensor]:
        logits = (3 * torch.randn(4, 6, 16384, generator=random)).bfloat16().float()
        guess = logits[:, :-1] + torch.randn(4, 5, 16384, generator=random)
        draft, given = _drafted(drafter, guess, None, warp, seed)
        return {"draft": draft, "logits": logits, **given, **keys(4, seed=seed)}

    options = {"temperature": 0.7, "top_k": 2000}
    there = {name: tensor.cuda() for name, tensor in made(3).items()}
    verify_chain(**there, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = verify_chain(**there, **options)
    for seed in (1, 2):
        here = made(seed)
        for name, tensor in here.items():
            there[name].copy_(tensor)
        graph.replay()
        assert _same(out, verify_chain(**here, **options))
