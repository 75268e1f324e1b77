"""Benchmarks: how close the updates come to the machine's matrix-multiply rate. Measured, never tested.

Every round times one burst of each kernel in turn, so that a drift of the machine's speed meets all of them alike; the
median over rounds is reported, with the matrix-multiply rate of the same run beside it. Times are processor time of
one thread. Each row says what was aimed at, and whether it is reached.

Beside our kernels stand those of others, timed in turn with ours: the same algorithm in plain PyTorch (`eager.py`),
and, in processes of their own (`processes.py`), other people's SAC (`peers.py`). Processes also say what two cores are
best used for. The statistics stand beside rliable's, which does the same resamples one by one; of those only a share
is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dynarep import aggregates, process
from dynarep.bench.kernels import Kernel, alm, bro, eager_mad_td, ensemble, gemm, mad_td, rollouts, sac, td_mpc2
from dynarep.bench.ratios import Report, compared
from dynarep.configs.alm import ALMConfig
from dynarep.configs.bro import BROConfig

# What the issue of speed asked for, at paper sizes: shares of the matrix-multiply rate, and times as fast.
SAC_SHARE, ENSEMBLE_SHARE, MAD_TD_SHARE = 0.65, 0.60, 0.55
CHOSEN_MEMBERS, EAGER_PYTORCH, TEN_SEEDS = 3.0, 2.0, 6.0


@dataclass(frozen=True)
class Row:
    """One kernel: milliseconds and GFLOP of one call, its rate, and the rate's share of the matrix-multiply rate."""

    name: str
    ms: float
    gflop: float
    gflops: float
    efficiency: float
    target: float | None = None  # of the efficiency
    met: bool | None = None


@dataclass(frozen=True)
class Beside:
    """An estimate with its bootstrap interval: seconds of one core here, and with rliable `ratio` times as long."""

    name: str
    seconds: float
    rliable_s: float  # of all resamples, from those that were timed
    ratio: float


@dataclass
class _Timed:
    """A kernel, what it should reach, and its seconds per call in every round."""

    kernel: Kernel
    target: float | None = None


def run(rounds: int = 9, compiled: bool = False, report: Report | None = None) -> dict[str, Any]:
    """Time every kernel on one thread.

    Args:
        rounds: bursts of each kernel; medians are over them.
        compiled: compile the updates first, where the agents can.
        report: called with rounds done and rounds in all.

    Returns:
        `machine`, how this process computed; `gemm_gflops`, the rate of a square fp32 product; `rows`, a list of `Row`;
        `ratios`, one of `Ratio`; and `statistics`, one of `Beside`, as plain data.
    """
    process.settle(compiled=compiled)
    chosen, every = rollouts(20_000)
    one, ten = (mad_td(seeds, 64, 32, updates=16, model=True) for seeds in (1, 10))
    small = [(mad_td(1, 128, 128, 1, model), eager_mad_td(128, 128, 1, model)) for model in (False, True)]
    small_bro = BROConfig(critic_width=64, actor_width=32, batch_size=64, quantiles=32)
    timed = [
        _Timed(gemm()),
        _Timed(sac(1, 256, 256), SAC_SHARE),
        _Timed(sac(5, 64, 64)),
        _Timed(ensemble(1, 200, 256), ENSEMBLE_SHARE),
        _Timed(ensemble(5, 64, 32)),
        _Timed(chosen),
        _Timed(every),
        _Timed(mad_td(1, 512, 512, updates=1), MAD_TD_SHARE),
        _Timed(mad_td(1, 512, 512, updates=0), MAD_TD_SHARE),
        _Timed(bro(1, BROConfig())),
        *(_Timed(bro(seeds, small_bro)) for seeds in (1, 10)),
        _Timed(td_mpc2(1, update=True)),
        _Timed(td_mpc2(1, update=False)),
        _Timed(alm(1, ALMConfig())),
        _Timed(alm(5, ALMConfig(width=64, model_width=128, batch_size=64))),
        *(_Timed(kernel) for pair in small for kernel in pair),
        _Timed(one),
        _Timed(ten),
    ]
    seconds = _interleaved([t.kernel for t in timed], rounds, report)
    rates = np.array([t.kernel.gflop for t in timed]) / seconds
    share = rates / rates[:, :1]
    rows = []
    for k, t in enumerate(timed):
        ms, gflops, efficiency = np.median(seconds[:, k]) * 1e3, np.median(rates[:, k]), np.median(share[:, k])
        reached = None if t.target is None else bool(efficiency >= t.target)
        rows.append(Row(t.kernel.name, ms, t.kernel.gflop, gflops, efficiency, t.target, reached))

    of = {t.kernel.name: seconds[:, k] for k, t in enumerate(timed)}
    ratios = [
        compared("rollouts: chosen members, against all seven", of[chosen.name], of[every.name], CHOSEN_MEMBERS),
        *(compared(f"{a.name}: against eager PyTorch", of[a.name], of[b.name], EAGER_PYTORCH) for a, b in small),
        compared(f"{one.name}: one of ten packed, against it alone", of[ten.name] / 10, of[one.name], TEN_SEEDS),
    ]
    return {
        "machine": process.describe(),
        "gemm_gflops": float(np.median(rates[:, 0])),
        "rows": [asdict(row) for row in rows],
        "ratios": [asdict(row) for row in ratios],
        "statistics": [asdict(row) for row in _statistics(rounds)],
    }


def _interleaved(kernels: list[Kernel], rounds: int, report: Report | None) -> np.ndarray:
    """Return seconds per call, (rounds, kernels)."""
    for kernel in kernels:
        kernel.settle()
    seconds = np.empty((rounds, len(kernels)))
    for i in range(rounds):
        seconds[i] = [kernel.time() for kernel in kernels]
        if report:
            report(i + 1, rounds)
    return seconds


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
