"""Every number that the reference logs of its updates, against `diagnostics.latent` at the same parameters.

The reference logs a part before the part's own step, but after the steps of the parts before it; so here a part is
measured, then trained, three times over.
"""

import numpy as np
import pytest
import torch

from dynarep.diagnostics.latent import actor_statistics, critic_statistics, latent_report, model_terms
from test_parity_mad_td import ARRAYS, agent_at, batch_of, close

OURS = {  # where our name is not the reference's
    "model/encoder_entropy": "latent/entropy",
    "model/latent_mean": "latent/mean",
    "model/latent_std": "latent/std",
    "critic/ood_correlation": "ood_correlation",
}
LOSSES = {
    "reward_loss", "model_loss", "model_critic_loss", "total_loss", "critic_loss", "l2_byol", "l2_logits", "l2_action",
    "l2_q_loss", "target_diversity",
}  # fmt: skip


def tolerance(name: str, hard: bool) -> dict[str, float]:
    if name == "l2_vaml":
        return {"rtol": 1e-4, "atol": 0.0}
    if name in LOSSES:
        return {"rtol": 1e-5 if hard else 3e-6, "atol": 3e-7}
    return {"rtol": 3e-5, "atol": 1e-6 if hard and name == "ood_correlation" else 3e-7}


def logged(arrays, t: int) -> dict[str, np.ndarray]:
    """All that the reference logged of update t, under our names."""
    start = f"info{t}/"
    found = {key.removeprefix(start): arrays[key] for key in arrays.files if key.startswith(start)}
    return {OURS.get(key, key): value for key, value in found.items()}


def reference_name(ours: str) -> str:
    return {ours: theirs for theirs, ours in OURS.items()}.get(ours, ours).split("/")[-1]


@pytest.mark.parametrize("name", ARRAYS)
def test_every_logged_number_of_three_updates_is_ours(name):
    arrays, agent = ARRAYS[name], agent_at(ARRAYS[name], "before")
    for t in range(3):
        rows = {key: values[:, 0] for key, values in batch_of(arrays, t).items()}
        found = {}
        if t == 0:  # one agent step at UTD 3: the model learns from the first minibatch alone
            found |= model_terms(agent, rows)
            agent.update_model(rows)
        found |= critic_statistics(agent, rows)
        with torch.no_grad():
            z, next_z = agent.encode(rows["obs"]), agent.encode(rows["next_obs"])
        agent.update_critic(z, next_z, rows)
        found |= actor_statistics(agent, rows)
        agent.update_actor(z)
        theirs = logged(arrays, t)
        assert set(found) == set(theirs)
        for key, value in found.items():
            close(value[0], theirs[key], **tolerance(reference_name(key), bool(name)), name=f"{t} {key}")


@pytest.mark.parametrize("name", ARRAYS)
def test_the_report_has_all_parts_at_the_same_parameters(name):
    arrays, agent = ARRAYS[name], agent_at(ARRAYS[name], "before")
    rows = {key: values[:, 0] for key, values in batch_of(arrays, 0).items()}
    found = latent_report(agent, rows)
    assert set(found) == set(logged(arrays, 0))
    for part in (model_terms, critic_statistics, actor_statistics):
        for key, value in part(agent, rows).items():
            assert torch.equal(found[key], value), key
