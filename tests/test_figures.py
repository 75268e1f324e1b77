"""Figures and tables: their data against golden files, the image from the data alone, the same bytes twice."""

import functools
import io
import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

import paired
import synthetic
from dynarep import claims, cli, figures, stats
from dynarep.configs import AgentConfig, ProtocolConfig, registry
from dynarep.errors import UserError
from dynarep.experiment import find, load_all, plain
from dynarep.figures import drawing, pages, palette, points, scatter
from synthetic import DEFAULTS, RETURNS, TRIAL, write_runs

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = """\
algorithm,label,task,published_task,env_step,action_repeat,utd,n_seeds,mean,low,high,source,licence,caveat,statistic,reading_error
"SAC, UTD 1","SAC, UTD 1 (a)",hopper-hop,hopper-hop,500000,1,1,10,104.1,59.9,155.5,a,MIT,none,mean over seeds,
MBPO,MBPO (b),hopper-hop,hopper-hop,500000,1,20,,40,,,b,MIT,mean alone,mean over seeds,
"SAC, UTD 1","SAC, UTD 1 (a)",humanoid-run,humanoid-run,500000,1,1,10,105.1,94.4,116.3,a,MIT,not shown,mean over seeds,
Curve,"Curve (read off a figure, ±20)",hopper-hop,hopper-hop,100000,2,8,10,70,,,c,MIT,read off,mean over seeds,20
Curve,"Curve (read off a figure, ±20)",hopper-hop,hopper-hop,50000,2,8,10,30,,,c,MIT,read off,mean over seeds,20
Curve,"Curve (read off a figure, ±0.01)",dmc-hard,seven,100000,2,8,10,0.5,,,c,MIT,read off,iqm,0.01
"""


def value(variant, task, seed, update, metric):
    """Smooth in everything, positive, different for every name; SAC has no model to measure."""
    if variant == "sac" and metric.startswith(("reward/", "state/")):
        return None
    name = sum(map(ord, variant + metric)) % 17
    return math.exp(0.1 * name - 0.02 * update + 0.2 * math.sin(3 * seed + name) + 0.01 * len(task))


@pytest.fixture(params=["R1", "C", "trial", "returns", "paired"])
def drawn(request, tmp_path, new_home):
    """An experiment, the tier whose runs are there, and a folder."""
    if request.param in ("R1", "C"):
        experiment, tier = find(load_all(), request.param), "smoke"
    elif request.param == "paired":
        experiment, tier = paired.load(new_home), "ci"
    else:
        (new_home / "experiments" / "published.csv").write_text(PUBLISHED)
        make = (
            synthetic.trial if request.param == "trial" else functools.partial(synthetic.table, form=RETURNS, id="Y2")
        )
        experiment, tier = make(new_home), "paper"
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
    planned = {"paper": 3, "ci": 3}.get(tier, 2)
    (folder / "runs" / jobs[0].folders()[1] / "manifest.json").unlink()
    note = figures.note(experiment, tier, shown(experiment, tier, folder))
    assert note.startswith(f"Tier {tier}: {planned - 1} of {planned} seeds.")


def test_an_altered_run_is_not_drawn(drawn):
    experiment, tier, folder = drawn
    path = folder / "runs" / experiment.jobs(tier)[0].folders()[0] / "metrics.csv"
    path.write_bytes(path.read_bytes().replace(b",8,", b",9,", 1))
    with pytest.raises(UserError, match="altered"):
        figures.table(experiment, tier, folder / "runs")


EXTREME = [1e308, -1e308, 1e100, -1e-100, 5e-324, math.nan, math.inf, -math.inf, 0.0, 1.0]


@pytest.mark.filterwarnings("ignore:Attempt to set non-positive", "ignore::RuntimeWarning")  # they go on
@pytest.mark.parametrize("name", ["R1", "C", "trial"])
def test_runs_of_any_numbers_can_be_drawn(new_home, tmp_path, name):
    """Runs may come from anybody; what matplotlib cannot place is no number of a run (`records.LARGEST`)."""
    experiment = synthetic.trial(new_home) if name == "trial" else find(load_all(), name)
    random = np.random.default_rng(0)
    write_runs(experiment, "smoke", tmp_path / "runs", lambda *_: float(random.choice(EXTREME)))
    data = shown(experiment, "smoke", tmp_path)
    with drawing.style("test"):
        assert drawing.render(drawing.figure(experiment, data, "note"), "svg").startswith(b"<?xml")


