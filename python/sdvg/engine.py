"""The SDVG loop: draft a block, score it, route it, repair it (arXiv 2604.17397, section 3)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from sdvg.clock import Clock
from sdvg.commit import CachedModel, Recompute, policy
from sdvg.grid import Grid
from sdvg.host import Rows, device_of, move, read, side_stream
from sdvg.request import check_count, check_prompts, keys, split
from sdvg.router import Reward
from sdvg.schedule import Schedule, preset
from sdvg.types import (
    Block,
    CausalModel,
    Decoder,
    Draft,
    Router,
    Scorer,
    Stats,
    Verdict,
)


class SDVG:
    """Block-autoregressive video generation by speculation.

    For each block the drafter denoises from the block's noise, the decoder turns latents to
    frames, the scorer scores them and the router gives a verdict per sequence. Accepted latents
    are the target's too; for the rejected sequences the target denoises the same noise and the
    decoder goes on from its state before the draft.

    Args:
        drafter, target: `CausalModel`s with equal `block_shape`. Without a target every draft is
            kept; without a drafter the target makes every block.
        decoder: latents to frames.
        scorer: frames to rewards, where it lies; needed by routers that look at them.
        preview: a cheaper decoder for the scorer's eyes; `decoder` then decodes only what is
            final.
        router: which drafts are kept (`sdvg.router`, or any callable of a `Draft`).
        schedule: denoising steps of the target, a `Schedule` or the name of a preset.
        drafter_schedule: the drafter's, by default the same.
        force_first: let the target make block 0 whatever the router says (the paper does).
        commit: when accepted blocks enter the target's cache. "lazy": in one multi-block pass, when
            the target is next needed, without blocks that can no longer change its output; "eager":
            at once, one pass a block; `Recompute(n)` or "recompute:n": nothing is kept, the last n
            latents are written anew before each target block.
        drafter_cache: "own": the drafter goes on from its own drafts (the paper); "synced": from
            the final blocks.
        run_ahead: with "own", how many blocks the drafter may be ahead of the verdicts; on a GPU it
            then runs on a stream of its own. The output is the same.
        in_flight: how many blocks of one model are made side by side in one forward (`sdvg.grid`),
            where none waits for a verdict: a drafter's with "own", or those of a model alone. 2:
            fewer forwards, the same output to rounding; more: another output.

    Raises:
        ValueError: parts that do not fit each other, in one sentence.
    """

    def __init__(
        self,
        drafter: CausalModel | None,
        target: CausalModel | None,
        decoder: Decoder,
        scorer: Scorer | None = None,
        router: Router | None = None,
        *,
        schedule: Schedule | str = "self_forcing",
        drafter_schedule: Schedule | str | None = None,
        force_first: bool = True,
        commit: str | Recompute = "lazy",
        drafter_cache: str = "own",
        run_ahead: int = 0,
        in_flight: int = 1,
        preview: Decoder | None = None,
    ) -> None:
        self.drafter, self.target, self.decoder, self.scorer = drafter, target, decoder, scorer
        self.preview = preview
        self.router = Reward() if router is None else router
        self.schedule = preset(schedule) if isinstance(schedule, str) else schedule
        drafting = schedule if drafter_schedule is None else drafter_schedule
        self.drafter_schedule = preset(drafting) if isinstance(drafting, str) else drafting
        self.force_first, self.commit = force_first, policy(commit)
        self.drafter_cache, self.run_ahead, self.in_flight = drafter_cache, run_ahead, in_flight
        self._check()

    def generate(
        self,
        prompts: Sequence[str],
        *,
        num_blocks: int = 9,
        seed: int | Sequence[int] = 0,
        sequences: Sequence[int] | None = None,
        given: Tensor | None = None,
    ) -> Generation:
        """Return an iterator over `num_blocks` blocks of one video for each prompt.

        `sequences` are the ids that, with `seed`, key each video's noise (default 0, 1, ..., and 0
        for all where each has a seed of its own): a video is the same alone and in any batch.
        `given` are clean latents `[B, n F, C, h, w]` of
        the first n blocks, for an image or a video to go on from: they are decoded and yielded
        like the others. The models hold one generation at a time: going on with an older one
        raises RuntimeError.

        Raises ValueError for no prompt, an empty prompt, fewer than one block, or given latents of
        another shape, TypeError for what is no text or no integer.
        """
        return Generation(self, prompts, num_blocks, seed, sequences, given)

    def _check(self) -> None:
        if self.drafter is None and self.target is None:
            raise ValueError("sdvg: drafter and target must not both be None, got neither")
        if self.drafter is self.target:
            raise ValueError(
                "sdvg: drafter and target must each have a cache of their own, got one model twice"
            )
        for name, part in (("decoder", self.decoder), ("preview", self.preview or self.decoder)):
            if not hasattr(part, "decode"):
                raise ValueError(f"sdvg: {name} must turn latents to frames, got {part!r}")
        if not callable(self.router):
            raise ValueError(
                f"sdvg: router must be callable, got {self.router!r}; take one of sdvg.router, "
                "such as Reward(-0.7)"
            )
        models = [model for model in (self.drafter, self.target) if model is not None]
        shapes = [model.block_shape for model in models]
        if len(set(shapes)) > 1:
            raise ValueError(
                "sdvg: drafter and target must share one latent block shape [F, C, h, w], "
                f"got {list(shapes[0])} and {list(shapes[1])}"
            )
        if len(models) == 2 and self.scorer is None and needs_score(self.router):
            raise ValueError(
                f"sdvg: scorer must be given for the router {self.router!r}, got None; "
                "give one, or take a router that needs no score (Stride, Random, Always, Never)"
            )
        if isinstance(self.commit, Recompute) and self.commit.frames % shapes[0][0]:
            raise ValueError(
                f"sdvg: Recompute must hold whole blocks of {shapes[0][0]} frames, "
                f"got {self.commit.frames}"
            )
        if self.drafter_cache not in ("own", "synced"):
            raise ValueError(
                f"sdvg: drafter_cache must be 'own' or 'synced', got {self.drafter_cache!r}"
            )
        for name in ("schedule", "drafter_schedule"):
            if not isinstance(given := getattr(self, name), Schedule):
                raise TypeError(
                    f"sdvg: {name} must be a Schedule or a preset's name, got {given!r}"
                )
        for name in ("run_ahead", "in_flight"):
            if not isinstance(given := getattr(self, name), int):
                raise TypeError(f"sdvg: {name} must be an integer, got {given!r}")
        if self.run_ahead < 0 or (self.run_ahead and self.drafter_cache == "synced"):
            raise ValueError(
                "sdvg: run_ahead must be 0 unless the drafter goes on from its own drafts, "
                f"got {self.run_ahead} with drafter_cache={self.drafter_cache!r}"
            )
        if self.in_flight != 1:
            self._check_in_flight()

    def _check_in_flight(self) -> None:
        model, rule = self.drafter or self.target, ""
        if self.in_flight < 1:
            rule = "at least 1"
        elif self.drafter is not None and self.target is not None and self.drafter_cache != "own":
            rule = "1 where a draft waits for the verdict before it (drafter_cache='synced')"
        elif self.drafter is None and isinstance(self.commit, Recompute):
            rule = f"1 with {self.commit!r}, which keeps nothing of the block before"
        elif not hasattr(model, "denoise_blocks"):
            rule = f"1 for {type(model).__name__}, which has no denoise_blocks"
        if rule:
            raise ValueError(f"sdvg: in_flight must be {rule}, got {self.in_flight}")


class Generation(Iterator[Block]):
    """The loop itself: `next` gives a block as soon as it is final, `summary` says how it went.

    A block counts in one step at its end and all that leads there may be done twice, so an
    interrupt in the middle of a block loses nothing: the next `next` makes that block again, bit
    for bit.
    """

    def __init__(
        self,
        sdvg: SDVG,
        prompts: Sequence[str],
        num_blocks: int,
        seed: int | Sequence[int],
        sequences: Sequence[int] | None,
        given: Tensor | None,
    ) -> None:
        began = time.perf_counter()
        check_prompts(prompts)
        check_count(num_blocks)
        self.seed, self.sequences = keys(seed, sequences, len(prompts))
        self.sdvg, self.prompts, self.num_blocks = sdvg, tuple(prompts), num_blocks
        self.latents: list[Tensor] = []
        self.verdicts: list[tuple[Verdict, ...]] = []
        # block -> clean latents that were given; to the drafter they are drafts of its own
        self._given = split(given, sdvg.target or sdvg.drafter, len(prompts), num_blocks)
        self._drafts = dict(self._given)
        # the scorer watches the last one
        self._decoders = [sdvg.decoder]
        if sdvg.preview is not None and needs_score(sdvg.router):
            self._decoders.append(sdvg.preview)
        # their states before each block that may still be made
        self._states = {0: [decoder.start(len(prompts)) for decoder in self._decoders]}
        self._frames = 0
        self._clock = Clock()
        # (what to say, whether it was finite), on the devices until the host waits anyway
        self._asked: list[tuple[str, Tensor]] = []
        self._drafter = self._target = None
        if sdvg.drafter is not None:
            if sdvg.drafter.device.type == "cuda":
                # drafts ahead of a video that was left may still be at work in the cache
                torch.cuda.synchronize(sdvg.drafter.device)
            self._drafter = self._cached(sdvg.drafter, sdvg.drafter_schedule, stage="draft")
        if sdvg.target is not None:
            self._target = self._cached(sdvg.target, sdvg.schedule, policy=sdvg.commit)
        # ahead of the verdicts the drafter runs on a stream of its own; an event for each draft
        self._stream: torch.cuda.Stream | None = None
        self._drawn: dict[int, torch.cuda.Event] = {}
        if sdvg.run_ahead and sdvg.drafter is not None and sdvg.drafter.device.type == "cuda":
            self._stream = side_stream(sdvg.drafter.device)
            self._stream.wait_stream(torch.cuda.current_stream(sdvg.drafter.device))
        # prompts are encoded and caches made; then with the first block
        self._started = time.perf_counter() - began
        self._first_frames: float | None = None

    def _cached(self, model: CausalModel, schedule: Schedule, **options: object) -> CachedModel:
        sdvg = self.sdvg
        options |= {"seed": self.seed, "sequences": self.sequences}
        if sdvg.in_flight == 1 or (model is sdvg.target and sdvg.drafter is not None):
            return CachedModel(model, schedule, self.prompts, **options)
        options |= {"in_flight": sdvg.in_flight, "num_blocks": self.num_blocks}
        return Grid(model, schedule, self.prompts, **options)

    def __next__(self) -> Block:
        """Draft, decode, score and route one block; commit it or repair it.

        The host waits for the devices once where the router looked at rewards, and once at the end.
        """
        index = len(self.latents)
        if index == self.num_blocks:
            raise StopIteration
        with self._clock.running():
            block = self._make(index)
        if not index:
            self._first_frames = self._started + self._clock.total
        return block

    def _make(self, index: int) -> Block:
        sdvg, before = self.sdvg, self._states[index]
        self._asked.clear()
        if sdvg.commit == "eager" and self._target is not None:
            self._target.catch_up(index, None, self.latents, self._clock)

        # what the scorer saw of the draft: frames, and the decoder's state after them
        seen = None
        verdicts = self._decide_early(index)
        draft = self._draft(index, verdicts)
        if verdicts is None:
            seen = self._decode(-1, index, draft, before[-1])
            verdicts = self._route(index, seen[0])

        rejected = Rows([row for row, verdict in enumerate(verdicts) if not verdict.accepted])
        if not rejected:
            latents = draft
        elif len(rejected) == len(self.prompts):
            latents = self._repair(index, None)
        else:
            repaired = self._repair(index, rejected)
            latents = draft.index_copy(0, rejected.on(draft.device), repaired)
        final = self._show(index, latents, rejected, seen, before)
        frames = final[0][0]
        self._ask(frames, "decoder", "decode", index)
        self._read()
        if self._drafter is not None and sdvg.drafter_cache == "synced":
            # without a clean pass its cache holds the draft that was rejected: it is written anew
            self._drafter.forget(index, rejected.members)

        seconds = self._clock.end(index)
        self._states[index + 1] = [state for _, state in final]
        self.verdicts[index:] = [verdicts]
        self.latents.append(latents)
        self._frames += frames.shape[0] * frames.shape[1]
        self._states.pop(index)
        return Block(index, frames, latents, verdicts, seconds)

    def switch(self, prompts: Sequence[str], *, recache: str = "window") -> None:
        """Follow other prompts from the next block on.

        What the caches hold was written under the old prompts. Clean latents are written anew under
        the new ones, in the next block's time:

        - "window": the sink and what the next block sees, one pass over at most `sink + window`
          frames, as LongLive's KV recache does (arXiv 2509.22622). Older blocks are forgotten, and
          the window moves up to the sink: keys are relative, only the sink comes nearer.
        - "all": everything that can reach the next block through all layers. The video goes on as
          if all of it had been made under the new prompts, at the price of `layers * window`
          frames: for 40 layers and a window of 6 that is 40 blocks of clean passes, many seconds of
          a 14B model. Hence it is not the default.

        Raises as `SDVG.generate` does.
        """
        check_prompts(prompts)
        if len(prompts) != len(self.prompts):
            raise ValueError(
                f"sdvg: prompts must be one for each of {len(self.prompts)} sequences, "
                f"got {len(prompts)}"
            )
        if recache not in ("window", "all"):
            raise ValueError(f"sdvg: recache must be 'window' or 'all', got {recache!r}")
        self.prompts = tuple(prompts)
        made = len(self.latents)
        # drafts that ran ahead followed the old prompts
        self._drafts = {i: draft for i, draft in self._drafts.items() if i < made} | self._given
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        for model in (self._drafter, self._target):
            if model is not None:
                model.restart(self.prompts, made if recache == "window" else None)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def summary(self, target_only_seconds: float | None = None) -> Stats:
        """Return what happened so far.

        `target_only_seconds`, the measured time of the same blocks made by the target alone, turns
        the speed-up from predicted into measured.
        """
        clock = self._clock
        clock.finish(len(self.latents) - 1)
        decided = [v.accepted for row in self.verdicts for v in row if v.reason == "router"]
        source = "measured"
        if target_only_seconds is None:
            target_only_seconds = self._predict_target_only()
            source = "predicted" if target_only_seconds is not None else "none"
        ratio = target_only_seconds / clock.total if target_only_seconds and clock.total else None
        return Stats(
            blocks=len(self.latents),
            sequences=len(self.prompts),
            frames=self._frames,
            acceptance=sum(decided) / len(decided) if decided else None,
            total=clock.total,
            stages=dict(clock.seconds),
            fps=self._frames / clock.total if clock.total else 0.0,
            speedup=ratio,
            speedup_source=source,
            first_frames=self._first_frames,
        )

    def _predict_target_only(self) -> float | None:
        seconds, units, sdvg = self._clock.seconds, self._clock.units, self.sdvg
        if not units["target"]:
            return None
        blocks, batch = range(len(self.latents)), len(self.prompts)
        steps = sum(len(sdvg.schedule.steps(block)) for block in blocks if block not in self._given)
        passes = 0
        if sdvg.schedule.clean_pass or isinstance(sdvg.commit, Recompute):
            passes = len(blocks) - 1
        step = seconds["target"] / units["target"]
        # before anything was committed, a clean pass counts as one denoising step
        clean = seconds["commit"] / units["commit"] if units["commit"] else step
        decode = seconds["decode"] / units["decode"]
        return batch * (steps * step + passes * clean + len(blocks) * decode)

    def _decide_early(self, index: int) -> tuple[Verdict, ...] | None:
        """Return the verdicts where no score is needed, else None."""
        sdvg, batch = self.sdvg, len(self.prompts)
        if index in self._given:
            return (Verdict(True, None, "given"),) * batch
        if sdvg.target is None:
            return (Verdict(True, None, "draft-only"),) * batch
        if sdvg.drafter is None:
            return (Verdict(False, None, "target-only"),) * batch
        if index == 0 and sdvg.force_first:
            return (Verdict(False, None, "first"),) * batch
        if needs_score(sdvg.router):
            return None
        (accept,) = read([self._asked_router(index, None)])
        return tuple(Verdict(bool(kept), None, "router") for kept in accept)

    def _draft(self, index: int, decided: Sequence[Verdict] | None) -> Tensor | None:
        """Return the drafter's block where somebody looks at it, made now or ahead of its turn."""
        drafter, sdvg = self._drafter, self.sdvg
        if index in self._given or drafter is None:
            return self._given.get(index)
        wanted = decided is None or any(verdict.accepted for verdict in decided)
        if sdvg.drafter_cache == "synced" and not wanted:
            return None
        # a drafter that goes on from its own drafts must make them all
        blocks = self._drafts if sdvg.drafter_cache == "own" else self.latents
        device, batch = drafter.model.device, len(self.prompts)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for ahead in range(index, min(index + sdvg.run_ahead + 1, self.num_blocks)):
                if ahead in self._drafts:
                    continue
                start = drafter.catch_up(ahead, None, blocks, self._clock)
                with self._clock.stage("draft", batch, device, ahead):
                    draft = drafter.denoise(ahead, None, start)
                if self._stream is not None:
                    self._drawn[ahead] = self._stream.record_event()
                self._drafts[ahead] = draft
        draft = self._drafts[index]
        if self._stream is not None:
            if not wanted:
                # nothing waits for it: the target may begin
                return None
            torch.cuda.current_stream(device).wait_event(self._drawn[index])
            draft.record_stream(torch.cuda.current_stream(device))
        self._ask(draft, "drafter", "draft", index)
        return move(draft, self._device)

    def _repair(self, index: int, rows: Rows | None) -> Tensor:
        """Return the target's block for `rows`, from the same noise as the draft."""
        target = self._target
        start = target.catch_up(index, rows, self.latents, self._clock)
        # every pass of a block counts: blocks differ in theirs
        units = len(self.prompts if rows is None else rows) * target.passes(index)
        with self._clock.stage("target", units, target.model.device, index):
            latents = target.denoise(index, rows, start)
        self._ask(latents, "target", "target", index)
        return latents

    def _show(
        self,
        index: int,
        latents: Tensor,
        rejected: Rows,
        seen: tuple[Tensor, object] | None,
        before: Sequence[object],
    ) -> list[tuple[Tensor, object]]:
        """Return frames and state of each decoder; what one has decoded of a kept draft stays.

        A decoder goes on from `before` for what is new: a rejected draft leaves no trace in it.
        """
        shown = []
        for at, (decoder, state) in enumerate(zip(self._decoders, before, strict=True)):
            decoded = seen if at == len(self._decoders) - 1 else None
            if decoded is None or len(rejected) == len(self.prompts):
                shown.append(self._decode(at, index, latents, state))
            elif rejected:
                frames, after = decoded
                rows = rejected.on(frames.device)
                repaired = latents[rejected.on(latents.device)]
                mended, mended_state = self._decode(at, index, repaired, decoder.take(state, rows))
                frames = frames.index_copy(0, rows, mended)
                shown.append((frames, decoder.select(after, mended_state, rows)))
            else:
                shown.append(decoded)
        return shown

    def _decode(self, at: int, index: int, latents: Tensor, state: object) -> tuple[Tensor, object]:
        # a preview is part of what scoring costs
        decoder = self._decoders[at]
        stage, units = ("decode", len(latents)) if decoder is self.sdvg.decoder else ("score", 0)
        with self._clock.stage(stage, units, device_of(decoder, latents.device), index):
            return decoder.decode(latents, state)

    def _route(self, index: int, frames: Tensor) -> tuple[Verdict, ...]:
        """Score the draft and bring the router's decisions to the host: the wait for a verdict."""
        rewards = self._score(frames, index)
        accept = self._asked_router(index, rewards)
        mean = getattr(self.sdvg.router, "aggregate", "min") == "mean"
        score = rewards.mean(dim=1) if mean else rewards.amin(dim=1)
        kept, scores = self._read(accept, score)
        return tuple(
            Verdict(bool(keep), value, "router") for keep, value in zip(kept, scores, strict=True)
        )

    def _score(self, frames: Tensor, index: int) -> Tensor:
        device = device_of(self.sdvg.scorer, frames.device)
        with self._clock.stage("score", len(frames), device, index):
            try:
                with torch.no_grad():
                    rewards = self.sdvg.scorer(move(frames, device), self.prompts)
            except Exception as error:
                # what it was shown may be why
                self._read()
                raise RuntimeError(f"sdvg: the scorer failed at block {index}: {error}") from error
        if not isinstance(rewards, Tensor):
            raise TypeError(f"sdvg: the scorer must return a tensor, got {type(rewards).__name__}")
        if rewards.shape != frames.shape[:2]:
            raise ValueError(
                f"sdvg: the scorer must return one reward a frame {list(frames.shape[:2])}, "
                f"got {list(rewards.shape)} at block {index}"
            )
        return rewards

    def _asked_router(self, index: int, rewards: Tensor | None) -> Tensor:
        accept = self.sdvg.router(Draft(index, self.seed, self.sequences, rewards))
        if not isinstance(accept, Tensor):
            raise TypeError(f"sdvg: the router must return a tensor, got {type(accept).__name__}")
        if tuple(accept.shape) != (len(self.prompts),):
            raise ValueError(
                f"sdvg: the router must return one decision a sequence [{len(self.prompts)}], "
                f"got {list(accept.shape)}"
            )
        return accept

    def _ask(self, made: Tensor, part: str, stage: str, index: int) -> None:
        """Let the next `_read` raise unless `made` is finite."""
        text = f"sdvg: the {part} returned values that are not finite at block {index}"
        self._asked.append((f"{text}, stage {stage}", torch.isfinite(made).all()))

    def _read(self, *parts: Tensor) -> list[list[float]]:
        """Bring small tensors to the host, with all that was asked: one wait for their device."""
        asked, self._asked = self._asked, []
        values = read([*parts, *(finite for _, finite in asked)])
        for (text, _), (finite,) in zip(asked, values[len(parts) :], strict=True):
            if not finite:
                raise RuntimeError(text)
        return values[: len(parts)]

    @property
    def _device(self) -> torch.device:
        """Where finished latents lie: with the model that repairs."""
        return (self._target or self._drafter).model.device


def needs_score(router: Router) -> bool:
    """Return whether `router` looks at rewards; a plain callable does."""
    return getattr(router, "needs_score", True)
