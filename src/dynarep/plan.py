"""What a tier would run, what is there already, and what the rest would cost."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dynarep import envs, fingerprint, records
from dynarep.configs import Work
from dynarep.experiment import Experiment, Job, distinct
from dynarep.files import checkout, read_yaml


@dataclass(frozen=True)
class Cost:
    """Sums over an experiment's runs at a tier; `present` are those that this very code made, `cpu_hours` the rest.

    `gpu_hours_all` are all of them on a GPU; `peak_mib` is the largest job's memory, checkpoints included.
    """

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
    gpu_hours_all: float
    disk_mib: float
    peak_mib: float

    def data(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


@cache
def rates() -> dict[str, Any]:
    """Return the measured rates stored with the code."""
    return read_yaml(Path(__file__).with_name("rates.yaml"))


def _task(job: Job) -> tuple[int, int, float]:
    """Return the size of observation and action, and the milliseconds of a frame."""
    obs, action, frame_ms = rates()["tasks"].get(job.task, rates()["tasks"]["default"])
    if job.config.environment.suite == "dial":
        obs, action = envs.sizes(job.task, job.config.environment.dials)
    return int(obs), int(action), float(frame_ms)


def work(job: Job) -> list[Work]:
    """Return what one run of a job computes."""
    obs, action, _ = _task(job)
    pieces = job.config.protocol.work(job.config.agent, obs, action)
    count, episodes = job.config.protocol.evaluations()
    at_once = episodes if job.config.environment.suite == "dial" else 1  # `protocols.evaluation` plays all together
    acting = count * episodes // at_once * envs.episode_steps(job.config.environment) if count else 0
    if not acting:
        return pieces
    also = sum(piece.units for piece in pieces if piece.rate == "act")
    searched = _evaluation_steps(job)  # by agents that plan, there as in training
    others = [piece._replace(units=piece.units + searched * (piece.rate == "plan")) for piece in pieces]
    return [Work("act", 0.0, acting + also), *(piece for piece in others if piece.rate != "act")]


def _evaluation_steps(job: Job) -> int:
    """Return the agent steps of all evaluation episodes of one run, by the tasks' time limits."""
    count, episodes = job.config.protocol.evaluations()
    return count * episodes * envs.episode_steps(job.config.environment)


def _rate(piece: Work) -> dict[str, Any]:
    rate: dict[str, Any] = rates()["work"].get(piece.rate, rates()["work"]["default"])
    return rate


def _unit_ms(piece: Work, seeds: int) -> float:
    """Return the milliseconds of one unit of work of a block of seeds: a share of the block, and one of each seed."""
    table = _rate(piece)
    if not piece.gflop:
        return float(table["block_ms"])
    points = np.array(table["seed_ms"])
    nearest = np.clip(piece.gflop, *points[[0, -1], 0])
    seed_ms = np.exp(np.interp(np.log(nearest), *np.log(points.T))) * piece.gflop / nearest
    return float(table["block_ms"] + seeds * seed_ms)


def job_seconds(job: Job, data_there: bool = False) -> float:
    """Return the CPU seconds that a job is expected to take; less if another job has collected its data already."""
    pieces = work(job)
    computed = sum(piece.units * _unit_ms(piece, len(job.seeds)) for piece in pieces if piece.rate != "simulator")
    return _seconds(job, _simulator_ms(job, pieces, data_there) + computed)


def gpu_job_seconds(job: Job, data_there: bool = False) -> float:
    """Return the seconds that a job is expected to occupy a GPU. No GPU was measured.

    A unit of work takes what its calls take (`block_ms`, as on the processor) and its arithmetic at an assumed rate;
    the simulator takes what it takes there, and the GPU waits.
    """
    pieces = work(job)
    computing = [piece for piece in pieces if piece.rate != "simulator"]
    called = sum(piece.units * _rate(piece)["block_ms"] for piece in computing)
    computed = sum(piece.units * piece.gflop for piece in computing) * len(job.seeds) / rates()["gpu_gflop_per_ms"]
    return _seconds(job, _simulator_ms(job, pieces, data_there) + called + computed)


