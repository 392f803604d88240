"""Launch choices that `python -m sdvg_kernels.autotune` measured: op/config.py asks here first.

SDVG_TUNED is the file's path, or `off`; without it, the file is where autotune puts it:
`sdvg_kernels/<GPU>.json` in $XDG_CACHE_HOME, or ~/.cache. A file is read once. One of another
format, package version, GPU or Triton version is ignored, and so is a choice that is not among an
op's candidates; the reason is logged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch

FORMAT = 1
_LOG = logging.getLogger("sdvg_kernels")
# a frozen dataclass of launch parameters, with a `reason`
_Launch = TypeVar("_Launch")
# (op, key) -> what autotune measures at the moment
_FORCED: dict[tuple[str, str], object] = {}
# (op, key, GPU) -> what was chosen
_CHOSEN: dict[tuple[str, str, str], object] = {}


def choose(
    op: str,
    key: str,
    gpu: str | None,
    default: _Launch,
    candidates: Callable[[], Sequence[_Launch]],
) -> _Launch:
    """Return the launch that was measured best for `key` on `gpu`, else `default`.

    Arguments:
        key: what the choice depends on, as text, within the op.
        gpu: the GPU's name (`gpu_name`); None: there is none, and nothing was measured.
        candidates: gives the launches that a file may name.
    """
    if _FORCED and (op, key) in _FORCED:
        return cast("_Launch", _FORCED[op, key])
    if gpu is None:
        return default
    chosen = _CHOSEN.get((op, key, gpu))
    if chosen is None:
        chosen = _CHOSEN[op, key, gpu] = _measured(op, key, gpu, candidates) or default
    return cast("_Launch", chosen)


def _measured(
    op: str, key: str, gpu: str, candidates: Callable[[], Sequence[_Launch]]
) -> _Launch | None:
    """Return the candidate that the file of `gpu` names, or None."""
    found = read(gpu).get(op, {}).get(key)
    if found is None:
        return None
    for launch in candidates():
        if numbers(launch) == found["launch"]:
            return launch
    _LOG.warning("%s: tuned launch %s of %r is no candidate: ignored", op, found["launch"], key)
    return None


def numbers(launch: object) -> dict[str, int]:
    """Return a launch's parameters without its reason, as a file holds them."""
    names = (field.name for field in dataclasses.fields(launch))
    return {name: getattr(launch, name) for name in names if name != "reason"}


@contextlib.contextmanager
def force(op: str, key: str, launch: object) -> Iterator[None]:
    """Make `choose` return `launch` for `key` meanwhile."""
    _FORCED[op, key] = launch
    try:
        yield
    finally:
        del _FORCED[op, key]


@functools.cache
def gpu_name(device: torch.device) -> str | None:
    """Return the name of a CUDA device, or None."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def path_of(gpu: str) -> Path:
    """Return where the file of `gpu` is by default."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sdvg_kernels" / (re.sub(r"\W+", "-", gpu).strip("-") + ".json")


def stamp(gpu: str) -> dict[str, object]:
    """Return what must be the same where a file is read as where it was written."""
    import triton

    package = sys.modules["sdvg_kernels"].__version__
    return {
        "format": FORMAT,
        "sdvg_kernels": package,
        "gpu": gpu,
        "triton": triton.__version__,
    }


def read(gpu: str) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Return the choices of the file for `gpu`: op -> key -> {"launch": parameters, ...}, or {}."""
    setting = os.environ.get("SDVG_TUNED", "")
    if setting == "off":
        return {}
    path = Path(setting) if setting else path_of(gpu)
    return _read(path, gpu, bool(setting))


@functools.cache
def _read(path: Path, gpu: str, named: bool) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    if not path.exists() and not named:
        return {}
    try:
        table = json.loads(path.read_text())
        for name, wanted in stamp(gpu).items():
            if table.get(name) != wanted:
                raise ValueError(f"its {name} is {table.get(name)!r}, not {wanted!r}")
        # what is not of this form fails here, not in a launch
        return {
            op: {key: {"launch": dict(choice["launch"])} for key, choice in choices.items()}
            for op, choices in table["choices"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _LOG.warning("tuned launches in %s are ignored: %s", path, error)
        return {}


def forget() -> None:
    """Read files again: a new one was written."""
    _CHOSEN.clear()
    _read.cache_clear()
