"""The spectrum of expected TD: matrices known by hand, theorems, and a figure made of them."""

import dataclasses
import io
import json

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from dynarep import figures, run
from dynarep.agents import linear_td
from dynarep.agents.linear_td import LinearTD, pairs, smallest_symmetric, spectrum, stationary
from dynarep.configs import EnvironmentConfig
from dynarep.configs.linear_td import FEWEST, LinearTDConfig
from dynarep.configs.td_spectrum import TDSpectrumConfig
from dynarep.envs import EnvError, garnet, known_tasks, make
from dynarep.experiment import find, load_all
from dynarep.figures import drawing
from dynarep.protocols import td_spectrum
from dynarep.protocols.td_spectrum import TDSpectrum
from dynarep.streams import stream

TASK = EnvironmentConfig(suite="garnet", task="garnet-20-4-1")
ALONE = np.ones((1, 2, 1))  # one state, two actions
FIRST, SECOND, EITHER = (np.array([policy]) for policy in ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5]))
ONE_AND_TWO = np.array([[1.0], [2.0]])  # features of the two actions


def toy(behaviour, target, share=0.0, discount=0.9, features=ONE_AND_TWO, transitions=ALONE) -> LinearTD:
    config = LinearTDConfig(discount=discount, on_policy_share=share)
    return LinearTD(config, transitions, behaviour, target, features)


def protocol(seeds, task=TASK, share=0.0, features=FEWEST, behaviour="other_actions") -> TDSpectrum:
    agent = LinearTDConfig(on_policy_share=share, features=features)
    found = TDSpectrum(task, agent, TDSpectrumConfig(behaviour=behaviour), seeds)
    while found.done < found.total:
        found.advance()
    return found


# -- matrices known by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_one_state_gives_the_matrix_computed_by_hand(share):
    """Data of action 1 (feature 1), target action 2 (feature 2): "theta to 2 theta", the classical counterexample."""
    td = toy(FIRST, SECOND, share)
    off, on = 1 * (1 - 0.9 * 2), 2 * (2 - 0.9 * 2)
    assert td.update_matrix().item() == pytest.approx((1 - share) * off + share * on, abs=1e-15)


def test_the_counterexample_diverges_where_it_must():
    """1 - 2 gamma < 0 above one half; on-policy rows have to outweigh it: 96.1 % of them at 0.99, not 5 %."""
    assert spectrum(toy(FIRST, SECOND, discount=0.99).update_matrix())[0] == pytest.approx(-0.98)
    assert toy(FIRST, SECOND, discount=0.49).update_matrix().item() > 0
    limit = 0.98 / (0.98 + 0.04)
    for share, sign in ((0.05, -1), (limit - 0.001, -1), (limit + 0.001, 1), (1.0, 1)):
        assert np.sign(toy(FIRST, SECOND, share, 0.99).update_matrix().item()) == sign


def test_two_states_give_the_matrix_computed_by_hand():
    """Action 1 stays, action 2 changes state; features tell all four pairs apart, so A = D (I - gamma P_pi)."""
    transitions = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    behaviour, target = np.array([[0.5, 0.5], [0.5, 0.5]]), np.array([[0.0, 1.0], [1.0, 0.0]])
    successors = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0]])  # of (1,1) (1,2) (2,1) (2,2)
    td = toy(behaviour, target, 0.2, features=np.eye(4), transitions=transitions)
    weights = np.array([0.4, 0.6, 0.6, 0.4]) / 2
    assert td.weights == pytest.approx(weights)
    assert td.update_matrix() == pytest.approx(np.diag(weights) @ (np.eye(4) - 0.9 * successors))


