"""What a tier costs: each run counted once, what is there not counted again."""

import importlib
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

import synthetic
from dynarep import cli, plan, records
from dynarep.configs import AgentConfig, ProtocolConfig, registry
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
    if name == "C" and change in ("width", "batch_size"):
        change = f"model_{change}"
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
    only = {kind: {"default": rates[kind]["default"]} for kind in ("tasks", "work")}
    monkeypatch.setattr(plan, "rates", lambda: rates | only)
    assert plan.job_seconds(job) > 0


def test_every_rate_is_a_positive_number():
    rates = plan.rates()
    for sizes in rates["tasks"].values():
        assert len(sizes) == 3
        assert all(size > 0 for size in sizes)
    for rate in rates["work"].values():
        points = rate.get("seed_ms", [])
        assert [ms for _, ms in points] == sorted(ms for _, ms in points), "more work in less time: other loads?"
        assert points == sorted(points)
        assert all(gflop > 0 and ms > 0 for gflop, ms in points)
        assert rate["block_ms"] >= 0
    assert all(rates[name] > 0 for name in ("job_start_s", "record_kib", "process_mib"))
    assert rates["source"].strip()


@pytest.mark.parametrize("name", ["sac", "mbpo", "mad_td"])
def test_what_an_agent_does_is_priced_at_rates_of_its_own(name):
    """A rate under another name would silently be the default."""
    work = registry(AgentConfig)[name]().learning_work(1000, 67, 21)
    assert {piece.rate for piece in work} - {"simulator"} <= set(plan.rates()["work"]) - {"default"}


def test_the_sums_are_those_of_the_jobs(r1, tmp_path):
    jobs = r1.jobs("ci")
    (row,) = plan.costs([r1], "ci", tmp_path)
    assert (row.paper, row.experiment, row.tier) == ("madtd", "R1", "ci")
    assert row.jobs == len(jobs)
    assert row.runs == sum(len(job.seeds) for job in jobs)
    every = {job: job.config.agent.updates_per_step for job in jobs}  # critic updates for one of the model
    updates = [len(job.seeds) * job.config.protocol.updates * (1 + 1 / every[job]) for job in jobs]
    assert row.updates == sum(updates)
    steps = [job.config.protocol.agent_steps() + job.config.protocol.eval_episodes * 1000 for job in jobs]
    assert row.agent_steps == sum(len(job.seeds) * own for job, own in zip(jobs, steps, strict=True))
    assert row.cpu_hours_all == pytest.approx(sum(map(plan.job_seconds, jobs)) / 3600, abs=1e-3)
    assert row.cpu_hours == row.cpu_hours_all
    assert row.disk_mib > 0
    assert row.peak_mib == round(max(map(plan.job_mib, jobs))) > plan.rates()["process_mib"]


def test_the_total_adds_up_everything_but_memory(r1, new_home, tmp_path):
    """Two jobs of 500 MiB do not need a machine of 1000."""
    rows = plan.costs([r1, find(load_all(), "C")], "ci", tmp_path)
    total = plan.total(rows)
    assert (total.runs, total.jobs) == tuple(sum(getattr(row, name) for row in rows) for name in ("runs", "jobs"))
    assert total.cpu_hours == pytest.approx(sum(row.cpu_hours for row in rows))
    assert total.peak_mib == max(row.peak_mib for row in rows)
    assert plan.total([]).runs == 0


# -- what an online run costs -------------------------------------------------------------------------------------


def online(home: Path, variant: str, task: str = "hopper-hop") -> Job:
    jobs = synthetic.trial(home).jobs("paper")
    return next(job for job in jobs if (job.variant, job.task) == (variant, task))


def units(job: Job) -> dict[str, int]:
    return {piece.rate: piece.units for piece in plan.work(job)}


