"""Trees through a target and its drafter are what each of their paths is alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdvg.models.drafter import EagleDrafter, load_drafter
from sdvg.models.llama import LlamaSizes, TokenCache
from sdvg.models.llamagen import LlamaGen
from sdvg.models.tokens import TokenLlama
from sdvg.tokens import DiagonalDecoder, Layout, Sampling
from sdvg.tokens.speculative import Exact, SpeculativeDecoder

SIZES = LlamaSizes(2, 48, 6, 2, 12, 40, 23)
# of 2 sequences, nodes by level: 0 -> 1 2, 1 -> 3 4, 2 -> 5, 4 -> 6; and one with padding
PARENTS = torch.tensor([[-1, 0, 0, 1, 1, 2, 4], [-1, 0, 1, 1, 2, -1, -1]], dtype=torch.int32)
NODES = 7


def _models(width: int = 48) -> tuple[TokenLlama, EagleDrafter]:
    torch.manual_seed(0)
    target = TokenLlama(SIZES).double().eval()
    drafter = EagleDrafter(LlamaSizes(1, width, 6, 2, 12, 40, 23)).double().eval()
    for weight in (*target.parameters(), *drafter.parameters()):
        weight.requires_grad_(False)
        # norms and biases that count
        if weight.ndim == 1:
            weight.uniform_(0.5, 1.5)
    return target, drafter


def _tree() -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens [2, N], depths [2, N] (-1: padding) and mask [2, N, 1] of `PARENTS`."""
    torch.manual_seed(1)
    tokens = torch.randint(23, (2, NODES))
    depths, mask = torch.full((2, NODES), -1), torch.zeros(2, NODES, 1, dtype=torch.int32)
    for b in range(2):
        for n in range(NODES):
            parent = int(PARENTS[b, n])
            if n and parent < 0:
                continue
            depths[b, n] = depths[b, parent] + 1 if n else 0
            mask[b, n] = (mask[b, parent] if n else 0) | 1 << n
    return tokens, depths.int(), mask


def _path(b: int, node: int) -> list[int]:
    path = [node]
    while PARENTS[b, path[0]] >= 0:
        path.insert(0, int(PARENTS[b, path[0]]))
    return path


def _whole(target: TokenLlama, ids: Tensor, leftpad: Tensor | None = None) -> Tensor:
    """Return the features of ids [B, L] in one causal pass."""
    return target.prefill(ids, target.new_cache(len(ids), ids.shape[1]))


@pytest.mark.parametrize("masked", [None, False], ids=["pytorch", "op"])
def test_a_trees_node_is_its_own_path_alone(masked: bool | None) -> None:
    target, _ = _models()
    target.masked = masked
    given = torch.randint(23, (2, 9))
    lengths = torch.tensor([9, 5], dtype=torch.int32)
    cache = target.new_cache(2, 13, scratch=NODES)
    target.prefill(given, cache)
    tokens, depths, mask = _tree()
    slots = torch.where(depths < 0, -1, lengths[:, None] + torch.arange(NODES)).int()
    out = target.feed_tree(
        tokens, slots, (lengths[:, None] + depths).int(), lengths, mask, cache,
        length=9 + NODES,
    )  # fmt: skip
    for b in range(2):
        for n in range(NODES):
            if depths[b, n] >= 0:
                ids = torch.cat((given[b, : lengths[b]], tokens[b, _path(b, n)]))[None]
                torch.testing.assert_close(out[b, n], _whole(target, ids)[0, -1])


def test_slots_that_nobody_sees_may_be_nan() -> None:
    target, _ = _models()
    target.masked = False
    tokens, depths, mask = _tree()
    lengths = torch.tensor([6, 6], dtype=torch.int32)
    slots = torch.where(depths < 0, -1, lengths[:, None] + torch.arange(NODES)).int()
    made = []
    for poison in (0.0, torch.nan):
        cache = target.new_cache(2, 10, scratch=NODES)
        cache.k[:, :, 6:], cache.v[:, :, 6:] = poison, poison
        target.prefill(torch.arange(12).view(2, 6), cache)
        made.append(target.feed_tree(tokens, slots, 6 + depths, lengths, mask, cache))
    alive = depths >= 0
    assert torch.equal(made[0][alive], made[1][alive])


