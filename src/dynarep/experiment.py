"""Experiment file + tier -> runs, each with a stable identity.

A run's identity is its content: the resolved configuration as canonical JSON, hashed. Captions, claims and the name
of the experiment are not part of it, so two figures that need the same run share it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dynarep import envs
from dynarep.configs import AgentConfig, Config, EnvironmentConfig, ProtocolConfig, registry
from dynarep.errors import UserError, explain, invalid, nearest, unknown
from dynarep.schema import TIERS, Claim, ExperimentFile, Group, TierFile, budget_model

FORMAT = 1  # of the identity; a change makes every run a new one


def home() -> Path:
    """Return the folder that holds `experiments/`, `results/` and `figures/`: $DYNAREP_HOME, else the checkout."""
    return Path(os.environ.get("DYNAREP_HOME") or Path(__file__).resolve().parents[2])


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
        own = group.blocks(tier)[index]
        return {"first_seed": 0, **_tier(self.file.parents[1], tier).budget, **own}

    def _resolve(self, group: Group, variant: str, budget: Mapping[str, Any], task: str) -> RunConfig:
        """Apply, in order: defaults, the group's settings, the budget, the variant's settings."""
        arm = self.spec.variants[variant]
        suite, _ = envs.split_task(task)
        environment = EnvironmentConfig.model_validate(
            group.settings.environment | arm.environment | {"suite": suite, "task": task}
        )
        parts = []
        for kind, chosen, base, own in (
            (AgentConfig, group.agent, group.settings.agent, arm.agent),
            (ProtocolConfig, group.protocol, group.settings.protocol, arm.protocol),
        ):
            part = registry(kind)[chosen]
            parts.append(part.model_validate(base | {k: v for k, v in budget.items() if k in part.budget} | own))
        return RunConfig(environment, parts[0], parts[1])

    def faults(self) -> list[str]:
        """Return everything wrong with the file that its schema alone cannot see."""
        faults, spec = [], self.spec
        metrics: set[str] = set()
        for name, group in spec.runs.items():
            for kind, chosen in ((AgentConfig, group.agent), (ProtocolConfig, group.protocol)):
                if chosen not in registry(kind):
                    word = "agent" if kind is AgentConfig else "protocol"
                    faults.append(f"runs.{name}.{word}: unknown {word} '{chosen}'.{nearest(chosen, registry(kind))}")
            where = f"runs.{name}.variants"
            for variant in set(group.variants or ()) - set(spec.variants):
                faults += [f"{where}: unknown variant '{variant}'.{nearest(variant, spec.variants)}"]
            if not faults:
                faults += self._budget_faults(name, group)
                metrics |= registry(ProtocolConfig)[group.protocol].metrics
        if faults:
            return faults
        for index, panel in enumerate(spec.figure.panels):
            where = f"figure.panels.{index}"
            faults += [f"{where}.{fault}" for fault in _name_faults(panel.variants or (), panel.needs(), spec, metrics)]
        for claim in spec.claims:
            for side in filter(None, (claim.contrast.of, claim.contrast.to)):
                faults += [f"claims.{claim.id}.{f}" for f in _name_faults([side.variant], [side.metric], spec, metrics)]
            if claim.runs and claim.runs not in spec.runs:
                faults.append(f"claims.{claim.id}.runs: unknown group '{claim.runs}'.{nearest(claim.runs, spec.runs)}")
            for tier, role in claim.tiers.items():
                faults += self._judging_faults(claim, tier, role)
        return faults

    def _judging_faults(self, claim: Claim, tier: str, role: str) -> Iterator[str]:
        group = self.judging_group(claim, tier)
        if role == "untested":
            return
        if group is None:
            yield f"claims.{claim.id}.tiers.{tier}: {role}, but no group, or no single group, has runs at this tier."
        else:
            tasks = sorted({job.task for job in self._group_jobs(group, tier)})
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
                if len(faults) == before:
                    try:
                        budget_model().model_validate(block)
                    except ValidationError as error:
                        faults += explain(error, budget_model(), where)
                if len(faults) == before:
                    faults += self._run_faults(name, group, tier, index, where)
        return list(dict.fromkeys(faults))

    def _run_faults(self, name: str, group: Group, tier: str, index: int, where: str) -> list[str]:
        budget = self._budget(group, tier, index)
        faults = [f"{where}{key}: is missing." for key in ("tasks", "seeds") if not budget.get(key)]
        for task in budget.get("tasks", ()):
            for variant in group.variants or tuple(self.spec.variants):
                try:
                    self._resolve(group, variant, budget, task)
                except envs.EnvError as error:
                    faults.append(f"{where}tasks: {error}")
                except ValidationError as error:
                    part = _part_of(error)
                    place = f"runs.{name}.settings, variants.{variant} or budget.{tier}.{index}: {part.__name__}."
                    faults += explain(error, part, place)
        return faults


def _part_of(error: ValidationError) -> type[Config]:
    """Return the configuration class that refused."""
    parts: list[type[Config]] = [*registry(AgentConfig).values(), *registry(ProtocolConfig).values(), EnvironmentConfig]
    return next(part for part in parts if part.__name__ == error.title)


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
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' is given twice", key.start_mark)
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
    return _tier(home() / "experiments", tier)


def load(path: Path) -> Experiment:
    """Read and validate one experiment file; UserError lists all faults with file and dotted path."""
    data = read_yaml(path)
    try:
        experiment = Experiment(path, ExperimentFile.model_validate(data))
    except ValidationError as error:
        raise invalid(path, explain(error, ExperimentFile)) from None
    if faults := experiment.faults():
        raise invalid(path, faults)
    return experiment


def load_all() -> list[Experiment]:
    """Read every experiment file; UserError lists the faults of all of them at once."""
    folder = home() / "experiments"
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
        raise UserError("\n".join(faults))
    for what in ("key", "claim"):
        owners: dict[str, Path] = {}
        for experiment in found:
            names = [experiment.key] if what == "key" else [c.id for c in experiment.spec.claims]
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
    """Drop jobs that another experiment already asks for."""
    return list({job.key(): job for job in reversed(jobs)}.values())[::-1]
