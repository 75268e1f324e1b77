"""Runs made of chosen numbers, so that verdicts and figures can be tested without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dynarep import fingerprint, records
from dynarep.experiment import Experiment, Job, checkout
from dynarep.protocols import Metrics

# (variant, task, seed, update, metric) -> value
Value = Callable[[str, str, int, int, str], float]


def manifest(job: Job, seed: int) -> dict[str, object]:
    return {
        "identity": job.config.identity(),
        "config": job.config.content(),
        "seed": seed,
        "code": {
            "fingerprint": fingerprint.of_parts(job.config.agent, job.config.protocol),
            "commit": "c",
            "dirty": False,
        },
        "lock": fingerprint.of_lock(checkout()),
        "versions": {},
        "machine": {},
        "cost": {"cpu_s": 1.0, "wall_s": 1.0, "peak_mib": 1, "seeds_in_job": 1},
        "resumed": [],
    }


def write_runs(
    experiment: Experiment, tier: str, results: Path, value: Value, updates: tuple[int, ...] = (0, 8)
) -> None:
    """Write every run of a tier with the metrics its protocol declares."""
    for job in experiment.jobs(tier):
        for seed, folder in zip(job.seeds, job.folders(), strict=True):
            metrics = Metrics([seed])
            for update in updates:
                names = sorted(job.config.protocol.metrics)
                values = {name: [value(job.variant, job.task, seed, update, name)] for name in names}
                metrics.add(10, 20, update, values)
            records.write(results / folder, metrics.csv(0), manifest(job, seed))
