"""Where tensors lie, on a device that is none (`pretend.py`): no GPU runs here, so nothing here measures one.

A run on that device has the numbers of one on the host; no operation mixes places; learning waits for nothing.
"""

import numpy as np
import pytest
import torch

import test_frozen
import test_latent_fit
import test_model_fit
import test_online
import test_online_mad_td
import test_policy_evaluation
from dynarep import optimisers, placement, process
from dynarep.agents.alm import ALM
from dynarep.agents.bro import BRO
from dynarep.agents.mad_td import MadTD
from dynarep.agents.mbpo import MBPO
from dynarep.agents.sac import SAC
from dynarep.agents.td_mpc2 import TDMPC2
from dynarep.cli import main
from dynarep.configs.alm import ALMConfig
from dynarep.configs.bro import BROConfig
from dynarep.configs.mad_td import MadTDConfig
from dynarep.configs.mbpo import MBPOConfig
from dynarep.configs.model_fit import ModelFitConfig
from dynarep.configs.sac import SACConfig
from dynarep.configs.td_mpc2 import TDMPC2Config
from dynarep.errors import UserError
from dynarep.protocols.model_fit import ModelFit
from dynarep.replay import Replay, draw
from pretend import Far, fetched, pretend

HOPPER, MODEL, SMALL = test_online.HOPPER, test_online.MODEL, test_online.SMALL
TD_MPC2 = TDMPC2Config(
    width=16,
    encoder_width=16,
    latent=16,
    batch_size=32,
    plan_samples=32,
    plan_elites=8,
    plan_priors=4,
    plan_iterations=1,
    pretrain=False,
)
BRO_SMALL = {"critic_width": 16, "actor_width": 8, "quantiles": 8, "batch_size": 32, "resets": (50,)}
ALM_SMALL = {"width": 16, "model_width": 16, "latent": 8, "batch_size": 32}
ALM_ARMS = {"kl_balance": 1.0, "normalise_inputs": True, "reward_scale": True, "reward_target": "normalised"}
BRIEF = {"steps": 40, "random_steps": 36, "eval_every": 20, "measure_every": 2}
LONGER = {"steps": 60, "random_steps": 46, "eval_every": 30, "measure_every": 12}  # a model is judged after ten steps


def mbpo(**settings):
    return MBPOConfig(**MODEL | {"rollouts_per_step": 32} | settings, updates_per_step=2)


def online(agent, **settings):
    return lambda: test_online.build([3, 0], agent, HOPPER, **settings)


def mad_td(agent="utd-1", **settings):
    return lambda: test_online_mad_td.build([3, 0], agent, **BRIEF | settings)


def model_fit():
    return ModelFit(
        HOPPER, test_model_fit.AGENT, ModelFitConfig(transitions=200, updates=8, chunk=4, increments=True), [3, 0]
    )


def other_mad_td(**settings):
    return mad_td(MadTDConfig(**test_online_mad_td.SMALL | {"updates_per_step": 1, "model_fraction": 0.25} | settings))


QUICK = {"sac": online("sac", **LONGER), "mad_td": mad_td()}
OTHERS = {
    "sharpness": mad_td(sharpness_rows=32),
    "ftfl": online(mbpo(target="direct", normalise_targets=True), **LONGER),
    "learned bounds": online(mbpo(learnable_bounds=True, separate_reward=True), **LONGER),
    "relative score": online(mbpo(elite_score="relative", shared_batches=False, resplit="never"), **LONGER),
    "long rollouts": online(mbpo(rollout_length=3), **LONGER),
    "true rewards": online(mbpo(oracle="reward"), **LONGER),
    "simulator": online("simulator", **LONGER),
    **{rule: online(mbpo(selection=rule), **LONGER) for rule in ("m2ac", "macura", "infoprop")},
    **{agent: mad_td(agent) for agent in ("oracle", "planner", "model-free")},
    "resets": other_mad_td(reset="full", reset_every=2),
    "uniform actions": other_mad_td(model_actions="uniform"),
    "frozen": lambda: test_frozen.build([3, 0], settings={"eval_episodes": 1, "sharpness_rows": 32}),
    "model_fit": model_fit,
    "latent_fit": lambda: test_latent_fit.build([3, 0], updates=4, measure_at=(2,)),
    "policy_evaluation": lambda: test_policy_evaluation.build([3, 0]),
    "td_mpc2": online(TD_MPC2, **LONGER),
    "bro": online(BROConfig(**BRO_SMALL), **LONGER),
    "alm": online(ALMConfig(**ALM_SMALL), **LONGER),
    "alm's arms": online(ALMConfig(**ALM_SMALL | ALM_ARMS, latent_target="residual"), **LONGER),
    "alm without a model": online(ALMConfig(**ALM_SMALL, model_free=True), **LONGER),
    "dial": lambda: test_online.build([3, 0], "sac", DIAL, **LONGER),
}
DIAL = test_online.PENDULUM.model_copy(update={"suite": "dial", "task": "dial-reach", "action_repeat": 1})