def test_a_chain_and_its_whole_sequence_are_one() -> None:
    target, _ = _models()
    ids = torch.randint(23, (2, 14))
    whole = _whole(target, ids)
    cache = target.new_cache(2, 14)
    features = target.prefill(ids[:, :4], cache)
    torch.testing.assert_close(features, whole[:, :4])
    slots = torch.arange(4, 14, dtype=torch.int32).expand(2, -1)
    mask = torch.tensor([(2 << i) - 1 for i in range(10)], dtype=torch.int32)
    mask = mask[:, None].expand(2, -1, -1)
    lengths = torch.tensor([4, 4], dtype=torch.int32)
    out = target.feed_tree(ids[:, 4:], slots, slots, lengths, mask, cache)
    torch.testing.assert_close(out, whole[:, 4:])
    torch.testing.assert_close(target.logits(out), target.head(out))


def test_words_behind_the_first_have_bits_of_their_own() -> None:
    target, _ = _models()
    ids = torch.randint(23, (1, 4))
    cache = target.new_cache(1, 4, scratch=40)
    target.prefill(ids[:, :2], cache)
    lengths = torch.tensor([2], dtype=torch.int32)
    # the chain's entry in word 0's last bit, the root of the tree behind it
    slots = torch.tensor([[2 + 31, 2 + 32]], dtype=torch.int32)
    positions = torch.tensor([[2, 3]], dtype=torch.int32)
    mask = torch.tensor([[[-(1 << 31), 0], [-(1 << 31), 1]]], dtype=torch.int32)
    out = target.feed_tree(ids[:, 2:], slots, positions, lengths, mask, cache)
    torch.testing.assert_close(out, _whole(target, ids)[:, 2:])


def _start(
    target: TokenLlama, drafter: EagleDrafter, ids: Tensor, slots: int, scratch: int
) -> tuple[Tensor, Tensor, TokenCache]:
    """Return the target's features of `ids`, the drafter's of all but the first, and its cache."""
    features = _whole(target, ids)
    cache = drafter.new_cache(target, len(ids), slots, scratch=scratch)
    count = ids.shape[1] - 1
    place = torch.arange(1, count + 1, dtype=torch.int32).expand(len(ids), -1)
    mask = torch.tensor([(2 << i) - 1 for i in range(count)], dtype=torch.int32)
    made = drafter.feed(
        drafter.embed(ids[:, 1:], target), features[:, :-1], place, place,
        torch.ones(len(ids), dtype=torch.int32), mask[:, None].expand(len(ids), -1, -1), cache,
    )  # fmt: skip
    return features, made, cache


def test_a_fed_chain_is_the_training_forward() -> None:
    target, drafter = _models()
    ids = torch.randint(23, (2, 11))
    features, made, _ = _start(target, drafter, ids, 11, 0)
    turned = tuple(part[1:] for part in target.angles(11))
    whole = drafter(target.embed(ids[:, 1:]), features[:, :-1], turned)
    torch.testing.assert_close(made, whole)


