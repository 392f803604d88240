"""Speculative decoding of token grids, and verification skipping (VVS, arXiv 2511.13587).

    each step:  tree = the drafter's likeliest continuations (EAGLE-2, arXiv 2406.16858)
                skipped:  commit a path of it, cut to the paths' mean length; the target rests
                else:     target([what it has not seen | tree]); verify keeps a path of the tree
                          and draws the token behind it; K/V of the path move together

Without skipping and with `Exact()` the law is that of raster order; with `Exact(coupled=True)` so
is every token, given the same seed. A skipped token is never rejected: VVS is lossy by design.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sdvg.clock import Clock
from sdvg.host import move, read
from sdvg.models.capture import Recorder
from sdvg.tokens import skipping
from sdvg.tokens.checks import (
    check_ids,
    check_layout,
    check_videos,
    each,
    require_tokens,
    whole,
)
from sdvg.tokens.diagonal import Actions, Frame, Layout, Sampling
from sdvg.tokens.skipping import Dynamic, Uniform
from sdvg.tokens.trees import TreeModel, Trees
from sdvg_kernels import TokenTree, Verified, verify_relaxed, verify_tree, verify_typical

_OP = "speculative"
# that `build_tree` chooses from
_CANDIDATES = 1024


class Verification(Protocol):
    """Decides how much of a tree is kept: `Exact`, `Relaxed` or `Typical`."""

    def __call__(self, tree: TokenTree, logits: Tensor, **keys: object) -> Verified:
        """Return the path and the token behind it; `keys` as `sdvg_kernels.verify_tree` has."""
        ...


@dataclass(frozen=True)
class Exact:
    """The target's own law (`sdvg_kernels.verify_tree`); `coupled`: its own tokens, too."""

    coupled: bool = True

    def __call__(self, tree: TokenTree, logits: Tensor, **keys: object) -> Verified:
        """Return the path and the token behind it."""
        return verify_tree(tree, logits, coupled=self.coupled, **keys)


@dataclass(frozen=True)
class Relaxed:
    """LANTERN (arXiv 2410.03355): a code may stand for those near it (`verify_relaxed`).

    Args:
        neighbours: [codes, K], the nearest other codes (`sdvg.tokens.skipping.neighbours`).
        delta: the law of a token is within it of the target's, in total variation.
        ratio: LANTERN++'s (arXiv 2502.06352) lambda: near codes add at most `ratio - 1` of a code's
            own chance. One of the two is given, or both.
    """

    neighbours: Tensor = field(repr=False)
    delta: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        _require_tensor("neighbours", self.neighbours)
        # the first columns of a table would be copied in every step
        object.__setattr__(self, "neighbours", self.neighbours.contiguous())

    def __call__(self, tree: TokenTree, logits: Tensor, **keys: object) -> Verified:
        """Return the path and the token behind it."""
        return verify_relaxed(
            tree, logits, self.neighbours, delta=self.delta, ratio=self.ratio, **keys
        )


@dataclass(frozen=True)
class Typical:
    """Medusa's (arXiv 2401.10774): what is likely enough is kept (`verify_typical`)."""

    epsilon: float = 0.09
    alpha: float = 0.3

    def __call__(self, tree: TokenTree, logits: Tensor, **keys: object) -> Verified:
        """Return the path and the token behind it."""
        return verify_typical(tree, logits, epsilon=self.epsilon, alpha=self.alpha, **keys)


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{_OP}: {name} must be a tensor, got {type(value).__name__}")


