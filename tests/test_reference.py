"""Committed runs: figures, verdicts and the report without training, to the same bytes; and the DAG's own freedoms."""

import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import synthetic
from conftest import CHECKOUT
from dynarep import dag, run
from dynarep.errors import UserError
from test_perturbations import TINY
from test_run import metrics

SNAKEMAKE = [sys.executable, "-m", "snakemake", "-s", str(CHECKOUT / "Snakefile")]
SNAKEMAKE += ["--profile", str(CHECKOUT / "experiments/profiles/default")]
TIER = "{tier: smoke, purpose: x, jobs_per_process: 3, budget: {seeds: 2, seeds_per_job: 1}}"


def snakemake(home: Path, *arguments: str) -> str:
    done = subprocess.run([*SNAKEMAKE, *arguments], cwd=home, capture_output=True, text=True, check=False)
    logs = "".join(f"\n{p}:\n{p.read_text()[-2000:]}" for p in home.glob("results/runs/log/*.log"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:] + logs
    return done.stdout + done.stderr


def tree(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_committed_runs_are_drawn_to_the_same_bytes_without_training(tmp_path, new_home, monkeypatch):
    (new_home / "experiments" / "tiers" / "smoke.yaml").write_text(TIER)
    jobs = synthetic.trial(new_home, **TINY).jobs("smoke")
    clone = tmp_path / "clone"
    shutil.copytree(new_home / "experiments", clone / "experiments")
    snakemake(new_home, "beyond_Y1", "--cores", "2", "--config", "tier=smoke")
    runs = new_home / "results" / "runs"
    the_dag_makes_the_same_bytes_as_blocks_in_another_order(jobs, runs, tmp_path / "by hand")

    for folder in {folder.parts[0] for job in jobs for folder in job.folders()}:
        shutil.copytree(runs / folder, clone / "results" / "reference" / folder)
    shuffle_times(clone)
    before = tree(clone / "results" / "reference")
    said = snakemake(clone, "--cores", "2", "--config", "tier=smoke", "from=reference")
    assert "train" not in re.sub(r"[\w./-]*/test_\w+", "", said)
    assert {path.name for path in (clone / "results" / "runs").iterdir()} == {"claims", "log", "report"}
    assert tree(clone / "figures") == tree(new_home / "figures")
    assert (clone / "results/runs/report/smoke.html").stat().st_size > 1000
    assert tree(clone / "results" / "reference") == before
    assert "Nothing to be done" in snakemake(clone, "--cores", "2", "--config", "tier=smoke", "from=reference")


def the_dag_makes_the_same_bytes_as_blocks_in_another_order(jobs, runs, by_hand):
    """There: two processes side by side, each seed alone. Here: both seeds together, the last job first."""
    assert {len(job.seeds) for job in jobs} == {1}
    for job in reversed(jobs):
        if job.seeds == (0,):
            both = replace(job, seeds=(0, 1))
            run.train(both, by_hand)
            assert metrics(runs, both) == metrics(by_hand, both), job.key()


def shuffle_times(home: Path) -> None:
    """As a clone or a copy may leave them: in any order, some long ago."""
    draw, now = random.Random(6), time.time()
    for path in home.rglob("*"):
        if path.is_file():
            os.utime(path, (then := now - draw.uniform(0, 1e8), then))


def test_of_the_reference_only_what_is_there_is_shown(new_home):
    """Nobody can make what is missing: an experiment without runs is left out, one with some says how many."""
    with pytest.raises(UserError, match=r"reference: holds no runs of tier 'smoke', but of: none"):
        dag.load("smoke", "reference")
    with pytest.raises(UserError, match=r"unknown source of runs 'referenz'\. Did you mean 'reference'"):
        dag.load("smoke", "referenz")
    experiment = synthetic.trial(new_home)
    synthetic.table(new_home, synthetic.DEFAULTS, id="Y2")
    synthetic.write_runs(experiment, "smoke", new_home / "results" / "reference", lambda *_: 1.0)
    found, jobs = dag.load("smoke", "reference")
    assert [one.spec.id for one in found] == ["Y1", "Y2"]
    assert dag.run_files(jobs, "reference") == [file.replace("/runs/", "/reference/") for file in dag.run_files(jobs)]
    shutil.rmtree(new_home / "results" / "reference" / jobs[0].folders()[0])
    assert len(dag.run_files(jobs)) - len(dag.run_files(jobs, "reference")) == 2
    assert [one.spec.id for one in dag.load("smoke", "reference")[0]] == ["Y1", "Y2"]
    with pytest.raises(UserError, match="no runs of tier 'ci', but of: smoke"):
        dag.load("ci", "reference")
