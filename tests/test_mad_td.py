"""MAD-TD beyond the arrays of `test_parity_mad_td.py`: probes, acting, switches, resets, blocks, checkpoints, cost."""

import io
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import probes
from dynarep.agents.mad_td import MadTD, architecture
from dynarep.configs.mad_td import MadTDConfig
from dynarep.initialisers import uniform_fan_in
from dynarep.nets import Net
from dynarep.replay import Part, Replay, draw
from dynarep.streams import stream

OBS, ACTION, BATCH, WIDTH = 5, 2, 64, 16


def build(seeds=(0,), obs=OBS, action=ACTION, **settings) -> MadTD:
    small = {"width": WIDTH, "batch_size": BATCH, "bins": 21, "value_limit": 10, "updates_per_step": 2}
    return MadTD(MadTDConfig(**(small | settings)), obs, action, seeds)


def transitions(seeds=(0,), size=BATCH, obs=OBS, action=ACTION) -> dict[str, torch.Tensor]:
    """What a seed sees depends on the seed alone."""
    parts = []
    for g in (stream(seed, "transitions") for seed in seeds):
        part = {"obs": g.standard_normal((size, obs)), "action": g.uniform(-1, 1, (size, action))}
        part |= {"reward": g.standard_normal(size), "next_obs": g.standard_normal((size, obs))}
        parts.append(part | {"mask": (g.random(size) > 0.2) * 1.0})
    return {k: torch.from_numpy(np.stack([p[k] for p in parts]).astype(np.float32)) for k in parts[0]}


def filled(seeds=(0,), size=100, obs=OBS, action=ACTION) -> Replay:
    fields = {"obs": (obs,), "action": (action,), "reward": (), "next_obs": (obs,), "mask": ()}
    replay = Replay(fields, len(seeds), size)
    replay.add(transitions(seeds, size, obs, action))
    return replay


def spread(agent: MadTD) -> MadTD:
    """Make all networks, critics and their targets among them, different functions with large outputs and biases."""
    for name, net in (agent._nets() | {"target": agent.target}).items():
        for rows, seed in zip(net.flat.view(len(agent.seeds), -1), agent.seeds, strict=True):
            rows += 0.3 * torch.from_numpy(stream(seed, "spread", name).standard_normal(len(rows), dtype=np.float32))
    return agent


def latents(agent: MadTD, rows) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return agent.encode(rows["obs"]), agent.encode(rows["next_obs"])


