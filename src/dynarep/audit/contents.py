"""What a run's metrics must look like, from its configuration alone: when what was recorded, and whether it agrees."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from dynarep.experiment import RunConfig
from dynarep.records import COLUMNS, RunRecord

Time = tuple[int, int, int]  # agent step, frame, update

# Metrics that are finite unless the run diverged, by protocol; others are NaN where there is nothing to measure.
FINITE = {
    "online": ("critic/batch_q", "batch/reward", "entropy", "temperature", "eval/return", "return/final"),
    "frozen": ("q/on_policy",),
    "model_fit": ("reward/mse",),
    "latent_fit": ("reward/mse", "kl/step"),
}
LAST, TOLERANCE = 5, 1e-7  # evaluations of the final return; nine digits were written


def times(config: RunConfig) -> list[Time]:
    """Return when a run of this configuration records something, in order: the protocols' own plans, said again."""
    protocol, agent, repeat = config.protocol, config.agent, config.environment.action_repeat
    p: Any = protocol
    ratio = int(getattr(agent, "updates_per_step", 1))
    if protocol.name == "online":
        steps = {p.random_steps, *range(p.eval_every, p.steps + 1, p.eval_every)}
        steps |= {at for at in range(p.measure_every, p.steps + 1, p.measure_every) if at > p.random_steps}
        first = p.random_steps - ratio if getattr(agent, "pretrain", False) else 0  # of the first step that learns
        made = [(first + (at - p.random_steps) * ratio) * (at > p.random_steps) for at in sorted(steps)]
        return [(at, at * repeat, n) for at, n in zip(sorted(steps), made, strict=True)]
    if protocol.name == "frozen":
        updates = {0, *(-(-at // ratio) * ratio for at in (*p.measure_at, p.updates))}
        n = p.transitions + p.held_out
    elif protocol.name == "model_fit":
        updates = {*p.measure_at, p.updates} if p.measure_at else {*range(p.chunk, p.updates, p.chunk), p.updates}
        n = p.transitions
    elif protocol.name == "latent_fit":
        updates, n = {*p.measure_at, p.updates}, p.transitions
    elif protocol.name == "policy_evaluation":
        learns = getattr(agent, "learns_a_model", lambda: False)()
        updates = {*p.measure_at, p.updates} | ({0} if learns and p.model_updates else set())
        n = p.transitions
    elif protocol.name == "td_spectrum":
        updates, n = {0}, 0
    else:
        raise NotImplementedError(protocol.name)
    return [(n, n * repeat, update) for update in sorted(updates)]


def units(config: RunConfig) -> int:
    """Return in how many units of its own a protocol counts its work: a stop comes before the last."""
    p: Any = config.protocol
    if p.name == "online":
        return int(p.steps)
    if p.name == "policy_evaluation":
        learns = getattr(config.agent, "learns_a_model", lambda: False)()
        return int(p.updates + (p.model_updates if learns else 0))
    return times(config)[-1][2] if p.name != "td_spectrum" else 1


def faults(config: RunConfig, record: RunRecord) -> Iterator[tuple[str, str]]:
    """Yield kind and message of what this configuration's protocol cannot have recorded."""
    columns = record.columns
    counts = np.stack([columns[name] for name in COLUMNS[:3]], axis=1)
    if not (np.isfinite(counts).all() and (counts == np.round(counts)).all() and (counts >= 0).all()):
        yield "malformed", "counts of steps, frames or updates that are not whole numbers"
        return
    found = list(map(tuple, counts.astype(np.int64).tolist()))
    names = columns["metric"].tolist()
    if found != sorted(found, key=lambda time: (time[0], time[2])):
        yield "rows", "its rows are not in the order of time"
    if strange := sorted(set(names) - set(config.protocol.metrics)):
        yield "rows", f"has metrics that {config.protocol.name} does not record: {', '.join(strange[:3])}"
    if len(set(zip(found, names, strict=True))) < len(names):
        yield "rows", "has a metric twice at the same time"
    planned, measured = times(config), set(found)
    if lacking := [time for time in planned if time not in measured]:
        yield "rows", f"nothing was recorded at {_words(lacking[0])}, of {len(lacking)} of {len(planned)} times planned"
    if beyond := sorted(measured - set(planned)):
        yield "rows", f"something was recorded at {_words(beyond[0])}, which the protocol does not plan"
    yield from _divergence(config, record)
    if config.protocol.name == "online":
        yield from _summary(record)


def canonical(record: RunRecord) -> bytes:
    """Return the metrics as a run writes them: nine digits, whole counts. Finite counts only."""
    columns = record.columns
    rows = zip(*(columns[name].tolist() for name in COLUMNS), strict=True)
    lines = [f"{step:.0f},{frame:.0f},{update:.0f},{metric},{value:.9g}" for step, frame, update, metric, value in rows]
    return ("\n".join([",".join(COLUMNS), *lines]) + "\n").encode()


def _words(time: Time) -> str:
    return f"agent step {time[0]}, frame {time[1]}, update {time[2]}"


def _divergence(config: RunConfig, record: RunRecord) -> Iterator[tuple[str, str]]:
    """Divergence is a result, and must be said: once a number is not finite, the run has diverged."""
    flags = record.series("diverged")[1]
    if "diverged" not in config.protocol.metrics:
        return
    if not len(flags):
        yield "diverged", "does not say whether it diverged"
    elif not np.isin(flags, (0.0, 1.0)).all():
        yield "diverged", "'diverged' is neither 0 nor 1"
    elif flags[-1] == 0:
        for metric in FINITE.get(config.protocol.name, ()):
            if not np.isfinite(record.series(metric)[1]).all():
                yield "diverged", f"says that it did not diverge, but its {metric} is not finite"


def _summary(record: RunRecord) -> Iterator[tuple[str, str]]:
    """The last rows of an online run follow from its evaluations."""
    returns = record.series("eval/return")[1]
    if not len(returns):
        return
    expected = {"return/final": float(np.mean(returns[-LAST:])), "return/area": float(np.mean(returns))}
    for metric, value in expected.items():
        said = record.series(metric)[1]
        size = TOLERANCE * float(np.nanmax(np.abs(returns), initial=1.0))
        if len(said) != 1:
            yield "rows", f"has {len(said)} values of {metric}, 1 expected"
        elif not (said[0] == value or abs(said[0] - value) <= size or (math.isnan(said[0]) and math.isnan(value))):
            yield "rows", f"its {metric} is {said[0]:g}, its evaluations make it {value:g}"
