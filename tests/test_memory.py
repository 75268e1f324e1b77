"""What `dynarep plan` says of memory, against what a process really takes."""

import subprocess
import sys

import pytest

from dynarep.configs.mbpo import MBPOConfig
from dynarep.configs.online import OnlineConfig
from dynarep.plan import rates

OBS, ACTION, SEEDS, STEPS = 67, 21, 6, 12_500  # humanoid; as many steps as fill the synthetic buffer of 1e6 rows
FILL = f"""
import resource, numpy as np
from dynarep.agents.mbpo import MBPO
from dynarep.configs.mbpo import MBPOConfig
from dynarep.replay import Replay

agent = MBPO(MBPOConfig(), {OBS}, {ACTION}, range({SEEDS}), "humanoid-stand")
fields = {{name: values.shape[2:] for name, values in agent.synthetic.data.items()}}
rows = {{name: np.ones(({SEEDS}, 20_000, *shape), np.float32) for name, shape in fields.items()}}
real = Replay(fields, {SEEDS}, {STEPS})
real.add({{name: values[:, :{STEPS}] for name, values in rows.items()}})
while agent.synthetic.size < agent.synthetic.capacity:
    agent.synthetic.add(rows)
kept = real.state(), agent.state()  # what a checkpoint holds while it is written
print(agent.synthetic.size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_a_full_synthetic_buffer_of_six_seeds_stays_within_the_planned_memory():
    planned = rates()["process_mib"] + OnlineConfig(steps=STEPS, eval_every=STEPS).memory_mib(
        MBPOConfig(), OBS, ACTION, SEEDS
    )
    done = subprocess.run([sys.executable, "-c", FILL], capture_output=True, text=True, check=True)
    rows, peak = done.stdout.split()
    assert int(rows) == 1_000_000
    assert 0.5 * planned < float(peak) <= planned, f"{peak} MiB used, {planned:.0f} MiB planned"