@pytest.mark.parametrize("masked", [None, False], ids=["pytorch", "op"])
def test_a_draft_goes_on_from_its_own_features(masked: bool | None) -> None:
    target, drafter = _models()
    drafter.masked = masked
    ids = torch.randint(23, (2, 6))
    features, made, cache = _start(target, drafter, ids, 9, 4)
    # two siblings behind the newest token, and a child of the second, at one slot each
    tokens = torch.randint(23, (2, 3))
    lengths = torch.tensor([6, 6], dtype=torch.int32)
    first = made[:, -1:].expand(-1, 2, -1)

    def feed(at: list[int], given: Tensor, depth: int, bits: list[int]) -> Tensor:
        place = 6 + torch.tensor(at, dtype=torch.int32).expand(2, -1)
        sees = torch.tensor(bits, dtype=torch.int32)[:, None].expand(2, -1, -1)
        return drafter.feed(
            drafter.embed(tokens[:, at], target), given, place, torch.full_like(place, 6 + depth),
            lengths, sees, cache,
        )  # fmt: skip

    siblings = feed([0, 1], first, 0, [0b1, 0b10])
    child = feed([2], siblings[:, 1:], 1, [0b110])
    for path, out in (([0], siblings[:, :1]), ([1], siblings[:, 1:]), ([1, 2], child)):
        fed = torch.cat((ids[:, 1:], tokens[:, path]), 1)
        own = torch.cat((features[:, :-1], made[:, -1:], siblings[:, 1:]), 1)[:, : fed.shape[1]]
        turned = tuple(part[1:] for part in target.angles(fed.shape[1] + 1))
        whole = drafter(target.embed(fed), own, turned)
        torch.testing.assert_close(out[:, 0], whole[:, -1])


def test_slot_0_is_never_used() -> None:
    target, drafter = _models()
    cache = drafter.new_cache(target, 2, 5)
    assert cache.leftpad.tolist() == [1, 1]
    cache.k[:, :, 0], cache.v[:, :, 0] = 5.0, 5.0
    ids = torch.randint(23, (2, 4))
    features = _whole(target, ids)
    place = torch.arange(1, 4, dtype=torch.int32).expand(2, -1)
    lengths = torch.ones(2, dtype=torch.int32)
    mask = torch.tensor([1, 3, 7], dtype=torch.int32)[:, None].expand(2, -1, -1)
    made = drafter.feed(
        drafter.embed(ids[:, 1:], target), features[:, :-1], place, place, lengths, mask, cache
    )
    turned = tuple(part[1:] for part in target.angles(4))
    torch.testing.assert_close(made, drafter(target.embed(ids[:, 1:]), features[:, :-1], turned))


def test_scratch_slots_have_no_positions_of_their_own() -> None:
    target = LlamaGen(LlamaSizes(1, 48, 4, 4, 12, 40, 23), 2, classes=3).double()
    with pytest.raises(ValueError, match="slots must be at most 5"):
        target.new_cache(1, 6)
    cache = target.new_cache(1, 5, scratch=3)
    assert cache.slots == 8
    assert len(cache.cos) == 5
    ids = torch.tensor([[1, 2]])
    slots, lengths = torch.tensor([[5, 7]]).int(), torch.zeros(1).int()
    mask = torch.tensor([[[1 << 5], [1 << 7]]], dtype=torch.int32)
    # one beyond the last has the last's
    out = [
        target.feed_tree(ids, slots, torch.tensor([at]).int(), lengths, mask, cache)
        for at in ([4, 4], [4, 9])
    ]
    assert torch.equal(*out)
    assert out[0].shape == (1, 2, 48)


def test_a_target_of_another_width_is_refused() -> None:
    target, _ = _models()
    drafter = EagleDrafter(LlamaSizes(1, 36, 3, 3, 12, 40, 23))
    with pytest.raises(ValueError, match="drafter: target must have features of 36, got 48"):
        drafter.new_cache(target, 1, 4)
    drafter = EagleDrafter(LlamaSizes(1, 48, 3, 3, 16, 40, 23))
    with pytest.raises(ValueError, match="drafter: target must have heads of 16, got 12"):
        drafter.new_cache(target, 1, 4)


CODES, SIDE, CONDITION = 11, 3, 4
OWN = LlamaSizes(2, 32, 2, 2, 16, 24, CODES, 1e-5)


def _released() -> dict[str, Tensor]:
    """Return a small file of LANTERN's, by the names of its training."""
    torch.manual_seed(4)
    shapes = {
        "embed_tokens.weight": (CODES, 32), "fc.weight": (32, 64), "fc.bias": (32,),
        "layers.0.post_attention_layernorm.weight": (32,),
        **{f"layers.0.self_attn.{part}_proj.weight": (32, 32) for part in "qkvo"},
        "layers.0.mlp.gate_proj.weight": (24, 32), "layers.0.mlp.up_proj.weight": (24, 32),
        "layers.0.mlp.down_proj.weight": (32, 24),
    }  # fmt: skip
    return {name: torch.randn(shape, dtype=torch.float64) / 3 for name, shape in shapes.items()}


