"""Diagonal decoding (arXiv 2503.14070): one loop for every order in which a grid can be decoded.

    pass p:  ids = buffer[sources[p]]              # tokens of passes before, or what stands in
             logits = model(ids, slots[p])         # their K/V go to their slots
             buffer[outputs[p]] = sample(logits)   # guided, warped, by noise that is keyed

The tables come from `sdvg_kernels.diagonal_schedule`: spatial, spatio-temporal and ZipAR decoding
differ in them alone, and raster decoding is `k = width`. Nothing of a pass is read back: there is
one CUDA graph for each width of a pass, and the host waits once a frame.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sdvg.host import move
from sdvg.models.capture import Recorder
from sdvg.tokens.checks import (
    check_ids,
    check_layout,
    check_videos,
    each,
    require_tokens,
    whole,
)
from sdvg.tokens.window import TokenModel, Window
from sdvg_kernels import TokenGrid

MODES = ("raster", "spatial", "spatiotemporal", "zipar")
ROW_STARTS = ("newest", "above", "prompt", "eol")


@dataclass(frozen=True)
class Layout:
    """What lies where in a sequence of tokens.

        [prompt] [frame 0, row by row] [extra tokens] [frame 1] [extra tokens] ...

    Args:
        height, width: tokens of a frame.
        codes: how many ids a frame's tokens may have.
        first: the lowest of these ids.
        extra: tokens between two frames, such as an action, given by the caller.
        eol: id of the token that ends each row, for models that have one.

    Raises: TypeError for what is no whole number, ValueError, in one sentence.
    """

    height: int
    width: int
    codes: int
    first: int = 0
    extra: int = 0
    eol: int | None = None

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name, least in (("height", 1), ("width", 1), ("codes", 1), ("first", 0), ("extra", 0)):
            whole("layout", name, getattr(self, name), least)
        if self.eol is not None:
            whole("layout", "eol", self.eol, 0)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; `sdvg_kernels.sample_tokens` says what each means.

    Raises: TypeError for what is no number, ValueError for NaN or out of range, in one sentence.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers: NaN fails every comparison."""
        for name in ("temperature", "top_p", "guidance"):
            if not isinstance(value := getattr(self, name), Real):
                raise TypeError(f"sampling: {name} must be a number, got {value!r}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"sampling: temperature must be finite and at least 0, got {self.temperature}"
            )
        if self.top_k is not None:
            whole("sampling", "top_k", self.top_k, 1)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling: top_p must lie in (0, 1], got {self.top_p}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"sampling: guidance must be finite, got {self.guidance}")


class Frame(NamedTuple):
    """One finished frame of some sequences of the batch: of all, unless they began apart."""

    index: int
    # places in the batch
    rows: tuple[int, ...]
    # [rows, height, width] int64, from 0
    codes: Tensor
    # of the model since the start, prefills left out
    passes: int
    # spent in the loop since the start
    seconds: float


class Actions(Protocol):
    """Gives the extra tokens before a frame, when they are needed and not earlier.

    They should lie on the CPU: they are checked there, and the host would wait for a GPU's.
    """

    def __call__(self, frame: int, rows: tuple[int, ...]) -> Tensor:
        """Return ids `[len(rows), extra]` that lead to `frame` (1, 2, ...)."""
        ...


