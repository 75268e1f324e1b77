"""What is installed is what is locked, by every way in; and no file names a server that a reader may not reach."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from dynarep import __version__
from dynarep.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ASKED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]


def requirements(name: str) -> list[str]:
    """Return a requirements file's entries, continued lines joined, comments left out."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def pins(name: str) -> dict[str, str]:
    """Return package -> version of a requirements file; an entry that is no exact pin fails."""
    found = {}
    for line in requirements(name):
        requirement = Requirement(line.split("--hash")[0].strip())
        (only,) = requirement.specifier
        assert only.operator == "==", line
        assert "*" not in only.version, line
        key = canonicalize_name(requirement.name)
        assert key not in found, f"{key} is pinned twice"
        found[key] = only.version
    return found


LOCK, TORCH = pins("requirements.lock"), pins("requirements-torch.txt")


def conda() -> tuple[dict[str, Any], list[str], list[str]]:
    """Return environment.yml, its conda packages, and its lines for pip."""
    data = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    packages = [item for item in data["dependencies"] if isinstance(item, str)]
    (pip,) = (item["pip"] for item in data["dependencies"] if isinstance(item, dict))
    return data, packages, pip


# -- the lock -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ASKED)
def test_the_lock_has_what_the_package_asks_for(asked):
    requirement = Requirement(asked)
    pinned = (LOCK | TORCH).get(canonicalize_name(requirement.name))
    assert pinned is not None, f"{asked}: not in requirements.lock"
    assert requirement.specifier.contains(pinned, prereleases=True), f"{asked}: locked is {pinned}"


def test_torch_stands_apart_and_alone():
    assert set(TORCH) == {"torch"}
    assert not set(LOCK) & set(TORCH)
    assert not [name for name in LOCK if name.startswith(("nvidia", "triton"))], "one machine's GPU libraries"


def test_every_entry_of_the_lock_is_hashed():
    """Without a hash, what is downloaded need not be what was tested."""
    for line in [*requirements("requirements.lock"), *requirements("requirements-browser.txt")]:
        pin, *hashes = re.split(r"\s+--hash=", line)
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*==[^\s;]+", pin), line[:80]
        assert hashes, f"{pin} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), pin
    assert len(LOCK) > 50


def test_what_drives_the_browser_is_in_no_lock():
    """Its version decides no number, and the lock's hash is in every manifest."""
    assert not set(pins("requirements-browser.txt")) & set(LOCK)


def test_the_lock_is_sorted():
    """Otherwise two locks of the same packages differ, and with them every run's lock hash."""
    assert list(LOCK) == sorted(LOCK)


@pytest.mark.parametrize("name", sorted(LOCK | TORCH))
def test_the_installed_version_is_the_locked_one(name):
    """A test that passes with other versions says nothing about these."""
    assert Version(Version(metadata.version(name)).public) == Version((LOCK | TORCH)[name])


@pytest.mark.parametrize(
    "name",
    ["requirements.lock", "requirements-torch.txt", "requirements-browser.txt", "pyproject.toml", "environment.yml"],
)
def test_no_file_names_a_server(name):
    """A lock made behind a mirror must work elsewhere; conda's channel is a name, not an address."""
    check_no_server(name)


def test_the_makefile_names_no_server():
    check_no_server("Makefile")


def check_no_server(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"sha256:[0-9a-f]{64}", "", text)
    for pattern in (r"\w+://", r"index-url", r"find-links", r"trusted-host", r"@\s*file", r"git\+", r"\blocalhost\b"):
        assert not re.search(pattern, text), f"{name}: {pattern}"
    assert not re.search(r"\b[\w-]+\.(?:com|org|net|io|dev|ai|edu|local|internal)\b", text), name
    assert not re.search(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)\b", text), name


# -- the ways in --------------------------------------------------------------------------------------------------


def test_every_way_in_has_the_same_python():
    asked = SpecifierSet(PROJECT["requires-python"])
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert Version(".".join(map(str, sys.version_info[:3]))) in asked
    (python,) = (item for item in conda()[1] if item.startswith("python"))
    minor = python.partition("=")[2].strip("=")
    assert asked == SpecifierSet(f"=={minor}.*")
    assert f"python{minor}" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert tools["mypy"]["python_version"] == minor
    assert tools["ruff"]["target-version"] == "py" + minor.replace(".", "")


