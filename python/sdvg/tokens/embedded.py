"""The embedded token model in the diagonal loop: moving digits from a prompt and from actions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdvg.models.embedded.tokens import ACTIONS, HEIGHT, WIDTH, VideoTokens
from sdvg.models.tokens import TokenLlama, from_transformers
from sdvg.tokens.diagonal import Actions, DiagonalDecoder, Generation, Layout, Sampling
from sdvg.tokens.jacobi import JacobiDecoder, JacobiGeneration

# what its card says
SAMPLING = Sampling(temperature=0.9, guidance=1.5)


class Shown(NamedTuple):
    """A finished frame of a batch, as pixels."""

    index: int
    # [B, 3, 32, 32] in [0, 1]
    frames: Tensor
    # of the model since the start
    passes: int
    # spent in the loop since the start, decoding to pixels left out
    seconds: float


class EmbeddedVideos:
    """Videos of moving digits, frame by frame.

    Args:
        models: `sdvg.models.embedded.tokens.load()`.
        model: its Llama over a static cache, to be shared by several; None: made here.
        mode: of `DiagonalDecoder`; or "scd", for `JacobiDecoder` with a window of `k`.
        options: of the decoder: k, row_start, context, ...; `sampling` is the card's by default.
    """

    def __init__(
        self,
        models: VideoTokens,
        model: TokenLlama | None = None,
        *,
        mode: str = "spatial",
        **options: object,
    ) -> None:
        self.models = models
        layout = Layout(HEIGHT, WIDTH, models.codes, extra=1)
        options = {"sampling": SAMPLING, **options}
        model = from_transformers(models.model) if model is None else model
        self.decoder: DiagonalDecoder | JacobiDecoder
        if mode == "scd":
            self.decoder = JacobiDecoder(model, layout, window=options.pop("k"), **options)
        else:
            self.decoder = DiagonalDecoder(model, layout, mode=mode, **options)
        # the newest one
        self.running: Generation | JacobiGeneration | None = None

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
            actions: indices [B, frames - 1] into `ACTIONS`, or a callable of (frame, rows) that
                gives [len(rows), 1] of them while the video runs; None: go on as before.

        Raises ValueError as `DiagonalDecoder.generate` does, and for an action that does not exist.
        """
        models, batch = self.models, len(prompts)
        if actions is None:
            actions = torch.zeros(batch, max(0, frames - 1), dtype=torch.int64)
        if isinstance(actions, Tensor):
            given: Tensor | Actions = self._ids(actions)[..., None]
        else:
            ask = actions

            def given(frame: int, rows: tuple[int, ...]) -> Tensor:
                return self._ids(ask(frame, rows))

        guided = self.decoder.sampling.guidance != 1
        self.running = self.decoder.generate(
            models.prompts(prompts),
            frames=frames,
            uncond=models.prompts([""] * batch) if guided else None,
            actions=given,
            seed=seed,
            sequences=sequences,
        )
        return self._shown()

    def _shown(self) -> Iterator[Shown]:
        there: Counter[int] = Counter()
        for frame in self.running:
            # of some sequences a frame may come earlier
            there[frame.index] += len(frame.rows)
            codes = self.running.codes[:, frame.index]
            if there[frame.index] == len(codes):
                pixels = self.models.decode(codes)
                yield Shown(frame.index, pixels, frame.passes, frame.seconds)

    def _ids(self, actions: Tensor) -> Tensor:
        if actions.numel() and not 0 <= actions.min() <= actions.max() < len(ACTIONS):
            raise ValueError(
                f"diagonal: actions must lie in [0, {len(ACTIONS)}), got {int(actions.min())} to "
                f"{int(actions.max())}"
            )
        return self.models.actions(actions)
