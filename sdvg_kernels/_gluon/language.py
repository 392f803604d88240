"""What `gl`, `tma`, `mbarrier` and the wgmma functions are to a kernel in the Gluon lane.

Names, keywords and defaults are those of the installed Triton: each call is bound to the real
function's signature first. What is not here raises a `LaneFault` that names it.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable

import torch
import triton.language as tl
from triton.experimental.gluon import language as real_gl
from triton.experimental.gluon.language.nvidia import hopper as real_hopper

from sdvg_kernels._gluon.functions import FUNCTIONS, boxed, leaves
from sdvg_kernels._gluon.hardware import MBARRIER, TMA, WGMMA, Hardware, end
from sdvg_kernels._gluon.machine import Allocation, LaneFault, Machine, NamedBarrier, Task
from sdvg_kernels._gluon.memory import Barriers, Shared, barriers
from sdvg_kernels._gluon.values import Int, Pointer, Tile, cast, torch_dtype

_BARRIER = re.compile(
    r"(?:bar|barrier)(?:\.cta)?\.(sync|arrive)(?:\.aligned)?\s+(\d+)\s*,\s*(\d+)\s*"
)


class Namespace:
    """Functions of the lane under the names of `there`, bound to its signatures."""

    def __init__(self, name: str, there: object, here: dict[str, object]) -> None:
        self.__dict__.update(_name=name, _there=there, _here=here, _bound={})

    def __getattr__(self, name: str) -> object:
        if name in self._bound:
            return self._bound[name]
        real = getattr(self._there, name, None)
        if real is None:
            raise LaneFault(f"this Triton has no {self._name}.{name}")
        if name not in self._here:
            # types and layouts are what they are
            plain = inspect.isclass(real) or isinstance(real, tl.dtype)
            if not plain:
                raise LaneFault(f"the lane does not know {self._name}.{name}")
            self._bound[name] = real
        else:
            self._bound[name] = bound(f"{self._name}.{name}", real, self._here[name])
        return self._bound[name]


def bound(name: str, real: object, here: Callable[..., object]) -> Callable[..., object]:
    """Return `here` with calls checked against the real function's signature."""
    if not callable(real) or inspect.isclass(real):
        return here
    signature = getattr(real, "signature", None) or inspect.signature(getattr(real, "fn", real))
    parameters = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.name not in ("_semantic", "_generator", "_builder")
    ]
    signature = signature.replace(parameters=parameters)
    checked: set[object] = set()

    def call(*arguments: object, **options: object) -> object:
        form = len(arguments), tuple(options)
        if form not in checked:
            try:
                signature.bind(*arguments, **options)
            except TypeError as error:
                raise LaneFault(f"{name} is called wrongly: {error}") from None
            checked.add(form)
        return here(*arguments, **options)

    return call


