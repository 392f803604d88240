"""Image-token models of transformers in the diagonal loop: Janus, Emu3, Chameleon and its kin.

    tokens = token_model(model)                             # any of the three, as it was loaded
    decoder = DiagonalDecoder(tokens, tokens.layout(), k=2, sampling=Sampling(guidance=5.0))
    prompts = tokens.prompts(**processor(text, generation_mode="image", return_tensors="pt"))
    (frame,) = decoder.generate(prompts, frames=1, uncond=tokens.uncond(prompts))
    pixels = tokens.decode(frame.codes)

The model is called as it is: embeddings, position ids, a cache of ours and either a 4-D mask by
`sdvg_kernels.diagonal_mask` or `sdvg_kernels.diagonal_attention` in place of its attention, which
knows what each token sees without a mask.

The loop's ids are the image's codes, then the model's own vocabulary, then one that pads a prompt:

    [0, codes)    [codes, codes + vocabulary)    codes + vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    ChameleonForConditionalGeneration,
    Emu3ForConditionalGeneration,
    JanusForConditionalGeneration,
    PreTrainedModel,
)

from sdvg.adapters.transformers_cache import TransformersTokens
from sdvg.tokens.diagonal import Layout

__all__ = ["ChameleonTokens", "Emu3Tokens", "JanusTokens", "TransformersTokens", "token_model"]


class JanusTokens(TransformersTokens):
    """Janus and Janus-Pro: image tokens have embeddings and a head of their own; no ends of rows.

    With `sampling=Sampling(temperature=0, guidance=g)` and `k = width`, the loop gives
    `model.generate(generation_mode="image", do_sample=False, guidance_scale=g)`.
    """

    def __init__(
        self, model: JanusForConditionalGeneration, *, eol: int | None, masked: bool | None
    ) -> None:
        codes = model.model.generation_embeddings.num_embeddings
        super().__init__(model, model.model.language_model, codes, eol=eol, masked=masked)

    def layout(self, height: int | None = None, width: int | None = None) -> Layout:
        """Return the layout of the one size that the tokenizer has."""
        own = tuple(self.model.model.vqmodel.quantize.quant_state_dims)
        if (own[0] if height is None else height, own[1] if width is None else width) != own:
            raise ValueError(
                f"token_model: height and width must be {own[0]} and {own[1]}, the grid of "
                f"{self._name}, got {height} and {width}"
            )
        return Layout(*own, self.codes, eol=self.eol)

    def uncond(self, prompts: Tensor) -> Tensor:
        """Return the prompts with all but their begins and padding taken for the padding token."""
        config = self.model.generation_config
        kept = (
            config.bos_token_id,
            (getattr(config, "generation_kwargs", None) or {}).get("boi_token_id"),
        )
        if None in (*kept, config.pad_token_id):
            raise ValueError(
                "token_model: model.generation_config must have bos_token_id, pad_token_id and "
                f"generation_kwargs['boi_token_id'], got {(*kept, config.pad_token_id)}; load it "
                "with from_pretrained, or pass the ids of an empty prompt"
            )
        begins = torch.tensor([*kept], device=prompts.device) + self.codes
        stays = torch.isin(prompts, begins) | (prompts == self.padding)
        return torch.where(stays, prompts, config.pad_token_id + self.codes)

    def sequence(self, codes: Tensor) -> Tensor:
        """Return codes [B, h, w] as `generate` gives them: [B, h w]."""
        return codes.flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Return pixels [B, H, W, 3] of codes [B, h, w], for the processor's `postprocess`."""
        return self.model.decode_image_tokens(self.sequence(codes))

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings [B, T, width] of the loop's ids [B, T]."""
        drawn = self.model.prepare_embeddings_for_image_generation(ids.clamp(max=self.codes - 1))
        own = (ids - self.codes).clamp(0, self._own - 1)
        text = self.decoder.get_input_embeddings()(own)
        return torch.where((ids < self.codes)[..., None], drawn, text)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [B, T, codes] of hidden states [B, T, width]."""
        return self.model.model.generation_head(hidden)


class _SharedTokens(TransformersTokens):
    """Image tokens among the others of the vocabulary: Emu3 and Chameleon."""

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: PreTrainedModel,
        ids: dict[int, int],
        *,
        eol: int | None,
        masked: bool | None,
    ) -> None:
        codes = len(ids)
        if not ids or sorted(ids) != list(range(codes)):
            raise ValueError(
                "token_model: model must have an image vocabulary with a token for each code from "
                f"0, got {codes} in config.vocabulary_map"
            )
        super().__init__(model, decoder, codes, eol=eol, masked=masked)
        named = [ids[code] for code in range(codes)]
        self._ids = torch.tensor(named, device=self.device)
        head = model.get_output_embeddings()
        # only the rows of the codes are read, where they lie together
        together = named == list(range(named[0], named[0] + codes)) and type(head) is nn.Linear
        self._head, self._rows = head, slice(named[0], named[0] + codes) if together else None

    def sequence(self, codes: Tensor) -> Tensor:
        """Return codes [B, h, w] as the model's own ids [B, n], each row with its end."""
        ids = self._ids[codes]
        if self.eol is not None:
            ids = F.pad(ids, (0, 1), value=self.eol - self.codes)
        return ids.flatten(1)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings [B, T, width] of the loop's ids [B, T]."""
        drawn = self._ids[ids.clamp(max=self.codes - 1)]
        own = (ids - self.codes).clamp(0, self._own - 1)
        return self.decoder.get_input_embeddings()(torch.where(ids < self.codes, drawn, own))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [B, T, codes] of hidden states [B, T, width]."""
        if self._rows is None:
            return self._head(hidden)[..., self._ids]
        bias = self._head.bias
        return F.linear(
            hidden, self._head.weight[self._rows], None if bias is None else bias[self._rows]
        )


class Emu3Tokens(_SharedTokens):
    """Emu3: each row, the last one too, ends with a token, so that rows start exactly at any `k`.

    A prompt is what the processor gives with `return_for_image_generation=True`; behind
    `sequence(codes)`, `generate` would go on with the ends of frame, image and text.
    """

    def __init__(
        self, model: Emu3ForConditionalGeneration, *, eol: int | None, masked: bool | None
    ) -> None:
        mapping = model.vocabulary_mapping
        eol = mapping.eol_token_id if eol is None else eol
        if eol is None:
            raise ValueError(
                "token_model: config.vocabulary_map must name '<|extra_200|>', the end of a row, "
                "got no such name; pass eol="
            )
        super().__init__(model, model.model.text_model, mapping.img2bpe, eol=eol, masked=masked)

    def decode(self, codes: Tensor) -> Tensor:
        """Return pixels of codes [B, h, w], for the processor's `postprocess`."""
        # the three tokens that end an image are cut off again
        ids = F.pad(self.sequence(codes), (0, 3))
        return self.model.decode_image_tokens(
            image_tokens=ids, height=codes.shape[1], width=codes.shape[2]
        )


