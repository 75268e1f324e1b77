"""How often a gate is wrong: the simulation judges as the claims do, and a gate without power is refused."""

import contextlib
import csv
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import synthetic
from conftest import CHECKOUT
from dynarep import calibration, claims, cli, registration, stats
from dynarep.arms import Arm
from dynarep.errors import UserError
from dynarep.experiment import Experiment, find, load_all
from dynarep.statements import Claim

TRIAL = synthetic.TRIAL


def claim_of(kind, direction, no_effect, smallest, **more):
    side = {"variant": "mbpo", "metric": "return/mean"}
    contrast = {"kind": kind, "of": side, **({} if kind == "level" else {"to": {**side, "variant": "ftfl"}})}
    words = dict.fromkeys(("says", "source", "published", "why", "unit"), "x")
    effect = {"direction": direction, "no_effect": no_effect, "smallest": smallest}
    return Claim.model_validate({"id": "Z1", **words, "contrast": contrast, **effect, "tiers": {"ci": "gated"}, **more})


CLAIMS = [
    claim_of("ratio", "greater", 1, 1.3),
    claim_of("ratio", "less", 1, 0.8),
    claim_of("difference", "less", 0, -0.5),
    claim_of("level", "greater", 0.2, 0.6),
    claim_of("ratio", "equal", 1, 1.6),
    claim_of("difference", "equal", 0, 0.5),
]


def study(claim, residuals, seen=0.0):
    return calibration.Study(claim, None, [np.array(r) for r in residuals], seen)  # the experiment is not asked


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.contrast.kind}-{claim.direction}")
def test_a_simulated_data_set_is_judged_as_real_runs_are(claim, monkeypatch):
    """Otherwise the rates would be those of another rule."""
    monkeypatch.setattr(stats, "RESAMPLES", 2)  # the bootstrap decides nothing
    blank = claims._blank(find(load_all(), "TabB"), claim, "ci")
    blank = claims.replace(blank, tasks=["a", "b"])
    residuals = [[-0.4, 0.1, 0.3, 0.0, -0.2], [0.2, -0.5, 0.1, 0.2, 0.1, -0.1]]
    simulated = study(claim, residuals)
    verdicts = []
    for effect in (0.0, 0.15, 0.4, -0.4, 0.8, -0.8):
        data = simulated.draw(effect, "normal", 40, stats.rng("test", effect))
        supported, p = simulated.judge(data)
        for row in range(40):
            sides = [
                Arm([task[row] for task in data], [], 0, set()),
                Arm([np.zeros(t.shape[1]) for t in data], [], 0, set()),
            ]
            if claim.contrast.kind == "ratio":
                for side in sides:
                    side.values = [np.exp(values) for values in side.values]
            verdict = claims._compare(blank, claim, sides[0], None if claim.contrast.kind == "level" else sides[1])
            assert (verdict.verdict == "supported") == supported[row], (effect, row, verdict.reason)
            assert verdict.p == pytest.approx(p[row], rel=1e-9, abs=1e-12)
            verdicts.append(verdict.verdict)
    assert 20 < verdicts.count("supported") < len(verdicts) - 20, "both answers must be among them"


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=9))
def test_holm_of_many_data_sets_is_holm_of_each(rows):
    p = np.array(rows)
    for column, adjusted in zip(p.T, calibration._holm(p).T, strict=True):
        expected = stats.holm({str(i): float(value) for i, value in enumerate(column)})
        assert adjusted.tolist() == pytest.approx(list(expected.values()))


def test_t_intervals_of_many_data_sets_are_those_of_each():
    data = [stats.rng("many", n).normal(size=(7, n)) for n in (4, 9)]
    point, half, p, spread = stats.t_interval(data, 0.3)
    for row in range(7):
        one = stats.level([task[row] for task in data], 0.3)
        assert (point[row], point[row] + half[row]) == pytest.approx((one.point, one.high))
        assert (p[row], spread[row]) == pytest.approx((one.p, one.spread))


