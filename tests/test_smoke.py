"""The whole DAG at the smoke tier, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import CHECKOUT
from dynarep.experiment import load_all

SNAKEMAKE = [sys.executable, "-m", "snakemake", "-s", str(CHECKOUT / "Snakefile")]
SNAKEMAKE += ["--profile", str(CHECKOUT / "experiments/profiles/default")]


def snakemake(home: Path, *arguments: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "DYNAREP_HOME"}
    done = subprocess.run(
        [*SNAKEMAKE, *arguments, "--config", "tier=smoke"],
        cwd=home,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    logs = "".join(f"\n{p}:\n{p.read_text()[-2000:]}" for p in home.glob("results/runs/log/*.log"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:] + logs
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    (folder / "experiments").symlink_to(CHECKOUT / "experiments")
    snakemake(folder)
    return folder


def test_every_experiment_of_the_tier_is_drawn_judged_and_reported(home):
    for experiment in load_all():
        for kind in ("csv", "svg", "pdf", "png"):
            assert (home / f"figures/smoke/{experiment.spec.paper}/{experiment.spec.id}.{kind}").stat().st_size > 500
    rows = json.loads((home / "results/runs/claims/smoke.json").read_text())
    assert {row["claim"] for row in rows} == {c.id for e in load_all() for c in e.spec.claims}
    assert {row["verdict"] for row in rows} == {"untested"}
    page = (home / "results/runs/report/smoke.html").read_text()
    assert all(claim.id in page for e in load_all() for claim in e.spec.claims)


def test_a_second_call_runs_nothing_and_a_deleted_run_is_made_again_to_the_same_bytes(home):
    assert "Nothing to be done" in snakemake(home)
    victim = next(home.glob("results/runs/mad_td/walker-walk/frozen-utd16-alpha0-*/seed=1/metrics.csv"))
    before = victim.read_bytes()
    victim.unlink()
    again = snakemake(home, "--dry-run", "madtd_R1")
    assert "train_" in again, "a deleted run is not missed"
    assert "ftfl_C" not in again
    snakemake(home)
    assert victim.read_bytes() == before


def test_no_output_names_a_path_of_this_machine(home):
    for path in (home / "results").rglob("*.json"):
        assert str(home) not in path.read_text(), path
