"""The modulation ops in every lane, against the same arithmetic in float64."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from sdvg_kernels import gated_residual, gated_residual_layer_norm, modulated_layer_norm
from sdvg_kernels.modulation import api, config
from sdvg_kernels.testing import Lane, assert_within_budget

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """Sizes of one call, and which of its parts are there."""

    batch: int = 2
    tokens: int = 12
    frames: int = 3
    width: int = 1536
    table: bool = False
    gate: bool = True
    modulation: bool = True
    affine: bool = False


CASES = {
    "1.3B": Case(),
    "5B": Case(width=3072, batch=1),
    "14B": Case(width=5120, batch=1),
    "table": Case(table=True),
    "affine": Case(modulation=False, affine=True),
    "affine and modulation": Case(affine=True, table=True),
    "no gate": Case(gate=False, table=True),
    "nothing but the norm": Case(gate=False, modulation=False),
    "one channel": Case(width=1),
    "odd width": Case(width=333, table=True, affine=True),
    "multiple of 128": Case(width=1664),
    "widest": Case(width=8192, batch=1, frames=1, tokens=2),
    "a frame ends within a tile": Case(batch=1, tokens=15, frames=3, width=256),
    "a row for each token": Case(batch=1, tokens=5, frames=5, width=256, table=True),
    "one frame": Case(batch=3, tokens=7, frames=1, width=128),
}


@dataclass(frozen=True)
class Inputs:
    """What one call gets, and in which dtypes."""

    x: torch.Tensor
    y: torch.Tensor
    gate: api.Modulation | None
    shift: api.Modulation | None
    scale: api.Modulation | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def norm(self) -> dict[str, object]:
        names = ("shift", "scale", "weight", "bias")
        return {name: getattr(self, name) for name in names}


def make(
    case: Case,
    random: torch.Generator,
    device: str,
    dtype: torch.dtype = torch.float32,
    branch: torch.dtype | None = None,
    rows: torch.dtype = torch.float32,
) -> Inputs:
    """Random inputs: x in `dtype`, y in `branch`, the modulation in `rows`, laid out as Wan's."""

    def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    x = 3 * tensor(case.batch, case.tokens, case.width, dtype=dtype) + 1
    y = tensor(case.batch, case.tokens, case.width, dtype=branch or dtype)
    # a slice of [B, F, 6, C] and one of [6, C]
    all_rows = tensor(case.batch, case.frames, 6, case.width, dtype=rows)
    tables = tensor(6, case.width, dtype=torch.float32)
    shift, scale, gate = (
        (all_rows[:, :, i], tables[i]) if case.table else all_rows[:, :, i] for i in range(3)
    )
    if not case.gate:
        gate = None
    if not case.modulation:
        shift = scale = None
    weight, bias = (
        tensor(case.width, dtype=torch.float32) if case.affine else None for _ in range(2)
    )
    return Inputs(x, y, gate, shift, scale, weight, bias)


def expanded(rows: api.Modulation, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, T, C] in `dtype`."""
    rows, table = rows if isinstance(rows, tuple) else (rows, torch.zeros_like(rows[0, 0]))
    rows = rows.to(dtype) + table.to(dtype)
    return rows[:, :, None].expand(-1, -1, tokens // rows.shape[1], -1).flatten(1, 2)


def plain_residual(inputs: Inputs, wide: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """The gated residual in `wide`, as diffusers' WanTransformerBlock writes it."""
    y = inputs.y.to(wide)
    if inputs.gate is not None:
        y = y * expanded(inputs.gate, y.shape[1], wide)
    return (inputs.x.to(wide) + y).to(dtype)


def plain_norm(
    x: torch.Tensor, inputs: Inputs, wide: torch.dtype, dtype: torch.dtype, eps: float = 1e-6
) -> torch.Tensor:
    """The modulated norm in `wide`, as diffusers' WanTransformerBlock writes it."""
    affine = [None if v is None else v.to(wide) for v in (inputs.weight, inputs.bias)]
    normed = F.layer_norm(x.to(wide), x.shape[2:], *affine, eps)
    if inputs.scale is not None:
        tokens = x.shape[1]
        normed = normed * (1 + expanded(inputs.scale, tokens, wide))
        normed = normed + expanded(inputs.shift, tokens, wide)
    return normed.to(dtype)


def check_norm(got: torch.Tensor, x: torch.Tensor, inputs: Inputs, eps: float = 1e-6) -> None:
    """Assert that `got` is the modulated norm of x."""
    plain = plain_norm(x, inputs, torch.float32, got.dtype, eps)
    exact = plain_norm(x, inputs, torch.float64, torch.float64, eps)
    assert_within_budget(got, plain, exact, "norm")
    assert got.is_contiguous()


