"""The laws of the loop (design: "The SDVG loop"), on random models from the real classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from sdvg import SDVG, Always, Block, Never, Random, Recompute, Reward, Schedule, Stride
from sdvg.host import read
from sdvg.models.wan import CausalWan
from sdvg.noise import normal
from tests.tiny import (
    TAU,
    BrightnessScorer,
    TinyPair,
    encode,
    float64_norms,
    tiny_pair,
    tiny_vae,
    tiny_wan,
)

PROMPTS = ["a seven moving left", "a two moving up", "a nine moving right, slowly"]
COMMITS = ["lazy", "eager", Recompute(3), Recompute(6)]


def blocks_of(engine: SDVG, prompts: list[str] = PROMPTS, **options: object) -> list[Block]:
    return list(engine.generate(prompts, **({"num_blocks": 5, "seed": 11} | options)))


def video(blocks: list[Block]) -> Tensor:
    return torch.cat([block.frames for block in blocks], dim=1)


def latents(blocks: list[Block]) -> Tensor:
    return torch.cat([block.latents for block in blocks], dim=1)


def verdicts(blocks: list[Block]) -> list[tuple[bool, ...]]:
    return [tuple(verdict.accepted for verdict in block.verdicts) for block in blocks]


def speculate(pair: TinyPair, router: object = None, **options: object) -> SDVG:
    return SDVG(*pair, BrightnessScorer(), router or Reward(TAU), **options)


def require_both_verdicts(blocks: list[Block]) -> None:
    decided = {accepted for block in verdicts(blocks)[1:] for accepted in block}
    assert decided == {True, False}, "the test needs accepted and rejected blocks"


@pytest.fixture(scope="module")
def pair() -> TinyPair:
    return tiny_pair()


@pytest.fixture(scope="module")
def pair64() -> Iterator[TinyPair]:
    with float64_norms():
        yield tiny_pair(torch.float64)


@pytest.mark.parametrize("commit", COMMITS, ids=str)
def test_never_gives_target_only_bitwise(pair: TinyPair, commit: object) -> None:
    routed = blocks_of(speculate(pair, Never(), commit=commit))
    alone = blocks_of(SDVG(None, pair.target, pair.decoder, commit=commit))
    assert torch.equal(video(routed), video(alone))
    assert torch.equal(latents(routed), latents(alone))


def test_always_without_forced_first_gives_draft_only_bitwise(pair: TinyPair) -> None:
    routed = blocks_of(speculate(pair, Always(), force_first=False))
    alone = blocks_of(SDVG(pair.drafter, None, pair.decoder))
    assert torch.equal(video(routed), video(alone))


def test_a_threshold_below_all_rewards_gives_draft_only_after_the_first_block(
    pair: TinyPair,
) -> None:
    routed = latents(blocks_of(speculate(pair, Reward(float("-inf")))))
    drafts = latents(blocks_of(SDVG(pair.drafter, None, pair.decoder)))
    assert torch.equal(routed[:, 3:], drafts[:, 3:])
    assert not torch.equal(routed[:, :3], drafts[:, :3])


@pytest.mark.parametrize("aggregate", ["min", "mean"])
def test_a_video_decodes_as_its_final_latents_alone(pair64: TinyPair, aggregate: str) -> None:
    """A rejected draft leaves no trace in the decoder."""
    pair, tau = pair64, TAU if aggregate == "min" else 2.2
    blocks = blocks_of(speculate(pair, Reward(tau, aggregate)), num_blocks=6)
    require_both_verdicts(blocks)
    for row in range(len(PROMPTS)):
        state, frames = pair.decoder.start(1), []
        for block in blocks:
            decoded, state = pair.decoder.decode(block.latents[row : row + 1], state)
            frames.append(decoded)
        torch.testing.assert_close(
            video(blocks)[row], torch.cat(frames, dim=1)[0], rtol=0, atol=1e-10
        )


def test_one_sequence_decodes_as_its_final_latents_bitwise(pair: TinyPair) -> None:
    """With a batch of one there is nothing to merge: the frames are equal to the last bit."""
    blocks = blocks_of(speculate(pair), PROMPTS[:1], num_blocks=8, seed=3)
    require_both_verdicts(blocks)
    state, frames = pair.decoder.start(1), []
    for block in blocks:
        decoded, state = pair.decoder.decode(block.latents, state)
        frames.append(decoded)
    assert torch.equal(video(blocks), torch.cat(frames, dim=1))


class Interrupting:
    """Raises KeyboardInterrupt at the `at`-th call of any method of the parts it wraps."""

    def __init__(self, at: int) -> None:
        self.left = at

    def wrap(self, part: object) -> object:
        outer = self

        class Proxy:
            def __getattr__(self, name: str) -> object:
                value = getattr(part, name)
                return outer._counted(value) if callable(value) else value

            if callable(part):
                __call__ = staticmethod(outer._counted(part))

        return Proxy()

    def _counted(self, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("options", [{}, {"drafter_cache": "synced"}, {"run_ahead": 2}], ids=str)
def test_an_interrupted_and_resumed_iterator_gives_one_run_bitwise(
    pair: TinyPair, options: dict[str, object]
) -> None:
    prompts = PROMPTS[:2]
    whole = blocks_of(speculate(pair, **options), prompts)
    require_both_verdicts(whole)
    # every call of a model, the decoder and the scorer is interrupted once, wherever it
    # stands in a block
    counter = Interrupting(10**9)
    parts = [counter.wrap(part) for part in (*pair, BrightnessScorer())]
    blocks_of(SDVG(*parts, Reward(TAU), **options), prompts)
    calls = 10**9 - counter.left
    for at in range(4, calls + 1, 3):
        interrupting = Interrupting(at)
        parts = [interrupting.wrap(part) for part in (*pair, BrightnessScorer())]
        run = SDVG(*parts, Reward(TAU), **options).generate(prompts, num_blocks=5, seed=11)
        blocks, interrupts = [], 0
        while len(blocks) < 5:
            try:
                blocks.append(next(run))
            except KeyboardInterrupt:
                interrupts += 1
        assert interrupts == 1
        assert torch.equal(video(blocks), video(whole)), f"interrupted at call {at}"
        assert verdicts(blocks) == verdicts(whole)


@pytest.mark.parametrize("router", [Always(), Reward(TAU)], ids=repr)
def test_eager_commit_writes_each_block_once_before_the_next(
    pair: TinyPair, router: object
) -> None:
    """Also where every draft is kept, so that nothing is repaired."""
    target = tiny_wan(seed=2)
    written: list[tuple[int, Tensor]] = []
    write = target.write

    def record(clean: Tensor, *, start_frame: int, rows: Tensor | None = None) -> None:
        written.append((start_frame, clean))
        assert rows is None
        write(clean, start_frame=start_frame, rows=rows)

    target.write = record
    engine = speculate(pair._replace(target=target), router, commit="eager")
    blocks = []
    for block in engine.generate(PROMPTS, num_blocks=5, seed=11):
        assert [start for start, _ in written] == [3 * before.index for before in blocks]
        blocks.append(block)
    for block, (_, clean) in zip(blocks, written, strict=False):
        assert torch.equal(clean, block.latents)


def test_each_denoising_step_adds_the_noise_of_its_own_step(pair: TinyPair) -> None:
    target = tiny_wan(seed=2)
    calls: list[tuple[float, Tensor, Tensor]] = []
    denoise = target.denoise

    def record(x: Tensor, timestep: float, **options: object) -> Tensor:
        out = denoise(x, timestep, **options)
        calls.append((timestep / 1000, x, out))
        return out

    target.denoise = record
    blocks_of(SDVG(None, target, pair.decoder), PROMPTS[:2], num_blocks=2, sequences=[4, 9])
    noises = []
    for call, (sigma, x, _) in enumerate(calls):
        block, step = divmod(call, 4)
        drawn = normal(target.block_shape, seed=11, sequences=(4, 9), block=block, step=step)
        before = (1 - sigma) * calls[call - 1][2] if step else 0
        assert torch.equal(x, before + sigma * drawn)
        noises += drawn
    # block, step and sequence: no two share their noise
    assert len(noises) == len(torch.stack(noises).unique(dim=0)) == 16


@pytest.mark.parametrize("frames", [3, 6])
def test_recompute_sees_the_last_latents_and_nothing_else(pair: TinyPair, frames: int) -> None:
    """Drafts and a first block of the target: block 3 is made anew from what stands before it."""
    engine = speculate(pair, Stride(3), commit=Recompute(frames))
    final = latents(blocks_of(engine, num_blocks=4))
    target = tiny_wan(seed=2)
    target.start(PROMPTS)
    target.write(final[:, 9 - frames : 9], start_frame=0)

    def draw(step: int) -> Tensor:
        return normal(target.block_shape, seed=11, sequences=(0, 1, 2), block=3, step=step)

    expected = draw(0)
    for step, timestep in enumerate(engine.schedule.steps(3)):
        if step:
            sigma = timestep / 1000
            expected = (1 - sigma) * expected + sigma * draw(step)
        expected = target.denoise(expected, timestep, start_frame=frames)
    assert torch.equal(final[:, 9:], expected)


@pytest.mark.parametrize("drafter_cache", ["own", "synced"])
@pytest.mark.parametrize("router", [Reward(TAU), Random(0.5), Stride(4)], ids=repr)
def test_lazy_equals_eager_commit(pair64: TinyPair, drafter_cache: str, router: object) -> None:
    runs = [
        blocks_of(
            speculate(pair64, router, commit=commit, drafter_cache=drafter_cache), num_blocks=8
        )
        for commit in ("lazy", "eager")
    ]
    require_both_verdicts(runs[0])
    torch.testing.assert_close(latents(runs[0]), latents(runs[1]), rtol=0, atol=1e-10)
    torch.testing.assert_close(video(runs[0]), video(runs[1]), rtol=0, atol=1e-10)


def test_lazy_commit_in_small_passes_equals_one_pass(pair64: TinyPair) -> None:
    small = pair64._replace(target=tiny_wan(seed=2, dtype=torch.float64, write_blocks=1))
    runs = [blocks_of(speculate(p, Stride(5)), num_blocks=6) for p in (pair64, small)]
    torch.testing.assert_close(latents(runs[0]), latents(runs[1]), rtol=0, atol=1e-10)


def test_lazy_commit_leaves_out_blocks_beyond_reach_and_equals_eager(pair64: TinyPair) -> None:
    target = tiny_wan(seed=5, layers=1, dtype=torch.float64)
    written: list[tuple[int, int]] = []
    write = target.write

    def record(clean: Tensor, *, start_frame: int, rows: Tensor | None = None) -> None:
        written.append((start_frame // 3, (start_frame + clean.shape[1]) // 3))
        write(clean, start_frame=start_frame, rows=rows)

    target.write = record
    pair = pair64._replace(target=target)
    lazy = blocks_of(speculate(pair, Stride(8)), PROMPTS[:1], num_blocks=9)
    # the sink is block 0; one layer and a window of two blocks reach one block back
    assert written == [(0, 1), (7, 8)]
    eager = blocks_of(speculate(pair, Stride(8), commit="eager"), PROMPTS[:1], num_blocks=9)
    torch.testing.assert_close(latents(lazy), latents(eager), rtol=0, atol=1e-10)


@pytest.mark.parametrize("commit", COMMITS, ids=str)
@pytest.mark.parametrize("drafter_cache", ["own", "synced"])
def test_a_batch_equals_its_sequences_one_by_one(
    pair64: TinyPair, commit: object, drafter_cache: str
) -> None:
    engine = speculate(pair64, commit=commit, drafter_cache=drafter_cache)
    together = blocks_of(engine, num_blocks=6)
    require_both_verdicts(together)
    for row, prompt in enumerate(PROMPTS):
        alone = blocks_of(engine, [prompt], num_blocks=6, sequences=[row])
        assert [block[row] for block in verdicts(together)] == [b[0] for b in verdicts(alone)]
        torch.testing.assert_close(latents(together)[row], latents(alone)[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(video(together)[row], video(alone)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_running_ahead_equals_running_in_turn(pair64: TinyPair, ahead: int) -> None:
    turn = blocks_of(speculate(pair64))
    run = blocks_of(speculate(pair64, run_ahead=ahead))
    require_both_verdicts(run)
    torch.testing.assert_close(video(run), video(turn), rtol=0, atol=1e-10)


def test_what_ran_before_leaves_no_trace(pair: TinyPair) -> None:
    first = blocks_of(speculate(pair))
    blocks_of(speculate(pair, Stride(2)), ["something else"], seed=99)
    assert torch.equal(video(blocks_of(speculate(pair))), video(first))


def test_seeds_and_sequences_give_different_videos(pair: TinyPair) -> None:
    engine = speculate(pair)
    same = [PROMPTS[0]] * 2
    two = latents(blocks_of(engine, same, num_blocks=1))
    assert not torch.equal(two[0], two[1])
    other = latents(blocks_of(engine, same, num_blocks=1, seed=12))
    assert not torch.equal(two, other)


def test_seeds_of_any_sign_and_size_are_different_ones() -> None:
    """Negative seeds all gave the noise of seed 0, and neighbours above 2**63 one noise."""
    seeds = (0, -1, -2, 2**63, 2**63 + 1, 2**64 - 3)
    made = [normal((4,), seed=seed, sequences=(0,), block=0, step=0) for seed in seeds]
    assert len({tuple(each.flatten().tolist()) for each in made}) == len(seeds)


def test_the_target_runs_only_for_rejected_sequences(pair: TinyPair) -> None:
    target = tiny_wan(seed=2)
    ran: list[tuple[int, ...]] = []
    denoise = target.denoise

    def record(x: Tensor, timestep: float, *, start_frame: int, rows: Tensor | None) -> Tensor:
        if timestep == 1000:
            ran.append(tuple(range(len(PROMPTS)) if rows is None else rows.tolist()))
        return denoise(x, timestep, start_frame=start_frame, rows=rows)

    target.denoise = record
    blocks = blocks_of(speculate(pair._replace(target=target)), num_blocks=6)
    require_both_verdicts(blocks)
    rejected = [
        tuple(row for row, accepted in enumerate(block) if not accepted)
        for block in verdicts(blocks)
    ]
    assert ran == [rows for rows in rejected if rows]


def test_a_synced_drafter_goes_on_from_the_final_blocks(pair: TinyPair) -> None:
    """After a rejection its next draft is what it makes of the target's block, not of its own."""
    engine = speculate(pair, Stride(2), drafter_cache="synced")
    blocks = blocks_of(engine, PROMPTS[:1], num_blocks=2)
    pair.drafter.start(PROMPTS[:1])
    pair.drafter.write(blocks[0].latents, start_frame=0)
    run = engine.generate(PROMPTS[:1], num_blocks=2, seed=11)
    next(run)
    again = next(run)
    assert torch.equal(again.latents, blocks[1].latents)
    own = blocks_of(speculate(pair, Stride(2)), PROMPTS[:1], num_blocks=2)
    assert not torch.equal(own[1].latents, blocks[1].latents)


