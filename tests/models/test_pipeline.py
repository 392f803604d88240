"""The diffusers pipeline is the loop: same frames, saved and loaded whole, errors in a sentence."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="the pipeline is a diffusers class")
pytest.importorskip("transformers", reason="the text encoder is a transformers class")

from diffusers import WanTransformer3DModel

from sdvg import SDVG, Always, Block, Never, Recompute, Reward, SDVGPipeline, accelerate, preset
from sdvg.models import embedded
from sdvg.models.linear import Fp8Linear
from sdvg.scorers.digits import DigitsReward
from tests.models.test_vae import stock

PROMPT = "a seven moving left"


@pytest.fixture(scope="module")
def pipe() -> SDVGPipeline:
    pipe = SDVGPipeline.from_pretrained(embedded.WEIGHTS, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frames(pipe: SDVGPipeline, prompt: object = PROMPT, **options: object) -> torch.Tensor:
    options = {"num_blocks": 2, "generator": 3, "output_type": "pt"} | options
    return pipe(prompt, **options).frames


def test_the_pipeline_equals_the_loop_bitwise(pipe: SDVGPipeline) -> None:
    pair = embedded.load(decoder_dtype=torch.float32)
    loop = SDVG(*pair, router=Reward(-0.7)).generate([PROMPT], num_blocks=3, seed=5)
    made = torch.cat([block.frames for block in loop], 1)
    out = pipe(PROMPT, num_blocks=3, generator=5, output_type="pt")
    assert torch.equal(out.frames, made)
    assert out.verdicts == loop.verdicts
    assert pipe.summary().blocks == out.stats.blocks == 3


def test_what_is_saved_loads_whole(pipe: SDVGPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    again = SDVGPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.scorer, DigitsReward)
    assert again.scorer.mean == pipe.scorer.mean
    kept = {name: value for name, value in pipe.config.items() if not name.startswith("_")}
    assert {name: again.config[name] for name in kept} == kept
    # to rounding: weights that lie elsewhere in memory may take another matrix product
    assert (frames(again) - frames(pipe)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "name", ["os.path.join", "sdvg.cli.main", "sdvg.scorers.none.X", "sdvg.scorers.digits.None"]
)
def test_a_folder_does_not_choose_what_code_is_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"scorer": name}))
    with pytest.raises(ValueError, match="which is not sdvg's; load it yourself"):
        SDVGPipeline.from_pretrained(tmp_path)


def test_loose_checkpoints_make_the_same_pipeline(pipe: SDVGPipeline, tmp_path: Path) -> None:
    sizes = {name: pipe.config[name] for name in ("height", "width", "sink_frames")}
    loaded = SDVGPipeline.from_checkpoints(
        base=embedded.WEIGHTS,
        drafter=embedded.WEIGHTS / "drafter",
        target=pipe.transformer,
        scorer=pipe.scorer,
        dtype=torch.float32,
        window_frames=9,
        max_sequence_length=24,
        **sizes,
    )
    loaded.set_progress_bar_config(disable=True)
    mine = frames(pipe)
    assert (frames(loaded) - mine).abs().max() < 1e-4
    # the target is shared: going back to the first pipeline must not run on the second one's cache
    assert torch.equal(frames(pipe), mine)
    with pytest.raises(ValueError, match="checkpoints: "):
        SDVGPipeline.from_checkpoints(base=embedded.WEIGHTS, target=tmp_path / "nothing.pt")


def test_another_part_may_be_given_when_loading() -> None:
    def scorer(frames: torch.Tensor, prompts: object) -> torch.Tensor:
        return frames.mean((2, 3, 4))

    loaded = SDVGPipeline.from_pretrained(
        embedded.WEIGHTS, dtype=torch.float32, scorer=scorer, drafter=None
    )
    loaded.set_progress_bar_config(disable=True)
    assert loaded.scorer is scorer
    out = loaded(PROMPT, num_blocks=2, generator=0)
    assert [row[0].reason for row in out.verdicts] == ["target-only"] * 2


def test_stream_yields_blocks_and_switches_prompts(pipe: SDVGPipeline) -> None:
    stream = pipe.stream(PROMPT, num_blocks=3, generator=3, router=Never())
    made = [next(stream)]
    assert made[0].frames.shape == (1, 9, 3, 32, 32)
    stream.switch(["a two moving left"])
    made += list(stream)
    other = frames(pipe, num_blocks=3, router=Never())
    assert torch.equal(made[0].frames, other[:, :9])
    assert (made[1].frames - other[:, 9:21]).abs().max() > 0.1
    assert pipe.summary().blocks == 3


@pytest.mark.parametrize(
    ("output_type", "shape"),
    [("np", (2, 21, 32, 32, 3)), ("pt", (2, 21, 3, 32, 32)), ("latent", (2, 6, 16, 4, 4))],
)
def test_output_types(pipe: SDVGPipeline, output_type: str, shape: tuple[int, ...]) -> None:
    made = frames(pipe, [PROMPT, "a two moving up"], output_type=output_type)
    assert tuple(made.shape) == shape
    assert isinstance(made, np.ndarray if output_type == "np" else torch.Tensor)


def test_pil_output_and_tuple(pipe: SDVGPipeline) -> None:
    videos, verdicts, stats = pipe(
        PROMPT, num_blocks=1, generator=0, output_type="pil", return_dict=False
    )
    assert len(videos) == 1
    assert [image.size for image in videos[0]] == [(32, 32)] * 9
    assert len(verdicts) == stats.blocks == 1


def test_the_callback_sees_each_block(pipe: SDVGPipeline) -> None:
    seen: list[tuple[int, Block]] = []
    pipe(
        PROMPT,
        num_blocks=2,
        callback_on_block_end=lambda _, index, block: seen.append((index, block)),
    )
    assert [index for index, _ in seen] == [0, 1]
    assert seen[1][1].frames.shape[1] == 12


def test_an_image_and_a_video_are_gone_on_from(pipe: SDVGPipeline) -> None:
    made = frames(pipe, num_blocks=3, router=Never())
    still = pipe(PROMPT, image=made[:, 8], num_blocks=2, generator=0, router=Always())
    # the autoencoder brings the picture back, blurred a little
    assert np.abs(still.frames[0, 8].transpose(2, 0, 1) - made[0, 8].numpy()).mean() < 0.05
    assert [row[0].reason for row in still.verdicts] == ["given", "router"]
    out = pipe(PROMPT, video=made[:, :21], num_blocks=3, generator=0, output_type="pt")
    assert (out.frames[:, :21] - made[:, :21]).abs().mean() < 0.05
    assert [row[0].reason for row in out.verdicts[:2]] == ["given"] * 2


def test_the_same_pixels_in_any_form_give_the_same_video(pipe: SDVGPipeline) -> None:
    """A PNG with transparency failed in the encoder; whole numbers were taken for 0 to 1."""
    grey = torch.randint(0, 256, (32, 32), generator=torch.Generator().manual_seed(0))
    whole = grey.to(torch.uint8).numpy()[..., None].repeat(3, 2)
    picture = Image.fromarray(whole)
    forms = (
        picture, picture.convert("L"), picture.convert("RGBA"), [picture], whole,
        whole[None], whole[:, ::-1][:, ::-1].astype("float32") / 255,
        torch.from_numpy(whole).permute(2, 0, 1),
    )  # fmt: skip
    made = [frames(pipe, image=form, num_blocks=1) for form in forms]
    made += [
        frames(pipe, video=form, num_blocks=1)
        for form in ([picture] * 9, (picture,) * 9, [[picture] * 9], [whole] * 9)
    ]
    assert all((other - made[0]).abs().max() < 1e-5 for other in made[1:])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"image": torch.zeros(1, 1, 32, 32)}, r"image must be \[B, 3, H, W\].*\[1, 1, 32, 32\]"),
        ({"image": torch.zeros(1, 9, 3, 32, 32)}, r"got \[1, 9, 3, 32, 32\]"),
        ({"image": []}, "a list of images, got an empty list"),
        ({"image": [[torch.zeros(3, 32, 32)]]}, "got lists of lists"),
        ({"image": torch.full((3, 32, 32), 2.0)}, r"must lie in \[0, 1\], .*got 2 to 2"),
        ({"image": torch.full((3, 32, 32), float("nan"))}, "got nan to nan"),
        ({"video": []}, "video must be .* got an empty list"),
        ({"video": torch.zeros(3, 32, 32)}, r"video must be \[B, N, 3, H, W\], .*\[3, 32, 32\]"),
        ({"video": torch.zeros(1, 0, 3, 32, 32)}, r"got \[1, 0, 3, 32, 32\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pixels_that_do_not_fit_are_named_in_one_sentence(
    pipe: SDVGPipeline, options: dict[str, object], text: str
) -> None:
    """They failed inside of diffusers or torch, or made a video of something else."""
    with pytest.raises(ValueError, match=text):
        pipe(PROMPT, **options)


def _tiny(pipe: SDVGPipeline, **sizes: int) -> torch.nn.Module:
    """A random transformer for an autoencoder of 4 channels and the text encoder of `pipe`."""
    sizes = {"in_channels": 4, "text_dim": pipe.text_encoder.config.d_model} | sizes
    return WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=16, out_channels=4, freq_dim=16, ffn_dim=16,
        num_layers=1, **sizes,
    )  # fmt: skip


def test_wan_22s_autoencoder_makes_videos_of_the_size_asked_for(pipe: SDVGPipeline) -> None:
    """Its latents stand for 16 pixels: videos were twice as large, and no image fitted.

    This one's latents have a mean and a deviation too, which a given image's lose.
    """
    made = SDVGPipeline(
        pipe.tokenizer, pipe.text_encoder, stock("wan 2.2"), pipe.scheduler, None, _tiny(pipe),
        height=32, width=64, max_sequence_length=24,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    assert frames(made, num_blocks=1).shape == (1, 9, 3, 32, 64)
    still = torch.rand(3, 32, 64, generator=torch.Generator().manual_seed(0))
    latents = frames(made, num_blocks=1, image=still, output_type="latent")
    given = made.vae.encode(2 * still[None, :, None].expand(-1, -1, 9, -1, -1) - 1)
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (made.vae.config.latents_mean, made.vae.config.latents_std)
    )
    expected = given.latent_dist.mode().transpose(1, 2)
    assert (latents * std + mean - expected).abs().max() < 1e-4
    with pytest.raises(ValueError, match="height must be a multiple of 32, got 48"):
        frames(made, height=48)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({}, "transformer must have the 16 latent channels of the vae, got 4; take both from"),
        ({"in_channels": 16, "text_dim": 8}, "the 128 text channels of the text_encoder, got 8"),
    ],
)
def test_a_transformer_of_another_model_is_named(
    pipe: SDVGPipeline, sizes: dict[str, int], text: str
) -> None:
    parts = {**pipe.components, "transformer": _tiny(pipe, **sizes), "drafter": None}
    other = SDVGPipeline(**parts, height=32, width=32, max_sequence_length=24)
    with pytest.raises(ValueError, match=text):
        frames(other)


def test_videos_of_one_call_equal_them_alone(pipe: SDVGPipeline) -> None:
    both = frames(pipe, [PROMPT, PROMPT])
    assert (both[:1] - frames(pipe)).abs().max() < 1e-4
    assert (both[0] - both[1]).abs().max() > 0.1


def test_html_and_blanks_in_a_prompt_do_not_matter(pipe: SDVGPipeline) -> None:
    assert torch.equal(frames(pipe, "  a seven\n moving&nbsp;left "), frames(pipe))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"output_type": "gif"}, "output_type must be one of np, pt, pil, latent, got 'gif'"),
        ({"height": 0}, "height must be at least 1, got 0"),
        ({"height": 40}, "height must be a multiple of 16, got 40"),
        ({"height": 16, "video": torch.zeros(1, 10, 3, 16, 32)}, "9 \\+ n \\* 12"),
        ({"video": torch.zeros(3, 9, 3, 32, 32)}, "one for each of 1 prompts, got 3"),
        ({"image": torch.zeros(1, 3, 32, 32), "video": 1}, "must not both be given"),
        ({"prompt": ""}, "a prompt must not be empty"),
        ({"num_blocks": 0}, "num_blocks must be at least 1"),
        ({"schedule": "fast"}, "preset must be one of"),
        ({"preview": "tiny"}, "preview must turn latents to frames, got 'tiny'"),
        ({"generator": [1, 2]}, "seed must name one for each of 1 prompts, got 2"),
    ],
)
def test_a_wrong_argument_is_named_in_one_sentence(
    pipe: SDVGPipeline, options: dict[str, object], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        pipe(**({"prompt": PROMPT} | options))


def test_a_generator_of_another_type_and_an_early_summary_are_refused(pipe: SDVGPipeline) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.Generator, a seed, or one for each"):
        pipe(PROMPT, generator="0")
    fresh = SDVGPipeline.from_pretrained(embedded.WEIGHTS)
    with pytest.raises(RuntimeError, match="summary must follow a video"):
        fresh.summary()


def test_an_accelerated_pipeline_gives_the_same_video(pipe: SDVGPipeline) -> None:
    fresh = SDVGPipeline.from_pretrained(embedded.WEIGHTS, dtype=torch.float32)
    fresh.set_progress_bar_config(disable=True)
    assert accelerate(fresh) is fresh
    # twice: a second call makes the models anew around the same transformers
    for _ in range(2):
        assert (frames(fresh) - frames(pipe)).abs().max() < 1e-3
    with pytest.raises(TypeError, match="must be a CausalWan, a pair or an SDVGPipeline, got int"):
        accelerate(3)


def test_offloaded_models_give_the_same_video(pipe: SDVGPipeline) -> None:
    """On a CPU the hooks move nothing, but they must fire where no forward of theirs is called."""
    pytest.importorskip("accelerate", reason="offloading is accelerate's")
    fresh = SDVGPipeline.from_pretrained(embedded.WEIGHTS, dtype=torch.float32)
    fresh.set_progress_bar_config(disable=True)
    fresh.enable_model_cpu_offload(device="cpu")
    fired = []
    for name in ("drafter", "transformer", "vae"):
        hook = getattr(fresh, name)._hf_hook
        before = hook.pre_forward
        hook.pre_forward = lambda *a, _b=before, _n=name, **k: (fired.append(_n), _b(*a, **k))[1]
    assert torch.equal(frames(fresh), frames(pipe))
    assert set(fired) == {"drafter", "transformer", "vae"}


def test_without_a_generator_torchs_own_keys_the_noise(pipe: SDVGPipeline) -> None:
    """`torch.seed()` gave another video each time and left the caller's generator reseeded."""
    made, after = [], []
    for _ in range(2):
        torch.manual_seed(1)
        made.append(frames(pipe, num_blocks=1, generator=None))
        after.append(torch.rand(1))
    assert torch.equal(made[0], made[1])
    assert torch.equal(after[0], after[1])
    assert not torch.equal(frames(pipe, num_blocks=1, generator=None), made[0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"height": 32.0}, "height must be an integer, got 32.0"),
        ({"prompt": None}, "prompt must be a text or a list of texts, got None"),
        ({"prompt": [7]}, "a prompt must be a text, got 7"),
        (
            {"image": "seven.png"},
            r"image must be pixels, got .*load_image\('seven.png'\) reads them",
        ),
        ({"video": 3}, "video must be pixels, got 3"),
        ({"image": [1, 2]}, "image must be pixels, got 1"),
        ({"tau": "high"}, "tau must be a number, got 'high'"),
        ({"callback_on_block_end": 3}, "callback_on_block_end must be callable, got int"),
        (
            {"guidance_scale": 5.0},
            "guidance_scale must not be given, got 5.0; the models are distil",
        ),
        ({"negative_prompt": "blur"}, "run without guidance: leave it out"),
        (
            {"num_frames": 81},
            "give num_blocks=, 9 frames for the first block and 12 for each later",
        ),
        ({"num_inference_steps": 4}, "give schedule="),
        (
            {"windows": 3},
            "windows must not be given, got 3; a call takes prompt, num_blocks, .*view$",
        ),
    ],
    ids=str,
)
def test_a_wrong_type_is_named_in_one_sentence(
    pipe: SDVGPipeline, options: dict[str, object], text: str
) -> None:
    with pytest.raises(TypeError, match=text):
        pipe(**({"prompt": PROMPT} | options))


