"""Verdicts from chosen numbers: each of the four, and what must never be called supported."""

import contextlib
import copy
import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import paired
import synthetic
from dynarep import claims, cli, dag
from dynarep.errors import UserError
from dynarep.experiment import find, load_all
from synthetic import TRIAL, write_runs

SEEDS = 5  # of the ci tier
NOISE = (-1.3, 0.9, -0.5, 1.2, -0.4)


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
        model = variant == "utd16_five"
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
        bad = variant == "utd16_five" and metric == "td_rms/on_policy" and seed % SEEDS == 0
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


def test_a_ratio_of_values_that_are_not_positive_is_inconclusive_and_says_how_many(tmp_path):
    """Over-estimation may turn into under-estimation: there is no logarithm of it, and no traceback either."""
    chosen = find(load_all(), "R2")
    write_runs(chosen, "ci", tmp_path, lambda variant, task, seed, *_: -0.5 if seed in (401, 402) else 2.0)
    (claim,) = (claim for claim in chosen.spec.judged() if claim.id == "C6")
    v = claims.judge(chosen, claim, "ci", tmp_path)
    assert (v.verdict, v.reason, v.n) == (
        "inconclusive", "4 values are not positive: there is no ratio of them", 10,
    )  # fmt: skip


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


def test_no_effect_is_called_supported_in_at_most_five_per_cent_of_experiments(tmp_path, monkeypatch):
    """The rule itself, on simulated paired log ratios without effect, at the tier's number of seeds and tasks."""
    monkeypatch.setattr(claims.stats, "RESAMPLES", 100)  # of the interval beside it, which decides nothing
    claim = find(load_all(), "R1").spec.claims[1]
    generator = np.random.default_rng(0)
    blank = claims.judge(find(load_all(), "R1"), claim, "smoke", tmp_path)
    runs, supported = 600, 0
    for _ in range(runs):
        a, b = (np.exp(generator.normal(0, 0.4, (2, SEEDS))) for _ in range(2))
        of, to = claims.Arm(list(a), [], 0, set()), claims.Arm(list(b), [], 0, set())
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
    for paper in ("ftfl", "madtd", "beyond"):
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


# -- at a frame ---------------------------------------------------------------------------------------------------


def at(new_home, tmp_path, frame, value, updates=(0, 8, 16)):
    """Judge the trial's claim with both sides read at a frame; a run's frames are twenty times its updates."""
    claim = copy.deepcopy(TRIAL["claims"][0])
    for side in ("of", "to"):
        claim["contrast"][side] |= {"metric": "eval/return", "at_frame": frame}
    experiment = synthetic.trial(new_home, claims=[claim])
    write_runs(experiment, "paper", tmp_path, value, updates)
    return claims.judge(experiment, experiment.spec.judged()[0], "paper", tmp_path)


@pytest.mark.parametrize(("frame", "update"), [(0, 0), (159, 0), (160, 8), (319, 8), (320, 16)])
def test_a_metric_at_a_frame_is_its_last_value_by_then(new_home, tmp_path, frame, update):
    v = at(new_home, tmp_path, frame, lambda variant, task, seed, update, metric: (variant == "ftfl") * update + seed)
    assert v.estimate == pytest.approx(update)


def test_a_frame_beyond_the_end_of_a_run_leaves_the_claim_untested(new_home, tmp_path):
    """The last value would be taken for one of a longer run."""
    v = at(new_home, tmp_path, 321, lambda *a: 1.0)
    assert v.verdict == "untested"
    assert v.reason.startswith("0 of 3 runs of 'ftfl' are there. ")
    assert v.reason.endswith("ended at frame 320, before 321.")


def test_a_metric_that_is_recorded_only_later_leaves_the_claim_untested(new_home, tmp_path):
    v = at(new_home, tmp_path, 159, lambda *a: None if (a[4], a[3]) == ("eval/return", 0) else 1.0)
    assert v.verdict == "untested"
    assert v.reason.endswith("has no metric 'eval/return' by frame 159.")


# -- published numbers --------------------------------------------------------------------------------------------

NUMBERS = {"hopper-hop": 100.0, "Hopper-v5": 40.0}  # nobody has one for quadruped-walk
PANEL = TRIAL["figure"]["panels"][1]
HOPPERS = {"tasks": ["hopper-hop", "Hopper-v5"]}


