"""The whole DAG at the smoke tier, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import CHECKOUT
from dynarep import audit, dag, records
from dynarep.configs import AgentConfig, ProtocolConfig, registry
from dynarep.experiment import find, load_all

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


@pytest.mark.first
def test_the_smoke_tier_runs_draws_judges_reports_and_repairs_itself(tmp_path):
    """One test, not several on a shared folder: two workers would each run the whole DAG."""
    (tmp_path / "experiments").symlink_to(CHECKOUT / "experiments")
    snakemake(tmp_path)
    everything_is_drawn_judged_and_reported(tmp_path)
    every_protocol_records_the_metrics_that_it_declares(tmp_path)
    no_output_names_a_path_of_this_machine(tmp_path)
    assert "Nothing to be done" in snakemake(tmp_path)
    every_run_passes_the_audit(tmp_path)
    snakemake_writes_its_own_report(tmp_path)
    a_deleted_run_is_made_again_to_the_same_bytes(tmp_path)


def everything_is_drawn_judged_and_reported(home: Path) -> None:
    for experiment in load_all():
        for kind in ("csv", "svg", "pdf", "png"):
            file = home / f"figures/smoke/{experiment.spec.paper}/{experiment.spec.id}.{kind}"
            assert file.stat().st_size > (200 if kind == "csv" else 500), "a curve of one evaluation is a short table"
    rows = json.loads((home / "results/runs/claims/smoke.json").read_text())
    assert {row["claim"] for row in rows} == {c.id for e in load_all() for c in e.spec.claims}
    assert {row["verdict"] for row in rows} == {"untested"}
    page = (home / "results/runs/report/smoke.html").read_text()
    assert all(claim.id in page for e in load_all() for claim in e.spec.claims)


def every_protocol_records_the_metrics_that_it_declares(home: Path) -> None:
    """Files are checked against the declaration. What an agent does not have (SAC has no model), another one must."""
    jobs = [job for experiment in load_all() for job in experiment.jobs("smoke")]
    assert {job.config.agent.name for job in jobs} == set(registry(AgentConfig))
    for name, protocol in registry(ProtocolConfig).items():
        recorded = set()
        for job in (job for job in jobs if job.config.protocol.name == name):
            for seed, folder in zip(job.seeds, job.folders(), strict=True):
                metrics = set(records.read(home / "results" / "runs" / folder, job.config, seed).columns["metric"])
                assert metrics <= protocol.metrics, folder
                recorded |= metrics
        assert recorded == protocol.metrics, f"{name}: one too many; a claim on it would fail after the runs"


def every_run_passes_the_audit(home: Path) -> None:
    """Of every protocol: rows, times, blocks and rules as they really come. Figures take a minute: not here."""
    found = audit.audit(home / "results" / "runs", load_all(), "smoke")
    assert found.findings == []
    assert found.checked["runs"] == len(list((home / "results" / "runs").rglob("manifest.json")))
    assert not any("not recorded" in what for what in found.not_checked)


def snakemake_writes_its_own_report(home: Path) -> None:
    snakemake(home, "--report", "appendix.html")
    assert (home / "appendix.html").stat().st_size > 10**6


def no_output_names_a_path_of_this_machine(home: Path) -> None:
    for path in (home / "results").rglob("*.json"):
        assert str(home) not in path.read_text(), path


def a_deleted_run_is_made_again_to_the_same_bytes(home: Path) -> None:
    """One of the process that should be the shortest: Snakemake makes everything again that a process leaves."""
    experiments, jobs = dag.load("smoke")
    job = min(dag.bundles(jobs), key=lambda bundle: dag.priority(bundle.jobs)).jobs[-1]
    target = find(experiments, job.experiment).key
    victim = home / "results" / "runs" / job.folders()[1] / "metrics.csv"
    before = victim.read_bytes()
    victim.unlink()
    for what in ([], [target]):
        planned = snakemake(home, "--dry-run", *what)
        assert "train_" in planned, "a deleted run is not missed"
        assert "draw_" in planned, "a figure of a deleted run is not drawn again"
    snakemake(home, str(victim.relative_to(home)))
    assert victim.read_bytes() == before
