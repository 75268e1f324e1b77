"""The code's fingerprint: what changes numbers changes it, nothing else does. Edits are made in a copy."""

import ast
import functools
import re
import shutil
from pathlib import Path

import pytest

from dynarep import fingerprint
from dynarep.configs import AgentConfig, ProtocolConfig, registry

PACKAGE = Path(fingerprint.__file__).parent
ENTRIES = {"R1": ("dynarep.agents.mad_td", "dynarep.protocols.frozen"), "C": ("dynarep.protocols.model_fit",)}
MODULES = {name: fingerprint.modules(*entries) for name, entries in ENTRIES.items()}
OF_PACKAGE = {name: fingerprint.of_modules(modules) for name, modules in MODULES.items()}
TREE = fingerprint._tree.__wrapped__
EVERY = sorted(
    ".".join(("dynarep", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


class Copy:
    """A copy of the package whose files can be edited."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, module: str) -> Path | None:
        base = self.root.joinpath(*module.split(".")[1:])
        return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)

    def source(self, module: str) -> str:
        path = self.path(module)
        assert path is not None
        return path.read_text(encoding="utf-8")

    def edit(self, module: str, source: str) -> None:
        path = self.path(module)
        assert path is not None
        assert source != path.read_text(encoding="utf-8")
        ast.parse(source)
        path.write_text(source, encoding="utf-8")

    def fingerprint(self, name: str) -> str:
        return fingerprint.of_modules(fingerprint.modules(*ENTRIES[name]))


@functools.cache
def tree(module: str, source: str) -> tuple[str, frozenset[str]]:
    """What the package remembers by a module's name, here by its text too: what an edit leaves alone stays parsed."""
    found = TREE(module)
    assert fingerprint._source(module).read_text(encoding="utf-8") == source
    return found


@pytest.fixture
def copy(tmp_path, monkeypatch):
    shutil.copytree(PACKAGE, tmp_path / "dynarep", ignore=shutil.ignore_patterns("__pycache__"))
    made = Copy(tmp_path / "dynarep")
    monkeypatch.setattr(fingerprint, "_source", made.path)
    monkeypatch.setattr(fingerprint, "_tree", lambda module: tree(module, made.source(module)))
    return made


def edited(source: str) -> str:
    """Add a statement to the last function; to the module if it has none."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    lines = source.splitlines(keepends=True)
    if not functions:
        return source + "\nADDED = 1\n"
    statement = functions[-1].body[-1]
    lines.insert(statement.lineno - 1, " " * statement.col_offset + "pass\n")
    return "".join(lines)


def test_the_copys_fingerprint_is_that_of_the_package(copy):
    before = {name: copy.fingerprint(name) for name in ENTRIES}
    assert before == OF_PACKAGE
    assert before["R1"] != before["C"]


@pytest.mark.parametrize("name", ENTRIES)
def test_comments_and_formatting_make_no_run_out_of_date(copy, name):
    before = copy.fingerprint(name)
    for module in MODULES[name]:
        copy.edit(module, "# a comment\n\n\n" + copy.source(module).replace("\n\n", "\n# another\n\n\n"))
    assert copy.fingerprint(name) == before
    for module in MODULES[name]:
        copy.edit(module, ast.unparse(ast.parse(copy.source(module))))
    assert copy.fingerprint(name) == before


@pytest.mark.parametrize("name", ENTRIES)
def test_docstrings_make_no_run_out_of_date(copy, name):
    before = copy.fingerprint(name)
    edited = 0
    for module in MODULES[name]:
        source = copy.source(module)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                first = text.splitlines()[0]
                source, n = re.subn(rf'("""){re.escape(first)}', r"\1Other words. " + "x" * 9, source, count=1)
                edited += n
        copy.edit(module, source)
    assert edited > 30
    assert copy.fingerprint(name) == before


@pytest.mark.parametrize("name", ENTRIES)
def test_an_edited_function_makes_runs_out_of_date(copy, name):
    """A run that survives an edit of the code that made it would be passed off as the new code's."""
    seen = {copy.fingerprint(name)}
    for module in MODULES[name]:
        copy.edit(module, edited(copy.source(module)))
        seen.add(copy.fingerprint(name))
    assert len(seen) == 1 + len(MODULES[name])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max=self.capacity", "max=self.capacity - 1"),
        ("self._next + added", "self._next - added"),
        ("dtype=target.dtype", "dtype=None"),
        ("def draw(", "def draw2("),
    ],
)
def test_the_smallest_edit_counts(copy, old, new):
    before = copy.fingerprint("R1")
    copy.edit("dynarep.replay", copy.source("dynarep.replay").replace(old, new, 1))
    assert copy.fingerprint("R1") != before


