"""Schedules without a clean pass: the next block attends to what the last noisy step left."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sdvg import SDVG, Always, Never, Random, Recompute, Schedule, Stride, preset
from sdvg.models.wan import CausalWan
from sdvg.noise import normal
from tests.loop.test_laws import (
    COMMITS,
    PROMPTS,
    blocks_of,
    latents,
    require_both_verdicts,
    speculate,
    verdicts,
    video,
)
from tests.tiny import TinyPair, float64_norms, tiny_pair, tiny_wan

pytest.importorskip("diffusers", reason="the models are diffusers' classes")

DIAGONAL = preset("diagonal")
# the same steps with a clean pass, which costs a forward a block
CLEAN = Schedule(DIAGONAL.timesteps)
# (the drafter's, the target's)
SIDES = list(itertools.product((DIAGONAL, CLEAN), repeat=2))
NAMES = ["both", "drafter", "target", "neither"]


@pytest.fixture(scope="module")
def pair() -> TinyPair:
    return tiny_pair()


@pytest.fixture(scope="module")
def pair64() -> Iterator[TinyPair]:
    with float64_norms():
        yield tiny_pair(torch.float64)


class Watched:
    """A model of which every forward is seen: (kind, first block, blocks, timestep, input)."""

    def __init__(self, model: CausalWan) -> None:
        self.model, self.calls, self.forwards = model, [], 0
        self.inside = model.transformer.forward
        model.transformer.forward = self._forward
        for name in ("denoise", "write"):
            setattr(model, name, self._seen(name, getattr(model, name)))

    def _forward(self, *args: object, **options: object) -> object:
        self.forwards += 1
        return self.inside(*args, **options)

    def _seen(self, kind: str, function: object) -> object:
        def call(x: Tensor, timestep: float = 0.0, *, start_frame: int, **rest: object) -> Tensor:
            self.calls.append((kind, start_frame // 3, x.shape[1] // 3, timestep, x))
            return function(x, timestep=timestep, start_frame=start_frame, **rest)

        return call

    def named(self) -> list[tuple[str, int, int, float]]:
        """Return the calls without their inputs, timesteps to two digits."""
        return [(kind, at, count, round(step, 2)) for kind, at, count, step, _ in self.calls]


def watched(seed: int = 2, **options: object) -> tuple[CausalWan, Watched]:
    model = tiny_wan(seed=seed, **options)
    return model, Watched(model)


def noised(clean: Tensor, block: int, schedule: Schedule = DIAGONAL) -> Tensor:
    """Return the input of the last step of a block that ends as `clean`."""
    steps = schedule.steps(block)
    sigma = steps[-1] / 1000
    drawn = normal(clean.shape[1:], seed=11, sequences=(0, 1, 2), block=block, step=len(steps) - 1)
    return (1 - sigma) * clean + sigma * drawn.to(clean)


def going_on(model: CausalWan, block: int, steps: Sequence[float], at: int) -> Tensor:
    """Return what the model, its cache as it is, makes of a block's noise at frame `at`."""
    made = None
    for step, timestep in enumerate(steps):
        drawn = normal(model.block_shape, seed=11, sequences=(0, 1, 2), block=block, step=step)
        sigma = timestep / 1000
        x = drawn if made is None else (1 - sigma) * made + sigma * drawn
        made = model.denoise(x, timestep, start_frame=at)
    return made


@pytest.mark.parametrize("blocks", [2, 3, 7])
@pytest.mark.parametrize("side", ["drafter", "target"])
def test_one_model_takes_4_3_and_then_2_forwards_a_block(
    pair: TinyPair, side: str, blocks: int
) -> None:
    model, seen = watched()
    parts = (model, None) if side == "drafter" else (None, model)
    list(SDVG(*parts, pair.decoder, schedule="diagonal").generate(["a"], num_blocks=blocks))
    assert seen.forwards == 4 + 3 + 2 * (blocks - 2)
    list(SDVG(*parts, pair.decoder, schedule=CLEAN).generate(["a"], num_blocks=blocks))
    # the last block needs no clean pass
    assert seen.forwards == 2 * (4 + 3 + 2 * (blocks - 2)) + blocks - 1


