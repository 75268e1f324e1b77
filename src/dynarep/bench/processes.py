"""What needs processes: other people's SAC beside ours, and what two cores are best used for."""

from __future__ import annotations

import os
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import numpy as np

from dynarep import mkl
from dynarep.bench.ratios import Report, compared
from dynarep.bench.workers import KERNELS, Burst, Task, Worker, workers
from dynarep.errors import UserError

SB3, SBX = 2.5, 1.2  # times as fast as they, which the issue of speed asked for
MODULES = ("stable_baselines3", "sbx", "jax")
INSTALL = "`make bench-peers`, or `pip install --require-hashes --no-deps -r requirements-bench.txt`"
ONE_THREAD = 1.05  # seconds of processor time per second of the clock; more were more than one thread


def peers(rounds: int, compiled: bool = False, report: Report | None = None) -> list[dict[str, Any]]:
    """Time our SAC beside stable-baselines3's and SBX's, each in a process of its own, one at work at a time.

    stable-baselines3 is timed as people have it, with MKL's own choice of kernels, which is what its target speaks of;
    and once more with ours, if this process has another.

    Returns:
        One plain `Ratio` per peer, of one update, with `parameters` and `threads`, the processor time it used per
        second of the clock.

    Raises:
        UserError: they are not installed; or they do not do the same work on one thread.
    """
    require()
    others = [Task(peer="sb3", mkl_own=True), Task(peer="sbx")]
    targets: list[float | None] = [SB3, SBX]
    if mkl.path() == mkl.INTEL_PATH and mkl.library() is not None:
        others.insert(1, Task(peer="sb3"))
        targets.insert(1, None)
    with workers([Task(peer="ours", compiled=compiled), *others]) as team:
        check([worker.about for worker in team])
        bursts = _bursts(team, rounds, report)
    cpu = np.array([[burst.cpu_s / burst.calls for burst in row] for row in bursts])
    wall = np.array([[burst.wall_s / burst.calls for burst in row] for row in bursts])
    threads = cpu.sum(0) / wall.sum(0)
    for worker, used in zip(team, threads, strict=True):
        if used > ONE_THREAD:
            raise UserError(f"bench: {worker.about['name']} ran on {used:.1f} threads, which is no comparison.")
    rows = []
    for k, target in enumerate(targets, start=1):
        about, kernels = team[k].about, team[k].about["mkl"]
        name = f"SAC update, 2x256, batch 256: against {about['name']} (MKL: {kernels})"
        if team[k].task.peer == "sbx":
            name = f"SAC update, 2x256, batch 256: against {about['name']}"
        more = {"parameters": about["parameters"], "threads": float(threads[k])}
        rows.append(asdict(compared(name, cpu[:, 0], cpu[:, k], target)) | more)
    return rows


def require() -> None:
    """UserError if a peer is not installed."""
    missing = [name for name in MODULES if find_spec(name) is None]
    if missing:
        raise UserError(f"bench --peers: not installed here: {', '.join(missing)}. Type {INSTALL}.")


def check(abouts: list[dict[str, Any]]) -> None:
    """UserError if the networks differ in size: a peer's new version would no longer do the same work."""
    sizes = {about["name"]: about["parameters"] for about in abouts}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} {count:,}" for name, count in sizes.items())
        raise UserError(f"bench --peers: the networks have different numbers of parameters: {said}.")


def two_cores(rounds: int, compiled: bool = False, report: Report | None = None) -> list[dict[str, Any]]:
    """Compare two processes of one thread with one process of two threads, by calls per second of the clock.

    Returns:
        One plain `Ratio` per kernel, of the time per call: above 1 where two processes finish more.

    Raises:
        UserError: there are no two cores.
    """
    require_two_cores()
    tasks = [Task(kernel=name, threads=threads, compiled=compiled) for name in KERNELS for threads in (1, 1, 2)]
    seconds = np.empty((rounds, len(KERNELS), 2))
    with workers(tasks) as team:
        for i in range(rounds):
            for k in range(len(KERNELS)):
                seconds[i, k] = [_together(team[3 * k : 3 * k + 2]), _together(team[3 * k + 2 : 3 * k + 3])]
            if report:
                report(i + 1, rounds)
        names = [f"{worker.about['name']}: two processes of one thread, against one of two" for worker in team[::3]]
    return [asdict(compared(name, seconds[:, k, 0], seconds[:, k, 1])) for k, name in enumerate(names)]


def require_two_cores() -> None:
    """UserError if there are no two cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2:
        raise UserError("bench --processes: needs two cores, here is one.")


def _together(team: list[Worker]) -> float:
    """Return seconds of the clock per call of processes that work at the same time."""
    for worker in team:
        worker.start()
    return 1.0 / sum(burst.calls / burst.wall_s for burst in [worker.finish() for worker in team])


def _bursts(team: list[Worker], rounds: int, report: Report | None) -> list[list[Burst]]:
    """Let one process after the other work, round by round."""
    found: list[list[Burst]] = []
    for i in range(rounds):
        found.append([])
        for worker in team:
            worker.start()
            found[-1].append(worker.finish())
        if report:
            report(i + 1, rounds)
    return found
