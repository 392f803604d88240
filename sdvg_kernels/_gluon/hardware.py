"""mbarriers, TMA and wgmma in the lane; names and arguments are those of Triton's functions."""

from __future__ import annotations

import torch
import triton.language as tl

from sdvg_kernels._gluon.machine import Copy, LaneFault, Machine, Task
from sdvg_kernels._gluon.memory import Descriptor, Product, Shared, mbarrier_of
from sdvg_kernels._gluon.values import Tile

MBARRIER = ("init", "invalidate", "expect", "arrive", "wait")
TMA = ("async_copy_global_to_shared", "async_copy_shared_to_global", "store_wait")
WGMMA = ("fence_async_shared", "warpgroup_mma", "warpgroup_mma_wait", "warpgroup_mma_init")


class Hardware:
    """What partitions share and what works beside them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        # program, event: copies to shared memory
        self.copied: list[tuple[tuple[int, int, int], int]] = []

    def finish(self, task: Task) -> None:
        """Check that the program of `task` leaves no copy on its way when it ends."""
        for program, event in self.copied:
            if program == task.program and not task.known >> event & 1:
                raise LaneFault(f"[{self.machine.events[event]}] is never waited for")

    # --- mbarrier ---

    def mbarrier_init(self, mbarrier: object, count: int) -> None:
        """Start the barrier's phase 0."""
        mbarrier_of(mbarrier).init(int(count))

    def mbarrier_invalidate(self, mbarrier: object) -> None:
        """Make every later use a fault."""
        mbarrier_of(mbarrier).invalidate()

    def mbarrier_expect(
        self, mbarrier: object, bytes_per_cta: int = 0, pred: object = True, **named: int
    ) -> None:
        """Arrive, and expect bytes."""
        # Triton 3.6 says `bytes`
        if pred:
            mbarrier_of(mbarrier).arrive(1, int(named.get("bytes", bytes_per_cta)))

    def mbarrier_arrive(self, mbarrier: object, *, count: int = 1, pred: object = True) -> None:
        """Arrive `count` times."""
        if pred:
            mbarrier_of(mbarrier).arrive(int(count))

    def mbarrier_wait(
        self, mbarrier: object, phase: int, pred: object = True, deps: object = ()
    ) -> None:
        """Block until the phase of this parity has ended."""
        if pred:
            mbarrier_of(mbarrier).wait(int(phase))

    # --- tma ---

    def tma_async_copy_global_to_shared(
        self,
        tensor_desc: Descriptor,
        coord: list[int],
        barrier: object,
        result: Shared,
        pred: object = True,
        multicast: bool = False,
    ) -> None:
        """Issue a copy that lands later; the stage is poison until then."""
        if multicast:
            raise LaneFault("the lane knows no multicast")
        if not pred:
            return
        machine, target = self.machine, mbarrier_of(barrier)
        if result.shape != tensor_desc.block_shape or result.dtype != tensor_desc.dtype:
            raise LaneFault(
                f"{tensor_desc.name} brings {tensor_desc.dtype}{tensor_desc.block_shape} to"
                f" {result.dtype}{result.shape}"
            )
        coord = [int(x) for x in coord]
        event = machine.event(f"copy of {tensor_desc.name} {coord} to {result.owner.name}")
        result.owner.write(result.data, event, "tma")
        far, near = tensor_desc.boxes(coord)
        pointer = tensor_desc.pointer
        pointer.watch.read(tensor_desc.elements(far), event)
        # nothing there is valid from the issue of the copy on
        result.data.copy_(torch.full((), float("nan")))

        def land() -> None:
            result.data.copy_(torch.full((), tensor_desc.fill))
            result.data[near] = tensor_desc.tensor[far]
            target.land(tensor_desc.nbytes_per_cta, event)

        machine.copies.append(Copy(land, machine.events[event]))
        self.copied.append((machine.task.program, event))
        machine.turn()

    def tma_async_copy_shared_to_global(
        self, tensor_desc: Descriptor, coord: list[int], src: Shared
    ) -> None:
        """Issue a copy; no wait tells within the kernel that it has landed."""
        machine = self.machine
        if src.shape != tensor_desc.block_shape or src.dtype != tensor_desc.dtype:
            raise LaneFault(
                f"{tensor_desc.name} takes {tensor_desc.dtype}{tensor_desc.block_shape} from"
                f" {src.dtype}{src.shape}"
            )
        coord = [int(x) for x in coord]
        event = machine.event(f"copy of {src.owner.name} to {tensor_desc.name} {coord}")
        src.owner.read(src.data, event, "tma")
        machine.task.stores.append(event)
        far, near = tensor_desc.boxes(coord)
        # nobody learns within the kernel that the memory is written: waits are for the reads
        written = machine.event(f"landing of {src.owner.name} in {tensor_desc.name} {coord}")
        tensor_desc.pointer.watch.write(tensor_desc.elements(far), written)
        value = src.data[near].clone()
        machine.copies.append(
            Copy(lambda: tensor_desc.tensor[far].copy_(value), machine.events[written])
        )
        machine.turn()

    def tma_store_wait(self, pendings: int) -> None:
        """Wait until all but the last `pendings` copies have read shared memory."""
        task = self.machine.task
        while len(task.stores) > pendings:
            bit = 1 << task.stores.pop(0)
            task.learn(bit, bit)

    # --- wgmma ---

    def fence_async_shared(self, cluster: bool = False) -> None:
        """Show this partition's own writes to TMA and wgmma."""
        task = self.machine.task
        task.known_async |= task.unfenced
        task.unfenced = 0

    def warpgroup_mma_init(self, value: Tile) -> Tile:
        """Return what a product adds to."""
        return value

    def warpgroup_mma(
        self,
        a: Tile | Shared,
        b: Shared,
        acc: Tile | Product,
        *,
        use_acc: object = True,
        precision: str | None = None,
        max_num_imprecise_acc: int | None = None,
        is_async: bool = False,
    ) -> Tile | Product:
        """Issue a product: its operands are read from now until its wait."""
        machine, task = self.machine, self.machine.task
        if not isinstance(b, Shared) or not isinstance(a, Tile | Shared):
            raise LaneFault(f"wgmma takes shared memory or registers, and shared memory, got {a!r}")
        before = acc.value if isinstance(acc, Product) else acc
        shapes = a.shape, b.shape, before.shape
        if shapes != ([a.shape[0], b.shape[0]], [a.shape[1], b.shape[1]], [a.shape[0], b.shape[1]]):
            raise LaneFault(f"wgmma of shapes {shapes}")
        if a.dtype != b.dtype or before.dtype != tl.float32:
            raise LaneFault(f"wgmma of {a.dtype} and {b.dtype} onto {before.dtype}")
        if a.shape[0] % 64 or a.shape[0] != 16 * task.warps:
            raise LaneFault(f"wgmma of {a.shape[0]} rows by {task.warps} warps")
        if b.data.element_size() == 1:
            # float8 has no transposing operand: both run along k
            straight = b.data.stride(0) == 1 and (isinstance(a, Tile) or a.data.stride(1) == 1)
            if not straight:
                raise LaneFault("wgmma of float8 needs both operands contiguous along k")
        event = machine.event(f"product number {len(machine.events)}")
        for operand in (a, b):
            if isinstance(operand, Shared):
                operand.owner.read(operand.data, event, "wgmma")
        value = a.data.float() @ b.data.float()
        if use_acc:
            value = value + before.data
        product = Product(Tile(value, before.layout), event)
        task.products.append(product)
        if is_async:
            machine.turn()
            return product
        return self.warpgroup_mma_wait(0, (product,))

    def warpgroup_mma_wait(
        self, num_outstanding: int = 0, deps: tuple[Product | Tile, ...] | None = None
    ) -> object:
        """Wait until `num_outstanding` products are in flight."""
        task = self.machine.task
        self.machine.turn()
        if deps is None:
            raise LaneFault("warpgroup_mma_wait needs deps")
        while len(task.products) > num_outstanding:
            bit = 1 << task.products.pop(0).event
            task.learn(bit, bit)
        found = tuple(
            x.value if isinstance(x, Product) and x not in task.products else x for x in deps
        )
        return found[0] if len(found) == 1 else found


def end(task: Task) -> None:
    """Check that a partition leaves nothing in flight."""
    if task.products:
        raise LaneFault(f"{len(task.products)} products are never waited for")
    if task.stores:
        raise LaneFault(f"{len(task.stores)} copies from shared memory are never waited for")
