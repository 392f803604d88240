"""The machine of the Gluon lane: partitions that take turns, barriers, and who knows what.

Partitions of all programs are threads, but one runs at a time, and hands over only where it could
meet another: the order is chosen by the machine, so that it can be repeated, be unkind, and show a
deadlock at once. What races is not left to the order. Every access is an event, a bit; a partition
carries the set of events that it knows to be over, and barriers pass that set on. An access that
meets one that it does not know is a fault, whichever came first here.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

# how long nothing may happen but polling before that counts as a deadlock
_PATIENCE = 20_000
# shared memory is watched in pieces of this many bytes
_PIECE = 16


class LaneFault(AssertionError):
    """What a kernel did that a GPU would answer with a hang, a race or a wrong result."""


class _Stopped(BaseException):
    """Ends the thread of a partition when another one has failed."""


def _closed() -> threading.Lock:
    """Return a gate that one `release` opens for one `acquire`."""
    gate = threading.Lock()
    gate.acquire()
    return gate


@dataclass
class Task:
    """A partition of a program: a warpgroup or a few warps that run together."""

    name: str
    program: tuple[int, int, int]
    grid: tuple[int, int, int]
    warps: int
    # sets of events, as bits: known to be over; the same for what the async proxy will see
    known: int = 0
    known_async: int = 0
    # own ordinary writes to shared memory that no fence has shown to the async proxy yet
    unfenced: int = 0
    # own accesses to global memory that not all threads of the partition know of
    loose: int = 0
    waits: Callable[[], bool] | None = None
    why: Callable[[], str] | None = None
    done: bool = False
    go: threading.Lock = field(default_factory=_closed)
    # products in flight, oldest first, and groups of stores by TMA
    products: list[object] = field(default_factory=list)
    stores: list[int] = field(default_factory=list)
    named: dict[int, NamedBarrier] = field(default_factory=dict)

    def learn(self, known: int, known_async: int) -> None:
        """Add what another knows."""
        self.known |= known
        self.known_async |= known_async

    @property
    def can_run(self) -> bool:
        """Return whether what it waits for has come."""
        return not self.done and (self.waits is None or self.waits())


@dataclass
class Copy:
    """A copy by TMA that has been issued and has not landed."""

    land: Callable[[], None]
    what: str


class Machine:
    """Runs tasks in an order that `seed` chooses.

    Seeds 0, 4, ... let the last partition (the producer) run ahead and copies land as late as they
    can; 1, 5, ... the first partitions, and copies at once; 2, 6, ... give turns by chance; 3, 7,
    ... by chances that change now and then.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.tasks: list[Task] = []
        self.copies: list[Copy] = []
        self.events: list[str] = ["nothing: it was never written"]
        self.failure: BaseException | None = None
        self.current: Task | None = None
        self.over = _closed()
        self.idle = 0
        self._favour: dict[int, float] = {}

    # --- events ---

    def event(self, what: str) -> int:
        """Return the number of a new event."""
        self.events.append(f"{self.task.name}: {what}")
        return len(self.events) - 1

    @property
    def task(self) -> Task:
        """Return who runs."""
        assert self.current is not None
        return self.current

    # --- turns ---

    def start(self, task: Task, work: Callable[[], None]) -> None:
        """Add `task`; it runs when its turn comes."""

        def body() -> None:
            task.go.acquire()
            try:
                if self.failure is None:
                    work()
            except _Stopped:
                pass
            except BaseException as error:
                self._fail(error, task)
            task.done = True
            self._pass_on(task)

        self.tasks.append(task)
        threading.Thread(target=body, daemon=True).start()

    def run(self) -> None:
        """Run all tasks to their ends and land every copy; raise what failed."""
        self._pass_on(None)
        self.over.acquire()
        if self.failure is not None:
            raise self.failure
        for copy in self.copies:
            copy.land()
        self.copies.clear()

    def turn(self) -> None:
        """Let others run."""
        self._hand_over(self.task)

    def progress(self) -> None:
        """Note that something happened that another may wait for."""
        self.idle = 0

    def wait(self, condition: Callable[[], bool], why: Callable[[], str]) -> None:
        """Block the running task until `condition`; `why` is asked for when that never comes."""
        task = self.task
        task.waits, task.why = condition, why
        self._hand_over(task)
        task.waits = task.why = None

    def _hand_over(self, task: Task) -> None:
        following = self._next(task)
        if following is not task:
            self._wake(following)
            task.go.acquire()
        if self.failure is not None:
            raise _Stopped
        self.current = task

    def _pass_on(self, task: Task | None) -> None:
        """Wake whoever is next after `task` has ended, or whoever called run."""
        self._wake(self._next(task))

    def _wake(self, task: Task | None) -> None:
        if task is not None:
            self.current = task
            task.go.release()
        elif all(other.done for other in self.tasks):
            self.over.release()

    def _next(self, task: Task | None) -> Task | None:
        """Return who runs next, landing copies meanwhile; None when all have ended."""
        if self.failure is None:
            self.idle += 1
            if self.idle > _PATIENCE:
                self._fail(LaneFault("livelock: partitions poll for what never comes"), None)
        while self.failure is None:
            ready = [other for other in self.tasks if other.can_run]
            if not ready and not self.copies:
                break
            chosen = self._choose(ready)
            if chosen is not None:
                return chosen
            self.progress()
            self.copies.pop(self._which(len(self.copies))).land()
        waiting = [other for other in self.tasks if not other.done]
        if waiting and self.failure is None:
            told = "; ".join(f"{other.name} waits for {other.why()}" for other in waiting)
            self._fail(LaneFault(f"deadlock: {told}"), None)
        return waiting[0] if waiting else None

    def _which(self, count: int) -> int:
        return self.random.randrange(count)

    def _choose(self, ready: list[Task]) -> Task | None:
        """Return a task, or None for a copy."""
        if not self.copies and len(ready) == 1:
            return ready[0]
        mood = self.seed % 4
        if not ready or (mood == 1 and self.copies):
            return None
        # nobody starves another that does not wait
        if mood < 2 and self.idle < 100:
            return ready[-1 if mood == 0 else 0]
        if mood == 3:
            if self.random.random() < 1 / 16:
                self._favour.clear()
            if self.idle < 100:
                return max(
                    [*ready, *([None] if self.copies else [])],
                    key=lambda one: self._favour.setdefault(id(one), self.random.random()),
                )
        pick = self.random.randrange(len(ready) + (mood > 1 and bool(self.copies)))
        return ready[pick] if pick < len(ready) else None

    def _fail(self, error: BaseException, task: Task | None) -> None:
        if self.failure is None:
            if isinstance(error, LaneFault) and task is not None:
                error = LaneFault(f"{task.name}: {error}")
            self.failure = error


