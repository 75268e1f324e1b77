"""The MBPO agent: schedule, rollouts, synthetic buffer, minibatches, blocks, checkpoints, probes."""

import io
import math
from itertools import product

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import probes
from dynarep.agents import selection
from dynarep.agents.mbpo import MBPO
from dynarep.agents.sac import SAC
from dynarep.configs.mbpo import EnsembleConfig, MBPOConfig
from dynarep.configs.sac import SACConfig
from dynarep.replay import Replay, draw
from dynarep.streams import stream

OBS, ACTION = 5, 2
FTFL = {"target": "direct", "normalise_targets": True}
LEARNER = {"width": 16, "batch_size": 32, "updates_per_step": 2}
MODEL = {"model_width": 16, "model_batch_size": 32, "holdout_draws": 100, "model_chunks": 2, "chunk_steps": 2}
SMALL = {**LEARNER, **MODEL, "rollouts_per_step": 20, "synthetic_capacity": 400, "infoprop_rows": 50}


def build(seeds=(0,), task="", obs=OBS, action=ACTION, **settings) -> MBPO:
    return MBPO(MBPOConfig(**(SMALL | settings)), obs, action, seeds, task)


def filled(seeds=(0,), size=100, obs=OBS, action=ACTION) -> Replay:
    """Real transitions; what a seed sees depends on the seed alone."""
    parts = []
    for s in seeds:
        g = stream(s, "test", "transitions")
        part = {"obs": g.standard_normal((size, obs)), "action": g.uniform(-1, 1, (size, action))}
        part["next_obs"] = part["obs"] + 0.1 * g.standard_normal((size, obs))
        parts.append(part | {"reward": g.standard_normal(size), "mask": (g.random(size) > 0.1) * 1.0})
    replay = Replay(
        {"obs": (obs,), "action": (action,), "reward": (), "next_obs": (obs,), "mask": ()}, len(seeds), size
    )
    replay.add({k: np.stack([p[k] for p in parts]).astype(np.float32) for k in parts[0]})
    return replay


def shown(agent: MBPO, seeds) -> dict[str, torch.Tensor]:
    """Everything that a seed can show, seed axis first."""
    state = {k: v.reshape(len(seeds), -1) for k, v in agent.state().items() if v.dim()}
    for name, values in agent.synthetic.data.items():  # not as many columns as the longest of the block has rows
        state[f"synthetic/data/{name}"] = values.reshape(len(seeds), -1)
    return state


# -- configuration -----------------------------------------------------------------------------------------------


def test_a_minibatch_of_256_has_243_synthetic_rows():
    assert MBPOConfig().synthetic_rows() == 243
    shares = {0.0: 0, 0.05: 12, 0.25: 64, 0.5: 128, 0.75: 192, 1.0: 256}
    assert {share: MBPOConfig(synthetic_share=share).synthetic_rows() for share in shares} == shares


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollouts": "simulator", "rollout_length": 2}, "simulator takes single steps"),
        ({"rollouts": "simulator", "selection": "m2ac"}, "simulator takes single steps"),
        ({"selection": "macura", "rollout_length": 2}, "macura has a horizon of its own"),
        ({"synthetic_capacity": 399}, "must hold one step's rollouts, 400"),
    ],
)
def test_settings_that_exclude_each_other_are_named(settings, message):
    with pytest.raises(ValidationError, match=message):
        MBPOConfig(**settings)


def test_labels_tell_arms_apart():
    arms = [{}, FTFL, {"selection": "m2ac"}, {"rollouts": "simulator"}, {"synthetic_share": 0.5}, {"target": "direct"}]
    assert len({MBPOConfig(**arm).label() for arm in arms}) == len(arms)


