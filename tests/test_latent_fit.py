"""The latent-fit protocol and what it measures: right on data with a known answer, whoever runs beside it."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dynarep.agents.latents import Gaussian
from dynarep.configs import EnvironmentConfig
from dynarep.configs.alm import ALMConfig
from dynarep.configs.latent_fit import LATENT_METRICS, LatentFitConfig
from dynarep.diagnostics import aligned
from dynarep.diagnostics.critic import Episode, returns_to_go
from dynarep.envs import EnvError
from dynarep.protocols.latent_fit import LatentFit
from dynarep.streams import stream

TASK = EnvironmentConfig(suite="gymnasium", task="HalfCheetah-v5")  # its episodes have no true end
AGENT = {"width": 16, "model_width": 16, "latent": 8, "batch_size": 32, "std_initial": 0.5, "std_final": 0.5}
LENGTH = {"transitions": 160, "episode_steps": 16, "updates": 8, "measure_at": (3,)}
ARMS = {
    "R": {"reward_target": "normalised"},
    "S": {"reward_scale": True},
    "I": {"normalise_inputs": True},
    "K": {"kl_balance": 1.0},
    "D-": {"latent_target": "residual"},
    "O": {"encoder": "none"},
}


def build(seeds=(0, 1), agent=None, task=TASK, **changes) -> LatentFit:
    return LatentFit(task, ALMConfig(**AGENT | (agent or {})), LatentFitConfig(**LENGTH | changes), seeds)


def fit(*args, **kwargs) -> LatentFit:
    protocol = build(*args, **kwargs)
    while protocol.done < protocol.total:
        protocol.advance()
    return protocol


def rows(protocol: LatentFit, index: int, update: int) -> list[str]:
    return [line for line in protocol.metrics.csv(index).splitlines() if line.split(",")[2] == str(update)]


# -- numbers with a known answer ----------------------------------------------------------------------------------


def test_a_reward_fit_is_in_raw_units_and_its_error_in_training_variances():
    real, training = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 4.0])
    found = aligned.reward_fit(0.5 * real + 1.0, real, training)  # errors 1, .5, 0, -.5
    assert found["mse"] == pytest.approx(0.375)
    assert found["variance"] == pytest.approx(1.25)
    assert found["training_variance"] == pytest.approx(4.0)
    assert found["error"] == pytest.approx(0.375 / 4)
    assert found["r2"] == pytest.approx(1 - 0.375 / 1.25)
    assert found["slope"] == pytest.approx(0.5)


def test_rewards_that_never_vary_have_no_r2_and_no_error_in_variances():
    found = aligned.reward_fit(np.array([0.1, 0.2]), np.zeros(2), np.ones(3))
    assert found["mse"] == pytest.approx(0.025)
    assert all(math.isnan(found[name]) for name in ("r2", "slope", "error"))


def test_latent_r2_weighs_dimensions_by_their_variance():
    real = np.array([[-3.0, 0.1], [3.0, -0.1]])
    assert aligned.latent_r2(real, real) == 1.0
    assert aligned.latent_r2(np.zeros((2, 2)), real) == pytest.approx(0.0)
    large_right = np.array([[-3.0, 0.0], [3.0, 0.0]])
    assert aligned.latent_r2(large_right, real) == pytest.approx(1 - 0.01 / 9.01)
    assert math.isnan(aligned.latent_r2(np.ones((2, 2)), np.ones((2, 2))))


def test_a_probe_reads_what_the_latent_kept_and_says_what_it_dropped():
    generator = np.random.default_rng(0)
    s = generator.standard_normal((9000, 4)) * [1.0, 100.0, 0.01, 0.0]
    s += [0.0, 5.0, -1.0, 7.0]  # the last one is constant
    mixed = s[:, :2] @ generator.standard_normal((2, 5)) + 3.0  # knows nothing of the third
    found = aligned.probe(mixed[:5000], s[:5000], mixed[5000:], s[5000:])
    assert found["median"] == pytest.approx(1.0, abs=0.01)
    assert found["worst"] == pytest.approx(0.0, abs=0.1)
    assert found["mean"] == pytest.approx(2 / 3, abs=0.04)
    assert found["lost"] == pytest.approx(1 / 3)
    units = aligned.probe(1e3 * mixed[:5000], 1e-3 * s[:5000], 1e3 * mixed[5000:], 1e-3 * s[5000:])
    assert units["mean"] == pytest.approx(found["mean"], abs=1e-6)


def test_a_probe_is_judged_where_states_are_others_than_in_training():
    s = np.random.default_rng(2).standard_normal((600, 2))
    s[300:] += 3.0
    assert aligned.probe(2 * s[:300], s[:300], 2 * s[300:], s[300:])["worst"] == pytest.approx(1.0, abs=1e-3)


def test_a_probe_that_fits_by_heart_is_found_out():
    generator = np.random.default_rng(1)
    noise, s = generator.standard_normal((60, 40)), generator.standard_normal((60, 3))
    assert aligned.probe(noise[:50], s[:50], noise[:50], s[:50])["mean"] > 0.6
    assert aligned.probe(noise[:50], s[:50], noise[50:], s[50:])["mean"] < 0.0


class Toy:
    """z = s with deviation .1; the model says that 2 z follows, with deviation .2; rewards are -4, in units of 4."""

    def __init__(self, width=2, follows=2.0):
        self.width, self.follows = width, follows
        self.scale = torch.full((1, 1), 4.0)
        self.config = SimpleNamespace(horizon=3, classifier_weight=0.1, noise_clip=0.3, discount=0.9)

    def encode(self, obs, target=False):
        return Gaussian(obs, torch.full_like(obs, 0.1))

    def predict(self, z, action):
        return Gaussian(self.follows * z + action[..., :1] * 0, torch.full_like(z, 0.2))

    def reward(self, z, action):
        return -4.0 * torch.ones_like(z[..., 0])

    def policy(self, z):
        return torch.zeros(*z.shape[:2], 1)

    def logit_difference(self, z, action, next_z):
        return 5.0 * torch.ones_like(z[..., 0])


def draws():
    return [stream(0, "test")]


def doubling(batch=4096, width=2):
    start = torch.zeros(1, batch, width)
    obs = torch.stack([start] * 4, 1)
    return {"obs": obs, "action": torch.zeros(1, 3, batch, 1)}


def test_kl_of_a_step_is_that_of_the_rolled_out_prior_and_falls_into_its_parts():
    """From s = 0: Var z_0 = .01, and z_t+1 = 2 z_t + .2 noise; the prior's mean 2 z_t is off by as much."""
    found = aligned.rollout(Toy(), doubling(), draws(), torch.full((1,), 0.5))
    off, z = [], 0.01
    for _ in range(3):
        off.append(4 * z / (2 * 0.01))
        z = 4 * z + 0.04
    width, ratio = 2, 2.0
    assert found["kl/mean_part"].item() == pytest.approx(width * np.mean(off), rel=0.03)
    assert found["kl/sd_part"].item() == pytest.approx(width * ((ratio**2 - 1) / 2 - math.log(ratio)), rel=1e-5)
    assert found["kl/step"].item() == pytest.approx((found["kl/mean_part"] + found["kl/sd_part"]).item())
    assert found["objective/reward"].item() == pytest.approx(1.0)  # -4 in raw units
    assert found["objective/kl_to_reward"].item() == pytest.approx(0.5 * found["kl/step"].item())


