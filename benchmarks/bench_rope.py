"""The rope ops at the sizes of Wan 1.3B, 5B and 14B, against the chains that pipelines run.

The eager chains normalise, rotate and write the cache op by op: Self-Forcing's in complex128 with
clone-and-roll, diffusers' in float32 with the rows copied into the ring; the second also compiled.
GB/s are of the bytes that the op must read and write: query, key and value, once each way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.harness import Bench, Candidate, Case, Plan, Unavailable, main
from benchmarks.peers import complex_rope, float_rope, rms_norm
from sdvg_kernels import implementations, norm_rope, norm_rope_stage_, rope_table
from sdvg_kernels.testing import assert_within_budget

E4M3 = torch.float8_e4m3fn


class Size(NamedTuple):
    """A model's layer and the block that it is given; `frames` and `ring` in frames."""

    name: str
    heads: int
    batch: int = 1
    frames: int = 3
    height: int = 30
    width: int = 52
    ring: int = 18
    dim: int = 128

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the block."""
        return self.frames, self.height, self.width

    @property
    def frame(self) -> int:
        """Tokens of a frame."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Tokens of the block."""
        return self.frames * self.frame

    @property
    def sink(self) -> int:
        """Tokens of the sink, three frames."""
        return 3 * self.frame

    @property
    def slots(self) -> int:
        """Tokens that the cache holds."""
        return self.sink + self.ring * self.frame

    def __str__(self) -> str:
        text = f"{self.name} B={self.batch} T={self.tokens} S={self.slots} sink={self.sink}"
        return f"{text} H={self.heads} D={self.dim}"


