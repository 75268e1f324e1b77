"""Verdicts from chosen numbers: each of the four, and what must never be called supported."""

import contextlib
import copy
import json
import math
import shutil

import numpy as np
import pytest

import synthetic
from dynarep import claims, cli
from dynarep.errors import UserError
from dynarep.experiment import find, load_all
from synthetic import TRIAL, write_runs

SEEDS = 6  # of the ci tier
NOISE = (-1.3, 0.9, -0.4, 1.2, -0.8, 0.2)


def verdicts(tmp_path, values, experiment="R1"):
    """Judge with the given ratio of (variant, metric) to the base value, in multiples, with seed-to-seed spread."""
    everything = load_all()
    chosen = find(everything, experiment)

    def value(variant, task, seed, update, metric):
        return 2.0 * math.exp(0.3 * np.sin(7 * seed + len(task))) * values(variant, metric, seed)

    write_runs(chosen, "ci", tmp_path, value)
    return {v.claim: v for v in claims.judge_all([chosen], "ci", tmp_path)}


def r1(gap, remedy, spread=0.05):
    """On-policy error `gap` times the held-out error; `remedy` times that with model data."""

    def values(variant, metric, seed):
        model = variant == "five_percent"
        noise = math.exp(spread * NOISE[seed % SEEDS] * (2 if model else 1))  # else it would cancel
        arm = remedy if model else 1.0
        return {"td_rms/on_policy": gap * arm * noise, "td_rms/on_over_validation": gap * arm * noise}.get(metric, 1.0)

    return values


@pytest.mark.parametrize(
    ("gap", "remedy", "spread", "c1", "c1b"),
    [
        (2.0, 0.5, 0.05, "supported", "supported"),
        (0.5, 2.0, 0.05, "contradicted", "contradicted"),
        (1.02, 0.99, 0.02, "contradicted", "contradicted"),  # real, and too small to matter
        (1.5, 0.7, 2.0, "inconclusive", "inconclusive"),  # too noisy to say
        (1.25, 0.85, 0.12, "inconclusive", "inconclusive"),  # below the smallest effect, not surely negligible
    ],
)
def test_each_verdict_follows_from_its_numbers(tmp_path, gap, remedy, spread, c1, c1b):
    found = verdicts(tmp_path, r1(gap, remedy, spread))
    assert (found["C1"].verdict, found["C1b"].verdict) == (c1, c1b), found["C1"].reason + found["C1b"].reason


def test_the_estimate_is_the_geometric_mean_of_paired_ratios_with_its_interval(tmp_path):
    v = verdicts(tmp_path, r1(3.0, 0.5))["C1"]
    logs = [0.05 * z for z in NOISE]
    assert v.estimate == pytest.approx(3.0 * math.exp(np.mean(logs)))
    assert v.low < v.estimate < v.high
    assert (v.n, v.planned, v.tasks) == (SEEDS, SEEDS, ["walker-walk", "dog-stand"])
    assert v.per_task["dog-stand"][0] == pytest.approx(v.estimate)


def test_an_inconclusive_claim_says_how_many_seeds_would_settle_it(tmp_path):
    assert "seeds would settle" in verdicts(tmp_path, r1(1.5, 0.7, 2.0))["C1"].reason


@pytest.mark.parametrize(
    ("ratio", "spread", "verdict"), [(1.1, 0.05, "supported"), (5.0, 0.05, "contradicted"), (1.9, 0.6, "inconclusive")]
)
def test_a_claim_of_equality_needs_the_whole_interval_inside_its_bounds(tmp_path, ratio, spread, verdict):
    def values(variant, metric, seed):
        noise = math.exp(spread * NOISE[seed % SEEDS])
        return ratio * noise if (variant, metric) == ("mbpo", "reward/mse") else 1.0

    assert verdicts(tmp_path, values, "C")["F3c"].verdict == verdict


def test_a_missing_seed_leaves_the_claim_untested_and_says_how_many_are_there(tmp_path):
    chosen = find(load_all(), "R1")
    write_runs(chosen, "ci", tmp_path, lambda *a: 1.0 + ("on_policy" in a[4]) * (a[2] + 2))
    job = chosen.jobs("ci")[0]
    (tmp_path / job.folders()[3] / "manifest.json").unlink()
    v = claims.judge(chosen, chosen.spec.claims[0], "ci", tmp_path)
    assert v.verdict == "untested"
    assert f"{2 * SEEDS - 1} of {2 * SEEDS} runs" in v.reason


