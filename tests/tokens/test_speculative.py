"""Speculative decoding and verification skipping: laws on tiny random models, in float64."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sdvg.models.drafter import EagleDrafter
from sdvg.models.tokens import LlamaSizes, TokenLlama
from sdvg.tokens import DiagonalDecoder, Layout, Sampling
from sdvg.tokens.skipping import Dynamic, Uniform, neighbours
from sdvg.tokens.speculative import (
    Exact,
    Relaxed,
    SpeculativeDecoder,
    SpeculativeGeneration,
    Typical,
)

CODES, WORDS = 18, 6
LAYOUT = Layout(3, 4, CODES, first=2, extra=1)
SAMPLING = Sampling(temperature=0.9, top_k=12, guidance=1.5)


def models(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[TokenLlama, EagleDrafter]:
    """Return a target whose tokens are neither certain nor noise, and a drafter."""
    torch.manual_seed(seed)
    sizes = LlamaSizes(2, 32, 4, 2, 8, 48, CODES + WORDS)
    target = TokenLlama(sizes).to(dtype).eval().requires_grad_(False)
    drafter = EagleDrafter(LlamaSizes(1, 32, 4, 2, 8, 48, CODES + WORDS))
    target.head.weight.mul_(6)
    return target, drafter.to(dtype).eval().requires_grad_(False)


def prompts(count: int, length: int = 5) -> Tensor:
    """Return prompts [count, length]."""
    g = torch.Generator().manual_seed(1)
    return torch.randint(CODES + WORDS, (count, length), generator=g)


def actions(count: int, frames: int, extra: int = 1) -> Tensor:
    """Return ids [count, frames - 1, extra] between frames."""
    g = torch.Generator().manual_seed(2)
    return torch.randint(CODES, CODES + WORDS, (count, frames - 1, extra), generator=g)


def decoder(layout: Layout = LAYOUT, seed: int = 0, **options: object) -> SpeculativeDecoder:
    """Return a decoder of small trees."""
    how = {"depth": 3, "top_k": 3, "nodes": 9, "sampling": SAMPLING, **options}
    return SpeculativeDecoder(*models(seed), layout, **how)


def make(
    how: SpeculativeDecoder,
    count: int = 2,
    frames: int = 3,
    *,
    rows: Sequence[int] | None = None,
    length: int = 5,
    seed: int = 7,
) -> SpeculativeGeneration:
    """Return a whole generation of `count` sequences, or of some `rows` of them."""
    rows = list(range(count) if rows is None else rows)
    given = prompts(count, length)
    made = how.generate(
        given[rows],
        frames=frames,
        uncond=given.flip(1)[rows] if how.sampling.guidance != 1 else None,
        actions=actions(count, frames, how.layout.extra)[rows] if how.layout.extra else None,
        seed=seed,
        sequences=rows,
    )
    for _ in made:
        pass
    return made


def raster(
    layout: Layout, sampling: Sampling, count: int = 2, frames: int = 3, length: int = 5
) -> Tensor:
    """Return the codes of raster order with the same noise."""
    how = DiagonalDecoder(models()[0], layout, mode="raster", sampling=sampling)
    given = prompts(count, length)
    made = how.generate(
        given,
        frames=frames,
        uncond=given.flip(1) if sampling.guidance != 1 else None,
        actions=actions(count, frames, layout.extra) if layout.extra else None,
        seed=7,
    )
    for _ in made:
        pass
    return made.codes


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        Sampling(temperature=0.0),
        Sampling(temperature=0.0, guidance=2.0),
        Sampling(temperature=1.3, top_p=0.8),
    ],
)
@pytest.mark.parametrize("extra", [0, 1, 3])
def test_without_skipping_every_token_is_raster_orders(sampling: Sampling, extra: int) -> None:
    layout = Layout(3, 4, CODES, first=2, extra=extra)
    made = make(decoder(layout, sampling=sampling))
    assert torch.equal(made.codes, raster(layout, sampling))
    assert made.counts.skipped == 0
    assert made.counts.passes == made.counts.drafts
    assert made.counts.tokens == 2 * 3 * 12


def test_a_good_drafter_needs_fewer_passes() -> None:
    # trees of all candidates
    how = decoder(Layout(3, 4, CODES, first=2), sampling=Sampling(temperature=0.0), nodes=22)
    how.model.head.weight.zero_()
    made = make(how, 1)
    # the lowest id wins all ties: four tokens a step, three drafted and one drawn
    assert made.counts.passes == 9
    assert made.codes.eq(0).all()


def test_the_sampler_without_coupling_gives_the_greedy_tokens_too() -> None:
    sampling = Sampling(temperature=0.0, guidance=1.5)
    made = make(decoder(sampling=sampling, verification=Exact(coupled=False)))
    assert torch.equal(made.codes, raster(LAYOUT, sampling))


VERIFICATIONS: list[Callable[[], object]] = [
    Exact,
    lambda: Exact(coupled=False),
    lambda: Relaxed(neighbours(codebook(), 6), delta=0.3),
    lambda: Relaxed(neighbours(codebook(), 6), ratio=3.0),
    Typical,
]
SKIPS = [None, Uniform(2), Uniform(3), Dynamic(-0.5)]


def codebook() -> Tensor:
    """Return vectors of the codes."""
    return torch.randn(CODES, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("skip", SKIPS, ids=str)
@pytest.mark.parametrize("verification", VERIFICATIONS, ids=["exact", "coin", "l", "l++", "typ"])
def test_a_batch_equals_its_sequences_one_by_one(
    verification: Callable[[], object], skip: Uniform | Dynamic | None
) -> None:
    options = {"verification": verification(), "skip": skip, "codebook": codebook()}
    together = make(decoder(**options), 3, 2)
    for row in range(3):
        alone = make(decoder(**options), 3, 2, rows=[row])
        assert torch.equal(alone.codes[0], together.codes[row])


@pytest.mark.parametrize("skip", SKIPS, ids=str)
@pytest.mark.parametrize("extra", [0, 2])
def test_the_cache_holds_what_a_full_pass_over_the_same_tokens_would(
    skip: Uniform | Dynamic | None, extra: int
) -> None:
    layout = Layout(3, 4, CODES, first=2, extra=extra)
    how = decoder(layout, skip=skip, codebook=codebook(), verification=Exact(coupled=False))
    made = make(how, 2, 3)
    trees = made._trees
    fresh = how.model.new_cache(4, trees.size)
    how.model.prefill(trees._ids[:, : trees.size], fresh)
    skips = 0 if skip is None else made.counts.skipped
    assert (skips > 2) == (skip is not None)
    for row in range(4):
        length = int(trees.lengths[row % 2])
        assert length > trees.size - 8
        for ours, full in ((trees.cache.k, fresh.k), (trees.cache.v, fresh.v)):
            torch.testing.assert_close(
                ours[:, row, :length], full[:, row, :length], rtol=0, atol=1e-10
            )


@pytest.mark.parametrize("skip", [None, Uniform(2)], ids=str)
def test_rejected_slots_never_reach_an_output(skip: Uniform | None) -> None:
    expected = make(decoder(skip=skip)).codes
    how = decoder(skip=skip)
    # a product with what a mask leaves out is no fair witness: 0 x NaN is NaN
    how.model.masked = how.drafter.masked = False
    given = prompts(2)
    made = how.generate(
        given, frames=3, uncond=given.flip(1), actions=actions(2, 3), seed=7, sequences=[0, 1]
    )
    run = 0
    while True:
        try:
            made.step()
        except StopIteration:
            break
        trees = made._trees
        slots = torch.arange(trees.cache.k.shape[2])
        stale = slots >= trees.lengths.repeat(2)[:, None]
        drafts = slots[: trees._draft_cache.k.shape[2]]
        # what the drafter was fed with stand-ins is fed again
        old = (drafts >= trees._drafted.repeat(2)[:, None]) | (drafts == 0)
        for tensor in (trees.cache.k, trees.cache.v):
            tensor[:, stale] = math.nan
        for tensor in (trees._draft_cache.k, trees._draft_cache.v):
            tensor[:, old] = math.nan
        run += 1
    assert run > 10
    assert torch.equal(made.codes, expected)


def test_uniform_skipping_rests_the_target_every_other_step() -> None:
    made = make(decoder(Layout(4, 5, CODES, first=2), skip=Uniform(2)), 1)
    counts = made.counts
    assert counts.skipped + counts.passes == counts.drafts
    # the first steps have no features yet
    assert counts.drafts / 2 - 4 <= counts.skipped <= counts.drafts / 2


class Seen(NamedTuple):
    """A sequence's step: how far it was before it, the tree, and whether it was skipped."""

    step: int
    known: int
    length: int
    paths: set[tuple[int, ...]]
    skipped: bool


