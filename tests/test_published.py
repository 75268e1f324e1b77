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


def test_nothing_unverified_or_second_hand_is_shown(rows):
    text = " ".join(" ".join(map(str, row.model_dump().values())) for row in rows).lower()
    for word in ("unverified", "stfl", "mr.q", "mrq", "digitised", "mbpo-like"):
        assert word not in text


def test_the_baseline_of_every_task_is_there(rows):
    """SAC decides F9: it is to be compared at a low and at a high update ratio."""
    for task in DMC:
        there = {row.algorithm for row in rows if row.task == task}
        assert {"REDQ, UTD 20", "SAC with resets, UTD 32"} <= there
        assert any(name.startswith(("SAC, UTD 1", "SAC, UTD 2")) for name in there)
        assert {row.env_step for row in rows if row.task == task} == {500_000}
    for task in GYM:
        assert {row.algorithm for row in rows if row.task == task} == {"SAC, UTD 1", "REDQ, UTD 20", "MBPO"}


def test_a_number_stands_once_for_each_source_and_task(rows):
    keys = [(row.label, row.task, row.env_step) for row in rows]
    assert len(set(keys)) == len(keys)
    assert {row.task for row in published.read(EXPERIMENTS, ["hopper-hop", "fish-swim"])} == {"hopper-hop"}


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
