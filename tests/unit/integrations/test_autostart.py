"""AREAL_FAST=1 in interpreters of their own: an environment with areal_fast.pth, a fake AReaL, and programs
that know nothing of areal_fast."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.unit.integrations.fake_areal import ASYNC, EXPERIMENTAL, GENERATIONS, SYNC, write

ROOT = Path(__file__).resolve().parents[3]
PTH = ROOT / "areal_fast" / "integrations" / "areal_fast.pth"
LAUNCH = f"""
from {EXPERIMENTAL}.controller.controller import RolloutControllerV2
print(*dict(RolloutControllerV2().initialize())["data-proxy"][1:])
"""
OURS = "-m areal_fast --tokenizer-path /t --admin-api-key k --drain-seconds 0.5 --areal-dialect 1.0"
THEIRS = f"-m {EXPERIMENTAL}.data_proxy --tokenizer-path /t --admin-api-key k --host 10.0.0.1 --port 7001"
RTENSOR = """
import threading
_fetch_buffer, _fetch_buffer_lock, backend = {}, threading.Lock(), None
def set_backend(new):
    global backend
    backend = new
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment as a user's, with the .pth file where an installation puts it."""
    folder = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=200)
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "__others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")  # read before ours
    (packages / PTH.name).write_text(PTH.read_text())
    return folder / "bin" / "python"


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A folder with an AReaL of generation 1.0."""
    write(tmp_path, **GENERATIONS["1.0"])
    return tmp_path


def run(python: Path, program: str, folder: Path | str = "", **variables: str) -> tuple[str, str]:
    """(stdout, stderr) of the program, whose AReaL is in `folder`. Its exit status is 0."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AREAL_FAST")}
    done = subprocess.run(
        [str(python), "-c", program],
        env=kept | {"PYTHONPATH": str(folder)} | variables,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_on_it_patches_what_the_program_imports(python: Path, fake: Path) -> None:
    out, err = run(python, LAUNCH, fake, AREAL_FAST="1", AREAL_FAST_ARGS="--workers 3")
    assert out == f"{OURS} --workers 3 --host 10.0.0.1 --port 7001"
    assert err.splitlines() == [
        "areal_fast: AReaL 1.0: its data proxies are launched as areal_fast, with --drain-seconds 0.5 "
        "--areal-dialect 1.0 --workers 3"
    ]


@pytest.mark.parametrize("value", ["", "0"])
def test_off_nothing_of_it_is_loaded(python: Path, fake: Path, value: str) -> None:
    seen = "import sys; print([m for m in sys.modules if 'areal' in m])"
    assert run(python, seen, fake, AREAL_FAST=value) == ("[]", "")
    assert run(python, LAUNCH, fake, AREAL_FAST=value) == (THEIRS, "")


def test_on_a_program_without_areal_has_little_more(python: Path) -> None:
    program = "import sys; print(sorted(m for m in sys.modules if 'areal' in m or m in ('torch', 'msgspec')))"
    names = ["areal_fast", "areal_fast.integrations"]
    names += [f"areal_fast.integrations.{name}" for name in ("autostart", "imports")]
    assert run(python, program, AREAL_FAST="1") == (str(names), "")


def test_another_value_is_said_once_for_a_whole_tree(python: Path, fake: Path) -> None:
    again = (
        f"{LAUNCH}\nimport subprocess, sys; subprocess.run([sys.executable, '-c', {LAUNCH!r}], check=True)"
    )
    _, err = run(python, again, fake, AREAL_FAST="yes")
    assert err == "areal_fast: error: AREAL_FAST=yes: 1 is on, 0 or nothing is off; AReaL is left as it is\n"
    assert run(python, LAUNCH, fake, AREAL_FAST="yes")[0] == THEIRS
    assert run(python, "", fake, AREAL_FAST="yes") == ("", ""), "nobody asks who does not import AReaL"


def test_a_wrong_option_is_said_when_areal_is_imported(python: Path, fake: Path) -> None:
    out, err = run(python, LAUNCH, fake, AREAL_FAST="1", AREAL_FAST_ARGS="--wrokers 3")
    assert out == THEIRS
    assert err == (
        "areal_fast: error: AREAL_FAST_ARGS: the proxy knows no --wrokers 3; AReaL keeps its own data proxy\n"
    )


def test_an_areal_that_nobody_knows_is_said_once_for_a_whole_tree(python: Path, tmp_path: Path) -> None:
    write(tmp_path, package="areal.moved", seams=(ASYNC, SYNC))
    program = (
        "import areal, subprocess, sys; subprocess.run([sys.executable, '-c', 'import areal'], check=True)"
    )
    _, err = run(python, program, tmp_path, AREAL_FAST="1")
    (line,) = err.splitlines()
    assert line.startswith(f"areal_fast: warning: the AReaL in {tmp_path}/areal has no rollout controller")


def test_disable_beats_the_variable(python: Path, fake: Path) -> None:
    early = f"from areal_fast.integrations import areal; areal.disable()\n{LAUNCH}"
    late = LAUNCH.replace("\nprint", "\nfrom areal_fast.integrations import areal; areal.disable()\nprint")
    for program in (early, late):
        assert run(python, program, fake, AREAL_FAST="1") == (THEIRS, "")


def test_rtensor_gets_the_cheap_ways_in_every_process_that_uses_it(python: Path, fake: Path) -> None:
    folder = fake / "areal" / "infra" / "rpc"
    folder.mkdir(parents=True)
    (folder / "rtensor.py").write_text(RTENSOR)
    program = "from areal.infra.rpc import rtensor as r\n"
    program += "print(type(r.backend).__name__, type(r._fetch_buffer).__name__)"
    assert run(python, program, fake, AREAL_FAST="1") == ("AReaLFastBackend FetchBuffer", "")
    assert run(python, program, fake) == ("NoneType dict", "")
    (folder / "rtensor.py").write_text("")  # one that is otherwise: AReaL goes on, with a line
    _, err = run(python, "import areal.infra.rpc.rtensor", fake, AREAL_FAST="1")
    assert err.startswith("areal_fast: error: areal.infra.rpc.rtensor is left as it is: AttributeError: ")
    assert len(err.splitlines()) == 1


def test_a_broken_installation_is_one_line_and_the_interpreter_goes_on(python: Path, tmp_path: Path) -> None:
    broken = tmp_path / "areal_fast"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('unreadable')")
    out, err = run(python, "print('goes on')", tmp_path, AREAL_FAST="1")
    assert (out, err) == ("goes on", "areal_fast: error: AREAL_FAST is set, but unreadable\n")