def publish(home, extra=()):
    """Write a file of published numbers: of an algorithm at one step, and what is extra."""
    base = {
        "algorithm": "Theirs, UTD 8",
        "label": "Theirs, UTD 8 (a)",
        "env_step": 500000,
        "action_repeat": 2,
        "utd": 8,
    }
    base |= {"n_seeds": 10, "low": "", "high": "", "source": "a", "licence": "MIT", "caveat": "none"}
    base |= {"statistic": "mean over seeds", "reading_error": 5}
    rows = [base | {"task": task, "published_task": task, "mean": mean} for task, mean in NUMBERS.items()]
    rows += [rows[0] | row for row in extra]
    with (home / "experiments" / "published.csv").open("w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def against(home, contrast, extra=(), **changes):
    """Load the trial with one claim that compares MBPO with published numbers."""
    publish(home, extra)
    claim = copy.deepcopy(TRIAL["claims"][0]) | changes
    of = {"variant": "mbpo", "metric": "return/final"}
    theirs = {"published": "Theirs, UTD 8", "env_step": 500000}
    claim["contrast"] = {"kind": "difference", "of": of, "to": theirs, **contrast}
    if claim["contrast"]["kind"] == "agreement":
        claim = {key: x for key, x in claim.items() if key not in ("direction", "no_effect", "smallest")}
        claim["contrast"] = {"margin": 5, "widest": 20, "needed": 1, **claim["contrast"]}
        claim["tiers"] = changes.get("tiers", {"paper": "reported"})
    experiment = synthetic.trial(home, claims=[claim], figure={"panels": [PANEL]})
    return experiment, experiment.spec.judged()[0]


def around(values):
    """Return runs whose last values are so far around these, by task; 30 where a task is not named."""
    spread = (-1.0, 0.3, 0.7)
    return lambda variant, task, seed, *_: values.get(task, 30.0) + spread[seed] * (1 + ("v5" in task))


def test_a_published_number_is_a_constant_for_all_seeds_and_stands_beside_ours(new_home, tmp_path):
    experiment, _ = against(new_home, HOPPERS)
    write_runs(experiment, "paper", tmp_path, around({"hopper-hop": 110.0, "Hopper-v5": 60.0}))
    v = claims.judge_all([experiment], "paper", tmp_path)[0]
    assert v.estimate == pytest.approx((10 + 20) / 2)
    assert [point for point, _, _ in v.per_task.values()] == pytest.approx([10, 20])
    assert (v.verdict, v.n, v.theirs) == ("supported", 3, NUMBERS)
    assert v.theirs_label == "Theirs, UTD 8 (a) at step 500000"
    level = claims.stats.paired_difference([[109, 110.3, 110.7], [58, 60.6, 61.4]], [[100] * 3, [40] * 3])
    assert (v.low, v.high, v.p) == pytest.approx((level.low, level.high, level.p))


def test_a_task_without_a_published_number_is_left_out_and_named(new_home, tmp_path):
    """Its runs do not even have to be there."""
    experiment, claim = against(new_home, {})
    write_runs(experiment, "paper", tmp_path, around({"hopper-hop": 110.0, "Hopper-v5": 60.0}))
    for job in experiment.jobs("paper"):
        if job.task == "quadruped-walk":
            (tmp_path / job.folders()[0] / "manifest.json").unlink()
    v = claims.judge(experiment, claim, "paper", tmp_path)
    assert (v.tasks, v.estimate) == (["hopper-hop", "Hopper-v5"], pytest.approx(15))
    assert v.reason.startswith("without quadruped-walk (no number of Theirs, UTD 8 at step 500000): 15 [")
    shutil.rmtree(tmp_path / "mbpo")
    v = claims.judge(experiment, claim, "paper", tmp_path)
    assert (v.verdict, v.reason.split(": ")[0]) == (
        "untested",
        "without quadruped-walk (no number of Theirs, UTD 8 at step 500000)",
    )


def test_ratios_and_units_go_with_published_numbers(new_home, tmp_path):
    experiment, claim = against(new_home, {"kind": "ratio", **HOPPERS}, no_effect=1, smallest=1.1)
    write_runs(experiment, "paper", tmp_path, lambda v, task, *_: 2.0 * NUMBERS.get(task, 1.0))
    assert claims.judge(experiment, claim, "paper", tmp_path).estimate == pytest.approx(2)
    experiment, claim = against(new_home, {"units": {"hopper-hop": 100, "Hopper-v5": 4}, **HOPPERS})
    v = claims.judge(experiment, claim, "paper", tmp_path)
    assert [point for point, _, _ in v.per_task.values()] == pytest.approx([1, 10])


@pytest.mark.parametrize(
    ("hop", "v5", "form", "verdict", "reason"),
    [
        (100.0, 40.0, {"needed": 2}, "supported", "2 of 2 tasks agree, 2 needed"),
        # intervals of three seeds: about 2.3 and 4.5 to both sides
        (107.0, 40.0, {"needed": 2}, "supported", "2 of 2 tasks agree, 2 needed"),
        (93.0, 40.0, {"needed": 2}, "supported", "2 of 2 tasks agree, 2 needed"),
        (108.0, 40.0, {"needed": 2}, "contradicted", "1 of 2 tasks agree, 2 needed; disagree: hopper-hop"),
        (92.0, 40.0, {"needed": 2}, "contradicted", "1 of 2 tasks agree, 2 needed; disagree: hopper-hop"),
        (108.0, 40.0, {"needed": 2, "margin": 6}, "supported", "2 of 2 tasks agree, 2 needed"),
        (108.0, 40.0, {"needed": 1}, "supported", "1 of 2 tasks agree, 1 needed; disagree: hopper-hop"),
        (100.0, 40.0, {"needed": 2, "widest": 3}, "inconclusive", "1 of 2 tasks agree, 2 needed; undecided: Hopper-v5"),
        (
            100.0, 40.0, {"needed": 1, "widest": 1}, "inconclusive",
            "0 of 2 tasks agree, 1 needed; undecided: hopper-hop, Hopper-v5",
        ),
        (
            108.0, 40.0, {"needed": 2, "widest": 3}, "contradicted",
            "0 of 2 tasks agree, 2 needed; disagree: hopper-hop; undecided: Hopper-v5",
        ),
        (100.0, 90.0, {"needed": 2, "widest": 3}, "contradicted", "1 of 2 tasks agree, 2 needed; disagree: Hopper-v5"),
    ],
)  # fmt: skip
def test_an_agreement_counts_tasks_whose_narrow_intervals_overlap(new_home, tmp_path, hop, v5, form, verdict, reason):
    experiment, claim = against(new_home, {"kind": "agreement", **HOPPERS, **form})
    write_runs(experiment, "paper", tmp_path, around({"hopper-hop": hop, "Hopper-v5": v5}))
    v = claims.judge(experiment, claim, "paper", tmp_path)
    assert (v.verdict, v.reason) == (verdict, reason)
    agree, undecided = int(reason[0]), reason.partition("undecided: ")[2].count("opper")
    assert (v.estimate, v.low, v.high) == (agree / 2, agree / 2, (agree + undecided) / 2)
    assert (v.p, v.p_holm, v.bootstrap, v.gated, v.n) == (None, None, None, False, 3)
    assert [point for point, _, _ in v.per_task.values()] == pytest.approx([hop, v5]), "ours, beside theirs"
    assert v.theirs == NUMBERS


def test_noise_never_agrees(new_home, tmp_path):
    """An interval from nothing to everything overlaps every number; that of a single seed is one."""
    runs = copy.deepcopy(TRIAL["runs"])
    runs["small"]["budget"]["paper"][0] |= {"seeds": 1, "seeds_per_job": 1}
    _, claim = against(new_home, {"kind": "agreement", **HOPPERS})
    data = [claim.model_dump(mode="json", exclude_unset=True)]
    single = synthetic.trial(new_home, runs=runs, figure={"panels": [PANEL]}, claims=data)
    write_runs(single, "paper", tmp_path, lambda v, task, *_: NUMBERS.get(task, 1.0))
    v = claims.judge(single, single.spec.judged()[0], "paper", tmp_path)
    assert (v.verdict, v.estimate, v.high) == ("inconclusive", 0.0, 1.0)
    json.dumps(v.data(), allow_nan=False)


def test_an_agreement_leaves_out_tasks_without_a_number_and_is_no_gate(new_home, tmp_path):
    experiment, _ = against(new_home, {"kind": "agreement", "needed": 2})
    write_runs(experiment, "paper", tmp_path, around({"hopper-hop": 300.0, "Hopper-v5": 40.0}))
    found = claims.judge_all([experiment], "paper", tmp_path)
    assert found[0].reason == (
        "without quadruped-walk (no number of Theirs, UTD 8 at step 500000): "
        "1 of 2 tasks agree, 2 needed; disagree: hopper-hop"
    )
    assert (found[0].verdict, claims.failures(found)) == ("contradicted", [])
    assert found[0].rule.startswith("our 95 % interval overlaps the published number, give or take 5")


def test_an_agreement_with_diverged_runs_needs_a_worst_value(new_home, tmp_path):
    of, write = {"variant": "mbpo", "metric": "return/final"}, around(NUMBERS)
    experiment, claim = against(new_home, {"kind": "agreement", "of": of, **HOPPERS})
    write_runs(experiment, "paper", tmp_path, lambda *a: math.nan if a[1:3] == ("hopper-hop", 0) else write(*a))
    v = claims.judge(experiment, claim, "paper", tmp_path)
    assert (v.verdict, v.reason) == ("inconclusive", "1 runs diverged and the claim states no worst value")
    experiment, claim = against(new_home, {"kind": "agreement", "of": {**of, "worst": 10}, **HOPPERS})
    v = claims.judge(experiment, claim, "paper", tmp_path)
    assert v.per_task["hopper-hop"][0] == pytest.approx((10 + 100.3 + 100.7) / 3)
    assert (v.verdict, v.diverged) == ("supported", 1), "the other task agrees, one is needed"


SAME_TWICE = [{"label": "Theirs, UTD 8 (b)"}]


@pytest.mark.parametrize(
    ("contrast", "extra", "tiers", "said"),
    [
        (
            {"to": {"published": "Theirs, UDT 8", "env_step": 500000}}, (), None,
            "claims.Z1.contrast.to.published: unknown algorithm 'Theirs, UDT 8'. Did you mean 'Theirs, UTD 8'?",
        ),
        (
            {"to": {"published": "Theirs, UTD 8", "env_step": 400000}}, [{"env_step": 900000}], None,
            "contrast.to.env_step: no number of 'Theirs, UTD 8' at 400000. There are some at: 500000, 900000.",
        ),
        (
            {"tasks": ["quadruped-walk"]}, (), None,
            "claims.Z1.tiers.paper: no task there has the published number. It is given for: Hopper-v5, hopper-hop.",
        ),
        (
            {}, SAME_TWICE, None,
            "has several numbers for hopper-hop: Theirs, UTD 8 (a) at step 500000 and Theirs, UTD 8 (b) at",
        ),
        (
            {"to": {"published": "Theirs, UTD 8", "env_stpe": 500000}}, (), None,
            "claims.0.contrast.to.env_stpe: unknown key. Did you mean 'env_step'? Allowed: env_step, published.",
        ),
        (
            {"to": {"variant": "mbpo", "metirc": "x"}}, (), None,
            "claims.0.contrast.to.metirc: unknown key. Did you mean 'metric'? Allowed: at_frame, metric, task,",
        ),
        ({"kind": "level"}, (), None, "claims.0.contrast: a level has no 'to'"),
        (
            {"kind": "agrement"}, (), None,
            "claims.0.contrast.kind: input should be 'agreement', 'difference', 'level', 'rank' or 'ratio', got 'agrem",
        ),
        (
            {"kind": "agreement"}, (), {"paper": "gated"},
            "claims.0.tiers.paper: an agreement has no p-value to correct for multiplicity, so it cannot be gated",
        ),
        (
            {"kind": "agreement", "needed": 3}, (), None,
            "claims.Z1.contrast.needed: 3, but tier paper has 2 tasks with the published number.",
        ),
        (
            {"kind": "agreement", "needed": 2}, (), {"smoke": "reported", "paper": "untested"}, None,
        ),
        (
            {"kind": "agreement", "needed": 2, "tasks": ["hopper-hop"]}, (), {"paper": "reported"},
            "claims.Z1.contrast.needed: 2, but tier paper has 1 tasks with the published number.",
        ),
        (
            {"kind": "agreement", "margin": 4}, (), None,
            "claims.Z1.contrast.margin: 4, but the numbers have a reading error of 5.",
        ),
        (
            {"kind": "agreement", "to": {"variant": "sac", "metric": "return/final"}}, (), None,
            "claims.0.contrast.to.published: is missing.",
        ),
        ({"kind": "agreement", "units": {"hopper-hop": 1}}, (), None, "claims.0.contrast.units: unknown key."),
    ],
)  # fmt: skip
def test_a_comparison_with_numbers_that_are_not_there_is_refused(new_home, contrast, extra, tiers, said):
    changes = {"tiers": tiers} if tiers else {}
    if said is None:
        against(new_home, contrast, extra, **changes)
        return
    with pytest.raises(UserError) as error:
        against(new_home, contrast, extra, **changes)
    assert said in str(error.value)


def test_an_agreement_has_no_direction_and_another_claim_needs_one(new_home):
    publish(new_home)
    _, claim = against(new_home, {"kind": "agreement"})
    data = claim.model_dump(mode="json", exclude_unset=True)
    with pytest.raises(UserError, match=r"claims\.0\.direction: unknown key"):
        synthetic.trial(new_home, claims=[data | {"direction": "equal"}], figure={"panels": [PANEL]})
    effect = {key: value for key, value in TRIAL["claims"][0].items() if key != "direction"}
    with pytest.raises(UserError, match=r"claims\.0\.direction: is missing"):
        synthetic.trial(new_home, claims=[effect], figure={"panels": [PANEL]})


def test_what_a_claim_compares_with_is_a_source_of_its_experiment(new_home):
    """Otherwise an edited number would leave the old verdict."""
    experiment, _ = against(new_home, HOPPERS)
    assert [path.split("/")[-1] for path in dag.sources(experiment)] == ["Y1.yaml", "published.csv"]
    plain = synthetic.trial(new_home, claims=[], figure={"panels": [PANEL]})
    assert len(dag.sources(plain)) == 1


# -- ranks over settings ------------------------------------------------------------------------------------------

FITS = [0.1, 0.3, 0.2, 0.8, 0.5, 2.0]
HELP = [-1.0, 0.5, 0.2, 1.0, 1.5, 4.0]  # in an order that is one swap from that of the fits


def ranked(home, effects=HELP, fits=FITS, change=lambda value: value, **changes):
    """Judge the paired experiment's claim at the ci tier."""
    experiment = paired.load(home, **changes)
    write_runs(experiment, "ci", home / "results" / "runs", change(paired.help_by(effects, fits)))
    return experiment, claims.judge(experiment, experiment.spec.judged()[0], "ci", home / "results" / "runs")


def claimed(**contrast):
    """Return the paired experiment's claims with another contrast."""
    return [paired.CLAIM | {"contrast": paired.CLAIM["contrast"] | contrast}]


def test_a_claim_of_ranks_is_spearmans_over_the_settings_and_rests_on_all_groups(new_home):
    _, v = ranked(new_home)
    assert v.estimate == pytest.approx(scipy.stats.spearmanr(FITS, HELP).statistic)
    assert (v.verdict, v.n, v.planned, v.sample) == ("supported", 6, 6, "6 settings"), v.reason
    assert {folder.split("/")[0] for folder in v.runs} == {"ensemble", "mbpo"}
    assert len(v.runs) == 6 * (3 + 4 + 4)
    assert (v.stale, v.tasks, v.per_task) == (False, ["hopper-hop"], {})
    assert [x[0] for x in v.settings.values()] == pytest.approx(FITS), "the geometric mean over seeds"
    assert [x[3] for x in v.settings.values()] == pytest.approx(HELP), "the mean of the paired differences"
    noise = [0.3, -0.5, 0.4, -0.2]
    each = claims.stats.level([[4.0 + x for x in noise]], 0.0)
    assert v.settings["reward x 1/32"][3:] == pytest.approx((each.point, each.low, each.high))
    json.dumps(v.data(), allow_nan=False)


@pytest.mark.parametrize(
    ("effects", "verdict"),
    [
        ([0.2, 1.5, -1.0, 4.0, 1.0, 0.5], "inconclusive"),  # no order
        ([4.0, 1.0, 1.5, 0.2, 0.5, -1.0], "contradicted"),  # the other way round
        ([-1.0, 0.2, 0.5, 1.5, 1.0, 0.9], "inconclusive"),  # some, which chance could make
    ],
)
def test_a_measurement_that_does_not_foretell_the_outcome_is_never_supported(new_home, effects, verdict):
    _, v = ranked(new_home, effects)
    assert v.verdict == verdict, v.reason
    if verdict == "inconclusive":
        assert "too few settings" in v.reason
        assert "seeds" not in v.reason, "more seeds per setting would not settle it"


def test_unrelated_settings_are_called_supported_in_at_most_five_per_cent(new_home, monkeypatch):
    """The rule itself, on simulated settings without a relation."""
    monkeypatch.setattr(claims.stats, "RESAMPLES", 400)
    experiment, blank = ranked(new_home)
    (claim,) = experiment.spec.judged()
    generator = np.random.default_rng(0)
    supported = 0
    for i in range(400):
        estimate = claims.stats.rank_correlation(*generator.normal(size=(2, 8)), key=(i,))
        supported += claims._decide(blank, claim, estimate, estimate.p).verdict == "supported"
    assert supported / 400 <= 0.025 + 2 * math.sqrt(0.025 * 0.975 / 400), "one direction of two"


@pytest.mark.parametrize(("p", "low"), [(0.01, -0.1), (0.2, 0.1)])
def test_test_and_interval_must_both_exclude_no_effect(new_home, p, low):
    """They are made in different ways, so one may say what the other does not."""
    experiment, blank = ranked(new_home)
    estimate = claims.stats.Estimate(0.8, low, 0.95, p, 6, 1, math.nan, low, 0.95)
    v = claims._decide(blank, experiment.spec.judged()[0], estimate, p)
    assert v.verdict == "inconclusive"
    assert v.reason == f"0.8 [{low:.3g}, 0.95], p = {p}: too few settings to tell from no association"


def test_a_setting_without_all_its_runs_leaves_the_claim_untested_and_is_counted(new_home):
    """Left out, the settings that are there would be a choice."""
    experiment, _ = ranked(new_home)
    for name in ("fit_2", "residual_4"):
        job = next(job for job in experiment.jobs("ci") if job.variant == name)
        (new_home / "results" / "runs" / job.folders()[1] / "manifest.json").unlink()
    v = claims.judge(experiment, experiment.spec.judged()[0], "ci", new_home / "results" / "runs")
    assert (v.verdict, v.n, v.planned, v.estimate, v.settings) == ("untested", 4, 6, None, {})
    assert v.reason.startswith("4 of 6 settings have all their runs. 2 of 3 runs of 'fit_2' are there. ")


def test_a_diverged_run_of_a_setting_counts_at_the_worst_value_or_settles_nothing(new_home):
    def spoil(value):
        return lambda *a: math.nan if a[:3:2] == ("direct_0", 8) or a[:3:2] == ("fit_5", 1) else value(*a)

    _, v = ranked(new_home, change=spoil)
    assert (v.verdict, v.reason) == ("inconclusive", "2 runs diverged and the claim states no worst value")
    _, v = ranked(new_home, change=spoil, claims=claimed(predictor_worst=100.0, outcome_worst=-6.0))
    assert v.diverged == 2
    assert v.settings["reward x 1/1"][3] == pytest.approx(np.mean([-1.2, -6.0 - 18.0, -0.6, -1.5]))
    assert v.settings["reward x 1/32"][0] == pytest.approx((2.0 / 1.5 * 100.0 * 2.0 * 1.5) ** (1 / 3))


@pytest.mark.parametrize(
    ("average", "expected"), [("mean", (1 / 1.5 + 1 + 1.5) / 3), ("geometric", 1.0), ("median", 1.0)]
)
def test_a_predictor_is_averaged_as_the_claim_says(new_home, average, expected):
    panels = [paired.PANEL | {"average": average}]
    _, v = ranked(new_home, claims=claimed(average=average), figure={"panels": panels})
    assert [x[0] for x in v.settings.values()] == pytest.approx([expected * fit for fit in FITS])


@pytest.mark.parametrize(
    ("fits", "said"),
    [([0.5] * 6, "x is 0.5 in all settings: there is no order to compare"), ([-1.0, *FITS[1:]], "not positive")],
)
def test_settings_without_an_order_are_inconclusive_and_no_traceback(new_home, fits, said):
    _, v = ranked(new_home, fits=fits)
    assert (v.verdict, v.n) == ("inconclusive", 6)
    assert said in v.reason


def test_an_outcome_rests_on_the_seeds_that_both_arms_have(new_home):
    """Means of different seeds would be compared."""
    runs = paired.form()["runs"]
    block = runs["agents"]["budget"]["ci"][0]
    names = runs["agents"]["variants"]
    runs["more"] = copy.deepcopy(runs["agents"]) | {"variants": [name for name in names if name.startswith("direct")]}
    runs["agents"]["variants"] = [name for name in names if name.startswith("residual")]
    runs["more"]["budget"]["ci"] = [{**block, "seeds": 9, "first_seed": 6}]
    experiment, v = ranked(new_home, runs=runs)
    assert experiment.judging_groups(experiment.spec.judged()[0], "ci") == ("fits", "agents", "more")
    assert [x[3] for x in v.settings.values()] == pytest.approx(HELP), "seeds 7 to 10, of 6 to 14"


def test_a_gated_claim_of_ranks_is_corrected_with_the_others_and_fails_when_it_must(new_home):
    experiment, _ = ranked(
        new_home, [0.2, 1.5, -1.0, 4.0, 1.0, 0.5], claims=[paired.CLAIM | {"tiers": {"ci": "gated"}}]
    )
    found = claims.judge_all([experiment], "ci", new_home / "results" / "runs")
    assert found[0].p_holm == pytest.approx(found[0].p)
    assert claims.failures(found) == ["Z3"]


def test_claims_of_ranks_are_printed_with_their_settings(new_home, capsys):
    for paper in ("ftfl", "madtd", "beyond"):
        shutil.rmtree(new_home / "experiments" / paper)
    ranked(new_home)
    cli.main(["claims", "--tier", "ci", "--markdown"])
    assert "| 0.943 [0.515, 1], Spearman's rank correlation, 6 settings | **supported** (reported) |" in (
        capsys.readouterr().out
    )


# -- arms that differ in their environment ------------------------------------------------------------------------


@pytest.mark.parametrize(("gap", "verdict"), [(0.0, "supported"), (3.0, "contradicted")])
def test_two_settings_of_one_task_can_be_claimed_to_be_equal(new_home, gap, verdict):
    """Every dial is such an arm: the same task, another environment."""
    contrast = {"kind": "difference"}
    contrast |= {side: {"variant": name, "metric": "return/final"} for side, name in
                 (("of", "residual_0"), ("to", "residual_5"))}  # fmt: skip
    claim = paired.CLAIM | {"contrast": contrast, "direction": "equal", "smallest": 1.0, "runs": "agents"}
    experiment = paired.load(new_home, claims=[claim])
    write_runs(
        experiment, "ci", new_home / "runs", lambda *a: (a[0] == "residual_0") * (gap + 0.1 * NOISE[a[2] % 5]) + a[2]
    )
    v = claims.judge(experiment, experiment.spec.judged()[0], "ci", new_home / "runs")
    assert (v.verdict, v.n) == (verdict, 4), v.reason
    assert len({job.config.identity() for job in experiment.judging_jobs(experiment.spec.judged()[0], "ci")}) == 2


def test_verdicts_are_read_as_they_were_written(tmp_path):
    """With infinite bounds, which JSON does not know; what is no list of verdicts is judged again."""
    path = tmp_path / "smoke.json"
    assert claims.read(path) is None
    words = dict.fromkeys(("paper", "experiment", "tier", "verdict", "role", "says", "unit", "direction"), "")
    words |= dict.fromkeys(("why", "reason", "published", "source"), "")
    numbers = {"estimate": 1.0, "low": -math.inf, "high": math.inf, "bootstrap": None, "p": None, "p_holm": None}
    counts = {"n": 1, "planned": 2, "no_effect": 0.0, "smallest": None}
    measured = claims.Verdict(claim="R1", gated=True, **words, **numbers, **counts)
    untested = replace(measured, claim="R2", estimate=None, low=None, high=None)
    path.write_text(json.dumps([verdict.data() for verdict in (measured, untested)]))
    assert claims.read(path) == [measured, untested]
    for broken in ("[{}]", "{", "[1]"):
        path.write_text(broken)
        assert claims.read(path) is None


# -- between tasks ------------------------------------------------------------------------------------------------


def between(**changes):
    """The trial's claim, as one arm's metric on one task against the same on another."""
    claim = copy.deepcopy(TRIAL["claims"][0])
    side = {"variant": "mbpo", "metric": "return/final", "worst": 1.0}
    both = ["quadruped-walk", "Hopper-v5"]
    of, to = (side | {"task": task} for task in both)
    claim["contrast"] = {"kind": "ratio", "of": of, "to": to, "tasks": both} | changes
    return claim | {"direction": "greater", "no_effect": 1, "smallest": 10}


def judged_between(new_home, tmp_path, value):
    experiment = synthetic.trial(new_home, claims=[between()])
    write_runs(experiment, "paper", tmp_path, value)
    return claims.judge(experiment, experiment.spec.judged()[0], "paper", tmp_path)


def test_two_tasks_of_one_arm_are_compared_and_a_seeds_runs_on_both_are_a_pair(new_home, tmp_path):
    """Without pairs the seeds' common factor, here 10 to the seed, would swamp the ratio."""
    ratio = {"quadruped-walk": 20.0, "Hopper-v5": 1.0, "hopper-hop": 1e9}
    found = judged_between(
        new_home,
        tmp_path,
        lambda v, task, seed, *_: 10.0**seed * ratio[task] * (1.0 + 0.01 * (seed % 3) * ("5" in task)),
    )
    assert found.verdict == "supported"
    assert found.estimate == pytest.approx(20.0, rel=0.02)
    assert found.low > 19.0
    assert list(found.per_task) == ["quadruped-walk against Hopper-v5"]
    assert {Path(run).parts[1] for run in found.runs} == {"quadruped-walk", "Hopper-v5"}
    assert len(found.runs) == 2 * found.n


def test_the_same_on_both_tasks_is_no_support_for_a_difference_between_them(new_home, tmp_path):
    found = judged_between(
        new_home, tmp_path, lambda v, task, seed, *_: 10.0**seed * (1.0 + 0.1 * seed * ("5" in task))
    )
    assert found.verdict == "contradicted"


def test_explaining_a_comparison_between_tasks_shows_every_pair(new_home, capsys):
    experiment = synthetic.trial(new_home, claims=[between()])
    write_runs(experiment, "paper", new_home / "results" / "runs", lambda v, task, seed, *_: 3.0 + ("q" in task))
    with contextlib.suppress(SystemExit):
        cli.main(["claims", "--explain", "Z1", "--tier", "paper"])
    out = capsys.readouterr().out
    assert out.count("quadruped-walk against Hopper-v5") >= 2


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": ["quadruped-walk"]},
        {"tasks": ["quadruped-walk", "hopper-hop"]},
        {"to": {"variant": "mbpo", "metric": "return/final"}},
        {"to": {"variant": "mbpo", "metric": "return/final", "task": "quadruped-walk"}},
        {"kind": "difference", "units": {"quadruped-walk": 2.0}},
    ],
)
def test_a_comparison_between_tasks_names_one_on_either_side_and_both(new_home, changes):
    with pytest.raises(UserError, match="a 'task' on either side"):
        synthetic.trial(new_home, claims=[between(**changes)])


def test_a_comparison_between_tasks_needs_both_at_the_tier_with_the_same_seeds(new_home):
    budget = {
        "paper": [{"tasks": ["quadruped-walk"], "seeds": 3}, {"tasks": ["Hopper-v5"], "seeds": 3, "first_seed": 1}]
    }
    runs = copy.deepcopy(TRIAL["runs"])
    for group in runs.values():
        group["budget"] = budget
    with pytest.raises(UserError, match=r"claims\.Z1\.tiers\.paper: both tasks need runs of the same seeds"):
        synthetic.trial(new_home, claims=[between()], runs=runs)
