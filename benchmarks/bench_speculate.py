"""Speculative decoding of an image at LlamaGen-XL's size, with random weights and a set acceptance.

Random weights accept nothing of each other's, so how much of a tree is kept is set: the rule is run
for its time, and then as much of the tree's first path is kept as is asked for on average. Images
are timed by the wall clock, host work included, against raster order in our own loop with a CUDA
graph; passes stand in the shape. Another case is what of a step is no model's: drafted trees,
verification and compaction. Sizes: 36 layers, 32 x 32 tokens behind a caption of 120, guidance 7.5,
top-k 1000, trees of 59 nodes (VVS, arXiv 2511.13587, its Stage II).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Bench, Candidate, Case, Plan, main
from sdvg.models.capture import Recorder
from sdvg.models.drafter import EagleDrafter
from sdvg.models.llamagen import LLAMAGEN, LlamaGen
from sdvg.models.tokens import LlamaSizes
from sdvg.tokens import DiagonalDecoder, Layout, Sampling
from sdvg.tokens.skipping import Uniform, neighbours
from sdvg.tokens.speculative import Exact, Relaxed, SpeculativeDecoder, Verification
from sdvg_kernels import TokenTree, Verified, build_tree, compact_, expand_tree


class Size(NamedTuple):
    """A model and its trees."""

    name: str
    sizes: LlamaSizes
    side: int
    condition: int
    features: int
    sampling: Sampling
    depth: int
    top_k: int
    nodes: int
    near: int


class Method(NamedTuple):
    """A row: tokens that a verified pass commits, the drawn one included, as the paper has them."""

    name: str
    tokens: float
    delta: float = 0.0
    interval: int = 0


# of Stage II: EAGLE-2's, LANTERN's at delta 0.2, and what VVS verifies with
METHODS = (
    Method("EAGLE-2", 1.22),
    Method("LANTERN", 1.83, delta=0.2),
    Method("VVS", 1.83, delta=0.1, interval=2),
)


class _Set:
    """`rule`, and then `tokens` tokens a pass, whatever it says."""

    def __init__(self, rule: Verification, tokens: float) -> None:
        self._rule, self._tokens = rule, tokens

    def __call__(self, tree: TokenTree, logits: Tensor, **keys: object) -> Verified:
        verified = self._rule(tree, logits, **keys)
        # fractions of the golden ratio's multiples fill [0, 1) evenly
        share = keys["positions"] * 0.6180339887 % 1
        wanted = (self._tokens - 1 + share).floor().int()
        node = torch.zeros_like(tree.parents[:, :1])
        path = [node]
        for level in range(keys["depth"]):
            child = tree.first_child.gather(1, node.long())
            kept = (child >= 0) & (level < wanted)[:, None]
            node = torch.where(kept, child, node)
            path.append(torch.where(kept, child, -1))
        whole = torch.cat(path, 1)
        return Verified(whole, (whole >= 0).sum(1).int(), verified.tokens.clamp(min=0))


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases."""
    if bench.device.type == "cpu":
        sizes = LlamaSizes(2, 32, 4, 4, 8, 48, 40, 1e-5)
        size = Size("tiny", sizes, 4, 3, 5, Sampling(guidance=2.0, top_k=20), 2, 3, 9, 5)
    else:
        sampling = Sampling(guidance=7.5, top_k=1000)
        size = Size("LlamaGen-XL", LLAMAGEN["XL"], 32, 120, 2048, sampling, 5, 10, 59, 1000)
    methods = (METHODS[0], METHODS[-1]) if bench.quick else METHODS
    for method in methods:
        yield Plan(f"an image by {method.name}, {size.name}", partial(_image, bench, size, method))
    yield Plan(f"what of a step is no model, {size.name}", partial(_rest, bench, size))


def _models(bench: Bench, size: Size) -> tuple[LlamaGen, EagleDrafter]:
    dtype = torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with bench.device:
            target = LlamaGen(
                size.sizes, size.side, condition=size.condition, features=size.features, captions=1
            )
            drafter = EagleDrafter(replace(size.sizes, layers=1))
    finally:
        torch.set_default_dtype(before)
    return tuple(part.eval().requires_grad_(False) for part in (target, drafter))


def _decoder(
    bench: Bench, size: Size, method: Method, target: LlamaGen, drafter: EagleDrafter
) -> SpeculativeDecoder:
    codes = target.codes
    rule: Verification = Exact()
    if method.delta:
        # vectors of 8 numbers, as LlamaGen's tokenizer has
        book = torch.randn(codes, 8, device=bench.device)
        rule = Relaxed(neighbours(book, size.near), delta=method.delta)
    return SpeculativeDecoder(
        target, drafter, Layout(size.side, size.side, codes), depth=size.depth, top_k=size.top_k,
        nodes=size.nodes, sampling=size.sampling, verification=_Set(rule, method.tokens),
        skip=Uniform(method.interval) if method.interval else None,
    )  # fmt: skip