def oracle(indices, actions):
    """A simulator in which everything can be told apart: indices (S, n), actions (S, n, a)."""
    next_obs = torch.cos(indices.unsqueeze(-1) + torch.arange(OBS)) + actions.sum(-1, keepdim=True)
    return next_obs, 0.1 * indices + actions[..., 0], torch.ones(indices.shape)


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of what is the same in two states."""
    assert before.keys() == after.keys()
    return {name for name in before if torch.equal(before[name], after[name])}


MODEL_STATE = {"encoder", "model"} | {
    f"adam/{n}/{k}" for n in ("encoder", "model") for k in ("first", "second", "steps")
}
ACTOR_STATE = {"actor"} | {f"adam/actor/{k}" for k in ("first", "second", "steps")}

# -- probes ----------------------------------------------------------------------------------------------------------

ALL, DISCOUNT = probes.CONTINUING, 0.5


def probe_learner(alpha: float, **settings) -> MadTD:
    """An agent for all probes, values from -2 to 2, that learns fast.

    The actor's rate is a tenth of the critics': before they know the peak it would run to where its tanh is flat.
    """
    fast = {"width": 32, "lr": 4e-3, "lr_encoder": 2e-3, "target_rate": 0.2, "discount": DISCOUNT, "bins": 17}
    fast |= {"value_limit": 4, "updates_per_step": 4, "model_fraction": alpha}
    agent = build(range(len(ALL)), probes.OBS, probes.ACTION, **(fast | settings))
    agent._optimisers["actor"].lr = 4e-4
    return agent


def learned(alpha: float, steps: int, model_first: int = 0, **settings) -> MadTD:
    torch.set_num_threads(1)
    agent, replay = probe_learner(alpha, **settings), probes.replay(ALL)
    for step in range(model_first):
        picks = draw([stream(seed, "first", step) for seed in agent.seeds], replay.size, (agent.config.batch_size,))
        agent.update_model(replay.rows(picks))
    for step in range(steps):
        agent.learn(replay, step)
    return agent


@pytest.fixture(scope="module")
def utd16_five() -> MadTD:
    """Seed i has learned probe i with 4 model rows in a minibatch of 64."""
    return learned(0.05, 180)


def check_probe(agent: MadTD, i: int, tolerance: float = 0.12) -> None:
    probe, rows = ALL[i], probes.transitions(ALL, 256, seed=1)
    obs, action = rows["obs"][i], rows["action"][i]
    values = agent.q(rows["obs"], rows["action"])[i]
    torch.testing.assert_close(values, probe.value(obs, action, DISCOUNT), rtol=0, atol=tolerance)
    if probe.best is not None:
        where = probe.cares(obs)
        assert where.any()
        chosen, best = agent.act(rows["obs"])[i, where, 0], probe.best(obs[where, 0])
        torch.testing.assert_close(chosen, best, rtol=0, atol=0.12)


EACH_PROBE = pytest.mark.parametrize("i", range(len(ALL)), ids=lambda i: ALL[i].name)


@EACH_PROBE
def test_probe_is_learned_in_value_and_action(utd16_five, i):
    check_probe(utd16_five, i)


@EACH_PROBE
def test_model_has_learned_the_probe(utd16_five, i):
    probe, rows = ALL[i], probes.transitions(ALL, 256, seed=1)
    z, next_z = latents(utd16_five, rows)
    with torch.no_grad():
        log_next, reward = utd16_five.imagine(z, rows["action"])
    error = (reward[i] - rows["reward"][i]).square().mean().sqrt()
    assert error < 0.1, f"{probe.name}: {error}"
    torch.testing.assert_close(log_next.exp()[i], next_z[i], rtol=0, atol=0.12)
    assert z[i].std(0).max() > 0.1 or probe.name == "constant", "the latents say nothing about the observation"


@pytest.mark.slow
def test_all_probes_are_learned_without_model_data():
    agent = learned(0.0, 220, batch_size=32)
    for i in range(len(ALL)):
        check_probe(agent, i)


@pytest.mark.slow
def test_all_probes_are_learned_from_model_data_alone():
    """Of random actions: from the policy's own, critics cannot learn what the others are worth."""
    agent = learned(1.0, 220, model_first=200, batch_size=32, lr=6e-3, model_actions="uniform")
    for i in range(len(ALL)):
        check_probe(agent, i, tolerance=0.2)


def test_planner_repairs_a_policy_with_the_model_and_critics(utd16_five):
    rows = probes.transitions(ALL, 8, seed=2)
    planner = probe_learner(0.05, planner=True, plan_temperature=0.05)
    planner.load(utd16_five.state())
    planner.actor.parameter("/2.bias")[...] -= 0.5
    with torch.no_grad():
        plain = planner.policy(planner.encode(rows["obs"]))
    found = planner.act(rows["obs"])
    for i, probe in enumerate(ALL):
        if probe.best is not None:
            where = probe.cares(rows["obs"][i])
            best = probe.best(rows["obs"][i, where, 0])
            off, off_planned = ((a[i, where, 0] - best).abs().max() for a in (plain, found))
            assert off > 0.25
            assert off_planned < 0.2, probe.name


# -- acting ----------------------------------------------------------------------------------------------------------


def constant_policy(u: float, action: int = 40, **settings) -> MadTD:
    agent = build(action=action, **settings)
    agent.actor.flat.zero_()
    agent.actor.parameter("/2.bias")[...] = u
    return agent


def test_exploration_adds_clipped_noise_of_the_steps_own_stream():
    agent, obs = constant_policy(0.3), torch.zeros(1, OBS)
    noise = np.stack([stream(0, "explore", step).standard_normal(40, dtype=np.float32) for step in range(50)])
    actions = torch.cat([agent.explore(obs, step) for step in range(50)])
    expected = np.tanh(0.3) + np.clip(0.1 * noise, -0.3, 0.3)
    np.testing.assert_allclose(actions, expected, atol=1e-6)
    assert np.abs(noise).max() > 3.0, "the draw must reach the clip"
    assert torch.equal(agent.explore(obs, 7), agent.explore(obs, 7))


