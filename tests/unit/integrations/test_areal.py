"""The launcher on AReaLs of every known layout, and on some that nobody knows. The released AReaL itself is
driven by tests/e2e/test_areal_controller.py."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_fast.config import UsageError
from areal_fast.integrations import areal
from tests.unit.integrations.fake_areal import ASYNC, EXPERIMENTAL, GENERATIONS, SYNC, V2, write

HOST = ["--host", "10.0.0.1", "--port", "7001"]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No AReaL but the test's, and nothing left of it."""
    monkeypatch.delenv("AREAL_FAST", raising=False)
    monkeypatch.delenv("AREAL_FAST_ARGS", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield
    areal.disable()
    for name in [name for name in sys.modules if name == "areal" or name.startswith("areal.")]:
        del sys.modules[name]


def launched(package: str, owner: str = "RolloutControllerV2") -> dict[str, list[str]]:
    """What the controller has the guard run, by role."""
    module = importlib.import_module(f"{package}.controller.controller")
    found: list[tuple[str, list[str]]] = getattr(module, owner)().initialize()
    return dict(found)


def original(package: str, module: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        f"{package}.{module}",
        "--tokenizer-path",
        "/t",
        "--admin-api-key",
        "k",
        *HOST,
    ]


@pytest.mark.parametrize("loaded", [False, True], ids=["before its import", "after its import"])
@pytest.mark.parametrize("dialect", sorted(GENERATIONS))
def test_the_data_proxy_is_ours_and_nothing_else(tmp_path: Path, dialect: str, loaded: bool) -> None:
    layout: dict[str, Any] = GENERATIONS[dialect]
    write(tmp_path, **layout)
    if loaded:
        importlib.import_module(f"{layout['package']}.controller")
    assert areal.enable(workers=3)
    got = launched(layout["package"])
    assert got["router"] == original(layout["package"], "router")
    ours = ["--drain-seconds", "0.5", "--areal-dialect", dialect, "--workers=3"]
    theirs = ["--tokenizer-path", "/t", "--admin-api-key", "k"]
    assert got["data-proxy"] == [sys.executable, "-m", "areal_fast", *theirs, *ours, *HOST]


@pytest.mark.parametrize("dialect", sorted(GENERATIONS))
def test_disable_undoes_it(tmp_path: Path, dialect: str) -> None:
    layout: dict[str, Any] = GENERATIONS[dialect]
    write(tmp_path, **layout)
    controller = importlib.import_module(f"{layout['package']}.controller.controller").RolloutControllerV2
    before = dict(vars(controller))
    assert areal.enable() and areal.enable()
    assert vars(controller) != before
    areal.disable()
    areal.disable()
    assert dict(vars(controller)) == before
    assert launched(layout["package"])["data-proxy"] == original(layout["package"], "data_proxy")
    assert areal.enable()
    assert "areal_fast" in launched(layout["package"])["data-proxy"]


def test_disabled_before_the_import_nothing_is_patched(tmp_path: Path) -> None:
    write(tmp_path, **GENERATIONS["1.0"])
    areal.enable()
    areal.disable()
    assert launched(EXPERIMENTAL)["data-proxy"] == original(EXPERIMENTAL, "data_proxy")
    assert areal._after not in sys.meta_path


def test_a_wrapper_of_somebody_else_stays_and_ours_below_it_lets_all_pass(tmp_path: Path) -> None:
    write(tmp_path, **GENERATIONS["pr1268"])
    controller = importlib.import_module(f"{EXPERIMENTAL}.controller.controller").RolloutControllerV2
    areal.enable()
    ours, seen = controller._fork_on_guard, []

    def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["role"])
        return ours(self, *args, **kwargs)

    controller._fork_on_guard = theirs
    areal.disable()
    assert launched(EXPERIMENTAL)["data-proxy"] == original(EXPERIMENTAL, "data_proxy")
    assert seen == ["router", "data-proxy"]


