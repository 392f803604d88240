"""What is shipped for users to test their machine with."""

from __future__ import annotations

import pytest
import torch

from sdvg_kernels import testing


def test_the_self_check_holds_in_every_lane_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert testing.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.endswith(" ok") for line in lines)
    said = " ".join(lines)
    for lane in testing.lanes():
        assert f"block_causal_attention {lane.name} " in said
    if not testing.host_lane_missing():
        assert "cache ops host on cpu" in said


def test_the_self_check_fails_where_an_op_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if testing.host_lane_missing():
        pytest.skip(testing.host_lane_missing())
    monkeypatch.setattr(testing, "lanes", list)
    stage = testing.stage_
    monkeypatch.setattr(
        testing,
        "stage_",
        lambda *a, implementation, **k: (
            None if implementation == "host" else stage(*a, implementation=implementation, **k)
        ),
    )
    assert testing.main() == 1
    assert "WRONG: k_cache is not what the reference leaves" in capsys.readouterr().out


def test_what_fails_in_a_process_of_its_own_says_how() -> None:
    # here it needs a GPU; there it is no implementation
    name = "reference" if not torch.cuda.is_available() else "none"
    assert testing.fails_alone(name).startswith("it failed in a process of its own: ")


def test_what_waits_for_ever_is_ended() -> None:
    assert testing.fails_alone("reference", 0.01) == "it did not come back within 0.01 s"
