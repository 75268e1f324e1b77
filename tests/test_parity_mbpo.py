"""MBPO's model against the reference implementation's arrays: normaliser, forward, loss terms, three updates.

Tolerances are those of the arrays' description; next to each stands the error seen with this implementation. The
arrays' minibatches are (row, member, ...), so every member has rows of its own; targets are residual and raw.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dynarep.agents.ensemble import Ensemble
from dynarep.configs.mbpo import EnsembleConfig

ARRAYS = np.load(Path(__file__).parent / "parity" / "mbpo_update.npz")
FIELDS = {"obs": "observations", "action": "actions", "reward": "rewards", "next_obs": "next_observations"}
LAYERS, MEMBERS = 5, 7


def parameters(when: str) -> dict[str, np.ndarray]:
    """Slot of our network -> the reference's array, (member, ...)."""
    slots = [(i, kind) for i in range(LAYERS) for kind in ("kernel", "bias")]
    return {f"/{i}.{kind}": ARRAYS[f"{when}/ensemble/params/ed{i + 1}/{kind}"] for i, kind in slots}


def batch(t: int) -> dict[str, torch.Tensor]:
    """Minibatch t as (1 seed, member, row, ...)."""
    return {
        ours: torch.from_numpy(ARRAYS[f"ens{t}/batch/{name}"]).transpose(0, 1)[None] for ours, name in FIELDS.items()
    }


def normaliser_data() -> dict[str, torch.Tensor]:
    obs, action = (torch.from_numpy(ARRAYS[f"ens/norm_data/{name}"])[None] for name in ("observations", "actions"))
    return {"obs": obs, "action": action, "next_obs": obs, "reward": torch.zeros(obs.shape[:2])}


@pytest.fixture(scope="module")
def history() -> list[dict[str, np.ndarray]]:
    """What each of the three consecutive updates computes before its step, and the parameters after it."""
    ensemble = Ensemble(EnsembleConfig(model_width=16, model_batch_size=32), obs_size=5, action_size=2, seeds=[0])
    for slot, values in parameters("before").items():
        ensemble.net.parameter(slot)[0] = torch.from_numpy(values)
    ensemble.fit_normalisers(normaliser_data())
    updates = []
    for t in range(3):
        rows = batch(t)
        mean, log_variance = (x.detach() for x in ensemble.forward(rows["obs"], rows["action"]))
        error = mean - ensemble.targets(rows)
        change = ensemble.targets(rows)[..., :-1].norm(dim=-1)
        seen = {
            "mean": mean,
            "log_variance": log_variance,
            "mse_per_member": (error.square() * (-log_variance).exp()).mean((2, 3)),
            "percent_error": 100 * (error[..., :-1].norm(dim=-1) / change).mean(),
            "score": ensemble.score(rows),
            **ensemble.update(rows),
            **{slot: ensemble.net.parameter(slot) for slot in ensemble.net.slots()},
        }
        updates.append({name: value.numpy().squeeze().copy() for name, value in seen.items()})
    return updates


def check(actual: np.ndarray, desired: np.ndarray, rtol: float = 0.0, atol: float = 0.0) -> None:
    np.testing.assert_allclose(actual, desired, rtol=rtol, atol=atol)


def test_input_normaliser_uses_population_std_and_adds_epsilon_once():
    ensemble = Ensemble(EnsembleConfig(model_width=16), obs_size=5, action_size=2, seeds=[0])
    ensemble.fit_normalisers(normaliser_data())
    mean, std = (np.concatenate([ARRAYS[f"ens/norm/{x}_{m}"] for x in ("obs", "act")]) for m in ("mu", "std"))
    check(ensemble.input_mean[0].numpy(), mean, atol=1e-6)
    check(ensemble.input_std[0].numpy(), std, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("t", range(3))
def test_forward_mean_and_clamped_log_variance_match(history, t):
    check(history[t]["mean"], ARRAYS[f"ens{t}/mean"].swapaxes(0, 1), atol=1e-7)
    check(history[t]["log_variance"], ARRAYS[f"ens{t}/logvar"].swapaxes(0, 1), atol=1e-5)


@pytest.mark.parametrize("t", range(3))
def test_loss_terms_and_gradient_norm_match(history, t):
    ours, info = history[t], f"ens{t}/info/"
    names = {
        "mse_loss": "mse_loss",
        "var_loss": "var_loss",
        "total_loss": "mbpo_model_loss",
        "grad_norm": "model_gnorm",
        "mse_per_member": "unsum_mse_loss",
        "percent_error": "model_percent_error",
    }
    for name, theirs in names.items():
        check(ours[name], ARRAYS[info + theirs], rtol=1e-5)
    check(ours["mse_loss"] + ours["var_loss"], ARRAYS[info + "int_total_loss"], rtol=1e-5)
    check(ours["log_variance"].max(), ARRAYS[info + "max_logvars"], rtol=1e-5)
    check(ours["log_variance"].min(), ARRAYS[info + "min_logvars"], rtol=1e-5)
    check(np.exp(-ours["log_variance"]).min(), ARRAYS[info + "min_inv_vars"], rtol=1e-5)


@pytest.mark.parametrize("t", range(3))
def test_weight_decay_has_one_rate_per_kernel_and_spares_biases(history, t):
    # The reference's own entry sum_weight_decay is wrong (quirk Q13); its loss is right.
    decay = ARRAYS[f"ens{t}/info/mbpo_model_loss"] - ARRAYS[f"ens{t}/info/int_total_loss"]
    check(history[t]["weight_decay"], decay, atol=3e-6)


@pytest.mark.parametrize("t", range(3))
def test_holdout_error_per_member_matches(history, t):
    check(history[t]["score"], ARRAYS[f"ens{t}/val_mse_per_member"], rtol=1e-5)
    check(history[t]["score"], ARRAYS[f"ens{t}/info/mean_loss"], rtol=1e-5)


@pytest.mark.parametrize("t", range(3))
def test_parameters_after_each_adam_step_match(history, t):
    for slot, desired in parameters(f"ens{t}/after").items():
        check(history[t][slot], desired, atol=5e-6)


def test_initial_kernels_have_the_references_distribution():
    ours = Ensemble(EnsembleConfig(model_width=96), obs_size=67, action_size=21, seeds=[0, 1])
    for slot, theirs in parameters("before").items():
        kernel = ours.net.parameter(slot).numpy()
        if slot.endswith("bias"):
            assert not kernel.any()
            assert not theirs.any()
            continue
        for values, tolerance in ((kernel, 0.01), (theirs, 0.06)):  # 60 000 and 800 entries or more
            scale = 1 / math.sqrt(MEMBERS * values.shape[-2])
            assert values.std() == pytest.approx(scale, rel=tolerance)
            assert np.abs(values).max() <= 2.2738 * scale  # 2 / 0.8796, where the normal is cut
            assert np.abs(values).max() >= 2.2 * scale