def test_a_second_enable_replaces_the_options(tmp_path: Path) -> None:
    write(tmp_path, **GENERATIONS["1.0"])
    areal.enable(workers=3)
    areal.enable(data_auth=True, workers=None, trust_remote_code=False)
    assert launched(EXPERIMENTAL)["data-proxy"][-5:] == ["--data-auth", *HOST]


# -- options -----------------------------------------------------------------------------------------------
def test_the_call_wins_over_the_environment_and_both_over_areal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AREAL_FAST_ARGS", "--workers 2 --stale-session-dump-path '/a b' --areal-dialect v2")
    write(tmp_path, **GENERATIONS["1.0"])
    areal.enable(workers=5)
    argv = launched(EXPERIMENTAL)["data-proxy"]
    from areal_fast import config

    settings, unknown = config.parse(argv[3:], {"AREAL_ALLOW_DEFAULT_ADMIN_KEY": "1"})
    assert (settings.workers, settings.dump_path, settings.areal_dialect) == (5, "/a b", "v2")
    assert (settings.host, settings.port, settings.drain_s, unknown) == ("10.0.0.1", 7001, 0.5, [])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("--workers many", "AREAL_FAST_ARGS: argument --workers: 'many' is not an integer"),
        ("--wrokers 4", "AREAL_FAST_ARGS: the proxy knows no --wrokers 4"),
        ("--port 1", "AREAL_FAST_ARGS: argument --port: AReaL's to choose"),
        ("--backend-addr=http://x", "AREAL_FAST_ARGS: argument --backend-addr: AReaL's to choose"),
        ("--help", "AREAL_FAST_ARGS: argument --help: AReaL's to choose"),
        ("--stale-session-dump-path 'x", "AREAL_FAST_ARGS: No closing quotation"),
        ("serve", "AREAL_FAST_ARGS: the proxy knows no serve"),
    ],
)
def test_a_wrong_option_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    write(tmp_path, **GENERATIONS["1.0"])
    monkeypatch.setenv("AREAL_FAST_ARGS", text)
    with pytest.raises(UsageError) as error:
        areal.enable()
    assert str(error.value) == says
    assert launched(EXPERIMENTAL)["data-proxy"] == original(EXPERIMENTAL, "data_proxy")


def test_a_wrong_keyword_is_named_and_what_was_enabled_stays(tmp_path: Path) -> None:
    write(tmp_path, **GENERATIONS["1.0"])
    areal.enable(workers=2)
    with pytest.raises(UsageError, match=r"enable\(\): the proxy knows no --no-such=1"):
        areal.enable(no_such=1)
    with pytest.raises(UsageError, match=r"enable\(\): argument --workers: at most 24"):
        areal.enable(workers=99)
    assert "--workers=2" in launched(EXPERIMENTAL)["data-proxy"]


# -- what nobody knows -------------------------------------------------------------------------------------
def one_warning(capfd: pytest.CaptureFixture[str]) -> str:
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("areal_fast: warning: ")
    return line


def test_no_areal(capfd: pytest.CaptureFixture[str]) -> None:
    assert not areal.enable()
    assert "AReaL is not installed here" in one_warning(capfd)
    assert areal._after not in sys.meta_path


def test_an_areal_without_the_controller(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, package="areal.somewhere.inference_service", seams=(ASYNC, SYNC))
    assert not areal.enable()
    assert "no rollout controller where areal_fast knows one; AReaL keeps its own" in one_warning(capfd)


CHANGED = {
    "another order": ("(self, role, guard_addr, worker_index, raw_cmd):", "takes (self, role, guard_addr,"),
    "no argv": ("(self, guard_addr, role, worker_index, spec):", "takes (self, guard_addr, role,"),
}


