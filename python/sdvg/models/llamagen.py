"""LlamaGen over a static cache: images of a square grid, behind a class or a caption's features.

An image token's position is its row and its column; what conditions has none, and its queries and
keys are zero, as in the release. The loop's ids are the image's codes, then what conditions, then
one that pads a caption:

    class:    [0, codes)  [classes and the empty one]                      padding
    caption:  [0, codes)  [the empty caption's rows]  [rows of captions]   padding

Source: LlamaGen (arXiv 2406.06525; FoundationVision/LlamaGen).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvg.models.llama import LlamaSizes, TokenCache, by_halves, frequencies
from sdvg.models.tokens import TokenLlama, fit, read_names
from sdvg_kernels import TokenGrid

CODES = 16384


def _sizes(layers: int, width: int, heads: int) -> LlamaSizes:
    # two thirds of four widths, up to a multiple of 256
    hidden = (8 * width // 3 + 255) // 256 * 256
    return LlamaSizes(layers, width, heads, heads, width // heads, hidden, CODES, 1e-5)


# B, L, XL, XXL and 3B were released by class, XL by caption; the other sizes are named alone
LLAMAGEN = {
    "B": _sizes(12, 768, 12),
    "L": _sizes(24, 1024, 16),
    "XL": _sizes(36, 1280, 20),
    "XXL": _sizes(48, 1536, 24),
    "XXXL": _sizes(48, 2560, 40),
    "1B": _sizes(22, 2048, 32),
    "3B": _sizes(24, 3200, 32),
    "7B": _sizes(32, 4096, 32),
}


class LlamaGen(TokenLlama):
    """LlamaGen, for `DiagonalDecoder` with `Layout(side, side, codes)`.

    Made by `load_llamagen`.

        prompts = model.classes(torch.tensor([207, 980]))       # or model.captions(features, mask)
        decoder.generate(prompts, frames=1, uncond=model.uncond(prompts))

    Pixels come from the release's own `VQModel.decode_code`.

    Args:
        sizes: the configuration; its vocabulary is the codes alone.
        side: rows and columns of the image's tokens.
        condition: tokens before the image: 1 for a class, a caption's otherwise (120).
        classes: how many; None: the model takes captions.
        features: width of a caption's features.
        captions: how many captions are held at once.

    Attributes:
        codes: how many an image's token may be.
    """

    def __init__(
        self,
        sizes: LlamaSizes,
        side: int,
        *,
        condition: int = 1,
        classes: int | None = None,
        features: int | None = None,
        captions: int = 64,
    ) -> None:
        if (classes is None) == (features is None):
            raise ValueError(
                f"llamagen: one of classes and features must be given, got {classes} and {features}"
            )
        super().__init__(sizes)
        self.side, self.condition, self.codes = side, condition, sizes.vocabulary
        self._classes, self._room, self._next = classes, captions, 0
        # the empty class, or the empty caption, is among them
        rows = (1 + captions) * condition if classes is None else classes + 1
        self.padding = self.codes + rows
        self.embedding = nn.Embedding(self.padding + 1, sizes.width)
        if features is not None:
            self.caption_in = nn.Linear(features, sizes.width, bias=False)
            self.caption_out = nn.Linear(sizes.width, sizes.width, bias=False)

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return self.padding + 1

    def classes(self, labels: Tensor) -> Tensor:
        """Return the prompts [B, 1] of classes [B]; ValueError for one that there is not."""
        if self._classes is None:
            raise ValueError("llamagen: labels must be captions for this model, got classes")
        if labels.ndim != 1 or (
            labels.numel() and not 0 <= labels.min() <= labels.max() < self._classes
        ):
            raise ValueError(
                f"llamagen: labels must be [B] in [0, {self._classes}), got "
                f"{labels.tolist() if labels.ndim == 1 else list(labels.shape)}"
            )
        return self.codes + labels[:, None].to(self.device, torch.int64)

    @torch.no_grad()
    def captions(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the prompts [B, condition] of captions.

        Args:
            features: [B, condition, F], the text encoder's (T5).
            mask: [B, condition], 0 for padding, at either end: it is moved to the start, as the
                released sampling does. None: there is none.

        Mutates the embedding: the model holds the newest `captions` captions, and older prompts
        lose theirs.

        Raises ValueError, in one sentence.
        """
        if self._classes is not None:
            raise ValueError("llamagen: features must be classes for this model, got captions")
        wanted = (self.condition, self.caption_in.in_features)
        if features.ndim != 3 or features.shape[1:] != wanted:
            raise ValueError(
                f"llamagen: features must be [B, {wanted[0]}, {wanted[1]}], got "
                f"{list(features.shape)}"
            )
        batch = len(features)
        if batch > self._room:
            raise ValueError(
                f"llamagen: features must be of at most {self._room} captions, got {batch}; load "
                "the model with captions= as many as a batch has"
            )
        weight, device = self.embedding.weight, self.device
        seen = torch.ones(features.shape[:2], dtype=torch.bool, device=device)
        if mask is not None:
            if mask.shape != features.shape[:2]:
                raise ValueError(
                    f"llamagen: mask must be {list(features.shape[:2])}, got {list(mask.shape)}"
                )
            seen = mask.to(device).bool()
            if not seen.any(1).all():
                raise ValueError("llamagen: mask must keep a token of each caption, got none kept")
        order = seen.byte().argsort(dim=1, stable=True)
        features = features.to(weight).gather(1, order[..., None].expand_as(features))
        held = (self._next + torch.arange(batch, device=device)) % self._room + 1
        self._next = (self._next + batch) % self._room
        ids = self._row(held[:, None])
        weight[ids] = self._project(features)
        return torch.where(seen.gather(1, order), ids, self.padding)

    def uncond(self, prompts: Tensor) -> Tensor:
        """Return the prompts [B, condition] of the empty class, or caption, padded as `prompts`."""
        if self._classes is not None:
            return torch.full_like(prompts, self.codes + self._classes)
        empty = self._row(torch.zeros_like(prompts[:, :1]))
        return torch.where(prompts == self.padding, self.padding, empty)

    def angles(self, slots: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines `[slots, 1, head_dim]`: by halves, 0 for what conditions.

        A quarter of `head_dim` pairs each turn by row, then by column.

        Raises ValueError beyond the image.
        """
        most = self.condition + self.side**2
        if slots > most:
            raise ValueError(
                f"llamagen: slots must be at most {most}, a condition of {self.condition} and "
                f"{self.side} x {self.side} tokens, got {slots}"
            )
        turn = frequencies(self.sizes.head_dim // 2, self.sizes.theta)
        place = torch.arange(self.side**2, dtype=torch.float32)[:, None]
        turned = torch.cat((place // self.side * turn, place % self.side * turn), 1)
        both = torch.cat((turned, turned), 1)
        cos, sin = (F.pad(part, (0, 0, self.condition, 0)) for part in (both.cos(), both.sin()))
        return cos[:slots, None], sin[:slots, None]

    def forward(
        self,
        ids: Tensor,
        slots: Tensor,
        steps: Tensor,
        grid: TokenGrid,
        cache: TokenCache,
        *,
        published: bool = False,
        length: int | None = None,
    ) -> Tensor:
        """Feed a pass and return its logits [B, T, codes]; else as `TokenLlama` does.

        Raises ValueError as `check_grid` does.
        """
        self.check_grid(grid)
        return super().forward(ids, slots, steps, grid, cache, published=published, length=length)

    def check_grid(self, grid: TokenGrid) -> None:
        """Raise ValueError for a grid that is not the image's: positions are rows and columns."""
        own = (self.condition, self.side, self.side, self.side)
        if (grid.prefix, grid.height, grid.width, grid.row_stride) != own:
            raise ValueError(
                f"llamagen: the grid must be {self.side} x {self.side} tokens behind "
                f"{self.condition}, got {grid.height} x {grid.width} behind {grid.prefix}"
                f"{' with ends of rows' if grid.eol else ''}"
            )

    def _row(self, caption: Tensor) -> Tensor:
        """Return the ids [..., condition] of a held caption [..., 1]; 0 is the empty one."""
        place = torch.arange(self.condition, device=caption.device)
        return self.codes + caption * self.condition + place

    def _project(self, features: Tensor) -> Tensor:
        return self.caption_out(F.gelu(self.caption_in(features), approximate="tanh"))


def load_llamagen(
    state: Mapping[str, Tensor], sizes: LlamaSizes, side: int, *, captions: int = 64
) -> LlamaGen:
    """Return the model of a LlamaGen checkpoint.

    Whether it takes classes or captions, and how many tokens a caption has, is read from the names
    and shapes.

    Args:
        state: the released file as `torch.load` gives it, or what it holds under "model", "module"
            or "state_dict".
        sizes: one of `LLAMAGEN`.
        side: tokens of a row: pixels over 16, as 16, 24 or 32.
        captions: how many captions are held at once.

    Raises ValueError for names that are missing, left over or of another shape.
    """
    for inner in ("model", "module", "state_dict"):
        if isinstance(state.get(inner), Mapping):
            state = state[inner]
            break
    names = read_names(state, sizes.layers)
    parts = {
        name: names.pop(f"cls_embedding.{name}", None)
        for name in (
            "embedding_table.weight", "cap_proj.fc1.weight", "cap_proj.fc2.weight",
            "uncond_embedding",
        )
    }  # fmt: skip
    table, first, second, empty = parts.values()
    missing = [name for name, part in parts.items() if part is None]
    if len(missing) != (3 if table is not None else 1) or "embedding.weight" not in names:
        raise ValueError(
            "llamagen: the checkpoint must have tok_embeddings, and cls_embedding of classes or of "
            f"captions, got none of {', '.join(missing)}"
        )
    with torch.device("meta"):
        if table is not None:
            model = LlamaGen(sizes, side, classes=len(table) - 1)
        else:
            model = LlamaGen(
                sizes, side, condition=len(empty), features=empty.shape[1], captions=captions
            )
            names["caption_in.weight"], names["caption_out.weight"] = first, second
    codes = names["embedding.weight"]
    rows = codes.new_zeros(model.vocabulary - model.codes, codes.shape[1])
    if table is not None:
        rows[: len(table)] = table
    names["embedding.weight"] = torch.cat((codes, rows))
    model = fit(model, names)
    for layer in model.layers:
        # the checkpoint's own tensor stays as it is
        layer.qkv.weight = nn.Parameter(by_halves(layer.qkv.weight, sizes), requires_grad=False)
    if empty is not None:
        with torch.no_grad():
            model.embedding.weight[model.codes :][: len(empty)] = model._project(
                empty.to(model.caption_in.weight)
            )
    return model