def _target() -> LlamaGen:
    torch.manual_seed(5)
    target = LlamaGen(OWN, SIDE, condition=CONDITION, features=6).double().eval()
    return target.requires_grad_(False)


def _restated(state: dict[str, Tensor], ids: Tensor, features: Tensor) -> Tensor:
    """Return LANTERN's own forward of tokens 1, 2, ...: a sequence [L] and features [L, 32].

    Pairs side by side, in complex numbers; one zero less than the condition has tokens, then the
    image's rows and columns.
    """
    x = F.linear(
        torch.cat((state["embed_tokens.weight"][ids], features), 1), state["fc.weight"],
        state["fc.bias"],
    )  # fmt: skip
    count = len(x)
    rate = 1e4 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    cells = [(r, c) for r in range(SIDE) for c in range(SIDE)]
    turn = torch.stack([torch.cat((r * rate, c * rate)) for r, c in cells])
    turn = torch.polar(torch.ones_like(turn), turn)
    turn = torch.cat((torch.zeros(CONDITION - 1, 8).to(turn), turn))[:count]

    def heads(part: str) -> Tensor:
        return F.linear(x, state[f"layers.0.self_attn.{part}_proj.weight"]).view(count, 2, 16)

    def turned(part: str) -> Tensor:
        pairs = torch.view_as_complex(heads(part).unflatten(-1, (8, 2)).contiguous())
        return torch.view_as_real(pairs * turn[:, None]).flatten(-2)

    scores = torch.einsum("qhd,khd->hqk", turned("q"), turned("k")) / 4
    scores = scores.masked_fill(torch.ones(count, count).triu(1) > 0, -torch.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), heads("v")).flatten(1)
    x = x + F.linear(out, state["layers.0.self_attn.o_proj.weight"])
    rms = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    normed = rms * state["layers.0.post_attention_layernorm.weight"]
    gate, up, down = (state[f"layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return x + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)


def test_lanterns_drafter_drafts_as_it_was_trained() -> None:
    state, target = _released(), _target()
    drafter = load_drafter(state, OWN)
    prompt = target.captions(torch.randn(1, CONDITION, 6, dtype=torch.float64))
    codes = torch.randint(CODES, (1, 6))
    ids = torch.cat((prompt, codes), 1)
    features, made, _ = _start(target, drafter, ids, CONDITION + SIDE**2, 0)
    # what conditions is fed as code 0
    fed = torch.cat((torch.zeros(CONDITION - 1, dtype=torch.int64), codes[0]))
    expected = _restated(state, fed, features[0, :-1])
    torch.testing.assert_close(made[0], expected, atol=1e-6, rtol=1e-6)


def test_llamagen_speculates_to_its_own_raster_tokens() -> None:
    state, target = _released(), _target()
    for weight in target.parameters():
        # far from uniform
        weight.mul_(3 if weight.ndim > 1 else 1)
    features = torch.randn(2, CONDITION, 6, dtype=torch.float64)
    # a caption that is shorter
    prompts = target.captions(features, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    layout, sampling = Layout(SIDE, SIDE, CODES), Sampling(0.9, top_k=6, guidance=2.0)
    how = {"frames": 1, "uncond": target.uncond(prompts), "seed": 3}
    (frame,) = DiagonalDecoder(target, layout, k=SIDE, sampling=sampling).generate(prompts, **how)
    decoder = SpeculativeDecoder(
        target, load_drafter(state, OWN, target=target), layout, sampling=sampling, depth=3,
        top_k=3, nodes=9, verification=Exact(coupled=True),
    )  # fmt: skip
    run = decoder.generate(prompts, **how)
    list(run)
    assert torch.equal(run.codes[:, 0], frame.codes)


def test_a_grid_that_is_not_llamagens_is_refused() -> None:
    """Positions are slots, so that other rows gave tokens, silently those of another image."""
    target = _target()
    prompts = target.captions(torch.randn(1, CONDITION, 6, dtype=torch.float64))
    decoder = SpeculativeDecoder(
        target, load_drafter(_released(), OWN), Layout(1, 9, CODES), depth=2, top_k=2
    )
    with pytest.raises(ValueError, match="grid must be 3 x 3 tokens behind 4, got 1 x 9 behind 4"):
        next(decoder.generate(prompts, frames=1))


def test_lanterns_embeddings_are_shared_where_they_are_the_targets() -> None:
    state, target = _released(), _target()
    assert load_drafter(state, OWN, target=target).embedding is not None
    state["embed_tokens.weight"] = target.embedding.weight[:CODES].clone()
    drafter = load_drafter(state, OWN, target=target)
    assert drafter.embedding is None
    ids = torch.tensor([[2, CODES + 3, 10]])
    expected = target.embed(torch.tensor([[2, 0, 10]]))
    assert torch.equal(drafter.embed(ids, target), expected)
    assert torch.equal(load_drafter(state, OWN).embed(ids, target), expected)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("fc.weight"), "the checkpoint must have fc.weight, got otherwise"),
        (
            lambda s: s.update({"layers.0.input_layernorm.weight": torch.ones(32)}),
            "the checkpoint must have no layers.0.attention_norm, got otherwise",
        ),
        (
            lambda s: s.update({"fc.weight": torch.ones(32, 32)}),
            r"fc.weight must be \[32, 64\], got \[32, 32\]",
        ),
    ],
)
def test_a_foreign_file_is_refused_in_one_sentence(
    change: Callable[[dict[str, Tensor]], object], text: str
) -> None:
    state = _released()
    change(state)
    with pytest.raises(ValueError, match=f"^tokens: {text}") as caught:
        load_drafter(state, OWN)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [None, True], ids=["op", "pytorch"])