def test_conda_installs_the_lock_and_names_the_command_for_the_rest():
    data, packages, pip = conda()
    assert data["name"] == "dynarep"
    assert {item.split("=")[0] for item in packages} == {"python", "make", "git", "pip"}
    files = [line.removeprefix("-r ") for line in pip]
    assert files == ["requirements.lock"]
    assert pins(files[0]) == LOCK
    then = "pip install -r requirements-torch.txt && pip install --no-deps --no-build-isolation -e ."
    assert then in (ROOT / "environment.yml").read_text()
    assert then in (ROOT / "README.md").read_text()


def test_pip_takes_condas_requirements():
    """Conda hands them to one run of pip, and a single hash makes pip refuse every requirement without one."""
    files = [line.removeprefix("-r ") for line in conda()[2]]
    lines = [line for file in files for line in requirements(file)]
    bare = [line for line in lines if "--hash=" not in line]
    assert len(bare) in (0, len(lines)), f"pip will refuse {bare}: 'Hashes are required in --require-hashes mode'"


def test_the_packages_version_is_the_stated_one():
    assert PROJECT["version"] == __version__ == metadata.version("dynarep")


# -- make ---------------------------------------------------------------------------------------------------------

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = {m[1]: (m[2], m[3]) for m in re.finditer(r"^([\w-]+):([^=\n]*)\n((?:\t.*\n?)+)", MAKEFILE, re.MULTILINE)}


@pytest.mark.parametrize("target", ["reproduce", "test"])
def test_make_has_what_the_readers_type(target):
    head, recipe = TARGETS[target]
    assert ".venv/ready" in head, "a fresh clone has no environment"
    assert "##" in head, f"`{target}` is not documented: write '## what it does' behind it"
    assert recipe.strip()
    (phony,) = re.findall(r"^\.PHONY:(.*)$", MAKEFILE, re.MULTILINE)
    assert target in phony.split(), f"a file called '{target}' would stop it"


def test_make_installs_by_hash_then_torch_then_the_package():
    (recipe,) = re.findall(r"^\.venv/ready:.*\n((?:\t.*\n?)+)", MAKEFILE, re.MULTILINE)
    steps = [line for line in recipe.splitlines() if "pip install" in line]
    assert "--require-hashes -r requirements.lock" in steps[0]
    assert "-r requirements-torch.txt" in steps[1]
    assert "--no-deps" in steps[2]
    assert len(steps) == 3


def test_make_calls_commands_that_exist():
    called = re.findall(r"\$\(BIN\)/dynarep (\S+)", MAKEFILE)
    assert called
    assert set(called) <= set(COMMANDS)
    for place in re.findall(r"--profile (\S+)", MAKEFILE):
        assert (ROOT / place / "config.yaml").is_file(), place


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("target", "typed"), [("reproduce", "snakemake"), ("test", "pytest")])
def test_make_understands_its_makefile(target, typed):
    done = subprocess.run(
        ["make", "--dry-run", target, "TIER=smoke"], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr
    assert typed in done.stdout
    assert "tier=smoke" in done.stdout or target == "test"


# -- how to cite --------------------------------------------------------------------------------------------------


def test_the_citation_has_what_citation_tools_need():
    """Keys that the Citation File Format 1.2.0 requires, and those that must agree with the package."""
    data = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert data["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type", "version", "license"} <= set(data)
    assert (data["type"], data["version"], data["license"]) == ("software", __version__, PROJECT["license"])
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    for work in (data, *data["references"]):
        assert work["title"].strip()
        assert work["authors"]
        for author in work["authors"]:
            assert "name" in author or {"family-names", "given-names"} <= set(author), author
    papers = {identifier["value"] for work in data["references"] for identifier in work["identifiers"]}
    assert {"arXiv:2410.08896", "arXiv:2510.01457"} <= papers