def test_seeds_hundreds_of_orders_of_magnitude_apart_have_an_open_interval():
    found = points.mean_interval(np.array([1e-100, 1e100]), log=True)
    assert found["estimate"] == pytest.approx(1)
    assert (found["low"], found["high"]) == (0, math.inf)


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
    panels = [first, {**first, "kind": kind, "metrics": {"reward/nmse": "error"}, "published": False}]
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


def published_panel(home, **form):
    """Load the trial with a single panel that may show published numbers."""
    (home / "experiments" / "published.csv").write_text(PUBLISHED)
    panel = {"kind": "final", "metrics": {"return/final": "return"}, "label": "final return", **form}
    return synthetic.trial(home, figure={"panels": [panel]}, claims=[])


def sources_of(data):
    return list(dict.fromkeys(data[data["series"] == points.PUBLISHED]["variant"]))


CURVE = "Curve (read off a figure, ±20)"


@pytest.mark.parametrize(
    ("form", "smoke", "paper"),
    [
        ({}, [], []),
        ({"published": True, "published_step": 500000}, [], ["SAC, UTD 1 (a)", "MBPO (b)"]),
        ({"published": ["MBPO"]}, [], ["MBPO (b)"]),
        ({"published": ["MBPO"], "published_tiers": ["smoke", "reduced"]}, ["MBPO (b)"], []),
        ({"published": ["Curve", "MBPO"], "published_step": 100000}, [], [CURVE]),
    ],
)
def test_a_panel_shows_the_published_numbers_that_it_names(new_home, tmp_path, form, smoke, paper):
    experiment = published_panel(new_home, **form)
    for tier, expected in (("smoke", smoke), ("paper", paper)):
        write_runs(experiment, tier, tmp_path / "runs", value)
        assert sources_of(shown(experiment, tier, tmp_path)) == expected


def test_published_curves_are_drawn_at_their_steps_with_what_is_known_of_their_error(new_home, tmp_path):
    form = {"kind": "curves", "metrics": {"eval/return": "return"}, "x": "frame", "published": True}
    experiment = published_panel(new_home, **form)
    write_runs(experiment, "paper", tmp_path / "runs", value)
    data = shown(experiment, "paper", tmp_path)
    rows = data[data["variant"] == CURVE]
    assert sorted(zip(rows["x"], rows["estimate"], rows["low"], rows["high"], strict=True)) == [
        (50000, 30, 10, 50),
        (100000, 70, 50, 90),
    ]
    assert 0.5 not in set(data["estimate"]), "an aggregate has no place on a task"
    ax = axes_of(experiment, data)[0]
    bars = {str(bar.get_label()): bar.lines for bar in ax.containers}
    assert set(bars) == {CURVE, "SAC, UTD 1 (a)", "MBPO (b)"}
    expected = {CURVE: (20, 20), "SAC, UTD 1 (a)": (155.5 - 104.1, 104.1 - 59.9), "MBPO (b)": (0, 0)}
    for label, (line, _, (error,)) in bars.items():
        place = error.get_segments()[0]
        assert (place[1][1] - line.get_ydata()[0], line.get_ydata()[0] - place[0][1]) == pytest.approx(expected[label])
        assert line.get_marker() != "None"
    assert list(bars[CURVE][0].get_xdata()) == [50000, 100000], "joined in the order of steps"


