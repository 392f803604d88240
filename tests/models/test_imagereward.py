"""Scorers of single images, tiny and random, against transformers' own BLIP and CLIP."""

from __future__ import annotations

import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import sdvg_kernels
from sdvg.scorers.imagereward import LENGTH, MEAN, STD, ImageReward, from_package
from sdvg.scorers.pickscore import PickScore

transformers = pytest.importorskip("transformers", reason="the tokenizer is transformers'")

VISION, TEXT, CONTEXT, SIZE, PATCH, DEPTH, INNER = 128, 64, 128, 32, 8, 2, 96
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red cat dog runs . , ##s ##ning on the beach".split()
HEAD = {0: 24, 2: 12, 4: 8, 6: 6, 7: 1}
Weights = dict[str, Tensor]


def official() -> dict[str, list[int]]:
    """Every name and shape in the official file (ViT-L/16, BERT-base), from its published list."""
    return layout(1024, 768, 24, 12, 4096, 3072, 197, 16, 30524, (1024, 128, 64, 16, 1), 256)


def layout(
    vision: int, text: int, blocks: int, layers: int, fc: int, dense: int, tokens: int, patch: int,
    words: int, head: tuple[int, ...], shared: int,
) -> dict[str, list[int]]:  # fmt: skip
    shapes: dict[str, list[int]] = {}

    def linear(name: str, out: int, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [out, width], [out]

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [width], [width]

    eye, bert = "blip.visual_encoder", "blip.text_encoder"
    shapes[f"{eye}.cls_token"] = [1, 1, vision]
    shapes[f"{eye}.pos_embed"] = [1, tokens, vision]
    linear(f"{eye}.patch_embed.proj", vision, 3)
    shapes[f"{eye}.patch_embed.proj.weight"] = [vision, 3, patch, patch]
    for i in range(blocks):
        block = f"{eye}.blocks.{i}"
        norm(f"{block}.norm1", vision)
        linear(f"{block}.attn.qkv", 3 * vision, vision)
        linear(f"{block}.attn.proj", vision, vision)
        norm(f"{block}.norm2", vision)
        linear(f"{block}.mlp.fc1", fc, vision)
        linear(f"{block}.mlp.fc2", vision, fc)
    norm(f"{eye}.norm", vision)
    shapes[f"{bert}.embeddings.position_ids"] = [1, 512]
    shapes[f"{bert}.embeddings.word_embeddings.weight"] = [words, text]
    shapes[f"{bert}.embeddings.position_embeddings.weight"] = [512, text]
    norm(f"{bert}.embeddings.LayerNorm", text)
    for i in range(layers):
        layer = f"{bert}.encoder.layer.{i}"
        for kind, width in (("attention", text), ("crossattention", vision)):
            linear(f"{layer}.{kind}.self.query", text, text)
            linear(f"{layer}.{kind}.self.key", text, width)
            linear(f"{layer}.{kind}.self.value", text, width)
            linear(f"{layer}.{kind}.output.dense", text, text)
            norm(f"{layer}.{kind}.output.LayerNorm", text)
        linear(f"{layer}.intermediate.dense", dense, text)
        linear(f"{layer}.output.dense", text, dense)
        norm(f"{layer}.output.LayerNorm", text)
    linear("blip.vision_proj", shared, vision)
    linear("blip.text_proj", shared, text)
    widths = (text, *head)
    for place, width, out in zip((0, 2, 4, 6, 7), widths, head, strict=False):
        linear(f"mlp.layers.{place}", out, width)
    return shapes


def tiny() -> Weights:
    """Random tensors of the official names, small; none is a layer's default."""
    tokens = (SIZE // PATCH) ** 2 + 1
    shapes = layout(
        VISION, TEXT, DEPTH, DEPTH, INNER, INNER, tokens, PATCH, len(WORDS) + 2,
        tuple(HEAD.values()), 16,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in shapes.items():
        scale = 0.15 if len(shape) > 1 else 0.3
        found[name] = scale * torch.randn(shape, generator=generator)
        if name.lower().endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            found[name] += 1
    position_ids = "blip.text_encoder.embeddings.position_ids"
    return found | {position_ids: torch.arange(512)[None]}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


@pytest.fixture(scope="module")
def weights() -> Weights:
    return tiny()


@pytest.fixture(scope="module")
def file(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "ImageReward.pt"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def reward(file: Path, vocabulary: Path) -> ImageReward:
    return ImageReward(file, vocabulary, dtype=torch.float32)


def frames(batch: int, count: int, height: int = 40, width: int = 56, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch * count, 3, 5, 7, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return smooth.unflatten(0, (batch, count))


PROMPTS = ["a red cat runs.", "the dog, on the beach", "cats"]


def blip(weights: Weights) -> tuple[nn.Module, nn.Module]:
    """transformers' vision and text models with these weights."""
    vision = transformers.BlipVisionModel(
        transformers.BlipVisionConfig(
            hidden_size=VISION,
            intermediate_size=INNER,
            num_hidden_layers=DEPTH,
            num_attention_heads=VISION // 64,
            image_size=SIZE,
            patch_size=PATCH,
            layer_norm_eps=1e-6,
        )
    )
    text = transformers.BlipTextModel(
        transformers.BlipTextConfig(
            vocab_size=len(WORDS) + 2, hidden_size=TEXT, encoder_hidden_size=CONTEXT,
            intermediate_size=INNER, num_hidden_layers=DEPTH, num_attention_heads=TEXT // 64,
            layer_norm_eps=1e-12,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    rules = (
        (r"blocks", "encoder.layers"), (r"norm(\d)", r"layer_norm\1"), (r"attn\.", "self_attn."),
        (r"attn\.proj", "attn.projection"), (r"^norm", "post_layernorm"),
        (r"cls_token", "embeddings.class_embedding"),
        (r"pos_embed", "embeddings.position_embedding"),
        (r"patch_embed\.proj", "embeddings.patch_embedding"),
    )  # fmt: skip
    own: Weights = {}
    for name, value in weights.items():
        if name.startswith("blip.visual_encoder."):
            name = name.removeprefix("blip.visual_encoder.")
            for pattern, other in rules:
                name = re.sub(pattern, other, name)
            own[name] = value
    vision.load_state_dict(own)
    prefix = "blip.text_encoder."
    theirs = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
    theirs.pop("embeddings.position_ids")
    text.load_state_dict(theirs)
    return vision.eval(), text.eval()


@torch.no_grad()
def expected(
    weights: Weights,
    vocabulary: Path,
    video: Tensor,
    prompts: list[str],
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The official model's steps, one frame at a time, with transformers' modules in `dtype`."""
    vision, text = (model.to(dtype) for model in blip(weights))
    tokenizer = transformers.BertTokenizer(vocab=str(vocabulary))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    scores = torch.empty(video.shape[:2], dtype=torch.float64)
    for b, prompt in enumerate(prompts):
        batch = tokenizer(
            prompt, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        images = sdvg_kernels.preprocess_frames((video[b : b + 1] * 2 - 1).transpose(1, 2), SIZE)
        for n, image in enumerate(images[0].to(dtype)):
            seen = vision(pixel_values=image[None]).last_hidden_state
            states = text(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
                is_decoder=False,
            ).last_hidden_state[:, 0].double()  # fmt: skip
            for place in HEAD:
                weight, bias = (
                    weights[f"mlp.layers.{place}.{part}"] for part in ("weight", "bias")
                )
                states = nn.functional.linear(states, weight.double(), bias.double())
            scores[b, n] = (states.squeeze() - MEAN) / STD
    return scores


def test_rewards_are_those_of_transformers_modules(
    reward: ImageReward, weights: Weights, vocabulary: Path
) -> None:
    video = frames(3, 2)
    truth = expected(weights, vocabulary, video, PROMPTS)
    found = reward(video, PROMPTS)
    assert found.dtype == torch.float32
    assert found.shape == (3, 2)
    torch.testing.assert_close(found.double(), truth, atol=1e-4, rtol=1e-4)
    # every frame and every prompt counts
    assert truth.flatten().sort().values.diff().min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_no_more_than_transformers_does(
    file: Path, weights: Weights, vocabulary: Path, dtype: torch.dtype
) -> None:
    video = frames(3, 2)
    found = ImageReward(file, vocabulary, dtype=dtype)(video, PROMPTS)
    assert found.dtype == torch.float32
    truth = expected(weights, vocabulary, video, PROMPTS)
    budget = (expected(weights, vocabulary, video, PROMPTS, dtype) - truth).abs().max()
    # twice what transformers' own modules lose in this dtype
    assert (found - truth).abs().max() < 2 * budget + 1e-6
    assert budget < truth.std() / 4


def test_batched_equals_one_by_one(reward: ImageReward) -> None:
    video = frames(3, 4)
    whole = reward(video, PROMPTS)
    for b in range(3):
        for n in range(4):
            alone = reward(video[b : b + 1, n : n + 1], [PROMPTS[b]])
            torch.testing.assert_close(alone, whole[b : b + 1, n : n + 1], atol=2e-5, rtol=1e-5)


def test_it_is_deterministic(reward: ImageReward) -> None:
    video = frames(2, 3)
    assert torch.equal(reward(video, PROMPTS[:2]), reward(video, PROMPTS[:2]))


@pytest.mark.parametrize("shape", [(32, 32), (33, 47), (90, 160), (50, 40), (20, 24)])
def test_frames_of_any_size_are_scored(reward: ImageReward, shape: tuple[int, int]) -> None:
    assert torch.isfinite(reward(frames(1, 2, *shape), PROMPTS[:1])).all()


def test_no_frames_have_no_rewards(reward: ImageReward) -> None:
    assert reward(frames(2, 1)[:, :0], PROMPTS[:2]).shape == (2, 0)
    assert reward(frames(1, 2)[:0], []).shape == (0, 2)


def test_strided_frames_score_as_their_copies(reward: ImageReward) -> None:
    video = frames(2, 6)
    part = video.flip(-1).transpose(-1, -2)[:, ::2]
    assert torch.equal(reward(part, PROMPTS[:2]), reward(part.contiguous(), PROMPTS[:2]))


def test_a_long_prompt_is_cut(reward: ImageReward) -> None:
    video = frames(1, 1)
    long = "a " * (LENGTH - 2)
    assert torch.equal(reward(video, [long + "dog " * 40]), reward(video, [long + "cat"]))
    assert not torch.equal(reward(video, [long]), reward(video, [long[2:]]))


def test_unusual_prompts_are_scored(reward: ImageReward) -> None:
    prompts = ["", "漢字 🙂", "x" * 3000, "[ENC] [DEC] [SEP]"]
    assert torch.isfinite(reward(frames(4, 1), prompts)).all()


def test_tokens_are_made_once_for_a_videos_prompts(
    reward: ImageReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    tokenizer = reward._tokenizer
    monkeypatch.setattr(
        reward, "_tokenizer", lambda *a, **k: (calls.append(1), tokenizer(*a, **k))[1]
    )
    video = frames(2, 1)
    for prompts in (["a", "cat"], ["a", "cat"], ["cat", "a"], ["cat", "a"]):
        reward(video, prompts)
    assert len(calls) == 2


def test_it_moves_like_any_module(reward: ImageReward) -> None:
    assert not reward.training
    assert not any(value.requires_grad for value in reward.parameters())
    assert len(list(reward.buffers())) == 0


def test_the_official_names_are_the_modules_names(vocabulary: Path) -> None:
    from sdvg.scorers import imagereward

    shapes = official()
    # as the published file: 625 tensors, of which 5 are not parameters that rewards need
    assert len(shapes) == 625
    count = sum(torch.Size(s).numel() for n, s in shapes.items() if "position_ids" not in n)
    assert count == 446_665_953
    with torch.device("meta"):
        parts = {
            "blip.visual_encoder.": imagereward._Vision(shapes),
            "blip.text_encoder.": imagereward._Text(shapes),
            "mlp.": imagereward._Head(shapes),
        }
    found = {
        prefix + name: list(value.shape)
        for prefix, part in parts.items()
        for name, value in part.named_parameters()
    }
    unused = {name for name in shapes if name.startswith(imagereward._UNUSED)}
    assert len(unused) == 5
    assert found == {name: shape for name, shape in shapes.items() if name not in unused}
    assert parts["blip.visual_encoder."].size == 224


def test_a_safetensors_copy_and_a_vocabulary_folder_do(
    reward: ImageReward, weights: Weights, vocabulary: Path, tmp_path: Path
) -> None:
    save_file(weights, tmp_path / "reward.safetensors")
    other = ImageReward(tmp_path / "reward.safetensors", vocabulary.parent, dtype=torch.float32)
    video = frames(1, 2)
    assert torch.equal(other(video, PROMPTS[:1]), reward(video, PROMPTS[:1]))


class Runs:
    """Would run code where a pickle is trusted."""

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.system, ("echo this must never be seen",)


def drop(pattern: str) -> Callable[[Weights], Weights]:
    return lambda w: {name: value for name, value in w.items() if not re.search(pattern, name)}


WORD = "blip.text_encoder.embeddings.word_embeddings.weight"
PLACE = "blip.visual_encoder.pos_embed"
MALFORMED: dict[str, tuple[Callable[[Weights], object], str]] = {
    "code": (lambda w: w | {"x": Runs()}, "hold tensors and plain containers alone, got a pickle"),
    "a list": (lambda w: [w], "hold tensors by name, got list"),
    "another model": (
        lambda w: {"x": torch.zeros(2)},
        f"hold ImageReward's {PLACE}, got 1 tensors without it",
    ),
    "no head": (drop("^mlp"), "hold ImageReward's mlp.layers.0.weight, got "),
    "half a layer": (
        drop(r"layer\.1\.crossattention\.self"),
        "tensors of ImageReward, got 6 missing (blip.text_encoder.encoder.layer.1.crossattention"
        ".self.query.weight, ",
    ),
    "more": (lambda w: w | {"blip.queue": torch.zeros(2)}, "got 1 unknown (blip.queue)"),
    "misshapen": (
        lambda w: w | {"mlp.layers.7.bias": torch.zeros(3)},
        "got 1 misshapen (mlp.layers.7.bias [3] for [1])",
    ),
    "other heads": (
        lambda w: w | {PLACE: torch.zeros(1, 17, 100)}, "hold ImageReward, got other shapes",
    ),
    "flat": (lambda w: w | {PLACE: torch.zeros(100)}, "hold ImageReward, got other shapes"),
    "other words": (
        lambda w: w | {WORD: torch.zeros(30524, TEXT)},
        f"vocabulary must hold 30522 words as the weights do, got {len(WORDS)} in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_each_malformed_file_is_one_clear_sentence(
    weights: Weights, vocabulary: Path, tmp_path: Path, name: str,
    capfd: pytest.CaptureFixture,
) -> None:  # fmt: skip
    change, said = MALFORMED[name]
    torch.save(change(weights), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        ImageReward(tmp_path / "x.pt", vocabulary)
    text = str(error.value)
    assert text.startswith("imagereward: "), text
    assert "\n" not in text
    assert len(text) < 400 + len(str(tmp_path))
    assert "never be seen" not in capfd.readouterr().out


def test_missing_files_are_named(file: Path, vocabulary: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"imagereward: \S+no.pt must be a file of weights, got"):
        ImageReward(tmp_path / "no.pt", vocabulary)
    with pytest.raises(ValueError, match=r"must be a vocab.txt of BERT's, got \S+ which is missi"):
        ImageReward(file, tmp_path)


def test_shapes_that_do_not_fit_are_named(reward: ImageReward) -> None:
    with pytest.raises(ValueError, match=r"imagereward: frames must be \[B, N, 3, H, W\], got \[3"):
        reward(torch.zeros(3, 8, 8), ["a"])
    with pytest.raises(ValueError, match="prompts must be one for each of 2 sequences, got 3"):
        reward(frames(2, 1), PROMPTS)
    with pytest.raises(ValueError, match="prompts must be one for each of 3 sequences, got 'cat'"):
        reward(frames(3, 1), "cat")


class Package(types.ModuleType):
    """Stands in for the `image-reward` package: its `load`, its `score_gard`."""

    def __init__(self, weights: Weights, vocabulary: Path) -> None:
        super().__init__("ImageReward")
        self.weights, self.vocabulary = weights, vocabulary

    def load(self, name: str, device: str) -> types.SimpleNamespace:
        assert (name, device) == ("ImageReward-v1.0", "cpu")
        vision, text = blip(self.weights)

        def score_gard(ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
            assert ids.shape == mask.shape == (len(image), LENGTH)
            seen = vision(pixel_values=image).last_hidden_state
            states = text(
                input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False
            ).last_hidden_state[:, 0]
            for place in HEAD:
                weight, bias = (
                    self.weights[f"mlp.layers.{place}.{part}"] for part in ("weight", "bias")
                )
                states = nn.functional.linear(states, weight, bias)
            return (states - MEAN) / STD

        tokenizer = transformers.BertTokenizer(
            vocab=str(self.vocabulary), bos_token="[DEC]", extra_special_tokens=["[ENC]"]
        )
        return types.SimpleNamespace(
            blip=types.SimpleNamespace(tokenizer=tokenizer), score_gard=score_gard
        )


def test_the_packages_model_is_a_scorer(
    reward: ImageReward, weights: Weights, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ImageReward", Package(weights, vocabulary))
    # the package looks at 224 pixels, its stand-in at fewer
    import sdvg.scorers.imagereward as module

    shrink = module.images_of
    monkeypatch.setattr(
        module, "images_of", lambda op, f, p, size, *rest: shrink(op, f, p, SIZE, *rest)
    )
    video = frames(3, 2)
    score = from_package()
    torch.testing.assert_close(score(video, PROMPTS), reward(video, PROMPTS), atol=1e-4, rtol=1e-4)


def test_a_package_that_does_not_import_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(ImportError, match=r"image-reward package must import, got .*; ImageReward"):
        from_package()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP with its tokenizer, saved as the Hub's."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tower = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # fmt: skip
    config = transformers.CLIPConfig(
        vision_config=tower | {"image_size": SIZE, "patch_size": PATCH},
        text_config=tower
        | {"vocab_size": len(WORDS), "max_position_embeddings": 12, "eos_token_id": 3},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config)
    for value in model.parameters():
        if value.ndim > 1:
            nn.init.normal_(value, std=0.2)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_pickscore_is_clips_scaled_similarity(clip: Path) -> None:
    video = frames(3, 2)
    score = PickScore(clip, dtype=torch.float32)
    found = score(video, PROMPTS)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    for b, prompt in enumerate(PROMPTS):
        images = sdvg_kernels.preprocess_frames((video[b : b + 1] * 2 - 1).transpose(1, 2), SIZE)
        batch = tokenizer(
            prompt, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
        )
        with torch.no_grad():
            out = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                pixel_values=images[0],
            )  # fmt: skip
        torch.testing.assert_close(found[b], out.logits_per_image[:, 0], atol=1e-4, rtol=1e-4)
    assert found.dtype == torch.float32
    assert found.std() > 1e-3
    assert torch.equal(score(video, PROMPTS), found)
    torch.testing.assert_close(score(video[1:2], PROMPTS[1:2]), found[1:2], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"pickscore: frames must be \[B, N, 3, H, W\], got"):
        score(video[0], PROMPTS[:1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_gpu_scores_alike_in_a_graph_and_never_waits(
    file: Path, reward: ImageReward, vocabulary: Path, dtype: torch.dtype
) -> None:
    video = frames(3, 2)
    score = ImageReward(file, vocabulary, dtype=dtype, device="cuda")
    given = video.cuda()
    first = score(given, PROMPTS)
    # three times what the CPU loses in these dtypes; a float32 convolution is a TF32 one
    share = {torch.float16: 0.02, torch.bfloat16: 0.15, torch.float32: 0.02}[dtype]
    truth = reward(video, PROMPTS)
    assert (first.cpu() - truth).abs().max() < share * truth.std()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = score(given, PROMPTS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again, first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = score(given, PROMPTS)
    given.copy_(frames(3, 2, seed=1).cuda())
    graph.replay()
    assert torch.equal(out, score(given, PROMPTS))
    assert not torch.equal(out, first)