def watched(how: SpeculativeDecoder, frames: int) -> tuple[list[list[Seen]], SpeculativeGeneration]:
    """Return the steps of two sequences, before their last token, and the generation."""
    given = prompts(2)
    made = how.generate(
        given, frames=frames, uncond=given.flip(1), actions=actions(2, frames), seed=7
    )
    found, steps = [[], []], 0
    known, lengths = [5, 5], [4, 4]
    while True:
        try:
            made.step()
        except StopIteration:
            return found, made
        trees = made._trees
        tree, flags = trees._tree, trees.skipping.tolist()
        for row in range(2):
            if known[row] < trees.size:
                paths = {(): 0}
                for node in range(1, tree.tokens.shape[1]):
                    if tree.depths[row, node] > 0:
                        above = next(p for p, n in paths.items() if n == tree.parents[row, node])
                        paths[*above, int(tree.tokens[row, node])] = node
                seen = Seen(steps, known[row], lengths[row], set(paths) - {()}, flags[row])
                found[row].append(seen)
        known, lengths = trees.known.tolist(), trees.lengths.tolist()
        steps += 1


def eagle(how: SpeculativeDecoder, ids: Tensor, seen: Seen, limit: int) -> set[tuple[int, ...]]:
    """Return the paths of EAGLE-2's tree, from whole passes over `ids [2, S]` of both copies.

    Where the target's features are missing, those of as many tokens before stand in.
    """
    target, drafter, sampling = how.model, how.drafter, how.sampling
    known, missing = seen.known, seen.known - 1 - seen.length
    true = target.prefill(ids, target.new_cache(2, ids.shape[1]))
    features = torch.cat((true[:, : seen.length], true[:, seen.length - missing : seen.length]), 1)
    turned = target.angles(ids.shape[1] + 8)
    own = {}

    def chances(path: tuple[int, ...]) -> Tensor:
        drafts = torch.tensor(path, dtype=torch.int64).expand(2, -1) + LAYOUT.first
        fed = torch.cat((ids[:, 1:known], drafts), 1)
        before = torch.cat((features, *(own[path[:n]] for n in range(len(path)))), 1)
        angles = tuple(part[1 : fed.shape[1] + 1] for part in turned)
        own[path] = drafter(target.embed(fed), before, angles)[:, -1:]
        logits = target.logits(own[path])[:, 0, LAYOUT.first : LAYOUT.first + CODES]
        guided = logits[1] + sampling.guidance * (logits[0] - logits[1])
        return (guided / sampling.temperature).log_softmax(0)

    scores, beams = {}, {(): 0.0}
    for _ in range(how.depth):
        level = {
            (*path, token): score + float(value)
            for path, score in beams.items()
            for value, token in zip(*map(Tensor.tolist, chances(path).topk(how.top_k)), strict=True)
        }
        scores |= level
        beams = dict(sorted(level.items(), key=lambda item: -item[1])[: how.top_k])
    kept = sorted((p for p in scores if len(p) <= limit), key=lambda path: -scores[path])
    return set(kept[: how.nodes - 1])


