"""What commands share: options, folders, consoles, progress."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import arg

from dynarep.errors import UserError, unknown
from dynarep.experiment import Experiment, find, load_all
from dynarep.files import home
from dynarep.schema import TIERS

TierArg = Annotated[str, arg(help=f"budget: {', '.join(TIERS)}")]
JsonArg = Annotated[bool, arg(help="print JSON instead of a table")]
ResultsArg = Annotated[Path | None, arg(metavar="PATH", help="folder of runs (default: results/runs)")]
SOURCES = ("runs", "reference")  # below results: made here, committed
FromArg = Annotated[str, arg(name="from", metavar="SOURCE", help="runs, or reference: the committed ones")]
FiguresArg = Annotated[Path | None, arg(metavar="PATH", help="folder of figures (default: figures)")]


def results_folder(folder: Path | None, source: str = "runs") -> Path:
    """Return the folder of runs that was asked for, or the usual one of a source; UserError if both were."""
    if source not in SOURCES:
        raise unknown("source of runs", source, SOURCES, "Pass --from with one of them.")
    if folder is not None and source != "runs":
        raise UserError(f"--results {folder}: goes without --from {source}, which is {home() / 'results' / source}.")
    return folder or home() / "results" / source


def figures_folder(folder: Path | None) -> Path:
    """Return the folder of figures that was asked for, or the usual one."""
    return folder or home() / "figures"


def print_json(data: Any) -> None:
    """Print data for programs."""
    print(jsonlib.dumps(data, indent=1))


def console() -> Console:
    """Return a console that keeps whole tables when it is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def selected(paper: str | None, experiment: str | None) -> list[Experiment]:
    """Return the experiments of a paper, or one of them; UserError for a name that does not exist."""
    everything = load_all()
    chosen = [find(everything, experiment)] if experiment else everything
    if paper is not None:
        papers = {e.spec.paper for e in everything}
        if paper not in papers:
            raise unknown("paper", paper, papers, "Pass --paper with one of them.")
        chosen = [e for e in chosen if e.spec.paper == paper]
    return chosen


@contextmanager
def progress(name: str, unit: str) -> Iterator[Callable[[int, int, dict[str, float]], None]]:
    """Give a reporter: a bar with current numbers and an ETA on a terminal, a line every ten seconds in a log."""
    started, last = time.monotonic(), [0.0]
    bar: list[Any] = []

    def report(done: int, total: int, now: dict[str, float]) -> None:
        numbers = ", ".join(f"{key} {value:.3g}" for key, value in now.items())
        if sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            if not bar:
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                progress = Progress(*columns, TextColumn("{task.fields[numbers]}"), console=Console(stderr=True))
                progress.start()
                bar.extend([progress, progress.add_task(name, total=total, numbers="")])
            bar[0].update(bar[1], completed=done, numbers=numbers)
        elif time.monotonic() - last[0] > 10 or done >= total:
            last[0] = time.monotonic()
            elapsed = last[0] - started
            left = f"{elapsed * (total - done) / done:.0f} s left" if done else "starting"
            print(f"{name} [{unit}]: {done}/{total}, {elapsed:.0f} s, {left}; {numbers}", file=sys.stderr, flush=True)

    try:
        yield report
    finally:
        if bar:
            bar[0].stop()  # gives the terminal its cursor back, also after Ctrl-C
