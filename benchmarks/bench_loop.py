"""The SDVG loop: its cost without any model, and what it gives with Wan and the embedded pair.

Times are wall clock, host work included, and are those of one block. Weights are random for the
large models: time does not depend on them, acceptance does, so it is set from outside, and every
draft is decoded and scored by a scorer that costs next to nothing. Shares are those of whole blocks
next below the paper's: 8 of 11 for 73.1%, 8 of 9 for 88.9%.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.harness import Bench, Candidate, Case, Plan, Unavailable, main
from sdvg import SDVG, Always, Block, Never, Reward, noise, preset
from sdvg.clock import Clock
from sdvg.commit import CachedModel
from sdvg.types import CausalModel, Decoder, Router, Scorer

if TYPE_CHECKING:
    from sdvg.bench import Parts


class NoModel:
    """A `CausalModel` that is next to nothing: what is left is the loop."""

    receptive_frames = None
    window_frames = None
    sink_frames = 0
    dtype = torch.float32

    def __init__(
        self, shape: tuple[int, int, int, int], device: torch.device, factor: float
    ) -> None:
        self.block_shape, self.device, self.factor = shape, device, factor

    def start(self, prompts: Sequence[str]) -> None:
        """There is nothing to forget."""

    def denoise(
        self, latents: Tensor, timestep: float, *, start_frame: int, rows: Tensor | None = None
    ) -> Tensor:
        """Return the latents times a factor."""
        return latents * self.factor

    def write(self, latents: Tensor, *, start_frame: int, rows: Tensor | None = None) -> None:
        """There is no cache."""

    def keep(self, *, start_frame: int, rows: Tensor | None = None) -> None:
        """There is no cache."""


class NoDecoder:
    """A `Decoder` whose frames are one latent value each."""

    def start(self, batch: int) -> None:
        """Return no state."""

    def decode(self, latents: Tensor, state: None) -> tuple[Tensor, None]:
        """Return [B, F, 3, 1, 1]."""
        return latents[:, :, :1, :1, :1].expand(-1, -1, 3, -1, -1), None

    def take(self, state: None, rows: Tensor) -> None:
        """Return no state."""

    def select(self, draft: None, other: None, rows: Tensor) -> None:
        """Return no state."""


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases."""
    cpu = bench.device.type == "cpu"
    # Wan's latents at 480 x 832, and next to none, where drawing the noise costs nothing
    for shape, batch in (((3, 4, 2, 2), 1), ((3, 4, 2, 2), 4), ((3, 16, 60, 104), 1)):
        if not (cpu and shape[-1] > 2):
            yield Plan(
                f"loop without models {shape} B={batch}", partial(_loop, bench, shape, batch)
            )
    if cpu:
        yield Plan("draft block, tiny", partial(_block, bench, "tiny", "draft"))
        yield Plan("wan tiny", partial(_wan, bench, "tiny", "tiny", accelerated=False))
        yield Plan("wan tiny, accelerated", partial(_wan, bench, "tiny", "tiny"))
        yield Plan("diagonal video, tiny", partial(_stream, bench, "tiny", "diagonal video"))
        yield Plan("first frames, tiny", partial(_stream, bench, "tiny", "first frames"))
    else:
        yield Plan("draft block, 1.3B", partial(_block, bench, "1.3B", "draft"))
        yield Plan("target block, 14B", partial(_block, bench, "14B", "target"))
        yield Plan("target block, 14B, e4m3", partial(_block, bench, "14B", "target", fp8=True))
        yield Plan("diagonal video, 1.3B", partial(_stream, bench, "1.3B", "diagonal video"))
        yield Plan("first frames, 1.3B", partial(_stream, bench, "1.3B", "first frames"))
        yield Plan("wan 1.3B for 1.3B, accelerated", partial(_wan, bench, "1.3B", "1.3B"))
        for fp8 in () if bench.quick else (False, True):
            for kept, decided in ((8, 11), (8, 9)):
                yield Plan(
                    f"wan 1.3B for 14B, {kept} of {decided} drafts kept{', e4m3' * fp8}",
                    partial(_wan, bench, "1.3B", "14B", kept=kept, decided=decided, fp8=fp8),
                )
    if not (cpu and bench.quick):
        yield Plan("embedded pair", partial(_embedded, bench))


