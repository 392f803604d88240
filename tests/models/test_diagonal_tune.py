"""What diagonal fine-tuning shows the model is what diagonal decoding will show it."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="the tokenizer is a diffusers class")
pytest.importorskip("transformers", reason="the model is a transformers class")
pytest.importorskip("sklearn", reason="the scans come from scikit-learn")

from sdvg.models.embedded import tokens as embedded
from sdvg.models.embedded.prompts import DIGITS, DIRECTIONS
from sdvg.models.embedded.quality import quality
from sdvg.tokens.embedded import EmbeddedVideos
from sdvg.train import diagonal_tune as tune
from sdvg.train.tokens import forward

HEIGHT, WIDTH, PROMPT = embedded.HEIGHT, embedded.WIDTH, embedded.PROMPT


@pytest.fixture(scope="module")
def models() -> embedded.VideoTokens:
    return embedded.load()


def _passes(frames: int, k: int, mode: str) -> list[set[tuple[int, int, int]]]:
    """What each pass decodes, by walking: a row begins when the one above is k ahead."""
    made: list[set[tuple[int, int, int]]] = []
    done: dict[tuple[int, int], int] = {}
    rows = [(frame, row) for frame in range(frames) for row in range(HEIGHT)]
    while any(done.get(place, 0) < WIDTH for place in rows):
        now = set()
        for at, (frame, row) in enumerate(rows):
            count = done.get((frame, row), 0)
            whole = mode == "spatial" and row == 0
            needed = WIDTH if whole else k
            ready = at == 0 or done.get(rows[at - 1], 0) >= needed
            if count < WIDTH and ready:
                now.add((frame, row, count))
        for frame, row, column in now:
            done[frame, row] = column + 1
        made.append(now)
    return made


@pytest.mark.parametrize("mode", tune.MODES)
@pytest.mark.parametrize("k", [1, 3, 16])
def test_a_query_sees_what_is_decoded_by_then(
    models: embedded.VideoTokens, k: int, mode: str
) -> None:
    fed = tune.entries(models, 2, k, mode)
    mask = tune.dense_mask(fed.take(torch.arange(len(fed.source))[None]))[0, 0]
    text = set(range(PROMPT)) | {models.slot(1) - 1}
    by_target = {int(slot): entry for entry, slot in enumerate(fed.target) if slot >= 0}
    decoded: set[int] = set()
    for now in _passes(2, k, mode):
        slots = {models.slot(*place) for place in now}
        for slot in slots:
            query = by_target.pop(slot)
            assert fed.position[query] == slot - 1
            assert mask[query, query]
            keys = mask[query].nonzero()[:, 0].tolist()
            seen = {int(fed.position[key]) for key in keys if key != query}
            # what it is fed itself stands in the slot before
            assert seen == {at for at in decoded | text if at < slot - 1}
        decoded |= slots
    assert not by_target
    assert len(decoded) + len(text) == models.slot(2) - 1


def test_a_whole_row_ahead_is_raster_order(models: embedded.VideoTokens) -> None:
    for mode in tune.MODES:
        fed = tune.entries(models, 2, WIDTH, mode)
        slots = torch.arange(models.slot(2) - 2)
        order = fed.position.argsort()
        assert torch.equal(fed.source[order], slots)
        mask = tune.dense_mask(fed.take(order[None]))[0, 0]
        assert torch.equal(mask, torch.ones_like(mask).tril())


def test_a_stand_in_is_the_newest_token_above_and_nobody_sees_it(
    models: embedded.VideoTokens,
) -> None:
    fed = tune.entries(models, 2, 2, "spatial")
    at = fed.stand_in.nonzero()[:, 0]
    assert len(at) == 2 * (HEIGHT - 1)
    for entry in at.tolist():
        frame, place = divmod(int(fed.target[entry]) - PROMPT, HEIGHT * WIDTH + 1)
        row, column = divmod(place, WIDTH)
        assert column == 0
        assert fed.source[entry] == models.slot(frame, row - 1, 1)
        assert fed.position[entry] == models.slot(frame, row) - 1
    mask = tune.dense_mask(fed.take(torch.arange(len(fed.source))[None]))[0, 0]
    assert torch.equal(mask[:, at].nonzero()[:, 0], at)


def test_flex_attention_reads_the_mask_as_the_dense_one(models: embedded.VideoTokens) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    fed = tune.entries(models, 1, 2, "spatial").take(torch.arange(20, 120).expand(2, -1))
    g = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 100, 16, generator=g)
    block = create_block_mask(tune.mask_mod(fed), 2, None, 100, 100, "cpu")
    with warnings.catch_warnings():
        # eager, as it is meant to be here
        warnings.simplefilter("ignore")
        found = flex_attention(query, key, value, block_mask=block)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, tune.dense_mask(fed)
    )
    torch.testing.assert_close(found, dense)


def test_tuning_learns_saves_and_goes_on(tmp_path: Path, models: embedded.VideoTokens) -> None:
    arguments = ["--runs", str(tmp_path / "runs"), "--steps", "20", "--threads", "1", "--rank", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "PHASES", ((1.0, 2, 2, 100),))
        tune.main([*arguments, "--out", str(tmp_path / "a")])
        tune.main([*arguments, "--out", str(tmp_path / "b"), "--resume"])
    log = tmp_path / "a" / "training" / "diagonal-tune.csv"
    rows = list(csv.DictReader(log.read_text().splitlines()))
    assert [row["step"] for row in rows] == ["20"]
    one, two = (tmp_path / folder / embedded.UPDATE for folder in "ab")
    assert one.read_bytes() == two.read_bytes()

    tuned = embedded.load().model
    embedded.merge(tuned, one)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        plain, other = (forward(model, ids, ids) for model in (models.model, tuned))
    assert not torch.equal(plain, other)


def test_the_shipped_update_draws_digits_along_diagonals() -> None:
    prompts = [
        f"a {name} moving {way}" for name, way in zip(DIGITS, [*DIRECTIONS] * 2, strict=False)
    ]
    legible = []
    for tuned in (False, True):
        videos = EmbeddedVideos(embedded.load(tuned=tuned), mode="spatial", k=1)
        made = [shown.frames for shown in videos.generate(prompts, frames=2)]
        frames = torch.stack(made, 1)
        legible.append(
            sum(
                quality(*pair, stride=embedded.STRIDE).legibility
                for pair in zip(frames, prompts, strict=True)
            )
            / len(prompts)
        )
    assert legible[1] > 0.75
    assert legible[1] > legible[0] + 0.2


def test_the_update_must_be_the_models(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "update.safetensors"
    save_file({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 256)}, path)
    with pytest.raises(ValueError, match=r"must hold the 84 tensors of the model's update, got 1"):
        embedded.merge(embedded.load().model, path)


@pytest.mark.parametrize(
    ("k", "mode", "message"),
    [(0, "spatial", r"k must be in \[1, width 16\], got 0"), (17, "spatial", "got 17"),
     (1, "diagonal", "mode must be one of .*, got 'diagonal'")],
)  # fmt: skip
def test_a_wrong_schedule_is_refused(
    models: embedded.VideoTokens, k: int, mode: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tune.entries(models, 1, k, mode)


def test_an_update_starts_as_nothing(models: embedded.VideoTokens) -> None:
    model = embedded.load().model
    ids: Tensor = torch.arange(30)[None]
    with torch.no_grad():
        before = forward(model, ids, ids)
        tune.adapt(model, 2)
        torch.testing.assert_close(forward(model, ids, ids), before)
