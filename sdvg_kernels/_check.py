"""Argument checks: a message is `{op}: {argument} must {rule}, got {value}`, plus a remedy.

Nothing is formatted before a check fails.
"""

from __future__ import annotations

import importlib.util

import torch


def message(op: str, argument: str, rule: str, got: object, remedy: str = "") -> str:
    """Return the sentence; `remedy`, when given, follows after a semicolon."""
    got = list(got) if isinstance(got, torch.Size) else got
    return f"{op}: {argument} must {rule}, got {got}" + (f"; {remedy}" if remedy else "")


def require(
    op: str, condition: bool, argument: str, rule: str, got: object, remedy: str = ""
) -> None:
    """Raise ValueError with the sentence unless `condition` holds."""
    if not condition:
        raise ValueError(message(op, argument, rule, got, remedy))


def require_dtype(
    op: str, condition: bool, argument: str, rule: str, got: object, remedy: str = ""
) -> None:
    """Raise TypeError with the sentence unless `condition` holds."""
    if not condition:
        raise TypeError(message(op, argument, rule, got, remedy))


def require_implementation(
    op: str, implementation: str | None, available: dict[str, str], where: str
) -> str:
    """Return which implementation runs: the one asked for, else the first that is available.

    `available` maps names, in order of preference, to "" or why not; `where` says on what.
    Raises ValueError for a name that does not exist, NotImplementedError for one that cannot run.
    """
    if implementation is None:
        return next(name for name, reason in available.items() if not reason)
    names = ", ".join(map(repr, available))
    got = repr(implementation)
    require(op, implementation in available, "implementation", f"be one of {names}", got)
    if reason := available[implementation]:
        rule = f"run on {where}"
        raise NotImplementedError(message(op, "implementation", rule, got, reason))
    return implementation


def by_preference(device: str, reason: str) -> dict[str, str]:
    """Return implementation -> "" or why it cannot run, the default first; `reason` is Triton's."""
    if device == "cpu":
        # the interpreter is for tests: never the default
        return {"reference": "", "triton": reason}
    return {"triton": reason, "reference": ""}


def triton_reason(device: str) -> str:
    """Return "" or why Triton cannot run on tensors of the device type `device`."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    if device == "cpu" and not triton.knobs.runtime.interpret:
        return "set TRITON_INTERPRET=1 before the start to run Triton on cpu tensors"
    return "" if device in ("cpu", "cuda") else f"there is no Triton kernel for {device}"


def shape_of(tensor: torch.Tensor) -> list[int]:
    """Return the shape as a plain list, for messages."""
    return list(tensor.shape)
