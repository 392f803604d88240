"""A drafter and a target of moving digits, small enough for a laptop: real classes, tiny sizes.

The folder `WEIGHTS` is in diffusers' format; each part loads by its own class's
``from_pretrained``. Made by ``python -m sdvg.train.digits``; its ``diagonal/`` holds a drafter and
a target ("student") of Diagonal Distillation, made by ``python -m sdvg.train.diagonal_distill``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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

__all__ = [
    "DRAFTERS", "TARGETS", "WEIGHTS", "Distilled", "EmbeddedPair", "Quality", "Request",
    "distilled", "load", "parse_prompt", "parts", "quality",
]  # fmt: skip

WEIGHTS = Path(__file__).parent / "weights"
# name -> folder in the weights
DRAFTERS = {"four-step": "drafter", "diagonal": "diagonal/drafter"}
TARGETS = {"teacher": "transformer", "student": "diagonal/student"}
SINK_FRAMES, WINDOW_FRAMES = 3, 9
LATENT_SIZE = 4


class EmbeddedPair(NamedTuple):
    """What `sdvg.engine` drives; drafter and target share the text encoder."""

    drafter: CausalWan
    target: CausalWan
    decoder: StreamingVAE
    scorer: DigitsReward


class Distilled(NamedTuple):
    """How a model was distilled: what `distillation.json` beside its weights says."""

    # of block 0, 1, ...; the last entry serves every later block
    timesteps: tuple[tuple[float, ...], ...]
    # whether a block's K/V are written anew at timestep 0
    clean_pass: bool
    # whether it was trained on the noisy K/V of its own blocks (diagonal forcing)
    forcing: bool
    # weight of the flow term; 0: none
    flow: float
    # how often a block that it was trained behind was clean all the same
    repair: float = 0.0


def load(
    folder: str | Path | None = None,
    *,
    drafter: str | Path = "four-step",
    target: str | Path = "teacher",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    decoder_dtype: torch.dtype | None = None,
) -> EmbeddedPair:
    """The pair in ``folder`` (default: the shipped one), in eval mode, on ``device`` in ``dtype``.

    The scorer stays in float32. On a CPU with bfloat16 convolutions (oneDNN) a float32 pair gets a
    bfloat16 decoder, which halves its time; `decoder_dtype` chooses otherwise. Blocks of 3 latent
    frames of 4 x 4, a sink of 3 frames and a window of 9: what the transformers were trained with.

    Args:
        folder: see above.
        drafter: "four-step", or "diagonal": distilled for the schedule `diagonal`.
        target: "teacher", or "student": distilled from it for the schedule `diagonal`. Either may
            be a `Path` of another transformer's folder.
        device, dtype, decoder_dtype: see above.

    Raises:
        ImportError: diffusers or transformers is missing.
        ValueError: another name; a file that is missing, cut short, or does not fit its config: the
        sentence names the file.
    """
    sources = _named("drafter", drafter, DRAFTERS), _named("target", target, TARGETS)
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

    def diffusers_model(cls: type, part: str | Path, dtype: torch.dtype = dtype) -> nn.Module:
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
    drafting, repairing = (
        CausalWan(
            diffusers_model(WanTransformer3DModel, source),
            text,
            height=LATENT_SIZE,
            width=LATENT_SIZE,
            sink_frames=SINK_FRAMES,
            window_frames=WINDOW_FRAMES,
        )
        for source in sources
    )
    decoder = StreamingVAE(diffusers_model(AutoencoderKLWan, "vae", decoder_dtype))
    scorer = folder / "scorer"
    _check(
        scorer / "model.safetensors",
        lambda: DigitsReward(**json.loads((scorer / "config.json").read_text())),
    )
    reward = DigitsReward.from_pretrained(scorer).to(device)
    return EmbeddedPair(drafting, repairing, decoder, reward)


def parts(drafter: str | Path = "four-step", target: str | Path = "teacher") -> tuple[str, ...]:
    """Return what of the weights decides the videos of such a pair, and their marks.

    A `Path` lies outside of them.
    """
    models = [table.get(name) for table, name in ((DRAFTERS, drafter), (TARGETS, target))]
    shared = (
        "judge", "model_index.json", "scheduler", "scorer", "text_encoder", "tokenizer", "vae",
    )  # fmt: skip
    return *(model for model in models if model is not None), *shared


def distilled(folder: str | Path) -> Distilled:
    """Return how the transformer in `folder` was distilled.

    Raises ValueError where `distillation.json` is missing or says something else, in one sentence.
    """
    path = Path(folder) / "distillation.json"
    _exists(path)
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        steps = tuple(tuple(map(float, block)) for block in told["timesteps"])
        switches = tuple(told[name] for name in ("clean_pass", "forcing"))
        flow, repair = float(told["flow"]), float(told.get("repair", 0.0))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"embedded: {path} must say timesteps, clean_pass, forcing and flow, got "
            f"{type(error).__name__}: {error}"
        ) from error
    if not all(isinstance(switch, bool) for switch in switches):
        raise ValueError(
            f"embedded: {path} must have true or false as clean_pass and forcing, got {switches}"
        )
    return Distilled(steps, *switches, flow, repair)


def _named(part: str, given: str | Path, folders: Mapping[str, str]) -> str | Path:
    """Return the folder of a transformer; ValueError for a name that there is not."""
    if isinstance(given, Path):
        return given.absolute()
    if given not in folders:
        raise ValueError(
            f"embedded: {part} must be one of {', '.join(folders)}, or a Path, got {given!r}"
        )
    return folders[given]


def _bfloat16_convolutions() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _exists(path: Path) -> None:
    if not path.is_file():
        remedy = "give a complete folder"
        if "diagonal" in path.parts:
            remedy += ", or make it: python -m sdvg.train.diagonal_distill"
        raise ValueError(f"embedded: weights must hold {path}, which is missing; {remedy}")


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
