"""One job by hand, or as the DAG asks for it: train."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import tyro
from tyro.conf import arg

from dynarep.cli.common import (
    ResultsArg,
    TierArg,
    progress,
    results_folder,
)
from dynarep.errors import UserError, unknown
from dynarep.experiment import Experiment, Job, find, load_all, span
from dynarep.files import tier_file

MOST_SEEDS = 1000  # in one job, ours: a slip of the hand should not fill the memory


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
    return replace(job, seeds=parse_seeds(seeds))


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
    device: Annotated[str, arg(help="cpu, cuda or e.g. cuda:1")] = "cpu",
    compiled: Annotated[bool, arg(help="compile the updates (default: as the tier says)")] = False,
    env_workers: Annotated[int, arg(metavar="N", help="processes that simulate environments; 0: this one alone")] = 0,
    no_compiled: Annotated[bool, arg(help="do not, whatever the tier says")] = False,
) -> None:
    """Train a job by hand, a block of seeds of one variant on one task, or several. The DAG calls the same command."""
    if compiled and no_compiled:
        raise UserError("--compiled goes without --no-compiled.")
    everything = load_all()
    one = {"experiment": experiment, "variant": variant, "task": task, "seeds": seeds}
    jobs = chosen_jobs(one, tier, runs, job, everything)
    if compiled or no_compiled:
        jobs = [replace(each, compiled=compiled) for each in jobs]
    from dynarep import registration, run  # PyTorch

    rules = registration.registered(everything)

    for each in jobs:
        name = f"{each.experiment} {each.variant} {each.task} seeds {span(each.seeds)}"
        try:
            with progress(name, each.config.protocol.name) as report:
                ours = rules.get(each.config.identity(), {})
                trained = run.train(each, results_folder(results), report, redo, ours, device, env_workers)
        except run.StoppedError as stopped:
            print(f"\n{name}: {stopped}", file=sys.stderr)
            raise SystemExit(130) from None
        folder = results_folder(results) / each.config.folder()
        print(f"{name}: {len(trained)} trained, {len(each.seeds) - len(trained)} already there: {folder}")


def chosen_jobs(
    one: Mapping[str, str | None],
    tier: str,
    runs: str | None,
    several: Sequence[str],
    everything: Sequence[Experiment],
) -> list[Job]:
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
