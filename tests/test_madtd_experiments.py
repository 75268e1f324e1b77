"""MAD-TD's experiment files: what the paper's matrix needs is in them, and the same run is never trained twice."""

from pathlib import Path
from string import ascii_lowercase

import pytest

from dynarep import plan
from dynarep.experiment import find, load_all
from dynarep.schema import TIERS

HARD = {"dog-stand", "dog-walk", "dog-trot", "dog-run", "humanoid-stand", "humanoid-walk", "humanoid-run"}
FIGURES = [f"R{k}" for k in range(1, 11)]


@pytest.fixture(scope="module")
def experiments():
    return load_all()


def runs(experiments, name, tier):
    return {folder for job in find(experiments, name).jobs(tier) for folder in job.folders()}


def test_every_figure_exists_at_every_tier_and_every_claim_of_the_paper_has_a_row(experiments):
    for name in FIGURES:
        assert find(experiments, name).tiers() == list(TIERS), name
    claims = {claim.id.rstrip(ascii_lowercase) for name in FIGURES for claim in find(experiments, name).spec.claims}
    assert claims == {f"C{k}" for k in range(1, 16)}


def test_the_papers_matrix_is_complete_at_the_papers_size(experiments):
    """Seven hard tasks, with and without model data, UTD 1, 8 and 16, ten seeds, a million agent steps."""
    cells = {}
    for job in find(experiments, "R3").jobs("paper"):
        agent, protocol = job.config.agent, job.config.protocol
        if agent.model_free:
            continue
        assert (agent.width, agent.batch_size, protocol.steps, protocol.random_steps) == (512, 512, 1_000_000, 5_000)
        assert (job.config.environment.action_repeat, protocol.held_out) == (2, 0.05)
        cell = (job.task, agent.updates_per_step, agent.model_fraction)
        cells[cell] = cells.get(cell, 0) + len(job.seeds)
    assert {task for task, _, _ in cells} == HARD | {"hopper-stand", "hopper-hop"}
    assert set(cells) == {(task, utd, alpha) for task, _, _ in cells for utd in (1, 8, 16) for alpha in (0.0, 0.05)}
    assert set(cells.values()) == {10}


def test_diagnostics_are_measured_on_the_runs_of_the_return_curves(experiments):
    """R1, R2, R6 at the paper's size cost nothing beside R3; R4's default arms are R3's too."""
    for name in ("R1", "R2", "R6"):
        assert runs(experiments, name, "paper") <= runs(experiments, "R3", "paper"), name
    own = runs(experiments, "R4", "paper") - runs(experiments, "R3", "paper")
    assert len([run for run in own if run.parts[0] == "mad_td"]) == 70, "action repeat 1 on seven tasks"
    assert {run.parts[0] for run in own} == {"mad_td", "bro", "td_mpc2"}, "the opponents, run here"


@pytest.mark.parametrize("tier", ["ci", "reduced"])
def test_arms_that_several_figures_show_are_trained_once(experiments, tier):
    assert runs(experiments, "R6", tier) <= runs(experiments, "R1", tier) | runs(experiments, "R2", tier)
    if tier == "ci":
        shared = runs(experiments, "R5", tier) & runs(experiments, "R7", tier) & runs(experiments, "R1", tier)
        assert len(shared) == 2 * 5, "no model data and 5 % on dog-stand"


def test_the_reduced_tier_fits_into_a_night_of_two_cores(experiments):
    """12 core-hours without BRO and TD-MPC2, which are run here, too, since."""
    own = [experiment for experiment in experiments if experiment.spec.paper == "madtd"]
    assert plan.total(plan.costs(own, "reduced", Path("/nowhere"))).cpu_hours_all <= 18


def test_gated_claims_are_judged_on_seeds_that_nobody_planned_on(experiments):
    """The planning study and this code's own speed measurements used small seeds."""
    for name in FIGURES:
        experiment = find(experiments, name)
        for claim in experiment.spec.judged():
            if claim.tiers.get("ci") == "gated":
                jobs = experiment.judging_jobs(claim, "ci")
                assert jobs
                assert min(seed for job in jobs for seed in job.seeds) >= 300, claim.id


def test_every_default_of_mad_td_is_in_the_table_of_hyperparameters(experiments):
    from dynarep import figures
    from dynarep.configs.mad_td import MadTDConfig

    table = figures.table(find(experiments, "T1"), "ci", None)
    listed = set(table[table["part"].str.contains("mad_td")]["field"])
    assert listed == set(MadTDConfig.model_fields)
