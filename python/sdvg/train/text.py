"""Stage ``text``: a tokenizer and a tiny UMT5 that reads digit, direction and speed."""

from __future__ import annotations

import string
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sdvg.models.embedded.prompts import DIRECTIONS, SPEEDS, Request
from sdvg.models.embedded.text import TextEncoder, tokens
from sdvg.train.data import sample_request, write_prompt
from sdvg.train.loop import fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DIM = 128


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the prompt language, and single characters for everything else."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    count: dict[str, int] = {}
    for i in range(6000):
        request = sample_request(rng, i % 10, i % 8, i % 2)
        for word in write_prompt(request, rng).lower().replace("-", " ").split():
            word = word.strip(string.punctuation)
            count[word] = count.get(word, 0) + 1
    # rare words are typing errors: those are spelt
    words = sorted(w for w, n in count.items() if n > 12 and len(w) > 1)
    letters = list(string.ascii_lowercase + string.digits + string.punctuation)
    vocabulary = ["<pad>", "</s>", "<unk>", *letters, *("##" + c for c in letters), *words]
    model = models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


class Reader(nn.Module):
    """The encoder with heads for digit (10: unsaid), direction (8: unsaid), speed (2: unsaid)."""

    def __init__(self, vocabulary: int) -> None:
        from transformers import UMT5Config, UMT5EncoderModel

        super().__init__()
        config = UMT5Config(
            vocab_size=vocabulary, d_model=DIM, d_kv=32, d_ff=256, num_layers=3, num_heads=4,
            dropout_rate=0.0, pad_token_id=0, eos_token_id=1, tie_word_embeddings=False,
        )  # fmt: skip
        self.encoder = UMT5EncoderModel(config)
        self.heads = nn.Linear(DIM, 11 + 9 + 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the logits of digit, direction and speed for tokens ``[n, length]``."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.heads(pooled).split((11, 9, 3), -1)


def targets(requests: list[Request]) -> tuple[torch.Tensor, ...]:
    """Class indices of digit, direction and speed, the last class of each for unsaid."""
    ways, paces = list(DIRECTIONS), list(SPEEDS)
    return (
        torch.tensor([10 if r.digit is None else r.digit for r in requests]),
        torch.tensor([8 if r.direction is None else ways.index(r.direction) for r in requests]),
        torch.tensor([2 if r.speed is None else paces.index(r.speed) for r in requests]),
    )


def batch(n: int, g: torch.Generator) -> tuple[list[Request], list[str]]:
    """``n`` random requests and a prompt for each."""
    rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=g)))
    draws = rng.integers((10, 8, 2), size=(n, 3))
    requests = [sample_request(rng, *map(int, row)) for row in draws]
    return requests, [write_prompt(r, rng) for r in requests]


def train(runs: Path, *, steps: int, resume: bool, seed: int = 2) -> TextEncoder:
    """The trained, frozen text encoder."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    reader = Reader(len(tokenizer))

    def loss(g: torch.Generator, step: int) -> dict[str, torch.Tensor]:
        requests, prompts = batch(64, g)
        scores = reader(*tokens(tokenizer, prompts))
        parts = [F.cross_entropy(s, t) for s, t in zip(scores, targets(requests), strict=True)]
        hits = [
            (s.argmax(-1) == t).float().mean()
            for s, t in zip(scores, targets(requests), strict=True)
        ]
        return {"loss": sum(parts), "accuracy": torch.stack(hits).mean()}

    reader = fit("text", reader, loss, steps=steps, lr=1e-3, runs=runs, resume=resume, seed=seed)
    return TextEncoder(tokenizer, reader.encoder)