def check_residual(got: torch.Tensor, inputs: Inputs) -> None:
    """Assert that `got` is the gated residual."""
    plain = plain_residual(inputs, torch.float32, inputs.x.dtype)
    exact = plain_residual(inputs, torch.float64, torch.float64)
    assert_within_budget(got, plain, exact, "residual")
    assert got.is_contiguous()


def check_all(inputs: Inputs, how: str) -> None:
    """Assert that each of the three ops gives what it should."""
    check_norm(modulated_layer_norm(inputs.x, **inputs.norm, implementation=how), inputs.x, inputs)
    check_residual(gated_residual(inputs.x, inputs.y, inputs.gate, implementation=how), inputs)
    residual, normed = gated_residual_layer_norm(
        inputs.x, inputs.y, inputs.gate, **inputs.norm, implementation=how
    )
    check_residual(residual, inputs)
    assert normed.dtype == inputs.y.dtype
    # of the residual as it is stored
    check_norm(normed, residual, inputs)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_same_in_float64(name: str, lane: Lane, random: torch.Generator) -> None:
    check_all(make(CASES[name], random, lane.device), lane.implementation)


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("dtype", "branch"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_half_precision_is_within_twice_plain_pytorch(
    dtype: torch.dtype, branch: torch.dtype, rows: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    case = Case(width=640, affine=True, table=True)
    check_all(make(case, random, lane.device, dtype, branch, rows), lane.implementation)


def test_the_output_takes_the_dtype_asked_for(lane: Lane, random: torch.Generator) -> None:
    inputs = make(Case(width=256), random, lane.device)
    run = {"dtype": torch.bfloat16, "implementation": lane.implementation}
    normed = modulated_layer_norm(inputs.x, **inputs.norm, **run)
    assert normed.dtype == torch.bfloat16
    check_norm(normed, inputs.x, inputs)
    residual, normed = gated_residual_layer_norm(inputs.x, inputs.y, **inputs.norm, **run)
    assert (residual.dtype, normed.dtype) == (torch.float32, torch.bfloat16)


def test_the_fused_op_equals_the_two_in_turn_bitwise(lane: Lane, random: torch.Generator) -> None:
    inputs = make(Case(width=640, table=True), random, lane.device, torch.bfloat16)
    run = {"implementation": lane.implementation}
    residual, normed = gated_residual_layer_norm(
        inputs.x, inputs.y, inputs.gate, **inputs.norm, **run
    )
    alone = gated_residual(inputs.x, inputs.y, inputs.gate, **run)
    assert torch.equal(residual, alone)
    assert torch.equal(normed, modulated_layer_norm(alone, **inputs.norm, **run))


def test_a_mean_far_from_zero_costs_no_digits(lane: Lane, random: torch.Generator) -> None:
    # the difference of two large squares would be noise
    inputs = make(Case(batch=1, width=1536), random, lane.device)
    x = inputs.x + 3000
    normed = modulated_layer_norm(x, **inputs.norm, implementation=lane.implementation)
    check_norm(normed, x, inputs)


def test_constant_rows_are_all_shift_and_eps_keeps_them_finite(lane: Lane) -> None:
    x = torch.full((1, 4, 640), 5.0, device=lane.device)
    rows = torch.linspace(-1, 1, 640, device=lane.device).expand(1, 2, 640)
    run = {"implementation": lane.implementation}
    assert torch.equal(modulated_layer_norm(x, rows, rows, **run), rows[:, :1].expand(1, 4, 640))


def test_eps_is_added_to_the_variance(lane: Lane, random: torch.Generator) -> None:
    inputs = make(Case(width=256), random, lane.device)
    normed = modulated_layer_norm(
        inputs.x, **inputs.norm, eps=2.5, implementation=lane.implementation
    )
    check_norm(normed, inputs.x, inputs, eps=2.5)


def test_strided_tensors_are_read_in_place(lane: Lane, random: torch.Generator) -> None:
    case = Case(width=333, tokens=6, frames=2)
    inputs = make(case, random, lane.device)

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        """The same values among NaN, the first two dims swapped in memory."""
        outer, inner, width = tensor.shape
        around = tensor.new_full((inner + 1, outer, 2, width + 5), torch.nan)
        return around.transpose(0, 1)[:, :inner, 1, 3 : 3 + width].copy_(tensor)

    shared = inputs.scale[:, :1].expand(-1, 2, -1)
    strided = Inputs(
        spread(inputs.x), spread(inputs.y), spread(inputs.gate), spread(inputs.shift), shared,
        None, None,
    )  # fmt: skip
    assert shared.stride(1) == 0
    check_all(strided, lane.implementation)


def test_a_nan_stays_in_its_row(lane: Lane, random: torch.Generator) -> None:
    inputs = make(Case(width=333, batch=1, tokens=6), random, lane.device)
    inputs.x[0, 3, 300] = torch.nan
    run = {"implementation": lane.implementation}
    residual, normed = gated_residual_layer_norm(inputs.x, inputs.y, **inputs.norm, **run)
    assert residual.isnan().sum() == 1
    assert normed.isnan().any(-1).tolist() == [[False, False, False, True, False, False]]
    assert normed[0, 3].isnan().all()


@pytest.mark.parametrize("shape", [(0, 4, 128), (2, 0, 128)])
def test_no_rows_give_no_rows(shape: tuple[int, ...], lane: Lane) -> None:
    x = torch.empty(shape, device=lane.device)
    rows = torch.empty(shape[0], 2, 128, device=lane.device)
    run = {"implementation": lane.implementation}
    assert modulated_layer_norm(x, rows, rows, **run).shape == shape
    for out in gated_residual_layer_norm(x, x, rows, rows, rows, **run):
        assert out.shape == shape


def test_runs_repeat_bit_for_bit(lane: Lane, random: torch.Generator) -> None:
    inputs = make(CASES["affine and modulation"], random, lane.device, torch.bfloat16)

    def run() -> torch.Tensor:
        return torch.stack(
            gated_residual_layer_norm(
                inputs.x,
                inputs.y,
                inputs.gate,
                **inputs.norm,
                implementation=lane.implementation,
            )
        )

    first = run()
    assert all(torch.equal(first, run()) for _ in range(2))


def test_float64_stays_float64(random: torch.Generator) -> None:
    inputs = make(Case(width=32), random, "cpu", torch.float64, rows=torch.float64)
    normed = modulated_layer_norm(inputs.x, **inputs.norm)
    exact = plain_norm(inputs.x, inputs, torch.float64, torch.float64)
    torch.testing.assert_close(normed, exact, rtol=0, atol=1e-13)


def test_opcheck(random: torch.Generator) -> None:
    inputs = make(Case(width=32, table=True, affine=True), random, "cpu")
    vectors = (*inputs.shift, *inputs.scale, inputs.weight, inputs.bias, 1e-6, torch.bfloat16)
    ops = torch.ops.sdvg_kernels
    torch.library.opcheck(ops.modulated_layer_norm, (inputs.x, *vectors, "reference"))
    branch = (inputs.x, inputs.y, *inputs.gate)
    torch.library.opcheck(ops.gated_residual, (*branch, "reference"))
    torch.library.opcheck(ops.gated_residual_layer_norm, (*branch, *vectors, "reference"))
    strided = inputs.x.transpose(0, 1)
    torch.library.opcheck(ops.gated_residual, (strided, strided, None, None, "reference"))


# --- error texts ---

_X = torch.zeros(2, 6, 8)
_ROWS = torch.zeros(2, 3, 8)
_VECTOR = torch.zeros(8)
_GOOD = {"x": _X, "y": _X, "gate": _ROWS, "shift": _ROWS, "scale": _ROWS}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": _X[0]}, ValueError, "x must be [B, T, C] with at least one channel, got [6, 8]"),
        ({"x": _X.int()}, TypeError, "x must be floating, got torch.int32"),
        (
            {"x": torch.zeros(2, 6, 16)[..., ::2]},
            ValueError,
            "x must be contiguous in the last dim, got stride 2; call .contiguous()",
        ),
        ({"y": _X[:1]}, ValueError, "y must have x's shape, got [1, 6, 8]"),
        ({"y": _X.bool()}, TypeError, "y must be floating, got torch.bool"),
        (
            {"gate": torch.zeros(2, 4, 8)},
            ValueError,
            "gate must have a number of frames that divides x's 6 tokens, got [2, 4, 8]",
        ),
        ({"shift": torch.zeros(2, 1, 8)}, ValueError, "shift must be [2, 3, 8], got [2, 1, 8]"),
        ({"scale": torch.zeros(1, 3, 8)}, ValueError, "scale must be [2, 3, 8], got [1, 3, 8]"),
        ({"scale": None}, ValueError, "scale must be given together with shift, got None"),
        ({"shift": None}, ValueError, "scale must be given together with shift, got no shift"),
        ({"weight": _VECTOR}, ValueError, "bias must be given together with weight, got None"),
        (
            {"scale": (_ROWS, torch.zeros(6, 8))},
            ValueError,
            "scale[1] must be a contiguous [8], got [6, 8] of stride [8, 1]",
        ),
        (
            {"weight": _VECTOR.int(), "bias": _VECTOR},
            TypeError,
            "weight must be floating, got torch.int32",
        ),
        ({"dtype": torch.int8}, TypeError, "dtype must be floating, got torch.int8"),
        (
            {"implementation": "hopper"},
            ValueError,
            "implementation must be one of 'reference', 'triton', got 'hopper'",
        ),
    ],
)
def test_bad_input_gets_one_sentence(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        gated_residual_layer_norm(**{**_GOOD, **change})
    assert str(caught.value) == f"gated_residual_layer_norm: {text}"


def test_each_op_names_itself() -> None:
    with pytest.raises(ValueError, match=r"^modulated_layer_norm: x must"):
        modulated_layer_norm(_X[0])
    with pytest.raises(ValueError, match=r"^gated_residual: y must"):
        gated_residual(_X, _X[:1])


def test_an_implementation_asked_for_never_falls_back() -> None:
    wide = torch.zeros(1, 1, api.MAX_WIDTH + 1)
    with pytest.raises(NotImplementedError, match=r"at most 8192 channels|TRITON_INTERPRET"):
        modulated_layer_norm(wide, implementation="triton")
    with pytest.raises(NotImplementedError, match=r"float64|TRITON_INTERPRET"):
        modulated_layer_norm(_X.double(), implementation="triton")
    assert modulated_layer_norm(wide).shape == wide.shape


def test_only_an_unasked_reference_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(api, "_available", lambda *_: {"triton": "no Triton", "reference": ""})
    api._warn_once.cache_clear()
    modulated_layer_norm(_X, implementation="reference")
    assert not caplog.messages
    for _ in range(2):
        modulated_layer_norm(_X)
    (said,) = caplog.messages
    assert said == "modulated_layer_norm: the reference serves cpu tensors here: no Triton"


def test_every_width_has_a_launch() -> None:
    for width in (1, 1024, 1025, 1536, 3072, 5120, 5121, api.MAX_WIDTH):
        for tokens in (1, 2, 1560):
            launch = config.choose(width, tokens)
            assert launch.BT <= tokens
            # what a thread holds of x
            assert launch.BT * -(-width // launch.BC) * launch.BC <= 80 * 32 * launch.num_warps


def test_import_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, sdvg_kernels as s;"
        "print(s.modulated_layer_norm(torch.zeros(1, 2, 8)).shape, s.implementations())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[1, 2, 8]" in done.stdout


# --- GPU only ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1024, 1536, 1664, 3072, 5120, 8192])
def test_shipped_configurations_are_exact_on_the_gpu(
    width: int, dtype: torch.dtype, random: torch.Generator
) -> None:
    case = Case(width=width, tokens=3 * 131, affine=True, table=True)
    check_all(make(case, random, "cuda", dtype), "triton")
    check_all(make(case, random, "cuda", dtype, torch.bfloat16), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("far", ["batch", "token"])
def test_offsets_past_2_to_the_31_are_read_right(far: str, random: torch.Generator) -> None:
    case = Case(batch=2, tokens=2, frames=1, width=128)
    inputs = make(case, random, "cuda", torch.bfloat16)
    step = 2**31 if far == "batch" else 256
    token = 2**31 if far == "token" else 128
    memory = torch.empty(step + token + 128, dtype=torch.bfloat16, device="cuda")
    x = memory.as_strided((2, 2, 128), (step, token, 1)).copy_(inputs.x)
    far_inputs = Inputs(x, inputs.y, inputs.gate, inputs.shift, inputs.scale, None, None)
    check_all(far_inputs, "triton")


@pytest.mark.gpu
def test_a_graph_replays_on_new_rows(random: torch.Generator) -> None:
    case = Case(table=True)
    fixed = make(case, random, "cuda", torch.bfloat16)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return gated_residual_layer_norm(
            fixed.x, fixed.y, fixed.gate, **fixed.norm, implementation="triton"
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        residual, normed = run()
    for _ in range(2):
        new = make(case, random, "cuda", torch.bfloat16)
        for tensor, value in zip((fixed.x, fixed.y), (new.x, new.y), strict=True):
            tensor.copy_(value)
        graph.replay()
        check_residual(residual, fixed)
        check_norm(normed, residual, fixed)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_nothing_is_read_back_from_the_gpu(implementation: str, random: torch.Generator) -> None:
    inputs = make(Case(table=True), random, "cuda")

    def run() -> None:
        gated_residual_layer_norm(
            inputs.x, inputs.y, inputs.gate, **inputs.norm, implementation=implementation
        )

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
