"""ImageReward on tensors: frames and prompts to rewards in one batched call on the device.

A BLIP model: a vision transformer sees the frame, BERT reads the prompt and looks at the frame in
each layer, a linear head makes its first token a number. Modules carry the official file's names.

Source: ImageReward (Xu et al. 2023), https://github.com/THUDM/ImageReward; BLIP (Li et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvg.models.checkpoints import read_tensors, require_same
from sdvg.scorers.images import images_of

# of the rewards on the published training data
MEAN, STD = 0.16717362830052426, 1.0333394966054072
# a prompt's tokens, [CLS] and [SEP] among them; the rest of it is not read
LENGTH = 35
# channels of an attention head, in both transformers
_HEAD_DIM = 64
# trained with, and not used for rewards
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
# the linear layers among the head's dropouts
_HEAD = (0, 2, 4, 6, 7)
_OP = "imagereward"


class ImageReward(nn.Module):
    """A `Scorer` (see `sdvg.types`): how much people would prefer each frame for its prompt.

    ``reward(frames [B, N, 3, H, W] in [0, 1], prompts) -> [B, N]`` float32, standardised as
    published (mean 0, deviation 1 over its training data); the paper's thresholds are in this unit.
    The frames' short side becomes 224 pixels and the middle is looked at. No host synchronisation
    but for prompts that differ from the call's before, which are tokenized.

    Args:
        path: the official `ImageReward.pt`, read as data only, or the same tensors in a
            `.safetensors` file; every size is read off them.
        vocabulary: `vocab.txt` of bert-base-uncased, or a folder that holds it.
        dtype: float16, bfloat16 or float32, of all but the head, which stays in float32.
        device: where it lies.

    Raises:
        ImportError: transformers is missing, whose tokenizer is used.
        ValueError: a file or a vocabulary that does not fit, in one sentence.

    Cost: about 0.14 TFLOP a frame, 0.12 of them in the vision transformer.
    """

    def __init__(
        self,
        path: str | Path,
        vocabulary: str | Path,
        *,
        dtype: torch.dtype = torch.float16,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        path = Path(path)
        found = read_tensors(path, _OP)
        found = {name: value for name, value in found.items() if not name.startswith(_UNUSED)}
        shapes = {name: list(value.shape) for name, value in found.items()}
        try:
            with torch.device("meta"):
                parts = {"visual_encoder": _Vision(shapes), "text_encoder": _Text(shapes)}
                self.blip = nn.ModuleDict(parts)
                self.mlp = _Head(shapes)
        except KeyError as error:
            raise ValueError(
                f"{_OP}: {path} must hold ImageReward's {error.args[0]}, "
                f"got {len(shapes)} tensors without it"
            ) from error
        except (ValueError, IndexError) as error:
            raise ValueError(f"{_OP}: {path} must hold ImageReward, got other shapes") from error
        wanted = {name: list(value.shape) for name, value in self.named_parameters()}
        require_same(path, "ImageReward", wanted, shapes, _OP)
        for name in wanted:
            own = torch.float32 if name.startswith("mlp.") else dtype
            placed = torch.empty(wanted[name], dtype=own, device=device).copy_(found[name])
            module, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(module), attribute, nn.Parameter(placed))
        self.eval().requires_grad_(False)
        self._tokenizer = _tokenizer(Path(vocabulary), wanted[_WORDS][0])
        # (prompts, device) and their tokens: a video's prompts seldom change
        self._tokens: tuple[object, tuple[Tensor, Tensor]] = (None, ())

    @torch.no_grad()
    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the reward of each frame; ValueError for shapes that do not fit each other."""
        vision, text = self.blip["visual_encoder"], self.blip["text_encoder"]
        weight = vision.cls_token
        images = images_of(_OP, frames, prompts, vision.size, weight.device, weight.dtype)
        if not len(images):
            return torch.zeros(frames.shape[:2], device=weight.device)
        ids, mask = (part.repeat_interleave(frames.shape[1], 0) for part in self._encode(prompts))
        reward = self.mlp(text(ids, mask, vision(images))[:, 0].float())
        return ((reward - MEAN) / STD).view(frames.shape[:2])

    def _encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids `[B, 35]` and which of them are tokens `[B, 35]`, on the device."""
        device = self.mlp.layers["0"].weight.device
        key = (tuple(prompts), device)
        if self._tokens[0] != key:
            self._tokens = (key, _tokens(self._tokenizer, prompts, device))
        return self._tokens[1]


_WORDS = "blip.text_encoder.embeddings.word_embeddings.weight"


def _tokens(
    tokenizer: Callable, prompts: Sequence[str], device: torch.device
) -> tuple[Tensor, Tensor]:
    batch = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    return batch["input_ids"].to(device), batch["attention_mask"].to(device).bool()


def _tokenizer(path: Path, words: int) -> Callable:
    """Return BERT's tokenizer with BLIP's two tokens at the end of the vocabulary."""
    try:
        from transformers import BertTokenizer
    except ImportError as error:
        raise ImportError(
            f"{_OP}: prompts need transformers' tokenizer: pip install 'sdvg[diffusers]'"
        ) from error
    path = path / "vocab.txt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{_OP}: vocabulary must be a vocab.txt of BERT's, got {path}, which is missing"
        )
    tokenizer = BertTokenizer(vocab=str(path), bos_token="[DEC]", extra_special_tokens=["[ENC]"])
    if len(tokenizer) != words:
        raise ValueError(
            f"{_OP}: vocabulary must hold {words - 2} words as the weights do, "
            f"got {len(tokenizer) - 2} in {path}"
        )
    return tokenizer


def _layers(shapes: Mapping[str, list[int]], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def _require_heads(width: int) -> None:
    if width % _HEAD_DIM:
        raise ValueError(f"{_OP}: width must be whole heads of {_HEAD_DIM} channels, got {width}")


class _Head(nn.Module):
    """Linear layers from BERT's width to a number, with nothing in between."""

    def __init__(self, shapes: Mapping[str, list[int]]) -> None:
        super().__init__()
        layers = {}
        for place in _HEAD:
            out, width = shapes[f"mlp.layers.{place}.weight"]
            layers[str(place)] = nn.Linear(width, out)
        self.layers = nn.ModuleDict(layers)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers.values():
            hidden = layer(hidden)
        return hidden


