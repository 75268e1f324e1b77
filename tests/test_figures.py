"""Figures and tables: their data against golden files, the image from the data alone, the same bytes twice."""

import io
import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

import synthetic
from dynarep import cli, figures
from dynarep.configs import AgentConfig, ProtocolConfig, registry
from dynarep.errors import UserError
from dynarep.experiment import find, load_all, plain
from dynarep.figures import drawing, pages, points
from synthetic import DEFAULTS, RETURNS, TRIAL, write_runs

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = """\
algorithm,label,task,published_task,env_step,action_repeat,utd,n_seeds,mean,low,high,source,licence,caveat
"SAC, UTD 1","SAC, UTD 1 (a)",hopper-hop,hopper-hop,500000,1,1,10,104.1,59.9,155.5,a,MIT,none
MBPO,MBPO (b),hopper-hop,hopper-hop,500000,1,20,,40,,,b,MIT,mean alone
"SAC, UTD 1","SAC, UTD 1 (a)",humanoid-run,humanoid-run,500000,1,1,10,105.1,94.4,116.3,a,MIT,a task that is not shown
"""


def value(variant, task, seed, update, metric):
    """Smooth in everything, positive, different for every name; SAC has no model to measure."""
    if variant == "sac" and metric.startswith(("reward/", "state/")):
        return None
    name = sum(map(ord, variant + metric)) % 17
    return math.exp(0.1 * name - 0.02 * update + 0.2 * math.sin(3 * seed + name) + 0.01 * len(task))


@pytest.fixture(params=["R1", "C", "trial", "returns"])
def drawn(request, tmp_path, new_home):
    """An experiment, the tier whose runs are there, and a folder."""
    (new_home / "experiments" / "published.csv").write_text(PUBLISHED)
    if request.param == "trial":
        experiment, tier = synthetic.trial(new_home), "paper"
    elif request.param == "returns":
        experiment, tier = synthetic.table(new_home, RETURNS, id="T2"), "paper"
    else:
        experiment, tier = find(load_all(), request.param), "smoke"
    write_runs(experiment, tier, tmp_path / "runs", value)
    return experiment, tier, tmp_path


def shown(experiment, tier, folder):
    """What is drawn: the table as its CSV says it."""
    return pd.read_csv(io.BytesIO(figures.to_csv(figures.table(experiment, tier, folder / "runs"))))


def axes_of(experiment, data):
    with drawing.style("test"):
        return [ax for ax in drawing.figure(experiment, data, "note").axes if ax.axison]


# -- every kind ---------------------------------------------------------------------------------------------------


def test_the_data_are_the_golden_ones(drawn):
    experiment, tier, folder = drawn
    data = figures.to_csv(figures.table(experiment, tier, folder / "runs")).decode()
    golden = (GOLDEN / f"{experiment.key}.csv").read_text()
    assert data == golden, "the data changed; if that is meant, look at the diff and replace the golden file"


def test_the_images_follow_from_the_csv_alone_to_the_same_bytes(drawn):
    experiment, tier, folder = drawn
    paths = {p.suffix[1:]: p for p in figures.write(experiment, tier, folder / "runs", folder / "figures")}
    data = pd.read_csv(paths["csv"])
    note = figures.note(experiment, tier, data)
    again = figures.draw(experiment, tier, data, note)
    assert set(paths) == {"csv", *again} == {"csv", "svg", "pdf", "png"}
    for kind, content in again.items():
        assert content == paths[kind].read_bytes(), kind
    assert f"<!-- {note[:24]}" in again["svg"].decode(), "the note is not on the image"


def test_missing_seeds_are_counted_on_the_figure(drawn):
    experiment, tier, folder = drawn
    jobs = experiment.jobs(tier)
    planned = 3 if tier == "paper" else 2
    (folder / "runs" / jobs[0].folders()[1] / "manifest.json").unlink()
    note = figures.note(experiment, tier, shown(experiment, tier, folder))
    assert note.startswith(f"Tier {tier}: {planned - 1} of {planned} seeds.")


def test_an_altered_run_is_not_drawn(drawn):
    experiment, tier, folder = drawn
    path = folder / "runs" / experiment.jobs(tier)[0].folders()[0] / "metrics.csv"
    path.write_bytes(path.read_bytes().replace(b",8,", b",9,", 1))
    with pytest.raises(UserError, match="altered"):
        figures.table(experiment, tier, folder / "runs")


