"""The command line: list | plan | train | figure | claims | report | bench.

Bad input ends with one message and exit code 2; nothing is written. Simulators, PyTorch and matplotlib are imported by
the commands that need them, so that the rest answers at once.
"""

from __future__ import annotations

import json as jsonlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import arg

from dynarep import plan as planning
from dynarep.envs import EnvError
from dynarep.errors import UserError, unknown
from dynarep.experiment import Experiment, Job, find, load_all, span
from dynarep.files import home, tier_file
from dynarep.schema import TIERS

TierArg = Annotated[str, arg(help=f"budget: {', '.join(TIERS)}")]
JsonArg = Annotated[bool, arg(help="print JSON instead of a table")]
ResultsArg = Annotated[Path | None, arg(metavar="PATH", help="folder of runs (default: results/runs)")]
FiguresArg = Annotated[Path | None, arg(metavar="PATH", help="folder of figures (default: figures)")]
MOST_SEEDS = 1000  # in one job, ours: a slip of the hand should not fill the memory
STYLE_OF = {"supported": "green", "contradicted": "red", "inconclusive": "yellow", "untested": "dim"}


def _results(folder: Path | None) -> Path:
    return folder or home() / "results" / "runs"


def _figures(folder: Path | None) -> Path:
    return folder or home() / "figures"


def _print_json(data: Any) -> None:
    print(jsonlib.dumps(data, indent=1))


