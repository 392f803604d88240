"""What the pipeline and its calls are given: checked, and made what the loop takes."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdvg.commit import policy
from sdvg.host import is_there
from sdvg.schedule import preset

Generator = torch.Generator | int
_GUIDANCE = "the models are distilled to run without guidance: leave it out"
_STEPS = "give schedule=, the name of a preset or a Schedule of timesteps"
# axes that pixels have
_AXES = {"image": (3, 4), "video": (4, 5)}
# what other pipelines take, and what serves here
_ELSEWHERE = {
    "negative_prompt": _GUIDANCE,
    "guidance_scale": _GUIDANCE,
    "num_frames": "give num_blocks=, {first} frames for the first block and {later} for each later",
    "num_inference_steps": _STEPS,
    "timesteps": _STEPS,
    "sigmas": _STEPS,
    "num_videos_per_prompt": "repeat the prompt: [prompt] * count",
    "seed": "give generator=, which takes a seed too",
    "max_sequence_length": "it is a setting of the pipeline, given when that is made",
    "callback_on_step_end": "give callback_on_block_end(pipe, index, block)",
    "latents": "noise is keyed by generator=, and clean first blocks go in as image= or video=",
    "prompt_embeds": "give the prompt itself",
    "strength": "video= is gone on from, not painted over: leave it out",
}


def foreign(unknown: Mapping[str, object], call: Callable[..., object], frames: int) -> TypeError:
    """Return the error for the first of the arguments that `call` does not take.

    `frames` are the latent frames of a block.
    """
    name, value = next(iter(unknown.items()))
    text = f"pipeline: {name} must not be given, got {value!r}; "
    if name in _ELSEWHERE:
        return TypeError(text + _ELSEWHERE[name].format(first=4 * frames - 3, later=4 * frames))
    kinds = inspect.signature(call).parameters.values()
    taken = [each.name for each in kinds if each.kind != inspect.Parameter.VAR_KEYWORD]
    return TypeError(f"{text}a call takes {', '.join(taken)}")


def texts(prompt: str | Sequence[str]) -> list[str]:
    """Return prompts without HTML escapes and repeated blanks, as Wan's were cleaned.

    What is no text stays for the loop to refuse; TypeError for no list of anything.
    """
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, Sequence):
        raise TypeError(f"pipeline: prompt must be a text or a list of texts, got {prompt!r}")
    return [
        " ".join(html.unescape(html.unescape(text)).split()) if isinstance(text, str) else text
        for text in prompt
    ]


def pixels(name: str, media: object) -> object:
    """Return an image or a video (`name`) as diffusers' processors take it; None stays None.

    PIL images become RGB, arrays become tensors `[..., 3, H, W]` in [0, 1]: whole numbers count to
    255. Raises TypeError for what holds no pixels, ValueError for other shapes and values.
    """
    if isinstance(media, str):
        raise TypeError(
            f"pipeline: {name} must be pixels, got {media!r}; "
            f"diffusers.utils.load_{name}({media!r}) reads them"
        )
    return None if media is None else _pixels(name, media, _AXES[name])


def _pixels(name: str, media: object, axes: Sequence[int]) -> object:
    """Return pixels that have one of these counts of axes; in a list they have one less."""
    from PIL import Image

    listed = isinstance(media, Sequence) and not isinstance(media, str)
    if listed and media and max(axes) > 3:
        return [_pixels(name, each, [count - 1 for count in axes if count > 3]) for each in media]
    if listed:
        shape = "an empty list" if not media else "lists of lists"
    elif isinstance(media, Image.Image):
        media, shape = media.convert("RGB"), [3, media.height, media.width]
    else:
        media = _in_range(name, media)
        shape = list(media.shape)
    if listed or len(shape) not in axes or shape[-3] != 3 or 0 in shape:
        frames = "N, " if name == "video" else ""
        raise ValueError(
            f"pipeline: {name} must be [B, {frames}3, H, W], as NumPy [B, {frames}H, W, 3], or a "
            f"list of images, got {shape}"
        )
    return media


def _in_range(name: str, media: object) -> Tensor:
    """Return a tensor's or an array's pixels `[..., 3, H, W]` in [0, 1]."""
    if isinstance(media, np.ndarray) and media.dtype.kind in "uif":
        # an array that was flipped has strides that torch does not take
        media = torch.from_numpy(np.ascontiguousarray(media))
        media = media.movedim(-1, -3) if media.ndim > 2 else media
    if not isinstance(media, Tensor) or media.dtype == torch.bool or media.is_complex():
        raise TypeError(f"pipeline: {name} must be pixels, got {media!r}")
    if not media.is_floating_point():
        media = media / 255
    if media.numel():
        low, high = (float(end) for end in media.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"pipeline: {name} must lie in [0, 1], or be whole numbers up to 255, "
                f"got {low:.3g} to {high:.3g}"
            )
    return media


def require_settings(**settings: object) -> None:
    """Raise TypeError or ValueError for a setting of the pipeline that cannot be."""
    frames = settings.get("frames_per_block", 3)
    least = {
        "frames_per_block": 1, "height": 1, "width": 1, "sink_frames": 0, "window_frames": frames,
        "drafter_window_frames": frames, "max_sequence_length": 1,
    }  # fmt: skip
    known = {*least, "past_weight", "schedule", "commit"}
    for name in settings.keys() - known:
        raise TypeError(
            f"pipeline: {name} must be a setting of the pipeline, got {settings[name]!r}; "
            f"they are {', '.join(sorted(known))}"
        )
    for name, lowest in least.items():
        value = settings.get(name, lowest)
        # everything that was; the target's window
        if value is None and name.endswith("window_frames"):
            continue
        if not isinstance(value, int):
            raise TypeError(f"pipeline: {name} must be an integer, got {value!r}")
        if value < lowest:
            raise ValueError(f"pipeline: {name} must be at least {lowest}, got {value}")
    weight = settings.get("past_weight", 1.0)
    if not isinstance(weight, int | float) or not 0 < weight <= 1:
        raise ValueError(f"pipeline: past_weight must lie in (0, 1], got {weight!r}")
    schedule = settings.get("schedule", "self_forcing")
    if not isinstance(schedule, str):
        raise TypeError(f"pipeline: schedule must be the name of a preset, got {schedule!r}")
    preset(schedule)
    policy(settings.get("commit", "lazy"))


def require_devices(**devices: object) -> None:
    """Raise ValueError for a part's device that this machine has not; None is fine."""
    for name, device in devices.items():
        if device is not None and not is_there(device):
            raise ValueError(
                f"pipeline: {name} must be on a device of this machine, got {device!r}"
            )