# --- barriers ---


class Mbarrier:
    """A phase ends when `count` arrivals and all expected bytes are in."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name
        self.count = 0
        self.dead = "never initialised"

    def init(self, count: int) -> None:
        """Start phase 0, which ends after `count` arrivals."""
        if not self.dead:
            raise LaneFault(f"{self.name} is initialised twice")
        if count < 1:
            raise LaneFault(f"{self.name} is initialised with a count of {count}")
        self.dead = ""
        self.count = self.pending = count
        self.bytes = self.phase = 0
        self.known = self.known_async = 0
        # what the ends of the last phases of parity 0 and 1 told
        self.told = [(0, 0), (0, 0)]

    def invalidate(self) -> None:
        """Make every later use a fault."""
        self._check()
        if self.bytes:
            raise LaneFault(f"{self.name} is invalidated while {self.bytes} bytes are on their way")
        self.dead = "invalidated"

    def _check(self) -> None:
        if self.dead:
            raise LaneFault(f"{self.name} is used, but was {self.dead}")

    def _settle(self) -> None:
        self.machine.progress()
        if self.pending == 0 and self.bytes == 0:
            self.told[self.phase & 1] = self.known, self.known_async
            self.phase += 1
            self.pending = self.count

    def arrive(self, count: int, nbytes: int = 0) -> None:
        """Arrive `count` times, and expect `nbytes` more in this phase."""
        self._check()
        task = self.machine.task
        # the partition's threads meet before one of them arrives
        task.loose = 0
        self.known |= task.known
        self.known_async |= task.known_async
        if count > self.pending:
            raise LaneFault(
                f"{self.name} counts {self.count} arrivals in a phase, and more came in phase"
                f" {self.phase}"
            )
        self.pending -= count
        self.bytes += nbytes
        self._settle()
        self.machine.turn()

    def land(self, nbytes: int, event: int) -> None:
        """Count bytes that a copy brought."""
        self._check()
        self.known |= 1 << event
        self.known_async |= 1 << event
        self.bytes -= nbytes
        self._settle()

    def wait(self, parity: int) -> None:
        """Block until the phase of this parity has ended."""
        self._check()
        parity &= 1
        task = self.machine.task
        self.machine.turn()
        self.machine.wait(
            lambda: self.phase & 1 != parity,
            lambda: (
                f"parity {parity} of {self.name} (in phase {self.phase}, {self.pending} of"
                f" {self.count} arrivals and {self.bytes} bytes to come)"
            ),
        )
        task.learn(*self.told[parity])


class NamedBarrier:
    """bar.sync and bar.arrive: a turn ends when the number of threads has come."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name
        self.threads = self.here = self.turns = 0
        self.known = self.known_async = 0
        self.who: set[int] = set()
        self.told = (0, 0)

    def join(self, threads: int, block: bool) -> None:
        """Come with all threads of the running partition; `block` until the others are there."""
        task = self.machine.task
        if self.here and threads != self.threads:
            raise LaneFault(f"{self.name} is joined for {threads} and for {self.threads} threads")
        if id(task) in self.who:
            raise LaneFault(f"{self.name} is joined twice in one turn")
        mine = self.turns
        self.threads = threads
        self.here += 32 * task.warps
        self.who.add(id(task))
        self.known |= task.known
        self.known_async |= task.known_async
        if self.here > threads:
            raise LaneFault(f"{self.name} is joined by {self.here} threads of {threads}")
        self.machine.progress()
        if self.here == threads:
            self.told = self.known, self.known_async
            self.here, self.turns = 0, mine + 1
            self.who.clear()
        if block:
            task.loose = 0
            self.machine.wait(
                lambda: self.turns > mine,
                lambda: f"{self.name} ({self.here} of {self.threads} threads have come)",
            )
            task.learn(*self.told)
        else:
            self.machine.turn()