@pytest.mark.parametrize("clean_pass", [True, False])
def test_a_synced_drafter_forgets_a_rejected_draft(pair: TinyPair, clean_pass: bool) -> None:
    """Without a clean pass, a rejected draft's K/V once stayed in its cache."""
    schedule = Schedule(((1000.0, 400.0),), clean_pass=clean_pass)
    options = {"schedule": schedule, "drafter_cache": "synced"}
    drafted = blocks_of(speculate(pair, lambda draft: Stride(2)(draft), **options))
    undrafted = blocks_of(speculate(pair, Stride(2), **options))
    assert torch.equal(latents(drafted), latents(undrafted))


def test_a_synced_drafter_does_not_draft_what_is_rejected_beforehand(pair: TinyPair) -> None:
    engine = speculate(pair, Stride(3), drafter_cache="synced")
    run = engine.generate(PROMPTS, num_blocks=5, seed=1)
    list(run)
    # blocks 1, 2 and 4 are drafted, for three sequences each
    assert run._clock.units["draft"] == 9


def test_a_score_free_router_decodes_each_block_once(pair: TinyPair) -> None:
    run = speculate(pair, Stride(2)).generate(PROMPTS, num_blocks=4)
    list(run)
    assert run._clock.units["decode"] == 4 * len(PROMPTS)


