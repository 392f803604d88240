"""Janus, Emu3 and Chameleon in the diagonal loop: their own `generate`, and the rule by a mask."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="the models are its classes")

from sdvg.adapters.transformers import TransformersTokens, token_model  # noqa: E402
from sdvg.models.drafter import EagleDrafter  # noqa: E402
from sdvg.models.llama import LlamaSizes  # noqa: E402
from sdvg.tokens import DiagonalDecoder, JacobiDecoder, Layout, Sampling  # noqa: E402
from sdvg.tokens.speculative import Exact, SpeculativeDecoder  # noqa: E402

TEXT = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 96, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
EOL, BOI = 41, 3
GREEDY = Sampling(temperature=0)


def _loud(model: transformers.PreTrainedModel, seed: int = 1) -> transformers.PreTrainedModel:
    """Give weights that make every token matter, in float64."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "vqmodel" not in name:
            weight.data.normal_(0, 2 * weight.shape[-1] ** -0.5, generator=generator)
    return model.double().eval()


def janus(**text: object) -> transformers.PreTrainedModel:
    config = transformers.JanusConfig(
        text_config={"model_type": "llama", "num_key_value_heads": 2, **TEXT, **text},
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4,
            "image_size": 16, "projection_dim": 48, "num_image_tokens": 16, "depth": 1,
        },
        vq_config={
            "embed_dim": 8, "num_embeddings": 24, "latent_channels": 8, "base_channels": 32,
            "channel_multiplier": [1], "num_res_blocks": 1, "projection_dim": text.get(
                "hidden_size", 48
            ), "image_token_embed_dim": text.get("hidden_size", 48),
        },
    )  # fmt: skip
    model = _loud(transformers.JanusForConditionalGeneration(config))
    how = model.generation_config
    how.bos_token_id, how.pad_token_id = 1, 0
    how.generation_kwargs = {"boi_token_id": BOI}
    return model


def emu3(first: int = 44, **text: object) -> transformers.PreTrainedModel:
    names = {f"<|visual token {code:06d}|>": first + code for code in range(16)}
    config = transformers.Emu3Config(
        text_config={"num_key_value_heads": 2, **TEXT, **text},
        vq_config={
            "codebook_size": 16, "base_channels": 32, "channel_multiplier": [1, 1],
            "num_res_blocks": 1, "attn_resolutions": [], "hidden_size": 32,
            "temporal_downsample_factor": 1,
        },
        vocabulary_map={"<image>": 40, "<|extra_200|>": EOL, **names},
    )  # fmt: skip
    return _loud(transformers.Emu3ForConditionalGeneration(config))


def chameleon() -> transformers.PreTrainedModel:
    # ids in another order than the codes
    names = {
        f"IMGIMG{''.join(chr(65 + int(digit)) for digit in str(code))}Z": 20 + code * 7 % 16
        for code in range(16)
    }
    config = transformers.ChameleonConfig(
        **TEXT, num_key_value_heads=4, vocabulary_map={"<image>": 40, **names},
        vq_config={
            "embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "resolution": 16,
            "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1,
        },
    )  # fmt: skip
    model = _loud(transformers.ChameleonForConditionalGeneration(config))
    # the class forbids image tokens, by a list that it makes once: `generate` is to draw them
    mapping = model.model.vocabulary_mapping
    assert len(mapping.img2bpe) == 16
    mapping.__dict__["image_tokens"] = []
    return model


# two prompts, the first of which is shorter
IDS = torch.tensor([[0, 0, 1, 9, 7, BOI], [1, 8, 12, 30, 5, BOI]])
SEEN = (torch.arange(6) >= torch.tensor([[2], [0]])).long()
NEGATIVE = torch.tensor([[1, 11, BOI]] * 2)


def run(
    tokens: TransformersTokens,
    layout: Layout,
    prompts: Tensor,
    *,
    k: int,
    uncond: Tensor | None = None,
    sampling: Sampling = GREEDY,
    **how: object,
) -> Tensor:
    decoder = DiagonalDecoder(tokens, layout, k=k, sampling=sampling, **how)
    (frame,) = decoder.generate(prompts, frames=1, uncond=uncond)
    return frame.codes


