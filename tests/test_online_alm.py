"""ALM in the online protocol: it acts, learns from sequences of what it did, and goes on after an interruption."""

import pytest

import test_online
from dynarep.configs.alm import ALMConfig

SMALL = {"width": 16, "model_width": 16, "latent": 8, "batch_size": 32}
ARMS = {"ALM": {}, "noM": {"model_free": True}, "I+S": {"normalise_inputs": True, "reward_scale": True}}


def build(seeds=(3, 0), **arm):
    length = {"steps": 56, "random_steps": 40, "eval_every": 28, "measure_every": 8}
    return test_online.build(seeds, ALMConfig(**SMALL | arm), test_online.HOPPER, **length)


def finish(protocol):
    while protocol.done < protocol.total:
        protocol.advance()
    return protocol


@pytest.mark.parametrize(
    "arm", [ARMS["ALM"], *(pytest.param(ARMS[name], marks=pytest.mark.slow) for name in ("noM", "I+S"))]
)
def test_an_interrupted_run_of_alm_goes_on_to_the_bytes_that_each_seed_has_alone(arm):
    whole, first, alone = finish(build(**arm)), build(**arm), finish(build((0,), **arm))
    while first.done < 50:  # ten updates, and an episode under way
        first.advance()
    second = build(**arm)
    second.load(first.state())
    second.done, second.metrics.rows = first.done, first.metrics.rows
    finish(second)
    assert [second.metrics.csv(k) for k in (0, 1)] == [whole.metrics.csv(k) for k in (0, 1)]
    assert alone.metrics.csv(0) == whole.metrics.csv(1)
    assert sum(row.metric == "critic/batch_q" for row in whole.metrics.rows[0]) == 2
    assert not any(row.metric.startswith("optimist/") for row in whole.metrics.rows[0]), "these are BRO's"
