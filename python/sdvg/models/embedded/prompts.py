"""The prompt language of the embedded models: which digit, which way, how fast."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# direction -> unit step (x to the right, y down)
DIRECTIONS = {
    "right": (1.0, 0.0),
    "down right": (math.sqrt(0.5), math.sqrt(0.5)),
    "down": (0.0, 1.0),
    "down left": (-math.sqrt(0.5), math.sqrt(0.5)),
    "left": (-1.0, 0.0),
    "up left": (-math.sqrt(0.5), -math.sqrt(0.5)),
    "up": (0.0, -1.0),
    "up right": (math.sqrt(0.5), -math.sqrt(0.5)),
}
# pixels a frame
SPEEDS = {"slowly": 0.3, "quickly": 0.7}

_DIGIT = re.compile(r"\b(?:(\d)|(" + "|".join(DIGITS) + r"))(?:es|s|th)?\b")
_AXES = {
    "left": r"left(?:wards?)?|west(?:wards?)?|leftmost",
    "right": r"right(?:wards?)?|east(?:wards?)?|rightmost",
    "up": r"up(?:wards?)?|upper|north(?:wards?)?|rising|rises|top|ascending|climbing",
    "down": r"down(?:wards?)?|lower|south(?:wards?)?|falling|falls|bottom|descending|sinking",
}
_AXES = {axis: re.compile(rf"\b(?:{words})\b") for axis, words in _AXES.items()}
_FAST = re.compile(
    r"\b(?:quick(?:ly)?|fast|rapid(?:ly)?|swift(?:ly)?|speedy|speedily|hurried(?:ly)?)\b"
)
_SLOW = re.compile(r"\b(?:slow(?:ly)?|gentle|gently|leisurely|calm(?:ly)?|unhurried)\b")
_COMPASS = re.compile(r"\b(north|south)[ -]?(east|west)(?:wards?)?\b")


class Request(NamedTuple):
    """What a prompt asks for; None where it leaves the choice to the model."""

    digit: int | None
    direction: str | None  # a key of DIRECTIONS
    speed: str | None  # a key of SPEEDS


def parse_prompt(prompt: str) -> Request:
    """The digit, direction and speed named in ``prompt``; the first digit named counts."""
    text = _COMPASS.sub(r"\1 \2", prompt.lower())
    found = _DIGIT.search(text)
    digit = None
    if found:
        digit = int(found[1]) if found[1] else DIGITS.index(found[2])
    said = {axis: bool(words.search(text)) for axis, words in _AXES.items()}
    vertical = [axis for axis in ("up", "down") if said[axis]]
    horizontal = [axis for axis in ("left", "right") if said[axis]]
    # "left and right" contradicts itself: treat that axis as not said
    parts = [axes[0] for axes in (vertical, horizontal) if len(axes) == 1]
    fast, slow = bool(_FAST.search(text)), bool(_SLOW.search(text))
    speed = None if fast == slow else ("quickly" if fast else "slowly")
    return Request(digit, " ".join(parts) or None, speed)
