"""The policy-evaluation protocol: known values, what is compared with what, bytes, blocks and continuing."""

import io
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from dynarep import envs
from dynarep.configs import EnvironmentConfig
from dynarep.configs.mbpo import MBPOConfig
from dynarep.configs.policy_evaluation import PolicyEvaluationConfig
from dynarep.diagnostics.critic import Episode, returns_to_go
from dynarep.envs import Step
from dynarep.protocols import policy_evaluation
from dynarep.protocols.collect import random_transitions
from dynarep.protocols.policy_evaluation import PolicyEvaluation

WALKER = EnvironmentConfig(suite="dmc", task="walker-walk")  # a model of it never ends an episode
HOPPER = EnvironmentConfig(suite="gymnasium", task="Hopper-v5")
SMALL = {"width": 16, "batch_size": 32, "model_width": 16, "model_batch_size": 32, "holdout_draws": 64}
FTFL = {"target": "direct", "normalise_targets": True}
REAL = {"synthetic_share": 0.0}
NAMES = {"q/mean", "q/abs", "q/mc", "q/correlation", "q/abs_over_mc", "diverged"}


def build(seeds=(0,), environment=HOPPER, agent=None, **settings) -> PolicyEvaluation:
    given = {"transitions": 200, "model_updates": 8, "chunk": 5, "updates": 60, "measure_at": (30,), "margin": 1}
    config = PolicyEvaluationConfig(**(given | settings))
    return PolicyEvaluation(environment, MBPOConfig(**(SMALL | (agent or {}))), config, seeds)


def finish(protocol: PolicyEvaluation) -> PolicyEvaluation:
    while protocol.done < protocol.total:
        protocol.advance()
    return protocol


def last(protocol: PolicyEvaluation, k: int = 0) -> dict[str, float]:
    return {row.metric: row.value for row in protocol.metrics.rows[k]}


class Payer:
    """Every step pays one; an episode has so many of them and then ends for good, or by a limit."""

    obs_size, action_size, action_repeat, episode_frames = 3, 2, 1, 1000

    def __init__(self, steps: int, terminates: bool) -> None:
        self.steps, self.terminates = steps, terminates

    def reset(self, seed):
        self.rng, self.t = np.random.default_rng(seed), 0
        return self._obs()

    def _obs(self):
        return self.rng.normal(size=3).astype(np.float32)

    def step(self, action):
        self.t += 1
        over = self.t == self.steps
        return Step(self._obs(), 1.0, over and self.terminates, over and not self.terminates)


@pytest.fixture
def payer(monkeypatch):
    def make(steps: int, terminates: bool) -> None:
        monkeypatch.setattr(envs, "from_config", lambda environment: Payer(steps, terminates))

    return make


FAST = {"lr": 0.01, "target_rate": 0.2, "discount": 0.8, "model_lr": 1e-3}


@pytest.mark.parametrize("agent", [REAL, FTFL], ids=["real", "ftfl"])
def test_the_value_of_one_a_step_is_one_over_one_minus_the_discount(payer, agent):
    payer(100, terminates=False)
    # 64 steps left: the logged returns lack 0.8^64 of the value.
    found = last(finish(build(environment=WALKER, agent=FAST | agent, updates=500, margin=64)))
    assert found["q/mean"] == pytest.approx(5.0, rel=0.02)
    assert found["q/mc"] == pytest.approx(5.0, rel=1e-5)
    assert found["q/abs"] == pytest.approx(found["q/mean"])
    assert found["q/abs_over_mc"] == pytest.approx(found["q/abs"] / found["q/mc"], rel=1e-6)
    assert found["diverged"] == 0
    assert ("reward/nmse" in found) == ("inflation/share" in found) == (agent is FTFL)


def test_a_true_end_cuts_the_value(payer):
    payer(1, terminates=True)
    found = last(finish(build(agent=FAST | REAL, updates=300, margin=64)))
    assert found["q/mean"] == pytest.approx(1.0, rel=0.02)
    assert found["q/mc"] == 1.0, "every step of an episode that truly ends has its whole return"


