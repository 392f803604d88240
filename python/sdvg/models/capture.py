"""Recording of CUDA graphs: on one stream, into one pool, and back to order after a failure."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch

_Result = TypeVar("_Result")


class Recorder:
    """Records graphs that share a pool of memory: their replays must follow each other."""

    def __init__(self) -> None:
        self._pool: tuple[int, int] | None = None
        # one for all captures: freed memory of a pool serves only the stream that it came from, and
        # cuBLAS keeps a workspace for each stream that it has seen
        self._stream: torch.cuda.Stream | None = None

    def drop(self) -> None:
        """Begin a new pool: one whose graphs are gone takes no new ones."""
        self._pool = None

    def warm_up(self, forward: Callable[[], _Result], device: torch.device) -> _Result:
        """Run until nothing is made for the first time; return what the last run returned."""
        # another GPU may be the current one
        with torch.cuda.device(device):
            before, stream = torch.cuda.current_stream(), self._stream
            if stream is None or stream.device != device:
                # what it runs may have moved to another GPU
                self._stream = stream = torch.cuda.Stream(device)
            stream.wait_stream(before)
            try:
                with torch.cuda.stream(stream):
                    forward()
                    return forward()
            finally:
                # what comes next writes where it has written
                before.wait_stream(stream)

    def record(
        self, forward: Callable[[], _Result], device: torch.device
    ) -> tuple[_Result, Callable[[], None]]:
        """Capture `forward`; return what it returned, and what runs it again, writing there.

        Raises RuntimeError where `forward` cannot be captured; stream, allocator and random numbers
        are then as they were, and the pool is to be dropped.
        """
        with torch.cuda.device(device):
            graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            try:
                # other threads may allocate meanwhile
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    out = forward()
            except RuntimeError:
                # a broken capture leaves its stream current and the allocator in its pool
                torch.cuda.set_stream(before)
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(before.device_index, self._pool)
                    torch._C._cuda_releasePool(before.device_index, self._pool)
                self._end_well(device)
                torch.cuda.set_stream(before)
                raise
        return out, graph.replay

    def _end_well(self, device: torch.device) -> None:
        """Capture next to nothing: torch draws no random number until a capture has ended well."""
        # torch warns of a graph with nothing in it
        with (
            contextlib.suppress(RuntimeError),
            torch.cuda.graph(
                torch.cuda.CUDAGraph(), stream=self._stream, capture_error_mode="thread_local"
            ),
        ):
            torch.ones(1, device=device)


def first_cause(error: BaseException) -> str:
    """Return the first line of what went wrong first."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]
