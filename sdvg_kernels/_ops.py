"""The one place where ops are defined: their schemas, their fakes, and the loading of the compiled module `_C`.

Each op's schema and fake stand here once. `op/api.py` attaches the implementations with `implement`;
`_C` (CUDA C++, see csrc/) attaches its own to the same schemas when it is imported by `load_extension`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch

NAMESPACE = "sdvg_kernels"
# the host lane: the same CUDA sources, run on the CPU phase by phase (csrc/, sdvg_kernels.testing)
HOST_NAMESPACE = "sdvg_kernels_host"

_LIBRARIES = {name: torch.library.Library(name, "DEF") for name in (NAMESPACE, HOST_NAMESPACE)}


def define(schema: str, fake: Callable[..., object], *, host_lane: bool = False) -> None:
    """Define the op `schema` with its `fake`; with `host_lane`, also in the host lane's namespace."""
    name = schema.split("(", 1)[0]
    for namespace in (NAMESPACE, HOST_NAMESPACE) if host_lane else (NAMESPACE,):
        _LIBRARIES[namespace].define(schema)
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=_LIBRARIES[namespace])


def implement(name: str, *, cpu: Callable[..., object], cuda: Callable[..., object] | None = None) -> None:
    """Attach the implementations of the op `name` that are written in Python."""
    library = _LIBRARIES[NAMESPACE]
    library.impl(name, cpu, "CPU")
    if cuda is not None:
        library.impl(name, cuda, "CUDA")


@functools.cache
def load_extension() -> tuple[ModuleType | None, str]:
    """Return (`_C`, "") or (None, why it is not there)."""
    try:
        return importlib.import_module("sdvg_kernels._C"), ""
    except ImportError as error:
        return None, str(error)
