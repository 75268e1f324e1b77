"""TD-MPC2 against the official implementation's arrays: parts, losses, gradients, three updates, three searches.

Tolerances are those of the arrays' description. The reference ran without dropout, whose place one layer of its own
shows, and with a gradient norm clipped at 0.7, so that clipping acts in every update.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from dynarep.activations import mish, simnorm
from dynarep.agents.mppi import SearchNoise, even
from dynarep.agents.td_mpc2 import TDMPC2, Noise
from dynarep.configs.td_mpc2 import TDMPC2Config
from dynarep.nets import Net, Spec
from dynarep.two_hot import TwoHot, symexp, symlog

ARRAYS = np.load(Path(__file__).parent / "parity" / "tdmpc2_update.npz")
KINDS = {"kernel": "weight", "bias": "bias", "scale": "ln/weight", "shift": "ln/bias"}
PLACES = {  # the reference's networks -> ours: attribute, branch
    "encoder": ("encoder", ""),
    "dynamics": ("model", "dynamics"),
    "reward": ("model", "reward"),
    "pi": ("actor", ""),
    "Qs": ("critic", ""),
    "target_Qs": ("target", ""),
}
UPDATES = pytest.mark.parametrize("t", range(3))


def setting(name: str) -> float:
    return float(ARRAYS[f"config/{name}"])


def tensor(key: str) -> torch.Tensor:
    """One of the arrays, with the axis of a single seed before it."""
    return torch.from_numpy(np.asarray(ARRAYS[key]))[None]


def check(actual: torch.Tensor, key: str, tolerance: float, rtol: bool = True) -> None:
    desired = ARRAYS[key]
    found = actual.detach().numpy().reshape(desired.shape)
    np.testing.assert_allclose(found, desired, atol=tolerance, rtol=tolerance if rtol else 0.0, err_msg=key)


def parameters(when: str, theirs: str) -> dict[str, np.ndarray]:
    """Slot of ours -> the reference's array, (member, ...), kernels as (in, out)."""
    found = {}
    for i in range(3):
        for ours, kind in KINDS.items():
            key = f"{when}/{theirs}/{i}/{kind}"
            if key in ARRAYS.files:
                values = ARRAYS[key] if "Q" in theirs else ARRAYS[key][None]
                slot = f"{PLACES[theirs][1]}/{i}.{ours}"
                found[slot] = np.ascontiguousarray(np.swapaxes(values, -1, -2) if ours == "kernel" else values)
    return found


def fresh() -> TDMPC2:
    """An agent of the arrays' sizes and settings, with the parameters that the reference started from."""
    whole = {"batch_size": "batch_size", "width": "mlp_dim", "latent": "latent_dim", "bins": "num_bins"}
    whole |= {"horizon": "horizon", "critics": "num_q", "plan_samples": "num_samples", "plan_elites": "num_elites"}
    whole |= {"plan_priors": "num_pi_trajs", "plan_iterations": "iterations"}
    given = {ours: int(setting(theirs)) for ours, theirs in whole.items()}
    given |= {"bins_limit": setting("vmax"), "dropout": 0.0, "clip": setting("grad_clip_norm")}
    config = TDMPC2Config(**given).model_copy(update={"encoder_width": int(setting("enc_dim"))})  # 20: for one seed
    agent = TDMPC2(config, int(setting("obs_dim")), int(setting("action_dim")), [0])
    for theirs, (net, _) in PLACES.items():
        for slot, values in parameters("before", theirs).items():
            getattr(agent, net).parameter(slot)[0] = torch.from_numpy(values)
    return agent


def batch_and_noise(t: int) -> tuple[dict[str, torch.Tensor], Noise]:
    batch = {name: tensor(f"batch{t}/{name}") for name in ("obs", "action")}
    eps = [tensor(f"noise{t}/{name}") for name in ("target_pi_eps", "pi_eps")]
    pair = [tensor(f"noise{t}/{name}")[:, :2].long() for name in ("target_q_perm", "pi_q_perm")]
    return batch | {"reward": tensor(f"batch{t}/reward")[..., 0]}, Noise(eps[0], pair[0], eps[1], pair[1])


