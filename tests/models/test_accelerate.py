"""The fused ops change nothing but rounding, in every way that the loop uses a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="the Wan classes are diffusers'")

from sdvg import SDVG, Random, Recompute
from sdvg.models.wan import CausalWan
from tests.tiny import FRAMES, TinyPair, float64_norms, tiny_pair, tiny_wan

PROMPTS = ["a seven moving left", "a two moving up", "a nine moving right, slowly"]


def both(dtype: torch.dtype = torch.float64, **options: object) -> tuple[CausalWan, CausalWan]:
    """Return a random model twice, the second one accelerated."""
    return (
        tiny_wan(seed=3, layers=3, dtype=dtype, **options),
        tiny_wan(seed=3, layers=3, dtype=dtype, **options).accelerate(),
    )


def run(model: CausalWan, latents: Tensor) -> list[Tensor]:
    """Return what every kind of pass over four blocks gives."""
    model.start(PROMPTS)
    rows, out = torch.tensor([2, 0]), []
    for block, part in enumerate(latents.split(FRAMES, dim=1)):
        start = block * FRAMES
        out.append(model.denoise(part, 937.5, start_frame=start))
        out.append(model.denoise(part[rows], 625.0, start_frame=start, rows=rows))
        model.write(part, start_frame=start)
    model.start(PROMPTS)
    model.write(latents[:, : 2 * FRAMES], start_frame=0)
    out.append(model.denoise(latents[:, 2 * FRAMES : 3 * FRAMES], 500.0, start_frame=2 * FRAMES))
    return out


@pytest.mark.parametrize("window", [6, 9, None], ids=str)
@pytest.mark.parametrize("sink", [0, 3])
def test_accelerated_passes_equal_plain_ones(window: int | None, sink: int) -> None:
    with float64_norms():
        plain, fused = both(sink_frames=sink, window_frames=window)
        latents = torch.randn(3, 4 * FRAMES, *plain.block_shape[1:], dtype=torch.float64)
        for mine, theirs in zip(run(fused, latents), run(plain, latents), strict=True):
            assert (mine - theirs).abs().max() < 1e-10
        assert (fused.cache.k - plain.cache.k).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_it_is_as_near_to_the_exact_result(dtype: torch.dtype) -> None:
    plain, fused = both(dtype)
    latents = torch.randn(3, 4 * FRAMES, *plain.block_shape[1:])
    with float64_norms():
        exact_model = tiny_wan(seed=3, layers=3, dtype=torch.float64)
        # the weights as they were rounded
        exact_model.transformer.load_state_dict(plain.transformer.state_dict())
        exact = run(exact_model, latents.double())
    for mine, theirs, true in zip(run(fused, latents), run(plain, latents), exact, strict=True):
        error = (theirs.double() - true).abs().max()
        assert (mine.double() - true).abs().max() <= 2 * error + 1e-6


@pytest.mark.parametrize("commit", ["lazy", "eager", Recompute(3)], ids=str)
def test_the_loop_gives_the_same_video(commit: object) -> None:
    def video(pair: TinyPair) -> Tensor:
        engine = SDVG(*pair, router=Random(0.5), commit=commit, drafter_cache="synced")
        made = engine.generate(PROMPTS, num_blocks=5, seed=4)
        return torch.cat([block.frames for block in made], dim=1)

    with float64_norms():
        plain = video(tiny_pair(torch.float64))
        pair = tiny_pair(torch.float64)
        fused = video(
            pair._replace(drafter=pair.drafter.accelerate(), target=pair.target.accelerate())
        )
    assert (fused - plain).abs().max() < 1e-9


def test_weights_keep_their_names_and_are_stored_once() -> None:
    plain, fused = both(torch.float32)
    mine, theirs = fused.transformer.state_dict(), plain.transformer.state_dict()
    assert set(theirs) <= set(mine)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    stored = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in mine.values()
    }
    assert sum(stored.values()) == sum(value.nbytes for value in theirs.values())


def test_a_video_longer_than_the_table_goes_on() -> None:
    with float64_norms():
        plain, fused = both(sink_frames=0, window_frames=3)
        part = torch.randn(1, FRAMES, *plain.block_shape[1:], dtype=torch.float64)
        out = []
        for model in (plain, fused):
            model.start(PROMPTS[:1])
            out.append(model.denoise(part, 500.0, start_frame=1023))
        assert (out[0] - out[1]).abs().max() < 1e-10


def test_accelerating_twice_is_accelerating_once() -> None:
    _, fused = both(torch.float32)
    blocks = [block.forward for block in fused.transformer.blocks]
    fused.accelerate()
    assert [block.forward for block in fused.transformer.blocks] == blocks
