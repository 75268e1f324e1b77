"""What is left when a job or the scheduler is killed, a checkpoint torn, the disk full: nothing torn, the same bytes."""

import errno
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from conftest import CHECKOUT
from dynarep import cli, records, run, scheduler
from dynarep.errors import UserError
from dynarep.experiment import Job
from test_run import LOOPS, loop, metrics

# -- kill -9 of a job ---------------------------------------------------------------------------------------------

KILLS = 20
LOOPS["ftfl"] = (LOOPS["mbpo"][0].model_copy(update={"target": "direct", "normalise_targets": True}), LOOPS["mbpo"][1])


def in_a_process(work: Callable[[], None]) -> int:
    """Run in a process of its own, which starts at once because it is a copy of this one; return its status."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trained_until(event: int, this: Job, results: Path) -> Callable[[], None]:
    """Train, save after every step, and die at an event: a step, or a moment within the writing of any file.

    If it lives to the end it leaves the hash of its final state (weights, optimisers, replay) in `results`.
    """

    def work() -> None:
        count, built = itertools.count(1), []

        def tick(*arguments: object) -> None:
            if next(count) == event:
                os.kill(os.getpid(), signal.SIGKILL)

        def ticking(real: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(real)
            def call(*arguments: Any, **settings: Any) -> Any:
                tick()
                value = real(*arguments, **settings)
                tick()
                return value

            return call

        run.CHECKPOINT_SECONDS, run.SAVES_APART = 0.0, 0.0
        torch.save, os.fsync = ticking(torch.save), ticking(os.fsync)
        Path.replace, Path.unlink = ticking(Path.replace), ticking(Path.unlink)
        build = run._build
        run._build = lambda *arguments: built.append(build(*arguments)) or built[0]
        if run.train(this, results, tick) == list(this.seeds):
            (results / "state").write_text(digest(built[0].state()))

    return work


def digest(state: Any) -> str:
    """Hash nested state: every bit of every tensor counts."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                sha.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for part in value:
                add(part)
        elif isinstance(value, torch.Tensor | np.ndarray):
            sha.update(np.ascontiguousarray(value).tobytes())
        else:
            sha.update(repr(value).encode())

    add(state)
    return sha.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mad_td, UTD 1", "ftfl", "mbpo", "sac"])
def test_a_job_killed_anywhere_ends_with_the_same_bytes_and_weights(tmp_path, name):
    """`kill -9` at 20 random moments of jobs of two seeds, also of jobs that were killed before, then once more."""
    this = loop(name)
    run.train(this, tmp_path / "first")  # what is imported now need not be imported in every process
    assert in_a_process(trained_until(0, this, tmp_path / "whole")) == 0
    assert metrics(tmp_path / "whole", this) == metrics(tmp_path / "first", this)
    draw = np.random.default_rng(list(name.encode()))
    killed = compared = 0
    for attempt in itertools.count():
        if killed >= KILLS:
            break
        results = tmp_path / f"attempt {attempt}"
        results.mkdir()
        while (status := in_a_process(trained_until(int(draw.integers(1, 60)), this, results))) == -signal.SIGKILL:
            killed += 1
            torn = [f for f in this.folders() if (results / f / "manifest.json").exists()]
            for folder in torn:
                records.read(results / folder, this.config, int(folder.name.removeprefix("seed=")))
        assert status == 0
        assert metrics(results, this) == metrics(tmp_path / "whole", this)
        assert not [p for p in results.rglob(".*") if p.is_file()], "a checkpoint, lock or part of a file is left"
        if (results / "state").exists():  # else the last process found a seed finished
            compared += 1
            assert (results / "state").read_text() == (tmp_path / "whole" / "state").read_text()
    assert compared >= 2


# -- torn checkpoints ---------------------------------------------------------------------------------------------


def _cut(at: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(at * path.stat().st_size)])