def test_the_note_says_what_was_read_off_a_figure_and_how_well(new_home, tmp_path):
    form = {"kind": "curves", "metrics": {"eval/return": "return"}, "x": "frame"}
    for names, said in ((["Curve", "MBPO"], "Curve: read off a figure, ±20."), (["MBPO"], "")):
        experiment = published_panel(new_home, published=names, **form)
        write_runs(experiment, "paper", tmp_path / "runs", value)
        note = figures.note(experiment, "paper", shown(experiment, "paper", tmp_path))
        assert note == " ".join(filter(None, ["Tier paper: 3 of 3 seeds. Full size.", said]))


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"published": "MBPO"}, "panels.0.published: input should be true, false or a list of algorithms, got 'MBPO'"),
        ({"published": []}, "panels.0.published: input should be true, false or a list of algorithms"),
        ({"published": ["MBOP"]}, "panels.0.published: unknown algorithm 'MBOP'. Did you mean 'MBPO'? Allowed: Curve,"),
        ({"published": ["Curve"]}, "panels.0.published_step: is missing. 'Curve' has several numbers for hopper-hop"),
        ({"published": True}, "panels.0.published_step: is missing. 'Curve' has several numbers for hopper-hop"),
        (
            {"published": ["Curve"], "published_step": 400000},
            "panels.0.published_step: no number at 400000. There are some at: 50000, 100000.",
        ),
        ({"published": ["MBPO"], "published_tiers": ["papre"]}, "panels.0.published_tiers.0: input should be 'smoke'"),
        ({"published": ["MBPO"], "kind": "curves"}, "curves that show them need 'x: frame'"),
        ({"colour_by": "series"}, "'colour_by: series' is for curves of one metric"),
    ],
)
def test_published_numbers_that_cannot_be_shown_are_refused(new_home, form, said):
    with pytest.raises(UserError) as error:
        published_panel(new_home, **form)
    assert said in str(error.value)


def test_arms_of_a_series_share_a_colour_and_differ_in_line_style_where_a_panel_wants_it(new_home, tmp_path):
    """Six arms have six colours that nobody can tell apart; three colours in two styles can be."""
    base = TRIAL["variants"]["mbpo"]
    arms = {f"{s}_{k}": {**base, "label": f"{s}{k}", "series": s} for s in ("low", "high") for k in range(4)}
    variants = {**arms, "alone": {**base, "label": "alone", "series": ""}, "sac": TRIAL["variants"]["sac"]}
    panel = {"kind": "curves", "metrics": {"eval/return": "return"}, "label": "return", "colour_by": "series"}

    def load(panel, **more):
        return synthetic.trial(new_home, figure={"panels": [panel]}, claims=[], variants=variants | more)

    experiment = load(panel)
    write_runs(experiment, "smoke", tmp_path / "runs", value)
    data = shown(experiment, "smoke", tmp_path)
    look = {x.get_label(): (x.get_color(), x.get_linestyle()) for x in axes_of(experiment, data)[0].lines}
    colours = [[look[f"{s}{k}"][0] for k in range(4)] for s in ("low", "high")]
    assert [len(set(of)) for of in colours] == [1, 1]
    assert len({colours[0][0], colours[1][0], look["alone"][0], look["SAC"][0]}) == 4
    assert [look[f"low{k}"][1] for k in range(4)] == [look[f"high{k}"][1] for k in range(4)] == drawing.STYLES
    few = load(panel | {"variants": ["low_2", "high_2"]})
    look = {
        x.get_label(): (x.get_color(), x.get_linestyle())
        for x in axes_of(few, data[data["variant"] == "low_2"])[0].lines
    }
    assert look["low2"][1] == "-", "its place among those that are shown"
    with pytest.raises(UserError, match=r"colour_by: 5 variants of series 'low', but only 4 line styles"):
        load(panel, low_4={**base, "label": "low4", "series": "low"})


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


