"""The cache ops against plain loops over tokens, in every lane that the machine has."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

import sdvg_kernels
from sdvg_kernels.testing import host_lane_missing, host_lane_order


class Lane(NamedTuple):
    implementation: str
    device: str


class Case(NamedTuple):
    layers: int
    batch: int
    slots: int
    sink: int
    tokens: int
    heads: int
    width: int
    dtype: torch.dtype


CASES = [
    # the smallest there is
    Case(1, 1, 1, 0, 1, 1, 1, torch.uint8),
    # vectors of 1, 2, 4, 8 and 16 bytes
    Case(5, 2, 9, 4, 5, 1, 3, torch.int8),
    Case(3, 2, 13, 2, 5, 3, 7, torch.bfloat16),
    Case(2, 3, 11, 1, 4, 3, 5, torch.float32),
    Case(2, 2, 12, 5, 7, 3, 1, torch.float64),
    Case(2, 2, 24, 3, 9, 2, 64, torch.float16),
    # the whole ring at once
    Case(2, 3, 16, 0, 16, 2, 8, torch.float8_e4m3fn),
    # rows over several tiles of several blocks
    Case(1, 2, 40, 8, 32, 12, 128, torch.bfloat16),
    # more layers than one launch holds
    Case(130, 1, 3, 1, 2, 1, 2, torch.int16),
    # one component, in the widest dtype
    Case(1, 2, 6, 0, 3, 1, 1, torch.complex128),
]
ORDERS = {"host": 0, "host-backward": 1, "host-shuffled": 2}


GPU_LANES = {"cuda": "cuda", "reference-cuda": "reference"}


@pytest.fixture(
    params=["reference", *ORDERS, *(pytest.param(n, marks=pytest.mark.gpu) for n in GPU_LANES)]
)
def lane(request: pytest.FixtureRequest) -> Iterator[Lane]:
    if request.param in GPU_LANES:
        yield Lane(GPU_LANES[request.param], "cuda")
    elif request.param == "reference":
        yield Lane("reference", "cpu")
    elif host_lane_missing():
        pytest.skip(host_lane_missing())
    else:
        order = ORDERS[request.param]
        with host_lane_order(order if order < 2 else random.randrange(2, 2**32)):
            yield Lane("host", "cpu")


@pytest.fixture(params=CASES, ids=lambda c: "-".join(map(str, c[:-1])) + f"-{c.dtype}"[7:])
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(autouse=True)
def fresh_seed() -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    random.seed(seed)


def noise(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return random bits: NaNs of every payload, infinities, subnormals."""
    item = torch.empty(0, dtype=dtype).element_size()
    bits = torch.randint(0, 256, (*shape[:-1], shape[-1] * item), dtype=torch.uint8)
    return bits.view(dtype).to(device)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(bits(actual), bits(expected))


def slot(token: int, case: Case) -> int:
    ring = case.slots - case.sink
    return token if token < case.sink else case.sink + (token - case.sink) % ring


