"""One scheduler per folder, and no job without its scheduler: what survives `kill -9` of either.

Snakemake's own lock stays behind when it is killed, and so do its jobs. Here the lock ends with the process, and a job
that a scheduler of this machine started looks every second whether it is still its descendant.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from dynarep.errors import UserError

VARIABLE = "DYNAREP_SCHEDULER"  # in the environment of jobs: the scheduler's process
LOCK = Path(".snakemake", "dynarep.lock")  # "<process> <token of this run>", locked while the scheduler lives
SNAKEMAKE_LOCKS = Path(".snakemake", "locks")
LOOK_SECONDS = 1.0


class Turn:
    """A scheduler's turn in a folder: planned when the Snakefile is read, taken when jobs are about to start.

    Not in one step, because a dry run, a report or an `--unlock` read the Snakefile too and must not shut others out.

    Args:
        folder: the scheduler's working directory.
    """

    def __init__(self, folder: Path) -> None:
        os.environ.pop(VARIABLE, None)  # of a scheduler that started this one
        self._path = folder / LOCK
        self._file: IO[str] | None = None
        self._busy, self._token = False, self._read()
        with suppress(OSError), self._path.open("a") as file:  # no such folder yet, or read-only: nothing stale there
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._busy = True
            else:
                for stale in (folder / SNAKEMAKE_LOCKS).glob("*.lock"):  # its owner is dead
                    stale.unlink(missing_ok=True)

    def take(self, here: bool = True) -> None:
        """Shut others out until this process ends.

        Args:
            here: jobs are processes of this machine, which can see whether the scheduler lives.

        Raises:
            UserError: another scheduler is at work, or was since the plan was made; the folder cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror}.") from None
        with ExitStack() as stack:
            stack.enter_context(file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                process = self._read().split(" ")[0]
                raise UserError(
                    f"{self._path.parents[1].resolve()}: process {process} is making results here already. Wait for "
                    f"it, or stop it (kill -INT {process}); what is done stays."
                ) from None
            except OSError as error:
                raise UserError(f"{self._path}: cannot be locked: {error.strerror}. Use another file system.") from None
            if self._busy or self._read() != self._token:
                raise UserError("another run ended here while this one was planned. Type the same command again.")
            try:
                file.truncate(0)
                file.write(f"{os.getpid()} {uuid.uuid4().hex}")
                file.flush()
            except OSError as error:
                raise UserError(f"{self._path}: cannot be written: {error.strerror}. Free space.") from None
            stack.pop_all()
            self._file = file  # open, and so locked, as long as this process lives
        if here:
            os.environ[VARIABLE] = str(os.getpid())

    def _read(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8")
        except OSError:
            return ""


def without_rounds(snakemake: Any) -> None:
    """Let Snakemake's scheduler look for jobs to start when one has ended, not again and again while they run.

    It limits how many jobs start in a second, and for that looks again a second after every look: a chain that never
    ends, and every job that ends begins another. With all cores taken nothing can come of it, but each look asks for
    the size of every input of every job that is ready, which at the ci tier took as much time as all figures. It does
    without the limit where it only touches files; so it can here, where cores are the limit.

    Args:
        snakemake: Snakemake's scheduler, of jobs on this machine.
    """
    if hasattr(snakemake, "job_rate_limiter"):  # not in its published interface: where it is gone, nothing is lost
        snakemake.job_rate_limiter = None


# -- the jobs' side -----------------------------------------------------------------------------------------------


def started_here() -> bool:
    """Return whether this process was started by a scheduler of this machine."""
    return VARIABLE in os.environ


def alive() -> bool:
    """Return whether the scheduler that started this process, if one did, still is its ancestor.

    Who dies is nobody's parent any more, so a process that takes over its number cannot be taken for it.
    """
    number = os.environ.get(VARIABLE, "")
    return not number.isdigit() or any(parent.pid == int(number) for parent in psutil.Process().parents())


def watch() -> None:
    """Ask this process to stop (SIGTERM: it saves its state, if it has any) once its scheduler is gone."""
    if not started_here():
        return

    def look() -> None:
        while alive():
            time.sleep(LOOK_SECONDS)
        print("The scheduler of this job is gone: the job stops too.", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, name="scheduler", daemon=True).start()