@pytest.mark.parametrize("way", calibration.WAYS)
def test_what_is_drawn_has_the_spread_seen_and_the_effect_asked_for(way):
    residuals = np.array([-0.9, 0.5, 0.1, 0.7, -0.4])
    (drawn,) = study(CLAIMS[0], [residuals]).draw(0.25, way, 20_000, stats.rng("drawn"))
    assert drawn.mean() == pytest.approx(0.25, abs=0.01)
    assert drawn.std() == pytest.approx(residuals.std(ddof=1), rel=0.02)


def test_resampled_residuals_err_as_often_as_the_normal_law_that_they_come_from():
    """Plain resampling of five values says 4.3 % where the truth is 2.5 %: repeats look like little spread."""
    claim, rates = claim_of("difference", "greater", 0, 0), []
    for number in range(60):
        residuals = stats.rng("residuals", number).standard_normal(5)
        simulated = study(claim, [residuals - residuals.mean()])
        rates.append(simulated.judge(simulated.draw(0.0, "resampled", 2000, stats.rng("draw", number)))[0].mean())
    assert 0.02 < np.mean(rates) < 0.034


@pytest.mark.parametrize(
    ("claim", "effect"),
    [
        (claim_of("ratio", "less", 1, 0.8), 0.64),
        (claim_of("difference", "greater", 0, 10), 20),
        (claim_of("difference", "greater", 0, 10, expects=26), 26),
        (claim_of("difference", "equal", 0, 3), 0),
    ],
)
def test_the_effect_claimed_is_the_one_expected_or_twice_the_smallest(claim, effect):
    assert claim.claimed == pytest.approx(effect)


@pytest.mark.parametrize(("direction", "expects"), [("greater", 9), ("equal", 2)])
def test_an_expectation_that_contradicts_the_claim_is_refused(direction, expects):
    with pytest.raises(ValueError, match="expects"):
        claim_of("difference", direction, 0, 10, expects=expects)


# -- the command and the gate -------------------------------------------------------------------------------------


def gated(home, spread, **more) -> Experiment:
    """Write an experiment with one gated claim and runs with that spread; load it without asking for its power."""
    claim = {k: v for k, v in TRIAL["claims"][0].items() if k != "runs"} | {"tiers": {"paper": "gated"}, **more}
    experiment = synthetic.trial(home, claims=[claim])
    noise = stats.rng("noise").normal(size=1000)

    def value(variant, task, seed, update, metric):
        return 100 * math.exp(spread * noise[seed + 50 * (variant == "ftfl") + len(task)])

    synthetic.write_runs(experiment, "paper", home / "results" / "runs", value)
    return experiment


def calibrate(capsys, *options):
    with pytest.raises(SystemExit) if "fails" in options else contextlib.nullcontext():
        cli.main(["claims", "--calibrate", "--tier", "paper", "--json", *(o for o in options if o != "fails")])
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def only(new_home):
    """A home whose only experiment is the trial's."""
    for path in new_home.glob("experiments/*/*.yaml"):
        if path.parent.name not in ("tiers", "profiles"):
            path.unlink()
    (new_home / "experiments" / registration.CALIBRATION).unlink()
    return new_home


def test_a_gate_with_little_spread_has_power_and_hardly_ever_errs(only, capsys):
    gated(only, 0.00005)
    data = calibrate(capsys)
    (row,) = data["rows"]
    assert row["power"] > 0.85  # of three resampled runs one in nine data sets has no spread at all
    assert row["false_support"] <= 0.05
    assert data["any_false_support"] <= 0.05 + 3 * 0.0022
    assert not row["faults"]


