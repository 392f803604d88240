"""The one place where ops are defined: their schemas, their fakes, and the loading of `_C`.

Each op's schema and fake stand here once. `op/api.py` attaches the implementations with
`implement`; `_C` (CUDA C++, see csrc/) attaches its own to the same schemas when `load_extension`
imports it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch

NAMESPACE = "sdvg_kernels"
# the host lane: the same CUDA sources, run on the CPU phase by phase (csrc/, sdvg_kernels.testing)
HOST_NAMESPACE = "sdvg_kernels_host"

_LIBRARIES = {name: torch.library.Library(name, "DEF") for name in (NAMESPACE, HOST_NAMESPACE)}


def define(schema: str, fake: Callable[..., object], *, host_lane: bool = False) -> None:
    """Define the op `schema` with its `fake`; with `host_lane`, in the host lane too."""
    name = schema.split("(", 1)[0]
    for namespace in (NAMESPACE, HOST_NAMESPACE) if host_lane else (NAMESPACE,):
        _LIBRARIES[namespace].define(schema)
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=_LIBRARIES[namespace])


def implement(
    name: str, *, cpu: Callable[..., object], cuda: Callable[..., object] | None = None
) -> None:
    """Attach the implementations of the op `name` that are written in Python."""
    library = _LIBRARIES[NAMESPACE]
    library.impl(name, cpu, "CPU")
    if cuda is not None:
        library.impl(name, cuda, "CUDA")


def differentiate(
    name: str, save: Callable[..., None], backward: Callable[..., tuple[torch.Tensor | None, ...]]
) -> None:
    """Attach the gradient of the op `name`: what autograd calls after it, and on the way back.

    An op that has one costs 3.5 us more a call, gradients recorded or not (a Python kernel at the
    autograd key, torch 2.13): an op of its own, beside the one for inference.
    """
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=save, lib=_LIBRARIES[NAMESPACE]
    )


@functools.cache
def load_extension() -> tuple[ModuleType | None, str]:
    """Return (`_C`, "") or (None, why it is not there)."""
    try:
        return importlib.import_module("sdvg_kernels._C"), ""
    except ImportError as error:
        return None, str(error)


# attention, and the same into `out`; lse is [B, H, T], or [0] if not asked for

_ATTENTION = """(
    Tensor query, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? cache_batch_idx,
    int? block_size, int sink, int? window, float softmax_scale,
    float? bias, int bias_start, int? bias_stop, int? num_splits, bool return_lse,
    str implementation, Tensor? k_scale=None, Tensor? v_scale=None{out}) -> {result}"""


def _fake_lse(query: torch.Tensor, return_lse: bool) -> torch.Tensor:
    batch, rows, heads, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((batch, heads, rows) if return_lse else (0,), dtype=wide)


define(
    "block_causal_attention" + _ATTENTION.format(out="", result="(Tensor, Tensor)"),
    lambda query, *arguments: (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        _fake_lse(query, arguments[12]),
    ),
)
define(
    "block_causal_attention_out" + _ATTENTION.format(out=", *, Tensor(a!) out", result="Tensor"),
    lambda query, *arguments, out: _fake_lse(query, arguments[12]),
)

# ... where gradients are recorded; and those of query, k_cache and v_cache, [0] if not needed

_MASK = """int? block_size, int sink, int? window, float softmax_scale,
    float? bias, int bias_start, int? bias_stop"""

define(
    "block_causal_attention_forward(Tensor query, Tensor k_cache, Tensor v_cache,"
    f" Tensor cache_seqlens, {_MASK}, int? num_splits, str implementation) -> (Tensor, Tensor)",
    lambda query, *_: (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        _fake_lse(query, True),
    ),
)
define(
    "block_causal_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor query,"
    " Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor out, Tensor lse,"
    f" {_MASK}, bool need_query, bool need_cache, str implementation) -> (Tensor, Tensor, Tensor)",
    lambda grad_out, grad_lse, query, k_cache, v_cache, *arguments: (
        query.new_empty(query.shape if arguments[10] else (0,)),
        k_cache.new_empty(k_cache.shape if arguments[11] else (0,)),
        v_cache.new_empty(v_cache.shape if arguments[11] else (0,)),
    ),
)

# verify: (accept [B] bool, score [B] float32); (path [B, depth + 1], counts [B], tokens [B])

define(
    "route_blocks(Tensor frame_rewards, Tensor? first, float tau, bool all_first, str aggregate,"
    " str implementation) -> (Tensor, Tensor)",
    lambda frame_rewards, *_: (
        frame_rewards.new_empty(frame_rewards.shape[0], dtype=torch.bool),
        frame_rewards.new_empty(frame_rewards.shape[0], dtype=torch.float32),
    ),
)

_RULE = """Tensor? seeds, Tensor? sequences, Tensor? positions, float guidance, float temperature,
    int top_k, float top_p, int depth"""


def _fake_verified(
    logits: torch.Tensor, depth: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = logits.shape[0]
    return (
        logits.new_empty((batch, depth + 1), dtype=torch.int32),
        logits.new_empty(batch, dtype=torch.int32),
        logits.new_empty(batch, dtype=torch.int64),
    )


define(
    "verify_chain(Tensor draft, Tensor logits, Tensor? draft_logits, Tensor? draft_probs,"
    f" Tensor? uncond, Tensor? draft_uncond, {_RULE}, str implementation)"
    " -> (Tensor, Tensor, Tensor)",
    lambda draft, logits, *arguments: _fake_verified(logits, arguments[11]),
)
define(
    "verify_tree(Tensor tokens, Tensor parents, Tensor first_child, Tensor next_sibling,"
    f" Tensor logits, Tensor? uncond, Tensor? neighbours, {_RULE}, str rule, float first_bound,"
    " float second_bound, str implementation) -> (Tensor, Tensor, Tensor)",
    lambda tokens, parents, first, sibling, logits, *arguments: _fake_verified(
        logits, arguments[9]
    ),
)


# sampling: ids into out

define(
    "sample_tokens(Tensor logits, Tensor? uncond, Tensor? seeds, Tensor? sequences,"
    " Tensor? positions, float guidance, float temperature, int top_k, float top_p, Tensor? index,"
    " Tensor(a!) out, str implementation) -> ()",
    lambda *_: None,
)

# modulation: a row for each frame, and a table [C] that is added to it

_GATE = "Tensor? gate, Tensor? gate_table"
_NORM = """Tensor? shift, Tensor? shift_table, Tensor? scale, Tensor? scale_table,
    Tensor? weight, Tensor? bias, float eps, ScalarType dtype, str implementation"""


def _fake_rows(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=dtype)


define(
    f"modulated_layer_norm(Tensor x, {_NORM}) -> Tensor",
    lambda x, *arguments: _fake_rows(x, arguments[7]),
)
define(
    f"gated_residual(Tensor x, Tensor y, {_GATE}, str implementation) -> Tensor",
    lambda x, *_: _fake_rows(x),
)
define(
    f"gated_residual_layer_norm(Tensor x, Tensor y, {_GATE}, {_NORM}) -> (Tensor, Tensor)",
    lambda x, *arguments: (_fake_rows(x), _fake_rows(x, arguments[10])),
)

# quantize: (values [N, K], scales [N, 1])

define(
    "quantize_rows(Tensor x, str? activation, str implementation) -> (Tensor, Tensor)",
    lambda x, *_: (
        x.new_empty(x.shape, dtype=torch.float8_e4m3fn),
        x.new_empty((x.shape[0], 1), dtype=torch.float32),
    ),
)

# frames: [B, F, 3, size, size]

define(
    "preprocess_frames(Tensor video, int size, float[] mean, float[] std, ScalarType dtype,"
    " str implementation) -> Tensor",
    lambda video, size, mean, std, dtype, _: video.new_empty(
        (video.shape[0], video.shape[2], 3, size, size), dtype=dtype
    ),
)

# rope: rotated (query, key); and with the cache write, rotated query

_ROPE = """Tensor table, Tensor? query_weight, Tensor? key_weight{scales}, float eps, int height,
    int width, int{start} start_frame, Tensor? frame_offsets"""

define(
    "norm_rope(Tensor query, Tensor key, "
    + _ROPE.format(scales="", start="")
    + ", str implementation) -> (Tensor, Tensor)",
    lambda query, key, *_: tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key)
    ),
)
define(
    "norm_rope_stage_(Tensor query, Tensor key, Tensor value, Tensor(a!) k_cache,"
    " Tensor(b!) v_cache, Tensor lengths, "
    + _ROPE.format(scales=", Tensor(c!)? k_scale, Tensor(d!)? v_scale", start="?")
    + ", int sink, Tensor? cache_batch_idx, str implementation) -> Tensor",
    lambda query, *_: torch.empty_like(query, memory_format=torch.contiguous_format),
)

# cache: a list holds one tensor [layers, ...] or one tensor per layer; an empty undo: none is kept

_CACHES = "Tensor(a!)[] k_cache, Tensor(b!)[] v_cache"


def _mutates(*_: object) -> None:
    """Return nothing: the fake of an op that only writes to its arguments."""


define(
    f"stage_({_CACHES}, Tensor[] key, Tensor[] value, Tensor lengths, Tensor? batch_idx,"
    " Tensor(c!)[] undo_k, Tensor(d!)[] undo_v, int sink) -> ()",
    _mutates,
    host_lane=True,
)
define(
    "commit_(Tensor(a!) lengths, Tensor accept, Tensor? batch_idx, int count) -> ()",
    _mutates,
    host_lane=True,
)
define(
    f"rollback_({_CACHES}, Tensor lengths, Tensor accept, Tensor[] undo_k, Tensor[] undo_v,"
    " Tensor? batch_idx, int sink) -> ()",
    _mutates,
    host_lane=True,
)
define(
    f"compact_({_CACHES}, Tensor(c!) lengths, Tensor path, Tensor? batch_idx, int sink) -> ()",
    _mutates,
    host_lane=True,
)
define("select_(Tensor accept, Tensor(a!)[] draft, Tensor[] other) -> ()", _mutates, host_lane=True)

# norm_silu: into `out`, part of the next convolution's input, and into `total` where it is given

define(
    "rms_norm_silu(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool silu,"
    " Tensor(a!)? total, Tensor(b!) out, str implementation) -> ()",
    _mutates,
)

# diagonal: grid is [prefix, height, width, row stride, frame stride, k, lead, passes of a frame]

define(
    "diagonal_mask(Tensor slots, Tensor steps, int size, int[] grid, Tensor? cache_leftpad,"
    " ScalarType dtype, bool packed, str implementation) -> Tensor",
    lambda slots, steps, size, grid, cache_leftpad, dtype, packed, _: slots.new_empty(
        (*slots.shape, -(-size // 8) if packed else size), dtype=torch.uint8 if packed else dtype
    ),
)
define(
    "diagonal_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor slots, Tensor steps,"
    " int[] grid, bool published, Tensor? cache_batch_idx, Tensor? cache_leftpad,"
    " float softmax_scale, int? num_splits, str implementation) -> Tensor",
    lambda query, *_: torch.empty_like(query, memory_format=torch.contiguous_format),
)

# masked

define(
    "tree_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor mask,"
    " Tensor? cache_batch_idx, Tensor? cache_leftpad, float softmax_scale, int? num_splits,"
    " str implementation) -> Tensor",
    lambda query, *_: torch.empty_like(query, memory_format=torch.contiguous_format),
)

# tree: (tokens [B, W * K], scores [B, W * K], beams [B, K]); and the fields of a TokenTree

define(
    "expand_tree(Tensor logits, Tensor? scores, int top_k, Tensor? uncond, float guidance,"
    " float temperature, str implementation) -> (Tensor, Tensor, Tensor)",
    lambda logits, scores, top_k, *_: (
        logits.new_empty((logits.shape[0], logits.shape[1] * top_k), dtype=torch.int64),
        logits.new_empty((logits.shape[0], logits.shape[1] * top_k), dtype=torch.float32),
        logits.new_empty((logits.shape[0], top_k), dtype=torch.int32),
    ),
)


def _fake_tree(root: torch.Tensor, *arguments: object) -> tuple[torch.Tensor, ...]:
    batch, size = root.shape[0], arguments[4]
    return (
        root.new_empty((batch, size), dtype=torch.int64),
        *(root.new_empty((batch, size), dtype=torch.int32) for _ in range(4)),
        root.new_empty((batch, size, -(-size // 32)), dtype=torch.int32),
    )


define(
    "build_tree(Tensor root, Tensor tokens, Tensor scores, Tensor parents, Tensor? limit, int size,"
    " str implementation) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_tree,
)

# tree_step: the fields of DraftEntries, BeamEntries and TreeEntries; and compact_'s path. layout is
# [prefix, tokens of a frame, extra, first]


def _fake_draft(
    ids: torch.Tensor, features: torch.Tensor, *arguments: object
) -> tuple[torch.Tensor, ...]:
    rows, room = ids.shape[0], arguments[4]
    small = functools.partial(ids.new_empty, dtype=torch.int32)
    return (
        ids.new_empty((rows, room)),
        features.new_empty((rows, room, features.shape[2])),
        small((rows, room)),
        small((rows, room, -(-room // 32))),
        ids.new_empty(rows),
        ids.new_empty(rows),
        small(rows),
        small(rows),
    )


def _fake_beams(
    known: torch.Tensor,
    tokens: torch.Tensor,
    scores: torch.Tensor,
    beams: torch.Tensor,
    features: torch.Tensor,
    mask: torch.Tensor | None,
    level: int,
    words: int,
    *_: object,
) -> tuple[torch.Tensor, ...]:
    rows, (batch, width) = known.shape[0], beams.shape
    return (
        tokens.new_empty((rows, width)),
        features.new_empty((rows, width, features.shape[2])),
        known.new_empty((rows, width)),
        known.new_empty((rows, width)),
        known.new_empty((rows, width, words)),
        scores.new_empty((batch, width)),
        beams.new_empty((batch, width * width)),
    )


def _fake_entries(
    ids: torch.Tensor,
    known: torch.Tensor,
    lengths: torch.Tensor,
    skipping: torch.Tensor,
    tokens: torch.Tensor,
    depths: torch.Tensor,
    mask: torch.Tensor,
    room: int,
    *_: object,
) -> tuple[torch.Tensor, ...]:
    shape = (ids.shape[0], room + tokens.shape[1])
    return (
        ids.new_empty(shape),
        known.new_empty(shape),
        known.new_empty(shape),
        known.new_empty((*shape, -(-room // 32) + mask.shape[2])),
        torch.empty_like(known),
    )


_STATE = "Tensor{} ids, Tensor{} features, Tensor{} known, Tensor lengths, Tensor{} drafted"

define(
    f"draft_entries({_STATE.replace('{}', '')}, int[] layout, int room, str implementation)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_draft,
)
define(
    "beam_entries(Tensor known, Tensor tokens, Tensor scores, Tensor beams, Tensor features,"
    " Tensor? mask, int level, int words, int first, str implementation)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_beams,
)
define(
    "tree_entries(Tensor ids, Tensor known, Tensor lengths, Tensor skipping, Tensor tokens,"
    " Tensor depths, Tensor mask, int room, int first, str implementation)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_entries,
)
define(
    f"commit_tree_({_STATE.format('(a!)', '(b!)', '(c!)', '(d!)')}, Tensor tokens, Tensor path,"
    " Tensor counts, Tensor? drawn, Tensor? chain, Tensor? out, int[] layout, str implementation)"
    " -> Tensor",
    lambda ids, features, known, lengths, drafted, tokens, path, counts, drawn, chain, out, *_: (
        known.new_empty(
            (
                ids.shape[0],
                0 if out is None else out.shape[1] - tokens.shape[1] + 1 + path.shape[1],
            )
        )
    ),
)
define(
    "select_path(Tensor depths, Tensor first_child, Tensor mask, Tensor wanted, Tensor seeds,"
    " Tensor sequences, Tensor positions, int levels, bool likely, str implementation)"
    " -> (Tensor, Tensor)",
    lambda depths, *arguments: (
        depths.new_empty((depths.shape[0], arguments[6])),
        depths.new_empty(depths.shape[0]),
    ),
)
define(
    "path_similarity(Tensor tokens, Tensor depths, Tensor first_child, Tensor mask,"
    " Tensor codebook, float decay, int stride, str implementation) -> Tensor",
    lambda tokens, *_: tokens.new_empty(tokens.shape[0], dtype=torch.float32),
)
