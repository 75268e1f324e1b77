"""MAD-TD's diagnostics on cases with a known answer, and on real agents where an independent computation exists."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dynarep.agents.mad_td import MadTD
from dynarep.configs.frozen import LATENT_METRICS
from dynarep.configs.mad_td import MadTDConfig
from dynarep.diagnostics import latent, sharpness
from dynarep.diagnostics.critic import Episode, overestimation, returns_to_go, tail_corrected
from dynarep.diagnostics.stability import drawdown
from dynarep.diagnostics.td import generalisation
from dynarep.streams import stream

OBS, A = 5, 3  # sizes of observation and action


def small(seeds: list[int], **switches: object) -> MadTD:
    settings = {"width": 16, "batch_size": 64, "bins": 31, "value_limit": 15.0, **switches}
    return MadTD(MadTDConfig(**settings), OBS, A, seeds)


def stirred(agent: MadTD) -> MadTD:
    """Every network moved at random, each seed by its own draws: online and target critics differ, biases are not 0."""
    nets = [agent.critic, agent.target, agent.actor]
    for net in nets if agent.config.model_free else [*nets, agent.encoder, agent.model]:
        draws = [stream(seed, "stir", net is agent.target).standard_normal(net.flat.shape[1]) for seed in agent.seeds]
        noise = torch.from_numpy(np.stack(draws).astype(np.float32))
        net.flat += 0.3 * noise.repeat_interleave(net.flat.shape[0] // len(agent.seeds), 0)
    return agent


def transitions(seeds: list[int], rows: int = 64) -> dict[str, Tensor]:
    """Random transitions, each seed's own; a fifth of the masks is 0."""
    fields: dict[str, list[np.ndarray]] = {name: [] for name in ("obs", "action", "reward", "next_obs", "mask")}
    for g in (stream(seed, "rows") for seed in seeds):
        fields["obs"].append(g.standard_normal((rows, OBS)))
        fields["action"].append(g.uniform(-1, 1, (rows, A)))
        fields["reward"].append(g.uniform(0, 2, rows))
        fields["next_obs"].append(g.standard_normal((rows, OBS)))
        fields["mask"].append((g.random(rows) < 0.8).astype(float))
    return {name: torch.from_numpy(np.stack(values).astype(np.float32)) for name, values in fields.items()}


def generators(seeds: list[int]) -> list[np.random.Generator]:
    return [stream(seed, "sharpness") for seed in seeds]


def everything(agent: MadTD) -> dict[str, Tensor]:
    """All that is measured on an agent."""
    rows, others = transitions(agent.seeds), transitions([seed + 100 for seed in agent.seeds])
    found = sharpness.sharpness(agent, rows["obs"], rows["action"], generators(agent.seeds))
    found |= latent.latent_report(agent, rows)
    return found | generalisation(agent, rows, others, {**others, "action": agent.act(others["obs"])})


# All of them


def test_a_seeds_numbers_are_the_same_bytes_in_any_block() -> None:
    block, alone = everything(stirred(small([3, 5, 8]))), everything(stirred(small([5])))
    assert set(block) == set(alone)
    for name, values in block.items():
        assert values.shape == (3,), name
        assert torch.equal(values[1], alone[name][0]), name
        if name != "latent/mean":  # always an eighth: softmaxes of groups of 8
            assert values.unique().numel() == 3, f"{name}: seeds with other networks and data have other numbers"


def test_measuring_leaves_the_agent_as_it_was() -> None:
    measured, alone = stirred(small([0, 1])), stirred(small([0, 1]))
    steps = {name: values.unsqueeze(1) for name, values in transitions([0, 1]).items()}
    for agent in (measured, alone, measured, alone):
        agent.update(steps)
        if agent is measured:
            everything(measured)
    for name, values in measured.state().items():
        assert torch.equal(values, alone.state()[name]), name


def test_what_is_measured_is_what_the_protocols_declare() -> None:
    agent, rows = small([0]), transitions([0])
    found = {f"sharp/{name}" for name in sharpness.sharpness(agent, rows["obs"], rows["action"], generators([0]))}
    assert (
        found | set(latent.latent_report(agent, rows)) | set(generalisation(agent, rows, rows, rows)) == LATENT_METRICS
    )