@pytest.mark.parametrize("drafter_cache", ["own", "synced"])
def test_without_a_clean_pass_the_last_noisy_step_is_kept(
    pair: TinyPair, drafter_cache: str
) -> None:
    steps = ((1000.0, 400.0),)
    noisy, clean = Schedule(steps, clean_pass=False), Schedule(steps)
    videos = [
        latents(blocks_of(speculate(pair, Never(), schedule=s, drafter_cache=drafter_cache)))
        for s in (noisy, clean)
    ]
    assert torch.equal(videos[0][:, :3], videos[1][:, :3])
    assert not torch.allclose(videos[0][:, 3:], videos[1][:, 3:])


def test_blocks_may_take_different_steps(pair: TinyPair) -> None:
    timesteps: list[float] = []
    target = tiny_wan(seed=2)
    denoise = target.denoise

    def record(x: Tensor, timestep: float, **options: object) -> Tensor:
        timesteps.append(round(timestep, 2))
        return denoise(x, timestep, **options)

    target.denoise = record
    blocks_of(SDVG(None, target, pair.decoder, schedule="diagonal"), PROMPTS[:1], num_blocks=4)
    assert timesteps == [1000, 933, 733, 357.14, 1000, 933, 357.14, 1000, 357.14, 1000, 357.14]


