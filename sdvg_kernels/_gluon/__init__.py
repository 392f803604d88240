"""The CPU lane for Gluon: a Hopper kernel's own source runs here, and its protocol is checked.

    from sdvg_kernels.testing import GluonLane

    # arguments as on a GPU, but tensors, also those of a TensorDescriptor, on the CPU
    GluonLane(seed=0).launch(kernel, (4, 2), descriptor, out, 0.125, BN=128, num_warps=4)
    # or a launcher's own code: `kernel[grid](...)` of the module's kernels runs in the lane
    with GluonLane(seed=0).patched(hopper):
        hopper.block_causal_attention(query, k_cache, v_cache, lengths)
    # orders: the producer far ahead and copies late; consumers first; by chance; by moods
    for seed in range(4):
        GluonLane(seed).launch(...)
    # one program after the other, shuffled: every order in which programs may end
    GluonLane(seed, resident=1).launch(...)

Raises `LaneFault` for what a GPU would answer with a hang, a race or a wrong result: a deadlock
(who waits for what); too many arrivals; shared memory that is read before its copy is waited for,
never written, or refilled while a product or a store may still read it; a missing
`fence_async_shared`; a product used before its wait, or never waited for; global memory that two
partitions touch in no order (an atomic orders, if all threads met before it: `gl.store`, then a
barrier, then `gl.atomic_add`); a copy that nobody waits for; places outside a tensor; int32
overflow; a name that the lane or this Triton does not know. Races are found by order, not by
luck: an access faults if it is not known to come after the other, in whatever turn they come here.

It says nothing about layouts, registers or speed, which the compiler judges (sdvg_kernels.codegen),
and takes a partition's threads for one, but for what an atomic releases. `seed` chooses the turns
(`Machine`), `resident` how many programs run at once, `assembly` what inline assembly other than
named barriers does: {pattern: function of the arguments}.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator

import torch
import triton.language as tl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from sdvg_kernels._gluon.functions import boxed
from sdvg_kernels._gluon.hardware import end
from sdvg_kernels._gluon.language import Language
from sdvg_kernels._gluon.machine import Global, LaneFault, Machine, Task, programs
from sdvg_kernels._gluon.memory import Descriptor
from sdvg_kernels._gluon.values import Int, Pointer

__all__ = ["GluonLane", "LaneFault"]

# what a launch takes besides the kernel's own arguments
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl", "enable_fp_fusion")


class GluonLane:
    """Runs Gluon kernels on the CPU; see the module's docstring."""

    def __init__(
        self,
        seed: int = 0,
        resident: int | None = None,
        assembly: dict[str, Callable[..., object]] | None = None,
    ) -> None:
        self.seed, self.resident, self.assembly = seed, resident, assembly

    def launch(
        self, kernel: JITFunction, grid: tuple[int, ...], *arguments: object, **options: object
    ) -> None:
        """Run every program of the grid; raise what fails.

        Arguments: those of `kernel[grid](...)`, tensors on the CPU.
        Raises: LaneFault; whatever the kernel's Python raises.
        """
        machine = Machine(self.seed)
        language = Language(machine, self.assembly)
        warps = int(options.get("num_warps", 4))
        options = {name: value for name, value in options.items() if name not in _OPTIONS}
        values = _Arguments(machine).bind(kernel, arguments, options)
        function = _World(language).function(_plain(kernel))
        sizes = (*grid, 1, 1)[:3]
        order = list(programs(sizes))
        machine.random.shuffle(order)
        for first in range(0, len(order), self.resident or max(len(order), 1)):
            for program in order[first : first + (self.resident or len(order))]:
                task = Task(f"program {program}", program, sizes, warps)

                def work(task: Task = task) -> None:
                    function(**values)
                    end(task)
                    language.hardware.finish(task)

                machine.start(task, work)
            machine.run()

    @contextlib.contextmanager
    def patched(self, *modules: types.ModuleType) -> Iterator[None]:
        """Let `kernel[grid](...)` of the modules' Gluon kernels run in this lane meanwhile."""
        found = [
            (module, name, value)
            for module in modules
            for name, value in vars(module).items()
            if isinstance(value, JITFunction) and getattr(value, "is_gluon", lambda: False)()
        ]
        try:
            for module, name, value in found:
                setattr(module, name, _Launcher(self, value))
            yield
        finally:
            for module, name, value in found:
                setattr(module, name, value)


class _Launcher:
    """Stands for a kernel: `launcher[grid](...)` runs it in the lane."""

    def __init__(self, lane: GluonLane, kernel: JITFunction) -> None:
        self.lane, self.kernel = lane, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.lane.launch(
            self.kernel, grid, *arguments, **options
        )

    def __getattr__(self, name: str) -> object:
        return getattr(self.kernel, name)