@pytest.mark.parametrize(
    ("skip", "top_k", "nodes", "chain"),
    [(None, 2, 7, 0), (Uniform(2), 2, 7, 1), (Uniform(2), 1, 4, 3)],
    ids=["verified", "tree", "chain"],
)
def test_every_tree_is_what_whole_passes_of_target_and_drafter_give(
    skip: Uniform | None, top_k: int, nodes: int, chain: int
) -> None:
    """No token of exact verification tells of a draft: its features, places and guidance do."""
    how = decoder(skip=skip, top_k=top_k, nodes=nodes)
    steps, made = watched(how, 2)
    trees, missing = made._trees, [0]
    for row in range(2):
        ids = trees._ids[[row, row + 2], : trees.size]
        for seen in steps[row]:
            # frame 0 begins at slot 5, frame 1 at 18, each of 12 tokens
            limit = (17 if seen.known < 18 else 30) - seen.known
            assert seen.paths == eagle(how, ids, seen, limit), seen
            missing.append(seen.known - 1 - seen.length)
            # from the sixth token on, every other step
            warm = skip is not None and seen.step % 2 == 1 and seen.known > 10
            assert seen.skipped == (warm and limit > 0)
    assert (sum(map(bool, missing)) > 2) == (skip is not None)
    assert max(missing) >= chain


