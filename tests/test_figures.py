"""Figures: their data against golden files, the image from the data alone, the same bytes twice."""

import math
from pathlib import Path

import pandas as pd
import pytest

from dynarep import figures
from dynarep.errors import UserError
from dynarep.experiment import find, load_all
from synthetic import write_runs

GOLDEN = Path(__file__).parent / "golden"


def value(variant, task, seed, update, metric):
    """Smooth in everything, positive, different for every name."""
    name = sum(map(ord, variant + metric)) % 17
    return math.exp(0.1 * name - 0.02 * update + 0.2 * math.sin(3 * seed + name) + 0.01 * len(task))


@pytest.fixture(params=["R1", "C"])
def drawn(request, tmp_path):
    experiment = find(load_all(), request.param)
    write_runs(experiment, "smoke", tmp_path / "runs", value)
    return experiment, tmp_path


def test_the_figures_data_are_the_golden_ones(drawn):
    experiment, tmp_path = drawn
    data = figures.to_csv(figures.table(experiment, "smoke", tmp_path / "runs")).decode()
    golden = (GOLDEN / f"{experiment.key}.csv").read_text()
    assert data == golden, "data of the figure changed; if that is meant, look at the diff and replace the golden file"


def test_the_same_runs_give_the_same_bytes_in_every_format(drawn):
    experiment, tmp_path = drawn
    written = [figures.write(experiment, "smoke", tmp_path / "runs", tmp_path / name) for name in "ab"]
    for a, b in zip(*written, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name
    assert {p.suffix for p in written[0]} == {".csv", ".svg", ".pdf", ".png"}


def test_the_image_follows_from_the_csv_alone(drawn):
    experiment, tmp_path = drawn
    paths = {p.suffix: p for p in figures.write(experiment, "smoke", tmp_path / "runs", tmp_path / "figures")}
    data = pd.read_csv(paths[".csv"])
    note = figures.note(experiment, "smoke", data)
    again = figures.draw(experiment, "smoke", data, note)
    assert again["svg"] == paths[".svg"].read_bytes()


def test_missing_seeds_are_counted_on_the_figure(drawn):
    experiment, tmp_path = drawn
    job = experiment.jobs("smoke")[0]
    (tmp_path / "runs" / job.folders()[1] / "manifest.json").unlink()
    data = figures.table(experiment, "smoke", tmp_path / "runs")
    assert figures.note(experiment, "smoke", data).startswith("Tier smoke: 1 of 2 seeds.")
    svg = figures.write(experiment, "smoke", tmp_path / "runs", tmp_path / "figures")[1].read_text()
    assert "1 of 2 seeds" in svg
    assert "full size" in svg


def test_an_altered_run_is_not_drawn(drawn):
    experiment, tmp_path = drawn
    path = tmp_path / "runs" / experiment.jobs("smoke")[0].folders()[0] / "metrics.csv"
    path.write_bytes(path.read_bytes().replace(b",8,", b",9,", 1))
    with pytest.raises(UserError, match="altered"):
        figures.table(experiment, "smoke", tmp_path / "runs")
