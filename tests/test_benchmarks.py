"""The harness refuses what was not verified; all benchmarks run on a CPU, small and unrecorded."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import bench_attention, harness, machine, run_all
from benchmarks.bench_attention import Shape
from benchmarks.harness import RESULTS, Bench, Candidate, Case, Plan, Row, Unavailable
from benchmarks.peers import Attention, Peer, attention_peers
from sdvg_kernels import block_causal_attention


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread, as the smoke lane does: its cases are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _right(_: object) -> None:
    pass


def _wrong(_: object) -> None:
    raise AssertionError("error 3, allowed 1")


def _plan(*candidates: Candidate, **options: object) -> Plan:
    return Plan("a case", lambda: Case("op", "T=1", "float32", candidates, **options))


def _works() -> torch.Tensor:
    return torch.ones(4)


@pytest.mark.parametrize("name", run_all.budgets())
def test_each_benchmark_verifies_and_times_on_a_cpu(name: str, tmp_path: Path) -> None:
    plans = importlib.import_module(f"benchmarks.{name}").plans
    assert harness.main(name, plans, ["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / f"{name}.json").read_text())
    assert rows
    for row in rows:
        assert tuple(row) == Row._fields
        assert row["gpu"] == "cpu"
        assert row["verified"] is True
        assert row["us"] > 0
    page = (tmp_path / f"{name}.md").read_text()
    assert all(row["shape"] in page for row in rows)


def test_each_benchmark_is_named_in_the_readme() -> None:
    text = (machine.ROOT / "benchmarks" / "README.md").read_text()
    files = sorted(path.stem for path in (machine.ROOT / "benchmarks").glob("bench_*.py"))
    assert [name for name in files if f"| `{name}` |" not in text] == []


def test_a_wrong_output_gets_no_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench("bench", "cpu", tmp_path)
    capsys.readouterr()
    ours, peer = Candidate("ours", _works, _wrong), Candidate("peer", _works, _right, peer=True)
    assert bench.run([_plan(ours, peer)]) == 1
    assert json.loads((tmp_path / "bench.json").read_text()) == []
    said = capsys.readouterr().out
    assert "FAILED, no figure: op T=1 ours: error 3, allowed 1" in said
    assert " us |" not in said


def test_a_wrong_peer_is_left_out_by_name(tmp_path: Path) -> None:
    bench = Bench("bench", "cpu", tmp_path)
    ours, peer = Candidate("ours", _works, _right), Candidate("peer", _works, _wrong, peer=True)
    assert bench.run([_plan(ours, peer)]) == 0
    (row,) = bench.rows
    assert (row.implementation, row.best_peer, row.ratio) == ("ours", None, None)
    assert "peer: error 3, allowed 1" in (tmp_path / "bench.md").read_text()


def test_a_case_that_cannot_be_built_stops_no_other() -> None:
    def broken() -> Case:
        raise RuntimeError("no such kernel")

    def elsewhere() -> Case:
        raise Unavailable("needs another machine")

    bench = Bench("bench", "cpu", None)
    plans = [
        Plan("first", broken),
        Plan("second", elsewhere),
        _plan(Candidate("ours", _works, _right)),
    ]
    assert bench.run(plans) == 1
    assert [row.implementation for row in bench.rows] == ["ours"]
    assert bench.failed == ["first: RuntimeError: no such kernel"]
    assert bench.left_out == ["second: needs another machine"]


def test_no_case_begins_after_the_budget() -> None:
    bench = Bench("bench", "cpu", None, budget=-1)
    assert bench.run([_plan(Candidate("ours", _works, _wrong))]) == 0
    assert bench.left_out == ["a case: the time budget was spent"]


def test_cpu_figures_never_enter_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--out", str(RESULTS / "cpu")]
    assert harness.main("bench_cache", lambda bench: [], arguments) == 2
    assert "must lie outside benchmarks/results for cpu" in capsys.readouterr().err
    assert not (RESULTS / "cpu").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_default_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.main("bench_cache", lambda bench: [], []) == 2
    assert "--device cpu is the smoke lane" in capsys.readouterr().err


def test_figures_follow_from_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("bench", "cpu", None)
    bench.limits = {"GB/s": 1000.0, "TFLOP/s": 100.0}
    times = {"ours": 20.0, "slow": 60.0, "fast": 30.0}
    monkeypatch.setattr(harness, "measure", lambda *_, **__: times)
    candidates = [Candidate(name, _works, _right, peer=name != "ours") for name in times]
    bench.run([_plan(*candidates, flops=2e8, bytes=8e6, units=2)])
    ours, slow, fast = bench.rows
    assert ours.us == 10
    assert ours.tflops == pytest.approx(20)
    assert ours.gbps == pytest.approx(800)
    # 8 us for the bytes, 2 us for the arithmetic
    assert ours.limit_share == pytest.approx(0.8)
    assert (ours.best_peer, ours.ratio) == ("fast", pytest.approx(1.5))
    assert slow.ratio == pytest.approx(0.5)
    assert fast.ratio == 1


def test_candidates_take_turns() -> None:
    called: list[str] = []
    runs: dict[str, Callable[[], object]] = {
        name: lambda name=name: called.append(name) for name in "abc"
    }
    harness.measure(runs, 0, torch.device("cpu"), at_least=3)
    # one round to guess by, then three
    assert "".join(called) == "abc" + "abc" + "bca" + "cab"


def test_an_unfinished_run_has_written_its_finished_cases(tmp_path: Path) -> None:
    bench = Bench("bench", "cpu", tmp_path)

    def second() -> Case:
        assert len(json.loads((tmp_path / "bench.json").read_text())) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run([_plan(Candidate("ours", _works, _right)), Plan("second", second)])
    assert len(json.loads((tmp_path / "bench.json").read_text())) == 1


def test_one_failed_benchmark_fails_the_run_but_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = iter([0, 3, 0])
    monkeypatch.setattr(run_all, "budgets", lambda *_: dict.fromkeys("abc", 1.0))
    monkeypatch.setattr(run_all, "run", lambda *_: next(codes))
    assert run_all.main(["--device", "cpu"]) == 1
    assert "failed with exit code 3" in capsys.readouterr().out
    assert next(codes, "all ran") == "all ran"


def test_a_benchmark_that_hangs_is_ended() -> None:
    assert run_all.run("harness", [], 0.01) == 124


@pytest.mark.parametrize("part", run_all.PARTS)
def test_all_budgets_of_a_part_end_within_ten_minutes(part: str) -> None:
    budgets = run_all.budgets(part)
    # a process takes 10 s to start, and a last case some beyond the budget
    assert sum(budgets.values()) + 20 * len(budgets) <= 10 * 60


def test_each_benchmark_is_of_one_part() -> None:
    parts = [run_all.budgets(part) for part in run_all.PARTS]
    assert all(parts)
    assert run_all.budgets() == {name: budget for part in parts for name, budget in part.items()}
    assert set(run_all.BUDGETS) <= set(run_all.budgets())


def test_without_git_the_version_follows_the_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "a.cu"
    source.write_text("first")
    before = machine.commit()
    assert before.startswith("tree-")
    source.write_text("second")
    assert machine.commit() not in (before, "")
    source.write_text("first")
    assert machine.commit() == before


def test_the_visible_slots_are_those_that_the_op_attends_to() -> None:
    shape = Shape(1, 12, 1, slots=40, length=57, dim=8, sink=4, window=24, blocks=2)
    query = torch.randn(1, 12, 1, 8, dtype=torch.float64)
    cache = torch.randn(2, 1, 40, 1, 8, dtype=torch.float64)
    lengths = torch.tensor([57], dtype=torch.int32)

    def attend() -> torch.Tensor:
        return block_causal_attention(query, *cache, lengths, block_size=6, sink=4, window=24)

    before, visible = attend(), shape.visible()
    for slot in range(40):
        kept = cache[1, 0, slot].clone()
        cache[1, 0, slot] += 1
        changed = (attend() != before).flatten(2).any(2)[0]
        cache[1, 0, slot] = kept
        assert changed[:6].all() == changed[:6].any() == visible[0, slot]
        assert changed[6:].all() == changed[6:].any() == visible[1, slot]


def test_what_computes_in_eight_bits_has_rows_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("bench", "cpu", None)
    shape = Shape(1, 12, 2, 36, 36, dim=64)
    with pytest.raises(Unavailable, match=r"nobody computes in 8 bits here: sage: \w+"):
        bench_attention.case(bench, shape, eight_bits=True)

    (peer,) = (peer for peer in attention_peers(bench.device) if peer.name == "sdpa")
    coarse = peer._replace(name="coarse", build=lambda: _rounded(8), quantized=True)
    broken = peer._replace(name="broken", build=lambda: _rounded(1), quantized=True)
    monkeypatch.setattr(bench_attention, "attention_peers", lambda device: [peer, coarse, broken])
    plan = Plan("in 8 bits", lambda: bench_attention.case(bench, shape, eight_bits=True))
    assert bench.run([plan]) == 0
    assert [row.implementation for row in bench.rows] == ["reference (bfloat16)", "coarse"]
    assert {row.dtype for row in bench.rows} == {"float8_e4m3fn"}
    assert "signal to noise is" in bench.left_out[0]
    # ... and is nobody's peer in 16
    bench.rows.clear()
    bench.run([Plan("in 16 bits", lambda: bench_attention.case(bench, shape))])
    assert [row.implementation for row in bench.rows] == ["reference", "sdpa"]


def test_ours_in_eight_bits_reads_caches_of_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def attend(*arguments: object, implementation: str, **options: object) -> torch.Tensor:
        # the reference stands in for the kernel
        given.append((implementation, options.get("k_cache")))
        return block_causal_attention(*arguments, **options, implementation="reference")

    monkeypatch.setattr(bench_attention, "block_causal_attention", attend)
    monkeypatch.setattr(bench_attention, "_who", lambda *_: (["hopper_fp8", "reference"], [], {}))
    bench = Bench("bench", "cpu", None)
    shape = Shape(2, 12, 2, 40, 57, dim=64, sink=4, window=24)
    case = bench_attention.case(bench, shape, eight_bits=True)
    for candidate in case.candidates:
        given.clear()
        candidate.check(candidate.run())
        ((name, cache),) = given
        assert cache.dtype is (torch.float8_e4m3fn if name == "hopper_fp8" else torch.float32)


def test_a_kernel_that_fails_alone_costs_nobody_else_his_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = {"triton": "", "hopper": "", "reference": ""}
    monkeypatch.setattr(bench_attention, "implementations", lambda: {"attention": served})
    for reason in ("it did not come back within 60 s", ""):
        monkeypatch.setattr(bench_attention, "fails_alone", lambda *_, reason=reason: reason)
        shape = Shape(1, 12, 2, 36, 36, dim=64)
        names, _, left_out = bench_attention._who(shape, torch.device("cuda"), False)
        assert names == (["triton"] if reason else ["triton", "hopper"])
        assert left_out.get("hopper", "") == reason


def _rounded(steps: int) -> Attention:
    """Return an attention whose output is rounded to multiples of 0.25 / steps."""

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: object) -> torch.Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return (out * 4 * steps).round() / (4 * steps)

    return run


@pytest.mark.parametrize("peer", attention_peers(torch.device("cpu")), ids=lambda peer: peer.name)
def test_each_peer_runs_here_or_says_why_not(peer: Peer) -> None:
    assert peer.what
    if not peer.reason:
        query = torch.randn(1, 3, 2, 8)
        assert peer.build()(query, query, query, None).shape == query.shape


@pytest.mark.gpu
def test_a_graph_that_computes_something_else_is_caught() -> None:
    bench = Bench("bench", "cuda", None)
    out = torch.zeros(8, device="cuda")

    def run() -> torch.Tensor:
        # right eagerly, wrong in the graph
        return out.fill_(2.0 if torch.cuda.is_current_stream_capturing() else 1.0)

    def check(got: object) -> None:
        assert torch.equal(got, torch.ones_like(got)), "not ones"

    assert bench.run([_plan(Candidate("ours", run, check, reset=out.zero_))]) == 1
    assert bench.rows == []


@pytest.mark.gpu
def test_eight_times_the_work_takes_at_least_four_times_as_long() -> None:
    small, large = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for n in (2048, 4096))
    runs = {str(len(x)): harness.capture(lambda x=x: x @ x)[0] for x in (small, large)}
    times = harness.measure(runs, 0.2, torch.device("cuda"))
    assert times["4096"] > 4 * times["2048"]


@pytest.mark.gpu
def test_a_buffer_that_fits_in_the_cache_is_read_from_memory() -> None:
    bench = Bench("bench", "cuda", None)
    size = 1 << 23
    source = torch.randint(0, 9, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    replay, _ = harness.capture(lambda: target.copy_(source))
    us = harness.measure({"copy": replay}, 0.2, bench.device)["copy"]
    # writes may stay in the cache, reads come from memory
    assert size / us / 1e3 < bench.limits["GB/s"]
