"""What a training process asks of a cluster: time, memory, cores, a GPU. A machine without a scheduler ignores it.

Time is what `plan` expects, doubled because a rate measured on one machine is good to a factor of two on another, and
more at each attempt. A job that meets the limit all the same loses little: it goes on from its checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynarep import plan
from dynarep.errors import UserError, unknown
from dynarep.experiment import Job

DEVICES = ("cpu", "cuda")
MARGIN = 2.0  # ours: see above
START_MINUTES = 10  # ours: three starts of Snakemake and one of PyTorch from a slow file system
MEMORY_MARGIN = 1.25  # ours
SNAKEMAKE_MIB = 500  # measured: 2 x 150, which SLURM counts with the job
WORKER_MIB = 400  # ours: Python and a simulator
CUDA_MIB = 3000  # ours: CUDA's libraries and kernels on the host

Attempted = Callable[[Any, int], int]  # of Snakemake: (wildcards, attempt), attempts counted from 1


@dataclass(frozen=True)
class Place:
    """Where jobs are trained.

    Args:
        device: what one trains on, as PyTorch names it.
        hours: the longest that the cluster lets a job run.
        workers: processes beside each one that trains, which simulate environments.

    Raises:
        UserError: an unknown device, a limit that is no time, a number of workers that is none.
    """

    device: str = "cpu"
    hours: float = 48.0  # ours: what many clusters allow
    workers: int = 0

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise unknown("device", str(self.device), DEVICES, "Write e.g. --config device=cuda.")
        if not isinstance(self.hours, int | float) or not 0 < self.hours < math.inf:
            raise UserError(f"hours={self.hours}: the longest that the cluster lets a job run. Write e.g. hours=24.")
        if not isinstance(self.workers, int) or not 0 <= self.workers <= 64:
            raise UserError(f"workers={self.workers}: processes that simulate, 0 to 64. Write e.g. workers=4.")

    @property
    def option(self) -> str:
        """Return what `dynarep train` is told of this: nothing on the processor alone."""
        device = f"--device {self.device}" if self.device != "cpu" else ""
        return " ".join(filter(None, [device, f"--env-workers {self.workers}" if self.workers else ""]))

    def resources(self, jobs: Sequence[Job] | Mapping[str, Job]) -> dict[str, Attempted | str | int]:
        """Return the resources of a training process, by Snakemake's names.

        Args:
            jobs: what one process trains, one after the other; or one job for each value of the rule's wildcard `run`.

        Returns:
            runtime: minutes, mem_mb: MiB, both by attempt; gres: a GPU, cpus_per_task: cores, if it needs one or more.
        """
        on_gpu = self.device != "cpu"
        seconds = plan.gpu_job_seconds if on_gpu else plan.job_seconds

        def trained(wildcards: Any) -> Sequence[Job]:
            return [jobs[wildcards.run]] if isinstance(jobs, Mapping) else jobs

        def runtime(wildcards: Any, attempt: int) -> int:
            expected_s = sum(map(seconds, trained(wildcards)))
            return math.ceil(min(attempt * (START_MINUTES + MARGIN * expected_s / 60), 60 * self.hours))

        def mem_mb(wildcards: Any, attempt: int) -> int:
            mib = MEMORY_MARGIN * max(map(plan.job_mib, trained(wildcards))) + SNAKEMAKE_MIB + on_gpu * CUDA_MIB
            return math.ceil((mib + self.workers * WORKER_MIB) * (1 + attempt) / 2)

        asked: dict[str, Attempted | str | int] = {"runtime": runtime, "mem_mb": mem_mb}
        asked |= {"gres": "gpu:1"} if on_gpu else {}
        return asked | ({"cpus_per_task": 1 + self.workers} if self.workers else {})
