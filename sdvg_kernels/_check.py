"""Argument checks: every message is one sentence of one form, `{op}: {argument} must {rule}, got {value}`, plus a remedy."""

from __future__ import annotations

import torch


def message(op: str, argument: str, rule: str, got: object, remedy: str = "") -> str:
    """Return the sentence; `remedy`, when given, follows after a semicolon."""
    return f"{op}: {argument} must {rule}, got {got}" + (f"; {remedy}" if remedy else "")


def require(condition: bool, op: str, argument: str, rule: str, got: object, remedy: str = "") -> None:
    """Raise ValueError with the sentence unless `condition` holds."""
    if not condition:
        raise ValueError(message(op, argument, rule, got, remedy))


def require_dtype(condition: bool, op: str, argument: str, rule: str, got: object, remedy: str = "") -> None:
    """Raise TypeError with the sentence unless `condition` holds."""
    if not condition:
        raise TypeError(message(op, argument, rule, got, remedy))


def shape_of(tensor: torch.Tensor) -> list[int]:
    """Return the shape as a plain list, for messages."""
    return list(tensor.shape)
