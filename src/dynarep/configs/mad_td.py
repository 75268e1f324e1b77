"""MAD-TD's hyperparameters. Sources: `mad-td n` is a section of the paper's specification, [code] its repository."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from dynarep.configs import AgentConfig, Work, hp


class MadTDConfig(AgentConfig):
    """MAD-TD (arXiv 2410.08896)."""

    name = "mad_td"
    implementation = "dynarep.agents.mad_td:MadTD"
    latent_critic = True
    budget = frozenset(
        {
            "width", "batch_size", "updates_per_step", "freeze_model_after", "reset_every", "plan_samples",
            "plan_elites",
        }
    )  # fmt: skip

    # data
    updates_per_step: int = hp(8, "README of [code]: recommended UTD K; paper: 1, 8, 16 (mad-td 5)", ge=1)
    batch_size: int = hp(512, "[code] batch size per update", ge=2)
    model_fraction: float = hp(0.05, "[code] proportion_real 0.95, alpha in the text", ge=0, le=1)
    model_data: Literal["model", "simulator"] = hp(
        "model", "[code] what follows the model rows' actions; alternative simulator: the true outcome, ours"
    )
    model_actions: Literal["policy", "uniform", "replay"] = hp(
        "policy", "[code] pi(z); alternatives uniform: mad-td 8 U7; replay, the stored action: ours, a control"
    )

    # networks: one width for latent and hidden layers
    width: int = hp(512, "[code] nn/model.py, critic.py, actor.py", ge=8, multiple_of=8)
    model_width: int | None = hp(
        None, "[code] hidden layers of the latent model: as width; narrow: 64, mad-td 8 U7", ge=8, multiple_of=8
    )
    simnorm_group: int = hp(8, "[code] SimNorm groups of 8", ge=2)
    layer_norm: float = hp(1e-6, "[code] Flax default epsilon", gt=0)
    layer_norm_on: bool = hp(
        True, "[code] LayerNorm in all networks; off: ours, mad-td 1.3 C13, SimNorm stays", strict=True
    )
    model_free: bool = hp(
        False,
        "[code] td_mpc2_model_free (mad-td 3.12) is on: no encoder, no model, critics of three hidden layers",
        strict=True,
    )

    # values as histograms
    bins: int = hp(151, "[code] HL-Gauss bins", ge=3)
    value_limit: float = hp(300.0, "[code] range [-300, 300]", gt=0)
    sigma: float = hp(0.75, "[code] standard deviation in bin widths", gt=0)
    zero_prior: float = hp(17.0, "[code] factor of the HL-Gauss(0) logits", ge=0)

    # learning
    discount: float = hp(0.99, "[code] gamma per agent step, any action repeat", gt=0, lt=1)
    target_rate: float = hp(0.01, "[code] tau 0.99 is the kept fraction; after every critic step", gt=0, le=1)
    lr_encoder: float = hp(1e-4, "[code]", gt=0)
    lr: float = hp(3e-4, "[code] model, critic, actor", gt=0)
    clip: float = hp(10.0, "[code] global norm per network", gt=0)
    label_smoothing: float = hp(1e-4, "[code] latent consistency target", ge=0, lt=1)
    value_aware_loss: bool = hp(True, "[code] use_daml; off: ablation of mad-td 3.12")
    critic_shapes_encoder: bool = hp(True, "[code] update_encoder_with_critic_loss; off: ablation of 3.12")
    slow_model: bool = hp(True, "[code] model and encoder once per agent step; off: in every update")
    slow_actor: bool = hp(False, "[code] actor in every update; on: once per agent step")
    freeze_model_after: int | None = hp(
        None, "[code] never; agent steps after which encoder and model learn no more: 50 000, mad-td 8 U7", ge=0
    )

    # acting
    exploration_noise: float = hp(0.1, "[code] standard deviation, constant", ge=0)
    noise_clip: float = hp(0.3, "[code]", ge=0)

    # resets (mad-td 3.12)
    reset: Literal["none", "full", "spr", "actor"] = hp(
        "none",
        "[code] use_resetting off; full: all networks fresh; spr: encoder and model half, the rest fresh; actor alone",
    )
    reset_every: int = hp(200_000, "[code] reset_interval: agent steps", ge=1)

    # planning (mad-td 3.11)
    planner: bool = hp(False, "[code] use_mpc", strict=True)
    plan_iterations: int = hp(6, "[code]", ge=1)
    plan_samples: int = hp(512, "[code] drawn in every iteration, besides the policy's action", ge=1)
    plan_elites: int = hp(64, "[code]", ge=1)
    plan_temperature: float = hp(0.5, "[code] divides the elites' values", gt=0)
    plan_std_min: float = hp(0.05, "[code]", gt=0)
    plan_std_max: float = hp(0.3, "[code] also the first iteration's", gt=0)
    plan_value: Literal["mean", "min", "max"] = hp("mean", "[code] mpc_v: of the two online critics")

    @model_validator(mode="after")
    def _settings_that_go_together(self) -> MadTDConfig:
        if self.model_free and self.model_fraction > 0:
            raise ValueError(f"model_fraction, {self.model_fraction:g}: must be 0 with model_free, there is no model")
        if self.model_free and self.planner:
            raise ValueError("planner: needs a model; drop model_free")
        if self.width % self.simnorm_group:
            raise ValueError(f"simnorm_group, {self.simnorm_group}: must divide width, {self.width}")
        if self.freeze_model_after is not None and self.reset in ("full", "spr"):
            raise ValueError(f"reset: {self.reset} would leave a model that never learns; drop freeze_model_after")
        if self.plan_elites > self.plan_samples + 1:
            raise ValueError(f"plan_elites, {self.plan_elites}: must be at most plan_samples + 1")
        if self.plan_std_min > self.plan_std_max:
            raise ValueError(f"plan_std_min, {self.plan_std_min:g}: must be at most plan_std_max")
        return self

    def real_rows(self) -> int:
        """Return how many of the `batch_size` rows of a critic batch stay real: floor(B (1 - alpha))."""
        return int(self.batch_size * (1.0 - self.model_fraction) + 1e-9)

    def label(self) -> str:
        """Return what tells MAD-TD's arms apart."""
        parts = [f"{self.name}-utd{self.updates_per_step}-alpha{self.model_fraction:g}"]
        switches = {
            "modelfree": self.model_free,
            "simulator": self.model_data == "simulator",
            self.model_actions: self.model_actions != "policy",
            f"reset-{self.reset}": self.reset != "none",
            "planner": self.planner,
        }
        return "-".join(parts + [name for name, on in switches.items() if on])

    # -- cost ----------------------------------------------------------------------------------------------------

    def _multiply_adds(self, obs_size: int, action_size: int) -> dict[str, int]:
        """Return the kernel entries of each network, both critics together."""
        w, h = self.width, self.model_width or self.width
        latent = obs_size if self.model_free else w
        za = latent + action_size
        model = 2 * (za * h + h * h) + h * w + h
        return {
            "encoder": 0 if self.model_free else obs_size * w + w * w,
            "model": 0 if self.model_free else model,
            "critic": 2 * (za * w + (2 if self.model_free else 1) * w * w + w * self.bins),
            "actor": latent * w + w * w + w * action_size,
            "latent": latent * w,
            "latent and action": za * w,
        }

    def update_flops(self, obs_size: int, action_size: int) -> float:
        """Return operations of one critic + actor update, two per multiply-add, and of encoding its minibatch.

        With C, A, E the multiply-adds per row of both critics, of actor and encoder: 6 C (targets, online forward,
        backward by kernel and by input, and the actor's loss forward and back), 4 A (next action, own action, backward
        twice) and 2 E, less the gradients by the latent that nobody needs. Model rows cost M besides; their action is
        the actor's own.
        """
        n = self._multiply_adds(obs_size, action_size)
        unused = 2 * n["latent and action"] + 3 * n["latent"]
        rows = 6 * n["critic"] + 4 * n["actor"] + 2 * n["encoder"] - unused
        invented = self.batch_size - self.real_rows()
        return 2.0 * (self.batch_size * rows + invented * n["model"])

    def model_update_flops(self, obs_size: int, action_size: int) -> float:
        """Return operations of one step of encoder and model.

        Both observations are encoded and one of them is differentiated, 4 E less its first layer's gradient by the
        input; 3 M; the next action, A; and of the critics a forward pass for the targets, and one forward and one back
        for each of L_v and L_Q. Nobody needs gradients by the action.
        """
        n, losses = self._multiply_adds(obs_size, action_size), self.value_aware_loss + self.critic_shapes_encoder
        rows = 4 * n["encoder"] + 3 * n["model"] + n["actor"] + (1 + 2 * losses) * n["critic"]
        unused = obs_size * self.width + 2 * action_size * ((self.model_width or self.width) + losses * self.width)
        return 2.0 * self.batch_size * (rows - unused)

    def learning_work(self, steps: int, obs_size: int, action_size: int) -> list[Work]:
        """Return the updates of `steps` agent steps, critic's and actor's and model's, simulated outcomes and planning.

        What planning costs in evaluations is left out.
        """
        updates = steps * self.updates_per_step
        work = [self.update_work(updates, obs_size, action_size)]
        if not self.model_free:
            learning = steps if self.freeze_model_after is None else min(steps, self.freeze_model_after)
            gflop = self.model_update_flops(obs_size, action_size) / 1e9
            work.append(Work("mad_td_model", gflop, learning if self.slow_model else learning * self.updates_per_step))
        if self.model_data == "simulator":
            work.append(Work("simulator", 0.0, updates * (self.batch_size - self.real_rows())))
        if self.planner:
            n = self._multiply_adds(obs_size, action_size)
            candidates = self.plan_iterations * (self.plan_samples + 1)
            gflop = 2.0 * candidates * (n["model"] + n["actor"] + n["critic"]) / 1e9
            work.append(Work("rollout", gflop, steps))
        return work

    def parameters(self, obs_size: int, action_size: int) -> int:
        """Return the numbers in encoder, model, twin critics with targets, and actor."""
        n = self._multiply_adds(obs_size, action_size)
        return n["encoder"] + n["model"] + 2 * n["critic"] + n["actor"]
