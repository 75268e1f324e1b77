"""One job: the same bytes twice, in any block, killed or not; and what it refuses."""

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from conftest import CHECKOUT
from dynarep import cli, envs, records, run
from dynarep.configs import EnvironmentConfig
from dynarep.configs.mad_td import MadTDConfig
from dynarep.configs.mbpo import MBPOConfig
from dynarep.configs.online import OnlineConfig
from dynarep.configs.policy_evaluation import PolicyEvaluationConfig
from dynarep.configs.sac import SACConfig
from dynarep.envs import base
from dynarep.errors import UserError
from dynarep.experiment import Job, RunConfig, load
from dynarep.protocols import Metrics, Protocol

FILES = {"R1": "madtd/R1_generalisation.yaml", "C": "ftfl/C_reward_model.yaml"}


@functools.cache
def job(experiment: str, variant: str, seeds: tuple[int, ...] = (0, 1)) -> Job:
    jobs = load(CHECKOUT / "experiments" / FILES[experiment]).jobs("smoke")
    return replace(next(j for j in jobs if j.variant == variant and j.task == "walker-walk"), seeds=seeds)


def metrics(results: Path, done: Job) -> dict[int, bytes]:
    return {s: (results / f / "metrics.csv").read_bytes() for s, f in zip(done.seeds, done.folders(), strict=True)}


SMALL = {"width": 16, "batch_size": 32, "updates_per_step": 1}
MODEL = {"model_width": 16, "model_batch_size": 32, "holdout_draws": 64, "model_chunks": 1, "chunk_steps": 4}
MBPO = MBPOConfig(**SMALL, **MODEL, retrain_every=16, rollouts_per_step=32, synthetic_capacity=256)
ONLINE = OnlineConfig(steps=80, random_steps=60, eval_every=40, eval_episodes=1, measure_every=10)
MAD_TD = MadTDConfig(width=16, batch_size=32, updates_per_step=8)
HELD_OUT = ONLINE.model_copy(update={"held_out": 0.05, "held_out_rows": 32, "horizon_margin": 1})
POLICY = PolicyEvaluationConfig(transitions=200, model_updates=8, chunk=4, updates=70, margin=1)
LOOPS = {
    "sac": (SACConfig(**SMALL), ONLINE),
    "mbpo": (MBPO, ONLINE),
    "simulator": (MBPO.model_copy(update={"rollouts": "simulator"}), ONLINE),
    "policy evaluation": (MBPO, POLICY),
    "mad_td, UTD 1": (MAD_TD.model_copy(update={"updates_per_step": 1}), HELD_OUT),
    "mad_td, UTD 8": (MAD_TD, HELD_OUT),
}


def loop(name: str, seeds: tuple[int, ...] = (0, 1)) -> Job:
    """A job that no experiment has: a task whose episodes end early."""
    environment = EnvironmentConfig(suite="gymnasium", task="Hopper-v5")
    return Job("none", "none", name, "smoke", RunConfig(environment, *LOOPS[name]), seeds)


TRAIN = ["train", "--experiment", "C", "--variant", "mbpo", "--task", "walker-walk"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Job], Path]:
    """Return the results of a job, trained at the first call; a test that changes them takes a copy."""
    folders: dict[str, Path] = {}

    def results(this: Job) -> Path:
        if this.key() not in folders:
            folder = tmp_path_factory.mktemp("trained")
            run.train(this, folder)
            folders[this.key()] = folder
        return folders[this.key()]

    return results


KINDS = [("R1", "utd16_zero"), ("R1", "utd16_five"), ("C", "mbpo"), ("C", "ftfl")]


@pytest.mark.parametrize(("experiment", "variant"), KINDS)
def test_a_runs_bytes_are_the_same_twice_and_in_every_block(tmp_path, trained, experiment, variant):
    pair = job(experiment, variant)
    for seeds in ((0,), (3, 0, 1)):
        this = job(experiment, variant, seeds)
        run.train(this, tmp_path / str(seeds))
        same = metrics(tmp_path / str(seeds), this)[0] == metrics(trained(pair), pair)[0]
        assert same, f"seed 0 differs between blocks {pair.seeds} and {seeds}"


@pytest.mark.parametrize(("experiment", "variant"), [KINDS[1], KINDS[3]])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_stopped_job_continues_to_the_same_bytes(tmp_path, trained, experiment, variant, stop_after):
    this = job(experiment, variant)
    calls = []

    def stop(done, total, now):
        calls.append(done)
        if len(calls) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    longer = tmp_path / "stopped"
    if stop_after == 1:
        with pytest.raises(run.StoppedError):
            run.train(this, longer, stop)
        assert not any((longer / f / "manifest.json").exists() for f in this.folders())
        assert list((longer / this.config.folder()).glob(".*.checkpoint"))
    run.train(this, longer)
    assert metrics(longer, this) == metrics(trained(this), this)
    manifest = json.loads((longer / this.folders()[0] / "manifest.json").read_text())
    assert bool(manifest["resumed"]) == (stop_after == 1)
    assert not list((longer / this.config.folder()).glob(".*.checkpoint"))


