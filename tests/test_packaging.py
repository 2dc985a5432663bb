"""What is installed is what was tested: the wheel's content, the declared dependencies, the pins."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import smore_cli
from smore_cli.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator

# Needed at run time without being imported by name: transformers reads GGUF files and quantises through them.
USED_THROUGH_TRANSFORMERS = {"gguf", "bitsandbytes"}
# Used where they are installed: adapters in PEFT, and the check of a gguf file by llama.cpp.
OPTIONAL = {"peft", "xllamacpp", "deepspeed"}
# Packages that come with another one, in the one version that fits it.
PARTS = {"pydantic_core": "pydantic", "triton": "torch"}


@pytest.fixture(scope="module")
def pyproject(project: Path) -> dict[str, Any]:
    return tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=project, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        yield archive


def pins(project: Path) -> dict[str, str]:
    lines = (project / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def third_party_packages(folder: Path) -> set[str]:
    """Distributions whose modules the files of a folder import, inside functions too."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    provided_by = importlib.metadata.packages_distributions()
    foreign = names - set(sys.stdlib_module_names) - {"smore_cli", "tests"}
    return {PARTS[name] if name in PARTS else canonicalize_name(provided_by[name][0]) for name in foreign}


def declared(pyproject: dict[str, Any], extra: str | None = None) -> set[str]:
    lines = pyproject["optional-dependencies"][extra] if extra else pyproject["dependencies"]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_the_wheel_carries_every_file_of_the_package(wheel: zipfile.ZipFile, project: Path) -> None:
    package = [
        path for path in (project / "smore_cli").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    expected = {path.relative_to(project).as_posix() for path in package}
    assert expected <= set(wheel.namelist())
    assert "smore_cli/py.typed" in expected


def test_the_wheel_carries_the_recipes_and_the_licence(wheel: zipfile.ZipFile, project: Path) -> None:
    recipes = {path.relative_to(project / "recipes").as_posix() for path in (project / "recipes").rglob("*.yaml")}
    assert "quickstart.yaml" in recipes
    assert {f"smore_cli/_recipes/{name}" for name in recipes} <= set(wheel.namelist())
    licence = next(name for name in wheel.namelist() if name.endswith("licenses/LICENSE"))
    assert "Apache License" in wheel.read(licence).decode()


def test_the_wheel_carries_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"smore_cli", f"smore_cli-{smore_cli.__version__}.dist-info"}


def test_the_console_script_is_the_command_line(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(f"smore_cli-{smore_cli.__version__}.dist-info/entry_points.txt").decode()
    scripts = configparser.ConfigParser()
    scripts.read_string(text)
    assert dict(scripts["console_scripts"]) == {"smore": "smore_cli.cli:main"}
    assert callable(main)  # imported above, under the name the script uses


def test_the_dependencies_are_what_the_package_imports(pyproject: dict[str, Any], project: Path) -> None:
    imported = third_party_packages(project / "smore_cli") - OPTIONAL
    assert imported | USED_THROUGH_TRANSFORMERS == declared(pyproject)
    assert declared(pyproject, "dev") | declared(pyproject, "deepspeed") >= OPTIONAL


def test_the_tests_import_only_what_the_dev_extra_brings(pyproject: dict[str, Any], project: Path) -> None:
    assert third_party_packages(project / "tests") <= declared(pyproject) | declared(pyproject, "dev")


def test_every_dependency_is_pinned_within_its_bounds(pyproject: dict[str, Any], project: Path) -> None:
    pinned = pins(project)
    extras = pyproject["optional-dependencies"]
    for line in [*pyproject["dependencies"], *extras["dev"], *extras["deepspeed"]]:
        requirement = Requirement(line)
        version = pinned[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"constraints.txt pins {version}, pyproject.toml wants {line}"


def test_the_makefile_installs_the_pinned_torch(project: Path) -> None:
    assert f"torch=={pins(project)['torch']}" in (project / "Makefile").read_text(encoding="utf-8")


def test_the_changelog_begins_with_this_version(project: Path) -> None:
    first = re.search(r"^## \[(.+?)\]", (project / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first
    assert first[1] == smore_cli.__version__
