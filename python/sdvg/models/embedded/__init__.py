"""A drafter and a target of moving digits, small enough for a laptop: real classes, tiny sizes.

The folder `WEIGHTS` is in diffusers' format; each part loads by its own class's
``from_pretrained``. Made by ``python -m sdvg.train.digits``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from sdvg.models.embedded.prompts import Request, parse_prompt
from sdvg.models.embedded.quality import Quality, quality

if TYPE_CHECKING:
    from sdvg.models.vae import StreamingVAE
    from sdvg.models.wan import CausalWan
    from sdvg.scorers.digits import DigitsReward

__all__ = ["WEIGHTS", "EmbeddedPair", "Quality", "Request", "load", "parse_prompt", "quality"]

WEIGHTS = Path(__file__).parent / "weights"
SINK_FRAMES, WINDOW_FRAMES = 3, 9
LATENT_SIZE = 4


class EmbeddedPair(NamedTuple):
    """What `sdvg.engine` drives; drafter and target share the text encoder."""

    drafter: CausalWan
    target: CausalWan
    decoder: StreamingVAE
    scorer: DigitsReward


def load(
    folder: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    decoder_dtype: torch.dtype | None = None,
) -> EmbeddedPair:
    """The pair in ``folder`` (default: the shipped one), in eval mode, on ``device`` in ``dtype``.

    The scorer stays in float32. On a CPU with bfloat16 convolutions (oneDNN) a float32 pair gets a
    bfloat16 decoder, which halves its time; `decoder_dtype` chooses otherwise. Blocks of 3 latent
    frames of 4 x 4, a sink of 3 frames and a window of 9: what the transformers were trained with.

    Raises:
        ImportError: diffusers or transformers is missing.
        ValueError: a file is missing, cut short, or does not fit its config; the sentence names
        the file.
    """
    try:
        from diffusers import AutoencoderKLWan, WanTransformer3DModel
        from transformers import PreTrainedTokenizerFast, UMT5EncoderModel
    except ImportError as error:
        raise ImportError(
            "embedded: the models need diffusers and transformers: pip install 'sdvg[diffusers]'"
        ) from error
    from sdvg.models.embedded.text import TextEncoder
    from sdvg.models.vae import StreamingVAE
    from sdvg.models.wan import CausalWan
    from sdvg.scorers.digits import DigitsReward

    folder = Path(folder) if folder is not None else WEIGHTS

    if decoder_dtype is None:
        on_cpu = torch.device(device).type == "cpu" and dtype == torch.float32
        decoder_dtype = torch.bfloat16 if on_cpu and _bfloat16_convolutions() else dtype

    def diffusers_model(cls: type, part: str, dtype: torch.dtype = dtype) -> nn.Module:
        path = folder / part / "diffusion_pytorch_model.safetensors"

        def build() -> nn.Module:
            return cls.from_config(cls.load_config(folder / part))

        _check(path, build)
        model = cls.from_pretrained(folder / part, dtype=dtype)
        # diffusers keeps some modules in float32, where a pair in float64 needs them wide too
        return model.to(device, dtype) if dtype == torch.float64 else model.to(device)

    def text_encoder() -> TextEncoder:
        from transformers import UMT5Config

        path = folder / "text_encoder"
        _check(
            path / "model.safetensors",
            lambda: UMT5EncoderModel(UMT5Config.from_pretrained(path)),
            tied=("encoder.embed_tokens.weight",),
        )
        _exists(folder / "tokenizer" / "tokenizer.json")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        return TextEncoder(
            tokenizer, UMT5EncoderModel.from_pretrained(path, dtype=dtype).to(device)
        )

    text = text_encoder()
    target, drafter = (
        CausalWan(
            diffusers_model(WanTransformer3DModel, part),
            text,
            height=LATENT_SIZE,
            width=LATENT_SIZE,
            sink_frames=SINK_FRAMES,
            window_frames=WINDOW_FRAMES,
        )
        for part in ("transformer", "drafter")
    )
    decoder = StreamingVAE(diffusers_model(AutoencoderKLWan, "vae", decoder_dtype))
    scorer = folder / "scorer"
    _check(
        scorer / "model.safetensors",
        lambda: DigitsReward(**json.loads((scorer / "config.json").read_text())),
    )
    return EmbeddedPair(drafter, target, decoder, DigitsReward.from_pretrained(scorer).to(device))


def _bfloat16_convolutions() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _exists(path: Path) -> None:
    if not path.is_file():
        raise ValueError(
            f"embedded: weights must hold {path}, which is missing; give a complete folder"
        )


def _check(path: Path, build: Callable[[], nn.Module], tied: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless ``path`` holds every tensor that its config describes."""
    from safetensors import SafetensorError, safe_open

    _exists(path)
    _exists(path.parent / "config.json")
    try:
        with torch.device("meta"):
            wanted = {name: list(value.shape) for name, value in build().state_dict().items()}
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(
            f"embedded: {path.parent / 'config.json'} must describe the model, got: "
            + str(error).splitlines()[0]
        ) from error
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"embedded: {path} must be a whole safetensors file, got: {error}"
        ) from error
    for name, shape in wanted.items():
        if name not in tied and found.get(name) != shape:
            raise ValueError(
                f"embedded: {path} must hold {name} {shape} as its config.json says, "
                f"got {found.get(name, 'no such tensor')}"
            )