def test_planned_work_is_sacs_updates_retrainings_and_rollouts():
    config = MBPOConfig()
    updates, model, rollouts = config.learning_work(1000, 67, 21)
    assert updates == SACConfig().learning_work(1000, 67, 21)[0]
    assert model == EnsembleConfig().update_work(4 * 25 * 200, 67, 21)
    assert rollouts.units == 1000
    assert rollouts.gflop == pytest.approx(2e-9 * 400 * config.kernel_entries(67, 21))  # one member a row
    assert len(MBPOConfig(synthetic_share=0.0).learning_work(1000, 67, 21)) == 1


def test_planned_memory_counts_what_a_block_holds():
    agent = build(width=64, model_width=64)
    nets = [agent.sac.actor, agent.sac.critic, agent.sac.target, agent.ensemble.net]
    assert agent.config.parameters(OBS, ACTION) == pytest.approx(sum(net.flat.numel() for net in nets), rel=0.05)
    assert agent.config.own_rows(3) == 60
    assert agent.config.own_rows(1000) == agent.synthetic.data["obs"].shape[1] == 400
    assert MBPOConfig(synthetic_share=0.0).own_rows(1000) == 0


def test_kernel_entries_are_those_of_a_member():
    for settings in ({}, {"separate_reward": True}):
        agent = build(**settings)
        entries = sum(math.prod(shape) for slot, shape in agent.ensemble.net.slots().items() if slot.endswith("kernel"))
        assert agent.config.kernel_entries(OBS, ACTION) == entries


# -- schedule ----------------------------------------------------------------------------------------------------


def chunks(agent, monkeypatch) -> list[int]:
    """A list that grows by the number of gradient steps whenever a chunk is trained."""
    trained = []
    train = agent.ensemble.train_chunk

    def train_chunk(data, generators, steps):
        trained.append(steps)
        assert data["obs"].shape[1] == 100
        return train(data, generators, steps)

    monkeypatch.setattr(agent.ensemble, "train_chunk", train_chunk)
    return trained


def test_the_model_is_retrained_at_the_first_learning_and_then_every_so_many_steps(monkeypatch):
    agent, replay, counts = build(retrain_every=4), filled(), []
    trained = chunks(agent, monkeypatch)
    for step in range(10, 18):  # learning begins between two retrainings
        agent.learn(replay, step)
        counts.append(len(trained))
    assert counts == [2, 2, 4, 4, 4, 4, 6, 6]
    assert set(trained) == {2}
    assert agent.last_model_terms["total_loss"].shape == (1,)


def test_with_the_references_settings_the_first_retraining_is_at_step_10_000(monkeypatch):
    agent, replay = build(retrain_every=MBPOConfig().retrain_every), filled()
    trained = chunks(agent, monkeypatch)
    for step in range(9_998, 10_000):  # would be too early, were the agent asked; then every 250
        assert step % agent.config.retrain_every
    agent.learn(replay, 10_000)
    agent.learn(replay, 10_001)
    assert len(trained) == 2
    agent.learn(replay, 10_250)
    assert len(trained) == 4


def test_a_retraining_goes_on_from_where_the_model_stands():
    agent, replay = build(), filled()
    agent.learn(replay, 0)
    once = agent.ensemble.net.flat.clone(), int(agent.ensemble.state()["adam/steps"])
    agent.learn(replay, 250)
    assert once[1] == 4
    assert int(agent.ensemble.state()["adam/steps"]) == 8
    assert 0 < (agent.ensemble.net.flat - once[0]).abs().max() < 0.01


# -- rollouts ----------------------------------------------------------------------------------------------------


def test_rollouts_start_in_real_states_act_by_the_policy_and_ask_the_model():
    seeds = [0, 3]
    agent, twin, replay = build(seeds), build(seeds), filled(seeds)
    agent.learn(replay, 7)
    twin._retrain(replay, 7)
    rng = [stream(s, "rollout", 7) for s in seeds]
    obs = replay.rows(draw(rng, 100, (20,)))["obs"]
    action, _ = twin.log_prob_sample(obs, rng)
    next_obs, reward = twin.ensemble.sample(obs, action, rng)
    found = {name: values[:, :20] for name, values in agent.synthetic.data.items()}
    expected = {"obs": obs, "action": action, "reward": reward, "next_obs": next_obs, "mask": torch.ones(2, 20)}
    assert agent.synthetic.sizes.tolist() == [20, 20]
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