def test_the_cache_holds_the_last_noisy_steps_keys_bit_for_bit(pair: TinyPair) -> None:
    """As staged by that step, and in the first layer as made by hand from its input."""
    model, seen = watched(sink_frames=0, window_frames=12)
    tokens = 3 * model.frame_tokens
    staged: dict[int, Tensor] = {}
    denoise = model.denoise

    def record(x: Tensor, timestep: float, *, start_frame: int, **rest: object) -> Tensor:
        out = denoise(x, timestep, start_frame=start_frame, **rest)
        own = slice(start_frame * model.frame_tokens, start_frame * model.frame_tokens + tokens)
        staged[start_frame // 3] = torch.stack((model.cache.k[:, :, own], model.cache.v[:, :, own]))
        return out

    model.denoise = record
    list(SDVG(None, model, pair.decoder, schedule="diagonal").generate(PROMPTS, num_blocks=4))
    cache = torch.stack((model.cache.k, model.cache.v))[:, :, :, : 4 * tokens]
    assert torch.equal(cache, torch.cat([staged[block] for block in range(4)], dim=3))

    inputs = {at: (x, timestep) for _, at, _, timestep, x in seen.calls}
    transformer = model.transformer
    layer, embedder = transformer.blocks[0], transformer.condition_embedder
    frame = torch.arange(12)
    for block, (x, timestep) in inputs.items():
        assert timestep == pytest.approx(357.142857)
        hidden = transformer.patch_embedding(x.transpose(1, 2)).flatten(2).transpose(1, 2)
        embedded = embedder.time_embedder(embedder.timesteps_proj(torch.full((3,), timestep)))
        rows = embedder.time_proj(embedder.act_fn(embedded)).unflatten(1, (6, -1))
        shift, scale = (layer.scale_shift_table + rows).chunk(6, dim=1)[:2]
        normed = layer.norm1(hidden) * (1 + scale) + shift
        key, value = layer.attn1.norm_k(layer.attn1.to_k(normed)), layer.attn1.to_v(normed)
        # 16 channels: 8 turn with the frame, 4 with the row, 4 with the column
        own = frame[3 * block : 3 * block + 3]
        axes = torch.cartesian_prod(own, torch.arange(2), torch.arange(2)).double()
        turns = [1e4 ** (-torch.arange(0, n, 2, dtype=torch.float64) / n) for n in (8, 4, 4)]
        angle = torch.cat([axes[:, i, None] * turns[i] for i in range(3)], dim=1)[:, None]
        pairs = torch.view_as_complex(key.double().unflatten(2, (2, 8, 2)).contiguous())
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(3)
        part = slice(block * tokens, (block + 1) * tokens)
        torch.testing.assert_close(cache[0, 0, :, part], turned.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cache[1, 0, :, part].flatten(2), value, rtol=1e-5, atol=1e-5)


def test_a_window_of_twelve_frames_is_the_last_four_blocks() -> None:
    model = tiny_wan(seed=2, layers=1, sink_frames=0, window_frames=12)
    noises = torch.randn(6, 1, *model.block_shape)

    def last(changed: int) -> Tensor:
        model.start(["a"])
        for block, x in enumerate(noises):
            x = x + (block == changed)
            out = model.denoise(x, DIAGONAL.steps(block)[-1], start_frame=3 * block)
            model.keep(start_frame=3 * block)
        return out

    whole = last(-1)
    assert [torch.equal(last(block), whole) for block in range(5)] == [True, True] + [False] * 3


@pytest.mark.parametrize("commit", COMMITS, ids=str)
def test_accepted_drafts_are_written_noised_as_their_last_step(
    pair: TinyPair, commit: object
) -> None:
    """A clean pass once wrote them, K/V of a kind that such a model never sees."""
    target, seen = watched()
    engine = SDVG(
        pair.drafter, target, pair.decoder, router=Stride(3), commit=commit, schedule="diagonal"
    )
    blocks = blocks_of(engine, num_blocks=4)
    wrote = [call for call in seen.calls if call[0] == "write"]
    # the target makes blocks 0 and 3; lazily, both drafts between take one forward
    passes = {
        "lazy": [(1, 2)],
        "eager": [(1, 1), (2, 1)],
        "recompute:3": [(0, 1)],
        "recompute:6": [(0, 2)],
    }[str(commit)]
    assert [call[1:3] for call in wrote] == passes
    assert seen.forwards == 4 + 2 + len(passes)
    behind = 3 - sum(count for _, count in passes)
    context = [noised(block.latents, block.index) for block in blocks[behind:3]]
    assert torch.equal(torch.cat([call[4] for call in wrote], dim=1), torch.cat(context, dim=1))
    assert {call[3] for call in wrote} == {DIAGONAL.steps(0)[-1]}


def test_levels_that_differ_take_a_pass_each(pair: TinyPair) -> None:
    schedule = Schedule(((1000.0, 500.0), (1000.0, 250.0), (1000.0, 250.0)), clean_pass=False)
    target, seen = watched()
    engine = SDVG(
        pair.drafter, target, pair.decoder, router=Always(), force_first=False, schedule=schedule
    )
    run = engine.generate(PROMPTS, num_blocks=4, seed=11)
    made = [next(run) for _ in range(3)]
    run._target.catch_up(3, None, run.latents, run._clock)
    assert seen.named() == [("write", 0, 1, 500.0), ("write", 1, 2, 250.0)]
    assert torch.equal(seen.calls[0][4], noised(made[0].latents, 0, schedule))


@pytest.mark.parametrize(("drafting", "schedule"), SIDES, ids=NAMES)
@pytest.mark.parametrize("drafter_cache", ["own", "synced"])
def test_lazy_equals_eager_and_a_batch_its_sequences(
    pair64: TinyPair, drafting: Schedule, schedule: Schedule, drafter_cache: str
) -> None:
    options = {
        "schedule": schedule, "drafter_schedule": drafting, "drafter_cache": drafter_cache
    }  # fmt: skip
    lazy = speculate(pair64, Random(0.5), **options)
    together = blocks_of(lazy, num_blocks=4)
    require_both_verdicts(together)
    eager = blocks_of(speculate(pair64, Random(0.5), commit="eager", **options), num_blocks=4)
    torch.testing.assert_close(latents(together), latents(eager), rtol=0, atol=1e-10)
    alone = blocks_of(lazy, PROMPTS[1:2], sequences=[1], num_blocks=4)
    torch.testing.assert_close(latents(together)[1:2], latents(alone), rtol=0, atol=1e-10)
    torch.testing.assert_close(video(together)[1:2], video(alone), rtol=0, atol=1e-10)
    if drafter_cache == "own":
        ahead = blocks_of(speculate(pair64, Random(0.5), run_ahead=2, **options), num_blocks=4)
        torch.testing.assert_close(latents(ahead), latents(together), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("drafting", "schedule"), SIDES, ids=NAMES)
@pytest.mark.parametrize("commit", ["lazy", Recompute(6)], ids=str)
def test_the_laws_of_the_loop_hold_bitwise(
    pair: TinyPair, drafting: Schedule, schedule: Schedule, commit: object
) -> None:
    options = {"schedule": schedule, "drafter_schedule": drafting, "commit": commit}
    prompts = PROMPTS[:2]
    never = blocks_of(speculate(pair, Never(), **options), prompts, num_blocks=4)
    target_only = SDVG(None, pair.target, pair.decoder, schedule=schedule, commit=commit)
    assert torch.equal(video(never), video(blocks_of(target_only, prompts, num_blocks=4)))
    always = blocks_of(
        speculate(pair, Always(), force_first=False, **options), prompts, num_blocks=3
    )
    drafts = SDVG(pair.drafter, None, pair.decoder, schedule=drafting)
    assert torch.equal(video(always), video(blocks_of(drafts, prompts, num_blocks=3)))


def test_a_synced_drafter_goes_on_from_repaired_blocks_noised(pair: TinyPair) -> None:
    """Its own draft's K/V are gone; the target's block stands there at the drafter's last level."""
    engine = speculate(pair, Stride(2), schedule="diagonal", drafter_cache="synced")
    blocks = blocks_of(engine, num_blocks=2)
    level = DIAGONAL.steps(0)[-1]
    pair.drafter.start(PROMPTS)
    pair.drafter.write(noised(blocks[0].latents, 0), start_frame=0, timestep=level)
    assert torch.equal(going_on(pair.drafter, 1, DIAGONAL.steps(1), 3), blocks[1].latents)

    drafter, seen = watched(seed=1, layers=1)
    mixed = speculate(pair._replace(drafter=drafter), lambda draft: Stride(2)(draft),
                      schedule="diagonal", drafter_cache="synced")  # fmt: skip
    blocks_of(mixed, num_blocks=4)
    # what was kept stays as its last step left it
    assert [call for call in seen.named() if call[0] == "write"] == [
        ("write", 0, 1, 357.14), ("write", 2, 1, 357.14)
    ]  # fmt: skip


def test_clean_context_writes_repaired_blocks_clean_and_keeps_its_own_noisy(pair: TinyPair) -> None:
    schedule = replace(DIAGONAL, clean_context=True)
    drafter, seen = watched(seed=1, layers=1)
    mixed = speculate(pair._replace(drafter=drafter), lambda draft: Stride(2)(draft),
                      schedule=schedule, drafter_cache="synced")  # fmt: skip
    made = blocks_of(mixed, num_blocks=4)
    assert [call for call in seen.named() if call[0] == "write"] == [
        ("write", 0, 1, 0), ("write", 2, 1, 0)
    ]  # fmt: skip
    alone, _ = watched(seed=1, layers=1)
    alone.start(PROMPTS)
    alone.write(made[0].latents, start_frame=0)
    drafted = going_on(alone, 1, DIAGONAL.steps(1), 3)
    kept = torch.tensor([verdict.accepted for verdict in made[1].verdicts])
    assert kept.any()
    assert torch.equal(drafted[kept], made[1].latents[kept])


def test_given_blocks_are_noised_for_drafter_and_target(pair: TinyPair) -> None:
    first = latents(blocks_of(SDVG(None, pair.target, pair.decoder), num_blocks=2))
    for model, parts in ((pair.drafter, (pair.drafter, None)), (pair.target, (None, pair.target))):
        engine = SDVG(*parts, pair.decoder, schedule="diagonal")
        made = blocks_of(engine, num_blocks=3, given=first)
        model.start(PROMPTS)
        context = torch.cat([noised(first[:, :3], 0), noised(first[:, 3:], 1)], dim=1)
        model.write(context, start_frame=0, timestep=DIAGONAL.steps(0)[-1])
        assert torch.equal(going_on(model, 2, DIAGONAL.steps(2), 6), made[2].latents)


def test_a_switch_writes_what_is_seen_anew_and_noised(pair: TinyPair) -> None:
    run = SDVG(None, pair.target, pair.decoder, schedule="diagonal").generate(
        PROMPTS, num_blocks=6, seed=11
    )
    made = [next(run) for _ in range(5)]
    run.switch(PROMPTS[::-1])
    made.append(next(run))
    pair.target.start(PROMPTS[::-1])
    # the sink, and what a window of two blocks sees beside the next one
    context = torch.cat([noised(made[0].latents, 0), noised(made[4].latents, 4)], dim=1)
    pair.target.write(context, start_frame=0, timestep=DIAGONAL.steps(0)[-1])
    assert torch.equal(going_on(pair.target, 5, DIAGONAL.steps(5), 6), made[5].latents)


@pytest.mark.parametrize("cache", ["own", "synced"])
def test_after_a_switch_lazy_equals_eager(pair64: TinyPair, cache: str) -> None:
    runs = []
    for commit in ("lazy", "eager"):
        engine = speculate(
            pair64, Random(0.5), commit=commit, drafter_cache=cache, schedule="diagonal"
        )
        run = engine.generate(PROMPTS, num_blocks=6, seed=11)
        made = [next(run) for _ in range(4)]
        run.switch([f"{prompt}, fast" for prompt in PROMPTS])
        runs.append(made + list(run))
    assert verdicts(runs[0]) == verdicts(runs[1])
    torch.testing.assert_close(latents(runs[0]), latents(runs[1]), rtol=0, atol=1e-10)


def test_noised_context_is_nearer_to_the_models_own_than_a_clean_pass() -> None:
    """The figures that `Schedule` gives, on the embedded target."""
    from sdvg.models import embedded

    pair = embedded.load()
    model = pair.target
    own = blocks_of(SDVG(None, model, pair.decoder, schedule="diagonal"), num_blocks=4)
    off = []
    for context, level in (
        (torch.cat([noised(block.latents, block.index) for block in own[:3]], dim=1), 2500 / 7),
        (latents(own[:3]), 0.0),
    ):
        model.start(PROMPTS)
        model.write(context, start_frame=0, timestep=level)
        made = going_on(model, 3, DIAGONAL.steps(3), 9)
        off.append((made - own[3].latents).square().mean().sqrt() / own[3].latents.std())
    assert off[0] < 0.2
    assert off[1] > 0.7
