"""What the speculative loop keeps on the device, and its two passes: a draft and a verification.

Of each sequence: its ids by slot, and two lengths. Tokens in slots below `known` are committed;
those below `lengths` have K/V in the target's cache too. The newest, in slot `known - 1`, is the
root of the next tree; what lies between is the chain.

    slots     0 ... lengths | lengths ... known - 2 | known - 1 | ...
              K/V             the chain               the root

A pass of the target feeds [chain | tree]: the chain to its own slots, node j to slot
`lengths + base + j`, `base` being whole words of the mask. `compact_` moves the accepted path
behind the chain. The drafter numbers slots as the target does: the entry in slot p is the token p
with the target's feature of the token before; where that is missing, VVS's stale ones stand in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sdvg.models.llamagen import LlamaGen
from sdvg.tokens import skipping
from sdvg.tokens.window import TokenModel
from sdvg_kernels import (
    DraftEntries,
    FrameLayout,
    TokenGrid,
    TokenTree,
    TreeState,
    beam_entries,
    build_tree,
    commit_tree_,
    compact_,
    draft_entries,
    expand_tree,
    path_similarity,
    select_path,
    tree_entries,
)

if TYPE_CHECKING:
    from sdvg.tokens.speculative import SpeculativeDecoder


class TreeModel(TokenModel, Protocol):
    """A target: a token model that is fed trees, too, and whose features a drafter goes on from."""

    width: int

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings `[..., width]` of ids."""
        ...

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits `[..., ids]` of features `[..., width]`."""
        ...

    def new_cache(self, batch: int, slots: int, *, scratch: int = 0) -> object:
        """Return an empty cache; `scratch` slots more hold trees and have no positions."""
        ...

    def feed_tree(
        self,
        ids: Tensor,
        slots: Tensor,
        positions: Tensor,
        lengths: Tensor,
        mask: Tensor,
        cache: object,
        *,
        length: int | None = None,
    ) -> Tensor:
        """Feed `ids [B, T]` to `slots [B, T]` (-1: padding) and return features [B, T, width].

        An entry stands at its own of `positions [B, T]`, and sees what `tree_attention` says of
        `lengths [B]` and `mask [B, T, W]`. No slot from `length` on is seen.
        """
        ...


# entries of the prompt that the drafter is fed at once
_CHUNK = 64
# an odd number (of the golden ratio) that keeps the selector's noise from the sampler's
_SELECTOR = 0x1E3779B97F4A7C15


class Trees:
    """The state of a batch, and what reads and writes it.

    Attributes:
        known, lengths: [B] int32.
        skipping: [B] bool, whether the newest step commits without the target.
        size: slots of a video.
    """

    def __init__(self, decoder: SpeculativeDecoder, batch: int, prefix: int, frames: int) -> None:
        self._decoder = decoder
        layout, target, drafter = decoder.layout, decoder.model, decoder.drafter
        device = target.device
        self._grid = TokenGrid(
            layout.height, layout.width, layout.width, "spatial", prefix, layout.extra
        )
        # a tree's positions are slots: no pass tells the target of the grid
        if isinstance(target, LlamaGen):
            target.check_grid(self._grid)
        self._layout = FrameLayout(prefix, layout.height * layout.width, layout.extra, layout.first)
        self.size = self._grid.slots(frames)
        self._copies = 2 if decoder.sampling.guidance != 1 else 1
        rows, depth = self._copies * batch, decoder.depth
        # what one step commits without K/V, behind what a frame's end did
        unfed = depth if decoder.skip is not None else 0
        self.chain_room = unfed + 2 * layout.extra
        # true features of a step, behind a chain
        self.pair_room = self.chain_room + depth + 2
        scratch = 32 * -(-self.chain_room // 32) + decoder.nodes
        self.cache = target.new_cache(rows, self.size, scratch=scratch)
        self._draft_cache = drafter.new_cache(
            target, rows, self.size, scratch=max(decoder.top_k * (depth - 1), 1)
        )

        def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        small = partial(integers, dtype=torch.int32)
        weight = next(iter(target.parameters()))
        self._state = TreeState(
            integers(rows, self.size + 1),
            weight.new_zeros(rows, self.size + 1, target.width),
            *(small(rows) for _ in range(3)),
        )
        self._ids = self._state.ids
        # the same for both rows of a sequence
        self.known, self.lengths, self._drafted = (part[:batch] for part in self._state[2:])
        self._steps = small(batch)
        self.skipping = torch.zeros(batch, dtype=torch.bool, device=device)
        self._seeds, self._selectors, self._sequences = (integers(batch) for _ in range(3))
        # the candidates of the first level continue none
        self._none = small(batch, decoder.top_k) - 1
        # what the newest draft made
        self._tree: TokenTree
        self._places: Tensor
        self._graphs: dict[tuple[str, int], Callable[[], None]] = {}

    def begin(self, prompts: Tensor, uncond: Tensor | None, seed: int, sequences: Tensor) -> None:
        """Write the prompts [B, P] and their K/V: the last token is the first tree's root."""
        target, length = self._decoder.model, prompts.shape[1]
        fed = prompts if uncond is None else torch.cat((prompts, uncond))
        self._ids.zero_()
        self._ids[:, :length] = fed
        self._seeds.fill_(seed)
        self._selectors.fill_(seed ^ _SELECTOR)
        self._sequences.copy_(sequences)
        self._steps.zero_()
        self.skipping.zero_()
        # an older video's K/V may be NaN, and a product with what a mask leaves out is NaN then
        target.clear(self.cache)
        self._draft_cache.k.zero_()
        self._draft_cache.v.zero_()
        self._state.features[:, : length - 1] = target.prefill(fed[:, :-1], self.cache)
        leftpad = getattr(self.cache, "leftpad", None)
        # the drafter never uses slot 0
        self._draft_cache.leftpad.copy_(1 if leftpad is None else leftpad + 1)
        # the last token's pair is the first draft's
        for first in range(1, length - 1, _CHUNK):
            last = min(first + _CHUNK, length - 1)
            self._stand(last, length - 1, first)
            self._follow(last - first, last)
        self._stand(length, length - 1, max(length - 1, 1))

    def _stand(self, *places: int) -> None:
        """Write where all rows stand: `known`, `lengths` and `drafted`."""
        for part, place in zip(self._state[2:], places, strict=True):
            part.fill_(place)

    def write_extra(self, frame: int, row: int, ids: Tensor) -> None:
        """Write the extra tokens that lead to `frame` of a sequence."""
        end = self._grid.slot(frame, 0, 0)
        extra = self._decoder.layout.extra
        self._ids[row :: len(self.known), end - extra : end] = ids

    def frame(self, frame: int, rows: Tensor) -> Tensor:
        """Return the codes [n, height, width] of a frame of `rows [n]`; -1: none was drawn."""
        layout, first = self._decoder.layout, self._grid.slot(frame, 0, 0)
        ids = self._ids[rows, first : first + self._layout.tokens]
        codes = torch.where(ids < 0, -1, ids - layout.first)
        return codes.unflatten(1, (layout.height, layout.width))

    def ends(self, frame: int) -> int:
        """Return the slot behind the last token of a frame."""
        return self._grid.slot(frame, 0, 0) + self._layout.tokens

    def made(self, known: int) -> int:
        """Return how many codes are among the tokens below slot `known`."""
        frames, rest = divmod(known - self._grid.prefix, self._grid.frame_stride)
        return frames * self._layout.tokens + min(rest, self._layout.tokens)

    def run(self, name: str, room: int, known: int) -> None:
        """Run "draft" or "target" with as many entries as `room` for pairs or chain.

        `known` is the most that a sequence has; a captured pass finds that on the device.
        """
        work = {"draft": self._draft, "target": self._verify}[name]
        decoder = self._decoder
        if not decoder.graphs:
            work(room, known)
            return
        if (name, room) not in self._graphs:
            self._graphs[name, room] = self._capture(partial(work, room))
        self._graphs[name, room]()

    def _capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture a pass and return its replay; the state stays where it is."""
        decoder = self._decoder
        state = (*self._state[2:], self._steps, self.skipping)
        before = [part.clone() for part in state]

        def again() -> None:
            # done twice it writes the same, but for where the sequences are
            for part, was in zip(state, before, strict=True):
                part.copy_(was)
            work()

        decoder.recorder.warm_up(again, decoder.model.device)
        for part, was in zip(state, before, strict=True):
            part.copy_(was)
        try:
            return decoder.recorder.record(work, decoder.model.device)[1]
        except BaseException:
            # the pool of a broken capture, or of one that Ctrl-C ended, takes no new one
            decoder.recorder.drop()
            raise

    def _draft(self, room: int, most: int | None = None) -> None:
        """Write the next tree, and whether it is skipped: then it is committed here."""
        decoder, drafter, target = self._decoder, self._decoder.drafter, self._decoder.model
        state, first, width = self._state, decoder.layout.first, decoder.top_k
        words = -(-(decoder.depth - 1) * width // 32)
        entries, out = self._follow(room, most)
        last = entries.last[:, None, None].expand(-1, -1, target.width)
        out, parents, scores, sees = out.gather(1, last), self._none, None, None
        levels = []
        # EAGLE-2: the best of what the best of each level are followed by
        for level in range(decoder.depth):
            tokens, totals, best = self._expand(out, scores)
            levels.append((tokens, totals, parents))
            if level == decoder.depth - 1:
                break
            beams = beam_entries(
                state.known, tokens, totals, best, out, sees, level=level, words=words,
                first=first,
            )  # fmt: skip
            parents, scores, sees = beams.parents, beams.scores, beams.mask
            out = drafter.feed(
                drafter.embed(beams.ids, target), beams.features, beams.slots, beams.positions,
                state.known, sees, self._draft_cache,
                length=None if most is None else most + (level + 1) * width,
            )  # fmt: skip
        batch = len(self.known)
        tokens, totals, parents = (torch.cat(part, 1) for part in zip(*levels, strict=True))
        # of a captured draft: its replays write them again
        self._tree = build_tree(
            entries.root[:batch], tokens, totals, parents, size=decoder.nodes,
            limit=entries.limit[:batch],
        )  # fmt: skip
        self._places = entries.places[:batch]
        if decoder.skip is not None:
            self._skip()

    def _follow(self, room: int, most: int | None) -> tuple[DraftEntries, Tensor]:
        """Feed the drafter the pairs that are new."""
        drafter, target = self._decoder.drafter, self._decoder.model
        entries = draft_entries(self._state, self._layout, room)
        out = drafter.feed(
            drafter.embed(entries.ids, target), entries.features, entries.slots, entries.slots,
            self._state.drafted, entries.mask, self._draft_cache, length=most,
        )  # fmt: skip
        return entries, out

    def _codes(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the codes' logits [B, n, codes], with the condition and without."""
        layout = self._decoder.layout
        logits = self._decoder.model.logits(features)
        logits = logits[..., layout.first : layout.first + layout.codes]
        with_prompt, *without = logits.chunk(self._copies)
        return with_prompt, without[0] if without else None

    def _expand(self, out: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        decoder, (logits, uncond) = self._decoder, self._codes(out)
        return expand_tree(
            logits, scores, top_k=decoder.top_k, uncond=uncond,
            guidance=decoder.sampling.guidance, temperature=decoder.sampling.temperature or 1.0,
        )  # fmt: skip

    def _skip(self) -> None:
        """Decide which sequences skip this step, and commit what the selector takes."""
        decoder, tree = self._decoder, self._tree
        wanted = skipping.wants(
            decoder.skip, self._steps, self.skipping,
            lambda decay, stride: path_similarity(
                tree, decoder.codebook, decay=decay, stride=stride
            ),
        )  # fmt: skip
        warm = self.known > self._grid.prefix + skipping.WARM
        path, counts = select_path(
            tree, wanted & warm, decoder.depth, seeds=self._selectors, sequences=self._sequences,
            positions=self._places, likely=decoder.skip.likely,
        )  # fmt: skip
        torch.gt(counts, 0, out=self.skipping)
        self._steps += 1
        commit_tree_(self._state, self._layout, tree.tokens, path, counts)

    def _verify(self, room: int, most: int | None = None) -> None:
        """Feed [chain | tree] of those that do not skip, verify, and commit what holds."""
        decoder, target, tree = self._decoder, self._decoder.model, self._tree
        state, sampling = self._state, decoder.sampling
        entries = tree_entries(state, self._layout, tree, self.skipping, room)
        words = -(-room // 32)
        out = target.feed_tree(
            entries.ids, entries.slots, entries.positions, state.lengths, entries.mask, self.cache,
            length=None if most is None else most + 32 * words + decoder.nodes,
        )  # fmt: skip
        logits, uncond = self._codes(out[:, room:])
        verified = decoder.verification(
            tree, logits, uncond=uncond, seeds=self._seeds, sequences=self._sequences,
            positions=self._places, guidance=sampling.guidance, temperature=sampling.temperature,
            top_k=sampling.top_k, top_p=sampling.top_p, depth=decoder.depth,
        )  # fmt: skip
        moves = commit_tree_(
            state, self._layout, tree.tokens, verified.path[:, 1:], verified.counts,
            drawn=verified.tokens, chain=entries.chain, out=out,
        )  # fmt: skip
        compact_(self.cache.k, self.cache.v, state.lengths, moves)