def test_rows_of_the_model_are_replayed_states_with_the_target_policys_action():
    table = garnet.transitions("garnet-20-4-3", stream(0, "x"))
    target = np.eye(4)[np.arange(20) % 4]
    behaviour = (1 - target) / 3
    replayed, added = (
        toy(behaviour, target, share, features=np.zeros((80, 1)), transitions=table).weights.reshape(20, 4)
        for share in (0.0, 1.0)
    )
    assert (replayed[target == 1] == 0).all(), "the data do not hold the target's actions"
    assert (added[target == 0] == 0).all()
    assert added.sum(1) == pytest.approx(replayed.sum(1)), "the states are the replayed ones"
    mixed = toy(behaviour, target, 0.05, features=np.zeros((80, 1)), transitions=table).weights
    assert mixed == pytest.approx((0.95 * replayed + 0.05 * added).ravel())


# -- theorems -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", known_tasks("garnet"))
@pytest.mark.parametrize("behaviour", ["other_actions", "all_actions"])
def test_the_two_terms_add_up_and_the_stationary_one_is_positive_semi_definite(task, behaviour):
    for seed in range(10):
        config = TASK.model_copy(update={"task": task})
        td = TDSpectrum(config, LinearTDConfig(), TDSpectrumConfig(behaviour=behaviour), [seed]).problem(seed)
        assert td.stationary_term() + td.switch_term() == pytest.approx(td.update_matrix(), abs=1e-12)
        assert smallest_symmetric(td.stationary_term()) > 0
        assert smallest_symmetric(td.switch_term()) < 0 < -smallest_symmetric(-td.switch_term()), "indefinite"


def test_what_is_not_stationary_need_not_be_positive_semi_definite():
    """The theorem's condition, or the test above would be of nothing: "theta to 2 theta" again."""
    transitions = np.array([[[0.0, 1.0]], [[0.0, 1.0]]])  # both states lead to the second
    features, weights = np.array([[1.0], [2.0]]), np.array([0.9, 0.1])
    successors = pairs(transitions, np.ones((2, 1)))
    assert (features.T * weights @ (features - 0.9 * successors @ features)).item() < 0
    td = toy(np.ones((2, 1)), np.ones((2, 1)), features=features, transitions=transitions)
    assert td.update_matrix().item() == pytest.approx(2 * (2 - 0.9 * 2)), "stationary: the second state alone"


def test_the_target_policys_own_data_are_stable_whatever_the_share():
    table = garnet.transitions("garnet-20-4-3", stream(0, "x"))
    policy = np.full((20, 4), 0.25)
    features = stream(0, "y").standard_normal((80, FEWEST))
    for share in (0.0, 1.0):
        td = toy(policy, policy, share, 0.99, features, table)
        assert smallest_symmetric(td.update_matrix()) > 0
        assert not td.switch_term().any()


def test_the_switch_term_shrinks_by_the_share():
    """With features that tell all pairs apart, P_b - P_pi shows: 1 - share of it is left."""
    table = garnet.transitions("garnet-20-4-3", stream(0, "x"))
    target = np.eye(4)[np.arange(20) % 4]
    none, some = (
        toy(np.full((20, 4), 0.25), target, share, features=np.eye(80), transitions=table) for share in (0.0, 0.25)
    )
    per_row = (td.switch_term() / td.weights[:, None] for td in (none, some))
    assert next(per_row) * 0.75 == pytest.approx(next(per_row))


@pytest.mark.parametrize(
    ("chain", "kept"),
    [
        ([[0.0, 1.0], [1.0, 0.0]], [0.5, 0.5]),  # periodic
        ([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5]),  # two closed classes: from a uniform start
        ([[0.5, 0.5], [0.0, 1.0]], [0.0, 1.0]),  # a state that is left for good
        ([[0.9, 0.1], [0.3, 0.7]], [0.75, 0.25]),
    ],
)
def test_a_chain_keeps_its_stationary_distribution(chain, kept):
    assert stationary(np.array(chain)) == pytest.approx(kept, abs=1e-12)