class World:
    """Random caches and rows of a case, and what a plain loop over tokens makes of them."""

    def __init__(self, case: Case, lane: Lane, some: bool = False) -> None:
        self.case, self.lane = case, lane
        layers, batch, slots, _, tokens, heads, width, dtype = case
        cache, row = (layers, batch, slots, heads, width), (heads, width)
        self.k = noise(*cache, dtype=dtype, device=lane.device)
        self.v = noise(*cache, dtype=dtype, device=lane.device)
        self.sequences = list(range(batch))
        self.batch_idx = None
        if some:
            # fewer than there are where there are several, in any order
            self.sequences = random.sample(range(batch), max(1, batch - 1))
            index = random.choice([torch.int32, torch.int64])
            self.batch_idx = torch.tensor(self.sequences, dtype=index, device=lane.device)
        rows = (layers, len(self.sequences), tokens, *row)
        self.key = noise(*rows, dtype=dtype, device=lane.device)
        self.value = noise(*rows, dtype=dtype, device=lane.device)
        # inside the sink, across its end, in the ring, and after many rounds
        starts = [random.randrange(2 * slots) for _ in range(batch)]
        starts[random.randrange(batch)] += 1_000_003 * random.randrange(2)
        self.starts = starts
        self.lengths = torch.tensor(starts, dtype=torch.int32, device=lane.device)
        self.undo = (torch.empty_like(self.key), torch.empty_like(self.value))
        self.accept = torch.rand(len(self.sequences)).gt(0.5).to(lane.device)

    def arguments(self) -> dict[str, object]:
        return {
            "sink": self.case.sink,
            "batch_idx": self.batch_idx,
            "implementation": self.lane.implementation,
        }

    def stage(self, undo: bool = True) -> None:
        sdvg_kernels.stage_(
            self.k,
            self.v,
            self.key,
            self.value,
            self.lengths,
            undo=self.undo if undo else None,
            **self.arguments(),
        )

    def slots(self, i: int) -> list[int]:
        start = self.starts[self.sequences[i]]
        return [slot(start + t, self.case) for t in range(self.case.tokens)]


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_stage_writes_the_slots_after_lengths_and_nothing_else(
    case: Case, lane: Lane, some: bool
) -> None:
    world = World(case, lane, some)
    expected_k, expected_v = world.k.clone(), world.v.clone()
    for i, b in enumerate(world.sequences):
        for t, where in enumerate(world.slots(i)):
            expected_k[:, b, where] = world.key[:, i, t]
            expected_v[:, b, where] = world.value[:, i, t]
    lengths = world.lengths.clone()
    world.stage(undo=False)
    assert_same_bits(world.k, expected_k)
    assert_same_bits(world.v, expected_v)
    assert torch.equal(world.lengths, lengths)


def test_undo_holds_the_rows_that_stage_overwrote(case: Case, lane: Lane) -> None:
    world = World(case, lane, some=True)
    before_k, before_v = world.k.clone(), world.v.clone()
    world.stage()
    for i, b in enumerate(world.sequences):
        assert_same_bits(world.undo[0][:, i], before_k[:, b, world.slots(i)])
        assert_same_bits(world.undo[1][:, i], before_v[:, b, world.slots(i)])


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_rollback_restores_bitwise_and_leaves_accepted_sequences_untouched(
    case: Case, lane: Lane, some: bool
) -> None:
    world = World(case, lane, some)
    before = world.k.clone(), world.v.clone()
    world.stage()
    staged = world.k.clone(), world.v.clone()
    sdvg_kernels.rollback_(
        world.k, world.v, world.lengths, world.accept, world.undo, **world.arguments()
    )
    kept = dict(zip(world.sequences, world.accept.tolist(), strict=True))
    for b in range(case.batch):
        for side, cache in enumerate((world.k, world.v)):
            assert_same_bits(cache[:, b], (staged if kept.get(b) else before)[side][:, b])


