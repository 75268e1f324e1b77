"""MAD-TD as PyTorch is commonly written: a module per network, autograd, `torch.optim.Adam`. Timed beside ours.

The same algorithm and the same sizes as `agents/mad_td.py` at its defaults, for one seed: a test holds its losses to
ours. No pass is made here that the algorithm does not need, so that what remains is the price of the style: networks
one by one, a graph per loss, parameters one by one in clipping, Adam and moving average.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dynarep.activations import log_simnorm, simnorm
from dynarep.agents.mad_td import architecture
from dynarep.configs.mad_td import MadTDConfig
from dynarep.histogram import HLGauss
from dynarep.nets import Spec

Batch = Mapping[str, Tensor]


def mlp(spec: Spec) -> nn.Sequential:
    """Return the layers that a `Spec` of Mish names."""
    layers: list[nn.Module] = []
    last = len(spec.sizes) - 2
    for i, (fan_in, fan_out) in enumerate(zip(spec.sizes[:-1], spec.sizes[1:], strict=True)):
        layers.append(nn.Linear(fan_in, fan_out))
        if spec.layer_norm is not None and (i < last or spec.norm_output):
            layers.append(nn.LayerNorm(fan_out, eps=spec.layer_norm))
        if i < last:
            layers.append(nn.Mish())
    return nn.Sequential(*layers)


class EagerMadTD:
    """MAD-TD of one seed, with the paper's networks and the default switches.

    Args:
        config: sizes and rates.
        obs_size: length of an observation.
        action_size: length of an action in [-1, 1].
    """

    def __init__(self, config: MadTDConfig, obs_size: int, action_size: int) -> None:
        c = self.config = config
        specs = architecture(c, obs_size, action_size)
        self.encoder, self.actor = mlp(specs["encoder"]), mlp(specs["actor"])
        self.model = nn.ModuleDict({branch: mlp(specs[branch]) for branch in ("dynamics", "reward")})
        self.critics = nn.ModuleList(mlp(specs["critic"]) for _ in range(2))
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.histogram = HLGauss(c.bins, -c.value_limit, c.value_limit, c.sigma, c.zero_prior)
        nets = {"encoder": self.encoder, "model": self.model, "critics": self.critics, "actor": self.actor}
        rates = {"encoder": c.lr_encoder}
        self._optimisers = {k: torch.optim.Adam(net.parameters(), rates.get(k, c.lr)) for k, net in nets.items()}

    def update(self, batch: Batch, learn_model: bool = True) -> dict[str, Tensor]:
        """Learn from one agent step's K minibatches: obs (K, B, o), action (K, B, a), reward and mask (K, B), next_obs.

        Returns:
            Losses of the first minibatch, named as `MadTD.update` names them.
        """
        losses: dict[str, Tensor] = {}
        for i in range(len(batch["obs"])):
            rows = {name: values[i] for name, values in batch.items()}
            if learn_model and i == 0:
                losses |= self._update_model(rows)
            with torch.no_grad():
                z, next_z = self._encode(rows["obs"]), self._encode(rows["next_obs"])
            terms = {"critic_loss": self._update_critics(z, next_z, rows), "actor_loss": self._update_actor(z)}
            losses = losses if i else losses | terms
        return losses

    def _encode(self, obs: Tensor) -> Tensor:
        return simnorm(self.encoder(obs), self.config.simnorm_group)

    def _imagine(self, za: Tensor) -> tuple[Tensor, Tensor]:
        """Latent and action side by side -> log of the next latent, reward (B,)."""
        return log_simnorm(self.model["dynamics"](za), self.config.simnorm_group), self.model["reward"](za).squeeze(-1)

    def _logs(self, critics: Iterable[nn.Module], z: Tensor, action: Tensor) -> Tensor:
        """Log-probabilities of both critics' values, (2, B, bins)."""
        za = torch.cat([z, action], -1)
        return self.histogram.log_probabilities(torch.stack([critic(za) for critic in critics]))

    def _values(self, logs: Tensor) -> Tensor:
        return (logs.exp() * self.histogram.centres).sum(-1)

    def _cross_entropy(self, y: Tensor, logs: Tensor, mask: Tensor) -> Tensor:
        return -(mask * (self.histogram.encode(y) * logs).mean(-1)).mean(-1).sum()

    def _update_model(self, rows: Batch) -> dict[str, Tensor]:
        c, mask = self.config, rows["mask"]
        with torch.no_grad():
            next_z = self._encode(rows["next_obs"])
            next_a = self.actor(next_z).tanh()
            target_p = self._logs(self.targets, next_z, next_a).exp()
            y = rows["reward"] + c.discount * (target_p * self.histogram.centres).sum(-1).amin(0)
            consistent = (1 - c.label_smoothing) * next_z + c.label_smoothing / c.simnorm_group
        self.critics.requires_grad_(False)  # of them only the way through is wanted
        z = self._encode(rows["obs"])
        log_next, reward = self._imagine(torch.cat([z, rows["action"]], -1))
        imagined = self._logs(self.targets, log_next.exp(), next_a)
        terms = {
            "reward_loss": (mask * (rows["reward"] - reward).square()).mean(),
            "model_loss": -(mask * (consistent * log_next).mean(-1)).mean(),
            "vaml_loss": -(mask * (target_p * imagined).mean(-1).mean(0)).mean(),
            "model_critic_loss": self._cross_entropy(y, self._logs(self.critics, z, rows["action"]), mask),
        }
        total = torch.stack(list(terms.values())).sum()
        self._step(total, "encoder", "model")
        self.critics.requires_grad_(True)
        return {name: term.detach() for name, term in terms.items()} | {"total_loss": total.detach()}

    def _update_critics(self, z: Tensor, next_z: Tensor, rows: Batch) -> Tensor:
        c, real = self.config, self.config.real_rows()
        with torch.no_grad():
            model_a = self.actor(z[real:]).tanh()
            log_next, model_r = self._imagine(torch.cat([z[real:], model_a], -1))
            action, reward = torch.cat([rows["action"][:real], model_a]), torch.cat([rows["reward"][:real], model_r])
            next_z = torch.cat([next_z[:real], log_next.exp()])
            following = self._values(self._logs(self.targets, next_z, self.actor(next_z).tanh()))
            y = reward + c.discount * following.amin(0)
        loss = self._cross_entropy(y, self._logs(self.critics, z, action), rows["mask"])
        self._step(loss, "critics")
        with torch.no_grad():
            for target, online in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                target.lerp_(online, c.target_rate)
        return loss.detach()

    def _update_actor(self, z: Tensor) -> Tensor:
        loss = -self._values(self._logs(self.targets, z, self.actor(z).tanh())).amin(0).mean()
        self._step(loss, "actor")
        return loss.detach()

    def _step(self, loss: Tensor, *names: str) -> None:
        """Go back from the loss; clip and step each of these networks."""
        for name in names:
            self._optimisers[name].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for name in names:
            nn.utils.clip_grad_norm_(self._optimisers[name].param_groups[0]["params"], self.config.clip)
            self._optimisers[name].step()
