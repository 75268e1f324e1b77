"""MAD-TD: model-augmented data for temporal-difference learning (arXiv 2410.08896; `mad-td` 3).

    every agent step, with K minibatches of B replayed transitions (o, a, r, m, o'):                       `learn`
        for i in 0 .. K-1:                                                                                 `update`
            if i == 0:  one step on encoder E and model M:  L_r + L_z + L_v + L_Q                    `update_model`
            the last alpha B rows become model data: a <- pi(z); z', r <- M(z, a)                             `mix`
            y = r + gamma min_j Qbar_j(z', pi(z'));  one step on the critics;  Qbar <- .99 Qbar + .01 Q `update_critic`
            one step on the actor:  - min_j Qbar_j(z, pi(z))                                         `update_actor`
    to explore, act with pi(z) + clip(N(0, .1), -.3, .3), or with what a search finds                     `explore`

Here z = E(o) and z' = E(o'). The encoder changes once per agent step, so the latents of all K minibatches are
computed together. The actor climbs the *target* critics; there is no target actor, no smoothing noise, no delay.
Masks multiply losses and targets always bootstrap: the last transition of an episode is ignored (`mad-td` 3.7).

Variants: where model data come from (the model or the simulator, the policy's actions or others), a narrow or a frozen
model, no model at all, resets, no LayerNorm; see `configs/mad_td.py`. The planner is `agents/planning.py`.

Shapes: S seeds, K minibatches, B rows, o, a and L lengths of observation, action and latent, 2 critics, N bins. Losses
and means are per seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynarep import process
from dynarep.activations import log_simnorm, mish, simnorm
from dynarep.agents.planning import Plan, plan
from dynarep.configs.mad_td import MadTDConfig
from dynarep.histogram import HLGauss
from dynarep.initialisers import uniform_fan_in
from dynarep.nets import Net, Spec, Tape, even
from dynarep.optimisers import Adam, restore, saved
from dynarep.placement import here
from dynarep.replay import Part, Replay, draw
from dynarep.streams import streams

Batch = Mapping[str, Tensor]
Simulate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class _Choice(NamedTuple):
    """Actions pi(z), (S, B, a), and what the actor's backward pass needs."""

    action: Tensor
    tape: Tape


def architecture(config: MadTDConfig, obs_size: int, action_size: int) -> dict[str, Spec]:
    """Return every network's layers, `critic` being one of the twins; model-free: critic and actor alone."""
    w, norm = config.width, config.layer_norm if config.layer_norm_on else None
    if config.model_free:
        return {
            "critic": Spec((obs_size + action_size, w, w, w, config.bins), mish, norm),
            "actor": Spec((obs_size, w, w, action_size), mish, norm),
        }
    h = config.model_width or w
    return {
        "encoder": Spec((obs_size, w, w), mish, norm, norm_output=True),
        "dynamics": Spec((w + action_size, h, h, w), mish, norm, norm_output=True),
        "reward": Spec((w + action_size, h, h, 1), mish, norm),
        "critic": Spec((w + action_size, w, w, config.bins), mish, norm),
        "actor": Spec((w, w, w, action_size), mish, norm),
    }


