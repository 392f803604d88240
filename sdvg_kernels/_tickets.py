"""Counters by which the last program of a tile knows that it is the last; zero between launches."""

from __future__ import annotations

import torch

# tickets of a device, 4 MB: 16 thousand captured launches of 64 tiles; most tiles of a launch
_TICKET_COUNT, MOST_TILES = 1 << 20, 256


class Tickets:
    """Counters of one device, zero between launches: a run of them for each that may be in flight.

    Launches on one stream follow each other and share a run. A graph replays on any stream, beside
    anything: each launch that is captured keeps a run of its own for good.
    """

    def __init__(self, device: torch.device) -> None:
        self._all = torch.zeros(_TICKET_COUNT, dtype=torch.int32, device=device)
        self._used = 0
        self._of_stream: dict[int, torch.Tensor] = {}
        if device.type == "cuda":
            # once for each device: streams that come later need not wait for the zeros
            zeroed = torch.cuda.Event()
            zeroed.record()
            zeroed.synchronize()

    def take(self, stream: int | None, tiles: int) -> torch.Tensor | None:
        """Return the run of `stream`, or a new one for a graph (None); None when all are taken."""
        if stream in self._of_stream:
            return self._of_stream[stream]
        first = self._used
        # runs keep their pointers' alignment, or Triton would compile again
        last = first + (MOST_TILES if stream is not None else -(-tiles // 32) * 32)
        if last > len(self._all):
            return None
        self._used = last
        run = self._all[first:last]
        if stream is not None:
            self._of_stream[stream] = run
        return run


_POOLS: dict[torch.device, Tickets] = {}


def take(device: torch.device, tiles: int) -> torch.Tensor | None:
    """Return a zero ticket for each of `tiles`, or None: then the parts take a second launch.

    None for more tiles than a run has, when captured launches hold all runs, and where the first
    launch of all is captured: a graph must not own the counters.
    """
    if tiles > MOST_TILES:
        return None
    stream: int | None = 0
    if device.type == "cuda":
        capturing = torch.cuda.is_current_stream_capturing()
        if capturing and device not in _POOLS:
            return None
        stream = None if capturing else torch.cuda.current_stream(device).cuda_stream
    if device not in _POOLS:
        _POOLS[device] = Tickets(device)
    return _POOLS[device].take(stream, tiles)
