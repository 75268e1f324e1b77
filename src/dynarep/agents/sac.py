"""SAC: soft actor-critic as in the STFL code (`ftfl` 3.1), alone or as the learner inside MBPO and FTFL.

    every agent step, K times, with B transitions (s, a, r, m, s'):                                            `update`
        y = r + gamma m (min_j Qbar_j(s', a') - alpha log pi(a'|s')),  a' ~ pi(s')
        one Adam step on the critics:     sum_j mean_b (Q_j(s, a) - y)^2;   Qbar <- .995 Qbar + .005 Q
        one Adam step on the actor:       mean_b [alpha log pi(a|s) - min_j Q_j(s, a)],  a ~ pi(s), the new Q
        one Adam step on log alpha:       alpha (H - H_target),  H = - mean_b log pi(a|s) of the step just made

All three losses use the alpha of before the update; H_target = -|A| / 2. The policy is a Gaussian squashed by tanh:
a = tanh(u), u = mean + std * noise, log std = -10 + 6 (1 + tanh(raw)), which lies in [-10, 2]. m = 0 only where an
episode truly terminated.

Shapes: S seeds, B rows, o and a lengths of observation and action, 2 critics. Losses and means are per seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dynarep.configs.sac import SACConfig
from dynarep.initialisers import halves, orthogonal
from dynarep.nets import Adam, Net, Scalar, Spec
from dynarep.replay import Replay, draw
from dynarep.streams import stream

Batch = Mapping[str, Tensor]
Generators = Sequence[np.random.Generator]
EVEN = 32  # rows evaluated at a time are a multiple of this, see nets.py on block invariance
LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0  # [code]
LAYER_NORM = 1e-6  # [code] Flax's default epsilon
GAIN = math.sqrt(2.0)  # [code] of every kernel but the log-std head's, which has 1


class SAC:
    """Soft actor-critic for a block of seeds.

    Args:
        config: hyperparameters.
        obs_size: length of an observation.
        action_size: length of an action in [-1, 1].
        seeds: the run seeds trained together, S of them.
        task: not used; agents with a model of the task want its name.
    """

    def __init__(
        self, config: SACConfig, obs_size: int, action_size: int, seeds: Sequence[int], task: str = ""
    ) -> None:
        c = self.config = config
        self.seeds, self.action_size = list(seeds), action_size
        self.target_entropy = c.target_entropy * action_size
        hidden = [c.width] * c.hidden_layers
        actor = Spec((obs_size, *hidden, 2 * action_size), torch.relu_)
        critic = Spec((obs_size + action_size, *hidden, 1), torch.relu_, LAYER_NORM if c.critic_layer_norm else None)

        heads = halves(orthogonal(GAIN), orthogonal(1.0))
        self.actor = Net("actor", {"": actor}, seeds, orthogonal(GAIN), head=heads)
        self.critic = Net("critic", {"": critic}, seeds, orthogonal(GAIN), members=2)
        self.target = self.critic.target()
        self._log_temperature = Scalar(math.log(c.initial_temperature), len(self.seeds))
        self._optimisers = {
            "actor": Adam(self.actor, c.lr),
            "critic": Adam(self.critic, c.lr),
            "temperature": Adam(self._log_temperature, c.lr),
        }

    # -- acting --------------------------------------------------------------------------------------------------

    @property
    def temperature(self) -> Tensor:
        """The entropy's weight alpha, (S,)."""
        return self._log_temperature.flat.exp()[:, 0]

    def explore(self, obs: Tensor, step: int) -> Tensor:
        """Return sampled actions (S, a) for one observation per seed, (S, o), at agent step `step`."""
        return self.log_prob_sample(obs.unsqueeze(1), self._streams("explore", step))[0].squeeze(1)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Return noise-free actions tanh(mean), (S, B, a), for observations (S, B, o)."""
        return self.policy(_even(obs))[0][:, : obs.shape[1]].tanh()

    @torch.no_grad()
    def log_prob_sample(self, obs: Tensor, generators: Generators) -> tuple[Tensor, Tensor]:
        """Return sampled actions (S, B, a) and their log-probabilities (S, B) for observations (S, B, o)."""
        size = obs.shape[1]
        action, log_prob = self.sample(_even(obs), _even(self._normal(generators, size)))
        return action[:, :size], log_prob[:, :size]

    @torch.no_grad()
    def q(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return the smaller of both critics' values, (S, B), of observations (S, B, o) and actions (S, B, a)."""
        return self.values(self.critic, _even(obs), _even(action)).amin(1)[:, : obs.shape[1]]

    # -- forward passes ------------------------------------------------------------------------------------------

    def policy(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Observations (S, B, o) -> mean and log std of the Gaussian before the tanh, each (S, B, a)."""
        mean, raw = self.actor(obs).chunk(2, -1)
        return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (1.0 + raw.tanh())

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the actions (S, B, a) that standard normal `noise` (S, B, a) makes, and log pi(a|s), (S, B).

        log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)), which is finite where tanh rounds to 1.
        """
        mean, log_std = self.policy(obs)
        u = torch.addcmul(mean, log_std.exp(), noise)
        gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
        squash = 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))
        return u.tanh(), (gaussian - squash).sum(-1)

    def values(self, critic: Net, obs: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        """Values of both critics, (S, 2, B)."""
        return critic(torch.cat([obs, action], -1), frozen=frozen).squeeze(-1)

    # -- learning ------------------------------------------------------------------------------------------------

    def learn(self, replay: Replay, step: int, simulate: object = None) -> dict[str, Tensor]:
        """Make the updates of agent step `step` from `replay`; returns what `update` says of the last one."""
        c, noise = self.config, self._streams("noise", step)
        rows = replay.rows(draw(self._streams("replay", step), replay.size, (c.updates_per_step, c.batch_size)))
        for k in range(c.updates_per_step):
            terms = self.update({name: values[:, k] for name, values in rows.items()}, self.noise(noise))
        return terms

    def noise(self, generators: Generators) -> tuple[Tensor, Tensor]:
        """Draw the noise of one update: of the actions in the critics' target and in the actor's loss, (S, B, a)."""
        return self._normal(generators, self.config.batch_size), self._normal(generators, self.config.batch_size)

    def update(self, batch: Batch, noise: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Make one update: critics, target critics, actor, temperature.

        Args:
            batch: obs (S, B, o), action (S, B, a), reward (S, B), next_obs (S, B, o), mask (S, B); B a multiple of 32.
            noise: of the next action and of the actor's, each (S, B, a); see `noise`.

        Returns:
            Each (S,), at the parameters of before the respective step: `critic_loss`, `actor_loss`, `temperature_loss`;
            `q1`, the mean of critic 1; `entropy` H; `temperature` alpha; `reward`, the minibatch's mean;
            `critic_grad_norm`, `actor_grad_norm`.
        """
        alpha = self.temperature
        y = self.td_target(batch, noise[0], alpha)
        terms = self._update_critic(batch, y)
        self.target.follow(self.critic, self.config.target_rate)
        terms |= self._update_actor(batch["obs"], noise[1], alpha)
        terms["temperature_loss"] = self._update_temperature(terms["entropy"], alpha)
        return terms | {"temperature": alpha, "reward": batch["reward"].mean(-1)}

    @torch.no_grad()
    def td_target(self, batch: Batch, noise: Tensor, alpha: Tensor) -> Tensor:
        """Return y = r + gamma m (min_j Qbar_j(s', a') - alpha log pi(a'|s')), (S, B)."""
        action, log_prob = self.sample(batch["next_obs"], noise)
        value = self.values(self.target, batch["next_obs"], action).amin(1) - alpha.unsqueeze(1) * log_prob
        return batch["reward"] + self.config.discount * batch["mask"] * value

    def _update_critic(self, batch: Batch, y: Tensor) -> dict[str, Tensor]:
        q = self.values(self.critic, batch["obs"], batch["action"])
        loss = (q - y.unsqueeze(1)).square().mean(-1).sum(1)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        norm = self._optimisers["critic"].step()
        return {"critic_loss": loss.detach(), "critic_grad_norm": norm, "q1": q.detach()[:, 0].mean(-1)}

    def _update_actor(self, obs: Tensor, noise: Tensor, alpha: Tensor) -> dict[str, Tensor]:
        action, log_prob = self.sample(obs, noise)
        value = self.values(self.critic, obs, action, frozen=True).amin(1)
        loss = (alpha.unsqueeze(1) * log_prob - value).mean(-1)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        norm = self._optimisers["actor"].step()
        return {"actor_loss": loss.detach(), "actor_grad_norm": norm, "entropy": -log_prob.detach().mean(-1)}

    def _update_temperature(self, entropy: Tensor, alpha: Tensor) -> Tensor:
        loss = alpha * (entropy - self.target_entropy)
        assert self._log_temperature.flat.grad is not None
        self._log_temperature.flat.grad[:, 0] = loss  # the derivative of exp(lambda) c by lambda is exp(lambda) c
        self._optimisers["temperature"].step()
        return loss

    # -- randomness ----------------------------------------------------------------------------------------------

    def _streams(self, purpose: str, step: int) -> list[np.random.Generator]:
        return [stream(seed, purpose, step) for seed in self.seeds]

    def _normal(self, generators: Generators, size: int) -> Tensor:
        shape = (size, self.action_size)
        return torch.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators]))

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _parts(self) -> dict[str, Net | Scalar]:
        """Everything that learning changes beside the optimisers."""
        nets = {"actor": self.actor, "critic": self.critic, "target": self.target}
        return nets | {"temperature": self._log_temperature}

    def state(self) -> dict[str, Any]:
        """Return everything that learning changes, as a flat dictionary of tensors."""
        state = {name: part.flat.detach().clone() for name, part in self._parts().items()}
        for name, optimiser in self._optimisers.items():
            state |= {f"adam/{name}/{key}": value for key, value in optimiser.state().items()}
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`, in place."""
        for name, part in self._parts().items():
            part.flat.copy_(state[name])
        for name, optimiser in self._optimisers.items():
            prefix = f"adam/{name}/"
            optimiser.load({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def _even(x: Tensor) -> Tensor:
    """Pad rows (S, B, d) with zeros to a multiple of `EVEN`."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % EVEN))
