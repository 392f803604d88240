"""`sample_tokens` on the logits of a pass of token models, against PyTorch's own ops.

The peer is what image and video models do in eager PyTorch (gpt-fast, LlamaGen, MineWorld): top-k
by `topk`, top-p by a sort, an exponential race, all captured in one CUDA graph. Its noise has no
key, so that its tokens are only checked to be among those that stay. GB/s are of the logits, once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.harness import Bench, Candidate, Case, Plan, main
from sdvg_kernels import implementations, sample_tokens
from sdvg_kernels.sampling import reference


class Size(NamedTuple):
    """Rows of one launch, and how they are sampled."""

    rows: int
    vocabulary: int
    top_k: int | None = None
    top_p: float = 1.0
    guidance: float = 1.0
    temperature: float = 1.0

    def __str__(self) -> str:
        text = f"N={self.rows} V={self.vocabulary}"
        if self.guidance != 1:
            text += f" guidance={self.guidance:g}"
        if self.temperature == 0:
            return f"{text} greedy"
        if self.top_k is not None:
            text += f" top_k={self.top_k}"
        return text + (f" top_p={self.top_p:g}" if self.top_p < 1 else "")


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases."""
    if bench.device.type == "cpu":
        sizes = [Size(3, 300, top_k=20, top_p=0.9, guidance=2.0)]
    else:
        sizes = [
            # MineWorld's widest pass, LlamaGen's with guidance, Cosmos' widest
            Size(14, 8192, top_p=0.8),
            Size(32, 16384, top_k=2000, guidance=7.5),
            Size(64, 64000),
            Size(64, 64000, top_p=0.8),
        ]
        if not bench.quick:
            sizes += [Size(1, 8192, top_p=0.8), Size(14, 8192, temperature=0.0)]
    for size in sizes:
        yield Plan(f"sample_tokens {size}", partial(_case, bench, size))


def _case(bench: Bench, size: Size) -> Case:
    device, dtype = bench.device, torch.float32 if bench.device.type == "cpu" else torch.bfloat16
    shape = (size.rows, size.vocabulary)
    logits = (3 * torch.randn(shape, device=device)).to(dtype)
    uncond = None
    if size.guidance != 1:
        uncond = (3 * torch.randn(shape, device=device)).to(dtype)
    keys = {
        "seeds": torch.full((size.rows,), 5, device=device),
        "sequences": torch.zeros(size.rows, dtype=torch.int64, device=device),
        "positions": torch.arange(size.rows, device=device),
    }
    # scores in float64, of the same noise; -inf for what is left out
    guided = reference.guided(logits.cpu(), None if uncond is None else uncond.cpu(), size.guidance)
    if size.temperature == 0:
        stays = scores = guided.double()
    else:
        top_k = 0 if size.top_k is None else size.top_k
        stays = reference.warped(guided, size.temperature, top_k, size.top_p)
        noise = reference.exponential(*(key.cpu() for key in keys.values()), size.vocabulary)
        scores = stays - noise.log()

    def check(out: object) -> None:
        chosen = scores.gather(1, out.cpu()[:, None])[:, 0]
        short = (scores.amax(1) - chosen).max().item()
        assert short < 1e-3, f"a token is {short:.3g} short of the best score"

    def among(out: object) -> None:
        assert stays.gather(1, out.cpu()[:, None]).isfinite().all(), "a token that is left out"

    on_cpu = device.type == "cpu"
    available = implementations()["sampling"]
    names = ["reference"] if on_cpu else [name for name, reason in available.items() if not reason]
    options = {"uncond": uncond, **size._asdict()}
    del options["rows"], options["vocabulary"]
    ours = [
        Candidate(
            name,
            partial(sample_tokens, logits, **keys, **options, implementation=name),
            check,
            peer=name == "reference" and not on_cpu,
        )
        for name in names
    ]
    eager = Candidate("eager", partial(_eager, logits, uncond, size), among, peer=True)
    return Case(
        op="sample_tokens",
        shape=str(size),
        dtype=str(dtype).removeprefix("torch."),
        candidates=[*ours, eager],
        bytes=logits.numel() * logits.element_size() * (1 if uncond is None else 2),
        left_out={} if on_cpu else {name: reason for name, reason in available.items() if reason},
    )


def _eager(logits: torch.Tensor, uncond: torch.Tensor | None, size: Size) -> torch.Tensor:
    """Sample as eager PyTorch does."""
    x = logits.float()
    if uncond is not None:
        x = uncond.float() + size.guidance * (x - uncond.float())
    if size.temperature == 0:
        return x.argmax(1)
    x = x / size.temperature
    if size.top_k is not None:
        x = x.masked_fill(x < x.topk(size.top_k, 1).values[:, -1:], -torch.inf)
    if size.top_p < 1:
        ordered, index = x.sort(1, descending=True)
        chances = ordered.softmax(1)
        # the mass of those before
        ordered = ordered.masked_fill(chances.cumsum(1) - chances >= size.top_p, -torch.inf)
        x = torch.empty_like(x).scatter_(1, index, ordered)
    chances = x.softmax(1)
    return (chances / torch.empty_like(chances).exponential_()).argmax(1)


if __name__ == "__main__":
    sys.exit(main("bench_sampling", plans, sys.argv[1:]))