def test_long_names_of_arms_stay_inside_the_figure(new_home, tmp_path):
    """The first arm's began to the left of it."""
    base = TRIAL["variants"]["mbpo"]
    variants = {
        f"arm_{k}": {**base, "label": f"MBPO (residual, raw), reward x {k}/128", "environment": {"reward_scale": k}}
        for k in range(1, 6)
    }
    runs = {"small": {**TRIAL["runs"]["small"]}}
    runs["small"]["budget"] = {"smoke": [{**runs["small"]["budget"]["smoke"][0], "tasks": ["hopper-hop"]}]}
    curves = {**TRIAL["figure"]["panels"][2], "metrics": {"eval/return": "r"}}
    final = {**TRIAL["figure"]["panels"][0], "published": False}
    experiment = synthetic.trial(new_home, variants=variants, runs=runs, figure={"panels": [curves, final]}, claims=[])
    write_runs(experiment, "smoke", tmp_path / "runs", value)
    with drawing.style("test"):
        image = drawing.figure(experiment, shown(experiment, "smoke", tmp_path), "note")
        renderer = mpl.backends.backend_agg.FigureCanvasAgg(image).get_renderer()
        boxes = [label.get_window_extent(renderer) for label in image.axes[-1].get_xticklabels()]
    assert len(boxes) == 5
    assert min(box.x0 for box in boxes) >= 0
    assert min(box.y0 for box in boxes) >= 0


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
    ticks = [0.0, 0.05, 0.5, 0.95]
    assert drawing._apart(ticks, np.array(ticks)) == ["0", "", "0.5", "0.95"]
    ticks = [0.001, 0.01, 0.1, 1.0]
    assert drawing._apart(ticks, np.log10(ticks)) == ["0.001", "0.01", "0.1", "1"]
    assert drawing._apart([3.0], np.array([0.5])) == ["3"]


@pytest.mark.parametrize(
    ("doses", "written"),
    [
        ([1 / 128, 1 / 32, 0.5, 1.0], ["1/128", "1/32", "1/2", "1"]),  # 0.0078125 would run into its neighbour
        ([0.0, 1 / 128, 1.0, 16.0], ["0", "1/128", "1", "16"]),
        ([0.25, 0.5, 1.0], ["0.25", "0.5", "1"]),
        ([1 / 3, 0.7, 1.0], ["0.333333", "0.7", "1"]),
    ],
)
def test_doses_are_written_as_people_write_them(doses, written):
    assert drawing._words(doses) == written


@pytest.mark.parametrize(("scale", "doses"), [("log", [1 / 128, 1 / 32, 1.0]), ("symlog", [0.0, 1 / 32, 1.0])])
def test_dose_panels_of_arms_that_differ_in_their_environment_have_readable_doses(new_home, tmp_path, scale, doses):
    base = TRIAL["variants"]["mbpo"]
    variants = {
        f"{series}_{k}": {
            **base, "label": f"{series} {k}", "series": series, "dose": dose, "environment": {"reward_scale": 2.0**-k},
            "agent": {"target": target},
        }
        for series, target in (("raw", "residual"), ("other", "direct"))
        for k, dose in enumerate(doses)
    }  # fmt: skip
    panel = {"kind": "dose", "metrics": {"return/final": "return"}, "label": "return", "x_scale": scale}
    panels = [panel | {"x_linear_within": 1 / 64}, {"kind": "curves", "metrics": {"eval/return": "r"}, "label": "r",
              "x": "agent_step", "colour_by": "series"}]  # fmt: skip
    experiment = synthetic.trial(new_home, variants=variants, figure={"panels": panels}, claims=[])
    write_runs(experiment, "smoke", tmp_path / "runs", value)
    data = shown(experiment, "smoke", tmp_path)
    axes = axes_of(experiment, data[data["task"] == "hopper-hop"])
    assert [label.get_text() for label in axes[0].get_xticklabels()] == drawing._words(doses)
    lines = {line.get_label(): line for line in axes[0].lines if not line.get_label().startswith("_")}
    assert set(lines) == {"raw", "other"}
    means = data[(data["panel"] == 0) & data["seed"].isna() & (data["task"] == "hopper-hop")].set_index("variant")
    for series, line in lines.items():
        assert list(line.get_ydata()) == [means.loc[f"{series}_{k}", "estimate"] for k in range(3)]
    seeds = [value("raw_0", "hopper-hop", seed, 8, "return/final") for seed in (0, 1)]
    level = stats.level([np.array(seeds)], 0.0)
    row = means.loc["raw_0"]
    assert (row["estimate"], row["low"], row["high"]) == pytest.approx((level.point, level.low, level.high))
    assert (axes[0].get_xscale(), axes[1].get_xlabel()) == (scale, "agent steps")
    assert {line.get_label() for line in axes[1].lines} == {v["label"] for v in variants.values()}


# -- pairs --------------------------------------------------------------------------------------------------------

FITS, HELP = [0.1, 0.3, 0.2, 0.8, 0.5, 2.0], [-1.0, 0.5, 0.2, 1.0, 1.5, 4.0]


