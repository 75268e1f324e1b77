"""Experiment file + tier -> runs, each with a stable identity.

A run's identity is its content: the resolved configuration as canonical JSON, hashed. Captions, claims and the name
of the experiment are not part of it, so two figures that need the same run share it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dynarep import envs
from dynarep.configs import AgentConfig, Config, EnvironmentConfig, PartConfig, ProtocolConfig, registry
from dynarep.errors import UserError, explain, invalid, nearest, unknown
from dynarep.schema import TIERS, Claim, ExperimentFile, Group, TierFile, budget_model

FORMAT = 1  # of the identity; a change makes every run a new one


def checkout() -> Path:
    """Return the checkout that this package runs from: where the lock and git are."""
    return Path(__file__).resolve().parents[2]


def home() -> Path:
    """Return the folder that holds `experiments/`, `results/` and `figures/`: $DYNAREP_HOME, else the checkout."""
    return Path(os.environ.get("DYNAREP_HOME") or checkout())


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
        return identity(self.content())

    def folder(self) -> Path:
        """Return the run's folder below results/runs, without the seed."""
        label = f"{self.protocol.label()}-{self.agent.label().removeprefix(self.agent.name + '-')}"
        return Path(self.agent.name, self.environment.task, f"{label}-{self.identity()[:8]}")


