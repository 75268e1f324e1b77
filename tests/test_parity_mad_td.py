"""MAD-TD against the reference implementation's arrays, per equation and per update.

`mad_td_update_hard.npz` closes the blind spots of `mad_td_update.npz`: online and target critics differ, clipping is
active, masks are often 0, one masked row is a model row.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from dynarep.activations import simnorm
from dynarep.agents.mad_td import MadTD
from dynarep.configs.mad_td import MadTDConfig
from dynarep.diagnostics.td import td_error
from dynarep.histogram import HLGauss
from dynarep.nets import Net

ARRAYS = {name: np.load(Path(__file__).parent / "parity" / f"mad_td_update{name}.npz") for name in ("", "_hard")}
LAYER = {"kernel": "Dense_0/kernel", "bias": "Dense_0/bias", "scale": "LayerNorm_0/scale", "shift": "LayerNorm_0/bias"}


def reference(arrays, when: str, net: str, slot: str, member: int) -> np.ndarray:
    branch, layer = slot.split("/")
    index, kind = layer.split(".")
    module = {"encoder": "MLP_0", "actor": "MLP_0", "critic": f"BinnedRegression_{member}"}.get(net.split("_")[0])
    if module is None:  # the dynamics branch is the one whose last layer has the latent's width
        dynamics = 0 if arrays[f"{when}/latent_model/params/MLP_0/Layer_2/Dense_0/kernel"].shape[1] > 1 else 1
        module = f"MLP_{dynamics if branch == 'dynamics' else 1 - dynamics}"
    return arrays[f"{when}/{net}/params/{module}/Layer_{index}/{LAYER[kind]}"]


def networks(agent: MadTD) -> dict[str, Net]:
    return {
        "encoder": agent.encoder,
        "latent_model": agent.model,
        "critic": agent.critic,
        "critic_target": agent.target,
        "actor": agent.actor,
    }


def agent_at(arrays, when: str) -> MadTD:
    config = MadTDConfig(
        width=16, batch_size=40, bins=21, value_limit=10, clip=0.02 if arrays is ARRAYS["_hard"] else 10
    )
    agent = MadTD(config, obs_size=6, action_size=2, seeds=[0])
    for name, net in networks(agent).items():
        for slot in net.slots():
            for member in range(net.members):
                net.parameter(slot)[0, member] = torch.from_numpy(reference(arrays, when, name, slot, member))
    return agent


def batch_of(arrays, t: int) -> dict[str, torch.Tensor]:
    def field(name):
        return torch.from_numpy(arrays[f"batch{t}/{name}"]).squeeze()[None, None]

    return {
        "obs": field("state"),
        "action": field("action"),
        "reward": field("reward"),
        "next_obs": field("next_state"),
        "mask": field("mask"),
    }


def close(ours, theirs, atol=0.0, rtol=0.0, name=""):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    worst = np.max(np.abs(ours - theirs))
    np.testing.assert_allclose(ours, theirs, atol=atol, rtol=rtol, err_msg=f"{name}: largest error {worst:.2e}")


@pytest.mark.parametrize("name", ARRAYS)
def test_simnorm_and_hl_gauss_equal_the_reference(name):
    arrays = ARRAYS[name]
    close(simnorm(torch.from_numpy(arrays["simnorm/x"])), arrays["simnorm/y"], atol=3e-7)
    close(
        HLGauss(21, -10, 10, 0.75, 17).encode(torch.from_numpy(arrays["hl_gauss/y"])), arrays["hl_gauss/p"], atol=1e-6
    )


def test_hl_gauss_has_the_specifications_check_values():
    values = HLGauss(151, -300, 300, 0.75, 17)
    p = values.encode(torch.tensor([0.0, 50.3, 300.0, 4000.0]))
    close(p[0, 72:79], [0.00043, 0.02232, 0.22974, 0.49501, 0.22974, 0.02232, 0.00043], atol=1e-5)
    close(values.decode(p[1:].log()), [50.30001, 298.52, 298.52], atol=5e-3)
    assert values.log_probabilities(torch.zeros(151)).exp()[75] == pytest.approx(0.948, abs=5e-4)


@pytest.mark.parametrize("name", ARRAYS)
def test_every_forward_equals_the_reference(name):
    arrays, agent = ARRAYS[name], agent_at(ARRAYS[name], "after2")
    with torch.no_grad():
        z = agent.encode(torch.from_numpy(arrays["forward/state"])[None])
        action = agent.policy(z)
        q = agent.values(agent.critic, z, action)
        log_next, reward = agent.imagine(z, action)
    for ours, key in (
        (z, "latent"),
        (action, "action"),
        (log_next.exp(), "next_latent"),
        (reward[..., None], "reward"),
    ):
        close(ours[0], arrays[f"forward/{key}"], atol=1e-6, name=key)
    close(q[0].T, np.concatenate([arrays["forward/q1"], arrays["forward/q2"]], 1), atol=1e-6)


@pytest.mark.parametrize("name", ARRAYS)
def test_losses_and_parameters_equal_the_reference_after_each_of_three_updates(name):
    arrays = ARRAYS[name]
    agent = agent_at(arrays, "before")
    rtol = 1e-5 if name else 3e-6
    target_atol = 1.5e-6 if name else 3e-7
    for t in range(3):
        rows = {key: values[:, 0] for key, values in batch_of(arrays, t).items()}
        if t == 0:  # one agent step at UTD 3: the model learns from the first minibatch alone
            for key, loss in agent.update_model(rows).items():
                atol = 3e-7
                close(
                    loss[0],
                    arrays[f"info0/model/{key}"],
                    atol=atol,
                    rtol=3e-5 if key == "vaml_loss" else rtol,
                    name=key,
                )
        with torch.no_grad():
            z, next_z = agent.encode(rows["obs"]), agent.encode(rows["next_obs"])
        close(agent.update_critic(z, next_z, rows)[0], arrays[f"info{t}/critic/critic_loss"], atol=3e-7, rtol=rtol)
        close(agent.update_actor(z)[0], arrays[f"info{t}/actor/actor_loss"], atol=3e-7, rtol=3e-5)
        for net_name, net in networks(agent).items():
            atol = {"critic": 2e-6, "critic_target": target_atol}.get(net_name, 3e-7)
            for slot in net.slots():
                for member in range(net.members):
                    ours = net.parameter(slot)[0, member]
                    close(
                        ours,
                        reference(arrays, f"after{t}", net_name, slot, member),
                        atol=atol,
                        name=f"{t} {net_name} {slot}",
                    )


@pytest.mark.parametrize("name", ARRAYS)
def test_update_with_three_minibatches_is_one_agent_step_at_utd_three(name):
    arrays = ARRAYS[name]
    agent = agent_at(arrays, "before")
    steps = [batch_of(arrays, t) for t in range(3)]
    agent.update({key: torch.cat([step[key] for step in steps], 1) for key in steps[0]})
    for net_name, net in networks(agent).items():
        for slot in net.slots():
            for member in range(net.members):
                ours = net.parameter(slot)[0, member]
                close(ours, reference(arrays, "after2", net_name, slot, member), atol=2e-6, name=f"{net_name} {slot}")


@pytest.mark.parametrize("name", ARRAYS)
def test_td_error_diagnostic_equals_the_loss_that_the_reference_logs(name):
    """`l2_q_loss` of the reference is taken on the mixed batch, with the new encoder, before the critic's step."""
    arrays = ARRAYS[name]
    agent = agent_at(arrays, "before")
    rows = {key: values[:, 0] for key, values in batch_of(arrays, 0).items()}
    agent.update_model(rows)
    with torch.no_grad():
        z, next_z = agent.encode(rows["obs"]), agent.encode(rows["next_obs"])
        action, reward, next_z = agent.mix(z, next_z, rows)
    error = td_error(agent, z, action, reward, next_z, rows["mask"])
    close(error["l2"][0], arrays["info0/critic/l2_q_loss"], rtol=1e-5 if name else 3e-6, atol=3e-7)
    close(error["ce"][0], arrays["info0/critic/critic_loss"], rtol=1e-5 if name else 3e-6, atol=3e-7)