def test_a_job_killed_outright_continues_from_its_checkpoint_to_the_same_bytes(tmp_path, trained):
    this = job("R1", "utd16_five")
    script = (
        "import os, signal; from dynarep import run; from test_run import job; from pathlib import Path\n"
        "run.CHECKPOINT_SECONDS = 0\n"
        "kill = lambda done, total, now: os.kill(os.getpid(), signal.SIGKILL) if done == total else None\n"
        f"run.train(job('R1', 'utd16_five'), Path({str(tmp_path / 'killed')!r}), kill)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    killed = subprocess.run([sys.executable, "-c", script], env=env, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert list((tmp_path / "killed" / this.config.folder()).glob(".*.checkpoint"))
    run.train(this, tmp_path / "killed")
    assert metrics(tmp_path / "killed", this) == metrics(trained(this), this)


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_continues_to_the_same_bytes_wherever_it_is_stopped(tmp_path, name):
    """Stopped as often as it advances: what the protocols' own tests do in memory, here through a file."""
    this = loop(name)
    run.train(this, tmp_path / "whole")
    stops = 0

    def stop(done, total, now):
        os.kill(os.getpid(), signal.SIGTERM)

    while True:
        try:
            run.train(this, tmp_path / "stopped", stop)
        except run.StoppedError:
            stops += 1
            continue
        break
    assert stops >= 2
    assert metrics(tmp_path / "stopped", this) == metrics(tmp_path / "whole", this)
    history = json.loads((tmp_path / "stopped" / this.folders()[0] / "manifest.json").read_text())["resumed"]
    assert len(history) == stops


class Counting(Protocol):
    """Counts to a thousand, a second each by the clock of the test; its checkpoint takes three."""

    def __init__(self, *arguments: object) -> None:
        self.metrics, self.total = Metrics([0, 1]), 1000

    def advance(self):
        self.done += 1
        return {}

    def state(self):
        return {}

    def load(self, state):
        raise AssertionError


def test_saving_takes_two_percent_of_the_time_at_most(tmp_path, monkeypatch):
    now, saves = [0.0], []

    def save(*arguments: object) -> None:
        saves.append(now[0])
        now[0] += 3.0

    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run, "_save", save)
    monkeypatch.setattr(run, "_build", lambda *arguments: Counting())
    run.train(job("C", "mbpo"), tmp_path, lambda *arguments: now.__setitem__(0, now[0] + 1.0))
    assert saves[0] == pytest.approx(run.CHECKPOINT_SECONDS, abs=1.1)
    assert len(saves) > 4
    assert all(later - earlier >= 50 * 3.0 for earlier, later in pairwise(saves))


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(tmp_path, capsys):
    """The limit on a file's size stands for a full disk: the write fails in the middle."""
    this, path = loop("sac"), tmp_path / "checkpoint"
    protocol = run._build(this, [0, 1])
    run._save(protocol, this, [0, 1], path, [])
    before = path.read_bytes()
    protocol.advance()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match="checkpoint: cannot be written: File too large"):
            run._save(protocol, this, [0, 1], path, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    assert path.read_bytes() == before
    assert run._resume(run._build(this, [0, 1]), this, [0, 1], path) == []
    assert not capsys.readouterr().err


def test_a_torn_checkpoint_is_said_and_started_over(tmp_path, trained, capsys):
    this = job("C", "mbpo")
    folder = tmp_path / "torn" / this.config.folder()
    folder.mkdir(parents=True)
    (folder / ".seeds=0-1.checkpoint").write_bytes(b"PK\x03\x04 half a file")
    run.train(this, tmp_path / "torn")
    assert "starting over" in capsys.readouterr().err
    assert metrics(tmp_path / "torn", this) == metrics(trained(this), this)


def test_finished_seeds_are_not_trained_again_and_missing_ones_are(tmp_path):
    both = job("C", "mbpo", (0, 1))
    assert run.train(both, tmp_path) == [0, 1]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.csv")}
    assert run.train(both, tmp_path) == []
    assert run.train(job("C", "mbpo", (0, 1, 2)), tmp_path) == [2]
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_two_processes_cannot_train_the_same_job(tmp_path):
    this = job("C", "mbpo")
    with (
        run._only_one(tmp_path / this.config.folder() / ".seeds=0-1.lock"),
        pytest.raises(UserError, match="another process"),
    ):
        run.train(this, tmp_path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: _one_digit(f / "metrics.csv"), "altered"),
        (lambda f: (f / "metrics.csv").write_bytes(b""), "altered"),
        (lambda f: (f / "metrics.csv").unlink(), "cannot be read"),
        (lambda f: (f / "manifest.json").write_bytes(b"{}"), "not a manifest"),
        (lambda f: _edit(f, "seed", 5), "seed 5"),
        (lambda f: _edit(f, "identity", "0" * 64), "does not hash"),
        (lambda f: _edit(f, "config", {"format": 1}), "does not hash"),
    ],
)
def test_a_run_that_does_not_match_its_manifest_is_refused(tmp_path, trained, damage, says):
    this = job("C", "mbpo", (0,))
    shutil.copytree(trained(this), tmp_path, dirs_exist_ok=True)
    folder = tmp_path / this.folders()[0]
    records.read(folder, this.config, 0)
    damage(folder)
    with pytest.raises(records.RecordError, match=says):
        records.read(folder, this.config, 0)


