"""Every layout of a Wan checkpoint, written from a tiny model, loads back to the same output."""

from __future__ import annotations

import io
import json
import os
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdvg.models.checkpoints import config_of, load_transformer, read_tensors

diffusers = pytest.importorskip("diffusers", reason="the Wan classes are diffusers'")
Wan = diffusers.WanTransformer3DModel

# one head of Wan's width
SIZES = {
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
}
Weights = dict[str, Tensor]


def wan(**sizes: object) -> nn.Module:
    """A random model whose biases and norms are random too."""
    torch.manual_seed(0)
    model = Wan(**(SIZES | sizes))
    for value in model.parameters():
        nn.init.normal_(value, std=0.1)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return wan()


def wan_name(name: str) -> str:
    """Wan's own name of a tensor, from diffusers'; the loader's table is not looked at."""
    rules = (
        (r"^scale_shift_table", "head.modulation"),
        (r"scale_shift_table", "modulation"),
        (r"proj_out", "head.head"),
        (r"condition_embedder\.(time|text)_embedder\.linear_1", r"\1_embedding.0"),
        (r"condition_embedder\.(time|text)_embedder\.linear_2", r"\1_embedding.2"),
        (r"condition_embedder\.time_proj", "time_projection.1"),
        (r"attn1\.", "self_attn."),
        (r"attn2\.", "cross_attn."),
        (r"attn\.to_out\.0", "attn.o"),
        (r"attn\.to_(.)", r"attn.\1"),
        (r"ffn\.net\.0\.proj", "ffn.0"),
        (r"ffn\.net\.2", "ffn.2"),
        (r"norm2", "norm3"),
    )
    for pattern, other in rules:
        name = re.sub(pattern, other, name)
    return name


def plain(model: nn.Module, prefix: str = "") -> Weights:
    return {prefix + wan_name(name): value for name, value in model.state_dict().items()}


def fsdp(weights: Weights) -> Weights:
    """What FSDP around each block and activation checkpointing make of the names."""
    pattern, wrapped = r"(blocks\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module."
    return {
        "model._fsdp_wrapped_module." + re.sub(pattern, wrapped, name): value
        for name, value in weights.items()
    }


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = model.proj_out.weight
    latents = torch.randn(2, 4, 3, 4, 6, generator=generator).to(weight.dtype)
    text = torch.randn(2, 5, 16, generator=generator).to(weight.dtype)
    steps = torch.tensor([937.5, 0.0])
    return model(latents, steps, text, return_dict=False)[0]


def same(path: Path, model: nn.Module) -> bool:
    loaded = load_transformer(path, dtype=torch.float32)
    assert not any(value.is_meta for value in [*loaded.parameters(), *loaded.buffers()])
    return torch.equal(output(loaded), output(model))


def shards(folder: Path, weights: Weights, name: str = "diffusion_pytorch_model") -> Path:
    """Write three files and their index."""
    folder.mkdir(exist_ok=True)
    names, index = list(weights), {}
    for i in range(3):
        file = f"{name}-{i + 1:05}-of-00003.safetensors"
        save_file({key: weights[key].contiguous() for key in names[i::3]}, folder / file)
        index |= dict.fromkeys(names[i::3], file)
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


LAYOUTS: dict[str, Callable[[Path, nn.Module], Path]] = {}


def layout(write: Callable[[Path, nn.Module], Path]) -> Callable[[Path, nn.Module], Path]:
    LAYOUTS[write.__name__.removeprefix("write_")] = write
    return write


def junk(model: nn.Module) -> Weights:
    return {name: torch.zeros_like(value) for name, value in plain(model, "model.").items()}


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


@layout
def write_plain_safetensors(folder: Path, model: nn.Module) -> Path:
    save_file(plain(model), folder / "wan.safetensors")
    return folder / "wan.safetensors"


@layout
def write_plain_pth(folder: Path, model: nn.Module) -> Path:
    return saved(folder / "wan.pth", plain(model))


@layout
def write_wan_folder(folder: Path, model: nn.Module) -> Path:
    shards(folder / "wan", plain(model))
    # as Wan's repository: other models beside it, a config of its own keys
    torch.save({"x": torch.zeros(1)}, folder / "wan" / "Wan2.1_VAE.pth")
    config = {"_class_name": "WanModel", "dim": 128, "num_heads": 1}
    (folder / "wan" / "config.json").write_text(json.dumps(config))
    return folder / "wan"