def test_exploration_stays_within_the_clip_and_the_box():
    agent = constant_policy(0.0, exploration_noise=5.0)
    noise = agent.explore(torch.zeros(1, OBS), 0)
    assert noise.abs().max() == pytest.approx(0.3)
    assert (noise.abs() > 0.299).float().mean() > 0.8
    at_the_edge = constant_policy(4.0).explore(torch.zeros(1, OBS), 0)
    assert at_the_edge.max() == 1.0
    assert at_the_edge.min() < 0.95
    assert constant_policy(0.0, noise_clip=0.02).explore(torch.zeros(1, OBS), 0).abs().max() == pytest.approx(0.02)


def test_actions_and_values_are_the_same_for_any_number_of_rows():
    agent, rows = spread(build([3, 5])), transitions([3, 5], 70)
    some = {name: values[:, :45] for name, values in rows.items()}
    torch.testing.assert_close(agent.act(some["obs"]), agent.act(rows["obs"])[:, :45])
    torch.testing.assert_close(agent.q(some["obs"], some["action"]), agent.q(rows["obs"], rows["action"])[:, :45])
    with torch.no_grad():
        policy = agent.policy(agent.encode(rows["obs"][:, :64]))
    torch.testing.assert_close(agent.act(rows["obs"])[:, :64], policy)
    torch.testing.assert_close(agent.explore(rows["obs"][:, 0], 0), policy[:, 0], rtol=0, atol=0.31)


def test_value_is_the_smaller_online_critics_of_every_row():
    agent, rows = spread(build()), transitions()
    with torch.no_grad():
        both = agent.values(agent.critic, latents(agent, rows)[0], rows["action"])
    assert 0 < both[0].argmin(0).sum() < BATCH  # neither critic is the smaller one everywhere
    torch.testing.assert_close(agent.q(rows["obs"], rows["action"]), both.amin(1))


# -- model rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "real"), [(0, 512), (0.01, 506), (0.05, 486), (0.1, 460), (0.25, 384), (0.5, 256), (0.75, 128), (1, 0)]
)
def test_so_many_rows_of_512_stay_real(alpha, real):
    assert MadTDConfig(model_fraction=alpha).real_rows() == real


@pytest.mark.parametrize(("alpha", "real"), [(0.05, 60), (0.5, 32), (0.75, 16), (1.0, 0)])
def test_model_rows_are_the_policys_action_and_what_the_model_makes_of_it(alpha, real):
    agent, rows = spread(build([1, 2], model_fraction=alpha)), transitions([1, 2])
    z, next_z = latents(agent, rows)
    action, reward, after = agent.mix(z, next_z, rows)
    with torch.no_grad():
        policy = agent.policy(z)
        log_next, imagined = agent.imagine(z, policy)
    for mixed, stored, made in (
        (action, rows["action"], policy),
        (reward, rows["reward"], imagined),
        (after, next_z, log_next.exp()),
    ):
        assert torch.equal(mixed[:, :real], stored[:, :real])
        torch.testing.assert_close(mixed[:, real:], made[:, real:])
        assert not torch.isclose(mixed[:, real:], stored[:, real:]).all(-1).any()


def test_without_model_data_critic_and_actor_never_read_the_model():
    rows, found = transitions(), []
    for broken in (False, True):
        agent = spread(build(model_fraction=0))
        if broken:
            agent.model.flat.fill_(torch.nan)
        z, next_z = latents(agent, rows)
        found.append((agent.update_critic(z, next_z, rows), agent.update_actor(z), agent.critic.flat, agent.actor.flat))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    control = spread(build(model_fraction=0.05))
    control.model.flat.fill_(torch.nan)
    assert control.update_critic(z, next_z, rows).isnan()