class MadTD:
    """MAD-TD for a block of seeds.

    Args:
        config: hyperparameters.
        obs_size: length of an observation.
        action_size: length of an action in [-1, 1].
        seeds: the run seeds trained together, S of them.
        task: not used; agents with a model of the task want its name.

    Attributes:
        encoder, model, critic, actor: the networks; the model-free arm has the last two alone.
        target: the moving average of the critics.
        histogram: how values are histograms.
    """

    encoder: Net
    model: Net

    def __init__(
        self, config: MadTDConfig, obs_size: int, action_size: int, seeds: Sequence[int], task: str = ""
    ) -> None:
        self.config, self.seeds, self.action_size = config, list(seeds), action_size
        self._specs = architecture(config, obs_size, action_size)
        if not config.model_free:
            self.encoder, self.model = self._net("encoder"), self._net("model")
        self.critic, self.actor = self._net("critic"), self._net("actor")
        self.target = self.critic.target()
        self.histogram = HLGauss(config.bins, -config.value_limit, config.value_limit, config.sigma, config.zero_prior)
        simulated = config.model_data == "simulator"  # a simulator cannot be compiled
        self._fused_critic_slopes = self._critic_slopes if simulated else process.fused(self._critic_slopes)
        self._fused_actor_slopes = process.fused(self._actor_slopes)
        self._fused_encode_all = process.fused(self._encode_all)
        rates = {"encoder": config.lr_encoder}
        self._optimisers = {k: Adam(net, rates.get(k, config.lr), config.clip) for k, net in self._nets().items()}

    def _net(self, name: str, reset: int = 0) -> Net:
        """Return a network as it starts, or as it starts again at its `reset`th reset."""
        branches = ("dynamics", "reward") if name == "model" else (name,)
        specs = {branch if name == "model" else "": self._specs[branch] for branch in branches}
        label = f"{name} reset {reset}" if reset else name  # names the initialisation streams
        return Net(label, specs, self.seeds, uniform_fan_in, members=2 if name == "critic" else 1)

    def _nets(self) -> dict[str, Net]:
        """Everything that gradients train."""
        models = {} if self.config.model_free else {"encoder": self.encoder, "model": self.model}
        return models | {"critic": self.critic, "actor": self.actor}

    # -- acting --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def explore(self, obs: Tensor, step: int) -> Tensor:
        """Return actions (S, a) with noise for one observation per seed, (S, o), at agent step `step` (`mad-td` 3.10).

        The planner's action is drawn among its elites, without further noise.
        """
        c, generators = self.config, self._streams("explore", step)
        if c.planner:
            return self._plan(obs.unsqueeze(1), generators).sample[:, 0]
        action = self.policy(self.encode(even(obs.unsqueeze(1))))[:, 0]
        normal = np.stack([g.standard_normal(self.action_size, dtype=np.float32) for g in generators])
        noise = (c.exploration_noise * here(normal)).clamp(-c.noise_clip, c.noise_clip)
        return (action + noise).clamp(-1.0, 1.0)

    @torch.no_grad()
    def act(self, obs: Tensor) -> Tensor:
        """Return noise-free actions (S, B, a) for observations (S, B, o); the planner's: its elites' mean (ours)."""
        if self.config.planner:
            return self._plan(obs, self._streams("plan")).mean
        return self.policy(self.encode(even(obs)))[:, : obs.shape[1]]

    @torch.no_grad()
    def q(self, obs: Tensor, action: Tensor) -> Tensor:
        """Return the smaller online critic's values, (S, B), of observations (S, B, o) and actions (S, B, a)."""
        return self.values(self.critic, self.encode(even(obs)), even(action)).amin(1)[:, : obs.shape[1]]

    def _plan(self, obs: Tensor, generators: Sequence[np.random.Generator]) -> Plan:
        """Search one action for each observation (S, B, o), by values r + gamma Q(z', pi(z')) of model and critics."""
        states, z = obs.shape[1], self.encode(even(obs))

        def value(actions: Tensor) -> Tensor:
            count = actions.shape[2]
            start = z[:, :states].unsqueeze(2).expand(-1, -1, count, -1).flatten(1, 2)
            log_next, reward = self.imagine(even(start), even(actions.flatten(1, 2)))
            next_z = log_next.exp()
            both = self.values(self.critic, next_z, self.policy(next_z))
            q = {"mean": both.mean(1), "min": both.amin(1), "max": both.amax(1)}[self.config.plan_value]
            values = reward + self.config.discount * q
            return torch.unflatten(values[:, : states * count], 1, (states, count))

        return plan(self.policy(z)[:, :states], value, self.config, generators)

    # -- forward passes ------------------------------------------------------------------------------------------

    def encode(self, obs: Tensor) -> Tensor:
        """Observations (S, B, o) -> latents (S, B, L); without a model the observations themselves."""
        if self.config.model_free:
            return obs
        return simnorm(self.encoder(obs), self.config.simnorm_group)

    def policy(self, latent: Tensor) -> Tensor:
        """Latents (S, B, L) -> actions (S, B, a) in [-1, 1], deterministic."""
        return self.actor(latent).tanh()

    def imagine(self, latent: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """One model step: log of the next latent (S, B, L) and the reward (S, B)."""
        x = latent, action
        return log_simnorm(self.model(x, "dynamics"), self.config.simnorm_group), self.model(x, "reward").squeeze(-1)

    def q_log(self, critic: Net, latent: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        """Log-probabilities of both critics' value histograms, (S, 2, B, N)."""
        return self.histogram.log_probabilities(critic((latent, action), frozen=frozen))

    def values(self, critic: Net, latent: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        """Values of both critics, (S, 2, B)."""
        return self.histogram.expect(critic((latent, action), frozen=frozen))

    # -- learning ------------------------------------------------------------------------------------------------

    def learn(self, replay: Replay | Part, step: int, simulate: Simulate | None = None) -> dict[str, Tensor]:
        """Do all learning of agent step `step`.

        Args:
            replay: transitions, that of this step included. The last one is never drawn (`mad-td` 3.10).
            step: agent step, from 0. Resets come before the learning of every step that `reset_every` divides, but 0:
                the reference's come before that step's action.
            simulate: rows of the whole replay (S, n) and actions (S, n, a) -> true next_obs (S, n, o), reward and mask
                (S, n); needed if `config.model_data` is "simulator".

        Returns:
            What `update` says.
        """
        c = self.config
        if c.reset != "none" and step > 0 and step % c.reset_every == 0:
            self.reset(step // c.reset_every)
        shape = c.updates_per_step, c.batch_size
        indices = draw(self._streams("replay", step), (replay.sizes - 1).clamp(min=1).tolist(), shape)
        batch = replay.rows(indices)
        if c.model_data == "simulator":
            assert simulate is not None, "model_data: simulator needs a protocol that can simulate"
            batch["index"] = replay.absolute(indices) if isinstance(replay, Part) else indices
        if c.model_actions == "uniform":
            generators, size = self._streams("model actions", step), (*shape, self.action_size)
            batch["uniform"] = here(np.stack([g.random(size, np.float32) for g in generators])) * 2.0 - 1.0
        frozen = c.freeze_model_after is not None and step >= c.freeze_model_after
        return self.update(batch, learn_model=not frozen, simulate=simulate)

    def update(self, batch: Batch, learn_model: bool = True, simulate: Simulate | None = None) -> dict[str, Tensor]:
        """Learn from one agent step's K minibatches.

        Args:
            batch: obs (S, K, B, o), action (S, K, B, a), reward (S, K, B), next_obs (S, K, B, o), mask (S, K, B);
                the mask is 0 at the end of an episode of either kind. For some variants also `uniform`, random actions
                (S, K, B, a), or `index`, the rows' numbers (S, K, B) for `simulate`.
            learn_model: whether encoder and model learn, if there are any.
            simulate: see `learn`.

        Returns:
            Losses of the first minibatch, each (S,): what the reference logs (`mad-td` 3.9).
        """
        c = self.config
        losses: dict[str, Tensor] = {}
        learn_model = learn_model and not c.model_free
        alone = learn_model and not c.slow_model  # the encoder changes before every minibatch
        for i in range(batch["obs"].shape[1]):
            rows = {name: values[:, i] for name, values in batch.items()}
            if learn_model and (i == 0 or not c.slow_model):
                terms = self.update_model(rows)
                losses = losses or terms
            if i == 0 or alone:
                part = slice(i, i + 1) if alone else slice(None)
                latents = [self._fused_encode_all(batch[name][:, part]) for name in ("obs", "next_obs")]
            z, next_z = (values[:, 0 if alone else i] for values in latents)
            y, out, chosen = self._step_critic(z, next_z, rows, simulate)
            if i == 0:
                losses["critic_loss"] = self._critic_loss(y, out, rows["mask"])
            if i == 0 or not c.slow_actor:
                actor_loss = self.update_actor(z, chosen)
                losses.setdefault("actor_loss", actor_loss)
        return losses

    @torch.no_grad()
    def _encode_all(self, obs: Tensor) -> Tensor:
        """Minibatches (S, K, B, o) -> latents (S, K, B, L)."""
        return torch.unflatten(self.encode(obs.flatten(1, 2)), 1, obs.shape[1:3])

    def update_model(self, rows: Batch) -> dict[str, Tensor]:
        """One step on encoder and model, on real rows only (`mad-td` 3.6); returns the loss terms, each (S,)."""
        c, mask = self.config, rows["mask"]
        with torch.no_grad():
            next_z = self.encode(rows["next_obs"])
            next_a = self.policy(next_z)
            target_log = self.q_log(self.target, next_z, next_a)
            target_p = target_log.exp()
            y = rows["reward"] + c.discount * (target_p * self.histogram.centres).sum(-1).amin(1)
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
        total: Tensor = sum(terms.values(), start=torch.zeros((), device=z.device))
        total.sum().backward()  # type: ignore[no-untyped-call]
        self._optimisers["encoder"].step()
        self._optimisers["model"].step()
        return {name: term.detach() for name, term in (terms | {"total_loss": total}).items()}

    def cross_entropy(self, y: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
        """Mean over rows and bins, sum over critics, of the cross-entropy to HL-Gauss(y), (S,)."""
        per_row = (self.histogram.encode(y).unsqueeze(1) * log_q).mean(-1)
        return -(mask.unsqueeze(1) * per_row).mean(-1).sum(-1)

    @torch.no_grad()
    def mix(
        self,
        z: Tensor,
        next_z: Tensor,
        rows: Batch,
        simulate: Simulate | None = None,
        chosen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Replace the last rows by model data: action, reward and next latent of the mixed batch (`mad-td` 3.7).

        `chosen` is pi(z), (S, B, a), if it is known already.
        """
        size, real = z.shape[1], self.config.real_rows()
        if real == size:
            return rows["action"], rows["reward"], next_z
        # A multiple of 16 rows is evaluated and the surplus dropped: others would make bytes depend on the block.
        first = max(0, size - -(-(size - real) // 16) * 16)
        start, skip = z[:, first:], real - first
        action = self._model_actions(z, rows, chosen)[:, first:]
        if self.config.model_data == "simulator":
            reward, after = self._simulated(action[:, skip:], next_z[:, real:], rows, real, simulate)
        else:
            log_next, reward = self.imagine(start, action)
            reward, after = reward[:, skip:], log_next.exp()[:, skip:]
        return (
            torch.cat([rows["action"][:, :real], action[:, skip:]], 1),
            torch.cat([rows["reward"][:, :real], reward], 1),
            torch.cat([next_z[:, :real], after], 1),
        )

    def _model_actions(self, z: Tensor, rows: Batch, chosen: Tensor | None) -> Tensor:
        """Return the actions (S, B, a) that rows have if they become model data."""
        if self.config.model_actions == "policy":
            return self.policy(z) if chosen is None else chosen
        return rows["uniform" if self.config.model_actions == "uniform" else "action"]

    def _simulated(
        self, action: Tensor, next_z: Tensor, rows: Batch, real: int, simulate: Simulate | None
    ) -> tuple[Tensor, Tensor]:
        """Return the true reward and next latent of each `action` at the states of rows `real` and following.

        Where the simulator ends the episode the stored outcome stays, that of `rows` and `next_z`: targets always
        bootstrap, and there would be nothing to bootstrap from.
        """
        assert simulate is not None
        next_obs, reward, mask = simulate(rows["index"][:, real:], action)
        true_z = self.encode(even(next_obs))[:, : next_obs.shape[1]]
        goes_on = mask > 0
        return (
            torch.where(goes_on, reward, rows["reward"][:, real:]),
            torch.where(goes_on.unsqueeze(-1), true_z, next_z),
        )

    @torch.no_grad()
    def td_target(self, reward: Tensor, next_z: Tensor) -> Tensor:
        """Return y = r + gamma min_j Qbar_j(z', pi(z')), (S, B); never cut at episode ends."""
        return reward + self.config.discount * self.values(self.target, next_z, self.policy(next_z)).amin(1)

    def update_critic(self, z: Tensor, next_z: Tensor, rows: Batch, simulate: Simulate | None = None) -> Tensor:
        """One step on the critics, then on their moving average; returns L_c, (S,) (`mad-td` 3.7)."""
        y, out, _ = self._step_critic(z, next_z, rows, simulate)
        return self._critic_loss(y, out, rows["mask"])

    def _critic_loss(self, y: Tensor, out: Tensor, mask: Tensor) -> Tensor:
        """L_c of targets (S, B) and the critics' outputs (S, 2, B, N), (S,)."""
        return self.cross_entropy(y, self.histogram.log_probabilities(out), mask)

    @torch.no_grad()
    def _step_critic(
        self, z: Tensor, next_z: Tensor, rows: Batch, simulate: Simulate | None = None
    ) -> tuple[Tensor, Tensor, _Choice]:
        """Do what `update_critic` says; returns the targets, the critics' outputs and pi(z)."""
        y, out, chosen, slopes = self._fused_critic_slopes(z, next_z, rows, simulate)
        self.critic.add(slopes)
        self._optimisers["critic"].step()
        self.target.follow(self.critic, self.config.target_rate)
        return y, out, chosen

    def _critic_slopes(
        self, z: Tensor, next_z: Tensor, rows: Batch, simulate: Simulate | None
    ) -> tuple[Tensor, Tensor, _Choice, list[Tensor]]:
        """Return targets, the critics' outputs, pi(z), and L_c's derivative by the critics, written out."""
        chosen = self._choose(z)
        action, reward, next_z = self.mix(z, next_z, rows, simulate, chosen.action)
        y = self.td_target(reward, next_z)
        out, tape = self.critic.forward((z, action))
        weight = (rows["mask"] / z.shape[1]).unsqueeze(1).unsqueeze(-1)
        slope = self.histogram.cross_entropy_slope(y, out).mul_(weight)
        return y, out, chosen, self.critic.slopes(slope, tape)[0]

    @torch.no_grad()
    def update_actor(self, z: Tensor, chosen: _Choice | None = None) -> Tensor:
        """One step on the actor, on all rows, unmasked; returns L_pi, (S,) (`mad-td` 3.8).

        `chosen` is pi(z), if it is known already.
        """
        loss, slopes = self._fused_actor_slopes(z, self._choose(z) if chosen is None else chosen)
        self.actor.add(slopes)
        self._optimisers["actor"].step()
        return loss

    def _actor_slopes(self, z: Tensor, chosen: _Choice) -> tuple[Tensor, list[Tensor]]:
        """Return L_pi and its derivative by the actor, written out.

        Down the smaller of the target critics to the action, then through the actor.
        """
        action, actor_tape = chosen
        out, tape = self.target.forward((z, action))
        values, slope = self.histogram.expect_slope(out)
        least = values.amin(1, keepdim=True)
        smaller = (values == least).float()  # both of them, by halves, where they are equal
        slope.mul_((smaller / (-z.shape[1] * smaller.sum(1, keepdim=True))).unsqueeze(-1))
        inputs = z.shape[-1] + action.shape[-1]
        _, by_action = self.target.slopes(slope, tape, learn=False, columns=slice(z.shape[-1], inputs))
        assert by_action is not None
        slopes, _ = self.actor.slopes(by_action.sum(1) * (1.0 - action.square()), actor_tape)
        return -least.squeeze(1).mean(-1), slopes

    def _choose(self, z: Tensor) -> _Choice:
        out, tape = self.actor.forward((z,))
        return _Choice(out.tanh_(), tape)

    @torch.no_grad()
    def reset(self, number: int) -> None:
        """Start networks and their optimisers again, the `number`th time (`mad-td` 3.12); the replay stays."""
        for name, net in self._nets().items():
            if self.config.reset == "actor" and name != "actor":
                continue
            fresh = self._net(name, number).flat
            half = self.config.reset == "spr" and name in ("encoder", "model")
            net.flat.copy_(0.5 * (net.flat + fresh) if half else fresh)
            self._optimisers[name].load({k: torch.zeros_like(v) for k, v in self._optimisers[name].state().items()})
        if self.config.reset != "actor":
            self.target.flat.copy_(self.critic.flat)

    # -- randomness ----------------------------------------------------------------------------------------------

    def _streams(self, purpose: str, *step: int) -> list[np.random.Generator]:
        return streams(self.seeds, purpose, *step)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return everything that learning changes, as a flat dictionary of tensors."""
        return saved(self._nets() | {"target": self.target}, self._optimisers)

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`, in place."""
        restore(state, self._nets() | {"target": self.target}, self._optimisers)