def scattered(home, folder, value=None, **changes):
    experiment = paired.load(home, **changes)
    write_runs(experiment, "ci", folder / "runs", value or paired.help_by(HELP, FITS))
    return experiment, shown(experiment, "ci", folder)


def test_a_scatter_shows_what_a_claim_of_the_same_ranks_says(new_home, tmp_path):
    """Two numbers for one thing, and nobody would know which to believe."""
    experiment, data = scattered(new_home, tmp_path)
    v = claims.judge(experiment, experiment.spec.judged()[0], "ci", tmp_path / "runs")
    (ax,) = axes_of(experiment, data)
    rank = data[data["series"] == scatter.RANK].iloc[0]
    assert (rank["estimate"], rank["low"], rank["high"]) == pytest.approx((v.estimate, v.low, v.high))
    assert ax.get_title(loc="left") == f"Spearman's ρ = {v.estimate:.2f} [{v.low:.2f}, {v.high:.2f}], 6 settings"
    bars = {bar.get_label().split("  ")[1]: bar for bar in ax.containers}
    for label, (x, x_low, x_high, y, y_low, y_high) in v.settings.items():
        line, _, (across, up) = bars[label]
        assert (line.get_xdata()[0], line.get_ydata()[0]) == pytest.approx((x, y))
        assert across.get_segments()[0][:, 0] == pytest.approx([x_low, x_high])
        assert up.get_segments()[0][:, 1] == pytest.approx([y_low, y_high])
    assert 0.0 in [line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1 and line.get_lw() < 1]
    assert (ax.get_xscale(), ax.get_xlabel()) == ("log", "reward error of a fit")


def test_every_point_of_a_scatter_has_a_number_that_nothing_hides(new_home, tmp_path):
    """Nineteen settings, most of them upon each other."""
    g = np.random.default_rng(1)
    fits, effects = list(np.exp(0.2 * g.normal(size=19))), list(0.3 * g.normal(size=19))
    experiment, data = scattered(new_home, tmp_path, paired.help_by(effects, fits), **paired.form(19))
    with drawing.style("test"):
        image = drawing.figure(experiment, data, "note")
        renderer = mpl.backends.backend_agg.FigureCanvasAgg(image).get_renderer()
        (ax,) = (ax for ax in image.axes if ax.axison)
        for text in ax.texts:
            text.update_positions(renderer)
        boxes = [mpl.text.Text.get_window_extent(text, renderer) for text in ax.texts]  # without the line to the point
        points_at = {text.get_text(): text.xy for text in ax.texts}
        legend = [text.get_text() for text in ax.get_legend().get_texts()]
        assert all(image.bbox.x1 >= text.get_window_extent(renderer).x1 for text in ax.get_legend().get_texts())
        assert ax.get_legend().get_window_extent(renderer).height <= image.bbox.height
    assert legend[0] == "even"
    assert legend.index("odd") == 11
    for entry in legend:
        number, _, label = entry.partition("  ")
        if label:
            row = data[(data["variant"] == label) & data["x"].notna()].iloc[0]
            assert points_at[number] == (row["x"], row["estimate"]), "a number stands at another point"
    assert len(points_at) == 19
    for k, a in enumerate(boxes):
        assert ax.bbox.x0 <= a.x0 <= a.x1 <= ax.bbox.x1 + 1
        for b in boxes[:k]:
            assert not (a.x0 < b.x1 - 1 and b.x0 < a.x1 - 1 and a.y0 < b.y1 - 2 and b.y0 < a.y1 - 2), (k, a, b)


def test_settings_without_a_point_are_counted_on_the_figure(new_home, tmp_path):
    experiment, data = scattered(new_home, tmp_path)
    assert figures.note(experiment, "ci", data).startswith("Tier ci: 3 to 4 seeds, all there. Reduced: ")
    for name, seeds in (("fit_1", [0]), ("direct_3", [7, 8, 9, 10])):
        for job in experiment.jobs("ci"):
            for seed, folder in zip(job.seeds, job.folders(), strict=True):
                if job.variant == name and seed in seeds:
                    (tmp_path / "runs" / folder / "manifest.json").unlink()
    data = shown(experiment, "ci", tmp_path)
    assert "reward x 1/8" not in set(data["variant"])
    note = figures.note(experiment, "ci", data)
    assert note.startswith("Tier ci: 2 of 3 seeds. 1 of 6 settings have no point. Reduced: ")
    (ax,) = axes_of(experiment, data)
    assert ax.get_title(loc="left").endswith("5 settings")