@pytest.mark.parametrize("masked", [True, False])
def test_janus_in_raster_order_is_its_own_generate(masked: bool) -> None:
    model = janus()
    tokens = token_model(model, masked=masked)
    prompts = tokens.prompts(input_ids=IDS, attention_mask=SEEN)
    found = run(
        tokens, tokens.layout(), prompts, k=4, uncond=tokens.uncond(prompts),
        sampling=Sampling(temperature=0, guidance=3.0),
    )  # fmt: skip
    expected = model.generate(
        IDS, attention_mask=SEEN, generation_mode="image", do_sample=False, guidance_scale=3.0,
        # transformers 5.17 fails where it makes one itself
        past_key_values=transformers.DynamicCache(),
    )  # fmt: skip
    assert torch.equal(tokens.sequence(found), expected)
    assert len(found.unique()) > 4
    assert torch.equal(tokens.decode(found), model.decode_image_tokens(expected))


def _rows_of(image: list[int], prompt: int, width: int, eol: int | None) -> Callable:
    """Return which tokens transformers' `generate` may take: images', and the end of each row."""

    def allowed(_: int, ids: Tensor) -> list[int]:
        place = len(ids) - prompt
        return [eol] if eol is not None and place % (width + 1) == width else image

    return allowed


@pytest.mark.parametrize("masked", [True, False])
def test_emu3_in_raster_order_is_its_own_generate(masked: bool) -> None:
    model = emu3()
    tokens = token_model(model, masked=masked)
    layout, image = tokens.layout(3, 4), model.vocabulary_mapping.image_tokens
    prompts = tokens.prompts(IDS, SEEN)
    expected = model.generate(
        IDS, attention_mask=SEEN, do_sample=False, max_new_tokens=15, pad_token_id=0,
        prefix_allowed_tokens_fn=_rows_of(image, 6, 4, EOL),
    )[:, 6:]  # fmt: skip
    found = run(tokens, layout, prompts, k=4)
    assert torch.equal(tokens.sequence(found), expected)
    assert len(found.unique()) > 4
    ended = torch.nn.functional.pad(expected, (0, 3))
    pixels = model.decode_image_tokens(image_tokens=ended, height=3, width=4)
    assert torch.equal(tokens.decode(found), pixels)


def test_emu3_with_a_shorter_negative_prompt_is_its_own_two_passes_in_one() -> None:
    model = emu3()
    tokens = token_model(model)
    prompts = tokens.prompts(IDS, SEEN)
    uncond = tokens.prompts(NEGATIVE, length=6)
    found = run(
        tokens, tokens.layout(3, 4), prompts, k=4, uncond=uncond,
        sampling=Sampling(temperature=0, guidance=2.0),
    )  # fmt: skip
    expected = model.generate(
        IDS, attention_mask=SEEN, do_sample=False, max_new_tokens=15, pad_token_id=0,
        negative_prompt_ids=NEGATIVE, negative_prompt_attention_mask=torch.ones_like(NEGATIVE),
        guidance_scale=2.0, prefix_allowed_tokens_fn=_rows_of(
            model.vocabulary_mapping.image_tokens, 6, 4, EOL
        ),
    )[:, 6:]  # fmt: skip
    assert torch.equal(tokens.sequence(found), expected)
    assert not torch.equal(found, run(tokens, tokens.layout(3, 4), prompts, k=4))


@pytest.mark.parametrize("eol", [None, EOL])
def test_chameleon_in_raster_order_is_its_own_generate(eol: int | None) -> None:
    model = chameleon()
    tokens = token_model(model, eol=eol)
    mapping = model.model.vocabulary_mapping
    expected = model.generate(
        IDS, attention_mask=SEEN, do_sample=False, max_new_tokens=12 if eol is None else 15,
        pad_token_id=0, prefix_allowed_tokens_fn=_rows_of([*range(20, 36)], 6, 4, eol),
    )[:, 6:]  # fmt: skip
    found = run(tokens, tokens.layout(3, 4), tokens.prompts(IDS, SEEN), k=4)
    assert torch.equal(tokens.sequence(found), expected)
    known = torch.tensor([mapping.img2bpe[code] for code in range(16)])
    assert torch.equal(known[found.flatten(1)], expected[expected != EOL].view(2, -1))


