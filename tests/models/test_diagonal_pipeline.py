"""Diagonally distilled checkpoints, in the formats that they come in, end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="the pipeline is diffusers'")
pytest.importorskip("transformers", reason="the text encoder is transformers'")

from diffusers import WanTransformer3DModel

from sdvg import SDVGPipeline
from sdvg.models import embedded
from sdvg.router import Stride
from tests.models.test_checkpoints import FORMS, plain, saved, updates

BLOCKS = 5


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Return a random Wan of two layers for the embedded latents and text."""
    torch.manual_seed(3)
    made = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, in_channels=16, out_channels=16,
        text_dim=128, freq_dim=32, ffn_dim=64, num_layers=2,
    )  # fmt: skip
    return made.eval().requires_grad_(False)


def pipeline(**parts: object) -> SDVGPipeline:
    made = SDVGPipeline.from_checkpoints(
        base=embedded.WEIGHTS, recipe="diagonal", dtype=torch.float32, height=32, width=32,
        max_sequence_length=24, **parts,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def run(pipe: SDVGPipeline, **options: object) -> tuple[Tensor, list[float]]:
    """Return the latents, and the timestep of each forward of the target."""
    taken: list[float] = []
    pipe.stream("a seven", num_blocks=1, **options)
    causal = pipe._models["transformer"][1]
    denoise = causal.denoise

    def watch(latents: Tensor, timestep: float, **rest: object) -> Tensor:
        taken.append(round(timestep, 2))
        return denoise(latents, timestep, **rest)

    causal.denoise = watch
    try:
        out = pipe("a seven", num_blocks=BLOCKS, generator=1, output_type="latent", **options)
    finally:
        del causal.denoise
    return out.frames, taken


def test_base_and_update_run_the_diagonal_schedule_in_both_formats(
    tmp_path: Path, model: nn.Module
) -> None:
    lora = updates(model, FORMS[0])
    files = {
        "target": saved(tmp_path / "longlive_base.pt", {"generator": plain(model, "model.")}),
        "target_lora": saved(tmp_path / "lora.pt", {"generator_lora": lora}),
    }
    original = pipeline(**files)
    model.save_pretrained(tmp_path / "transformer")
    named = updates(model, FORMS[-1])
    save_file(named, tmp_path / "pytorch_lora_weights.safetensors")
    stock = pipeline(
        target=tmp_path / "transformer",
        target_lora=tmp_path / "pytorch_lora_weights.safetensors",
    )
    latents, taken = run(original)
    last = 357.14
    first = [[1000, 933, 733, last], [1000, 933, last]]
    assert taken == [*first[0], *first[1], *[1000, last] * (BLOCKS - 2)]
    torch.testing.assert_close(run(stock)[0], latents, atol=1e-5, rtol=1e-5)
    # ... and so does a pipeline of the merged weights
    original.transformer.save_pretrained(tmp_path / "merged")
    assert torch.equal(run(pipeline(target=tmp_path / "merged"))[0], latents)
    del files["target_lora"]
    assert (run(pipeline(**files))[0] - latents).abs().max() > 1e-3
    # two blocks side by side are the same video
    torch.testing.assert_close(run(stock, in_flight=2)[0], latents, atol=1e-4, rtol=1e-4)
    # twelve frames in all: the sink's three and nine more
    assert original._models["transformer"][1].cache.window == 9 * 4
    assert original._models["transformer"][1].cache.sink == 3 * 4


def test_a_distilled_drafter_speeds_up_another_target(tmp_path: Path, model: nn.Module) -> None:
    lora = saved(tmp_path / "lora.pt", {"generator_lora": updates(model, FORMS[0])})
    base = saved(tmp_path / "base.pt", {"generator": plain(model, "model.")})
    pipe = pipeline(drafter=base, drafter_lora=lora, target=embedded.WEIGHTS / "transformer")
    options = {"schedule": "self_forcing", "drafter_schedule": "diagonal", "router": Stride(2)}
    latents, taken = run(pipe, **options)
    assert torch.isfinite(latents).all()
    # blocks 0, 2 and 4 by the target: four steps each, and clean passes of what lies between
    assert taken.count(937.5) == 3
    assert 357.14 not in taken
