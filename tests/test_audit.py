"""Whatever is changed in results is found; what was not touched is clean; nothing is ever written."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from conftest import CHECKOUT
from dynarep import cli, dag, process
from dynarep.audit import KINDS, audit, contents, products, rerun, runs
from dynarep.audit.findings import printable
from dynarep.configs import ProtocolConfig, registry
from dynarep.errors import UserError
from dynarep.experiment import Job, load, load_all
from dynarep.manifests import Manifest
from dynarep.records import MACHINE
from mutations import MUTATIONS, TIER, Home, digit, forge

EXTREMES = ["nan", "inf", "-inf", "1e308", "-1e308", "5e-324", "0", "-0", "1"]
SHOWN = {"beyond": ("S", "D2"), "ftfl": ()}  # tiny: a toy in one piece, an agent that learns online


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """A home whose whole smoke tier was trained, drawn, judged and reported by the commands themselves."""
    home = tmp_path_factory.mktemp("audited") / "home"
    for file in (CHECKOUT / "experiments").glob("*/*"):
        if file.parent.name == "tiers" or file.name.split("_")[0] in SHOWN.get(file.parent.name, ()):
            target = home / file.relative_to(CHECKOUT)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = file.read_text(encoding="utf-8")
            if file.parent.name == "beyond":  # what it stands beside is not here
                content = yaml.safe_dump({k: v for k, v in yaml.safe_load(content).items() if k != "explains"})
            target.write_text(content, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNAREP_HOME", str(home))
        _, jobs = dag.load(TIER)
        cli.main(["train", *dag.arguments(jobs).split()])
        cli.main(["figure", "--tier", TIER, "--experiment", *SHOWN["beyond"]])
        cli.main(["claims", "--tier", TIER, "--out", str(home / f"results/runs/claims/{TIER}.json")])
        cli.main(["report", "--tier", TIER])
    return home


@pytest.fixture
def drawn_once(monkeypatch):
    """Drawing takes most of an audit's time, and the same CSV gives the same image."""
    known: dict[tuple[str, bytes], dict[str, bytes]] = {}
    draw = products.draw

    def once(experiment: Any, tier: str, csv: bytes) -> dict[str, bytes]:
        if (experiment.key, csv) not in known:
            known[experiment.key, csv] = draw(experiment, tier, csv)
        return known[experiment.key, csv]

    monkeypatch.setattr(products, "draw", once)


