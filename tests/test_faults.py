"""A job or the scheduler killed, a checkpoint torn, the disk full: nothing torn is believed, the bytes are the same."""

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

import synthetic
from conftest import CHECKOUT
from dynarep import cli, records, run, scheduler
from dynarep.errors import UserError
from dynarep.experiment import Job
from dynarep.figures import drawing
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
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if self == newest:
            return replace(self, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run._save(protocol, this, list(this.seeds), newest, history)
    monkeypatch.undo()
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
        if error.errno != errno.ENOSPC:
            raise
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


@pytest.mark.slow
def test_a_figure_that_does_not_fit_is_one_message_and_leaves_no_torn_file(new_home, disk, capsys):
    experiment = synthetic.trial(new_home)
    synthetic.write_runs(experiment, "smoke", new_home / "results" / "runs", lambda *_: 1.0)
    draw = ["figure", "--experiment", "Y1", "--tier", "smoke", "--figures"]
    cli.main([*draw, str(new_home / "figures")])
    whole = {path.name: path.read_bytes() for path in (new_home / "figures").rglob("Y1.*")}
    assert len(whole) == 4
    fill(disk, leave=sum(-(-len(whole[f"Y1.{kind}"]) // 4096) for kind in ("csv", "svg")) + 1)
    with pytest.raises(SystemExit) as stop:
        cli.main([*draw, str(disk / "figures")])
    assert stop.value.code == 2
    assert re.search(r"Y1\.(pdf|png): cannot be written: No space left on device", capsys.readouterr().err)
    left = {path.name: path.read_bytes() for path in disk.rglob("*") if path.is_file() and path.name != "ballast"}
    assert left.items() < whole.items(), "a torn figure"
    (disk / "ballast").unlink()
    cli.main([*draw, str(disk / "figures")])
    assert {path.name: path.read_bytes() for path in disk.rglob("Y1.*")} == whole


def test_a_read_only_disk_is_one_message_before_anything_is_computed(new_home, disk, monkeypatch, capsys):
    experiment = synthetic.trial(new_home)
    results = new_home / "results" / "runs"
    synthetic.write_runs(experiment, "smoke", results, lambda *_: 1.0)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    monkeypatch.setattr(run, "_build", lambda *_: pytest.fail("trains what it cannot write"))
    monkeypatch.setattr(drawing, "figure", lambda *_: pytest.fail("draws what it cannot write"))
    job = ["--experiment", "Y1", "--variant", "sac", "--task", "Hopper-v5", "--seeds", "0", "--tier", "smoke"]
    for command in (
        ["train", *job, "--results", str(disk / "runs")],
        ["figure", "--experiment", "Y1", "--tier", "smoke", "--figures", str(disk)],
        ["claims", "--tier", "smoke", "--out", str(disk / "claims.json")],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(command)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert "Read-only file system" in said
        assert len(said.splitlines()) == 1, said


# -- kill -9 of the scheduler -------------------------------------------------------------------------------------


def test_a_folder_has_one_scheduler_at_a_time_and_none_is_kept_out_by_a_dead_one(tmp_path, monkeypatch):
    monkeypatch.setenv(scheduler.VARIABLE, "1")
    stale = tmp_path / scheduler.SNAKEMAKE_LOCKS / "0.input.lock"
    stale.parent.mkdir(parents=True)
    stale.touch()
    first = scheduler.Turn(tmp_path)
    assert not stale.exists(), "a dead Snakemake's lock keeps others out"
    assert scheduler.VARIABLE not in os.environ, "jobs would take the process that started the scheduler for it"
    dry_run = scheduler.Turn(tmp_path)
    first.take()
    assert os.environ[scheduler.VARIABLE] == str(os.getpid())
    stale.touch()
    second = scheduler.Turn(tmp_path)
    assert stale.exists(), "the lock of a living Snakemake was removed"
    for late in (dry_run, second):
        with pytest.raises(UserError, match=rf"process {os.getpid()} is making results here already"):
            late.take()
    first._file.close()
    for late in (dry_run, second):  # their plans are from before: what they would make is there
        with pytest.raises(UserError, match="Type the same command again"):
            late.take()
    scheduler.Turn(tmp_path).take(here=False)
    assert scheduler.VARIABLE not in os.environ, "a job on another machine would look for the scheduler there"


@pytest.mark.parametrize(("whose", "lives"), [("parent", True), ("stranger", False), ("", True)])
def test_a_job_stops_when_its_scheduler_is_gone_and_only_then(whose, lives):
    number = {"parent": str(os.getpid()), "stranger": str(2**22 + 1), "": ""}[whose]
    code = "import time; from dynarep import scheduler; scheduler.watch(); time.sleep(1.5)"
    env = {**os.environ, scheduler.VARIABLE: number} if whose else os.environ
    done = subprocess.run([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == (0 if lives else -signal.SIGTERM), done.stderr
    assert ("scheduler of this job is gone" in done.stderr) == (not lives)


LONG = {  # one job of a few seconds
    "variants": {"sac": {"label": "SAC", "algorithm": "sac", "agent": {"updates_per_step": 1}}},
    "runs": {
        "small": {
            **synthetic.TRIAL["runs"]["small"],
            "settings": {},
            "budget": {
                "smoke": [
                    {
                        **{"tasks": ["Hopper-v5"], "seeds": 2, "width": 16, "batch_size": 32},
                        **{"steps": 600, "random_steps": 64, "eval_every": 300, "eval_episodes": 1},
                    }
                ]
            },
        }
    },
    "figure": {"panels": [{"kind": "final", "metrics": {"return/final": "return"}, "label": "final return"}]},
    "claims": [],
}
SNAKEMAKE = [sys.executable, "-m", "snakemake", "-s", str(CHECKOUT / "Snakefile"), "--config", "tier=smoke"]
SNAKEMAKE += ["--profile", str(CHECKOUT / "experiments/profiles/default"), "--cores", "1"]


@pytest.mark.slow
def test_the_same_command_goes_on_after_the_scheduler_was_killed(tmp_path, monkeypatch):
    """Its job saves its state and stops; locks, marks of incomplete files and the job itself are no obstacle."""
    home, runs = tmp_path / "home", tmp_path / "home" / "results" / "runs"
    (home / "experiments" / "tiers").mkdir(parents=True)
    for tier in ("smoke", "ci", "reduced", "paper"):
        (home / f"experiments/tiers/{tier}.yaml").write_text(f"{{tier: {tier}, purpose: x, budget: {{seeds: 2}}}}")
    monkeypatch.setenv("DYNAREP_HOME", str(home))
    (job,) = synthetic.trial(home, **LONG).jobs("smoke")

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(SNAKEMAKE, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    first = start()
    until(lambda: (home / scheduler.LOCK).exists() and (home / scheduler.LOCK).read_text())
    second = start()
    until(lambda: list(runs.glob("sac/*/*/.seeds=0-1.lock")))
    trainer = next(p for p in psutil.Process(first.pid).children(recursive=True) if "train" in p.cmdline())
    until(lambda: hears(trainer.pid, signal.SIGTERM))  # from its first step on: before, there is no state to save
    trainer.suspend()  # however fast it is, it is at work when its scheduler is killed
    said = second.communicate()[0]
    assert second.returncode == 1
    assert f"process {first.pid} is making results here already. Wait for it" in said
    assert "Traceback" not in said
    first.kill()
    again = start()
    trainer.resume()
    first.communicate()
    said = again.communicate()[0]
    assert again.returncode == 0, said
    assert not trainer.is_running()
    for folder in job.folders():
        resumed = json.loads((runs / folder / "manifest.json").read_text())["resumed"]
        assert len(resumed) == 1, "the killed scheduler's job did not save its state"
    assert (home / "figures/smoke/beyond/Y1.svg").exists()
    run.train(job, tmp_path / "whole")
    assert metrics(runs, job) == metrics(tmp_path / "whole", job)
    left = [path for path in runs.rglob(".*") if path.is_file()]
    left += [*home.glob(".snakemake/locks/*"), *home.glob(".snakemake/incomplete/*")]
    assert not left


def hears(process: int, number: int) -> bool:
    """Return whether a process has a handler of its own for a signal."""
    (mask,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


def until(there: Callable[[], Any], seconds: float = 120.0) -> None:
    """Wait for something."""
    patience = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < patience, "waited in vain"
        time.sleep(0.1)