def test_the_oldest_synthetic_transitions_are_overwritten(monkeypatch):
    agent, replay = build(synthetic_capacity=50), filled()
    for step in range(5):
        sample = lambda obs, action, rng, noisy, step=step: (obs, torch.full(obs.shape[:2], float(step)))  # noqa: E731
        monkeypatch.setattr(agent.ensemble, "sample", sample)
        agent.learn(replay, step)
    kept = agent.synthetic.data["reward"][0].tolist()
    assert sorted(kept) == [2.0] * 10 + [3.0] * 20 + [4.0] * 20


def test_a_minibatch_is_synthetic_rows_first_and_then_real_ones(monkeypatch):
    agent, replay, batches = build(batch_size=256, updates_per_step=3), filled(), []
    replay.data["reward"].fill_(1.0)
    monkeypatch.setattr(
        agent.ensemble, "sample", lambda obs, action, rng, noisy: (obs, torch.full(obs.shape[:2], -1.0))
    )
    monkeypatch.setattr(agent.sac, "update", lambda batch, noise, report: batches.append((batch, noise)) or {})
    agent.learn(replay, 0)
    assert len(batches) == 3
    for batch, noise in batches:
        assert batch["reward"][0].tolist() == [-1.0] * 243 + [1.0] * 13
        assert batch.keys() == replay.data.keys()
        assert noise[0].shape == noise[1].shape == (1, 256, ACTION)
    first, second = (batch["obs"] for batch, _ in batches[:2])
    assert not torch.equal(first[:, :243], second[:, :243])
    assert not torch.equal(first[:, 243:], second[:, 243:])


def test_a_synthetic_share_of_zero_is_sac_to_the_last_bit():
    seeds = [0, 3]
    agent, replay = build(seeds, synthetic_share=0.0), filled(seeds)
    sac, untrained = SAC(SACConfig(**LEARNER), OBS, ACTION, seeds), agent.ensemble.state()
    for step in range(3):
        ours, theirs = agent.learn(replay, step), sac.learn(replay, step)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    state = agent.sac.state()
    assert all(torch.equal(state[name], values) for name, values in sac.state().items())
    obs = replay.data["obs"][:, 0]
    assert torch.equal(agent.explore(obs, 3), sac.explore(obs, 3))
    assert torch.equal(agent.act(obs.unsqueeze(1)), sac.act(obs.unsqueeze(1)))
    assert all(torch.equal(agent.ensemble.state()[name], values) for name, values in untrained.items())
    assert agent.synthetic.size == 0


def test_the_simulator_takes_the_models_place(monkeypatch):
    agent, replay, calls = build([0, 1], rollouts="simulator"), filled([0, 1]), []
    trained = chunks(agent, monkeypatch)

    def simulate(indices, actions):
        calls.append((indices, actions))
        return replay.rows(indices)["obs"] + 1.0, actions.sum(-1), (indices % 2).float()

    agent.learn(replay, 0, simulate)
    (indices, actions), stored = calls[0], {k: v[:, :20] for k, v in agent.synthetic.data.items()}
    assert len(calls) == 1
    assert indices.shape == (2, 20)
    assert actions.shape == (2, 20, ACTION)
    assert torch.equal(stored["obs"], replay.rows(indices)["obs"])
    assert torch.equal(stored["next_obs"], stored["obs"] + 1.0)
    assert torch.equal(stored["action"], actions)
    assert torch.equal(stored["reward"], actions.sum(-1))
    assert torch.equal(stored["mask"], (indices % 2).float())
    assert trained == []