# -- panels -------------------------------------------------------------------------------------------------------


@pytest.fixture
def trial(new_home, tmp_path):
    (new_home / "experiments" / "published.csv").write_text(PUBLISHED)
    experiment = synthetic.trial(new_home)
    for tier in ("smoke", "paper"):
        write_runs(experiment, tier, tmp_path / "runs", value)
    return experiment


def test_an_arm_that_never_recorded_a_metric_is_left_out_and_nothing_else_is(trial, tmp_path):
    """SAC has no reward model; the panel shows the others."""
    data = shown(trial, "smoke", tmp_path)
    assert set(data[data["panel"] == 2]["variant"]) == {"little", "mbpo", "ftfl"}
    assert set(data[data["panel"] == 0]["variant"]) == {"sac", "little", "mbpo", "ftfl"}


@pytest.mark.parametrize("kind", ["curves", "dots", "final", "dose"])
def test_a_panel_that_no_arm_recorded_is_empty_and_no_error(new_home, tmp_path, kind):
    first = TRIAL["figure"]["panels"][0]
    panels = [first, {**first, "kind": kind, "metrics": {"reward/nmse": "error"}}]
    experiment = synthetic.trial(new_home, figure={"panels": panels})
    write_runs(experiment, "smoke", tmp_path / "runs", lambda *a: None if a[4].startswith("reward/") else value(*a))
    data = shown(experiment, "smoke", tmp_path)
    assert set(data["panel"]) == {0}
    assert len(axes_of(experiment, data)) == 2, "it takes no room"


def test_a_calibration_leaves_out_runs_that_did_not_record_one(new_home, tmp_path):
    experiment = find(load_all(), "C")
    write_runs(experiment, "smoke", tmp_path / "runs", lambda *a: None if "decile" in a[4] and a[0] == "mbpo" else 1.0)
    data = shown(experiment, "smoke", tmp_path)
    drawn = set(data[data["series"] == "reward/decile"]["variant"])
    assert drawn == set(experiment.spec.variants) - {"mbpo"}
    assert axes_of(experiment, data)


def test_an_arm_of_one_task_is_not_missed_on_the_others(trial, tmp_path):
    data = shown(trial, "smoke", tmp_path)
    assert set(data[data["variant"] == "ftfl"]["task"]) == {"hopper-hop"}
    assert "no runs yet" not in figures.note(trial, "smoke", data)


def test_an_arm_without_runs_is_counted_on_the_figure(trial, tmp_path):
    for job in trial.jobs("smoke"):
        if job.variant == "little":
            for folder in job.folders():
                (tmp_path / "runs" / folder / "manifest.json").unlink()
    assert "2 of 7 arms have no runs yet." in figures.note(trial, "smoke", shown(trial, "smoke", tmp_path))


def test_published_numbers_are_marked_at_the_paper_tier_alone(trial, tmp_path):
    """At a smaller tier the comparison would be false."""
    assert points.PUBLISHED not in set(shown(trial, "smoke", tmp_path)["series"])
    data = shown(trial, "paper", tmp_path)
    theirs = data[data["series"] == points.PUBLISHED]
    assert list(theirs["variant"]) == ["SAC, UTD 1 (a)", "MBPO (b)"]
    assert set(theirs["task"]) == {"hopper-hop"}, "a task that is not shown"
    assert set(theirs["panel"]) == {0}
    ax = axes_of(trial, data)[0]
    marks = {line.get_label(): line.get_ydata()[0] for line in ax.lines if line.get_label() in set(theirs["variant"])}
    assert marks == {"SAC, UTD 1 (a)": 104.1, "MBPO (b)": 40.0}


def test_a_dose_panel_draws_each_series_through_its_arms_in_the_order_of_doses(trial, tmp_path):
    data = shown(trial, "smoke", tmp_path)
    means = data[(data["panel"] == 1) & data["seed"].isna() & (data["task"] == "hopper-hop")]
    expected = {row["variant"]: row["estimate"] for _, row in means.iterrows()}
    ax = next(ax for ax in axes_of(trial, data) if ax.get_xlabel() == "share of synthetic rows")
    lines = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert set(lines) == {"MBPO", "FTFL"}
    assert list(lines["MBPO"].get_xdata()) == [0.05, 0.95]
    assert list(lines["MBPO"].get_ydata()) == [expected["little"], expected["mbpo"]]
    assert list(lines["FTFL"].get_ydata()) == [expected["ftfl"]]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "symlog")


