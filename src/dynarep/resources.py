"""What a training process asks of a cluster: time, memory, a GPU. A machine without a scheduler ignores it.

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
CUDA_MIB = 3000  # ours: CUDA's libraries and kernels on the host

Attempted = Callable[[Any, int], int]  # of Snakemake: (wildcards, attempt), attempts counted from 1


@dataclass(frozen=True)
class Place:
    """Where jobs are trained.

    Args:
        device: what one trains on, as PyTorch names it.
        hours: the longest that the cluster lets a job run.

    Raises:
        UserError: an unknown device, a limit that is no time.
    """

    device: str = "cpu"
    hours: float = 48.0  # ours: what many clusters allow

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise unknown("device", str(self.device), DEVICES, "Write e.g. --config device=cuda.")
        if not isinstance(self.hours, int | float) or not 0 < self.hours < math.inf:
            raise UserError(f"hours={self.hours}: the longest that the cluster lets a job run. Write e.g. hours=24.")

    @property
    def option(self) -> str:
        """Return what `dynarep train` is told of the device: nothing on the processor."""
        return "" if self.device == "cpu" else f"--device {self.device}"

    def resources(self, jobs: Sequence[Job] | Mapping[str, Job]) -> dict[str, Attempted | str]:
        """Return the resources of a training process, by Snakemake's names.

        Args:
            jobs: what one process trains, one after the other; or one job for each value of the rule's wildcard `run`.

        Returns:
            runtime: minutes, mem_mb: MiB, both by attempt; gres: a GPU, if it needs one.
        """
        on_gpu = self.device != "cpu"
        seconds = plan.gpu_job_seconds if on_gpu else plan.job_seconds

        def trained(wildcards: Any) -> Sequence[Job]:
            return [jobs[wildcards.run]] if isinstance(jobs, Mapping) else jobs

        def runtime(wildcards: Any, attempt: int) -> int:
            expected_s = sum(map(seconds, trained(wildcards)))
            return math.ceil(min(attempt * (START_MINUTES + MARGIN * expected_s / 60), 60 * self.hours))

        def mem_mb(wildcards: Any, attempt: int) -> int:
            mib = MEMORY_MARGIN * max(map(plan.job_mib, trained(wildcards))) + on_gpu * CUDA_MIB
            return math.ceil(mib * (1 + attempt) / 2)

        asked: dict[str, Attempted | str] = {"runtime": runtime, "mem_mb": mem_mb}
        return {**asked, "gres": "gpu:1"} if on_gpu else asked
