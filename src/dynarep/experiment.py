"""Experiment file + tier -> runs, each with a stable identity.

A run's identity is its content: the resolved configuration as canonical JSON, hashed. Captions, claims and the name
of the experiment are not part of it, so two figures that need the same run share it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dynarep import checks, envs, files
from dynarep.configs import AgentConfig, Config, EnvironmentConfig, ProtocolConfig, registry
from dynarep.errors import UserError, explain, invalid, nearest, unknown
from dynarep.hashing import identity
from dynarep.schema import ExperimentFile, Group, Panel, ResultTable, TierFile, budget_model
from dynarep.statements import TIERS, Judged, Rank, RankClaim

FORMAT = 1  # of the identity; a change makes every run a new one


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers, except its seed."""

    environment: EnvironmentConfig
    agent: AgentConfig
    protocol: ProtocolConfig

    def content(self) -> dict[str, Any]:
        """Return the resolved configuration as plain data."""
        return {
            "format": FORMAT,
            "environment": self.environment.model_dump(mode="json"),
            "agent": {"name": self.agent.name, **self.agent.model_dump(mode="json")},
            "protocol": {"name": self.protocol.name, **self.protocol.model_dump(mode="json")},
        }

    def identity(self) -> str:
        """Return the SHA-256 of the canonical JSON of `content`."""
        return self._identity

    def folder(self) -> Path:
        """Return the run's folder below results/runs, without the seed."""
        return self._folder

    @cached_property  # nothing in it can change, and the paper tier asks some 30,000 times
    def _identity(self) -> str:
        return identity(self.content())

    @cached_property
    def _folder(self) -> Path:
        label = f"{self.protocol.label()}-{self.agent.label().removeprefix(self.agent.name + '-')}"
        return Path(self.agent.name, self.environment.task, f"{label}-{self.identity()[:8]}")


@dataclass(frozen=True)
class Job:
    """One process: a block of seeds of one variant on one task."""

    experiment: str
    group: str
    variant: str
    tier: str
    config: RunConfig
    seeds: tuple[int, ...]
    together: int = 1  # how many such jobs one process of the DAG trains
    company: str = ""  # those that may share it: a name
    compiled: bool = False  # updates; like the device no part of a run's identity, but of its manifest

    @property
    def task(self) -> str:
        """Return the task's name."""
        return self.config.environment.task

    def folders(self) -> list[Path]:
        """Return each seed's folder below results/runs."""
        return [self.config.folder() / f"seed={seed}" for seed in self.seeds]

    def key(self) -> str:
        """Return the name that is the same for the same work."""
        return f"{self.config.folder()}/seeds={span(self.seeds)}"