class Language:
    """The functions of a kernel that runs on `machine`."""

    def __init__(
        self, machine: Machine, assembly: dict[str, Callable[..., object]] | None = None
    ) -> None:
        self.machine = machine
        self.assembly = assembly or {}
        self.allocated: dict[tuple[int, int, int], int] = {}
        self.hardware = Hardware(machine)
        self.gl = Namespace("gl", real_gl, self._gl())
        spaces = [(real_gl, self.gl)]
        for stem, names in (("mbarrier", MBARRIER), ("tma", TMA)):
            there = getattr(real_hopper, stem)
            here = {name: getattr(self.hardware, f"{stem}_{name}") for name in names}
            spaces.append((there, Namespace(stem, there, here)))
        here = {name: getattr(self.hardware, name) for name in WGMMA}
        spaces.append((real_hopper, Namespace("hopper", real_hopper, here)))
        self.spaces = spaces

    def stand_in(self, real: object) -> object | None:
        """Return what stands for an object that a kernel's module has imported; None: itself."""
        for there, here in self.spaces:
            if real is there:
                return here
        name = getattr(real, "__name__", "")
        for there, here in self.spaces:
            if callable(real) and name and getattr(there, name, None) is real:
                return getattr(here, name)
        return None

    # --- gl ---

    def _gl(self) -> dict[str, object]:
        return {
            **FUNCTIONS,
            "program_id": lambda axis: Int(self.machine.task.program[axis]),
            "num_programs": lambda axis: Int(self.machine.task.grid[axis]),
            "num_warps": lambda: self.machine.task.warps,
            "assume": self._assume,
            "device_assert": self._device_assert,
            "load": self._load,
            "store": self._store,
            "atomic_add": self._atomic(lambda old, new: old + new),
            "atomic_max": self._atomic(max),
            "atomic_min": self._atomic(min),
            "atomic_xchg": self._atomic(lambda old, new: new),
            "atomic_cas": self._atomic_cas,
            "allocate_shared_memory": self._allocate,
            "warp_specialize": self._warp_specialize,
            "inline_asm_elementwise": self._assembly,
            "barrier": lambda *, cluster=False: self._meet(),
            "thread_barrier": self._meet,
        }

    def _assume(self, cond: object) -> None:
        if not cond:
            raise LaneFault("gl.assume of what is not so")

    def _device_assert(self, cond: object, msg: str = "", mask: object = None) -> None:
        held = cond.data.all() if isinstance(cond, Tile) else cond
        if not held:
            raise LaneFault(f"gl.device_assert: {msg}")

    def _meet(self) -> None:
        self.machine.task.loose = 0

    # --- global memory ---

    def _places(self, pointer: Pointer, mask: object, what: str) -> tuple[torch.Tensor, ...]:
        """Return offsets and mask of an access, broadcast, and checked against the memory."""
        if not isinstance(pointer, Pointer):
            raise LaneFault(f"{what} needs a pointer, got {pointer!r}")
        offset = torch.as_tensor(pointer.offset)
        taken = torch.ones((), dtype=torch.bool)
        if mask is not None:
            taken = mask.data if isinstance(mask, Tile) else torch.tensor(bool(mask))
            if isinstance(mask, Tile) and taken.ndim != offset.ndim:
                raise LaneFault(f"{what}: a mask of shape {mask.shape} for {pointer.shape}")
        offset, taken = torch.broadcast_tensors(offset, taken)
        inside = offset[taken]
        count = pointer.memory.numel()
        if inside.numel() and not 0 <= inside.min() <= inside.max() < count:
            raise LaneFault(
                f"{what} of {pointer.name} reaches element {inside.min()} or {inside.max()} of"
                f" {count}"
            )
        return offset, taken

    def _load(
        self, pointer: Pointer, mask: object = None, other: object = None, **_: object
    ) -> object:
        offset, taken = self._places(pointer, mask, "load")
        machine = self.machine
        if _.get("volatile"):
            machine.turn()
        event = machine.event(f"load of {pointer.name}")
        pointer.watch.read(offset[taken].numpy(), event)
        machine.task.known |= 1 << event
        data = torch.empty(offset.shape, dtype=pointer.memory.dtype)
        # what is masked out and has no `other` is whatever the register held
        if other is None:
            data.fill_(float("nan") if data.is_floating_point() else 77)
        else:
            data.copy_(other.data if isinstance(other, Tile) else torch.tensor(other))
        data[taken] = pointer.memory[offset[taken]]
        return Tile(data) if data.ndim else boxed(data)

    def _store(self, pointer: Pointer, value: object, mask: object = None, **_: object) -> None:
        offset, taken = self._places(pointer, mask, "store")
        machine = self.machine
        event = machine.event(f"store to {pointer.name}")
        pointer.watch.write(offset[taken].numpy(), event)
        machine.task.known |= 1 << event
        machine.task.loose |= 1 << event
        data = value.data if isinstance(value, Tile) else torch.tensor(value)
        if isinstance(value, Tile) and value.data.ndim != offset.ndim:
            raise LaneFault(f"a store of shape {value.shape} to places {pointer.shape}")
        data = cast(data, pointer.memory.dtype).broadcast_to(offset.shape)
        pointer.memory[offset[taken]] = data[taken]
        machine.progress()

    def _atomic(self, combine: Callable[..., object]) -> Callable[..., object]:
        def atomic(
            pointer: Pointer,
            val: object,
            mask: object = None,
            sem: str | None = None,
            scope: str | None = None,
        ) -> object:
            return self._atomically(pointer, (val,), combine, mask, sem, scope)

        return atomic

    def _atomic_cas(
        self,
        pointer: Pointer,
        cmp: object,
        val: object,
        sem: str | None = None,
        scope: str | None = None,
    ) -> object:
        values = (cmp, val)
        return self._atomically(
            pointer, values, lambda old, old_, new: new if old == old_ else old, None, sem, scope
        )

    def _atomically(
        self,
        pointer: Pointer,
        values: tuple[object, ...],
        combine: Callable[..., object],
        mask: object,
        sem: str | None,
        scope: str | None,
    ) -> object:
        machine, watch = self.machine, pointer.watch
        machine.turn()
        offset, taken = self._places(pointer, mask, "atomic")
        sem, task = sem or "acq_rel", machine.task
        if sem not in ("acq_rel", "acquire", "release", "relaxed") or scope == "cta":
            raise LaneFault(f"the lane knows no atomic with sem={sem!r}, scope={scope!r}")
        event = machine.event(f"atomic on {pointer.name}")
        index = offset[taken].numpy()
        watch.read(index, event)
        old = torch.zeros(offset.shape, dtype=pointer.memory.dtype)
        # what all threads of the partition have done, and what one of them alone has
        ordered = task.known & ~task.loose
        told = (ordered | 1 << event, task.known_async)
        lanes = [
            (x.data if isinstance(x, Tile) else torch.tensor(x)).broadcast_to(offset.shape)[taken]
            for x in values
        ]
        before = []
        for lane, place in enumerate(index.tolist()):
            held = pointer.memory[place].item()
            before.append(held)
            after = combine(held, *(values[lane].item() for values in lanes))
            if after != held:
                machine.progress()
            pointer.memory[place] = after
            seen = watch.told.get(place, (0, 0))
            if "rel" in sem and sem != "relaxed":
                watch.told[place] = seen[0] | told[0], seen[1] | told[1]
            if "acq" in sem:
                task.learn(*seen)
        task.known |= 1 << event
        old[taken] = torch.tensor(before, dtype=old.dtype)
        return Tile(old) if old.ndim else boxed(old)

    # --- shared memory, partitions, assembly ---

    def _allocate(
        self, element_ty: tl.dtype, shape: list[int], layout: object, value: Tile | None = None
    ) -> Shared | Barriers:
        program = self.machine.task.program
        number = self.allocated[program] = self.allocated.get(program, -1) + 1
        shape = [int(size) for size in shape]
        if isinstance(layout, real_hopper.mbarrier.MBarrierLayout):
            return barriers(self.machine, f"mbarrier allocation {number}", shape)
        kind = torch_dtype(element_ty)
        name = f"shared allocation {number} ({element_ty}{shape})"
        owner = Allocation(self.machine, name, math.prod(shape) * kind.itemsize)
        found = Shared(owner, owner.storage.view(kind).view(shape), layout)
        if value is not None:
            found.store(value)
        return found

    def _warp_specialize(
        self,
        functions_and_args: list[tuple[Callable[..., object], tuple[object, ...]]],
        worker_num_warps: list[int],
        worker_num_regs: list[int] | None = None,
    ) -> object:
        machine, parent = self.machine, self.machine.task
        if len(functions_and_args) != len(worker_num_warps) + 1:
            raise LaneFault(
                f"warp_specialize has {len(functions_and_args)} partitions, and"
                f" {len(worker_num_warps)} numbers of warps besides the first"
            )
        if "/" in parent.name:
            raise LaneFault("warp_specialize within a partition is not supported")
        workers: list[Task] = []
        for i, ((function, arguments), warps) in enumerate(
            zip(functions_and_args[1:], worker_num_warps, strict=True), 1
        ):
            if any(isinstance(x, Tile) for x in leaves(arguments)):
                raise LaneFault(f"worker partition {i} gets a tile: only the first one may")
            worker = Task(
                f"{parent.name}/{i} {function.__name__}", parent.program, parent.grid, warps
            )
            worker.learn(parent.known, parent.known_async)
            worker.named = parent.named
            workers.append(worker)

            def work(
                function: Callable[..., object] = function,
                arguments: tuple[object, ...] = arguments,
                worker: Task = worker,
            ) -> None:
                function(*arguments)
                end(worker)

            machine.start(worker, work)
        first, arguments = functions_and_args[0]
        name, parent.name = parent.name, f"{parent.name}/0 {first.__name__}"
        machine.turn()
        result = first(*arguments)
        end(parent)
        machine.wait(lambda: all(worker.done for worker in workers), lambda: "its other partitions")
        parent.name, parent.loose = name, 0
        for worker in workers:
            parent.learn(worker.known, worker.known_async)
        return result

    def _assembly(
        self,
        asm: str,
        constraints: str,
        args: list[object],
        dtype: object,
        is_pure: bool,
        pack: int,
    ) -> object:
        result = None
        for statement in asm.split(";"):
            text = re.sub(r"//[^\n]*", "", statement).strip()
            found = _BARRIER.fullmatch(text)
            if found:
                self._named(int(found[2])).join(int(found[3]), found[1] == "sync")
            elif text.startswith("fence.proxy.async"):
                self.hardware.fence_async_shared()
            elif text:
                own = [x for pattern, x in self.assembly.items() if re.fullmatch(pattern, text)]
                if not own:
                    raise LaneFault(f"the lane does not know the assembly {text!r}")
                result = own[0](*args)
        return Int(0) if result is None else result

    def _named(self, number: int) -> NamedBarrier:
        task = self.machine.task
        if number < 8 or number > 15:
            raise LaneFault(f"named barrier {number}: Triton's own are below 8, and there are 16")
        if number not in task.named:
            task.named[number] = NamedBarrier(self.machine, f"named barrier {number}")
        return task.named[number]
