"""Expected semi-gradient TD(0) with linear action values: the matrix that decides whether it converges.

Ours: standard linear TD analysis; not the paper's formula. MAD-TD's section 3.1 argues that a matrix splits into a
positive definite term and one that need not be, which stems from the target policy's choice of actions; the equation
itself was not available. A decomposition that fits the description (mad-td 1.2), with features Phi (n, d) of all n
state-action pairs, their distribution D (diagonal) in the data, and state-action transitions P_b, P_pi of the data's
policy b and of the target policy pi:

    d theta / dt = Phi^T D r - A theta
    A = Phi^T D (I - gamma P_pi) Phi                                                   `update_matrix`
      = Phi^T D (I - gamma P_b) Phi  +  gamma Phi^T D (P_b - P_pi) Phi                 `stationary_term`, `switch_term`

theta converges from everywhere if all eigenvalues of A have positive real parts, and moves away along an eigenvector
whose eigenvalue has a negative one. The first term is positive semi-definite where D is stationary under b; the second
is indefinite and vanishes for b = pi.

Rows: a share of them, `on_policy_share`, is what MAD-TD's model adds, made by a perfect model: a replayed state, the
target policy's own action, one true transition. Replayed states follow b's stationary distribution, so the rows are
those of the mixed policy (1 - share) b + share pi on b's states, and the second term shrinks by 1 - share. The first
is sure to be positive semi-definite at share 0 only, where D is stationary under the mixed policy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dynarep.configs.linear_td import LinearTDConfig

Array = npt.NDArray[np.float64]
SQUARINGS = 40  # 2^40 steps of the chain: far beyond what float64 can tell from its limit


class LinearTD:
    """One seed's features and matrices, all float64.

    Args:
        config: hyperparameters.
        transitions: probabilities of next states, (S, A, S).
        behaviour: the data's policy b, (S, A).
        target: the target policy pi, (S, A).
        features: Phi, (S A, d), pairs in the order of states, then actions.
    """

    def __init__(
        self, config: LinearTDConfig, transitions: Array, behaviour: Array, target: Array, features: Array
    ) -> None:
        self.discount, self.features = config.discount, features
        mixed = (1 - config.on_policy_share) * behaviour + config.on_policy_share * target
        states = stationary(np.einsum("sa,sat->st", behaviour, transitions))
        self.weights = (states[:, None] * mixed).ravel()  # diagonal of D, (S A,)
        self._expected_data = pairs(transitions, mixed) @ features  # features of the next pair, (S A, d)
        self._expected_target = pairs(transitions, target) @ features

    def update_matrix(self) -> Array:
        """Return A, (d, d)."""
        return self._weighted(self.features - self.discount * self._expected_target)

    def stationary_term(self) -> Array:
        """Return what A would be if the target policy were the data's, (d, d)."""
        return self._weighted(self.features - self.discount * self._expected_data)

    def switch_term(self) -> Array:
        """Return what the target policy's other choice of actions adds, (d, d)."""
        return self.discount * self._weighted(self._expected_data - self._expected_target)

    def _weighted(self, values: Array) -> Array:
        """Return Phi^T D values."""
        product: Array = (self.features * self.weights[:, None]).T @ values
        return product


def random_features(generator: np.random.Generator, pairs: int, size: int) -> Array:
    """Draw features (pairs, size), standard normal: the mean eigenvalue of Phi^T D Phi is 1 on average."""
    return generator.standard_normal((pairs, size))


def pairs(transitions: Array, policy: Array) -> Array:
    """Return the transitions between state-action pairs under a policy, (S A, S A)."""
    size = policy.size
    found: Array = np.einsum("sat,tb->satb", transitions, policy).reshape(size, size)
    return found


def stationary(chain: Array) -> Array:
    """Return a distribution that a Markov chain (S, S) keeps, (S,): where it goes from a uniform start.

    A chain that stays where it is half of the time has the same ones, and no period that would keep it from them.
    """
    power = (chain + np.eye(len(chain))) / 2
    for _ in range(SQUARINGS):
        power = power @ power
        power /= power.sum(1, keepdims=True)
    found: Array = power.mean(0)
    return found


def smallest_symmetric(matrix: Array) -> float:
    """Return the smallest eigenvalue of a matrix's symmetric part: negative if it is not positive semi-definite."""
    return float(np.linalg.eigvalsh((matrix + matrix.T) / 2)[0])


def spectrum(matrix: Array) -> npt.NDArray[np.complex128]:
    """Return a matrix's eigenvalues, (d,), from the smallest real part up."""
    return np.sort_complex(np.linalg.eigvals(matrix)).astype(np.complex128)