def test_deviations_at_the_floor_and_means_near_their_bound_are_counted():
    sequences = doubling(64)
    sequences["obs"][..., 0] = 26.0
    found = aligned.rollout(Toy(follows=0.0), sequences, draws(), torch.ones(1))
    assert found["sd/target"].item() == pytest.approx(0.1)
    assert found["sd/prior"].item() == pytest.approx(0.2)
    assert (found["sd/target_floor"].item(), found["sd/prior_floor"].item()) == (1.0, 0.0)
    assert (found["saturated/target"].item(), found["saturated/prior"].item()) == (0.5, 0.0)


def test_the_actors_intrinsic_reward_is_compared_with_its_reward_in_the_units_it_trains_with():
    found = aligned.imagine(Toy(), Gaussian(torch.zeros(1, 32, 2), torch.ones(1, 32, 2)), draws(), 0.5)
    assert found["imagined/intrinsic"].item() == pytest.approx(0.5)
    assert found["imagined/reward_size"].item() == pytest.approx(1.0)
    assert found["imagined/intrinsic_to_reward"].item() == pytest.approx(0.5)


def test_imagined_actions_have_no_more_noise_than_in_updates():
    seen = []
    toy = Toy()
    toy.policy = lambda z: torch.full((*z.shape[:2], 1), 0.9)
    toy.predict = lambda z, action: (seen.append(action), Gaussian(z, torch.ones_like(z)))[1]
    aligned.imagine(toy, Gaussian(torch.zeros(1, 256, 2), torch.ones(1, 256, 2)), draws(), 0.5)
    actions = torch.cat(seen)
    assert len(seen) == 3
    assert actions.max() == 1.0
    assert actions.min().item() == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("judge", "expected"),
    [
        (lambda z, a, following: following[..., 0] - 5.0, 1.0),  # real ones lie at 10, the model's at 0
        (lambda z, a, following: 5.0 - following[..., 0], 0.0),
        (lambda z, a, following: torch.ones_like(z[..., 0]), 0.5),
        (lambda z, a, following: torch.full_like(z[..., 0], math.nan), math.nan),
    ],
)
def test_the_classifiers_accuracy_counts_real_and_predicted_latents_alike(judge, expected):
    toy = Toy(follows=0.0)
    toy.logit_difference = judge
    rows_ = torch.zeros(1, 64, 2)
    real = Gaussian(rows_ + 10.0, torch.full_like(rows_, 0.1))
    found = aligned.accuracy(toy, toy.encode(rows_), real, torch.zeros(1, 64, 1), draws())
    assert found["classifier/accuracy"].item() == pytest.approx(expected, nan_ok=True)


