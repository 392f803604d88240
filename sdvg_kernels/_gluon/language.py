"""What `gl`, `tma`, `mbarrier` and the wgmma functions are to a kernel in the Gluon lane.

Names, keywords and defaults are those of the installed Triton: each call is bound to the real
function's signature first. What is not here raises a `LaneFault` that names it.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl
from triton.experimental.gluon import language as real_gl
from triton.experimental.gluon.language.nvidia import hopper as real_hopper

from sdvg_kernels._gluon.machine import (
    Allocation,
    Copy,
    LaneFault,
    Machine,
    Mbarrier,
    NamedBarrier,
    Task,
)
from sdvg_kernels._gluon.values import (
    TO_TRITON,
    Float,
    Int,
    Pointer,
    Tile,
    binary,
    cast,
    torch_dtype,
)

_BARRIER = re.compile(
    r"(?:bar|barrier)(?:\.cta)?\.(sync|arrive)(?:\.aligned)?\s+(\d+)\s*,\s*(\d+)\s*"
)
# --- memory of a program ---


class Shared:
    """A view of shared memory."""

    def __init__(self, owner: Allocation, data: torch.Tensor, layout: object) -> None:
        self.owner, self.data, self.layout = owner, data, layout

    @property
    def shape(self) -> list[int]:
        """Return its shape."""
        return list(self.data.shape)

    @property
    def dtype(self) -> tl.dtype:
        """Return its Triton type."""
        return TO_TRITON[self.data.dtype]

    @property
    def rank(self) -> int:
        """Return how many dimensions it has."""
        return self.data.ndim

    @property
    def numel(self) -> int:
        """Return how many elements it has."""
        return self.data.numel()

    def _view(self, data: torch.Tensor) -> Shared:
        return Shared(self.owner, data, self.layout)

    def index(self, index: int) -> Shared:
        """Return the view of one place of the first dimension."""
        if not 0 <= index < len(self.data):
            raise LaneFault(f"{self.owner.name} has no place {index} of {len(self.data)}")
        return self._view(self.data[int(index)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        """Return the view of a run of places."""
        return self._view(self.data.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        """Return the view with its dimensions in another order."""
        return self._view(self.data.permute(tuple(order)))

    def reshape(self, shape: list[int]) -> Shared:
        """Return the view in another shape."""
        return self._view(self.data.view([int(size) for size in shape]))

    def _reinterpret(self, dtype: tl.dtype, shape: list[int], layout: object) -> Shared:
        count, kind = math.prod(shape), torch_dtype(dtype)
        start = self.data.storage_offset() * self.data.element_size()
        taken = self.owner.storage[start : start + count * kind.itemsize]
        if not self.data.is_contiguous() or count * kind.itemsize > self.data.nbytes:
            raise LaneFault(f"{self.owner.name} cannot be reinterpreted as {dtype}{shape}")
        return Shared(self.owner, taken.view(kind).view(shape), layout)

    def _keep_alive(self) -> None:
        """Do nothing."""

    def load(self, layout: object) -> Tile:
        """Read it."""
        machine = self.owner.machine
        event = machine.event(f"load of {self.owner.name}")
        self.owner.read(self.data, event, "threads")
        machine.task.known |= 1 << event
        return Tile(self.data.clone(), layout)

    def store(self, value: Tile) -> None:
        """Write it."""
        if value.shape != self.shape or value.dtype != self.dtype:
            raise LaneFault(
                f"{self.owner.name} is {self.dtype}{self.shape}, and a store brings"
                f" {value.dtype}{value.shape}"
            )
        machine = self.owner.machine
        event = machine.event(f"store to {self.owner.name}")
        self.owner.write(self.data, event, "threads")
        machine.task.known |= 1 << event
        machine.task.unfenced |= 1 << event
        self.data.copy_(value.data)


class Barriers:
    """mbarriers in shared memory."""

    def __init__(self, found: list[object]) -> None:
        self.found = found

    def index(self, index: int) -> object:
        """Return one of them."""
        if not 0 <= index < len(self.found):
            raise LaneFault(f"there is no mbarrier {index} of {len(self.found)}")
        return self.found[int(index)]


def _mbarrier_of(found: object) -> Mbarrier:
    if isinstance(found, Barriers) and len(found.found) == 1:
        found = found.found[0]
    if not isinstance(found, Mbarrier):
        raise LaneFault(f"{found!r} is not one mbarrier")
    return found


class Descriptor:
    """A TMA descriptor: reads beyond the tensor give zeros, writes beyond it are dropped."""

    def __init__(self, host: object, name: str, pointer: Pointer) -> None:
        self.name, self.pointer = name, pointer
        self.layout = host.layout
        self.block_shape = [int(size) for size in host.block_shape]
        self.shape, self.strides = ([int(x) for x in y] for y in (host.shape, host.strides))
        self.fill = float("nan") if host.padding == "nan" else 0.0
        memory = pointer.memory
        self.tensor = memory.as_strided(self.shape, self.strides, pointer.offset)
        self.dtype = TO_TRITON[memory.dtype]
        nbytes = math.prod(self.block_shape) * memory.element_size()
        self.nbytes_per_cta = nbytes
        self.block_type = SimpleNamespace(
            nbytes=nbytes, shape=self.block_shape, element_ty=self.dtype
        )

    def boxes(self, coordinates: object) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Return which part of the tensor a box at `coordinates` covers, and of the box."""
        if len(coordinates) != len(self.shape):
            raise LaneFault(f"{self.name} has {len(self.shape)} dimensions, got {coordinates}")
        far, near = [], []
        for start, box, size in zip(coordinates, self.block_shape, self.shape, strict=True):
            low, high = min(max(start, 0), size), min(max(start + box, 0), size)
            far.append(slice(int(low), int(high)))
            near.append(slice(int(low - start), int(high - start)))
        return tuple(far), tuple(near)

    def elements(self, part: tuple[slice, ...]) -> np.ndarray:
        """Return which elements of the memory a part of the tensor covers."""
        offset = np.full((), self.pointer.offset)
        for run, stride in zip(part, self.strides, strict=True):
            offset = offset[..., None] + np.arange(run.start, run.stop) * stride
        return offset.ravel()


