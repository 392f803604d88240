"""What a call of the pipeline is given, made what the loop takes."""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable, Sequence

import torch

Generator = torch.Generator | int
_GUIDANCE = "the models are distilled to run without guidance: leave it out"
_STEPS = "give schedule=, the name of a preset or a Schedule of timesteps"
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


def foreign(name: str, value: object, call: Callable[..., object], frames: int) -> TypeError:
    """Return the error for an argument that `call` does not take.

    `frames` are the latent frames of a block.
    """
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


def require_pixels(name: str, media: object, kinds: tuple[type, ...]) -> None:
    """Raise TypeError for an image or a video that is not of `kinds`; None is fine."""
    if isinstance(media, str):
        raise TypeError(
            f"pipeline: {name} must be pixels, got {media!r}; "
            f"diffusers.utils.load_{name}({media!r}) reads them"
        )
    if media is not None and not isinstance(media, kinds):
        raise TypeError(f"pipeline: {name} must be pixels, got {media!r}")


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