def test_longer_rollouts_go_on_from_the_imagined_state_and_drop_rows_that_ended(monkeypatch):
    """Quirk Q8, done right: (agent.synthetic) holds whole chains, none beyond its end."""
    seeds = [0, 1]
    agent, replay = build(seeds, "Humanoid-v5", rollout_length=4), filled(seeds)
    replay.data["obs"][..., 0] = 1.5
    replay.data["obs"][..., 1] = torch.arange(100.0) / 100  # tells rows apart; how fast they rise, too

    def sample(obs, action, generators, noisy):
        risen = obs.clone()
        risen[..., 0] += obs[..., 1]
        return risen, torch.zeros(obs.shape[:2])

    monkeypatch.setattr(agent.ensemble, "sample", sample)
    agent.learn(replay, 0)
    starts = draw([stream(s, "rollout", 0) for s in seeds], 100, (20,))
    for s in seeds:
        expected = []
        for speed in replay.data["obs"][s, starts[s], 1].tolist():
            z = np.float32(1.5)
            for _ in range(4):
                after = np.float32(z + np.float32(speed))
                ended = bool(after > 2.0)
                expected.append((round(float(z), 4), round(float(after), 4), float(not ended)))
                z = after
                if ended:
                    break
        size = int(agent.synthetic.sizes[s])
        stored = (agent.synthetic.data[name][s, :size] for name in ("obs", "next_obs", "mask"))
        found = [(round(float(o[0]), 4), round(float(n[0]), 4), float(m)) for o, n, m in zip(*stored, strict=True)]
        assert sorted(found) == sorted(expected)
    assert len({*agent.synthetic.sizes.tolist()}) == 2  # ragged: otherwise this says nothing about it


def test_imagined_states_end_by_the_tasks_rule():
    agent, replay = build(task="Hopper-v5"), filled()
    replay.data["obs"][..., 0] -= 10.0  # below the floor
    agent.learn(replay, 0)
    assert not agent.synthetic.data["mask"][0, :20].any()
    replay.data["obs"][..., 1] += 10.0  # a fallen pendulum
    for task, rules, ends in (("hopper-hop", "reference", False), ("InvertedPendulum-v5", "intended", True)):
        agent = build(task=task, terminations=rules)
        agent.learn(replay, 0)
        assert (agent.synthetic.data["mask"][0, :20] == float(not ends)).all()


def test_a_seed_without_synthetic_transitions_learns_from_real_ones(monkeypatch):
    """A rule may reject everything, in one seed of a block and not in the other."""
    agent, replay, batches = build([0, 1], selection="macura"), filled([0, 1]), []
    replay.data["reward"].fill_(1.0)
    monkeypatch.setattr(agent._rule, "threshold", lambda: torch.tensor([0.0, math.inf]))
    monkeypatch.setattr(agent.sac, "update", lambda batch, noise, report: batches.append(batch) or {})
    agent.learn(replay, 0)
    assert agent.synthetic.sizes[0] == 0
    assert agent.synthetic.sizes[1] > 0
    assert all((batch["reward"][0] == 1.0).all() for batch in batches)
    assert all((batch["reward"][1, :30] != 1.0).all() for batch in batches)


# -- blocks, checkpoints -----------------------------------------------------------------------------------------

ARMS = [
    *({"target": t, "normalise_targets": n} for t, n in product(("residual", "direct"), (False, True))),
    {"rollout_length": 3},
    *({"selection": rule, **cell} for rule in selection.RULES for cell in ({}, FTFL)),
]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: "-".join(map(str, arm.values())))
def test_a_seed_has_the_same_bits_in_every_block(arm):
    def learned(seeds):
        agent, replay = build(seeds, "Walker2d-v5", retrain_every=1, **arm), filled(seeds)
        replay.data["obs"][..., 0] += 1.4  # inside the walker's limits, for a while
        for step in range(2):
            terms = agent.learn(replay, step)
        return shown(agent, seeds) | {name: value.unsqueeze(1) for name, value in terms.items()}

    alone = learned([0])
    assert all(values.isfinite().all() for name, values in alone.items() if "rule" not in name)
    for block in ([0, 1], [3, 0, 1]):
        for name, values in learned(block).items():
            assert torch.equal(values[block.index(0)], alone[name][0]), (name, block)