@pytest.fixture(scope="module")
def history() -> tuple[TDMPC2, list[dict[str, torch.Tensor]]]:
    """The agent after three updates, and what each of them computed, gradients and parameters among it."""
    torch.set_num_threads(1)
    agent, updates = fresh(), []
    for t in range(3):
        batch, noise = batch_and_noise(t)
        with torch.no_grad():
            next_z = agent._each(agent.encode, batch["obs"][:, 1:])
            seen = {"next_z": next_z, "td_target": agent.td_target(batch["reward"], next_z, noise)}
            latents = [agent.encode(batch["obs"][:, 0])]
            for i in range(batch["action"].shape[1]):
                latents.append(agent.imagine(latents[-1], batch["action"][:, i]))
            seen["zs"] = torch.stack(latents, 1)
        seen |= gradients(agent, lambda batch=batch, noise=noise, seen=seen: seen.update(agent.update(batch, noise)))
        for theirs, (net, _) in PLACES.items():
            for slot in parameters("before", theirs):
                seen[f"after/{theirs}{slot}"] = getattr(agent, net).parameter(slot)[0].clone()
        updates.append(seen)
    return agent, updates


def gradients(agent: TDMPC2, update) -> dict[str, torch.Tensor]:
    """Every network's gradient before it is clipped, while `update` runs."""
    found: dict[str, torch.Tensor] = {}
    clip = agent._clip

    def spy(*names: str) -> torch.Tensor:
        for theirs, (net, _) in PLACES.items():
            if net in names:
                views = getattr(agent, net)._views
                for slot in parameters("before", theirs):
                    found[f"grad/{theirs}{slot}"] = views[slot].grad.clone()
        return clip(*names)

    agent._clip = spy
    update()
    agent._clip = clip
    return found


@UPDATES
def test_latents_and_targets_match(history, t):
    seen = history[1][t]
    check(seen["next_z"], f"inter{t}/next_z", 3e-6)  # seen: 2e-7
    check(seen["zs"], f"inter{t}/zs", 3e-6)
    check(seen["td_target"], f"inter{t}/td_target", 5e-5)  # seen: 1e-5


INFO = {
    "consistency_loss": "consistency_loss",
    "reward_loss": "reward_loss",
    "value_loss": "value_loss",
    "total_loss": "total_loss",
    "grad_norm": "grad_norm",
    "actor_loss": "pi_loss",
    "actor_grad_norm": "pi_grad_norm",
    "entropy": "pi_entropy",
    "scaled_entropy": "pi_scaled_entropy",
    "scale": "pi_scale",
}


@UPDATES
@pytest.mark.parametrize("ours", INFO)
def test_losses_and_norms_match(history, t, ours):
    check(history[1][t][ours], f"info{t}/{INFO[ours]}", 3e-6)  # seen: 3e-7


def test_no_logged_number_is_left_out():
    assert {key.split("/")[1] for key in ARRAYS.files if key.startswith("info0/")} == set(INFO.values())


def test_gradients_of_the_first_update_match(history):
    seen, compared = history[1][0], 0
    for theirs in PLACES:
        for slot, values in parameters("grad0", theirs).items():
            found = seen[f"grad/{theirs}{slot}"].numpy().reshape(values.shape)
            np.testing.assert_allclose(found, values, atol=5e-6, rtol=5e-6, err_msg=theirs + slot)  # seen: 1e-6
            compared += 1
    assert compared == sum(len(parameters("before", theirs)) for theirs in PLACES if theirs != "target_Qs")


@UPDATES
@pytest.mark.parametrize("theirs", PLACES)
def test_parameters_after_each_update_match(history, t, theirs):
    for slot, values in parameters(f"after{t}", theirs).items():
        found = history[1][t][f"after/{theirs}{slot}"].numpy()
        np.testing.assert_allclose(found, values, atol=1e-6, rtol=0, err_msg=slot)  # seen: 1e-7


@UPDATES
def test_running_scale_after_each_update_matches(history, t):
    check(history[1][t]["scale"], f"after{t}/scale", 3e-6)


def test_running_scale_follows_percentiles_of_any_number_of_values():
    agent = fresh()
    for t in range(3):
        agent._update_scale(tensor(f"scale{t}/x")[..., 0])
        check(agent.scale, f"scale{t}/value", 3e-6)


# -- searches, with the parameters after three updates -------------------------------------------------------------

SEARCHES = pytest.mark.parametrize("k", range(3), ids=["first step", "warm start", "evaluation"])