def test_a_compiled_transformer_runs_and_a_wrapped_one_is_refused(pipe: SDVGPipeline) -> None:
    """The wrapper failed deep inside of the compiler."""
    fresh = SDVGPipeline.from_pretrained(embedded.WEIGHTS, dtype=torch.float32, drafter=None)
    fresh.set_progress_bar_config(disable=True)
    fresh.transformer.compile(backend="eager")
    made = frames(fresh, num_blocks=1)
    assert (made - frames(pipe, num_blocks=1)).abs().max() < 1e-4
    fresh.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match=r"must be the module itself.*transformer\.compile\(\)"):
        frames(fresh)


def test_a_stream_whose_transformers_were_taken_over_is_refused(pipe: SDVGPipeline) -> None:
    """It went on in the other one's cache, and spoilt both videos."""
    other = SDVGPipeline(
        **{name: getattr(pipe, name) for name in pipe.components if name != "scorer"},
        scorer=pipe.scorer, height=32, width=32, max_sequence_length=24,
    )  # fmt: skip
    for later in (
        lambda: other.stream(PROMPT, num_blocks=2, generator=0),
        lambda: pipe.stream(PROMPT, num_blocks=2, generator=0, height=48),
    ):
        older = pipe.stream(PROMPT, num_blocks=3, generator=0)
        next(older)
        newer = later()
        next(newer)
        with pytest.raises(RuntimeError, match="another CausalWan that was made around it later"):
            next(older)
        next(newer)