def identity(content: Mapping[str, Any]) -> str:
    """Hash a resolved configuration: canonical JSON (sorted keys, no spaces, no NaN), SHA-256."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Job:
    """One process: a block of seeds of one variant on one task."""

    experiment: str
    group: str
    variant: str
    tier: str
    config: RunConfig
    seeds: tuple[int, ...]

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

    @property
    def key(self) -> str:
        """Return the name of its target, e.g. madtd_R1."""
        return f"{self.spec.paper}_{self.spec.id}"

    def tiers(self) -> list[str]:
        """Return the tiers that it has runs for."""
        return [tier for tier in TIERS if any(tier in group.budget for group in self.spec.runs.values())]

    def jobs(self, tier: str) -> list[Job]:
        """Return the jobs of a tier, in the order of groups, tasks and variants."""
        return [job for group in self.spec.runs for job in self._group_jobs(group, tier)]

    def judging_group(self, claim: Claim, tier: str) -> str | None:
        """Return the group of runs that judges a claim at a tier; None if the tier has no runs."""
        groups = [name for name, group in self.spec.runs.items() if tier in group.budget]
        return claim.runs if claim.runs in groups else (groups[0] if len(groups) == 1 else None)

    def _group_jobs(self, name: str, tier: str) -> Iterator[Job]:
        group = self.spec.runs[name]
        for index in range(len(group.blocks(tier))):
            budget = self._budget(group, tier, index)
            for task in budget.get("tasks", ()):
                for variant in group.variants or tuple(self.spec.variants):
                    config = self._resolve(group, variant, budget, task)
                    for seeds in _blocks(budget):
                        yield Job(self.spec.id, name, variant, tier, config, seeds)

    def _budget(self, group: Group, tier: str, index: int) -> dict[str, Any]:
        """Overlay the tier's budget with the experiment's own."""
        given = {**_tier(self.file.parents[1], tier).budget, **group.blocks(tier)[index]}
        budget = {"first_seed": 0} | {key: value for key, value in given.items() if value is not None}
        return budget_model().model_validate(budget).model_dump(exclude_unset=True)

    def _parts(
        self, group: Group, variant: str, budget: Mapping[str, Any], task: str
    ) -> dict[str, tuple[type[Config], dict[str, Any]]]:
        """Return each part's class and values: the group's settings, then the budget, then the variant's settings."""
        arm = self.spec.variants[variant]
        suite, _ = envs.split_task(task)
        environment = group.settings.environment | arm.environment | {"suite": suite, "task": task}
        agent, protocol = registry(AgentConfig)[group.agent], registry(ProtocolConfig)[group.protocol]
        return {
            "environment": (EnvironmentConfig, environment),
            "agent": (agent, group.settings.agent | _only(budget, agent.budget) | arm.agent),
            "protocol": (protocol, group.settings.protocol | _only(budget, protocol.budget) | arm.protocol),
        }

    def _resolve(self, group: Group, variant: str, budget: Mapping[str, Any], task: str) -> RunConfig:
        """Make one run's configuration; what the file and the tier leave open is a default."""
        parts = self._parts(group, variant, budget, task).values()
        environment, agent, protocol = (part.model_validate(values) for part, values in parts)
        assert isinstance(environment, EnvironmentConfig)
        assert isinstance(agent, AgentConfig)
        assert isinstance(protocol, ProtocolConfig)
        return RunConfig(environment, agent, protocol)

    def faults(self) -> list[str]:
        """Return everything wrong with the file that its schema alone cannot see."""
        faults, spec = self._task_faults(), self.spec
        for name, group in spec.runs.items():
            before = len(faults)
            for kind, chosen in ((AgentConfig, group.agent), (ProtocolConfig, group.protocol)):
                if chosen not in registry(kind):
                    word = "agent" if kind is AgentConfig else "protocol"
                    faults.append(f"runs.{name}.{word}: unknown {word} '{chosen}'.{nearest(chosen, registry(kind))}")
            where = f"runs.{name}.variants"
            for variant in set(group.variants or ()) - set(spec.variants):
                faults += [f"{where}: unknown variant '{variant}'.{nearest(variant, spec.variants)}"]
            if len(faults) == before:
                faults += self._budget_faults(name, group)
        protocols = registry(ProtocolConfig)
        if any(group.protocol not in protocols for group in spec.runs.values()):
            return faults
        metrics = {metric for group in spec.runs.values() for metric in protocols[group.protocol].metrics}
        resolved = not faults
        for index, panel in enumerate(spec.figure.panels):
            where = f"figure.panels.{index}"
            faults += [f"{where}.{fault}" for fault in _name_faults(panel.variants or (), panel.needs(), spec, metrics)]
        for claim in spec.claims:
            for side in filter(None, (claim.contrast.of, claim.contrast.to)):
                faults += [f"claims.{claim.id}.{f}" for f in _name_faults([side.variant], [side.metric], spec, metrics)]
            if claim.runs and claim.runs not in spec.runs:
                faults.append(f"claims.{claim.id}.runs: unknown group '{claim.runs}'.{nearest(claim.runs, spec.runs)}")
            for tier, role in claim.tiers.items() if resolved else ():
                faults += self._judging_faults(claim, tier, role)
        return faults

    def _task_faults(self) -> list[str]:
        """Refuse a task among the settings: it would be overridden without a word."""
        settings = {f"runs.{name}.settings": group.settings for name, group in self.spec.runs.items()}
        settings |= {f"variants.{name}": variant for name, variant in self.spec.variants.items()}
        return [
            f"{place}.environment.{key}: comes from the budget. Write it under 'tasks' there."
            for place, part in settings.items()
            for key in part.environment
            if key in ("suite", "task")
        ]

    def _judging_faults(self, claim: Claim, tier: str, role: str) -> Iterator[str]:
        group = self.judging_group(claim, tier)
        if role == "untested":
            return
        if group is None:
            groups = [name for name, spec in self.spec.runs.items() if tier in spec.budget]
            why = f"no group has runs at this tier. There are some at: {', '.join(self.tiers())}."
            if groups:
                why = f"several groups have runs at this tier. Write 'runs:' with one of: {', '.join(groups)}."
            yield f"claims.{claim.id}.tiers.{tier}: {role}, but {why}"
        else:
            jobs = list(self._group_jobs(group, tier))
            variants, tasks = {job.variant for job in jobs}, {job.task for job in jobs}
            for side in filter(None, (claim.contrast.of, claim.contrast.to)):
                if side.variant in set(self.spec.variants) - variants:
                    where = f"claims.{claim.id}.variant: '{side.variant}'"
                    yield f"{where} is not among those of runs.{group}.{nearest(side.variant, variants)}"
            for task in set(claim.contrast.tasks or ()) - set(tasks):
                yield f"claims.{claim.id}.contrast.tasks: '{task}' has no runs at tier {tier}.{nearest(task, tasks)}"

    def _budget_faults(self, name: str, group: Group) -> list[str]:
        """Check each tier's budget and resolve every run once."""
        faults: list[str] = []
        agent, protocol = registry(AgentConfig)[group.agent], registry(ProtocolConfig)[group.protocol]
        usable = {"tasks", "seeds", "first_seed", "seeds_per_job"} | agent.budget | protocol.budget
        for tier, blocks in group.budget.items():
            for index, block in enumerate(blocks):
                where = f"runs.{name}.budget.{tier}.{index}."
                before = len(faults)
                owner = f"not a budget key of {group.agent} and {group.protocol}"
                faults += [f"{where}{key}: {owner}.{nearest(key, usable)}" for key in block if key not in usable]
                try:
                    budget_model().model_validate(_only(block, usable))
                except ValidationError as error:
                    faults += explain(error, budget_model(), where)
                if len(faults) == before:
                    faults += self._run_faults(name, group, tier, index, where)
        return faults

    def _run_faults(self, name: str, group: Group, tier: str, index: int, where: str) -> list[str]:
        budget = self._budget(group, tier, index)
        faults = [f"{where}{key}: is missing." for key in ("tasks", "seeds") if not budget.get(key)]
        for task in budget.get("tasks", ()):
            for variant in group.variants or tuple(self.spec.variants):
                try:
                    parts = self._parts(group, variant, budget, task)
                except envs.EnvError as error:
                    faults.append(f"{where}tasks: {error}")
                    continue
                for section, (part, values) in parts.items():
                    budgeted = part.budget if issubclass(part, PartConfig) else ()
                    places = {
                        f"variants.{variant}.{section}.": getattr(self.spec.variants[variant], section),
                        where: _only(group.blocks(tier)[index], budgeted),
                        f"tiers/{tier}.yaml: budget.": _only(_tier(self.file.parents[1], tier).budget, budgeted),
                        f"runs.{name}.settings.{section}.": getattr(group.settings, section),
                    }
                    try:
                        part.model_validate(values)
                    except ValidationError as error:
                        faults += explain(error, part, partial(_place, places, where))
        return faults


