"""What a tier would run, what is there already, and what the rest would cost."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dynarep import fingerprint, records
from dynarep.experiment import Experiment, Job, checkout, distinct, read_yaml


@dataclass(frozen=True)
class Cost:
    """Sums over an experiment's runs at a tier; `present` are those that this very code made, `cpu_hours` the rest."""

    paper: str
    experiment: str
    tier: str
    jobs: int
    runs: int
    present: int
    agent_steps: int
    updates: int
    cpu_hours: float
    cpu_hours_all: float
    disk_mib: float

    def data(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


@cache
def rates() -> dict[str, Any]:
    """Return the measured rates stored with the code."""
    return read_yaml(Path(__file__).with_name("rates.yaml"))


def job_seconds(job: Job) -> float:
    """Return the CPU seconds that a job is expected to take."""
    table = rates()
    obs, action, frame_ms = table["tasks"].get(job.task, table["tasks"]["default"])
    points = np.array(table["agents"].get(job.config.agent.name, table["agents"]["default"]))
    protocol, gflop = job.config.protocol, job.config.agent.update_flops(obs, action) / 1e9
    nearest = np.clip(gflop, *points[[0, -1], 0])
    update_ms = np.exp(np.interp(np.log(nearest), *np.log(points.T))) * gflop / nearest
    frames = protocol.agent_steps() * job.config.environment.action_repeat
    seconds = (frames * frame_ms + protocol.agent_updates() * update_ms) / 1e3
    return float(table["job_start_s"] + len(job.seeds) * seconds)


def ours(job: Job) -> tuple[str, str]:
    """Return the code fingerprint and lock hash that a run of this job would have now."""
    return fingerprint.of_parts(job.config.agent, job.config.protocol), fingerprint.of_lock(checkout())


def _made_by(folder: Path) -> tuple[str, str] | None:
    """Return a finished run's code and lock; None for one that is missing or cannot be believed."""
    with suppress(records.RecordError):
        return records.made_by(folder)
    return None


def cost(experiment: Experiment, jobs: Sequence[Job], tier: str, results: Path) -> Cost:
    """Add up what an experiment's jobs take."""
    present = runs = 0
    missing_s = all_s = 0.0
    for job in jobs:
        there = sum(_made_by(results / folder) == ours(job) for folder in job.folders())
        seconds = job_seconds(job)
        present, runs = present + there, runs + len(job.seeds)
        all_s += seconds
        missing_s += seconds * (1 - there / len(job.seeds))
    return Cost(
        paper=experiment.spec.paper,
        experiment=experiment.spec.id,
        tier=tier,
        jobs=len(jobs),
        runs=runs,
        present=present,
        agent_steps=sum(len(j.seeds) * j.config.protocol.agent_steps() for j in jobs),
        updates=sum(len(j.seeds) * j.config.protocol.agent_updates() for j in jobs),
        cpu_hours=round(missing_s / 3600, 3),
        cpu_hours_all=round(all_s / 3600, 3),
        disk_mib=round(runs * rates()["record_kib"] / 1024, 2),
    )


def costs(experiments: Sequence[Experiment], tier: str, results: Path) -> list[Cost]:
    """Return each experiment's cost; a run that two experiments share is counted with the first."""
    jobs = distinct([job for experiment in experiments for job in experiment.jobs(tier)])
    return [cost(e, [job for job in jobs if job.experiment == e.spec.id], tier, results) for e in experiments]