@pytest.mark.parametrize("kind", ["uniform", "replay"])
def test_model_rows_of_other_actions_have_the_models_outcome(kind):
    agent, rows = spread(build(model_fraction=0.5, model_actions=kind)), transitions()
    rows["uniform"] = torch.rand(1, BATCH, ACTION, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z, next_z = latents(agent, rows)
    action, reward, after = agent.mix(z, next_z, rows)
    wanted = rows["uniform" if kind == "uniform" else "action"]
    assert torch.equal(action[:, :32], rows["action"][:, :32])
    assert torch.equal(action[:, 32:], wanted[:, 32:])
    with torch.no_grad():
        log_next, imagined = agent.imagine(z, wanted)
    torch.testing.assert_close(reward[:, 32:], imagined[:, 32:])
    torch.testing.assert_close(after[:, 32:], log_next.exp()[:, 32:])


def test_uniform_model_actions_come_from_the_steps_own_stream():
    seeds = [0, 3]
    agent, seen = build(seeds, model_actions="uniform"), {}
    agent.update = lambda batch, **rest: seen.update(batch) or {}
    agent.learn(filled(seeds), 11)
    drawn = [stream(s, "model actions", 11).random((2, BATCH, ACTION), dtype=np.float32) for s in seeds]
    np.testing.assert_allclose(seen["uniform"], 2 * np.stack(drawn) - 1, atol=1e-6)
    assert seen["uniform"].min() < -0.9
    assert seen["uniform"].max() > 0.9


@pytest.mark.parametrize(("alpha", "real"), [(0.05, 60), (0.5, 32), (1.0, 0)])
def test_oracle_rows_are_the_simulators_outcome_of_the_policys_action(alpha, real):
    agent = spread(build([1, 2], model_fraction=alpha, model_data="simulator"))
    rows = transitions([1, 2]) | {"index": torch.arange(2 * BATCH).view(2, BATCH)}
    agent.model.flat.fill_(torch.nan)  # never read
    z, next_z = latents(agent, rows)
    action, reward, after = agent.mix(z, next_z, rows, oracle)
    with torch.no_grad():
        policy = agent.policy(z)
        next_obs, simulated, _ = oracle(rows["index"], policy)
        true_z = agent.encode(next_obs)
    for mixed, stored, made in (
        (action, rows["action"], policy),
        (reward, rows["reward"], simulated),
        (after, next_z, true_z),
    ):
        assert torch.equal(mixed[:, :real], stored[:, :real])
        torch.testing.assert_close(mixed[:, real:], made[:, real:])


def test_oracle_rows_that_end_the_episode_keep_their_stored_outcome():
    agent = spread(build(model_fraction=1.0, model_data="simulator"))
    rows = transitions() | {"index": torch.arange(BATCH)[None]}
    z, next_z = latents(agent, rows)

    def ends(indices, actions):
        next_obs, reward, mask = oracle(indices, actions)
        return next_obs, reward, mask * (indices % 2)

    _, plain_reward, plain_after = agent.mix(z, next_z, rows, oracle)
    _, reward, after = agent.mix(z, next_z, rows, ends)
    assert torch.equal(reward[:, ::2], rows["reward"][:, ::2])
    assert torch.equal(after[:, ::2], next_z[:, ::2])
    assert torch.equal(reward[:, 1::2], plain_reward[:, 1::2])
    assert torch.equal(after[:, 1::2], plain_after[:, 1::2])


def test_oracle_is_asked_about_the_rows_that_were_drawn():
    """Row numbers are those of the whole replay, also where the agent learns from a part of it."""
    seeds, asked = [0, 3], []
    replay = filled(seeds)
    part = Part(replay, [np.arange(0, 100, 2), np.arange(1, 100, 3)])

    def watched(indices, actions):
        asked.append(indices)
        return oracle(indices, actions)

    for data, sizes in ((replay, (99, 99)), (part, (49, 32))):
        asked.clear()
        build(seeds, model_data="simulator").learn(data, 5, watched)
        picks = draw([stream(s, "replay", 5) for s in seeds], sizes, (2, BATCH))
        expected = picks if data is replay else part.absolute(picks)
        assert torch.equal(torch.stack(asked, 1), expected[:, :, 60:])


def test_oracle_needs_a_simulator():
    with pytest.raises(AssertionError, match="model_data"):
        build(model_data="simulator").learn(filled(), 0)


# -- what learns, and when -------------------------------------------------------------------------------------------


def test_learning_is_one_update_on_the_rows_of_the_steps_own_stream():
    seeds = [0, 3]
    agent, twin, replay = build(seeds), build(seeds), filled(seeds)
    terms = agent.learn(replay, 11)
    picks = draw([stream(s, "replay", 11) for s in seeds], 99, (2, BATCH))
    expected = twin.update(replay.rows(picks))
    assert same(agent.state(), twin.state()) == set(agent.state())
    assert all(torch.equal(terms[name], expected[name]) for name in expected)
    names = {"reward_loss", "model_loss", "vaml_loss", "model_critic_loss", "total_loss", "critic_loss", "actor_loss"}
    assert set(terms) == names
    assert {values.shape for values in terms.values()} == {(2,)}


def test_the_newest_transition_is_never_drawn():
    agent, replay = build(updates_per_step=8), filled(size=4)
    for name in ("obs", "next_obs", "action", "reward"):
        replay.data[name][:, 3] = torch.nan
    for step in range(3):
        agent.learn(replay, step)  # 1536 draws of 4 rows
    assert all(values.isfinite().all() for values in agent.state().values())
    replay.data["obs"][:, 2] = torch.nan
    agent.learn(replay, 3)
    assert agent.critic.flat.isnan().any(), "the last but one is drawn"


def test_the_only_transition_is_drawn():
    agent, replay = build(), filled(size=100)
    replay.sizes = torch.tensor([1])
    replay.data["obs"][:, 1:] = torch.nan
    agent.learn(replay, 0)
    assert agent.critic.flat.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"encoder": 1, "model": 1, "critic": 3, "actor": 3}),
        ({"slow_model": False}, {"encoder": 3, "model": 3, "critic": 3, "actor": 3}),
        ({"slow_actor": True}, {"encoder": 1, "model": 1, "critic": 3, "actor": 1}),
        ({"freeze_model_after": 0}, {"encoder": 0, "model": 0, "critic": 3, "actor": 3}),
        ({"freeze_model_after": 0, "slow_model": False}, {"encoder": 0, "model": 0, "critic": 3, "actor": 3}),
        ({"model_free": True, "model_fraction": 0}, {"critic": 3, "actor": 3}),
    ],
)
def test_networks_take_so_many_steps_in_an_agent_step_at_utd_three(settings, expected):
    agent = build(updates_per_step=3, **settings)
    agent.learn(filled(), 0)
    state = agent.state()
    assert {name: int(state[f"adam/{name}/steps"]) for name in agent._nets()} == expected