def test_edits_elsewhere_make_no_run_out_of_date(copy):
    """A new colour in a figure must not cost a night of training."""
    for name in ENTRIES:
        before = copy.fingerprint(name)
        for module in set(EVERY) - set(MODULES[name]):
            copy.edit(module, copy.source(module) + "\nADDED = 1\n")
        assert copy.fingerprint(name) == before


def test_a_newly_imported_module_counts(copy):
    before = copy.fingerprint("R1")
    copy.edit("dynarep.nets", copy.source("dynarep.nets") + "\nfrom dynarep import plan\n")
    with_plan = copy.fingerprint("R1")
    assert with_plan != before
    copy.edit("dynarep.plan", edited(copy.source("dynarep.plan")))
    assert copy.fingerprint("R1") != with_plan


def test_what_decides_numbers_is_covered():
    shared = {"dynarep.envs", "dynarep.nets", "dynarep.streams", "dynarep.configs"}
    shared |= {"dynarep.protocols", "dynarep.protocols.collect"}
    assert set(MODULES["R1"]) >= shared | {
        "dynarep.replay", "dynarep.agents.mad_td", "dynarep.configs.mad_td", "dynarep.diagnostics.td",
    }  # fmt: skip
    assert set(MODULES["C"]) >= shared | {
        "dynarep.agents.ensemble",
        "dynarep.configs.mbpo",
        "dynarep.diagnostics.model",
    }
    assert not set(MODULES["R1"]) & {"dynarep.agents.ensemble", "dynarep.protocols.model_fit", "dynarep.cli"}
    assert not set(MODULES["C"]) & {"dynarep.agents.mad_td", "dynarep.protocols.frozen", "dynarep.figures"}


def test_every_agent_and_protocol_has_a_fingerprint_of_its_own_code():
    for agent in registry(AgentConfig).values():
        for protocol in registry(ProtocolConfig).values():
            modules = fingerprint.modules(*(part.implementation.split(":")[0] for part in (agent, protocol)))
            assert {agent.__module__, protocol.__module__} <= set(modules), "its hyperparameters do not count"
            assert fingerprint.of_parts(agent(), protocol()) == fingerprint.of_modules(modules)


@pytest.mark.parametrize("module", sorted(set(MODULES["R1"]) | set(MODULES["C"])))
def test_modules_import_in_a_way_that_the_fingerprint_sees(module):
    """A relative or computed import would leave a module out."""
    path = fingerprint._source(module)
    assert path is not None
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
        if module not in ("dynarep.configs", "dynarep.envs.base"):  # they load configurations and simulators by name
            assert not (isinstance(node, ast.Attribute) and node.attr == "import_module"), f"{path}: computed import"


def test_the_lock_counts(tmp_path):
    assert fingerprint.of_lock(tmp_path / "none") == ""
    hashes = set()
    for index, (lock, torch) in enumerate([("a==1", "torch==2"), ("a==2", "torch==2"), ("a==1", "torch==3")]):
        (folder := tmp_path / str(index)).mkdir()
        (folder / "requirements.lock").write_text(lock)
        (folder / "requirements-torch.txt").write_text(torch)
        hashes.add(fingerprint.of_lock(folder))
    assert len(hashes) == 3