def _plain(kernel: object) -> JITFunction:
    return kernel.kernel if isinstance(kernel, _Launcher) else kernel


class _World:
    """Python functions of a kernel's source, whose globals are the lane's."""

    def __init__(self, language: Language) -> None:
        self.language = language
        self.globals: dict[int, dict[str, object]] = {}
        self.functions: dict[int, types.FunctionType] = {}

    def function(self, kernel: JITFunction) -> types.FunctionType:
        """Return a jit function's source as a plain function."""
        if id(kernel) not in self.functions:
            source = kernel.fn
            defaults = tuple(_unwrapped(value) for value in source.__defaults__ or ())
            made = types.FunctionType(
                source.__code__,
                self.world(source.__globals__),
                source.__name__,
                defaults or None,
                tuple(
                    types.CellType(self.value(cell.cell_contents))
                    for cell in source.__closure__ or ()
                )
                or None,
            )
            made.__kwdefaults__ = source.__kwdefaults__
            self.functions[id(kernel)] = made
        return self.functions[id(kernel)]

    def world(self, module: dict[str, object]) -> dict[str, object]:
        """Return what a module's globals are here."""
        if id(module) not in self.globals:
            here = self.globals[id(module)] = {"__builtins__": __builtins__}
            for name, value in list(module.items()):
                if not name.startswith("__"):
                    here[name] = _Later(self, value) if _is_jit(value) else self.value(value)
            for name, value in here.items():
                if isinstance(value, _Later):
                    here[name] = value.made()
            here["range"] = _range
        return self.globals[id(module)]

    def value(self, value: object) -> object:
        """Return what an object of a kernel's module is here."""
        stand_in = self.language.stand_in(value)
        if stand_in is not None:
            return stand_in
        if _is_jit(value):
            return self.function(_plain(value))
        return _unwrapped(value)


class _Later:
    """A function whose module's globals are not complete yet."""

    def __init__(self, world: _World, value: object) -> None:
        self.world, self.value = world, value

    def made(self) -> object:
        return self.world.value(self.value)


def _is_jit(value: object) -> bool:
    return isinstance(value, JITFunction | _Launcher)


def _unwrapped(value: object) -> object:
    return value.value if isinstance(value, tl.constexpr) else value


def _range(*bounds: int) -> Iterator[Int]:
    """Yield run-time integers, where a kernel says `range`."""
    return (Int(i) for i in range(*(int(bound) for bound in bounds)))


class _Arguments:
    """Turns a launch's arguments into what the kernel sees."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.watched: dict[tuple[int, int], tuple[torch.Tensor, Global]] = {}

    def bind(
        self, kernel: object, arguments: tuple[object, ...], options: dict[str, object]
    ) -> dict[str, object]:
        """Return the kernel's arguments by name."""
        kernel = _plain(kernel)
        bound = dict(zip((p.name for p in kernel.params), arguments, strict=False))
        bound |= options
        names = [parameter.name for parameter in kernel.params]
        unknown = [name for name in bound if name not in names]
        if unknown or len(arguments) > len(names):
            raise LaneFault(f"{kernel.__name__} has no arguments {unknown or arguments}")
        return {
            parameter.name: _unwrapped(bound[parameter.name])
            if parameter.is_constexpr
            else self.value(parameter.name, bound[parameter.name])
            for parameter in kernel.params
            if parameter.name in bound
        }

    def value(self, name: str, value: object) -> object:
        """Return one argument as the kernel sees it."""
        if isinstance(value, torch.Tensor):
            return self.pointer(name, value)
        if isinstance(value, TensorDescriptor):
            return Descriptor(value, name, self.pointer(name, value.base))
        if isinstance(value, tuple | list):
            return tuple(self.value(f"{name}[{i}]", x) for i, x in enumerate(value))
        if value is None:
            return None
        if isinstance(value, bool | int | float):
            return boxed(value)
        raise LaneFault(f"the lane knows no argument like {name}={value!r}")

    def pointer(self, name: str, tensor: torch.Tensor) -> Pointer:
        """Return a tensor's first element as a place in its storage."""
        if tensor.device.type != "cpu":
            raise LaneFault(f"{name} must be on the cpu, got {tensor.device}")
        storage = tensor.untyped_storage()
        size = tensor.element_size()
        key = storage.data_ptr(), size
        count = storage.nbytes() // size
        if key not in self.watched:
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (count,), (1,))
            self.watched[key] = whole, Global(self.machine, name, count)
        whole, watch = self.watched[key]
        if whole.dtype != tensor.dtype:
            whole = whole.view(tensor.dtype)
        return Pointer(whole, watch, name, tensor.storage_offset())
