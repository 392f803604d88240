"""What every decoder of token grids refuses, in the same sentences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sdvg.models.drafter import EagleDrafter
from sdvg.models.tokens import LlamaSizes, TokenLlama
from sdvg.tokens import DiagonalDecoder, JacobiDecoder, Layout, Sampling, SpeculativeDecoder
from sdvg.tokens.embedded import EmbeddedVideos

LAYOUT = Layout(2, 3, 5, first=2, extra=1)
PROMPTS = torch.zeros(2, 1, dtype=torch.int64)
ACTIONS = torch.zeros(2, 1, 1, dtype=torch.int64)
Decoder = DiagonalDecoder | JacobiDecoder | SpeculativeDecoder


@pytest.fixture(scope="module")
def model() -> TokenLlama:
    torch.manual_seed(0)
    return TokenLlama(LlamaSizes(1, 16, 2, 1, 8, 16, 8)).eval().requires_grad_(False)


@pytest.fixture(params=["diagonal", "jacobi", "speculative"])
def made(request: pytest.FixtureRequest, model: TokenLlama) -> tuple[str, Decoder]:
    if request.param == "diagonal":
        return request.param, DiagonalDecoder(model, LAYOUT, k=1)
    if request.param == "speculative":
        drafter = EagleDrafter(model.sizes).eval().requires_grad_(False)
        return request.param, SpeculativeDecoder(model, drafter, LAYOUT, depth=2, top_k=2)
    return request.param, JacobiDecoder(model, LAYOUT, window=2)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"temperature": -1}, ValueError, "temperature must be finite and at least 0, got -1"),
        ({"temperature": np.nan}, ValueError, "temperature must be finite and at least 0, got nan"),
        ({"temperature": np.inf}, ValueError, "temperature must be finite and at least 0, got inf"),
        ({"temperature": "0.9"}, TypeError, "temperature must be a number, got '0.9'"),
        ({"temperature": None}, TypeError, "temperature must be a number, got None"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 2.5}, TypeError, "top_k must be a whole number, got 2.5"),
        ({"top_p": 0}, ValueError, "top_p must lie in (0, 1], got 0"),
        ({"top_p": 1.5}, ValueError, "top_p must lie in (0, 1], got 1.5"),
        ({"top_p": np.nan}, ValueError, "top_p must lie in (0, 1], got nan"),
        ({"guidance": np.nan}, ValueError, "guidance must be finite, got nan"),
        ({"guidance": "7"}, TypeError, "guidance must be a number, got '7'"),
    ],
)
def test_sampling_that_cannot_be_is_refused_when_it_is_made(
    options: dict[str, object], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind) as caught:
        Sampling(**options)
    assert str(caught.value) == f"sampling: {text}"


def test_numbers_of_numpy_are_numbers(model: TokenLlama) -> None:
    how = Sampling(np.float32(0.5), np.int64(2), np.float64(0.9))
    decoder = JacobiDecoder(model, LAYOUT, window=np.int64(3), sampling=how)
    run = decoder.generate(
        PROMPTS, frames=np.int32(2), actions=ACTIONS, seed=np.int64(1), sequences=torch.arange(2)
    )
    assert sorted(frame.index for frame in run for _ in frame.rows) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("sizes", "kind", "text"),
    [
        ((0, 3, 5), ValueError, "height must be at least 1, got 0"),
        ((2, "3", 5), TypeError, "width must be a whole number, got '3'"),
        ((2, 3, 0), ValueError, "codes must be at least 1, got 0"),
        ((2, 3, 5, 0, -1), ValueError, "extra must be at least 0, got -1"),
        ((2, 3, 5, 0, 0, 1.0), TypeError, "eol must be a whole number, got 1.0"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(
    sizes: tuple[object, ...], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind) as caught:
        Layout(*sizes)
    assert str(caught.value) == f"layout: {text}"


def test_a_layout_must_lie_in_the_models_vocabulary(model: TokenLlama) -> None:
    text = r"codes must lie in the vocabulary of 8, got \[4, 9\)"
    with pytest.raises(ValueError, match=f"diagonal: {text}"):
        DiagonalDecoder(model, Layout(2, 3, 5, first=4), k=1)
    with pytest.raises(ValueError, match=f"jacobi: {text}"):
        JacobiDecoder(model, Layout(2, 3, 5, first=4))
    with pytest.raises(ValueError, match="diagonal: eol must lie in the vocabulary of 8, got 8"):
        DiagonalDecoder(model, Layout(2, 3, 5, eol=8), k=1)
    with pytest.raises(TypeError, match="diagonal: k must be a whole number, got '1'"):
        DiagonalDecoder(model, LAYOUT, k="1")
    with pytest.raises(TypeError, match="jacobi: window must be a whole number, got '4'"):
        JacobiDecoder(model, LAYOUT, window="4")


def _ids(*shape: int, value: int = 0) -> Tensor:
    return torch.full(shape, value)


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"frames": 0}, ValueError, "frames must be at least 1, got 0"),
        ({"frames": "2"}, TypeError, "frames must be a whole number, got '2'"),
        ({"prompts": [[0]]}, TypeError, "prompts must be a tensor of ids, got list"),
        ({"prompts": _ids(3)}, ValueError, "prompts must be ids [B, P >= 1], got [3]"),
        ({"prompts": _ids(2, 0)}, ValueError, "prompts must be ids [B, P >= 1], got [2, 0]"),
        (
            {"prompts": _ids(2, 1, value=8)},
            ValueError,
            "prompts must lie in the vocabulary of 8, got ids from 8 to 8",
        ),
        ({"prompts": _ids(2, 1).float()}, TypeError, "prompts must be int32 or int64, got torch.f"),
        ({"uncond": _ids(2, 1)}, ValueError, "uncond must be given with guidance and only then, "),
        ({"actions": None}, ValueError, "actions must be given for 1 tokens between frames, got N"),
        ({"actions": [[1]]}, ValueError, "actions must be given for 1 tokens between frames, got "),
        ({"actions": _ids(2, 1)}, ValueError, "actions must be [2, 1, 1], got [2, 1]"),
        ({"seed": "3"}, TypeError, "seed must be a whole number, got '3'"),
        ({"seed": 0.5}, TypeError, "seed must be a whole number, got 0.5"),
        ({"sequences": [0]}, ValueError, "sequences must be 2, one each, got 1"),
        ({"sequences": [0, 1, 2]}, ValueError, "sequences must be 2, one each, got 3"),
        ({"sequences": "01"}, TypeError, "sequences must be whole numbers, one each, got '01'"),
        ({"sequences": 1}, TypeError, "sequences must be whole numbers, one each, got 1"),
        ({"sequences": [0, 0.5]}, TypeError, "sequences must be a whole number, got 0.5"),
    ],
)
def test_all_decoders_refuse_the_same_in_one_sentence(
    made: tuple[str, Decoder], given: dict[str, object], kind: type[Exception], text: str
) -> None:
    name, decoder = made
    given = {"prompts": PROMPTS, "frames": 2, "actions": ACTIONS, **given}
    with pytest.raises(kind) as caught:
        decoder.generate(**given)
    assert str(caught.value).startswith(f"{name}: {text}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "kind", "text"),
    [
        (lambda rows: _ids(rows, 1, value=9), ValueError, "actions must lie in the vocabulary of"),
        (lambda rows: _ids(rows), ValueError, "actions must be ["),
        (lambda rows: [[1]] * rows, TypeError, "actions must be a tensor of ids, got list"),
    ],
)
def test_an_action_that_comes_late_is_checked_too(
    made: tuple[str, Decoder],
    ids: Callable[[int], object],
    kind: type[Exception],
    text: str,
) -> None:
    name, decoder = made
    run = decoder.generate(PROMPTS, frames=2, actions=lambda _, rows: ids(len(rows)))
    with pytest.raises(kind) as caught:
        list(run)
    assert str(caught.value).startswith(f"{name}: {text}")
    with pytest.raises(RuntimeError, match=f"{name}: a generation must not go on after an error"):
        next(run)


def test_no_prompts_are_no_frames(made: tuple[str, Decoder]) -> None:
    _, decoder = made
    assert list(decoder.generate(PROMPTS[:0], frames=2, actions=ACTIONS[:0])) == []


@pytest.fixture(scope="module")
def embedded() -> EmbeddedVideos:
    pytest.importorskip("diffusers", reason="the tokenizer is a diffusers class")
    pytest.importorskip("transformers", reason="the model is a transformers class")
    from sdvg.models.embedded import tokens

    return EmbeddedVideos(tokens.load(), k=1)


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        (
            {"prompts": "a seven"},
            ValueError,
            "prompts must be a non-empty list of texts, got 'a se",
        ),
        ({"prompts": []}, ValueError, "prompts must be a non-empty list of texts, got []"),
        ({"prompts": ["a six", 3]}, TypeError, "a prompt must be a text, got 3"),
        ({"prompts": [" "]}, ValueError, "a prompt must not be empty, got ' '"),
        ({"frames": "2"}, TypeError, "frames must be a whole number, got '2'"),
        ({"actions": [[0]]}, TypeError, "actions must be a tensor or a callable, got l"),
        (
            {"actions": _ids(1, 1, value=17)},
            ValueError,
            "actions must lie in [0, 17), got 17 to 17",
        ),
    ],
)
def test_videos_of_prompts_are_refused_in_one_sentence(
    given: dict[str, object], kind: type[Exception], text: str, embedded: EmbeddedVideos
) -> None:
    with pytest.raises(kind) as caught:
        embedded.generate(**{"prompts": ["a six"], "frames": 2, **given})
    assert str(caught.value).startswith(f"tokens: {text}")


def test_an_older_iterator_over_pixels_does_not_give_the_newers_frames(
    embedded: EmbeddedVideos,
) -> None:
    """It ran the newer one's generation, and took its frames away."""
    older = embedded.generate(["a six"], frames=1)
    embedded.generate(["a two"], frames=1)
    with pytest.raises(RuntimeError, match="diagonal: a decoder must run one generation at a time"):
        next(older)


def test_a_window_has_a_default(embedded: EmbeddedVideos) -> None:
    assert EmbeddedVideos(embedded.models, mode="scd").decoder.window == 16
    with pytest.raises(ValueError, match="tokens: mode must be one of raster, spatial, spatiotemp"):
        EmbeddedVideos(embedded.models, mode="jacobi", k=2)
