"""codegen: what it reads from machine code, and that it fails over a budget."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdvg_kernels import codegen
from sdvg_kernels._budget import SHARED_LIMIT, Budget
from sdvg_kernels.attention import config

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton", reason="codegen compiles Triton kernels")


WAITS = "a main loop without a wgmma wait above 0"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python without the interpreter that other tests use: it would hide the compiler."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run codegen as a user does."""
    return python("-m", "sdvg_kernels.codegen", *arguments)


def test_every_architecture_is_compiled_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    done = run("--kernel", "route", "--json", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert {row["arch"] for row in rows} == {f"sm_{arch}" for arch in SHARED_LIMIT}
    for row in rows:
        assert row["kernel"] in done.stdout
        assert 0 < row["registers"] <= 255
        assert row["spill_bytes"] == 0
        assert row["over"] == ""


def test_an_unknown_kernel_is_an_error() -> None:
    done = run("--kernel", "nothing")
    assert done.returncode == 1
    assert "--kernel must name a kernel, got 'nothing'" in done.stderr


@pytest.mark.parametrize(
    ("facts", "budget", "text"),
    [
        ((200, 0, 0, {}), Budget(registers=128), "200 registers of 128"),
        ((200, 0, 8, {}), Budget(), "8 bytes spilled of 0"),
        ((9, 240_000, 0, {}), Budget(), "240000 bytes of shared memory of 232448"),
        ((9, 0, 0, {"HMMA": 64}), Budget(matrix="HGMMA"), "no HGMMA instruction"),
        ((9, 0, 0, {"HGMMA": 64}), Budget(matrix="HGMMA"), ""),
        ((9, 0, 0, {}), Budget(wide=18), "0 16-byte accesses of 18"),
        ((9, 0, 0, {}, ((0, 1), (1,))), Budget(overlapped=True), ""),
        ((9, 0, 0, {}, ((0, 1), (0,))), Budget(overlapped=True), WAITS),
        ((9, 0, 0, {}, ()), Budget(overlapped=True), WAITS),
        ((9, 0, 0, {}, (), (240, 24)), Budget(setmaxnreg=(24, 240)), ""),
        ((9, 0, 0, {}, (), (24,)), Budget(setmaxnreg=(24, 240)), "no setmaxnreg 240"),
        ((9, 0, 0, {}, (), (), True), Budget(), "ptxas serialized the warpgroup products"),
    ],
)
def test_a_kernel_over_its_budget_says_so(
    facts: tuple[object, ...], budget: Budget, text: str
) -> None:
    assert codegen._row("kernel", 90, "", codegen._Facts(*facts), budget).over == text


def test_every_op_with_a_kernel_is_compiled() -> None:
    files = [
        f for stem in ("kernel", "hopper*") for f in (ROOT / "sdvg_kernels").glob(f"*/{stem}.py")
    ]
    named = {f"sdvg_kernels.{file.parent.name}.{file.stem}" for file in files}
    assert "sdvg_kernels.attention.kernel" in named
    assert set(codegen.rooms()) == named


def test_a_room_without_compilations_fails_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(codegen, "rooms", lambda: ["sdvg_kernels._budget"])
    before = dict(os.environ)
    assert codegen.main(["--kernel", "none", "--no-cuda"]) == 1
    # once it left the interpreter off for whatever ran after it
    assert dict(os.environ) == before
    assert "_budget must export compilations(arch), got none" in capsys.readouterr().err


def test_gluon_kernels_are_held_to_what_their_pipeline_needs() -> None:
    done = python(str(ROOT / "tests" / "kernels" / "gluon_probe.py"))
    assert done.returncode == 0, done.stderr
    well, waiting, touched = json.loads(done.stdout)
    assert well["over"] == ""
    assert well["pipeline"] == "waits 1; setmaxnreg 232 24"
    assert well["matrix"] == "4 HGMMA"
    # two stages of 8 KB and A, beside the barriers
    assert well["shared_bytes"] >= 3 * 64 * 64 * 2
    assert waiting["over"] == WAITS
    assert touched["over"] == "ptxas serialized the warpgroup products"


def test_the_main_loop_is_the_innermost_one_with_products() -> None:
    ptx = """
$L__BB0_1:                              // =>This Loop Header: Depth=1
                                        //     Child Loop BB0_2 Depth 2
    wgmma.mma_async.sync.aligned
    wgmma.wait_group.sync.aligned 0;
$L__BB0_2:                              //   Parent Loop BB0_1 Depth=1
                                        // =>  This Inner Loop Header: Depth=2
    wgmma.mma_async.sync.aligned
    wgmma.wait_group.sync.aligned 1;
// %bb.3:                               //   in Loop: Header=BB0_2 Depth=2
    wgmma.wait_group.sync.aligned 0;
$L__BB0_4:
    wgmma.mma_async.sync.aligned
    wgmma.wait_group.sync.aligned 0;
"""
    assert codegen._main_loop_waits(ptx) == ((1, 0),)


def test_spilled_bytes_are_counted_by_width() -> None:
    code = "STL [R1], R2\n LDL.64 R4, [R1]\n STL.128 [R1], R8\n LDL.LU.U8 R0, [R1]\n STS [R1], R2"
    assert codegen._spilled(code) == 4 + 8 + 16 + 1


def test_every_cuda_kernel_has_a_budget_beside_it() -> None:
    for source in codegen._SOURCES.glob("*.cu"):
        kernels = re.findall(r"struct (\w+) \{\n  static constexpr int kPhases", source.read_text())
        assert kernels, source.name
        for kernel in kernels:
            assert codegen._cuda_budget(f"run_on_device {kernel}").registers < 255, kernel


def test_mangled_names_become_readable() -> None:
    name = (
        "_ZN4sdvg13run_on_deviceINS_45_GLOBAL__N__f1456857_8_cache_cu_e877675a_7483"
        "11CompactRowsItEEEEvT_"
    )
    assert codegen._demangled(name) == "run_on_device CompactRows<uint16>"


def test_large_attention_tiles_must_have_warpgroup_products() -> None:
    for (arch, _, is_float32), table in config.LAUNCHES.items():
        if arch == 90 and not is_float32:
            large = table[-1][1]
            assert config.budget(arch, large.BT, torch.bfloat16).matrix == "HGMMA"
            assert large.BT == 128
