"""What there is, what it costs: list, plan."""

from __future__ import annotations

from typing import Annotated

from rich.table import Table
from tyro.conf import arg

from dynarep import plan as planning
from dynarep.cli.common import (
    JsonArg,
    ResultsArg,
    TierArg,
    console,
    print_json,
    results_folder,
    selected,
)
from dynarep.errors import UserError
from dynarep.experiment import load_all
from dynarep.files import home, tier_file
from dynarep.schema import TIERS


def list_(json: JsonArg = False) -> None:
    """Show papers, experiments and claims, and which tier can judge what."""
    experiments = load_all()
    if json:
        print_json(
            [
                {
                    "paper": e.spec.paper,
                    "experiment": e.spec.id,
                    "target": e.key,
                    "title": e.spec.title,
                    "file": str(e.file.relative_to(home())),
                    "tiers": e.tiers(),
                    "variants": {name: variant.label for name, variant in e.spec.variants.items()},
                    "tasks": {tier: list(dict.fromkeys(job.task for job in e.jobs(tier))) for tier in e.tiers()},
                    "claims": [{"claim": c.id, "says": c.says, "tiers": dict(c.tiers)} for c in e.spec.claims],
                }
                for e in experiments
            ]
        )
        return
    screen = console()
    for e in experiments:
        table = Table(title=f"{e.key}: {e.spec.title}", title_justify="left", title_style="bold", expand=False)
        table.add_column("claim", no_wrap=True)
        table.add_column("says")
        for tier in TIERS:
            table.add_column(tier, no_wrap=True)
        for claim in e.spec.claims:
            roles = [{str(t): r for t, r in claim.tiers.items()}.get(tier, "-") for tier in TIERS]
            table.add_row(claim.id, claim.says, *roles)
        screen.print(table)
        screen.print(f"  variants: {', '.join(e.spec.variants)}")
        screen.print(f"  has runs at: {', '.join(e.tiers())}; file: {e.file.relative_to(home())}\n")


def plan(
    tier: TierArg = "ci",
    paper: Annotated[str | None, arg(metavar="NAME", help="only this paper: madtd, ftfl, beyond")] = None,
    experiment: Annotated[str | None, arg(metavar="NAME", help="only this experiment, e.g. R1")] = None,
    seeds_per_job: Annotated[int | None, arg(metavar="N", help="as if so many seeds were trained together")] = None,
    results: ResultsArg = None,
    json: JsonArg = False,
) -> None:
    """Show what a tier would run, what is there already, and what the rest costs."""
    purpose = tier_file(tier).purpose
    if seeds_per_job is not None and seeds_per_job < 1:
        raise UserError(f"--seeds-per-job {seeds_per_job}: at least 1.")
    rows = planning.costs(selected(paper, experiment), tier, results_folder(results), seeds_per_job)
    if json:
        print_json([row.data() for row in rows])
        return
    table = Table(title=f"tier {tier}: {purpose}", title_justify="left", title_style="bold")
    columns = ("experiment", "jobs", "runs", "there", "agent steps", "updates", "core-hours left", "of")
    for name in (*columns, "or GPU-hours", "disk MiB", "peak MiB"):
        table.add_column(name, justify="left" if name == "experiment" else "right")
    for r in (*rows, planning.total(rows)):
        if not r.paper:
            table.add_section()
        table.add_row(
            f"{r.paper}_{r.experiment}".removeprefix("_"), f"{r.jobs:,}", f"{r.runs:,}", f"{r.present:,}",
            f"{r.agent_steps:,}", f"{r.updates:,}", f"{r.cpu_hours:,.2f}", f"{r.cpu_hours_all:,.2f}",
            f"{r.gpu_hours_all:,.2f}", f"{r.disk_mib:.1f}", f"{r.peak_mib:,.0f}",
        )  # fmt: skip
    screen = console()
    screen.print(table)
    screen.print("Peak: the largest job's memory. GPU-hours: by an assumed rate, not measured. ", style="dim", end="")
    screen.print(f"Costs are estimates. {planning.rates()['source'].strip()}", style="dim")