def _image(bench: Bench, size: Size, method: Method) -> Case:
    """Return an image by `method` and one in raster order."""
    target, drafter = _models(bench, size)
    layout = Layout(size.side, size.side, target.codes)
    prompts = target.captions(torch.randn(1, size.condition, size.features, device=bench.device))
    uncond = target.uncond(prompts)
    ours = _decoder(bench, size, method, target, drafter)
    raster = DiagonalDecoder(target, layout, mode="raster", sampling=size.sampling)

    def candidate(name: str, decoder: SpeculativeDecoder | DiagonalDecoder) -> Candidate:
        def run() -> Tensor:
            made = decoder.generate(prompts, frames=1, uncond=uncond)
            for _ in made:
                pass
            return made.codes

        first = run()

        def check(out: object) -> None:
            assert torch.equal(out, first), "an image differs from the same one before"
            assert out.min() >= 0, "a token was not drawn"
            assert out.max() < target.codes, "a token is none of the codes"

        return Candidate(name, run, check, peer=decoder is raster)

    made = ours.generate(prompts, frames=1, uncond=uncond)
    for _ in made:
        pass
    counts = made.counts
    if not method.interval:
        found = counts.tokens / counts.passes
        # trees end with the image
        assert abs(found - method.tokens) < 0.15, f"{found:.2f} tokens a pass, not {method.tokens}"
    passes = raster.passes(1, size.condition)
    return Case(
        op="token image",
        shape=(
            f"{size.name} {size.side}x{size.side} {method.name} passes={counts.passes} "
            f"raster={passes} tokens_per_pass={counts.tokens / counts.passes:.2f}"
        ),
        dtype=str(target.norm.dtype).removeprefix("torch."),
        candidates=[candidate(method.name, ours), candidate("raster order", raster)],
        wall=True,
    )


def _rest(bench: Bench, size: Size) -> Case:
    """Return a step of drafting and verification, and what of it is no model's pass."""
    target, drafter = _models(bench, size)
    decoder = _decoder(bench, size, METHODS[1], target, drafter)
    prompts = target.captions(torch.randn(1, size.condition, size.features, device=bench.device))
    made = decoder.generate(prompts, frames=1, uncond=target.uncond(prompts))
    for _ in range(3):
        made.step()
    sampling, width, device = size.sampling, size.top_k, bench.device
    dtype = target.norm.dtype

    def logits(rows: int) -> tuple[Tensor, Tensor]:
        both = torch.randn(2, 1, rows, target.codes, device=device, dtype=dtype)
        return both[0], both[1]

    first, later, nodes = logits(1), logits(width), logits(size.nodes)
    root = torch.zeros(1, dtype=torch.int64, device=device)
    keys = {
        "seeds": root, "sequences": root, "positions": root, "guidance": sampling.guidance,
        "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
        "depth": size.depth,
    }  # fmt: skip
    cache = target.new_cache(2, size.condition + size.side**2, scratch=size.nodes)
    lengths = torch.full((2,), size.condition, dtype=torch.int32, device=device)
    rule = decoder.verification._rule

    def parts() -> Tensor:
        scores, parents, begin = None, torch.full((1, width), -1, device=device).int(), 0
        levels = []
        for level in range(size.depth):
            with_prompt, without = first if level == 0 else later
            tokens, totals, beams = expand_tree(
                with_prompt, scores, top_k=width, uncond=without, guidance=sampling.guidance
            )
            levels.append((tokens, totals, parents))
            scores = totals.gather(1, beams.long())
            parents = (beams + begin).repeat_interleave(width, 1)
            begin += tokens.shape[1]
        tokens, totals, links = (torch.cat(part, 1) for part in zip(*levels, strict=True))
        tree = build_tree(root, tokens, totals, links, size=size.nodes)
        verified = rule(tree, nodes[0], uncond=nodes[1], **keys)
        lengths.fill_(size.condition)
        compact_(cache.k, cache.v, lengths, verified.path.repeat(2, 1))
        return verified.counts

    run: Callable[[], object] = parts
    if device.type == "cuda":
        recorder = Recorder()
        recorder.warm_up(parts, device)
        out, replay = recorder.record(parts, device)

        def run() -> object:
            replay()
            return out

    def right(out: object) -> None:
        assert 1 <= int(out) <= size.depth + 1, "a path has as many nodes as a tree has levels"

    state = made._trees
    places = [part.clone() for part in (state.known, state.lengths, state._drafted)]

    def step() -> Tensor:
        # the same step each time
        for part, was in zip((state.known, state.lengths, state._drafted), places, strict=True):
            part.copy_(was)
        room = state.pair_room if decoder.graphs else int(places[0] - places[2])
        state.run("draft", max(room, 1), int(made._known[0]))
        state.run("target", 0, int(made._known[0]))
        return state.known

    def further(out: object) -> None:
        assert int(out) > int(places[0]), "a step commits a token"

    return Case(
        op="speculative step",
        shape=f"{size.name} nodes={size.nodes} levels={size.depth} beams={width} B=1",
        dtype=str(dtype).removeprefix("torch."),
        candidates=[
            Candidate("trees, verification, compaction", run, right),
            Candidate("a step", step, further, peer=True),
        ],
        wall=True,
    )


if __name__ == "__main__":
    sys.exit(main("bench_speculate", plans, sys.argv[1:]))