# -- problems -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", known_tasks("garnet"))
def test_a_problem_has_the_size_that_its_name_says(task):
    states, actions, branching = map(int, task.split("-")[1:])
    table = garnet.transitions(task, stream(0, "x"))
    assert table.shape == (states, actions, states)
    assert table.sum(-1) == pytest.approx(1.0)
    assert ((table > 0).sum(-1) == branching).all()
    assert (table >= 0).all()


def test_nobody_can_step_a_table():
    with pytest.raises(EnvError, match=r"garnet-20-4-1 is a table.*td_spectrum.*no simulator"):
        make("garnet", "garnet-20-4-1")


def test_a_task_without_a_table_is_refused():
    with pytest.raises(EnvError, match=r"walker-walk: td_spectrum needs transition probabilities.*garnet"):
        TDSpectrum(EnvironmentConfig(), LinearTDConfig(), TDSpectrumConfig(), [0])


def test_a_run_needs_as_many_features_as_it_records_eigenvalues():
    with pytest.raises(ValidationError):
        LinearTDConfig(features=FEWEST - 1)


# -- runs ---------------------------------------------------------------------------------------------------------


def last(found: TDSpectrum, index: int = 0) -> dict[str, float]:
    return {row.metric: row.value for row in found.metrics.rows[index]}


def test_every_declared_metric_is_recorded_and_agrees_with_the_eigenvalues():
    values = last(protocol([0]))
    assert set(values) == TDSpectrumConfig.metrics
    real = [values[f"spectrum/{k}/real"] for k in range(FEWEST)]
    assert real == sorted(real)
    assert values["spectrum/smallest_real"] == real[0]
    eigenvalues = np.array([values[f"spectrum/{k}/imaginary"] for k in range(FEWEST)]) * 1j + real
    problem = TDSpectrum(TASK, LinearTDConfig(), TDSpectrumConfig(), [0]).problem(0)
    assert eigenvalues.sum().real == pytest.approx(np.trace(problem.update_matrix()))
    assert np.prod(eigenvalues) == pytest.approx(np.linalg.det(problem.update_matrix()))


def test_a_problem_counts_as_unstable_if_an_eigenvalue_is_negative():
    found = protocol(range(20))
    values = [last(found, index) for index in range(20)]
    assert [v["spectrum/unstable"] for v in values] == [float(v["spectrum/smallest_real"] < 0) for v in values]
    assert 0 < np.mean([v["spectrum/unstable"] for v in values]) < 1


def test_an_eigenvalue_that_is_zero_but_for_rounding_is_not_negative():
    """20 pairs for 32 features: 12 eigenvalues are 0, some of them -1e-17."""
    task = TASK.model_copy(update={"task": "garnet-20-4-3"})
    values = last(protocol([0], task, share=1.0))
    assert abs(values["spectrum/smallest_real"]) < 1e-12
    assert values["spectrum/unstable"] == 0


def test_a_seeds_bytes_do_not_depend_on_its_block_and_are_the_same_twice():
    together = protocol([0, 1, 2])
    assert together.metrics.csv(1) == protocol([1]).metrics.csv(0) == protocol([2, 1]).metrics.csv(1)
    assert together.metrics.csv(1) != together.metrics.csv(2)


def test_variants_of_a_seed_share_problem_policy_and_features():
    """A is linear in the share of on-policy rows if nothing else differs."""
    none, some, all_ = (
        TDSpectrum(TASK, LinearTDConfig(on_policy_share=share), TDSpectrumConfig(), [3]).problem(3).update_matrix()
        for share in (0.0, 0.25, 1.0)
    )
    assert some == pytest.approx(0.75 * none + 0.25 * all_, abs=1e-12)


# -- the figure ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spectrum")
    experiment = find(load_all(), "S")
    for job in experiment.jobs("smoke"):
        assert run.train(job, folder) == list(job.seeds)
    return experiment, folder


