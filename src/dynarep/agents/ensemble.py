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

Two softplus hold the log-variance l in (min, max): `agents/gaussian.py`, with the loss and its gradient.

Shapes: S seeds, E members, B rows, o and a lengths of observation and action, D = o + 1 outputs, reward last. "Network
units" are those of y~, "raw units" those of the environment; they are the same if targets are not normalised.

What became of the reference code's quirks (`ftfl` 3.4), here and in `agents/mbpo.py`:

    Q1  members see identical minibatches            as in the reference; switch `shared_batches`
    Q2  log-variance bounds are fixed                as in the reference; switch `learnable_bounds`
    Q3  elites by squared error in network units     as in the reference; switch `elite_score`
    Q4  a new split in every chunk                   as in the reference; switch `resplit`
    Q5  parallel seeds share an environment seed     not replicated: every seed has its own
    Q6  parallel seeds share replay indices          not replicated: every seed draws its own
    Q7  the synthetic ratio's flag is overwritten    does not arise: `synthetic_share` is what it says
    Q8  rollouts longer than one step are wrong      right here, where `rollout_length` > 1: finished rows leave
    Q9  InvertedPendulum's rollouts never end        as in the reference; switch `terminations`
    Q10 logged model terms are in-sample             `train_chunk` returns those; protocols measure on unseen rows too
    Q11 initial fan-in counts members                as in the reference; switch `member_fan_in`
    Q12 left-over flags and configurations           left out
    Q13 the logged weight decay is wrong             the one that is optimised is logged
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

from dynarep import process
from dynarep.agents.gaussian import GaussianHead
from dynarep.configs.mbpo import EnsembleConfig
from dynarep.initialisers import Initialiser
from dynarep.nets import EVEN, Net, Spec
from dynarep.optimisers import Adam
from dynarep.placement import moved
from dynarep.replay import draw, normal
from dynarep.streams import stream

Batch = Mapping[str, Tensor]
Generators = Sequence[np.random.Generator]
FIELDS = ("obs", "action", "reward", "next_obs")
STATE = ("elites", "input_mean", "input_std", "target_mean", "target_std")
ROWS = 512  # rows evaluated at a time; not a function of S, because a row's last bits may depend on it
TILE = 256  # rows of one elite evaluated at a time, at most: as fast as larger ones
HOLDOUT_CLIP = 10.0  # of normalised targets, in the holdout metric alone (`ftfl` 3.5)


class Prediction(NamedTuple):
    """What every member predicts, in raw units: means (S, E, B, o) and (S, E, B), variances (S, E, B, o + 1)."""

    next_obs: Tensor
    reward: Tensor
    variance: Tensor