def test_the_window_forgets_and_the_sink_does_not() -> None:
    """Block 4 of a target whose window is two blocks depends on block 0 through the sink alone."""
    target = tiny_wan(seed=2, layers=1, sink_frames=3, window_frames=6)
    blind = tiny_wan(seed=2, layers=1, sink_frames=0, window_frames=6)
    noise = torch.randn(1, 3, *target.block_shape[1:])
    context = torch.randn(1, 12, *target.block_shape[1:])
    changed = context.clone()
    changed[:, :3] += 1
    for model, sees in ((target, True), (blind, False)):
        outputs = []
        for clean in (context, changed):
            model.start(PROMPTS[:1])
            model.write(clean, start_frame=0)
            outputs.append(model.denoise(noise, 900.0, start_frame=12))
        assert torch.equal(*outputs) != sees


def test_wan_with_a_cache_equals_one_block_causal_forward() -> None:
    """The stock model in one forward, under a block-causal mask, gives the same."""
    diffusers = pytest.importorskip("diffusers")
    model = tiny_wan(seed=4, sink_frames=0, window_frames=None, max_frames=12)
    stock = diffusers.WanTransformer3DModel(**model.transformer.config)
    stock.load_state_dict(model.transformer.state_dict())
    clean = torch.randn(2, 12, *model.block_shape[1:])
    tokens = 3 * model.frame_tokens
    block = torch.arange(4 * tokens) // tokens
    mask = block[:, None] >= block[None, :]
    processor = stock.blocks[0].attn1.processor.__class__

    class Masked(processor):
        def __call__(
            self, attn: nn.Module, hidden: Tensor, encoder: Tensor | None = None, *rest: object
        ) -> Tensor:
            own = None if encoder is not None else mask
            return super().__call__(attn, hidden, encoder, own, *rest[1:])

    stock.set_attn_processor(Masked())
    steps = torch.full((2,), 500.0)
    (velocity,) = stock(clean.transpose(1, 2), steps, encode(PROMPTS[:2]), return_dict=False)
    expected = clean - 0.5 * velocity.transpose(1, 2)
    model.start(PROMPTS[:2])
    for start in range(0, 12, 3):
        got = model.denoise(clean[:, start : start + 3], 500.0, start_frame=start)
        torch.testing.assert_close(got, expected[:, start : start + 3], rtol=1e-4, atol=1e-5)
        # the mask's context is at timestep 500 too
        model.keep(start_frame=start)