@pytest.mark.parametrize("arm", ["none", *selection.RULES])
def test_a_restored_checkpoint_continues_with_the_same_bits(arm):
    replay, states = filled(), []
    original, restored = (build(retrain_every=2, selection=arm) for _ in range(2))
    for step in range(3):
        original.learn(replay, step)
    file = io.BytesIO()
    torch.save(original.state(), file)
    file.seek(0)
    restored.learn(replay, 9)  # something else first
    restored.load(torch.load(file, weights_only=True))
    assert restored.last_model_terms == original.last_model_terms
    for agent in (original, restored):
        terms = [agent.learn(replay, step) for step in (3, 4)]
        states.append(agent.state() | terms[0] | {f"{name}, last": value for name, value in terms[1].items()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_checkpoint_holds_filled_rows_only():
    agent, replay = build(synthetic_capacity=10_000), filled()
    agent.learn(replay, 0)
    assert agent.state()["synthetic/data/obs"].shape == (1, 20, OBS)


@pytest.mark.parametrize("arm", ["none", *selection.RULES])
def test_divergence_is_not_raised_and_stays_in_its_seed(arm):
    seeds, found = [0, 1, 2], []
    for reward in (1.0, math.inf):
        agent, replay = build(seeds, retrain_every=1, selection=arm, rollout_length=1), filled(seeds)
        replay.data["reward"][1] *= reward
        for step in range(3):
            terms = agent.learn(replay, step)
        found.append(shown(agent, seeds))
    assert not terms["critic_loss"][1].isfinite()
    for name, values in found[0].items():
        for seed in (0, 2):
            assert torch.equal(values[seed], found[1][name][seed]), name


# -- probes ------------------------------------------------------------------------------------------------------

DISCOUNT = 0.8


@pytest.mark.parametrize(
    ("target", "normalise"),
    [
        ("residual", False),
        ("direct", True),
        pytest.param("residual", True, marks=pytest.mark.slow),
        pytest.param("direct", False, marks=pytest.mark.slow),
    ],
)
def test_probes_are_learned_in_value_and_action_from_a_models_data(target, normalise):
    every = probes.CONTINUING * 3  # a task without a name never ends; with raw targets some learner is unlucky
    learner = {"width": 32, "lr": 4e-3, "target_rate": 0.1, "discount": DISCOUNT, "updates_per_step": 50}
    cold = {"target_entropy": -3.0, "initial_temperature": 1e-3}
    model = {"model_width": 32, "model_layers": 2, "weight_decay": (0.0,) * 3, "members": 2, "elites": 2}
    fast = {"model_lr": 5e-3, "model_batch_size": 128, "member_fan_in": False, "model_chunks": 5, "chunk_steps": 100}
    settings = {**learner, **cold, **model, **fast, "rollouts_per_step": 100, "synthetic_capacity": 10_000}
    agent = build(
        range(len(every)), "", probes.OBS, probes.ACTION, target=target, normalise_targets=normalise, **settings
    )
    replay, rows = probes.replay(every), probes.transitions(every, 256, seed=1)
    for step in range(15):
        agent.learn(replay, step)
    values, actions = agent.q(rows["obs"], rows["action"]), agent.act(rows["obs"])
    wrong: dict[str, list[tuple[float, float]]] = {}
    for i, probe in enumerate(every):
        error = values[i] - probe.value(rows["obs"][i], rows["action"][i], DISCOUNT)
        miss = torch.zeros(1)
        if probe.best is not None:
            where = probe.cares(rows["obs"][i])
            miss = (actions[i, where, 0] - probe.best(rows["obs"][i, where, 0])).abs()
        wrong.setdefault(probe.name, []).append((float(error.square().mean().sqrt()), float(miss.max())))
    for name, found in wrong.items():
        value, action = np.median(found, 0)
        assert value < 0.3, name  # of values up to 5
        assert action < 0.2, name