def test_dynamic_skipping_never_skips_twice_in_a_row() -> None:
    how = decoder(Layout(4, 5, CODES, first=2), skip=Dynamic(-1.0), codebook=codebook())
    given = prompts(1)
    made = how.generate(given, frames=2, uncond=given.flip(1))
    before, flags = 0, []
    while True:
        try:
            made.step()
        except StopIteration:
            break
        flags.append(made.counts.skipped > before)
        before = made.counts.skipped
    assert any(flags)
    assert not any(one and other for one, other in itertools.pairwise(flags))


def test_a_prompt_of_one_token_and_a_tree_of_two_nodes() -> None:
    layout = Layout(2, 3, CODES)
    sampling = Sampling(temperature=0.8)
    how = decoder(layout, sampling=sampling, depth=1, top_k=1, nodes=2)
    made = make(how, length=1)
    assert torch.equal(made.codes, raster(layout, sampling, length=1))


def test_frames_come_when_they_are_whole_and_actions_are_asked_for_then() -> None:
    asked = []
    how, given, ids = decoder(skip=Uniform(2)), prompts(2), actions(2, 3)

    def act(frame: int, rows: tuple[int, ...]) -> Tensor:
        asked.append((frame, rows))
        return ids[list(rows), frame - 1]

    made = how.generate(given, frames=3, uncond=given.flip(1), actions=act, seed=7)
    frames = list(made)
    seen = [(frame.index, row) for frame in frames for row in frame.rows]
    assert sorted(seen) == [(index, row) for index in range(3) for row in range(2)]
    assert sorted((frame, row) for frame, rows in asked for row in rows) == [
        (index, row) for index in (1, 2) for row in range(2)
    ]
    expected = make(decoder(skip=Uniform(2))).codes
    assert torch.equal(made.codes, expected)
    for frame in frames:
        assert torch.equal(frame.codes, expected[list(frame.rows), frame.index])
    assert made.clock.seconds["draft"] > 0
    assert made.clock.seconds["target"] > 0


def test_a_second_video_is_as_if_it_were_the_first() -> None:
    how = decoder(skip=Uniform(2))
    make(how, seed=1)
    again = make(how, seed=7)
    assert torch.equal(again.codes, make(decoder(skip=Uniform(2)), seed=7).codes)


@pytest.mark.parametrize("where", ["target", "drafter"])
def test_a_video_of_nan_leaves_no_trace_in_the_next(where: str) -> None:
    """K/V of it stayed in slots that a mask leaves out, and 0 x NaN is NaN."""
    how = decoder(skip=Uniform(2))
    expected = make(decoder(skip=Uniform(2)), 1, 2)
    part = how.model if where == "target" else how.drafter
    weight = part.layers[0].qkv.weight
    good = weight.clone()
    weight.fill_(math.nan)
    with contextlib.suppress(ValueError):
        make(how, 1, 2)
    weight.copy_(good)
    again = make(how, 1, 2)
    assert torch.equal(again.codes, expected.codes)
    assert again.counts == expected.counts


def test_weights_may_move_between_two_videos() -> None:
    how = decoder(sampling=Sampling(temperature=0.0))
    make(how)
    old = how._trees
    how.model.float(), how.drafter.float()
    found = make(how)
    assert how._trees is not old
    fresh = SpeculativeDecoder(
        how.model, how.drafter, LAYOUT, depth=3, top_k=3, nodes=9, sampling=how.sampling
    )
    assert torch.equal(found.codes, make(fresh).codes)


