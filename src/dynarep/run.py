"""One job: a block of seeds in, one record per seed out. The same path by hand and from the DAG.

    for every seed: finished by this code already? then nothing to do
    build the protocol; continue from its checkpoint if there is one, from the one before if that is torn
    advance until done, checkpointing now and then; on SIGINT, SIGTERM or SIGHUP checkpoint and stop
    write every seed's metrics and manifest; remove the checkpoints

When a checkpoint is written changes nothing in the numbers: protocols continue to the same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
import resource
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch

from dynarep import __version__, fingerprint, process, records, scheduler
from dynarep.cache import cached_in
from dynarep.envs import workers
from dynarep.errors import UserError
from dynarep.experiment import Job, span
from dynarep.files import checkout, home
from dynarep.protocols import Protocol, Row

CHECKPOINT_SECONDS = 60.0  # ours: a kill loses at most this much work,
SAVES_APART = 50.0  # or this many times what a save takes: one may write gigabytes, all together 2 % of the time
ORPHAN_SECONDS = 600.0  # how long a scheduler's job waits for the job of a dead scheduler to save its state and stop
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FILES = (records.METRICS, records.MANIFEST)
COMPILED = Path(".snakemake", "compiled")  # below home: not beside results, which come from anywhere
Report = Callable[[int, int, dict[str, float]], None]


class StoppedError(Exception):
    """The job was asked to stop and has saved its state."""


def pending(job: Job, results: Path, redo: bool = False) -> list[int]:
    """Return the seeds of a job that still have to be trained.

    Raises:
        RecordError: a seed has a run that this code did not make, or that cannot be believed, and `redo` is off.
    """
    if redo:
        return list(job.seeds)
    ours = (fingerprint.of_parts(job.config.agent, job.config.protocol), fingerprint.of_lock(checkout()))
    todo = []
    for seed, path in zip(job.seeds, job.folders(), strict=True):
        folder = results / path
        theirs = records.made_by(folder)
        if theirs is None:
            todo.append(seed)
        elif theirs != ours:
            what = "code" if theirs[0] != ours[0] else "package versions"
            raise records.RecordError(
                f"{folder}: was made by other {what}. Add --redo to replace it, or pass --results with another folder."
            )
        else:
            records.read(folder, job.config, seed)
    return todo


def train(
    job: Job,
    results: Path,
    report: Report | None = None,
    redo: bool = False,
    rules: Mapping[str, str] | None = None,
    device: str = "cpu",
    env_workers: int = 0,
) -> list[int]:
    """Train what is missing of a job and write its records.

    Args:
        job: what to train.
        results: the folder of runs.
        report: called with units done, units in all and current numbers.
        redo: replace runs that exist.
        rules: of the claims that rest on these runs, see `registration`; noted in the manifests.
        device: where to compute.
        env_workers: processes that simulate environments; 0 for none but this one. Changes no number.

    Returns:
        The seeds trained now; empty if all were there.

    Raises:
        UserError: see `pending` and `process.settle`; a folder that cannot be written; another process at the same job.
        StoppedError: after SIGINT, SIGTERM or SIGHUP, with a checkpoint written.
    """
    records.check_writable(results)
    folder = results / job.config.folder()
    lock, checkpoint = folder / f".seeds={span(job.seeds)}.lock", _checkpoint(results, job)
    killed = any(path.exists() for path in (lock, checkpoint, _before(checkpoint)))  # with its work done, perhaps
    if not killed and not pending(job, results, redo):
        return []
    with _only_one(lock, depth=len(job.config.folder().parts)):
        todo = pending(job, results, redo)
        if todo:
            process.settle(device, job.compiled, compiled_folder())
            with workers.used(env_workers):
                _train(job, results, todo, report or (lambda done, total, now: None), rules)
        _forget(checkpoint)
    return todo


def _train(job: Job, results: Path, seeds: list[int], report: Report, rules: Mapping[str, str] | None) -> None:
    begun_at, started, cpu = _now(), time.perf_counter(), time.process_time()
    with cached_in(results / ".transitions"):  # arms of one task start from the same random transitions
        protocol = _build(job, seeds)
    checkpoint = _checkpoint(results, job)
    for path in (checkpoint, *(results / job.config.folder() / f"seed={s}" / name for s in seeds for name in FILES)):
        records.sweep(path)
    history = _resume(protocol, job, seeds, checkpoint)
    with _stop_requested() as stop:
        due = time.monotonic() + CHECKPOINT_SECONDS
        while protocol.done < protocol.total:
            now = protocol.advance()
            report(protocol.done, protocol.total, now)
            stopping, begun = bool(stop), time.monotonic()
            if protocol.done < protocol.total and (stopping or begun > due):
                spent = {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
                when = {"started": begun_at, "at": _now()}
                _save(protocol, job, seeds, checkpoint, [*history, {"stopped_at": protocol.done, **spent, **when}])
                saved = time.monotonic()
                due = saved + max(CHECKPOINT_SECONDS, SAVES_APART * (saved - begun))
                if stopping:
                    raise StoppedError(
                        f"stopped at {protocol.done} of {protocol.total}; the same command continues from there"
                    )
    cost = {
        "wall_s": round(time.perf_counter() - started, 3),
        "cpu_s": round(time.process_time() - cpu, 3),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "seeds_in_job": len(seeds),
        "env_wait_s": round(workers.waited(), 3),
        "env_cpu_s": round(workers.cpu_s(), 3),  # of other processes, not in cpu_s
    }
    made = _manifest(job, cost, history, begun_at) | ({} if rules is None else {"claims": dict(rules)})
    metrics = {seed: protocol.metrics.csv(index) for index, seed in enumerate(seeds)}
    # Every seed's manifest vouches for the others: none can be changed alone.
    made["block"] = {str(seed): hashlib.sha256(text.encode()).hexdigest() for seed, text in metrics.items()}
    for seed, text in metrics.items():
        records.write(results / job.config.folder() / f"seed={seed}", text, {**made, "seed": seed})


def compiled_folder() -> Path:
    """Return where all jobs keep compiled code: for this kind of processor, another one may not know instructions."""
    return home() / COMPILED / records.cpu_kind()


def _build(job: Job, seeds: list[int]) -> Protocol:
    module, name = job.config.protocol.implementation.split(":")
    protocol: type[Protocol] = getattr(importlib.import_module(module), name)
    return protocol(job.config.environment, job.config.agent, job.config.protocol, seeds)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _manifest(job: Job, cost: dict[str, Any], history: list[dict[str, Any]], started: str) -> dict[str, Any]:
    """Return what the manifests of a job's seeds have in common."""
    parts = (job.config.agent, job.config.protocol)
    return {
        "dynarep": __version__,
        "identity": job.config.identity(),
        "seed": None,
        "config": job.config.content(),
        "made_for": {"experiment": job.experiment, "variant": job.variant, "task": job.task, "tier": job.tier},
        "streams": "PCG64(SeedSequence(seed, spawn_key=sha256(purpose)[:16]))",
        "code": {"fingerprint": fingerprint.of_parts(*parts), **records.git_state(checkout())},
        "lock": fingerprint.of_lock(checkout()),
        "versions": records.versions(),
        "machine": {"cpu": records.cpu_model(), **process.describe()},
        "cost": cost,
        "resumed": history,
        "started": started,
        "written": _now(),
    }