def test_the_work_of_an_online_run_is_composed_of_its_parts(new_home):
    """500 000 steps, 10 000 of them random: ftfl 3.6."""
    evaluation = 100 * 10 * 1000
    assert units(online(new_home, "sac")) == {"act": 500_000 + evaluation, "sac": 490_000}
    steps = {"act": 500_000 + evaluation, "sac": 20 * 490_000, "ensemble": 1960 * 5000, "rollout": 490_000}
    assert units(online(new_home, "mbpo")) == steps
    assert online(new_home, "mbpo").config.protocol.agent_steps() == 500_000


def test_searches_are_paid_for_in_evaluations_too_and_updates_where_learning_begins(new_home):
    job = online(new_home, "sac")
    job = replace(job, config=replace(job.config, agent=registry(AgentConfig)["td_mpc2"]()))
    pieces, evaluation = plan.work(job), 100 * 10 * 1000
    found = {rate: sum(p.units for p in pieces if p.rate == rate) for rate in ("act", "td_mpc2", "plan")}
    assert found == {"act": 500_000 + evaluation, "td_mpc2": 490_000 + 10_000, "plan": 490_000 + evaluation}
    assert {piece.rate for piece in pieces} == set(found) <= set(plan.rates()["work"])


def test_without_synthetic_rows_no_model_is_paid_for_and_the_simulator_costs_frames(new_home):
    job = online(new_home, "mbpo")
    assert set(units(bigger(job, synthetic_share=0.0))) == {"act", "sac"}
    perfect = bigger(job, rollouts="simulator")
    assert units(perfect)["simulator"] == 490_000 * 400
    assert "ensemble" not in units(perfect)
    frame_s = plan.rates()["tasks"]["hopper-hop"][2] / 1e3
    without = plan.job_seconds(bigger(job, synthetic_share=0.0))
    added = plan.job_seconds(perfect) - without
    assert added == pytest.approx(len(job.seeds) * 490_000 * 400 * frame_s, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "factor"), [("updates_per_step", 2), ("model_chunks", 2), ("chunk_steps", 2), ("rollouts_per_step", 2)]
)
def test_more_of_any_part_costs_more_by_that_part(new_home, change, factor):
    job = online(new_home, "mbpo")
    assert plan.job_seconds(bigger(job, **{change: factor * getattr(job.config.agent, change)})) > plan.job_seconds(job)


def test_policy_evaluation_pays_for_model_and_critics():
    mbpo, protocol = registry(AgentConfig)["mbpo"], registry(ProtocolConfig)["policy_evaluation"]()
    work = {piece.rate: piece for piece in protocol.work(mbpo(), 67, 21)}
    assert work["sac"].units == protocol.updates
    assert work["ensemble"].units == protocol.model_updates
    assert work["ensemble"].gflop == registry(AgentConfig)["ensemble"]().update_flops(67, 21) / 1e9
    assert [piece.rate for piece in protocol.work(mbpo(synthetic_share=0.0), 67, 21)] == ["sac"]


# -- memory -------------------------------------------------------------------------------------------------------


def test_the_buffer_of_a_million_synthetic_rows_is_in_the_plan(new_home):
    """Six seeds on humanoid: 157 float32 numbers a row, once more while a checkpoint is written."""
    job = online(new_home, "mbpo")
    humanoid = job.config.environment.model_copy(update={"task": "humanoid-walk"})
    job = replace(job, config=replace(job.config, environment=humanoid), seeds=tuple(range(6)))
    rows = 6 * (1_000_000 + 500_000) * (2 * 67 + 21 + 2) * 4 / 2**20
    assert 2 * rows < plan.job_mib(job) < 2 * rows + plan.rates()["process_mib"] + 300
    assert plan.job_mib(bigger(job, rollouts="simulator")) > plan.job_mib(job) + 1000, "the simulator's states"
    small = plan.job_mib(bigger(job, synthetic_capacity=1000))
    assert plan.job_mib(job) - small == pytest.approx(2 * rows * 999_000 / 1_500_000)


def test_a_buffer_that_never_fills_is_not_paid_for():
    agent = registry(AgentConfig)["mbpo"]
    assert agent().own_rows(10) == 4000
    assert agent(selection="m2ac").own_rows(10) == 40_000
    assert agent().own_rows(10**6) == 1_000_000