def repository(name: str, given: object) -> str:
    """Return the name of the Hub's repository that is `given` in place of a folder."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(given)):
        raise ValueError(
            f"pipeline: {name} must be a folder, or owner/name on the Hub, got {str(given)!r}; "
            "there is no such folder"
        )
    return str(given)


def require_base(given: str | Path) -> str | Path:
    """Return what text encoder and autoencoder are loaded from; ValueError where that cannot be."""
    if not Path(given).is_dir():
        return repository("base", given)
    parts = ("tokenizer", "text_encoder", "vae")
    if missing := [part for part in parts if not (Path(given) / part).is_dir()]:
        raise ValueError(
            f"pipeline: base must hold the folders {', '.join(parts)}, "
            f"got {given} without {', '.join(missing)}"
        )
    return given


def require_updates(**sources: tuple[object, object]) -> None:
    """Raise ValueError for a low-rank update (second) of a model that is no file (first)."""
    for name, (source, lora) in sources.items():
        if lora is not None and not isinstance(source, str | Path):
            raise ValueError(
                f"pipeline: {name}_lora must come with a file or folder as {name}, "
                f"got {type(source).__name__}"
            )


def require_fit(
    part: str,
    transformer: torch.nn.Module,
    vae: torch.nn.Module,
    text_encoder: torch.nn.Module,
    height: int,
    width: int,
) -> None:
    """Raise ValueError where a transformer (`part`) cannot make such a video with what is beside.

    `height` and `width` are in pixels.
    """
    config = transformer.config
    step = vae.config.scale_factor_spatial * config.patch_size[1]
    for name, size in (("height", height), ("width", width)):
        if size % step or size < step:
            raise ValueError(f"pipeline: {name} must be a multiple of {step}, got {size}")
    for what, own, other, beside in (
        ("latent channels", config.in_channels, vae.config.z_dim, "vae"),
        ("text channels", config.text_dim, text_encoder.config.d_model, "text_encoder"),
    ):
        if own != other:
            raise ValueError(
                f"pipeline: {part} must have the {other} {what} of the {beside}, got {own}; "
                "take both from one model (Wan 2.1 and 2.2 5B have autoencoders of their own)"
            )


def seeds(generator: Generator | Sequence[Generator] | None) -> int | list[int]:
    """Return the seed, or one for each prompt; a generator goes on by one number.

    None draws from torch's own generator, so that `torch.manual_seed` fixes the video. Raises
    TypeError for anything else.
    """
    if isinstance(generator, list | tuple):
        return [seeds(each) for each in generator]
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    if not isinstance(generator, int):
        raise TypeError(
            "pipeline: generator must be a torch.Generator, a seed, or one for each prompt, "
            f"got {generator!r}"
        )
    return generator