def test_a_seed_that_one_arm_lacks_is_left_out_of_the_difference(new_home, tmp_path):
    experiment, _ = scattered(new_home, tmp_path)
    job = next(job for job in experiment.jobs("ci") if job.variant == "residual_5")
    (tmp_path / "runs" / job.folders()[0] / "manifest.json").unlink()
    data = shown(experiment, "ci", tmp_path)
    row = data[(data["variant"] == "reward x 1/32") & data["x"].notna()].iloc[0]
    assert (row["n"], row["planned"]) == (3, 4)
    assert row["estimate"] == pytest.approx(4.0 + np.mean([0.3, -0.5, 0.4])), "seeds 8, 9 and 10"


def test_where_there_is_no_order_a_scatter_says_so(new_home, tmp_path):
    experiment, data = scattered(new_home, tmp_path, paired.help_by(HELP, [0.5] * 6))
    assert scatter.RANK not in set(data["series"])
    assert axes_of(experiment, data)[0].get_title(loc="left") == "no rank correlation"


def test_a_scatter_stands_across_all_tasks_below_panels_that_have_a_place_each(new_home, tmp_path):
    runs = paired.form()["runs"]
    for group in runs.values():
        group["budget"]["ci"][0]["tasks"] = ["hopper-hop", "walker-walk"]
    pairs = paired.form()["pairs"]
    pairs[0]["tasks"] = ["walker-walk"]
    panels = [paired.PANEL | {"x_scale": "symlog", "x_linear_within": 0.1},
              {"kind": "final", "metrics": {"return/final": "return"}, "label": "r"}]  # fmt: skip
    value = paired.help_by(HELP, FITS)
    shift = {"hopper-hop": 0.0, "walker-walk": 2.0}
    experiment, data = scattered(
        new_home, tmp_path, lambda v, task, *a: value(v, task, *a) + shift[task] * v.startswith("direct"),
        runs=runs, pairs=pairs, figure={"panels": panels},
    )  # fmt: skip
    rows = data[(data["panel"] == 0) & data["x"].notna()].set_index("variant")
    assert rows.loc["reward x 1/1", ["task", "estimate"]].tolist() == ["walker-walk", pytest.approx(HELP[0] + 2)]
    assert rows.loc["reward x 1/2", ["task", "estimate"]].tolist() == [
        "hopper-hop + walker-walk", pytest.approx(HELP[1] + 1),
    ]  # fmt: skip
    axes = axes_of(experiment, data)
    spans = {(ax.get_subplotspec().colspan.start, ax.get_subplotspec().colspan.stop): ax for ax in axes}
    assert set(spans) == {(0, 2), (0, 1), (1, 2)}
    assert spans[0, 2].get_xscale() == "symlog"
    assert [spans[place].get_title() for place in ((0, 1), (1, 2))] == ["hopper-hop", "walker-walk"]


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
    cli.main(["figure", "--experiment", "Y1", "--tier", "reduced"])
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.suffix for path in written] == [".csv", ".svg", ".pdf", ".png"]
    words = texts(experiment, "reduced", pd.read_csv(written[0]))
    assert "synthetic_capacity" in words
    assert "1000000" in words


SIZES = {"dog": [223, 38], "humanoid": [67, 21], "hopper": [15, 4]}
ARCHITECTURE = {"kind": "architecture", "agents": ["mad_td"], "sizes": SIZES}


@pytest.fixture
def networks(new_home, tmp_path):
    (new_home / "results").mkdir()
    experiment = synthetic.table(new_home, ARCHITECTURE, variants={}, runs={})
    return experiment, shown(experiment, "paper", tmp_path)


