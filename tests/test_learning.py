"""Do SAC, MAD-TD, TD-MPC2 and BRO learn? Minutes of training (slow), or half an hour (hour: run by hand).

SAC, as fast as published SAC does? Published are per-seed evaluation returns at the frame named, one update per agent
step. cartpole-swingup: the SAC baseline of DHMBPO (erl_lib, MIT licence), action repeat 2; its network and warm-up
differ from the STFL code's, which is ours apart from a shorter warm-up. cheetah-run: SAC without resets of
rl_with_resets (MIT licence), action repeat 1, the same code family and constants as STFL's. A wrong sign, a wrong mask
or a temperature that does not move leave the return near the random policy's, far below the lowest of those seeds.

MAD-TD at an eighth of its width and batch has nothing published to compare with: it must leave the random policy
behind. TD-MPC2 and BRO at an eighth of their widths must overlap with the seeds that one repository publishes of each,
at the frames planned before anything was run: their best of three reaches its worst.
"""

import numpy as np
import pytest

from dynarep.configs import EnvironmentConfig
from dynarep.configs.bro import BROConfig
from dynarep.configs.mad_td import MadTDConfig
from dynarep.configs.online import OnlineConfig
from dynarep.configs.sac import SACConfig
from dynarep.configs.td_mpc2 import TDMPC2Config
from dynarep.protocols.online import Online

pytestmark = pytest.mark.first
SEEDS = [0, 1]
CARTPOLE = [266, 389, 298, 290, 185, 273, 225, 282]  # eight seeds at 20 000 frames
CHEETAH = [63, 95, 98, 83, 45, 115, 114, 116, 31, 56]  # ten seeds at 50 000 frames


@pytest.mark.parametrize(
    ("task", "repeat", "frames", "random_steps", "published"),
    [
        pytest.param("cartpole-swingup", 2, 20_000, 1000, CARTPOLE, marks=pytest.mark.slow),
        pytest.param("cheetah-run", 1, 50_000, 10_000, CHEETAH, marks=pytest.mark.hour),
    ],
)
def test_sac_learns_at_least_as_fast_as_the_slowest_published_run(task, repeat, frames, random_steps, published):
    environment, steps = EnvironmentConfig(task=task, action_repeat=repeat), frames // repeat
    protocol = OnlineConfig(
        steps=steps, random_steps=random_steps, eval_every=steps, eval_episodes=3, measure_every=steps
    )
    run = Online(environment, SACConfig(updates_per_step=1), protocol, SEEDS)
    while run.done < run.total:
        run.advance()
    returns = run.metrics.latest("eval/return")
    print(f"{task} at {frames} frames:", np.round(returns), "published:", published)
    assert np.mean(returns) >= min(published), returns


@pytest.mark.slow
def test_small_mad_td_learns_to_swing_the_pole_up():
    """Chosen after one look at seeds 400-402 (378, 363, 392 with exploration noise; random policies 13, 108, 49)."""
    steps = 8000
    agent = MadTDConfig(width=64, batch_size=64, updates_per_step=2, lr=1e-3, lr_encoder=3.333e-4)
    protocol = OnlineConfig(
        steps=steps, random_steps=1000, eval_every=steps, eval_episodes=3, measure_every=steps, held_out=0.05
    )
    run = Online(EnvironmentConfig(task="cartpole-swingup", action_repeat=2), agent, protocol, SEEDS)
    while run.done < run.total:
        run.advance()
    returns, random = (np.array(run.metrics.latest(name)) for name in ("eval/return", "return/random"))
    print("cartpole-swingup at 16 000 frames:", np.round(returns), "random policy:", np.round(random))
    assert (returns >= random + 100).all(), (returns, random)


# Their own repository's three seeds at 100 000 frames (MIT licence).
TD_MPC2 = {"cartpole-swingup": [790, 868, 860], "finger-spin": [986, 937, 920]}


@pytest.mark.hour
@pytest.mark.parametrize(
    "task",
    [
        "cartpole-swingup",
        pytest.param(
            "finger-spin",
            marks=pytest.mark.xfail(
                strict=True,
                reason="761 to 764 when last run; why is not known (README, deviations)",
            ),
        ),
    ],
)
def test_small_td_mpc2_overlaps_with_published_runs(task):
    """An eighth of the widths and of the minibatch; all else as published, but for a cheaper search."""
    agent = TDMPC2Config(
        width=64, encoder_width=64, latent=64, batch_size=32,
        plan_samples=64, plan_elites=16, plan_priors=8, plan_iterations=3,
    )  # fmt: skip
    protocol = OnlineConfig(steps=50_000, random_steps=2500, eval_every=12_500, eval_episodes=3, measure_every=50_000)
    _overlaps(EnvironmentConfig(task=task, action_repeat=2), agent, protocol, TD_MPC2[task])


# SimBa's repository, ten seeds at 50 000 frames (Apache-2.0).
BRO = {
    "cartpole-swingup": [836, 759, 877, 854, 835, 871, 876, 849, 857, 850],
    "walker-stand": [951, 887, 957, 968, 888, 950, 918, 871, 972, 971],
}


@pytest.mark.hour
@pytest.mark.parametrize("task", BRO)
def test_small_bro_overlaps_with_published_runs(task):
    """An eighth of the critics' width, half the minibatch, a third of the quantiles; the one reset as published."""
    agent = BROConfig(critic_width=64, actor_width=64, batch_size=64, quantiles=32, updates_per_step=2)
    protocol = OnlineConfig(steps=50_000, random_steps=2499, eval_every=12_500, eval_episodes=3, measure_every=50_000)
    _overlaps(EnvironmentConfig(task=task), agent, protocol, BRO[task])


def _overlaps(environment, agent, protocol, published):
    run, shown = Online(environment, agent, protocol, [0, 1, 2]), 0
    while run.done < run.total:
        run.advance()
        if run.done // protocol.eval_every > shown:
            shown = run.done // protocol.eval_every
            returns = run.metrics.latest("eval/return")
            frames = run.done * environment.action_repeat
            print(f"{agent.name} {environment.task} at {frames} frames:", np.round(returns), flush=True)
    assert max(returns) >= min(published), (returns, published)
