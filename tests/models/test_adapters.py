"""Patched pipelines give what they gave, without moving their caches; or say why they cannot."""

from __future__ import annotations

import copy
import logging
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdvg.adapters import patch, unpatch
from tests.models import causal_wan
from tests.models.causal_wan import (
    BLOCK,
    DIM,
    FRAMES,
    HEIGHT,
    LAYERS,
    WIDTH,
    CrossAttention,
    Krea,
    LongLive,
    Projections,
    SelfForcing,
    SelfForcingAttention,
    UnropedAttention,
)

SIZES = [(6, 0), (9, 3), (7, 1), (12, 3), (9, 0)]
PIPELINES = {
    **{f"self-forcing {size}": partial(SelfForcing, *size) for size in (*SIZES, (9, 4))},
    "self-forcing, ints": partial(SelfForcing, 9, 3, "int"),
    **{f"longlive {size}": partial(LongLive, *size) for size in ((9, 3), (12, 3), (7, 1), (6, 0))},
    "longlive, ints": partial(LongLive, 12, 3, "int"),
    "krea": Krea,
    "krea, tensors": partial(Krea, "tensor"),
}


class Counting(TorchDispatchMode):
    """Counts the calls of each op, and of those that copy the elements."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.copied = 0

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        out = func(*args, **(kwargs or {}))
        if name in ("clone", "roll", "cat"):
            self.copied = max(self.copied, out.numel())
        return out


@contextmanager
def counting() -> Iterator[Counting]:
    with Counting() as mode:
        yield mode


@pytest.mark.parametrize("name", PIPELINES)
def test_patched_equals_unpatched_over_twelve_blocks(name: str) -> None:
    plain, patched = PIPELINES[name](), PIPELINES[name]()
    assert patch(patched) == LAYERS
    assert (patched.run(12) - plain.run(12)).abs().max() < 1e-10
    for mine, theirs in zip(patched.caches, plain.caches, strict=True):
        for index in ("global_end_index", "local_end_index"):
            assert type(mine[index]) is type(theirs[index])
            assert int(mine[index]) == int(theirs[index])
    for mine, theirs in zip(patched.cross, plain.cross, strict=True):
        assert mine["is_init"] is True
        torch.testing.assert_close(mine["k"], theirs["k"])


class Diagonal(LongLive):
    """Diagonal Distillation's: fewer steps block by block, and no pass that writes clean keys."""

    def block(self, index: int, random: torch.Generator, **more: object) -> list[Tensor]:
        """Make a block; its last step's keys stay."""
        noise = torch.randn(4, len(self.text), BLOCK, DIM, generator=random, dtype=torch.float64)
        steps = max(2, 4 - index)
        return [self.step(x, FRAMES, index * BLOCK, **more) for x in noise.to(self.text)[:steps]]

    def run(self, blocks: int, **more: object) -> Tensor:
        """Make `blocks` blocks, and return the last step of each."""
        random = torch.Generator().manual_seed(1)
        return torch.stack([self.block(index, random, **more)[-1] for index in range(blocks)])


class DiagonalInPlace(SelfForcing):
    """The same on a model whose layers write their caches themselves."""

    block, run = Diagonal.block, Diagonal.run


@pytest.mark.parametrize("kind", [Diagonal, DiagonalInPlace])
def test_without_a_clean_pass_the_last_steps_keys_are_seen(kind: type[SelfForcing]) -> None:
    plain, patched = kind(12, 3), kind(12, 3)
    assert patch(patched) == LAYERS
    made = patched.run(8)
    assert (made - plain.run(8)).abs().max() < 1e-10
    # a clean pass would change what is seen
    cleaned = kind(12, 3)
    patch(cleaned)
    whole = cleaned.block

    def block(index: int, random: torch.Generator) -> list[Tensor]:
        out = whole(index, random)
        cleaned.step(out[-1].tanh(), FRAMES, index * BLOCK)
        return out

    cleaned.block = block
    other = cleaned.run(8)
    assert torch.equal(other[0], made[0])
    assert (other[1:] - made[1:]).abs().amin(0).max() > 1e-3


@pytest.mark.parametrize("weight", [0.3, 1.5])
def test_a_bias_on_old_keys_is_the_originals(weight: float) -> None:
    plain, patched = Krea(), Krea()
    patch(patched)
    given = {"kv_cache_attention_bias": weight}
    biased = patched.run(6, **given)
    assert (biased - plain.run(6, **given)).abs().max() < 1e-10
    assert (biased - Krea().run(6)).abs().max() > 1e-3


