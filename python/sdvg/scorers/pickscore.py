"""PickScore on tensors: CLIP fine-tuned on people's choices, by transformers' own classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvg.scorers.images import images_of


class PickScore(nn.Module):
    """A `Scorer` (see `sdvg.types`): CLIP's scaled similarity of each frame and its prompt.

    ``score(frames [B, N, 3, H, W] in [0, 1], prompts) -> [B, N]`` float32, in the published unit
    (about 20, with differences of tenths): thresholds of other scorers do not carry over.

    Args:
        folder: a `CLIPModel` and its tokenizer (`yuvalkirstain/PickScore_v1` downloaded, say).
        dtype, device: of the model.

    Source: Pick-a-Pic (Kirstain et al. 2023).
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float16,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        try:
            from transformers import AutoTokenizer, CLIPModel
        except ImportError as error:
            raise ImportError(
                "pickscore: the model needs transformers: pip install 'sdvg[diffusers]'"
            ) from error
        self.clip = CLIPModel.from_pretrained(folder, dtype=dtype).to(device)
        self.eval().requires_grad_(False)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        # (prompts, device) and their features
        self._text: tuple[object, Tensor | None] = (None, None)

    @torch.no_grad()
    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the score of each frame; ValueError for shapes that do not fit each other."""
        clip, weight = self.clip, self.clip.visual_projection.weight
        size = clip.config.vision_config.image_size
        images = images_of("pickscore", frames, prompts, size, weight.device, weight.dtype)
        features = clip.visual_projection(clip.vision_model(pixel_values=images).pooler_output)
        features = F.normalize(features.float(), dim=-1).unflatten(0, frames.shape[:2])
        # [B, N, D] @ [B, D, 1]
        return clip.logit_scale.float().exp() * (features @ self._encode(prompts)).squeeze(-1)

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        """Return the prompts' unit features `[B, D, 1]`."""
        clip, device = self.clip, self.clip.text_projection.weight.device
        key = (tuple(prompts), device)
        if self._text[0] != key:
            batch = self._tokenizer(
                list(prompts), padding="max_length", truncation=True, return_tensors="pt",
                max_length=clip.config.text_config.max_position_embeddings,
            ).to(device)  # fmt: skip
            states = clip.text_model(batch["input_ids"], batch["attention_mask"]).pooler_output
            features = F.normalize(clip.text_projection(states).float(), dim=-1)
            self._text = (key, features[..., None])
        return self._text[1]
