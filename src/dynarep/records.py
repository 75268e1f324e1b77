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
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dynarep import manifests, untrusted
from dynarep.errors import UserError
from dynarep.experiment import RunConfig
from dynarep.hashing import identity

METRICS, MANIFEST = "metrics.csv", "manifest.json"
DEPTH = 4  # of a run's folder below the folder of runs
COLUMNS = ["agent_step", "frame", "update", "metric", "value"]
LARGEST = 1e100  # ours: float32 and its squares stay below; sums and squares of what is above would overflow
LONGEST = 100  # characters of a cell: an array of text is as wide as its widest one
MACHINE = ("device", "threads", "kernels", "mkl", "compiled", "tf32", "deterministic")  # what decides last bits
VERSIONED = ("torch", "numpy", "scipy", "mujoco", "dm-control", "gymnasium", "metaworld", "pandas", "snakemake")


class RecordError(UserError):
    """A run folder that cannot be believed; the message says why, `kind` in a word of `audit.KINDS`."""

    def __init__(self, message: str, kind: str = "malformed") -> None:
        super().__init__(message)
        self.kind = kind


@contextmanager
def atomic_file(path: Path, before: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing that appears whole or not at all: temporary name, fsync, rename.

    What lay at `path` before stays until then, and afterwards at `before`, if that is given. Raises UserError if it
    cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            with suppress(FileNotFoundError):
                path.replace(before)
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


def sweep(path: Path) -> None:
    """Remove what writers of `path` left that were killed; only who keeps others from writing it may ask for this."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        with suppress(OSError):
            part.unlink()


def check_writable(folder: Path) -> None:
    """Raise UserError unless files can be made in `folder` (or in what it would be made in); leaves nothing behind."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        tempfile.TemporaryFile(dir=existing).close()
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
    """Read one run and check that it is what its place says. It may come from anybody (`untrusted`).

    Raises:
        RecordError: no run there, one that did not finish, metrics that do not match the manifest's hash, a manifest
            whose configuration is not `config` or does not hash to its own identity; or what nobody's run is: a link
            in place of the file or one of its folders, a huge or malformed file, other files named in the manifest.
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
        again = "Move the folder away and run the same command again."
        raise RecordError(f"{folder / MANIFEST}: {wrong}. {again}", "identity")
    try:
        data = untrusted.read_bytes(folder / METRICS, untrusted.METRICS_BYTES)
    except FileNotFoundError:
        raise RecordError(f"{folder / METRICS}: cannot be read: it is missing. {_again(folder)}", "missing") from None
    except untrusted.UntrustedError as error:
        raise RecordError(f"{folder / METRICS}: {error}. {_again(folder)}", error.kind) from None
    stated = manifest["files"][METRICS]
    if len(data) != stated["bytes"] or hashlib.sha256(data).hexdigest() != stated["sha256"]:
        raise RecordError(
            f"{folder / METRICS}: was altered: it does not match the manifest's hash. {_again(folder)}", "hash"
        )
    try:
        columns = _columns(data)
    except (ValueError, csv.Error) as error:
        raise RecordError(f"{folder / METRICS}: is not a table of metrics: {error}. {_again(folder)}") from None
    if stated.get("rows", len(columns["value"])) != len(columns["value"]):
        rows = f"{len(columns['value'])} rows, the manifest says {stated['rows']}"
        raise RecordError(f"{folder / METRICS}: was altered: {rows}. {_again(folder)}", "hash")
    return RunRecord(folder, seed, manifest, columns)


def _columns(data: bytes) -> dict[str, np.ndarray]:
    """Parse metrics.csv; ValueError or csv.Error for anything but a table of numbers, and names of metrics.

    Values beyond `LARGEST` are infinite: whoever has them has diverged.
    """
    header, *rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline=""), strict=True)) or [[]]
    if header != COLUMNS:
        raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
    if not rows:
        raise ValueError("it has no rows")
    for line, row in enumerate(rows, 2):
        if len(row) != len(COLUMNS) or max(map(len, row)) > LONGEST:
            raise ValueError(f"line {line} is not {len(COLUMNS)} cells of at most {LONGEST} characters")
    columns = dict(zip(COLUMNS, map(np.array, zip(*rows, strict=True)), strict=True))
    parsed = {name: found if name == "metric" else found.astype(np.float64) for name, found in columns.items()}
    value = parsed["value"]
    value[np.abs(value) > LARGEST] *= np.inf
    return parsed


def _again(folder: Path) -> str:
    return f"Delete {folder} and run the same command again."


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        if link := untrusted.linked(folder, DEPTH):
            raise untrusted.UntrustedError("link", f"{link} is a link; it is not followed")
        content = untrusted.parse_json(untrusted.read_bytes(path, untrusted.MANIFEST_BYTES))
        manifests.check(content, METRICS)
    except FileNotFoundError:
        raise RecordError(
            f"{folder}: no finished run here. Type `make reproduce`, or `dynarep train` for one job.", "missing"
        ) from None
    except untrusted.UntrustedError as error:
        raise RecordError(f"{path}: is not a manifest of dynarep: {error}. {_again(folder)}", error.kind) from None
    return dict(content)


def made_by(folder: Path) -> tuple[str, str] | None:
    """Return the code fingerprint and lock hash of a finished run; None if there is none. RecordError if unreadable."""
    if not os.path.lexists(folder / MANIFEST):
        return None
    found = _manifest(folder)
    return found["code"]["fingerprint"], found["lock"]


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
    return _cpu("model name") or platform.processor() or platform.machine()


@cache
def cpu_kind() -> str:
    """Return a short name that processors share only if they have the same name and the same instructions."""
    said = f"{cpu_model()} {_cpu('flags') or _cpu('Features')}"
    return hashlib.sha256(said.encode()).hexdigest()[:8]


def _cpu(key: str) -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    return ""