def test_every_minibatch_is_encoded_by_the_newest_encoder():
    """At UTD 2 with a fast model, the second minibatch by the encoder of after its own model update."""
    rows = {name: torch.stack([v, v.flip(1)], 1) for name, v in transitions().items()}
    agent, twin = build(slow_model=False), build(slow_model=False)
    agent.update(rows)
    for i in range(2):
        own = {name: values[:, i] for name, values in rows.items()}
        twin.update_model(own)
        z, next_z = latents(twin, own)
        twin.update_critic(z, next_z, own)
        twin.update_actor(z)
    assert same(agent.state(), twin.state()) == set(agent.state())


def test_a_frozen_model_stops_at_its_step_and_the_rest_goes_on():
    agent, replay = build(freeze_model_after=2), filled()
    states = [agent.state()]
    for step in range(4):
        terms = agent.learn(replay, step)
        assert ("total_loss" in terms) == (step < 2)
        states.append(agent.state())
    changed = [set(a) - same(a, b) for a, b in pairwise(states)]
    assert all(names >= MODEL_STATE for names in changed[:2])
    assert not any(MODEL_STATE & names for names in changed[2:])
    assert all({"critic", "target", "actor"} <= names for names in changed)


@pytest.mark.parametrize(
    ("switch", "term"), [("value_aware_loss", "vaml_loss"), ("critic_shapes_encoder", "model_critic_loss")]
)
def test_a_model_loss_that_is_off_is_not_in_the_total(switch, term):
    rows = transitions()
    terms = [spread(build(**settings)).update_model(rows) for settings in ({}, {switch: False})]
    assert set(terms[0]) - set(terms[1]) == {term}
    torch.testing.assert_close(terms[1]["total_loss"], terms[0]["total_loss"] - terms[0][term])


# -- networks --------------------------------------------------------------------------------------------------------


def test_a_narrow_model_leaves_the_latent_and_the_other_networks_alone():
    narrow, plain = build(model_width=8), build()
    specs = architecture(narrow.config, OBS, ACTION)
    assert specs["dynamics"].sizes == (WIDTH + ACTION, 8, 8, WIDTH)
    assert specs["reward"].sizes == (WIDTH + ACTION, 8, 8, 1)
    assert all(torch.equal(getattr(narrow, n).flat, getattr(plain, n).flat) for n in ("encoder", "critic", "actor"))
    narrow.learn(filled(), 0)