class Product:
    """A product by wgmma that is not waited for: its value must not be touched."""

    def __init__(self, value: Tile, event: int) -> None:
        self.__dict__.update(_value=value, _event=event)

    def __getattr__(self, name: str) -> object:
        raise LaneFault(f"`.{name}` of a product is used before warpgroup_mma_wait")

    def _touched(self, *_: object) -> object:
        raise LaneFault("a product is computed with before warpgroup_mma_wait")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _touched
    __truediv__ = __rtruediv__ = __neg__ = __getitem__ = __bool__ = _touched
    __lt__ = __le__ = __gt__ = __ge__ = _touched


# --- the functions ---


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
        # program, event: copies to shared memory
        self.copied: list[tuple[tuple[int, int, int], int]] = []
        self.gl = Namespace("gl", real_gl, self._gl())
        here = {name: getattr(self, f"_mbarrier_{name}") for name in _MBARRIER}
        self.mbarrier = Namespace("mbarrier", real_hopper.mbarrier, here)
        here = {name: getattr(self, f"_tma_{name}") for name in _TMA}
        self.tma = Namespace("tma", real_hopper.tma, here)
        self.hopper = {
            name: bound(name, getattr(real_hopper, name), getattr(self, f"_{name}"))
            for name in _HOPPER
        }

    def stand_in(self, real: object) -> object | None:
        """Return what stands for an object that a kernel's module has imported; None: itself."""
        spaces = ((real_gl, self.gl), (real_hopper.tma, self.tma))
        for there, here in (*spaces, (real_hopper.mbarrier, self.mbarrier)):
            if real is there:
                return here
        for name, here in self.hopper.items():
            if real is getattr(real_hopper, name):
                return here
        for there, here in (*spaces, (real_hopper.mbarrier, self.mbarrier)):
            name = getattr(real, "__name__", "")
            if callable(real) and name and getattr(there, name, None) is real:
                return getattr(here, name)
        return None

    # --- gl ---

    def _gl(self) -> dict[str, object]:
        found: dict[str, object] = {
            "constexpr": lambda value: getattr(value, "value", value),
            "static_range": range,
            "program_id": lambda axis: Int(self.machine.task.program[axis]),
            "num_programs": lambda axis: Int(self.machine.task.grid[axis]),
            "num_warps": lambda: self.machine.task.warps,
            "num_ctas": lambda: 1,
            "arange": lambda start, end, layout=None: Tile(
                torch.arange(start, end, dtype=torch.int32), layout
            ),
            "full": _full,
            "zeros": lambda shape, dtype, layout=None: _full(shape, 0, dtype, layout),
            "full_like": lambda input, value, shape=None, dtype=None, layout=None: _full(
                shape or input.shape, value, dtype or input.dtype, layout or input.layout
            ),
            "zeros_like": lambda input, shape=None, dtype=None, layout=None: _full(
                shape or input.shape, 0, dtype or input.dtype, layout or input.layout
            ),
            "where": _where,
            "maximum": _extreme(torch.maximum, max),
            "minimum": _extreme(torch.minimum, min),
            "max": _reduction(lambda x, axis: x.amax(axis)),
            "min": _reduction(lambda x, axis: x.amin(axis)),
            "sum": _reduction(lambda x, axis: x.sum(axis, dtype=_summed(x.dtype))),
            "reduce": _reduce,
            "associative_scan": _scan,
            "cdiv": lambda x, div: binary("floordiv", binary("add", x, div - 1), div),
            "convert_layout": lambda value, layout, assert_trivial=False: _moved(value, layout),
            "set_auto_layout": _moved,
            "expand_dims": lambda input, axis: Tile(input.data.unsqueeze(axis)),
            "broadcast": lambda input, other: Tile(input.data.expand(other.data.shape)),
            "permute": lambda input, *dims: Tile(input.data.permute(_flat(dims))),
            "reshape": lambda input, *shape, can_reorder=False: input.reshape(*shape),
            "cast": lambda input, dtype, fp_downcast_rounding=None, bitcast=False: input.to(
                dtype, bitcast
            ),
            "to_tensor": lambda x: x if isinstance(x, Tile | Int | Float) else _boxed(x),
            "assume": self._assume,
            "device_assert": self._device_assert,
            "static_assert": _static_assert,
            "static_print": lambda *_, **__: None,
            "device_print": lambda *_, **__: None,
            "multiple_of": lambda input, values: input,
            "max_contiguous": lambda input, values: input,
            "max_constancy": lambda input, values: input,
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
            "fma": lambda x, y, z: binary("add", binary("mul", x, y), z),
            "add": lambda x, y, sanitize_overflow=True: binary("add", x, y),
            "sub": lambda x, y, sanitize_overflow=True: binary("sub", x, y),
            "mul": lambda x, y, sanitize_overflow=True: binary("mul", x, y),
            "fdiv": lambda x, y, ieee_rounding=False: binary("truediv", x, y),
            "div_rn": lambda x, y: binary("truediv", x, y),
        }
        for name in ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "abs", "floor", "ceil", "erf"):
            found[name] = _elementwise(getattr(torch, name))
        return found

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
        return Tile(data) if data.ndim else _boxed(data)

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
        return Tile(old) if old.ndim else _boxed(old)

    # --- shared memory, partitions, assembly ---

    def _allocate(
        self, element_ty: tl.dtype, shape: list[int], layout: object, value: Tile | None = None
    ) -> Shared | Barriers:
        program = self.machine.task.program
        number = self.allocated[program] = self.allocated.get(program, -1) + 1
        shape = [int(size) for size in shape]
        if isinstance(layout, real_hopper.mbarrier.MBarrierLayout):
            return _nested(self.machine, f"mbarrier allocation {number}", shape)
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
            if any(isinstance(x, Tile) for x in _leaves(arguments)):
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
                self._fence_async_shared()
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

    def finish(self, task: Task) -> None:
        """Check that the program of `task` leaves no copy on its way when it ends."""
        for program, event in self.copied:
            if program == task.program and not task.known >> event & 1:
                raise LaneFault(f"[{self.machine.events[event]}] is never waited for")

    # --- mbarrier ---

    def _mbarrier_init(self, mbarrier: object, count: int) -> None:
        _mbarrier_of(mbarrier).init(int(count))

    def _mbarrier_invalidate(self, mbarrier: object) -> None:
        _mbarrier_of(mbarrier).invalidate()

    def _mbarrier_expect(
        self, mbarrier: object, bytes_per_cta: int = 0, pred: object = True, **named: int
    ) -> None:
        # Triton 3.6 says `bytes`
        if pred:
            _mbarrier_of(mbarrier).arrive(1, int(named.get("bytes", bytes_per_cta)))

    def _mbarrier_arrive(self, mbarrier: object, *, count: int = 1, pred: object = True) -> None:
        if pred:
            _mbarrier_of(mbarrier).arrive(int(count))

    def _mbarrier_wait(
        self, mbarrier: object, phase: int, pred: object = True, deps: object = ()
    ) -> None:
        if pred:
            _mbarrier_of(mbarrier).wait(int(phase))

    # --- tma ---

    def _tma_async_copy_global_to_shared(
        self,
        tensor_desc: Descriptor,
        coord: list[int],
        barrier: object,
        result: Shared,
        pred: object = True,
        multicast: bool = False,
    ) -> None:
        if multicast:
            raise LaneFault("the lane knows no multicast")
        if not pred:
            return
        machine, target = self.machine, _mbarrier_of(barrier)
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

    def _tma_async_copy_shared_to_global(
        self, tensor_desc: Descriptor, coord: list[int], src: Shared
    ) -> None:
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

    def _tma_store_wait(self, pendings: int) -> None:
        task = self.machine.task
        while len(task.stores) > pendings:
            bit = 1 << task.stores.pop(0)
            task.learn(bit, bit)

    # --- wgmma ---

    def _fence_async_shared(self, cluster: bool = False) -> None:
        task = self.machine.task
        task.known_async |= task.unfenced
        task.unfenced = 0

    def _warpgroup_mma_init(self, value: Tile) -> Tile:
        return value

    def _warpgroup_mma(
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
        machine, task = self.machine, self.machine.task
        if not isinstance(b, Shared) or not isinstance(a, Tile | Shared):
            raise LaneFault(f"wgmma takes shared memory or registers, and shared memory, got {a!r}")
        before = acc._value if isinstance(acc, Product) else acc
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
        return self._warpgroup_mma_wait(0, (product,))

    def _warpgroup_mma_wait(
        self, num_outstanding: int = 0, deps: tuple[Product | Tile, ...] | None = None
    ) -> object:
        task = self.machine.task
        self.machine.turn()
        if deps is None:
            raise LaneFault("warpgroup_mma_wait needs deps")
        while len(task.products) > num_outstanding:
            bit = 1 << task.products.pop(0)._event
            task.learn(bit, bit)
        found = tuple(
            x._value if isinstance(x, Product) and x not in task.products else x for x in deps
        )
        return found[0] if len(found) == 1 else found


_MBARRIER = ("init", "invalidate", "expect", "arrive", "wait")
_TMA = ("async_copy_global_to_shared", "async_copy_shared_to_global", "store_wait")
_HOPPER = tuple(
    name
    for name in ("fence_async_shared", "warpgroup_mma", "warpgroup_mma_wait", "warpgroup_mma_init")
    if hasattr(real_hopper, name)
)


def end(task: Task) -> None:
    """Check that a partition leaves nothing in flight."""
    if task.products:
        raise LaneFault(f"{len(task.products)} products are never waited for")
    if task.stores:
        raise LaneFault(f"{len(task.stores)} copies from shared memory are never waited for")


def _leaves(values: object) -> list[object]:
    if isinstance(values, tuple | list):
        return [leaf for value in values for leaf in _leaves(value)]
    return [values]


def _nested(machine: Machine, name: str, shape: list[int]) -> Barriers:
    if len(shape) == 1:
        return Barriers([Mbarrier(machine, f"{name}[{i}]") for i in range(shape[0])])
    return Barriers([_nested(machine, f"{name}[{i}]", shape[1:]) for i in range(shape[0])])


def _boxed(value: object) -> Int | Float:
    """Return a single value as a scalar."""
    if isinstance(value, torch.Tensor):
        kind = TO_TRITON[value.dtype]
        return Float(value.item()) if value.is_floating_point() else Int(value.item(), kind)
    if isinstance(value, bool):
        return Int(value, tl.int1)
    if isinstance(value, int):
        return Int(value, tl.int64 if abs(value) >= 2**31 else tl.int32)
    return Float(value)


def _full(shape: list[int], value: object, dtype: tl.dtype, layout: object = None) -> Tile:
    return Tile(torch.full([int(x) for x in shape], value, dtype=torch_dtype(dtype)), layout)


def _moved(value: Tile, layout: object) -> Tile:
    return Tile(value.data, layout)


def _flat(values: tuple[object, ...]) -> list[int]:
    return [int(x) for x in _leaves(values)]


def _where(condition: object, x: object, y: object) -> object:
    tiles = [one for one in (condition, x, y) if isinstance(one, Tile)]
    if not tiles:
        return _boxed_like(x, y, bool(condition))
    if len({tile.data.ndim for tile in tiles}) > 1:
        raise LaneFault(f"gl.where of shapes {[tile.shape for tile in tiles]}")
    values = [one for one in (x, y) if isinstance(one, Tile)]
    if len(values) == 2:
        dtype = torch.promote_types(values[0].data.dtype, values[1].data.dtype)
    elif values:
        other = y if values[0] is x else x
        dtype = binary("add", values[0], other).data.dtype
    else:
        dtype = torch.tensor(float(x) if isinstance(y, float) else x).dtype
        dtype = {torch.int64: torch.int32, torch.float64: torch.float32}.get(dtype, dtype)
    x, y = ((one.data if isinstance(one, Tile) else torch.tensor(one)).to(dtype) for one in (x, y))
    taken = condition.data if isinstance(condition, Tile) else torch.tensor(bool(condition))
    return Tile(torch.where(taken.bool(), x, y), tiles[0].layout)


def _boxed_like(x: object, y: object, first: bool) -> Int | Float:
    """Return x or y as a scalar of the type that both have."""
    if isinstance(x, float) or isinstance(y, float):
        return Float(x if first else y)
    kinds = [_boxed(one).dtype if not isinstance(one, Int) else one.dtype for one in (x, y)]
    return Int(x if first else y, max(kinds, key=lambda kind: kind.primitive_bitwidth))


def _extreme(
    tiles: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], scalars: Callable[..., object]
) -> Callable[..., object]:
    def extreme(x: object, y: object, propagate_nan: object = None) -> object:
        if not isinstance(x, Tile) and not isinstance(y, Tile):
            chosen = scalars(x, y)
            return _boxed_like(chosen, y if chosen is x else x, True)
        # a maximum that meets one NaN gives the other: fmax
        pair = binary("add", x, y)
        left, right = (
            (one.data if isinstance(one, Tile) else torch.tensor(one)).to(pair.data.dtype)
            for one in (x, y)
        )
        found = tiles(left, right)
        if found.is_floating_point() and propagate_nan is None:
            found = torch.where(left.isnan(), right, torch.where(right.isnan(), left, found))
        return Tile(found, pair.layout)

    return extreme


