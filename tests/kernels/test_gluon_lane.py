"""The CPU lane for Gluon: it computes what the kernel says, and finds what is planted in it."""

from __future__ import annotations

import inspect
import linecache
import types

import pytest
import torch

pytest.importorskip("triton")

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sdvg_kernels.testing import GluonLane, LaneFault
from tests.kernels import gluon_kernels as kernels

SEEDS = range(4)
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def planted(module: types.ModuleType, old: str, new: str, times: int = 1) -> types.ModuleType:
    """Return a module from the source of `module` with `old`, found `times` times, replaced.

    An empty `old` gives a copy.
    """
    source = inspect.getsource(module)
    if old:
        assert source.count(old) == times, f"{source.count(old)} places, not {times}: {old}"
        source = source.replace(old, new)
    name = f"{module.__name__}<{hash((old, new)):x}>"
    # where Triton looks for a kernel's source
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    found = types.ModuleType(name)
    found.__file__ = name
    exec(compile(source, name, "exec"), vars(found))
    return found


def descriptor(tensor: torch.Tensor, rows: int = 64, columns: int = 64) -> TensorDescriptor:
    """A TMA descriptor of a matrix."""
    return TensorDescriptor.from_tensor(tensor, [rows, columns], LAYOUT)


def run_pipeline(seed: int, kernel: object = kernels.pipeline, n: int = 5) -> None:
    """Run it on a matrix with a row too few, and check what it writes."""
    random = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(shape, generator=random).bfloat16() for shape in ((127, n * 64), (n * 64, 64))
    )
    out = torch.full((127, 64), torch.nan, dtype=torch.bfloat16)
    GluonLane(seed).launch(kernel, (1,), *map(descriptor, (a, b, out)), n, 2, num_warps=4)
    exact = a.double() @ b.double()
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("seed", range(12))
def test_a_pipeline_computes_its_product_in_any_order(seed: int) -> None:
    run_pipeline(seed)


_WAIT_FULL = "        mbarrier.wait(full.index(stage), (i // STAGES) & 1)\n"
_WAIT_FREE = "        mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)\n"
_RELEASE = "        mbarrier.arrive(free.index(stage), count=1)\n"
_FINISH = "        b_o = warpgroup_mma_wait(0, deps=(b_o,))\n"
_LOOP = "for i in range(n):\n        stage = i % STAGES\n" + _WAIT_FREE
_BYTES = "2 * a_desc.block_type.nbytes + b"
_INIT_FULL = "        mbarrier.init(full.index(i), count=1)\n"
_TURN = '        _turn("arrive", OTHER)\n        b_o'

