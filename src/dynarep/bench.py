"""Benchmarks: how close the updates come to the machine's matrix-multiply rate. Measured, never tested.

Every round times one burst of each kernel in turn, so that a drift of the machine's speed meets all of them alike; the
median over rounds is reported, with the matrix-multiply rate of the same run beside it. Operations are those of the
matrix products alone (`update_flops`), as the algorithm needs them: work that an implementation adds does not count.

The statistics stand beside rliable's, which does the same resamples one by one; of those only a share is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynarep import aggregates, process
from dynarep.agents.ensemble import Ensemble
from dynarep.agents.mad_td import MadTD
from dynarep.agents.sac import SAC
from dynarep.configs.mad_td import MadTDConfig
from dynarep.configs.mbpo import EnsembleConfig
from dynarep.configs.sac import SACConfig
from dynarep.streams import stream

OBS, ACTION = 67, 21  # humanoid (ftfl 6.1)
BURST_S = 0.15  # a kernel is repeated for at least that long in a round
GEMM = 512  # side of the square matrices


@dataclass(frozen=True)
class Row:
    """One kernel: milliseconds and GFLOP of one call, its rate, and the rate's share of the matrix-multiply rate."""

    name: str
    ms: float
    gflop: float
    gflops: float
    efficiency: float


@dataclass(frozen=True)
class Beside:
    """An estimate with its bootstrap interval: seconds of one core here, and with rliable `ratio` times as long."""

    name: str
    seconds: float
    rliable_s: float  # of all resamples, from those that were timed
    ratio: float


@dataclass
class _Kernel:
    name: str
    gflop: float
    call: Callable[[], object]
    repeats: int = 1

    def time(self) -> float:
        """Return seconds per call over one burst."""
        started = time.perf_counter()
        for _ in range(self.repeats):
            self.call()
        return (time.perf_counter() - started) / self.repeats

    def settle(self) -> None:
        """Warm up and find out how many calls make a burst."""
        self.call()
        self.repeats = max(1, round(BURST_S / self.time()))


