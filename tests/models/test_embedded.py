"""The embedded models do what they are for, and training is what inference is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers", reason="the embedded models are diffusers' classes")
pytest.importorskip("transformers", reason="the text encoder is a transformers class")

from sdvg.models import embedded
from sdvg.models.embedded.classifier import centroids
from sdvg.models.embedded.prompts import DIGITS, DIRECTIONS, SPEEDS, Request, parse_prompt
from sdvg.models.embedded.quality import Judge, quality
from sdvg.models.wan import CausalWan
from sdvg.schedule import preset
from tests.tiny import distilled_weights


@pytest.fixture(scope="module")
def pair() -> embedded.EmbeddedPair:
    # what is compared with the encoder and with one long decode must not be rounded
    return embedded.load(decoder_dtype=torch.float32)


@pytest.fixture(scope="module")
def clips() -> tuple[Tensor, list[str]]:
    """Real clips ``[20, 105, 3, 32, 32]`` of scans that the judge never saw, and prompts."""
    pytest.importorskip("sklearn", reason="the scans come from scikit-learn")
    from sdvg.train.data import CLIP_FRAMES, load_scans, render, sample_motions

    scans, g = load_scans(), torch.Generator().manual_seed(torch.seed() % 2**31)
    chosen = torch.cat(
        [
            (scans.labels == c).nonzero()[:, 0][torch.randperm(100, generator=g)[:2]]
            for c in range(10)
        ]
    )
    motions = sample_motions(20, g)
    grey = render(scans.images[chosen], motions.centres(CLIP_FRAMES))
    prompts = [
        f"a {DIGITS[c]} moving {list(DIRECTIONS)[d]}, {list(SPEEDS)[s]}"
        for c, d, s in zip(
            scans.labels[chosen].tolist(),
            motions.direction.tolist(),
            motions.speed.tolist(),
            strict=True,
        )
    ]
    return grey[:, :, None].expand(-1, -1, 3, -1, -1), prompts


def test_the_weights_weigh_at_most_25_megabytes_and_the_distilled_ones_11() -> None:
    sizes = {True: 0, False: 0}
    for path in filter(Path.is_file, embedded.WEIGHTS.rglob("*")):
        sizes[path.is_relative_to(embedded.WEIGHTS / "diagonal")] += path.stat().st_size
    assert sizes[False] <= 25e6
    assert sizes[True] <= 11e6


def test_each_part_loads_by_its_own_class() -> None:
    index = json.loads((embedded.WEIGHTS / "model_index.json").read_text())
    for part, entry in index.items():
        if isinstance(entry, list):
            library = __import__(entry[0])
            assert getattr(library, entry[1]).from_pretrained(embedded.WEIGHTS / part) is not None


def test_the_target_costs_eight_times_the_drafter(pair: embedded.EmbeddedPair) -> None:
    def flops(model: CausalWan) -> int:
        model.start(["a seven moving left, slowly"])
        with FlopCounterMode(display=False) as counter:
            model.denoise(torch.randn(1, *model.block_shape), 1000.0, start_frame=0)
        return counter.get_total_flops()

    assert flops(pair.target) >= 8 * flops(pair.drafter)


def test_drafter_and_target_share_latents_and_text(pair: embedded.EmbeddedPair) -> None:
    assert pair.drafter.block_shape == pair.target.block_shape == (3, 16, 4, 4)
    assert pair.drafter._encode is pair.target._encode


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a seven moving left, slowly", Request(7, "left", "slowly")),
        ("Quickly, the digit 3 drifting to the upper right.", Request(3, "up right", "quickly")),
        ("8 going southwest", Request(8, "down left", None)),
        ("a 0", Request(0, None, None)),
        ("something falling fast", Request(None, "down", "quickly")),
        ("a nine left and right", Request(9, None, None)),
        ("", Request(None, None, None)),
    ],
)
def test_prompts_are_read(prompt: str, expected: Request) -> None:
    assert parse_prompt(prompt) == expected


def test_paraphrases_lie_nearer_than_other_requests(pair: embedded.EmbeddedPair) -> None:
    def mean(prompts: list[str]) -> Tensor:
        rows = pair.target._encode(prompts)
        return rows.sum(1) / (rows.abs().sum(2) > 0).sum(1, keepdim=True)

    base = mean(["a seven moving left, slowly"])
    same = mean(["the digit 7 going to the left, slow", "Slowly, a seven drifting leftwards."])
    other = mean(
        [
            "a one moving left, slowly",
            "a seven moving right, slowly",
            "a seven moving left, quickly",
        ]
    )
    assert (same - base).norm(dim=1).max() < (other - base).norm(dim=1).min()


def test_text_rows_past_the_prompt_are_zero(pair: embedded.EmbeddedPair) -> None:
    short, long = pair.target._encode(["a 7", "a 7" + " moving left" * 40])
    assert short[4:].abs().max() == 0
    assert long.shape == (24, 128)
    assert long.abs().sum(1).min() > 0


def test_unusual_prompts_do_not_fail(pair: embedded.EmbeddedPair) -> None:
    rows = pair.target._encode(["", "ß→ 漢字 🙂", "x" * 5000, "\n\t"])
    assert torch.isfinite(rows).all()


def test_the_autoencoder_streams(
    pair: embedded.EmbeddedPair, clips: tuple[Tensor, list[str]]
) -> None:
    video = (clips[0][:1, :33] * 2 - 1).transpose(1, 2)
    vae = pair.decoder.vae
    with torch.no_grad():
        raw = vae.encode(video).latent_dist.mode()
        whole = (vae.decode(raw).sample.transpose(1, 2) + 1) / 2
    shape = (1, -1, 1, 1, 1)
    mean, std = (
        torch.tensor(v).view(shape) for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    state, parts = pair.decoder.start(1), []
    for block in ((raw - mean) / std).transpose(1, 2).split(3, 1):
        frames, state = pair.decoder.decode(block, state)
        parts.append(frames)
    assert [part.shape[1] for part in parts] == [9, 12, 12]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=0)
    # and the video comes back: half a percent of the square of the range
    assert (whole - clips[0][:1, :33]).square().mean() < 0.005


def test_reward_falls_with_every_kind_of_spoiling(
    pair: embedded.EmbeddedPair, clips: tuple[Tensor, list[str]]
) -> None:
    frames, prompts = clips[0][:, ::13], clips[1]
    clean = pair.scorer(frames, prompts).mean()
    blurred = nn.functional.avg_pool2d(frames.flatten(0, 1), 7, 1, 3).view(frames.shape)
    spoilt = {
        "noise": (frames + 0.8 * torch.randn(frames.shape)).clamp(0, 1),
        "blur": blurred,
        "ghost": torch.maximum(frames, frames.roll(4, -1)),
        "blend": (frames + frames.roll(2, 0)) / 2,
        "dark": frames * 0,
    }
    for name, other in spoilt.items():
        assert pair.scorer(other, prompts).mean() < clean - 0.5, name


def test_reward_prefers_the_prompt_that_is_shown(
    pair: embedded.EmbeddedPair, clips: tuple[Tensor, list[str]]
) -> None:
    frames, prompts = clips[0][:, ::13], clips[1]
    right = pair.scorer(frames, prompts)
    wrong = pair.scorer(frames, prompts[2:] + prompts[:2])
    assert (right > wrong).float().mean() > 0.97
    # no digit named: legibility alone
    assert (pair.scorer(frames, ["moving left"] * len(frames)) >= right).all()


def test_reward_is_per_sequence(
    pair: embedded.EmbeddedPair, clips: tuple[Tensor, list[str]]
) -> None:
    frames, prompts = clips[0][:4, :12], clips[1][:4]
    whole = pair.scorer(frames, prompts)
    assert whole.shape == (4, 12)
    assert whole.dtype == torch.float32
    alone = torch.cat([pair.scorer(frames[i : i + 1], prompts[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(whole, alone, atol=1e-4, rtol=0)


def test_scorer_names_a_wrong_shape(pair: embedded.EmbeddedPair) -> None:
    with pytest.raises(ValueError, match=r"digits_reward: frames must be \[B, N, 3, H, W\], got"):
        pair.scorer(torch.zeros(1, 3, 32, 32), ["a 7"])
    with pytest.raises(ValueError, match="prompts must be one for each of 1 sequences, got 2"):
        pair.scorer(torch.zeros(1, 2, 3, 32, 32), ["a 7", "a 8"])


def test_quality_of_real_clips_is_high(clips: tuple[Tensor, list[str]]) -> None:
    values = torch.tensor([quality(*row) for row in zip(*clips, strict=True)])
    assert values[:, 0].mean() > 0.9
    assert values[:, 1].mean() > 0.93
    assert values[:, 2].mean() > 0.95


def test_quality_sees_what_is_wrong(clips: tuple[Tensor, list[str]]) -> None:
    frames, prompt = clips[0][0], clips[1][0]
    good = quality(frames, prompt)
    assert quality(frames[:1].expand(105, -1, -1, -1), prompt).motion < good.motion - 0.2
    assert quality(frames, prompt.replace("zero", "four")).legibility < 0.2
    assert quality(torch.zeros_like(frames), prompt).value < 0.1
    assert quality(torch.full_like(frames, torch.nan), prompt).value < 0.1
    with pytest.raises(ValueError, match=r"quality: frames must be \[N, 3, 32, 32\], got"):
        quality(frames[None], prompt)


def test_a_part_of_a_video_may_have_been_turned_by_walls(
    clips: tuple[Tensor, list[str]],
) -> None:
    later = [(frames[45:], prompt) for frames, prompt in zip(*clips, strict=True)]
    whole = torch.tensor([quality(*row).motion for row in later])
    part = torch.tensor([quality(*row, segment=True).motion for row in later])
    # every clip meets a wall in 45 frames but for the slow ones
    assert part.mean() > 0.95
    assert whole.mean() < part.mean() - 0.2
    assert (part >= whole).all()
    # what stands still, or goes another way, is no more right in a part
    still = later[0][0][:1].expand(60, -1, -1, -1)
    assert quality(still, later[0][1], segment=True).motion < part.min() - 0.1
    turned = [(frames.transpose(2, 3), prompt) for frames, prompt in later]
    straight = [row for row in turned if parse_prompt(row[1]).direction in ("left", "up")]
    for row in straight:
        assert quality(*row, segment=True).motion < 0.9


def test_judge_reads_the_held_out_scans(clips: tuple[Tensor, list[str]]) -> None:
    from sdvg.train.data import load_scans, render

    scans = load_scans(held_out=True)
    centres = 6.5 + 19 * torch.rand(len(scans.images), 1, 2)
    frames = render(scans.images, centres)[:, 0]
    judge = Judge.from_pretrained(embedded.WEIGHTS / "judge")
    assert (judge(frames).argmax(-1) == scans.labels).float().mean() > 0.97
    # the centre of brightness follows the digit
    assert (centroids(frames) - centres[:, 0]).norm(dim=1).mean() < 1.0


def test_training_forward_is_the_cached_forward() -> None:
    from sdvg.train import transformer

    torch.manual_seed(torch.seed() % 2**31)
    model = transformer.build("drafter").eval()
    for parameter in model.parameters():
        if parameter.ndim < 2:
            nn.init.normal_(parameter, std=0.5)
    clean, noise = torch.randn(2, 1, 16, 27, 4, 4).unbind(0)
    sigma, text = torch.rand(1, 9), torch.randn(1, 24, 128)
    with torch.no_grad():
        forward = transformer.forward_of(model, dtype=torch.float32)
        velocity = forward(model, noise, sigma, text, context=clean)
    cached = CausalWan(model, lambda _: text, height=4, width=4, sink_frames=3, window_frames=9)
    cached.start([""])
    for block in range(9):
        part = slice(3 * block, 3 * block + 3)
        level = float(sigma[0, block])
        x0 = cached.denoise(noise[:, :, part].transpose(1, 2), 1000 * level, start_frame=3 * block)
        expected = noise[:, :, part] - level * velocity[:, :, part]
        torch.testing.assert_close(x0.transpose(1, 2), expected, atol=2e-5, rtol=1e-5)
        cached.write(clean[:, :, part].transpose(1, 2), start_frame=3 * block)


def test_the_target_begins_as_its_base(tmp_path: Path) -> None:
    from sdvg.train import transformer

    base, target = transformer.build("base").eval(), transformer.build("target").eval()
    transformer._grow(target, base)
    latents, text = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 24, 128)
    with torch.no_grad():
        small, large = (
            model(latents, torch.tensor([500.0]), text, return_dict=False)[0]
            for model in (base, target)
        )
    assert torch.equal(small, large)
    with pytest.raises(ValueError, match=r"base.pt must exist, which stage base writes"):
        transformer.load_base(tmp_path)


def test_keyed_noise_is_still_white(clips: tuple[Tensor, list[str]]) -> None:
    from sdvg.train.data import keyed_noise, load_scans, sample_motions

    scans, g = load_scans(), torch.Generator().manual_seed(0)
    n = len(scans.images)
    noise = keyed_noise(
        torch.randn(n, 16, 3, 4, 4, generator=g),
        sample_motions(n, g),
        scans.labels,
        scans.style,
        [Request(None, None, None)] * n,
        g,
    )
    keys = noise.flatten(2).mean(2) * 48**0.5
    assert keys.mean(0).abs().max() < 0.12
    assert (keys.var(0) - 1).abs().max() < 0.2
    assert abs(float(noise.var()) - 1) < 0.01


def test_a_resumed_training_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    from sdvg.train.loop import fit

    class Stop(Exception):
        pass

    def run(folder: str, stop: int, resume: bool) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4))

        def loss(g: torch.Generator, step: int) -> dict[str, Tensor]:
            if step == stop:
                raise Stop
            return {"loss": net(torch.randn(8, 16, generator=g)).square().mean()}

        return fit(
            "net",
            net,
            loss,
            steps=24,
            lr=1e-2,
            runs=tmp_path / folder,
            resume=resume,
            save_every=10,
        )

    whole = run("whole", -1, False)
    with pytest.raises(Stop):
        run("broken", 15, False)
    again = run("broken", -1, True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert (tmp_path / "broken" / "net.csv").read_text().startswith("step,seconds,lr,loss")


def test_distilled_models_are_loaded_by_name_or_folder(tmp_path: Path) -> None:
    folder = distilled_weights(tmp_path / "w")

    def layers(**names: str | Path) -> tuple[int, int]:
        models = embedded.load(folder, **names)
        return tuple(len(model.transformer.blocks) for model in models[:2])

    stock = layers()
    assert stock == (3, 15)
    assert layers(drafter="diagonal") == stock
    assert layers(target="student") == (3, 3)
    assert layers(target=folder / "diagonal" / "student", drafter="four-step") == (3, 3)
    told = embedded.distilled(folder / "diagonal" / "student")
    assert told.timesteps == preset("diagonal").timesteps
    assert told[1:] == (False, True, 1.0, 0.0)
    used = embedded.parts("diagonal", "student")
    assert {"diagonal/drafter", "diagonal/student", "vae"} < set(used)
    assert {"drafter", "transformer"} < set(embedded.parts())
    assert not set(embedded.parts()) & {"diagonal/drafter", "diagonal/student"}


def test_distilled_models_that_are_not_there_are_named(tmp_path: Path) -> None:
    folder = distilled_weights(tmp_path / "w")
    for part in ("drafter", "target"):
        with pytest.raises(ValueError, match=rf"^embedded: {part} must be one of .*, got 'x'"):
            embedded.load(folder, **{part: "x"})
    told = folder / "diagonal" / "student" / "distillation.json"
    for text in ("", "[]", '{"timesteps": [[1000]]}', '{"timesteps": 3}'):
        told.write_text(text)
        with pytest.raises(ValueError, match="must say timesteps, clean_pass, forcing and flow"):
            embedded.distilled(told.parent)
    shutil.rmtree(folder / "diagonal")
    missing = "diagonal/student/.*, which is missing; .*python -m sdvg.train.diagonal_distill"
    with pytest.raises(ValueError, match=missing):
        embedded.load(folder, target="student")
    with pytest.raises(ValueError, match=r"distillation.json, which is missing"):
        embedded.distilled(told.parent)


@pytest.mark.parametrize("name", ["drafter", "student"])
def test_shipped_distilled_models_are_of_the_released_schedule(name: str) -> None:
    folder = embedded.WEIGHTS / "diagonal" / name
    told = embedded.distilled(folder)
    assert (told.timesteps, told.clean_pass) == tuple(vars(preset("diagonal")).values())[:2]
    assert told.forcing
    assert told.flow > 0


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return shutil.copytree(embedded.WEIGHTS, tmp_path / "weights")


PARTS = (
    "transformer/diffusion_pytorch_model.safetensors",
    "drafter/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "scorer/model.safetensors",
)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_file_is_named(copied: Path, part: str) -> None:
    (copied / part).unlink()
    with pytest.raises(ValueError, match=f"{part}, which is missing"):
        embedded.load(copied)


@pytest.mark.parametrize("part", [part for part in PARTS if part.endswith("safetensors")])
def test_a_truncated_file_is_named(copied: Path, part: str) -> None:
    path = copied / part
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{part} must be a whole safetensors file"):
        embedded.load(copied)


def test_mismatched_weights_are_named(copied: Path) -> None:
    part = "diffusion_pytorch_model.safetensors"
    shutil.copy(copied / "drafter" / part, copied / "transformer" / part)
    with pytest.raises(
        ValueError, match=rf"transformer/{part} must hold .* as its config.json says"
    ):
        embedded.load(copied)


def test_a_broken_config_is_named(copied: Path) -> None:
    (copied / "scorer" / "config.json").write_text('{"width": 16, "depth": 3}')
    with pytest.raises(ValueError, match=r"scorer/config.json must describe the model"):
        embedded.load(copied)
