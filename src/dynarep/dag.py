"""What the Snakefile needs to know: jobs, the files they leave behind, and the code behind each step."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dynarep import fingerprint, plan, published
from dynarep.configs import AgentConfig, ProtocolConfig, registry
from dynarep.errors import UserError, unknown
from dynarep.experiment import Experiment, Job, distinct, load_all, span
from dynarep.files import checkout, home, tier_file, tier_in
from dynarep.records import MANIFEST, METRICS
from dynarep.schema import TIERS

RESULTS = Path("results")
SOURCES = ("runs", "reference")  # below results: what this machine makes, and what is committed
FORMATS = ("csv", "svg", "pdf", "png")
MANY_RULES = 300  # ours: the paper tier has more than a thousand jobs, others fewer than 200 rules


def load(tier: str, source: str = "runs") -> tuple[list[Experiment], list[Job]]:
    """Return the experiments that have runs at a tier, and their jobs, each once.

    Of the reference, whose runs nobody makes, the experiments that have some there and those that need none.

    Raises:
        UserError: bad files, an unknown source, a reference without a run of this tier.
    """
    tier_file(tier)
    if source not in SOURCES:
        raise unknown("source of runs", source, SOURCES, "Write e.g. --config from=reference.")
    everything = load_all()
    experiments = [experiment for experiment in everything if tier in experiment.tiers()]
    if source == "reference":
        there = {name: _those_there(everything, name) for name in TIERS}
        experiments = there[tier]
        if not any(experiment.jobs(tier) for experiment in experiments):
            tiers = [name for name, found in there.items() if any(experiment.jobs(name) for experiment in found)]
            raise UserError(
                f"{home() / RESULTS / source}: holds no runs of tier '{tier}', but of: {', '.join(tiers) or 'none'}. "
                "Name such a tier, or leave out from=reference to make the runs."
            )
    return experiments, distinct([job for experiment in experiments for job in experiment.jobs(tier)])


def _those_there(experiments: Iterable[Experiment], tier: str) -> list[Experiment]:
    """Return the experiments of a tier that have committed runs, or need none."""
    return [
        experiment
        for experiment in experiments
        if tier in experiment.tiers() and (not experiment.jobs(tier) or run_files(experiment.jobs(tier), "reference"))
    ]


class Bundle(NamedTuple):
    """Jobs that one process trains, one after the other, under one rule."""

    name: str
    jobs: Sequence[Job]


def bundles(jobs: Sequence[Job]) -> list[Bundle]:
    """Return the training rules: a process per job, or per so many as the tier says (of whatever experiments).

    Or as a group says, of its own on one task: a new arm comes last there, makes a rule of its own or joins the last
    one, and the others stay as they are.
    """
    found = []
    for company in dict.fromkeys(job.company for job in jobs):
        own = [job for job in jobs if job.company == company]
        size = own[0].together
        parts = [own[i : i + size] for i in range(0, len(own), size)]
        names = [f"train_{company}_{i}_of_{len(parts)}" for i in range(1, len(parts) + 1)]
        found += [
            Bundle(rule_name(part[0]) if size == 1 else name, part) for name, part in zip(names, parts, strict=True)
        ]
    return found


class Family(NamedTuple):
    """Jobs of one agent, protocol, task and block of seeds, a process each, under one rule with a wildcard."""

    name: str
    seeds: tuple[int, ...]
    jobs: dict[str, Job]  # by what the wildcard stands for: the run's folder

    def outputs(self) -> list[str]:
        """Return the pattern of the files that one job leaves behind, relative to home."""
        (folder, *_) = {job.config.folder().parent for job in self.jobs.values()}
        places = [RESULTS / "runs" / folder / "{run}" / f"seed={seed}" for seed in self.seeds]
        return [str(place / name) for place in places for name in (METRICS, MANIFEST)]

    def constraint(self) -> str:
        """Return what the wildcard may stand for: these runs and no others."""
        return "|".join(map(re.escape, self.jobs))


def families(found: Sequence[Bundle]) -> tuple[list[Bundle], list[Family]]:
    """Put bundles of one job under common rules where there are many; return the others, and the common rules.

    A rule of its own has a readable name and starts when its own length says. But Snakemake's time grows with the
    square of the number of rules.
    """
    if len(found) <= MANY_RULES:
        return list(found), []
    rules = dict[str, Family]()
    for job in (bundle.jobs[0] for bundle in found if len(bundle.jobs) == 1):
        name = f"train_{job.config.agent.name}_{job.config.protocol.name}_{job.task}_{span(job.seeds)}"
        rules.setdefault(name, Family(name, job.seeds, {})).jobs[job.config.folder().name] = job
    return [bundle for bundle in found if len(bundle.jobs) > 1], list(rules.values())


def drawings(experiments: Sequence[Experiment], tier: str) -> list[list[Experiment]]:
    """Return the drawing rules: a process per figure, or per so many as the tier says."""
    size = tier_in(experiments[0].folder, tier).figures_per_process if experiments else 1
    return [list(experiments[i : i + size]) for i in range(0, len(experiments), size)]


def rule_name(job: Job) -> str:
    """Return a readable, unique name of the rule that trains one job."""
    return f"train_{job.variant}_{job.task}_{span(job.seeds)}_{job.config.identity()[:8]}"


def priority(jobs: Iterable[Job]) -> int:
    """Return the seconds that jobs are expected to take: the longest start first, so that none is left over alone."""
    return int(sum(map(plan.job_seconds, jobs)))


def arguments(jobs: Sequence[Job]) -> str:
    """Return the arguments of `dynarep train` for a job, or for several of one tier."""
    if len(jobs) == 1:
        (job,) = jobs
        what = f"--experiment {job.experiment} --runs {job.group} --variant {job.variant} --task {job.task}"
        return f"{what} --seeds {span(job.seeds)} --tier {job.tier}"
    places = [f"{job.experiment}/{job.group}/{job.variant}/{job.task}/{span(job.seeds)}" for job in jobs]
    return f"--tier {jobs[0].tier} " + " ".join(f"--job {place}" for place in places)


def run_files(jobs: Iterable[Job], source: str = "runs", names: Sequence[str] = (METRICS, MANIFEST)) -> list[str]:
    """Return the files that jobs leave behind, relative to home; of the reference those that are there."""
    folders = [RESULTS / source / folder for job in jobs for folder in job.folders()]
    files = [folder / name for folder in folders for name in names]
    return [str(file) for file in files if source == "runs" or (home() / file).exists()]


def figure_files(experiment: Experiment, tier: str) -> list[str]:
    """Return a figure's files, relative to home."""
    return [f"figures/{tier}/{experiment.spec.paper}/{experiment.spec.id}.{kind}" for kind in FORMATS]