class Layer:
    """One layer's projections and its ring cache, where the next block wraps around the end.

    `exact` and `plain` are (query, key): in float64, and as a chain of PyTorch ops gives them.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size = size
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        batch, heads, dim = size.batch, size.heads, size.dim
        shape = (batch, size.slots, heads, dim)
        block = batch * size.tokens * heads * dim
        # caches of ours and of a peer that shifts them, and float64 copies of the block
        _require_memory(device, 8 * torch.Size(shape).numel() * 2 + 80 * block)
        fused = torch.randn(batch, size.tokens, 3, heads, dim, dtype=self.dtype, device=device)
        self.query, self.key, self.value = fused.unbind(2)
        self.weights = [torch.randn(heads * dim, dtype=self.dtype, device=device) for _ in range(2)]
        self.k, self.v = (torch.randn(shape, dtype=self.dtype, device=device) for _ in range(2))
        # two turns of the ring, and a frame short of its end
        self.start = 3 + 3 * size.ring - 1
        self.lengths = torch.full((batch,), self.start * size.frame, device=device).int()
        self.table = rope_table(1024, dim, device=device)
        places = torch.arange(size.tokens, device=device) + self.start * size.frame - size.sink
        self.slots = size.sink + places % (size.ring * size.frame)
        self.before_k, self.before_v = self.k.clone(), self.v.clone()
        self.exact = norm_rope(
            self.query.double(),
            self.key.double(),
            rope_table(1024, dim, dtype=torch.float64, device=device),
            size.grid,
            query_weight=self.weights[0].double(),
            key_weight=self.weights[1].double(),
            start_frame=self.start,
            implementation="reference",
        )
        self.plain = self.rotate(partial(float_rope, table=self.table))

    def rotate(
        self, rope: Callable[[torch.Tensor, tuple[int, int, int], int], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (query, key), normed and rotated by `rope`."""
        query, key = (
            rope(rms_norm(x, weight), self.size.grid, self.start)
            for x, weight in zip((self.query, self.key), self.weights, strict=True)
        )
        return query, key

    def poison(self) -> None:
        """Fill the block's slots with NaN."""
        for cache in (self.k, self.v):
            cache.index_fill_(1, self.slots, torch.nan)

    def check_rows(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """Raise AssertionError unless both are within the error budget."""
        assert_within_budget(query, self.plain[0], self.exact[0], "query")
        assert_within_budget(key, self.plain[1], self.exact[1], "key")

    def check(self, query: object) -> None:
        """Raise AssertionError unless the query and the caches are as they must be."""
        self.check_rows(query, self.k.index_select(1, self.slots))
        assert torch.equal(self.v.index_select(1, self.slots), self.value), "V is not the value"
        for cache, before in ((self.k, self.before_k), (self.v, self.before_v)):
            held = cache.index_copy(1, self.slots, before.index_select(1, self.slots))
            assert torch.equal(held, before), "another slot was written"

    @property
    def elements(self) -> int:
        """Values of query, key or value."""
        return self.query.numel()


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases."""
    if bench.device.type == "cpu":
        sizes = [Size("tiny", 2, height=1, width=2, ring=6, dim=64)]
    else:
        sizes = [Size("1.3B", 12), Size("14B", 40), Size("5B", 24)]
        if not bench.quick:
            sizes += [Size("1.3B", 12, frames=1), Size("1.3B", 12, frames=9), Size("14B", 40, 2)]
    for size in sizes:
        yield Plan(f"norm_rope_stage_ {size}", partial(_stage, bench, size))
    for size in sizes[:2]:
        yield Plan(f"norm_rope_stage_ e4m3 {size}", partial(_stage_e4m3, bench, size))
        yield Plan(f"norm_rope {size}", partial(_rotate, bench, size))


def _stage(bench: Bench, size: Size) -> Case:
    layer = Layer(size, bench.device)

    def run(name: str) -> torch.Tensor:
        return norm_rope_stage_(
            layer.query,
            layer.key,
            layer.value,
            layer.k,
            layer.v,
            layer.lengths,
            layer.table,
            size.grid,
            query_weight=layer.weights[0],
            key_weight=layer.weights[1],
            sink=size.sink,
            implementation=name,
        )

    def chain() -> torch.Tensor:
        query, key = layer.rotate(partial(float_rope, table=layer.table))
        layer.k.index_copy_(1, layer.slots, key)
        layer.v.index_copy_(1, layer.slots, layer.value)
        return query

    peers = [
        _clone_and_roll(layer),
        Candidate("eager float32, index_copy_", chain, layer.check, peer=True, reset=layer.poison),
    ]
    if bench.device.type == "cuda":
        torch._dynamo.reset()
        compiled = torch.compile(chain, dynamic=False)
        name = "compiled float32, index_copy_"
        peers.append(Candidate(name, compiled, layer.check, peer=True, reset=layer.poison))
    moved = 6 * layer.elements * layer.dtype.itemsize
    return _case(bench, "norm_rope_stage_", size, layer, run, layer.check, peers, moved)


def _clone_and_roll(layer: Layer) -> Candidate:
    """Return Self-Forcing's chain, whose cache is in logical order: [sink | the newest tokens]."""
    size, block = layer.size, layer.size.tokens
    order = torch.arange(-size.ring * size.frame, 0, device=layer.k.device)
    order = size.sink + (order + layer.start * size.frame - size.sink) % len(order)
    caches = [torch.empty_like(layer.k) for _ in range(2)]
    shifted = [
        torch.cat([before[:, : size.sink], before.index_select(1, order)], 1)
        for before in (layer.before_k, layer.before_v)
    ]

    def reset() -> None:
        for cache, before in zip(caches, shifted, strict=True):
            cache.copy_(before)

    def run() -> torch.Tensor:
        query, key = layer.rotate(complex_rope)
        for cache, rows in zip(caches, (key, layer.value), strict=True):
            cache[:, size.sink : -block] = cache[:, size.sink + block :].clone()
            cache[:, -block:] = rows
        return query

    def check(query: object) -> None:
        layer.check_rows(query, caches[0][:, -block:])
        assert torch.equal(caches[1][:, -block:], layer.value), "V is not the value"
        for cache, before in zip(caches, shifted, strict=True):
            kept = torch.cat([before[:, : size.sink], before[:, size.sink + block :]], 1)
            assert torch.equal(cache[:, :-block], kept), "what is kept was not shifted"

    return Candidate("eager complex128, clone-and-roll", run, check, peer=True, reset=reset)


def _stage_e4m3(bench: Bench, size: Size) -> Case:
    layer = Layer(size, bench.device)
    caches = [torch.empty(layer.k.shape, dtype=E4M3, device=bench.device) for _ in range(2)]
    scales = [torch.empty(layer.k.shape[:3], device=bench.device) for _ in range(2)]

    def run(name: str) -> torch.Tensor:
        return norm_rope_stage_(
            layer.query,
            layer.key,
            layer.value,
            *caches,
            layer.lengths,
            layer.table,
            size.grid,
            query_weight=layer.weights[0],
            key_weight=layer.weights[1],
            sink=size.sink,
            k_scale=scales[0],
            v_scale=scales[1],
            implementation=name,
        )

    def chain() -> torch.Tensor:
        query, key = layer.rotate(partial(float_rope, table=layer.table))
        for cache, scale, rows in zip(caches, scales, (key, layer.value), strict=True):
            factor = rows.abs().amax(-1, keepdim=True).float() / 448
            # a row's bytes: torch has no index_copy_ of e4m3
            written = (rows / factor).to(E4M3).view(torch.uint8)
            cache.view(torch.uint8).index_copy_(1, layer.slots, written)
            scale.index_copy_(1, layer.slots, factor[..., 0])
        return query

    def reset() -> None:
        for cache, scale in zip(caches, scales, strict=True):
            cache.view(torch.uint8).fill_(0x7F)
            scale.fill_(torch.nan)

    def check(query: object) -> None:
        assert_within_budget(query, layer.plain[0], layer.exact[0], "query")
        for name, cache, scale, exact in zip(
            "KV", caches, scales, (layer.exact[1], layer.value.double()), strict=True
        ):
            factor = scale.index_select(1, layer.slots).double()[..., None]
            held = cache.view(torch.uint8).index_select(1, layer.slots).view(E4M3).double()
            # half a step of the largest binade, 256 to 448, and the rounding of a peer's key
            allowed = 16 * factor + exact.abs() * torch.finfo(layer.dtype).eps * 2
            assert ((held * factor - exact).abs() <= allowed).all(), f"{name} is not within a step"
            largest = exact.abs().amax(-1, keepdim=True) / 448
            assert ((factor - largest).abs() <= 0.01 * largest).all(), f"{name}: another scale"

    name = "eager float32, index_copy_"
    peers = [Candidate(name, chain, check, peer=True, reset=reset)]
    scale_bytes = sum(4 * layer.elements // size.dim for _ in scales)
    moved = layer.elements * (4 * layer.dtype.itemsize + 2) + scale_bytes
    case = _case(bench, "norm_rope_stage_", size, layer, run, check, peers, moved, reset)
    return replace(case, dtype=f"{case.dtype}, e4m3 cache")


def _rotate(bench: Bench, size: Size) -> Case:
    layer = Layer(size, bench.device)

    def run(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return norm_rope(
            layer.query,
            layer.key,
            layer.table,
            size.grid,
            query_weight=layer.weights[0],
            key_weight=layer.weights[1],
            start_frame=layer.start,
            implementation=name,
        )

    def check(rotated: object) -> None:
        layer.check_rows(*rotated)

    chains = {
        "eager complex128": complex_rope,
        "eager float32": partial(float_rope, table=layer.table),
    }
    peers = [
        Candidate(name, partial(layer.rotate, rope), check, peer=True)
        for name, rope in chains.items()
    ]
    moved = 4 * layer.elements * layer.dtype.itemsize
    return _case(bench, "norm_rope", size, layer, run, check, peers, moved)


def _case(
    bench: Bench,
    op: str,
    size: Size,
    layer: Layer,
    run: Callable[[str], object],
    check: Callable[[object], None],
    peers: list[Candidate],
    moved: int,
    reset: Callable[[], None] | None = None,
) -> Case:
    """Return the case with ours for the device; on a GPU the reference is a peer."""
    available = implementations()["rope"]
    on_cpu = bench.device.type == "cpu"
    names = ["reference"] if on_cpu else [name for name, reason in available.items() if not reason]
    ours = [
        Candidate(
            name,
            partial(run, name),
            check,
            peer=name == "reference" and not on_cpu,
            reset=reset or layer.poison,
        )
        for name in names
    ]
    return Case(
        op=op,
        shape=str(size),
        dtype=str(layer.dtype).removeprefix("torch."),
        candidates=[*ours, *peers],
        bytes=moved,
        left_out={} if on_cpu else {name: reason for name, reason in available.items() if reason},
    )


def _require_memory(device: torch.device, needed: int) -> None:
    if device.type == "cuda" and needed > (free := torch.cuda.mem_get_info(device)[0]):
        raise Unavailable(
            f"needs {needed / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free"
        )


if __name__ == "__main__":
    sys.exit(main("bench_rope", plans, sys.argv[1:]))
