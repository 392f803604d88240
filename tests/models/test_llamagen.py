"""LlamaGen's layout: its checkpoint names, its rotation in two axes, its conditions and guidance.

The definition stands here in float64, over the checkpoint's own tensors and without a cache.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdvg.models.llamagen import LLAMAGEN, LlamaGen, load_llamagen
from sdvg.models.tokens import LlamaSizes
from sdvg.tokens import DiagonalDecoder, Layout, Sampling

# 12 dims a head: 3 pairs by row, 3 by column; keys are shared
SIZES = LlamaSizes(2, 48, 4, 2, 12, 40, 30, 1e-5)
SIDE, CLASSES, CONDITION, FEATURES = 4, 6, 5, 20
State = dict[str, Tensor]


def checkpoint(kind: str, sizes: LlamaSizes = SIZES) -> State:
    """Return random weights by the released names, large enough that every token matters."""
    torch.manual_seed(4)
    width, dim = sizes.width, sizes.head_dim

    def normal(*shape: int) -> Tensor:
        return 2 * torch.randn(shape, dtype=torch.float64) * shape[-1] ** -0.5

    state = {
        "tok_embeddings.weight": normal(sizes.vocabulary, width),
        "norm.weight": 1 + normal(width) / 4,
        "output.weight": normal(sizes.vocabulary, width),
    }
    for i in range(sizes.layers):
        shapes = {
            "attention.wqkv": ((sizes.heads + 2 * sizes.kv_heads) * dim, width),
            "attention.wo": (width, sizes.heads * dim),
            "feed_forward.w1": (sizes.hidden, width),
            "feed_forward.w2": (width, sizes.hidden),
            "feed_forward.w3": (sizes.hidden, width),
            "attention_norm": (width,),
            "ffn_norm": (width,),
        }
        for name, shape in shapes.items():
            state[f"layers.{i}.{name}.weight"] = normal(*shape) + (len(shape) == 1)
    if kind == "class":
        state["cls_embedding.embedding_table.weight"] = normal(CLASSES + 1, width)
    else:
        state["cls_embedding.cap_proj.fc1.weight"] = normal(width, FEATURES)
        state["cls_embedding.cap_proj.fc2.weight"] = normal(width, width)
        state["cls_embedding.uncond_embedding"] = normal(CONDITION, FEATURES)
    return state


def turn(x: Tensor, condition: int) -> Tensor:
    """Return x [B, T, H, D] with pair i, at 2 i and 2 i + 1, turned by row or column.

    What conditions becomes 0.
    """
    out, quarter = torch.zeros_like(x), x.shape[-1] // 4
    for slot in range(condition, x.shape[1]):
        row, column = divmod(slot - condition, SIDE)
        for i in range(2 * quarter):
            place = row if i < quarter else column
            angle = torch.tensor(
                place * 1e4 ** -(i % quarter / quarter), dtype=torch.float64, device=x.device
            )
            a, b = x[:, slot, :, 2 * i], x[:, slot, :, 2 * i + 1]
            out[:, slot, :, 2 * i] = a * angle.cos() - b * angle.sin()
            out[:, slot, :, 2 * i + 1] = b * angle.cos() + a * angle.sin()
    return out


def logits(state: State, lead: Tensor, ids: Tensor, seen: Tensor) -> Tensor:
    """Return what follows `ids [B, L]` behind embeddings [B, C, width] of which some are `seen`."""
    condition = lead.shape[1]
    x = torch.cat((lead, state["tok_embeddings.weight"][ids]), 1)
    size = x.shape[1]
    mask = torch.ones(size, size, dtype=torch.bool).tril().repeat(len(x), 1, 1)
    mask[:, :, :condition] &= seen[:, None].bool()
    mask |= torch.eye(size, dtype=torch.bool)
    for i in range(SIZES.layers):
        part = {
            name.removeprefix(f"layers.{i}."): value
            for name, value in state.items()
            if name.startswith(f"layers.{i}.")
        }
        normed = F.rms_norm(x, x.shape[-1:], part["attention_norm.weight"], 1e-5)
        heads = (normed @ part["attention.wqkv.weight"].T).unflatten(-1, (-1, SIZES.head_dim))
        query, key, value = heads.split((SIZES.heads, SIZES.kv_heads, SIZES.kv_heads), 2)
        query, key = turn(query, condition), turn(key, condition)
        out = F.scaled_dot_product_attention(
            *(each.transpose(1, 2) for each in (query, key, value)),
            attn_mask=mask[:, None],
            enable_gqa=True,
        )
        x = x + out.transpose(1, 2).flatten(2) @ part["attention.wo.weight"].T
        normed = F.rms_norm(x, x.shape[-1:], part["ffn_norm.weight"], 1e-5)
        gate = F.silu(normed @ part["feed_forward.w1.weight"].T)
        up = normed @ part["feed_forward.w3.weight"].T
        x = x + (gate * up) @ part["feed_forward.w2.weight"].T
    x = F.rms_norm(x[:, -1], x.shape[-1:], state["norm.weight"], 1e-5)
    return x @ state["output.weight"].T


def greedy(state: State, lead: Tensor, empty: Tensor, seen: Tensor, guidance: float) -> Tensor:
    """Return the likeliest tokens [B, side, side] in raster order, guided, a forward for each."""
    ids = torch.zeros(len(lead), 0, dtype=torch.int64)
    for _ in range(SIDE**2):
        drawn, plain = (logits(state, each, ids, seen) for each in (lead, empty))
        chosen = plain + guidance * (drawn - plain)
        ids = torch.cat((ids, chosen.argmax(-1, keepdim=True)), 1)
    return ids.unflatten(1, (SIDE, SIDE))


def decode(
    model: LlamaGen, prompts: Tensor, k: int, guidance: float = 1.0, **how: object
) -> Tensor:
    decoder = DiagonalDecoder(
        model, Layout(SIDE, SIDE, model.codes), k=k,
        sampling=Sampling(temperature=0, guidance=guidance), **how,
    )  # fmt: skip
    uncond = model.uncond(prompts) if guidance != 1 else None
    (frame,) = decoder.generate(prompts, frames=1, uncond=uncond)
    return frame.codes


def test_by_class_raster_order_is_the_definition_greedily() -> None:
    state = checkpoint("class")
    model = load_llamagen(state, SIZES, SIDE)
    labels = torch.tensor([4, 1])
    table = state["cls_embedding.embedding_table.weight"]
    lead, empty = table[labels][:, None], table[[CLASSES, CLASSES]][:, None]
    found = decode(model, model.classes(labels), SIDE, 1.8)
    assert torch.equal(found, greedy(state, lead, empty, torch.ones(2, 1), 1.8))
    # both axes, the class and the guidance count
    assert len(found.unique()) > 4
    assert not torch.equal(found, decode(model, model.classes(labels), SIDE))
    assert not torch.equal(found[0], found[1])


def captioned(state: State) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return features and mask, padded at the end, and embeddings as the release orders them."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(2, CONDITION, FEATURES, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def project(x: Tensor) -> Tensor:
        hidden = F.gelu(x @ state["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
        return hidden @ state["cls_embedding.cap_proj.fc2.weight"].T

    moved = torch.stack((features[0].roll(2, 0), features[1]))
    empty = state["cls_embedding.uncond_embedding"].expand(2, -1, -1)
    return features, mask, project(moved), project(empty), mask.flip(1)


@pytest.mark.parametrize("masked", [True, False])
def test_by_caption_raster_order_is_the_definition_greedily(masked: bool) -> None:
    state = checkpoint("caption")
    model = load_llamagen({"model": state}, SIZES, SIDE)
    model.masked = masked
    features, mask, lead, empty, seen = captioned(state)
    found = decode(model, model.captions(features, mask), SIDE, 2.5)
    assert torch.equal(found, greedy(state, lead, empty, seen, 2.5))
    assert len(found.unique()) > 4
    assert not torch.equal(found, decode(model, model.captions(features), SIDE, 2.5))
    # padding may lie at either end, and what it holds is seen by nobody
    features = torch.stack((features[0].roll(2, 0), features[1]))
    features[0, :2] = 1e3
    assert torch.equal(decode(model, model.captions(features, mask.flip(1)), SIDE, 2.5), found)


@pytest.mark.parametrize("published", [False, True])
def test_our_attention_gives_what_a_mask_gives(published: bool) -> None:
    state = checkpoint("caption")
    found = []
    for masked in (True, False):
        model = load_llamagen(state, SIZES, SIDE)
        model.masked = masked
        prompts = model.captions(*captioned(state)[:2])
        found.append(decode(model, prompts, 2, 2.5, published=published))
    assert torch.equal(*found)


def test_a_caption_is_the_same_alone_and_in_a_batch() -> None:
    state = checkpoint("caption")
    model = load_llamagen(state, SIZES, SIDE)
    features, mask, *_ = captioned(state)
    both = decode(model, model.captions(features, mask), 2, 2.5)
    for row in range(2):
        part = slice(row, row + 1)
        alone = decode(model, model.captions(features[part], mask[part]), 2, 2.5)
        assert torch.equal(both[part], alone)


def test_the_newest_captions_are_held() -> None:
    state = checkpoint("caption")
    model = load_llamagen(state, SIZES, SIDE, captions=3)
    features, mask, *_ = captioned(state)
    first = model.captions(features, mask)
    expected = model.embedding(first)
    second = model.captions(features[1:])
    assert not torch.isin(second, first).any()
    assert torch.equal(model.embedding(first), expected)
    # a fourth takes the place of the first
    third = model.captions(-features[:1])
    assert torch.equal(third[0, 2:], first[0, 2:])
    assert not torch.equal(model.embedding(first), expected)


def test_a_quarter_of_a_head_turns_by_row_and_a_quarter_by_column() -> None:
    model = load_llamagen(checkpoint("class"), SIZES, SIDE)
    cos, sin = model.angles(1 + SIDE**2)
    assert cos.shape == sin.shape == (1 + SIDE**2, 1, 12)
    assert not torch.cat((cos[0], sin[0])).any()
    for slot in range(1, 1 + SIDE**2):
        row, column = divmod(slot - 1, SIDE)
        pairs = [place * 1e4 ** -(i / 3) for place in (row, column) for i in range(3)]
        angles = torch.tensor(pairs * 2, dtype=torch.float64)
        torch.testing.assert_close(cos[slot, 0].double(), angles.cos(), atol=1e-6, rtol=0)
        torch.testing.assert_close(sin[slot, 0].double(), angles.sin(), atol=1e-6, rtol=0)


def test_released_sizes_have_the_published_number_of_parameters() -> None:
    millions = {
        "B": (105, 117), "L": (330, 350), "XL": (760, 790), "XXL": (1350, 1450),
        "XXXL": (3800, 4000), "1B": (1100, 1300), "3B": (3000, 3150), "7B": (6500, 6700),
    }  # fmt: skip
    for name, (low, high) in millions.items():
        with torch.device("meta"):
            model = LlamaGen(LLAMAGEN[name], 16, classes=1000)
        assert low < sum(weight.numel() for weight in model.parameters()) / 1e6 < high, name
        assert model.sizes.head_dim in (64, 100, 128) or name == "1B"


def _without(kind: str, *names: str, **more: Tensor) -> State:
    state = {**checkpoint(kind), **{name.replace("__", "."): part for name, part in more.items()}}
    return {name: part for name, part in state.items() if name not in names}


CLASS = "cls_embedding.embedding_table.weight"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: load_llamagen(_without("class", CLASS), SIZES, SIDE),
            "llamagen: the checkpoint must have tok_embeddings, and cls_embedding of classes or of",
        ),
        (
            lambda: load_llamagen(_without("class", "norm.weight"), SIZES, SIDE),
            "tokens: the checkpoint must have norm, got otherwise",
        ),
        (
            lambda: load_llamagen(_without("class", extra__weight=torch.zeros(1)), SIZES, SIDE),
            "tokens: the checkpoint must have no extra.weight, got otherwise",
        ),
        (
            lambda: load_llamagen(checkpoint("class"), LLAMAGEN["B"], SIDE),
            "tokens: the checkpoint must have layers.",
        ),
        (
            lambda: _by_class().classes(torch.tensor([0, 6])),
            r"llamagen: labels must be \[B\] in \[0, 6\), got \[0, 6\]",
        ),
        (
            lambda: _by_class().captions(torch.zeros(1, 5, 20)),
            "llamagen: features must be classes for this model, got captions",
        ),
        (
            lambda: _by_caption().classes(torch.tensor([0])),
            "llamagen: labels must be captions for this model, got classes",
        ),
        (
            lambda: _by_caption().captions(torch.zeros(1, 4, 20)),
            r"llamagen: features must be \[B, 5, 20\], got \[1, 4, 20\]",
        ),
        (
            lambda: _by_caption().captions(torch.zeros(1, 5, 20), torch.zeros(1, 4)),
            r"llamagen: mask must be \[1, 5\], got \[1, 4\]",
        ),
        (
            lambda: _by_caption().captions(torch.zeros(1, 5, 20), torch.zeros(1, 5)),
            "llamagen: mask must keep a token of each caption, got none kept",
        ),
        (
            lambda: _by_caption().captions(torch.zeros(3, 5, 20)),
            "llamagen: features must be of at most 2 captions, got 3; load the model with captions",
        ),
        (
            lambda: _grid(_by_class(), 2, 8),
            "llamagen: the grid must be 4 x 4 tokens behind 1, got 2 x 8 behind 1$",
        ),
        (
            lambda: _grid(_by_class(), 3, 4, eol=3),
            "llamagen: the grid must be 4 x 4 tokens behind 1, got 3 x 4 behind 1 with ends of",
        ),
        (
            lambda: _grid(_by_class(), 5, 4),
            "llamagen: slots must be at most 17, a condition of 1 and 4 x 4 tokens, got 21",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}") as caught:
        call()
    assert "\n" not in str(caught.value)


def _by_class() -> LlamaGen:
    return load_llamagen(checkpoint("class"), SIZES, SIDE)


def _by_caption() -> LlamaGen:
    return load_llamagen(checkpoint("caption"), SIZES, SIDE, captions=2)


def _grid(model: LlamaGen, height: int, width: int, eol: int | None = None) -> None:
    layout = Layout(height, width, model.codes, eol=eol)
    decoder = DiagonalDecoder(model, layout, k=2, sampling=Sampling(temperature=0))
    next(decoder.generate(model.classes(torch.tensor([1])), frames=1))


@pytest.mark.parametrize("kind", ["class", "caption"])
def test_lanterns_target_is_the_released_one(kind: str) -> None:
    # jadohu/LlamaGen-T2I: LlamaGen's weights by transformers' names, their pairs side by side
    state = checkpoint(kind)
    names = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
    }
    parts = {
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    rows = [heads * SIZES.head_dim for heads in (SIZES.heads, SIZES.kv_heads, SIZES.kv_heads)]
    theirs = {}
    for name, tensor in state.items():
        layer = ".".join(name.split(".")[:2])
        if name.endswith("attention.wqkv.weight"):
            for part, rows_of in zip("qkv", tensor.split(rows), strict=True):
                theirs[f"model.{layer}.self_attn.{part}_proj.weight"] = rows_of
        else:
            for own, other in parts.items():
                name = name.replace(own, other) if name.startswith("layers.") else name
            theirs[names.get(name, f"model.{name}")] = tensor
    expected = load_llamagen(state, SIZES, SIDE).state_dict()
    found = load_llamagen(theirs, SIZES, SIDE).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.gpu
def test_a_gpu_gives_the_tokens_of_the_cpu() -> None:
    # a head dim that the kernel has
    sizes = LlamaSizes(2, 128, 2, 2, 64, 96, 30, 1e-5)
    state = checkpoint("caption", sizes)
    features, mask, *_ = captioned(state)
    found = []
    for device in ("cpu", "cuda"):
        model = load_llamagen(state, sizes, SIDE).float().to(device)
        for k in (4, 2):
            decoder = DiagonalDecoder(
                model, Layout(SIDE, SIDE, model.codes), k=k,
                sampling=Sampling(temperature=0, guidance=2.5),
            )  # fmt: skip
            # the second time by graphs that are there, which read rows that are new
            for order in (slice(None), [1, 0]):
                prompts = model.captions(features[order].to(device), mask[order].to(device))
                (frame,) = decoder.generate(prompts, frames=1, uncond=model.uncond(prompts))
                found.append(frame.codes[order].cpu())
    for i, codes in enumerate(found):
        # the order of a batch changes nothing, and the GPU gives what the CPU gave
        assert torch.equal(codes, found[i // 2 % 2 * 2])
