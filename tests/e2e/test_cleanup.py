"""Stale sessions become files, whatever happens to the cleaner, the disk and the folder."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import ADMIN, WATCHDOG_S, Answer, Proxy, wait_until


def stale_proxy(dump_path: Path, *flags: str) -> Proxy:
    return Proxy(
        "--session-timeout-seconds", "0.4",
        "--stale-session-cleanup-interval-seconds", "0.1",
        "--stale-session-dump-path", str(dump_path),
        *flags,
    )  # fmt: skip


def dumps(folder: Path) -> dict[str, Any]:
    """File name → content, of the files that have their name."""
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def gone(proxy: Proxy) -> bool:
    return proxy.health()["sessions"] == 0


def failing(proxy: Proxy) -> int:
    return int(proxy.health()["cleanup"].get("failing", 0))


def test_stale_sessions_are_dumped_and_their_keys_forgotten(tmp_path: Path) -> None:
    with stale_proxy(tmp_path) as proxy:
        with proxy.cleaner_held():
            _, ready = proxy.start("ready")
            first = proxy.chat(ready)
            assert proxy.reward(ready, 0.5).status == 200
            _, active = proxy.start("active")
            second = proxy.chat(active)
            proxy.start("empty")
        wait_until(lambda: gone(proxy), "all sessions went stale")
        found = dumps(tmp_path)
        assert sorted(found) == ["active-0-active.json", "ready-0-trajectory-0.json"]
        assert found["ready-0-trajectory-0.json"][first.json["id"]]["reward"] == 0.5
        assert list(found["active-0-active.json"]) == [second.json["id"]]
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
        assert proxy.reward(ready).status == 401
        cleanup = wait_until(
            lambda: (c := proxy.health()["cleanup"])["totals"]["sessions"] == 3 and c, "health says so"
        )
        assert cleanup["totals"]["files"] == 2 and cleanup["failing"] == 0


def test_a_request_in_flight_keeps_its_session(tmp_path: Path) -> None:
    with stale_proxy(tmp_path) as proxy:
        proxy.engine(request_latency_s=3600)
        answers: list[Answer] = []
        with proxy.cleaner_held():
            _, key = proxy.start("slow")
            waiting = threading.Thread(target=lambda: answers.append(proxy.chat(key)), daemon=True)
            waiting.start()
            wait_until(lambda: proxy.engine_stats()["in_flight"] == 1, "the request is in flight")
        _, idle = proxy.start("idle")  # begun later: once this one is stale the other would be
        wait_until(lambda: proxy.health()["sessions"] == 1, "the idle one is gone")
        with proxy.cleaner_held():
            proxy.engine(request_latency_s=0)
            waiting.join(WATCHDOG_S)
            assert [answer.status for answer in answers] == [200]
            assert proxy.reward(key).json["interaction_count"] == 1
            assert proxy.reward(idle).status == 401


def test_a_cleaner_killed_again_and_again_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Each round is a heap of stale sessions and a cleaner killed when the first of them has its file; how
    far it was by then is chance, so there are rounds until it was killed often enough in the middle."""
    acknowledged: dict[str, str] = {}
    kills = 0
    with stale_proxy(tmp_path) as proxy:
        for round_ in range(20):
            pid = proxy.cleaner_pid()
            with proxy.cleaner_held():
                for i in range(15):
                    session_id, key = proxy.start(f"kill-{round_}-{i}")
                    acknowledged[session_id] = proxy.chat(key, "x" * 2000).json["id"]
                wait_until(lambda: all_idle_for(proxy, 0.5), "all are stale")
                before = len(os.listdir(tmp_path))
            until = time.monotonic() + WATCHDOG_S
            while len(os.listdir(tmp_path)) == before:  # no pause: the whole takes milliseconds
                assert time.monotonic() < until, "the cleaner does nothing"
            proxy.kill(pid)
            left = len(acknowledged) - len(dumps(tmp_path))
            kills += left > 0
            wait_until(lambda: len(dumps(tmp_path)) == len(acknowledged), "every session has its file")
            if kills == 3:
                break
        assert kills == 3, "the cleaner was hardly ever killed in the middle"
        assert {name: list(content) for name, content in dumps(tmp_path).items()} == {
            f"{session_id}-active.json": [interaction] for session_id, interaction in acknowledged.items()
        }
        wait_until(
            lambda: len(list(tmp_path.iterdir())) == len(acknowledged), "no temporary file is left behind"
        )


