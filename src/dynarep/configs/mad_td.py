"""MAD-TD's hyperparameters. Sources: `mad-td n` is a section of the paper's specification, [code] its repository."""

from __future__ import annotations

from dynarep.configs import AgentConfig, hp


class MadTDConfig(AgentConfig):
    """MAD-TD (arXiv 2410.08896)."""

    name = "mad_td"
    implementation = "dynarep.agents.mad_td:MadTD"
    budget = frozenset({"width", "batch_size"})

    # data
    batch_size: int = hp(512, "[code] batch size per update", ge=2)
    model_fraction: float = hp(0.05, "[code] proportion_real 0.95, alpha in the text", ge=0, le=1)

    # networks: one width for latent and hidden layers
    width: int = hp(512, "[code] nn/model.py, critic.py, actor.py", ge=8, multiple_of=8)
    simnorm_group: int = hp(8, "[code] SimNorm groups of 8", ge=2)
    layer_norm: float = hp(1e-6, "[code] Flax default epsilon", gt=0)

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

    def real_rows(self) -> int:
        """Return how many of the `batch_size` rows of a critic batch stay real: floor(B (1 - alpha))."""
        return int(self.batch_size * (1.0 - self.model_fraction) + 1e-9)

    def label(self) -> str:
        """Return what tells MAD-TD's arms apart."""
        return f"{self.name}-alpha{self.model_fraction:g}"

    def update_flops(self, obs_size: int, action_size: int) -> float:
        """Return operations of one critic + actor update: 8 critic passes forward or backward, twins, and 4 actor's.

        The model update (one in K) is left out: rates are measured with it, at the K of the experiment.
        """
        w, za = self.width, self.width + action_size
        critic = 2 * (za * w + w * w + w * self.bins)
        actor = 2 * w * w + w * action_size
        encoder = obs_size * w + w * w
        return 2.0 * self.batch_size * (7 * critic + 5 * actor + 2 * encoder)

    def parameters(self, obs_size: int, action_size: int) -> int:
        """Return the numbers in encoder, model, twin critics with targets, and actor."""
        w, za = self.width, self.width + action_size
        encoder, model = obs_size * w + w * w, 2 * za * w + 3 * w * w
        critics = 2 * (za * w + w * w + w * self.bins)
        return encoder + model + 2 * critics + 2 * w * w + w * action_size