def test_without_layer_norm_simnorm_stays_and_initial_kernels_are_the_same():
    bare, plain, rows = build(layer_norm_on=False), build(), transitions()
    for name, net in plain._nets().items():
        other = bare._nets()[name]
        assert set(other.slots()) == {slot for slot in net.slots() if not slot.endswith(("scale", "shift"))}
        assert all(torch.equal(other.parameter(slot), net.parameter(slot)) for slot in other.slots())
    z, _ = latents(bare, rows)
    torch.testing.assert_close(z.unflatten(-1, (2, 8)).sum(-1), torch.ones(1, BATCH, 2))
    assert not torch.allclose(z, latents(plain, rows)[0])


def test_the_model_free_arm_learns_from_observations_alone():
    agent = build([0, 3], model_free=True, model_fraction=0)
    specs = architecture(agent.config, OBS, ACTION)
    assert {name: spec.sizes for name, spec in specs.items()} == {
        "critic": (OBS + ACTION, WIDTH, WIDTH, WIDTH, 21), "actor": (OBS, WIDTH, WIDTH, ACTION),
    }  # fmt: skip
    rows = transitions([0, 3])
    assert agent.encode(rows["obs"]) is rows["obs"]
    assert set(agent.learn(filled([0, 3]), 0)) == {"critic_loss", "actor_loss"}
    assert not any("model" in name or "encoder" in name for name in agent.state())
    assert agent.q(rows["obs"], rows["action"])[0].std() > 0


def test_architecture_is_that_of_the_specification():
    specs = architecture(MadTDConfig(), 223, 38)
    assert {name: spec.sizes for name, spec in specs.items()} == {
        "encoder": (223, 512, 512), "dynamics": (550, 512, 512, 512), "reward": (550, 512, 512, 1),
        "critic": (550, 512, 512, 151), "actor": (512, 512, 512, 38),
    }  # fmt: skip
    counts = {name: sum(np.prod(shape) for shape in spec.parameters().values()) for name, spec in specs.items()}
    counts["critic"] *= 2
    assert {name: round(count / 1e3) for name, count in counts.items() if name not in ("dynamics", "reward")} == {
        "encoder": 379, "critic": 1249, "actor": 547
    }  # fmt: skip
    assert round((counts["dynamics"] + counts["reward"]) / 1e3) == 1358


# -- resets ----------------------------------------------------------------------------------------------------------


def trained(**settings) -> MadTD:
    agent = spread(build([4, 2], **settings))
    agent.learn(filled([4, 2]), 1)
    return agent


def start(agent: MadTD, name: str, number: int) -> torch.Tensor:
    net = agent._nets()[name]
    return Net(f"{name} reset {number}", net.branches, agent.seeds, uniform_fan_in, members=net.members).flat


@pytest.mark.parametrize("kind", ["full", "spr", "actor"])
def test_a_reset_makes_fresh_what_it_should_and_leaves_the_rest(kind):
    agent = trained(reset=kind)
    before = agent.state()
    agent.reset(3)
    after = agent.state()
    fresh = {"full": ("encoder", "model", "critic", "actor"), "spr": ("critic", "actor"), "actor": ("actor",)}[kind]
    half = ("encoder", "model") if kind == "spr" else ()
    for name in fresh:
        assert torch.equal(after[name], start(agent, name, 3)), name
    for name in half:
        torch.testing.assert_close(after[name], (before[name] + start(agent, name, 3)) / 2)
    for name in fresh + half:
        assert not any(after[f"adam/{name}/{key}"].any() for key in ("first", "second", "steps"))
    if kind == "actor":
        assert same(before, after) == set(before) - ACTOR_STATE
    else:
        assert torch.equal(after["target"], after["critic"])


def test_every_reset_and_every_seed_has_weights_of_its_own():
    agent = trained(reset="full")
    kernels = [build([4, 2]).critic.parameter("/0.kernel").clone()]
    for number in (1, 2):
        agent.reset(number)
        kernels.append(agent.critic.parameter("/0.kernel").clone())
    assert len({kernel[s, j].numpy().tobytes() for kernel in kernels for s in range(2) for j in range(2)}) == 12


