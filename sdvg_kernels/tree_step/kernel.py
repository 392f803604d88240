"""The launches of a tree's step in Triton, one an op, and the shipped configurations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from sdvg_kernels._budget import Compilation
from sdvg_kernels._device import on
from sdvg_kernels.tree_step import config
from sdvg_kernels.tree_step.programs import beam_kernel, commit_kernel, draft_kernel, tree_kernel
from sdvg_kernels.tree_step.skips import select_kernel, similarity_kernel


def draft_entries(
    ids: torch.Tensor,
    features: torch.Tensor,
    known: torch.Tensor,
    lengths: torch.Tensor,
    drafted: torch.Tensor,
    layout: list[int],
    room: int,
) -> tuple[torch.Tensor, ...]:
    """Return the fields of DraftEntries."""
    rows, width = len(ids), features.shape[2]
    words = triton.cdiv(room, 32)
    out = (
        ids.new_empty((rows, room)),
        features.new_empty((rows, room, width)),
        known.new_empty((rows, room)),
        known.new_empty((rows, room, words)),
        ids.new_empty(rows),
        ids.new_empty(rows),
        torch.empty_like(known),
        torch.empty_like(known),
    )
    if rows == 0:
        return out
    launch = config.copy(width)
    with on(ids.device):
        draft_kernel[(rows * room,)](
            ids=ids,
            features=features,
            known=known,
            lengths=lengths,
            drafted=drafted,
            entry_ids=out[0],
            entry_features=out[1],
            entry_slots=out[2],
            entry_mask=out[3],
            last=out[4],
            root=out[5],
            limit=out[6],
            places=out[7],
            S=ids.shape[1] - 1,
            T=room,
            D=width,
            prefix=layout[0],
            tokens=layout[1],
            extra=layout[2],
            NW=words,
            BD=launch.BD,
            BW=triton.next_power_of_2(words),
            num_warps=launch.num_warps,
        )
    return out


def beam_entries(
    known: torch.Tensor,
    tokens: torch.Tensor,
    scores: torch.Tensor,
    beams: torch.Tensor,
    features: torch.Tensor,
    mask: torch.Tensor | None,
    level: int,
    words: int,
    first: int,
) -> tuple[torch.Tensor, ...]:
    """Return the fields of BeamEntries."""
    rows, (batch, width), size = len(known), beams.shape, features.shape[2]
    out = (
        tokens.new_empty((rows, width)),
        features.new_empty((rows, width, size)),
        known.new_empty((rows, width)),
        known.new_empty((rows, width)),
        known.new_empty((rows, width, words)),
        scores.new_empty((batch, width)),
        beams.new_empty((batch, width * width)),
    )
    if rows == 0:
        return out
    launch = config.copy(size)
    with on(known.device):
        beam_kernel[(rows * width,)](
            known=known,
            tokens=tokens,
            scores=scores,
            beams=beams,
            features=features,
            mask=mask,
            entry_ids=out[0],
            entry_features=out[1],
            entry_slots=out[2],
            entry_positions=out[3],
            entry_mask=out[4],
            entry_scores=out[5],
            parents=out[6],
            stride_fr=features.stride(0),
            stride_fw=features.stride(1),
            stride_fd=features.stride(2),
            B=batch,
            M=tokens.shape[1],
            W=features.shape[1],
            K=width,
            D=size,
            NW=words,
            level=level,
            first=first,
            BD=launch.BD,
            BK=triton.next_power_of_2(width),
            BW=triton.next_power_of_2(words),
            HAS_MASK=mask is not None,
            num_warps=launch.num_warps,
        )
    return out


def tree_entries(
    ids: torch.Tensor,
    known: torch.Tensor,
    lengths: torch.Tensor,
    skipping: torch.Tensor,
    tokens: torch.Tensor,
    depths: torch.Tensor,
    mask: torch.Tensor,
    room: int,
    first: int,
) -> tuple[torch.Tensor, ...]:
    """Return the fields of TreeEntries."""
    (batch, nodes), rows = tokens.shape, len(ids)
    words = triton.cdiv(room, 32) + mask.shape[2]
    shape = (rows, room + nodes)
    out = (
        ids.new_empty(shape),
        known.new_empty(shape),
        known.new_empty(shape),
        known.new_empty((*shape, words)),
        torch.empty_like(known),
    )
    if rows == 0:
        return out
    with on(ids.device):
        tree_kernel[(rows, triton.cdiv(room + nodes, config.ENTRIES))](
            ids=ids,
            known=known,
            lengths=lengths,
            skipping=skipping,
            tokens=tokens,
            depths=depths,
            mask=mask,
            entry_ids=out[0],
            entry_slots=out[1],
            entry_positions=out[2],
            entry_mask=out[3],
            chain=out[4],
            S=ids.shape[1] - 1,
            B=batch,
            N=nodes,
            NW=mask.shape[2],
            room=room,
            first=first,
            BT=config.ENTRIES,
            BW=triton.next_power_of_2(words),
            num_warps=config.ENTRY_WARPS,
        )
    return out


def commit_tree_(
    ids: torch.Tensor,
    features: torch.Tensor,
    known: torch.Tensor,
    lengths: torch.Tensor,
    drafted: torch.Tensor,
    tokens: torch.Tensor,
    path: torch.Tensor,
    counts: torch.Tensor,
    drawn: torch.Tensor | None,
    chain: torch.Tensor | None,
    out: torch.Tensor | None,
    layout: list[int],
) -> torch.Tensor:
    """Commit to the state, and return the path that `compact_` takes."""
    rows, width, (batch, nodes) = len(ids), features.shape[2], tokens.shape
    levels = path.shape[1]
    room = 0 if out is None else out.shape[1] - nodes
    # chain, root and path
    kept = 0 if out is None else room + 1 + levels
    moves = known.new_empty((rows, kept))
    if rows == 0:
        return moves
    prefix, frame, extra, first = layout
    launch = config.copy(width)
    with on(ids.device):
        commit_kernel[(rows, 1 + kept)](
            ids=ids,
            features=features,
            known=known,
            lengths=lengths,
            drafted=drafted,
            tokens=tokens,
            path=path,
            counts=counts,
            drawn=drawn,
            chain=chain,
            out=out,
            moves=moves,
            stride_pb=path.stride(0),
            stride_pp=path.stride(1),
            stride_cb=counts.stride(0),
            stride_wb=0 if drawn is None else drawn.stride(0),
            stride_or=0 if out is None else out.stride(0),
            stride_ot=0 if out is None else out.stride(1),
            stride_od=0 if out is None else out.stride(2),
            S=ids.shape[1] - 1,
            B=batch,
            N=nodes,
            P=levels,
            D=width,
            room=room,
            prefix=prefix,
            frame=frame,
            extra=extra,
            first=first,
            BD=launch.BD,
            BP=triton.next_power_of_2(levels + 1),
            BM=triton.next_power_of_2(kept) if kept else 1,
            HAS_OUT=out is not None,
            num_warps=launch.num_warps,
        )
    return moves


def select_path(
    depths: torch.Tensor,
    first_child: torch.Tensor,
    mask: torch.Tensor,
    wanted: torch.Tensor,
    seeds: torch.Tensor,
    sequences: torch.Tensor,
    positions: torch.Tensor,
    levels: int,
    likely: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return path [B, levels] int32 and counts [B] int32."""
    batch, nodes = depths.shape
    out = depths.new_empty((batch, levels)), depths.new_empty(batch)
    if batch == 0:
        return out
    with on(depths.device):
        select_kernel[(batch,)](
            depths=depths,
            first_child=first_child,
            mask=mask,
            wanted=wanted,
            seeds=seeds,
            sequences=sequences,
            positions=positions,
            path=out[0],
            counts=out[1],
            N=nodes,
            NW=mask.shape[2],
            P=levels,
            BN=max(16, triton.next_power_of_2(nodes)),
            BP=triton.next_power_of_2(levels),
            IS_LIKELY=likely,
            num_warps=config.SELECT_WARPS,
        )
    return out


