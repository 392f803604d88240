"""Wan transformers out of the files that people have, whatever they call the tensors in them.

Plain Wan, Self-Forcing, Krea Realtime and LongLive keep the same tensors under Wan's own names
(`blocks.0.self_attn.q.weight`), with or without a wrapper's prefix; diffusers has names of its own
(`blocks.0.attn1.to_q.weight`). Names are cleaned and translated one by one, sizes are read off the
shapes, and each tensor goes straight to its place on the device.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

# what a training script's file holds its weights under, the first one found counts
_HOLDERS = ("generator_ema", "generator", "ema", "generator_lora", "state_dict", "model")
# what FSDP, activation checkpointing and torch.compile put between modules
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_PREFIXES = ("model.", "module.", "diffusion_model.", "base_model.", "transformer.", "generator.")

# Wan's name -> diffusers'; the affine one of three norms is Wan's third and diffusers' second
_TOP = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
} | {
    f"{wan}.{part}": f"{own}.{other}"
    for wan, own in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, other in {
        "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0",
        "norm_q": "norm_q", "norm_k": "norm_k",
    }.items()
}  # fmt: skip

# of every Wan; no shape tells it
_HEAD_DIM = 128
# tensors of image conditioning, in either naming
_IMAGE = ("img_emb", "image_embedder", "k_img", "add_k_proj")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# what peft and diffusers call an update in a folder, and the latter's key in its header
_LORA_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_LORA_HEADER = "lora_adapter_metadata"
# how many names an error shows
_SHOWN = 3


class _Update(NamedTuple):
    """A low-rank change of one weight: `scale * up @ down`."""

    # [r, in], [out, r]
    down: Tensor
    up: Tensor
    scale: float


def load_transformer(
    path: str | Path,
    *,
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> WanTransformer3DModel:
    """The Wan transformer in ``path``, in eval mode, on ``device`` in ``dtype``.

    As `WanTransformer3DModel.from_pretrained`, a half-precision model keeps in float32 the modules
    that diffusers lists (norms, modulation tables, the timestep's embedding).

    Args:
        path: a `.safetensors` or `.pt` file, or a folder with `.safetensors` shards, under Wan's
            names or diffusers'. A `.pt` is read as data only: no code in it runs. Of several sets
            of weights in it, `generator_ema` goes before `generator`, and both before `ema`.
        lora: a file of low-rank updates (peft's names), merged in float32 before the cast; or a
            folder that peft or diffusers saved one in.
        lora_alpha: their scale is `lora_alpha / rank`. None: as `adapter_config.json` beside peft's
            `adapter_model.safetensors`, or diffusers' note in the file's header, has it; without
            either 1, as LongLive and Diagonal Distillation train (alpha 256, rank 256).
        dtype: float32, float16, bfloat16 or float64.
        device: where it lies; tensors go there one by one.

    Raises:
        ImportError: diffusers is missing.
        TypeError: another dtype.
        ValueError: a file that is missing, broken, or not such a model's, in one sentence, which
            counts the tensors that are missing, left over or of another shape, and names some.

    Cost: beside the model itself, one shard of the file, as pages that the system can drop.
    """
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise ImportError(
            "checkpoints: the model needs diffusers: pip install 'sdvg[diffusers]'"
        ) from error

    if dtype not in _DTYPES:
        names = ", ".join(str(each).removeprefix("torch.") for each in _DTYPES)
        raise TypeError(f"checkpoints: dtype must be one of torch's {names}, got {dtype!r}")
    path = Path(path)
    files = _files(path)
    shapes: dict[str, list[int]] = {}
    for file in files:
        for name, value in _read(file).items():
            if name in shapes:
                raise _error(path, "hold each tensor once", f"{name} twice")
            shapes[name] = list(value.shape)
    with torch.device("meta"):
        model = WanTransformer3DModel(**_config(path, shapes))
    wanted = dict(model.named_parameters())
    sizes = {name: list(value.shape) for name, value in wanted.items()}
    require_same(path, "a Wan transformer", sizes, shapes)
    updates = {} if lora is None else _read_lora(Path(lora), lora_alpha, wanted)

    narrow = dtype in (torch.float16, torch.bfloat16)
    kept = set(model._keep_in_fp32_modules or ()) if narrow else set()
    wide = torch.promote_types(dtype, torch.float32)
    for file in files:
        for name, value in _read(file).items():
            own = torch.float32 if kept.intersection(name.split(".")) else dtype
            if (update := updates.get(name)) is not None:
                value, down, up = (
                    part.to(device, wide) for part in (value, update.down, update.up)
                )
                value = value.addmm(up, down, alpha=update.scale)
            # a copy: the file's pages must not stay behind the model
            placed = torch.empty(value.shape, dtype=own, device=device).copy_(value)
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, nn.Parameter(placed))
    # its tables are computed, never saved
    rope = model.rope
    model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len).to(device)
    return model.eval().requires_grad_(False)


def config_of(
    shapes: Mapping[str, Sequence[int]], head_dim: int = _HEAD_DIM
) -> dict[str, int | tuple[int, ...]]:
    """Return the arguments of `WanTransformer3DModel` that tensors of these shapes belong to.

    Args:
        shapes: by diffusers' names; `patch_embedding.weight`, the first layers of the three
            embeddings and of block 0's feed-forward, and `proj_out.weight` are looked at.
        head_dim: channels of an attention head, which no shape tells.

    Raises:
        KeyError: one of them is not there.
        ValueError, IndexError: one of them is no such layer's.
    """
    width, channels, *patch = shapes["patch_embedding.weight"]
    if len(patch) != 3:
        raise ValueError(f"checkpoints: patches must have three sides, got {patch}")
    embedder = "condition_embedder.{}_embedder.linear_1.weight"
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // math.prod(patch),
        "text_dim": shapes[embedder.format("text")][1],
        "freq_dim": shapes[embedder.format("time")][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        # not the highest number: a block that is missing in the middle shall be named
        "num_layers": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
    }


def _error(
    path: Path, rule: str, got: object, remedy: str = "", op: str = "checkpoints"
) -> ValueError:
    return ValueError(f"{op}: {path} must {rule}, got {got}" + (f"; {remedy}" if remedy else ""))


def _files(path: Path) -> list[Path]:
    """Return the files that hold the weights, each of them there."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise _error(path, "be a file or a folder of weights", "nothing of that name")
    if (path / "model_index.json").is_file():
        raise _error(
            path, "be a transformer's folder", "a whole pipeline's", "give its transformer/"
        )
    for index in sorted(path.glob("*.safetensors.index.json")):
        found = read_json(index).get("weight_map")
        if not isinstance(found, dict) or not found:
            raise _error(index, "map tensors to files", "no weight_map")
        files = [path / name for name in sorted(set(map(str, found.values())))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise _error(path, f"hold the {len(files)} files of its index", f"no {_some(missing)}")
        return files
    whole = path / "diffusion_pytorch_model.safetensors"
    files = [whole] if whole.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise _error(path, "hold .safetensors files", "none")
    return files


def read_json(path: Path, op: str = "checkpoints") -> dict[str, object]:
    """Return a file's JSON object; ValueError in one sentence, which begins with `op`, for none."""
    if not path.is_file():
        raise _error(path, "be a file of JSON", "nothing of that name", op=op)
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _error(path, "be JSON", error, op=op) from error
    if not isinstance(found, dict):
        raise _error(path, "be a JSON object", type(found).__name__, op=op)
    return found


def read_tensors(path: Path, op: str = "checkpoints") -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` or `.pt` file by name; no code in it runs.

    They lie in the mapped file, not in memory: copy what shall outlive it. Raises ValueError in one
    sentence, which begins with `op`, for a file that is missing, broken or holds anything else.
    """
    if not path.is_file():
        raise _error(path, "be a file of weights", "nothing of that name", op=op)
    # by content: Self-Forcing's safetensors file ends in .sft
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    tensors = (_unpickle if zipped else _read_safetensors)(path, op)
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise _error(path, "hold tensors alone", f"{name}: {type(value).__name__}", op=op)
    return tensors


def _read_safetensors(path: Path, op: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        rule = "be a whole .safetensors file or a zip that torch.save wrote"
        raise _error(path, rule, f"one that does not open ({str(error)[:120]})", op=op) from error


def _unpickle(path: Path, op: str) -> dict[str, Tensor]:
    """Return the weights in what `torch.save` wrote."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # a damaged pickle fails in any way
    except Exception as error:
        if needed := re.search(r"GLOBAL ([\w.]+)", str(error)):
            got = f"a pickle that needs {needed[1]}"
            raise _error(path, "hold tensors and plain containers alone", got, op=op) from error
        reason = re.split(r"[.:]?\s*\n|[.] ", str(error))[0][:120]
        got = f"one that does not open ({reason})"
        raise _error(path, "be a whole file of torch.save's", got, op=op) from error
    # no file nests deeper, but a pickled dict can hold itself
    for _ in range(4):
        if isinstance(found, Mapping):
            inside = (found[key] for key in _HOLDERS if isinstance(found.get(key), Mapping))
            found = next(inside, found)
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise _error(path, "hold tensors by name", type(found).__name__, op=op)
    return dict(found)


def _read(path: Path) -> dict[str, Tensor]:
    """Return a file's tensors by diffusers' names."""
    tensors: dict[str, Tensor] = {}
    for name, value in read_tensors(path).items():
        if not value.is_floating_point() or value.dtype.itemsize < 2:
            raise _error(
                path, "hold 16-bit or wider floats", f"{name} in {value.dtype}",
                "give the weights before quantization",
            )  # fmt: skip
        own = _rename(name)
        if own in tensors:
            raise _error(path, "hold each tensor once", f"{own} twice, the second as {name}")
        tensors[own] = value
    return tensors


def _rename(name: str) -> str:
    """Return diffusers' name of a tensor or module, given that or Wan's, with any prefixes."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    block = re.match(r"blocks\.\d+\.", name)
    start, table = (block[0], _BLOCK) if block else ("", _TOP)
    rest = name.removeprefix(start)
    module, dot, kind = rest.rpartition(".")
    found = table.get(rest) or (table[module] + dot + kind if module in table else rest)
    return start + found


def _config(path: Path, shapes: dict[str, list[int]]) -> dict[str, object]:
    """Return the model's arguments; a `config.json` beside the weights tells the head's width."""
    if found := [name for name in shapes if any(part in name for part in _IMAGE)]:
        raise _error(path, "be a text-to-video model", f"one with image projections ({found[0]})")
    config = path / "config.json"
    told = read_json(config) if config.is_file() else {}
    head_dim = told.get("attention_head_dim", _HEAD_DIM)
    if "num_heads" in told and "dim" in told:
        head_dim = told["dim"] / (told["num_heads"] or 1)
    width = shapes.get("patch_embedding.weight", [0])[0]
    if not isinstance(head_dim, int | float) or head_dim < 1 or width % head_dim:
        raise _error(path, "have whole attention heads", f"{width} channels for {head_dim} a head")
    try:
        arguments = config_of(shapes, int(head_dim))
    except KeyError as error:
        got = f"{len(shapes)} tensors without it (as {_some(shapes)})"
        raise _error(path, f"hold a Wan transformer's {error.args[0]}", got) from error
    except (IndexError, ValueError) as error:
        raise _error(path, "hold a Wan transformer's tensors", "other shapes") from error
    same = {name: told[name] for name in ("eps", "rope_max_seq_len") if name in told}
    return arguments | same


def require_same(
    path: Path,
    model: str,
    wanted: Mapping[str, list[int]],
    found: Mapping[str, list[int]],
    op: str = "checkpoints",
) -> None:
    """Raise one ValueError unless names and shapes in `path` are those of `model` (its words)."""
    both = [name for name in wanted if name in found and wanted[name] != found[name]]
    differ = {
        "missing": [name for name in wanted if name not in found],
        "unknown": [name for name in found if name not in wanted],
        "misshapen": [f"{name} {found[name]} for {wanted[name]}" for name in both],
    }
    if any(differ.values()):
        got = ", ".join(
            f"{len(names)} {kind} ({_some(names)})" for kind, names in differ.items() if names
        )
        raise _error(path, f"hold the {len(wanted)} tensors of {model}", got, op=op)


def _some(names: Sequence[str] | Mapping[str, object]) -> str:
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _read_lora(path: Path, alpha: float | None, wanted: Mapping[str, Tensor]) -> dict[str, _Update]:
    """Return the update of each weight that `path` changes."""
    if path.is_dir():
        inside = [path / name for name in _LORA_FILES if (path / name).is_file()]
        if not inside:
            raise _error(path, f"hold {' or '.join(_LORA_FILES)}", "neither")
        path = inside[0]
    told = {"lora_alpha": alpha} if alpha is not None else _read_settings(path)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in _read(path).items():
        # peft may name the adapter before the weight: lora_A.default.weight
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight", name)
        if match is None:
            raise _error(path, "hold lora_A and lora_B weights alone", name)
        parts.setdefault(_rename(match[1]) + ".weight", {})[match[2]] = value
    if not parts:
        raise _error(path, "hold lora_A and lora_B weights", "none")
    if unknown := [name for name in parts if name not in wanted]:
        raise _error(
            path, "change weights of the model", f"{len(unknown)} it lacks ({_some(unknown)})"
        )
    if single := [name for name, pair in parts.items() if len(pair) < 2]:
        raise _error(
            path, "hold lora_A and lora_B of each weight", f"one of them ({_some(single)})"
        )
    updates = {}
    for name, pair in parts.items():
        down, up = pair["A"], pair["B"]
        rank, shape = down.shape[:1].numel(), wanted[name].shape
        if (
            not rank
            or len(shape) != 2
            or [*up.shape, *down.shape] != [shape[0], rank, rank, shape[1]]
        ):
            got = f"{list(up.shape)} x {list(down.shape)} for {list(shape)} ({name})"
            raise _error(path, "multiply to the weights' shapes", got)
        scale = 1.0
        if told.get("lora_alpha") is not None:
            # by the root where updates are rank-stabilised (arXiv 2312.03732)
            scale = told["lora_alpha"] / (rank**0.5 if told.get("use_rslora") else rank)
        updates[name] = _Update(down, up, scale)
    return updates


def _read_settings(path: Path) -> dict[str, float]:
    """Return what peft's or diffusers' settings beside or in an update say of its scale."""
    config, found = path.parent / "adapter_config.json", {}
    if path.name == _LORA_FILES[0] and config.is_file():
        path, found = config, read_json(config)
    elif path.is_file() and path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                found = json.loads((file.metadata() or {}).get(_LORA_HEADER, "{}"))
        except (SafetensorError, OSError):
            # what reads the tensors says what is wrong
            return {}
        except ValueError as error:
            raise _error(path, f"have JSON as {_LORA_HEADER} in its header", error) from error
        if not isinstance(found, dict):
            raise _error(path, f"have an object as {_LORA_HEADER}", type(found).__name__)
    # diffusers puts the model's name before them
    told = {name.rpartition(".")[2]: value for name, value in found.items()}
    alpha = told.get("lora_alpha")
    if told.get("alpha_pattern") or not (alpha is None or isinstance(alpha, int | float)):
        got = f"lora_alpha {alpha!r}, alpha_pattern {told.get('alpha_pattern')!r}"
        raise _error(path, "have one lora_alpha for all layers", got, "merge it with peft first")
    return {name: told[name] for name in ("lora_alpha", "use_rslora") if name in told}