def test_without_a_model_there_is_no_number_of_one() -> None:
    with_model = everything(stirred(small([0, 1])))
    without = everything(stirred(small([0, 1], model_free=True, model_fraction=0.0)))
    assert set(with_model) - set(without) == {
        name for name in with_model if name.split("/")[0] in ("model", "latent", "model_reward_rms", "model_latent_ce")
    }
    assert set(without) <= set(with_model)


def test_a_diverged_seed_is_reported_as_such_and_disturbs_no_other() -> None:
    broken, whole = stirred(small([0, 1])), everything(stirred(small([0, 1])))
    for net in (broken.encoder, broken.critic, broken.target, broken.actor, broken.model):
        net.flat[: net.members] = math.nan
    found = everything(broken)
    for name, values in found.items():
        assert name in ("critic/reward", "critic/reward_std") or values[0].isnan(), name
        assert torch.equal(values[1], whole[name][1]), name


# Generalisation: a critic that says the same everywhere, a model that says nothing


def constant(values: list[float], **switches: object) -> MadTD:
    """One seed per value: online critics say it everywhere, target critics 0, model and encoder "uniform, reward 0"."""
    agent = small(list(range(len(values))), **switches)
    for net in (agent.encoder, agent.model, agent.critic, agent.target, agent.actor):
        net.flat.zero_()
    prior = agent.histogram.encode(torch.zeros(()))
    wanted = agent.histogram.encode(torch.tensor(values)).clamp(min=1e-30).log() - agent.config.zero_prior * prior
    agent.critic.parameter("/2.bias").copy_(wanted.unsqueeze(1))
    return agent


def rewards(*values: float, mask: Tensor | None = None, rows: int = 64) -> dict[str, Tensor]:
    """Each seed's rows with one reward; targets are that reward, as the target critics of `constant` say 0."""
    obs = torch.ones(len(values), rows, OBS)
    return {
        "obs": obs,
        "next_obs": obs,
        "action": torch.zeros(len(values), rows, A),
        "reward": torch.tensor(values).unsqueeze(1).repeat(1, rows),
        "mask": torch.ones(len(values), rows) if mask is None else mask,
    }


def test_a_perfect_critic_has_no_error_and_one_that_is_off_by_one_has_error_one() -> None:
    found = generalisation(constant([2.0, 3.0]), rewards(2.0, 2.0), rewards(2.0, 2.0), rewards(2.0, 1.0))
    for rows in ("train", "validation"):
        assert found[f"td_rms/{rows}"].tolist() == pytest.approx([0, 1], abs=1e-4)
        assert found[f"td_l2/{rows}"].tolist() == pytest.approx([0, 2], abs=1e-4)
    assert found["td_rms/on_policy"].tolist() == pytest.approx([0, 2], abs=1e-4)
    assert found["td_rms/on_over_validation"][1].item() == pytest.approx(2, rel=1e-4)
    for rows in ("train", "validation", "on_policy"):
        assert found[f"q/{rows}"].tolist() == pytest.approx([2, 3], abs=1e-4)


def test_the_cross_entropy_of_a_perfect_critic_is_the_entropy_of_its_targets() -> None:
    agent = constant([2.0, 3.0])
    p = agent.histogram.encode(torch.tensor([2.0, 3.0])).double()
    cross = [-(p[0] * p[k].clamp(min=1e-30).log()).mean().item() for k in (0, 1)]
    found = generalisation(agent, rewards(2.0, 2.0), rewards(2.0, 2.0), rewards(2.0, 2.0))
    assert found["td_ce/validation"].tolist() == pytest.approx([2 * cross[0], 2 * cross[1]], rel=1e-4)


def test_masked_rows_do_not_count() -> None:
    mask = torch.ones(1, 64)
    mask[0, ::4] = 0.0
    wild = rewards(1.0, mask=mask)
    wild["reward"][0, ::4] = 1000.0
    found = generalisation(constant([2.0]), wild, wild, rewards(2.0, mask=mask))
    assert found["td_rms/validation"].item() == pytest.approx(1, abs=1e-4)
    assert found["td_l2/validation"].item() == pytest.approx(2 * 0.75, abs=1e-4), "the reference's divides by all rows"
    assert found["model_reward_rms/validation"].item() == pytest.approx(1, abs=1e-4)
    assert found["model_latent_ce/validation"].item() == pytest.approx(math.log(8) / 8, rel=1e-5)


