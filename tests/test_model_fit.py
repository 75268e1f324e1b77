"""The model-fit protocol: whose numbers do not depend on when it is measured, interrupted, or who runs beside it."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dynarep.cache import cached_in
from dynarep.configs import EnvironmentConfig
from dynarep.configs.mbpo import EnsembleConfig
from dynarep.configs.model_fit import INCREMENT_METRICS, MODEL_METRICS, ModelFitConfig
from dynarep.diagnostics import model
from dynarep.envs import EnvError
from dynarep.protocols.model_fit import ModelFit
from dynarep.streams import stream

TASK = EnvironmentConfig(suite="gymnasium", task="Hopper-v4")
AGENT = EnsembleConfig(
    target="direct", normalise_targets=True, model_width=16, model_batch_size=32, holdout_draws=64, model_lr=1e-3
)
LENGTH = {"transitions": 200, "updates": 25, "chunk": 10}


def fit(seeds=(0, 1), task=TASK, agent=AGENT, **changes) -> ModelFit:
    protocol = ModelFit(task, agent, ModelFitConfig(**{**LENGTH, **changes}), seeds)
    while protocol.done < protocol.total:
        protocol.advance()
    return protocol


def rows(protocol: ModelFit, index: int, update: int) -> list[str]:
    return [line for line in protocol.metrics.csv(index).splitlines() if line.split(",")[2] == str(update)]


def test_every_chunk_is_measured_with_the_declared_metrics():
    protocol = fit()
    for per_seed in protocol.metrics.rows:
        for update in (10, 20, 25):
            assert {row.metric for row in per_seed if row.update == update} == MODEL_METRICS | {"diverged"}
        assert {(row.agent_step, row.frame) for row in per_seed} == {(200, 200)}
    assert not any(protocol.metrics.latest("diverged"))


def test_measured_is_the_report_of_rows_never_seen_with_draws_of_their_own():
    protocol = fit(updates=10)
    generators = [stream(seed, "measure", 10) for seed in (0, 1)]
    found = model.report(protocol.ensemble, protocol.evaluation, generators, protocol.in_sample)
    for metric in sorted(MODEL_METRICS):
        assert protocol.metrics.latest(metric) == pytest.approx(found[metric], nan_ok=True), metric


def test_measuring_less_often_changes_no_number():
    """A measurement that left a gradient behind, or drew from a training stream, would."""
    often, seldom = fit(), fit(measure_at=(20,))
    assert {row.update for row in seldom.metrics.rows[0]} == {20, 25}
    for update in (20, 25):
        assert rows(often, 1, update) == rows(seldom, 1, update)
    for name, values in often.state().items():
        assert torch.equal(torch.as_tensor(values), torch.as_tensor(seldom.state()[name])), name


def test_measurements_are_only_asked_for_where_a_chunk_ends():
    assert ModelFitConfig(**LENGTH, measure_at=(10, 25)).measure_at == (10, 25)
    for at in (0, 15, 30):
        with pytest.raises(ValidationError, match=rf"measure_at, {at}: must be a multiple of chunk 10 in 1\.\.25"):
            ModelFitConfig(**LENGTH, measure_at=(at,))


def test_nothing_is_shown_before_the_first_measurement():
    protocol = ModelFit(TASK, AGENT, ModelFitConfig(**LENGTH, measure_at=(20,)), [0])
    assert protocol.advance() == {}
    assert set(protocol.advance()) == {"reward error / variance"}


def test_a_seeds_bytes_do_not_depend_on_its_block():
    together, alone = fit((0, 1, 2)), fit((1,))
    assert together.metrics.csv(1) == alone.metrics.csv(0)


def test_an_interrupted_fit_goes_on_to_the_same_bytes():
    whole, first = fit(), ModelFit(TASK, AGENT, ModelFitConfig(**LENGTH), (0, 1))
    first.advance()
    second = ModelFit(TASK, AGENT, ModelFitConfig(**LENGTH), (0, 1))
    second.load(first.state())
    second.done, second.metrics.rows = first.done, first.metrics.rows
    while second.done < second.total:
        second.advance()
    assert [second.metrics.csv(i) for i in (0, 1)] == [whole.metrics.csv(i) for i in (0, 1)]


def test_rows_that_judge_are_never_trained_on_and_in_sample_rows_are():
    protocol = fit(updates=10)
    for s in (0, 1):
        training, judged, seen = (
            {row.numpy().tobytes() for row in part["obs"][s]}
            for part in (protocol.training, protocol.evaluation, protocol.in_sample)
        )
        assert len(training) + len(judged) == 200
        assert not training & judged
        assert seen < training
        assert len(seen) == len(judged) == 32


def test_a_reward_unit_scales_raw_rewards_and_leaves_a_normalised_model_as_it_was():
    plain, scaled = fit((0,)), fit((0,), TASK.model_copy(update={"reward_scale": 0.25}))
    value = {p: {row.metric: row.value for row in p.metrics.rows[0]} for p in (plain, scaled)}
    for metric, power in (("reward/mean_real", 1), ("reward/mean_predicted", 1), ("reward/mse", 2), ("reward/nmse", 0)):
        assert value[scaled][metric] == pytest.approx(0.25**power * value[plain][metric], rel=1e-3), metric
    assert value[scaled]["inflation/log_ratio"] == pytest.approx(value[plain]["inflation/log_ratio"], abs=1e-3)


# Expert and random data, and increments


MIXED = {"behaviour": "half_expert", "increments": True, "transitions": 256, "updates": 20}  # 56 of them an expert's
REACH = EnvironmentConfig(suite="metaworld", task="metaworld-reach")


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Each seed's transitions are made once."""
    with cached_in(tmp_path_factory.mktemp("cache")):
        yield