@pytest.mark.parametrize("loaded", [False, True], ids=["before its import", "after its import"])
@pytest.mark.parametrize("case", sorted(CHANGED))
@pytest.mark.parametrize("package", [EXPERIMENTAL, V2])
def test_a_changed_signature(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], package: str, case: str, loaded: bool
) -> None:
    takes, says = CHANGED[case]
    head = "async def _async_fork_on_guard" + takes
    write(tmp_path, package=package, seams=(ASYNC, SYNC))
    file = Path(tmp_path, *package.split("."), "controller", "controller.py")
    file.write_text(
        file.read_text().replace(ASYNC, head).replace("(raw_cmd)", "(locals().get('raw_cmd', ()))")
    )
    if loaded:
        importlib.import_module(f"{package}.controller")
        assert not areal.enable()
    else:
        areal.enable()
    controller = importlib.import_module(f"{package}.controller.controller").RolloutControllerV2
    assert controller._async_fork_on_guard.__code__.co_name == "_async_fork_on_guard"
    assert controller._fork_on_guard.__code__.co_name == "_fork_on_guard"
    assert says in one_warning(capfd)


@pytest.mark.parametrize(
    ("seams", "owner", "says"),
    [
        (
            (SYNC.replace("_fork_on_guard", "_spawn"),),
            "",
            "has neither _async_fork_on_guard nor _fork_on_guard",
        ),
        ((ASYNC, SYNC), "RolloutControllerV3", "no class RolloutControllerV2"),
        ((SYNC.replace("def", "async def", 1),), "", "_fork_on_guard is no plain function"),
        ((ASYNC.replace("async ", ""), SYNC), "", "_async_fork_on_guard is no coroutine function"),
    ],
)
def test_another_class_or_method(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], seams: tuple[str, ...], owner: str, says: str
) -> None:
    write(tmp_path, package=EXPERIMENTAL, seams=seams, owner=owner)
    areal.enable()
    got = launched(EXPERIMENTAL, owner or "RolloutControllerV2")
    assert got["data-proxy"] == original(EXPERIMENTAL, "data_proxy")
    line = one_warning(capfd)
    assert says in line and line.endswith("left as it is")


def test_a_data_proxy_of_another_name_is_left_and_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, package=EXPERIMENTAL, seams=(ASYNC, SYNC), proxy=f"{EXPERIMENTAL}.rollout_proxy")
    areal.enable()
    for _ in range(2):
        assert launched(EXPERIMENTAL)["data-proxy"] == original(EXPERIMENTAL, "rollout_proxy")
    assert "rollout_proxy" in one_warning(capfd)


def test_a_workflow_that_does_not_tell_leaves_the_dialect_to_the_proxy(tmp_path: Path) -> None:
    write(tmp_path, package=EXPERIMENTAL, seams=(ASYNC, SYNC), member="something")
    areal.enable()
    argv = launched(EXPERIMENTAL)["data-proxy"]
    assert argv[argv.index("--areal-dialect") + 1] == "auto"


# -- imports -----------------------------------------------------------------------------------------------
def test_what_is_waited_for_stays_an_ordinary_module(tmp_path: Path) -> None:
    write(tmp_path, **GENERATIONS["1.0"])
    areal.enable()
    module = importlib.import_module(f"{EXPERIMENTAL}.controller.controller")
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert "exec_module" not in vars(module.__spec__.loader)
    again = importlib.reload(module)
    assert again.RolloutControllerV2._async_fork_on_guard.__code__.co_name == "launch_later"


def test_importing_the_integration_imports_neither_areal_nor_anything_heavy() -> None:
    program = (
        "import sys, areal_fast.integrations.areal\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'areal', 'ray', 'torch', 'msgspec'}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=200
    )
    assert run.stdout.strip() == "[]"


def test_a_v2_that_launches_otherwise(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, package=V2, seams=(SYNC,))
    areal.enable()
    assert launched(V2)["data-proxy"] == original(V2, "data_proxy")
    assert "RolloutControllerV2 launches by _fork_on_guard" in one_warning(capfd)