def test_the_models_errors_are_those_of_rewards_and_latents() -> None:
    agent = constant([0.0, 0.0])
    agent.model.parameter("reward/2.bias")[1] = 3.0
    found = generalisation(agent, rewards(0.0, 0.0), rewards(2.0, 2.0), rewards(-1.0, -1.0))
    assert found["model_reward_rms/validation"].tolist() == pytest.approx([2, 1], rel=1e-5)
    assert found["model_reward_rms/on_policy"].tolist() == pytest.approx([1, 4], rel=1e-5)
    assert found["model_reward_rms/on_over_validation"].tolist() == pytest.approx([0.5, 4], rel=1e-5)
    # All groups of 8 uniform: per group the entropy log 8, per entry an eighth of it.
    assert found["model_latent_ce/on_policy"].tolist() == pytest.approx([math.log(8) / 8] * 2, rel=1e-5)


def test_on_unmasked_rows_the_latent_cross_entropy_is_the_loss_that_is_trained() -> None:
    agent, rows = stirred(small([0, 1])), transitions([0, 1])
    rows["mask"][:] = 1.0
    found = generalisation(agent, rows, rows, rows)
    trained = agent.update_model(rows)
    assert found["model_latent_ce/validation"].tolist() == pytest.approx(trained["model_loss"].tolist(), rel=1e-6)
    rms = trained["reward_loss"].sqrt().tolist()
    assert found["model_reward_rms/validation"].tolist() == pytest.approx(rms, rel=1e-6)


# Over-estimation


def episode(reward: np.ndarray, terminated: bool = False) -> Episode:
    return Episode(np.zeros((len(reward), 1)), np.zeros((len(reward), 1)), reward, terminated)


@pytest.mark.parametrize("length", [1, 20, 300])
def test_the_corrected_return_of_a_constant_reward_is_the_value_of_an_endless_chain(length: int) -> None:
    np.testing.assert_allclose(
        tail_corrected(np.full(length, 0.7, np.float32), 0.99), float(np.float32(0.7)) * 100, rtol=1e-12
    )


def test_the_tail_goes_on_with_the_mean_of_the_last_fifty_rewards() -> None:
    reward = np.concatenate([np.full(100, 9.0), np.linspace(0, 2, 50)])
    tail = 0.9 ** (150 - np.arange(150)) * 1.0 / (1 - 0.9)
    np.testing.assert_allclose(tail_corrected(reward, 0.9), returns_to_go(reward, 0.9) + tail, rtol=1e-12)
    assert tail_corrected(np.empty(0), 0.9).shape == (0,)


def test_a_critic_off_by_a_constant_is_over_by_it() -> None:
    chain = [episode(np.full(100, 2.0)), episode(np.full(60, 2.0))]  # worth 2 / (1 - .9) = 20 everywhere
    for off in (0.0, 3.0, -3.0):
        found = overestimation(chain, np.full(160, 20.0 + off), 0.9, ceiling=40.0)
        want = {"mc_tail": 20.0, "over": off, "over_abs": abs(off), "q_over_mc": 1 + off / 20}
        assert found == pytest.approx({**want, "q_over_ceiling": (20 + off) / 40}, abs=1e-9)
    swinging = 20.0 + 3.0 * np.where(np.arange(160) % 2, 1, -1)
    found = overestimation(chain, swinging, 0.9, ceiling=40.0)
    assert found["over"] == pytest.approx(0, abs=1e-9)
    assert found["over_abs"] == pytest.approx(3)


@pytest.mark.parametrize(("length", "counted"), [(10, 5), (9, 5), (1, 1)])
def test_only_the_first_half_of_an_episode_counts(length: int, counted: int) -> None:
    chain, right = [episode(np.ones(length)), episode(np.ones(4))], np.full(length + 4, 2.0)
    for t in range(length):
        wrong = right.copy()
        wrong[t] += 1.0
        found = overestimation(chain, wrong, 0.5, 4.0)
        assert found["over"] == pytest.approx(1 / (counted + 2) if t < counted else 0, abs=1e-12), t


