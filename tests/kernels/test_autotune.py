"""autotune: what it chooses with a clock of the test's, and which files are believed."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from sdvg_kernels import _tuned, autotune
from sdvg_kernels._check import triton_reason
from sdvg_kernels.attention import config
from sdvg_kernels.autotune import Workload

pytest.importorskip("triton", reason="launches are Triton's")
GPU = "A GPU, 80GB"


@dataclass(frozen=True)
class Launch:
    tile: int
    reason: str


LAUNCHES = (Launch(1, "default"), Launch(2, "wider"), Launch(3, "widest"))


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file from this machine, and none that another test has read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SDVG_TUNED", raising=False)
    _tuned.forget()
    yield
    _tuned.forget()


def choose(key: str = "a", gpu: str | None = GPU, op: str = "op") -> Launch:
    return _tuned.choose(op, key, gpu, LAUNCHES[0], lambda: LAUNCHES)


def workload(key: str = "a", check: Callable[[torch.Tensor], None] = lambda _: None) -> Workload:
    """Return one whose output is the tile of the launch in force."""
    return Workload("op", key, "", LAUNCHES, lambda: torch.tensor(choose(key, None).tile), check)


def clock(times: dict[int, list[float]]) -> Callable[[Callable[[], object]], float]:
    """Return a timer: the times of each tile, one call after the other."""
    left = {tile: iter(values) for tile, values in times.items()}
    return lambda run: next(left[int(run())])


def test_the_fastest_over_all_workloads_of_a_key_is_chosen() -> None:
    # 2 is fastest on the first, 3 on both together
    timer = clock({1: [10, 100], 2: [6, 110], 3: [7, 80]})
    chosen = autotune.tune(iter([workload(), workload()]), timer)
    assert chosen["a"].launch == LAUNCHES[2]
    assert chosen["a"].share == pytest.approx((0.7 * 0.8) ** 0.5)


def test_a_gain_within_noise_keeps_the_default() -> None:
    timer = clock({1: [10], 2: [9.9], 3: [9.85]})
    assert autotune.tune(iter([workload()]), timer)["a"].launch == LAUNCHES[0]


def test_a_wrong_or_failing_candidate_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def check(out: torch.Tensor) -> None:
        assert out != 3, "3 is wrong"

    timer = clock({1: [10, 10], 2: [9, 9]})
    chosen = autotune.tune(iter([workload(check=check), workload(check=check)]), timer)
    assert chosen["a"].launch == LAUNCHES[1]
    assert "{'tile': 3} left out: 3 is wrong" in capsys.readouterr().out


def test_a_default_that_is_wrong_is_an_error() -> None:
    def check(out: torch.Tensor) -> None:
        assert out != 1, "1 is wrong"

    with pytest.raises(AssertionError, match="1 is wrong"):
        autotune.tune(iter([workload(check=check)]), clock({}))


def test_what_was_written_is_chosen_on_the_same_gpu_only() -> None:
    timer = clock({1: [10], 2: [5], 3: [9]})
    autotune.write(_tuned.path_of(GPU), GPU, {"op": autotune.tune(iter([workload()]), timer)})
    assert choose() == LAUNCHES[1]
    assert choose("b") == LAUNCHES[0]
    assert choose(op="other") == LAUNCHES[0]
    assert choose(gpu=None) == choose(gpu="Another GPU") == LAUNCHES[0]


def test_other_ops_of_a_file_stay_while_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    path = _tuned.path_of(GPU)
    best = {"a": autotune.Choice(LAUNCHES[1], 0.5)}
    autotune.write(path, GPU, {"op": best})
    autotune.write(path, GPU, {"other": best})
    assert choose() == choose(op="other") == LAUNCHES[1]
    # a file of another version is replaced as a whole
    monkeypatch.setattr(_tuned, "FORMAT", _tuned.FORMAT + 1)
    autotune.write(path, GPU, {"third": best})
    assert list(json.loads(path.read_text())["choices"]) == ["third"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 0}, "its format is 0, not 1"),
        ({"gpu": "Another GPU"}, "its gpu is 'Another GPU', not 'A GPU, 80GB'"),
        ({"triton": "1.0"}, "its triton is '1.0', not "),
        ({"sdvg_kernels": "0"}, "its sdvg_kernels is '0', not "),
        ({"choices": {"op": {"a": {"launch": {"tile": 7}}}}}, "tuned launch {'tile': 7} of 'a'"),
        ({"choices": {"op": {"a": {}}}}, "are ignored: 'launch'"),
        ({"choices": None}, "are ignored: "),
        (None, "are ignored: Expecting value"),
    ],
)
def test_a_file_that_does_not_fit_is_ignored_and_says_why(
    change: dict[str, object] | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = _tuned.path_of(GPU)
    autotune.write(path, GPU, {"op": {"a": autotune.Choice(LAUNCHES[1], 0.5)}})
    assert choose() == LAUNCHES[1]
    text = json.dumps(json.loads(path.read_text()) | change) if change else "half a fi"
    path.write_text(text)
    _tuned.forget()
    with caplog.at_level(logging.WARNING, "sdvg_kernels"):
        assert choose() == choose() == LAUNCHES[0]
    (said,) = caplog.messages
    assert reason in said


def test_sdvg_tuned_names_the_file_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    autotune.write(_tuned.path_of(GPU), GPU, {"op": {"a": autotune.Choice(LAUNCHES[1], 0.5)}})
    autotune.write(tmp_path / "mine.json", GPU, {"op": {"a": autotune.Choice(LAUNCHES[2], 0.5)}})
    assert choose() == LAUNCHES[1]
    for setting, launch in (("off", 0), (str(tmp_path / "mine.json"), 2), ("/nowhere", 0)):
        monkeypatch.setenv("SDVG_TUNED", setting)
        _tuned.forget()
        assert choose() == LAUNCHES[launch]
    # a file that was asked for, and is not there
    assert "tuned launches in /nowhere are ignored" in caplog.text


def test_without_a_gpu_it_is_one_sentence() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code = "import sys; from sdvg_kernels.autotune import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "autotune: it must run on a CUDA GPU, got none that torch finds\n"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_every_choice_of_attention_can_be_tuned(capability: tuple[int, int]) -> None:
    arch = {9: 90, 10: 100}.get(capability[0], 80)
    for (table_arch, dim, is_float32), table in config.LAUNCHES.items():
        for most, default in table if table_arch == arch else ():
            found = config.candidates(arch, dim, is_float32, most)
            assert found[0] == default
            assert len({tuple(_tuned.numbers(launch).items()) for launch in found}) == len(found)
            # a file that names the last of them
            dtype = torch.float32 if is_float32 else torch.bfloat16
            name = config.key(dim, is_float32, most)
            best = {name: autotune.Choice(found[-1], 0.5)}
            autotune.write(_tuned.path_of(GPU), GPU, {"attention": best})
            rows = most or 5000
            tuned = config.choose(capability, dim, dtype, rows, False, GPU)
            assert _tuned.numbers(tuned) == _tuned.numbers(found[-1])
            assert config.choose(capability, dim, dtype, rows, False) == default
            # measured without a bias: not believed with one
            biased = config.choose(capability, dim, dtype, rows, True, GPU)
            assert biased in (default, config.BIASED)


@pytest.mark.parametrize("op", ["modulation", "rope"])
def test_every_choice_of_the_other_ops_can_be_tuned(op: str) -> None:
    config = importlib.import_module(f"sdvg_kernels.{op}.config")
    cases = (
        {(most,): (most, 1560) for most, _ in config.LAUNCHES}
        if op == "modulation"
        else {
            (d, most): ((most or 8192) // d, d) for d in (64, 128) for most, _ in config.LAUNCHES[d]
        }
    )
    for which, shape in cases.items():
        found = config.candidates(*which)
        assert found[0] == config.choose(*shape)
        assert len({tuple(_tuned.numbers(launch).items()) for launch in found}) == len(found) > 1
        best = {config.key(*which): autotune.Choice(found[-1], 0.5)}
        autotune.write(_tuned.path_of(GPU), GPU, {op: best})
        assert config.choose(*shape, GPU) == found[-1]


@pytest.mark.skipif(bool(triton_reason("cpu")), reason="it runs in Triton's interpreter here")
@pytest.mark.parametrize("op", sorted(autotune.WORKLOADS))
def test_the_workloads_run_the_kernel_and_hold_it_to_the_reference(op: str) -> None:
    cpu = torch.device("cpu")
    work = {
        "attention": lambda: autotune._attend(cpu, (2, 40, 2, 64), "a", LAUNCHES),
        "modulation": lambda: next(autotune._modulation(cpu, 6, (64,))),
        "rope": lambda: next(autotune._rope(cpu, (1, 2, 3), (2,))),
    }[op]()
    out = work.run()
    work.check(out)
    first = out[0] if isinstance(out, tuple) else out
    first.view(-1)[5] += 1
    with pytest.raises(AssertionError, match="error"):
        work.check(out)


def test_a_forced_launch_is_over_when_its_block_is() -> None:
    with _tuned.force("op", "a", replace(LAUNCHES[0], tile=9)):
        assert choose().tile == choose(gpu=None).tile == 9
    assert choose().tile == 1


@pytest.mark.gpu
def test_every_candidate_of_short_queries_is_measured_or_left_out() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for dim, most, rows in ((128, 16, 1), (64, 64, 64)):
        key = config.key(dim, False, most)
        arch = {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)
        launches = config.candidates(arch, dim, False, most)[:4]
        work = autotune._attend(device, (rows, 2048, 4, dim), key, launches)
        chosen = autotune.tune(iter([work]), autotune.milliseconds)
        assert chosen[key].launch in launches