def test_without_local_attention_too_up_to_the_end_of_the_cache() -> None:
    plain, patched = SelfForcing(-1), SelfForcing(-1)
    patch(patched)
    assert (patched.run(7) - plain.run(7)).abs().max() < 1e-10
    with pytest.raises(ValueError, match="within its cache of 126 tokens, got 144"):
        patched.step(torch.zeros(2, BLOCK, DIM, dtype=torch.float64), FRAMES, 7 * BLOCK)


@pytest.mark.parametrize("kind", [SelfForcing, LongLive])
def test_a_patched_run_clones_no_cache_and_reads_nothing_back(kind: type[SelfForcing]) -> None:
    plain, patched = kind(6), kind(6)
    patch(patched)
    # warm: tables and indices are made once
    patched.run(1)
    with counting() as ours:
        patched.run(12)
    with counting() as theirs:
        plain.run(12)
    slots = plain.caches[0]["k"].numel()
    assert theirs.copied >= slots // 2
    assert theirs.calls["_local_scalar_dense"] > 100
    assert ours.copied < slots // 2
    assert ours.calls["_local_scalar_dense"] == 0


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("kind", [SelfForcing, LongLive])
def test_on_a_gpu_the_kernels_serve_and_nothing_waits(
    kind: type[SelfForcing], monkeypatch: pytest.MonkeyPatch
) -> None:
    # head dim 64: the kernels' own
    monkeypatch.setattr(causal_wan, "DIM", 128)
    plain, patched = (kind(6).to("cuda", torch.float32) for _ in range(2))
    patch(patched)
    assert (patched.run(6) - plain.run(6)).abs().max() < 1e-3
    x = torch.randn(2, BLOCK, 128, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for block in (6, 7, 8):
            patched.step(x, FRAMES, block * BLOCK)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_new_video_in_the_same_caches_is_not_disturbed_by_the_old_one() -> None:
    fresh, used = SelfForcing(6), SelfForcing(6)
    patch(fresh), patch(used)
    used.run(5)
    for cache in used.caches:
        cache["global_end_index"] = torch.zeros(1, dtype=torch.long)
        cache["local_end_index"] = torch.zeros(1, dtype=torch.long)
    assert torch.equal(used.run(5), fresh.run(5))


def test_a_new_prompt_is_read_where_is_init_was_cleared() -> None:
    plain, patched = SelfForcing(6), SelfForcing(6)
    patch(patched)
    for pipeline in (plain, patched):
        pipeline.run(1)
        pipeline.text = -pipeline.text
    assert (patched.run(1) - plain.run(1)).abs().max() < 1e-10
    for pipeline in (plain, patched):
        for cache in pipeline.cross:
            cache["is_init"] = False
    assert (patched.run(1) - plain.run(1)).abs().max() < 1e-10


# --- putting it in and taking it out ---


@pytest.mark.parametrize("kind", [SelfForcing, LongLive])
def test_unpatch_restores_the_original(kind: type[SelfForcing]) -> None:
    plain, patched = kind(6), kind(6)
    before = {name: dict(vars(module)) for name, module in patched.generator.named_modules()}
    assert patch(patched) == patch(patched) == LAYERS
    assert unpatch(patched) == LAYERS
    assert unpatch(patched) == 0
    assert before == {name: vars(module) for name, module in patched.generator.named_modules()}
    assert torch.equal(patched.run(4), plain.run(4))


def test_two_pipelines_that_share_a_model_share_the_patch() -> None:
    one, other = SelfForcing(6), SelfForcing(6)
    other.generator = one.generator
    patch(one)
    assert patch(other) == LAYERS
    assert torch.equal(one.run(4), other.run(4))
    assert unpatch(other) == LAYERS
    assert unpatch(one) == 0


def test_what_was_half_patched_becomes_whole() -> None:
    plain, patched = SelfForcing(6), SelfForcing(6)
    patch(patched.generator.blocks[0])
    assert patch(patched) == LAYERS
    assert (patched.run(4) - plain.run(4)).abs().max() < 1e-10
    assert unpatch(patched) == LAYERS


def test_a_part_of_a_model_with_deferred_writes_is_refused() -> None:
    plain, patched = LongLive(6), LongLive(6)
    with pytest.raises(ValueError, match="a tensor elsewhere, got a tuple; patch the whole model"):
        patch(patched.generator.blocks[0])
    patch(patched)
    with pytest.raises(RuntimeError, match="must hold the model that has _apply_cache_updates"):
        unpatch(patched.generator.blocks[0])
    assert (patched.run(3) - plain.run(3)).abs().max() < 1e-10


@pytest.mark.parametrize("kind", [int, Tensor])
def test_layers_that_take_one_kind_of_index_are_proved_with_it(
    kind: type, caplog: pytest.LogCaptureFixture
) -> None:
    class Strict(SelfForcingAttention):
        def roll(self, kv_cache: dict[str, object], *given: int) -> tuple[int, int, int]:
            if not isinstance(kv_cache["global_end_index"], kind):
                raise TypeError("another kind of index")
            return super().roll(kv_cache, *given)

    pipeline = SelfForcing(6)
    pipeline.generator.blocks[0].self_attn = Strict(6, 0).double()
    assert patch(pipeline) == LAYERS
    assert not caplog.text


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("kind", [SelfForcing, LongLive])
def test_a_copy_is_patched_and_stands_alone(
    kind: type[SelfForcing], through: Callable[[nn.Module], nn.Module]
) -> None:
    pipeline = kind(6)
    names = list(pipeline.generator.state_dict())
    patch(pipeline)
    assert list(pipeline.generator.state_dict()) == names
    expected, other = pipeline.run(4), kind(6)
    other.generator = through(pipeline.generator)
    for weight in pipeline.generator.parameters():
        weight.zero_()
    assert torch.equal(other.run(4), expected)
    assert unpatch(other) == LAYERS


def test_forward_hooks_stay_and_a_replaced_forward_is_refused() -> None:
    pipeline = SelfForcing(6)
    layer = pipeline.generator.blocks[0].self_attn
    seen: list[object] = []
    layer.register_forward_hook(lambda *_: seen.append(None))
    patch(pipeline)
    pipeline.run(1)
    assert len(seen) == 3
    ours = layer.forward
    layer.forward = lambda *given: ours(*given)
    with pytest.raises(RuntimeError, match="must be ours, got one that something else"):
        unpatch(pipeline)
    with pytest.raises(RuntimeError, match="must be its class's, got one that something else"):
        patch(pipeline)
    layer.forward = ours
    assert unpatch(pipeline) == LAYERS


def test_weights_that_come_when_a_layer_is_called_are_not_looked_for_before() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, patched = SelfForcing(6), SelfForcing(6)
    patch(patched)
    accelerate.cpu_offload(patched.generator, execution_device="cpu")
    assert patched.generator.blocks[0].self_attn.norm_q.weight.is_meta
    assert (patched.run(3) - plain.run(3)).abs().max() < 1e-10


def test_a_compiled_model_keeps_few_graphs() -> None:
    plain, patched = SelfForcing(6), SelfForcing(6)
    patch(patched)
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    blocks = patched.generator.blocks
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend=backend)
    # a compiled model is found through its wrapper
    assert patch(patched) == LAYERS
    first = patched.run(2)
    compiled = len(graphs)
    assert (first - plain.run(2)).abs().max() < 1e-10
    patched.run(6)
    assert len(graphs) == compiled > 0
    torch.compiler.reset()