def test_streaming_decode_equals_the_whole_video(pair64: TinyPair) -> None:
    decoder = pair64.decoder
    clean = torch.randn(2, 9, 4, 4, 4, dtype=torch.float64)
    # a stock model, with nothing of ours on it
    vae = type(decoder.vae)(**decoder.vae.config).double()
    vae.load_state_dict(decoder.vae.state_dict())
    channels = (1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(channels)
    mean = torch.tensor(vae.config.latents_mean).view(channels)
    whole = vae.decode(clean.transpose(1, 2) * std + mean, return_dict=False)[0]
    state, frames = decoder.start(2), []
    for start in range(0, 9, 3):
        block, state = decoder.decode(clean[:, start : start + 3], state)
        frames.append(block)
    assert [part.shape[1] for part in frames] == [9, 12, 12]
    expected = (whole.transpose(1, 2) + 1) / 2
    torch.testing.assert_close(torch.cat(frames, dim=1), expected, rtol=0, atol=1e-10)


def test_wan_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"multiples of the patch \(1, 2, 2\).* got 3 x 4"):
        CausalWan(tiny_wan(seed=1).transformer, encode, height=3, width=4)
    with pytest.raises(ValueError, match="window must cover a block of 12 tokens, got 8"):
        tiny_wan(seed=1, window_frames=2).start(PROMPTS)
    model = tiny_wan(seed=1, window_frames=None, max_frames=6)
    model.start(PROMPTS[:1])
    with pytest.raises(ValueError, match="must end within max_frames = 6, got 9"):
        model.write(torch.zeros(1, 9, *model.block_shape[1:]), start_frame=0)


