"""Garnet problems: small random decision problems, as tables of probabilities (Archibald et al. 1995)."""

import numpy as np

from dynarep.envs.base import FloatArray


def transitions(task: str, generator: np.random.Generator) -> FloatArray:
    """Draw the problem of a task "garnet-S-A-b": S states, A actions, b possible next states of each pair.

    Returns the probabilities of next states, shape (S, A, S). Which b states they are is drawn without replacement,
    their probabilities are the gaps between b - 1 uniform cuts of [0, 1] (Bhatnagar et al. 2009).
    """
    states, actions, branching = map(int, task.split("-")[1:])
    table = np.zeros((states, actions, states))
    for row in table.reshape(-1, states):
        cuts = np.sort(generator.random(branching - 1))
        row[generator.choice(states, branching, replace=False)] = np.diff(cuts, prepend=0.0, append=1.0)
    return table
