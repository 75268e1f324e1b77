"""The DAG through a real SLURM of one node: `make test-slurm`, as root, with slurm-wlm and munge of the system."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil
import pytest
import torch

from conftest import CHECKOUT
from dynarep import dag, run, scheduler
from dynarep.resources import Place

pytest.importorskip("snakemake_executor_plugin_slurm", reason="pip install -r requirements-slurm.txt")
pytestmark = pytest.mark.slurm

CLUSTER = CHECKOUT / "tests" / "slurm_cluster.sh"
TARGET = "madtd_R1"
SECONDS = 420.0  # for all of it, on a machine that does other things too
SNAKEMAKE = [sys.executable, "-m", "snakemake", "-s", str(CHECKOUT / "Snakefile")]
SNAKEMAKE += ["--profile", str(CHECKOUT / "experiments/profiles/slurm"), TARGET]
SNAKEMAKE += ["--slurm-init-seconds-before-status-checks", "2", "--seconds-between-status-checks", "2"]
SNAKEMAKE += ["--config", "tier=smoke"]
T = TypeVar("T")


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A SLURM of one node; the environment that its clients need."""
    started = subprocess.run([CLUSTER, "start"], capture_output=True, text=True, check=False)
    if started.returncode == 3:  # not root, or not installed
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stderr
    # a shell's own settings, which are not meant for the jobs
    yield {**os.environ, "SLURM_CONF": "/run/dynarep-slurm/slurm.conf", "OMP_NUM_THREADS": "7"}
    subprocess.run([CLUSTER, "stop"], check=True)
    assert not Path("/run/dynarep-slurm").exists()


class Submitted(NamedTuple):
    """A job as SLURM knows it: minutes and MiB are what it may take."""

    number: str
    rule: str
    state: str
    minutes: int
    mib: int
    cores: int
    gres: str


def test_a_figure_is_made_on_a_cluster_and_a_killed_job_is_tried_again_with_more(cluster, tmp_path):
    (tmp_path / "experiments").symlink_to(CHECKOUT / "experiments")
    main = subprocess.Popen(
        SNAKEMAKE, cwd=tmp_path, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        trainer = until(lambda: training(tmp_path))
        environment, killed = trainer.environ(), trainer.environ()["SLURM_JOB_ID"]
        on_loopback = subprocess.run([CLUSTER, "sockets"], capture_output=True, text=True, check=True).stdout.split()
        subprocess.run(["scancel", killed], env=cluster, check=True)
        said = main.communicate(timeout=SECONDS)[0]
    finally:
        main.kill()
    print(said)
    assert main.returncode == 0, said
    assert (tmp_path / "figures/smoke/madtd/R1.svg").stat().st_size > 500

    first, again = attempts(killed, cluster)
    assert (first.cores, first.gres) == (1, "N/A")
    assert (first.state, again.state) == ("CANCELLED", "COMPLETED"), said
    assert f"Error in rule {first.rule}" in said
    assert "Trying to restart job" in said
    assert (again.minutes, again.mib) > (first.minutes, first.mib)
    bundle = next(bundle for bundle in dag.bundles(dag.load("smoke")[1]) if bundle.name == first.rule)
    asked = Place().resources(bundle.jobs)
    assert (first.minutes, first.mib) == (asked["runtime"](None, 1), asked["mem_mb"](None, 1))

    assert (environment["OMP_NUM_THREADS"], environment["MUJOCO_GL"]) == ("1", "disabled")
    assert scheduler.VARIABLE not in environment, "a job would look for its scheduler on its own machine"
    assert not trainer.is_running()
    assert on_loopback
    assert all(address.startswith("127.") for address in on_loopback), on_loopback

    job = bundle.jobs[0]
    run.train(job, tmp_path / "here")
    for folder in job.folders():
        there = tmp_path / "results" / "runs" / folder / "metrics.csv"
        assert there.read_bytes() == (tmp_path / "here" / folder / "metrics.csv").read_bytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU: see test_device.py")
def test_jobs_ask_for_a_gpu_and_say_so_where_there_is_none(cluster, tmp_path):
    """The cluster's GPU is a name: how a job is placed can be seen, and how it fails."""
    (tmp_path / "experiments").symlink_to(CHECKOUT / "experiments")
    before = len(submitted(cluster))
    command = [*SNAKEMAKE, "device=cuda", "workers=1", "--retries", "0"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=cluster, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert ended.returncode == 1, ended.stderr
    jobs = submitted(cluster)[before:]
    assert {(job.state, job.gres, job.cores) for job in jobs} == {("FAILED", "gres:gpu:1", 2)}, ended.stderr
    logs = [path.read_text() for path in tmp_path.glob("results/runs/log/train*.log")]
    assert len(logs) == len(jobs)
    assert all(len(log.splitlines()) == 1 and "--device cuda" in log for log in logs), logs


def training(home: Path) -> psutil.Process | None:
    """Return a process that trains for this home, if there is one."""
    for process in psutil.process_iter():
        try:
            if process.cmdline()[1:4] == ["-m", "dynarep", "train"] and process.environ()["DYNAREP_HOME"] == str(home):
                return process
        except (psutil.Error, KeyError):
            pass
    return None


def attempts(number: str, environment: dict[str, str]) -> list[Submitted]:
    """Return all jobs of the rule of one job, in the order of their submission."""
    jobs = submitted(environment)
    rule = next(job.rule for job in jobs if job.number == number)
    return [job for job in jobs if job.rule == rule]


def submitted(environment: dict[str, str]) -> list[Submitted]:
    """Return all jobs that the cluster knows, in the order of their submission."""
    command = ["squeue", "--noheader", "--states=all", "--sort=i", "--format=%i %k %T %l %m %c %b"]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    jobs = []
    for number, comment, state, limit, memory, cores, gres in map(str.split, lines):
        minutes = sum(int(part) * factor for part, factor in zip(reversed(limit.split(":")), (0, 1, 60), strict=False))
        rule, mib = comment.removeprefix("rule_"), int(memory.removesuffix("M"))
        jobs.append(Submitted(number, rule, state, minutes, mib, int(cores), gres))
    return jobs


def until(found: Callable[[], T | None], seconds: float = SECONDS / 2) -> T:
    """Wait for something and return it."""
    patience = time.monotonic() + seconds
    while (thing := found()) is None:
        assert time.monotonic() < patience, "waited in vain"
        time.sleep(0.1)
    return thing