# what is planted: (old, new, what the lane must say); None: the output must be wrong
PLANTED = {
    "producer's parity": (_WAIT_FREE, _WAIT_FREE.replace(" ^ 1", ""), "deadlock"),
    "consumer's parity": (_WAIT_FULL, _WAIT_FULL.replace(" & 1", " & 1 ^ 1"), "dead|never|waits"),
    "lost arrival": (_RELEASE, "", "deadlock"),
    "arrival too many": (_RELEASE, _RELEASE.replace("1)", "2)"), "more came|written by|deadlock"),
    "early release": (_FINISH + _RELEASE, _RELEASE + _FINISH, "is written by .*product"),
    "consumer does not wait": (_WAIT_FULL, "", "never written|nothing waits for"),
    "producer does not wait": (_WAIT_FREE, "", "is written by|more came"),
    "release counts one": (
        "(free.index(i), count=2)",
        "(free.index(i), count=1)",
        "more|written|deadlock",
    ),
    "bytes in vain": (_BYTES, "3" + _BYTES[1:], "deadlock.*bytes to come"),
    "bytes unexpected": (_BYTES, _BYTES[4:], "nothing waits for|never|deadlock"),
    "missing fence": ("    fence_async_shared()\n", "", "no fence_async_shared"),
    "store not awaited": ("    tma.store_wait(0)\n", "", "never waited for"),
    "product not awaited": (
        _FINISH,
        _FINISH.replace("0", "1"),
        "before warpgroup_mma_wait|written",
    ),
    "product never awaited": (_FINISH, "", "before warpgroup_mma_wait|is written by"),
    "the other's rows": ("2 * stage + ID)", "2 * stage + 1 - ID)", None),
    "next stage": ("b_s.index(stage), b_o", "b_s.index((i + 1) % STAGES), b_o", "waits|never"),
    "copy too many": (_LOOP, _LOOP.replace("(n)", "(n + 1)"), "never waited for"),
    "lost turn": (_TURN, "        b_o", "deadlock.*named barrier"),
    "barrier without a start": (_INIT_FULL, "", "never initialised"),
    "barrier started twice": (_INIT_FULL, 2 * _INIT_FULL, "initialised twice"),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found_in_any_order(fault: str, seed: int) -> None:
    old, new, says = PLANTED[fault]
    module = planted(kernels, old, new)
    error, says = (LaneFault, f"(?s){says}") if says else (AssertionError, "Tensor-likes")
    with pytest.raises(error, match=says):
        run_pipeline(seed, module.pipeline)


def test_a_deadlock_says_who_waits_for_what() -> None:
    with pytest.raises(LaneFault) as caught:
        run_pipeline(0, planted(kernels, _RELEASE, "").pipeline)
    said = str(caught.value)
    assert "program (0, 0, 0)/2 _fill waits for parity 0 of mbarrier allocation 4[0][0]" in said
    assert "in phase 0, 2 of 2 arrivals and 0 bytes to come" in said


def test_a_seed_gives_the_same_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    for _ in range(2):
        with pytest.raises(LaneFault) as caught:
            run_pipeline(3, planted(kernels, _FINISH + _RELEASE, _RELEASE + _FINISH).pipeline)
        said.append(str(caught.value))
    assert said[0] == said[1]


# --- programs that hand over through global memory ---


def run_hand_over(seed: int, kernel: object, resident: int | None = None) -> None:
    """Add up 5 tiles by 5 programs."""
    x = torch.arange(5 * 128.0)
    part, out = torch.full((5 * 128,), torch.nan), torch.full((128,), torch.nan)
    arrived = torch.zeros(1, dtype=torch.int32)
    GluonLane(seed, resident).launch(kernel, (5,), x, part, arrived, out, 128)
    assert torch.equal(out, 2 * x.view(5, 128).sum(0)), "output"
    assert arrived.item() == 5


@pytest.mark.parametrize("resident", [None, 1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_programs_hand_over_in_any_order(seed: int, resident: int | None) -> None:
    run_hand_over(seed, kernels.hand_over, resident)


_ADD = 'gl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")'
UNORDERED = {
    "no barrier before the atomic": ("bar.sync 9, 128; // $0", "// $0", "part is read"),
    "relaxed": (_ADD, _ADD.replace("acq_rel", "relaxed"), "part is read"),
    "only released": (_ADD, _ADD.replace("acq_rel", "release"), "part is read"),
    "only acquired": (_ADD, _ADD.replace("acq_rel", "acquire"), "part is read"),
    "last but one": ("gl.num_programs(0) - 1:", "gl.num_programs(0) - 2:", "part is|output"),
    "everyone": ("if n_before == gl.num_programs(0) - 1:", "if n_before >= 0:", "part is|out is"),
    "wrong part": ("part + c * N + o_n, gl", "part + o_n, gl", "part is written"),
}


@pytest.mark.parametrize("resident", [None, 1])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", UNORDERED)
def test_a_wrong_hand_over_is_found_in_any_order(
    fault: str, seed: int, resident: int | None
) -> None:
    old, new, says = UNORDERED[fault]
    with pytest.raises(AssertionError, match=says):
        run_hand_over(seed, planted(kernels, old, new).hand_over, resident)


# --- values ---


def test_integers_divide_as_on_the_gpu() -> None:
    out = torch.full((32,), -99, dtype=torch.int64)
    GluonLane().launch(kernels.arithmetic, (1,), out, -7, 2, 0)
    assert out[:7].tolist() == [-3, -1, 7, 1, -5, 0, -7]
    assert out[8:16].tolist() == [-1, -1, 0, 0, 0, 0, 0, -99]
    assert out[16:25].tolist() == [0, 1, 3, 6, 10, 15, 21, 28, 12]


def test_float8_saturates() -> None:
    x = torch.tensor([1e6, -1e6, 447.0, 0.3] * 8)
    out = torch.zeros(32, dtype=torch.float8_e4m3fn)
    GluonLane().launch(kernels.to_float8, (1,), x, out, 32)
    assert out[:4].float().tolist() == [448, -448, 448, 0.3125]


def test_float8_operands_must_run_along_k() -> None:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=8, rank=2)
    x = torch.zeros(64, 64).to(torch.float8_e4m3fn)
    tile = TensorDescriptor.from_tensor(x, [64, 64], layout)
    with pytest.raises(LaneFault, match="contiguous along k"):
        GluonLane().launch(kernels.float8_across, (1,), tile, tile)


@pytest.mark.parametrize(
    ("kernel", "arguments", "says"),
    [
        ("reaches", (40, 32), "store of x reaches element 40 or 71 of 64"),
        ("reaches", (-1, 32), "reaches element -1"),
        ("overflows", (2**30,), "overflows in mul"),
        ("ranks_differ", (), "do not broadcast"),
        ("unknown", (), "does not know gl.histogram"),
        ("strange_assembly", (), "does not know the assembly 'nanosleep.u32 7'"),
        ("same_place", (), "x is written by .*nothing orders that"),
        ("tile_to_worker", (), "gets a tile"),
    ],
)
def test_what_a_gpu_would_not_say_is_said(
    kernel: str, arguments: tuple[int, ...], says: str
) -> None:
    with pytest.raises(LaneFault, match=f"(?s){says}"):
        GluonLane().launch(getattr(kernels, kernel), (1,), torch.zeros(64), *arguments)


def test_assembly_can_be_given_a_meaning() -> None:
    said = []
    lane = GluonLane(assembly={r"nanosleep\.u32 \d+": lambda *_: said.append("slept")})
    lane.launch(kernels.strange_assembly, (1,), torch.zeros(64))
    assert said == ["slept"]


def test_a_launcher_runs_in_the_lane() -> None:
    x = torch.zeros(64)
    before = kernels.reaches
    with GluonLane().patched(kernels):
        kernels.reaches[(1,)](x + 1, 0, N=32, num_warps=4)
        kernels.reaches[(1,)](x, 32, N=32)
    assert kernels.reaches is before