def sources(experiment: Experiment) -> list[str]:
    """Return the files that say what an experiment shows, relative to home."""
    files = [experiment.file, experiment.folder / published.FILE][: 1 + experiment.spec.published]
    return [str(file.relative_to(home())) for file in files]


def made_by(jobs: Iterable[Job]) -> dict[str, str]:
    """Return the parameters whose change makes runs stale: Snakemake does not see edits of imported modules."""
    lock = fingerprint.of_lock(checkout())
    parts = {(job.config.agent.implementation, job.config.protocol.implementation): job.config for job in jobs}
    return {"code": " ".join(fingerprint.of_parts(c.agent, c.protocol) for c in parts.values()), "lock": lock}


def shown_code(step: str, agents: bool = False) -> list[str]:
    """Return the modules behind figures, claims or report; of what shows them, those that hold the defaults too.

    The algorithms are behind one table alone, that of an architecture: with `agents`.
    """
    defaults = [part.__module__ for kind in (AgentConfig, ProtocolConfig) for part in registry(kind).values()]
    entries = [f"dynarep.{step}", *(defaults if step != "claims" else ())]
    return fingerprint.modules(*entries, without="" if agents else "dynarep.agents")


def code(step: str, experiments: Iterable[Experiment] = ()) -> str:
    """Return the fingerprint of the code behind some figures, the claims or the report, templates included."""
    tables = [e.spec.table for e in experiments if e.spec.table is not None]
    agents = any(table.kind == "architecture" for table in tables)
    digest = hashlib.sha256(fingerprint.of_modules(shown_code(step, agents)).encode())
    for template in sorted((Path(__file__).parent / step).glob("*.[!p]*")):
        if template.is_file():
            digest.update(template.read_bytes())
    return digest.hexdigest()
