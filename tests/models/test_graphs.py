"""CUDA graphs of passes over a ring, on a model of our own that needs no diffusers.

`StandIn` has what `Graphs` asks of a `CausalWan` and runs the same ops; test_accelerate.py has the
tests with diffusers' model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvg.cache import KVCache
from sdvg.models import graphs as room
from sdvg.models.capture import Recorder, first_cause
from sdvg.models.graphs import Graphs
from sdvg.models.linear import Fp8Linear
from sdvg_kernels import (
    gated_residual,
    gated_residual_layer_norm,
    modulated_layer_norm,
    norm_rope_stage_,
    rope_table,
)

HEADS, DIM, FRAMES, GRID = 2, 64, 3, (3, 2, 4)
WIDTH, FRAME_TOKENS = HEADS * DIM, GRID[1] * GRID[2]
BATCH, PROMPT = 3, 5


class Block(nn.Module):
    """Self-attention over the ring, attention to a prompt's keys, a feed-forward layer."""

    def __init__(self, fp8: bool) -> None:
        super().__init__()
        layers = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "query": (WIDTH, WIDTH)}
        layers |= {"first": (WIDTH, 2 * WIDTH), "second": (2 * WIDTH, WIDTH)}
        for name, sizes in layers.items():
            linear = nn.Linear(*sizes, dtype=torch.bfloat16)
            setattr(self, name, Fp8Linear(linear) if fp8 else linear)
        if fp8:
            self.second.activation = "gelu_tanh"
        self.norm = nn.Parameter(torch.rand(2, WIDTH, dtype=torch.bfloat16))
        shape = (BATCH, HEADS, PROMPT, DIM)
        keys = {name: torch.zeros(shape, dtype=torch.bfloat16) for name in ("key", "value")}
        self.attn2 = SimpleNamespace(processor=SimpleNamespace(**keys))


