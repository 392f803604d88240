"""Speculative coupled decoding (SCD, arXiv 2510.24211): the lossless baseline without training.

    each pass:  feed the newest token and the drafts of the next W - 1 places, in raster order
                p[j] = what the model now says of place j;   q[j] = what draft j was drawn from
                keep draft j with probability min(1, p / q), else draw from max(0, p - q)
                commit what is kept up to the first that is not, and that one's new draw
                all new draws are the next drafts, and p[j] what they were drawn from

Speculative Jacobi decoding (SJD, arXiv 2410.01699) is the same without the third line behind the
first that is not kept: there it draws anew from p, so that a draft outlives a pass only by being
committed. The law is that of raster order with the same sampling, exactly, for both: a draft's
label is always the distribution that it was drawn from.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvg.tokens.checks import (
    check_ids,
    check_layout,
    check_videos,
    each,
    require_tokens,
    whole,
)
from sdvg.tokens.diagonal import Actions, Frame, Layout, Sampling
from sdvg.tokens.window import TokenModel
from sdvg_kernels import TokenGrid, sample_tokens

# a pass that comes after all others sees every slot up to its own
_EVERYTHING = 2**30
# an odd number (of the golden ratio) that keeps the keys of passes apart
_STRIDE = 0x9E3779B97F4A7C15


class JacobiDecoder:
    """Decodes videos of tokens in raster order, several tokens a pass where drafts hold.

    Args:
        model: a `TokenModel`.
        layout: what lies where; rows without an end-of-line token.
        window: W, places that a pass predicts, at least 2.
        sampling: how tokens are drawn.
        coupled: keep drafts behind the first that is not kept, too, where they hold (SCD); False:
            draw all of these anew (SJD).

    Raises: ValueError, or TypeError for what is no number, in one sentence.
    """

    def __init__(
        self,
        model: TokenModel,
        layout: Layout,
        *,
        window: int = 16,
        sampling: Sampling | None = None,
        coupled: bool = True,
    ) -> None:
        window = whole("jacobi", "window", window, 2)
        check_layout("jacobi", layout, model.vocabulary)
        if layout.eol is not None:
            raise ValueError(f"jacobi: rows must have no end-of-line token, got {layout.eol}")
        self.model, self.layout, self.window = model, layout, window
        self.sampling, self.coupled = sampling or Sampling(), coupled

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
    ) -> JacobiGeneration:
        """Return an iterator over frames: arguments and errors as `DiagonalDecoder.generate` has.

        Sequences keep pace with their own drafts: a frame may come earlier for some of the batch.
        """
        check_videos(
            "jacobi", self.model, self.layout, self.sampling,
            prompts=prompts, frames=frames, uncond=uncond, actions=actions,
        )  # fmt: skip
        names = each("jacobi", "sequences", sequences, range(len(prompts)))
        seed = whole("jacobi", "seed", seed)
        return JacobiGeneration(self, prompts, int(frames), uncond, actions, seed, names)


class JacobiGeneration(Iterator[Frame]):
    """The loop: `next` runs passes until a frame of some sequence is whole.

    Unlike diagonal decoding it reads back after every pass how much was kept.

    Attributes: passes, seconds: of the batch, so far; codes [B, frames, height, width].
    """

    def __init__(
        self,
        decoder: JacobiDecoder,
        prompts: Tensor,
        frames: int,
        uncond: Tensor | None,
        actions: Tensor | Actions | None,
        seed: int,
        sequences: Sequence[int],
    ) -> None:
        self.decoder, self.frames, self._actions = decoder, frames, actions
        layout, model = decoder.layout, decoder.model
        device, (batch, prefix) = model.device, prompts.shape
        self.passes, self.seconds = 0, 0.0
        self._names, self._seed = sequences, seed
        self._grid = TokenGrid(
            layout.height, layout.width, layout.width, "spatial", prefix, layout.extra
        )
        size = self._grid.slots(frames)
        self._tokens = layout.height * layout.width
        self.codes = torch.zeros(
            batch, frames, layout.height, layout.width, dtype=torch.int64, device=device
        )
        copies = [prompts] if uncond is None else [prompts, uncond]
        fed = torch.cat(copies).to(device, torch.int64)
        self._ids = torch.zeros(len(fed), size, dtype=torch.int64, device=device)
        self._ids[:, :prefix] = fed
        self._cache = model.new_cache(len(fed), size)
        model.prefill(fed[:, :-1], self._cache)
        # the place [B] of the next token in the video; drafts [B, W - 1] and their labels
        self._at = [0] * batch
        self._draft = torch.zeros(batch, decoder.window - 1, dtype=torch.int64, device=device)
        self._label = torch.empty(*self._draft.shape, layout.codes, device=device)
        self._redraft(torch.full((batch,), decoder.window, device=device))
        self._whole: deque[Frame] = deque()
        self._failed = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def __next__(self) -> Frame:
        """Run passes until a frame is whole, and return it."""
        while not self._whole:
            if self._failed:
                raise RuntimeError("jacobi: a generation must not go on after an error; begin anew")
            if all(at == self.frames * self._tokens for at in self._at):
                raise StopIteration
            began = time.perf_counter()
            self._failed = True
            done = self._pass()
            self.seconds += time.perf_counter() - began
            for frame, rows in done:
                codes = self.codes[list(rows), frame]
                require_tokens(codes, frame, [self._names[row] for row in rows], op="jacobi")
                self._whole.append(Frame(frame, rows, codes, self.passes, self.seconds))
            self._failed = False
        return self._whole.popleft()

    def _pass(self) -> list[tuple[int, tuple[int, ...]]]:
        """Feed the newest token and the drafts, keep what holds; return the frames made whole."""
        decoder, tokens = self.decoder, self._tokens
        layout, window, device = decoder.layout, decoder.window, self.codes.device
        batch = len(self._at)
        for row, at in enumerate(self._at):
            if at and at % tokens == 0 and at < self.frames * tokens and layout.extra:
                self._act(at // tokens, row)
        at = torch.tensor(self._at, dtype=torch.int64, device=device)
        live = at < self.frames * tokens
        frame, place = at // tokens, at % tokens
        # [B, W]: the place that each entry predicts, and whether its frame has it
        places = place[:, None] + torch.arange(window, device=device)
        inside = (places < tokens) & live[:, None]
        first = self._grid.prefix + frame * self._grid.frame_stride
        slots = first[:, None] + places - 1
        # what leads to a later frame is fed by its first pass
        lead = first[:, None] - 1 - torch.arange(layout.extra, 0, -1, device=device)
        leads = ((place == 0) & (frame > 0) & live)[:, None].expand(-1, layout.extra)
        every = torch.cat((torch.where(leads, lead, -1), torch.where(inside, slots, -1)), 1)
        self._write(slots[:, 1:], self._draft + layout.first, inside[:, 1:])
        copies = len(self._ids) // batch
        every = every.repeat(copies, 1).int()
        fed = self._ids.gather(1, every.long().clamp(min=0)).clamp(min=0)
        logits = decoder.model.forward(
            fed, every, torch.full_like(every, _EVERYTHING), self._grid, self._cache,
            length=int(every.max()) + 1,
        )  # fmt: skip
        self.passes += 1
        low = layout.first
        logits = logits[:, layout.extra :, low : low + layout.codes]
        conditional, *without = logits.chunk(copies)
        chances = probabilities(conditional, *without or (None,), decoder.sampling)
        drawn, kept = self._couple(chances, frame[:, None] * tokens + places)
        # up to the first that is not kept, and that one; what is kept of all: one more
        count = torch.cat((kept, torch.zeros_like(kept[:, :1])), 1).int().cumprod(1).sum(1) + 1
        count = torch.minimum(count, tokens - place) * live
        committed = inside & (torch.arange(window, device=device) < count[:, None])
        self._write(slots + 1, drawn + low * (drawn >= 0), committed)
        rows = torch.arange(batch, device=device)[:, None].expand_as(places)[committed]
        placed = (frame[:, None] * tokens + places)[committed]
        self.codes.view(batch, -1)[rows, placed] = drawn[committed]
        # drafts and labels move up by what is committed
        self._draft, self._label = drawn, chances
        done = (place + count == tokens) & live
        self._redraft(torch.where(done, window, count))
        before, self._at = self._at, (at + count).tolist()
        ended = [
            (old // tokens, row)
            for row, (old, new) in enumerate(zip(before, self._at, strict=True))
            if new > old and new % tokens == 0
        ]
        return [
            (index, tuple(row for at, row in ended if at == index))
            for index in sorted({at for at, _ in ended})
        ]

    def _couple(self, chances: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return a draw [B, W] for each place, and which [B, W - 1] are the drafts themselves.

        Its law is `chances [B, W, codes]` at each place, whatever the draft's label.
        """
        batch, window, _ = chances.shape
        draft, label = self._draft[..., None], self._label
        ahead = chances[:, :-1]
        rest = (ahead - label).clamp(min=0)
        ratio = (ahead.gather(2, draft) / label.gather(2, draft))[..., 0].clamp(max=1)
        # where rounding alone is between the two, nothing is left to draw instead
        ratio = torch.where((rest == 0).all(-1), 1, ratio)
        # a coin: token 0 of two, in the same keyed noise
        coin = torch.stack((ratio, 1 - ratio), -1).flatten(0, 1).log()
        kept = sample_tokens(coin, **self._keys(places[:, :-1], 1)).view(batch, window - 1) == 0
        if not self.decoder.coupled:
            held = kept.int().cumprod(1).bool()
            behind = ~F.pad(held, (1, 0), value=True)[:, :-1]
            kept, rest = held, torch.where(behind[..., None], ahead, rest)
        target = torch.cat((rest, chances[:, -1:]), 1).flatten(0, 1)
        new = sample_tokens(target.log(), **self._keys(places, 0)).view(batch, window)
        return torch.cat((torch.where(kept, self._draft, new[:, :-1]), new[:, -1:]), 1), kept

    def _redraft(self, moved: Tensor) -> None:
        """Move drafts and labels up by `moved [B]`; what comes in is drawn evenly."""
        window, codes = self.decoder.window, self.decoder.layout.codes
        index = moved[:, None] + torch.arange(window - 1, device=moved.device)
        beyond = index >= self._draft.shape[1]
        at = torch.tensor(self._at, dtype=torch.int64, device=moved.device)[:, None] + index
        index = index.clamp(max=self._draft.shape[1] - 1)
        flat = torch.zeros(1, codes, device=moved.device).expand(at.numel(), -1)
        fresh = sample_tokens(flat, **self._keys(at, 2)).view_as(at)
        draft = self._draft.gather(1, index)
        label = self._label.gather(1, index[..., None].expand(-1, -1, codes))
        even = beyond | (draft < 0)
        self._draft = torch.where(even, fresh, draft)
        self._label = torch.where(even[..., None], 1 / codes, label)

    def _keys(self, places: Tensor, stream: int) -> dict[str, Tensor]:
        """Return the keys of `places [B, n]` in this pass: apart in passes and streams."""
        seed = (self._seed + (3 * self.passes + stream + 1) * _STRIDE) % 2**64
        names = torch.tensor(self._names, dtype=torch.int64, device=places.device)
        return {
            "seeds": torch.full_like(places, seed - 2**64 * (seed >= 2**63)).flatten(),
            "sequences": names[:, None].expand_as(places).flatten(),
            "positions": places.flatten(),
        }

    def _act(self, frame: int, row: int) -> None:
        """Write the extra tokens that lead to `frame` of a sequence."""
        layout, model = self.decoder.layout, self.decoder.model
        if isinstance(self._actions, Tensor):
            ids = self._actions[row, frame - 1]
        else:
            ids = self._actions(frame, (row,))
            check_ids("actions", ids, (1, layout.extra), model.vocabulary, op="jacobi")
        end = self._grid.slot(frame, 0, 0)
        self._ids[row :: len(self._at), end - layout.extra : end] = ids.to(model.device)

    def _write(self, slots: Tensor, ids: Tensor, where: Tensor) -> None:
        """Write `ids [B, n]` to `slots [B, n]`, for both copies of a sequence."""
        batch = len(self._at)
        rows = torch.arange(batch, device=ids.device)[:, None].expand_as(slots)[where]
        for copy in range(len(self._ids) // batch):
            self._ids[rows + copy * batch, slots[where]] = ids[where]


def probabilities(logits: Tensor, uncond: Tensor | None, sampling: Sampling) -> Tensor:
    """Return what `sample_tokens` draws from: `[..., codes]` of logits, float32."""
    x = logits.float()
    if uncond is not None:
        x = uncond.float() + sampling.guidance * (x - uncond.float())
    if sampling.temperature == 0:
        return F.one_hot(x.argmax(-1), x.shape[-1]).to(x)
    if sampling.top_k is not None:
        least = x.topk(min(sampling.top_k, x.shape[-1]), -1).values[..., -1:]
        x = x.masked_fill(x < least, -torch.inf)
    x = x / sampling.temperature
    if sampling.top_p < 1:
        ordered = x.sort(-1, descending=True).values
        mass = ordered.softmax(-1).cumsum(-1)
        last = (mass < sampling.top_p).sum(-1, keepdim=True).clamp(max=x.shape[-1] - 1)
        x = x.masked_fill(x < ordered.gather(-1, last), -torch.inf)
    return x.softmax(-1)
