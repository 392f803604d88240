"""The cache ops at the sizes of Wan 1.3B and 14B, against torch's indexing and clone-and-roll.

Clone-and-roll is what Self-Forcing and LongLive do once the window is full: shift what is kept to
the left through a clone, layer by layer, and write the block at the end. GB/s are of the bytes that
the op must read and write; a peer that moves more is charged in time, not credited in bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.harness import Bench, Candidate, Case, Plan, Unavailable, main
from sdvg_kernels import commit_, compact_, implementations, rollback_, select_, stage_

FRAME = 1560
BLOCK = 3 * FRAME
# what Wan's VAE decoder keeps of 480 x 832 between two blocks: (count, channels, height, width),
# two frames each
VAE_FEATURES = (
    (1, 16, 60, 104),
    (11, 384, 60, 104),
    (6, 384, 120, 208),
    (1, 192, 120, 208),
    (6, 192, 240, 416),
    (7, 96, 480, 832),
)


class Size(NamedTuple):
    """A model's KV cache; all counts in tokens."""

    name: str
    layers: int
    heads: int
    block: int = BLOCK
    slots: int = 7 * BLOCK
    sink: int = BLOCK
    dim: int = 128

    def __str__(self) -> str:
        text = f"{self.name} layers={self.layers} B=1 T={self.block} S={self.slots}"
        return f"{text} sink={self.sink} H={self.heads} D={self.dim}"


