"""The benchmark's bookkeeping, and that what it compares does the same work. Nothing here judges a time."""

import json
import math
import os
from dataclasses import asdict
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from dynarep import bench, cli, mkl
from dynarep.agents.mad_td import MadTD
from dynarep.bench import kernels, processes, workers
from dynarep.bench.eager import EagerMadTD
from dynarep.bench.peers import Learner
from dynarep.bench.ratios import compared
from dynarep.bench.workers import Burst, Task
from dynarep.configs.alm import ALMConfig
from dynarep.configs.bro import BROConfig
from dynarep.configs.mad_td import MadTDConfig
from dynarep.configs.sac import SACConfig
from dynarep.errors import UserError

RATIO = {"name", "ms", "other_ms", "ratio", "low", "high", "target", "met"}


def test_a_kernels_rate_is_its_operations_over_its_time(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(kernels.time, "process_time", lambda: next(clock))
    kernel = kernels.Kernel("nothing", 6.0, lambda: None, repeats=4)
    assert kernel.time() == 0.25


def test_a_ratio_is_the_median_of_rounds_and_says_its_spread_and_whether_the_target_is_met():
    ours, theirs = np.array([1.0, 2.0, 4.0]), np.array([3.0, 4.0, 20.0])
    ratio = compared("this", ours, theirs, target=3.0)
    assert (ratio.ratio, ratio.low, ratio.high) == (3.0, 2.0, 5.0)
    assert (ratio.ms, ratio.other_ms) == (2e3, 4e3)
    assert ratio.met is True
    assert compared("this", ours, theirs, target=3.1).met is False
    assert compared("this", ours, theirs).met is None


@pytest.mark.slow
def test_every_kernel_is_timed_and_set_against_the_matrix_product(capsys):
    cli.main(["bench", "--rounds", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == 22
    assert next(iter(rows.values()))["efficiency"] == 1.0
    for row in rows.values():
        assert row["gflops"] == pytest.approx(row["gflop"] / row["ms"] * 1e3, rel=1e-6)
        assert row["efficiency"] == pytest.approx(row["gflops"] / found["gemm_gflops"], rel=1e-6)
        assert row["met"] is (None if row["target"] is None else row["efficiency"] >= row["target"])
    assert [row["target"] for row in found["rows"] if row["target"]] == [0.65, 0.60, 0.55, 0.55]
    sac = rows["SAC update, 2x256, batch 256, 1 seed"]
    assert sac["gflop"] == pytest.approx(SACConfig().update_flops(67, 21) / 1e9)
    bro = rows["BRO update, critics 512, 100 quantiles, batch 128, 1 seed"]
    assert bro["gflop"] == pytest.approx(BROConfig().update_flops(223, 38) / 1e9)
    alm = rows["ALM update, width 512, model 1024, batch 512, 1 seed"]
    assert alm["gflop"] == pytest.approx(ALMConfig().update_flops(67, 21) / 1e9)
    paper, small = MadTDConfig(), MadTDConfig(width=64, batch_size=32)
    update, model = (f"MAD-TD {part} update, width 512, batch 512, 1 seed" for part in ("critic + actor", "model"))
    assert rows[update]["gflop"] == pytest.approx(paper.update_flops(67, 21) / 1e9)
    assert rows[model]["gflop"] == pytest.approx(paper.model_update_flops(67, 21) / 1e9)
    step = (16 * small.update_flops(67, 21) + small.model_update_flops(67, 21)) / 1e9
    for seeds in (1, 10):
        name = f"MAD-TD 16 critic + actor updates and 1 of the model, width 64, batch 32, {kernels.seeds_of(seeds)}"
        assert rows[name]["gflop"] == pytest.approx(seeds * step)

    ratios = found["ratios"]
    assert [row["target"] for row in ratios] == [3, 2, 2, 6]
    assert all(row.keys() == RATIO for row in ratios)
    chosen, every = (f"rollout of 20,000 states, {which}" for which in ("chosen members", "all members"))
    assert ratios[0]["ratio"] == pytest.approx(rows[every]["ms"] / rows[chosen]["ms"])
    one, ten = (row for name, row in rows.items() if name.startswith("MAD-TD 16"))
    assert ratios[3]["ratio"] == pytest.approx(one["ms"] / (ten["ms"] / 10))
    for ratio, part in zip(
        ratios[1:3], ("critic + actor update", "1 critic + actor update and 1 of the model"), strict=True
    ):
        ours = rows[f"MAD-TD {part}, width 128, batch 128, 1 seed"]
        eager = rows[f"eager PyTorch: MAD-TD {part}, width 128, batch 128, 1 seed"]
        assert eager["gflop"] == ours["gflop"]
        assert ratio["ratio"] == pytest.approx(eager["ms"] / ours["ms"])

    assert (found["machine"]["threads"], found["machine"]["mkl"]) == (1, mkl.path())
    assert found["machine"]["compiled"] is False
    assert found["peers"] == found["processes"] == []
    assert [row["name"].split(",")[0] for row in found["statistics"]] == [
        "interquartile mean",
        "probability of improvement",
    ]
    for row in found["statistics"]:
        assert row["ratio"] == pytest.approx(row["rliable_s"] / row["seconds"])
        assert "10 seeds x 7 tasks" in row["name"]


def test_rliables_time_is_that_of_all_resamples_and_not_of_the_timed_share(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(bench.time, "process_time", lambda: next(clock))
    monkeypatch.setattr(bench.aggregates, "interval", lambda *_, **__: None)
    monkeypatch.setattr("rliable.library.get_interval_estimates", lambda *_, **__: None)
    iqm, chance = bench._statistics(1)
    assert (iqm.seconds, iqm.rliable_s, iqm.ratio) == (1, 250, 250)
    assert (chance.seconds, chance.rliable_s, chance.ratio) == (1, 40, 40)


def test_no_rounds_are_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main(["bench", "--rounds", "0"])
    assert refused.value.code == 2
    assert "--rounds 0: at least 1" in capsys.readouterr().err


# -- MAD-TD in plain PyTorch -----------------------------------------------------------------------------------------


def twins(agent: MadTD, eager: EagerMadTD):
    """Every network of ours beside its plain module: name, module, network, branch, member."""
    yield "encoder", eager.encoder, agent.encoder, "", 0
    yield "actor", eager.actor, agent.actor, "", 0
    for branch in ("dynamics", "reward"):
        yield "model", eager.model[branch], agent.model, branch, 0
    for name, modules, net in (("critic", eager.critics, agent.critic), ("target", eager.targets, agent.target)):
        for member in range(2):
            yield name, modules[member], net, "", member


def slices(flat: torch.Tensor, net, branch: str, member: int) -> list[torch.Tensor]:
    """Cut a matrix of one seed's parameters, or of their moments, as the plain module's parameters are."""
    cut = []
    for slot, (start, shape) in net._slots.items():
        if slot.split("/")[0] == branch:
            part = flat[member, start : start + math.prod(shape)].view(shape)
            cut.append(part.mT if slot.endswith("kernel") else part)
    return cut


def test_eager_pytorch_does_the_same_work_as_our_mad_td():
    """Three agent steps of two updates: losses and what Adam has seen of gradients are ours."""
    obs, action, updates, size = 5, 2, 2, 64
    config = MadTDConfig(width=16, batch_size=size, bins=21, value_limit=10, clip=0.01)
    agent, eager = MadTD(config, obs, action, [0]), EagerMadTD(config, obs, action)
    g = torch.Generator().manual_seed(0)
    for net in (*agent._nets().values(), agent.target):  # all different functions, and biases are not 0
        net.flat += 0.3 * torch.randn(net.flat.shape, generator=g)
    for _, module, net, branch, member in twins(agent, eager):
        for parameter, value in zip(module.parameters(), slices(net.flat, net, branch, member), strict=True):
            parameter.data.copy_(value)
    for _ in range(3):
        lead = (1, updates, size)
        batch = {"obs": torch.randn(*lead, obs, generator=g), "next_obs": torch.randn(*lead, obs, generator=g)}
        batch |= {"action": torch.rand(*lead, action, generator=g) * 2 - 1, "reward": torch.randn(lead, generator=g)}
        batch |= {"mask": (torch.rand(lead, generator=g) > 0.2).float()}
        ours, plain = agent.update(batch), eager.update({name: v[0] for name, v in batch.items()})
        assert plain.keys() == ours.keys()
        for name, loss in plain.items():
            torch.testing.assert_close(loss, ours[name][0], rtol=2e-4, atol=2e-6, msg=name)
    seen = {p: state["exp_avg"] for adam in eager._optimisers.values() for p, state in adam.state.items()}
    for name, module, net, branch, member in twins(agent, eager):
        if name != "target":
            first = slices(agent.state()[f"adam/{name}/first"], net, branch, member)
            ours, plain = (
                torch.cat([m.flatten() for m in ms]) for ms in (first, [seen[p] for p in module.parameters()])
            )
            assert (plain - ours).norm() < 3e-4 * ours.norm(), f"{name} {branch}"


# -- processes -------------------------------------------------------------------------------------------------------


class Told:
    """A worker that answers at once: per update, seconds of its own and of the clock."""

    def __init__(self, task: Task, seconds: float, threads: float = 1.0, parameters: int = 7) -> None:
        self.task, self.seconds, self.threads = task, seconds, threads
        name = task.peer or f"{task.kernel} on {task.threads}"
        self.about = {"name": name, "parameters": parameters, "mkl": "own choice" if task.mkl_own else "intel path"}

    def start(self) -> None:
        pass

    def finish(self) -> Burst:
        return Burst(20, 20 * self.seconds * self.threads, 20 * self.seconds)


def told(monkeypatch, make) -> None:
    class Workers:
        def __init__(self, tasks):
            self.team = [make(task) for task in tasks]

        def __enter__(self):
            return self.team

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(processes, "workers", Workers)
    monkeypatch.setattr(processes, "require", lambda: None)


PEER_S = {"ours": 1.0, "sb3": 2.0, "sbx": 1.5}


def test_peers_are_rated_per_update_and_sb3_is_judged_with_mkls_own_choice(monkeypatch):
    told(monkeypatch, lambda task: Told(task, PEER_S[task.peer]))
    monkeypatch.setattr(mkl, "path", lambda: mkl.INTEL_PATH)
    monkeypatch.setattr(mkl, "library", lambda: "there")
    rows = processes.peers(3)
    assert [row["ratio"] for row in rows] == [2.0, 2.0, 1.5]
    assert [(row["target"], row["met"]) for row in rows] == [(2.5, False), (None, None), (1.2, True)]
    assert ["own choice" in row["name"] for row in rows] == [True, False, False]
    assert rows[0].keys() == RATIO | {"parameters", "threads"}
    monkeypatch.setattr(mkl, "library", lambda: None)
    assert len(processes.peers(1)) == 2


def test_a_peer_that_runs_on_several_threads_is_no_comparison(monkeypatch):
    told(monkeypatch, lambda task: Told(task, 1.0, threads=1.9 if task.peer == "sbx" else 1.0))
    with pytest.raises(UserError, match=r"sbx ran on 1\.9 threads"):
        processes.peers(1)


def test_a_peer_with_other_networks_is_no_comparison(monkeypatch):
    told(monkeypatch, lambda task: Told(task, 1.0, parameters=8 if task.peer == "sbx" else 7))
    with pytest.raises(UserError, match="different numbers of parameters: ours 7, sb3 7, sbx 8"):
        processes.peers(1)


def test_two_processes_are_rated_by_what_both_finish(monkeypatch):
    told(monkeypatch, lambda task: Told(task, 1.0 if task.threads == 1 else 0.7))
    rows = processes.two_cores(2)
    assert len(rows) == len(workers.KERNELS)
    for row in rows:
        assert row["ms"] == pytest.approx(500)
        assert row["ratio"] == pytest.approx(1.4)


@pytest.mark.parametrize("installed", [set(), {"jax"}])
def test_missing_peers_say_what_to_type(monkeypatch, capsys, installed):
    monkeypatch.setattr(processes, "find_spec", lambda name: name in installed or None)
    with pytest.raises(SystemExit) as refused:
        cli.main(["bench", "--peers"])
    assert refused.value.code == 2
    said = capsys.readouterr()
    assert "make bench-peers" in said.err
    assert ("jax" in said.err.split("Type")[0]) == (not installed)
    assert not said.out


def test_one_core_cannot_say_what_two_are_for(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    with pytest.raises(UserError, match="needs two cores"):
        processes.two_cores(1)


def test_a_process_answers_every_order_with_calls_and_seconds(monkeypatch):
    made = []
    monkeypatch.setitem(workers.KERNELS, "counted", lambda: kernels.Kernel("counting", 1.0, lambda: made.append(1)))
    monkeypatch.setattr(workers, "BURST_S", 1e-4)
    monkeypatch.setattr(workers.process, "settle", lambda **_: None)
    monkeypatch.setattr(workers.torch, "set_num_threads", lambda count: made.append(-count))
    answers = []
    workers.serve(Task(kernel="counted", threads=2), answers.append, iter(["burst\n"] * 2))
    about, *bursts = answers
    assert about["name"] == "counting"
    assert made[0] == -2
    assert [burst.keys() for burst in bursts] == [asdict(Burst(1, 0, 0)).keys()] * 2
    assert sum(made) + 2 == sum(burst["calls"] for burst in bursts) + 4  # to warm up, and to find out how many


def test_a_learner_that_skips_updates_is_found_out(monkeypatch):
    monkeypatch.setitem(workers.LEARNERS, "lazy", lambda: Learner("lazy", lambda: None, lambda: 0, 7))
    monkeypatch.setattr(workers, "BURST_S", 1e-6)
    with pytest.raises(RuntimeError, match="lazy: made 0 updates, not"):
        workers.serve(Task(peer="lazy"), lambda _: None, iter(["burst\n"]))


@pytest.mark.slow
def test_a_process_works_when_told_and_says_so_if_it_cannot():
    with workers.workers([Task(kernel="sac")]) as (worker,):
        worker.start()
        burst = worker.finish()
        assert burst.calls >= 1
        assert burst.cpu_s > 0
        assert "SAC update, 2x256" in worker.about["name"]
        pid = worker._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with (
        pytest.raises(UserError, match="the process of nonsense ended with code 1"),
        workers.workers([Task("nonsense")]),
    ):
        pass


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sbx") is None, reason="requirements-bench.txt is not installed")
def test_others_really_make_as_many_updates_of_the_same_networks():
    rows = processes.peers(1)
    assert {row["parameters"] for row in rows} == {271_660}
    assert all(0.1 < row["threads"] <= processes.ONE_THREAD for row in rows)