def test_models_of_another_size_let_go_of_their_caches(pipe: SDVGPipeline) -> None:
    """The latest video's loop held them while the next one's were made: twice the memory."""
    frames(pipe)
    old = pipe._models["transformer"][1]
    pipe.stream(PROMPT, height=48)
    assert old.cache is None


def test_accelerating_in_the_middle_of_a_stream_waits_for_the_next_video(
    pipe: SDVGPipeline,
) -> None:
    fresh = SDVGPipeline.from_pretrained(embedded.WEIGHTS, dtype=torch.float32)
    stream = fresh.stream(PROMPT, num_blocks=2, generator=3)
    first = next(stream).frames
    accelerate(fresh)
    assert torch.equal(torch.cat((first, next(stream).frames), 1), frames(pipe))
    fresh.stream(PROMPT)
    assert fresh._models["transformer"][1].rope_table is not None


def test_an_accelerated_pipeline_is_saved_as_a_plain_one(
    pipe: SDVGPipeline, tmp_path: Path
) -> None:
    fresh = accelerate(SDVGPipeline.from_pretrained(embedded.WEIGHTS, dtype=torch.float32))
    fresh.set_progress_bar_config(disable=True)
    frames(fresh, num_blocks=1)
    fresh.save_pretrained(tmp_path)
    again = SDVGPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert (frames(again) - frames(pipe)).abs().max() < 1e-4
    frames(accelerate(fresh, fp8=True), num_blocks=1)
    # the target's alone: the drafter's stay
    assert not any(isinstance(part, Fp8Linear) for part in fresh.drafter.modules())
    with pytest.raises(ValueError, match="transformer must have its own weights to be saved"):
        fresh.save_pretrained(tmp_path / "fp8")