# -- checkpoints --------------------------------------------------------------------------------------------------


def _mark(job: Job, seeds: list[int]) -> dict[str, Any]:
    """Return what a checkpoint must agree with to be continued."""
    code = fingerprint.of_parts(job.config.agent, job.config.protocol)
    made = {"code": code, "lock": fingerprint.of_lock(checkout()), "machine": process.describe()}
    return {"identity": job.config.identity(), "seeds": seeds, **made}


def _checkpoint(results: Path, job: Job) -> Path:
    """Return where the newest checkpoint lies: under the name of the job's lock, whichever of its seeds are left."""
    return results / job.config.folder() / f".seeds={span(job.seeds)}.checkpoint"


def _before(checkpoint: Path) -> Path:
    """Return where the checkpoint before the newest lies."""
    return checkpoint.with_name(f"{checkpoint.name}.before")


def _forget(checkpoint: Path) -> None:
    records.sweep(checkpoint)
    for path in (checkpoint, _before(checkpoint)):
        path.unlink(missing_ok=True)


def _save(protocol: Protocol, job: Job, seeds: list[int], path: Path, history: list[dict[str, Any]]) -> None:
    rows = [[tuple(row) for row in per_seed] for per_seed in protocol.metrics.rows]
    content = {"mark": _mark(job, seeds), "done": protocol.done, "rows": rows, "history": history}
    with records.atomic_file(path, before=_before(path)) as file:
        try:
            torch.save(content | {"state": protocol.state()}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # the disk is full; PyTorch says "unexpected pos"
                raise error.__context__ from None
            raise


def _resume(protocol: Protocol, job: Job, seeds: list[int], path: Path) -> list[dict[str, Any]]:
    """Continue from the newest checkpoint of this very job that is whole; return the history of earlier stops."""
    found = [file for file in (path, _before(path)) if file.exists()]
    for file in found:
        then = "starting over" if file == found[-1] else "trying the one before"
        try:
            saved = _read(file)
            same = saved["mark"] == _mark(job, seeds)
        except Exception as error:  # torn or foreign, whatever is wrong with it
            print(f"{file}: not a usable checkpoint ({type(error).__name__}); {then}.", file=sys.stderr)
            file.unlink()  # lest it takes the place of the one before
            continue
        if not same:
            print(f"{file}: was made by other code, for other seeds or on another machine; {then}.", file=sys.stderr)
            continue
        if file != path:
            print(f"{file}: continuing from {saved['done']} of {protocol.total}.", file=sys.stderr)
        protocol.load(saved["state"])
        protocol.done = saved["done"]
        protocol.metrics.rows = [[Row(*row) for row in per_seed] for per_seed in saved["rows"]]
        history: list[dict[str, Any]] = saved["history"]
        return history
    return []


def _read(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint holds. Raises whatever it takes if the file is not whole: each part has a checksum."""
    with zipfile.ZipFile(checkpoint) as archive:
        if (torn := archive.testzip()) is not None:  # torch.load would not look
            raise zipfile.BadZipFile(torn)
    saved: dict[str, Any] = torch.load(checkpoint, weights_only=True, mmap=True, map_location="cpu")
    return saved


# -- locks and signals --------------------------------------------------------------------------------------------


@contextmanager
def _only_one(path: Path, depth: int = 0) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends; then drop up to `depth` parents that are empty.

    A scheduler's job waits for another process at the same job: its scheduler was killed, and it is about to stop.
    """
    patience = time.monotonic() + (ORPHAN_SECONDS if scheduler.started_here() else 0)
    said = False
    while (file := _locked(path)) is None:
        if time.monotonic() > patience:
            raise UserError(f"{path.parent}: another process is training this job. Wait for it, or stop it.")
        if not said:
            print(f"{path.parent}: waiting for another process at this job to stop.", file=sys.stderr, flush=True)
        said = True
        time.sleep(0.2)
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty: somebody's work lies there
                for folder in path.parents[:depth]:
                    folder.rmdir()


def _locked(path: Path) -> IO[str] | None:
    """Return the locked file; None if somebody else holds the lock. UserError if it cannot be made."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except FileNotFoundError:  # who held the lock has just removed the empty folder
            continue
        except OSError as error:
            raise UserError(f"{path.parent}: cannot be written: {error.strerror}.") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            file.close()
            raise UserError(f"{path}: cannot be locked: {error.strerror}. Use another file system.") from None
        file.close()  # who held the lock has just removed the file: this is a lock on nothing


@contextmanager
def _stop_requested() -> Iterator[list[int]]:
    """Collect the signals that ask to stop instead of dying of them; a second one acts at once.

    SIGHUP is a terminal that was closed. A signal that this process was told to ignore (`nohup`) stays ignored.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)

    try:
        heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, note) for number in heard}
    except ValueError:  # not in the main thread (tests): signals go where they always went
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