@layout
def write_self_forcing_ema(folder: Path, model: nn.Module) -> Path:
    return saved(
        folder / "self_forcing_dmd.pt",
        {"generator": junk(model), "generator_ema": plain(model, "model."), "critic": junk(model)},
    )


@layout
def write_self_forcing(folder: Path, model: nn.Module) -> Path:
    return saved(folder / "model.pt", {"generator": plain(model, "model."), "step": 3})


@layout
def write_self_forcing_sft(folder: Path, model: nn.Module) -> Path:
    save_file(plain(model, "model."), folder / "self_forcing_dmd.sft")
    return folder / "self_forcing_dmd.sft"


@layout
def write_krea(folder: Path, model: nn.Module) -> Path:
    save_file(plain(model, "model."), folder / "krea-realtime-video-14b.safetensors")
    return folder / "krea-realtime-video-14b.safetensors"


@layout
def write_fsdp(folder: Path, model: nn.Module) -> Path:
    return saved(folder / "longlive_base.pt", {"generator": fsdp(plain(model))})


@layout
def write_compiled(folder: Path, model: nn.Module) -> Path:
    return saved(folder / "compiled.pt", {"state_dict": plain(model, "module._orig_mod.")})


@layout
def write_anyflow(folder: Path, model: nn.Module) -> Path:
    return saved(folder / "anyflow.pt", {"ema": dict(model.state_dict()), "step": 3})


@layout
def write_comfy(folder: Path, model: nn.Module) -> Path:
    save_file(plain(model, "model.diffusion_model."), folder / "comfy.safetensors")
    return folder / "comfy.safetensors"


@layout
def write_diffusers(folder: Path, model: nn.Module) -> Path:
    model.save_pretrained(folder / "transformer")
    return folder / "transformer"


@layout
def write_diffusers_shards(folder: Path, model: nn.Module) -> Path:
    model.save_pretrained(folder / "transformer", max_shard_size="500KB")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 1
    return folder / "transformer"


@layout
def write_krea_diffusers_shards(folder: Path, model: nn.Module) -> Path:
    # a diffusers folder whose model is Wan's own class
    return shards(folder / "transformer", plain(model))


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_loads_back_to_the_same_output(
    tmp_path: Path, model: nn.Module, name: str
) -> None:
    assert same(LAYOUTS[name](tmp_path, model), model)


