"""The cache ops over long histories, against a model that is plain lists."""

from __future__ import annotations

import random
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import sdvg_kernels
from sdvg_kernels.testing import host_lane_missing, host_lane_order

LANES = ["reference"]
LANES += [] if host_lane_missing() else ["host"]


class Sequence:
    """One sequence as plain lists: what each slot holds, and every token that was committed."""

    def __init__(self, held: list[int], length: int) -> None:
        self.held = held
        self.tokens: list[int | None] = [None] * length
        # tokens before this one may have been overwritten
        self.oldest = length

    @property
    def length(self) -> int:
        return len(self.tokens)


class Lane:
    """The same caches on one implementation's device."""

    def __init__(self, name: str, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> None:
        self.name, self.device = name, "cuda" if name == "cuda" else "cpu"
        self.k, self.v, self.lengths = (x.clone().to(self.device) for x in (k, v, lengths))
        self.undo: tuple[torch.Tensor, torch.Tensor] | None = None


class CacheMachine(RuleBasedStateMachine):
    """Stages, re-stages, accepts, rejects and compacts blocks of any size, in any sequences."""

    names: ClassVar[list[str]] = LANES
    steps: ClassVar[int] = 0

    @initialize(
        layers=st.integers(1, 3),
        batch=st.integers(1, 3),
        ring=st.integers(1, 9),
        sink=st.integers(0, 4),
        start=st.sampled_from([0, 1, 5, 1000]),
        dtype=st.sampled_from([torch.int8, torch.bfloat16, torch.float32]),
        shape=st.sampled_from([(1, 1), (3, 5), (2, 8)]),
    )
    def begin(
        self,
        layers: int,
        batch: int,
        ring: int,
        sink: int,
        start: int,
        dtype: torch.dtype,
        shape: tuple[int, int],
    ) -> None:
        self.layers, self.sink, self.ring = layers, sink, ring
        self.row, self.dtype = shape, dtype
        # a row is known by its number; `rows` has its bits, [layers, 2 (k, v), H, D]
        self.rows: list[torch.Tensor] = []
        self.sequences = [Sequence(self.new(sink + ring), start) for _ in range(batch)]
        self.staged: tuple[list[int], list[list[int]], list[list[int]]] | None = None
        k, v = self.stacked([s.held for s in self.sequences])
        lengths = torch.full((batch,), start, dtype=torch.int32)
        self.lanes = [Lane(name, k, v, lengths) for name in self.names]

    def new(self, count: int) -> list[int]:
        first = len(self.rows)
        item = torch.empty(0, dtype=self.dtype).element_size()
        shape = (count, self.layers, 2, self.row[0], self.row[1] * item)
        self.rows += torch.randint(0, 256, shape, dtype=torch.uint8).view(self.dtype).unbind()
        return list(range(first, first + count))

    def stacked(self, held: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of these numbers as K and V, each `[layers, b, T, H, D]`."""
        both = torch.stack([torch.stack([self.rows[n] for n in row]) for row in held])
        k, v = both.permute(2, 3, 0, 1, 4, 5).transpose(0, 1)
        return k.contiguous(), v.contiguous()

    def slot(self, token: int) -> int:
        return token if token < self.sink else self.sink + (token - self.sink) % self.ring

    def run(self, op: str, chosen: list[int], **arguments: object) -> None:
        """Run the op in every lane."""
        for lane in self.lanes:
            here = {
                name: value.to(lane.device) if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
            caches = {} if op == "commit_" else {"k_cache": lane.k, "v_cache": lane.v}
            if caches:
                here["sink"] = self.sink
            if op == "rollback_" or here.pop("save", False):
                here["undo"] = lane.undo
            index = torch.tensor(chosen, device=lane.device)
            here["batch_idx"] = None if chosen == list(range(len(self.sequences))) else index
            call = {**caches, **here, "lengths": lane.lengths, "implementation": lane.name}
            if lane.name == "host":
                with host_lane_order(random.randrange(2**16)):
                    getattr(sdvg_kernels, op)(**call)
            else:
                getattr(sdvg_kernels, op)(**call)

    def choose(self, data: st.DataObject) -> list[int]:
        everyone = range(len(self.sequences))
        return data.draw(st.permutations(everyone))[: data.draw(st.integers(1, len(everyone)))]

    def write(self, chosen: list[int], blocks: list[list[int]]) -> None:
        for b, block in zip(chosen, blocks, strict=True):
            sequence = self.sequences[b]
            for t, number in enumerate(block):
                sequence.held[self.slot(sequence.length + t)] = number

    @precondition(lambda self: self.staged is None)
    @rule(data=st.data())
    def stage(self, data: st.DataObject) -> None:
        chosen, tokens = self.choose(data), data.draw(st.integers(1, self.ring))
        before = [list(self.sequences[b].held) for b in chosen]
        blocks = [self.new(tokens) for _ in chosen]
        self.write(chosen, blocks)
        key, value = self.stacked(blocks)
        for lane in self.lanes:
            lane.undo = tuple(torch.empty_like(key, device=lane.device) for _ in range(2))
        self.run("stage_", chosen, key=key, value=value, save=True)
        self.staged = chosen, blocks, before

    @precondition(lambda self: self.staged is not None)
    @rule()
    def stage_again(self) -> None:
        chosen, blocks, before = self.staged
        blocks = [self.new(len(block)) for block in blocks]
        self.write(chosen, blocks)
        key, value = self.stacked(blocks)
        self.run("stage_", chosen, key=key, value=value)
        self.staged = chosen, blocks, before

    @precondition(lambda self: self.staged is not None)
    @rule(data=st.data(), rollback_first=st.booleans())
    def decide(self, data: st.DataObject, rollback_first: bool) -> None:
        chosen, blocks, before = self.staged
        accept = data.draw(st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen)))
        verdict, count = torch.tensor(accept), len(blocks[0])
        for op in ["rollback_", "commit_"] if rollback_first else ["commit_", "rollback_"]:
            self.run(op, chosen, accept=verdict, **({"count": count} if op == "commit_" else {}))
        for b, yes, block, held in zip(chosen, accept, blocks, before, strict=True):
            if yes:
                self.sequences[b].tokens += block
            else:
                self.sequences[b].held = held
        self.staged = None

    @precondition(lambda self: self.staged is not None)
    @rule(data=st.data())
    def keep_a_path(self, data: st.DataObject) -> None:
        chosen, blocks, _ = self.staged
        tokens = len(blocks[0])
        paths = [
            data.draw(st.permutations(range(tokens)))[: data.draw(st.integers(0, tokens))]
            for _ in chosen
        ]
        padded = torch.tensor([p + [-1] * (tokens - len(p)) for p in map(list, paths)])
        self.run("compact_", chosen, path=padded.to(torch.int32))
        for b, path, block in zip(chosen, paths, blocks, strict=True):
            sequence = self.sequences[b]
            # what the tree overwrote is gone
            sequence.oldest = max(sequence.oldest, sequence.length + tokens - self.ring)
            kept = [block[offset] for offset in path]
            for t, number in enumerate(kept):
                sequence.held[self.slot(sequence.length + t)] = number
            sequence.tokens += kept
        self.staged = None

    @invariant()
    def caches_hold_what_the_lists_hold(self) -> None:
        type(self).steps += 1
        k, v = self.stacked([s.held for s in self.sequences])
        lengths = torch.tensor([s.length for s in self.sequences], dtype=torch.int32)
        for lane in self.lanes:
            assert torch.equal(lane.lengths.cpu(), lengths), lane.name
            for cache, expected in ((lane.k, k), (lane.v, v)):
                same = cache.cpu().view(torch.uint8) == expected.view(torch.uint8)
                assert same.all(), lane.name

    @invariant()
    def recent_tokens_and_sinks_are_in_their_slots(self) -> None:
        if self.staged is not None:
            return
        for sequence in self.sequences:
            first = max(sequence.oldest, sequence.length - self.ring)
            for token in [*range(min(self.sink, sequence.length)), *range(first, sequence.length)]:
                if (number := sequence.tokens[token]) is not None:
                    assert sequence.held[self.slot(token)] == number


class GpuCacheMachine(CacheMachine):
    """The same histories on the GPU."""

    names: ClassVar[list[str]] = ["cuda"]
    steps: ClassVar[int] = 0


@pytest.mark.parametrize(
    "machine", [CacheMachine, pytest.param(GpuCacheMachine, marks=pytest.mark.gpu)]
)
def test_any_history_leaves_what_plain_lists_say(machine: type[CacheMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert machine.steps >= 2000
