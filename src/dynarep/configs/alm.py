"""ALM's hyperparameters. Sources: `extensions An` is a section of the specification, [code] the repository."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from dynarep.configs import AgentConfig, Work, hp


class ALMConfig(AgentConfig):
    """Aligned latent models (arXiv 2209.08466), and what FTFL's two repairs could mean there: the arms of A8."""

    name = "alm"
    implementation = "dynarep.agents.alm:ALM"
    budget = frozenset({"width", "model_width", "latent", "batch_size", "std_steps"})

    # the arms (extensions A8); the defaults are ALM
    reward_target: Literal["raw", "normalised"] = hp(
        "raw", "[code]; arm R, normalised: the reward network learns (r - mu) / sigma and is denormalised in all uses"
    )
    reward_scale: bool = hp(
        False, "[code] rewards as they come; arm S: all are divided by their deviation, before all else", strict=True
    )
    normalise_inputs: bool = hp(
        False,
        "[code] states as they come; arm I: (s - mu) / sigma, clipped, for encoder and target encoder",
        strict=True,
    )
    kl_balance: float | None = hp(
        None,
        "[code] one nat counts as one unit of reward; arm K, 1: the KL term is scaled so that a step's mean is as many "
        "nats per latent dimension, 50 in all",
        gt=0,
    )
    latent_target: Literal["direct", "residual"] = hp(
        "direct", "[code] the model predicts z'; arm D-, residual: its mean is z + f(z, a)"
    )
    encoder: Literal["learned", "none"] = hp(
        "learned", "[code]; arm O, none: z is the normalised state, with the floor of the deviations around it"
    )
    model_free: bool = hp(
        False,
        "[code] off; arm noM: the actor climbs Q alone (unused in the code, A4 c), the critic shapes the encoder",
        strict=True,
    )

    # data
    updates_per_step: int = hp(1, "[code] one update per environment step", ge=1)
    batch_size: int = hp(512, "[code]; multiples of 32: nets.py on block invariance", ge=32, multiple_of=32)
    horizon: int = hp(3, "[code] steps of a sequence, and of the actor's rollouts", ge=1)
    refit_every: int = hp(1_000, "extensions A8 S, ours: agent steps between which moments are frozen", ge=1)

    # networks
    width: int = hp(512, "[code] hidden units of all networks but the model", ge=8, multiple_of=8)
    model_width: int = hp(1024, "[code]", ge=8, multiple_of=8)
    latent: int = hp(50, "[code] L", ge=1)
    mean_limit: float = hp(30.0, "[code] means are 30 tanh(raw / 30)", gt=0)
    std_floor: float = hp(0.1, "[code] of encoder and model", gt=0)
    std_ceiling: float = hp(10.0, "[code] of encoder and model", gt=0)
    layer_norm: float = hp(1e-5, "[code] PyTorch's default epsilon; in the heads' first layer", gt=0)
    input_clip: float = hp(10.0, "extensions A8 I, ours: of a normalised state's entries", gt=0)

    # learning
    discount: float = hp(0.99, "[code] gamma", gt=0, lt=1)
    trace: float = hp(0.95, "[code] lambda of the actor's returns", ge=0, le=1)
    classifier_weight: float = hp(0.1, "[code] of the logits' difference in the actor's rewards", ge=0)
    target_rate: float = hp(0.005, "[code] tau, the new fraction", gt=0, le=1)
    lr: float = hp(1e-4, "[code] Adam of every network", gt=0)
    clip: float = hp(100.0, "[code] gradient norm of each optimiser", gt=0)
    kl_rate: float = hp(0.01, "ours: new fraction in K's running mean of the KL", gt=0, le=1)

    # acting
    std_initial: float = hp(1.0, "[code] of the policy's noise, after the random steps", ge=0)
    std_final: float = hp(0.1, "[code]", ge=0)
    std_steps: int = hp(100_000, "[code] agent steps from one to the other", ge=1)
    noise_clip: float = hp(0.3, "[code] in updates; none in acting", ge=0)

    @model_validator(mode="after")
    def _settings_that_go_together(self) -> ALMConfig:
        if self.std_floor >= self.std_ceiling:
            raise ValueError(f"std_floor, {self.std_floor:g}: must be below std_ceiling, {self.std_ceiling:g}")
        if self.model_free and self.encoder == "none":
            raise ValueError("encoder: with model_free the critic learns through it; drop one of the two")
        return self

    def arms(self) -> list[str]:
        """Return the letters of the arms that these settings are, as `extensions` A8 has them; none: ALM itself."""
        switches = {
            "R": self.reward_target == "normalised",
            "S": self.reward_scale,
            "I": self.normalise_inputs,
            "K": self.kl_balance is not None,
            "D-": self.latent_target == "residual",
            "O": self.encoder == "none",
            "noM": self.model_free,
        }
        return [name for name, on in switches.items() if on]

    def label(self) -> str:
        """Return what tells ALM's arms apart."""
        return "-".join([self.name, *(name.rstrip("-") for name in self.arms())])

    # -- cost ----------------------------------------------------------------------------------------------------

    def latent_size(self, obs_size: int) -> int:
        """Return the length of a latent."""
        return obs_size if self.encoder == "none" else self.latent

    def _multiply_adds(self, obs_size: int, action_size: int) -> dict[str, int]:
        """Return the kernel entries of each network, both critics together."""
        w, m, z = self.width, self.model_width, self.latent_size(obs_size)
        za = z + action_size
        return {
            "encoder": 0 if self.encoder == "none" else obs_size * w + w * w + w * 2 * z,
            "model": za * m + m * m + m * 2 * z,
            "reward": za * w + w * w + w,
            "classifier": (za + z) * w + w * w + 2 * w,
            "critic": 2 * (za * w + w * w + w),
            "actor": z * w + w * w + w * action_size,
        }

    def update_flops(self, obs_size: int, action_size: int) -> float:
        """Return operations of one update, two per multiply-add.

        With K the horizon, and E, M, R, C, Q, A the multiply-adds per row of encoder, model, reward, classifier, both
        critics and actor, where a network that learns costs 3 and one that is differentiated through 2: the step of
        encoder and model  (3 + K) E + 3 K M + 2 K R + 2 Q + A;  reward and classifier  2 E + M + 3 R + 3 C;  critics
        4 Q + A;  actor  (3 K + 1) A + K (2 M + 2 R + 2 C + 2 Q). Gradients by an input that nobody needs are counted.
        """
        n, k = self._multiply_adds(obs_size, action_size), self.horizon
        e, m, r, c, q, a = (n[name] for name in ("encoder", "model", "reward", "classifier", "critic", "actor"))
        if self.model_free:
            return 2.0 * self.batch_size * (5 * e + 6 * q + 4 * a)
        rows = (5 + k) * e + (1 + 5 * k) * m + (3 + 4 * k) * r + (3 + 2 * k) * c + (6 + 2 * k) * q + (3 + 3 * k) * a
        return 2.0 * self.batch_size * rows

    def learning_work(self, steps: int, obs_size: int, action_size: int) -> list[Work]:
        """Return the updates of `steps` agent steps."""
        return [self.update_work(steps * self.updates_per_step, obs_size, action_size)]

    def parameters(self, obs_size: int, action_size: int) -> int:
        """Return the numbers in all networks; encoder and critics have targets."""
        n = self._multiply_adds(obs_size, action_size)
        return sum(n.values()) + n["encoder"] + n["critic"]
