"""Kernels in processes of their own, which work when they are told to: `python -m dynarep.bench.workers` is one.

Others' packages set up their process as they like; two processes at once are a question of their own. A process gets
what it should do as its argument, says in a line of JSON that it is ready, and answers every line it reads with one
burst: how many calls, in how many seconds of its processor time and of the clock. It ends with its input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dynarep import mkl, process
from dynarep.bench.kernels import Kernel, mad_td, sac
from dynarep.bench.peers import LEARNERS, UPDATES
from dynarep.errors import UserError

BURST_S = 0.5
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "NPROC": "1",  # XLA's pool
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
}


KERNELS: dict[str, Callable[[], Kernel]] = {
    "sac": lambda: sac(1, 256, 256),
    "mad_td": lambda: mad_td(1, 512, 512, updates=1, model=True),
    "packed": lambda: mad_td(10, 64, 32, updates=16, model=True),
}


@dataclass(frozen=True)
class Task:
    """What a process does: `peer` of `peers.LEARNERS`, or `kernel` of `KERNELS`, on so many threads."""

    peer: str = ""
    kernel: str = ""
    threads: int = 1
    compiled: bool = False
    mkl_own: bool = False  # leave the choice of kernels to MKL, as those do who do not know better


@dataclass(frozen=True)
class Burst:
    """Calls, and the seconds they took: of the process's time, summed over its threads, and of the clock."""

    calls: int
    cpu_s: float
    wall_s: float


class Worker:
    """A process that waits for `start`."""

    def __init__(self, task: Task) -> None:
        self.task = task
        environment = os.environ | (ONE_THREAD if task.threads == 1 else {"OMP_NUM_THREADS": str(task.threads)})
        if task.mkl_own:
            environment[mkl.VARIABLE] = mkl.OWN
        command = [sys.executable, "-m", "dynarep.bench.workers", json.dumps(asdict(task))]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1, env=environment)
        self.about: dict[str, Any] = {}

    def ready(self) -> Worker:
        """Wait until it has warmed up; `about` then holds what it said of itself."""
        self.about = self._read()
        return self

    def start(self) -> None:
        """Tell it to work through one burst."""
        assert self._process.stdin is not None
        self._process.stdin.write("burst\n")

    def finish(self) -> Burst:
        """Wait for its burst."""
        return Burst(**self._read())

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            what = self.task.peer or self.task.kernel
            raise UserError(f"bench: the process of {what} ended with code {self._process.wait()}; it says why above.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def workers(tasks: Sequence[Task]) -> Iterator[list[Worker]]:
    """Start processes one after another, all warm; end them whatever happens."""
    started: list[Worker] = []
    try:
        for task in tasks:
            started.append(Worker(task))
            started[-1].ready()
        yield started
    finally:
        for worker in started:
            worker.end()


def serve(task: Task, answer: Callable[[dict[str, Any]], None], orders: Iterator[str]) -> None:
    """Be a process: set up, warm up, and answer."""
    if task.peer:
        if task.peer == "ours":
            process.settle(compiled=task.compiled)
        learner = LEARNERS[task.peer]()
        call, per_call, made = learner.call, UPDATES, learner.made
        about = {"name": learner.name, "parameters": learner.parameters}
    else:
        process.settle(compiled=task.compiled)
        kernel = KERNELS[task.kernel]()
        call, per_call, made, about = kernel.call, 1, None, {"name": kernel.name}
    torch.set_num_threads(task.threads)
    for _ in range(3):
        call()
    calls = max(1, round(BURST_S / _burst(call, 1).wall_s))
    answer(about | {"mkl": mkl.path()})
    for _ in orders:
        before = made() if made else 0
        burst = _burst(call, calls)
        if made and made() - before != calls * per_call:
            raise RuntimeError(f"{about['name']}: made {made() - before} updates, not {calls * per_call}")
        answer(asdict(Burst(calls * per_call, burst.cpu_s, burst.wall_s)))


def _burst(call: Callable[[], object], calls: int) -> Burst:
    clock, own = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    return Burst(calls, time.process_time() - own, time.perf_counter() - clock)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what packages print is not an answer
    serve(Task(**json.loads(sys.argv[1])), lambda data: print(json.dumps(data), file=answers), iter(sys.stdin))
