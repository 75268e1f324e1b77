"""What runs say: figure, claims, report."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from tyro.conf import arg

from dynarep.cli.common import (
    FiguresArg,
    JsonArg,
    ResultsArg,
    TierArg,
    console,
    figures_folder,
    print_json,
    results_folder,
    selected,
)
from dynarep.experiment import find, load_all
from dynarep.files import home, tier_file

STYLE_OF = {"supported": "green", "contradicted": "red", "inconclusive": "yellow", "untested": "dim"}


def figure(
    experiment: Annotated[tuple[str, ...], arg(help="e.g. R1, or several")],
    tier: TierArg = "ci",
    results: ResultsArg = None,
    figures: FiguresArg = None,
) -> None:
    """Draw figures from the runs that are there: figures/<tier>/<paper>/<id>.csv, .svg, .pdf, .png."""
    tier_file(tier)
    everything = load_all()
    chosen = [find(everything, word) for word in experiment]
    from dynarep import figures as drawing  # matplotlib, pandas

    for one in chosen:
        for path in drawing.write(one, tier, results_folder(results), figures_folder(figures)):
            print(path)


def claims(
    tier: TierArg = "ci",
    paper: Annotated[str | None, arg(metavar="NAME", help="only this paper: madtd, ftfl, beyond")] = None,
    results: ResultsArg = None,
    out: Annotated[Path | None, arg(help="also write the JSON to this file, and exit 0 whatever the verdicts")] = None,
    json: JsonArg = False,
    markdown: Annotated[bool, arg(help="print the README's table")] = False,
) -> None:
    """Judge every claim at a tier. Exit code 1 if a gated claim is not supported."""
    tier_file(tier)
    everything = load_all()
    keep = {c.id for e in selected(paper, None) for c in e.spec.claims}
    from dynarep import claims as judging  # scipy
    from dynarep import records

    # All claims are judged, whatever is shown: the correction for multiplicity must not depend on a filter.
    verdicts = [v for v in judging.judge_all(everything, tier, results_folder(results)) if v.claim in keep]
    data = [v.data() for v in verdicts]
    if out is not None:
        records.atomic_write(out, (jsonlib.dumps(data, indent=1) + "\n").encode())
    if json:
        print_json(data)
    elif markdown:
        _print_markdown(verdicts)
    else:
        _print_verdicts(verdicts, tier)
        pages = [
            results_folder(results) / "report" / f"{tier}.html",
            *sorted((home() / "figures" / tier).glob("*/*.png")),
        ]
        for path in pages:
            if path.exists():
                print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    failed = judging.failures(verdicts)
    if failed and out is None:
        print(f"gated claims not supported: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


def _measured(v: Any, separator: str) -> str:
    """Return estimate, interval, unit and sample of a verdict; a dash where nothing was measured."""
    if v.estimate is None:
        return "-"
    return separator.join([f"{v.estimate:.3g} [{v.low:.3g}, {v.high:.3g}]", v.unit, v.sample])


def _print_markdown(verdicts: Sequence[Any]) -> None:
    """Print the README's table: what was judged, then the names of what could not be."""
    print("| claim | the paper says | published | we measure | verdict |\n|---|---|---|---|---|")
    judged = [v for v in verdicts if v.verdict != "untested"]
    for v in judged:
        cells = (v.claim, v.says, v.published, _measured(v, ", "), f"**{v.verdict}** ({v.role})")
        print("|", " | ".join(cell.replace("|", "\\|") for cell in cells), "|")
    rest: dict[str, list[str]] = {}
    for v in verdicts:
        if v.verdict == "untested":
            rest.setdefault(v.reason, []).append(v.claim)
    for reason, names in rest.items():
        print(f"\nUntested: {', '.join(names)}: {reason}.")


def _print_verdicts(verdicts: Sequence[Any], tier: str) -> None:
    table = Table(title=f"claims at tier {tier}", title_justify="left", title_style="bold", show_lines=True)
    for name in ("claim", "the paper says", "we measure", "verdict", "why"):
        table.add_column(name, no_wrap=name == "claim")
    for v in sorted(verdicts, key=lambda v: bool(v.verdict == "untested")):
        verdict = f"[{STYLE_OF[v.verdict]}]{v.verdict}[/]\n{v.role}" + ("\n[red]other code[/]" if v.stale else "")
        table.add_row(v.claim, v.says, _measured(v, "\n"), verdict, v.reason)
    console().print(table)


def report(tier: TierArg = "ci", results: ResultsArg = None, figures: FiguresArg = None) -> None:
    """Write the report, one self-contained page: results/runs/report/<tier>.html."""
    tier_file(tier)
    experiments = load_all()
    from dynarep import claims as judging
    from dynarep import records
    from dynarep import report as reporting

    path = results_folder(results) / "report" / f"{tier}.html"
    verdicts = judging.judge_all(experiments, tier, results_folder(results))
    page = reporting.build(experiments, tier, verdicts, results_folder(results), figures_folder(figures))
    records.atomic_write(path, page.encode())
    print(path)