def _place(places: Mapping[str, Mapping[str, Any]], otherwise: str, key: str) -> str:
    """Return the first place that sets a key."""
    return next((place for place, values in places.items() if key in values), otherwise)


def _only(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key in keys}


def _name_faults(
    variants: Sequence[str], metrics: Sequence[str] | Mapping[str, str], spec: ExperimentFile, known: set[str]
) -> Iterator[str]:
    for variant in variants:
        if variant not in spec.variants:
            yield f"variant: unknown variant '{variant}'.{nearest(variant, spec.variants)}"
    for metric in metrics:
        if metric not in known:
            yield f"metrics: unknown metric '{metric}'.{nearest(metric, known)}"


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


# -- reading ------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            fault = None if isinstance(key, yaml.ScalarNode) else "a key must be a word"
            if fault is None and key.value in seen:
                fault = f"key '{key.value}' is given twice"
            if fault:
                raise yaml.constructor.ConstructorError(None, None, fault, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; UserError names file and line."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise UserError(f"{path}:{line} not readable as YAML: {getattr(error, 'problem', None) or error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a mapping of keys to values.")
    return data


def _tier(folder: Path, tier: str) -> TierFile:
    """Read experiments/tiers/<tier>.yaml."""
    path = folder / "tiers" / f"{tier}.yaml"
    key = (path, path.stat().st_mtime_ns if path.exists() else 0)
    if key not in _TIER_CACHE:
        data = read_yaml(path)
        try:
            file = TierFile.model_validate(data)
        except ValidationError as error:
            raise invalid(path, explain(error, TierFile)) from None
        try:
            budget_model().model_validate(file.budget)
        except ValidationError as error:
            raise invalid(path, explain(error, budget_model(), "budget.")) from None
        if file.tier != tier:
            raise invalid(path, [f"tier: is '{file.tier}', but the file is called {path.name}."])
        _TIER_CACHE[key] = file
    return _TIER_CACHE[key]


_TIER_CACHE: dict[tuple[Path, int], TierFile] = {}


def tier_file(tier: str) -> TierFile:
    """Return a tier's file; UserError for an unknown tier."""
    if tier not in TIERS:
        raise unknown("tier", tier, TIERS, "Pass --tier with one of them.")
    return _tier(_experiments(), tier)


def _experiments() -> Path:
    folder = home() / "experiments"
    if not folder.is_dir():
        raise UserError(f"{folder}: no experiment files. Run from a checkout, or set DYNAREP_HOME to one.")
    return folder


def load(path: Path) -> Experiment:
    """Read and validate one experiment file; UserError lists all faults with file and dotted path."""
    data = read_yaml(path)
    try:
        experiment = Experiment(path, ExperimentFile.model_validate(data))
    except ValidationError as error:
        raise invalid(path, explain(error, ExperimentFile)) from None
    if faults := experiment.faults():
        raise invalid(path, dict.fromkeys(faults))
    return experiment


def load_all() -> list[Experiment]:
    """Read every experiment file; UserError lists the faults of all of them at once."""
    folder = _experiments()
    files = sorted(p for p in folder.glob("*/*.yaml") if p.parent.name not in ("tiers", "profiles"))
    if not files:
        raise UserError(f"{folder}: no experiment files. Run from a checkout, or set DYNAREP_HOME to one.")
    found, faults = [], []
    for path in files:
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
    return found


def find(experiments: Sequence[Experiment], word: str) -> Experiment:
    """Return the experiment with an id ("R1") or a key ("madtd_R1"); UserError with the nearest name."""
    for experiment in experiments:
        if word in (experiment.spec.id, experiment.key):
            return experiment
    names = [e.spec.id for e in experiments] + [e.key for e in experiments]
    raise unknown("experiment", word, names, "`dynarep list` shows them.")


def distinct(jobs: Sequence[Job]) -> list[Job]:
    """Drop runs that an earlier job already asks for; what is left of a job's seeds stays together."""
    seen: set[Path] = set()
    kept = []
    for job in jobs:
        seeds = tuple(seed for seed, folder in zip(job.seeds, job.folders(), strict=True) if folder not in seen)
        seen |= set(job.folders())
        if seeds:
            kept.append(replace(job, seeds=seeds))
    return kept
