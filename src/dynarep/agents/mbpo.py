"""MBPO's model and its repair FTFL (arXiv 2510.01457): a probabilistic ensemble with four kinds of target.

    train_chunk, 25 times in one retraining (warm start: weights and Adam state stay):                      `ftfl` 3.3
        split the real transitions 80/20, anew
        on the 80:  moments of [s, a], and of y = [s' - s; r] or [s'; r] if targets are normalised, else (0, 1)
        200 times:  x = norm(s, a), y~ = (y - mu) / sigma, rows drawn with replacement from the 80          `update`
                    one Adam step on  sum_e mean_bd [(m - y~)^2 exp(-l) + l] + weight decay
        on the 20:  elites = the 5 members with the lowest squared error of m                               `score`
    every row draws an elite e and y = mu + sigma (m_e + exp(l_e / 2) noise);                               `sample`
        s'^ = s + y[:o] or y[:o],  r^ = y[o], in raw units

Residual raw targets are MBPO, direct normalised ones FTFL; the other two cells tell the halves of the repair apart.

Two softplus hold the log-variance in (min, max) (`ftfl` 3.2). Composed, they are a scaled sigmoid of the network's
output u, which is what is computed:  exp(l) = exp(min) + exp(max) sigmoid(u - max).

Shapes: S seeds, E members, B rows, o and a lengths of observation and action, D = o + 1 outputs, reward last. "Network
units" are those of y~, "raw units" those of the environment; they are the same if targets are not normalised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtr, ndtri
from torch import Tensor

from dynarep.configs.mbpo import EnsembleConfig
from dynarep.nets import Adam, Initialiser, Net, Spec
from dynarep.replay import draw

Batch = Mapping[str, Tensor]
Generators = Sequence[np.random.Generator]
FIELDS = ("obs", "action", "reward", "next_obs")
STATE = ("elites", "input_mean", "input_std", "target_mean", "target_std")
ROWS = 512  # rows evaluated at a time; not a function of S, because a row's last bits may depend on it
EVEN = 32  # the last rows are padded to a multiple of this, see nets.py on block invariance
HOLDOUT_CLIP = 10.0  # of normalised targets, in the holdout metric alone (`ftfl` 3.5)


class Prediction(NamedTuple):
    """What every member predicts, in raw units: means (S, E, B, o) and (S, E, B), variances (S, E, B, o + 1)."""

    next_obs: Tensor
    reward: Tensor
    variance: Tensor


def truncated_normal(members: int) -> Initialiser:
    """Return the kernel initialiser of `ftfl` 3.2: a normal cut at two standard deviations, variance 1 / (E in).

    flax's lecun_normal counts the member axis as fan-in (quirk Q11); 0.8796 is the deviation that the cut leaves.
    """

    def init(rng: np.random.Generator, fan_in: int, fan_out: int) -> np.ndarray:
        draws: np.ndarray = ndtri(rng.uniform(ndtr(-2.0), ndtr(2.0), size=(fan_in, fan_out)))
        return draws / (0.87962566103423978 * math.sqrt(members * fan_in))

    return init


class Ensemble:
    """The model of MBPO and FTFL for a block of seeds.

    Args:
        config: hyperparameters.
        obs_size: length of an observation, o.
        action_size: length of an action, a.
        seeds: the run seeds trained together, S of them.

    A seed's numbers do not depend on its block if minibatches are multiples of 32 rows (see nets.py) and the width is a
    multiple of 8: matrix products round differently where an entry of the batch is not aligned in memory.

    Raises:
        ValueError: `weight_decay` does not name one rate per layer, or there are more elites than members.
    """

    def __init__(self, config: EnsembleConfig, obs_size: int, action_size: int, seeds: Sequence[int]) -> None:
        c = self.config = config
        if len(c.weight_decay) != c.layers + 1:
            raise ValueError(
                f"weight_decay has {len(c.weight_decay)} rates, but layers = {c.layers} needs {c.layers + 1}: "
                "one per hidden layer and one for the output, first to last"
            )
        if c.elites > c.members:
            raise ValueError(f"elites = {c.elites} exceeds members = {c.members}")
        self.seeds, self.outputs = list(seeds), obs_size + 1
        sizes = (obs_size + action_size, *[c.width] * c.layers, 2 * self.outputs)
        self.net = Net("ensemble", {"": Spec(sizes, F.silu)}, seeds, truncated_normal(c.members), c.members)
        self._adam = Adam(self.net, c.lr)
        rates = self.net.target()
        rates.flat.zero_()
        for layer, rate in enumerate(c.weight_decay):
            rates.parameter(f"/{layer}.kernel").fill_(rate)
        self._decay = rates.flat[:1].clone()  # (1, parameters of one member)
        self.elites = torch.arange(c.elites).repeat(len(seeds), 1)
        self.input_mean, self.input_std = torch.zeros(len(seeds), sizes[0]), torch.ones(len(seeds), sizes[0])
        self.target_mean, self.target_std = torch.zeros(len(seeds), self.outputs), torch.ones(len(seeds), self.outputs)

    # -- units ---------------------------------------------------------------------------------------------------

    def fit_normalisers(self, data: Batch, rows: Tensor | None = None) -> None:
        """Set the moments of inputs, and of targets if they are normalised, from `data` in raw units (`ftfl` 3.2, 3.5).

        Shapes: obs (S, N, o), action (S, N, a), reward (S, N), next_obs (S, N, o); only `rows` (S, n) of them if given.
        """
        for s in range(len(self.seeds)):  # one seed at a time: bounded memory, and sums that cannot know the block
            own = {name: data[name][s] if rows is None else data[name][s, rows[s]] for name in FIELDS}
            variance, self.input_mean[s] = torch.var_mean(torch.cat([own["obs"], own["action"]], -1), 0, correction=0)
            self.input_std[s] = variance.sqrt() + self.config.epsilon
            if self.config.normalise_targets:
                variance, self.target_mean[s] = torch.var_mean(self.targets(own), 0, correction=0)
                self.target_std[s] = variance.sqrt() + self.config.epsilon

    def targets(self, batch: Batch) -> Tensor:
        """Return what is regressed, [s' - s; r] or [s'; r] in raw units, (..., o + 1)."""
        state = batch["next_obs"] - batch["obs"] if self.config.target == "residual" else batch["next_obs"]
        return torch.cat([state, batch["reward"].unsqueeze(-1)], -1)

    def _inputs(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], -1)
        return x.sub_(_along(self.input_mean, x)).div_(_along(self.input_std, x))

    def _normalised_targets(self, batch: Batch) -> Tensor:
        """Targets in network units, (S, 1, B, D) if members share rows, else (S, E, B, D)."""
        y = self.targets(batch)
        y = y.sub_(_along(self.target_mean, y)).div_(_along(self.target_std, y))
        return y.unsqueeze(1) if y.dim() == 3 else y

    def _raw(self, y: Tensor, obs: Tensor) -> Tensor:
        """Network units -> next observation and reward in raw units, (..., D)."""
        y = y * _along(self.target_std, y) + _along(self.target_mean, y)
        if self.config.target == "residual":
            y[..., :-1] += obs
        return y

    # -- network -------------------------------------------------------------------------------------------------

    def _output(self, x: Tensor) -> Tensor:
        """Normalised inputs -> (S, E, B, 2 D), means and then log-variances before the clamp."""
        out = self.net(x)
        return out if out.dim() == 4 else out.unsqueeze(1)

    def _variance(self, out: Tensor) -> Tensor:
        """Variance in network units, (S, E, B, D), from an output of the networks."""
        low, high = self.config.log_variance_min, self.config.log_variance_max
        return (out[..., self.outputs :] - high).sigmoid() * math.exp(high) + math.exp(low)

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and clamped log-variance in network units, each (S, E, B, D), with gradient.

        Members share rows obs (S, B, o) and action (S, B, a), or have their own, (S, E, B, o) and (S, E, B, a).
        """
        out = self._output(self._inputs(obs, action))
        return out[..., : self.outputs], self._variance(out).log()

    def _evaluate(self, obs: Tensor, action: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield slices of the rows with mean and variance there, in network units, (S, E, rows, D)."""
        total = obs.shape[-2]
        for start in range(0, total, ROWS):
            rows = slice(start, min(start + ROWS, total))
            size = rows.stop - start
            out = self._output(F.pad(self._inputs(obs[..., rows, :], action[..., rows, :]), (0, 0, 0, -size % EVEN)))
            yield rows, out[..., :size, : self.outputs], self._variance(out)[..., :size, :]

    # -- learning ------------------------------------------------------------------------------------------------

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Take one Adam step (`ftfl` 3.2).

        Args:
            batch: obs, action, reward, next_obs in raw units, each (S, B, ...), the same rows for every member (quirk
                Q1), or (S, E, B, ...), rows of their own.

        Returns:
            The loss before the step, each term (S,) and summed over members: `mse_loss` (weighted by precision),
            `var_loss` (log-variance), `weight_decay`, their sum `total_loss`; and `grad_norm` of that sum.
        """
        out = self._output(self._inputs(batch["obs"], batch["action"]))
        weights, grad = self.net.flat, self.net.flat.grad
        assert grad is not None
        torch.mul(weights, self._decay, out=grad)  # the gradient of the decay; backward adds the rest
        pairs = zip(weights.chunk(len(self.seeds)), grad.chunk(len(self.seeds)), strict=True)
        decay = 0.5 * torch.stack([torch.dot(w.flatten(), g.flatten()) for w, g in pairs])
        mse, log_variance, slope = self._loss(out.detach(), self._normalised_targets(batch))
        torch.autograd.backward(out, slope)
        terms = {"mse_loss": mse, "var_loss": log_variance, "weight_decay": decay}
        return terms | {"total_loss": mse + log_variance + decay, "grad_norm": self._adam.step()}

    def _loss(self, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the terms mean (m - y)^2 / v and mean log v, (S,), and the derivative of their sum by `out`.

        With v = exp(min) + exp(max) g and g = sigmoid(u - max), the derivatives of an element are 2 (m - y) / v by m
        and (1 - (m - y)^2 / v) / v * exp(max) g (1 - g) by u. Autograd makes twice as many passes over the arrays.
        """
        low, high, count = self.config.log_variance_min, self.config.log_variance_max, y[0, 0].numel()
        gate = out[..., self.outputs :].sub(high).sigmoid_()
        variance = gate.mul(math.exp(high)).add_(math.exp(low))
        log_variance = variance.log().sum((1, 2, 3)) / count
        error = out[..., : self.outputs] - y
        precision = variance.reciprocal_()
        weighted = error * precision
        slope = torch.empty_like(out)
        torch.mul(weighted, 2.0 / count, out=slope[..., : self.outputs])
        squared = weighted.mul_(error)  # / v
        mse = squared.sum((1, 2, 3)) / count
        by_variance = torch.addcmul(precision, precision, squared, value=-1.0)
        chain = torch.addcmul(gate, gate, gate, value=-1.0).mul_(math.exp(high) / count)
        torch.mul(by_variance, chain, out=slope[..., self.outputs :])
        return mse, log_variance, slope

    @torch.no_grad()
    def score(self, data: Batch, counts: Tensor | None = None) -> Tensor:
        """Return every member's mean squared error (S, E) in network units, by which elites are chosen (quirk Q3).

        Normalised targets are cut at +-10, or a channel that is constant in the training part alone would decide
        (`ftfl` 3.5). `data` is (S, N, ...) or (S, E, N, ...); row n counts `counts[s, n]` times, once if None.
        """
        y = self._normalised_targets(data)
        if self.config.normalise_targets:
            y.clamp_(-HOLDOUT_CLIP, HOLDOUT_CLIP)
        if counts is None:
            counts = torch.ones(len(self.seeds), y.shape[2])
        total = torch.zeros(len(self.seeds), self.config.members, dtype=torch.float64)
        for rows, mean, _ in self._evaluate(data["obs"], data["action"]):
            error = (mean - y[:, :, rows]).square_().mean(-1, dtype=torch.float64)
            total += error.mul_(counts[:, None, rows]).sum(-1)
        return (total / counts.sum(1, keepdim=True)).float()

    def train_chunk(self, data: Batch, generators: Generators, steps: int) -> dict[str, Tensor]:
        """Learn for one chunk: split, refit normalisers, take `steps` >= 1 steps, choose elites (`ftfl` 3.3, step 2).

        `data` are real transitions (S, N, ...), N >= 2; each seed draws from its own generator. Returns what `update`
        says of the last minibatch, as the reference logs it (quirk Q10).
        """
        c, size = self.config, data["reward"].shape[1]
        order = torch.from_numpy(np.stack([g.permutation(size) for g in generators]))
        held, train = order.tensor_split([max(1, int(c.holdout * size))], 1)
        self.fit_normalisers(data, train)
        shape = (c.batch_size,) if c.shared_batches else (c.members, c.batch_size)
        for _ in range(steps):
            picks = draw(generators, train.shape[1], shape)
            terms = self.update(_take(data, train.gather(1, picks.flatten(1)).view(picks.shape)))
        picks = draw(generators, held.shape[1], (c.holdout_draws,))
        counts = torch.zeros(held.shape).scatter_add_(1, picks, torch.ones(picks.shape))
        scores = self.score(_take(data, held), counts)  # counting draws: 50 000 of them need only the rows there are
        self.elites = scores.argsort(dim=1, stable=True)[:, : c.elites].sort(1).values
        return terms

    # -- predictions ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, obs: Tensor, action: Tensor) -> Prediction:
        """Return every member's prediction in raw units, for observations (S, B, o) and actions (S, B, a)."""
        _, means, variances = zip(*self._evaluate(obs, action), strict=True)
        mean, variance = self._raw(torch.cat(means, 2), obs.unsqueeze(1)), torch.cat(variances, 2)
        return Prediction(mean[..., :-1], mean[..., -1], variance * _along(self.target_std, variance).square())

    @torch.no_grad()
    def sample(self, obs: Tensor, action: Tensor, generators: Generators) -> tuple[Tensor, Tensor]:
        """Return a sampled next observation (S, B, o) and reward (S, B) per row of `obs` and `action`, in raw units.

        Each seed draws a uniformly random elite per row, then the noise, from its own generator.
        """
        size = obs.shape[1]
        members = self.elites.gather(1, draw(generators, self.config.elites, (size,)))
        noise = np.stack([g.standard_normal((size, self.outputs), dtype=np.float32) for g in generators])
        y = torch.from_numpy(noise)
        for rows, mean, variance in self._evaluate(obs, action):
            member = members[:, None, rows, None].expand(-1, -1, -1, self.outputs)
            std = variance.gather(1, member).squeeze(1).sqrt_()
            y[:, rows] = y[:, rows] * std + mean.gather(1, member).squeeze(1)
        y = self._raw(y, obs)
        return y[..., :-1], y[..., -1]

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs, as a flat dictionary of tensors."""
        own = {name: getattr(self, name).clone() for name in STATE}
        return own | {"net": self.net.flat.clone()} | {f"adam/{k}": v for k, v in self._adam.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state()`."""
        self.net.flat.copy_(state["net"])
        for name in STATE:
            setattr(self, name, state[name].clone())
        self._adam.load({k.removeprefix("adam/"): v for k, v in state.items() if k.startswith("adam/")})


def _along(moment: Tensor, values: Tensor) -> Tensor:
    """View (S, d) moments for arithmetic with (S, ..., d) values."""
    return moment.view(moment.shape[0], *[1] * (values.dim() - 2), moment.shape[1])


def _take(data: Batch, rows: Tensor) -> dict[str, Tensor]:
    """Gather rows (S, ...) of fields (S, N, ...)."""
    seed = torch.arange(rows.shape[0]).view(-1, *[1] * (rows.dim() - 1))
    return {name: data[name][seed, rows] for name in FIELDS}
