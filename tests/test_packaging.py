"""Does a wheel hold exactly the package and its demo files, and is every requirement pinned?"""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import fasteagle
from fasteagle import demo

ROOT = Path(__file__).parents[1]
DEMO_FILES = {
    "fasteagle/demo/head/tree.json",
    "fasteagle/demo/README.md",
    "fasteagle/demo/base/config.json",
    "fasteagle/demo/base/model.safetensors",
    "fasteagle/demo/base/tokenizer.model",
    "fasteagle/demo/head/config.json",
    "fasteagle/demo/head/model.safetensors",
}


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py passes to setuptools, without installing anything."""
    passed: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", passed.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return passed


@pytest.fixture
def shipped(metadata: dict[str, Any], tmp_path: Path) -> set[str]:
    """Every file that a wheel of this tree would hold, relative to its root."""
    distribution = setuptools.Distribution({**metadata, "script_name": "setup.py"})
    build = distribution.get_command_obj("build_py")
    build.build_lib = str(tmp_path)
    build.ensure_finalized()
    files = build.get_outputs(include_bytecode=False)
    return {Path(path).relative_to(tmp_path).as_posix() for path in files}


@pytest.fixture
def pinned() -> dict[str, str]:
    """constraints.txt as {canonical name: version}."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_a_wheel_holds_every_module_and_nothing_beside_the_package(shipped: set[str]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fasteagle").rglob("*.py")}
    assert shipped == modules | DEMO_FILES | {"fasteagle/py.typed"}


def test_the_demo_pair_lies_where_the_package_says() -> None:
    assert (demo.BASE / "config.json").is_file()
    assert (demo.BASE / "tokenizer.model").is_file()
    assert (demo.HEAD / "model.safetensors").is_file()
    assert all((ROOT / name).is_file() for name in DEMO_FILES)


def test_git_ignores_nothing_that_ships(shipped: set[str]) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "check-ignore", "--no-index", *shipped]
    run = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert run.returncode == 1, f"ignored: {run.stdout}{run.stderr}"  # 1 is git's "none of them"


def test_the_version_is_the_package_version(metadata: dict[str, Any]) -> None:
    assert metadata["version"] == fasteagle.__version__
    assert f"## {fasteagle.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_command_is_a_function_of_the_package(metadata: dict[str, Any]) -> None:
    (script,) = metadata["entry_points"]["console_scripts"]
    name, target = script.split("=")
    module, _, function = target.partition(":")
    assert name == "fasteagle"
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert re.search(rf"^def {function}\(", path.read_text(), re.M)


def test_every_requirement_is_pinned(metadata: dict[str, Any], pinned: dict[str, str]) -> None:
    named = [*metadata["install_requires"], *metadata["extras_require"]["dev"]]
    for requirement in map(Requirement, named):
        if requirement.name in ("setuptools", "triton"):  # each torch wants its own
            continue
        version = pinned[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement} leaves out {version}"


def test_constraints_name_public_versions(pinned: dict[str, str]) -> None:
    # 2.13.0+cpu exists on one index only; 2.13.0 is met by every build of it.
    assert not [name for name, version in pinned.items() if Version(version).local]


def test_pre_commit_runs_the_tested_ruff(pinned: dict[str, str]) -> None:
    assert f"rev: v{pinned['ruff']}\n" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_all_is_the_sum_of_the_user_extras(metadata: dict[str, Any]) -> None:
    extras = metadata["extras_require"]
    users = [name for extra in ("train", "serve", "ui", "hf") for name in extras[extra]]
    assert sorted(extras["all"]) == sorted(users)
