"""The embedded models' text encoder: a tiny UMT5 behind a tokenizer of words and letters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

LENGTH = 24  # tokens, fixed; longer prompts are cut


class TextEncoder:
    """Prompts -> embeddings ``[B, 24, dim]``, zero past each prompt's length, as Wan pads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        ids, mask = tokens(self.tokenizer, prompts)
        device = self.encoder.get_input_embeddings().weight.device
        ids, mask = ids.to(device), mask.to(device)
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden * mask[..., None]


def tokens(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both int64 ``[B, 24]``."""
    batch = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    return batch["input_ids"], batch["attention_mask"]
