"""Colours that colour-blind readers can tell apart: seaborn's palette of that name, without the 2 s of its import."""

from __future__ import annotations

from matplotlib.colors import to_rgb

COLOURBLIND = (
    "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9",
)  # fmt: skip


def colours(count: int) -> list[tuple[float, float, float]]:
    """Return the first so many, from the start again after ten."""
    return [to_rgb(COLOURBLIND[k % len(COLOURBLIND)]) for k in range(count)]
