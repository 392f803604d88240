"""The embedded token model in the token loops: moving digits from a prompt and from actions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdvg.models.drafter import EagleDrafter
from sdvg.models.embedded.tokens import ACTIONS, HEIGHT, WIDTH, VideoTokens, load_drafter
from sdvg.models.tokens import TokenLlama, from_transformers
from sdvg.tokens.checks import whole
from sdvg.tokens.diagonal import (
    MODES,
    Actions,
    DiagonalDecoder,
    Generation,
    Layout,
    Sampling,
)
from sdvg.tokens.jacobi import JacobiDecoder, JacobiGeneration
from sdvg.tokens.speculative import Counts, SpeculativeDecoder, SpeculativeGeneration

# Jacobi decoding, coupled or not
JACOBI = {"scd": True, "sjd": False}
SPECULATIVE = "speculative"
KINDS = (*MODES, *JACOBI, SPECULATIVE)
# what its card says
SAMPLING = Sampling(temperature=0.9, guidance=1.5)
# as many tokens a pass as LlamaGen's 59 nodes, and likelier paths to skip by (vvs.md, tree=wide)
TREE = {"depth": 8, "top_k": 2, "nodes": 16}
# codes that may stand for a code, where verification is relaxed
NEAR = 32


class Shown(NamedTuple):
    """A finished frame of a batch, as pixels."""

    index: int
    # [B, 3, 32, 32] in [0, 1]
    frames: Tensor
    # of the model since the start
    passes: int
    # spent in the loop since the start, decoding to pixels left out
    seconds: float
    # of speculative decoding: what it has done since the start, and seconds of its stages
    counts: Counts | None = None
    stages: Mapping[str, float] | None = None


class EmbeddedVideos:
    """Videos of moving digits, frame by frame.

    Args:
        models: `sdvg.models.embedded.tokens.load()`.
        model: its Llama over a static cache, to be shared by several; None: made here.
        mode: of `DiagonalDecoder`; "scd" or "sjd", for `JacobiDecoder`, coupled or not; or
            "speculative", for `SpeculativeDecoder`.
        k: of `DiagonalDecoder`; of `JacobiDecoder` the window, which has a default.
        drafter: of speculative decoding, to be shared by several; None: loaded here where needed.
        options: of the decoder: row_start, context, verification, skip, ...; `sampling` is the
            card's by default, a tree `TREE`.

    Raises: ValueError, or TypeError for what is no number, in one sentence.
    """

    def __init__(
        self,
        models: VideoTokens,
        model: TokenLlama | None = None,
        *,
        mode: str = "spatial",
        k: int | None = None,
        drafter: EagleDrafter | None = None,
        **options: object,
    ) -> None:
        if mode not in KINDS:
            raise ValueError(f"tokens: mode must be one of {', '.join(KINDS)}, got {mode!r}")
        if mode == SPECULATIVE and k is not None:
            raise ValueError(f"tokens: k must be left out for {mode}, got {k}")
        if mode != SPECULATIVE and drafter is not None:
            raise ValueError(f"tokens: drafter must be left out for {mode}")
        self.models = models
        layout = Layout(HEIGHT, WIDTH, models.codes, extra=1)
        options = {"sampling": SAMPLING, **options}
        model = from_transformers(models.model) if model is None else model
        self.decoder: DiagonalDecoder | JacobiDecoder | SpeculativeDecoder
        if mode == SPECULATIVE:
            if drafter is None:
                drafter = load_drafter(device=model.device, dtype=models.model.dtype)
            options = {"codebook": codebook(models), **TREE, **options}
            self.decoder = SpeculativeDecoder(model, drafter, layout, **options)
        elif mode in JACOBI:
            options |= {} if k is None else {"window": k}
            self.decoder = JacobiDecoder(model, layout, coupled=JACOBI[mode], **options)
        else:
            self.decoder = DiagonalDecoder(model, layout, mode=mode, k=k, **options)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        frames: int = 8,
        actions: Tensor | Actions | None = None,
        seed: int = 0,
        sequences: Sequence[int] | None = None,
    ) -> Iterator[Shown]:
        """Yield each frame of one video for each prompt as soon as its tokens are there.

        Args:
            prompts: texts, none empty.
            actions: indices [B, frames - 1] into `ACTIONS`, or a callable of (frame, rows) that
                gives [len(rows), 1] of them (on the CPU) while the video runs; None: go on as
                before.

        Raises ValueError and TypeError as `DiagonalDecoder.generate` does, and for no prompt, an
        empty one, and an action that does not exist.
        """
        _check_prompts(prompts)
        models, batch, frames = self.models, len(prompts), whole("tokens", "frames", frames, 1)
        if actions is None:
            actions = torch.zeros(batch, frames - 1, dtype=torch.int64)
        if isinstance(actions, Tensor):
            given: Tensor | Actions = self._ids(actions)[..., None]
        elif not callable(actions):
            raise TypeError(
                f"tokens: actions must be a tensor or a callable, got {type(actions).__name__}"
            )
        else:
            ask = actions

            def given(frame: int, rows: tuple[int, ...]) -> Tensor:
                return self._ids(ask(frame, rows))

        guided = self.decoder.sampling.guidance != 1
        running = self.decoder.generate(
            models.prompts(prompts),
            frames=frames,
            uncond=models.prompts([""] * batch) if guided else None,
            actions=given,
            seed=seed,
            sequences=sequences,
        )
        return self._shown(running)

    def _shown(
        self, running: Generation | JacobiGeneration | SpeculativeGeneration
    ) -> Iterator[Shown]:
        there: Counter[int] = Counter()
        for frame in running:
            # of some sequences a frame may come earlier
            there[frame.index] += len(frame.rows)
            codes = running.codes[:, frame.index]
            if there[frame.index] == len(codes):
                pixels = self.models.decode(codes)
                shown = Shown(frame.index, pixels, frame.passes, frame.seconds)
                if isinstance(running, SpeculativeGeneration):
                    stages = dict(running.clock.seconds)
                    shown = shown._replace(counts=running.counts, stages=stages)
                yield shown

    def _ids(self, actions: Tensor) -> Tensor:
        if not isinstance(actions, Tensor):
            raise TypeError(f"tokens: actions must be a tensor, got {type(actions).__name__}")
        if actions.numel() and not 0 <= actions.min() <= actions.max() < len(ACTIONS):
            raise ValueError(
                f"tokens: actions must lie in [0, {len(ACTIONS)}), got {int(actions.min())} to "
                f"{int(actions.max())}"
            )
        return self.models.actions(actions)


def codebook(models: VideoTokens) -> Tensor:
    """Return the tokenizer's codes as vectors [codes, E] float32."""
    return models.vq.quantize.embedding.weight.detach().float()


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"tokens: prompts must be a non-empty list of texts, got {prompts!r}")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"tokens: a prompt must be a text, got {prompt!r}")
        # without words it is what guidance leads away from
        if not prompt.strip():
            raise ValueError(f"tokens: a prompt must not be empty, got {prompt!r}")
