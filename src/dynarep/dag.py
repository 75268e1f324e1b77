"""What the Snakefile needs to know: jobs, the files they leave behind, and the code behind each step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from dynarep import fingerprint, plan
from dynarep.experiment import Experiment, Job, checkout, distinct, home, load_all, span, tier_file

RUNS = Path("results", "runs")
FORMATS = ("csv", "svg", "pdf", "png")


def load(tier: str) -> tuple[list[Experiment], list[Job]]:
    """Return the experiments that have runs at a tier, and their jobs, each once. UserError for bad files."""
    tier_file(tier)
    experiments = [experiment for experiment in load_all() if tier in experiment.tiers()]
    return experiments, distinct([job for experiment in experiments for job in experiment.jobs(tier)])


def rule_name(job: Job) -> str:
    """Return a readable, unique name of a training rule."""
    return f"train_{job.variant}_{job.task}_{span(job.seeds)}_{job.config.identity()[:8]}"


def priority(job: Job) -> int:
    """Return the seconds that a job is expected to take: the longest start first, so that none is left over alone."""
    return int(plan.job_seconds(job))


def arguments(job: Job) -> str:
    """Return the arguments of `dynarep train` for a job."""
    what = f"--experiment {job.experiment} --runs {job.group} --variant {job.variant} --task {job.task}"
    return f"{what} --seeds {span(job.seeds)} --tier {job.tier}"


def run_files(jobs: Iterable[Job]) -> list[str]:
    """Return the files that jobs leave behind, relative to home."""
    folders = [RUNS / folder for job in jobs for folder in job.folders()]
    return [str(folder / name) for folder in folders for name in ("metrics.csv", "manifest.json")]


def figure_files(experiment: Experiment, tier: str) -> list[str]:
    """Return a figure's files, relative to home."""
    return [f"figures/{tier}/{experiment.spec.paper}/{experiment.spec.id}.{kind}" for kind in FORMATS]


def source(experiment: Experiment) -> str:
    """Return the experiment's file, relative to home."""
    return str(experiment.file.relative_to(home()))


def made_by(job: Job) -> dict[str, str]:
    """Return the parameters whose change makes a run stale: Snakemake does not see edits of imported modules."""
    lock = fingerprint.of_lock(checkout())
    return {"code": fingerprint.of_parts(job.config.agent, job.config.protocol), "lock": lock}


def code(step: str) -> str:
    """Return the fingerprint of the code behind figures, claims or report, templates included."""
    digest = hashlib.sha256(fingerprint.of_modules(fingerprint.modules(f"dynarep.{step}")).encode())
    for template in sorted((Path(__file__).parent / step).glob("*.[!p]*")):
        if template.is_file():
            digest.update(template.read_bytes())
    return digest.hexdigest()
