"""Make the embedded models again from nothing: ``python -m sdvg.train.digits --out DIR``.

Stages run in order and each needs the ones before: ``vae``, ``text``, ``target``, ``drafter``,
``scorer``, ``judge``. A finished stage lies in ``--out`` as a diffusers component; ``--resume``
goes on from the checkpoints in ``--runs``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sdvg.models.embedded import SINK_FRAMES, WINDOW_FRAMES
from sdvg.models.embedded.prompts import DIGITS, DIRECTIONS, SPEEDS
from sdvg.models.embedded.text import LENGTH
from sdvg.train import autoencoder, critics, text, transformer
from sdvg.train.data import BLOCKS, FRAMES_PER_BLOCK, SIZE, sample_motions

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

    from sdvg.models.embedded.text import TextEncoder

# steps of the shipped run
STEPS = {
    "vae": 2200,
    "text": 900,
    "base": 3600,
    "target": 2000,
    "drafter": 3600,
    "scorer": 1200,
    "judge": 1200,
}
CLIPS = 6000
# left out of the drafter's data: a blind spot, as a small model has many, for a router to find
UNSEEN = (0,)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run the stages."""
    parser = argparse.ArgumentParser(prog="python -m sdvg.train.digits", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished models")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="checkpoints and logs")
    parser.add_argument("--stage", choices=["all", *STEPS], default="all")
    parser.add_argument("--steps", type=int, help="instead of the shipped run's")
    parser.add_argument(
        "--clips", type=int, default=CLIPS, help="clips encoded for the transformers"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoints in --runs"
    )
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for stage in STEPS if options.stage == "all" else (options.stage,):
        _run(stage, options)


def _run(stage: str, options: argparse.Namespace) -> None:
    out = options.out
    common = {"steps": options.steps or STEPS[stage], "resume": options.resume}
    if stage == "vae":
        _save(autoencoder.train(options.runs, **common), out / "vae")
        for stale in options.runs.glob("latents-*.pt"):
            stale.unlink()
    elif stage == "text":
        encoder = text.train(options.runs, **common)
        encoder.tokenizer.save_pretrained(out / "tokenizer")
        _save(encoder.encoder, out / "text_encoder")
    elif stage in ("base", "target", "drafter"):
        clips = transformer.encode_clips(_vae(out), options.clips, options.runs)
        data = (clips, text_encoder(out), options.runs)
        if stage == "base":
            transformer.train(stage, *data, **common)
        else:
            base = transformer.load_base(options.runs)
            if stage == "target":
                model = transformer.train(stage, *data, start=base, lr=1e-3, **common)
            else:
                model = transformer.train(stage, *data, start=base, unseen=UNSEEN, **common)
            _save(model, out / ("transformer" if stage == "target" else "drafter"))
        _index(out)
    elif stage == "scorer":
        reward = critics.train_scorer(options.runs, **common)
        critics.calibrate(reward, *_drafts(out))
        reward.save_pretrained(out / "scorer")
    else:
        critics.train_judge(options.runs, **common).save_pretrained(out / "judge")
    log = out / "training"
    log.mkdir(exist_ok=True)
    for path in options.runs.glob(f"{stage}*.csv"):
        shutil.copy(path, log / path.name)


def _save(model: torch.nn.Module, folder: Path) -> None:
    model.to(torch.float16).save_pretrained(folder)


def _vae(out: Path) -> AutoencoderKLWan:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(out / "vae").float().eval()


def text_encoder(out: Path) -> TextEncoder:
    """The trained text encoder in ``out``."""
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

    from sdvg.models.embedded.text import TextEncoder

    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    return TextEncoder(tokenizer, UMT5EncoderModel.from_pretrained(out / "text_encoder").float())


def _drafts(out: Path, count: int = 40) -> tuple[torch.Tensor, list[str]]:
    """Frames ``[count, 105, 3, 32, 32]`` that the drafter makes alone, and their prompts."""
    from diffusers import WanTransformer3DModel

    from sdvg.engine import SDVG
    from sdvg.models.vae import StreamingVAE
    from sdvg.models.wan import CausalWan
    from sdvg.router import Always

    drafter = WanTransformer3DModel.from_pretrained(out / "drafter")
    model = CausalWan(
        drafter.float(), text_encoder(out), height=4, width=4, sink_frames=3, window_frames=9
    )
    g = torch.Generator().manual_seed(8)
    motions = sample_motions(count, g)
    prompts = [
        f"a {DIGITS[i % 10]} moving {list(DIRECTIONS)[way]}, {list(SPEEDS)[pace]}"
        for i, (way, pace) in enumerate(
            zip(motions.direction.tolist(), motions.speed.tolist(), strict=True)
        )
    ]
    loop = SDVG(model, None, StreamingVAE(_vae(out)), router=Always())
    # seeds from here on are not those of any evaluation
    made = loop.generate(prompts, num_blocks=BLOCKS, seed=2**31)
    return torch.cat([block.frames for block in made], 1), prompts


def _index(out: Path) -> None:
    """Write the pipeline's index and the scheduler, which has no weights."""
    import diffusers

    diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(out / "scheduler")
    index = {
        "_class_name": "SDVGPipeline",
        "_diffusers_version": diffusers.__version__,
        "drafter": ["diffusers", "WanTransformer3DModel"],
        "frames_per_block": FRAMES_PER_BLOCK,
        "height": SIZE,
        "max_sequence_length": LENGTH,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "scorer": "sdvg.scorers.digits.DigitsReward",
        "sink_frames": SINK_FRAMES,
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "width": SIZE,
        "window_frames": WINDOW_FRAMES,
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main()