@pytest.mark.parametrize(("kind", "expected"), [("full", [1, 2]), ("none", [])])
def test_resets_come_before_the_learning_of_every_so_manieth_agent_step_but_the_first(kind, expected):
    agent, calls = build(reset=kind, reset_every=3), []
    agent.reset = lambda number: calls.append((number, int(agent.state()["adam/critic/steps"])))
    replay = filled()
    for step in range(8):
        agent.learn(replay, step)
    assert [number for number, _ in calls] == expected
    assert [steps for _, steps in calls] == [2 * 3 * number for number in expected]  # updates before it, UTD 2


def test_a_full_reset_revives_a_diverged_agent():
    agent = trained(reset="full", reset_every=5)
    for net in agent._nets().values():
        net.flat.fill_(torch.nan)
    agent.learn(filled([4, 2]), 5)
    assert all(values.isfinite().all() for values in agent.state().values())


# -- blocks and checkpoints --------------------------------------------------------------------------------------------


def everything(seeds, obs, action, **settings) -> dict[str, torch.Tensor]:
    """Learn, act and evaluate; everything that a seed can show, seed axis first."""
    agent, replay = build(seeds, obs, action, **settings), filled(seeds, 77, obs, action)

    def simulate(indices, actions):
        return replay.rows(indices)["next_obs"] + actions.mean(-1, keepdim=True), actions[..., 0], 1.0 * (indices > 9)

    for step in range(3):
        seen = agent.learn(replay, step, simulate)
    rows = {name: values[:, :45] for name, values in replay.data.items()}  # an odd number of rows on purpose
    seen["explore"], seen["act"] = agent.explore(rows["obs"][:, 0], 5), agent.act(rows["obs"])
    seen["q"] = agent.q(rows["obs"], rows["action"])
    seen |= {name: value for name, value in agent.state().items() if value.dim()}
    return {name: value.reshape(len(seeds), -1) for name, value in seen.items()}


@pytest.mark.parametrize(
    ("obs", "action", "settings"),
    [
        (24, 6, {"width": 64, "updates_per_step": 1}),
        (67, 21, {"width": 104, "updates_per_step": 3, "model_fraction": 0.3}),
        (5, 1, {"width": 8, "model_fraction": 1.0, "model_actions": "uniform", "layer_norm_on": False}),
        (24, 6, {"width": 64, "model_free": True, "model_fraction": 0}),
        (24, 6, {"model_data": "simulator", "slow_model": False}),
        (24, 6, {"reset": "spr", "reset_every": 2, "model_actions": "replay", "model_width": 8}),
        (24, 6, {"planner": True, "plan_samples": 40, "plan_elites": 7, "updates_per_step": 1}),
    ],
    ids=["utd1", "utd3", "uniform", "model-free", "simulator", "reset", "planner"],
)
def test_a_seed_has_the_same_bits_in_every_block(obs, action, settings):
    alone = everything([0], obs, action, **settings)
    for block in ([3, 0, 1], list(range(6))):
        together = everything(block, obs, action, **settings)
        assert [k for k in alone if not torch.equal(alone[k][0], together[k][block.index(0)])] == []


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reset": "full", "reset_every": 3},
        {"reset": "spr", "reset_every": 2},
        {"model_free": True, "model_fraction": 0},
    ],
)
def test_a_restored_checkpoint_continues_with_the_same_bits(settings):
    """Also when a reset lies ahead of it, or behind."""
    seeds = [0, 2]
    straight, replay = build(seeds, **settings), filled(seeds)
    for step in range(3):
        straight.learn(replay, step)
    file = io.BytesIO()
    torch.save(straight.state(), file)
    file.seek(0)
    resumed = build(seeds, **settings)
    resumed.load(torch.load(file, weights_only=True))
    for agent in (straight, resumed):
        for step in (3, 4):
            agent.learn(replay, step)
    assert same(straight.state(), resumed.state()) == set(straight.state())
    obs = replay.data["obs"][:, 0]
    assert torch.equal(straight.explore(obs, 5), resumed.explore(obs, 5))


def test_a_checkpoint_is_a_copy():
    agent = build()
    state = agent.state()
    kept = {name: value.clone() for name, value in state.items()}
    agent.learn(filled(), 0)
    assert same(state, kept) == set(kept)