def test_an_episode_that_truly_ended_has_no_tail_and_counts_as_a_whole() -> None:
    reward = np.array([1.0, 2.0, 4.0])
    found = overestimation([episode(reward, terminated=True)], np.array([3.0, 4.0, 4.0]), 0.5, 100.0)
    assert found["mc_tail"] == pytest.approx(11 / 3)
    assert found["over_abs"] == pytest.approx(0)
    cut = overestimation([episode(reward)], np.array([3.0, 4.0, 4.0]), 0.5, 100.0)
    tail = 7 / 3 / 0.5  # worth at the end; two of three states count
    assert cut["mc_tail"] == pytest.approx((3 + tail / 8 + 4 + tail / 4) / 2)


def test_where_there_is_nothing_to_compare_with_there_is_no_number() -> None:
    assert all(math.isnan(value) for value in overestimation([], np.empty(0), 0.9, 10.0).values())
    found = overestimation([episode(np.zeros(8))], np.ones(8), 0.9, math.inf)
    assert math.isnan(found["q_over_mc"])
    assert math.isnan(found["q_over_ceiling"])
    wild = np.array([math.inf, -math.inf, math.nan, 0.0, 1.0, 1.0, 1.0, 1.0])
    assert math.isnan(overestimation([episode(np.ones(8))], wild, 0.9, 10.0)["over"])


# Draw-downs


def test_draw_downs_of_curves_made_by_hand() -> None:
    assert drawdown([1, 2, 3, 5, 8]) == (0, 0)
    assert drawdown([1, 2, 1, 2], window=1) == pytest.approx((0.125, 0.5))
    # means of three: 3, 3, 2, 0 against a best of 3
    assert drawdown([0, 3, 6, 0, 0, 0]) == pytest.approx(((0 + 0 + 1 / 3 + 1) / 4, 1))
    # one bad evaluation of 10 in 100s is a fall to 70
    assert drawdown([100, 100, 100, 10, 100, 100, 100]) == pytest.approx(((0 + 3 * 0.3 + 0) / 5, 0.3))


def test_falls_are_relative_to_the_best_so_far_not_to_the_best_of_all() -> None:
    assert drawdown([4, 2, 8, 6], window=1) == pytest.approx(((0 + 1 / 2 + 0 + 1 / 4) / 4, 1 / 2))


def test_a_best_that_is_not_positive_has_no_relative_fall() -> None:
    assert drawdown([0, 0, 4, 2], window=1) == pytest.approx(((0 + 1 / 2) / 2, 1 / 2))
    assert all(math.isnan(value) for value in drawdown([-3, -2, -5], window=1))


def test_a_short_or_a_diverged_curve_has_no_draw_down() -> None:
    for curve in ([], [1.0, 2.0], [5.0, 4.0, 3.0, math.nan]):
        assert all(math.isnan(value) for value in drawdown(curve))


# Sharpness of critics that are written down


@dataclass
class Written:
    """An agent whose Q1 is a formula q(z, a) -> (S, B); Q2 is far below it, so that a minimum would be seen."""

    formula: object
    chosen: float = 0.0  # the policy's action, in every dimension
    size: int = A
    critic: None = None

    def encode(self, obs: Tensor) -> Tensor:
        return obs

    def policy(self, z: Tensor) -> Tensor:
        return torch.full((*z.shape[:2], self.size), self.chosen)

    def values(self, critic: None, z: Tensor, a: Tensor, frozen: bool = False) -> Tensor:
        assert critic is self.critic
        assert frozen
        q = self.formula(z, a)
        return torch.stack([q, 7.0 * q - 1000.0], 1)


def measure(agent: Written, action: float = 0.0, seeds: int = 2, rows: int = 64, z: Tensor | None = None) -> dict:
    obs = torch.zeros(seeds, rows, OBS) if z is None else z
    stored = torch.full((*obs.shape[:2], agent.size), action)
    return sharpness.sharpness(agent, obs, stored, generators(list(range(seeds))))


SLOPES = torch.tensor([[1.0, -2.0, 0.5], [-3.0, 0.0, 4.0]])  # of two seeds
TOTAL = SLOPES.abs().sum(1)


def linear(z: Tensor, a: Tensor) -> Tensor:
    return 10.0 + (a * SLOPES[:, None]).sum(-1)


