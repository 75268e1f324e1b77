"""MAD-TD: model-augmented data for temporal-difference learning (arXiv 2410.08896; `mad-td` 3).

    every agent step, with K minibatches of B replayed transitions (o, a, r, m, o'):
        for i in 0 .. K-1:
            if i == 0:  one step on encoder E and model M:  L_r + L_z + L_v + L_Q                    `update_model`
            the last alpha B rows become model data: a <- pi(z); z', r <- M(z, a)                       `mix`
            y = r + gamma min_j Qbar_j(z', pi(z'));  one step on the critics;  Qbar <- .99 Qbar + .01 Q `update_critic`
            one step on the actor:  - min_j Qbar_j(z, pi(z))                                            `update_actor`

Here z = E(o) and z' = E(o'). The encoder changes once per agent step, so the latents of all K minibatches are
computed together. The actor climbs the *target* critics; there is no target actor, no smoothing noise, no delay.
Masks multiply losses and targets always bootstrap: the last transition of an episode is ignored (`mad-td` 3.7).

Shapes: S seeds, K minibatches, B rows, L latent width, 2 critics, N bins. Losses and means are per seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dynarep.configs.mad_td import MadTDConfig
from dynarep.nets import Adam, HLGauss, Net, Spec, log_simnorm, mish, simnorm, uniform_fan_in

Batch = Mapping[str, Tensor]
EVEN = 32  # rows evaluated at a time are a multiple of this, see nets.py on block invariance


class MadTD:
    """MAD-TD for a block of seeds.

    Args:
        config: hyperparameters.
        obs_size: length of an observation.
        action_size: length of an action in [-1, 1].
        seeds: the run seeds trained together, S of them.
    """

    def __init__(self, config: MadTDConfig, obs_size: int, action_size: int, seeds: Sequence[int]) -> None:
        self.config, self.seeds = config, list(seeds)
        w, norm = config.width, config.layer_norm
        encoder = Spec((obs_size, w, w), mish, norm, norm_output=True)
        dynamics = Spec((w + action_size, w, w, w), mish, norm, norm_output=True)
        reward = Spec((w + action_size, w, w, 1), mish, norm)
        critic = Spec((w + action_size, w, w, config.bins), mish, norm)
        actor = Spec((w, w, w, action_size), mish, norm)

        self.encoder = Net("encoder", {"": encoder}, seeds, uniform_fan_in)
        self.model = Net("model", {"dynamics": dynamics, "reward": reward}, seeds, uniform_fan_in)
        self.critic = Net("critic", {"": critic}, seeds, uniform_fan_in, members=2)
        self.actor = Net("actor", {"": actor}, seeds, uniform_fan_in)
        self.target = self.critic.target()
        self.values = HLGauss(config.bins, -config.value_limit, config.value_limit, config.sigma, config.zero_prior)

        self._optimisers = {
            "encoder": Adam(self.encoder, config.lr_encoder, config.clip),
            "model": Adam(self.model, config.lr, config.clip),
            "critic": Adam(self.critic, config.lr, config.clip),
            "actor": Adam(self.actor, config.lr, config.clip),
        }

    # -- forward passes ------------------------------------------------------------------------------------------

    def encode(self, obs: Tensor) -> Tensor:
        """Observations (S, B, o) -> latents (S, B, L)."""
        return simnorm(self.encoder(obs), self.config.simnorm_group)

    def policy(self, latent: Tensor) -> Tensor:
        """Latents (S, B, L) -> actions (S, B, a) in [-1, 1], deterministic."""
        return self.actor(latent).tanh()

    def imagine(self, latent: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """One model step: log of the next latent (S, B, L) and the reward (S, B)."""
        x = torch.cat([latent, action], -1)
        return log_simnorm(self.model(x, "dynamics"), self.config.simnorm_group), self.model(x, "reward").squeeze(-1)

    def q_log(self, critic: Net, latent: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        """Log-probabilities of both critics' value histograms, (S, 2, B, N)."""
        return self.values.log_probabilities(critic(torch.cat([latent, action], -1), frozen=frozen))

    def q(self, critic: Net, latent: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        """Values of both critics, (S, 2, B)."""
        return self.values.expect(critic(torch.cat([latent, action], -1), frozen=frozen))

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Noise-free actions (S, B, a) for observations (S, B, o)."""
        return self.policy(self.encode(obs))

    # -- learning ------------------------------------------------------------------------------------------------

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Learn from one agent step's K minibatches.

        Args:
            batch: obs (S, K, B, o), action (S, K, B, a), reward (S, K, B), next_obs (S, K, B, o), mask (S, K, B);
                the mask is 0 at the end of an episode of either kind.

        Returns:
            Losses of the first minibatch, each (S,): what the reference logs (`mad-td` 3.9).
        """
        losses: dict[str, Tensor] = {}
        repeats = batch["obs"].shape[1]
        z = next_z = None
        for i in range(repeats):
            rows = {name: values[:, i] for name, values in batch.items()}
            if i == 0 or not self.config.slow_model:
                terms = self.update_model(rows)
                losses = losses or terms
                z = next_z = None
            if z is None or next_z is None:
                z, next_z = self._encode_from(batch["obs"], i), self._encode_from(batch["next_obs"], i)
            critic_loss = self.update_critic(z[:, i], next_z[:, i], rows)
            if i == 0 or not self.config.slow_actor:
                actor_loss = self.update_actor(z[:, i])
            if i == 0:
                losses |= {"critic_loss": critic_loss, "actor_loss": actor_loss}
        return losses

    @torch.no_grad()
    def _encode_from(self, obs: Tensor, i: int) -> Tensor:
        """Latents (S, K, B, L) of minibatches i.. (of minibatch i alone if the encoder changes in every update)."""
        last = obs.shape[1] if self.config.slow_model else i + 1
        latents = self.encode(obs[:, i:last].flatten(1, 2))
        out = latents.new_empty(*obs.shape[:-1], latents.shape[-1])
        out[:, i:last] = torch.unflatten(latents, 1, (last - i, obs.shape[2]))
        return out

    def update_model(self, rows: Batch) -> dict[str, Tensor]:
        """One step on encoder and model, on real rows only (`mad-td` 3.6); returns the loss terms, each (S,)."""
        c, mask = self.config, rows["mask"]
        with torch.no_grad():
            next_z = self.encode(rows["next_obs"])
            next_a = self.policy(next_z)
            target_log = self.q_log(self.target, next_z, next_a)
            target_p = target_log.exp()
            y = rows["reward"] + c.discount * (target_p * self.values.centres).sum(-1).amin(1)
            consistent = (1 - c.label_smoothing) * next_z + c.label_smoothing / c.simnorm_group

        z = self.encode(rows["obs"])
        log_next, reward = self.imagine(z, rows["action"])
        terms = {
            "reward_loss": (mask * (rows["reward"] - reward).square()).mean(-1),
            "model_loss": -(mask * (consistent * log_next).mean(-1)).mean(-1),
        }
        if c.value_aware_loss:  # the frozen target critics must not tell the imagined next latent from the real one
            imagined = self.q_log(self.target, log_next.exp(), next_a, frozen=True)
            terms["vaml_loss"] = -(mask * (target_p * imagined).mean(-1).mean(1)).mean(-1)
        if c.critic_shapes_encoder:  # summed over critics, where L_v is a mean: both as in the reference
            online = self.q_log(self.critic, z, rows["action"], frozen=True)
            terms["model_critic_loss"] = self.cross_entropy(y, online, mask)
        total: Tensor = sum(terms.values(), start=torch.zeros(()))
        total.sum().backward()  # type: ignore[no-untyped-call]
        self._optimisers["encoder"].step()
        self._optimisers["model"].step()
        return {name: term.detach() for name, term in (terms | {"total_loss": total}).items()}

    def cross_entropy(self, y: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
        """Mean over rows and bins, sum over critics, of the cross-entropy to HL-Gauss(y), (S,)."""
        per_row = (self.values.encode(y).unsqueeze(1) * log_q).mean(-1)
        return -(mask.unsqueeze(1) * per_row).mean(-1).sum(-1)

    @torch.no_grad()
    def mix(self, z: Tensor, next_z: Tensor, rows: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Replace the last rows by model data: action, reward and next latent of the mixed batch (`mad-td` 3.7)."""
        size, real = z.shape[1], self.config.real_rows()
        if real == size:
            return rows["action"], rows["reward"], next_z
        # At least `EVEN` rows are evaluated and the surplus dropped: odd sizes would make bytes depend on the block.
        first = max(0, size - -(-(size - real) // EVEN) * EVEN)
        start = z[:, first:]
        action = self.policy(start)
        log_next, reward = self.imagine(start, action)
        skip = real - first
        return (
            torch.cat([rows["action"][:, :real], action[:, skip:]], 1),
            torch.cat([rows["reward"][:, :real], reward[:, skip:]], 1),
            torch.cat([next_z[:, :real], log_next.exp()[:, skip:]], 1),
        )

    @torch.no_grad()
    def td_target(self, reward: Tensor, next_z: Tensor) -> Tensor:
        """Return y = r + gamma min_j Qbar_j(z', pi(z')), (S, B); never cut at episode ends."""
        return reward + self.config.discount * self.q(self.target, next_z, self.policy(next_z)).amin(1)

    def update_critic(self, z: Tensor, next_z: Tensor, rows: Batch) -> Tensor:
        """One step on the critics, then on their moving average; returns L_c, (S,) (`mad-td` 3.7)."""
        action, reward, next_z = self.mix(z, next_z, rows)
        y = self.td_target(reward, next_z)
        loss = self.cross_entropy(y, self.q_log(self.critic, z, action), rows["mask"])
        loss.sum().backward()  # type: ignore[no-untyped-call]
        self._optimisers["critic"].step()
        self.target.follow(self.critic, self.config.target_rate)
        return loss.detach()

    def update_actor(self, z: Tensor) -> Tensor:
        """One step on the actor, on all rows, unmasked; returns L_pi, (S,) (`mad-td` 3.8)."""
        loss = -self.q(self.target, z, self.policy(z), frozen=True).amin(1).mean(-1)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        self._optimisers["actor"].step()
        return loss.detach()

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _nets(self) -> dict[str, Net]:
        return {"encoder": self.encoder, "model": self.model, "critic": self.critic, "actor": self.actor}

    def state(self) -> dict[str, Any]:
        """Return everything that learning changes, as a flat dictionary of tensors."""
        state = {name: net.flat.detach().clone() for name, net in self._nets().items()}
        state["target"] = self.target.flat.clone()
        for name, optimiser in self._optimisers.items():
            state |= {f"adam/{name}/{key}": value for key, value in optimiser.state().items()}
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`, in place."""
        for name, net in (self._nets() | {"target": self.target}).items():
            net.flat.copy_(state[name])
        for name, optimiser in self._optimisers.items():
            prefix = f"adam/{name}/"
            optimiser.load({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
