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

from sdvg.tokens import skipping
from sdvg.tokens.window import TokenModel
from sdvg_kernels import TokenGrid, TokenTree, build_tree, compact_, expand_tree

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
        self._tokens = layout.height * layout.width
        self.size = self._grid.slots(frames)
        self._copies = 2 if decoder.sampling.guidance != 1 else 1
        rows, depth = self._copies * batch, decoder.depth
        # what one step commits without K/V, behind what a frame's end did
        unfed = depth if decoder.skip is not None else 0
        self.chain_room = unfed + 2 * layout.extra
        # true features of a step, behind a chain
        self.pair_room = self.chain_room + depth + 2
        self._words = -(-self.chain_room // 32)
        scratch = 32 * self._words + decoder.nodes
        self.cache = target.new_cache(rows, self.size, scratch=scratch)
        self._draft_cache = drafter.new_cache(
            target, rows, self.size, scratch=max(decoder.top_k * (depth - 1), 1)
        )

        def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        small = partial(integers, dtype=torch.int32)
        # a slot more, for what goes nowhere
        self._ids = integers(rows, self.size + 1)
        weight = next(iter(target.parameters()))
        self._features = torch.zeros(
            rows, self.size + 1, target.width, dtype=weight.dtype, device=device
        )
        self.known, self.lengths, self._drafted = small(batch), small(batch), small(batch)
        self._steps = small(batch)
        self.skipping = torch.zeros(batch, dtype=torch.bool, device=device)
        self._seeds, self._sequences = integers(batch), integers(batch)
        nodes, words = decoder.nodes, -(-decoder.nodes // 32)
        self._tree = TokenTree(
            integers(batch, nodes), *(small(batch, nodes) for _ in range(4)),
            small(batch, nodes, words),
        )  # fmt: skip
        entries = max(self.pair_room, _CHUNK)
        # entry i sees entries 0 to i; the first i of the chain
        self._causal = _bits([(2 << i) - 1 for i in range(entries)], device)
        self._before = _bits([(1 << i) - 1 for i in range(self.chain_room + 1)], device)
        beams = max((depth - 1) * decoder.top_k, 1)
        self._own = _bits([1 << i for i in range(beams)], device)
        self._graphs: dict[tuple[str, int], Callable[[], None]] = {}

    def begin(self, prompts: Tensor, uncond: Tensor | None, seed: int, sequences: Tensor) -> None:
        """Write the prompts [B, P] and their K/V: the last token is the first tree's root."""
        decoder, length = self._decoder, prompts.shape[1]
        target, drafter = decoder.model, decoder.drafter
        fed = prompts if uncond is None else torch.cat((prompts, uncond))
        self._ids.zero_()
        self._ids[:, :length] = fed
        self._seeds.fill_(seed)
        self._sequences.copy_(sequences)
        self.known.fill_(length)
        self.lengths.fill_(length - 1)
        self._drafted.fill_(max(length - 1, 1))
        self._steps.zero_()
        self.skipping.zero_()
        features = target.prefill(fed[:, :-1], self.cache)
        self._features[:, : length - 1] = features
        leftpad = getattr(self.cache, "leftpad", None)
        # the drafter never uses slot 0
        self._draft_cache.leftpad.copy_(1 if leftpad is None else leftpad + 1)
        # the last token's pair is the first draft's
        for first in range(1, length - 1, _CHUNK):
            slots = torch.arange(first, min(first + _CHUNK, length - 1), device=fed.device)
            count = len(slots)
            slots = slots.int().expand(len(fed), -1)
            mask = self._causal[:count, : -(-count // 32)].expand(len(fed), -1, -1)
            drafter.feed(
                drafter.embed(self._ids[:, first : first + count], target),
                self._features[:, first - 1 : first - 1 + count],
                slots, slots, torch.full_like(slots[:, 0], first), mask.contiguous(),
                self._draft_cache, length=first + count,
            )  # fmt: skip

    def write_extra(self, frame: int, row: int, ids: Tensor) -> None:
        """Write the extra tokens that lead to `frame` of a sequence."""
        end = self._grid.slot(frame, 0, 0)
        extra = self._decoder.layout.extra
        self._ids[row :: len(self.known), end - extra : end] = ids

    def frame(self, frame: int, rows: list[int]) -> Tensor:
        """Return the codes [rows, height, width] of a frame; -1: none was drawn."""
        layout, first = self._decoder.layout, self._grid.slot(frame, 0, 0)
        ids = self._ids[rows, first : first + self._tokens]
        codes = torch.where(ids < 0, -1, ids - layout.first)
        return codes.unflatten(1, (layout.height, layout.width))

    def ends(self, frame: int) -> int:
        """Return the slot behind the last token of a frame."""
        return self._grid.slot(frame, 0, 0) + self._tokens

    def made(self, known: int) -> int:
        """Return how many codes are among the tokens below slot `known`."""
        frames, rest = divmod(known - self._grid.prefix, self._grid.frame_stride)
        return frames * self._tokens + min(rest, self._tokens)

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
        state = (self.known, self.lengths, self._drafted, self._steps, self.skipping)
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
        except RuntimeError:
            # the pool of a broken capture takes no new one
            decoder.recorder.drop()
            raise

    def _each(self, values: Tensor) -> Tensor:
        """Return `values` of sequences for all rows: those with the condition, then without."""
        return values.repeat(self._copies, *(1,) * (values.dim() - 1))

    def _end(self) -> Tensor:
        """Return the slot behind the frame of each sequence's next token [B] int32."""
        if not self._decoder.layout.extra:
            return torch.full_like(self.known, self.size)
        grid = self._grid
        frame = (self.known - grid.prefix) // grid.frame_stride
        return grid.prefix + frame * grid.frame_stride + self._tokens

    def _places(self) -> Tensor:
        """Return each sequence's next place in the video [B], which keys its noise."""
        grid = self._grid
        made = self.known - grid.prefix
        return made // grid.frame_stride * self._tokens + made % grid.frame_stride

    def _draft(self, room: int, most: int | None = None) -> None:
        """Write the next tree, and whether it is skipped: then it is committed here."""
        tree = self._grow(self._follow(room, most), most)
        for kept, made in zip(self._tree, tree, strict=True):
            kept.copy_(made)
        self._skip()

    def _follow(self, room: int, most: int | None) -> Tensor:
        """Feed the drafter the pairs that are new; return the root's feature [rows, 1, width]."""
        drafter, target = self._decoder.drafter, self._decoder.model
        known, lengths = self._each(self.known), self._each(self.lengths)
        drafted = self._each(self._drafted)
        # [rows, room]: the tokens whose pairs are new, and the features that come with them
        slot = drafted[:, None] + torch.arange(room, device=known.device, dtype=torch.int32)
        live = slot < known[:, None]
        before, missing = slot - 1, (known - 1 - lengths)[:, None]
        stale = torch.where(before < lengths[:, None], before, before - missing)
        features = self._gather(self._features, stale.clamp(0, self.size).long())
        ids = self._ids.gather(1, torch.where(live, slot, self.size).long()).clamp(min=0)
        mask = self._causal[:room, : -(-room // 32)] * live[..., None]
        out = drafter.feed(
            drafter.embed(ids, target), features, torch.where(live, slot, -1), slot, drafted,
            mask.int(), self._draft_cache, length=most,
        )  # fmt: skip
        self._drafted.copy_(torch.minimum(self.lengths + 1, self.known))
        return self._gather(out, (known - 1 - drafted).clamp(min=0).long()[:, None])

    def _grow(self, out: Tensor, most: int | None) -> TokenTree:
        """Return EAGLE-2's tree: the best of what the best of each level are followed by."""
        decoder, drafter, target = self._decoder, self._decoder.drafter, self._decoder.model
        width, batch = decoder.top_k, len(self.known)
        known = self._each(self.known)
        parents = torch.full((batch, width), -1, dtype=torch.int32, device=known.device)
        levels, begin = [], 0
        scores = sees = None
        for level in range(decoder.depth):
            tokens, totals, beams = self._expand(out, scores)
            levels.append((tokens, totals, parents))
            if level == decoder.depth - 1:
                break
            index = beams.long()
            scores = totals.gather(1, index)
            parents = (beams + begin).repeat_interleave(width, 1)
            begin += tokens.shape[1]
            # a beam goes on from the one before that it is a child of, and sees what that sees
            above = self._each(index // width)
            at = torch.arange(level * width, (level + 1) * width, device=known.device)
            own = self._own[at].expand(len(known), -1, -1)
            sees = own.contiguous() if sees is None else own | self._gather(sees, above)
            ids = self._each(tokens.gather(1, index)).clamp(min=0) + decoder.layout.first
            out = drafter.feed(
                drafter.embed(ids, target), self._gather(out, above), known[:, None] + at.int(),
                (known + level)[:, None].expand(-1, width), known, sees, self._draft_cache,
                length=None if most is None else most + (level + 1) * width,
            )  # fmt: skip
        root = self._ids[:batch].gather(1, self.known.long()[:, None] - 1)[:, 0]
        # no feature stands before the first token of all: a prompt of one is fed alone
        limit = torch.where(self.lengths > 0, self._end() - self.known, 0)
        tokens, totals, parents = (torch.cat(part, 1) for part in zip(*levels, strict=True))
        return build_tree(root, tokens, totals, parents, size=decoder.nodes, limit=limit)

    def _expand(self, out: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        decoder = self._decoder
        layout, sampling = decoder.layout, decoder.sampling
        logits = decoder.model.logits(out)[..., layout.first : layout.first + layout.codes]
        with_prompt, *without = logits.chunk(self._copies)
        return expand_tree(
            with_prompt, scores, top_k=decoder.top_k, uncond=without[0] if without else None,
            guidance=sampling.guidance, temperature=sampling.temperature or 1.0,
        )  # fmt: skip

    def _skip(self) -> None:
        """Decide which sequences skip this step, and commit what the selector takes."""
        decoder, tree = self._decoder, self._tree
        if decoder.skip is None:
            return
        ways = skipping.paths(tree, decoder.depth)
        wanted = skipping.wants(
            decoder.skip, self._steps, self.skipping,
            lambda decay, stride: skipping.similarity(
                tree, ways, decoder.codebook, decay=decay, stride=stride
            ),
        )  # fmt: skip
        path, count = skipping.select(
            tree, ways, self._seeds ^ _SELECTOR, self._sequences, self._places()
        )
        warm = self.known - self._grid.prefix > skipping.WARM
        self.skipping.copy_(wanted & warm & (count > 0))
        self._steps += 1
        count = torch.where(self.skipping, count, 0)
        tokens = tree.tokens.gather(1, path.clamp(min=0)) + decoder.layout.first
        self._commit(tokens, count)

    def _verify(self, room: int, most: int | None = None) -> None:
        """Feed [chain | tree] of those that do not skip, verify, and commit what holds."""
        decoder, target, tree = self._decoder, self._decoder.model, self._tree
        layout, sampling = decoder.layout, decoder.sampling
        batch, nodes = tree.tokens.shape
        device = self.known.device
        fed = ~self.skipping & (self.known < self.size)
        chain = self.known - 1 - self.lengths
        base = 32 * self._words if room else 0
        i = torch.arange(room, device=device, dtype=torch.int32)
        j = torch.arange(nodes, device=device, dtype=torch.int32)
        behind = self.lengths[:, None] + i
        # [B, room + N]
        live = torch.cat((i < chain[:, None], tree.depths >= 0), 1) & fed[:, None]
        slots = torch.cat((behind, self.lengths[:, None] + base + j), 1)
        slots = torch.where(live, slots, -1)
        level = (self.known - 1)[:, None] + tree.depths
        positions = torch.cat((behind, level), 1).clamp(0, self.size - 1)
        mask = tree.mask
        if room:
            words = self._before[chain.clamp(0, room).long()]
            words = words[:, None, : self._words].expand(-1, nodes, -1)
            front = self._causal[:room, : self._words].expand(batch, -1, -1)
            mask = torch.cat(
                (
                    torch.cat((front, front.new_zeros(batch, room, mask.shape[2])), 2),
                    torch.cat((words, mask), 2),
                ),
                1,
            )
        mask = mask * live[..., None]
        ids = self._ids.gather(1, self._each(positions[:, :room].long()))
        grown = self._each(tree.tokens) + layout.first
        grown[:, 0] = self._ids.gather(1, self._each(self.known.long())[:, None] - 1)[:, 0]
        out = target.feed_tree(
            torch.cat((ids, grown), 1).clamp(min=0), self._each(slots), self._each(positions),
            self._each(self.lengths), self._each(mask.int()), self.cache,
            length=None if most is None else most + base + nodes,
        )  # fmt: skip
        logits = target.logits(out[:, room:])[..., layout.first : layout.first + layout.codes]
        with_prompt, *without = logits.chunk(self._copies)
        verified = decoder.verification(
            tree, with_prompt, uncond=without[0] if without else None, seeds=self._seeds,
            sequences=self._sequences, positions=self._places(), guidance=sampling.guidance,
            temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
            depth=decoder.depth,
        )  # fmt: skip
        # a row without a distribution commits its -1, which is found when the frame is whole
        counts = torch.where(fed, verified.counts.clamp(min=1), 0)
        self._keep(out, verified.path, counts, torch.where(fed, chain, 0), room, base)
        path = verified.path[:, 1:].clamp(min=0).long()
        tokens = torch.cat((tree.tokens.gather(1, path), verified.tokens[:, None]), 1)
        # the drawn one comes right behind the accepted
        order = torch.arange(tokens.shape[1], device=device)
        behind = (counts - 1).clamp(min=0)[:, None]
        tokens = torch.where(order == behind, verified.tokens[:, None], tokens)
        self._commit(torch.where(tokens < 0, -1, tokens + layout.first), counts)

    def _keep(
        self, out: Tensor, path: Tensor, counts: Tensor, chain: Tensor, room: int, base: int
    ) -> None:
        """Keep K/V and features of the chain and of the accepted path, in order."""
        k = torch.arange(room + path.shape[1], device=path.device)
        beyond = k - chain[:, None]
        node = path.gather(1, beyond.clamp(0, path.shape[1] - 1).long())
        is_chain, there = beyond < 0, beyond < counts[:, None]
        moved = torch.where(is_chain, k, torch.where(there, node + base, -1)).int()
        source = torch.where(is_chain, k, node + room).clamp(min=0).long()
        slots = torch.where(there, self.lengths[:, None] + k, self.size).long()
        kept = self._gather(out, self._each(source))
        index = self._each(slots)[..., None].expand(-1, -1, out.shape[2])
        self._features.scatter_(1, index, kept)
        lengths = self._each(self.lengths)
        compact_(self.cache.k, self.cache.v, lengths, self._each(moved).contiguous())
        self.lengths.copy_(lengths[: len(self.lengths)])

    def _commit(self, ids: Tensor, counts: Tensor) -> None:
        """Write the first `counts [B]` of `ids [B, n]` behind what is known, and what follows."""
        k = torch.arange(ids.shape[1], device=ids.device, dtype=torch.int32)
        slots, end = self.known[:, None] + k, self._end()
        # a token drawn behind a frame's last is none
        there = (k < counts[:, None]) & (slots < end[:, None])
        index = self._each(torch.where(there, slots, self.size).long())
        self._ids.scatter_(1, index, self._each(ids))
        known = torch.minimum(self.known + counts, end)
        whole = (counts > 0) & (known == end) & (known < self.size)
        self.known.copy_(torch.where(whole, known + self._decoder.layout.extra, known))

    @staticmethod
    def _gather(values: Tensor, index: Tensor) -> Tensor:
        """Return `values [rows, n, ...]` at `index [rows, m]`."""
        return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))


def _bits(numbers: list[int], device: torch.device) -> Tensor:
    """Return numbers as rows of 32-bit words, the lowest first: [n, words] int32."""
    words = max(1, -(-max(max(numbers, default=0).bit_length(), 1) // 32))
    rows = [[number >> 32 * word & 0xFFFFFFFF for word in range(words)] for number in numbers]
    signed = [[word - (1 << 32) * (word >> 31) for word in row] for row in rows]
    return torch.tensor(signed, dtype=torch.int32, device=device)