def test_increments_are_measured_on_request_and_change_no_other_number(collected):
    with_them, without = fit((0,), REACH, **MIXED), fit((0,), REACH, **{**MIXED, "increments": False})
    assert {row.metric for row in with_them.metrics.rows[0]} == ModelFitConfig.metrics
    kept = [row for row in with_them.metrics.rows[0] if row.metric not in INCREMENT_METRICS]
    assert [(row.metric, row.update) for row in kept] == [(r.metric, r.update) for r in without.metrics.rows[0]]
    np.testing.assert_array_equal([row.value for row in kept], [row.value for row in without.metrics.rows[0]])


def test_increments_leave_out_what_repeats_the_frame_before_and_only_there(collected):
    protocol = fit((0, 1), REACH, **MIXED)
    draws = [[stream(seed, "measure", 20, "increments") for seed in (0, 1)] for _ in range(2)]
    without, with_all = (
        model.increments(protocol.ensemble, protocol.evaluation, generators, left_out)
        for generators, left_out in zip(draws, (slice(18, 36), slice(0)), strict=True)
    )
    for metric in INCREMENT_METRICS:
        assert protocol.metrics.latest(metric) == pytest.approx(without[metric]), metric
    assert all(np.array(with_all["increment/live"]) >= 1.5 * np.array(without["increment/live"]))
    hopper = fit((0,), increments=True)
    everything = model.increments(
        hopper.ensemble, hopper.evaluation, [stream(0, "measure", 25, "increments")], slice(0)
    )
    assert hopper.metrics.latest("increment/nmse") == pytest.approx(everything["increment/nmse"])
    assert hopper.metrics.latest("increment/live") == [11]


def test_draws_for_increments_are_each_seeds_own(collected, monkeypatch):
    drawn = []
    monkeypatch.setattr(model, "increments", lambda _, __, generators, ___: drawn.extend(generators) or {})
    fit((0, 1), REACH, **{**MIXED, "updates": 10})
    wanted = [stream(seed, "measure", 10, "increments") for seed in (0, 1)]
    assert [rng.random() for rng in drawn] == [rng.random() for rng in wanted]


def test_rewards_vary_only_where_an_expert_acts(collected):
    variance = {
        behaviour: fit((0,), REACH, **{**MIXED, "behaviour": behaviour, "updates": 10}).metrics.latest(
            "reward/variance"
        )
        for behaviour in ("random", "half_expert")
    }
    assert variance["half_expert"][0] > 3 * variance["random"][0]


def test_a_seeds_bytes_do_not_depend_on_its_block_with_an_expert(collected):
    together, alone = fit((0, 1), REACH, **MIXED), fit((1,), REACH, **MIXED)
    assert together.metrics.csv(1) == alone.metrics.csv(0)


def test_a_suite_without_an_expert_is_refused():
    with pytest.raises(EnvError, match=r"Hopper-v4 has no scripted policy.*take random actions"):
        fit((0,), behaviour="half_expert", transitions=800)


def test_whose_data_they_are_is_in_the_name_of_the_folder():
    assert ModelFitConfig().label() == "model_fit"
    assert ModelFitConfig(behaviour="half_expert").label() == "model_fit-half_expert"