class ChameleonTokens(_SharedTokens):
    """Chameleon, Anole, and Lumina-mGPT in its class: `eol` for those whose rows end with a token.

    The class's own `forward` forbids image tokens; here they are what is drawn, as Anole does.
    """

    def __init__(
        self, model: ChameleonForConditionalGeneration, *, eol: int | None, masked: bool | None
    ) -> None:
        ids = model.model.vocabulary_mapping.img2bpe
        super().__init__(model, model.model, ids, eol=eol, masked=masked)

    def decode(self, codes: Tensor) -> Tensor:
        """Raise: transformers has the encoder of Chameleon's tokenizer alone."""
        raise NotImplementedError(
            "token_model: codes must be decoded by the tokenizer that the model was released with, "
            "got ChameleonForConditionalGeneration, which has no decoder"
        )


def token_model(
    model: PreTrainedModel, *, eol: int | None = None, masked: bool | None = None
) -> TransformersTokens:
    """Return a model of transformers as `DiagonalDecoder` takes it.

    Args:
        model: `JanusForConditionalGeneration`, `Emu3ForConditionalGeneration` or
            `ChameleonForConditionalGeneration`, on one device, in eval mode.
        eol: the model's own id of the token that ends each row; None: as the model says (Emu3 has
            one). With such a token, rows start exactly at any `k`.
        masked: whether passes attend by the model's own attention under a 4-D mask; else by
            `sdvg_kernels.diagonal_attention`. None: by ours on a GPU, for head dims 64, 100 and
            128. The prompt is always written by the model's own.

    Returns: `TransformersTokens`.

    Raises ValueError, in one sentence.
    """
    kinds = {
        JanusForConditionalGeneration: JanusTokens,
        Emu3ForConditionalGeneration: Emu3Tokens,
        ChameleonForConditionalGeneration: ChameleonTokens,
    }
    for kind, made in kinds.items():
        if isinstance(model, kind):
            return made(model, eol=eol, masked=masked)
    names = ", ".join(kind.__name__ for kind in kinds)
    raise ValueError(
        f"token_model: model must have an image vocabulary, as {names} do, got "
        f"{type(model).__name__}"
    )
