"""How published systems run: settings for `SDVGPipeline.from_checkpoints(recipe=...)`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# name -> settings of the pipeline; a setting given beside the recipe goes before it
RECIPES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        # the last 21 latent frames, everything that the model was trained on
        "self_forcing": {"window_frames": 21, "schedule": "self_forcing"},
        # `local_attn_size` 12 counts the sink; prompts are switched with a recache of the window
        "longlive": {"sink_frames": 3, "window_frames": 9, "schedule": "self_forcing"},
        # LongLive's model and window, four blocks with the sink, in 4, 3, then 2 steps; the next
        # block attends to what the last noisy step left
        "diagonal": {"sink_frames": 3, "window_frames": 9, "schedule": "diagonal"},
        # no cache is kept: the last three clean latents are written anew before each block, and
        # what is between the first frame and the block weighs 0.3 against drift
        "krea": {
            "window_frames": 6,
            "past_weight": 0.3,
            "schedule": "krea",
            "commit": "recompute:3",
        },
    }
)


def recipe(name: str) -> dict[str, object]:
    """Return the settings of a recipe; ValueError for a name that there is not."""
    if name not in RECIPES:
        raise ValueError(f"pipeline: recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return dict(RECIPES[name])