def _loop(bench: Bench, shape: tuple[int, int, int, int], batch: int) -> Case:
    """Return the engine with models that do nothing, against the same loop by hand."""
    device, blocks = bench.device, 18
    drafter, target = (NoModel(shape, device, factor) for factor in (0.9, 1.1))
    prompts = [f"prompt {i}" for i in range(batch)]
    tau = -0.5

    def score(frames: Tensor, _: Sequence[str]) -> Tensor:
        return frames[:, :, 0, 0, 0].float()

    def by_hand() -> list[Tensor]:
        steps, latents = preset("self_forcing").steps(0), []
        for block in range(blocks):
            drawn = [
                noise.normal(shape, seed=0, sequences=tuple(range(batch)), block=block, step=i)
                for i in range(len(steps))
            ]
            made = []
            for model in (drafter, target):
                x = drawn[0].to(device)
                for i, timestep in enumerate(steps):
                    if i:
                        sigma = timestep / 1000
                        x = (1 - sigma) * x + sigma * drawn[i].to(device)
                    x = model.denoise(x, timestep, start_frame=3 * block)
                made.append(x)
            frames, _ = NoDecoder().decode(made[0], None)
            accept = (score(frames, prompts).amin(1) >= tau).tolist()
            keep = torch.tensor([bool(block) and a for a in accept], device=device)
            latents.append(torch.where(keep[:, None, None, None, None], *made))
        return latents

    expected = by_hand()

    def check(out: object) -> None:
        for index, (block, want) in enumerate(zip(out, expected, strict=True)):
            got = block.latents if isinstance(block, Block) else block
            assert torch.equal(got, want), f"block {index} is not what the loop by hand gives"

    def engine(commit: str) -> Candidate:
        loop = SDVG(drafter, target, NoDecoder(), score, Reward(tau), commit=commit)
        return Candidate(commit, lambda: list(loop.generate(prompts, num_blocks=blocks)), check)

    return Case(
        op="loop without models",
        shape=f"B={batch} latents={'x'.join(map(str, shape))}",
        dtype="float32",
        candidates=[
            engine("lazy"),
            engine("eager"),
            Candidate("by hand", by_hand, check, peer=True),
        ],
        wall=True,
        units=blocks,
    )


def _block(bench: Bench, size: str, role: str, *, fp8: bool = False) -> Case:
    """Return one block in the middle of a video: four steps and the clean pass, window of two."""
    _require("diffusers")
    parts, dtype, tall = _random(bench, "1.3B" if size == "14B" else size, size)
    model = parts.drafter if role == "draft" else parts.target
    clock, schedule = Clock(), preset("self_forcing")
    cached = CachedModel(model, schedule, ["a random video"])
    generator = torch.Generator(model.device).manual_seed(0)
    shape = (1, *model.block_shape)
    past = [torch.randn(shape, generator=generator, device=model.device) for _ in range(3)]
    start = cached.catch_up(3, None, past, clock)

    def run() -> Tensor:
        made = cached.denoise(3, None, start)
        model.write(made, start_frame=start)
        return made

    # before anything is put under it
    expected = run().clone()
    graphs = model.device.type == "cuda"
    model.accelerate(graphs=graphs, fp8=fp8)
    cached.restart(["a random video"])
    cached.catch_up(3, None, past, clock)

    def check(out: object) -> None:
        off = (out - expected).float().square().mean().sqrt() / expected.std()
        limit = 0.1 if fp8 else 1e-3 if dtype == torch.float32 else 0.05
        assert torch.isfinite(out).all(), "the block is not finite"
        assert off <= limit, f"the block is {off:.3g} deviations off the eager one"

    return Case(
        op=f"{role}_block",
        shape=f"Wan {size} {tall} B=1 window=6 steps=4 and a clean pass",
        dtype="float8_e4m3fn" if fp8 else str(dtype).removeprefix("torch."),
        candidates=[Candidate("graphs" if graphs else "accelerated", run, check)],
        wall=True,
        at_least=3,
    )


def _stream(bench: Bench, size: str, op: str) -> Case:
    """Return a video of one model alone, 4, 3, then 2 steps a block and no clean pass.

    As Diagonal Distillation streams it: 81 frames, the last four blocks and a sink of one in sight,
    a tiny decoder. "first frames" is the time from `generate` to those of the first block.
    """
    _require("diffusers")
    from sdvg.bench import random_model, random_tiny_decoder

    cuda = bench.device.type == "cuda"
    height, width = (480, 832) if cuda else (32, 32)
    placed = {"device": bench.device, "dtype": torch.bfloat16 if cuda else torch.float32}
    model = random_model(
        size, height=height, width=width, window_frames=12, sink_frames=3, **placed
    )
    decoder = random_tiny_decoder((256, 128, 64, 64) if cuda else (8, 6, 4, 4), **placed)
    if cuda:
        # the layout that its convolutions compute in
        decoder.to(memory_format=torch.channels_last)
    blocks = 7 if op == "diagonal video" else 1

    def generate(in_flight: int) -> list[Block]:
        loop = SDVG(None, model, decoder, schedule="diagonal", in_flight=in_flight)
        video = loop.generate(["a random video"], num_blocks=7)
        return [next(video) for _ in range(blocks)]

    # before anything is put under it, one block after the other
    expected = [block.latents for block in generate(1)]
    model.accelerate(graphs=cuda)

    def check(out: object) -> None:
        assert sum(block.frames.shape[1] for block in out) == 12 * blocks - 3
        for block, want in zip(out, expected, strict=True):
            assert block.frames.isfinite().all(), f"block {block.index} is not finite"
            off = (block.latents - want).float().square().mean().sqrt() / want.std()
            limit = 0.1 if cuda else 1e-3
            assert off <= limit, f"block {block.index} is {off:.3g} deviations off the eager one"

    return Case(
        op=op,
        shape=f"Wan {size} alone {height}x{width} B=1 window=12 sink=3, tiny decoder "
        f"frames={12 * blocks - 3} blocks={blocks} {'graphs' if cuda else 'accelerated'}",
        dtype=str(model.dtype).removeprefix("torch."),
        candidates=[
            Candidate("one in flight", partial(generate, 1), check),
            Candidate("two in flight", partial(generate, 2), check),
        ],
        wall=True,
        units=blocks,
        at_least=3,
    )