def test_commit_adds_the_block_to_accepted_sequences_only(lane: Lane) -> None:
    for batch in (1, 3, 600):
        lengths = torch.randint(0, 99, (batch,), dtype=torch.int32, device=lane.device)
        accept = torch.rand(batch, device=lane.device) > 0.5
        expected = lengths + accept * 7
        sdvg_kernels.commit_(lengths, accept, 7, implementation=lane.implementation)
        assert torch.equal(lengths, expected.int())
        order = torch.randperm(batch, device=lane.device)[: (batch + 1) // 2]
        some = accept[order]
        expected[order] += some * 4
        sdvg_kernels.commit_(lengths, some, 4, batch_idx=order, implementation=lane.implementation)
        assert torch.equal(lengths, expected.int())


def paths(case: Case, rows: int) -> torch.Tensor:
    """Return paths of many kinds: nothing, all in place, shifted by one, reversed, random."""
    ring, most = case.slots - case.sink, case.tokens
    kinds = [
        [],
        list(range(most)),
        list(range(1, most + 1)) if most < ring else list(range(1, most)),
        list(reversed(range(most))),
        sorted(random.sample(range(ring), random.randint(1, min(ring, most)))),
        random.sample(range(ring), random.randint(1, min(ring, most))),
    ]
    chosen = [random.choice(kinds) for _ in range(rows)]
    padded = [path + [-1] * (most - len(path)) for path in chosen]
    return torch.tensor(padded, dtype=torch.int32)


@pytest.mark.parametrize("attempt", range(4))
def test_compact_moves_the_path_together_whatever_overlaps(
    case: Case, lane: Lane, attempt: int
) -> None:
    world = World(case, lane, some=attempt % 2 == 1)
    path = paths(case, len(world.sequences))
    expected_k, expected_v = world.k.clone(), world.v.clone()
    lengths = list(world.starts)
    for i, b in enumerate(world.sequences):
        start = world.starts[b]
        valid = [offset for offset in path[i].tolist() if offset >= 0]
        for place, offset in enumerate(valid):
            to, source = slot(start + place, case), slot(start + offset, case)
            expected_k[:, b, to] = world.k[:, b, source]
            expected_v[:, b, to] = world.v[:, b, source]
        lengths[b] += len(valid)
    sdvg_kernels.compact_(
        world.k, world.v, world.lengths, path.to(lane.device), **world.arguments()
    )
    assert_same_bits(world.k, expected_k)
    assert_same_bits(world.v, expected_v)
    assert world.lengths.tolist() == lengths


# one column of 4 bytes; the longest path, whose blocks hold one column of 16 bytes; two columns
@pytest.mark.parametrize(("length", "width"), [(3072, 3), (6336, 8), (1500, 20)])
def test_compact_holds_long_paths_in_shared_memory(lane: Lane, length: int, width: int) -> None:
    case = Case(1, 1, length + 100, 0, length, 1, width, torch.int32)
    world = World(case, lane)
    path = torch.randperm(length + 100, dtype=torch.int32)[None, :length]
    start = world.starts[0]
    source = [slot(start + offset, case) for offset in path[0].tolist()]
    target = [slot(start + i, case) for i in range(length)]
    expected = world.k.clone()
    expected[:, :, target] = world.k[:, :, source]
    sdvg_kernels.compact_(
        world.k, world.v, world.lengths, path.to(lane.device), **world.arguments()
    )
    assert_same_bits(world.k, expected)
    assert world.lengths.tolist() == [start + length]


def test_rollback_without_undo_changes_nothing(lane: Lane) -> None:
    world = World(CASES[2], lane)
    world.stage(undo=False)
    staged = world.k.clone(), world.v.clone(), world.lengths.clone()
    sdvg_kernels.rollback_(world.k, world.v, world.lengths, world.accept, None, **world.arguments())
    for tensor, before in zip((world.k, world.v, world.lengths), staged, strict=True):
        assert_same_bits(tensor, before)


def test_select_takes_the_other_rows_where_not_accepted(lane: Lane) -> None:
    batch = random.randint(1, 4)
    accept = (torch.rand(batch) > 0.5).to(lane.device)
    shapes = [(), (1,), (3,), (2, 5, 7), (4, 1, 16, 16), (1, 0, 3), (3, 33, 40)]
    dtypes = [torch.bfloat16, torch.float32, torch.int8, torch.float64]
    draft, other = [], []
    for n in range(random.choice([1, 7, 150])):
        shape, dtype = random.choice(shapes) or (1,), random.choice(dtypes)
        pair = tuple(noise(batch, *shape, dtype=dtype, device=lane.device) for _ in range(2))
        # every other one a view that is off the alignment and strided along the batch
        if n % 2:
            pair = tuple(
                torch.cat([x, x, x], dim=1)[:, x.shape[1] : -x.shape[1] or None] for x in pair
            )
        draft.append(pair[0]), other.append(pair[1])
    keep = accept.tolist()
    expected = [
        torch.stack([(d if keep[b] else o)[b] for b in range(batch)])
        for d, o in zip(draft, other, strict=True)
    ]
    untouched = [o.clone() for o in other]
    sdvg_kernels.select_(accept, draft, other, implementation=lane.implementation)
    for mine, theirs, want, before in zip(draft, other, expected, untouched, strict=True):
        assert_same_bits(mine, want)
        assert_same_bits(theirs, before)


def test_strided_caches_and_rows_are_written_where_they_lie(lane: Lane) -> None:
    case = Case(3, 2, 12, 2, 5, 3, 10, torch.bfloat16)
    world = World(case, lane)
    layers, batch, slots, _, tokens, heads, width, dtype = case
    # K, V and the sequences interleaved in one buffer with guards; rows of a fused projection
    buffer = noise(layers, slots + 3, batch, 2, heads, width, dtype=dtype, device=lane.device)
    fused = noise(layers, batch, tokens, 3, heads, width, dtype=dtype, device=lane.device)
    expected = buffer.clone()
    for b in range(batch):
        for t, where in enumerate(world.slots(b)):
            expected[:, 1 + where, b] = fused[:, b, t, 1:]
    views = [buffer[:, 1 : 1 + slots, :, side].transpose(1, 2) for side in range(2)]
    before = [view.clone() for view in views]
    sdvg_kernels.stage_(
        *views,
        fused[:, :, :, 1],
        fused[:, :, :, 2],
        world.lengths,
        undo=world.undo,
        **world.arguments(),
    )
    assert_same_bits(buffer, expected)
    nobody = torch.zeros(batch, dtype=torch.bool, device=lane.device)
    sdvg_kernels.rollback_(*views, world.lengths, nobody, world.undo, **world.arguments())
    for view, want in zip(views, before, strict=True):
        assert_same_bits(view, want)


def test_foreign_layers_equal_one_tensor(lane: Lane) -> None:
    case = Case(67, 2, 9, 1, 4, 2, 6, torch.float16)
    world = World(case, lane)
    path = torch.tensor([[1, 2, -1, -1], [3, 0, 1, -1]], dtype=torch.int32, device=lane.device)
    foreign = [[layer.clone() for layer in cache] for cache in (world.k, world.v)]
    tables = [sdvg_kernels.PointerTable(layers) for layers in foreign]
    rows = [list(world.key.unbind(0)), list(world.value.unbind(0))]
    undo = [[torch.empty_like(layer) for layer in side] for side in rows]
    lengths = world.lengths.clone()

    world.stage()
    sdvg_kernels.stage_(*tables, *rows, lengths, undo=undo, **world.arguments())
    accept = torch.tensor([True, False], device=lane.device)
    sdvg_kernels.rollback_(world.k, world.v, world.lengths, accept, world.undo, **world.arguments())
    # a list in place of a table, one stacked tensor in place of a list
    stacked = (torch.stack(undo[0]), torch.stack(undo[1]))
    sdvg_kernels.rollback_(*foreign, lengths, accept, stacked, **world.arguments())
    sdvg_kernels.compact_(world.k, world.v, world.lengths, path, **world.arguments())
    sdvg_kernels.compact_(*tables, lengths, path, **world.arguments())
    assert_same_bits(torch.stack(foreign[0]), world.k)
    assert_same_bits(torch.stack(foreign[1]), world.v)
    assert torch.equal(lengths, world.lengths)


def test_offsets_past_2_31_are_reached(lane: Lane) -> None:
    far = 2**31 + 4096
    # untouched pages of this buffer cost nothing
    buffer = torch.empty(far + 4096, dtype=torch.uint8, device=lane.device)
    for dimension in ("layer", "batch", "slot"):
        strides = {"layer": 256, "batch": 64, "slot": 32, dimension: far}
        k = buffer.as_strided((2, 2, 2, 1, 32), (*strides.values(), 32, 1))
        v = noise(2, 2, 2, 1, 32, dtype=torch.uint8, device=lane.device)
        k.fill_(7)
        key = noise(2, 2, 2, 1, 32, dtype=torch.uint8, device=lane.device)
        lengths = torch.tensor([0, 1], dtype=torch.int32, device=lane.device)
        undo = torch.empty_like(key), torch.empty_like(key)
        arguments = {"implementation": lane.implementation}
        sdvg_kernels.stage_(k, v, key, key, lengths, undo=undo, **arguments)
        assert_same_bits(k[:, 0], key[:, 0])
        assert_same_bits(k[:, 1], key[:, 1].flip(1))
        nobody = torch.zeros(2, dtype=torch.bool, device=lane.device)
        sdvg_kernels.rollback_(k, v, lengths, nobody, undo, **arguments)
        assert_same_bits(k, torch.full_like(key, 7))


def test_nothing_to_do_is_done(lane: Lane) -> None:
    arguments = {"implementation": lane.implementation}

    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=lane.device)

    def staged(layers: int, batch: int, b: int, tokens: int, heads: int) -> None:
        k, v = empty(layers, batch, 4, heads, 2), empty(layers, batch, 4, heads, 2)
        rows = empty(layers, b, tokens, heads, 2)
        lengths = torch.zeros(batch, dtype=torch.int32, device=lane.device)
        index = None if b == batch else torch.zeros(b, dtype=torch.int64, device=lane.device)
        some = torch.ones(b, dtype=torch.bool, device=lane.device)
        path = torch.full((b, tokens), -1, dtype=torch.int32, device=lane.device)
        undo = rows.clone(), rows.clone()
        sdvg_kernels.stage_(k, v, rows, rows, lengths, batch_idx=index, undo=undo, **arguments)
        sdvg_kernels.rollback_(k, v, lengths, some, undo, batch_idx=index, **arguments)
        sdvg_kernels.compact_(k, v, lengths, path, batch_idx=index, **arguments)
        sdvg_kernels.commit_(lengths, some, 0, batch_idx=index, **arguments)
        sdvg_kernels.select_(
            some,
            [rows[0, :, 0]] if layers and tokens else [],
            [rows[0, :, 0]] if layers and tokens else [],
            **arguments,
        )
        assert not lengths.any()

    staged(layers=2, batch=3, b=0, tokens=2, heads=1)
    staged(layers=2, batch=0, b=0, tokens=2, heads=1)
    staged(layers=2, batch=3, b=3, tokens=0, heads=1)
    staged(layers=0, batch=3, b=3, tokens=2, heads=1)
    staged(layers=2, batch=3, b=3, tokens=2, heads=0)


