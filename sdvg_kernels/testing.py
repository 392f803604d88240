"""What tests of the ops share, shipped so that users can test their own GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sdvg_kernels import _ops

# --- the host lane: the CUDA sources, run on CPU tensors thread by thread ---


def host_lane_missing() -> str:
    """Return why `implementation="host"` cannot run here, or ""."""
    extension, reason = _ops.load_extension()
    return "" if extension is not None else f"the host lane needs sdvg_kernels._C: {reason}"


@contextlib.contextmanager
def host_lane_order(order: int) -> Iterator[None]:
    """Run the host lane's blocks, and the threads of each phase, in another order meanwhile.

    Arguments:
        order: 0 forward, 1 backward, anything else shuffled with that seed. A kernel that misses a
            barrier, or whose blocks overlap, gives other bytes in another order.

    Raises: RuntimeError where the host lane is not built.
    """
    extension, _ = _ops.load_extension()
    if extension is None:
        raise RuntimeError(host_lane_missing())
    extension.set_host_order(order)
    try:
        yield
    finally:
        extension.set_host_order(0)
