"""A results folder from anybody: refused with a message that names the file, never followed, never run."""

import ast
import contextlib
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import CHECKOUT
from dynarep import cli, records, untrusted
from dynarep.experiment import Job, load
from dynarep.manifests import Manifest
from dynarep.protocols import Metrics
from synthetic import manifest


@pytest.fixture(scope="module")
def job() -> Job:
    return load(next((CHECKOUT / "experiments/beyond").glob("S_*.yaml"))).jobs("smoke")[0]


@pytest.fixture
def run(tmp_path: Path, job: Job) -> Path:
    return written(tmp_path / "runs", job)


def written(results: Path, job: Job) -> Path:
    metrics = Metrics([0])
    metrics.add(0, 0, 0, {"spectrum/unstable": [1.0], "spectrum/smallest_real": [-0.25]})
    folder = results / job.folders()[0]
    records.write(folder, metrics.csv(0), {**manifest(job, 0), "seed": 0})
    return folder


def refusal(run: Path, job: Job) -> str:
    with pytest.raises(records.RecordError) as error:
        records.read(run, job.config, 0)
    assert str(run) in str(error.value), "the message does not name the file"
    return str(error.value)


def test_what_nobody_touched_is_read(run, job):
    assert records.read(run, job.config, 0).last("spectrum/unstable") == 1
    assert records.made_by(run) == (manifest(job, 0)["code"]["fingerprint"], manifest(job, 0)["lock"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 200_000, "too deeply"),
        (b"[" * 100 + b"]" * 100, "deep"),
        (b'{"a":' * 200_000, "too deeply"),
        (b'{"seed": 0, "seed": 1}', "'seed' twice"),
        (b'{"seed": NaN}', "NaN"),
        (b'{"seed": -Infinity}', "Infinity"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"null", "dictionary"),
        (b" " * (2**20 + 1), "too large"),
        (pickle.dumps({"seed": 0}), "not UTF-8"),
    ],
)
def test_a_manifest_that_is_none_is_refused(run, job, content, says):
    (run / "manifest.json").write_bytes(content)
    assert says in refusal(run, job)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("seed", "0", "valid integer"),
        ("seed", True, "valid integer"),
        ("seed", 0.0, "valid integer"),
        ("seed", -1, "greater than"),
        ("config", [], "valid dictionary"),
        ("identity", 5, "valid string"),
        ("code", None, "valid dictionary"),
        ("code", {"fingerprint": ["x"]}, "valid string"),
        ("lock", None, "valid string"),
        ("lock", "x" * 10_000, "at most 500"),
        ("versions", ["numpy"], "valid dictionary"),
        ("machine", {"cpu": {"a": "b"}}, "machine"),
        ("cost", {"seeds_in_job": 0}, "greater than"),
        ("cost", {"cpu_s": -1.0}, "greater than"),
        ("cost", {"cpu_s": "1"}, "valid number"),
        ("resumed", 5, "resumed"),
        ("resumed", [{"wall_s": 1.0}], "is missing"),
        ("written", "yesterday", "isoformat"),
        ("written", "2026-01-01T00:00:00", "zone"),
        ("claims", {"C1": 5}, "valid string"),
        ("block", {"../0": "0" * 64}, "block"),
        ("block", {"0": "x"}, "block"),
        ("files", {"../../metrics.csv": {"sha256": "", "bytes": 0}}, "was not opened"),
        ("files", {"/etc/passwd": {"sha256": "", "bytes": 0}}, "was not opened"),
        ("files", {}, "files.metrics.csv: is missing"),
        ("files", {"metrics.csv": {"sha256": "", "bytes": -1}}, "greater than"),
        ("files", {"metrics.csv": {"sha256": "", "bytes": 10**30}}, "less than"),
    ],
)
def test_a_manifest_of_wrong_types_is_refused(run, job, key, value, says):
    content = json.loads((run / "manifest.json").read_text()) | {key: value}
    (run / "manifest.json").write_text(json.dumps(content))
    assert says in refusal(run, job)
    with pytest.raises(records.RecordError):
        records.made_by(run)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xff\xfe", "utf-8"),
        (b"agent_step,frame,update,metric\n0,0,0,q\n", "columns"),
        (b"agent_step,frame,update,metric,value\n", "no rows"),
        (b"agent_step,frame,update,metric,value\n0,0,0,q\n", "line 2"),
        (b"agent_step,frame,update,metric,value\n0,0,0,q,1,2\n", "line 2"),
        (b"agent_step,frame,update,metric,value\n0,0,0,q,high\n", "convert"),
        (b"agent_step,frame,update,metric,value\n0,0,0," + b"q" * 200_000 + b",1\n", "limit"),
        (b"agent_step,frame,update,metric,value\n0,0,0," + b"q" * 101 + b",1\n", "at most 100"),
        (b'agent_step,frame,update,metric,value\n0,0,0,"q,1\n', "unexpected end"),
        (b"agent_step,frame,update,metric,value\n0,0,0,q,1\n\n", "line 3"),
    ],
)
def test_metrics_that_are_none_are_refused_though_their_hash_is_right(run, job, data, says):
    (run / "metrics.csv").write_bytes(data)
    records.write(run, "", json.loads((run / "manifest.json").read_text()))
    content = json.loads((run / "manifest.json").read_text())
    content["files"]["metrics.csv"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (run / "manifest.json").write_text(json.dumps(content))
    (run / "metrics.csv").write_bytes(data)
    assert says in refusal(run, job)


@pytest.mark.parametrize("depth", range(records.DEPTH))
def test_a_link_in_place_of_a_folder_is_not_followed(tmp_path, run, job, depth):
    place = (run, *run.parents)[depth]
    target = tmp_path / "elsewhere"
    place.rename(target)
    place.symlink_to(target)
    assert "link" in refusal(run, job)


@pytest.mark.parametrize("name", ["metrics.csv", "manifest.json"])
def test_a_link_a_pipe_a_device_or_a_folder_in_place_of_a_file_is_refused(tmp_path, run, job, name):
    """A pipe without a writer would block, a device never end."""
    original = tmp_path / "original"
    (run / name).rename(original)
    for make in (
        lambda path: path.symlink_to(original),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("nothing"),
        os.mkfifo,
    ):
        make(run / name)
        refusal(run, job)
        (run / name).unlink()
    (run / name).mkdir()
    refusal(run, job)


def test_a_huge_file_is_not_read(run, job):
    for name, most in (("metrics.csv", untrusted.METRICS_BYTES), ("manifest.json", untrusted.MANIFEST_BYTES)):
        with (run / name).open("ab") as file:
            file.truncate(100 * most)  # sparse: takes no room
        assert "too large" in refusal(run, job)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_content_at_all_is_a_traceback(tmp_path, job, data):
    """Random bytes, random JSON, and a real manifest with a random value somewhere."""
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    run = written(tmp_path / "runs", job)
    whole = json.loads((run / "manifest.json").read_text())
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    anything = st.recursive(leaves, lambda x: st.lists(x) | st.dictionaries(st.text(max_size=4), x), max_leaves=6)
    spoiled = st.sampled_from(sorted(Manifest.model_fields)).flatmap(
        lambda key: anything.map(lambda v: {**whole, key: v})
    )
    content = data.draw(
        st.binary() | anything.map(json.dumps).map(str.encode) | spoiled.map(json.dumps).map(str.encode)
    )
    (run / "manifest.json").write_bytes(content)
    with contextlib.suppress(records.RecordError):  # any other error fails the test
        assert records.read(run, job.config, 0).manifest["config"] == job.config.content()


def test_the_commands_say_what_is_wrong_and_go_on(tmp_path, run, job, monkeypatch, capsys):
    """A bad run among the results: one line on stderr, or a line of the report; no traceback, whatever is asked for."""
    for file in (*(CHECKOUT / "experiments/tiers").iterdir(), *(CHECKOUT / "experiments/beyond").glob("S_*")):
        target = tmp_path / file.relative_to(CHECKOUT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    monkeypatch.setenv("DYNAREP_HOME", str(tmp_path))
    (run / "manifest.json").write_bytes(b"[" * 100_000)
    where = f"--tier smoke --results {run.parents[3]}"
    arm = f"--variant {job.variant} --task {job.task} --seeds 0"
    for command in (f"figure --experiment S {where}", f"train --experiment S {arm} {where}"):
        with pytest.raises(SystemExit) as left:
            cli.main(command.split())
        assert left.value.code == 2
        assert "manifest.json: is not a manifest of dynarep" in capsys.readouterr().err
    for command in ("plan", "claims", "report"):
        cli.main([command, *where.split()])
    assert "is not a manifest of dynarep" in (run.parents[3] / "report" / "smoke.html").read_text()


def test_nothing_unpickles_and_nothing_evaluates():
    """A checkpoint is loaded with `weights_only`, arrays without pickles; nothing else could run what it reads.

    Two simulators copy their own state within the process by pickling it, and processes that hold environments talk
    with the one that started them through a pair of sockets that nobody else has; none of them opens a file.
    """
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    must = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    copying = {"control_suite.py", "metaworld_suite.py", "workers.py"}
    seen = set()
    for path in Path(records.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {name.name for name in node.names} | {getattr(node, "module", None)}
                assert not unsafe & names or path.name in copying, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert path.name not in copying or called.split(".")[-1] not in ("open", "read_bytes"), path
                assert called not in ("eval", "exec", "compile", "pickle.load", "pd.read_pickle", "yaml.unsafe_load"), (
                    path
                )
                if called in must:
                    seen.add(called)
                    key, value = must[called]
                    given = {word.arg: word.value for word in node.keywords}
                    assert isinstance(given.get(key), ast.Constant), path
                    assert given[key].value is value, path
    assert seen == set(must), "the test looks for calls that nobody makes"
