"""The dial experiments' files: each test names what a reader could no longer rely on if it failed."""

import pytest

from dynarep import plan
from dynarep.experiment import distinct, find, load_all

IDS = [f"D{i}" for i in range(1, 9)]
PLANNING = range(10)  # seeds on which settings were chosen, by the prototype and here
CORE_MINUTES = 18  # by the stored rates; 12 were wanted (README, what it costs)


@pytest.fixture(scope="module")
def experiments():
    every = load_all()
    return {name: find(every, name) for name in IDS}


def jobs(experiments, tier="ci", names=IDS):
    return [job for name in names for job in experiments[name].jobs(tier)]


def test_every_experiment_runs_at_all_four_tiers_and_has_claims_and_a_paragraph(experiments):
    for experiment in experiments.values():
        assert experiment.tiers() == ["smoke", "ci", "reduced", "paper"]
        assert experiment.spec.claims
        assert experiment.spec.explains


def test_no_tier_that_judges_runs_a_seed_that_settings_were_chosen_on(experiments):
    for tier in ("ci", "reduced", "paper"):
        seeds = {seed for job in jobs(experiments, tier) for seed in job.seeds}
        assert seeds
        assert not seeds & set(PLANNING)
    ci, reduced = ({seed for job in jobs(experiments, tier) for seed in job.seeds} for tier in ("ci", "reduced"))
    assert not ci & reduced  # the larger tier is a replication, not the same runs again


def test_every_gated_claim_has_ten_seeds_or_more(experiments):
    for experiment in experiments.values():
        for claim in experiment.spec.claims:
            if claim.role("ci") == "gated":
                assert min(len(job.seeds) for job in experiment.judging_jobs(claim, "ci")) >= 10, claim.id


def test_what_two_experiments_show_is_trained_once(experiments):
    first = {job.variant: job.config.identity() for job in experiments["D1"].jobs("ci")}
    for name, shared in {
        "D3": {"norm_m10": "norm", "ftfl_m10": "ftfl", "sac_m10": "sac"},
        "D4": {"norm": "norm", "ftfl": "ftfl"},
        "D7": {"none": "sac", "mbpo_95": "mbpo", "ftfl_95": "ftfl"},
        "D8": {"mbpo_m10": "mbpo", "ftfl_m10": "ftfl"},
    }.items():
        other = {job.variant: job.config.identity() for job in experiments[name].jobs("ci")}
        for theirs, ours in shared.items():
            assert other[theirs] == first[ours], f"{name}: {theirs}"
    last = {job.variant: job.config.identity() for job in experiments["D8"].jobs("ci")}
    for name, shared in {
        "D2": {"mbpo_r9": "mbpo_r9", "ftfl_1": "ftfl_r0", "mbpo_k7": "mbpo_k7"},
        "D3": {"ftfl_m5": "ftfl_m5"},
        "D5": {"direct": "ftfl_smooth", "mbpo": "mbpo_smooth"},
    }.items():
        other = {job.variant: job.config.identity() for job in experiments[name].jobs("ci")}
        for theirs, ours in shared.items():
            assert other[theirs] == last[ours], f"{name}: {theirs}"


def test_arms_of_one_comparison_differ_in_what_they_are_about_alone(experiments):
    """The oracle arms of D4 differ from `norm` in the oracle, D1's arms in target and normalisation."""

    def agents(name, group):
        return {j.variant: j.config.agent.model_dump() for j in experiments[name].jobs("ci") if j.group == group}

    def changed(a, b):
        return {key for key in a.keys() & b.keys() if a[key] != b[key]}

    oracles, crossed = agents("D4", "oracles"), agents("D1", "crossed")
    for name in ("norm_reward", "norm_state", "norm_mean"):
        assert changed(oracles["norm"], oracles[name]) == {"oracle"}
    assert changed(crossed["mbpo"], crossed["ftfl"]) == {"target", "normalise_targets"}
    assert changed(crossed["mbpo"], crossed["norm"]) == {"normalise_targets"}
    assert changed(crossed["mbpo"], crossed["direct"]) == {"target"}
    assert changed(crossed["mbpo"], crossed["sac"]) == set()


def test_the_equal_updates_arms_make_as_many_updates_as_those_at_a_high_ratio(experiments):
    work = {
        job.variant: (job.config.protocol.steps - job.config.protocol.random_steps) * job.config.agent.updates_per_step
        for job in experiments["D6"].jobs("reduced")
    }
    assert work["equal_a0"] == work["equal_a5"] == work["n16_utd16_a0"] == work["n16_utd16_a5"]


def test_the_ci_tier_does_not_grow(experiments):
    assert sum(map(plan.job_seconds, distinct(jobs(experiments)))) / 60 <= CORE_MINUTES


def test_robustness_arms_are_at_the_reduced_tier(experiments):
    for name in ("D1", "D6"):
        assert "robustness" in {job.group for job in experiments[name].jobs("reduced")}
        assert "robustness" not in {job.group for job in experiments[name].jobs("ci")}