# --- shared memory ---


class Allocation:
    """Shared memory of a program, and the last events of each of its pieces."""

    def __init__(self, machine: Machine, name: str, nbytes: int) -> None:
        self.machine, self.name = machine, name
        # what nobody wrote is NaN in every float type
        self.storage = torch.full((nbytes,), 0xFF, dtype=torch.uint8)
        self.writer = np.zeros(-(-nbytes // _PIECE), np.int64)
        # (task, unit, pieces) -> event, pieces: reads since the last write; a unit reads in order
        self.readers: dict[tuple[int, str, bytes], tuple[int, np.ndarray]] = {}
        self._pieces: dict[object, tuple[bytes, np.ndarray]] = {}

    def pieces(self, view: torch.Tensor) -> tuple[bytes, np.ndarray]:
        """Return the pieces that `view` covers, and a key for them."""
        where = view.storage_offset(), tuple(view.shape), view.stride(), view.element_size()
        if where not in self._pieces:
            offset = torch.zeros((), dtype=torch.int64)
            for length, stride in zip(view.shape, view.stride(), strict=True):
                offset = offset[..., None] + torch.arange(length) * stride
            size = view.element_size()
            first = (offset.flatten() + view.storage_offset()) * size // _PIECE
            found = np.unique(first.numpy())
            self._pieces[where] = found.tobytes(), found
        return self._pieces[where]

    def read(self, view: torch.Tensor, event: int, unit: str) -> None:
        """Note a read of `view` by `unit`; a fault unless all that was written there is known."""
        task = self.machine.task
        known = task.known if unit == "threads" else task.known_async
        key, pieces = self.pieces(view)
        for last in np.unique(self.writer[pieces]).tolist():
            if not last or not known >> last & 1:
                self._fault("read", event, last)
        self.readers[id(task), unit, key] = event, pieces

    def write(self, view: torch.Tensor, event: int, unit: str) -> None:
        """Note a write of `view` by `unit`; a fault unless accesses to it are known to be over."""
        task = self.machine.task
        known = task.known if unit == "threads" else task.known_async
        _, pieces = self.pieces(view)
        for last in np.unique(self.writer[pieces]).tolist():
            if last and not known >> last & 1:
                self._fault("written", event, last)
        for key, (last, read) in list(self.readers.items()):
            if np.isin(read, pieces, assume_unique=True).any():
                # a read needs no fence: the proxies share what is only ordered
                if not (known | task.known) >> last & 1:
                    self._fault("written", event, last)
                del self.readers[key]
        self.writer[pieces] = event

    def _fault(self, how: str, event: int, last: int) -> None:
        events = self.machine.events
        unfenced = self.machine.task.known >> last & 1
        missing = "no fence_async_shared follows" if unfenced else "nothing waits for"
        raise LaneFault(
            f"{self.name} is {how} by [{events[event]}], and {missing} [{events[last]}]"
        )


# --- global memory ---


class Global:
    """A storage in global memory, and the last events of each element."""

    def __init__(self, machine: Machine, name: str, count: int) -> None:
        self.machine, self.name = machine, name
        self.writer = np.zeros(count, np.int64)
        self.reader = np.zeros(count, np.int64)
        # element -> what releases at it told
        self.told: dict[int, tuple[int, int]] = {}

    def read(self, index: np.ndarray, event: int) -> None:
        """Note a read of the elements."""
        self._ordered(self.writer[index], "read", event)
        self.reader[index] = event

    def write(self, index: np.ndarray, event: int) -> None:
        """Note a write of the elements."""
        self._ordered(self.writer[index], "written", event)
        self._ordered(self.reader[index], "written", event)
        self.writer[index] = event

    def _ordered(self, lasts: np.ndarray, how: str, event: int) -> None:
        known, events = self.machine.task.known, self.machine.events
        for last in np.unique(lasts).tolist():
            if last and not known >> last & 1:
                raise LaneFault(
                    f"{self.name} is {how} by [{events[event]}], and nothing orders that after"
                    f" [{events[last]}]"
                )


def programs(grid: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """Yield the indices of all programs of a grid."""
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                yield x, y, z
