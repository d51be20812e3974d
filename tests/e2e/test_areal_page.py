"""docs/areal.md: its commands and examples run as they stand, with AReaL 1.0.4 beside; what it quotes is said
somewhere.

Blocks marked `bash` run one after another, then those marked `python` in one process; addresses and folders
are put in the place of the page's.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.running import ADMIN, ROOT, Proxy

sys.path[:0] = [str(ROOT / "tests" / "wire")]

from areal_env import ArealUnavailable, areal_python  # noqa: E402

TEXT = (ROOT / "docs" / "areal.md").read_text()
PLAY = """
import json, sys
names = {}
for number, block in enumerate(json.load(sys.stdin), 1):
    exec(compile(block, f"areal.md, example {number}", "exec"), names)
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def areal() -> Path:
    try:
        return areal_python()
    except ArealUnavailable as why:
        pytest.skip(f"no environment for AReaL 1.0.4: {why}")


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dump of a session."""
    folder = tmp_path_factory.mktemp("stale")
    with Proxy("--stale-session-dump-path", str(folder)) as proxy:
        _, key = proxy.start("moved")
        assert proxy.chat(key).status == 200
        proxy.terminate()
        assert proxy.wait() == 0
    return folder


@pytest.fixture(scope="module")
def environment(areal: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As where both are installed: `python` is AReaL's, and `areal-fast` is there."""
    commands = tmp_path_factory.mktemp("bin")
    for name, command in (("python", f"{areal}"), ("areal-fast", f"{areal} -m areal_fast")):
        (commands / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (commands / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        # Ray would otherwise write a key into the home of whoever runs the tests, and ask who it is
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy() as running:
        yield running


def placed(block: str, proxy: Proxy, dumps: Path) -> str:
    block = block.replace("localhost:8082", f"127.0.0.1:{proxy.port}").replace("/tmp/stale", str(dumps))
    return block.replace("areal-admin-key", ADMIN)


@pytest.mark.areal
@pytest.mark.timeout(600)
def test_its_commands_run(proxy: Proxy, dumps: Path, environment: dict[str, str], tmp_path: Path) -> None:
    commands = blocks("bash")
    assert len(commands) >= 3
    said = ""
    for command in commands:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", placed(command, proxy, dumps)],
            capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        said += done.stdout
    for promised in (
        "areal_fast 0.",
        "areal-fast 0.",
        '"status": "ok"',
        "moved-0",
        "1 of 1 files are as they were written",
    ):
        assert promised in said


@pytest.mark.areal
@pytest.mark.timeout(600)
def test_its_examples_run(proxy: Proxy, dumps: Path, environment: dict[str, str], tmp_path: Path) -> None:
    examples = [placed(block, proxy, dumps) for block in blocks("python")]
    assert len(examples) >= 5
    (given,) = re.findall(r'^AREAL_FAST_ARGS="([^"]*)" AREAL_FAST=1 ', TEXT, re.MULTILINE)
    done = subprocess.run(
        ["python", "-W", "ignore", "-c", PLAY],
        input=json.dumps(examples), capture_output=True, text=True, timeout=500, check=False,
        env=environment | {"AREAL_FAST_ARGS": given}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    for promised in (
        "str tensor([0, 1, 2, 3, 4, 5])",
        "ready",
        "[0]",
        "moved-0-active.json 0.0 torch.Size([1, ",
    ):
        assert promised in done.stdout


def test_what_it_quotes_is_said() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "areal_fast").rglob("*.py"))
    for quoted in (
        "AReaL is not installed here",
        "AReaL keeps its own data proxy",
        "is of no AReaL that areal_fast knows",
        "left as it is",
        "its data proxies are launched as",
        "AREAL_FAST_ARGS",
        "cannot listen on",
        "the port is in use",
        "the default key is refused",
        "flags_ignored",
        "restarting",
        "dumps_still_failing",
        "ProxyFailed",
    ):
        assert quoted in TEXT and quoted in code, quoted


def test_its_options_are_there_with_these_defaults() -> None:
    from areal_fast import config

    settings, unknown = config.parse(["--backend-addr", "", "--admin-api-key", "x"])
    assert not unknown
    section = TEXT.partition("### Options")[2].partition("## What stays")[0]
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| ([^|]*) \|", section, re.MULTILINE))
    assert rows["log_level"] == settings.log_level
    assert float(rows["shard_ttl_seconds"]) == settings.shard_ttl_s
    assert settings.dump_path == "" and rows["stale_session_dump_path"] == "none"
    flags = ["--" + name.replace("_", "-") for name in rows]
    assert len(flags) == 6
    for flag in flags:
        assert f'"{flag}"' in Path(config.__file__).read_text()