def test_imagined_ends_cut_the_value_too():
    protocol = build(agent=FTFL)
    protocol._ends = lambda next_obs: torch.ones(next_obs.shape[:-1], dtype=torch.bool)
    rows = protocol.batch(0)
    assert (rows["mask"][:, :30] == 0).all()
    assert (rows["mask"][:, 30:] == 1).any()


# -- minibatches -------------------------------------------------------------------------------------------------


def test_a_minibatch_is_the_models_transitions_and_then_real_ones():
    protocol = build([0, 1], agent=FTFL)
    while protocol.done < 8:
        protocol.advance()
    known = {name: {row.tobytes() for row in protocol.replay.data[name][1].numpy()} for name in ("obs", "action")}
    rows = protocol.batch(3)
    assert all(row.numpy().tobytes() in known["obs"] for row in rows["obs"][1])
    real = [row.numpy().tobytes() in known["action"] for row in rows["action"][1]]
    assert real == [False] * 30 + [True] * 2
    assert rows["action"].abs().max() <= 1
    whole = {row.tobytes() for row in _joined(protocol.replay.data, 1)}
    assert [row.tobytes() in whole for row in _joined(rows, 1)] == real
    repeated = protocol.batch(3)
    assert all(torch.equal(rows[name], repeated[name]) for name in rows)
    assert not torch.equal(rows["action"], protocol.batch(4)["action"])


def _joined(rows, k):
    return torch.cat([values[k].reshape(values.shape[1], -1) for values in rows.values()], 1).numpy()


def test_without_synthetic_rows_no_model_is_trained_and_all_rows_are_real(monkeypatch):
    protocol = build(agent=REAL)
    assert protocol.total == 60
    monkeypatch.setattr(protocol.ensemble, "train_chunk", None)
    finish(protocol)
    whole = {row.tobytes() for row in _joined(protocol.replay.data, 0)}
    assert all(row.tobytes() in whole for row in _joined(protocol.batch(0), 0))


def test_what_is_held_out_is_not_learned_from_and_judges_the_model(monkeypatch):
    judged = []
    report = policy_evaluation.report

    def spy(ensemble, unseen, generators):
        judged.append(unseen)
        return report(ensemble, unseen, generators)

    monkeypatch.setattr(policy_evaluation, "report", spy)
    protocol = finish(build([0, 1], agent=FTFL))
    (unseen,) = judged
    assert unseen["obs"].shape[1] == 32
    assert protocol.replay.size == 168
    for k, seed in enumerate((0, 1)):
        data = random_transitions(envs.from_config(HOPPER), seed, 200)
        learned = {row.tobytes() for row in protocol.replay.data["obs"][k].numpy()}
        held = {row.tobytes() for row in unseen["obs"][k].numpy()}
        assert not learned & held
        assert learned | held == {row.tobytes() for row in data.obs}
        assert (protocol.replay.data["mask"][k] == 0).sum() + _ends(data, unseen["obs"][k]) == data.terminated.sum()


def _ends(data, rows) -> int:
    held = {row.numpy().tobytes() for row in rows}
    return sum(row.tobytes() in held for row in data.obs[data.terminated])


# -- what is compared --------------------------------------------------------------------------------------------