def sample() -> tuple[tuple[object, ...], ...]:
    """Return arguments of the five ops, as their schemas take them."""

    def caches() -> list[torch.Tensor]:
        return [torch.randn(2, 3, 8, 2, 4)]

    def rows() -> list[torch.Tensor]:
        return [torch.randn(2, 2, 3, 2, 4)]

    lengths = torch.tensor([0, 4, 9], dtype=torch.int32)
    some, accept = torch.tensor([2, 0]), torch.tensor([True, False])
    path = torch.tensor([[0, 2], [1, -1]], dtype=torch.int32)
    draft, other = (
        [torch.randn(2, 5), torch.randn(2, 3, 4)],
        [torch.randn(2, 5), torch.randn(2, 3, 4)],
    )
    return (
        ("stage_", caches(), caches(), rows(), rows(), lengths, some, rows(), rows(), 2),
        ("commit_", lengths, accept, some, 3),
        ("rollback_", caches(), caches(), lengths, accept, rows(), rows(), some, 2),
        ("compact_", caches(), caches(), lengths, path, some, 2),
        ("select_", accept, draft, other),
    )


@pytest.mark.parametrize("op", [arguments[0] for arguments in sample()])
@pytest.mark.parametrize("namespace", ["sdvg_kernels", "sdvg_kernels_host"])
def test_opcheck_passes(op: str, namespace: str) -> None:
    if namespace.endswith("host") and host_lane_missing():
        pytest.skip(host_lane_missing())
    arguments = next(a for name, *a in sample() if name == op)
    torch.library.opcheck(getattr(getattr(torch.ops, namespace), op).default, tuple(arguments))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("implementation", ["cuda", "reference"])