def _random(bench: Bench, drafter: str, target: str) -> tuple[Parts, torch.dtype, str]:
    """Return random models for the machine, their dtype, and the size of a frame in words."""
    from sdvg.bench import random_wan

    cpu = bench.device.type == "cpu"
    height, width = (32, 32) if cpu else (480, 832)
    dtype = torch.float32 if cpu else torch.bfloat16
    parts = random_wan(
        drafter, target, height=height, width=width, device=bench.device, dtype=dtype
    )
    return parts, dtype, f"{height}x{width}"


def _wan(
    bench: Bench,
    drafter: str,
    target: str,
    *,
    accelerated: bool = True,
    kept: int = 2,
    decided: int = 3,
    fp8: bool = False,
) -> Case:
    """Return the loop on random Wan transformers and a random VAE of the real classes."""
    _require("diffusers")
    if target == "14B" and bench.deadline - time.monotonic() < 300:
        raise Unavailable("it takes minutes: python -m benchmarks.bench_loop runs it alone")
    from sdvg.bench import Pattern

    parts, dtype, tall = _random(bench, drafter, target)
    cuda = bench.device.type == "cuda"
    if accelerated:
        parts.drafter.accelerate(graphs=cuda)
        parts.target.accelerate(graphs=cuda, fp8=fp8)
        parts.decoder.accelerate(graphs=cuda)
    how = "accelerated, graphs" if accelerated and cuda else "accelerated" * accelerated
    frames = 12 * (decided + 1) - 3
    return _generation(
        parts.drafter,
        parts.target,
        parts.decoder,
        parts.scorer,
        Pattern(kept / decided),
        prompts=["a random video"],
        shape=f"Wan {drafter} for {target} {tall} B=1 kept={kept} decided={decided} "
        f"frames={frames} {how}".strip(),
        dtype="float8_e4m3fn" if fp8 else str(dtype).removeprefix("torch."),
        blocks=decided + 1,
    )


def _embedded(bench: Bench) -> Case:
    """Return the loop on the pair that is shipped."""
    _require("diffusers", "transformers")
    from sdvg.models import embedded

    pair = embedded.load(device=bench.device)
    return _generation(
        pair.drafter,
        pair.target,
        pair.decoder,
        pair.scorer,
        Reward(-0.7),
        prompts=["a seven moving left"],
        shape="embedded pair B=1 reward tau=-0.7",
        dtype="float32",
    )


def _generation(
    drafter: CausalModel,
    target: CausalModel,
    decoder: Decoder,
    scorer: Scorer | None,
    router: Router,
    *,
    prompts: list[str],
    shape: str,
    dtype: str,
    blocks: int = 4,
) -> Case:
    """Return SDVG and draft-only generation; target-only is their peer: `ratio` is the speed-up."""

    def generate(loop: SDVG) -> list[Block]:
        return list(loop.generate(prompts, num_blocks=blocks))

    alone = partial(SDVG, decoder=decoder, scorer=scorer)
    target_only, draft_only = alone(None, target), alone(drafter, None)
    both = partial(alone, drafter, target)
    never = [block.latents for block in generate(both(router=Never()))]
    always = [block.latents for block in generate(both(router=Always(), force_first=False))]

    def equals(expected: list[Tensor], out: object) -> None:
        for block, want in zip(out, expected, strict=True):
            assert torch.isfinite(want).all(), f"block {block.index} is not finite"
            assert torch.equal(block.latents, want), f"block {block.index} breaks the law"

    def routed(out: object) -> None:
        for block in out:
            assert torch.isfinite(block.latents).all(), f"block {block.index} is not finite"
            if block.verdicts[0].accepted:
                assert torch.equal(block.latents, always[block.index]), "a kept draft was changed"
        assert torch.equal(out[0].latents, never[0]), "block 0 is not the target's"

    return Case(
        op="generate",
        shape=f"{shape} blocks={blocks}",
        dtype=dtype,
        candidates=[
            Candidate("sdvg", partial(generate, both(router=router)), routed),
            Candidate("draft-only", partial(generate, draft_only), partial(equals, always)),
            Candidate(
                "target-only", partial(generate, target_only), partial(equals, never), peer=True
            ),
        ],
        wall=True,
        units=blocks,
        at_least=2,
    )


def _require(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Unavailable(f"{package} is not installed, and the models are its classes")


if __name__ == "__main__":
    sys.exit(main("bench_loop", plans, sys.argv[1:]))
