"""Do SAC, MAD-TD, TD-MPC2 and BRO learn? Minutes of training (slow), or half an hour (hour: run by hand).

SAC, as fast as published SAC does? Published are per-seed evaluation returns at the frame named, one update per agent
step. cartpole-swingup: the SAC baseline of DHMBPO (erl_lib, MIT licence), action repeat 2; its network and warm-up
differ from the STFL code's, which is ours apart from a shorter warm-up. cheetah-run: SAC without resets of
rl_with_resets (MIT licence), action repeat 1, the same code family and constants as STFL's. A wrong sign, a wrong mask
or a temperature that does not move leave the return near the random policy's, far below the lowest of those seeds.

MAD-TD at an eighth of its width and batch has nothing published to compare with: it must leave the random policy
behind. TD-MPC2 at an eighth of its widths must reach what DHMBPO's repository says of eight seeds of the full one; BRO
at an eighth of its critics' width what SimBa's and SimbaV2's repositories (Apache-2.0) say of BRO at UTD 2.
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


SWINGUP = [823, 763, 835, 843, 852, 850, 708, 818]  # eight seeds at 50 000 frames


@pytest.mark.hour
def test_small_td_mpc2_overlaps_with_published_runs():
    """An eighth of the widths and of the minibatch; all else as published, but for a cheaper search.

    On finger-spin this is too small: 409 to 715 after as many frames (277 to 452 after half of them), published 806 to
    973.
    """
    task, published = "cartpole-swingup", SWINGUP
    steps = 25_000
    agent = TDMPC2Config(
        width=64, encoder_width=64, latent=64, batch_size=32,
        plan_samples=64, plan_elites=16, plan_priors=8, plan_iterations=3,
    )  # fmt: skip
    protocol = OnlineConfig(steps=steps, random_steps=2500, eval_every=steps, eval_episodes=3, measure_every=steps)
    run = Online(EnvironmentConfig(task=task, action_repeat=2), agent, protocol, [0, 1, 2])
    while run.done < run.total:
        run.advance()
    returns = run.metrics.latest("eval/return")
    print(f"{task} at 50 000 frames, TD-MPC2:", np.round(returns), "published:", published)
    assert max(returns) >= min(published), returns


# Ten seeds (SimBa's repository) and five (SimbaV2's) at 25 000 frames.
BRO_SWINGUP = [668, 728, 609, 648, 546, 634, 722, 499, 634, 496, 492, 630, 601, 504, 349]
BRO_STAND = [784, 599, 214, 430, 314, 485, 238, 284, 415, 181, 240, 294, 221, 351, 478]


@pytest.mark.hour
@pytest.mark.parametrize(("task", "published"), [("cartpole-swingup", BRO_SWINGUP), ("walker-stand", BRO_STAND)])
def test_small_bro_overlaps_with_published_runs(task, published):
    """An eighth of the critics' width, half the minibatch, a third of the quantiles; the one reset as published."""
    steps = 25_000
    agent = BROConfig(critic_width=64, actor_width=64, batch_size=64, quantiles=32, updates_per_step=2)
    protocol = OnlineConfig(steps=steps, random_steps=2499, eval_every=steps, eval_episodes=3, measure_every=steps)
    run = Online(EnvironmentConfig(task=task), agent, protocol, [0, 1, 2])
    while run.done < run.total:
        run.advance()
    returns = run.metrics.latest("eval/return")
    print(f"{task} at 25 000 frames, BRO:", np.round(returns), "published:", published)
    assert max(returns) >= min(published), returns