def test_colour_is_the_arm_where_there_is_one_metric_and_the_metric_where_there_are_several(trial, tmp_path):
    data = shown(trial, "smoke", tmp_path)
    panels = {ax.get_ylabel(): ax for ax in axes_of(trial, data)}
    colours = [line.get_color() for line in panels["reward error"].lines]
    assert len(set(colours)) == len(colours) == 3
    by_label = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in panels["value"].lines}
    assert by_label["Q, SAC"][0] == by_label["Q, MBPO"][0] != by_label["return, MBPO"][0]
    assert by_label["Q, SAC"][1] != by_label["Q, MBPO"][1] == by_label["return, MBPO"][1]


def test_a_final_panel_names_its_arms_below(trial, tmp_path):
    ax = axes_of(trial, shown(trial, "smoke", tmp_path))[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["SAC", "MBPO, little", "MBPO", "FTFL"]


def test_many_tasks_are_wrapped_and_every_one_is_shown_once_in_each_panel(trial):
    """Nine in a row could not be read."""
    tasks = [f"task-{k}" for k in range(9)]
    kinds = {0: "return/final", 2: "reward/nmse"}
    rows = [
        {"panel": panel, "task": task, "series": series, "variant": "mbpo", "seed": seed, "x": x, "estimate": 1.0}
        for panel, series in kinds.items()
        for task in tasks
        for seed, x in (((0, np.nan), (np.nan, np.nan)) if panel == 0 else ((np.nan, 0), (np.nan, 1)))
    ]
    data = pd.DataFrame(rows, columns=points.COLUMNS).fillna({"low": 1.0, "high": 1.0, "n": 1, "planned": 1})
    axes = axes_of(trial, data)
    assert [ax.get_title() for ax in axes] == tasks + tasks
    assert max(ax.get_subplotspec().colspan.start for ax in axes) == 4
    assert [bool(ax.get_ylabel()) for ax in axes[:9]] == [True, *[False] * 4, True, *[False] * 3]


def test_labels_that_would_lie_upon_each_other_are_left_out():
    assert drawing._apart([0.0, 0.05, 0.5, 0.95], log=False) == ["0", "", "0.5", "0.95"]
    assert drawing._apart([0.001, 0.01, 0.1, 1.0], log=True) == ["0.001", "0.01", "0.1", "1"]
    assert drawing._apart([3.0], log=True) == ["3"]


def test_means_are_geometric_on_a_log_scale_alone():
    values = np.array([1.0, 100.0, math.nan])
    assert points.mean_interval(values, log=True)["estimate"] == pytest.approx(10.0)
    assert points.mean_interval(values, log=False)["estimate"] == pytest.approx(50.5)
    assert points.mean_interval(values, log=False)["n"] == 3, "a diverged run is counted"


# -- the note -----------------------------------------------------------------------------------------------------


def test_the_note_names_what_the_tier_reduced_for_every_agent_and_not_what_an_arm_is(trial, tmp_path):
    note = figures.note(trial, "smoke", shown(trial, "smoke", tmp_path))
    for words in (
        "tasks 2 (full size 3)",
        "seeds 2 (full size 3)",
        "width 16 (full size 256)",
        "model_width 8 (full size 200)",
        "steps 64 (full size 500000)",
    ):
        assert f" {words}" in note, words
    assert "updates_per_step" not in note, "SAC's update ratio is the arm"
    assert "lr" not in note
    paper = figures.note(trial, "paper", shown(trial, "paper", tmp_path))
    assert paper == "Tier paper: 3 of 3 seeds. Full size."


def test_the_note_says_where_no_claim_is_judged(trial, new_home, tmp_path):
    assert "No claim is judged at this tier." in figures.note(trial, "smoke", shown(trial, "smoke", tmp_path))
    silent = synthetic.trial(new_home, claims=[])
    assert "claim" not in figures.note(silent, "smoke", shown(silent, "smoke", tmp_path))


# -- tables -------------------------------------------------------------------------------------------------------


def texts(experiment, tier, data):
    with drawing.style("test"):
        return [text.get_text() for text in pages.page(experiment, data, "note").texts]


def test_a_table_of_returns_has_a_cell_per_task_and_arm(new_home, tmp_path):
    (new_home / "experiments" / "published.csv").write_text(PUBLISHED)
    experiment = synthetic.table(new_home, RETURNS)
    numbers = {0: 100.0, 1: 200.0, 2: 600.0}
    write_runs(experiment, "paper", tmp_path / "runs", lambda *a: numbers[a[2]])
    (tmp_path / "runs" / experiment.jobs("paper")[0].folders()[0] / "manifest.json").unlink()
    words = texts(experiment, "paper", shown(experiment, "paper", tmp_path))
    cells = words[1:-1]
    rows = [cells[i : i + 7] for i in range(0, len(cells), 7)]
    assert rows[0] == ["final return", "SAC", "MBPO, little", "MBPO", "FTFL", "SAC, UTD 1 (a)", "MBPO (b)"]
    assert [row[0] for row in rows[1:]] == ["hopper-hop", "quadruped-walk", "Hopper-v5"]
    assert rows[1][2] == "300 [-357, 957]\nn = 3 of 3"
    assert rows[1][1].endswith("n = 2 of 3")
    assert rows[1][5:] == ["104 [59.9, 156]\nn = 10", "40\n"]
    assert rows[2][4:] == ["–", "–", "–"], "an arm that does not run there, and nothing published"


def test_a_run_that_diverged_leaves_its_cell_readable(new_home, tmp_path):
    experiment = synthetic.table(new_home, RETURNS)
    write_runs(experiment, "smoke", tmp_path / "runs", lambda *a: math.nan if a[0] == "mbpo" else 1.0)
    assert "– [–, –]\nn = 2 of 2" not in texts(experiment, "smoke", shown(experiment, "smoke", tmp_path))
    assert "–\nn = 2 of 2" in texts(experiment, "smoke", shown(experiment, "smoke", tmp_path))


def test_the_table_of_hyperparameters_is_what_the_code_says(new_home, tmp_path):
    """Typed by hand, it would drift."""
    experiment = synthetic.table(new_home, DEFAULTS)
    data = figures.table(experiment, "smoke", tmp_path)
    parts = [registry(AgentConfig)["sac"], registry(AgentConfig)["mbpo"], registry(ProtocolConfig)["online"]]
    assert not data["field"].duplicated().any(), "fields that agents share stand once"
    for part in parts:
        rows = data[[part.name in names.split(", ") for names in data["part"]]].set_index("field")
        assert set(rows.index) == set(part.model_fields)
        for field, info in part.model_fields.items():
            assert rows.loc[field, "default"] == plain(getattr(part(), field))
            assert rows.loc[field, "source"] == info.description
    changes = {(row["part"], row["field"]): row["changed_by"] for _, row in data.iterrows() if row["changed_by"]}
    assert changes == {
        ("sac, mbpo", "updates_per_step"): "SAC: 1",
        ("mbpo", "target"): "FTFL: direct",
        ("mbpo", "normalise_targets"): "FTFL: on",
        ("mbpo", "synthetic_share"): "MBPO, little: 0.05",
    }


def test_the_table_of_hyperparameters_is_drawn_at_every_tier_without_runs(new_home, capsys):
    experiment = synthetic.table(new_home, DEFAULTS, variants={})
    assert experiment.tiers() == ["smoke", "ci", "reduced", "paper"]
    cli.main(["figure", "--experiment", "T1", "--tier", "reduced"])
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.suffix for path in written] == [".csv", ".svg", ".pdf", ".png"]
    words = texts(experiment, "reduced", pd.read_csv(written[0]))
    assert "synthetic_capacity" in words
    assert "1000000" in words


def test_no_text_of_a_page_runs_into_the_next_column(new_home, tmp_path):
    experiment = synthetic.table(new_home, DEFAULTS)
    data = pd.read_csv(io.BytesIO(figures.to_csv(figures.table(experiment, "smoke", tmp_path))))
    with drawing.style("test"):
        image = pages.page(experiment, data, "note")
        renderer = mpl.backends.backend_agg.FigureCanvasAgg(image).get_renderer()
        boxes = [text.get_window_extent(renderer) for text in image.texts[1:-1] if text.get_text()]
        assert all(box.x1 <= image.bbox.x1 for box in boxes)
        for a in boxes:
            beside = [b for b in boxes if b is not a and b.x0 > a.x0 and b.y1 > a.y0 + 2 and b.y0 < a.y1 - 2]
            assert all(a.x1 <= b.x0 for b in beside)
