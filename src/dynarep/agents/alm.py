"""ALM: encoder, latent model and policy that climb one lower bound (arXiv 2209.08466; `extensions` A), and its arms.

    every agent step, with B sequences s_0, a_0 .. s_K of the replay:                                          `update`
        z_0 ~ e(s_0), z_t+1 ~ m(z_t, a_t);  one step on e and m together, all else held:
            sum_t [KL(m(z_t, a_t) | ebar(s_t+1)) - R(z_t, a_t)] - min_j Q_j(z_K, a),  a ~ pi(z_K)
    with B single transitions (s, a, r, m, s') besides, z ~ ebar(s), z' ~ ebar(s') drawn anew in every line:
        one step on R and C:     (R(z, a) - r)^2 + cross-entropy of C(z, a, z'), half of whose z' are from m(z, a)
        one step on the critics: sum_j (Q_j(z, a) - r - gamma m min_j Qbar_j(z', a'))^2 / 2,  a' ~ pi(z')
        one step on the actor:   - sum_t gamma^t G_t / K, lambda-returns of K steps in the model with the rewards
                                 R(z_t, a_t) + .1 (logit_1 - logit_0)(z_t, a_t, z_t+1),  values min_j Q_j
        ebar <- .995 ebar + .005 e;  Qbar <- .995 Qbar + .005 Q

One nat of the KL counts as one unit of reward. C's logits estimate log ebar(z'|s') - log m(z'|z, a), which stands in
for the KL where there is no s'. The policy is tanh(mean) plus noise of a scheduled deviation, cut at .3 in updates, and
clamped to [-1, 1] with the gradient going straight through. m = 0 only where an episode truly terminated.

What became of the reference's quirks (`extensions` A4): (a) sequences do not cross a time limit here (`sequences.py`);
(b) the schedule counts from the end of the random steps, evaluations from the start; (c) the actor's plain loss is
the arm `model_free`; (d) the actor acts on e and learns on ebar, as there. Evaluations take z's mean, there it is
drawn. A norm of a gradient that is not finite is no error here: the seed diverges.

Shapes: S seeds, B rows, K steps, o, a, L lengths of observation, action, latent. Losses and means are per seed, time is
the axis after the seed's. "Reported" units are the environment's; the networks' rewards are r / scale (arm S).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynarep import process
from dynarep.agents.latents import Gaussian, Noise, gaussian, kl, lambda_returns
from dynarep.configs.alm import ALMConfig
from dynarep.initialisers import orthogonal
from dynarep.nets import Net, Spec, even
from dynarep.optimisers import Adam, restore, saved
from dynarep.replay import Replay, draw, normal
from dynarep.sequences import Sequences
from dynarep.streams import streams

Batch = Mapping[str, Tensor]
Generators = Sequence[np.random.Generator]
TINY = 1e-6  # deviations below it are taken for 1: nothing varies there
MOMENTS = ("input_mean", "input_std", "reward_mean", "reward_std", "kl_mean")


class ALM:
    """Aligned latent models for a block of seeds.

    Args:
        config: hyperparameters.
        obs_size: length of an observation.
        action_size: length of an action in [-1, 1].
        seeds: the run seeds trained together, S of them.
        task: not used; agents with a model of the task want its name.
    """

    def __init__(
        self, config: ALMConfig, obs_size: int, action_size: int, seeds: Sequence[int], task: str = ""
    ) -> None:
        c = self.config = config
        self.seeds, self.action_size, self.latent = list(seeds), action_size, c.latent_size(obs_size)
        w, z, za = c.width, self.latent, self.latent + action_size
        start = orthogonal(1.0)

        def head(*sizes: int) -> Spec:
            return Spec(sizes, F.elu, c.layer_norm, trunk=True)

        judges = {"reward": head(za, w, w, 1), "classifier": head(za + z, w, w, 2)}
        self.encoder = Net("encoder", {"": Spec((obs_size, w, w, 2 * z), F.elu)}, seeds, start)
        self.model = Net("model", {"": Spec((za, c.model_width, c.model_width, 2 * z), F.elu)}, seeds, start)
        self.judge = Net("judge", judges, seeds, start)
        self.critic = Net("critic", {"": head(za, w, w, 1)}, seeds, start, members=2)
        self.actor = Net("actor", {"": Spec((z, w, w, action_size), F.elu)}, seeds, start)
        self.target_encoder, self.target = self.encoder.target(), self.critic.target()
        self._optimisers = {name: Adam(getattr(self, name), c.lr) for name in self._learning()}

        device, ones = process.device(), (len(self.seeds), obs_size)
        self.input_mean, self.input_std = torch.zeros(ones, device=device), torch.ones(ones, device=device)
        self.reward_mean, self.reward_std = self.input_mean[:, 0].clone(), self.input_std[:, 0].clone()
        self.kl_mean = torch.zeros_like(self.reward_mean)  # running, of arm K; 0: none yet
        self._first: int | None = None  # the agent step at which learning begins
        self._sequences: Sequences | None = None

    def _learning(self) -> list[str]:
        """Return the networks that learn: without a model, those of A3's base algorithm."""
        if self.config.model_free:
            return ["encoder", "critic", "actor"]
        return [*(["encoder"] if self.config.encoder == "learned" else []), "model", "judge", "critic", "actor"]

    # -- for others: any number of rows, reported units ------------------------------------------------------------

    def explore(self, obs: Tensor, step: int) -> Tensor:
        """Return sampled actions (S, a) for one observation per seed, (S, o), at agent step `step`; z is sampled too.

        The noise is not cut, as it is in updates.
        """
        self._begin(step)
        generators = streams(self.seeds, "explore", step)
        latent, noise = (normal(generators, (1, n)) for n in (self.latent, self.action_size))
        z = self.encode(obs.unsqueeze(1)).sample(latent)
        return (self.policy(z) + self.std(step) * noise).clamp(-1.0, 1.0).squeeze(1)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Return noise-free actions of the latents' means, (S, B, a), for observations (S, B, o)."""
        return self.policy(self.encode(obs).mean)

    @torch.no_grad()
    def policy(self, z: Tensor) -> Tensor:
        """Return the mean actions, (S, B, a), in latents (S, B, L)."""
        return self.actor(even(z))[:, : z.shape[1]].tanh()

    @torch.no_grad()
    def encode(self, obs: Tensor, target: bool = False) -> Gaussian:
        """Return e(z|s), or ebar(z|s), of observations (S, B, o)."""
        net = self.target_encoder if target else self.encoder
        return self._encode(net, even(obs)).rows(slice(obs.shape[1]))

    @torch.no_grad()
    def predict(self, z: Tensor, action: Tensor) -> Gaussian:
        """Return the model's m(z'|z, a) of latents (S, B, L) and actions (S, B, a)."""
        return self._predict(even(z), even(action)).rows(slice(z.shape[1]))

    @torch.no_grad()
    def reward(self, z: Tensor, action: Tensor) -> Tensor:
        """Return predicted rewards, (S, B), of latents (S, B, L) and actions (S, B, a)."""
        return self._reward(even(z), even(action))[:, : z.shape[1]] * self.scale

    @torch.no_grad()
    def logit_difference(self, z: Tensor, action: Tensor, next_z: Tensor) -> Tensor:
        """Return what the classifier takes log ebar(z'|s') - log m(z'|z, a) for, (S, B)."""
        return self._logit(even(z), even(action), even(next_z))[:, : z.shape[1]]

    @torch.no_grad()
    def values(self, z: Tensor, action: Tensor) -> Tensor:
        """Return both critics' values, (S, 2, B), of latents (S, B, L) and actions (S, B, a)."""
        return self._values(self.critic, even(z), even(action))[..., : z.shape[1]] * self.scale.unsqueeze(-1)

    @torch.no_grad()
    def q(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return the smaller value, (S, B), at the mean of ebar, whose latents the critics learn on."""
        return self.values(self.encode(obs, target=True).mean, action).amin(1)

    # -- networks ----------------------------------------------------------------------------------------------------

    @property
    def scale(self) -> Tensor:
        """What one unit of the networks' rewards is in reported ones, (S, 1)."""
        return (self.reward_std if self.config.reward_scale else torch.ones_like(self.reward_std)).unsqueeze(1)

    @property
    def reward_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation that the reward network's target is normalised by, in the networks' units, (S, 1) each."""
        if self.config.reward_target == "raw":
            return torch.zeros_like(self.scale), torch.ones_like(self.scale)
        return self.reward_mean.unsqueeze(1) / self.scale, self.reward_std.unsqueeze(1) / self.scale

    def std(self, step: int) -> float:
        """Return the deviation of the policy's noise at agent step `step`."""
        c = self.config
        done = min(1.0, (step - (step if self._first is None else self._first)) / c.std_steps)
        return c.std_initial + done * (c.std_final - c.std_initial)

    def _encode(self, net: Net, obs: Tensor) -> Gaussian:
        c = self.config
        if c.normalise_inputs or c.encoder == "none":
            obs = (obs - self.input_mean.unsqueeze(1)).div_(self.input_std.unsqueeze(1))
            obs = obs.clamp_(-c.input_clip, c.input_clip)
        if c.encoder == "none":
            return Gaussian(obs, torch.full_like(obs, c.std_floor))
        return self._gaussian(net(obs))

    def _gaussian(self, out: Tensor) -> Gaussian:
        c = self.config
        return gaussian(out, c.mean_limit, c.std_floor, c.std_ceiling)

    def _predict(self, z: Tensor, action: Tensor, frozen: bool = False) -> Gaussian:
        change = self._gaussian(self.model((z, action), frozen=frozen))
        return change if self.config.latent_target == "direct" else Gaussian(z + change.mean, change.std)

    def _reward(self, z: Tensor, action: Tensor) -> Tensor:
        """Return predicted rewards, (S, B), in the networks' units; the network is held."""
        mean, std = self.reward_moments
        return torch.addcmul(mean, self.judge((z, action), "reward", frozen=True).squeeze(-1), std)

    def _logit(self, z: Tensor, action: Tensor, next_z: Tensor, frozen: bool = True) -> Tensor:
        no, yes = self.judge((z, action, next_z), "classifier", frozen=frozen).unbind(-1)
        return yes - no

    def _values(self, critic: Net, z: Tensor, action: Tensor, frozen: bool = True) -> Tensor:
        return critic((z, action), frozen=frozen).squeeze(-1)

    def _choose(self, z: Tensor, noise: Tensor, std: float) -> Tensor:
        """Return the policy's actions as updates take them, (S, B, a)."""
        c = self.config
        x = self.actor(z).tanh() + (std * noise).clamp(-c.noise_clip, c.noise_clip)
        return x - x.detach() + x.detach().clamp(-1.0, 1.0)

    # -- learning ----------------------------------------------------------------------------------------------------

    def learn(self, replay: Replay, step: int, simulate: object = None) -> dict[str, Tensor]:
        """Make the updates of agent step `step` from `replay`; returns what `update` says of the last one."""
        c, size = self.config, self.config.batch_size
        self._begin(step)
        if (step - cast(int, self._first)) % c.refit_every == 0:
            self.fit_normalisers(replay)
        places, numbers = streams(self.seeds, "replay", step), streams(self.seeds, "noise", step)
        for _ in range(c.updates_per_step):
            sequences = self.sequences(replay, places, size)
            singles = replay.rows(draw(places, replay.size, (size,)))
            terms = self.update(sequences, singles, self.noise(numbers), self.std(step))
        return terms

    def _begin(self, step: int) -> None:
        if self._first is None:
            self._first = step

    def fit_normalisers(self, replay: Replay) -> None:
        """Take the moments of all stored observations and rewards."""
        for s in range(len(self.seeds)):  # one seed at a time: bounded memory, and sums that cannot know the block
            for name, field in (("input", "obs"), ("reward", "reward")):
                variance, mean = torch.var_mean(replay.data[field][s, : replay.size], 0, correction=0)
                std = variance.sqrt()
                getattr(self, f"{name}_mean")[s].copy_(mean)
                getattr(self, f"{name}_std")[s].copy_(std.where(std >= TINY, 1.0))

    def sequences(self, replay: Replay, generators: Generators, count: int) -> dict[str, Tensor]:
        """Draw sequences that do not cross an end: obs (S, K + 1, count, o), action (S, K, count, a)."""
        if self._sequences is None or self._sequences.replay is not replay:
            self._sequences = Sequences(replay, self.config.horizon)
        starts = self._sequences.draw(generators, count).unsqueeze(1)
        steps = torch.arange(self.config.horizon, device=starts.device).view(1, -1, 1)
        rows = replay.rows(starts + steps)
        return {"obs": torch.cat([rows["obs"], rows["next_obs"][:, -1:]], 1), "action": rows["action"]}

    def noise(self, generators: Generators) -> Noise:
        """Draw the noise of one update."""
        return Noise.draw(generators, self.config.horizon, self.config.batch_size, self.latent, self.action_size)

    def update(self, sequences: Batch, singles: Batch, noise: Noise, std: float) -> dict[str, Tensor]:
        """Make one update.

        Args:
            sequences: obs (S, K + 1, B, o), action (S, K, B, a); B a multiple of 32.
            singles: obs (S, B, o), action (S, B, a), reward (S, B), next_obs (S, B, o), mask (S, B).
            noise: see `Noise`.
            std: deviation of the policy's noise.

        Returns:
            Each (S,), at the parameters of before the respective step: `critic_loss`, `critic_grad_norm`, `q1`, the
            mean of critic 1, and `reward`, the minibatch's mean, both in reported units; `actor_loss`,
            `actor_grad_norm`. With a model also, per step, `kl` in nats, its weight `balance`, `model_reward`;
            `value` of the last latent; `representation_loss`, `representation_grad_norm`; `reward_loss`, of the reward
            network's target; `classifier_loss`, `classifier_accuracy`; in the actor's rollouts `imagined_reward` and
            `intrinsic`, the weighted difference of logits. Norms are those before clipping.
        """
        terms: dict[str, Tensor] = {}
        if not self.config.model_free:
            terms |= self._update_representation(sequences, noise, std)
        size = singles["reward"].shape[1]
        rows = {**singles, "reward": singles["reward"] / self.scale}
        with torch.no_grad():
            both = self._encode(self.target_encoder, torch.cat([rows["obs"], rows["next_obs"]], 1))
        z, next_z = both.rows(slice(size)), both.rows(slice(size, None))
        if not self.config.model_free:
            terms |= self._update_judge(rows, z, next_z, noise)
        terms |= self._update_critic(rows, z, next_z, noise, std)
        terms |= self._update_actor(z, noise, std)
        self.target_encoder.follow(self.encoder, self.config.target_rate)
        self.target.follow(self.critic, self.config.target_rate)
        return terms | {"reward": singles["reward"].mean(-1)}

    def _step(self, loss: Tensor, *names: str) -> Tensor:
        """Go back from a loss (S,), clip the norm of these networks together, step; returns the norm, (S,)."""
        loss.sum().backward()  # type: ignore[no-untyped-call]
        optimisers = [self._optimisers[name] for name in names]
        norm = torch.stack([optimiser.norm() for optimiser in optimisers]).square().sum(0).sqrt()
        factor = torch.where(norm < self.config.clip, 1.0, self.config.clip / norm).unsqueeze(1)
        for optimiser in optimisers:
            grad = optimiser.net.flat.grad
            assert grad is not None
            grad.view(len(self.seeds), -1).mul_(factor)
            optimiser.step()
        return norm

    def representation(self, batch: Batch, noise: Noise, std: float) -> dict[str, Tensor]:
        """Return the terms of the loss of encoder and model, (S,) each: `kl` and `reward` per step, and `value`."""
        steps = self.config.horizon
        with torch.no_grad():
            following = self._encode(self.target_encoder, batch["obs"][:, 1:].flatten(1, 2))
        latents = [self._encode(self.encoder, batch["obs"][:, 0]).sample(noise.latents[:, 0])]
        priors: list[Gaussian] = []
        for t in range(steps):
            priors.append(self._predict(latents[-1], batch["action"][:, t]))
            latents.append(priors[-1].sample(noise.latents[:, t + 1]))
        prior = Gaussian(*(torch.cat(parts, 1) for parts in zip(*priors, strict=True)))
        with torch.no_grad():
            action = self._choose(latents[-1], noise.action, std)
        return {
            "kl": kl(prior, following).mean(1),
            "reward": self._reward(torch.cat(latents[:-1], 1), batch["action"].flatten(1, 2)).mean(1),
            "value": self._values(self.critic, latents[-1], action).amin(1).mean(1),
        }

    def _kl_weight(self) -> Tensor:
        """Return what the KL is multiplied by, (S,): 1, or in arm K what makes its running mean the one wanted."""
        if self.config.kl_balance is None:
            return torch.ones_like(self.kl_mean)
        return self.config.kl_balance * self.latent / self.kl_mean

    def _update_representation(self, batch: Batch, noise: Noise, std: float) -> dict[str, Tensor]:
        """Take one step of encoder and model."""
        c, terms = self.config, self.representation(batch, noise, std)
        now = terms["kl"].detach()
        self.kl_mean = torch.where(self.kl_mean == 0.0, now, torch.lerp(self.kl_mean, now, c.kl_rate))
        weight = self._kl_weight()
        loss = c.horizon * (weight * terms["kl"] - terms["reward"]) - terms["value"]
        norm = self._step(loss, *(name for name in ("encoder", "model") if name in self._optimisers))
        found = {"kl": now, "balance": weight, "model_reward": terms["reward"], "value": terms["value"]}
        found |= {"representation_loss": loss, "representation_grad_norm": norm}
        return {name: value.detach() for name, value in found.items()}

    def _update_judge(self, rows: Batch, z: Gaussian, next_z: Gaussian, noise: Noise) -> dict[str, Tensor]:
        """Take one step of reward network and classifier."""
        mean, std = self.reward_moments
        with torch.no_grad():
            start, real = z.sample(noise.judged[:, 0]), next_z.sample(noise.judged[:, 1])
            model = self._predict(start, rows["action"]).sample(noise.judged[:, 2])
            end = torch.where(noise.invented.unsqueeze(-1), model, real)
            y = (rows["reward"] - mean) / std
        predicted = self.judge((start, rows["action"]), "reward").squeeze(-1)
        logit = self._logit(start, rows["action"], end, frozen=False)
        towards = torch.where(noise.invented, -logit, logit)
        reward_loss, classifier_loss = (predicted - y).square().mean(1), F.softplus(-towards).mean(1)
        self._step(reward_loss + classifier_loss, "judge")
        return {
            "reward_loss": reward_loss.detach(),
            "classifier_loss": classifier_loss.detach(),
            "classifier_accuracy": (towards.detach() > 0).float().mean(1),
        }

    def _update_critic(self, rows: Batch, z: Gaussian, next_z: Gaussian, noise: Noise, std: float) -> dict[str, Tensor]:
        """Take one step of the critics, and of the encoder where it learns from them alone."""
        alone = self.config.model_free
        here = self._encode(self.encoder, rows["obs"]) if alone else z
        with torch.no_grad():
            after = next_z.sample(noise.valued[:, 1])
            action = self._choose(after, noise.next_action, std)
            least = self._values(self.target, after, action).amin(1)
            y = rows["reward"] + self.config.discount * rows["mask"] * least
        q = self._values(self.critic, here.sample(noise.valued[:, 0]), rows["action"], frozen=False)
        loss = (q - y.unsqueeze(1)).square().mean((1, 2))
        norm = self._step(loss, *(["encoder"] if alone else []), "critic")
        q1 = q.detach()[:, 0].mean(1) * self.scale.squeeze(1)
        return {"critic_loss": loss.detach(), "critic_grad_norm": norm, "q1": q1}

    def _update_actor(self, z: Gaussian, noise: Noise, std: float) -> dict[str, Tensor]:
        """Take one step of the actor up its returns in the model, or up the critics alone."""
        c, steps, latents, actions = self.config, self.config.horizon, [z.sample(noise.imagined[:, 0])], []
        found: dict[str, Tensor] = {}
        if c.model_free:
            action = self._choose(latents[0], noise.chosen[:, 0], std)
            loss = -self._values(self.critic, latents[0], action).amin(1).mean(1)
        else:
            for t in range(steps):
                actions.append(self._choose(latents[-1].detach(), noise.chosen[:, t], std))
                latents.append(self._predict(latents[-1], actions[-1], frozen=True).sample(noise.imagined[:, t + 1]))
            with torch.no_grad():
                last = self._choose(latents[-1], noise.chosen[:, steps], std)
            start, action, end = torch.cat(latents[:-1], 1), torch.cat(actions, 1), torch.cat(latents[1:], 1)
            reward = self._reward(start, action)
            intrinsic = c.classifier_weight * self._logit(start, action, end.detach())
            value = self._values(self.critic, end, torch.cat([*actions[1:], last], 1).detach()).amin(1)
            rewards, values = (torch.unflatten(x, 1, (steps, -1)) for x in (reward + intrinsic, value))
            returns = lambda_returns(rewards, values, c.discount, c.trace)
            weights = c.discount ** torch.arange(steps, device=returns.device) / steps
            loss = -(returns.mean(2) * weights).sum(1)
            found = {"imagined_reward": reward.detach().mean(1), "intrinsic": intrinsic.detach().mean(1)}
        norm = self._step(loss, "actor")
        return found | {"actor_loss": loss.detach(), "actor_grad_norm": norm}

    # -- looking inside ----------------------------------------------------------------------------------------------

    def gradient_shares(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Return the norms, (S,), of what each term of the representation loss does to the encoder's last layer.

        Before clipping: `kl` as it is weighted, `reward`, `value` and all of them, `total`. The noise is that of a
        measurement at `step`. Nothing learns.
        """
        noise = self.noise(streams(self.seeds, "gradient shares", step))
        terms, weight = self.representation(batch, noise, self.std(step)), self._kl_weight()
        c = self.config
        losses = {"kl": c.horizon * weight * terms["kl"], "reward": -c.horizon * terms["reward"]}
        losses["value"] = -terms["value"]
        losses["total"] = torch.stack(list(losses.values())).sum(0)
        found = {}
        for name, loss in losses.items():
            loss.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
            last = [self.encoder._views[f"/2.{kind}"].grad for kind in ("kernel", "bias")]
            flat = torch.cat([cast(Tensor, grad).flatten(1) for grad in last], 1)
            found[name] = torch.linalg.vector_norm(flat, dim=1)
            for net in (self.encoder, self.model):
                cast(Tensor, net.flat.grad).zero_()
        return found

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _nets(self) -> dict[str, Net]:
        """Every network, those that never learn in this arm included: they are the same in all."""
        names = ("encoder", "model", "judge", "critic", "actor", "target_encoder", "target")
        return {name: getattr(self, name) for name in names}

    def state(self) -> dict[str, Any]:
        """Return everything that learning changes, as a flat dictionary of tensors."""
        state: dict[str, Any] = saved(self._nets(), self._optimisers)
        state |= {name: getattr(self, name).clone() for name in MOMENTS}
        return state | {"first": torch.tensor(-1 if self._first is None else self._first)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`, in place."""
        restore(state, self._nets(), self._optimisers)
        for name in MOMENTS:
            getattr(self, name).copy_(state[name])
        self._first = None if int(state["first"]) < 0 else int(state["first"])
