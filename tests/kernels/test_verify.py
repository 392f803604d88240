"""route_blocks in every lane."""

from __future__ import annotations

import math

import pytest
import torch

from sdvg_kernels import route_blocks
from sdvg_kernels.testing import Lane


@pytest.mark.parametrize("aggregate", ["min", "mean"])
@pytest.mark.parametrize("frames", [1, 9, 33])
@pytest.mark.parametrize("batch", [1, 13])
def test_accepts_where_the_aggregate_reaches_tau(
    batch: int, frames: int, aggregate: str, lane: Lane, random: torch.Generator
) -> None:
    rewards = torch.randn(batch, frames, generator=random).to(lane.device)
    first = (torch.rand(batch, generator=random) < 0.3).to(lane.device)
    exact = rewards.double().amin(1) if aggregate == "min" else rewards.double().mean(1)
    tau = exact.median().item()
    accept, score = route_blocks(
        rewards,
        tau,
        first,
        aggregate,
        return_score=True,
        implementation=lane.implementation,
    )
    assert torch.equal(score, exact.float())
    assert torch.equal(accept, (exact.float() >= torch.tensor(tau).to(exact.device)) & ~first)


def test_a_score_equal_to_tau_is_accepted(lane: Lane) -> None:
    # 0.7 in float32 is less than 0.7 in float64
    rewards = torch.tensor([[0.7, 0.9]], device=lane.device)
    assert route_blocks(rewards, 0.7, False, implementation=lane.implementation).item()
    assert not route_blocks(rewards, 0.7001, False, implementation=lane.implementation).item()


@pytest.mark.parametrize("aggregate", ["min", "mean"])
@pytest.mark.parametrize("place", [0, 8, 20])
def test_nan_is_rejected_even_at_minus_infinity(aggregate: str, place: int, lane: Lane) -> None:
    rewards = torch.ones(2, 21, device=lane.device)
    rewards[1, place] = torch.nan
    accept, score = route_blocks(
        rewards,
        -math.inf,
        False,
        aggregate,
        return_score=True,
        implementation=lane.implementation,
    )
    assert accept.tolist() == [True, False]
    assert score.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("tau", "expected"),
    # the last two are infinite once rounded to float32
    [(-math.inf, True), (math.inf, False), (-1e300, True), (1e300, False)],
)
def test_infinite_thresholds_accept_all_or_nothing(tau: float, expected: bool, lane: Lane) -> None:
    rewards = torch.tensor([[-1e30, 1e30]], device=lane.device)
    accept = route_blocks(rewards, tau, False, implementation=lane.implementation)
    assert accept.item() is expected


def test_a_first_block_is_rejected(lane: Lane) -> None:
    rewards = torch.ones(3, 4, device=lane.device)
    run = {"implementation": lane.implementation}
    assert route_blocks(rewards, 0.0, True, **run).tolist() == [False] * 3
    first = torch.tensor([False, True, False], device=lane.device)
    assert route_blocks(rewards, 0.0, first, **run).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_strided_rewards_of_any_float_are_read(
    dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    around = torch.full((20, 7), torch.nan, dtype=dtype, device=lane.device)
    rewards = around.T[1:6, 2:18:2].copy_(torch.randn(5, 8, generator=random))
    first = torch.zeros(9, dtype=torch.bool, device=lane.device)[::2]
    accept, score = route_blocks(
        rewards, -0.5, first, return_score=True, implementation=lane.implementation
    )
    assert torch.equal(score, rewards.float().amin(1))
    assert torch.equal(accept, score >= -0.5)


def test_no_sequences_give_no_decisions(lane: Lane) -> None:
    rewards = torch.empty(0, 4, device=lane.device)
    assert route_blocks(rewards, 0.0, False, implementation=lane.implementation).shape == (0,)


def test_opcheck() -> None:
    rewards, first = torch.randn(3, 9), torch.tensor([True, False, False])
    op = torch.ops.sdvg_kernels.route_blocks
    torch.library.opcheck(op, (rewards, first, -0.7, False, "min", "reference"))
    torch.library.opcheck(op, (rewards, None, -0.7, True, "mean", "reference"))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"frame_rewards": torch.zeros(3)},
            ValueError,
            "frame_rewards must be [B, F] with at least one frame, got [3]",
        ),
        (
            {"frame_rewards": torch.zeros(3, 0)},
            ValueError,
            "frame_rewards must be [B, F] with at least one frame, got [3, 0]",
        ),
        (
            {"frame_rewards": torch.zeros(3, 2, dtype=torch.int64)},
            TypeError,
            "frame_rewards must be floating, got torch.int64",
        ),
        ({"tau": math.nan}, ValueError, "tau must be a number, got nan"),
        ({"aggregate": "max"}, ValueError, "aggregate must be 'min' or 'mean', got 'max'"),
        ({"first": torch.zeros(3)}, TypeError, "first must be bool, got torch.float32"),
        (
            {"first": torch.zeros(2, dtype=torch.bool)},
            ValueError,
            "first must be [B], got [2]",
        ),
        (
            {"implementation": "cuda"},
            ValueError,
            "implementation must be one of 'reference', 'triton', got 'cuda'",
        ),
    ],
)
def test_bad_input_gets_one_sentence(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    good = {"frame_rewards": torch.zeros(3, 2), "tau": 0.0, "first": False}
    with pytest.raises(error) as caught:
        route_blocks(**{**good, **change})
    assert str(caught.value) == f"route_blocks: {text}"


@pytest.mark.gpu
def test_a_graph_replays_on_new_rewards() -> None:
    rewards = torch.zeros(4, 9, device="cuda")
    route_blocks(rewards, -0.5, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        accept = route_blocks(rewards, -0.5, False)
    for value in (-1.0, 1.0):
        rewards.fill_(value)
        graph.replay()
        assert accept.tolist() == [value > 0] * 4