@pytest.mark.parametrize("parts", ["target", "drafter", "both"])
def test_going_on_from_given_blocks_equals_never_having_stopped(
    pair64: TinyPair, parts: str
) -> None:
    drafter = None if parts == "target" else pair64.drafter
    target = None if parts == "drafter" else pair64.target
    # with a drafter of its own cache, what it sees must have been its own: keep every draft
    router = None if parts != "both" else Always()
    engine = SDVG(drafter, target, pair64.decoder, router=router, force_first=False)
    whole = blocks_of(engine)
    rest = blocks_of(engine, given=latents(whole[:2]))
    assert (latents(rest) - latents(whole)).abs().max() < 1e-10
    assert (video(rest) - video(whole)).abs().max() < 1e-10
    assert torch.equal(latents(rest[:2]), latents(whole[:2]))
    reasons = [block.verdicts[0].reason for block in rest]
    assert reasons[:2] == ["given"] * 2
    assert "given" not in reasons[2:]


def test_given_blocks_count_neither_as_accepted_nor_as_made(pair: TinyPair) -> None:
    first = latents(blocks_of(SDVG(None, pair.target, pair.decoder), num_blocks=2))
    run = speculate(pair, Random(0.0)).generate(PROMPTS, num_blocks=4, seed=1, given=first)
    list(run)
    assert run.summary().acceptance == 0.0
    assert [row[0].reason for row in run.verdicts] == ["given", "given", "router", "router"]


@pytest.mark.parametrize("commit", COMMITS, ids=str)
@pytest.mark.parametrize("cache", ["own", "synced"])
def test_switching_to_the_same_prompts_changes_nothing(
    pair64: TinyPair, commit: object, cache: str
) -> None:
    engine = speculate(pair64, Random(0.5), commit=commit, drafter_cache=cache)
    whole = blocks_of(engine)
    run = engine.generate(PROMPTS, num_blocks=5, seed=11)
    made = [next(run), next(run), next(run)]
    run.switch(PROMPTS, recache="all")
    made += list(run)
    assert (latents(made) - latents(whole)).abs().max() < 1e-10
    assert verdicts(made) == verdicts(whole)


def test_switching_prompts_changes_what_follows_and_nothing_before(pair: TinyPair) -> None:
    engine = speculate(pair, Random(0.5), run_ahead=2)
    whole = blocks_of(engine)
    run = engine.generate(PROMPTS, num_blocks=5, seed=11)
    made = [next(run), next(run)]
    run.switch([PROMPTS[1], *PROMPTS[1:]], recache="all")
    made += list(run)
    assert torch.equal(latents(made[:2]), latents(whole[:2]))
    later = (latents(made[2:]) - latents(whole[2:])).abs().amax((1, 2, 3, 4))
    assert later[0] > 1e-3
    # to rounding: the recache is one pass over several blocks
    assert later[1:].max() < 1e-4


def test_a_wrong_switch_is_named_in_one_sentence(pair: TinyPair) -> None:
    run = speculate(pair).generate(PROMPTS, num_blocks=2)
    with pytest.raises(ValueError, match="one for each of 3 sequences, got 1"):
        run.switch(["a seven"])
    with pytest.raises(ValueError, match="a prompt must not be empty"):
        run.switch(["a seven", " ", "a"])


@pytest.mark.parametrize("shape", [(1, 3, 4, 4, 4), (3, 4, 4, 4, 4), (3, 9, 4, 4, 4), (3, 3, 4, 4)])
def test_given_latents_of_another_shape_are_named(pair: TinyPair, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"given must be clean latents \[3, n \* 3, 4, 4, 4\]"):
        speculate(pair).generate(PROMPTS, num_blocks=2, given=torch.zeros(shape))