class StandIn:
    """Two layers with a ring of a sink and two blocks, which wraps in the third."""

    def __init__(self, device: str, *, graphs: bool = False, fp8: bool = False) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            blocks = nn.ModuleList([Block(fp8) for _ in range(2)])
        self.transformer = nn.Module()
        self.transformer.blocks = blocks.to(device).requires_grad_(False)
        for block in blocks:
            prompt = block.attn2.processor
            prompt.key, prompt.value = prompt.key.to(device), prompt.value.to(device)
        block_tokens = FRAMES * FRAME_TOKENS
        self.cache = KVCache(
            layers=2, batch=BATCH, slots=4 * block_tokens, heads=HEADS, head_dim=DIM,
            block=block_tokens, sink=block_tokens, window=2 * block_tokens,
            dtype=torch.bfloat16, device=device,
        )  # fmt: skip
        table = rope_table(64, DIM, device=torch.device(device))
        self.rope_table = SimpleNamespace(reserve=lambda _: table)
        self.graphs = Graphs(self) if graphs else None
        self.device = torch.device(device)

    def start(self, seed: int) -> None:
        """Begin a video: other keys of a prompt, in the same memory."""
        random = torch.Generator().manual_seed(seed)
        for block in self.transformer.blocks:
            for tensor in vars(block.attn2.processor).values():
                tensor.copy_(torch.randn(tensor.shape, generator=random))
        self.cache.seek(0)
        if self.graphs is not None:
            self.graphs.start()

    def step(
        self,
        latents: Tensor,
        sigmas: float | Sequence[float],
        start: int,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return what a pass over `latents [b, T, WIDTH]` at `start` frames makes of them.

        One sigma serves all blocks, or each has its own.
        """
        self.cache.seek(start * FRAME_TOKENS, rows)
        sigmas = [sigmas] if isinstance(sigmas, float) else sigmas
        random = [torch.Generator().manual_seed(int(sigma * 1000)) for sigma in sigmas]
        embedding, modulation = (
            torch.cat(
                [torch.randn(len(latents), 1, count * WIDTH, generator=own) for own in random], 1
            ).to(self.device)
            for count in (1, 3)
        )
        known = (embedding, modulation, torch.tensor(sigmas, device=self.device))
        index = None if rows is None else rows.int()
        forward = self.forward if self.graphs is None else self.graphs
        # `Graphs` reads frames off the second dim
        frames = latents.unflatten(1, (-1, FRAME_TOKENS))
        return forward(start, frames, known, index).flatten(1, 2)

    def forward(
        self,
        start_frame: int,
        latents: Tensor,
        embedded: tuple[Tensor, Tensor, Tensor],
        rows: Tensor | None,
    ) -> Tensor:
        """Return the latents less sigma times what the layers make of them."""
        cache, given = self.cache, latents.flatten(1, 2)
        embedding, modulation, sigma = embedded
        shift, scale, gate = modulation.chunk(3, dim=-1)
        lengths = cache.lengths if rows is None else cache.lengths.index_select(0, rows)
        seqlens = lengths + given.shape[1]
        # a row for each block, or one for all
        tokens = given.shape[1] // embedding.shape[1]
        hidden = given.bfloat16() + embedding.bfloat16().repeat_interleave(tokens, 1)
        level = sigma.repeat_interleave(tokens)[:, None]
        grid = (latents.shape[1], *GRID[1:])
        for layer, block in enumerate(self.transformer.blocks):
            x = modulated_layer_norm(hidden, shift, scale)
            query, key, value = (
                part.unflatten(2, (HEADS, DIM)) for part in block.qkv(x).chunk(3, dim=-1)
            )
            query = norm_rope_stage_(
                query, key, value, cache.k[layer], cache.v[layer], cache.lengths,
                self.rope_table.reserve(0), grid, query_weight=block.norm[0],
                key_weight=block.norm[1], sink=cache.sink, cache_batch_idx=rows,
            )  # fmt: skip
            out = block.out(cache.attend(layer, query, seqlens, rows).flatten(2))
            hidden, x = gated_residual_layer_norm(hidden, out, gate, shift, scale)
            prompt = block.attn2.processor
            keys = [part if rows is None else part[rows] for part in (prompt.key, prompt.value)]
            asked = block.query(x).unflatten(2, (HEADS, DIM)).transpose(1, 2)
            seen = F.scaled_dot_product_attention(asked, *keys).transpose(1, 2).flatten(2)
            hidden, x = gated_residual_layer_norm(hidden, seen, None, shift, scale)
            middle = block.first(x)
            if isinstance(block.first, nn.Linear):
                middle = F.gelu(middle, approximate="tanh")
            hidden = gated_residual(hidden, block.second(middle), gate)
        return (given - level * hidden.float()).view_as(latents)


def run(model: StandIn, latents: Tensor, seed: int = 0) -> list[Tensor]:
    """Return what passes over five blocks give: of all sequences, of two, of two blocks in one.

    Two blocks in one pass have one level, then each its own.
    """
    model.start(seed)
    rows, out = torch.tensor([2, 0], device=model.device), []
    tokens = FRAMES * FRAME_TOKENS
    for block, part in enumerate(latents.split(tokens, dim=1)):
        start = block * FRAMES
        for sigma in (0.9, 0.5):
            out.append(model.step(part, sigma, start))
        out.append(model.step(part[rows], 0.3, start, rows))
        model.step(part, 0.0, start)
        model.cache.commit(tokens)
    model.start(seed + 1)
    out.append(model.step(latents[:, : 2 * tokens], (0.3, 0.9), 0))
    out.append(model.step(latents[:, : 2 * tokens], (0.9, 0.3), 0))
    out.append(model.step(latents[:, : 2 * tokens], 0.0, 0))
    model.cache.commit(2 * tokens)
    out.append(model.step(latents[:, 2 * tokens : 3 * tokens], 0.7, 2 * FRAMES))
    return out


def latents_on(device: str) -> Tensor:
    """Return five blocks of three sequences."""
    random = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, 5 * FRAMES * FRAME_TOKENS, WIDTH, generator=random).to(device)


def require_e4m3(fp8: bool) -> None:
    """Skip what this GPU cannot multiply."""
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 products need compute capability 8.9")


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_the_stand_in_is_a_model_whose_passes_depend_on_the_past(fp8: bool) -> None:
    """On any machine: without a GPU graphs say so, and the passes are the same."""
    plain, graphed = (StandIn("cpu", graphs=graphs, fp8=fp8) for graphs in (False, True))
    latents = latents_on("cpu")
    expected = run(plain, latents)
    for mine, theirs in zip(run(graphed, latents), expected, strict=True):
        assert torch.equal(mine, theirs)
    assert all(out.isfinite().all() for out in expected)
    changed = latents.clone()
    changed[:, : FRAMES * FRAME_TOKENS] += 1
    # the sink is seen by the last block
    assert not torch.equal(run(plain, changed)[-5], expected[-5])
    assert not torch.equal(run(plain, latents, seed=5)[0], expected[0])
    # each block at its own level, to the rounding of products of another height
    tokens = FRAMES * FRAME_TOKENS
    plain.start(1)
    for level, both in zip((0.3, 0.9), expected[-4:-2], strict=True):
        off = plain.step(latents[:, :tokens], level, 0) - both[:, :tokens]
        assert off.abs().max() < 0.05
    assert (expected[-4] - expected[-3])[:, :tokens].abs().max() > 1


def test_each_gpu_is_recorded_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that had moved was captured on its old GPU's stream: nothing was in the graph."""
    made, used = [], []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device
            made.append(device)

        def wait_stream(self, other: object) -> None:
            pass

    def current(stream: Stream) -> contextlib.nullcontext[None]:
        used.append(stream.device)
        return contextlib.nullcontext()

    first, second = (torch.device("cuda", index) for index in range(2))
    caller = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: caller)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", current)
    recorder = Recorder()
    for device in (first, first, second):
        assert recorder.warm_up(lambda: "done", device) == "done"
    assert used == [first, first, second]
    assert made == [first, second]