@pytest.mark.parametrize("name", ["sac", "bro", "ensemble", "mbpo", "mad_td", "td_mpc2"])
def test_the_parameters_in_the_plan_are_those_of_the_networks(name):
    """Biases and the like left out: within three per cent."""
    config = registry(AgentConfig)[name]()
    module, kind = config.implementation.split(":")
    agent = getattr(importlib.import_module(module), kind)(config, 67, 21, [0])
    numbers = sum(v.numel() for k, v in agent.state().items() if hasattr(v, "numel") and "adam" not in k)
    assert numbers == pytest.approx(config.parameters(67, 21), rel=0.03)


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
        *("cpu_hours", "cpu_hours_all", "gpu_hours_all", "disk_mib", "peak_mib"),
    ]
    assert [field.name for field in fields(plan.Cost)] == names
    assert all(list(row) == names for row in rows)
    assert all(row["present"] == 0 for row in rows)
    assert all(row["runs"] > 0 for row in rows if "frozen" in row["experiment"] or row["experiment"] in ("R1", "C"))


def test_one_paper_or_experiment_can_be_planned(new_home, capsys):
    for option, value, left in (("--paper", "ftfl", {"C"}), ("--experiment", "madtd_R1", {"R1"})):
        cli.main(["plan", "--tier", "smoke", option, value, "--json"])
        assert {row["experiment"] for row in json.loads(capsys.readouterr().out)} >= left
    cli.main(["plan", "--tier", "smoke"])
    table = capsys.readouterr().out
    assert "madtd_R1" in table
    assert "ftfl_C" in table
    assert not (new_home / "results").exists(), "planning leaves nothing behind"


def test_on_a_gpu_more_seeds_cost_little_and_more_arithmetic_costs_more(new_home):
    (job, *_) = find(load_all(), "A").jobs("paper")
    job = replace(job, seeds=(0,))
    alone, packed = plan.gpu_job_seconds(job), plan.gpu_job_seconds(replace(job, seeds=(0, 1, 2, 3)))
    assert alone < packed < 2 * alone < plan.job_seconds(job)
    wider = bigger(job, width=4 * job.config.agent.width)
    assert plan.gpu_job_seconds(wider) > alone
    assert plan.gpu_job_seconds(job, data_there=True) <= alone


def test_seeds_can_be_packed_otherwise_than_the_tier_does(new_home, capsys):
    """Same runs, more and smaller jobs: what one seed of a paper-size run needs, and six in one process."""
    found = {}
    for packed in (None, 1):
        (found[packed],) = plan.costs([find(load_all(), "A")], "paper", new_home, packed)
    assert (found[None].runs, found[1].runs) == (168, 168)
    assert (found[None].jobs, found[1].jobs) == (28, 168)
    assert found[None].peak_mib > 4 * found[1].peak_mib
    assert found[None].updates == found[1].updates
    with pytest.raises(SystemExit) as refused:
        cli.main(["plan", "--seeds-per-job", "0"])
    assert refused.value.code == 2
    assert "--seeds-per-job 0: at least 1" in capsys.readouterr().err


def test_data_that_arms_share_are_collected_once(new_home):
    """Four arms of a model fit start from the same random transitions; a reward in another unit is other data."""
    jobs = [job for job in find(load_all(), "C").jobs("ci") if job.task == "humanoid-stand"]
    alone = [plan.job_seconds(job) for job in jobs]
    later = [plan.job_seconds(job, data_there=True) for job in jobs]
    total = plan.cost(find(load_all(), "C"), jobs, "ci", new_home, set()).cpu_hours_all * 3600
    assert total == pytest.approx(alone[0] + sum(later[1:]), abs=4)
    frame_ms = plan.rates()["tasks"]["humanoid-stand"][2]
    assert alone[0] - later[0] == pytest.approx(5 * 5000 * frame_ms / 1e3)