def test_a_captured_graph_replays_with_new_decisions(implementation: str) -> None:
    case = CASES[2]
    world = World(case, Lane(implementation, "cuda"))
    before = world.k.clone(), world.v.clone()
    path = torch.tensor([[1, 2], [0, -1]], dtype=torch.int32, device="cuda")
    draft, other = torch.randn(2, 9, device="cuda"), torch.randn(2, 9, device="cuda")

    def step(here: World, path: torch.Tensor, mine: torch.Tensor, theirs: torch.Tensor) -> None:
        how, ring = {"implementation": here.lane.implementation}, here.arguments()
        here.stage()
        sdvg_kernels.rollback_(here.k, here.v, here.lengths, here.accept, here.undo, **ring)
        sdvg_kernels.commit_(here.lengths, here.accept, case.tokens, **how)
        sdvg_kernels.compact_(here.k, here.v, here.lengths, path, **ring)
        sdvg_kernels.select_(here.accept, [mine], [theirs], **how)

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(world, path, draft, other)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(world, path, draft, other)
    for accept in ([True, False], [False, False], [False, True]):
        world.k.copy_(before[0])
        world.v.copy_(before[1])
        world.lengths.copy_(torch.tensor(world.starts))
        world.accept.copy_(torch.tensor(accept))
        draft.normal_()
        twin = World(case, Lane("reference", "cpu"))
        twin.k, twin.v, twin.key, twin.value, twin.lengths, twin.accept = (
            x.cpu() for x in (world.k, world.v, world.key, world.value, world.lengths, world.accept)
        )
        expected = draft.cpu()
        graph.replay()
        step(twin, path.cpu(), expected, other.cpu())
        assert_same_bits(world.k.cpu(), twin.k)
        assert_same_bits(world.v.cpu(), twin.v)
        assert torch.equal(world.lengths.cpu(), twin.lengths)
        assert torch.equal(draft.cpu(), expected)