def test_a_switch_writes_the_sink_and_the_window_alone(pair: TinyPair) -> None:
    """It once wrote all that reaches the next block through all layers."""
    target = tiny_wan(seed=2)
    written: list[tuple[int, Tensor]] = []
    write = target.write

    def record(clean: Tensor, *, start_frame: int, rows: Tensor | None = None) -> None:
        written.append((start_frame, clean))
        write(clean, start_frame=start_frame, rows=rows)

    target.write = record
    run = SDVG(None, target, pair.decoder).generate(PROMPTS, num_blocks=7, seed=11)
    made = [next(run) for _ in range(5)]
    written.clear()
    run.switch(PROMPTS[::-1])
    made.append(next(run))
    # block 0 is the sink, block 4 what a window of two blocks sees beside the next one
    ((start, clean),) = written
    assert start == 0
    assert torch.equal(clean, latents([made[0], made[4]]))
    # the next block is what follows these two under the new prompts, from its own noise
    fresh = tiny_wan(seed=2)
    fresh.start(PROMPTS[::-1])
    write_fresh, ids = fresh.write, (0, 1, 2)
    write_fresh(clean, start_frame=0)
    x = normal(fresh.block_shape, seed=11, sequences=ids, block=5, step=0)
    for step, timestep in enumerate(run.sdvg.schedule.steps(5)):
        if step:
            noise = normal(fresh.block_shape, seed=11, sequences=ids, block=5, step=step)
            x = (1 - timestep / 1000) * x + timestep / 1000 * noise
        x = fresh.denoise(x, timestep, start_frame=6)
    assert torch.equal(made[5].latents, x)


@pytest.mark.parametrize("cache", ["own", "synced"])
def test_after_a_switch_lazy_equals_eager_commit_and_a_batch_its_sequences(
    pair64: TinyPair, cache: str
) -> None:
    def run(prompts: list[str], commit: str, sequences: list[int]) -> tuple[Tensor, list]:
        engine = speculate(pair64, Random(0.5), commit=commit, drafter_cache=cache)
        video = engine.generate(prompts, num_blocks=8, seed=11, sequences=sequences)
        made = [next(video) for _ in range(5)]
        video.switch([f"{prompt}, fast" for prompt in prompts])
        # again, before anything was made anew
        video.switch([f"{prompt}, slow" for prompt in prompts])
        made += list(video)
        return latents(made), verdicts(made)

    lazy, routed = run(PROMPTS, "lazy", [0, 1, 2])
    eager, _ = run(PROMPTS, "eager", [0, 1, 2])
    torch.testing.assert_close(lazy, eager, rtol=0, atol=1e-10)
    assert {kept for block in routed[5:] for kept in block} == {True, False}
    alone, _ = run(PROMPTS[1:2], "lazy", [1])
    torch.testing.assert_close(lazy[1:2], alone, rtol=0, atol=1e-10)


def test_a_wrong_recache_is_named(pair: TinyPair) -> None:
    run = speculate(pair).generate(PROMPTS, num_blocks=2)
    with pytest.raises(ValueError, match="recache must be 'window' or 'all', got 'half'"):
        run.switch(PROMPTS, recache="half")


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"run_ahead": 2}, {"commit": Recompute(3)}], ids=str)
def test_on_a_gpu_the_models_wait_for_nothing_between_verdicts(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the classes of the real models, accelerated, and a batch of both verdicts."""
    drafter, target = (
        tiny_wan(seed=seed, head_dim=64, dtype=torch.bfloat16, device="cuda").accelerate()
        for seed in (1, 2)
    )
    decoder = tiny_vae(torch.bfloat16)
    decoder.vae.to("cuda")

    def score(frames: Tensor, prompts: list[str]) -> Tensor:
        own = torch.arange(len(prompts), device=frames.device).remainder(2)[:, None]
        return own.expand(frames.shape[:2]).float()

    waits = []

    def reading(parts: list[Tensor]) -> list[list[float]]:
        waits.append(len(parts))
        torch.cuda.set_sync_debug_mode("default")
        try:
            return read(parts)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    loop = SDVG(drafter, target, decoder, score, Reward(0.5), **options)
    run = loop.generate(PROMPTS, num_blocks=8)
    made = [next(run) for _ in range(4)]
    monkeypatch.setattr("sdvg.engine.read", reading)
    try:
        for _ in range(4):
            torch.cuda.set_sync_debug_mode("error")
            made.append(next(run))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 8
    assert verdicts(made)[1:] == [(False, True, False)] * 7