def test_every_metric_is_told_for_both_kinds_of_action() -> None:
    metrics = {"gradient", "curvature", "ascent", "ascent_0.01", "ascent_0.05", "ascent_0.1", "descent", "random"}
    assert set(measure(Written(linear))) == {
        f"{metric}/{place}" for metric in metrics | {"random_relative"} for place in ("policy", "buffer")
    }


def test_a_plane_has_its_gradient_and_no_curvature() -> None:
    found = measure(Written(linear), action=0.5)
    for place in ("policy", "buffer"):
        assert found[f"gradient/{place}"].tolist() == pytest.approx(SLOPES.norm(dim=1).tolist(), rel=1e-5)
        assert found[f"curvature/{place}"].tolist() == pytest.approx([0, 0], abs=1e-4)


def test_the_gradient_is_that_of_slightly_moved_actions() -> None:
    """On Q = 50 a1^2 it is 100 |0.01 n| at the peak, so sqrt(2 / pi) in the mean."""
    found = measure(Written(lambda z, a: 50.0 * a[..., 0].square()), rows=256)
    assert found["gradient/policy"].tolist() == pytest.approx([math.sqrt(2 / math.pi)] * 2, rel=0.04)


def test_the_curvature_is_the_largest_eigenvalue_by_size() -> None:
    basis = torch.linalg.qr(torch.from_numpy(stream(0, "basis").standard_normal((2, A, A)))).Q
    matrix = (basis @ torch.diag_embed(torch.tensor([[3.0, -5.0, 1.0], [4.0, 2.0, -1.0]])).double() @ basis.mT).float()

    def quadratic(z: Tensor, a: Tensor) -> Tensor:
        return -0.5 * torch.einsum("sbi,sij,sbj->sb", a, matrix, a) + linear(z, a)

    found = measure(Written(quadratic, chosen=0.3), action=-0.6)
    assert found["curvature/policy"].tolist() == pytest.approx([5, 4], rel=1e-3)
    assert found["curvature/buffer"].tolist() == pytest.approx([5, 4], rel=1e-3)
    ahead = (SLOPES + 0.6 * matrix.sum(2)).norm(dim=1)  # b - H a at the stored action, up to the moves of 0.01
    assert found["gradient/buffer"].tolist() == pytest.approx(ahead.tolist(), rel=0.01)


def test_the_released_ascent_travels_up_to_one_and_heeds_no_box() -> None:
    found = measure(Written(linear, chosen=0.9), action=-0.9)
    for place in ("policy", "buffer"):
        assert found[f"ascent/{place}"].tolist() == pytest.approx((TOTAL * 1.0).square().tolist(), rel=1e-4)


def test_projected_ascent_stops_at_the_ball_and_at_the_box() -> None:
    one, up = Written(lambda z, a: 4.0 * a.sum(-1), size=1, chosen=0.97), measure(Written(linear))
    for e in (0.01, 0.05, 0.1):
        assert up[f"ascent_{e:g}/buffer"].tolist() == pytest.approx((TOTAL * e).tolist(), rel=1e-3)
        edge = measure(one, action=-1.0)
        assert edge[f"ascent_{e:g}/policy"][0].item() == pytest.approx(4 * min(e, 0.03), rel=1e-3)
        assert edge[f"ascent_{e:g}/buffer"][0].item() == pytest.approx(4 * e, rel=1e-3)
    away = measure(Written(lambda z, a: -4.0 * a.sum(-1), size=1, chosen=0.97), action=-1.0)
    assert away["ascent_0.1/buffer"].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert away["ascent_0.1/policy"].tolist() == pytest.approx([0.4, 0.4], rel=1e-3)


def test_descent_falls_by_a_fifth_of_the_slope_unless_the_box_is_in_the_way() -> None:
    found = measure(Written(linear))
    assert found["descent/policy"].tolist() == pytest.approx((0.2 * TOTAL).tolist(), rel=1e-4)
    edge = measure(Written(lambda z, a: 4.0 * a.sum(-1), size=1, chosen=-0.95), action=-1.0)
    assert edge["descent/policy"].tolist() == pytest.approx([0.2, 0.2], rel=1e-3)
    assert edge["descent/buffer"].tolist() == pytest.approx([0, 0], abs=1e-6)