def _summed(dtype: torch.dtype) -> torch.dtype:
    small = (torch.bool, torch.int8, torch.uint8, torch.int16)
    return torch.int32 if dtype in small else dtype


def _reduction(work: Callable[..., torch.Tensor]) -> Callable[..., object]:
    def reduction(
        input: Tile, axis: int | None = None, keep_dims: bool = False, **other: object
    ) -> object:
        other.pop("return_indices_tie_break_left", None)
        if any(other.values()):
            raise LaneFault(f"the lane knows no reduction with {other}")
        data = input.data.flatten() if axis is None else input.data
        data = work(data, 0 if axis is None else axis)
        if keep_dims and axis is not None:
            data = data.unsqueeze(axis)
        return Tile(data) if data.ndim else _boxed(data)

    return reduction


def _reduce(input: Tile, axis: int, combine_fn: Callable[..., object], **_: object) -> object:
    parts = [Tile(part) for part in input.data.unbind(axis)]
    while len(parts) > 1:
        parts = [combine_fn(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0] if parts[0].data.ndim else _boxed(parts[0].data)


def _scan(input: Tile, axis: int, combine_fn: Callable[..., object], reverse: bool = False) -> Tile:
    parts = [Tile(part) for part in input.data.unbind(axis)]
    parts = parts[::-1] if reverse else parts
    for i in range(1, len(parts)):
        parts[i] = combine_fn(parts[i - 1], parts[i])
    parts = parts[::-1] if reverse else parts
    return Tile(torch.stack([part.data for part in parts], axis), input.layout)


def _elementwise(work: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., object]:
    def elementwise(x: object) -> object:
        if isinstance(x, Tile):
            return Tile(work(x.data), x.layout)
        return _boxed(work(torch.tensor(x)))

    return elementwise


def _static_assert(cond: object, msg: str = "") -> None:
    if not cond:
        raise LaneFault(f"gl.static_assert: {msg}")
