"""The benchmark's bookkeeping. Nothing here judges a time."""

import json

import pytest

from dynarep import bench, cli
from dynarep.configs.mad_td import MadTDConfig
from dynarep.configs.sac import SACConfig


def test_a_kernels_rate_is_its_operations_over_its_time(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    kernel = bench._Kernel("nothing", 6.0, lambda: None, repeats=4)
    assert kernel.time() == 0.25


@pytest.mark.slow
def test_every_kernel_is_timed_and_set_against_the_matrix_product(capsys):
    cli.main(["bench", "--rounds", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == 13
    assert next(iter(rows.values()))["efficiency"] == 1.0
    for row in rows.values():
        assert row["gflops"] == pytest.approx(row["gflop"] / row["ms"] * 1e3, rel=1e-6)
        assert row["efficiency"] == pytest.approx(row["gflops"] / found["gemm_gflops"], rel=1e-6)
    sac = rows["SAC update, 2x256, batch 256, 1 seed"]
    assert sac["gflop"] == pytest.approx(SACConfig().update_flops(67, 21) / 1e9)
    paper, small = MadTDConfig(), MadTDConfig(width=64, batch_size=32)
    update, model = (f"MAD-TD {part} update, width 512, batch 512, 1 seed" for part in ("critic + actor", "model"))
    assert rows[update]["gflop"] == pytest.approx(paper.update_flops(67, 21) / 1e9)
    assert rows[model]["gflop"] == pytest.approx(paper.model_update_flops(67, 21) / 1e9)
    step = (16 * small.update_flops(67, 21) + small.model_update_flops(67, 21)) / 1e9
    for seeds in (1, 10):
        name = f"MAD-TD 16 critic + actor updates and 1 of the model, width 64, batch 32, {bench._seeds(seeds)}"
        assert rows[name]["gflop"] == pytest.approx(seeds * step)

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
