"""BRO against the reference implementation's arrays: targets, losses, gradients and parameters of three updates.

Tolerances are those of the arrays' description: "seen" there is what a correct float32 implementation is off by.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from dynarep.agents.bro import BRO
from dynarep.agents.squashed import LOG_STD_MIDDLE, LOG_STD_SLOPE, choose
from dynarep.configs.bro import BROConfig
from dynarep.nets import Net
from dynarep.optimisers import Adam, Scalar

ARRAYS = np.load(Path(__file__).parent / "parity" / "bro_update.npz")
CONFIG = {key.removeprefix("config/"): float(ARRAYS[key]) for key in ARRAYS.files if key.startswith("config/")}
FIELDS = {
    "obs": "observations",
    "action": "actions",
    "reward": "rewards",
    "next_obs": "next_observations",
    "mask": "masks",
}
TRAINED = {"critic": "critic", "actor": "actor", "optimist": "actor_o"}  # ours -> the reference's name
NETS = TRAINED | {"target": "target_critic"}
SCALARS = {"temperature": "temp/log_temp", "optimism": "optimism/log_value", "kl_weight": "regularizer/log_value"}
LAYER = {
    "kernel": "Dense_{}/kernel",
    "bias": "Dense_{}/bias",
    "scale": "LayerNorm_{}/scale",
    "shift": "LayerNorm_{}/bias",
}


def bronet(prefix: str, blocks: int) -> dict[str, np.ndarray]:
    """Slot of ours -> the reference's array, without the output layer."""
    layers = range(1 + 2 * blocks)
    return {f"/{i}.{k}": ARRAYS[f"{prefix}/BroNet_0/{name.format(i)}"] for i in layers for k, name in LAYER.items()}


def parameters(when: str, net: str) -> dict[str, np.ndarray]:
    """Slot of ours -> the reference's array, (member, ...); both heads of the actor side by side."""
    prefix = f"{when}/{NETS[net]}"
    if net in ("critic", "target"):
        members = [f"{prefix}/Critic_{e}" for e in range(2)]
        each = [
            bronet(m, 2) | {f"/5.{k}": ARRAYS[f"{m}/BroNet_0/Dense_5/{k}"] for k in ("kernel", "bias")} for m in members
        ]
        return {slot: np.stack([own[slot] for own in each]) for slot in each[0]}
    heads = ["Dense_0"] if net == "optimist" else ["Dense_0", "Dense_1"]
    kinds = ["kernel"] if net == "optimist" else ["kernel", "bias"]
    slots = bronet(prefix, 1)
    slots |= {f"/3.{k}": np.concatenate([ARRAYS[f"{prefix}/{head}/{k}"] for head in heads], -1) for k in kinds}
    return {slot: values[None] for slot, values in slots.items()}


def tensor(key: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(ARRAYS[key])).float()[None]


def make(when: str = "before") -> BRO:
    """Return an agent of the arrays' sizes, with the defaults for all else, and their parameters."""
    sizes = {"critic_width": "critic_hidden", "actor_width": "actor_hidden", "quantiles": "n_quantiles"}
    config = BROConfig(batch_size=int(CONFIG["batch_size"]), **{k: int(CONFIG[name]) for k, name in sizes.items()})
    agent = BRO(config, int(CONFIG["obs_dim"]), int(CONFIG["action_dim"]), [0])
    for net in NETS:
        for slot, values in parameters(when, net).items():
            getattr(agent, net).parameter(slot)[0] = torch.from_numpy(values)
    for name, key in SCALARS.items():
        agent._scalars[name].flat.fill_(float(ARRAYS[f"{when}/{key}"]))
    return agent