class SpeculativeDecoder:
    """Decodes videos of tokens by a drafter's trees.

    Args:
        model: the target, a `TreeModel` such as `sdvg.models.tokens.TokenLlama`.
        drafter: its `sdvg.models.drafter.EagleDrafter`.
        layout: what lies where; rows without an end-of-line token.
        verification: `Exact()`, `Relaxed(...)` or `Typical(...)`.
        skip: None verifies every step; `Uniform(interval)` or `Dynamic(threshold)`: VVS.
        codebook: [codes, E], the tokenizer's; needed for `Dynamic`.
        depth: levels of a tree below its root, a pass of the drafter each.
        top_k: children of a node, and nodes of a level that are continued, at most 16.
        nodes: of a tree, its root included, at most 128.
        sampling: how tokens are drawn, from target and drafter alike.
        graphs: replay CUDA graphs. None: where the model is on a GPU.

    The defaults are EAGLE-2's for LlamaGen. Raises: ValueError, in one sentence.
    """

    def __init__(
        self,
        model: TreeModel,
        drafter: nn.Module,
        layout: Layout,
        *,
        verification: Verification | None = None,
        skip: Uniform | Dynamic | None = None,
        codebook: Tensor | None = None,
        depth: int = 5,
        top_k: int = 10,
        nodes: int = 59,
        sampling: Sampling | None = None,
        graphs: bool | None = None,
    ) -> None:
        for name, value, least, most in (
            ("depth", depth, 1, 32), ("top_k", top_k, 1, 16), ("nodes", nodes, 2, 128),
        ):  # fmt: skip
            if not least <= whole(_OP, name, value) <= most:
                # sampling has a top_k, too
                remedy = "; it is the number of a node's children" if name == "top_k" else ""
                raise ValueError(
                    f"speculative: {name} must lie in [{least}, {most}], got {value}{remedy}"
                )
        check_layout(_OP, layout, model.vocabulary)
        if layout.eol is not None:
            raise ValueError(f"speculative: rows must have no end-of-line token, got {layout.eol}")
        candidates = top_k + (depth - 1) * top_k**2
        if candidates > _CANDIDATES:
            raise ValueError(
                f"speculative: depth and top_k must make at most {_CANDIDATES} candidates, top_k + "
                f"(depth - 1) top_k^2, got {candidates}"
            )
        if top_k > layout.codes:
            raise ValueError(
                f"speculative: top_k must be at most the {layout.codes} codes, got {top_k}"
            )
        if not isinstance(skip, Uniform | Dynamic | None):
            raise TypeError(f"speculative: skip must be Uniform, Dynamic or None, got {skip!r}")
        if isinstance(skip, Dynamic):
            if codebook is None:
                raise ValueError("speculative: codebook must be given for Dynamic, got None")
            _require_tensor("codebook", codebook)
            if codebook.ndim != 2 or len(codebook) != layout.codes:
                raise ValueError(
                    f"speculative: codebook must be [{layout.codes}, E], got {list(codebook.shape)}"
                )
        if graphs and model.device.type != "cuda":
            raise ValueError(f"speculative: graphs must be off without a GPU, got {model.device}")
        self.model, self.drafter, self.layout = model, drafter, layout
        self.verification, self.skip = verification or Exact(), skip
        self.sampling = sampling or Sampling()
        self._ask()
        self.codebook = None
        if codebook is not None:
            self.codebook = skipping.unit(codebook).to(model.device)
        self.depth, self.top_k = depth, top_k
        # more than there are candidates would be padding
        self.nodes = min(nodes, 1 + candidates)
        self.graphs = model.device.type == "cuda" if graphs is None else graphs
        self.recorder = Recorder()
        self._trees: Trees | None = None
        self._made_for: tuple[object, ...] = ()
        self._running: SpeculativeGeneration | None = None

    def _ask(self) -> None:
        """Let the verification judge no sequence at all: what it cannot take it says now."""
        if not callable(self.verification):
            raise TypeError(
                f"speculative: verification must be Exact(), Relaxed(...) or Typical(...), got "
                f"{self.verification!r}"
            )
        device, sampling = self.model.device, self.sampling
        none = torch.empty(0, 1, dtype=torch.int32, device=device)
        tree = TokenTree(none.long(), none, none, none, none, none[..., None])
        logits = torch.empty(0, 1, self.layout.codes, device=device)
        keys = none[:, 0]
        self.verification(
            tree, logits, uncond=None if sampling.guidance == 1 else logits, seeds=keys.long(),
            sequences=keys, positions=keys, guidance=sampling.guidance,
            temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, depth=1,
        )  # fmt: skip

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
    ) -> SpeculativeGeneration:
        """Return an iterator over frames: arguments and errors as `DiagonalDecoder.generate` has.

        Sequences keep pace with their own drafts: a frame may come earlier for some of the batch.
        A sequence is the same alone and in any batch, to rounding.
        """
        check_videos(
            _OP, self.model, self.layout, self.sampling, prompts=prompts, frames=frames,
            uncond=uncond, actions=actions,
        )  # fmt: skip
        own, wanted = (next(iter(m.parameters())) for m in (self.drafter, self.model))
        if (own.dtype, own.device) != (wanted.dtype, wanted.device):
            raise ValueError(
                f"speculative: drafter must be {wanted.dtype} on {wanted.device} like the target, "
                f"got {own.dtype} on {own.device}; call drafter.to(...)"
            )
        names = each(_OP, "sequences", sequences, range(len(prompts)))
        seed = whole(_OP, "seed", seed)
        self._running = SpeculativeGeneration(
            self, prompts, int(frames), uncond, actions, seed, names
        )
        return self._running

    def trees(self, batch: int, prefix: int, frames: int) -> Trees:
        """Return the state of a batch, made anew where shapes or weights have changed."""
        weights = tuple(
            (weight.data_ptr(), weight.dtype)
            for part in (self.model, self.drafter)
            for weight in part.parameters()
        )
        key = (batch, prefix, frames, weights)
        if self._trees is None or key != self._made_for:
            # captured passes hold the addresses of cache and weights
            self._trees = None
            self.recorder.drop()
            self._trees, self._made_for = Trees(self, batch, prefix, frames), key
        return self._trees


