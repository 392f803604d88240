"""What passes between the host and its devices: copies that wait for nothing, one wait to read."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`; the host waits only where the values come to the CPU."""
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    if tensor.device.type == "cpu":
        # from pageable memory the host would wait for all that the stream has to do yet
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def read(parts: Sequence[Tensor]) -> list[list[float]]:
    """Return the values of small tensors, flattened: one wait for each device they lie on."""
    values: dict[int, list[float]] = {}
    for device in dict.fromkeys(part.device for part in parts):
        places = [place for place, part in enumerate(parts) if part.device == device]
        flat = torch.cat([parts[place].flatten() for place in places]).tolist()
        for place in places:
            count = parts[place].numel()
            values[place], flat = flat[:count], flat[count:]
    return [values[place] for place in range(len(parts))]


def device_of(part: object, otherwise: torch.device) -> torch.device:
    """Return where a part computes: its `device`, or that of its weights."""
    device = getattr(part, "device", None)
    if isinstance(device, str | torch.device):
        return torch.device(device)
    weights = part.parameters() if isinstance(part, torch.nn.Module) else ()
    return next((weight.device for weight in weights), otherwise)


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream of `device` beside its current one, the same each time.

    torch has 32 a device and hands them out in turns: one for each video would soon be the stream
    of a captured graph, and share cuBLAS's workspace with its replays.
    """
    return _side_stream(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


def is_there(device: torch.device | str) -> bool:
    """Return whether `device` names one of this machine's."""
    try:
        known = torch.device(device)
    except (RuntimeError, TypeError):
        return False
    return known.type != "cuda" or (known.index or 0) < torch.cuda.device_count()


class Rows:
    """Some sequences of a batch: on the host, and copied at most once to each device."""

    def __init__(self, members: Sequence[int]) -> None:
        self.members = tuple(members)
        self._index: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.members)

    def on(self, device: torch.device) -> Tensor:
        """Return the rows as int64 `[b]` on `device`."""
        if device not in self._index:
            self._index[device] = move(torch.tensor(self.members), device)
        return self._index[device]