# --- what is not ours ---


def training(pipeline: SelfForcing) -> tuple[object, ...]:
    x = torch.randn(1, BLOCK, DIM, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([[FRAMES, HEIGHT, WIDTH]])
    return x, None, sizes, pipeline.generator.freqs, None


def test_a_call_without_a_cache_goes_to_the_original() -> None:
    pipeline = SelfForcing(6)
    layer, given = pipeline.generator.blocks[0].self_attn, training(pipeline)
    before = layer(*given)
    patch(pipeline.generator)
    after = layer(*given)
    assert torch.equal(after, before)
    after.sum().backward()
    assert given[0].grad.abs().max() > 0


def test_gradients_are_refused_not_lost() -> None:
    pipeline = SelfForcing(6)
    layer, given = pipeline.generator.blocks[0].self_attn, training(pipeline)
    patch(pipeline)
    with pytest.raises(RuntimeError, match="must run without gradients, got weights or x"):
        layer(*given, pipeline.caches[0])
    # cross-attention has its own gradients from the original
    cross = pipeline.generator.blocks[0].cross_attn
    cross(given[0], pipeline.text[:1], None, {"is_init": False}).sum().backward()
    assert given[0].grad.abs().max() > 0
    with torch.inference_mode():
        layer(*given, {name: value[:1].clone() for name, value in pipeline.caches[0].items()})


def test_an_attention_that_caches_before_rope_is_refused_before_anything_is_swapped() -> None:
    pipeline = SelfForcing(6)
    pipeline.generator.blocks[1].self_attn = UnropedAttention(6, 0).double()
    with pytest.raises(ValueError, match="must be Self-Forcing's attention, got other cached keys"):
        patch(pipeline)
    assert unpatch(pipeline) == 0


def test_an_attention_of_another_scale_is_refused() -> None:
    class Other(SelfForcingAttention):
        def seen(self, q: Tensor, k: Tensor, v: Tensor, frame: int) -> Tensor:
            return super().seen(q, k, 2 * v, frame)

    pipeline = SelfForcing(6)
    pipeline.generator.blocks[0].self_attn = Other(6, 0).double()
    with pytest.raises(ValueError, match="got other output on a small grid, off by"):
        patch(pipeline)


def test_another_cross_attention_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Other(CrossAttention):
        def forward(self, x: Tensor, context: Tensor, context_lens: None, crossattn_cache: None):  # noqa: ANN202
            return -super().forward(x, context, context_lens, crossattn_cache)

    plain, patched = SelfForcing(6), SelfForcing(6)
    for pipeline in (plain, patched):
        torch.manual_seed(3)
        pipeline.generator.blocks[0].cross_attn = Other().double().requires_grad_(False)
    assert patch(patched) == LAYERS
    assert "Other keeps its own attention: ours is off by 2" in caplog.text
    assert (patched.run(3) - plain.run(3)).abs().max() < 1e-10


def test_weights_that_are_not_here_are_patched_unproven(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = SelfForcing(6)
    pipeline.generator.to("meta")
    caplog.set_level(logging.WARNING)
    assert patch(pipeline) == LAYERS
    assert "patched unproven: its weights are not here as whole tensors" in caplog.text


def test_arguments_beyond_the_protocol_are_named() -> None:
    pipeline = LongLive(9, 3)
    patch(pipeline)
    pipeline.run(1, sink_recache_after_switch=False)
    with pytest.raises(ValueError, match="alone, got sink_recache_after_switch=True too; unpatch"):
        pipeline.run(1, sink_recache_after_switch=True)


def test_a_sink_larger_than_a_block_is_refused_where_writes_are_deferred() -> None:
    pipeline = LongLive(9, 4)
    patch(pipeline)
    with pytest.raises(ValueError, match=r"must cover the sink of 24 tokens .*, got 18"):
        pipeline.run(1)


def test_a_mask_or_a_bias_on_a_rolled_cache_is_refused() -> None:
    pipeline = Krea()
    patch(pipeline)
    x = torch.zeros(2, BLOCK, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"a pass with a block_mask must end within .* 36 tok"):
        pipeline.step(x, FRAMES, 2 * BLOCK, torch.ones(BLOCK, BLOCK, dtype=torch.bool))
    with pytest.raises(ValueError, match="attention_bias must end within its cache of 36 tokens"):
        pipeline.step(x, FRAMES, 2 * BLOCK, kv_cache_attention_bias=0.3)
    with pytest.raises(ValueError, match="must be positive, got -1"):
        pipeline.step(x, FRAMES, 0, kv_cache_attention_bias=-1.0)


def test_what_cannot_be_patched_is_named() -> None:
    with pytest.raises(ValueError, match="must hold self-attention of Self-Forcing's shape"):
        patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got int with none"):
        patch(3)

    class Fused(Projections):
        def forward(self, x: Tensor, kv_cache: dict[str, Tensor], rotary: Tensor) -> Tensor:
            return x

    mixed = SelfForcing(6)
    mixed.generator.extra = Fused()
    text = r"with Fused.forward\(x, kv_cache, rotary\), which lacks grid_sizes, freqs, current_st"
    with pytest.raises(ValueError, match=text):
        patch(mixed)
    assert unpatch(mixed) == 0
    uneven = SelfForcing(6)
    patch(uneven)
    x = torch.randn(2, BLOCK, DIM, dtype=torch.float64)
    grid_sizes = torch.tensor([[3, 2, 3], [3, 3, 2]])
    with pytest.raises(ValueError, match="must be the same in a batch"):
        uneven.generator.blocks[0].self_attn(
            x, None, grid_sizes, uneven.generator.freqs, None, uneven.caches[0], 0, None
        )
    with pytest.raises(ValueError, match="query must have at most S - sink = 36 tokens, got 54"):
        uneven.step(x.repeat(1, 3, 1), 9, 0)
