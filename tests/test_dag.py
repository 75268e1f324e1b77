"""What the Snakefile asks for: every run once, under readable rules, remade when what decides it changes."""

import inspect
import re
import shlex
import types
from dataclasses import replace
from pathlib import Path

import pytest
from snakemake.scheduling import job_scheduler

import synthetic
from dynarep import cli, dag, fingerprint, run, scheduler
from dynarep.experiment import distinct, find, load_all
from dynarep.schema import TIERS


@pytest.mark.parametrize("tier", TIERS)
def test_every_run_of_a_tier_is_in_one_bundle(tier):
    experiments, jobs = dag.load(tier)
    bundles = dag.bundles(jobs)
    assert [job for bundle in bundles for job in bundle.jobs] == jobs
    assert len({bundle.name for bundle in bundles}) == len(bundles)
    files = [file for bundle in bundles for file in dag.run_files(bundle.jobs)]
    assert len(set(files)) == len(files), "two rules with the same output would stop the DAG"
    wanted = {file for experiment in experiments for file in dag.run_files(experiment.jobs(tier))}
    assert set(files) == wanted


@pytest.mark.parametrize("tier", TIERS)
def test_a_rule_trains_the_jobs_that_it_declares(tier):
    """The command line finds the same jobs again."""
    experiments = load_all()
    bundles = dag.bundles(dag.load(tier)[1])
    for bundle in bundles[:: len(bundles) // 3 + 1]:
        words = shlex.split(dag.arguments(bundle.jobs))
        options: dict[str, list[str]] = {}
        for name, word in zip(words[::2], words[1::2], strict=True):
            options.setdefault(name, []).append(word)
        one = {name: options.get(f"--{name}", [None])[0] for name in ("experiment", "variant", "task", "seeds")}
        found = cli.train.chosen_jobs(
            one, tier, options.get("--runs", [None])[0], options.get("--job", []), experiments
        )
        assert [job.key() for job in found] == [job.key() for job in bundle.jobs]
        assert options["--tier"] == [tier]


def test_jobs_of_a_group_share_a_process_where_the_tier_or_the_group_says_so(new_home):
    """One by one they would pay for more process starts than work."""
    experiments = [synthetic.trial(new_home), synthetic.trial(new_home, id="Y2", claims=[])]
    tier = new_home / "experiments" / "tiers" / "smoke.yaml"

    def bundles(size: int | None) -> list[dag.Bundle]:
        tier.write_text(
            f"{{tier: smoke, purpose: x, {f'jobs_per_process: {size}, ' if size else ''}budget: {{seeds: 2}}}}"
        )
        return dag.bundles([job for experiment in experiments for job in experiment.jobs("smoke")])

    assert [len(bundle.jobs) for bundle in bundles(3)] == [3, 3, 3, 3, 2], "whatever experiment they belong to"
    assert bundles(3)[0].name == "train_smoke_1_of_5"
    singles = bundles(None)
    assert [bundle.name for bundle in singles] == [dag.rule_name(bundle.jobs[0]) for bundle in singles]
    (group,) = experiments[1].spec.runs
    experiments[1] = synthetic.trial(new_home, id="Y2", claims=[])
    runs = {name: part.model_copy(update={"jobs_per_process": 7}) for name, part in experiments[1].spec.runs.items()}
    experiments[1] = replace(experiments[1], spec=experiments[1].spec.model_copy(update={"runs": runs}))
    assert [len(bundle.jobs) for bundle in bundles(None)] == [1] * 7 + [4, 3], f"{group} asks for a process per task"
    assert bundles(None)[-1].name == "train_smoke_Y2_small_Hopper-v5_1_of_1"
    first = bundles(3)[0].jobs
    assert dag.priority(first) > dag.priority(first[:1]) > 0


def test_the_jobs_of_a_process_are_trained_in_order_and_reported_one_by_one(new_home, monkeypatch, capsys):
    jobs = distinct(find(load_all(), "R1").jobs("smoke"))
    trained = []
    monkeypatch.setattr(run, "train", lambda job, *_: trained.append(job.key()) or list(job.seeds))
    cli.main(["train", *shlex.split(dag.arguments(jobs))])
    assert trained == [job.key() for job in jobs]
    assert capsys.readouterr().out.count("2 trained, 0 already there") == len(jobs) > 1


def test_a_stop_ends_the_process_and_leaves_the_rest_of_its_jobs(new_home, monkeypatch):
    jobs = find(load_all(), "R1").jobs("smoke")
    trained = []

    def stop(job, *_):
        trained.append(job.key())
        raise run.StoppedError("stopped")

    monkeypatch.setattr(run, "train", stop)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", *shlex.split(dag.arguments(jobs))])
    assert (stopped.value.code, len(trained)) == (130, 1)


def test_runs_are_stale_when_the_code_of_any_of_their_agents_changes(new_home, monkeypatch):
    jobs = synthetic.trial(new_home).jobs("smoke")
    before = dag.made_by(jobs)
    assert len(before["code"].split()) == 2, "one for SAC, one for MBPO"
    real = fingerprint.of_parts
    monkeypatch.setattr(fingerprint, "of_parts", lambda *p: "0" if p[0].name == "sac" else real(*p))
    assert dag.made_by(jobs) != before
    assert dag.made_by([job for job in jobs if job.variant != "sac"])["code"] in before["code"]


def test_a_figure_is_drawn_again_when_a_default_or_a_published_number_changes(new_home):
    """The note names full sizes, a table lists defaults, a panel shows published numbers."""
    experiment = synthetic.trial(new_home)
    assert [Path(file).name for file in dag.sources(experiment)] == ["Y1.yaml", "published.csv"]
    silent = synthetic.table(new_home, synthetic.DEFAULTS, id="Y2")
    assert [Path(file).name for file in dag.sources(silent)] == ["Y2.yaml"]
    modules = {step: dag.shown_code(step) for step in ("figures", "claims", "report")}
    for step in ("figures", "report"):
        assert {"dynarep.configs.sac", "dynarep.configs.online", f"dynarep.{step}"} <= set(modules[step])
    assert "dynarep.configs.sac" not in modules["claims"], "verdicts do not depend on defaults"


def test_a_table_of_hyperparameters_is_in_the_dag_of_every_tier(new_home):
    synthetic.table(new_home, synthetic.DEFAULTS)
    for tier in TIERS:
        experiments, jobs = dag.load(tier)
        (table,) = (experiment for experiment in experiments if experiment.spec.id == "Y1")
        assert dag.figure_files(table, tier)
        assert not [job for job in jobs if job.experiment == "Y1"]


def test_common_rules_make_the_same_files_as_a_rule_for_each_job():
    """Of the largest tier: no file without its rule, none with two, each trained by its own command."""
    bundles = dag.bundles(dag.load("paper")[1])
    rest, families = dag.families(bundles)
    assert len(rest) + len(families) < len(bundles) / 2
    assert dag.families(bundles[:9]) == (bundles[:9], [])
    made = {}
    for family in families:
        assert len({tuple(dag.made_by([job]).values()) for job in family.jobs.values()}) == 1
        for run_name, job in family.jobs.items():
            assert re.fullmatch(family.constraint(), run_name)
            assert not re.fullmatch(family.constraint(), f"{run_name}0")
            files = [file.replace("{run}", run_name) for file in family.outputs()]
            assert files == dag.run_files([job])
            made |= dict.fromkeys(files, family.name)
    wanted = {file for bundle in bundles for file in dag.run_files(bundle.jobs)}
    assert set(made) | {file for bundle in rest for file in dag.run_files(bundle.jobs)} == wanted
    assert len({family.name for family in families}) == len(families)
    assert not set(made) & {file for bundle in rest for file in dag.run_files(bundle.jobs)}


def test_nobody_looks_for_jobs_while_jobs_run():
    """Snakemake's own name for it; were it called otherwise, the ci tier would take three minutes longer."""
    limited = types.SimpleNamespace(job_rate_limiter=object())
    scheduler.without_rounds(limited)
    assert limited.job_rate_limiter is None
    assert "self.job_rate_limiter is not None" in inspect.getsource(job_scheduler.JobScheduler)