@dataclass(frozen=True)
class Experiment:
    """A validated experiment file."""

    file: Path
    spec: ExperimentFile
    _jobs: dict[str, tuple[TierFile, list[Job]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def key(self) -> str:
        """Return the name of its target, e.g. madtd_R1."""
        return f"{self.spec.paper}_{self.spec.id}"

    @property
    def folder(self) -> Path:
        """Return the folder of all experiment files, tiers and published numbers."""
        return self.file.parents[1]

    def tiers(self) -> list[str]:
        """Return the tiers that it has runs for; all of them if it needs none."""
        groups = self.spec.runs.values()
        return [tier for tier in TIERS if self.spec.from_defaults or any(tier in group.budget for group in groups)]

    def jobs(self, tier: str) -> list[Job]:
        """Return the jobs of a tier, in the order of groups, tasks and variants; made once, while its file stays."""
        file = files.tier_in(self.folder, tier)
        if tier not in self._jobs or self._jobs[tier][0] is not file:
            self._jobs[tier] = file, [job for group in self.spec.runs for job in self._group_jobs(group, tier)]
        return list(self._jobs[tier][1])

    def agents(self, group: Group) -> list[str]:
        """Return the names of the agents that a group runs: its own first."""
        arms = [self.spec.variants[name].algorithm or group.agent for name in group.variants or self.spec.variants]
        return list(dict.fromkeys([group.agent, *arms]))

    def shown(self, part: Panel | ResultTable) -> tuple[str, ...]:
        """Return the variants that a panel or table shows.

        Of a dose panel without a choice those that have a dose, of a scatter those of the pairs.
        """
        variants = self.spec.variants
        if isinstance(part, Panel) and part.kind == "scatter":
            return tuple(dict.fromkeys(name for pair in self.spec.pairs for name in pair.variants))
        if isinstance(part, Panel) and part.kind == "dose" and not part.variants:
            return tuple(name for name, variant in variants.items() if variant.dose is not None)
        return part.variants or tuple(variants)

    def judging_groups(self, claim: Judged, tier: str) -> tuple[str, ...]:
        """Return the groups of runs that judge a claim at a tier: mostly one, or of ranks those of its pairs.

        Several, if that leaves no question which runs are meant: each side of the claim runs in one of them alone.
        Empty if there is none, or no telling which.
        """
        if isinstance(claim, RankClaim):
            return tuple(dict.fromkeys(job.group for job in self.judging_jobs(claim, tier)))
        groups = {name: group for name, group in self.spec.runs.items() if tier in group.budget}
        fitting = [name for name in groups if name in claim.runs] or list(groups)
        if len(fitting) == 1:
            return tuple(fitting)
        homes = [
            [name for name in fitting if side.variant in (groups[name].variants or self.spec.variants)]
            for side in claim.sides
        ]
        wanted = {name for names in homes for name in names}
        return tuple(name for name in fitting if name in wanted) if all(len(names) == 1 for names in homes) else ()

    def judging_jobs(self, claim: Judged, tier: str) -> list[Job]:
        """Return the jobs that a claim is judged on: all sides, on the claim's tasks that every one of them runs."""
        if isinstance(claim, RankClaim):
            wanted = {id(job): job for jobs in self.pair_jobs(tier).values() for job in jobs}
            return list(wanted.values())
        groups = self.judging_groups(claim, tier)
        sides = {side.variant for side in claim.sides}
        jobs = [job for job in self.jobs(tier) if job.group in groups]
        assert not isinstance(claim.contrast, Rank)
        return _in_common(jobs, sides, claim.contrast.tasks)

    def pair_jobs(self, tier: str) -> dict[str, list[Job]]:
        """Return each pair's jobs, on those of its tasks that all its variants run; label -> jobs."""
        jobs = self.jobs(tier)
        return {pair.label: _in_common(jobs, pair.variants, pair.tasks) for pair in self.spec.pairs}

    def _group_jobs(self, name: str, tier: str) -> Iterator[Job]:
        group = self.spec.runs[name]
        tier_file = files.tier_in(self.folder, tier)
        everybody, compiled = tier_file.jobs_per_process, tier_file.compiled
        together = everybody if everybody > 1 else group.jobs_per_process or 1
        for index in range(len(group.blocks(tier))):
            budget = self.budget(group, tier, index)
            for task in budget.get("tasks", ()):
                for variant in group.variants or tuple(self.spec.variants):
                    if task in (self.spec.variants[variant].tasks or (task,)):
                        config = self._resolve(group, variant, budget, task)
                        company = tier if everybody > 1 else f"{tier}_{self.spec.id}_{name}_{task}"
                        for seeds in _blocks(budget):
                            yield Job(self.spec.id, name, variant, tier, config, seeds, together, company, compiled)

    def budget(self, group: Group, tier: str, index: int) -> dict[str, Any]:
        """Overlay the tier's budget with one of the group's blocks."""
        given = {**files.tier_in(self.folder, tier).budget, **group.blocks(tier)[index]}
        budget = {"first_seed": 0} | {key: value for key, value in given.items() if value is not None}
        return budget_model().model_validate(budget).model_dump(exclude_unset=True)

    def parts(
        self, group: Group, variant: str, budget: Mapping[str, Any], task: str
    ) -> dict[str, tuple[type[Config], dict[str, Any]]]:
        """Return each part's class and values: the group's settings, then the budget, then the variant's settings."""
        arm = self.spec.variants[variant]
        suite, _ = envs.split_task(task)
        environment = _merged(group.settings.environment, arm.environment) | {"suite": suite, "task": task}
        agent, protocol = registry(AgentConfig)[arm.algorithm or group.agent], registry(ProtocolConfig)[group.protocol]
        shared = checks.only(group.settings.agent, agent.model_fields) if arm.algorithm else group.settings.agent
        return {
            "environment": (EnvironmentConfig, environment),
            "agent": (agent, shared | checks.only(budget, agent.budget) | arm.agent),
            "protocol": (protocol, group.settings.protocol | checks.only(budget, protocol.budget) | arm.protocol),
        }

    def _resolve(self, group: Group, variant: str, budget: Mapping[str, Any], task: str) -> RunConfig:
        """Make one run's configuration; what the file and the tier leave open is a default."""
        parts = self.parts(group, variant, budget, task).values()
        environment, agent, protocol = (part.model_validate(values) for part, values in parts)
        assert isinstance(environment, EnvironmentConfig)
        assert isinstance(agent, AgentConfig)
        assert isinstance(protocol, ProtocolConfig)
        return RunConfig(environment, agent, protocol)


def _merged(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Overlay settings with an arm's own; of nested ones (dials) those that the arm leaves open stay."""
    nested = {
        key: settings[key] | value
        for key, value in own.items()
        if isinstance(value, dict) and isinstance(settings.get(key), dict)
    }
    return {**settings, **own, **nested}


def _in_common(jobs: Sequence[Job], variants: Iterable[str], tasks: Sequence[str] | None) -> list[Job]:
    """Return the jobs of some variants on the tasks that all of them run, or on the given ones of these."""
    ran = {variant: {job.task for job in jobs if job.variant == variant} for variant in variants}
    common = set.intersection(*ran.values())
    return [job for job in jobs if job.variant in ran and job.task in common & set(tasks or common)]


def _blocks(budget: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Cut the seeds into the blocks that one job trains."""
    first, count = budget["first_seed"], budget["seeds"]
    size = budget.get("seeds_per_job") or count
    seeds = range(first, first + count)
    return [tuple(seeds[i : i + size]) for i in range(0, count, size)]


def span(seeds: Sequence[int]) -> str:
    """Write seeds for people: (0, 1, 2, 5) -> "0-2,5"."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def plain(value: Any) -> str:
    """Write a setting's value for people: True -> "on", None -> "none", 3e-4 -> "0.0003", (1, 2) -> "1, 2"."""
    if isinstance(value, tuple | list):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, Config):
        value = {key: setting for key, setting in value if setting != type(value).model_fields[key].default}
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(setting)}" for key, setting in value.items()) or "as by default"
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


# -- reading ------------------------------------------------------------------------------------------------------


def load(path: Path) -> Experiment:
    """Read and validate one experiment file; UserError lists all faults with file and dotted path."""
    data = files.read_yaml(path)
    try:
        experiment = Experiment(path, ExperimentFile.model_validate(data))
    except ValidationError as error:
        raise invalid(path, explain(error, ExperimentFile)) from None
    if faults := checks.faults(experiment):
        raise invalid(path, dict.fromkeys(faults))
    return experiment


def load_all() -> list[Experiment]:
    """Read every experiment file; UserError lists the faults of all of them at once."""
    folder = files.experiments()
    paths = sorted((p for p in folder.glob("*/*.yaml") if p.parent.name not in ("tiers", "profiles")), key=_place)
    if not paths:
        raise UserError(f"{folder}: no experiment files. Run from a checkout, or set DYNAREP_HOME to one.")
    found, faults = [], []
    for path in paths:
        try:
            found.append(load(path))
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    for what in ("id", "claim"):
        owners: dict[str, Path] = {}
        for experiment in found:
            names = [experiment.spec.id] if what == "id" else [c.id for c in experiment.spec.claims]
            for name in names:
                if name in owners:
                    raise UserError(f"{experiment.file}: {what} '{name}' is already in {owners[name]}.")
                owners[name] = experiment.file
    known = {experiment.spec.id for experiment in found}
    for experiment in found:
        for name in experiment.spec.explains.beside if experiment.spec.explains else ():
            if name not in known or name == experiment.spec.id:
                what = f"explains.beside: unknown experiment '{name}'.{nearest(name, known - {experiment.spec.id})}"
                raise invalid(experiment.file, [what])
    return found


def _place(file: Path) -> tuple[int, str, int, str]:
    """Return a file's place in lists and in the report: the papers first, R2 before R10."""
    paper, name = file.parent.name, re.match(r"(\D*)(\d*)", file.stem.split("_")[0])
    assert name
    papers = ["madtd", "ftfl"]
    rank = papers.index(paper) if paper in papers else len(papers)
    return rank, name[1], int(name[2] or 0), str(file)


def find(experiments: Sequence[Experiment], word: str) -> Experiment:
    """Return the experiment with an id ("R1") or a key ("madtd_R1"); UserError with the nearest name."""
    for experiment in experiments:
        if word in (experiment.spec.id, experiment.key):
            return experiment
    names = [e.spec.id for e in experiments] + [e.key for e in experiments]
    raise unknown("experiment", word, names, "`dynarep list` shows them.")


def distinct(jobs: Sequence[Job]) -> list[Job]:
    """Drop runs that an earlier job already asks for; what is left of a job's seeds stays together."""
    seen: dict[Path, set[int]] = {}
    kept = []
    for job in jobs:
        taken = seen.setdefault(job.config.folder(), set())
        seeds = tuple(seed for seed in job.seeds if seed not in taken)
        taken.update(seeds)
        if seeds:
            kept.append(replace(job, seeds=seeds))
    return kept