def by_a_dense_mask(model: transformers.PreTrainedModel, codes: Tensor, k: int) -> Tensor:
    """Return the likeliest token at each place of `codes [1, h, w]`, all in one forward.

    Under a mask by the definition alone: token (r, c) is decoded in pass r k + c and fed in the
    next one; a row's end is fed as the next row begins; what is fed sees what was decoded before.
    """
    tokens = token_model(model, eol=EOL)
    _, height, width = codes.shape
    prompt = IDS[1:]
    ids = torch.cat((prompt, tokens.sequence(codes)), 1)
    decoded = [-1] * prompt.shape[1]
    fed = [0] * prompt.shape[1]
    for row in range(height):
        decoded += [row * k + column for column in range(width)] + [-1]
        fed += [row * k + column + 1 for column in range(width)] + [(row + 1) * k]
    size = ids.shape[1]
    mask = torch.full((1, 1, size, size), torch.finfo(torch.float64).min, dtype=torch.float64)
    for query in range(size):
        for key in range(query + 1):
            if key == query or decoded[key] < fed[query]:
                mask[..., query, key] = 0
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    named = torch.tensor(tokens.sequence(torch.arange(16).view(1, 1, -1))[0, :16].tolist())
    start = prompt.shape[1] - 1
    places = [
        start + row * (width + 1) + column for row in range(height) for column in range(width)
    ]
    return logits[:, places][..., named].argmax(-1).view(1, height, width)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("make", [emu3, chameleon])
def test_rows_with_ends_are_exact_at_any_k(
    make: Callable[[], transformers.PreTrainedModel], masked: bool
) -> None:
    model = make()
    tokens = token_model(model, eol=EOL, masked=masked)
    raster = None
    for k in (5, 3, 2, 1):
        found = run(tokens, tokens.layout(4, 5), tokens.prompts(IDS[1:]), k=k)
        assert torch.equal(by_a_dense_mask(model, found, k), found)
        raster = found if raster is None else raster
    # the order matters to such weights
    assert not torch.equal(found, raster)


@pytest.mark.parametrize("make", [janus, emu3, chameleon])
@pytest.mark.parametrize("published", [False, True])
def test_our_attention_gives_what_the_models_own_gives_under_a_mask(
    make: Callable[[], transformers.PreTrainedModel], published: bool
) -> None:
    model = make()
    found = []
    for masked in (True, False):
        tokens = token_model(model, masked=masked)
        prompts = tokens.prompts(IDS, SEEN)
        found.append(run(tokens, tokens.layout(4, 4), prompts, k=2, published=published))
    assert torch.equal(*found)


def test_speculative_decoding_takes_them_too() -> None:
    tokens = token_model(janus())
    prompts, layout = tokens.prompts(IDS, SEEN), tokens.layout()
    how = {"sampling": Sampling(temperature=0, guidance=3.0)}
    uncond = tokens.uncond(prompts)
    running = JacobiDecoder(tokens, layout, window=6, **how).generate(
        prompts, frames=1, uncond=uncond
    )
    list(running)
    expected = run(tokens, layout, prompts, k=4, uncond=uncond, **how)
    assert torch.equal(running.codes[:, 0], expected)
    assert running.passes < 16


def test_a_padded_prompt_is_decoded_as_alone() -> None:
    tokens = token_model(emu3())
    layout = tokens.layout(3, 4)
    both = run(tokens, layout, tokens.prompts(IDS, SEEN), k=2)
    alone = run(tokens, layout, tokens.prompts(IDS[:1, 2:]), k=2)
    assert torch.equal(both[:1], alone)


def test_eager_attention_takes_the_same_mask() -> None:
    model = emu3()
    tokens = token_model(model)
    prompts, layout = tokens.prompts(IDS, SEEN), tokens.layout(3, 4)
    expected = run(tokens, layout, prompts, k=2)
    model.set_attn_implementation("eager")
    assert torch.equal(run(tokens, layout, prompts, k=2), expected)


def test_the_model_stays_as_it_was() -> None:
    model = janus()
    before = copy.deepcopy(model.state_dict())
    tokens = token_model(model, masked=False)
    run(tokens, tokens.layout(), tokens.prompts(IDS, SEEN), k=2)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    for part in (model, model.model.language_model, model.model.vision_model):
        assert part.config._attn_implementation == "sdpa"


def test_only_the_codes_rows_of_the_head_are_read() -> None:
    model = emu3()
    tokens = token_model(model)
    hidden = torch.randn(1, 2, 48, dtype=torch.float64)
    whole = model.lm_head(hidden)[..., 44:60]
    with torch.no_grad():
        # what is not read may be anything
        model.lm_head.weight[:44] = float("nan")
    torch.testing.assert_close(tokens.logits(hidden), whole)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("make", [janus, emu3, chameleon])
