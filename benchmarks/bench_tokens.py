"""Diagonal decoding of token models with random weights: one pass, and whole frames.

A pass must do no less than read the weights and the visible cache once: its GB/s are of these
bytes. Frames are timed by the wall clock, host work included, against raster order in the same loop
with the same CUDA graphs; what a frame saves in passes stands in its shape. Jacobi decoding, the
lossless baseline, is timed likewise, but without graphs, as the host reads after each pass how much
was kept: how many tokens that is belongs to random weights, and says nothing of trained ones.
Sizes: MineWorld's 300M on 14 x 24 tokens with 11 action tokens, Cosmos-Predict1 4B on 40 x 64.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.harness import Bench, Candidate, Case, Plan, main
from sdvg.models.tokens import COSMOS, MINEWORLD, LlamaSizes, TokenLlama
from sdvg.tokens import DiagonalDecoder, Generation, JacobiDecoder, Layout, Sampling
from sdvg.tokens.jacobi import JacobiGeneration
from sdvg_kernels import diagonal_schedule


class World(NamedTuple):
    """A model, its layout, and the tokens before the frame that is measured."""

    name: str
    sizes: LlamaSizes
    layout: Layout
    prefix: int
    sampling: Sampling


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases."""
    if bench.device.type == "cpu":
        sizes = LlamaSizes(2, 32, 4, 2, 16, 48, 40)
        worlds = [World("tiny", sizes, Layout(3, 4, 30, extra=2), 5, Sampling())]
    else:
        worlds = [
            # 15 frames of context; a reference frame with its action, then frames
            World("MineWorld 300M", MINEWORLD["300M"], Layout(14, 24, 8192, extra=11), 15 * 347,
                  Sampling(top_p=0.8)),
            # nine frames of context: two latent ones
            World("Cosmos 4B", COSMOS["4B"], Layout(40, 64, 64000), 2 * 2560, Sampling(top_p=0.8)),
        ]  # fmt: skip
    for world in worlds:
        for k in (world.layout.width, 1) if bench.quick else (world.layout.width, 2, 1):
            yield Plan(f"a pass, {world.name} k={k}", partial(_pass, bench, world, k))
    small, *large = worlds
    # the first ones are the last to be left out for want of time
    yield _frames_plan(bench, small, "spatial", 1)
    if large and not bench.quick:
        # a whole frame of Cosmos in raster order takes seconds
        part = replace(large[0].layout, height=10)
        quarter = large[0]._replace(name=f"{large[0].name} (10 of 40 rows)", layout=part)
        yield _frames_plan(bench, quarter, "spatial", 1)
    yield _frames_plan(bench, small, "spatial", 2)
    yield _jacobi_plan(bench, small, "scd", 16)
    if not bench.quick:
        yield _frames_plan(bench, small, "spatiotemporal", 1)
        yield _frames_plan(bench, small, "zipar", 2)
        yield _jacobi_plan(bench, small, "sjd", 16)
        yield _jacobi_plan(bench, small, "scd", 64)


def _frames_plan(bench: Bench, world: World, mode: str, k: int) -> Plan:
    what = f"frames, {world.name} {mode} k={k}"
    return Plan(what, partial(_frames, bench, world, mode, k))


def _jacobi_plan(bench: Bench, world: World, mode: str, window: int) -> Plan:
    what = f"frames, {world.name} {mode} window={window}"
    return Plan(what, partial(_jacobi, bench, world, mode, window))