def test_a_diverged_run_counts_at_the_stated_worst_value_and_is_counted(tmp_path):
    def values(variant, metric, seed):
        bad = variant == "five_percent" and metric == "td_rms/on_policy" and seed == 0
        return math.nan if bad else r1(2.0, 0.5)(variant, metric, seed)

    v = verdicts(tmp_path, values)["C1b"]
    assert v.diverged == 2  # one in each task
    assert v.verdict != "supported"


def test_a_diverged_run_without_a_stated_worst_value_is_never_dropped(new_home, tmp_path):
    claim = copy.deepcopy(TRIAL["claims"][0])
    del claim["contrast"]["of"]["worst"]
    experiment = synthetic.trial(new_home, claims=[claim])
    write_runs(experiment, "paper", tmp_path, lambda *a: math.nan if (a[0], a[2]) == ("ftfl", 1) else 1.0)
    v = claims.judge(experiment, experiment.spec.judged()[0], "paper", tmp_path)
    assert v.verdict == "inconclusive"
    assert v.reason == "1 runs diverged and the claim states no worst value"


def test_runs_of_different_code_are_not_judged_together(tmp_path):
    chosen = find(load_all(), "R1")
    write_runs(chosen, "ci", tmp_path, lambda *a: 1.0)
    path = tmp_path / chosen.jobs("ci")[0].folders()[0] / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["code"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(manifest))
    v = claims.judge(chosen, chosen.spec.claims[0], "ci", tmp_path)
    assert v.verdict == "untested"
    assert v.stale
    assert "different versions" in v.reason


def test_a_tier_that_cannot_judge_says_which_can(tmp_path):
    chosen = find(load_all(), "R1")
    v = claims.judge(chosen, chosen.spec.claims[0], "smoke", tmp_path)
    assert (v.verdict, v.reason) == ("untested", "this tier cannot judge it; ci, reduced, paper can")


def test_an_argument_is_untested_at_every_tier_and_says_why(new_home):
    experiment = synthetic.trial(new_home)
    for tier in experiment.tiers():
        v = {v.claim: v for v in claims.judge_all([experiment], tier, new_home)}["Z2"]
        assert (v.verdict, v.role, v.gated) == ("untested", "not empirical", False)
        assert v.reason == "not empirical: no run can judge it"
        assert (v.no_effect, v.smallest, v.unit, v.direction) == (None, None, "", "")
        json.dumps(v.data(), allow_nan=False)
    assert claims.failures([v]) == []