def test_a_tree_behind_a_chain_is_each_path_in_the_models_own_pass(
    make: Callable[..., transformers.PreTrainedModel], masked: bool
) -> None:
    tokens = token_model(make(), masked=masked)
    prompts = tokens.prompts(IDS, SEEN)
    # a chain of 2, then a tree: 0 -> 1 2, 2 -> 3; the last entry is padding
    codes = torch.randint(tokens.codes, (2, 6), generator=torch.Generator().manual_seed(3))
    paths = ([0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 4, 5])
    cache = tokens.new_cache(2, 11, scratch=40)
    features = tokens.prefill(prompts, cache)
    at = torch.tensor([0, 1, 32, 33, 34, 35])
    # the tree lies in the second word
    words = [[sum(1 << int(at[i]) % 32 for i in path if at[i] // 32 == w) for w in (0, 1)]
             for path in paths]  # fmt: skip
    mask = torch.tensor([*words, [0, 0]], dtype=torch.int32).expand(2, -1, -1)
    slots = torch.cat((6 + at, torch.tensor([-1]))).int().expand(2, -1)
    positions = torch.tensor([5 + len(path) for path in paths] + [0]).int().expand(2, -1)
    lengths = torch.tensor([6, 6], dtype=torch.int32)
    ids = torch.cat((codes, torch.zeros(2, 1, dtype=torch.int64)), 1)
    out = tokens.feed_tree(ids, slots, positions, lengths, mask, cache, length=6 + 36)
    assert out.shape == (2, 7, tokens.width)
    for b in range(2):
        own = prompts[b][prompts[b] != tokens.padding]
        for entry, path in enumerate(paths):
            whole = torch.cat((own, codes[b, path]))[None]
            with torch.no_grad():
                hidden = tokens.decoder(inputs_embeds=tokens.embed(whole)).last_hidden_state[0]
            torch.testing.assert_close(out[b, entry], hidden[-1])
            given = features[b, 6 - len(own) :]
            torch.testing.assert_close(given, hidden[: len(own)])
    assert tokens.logits(out).shape == (2, 7, tokens.codes)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("make", [janus, chameleon])
def test_speculation_gives_the_tokens_of_raster_order(
    make: Callable[..., transformers.PreTrainedModel], masked: bool
) -> None:
    tokens = token_model(make(), masked=masked)
    torch.manual_seed(4)
    drafter = EagleDrafter(LlamaSizes(1, 48, 4, 2, 12, 40, tokens.vocabulary)).double().eval()
    prompts, layout = tokens.prompts(IDS, SEEN), tokens.layout(4, 4)
    uncond, sampling = tokens.prompts(NEGATIVE, length=6), Sampling(0.9, guidance=2.0)
    expected = run(tokens, layout, prompts, k=4, uncond=uncond, sampling=sampling)
    decoder = SpeculativeDecoder(
        tokens, drafter, layout, sampling=sampling, depth=3, top_k=3, nodes=9,
        verification=Exact(coupled=True),
    )  # fmt: skip
    made = decoder.generate(prompts, frames=1, uncond=uncond)
    list(made)
    assert torch.equal(made.codes[:, 0], expected)


def test_two_frames_with_a_token_between_them() -> None:
    # as Emu3 puts the end of a frame between two
    tokens = token_model(emu3())
    layout = Layout(2, 3, tokens.codes, extra=1, eol=tokens.eol)
    decoder = DiagonalDecoder(tokens, layout, k=3, sampling=GREEDY)
    ends = tokens.prompts(torch.full((1, 1), 42))[:, None]
    first, second = decoder.generate(tokens.prompts(IDS[1:]), frames=2, actions=ends)
    # the second alone, behind all that lies before it
    model = tokens.model
    prompt = torch.cat((IDS[1:], tokens.sequence(first.codes), torch.full((1, 1), 42)), 1)
    expected = run(tokens, tokens.layout(2, 3), tokens.prompts(prompt), k=3)
    assert torch.equal(second.codes, expected)
    assert model.config._attn_implementation == "sdpa"


def _flash(model: transformers.PreTrainedModel) -> None:
    # as where flash-attention is installed
    model.model.text_model.config._attn_implementation = "flash_attention_2"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda m: token_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(
                vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                num_attention_heads=1,
            ))),
            "model must have an image vocabulary, as JanusFor.* do, got LlamaForCausalLM",
        ),
        (
            lambda m: token_model(transformers.Emu3ForConditionalGeneration(
                transformers.Emu3Config(
                    text_config=TEXT, vocabulary_map={"<image>": 1, "<|extra_200|>": 2},
                    vq_config=m.config.vq_config.to_dict(),
                )
            ).eval()),
            "model must have an image vocabulary with a token for each code from 0, got 0 in conf",
        ),
        (
            lambda m: (setattr(m.vocabulary_mapping, "eol_token_id", None), token_model(m)),
            r"config.vocabulary_map must name '<\|extra_200\|>', the end of a row, got no such",
        ),
        (lambda m: token_model(m.train()), "model must not be training, got dropout; call model."),
        (lambda m: token_model(m, eol=64), "eol must lie in the vocabulary of 64, got 64"),
        (lambda m: token_model(m).layout(), "height and width must be given in tokens for Emu3"),
        (
            lambda m: token_model(janus()).layout(3, 4),
            "height and width must be 4 and 4, the grid of JanusForCon.*, got 3 and 4",
        ),
        (lambda m: token_model(m).prompts(IDS[0]), r"input_ids must be \[B, P >= 1\], got \[6\]"),
        (lambda m: token_model(m).prompts(IDS + 40), "input_ids must lie in .* of 64, got ids"),
        (
            lambda m: token_model(m).prompts(IDS, SEEN.flip(1)),
            "attention_mask must be padded at the left, got 0 behind a 1; set tokenizer.padding_si",
        ),
        (
            lambda m: token_model(m).prompts(IDS, SEEN[:1]),
            r"attention_mask must be \[2, 6\], got \[1, 6\]",
        ),
        (
            lambda m: token_model(m).prompts(IDS, pixel_values=torch.zeros(1)),
            "pixel_values must be None, got images; put their ids into input_ids",
        ),
        (
            lambda m: token_model(m).prompts(IDS, length=5),
            "length must be at least 6, the longest prompt's, got 5",
        ),
        (
            lambda m: token_model(m).uncond(IDS),
            r"uncond must be a negative prompt of your own for Emu3\w+, got none; pass its ids",
        ),
        (
            lambda m: run(
                token_model(m), token_model(m).layout(9, 10), token_model(m).prompts(IDS), k=2
            ),
            r"slots must be at most 96, the positions of Emu3\w+, got 105; take a smaller grid",
        ),
        (
            lambda m: (_flash(m), run(
                token_model(m), token_model(m).layout(2, 2), token_model(m).prompts(IDS), k=2
            )),
            "attn_implementation must be 'sdpa' or 'eager', got 'flash_attention_2', which takes",
        ),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(
    call: Callable[[transformers.PreTrainedModel], object], text: str
) -> None:
    with pytest.raises(ValueError, match=f"^token_model: {text}") as caught:
        call(emu3())
    assert "\n" not in str(caught.value)