def test_a_gpu_feeds_the_trees_of_the_cpu_and_replays_them(masked: bool | None) -> None:
    torch.manual_seed(6)
    # a head dim that the kernel has
    sizes = LlamaSizes(2, 128, 4, 2, 64, 96, 23)
    target, drafter = TokenLlama(sizes).eval(), EagleDrafter(replace(sizes, layers=1)).eval()
    given = torch.randint(23, (2, 9))
    tokens, depths, mask = _tree()
    lengths = torch.tensor([9, 5], dtype=torch.int32)
    slots = torch.where(depths < 0, -1, lengths[:, None] + torch.arange(NODES)).int()
    positions = (lengths[:, None] + depths).int()
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        target, drafter = target.to(device, dtype), drafter.to(device, dtype)
        target.masked = drafter.masked = None if device == "cpu" else masked
        cache = target.new_cache(2, 13, scratch=NODES)
        drafted = drafter.new_cache(target, 2, 13, scratch=NODES)
        target.prefill(given.to(device), cache)
        fed = [part.to(device) for part in (tokens, slots, positions, lengths, mask)]

        def feed(
            target: TokenLlama = target,
            drafter: EagleDrafter = drafter,
            caches: tuple[TokenCache, TokenCache] = (cache, drafted),
            fed: list[Tensor] = fed,
        ) -> tuple[Tensor, Tensor]:
            features = target.feed_tree(*fed, caches[0])
            made = drafter.feed(drafter.embed(fed[0], target), features, *fed[1:], caches[1])
            return features, made

        found.append(feed())
    alive = depths >= 0
    for exact, out in zip(*found, strict=True):
        error = (out.cpu().double() - exact)[alive].abs().max()
        assert error < 1e-4 * exact[alive].abs().max()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        feed()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = feed()
    # another tree in the same graph
    fed[0].copy_(fed[0].flip(1))
    graph.replay()
    for again, out in zip(replayed, feed(), strict=True):
        assert torch.equal(again.cpu()[alive], out.cpu()[alive])
