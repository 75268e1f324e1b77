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

Where the environment reports in other units than the task's own (`configs.Units`, ours), the networks see the task's
own: o / units.obs and r / units.reward. So the learner cannot tell in which units it is told; a model can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynarep import process
from dynarep.agents.squashed import Choice, choose, log_std, policy_slope
from dynarep.configs import Units
from dynarep.configs.sac import SACConfig
from dynarep.initialisers import halves, orthogonal
from dynarep.nets import Net, Spec, Tape, even
from dynarep.optimisers import Adam, Scalar, restore, saved
from dynarep.replay import Replay, draw, normal
from dynarep.streams import streams

Batch = Mapping[str, Tensor]
Generators = Sequence[np.random.Generator]
LAYER_NORM = 1e-6  # [code] Flax's default epsilon
OWN = Units()  # the environment reports in the task's own units
GAIN = math.sqrt(2.0)  # [code] of every kernel but the log-std head's, which has 1


class SAC:
    """Soft actor-critic for a block of seeds.

    Args:
        config: hyperparameters.
        obs_size: length of an observation.
        action_size: length of an action in [-1, 1].
        seeds: the run seeds trained together, S of them.
        task: not used; agents with a model of the task want its name.
        units: what one of the task's own units is called in what the environment reports. Every method takes what is
            reported, unless it says "own units".
    """

    def __init__(
        self,
        config: SACConfig,
        obs_size: int,
        action_size: int,
        seeds: Sequence[int],
        task: str = "",
        units: Units = OWN,
    ) -> None:
        c = self.config = config
        self.units = units
        self.seeds, self.action_size = list(seeds), action_size
        self.target_entropy = c.target_entropy * action_size
        hidden = [c.width] * c.hidden_layers
        actor = Spec((obs_size, *hidden, 2 * action_size), torch.relu)
        critic = Spec((obs_size + action_size, *hidden, 1), torch.relu, LAYER_NORM if c.critic_layer_norm else None)

        heads = halves(orthogonal(GAIN), orthogonal(1.0))
        self.actor = Net("actor", {"": actor}, seeds, orthogonal(GAIN), head=heads)
        self.critic = Net("critic", {"": critic}, seeds, orthogonal(GAIN), members=2)
        self.target = self.critic.target()
        self._fused_critic_slopes = process.fused(self._critic_slopes)
        self._fused_actor_slopes = process.fused(self._actor_slopes)
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
        return self.policy(even(_own(obs, self.units.obs)))[0][:, : obs.shape[1]].tanh()

    @torch.no_grad()
    def log_prob_sample(self, obs: Tensor, generators: Generators) -> tuple[Tensor, Tensor]:
        """Return sampled actions (S, B, a) and their log-probabilities (S, B) for observations (S, B, o)."""
        size = obs.shape[1]
        own = even(_own(obs, self.units.obs))
        action, log_prob = self.sample(own, even(normal(generators, (size, self.action_size))))
        return action[:, :size], log_prob[:, :size]

    @torch.no_grad()
    def q(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return the smaller of both critics' values, (S, B), of observations (S, B, o) and actions (S, B, a).

        In units of the reported reward.
        """
        values = self.values(self.critic, even(_own(obs, self.units.obs)), even(action))
        return self._reported(values.amin(1)[:, : obs.shape[1]])

    def _reported(self, value: Tensor) -> Tensor:
        """Rewards or values in own units -> in units of the reported reward."""
        return value if self.units.reward == 1.0 else value * self.units.reward

    # -- forward passes, in own units ----------------------------------------------------------------------------

    def policy(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Observations (S, B, o) -> mean and log std of the Gaussian before the tanh, each (S, B, a)."""
        mean, raw = self.actor(obs).chunk(2, -1)
        return mean, log_std(raw.tanh())

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the actions (S, B, a) that standard normal `noise` (S, B, a) makes, and log pi(a|s), (S, B)."""
        return choose(self.actor(obs), noise)[:2]

    def values(self, critic: Net, obs: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        """Values of both critics, (S, 2, B)."""
        return critic(torch.cat([obs, action], -1), frozen=frozen).squeeze(-1)

    # -- learning ------------------------------------------------------------------------------------------------

    def learn(self, replay: Replay, step: int, simulate: object = None) -> dict[str, Tensor]:
        """Make the updates of agent step `step` from `replay`; returns what `update` says of the last one."""
        c = self.config
        rows = replay.rows(draw(self._streams("replay", step), replay.size, (c.updates_per_step, c.batch_size)))
        return self.updates([{k: v[:, i] for k, v in rows.items()} for i in range(c.updates_per_step)], step)

    def updates(self, batches: Sequence[Batch], step: int) -> dict[str, Tensor]:
        """Make the updates of agent step `step` on these minibatches; returns what `update` says of the last one."""
        noise = normal(self._streams("noise", step), (len(batches), 2, self.config.batch_size, self.action_size))
        for k, batch in enumerate(batches):
            terms = self.update(batch, (noise[:, k, 0], noise[:, k, 1]), report=k == len(batches) - 1)
        return terms

    def noise(self, generators: Generators) -> tuple[Tensor, Tensor]:
        """Draw the noise of one update: of the actions in the critics' target and in the actor's loss, (S, B, a)."""
        both = normal(generators, (2, self.config.batch_size, self.action_size))
        return both[:, 0], both[:, 1]

    @torch.no_grad()
    def update(self, batch: Batch, noise: tuple[Tensor, Tensor], report: bool = True) -> dict[str, Tensor]:
        """Make one update: critics, target critics, actor, temperature. The derivatives are written out.

        Args:
            batch: obs (S, B, o), action (S, B, a), reward (S, B), next_obs (S, B, o), mask (S, B); B a multiple of 32.
            noise: of the next action and of the actor's, each (S, B, a); see `noise`.
            report: whether anybody wants to know what is returned; nothing is, if not.

        Returns:
            Each (S,), at the parameters of before the respective step: `critic_loss`, `actor_loss`, `temperature_loss`;
            `q1`, the mean of critic 1; `entropy` H; `temperature` alpha; `reward`, the minibatch's mean;
            `critic_grad_norm`, `actor_grad_norm`. `q1` and `reward` are in units of the reported reward, like `q`; all
            else is in own units.
        """
        rows, alpha = self._own_rows(batch), self.temperature
        y, q, chosen, tape, slopes = self._fused_critic_slopes(rows, noise, alpha)
        norms = self._step("critic", self.critic, slopes, report)
        self.target.follow(self.critic, self.config.target_rate)
        least, slopes = self._fused_actor_slopes(rows["obs"], chosen, tape, alpha)
        norms |= self._step("actor", self.actor, slopes, report)
        entropy = -chosen.log_prob.mean(-1)
        temperature_loss = self._update_temperature(entropy, alpha)
        if not report:
            return {}
        return norms | {
            "critic_loss": (q - y.unsqueeze(1).unsqueeze(-1)).square().mean((2, 3)).sum(1),
            "q1": self._reported(q[:, 0].mean((1, 2))),
            "actor_loss": (alpha.unsqueeze(1) * chosen.log_prob - least).mean(-1),
            "entropy": entropy,
            "temperature": alpha,
            "temperature_loss": temperature_loss,
            "reward": batch["reward"].mean(-1),
        }

    def _step(self, name: str, net: Net, slopes: Sequence[Tensor], report: bool) -> dict[str, Tensor]:
        """Take a step of one network down its gradients; returns their norm, (S,), if it is to be reported.

        `slopes` are those that are not added yet, see `Net.slopes`.
        """
        optimiser = self._optimisers[name]
        net.add(slopes)
        norm = {f"{name}_grad_norm": optimiser.norm()} if report else {}
        optimiser.step()
        return norm

    def _own_rows(self, batch: Batch) -> Batch:
        """Transitions as they are reported -> in own units."""
        by_field = {"obs": self.units.obs, "next_obs": self.units.obs, "reward": self.units.reward}
        return {name: _own(values, by_field.get(name, 1.0)) for name, values in batch.items()}

    @torch.no_grad()
    def td_target(self, rows: Batch, action: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
        """Return y = r + gamma m (min_j Qbar_j(s', a') - alpha log pi(a'|s')), (S, B), all in own units.

        `action`, (S, B, a), and `log_prob`, (S, B), are those of a' ~ pi(s').
        """
        value = self.values(self.target, rows["next_obs"], action).amin(1) - alpha.unsqueeze(1) * log_prob
        return rows["reward"] + self.config.discount * rows["mask"] * value

    def _critic_slopes(
        self, rows: Batch, noise: tuple[Tensor, Tensor], alpha: Tensor
    ) -> tuple[Tensor, Tensor, Choice, Tape, list[Tensor]]:
        """Return targets, values (S, 2, B, 1), a ~ pi(s) with its tape, and the critics' derivative.

        The derivative of the squared error by Q_j is 2 (Q_j - y) / B.
        """
        size = noise[0].shape[1]
        # The actor of before the update chooses in s' and in s: once for both.
        out, tape = self.actor.forward((torch.cat([rows["next_obs"], rows["obs"]], 1),))
        both = choose(out, torch.cat(noise, 1))
        y = self.td_target(rows, both.action[:, :size], both.log_prob[:, :size], alpha)
        chosen = Choice(*(part[:, size:] for part in both))
        q, critic_tape = self.critic.forward((rows["obs"], rows["action"]))
        slopes, _ = self.critic.slopes((q - y.unsqueeze(1).unsqueeze(-1)).mul_(2.0 / size), critic_tape)
        return y, q, chosen, tape.last(size), slopes

    def _actor_slopes(self, obs: Tensor, chosen: Choice, tape: Tape, alpha: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return min_j Q_j(s, a), (S, B), and the derivative of the actor's loss by its parameters.

        Down through the smaller of the critics to the action, then through the policy. The derivative of the loss by u
        is 2 alpha a / B (log pi grows by 2 a) and, through the action, 1 - a^2 times that of the values; log std has it
        times std * noise, and -alpha / B of its own.
        """
        size, action = obs.shape[1], chosen.action
        q, critic_tape = self.critic.forward((obs, action))
        least = q.amin(1, keepdim=True)
        smaller = (q == least).float()  # both of them, by halves, where they are equal
        slope = smaller.div_(smaller.sum(1, keepdim=True).mul_(-size))
        columns = slice(obs.shape[-1], obs.shape[-1] + action.shape[-1])
        _, through = self.critic.slopes(slope, critic_tape, learn=False, columns=columns)
        assert through is not None
        slopes, _ = self.actor.slopes(policy_slope(chosen, through.sum(1), alpha), tape)
        return least[:, 0, :, 0], slopes

    def _update_temperature(self, entropy: Tensor, alpha: Tensor) -> Tensor:
        loss = alpha * (entropy - self.target_entropy)
        assert self._log_temperature.flat.grad is not None
        self._log_temperature.flat.grad[:, 0] = loss  # the derivative of exp(lambda) c by lambda is exp(lambda) c
        self._optimisers["temperature"].step()
        return loss

    # -- randomness ----------------------------------------------------------------------------------------------

    def _streams(self, purpose: str, step: int) -> list[np.random.Generator]:
        return streams(self.seeds, purpose, step)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _parts(self) -> dict[str, Net | Scalar]:
        """Everything that learning changes beside the optimisers."""
        nets = {"actor": self.actor, "critic": self.critic, "target": self.target}
        return nets | {"temperature": self._log_temperature}

    def state(self) -> dict[str, Any]:
        """Return everything that learning changes, as a flat dictionary of tensors."""
        return saved(self._parts(), self._optimisers)

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`, in place."""
        restore(state, self._parts(), self._optimisers)


def _own(x: Tensor, unit: float) -> Tensor:
    """What is reported -> in own units."""
    return x if unit == 1.0 else x * (1.0 / unit)