def test_divergence_stays_in_its_seed():
    replays = [filled([0, 1, 2]), filled([0, 1, 2])]
    replays[1].data["obs"][1] = torch.nan
    agents = [build([0, 1, 2]), build([0, 1, 2])]
    for agent, replay in zip(agents, replays, strict=True):
        for step in range(2):
            terms = agent.learn(replay, step)
    assert not terms["critic_loss"][1].isfinite()
    healthy, sick = ({k: v for k, v in agent.state().items() if v.dim()} for agent in agents)
    for name in healthy:
        for k in (0, 2):
            assert torch.equal(*(state[name].view(3, -1)[k] for state in (healthy, sick))), name


# -- configuration and cost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_free": True}, "model_fraction, 0.05: must be 0 with model_free"),
        ({"model_free": True, "model_fraction": 0, "planner": True}, "planner: needs a model"),
        ({"width": 24, "simnorm_group": 5}, "simnorm_group, 5: must divide width, 24"),
        ({"reset": "full", "freeze_model_after": 10}, "reset: full would leave a model that never learns"),
        ({"plan_samples": 10, "plan_elites": 12}, "plan_elites, 12: must be at most plan_samples"),
        ({"plan_std_min": 0.4}, "plan_std_min, 0.4: must be at most plan_std_max"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        MadTDConfig(**settings)


def test_labels_tell_the_arms_apart():
    arms = [
        {}, {"updates_per_step": 16}, {"model_fraction": 0}, {"model_free": True, "model_fraction": 0},
        {"model_data": "simulator"}, {"model_actions": "uniform"}, {"model_actions": "replay"}, {"reset": "full"},
        {"reset": "spr"}, {"planner": True},
    ]  # fmt: skip
    labels = [MadTDConfig(**arm).label() for arm in arms]
    assert labels[:2] == ["mad_td-utd8-alpha0.05", "mad_td-utd16-alpha0.05"]
    assert len(set(labels)) == len(arms)


@pytest.mark.parametrize(
    "settings",
    [{}, {"model_fraction": 0}, {"model_fraction": 1, "model_width": 8}, {"model_free": True, "model_fraction": 0}],
)
def test_update_flops_are_the_products_of_an_update(settings):
    """Nothing is computed for nobody, but model rows up to a multiple of 16."""
    agent, rows = build(obs=64, action=8, width=64, **settings), transitions(obs=64, action=8)
    # Gradients of kernels are added in place, which the counter does not know.
    in_place = {torch.ops.aten.baddbmm_: lambda into, a, b, **_: 2 * math.prod(a) * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        agent.update({name: values.unsqueeze(1) for name, values in rows.items()}, learn_model=False)
    config = agent.config
    assert 0.999 <= counter.get_total_flops() / config.update_flops(64, 8) < 1.05
    if not config.model_free:
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            agent.update_model(rows)
        assert 0.995 <= counter.get_total_flops() / config.model_update_flops(64, 8) < 1.005


def test_planning_flops_are_the_products_of_one_search():
    agent = build(obs=64, action=8, width=64, planner=True, plan_samples=127, plan_elites=16)
    with FlopCounterMode(display=False) as counter:
        agent.explore(torch.zeros(1, 64), 0)
    (search,) = (work for work in agent.config.learning_work(1, 64, 8) if work.rate == "rollout")
    assert 1.0 <= counter.get_total_flops() / (1e9 * search.gflop) < 1.06  # and the state's own latent and action


def test_learning_costs_updates_model_updates_simulated_rows_and_planning():
    def units(**settings):
        return {work.rate: work.units for work in MadTDConfig(**settings).learning_work(1000, 24, 6)}

    assert units() == {"mad_td": 8000, "mad_td_model": 1000}
    assert units(slow_model=False) == {"mad_td": 8000, "mad_td_model": 8000}
    assert units(freeze_model_after=300) == {"mad_td": 8000, "mad_td_model": 300}
    assert units(model_free=True, model_fraction=0) == {"mad_td": 8000}
    assert units(planner=True) == {"mad_td": 8000, "mad_td_model": 1000, "rollout": 1000}
    assert units(model_data="simulator") == {"mad_td": 8000, "mad_td_model": 1000, "simulator": 8000 * 26}


@pytest.mark.parametrize("settings", [{}, {"model_width": 64}, {"model_free": True, "model_fraction": 0}])
def test_parameters_are_those_of_the_networks(settings):
    config = MadTDConfig(**settings)
    agent = MadTD(config, 67, 21, [0])
    numbers = sum(v.numel() for k, v in agent.state().items() if "adam" not in k)
    assert numbers == pytest.approx(config.parameters(67, 21), rel=0.03)
