"""Where imagined states end an episode: the table of `ftfl` 3.3, boundaries included."""

import pytest
import torch

from dynarep.terminations import termination

NAN, INF = float("nan"), float("inf")
# task, rules, obs[0], obs[1], obs[2], whether it ends
TABLE = [
    ("Hopper-v5", "reference", 1.25, 0.0, 0.0, False),
    ("Hopper-v5", "reference", 0.7, 0.0, 0.0, True),
    ("Hopper-v5", "reference", 0.71, 0.0, 0.0, False),
    ("Hopper-v5", "reference", 1.25, 0.2, 0.0, True),
    ("Hopper-v5", "reference", 1.25, -0.2, 0.0, True),
    ("Hopper-v5", "reference", 1.25, 0.19, 0.0, False),
    ("Hopper-v5", "reference", NAN, 0.0, 0.0, True),
    ("Hopper-v5", "reference", INF, 0.0, 0.0, True),
    ("Hopper-v5", "reference", 1.25, 0.0, 100.0, True),
    ("Hopper-v5", "reference", 1.25, 0.0, -1e6, False),  # no lower bound: the misplaced parenthesis
    ("Hopper-v5", "intended", 1.25, 0.0, -1e6, True),
    ("Hopper-v5", "intended", 1.25, 0.0, -99.0, False),
    ("Hopper-v5", "intended", 0.69, 0.0, 0.0, True),
    ("Walker2d-v5", "reference", 0.8, 0.0, 0.0, True),
    ("Walker2d-v5", "reference", 0.81, 0.0, 0.0, False),
    ("Walker2d-v5", "reference", 2.0, 0.0, 0.0, True),
    ("Walker2d-v5", "reference", 1.4, 1.0, 0.0, True),
    ("Walker2d-v5", "reference", 1.4, -1.0, 0.0, True),
    ("Walker2d-v5", "reference", 1.4, -0.99, 0.0, False),
    ("Ant-v5", "reference", 0.2, 9.0, 0.0, False),
    ("Ant-v5", "reference", 1.0, 9.0, 0.0, False),
    ("Ant-v5", "reference", 0.19, 0.0, 0.0, True),
    ("Ant-v5", "reference", 1.01, 0.0, 0.0, True),
    ("Ant-v5", "reference", 0.5, 0.0, INF, True),
    ("Humanoid-v5", "reference", 0.99, 0.0, 0.0, True),
    ("Humanoid-v5", "reference", 1.0, 9.0, 0.0, False),
    ("Humanoid-v5", "reference", 2.0, 9.0, 0.0, False),
    ("Humanoid-v5", "reference", 2.01, 0.0, 0.0, True),
    ("InvertedPendulum-v5", "reference", 0.0, 3.0, 0.0, False),  # quirk Q9
    ("InvertedPendulum-v5", "intended", 0.0, 0.21, 0.0, True),
    ("InvertedPendulum-v5", "intended", 0.0, -0.21, 0.0, True),
    ("InvertedPendulum-v5", "intended", 9.0, 0.2, 0.0, False),
    ("InvertedPendulum-v5", "intended", 0.0, 0.0, NAN, True),
    *((task, "intended", -9.0, 9.0, 0.0, False) for task in ("HalfCheetah-v5", "hopper-hop", "walker-walk", "")),
]


@pytest.mark.parametrize(("task", "rules", "z", "angle", "other", "ends"), TABLE)
def test_a_state_ends_the_episode_by_the_tasks_rule(task, rules, z, angle, other, ends):
    obs = torch.tensor([[[z, angle, other]]])
    found = termination(task, rules)(obs)
    assert found.shape == (1, 1)
    assert found.dtype == torch.bool
    assert found.item() is ends


@pytest.mark.parametrize("task", ["Hopper-v5", "Walker2d-v5", "Ant-v5", "Humanoid-v5"])
def test_versions_of_a_task_share_its_rule(task):
    obs = torch.randn(2, 500, 5, generator=torch.Generator().manual_seed(0)) + 1.0
    found = [termination(task.replace("v5", version))(obs) for version in ("v5", "v4")]
    assert torch.equal(*found)
    assert found[0].any()
    assert not found[0].all()
