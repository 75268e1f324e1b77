"""`dynarep reference`: only whole, believed tiers made by this code become the committed runs."""

import contextlib
import json
import shutil

import pytest

import synthetic
from dynarep import cli, dag, reference
from dynarep.errors import UserError
from test_reference import tree

TIER = "paper"  # of the trial, the one with claims


@pytest.fixture
def home(new_home):
    for path in new_home.glob("experiments/*/*.yaml"):
        if path.parent.name not in ("tiers", "profiles"):
            path.unlink()
    experiment = synthetic.trial(new_home)
    synthetic.write_runs(experiment, TIER, new_home / "results" / "runs", lambda *a: 1.0 + a[2])
    return new_home


def manifests(home):
    return sorted((home / "results" / "runs").rglob("manifest.json"))


def judged(capsys, *options):
    with contextlib.suppress(SystemExit):  # a verdict
        cli.main(["claims", "--tier", TIER, "--json", *options])
    return capsys.readouterr().out


def test_a_whole_tier_is_copied_byte_by_byte_and_shown_from_there(home, capsys):
    stray = home / "results" / "reference" / "sac" / "walker-walk" / "gone-00000000" / "seed=0"
    stray.mkdir(parents=True)
    (stray / "manifest.json").write_text("{}")
    log = home / "results" / "runs" / "log" / "x.log"
    log.parent.mkdir()
    log.write_text("not a run")
    cli.main(["reference", "--tier", TIER])
    count = len(manifests(home))
    assert f"{count} runs copied" in capsys.readouterr().out
    kept = tree(home / "results" / "reference")
    log.unlink()
    assert kept == tree(home / "results" / "runs"), "the log and the stray run are not among them"
    assert not stray.parents[2].joinpath("gone-00000000").exists()
    assert dag.load(TIER, "reference")[1]
    from_runs = judged(capsys)
    shutil.rmtree(home / "results" / "runs")
    assert judged(capsys, "--from", "reference") == from_runs


@pytest.mark.parametrize("fault", ["missing", "altered", "other code"])
def test_a_tier_that_is_not_whole_or_not_ours_changes_nothing(home, fault):
    reference.keep(TIER)
    before = tree(home / "results" / "reference")
    victim = manifests(home)[-1]
    if fault == "missing":
        victim.unlink()
    elif fault == "altered":
        victim.with_name("metrics.csv").write_text("agent_step,frame,update,metric,value\n")
    else:
        manifest = json.loads(victim.read_text())
        manifest["code"]["fingerprint"] = "0" * 64
        victim.write_text(json.dumps(manifest))
    with pytest.raises(UserError):
        reference.keep(TIER)
    assert tree(home / "results" / "reference") == before
