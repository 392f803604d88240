"""The file of finished videos that a sweep goes on from: JSON lines, settings first."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm


def fill(
    store: Path,
    settings: Mapping[str, object],
    keys: Sequence[str],
    count: int,
    make: Callable[[int, str], dict[str, object]],
    warm_up: Callable[[int], None],
) -> dict[tuple[int, str], dict[str, float]]:
    """Make the video of every prompt 0 to `count` - 1 and method that `store` does not hold yet.

    Args:
        store: a file of JSON lines: the settings, then a video each, written as soon as it is made.
        settings: all that decides a result beside the method and the prompt.
        keys: the methods' names.
        make: makes the video of (prompt's number, method); its result holds both as `prompt` and
            `method`.
        warm_up: called once with the number of the first prompt, if there is anything to make.

    Returns (prompt's number, method) -> what `make` gave.

    Raises ValueError for a store with other settings, or that is none.
    """
    done = _resume(store, settings)
    left = [n for n in range(count) if any((n, key) not in done for key in keys)]
    with (
        store.open("a", encoding="utf-8") as file,
        tqdm(total=count * len(keys), unit="video") as bar,
    ):
        bar.update(sum((n, key) in done for n in range(count) for key in keys))
        if left:
            warm_up(left[0])
        for n in left:
            # no method always comes first
            first = n % len(keys)
            for key in [*keys[first:], *keys[:first]]:
                if (n, key) in done:
                    continue
                video = make(n, key)
                done[n, key] = video
                file.write(json.dumps(video) + "\n")
                file.flush()
                bar.set_postfix_str(key)
                bar.update()
    return done


def read(store: Path) -> tuple[object, dict[tuple[int, str], dict[str, float]], int]:
    """Return the settings, the videos by (prompt's number, method), and the whole lines' bytes.

    Raises ValueError for a file that is none of these.
    """
    settings, videos, length = None, {}, 0
    for raw in store.read_bytes().splitlines(keepends=True) if store.exists() else []:
        # a line without its end was cut by a crash
        if not raw.endswith(b"\n"):
            break
        try:
            entry = json.loads(raw)
            if settings is None:
                settings = entry["settings"]
            else:
                videos[entry["prompt"], entry["method"]] = entry
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"sweep: {store} must be the videos of a sweep, got {raw[:40]!r}; "
                "give another --out, or remove it to begin anew"
            ) from error
        length += len(raw)
    return settings, videos, length


def _resume(store: Path, settings: Mapping[str, object]) -> dict[tuple[int, str], dict[str, float]]:
    settings = json.loads(json.dumps(settings))
    found, videos, length = read(store)
    # settings alone: the run failed before its first video
    if not videos:
        store.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        return {}
    if found != settings:
        differing = [
            name for name in {**found, **settings} if found.get(name) != settings.get(name)
        ]
        raise ValueError(
            f"sweep: {store} was made with another {', '.join(sorted(differing))}; "
            "give another --out, or remove it to begin anew"
        )
    os.truncate(store, length)
    return videos
