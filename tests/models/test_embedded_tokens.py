"""The embedded token model shows what it is asked for, and its parts are what they say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="the tokenizer is a diffusers class")
pytest.importorskip("transformers", reason="the model is a transformers class")
pytest.importorskip("sklearn", reason="the scans come from scikit-learn")

from sdvg.models.embedded import tokens as embedded
from sdvg.models.embedded.classifier import centroids
from sdvg.models.embedded.prompts import DIGITS, DIRECTIONS, SPEEDS
from sdvg.models.embedded.quality import quality
from sdvg.train import tokens as train
from sdvg.train.data import HIGH, LOW, sample_motions


@pytest.fixture(scope="module")
def models() -> embedded.VideoTokens:
    return embedded.load()


@pytest.fixture(scope="module")
def clips() -> train.Clips:
    return train.sample_clips(60, embedded.FRAMES, torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ids(models: embedded.VideoTokens, clips: train.Clips) -> Tensor:
    codes = models.encode(clips.frames)
    return models.sequence(models.prompts(clips.prompts), codes, clips.actions)


def _score(frames: Tensor, prompts: list[str]) -> Tensor:
    rows = [quality(*row, stride=embedded.STRIDE) for row in zip(frames, prompts, strict=True)]
    return torch.tensor(rows).mean(0)


def test_the_weights_weigh_at_most_15_megabytes() -> None:
    files = {path for path in embedded.FOLDER.rglob("*") if path.is_file()}
    drafter = embedded.FOLDER / embedded.DRAFTER
    assert sum(path.stat().st_size for path in files - {drafter}) <= 15e6


def test_the_drafter_weighs_at_most_5_megabytes() -> None:
    assert (embedded.FOLDER / embedded.DRAFTER).stat().st_size <= 5e6


def test_real_clips_come_back_from_their_codes(
    models: embedded.VideoTokens, clips: train.Clips
) -> None:
    # those that no action turns
    still = (clips.actions == 0).all(1) & torch.tensor([p != "" for p in clips.prompts])
    prompts = [p for p, keep in zip(clips.prompts, still.tolist(), strict=True) if keep]
    codes = models.encode(clips.frames)
    frames = models.decode(codes)
    assert frames.shape == (60, embedded.FRAMES, 3, 32, 32)
    assert (frames[:, :, 0] - clips.frames).square().mean() < 0.001
    value, legibility, motion = _score(frames[still], prompts)
    assert legibility >= 0.93
    assert motion >= 0.95
    assert value >= 0.9
    # no code lies idle
    assert len(codes.unique()) >= 0.95 * models.codes


def test_the_dark_has_a_code_alone(models: embedded.VideoTokens, clips: train.Clips) -> None:
    dark = torch.nn.functional.max_pool2d(clips.frames, 2) < 0.005
    codes = models.encode(clips.frames)[dark]
    assert (codes == codes.mode().values).float().mean() > 0.97


def test_a_slot_holds_what_the_layout_says(
    models: embedded.VideoTokens, clips: train.Clips, ids: Tensor
) -> None:
    codes = models.encode(clips.frames)
    assert ids.shape == (60, models.slot(embedded.FRAMES) - 1)
    for frame, row, column in ((0, 0, 0), (0, 15, 15), (3, 7, 2), (7, 15, 15)):
        assert torch.equal(ids[:, models.slot(frame, row, column)], codes[:, frame, row, column])
    assert torch.equal(ids[:, models.slot(4) - 1], models.actions(clips.actions[:, 3]))
    assert models.model.config.vocab_size == int(models.actions(torch.tensor(16))) + 1
    assert (ids[:, : embedded.PROMPT] >= models.codes).all()


def test_decoding_refuses_what_is_no_code(models: embedded.VideoTokens) -> None:
    codes = torch.zeros(1, 16, 16, dtype=torch.long)
    codes[0, 3, 4] = models.codes
    with pytest.raises(ValueError, match=r"decode: codes must lie in \[0, 128\), got 0 to 128"):
        models.decode(codes)


def test_the_lean_forward_is_the_stock_one(models: embedded.VideoTokens, ids: Tensor) -> None:
    part, slots = ids[:2, :600], torch.arange(600)
    with torch.no_grad():
        stock = models.model(part).logits
        lean = train.forward(models.model, part, slots.expand(2, -1))
        torch.testing.assert_close(lean, stock, atol=1e-4, rtol=1e-4)
        config = models.model.config
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, 600, 64)
        memory = train.Memory(torch.full(shape, torch.nan), torch.full(shape, torch.nan))
        train.forward(models.model, part[:, :590], slots[:590], memory)
        for slot in range(590, 600):
            last = train.forward(
                models.model, part[:, slot : slot + 1], slots[slot : slot + 1], memory, slot
            )
            torch.testing.assert_close(last[:, 0], stock[:, slot], atol=1e-4, rtol=1e-4)


def test_greedy_raster_decoding_is_what_transformers_generates(
    models: embedded.VideoTokens,
) -> None:
    prompts = ["a seven moving left, slowly", "0 going down"]
    ours = train.raster(models, prompts, frames=1, temperature=0)
    theirs = models.model.generate(
        models.prompts(prompts),
        attention_mask=torch.ones(2, embedded.PROMPT, dtype=torch.long),
        max_new_tokens=256,
        do_sample=False,
        pad_token_id=models.codes,
        suppress_tokens=list(range(models.codes, models.model.config.vocab_size)),
    )
    assert torch.equal(ours.flatten(1), theirs[:, embedded.PROMPT :])


def test_clips_without_actions_go_as_the_prompt_says() -> None:
    motions = sample_motions(50, torch.Generator().manual_seed(2))
    found = train.travel(motions, torch.zeros(50, 11, dtype=torch.long))
    expected = motions.centres(45)[:, :: embedded.STRIDE]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_an_action_sets_direction_and_speed() -> None:
    motions = sample_motions(16, torch.Generator().manual_seed(3))
    actions = torch.zeros(16, 3, dtype=torch.long)
    actions[:, 1] = torch.arange(1, 17)
    centres = train.travel(motions, actions)
    assert ((centres >= LOW) & (centres <= HIGH)).all()
    for i, (way, pace) in enumerate(embedded.ACTIONS[1:]):
        step = torch.tensor(DIRECTIONS[way]) * SPEEDS[pace] * embedded.STRIDE
        free = centres[i, 1] + step
        if ((free >= LOW) & (free <= HIGH)).all():
            torch.testing.assert_close(centres[i, 2], free)
            # and the next frame goes on that way
            free = free + step
            if ((free >= LOW) & (free <= HIGH)).all():
                torch.testing.assert_close(centres[i, 3], free)


def test_thinning_keeps_every_stroke_and_the_mean(
    models: embedded.VideoTokens, ids: Tensor
) -> None:
    g = torch.Generator().manual_seed(4)
    dark = int(ids[:, embedded.PROMPT :].flatten().mode().values)
    following = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=models.codes)
    whole = train.thin(ids, following, dark, models.codes, 4096, g)
    assert torch.equal(whole.slots, torch.arange(ids.shape[1]).expand_as(ids))
    # every code but none of the actions counts once
    assert (whole.weight.sum(1) == embedded.FRAMES * 256).all()
    part = train.thin(ids, following, dark, models.codes, 700, g)
    assert (part.slots.diff(dim=1) > 0).all()
    assert torch.equal(part.targets, whole.targets.gather(1, part.slots))
    torch.testing.assert_close(part.weight.sum(1), whole.weight.sum(1))
    strokes = (whole.targets != dark) & (whole.weight > 0)
    assert torch.equal(strokes.sum(1), ((part.targets != dark) & (part.weight > 0)).sum(1))


def test_spoiling_leaves_the_dark_and_the_text_alone(
    models: embedded.VideoTokens, ids: Tensor
) -> None:
    dark = int(ids[:, embedded.PROMPT :].flatten().mode().values)
    near = train.neighbours(models.vq)
    spoilt = train.spoil(ids, dark, near, torch.Generator().manual_seed(5))
    hit = spoilt != ids
    assert 0.02 < hit.sum() / ((ids != dark) & (ids < models.codes)).sum() < 0.08
    assert (ids[hit] != dark).all()
    assert (near[ids[hit]] == spoilt[hit][:, None]).any(1).all()


def test_videos_show_the_digit_and_obey_the_action(models: embedded.VideoTokens) -> None:
    prompts = [f"a {name}" for name in DIGITS]
    # each digit is sent another way, quickly
    ways = [(way, "quickly") for way in (*DIRECTIONS, "left", "right")]
    actions = torch.tensor([[embedded.ACTIONS.index(way)] for way in ways])
    codes = train.raster(models, prompts, frames=2, actions=actions, temperature=0.9, guidance=1.5)
    frames = models.decode(codes)
    legible = [quality(frames[i], prompt).legibility for i, prompt in enumerate(prompts)]
    assert sum(legible) / 10 > 0.6
    before, after = (centroids(frames[:, i].mean(1)) for i in (0, 1))
    asked = torch.tensor([DIRECTIONS[way] for way, _ in ways]) * SPEEDS["quickly"]
    miss = (after - before - embedded.STRIDE * asked).norm(dim=1)
    # a wall may turn one of them back
    assert (miss < 1.2).sum() >= 7


def test_a_seed_means_one_video(models: embedded.VideoTokens) -> None:
    prompts = ["a three moving up"]
    first, again, other = (train.raster(models, prompts, frames=1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "part", ["vq/diffusion_pytorch_model.safetensors", "model/model.safetensors"]
)
def test_a_missing_or_broken_file_is_named(tmp_path: Path, part: str) -> None:
    copied = Path(shutil.copytree(embedded.FOLDER, tmp_path / "tokens"))
    (copied / part).write_bytes((copied / part).read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{part} must be a whole safetensors file"):
        embedded.load(copied)
    (copied / part).unlink()
    with pytest.raises(ValueError, match=f"{part}, which is missing"):
        embedded.load(copied)


def test_both_stages_make_a_folder_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "PHASES", ((0.5, 2, 2, 80), (1.0, 1, 2, 4096)))
    monkeypatch.setattr(train, "LLAMA", train.LLAMA | {"num_hidden_layers": 1})
    out, runs = tmp_path / "out", tmp_path / "runs"
    train.main(["--out", str(out), "--runs", str(runs), "--steps", "20", "--threads", "1"])
    models = embedded.load(out)
    assert models.model.config.num_hidden_layers == 1
    log = (out / "training" / "tokens-model.csv").read_text().splitlines()
    assert log[0] == "step,seconds,lr,loss,first,later,accuracy"
    assert len(log) == 2
    # a finished run has nothing to go on with: the same weights again
    again = tmp_path / "again"
    shutil.copytree(out / "vq", again / "vq")
    train.main(
        ["--out", str(again), "--runs", str(runs), "--steps", "20", "--threads", "1", "--resume",
         "--stage", "model"]
    )  # fmt: skip
    part = Path("model") / "model.safetensors"
    assert (again / part).read_bytes() == (out / part).read_bytes()