class Counts(NamedTuple):
    """What a generation has done so far, of the batch."""

    # passes of the target, prefills left out
    passes: int
    # drafts: as many as steps, of `depth` passes of the drafter each
    drafts: int
    # steps of a sequence that were not verified
    skipped: int
    # drawn or accepted, of all sequences
    tokens: int


class SpeculativeGeneration(Iterator[Frame]):
    """The loop: `next` runs steps until a frame of some sequence is whole, `step` runs one.

    The host reads back once after a pass how far each sequence has come, and with skipping once
    after a draft whether anybody needs the target.

    Attributes:
        counts: `Counts` so far.
        clock: seconds by stage: "draft" (with trees and selection) and "target" (with verification
            and compaction).
        codes: [B, frames, height, width] int64, from 0; 0 where there are none yet.
    """

    def __init__(
        self,
        decoder: SpeculativeDecoder,
        prompts: Tensor,
        frames: int,
        uncond: Tensor | None,
        actions: Tensor | Actions | None,
        seed: int,
        names: Sequence[int],
    ) -> None:
        self.decoder, self.frames = decoder, frames
        self._prompts, self._uncond, self._actions = prompts, uncond, actions
        self._seed, self._names = (seed + 2**63) % 2**64 - 2**63, names
        layout, device = decoder.layout, decoder.model.device
        self.counts, self.clock = Counts(0, 0, 0, 0), Clock()
        self.codes = torch.zeros(
            len(prompts), frames, layout.height, layout.width, dtype=torch.int64, device=device
        )
        self._whole: deque[Frame] = deque()
        self._trees: Trees | None = None
        # as the host knows them: `known` and `lengths`, and frames that are whole
        self._known: list[int] = []
        self._lengths: list[int] = []
        # what the drafter has been fed with true features
        self._drafted: list[int] = []
        self._done = [0] * len(prompts)
        self._failed = False

    @property
    def passes(self) -> int:
        """Passes of the target so far."""
        return self.counts.passes

    @property
    def seconds(self) -> float:
        """Seconds spent in the loop so far."""
        return self.clock.total

    def __next__(self) -> Frame:
        """Run steps until a frame is whole, and return it."""
        while not self._whole:
            self._whole.extend(self.step())
        return self._whole.popleft()

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self) -> tuple[Frame, ...]:
        """Draft, and skip or verify; return the frames that are whole now: none, mostly.

        Raises: StopIteration when all is made; ValueError for logits without a distribution.
        """
        decoder = self.decoder
        if decoder._running is not self:
            raise RuntimeError(
                "speculative: a decoder must run one generation at a time, got an older one; "
                "finish it first"
            )
        if self._failed:
            raise RuntimeError(
                "speculative: a generation must not go on after an error; begin anew"
            )
        if all(done == self.frames for done in self._done):
            raise StopIteration
        self._failed = True
        with self.clock.running():
            trees = self._trees or self._begin()
            frame, device, batch = min(self._done), decoder.model.device, len(self._known)
            live = [known < trees.size for known in self._known]
            with self.clock.stage("draft", sum(live), device, frame):
                trees.run("draft", self._pairs(trees), max(self._known))
            skipped = self._read(trees) if decoder.skip is not None else [False] * batch
            fed = [there and not left for there, left in zip(live, skipped, strict=True)]
            if any(fed):
                with self.clock.stage("target", sum(fed), device, frame):
                    trees.run("target", self._chain(trees, fed), max(self._known))
                self._read(trees)
            counts = self.counts
            self.counts = Counts(
                counts.passes + any(fed), counts.drafts + 1, counts.skipped + sum(skipped),
                self._made(trees),
            )  # fmt: skip
            ended = self._end_frames(trees)
        self._failed = False
        return tuple(
            Frame(index, rows, codes, self.passes, self.seconds) for index, rows, codes in ended
        )

    def _begin(self) -> Trees:
        """Write the prompts, and the actions that are known beforehand."""
        batch, prefix = self._prompts.shape
        device = self.decoder.model.device
        trees = self.decoder.trees(batch, prefix, self.frames)
        prompts, *without = (
            move(ids, device).long() for ids in (self._prompts, self._uncond) if ids is not None
        )
        trees.begin(
            prompts, without[0] if without else None, self._seed,
            move(torch.tensor(self._names, dtype=torch.int64), device),
        )  # fmt: skip
        if isinstance(self._actions, Tensor) and self.decoder.layout.extra:
            ids = move(self._actions, device).long()
            for frame in range(1, self.frames):
                for row in range(batch):
                    trees.write_extra(frame, row, ids[row, frame - 1])
        self._known, self._lengths = [prefix] * batch, [prefix - 1] * batch
        self._drafted = [max(prefix - 1, 1)] * batch
        self._trees = trees
        return trees

    def _read(self, trees: Trees) -> list[bool]:
        """Wait for the device: how far each sequence has come, and which of them skip."""
        known, lengths, skipped = read((trees.known, trees.lengths, trees.skipping))
        self._known, self._lengths = [int(n) for n in known], [int(n) for n in lengths]
        return [bool(flag) for flag in skipped]

    def _pairs(self, trees: Trees) -> int:
        """Return how many entries the drafter's first pass has; a graph takes all there may be."""
        places = list(zip(self._known, self._lengths, strict=True))
        new = (known - done for (known, _), done in zip(places, self._drafted, strict=True))
        pairs = max(1, *new)
        self._drafted = [min(length + 1, known) for known, length in places]
        return trees.pair_room if self.decoder.graphs else pairs

    def _chain(self, trees: Trees, fed: Sequence[bool]) -> int:
        """Return how many entries the chain has; a graph takes all there may be, or none."""
        places = zip(self._known, self._lengths, fed, strict=True)
        most = max(known - 1 - length for known, length, there in places if there)
        return trees.chain_room if most and self.decoder.graphs else most

    def _made(self, trees: Trees) -> int:
        return sum(trees.made(known) for known in self._known)

    def _end_frames(self, trees: Trees) -> list[tuple[int, tuple[int, ...], Tensor]]:
        """Return what is whole now as (frame, rows, codes), read; ask for actions."""
        layout, ended, found = self.decoder.layout, {}, []
        for row, known in enumerate(self._known):
            while self._done[row] < self.frames and trees.ends(self._done[row]) <= known:
                ended.setdefault(self._done[row], []).append(row)
                self._done[row] += 1
        for frame, rows in sorted(ended.items()):
            # a list as an index is uploaded from pageable memory, and the host waits
            where = move(torch.tensor(rows), self.codes.device)
            codes = trees.frame(frame, where)
            require_tokens(codes, frame, [self._names[row] for row in rows], op=_OP)
            self.codes[where, frame] = codes
            found.append((frame, tuple(rows), codes))
            self.clock.end(frame)
            if not layout.extra or frame + 1 == self.frames or isinstance(self._actions, Tensor):
                continue
            ids = self._actions(frame + 1, tuple(rows))
            vocabulary = self.decoder.model.vocabulary
            check_ids("actions", ids, (len(rows), layout.extra), vocabulary, op=_OP)
            for row, own in zip(rows, move(ids, trees.known.device).long(), strict=True):
                trees.write_extra(frame + 1, row, own)
        return found