def search_noise(k: int) -> SearchNoise:
    names = ("prior_eps", "sample_eps", "value_pi_eps")
    normals = [tensor(f"plan{k}/{name}") for name in names]
    action = None if ARRAYS[f"plan{k}/eval_mode"] else tensor(f"plan{k}/action_eps")
    pairs = tensor(f"plan{k}/value_q_perm")[..., :2].long()
    return SearchNoise(*normals, pairs, tensor(f"plan{k}/select_exponential"), action)


@SEARCHES
def test_values_of_given_candidates_match_in_every_iteration(history, k):
    agent, noise = history[0], search_noise(k)
    with torch.no_grad():
        z = agent.encode(even(tensor(f"plan{k}/obs").unsqueeze(1)))[:, :1]
    found = [
        agent.planner.value_of(z, candidates.unsqueeze(0), noise.value[:, i], noise.pairs[:, i])
        for i, candidates in enumerate(tensor(f"plan{k}/candidates")[0])
    ]
    assert len(found) == 3
    check(torch.stack(found), f"plan{k}/values", 5e-5)  # seen: 1e-5


@SEARCHES
def test_searches_end_where_the_references_do(history, k):
    """Iterations amplify rounding, hence the width of the tolerance."""
    warm = not ARRAYS[f"plan{k}/t0"]
    assert warm == (k > 0)
    before = tensor(f"plan{k}/prev_mean") if warm else torch.zeros(1, 3, 2)
    action, mean = history[0].planner.search(tensor(f"plan{k}/obs"), before, search_noise(k))
    check(mean, f"plan{k}/mean", 1e-3, rtol=False)  # seen: 1e-4
    check(action, f"plan{k}/action", 1e-3, rtol=False)


# -- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bins", "limit"), [("small", 11, 5.0), ("default", 101, 10.0)])
def test_two_hot_values_match(name, bins, limit):
    histogram, key = TwoHot(bins, limit), f"two_hot_{name}/"
    x = tensor(key + "x")[0, :, 0]
    p = histogram.encode(x)
    check(p, key + "p", 1e-6)
    check(histogram.decode((p + 1e-30).log()), key + "decoded", 3e-6)
    check(histogram.decode(tensor(key + "logits")[0]), key + "logits_decoded", 3e-6)
    check(histogram.cross_entropy(tensor(key + "logits")[0], x), key + "soft_ce", 1e-6)
    check(symlog(x), key + "symlog", 1e-6)
    check(symexp(symlog(x)), key + "symexp_of_symlog", 3e-6)


def test_simnorm_matches():
    check(simnorm(tensor("simnorm/x")), "simnorm/y", 1e-6)


def test_dropout_stands_before_the_norm():
    net = Net("layer", {"": Spec((6, 10, 1), mish, 1e-5)}, [0], lambda rng, i, o: np.zeros((i, o)))
    for slot, key in (("kernel", "weight"), ("bias", "bias"), ("scale", "ln_weight"), ("shift", "ln_bias")):
        values = tensor(f"normed_linear/{key}")
        net.parameter(f"/0.{slot}")[0] = values.mT if slot == "kernel" else values
    factors = tensor("normed_linear/keep_mask").float() / (1 - float(ARRAYS["normed_linear/p"]))
    _, tape = net.forward((tensor("normed_linear/x"),), dropped=factors)
    check(tape.layers[1].below, "normed_linear/y", 1e-6)


def test_discount_follows_from_the_episodes_length():
    for length, value in zip(ARRAYS["discount/episode_length"], ARRAYS["discount/value"], strict=True):
        assert TDMPC2Config().discount_of(int(length)) == pytest.approx(float(value), abs=1e-6)


def test_forward_passes_match(history):
    agent = history[0]
    with torch.no_grad():
        z, action = agent.encode(tensor("forward/obs")), tensor("forward/action")
        mean, log_std = agent.policy(z)
        found = {"z": z, "next_z": agent.imagine(z, action), "reward_logits": agent.model((z, action), "reward")}
        found |= {"pi_mean": mean.tanh(), "pi_log_std": log_std, "q_logits": agent.critic((z, action))}
        found |= {"reward": agent.values.decode(found["reward_logits"]), "q": agent.values.decode(found["q_logits"])}
        found["pi_action"] = agent.sample(z, tensor("forward/pi_eps"))
    for name, values in found.items():
        check(values, f"forward/{name}", 1e-5)
