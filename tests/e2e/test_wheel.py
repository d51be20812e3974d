"""What a user installs: an sdist made of this checkout, the wheel built from that sdist, in a virtual
environment that sees nothing of the development tree; used, and uninstalled without a file left.

Dependencies are not downloaded: the new environment is shown those of this one, one by one, without
areal_fast.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WATCHDOG_S = 600
pytestmark = [pytest.mark.slow, pytest.mark.timeout(WATCHDOG_S)]
pytest.importorskip("setuptools", reason="the build backend is not installed")
pytest.importorskip("Cython", reason="the build needs Cython")
BUILD_SDIST = "import setuptools.build_meta, sys; print(setuptools.build_meta.build_sdist(sys.argv[1]))"


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Output of a command that has to succeed, in an environment without this one's Python settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, check=False,
        timeout=WATCHDOG_S, env=inherited | variables,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what the checkout tracks, so that nothing of an earlier build is in it."""
    folder = tmp_path_factory.mktemp("sdist")
    try:
        listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    except (OSError, AssertionError) as error:
        pytest.skip(f"needs a git checkout: {error}")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "tree" / name)
    run(sys.executable, "-c", BUILD_SDIST, folder, cwd=folder / "tree")
    (made,) = folder.glob("*.tar.gz")
    return made


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--disable-pip-version-check", "-q"]
    # what is looked at is which files are there, not how fast they are
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", folder, sdist, cwd=folder, CFLAGS="-O0")
    (made,) = folder.glob("*.whl")
    return made


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as file:
        return sorted(file.namelist())


def unwanted(names: Sequence[str], wanted: str) -> list[str]:
    return [name for name in names if not re.fullmatch(wanted, name)]


def test_the_sdist_has_what_a_build_needs_and_no_more(sdist: Path) -> None:
    with tarfile.open(sdist) as file:
        names = [member.name.partition("/")[2] for member in file.getmembers() if member.isfile()]
    for source in (*(ROOT / "csrc").glob("*.[ch]"), *(ROOT / "areal_fast").rglob("*.p[yx][xdi]")):
        assert source.relative_to(ROOT).as_posix() in names
    wanted = (
        r"[A-Za-z.-]+\.(md|in|toml|py|cfg)|PKG-INFO|areal_fast\.egg-info/.*|csrc/.*\.(c|h|md)|docs/.*\.md"
        r"|areal_fast/.*\.(py|pyx|pxd|pxi|pyi|pth)|areal_fast/py\.typed"
    )
    assert unwanted(names, wanted) == []


def test_the_wheel_has_every_module_and_no_source_of_anything_else(wheel: Path) -> None:
    names = names_in(wheel)
    modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "areal_fast").rglob("*.py")]
    assert [name for name in modules if name not in names] == []
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name in ("_core", "_cuda"):
        assert f"areal_fast/core/{name}{suffix}" in names
        assert f"areal_fast/core/{name}.pyi" in names
    assert "areal_fast/py.typed" in names
    wanted = (
        r"areal_fast/.*\.(py|pyi|so)|areal_fast/py\.typed|areal_fast-[^/]*\.dist-info/[^/]*"
        r"|areal_fast-[^/]*\.data/purelib/areal_fast\.pth"
    )
    assert unwanted(names, wanted) == []


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that sees this one's packages, but neither areal_fast nor its
    checkout."""
    folder = tmp_path_factory.mktemp("user")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    packages = folder / "dependencies"
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "areal" not in entry.name and entry.suffix != ".pth" and entry.name != "pip":
            (packages / entry.name).symlink_to(entry)
    made = folder / "venv" / "bin" / "python"
    site = run(made, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip()
    (Path(site) / "dependencies.pth").write_text(f"{packages}\n")
    return made


def test_installed_used_and_uninstalled(wheel: Path, python: Path, tmp_path: Path) -> None:
    folder = python.parents[1]

    def files() -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}

    before = files()
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q"]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    command = folder / "bin" / "areal-fast"
    where = run(python, "-c", "import areal_fast; print(areal_fast.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(folder)
    version = re.search(r"[0-9]+\.[0-9]+\.[0-9]+", wheel.name)
    assert version and run(command, "--version", cwd=tmp_path) == f"areal-fast {version[0]}\n"
    assert "--backend-addr" in run(command, "--help", cwd=tmp_path)
    day = [
        "--agents",
        "4",
        "--seconds",
        "1",
        "--session-timeout-seconds",
        "2",
        "--folder",
        str(tmp_path / "day"),
    ]
    run(command, "demo", *day, cwd=tmp_path)  # its exit status is its verdict
    for name in ("top", "dumps", "embedded"):
        assert "usage" in run(python, "-m", "areal_fast", name, "--help", cwd=tmp_path)
    run(*pip, "uninstall", "-y", "areal-fast", cwd=tmp_path)
    assert files() - before == set()
