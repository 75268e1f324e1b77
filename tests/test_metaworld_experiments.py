"""Meta-World's experiment files: what a comparison there needs to be one."""

from pathlib import Path

import pytest

from conftest import CHECKOUT
from dynarep import plan
from dynarep.experiment import load

PLANNING = range(10)
REVIEWERS = {f"metaworld-{name}" for name in ("assembly", "coffee-push", "coffee-pull", "stick-pull")}


@pytest.fixture(scope="module")
def repairs():
    return load(CHECKOUT / "experiments" / "beyond" / "M_metaworld_ftfl.yaml")


@pytest.fixture(scope="module")
def comparison():
    return load(CHECKOUT / "experiments" / "madtd" / "R9_metaworld.yaml")


@pytest.mark.parametrize("tier", ["ci", "reduced", "paper"])
def test_the_repairs_are_judged_on_seeds_that_nobody_planned_on(repairs, tier):
    seeds = {seed for job in repairs.jobs(tier) for seed in job.seeds}
    assert len(seeds) >= 5
    assert min(seeds) > max(PLANNING)


def test_the_repairs_arms_meet_the_same_data_and_differ_in_targets_alone(repairs):
    for tier in ("smoke", "ci", "reduced", "paper"):
        jobs = repairs.jobs(tier)
        for task in {job.task for job in jobs}:
            arms = {job.variant: job.config for job in jobs if job.task == task}
            assert len({(c.environment.model_dump_json(), c.protocol.model_dump_json()) for c in arms.values()}) == 1
            cells = {(c.agent.target, c.agent.normalise_targets) for c in arms.values()}
            assert cells == {(target, on) for target in ("residual", "direct") for on in (False, True)}
            same = {"target": "residual", "normalise_targets": False}
            assert len({c.agent.model_copy(update=same).model_dump_json() for c in arms.values()}) == 1
            assert arms["mbpo"].protocol.behaviour == "half_expert"
            assert arms["mbpo"].environment.reward_scale == 1


def test_the_repairs_fit_into_three_core_minutes(repairs):
    """Each seed's data are collected once for all arms."""
    assert plan.total(plan.costs([repairs], "ci", Path("/nowhere"))).cpu_hours_all * 60 <= 3


def test_open_questions_have_no_direction(repairs):
    directions = {claim.id: claim.direction for claim in repairs.spec.claims}
    assert directions["M4"] == directions["M5b"] == "equal"
    assert all(claim.role("ci") == "reported" for claim in repairs.spec.claims if claim.direction == "equal")


@pytest.mark.parametrize("tier", ["smoke", "ci", "reduced", "paper"])
def test_every_agent_is_compared_on_the_same_tasks_and_frames(comparison, tier):
    jobs = comparison.jobs(tier)
    agents = {job.config.agent.name for job in jobs}
    assert agents == {"mad_td", "bro", "td_mpc2"}
    tasks = {agent: {job.task for job in jobs if job.config.agent.name == agent} for agent in agents}
    assert tasks["mad_td"] == tasks["bro"] == tasks["td_mpc2"]
    if tier in ("reduced", "paper"):
        frames = {job.config.protocol.steps * job.config.environment.action_repeat for job in jobs}
        assert len(frames) == 1
        evaluated = {job.config.protocol.eval_every * job.config.environment.action_repeat for job in jobs}
        assert len(evaluated) == 1
    if tier == "paper":
        assert frames == {1_000_000}
        assert tasks["bro"] > REVIEWERS


@pytest.mark.parametrize("tier", ["smoke", "ci", "reduced", "paper"])
def test_every_agent_has_its_own_repeat_rewards_and_discount(comparison, tier):
    for job in comparison.jobs(tier):
        environment, agent = job.config.environment, job.config.agent
        wanted = {"mad_td": (2, 0.1), "bro": (1, 1.0), "td_mpc2": (2, 1.0)}[agent.name]
        assert (environment.action_repeat, environment.reward_scale) == wanted
        if agent.name == "mad_td":  # a hundred steps of at most 20
            limit = min(100, 1 / (1 - agent.discount)) * 10 * 2 * environment.reward_scale
            assert limit <= agent.value_limit
    arms = {job.variant for job in comparison.jobs(tier)}
    if tier != "reduced":
        assert len(arms) == 8
