"""TD-MPC2: a latent model trained on short slices, searched at every step (arXiv 2310.16828; `baselines` B).

    every agent step, with B slices of H + 1 observations o_0 .. o_H:                                          `update`
        zbar_t = h(o_t), y_t = r_t + gamma min_2 Qbar(zbar_t+1, a'),  a' ~ pi(zbar_t+1)
        z_0 = h(o_0), z_t+1 = d(z_t, a_t);  one step on h, d, R, Q together, gradients through the rollout:
            1/H sum_t rho^t [20 |z_t+1 - zbar_t+1|^2 + .1 CE(R(z_t, a_t), r_t) + .1 mean_q CE(Q_q(z_t, a_t), y_t)]
        s <- running scale of the values;  one step on pi, on the same latents:
            1/(H+1) sum_t rho^t [- mean_2 Q(z_t, a) / s - 1e-4 entropy],  a ~ pi(z_t)
        Qbar <- .99 Qbar + .01 Q
    to act, search H actions by what model and critics say of them                                             mppi.py

min_2 and mean_2 are over two Q-functions drawn at random. R and Q are two-hot in symlog space (`two_hot.py`). The
learner sees finished episodes alone, and slices never cross an episode's end. Targets always bootstrap: tasks that
truly terminate would need the reference's episodic mode, which is not here.

The agent step at which learning begins is random too; after it come as many updates at once as there were random steps
(`baselines` B.5). Evaluations search with noise of their own and without noise on what is found (`Player`).

Shapes: S seeds, B slices, H steps, o, a, L lengths of observation, action, latent, E Q-functions, N bins. Losses are
per seed; time is the axis after the seed's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynarep import process
from dynarep.activations import mish, simnorm
from dynarep.agents.mppi import Planner, Player, pairs
from dynarep.agents.squashed import log_std
from dynarep.configs.td_mpc2 import TDMPC2Config
from dynarep.initialisers import Initialiser
from dynarep.nets import Net, Spec, even
from dynarep.optimisers import Adam, restore, saved
from dynarep.placement import here
from dynarep.replay import Replay, draw_slices
from dynarep.streams import streams
from dynarep.two_hot import TwoHot

Batch = Mapping[str, Tensor]
Generators = Sequence[np.random.Generator]
MODEL = ("encoder", "model", "critic")  # clipped together


class Noise(NamedTuple):
    """The random numbers of one update.

    Attributes:
        target: standard normals (S, H, B, a) of the targets' actions; `target_pair` the two Q-functions (S, 2).
        policy: (S, H + 1, B, a) and `policy_pair` (S, 2), of the policy's step.
        dropped: factors of the Q-functions' first layers, (S, E, H B, width) in the model's step, (S, 2, (H + 1) B,
            width) in the policy's; None without dropout.
    """

    target: Tensor
    target_pair: Tensor
    policy: Tensor
    policy_pair: Tensor
    dropped: tuple[Tensor, Tensor] | None = None


def normal_kernels(std: float) -> Initialiser:
    """Return the initialiser of normal kernels."""
    return lambda rng, fan_in, fan_out: rng.normal(0.0, std, (fan_in, fan_out))


def zero_kernels(rng: np.random.Generator, fan_in: int, fan_out: int) -> np.ndarray:
    """Return a kernel of zeros."""
    return np.zeros((fan_in, fan_out))


class TDMPC2:
    """TD-MPC2 for a block of seeds.

    Args:
        config: hyperparameters; its discount, where there is none, follows from `episode_steps`.
        obs_size: length of an observation.
        action_size: length of an action in [-1, 1].
        seeds: the run seeds trained together, S of them.
        task: not used; agents with a model of the task want its name.
        episode_steps: agent steps of an episode.
        starts: agent steps before each episode of a seed, the last of which is under way; the protocol adds to it.

    Attributes:
        encoder, model, critic, actor: the networks; the model's branches are dynamics and reward.
        target: the moving average of the Q-functions.
        scale: the running scale of values, (S,).
    """

    def __init__(
        self,
        config: TDMPC2Config,
        obs_size: int,
        action_size: int,
        seeds: Sequence[int],
        task: str = "",
        episode_steps: int = 500,
        starts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        c = self.config = config.model_copy(update={"discount": config.discount_of(episode_steps)})
        self.seeds, self.action_size = list(seeds), action_size
        self.starts = [[0] for _ in seeds] if starts is None else starts
        w, za = c.width, c.latent + action_size
        start = normal_kernels(c.init_std)

        def spec(*sizes: int, norm_output: bool = False) -> Spec:
            return Spec(sizes, mish, c.layer_norm, norm_output=norm_output)

        self.encoder = Net("encoder", {"": spec(obs_size, c.encoder_width, c.latent, norm_output=True)}, seeds, start)
        branches = {"dynamics": spec(za, w, w, c.latent, norm_output=True), "reward": spec(za, w, w, c.bins)}
        self.model = Net("model", branches, seeds, start)
        self.critic = Net("critic", {"": spec(za, w, w, c.bins)}, seeds, start, members=c.critics, head=zero_kernels)
        self.actor = Net("actor", {"": spec(c.latent, w, w, 2 * action_size)}, seeds, start)
        with torch.no_grad():
            self.model.parameter("reward/2.kernel").zero_()
        self.target = self.critic.target()
        device = process.device()
        self.scale = torch.ones(len(self.seeds), device=device)
        self.values = TwoHot(c.bins, c.bins_limit)
        self._optimisers = {
            "encoder": Adam(self.encoder, c.lr * c.encoder_lr_factor),
            "model": Adam(self.model, c.lr),
            "critic": Adam(self.critic, c.lr),
            "actor": Adam(self.actor, c.lr, eps=c.policy_epsilon),
        }
        assert c.discount is not None
        self.discount = c.discount
        self.planner = Planner(self)
        steps = torch.arange(c.horizon + 1, device=device)
        self._weights = {n: (c.rho ** steps[:n] / n).unsqueeze(1) for n in (c.horizon, c.horizon + 1)}  # rho^t / n
        self._learning = False  # whether learning has begun
        self._means = torch.zeros(len(self.seeds), c.horizon, action_size, device=device)  # of the search before
        self._searched = [0] * len(self.seeds)  # the number of the episode that it was made in; 0: of none

    # -- acting --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def explore(self, obs: Tensor, step: int) -> Tensor:
        """Return actions (S, a) for one observation per seed, (S, o), at agent step `step`; random before learning."""
        c, generators = self.config, self._streams("explore", step)
        if not self._learning:
            return here(np.stack([g.uniform(-1, 1, self.action_size).astype(np.float32) for g in generators]))
        if not c.planner:
            noise = np.stack([g.standard_normal((1, self.action_size), np.float32) for g in generators])
            return self.sample(self.encode(even(obs.unsqueeze(1))), even(here(noise)))[:, 0]
        episodes = [len(own) for own in self.starts]
        warm = np.array([now == before for now, before in zip(episodes, self._searched, strict=True)])
        before = torch.where(here(warm).view(-1, 1, 1), self._means, 0.0)
        action, self._means = self.planner.search(obs, before, self.planner.noise(generators, explore=True))
        self._searched = episodes
        return action

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Return the policy's noise-free actions tanh(mean), (S, B, a), for observations (S, B, o)."""
        return self.policy(self.encode(even(obs)))[0][:, : obs.shape[1]].tanh()

    def player(self, at: int) -> Player | None:
        """Return who plays the noise-free episodes of evaluation `at`: the planner; None: whoever calls `act`."""
        return Player(self, at) if self.config.planner else None

    @torch.no_grad()
    def q(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return the mean value of all Q-functions, (S, B), of observations (S, B, o) and actions (S, B, a) (ours).

        The reference means two at random, whose expectation this is.
        """
        logits = self.critic((self.encode(even(obs)), even(action)))
        return self.values.decode(logits).mT.contiguous().mean(-1)[:, : obs.shape[1]]

    # -- forward passes ------------------------------------------------------------------------------------------

    def encode(self, obs: Tensor) -> Tensor:
        """Observations (S, B, o) -> latents (S, B, L)."""
        return simnorm(self.encoder(obs), self.config.simnorm_group)

    def imagine(self, z: Tensor, action: Tensor) -> Tensor:
        """Latents (S, B, L) and actions (S, B, a) -> next latents."""
        return simnorm(self.model((z, action), "dynamics"), self.config.simnorm_group)

    def policy(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (S, B, L) -> mean and log std before the tanh, each (S, B, a)."""
        mean, raw = self.actor(z).chunk(2, -1)
        return mean, log_std(raw.tanh())

    def sample(self, z: Tensor, noise: Tensor) -> Tensor:
        """Return the policy's actions (S, B, a)."""
        mean, log_deviation = self.policy(z)
        return (mean + log_deviation.exp() * noise).tanh()

    def two(self, net: Net, pair: Tensor, z: Tensor, action: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Return the values of two Q-functions, (S, 2, B), numbers `pair` (S, 2) of every seed's; see `Net.some`."""
        return self.values.decode(net.some(pair)((z, action), frozen=True, dropped=dropped))

    # -- learning ------------------------------------------------------------------------------------------------

    def learn(self, replay: Replay, step: int, simulate: object = None) -> dict[str, Tensor]:
        """Make the updates of agent step `step`; returns what `update` says of the last one.

        Args:
            replay: transitions obs, action, reward, next_obs of the agent steps so far, that of this step included.
            step: agent step, from 0.
            simulate: not used.
        """
        c = self.config
        if replay.size < c.horizon:
            return {}
        updates = step if c.pretrain and not self._learning else c.updates_per_step
        self._learning = True
        for i in range(updates):
            generators = self._streams("learn", step, i)
            stored = step + 1 - replay.size, step + 1
            first = draw_slices(generators, self.starts, stored, c.horizon, c.batch_size)
            places = torch.from_numpy(first[:, None] + np.arange(c.horizon)[:, None]) % replay.capacity
            rows = replay.rows(places)
            batch = {"obs": torch.cat([rows["obs"], rows["next_obs"][:, -1:]], 1)}
            terms = self.update(batch | {k: rows[k] for k in ("action", "reward")}, self.noise(generators))
        return terms

    def noise(self, generators: Generators) -> Noise:
        """Draw the random numbers of one update."""
        c, a = self.config, self.action_size

        def normals(steps: int) -> Tensor:
            return here(np.stack([g.standard_normal((steps, c.batch_size, a), np.float32) for g in generators]))

        def kept(members: int, steps: int) -> Tensor:
            shape = members, steps * c.batch_size, c.width
            keep = np.stack([g.random(shape, np.float32) >= c.dropout for g in generators])
            return here(keep.astype(np.float32)) / (1.0 - c.dropout)

        target, target_pair = normals(c.horizon), pairs(generators, c.critics)
        policy, policy_pair = normals(c.horizon + 1), pairs(generators, c.critics)
        dropped = (kept(c.critics, c.horizon), kept(2, c.horizon + 1)) if c.dropout else None
        return Noise(target, here(target_pair), policy, here(policy_pair), dropped)

    def update(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """Make one update.

        Args:
            batch: obs (S, H + 1, B, o), action (S, H, B, a), reward (S, H, B).
            noise: see `Noise`.

        Returns:
            Each (S,): `consistency_loss`, `reward_loss`, `value_loss`, `total_loss`, `grad_norm` before clipping,
            `actor_loss`, `actor_grad_norm`, `entropy`, `scaled_entropy`, `scale`; `q1`, the mean of the first
            Q-function where slices begin, and `reward`, the mean there.
        """
        with torch.no_grad():
            next_z = self._each(self.encode, batch["obs"][:, 1:])
            y = self.td_target(batch["reward"], next_z, noise)
        latents, terms = self._update_model(batch, next_z, y, noise)
        terms |= self._update_actor(latents, noise)
        self.target.follow(self.critic, self.config.rate)
        return terms | {"reward": batch["reward"][:, 0].mean(-1)}

    @staticmethod
    def _each(function: Any, x: Tensor) -> Tensor:
        """Apply a function of rows (S, B, .) at every time of (S, T, B, .)."""
        out: Tensor = function(x.flatten(1, 2))
        return torch.unflatten(out, 1, x.shape[1:3])

    @torch.no_grad()
    def td_target(self, reward: Tensor, next_z: Tensor, noise: Noise) -> Tensor:
        """Return y = r + gamma min_2 Qbar(z', pi(z')), (S, H, B)."""
        z = next_z.flatten(1, 2)
        action = self.sample(z, noise.target.flatten(1, 2))
        least = self.two(self.target, noise.target_pair, z, action).amin(1)
        return reward + self.discount * torch.unflatten(least, 1, reward.shape[1:])

    def _update_model(self, batch: Batch, next_z: Tensor, y: Tensor, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one step on encoder, model and critics; returns the rollout's latents (S, H + 1, B, L) and losses."""
        c, action = self.config, batch["action"]
        steps, weights = action.shape[1], self._weights[action.shape[1]]
        latents = [self.encode(batch["obs"][:, 0])]
        for t in range(steps):
            latents.append(self.imagine(latents[-1], action[:, t]))
        zs = torch.stack(latents, 1)
        z, actions = zs[:, :-1].flatten(1, 2), action.flatten(1, 2)
        by_time = (steps, action.shape[2])
        rewards = torch.unflatten(self.model((z, actions), "reward"), 1, by_time)
        logits = self.critic((z, actions), dropped=noise.dropped[0] if noise.dropped else None)
        values = torch.unflatten(logits, 2, by_time)  # (S, E, H, B, N)
        terms = {
            "consistency_loss": ((zs[:, 1:] - next_z).square().mean(-1) * weights).mean(2).sum(1),
            "reward_loss": (self.values.cross_entropy(rewards, batch["reward"]) * weights).mean(2).sum(1),
            "value_loss": (self.values.cross_entropy(values, y.unsqueeze(1)) * weights).mean(3).sum(2).mean(1),
        }
        factors = {"consistency_loss": c.consistency, "reward_loss": c.reward, "value_loss": c.value}
        total = sum((factors[name] * term for name, term in terms.items()), start=zs.new_zeros(()))
        total.sum().backward()  # type: ignore[no-untyped-call]
        norm = self._clip(*MODEL)
        for name in MODEL:
            self._optimisers[name].step()
        terms = {name: term.detach() for name, term in terms.items()}
        first = self.values.decode(values[:, 0, 0].detach()).mean(-1)
        return zs.detach(), terms | {"total_loss": total.detach(), "grad_norm": norm, "q1": first}

    def _update_actor(self, zs: Tensor, noise: Noise) -> dict[str, Tensor]:
        """Take one step of the policy up the scaled values, on the latents of the model's step."""
        c, (steps, rows) = self.config, zs.shape[1:3]
        z, eps = zs.flatten(1, 2), noise.policy.flatten(1, 2)
        mean, log_deviation = self.policy(z)
        action = (mean + log_deviation.exp() * eps).tanh()
        gaussian = (-0.5 * eps.square() - log_deviation - 0.5 * math.log(2.0 * math.pi)).sum(-1)
        squash = (torch.relu(1.0 - action.square()) + 1e-6).log().sum(-1)
        entropy, scaled = squash - gaussian, -self.action_size * gaussian
        if c.entropy_form == "published":
            scaled = scaled + squash
        both = self.two(self.critic, noise.policy_pair, z, action, noise.dropped[1] if noise.dropped else None)
        q = torch.unflatten(0.5 * (both[:, 0] + both[:, 1]), 1, (steps, rows))
        self._update_scale(q[:, 0].detach())
        gain = q / self.scale.view(-1, 1, 1) + c.entropy * torch.unflatten(scaled, 1, (steps, rows))
        loss = -(gain * self._weights[steps]).mean(2).sum(1)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        norm = self._clip("actor")
        self._optimisers["actor"].step()
        found = {"actor_loss": loss.detach(), "actor_grad_norm": norm, "scale": self.scale.clone()}
        return found | {"entropy": entropy.detach().mean(-1), "scaled_entropy": scaled.detach().mean(-1)}

    def _update_scale(self, q: Tensor) -> None:
        """Follow the distance of the 5th and 95th percentile of values (S, B), at least 1."""
        low, high = (torch.quantile(q, share, dim=1) for share in (0.05, 0.95))
        self.scale = self.scale + self.config.rate * ((high - low).clamp(min=1.0) - self.scale)

    def _clip(self, *names: str) -> Tensor:
        """Clip the gradient norm of networks together, of each seed; returns it from before, (S,)."""
        norm = torch.stack([self._optimisers[name].norm() for name in names]).square().sum(0).sqrt()
        factor = (self.config.clip / (norm + 1e-6)).clamp(max=1.0).unsqueeze(1)  # [code] as PyTorch clips
        for name in names:
            grad = self._optimisers[name].net.flat.grad
            assert grad is not None
            grad.view(len(self.seeds), -1).mul_(factor)
        return norm

    # -- randomness ----------------------------------------------------------------------------------------------

    def _streams(self, purpose: str, *step: int) -> list[np.random.Generator]:
        return streams(self.seeds, purpose, *step)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _nets(self) -> dict[str, Net]:
        nets = {"encoder": self.encoder, "model": self.model, "critic": self.critic, "actor": self.actor}
        return nets | {"target": self.target}

    def state(self) -> dict[str, Any]:
        """Return everything that learning and searching change, as a flat dictionary of tensors."""
        plan = {"plan/means": self._means.clone(), "plan/searched": torch.tensor(self._searched)}
        others = {"scale": self.scale.clone(), "learning": torch.tensor(self._learning)}
        return saved(self._nets(), self._optimisers) | others | plan

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`, in place."""
        restore(state, self._nets(), self._optimisers)
        self.scale.copy_(state["scale"])
        self._means.copy_(state["plan/means"])
        self._searched, self._learning = state["plan/searched"].tolist(), bool(state["learning"])