def test_a_prompt_without_text_needs_the_ids_of_its_begins() -> None:
    model = janus()
    model.generation_config.generation_kwargs = None
    with pytest.raises(ValueError, match=r"token_model: model.generation_config must have bos_tok"):
        token_model(model).uncond(IDS)


def test_chameleon_has_no_decoder() -> None:
    with pytest.raises(NotImplementedError, match="codes must be decoded by the tokenizer"):
        token_model(chameleon()).decode(torch.zeros(1, 2, 2, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [janus, emu3])
def test_a_gpu_gives_the_tokens_of_the_cpu(
    make: Callable[..., transformers.PreTrainedModel],
) -> None:
    model = make(hidden_size=128, num_attention_heads=2, head_dim=64).float()
    found = []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        for masked in (True, False):
            tokens = token_model(model, masked=masked)
            prompts = tokens.prompts(IDS, SEEN).to(device)
            uncond = tokens.prompts(NEGATIVE, length=6).to(device)
            found += [
                run(
                    tokens, tokens.layout(4, 4), prompts, k=k, uncond=uncond,
                    sampling=Sampling(temperature=0, guidance=2.0),
                ).cpu()
                for k in (4, 2)
            ]  # fmt: skip
    # one CUDA graph for each width; the op, and the model's own attention under a mask
    assert tokens.device.type == "cuda"
    assert token_model(model).masked is False
    for i in range(2, len(found)):
        assert torch.equal(found[i], found[i % 2])