def test_on_top_of_a_peak_there_is_nothing_to_ascend_to_but_a_fall_below() -> None:
    """Q = -8 (a - .004)^2 with the policy at 0: the actor has all but arrived. Why descent is measured at all."""
    found = measure(Written(lambda z, a: -8.0 * (a - 0.004).square().sum(-1), size=1))
    assert found["ascent_0.1/policy"].abs().max() < 2e-3
    assert found["descent/policy"].tolist() == pytest.approx([8 * (0.204**2 - 0.004**2)] * 2, rel=1e-3)


def test_random_perturbations_have_a_deviation_of_a_third_and_stay_in_the_box() -> None:
    agent = Written(lambda z, a: 10.0 + 2.0 * a.sum(-1), size=1)
    found = measure(agent, action=1.0, seeds=16, rows=256)
    mean = 2 * 0.3 * math.sqrt(2 / math.pi)
    assert found["random/policy"].mean().item() == pytest.approx(mean, rel=0.03)
    assert found["random/buffer"].mean().item() == pytest.approx(mean / 2, rel=0.03), "half of them stay where they are"
    assert found["random_relative/policy"].tolist() == pytest.approx((found["random/policy"] / 10).tolist())
    assert found["random_relative/buffer"].tolist() == pytest.approx((found["random/buffer"] / 12).tolist())


def test_all_states_count_but_for_the_curvature_of_which_there_are_128() -> None:
    z = torch.ones(1, 320, OBS)
    z[:, 128:] = 3.0
    agent = Written(lambda z, a: 10.0 * z[..., 0] + 2.0 * z[..., 0] * (a.sum(-1) + a[..., 0].square()))
    found = measure(agent, seeds=1, z=z)
    share = (128 * 1 + 192 * 3) / 320
    assert found["descent/policy"].item() == pytest.approx((0.4 * 3 - 2 * 0.04) * share, rel=1e-3)
    assert found["random_relative/policy"].item() == pytest.approx(
        found["random/policy"].item() / (10 * share), rel=1e-5
    )
    assert found["curvature/policy"].item() == pytest.approx(4, rel=1e-3)


# Sharpness of a real critic


def plain_q1(agent: MadTD, seed: int, z: Tensor, action: Tensor) -> Tensor:
    """Q1 of one latent and action, in float64 and in operations that can be differentiated twice."""
    h = torch.cat([z, action])
    for i in range(3):
        p = {kind: agent.critic.parameter(f"/{i}.{kind}")[seed, 0].double() for kind in ("kernel", "bias")}
        h = h @ p["kernel"] + p["bias"]
        if i < 2:
            h = F.mish(F.layer_norm(h, h.shape, eps=agent.config.layer_norm))
    prior = agent.config.zero_prior * agent.histogram.encode(torch.zeros(()))
    return (F.softmax(h + prior.double(), -1) * agent.histogram.centres.double()).sum()


@pytest.mark.parametrize("trained", [False, True])
def test_a_real_critics_curvature_is_that_of_two_exact_derivatives(trained: bool) -> None:
    agent, rows = small([0, 1], bins=151, value_limit=300.0, lr=1e-2), transitions([0, 1], 32)
    with torch.no_grad():
        z = agent.encode(rows["obs"])
    if trained:  # to wild targets: a rough critic, of large values
        y = 100.0 * (rows["obs"][..., 0] * rows["action"][..., 0]).sign()
        for _ in range(100):
            agent.cross_entropy(y, agent.q_log(agent.critic, z, rows["action"]), rows["mask"]).sum().backward()
            agent._optimisers["critic"].step()
    for net, kind in ((agent.critic, kind) for kind in ("/0.scale", "/1.scale", "/0.shift", "/1.shift")):
        net.parameter(kind).fill_(float(kind.endswith("scale")))  # left out of `plain_q1`
    found = sharpness.curvature(agent, z, rows["action"])
    for s in (0, 1):
        for b in range(8):
            latent_row = z[s, b].double()
            hessian = torch.autograd.functional.hessian(
                lambda a, s=s, zb=latent_row: plain_q1(agent, s, zb, a), rows["action"][s, b].double()
            )
            exact = torch.linalg.eigvalsh(hessian).abs().max().item()
            assert found[s, b].item() == pytest.approx(exact, rel=1e-3, abs=1e-4)
    assert not trained or found.median() > 50


