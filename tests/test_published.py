"""Numbers of others: where they come from, and that nothing slips in that is not theirs to give."""

import csv
import io
from pathlib import Path

import pytest

from dynarep import published
from dynarep.errors import UserError

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
DMC = ["hopper-stand", "hopper-hop", *(f"humanoid-{x}" for x in ("stand", "walk", "run"))]
DMC += ["quadruped-walk", "quadruped-run"]
SEVEN = [f"dog-{x}" for x in ("stand", "walk", "trot", "run")] + [f"humanoid-{x}" for x in ("stand", "walk", "run")]
NINE = [*SEVEN, "hopper-stand", "hopper-hop"]
GYM = [f"{name}-v5" for name in ("Hopper", "HalfCheetah", "Walker2d", "Ant", "Humanoid")]  # no InvertedPendulum found


@pytest.fixture(scope="module")
def rows():
    return published.read(EXPERIMENTS)


def test_every_number_has_a_source_with_a_commit_a_free_licence_and_a_caveat(rows):
    assert len(rows) >= 50
    for row in rows:
        assert len(row.source.split(" @ ")[1].split(",")[0]) == 40, "no commit"
        assert row.licence in ("MIT", "Apache-2.0"), "a non-commercial licence"
        assert len(row.caveat) > 10
        assert row.algorithm in row.label


def test_nothing_unverified_is_shown(rows):
    text = " ".join(" ".join(map(str, row.model_dump().values())) for row in rows).lower()
    for word in ("unverified", "stfl", "mr.q", "mrq", "digitised", "mbpo-like"):
        assert word not in text


def test_a_number_that_was_read_off_a_figure_says_so_wherever_it_is_shown(rows):
    for row in rows:
        assert ("read off a figure, ±" in row.label) == (row.reading_error is not None)
        if row.reading_error is not None:
            assert row.label == f"{row.algorithm} (read off a figure, ±{row.reading_error:g})"
            assert "comparison.ipynb" in row.source


def test_the_baseline_of_every_task_is_there(rows):
    """SAC decides F9: it is to be compared at a low and at a high update ratio."""
    for task in DMC:
        there = {
            row.algorithm: row.env_step for row in rows if row.task == task and row.algorithm[:3] in ("SAC", "RED")
        }
        assert {"REDQ, UTD 20", "SAC with resets, UTD 32"} <= set(there)
        assert any(name.startswith(("SAC, UTD 1", "SAC, UTD 2")) for name in there)
        assert set(there.values()) == {500_000}
    for task in GYM:
        assert {row.algorithm for row in rows if row.task == task} == {"SAC, UTD 1", "REDQ, UTD 20", "MBPO"}


def test_a_number_stands_once_for_each_source_and_task(rows):
    keys = [(row.label, row.task, row.env_step, row.statistic) for row in rows]
    assert len(set(keys)) == len(keys)
    assert {row.task for row in published.read(EXPERIMENTS, ["hopper-hop", "fish-swim"])} == {"hopper-hop"}


# -- MAD-TD's comparison (specification 1.4, 7.1, 7.2) ------------------------------------------------------------


