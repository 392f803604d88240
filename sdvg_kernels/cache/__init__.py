"""Stage, commit, rollback, compact, select: KV caches changed in place, all layers in one launch.

There is no kernel.py and no config.py here: the kernel is CUDA C++ (csrc/cache.cu, with its launch
choices beside it), because these ops move bytes and nothing else, and because its source also runs
on the CPU, thread by thread (the host lane).
"""

from sdvg_kernels.cache.api import (
    PointerTable,
    commit_,
    compact_,
    implementations,
    rollback_,
    select_,
    stage_,
)

__all__ = [
    "PointerTable",
    "commit_",
    "compact_",
    "implementations",
    "rollback_",
    "select_",
    "stage_",
]