def test_the_table_of_networks_has_the_parameters_that_the_specification_counts(networks):
    """mad-td 3.2: dog encoder 379k, model 1.358M, both critics 1.249M, actor 547k; 3.53M, 3.41M, 3.34M in all."""
    _, data = networks
    sums = data[data["layer"].isna() | data["layer"].astype(str).str.startswith("all")]
    count = {(row["size"], row["net"]): int(row["parameters"]) for _, row in sums.iterrows()}
    assert round(count["dog", "encoder"], -3) == 379_000
    assert round(count["dog", "dynamics"] + count["dog", "reward"], -3) == 1_358_000
    assert round(count["dog", "critic"], -3) == 1_249_000
    assert round(count["dog", "actor"], -3) == 547_000
    totals = {size: round(count[size, "all networks"], -4) for size in SIZES}
    assert totals == {"dog": 3_530_000, "humanoid": 3_410_000, "hopper": 3_340_000}


def test_the_table_of_networks_counts_what_the_agent_has(networks):
    """Written beside the code, it would drift."""
    from dynarep.agents.mad_td import MadTD
    from dynarep.configs.mad_td import MadTDConfig

    _, data = networks
    agent = MadTD(MadTDConfig(), 15, 4, [0])
    numbers = sum(
        net.parameter(name).numel()
        for net in (agent.encoder, agent.model, agent.critic, agent.actor)
        for name in net.slots()
    )
    total = data[(data["size"] == "hopper") & (data["net"] == "all networks")]["parameters"]
    assert int(total.iloc[0]) == numbers


def test_a_page_of_networks_puts_sizes_beside_each_other(networks):
    experiment, data = networks
    cells = texts(experiment, "paper", data)[1:-1]
    rows = [cells[i : i + 7] for i in range(0, len(cells), 7)]
    assert rows[0][-1] == "parameters (dog /\nhumanoid / hopper)"
    assert rows[1] == ["encoder", "1", "223 / 67 / 15", "512", "LayerNorm", "Mish", "115 712 / 35 840 / 9 216"]
    assert rows[2] == ["encoder", "2", "512", "512", "LayerNorm", "SimNorm", "263 680"]
    assert ["critic", "3", "512", "151", "none", "softmax over bins", "77 463"] in rows
    assert rows[-1][:2] == ["all networks", ""]
    note = figures.note(experiment, "paper", data)
    assert note == "Read from the code: every layer at the default width, and its parameters. The same at every tier."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"agents": ["sac"]}, "table.agents: no architecture of 'sac'. Allowed: mad_td."),
        ({"sizes": {"dog": [223]}}, "table.sizes.dog.1: is missing."),
        ({"sizes": {"dog": [223, 0]}}, "table.sizes.dog.1: input should be greater than or equal to 1, got 0."),
        ({"protocols": ["online"]}, "table: a table of architecture needs agents and sizes, and cannot have label"),
    ],
)
def test_a_table_of_networks_that_cannot_be_made_is_refused(new_home, change, said):
    with pytest.raises(UserError) as error:
        synthetic.table(new_home, ARCHITECTURE | change, variants={}, runs={})
    assert said in str(error.value)


def test_the_hyperparameters_of_mad_td_can_be_read(new_home, tmp_path):
    """A default of None prints as a word, every field has a source, and a value says what it is."""
    form = {"kind": "hyperparameters", "agents": ["mad_td"], "protocols": ["online", "frozen"]}
    experiment = synthetic.table(new_home, form, variants={})
    data = figures.table(experiment, "paper", tmp_path).set_index(["part", "field"])
    defaults = {field: row["default"] for (_, field), row in data.iterrows()}
    assert defaults["model_width"] == defaults["freeze_model_after"] == "none"
    assert (defaults["planner"], defaults["reset"], defaults["model_fraction"]) == ("off", "none", "0.05")
    assert not [field for field, default in defaults.items() if default in ("None", "True", "False", "")]
    assert data["source"].str.len().min() > 3
    assert {"mad_td", "online", "frozen"} <= {name for part, _ in data.index for name in part.split(", ")}


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


@pytest.mark.slow  # seaborn alone takes 2 s to import
def test_colours_are_those_of_seaborns_colour_blind_palette():
    seaborn = pytest.importorskip("seaborn")
    assert palette.colours(13) == list(seaborn.color_palette("colorblind", 13))