class Ring:
    """One model's cache in a state where the next block wraps around the end of the ring.

    `expected_k`, `expected_v` are what the op under test must leave.
    """

    def __init__(self, size: Size, device: torch.device, copies: int) -> None:
        self.size = size
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        shape = (size.layers, 1, size.slots, size.heads, size.dim)
        block = (*shape[:2], size.block, *shape[3:])
        _require_memory(device, dtype, 2 * copies * _numel(shape) + 4 * _numel(block))
        self.k, self.v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
        self.key, self.value = (torch.randn(block, dtype=dtype, device=device) for _ in range(2))
        ring = size.slots - size.sink
        # two turns of the ring, and a third of a block short of its end
        self.length = size.sink + 3 * ring - size.block // 3
        self.lengths = torch.full((1,), self.length, dtype=torch.int32, device=device)
        self.slots = self.slots_of(self.length, self.length + size.block)
        self.expected_k, self.expected_v = self.k.clone(), self.v.clone()

    def slots_of(self, start: int, stop: int) -> torch.Tensor:
        """Return the slots of the logical tokens [start, stop), none of them in the sink."""
        size = self.size
        tokens = torch.arange(start, stop, device=self.k.device)
        return size.sink + (tokens - size.sink) % (size.slots - size.sink)

    def put(self, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write rows into the cache."""
        self.k.index_copy_(2, slots, key)
        self.v.index_copy_(2, slots, value)

    def expect(self, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write rows into what is expected."""
        self.expected_k.index_copy_(2, slots, key)
        self.expected_v.index_copy_(2, slots, value)

    def poison(self) -> None:
        """Fill the block's slots with NaN, and go back to the first length."""
        for cache in (self.k, self.v):
            cache.index_fill_(2, self.slots, torch.nan)
        self.lengths.fill_(self.length)

    def check(self, _: object = None) -> None:
        """Raise AssertionError unless every row of every layer is what is expected, bit for bit."""
        for name, got, want in (("K", self.k, self.expected_k), ("V", self.v, self.expected_v)):
            for layer in range(self.size.layers):
                assert torch.equal(got[layer], want[layer]), (
                    f"{name} of layer {layer} is not as expected"
                )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's K and V."""
        return 2 * self.key.numel() * self.key.element_size()


def plans(bench: Bench) -> Iterator[Plan]:
    """Yield the cases."""
    if bench.device.type == "cpu":
        sizes = [Size("tiny", 2, 2, block=6, slots=26, sink=2, dim=8)]
    else:
        sizes = [Size("1.3B", 30, 12), Size("14B", 40, 40), Size("one layer of 1.3B", 1, 12)]
    yield Plan("commit_", partial(_commit, bench))
    # a small cache: none of it is read
    nothing = Size("40 layers", 40, 12, block=6, slots=26, sink=2, dim=8)
    yield Plan("rollback_ of nothing", partial(_rollback, bench, nothing, accepted=True))
    for size in sizes:
        for op in (_stage, _stage_undo, _rollback, _compact):
            yield Plan(f"{op.__name__.strip('_')} {size}", partial(op, bench, size))
    yield Plan("select_", partial(_select, bench))


def _stage(bench: Bench, size: Size) -> Case:
    ring = Ring(size, bench.device, copies=3)
    ring.expect(ring.slots, ring.key, ring.value)

    def run(name: str) -> None:
        stage_(
            ring.k, ring.v, ring.key, ring.value, ring.lengths, sink=size.sink, implementation=name
        )

    copy = Candidate(
        "index_copy_",
        lambda: ring.put(ring.slots, ring.key, ring.value),
        ring.check,
        peer=True,
        reset=ring.poison,
    )
    peers = [copy, _clone_and_roll(ring)]
    return _case(
        bench, "stage_", str(size), run, ring.check, ring.poison, peers, 2 * ring.block_bytes
    )


def _clone_and_roll(ring: Ring) -> Candidate:
    """Return the peer that keeps its tokens in logical order: [sink | the newest S - sink]."""
    size, block = ring.size, ring.size.block
    rolled_k, rolled_v = torch.empty_like(ring.k), torch.empty_like(ring.v)
    end = ring.length + block
    # logical order, after the block was written
    order = ring.slots_of(end - (size.slots - size.sink), end)
    pairs = ((rolled_k, ring.expected_k, ring.key), (rolled_v, ring.expected_v, ring.value))

    def reset() -> None:
        for rolled, expected, _ in pairs:
            rolled.fill_(torch.nan)
            for layer in range(size.layers):
                rolled[layer, :, : size.sink] = expected[layer, :, : size.sink]
                kept = expected[layer].index_select(1, order[:-block])
                rolled[layer, :, size.sink + block :] = kept

    def run() -> None:
        for layer in range(size.layers):
            for rolled, _, new in pairs:
                cache = rolled[layer]
                cache[:, size.sink : -block] = cache[:, size.sink + block :].clone()
                cache[:, -block:] = new[layer]

    def check(_: object) -> None:
        for rolled, expected, _ in pairs:
            for layer in range(size.layers):
                kept = torch.equal(rolled[layer, :, : size.sink], expected[layer, :, : size.sink])
                new = torch.equal(
                    rolled[layer, :, size.sink :], expected[layer].index_select(1, order)
                )
                assert kept, f"the sink of layer {layer} is not as expected"
                assert new, f"layer {layer} is not as expected"

    return Candidate("clone-and-roll", run, check, peer=True, reset=reset)


def _stage_undo(bench: Bench, size: Size) -> Case:
    ring = Ring(size, bench.device, copies=2)
    old_k, old_v = (cache.index_select(2, ring.slots) for cache in (ring.k, ring.v))
    ring.expect(ring.slots, ring.key, ring.value)
    undo_k, undo_v = torch.empty_like(old_k), torch.empty_like(old_v)

    def reset() -> None:
        ring.put(ring.slots, old_k, old_v)
        undo_k.fill_(torch.nan)
        undo_v.fill_(torch.nan)

    def check(_: object) -> None:
        ring.check()
        assert torch.equal(undo_k, old_k), "undo_k is not what K was"
        assert torch.equal(undo_v, old_v), "undo_v is not what V was"

    def run(name: str) -> None:
        stage_(
            ring.k,
            ring.v,
            ring.key,
            ring.value,
            ring.lengths,
            sink=size.sink,
            undo=(undo_k, undo_v),
            implementation=name,
        )

    def copy() -> None:
        torch.index_select(ring.k, 2, ring.slots, out=undo_k)
        torch.index_select(ring.v, 2, ring.slots, out=undo_v)
        ring.put(ring.slots, ring.key, ring.value)

    peer = Candidate("index_select + index_copy_", copy, check, peer=True, reset=reset)
    moved = 4 * ring.block_bytes
    return _case(bench, "stage_ with undo", str(size), run, check, reset, [peer], moved)


def _rollback(bench: Bench, size: Size, accepted: bool = False) -> Case:
    """Return the case of a rejected block; of an accepted one, where nothing must move."""
    ring = Ring(size, bench.device, copies=2)
    undo = tuple(cache.index_select(2, ring.slots) for cache in (ring.k, ring.v))
    accept = torch.full((1,), accepted, device=bench.device)

    def run(name: str) -> None:
        rollback_(ring.k, ring.v, ring.lengths, accept, undo, sink=size.sink, implementation=name)

    def restore() -> None:
        ring.k.copy_(ring.expected_k)
        ring.v.copy_(ring.expected_v)

    if accepted:
        # restoring anything would undo what was decided
        undo = tuple(torch.full_like(rows, torch.nan) for rows in undo)
        name = "rollback_ of nothing"
        return _case(bench, name, str(size), run, ring.check, lambda: None, [], None)
    peers = [
        Candidate(name, work, ring.check, peer=True, reset=ring.poison)
        for name, work in (
            # told by the host that the block was rejected
            ("index_copy_", lambda: ring.put(ring.slots, *undo)),
            ("copy of a cloned cache", restore),
        )
    ]
    moved = 2 * ring.block_bytes
    return _case(bench, "rollback_", str(size), run, ring.check, ring.poison, peers, moved)


def _compact(bench: Bench, size: Size) -> Case:
    ring = Ring(size, bench.device, copies=2)
    # every second token of the block was accepted
    path = torch.arange(0, size.block, 2, dtype=torch.int32, device=bench.device)[None]
    source, target = ring.slots[path[0].long()], ring.slots[: path.shape[1]]
    ring.expect(ring.slots, ring.key, ring.value)
    ring.expect(target, ring.key[:, :, path[0].long()], ring.value[:, :, path[0].long()])

    def reset() -> None:
        ring.put(ring.slots, ring.key, ring.value)
        ring.lengths.fill_(ring.length)

    def check(_: object) -> None:
        ring.check()
        assert int(ring.lengths[0]) == ring.length + path.shape[1], "lengths are not as expected"

    def run(name: str) -> None:
        compact_(ring.k, ring.v, ring.lengths, path, sink=size.sink, implementation=name)

    def move() -> None:
        rows = [cache.index_select(2, source) for cache in (ring.k, ring.v)]
        ring.put(target, *rows)
        ring.lengths.add_(path.shape[1])

    peer = Candidate("index_select + index_copy_", move, check, peer=True, reset=reset)
    shape = f"{size} path={path.shape[1]}"
    # the first row of the path stays where it is, but nobody knows before reading the path
    return _case(bench, "compact_", shape, run, check, reset, [peer], ring.block_bytes)


def _commit(bench: Bench) -> Case:
    lengths = torch.empty(64, dtype=torch.int32, device=bench.device)
    accept = torch.rand(64, device=bench.device) < 0.5
    start = torch.randint(0, 1 << 20, (64,), dtype=torch.int32, device=bench.device)

    def reset() -> None:
        lengths.copy_(start)

    def check(_: object) -> None:
        assert torch.equal(lengths, start + BLOCK * accept.int()), "lengths are not as expected"

    def run(name: str) -> None:
        commit_(lengths, accept, BLOCK, implementation=name)

    def add() -> None:
        lengths.add_(accept, alpha=BLOCK)

    peer = Candidate("add_", add, check, peer=True, reset=reset)
    return _case(bench, "commit_", "B=64", run, check, reset, [peer], None, "int32")


def _select(bench: Bench) -> Case:
    device = bench.device
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    scale = 60 if device.type == "cpu" else 1
    shapes = [
        (2, channels, 2, height // scale, width // scale)
        for count, channels, height, width in VAE_FEATURES
        for _ in range(count)
    ]
    _require_memory(device, dtype, 3 * sum(map(_numel, shapes)))
    before, other, draft = (
        [torch.randn(shape, dtype=dtype, device=device) for shape in shapes] for _ in range(3)
    )
    accept = torch.tensor([True, False], device=device)
    rejected = torch.tensor([1], device=device)

    def reset() -> None:
        for kept, old in zip(draft, before, strict=True):
            kept.copy_(old)

    def check(out: object) -> None:
        for got, old, new in zip(draft if out is None else out, before, other, strict=True):
            assert torch.equal(got[0], old[0]), "an accepted row was changed"
            assert torch.equal(got[1], new[1]), "a rejected row was not taken from the other"

    def run(name: str) -> None:
        select_(accept, draft, other, implementation=name)

    def where() -> list[torch.Tensor]:
        kept = accept.view(2, 1, 1, 1, 1)
        return [torch.where(kept, a, b) for a, b in zip(draft, other, strict=True)]

    def copy() -> None:
        for kept, new in zip(draft, other, strict=True):
            kept.index_copy_(0, rejected, new[1:])

    peers = [
        Candidate(name, work, check, peer=True, reset=reset)
        # the second is told by the host which sequence was rejected
        for name, work in (("where", where), ("index_copy_", copy))
    ]
    moved = sum(tensor[1].numel() * tensor.element_size() for tensor in draft) * 2
    shape = f"Wan VAE features, {len(draft)} tensors, B=2, one accepted"
    return _case(bench, "select_", shape, run, check, reset, peers, moved)


def _case(
    bench: Bench,
    op: str,
    shape: str,
    run: Callable[[str], None],
    check: Callable[[object], None],
    reset: Callable[[], None],
    peers: list[Candidate],
    moved: int | None,
    dtype: str = "",
) -> Case:
    """Return the case with ours for the device; on a GPU the reference is a peer."""
    available = implementations()["cache"]
    on_cpu = bench.device.type == "cpu"
    names = ["reference"] if on_cpu else [name for name, reason in available.items() if not reason]
    ours = [
        Candidate(
            name, partial(run, name), check, peer=name == "reference" and not on_cpu, reset=reset
        )
        for name in names
    ]
    return Case(
        op=op,
        shape=shape,
        dtype=dtype or ("float32" if on_cpu else "bfloat16"),
        candidates=[*ours, *peers],
        bytes=moved,
        left_out={} if on_cpu else {name: reason for name, reason in available.items() if reason},
    )


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _require_memory(device: torch.device, dtype: torch.dtype, elements: int) -> None:
    if device.type != "cuda":
        return
    free, needed = torch.cuda.mem_get_info(device)[0], elements * dtype.itemsize
    # a tenth for what is made on the way
    if 1.1 * needed > free:
        raise Unavailable(
            f"needs {1.1 * needed / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} GB are free"
        )


if __name__ == "__main__":
    sys.exit(main("bench_cache", plans, sys.argv[1:]))
