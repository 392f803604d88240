"""`quantize_rows` in every lane: the rounding, the scale beside it, the activation on load."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sdvg_kernels import quantize_rows
from sdvg_kernels.quantize import api, config
from sdvg_kernels.testing import Lane, assert_within_budget

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# every finite value of the format that is not negative
GRID = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def nearest(scaled: torch.Tensor) -> torch.Tensor:
    """Return the e4m3 value nearest to each of `scaled` (float64), ties to the even mantissa."""
    size = scaled.abs()
    above = torch.searchsorted(GRID, size).clamp(max=len(GRID) - 1)
    below = (above - 1).clamp(min=0)
    down, up = size - GRID[below], GRID[above] - size
    # the index is the bit pattern: its last bit is the mantissa's
    upward = (up < down) | ((up == down) & (above % 2 == 0))
    return torch.where(upward, GRID[above], GRID[below]).copysign(scaled)


def check_exact(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    """Assert bit for bit what the contract says of x without an activation, finite."""
    wide = x.float().cpu()
    largest = wide.abs().amax(1, keepdim=True)
    empty = largest < 2.0**-100
    inverse = torch.where(empty, 1.0, torch.full_like(largest, 448.0) / largest)
    assert torch.equal(scales.cpu(), torch.where(empty, 1.0, largest * (1 / 448)))
    # the product is rounded to float32 before it is rounded to e4m3
    assert torch.equal(values.cpu().double(), nearest((wide * inverse).double()))
    assert values.dtype == torch.float8_e4m3fn
    assert values.is_contiguous()
    assert scales.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 333, 1536, 5120])
def test_values_are_the_nearest_and_scales_the_rows_own(
    width: int, dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    x = torch.randn(4, width, generator=random).to(lane.device, dtype)
    # an outlier, and small values beside it
    x[1, 0] = 300.0
    check_exact(x, *quantize_rows(x, implementation=lane.implementation))


def test_ties_subnormals_zeros_and_the_ends_of_the_range(lane: Lane) -> None:
    width = 64
    x = torch.zeros(7, width)
    # halfway between neighbours, of either mantissa: 448 makes the factor 1
    x[0] = 448
    x[0, : width - 1] = ((GRID[1:width] + GRID[: width - 1]) / 2).float()
    x[1] = -x[0]
    # from the largest down to where e4m3 is subnormal, and on to zero
    x[2] = torch.exp2(-torch.arange(width) / 3)
    x[3, :5] = torch.tensor([3e38, -3e38, 1.0, -0.0, 1e36])
    # row 4: zeros; row 5: too small to be scaled; row 6: just large enough
    x[5, 3] = 2.0**-101
    x[6, :2] = torch.tensor([2.0**-100, -(2.0**-107)])
    values, scales = quantize_rows(x.to(lane.device), implementation=lane.implementation)
    check_exact(x, values, scales)
    assert scales[4:6, 0].tolist() == [1, 1]
    assert values.float().abs().max() == 448


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [40, 1793, 8960])
def test_the_activation_is_within_the_budget_of_two_passes(
    width: int, dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    x = (3 * torch.randn(3, width, generator=random)).to(lane.device, dtype)
    values, scales = quantize_rows(x, activation="gelu_tanh", implementation=lane.implementation)
    exact = F.gelu(x.double(), approximate="tanh")
    plain_values, plain_scales = quantize_rows(
        F.gelu(x.float(), approximate="tanh"), implementation="reference"
    )
    assert_within_budget(values.float() * scales, plain_values.float() * plain_scales, exact)
    torch.testing.assert_close(scales, plain_scales, rtol=1e-6, atol=0)
    # another rounding only where a tie is near
    assert (values.float() != plain_values.float()).float().mean() < 0.01


def test_the_activations_tails_are_zero_and_the_identity(lane: Lane) -> None:
    x = torch.tensor([[-3e4, -30.0, -0.0, 0.0, 30.0, 448.0]], device=lane.device)
    values, scales = quantize_rows(x, activation="gelu_tanh", implementation=lane.implementation)
    assert scales.tolist() == [[1.0]]
    assert values.float().tolist() == [[0, 0, 0, 0, 30, 448]]


@pytest.mark.parametrize("activation", api.ACTIVATIONS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_row_with_a_nan_or_an_infinity_is_lost_and_no_other(
    bad: float, activation: str | None, lane: Lane, random: torch.Generator
) -> None:
    x = torch.randn(3, 333, generator=random, device="cpu").to(lane.device)
    good, good_scales = quantize_rows(x, activation=activation, implementation=lane.implementation)
    x[1, 300] = bad
    values, scales = quantize_rows(x, activation=activation, implementation=lane.implementation)
    assert values[1].float().isnan().all()
    assert scales.isnan().flatten().tolist() == [False, True, False]
    for row in (0, 2):
        assert torch.equal(values[row].float(), good[row].float())
        assert torch.equal(scales[row], good_scales[row])


def test_rows_wider_than_registers_are_read_twice_and_equal(
    lane: Lane, random: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.choose(16385).two_passes
    # the same kernel, at a width that the interpreter runs quickly
    narrow = config.Launch(256, 4, True, "a test's")
    monkeypatch.setattr(config, "choose", lambda _: narrow)
    x = torch.randn(2, 700, generator=random).to(lane.device, torch.bfloat16)
    check_exact(x, *quantize_rows(x, implementation=lane.implementation))
    for activation in api.ACTIVATIONS:
        twice = quantize_rows(x, activation=activation, implementation=lane.implementation)
        monkeypatch.undo()
        once = quantize_rows(x, activation=activation, implementation=lane.implementation)
        monkeypatch.setattr(config, "choose", lambda _: narrow)
        assert torch.equal(twice[0].float(), once[0].float())
        assert torch.equal(twice[1], once[1])


def test_strided_rows_are_read_in_place(lane: Lane, random: torch.Generator) -> None:
    x = torch.randn(5, 100, generator=random).to(lane.device, torch.bfloat16)
    around = x.new_full((10, 130), torch.nan)
    strided = around[1::2, 7:107].copy_(x)
    got = quantize_rows(strided, implementation=lane.implementation)
    for mine, theirs in zip(got, quantize_rows(x, implementation="reference"), strict=True):
        assert torch.equal(mine.float(), theirs.float())


def test_no_rows_give_no_rows(lane: Lane) -> None:
    x = torch.empty(0, 48, device=lane.device)
    values, scales = quantize_rows(x, implementation=lane.implementation)
    assert (values.shape, scales.shape) == ((0, 48), (0, 1))


def test_runs_repeat_bit_for_bit(lane: Lane, random: torch.Generator) -> None:
    x = torch.randn(3, 600, generator=random).to(lane.device, torch.bfloat16)

    def run() -> list[torch.Tensor]:
        out = quantize_rows(x, activation="gelu_tanh", implementation=lane.implementation)
        return [part.float() for part in out]

    first = run()
    assert all(map(torch.equal, first, run()))


def test_float64_is_rounded_to_float32_first(random: torch.Generator) -> None:
    x = torch.randn(3, 64, generator=random, dtype=torch.float64)
    for mine, theirs in zip(quantize_rows(x), quantize_rows(x.float()), strict=True):
        assert torch.equal(mine.float(), theirs.float())


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch 2.11 has none on a CPU")
def test_a_rowwise_product_takes_what_it_gives(random: torch.Generator) -> None:
    x, weight = (torch.randn(rows, 64, generator=random).bfloat16() for rows in (5, 48))
    (left, left_scale), (right, right_scale) = quantize_rows(x), quantize_rows(weight)
    out = torch._scaled_mm(
        left, right.T, scale_a=left_scale, scale_b=right_scale.T, out_dtype=torch.bfloat16
    )
    exact = (left.double() * left_scale) @ (right.double() * right_scale).T
    assert_within_budget(out, exact.bfloat16(), exact)
    assert (out.double() - x.double() @ weight.double().T).norm() / out.double().norm() < 0.05


def test_opcheck(random: torch.Generator) -> None:
    op = torch.ops.sdvg_kernels.quantize_rows
    # what opcheck compares with allclose, e4m3 has not: schema and fake are what matters here
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    for activation in api.ACTIVATIONS:
        x = torch.randn(3, 40, generator=random)
        torch.library.opcheck(op, (x, activation, "reference"), test_utils=utils)
        torch.library.opcheck(op, (x[:, 1:33], activation, "reference"), test_utils=utils)


# --- error texts ---


@pytest.mark.parametrize(
    ("x", "options", "error", "text"),
    [
        (torch.zeros(3), {}, ValueError, "x must be [N, K] with at least one column, got [3]"),
        (
            torch.zeros(0, 0),
            {},
            ValueError,
            "x must be [N, K] with at least one column, got [0, 0]",
        ),
        (
            torch.zeros(2, 3).int(),
            {},
            TypeError,
            "x must be floating, of 16 bits or more, got torch.int32",
        ),
        (
            torch.zeros(2, 8)[:, ::2],
            {},
            ValueError,
            "x must be contiguous in the last dim, got stride 2; call .contiguous()",
        ),
        (
            torch.zeros(2, 3),
            {"activation": "relu"},
            ValueError,
            "activation must be None or 'gelu_tanh', got 'relu'",
        ),
        (
            torch.zeros(2, 3),
            {"implementation": "hopper"},
            ValueError,
            "implementation must be one of 'reference', 'triton', got 'hopper'",
        ),
    ],
)
def test_bad_input_gets_one_sentence(
    x: torch.Tensor, options: dict[str, str], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        quantize_rows(x, **options)
    assert str(caught.value) == f"quantize_rows: {text}"


def test_an_implementation_asked_for_never_falls_back() -> None:
    with pytest.raises(NotImplementedError, match=r"float64|TRITON_INTERPRET"):
        quantize_rows(torch.zeros(1, 8).double(), implementation="triton")


def test_a_reference_that_nobody_asked_for_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(api, "_available", lambda *_: {"triton": "no Triton", "reference": ""})
    api._choose.cache_clear()
    quantize_rows(torch.zeros(1, 8), implementation="reference")
    assert not caplog.messages
    for _ in range(2):
        quantize_rows(torch.zeros(1, 8))
    (said,) = caplog.messages
    assert said == "quantize_rows: the reference serves cpu tensors here: no Triton"
    # the choice is kept: others ask this machine again
    api._choose.cache_clear()


def test_every_width_has_a_launch() -> None:
    for width in (1, 1536, 3072, 5120, 8960, 13824, 14336, 16384, 16385, 10**6):
        launch = config.choose(width)
        # 16 elements a thread and part; what a thread holds of a row
        assert launch.BC == 16 * 32 * launch.num_warps
        assert launch.two_passes or -(-width // launch.BC) * 16 <= 80


# --- GPU only ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1536, 3072, 5120, 8960, 13824, 14336, 16400])
def test_shipped_configurations_are_exact_on_the_gpu(
    width: int, dtype: torch.dtype, random: torch.Generator
) -> None:
    x = torch.randn(131, width, generator=random).cuda().to(dtype)
    check_exact(x, *quantize_rows(x, implementation="triton"))
    values, scales = quantize_rows(x, activation="gelu_tanh", implementation="triton")
    plain, plain_scales = quantize_rows(
        F.gelu(x.float(), approximate="tanh"), implementation="reference"
    )
    exact = F.gelu(x.double(), approximate="tanh")
    assert_within_budget(values.float() * scales, plain.float() * plain_scales, exact)


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements() -> None:
    x = torch.empty(2**19 + 4, 5120, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.linspace(-3, 3, 5120, device="cuda")
    values, scales = quantize_rows(x, implementation="triton")
    check_exact(x[-1:], values[-1:], scales[-1:])


@pytest.mark.gpu
def test_a_graph_replays_what_the_op_gives(random: torch.Generator) -> None:
    first, second = (torch.randn(64, 5120, generator=random).cuda().bfloat16() for _ in range(2))
    x = first.clone()
    quantize_rows(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = quantize_rows(x)
    for given in (first, second):
        x.copy_(given)
        graph.replay()
        for mine, theirs in zip(out, quantize_rows(given), strict=True):
            assert torch.equal(mine.float(), theirs.float())


@pytest.mark.gpu
def test_nothing_is_read_back_from_the_gpu(random: torch.Generator) -> None:
    x = torch.randn(64, 5120, generator=random).cuda().bfloat16()
    quantize_rows(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        quantize_rows(x, activation="gelu_tanh")
    finally:
        torch.cuda.set_sync_debug_mode("default")