def test_gradient_shares_are_of_the_terms_norms_averaged_over_minibatches():
    norms = [
        {"kl": 6.0, "reward": 1.0, "value": 1.0, "total": 5.0},
        {"kl": 0.0, "reward": 1.0, "value": 1.0, "total": 2.0},
    ]
    found = aligned.gradients([{name: torch.tensor([x]) for name, x in own.items()} for own in norms])
    assert found == {"gradient/kl": [0.6], "gradient/reward": [0.2], "gradient/value": [0.2], "gradient/total": [3.5]}


def test_values_are_compared_with_the_random_policys_returns_with_their_tail():
    """A reward of 1 for ever is worth 1 / (1 - .9) = 10, wherever the episode was cut."""
    toy = Toy()
    toy.q = lambda obs, action: 12.0 + obs[..., 0]
    steps = np.arange(8, dtype=np.float32)
    episode = Episode(np.stack([steps, steps], 1), np.zeros((8, 1), np.float32), np.ones(8, np.float32), False)
    found = aligned.against_policy(toy, [[episode, episode]])
    assert found["q/mc_tail"] == pytest.approx([10.0])
    assert found["q/over"] == pytest.approx([2.0 + 1.5])  # of the first half, where obs is 0 .. 3
    assert returns_to_go(episode.reward, 0.9)[0] < 6.0


# -- the protocol -------------------------------------------------------------------------------------------------


def test_every_measurement_has_the_declared_metrics_and_its_time():
    protocol = fit()
    for per_seed in protocol.metrics.rows:
        for update in (3, 8):
            assert {row.metric for row in per_seed if row.update == update} == LatentFitConfig.metrics
        assert {(row.agent_step, row.frame) for row in per_seed} == {(160, 160)}
        assert all(math.isfinite(row.value) for row in per_seed)
    assert LatentFitConfig.metrics - LATENT_METRICS == {"clip/share", "diverged"}
    assert not any(protocol.metrics.latest("diverged"))


def test_whole_episodes_are_held_out_and_every_arm_meets_the_same_ones():
    protocol, arm = build(), build(agent=ARMS["I"])
    assert protocol.config.episodes() == (8, 2)
    for s in (0, 1):
        seen, held = (
            [row.tobytes() for row in replay.data["obs"][s].numpy()] for replay in (protocol.training, protocol.held)
        )
        assert (len(seen), len(held)) == (128, 32)
        assert not set(seen) & set(held)
        for episode, start in zip(protocol.episodes[s], (0, 16), strict=True):
            assert [row.tobytes() for row in episode.obs] == held[start : start + 16]
            after = protocol.held.data["next_obs"][s, start : start + 15]
            assert torch.equal(after, torch.from_numpy(episode.obs[1:]))
        assert {row.tobytes() for row in protocol.unseen["obs"][s].numpy()} == set(held)
        assert {row.tobytes() for row in protocol.seen["obs"][s].numpy()} == set(seen)
        assert torch.equal(protocol.held.data["obs"][s], arm.held.data["obs"][s])
    assert not torch.equal(protocol.held.data["obs"][0], protocol.held.data["obs"][1])


