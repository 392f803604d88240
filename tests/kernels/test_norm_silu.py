"""rms_norm_silu in every lane, against the same arithmetic in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from sdvg_kernels import rms_norm_silu
from sdvg_kernels.norm_silu import api, config
from sdvg_kernels.testing import Lane, assert_within_budget


@dataclass(frozen=True)
class Case:
    """Sizes of one call, and which of its parts are there."""

    width: int
    batch: int = 2
    rows: int = 37
    bias: bool = True
    residual: bool = True
    silu: bool = True


CASES = {
    "96": Case(96),
    "192": Case(192, bias=False),
    "384": Case(384, residual=False),
    "384, no SiLU": Case(384, silu=False),
    "nothing added": Case(96, bias=False, residual=False),
    "1024 (Wan 2.2)": Case(1024, batch=1),
    "640": Case(640, rows=3),
    "one channel": Case(1),
    "odd width": Case(333, rows=5),
    "tiny": Case(4),
    "widest": Case(config.MAX_WIDTH, batch=1, rows=2),
    "one row": Case(96, batch=1, rows=1),
}


@dataclass(frozen=True)
class Inputs:
    """What one call gets."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    silu: bool

    def total(self, wide: torch.dtype) -> torch.Tensor:
        """The sum in `wide`, not rounded."""
        total = self.x.to(wide)
        for added in (self.bias, self.residual):
            total = total if added is None else total + added.to(wide)
        return total


