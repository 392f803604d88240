"""How long each stage takes: wall clock on a CPU, events on a GPU."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class _Mark(NamedTuple):
    stage: str
    units: int
    block: int
    begin: float | torch.cuda.Event
    end: float | torch.cuda.Event


class Clock:
    """Sums seconds and units of work by stage; on a GPU it reads events and never waits for them.

    Attributes:
        seconds: stage -> seconds of the work that is known to be done; stages on different streams
            may overlap.
        units: stage -> how many (sequence, block) pairs that stage worked on; for the target, how
            many passes of such pairs.
        total: wall-clock seconds of the blocks, also of one that was interrupted.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.units: Counter[str] = Counter()
        self.total = 0.0
        self._marks: list[_Mark] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what runs inside to the total."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.total += time.perf_counter() - began

    @contextmanager
    def stage(self, name: str, units: int, device: torch.device, block: int) -> Iterator[None]:
        """Time what runs inside on `device` for `block`, which may be one that is yet to come."""
        begin = _mark(device)
        yield
        self._marks.append(_Mark(name, units, block, begin, _mark(device)))

    def end(self, block: int) -> dict[str, float]:
        """Return the seconds of `block` by stage.

        Work that a GPU has not done yet (a draft that nobody looks at, on a stream of its own)
        counts to the block at whose end it is done.
        """
        spent: Counter[str] = Counter()
        waiting = []
        for mark in self._marks:
            if mark.block > block or not _done(mark.end):
                waiting.append(mark)
                continue
            spent[mark.stage] += _between(mark.begin, mark.end)
            self.units[mark.stage] += mark.units
        self._marks = waiting
        self.seconds.update(spent)
        return dict(spent)

    def finish(self, block: int) -> None:
        """Wait for the work of all blocks up to `block`, and count it."""
        for mark in self._marks:
            if mark.block <= block and not _done(mark.end):
                mark.end.synchronize()
        self.end(block)


def _mark(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _done(mark: float | torch.cuda.Event) -> bool:
    return isinstance(mark, float) or mark.query()


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    return end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1000