@pytest.fixture(scope="module")
def number(rows):
    """Return the row of (algorithm, task, thousands of steps, statistic)."""
    table = {(row.algorithm, row.task, row.env_step // 1000, row.statistic): row for row in rows}
    return lambda *key: table[key if len(key) == 4 else (*key, published.PER_TASK)]


@pytest.mark.parametrize(
    ("algorithm", "task", "step", "mean"),
    [
        *(("MAD-TD, UTD 8", "dog-trot", step, mean) for step, mean in ((50, 20), (200, 230), (500, 650), (1000, 840))),
        *(("MAD-TD, UTD 8", "dog-run", step, mean) for step, mean in ((150, 110), (400, 250), (700, 350), (1000, 440))),
        ("MAD-TD, UTD 8", "dog-stand", 300, 900),
        ("MAD-TD, UTD 8", "dog-walk", 900, 910),
        ("MAD-TD, UTD 8", "humanoid-stand", 600, 700),
        ("MAD-TD, UTD 8", "humanoid-walk", 250, 60),
        ("MAD-TD, UTD 8", "humanoid-run", 1000, 210),
        *(("BRO, UTD 2", "dog-trot", step, mean) for step, mean in ((200, 50), (500, 358), (1000, 783))),
        *(("BRO, UTD 2", "hopper-hop", step, mean) for step, mean in ((200, 185), (500, 273), (1000, 295))),
        *(
            ("BRO, UTD 10", "humanoid-run", step, mean)
            for step, mean in ((200, 79), (500, 187), (525, 104), (750, 254))
        ),
        *(("BRO, UTD 10", "dog-walk", step, mean) for step, mean in ((525, 378), (750, 913), (775, 352), (1000, 928))),
        *(("BRO, UTD 10", "hopper-stand", step, mean) for step, mean in ((200, 907), (525, 902), (775, 940))),
        *(("TD-MPC2", "dog-trot", step, mean) for step, mean in ((500, 132), (1000, 500), (2000, 885))),
        *(("TD-MPC2", "humanoid-walk", step, mean) for step, mean in ((500, 278), (1000, 628), (2000, 860))),
        ("TD-MPC2", "hopper-hop", 1000, 338),
    ],
)
def test_a_number_is_the_one_of_the_specifications_tables(number, algorithm, task, step, mean):
    """The tables are rounded to whole points, those of TD-MPC2 at two million steps "roughly"."""
    assert number(algorithm, task, step).mean == pytest.approx(mean, abs=0.65)


def test_every_point_of_the_curve_that_was_read_off_is_there_with_its_error(rows):
    mine = [row for row in rows if row.algorithm == "MAD-TD, UTD 8" and row.task != published.SEVEN]
    steps = {50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 800, 900, 1000}
    for task in SEVEN:
        missing = {50} if task in ("humanoid-stand", "humanoid-run") else set()  # not legible there
        assert {row.env_step // 1000 for row in mine if row.task == task} == steps - missing
    for row in mine:
        assert (row.reading_error, row.n_seeds, row.low, row.mean % 10) == (20, 10, None, 0)
        assert "frames or agent steps" in row.caveat
        assert "training returns" in row.caveat
        assert row.bounds == (row.mean - 20, row.mean + 20)


def test_the_baselines_of_mad_td_are_there_with_their_intervals_and_conventions(number):
    for task in NINE:
        hopper = task.startswith("hopper")
        for algorithm, steps in (("BRO, UTD 2", (200, 500, 1000)), ("BRO, UTD 10", (200, 500, 525, 750, 775, 1000))):
            for step in steps:
                row = number(algorithm, task, step)
                assert (row.action_repeat, row.n_seeds) == ((2, 5) if hopper else (1, 10))
                assert (row.bounds == (None, None)) == (step in (525, 775)), "the dips are known as means alone"
        for step in (200, 500, 1000, 2000):
            row = number("TD-MPC2", task, step)
            assert (row.action_repeat, row.n_seeds) == (2, 3)
            assert row.low < row.high


def test_resets_cost_bro_a_quarter_to_two_thirds_of_its_return(number):
    """What makes C9: specification 7.1."""
    for task in SEVEN:
        for before, after in ((500, 525), (750, 775)):
            lost = 1 - number("BRO, UTD 10", task, after).mean / number("BRO, UTD 10", task, before).mean
            assert 0.25 < lost < 0.7


@pytest.mark.parametrize(
    ("algorithm", "statistic", "mean", "low", "high"),
    [
        ("MAD-TD, UTD 8", "iqm", 0.785, 0.695, 0.860),
        ("MAD-TD, UTD 8", "median", 0.705, 0.63, 0.785),
        ("MAD-TD, UTD 8", "optimality gap", 0.292, 0.23, 0.356),
        ("BRO, UTD 2", "mean", 0.692, 0.628, 0.755),
        ("BRO, UTD 2", "median", 0.692, None, None),
        ("BRO, UTD 10", "iqm", 0.862, 0.771, 0.912),
        ("TD-MPC2", "iqm", 0.526, 0.369, 0.649),
        ("TD-MPC2", "optimality gap", 0.508, None, None),
    ],
)
def test_an_aggregate_is_that_of_the_specification(number, algorithm, statistic, mean, low, high):
    row = number(algorithm, published.SEVEN, 1000, statistic)
    assert (row.mean, row.low, row.high, row.reading_error) == (mean, low, high, 0.01)


def test_an_aggregate_is_the_mean_of_its_tasks(number, rows):
    """Read off another figure than the tasks, so it checks both."""
    for algorithm in ("MAD-TD, UTD 8", "BRO, UTD 2", "BRO, UTD 10", "TD-MPC2"):
        tasks = sum(number(algorithm, task, 1000).mean for task in SEVEN) / 7000
        assert number(algorithm, published.SEVEN, 1000, "mean").mean == pytest.approx(tasks, abs=0.01)
    assert not [row for row in published.read(EXPERIMENTS, SEVEN) if row.statistic != published.PER_TASK]


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "word", "said"),
    [
        ("task", "hopper-hopp", "line 2: task: "),
        ("task", "hopper-Hop", "line 2: task: unknown task"),
        ("mean", "nan", "line 2: mean: "),
        ("mean", "999", "lies outside its interval"),
        ("low", "", "write both bounds or none"),
        ("source", "", "line 2: source: "),
        ("n_seeds", "0", "line 2: n_seeds: "),
        ("env_step", "many", "line 2: env_step: "),
        ("statistic", "mode", "line 2: statistic: "),
        ("statistic", "iqm", "line 2: statistic 'iqm' does not go with task 'hopper-hop'"),
        ("task", "dmc-hard", "line 2: statistic 'mean over seeds' does not go with task 'dmc-hard'"),
        ("reading_error", "-20", "line 2: reading_error: "),
        ("reading_error", "0", "line 2: reading_error: "),
        ("reading_error", "twenty", "line 2: reading_error: "),
    ],
)
def test_a_bad_number_is_refused_with_its_line(tmp_path, field, word, said):
    lines = list(csv.DictReader(io.StringIO((EXPERIMENTS / published.FILE).read_text())))[:1]
    lines[0][field] = word
    with (tmp_path / published.FILE).open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    with pytest.raises(UserError) as error:
        published.read(tmp_path)
    assert said in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"published\.csv: cannot be read"):
        published.read(tmp_path)