def path_similarity(
    tokens: torch.Tensor,
    depths: torch.Tensor,
    first_child: torch.Tensor,
    mask: torch.Tensor,
    codebook: torch.Tensor,
    decay: float,
    stride: int,
) -> torch.Tensor:
    """Return the similarity [B] float32."""
    batch, nodes = depths.shape
    out = codebook.new_empty(batch)
    if batch == 0:
        return out
    entries, width = codebook.shape
    with on(depths.device):
        similarity_kernel[(batch,)](
            tokens=tokens,
            depths=depths,
            first_child=first_child,
            mask=mask,
            codebook=codebook,
            out=out,
            N=nodes,
            NW=mask.shape[2],
            V=entries,
            E=width,
            decay=decay,
            stride=stride,
            BN=max(16, triton.next_power_of_2(nodes)),
            BE=min(config.VECTOR, triton.next_power_of_2(width)),
            num_warps=config.SIMILARITY_WARPS,
            maxnreg=config.SIMILARITY_MAXNREG,
        )
    return out


def compilations(arch: int) -> Iterator[Compilation]:
    """Yield the shipped configurations for `arch`, the target's pass with a chain."""
    state = {"ids": "*i64", "features": "*bf16"}
    state |= dict.fromkeys(("known", "lengths", "drafted"), "*i32")
    layout = dict.fromkeys(("S", "prefix", "extra"), "i32")
    for launch in config.COPIES:
        entries = {"entry_ids": "*i64", "entry_features": "*bf16"}
        entries |= dict.fromkeys(("entry_slots", "entry_mask"), "*i32")
        pointers = state | entries | dict.fromkeys(("last", "root"), "*i64")
        pointers |= dict.fromkeys(("limit", "places"), "*i32")
        yield Compilation(
            kernel=draft_kernel,
            arch=arch,
            config=f"bf16 BD{launch.BD}",
            signature=pointers | layout | dict.fromkeys(("T", "D", "tokens", "NW"), "i32"),
            constants={"BD": launch.BD, "BW": 1},
            divisible=(*pointers, "D"),
            num_warps=launch.num_warps,
            num_stages=3,
            budget=config.COPY_BUDGET,
        )
        pointers = {"known": "*i32", "tokens": "*i64", "scores": "*fp32", "beams": "*i32"}
        pointers |= {"features": "*bf16", "mask": "*i32"} | entries
        pointers |= {"entry_positions": "*i32", "entry_scores": "*fp32", "parents": "*i32"}
        integers = ("stride_fr", "stride_fw", "B", "M", "W", "K", "D", "NW", "level", "first")
        yield Compilation(
            kernel=beam_kernel,
            arch=arch,
            config=f"bf16 BD{launch.BD}",
            signature=pointers | dict.fromkeys(integers, "i32"),
            constants={"stride_fd": 1, "BD": launch.BD, "BK": 16, "BW": 2, "HAS_MASK": True},
            divisible=(*pointers, "stride_fr", "stride_fw", "D"),
            num_warps=launch.num_warps,
            num_stages=3,
            budget=config.COPY_BUDGET,
        )
        pointers = state | {"tokens": "*i64", "path": "*i32", "counts": "*i32", "drawn": "*i64"}
        pointers |= {"chain": "*i32", "out": "*bf16", "moves": "*i32"}
        integers = ("stride_pb", "stride_or", "stride_ot", "B", "N", "P", "D", "room", "frame")
        strides = ("stride_pp", "stride_cb", "stride_wb", "stride_od")
        yield Compilation(
            kernel=commit_kernel,
            arch=arch,
            config=f"bf16 BD{launch.BD}",
            signature=pointers | layout | dict.fromkeys((*integers, "first"), "i32"),
            constants=dict.fromkeys(strides, 1)
            | {"BD": launch.BD, "BP": 8, "BM": 32, "HAS_OUT": True},
            # a path without its root begins anywhere
            divisible=(*(set(pointers) - {"path"}), "stride_or", "stride_ot", "D"),
            num_warps=launch.num_warps,
            num_stages=3,
            budget=config.COPY_BUDGET,
        )
    pointers = {"ids": "*i64", "known": "*i32", "lengths": "*i32", "skipping": "*i1"}
    pointers |= {"tokens": "*i64", "depths": "*i32", "mask": "*i32", "entry_ids": "*i64"}
    names = ("entry_slots", "entry_positions", "entry_mask", "chain")
    pointers |= dict.fromkeys(names, "*i32")
    yield Compilation(
        kernel=tree_kernel,
        arch=arch,
        config=f"BT{config.ENTRIES} BW4",
        signature=pointers | dict.fromkeys(("S", "B", "N", "NW", "room", "first"), "i32"),
        constants={"BT": config.ENTRIES, "BW": 4},
        divisible=tuple(pointers),
        num_warps=config.ENTRY_WARPS,
        num_stages=3,
        budget=config.BUDGET,
    )
    pointers = dict.fromkeys(("depths", "first_child", "mask"), "*i32")
    keys = {"wanted": "*i1", "seeds": "*i64", "sequences": "*i64", "positions": "*i32"}
    for nodes in (64, 128):
        found = pointers | keys | {"path": "*i32", "counts": "*i32"}
        for likely in (False, True):
            yield Compilation(
                kernel=select_kernel,
                arch=arch,
                config=f"BN{nodes}{' likely' if likely else ''}",
                signature=found | dict.fromkeys(("N", "NW", "P"), "i32"),
                constants={"BN": nodes, "BP": 8, "IS_LIKELY": likely},
                divisible=tuple(found),
                num_warps=config.SELECT_WARPS,
                num_stages=3,
                budget=config.BUDGET,
            )
        found = {"tokens": "*i64"} | pointers | {"codebook": "*fp32", "out": "*fp32"}
        # LlamaGen's codes are of 8 numbers, others' of up to 256
        for vector in (8, config.VECTOR):
            yield Compilation(
                kernel=similarity_kernel,
                arch=arch,
                config=f"BN{nodes} BE{vector}",
                signature=found
                | dict.fromkeys(("N", "NW", "V", "E", "stride"), "i32")
                | {"decay": "fp32"},
                constants={"BN": nodes, "BE": vector},
                divisible=tuple(found),
                num_warps=config.SIMILARITY_WARPS,
                num_stages=3,
                budget=config.SIMILARITY_BUDGET,
                maxnreg=config.SIMILARITY_MAXNREG,
            )
