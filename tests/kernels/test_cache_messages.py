"""What the cache ops say of bad input: one sentence, the same in every lane."""

from __future__ import annotations

import re

import pytest
import torch

import sdvg_kernels
from sdvg_kernels.testing import host_lane_missing

LIKE = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize("implementation", ["reference", "host"])
@pytest.mark.parametrize(
    ("layer", "error", "text"),
    [
        (torch.zeros(2, 3, 4, 6), ValueError, "must have shape [2, 3, 4, 5] and strides"),
        (torch.zeros(3, 2, 4, 5).transpose(0, 1), ValueError, "and strides [60, 20, 5, 1], got"),
        (LIKE.to(torch.int32), TypeError, "must be torch.float32, got torch.int32"),
        (LIKE.to("meta"), ValueError, "must be on cpu, got meta"),
        (LIKE[0], ValueError, "must have shape [2, 3, 4, 5] and strides"),
    ],
)
def test_a_layer_of_a_list_that_differs_gets_one_sentence_in_every_lane(
    implementation: str, layer: torch.Tensor, error: type[Exception], text: str
) -> None:
    if implementation == "host" and (missing := host_lane_missing()):
        pytest.skip(missing)
    if implementation == "host" and layer.is_meta:
        pytest.skip("torch runs the fake for a list with a meta tensor")
    caches = [[LIKE.clone() for _ in range(3)] for _ in range(2)]
    caches[1][2] = layer
    rows = torch.zeros(3, 2, 1, 4, 5)
    lengths = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(error, match=re.escape("PointerTable: tensors[2] must")) as caught:
        sdvg_kernels.stage_(*caches, rows, rows, lengths, implementation=implementation)
    assert text in str(caught.value)
    assert not caches[0][0].any()


i32 = torch.int32