def _one_digit(path: Path) -> None:
    text = path.read_bytes()
    path.write_bytes(text[:-2] + (b"1" if text[-2:-1] != b"1" else b"2") + b"\n")


def _edit(folder: Path, key: str, value: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {key: value}))


def test_a_run_of_another_configuration_is_refused(trained):
    this, other = job("C", "mbpo", (0,)), job("C", "ftfl", (0,))
    with pytest.raises(records.RecordError, match="expected"):
        records.read(trained(this) / this.folders()[0], other.config, 0)


def test_a_run_made_by_other_code_is_refused_until_redone(tmp_path, trained):
    this = job("C", "mbpo", (0,))
    shutil.copytree(trained(this), tmp_path, dirs_exist_ok=True)
    before = metrics(tmp_path, this)
    _edit(tmp_path / this.folders()[0], "code", {"fingerprint": "f" * 64})
    with pytest.raises(records.RecordError, match="--redo"):
        run.train(this, tmp_path)
    assert run.train(this, tmp_path, redo=True) == [0]
    assert metrics(tmp_path, this) == before


def test_a_full_disk_leaves_no_torn_file(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        records.atomic_write(tmp_path / "metrics.csv", b"1,2,3\n")
    assert list(tmp_path.iterdir()) == []


def test_variants_of_a_seed_meet_the_same_data_and_start_from_the_same_weights(trained):
    """Pairing: before learning, both arms measure the same errors, but for those of minibatches with model data."""
    arms = [job("R1", v) for v in ("utd16_zero", "utd16_five")]
    first = []
    for arm in arms:
        record = records.read(trained(arm) / arm.folders()[0], arm.config, 0)
        metrics = record.columns["metric"]
        rows = (record.columns["update"] == 0) & ~np.array([name.startswith("critic/") for name in metrics])
        first.append(list(zip(record.columns["metric"][rows], record.columns["value"][rows], strict=True)))
    assert first[0] == first[1]
    assert len(first[0]) > 10


@pytest.mark.slow
def test_sigterm_to_the_command_line_stops_it_within_seconds_and_the_same_command_continues(tmp_path):
    command = [sys.executable, "-m", "dynarep", *TRAIN, "--seeds", "0-1", "--tier", "ci", "--results", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = next(line for line in process.stderr if "/600" in line)  # the first progress line: under way
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    err = seen + process.communicate(timeout=60)[1]
    assert time.monotonic() - started < 30
    assert process.returncode == 130, err
    assert subprocess.run(command, check=False).returncode == 0


def test_a_missing_rendering_library_is_one_message(monkeypatch):
    """What `MUJOCO_GL=osmesa` does on a machine without it."""

    def missing(module: str) -> None:
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    monkeypatch.setattr(base.importlib, "import_module", missing)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(envs.EnvError, match=r"MUJOCO_GL=osmesa.*unset MUJOCO_GL.*libosmesa6"):
        envs.make("dmc", "walker-walk")


def test_a_job_that_cannot_start_leaves_no_folder_behind(tmp_path, monkeypatch, capsys):
    def broken(*arguments: object, **settings: object) -> None:
        raise envs.EnvError("no simulator here")

    monkeypatch.setattr(envs, "make", broken)
    with pytest.raises(SystemExit) as stop:
        cli.main([*TRAIN, "--seeds", "0", "--tier", "smoke", "--results", str(tmp_path / "runs")])
    assert stop.value.code == 2
    assert "no simulator here" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.*"))
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
