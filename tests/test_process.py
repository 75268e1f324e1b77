"""What a process is set to, and what it says of that: MKL's kernels, compiled updates, nothing imported in vain."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dynarep import cli, mkl, process, run
from test_run import job, metrics

AMD = any("AuthenticAMD" in line for line in Path("/proc/cpuinfo").read_text().splitlines())
BUILT = pytest.mark.skipif(mkl.library() is None, reason="no C compiler was there at set-up")
SAYS = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {imports}
import sys, torch
from dynarep import process
process.settle()
compiler = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
print(json.dumps([process.describe(), [str(warning.message) for warning in caught], compiler]))
"""


def described(imports: str, **env: str) -> tuple[dict[str, object], list[str], list[str]]:
    """Return what a process says that imports so: of itself, as warnings, and of PyTorch's compiler."""
    world = {name: value for name, value in os.environ.items() if name != mkl.VARIABLE}
    script = SAYS.format(imports=imports)
    done = subprocess.run([sys.executable, "-c", script], env=world | env, capture_output=True, text=True, check=True)
    said, warned, compiler = json.loads(done.stdout)
    return said, warned, compiler


@pytest.mark.slow
@BUILT
@pytest.mark.skipif(not AMD, reason="elsewhere MKL looks at the processor's instructions by itself")
def test_mkl_takes_the_kernels_of_the_processors_instructions_unless_told_otherwise():
    """Asked of MKL, in processes that differ in nothing else; a late switch changes nothing and must not claim to."""
    ours, warned, compiler = described("import dynarep")
    assert ours["mkl"] == mkl.INTEL_PATH
    assert not warned
    assert not compiler, "2 s of every training process"
    off, warned, _ = described("import dynarep", DYNAREP_MKL="own")
    assert off == ours | {"mkl": mkl.OWN_CHOICE}
    assert not warned
    late, warned, _ = described("import torch; import dynarep")
    assert late["mkl"] == mkl.OWN_CHOICE
    assert len(warned) == 1
    assert "Import dynarep first" in warned[0]


@pytest.mark.parametrize("library", [None, Path(__file__)])
def test_without_the_library_or_with_a_broken_one_the_package_can_be_imported(monkeypatch, library):
    monkeypatch.setattr(mkl, "library", lambda: library)
    monkeypatch.setattr(mkl, "path", lambda: mkl.INTEL_PATH)
    monkeypatch.delenv(mkl.VARIABLE, raising=False)
    mkl.prefer()


def test_an_eager_process_leaves_functions_alone():
    process.settle()
    assert process.fused(len) is len


# -- compiled -----------------------------------------------------------------------------------------------------


def test_the_tier_chooses_and_the_command_line_overrides_it(new_home, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(run, "train", lambda this, *others: asked.append((this.compiled, others[4])) or [])
    command = ["train", "--job", "C/small/mbpo/walker-walk/0", "--tier", "smoke"]
    cli.main(command)
    tier = new_home / "experiments" / "tiers" / "smoke.yaml"
    tier.write_text(tier.read_text() + "compiled: true\n")
    os.utime(tier, ns=(1, 1))
    for options in ((), ("--no-compiled",), ("--device", "cuda")):
        cli.main([*command, *options])
    os.utime(tier, ns=(2, 2))
    tier.write_text(tier.read_text().replace("compiled: true", "compiled: false"))
    cli.main([*command, "--compiled"])
    assert asked == [(False, "cpu"), (True, "cpu"), (False, "cpu"), (True, "cuda"), (True, "cpu")]
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "--compiled", "--no-compiled"])
    assert left.value.code == 2
    assert "--compiled goes without --no-compiled" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("cxx", "says"), [("nowhere", "none was found"), ("broken", "does not work here")])
def test_without_a_compiler_that_works_a_compiled_job_is_one_message_and_leaves_nothing(tmp_path, cxx, says):
    results, compiler = tmp_path / "runs", tmp_path / "broken"
    compiler.write_text("#!/bin/sh\ntest $1 = --version && echo 'g++ 13'")  # and fails for all else
    compiler.chmod(0o755)
    command = [sys.executable, "-m", "dynarep", "train", "--job", "C/small/mbpo/walker-walk/0", "--tier", "smoke"]
    env = os.environ | {"CXX": str(tmp_path / cxx), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "--compiled", "--results", str(results)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "--no-compiled" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in results.rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_a_compiled_run_says_so_and_gives_the_same_bytes_in_another_process_and_when_stopped(tmp_path, monkeypatch):
    """Its identity is the eager run's; numbers differ at most in rounding, which may be nothing in a short run."""
    this = replace(job("C", "mbpo"), compiled=True)
    run.train(this, tmp_path / "whole")
    manifest = json.loads((tmp_path / "whole" / this.folders()[0] / "manifest.json").read_text())
    assert manifest["machine"]["compiled"] is True
    calls = []

    def stop(done: int, total: int, now: dict[str, float]) -> None:
        calls.append(done)
        os.kill(os.getpid(), 15)

    with pytest.raises(run.StoppedError):
        run.train(this, tmp_path / "stopped", stop)
    script = (
        "from dataclasses import replace; from pathlib import Path\n"
        "from dynarep import run; from test_run import job\n"
        f"run.train(replace(job('C', 'mbpo'), compiled=True), Path({str(tmp_path / 'stopped')!r}))"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "starting over" not in done.stderr
    assert metrics(tmp_path / "stopped", this) == metrics(tmp_path / "whole", this)
    resumed = json.loads((tmp_path / "stopped" / this.folders()[0] / "manifest.json").read_text())["resumed"]
    assert [stop["stopped_at"] for stop in resumed] == calls[-1:]


def test_a_checkpoint_of_a_process_in_another_state_is_said_and_started_over(tmp_path, monkeypatch, capsys):
    this = job("C", "mbpo")

    def stop(done: int, total: int, now: dict[str, float]) -> None:
        os.kill(os.getpid(), 15)

    with pytest.raises(run.StoppedError):
        run.train(this, tmp_path, stop)
    describe = process.describe
    monkeypatch.setattr(process, "describe", lambda: describe() | {"compiled": True})
    run.train(this, tmp_path)
    assert "on another machine; starting over" in capsys.readouterr().err
    assert json.loads((tmp_path / this.folders()[0] / "manifest.json").read_text())["resumed"] == []
