"""Jobs + records -> the values of one arm, complete or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dynarep import records
from dynarep.experiment import Job
from dynarep.statements import Measured


class MissingRunsError(Exception):
    """Runs that a claim needs are not there or cannot be believed."""


@dataclass
class Arm:
    """One side of a contrast: a row of values per task, in the order of seeds."""

    values: list[np.ndarray]
    folders: list[str]
    diverged: int
    code: set[tuple[str, str, str]]  # agent, fingerprint, lock
    seeds: dict[str, list[int]] = field(default_factory=dict)  # task -> those of its row
    rules: list[Mapping[str, str] | None] = field(default_factory=list)  # each run's claims, None if not recorded

    def runs(self) -> dict[str, dict[int, float]]:
        """Return task -> seed -> value."""
        rows = zip(self.seeds.items(), self.values, strict=True)
        return {task: dict(zip(seeds, values.tolist(), strict=True)) for (task, seeds), values in rows}


def read(jobs: Sequence[Job], side: Measured, results: Path) -> Arm:
    """Read one side; MissingRunsError names how many runs are not there and the first reason."""
    per_task: dict[str, list[float]] = {}
    arm = Arm([], [], 0, set())
    absent: list[str] = []
    for job in jobs:
        if job.variant != side.variant or side.task not in (None, job.task):
            continue
        for seed, folder in zip(job.seeds, job.folders(), strict=True):
            try:
                record = records.read(results / folder, job.config, seed)
                value = _value(record, side)
            except records.RecordError as error:
                absent.append(str(error))
                continue
            if not math.isfinite(value):
                arm.diverged += 1
                value = math.nan if side.worst is None else side.worst
            per_task.setdefault(job.task, []).append(value)
            arm.seeds.setdefault(job.task, []).append(seed)
            arm.folders.append(str(folder))
            code = record.manifest["code"]["fingerprint"]
            arm.code.add((job.config.agent.name, code, record.manifest["lock"]))
            said = record.manifest.get("claims")
            arm.rules.append(said if isinstance(said, dict) else None)
    if absent:
        found = len(arm.folders)
        raise MissingRunsError(f"{found} of {found + len(absent)} runs of '{side.variant}' are there. {absent[0]}")
    arm.values = [np.array(values) for values in per_task.values()]
    return arm


def _value(record: records.RunRecord, side: Measured) -> float:
    """Return a run's last value, or its last one by a frame; RecordError if there is none or it ended before."""
    if side.at_frame is None:
        return record.last(side.metric)
    frames = record.columns["frame"]
    if frames.max() < side.at_frame:
        raise records.RecordError(f"{record.folder}: ended at frame {frames.max():.0f}, before {side.at_frame}.")
    rows, values = record.series(side.metric)
    values = values[frames[rows] <= side.at_frame]
    if not len(values):
        raise records.RecordError(f"{record.folder}: has no metric '{side.metric}' by frame {side.at_frame}.")
    return float(values[-1])
