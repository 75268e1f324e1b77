"""BRO: bigger, regularised, optimistic (arXiv 2405.16158; `baselines` A).

    every agent step, K times, with B transitions (s, a, r, m, s'):                                            `update`
        y_j = r + gamma m (mean_c Zbar_cj(s', a') - alpha log pi(a'|s')),  a' ~ pi(s'),  of every quantile j
        one step on both critics:   sum_i mean_j rho_i(y_j - Z_ci(s, a));   Zbar <- .995 Zbar + .005 Z
        one step on the actor:      mean_b [alpha log pi(a|s) - mean_ci Z_ci(s, a)],  a ~ pi(s)
        one step on the optimist:   - mean_bi [mean_c Z_ci + b |Z_1i - Z_2i| / 2] + k KL,  a ~ N(mu + shift, .75 std)
        one step each on alpha (entropy towards -|A| / 2), on b and on k (KL / |A| towards .05)
    the optimist collects the data; now and then everything but the buffer starts anew                         `learn`

rho_i is the Huber loss with threshold 1, weighted by |tau_i - 1[y < Z]|, tau_i = (i - 1/2) / N. Every part sees the
networks that the parts before it left; alpha, b and k are those of before the update. Z are BroNets: residual blocks
with LayerNorm (`nets.Spec.residual`). Weight decay is part of Adam's direction (`optimisers.Adam`).

What became of the reference's quirks (`baselines` A.3, A.8):
    seeds share replay indices                        not replicated: every seed draws its own
    a reset replays the same random numbers           not replicated: streams are keyed by the step; weights do return
    with UTD 2 only the first reset happens           replicated: `BROConfig.reset_steps`
    evaluation advances the agent's random state      does not arise

Shapes: S seeds, B rows, o and a lengths of observation and action, 2 critics, N quantiles. Losses are per seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynarep import process
from dynarep.agents.squashed import Choice, choose, log_std, one_less_square, policy_slope
from dynarep.configs.bro import BROConfig
from dynarep.initialisers import halves, orthogonal
from dynarep.nets import Net, Spec, even
from dynarep.optimisers import Adam, Scalar, restore, saved
from dynarep.replay import Replay, draw, normal
from dynarep.streams import streams

Batch = Mapping[str, Tensor]
Generators = Sequence[np.random.Generator]
PAIRS = 2**18  # pairs of quantiles compared at a time: 1 MiB, which a core's cache holds
GAIN = math.sqrt(2.0)  # [code] of every kernel but the log-std head's (1) and the shift's (.01)
SQUASH_MIDDLE, SQUASH_SLOPE = -1.25, 8.75  # [code] log of optimism and KL weight, between -10 and 7.5


class BRO:
    """BRO for a block of seeds.

    Args:
        config: hyperparameters.
        obs_size: length of an observation.
        action_size: length of an action in [-1, 1].
        seeds: the run seeds trained together, S of them.
        task: not used; agents with a model of the task want its name.
    """

    def __init__(
        self, config: BROConfig, obs_size: int, action_size: int, seeds: Sequence[int], task: str = ""
    ) -> None:
        c = self.config = config
        self.seeds, self.obs_size, self.action_size = list(seeds), obs_size, action_size

        def bronet(inputs: int, width: int, blocks: int, outputs: int, bias: bool = True) -> Spec:
            sizes = (inputs, *[width] * (1 + 2 * blocks), outputs)
            return Spec(sizes, torch.relu, c.layer_norm, residual=True, output_bias=bias)

        critic = bronet(obs_size + action_size, c.critic_width, c.critic_blocks, c.quantiles)
        actor = bronet(obs_size, c.actor_width, c.actor_blocks, 2 * action_size)
        optimist = bronet(obs_size + action_size, c.actor_width, c.actor_blocks, action_size, bias=False)
        heads = halves(orthogonal(GAIN), orthogonal(1.0))
        self.critic = Net("critic", {"": critic}, seeds, orthogonal(GAIN), members=2)
        self.actor = Net("actor", {"": actor}, seeds, orthogonal(GAIN), head=heads)
        self.optimist = Net("optimist", {"": optimist}, seeds, orthogonal(GAIN), head=orthogonal(0.01))
        self.target = self.critic.target()
        starts = {
            "temperature": math.log(c.initial_temperature),
            "optimism": _unsquash(c.initial_optimism),
            "kl_weight": _unsquash(c.initial_kl_weight),
        }
        self._scalars = {name: Scalar(value, len(self.seeds)) for name, value in starts.items()}
        nets = {"critic": self.critic, "actor": self.actor, "optimist": self.optimist}
        self._optimisers = {name: Adam(net, c.lr, decay=c.weight_decay) for name, net in nets.items()}
        for name, scalar in self._scalars.items():
            lr = c.lr if name == "temperature" else c.adjustment_lr
            self._optimisers[name] = Adam(scalar, lr, beta1=c.scalar_beta1)
        self._levels = (torch.arange(c.quantiles, device=process.device()) + 0.5) / c.quantiles
        self._fused_critic_slopes = process.fused(self._critic_slopes)
        self._fused_actor_slopes = process.fused(self._actor_slopes)
        self._fused_optimist_slopes = process.fused(self._optimist_slopes)

    # -- acting --------------------------------------------------------------------------------------------------

    @property
    def temperature(self) -> Tensor:
        """The entropy's weight alpha, (S,)."""
        return self._scalars["temperature"].flat.exp()[:, 0]

    def adjustment(self, name: str) -> Tensor:
        """Return `optimism` b or `kl_weight` k, (S,): exp(-10 + 8.75 (1 + tanh p))."""
        return torch.exp(SQUASH_MIDDLE + SQUASH_SLOPE * self._scalars[name].flat[:, 0].tanh())

    @torch.no_grad()
    def explore(self, obs: Tensor, step: int) -> Tensor:
        """Return the optimist's samples (S, a) for one observation per seed, (S, o), at agent step `step`."""
        own = even(obs.unsqueeze(1))
        noise = even(normal(self._streams("explore", step), (1, self.action_size)))
        mean, std = self.optimistic_policy(own) if self.config.optimist else self.policy(own)
        return (mean + std * noise).tanh()[:, 0]

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Return the conservative actor's noise-free actions, (S, B, a), for observations (S, B, o)."""
        return self.policy(even(obs))[0][:, : obs.shape[1]].tanh()

    @torch.no_grad()
    def log_prob_sample(self, obs: Tensor, generators: Generators) -> tuple[Tensor, Tensor]:
        """Return the conservative actor's samples (S, B, a) and their log-probabilities (S, B)."""
        size = obs.shape[1]
        chosen = choose(self.actor(even(obs)), even(normal(generators, (size, self.action_size))))
        return chosen.action[:, :size], chosen.log_prob[:, :size]

    @torch.no_grad()
    def q(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return what the conservative actor climbs, (S, B), of observations (S, B, o) and actions (S, B, a)."""
        z = self.critic((even(obs), even(action)))
        return self._blend(z, -self.config.pessimism).mean(-1)[:, : obs.shape[1]]

    def policy(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Observations (S, B, o) -> mean and standard deviation before the tanh, each (S, B, a)."""
        mean, raw = self.actor(obs).chunk(2, -1)
        return mean, log_std(raw.tanh()).exp()

    def optimistic_policy(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same of the optimist, which shifts the mean and has no deviation of its own."""
        mean, std = self.policy(obs)
        return mean + self.optimist((obs, mean)), std * self.config.std_multiplier

    # -- learning ------------------------------------------------------------------------------------------------

    def learn(self, replay: Replay, step: int, simulate: object = None) -> dict[str, Tensor]:
        """Make the updates of agent step `step`, after a reset if one is due; returns what the last update says."""
        c = self.config
        if step in c.reset_steps():
            self.load(BRO(c, self.obs_size, self.action_size, self.seeds).state())
        rows = replay.rows(draw(self._streams("replay", step), replay.size, (c.updates_per_step, c.batch_size)))
        noise = normal(self._streams("noise", step), (c.updates_per_step, 3, c.batch_size, self.action_size))
        for k in range(c.updates_per_step):
            batch = {name: values[:, k] for name, values in rows.items()}
            terms = self.update(batch, noise[:, k].unbind(1), report=k == c.updates_per_step - 1)
        return terms

    @torch.no_grad()
    def update(self, batch: Batch, noise: Sequence[Tensor], report: bool = True) -> dict[str, Tensor]:
        """Make one update. The derivatives are written out.

        Args:
            batch: obs (S, B, o), action (S, B, a), reward (S, B), next_obs (S, B, o), mask (S, B); B a multiple of 32.
            noise: of the next action, of the actor's and of the optimist's, each (S, B, a).
            report: whether anybody wants to know what is returned; nothing is, if not.

        Returns:
            Each (S,), at the parameters of before the respective step: `critic_loss`, `q1`, `q2`, `actor_loss`,
            `entropy`, `temperature`, `temperature_loss`, `reward`, `critic_grad_norm`, `actor_grad_norm`; and of the
            optimist `optimist_loss`, `optimist_grad_norm`, `optimist_q`, `disagreement`, `optimist_kl` (summed over
            dimensions), `optimism`, `optimism_loss`, `kl_weight`, `kl_weight_loss`.
        """
        alpha, obs = self.temperature, batch["obs"]
        y, z, slopes = self._fused_critic_slopes(batch, noise[0], alpha)
        terms = self._step("critic", self.critic, slopes, report)
        self.target.follow(self.critic, self.config.target_rate)
        if report:
            loss = self.quantile_loss(y[:, None, :, None] - z.unsqueeze(-1)).sum(1)
            terms |= {"critic_loss": loss, "q1": z[:, 0].mean((1, 2)), "q2": z[:, 1].mean((1, 2))}
        value, chosen, slopes = self._fused_actor_slopes(obs, noise[1], alpha)
        terms |= self._step("actor", self.actor, slopes, report)
        entropy = -chosen.log_prob.mean(-1)
        if self.config.optimist:
            terms |= self._update_optimist(obs, noise[2], report)
        temperature_loss = alpha * (entropy - self.config.target_entropy * self.action_size)
        self._update_scalar("temperature", temperature_loss)  # exp(p) c: the derivative by p is the same
        if not report:
            return {}
        return terms | {
            "actor_loss": -alpha * entropy - value,
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

    @torch.no_grad()
    def td_target(self, rows: Batch, action: Tensor, log_prob: Tensor, alpha: Tensor) -> Tensor:
        """Return the quantiles y of the targets, (S, B, N), for a' ~ pi(s'), (S, B, a), and log pi(a'|s'), (S, B)."""
        value = self._blend(self.target((rows["next_obs"], action)), -self.config.pessimism)
        value = value - (alpha.unsqueeze(1) * log_prob).unsqueeze(-1)
        return rows["reward"].unsqueeze(-1) + self.config.discount * rows["mask"].unsqueeze(-1) * value

    def quantile_loss(self, error: Tensor) -> Tensor:
        """Quantile Huber loss of errors y_j - z_i, (..., B, N, N), over i and j; mean over rows, (...)."""
        size = error.abs()
        huber = torch.where(size <= 1.0, 0.5 * size.square(), size - 0.5)
        weight = (self._levels.unsqueeze(-1) - (error < 0).float()).abs()
        return (weight * huber).mean(-1).sum(-1).mean(-1)

    def _critic_slopes(self, rows: Batch, noise: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return targets (S, B, N), quantiles (S, 2, B, N) and the derivative of the critics' loss."""
        ahead = choose(self.actor.forward((rows["next_obs"],), keep=False)[0], noise)
        y = self.td_target(rows, ahead.action, ahead.log_prob, alpha)
        z, tape = self.critic.forward((rows["obs"], rows["action"]))
        slopes, _ = self.critic.slopes(self._quantile_slope(z, y), tape)
        return y, z, slopes

    def _quantile_slope(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the derivative of `quantile_loss` by z, (S, 2, B, N).

        Huber's derivative is the error cut at +-1; errors above 0 weigh tau, those below 1 - tau. So it is, by z_i and
        but for the means, minus half the sum over j of the cut errors, minus (tau_i - 1/2) times that of their sizes.
        """
        seeds, critics, size, count = z.shape
        whole = torch.compiler.is_compiling() or not z.is_cpu
        rows = size if whole else max(1, PAIRS // (seeds * critics * count**2))
        found = []
        for own, targets in zip(torch.split(z, rows, 2), torch.split(y, rows, 1), strict=True):
            cut = (targets[:, None, ..., None] - own.unsqueeze(-2)).clamp_(-1.0, 1.0)  # (S, 2, rows, j, i)
            found.append(cut.sum(-2).mul_(0.5).addcmul_(cut.abs_().sum(-2), self._levels - 0.5))
        return torch.cat(found, 2).mul_(-1.0 / (size * count))

    def _actor_slopes(self, obs: Tensor, noise: Tensor, alpha: Tensor) -> tuple[Tensor, Choice, list[Tensor]]:
        """Return the critics' mean value, (S,), a ~ pi(s), and the derivative of the actor's loss."""
        out, tape = self.actor.forward((obs,))
        chosen = choose(out, noise)
        z, by_action = self._climb(obs, chosen.action, -self.config.pessimism)
        slopes, _ = self.actor.slopes(policy_slope(chosen, by_action, alpha), tape)
        return self._blend(z, -self.config.pessimism).mean((1, 2)), chosen, slopes

    def _blend(self, z: Tensor, bonus: Tensor | float) -> Tensor:
        """Quantiles of both critics (S, 2, B, N) -> mean_c Z_c + bonus |Z_1 - Z_2| / 2, (S, B, N).

        `bonus` is a number or (S, 1, 1).
        """
        mean = 0.5 * (z[:, 0] + z[:, 1])
        return mean if isinstance(bonus, float) and not bonus else mean + 0.5 * bonus * (z[:, 0] - z[:, 1]).abs()

    def _climb(self, obs: Tensor, action: Tensor, bonus: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return both critics' quantiles (S, 2, B, N), and the derivative by the action, (S, B, a), of minus the mean
        over rows and quantiles of `_blend`.
        """
        z, tape = self.critic.forward((obs, action))
        part = 0.5 * bonus * torch.sign(z[:, 0] - z[:, 1])
        slope = torch.stack([0.5 + part, 0.5 - part], 1).mul_(-1.0 / (z.shape[2] * z.shape[3]))
        columns = slice(obs.shape[-1], obs.shape[-1] + action.shape[-1])
        _, by_action = self.critic.slopes(slope, tape, learn=False, columns=columns)
        assert by_action is not None
        return z, by_action.sum(1)

    def _update_optimist(self, obs: Tensor, noise: Tensor, report: bool) -> dict[str, Tensor]:
        """Take one step of the optimist, and of b and k: above the KL aimed at, b falls and k rises."""
        c, b, k = self.config, self.adjustment("optimism"), self.adjustment("kl_weight")
        kl, z, slopes = self._fused_optimist_slopes(obs, noise, b, k)
        terms = self._step("optimist", self.optimist, slopes, report)
        excess = kl / self.action_size - c.target_kl
        for name, value, loss in (("optimism", b, excess * (b - c.pessimism)), ("kl_weight", k, -excess * k)):
            by_value = excess if name == "optimism" else -excess
            gate = self._scalars[name].flat[:, 0].tanh()
            self._update_scalar(name, by_value * value * SQUASH_SLOPE * one_less_square(gate))
            terms |= {name: value, f"{name}_loss": loss}
        if report:
            mean, spread = z.mean((1, 2, 3)), 0.5 * (z[:, 0] - z[:, 1]).abs().mean((1, 2))
            terms |= {"optimist_q": mean, "disagreement": spread, "optimist_kl": kl}
            terms |= {"optimist_loss": k * kl - mean - b * spread}
        return terms

    def _optimist_slopes(self, obs: Tensor, noise: Tensor, b: Tensor, k: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return KL, (S,), quantiles (S, 2, B, N) at the optimist's actions, and the derivative of its loss.

        Its deviation is the actor's, scaled, so KL(N(mu + shift, std) || N(mu, std)) is all there is of the KL. The
        actor is the new one, and gets no gradient.
        """
        mean, raw = self.actor.forward((obs,), keep=False)[0].chunk(2, -1)
        std = log_std(raw.tanh()).exp()
        shift, tape = self.optimist.forward((obs, mean))
        action = (mean + shift + self.config.std_multiplier * std * noise).tanh()
        z, by_action = self._climb(obs, action, b.view(-1, 1, 1))
        precise = shift / std.square()
        by_shift = by_action.mul_(one_less_square(action)).addcmul_((k / obs.shape[1]).view(-1, 1, 1), precise)
        slopes, _ = self.optimist.slopes(by_shift, tape)
        return 0.5 * (shift * precise).sum(-1).mean(-1), z, slopes

    def _update_scalar(self, name: str, slope: Tensor) -> None:
        """Take a step of a number down its derivative, (S,)."""
        grad = self._scalars[name].flat.grad
        assert grad is not None
        grad[:, 0] = slope
        self._optimisers[name].step()

    # -- randomness ----------------------------------------------------------------------------------------------

    def _streams(self, purpose: str, step: int) -> list[np.random.Generator]:
        return streams(self.seeds, purpose, step)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _parts(self) -> dict[str, Net | Scalar]:
        """Everything that learning changes beside the optimisers."""
        nets = {"critic": self.critic, "actor": self.actor, "optimist": self.optimist, "target": self.target}
        return nets | self._scalars

    def state(self) -> dict[str, Any]:
        """Return everything that learning changes, as a flat dictionary of tensors."""
        return saved(self._parts(), self._optimisers)

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`, in place."""
        restore(state, self._parts(), self._optimisers)


def _unsquash(value: float) -> float:
    return math.atanh((math.log(value) - SQUASH_MIDDLE) / SQUASH_SLOPE)
