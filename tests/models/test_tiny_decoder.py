"""The preview decoder: TAEHV's layout, block by block, and the loop that scores on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("diffusers", reason="the loop's tiny models are diffusers' classes")

from sdvg import SDVG, Never, Random, Reward
from sdvg.models.vae import TinyDecoder
from tests.tiny import BrightnessScorer, TinyPair, tiny_pair

WIDTHS, CHANNELS = (8, 6, 4, 4), 4
PROMPTS = ["a seven moving left", "a two moving up", "a nine moving right"]


def taehv(patch: int = 1, stray: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Return random weights under the names of TAEHV's decoder."""
    g = torch.Generator().manual_seed(seed)

    def conv(out: int, inside: int, size: int = 3) -> Tensor:
        return torch.randn(out, inside, size, size, generator=g) * (inside * size**2) ** -0.5

    weights = {"decoder.1.weight": conv(WIDTHS[0], CHANNELS), "decoder.1.bias": torch.zeros(8)}
    places = ((3, 4, 5, 7, 8), (9, 10, 11, 13, 14), (15, 16, 17, 19, 20))
    nexts = (*WIDTHS[1:], WIDTHS[3])
    for stage, (*memory, grow, end) in enumerate(places):
        width, after = WIDTHS[stage], nexts[stage]
        for place in memory:
            for layer, inside in ((0, 2 * width), (2, width), (4, width)):
                weights[f"decoder.{place}.conv.{layer}.weight"] = conv(width, inside)
                weights[f"decoder.{place}.conv.{layer}.bias"] = torch.randn(width, generator=g) / 9
        frames = 1 if stage == 0 else 2
        weights[f"decoder.{grow}.conv.weight"] = conv(frames * width, width, 1)
        weights[f"decoder.{end}.weight"] = conv(after, width)
    weights["decoder.22.weight"] = conv(3 * patch**2, WIDTHS[3])
    weights["decoder.22.bias"] = torch.full((3 * patch**2,), 0.5)
    if stray:
        weights["encoder.0.weight"] = torch.zeros(1)
    return weights


def frame_by_frame(weights: dict[str, Tensor], latents: Tensor) -> Tensor:
    """Decode `[B, F, C, h, w]` by the definition: every layer sees one frame at a time."""
    w = {name.removeprefix("decoder."): value for name, value in weights.items()}
    frames = [3 * torch.tanh(frame / 3) for frame in latents.unbind(1)]
    frames = [F.conv2d(f, w["1.weight"], w["1.bias"], padding=1).relu() for f in frames]
    for stage, (*memory, grow, end) in enumerate(TinyDecoder._STAGES):
        for place in memory:
            past, out = torch.zeros_like(frames[0]), []
            for frame in frames:
                hidden = torch.cat((frame, past), 1)
                for layer in (0, 2, 4):
                    name = f"{place}.conv.{layer}"
                    hidden = F.conv2d(hidden, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)
                    hidden = hidden.relu() if layer < 4 else hidden
                out.append((hidden + frame).relu())
                past = frame
            frames = out
        frames = [f.repeat_interleave(2, 2).repeat_interleave(2, 3) for f in frames]
        grown = [F.conv2d(f, w[f"{grow}.conv.weight"]) for f in frames]
        frames = [part for f in grown for part in f.chunk(1 if stage == 0 else 2, 1)]
        frames = [F.conv2d(f, w[f"{end}.weight"], padding=1) for f in frames]
    frames = [F.conv2d(f.relu(), w["22.weight"], w["22.bias"], padding=1) for f in frames]
    patch = round((frames[0].shape[1] / 3) ** 0.5)
    return torch.stack([F.pixel_shuffle(f, patch).clamp(0, 1) for f in frames], 1)[:, 3:]


@pytest.mark.parametrize("patch", [1, 2])
def test_blocks_equal_the_definition_frame_by_frame(patch: int) -> None:
    decoder, latents = TinyDecoder(taehv(patch)), torch.randn(2, 9, CHANNELS, 4, 6)
    state, made = decoder.start(2), []
    for block in latents.split(3, dim=1):
        frames, state = decoder.decode(block, state)
        made.append(frames)
    assert [part.shape[1] for part in made] == [9, 12, 12]
    exact = frame_by_frame(taehv(patch), latents)
    assert made[0].shape[-2:] == (32 * patch, 48 * patch)
    assert (torch.cat(made, 1) - exact).abs().max() < 1e-5


def test_a_state_is_a_value() -> None:
    decoder = TinyDecoder(taehv())
    first, second = torch.randn(2, 2, 3, CHANNELS, 4, 4)
    _, before = decoder.decode(first, decoder.start(2))
    once, _ = decoder.decode(second, before)
    decoder.decode(torch.randn_like(second), before)
    assert torch.equal(decoder.decode(second, before)[0], once)