def test_a_gate_that_is_too_noisy_is_named_and_then_refused_until_it_is_changed(only, capsys):
    gated(only, 3.0)
    (row,) = calibrate(capsys, "fails", "--write")["rows"]
    assert row["power"] < 0.8
    assert "below 80%" in row["faults"][0]
    with pytest.raises(UserError, match=r"gated, with a power of \d+%.*Write 'reported', or plan more\s+seeds"):
        load_all()
    file = only / "experiments" / registration.CALIBRATION
    text = file.read_text()
    file.write_text(text.replace(row["rule"], "0" * 16))
    load_all()  # another rule: that row says nothing of this one
    file.write_text(text.replace("paper", "papier"))
    with pytest.raises(UserError, match="line 2: tier"):
        load_all()


def test_calibrating_one_tier_leaves_the_rows_of_the_others(only, capsys):
    gated(only, 0.00005)
    calibrate(capsys, "--write")
    file = only / "experiments" / registration.CALIBRATION
    file.write_text(file.read_text().replace(",paper,", ",reduced,"))
    calibrate(capsys, "--write")
    with file.open() as lines:
        assert [row["tier"] for row in csv.DictReader(lines)] == ["reduced", "paper"]


def test_missing_runs_are_named_and_nothing_is_written(only, capsys):
    experiment = gated(only, 0.00005)
    folder = only / "results" / "runs" / experiment.judging_jobs(experiment.spec.judged()[0], "paper")[0].folders()[0]
    (folder / "manifest.json").unlink()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["claims", "--calibrate", "--tier", "paper", "--write"])
    assert stopped.value.code == 2
    assert "runs of" in capsys.readouterr().err
    assert not (only / "experiments" / registration.CALIBRATION).exists()


def test_explaining_a_claim_shows_rule_runs_numbers_and_the_answers_to_its_questions(only, capsys):
    experiment = gated(only, 0.00005)
    claim = experiment.spec.judged()[0]
    cli.main(["claims", "--explain", claim.id, "--tier", "paper"])
    shown = " ".join(capsys.readouterr().out.split())
    verdict = claims.judge_all([experiment], "paper", only / "results" / "runs")[0]
    for words in (claim.says, claim.source, claim.why, f"{verdict.estimate:.4g}", "not calibrated", verdict.verdict):
        assert words in shown, words
    assert f"{experiment.jobs('paper')[0].config.identity()[:8]}" in shown
    assert ("yes is the estimate" in shown) or ("no is the estimate" in shown)


@pytest.mark.parametrize("name", ["D8", "F18", "C5", "C2", "S1"])
def test_claims_of_every_kind_can_be_explained_without_runs(name, capsys, tmp_path):
    cli.main(["claims", "--explain", name, "--tier", "paper", "--results", str(tmp_path)])
    assert "untested" in capsys.readouterr().out


# -- this repository's gates --------------------------------------------------------------------------------------

CI = [(e, c) for e in load_all() for c in e.spec.judged() if c.role("ci") == "gated"]


@pytest.mark.parametrize(("experiment", "claim"), CI, ids=[claim.id for _, claim in CI])
def test_every_gate_of_the_ci_tier_has_power_under_its_present_rule(experiment, claim):
    row = registration.calibrated(CHECKOUT / "experiments").get((claim.id, "ci"))
    assert row, "type `dynarep claims --calibrate --tier ci --write` when its runs are there"
    assert not registration.outdated(row, experiment, claim, "ci"), "its rule or number of seeds has changed since"
    assert row.power >= registration.LEAST_POWER
    assert row.false_support <= calibration.MOST_FALSE


@pytest.mark.slow
def test_the_calibration_on_file_follows_from_the_committed_runs(capsys):
    cli.main(["claims", "--calibrate", "--tier", "ci", "--from", "reference", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert data["any_false_support"] <= calibration.MOST_FALSE
    kept = registration.calibrated(CHECKOUT / "experiments")
    for row in data["rows"]:
        found = kept[row["claim"], "ci"]
        assert {k: v for k, v in row.items() if k != "faults"} == found.model_dump()