def state(folder: Path) -> dict[str, Any]:
    """Everything below a folder: names, kinds, times of change, contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and info.st_size < 2**24 else ""
        found[str(path)] = (info.st_mode, info.st_mtime_ns, info.st_size, content)
    return found


@pytest.mark.slow
def test_every_change_is_found_and_nothing_is_written(untouched, tmp_path, monkeypatch, drawn_once):
    """One test, not one each: the results to change are made once."""
    monkeypatch.setenv("DYNAREP_HOME", str(untouched))
    experiments = load_all()
    clean = audit(untouched, experiments)
    assert clean.data()["findings"] == [], "what nobody touched must be clean"
    assert clean.checked["runs"] == sum(len(j.seeds) for e in experiments for j in e.jobs(TIER))
    assert clean.checked["images"] == 6
    assert clean.checked["reports"] == 1
    wrong = {}
    for number, (name, (kind, change)) in enumerate(MUTATIONS.items()):
        home = Home(tmp_path / f"copy{number}")
        shutil.copytree(untouched, home.root, ignore=shutil.ignore_patterns("experiments", "log", ".transitions"))
        change(home)
        before = state(home.root)
        kinds = {finding.kind for finding in audit(home.root, experiments).findings}
        assert state(home.root) == before, f"{name}: the audit wrote into what it audits"
        if kind not in kinds:
            wrong[name] = (kind, kinds)
        for path in tmp_path.glob(f"copy{number}*"):
            shutil.rmtree(path)
    assert not wrong
    assert len(MUTATIONS) >= 30
    assert {kind for kind, _ in MUTATIONS.values()} | {"rerun"} == set(KINDS), "a kind that no change is found as"


@pytest.mark.slow
def test_only_training_again_finds_a_run_forged_with_all_its_hashes(untouched, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DYNAREP_HOME", str(untouched))
    home = Home(tmp_path / "copy")
    shutil.copytree(untouched, home.root, ignore=shutil.ignore_patterns("experiments"))
    forge(home.run("S", 2), digit)
    with pytest.MonkeyPatch.context() as patch:  # the forger draws, judges and reports again
        patch.setenv("DYNAREP_HOME", str(untouched))
        where = ["--tier", TIER, "--results", str(home.runs)]
        cli.main(["figure", *where, "--figures", str(home.root / "figures"), "--experiment", *SHOWN["beyond"]])
        cli.main(["claims", *where, "--out", str(home.runs / f"claims/{TIER}.json")])
        cli.main(["report", *where, "--figures", str(home.root / "figures")])
    capsys.readouterr()
    cli.main(["audit", str(home.root)])
    assert "not checked: whether training gives these numbers" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        cli.main(["audit", str(home.root), "--rerun", "1000", "--json"])
    assert left.value.code == 1
    said = json.loads(capsys.readouterr().out)
    assert not said["ok"]
    assert [finding["kind"] for finding in said["findings"]] == ["rerun"]
    assert said["findings"][0]["path"] == str((home.run("S", 2) / "metrics.csv").relative_to(home.root))
    assert said["rerun"]["caught"][0] == {"forged": 1, "probability": 1.0}
    assert len(said["rerun"]["different"]) == 1
    assert said["rerun"]["made_otherwise"] == []


@pytest.mark.slow
def test_numbers_that_no_run_makes_are_findings_and_no_traceback(untouched, tmp_path, monkeypatch):
    """Every hash is right, so that the numbers reach figures, verdicts and the report."""
    monkeypatch.setenv("DYNAREP_HOME", str(untouched))
    generator = np.random.default_rng(0)
    for number in range(3):
        home = Home(tmp_path / f"copy{number}")
        shutil.copytree(untouched, home.root, ignore=shutil.ignore_patterns("experiments"))
        for run in home.runs.glob("*/*/*/seed=*"):
            forge(run, lambda text: re.sub(r"[^,\n]+(?=\n)(?<!value)", lambda _: generator.choice(EXTREMES), text))
        found = audit(home.root, load_all())
        assert {"figure", "report"} <= {finding.kind for finding in found.findings}
        assert found.checked["runs"] == 24


@pytest.mark.slow
def test_exit_codes_and_what_is_printed(untouched, tmp_path, monkeypatch, capsys, drawn_once):
    monkeypatch.setenv("DYNAREP_HOME", str(untouched))
    cli.main(["audit"])
    assert "everything that was checked holds" in capsys.readouterr().out
    cli.main(["audit", str(untouched / "results" / "runs"), "--tier", TIER])
    out = capsys.readouterr().out
    assert "not checked: figures: there are none beside these runs" in out
    assert "not checked: report of tier smoke" in out
    home = Home(tmp_path / "copy")
    shutil.copytree(untouched, home.root)
    name = "\x1b[31mred\x07"
    (home.runs / name).mkdir()
    with pytest.raises(SystemExit) as left:
        cli.main(["audit", str(home.root), "--tier", TIER])
    assert left.value.code == 1
    out = capsys.readouterr().out
    assert "\x07" not in out
    assert "results/runs/\\x1b[31mred\\x07: is a folder that nobody planned, or that" in out.replace("\n", "")
    for bad in ("nowhere", str(tmp_path), "--tier huge", "--rerun 0", "--rerun 1 --seed -1"):
        with pytest.raises(SystemExit) as left:
            cli.main(["audit", *bad.split()])
        assert left.value.code == 2, bad


# -- pieces -------------------------------------------------------------------------------------------------------


def test_the_chance_to_catch_a_forger_is_the_hypergeometric_one():
    generator = np.random.default_rng(0)
    drawn = [set(generator.choice(40, 5, replace=False)) & {0, 1, 2} for _ in range(20_000)]
    assert rerun.caught(40, 3, 5) == pytest.approx(np.mean([bool(d) for d in drawn]), abs=0.01)
    assert rerun.caught(40, 1, 40) == 1
    assert rerun.caught(230, 1, 10) == pytest.approx(10 / 230)
    forged = rerun.smallest_caught(230, 10)
    assert rerun.caught(230, forged, 10) >= 0.95 > rerun.caught(230, forged - 1, 10)


def test_a_run_is_trained_again_as_it_was_made_or_else_as_this_machine_can(tmp_path, monkeypatch):
    asked: list[tuple[bool, str]] = []
    absent: set[tuple[bool, str]] = set()

    def train(job: Job, results: Path, report: object, device: str = "cpu") -> list[int]:
        asked.append((job.compiled, device))
        if (job.compiled, device) in absent:
            raise UserError("not here")
        return [0]

    monkeypatch.setattr("dynarep.run.train", train)
    job = load(next((CHECKOUT / "experiments").glob("beyond/S_*"))).jobs("smoke")[0]
    for machine, expected in (
        ({}, [(False, "cpu")]),
        ({"compiled": True, "device": "cpu"}, [(True, "cpu")]),
        ({"compiled": "yes", "device": "cuda:1"}, [(False, "cuda:1")]),
        ({"compiled": True, "device": "cuda"}, [(True, "cuda"), (False, "cpu")]),
    ):
        asked.clear()
        absent |= {expected[0]} if len(expected) > 1 else set()
        rerun._train(job, tmp_path, lambda *now: None, machine)
        assert asked == expected
    absent.add((False, "cpu"))
    with pytest.raises(UserError, match="not here"):
        rerun._train(job, tmp_path, lambda *now: None, {"compiled": False, "device": "cpu"})


def test_what_a_run_was_made_with_is_compared_fact_by_fact():
    here = process.describe()
    assert tuple(here) == MACHINE, "a fact that decides bits, and no audit compares it"
    assert rerun._differences(here, here) == rerun._differences({}, here) == ""
    other = here | {"mkl": "slow", "compiled": not here["compiled"], "cpu": "another one"}
    assert rerun._differences(other, here) == (
        f"mkl slow (here {here['mkl']}), compiled {other['compiled']} (here {here['compiled']})"
    )
    older = {name: value for name, value in here.items() if name != "tf32"}
    assert rerun._differences(older, here) == f"tf32 not recorded (here {here['tf32']})"


def test_names_from_elsewhere_cannot_write_to_the_terminal():
    assert printable("seed=\x1b[2J\n\udc80é") == "seed=\\x1b[2J\\n\\udc80é"


def test_a_stop_that_resumed_properly_is_not_found_fault_with():
    start = {"started": "2026-01-01T10:00:00+00:00", "written": "2026-01-01T10:02:00+00:00"}
    stop = {"started": "2026-01-01T09:00:00+00:00", "at": "2026-01-01T09:10:00+00:00", "wall_s": 600.4, "cpu_s": 599.0}
    said = {"identity": "", "seed": 0, "config": {}, "code": {"fingerprint": ""}, "lock": "", "files": {}}
    cost = {"wall_s": 119.0, "cpu_s": 118.0, "seeds_in_job": 1}
    good = Manifest.model_validate({**said, **start, "cost": cost, "resumed": [{**stop, "stopped_at": 30}]})
    assert list(runs._times(good, 96)) == []
    late = Manifest.model_validate({**said, **start, "cost": cost, "resumed": [{**stop, "stopped_at": 96}]})
    assert any("stopped at 96 of 96" in fault for fault in runs._times(late, 96))


@pytest.mark.parametrize(
    ("file", "arm", "times", "units"),
    [
        ("beyond/S_*", 0, [(0, 0, 0)], 1),
        ("madtd/R1_*", 0, [(96, 192, 0), (96, 192, 16), (96, 192, 32)], 32),
        ("ftfl/C_*", 0, [(320, 320, 10), (320, 320, 20)], 20),
        ("beyond/A1_*", 0, [(160, 160, 4), (160, 160, 8)], 8),
        ("ftfl/D_*", 0, [(1056, 1056, 10), (1056, 1056, 20)], 20),
        ("ftfl/D_*", -1, [(1056, 1056, 0), (1056, 1056, 10), (1056, 1056, 20)], 40),
        ("madtd/R2_*", -1, [(80, 160, 0), (96, 192, 256)], 96),
        ("ftfl/A_*", -1, [(64, 64, 0), (80, 80, 32), (96, 96, 64)], 96),
    ],
)
def test_when_a_run_records_follows_from_its_configuration(file, arm, times, units):
    """As the runs of the smoke tier did; where this is wrong, real results are found fault with."""
    config = load(next((CHECKOUT / "experiments").glob(file))).jobs("smoke")[arm].config
    assert contents.times(config) == times
    assert contents.units(config) == units


def test_no_protocol_is_forgotten():
    tested = {"online", "frozen", "latent_fit", "model_fit", "policy_evaluation", "td_spectrum"}
    assert set(registry(ProtocolConfig)) == tested, "say in audit/contents.py when the new one records something"


def test_an_unknown_folder_is_bad_input(tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(UserError, match="no runs in it"):
        audit(tmp_path, [])
    (tmp_path / "results" / "runs").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a link"):
        audit(tmp_path, [])
