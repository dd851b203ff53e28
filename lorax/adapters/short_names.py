"""The shortest names for many targets: how PEFT writes down a long target_modules."""

from __future__ import annotations

from collections.abc import Collection


def shortest_names(targets: Collection[str], others: Collection[str]) -> list[str]:
    """The shortest ends of paths that match these targets and none of the other modules.

    210 paths become ["down_proj", "gate_proj", ...]. By PEFT's rule (0.21.2), in order.
    """
    taken = {end for name in others for end in _ends(name)}
    chosen: set[str] = set()
    for target in sorted(targets, key=_ends):
        if any(target.endswith(f".{end}") for end in chosen):
            continue
        free = [end for end in _ends(target) if end not in taken and end not in chosen]
        chosen.update(free[:1])
    return sorted(chosen or targets)


def _ends(name: str) -> list[str]:
    """A path's ends in whole names, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]