def test_a_finished_run_is_not_trained_again_and_holds_its_configuration(smoke):
    experiment, folder = smoke
    job = experiment.jobs("smoke")[1]
    assert run.train(job, folder) == []
    manifest = json.loads((folder / job.folders()[0] / "manifest.json").read_text())
    assert manifest["config"]["agent"]["on_policy_share"] == 0.05
    assert len({job.config.identity() for job in experiment.jobs("smoke")}) == len(experiment.jobs("smoke"))


def test_the_panel_holds_the_eigenvalues_of_the_first_seeds_and_the_mean_of_all(smoke):
    experiment, folder = smoke
    data = figures.table(experiment, "smoke", folder)
    panel = data[(data["panel"] == 0) & (data["task"] == "garnet-20-4-1") & (data["variant"] == "other_50")]
    values = [last(protocol([seed], share=0.5)) for seed in (0, 1)]
    for seed in (0, 1):
        rows = panel[panel["seed"] == seed]
        assert list(rows["x"]) == pytest.approx([values[seed][f"spectrum/{k}/real"] for k in range(FEWEST)])
        imaginary = [values[seed][f"spectrum/{k}/imaginary"] for k in range(FEWEST)]
        assert list(rows["estimate"]) == pytest.approx(imaginary)
    (mean,) = panel[panel["seed"].isna()].to_dict("records")
    assert mean["estimate"] == pytest.approx(np.mean([v["spectrum/smallest_real"] for v in values]))
    assert mean["n"] == 2
    assert set(data[data["panel"] == 0]["variant"]) == {"other_0", "other_5", "other_50"}


def test_more_seeds_than_can_be_told_apart_are_left_to_the_mean(smoke, monkeypatch):
    experiment, folder = smoke
    monkeypatch.setattr(figures.points, "SPECTRA", 1)
    panel = figures.table(experiment, "smoke", folder).query("panel == 0 and seed == seed")
    assert set(panel["seed"]) == {0}


def test_the_drawing_shows_every_eigenvalue_and_the_limit_of_stability(smoke):
    experiment, folder = smoke
    data = pd.read_csv(io.BytesIO(figures.to_csv(figures.table(experiment, "smoke", folder))))
    with drawing.style("test"):
        ax = drawing.figure(experiment, data, "note").axes[0]
    labels = [line.get_label() for line in ax.lines]
    for variant in ("other_0", "other_5", "other_50"):
        line = ax.lines[labels.index(experiment.spec.variants[variant].label)]
        rows = data[(data["panel"] == 0) & (data["task"] == "garnet-20-4-1") & (data["variant"] == variant)]
        shown = rows[rows["seed"].notna()]
        assert list(line.get_xdata()) == list(shown["x"])
        assert list(line.get_ydata()) == list(shown["estimate"])
        means = rows[rows["seed"].isna()]["estimate"]
        assert any(list(other.get_xdata()) == [float(means.iloc[0])] * 2 for other in ax.lines)
    assert list(ax.lines[labels.index("limit of stability")].get_xdata()) == [0, 0]
    assert len({line.get_color() for line in ax.lines}) == 4
    assert (ax.get_xscale(), ax.get_xlabel()) == ("symlog", "real part")


def test_a_linear_spectrum_has_linear_axes(smoke):
    experiment, folder = smoke
    data = figures.table(experiment, "smoke", folder)
    panels = [experiment.spec.panels[0].model_copy(update={"scale": "linear"}), *experiment.spec.panels[1:]]
    figure = experiment.spec.figure.model_copy(update={"panels": tuple(panels)})
    plain = dataclasses.replace(experiment, spec=experiment.spec.model_copy(update={"figure": figure}))
    with drawing.style("test"):
        ax = drawing.figure(plain, data, "note").axes[0]
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "linear")


def test_it_says_everywhere_that_it_is_not_the_papers_formula(smoke):
    experiment, _ = smoke
    for text in (experiment.spec.caption, experiment.spec.reproduces, linear_td.__doc__, td_spectrum.__doc__):
        assert "standard linear td analysis; not the paper's formula" in " ".join(text.lower().split())
