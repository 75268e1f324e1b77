"""Panels over a suite of tasks: what they show follows from the runs, and what is missing is said."""

import io
import math

import numpy as np
import pandas as pd
import pytest

import synthetic
from dynarep import aggregates, figures
from dynarep.errors import UserError
from dynarep.figures import drawing, suite
from dynarep.schema import SUITE
from synthetic import write_runs

FORM = {"metrics": {"return/final": "final return"}, "label": "score", "full_score": 10, "worst": -1}
PANELS = [
    {**FORM, "kind": "aggregate"},
    {**FORM, "kind": "profile"},
    {**FORM, "kind": "improvement", "of": "mbpo"},
    {**FORM, "kind": "efficiency", "metrics": {"eval/return": "return"}, "x": "frame"},
]
ARMS = ["sac", "little", "mbpo"]  # FTFL runs on one task alone


def made(variant, task, seed, update, metric):
    if metric not in ("return/final", "eval/return"):
        return None
    if (variant, task, seed) == ("little", "hopper-hop", 1):
        return math.nan
    return 2 + ARMS.index(variant) + 0.5 * seed + len(task) / 10 + update / 8


def load(home, folder, tier="paper", panels=PANELS, **changes):
    panels = [{"variants": ARMS, **panel} for panel in panels]
    experiment = synthetic.trial(home, figure={"panels": panels}, claims=[], **changes)
    write_runs(experiment, tier, folder, lambda variant, *a: made(variant, *a) if variant in ARMS else 0.0)
    return experiment


def table(experiment, folder, tier="paper"):
    return pd.read_csv(io.BytesIO(figures.to_csv(figures.table(experiment, tier, folder))))


def scores(variant, update=8):
    """Task -> score of each seed, worked out from the runs' numbers."""
    values = [[made(variant, task, seed, update, "return/final") for seed in range(3)] for task in TASKS]
    return [[(-1 if math.isnan(value) else value) / 10 for value in task] for task in values]


def of(data, panel, series):
    return data[(data["panel"] == panel) & (data["series"] == series)]


TASKS = ["hopper-hop", "quadruped-walk", "Hopper-v5"]


def test_each_panel_shows_the_estimates_of_the_scores_with_a_diverged_run_at_the_floor(new_home, tmp_path):
    data = table(load(new_home, tmp_path), tmp_path)
    assert set(data["task"]) == {" + ".join(TASKS)}
    assert set(zip(data["n"], data["planned"], strict=True)) == {(9, 9)}
    for arm in ARMS:
        own = data[data["variant"] == arm]
        for name, (_, statistic) in suite.STATISTICS.items():
            expected = aggregates.interval(statistic, scores(arm), key=("beyond_Y1", arm, "return/final", name))
            shown = of(own, 0, name).iloc[0]
            assert shown[["estimate", "low", "high"]].tolist() == pytest.approx(
                [float(expected.point), float(expected.low), float(expected.high)], rel=1e-7
            )
        profile = of(own, 1, "profile")
        assert profile["estimate"].tolist() == pytest.approx(
            aggregates.score_distributions(scores(arm), profile["x"]).tolist(), abs=1e-9
        )
        curve = of(own, 3, "iqm")
        assert curve["x"].tolist() == [0, 160]
        assert curve["estimate"].tolist() == pytest.approx(
            [float(aggregates.aggregate_iqm(scores(arm, update))) for update in (0, 8)]
        )
        assert of(own, 0, suite.DIVERGED)["estimate"].tolist() == [arm == "little"]
        if arm != "mbpo":
            chance = aggregates.probability_of_improvement(scores("mbpo"), scores(arm))
            assert of(own, 2, "return/final")["estimate"].tolist() == pytest.approx([float(chance)])


