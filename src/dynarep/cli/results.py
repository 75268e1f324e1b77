"""What runs say: figure, claims, report, reference."""

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
    FromArg,
    JsonArg,
    ResultsArg,
    TierArg,
    console,
    figures_folder,
    print_json,
    progress,
    results_folder,
    selected,
)
from dynarep.errors import UserError, unknown
from dynarep.experiment import Experiment, find, load_all
from dynarep.files import experiments as experiments_folder
from dynarep.files import home, tier_file
from dynarep.registration import CALIBRATION
from dynarep.statements import Judged

STYLE_OF = {"supported": "green", "contradicted": "red", "inconclusive": "yellow", "untested": "dim"}


def figure(
    experiment: Annotated[tuple[str, ...], arg(help="e.g. R1, or several")],
    tier: TierArg = "ci",
    results: ResultsArg = None,
    figures: FiguresArg = None,
    source: FromArg = "runs",
) -> None:
    """Draw figures from the runs that are there: figures/<tier>/<paper>/<id>.csv, .svg, .pdf, .png."""
    tier_file(tier)
    everything = load_all()
    chosen = [find(everything, word) for word in experiment]
    folder = results_folder(results, source)
    from dynarep import figures as drawing  # matplotlib, pandas

    for one in chosen:
        for path in drawing.write(one, tier, folder, figures_folder(figures)):
            print(path)


def claims(
    tier: TierArg = "ci",
    paper: Annotated[str | None, arg(metavar="NAME", help="only this paper: madtd, ftfl, beyond")] = None,
    results: ResultsArg = None,
    out: Annotated[Path | None, arg(help="also write the JSON to this file, and exit 0 whatever the verdicts")] = None,
    json: JsonArg = False,
    markdown: Annotated[bool, arg(help="print the README's table")] = False,
    source: FromArg = "runs",
    kept: Annotated[bool, arg(help="print what `make reproduce` has just judged")] = False,
    explain: Annotated[str | None, arg(metavar="CLAIM", help="all about one: rule, runs, numbers, verdict")] = None,
    calibrate: Annotated[bool, arg(help="simulate the gated claims: how often is a verdict wrong?")] = False,
    write: Annotated[bool, arg(help=f"with --calibrate: keep the outcome in experiments/{CALIBRATION}")] = False,
) -> None:
    """Judge every claim at a tier. Exit code 1 if a gated claim is not supported."""
    tier_file(tier)
    everything = load_all()
    folder = results_folder(results, source)
    if kept and (out is not None or explain is not None or calibrate):
        raise UserError("--kept: goes without --out, --explain and --calibrate, which judge.")
    if calibrate:
        _calibrate(everything, tier, folder, json, write)
        return
    if write:
        raise UserError("--write: goes with --calibrate.")
    if explain is not None:
        _explain(everything, explain, tier, folder)
        return
    keep = {c.id for e in selected(paper, None) for c in e.spec.claims}
    from dynarep import claims as judging  # scipy
    from dynarep import records

    # All claims are judged, whatever is shown: the correction for multiplicity must not depend on a filter.
    known = judging.read(results_folder(results) / "claims" / f"{tier}.json") if kept else None
    verdicts = [v for v in known or judging.judge_all(everything, tier, folder) if v.claim in keep]
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
            _page(results, tier),
            *sorted((home() / "figures" / tier).glob("*/*.png")),
        ]
        for path in pages:
            if path.exists():
                print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    failed = judging.failures(verdicts)
    if failed and out is None:
        print(f"gated claims not supported: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


def _page(results: Path | None, tier: str) -> Path:
    """Return where a tier's report lies: never beside committed runs."""
    return results_folder(results) / "report" / f"{tier}.html"


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
        verdict += "\n[red]rule younger than its runs[/]" if v.registered == "no" else ""
        table.add_row(v.claim, v.says, _measured(v, "\n"), verdict, v.reason)
    console().print(table)


def _explain(everything: Sequence[Experiment], name: str, tier: str, folder: Path) -> None:
    """Print all about one claim; UserError for a name that does not exist."""
    owners = {claim.id: (experiment, claim) for experiment in everything for claim in experiment.spec.claims}
    if name not in owners:
        raise unknown("claim", name, owners, "Pass --explain with one of them; `dynarep list` shows them.")
    from dynarep import claims as judging
    from dynarep.cli.explain import explain

    experiment, claim = owners[name]
    together = (
        everything if isinstance(claim, Judged) and claim.role(tier) == "gated" else [experiment]
    )  # Holm's correction needs all gates
    (verdict,) = [v for v in judging.judge_all(together, tier, folder) if v.claim == name]
    explain(experiment, claim, verdict, folder)


def _calibrate(everything: Sequence[Experiment], tier: str, folder: Path, json: bool, write: bool) -> None:
    """Print how often the gates of a tier are wrong; exit code 1 if one of them should not be a gate."""
    from dynarep import calibration, records

    with progress("calibration", "claims") as report:
        rows, anything = calibration.run(everything, tier, folder, report=lambda done, total: report(done, total, {}))
    if write:
        path = experiments_folder() / CALIBRATION
        kept = path.read_text(encoding="utf-8") if path.exists() else ""
        records.atomic_write(path, calibration.to_csv(rows, kept, tier).encode())
    if json:
        print_json({"rows": [row.data() for row in rows], "any_false_support": anything, "draws": calibration.DRAWS})
    else:
        table = Table(
            title=f"gated claims at tier {tier}, {calibration.DRAWS:,} simulated data sets", title_justify="left"
        )
        columns = (
            "claim",
            "seeds x tasks",
            "spread",
            "effect claimed",
            "false support",
            "power",
            "power at the effect seen",
            "",
        )
        for name in columns:
            table.add_column(name, justify="left" if name in ("claim", "") else "right")
        for r in rows:
            table.add_row(
                r.claim, f"{r.seeds} x {r.tasks}", f"{r.spread:.3g}", f"{r.effect:g}",
                f"{r.false_support:.2%} ± {r.false_support_error:.2%}", f"{r.power:.1%} ± {r.power_error:.1%}",
                f"{r.power_at_seen:.1%}", f"[red]{'; '.join(r.faults)}[/]" if r.faults else "",
            )  # fmt: skip
        console().print(table)
        print(f"Without any effect, some gated claim is called supported in {anything:.2%} of data sets.")
    if faulty := [row.claim for row in rows if row.faults]:
        print(f"should not be gated at tier {tier}: {', '.join(faulty)}", file=sys.stderr)
        raise SystemExit(1)


def report(
    tier: TierArg = "ci", results: ResultsArg = None, figures: FiguresArg = None, source: FromArg = "runs"
) -> None:
    """Write the report, one self-contained page: results/runs/report/<tier>.html."""
    tier_file(tier)
    experiments = load_all()
    from dynarep import claims as judging
    from dynarep import records
    from dynarep import report as reporting

    folder = results_folder(results, source)
    path = _page(results, tier)
    verdicts = judging.judge_all(experiments, tier, folder)
    page = reporting.build(experiments, tier, verdicts, folder, figures_folder(figures), path)
    records.atomic_write(path, page.encode())
    print(path)


def reference(tier: TierArg = "ci") -> None:
    """Put this machine's runs of a tier into results/reference, to be committed; all must be there and be believed."""
    from dynarep import reference as committed

    copied, gone = committed.keep(tier)
    print(f"{copied} runs copied to {home() / 'results' / 'reference'}, {gone} taken away that no tier plans")
