"""Environments in processes of their own, so that a block of seeds steps as fast as its slowest one.

    used(n)                    within this context: n processes; 0, the default, for none
    several(environment, k)    k environments of a task, in this process or spread over the others
    together(calls)            call methods of several environments; those in different processes run at the same time
    waited()                   the seconds that this process has spent in `together`

An episode depends on task and seed alone, so numbers do not depend on where it is simulated. `Remote` stands for an
environment elsewhere. Processes end with this one, however it ends: they read commands from a socket, and a socket
whose other end is gone reads as closed. Ctrl-C and requests to stop they leave to this process, which finishes its
step.

What passes through the sockets is pickled. It comes from our own processes alone.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy.typing as npt

from dynarep import envs
from dynarep.configs import EnvironmentConfig
from dynarep.envs.base import Env, EnvError, FloatArray, Observation, Snapshot, Step
from dynarep.errors import UserError

MOST = 256  # processes, ours: a slip of the hand should not fill the machine
TRAITS = ("obs_size", "action_size", "action_repeat", "episode_frames", "units", "reports_success")
START = "import sys; from dynarep.envs.workers import serve; serve(int(sys.argv[1]))"


class Call(NamedTuple):
    """A method of an environment, and what it is given."""

    env: Env
    method: str
    arguments: tuple[Any, ...] = ()


class _Worker:
    """A process that holds environments and does what it is told with them."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.set_inheritable(True)
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, str(theirs.fileno())],
                stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
            )  # fmt: skip
        self._pipe = Connection(ours.detach())
        self.held = 0  # environments made so far

    def tell(self, commands: Sequence[tuple[Any, ...]]) -> None:
        """Send commands (environment's number, method, arguments); `answers` returns what they gave."""
        with self._noticing():
            self._pipe.send(commands)

    def answers(self) -> list[Any]:
        """Return one answer per command; an EnvError that was raised is one. Other errors are raised here."""
        with self._noticing():
            answers = self._pipe.recv()
        if isinstance(answers, BaseException):
            raise answers
        found: list[Any] = answers
        return found

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Tell people about a process that is gone, in place of what its socket says."""
        try:
            yield
        except (EOFError, ConnectionError):
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5.0)
            code = self.process.returncode
            how = f"by signal {-code} ({signal.strsignal(-code)})" if code is not None and code < 0 else f"with {code}"
            use(0)
            raise UserError(
                f"a process that simulates environments (pid {self.process.pid}) ended {how}. The same command "
                "continues from the last checkpoint; without --env-workers this process simulates, in less memory."
            ) from None

    def end(self) -> None:
        """Let the process end."""
        self._pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)
        self.process.kill()
        self.process.wait()


_state: dict[str, Any] = {"count": 0, "workers": [], "waited": 0.0}


def use(count: int) -> None:
    """Simulate in so many processes from now on. Those there are end, with their environments.

    Raises:
        UserError: a number that is out of range.
    """
    if not 0 <= count <= MOST:
        raise UserError(f"--env-workers {count}: is a number from 0 (simulate in the process that learns) to {MOST}.")
    workers: list[_Worker] = _state["workers"]
    _state.update(count=count, workers=[], waited=0.0)
    for worker in workers:
        worker.end()


@contextmanager
def used(count: int) -> Iterator[None]:
    """Simulate in so many processes within this context; they are gone after it. Errors as of `use`."""
    use(count)
    try:
        yield
    finally:
        use(0)


def in_workers() -> bool:
    """Return whether environments made now are simulated elsewhere."""
    return bool(_state["count"])


def waited() -> float:
    """Return the seconds spent in `together` since `use`: simulating, or waiting for those who do."""
    seconds: float = _state["waited"]
    return seconds


def cpu_s() -> float:
    """Return the processor seconds that the other processes have used since they began."""
    running: list[_Worker] = _state["workers"]
    for worker in running:
        worker.tell([(-1, "cpu", ())])
    return float(sum(seconds for worker in running for seconds in worker.answers()))


def several(environment: EnvironmentConfig, count: int) -> list[Env]:
    """Return so many environments of a task. Dial tasks are formulas: they always stay in this process."""
    if _state["count"] == 0 or environment.suite == "dial":
        return [envs.from_config(environment) for _ in range(count)]
    workers: list[_Worker] = _state["workers"]
    while len(workers) < min(count, _state["count"]):
        workers.append(_Worker())
    chosen = [workers[k % len(workers)] for k in range(count)]
    return _made(environment, chosen)


def _made(environment: EnvironmentConfig, chosen: Sequence[_Worker]) -> list[Env]:
    """Make one environment in each of these processes, some of which may be the same; all at the same time."""
    places = []
    for worker in chosen:
        places.append((worker, worker.held))
        worker.held += 1
    commands: dict[_Worker, list[tuple[Any, ...]]] = {}
    for worker, _ in places:
        commands.setdefault(worker, []).append((-1, "make", (environment,)))
    for worker, own in commands.items():
        worker.tell(own)
    traits = {worker: iter(raised(answers)) for worker, answers in [(w, w.answers()) for w in commands]}
    return [Remote(worker, number, environment.task, next(traits[worker])) for worker, number in places]


def together(calls: Sequence[Call]) -> list[Any]:
    """Call methods, each of an environment of its own; return what they gave in order, EnvErrors included.

    Raises:
        UserError: a process that simulates is gone.
    """
    begun = time.perf_counter()
    commands: dict[_Worker, list[tuple[Any, ...]]] = {}
    for env, method, arguments in calls:
        if isinstance(env, Remote):
            commands.setdefault(env.worker, []).append((env.number, method, arguments))
    for worker, told in commands.items():
        worker.tell(told)
    here = [None if isinstance(env, Remote) else _done(env, method, args) for env, method, args in calls]
    answers = {worker: iter(worker.answers()) for worker in commands}
    found = []
    for (env, _, _), own in zip(calls, here, strict=True):
        answer = env.received(next(answers[env.worker])) if isinstance(env, Remote) else own
        found.append(answer)
    _state["waited"] += time.perf_counter() - begun
    return found


def _done(env: Env, method: str, arguments: tuple[Any, ...]) -> Any:
    try:
        return getattr(env, method)(*arguments)
    except EnvError as error:
        return error


def raised(answers: list[Any]) -> list[Any]:
    """Return what `together` gave; raise the first EnvError in it, if there is one."""
    for answer in answers:
        if isinstance(answer, EnvError):
            raise answer
    return answers


class Remote(Env):
    """An environment in another process: the methods of `Env` that protocols use, one message each."""

    def __init__(self, worker: _Worker, number: int, task: str, traits: dict[str, Any]) -> None:
        self.worker, self.number, self.task = worker, number, task
        vars(self).update(traits)
        self._last: Snapshot | None = None

    def _ask(self, method: str, *arguments: Any) -> Any:
        return raised(together([Call(self, method, arguments)]))[0]

    def reset(self, seed: int) -> Observation:
        """As `Env.reset`."""
        obs: Observation = self._ask("reset", seed)
        return obs

    def step(self, action: npt.ArrayLike) -> Step:
        """As `Env.step`."""
        step: Step = self._ask("step", action)
        return step

    def snapshot(self) -> Snapshot:
        """As `Env.snapshot`."""
        snapshot: Snapshot = self._ask("snapshot")
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """As `Env.restore`."""
        self._ask("restore", snapshot)

    def outcomes(self, cases: Sequence[tuple[Snapshot, npt.NDArray[Any]]]) -> list[Step | None]:
        """As `Env.outcomes`."""
        steps: list[Step | None] = self._ask("outcomes", cases)
        return steps

    @property
    def frame(self) -> int:
        """Frames since the reset."""
        raise NotImplementedError

    def received(self, answer: Any) -> Any:
        """Let snapshots of one episode share what is constant in it, as they do where they are taken."""
        if isinstance(answer, Snapshot):
            last, self._last = self._last, answer
            if last is not None:
                same = last.model.keys() == answer.model.keys() and all(
                    array.tobytes() == last.model[name].tobytes() for name, array in answer.model.items()
                )
                attributes = last.attributes if last.attributes == answer.attributes else answer.attributes
                self._last = answer = replace(answer, model=last.model if same else answer.model, attributes=attributes)
        return answer

    def _begin(self, seed: int) -> None:
        raise NotImplementedError

    def _advance(self, control: FloatArray) -> tuple[float, bool, bool]:
        raise NotImplementedError

    def _observe(self) -> Observation:
        raise NotImplementedError

    def _state(self) -> FloatArray:
        raise NotImplementedError

    def _recover(self, snapshot: Snapshot) -> None:
        raise NotImplementedError


# -- in the other process ----------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Hold environments and do what the socket says, until its other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    held: list[Env] = []
    with Connection(descriptor) as pipe, suppress(EOFError, ConnectionError):
        while True:
            commands = pipe.recv()
            try:
                answer: Any = [_obeyed(held, *command) for command in commands]
            except Exception as error:  # whatever it is: it belongs where the command came from
                answer = error
            try:
                pipe.send(answer)
            except (pickle.PicklingError, TypeError, AttributeError):
                pipe.send(RuntimeError(repr(answer)))
    os._exit(0)  # simulators have nothing to say at their end


def _obeyed(held: list[Env], number: int, method: str, arguments: tuple[Any, ...]) -> Any:
    if method == "cpu":
        return time.process_time()
    if method != "make":
        return _done(held[number], method, arguments)
    try:
        held.append(envs.from_config(*arguments))
    except EnvError as error:
        return error
    return {name: getattr(held[-1], name) for name in TRAITS}