def test_sequences_are_taken_and_put_back() -> None:
    decoder = TinyDecoder(taehv())
    first, draft, other = torch.randn(3, 3, 3, CHANNELS, 4, 4)
    _, before = decoder.decode(first, decoder.start(3))
    rows = torch.tensor([2, 0])
    _, after = decoder.decode(draft, before)
    _, mended = decoder.decode(other[rows], decoder.take(before, rows))
    chosen = decoder.select(after, mended, rows)
    mixed = draft.index_copy(0, rows, other[rows])
    _, wanted = decoder.decode(mixed, before)
    for mine, theirs in zip(chosen.features, wanted.features, strict=True):
        assert (mine - theirs).abs().max() < 1e-5


def test_files_load(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(taehv(), tmp_path / "tae.safetensors")
    torch.save(taehv(), tmp_path / "tae.pth")
    latents = torch.randn(1, 3, CHANNELS, 4, 4)
    made = [
        decoder.decode(latents, decoder.start(1))[0]
        for decoder in (
            TinyDecoder(taehv()),
            TinyDecoder.from_file(tmp_path / "tae.safetensors"),
            TinyDecoder.from_file(str(tmp_path / "tae.pth")),
        )
    ]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w.clear(), r"hold decoder\.1\.weight of TAEHV's layout"),
        (lambda w: w.pop("decoder.14.weight"), r"hold decoder\.14\.weight"),
        (lambda w: w.pop("decoder.9.conv.2.bias"), "TAEHV's layout, got"),
        (lambda w: w.update({"decoder.3.conv.0.weight": torch.zeros(1)}), "TAEHV's layout, got"),
        (lambda w: w.update({"decoder.99.weight": torch.zeros(1)}), "TAEHV's layout, got"),
    ],
)
def test_other_weights_are_refused_in_one_sentence(change: object, text: str) -> None:
    weights = taehv()
    change(weights)
    with pytest.raises(ValueError, match=text):
        TinyDecoder(weights)


def test_a_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    """A broken one was an error of torch's or safetensors'."""
    with pytest.raises(ValueError, match=r"nowhere.pth must be a file of weights, got nothing"):
        TinyDecoder.from_file("nowhere.pth")
    torch.save(taehv(), path := tmp_path / "tae.pth")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"tiny_decoder: .*tae.pth must be a whole file of torch"):
        TinyDecoder.from_file(path)
    (path := tmp_path / "tae.safetensors").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"tae.safetensors must be a whole .safetensors file"):
        TinyDecoder.from_file(path)


@pytest.fixture(scope="module")
def pair() -> TinyPair:
    return tiny_pair()


def test_the_scorer_watches_the_preview_and_the_viewer_does_not(pair: TinyPair) -> None:
    preview, scorer = TinyDecoder(taehv()), BrightnessScorer()
    run = SDVG(pair.drafter, pair.target, preview, scorer, Reward(0.0)).generate(
        PROMPTS, num_blocks=5, seed=2
    )
    list(run)
    scores = [verdict.score for row in run.verdicts[1:] for verdict in row]
    router = Reward(sorted(scores)[len(scores) // 2])
    with_preview = SDVG(*pair, scorer, router, preview=preview)
    blocks = list(with_preview.generate(PROMPTS, num_blocks=5, seed=2))
    alone = SDVG(pair.drafter, pair.target, preview, scorer, router)
    expected = list(alone.generate(PROMPTS, num_blocks=5, seed=2))
    decided = {v.accepted for block in blocks[1:] for v in block.verdicts}
    assert decided == {True, False}, "the test needs accepted and rejected blocks"
    for mine, theirs in zip(blocks, expected, strict=True):
        kept = [
            (a.accepted, b.accepted) for a, b in zip(mine.verdicts, theirs.verdicts, strict=True)
        ]
        assert all(a == b for a, b in kept)
        assert (mine.latents - theirs.latents).abs().max() < 1e-5
    state, whole = pair.decoder.start(3), []
    for block in blocks:
        frames, state = pair.decoder.decode(block.latents, state)
        whole.append(frames)
    made = torch.cat([block.frames for block in blocks], 1)
    assert torch.equal(made, torch.cat(whole, 1))


@pytest.mark.parametrize("router", [Never(), Random(0.5)])
def test_a_router_that_needs_no_score_pays_for_no_preview(pair: TinyPair, router: object) -> None:
    class Counting(TinyDecoder):
        calls = 0

        def decode(self, latents: Tensor, state: object) -> tuple[Tensor, object]:
            self.calls += 1
            return super().decode(latents, state)

    preview = Counting(taehv())
    engine = SDVG(*pair, router=router, preview=preview)
    list(engine.generate(PROMPTS, num_blocks=2, seed=2))
    assert preview.calls == 0
