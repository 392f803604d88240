"""Drop-in speed for pipelines that keep their own models and caches: `patch` and `unpatch`."""

from sdvg.adapters.self_forcing import patch, unpatch

__all__ = ["patch", "unpatch"]
