"""How long each stage takes: wall clock on a CPU, events on a GPU."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Sums seconds and units of work by stage; a block that was not ended leaves no trace.

    Attributes:
        seconds: stage -> seconds in all finished blocks; stages on different streams may overlap.
        units: stage -> how many (sequence, block) pairs that stage worked on.
        total: wall-clock seconds of all finished blocks.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.units: Counter[str] = Counter()
        self.total = 0.0
        self.begin()

    def begin(self) -> None:
        """Start a block, forgetting one that was not ended."""
        self._marks: list[tuple[str, int, object, object]] = []
        self._began = time.perf_counter()

    @contextmanager
    def stage(self, name: str, units: int, device: torch.device) -> Iterator[None]:
        """Time what runs inside on `device`; on a GPU without waiting for it."""
        begin = _mark(device)
        yield
        self._marks.append((name, units, begin, _mark(device)))

    def end(self) -> dict[str, float]:
        """End the block and return its seconds by stage; waits for a GPU's work."""
        block: Counter[str] = Counter()
        for name, units, begin, end in self._marks:
            block[name] += _between(begin, end)
            self.units[name] += units
        self.seconds.update(block)
        self.total += time.perf_counter() - self._began
        return dict(block)


def _mark(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(end, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1000
