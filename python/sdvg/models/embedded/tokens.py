"""A token model of moving digits: a VQ tokenizer and a small Llama over its codes.

A sequence is ``[prompt: 24] [frame 0: 256 codes in raster order] [action] [frame 1] [action] ...``
and a token's position is its slot. Code ``i`` has id ``i``; the text tokenizer's ids follow, then
the actions. Action 0 goes on as before (at first: as the prompt says); the others set direction and
speed from that frame on. Frames lie `STRIDE` pixel frames apart. The empty prompt is the
unconditional one, for guidance. Made by ``python -m sdvg.train.tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sdvg.models.checkpoints import read_tensors
from sdvg.models.drafter import EagleDrafter
from sdvg.models.embedded import WEIGHTS, _check, _exists
from sdvg.models.embedded.prompts import DIRECTIONS, SPEEDS
from sdvg.models.embedded.text import LENGTH, tokens
from sdvg.models.llama import LlamaSizes
from sdvg.models.tokens import fit, read_sizes

if TYPE_CHECKING:
    from diffusers import VQModel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "tokens"
UPDATE = Path("diagonal") / "update.safetensors"
DRAFTER = Path("drafter") / "model.safetensors"
PROMPT = LENGTH  # tokens, fixed; shorter prompts are padded
HEIGHT, WIDTH = 16, 16  # tokens of a frame
CELL = 2  # pixels, height and width of a token
FRAMES = 8  # of a clip, as trained
STRIDE = 4  # pixel frames from one frame to the next
ACTIONS = (None, *((way, pace) for way in DIRECTIONS for pace in SPEEDS))


class VideoTokens(NamedTuple):
    """Tokenizer and model, and what lies where in a sequence."""

    vq: VQModel
    model: LlamaForCausalLM
    text: PreTrainedTokenizerFast

    @property
    def codes(self) -> int:
        """How many codes there are; sampling keeps to ids below."""
        return self.vq.config.num_vq_embeddings

    def slot(self, frame: int, row: int = 0, column: int = 0) -> int:
        """Where a code lies in the sequence; a later frame's action lies just before slot 0, 0."""
        return PROMPT + frame * (HEIGHT * WIDTH + 1) + row * WIDTH + column

    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """Ids ``[B, 24]`` int64 of prompts."""
        return tokens(self.text, prompts)[0] + self.codes

    def actions(self, actions: Tensor) -> Tensor:
        """Ids of indices into `ACTIONS`, in their shape."""
        return actions + self.codes + len(self.text)

    def sequence(self, prompts: Tensor, codes: Tensor, actions: Tensor) -> Tensor:
        """Ids ``[B, 24 + 257 F - 1]`` of whole clips.

        Args:
            prompts: ids ``[B, 24]``, as `prompts` gives them.
            codes: ``[B, F, 16, 16]``.
            actions: ``[B, F - 1]`` indices into `ACTIONS`, one for each frame after the first.
        """
        later = torch.cat((self.actions(actions)[..., None], codes[:, 1:].flatten(2)), 2)
        return torch.cat((prompts, codes[:, 0].flatten(1), later.flatten(1)), 1)

    def encode(self, frames: Tensor) -> Tensor:
        """Codes ``[..., 16, 16]`` int64 of grey frames ``[..., 32, 32]`` in [0, 1]."""
        return encode(self.vq, frames)

    def decode(self, codes: Tensor) -> Tensor:
        """Frames ``[..., 3, 32, 32]`` in [0, 1] of codes ``[..., 16, 16]``."""
        return decode(self.vq, codes)


@torch.no_grad()
def encode(vq: VQModel, frames: Tensor) -> Tensor:
    """Codes ``[..., 16, 16]`` int64 of grey frames ``[..., 32, 32]`` in [0, 1]."""
    pixels = frames.reshape(-1, 1, *frames.shape[-2:]) * 2 - 1
    codes = vq.quantize(vq.encode(pixels.to(vq.dtype)).latents)[2][2]
    return codes.view(*frames.shape[:-2], HEIGHT, WIDTH)


