"""What a run leaves behind: metrics.csv and manifest.json, written atomically, believed only if they agree.

    results/runs/<agent>/<task>/<label>-<hash8>/seed=<n>/metrics.csv     agent_step,frame,update,metric,value
    results/runs/<agent>/<task>/<label>-<hash8>/seed=<n>/manifest.json   identity, code, machine, cost, hashes

The manifest is written last: a folder without one is a run that did not finish.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dynarep.errors import UserError
from dynarep.experiment import RunConfig, identity

METRICS, MANIFEST = "metrics.csv", "manifest.json"
COLUMNS = ["agent_step", "frame", "update", "metric", "value"]
VERSIONED = ("torch", "numpy", "scipy", "mujoco", "dm-control", "gymnasium", "metaworld", "pandas", "snakemake")


class RecordError(UserError):
    """A run folder that cannot be believed; the message says why."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears whole or not at all: temporary name, fsync, rename.

    What lay at `path` before stays until then. Raises UserError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}. Free space or choose another folder.") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file that is either absent or whole; UserError if it cannot be."""
    with atomic_file(path) as file:
        file.write(content)


def check_writable(folder: Path) -> None:
    """Raise UserError unless files can be made in `folder` (or in what it would be made in); leaves nothing behind."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    probe = existing / f".write-test.{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{folder}: not writable ({existing}: {error.strerror}). Pass --results with a folder you may write to."
        ) from None


@dataclass(frozen=True)
class RunRecord:
    """One believed run."""

    folder: Path
    seed: int
    manifest: dict[str, Any]
    columns: dict[str, np.ndarray]

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a metric's row indices and values, (k,) each, in the order of measurement."""
        rows = np.flatnonzero(self.columns["metric"] == metric)
        return rows, self.columns["value"][rows]

    def last(self, metric: str) -> float:
        """Return a metric's last value; RecordError if the run never recorded it."""
        rows, values = self.series(metric)
        if not len(rows):
            raise RecordError(f"{self.folder / METRICS}: has no metric '{metric}'. The run was made by other code.")
        return float(values[-1])


def write(folder: Path, metrics: str, manifest: Mapping[str, Any]) -> None:
    """Write one run: the metrics, then the manifest that vouches for them."""
    data = metrics.encode()
    files = {METRICS: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "rows": metrics.count("\n") - 1}}
    atomic_write(folder / METRICS, data)
    atomic_write(folder / MANIFEST, (json.dumps({**manifest, "files": files}, indent=1) + "\n").encode())


def read(folder: Path, config: RunConfig, seed: int) -> RunRecord:
    """Read one run and check that it is what its place says.

    Raises:
        RecordError: no run there, one that did not finish, metrics that do not match the manifest's hash, or a
            manifest whose configuration is not `config` or does not hash to its own identity.
    """
    manifest = _manifest(folder)
    wrong = None
    if identity(manifest["config"]) != manifest["identity"]:
        wrong = "its configuration does not hash to its identity"
    elif manifest["identity"] != config.identity():
        wrong = f"it is run {manifest['identity'][:8]}, expected {config.identity()[:8]}"
    elif manifest["seed"] != seed:
        wrong = f"it is seed {manifest['seed']}, expected {seed}"
    if wrong:
        raise RecordError(f"{folder / MANIFEST}: {wrong}. Move the folder away and run the same command again.")
    try:
        data = (folder / METRICS).read_bytes()
    except OSError as error:
        raise RecordError(f"{folder / METRICS}: cannot be read: {error.strerror}. {_again(folder)}") from None
    stated = manifest["files"][METRICS]
    if len(data) != stated["bytes"] or hashlib.sha256(data).hexdigest() != stated["sha256"]:
        raise RecordError(f"{folder / METRICS}: was altered: it does not match the manifest's hash. {_again(folder)}")
    rows = list(csv.reader(io.StringIO(data.decode())))
    columns = dict(zip(rows[0], map(np.array, zip(*rows[1:], strict=True)), strict=True))
    typed = {name: columns[name] if name == "metric" else columns[name].astype(np.float64) for name in COLUMNS}
    return RunRecord(folder, seed, manifest, typed)


def _again(folder: Path) -> str:
    return f"Delete {folder} and run the same command again."


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        parts = [manifest[key] for key in ("config", "identity", "seed", "code", "lock", "files")]
        assert isinstance(parts[0], dict)
        assert isinstance(parts[1], str)
        assert isinstance(manifest["code"]["fingerprint"], str)
        assert isinstance(manifest["files"][METRICS]["sha256"], str)
        assert isinstance(manifest["files"][METRICS]["bytes"], int)
        identity(parts[0])  # refuses NaN
    except FileNotFoundError:
        raise RecordError(
            f"{folder}: no finished run here. Type `make reproduce`, or `dynarep train` for one job."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise RecordError(f"{path}: is not a manifest of dynarep. {_again(folder)}") from None
    return dict(manifest)


def made_by(folder: Path) -> tuple[str, str] | None:
    """Return the code fingerprint and lock hash of a finished run; None if there is none. RecordError if unreadable."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = _manifest(folder)
    return manifest["code"]["fingerprint"], manifest["lock"]


# -- provenance ---------------------------------------------------------------------------------------------------


@cache
def versions() -> dict[str, str]:
    """Return the versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@cache
def git_state(root: Path) -> dict[str, Any]:
    """Return the checkout's commit and whether tracked files differ from it; unknown outside a git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    status = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


@cache
def cpu_model() -> str:
    """Return the processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