def make(
    case: Case, random: torch.Generator, device: str, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Random inputs, the vectors in the rows' dtype."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    shape = (case.batch, case.rows, case.width)
    return Inputs(
        3 * tensor(*shape),
        1 + 0.2 * tensor(case.width),
        tensor(case.width) if case.bias else None,
        tensor(*shape) if case.residual else None,
        case.silu,
    )


def plain(total: torch.Tensor, inputs: Inputs, wide: torch.dtype) -> torch.Tensor:
    """What diffusers' WanRMS_norm and SiLU make of the sum, in `wide`."""
    normed = F.normalize(total.to(wide), dim=-1) * total.shape[-1] ** 0.5 * inputs.weight.to(wide)
    return F.silu(normed) if inputs.silu else normed


def check(inputs: Inputs, how: str) -> None:
    """Assert that the sum and the norm of it are what they should be."""
    total = torch.empty_like(inputs.x)
    options = {"bias": inputs.bias, "residual": inputs.residual, "silu": inputs.silu}
    out = rms_norm_silu(inputs.x, inputs.weight, **options, total=total, implementation=how)
    assert out.is_contiguous()
    dtype = inputs.x.dtype
    assert_within_budget(
        total, inputs.total(torch.float32).to(dtype), inputs.total(torch.float64), "total"
    )
    # of the sum as it is stored
    assert_within_budget(
        out,
        plain(total, inputs, torch.float32).to(dtype),
        plain(total, inputs, torch.float64),
        "norm",
    )
    alone = rms_norm_silu(inputs.x, inputs.weight, **options, implementation=how)
    assert torch.equal(alone, out), "the sum that nobody asks for changes the norm"


@pytest.mark.parametrize("name", CASES)
def test_equals_the_same_in_float64(name: str, lane: Lane, random: torch.Generator) -> None:
    check(make(CASES[name], random, lane.device), lane.implementation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_within_twice_plain_pytorch(
    dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    check(make(Case(192), random, lane.device, dtype), lane.implementation)


def test_a_part_of_a_padded_video_is_written_in_place(lane: Lane, random: torch.Generator) -> None:
    # channels-last: [B, frames, H, W, C], two frames of history in front
    inputs = make(Case(96, rows=3 * 5 * 7), random, lane.device)
    window = torch.full((2, 5, 5, 7, 96), torch.nan, device=lane.device)
    wide = torch.full((2, 110, 101), torch.nan, device=lane.device)
    total = wide[:, 3:108, 2:98]
    options = {"bias": inputs.bias, "residual": inputs.residual, "total": total}
    run = {"implementation": lane.implementation}
    out = rms_norm_silu(inputs.x, inputs.weight, **options, out=window[:, 2:].flatten(1, 3), **run)
    assert window[:, :2].isnan().all()
    assert torch.equal(window[:, 2:].flatten(1, 3), out)
    other = torch.empty_like(inputs.x)
    assert torch.equal(
        out, rms_norm_silu(inputs.x, inputs.weight, **{**options, "total": other}, **run)
    )
    assert torch.equal(total, other)
    # nothing beside it
    assert wide.isnan().sum() == wide.numel() - total.numel()


def test_strided_tensors_are_read_in_place(lane: Lane, random: torch.Generator) -> None:
    inputs = make(Case(333, rows=6), random, lane.device)

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        """The same values among NaN, the first two dims swapped in memory."""
        outer, inner, width = tensor.shape
        around = tensor.new_full((inner + 1, outer, 2, width + 5), torch.nan)
        return around.transpose(0, 1)[:, :inner, 1, 3 : 3 + width].copy_(tensor)

    run = {"bias": inputs.bias, "implementation": lane.implementation}
    expected = rms_norm_silu(inputs.x, inputs.weight, residual=inputs.residual, **run)
    out = rms_norm_silu(spread(inputs.x), inputs.weight, residual=spread(inputs.residual), **run)
    assert torch.equal(out, expected)
    # one row for all
    shared = inputs.residual[:1, :1].expand_as(inputs.x)
    copied = rms_norm_silu(inputs.x, inputs.weight, residual=shared.contiguous(), **run)
    assert torch.equal(rms_norm_silu(inputs.x, inputs.weight, residual=shared, **run), copied)


def test_zeros_stay_zero_and_small_rows_are_not_lost(lane: Lane) -> None:
    x = torch.zeros(1, 3, 96, device=lane.device)
    x[0, 1] = 1e-14
    x[0, 2] = 1e-6
    weight = torch.ones(96, device=lane.device)
    run = {"silu": False, "implementation": lane.implementation}
    out = rms_norm_silu(x, weight, **run)
    assert torch.equal(out[0, 0], x[0, 0])
    # the norm is at least 1e-12
    torch.testing.assert_close(out, F.normalize(x, dim=-1) * 96**0.5, rtol=1e-5, atol=0)


def test_a_nan_stays_in_its_row(lane: Lane, random: torch.Generator) -> None:
    inputs = make(Case(333, batch=1, rows=6), random, lane.device)
    inputs.x[0, 3, 300] = torch.nan
    out = rms_norm_silu(inputs.x, inputs.weight, implementation=lane.implementation)
    assert out.isnan().any(-1).tolist() == [[False, False, False, True, False, False]]
    assert out[0, 3].isnan().all()


def test_the_output_takes_its_own_dtype(lane: Lane, random: torch.Generator) -> None:
    inputs = make(Case(96, bias=False, residual=False), random, lane.device)
    out = torch.empty_like(inputs.x, dtype=torch.float16)
    rms_norm_silu(inputs.x, inputs.weight, out=out, implementation=lane.implementation)
    wide = rms_norm_silu(inputs.x, inputs.weight, implementation=lane.implementation)
    assert_within_budget(out, wide.half(), wide.double())


@pytest.mark.parametrize("shape", [(0, 4, 96), (2, 0, 96)])
def test_no_rows_give_no_rows(shape: tuple[int, ...], lane: Lane) -> None:
    x = torch.empty(shape, device=lane.device)
    weight = torch.ones(96, device=lane.device)
    assert rms_norm_silu(x, weight, implementation=lane.implementation).shape == shape


def test_runs_repeat_bit_for_bit(lane: Lane, random: torch.Generator) -> None:
    inputs = make(Case(384), random, lane.device, torch.bfloat16)
    run = {"residual": inputs.residual, "implementation": lane.implementation}
    first = rms_norm_silu(inputs.x, inputs.weight, **run)
    assert torch.equal(first, rms_norm_silu(inputs.x, inputs.weight, **run))


def test_float64_stays_float64(random: torch.Generator) -> None:
    inputs = make(Case(96), random, "cpu", torch.float64)
    out = rms_norm_silu(inputs.x, inputs.weight, bias=inputs.bias, residual=inputs.residual)
    exact = plain(inputs.total(torch.float64), inputs, torch.float64)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-13)


def test_opcheck(random: torch.Generator) -> None:
    inputs = make(Case(32), random, "cpu")
    op = torch.ops.sdvg_kernels.rms_norm_silu
    total, out = torch.empty_like(inputs.x), torch.empty_like(inputs.x)
    added = (inputs.bias, inputs.residual)
    torch.library.opcheck(op, (inputs.x, inputs.weight, *added, True, total, out, "reference"))
    alone = (inputs.x, inputs.weight, None, None, False, None, out, "reference")
    torch.library.opcheck(op, alone)


@pytest.mark.parametrize("width", [1, 7, 32, 96, 160, 192, 333, 1000, 1024, 5120, 8192])
def test_launches_hold_a_row(width: int) -> None:
    launch = config.choose(width)
    assert launch.BT * launch.BC == 1024
    assert -(-width // launch.BC) <= config.PARTS


# --- error texts ---

_X = torch.zeros(2, 6, 8)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": _X[0]}, ValueError, "x must be [B, N, C] with at least one channel, got [6, 8]"),
        ({"x": _X.int()}, TypeError, "x must be floating, got torch.int32"),
        (
            {"x": torch.zeros(2, 6, 16)[..., ::2]},
            ValueError,
            "x must be contiguous in the last dim, got stride 2; call .contiguous()",
        ),
        (
            {"weight": torch.zeros(9)},
            ValueError,
            "weight must be a contiguous [8], got [9] of stride [1]",
        ),
        ({"bias": torch.zeros(8).int()}, TypeError, "bias must be floating, got torch.int32"),
        ({"residual": _X[:1]}, ValueError, "residual must be [2, 6, 8], as x is, got [1, 6, 8]"),
        (
            {"residual": _X.half()},
            TypeError,
            "residual must be torch.float32, as x is, got torch.float16",
        ),
        (
            {"total": _X.half()},
            TypeError,
            "total must be torch.float32, as x is, got torch.float16",
        ),
        ({"out": _X[:, :5]}, ValueError, "out must be [2, 6, 8], as x is, got [2, 5, 8]"),
        ({"out": _X.int()}, TypeError, "out must be floating, got torch.int32"),
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
    with pytest.raises(error) as caught:
        rms_norm_silu(**{"x": _X, "weight": torch.ones(8), **change})
    assert str(caught.value) == f"rms_norm_silu: {text}"


def test_an_implementation_asked_for_never_falls_back() -> None:
    x = torch.zeros(1, 1, config.MAX_WIDTH + 1)
    with pytest.raises(NotImplementedError, match=r"at most 8192|TRITON_INTERPRET"):
        rms_norm_silu(x, x[0, 0], implementation="triton")


def test_only_an_unasked_reference_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(api, "_available", lambda *_: {"triton": "no Triton", "reference": ""})
    api._warn_once.cache_clear()
    rms_norm_silu(_X, torch.ones(8), implementation="reference")
    assert not caplog.messages
    for _ in range(2):
        rms_norm_silu(_X, torch.ones(8))
    (said,) = caplog.messages
    assert said == "rms_norm_silu: the reference serves cpu tensors here: no Triton"


# --- GPU only ---


@pytest.mark.gpu
@pytest.mark.parametrize("width", [96, 192, 384, 256, 1024])
@pytest.mark.parametrize("dtype", api.DTYPES, ids=str)
def test_wans_widths_on_the_gpu(width: int, dtype: torch.dtype, random: torch.Generator) -> None:
    check(make(Case(width, rows=5001), random, "cuda", dtype), "triton")


@pytest.mark.gpu
def test_offsets_past_2_to_the_31(random: torch.Generator) -> None:
    inputs = make(Case(96, rows=40), random, "cuda", torch.bfloat16)
    memory = torch.empty(2**31 + 40 * 96, dtype=torch.bfloat16, device="cuda")
    far = memory.as_strided(inputs.x.shape, (2**31, 96, 1)).copy_(inputs.x)
    expected = rms_norm_silu(inputs.x, inputs.weight)
    assert torch.equal(rms_norm_silu(far, inputs.weight), expected)
    out = memory.as_strided(inputs.x.shape, (2**31, 96, 1))
    rms_norm_silu(inputs.x, inputs.weight, out=out)
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_a_graph_replays_on_new_rows(random: torch.Generator) -> None:
    inputs = make(Case(96), random, "cuda", torch.bfloat16)
    fixed = torch.zeros_like(inputs.x)
    run = {"bias": inputs.bias, "residual": inputs.residual}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        rms_norm_silu(fixed, inputs.weight, **run)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rms_norm_silu(fixed, inputs.weight, **run)
    fixed.copy_(inputs.x)
    graph.replay()
    assert torch.equal(out, rms_norm_silu(inputs.x, inputs.weight, **run))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_nothing_is_read_back_from_the_gpu(implementation: str, random: torch.Generator) -> None:
    inputs = make(Case(96), random, "cuda", torch.bfloat16)
    rms_norm_silu(inputs.x, inputs.weight, implementation=implementation)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rms_norm_silu(inputs.x, inputs.weight, implementation=implementation)
    finally:
        torch.cuda.set_sync_debug_mode("default")