def test_a_missing_seed_is_n_of_n_and_a_task_without_runs_leaves_no_estimate(new_home, tmp_path):
    experiment = load(new_home, tmp_path)
    gone = {"sac": [("hopper-hop", 0)], "mbpo": [("Hopper-v5", seed) for seed in range(3)]}
    for job in experiment.jobs("paper"):
        for seed, folder in zip(job.seeds, job.folders(), strict=True):
            if (job.task, seed) in gone.get(job.variant, []):
                (tmp_path / folder / "manifest.json").unlink()
    data = table(experiment, tmp_path)
    note = figures.note(experiment, "paper", data)
    assert "SAC: 8 of 9 runs." in note
    assert "MBPO: 6 of 9 runs." in note
    estimates = data[(data["variant"] == "mbpo") & (data["series"] != suite.DIVERGED)]["estimate"]
    assert estimates.isna().all(), "averages over other tasks cannot be compared"
    sac = data[(data["panel"] == 0) & (data["variant"] == "sac") & (data["series"] == "mean")].iloc[0]
    assert (sac["n"], sac["planned"]) == (8, 9)
    first, *rest = scores("sac")
    assert sac["estimate"] == pytest.approx(np.mean([np.mean(first[1:]), *map(np.mean, rest)]))
    labels = [suite._label(arm, data[data["panel"] == 0], experiment) for arm in ARMS]
    assert labels == ["SAC\n(8 of 9 runs)", "MBPO, little\n(1 diverged)", "MBPO\n(6 of 9 runs, a task has none)"]
    with drawing.style("test"):
        assert drawing.figure(experiment, data, note).axes


def test_only_tasks_that_every_shown_arm_is_to_run_count(new_home, tmp_path):
    panel = {**PANELS[0], "variants": ["sac", "ftfl"]}
    data = table(load(new_home, tmp_path, panels=[panel]), tmp_path)
    assert set(data["task"]) == {"hopper-hop"}
    assert "they say nothing about a suite" in figures.note(load(new_home, tmp_path, panels=[panel]), "paper", data)


def test_runs_of_one_task_are_drawn_and_called_no_suite(new_home, tmp_path):
    runs = {"small": {**synthetic.TRIAL["runs"]["small"]}}
    block = runs["small"]["budget"]["smoke"][0]
    runs["small"] = {**runs["small"], "budget": {"smoke": [{**block, "tasks": ["hopper-hop"]}]}}
    experiment = load(new_home, tmp_path, "smoke", runs=runs)
    data = table(experiment, tmp_path, "smoke")
    with drawing.style("test"):
        axes = drawing.figure(experiment, data, "note").axes
    titles = [ax.get_title(loc="left") for ax in axes]
    assert titles.count("1 task, 2 runs of each arm: a single task is no suite") == 3
    assert [ax.get_title() for ax in axes if ax.get_title()] == [title for title, _ in suite.STATISTICS.values()]


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"worst": None}, "needs one metric, 'worst', what a diverged run counts as"),
        ({"metrics": {"return/final": "a", "return/area": "b"}}, "needs one metric"),
        ({"kind": "improvement"}, "needs one metric, 'worst', what a diverged run counts as, 'of', a variant"),
        ({"kind": "improvement", "of": "mbop"}, "of: unknown variant 'mbop'. Did you mean 'mbpo'?"),
        ({"kind": "improvement", "of": "mbpo", "variants": ["mbpo"]}, "'mbpo' alone has nothing to improve on"),
        ({"of": "mbpo"}, "a panel of aggregate cannot have of"),
        ({"kind": "final"}, "a panel of final cannot have full_score and worst"),
        ({"scale": "log"}, "has a scale of its own"),
        ({"published": True}, "has a scale of its own; leave 'published'"),
        ({"full_score": 0}, "greater than 0"),
    ],
)
def test_a_panel_that_cannot_be_a_score_over_tasks_is_refused(new_home, form, said):
    assert len(SUITE) == len(PANELS)
    with pytest.raises(UserError) as error:
        synthetic.trial(new_home, figure={"panels": [{**PANELS[0], **form}]}, claims=[])
    assert said in str(error.value)