def test_arms_of_two_agents_are_compared_and_are_not_different_versions_of_the_code(new_home, tmp_path):
    """Each agent has a fingerprint of its own."""
    experiment = synthetic.trial(new_home)
    write_runs(experiment, "paper", tmp_path, lambda *a: (a[0] == "ftfl") * (1.0 + 0.05 * NOISE[a[2]]))
    v = claims.judge(experiment, experiment.spec.judged()[0], "paper", tmp_path)
    assert (v.verdict, v.n, v.tasks, v.stale) == ("supported", 3, ["hopper-hop"], False), v.reason
    assert v.estimate == pytest.approx(1.0 + 0.05 * np.mean(NOISE[:3]))
    job = next(job for job in experiment.jobs("paper") if (job.variant, job.task) == ("sac", "hopper-hop"))
    for folder in job.folders()[:1]:
        path = tmp_path / folder / "manifest.json"
        path.write_text(path.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    v = claims.judge(experiment, experiment.spec.judged()[0], "paper", tmp_path)
    assert (v.verdict, v.stale) == ("untested", True)
    assert "different versions" in v.reason


def test_a_metric_that_a_run_never_recorded_leaves_the_claim_untested(new_home, tmp_path):
    """Not every agent records everything; that must not stop the other claims."""
    experiment = synthetic.trial(new_home)
    write_runs(experiment, "paper", tmp_path, lambda *a: None if a[4] == "return/final" else 1.0)
    v = claims.judge(experiment, experiment.spec.judged()[0], "paper", tmp_path)
    assert v.verdict == "untested"
    assert "has no metric 'return/final'" in v.reason


def test_no_effect_is_called_supported_in_at_most_five_per_cent_of_experiments(tmp_path):
    """The rule itself, on simulated paired log ratios without effect, at the tier's number of seeds and tasks."""
    claim = find(load_all(), "R1").spec.claims[1]
    generator = np.random.default_rng(0)
    blank = claims.judge(find(load_all(), "R1"), claim, "smoke", tmp_path)
    runs, supported = 600, 0
    for _ in range(runs):
        a, b = (np.exp(generator.normal(0, 0.4, (2, SEEDS))) for _ in range(2))
        of, to = claims._Arm(list(a), [], 0, set()), claims._Arm(list(b), [], 0, set())
        estimate = claims._estimate(claim, of, to, range(2), claim.no_effect)
        supported += claims._decide(blank, claim, estimate, estimate.p).verdict == "supported"
    assert supported / runs <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


def test_gated_claims_are_corrected_together_and_reported_ones_are_not(tmp_path):
    found = verdicts(tmp_path, r1(2.0, 0.5))
    assert found["C1"].p_holm >= found["C1"].p
    assert found["C1c"].p_holm is None


def test_the_json_has_the_promised_fields_and_a_failed_gate_exits_with_one(new_home, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["claims", "--tier", "ci", "--json"])
    assert stop.value.code == 1
    rows = json.loads(capsys.readouterr().out)
    promised = {"claim", "paper", "experiment", "tier", "verdict", "gated", "estimate", "low", "high", "n", "unit"}
    promised |= {"reason", "published", "source"}
    assert all(promised <= set(row) for row in rows)
    assert {row["verdict"] for row in rows} == {"untested"}


@pytest.mark.parametrize("better", [1.0, -1.0])
def test_the_exit_code_says_whether_every_gate_is_supported(new_home, capsys, better):
    for paper in ("ftfl", "madtd"):
        shutil.rmtree(new_home / "experiments" / paper)
    noise = {"ftfl": 0.01, "sac": 0.02}  # different, else it would cancel

    def value(variant, task, seed, update, metric):
        return better * (variant == "ftfl") + noise.get(variant, 0.0) * seed

    write_runs(synthetic.trial(new_home), "paper", new_home / "results" / "runs", value)
    with pytest.raises(SystemExit) if better < 0 else contextlib.nullcontext() as stop:
        cli.main(["claims", "--tier", "paper"])
    assert ("gated claims not supported: Z1" in capsys.readouterr().err) == (better < 0)
    assert better > 0 or stop.value.code == 1


# -- units --------------------------------------------------------------------------------------------------------


def with_units(units):
    claim = copy.deepcopy(TRIAL["claims"][0])
    claim["contrast"] |= {"of": {"variant": "mbpo", "metric": "return/final"}, "units": units}
    claim["contrast"]["to"] = {"variant": "sac", "metric": "return/final"}
    return claim


def test_units_bring_tasks_of_different_scale_together_before_they_are_averaged(new_home, tmp_path):
    """Otherwise a task with returns of 10 000 decides for all."""
    units = {"hopper-hop": 10, "quadruped-walk": 1000, "Hopper-v5": 100}
    experiment = synthetic.trial(new_home, claims=[with_units(units)])
    write_runs(experiment, "paper", tmp_path, lambda v, task, seed, *_: units[task] * ((v == "mbpo") + 0.01 * seed**2))
    found = claims.judge(experiment, experiment.spec.judged()[0], "paper", tmp_path)
    assert found.estimate == pytest.approx(1.0)
    assert [point for point, _, _ in found.per_task.values()] == pytest.approx([1.0] * 3)


def test_a_task_without_a_unit_is_an_error_and_so_are_units_of_a_ratio(new_home):
    with pytest.raises(UserError, match=r"claims\.Z1\.contrast\.units: none for 'quadruped-walk'"):
        synthetic.trial(new_home, claims=[with_units({"hopper-hop": 10, "Hopper-v5": 100})])
    ratio = with_units({"hopper-hop": 10})
    ratio["contrast"]["kind"], ratio["no_effect"], ratio["smallest"] = "ratio", 1, 2
    with pytest.raises(UserError, match="units cancel in a ratio"):
        synthetic.trial(new_home, claims=[ratio])