def _simulator_ms(job: Job, pieces: Sequence[Work], data_there: bool) -> float:
    """Return the milliseconds of all simulator frames of a job."""
    frame_ms = _task(job)[2] * job.config.environment.action_repeat
    steps = job.config.protocol.agent_steps() - data_there * job.config.protocol.kept_steps() + _evaluation_steps(job)
    steps += sum(piece.units for piece in pieces if piece.rate == "simulator")
    return len(job.seeds) * steps * frame_ms


def _seconds(job: Job, milliseconds: float) -> float:
    """Add the job's share of its process's start."""
    return float(rates()["job_start_s"] / job.together + milliseconds / 1e3)


def job_mib(job: Job) -> float:
    """Return the memory that a job is expected to take at most: MiB."""
    obs, action, _ = _task(job)
    numbers = job.config.protocol.memory_mib(job.config.agent, obs, action, len(job.seeds))
    return float(rates()["process_mib"] + numbers)


def ours(job: Job) -> tuple[str, str]:
    """Return the code fingerprint and lock hash that a run of this job would have now."""
    return fingerprint.of_parts(job.config.agent, job.config.protocol), fingerprint.of_lock(checkout())


def _made_by(folder: Path) -> tuple[str, str] | None:
    """Return a finished run's code and lock; None for one that is missing or cannot be believed."""
    with suppress(records.RecordError):
        return records.made_by(folder)
    return None


def cost(experiment: Experiment, jobs: Sequence[Job], tier: str, results: Path, collected: set[str]) -> Cost:
    """Add up what an experiment's jobs take; `collected` are the data that exist by then, and grows."""
    present = runs = 0
    missing_s = all_s = gpu_s = 0.0
    for job in jobs:
        made_now = ours(job)
        there = sum(_made_by(results / folder) == made_now for folder in job.folders())
        data = f"{job.config.environment} {job.config.protocol.kept_steps()} {job.seeds}"
        seconds = job_seconds(job, data in collected)
        gpu_s += gpu_job_seconds(job, data in collected)
        collected.add(data)
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
        agent_steps=sum(len(j.seeds) * (j.config.protocol.agent_steps() + _evaluation_steps(j)) for j in jobs),
        updates=sum(len(j.seeds) * piece.updates for j in jobs for piece in work(j)),
        cpu_hours=round(missing_s / 3600, 3),
        cpu_hours_all=round(all_s / 3600, 3),
        gpu_hours_all=round(gpu_s / 3600, 3),
        disk_mib=round(runs * rates()["record_kib"] / 1024, 2),
        peak_mib=round(max(map(job_mib, jobs), default=0.0)),
    )


def costs(experiments: Sequence[Experiment], tier: str, results: Path, seeds_per_job: int | None = None) -> list[Cost]:
    """Return each experiment's cost; a run that two experiments share is counted with the first.

    `seeds_per_job` cuts the seeds into other blocks than the tier does.
    """
    jobs = distinct([job for experiment in experiments for job in experiment.jobs(tier)])
    if seeds_per_job:
        jobs = [part for job in _whole(jobs) for part in _cut(job, seeds_per_job)]
    collected: set[str] = set()
    return [
        cost(e, [job for job in jobs if job.experiment == e.spec.id], tier, results, collected) for e in experiments
    ]


def _whole(jobs: Sequence[Job]) -> list[Job]:
    """Put the blocks of seeds of one configuration together."""
    blocks: dict[tuple[str, Path], Job] = {}
    for job in jobs:
        place = (job.experiment, job.config.folder())
        blocks[place] = replace(job, seeds=(*blocks[place].seeds, *job.seeds)) if place in blocks else job
    return list(blocks.values())


def _cut(job: Job, size: int) -> list[Job]:
    return [replace(job, seeds=job.seeds[i : i + size]) for i in range(0, len(job.seeds), size)]


def total(rows: Sequence[Cost]) -> Cost:
    """Add up costs; of memory, take the largest job's."""
    added = {f.name: sum(getattr(row, f.name) for row in rows) for f in fields(Cost) if f.type in ("int", "float")}
    peak = max((row.peak_mib for row in rows), default=0.0)
    return Cost(**{**added, "paper": "", "experiment": "all", "tier": rows[0].tier if rows else "", "peak_mib": peak})