class _Vision(nn.Module):
    """A vision transformer: images `[b, 3, size, size]` to tokens `[b, 1 + patches, width]`."""

    def __init__(self, shapes: Mapping[str, list[int]]) -> None:
        super().__init__()
        prefix = "blip.visual_encoder."
        _, tokens, width = shapes[prefix + "pos_embed"]
        _require_heads(width)
        patch = shapes[prefix + "patch_embed.proj.weight"][-1]
        inner = shapes[prefix + "blocks.0.mlp.fc1.weight"][0]
        self.size = patch * round((tokens - 1) ** 0.5)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        depth = _layers(shapes, prefix + "blocks.")
        self.blocks = nn.ModuleList(_VisionBlock(width, inner) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images).flatten(2).mT
        hidden = torch.cat((self.cls_token.expand(len(images), -1, -1), patches), dim=1)
        hidden = hidden + self.pos_embed
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)


class _VisionBlock(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.attn["qkv"](self.norm1(hidden)).chunk(3, dim=-1)
        hidden = hidden + self.attn["proj"](_attend(query, key, value))
        return hidden + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(hidden))))


class _Text(nn.Module):
    """BERT that looks at an image in each layer: ids `[b, L]` to states `[b, L, width]`."""

    def __init__(self, shapes: Mapping[str, list[int]]) -> None:
        super().__init__()
        prefix = "blip.text_encoder."
        words, width = shapes[_WORDS]
        _require_heads(width)
        places = shapes[prefix + "embeddings.position_embeddings.weight"][0]
        inner = shapes[prefix + "encoder.layer.0.intermediate.dense.weight"][0]
        context = shapes[prefix + "encoder.layer.0.crossattention.self.key.weight"][1]
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(words, width),
                "position_embeddings": nn.Embedding(places, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        layers = (
            _TextLayer(width, context, inner)
            for _ in range(_layers(shapes, prefix + "encoder.layer."))
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        words, places = self.embeddings["word_embeddings"], self.embeddings["position_embeddings"]
        hidden = words(ids) + places.weight[: ids.shape[1]]
        hidden = self.embeddings["LayerNorm"](hidden)
        for layer in self.encoder["layer"]:
            hidden = layer(hidden, mask[:, None, None], image)
        return hidden


class _TextLayer(nn.Module):
    def __init__(self, width: int, context: int, inner: int) -> None:
        super().__init__()
        self.attention = _TextAttention(width, width)
        self.crossattention = _TextAttention(width, context)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = _Output(inner, width)

    def forward(self, hidden: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        hidden = self.attention(hidden, hidden, mask)
        hidden = self.crossattention(hidden, image, None)
        return self.output(F.gelu(self.intermediate["dense"](hidden)), hidden)


class _TextAttention(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        # the file's own name
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(context, width),
                "value": nn.Linear(context, width),
            }
        )
        self.output = _Output(width, width)

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        key, value = self.self["key"](context), self.self["value"](context)
        return self.output(_attend(self.self["query"](hidden), key, value, mask), hidden)


class _Output(nn.Module):
    """Project, add, normalise."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, inner: Tensor, hidden: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(inner) + hidden)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return attention over `[b, L, H * 64]`; `mask` `[b, 1, 1, L]` says which keys there are."""
    heads = (part.unflatten(-1, (-1, _HEAD_DIM)).transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)


def from_package(
    name: str = "ImageReward-v1.0", device: str | torch.device = "cpu"
) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """The `image-reward` package's own model as a `Scorer`, where that package imports.

    It is given tensors, a batch at once; `name` and where it looks for weights are the package's
    business (it downloads). Raises ImportError with its reason where it does not import: the extra
    `sdvg[image-reward]` brings what it needs, in an environment without `sdvg[diffusers]`.
    """
    try:
        import ImageReward as package
    except (ImportError, RuntimeError, AttributeError) as error:
        raise ImportError(
            f"{_OP}: the image-reward package must import, got {type(error).__name__}: {error}; "
            "ImageReward(path, vocabulary) reads its weights without it"
        ) from error
    model = package.load(name, device=str(device))
    device = torch.device(device)

    @torch.no_grad()
    def score(frames: Tensor, prompts: Sequence[str]) -> Tensor:
        images = images_of(_OP, frames, prompts, 224, device, torch.float32)
        ids, mask = (
            part.repeat_interleave(frames.shape[1], 0)
            for part in _tokens(model.blip.tokenizer, prompts, device)
        )
        return model.score_gard(ids, mask.long(), images).float().view(frames.shape[:2])

    return score