def _console() -> Console:
    """Return a console that keeps whole tables when it is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def _selected(paper: str | None, experiment: str | None) -> list[Experiment]:
    everything = load_all()
    chosen = [find(everything, experiment)] if experiment else everything
    if paper is not None:
        papers = {e.spec.paper for e in everything}
        if paper not in papers:
            raise unknown("paper", paper, papers, "Pass --paper with one of them.")
        chosen = [e for e in chosen if e.spec.paper == paper]
    return chosen


def list_(json: JsonArg = False) -> None:
    """Show papers, experiments and claims, and which tier can judge what."""
    experiments = load_all()
    if json:
        _print_json(
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
    console = _console()
    for e in experiments:
        table = Table(title=f"{e.key}: {e.spec.title}", title_justify="left", title_style="bold", expand=False)
        table.add_column("claim", no_wrap=True)
        table.add_column("says")
        for tier in TIERS:
            table.add_column(tier, no_wrap=True)
        for claim in e.spec.claims:
            roles = [{str(t): r for t, r in claim.tiers.items()}.get(tier, "-") for tier in TIERS]
            table.add_row(claim.id, claim.says, *roles)
        console.print(table)
        console.print(f"  variants: {', '.join(e.spec.variants)}")
        console.print(f"  has runs at: {', '.join(e.tiers())}; file: {e.file.relative_to(home())}\n")


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
    rows = planning.costs(_selected(paper, experiment), tier, _results(results), seeds_per_job)
    if json:
        _print_json([row.data() for row in rows])
        return
    table = Table(title=f"tier {tier}: {purpose}", title_justify="left", title_style="bold")
    columns = ("experiment", "jobs", "runs", "there", "agent steps", "updates", "core-hours left", "of", "disk MiB")
    for name in (*columns, "peak MiB"):
        table.add_column(name, justify="left" if name == "experiment" else "right")
    for r in (*rows, planning.total(rows)):
        if not r.paper:
            table.add_section()
        table.add_row(
            f"{r.paper}_{r.experiment}".removeprefix("_"), f"{r.jobs:,}", f"{r.runs:,}", f"{r.present:,}",
            f"{r.agent_steps:,}", f"{r.updates:,}", f"{r.cpu_hours:,.2f}", f"{r.cpu_hours_all:,.2f}",
            f"{r.disk_mib:.1f}", f"{r.peak_mib:,.0f}",
        )  # fmt: skip
    console = _console()
    console.print(table)
    console.print("Peak: the largest job's memory. ", style="dim", end="")
    console.print(f"Costs are estimates. {planning.rates()['source'].strip()}", style="dim")


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read seeds as people write them: "3", "0-4", "0,2,5-7". UserError otherwise."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(
                f"--seeds '{text}': '{part.strip()}' is neither a number nor a range. Write e.g. 0-4 or 0,2,5-7."
            )
        numbers = range(int(match[1]), int(match[2] or match[1]) + 1)
        if len(seeds) + len(numbers) > MOST_SEEDS:
            raise UserError(f"--seeds '{text}': more than {MOST_SEEDS} seeds. Train them in several jobs.")
        seeds += numbers
    if len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds '{text}': a seed is given twice.")
    return tuple(seeds)


def find_job(experiment: Experiment, variant: str, task: str, seeds: str, tier: str, runs: str | None) -> Job:
    """Return the job that the arguments name; UserError with the nearest valid name for each that is wrong."""
    tier_file(tier)
    jobs = experiment.jobs(tier)
    if not jobs:
        raise UserError(
            f"{experiment.key} has no runs at tier '{tier}'. It has some at: {', '.join(experiment.tiers())}."
        )
    for what, word, allowed in (
        ("--runs", runs, {job.group for job in jobs}),
        ("--variant", variant, {job.variant for job in jobs}),
        ("--task", task, {job.task for job in jobs}),
    ):
        if word is not None and word not in allowed:
            raise unknown(what.removeprefix("--"), word, allowed, f"Pass {what} with one of them.")
    fitting = [j for j in jobs if (j.variant, j.task) == (variant, task) and runs in (None, j.group)]
    configs = {job.config.identity(): job for job in fitting}
    if not configs:
        tasks = {job.task for job in jobs if job.variant == variant and runs in (None, job.group)}
        raise unknown(f"task of variant '{variant}'", task, tasks, "Pass --task with one of them.")
    if len(configs) != 1:
        groups = ", ".join(sorted({job.group for job in fitting}))
        raise UserError(f"{len(configs)} groups of runs fit. Pass --runs with one of: {groups}.")
    (job,) = configs.values()
    return Job(job.experiment, job.group, job.variant, job.tier, job.config, parse_seeds(seeds))


def train(
    experiment: Annotated[str | None, arg(metavar="NAME", help="e.g. R1")] = None,
    variant: Annotated[str | None, arg(metavar="NAME", help="arm of the experiment, see `dynarep list`")] = None,
    task: Annotated[str | None, arg(metavar="NAME", help="e.g. walker-walk")] = None,
    seeds: Annotated[str | None, arg(metavar="SEEDS", help="e.g. 0-4 or 0,2,5-7; trained together")] = None,
    tier: TierArg = "ci",
    runs: Annotated[str | None, arg(metavar="NAME", help="group of runs, where a tier has several")] = None,
    job: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        arg(metavar="PLACE", help="instead of the five: experiment/runs/variant/task/seeds; may be repeated"),
    ] = (),
    results: ResultsArg = None,
    redo: Annotated[bool, arg(help="replace runs that exist")] = False,
) -> None:
    """Train a job by hand, a block of seeds of one variant on one task, or several. The DAG calls the same command."""
    jobs = chosen_jobs({"experiment": experiment, "variant": variant, "task": task, "seeds": seeds}, tier, runs, job)
    from dynarep import run  # PyTorch

    for each in jobs:
        name = f"{each.experiment} {each.variant} {each.task} seeds {span(each.seeds)}"
        try:
            with _progress(name, each.config.protocol.name) as report:
                trained = run.train(each, _results(results), report, redo)
        except run.StoppedError as stopped:
            print(f"\n{name}: {stopped}", file=sys.stderr)
            raise SystemExit(130) from None
        folder = _results(results) / each.config.folder()
        print(f"{name}: {len(trained)} trained, {len(each.seeds) - len(trained)} already there: {folder}")


def chosen_jobs(one: Mapping[str, str | None], tier: str, runs: str | None, several: Sequence[str]) -> list[Job]:
    """Return the jobs that `dynarep train` is asked for; UserError for too few or too many options, or a bad place."""
    given = {option: word for option, word in one.items() if word is not None}
    missing = ", ".join(f"--{option}" for option in one if option not in given)
    if several and (given or runs):
        raise UserError(
            f"--job goes without {', '.join(f'--{option}' for option in [*given, *(['runs'] if runs else [])])}."
        )
    if not several and missing:
        raise UserError(
            f"{missing}: missing. Write e.g. --experiment R1 --variant five_percent --task walker-walk --seeds 0-4, or "
            "--job with all of it; `dynarep train --help` explains them."
        )
    everything = load_all()
    if not several:
        return [
            find_job(find(everything, given["experiment"]), given["variant"], given["task"], given["seeds"], tier, runs)
        ]
    jobs = []
    for place in several:
        parts = place.split("/")
        if len(parts) != 5:
            example = "R1/accelerated/five_percent/walker-walk/0-4"
            raise UserError(f"--job '{place}': write experiment/runs/variant/task/seeds, e.g. {example}.")
        name, group, variant, task, seeds = parts
        jobs.append(find_job(find(everything, name), variant, task, seeds, tier, group))
    return jobs


@contextmanager
def _progress(name: str, unit: str) -> Iterator[Callable[[int, int, dict[str, float]], None]]:
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
        for path in drawing.write(one, tier, _results(results), _figures(figures)):
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
    keep = {c.id for e in _selected(paper, None) for c in e.spec.claims}
    from dynarep import claims as judging  # scipy
    from dynarep import records

    # All claims are judged, whatever is shown: the correction for multiplicity must not depend on a filter.
    verdicts = [v for v in judging.judge_all(everything, tier, _results(results)) if v.claim in keep]
    data = [v.data() for v in verdicts]
    if out is not None:
        records.atomic_write(out, (jsonlib.dumps(data, indent=1) + "\n").encode())
    if json:
        _print_json(data)
    elif markdown:
        _print_markdown(verdicts)
    else:
        _print_verdicts(verdicts, tier)
        pages = [_results(results) / "report" / f"{tier}.html", *sorted((home() / "figures" / tier).glob("*/*.png"))]
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
    _console().print(table)


def report(tier: TierArg = "ci", results: ResultsArg = None, figures: FiguresArg = None) -> None:
    """Write the report, one self-contained page: results/runs/report/<tier>.html."""
    tier_file(tier)
    experiments = load_all()
    from dynarep import claims as judging
    from dynarep import records
    from dynarep import report as reporting

    path = _results(results) / "report" / f"{tier}.html"
    verdicts = judging.judge_all(experiments, tier, _results(results))
    page = reporting.build(experiments, tier, verdicts, _results(results), _figures(figures))
    records.atomic_write(path, page.encode())
    print(path)


def bench(
    rounds: Annotated[int, arg(help="bursts of each kernel; medians are over them")] = 9,
    json: JsonArg = False,
) -> None:
    """Time the updates beside the machine's matrix-multiply rate, on one thread, about half a minute."""
    if rounds < 1:
        raise UserError(f"--rounds {rounds}: at least 1.")
    from dynarep import bench as benchmarks  # PyTorch

    with _progress("bench", "rounds") as report:
        measured = benchmarks.run(rounds, lambda done, total: report(done, total, {}))
    if json:
        _print_json(measured)
        return
    table = Table(title=f"one thread, matrix products at {measured['gemm_gflops']:.0f} GFLOP/s", title_justify="left")
    for name in ("kernel", "ms", "GFLOP", "GFLOP/s", "of the matrix-multiply rate"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for row in measured["rows"]:
        table.add_row(
            row["name"], f"{row['ms']:.2f}", f"{row['gflop']:.3f}", f"{row['gflops']:.1f}", f"{row['efficiency']:.0%}"
        )
    _console().print(table)


COMMANDS: dict[str, Callable[..., None]] = {
    "list": list_,
    "plan": plan,
    "train": train,
    "figure": figure,
    "claims": claims,
    "report": report,
    "bench": bench,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `arguments` default to the process's own."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given and not given[0].startswith("-") and given[0] not in COMMANDS:
            raise unknown("command", given[0], COMMANDS, "`dynarep --help` explains them.")
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="dynarep",
            description="Do two papers on model-generated data in reinforcement learning hold up? Start with "
            "`make reproduce`; `dynarep list` shows what there is, `dynarep plan` what it costs.",
            args=given,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except (UserError, EnvError) as error:
        print(f"dynarep: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
