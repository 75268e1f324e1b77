"""Does SAC learn as fast as published SAC does? Marked slow: minutes of training each.

The published numbers are per-seed evaluation returns of DHMBPO's SAC baseline (one update per agent step, action repeat
2; erl_lib, MIT licence), at the frame named. Its network and warm-up differ from the STFL code's, which is ours apart
from the shorter warm-up here. A broken sign, a wrong mask or an alpha that does not move leave the return near the
random policy's, far below the lowest of those seeds.
"""

import numpy as np
import pytest

from dynarep.configs import EnvironmentConfig
from dynarep.configs.online import OnlineConfig
from dynarep.configs.sac import SACConfig
from dynarep.protocols.online import Online

FRAMES, SEEDS = 20_000, [0, 1, 2]
PUBLISHED = [266, 389, 298, 290, 185, 273, 225, 282]  # cartpole-swingup at 20 000 frames, eight seeds


@pytest.mark.slow
def test_sac_learns_cartpole_swingup_at_least_as_fast_as_published_runs():
    environment = EnvironmentConfig(task="cartpole-swingup", action_repeat=2)
    protocol = OnlineConfig(
        steps=FRAMES // 2, random_steps=1000, eval_every=FRAMES // 4, eval_episodes=3, measure_every=FRAMES // 2
    )
    run = Online(environment, SACConfig(updates_per_step=1), protocol, SEEDS)
    while run.done < run.total:
        run.advance()
    returns = run.metrics.latest("eval/return")
    print("cartpole-swingup at 20 000 frames:", np.round(returns), "published:", PUBLISHED)
    assert np.mean(returns) >= min(PUBLISHED), returns
