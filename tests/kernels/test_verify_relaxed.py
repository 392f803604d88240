"""verify_relaxed and verify_typical in every lane."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdvg_kernels import (
    TokenTree,
    Verified,
    sample_tokens,
    verify_relaxed,
    verify_tree,
    verify_typical,
)
from sdvg_kernels.testing import Lane
from sdvg_kernels.verify import config
from tests.kernels.drafts import (
    Lender,
    Warped,
    distribution,
    keys,
    on,
    one_by_one,
    random_trees,
    walked,
)

_INTEGERS = pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.int32])


def _table(vocabulary: int, count: int, random: torch.Generator) -> Tensor:
    """Return `count` others for each token, in any order."""
    order = torch.rand(vocabulary, vocabulary, generator=random)
    return order.fill_diagonal_(2).argsort(1)[:, :count].int()


def _same(left: Verified, right: Verified) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("bounds", "warp"),
    [
        ({"delta": 0.3}, {}),
        ({"delta": 0.2}, {"top_k": 6, "guidance": 1.5}),
        ({"ratio": 2.5}, {"temperature": 0.8}),
        ({"delta": 0.4, "ratio": 1.8}, {}),
    ],
)
def test_a_child_stands_for_the_neighbours_that_fit_its_bound(
    bounds: dict[str, float],
    warp: dict[str, float],
    lane: Lane,
    random: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # seven are looked up in two turns
    monkeypatch.setattr(config, "NEIGHBOURS", 4)
    batch = 4 if lane.name == "interpreter" else 120
    logits, uncond = torch.randn(2, batch, 6, 11, generator=random)
    tree = random_trees(logits, random, likeliest=5)
    table = _table(11, 7, random)
    warped = Warped(uncond if "guidance" in warp else None, **warp)
    paths, tokens = walked(tree, logits, keys(batch), warped, 5, Lender(table, **bounds))
    options = warped._asdict()
    if warped.uncond is not None:
        options["uncond"] = uncond.to(lane.device)
    out = verify_relaxed(
        on(lane.device, tree),
        logits.to(lane.device),
        table.to(lane.device),
        **keys(batch, lane.device),
        **bounds,
        **options,
        implementation=lane.implementation,
    )
    assert out.path.tolist() == paths
    assert out.tokens.tolist() == tokens


@pytest.mark.parametrize("bounds", [{"delta": 0.0}, {"ratio": 1.0}, {"delta": 0.9}])
def test_a_bound_that_lets_nothing_move_is_exact_draw_by_draw(
    bounds: dict[str, float], lane: Lane, random: torch.Generator
) -> None:
    # where top-k leaves tokens without mass, and at temperature 0 with any bound
    batch = 4 if lane.name == "interpreter" else 300
    logits = torch.randn(batch, 5, 12, generator=random)
    tree = on(lane.device, random_trees(logits, random, likeliest=2))
    table = _table(12, 11, random).to(lane.device)
    run = {**keys(batch, lane.device), "top_k": 5, "implementation": lane.implementation}
    if bounds.get("delta"):
        run["temperature"] = 0
    logits = logits.to(lane.device)
    exact = verify_tree(tree, logits, **run)
    assert exact.counts.max() > 1
    assert _same(verify_relaxed(tree, logits, table, **bounds, **run), exact)


def test_at_most_delta_of_the_mass_moves(random: torch.Generator) -> None:
    # the law of a node's token, by the rule that the op is held to above draw by draw: the coin's
    # share of each child, and what is left of p behind them
    moved_most = 0.0
    for delta in (0.05, 0.3, 0.7):
        for _ in range(15):
            p = (2 * torch.randn(9, generator=random)).double().softmax(0)
            children = torch.randperm(9, generator=random)[:4].tolist()
            lender = Lender(_table(9, 8, random), delta)
            law, taken = torch.zeros_like(p), 0.0
            for i, x in enumerate(children):
                # where the coin stops at child i, by bisection: shares are intervals of the coin
                low, high = taken, 1.0
                while high - low > 1e-8:
                    middle = (low + high) / 2
                    found, _ = one_by_one(p, children, middle, lender)
                    inside = found is not None and found <= i
                    low, high = (middle, high) if inside else (low, middle)
                law[x] += low - taken
                taken = low
            if taken < 1 - 1e-7:
                _, left = one_by_one(p, children, 1 - 1e-12, lender)
                law += (1 - taken) * left / left.sum()
            moved = (law - p).abs().sum().item() / 2
            assert moved <= delta + 1e-6
            moved_most = max(moved_most, moved / delta)
    # the bound is used
    assert moved_most > 0.9


@_INTEGERS
def test_tables_of_any_integer_are_read_and_what_is_no_token_is_not(
    dtype: torch.dtype, lane: Lane, random: torch.Generator
) -> None:
    logits = torch.randn(4, 4, 9, generator=random)
    tree, table = random_trees(logits, random), _table(9, 6, random)
    wide = torch.full((9, 8), 9)
    wide[:, 0] = -1 if dtype != torch.uint16 else 65535
    wide[:, 2:] = table
    strided = wide.to(dtype).repeat_interleave(2, 1)[:, ::2].to(lane.device)
    run = {**keys(4, lane.device), "delta": 0.4, "implementation": lane.implementation}
    tree, logits = on(lane.device, tree), logits.to(lane.device)
    out = verify_relaxed(tree, logits, strided, **run)
    assert _same(out, verify_relaxed(tree, logits, table.to(lane.device), **run))


_PROBE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sdvg_kernels.verify import walk

case = next(case for case in walk.compilations(90) if "relaxed" in case.config)
small = {"BV": 1024, "BR": 512, "BK": 8, "HAS_UNCOND": False, "HAS_TOP_K": False, "uncond": None}
constants = case.constants | small | {"HAS_TOP_P": False}
names = case.kernel.arg_names
signature = {n: "constexpr" if n in constants else case.signature[n] for n in names}
found = {(names.index(name),): value for name, value in constants.items()}
source = ASTSource(case.kernel, signature, found)
options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


def test_every_warp_has_looked_at_the_neighbours_before_one_leaves_them_out() -> None:
    """Few neighbours are held by each warp, and a later one saw what the first had left out."""
    pytest.importorskip("triton")
    root = str(Path(__file__).resolve().parents[2])
    given = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    given["PYTHONPATH"] = os.pathsep.join(filter(None, [root, given.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], env=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # stamps and logits have 16 bits, nothing else has
    steps = re.findall(r"(ld|st)\.global\.b16|(bar)\.sync", done.stdout)
    order = ["".join(step) for step in steps]
    # the first stores clear the stamps
    order = order[order.index("bar") :]
    assert order.count("st") == 2
    for place in (place for place, step in enumerate(order) if step == "st"):
        assert order[place - 1] == "bar", order


def _typical(
    tree: TokenTree, logits: Tensor, warp: Warped, depth: int, epsilon: float, alpha: float
) -> list[list[int]]:
    """Return the paths by the words of the contract, node by node."""
    paths = []
    for b in range(len(logits)):
        found = [(0, 0.0, [0])]
        for node in range(1, logits.shape[1]):
            parent = int(tree.parents[b, node])
            above = [each for each in found if each[2][-1] == parent]
            if not above or len(above[0][2]) > depth:
                continue
            p = distribution(logits[b, parent], None, warp)
            entropy = -torch.special.xlogy(p, p).sum().item()
            chance = p[tree.tokens[b, node]].item()
            if chance > min(epsilon, alpha * math.exp(-entropy)):
                level, score, path = above[0]
                found.append((level - 1, score - math.log(chance), [*path, node]))
        # the longest, then the likeliest, then the first
        path = min(found, key=lambda each: (each[0], round(each[1], 12)))[2]
        paths.append(path + [-1] * (depth + 1 - len(path)))
    return paths


@pytest.mark.parametrize(
    ("epsilon", "alpha", "depth", "warp"),
    [
        (0.3, 0.5, 5, {}),
        (0.05, 9.0, 2, {"top_k": 6, "temperature": 1.5}),
        (0.3, 0.5, 5, {"temperature": 0.0}),
    ],
)
def test_the_longest_typical_path_is_accepted(
    epsilon: float,
    alpha: float,
    depth: int,
    warp: dict[str, float],
    lane: Lane,
    random: torch.Generator,
) -> None:
    batch = 6 if lane.name == "interpreter" else 150
    logits = 1.5 * torch.randn(batch, 6, 8, generator=random)
    tree = random_trees(logits, random, likeliest=2)
    expected = _typical(tree, logits, Warped(**warp), depth, epsilon, alpha)
    bounds = {"epsilon": epsilon, "alpha": alpha, "depth": depth}
    run = {**warp, "implementation": lane.implementation}
    keyed = keys(batch, lane.device)
    out = verify_typical(on(lane.device, tree), logits.to(lane.device), **bounds, **keyed, **run)
    assert out.path.tolist() == expected
    assert out.counts.max() > 1
    # the token behind is drawn from all of the last node's distribution
    last = out.path.gather(1, (out.counts - 1).long()[:, None])[:, 0].long()
    keyed["positions"] = keyed["positions"] + out.counts - 1
    rows = logits.to(lane.device)[torch.arange(batch), last.to(lane.device)]
    assert torch.equal(out.tokens, sample_tokens(rows, **keyed, **run))


def test_of_equally_long_and_likely_paths_the_first_is_taken(lane: Lane) -> None:
    logits = torch.zeros(1, 7, 4, device=lane.device)
    logits[0, 2, 3] = 1
    # two paths of one level, and two of two: the one through node 2 is likelier, in node 5
    tree = TokenTree.from_parents(torch.tensor([0, 0, 1, 2, 0, 3, 1]), [-1, 0, 0, 0, 1, 2, 2])
    run = {"epsilon": 0.1, "alpha": 0.5, **keys(1, lane.device)}
    run["implementation"] = lane.implementation
    assert verify_typical(on(lane.device, tree), logits, **run).path.tolist()[0][:3] == [0, 2, 5]
    logits[0, 2, 3] = 0
    assert verify_typical(on(lane.device, tree), logits, **run).path.tolist()[0][:3] == [0, 1, 4]


def test_a_path_ends_where_a_row_has_no_distribution(lane: Lane) -> None:
    logits = torch.zeros(2, 4, 3, device=lane.device)
    logits[0, 1], logits[1, 3] = math.nan, math.nan
    tree = TokenTree.from_parents(torch.tensor([[0, 1, 2, 1]] * 2), [-1, 0, 0, 2])
    run = {"epsilon": 0.1, "alpha": 0.5, **keys(2, lane.device)}
    out = verify_typical(on(lane.device, tree), logits, **run, implementation=lane.implementation)
    assert out.path.tolist() == [[0, 2, 3, -1], [-1] * 4]
    assert out.counts.tolist() == [3, 0]
    assert int(out.tokens[1]) == -1


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"neighbours": torch.zeros(3, 2).int()},
            ValueError,
            "neighbours must be [V, K] for logits [B, N, V], got [3, 2]; give a row for each token",
        ),
        ({"neighbours": torch.zeros(4).int()}, ValueError, "neighbours must be [V, K] with K >= 1"),
        ({"neighbours": torch.zeros(4, 2)}, TypeError, "neighbours must be int16, uint16 or int32"),
        ({"delta": None}, ValueError, "delta must be given, or ratio, got None; verify_tree is"),
        ({"delta": 1.0}, ValueError, "delta must lie in [0, 1), got 1.0"),
        ({"delta": math.nan}, ValueError, "delta must lie in [0, 1), got nan"),
        ({"ratio": 0.9}, ValueError, "ratio must be finite and at least 1, got 0.9; verify_tree"),
        ({"seeds": None}, ValueError, "seeds must be given unless temperature is 0, got None"),
    ],
)
def test_bad_input_gets_one_sentence(
    change: dict[str, object], error: type[Exception], text: str
) -> None:
    tree = TokenTree.from_parents(torch.zeros(2, 3, dtype=torch.int64), [-1, 0, 0])
    options = {"neighbours": torch.zeros(4, 2).int(), "delta": 0.1, **keys(2), **change}
    with pytest.raises(error) as caught:
        verify_relaxed(tree, torch.zeros(2, 3, 4), **options)
    assert str(caught.value).startswith(f"verify_relaxed: {text}")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"epsilon": 0.0}, "epsilon must lie in (0, 1), got 0.0"),
        ({"alpha": math.inf}, "alpha must be finite and above 0, got inf"),
    ],
)
def test_bad_thresholds_get_one_sentence(change: dict[str, float], text: str) -> None:
    tree = TokenTree.from_parents(torch.zeros(2, 3, dtype=torch.int64), [-1, 0, 0])
    options = {"epsilon": 0.1, "alpha": 0.3, **keys(2), **change}
    with pytest.raises(ValueError, match=r"^verify_typical: ") as caught:
        verify_typical(tree, torch.zeros(2, 3, 4), **options)
    assert str(caught.value) == f"verify_typical: {text}"


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["relaxed", "typical"])
def test_a_graph_replays_and_both_devices_accept_the_same(
    rule: str, random: torch.Generator
) -> None:
    def made() -> tuple[TokenTree, Tensor]:
        logits = (3 * torch.randn(4, 59, 16384, generator=random)).bfloat16().float()
        return random_trees(logits, random, likeliest=2), logits

    tree, logits = made()
    table = torch.stack([torch.randperm(16384, generator=random)[:1000] for _ in range(64)])
    table = table.repeat(256, 1).to(torch.uint16)
    # so cold that paths are some nodes long
    options = {"temperature": 0.2, "top_k": 2000, "depth": 12}

    def verified(tree: TokenTree, logits: Tensor, keyed: dict[str, Tensor]) -> Verified:
        if rule == "typical":
            return verify_typical(tree, logits, epsilon=0.1, alpha=0.3, **keyed, **options)
        return verify_relaxed(tree, logits, table.to(logits.device), delta=0.2, **keyed, **options)

    table = table.cuda()
    tree_there, logits_there, keyed_there = on("cuda", tree), logits.cuda(), keys(4, "cuda")
    verified(tree_there, logits_there, keyed_there)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = verified(tree_there, logits_there, keyed_there)
    for seed in (1, 2):
        tree, logits = made()
        for old, new in zip((*tree_there, logits_there), (*tree, logits), strict=True):
            old.copy_(new)
        for name, key in keys(4, seed=seed).items():
            keyed_there[name].copy_(key)
        graph.replay()
        here = verified(tree, logits, keys(4, seed=seed))
        assert _same(out, here)
        assert here.counts.max() > 1
