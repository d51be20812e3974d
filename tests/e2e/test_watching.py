"""The proxy seen from outside, with real processes: /metrics over a worker's death, /admin/sessions."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.running import ADMIN, Proxy, wait_until

Samples = dict[str, float]


def scrape(proxy: Proxy, over: object = None) -> Samples:
    """All samples, by `name{labels}`."""
    answer = proxy.ask("GET", "/metrics", over=over)  # type: ignore[arg-type]
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        sample.name.removeprefix("areal_fast_")
        + "".join(f" {v}" for _, v in sorted(sample.labels.items())): (sample.value)
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


def counters(samples: Samples) -> Samples:
    kept = ("_total", "_bucket", "_count", "_sum")
    return {
        name: value
        for name, value in samples.items()
        if name.split()[0].endswith(kept) and not name.startswith("process_cpu")
    }


def test_any_worker_answers_for_all_and_a_death_resets_nothing() -> None:
    with Proxy(workers=2) as proxy:
        with proxy.each_worker() as workers:
            chats = 0
            for connection in workers.values():
                _, key = proxy.start("t")
                for _ in range(3):
                    assert proxy.chat(key, over=connection).status == 200
                    chats += 1
            wait_until(
                lambda: scrape(proxy)["engine_requests_total"] == chats,
                "every worker's sums are in the arena",
            )
            for connection in workers.values():
                seen = scrape(proxy, connection)
                assert seen["turns_total"] == chats
                assert seen["requests_total 2xx chat"] == seen["request_seconds_count chat"] == chats
                assert seen["sessions active"] == len(workers)
                assert seen["output_tokens_total"] > 0 and seen["engine_wait_seconds_total"] > 0
                assert (
                    seen["process_up worker-0"]
                    == seen["process_up worker-1"]
                    == seen["process_up engine"]
                    == 1
                )
            before = counters(scrape(proxy))
            proxy.kill(next(iter(workers)))
        after = wait_until(
            lambda: (
                s
                if (s := scrape(proxy))["process_up worker-0"] + s["process_up worker-1"] == 2
                and s["process_restarts_total worker-0"] + s["process_restarts_total worker-1"] == 1
                else None
            ),
            "the worker is back",
        )
        lower = {name: (value, after[name]) for name, value in before.items() if after[name] < value}
        assert lower == {}


def test_cleanup_and_the_list_of_sessions(tmp_path: object) -> None:
    with Proxy(
        "--session-timeout-seconds", "0.3", "--stale-session-cleanup-interval-seconds", "0.1",
        "--stale-session-dump-path", f"{tmp_path}",
    ) as proxy:  # fmt: skip
        assert proxy.ask("GET", "/admin/sessions").status == 401
        with proxy.cleaner_held():
            session_id, key = proxy.start("maze")
            assert proxy.chat(key).status == 200
            rows = proxy.ask("GET", "/admin/sessions?limit=10", key=ADMIN).json["sessions"]
            assert [row["id"] for row in rows] == [session_id]
        seen = wait_until(
            lambda: s if (s := scrape(proxy))["dump_files_total"] else None, "the session is dumped"
        )
        assert seen["sessions_cleaned_total"] == 1 and seen["dump_bytes_total"] > 0
        assert proxy.ask("GET", "/admin/sessions", key=ADMIN).json == {"sessions": [], "cursor": None}


def test_a_session_can_be_followed_in_the_log(tmp_path: object) -> None:
    """At level info every step of a session's life is a line that names it; at the default none is."""
    steps = {
        "followed": ["started", "rewarded", "exported", "expired"],
        "left": ["started", "dumped"],
        "unused": ["started", "expired"],
    }
    for level in ("info", "warning"):
        with Proxy(
            "--session-timeout-seconds", "0.5", "--stale-session-cleanup-interval-seconds", "0.1",
            "--stale-session-dump-path", f"{tmp_path}", log_level=level,
        ) as proxy:  # fmt: skip
            with proxy.cleaner_held():
                keys = {task: proxy.start(task)[1] for task in steps}
                assert proxy.chat(keys["followed"]).status == proxy.chat(keys["left"]).status == 200
                assert proxy.reward(keys["followed"]).status == 200
                assert proxy.export("followed-0").status == 200
            wait_until(lambda: not proxy.health()["sessions"], "every session is gone")
            wait_until(lambda: scrape(proxy)["dump_files_total"], "one of them is dumped")
            for task, events in steps.items():
                if level == "info":
                    assert lines_of(proxy, task, len(events)) == events
                else:
                    assert not proxy.log(rf"\b{task}-0\b")


def lines_of(proxy: Proxy, task: str, n: int) -> list[str]:
    """The events of a task's session in the log, once there are `n`."""
    pattern = rf" INFO \S+ (\w+) .*\b{task}-0\b"
    found = wait_until(lambda: f if len(f := proxy.log(pattern)) >= n else None, f"{task}'s lines")
    return [line.group(1) for line in found]