def test_a_task_whose_episodes_end_by_themselves_is_refused():
    with pytest.raises(EnvError, match=r"Hopper-v5: an episode ended before its 80 steps.*another task"):
        build(task=TASK.model_copy(update={"task": "Hopper-v5"}), transitions=160, episode_steps=80)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"transitions": 170}, "transitions, 170: must be a multiple of episode_steps, 16"),
        ({"transitions": 64, "episode_steps": 64}, "less than two episodes"),
        ({"measure_at": (9,)}, r"measure_at, 9: must be in 1\.\.updates, 8"),
        ({"measure_at": (0,)}, r"measure_at, 0: must be in 1\.\.updates, 8"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        LatentFitConfig(**LENGTH | changes)


@pytest.mark.slow
def test_measuring_less_often_changes_no_number():
    often, seldom = fit(), fit(measure_at=())
    alike = [line for line in rows(often, 1, 8) if ",clip/share," not in line]  # since the last measurement
    assert alike == [line for line in rows(seldom, 1, 8) if ",clip/share," not in line]
    for name, value in often.state()["agent"].items():
        assert torch.equal(value, seldom.state()["agent"][name]), name


@pytest.mark.parametrize("arm", [None, *(pytest.param(arm, marks=pytest.mark.slow) for arm in ARMS.values())])
def test_a_seeds_bytes_do_not_depend_on_its_block(arm):
    together, alone = fit((0, 1, 2), agent=arm), fit((1,), agent=arm)
    assert together.metrics.csv(1) == alone.metrics.csv(0)


def test_an_interrupted_fit_goes_on_to_the_same_bytes(monkeypatch):
    monkeypatch.setattr("dynarep.protocols.latent_fit.BLOCK", 2)
    whole, first = fit(), build()
    while first.done < 6:  # three updates after it was measured
        first.advance()
    second = build()
    second.load(first.state())
    second.done, second.metrics.rows = first.done, first.metrics.rows
    while second.done < second.total:
        second.advance()
    assert [second.metrics.csv(i) for i in (0, 1)] == [whole.metrics.csv(i) for i in (0, 1)]


def test_clipped_updates_are_counted_since_the_last_measurement():
    protocol = build((0,))
    norms = iter([1.0, 200.0, math.nan, 1.0, 1.0, 1.0, 1.0, 200.0])
    learn = protocol.agent.learn
    protocol.agent.learn = lambda *a: learn(*a) | {"representation_grad_norm": torch.tensor([next(norms)])}
    while protocol.done < protocol.total:
        protocol.advance()
    shares = [row.value for row in protocol.metrics.rows[0] if row.metric == "clip/share"]
    assert shares == pytest.approx([2 / 3, 1 / 5])


@pytest.mark.slow
def test_divergence_is_recorded_and_disturbs_no_other_seed():
    spoilt, whole = build(), fit()
    spoilt.agent.model.flat.data[0] = math.nan
    while spoilt.done < spoilt.total:
        spoilt.advance()
    assert spoilt.metrics.latest("diverged") == [1.0, 0.0]
    assert spoilt.metrics.csv(1) == whole.metrics.csv(1)


@pytest.mark.slow
def test_the_reward_unit_changes_raw_numbers_and_not_what_a_scaled_arm_learns():
    """Arm S divides rewards by their deviation before all else."""
    plain = fit((0,), agent=ARMS["S"])
    scaled = fit((0,), agent=ARMS["S"], task=TASK.model_copy(update={"reward_scale": 0.25}))
    value = {p: {row.metric: row.value for row in p.metrics.rows[0]} for p in (plain, scaled)}
    for metric, power in (
        ("reward/mse", 2),
        ("q/mc_tail", 1),
        ("reward/error", 0),
        ("kl/step", 0),
        ("gradient/reward", 0),
    ):
        assert value[scaled][metric] == pytest.approx(0.25**power * value[plain][metric], rel=1e-3), metric