def _model(bench: Bench, world: World) -> TokenLlama:
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with bench.device:
            return TokenLlama(world.sizes).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def _pass(bench: Bench, world: World, k: int) -> Case:
    """Return the widest pass of the first frame, behind a full context."""
    layout, model = world.layout, _model(bench, world)
    plan = diagonal_schedule(
        1, layout.height, layout.width, k, prefix=world.prefix, extra=layout.extra,
        device=bench.device,
    )  # fmt: skip
    # the last of the widest: most of the frame is there
    place = max(range(len(plan.widths)), key=lambda at: (plan.widths[at], at))
    width = plan.widths[place]
    slots, steps = (table[place, :width][None] for table in (plan.slots, plan.steps))
    cache = model.new_cache(1, plan.size)
    for tensor in (cache.k, cache.v):
        tensor.normal_()
    ids = torch.randint(layout.codes, (1, width), device=bench.device)
    length = int(slots.max()) + 1
    run = partial(model.forward, ids, slots, steps, plan.grid, cache)

    def masked() -> torch.Tensor:
        model.masked = True
        try:
            return run(length=length)
        finally:
            model.masked = None

    expected = masked().float()

    def check(out: object) -> None:
        # two orders of the same sums, in bfloat16 through all layers
        far = (out.float() - expected).norm() / expected.norm()
        assert far < 0.05, f"logits are {far:.3g} from those under a mask"

    weights = sum(weight.numel() for weight in model.parameters()) - model.embedding.weight.numel()
    seen = 2 * world.sizes.layers * length * world.sizes.kv_heads * world.sizes.head_dim
    return Case(
        op="token pass",
        shape=f"{world.name} k={k} T={width} S={length}",
        dtype=str(model.norm.dtype).removeprefix("torch."),
        candidates=[
            Candidate("ours", run, check),
            Candidate("SDPA with a mask", masked, check, peer=True),
        ],
        bytes=(weights + seen) * model.norm.element_size(),
    )


def _frames(bench: Bench, world: World, mode: str, k: int) -> Case:
    """Return frames in raster order and in those of `mode`; passes are those of the video."""
    layout, model = world.layout, _model(bench, world)
    # frames that overlap show it in pairs
    count = 2 if mode == "spatiotemporal" else 1
    raster = DiagonalDecoder(model, layout, mode="raster", sampling=world.sampling)
    ours = DiagonalDecoder(model, layout, mode=mode, k=k, sampling=world.sampling)
    return Case(
        op="token frame",
        shape=(
            f"{world.name} {layout.height}x{layout.width} {mode} k={k} "
            f"passes={ours.passes(count)} raster={raster.passes(count)}"
        ),
        dtype=str(model.norm.dtype).removeprefix("torch."),
        candidates=[
            _candidate(mode, ours, count),
            _candidate("raster order", raster, count, peer=True),
        ],
        wall=True,
        units=count,
        at_least=2,
    )


def _jacobi(bench: Bench, world: World, mode: str, window: int) -> Case:
    """Return a frame in raster order and by speculative Jacobi decoding, coupled (scd) or not."""
    layout, model = world.layout, _model(bench, world)
    raster = DiagonalDecoder(model, layout, mode="raster", sampling=world.sampling)
    ours = JacobiDecoder(
        model, layout, window=window, sampling=world.sampling, coupled=mode == "scd"
    )
    # the video of every run: keyed noise makes them one
    video = _video(ours, 1)
    for _ in video:
        pass
    tokens = layout.height * layout.width
    return Case(
        op="token frame, lossless",
        shape=(
            f"{world.name} {layout.height}x{layout.width} {mode} window={window} "
            f"passes={video.passes} raster={tokens} tokens/pass={tokens / video.passes:.1f}"
        ),
        dtype=str(model.norm.dtype).removeprefix("torch."),
        candidates=[
            _candidate(mode, ours, 1),
            _candidate("raster order", raster, 1, peer=True),
        ],
        wall=True,
        at_least=2,
    )


def _video(decoder: DiagonalDecoder | JacobiDecoder, count: int) -> Generation | JacobiGeneration:
    """Return the iterator over `count` frames behind the same random prompt."""
    layout, device = decoder.layout, decoder.model.device
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(layout.codes, (1, 5 + layout.extra), generator=random)
    actions = torch.randint(layout.codes, (1, count - 1, layout.extra), generator=random)
    return decoder.generate(prompts.to(device), frames=count, actions=actions)


def _candidate(
    name: str, decoder: DiagonalDecoder | JacobiDecoder, count: int, *, peer: bool = False
) -> Candidate:
    codes = decoder.layout.codes

    def run() -> torch.Tensor:
        video = _video(decoder, count)
        for _ in video:
            pass
        return video.codes

    first = run()

    def check(out: object) -> None:
        assert torch.equal(out, first), "a video differs from the same one before"
        assert out.min() >= 0, "a token was not drawn"
        assert out.max() < codes, "a token is none of the codes"

    return Candidate(name, run, check, peer=peer)


if __name__ == "__main__":
    sys.exit(main("bench_tokens", plans, sys.argv[1:]))
