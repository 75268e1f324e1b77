"""Environments in other processes: the same bytes, snapshots, errors, and an end with whoever started them."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dynarep import envs
from dynarep.configs import Dials, EnvironmentConfig
from dynarep.envs import EnvError, workers
from dynarep.envs.workers import Call, Remote, several, together
from dynarep.errors import UserError
from test_online_mad_td import HOPPER, PENDULUM, build, everything, finish, reload, until


@pytest.mark.parametrize(
    ("agent", "environment"), [("utd-8", HOPPER), pytest.param("oracle", PENDULUM, marks=pytest.mark.slow)]
)
def test_a_block_has_the_same_bytes_wherever_its_environments_are_and_wherever_it_is_cut(agent, environment):
    """Three seeds in two processes; evaluations, held-out states, the simulator as the model; killed and continued."""
    settings = {"agent": agent, "environment": environment}
    here = finish(build([3, 0, 5], **settings))
    with workers.used(2):
        there = build([3, 0, 5], **settings)
        assert all(isinstance(env, Remote) for env in (*there.envs, *there.evaluator.envs, *there.simulator.envs))
        assert len({env.worker for env in there.envs}) == 2
        there = finish(reload(until(there, 57), build([3, 0, 5], **settings)))
    assert [everything(there, k) for k in range(3)] == [everything(here, k) for k in range(3)]
    assert there.returns == here.returns
    assert there.starts == here.starts


def test_snapshots_cross_processes_and_share_what_is_constant():
    walker = EnvironmentConfig(suite="dmc", task="reacher-easy", action_repeat=2)  # its target is in the model
    local = envs.from_config(walker)
    with workers.used(1):
        (remote,) = several(walker, 1)
        assert np.array_equal(remote.reset(7), local.reset(7))
        action = np.full(local.action_size, 0.3)
        one, two = remote.snapshot(), (remote.step(action), remote.snapshot())[1]
        assert one.model
        assert two.model is one.model
        assert two.attributes is one.attributes
        local.restore(one)
        remote.reset(8)
        assert any(
            array.tobytes() != remote.snapshot().model.get(name, array[:0]).tobytes()
            for name, array in one.model.items()
        )
        remote.restore(one)
        assert np.array_equal(remote.step(action).obs, local.step(action).obs)
        cases = [(two, action), (one, -action), (two, np.full(local.action_size, np.nan))]
        got, wanted = remote.outcomes(cases), local.outcomes(cases)
    assert [step is None for step in got] == [step is None for step in wanted] == [False, False, True]
    assert all(np.array_equal(a.obs, b.obs) and a.reward == b.reward for a, b in zip(got[:2], wanted[:2], strict=True))


def test_environments_in_different_processes_step_at_the_same_time():
    with workers.used(2):
        pair = several(PENDULUM, 2)
        assert len({env.worker.process.pid for env in pair} | {os.getpid()}) == 3
        told, answered, worker = [], [], type(pair[0].worker)
        with pytest.MonkeyPatch.context() as patch:
            tell, answers = worker.tell, worker.answers
            patch.setattr(worker, "tell", lambda w, c: (told.append(len(answered)), tell(w, c))[1])
            patch.setattr(worker, "answers", lambda w: (answered.append(w), answers(w))[1])
            together([Call(env, "reset", (0,)) for env in pair])
    assert told == [0, 0], "both are told before either is waited for"


def test_an_error_of_one_environment_is_its_own_and_the_others_go_on():
    with workers.used(2):
        first, second = several(PENDULUM, 2)
        refused, obs = together([Call(first, "step", ([0.0],)), Call(second, "reset", (1,))])
        assert isinstance(refused, EnvError)
        assert "reset(seed)" in str(refused)
        assert obs.shape == (second.obs_size,)
        with pytest.raises(EnvError, match=r"reset\(seed\)"):
            first.step([0.0])
        assert first.reset(1).tolist() == obs.tolist()
        with pytest.raises(EnvError, match="action_repeat"):
            several(PENDULUM.model_copy(update={"action_repeat": 0}), 2)


def test_dial_tasks_stay_here():
    with workers.used(2):
        (env,) = several(EnvironmentConfig(suite="dial", task="dial-reach", action_repeat=1, dials=Dials()), 1)
    assert not isinstance(env, Remote)


def test_a_killed_process_is_a_clear_error_and_takes_the_others_with_it():
    with workers.used(2):
        pair = several(PENDULUM, 2)
        processes = [env.worker.process for env in pair]
        processes[1].kill()
        with pytest.raises(UserError, match=rf"pid {processes[1].pid}\) ended by signal 9 .*same command continues"):
            together([Call(env, "reset", (0,)) for env in pair])
        assert all(process.poll() is not None for process in processes)


@pytest.mark.parametrize("count", [-1, workers.MOST + 1])
def test_a_number_out_of_range_is_refused(count):
    with pytest.raises(UserError, match=f"--env-workers {count}"), workers.used(count):
        pass


PARENT = """
import sys, time
from dynarep.configs import EnvironmentConfig
from dynarep.envs import workers
workers.use(2)
made = workers.several(EnvironmentConfig(suite="dmc", task="pendulum-swingup", action_repeat=1), 2)
print(*(env.worker.process.pid for env in made), flush=True)
while True:
    time.sleep(1) if sys.argv[1] == "idle" else workers.together([workers.Call(env, "reset", (0,)) for env in made])
"""


@pytest.mark.parametrize("state", ["idle", pytest.param("busy", marks=pytest.mark.slow)])
def test_nobody_outlives_a_parent_that_is_killed(state):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, state], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(set(pids)) == 2
    for pid in pids:
        os.kill(pid, signal.SIGTERM)  # asked to stop, as by a terminal: that is the parent's business
        os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    assert all(_runs(pid) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until_then = time.monotonic() + 10
    while any(_runs(pid) for pid in pids) and time.monotonic() < until_then:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    """Whether a process is there and has not ended; a zombie has, whoever was to wait for it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_run_whose_simulating_process_is_killed_says_so_and_is_finished_by_the_next_command(tmp_path):
    """From the command line, to the bytes of a run that was left alone in one process; nobody stays behind."""

    def train(folder, *options):
        job = ["--job", "R10/tiny/policy_only/hopper-stand/0-1", "--tier", "smoke", "--results", str(tmp_path / folder)]
        command = [sys.executable, "-m", "dynarep", "train", *job, *options]
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    killed = train("cut", "--env-workers", "2")
    children: list[int] = []
    while len(children) < 2 and killed.poll() is None:
        with open(f"/proc/{killed.pid}/task/{killed.pid}/children") as file:
            children = [int(pid) for pid in file.read().split()]
        time.sleep(0.02)
    os.kill(children[0], signal.SIGKILL)
    said = killed.communicate(timeout=100)[1]
    assert killed.returncode == 2
    assert "ended by signal 9 (Killed)" in said
    assert "Traceback" not in said
    assert not any(_runs(pid) for pid in children)
    assert not list((tmp_path / "cut").rglob("metrics.csv"))
    for folder, options in (("cut", ["--env-workers", "1"]), ("whole", [])):
        process = train(folder, *options)
        process.communicate(timeout=100)
        assert process.returncode == 0
    tables = [sorted((tmp_path / folder).rglob("metrics.csv")) for folder in ("cut", "whole")]
    assert len(tables[0]) == 2
    assert [path.read_bytes() for path in tables[0]] == [path.read_bytes() for path in tables[1]]