def all_idle_for(proxy: Proxy, seconds: float) -> bool:
    rows = proxy.ask("GET", "/admin/sessions", key=ADMIN).json["sessions"]
    return all(row["idle_s"] > seconds for row in rows)


def test_a_disk_that_takes_only_small_files_stops_only_the_large_session(tmp_path: Path) -> None:
    with stale_proxy(tmp_path) as proxy:
        cleaner = proxy.cleaner_pid()
        _, hard = resource.prlimit(cleaner, resource.RLIMIT_FSIZE)
        resource.prlimit(cleaner, resource.RLIMIT_FSIZE, (16 << 10, hard))
        with proxy.cleaner_held():
            _, large = proxy.start("large")
            kept = proxy.chat(large, "x" * 4000).json["id"]
            for i in range(3):
                _, key = proxy.start(f"small-{i}")
                assert proxy.chat(key, "x").status == 200
        wait_until(lambda: len(dumps(tmp_path)) == 3, "the small ones are dumped")
        status = wait_until(lambda: (c := proxy.health()["cleanup"]).get("failing") and c, "health tells")
        assert [f["session_id"] for f in status["failures"]] == ["large-0"]
        assert "File too large" in status["failures"][0]["reason"]
        assert proxy.logged("WARNING .* dump_failed session=large-0")
        resource.prlimit(cleaner, resource.RLIMIT_FSIZE, (hard, hard))
        wait_until(lambda: len(dumps(tmp_path)) == 4, "the large one is dumped once it can be")
        assert list(dumps(tmp_path)["large-0-active.json"]) == [kept]
        wait_until(lambda: failing(proxy) == 0, "health tells that it is well again")
        assert proxy.logged("dump_recovered session=large-0")


def test_a_folder_that_cannot_be_written_recovers(tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    folder.write_text("a file is no folder")
    with stale_proxy(folder) as proxy:
        ids = {}
        with proxy.cleaner_held():
            for i in range(3):
                session_id, key = proxy.start(f"t{i}")
                ids[f"{session_id}-active.json"] = proxy.chat(key).json["id"]
        wait_until(lambda: failing(proxy) == 3, "health tells of all three")
        assert proxy.health()["sessions"] == 0
        folder.unlink()
        folder.mkdir()
        wait_until(lambda: len(dumps(folder)) == 3, "all are dumped once there is a folder")
        assert {name: next(iter(content)) for name, content in dumps(folder).items()} == ids


def test_the_same_id_stale_twice_and_a_hostile_one(tmp_path: Path) -> None:
    with stale_proxy(tmp_path) as proxy:
        hostile = "../../etc/passwd\n.x" + "y" * 400
        for round_ in range(2):
            with proxy.cleaner_held():
                for task in ("same", hostile):
                    _, key = proxy.start(task)
                    assert proxy.chat(key).status == 200
            wait_until(lambda: gone(proxy), f"round {round_} went stale")
        wait_until(lambda: len(dumps(tmp_path)) + len(list(tmp_path.glob("*.json.*"))) == 4, "four files")
        names = [path.name for path in tmp_path.iterdir()]
        assert all("/" not in name and not name.startswith(".") for name in names)
        assert sum(name.startswith("same-0-active.json") for name in names) == 2


@pytest.mark.parametrize("given", [False, True])
def test_without_a_dump_path(given: bool) -> None:
    """Sessions that hold something are dropped only if the operator chose a timeout."""
    flags = ["--stale-session-cleanup-interval-seconds", "0.1"]
    flags += ["--session-timeout-seconds", "0.4"] if given else []
    with Proxy(*flags) as proxy:
        _, key = proxy.start("t")
        assert proxy.chat(key).status == 200
        if given:
            wait_until(lambda: gone(proxy), "it was dropped")
        else:
            runs = proxy.health()["cleanup"]["totals"]["runs"]
            wait_until(lambda: proxy.health()["cleanup"]["totals"]["runs"] > runs + 3, "some runs")
            assert proxy.reward(key).status == 200


def test_shards_expire() -> None:
    with Proxy("--shard-ttl-seconds", "1") as proxy:
        tensor = {"type": "tensor", "data": "AACAPw==", "shape": [1], "dtype": "torch.float32"}
        assert proxy.ask("PUT", "/data/s", tensor).status == 200
        wait_until(lambda: proxy.ask("GET", "/data/s").status == 404, "it expired")