def test_a_callers_autocast_changes_nothing(pipe: SDVGPipeline) -> None:
    """Keys came in bfloat16 to a float32 cache, which refused them."""
    expected = frames(pipe)
    with torch.autocast("cpu", torch.bfloat16):
        # the text encoder is transformers' own
        assert (frames(pipe) - expected).abs().mean() < 0.1
    embedded_text = pipe.encode_prompt([PROMPT])
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(pipe, "encode_prompt", lambda prompts: embedded_text)
        assert torch.equal(frames(pipe), expected)


def test_tiling_is_refused(pipe: SDVGPipeline) -> None:
    pipe.vae.enable_tiling()
    try:
        with pytest.raises(ValueError, match="vae: tiling must be off, a block is decoded whole"):
            pipe.stream(PROMPT)
    finally:
        pipe.vae.disable_tiling()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_nearly_the_same_video(pipe: SDVGPipeline, dtype: torch.dtype) -> None:
    """In float16 the squares in the decoder's norms overflowed: its frames were grey."""
    half = SDVGPipeline.from_pretrained(embedded.WEIGHTS, dtype=dtype)
    half.set_progress_bar_config(disable=True)
    assert (frames(half) - frames(pipe)).abs().mean() < 0.01


def test_a_generator_goes_on_from_call_to_call(pipe: SDVGPipeline) -> None:
    """Its seed alone once keyed the noise: every call gave the same video."""
    generator = torch.Generator().manual_seed(5)
    first, second = (frames(pipe, num_blocks=1, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(frames(pipe, num_blocks=1, generator=generator.manual_seed(5)), first)


def test_a_list_of_generators_gives_each_its_own_video(pipe: SDVGPipeline) -> None:
    prompts = [PROMPT, "a two moving up"]
    both = frames(pipe, prompts, generator=[8, torch.Generator().manual_seed(5)])
    alone = [frames(pipe, prompts[0], generator=8)]
    alone += [frames(pipe, prompts[1], generator=torch.Generator().manual_seed(5))]
    assert (both - torch.cat(alone)).abs().max() < 1e-4


def test_a_switch_takes_a_text_as_a_call_does(pipe: SDVGPipeline) -> None:
    """A plain text was refused, and HTML went into the text encoder."""
    made = []
    for prompt in ("a&nbsp;two  moving up", ["a two moving up"]):
        stream = pipe.stream(PROMPT, num_blocks=2, generator=3)
        next(stream)
        stream.switch(prompt)
        made.append(next(stream).latents)
    assert torch.equal(*made)


def test_both_models_share_one_run_of_the_text_encoder(
    pipe: SDVGPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    forward = pipe.text_encoder.forward
    monkeypatch.setattr(
        pipe.text_encoder, "forward", lambda **inputs: (runs.append(1), forward(**inputs))[1]
    )
    stream = pipe.stream(PROMPT, num_blocks=1, generator=3)
    assert len(runs) == 1
    stream.switch("a two moving up")
    assert len(runs) == 2
    # whoever asks the encoder gets its answer, and a new video starts from it
    pipe.encode_prompt(["a two moving up"])
    pipe.stream("a two moving up", num_blocks=1)
    assert len(runs) == 4


def test_the_scorer_goes_where_the_pipeline_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stayed on the CPU, and every frame came there."""
    fresh = SDVGPipeline.from_pretrained(embedded.WEIGHTS, dtype=torch.float32)
    moved = []
    monkeypatch.setattr(fresh.scorer, "to", moved.append)
    assert fresh.to("cpu") is fresh
    fresh.to(torch.float32)
    assert fresh.to(device=torch.device("cpu")) is fresh
    assert moved == ["cpu", torch.device("cpu")]


def test_parts_are_placed_and_their_inputs_follow(
    pipe: SDVGPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: dict[str, object] = {}
    for name in ("text_encoder", "drafter", "vae", "scorer"):
        part = getattr(pipe, name)
        monkeypatch.setattr(part, "to", lambda device, _n=name: moved.update({_n: device}))
    assert pipe.place(drafter="cpu", scorer="cpu:0", vae="cpu") is pipe
    assert moved == {"drafter": "cpu", "scorer": "cpu:0", "vae": "cpu"}
    with pytest.raises(TypeError, match=r"place must name parts among .* got 'tokenizer'"):
        pipe.place(tokenizer="cpu")
    with pytest.raises(ValueError, match="vae must be on a device of this machine, got 'f"):
        pipe.place(vae="far")
    monkeypatch.setattr(pipe, "scorer", lambda frames, prompts: None)
    with pytest.raises(ValueError, match="scorer must be a torch module to be placed"):
        pipe.place(scorer="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_parts_on_two_gpus_give_the_same_video() -> None:
    made = []
    for place in ({}, {"drafter": "cuda:1"}, dict.fromkeys(("text_encoder", "vae", "scorer"), 1)):
        split = SDVGPipeline.from_pretrained(embedded.WEIGHTS, dtype=torch.float32).to("cuda:0")
        split.place(**{name: torch.device("cuda", 1) for name in place})
        split.set_progress_bar_config(disable=True)
        made.append(frames(split, num_blocks=4, run_ahead=2 if "drafter" in place else 0))
    assert all((other - made[0]).abs().max() < 1e-3 for other in made[1:])


@pytest.mark.parametrize("name", ["enable_sequential_cpu_offload", "enable_group_offload"])
def test_offloading_layer_by_layer_is_refused(pipe: SDVGPipeline, name: str) -> None:
    """It failed in the middle of the first block."""
    with pytest.raises(NotImplementedError, match=rf"{name} must not be called.*model_cpu_offload"):
        getattr(pipe, name)()


@pytest.mark.parametrize("offload_first", [True, False])
def test_offloading_and_accelerating_go_in_any_order(
    pipe: SDVGPipeline, offload_first: bool
) -> None:
    pytest.importorskip("accelerate", reason="offloading is accelerate's")
    fresh = SDVGPipeline.from_pretrained(embedded.WEIGHTS, dtype=torch.float32)
    fresh.set_progress_bar_config(disable=True)
    if offload_first:
        fresh.enable_model_cpu_offload(device="cpu")
    accelerate(fresh)
    frames(fresh, num_blocks=1)
    if not offload_first:
        fresh.enable_model_cpu_offload(device="cpu")
    assert (frames(fresh) - frames(pipe)).abs().max() < 1e-3
    with pytest.raises(RuntimeError, match="vae must not be offloaded to be placed"):
        fresh.place(vae="cpu")


@pytest.mark.parametrize("recipe", ["self_forcing", "longlive", "diagonal", "krea"])
def test_recipes_are_the_published_settings(
    pipe: SDVGPipeline, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = SDVGPipeline.from_checkpoints(
        base=embedded.WEIGHTS, drafter=pipe.drafter, target=pipe.transformer, scorer=pipe.scorer,
        dtype=torch.float32, recipe=recipe, height=32, width=32, max_sequence_length=24,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    kept = ("sink_frames", "window_frames", "past_weight", "schedule", "commit")
    assert (
        tuple(made.config[name] for name in kept)
        == {
            "self_forcing": (0, 21, 1.0, "self_forcing", "lazy"),
            "longlive": (3, 9, 1.0, "self_forcing", "lazy"),
            "diagonal": (3, 9, 1.0, "diagonal", "lazy"),
            "krea": (0, 6, 0.3, "krea", "recompute:3"),
        }[recipe]
    )
    by_hand = {
        "commit": Recompute(3) if recipe == "krea" else "lazy",
        "schedule": preset(made.config.schedule),
    }
    same = [frames(made, num_blocks=4, **options) for options in ({}, by_hand)]
    assert torch.equal(*same)
    if recipe == "krea":
        # three frames of context and the block: nothing more is kept
        assert made._models["transformer"][1].cache.k.shape[2] == 6 * 4


@pytest.mark.parametrize(
    ("error", "options", "text"),
    [
        (ValueError, {"recipe": "crea"}, "recipe must be one of self_forcing, longlive, diagonal"),
        (TypeError, {"windows": 3}, "windows must be a setting of the pipeline, got 3; they are"),
        (ValueError, {"window_frames": 2}, "window_frames must be at least 3, got 2"),
        (ValueError, {"sink_frames": -3}, "sink_frames must be at least 0, got -3"),
        (ValueError, {"frames_per_block": 0}, "frames_per_block must be at least 1, got 0"),
        (TypeError, {"frames_per_block": "3"}, "frames_per_block must be an integer, got '3'"),
        (TypeError, {"height": 480.0}, "height must be an integer, got 480.0"),
        (ValueError, {"past_weight": 0}, r"past_weight must lie in \(0, 1\], got 0"),
        (ValueError, {"schedule": "fast"}, "preset must be one of"),
        (ValueError, {"commit": "late"}, "commit: must be lazy, eager or"),
        (ValueError, {"device": "cuda:99"}, "device must be on a device of this machine"),
        (ValueError, {"drafter_device": "gpu"}, "drafter_device must be on a device of this mach"),
        (ValueError, {"drafter_lora": "x.pt"}, "drafter_lora must come with a file or folder as"),
        (ValueError, {}, "base must be a folder, or owner/name on the Hub, got 'nowhere'"),
        (ValueError, {"base": embedded.WEIGHTS / "vae"}, "base must hold the folders tokenizer"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_recipe_or_setting_is_named_before_anything_is_loaded(
    error: type[Exception], options: dict[str, object], text: str
) -> None:
    with pytest.raises(error, match=text):
        SDVGPipeline.from_checkpoints(**({"base": "nowhere"} | options))


@pytest.mark.parametrize("how", ["no folder", "empty", "broken", "scorer"])
def test_a_folder_that_is_no_pipelines_is_named(tmp_path: Path, how: str) -> None:
    """They were errors of the Hub's client, of pathlib, of json and of safetensors."""
    index, scorer = tmp_path / "model_index.json", tmp_path / "scorer"
    texts = {
        "no folder": "folder must be a folder, or owner/name on the Hub",
        "empty": "model_index.json must be a file of JSON, got nothing of that name",
        "broken": "model_index.json must be JSON, got Expecting",
        "scorer": "digits_reward: .*model.safetensors must be a whole .safetensors file",
    }
    if how == "broken":
        index.write_text("{")
    if how == "scorer":
        shutil.copytree(embedded.WEIGHTS / "scorer", scorer)
        (scorer / "model.safetensors").write_bytes(b"short")
        shutil.copy(embedded.WEIGHTS / "model_index.json", index)
    with pytest.raises(ValueError, match=texts[how]):
        SDVGPipeline.from_pretrained(tmp_path / "missing" if how == "no folder" else tmp_path)


def test_an_interrupted_call_leaves_the_pipeline_whole(pipe: SDVGPipeline) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    mine = frames(pipe)
    with pytest.raises(KeyboardInterrupt):
        frames(pipe, callback_on_block_end=interrupt)
    assert torch.equal(frames(pipe), mine)


def test_a_copied_pipeline_runs_apart(pipe: SDVGPipeline) -> None:
    mine = frames(pipe)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(frames(other), mine)
        assert other._models["transformer"][1].transformer is other.transformer
    assert torch.equal(frames(pipe), mine)


def test_a_summary_prints_as_a_sentence(pipe: SDVGPipeline) -> None:
    frames(pipe)
    first, second = str(pipe.summary()).splitlines()
    wanted = (
        r"21 frames in [\d.]+ s \([\d.]+ frames/s\), first frames after [\d.]+ s, \d+% of the dr"
    )
    assert re.match(wanted, first)
    assert second.startswith("stages: ")
