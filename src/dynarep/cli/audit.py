"""Does everything follow from what was run? audit."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import tyro
from rich.text import Text
from tyro.conf import arg

from dynarep.audit import Audit
from dynarep.audit import audit as look
from dynarep.audit.findings import printable
from dynarep.cli.common import SOURCES, FromArg, JsonArg, console, print_json, progress
from dynarep.errors import unknown
from dynarep.experiment import load_all
from dynarep.files import home

MOST = 20  # findings of a kind that are printed


def audit(
    path: Annotated[
        tyro.conf.Positional[Path | None],
        arg(metavar="PATH", help="folder with results/runs and figures, or a folder of runs (default: this checkout)"),
    ] = None,
    tier: Annotated[str | None, arg(help="only this one (default: every tier that something is there of)")] = None,
    rerun: Annotated[
        int | None, arg(metavar="K", help="train K runs again, drawn at random, and compare bytes")
    ] = None,
    seed: Annotated[int, arg(help="draws the runs of --rerun")] = 0,
    json: JsonArg = False,
    source: FromArg = "runs",
) -> None:
    """Check that runs, figures, verdicts and report follow from each other. Exit code 1 if not. Writes nothing."""
    if source not in SOURCES:
        raise unknown("source of runs", source, SOURCES, "Pass --from with one of them.")
    with progress("audit", "checks") as report:
        found = look(
            path or home(), load_all(), tier, rerun, seed, lambda what, done, total: report(done, total, {}), source
        )
    if json:
        print_json(found.data())
    else:
        _print(found)
    if not found.ok:
        raise SystemExit(1)


def _print(found: Audit) -> None:
    screen = console()
    kinds = Counter(finding.kind for finding in found.findings)
    for kind, count in kinds.items():
        for finding in [f for f in found.findings if f.kind == kind][:MOST]:
            screen.print(Text.assemble((f"{kind:<11}", "red"), f" {finding.path}: {finding.message}"), soft_wrap=True)
        if count > MOST:
            screen.print(Text(f"{kind:<11} and {count - MOST} more; --json lists them"))
    for what in found.not_checked:
        screen.print(Text(f"not checked: {what}", style="dim"), soft_wrap=True)
    if found.rerun:
        _print_rerun(found)
    checked = ", ".join(f"{count} {what}" for what, count in found.checked.items()) or "nothing"
    tiers = ", ".join(found.tiers) or "none"
    screen.print(Text(f"checked: {checked}; tiers: {tiers}"))
    verdict = "everything that was checked holds" if found.ok else f"{len(found.findings)} findings"
    screen.print(Text(verdict, style="green" if found.ok else "red"))
    sys.stdout.flush()


def _print_rerun(found: Audit) -> None:
    again, total = found.rerun, found.rerun["runs"]
    screen = console()
    drawn, different = len(again["drawn"]), len(again["different"])
    screen.print(Text(f"trained again: {drawn} of {total} runs (--seed {again['seed']}), {different} differ"))
    for other in again["made_otherwise"][:MOST]:
        screen.print(Text(f"  {other['run']}: made with {printable(other['made_with'])}", style="dim"), soft_wrap=True)
    for chance in again["caught"]:
        forged = chance["forged"]
        screen.print(
            Text(f"  {forged} forged ({forged / total:.1%}): at least one drawn with {chance['probability']:.0%}")
        )
    smallest = again["caught_with_95_percent"]
    screen.print(Text(f"  with 95 % or more: from {smallest} forged on ({smallest / total:.1%})"))