class DiagonalDecoder:
    """Decodes videos of tokens along diagonals.

    Args:
        model: a `TokenModel`, such as `sdvg.models.tokens.TokenLlama`.
        layout: what lies where.
        k: tokens that a row's start is behind the row above, in [1, width]; not for "raster".
        mode: "spatial", frame after frame; "spatiotemporal", where a frame starts before the one
            above it is whole; "zipar", whose frames decode their first row alone; or "raster", a
            token a pass, which is spatial with `k = width`.
        row_start: what stands in for a row's predecessor that is not decoded yet: "newest",
            "above", "prompt" or "eol" (`sdvg_kernels.diagonal_schedule`). None: "eol" where the
            layout has one, else "newest".
        sampling: how tokens are drawn.
        context: slots of the cache. A video that does not fit goes on with the prompt and the last
            `keep` frames, written anew into an empty cache (MineWorld). None: the whole video.
        keep: frames that are kept when the context slides.
        published: attend as the released loops do, to slots that are not decoded yet, too, which
            hold zeros.
        graphs: replay a CUDA graph for each width of a pass. None: where the model is on a GPU.

    Raises: ValueError, or TypeError for what is no number, in one sentence.
    """

    def __init__(
        self,
        model: TokenModel,
        layout: Layout,
        *,
        k: int | None = None,
        mode: str = "spatial",
        row_start: str | None = None,
        sampling: Sampling | None = None,
        context: int | None = None,
        keep: int = 1,
        published: bool = False,
        graphs: bool | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"diagonal: mode must be one of {', '.join(MODES)}, got {mode!r}")
        if mode == "raster" and k not in (None, layout.width):
            raise ValueError(
                f"diagonal: k must be the width {layout.width} in raster order, got {k}"
            )
        if mode != "raster" and k is None:
            raise ValueError("diagonal: k must be given, got None; k = width is raster decoding")
        if graphs and model.device.type != "cuda":
            raise ValueError(f"diagonal: graphs must be off without a GPU, got {model.device}")
        check_layout("diagonal", layout, model.vocabulary)
        for name, value in (("k", k), ("context", context), ("keep", keep)):
            if value is not None:
                whole("diagonal", name, value)
        if keep < 1:
            raise ValueError(f"diagonal: keep must be at least 1 frame, got {keep}")
        self.model, self.layout, self.sampling = model, layout, sampling or Sampling()
        self.k = layout.width if k is None else k
        self.mode = "spatial" if mode == "raster" else mode
        if row_start not in (None, *ROW_STARTS):
            raise ValueError(
                f"diagonal: row_start must be one of {', '.join(ROW_STARTS)}, got {row_start!r}"
            )
        self.row_start = row_start or ("newest" if layout.eol is None else "eol")
        if (self.row_start == "eol") != (layout.eol is not None):
            raise ValueError(
                "diagonal: row_start must be 'eol' where the layout has one and only there, "
                f"got {self.row_start!r}"
            )
        self.context, self.keep, self.published = context, keep, published
        self.graphs = model.device.type == "cuda" if graphs is None else graphs
        # raises where sizes or k are wrong
        self.grid(1)
        # what a run leaves for the next: a cache, and captured passes
        self.recorder = Recorder()
        self._windows: dict[tuple[int, int, int], Window] = {}
        self._cache: object = None
        self._cache_shape = (0, 0)
        self._weights: tuple[tuple[int, torch.dtype], ...] = ()
        self._running: Generation | None = None

    def grid(self, prefix: int) -> TokenGrid:
        """Return the grid behind `prefix` tokens."""
        layout = self.layout
        return TokenGrid(
            layout.height, layout.width, self.k, self.mode, prefix, layout.extra,
            layout.eol is not None,
        )  # fmt: skip

    def passes(self, frames: int, prefix: int = 1) -> int:
        """Return how many passes a video takes that fits the context."""
        return self.grid(prefix).passes(frames)

    # what is made for a video is written in a caller's inference mode or out of it
    @torch.inference_mode(False)
    def generate(
        self,
        prompts: Tensor,
        *,
        frames: int,
        uncond: Tensor | None = None,
        actions: Tensor | Actions | None = None,
        seed: int = 0,
        sequences: Sequence[int] | None = None,
        delays: Sequence[int] | None = None,
    ) -> Generation:
        """Return an iterator over the frames of one video for each prompt.

        Args:
            prompts: ids [B, P], P >= 1: all that comes before frame 0 (text, reference frames).
            frames: how many.
            uncond: ids [B, P] of the prompts without the condition; needed with guidance.
            actions: ids [B, frames - 1, extra] of the tokens between frames, or a callable that is
                asked for them (on the CPU) when a frame is about to start, as a player acts.
            seed, sequences: key each video's noise, with the place of the token in the video: a
                video is the same alone and in any batch.
            delays: passes by which each sequence begins later than the batch.

        Raises: ValueError, or TypeError for what is no id or number, in one sentence; RuntimeError
            by an older iterator: there is one cache.
        """
        self._running = Generation(self, prompts, frames, uncond, actions, seed, sequences, delays)
        return self._running

    def window(self, batch: int, prefix: int, frames: int, slots: int) -> Window:
        """Return the passes of `frames` frames behind `prefix` tokens, with a cache of `slots`."""
        copies = 2 if self.sampling.guidance != 1 else 1
        weights = tuple((weight.data_ptr(), weight.dtype) for weight in self.model.parameters())
        if self._cache_shape != (copies * batch, slots) or self._weights != weights:
            # captured passes hold the addresses of cache and weights, which may have moved
            self._windows.clear()
            self.recorder.drop()
            self._cache = self.model.new_cache(copies * batch, slots)
            self._cache_shape, self._weights = (copies * batch, slots), weights
        key = (batch, prefix, frames)
        if key not in self._windows:
            self._windows[key] = Window(self, self._cache, batch, prefix, frames)
        return self._windows[key]