def _one_bit(path: Path) -> None:
    """In the middle, where the numbers are: only a checksum can tell."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


TORN = {
    "empty": _cut(0),
    "half": _cut(0.5),
    "all but the end": _cut(0.99),
    "one bit": _one_bit,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": Path.unlink,  # killed between the two renames
}


@pytest.fixture(scope="module")
def twice_saved(tmp_path_factory) -> tuple[Path, int]:
    """Results of a job that was stopped twice; units done at the checkpoint before the newest."""
    results, this, done = tmp_path_factory.mktemp("saved"), loop("sac"), []
    for _ in range(2):
        with pytest.raises(run.StoppedError):
            run.train(this, results, lambda now, *_: done.append(now) or os.kill(os.getpid(), signal.SIGTERM))
    return results, done[0]


@pytest.mark.parametrize("damage", TORN)
def test_of_a_torn_checkpoint_the_one_before_is_used_and_said(tmp_path, twice_saved, damage, capsys):
    this, (saved, before) = loop("sac"), twice_saved
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    newest, protocol = run._checkpoint(tmp_path, this), run._build(this, [0, 1])
    TORN[damage](newest)
    history = run._resume(protocol, this, [0, 1], newest)
    said = capsys.readouterr().err
    assert f"{newest.name}.before: continuing from {before} of" in said
    assert ("not a usable checkpoint" in said) == (damage != "missing")
    assert protocol.done == before
    assert [stop["stopped_at"] for stop in history] == [before]


def test_a_job_whose_newest_checkpoint_is_torn_ends_with_the_same_bytes(tmp_path, twice_saved):
    this = loop("sac")
    shutil.copytree(twice_saved[0], tmp_path / "runs")
    _one_bit(run._checkpoint(tmp_path / "runs", this))
    run.train(this, tmp_path / "runs")
    run.train(this, tmp_path / "whole")
    assert metrics(tmp_path / "runs", this) == metrics(tmp_path / "whole", this)


def test_a_torn_checkpoint_never_takes_the_place_of_the_one_before(tmp_path, twice_saved, monkeypatch):
    """Killed between the two renames of the next save, there must still be a whole one."""
    this = loop("sac")
    shutil.copytree(twice_saved[0], tmp_path, dirs_exist_ok=True)
    newest = run._checkpoint(tmp_path, this)
    _one_bit(newest)
    protocol = run._build(this, list(this.seeds))
    history = run._resume(protocol, this, list(this.seeds), newest)
    replaced = []

    def killed(self: Path, target: Path) -> None:
        replaced.append(self)
        if self != newest:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run._save(protocol, this, list(this.seeds), newest, history)
    monkeypatch.undo()
    assert newest not in replaced or not newest.exists()
    assert run._read(run._before(newest))["done"] == twice_saved[1]


def test_both_checkpoints_torn_start_over(tmp_path, twice_saved, capsys):
    this = loop("sac")
    shutil.copytree(twice_saved[0], tmp_path, dirs_exist_ok=True)
    newest = run._checkpoint(tmp_path, this)
    for path in (newest, run._before(newest)):
        _one_bit(path)
    assert run._resume(run._build(this, [0, 1]), this, [0, 1], newest) == []
    said = capsys.readouterr().err.splitlines()
    assert ["trying the one before" in said[0], "starting over" in said[1]] == [True, True]


# -- a full or read-only disk -------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two MiB; tests are skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, leave: int = 0) -> None:
    """Fill a disk but for `leave` pages of 4 KiB."""
    ballast = os.open(disk / "ballast", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        while True:
            os.write(ballast, bytes(4096))
    except OSError as error:
        assert error.errno == errno.ENOSPC
        os.ftruncate(ballast, os.fstat(ballast).st_size // 4096 * 4096 - 4096 * leave)
    finally:
        os.close(ballast)


@pytest.mark.parametrize(
    ("when", "leave", "says"),
    [
        ("metrics", 0, "metrics.csv: cannot be written: No space left on device"),
        ("manifest", 1, "manifest.json: cannot be written: No space left on device"),
        ("checkpoint", 1, "checkpoint: cannot be written: No space left on device"),
        ("folder", 0, ""),
    ],
)
def test_a_full_disk_is_one_message_and_nothing_torn_is_accepted_later(tmp_path, disk, monkeypatch, when, leave, says):
    """The disk fills up just before; when there is room again, the same command ends with the same bytes."""
    this, results = loop("sac", (0,)), disk / "runs"
    run.train(this, tmp_path / "whole")
    write, save = records.atomic_write, torch.save

    def full_at_write(path: Path, content: bytes) -> None:
        if path.stem == when:
            fill(disk, 0)
        elif when == "manifest":
            fill(disk, -(-len(content) // 4096))
        write(path, content)

    def full_at_save(content: object, file: object) -> None:
        fill(disk, leave)
        save(content, file)

    if when == "checkpoint":
        monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
        monkeypatch.setattr(torch, "save", full_at_save)
    elif when == "folder":
        fill(disk)
    else:
        monkeypatch.setattr(records, "atomic_write", full_at_write)
    if says:
        with pytest.raises(UserError, match=says):
            run.train(this, results)
        assert records.made_by(results / this.folders()[0]) is None, "a torn run is taken for one"
    else:
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            run.train(this, results)
    assert not list(disk.rglob("*.part"))
    monkeypatch.undo()
    (disk / "ballast").unlink()
    assert run.train(this, results) == [0]
    assert metrics(results, this) == metrics(tmp_path / "whole", this)