def test_broken_preconditions_stop_the_host_lane() -> None:
    if host_lane_missing():
        pytest.skip(host_lane_missing())
    world = World(CASES[3], Lane("host", "cpu"))
    world.lengths[1] = -1
    with pytest.raises(RuntimeError, match="lengths must be at least 0"):
        world.stage()
    world = World(CASES[3], Lane("host", "cpu"), some=True)
    world.batch_idx[0] = 3
    with pytest.raises(RuntimeError, match="batch_idx must name sequences of the cache"):
        world.stage()


def test_a_path_with_a_hole_is_an_error() -> None:
    world = World(CASES[3], Lane("reference", "cpu"))
    path = torch.tensor([[0, 1, 2, 3], [1, -1, 2, -1], [-1, -1, -1, -1]], dtype=torch.int32)
    with pytest.raises(ValueError, match="compact_: path must have -1 at its end only, got"):
        sdvg_kernels.compact_(world.k, world.v, world.lengths, path, **world.arguments())
    if host_lane_missing():
        pytest.skip(host_lane_missing())
    world = World(CASES[3], Lane("host", "cpu"))
    with pytest.raises(RuntimeError, match="path must have -1 at its end only"):
        sdvg_kernels.compact_(world.k, world.v, world.lengths, path, **world.arguments())
