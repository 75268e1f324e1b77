"""What a tier costs: each run counted once, what is there not counted again."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from dynarep import cli, plan, records
from dynarep.experiment import Experiment, Job, find, load, load_all
from synthetic import manifest


@pytest.fixture
def r1(new_home: Path) -> Experiment:
    return find(load_all(), "R1")


def bigger(job: Job, **changes: int) -> Job:
    """The same job with other fields of its agent or protocol."""
    config = job.config
    agent = config.agent.model_copy(update={k: v for k, v in changes.items() if k in type(config.agent).model_fields})
    known = type(config.protocol).model_fields
    protocol = config.protocol.model_copy(update={k: v for k, v in changes.items() if k in known})
    return replace(job, config=replace(config, agent=agent, protocol=protocol))


@pytest.mark.parametrize("name", ["R1", "C"])
@pytest.mark.parametrize("change", ["seeds", "updates", "width", "batch_size", "transitions"])
def test_more_work_costs_more(new_home, name, change):
    job = find(load_all(), name).jobs("ci")[0]
    costs = []
    for factor in (1, 2, 4):
        if change == "seeds":
            costs.append(plan.job_seconds(replace(job, seeds=tuple(range(3 * factor)))))
        else:
            part = job.config.agent if change in type(job.config.agent).model_fields else job.config.protocol
            costs.append(plan.job_seconds(bigger(job, **{change: factor * getattr(part, change)})))
    assert 0 < costs[0] < costs[1] < costs[2]


def test_a_block_of_seeds_costs_less_than_its_seeds_one_by_one(r1):
    job = r1.jobs("ci")[0]
    alone = plan.job_seconds(replace(job, seeds=(0,)))
    assert plan.job_seconds(replace(job, seeds=(0, 1, 2, 3))) < 4 * alone


def test_what_was_never_measured_costs_the_default(r1, monkeypatch):
    job, rates = r1.jobs("ci")[0], plan.rates()
    only = {kind: {"default": rates[kind]["default"]} for kind in ("tasks", "agents")}
    monkeypatch.setattr(plan, "rates", lambda: rates | only)
    assert plan.job_seconds(job) > 0


def test_every_rate_is_a_positive_number():
    rates = plan.rates()
    for sizes in rates["tasks"].values():
        assert len(sizes) == 3
        assert all(size > 0 for size in sizes)
    for points in rates["agents"].values():
        assert points == sorted(points), "more work in less time: measured at different loads?"
        assert all(gflop > 0 and ms > 0 for gflop, ms in points)
    assert rates["job_start_s"] > 0
    assert rates["source"].strip()


def test_the_sums_are_those_of_the_jobs(r1, tmp_path):
    jobs = r1.jobs("ci")
    (row,) = plan.costs([r1], "ci", tmp_path)
    assert (row.paper, row.experiment, row.tier) == ("madtd", "R1", "ci")
    assert row.jobs == len(jobs)
    assert row.runs == sum(len(job.seeds) for job in jobs)
    assert row.updates == sum(len(job.seeds) * job.config.protocol.agent_updates() for job in jobs)
    assert row.agent_steps == sum(len(job.seeds) * job.config.protocol.agent_steps() for job in jobs)
    assert row.cpu_hours_all == pytest.approx(sum(map(plan.job_seconds, jobs)) / 3600, abs=1e-3)
    assert row.cpu_hours == row.cpu_hours_all
    assert row.disk_mib > 0


def twin(r1: Experiment, **block: int) -> Experiment:
    """Another experiment that asks for the same runs; `block` changes its budget at the smoke tier."""
    data = yaml.safe_load(r1.file.read_text(encoding="utf-8")) | {"id": "R9", "claims": []}
    data["runs"]["accelerated"]["budget"]["smoke"][0] |= block
    path = r1.file.with_name("R9.yaml")
    path.write_text(json.dumps(data), encoding="utf-8")
    return load(path)


def test_a_shared_run_is_counted_once(r1, tmp_path):
    """Counted twice, the plan would promise work that nobody does."""
    (alone,) = plan.costs([r1], "ci", tmp_path)
    first, second = plan.costs([r1, twin(r1)], "ci", tmp_path)
    assert first == alone
    assert (second.experiment, second.jobs, second.runs, second.cpu_hours_all) == ("R9", 0, 0, 0)


def test_runs_shared_in_part_are_counted_once(r1, tmp_path):
    """Also if the other experiment wants more seeds of them."""
    first, second = plan.costs([r1, twin(r1, seeds=5)], "smoke", tmp_path)
    assert (first.runs, second.runs) == (4, 6)


def test_what_is_there_is_not_counted_again(r1, tmp_path):
    jobs = r1.jobs("smoke")
    folders = [folder for job in jobs for folder in job.folders()]
    made = [manifest(job, seed) for job in jobs for seed in job.seeds]
    before = plan.costs([r1], "smoke", tmp_path)[0]
    assert (before.present, before.runs) == (0, len(folders))
    for done, folder in enumerate(folders, start=1):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / records.METRICS).touch()
        assert plan.costs([r1], "smoke", tmp_path)[0].present == done - 1, "a run without a manifest is not finished"
        other = made[done - 1] | {"code": {"fingerprint": "0" * 64}}
        records.write(tmp_path / folder, "agent_step\n", other)
        assert plan.costs([r1], "smoke", tmp_path)[0].present == done - 1, "a run of other code has to be made again"
        records.write(tmp_path / folder, "agent_step\n", made[done - 1])
        row = plan.costs([r1], "smoke", tmp_path)[0]
        assert row.present == done
        assert row.cpu_hours <= before.cpu_hours
        assert replace(row, present=0, cpu_hours=before.cpu_hours) == before
    assert row.cpu_hours == 0


def test_the_json_has_the_fields_that_scripts_read(new_home, capsys):
    cli.main(["plan", "--tier", "smoke", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["experiment"] for row in rows] == [e.spec.id for e in load_all()]
    names = [
        *("paper", "experiment", "tier", "jobs", "runs", "present", "agent_steps", "updates"),
        *("cpu_hours", "cpu_hours_all", "disk_mib"),
    ]
    assert [field.name for field in fields(plan.Cost)] == names
    assert all(list(row) == names for row in rows)
    assert all(row["runs"] > 0 and row["present"] == 0 for row in rows)


def test_one_paper_or_experiment_can_be_planned(new_home, capsys):
    for option, value, left in (("--paper", "ftfl", {"C"}), ("--experiment", "madtd_R1", {"R1"})):
        cli.main(["plan", "--tier", "smoke", option, value, "--json"])
        assert {row["experiment"] for row in json.loads(capsys.readouterr().out)} >= left
    cli.main(["plan", "--tier", "smoke"])
    table = capsys.readouterr().out
    assert "madtd_R1" in table
    assert "ftfl_C" in table
    assert not (new_home / "results").exists(), "planning leaves nothing behind"