def run(rounds: int = 9, report: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Time every kernel on one thread.

    Args:
        rounds: bursts of each kernel; medians are over them.
        report: called with rounds done and rounds in all.

    Returns:
        `gemm_gflops`, the rate of a square fp32 product; `rows`, a list of `Row`, and `statistics`, one of `Beside`, as
        plain data.
    """
    process.settle()
    kernels = [_gemm(), _sac(1, 256, 256), _sac(5, 64, 64), _ensemble(1, 200, 256), _ensemble(5, 64, 32)]
    kernels += _rollouts(20_000)
    for width, batch in ((512, 512), (128, 128)):
        kernels += [_mad_td(1, width, batch, updates=1), _mad_td(1, width, batch, updates=0)]
    kernels += [_mad_td(seeds, 64, 32, updates=16, model=True) for seeds in (1, 10)]
    for kernel in kernels:
        kernel.settle()
    seconds = np.empty((rounds, len(kernels)))
    for i in range(rounds):
        seconds[i] = [kernel.time() for kernel in kernels]
        if report:
            report(i + 1, rounds)
    rates = np.array([kernel.gflop for kernel in kernels]) / seconds
    gemm = float(np.median(rates[:, 0]))
    share = np.median(rates / rates[:, :1], axis=0)
    rows = [
        Row(kernel.name, float(np.median(seconds[:, k])) * 1e3, kernel.gflop, float(np.median(rates[:, k])), float(s))
        for k, (kernel, s) in enumerate(zip(kernels, share, strict=True))
    ]
    return {
        "gemm_gflops": gemm,
        "rows": [asdict(row) for row in rows],
        "statistics": [asdict(row) for row in _statistics(rounds)],
    }


def _statistics(rounds: int) -> list[Beside]:
    """Time an interquartile mean, and one method against another, in processor time of one core."""
    from rliable import library, metrics

    x, y = np.random.default_rng(0).random((2, 10, 7))
    each = [
        ("interquartile mean", 50_000, 200, aggregates.IQM, (x,), metrics.aggregate_iqm),
        ("probability of improvement", 2_000, 50, aggregates.IMPROVEMENT, (x, y), metrics.probability_of_improvement),
    ]
    rows = []
    for name, reps, share, statistic, arms, theirs in each:
        scores = {"x": arms[0] if len(arms) == 1 else list(arms)}

        def ours(statistic: aggregates.Statistic = statistic, arms: Any = arms, reps: int = reps) -> object:
            return aggregates.interval(statistic, *arms, reps=reps)

        def beside(scores: Any = scores, theirs: Any = theirs, share: int = share) -> object:
            return library.get_interval_estimates(scores, lambda *s: np.array([theirs(*s)]), reps=share)

        seconds = np.array([[_processor_s(call) for call in (ours, beside)] for _ in range(rounds)])
        mine, their = np.median(seconds, axis=0) * (1, reps / share)
        what = f"{name}, 10 seeds x 7 tasks, {reps:,} resamples"
        rows.append(Beside(what, float(mine), float(their), float(their / mine)))
    return rows


def _processor_s(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def _gemm() -> _Kernel:
    a, b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
    out = torch.empty(GEMM, GEMM)
    return _Kernel(f"matrix product {GEMM} x {GEMM}", 2 * GEMM**3 / 1e9, lambda: torch.mm(a, b, out=out))


def _rows(seeds: int, count: int) -> dict[str, Tensor]:
    shapes = {"obs": (OBS,), "action": (ACTION,), "reward": (), "next_obs": (OBS,), "mask": ()}
    rows = {name: torch.randn(seeds, count, *shape) for name, shape in shapes.items()}
    return rows | {"action": rows["action"].tanh(), "mask": torch.ones(seeds, count)}


def _sac(seeds: int, width: int, batch: int) -> _Kernel:
    config = SACConfig(width=width, batch_size=batch)
    agent = SAC(config, OBS, ACTION, range(seeds))
    rows, noise = _rows(seeds, batch), agent.noise([stream(s, "bench") for s in range(seeds)])
    gflop = seeds * config.update_flops(OBS, ACTION) / 1e9
    return _Kernel(f"SAC update, 2x{width}, batch {batch}, {_seeds(seeds)}", gflop, lambda: agent.update(rows, noise))


def _ensemble(seeds: int, width: int, batch: int) -> _Kernel:
    config = EnsembleConfig(model_width=width, model_batch_size=batch)
    model, rows = Ensemble(config, OBS, ACTION, range(seeds)), _rows(seeds, batch)
    gflop = seeds * config.update_flops(OBS, ACTION) / 1e9
    name = f"ensemble step, {config.members} x ({config.model_layers}x{width}), batch {batch}, {_seeds(seeds)}"
    return _Kernel(name, gflop, lambda: model.update(rows))


def _rollouts(states: int) -> list[_Kernel]:
    """Both ways to make one-step rollouts: the chosen member alone, and all of them of which one is then taken.

    Their operations are counted alike, one member per state: the share of the second says what it wastes.
    """
    config = EnsembleConfig()
    model, rows = Ensemble(config, OBS, ACTION, [0]), _rows(1, states)
    gflop = config.update_flops(OBS, ACTION) / 3 / config.members / config.model_batch_size * states / 1e9
    obs, action = rows["obs"], rows["action"]
    return [
        _Kernel(f"rollout of {states:,} states, chosen members", gflop, lambda: model.sample(obs, action, [stream(0)])),
        _Kernel(f"rollout of {states:,} states, all members", gflop, lambda: model.predict(obs, action)),
    ]


def _mad_td(seeds: int, width: int, batch: int, updates: int, model: bool = False) -> _Kernel:
    """Critic + actor updates, the encoding of their minibatches included; or one update of encoder and model; or both.

    Both together are one agent step at that update ratio, without its environment.
    """
    config = MadTDConfig(width=width, batch_size=batch)
    agent, rows = MadTD(config, OBS, ACTION, range(seeds)), _rows(seeds, max(updates, 1) * batch)
    size = f"width {width}, batch {batch}, {_seeds(seeds)}"
    batches = {name: torch.unflatten(values, 1, (-1, batch)) for name, values in rows.items()}
    by_model = config.model_update_flops(OBS, ACTION)
    if not updates:
        return _Kernel(f"MAD-TD model update, {size}", seeds * by_model / 1e9, lambda: agent.update_model(rows))
    gflop = seeds * (updates * config.update_flops(OBS, ACTION) + model * by_model) / 1e9
    name = f"{updates} critic + actor updates and 1 of the model" if model else "critic + actor update"
    return _Kernel(f"MAD-TD {name}, {size}", gflop, lambda: agent.update(batches, learn_model=model))


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"