def truncated_normal(copies: int) -> Initialiser:
    """Return the kernel initialiser of `ftfl` 3.2: a normal cut at two standard deviations, variance 1 / (copies in).

    flax's lecun_normal counts the member axis as fan-in, copies = E (quirk Q11); meant is 1. 0.8796 is the deviation
    that the cut leaves.
    """

    def init(rng: np.random.Generator, fan_in: int, fan_out: int) -> np.ndarray:
        draws: np.ndarray = ndtri(rng.uniform(ndtr(-2.0), ndtr(2.0), size=(fan_in, fan_out)))
        return draws / (0.87962566103423978 * math.sqrt(copies * fan_in))

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
        if len(c.weight_decay) != c.model_layers + 1:
            raise ValueError(
                f"weight_decay has {len(c.weight_decay)} rates, but model_layers = {c.model_layers} needs "
                f"{c.model_layers + 1}: one per hidden layer and one for the output, first to last"
            )
        if c.elites > c.members:
            raise ValueError(f"elites = {c.elites} exceeds members = {c.members}")
        self.seeds, self.outputs = list(seeds), obs_size + 1
        hidden = (obs_size + action_size, *[c.model_width] * c.model_layers)
        if c.separate_reward:
            branches = {"": Spec((*hidden, 2 * obs_size), F.silu), "reward": Spec((*hidden, 2), F.silu)}
        else:
            branches = {"": Spec((*hidden, 2 * self.outputs), F.silu)}
        self.net = Net("ensemble", branches, seeds, truncated_normal(c.members if c.member_fan_in else 1), c.members)
        self._adam = Adam(self.net, c.model_lr)
        rates = self.net.target()
        rates.flat.zero_()
        for branch in branches:
            for layer, rate in enumerate(c.weight_decay):
                rates.parameter(f"{branch}/{layer}.kernel").fill_(rate)
        self._decay = rates.flat[:1].clone()  # (1, parameters of one member)
        self.head = GaussianHead(c, self.outputs, seeds)
        # Learned bounds take their gradient on the way, which is no function of tensors alone.
        self._fused_slopes = self._slopes if c.learnable_bounds else process.fused(self._slopes)
        device = process.device()
        self.elites = torch.arange(c.elites, device=device).repeat(len(seeds), 1)
        self.input_mean = torch.zeros(len(seeds), hidden[0], device=device)
        self.target_mean = torch.zeros(len(seeds), self.outputs, device=device)
        self.input_std, self.target_std = torch.ones_like(self.input_mean), torch.ones_like(self.target_mean)
        # The elites' weights side by side, for `sample`; refreshed when it finds that they are others.
        self._elite_net = Net("elites", branches, seeds, lambda rng, *shape: np.zeros(shape), c.elites).target()
        self._elites_in_net: Tensor | None = None

    # -- units ---------------------------------------------------------------------------------------------------

    def fit_normalisers(self, data: Batch, rows: Tensor | None = None) -> None:
        """Set the moments of inputs, and of targets if they are normalised, from `data` in raw units (`ftfl` 3.2, 3.5).

        Shapes: obs (S, N, o), action (S, N, a), reward (S, N), next_obs (S, N, o); only `rows` (S, n) of them if given.
        """
        c = self.config
        for s in range(len(self.seeds)):  # one seed at a time: bounded memory, and sums that cannot know the block
            every = {name: data[name][s] for name in FIELDS}
            own = (
                every
                if rows is None
                else {name: values[moved(rows[s], values.device)] for name, values in every.items()}
            )
            variance, self.input_mean[s] = torch.var_mean(torch.cat([own["obs"], own["action"]], -1), 0, correction=0)
            self.input_std[s] = variance.sqrt() + c.epsilon
            if c.normalise_targets:
                # The buffer forgets nothing within a run, so Welford's running moments are those of all its rows.
                y = self.targets(own if c.target_refit == "chunk" else every)
                variance, self.target_mean[s] = torch.var_mean(y, 0, correction=0)
                if c.target_statistics == "block":
                    variance[:-1] = variance[:-1].mean()
                std = variance.sqrt()
                self.target_std[s] = std.where(std >= c.epsilon, 1.0) if c.epsilon_floor else std + c.epsilon

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

    def _output(self, x: Tensor, net: Net) -> Tensor:
        """Normalised inputs -> (S, E, B, 2 D), means and then log-variances before the clamp."""
        return self._joined([net(x, branch) for branch in net.branches])

    def _joined(self, outs: Sequence[Tensor]) -> Tensor:
        """Outputs of the branches, (S, [E,] B, ...) -> (S, E, B, 2 D)."""
        first, *rest = outs if outs[0].dim() == 4 else [out.unsqueeze(1) for out in outs]
        if not rest:
            return first
        o, (reward,) = self.outputs - 1, rest
        return torch.cat([first[..., :o], reward[..., :1], first[..., o:], reward[..., 1:]], -1)

    def _parted(self, out: Tensor) -> list[Tensor]:
        """Undo `_joined`: (S, E, B, 2 D) -> one (S, E, B, ...) per branch."""
        if len(self.net.branches) == 1:
            return [out]
        state, reward, raw_state, raw_reward = torch.split(out, [self.outputs - 1, 1] * 2, -1)
        return [torch.cat([state, raw_state], -1), torch.cat([reward, raw_reward], -1)]

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and clamped log-variance in network units, each (S, E, B, D), with gradient.

        Members share rows obs (S, B, o) and action (S, B, a), or have their own, (S, E, B, o) and (S, E, B, a).
        """
        out = self._output(self._inputs(obs, action), self.net)
        return self.head.mean(out), self.head.variance(out).log()

    def _evaluate(self, obs: Tensor, action: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield slices of the rows with mean and variance there, in network units, (S, E, rows, D)."""
        total = obs.shape[-2]
        for start in range(0, total, ROWS):
            rows = slice(start, min(start + ROWS, total))
            size = rows.stop - start
            x = F.pad(self._inputs(obs[..., rows, :], action[..., rows, :]), (0, 0, 0, -size % EVEN))
            out = self._output(x, self.net)
            yield rows, self.head.mean(out)[..., :size, :], self.head.variance(out)[..., :size, :]

    # -- learning ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, batch: Batch, report: bool = True) -> dict[str, Tensor]:
        """Take one Adam step (`ftfl` 3.2). The derivatives are written out.

        Args:
            batch: obs, action, reward, next_obs in raw units, each (S, B, ...), the same rows for every member (quirk
                Q1), or (S, E, B, ...), rows of their own.
            report: whether anybody wants to know what is returned; nothing is, if not.

        Returns:
            The loss before the step, each term (S,) and summed over members: `mse_loss` (weighted by precision),
            `var_loss` (log-variance), `weight_decay`, their sum `total_loss`; and `grad_norm` of that sum by the
            networks' parameters. Learned bounds add `bounds_loss` to it.
        """
        torch.mul(self.net.flat, self._decay, out=self.net.flat.grad)  # the decay's gradient; the rest is added
        decay = {"weight_decay": self._weight_decay()} if report else {}
        out, y, slopes = self._fused_slopes(batch)
        terms = self._terms(out, y) | decay if report else {}
        for branch, own in zip(self.net.branches, slopes, strict=True):
            self.net.add(own, branch)
        self._elites_in_net = None
        terms |= self.head.step()
        if report:
            total = sum(terms.values(), start=torch.zeros((), device=out.device))
            terms |= {"total_loss": total, "grad_norm": self._adam.norm()}
        self._adam.step()
        return terms if report else {}

    def _slopes(self, batch: Batch) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
        """Return the output, what it is to be, and the derivative of the loss but its decay by each branch."""
        x, y = self._inputs(batch["obs"], batch["action"]), self._normalised_targets(batch)
        passes = [self.net.forward((x,), branch) for branch in self.net.branches]
        out = self._joined([own for own, _ in passes])
        parts = zip(self._parted(self.head.slope(out, y)), passes, strict=True)
        return out, y, [self.net.slopes(slope, tape)[0] for slope, (_, tape) in parts]

    def _weight_decay(self) -> Tensor:
        """Return the decay's term of the loss, (S,); the gradient holds the decay's, and nothing else yet."""
        weights, grad = self.net.flat, self.net.flat.grad
        assert grad is not None
        pairs = zip(weights.chunk(len(self.seeds)), grad.chunk(len(self.seeds)), strict=True)
        return 0.5 * torch.stack([torch.dot(w.flatten(), g.flatten()) for w, g in pairs])

    def _terms(self, out: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return the terms of the loss, decay and bounds aside."""
        mse, log_variance = self.head.terms(out, y)
        return {"mse_loss": mse, "var_loss": log_variance}

    @torch.no_grad()
    def score(self, data: Batch, counts: Tensor | None = None) -> Tensor:
        """Return every member's mean squared error (S, E), by which elites are chosen.

        In network units as in the reference (quirk Q3), where normalised targets are cut at +-10, or a channel that is
        constant in the training part alone would decide (`ftfl` 3.5). Other units: see `elite_score`. `data` is
        (S, N, ...) or (S, E, N, ...); row n counts `counts[s, n]` times, once if None.
        """
        c, y = self.config, self._normalised_targets(data)
        if c.normalise_targets and c.elite_score == "network":
            y.clamp_(-HOLDOUT_CLIP, HOLDOUT_CLIP)
        if counts is None:
            counts = torch.ones(len(self.seeds), y.shape[2], device=y.device)
        scale = None if c.elite_score == "network" else self._score_scale(data)
        total = torch.zeros(len(self.seeds), c.members, dtype=torch.float64, device=y.device)
        for rows, mean, _ in self._evaluate(data["obs"], data["action"]):
            error = (mean - y[:, :, rows]).square_()
            if scale is not None:
                error.mul_(_along(scale, error))
            total += error.mean(-1, dtype=torch.float64).mul_(counts[:, None, rows]).sum(-1)
        return (total / counts.sum(1, keepdim=True)).float()

    def _score_scale(self, data: Batch) -> Tensor:
        """Return what turns squared errors in network units into those of the score, per output, (S, D).

        A variance is that of the scored rows themselves; outputs that are constant there do not count.
        """
        scale = self.target_std.square()
        if self.config.elite_score == "relative":
            y = self.targets(data)
            variance = torch.stack([own.flatten(0, -2).var(0, correction=0) for own in y])
            scale = torch.where(variance > 0, scale / variance, 0.0)
        return scale

    def train_chunk(self, data: Batch, generators: Generators, steps: int) -> dict[str, Tensor]:
        """Learn for one chunk: split, refit normalisers, take `steps` >= 1 steps, choose elites (`ftfl` 3.3, step 2).

        `data` are real transitions (S, N, ...), N >= 2; each seed draws from its own generator. Returns what `update`
        says of the last minibatch, as the reference logs it (quirk Q10).
        """
        c = self.config
        held, train = self._split(data["reward"].shape[1], generators)
        self.fit_normalisers(data, train)
        shape = (c.model_batch_size,) if c.shared_batches else (c.members, c.model_batch_size)
        picks = draw(generators, train.shape[1], (steps, *shape))
        rows = moved(train.gather(1, picks.flatten(1)).view(picks.shape), data["reward"].device)
        for step in range(steps):
            terms = self.update(_take(data, rows[:, step]), report=step == steps - 1)
        picks = draw(generators, held.shape[1], (c.holdout_draws,))
        if c.elites == c.members:
            return terms  # there is nothing to choose
        counts = torch.zeros(held.shape).scatter_add_(1, picks, torch.ones(picks.shape))
        scores = self.score(
            _take(data, held), moved(counts, process.device())
        )  # counting draws: 50 000 of them need only the rows there are
        self.elites = scores.argsort(dim=1, stable=True)[:, : c.elites].sort(1).values
        return terms

    def _split(self, size: int, generators: Generators) -> tuple[Tensor, Tensor]:
        """Return the numbers of the rows kept back and of those learned from, (S, H) and (S, L)."""
        share = self.config.holdout
        if self.config.resplit == "chunk":
            order = torch.from_numpy(np.stack([g.permutation(size) for g in generators]))
            held, train = order.tensor_split([max(1, int(share * size))], 1)
            return held, train
        # For good: one of every 5 consecutive rows, at a place that the seed alone decides. Newer rows wait for a full
        # five, so that every seed keeps back as many and no row ever changes sides.
        length = max(2, round(1 / share))
        groups = size // length
        if groups == 0:
            raise ValueError(f"resplit = never needs {length} transitions or more (1 / holdout), got {size}")
        places = np.stack([stream(s, "holdout").random(groups) for s in self.seeds])
        kept = torch.arange(length) == torch.from_numpy((places * length).astype(np.int64)).unsqueeze(-1)
        rows = torch.arange(groups * length).expand(len(self.seeds), -1)
        kept = kept.flatten(1)
        return rows[kept].view(len(self.seeds), -1), rows[~kept].view(len(self.seeds), -1)

    # -- predictions ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, obs: Tensor, action: Tensor) -> Prediction:
        """Return every member's prediction in raw units, for observations (S, B, o) and actions (S, B, a)."""
        _, means, variances = zip(*self._evaluate(obs, action), strict=True)
        mean, variance = self._raw(torch.cat(means, 2), obs.unsqueeze(1)), torch.cat(variances, 2)
        return Prediction(mean[..., :-1], mean[..., -1], variance * _along(self.target_std, variance).square())

    @torch.no_grad()
    def sample(self, obs: Tensor, action: Tensor, generators: Generators, noisy: bool = True) -> tuple[Tensor, Tensor]:
        """Return a sampled next observation (S, B, o) and reward (S, B) per row of `obs` and `action`, in raw units.

        Each seed draws a uniformly random elite per row, then the noise, from its own generator. Only the elite that a
        row drew is evaluated there. Without `noisy`, the elite's mean is what is returned.
        """
        size = obs.shape[1]
        picks = moved(draw(generators, self.config.elites, (size,)), obs.device)
        noise = normal(generators, (size, self.outputs))
        mean, variance = self._evaluate_elites(self._inputs(obs, action), picks)
        y = self._raw(noise * variance.sqrt_() + mean if noisy else mean, obs)
        return y[..., :-1], y[..., -1]

    def _evaluate_elites(self, x: Tensor, picks: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of one elite per row, each (S, B, D) in network units.

        Rows are grouped by elite and evaluated in tiles of as many rows for every elite. How many tiles that takes may
        depend on another seed, but their size must not, and what fills them up is dropped.

        Args:
            x: normalised inputs, (S, B, o + a).
            picks: place among the seed's elites, (S, B).
        """
        if self._elites_in_net is not self.elites:
            weights = torch.unflatten(self.net.flat, 0, (len(self.seeds), -1))
            own = self.elites.unsqueeze(-1).expand(-1, -1, weights.shape[-1])
            self._elite_net.flat.copy_(weights.gather(1, own).flatten(0, 1))
            self._elites_in_net = self.elites
        size, elites, device = x.shape[1], self.config.elites, x.device
        tile = min(TILE, -(-5 * size // (4 * elites * EVEN)) * EVEN)  # an elite's share of the rows and a quarter more
        order = picks.argsort(dim=1, stable=True)
        counts = F.one_hot(picks, elites).sum(1)
        first = counts.cumsum(1) - counts  # where an elite's rows begin in `order`
        length = -(-int(counts.max()) // tile) * tile
        filled = (first.unsqueeze(-1) + torch.arange(length, device=device)).clamp_(max=size - 1)
        seed = torch.arange(len(self.seeds), device=device).view(-1, 1, 1)
        x = x[seed, order.gather(1, filled.flatten(1)).view(filled.shape)]  # (S, elites, length, o + a)
        out = torch.cat([self._output(part, self._elite_net) for part in torch.split(x, tile, 2)], 2)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(size, device=device).expand_as(order))
        place = rank - first.gather(1, picks)
        where = seed[..., 0], picks, place
        return self.head.mean(out)[where], self.head.variance(out)[where]  # of whole tiles, see nets.py

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint needs, as a flat dictionary of tensors."""
        own = {name: getattr(self, name).clone() for name in STATE} | {"net": self.net.flat.clone()}
        parts = {"adam": self._adam.state(), "head": self.head.state()}
        return own | {f"{part}/{k}": v for part, values in parts.items() for k, v in values.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state()`."""
        self.net.flat.copy_(state["net"])
        for name in STATE:
            setattr(self, name, state[name].to(process.device(), copy=True))
        self._adam.load({k.removeprefix("adam/"): v for k, v in state.items() if k.startswith("adam/")})
        self.head.load({k.removeprefix("head/"): v for k, v in state.items() if k.startswith("head/")})
        self._elites_in_net = None


def _along(moment: Tensor, values: Tensor) -> Tensor:
    """View (S, d) moments for arithmetic with (S, ..., d) values."""
    return moment.view(moment.shape[0], *[1] * (values.dim() - 2), moment.shape[1])


def _take(data: Batch, rows: Tensor) -> dict[str, Tensor]:
    """Gather rows (S, ...) of fields (S, N, ...), which may lie on the host; the rows are on the process's device."""
    rows = moved(rows, data["reward"].device)
    seed = torch.arange(rows.shape[0], device=rows.device).view(-1, *[1] * (rows.dim() - 1))
    return {name: moved(data[name][seed, rows], process.device()) for name in FIELDS}