@torch.no_grad()
def decode(vq: VQModel, codes: Tensor) -> Tensor:
    """Frames ``[..., 3, 32, 32]`` in [0, 1] of codes ``[..., 16, 16]``; ValueError past the last.

    A code decides its cell of 2 x 2 pixels, smoothed by its neighbours.
    """
    count = vq.config.num_vq_embeddings
    # an id of text or of an action among the codes would read past the codebook
    if codes.device.type == "cpu" and codes.numel() and not 0 <= codes.min() <= codes.max() < count:
        raise ValueError(
            f"decode: codes must lie in [0, {count}), got {codes.min()} to {codes.max()}"
        )
    shape = (codes.numel() // (HEIGHT * WIDTH), HEIGHT, WIDTH, vq.config.vq_embed_dim)
    pixels = vq.decode(codes.reshape(-1), force_not_quantize=True, shape=shape).sample
    grey = ((pixels.float() + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)
    return grey.reshape(*codes.shape[:-2], *grey.shape[1:])


def load(
    folder: str | Path | None = None,
    *,
    tuned: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VideoTokens:
    """The models in ``folder`` (default: the shipped ones), in eval mode, on ``device``.

    ``tuned`` merges the update for diagonal decoding (``python -m sdvg.train.diagonal_tune``).
    ``dtype`` is the Llama's; the tokenizer, whose codes must not depend on it, stays in float32.

    Raises:
        ImportError: diffusers or transformers is missing.
        ValueError: a file is missing, cut short, or does not fit its config; the sentence names
        the file.
    """
    folder = Path(folder) if folder is not None else FOLDER
    try:
        from transformers import LlamaConfig, LlamaForCausalLM

        vq = load_vq(folder)
    except ImportError as error:
        raise ImportError(
            "tokens: the models need diffusers and transformers: pip install 'sdvg[diffusers]'"
        ) from error
    text = load_text()
    _check(
        folder / "model" / "model.safetensors",
        lambda: LlamaForCausalLM(LlamaConfig.from_pretrained(folder / "model")),
    )
    # updated in float32, then rounded
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    if tuned:
        merge(model, folder / UPDATE)
    model = model.to(device, dtype)
    made = VideoTokens(vq.to(device), model.requires_grad_(False), text)
    wanted = made.codes + len(text) + len(ACTIONS)
    if model.config.vocab_size != wanted:
        raise ValueError(
            f"tokens: {folder / 'model' / 'config.json'} must have vocab_size {wanted} (codes, "
            f"text, actions), got {model.config.vocab_size}"
        )
    return made


@torch.no_grad()
def merge(model: LlamaForCausalLM, path: Path) -> None:
    """Add a low-rank update (peft's names, scale 1) to the model's weights, in place.

    Raises ValueError for a file that is missing, broken, or not such a model's.
    """
    wanted = {
        f"{name}.lora_{part}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
        for part in "AB"
    }
    found = read_tensors(path, "tokens")
    if odd := sorted(wanted ^ found.keys()):
        raise ValueError(
            f"tokens: {path} must hold the {len(wanted)} tensors of the model's update, "
            f"got {len(found)} ({odd[0]} differs)"
        )
    for name in sorted(wanted):
        if name.endswith("lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            down, up = found[name].float(), found[f"{layer}.lora_B.weight"].float()
            weight = model.get_submodule(layer).weight
            if down.dim() != 2 or [*up.shape, *down.shape[1:]] != [
                weight.shape[0], len(down), weight.shape[1]
            ]:  # fmt: skip
                raise ValueError(
                    f"tokens: {path} must multiply to the model's weights, got {list(up.shape)} x "
                    f"{list(down.shape)} for {list(weight.shape)} ({layer})"
                )
            weight += up @ down


def load_drafter(
    folder: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> EagleDrafter:
    """The feature-level drafter in ``folder`` (default: the shipped one), for `load`'s Llama there.

    Made by ``python -m sdvg.train.drafter``.

    Raises:
        ImportError: transformers is missing.
        ValueError: the file is missing, cut short, or not such a model's; the sentence names it.
    """
    folder = Path(folder) if folder is not None else FOLDER
    try:
        from transformers import LlamaConfig
    except ImportError as error:
        raise ImportError(
            "tokens: the drafter needs transformers: pip install 'sdvg[diffusers]'"
        ) from error
    _exists(folder / "model" / "config.json")
    sizes = drafter_sizes(read_sizes(LlamaConfig.from_pretrained(folder / "model")))
    tensors = read_tensors(folder / DRAFTER, "tokens")
    try:
        drafter = fit(EagleDrafter(sizes), tensors)
    except ValueError as error:
        raise ValueError(f"{error} ({folder / DRAFTER})") from None
    return drafter.to(device, dtype)


def drafter_sizes(target: LlamaSizes) -> LlamaSizes:
    """The sizes of a target's drafter: those of one of its layers."""
    return replace(target, layers=1)


def load_vq(folder: Path) -> VQModel:
    """The tokenizer of frames in ``folder / "vq"``, in eval mode; ValueError as `load` says."""
    from diffusers import VQModel

    _check(
        folder / "vq" / "diffusion_pytorch_model.safetensors",
        lambda: VQModel.from_config(VQModel.load_config(folder / "vq")),
    )
    vq = VQModel.from_pretrained(folder / "vq", dtype=torch.float32)
    return vq.eval().requires_grad_(False)


def load_text() -> PreTrainedTokenizerFast:
    """The tokenizer of prompts, which all embedded models share."""
    from transformers import PreTrainedTokenizerFast

    _exists(WEIGHTS / "tokenizer" / "tokenizer.json")
    return PreTrainedTokenizerFast.from_pretrained(WEIGHTS / "tokenizer")
