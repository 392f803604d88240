"""CUDA graphs of a model's passes: one capture for each shape, replayed for every block."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdvg.models.capture import Recorder, first_cause

if TYPE_CHECKING:
    from sdvg.models.wan import CausalWan

_LOG = logging.getLogger("sdvg")


class Graphs:
    """Replays `CausalWan.forward` from CUDA graphs, one for each shape of a pass.

    What changes between passes of one shape lies in buffers that stay: the latents, what is known
    of the timestep, the sequences' indices, and in the model itself the cache with its lengths and
    the prompt's keys. Positions are read from the lengths on the device. All graphs of a model
    share one pool of memory: passes follow each other. A pass that cannot be captured is launched
    one kernel at a time, and a warning says why.
    """

    def __init__(self, model: CausalWan) -> None:
        self.model = model
        self._graphs: dict[tuple[object, ...], tuple[list[Tensor], Callable[[], Tensor]]] = {}
        # the cache and the table that they were captured with
        self._stamp: tuple[Tensor, ...] = ()
        # of the weights and of the prompt's keys
        self._addresses: tuple[int, ...] = ()
        self._recorder = Recorder()
        # why a capture failed; another one of this model would too
        self._failure = ""

    def start(self) -> None:
        """Begin a video: drop what was captured if weights or the prompt's keys lie elsewhere."""
        transformer = self.model.transformer
        tensors = [*transformer.parameters(), *transformer.buffers()]
        for block in transformer.blocks:
            tensors += [block.attn2.processor.key, block.attn2.processor.value]
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        if self._addresses != addresses:
            self._drop()
            self._addresses = addresses

    def release(self) -> None:
        """Let go of all captures and their memory; passes to come are captured anew."""
        self._drop()
        self._addresses, self._failure = (), ""

    def _drop(self) -> None:
        self._graphs, self._stamp = {}, ()
        self._recorder.drop()

    def __call__(
        self,
        start_frame: int,
        latents: Tensor,
        embedded: tuple[Tensor, Tensor, Tensor],
        rows: Tensor | None,
    ) -> Tensor:
        """Return what `model.forward` does."""
        reason = self._reason(latents)
        if reason:
            _warn_once(reason)
            return self.model.forward(start_frame, latents, embedded, rows)
        table = self.model.rope_table.reserve(start_frame + latents.shape[1])
        stamp = (self.model.cache.k, table)
        if len(self._stamp) != 2 or any(
            a is not b for a, b in zip(self._stamp, stamp, strict=True)
        ):
            # the graphs hold the addresses of tensors that are gone
            self._drop()
            self._stamp = stamp
        inputs = [latents, *embedded] + ([] if rows is None else [rows])
        # a pass of several blocks has one timestep, or one for each
        key = (tuple(latents.shape), latents.dtype, len(inputs), tuple(embedded[0].shape))
        if key not in self._graphs:
            buffers = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]

            def forward() -> Tensor:
                given, *known = buffers
                return self.model.forward(
                    start_frame, given, tuple(known[:3]), known[3] if known[3:] else None
                )

            try:
                self._graphs[key] = buffers, self._capture(forward)
            except RuntimeError as error:
                self._drop()
                self._failure = f"a capture failed: {first_cause(error)}"
            if self._failure:
                return self(start_frame, latents, embedded, rows)
        buffers, replay = self._graphs[key]
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor)
        # the next replay overwrites it
        return replay().clone()

    def _reason(self, latents: Tensor) -> str:
        """Return why a pass cannot be captured, or ""."""
        if latents.device.type != "cuda":
            return f"CUDA graphs need a GPU, and the model is on {latents.device.type}"
        if hasattr(self.model.transformer, "_hf_hook"):
            return "CUDA graphs need weights that stay on the GPU, and accelerate offloads them"
        return self._failure

    def _capture(self, forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture `forward` and return its replay."""
        device = self.model.cache.k.device
        self._recorder.warm_up(forward, device)
        out, run = self._recorder.record(forward, device)

        def replay() -> Tensor:
            run()
            return out

        return replay


@functools.cache
def _warn_once(reason: str) -> None:
    _LOG.warning("accelerate: passes are launched one by one: %s", reason)