def test_values_are_compared_on_logged_states_whose_return_is_known(monkeypatch):
    protocol = build(agent=REAL, transitions=246, margin=6)
    data = random_transitions(envs.from_config(HOPPER), 0, 246)
    bounds = [0, *(np.flatnonzero(data.ended) + 1), 246]
    episodes = [
        Episode(data.obs[a:b], data.action[a:b], data.reward[a:b], bool(data.terminated[b - 1]))
        for a, b in pairwise(bounds)
    ]
    assert [e.terminated for e in episodes] == [True] * (len(episodes) - 1) + [False]
    assert len(episodes[-1]) > 6
    mc = np.concatenate([returns_to_go(e.reward, 0.99) for e in episodes])[:-5]
    monkeypatch.setattr(protocol.agent, "q", lambda obs, action: -2 * obs[..., 0] + action[..., 1])
    protocol.measure(7)
    q = (-2 * data.obs[:-5, 0] + data.action[:-5, 1]).astype(np.float64)
    found = last(protocol)
    assert found["q/mean"] == pytest.approx(q.mean())
    assert found["q/abs"] == pytest.approx(np.abs(q).mean())
    assert found["q/mc"] == pytest.approx(mc.mean())
    assert found["q/correlation"] == pytest.approx(np.corrcoef(q, mc)[0, 1])
    assert found["q/abs_over_mc"] == pytest.approx(np.abs(q).mean() / np.abs(mc).mean())
    assert {row.update for row in protocol.metrics.rows[0]} == {7}


def test_values_that_are_not_finite_are_a_result(monkeypatch):
    protocol = build([0, 1], agent=REAL)
    monkeypatch.setattr(protocol.agent, "q", lambda obs, action: obs.sum(-1) * torch.tensor([[1.0], [torch.inf]]))
    protocol.measure(1)
    assert [last(protocol, k)["diverged"] for k in range(2)] == [0, 1]
    assert math.isfinite(last(protocol, 0)["q/mean"])
    assert not math.isfinite(last(protocol, 1)["q/abs"])


def test_without_any_state_to_compare_there_is_no_number(payer):
    payer(100, terminates=False)
    found = last(finish(build(agent=REAL, margin=400)))
    assert all(math.isnan(found[name]) for name in NAMES - {"diverged"})
    assert found["diverged"] == 0


def test_the_critics_start_small_and_the_same_in_every_arm():
    heads = {}
    for name, agent, small in (("real", REAL, 0.01), ("ftfl", FTFL, 0.01), ("large", REAL, 1.0)):
        sac = build(agent=agent, small_head=small).sac
        heads[name] = sac.critic.parameter("/2.kernel").clone()
        assert torch.equal(heads[name], sac.target.parameter("/2.kernel"))
    assert torch.equal(heads["real"], heads["ftfl"])
    torch.testing.assert_close(heads["real"], 0.01 * heads["large"])


# -- rows, bytes, refusals ---------------------------------------------------------------------------------------


def test_what_is_recorded_when():
    protocol = finish(build(agent=FTFL, environment=HOPPER.model_copy(update={"action_repeat": 2})))
    updates = {}
    for row in protocol.metrics.rows[0]:
        updates.setdefault(row.metric, []).append(row.update)
        assert (row.agent_step, row.frame) == (200, 400)
    assert updates == {name: [30, 60] for name in NAMES} | {"reward/nmse": [0], "inflation/share": [0]}
    assert set(updates) == PolicyEvaluationConfig.metrics


@pytest.mark.parametrize("agent", [REAL, FTFL, {}], ids=["real", "ftfl", "mbpo"])
def test_bytes_are_the_same_twice_in_every_block_and_after_a_stop(agent):
    seen = [finish(build(seeds, agent=agent)).metrics.csv(seeds.index(1)) for seeds in ([1], [1], [0, 1], [2, 0, 1])]
    assert len(set(seen)) == 1
    cut = build([0, 1], agent=agent)
    while cut.done < cut.total:
        cut.advance()
        file, other = io.BytesIO(), build([0, 1], agent=agent)
        torch.save(cut.state(), file)
        other.load(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        other.done, other.metrics.rows = cut.done, cut.metrics.rows
        cut = other
    assert cut.metrics.csv(1) == seen[0]


def test_settings_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match=r"measure_at, 70: must be in 1\.\.updates, 60"):
        build(measure_at=(70,))
    for agent in ({"rollouts": "simulator"}, {"rollout_length": 3}, {"selection": "m2ac"}):
        with pytest.raises(ValueError, match="single steps of the model"):
            build(agent=agent)
