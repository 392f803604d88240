"""The Llama over a static cache: against transformers, and from MineWorld's and Cosmos' names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdvg.models.tokens import (
    COSMOS,
    MINEWORLD,
    LlamaSizes,
    TokenLlama,
    angles,
    from_transformers,
    load_checkpoint,
)
from sdvg_kernels import diagonal_schedule

SIZES = LlamaSizes(2, 48, 6, 2, 12, 40, 23)
GRID = diagonal_schedule(1, 1, 1, 1, prefix=1000).grid


def run(model: TokenLlama, ids: Tensor, given: int, width: int) -> Tensor:
    """Return logits of `ids [B, L]` from `given` on: these prefilled, then `width` a pass."""
    cache = model.new_cache(len(ids), ids.shape[1])
    model.prefill(ids[:, :given], cache)
    out = []
    for start in range(given, ids.shape[1], width):
        slots = torch.arange(start, min(start + width, ids.shape[1]), dtype=torch.int32)
        slots = slots.expand(len(ids), -1)
        out.append(
            model(ids[:, start : start + width], slots, torch.zeros_like(slots), GRID, cache)
        )
    return torch.cat(out, 1)


@pytest.mark.parametrize("width", [1, 3, 20])
def test_any_width_of_a_pass_gives_transformers_logits(width: int) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=48, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=12, rope_theta=500.0,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    model = from_transformers(theirs)
    ids = torch.randint(23, (2, 20))
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(run(model, ids, 0, width), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(run(model, ids, 7, width), expected[:, 7:], atol=1e-6, rtol=1e-6)


def test_padding_changes_nothing() -> None:
    torch.manual_seed(1)
    model = TokenLlama(SIZES).double().eval()
    ids = torch.randint(23, (1, 9))
    cache = model.new_cache(1, 9)
    model.prefill(ids[:, :6], cache)
    padded = torch.tensor([[6, 7, -1, 8, -1]], dtype=torch.int32)
    fed = torch.cat((ids[:, 6:8], ids[:, :1], ids[:, 8:], ids[:, :1]), 1)
    out = model(fed, padded, torch.zeros_like(padded), GRID, cache)[:, [0, 1, 3]]
    torch.testing.assert_close(out, run(model, ids, 6, 3))


def _random(sizes: LlamaSizes, names: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    torch.manual_seed(2)
    state = {}
    for i in range(sizes.layers):
        for name, shape in names.items():
            state[name.replace("*", str(i))] = torch.randn(shape)
    return state


HEADS, KV = 6 * 12, 2 * 12
COSMOS_NAMES = {
    "model.tok_embeddings.weight": (23, 48),
    "model.norm.weight": (48,),
    "model.output.weight": (23, 48),
    "model.layers.*.attention.wq.weight": (HEADS, 48),
    "model.layers.*.attention.wk.weight": (KV, 48),
    "model.layers.*.attention.wv.weight": (KV, 48),
    "model.layers.*.attention.wo.weight": (48, HEADS),
    "model.layers.*.attention.q_norm.weight": (12,),
    "model.layers.*.attention.k_norm.weight": (12,),
    "model.layers.*.attention_norm.weight": (48,),
    "model.layers.*.ffn_norm.weight": (48,),
    "model.layers.*.feed_forward.w1.weight": (40, 48),
    "model.layers.*.feed_forward.w2.weight": (48, 40),
    "model.layers.*.feed_forward.w3.weight": (40, 48),
}


def test_cosmos_names_are_read_with_norms_of_query_and_key() -> None:
    state = _random(SIZES, COSMOS_NAMES)
    state["model.rope.freqs"] = torch.zeros(3)
    model = load_checkpoint(state, SIZES)
    assert model.sizes.qk_norm
    layer, name = model.layers[1], "model.layers.1."
    wanted = torch.cat([state[f"{name}attention.w{part}.weight"] for part in "qkv"])
    assert torch.equal(layer.qkv.weight, wanted)
    wanted = torch.cat([state[f"{name}feed_forward.w{part}.weight"] for part in "13"])
    assert torch.equal(layer.gate_up.weight, wanted)
    assert torch.equal(layer.down.weight, state[f"{name}feed_forward.w2.weight"])
    assert torch.equal(layer.k_norm, state[f"{name}attention.k_norm.weight"])
    assert torch.equal(model.embedding.weight, state["model.tok_embeddings.weight"])


def test_mineworld_names_are_transformers_behind_a_prefix() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=48, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    state = {f"transformer.{name}": value for name, value in theirs.state_dict().items()}
    state["transformer.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    state["tokenizer.encoder.weight"] = torch.zeros(1)
    sizes = LlamaSizes(2, 48, 4, 2, 12, 40, 23)
    model = load_checkpoint(state, sizes)
    ids = torch.randint(23, (1, 8))
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(run(model, ids, 2, 6), expected[:, 2:], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model.norm.weight": None}, "the checkpoint must have norm, got otherwise"),
        (
            {"model.layers.0.cross_attention.wq.weight": torch.zeros(2)},
            "the checkpoint must have no layers.0.cross_attention.wq.weight, got otherwise",
        ),
        ({"model.norm.weight": torch.zeros(3)}, r"norm must be \[48\], got \[3\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_sentence(
    change: dict[str, Tensor | None], text: str
) -> None:
    state = {**_random(SIZES, COSMOS_NAMES), **change}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(ValueError, match=f"tokens: {text}"):
        load_checkpoint(state, SIZES)


def test_three_axes_turn_by_frame_row_and_column() -> None:
    # 12 dims: 2 pairs by frame, 2 by row, 2 by column
    sizes = LlamaSizes(1, 8, 1, 1, 12, 8, 9, theta=100.0, grid=(2, 3, 4))
    cos, sin = angles(sizes, 24)
    assert cos.shape == sin.shape == (24, 1, 12)
    for slot in range(24):
        frame, row, column = slot // 12, slot // 4 % 3, slot % 4
        pairs = [place * 100.0**-power for place in (frame, row, column) for power in (0, 0.5)]
        expected = torch.tensor(pairs * 2)
        torch.testing.assert_close(cos[slot, 0], expected.cos())
        torch.testing.assert_close(sin[slot, 0], expected.sin())
    with pytest.raises(ValueError, match="slots must be at most 24, the positions of a grid"):
        TokenLlama(sizes).new_cache(1, 25)


def test_released_sizes_have_the_published_number_of_parameters() -> None:
    for sizes, billions in (
        (MINEWORLD["300M"], (0.3, 0.35)),
        (MINEWORLD["700M"], (0.68, 0.77)),
        (MINEWORLD["1200M"], (1.15, 1.3)),
        (COSMOS["4B"], (3.9, 4.2)),
        (COSMOS["12B"], (11.0, 12.6)),
    ):
        with torch.device("meta"):
            model = TokenLlama(sizes)
        count = sum(weight.numel() for weight in model.parameters()) / 1e9
        assert billions[0] < count < billions[1]


def test_the_embedded_model_in_raster_order_is_the_stock_model_greedily() -> None:
    pytest.importorskip("diffusers", reason="the tokenizer is a diffusers class")
    pytest.importorskip("transformers", reason="the model is a transformers class")
    from sdvg.models.embedded import tokens as embedded
    from sdvg.tokens import Sampling
    from sdvg.tokens.embedded import EmbeddedVideos

    models = embedded.load()
    prompts = ["a seven moving left, slowly"]
    videos = EmbeddedVideos(models, mode="raster", sampling=Sampling(temperature=0))
    (shown,) = videos.generate(prompts, frames=1)
    (frame,) = videos.decoder.generate(models.prompts(prompts), frames=1)
    codes = frame.codes[:, None]
    # each token is the likeliest after those before it: one forward says so of all
    ids = torch.cat((models.prompts(prompts), codes.flatten(1)), 1)
    with torch.no_grad():
        logits = models.model(ids[:, :-1]).logits
    likeliest = logits[:, embedded.PROMPT - 1 :, : models.codes].argmax(-1)
    assert torch.equal(codes.flatten(1), likeliest)
    assert torch.equal(shown.frames[:, None], models.decode(codes))
    with pytest.raises(ValueError, match=r"actions must lie in \[0, 17\), got 17 to 17"):
        videos.generate(prompts, frames=2, actions=torch.full((1, 1), 17))