def test_names_are_what_diffusers_own_converter_says(model: nn.Module, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    converted = convert_wan_transformer_to_diffusers(plain(model))
    assert converted.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(converted[name], value)


def test_another_width_of_heads_comes_from_the_config(tmp_path: Path) -> None:
    small = wan(num_attention_heads=2, attention_head_dim=16)
    small.save_pretrained(tmp_path / "transformer")
    assert same(tmp_path / "transformer", small)
    shards(tmp_path / "wan", plain(small))
    (tmp_path / "wan" / "config.json").write_text('{"dim": 32, "num_heads": 2}')
    assert same(tmp_path / "wan", small)


KINDS = {
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "5B": {
        "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30,
        "in_channels": 48, "out_channels": 48,
    },
    "14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_published_sizes_are_read_off_the_shapes(kind: str) -> None:
    with torch.device("meta"):
        full = Wan(**KINDS[kind])
    found = config_of({name: tuple(value.shape) for name, value in full.named_parameters()})
    assert found == {name: full.config[name] for name in found}
    assert {**full.config, **found} == dict(full.config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_are_those_of_from_pretrained(
    tmp_path: Path, model: nn.Module, dtype: torch.dtype
) -> None:
    path = write_diffusers(tmp_path, model)
    loaded = load_transformer(path, dtype=dtype)
    if dtype == torch.float64:
        # where diffusers keeps some modules narrow
        assert {value.dtype for value in loaded.parameters()} == {dtype}
        return
    expected = Wan.from_pretrained(path, dtype=dtype)
    for (name, value), other in zip(loaded.named_parameters(), expected.parameters(), strict=True):
        assert value.dtype == other.dtype, name
        assert torch.equal(value, other), name
    assert torch.equal(output(loaded), output(expected.eval()))


def test_it_is_ready_for_inference_and_keeps_no_file_open(tmp_path: Path, model: nn.Module) -> None:
    path = write_krea(tmp_path, model)
    loaded = load_transformer(path, dtype=torch.float32)
    before = output(loaded)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(output(loaded), before)
    assert not loaded.training
    assert not any(value.requires_grad for value in loaded.parameters())


def test_it_saves_and_loads_as_a_diffusers_model(tmp_path: Path, model: nn.Module) -> None:
    load_transformer(write_krea(tmp_path, model), dtype=torch.float32).save_pretrained(
        tmp_path / "again"
    )
    assert torch.equal(output(Wan.from_pretrained(tmp_path / "again").eval()), output(model))


RANK = 3


def updates(model: nn.Module, form: str) -> Weights:
    """peft's tensors of a random update of every linear layer in the blocks."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, nn.Linear):
            own = form.format(name if "diffusers" in form else wan_name(name)).split("diffusers")[
                -1
            ]
            size = (RANK, module.in_features), (module.out_features, RANK)
            for part, shape in zip("AB", size, strict=True):
                found[own.replace("?", part)] = 0.3 * torch.randn(shape, generator=generator)
    assert len(found) == 2 * 2 * 10
    return found


FORMS = (
    "base_model.model.{}.lora_?.weight",
    "base_model.model.{}.lora_?.default.weight",
    "_fsdp_wrapped_module.base_model.model._orig_mod.{}.lora_?.weight",
    "diffusion_model.{}.lora_?.weight",
    "diffuserstransformer.{}.lora_?.weight",
)


def unmerged(model: nn.Module, tensors: Weights, form: str, scale: float) -> Tensor:
    """The output with each update beside its layer, as peft runs it."""
    hooks = []
    for name, module in model.blocks.named_modules(prefix="blocks"):
        if isinstance(module, nn.Linear):
            own = form.format(name if "diffusers" in form else wan_name(name)).split("diffusers")[
                -1
            ]
            down, up = (tensors[own.replace("?", part)] for part in "AB")

            def add(
                _: nn.Module, args: tuple[Tensor], out: Tensor, down: Tensor = down, up: Tensor = up
            ) -> Tensor:
                return out + scale * (args[0] @ down.T @ up.T)

            hooks.append(module.register_forward_hook(add))
    try:
        return output(model)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_a_merged_update_does_what_an_unmerged_one_does(
    tmp_path: Path, model: nn.Module, form: str, alpha: float | None
) -> None:
    tensors = updates(model, form)
    base = saved(tmp_path / "longlive_base.pt", {"generator": plain(model, "model.")})
    lora = saved(tmp_path / "lora.pt", {"generator_lora": tensors, "critic_lora": {}})
    loaded = load_transformer(base, lora=lora, lora_alpha=alpha, dtype=torch.float32)
    scale = 1.0 if alpha is None else alpha / RANK
    expected = unmerged(model, tensors, form, scale)
    torch.testing.assert_close(output(loaded), expected, atol=1e-4, rtol=1e-4)
    assert (expected - output(model)).abs().max() > 0.05


def told_by_peft(folder: Path, tensors: Weights, settings: dict[str, object]) -> Path:
    """Write what peft's `save_pretrained` does."""
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK} | settings))
    return folder