# Latent space and losses


def test_correlation_is_pearsons_and_is_none_where_nothing_varies() -> None:
    x = torch.from_numpy(stream(0, "x").standard_normal((1, 64)).astype(np.float32)).repeat(4, 1)
    sign = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)
    pairs = x.clone()
    pairs[2] = x[2].view(32, 2).mean(1).repeat_interleave(2)  # equal in pairs, against alternating signs: no relation
    y = torch.stack([3 * x[0] + 1, -0.1 * x[1], sign, torch.full((64,), 0.1)])
    found = latent.correlation(pairs, y)
    assert found[:3].tolist() == pytest.approx([1, -1, 0], abs=1e-6)
    assert found[3].isnan()
    assert latent.correlation(y, pairs)[3].isnan()
    a, b = stream(1, "a").standard_normal((2, 64)).astype(np.float32)
    ours = latent.correlation(torch.from_numpy(a)[None], torch.from_numpy(b)[None]).item()
    assert ours == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)


def test_uniform_latents_have_the_entropy_of_their_groups_and_no_spread() -> None:
    found = latent.latent_report(constant([0.0, 2.0]), transitions([0, 1]))
    assert found["latent/entropy"].tolist() == pytest.approx([math.log(8)] * 2, rel=1e-6)
    assert found["latent/mean"].tolist() == pytest.approx([1 / 8] * 2, rel=1e-6)
    assert found["latent/std"].tolist() == pytest.approx([0, 0], abs=1e-7)
    assert found["critic/q1"].tolist() == pytest.approx([0, 2], abs=1e-4)
    assert found["critic/q2_std"].tolist() == pytest.approx([0, 0], abs=1e-5)
    assert found["ood_correlation"].isnan().all(), "values that do not vary have no correlation"


@pytest.mark.parametrize("switch", [{}, {"value_aware_loss": False}, {"critic_shapes_encoder": False}])
def test_the_losses_are_those_that_are_trained(switch: dict[str, bool]) -> None:
    agent, rows = stirred(small([0, 1], **switch)), transitions([0, 1])
    found = latent.latent_report(agent, rows)
    terms = agent.update_model(rows)
    assert ("vaml_loss" in terms, "model_critic_loss" in terms) == (
        "value_aware_loss" not in switch,
        "critic_shapes_encoder" not in switch,
    )
    for name, term in terms.items():
        assert found[f"model/{name}"].tolist() == pytest.approx(term.tolist(), rel=1e-6), name


def test_the_critics_are_judged_on_the_mixed_batch() -> None:
    rows = transitions([0, 1])
    mixed, stored = stirred(small([0, 1], model_fraction=0.5)), stirred(small([0, 1], model_fraction=0.0))
    of_mixed, of_stored = latent.critic_statistics(mixed, rows), latent.critic_statistics(stored, rows)
    with torch.no_grad():
        z, next_z = mixed.encode(rows["obs"]), mixed.encode(rows["next_obs"])
    loss = mixed.update_critic(z, next_z, rows)
    assert of_mixed["critic/critic_loss"].tolist() == pytest.approx(loss.tolist(), rel=1e-6)
    changed = {name for name, values in of_mixed.items() if not torch.equal(values, of_stored[name])}
    assert changed == set(of_mixed) - {"critic/reward", "critic/reward_std", "ood_correlation"}


@pytest.mark.parametrize("arm", [{"model_data": "simulator"}, {"model_actions": "uniform"}])
def test_arms_whose_model_rows_come_from_elsewhere_are_judged_on_stored_rows(arm: dict[str, str]) -> None:
    rows = transitions([0, 1])
    found = latent.critic_statistics(stirred(small([0, 1], model_fraction=0.5, **arm)), rows)
    for name, values in latent.critic_statistics(stirred(small([0, 1], model_fraction=0.0)), rows).items():
        assert torch.equal(values, found[name]), name


def test_a_batch_of_another_size_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match="96 rows: must have the agent's batch_size, 64"):
        latent.latent_report(small([0]), transitions([0], 96))
    latent.latent_report(small([0], model_fraction=0.0), transitions([0], 96))