class Generation(Iterator[Frame]):
    """The loop itself: `next` runs passes until a frame is whole, `step` runs one.

    Attributes:
        passes: of the model so far, prefills left out.
        seconds: spent so far in the loop.
    """

    def __init__(
        self,
        decoder: DiagonalDecoder,
        prompts: Tensor,
        frames: int,
        uncond: Tensor | None,
        actions: Tensor | Actions | None,
        seed: int,
        sequences: Sequence[int] | None,
        delays: Sequence[int] | None,
    ) -> None:
        self.decoder, self.frames = decoder, frames
        self._prompts, self._uncond, self._actions = prompts, uncond, actions
        self.passes, self.seconds = 0, 0.0
        check_videos(
            "diagonal", decoder.model, decoder.layout, decoder.sampling,
            prompts=prompts, frames=frames, uncond=uncond, actions=actions,
        )  # fmt: skip
        batch, prefix = prompts.shape
        self._sequences = each("diagonal", "sequences", sequences, range(batch))
        self._delays = each("diagonal", "delays", delays, [0] * batch)
        if min(self._delays, default=0) < 0:
            raise ValueError(f"diagonal: delays must be at least 0, got {min(self._delays)}")
        self._seed = (whole("diagonal", "seed", seed) + 2**63) % 2**64 - 2**63
        self._slots, self._spans = self._split(prefix)
        if len(self._spans) > 1 and any(self._delays):
            raise ValueError(
                f"diagonal: delays must be 0 where the context of {self._slots} slots slides, "
                f"got {self._delays}"
            )
        device = decoder.model.device
        self._codes = torch.zeros(
            batch, frames, decoder.layout.height, decoder.layout.width,
            dtype=torch.int64, device=device,
        )  # fmt: skip
        # extra tokens so far, by the frame that they lead to
        self._leading: dict[int, Tensor] = {}
        self._steps = self._run()
        self._whole: deque[Frame] = deque()
        self._failed = False

    def __next__(self) -> Frame:
        """Run passes until a frame is whole, and return it."""
        while not self._whole:
            self._whole.extend(self.step())
        return self._whole.popleft()

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self) -> tuple[Frame, ...]:
        """Run one pass and return the frames that it made whole: none, mostly.

        Raises: StopIteration after the last pass; ValueError for logits without a distribution.
        """
        if self.decoder._running is not self:
            raise RuntimeError(
                "diagonal: a decoder must run one generation at a time, got an older one; "
                "finish it first"
            )
        if self._failed:
            raise RuntimeError("diagonal: a generation must not go on after an error; begin anew")
        began = time.perf_counter()
        self._failed = True
        try:
            done = next(self._steps)
            # the one time in a frame that the host waits
            for index, rows in done:
                names = [self._sequences[row] for row in rows]
                require_tokens(self._codes[list(rows), index], index, names)
            self._failed = False
        except StopIteration:
            self._failed = False
            raise
        self.seconds += time.perf_counter() - began
        return tuple(
            Frame(index, rows, self._codes[list(rows), index], self.passes, self.seconds)
            for index, rows in done
        )

    @property
    def codes(self) -> Tensor:
        """All tokens [B, frames, height, width] int64, from 0; 0 where there are none yet."""
        return self._codes

    def _run(self) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        """Run pass after pass; yield the (frame, rows) that each made whole."""
        decoder, batch = self.decoder, len(self._prompts)
        for first, count in self._spans:
            prefix, uncond = self._prefix(first)
            window = decoder.window(batch, prefix.shape[1], count, self._slots)
            window.begin(prefix, uncond, first, self._seed, self._sequences, self._delays)
            plan = window.plan
            ends = {place: first + i for i, place in enumerate(plan.frame_ends)}
            starts = {place: first + i for i, place in enumerate(plan.frame_starts) if i}
            for tick in range(max(self._delays, default=0) + len(plan.widths) if batch else 0):
                at = [tick - delay for delay in self._delays]
                for place in sorted({*at} & {*starts}):
                    self._act(window, first, starts[place], _where(at, place))
                live = [place for place in at if 0 <= place < len(plan.widths)]
                if not live:
                    continue
                window.run(live)
                self.passes += 1
                done = [(ends[place], _where(at, place)) for place in sorted({*at} & {*ends})]
                for frame, rows in done:
                    self._codes[list(rows), frame] = window.frame(frame - first, rows)
                yield done

    def _act(self, window: Window, first: int, frame: int, rows: tuple[int, ...]) -> None:
        """Write the extra tokens that lead to `frame`."""
        if self.decoder.layout.extra:
            window.write_extra(frame - first, rows, self._extra(frame, rows))

    def _extra(self, frame: int, rows: tuple[int, ...]) -> Tensor:
        """Return the extra tokens [rows, extra] that lead to `frame`, asked for once."""
        layout, model = self.decoder.layout, self.decoder.model
        if isinstance(self._actions, Tensor):
            # a list as an index is uploaded from pageable memory, and the host waits
            ids = self._actions[move(torch.tensor(rows), self._actions.device), frame - 1]
        else:
            ids = self._actions(frame, rows)
            check_ids("actions", ids, (len(rows), layout.extra), model.vocabulary)
        ids = move(ids, model.device).long()
        kept = self._leading.setdefault(frame, ids.new_zeros(len(self._prompts), layout.extra))
        kept[move(torch.tensor(rows), model.device)] = ids
        return ids

    def _prefix(self, first: int) -> tuple[Tensor, Tensor | None]:
        """Return all ids before frame `first` that its window sees, and those without condition."""
        layout, decoder = self.decoder.layout, self.decoder
        prompts = [self._prompts] if self._uncond is None else [self._prompts, self._uncond]
        parts: list[Tensor] = []
        everybody = tuple(range(len(self._prompts)))
        for frame in range(max(0, first - decoder.keep), first) if first else ():
            codes = self._codes[:, frame] + layout.first
            if layout.eol is not None:
                codes = torch.nn.functional.pad(codes, (0, 1), value=layout.eol)
            parts.append(codes.flatten(1))
            if layout.extra:
                known = self._leading.get(frame + 1)
                parts.append(self._extra(frame + 1, everybody) if known is None else known)
        device = decoder.model.device
        whole = [
            torch.cat([prompt.to(device, torch.int64), *parts], 1).contiguous()
            for prompt in prompts
        ]
        return whole[0], whole[1] if len(whole) > 1 else None

    def _split(self, prefix: int) -> tuple[int, list[tuple[int, int]]]:
        """Return the cache's slots, and the (first frame, frames) of each time it is filled."""
        decoder = self.decoder
        grid = decoder.grid(prefix)
        if decoder.context is None or grid.slots(self.frames) <= decoder.context:
            return grid.slots(self.frames), [(0, self.frames)]
        spans, made = [], 0
        while made < self.frames:
            kept = min(decoder.keep, made)
            grid = decoder.grid(prefix + kept * grid.frame_stride)
            if grid.slots(1) > decoder.context:
                what = f" after {kept} kept" if kept else ""
                raise ValueError(
                    f"diagonal: context must hold at least {grid.slots(1)} slots, the prompt and "
                    f"one frame{what}, got {decoder.context}"
                )
            count = 1
            while made + count < self.frames and grid.slots(count + 1) <= decoder.context:
                count += 1
            spans.append((made, count))
            made += count
        return decoder.context, spans


def _where(places: Sequence[int], place: int) -> tuple[int, ...]:
    return tuple(row for row, at in enumerate(places) if at == place)