def slots(net: Net, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parameter matrix or gradient matrix -> what is in it."""
    like = net.target()
    like.flat.copy_(flat)
    return {slot: like.parameter(slot)[0] for slot in net.slots()}


@pytest.fixture(scope="module")
def history() -> list[dict[str, np.ndarray]]:
    """What each of the three consecutive updates computes, its gradients, and the parameters after it."""
    torch.set_num_threads(1)
    agent, updates = make(), []
    for t in range(3):
        batch = {ours: tensor(f"batch{t}/{theirs}") for ours, theirs in FIELDS.items()}
        noise = [tensor(f"noise{t}/{kind}") for kind in ("next", "actor", "optimistic")]
        with torch.no_grad():
            ahead = choose(agent.actor(batch["next_obs"]), noise[0])
            q = agent.target((batch["next_obs"], ahead.action))
            seen = {"next_actions": ahead.action, "next_log_probs": ahead.log_prob}
            seen |= {"next_q1": q[:, 0], "next_q2": q[:, 1], "std": agent.policy(batch["obs"])[1].mean()}
            seen |= {f"{name}_pnorm": getattr(agent, name).flat.norm() for name in TRAINED}
        gradients: dict[str, torch.Tensor] = {}
        with pytest.MonkeyPatch.context() as patch:
            step = Adam.step

            def keeping(self: Adam, step=step, gradients=gradients) -> None:
                part = next(name for name, own in agent._optimisers.items() if own is self)
                gradients[part] = self.net.flat.grad.clone()
                step(self)

            patch.setattr(Adam, "step", keeping)
            seen |= agent.update(batch, noise)
        with torch.no_grad():
            mean, std = agent.policy(batch["obs"])[1], agent.optimistic_policy(batch["obs"])[1]
            seen |= {"std_c": mean.mean(), "std_o": std.mean()}
        seen |= {
            f"grad/{name}{slot}": g
            for name in TRAINED
            for slot, g in slots(getattr(agent, name), gradients[name]).items()
        }
        seen |= {
            f"{name}{slot}": p
            for name in NETS
            for slot, p in slots(getattr(agent, name), getattr(agent, name).flat).items()
        }
        seen |= {f"raw/{name}": part.flat[0, 0] for name, part in agent._scalars.items()}
        seen["grad/temperature"] = gradients["temperature"][0, 0]
        updates.append({name: value.detach().numpy().copy() for name, value in seen.items()})
    return updates


def check(
    actual: np.ndarray, desired: np.ndarray, tolerance: float, relative: float | None = None, of: str = ""
) -> None:
    relative = tolerance if relative is None else relative
    np.testing.assert_allclose(actual, desired, rtol=relative, atol=tolerance, err_msg=of)


@pytest.mark.parametrize("t", range(3))
def test_what_enters_the_critics_target_matches(history, t):
    for key in ("next_actions", "next_log_probs", "next_q1", "next_q2"):
        check(history[t][key][0], ARRAYS[f"target{t}/{key}"], 1e-5, of=key)


INFO = {
    "critic_loss": "critic_loss",
    "actor_loss": "actor_loss",
    "optimist_loss": "actor_o_loss",
    "temperature_loss": "temp_loss",
    "optimism_loss": "optimism_loss",
    "kl_weight_loss": "regularizer_loss",
    "q1": "q1",
    "q2": "q2",
    **{f"{ours}_grad_norm": f"{theirs}_gnorm" for ours, theirs in TRAINED.items()},
    **{f"{ours}_pnorm": f"{theirs}_pnorm" for ours, theirs in TRAINED.items()},
    "entropy": "entropy",
    "optimist_kl": "kl",
    "std": "std",
    "std_c": "std_c",
    "std_o": "std_o",
    "optimist_q": "Q_mean",
    "disagreement": "Q_std",
    "temperature": "temperature",
    "optimism": "optimism",
    "kl_weight": "kl_weight",
    "reward": "r",
}


@pytest.mark.parametrize("t", range(3))
def test_losses_statistics_and_norms_match(history, t):
    for ours, theirs in INFO.items():
        check(history[t][ours].squeeze(), ARRAYS[f"info{t}/{theirs}"], 1e-5, of=ours)


def test_no_logged_scalar_is_left_out():
    assert {key.split("/")[1] for key in ARRAYS.files if key.startswith("info0/")} == set(INFO.values())


def test_gradients_of_the_first_update_match(history):
    for net in TRAINED:
        for slot, desired in parameters("grad0", net).items():
            check(history[0][f"grad/{net}{slot}"], desired, 5e-6, of=net + slot)
    check(history[0]["grad/temperature"], ARRAYS["grad0/temp/log_temp"], 5e-6)


@pytest.mark.parametrize("t", range(3))
@pytest.mark.parametrize(
    ("net", "tolerance"), [("critic", 1e-6), ("actor", 1e-6), ("optimist", 1e-6), ("target", 5e-7)]
)
def test_parameters_after_each_update_match(history, t, net, tolerance):
    for slot, desired in parameters(f"after{t}", net).items():
        check(history[t][net + slot], desired, tolerance, 0.0, of=slot)


@pytest.mark.parametrize("t", range(3))
def test_temperature_optimism_and_kl_weight_after_each_update_match(history, t):
    for name, key in SCALARS.items():
        check(history[t][f"raw/{name}"], ARRAYS[f"after{t}/{key}"], 1e-6, 0.0, of=name)


def test_numbers_start_where_the_references_do():
    agent = BRO(BROConfig(critic_width=8, actor_width=8), 6, 2, [0])
    for name, key in SCALARS.items():
        assert agent._scalars[name].flat[0, 0].item() == pytest.approx(float(ARRAYS[f"init/{key}"]), abs=1e-6)
    assert agent.adjustment("optimism").item() == pytest.approx(1.0, rel=1e-5)
    assert agent.adjustment("kl_weight").item() == pytest.approx(0.25, rel=1e-5)


def test_both_policies_and_both_critics_match():
    agent, obs, action = make("after2"), tensor("forward/observations"), tensor("forward/actions")
    with torch.no_grad():
        ours = [*agent.policy(obs), *agent.optimistic_policy(obs), *agent.critic((obs, action)).unbind(1)]
    names = ("actor_mean", "actor_std", "optimistic_mean", "optimistic_std", "q1", "q2")
    for name, values in zip(names, ours, strict=True):
        check(values[0].numpy(), ARRAYS[f"forward/{name}"], 3e-6, of=name)


def test_squashed_gaussian_matches_where_it_is_saturated_too():
    mean, std, noise = (tensor(f"tanh_gaussian/{name}") for name in ("mean", "std", "noise"))
    raw = torch.atanh((std.double().log() - LOG_STD_MIDDLE) / LOG_STD_SLOPE).float()
    chosen = choose(torch.cat([mean, raw], -1), noise)
    check(chosen.action[0].numpy(), ARRAYS["tanh_gaussian/action"], 3e-6)
    check(chosen.log_prob[0].numpy(), ARRAYS["tanh_gaussian/log_prob"], 3e-6)


def test_quantile_huber_loss_matches():
    agent = make()
    check(agent._levels.numpy(), ARRAYS["quantile_taus"], 1e-7)
    error = torch.from_numpy(ARRAYS["quantile_huber/td_errors"])
    check(agent.quantile_loss(error).numpy(), ARRAYS["quantile_huber/loss"], 3e-6)


def test_weight_decay_is_as_strong_as_the_references():
    """Seen: 1.0000. PyTorch's AdamW would have 2.9, none 0; nothing else here could tell."""
    start, gradients, steps = (ARRAYS[f"adamw/{name}"] for name in ("p0", "grads", "steps"))
    part = Scalar(0.0, 1)
    part.flat[0] = torch.from_numpy(start)
    adam = Adam(part, CONFIG["critic_lr"], decay=CONFIG["weight_decay"])
    for i in range(int(steps)):
        part.flat.grad[0] = torch.from_numpy(gradients[i % len(gradients)])
        adam.step()
    ours, theirs, without = part.flat[0].numpy(), ARRAYS["adamw/p_decay"], ARRAYS["adamw/p_no_decay"]
    check(ours, theirs, 1e-5, 0.0)
    assert ((without - ours) @ start) / ((without - theirs) @ start) == pytest.approx(1.0, abs=0.03)


def test_defaults_are_the_arrays_settings():
    """Of everything but sizes: a wrong default would be noticed by no reader of the arrays."""
    c, target = BROConfig(), CONFIG["target_entropy"] / CONFIG["action_dim"]
    expected = {"discount": c.discount, "tau": c.target_rate, "std_multiplier": c.std_multiplier}
    expected |= {"kl_target": c.target_kl, "pessimism": c.pessimism, "weight_decay": c.weight_decay}
    expected |= dict.fromkeys(("actor_lr", "critic_lr", "temp_lr"), c.lr) | {"adjustment_lr": c.adjustment_lr}
    expected |= {"scalar_adam_b1": c.scalar_beta1, "layer_norm_eps": c.layer_norm}
    expected |= {"actor_blocks": c.actor_blocks, "critic_blocks": c.critic_blocks}
    assert {name: CONFIG[name] for name in expected} == expected
    assert c.target_entropy == target