def test_after_a_broken_capture_one_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refused to draw random numbers on the GPU for the rest of the process."""
    ended, streams, caller = [], [], SimpleNamespace(device_index=0)

    @contextlib.contextmanager
    def capturing(graph: object, **options: object) -> Iterator[None]:
        try:
            yield
        except ValueError as cause:
            ended.append("broken")
            raise RuntimeError("operation failed due to a previous error") from cause
        ended.append("well")

    def forward() -> None:
        raise ValueError("not permitted")

    for name, made in (
        ("device", lambda device: contextlib.nullcontext()),
        ("current_stream", lambda: caller),
        ("CUDAGraph", object),
        ("graph_pool_handle", lambda: (0, 1)),
        ("graph", capturing),
        ("set_stream", streams.append),
    ):
        monkeypatch.setattr(torch.cuda, name, made)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *_: None, raising=False)
    with pytest.raises(RuntimeError, match="due to a previous error") as caught:
        Recorder().record(forward, torch.device("cpu"))
    assert ended == ["broken", "well"]
    assert streams[-1] is caller
    assert first_cause(caught.value) == "ValueError: not permitted"


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_replays_equal_launches_bit_for_bit(fp8: bool) -> None:
    require_e4m3(fp8)
    plain, graphed = (StandIn("cuda", graphs=graphs, fp8=fp8) for graphs in (False, True))
    latents = latents_on("cuda")
    # the second video has another prompt, in the same captures
    for seed in (0, 7):
        for mine, theirs in zip(
            run(graphed, latents, seed), run(plain, latents, seed), strict=True
        ):
            assert torch.equal(mine, theirs)
        assert torch.equal(graphed.cache.k, plain.cache.k)
    assert not graphed.graphs._failure
    assert len(graphed.graphs._graphs) == 4


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_a_gpu_that_works(caplog: pytest.LogCaptureFixture) -> None:
    room._warn_once.cache_clear()
    plain, broken, sound = (StandIn("cuda", graphs=graphs) for graphs in (False, True, True))
    forward = broken.forward

    def waits(start_frame: int, latents: Tensor, *rest: object) -> Tensor:
        latents.sum().item()
        return forward(start_frame, latents, *rest)

    broken.forward = waits
    latents = latents_on("cuda")
    stream, expected = torch.cuda.current_stream(), run(plain, latents)
    for model in (broken, sound):
        for mine, theirs in zip(run(model, latents), expected, strict=True):
            assert torch.equal(mine, theirs)
        assert torch.cuda.current_stream() == stream
        # torch's generator is not captured any more
        assert torch.rand(2, device="cuda").isfinite().all()
    (said,) = [record.message for record in caplog.records if record.name == "sdvg"]
    assert said.startswith("accelerate: passes are launched one by one: a capture failed: ")
    assert not sound.graphs._failure
    assert len(sound.graphs._graphs) == 4


@pytest.mark.gpu
def test_released_graphs_give_their_memory_back() -> None:
    model, latents = StandIn("cuda", graphs=True), latents_on("cuda")
    sizes = []
    for _ in range(3):
        run(model, latents)
        model.graphs.release()
        torch.cuda.synchronize()
        sizes.append(torch.cuda.memory_allocated())
    assert sizes[1] == sizes[2]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_gpu_is_captured_there() -> None:
    plain, graphed = (StandIn("cuda:1", graphs=graphs) for graphs in (False, True))
    latents = latents_on("cuda:1")
    for mine, theirs in zip(run(graphed, latents), run(plain, latents), strict=True):
        assert torch.equal(mine, theirs)
    assert not graphed.graphs._failure
    assert torch.cuda.current_device() == 0