@pytest.mark.parametrize("implementation", [None, "host"])
@pytest.mark.parametrize(
    ("op", "change", "error", "sentence"),
    [
        (
            "stage_",
            {"k_cache": torch.zeros(3, 8, 2, 4)},
            ValueError,
            "stage_: k_cache must be [layers, B, T, H, D], got [3, 8, 2, 4]",
        ),
        (
            "stage_",
            {"v_cache": torch.zeros(2, 3, 8, 2, 5)},
            ValueError,
            "stage_: v_cache must be [2, 3, 8, 2, 4] as k_cache, got [2, 3, 8, 2, 5]",
        ),
        (
            "stage_",
            {"v_cache": torch.zeros(2, 3, 8, 2, 4, dtype=torch.half)},
            TypeError,
            "stage_: v_cache must be torch.float32 as k_cache, got torch.float16",
        ),
        (
            "stage_",
            {"k_cache": torch.zeros(2, 3, 8, 4, 2).transpose(-1, -2)},
            ValueError,
            "stage_: k_cache must have contiguous [H, D], got strides [192, 64, 8, 1, 2]",
        ),
        (
            "stage_",
            {"key": torch.zeros(2, 2, 3, 2, 4)},
            ValueError,
            "stage_: key must be [layers, b, T, H, D] = [2, 3, T, 2, 4], got [2, 2, 3, 2, 4]",
        ),
        (
            "stage_",
            {"value": torch.zeros(2, 3, 4, 2, 4)},
            ValueError,
            "stage_: value must be [layers, b, T, H, D] = [2, 3, 3, 2, 4], got [2, 3, 4, 2, 4]",
        ),
        (
            "stage_",
            {"key": torch.zeros(2, 3, 7, 2, 4)},
            ValueError,
            "stage_: key must have at most S - sink = 6 tokens, got 7",
        ),
        (
            "stage_",
            {"key": torch.zeros(2, 3, 3, 2, 4).double()},
            TypeError,
            "stage_: key must be torch.float32 as the cache, got torch.float64",
        ),
        (
            "stage_",
            {"undo": (torch.zeros(1, 3, 3, 2, 4), torch.zeros(2, 3, 3, 2, 4))},
            ValueError,
            "stage_: undo[0] must be [layers, b, T, H, D] = [2, 3, 3, 2, 4], got [1, 3, 3, 2, 4]",
        ),
        (
            "stage_",
            {"lengths": torch.zeros(3)},
            TypeError,
            "stage_: lengths must be int32, got torch.float32",
        ),
        (
            "stage_",
            {"lengths": torch.zeros(2, dtype=i32)},
            ValueError,
            "stage_: lengths must be [B], contiguous, with B = 3, got [2]",
        ),
        (
            "stage_",
            {"batch_idx": torch.zeros(1)},
            TypeError,
            "stage_: batch_idx must be int32 or int64, got torch.float32",
        ),
        (
            "stage_",
            {"sink": 8},
            ValueError,
            "stage_: sink must be at least 0 and less than S = 8, got 8",
        ),
        (
            "stage_",
            {"key": torch.zeros(2, 3, 3, 2, 4, device="meta")},
            ValueError,
            "stage_: key must be on cpu as the cache, got meta",
        ),
        (
            "stage_",
            {"implementation": "triton"},
            ValueError,
            "stage_: implementation must be None, 'cuda' or 'reference', got 'triton'",
        ),
        (
            "stage_",
            {"implementation": "cuda"},
            NotImplementedError,
            "stage_: implementation must run on cpu, got 'cuda'; move the tensors to cuda or use"
            " 'reference'",
        ),
        (
            "commit_",
            {"accept": torch.zeros(3)},
            TypeError,
            "commit_: accept must be bool, got torch.float32",
        ),
        (
            "commit_",
            {"accept": torch.zeros(2, dtype=torch.bool)},
            ValueError,
            "commit_: accept must be [b], contiguous, with b = 3, got [2]",
        ),
        (
            "commit_",
            {"lengths": torch.zeros((), dtype=i32)},
            ValueError,
            "commit_: lengths must be [B], got []",
        ),
        (
            "select_",
            {"accept": torch.tensor(True)},
            ValueError,
            "select_: accept must be [B], got []",
        ),
        ("commit_", {"count": -1}, ValueError, "commit_: count must be at least 0, got -1"),
        (
            "compact_",
            {"path": torch.zeros(3, 2)},
            TypeError,
            "compact_: path must be int32, got torch.float32",
        ),
        (
            "compact_",
            {"path": torch.zeros(3, 7, dtype=i32)},
            ValueError,
            "compact_: path must have at most S - sink = 6 columns, got 7",
        ),
        (
            "select_",
            {"other": [torch.zeros(3, 4), torch.zeros(3, 4)]},
            ValueError,
            "select_: other must hold 1 tensors as draft, got 2",
        ),
        (
            "select_",
            {"other": [torch.zeros(3, 5)]},
            ValueError,
            "select_: other[0] must have the shape of draft[0], [3, 4], got [3, 5]",
        ),
        (
            "select_",
            {"draft": [torch.zeros(3, 8)[:, ::2]]},
            ValueError,
            "select_: draft[0] must have contiguous rows, got strides [8, 2]; make it with"
            " .contiguous()",
        ),
        (
            "select_",
            {"draft": [torch.zeros(3, 4).double()]},
            TypeError,
            "select_: other[0] must be torch.float64 as draft[0], got torch.float32",
        ),
        (
            "select_",
            {"draft": [torch.zeros(1, 4).expand(3, 4)]},
            ValueError,
            "select_: draft[0] must have rows that do not overlap, got strides [0, 1]; make it with"
            " .contiguous()",
        ),
    ],
)
def test_bad_input_gets_one_sentence(
    op: str,
    change: dict[str, object],
    error: type[Exception],
    sentence: str,
    implementation: str | None,
) -> None:
    if implementation and host_lane_missing():
        pytest.skip(host_lane_missing())
    good: dict[str, object] = {
        "k_cache": torch.zeros(2, 3, 8, 2, 4),
        "v_cache": torch.zeros(2, 3, 8, 2, 4),
        "key": torch.zeros(2, 3, 3, 2, 4),
        "value": torch.zeros(2, 3, 3, 2, 4),
        "lengths": torch.zeros(3, dtype=i32),
        "accept": torch.zeros(3, dtype=torch.bool),
        "path": torch.zeros(3, 2, dtype=i32),
        "count": 3,
        "sink": 2,
        "draft": [torch.zeros(3, 4)],
        "other": [torch.zeros(3, 4)],
    }
    names = {
        "stage_": ("k_cache", "v_cache", "key", "value", "lengths", "sink"),
        "commit_": ("lengths", "accept", "count"),
        "compact_": ("k_cache", "v_cache", "lengths", "path", "sink"),
        "select_": ("accept", "draft", "other"),
    }
    arguments = {name: good[name] for name in names[op]}
    function = getattr(sdvg_kernels, op)
    arguments["implementation"] = implementation
    function(**arguments)
    with pytest.raises(error) as caught:
        function(**{**arguments, **change})
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("layers", "error", "sentence"),
    [
        ([], ValueError, "PointerTable: tensors must hold at least one layer, got none"),
        (
            [torch.zeros(2, 3)],
            ValueError,
            "PointerTable: tensors[0] must be [B, S, H, D], got [2, 3]",
        ),
        (
            [torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 3, 4)],
            ValueError,
            "PointerTable: tensors[1] must have shape [1, 2, 3, 4] and strides [24, 12, 4, 1], got"
            " [1, 3, 3, 4] and [36, 12, 4, 1]",
        ),
        (
            [torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4).half()],
            TypeError,
            "PointerTable: tensors[1] must be torch.float32, got torch.float16",
        ),
    ],
)
def test_layers_that_differ_are_refused(
    layers: list[torch.Tensor], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error) as caught:
        sdvg_kernels.PointerTable(layers)
    assert str(caught.value) == sentence


