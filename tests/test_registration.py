"""Pre-registration: a rule that is younger than the runs that judge it must say so."""

import json

import pytest

from dynarep import claims, cli, registration, run
from dynarep.experiment import find, load_all
from dynarep.statements import TIERS
from synthetic import write_runs


@pytest.fixture
def r1():
    return find(load_all(), "R1")


def changed(claim, **fields):
    """Return a claim with other fields; those with a dot are of its contrast."""
    contrast = {key.removeprefix("contrast_"): fields.pop(key) for key in list(fields) if key.startswith("contrast_")}
    return claim.model_copy(update={**fields, "contrast": claim.contrast.model_copy(update=contrast)})


@pytest.mark.parametrize(
    "fields",
    [
        {"smallest": 1.31},
        {"no_effect": 1.01},
        {"direction": "less"},
        {"tiers": {"ci": "reported"}},
        {"runs": ("online",)},
        {"contrast_tasks": ("walker-walk",)},
        {"contrast_kind": "difference"},
    ],
)
def test_what_decides_a_verdict_changes_the_rule(r1, fields):
    claim = r1.spec.claims[0]
    assert registration.rule(r1, changed(claim, **fields)) != registration.rule(r1, claim)


@pytest.mark.parametrize("field", ["says", "why", "source", "published", "unit"])
def test_correcting_the_wording_does_not(r1, field):
    claim = r1.spec.claims[0]
    assert registration.rule(r1, changed(claim, **{field: "other words"})) == registration.rule(r1, claim)


def test_the_pairs_are_part_of_the_rule_of_a_rank_correlation():
    d8 = find(load_all(), "D8")
    claim = d8.spec.claims[0]
    fewer = d8.spec.model_copy(update={"pairs": d8.spec.pairs[1:]})
    assert registration.rule(type(d8)(d8.file, fewer), claim) != registration.rule(d8, claim)


def test_every_run_that_a_claim_reads_carries_its_rule(tmp_path):
    """Of all papers, at every tier: otherwise verdicts on them could never be called registered."""
    everything = load_all()
    registered = registration.registered(everything)
    for experiment in everything:
        for claim in experiment.spec.judged():
            now = registration.rule(experiment, claim)
            for tier in (tier for tier in TIERS if claim.role(tier) != "untested"):
                sides = {side.variant for side in claim.sides}
                for job in experiment.judging_jobs(claim, tier):
                    if not sides or job.variant in sides:
                        assert registered[job.config.identity()][claim.id] == now


def test_a_rule_that_changed_after_the_runs_is_younger_than_they_are(r1, tmp_path):
    """One run of many is enough; a run that does not say leaves it open."""
    write_runs(r1, "ci", tmp_path, lambda *a: 1.0 + a[2])
    claim = r1.spec.claims[0]
    now = registration.rule(r1, claim)
    manifests = sorted(tmp_path.rglob("manifest.json"))

    def judged(said):
        for path in manifests:
            manifest = json.loads(path.read_text())
            manifest.pop("claims", None)
            rules = said(path)
            path.write_text(json.dumps(manifest | ({} if rules is None else {"claims": rules})))
        return claims.judge(r1, claim, "ci", tmp_path).registered

    behind = claims.judge(r1, claim, "ci", tmp_path).runs
    one = tmp_path / behind[-1] / "manifest.json"
    assert judged(lambda path: {claim.id: now}) == "yes"
    assert judged(lambda path: {claim.id: "0" * 16 if path == one else now}) == "no"
    assert judged(lambda path: {} if path == one else {claim.id: now}) == "no", "the claim came after the run"
    assert judged(lambda path: None if path == one else {claim.id: now}) == "unknown"
    assert judged(lambda path: ["not", "a", "mapping"]) == "", "a manifest that is none is not read at all"


def test_nothing_read_is_not_registered(r1, tmp_path):
    assert claims.judge(r1, r1.spec.claims[0], "ci", tmp_path).registered == ""


def test_training_writes_the_rules_the_times_and_the_hashes_of_its_block(tmp_path, monkeypatch):
    job = find(load_all(), "C").jobs("smoke")[0]
    rules = {"F3": "0123456789abcdef"}  # at the smoke tier there are none
    monkeypatch.setattr(registration, "registered", lambda experiments: {job.config.identity(): rules})
    place = f"C/{job.group}/{job.variant}/{job.task}/0-1"
    cli.main(["train", "--tier", "smoke", "--job", place, "--results", str(tmp_path)])
    manifests = [json.loads((tmp_path / job.config.folder() / f"seed={n}/manifest.json").read_text()) for n in (0, 1)]
    assert [m["claims"] for m in manifests] == [rules, rules]
    hashes = {str(m["seed"]): m["files"]["metrics.csv"]["sha256"] for m in manifests}
    assert [m["block"] for m in manifests] == [hashes, hashes]
    assert all(m["started"] <= m["written"] for m in manifests)
    assert run.pending(job, tmp_path) == [seed for seed in job.seeds if seed not in (0, 1)]
