"""SAC against the reference implementation's arrays: actions, losses, norms and parameters of three updates.

Tolerances are those of the arrays' description. The recorded noise makes both samples of an update reproducible; it was
recovered from float32 actions, which limits log-probabilities to about 6e-6.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from dynarep.agents.sac import SAC
from dynarep.configs.sac import SACConfig
from dynarep.nets import Net

ARRAYS = np.load(Path(__file__).parent / "parity" / "mbpo_update.npz")
FIELDS = {
    "obs": "observations",
    "action": "actions",
    "reward": "rewards",
    "next_obs": "next_observations",
    "mask": "masks",
}
CRITIC = "critic/params/VmapCritic_0/MLP_0"
KINDS = ("kernel", "bias")


def parameters(when: str) -> dict[str, dict[str, np.ndarray]]:
    """Network -> slot of ours -> the reference's array, (member, ...); both heads of the actor side by side."""
    actor = {f"/{i}.{k}": ARRAYS[f"{when}/actor/params/MLP_0/Dense_{i}/{k}"][None] for i in range(2) for k in KINDS}
    for k in KINDS:
        mean, log_std = (ARRAYS[f"{when}/actor/params/Dense_{head}/{k}"] for head in range(2))
        actor[f"/2.{k}"] = np.concatenate([mean, log_std], -1)[None]
    critics = {
        name: {f"/{i}.{k}": ARRAYS[f"{when}/{prefix}{CRITIC}/Dense_{i}/{k}"] for i in range(3) for k in KINDS}
        for name, prefix in (("critic", ""), ("target", "target_"))
    }
    return {"actor": actor} | critics


def tensor(key: str) -> torch.Tensor:
    return torch.from_numpy(ARRAYS[key]).float()[None]


def networks(agent: SAC) -> dict[str, Net]:
    return {"actor": agent.actor, "critic": agent.critic, "target": agent.target}


def action_gradient_norm(agent: SAC, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over rows of the norm of the derivative of mean over the batch of (Q1 + Q2) / 2 by the action."""
    action = batch["action"].clone().requires_grad_()
    agent.values(agent.critic, batch["obs"], action, frozen=True).mean().backward()
    return action.grad.norm(dim=-1).mean()


@pytest.fixture(scope="module")
def history() -> list[dict[str, np.ndarray]]:
    """What each of the three consecutive updates computes, and the parameters after it."""
    agent = SAC(SACConfig(width=16, batch_size=32), obs_size=5, action_size=2, seeds=[0])
    for name, slots in parameters("before").items():
        for slot, values in slots.items():
            networks(agent)[name].parameter(slot)[0] = torch.from_numpy(values)
    updates = []
    for t in range(3):
        batch = {ours: tensor(f"sac{t}/batch/{theirs}") for ours, theirs in FIELDS.items()}
        noise = tensor(f"sac{t}/noise_next"), tensor(f"sac{t}/noise_actor")
        with torch.no_grad():
            next_action, next_log_prob = agent.sample(batch["next_obs"], noise[0])
            seen = {
                "next_action": next_action,
                "next_log_prob": next_log_prob,
                "actor_action": agent.sample(batch["obs"], noise[1])[0].abs().mean(),
                "q2": agent.values(agent.critic, batch["obs"], batch["action"])[:, 1].mean(),
                "critic_pnorm": agent.critic.flat.norm(),
                "actor_pnorm": agent.actor.flat.norm(),
            }
        seen |= {"critic_agnorm": action_gradient_norm(agent, batch)} | agent.update(batch, noise)
        seen["log_temperature"] = agent.temperature.log()
        seen |= {
            f"{name}{slot}": net.parameter(slot)[0] for name, net in networks(agent).items() for slot in net.slots()
        }
        updates.append({name: value.detach().numpy().copy() for name, value in seen.items()})
    return updates


def check(actual: np.ndarray, desired: np.ndarray, rtol: float = 0.0, atol: float = 0.0) -> None:
    np.testing.assert_allclose(actual, desired, rtol=rtol, atol=atol)


@pytest.mark.parametrize("t", range(3))
def test_sampled_actions_and_their_log_probabilities_match(history, t):
    check(history[t]["next_action"][0], ARRAYS[f"sac{t}/next_actions"], atol=2e-6)  # seen: 5e-7
    check(history[t]["next_log_prob"][0], ARRAYS[f"sac{t}/next_log_probs"], atol=2e-5)  # seen: 6e-6


INFO = {
    "critic_loss": "critic_loss",
    "critic_grad_norm": "critic_gnorm",
    "critic_pnorm": "critic_pnorm",
    "critic_agnorm": "critic_agnorm",
    "q1": "q1",
    "q2": "q2",
    "reward": "r",
    "actor_loss": "actor_loss",
    "actor_grad_norm": "actor_gnorm",
    "actor_pnorm": "actor_pnorm",
    "actor_action": "actor_action",
    "entropy": "entropy",
    "temperature_loss": "temp_loss",
    "temperature": "temperature",
}


@pytest.mark.parametrize("t", range(3))
@pytest.mark.parametrize("ours", INFO)
def test_losses_statistics_and_norms_match(history, t, ours):
    check(history[t][ours].squeeze(), ARRAYS[f"sac{t}/info/{INFO[ours]}"], rtol=1e-5)


def test_no_logged_scalar_is_left_out():
    assert {key.split("/")[2] for key in ARRAYS.files if key.startswith("sac0/info/")} == set(INFO.values())


@pytest.mark.parametrize("t", range(3))
@pytest.mark.parametrize(("name", "atol"), [("actor", 1e-6), ("critic", 1e-6), ("target", 5e-7)])
def test_parameters_after_each_update_match(history, t, name, atol):
    for slot, desired in parameters(f"sac{t}/after")[name].items():
        check(history[t][name + slot], desired, atol=atol)


@pytest.mark.parametrize("t", range(3))
def test_temperature_after_each_update_matches(history, t):
    check(history[t]["log_temperature"], ARRAYS[f"sac{t}/after/temp/params/log_temp"], atol=1e-6)


def test_target_entropy_is_minus_half_the_action_dimensions():
    agent = SAC(SACConfig(width=16), obs_size=5, action_size=2, seeds=[0])
    assert agent.target_entropy == ARRAYS["target_entropy"] == -1


def test_initial_kernels_are_orthogonal_with_the_references_gains():
    agent = SAC(SACConfig(width=16), obs_size=5, action_size=2, seeds=[0])
    for name, slots in parameters("before").items():
        for slot, theirs in slots.items():
            ours = networks(agent)[name].parameter(slot)[0].numpy()
            for values in (ours, theirs):
                if slot.endswith("bias"):
                    assert not values.any()
                    continue
                heads = np.split(values, 2, -1) if (name, slot) == ("actor", "/2.kernel") else [values]
                for kernels, gain in zip(heads, (2.0, 1.0), strict=False):  # squared gains
                    for kernel in kernels:
                        short = kernel.T @ kernel if kernel.shape[0] >= kernel.shape[1] else kernel @ kernel.T
                        check(short, gain * np.eye(len(short)), atol=2e-6)