def finished(make):
    protocol = make()
    while protocol.done < protocol.total:
        protocol.advance()
    return protocol


def tables(protocol):
    """All metrics but `gradient/*`: autograd hands those out in another layout, and their sum rounds otherwise."""
    return [[line for line in protocol.metrics.csv(k).splitlines() if ",gradient/" not in line] for k in range(2)]


def gradients(protocol):
    return [row.value for own in protocol.metrics.rows for row in own if row.metric.startswith("gradient/")]


@pytest.mark.parametrize("make", [*QUICK.values(), *(pytest.param(m, marks=pytest.mark.slow) for m in OTHERS.values())],
                         ids=[*QUICK, *OTHERS])  # fmt: skip
def test_a_run_on_a_device_mixes_no_places_and_has_the_numbers_of_the_host(make):
    here = finished(make)
    with pretend() as device:
        there = finished(make)
        state = fetched(there.state())
    assert tables(there) == tables(here)
    assert gradients(there) == pytest.approx(gradients(here), rel=1e-7)
    assert device.calls > 500
    tensors = [pair for pair in zip(leaves(state), leaves(here.state()), strict=True) if pair[0].numel()]
    assert tensors
    assert all(torch.equal(one, other) for one, other in tensors)


def leaves(state):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)]


def test_everything_large_lies_on_the_device():
    with pretend():
        protocol = online(mbpo(), **LONGER)()
        agent, critic = protocol.agent, mad_td()().agent
        large = [agent.sac.actor.flat, agent.sac.target.flat, agent.ensemble.net.flat, critic.model.flat]
        large += [agent.sac.critic.flat.grad, agent.ensemble.target_std, critic.histogram.centres]
        large += [*protocol.replay.data.values(), *agent.synthetic.data.values()]
        large += critic._optimisers["critic"].state().values()
        assert all(isinstance(tensor, Far) for tensor in large)
        assert not isinstance(protocol.replay.sizes, Far), "nobody should have to ask the device for it"


# -- nothing waits -----------------------------------------------------------------------------------------------


def learning(agent):
    """Return what the device was asked for in one agent step's learning, once all that happens once has happened."""
    with pretend() as device:
        replay = filled(Replay({"obs": (5,), "action": (2,), "reward": (), "next_obs": (5,), "mask": ()}, 2, 64))
        made = agent()
        for step in (1, 2):
            device.reads.clear()
            made.learn(replay, step)
        return device.reads


def filled(replay):
    rng = np.random.default_rng(0)
    replay.add({name: rng.random((2, 64, *values.shape[2:])) for name, values in replay.data.items()})
    return replay


@pytest.mark.parametrize("updates", [1, 8])
def test_learning_waits_for_nothing(updates):
    assert learning(lambda: SAC(SACConfig(**SMALL, updates_per_step=updates), 5, 2, [0, 1])) == []
    assert learning(lambda: BRO(BROConfig(**BRO_SMALL, updates_per_step=updates), 5, 2, [0, 1])) == []
    config = MadTDConfig(**SMALL, updates_per_step=updates, model_fraction=0.25, clip=1e-3)
    assert learning(lambda: MadTD(config, 5, 2, [0, 1])) == []
    config = TD_MPC2.model_copy(update={"updates_per_step": updates})
    assert learning(lambda: TDMPC2(config, 5, 2, [0, 1])) == []


def test_learning_of_alm_with_all_its_normalisers_waits_for_nothing():
    assert learning(lambda: ALM(ALMConfig(**ALM_SMALL | ALM_ARMS), 5, 2, [0, 1])) == []


