"""How the report writes numbers and seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from dynarep.experiment import span


def number(value: Any) -> str:
    """Write a number with three digits, an exponent only where it is needed, and a minus sign that is one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if isinstance(value, int) or 1e3 <= abs(value) < 1e6:
        return f"{value:,.0f}".replace(",", "\u202f").replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def p_value(value: float | None) -> str:
    """Write a p-value; "–" where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def cpu_time(core_hours: float) -> str:
    """Write CPU time in the unit that fits it, e.g. "1.6 CPU seconds"."""
    for least, unit, of_an_hour in ((1.0, "core-hours", 1), (1 / 30, "minutes", 60), (0.0, "seconds", 3600)):
        if core_hours >= least:
            return f"{number(core_hours * of_an_hour)} CPU {unit}"
    return "no CPU time"


def seeds(numbers: Iterable[int]) -> str:
    """Write seeds, e.g. "seeds 0-3,7"; nothing for none."""
    listed = sorted(numbers)
    return f"seed{'s' * (len(listed) > 1)} {span(listed)}" if listed else ""