def told_by_diffusers(folder: Path, tensors: Weights, settings: dict[str, object]) -> Path:
    """Write what diffusers' `save_lora_weights` does."""
    note = {f"transformer.{name}": value for name, value in ({"r": RANK} | settings).items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(note)}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata=header)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 1.5}, 0.5),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / RANK**0.5),
        ({"lora_alpha": 1.5, "alpha_pattern": {}, "use_rslora": False}, 0.5),
        ({}, 1.0),
    ],
)
@pytest.mark.parametrize("tell", [told_by_peft, told_by_diffusers])
def test_an_update_says_its_own_scale(
    tmp_path: Path,
    model: nn.Module,
    tell: Callable[..., Path],
    settings: dict[str, object],
    scale: float,
) -> None:
    """Updates that say an alpha of their own were merged as if it was their rank."""
    tensors = updates(model, FORMS[0])
    lora = tell(tmp_path, tensors, settings)
    base = write_diffusers(tmp_path, model)
    expected = unmerged(model, tensors, FORMS[0], scale)
    loaded = load_transformer(base, lora=lora, dtype=torch.float32)
    torch.testing.assert_close(output(loaded), expected, atol=1e-4, rtol=1e-4)
    # what is given goes before it, and a folder serves as the file in it
    again = load_transformer(base, lora=tmp_path, lora_alpha=scale * RANK, dtype=torch.float32)
    torch.testing.assert_close(output(again), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tell", [told_by_peft, told_by_diffusers])
@pytest.mark.parametrize("settings", [{"alpha_pattern": {"to_q": 3}}, {"lora_alpha": "much"}])
def test_an_update_of_several_scales_is_refused(
    tmp_path: Path, model: nn.Module, tell: Callable[..., Path], settings: dict[str, object]
) -> None:
    lora = tell(tmp_path, updates(model, FORMS[0]), settings)
    with pytest.raises(ValueError, match=r"must have one lora_alpha for all layers, got lora_al"):
        load_transformer(write_krea(tmp_path, model), lora=lora)
    for folder in (tmp_path / "transformer", tmp_path / "nothing"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"hold adapter_model.safetensors or .*, got neither"):
            load_transformer(write_krea(tmp_path, model), lora=folder)


def trainer_lora(folder: Path, model: nn.Module) -> dict[str, Path]:
    """LongLive's base, and an update as Diagonal Distillation's trainer saves it."""
    critic = {name: torch.ones(2, 2) for name in ("a.lora_A.weight", "a.lora_B.weight")}
    kept = {"generator_lora": updates(model, FORMS[0]), "critic_lora": critic, "step": 3500}
    base = {"generator": plain(model, "model."), "critic": junk(model), "step": 700}
    return {
        "path": saved(folder / "longlive_base.pt", base),
        "lora": saved(folder / "model.pt", kept),
    }


def trainer_diffusers(folder: Path, model: nn.Module) -> dict[str, Path]:
    """The same update in diffusers' names, on diffusers' folder."""
    lora = updates(model, FORMS[-1])
    save_file(lora, folder / "pytorch_lora_weights.safetensors")
    return {"path": write_diffusers(folder, model), "lora": folder}


def trainer_whole(folder: Path, model: nn.Module) -> dict[str, Path]:
    """What the trainer saves without low-rank updates: optimizers and the critic beside it."""
    weights = dict(model.state_dict())
    for name, value in model.blocks.named_modules(prefix="blocks"):
        if isinstance(value, nn.Linear):
            down, up = (updates(model, "{}.?")[f"{wan_name(name)}.{part}"] for part in "AB")
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + up @ down
    merged = {wan_name(name): value for name, value in weights.items()}
    state = {name: {"exp_avg": value, "step": torch.tensor(3.0)} for name, value in merged.items()}
    whole = {
        "generator": {f"model.{name}": value for name, value in merged.items()},
        "critic": junk(model),
        "generator_optimizer": {"state": state, "param_groups": [{"lr": 1e-5, "betas": (0, 0.9)}]},
        "critic_optimizer": None,
        "step": 3500,
    }
    return {"path": saved(folder / "model.pt", whole)}


@pytest.mark.parametrize("write", [trainer_lora, trainer_diffusers, trainer_whole])
def test_what_diagonal_distillation_trains_loads_from_every_file(
    tmp_path: Path, model: nn.Module, write: Callable[[Path, nn.Module], dict[str, Path]]
) -> None:
    loaded = load_transformer(**write(tmp_path, model), dtype=torch.float32)
    expected = unmerged(model, updates(model, FORMS[0]), FORMS[0], 1.0)
    torch.testing.assert_close(output(loaded), expected, atol=1e-4, rtol=1e-4)


def test_an_update_is_added_before_the_cast(tmp_path: Path, model: nn.Module) -> None:
    tensors = updates(model, FORMS[0])
    save_file(tensors, tmp_path / "lora.safetensors")
    loaded = load_transformer(write_krea(tmp_path, model), lora=tmp_path / "lora.safetensors")
    name = "base_model.model.blocks.1.ffn.0.lora_{}.weight"
    change = tensors[name.format("B")] @ tensors[name.format("A")]
    expected = (model.blocks[1].ffn.net[0].proj.weight + change).bfloat16()
    assert torch.equal(loaded.blocks[1].ffn.net[0].proj.weight, expected)


class Runs:
    """Would run code where a pickle is trusted."""

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.system, ("echo this must never be seen",)


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def changed(folder: Path, model: nn.Module, change: Callable[[Weights], object]) -> Path:
    weights = plain(model)
    change(weights)
    save_file(weights, folder / "changed.safetensors")
    return folder / "changed.safetensors"


def reshape(weights: Weights) -> None:
    weights["blocks.1.ffn.2.weight"] = torch.zeros(96, 128)


def drop_block(weights: Weights) -> None:
    for name in [name for name in weights if name.startswith("blocks.0.cross_attn")]:
        del weights[name]


def image(weights: Weights) -> None:
    weights["img_emb.proj.1.weight"] = torch.zeros(2)


def flatten(weights: Weights) -> None:
    weights["patch_embedding.weight"] = torch.zeros(128, 16)


def overlapping(folder: Path, model: nn.Module) -> Path:
    save_file(plain(model), folder / "diffusion_pytorch_model-00001-of-00003.safetensors")
    return folder


def tell(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text)
    return folder


def emptied(folder: Path) -> Path:
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    return folder


def nested() -> dict[str, object]:
    found: dict[str, object] = {}
    found["model"] = found
    return found


MALFORMED: dict[str, tuple[Callable[[Path, nn.Module], Path], str]] = {
    "nothing there": (lambda f, m: f / "no", "be a file or a folder of weights, got nothing"),
    "an empty folder": (lambda f, m: f, "hold .safetensors files, got none"),
    "a pipeline": (
        lambda f, m: (f / "model_index.json").write_text("{}") and f,
        "be a transformer's folder, got a whole pipeline's; give its transformer/",
    ),
    "a cut safetensors": (
        lambda f, m: cut(write_krea(f, m), 9000),
        "be a whole .safetensors file or a zip that torch.save wrote, got one that does not open (",
    ),
    "a cut pt": (
        lambda f, m: cut(write_fsdp(f, m), 90000),
        "be a whole file of torch.save's, got one that does not open (",
    ),
    "text": (
        lambda f, m: (f / "x.pt").write_text("version https://git-lfs.github.com") and f / "x.pt",
        "be a whole .safetensors file or a zip that torch.save wrote, got one that does not open (",
    ),
    "code": (
        lambda f, m: saved(f / "x.pt", {"generator": plain(m), "hook": Runs()}),
        "hold tensors and plain containers alone, got a pickle that needs posix.system",
    ),
    "a list": (lambda f, m: saved(f / "x.pt", [torch.zeros(2)]), "hold tensors by name, got list"),
    "itself": (lambda f, m: saved(f / "x.pt", nested()), "hold tensors alone, got model: dict"),
    "an optimizer": (
        lambda f, m: saved(f / "x.pt", {"optimizer": {"lr": 1.0}}),
        "hold tensors alone, got optimizer: dict",
    ),
    "another model": (
        lambda f, m: saved(f / "x.pt", {"layers.0.q_proj.weight": torch.zeros(4, 4)}),
        "hold a Wan transformer's patch_embedding.weight, got 1 tensors without it "
        "(as layers.0.q_proj.weight)",
    ),
    "no feed-forward": (
        lambda f, m: changed(f, m, lambda w: w.pop("blocks.0.ffn.0.weight")),
        "hold a Wan transformer's blocks.0.ffn.net.0.proj.weight, got 68 tensors without it",
    ),
    "missing": (
        lambda f, m: changed(f, m, drop_block),
        "hold the 69 tensors of a Wan transformer, got 10 missing (blocks.0.attn2.to_q.weight, "
        "blocks.0.attn2.to_q.bias, blocks.0.attn2.to_k.weight and 7 more)",
    ),
    "too many": (
        lambda f, m: changed(f, m, lambda w: w.update({"vace.0.q": torch.zeros(2)})),
        "hold the 69 tensors of a Wan transformer, got 1 unknown (vace.0.q)",
    ),
    "misshapen": (
        lambda f, m: changed(f, m, reshape),
        "got 1 misshapen (blocks.1.ffn.net.2.weight [96, 128] for [128, 96])",
    ),
    "image-to-video": (
        lambda f, m: changed(f, m, image),
        "be a text-to-video model, got one with image projections (img_emb.proj.1.weight)",
    ),
    "quantized": (
        lambda f, m: changed(f, m, lambda w: w.update(x=torch.zeros(2).to(torch.float8_e4m3fn))),
        "hold 16-bit or wider floats, got x in torch.float8_e4m3fn; give the weights before",
    ),
    "twice": (
        lambda f, m: saved(f / "x.pt", plain(m) | plain(m, "model.")),
        "hold each tensor once, got scale_shift_table twice, the second as model.head.modulation",
    ),
    "twice in two files": (
        lambda f, m: overlapping(shards(f / "w", plain(m)), m),
        "hold each tensor once, got ",
    ),
    "a shard gone": (
        lambda f, m: emptied(shards(f / "w", plain(m))),
        "hold the 3 files of its index, got no diffusion_pytorch_model-00002-of-00003.safetensors",
    ),
    "a broken config": (
        lambda f, m: tell(shards(f / "w", plain(m)), "{"),
        "config.json must be JSON, got ",
    ),
    "other heads": (
        lambda f, m: tell(shards(f / "w", plain(m)), '{"attention_head_dim": 48}'),
        "have whole attention heads, got 128 channels for 48 a head",
    ),
    "no number of heads": (
        lambda f, m: tell(shards(f / "w", plain(m)), '{"attention_head_dim": "all"}'),
        "have whole attention heads, got 128 channels for all a head",
    ),
    "flat patches": (
        lambda f, m: changed(f, m, flatten),
        "hold a Wan transformer's tensors, got other shapes",
    ),
}  # fmt: skip


def one_sentence(text: str, path: Path) -> bool:
    return (
        text.startswith("checkpoints: ") and "\n" not in text and len(text) < 400 + len(str(path))
    )


@pytest.mark.parametrize("name", MALFORMED)
def test_each_malformed_checkpoint_is_one_clear_sentence(
    tmp_path: Path, model: nn.Module, name: str, capfd: pytest.CaptureFixture
) -> None:
    write, said = MALFORMED[name]
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        load_transformer(write(tmp_path, model))
    assert one_sentence(str(error.value), tmp_path), error.value
    assert "never be seen" not in capfd.readouterr().out


def damaged_safetensors(raw: bytes, chance: random.Random) -> bytes:
    found = bytearray(raw)
    for _ in range(chance.randint(1, 4)):
        found[chance.randrange(len(found))] = chance.randrange(256)
    return bytes(found[: chance.randrange(len(found))] if chance.random() < 0.2 else found)


def damaged_pt(raw: bytes, chance: random.Random) -> bytes:
    """The same zip, whole, around a pickle with wrong bytes."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            found = bytearray(old.read(name))
            if name.endswith("data.pkl"):
                for _ in range(chance.randint(1, 3)):
                    found[chance.randrange(len(found))] = chance.randrange(256)
            new.writestr(name, bytes(found))
    return made.getvalue()


@pytest.mark.parametrize("damage", [damaged_safetensors, damaged_pt])
def test_a_damaged_file_never_fails_in_another_way(
    tmp_path: Path, damage: Callable[[bytes, random.Random], bytes]
) -> None:
    path, weights = tmp_path / "x", {f"model.blocks.{i}.modulation": torch.ones(2) for i in "01"}
    save_file(weights, path) if damage is damaged_safetensors else saved(path, weights)
    raw, chance, said = path.read_bytes(), random.Random(0), []
    for _ in range(300):
        path.write_bytes(damage(raw, chance))
        try:
            read_tensors(path)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 100
    assert all(one_sentence(text, tmp_path) for text in said)


def lora_of(change: Callable[[Weights], object]) -> Callable[[nn.Module], Weights]:
    def build(model: nn.Module) -> Weights:
        tensors = updates(model, FORMS[0])
        change(tensors)
        return tensors

    return build


FIRST = "base_model.model.blocks.0.self_attn.q.lora_{}.weight"
PATCH = "patch_embedding.lora_{}.weight"
MALFORMED_UPDATES: dict[str, tuple[Callable[[Weights], object], str]] = {
    "one half": (
        lambda w: w.pop(FIRST.format("A")),
        "hold lora_A and lora_B of each weight, got one of them (blocks.0.attn1.to_q.weight)",
    ),
    "another layer": (
        lambda w: w.update({FIRST.format("A").replace("blocks.0", "blocks.7"): torch.zeros(3, 3)}),
        "change weights of the model, got 1 it lacks (blocks.7.attn1.to_q.weight)",
    ),
    "another shape": (
        lambda w: w.update({FIRST.format("A"): torch.zeros(RANK, 64)}),
        "multiply to the weights' shapes, got [128, 3] x [3, 64] for [128, 128] (blocks.0",
    ),
    "another rank": (
        lambda w: w.update({FIRST.format("A"): torch.zeros(5, 128)}),
        "multiply to the weights' shapes, got [128, 3] x [5, 128] for [128, 128] (blocks.0",
    ),
    # these two were merged without a word
    "nothing": (lambda w: w.clear(), "hold lora_A and lora_B weights, got none"),
    "no rank": (
        lambda w: w.update(
            {FIRST.format("A"): torch.zeros(0, 128), FIRST.format("B"): torch.zeros(128, 0)}
        ),
        "multiply to the weights' shapes, got [128, 0] x [0, 128] for [128, 128] (blocks.0",
    ),
    "a scalar": (
        lambda w: w.update({FIRST.format("A"): torch.zeros(())}),
        "multiply to the weights' shapes, got [128, 3] x [] for [128, 128] (blocks.0",
    ),
    "a convolution": (
        lambda w: w.update(dict.fromkeys(map(PATCH.format, "AB"), torch.zeros(3, 3))),
        "multiply to the weights' shapes, got [3, 3] x [3, 3] for [128, 4, 1, 2, 2] (patch_emb",
    ),
    "another method": (
        lambda w: w.update({"blocks.0.self_attn.q.diff": torch.zeros(2)}),
        "hold lora_A and lora_B weights alone, got blocks.0.attn1.to_q.diff",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED_UPDATES)
def test_each_malformed_update_is_one_clear_sentence(
    tmp_path: Path, model: nn.Module, name: str
) -> None:
    change, said = MALFORMED_UPDATES[name]
    lora = saved(tmp_path / "lora.pt", {"generator_lora": lora_of(change)(model)})
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        load_transformer(write_krea(tmp_path, model), lora=lora)
    assert one_sentence(str(error.value), tmp_path), error.value


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16"])
def test_another_dtype_is_named(tmp_path: Path, model: nn.Module, dtype: object) -> None:
    with pytest.raises(TypeError, match="dtype must be one of torch's float32, float16, bfloat16"):
        load_transformer(write_krea(tmp_path, model), dtype=dtype)


def test_a_missing_update_file_is_named(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"no\.pt must be a file of weights, got nothing"):
        load_transformer(write_krea(tmp_path, model), lora=tmp_path / "no.pt")


def peak(work: Callable[[], object]) -> int:
    """Bytes of resident memory, mapped files included, that `work` needed at most at once."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(field: str) -> int:
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", status.read_text())[1])

    try:
        # the peak so far is forgotten
        reset.write_text("5")
        start = read("VmRSS")
        assert read("VmHWM") - start < 1e6
    except (OSError, AssertionError):
        pytest.skip("this system does not let a process reset its peak of memory")
    work()
    return read("VmHWM") - start


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_loading_peaks_at_the_model_and_one_shard(tmp_path: Path, form: str) -> None:
    big = Wan(**(SIZES | {"num_attention_heads": 4, "ffn_dim": 1024, "num_layers": 4}))
    size = sum(4 * value.numel() for value in big.parameters())
    assert size > 5e7
    if form == "pt":
        path, shard = saved(tmp_path / "big.pt", {"generator": plain(big, "model.")}), size
    else:
        path = tmp_path / "big"
        big.save_pretrained(path, max_shard_size="7MB")
        shard = max(file.stat().st_size for file in path.glob("*.safetensors"))
        assert shard < size / 5
    # all the same but the sizes: what the first call alone needs is not counted
    load_transformer(write_krea(tmp_path, wan()))
    # in bfloat16, half of what the file holds
    assert peak(lambda: load_transformer(path)) < size / 2 + shard + 5e6