def test_with_a_model_a_step_waits_for_what_its_rollout_yielded_and_its_updates_for_nothing():
    asked = [learning(lambda n=n: MBPO(MBPOConfig(**MODEL, updates_per_step=n), 5, 2, [0, 1])) for n in (1, 8)]
    assert asked[0] == asked[1]
    assert len(asked[0]) <= 3, "the largest share of an elite, the rows kept, whether any rollout goes on"


# -- the device that is none -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stray",
    [
        lambda far: far + torch.zeros(4),
        lambda far: far * torch.ones(()),
        lambda far: far[torch.arange(2)],
        lambda far: torch.cat([far, torch.zeros(4)]),
        lambda far: far.cumsum(0),
    ],
    ids=["tensor", "constant", "index", "list", "unsteady"],
)
def test_the_pretended_device_refuses_what_a_gpu_would_or_would_do_badly(stray):
    with pretend(), pytest.raises(AssertionError, match=r"mixes|deterministic"):
        stray(torch.ones(4, device=process.device()))


def test_the_pretended_device_notices_who_waits():
    with pretend() as device:
        far = torch.ones(4, device=process.device())
        for reads in (far.sum().item, far.tolist, far.cpu, lambda: bool((far > 0).all()), lambda: far[far > 0]):
            device.reads.clear()
            reads()
            assert device.reads
        with pytest.raises((TypeError, RuntimeError)):
            far.numpy()


def test_a_tensor_left_on_the_host_is_found(monkeypatch):
    made = optimisers.Scalar.__init__

    def stray(self, value, seeds):
        made(self, value, seeds)
        self.flat = torch.full((seeds, optimisers.PAD), value)
        self.flat.grad = torch.zeros(seeds, optimisers.PAD)

    monkeypatch.setattr(optimisers.Scalar, "__init__", stray)
    with pytest.raises(AssertionError, match="mixes"):
        learning(lambda: SAC(SACConfig(**SMALL, updates_per_step=1), 5, 2, [0, 1]))


# -- where buffers lie, and which devices there are --------------------------------------------------------------


def test_a_replay_that_would_not_fit_stays_on_the_host_and_yields_the_same_rows(monkeypatch):
    generators = [np.random.default_rng(k) for k in range(2)]
    places = draw(generators, 64, (8,))
    fields, size = {"obs": (5,), "reward": ()}, 4 * 2 * 64 * 6
    here = filled(Replay(fields, 2, 64)).rows(places)
    for memory, there in ((2 * size, True), (2 * size - 1, False)):
        monkeypatch.setattr(placement, "free", lambda device, memory=memory: memory)
        with pretend():
            replay = filled(Replay(fields, 2, 64))
            assert isinstance(replay.data["obs"], Far) == there
            rows = replay.rows(places)
            assert all(isinstance(values, Far) for values in rows.values())
            keep = torch.ones(2, 64, dtype=torch.bool, device=process.device())
            replay.add({name: values.repeat_interleave(8, 1) for name, values in rows.items()}, keep)
            again = fetched(replay.rows(torch.zeros(2, 1, dtype=torch.int64)))
            rows = fetched(rows)
        assert all(torch.equal(rows[name], here[name]) for name in fields)
        assert all(torch.equal(again[name], here[name][:, :1]) for name in fields)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda", "Here there is: cpu. Pass --device with one of them, or leave it out"),
        ("cuda:3", "Here there is: cpu"),
        ("gpu", "is no device"),
        ("mps", "cpu and cuda are supported"),
        ("", "is no device"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(name, said):
    with pytest.raises(UserError, match=said):
        placement.check(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_train_on_a_device_that_is_not_there_writes_nothing(tmp_path, capsys):
    place = "R1/accelerated/utd16_five/walker-walk/0-1"
    with pytest.raises(SystemExit) as stop:
        main(["train", "--job", place, "--tier", "smoke", "--device", "cuda", "--results", str(tmp_path / "runs")])
    assert stop.value.code == 2
    assert "--device cuda" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_checked_device_computes_with_full_products_and_the_same_order_of_sums(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back,
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")  # absent or not
    assert placement.check("cuda:1") == torch.device("cuda", 1)
    assert placement.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    with pytest.raises(UserError, match=r"cuda:2: there are only 2\. Here there is: cpu, cuda:0 \(GPU 0\), cuda:1"):
        placement.check("cuda:2")