def test_a_request_that_cannot_be_served_says_why() -> None:
    lengths, accept = torch.zeros(1, dtype=i32), torch.ones(1, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match=r"commit_: implementation must run on cpu"):
        sdvg_kernels.commit_(lengths, accept, 1, implementation="cuda")
    assert not lengths.any()


def test_implementations_name_the_reason() -> None:
    from sdvg_kernels.cache import implementations

    found = implementations()
    assert list(found) == ["cuda", "reference"]
    assert found["reference"] == ""
    if not torch.cuda.is_available():
        assert found["cuda"] == "torch finds no CUDA device"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"batch_idx": torch.tensor([1, 1])},
            "stage_: batch_idx must name distinct sequences of the cache, below B = 2, got [1, 1]",
        ),
        (
            {"batch_idx": torch.tensor([0, 2])},
            "stage_: batch_idx must name distinct sequences of the cache, below B = 2, got [0, 2]",
        ),
        (
            {"lengths": torch.tensor([0, -1], dtype=torch.int32)},
            "stage_: lengths must be at least 0, got -1",
        ),
        ({"undo": torch.zeros(2)}, "stage_: undo must be a pair (undo_k, undo_v), got Tensor"),
    ],
)
def test_broken_preconditions_are_one_sentence_on_the_cpu(
    change: dict[str, object], text: str
) -> None:
    cache, rows = torch.zeros(1, 2, 4, 1, 8), torch.zeros(1, 2, 3, 1, 8)
    given = {"lengths": torch.zeros(2, dtype=torch.int32), "implementation": "reference"} | change
    with pytest.raises(ValueError, match=re.escape(text)):
        sdvg_kernels.stage_(cache, cache.clone(), rows, rows, **given)


def test_a_path_beyond_the_ring_is_one_sentence_on_the_cpu() -> None:
    cache, path = torch.zeros(1, 1, 4, 1, 8), torch.tensor([[0, 3]], dtype=torch.int32)
    lengths = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="path must stay within the ring, below S - sink = 3"):
        sdvg_kernels.compact_(cache, cache.clone(), lengths, path, sink=1)


def test_select_refuses_a_draft_whose_rows_overlap() -> None:
    accept, row = torch.zeros(2, dtype=torch.bool), torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"draft\[0\] must have rows that do not overlap"):
        sdvg_kernels.select_(accept, [row.expand(2, 4)], [torch.ones(2, 4)])
