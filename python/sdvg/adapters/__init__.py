"""Drop-in speed for models that are not ours: `patch`, and diffusers' backend "sdvg"."""

from sdvg.adapters.diffusers_backend import (
    register_attention_backend,
    unregister_attention_backend,
)
from sdvg.adapters.patch import patch, unpatch

__all__ = ["patch", "register_attention_backend", "unpatch", "unregister_attention_backend"]
