"""Splits of the keys: who combines their parts, in which order, and that launches do not meet."""

from __future__ import annotations

import importlib
import itertools
from types import ModuleType

import pytest
import torch

from sdvg_kernels import block_causal_attention
from sdvg_kernels.testing import Lane
from tests.kernels.test_attention import CASES, GPU, Case, check, make


@pytest.fixture(params=["last program", "second launch"])
def combined(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the parts of a split are combined."""
    if request.param == "second launch":
        combine = pytest.importorskip("sdvg_kernels._combine")
        monkeypatch.setattr(combine, "choose", lambda *_: combine.COMBINE)
    return request.param


@pytest.fixture
def tickets(lane: Lane) -> ModuleType:
    """The room of the counters, in the lanes of the Triton kernel."""
    if lane.implementation != "triton":
        pytest.skip("the reference has no splits")
    return importlib.import_module("sdvg_kernels._tickets")


@pytest.mark.parametrize("splits", [2, 18])
@pytest.mark.parametrize("name", ["one token", "grouped blocks"])
def test_parts_are_combined_in_the_last_program_or_in_a_second_launch(
    name: str,
    splits: int,
    combined: str,
    tickets: ModuleType,
    lane: Lane,
    random: torch.Generator,
) -> None:
    case = CASES[name]
    inputs = make(case, random, lane)
    out, lse = block_causal_attention(
        inputs.query,
        *inputs.cache,
        **case.options,
        num_splits=splits,
        return_lse=True,
        implementation=lane.implementation,
    )
    check(case, inputs, out, lse)


def test_programs_may_finish_in_any_order(
    lane: Lane, tickets: ModuleType, random: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lane.name != "interpreter":
        pytest.skip("the order of a GPU's programs is its own")
    interpreter = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    case = Case((90, 31), 5, 96, sink=5, window=60, heads=4, heads_cached=2)
    inputs = make(case, random)
    set_grid_idx = interpreter.set_grid_idx

    def run(order: list[int]) -> torch.Tensor:
        monkeypatch.setattr(
            interpreter, "set_grid_idx", lambda x, y, z: set_grid_idx(order[x], y, z)
        )
        return block_causal_attention(
            inputs.query, *inputs.cache, **case.options, num_splits=4, implementation="triton"
        )

    # sequences x heads cached x splits
    first = run(list(range(16)))
    orders = [torch.randperm(16, generator=random).tolist() for _ in range(4)]
    for order in (list(reversed(range(16))), *orders):
        assert torch.equal(run(order), first)
        assert not tickets._POOLS[inputs.query.device].take(0, 8).any()


def test_launches_share_tickets_only_if_they_cannot_overlap(tickets: ModuleType) -> None:
    pool = tickets.Tickets(torch.device("cpu"))
    runs: dict[int, torch.Tensor] = {}

    def take(stream: int | None) -> torch.Tensor | None:
        run = pool.take(stream, 40)
        if run is not None:
            assert len(run) >= 40
            runs[id(run)] = run
        return run

    first = take(1)
    assert take(1) is first
    assert take(2) is not first
    while take(None) is not None:
        pass
    # all are in use: those that were taken stay, and there are no new ones
    assert take(1) is first
    assert take(3) is None
    addresses = sorted((run.data_ptr(), run.data_ptr() + 4 * len(run)) for run in runs.values())
    assert len(addresses) > 10_000
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(addresses))
    assert all(start % 16 == 0 for start, _ in addresses)


def test_more_tiles_than_tickets_take_a_second_launch(
    lane: Lane, tickets: ModuleType, random: torch.Generator
) -> None:
    assert tickets.take(torch.device(lane.device), tickets.MOST_TILES) is not None
    assert tickets.take(torch.device(lane.device), tickets.MOST_TILES + 1) is None


@pytest.mark.gpu
def test_splits_on_two_streams_and_in_two_graphs_do_not_meet(random: torch.Generator) -> None:
    case = Case((4000,), 1, 4096, heads=4, heads_cached=4, dim=128)
    inputs = make(case, random, GPU, torch.bfloat16)

    def run() -> torch.Tensor:
        return block_causal_attention(
            inputs.query, *inputs.cache, num_splits=16, implementation="triton"
        )

    expected = run()
    torch.cuda.synchronize()
    # captured on one stream, replayed on two
    captured = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = [run() for _ in range(20)]
        captured.append((graph, out))
    streams = [torch.cuda.Stream() for _ in range(2)]
    eager: list[torch.Tensor] = []
    for _ in range(20):
        for stream, (graph, _) in zip(streams, captured, strict=True):
            with torch.cuda.stream(stream):
                eager.append(run())
                graph.replay()
    torch.cuda.synchronize()
    for out in (*eager, *captured[0][1], *captured[1][1]):
        assert torch.equal(out, expected)