class Replays:
    """A recorder without a GPU: passes run before they are recorded, as where graphs are."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.recorded, self.dropped = error, 0, 0

    def drop(self) -> None:
        self.dropped += 1

    def warm_up(self, forward: Callable[[], None], _: torch.device) -> None:
        forward()
        forward()

    def record(
        self, forward: Callable[[], None], _: torch.device
    ) -> tuple[None, Callable[[], None]]:
        if self.error is not None:
            raise self.error
        self.recorded += 1
        return None, forward


@pytest.mark.parametrize("skip", SKIPS, ids=str)
def test_warming_up_for_a_graph_leaves_no_trace(
    skip: Uniform | Dynamic | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"skip": skip, "codebook": codebook()}
    how, recorder = decoder(**options), Replays()
    monkeypatch.setattr(how, "graphs", True)
    monkeypatch.setattr(how, "recorder", recorder)
    expected = make(decoder(**options))
    for _ in range(2):
        made = make(how)
        assert torch.equal(made.codes, expected.codes)
        assert made.counts == expected.counts
        # a draft, and a target with a chain and without: extra tokens are a chain, too
        assert recorder.recorded == 3


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt("Ctrl-C")])
def test_a_broken_capture_drops_its_pool(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, recorder = decoder(sampling=Sampling()), Replays(error)
    make(how, 1, 1)
    monkeypatch.setattr(how, "graphs", True)
    monkeypatch.setattr(how, "recorder", recorder)
    with pytest.raises(type(error), match=str(error)):
        make(how, 1, 1)
    assert recorder.dropped == 1


def test_a_drafter_of_another_dtype_is_refused() -> None:
    how = decoder(sampling=Sampling())
    how.drafter.float()
    sentence = "drafter must be torch.float64 on cpu like the target, got torch.float32 on cpu"
    with pytest.raises(ValueError, match=sentence):
        make(how)


def test_an_interrupted_video_is_over_and_the_next_is_as_if_it_were_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    how, given = decoder(skip=Uniform(2)), prompts(2)
    cut = how.generate(given, frames=3, uncond=given.flip(1), actions=actions(2, 3), seed=1)
    cut.step()

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(how.model, "feed_tree", stop)
        with pytest.raises(KeyboardInterrupt):
            list(cut)
    with pytest.raises(RuntimeError, match="must not go on after an error"):
        next(cut)
    assert torch.equal(make(how).codes, make(decoder(skip=Uniform(2))).codes)


def test_an_older_generation_is_refused() -> None:
    how = decoder(LAYOUT, sampling=Sampling())
    old = how.generate(prompts(1), frames=1)
    how.generate(prompts(1), frames=1)
    with pytest.raises(RuntimeError, match="one generation at a time"):
        next(old)


@pytest.mark.parametrize("where", ["target", "drafter"])
def test_logits_without_a_distribution_end_the_video_or_the_draft(where: str) -> None:
    how = decoder(sampling=Sampling())
    expected = raster(LAYOUT, Sampling(), 1, 1)
    if where == "drafter":
        # nothing is drafted: one token a pass, and they are right
        how.drafter.layers[0].down.weight.fill_(math.nan)
        made = make(how, 1, 1)
        assert torch.equal(made.codes, expected)
        assert made.counts.passes == 12
        return
    how.model.norm.fill_(math.nan)
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity in frame 0"):
        make(how, 1, 1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"depth": 0}, r"depth must lie in \[1, 32\], got 0"),
        ({"top_k": 17}, r"top_k must lie in \[1, 16\], got 17; it is the number of a node's ch"),
        ({"nodes": 1}, r"nodes must lie in \[2, 128\], got 1"),
        ({"layout": Layout(3, 4, 2), "top_k": 3}, "top_k must be at most the 2 codes, got 3"),
        ({"layout": Layout(3, 4, CODES, eol=1)}, "no end-of-line token, got 1"),
        ({"skip": Dynamic()}, "codebook must be given for Dynamic, got None"),
        ({"skip": Dynamic(), "codebook": [[1.0]]}, "codebook must be a tensor, got list"),
        (
            {"codebook": torch.eye(3), "skip": Dynamic()},
            r"codebook must be \[18, E\], got \[3, 3\]",
        ),
        ({"top_k": 16, "depth": 5}, r"at most 1024 candidates, .*, got 1040"),
        ({"graphs": True}, "graphs must be off without a GPU"),
        ({"skip": "uniform"}, "skip must be Uniform, Dynamic or None, got 'uniform'"),
        ({"verification": "exact"}, r"verification must be Exact\(\), .* got 'exact'"),
        ({"verification": Typical(epsilon=-1.0)}, "epsilon must lie in"),
        ({"verification": Relaxed(torch.zeros(CODES, 1).int())}, "delta must be given, or ratio"),
        (
            {"verification": Relaxed(torch.zeros(3, 1).int(), delta=0.1)},
            r"neighbours must be .* got \[3, 1\]",
        ),
    ],
)
def test_what_cannot_be_says_why(options: dict[str, object], sentence: str) -> None:
    if options.get("graphs") and torch.cuda.is_available():
        pytest.skip("a GPU has graphs")
    with pytest.raises((TypeError, ValueError), match=sentence):
        decoder(**options)


def test_neighbours_must_be_a_table() -> None:
    with pytest.raises(TypeError, match="neighbours must be a tensor, got NoneType"):
        Relaxed(None, delta=0.1)


def on_gpu(dtype: torch.dtype, **options: object) -> SpeculativeDecoder:
    """Return a decoder of models on a GPU, with heads that the kernels serve."""
    torch.manual_seed(0)
    sizes = LlamaSizes(2, 128, 4, 2, 64, 96, CODES + WORDS)
    target = TokenLlama(sizes).to("cuda", dtype).eval().requires_grad_(False)
    target.head.weight.mul_(6)
    drafter = EagleDrafter(LlamaSizes(1, 128, 4, 2, 64, 96, CODES + WORDS))
    how = {"depth": 3, "top_k": 3, "nodes": 9, "sampling": SAMPLING, **options}
    return SpeculativeDecoder(
        target, drafter.to("cuda", dtype).eval().requires_grad_(False), LAYOUT, **how
    )


def made_on_gpu(how: SpeculativeDecoder, seed: int = 7) -> Tensor:
    """Return the codes of two sequences."""
    given, between = prompts(2).cuda(), actions(2, 3).cuda()
    made = how.generate(given, frames=3, uncond=given.flip(1), actions=between, seed=seed)
    for _ in made:
        pass
    return made.codes


@pytest.mark.gpu
@pytest.mark.parametrize("skip", SKIPS, ids=str)
@pytest.mark.parametrize("verification", VERIFICATIONS, ids=["exact", "coin", "l", "l++", "typ"])
def test_graphs_replay_what_runs_without_them(
    verification: Callable[[], object], skip: Uniform | Dynamic | None
) -> None:
    rule = verification()
    if isinstance(rule, Relaxed):
        rule = Relaxed(rule.neighbours.cuda(), delta=rule.delta, ratio=rule.ratio)
    options = {"verification": rule, "skip": skip, "codebook": codebook().cuda()}
    # graphs have more padding, other sizes another order of sums: in bfloat16 that moves tokens
    captured = on_gpu(torch.float32, **options)
    for seed in (7, 7, 8):
        expected = made_on_gpu(on_gpu(torch.float32, **options, graphs=False), seed)
        assert torch.equal(made_on_gpu(captured, seed), expected)


@pytest.mark.gpu
def test_a_gpu_gives_raster_orders_tokens() -> None:
    # in float64, where no order of sums decides a token
    how = on_gpu(torch.float64)
    how.model.masked = how.drafter.masked = True
    given, between = prompts(2).cuda(), actions(2, 3).cuda()
    plain = DiagonalDecoder(how.model, LAYOUT, mode="raster", sampling=SAMPLING).generate(
        given, frames=3, uncond=given.flip(1), actions=between, seed=7
    )
    for _ in plain:
        pass
    assert torch.equal(made_on_gpu(how), plain.codes)


@pytest.mark.gpu
def test_the_host_waits_once_a_step() -> None:
    how = on_gpu(torch.bfloat16)
    made_on_gpu(how)
    given, between = prompts(2).cuda(), actions(2, 3).cuda()
    run = how.generate(given, frames=3, uncond=given.flip(1), actions=between)
    run.step()
    waits, before = 0, Tensor.tolist

    def tolist(tensor: Tensor) -> object:
        nonlocal waits
        waits += tensor.is_cuda
        torch.cuda.set_sync_debug_mode("default")
        try:
            return before(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    torch.cuda.set_sync_debug_mode("error")
    Tensor.tolist = tolist
    steps, ended = 0, ()
    try:
        while not ended:
            ended, steps = run.step(), steps + 1
    finally:
        Tensor.tolist = before
        torch.cuda.set_sync_debug_mode("default")
    # and once for what a frame's end brings
    assert waits == steps + 1
