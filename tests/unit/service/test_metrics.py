"""What is counted, and that the exposition says it in a form that Prometheus' own parser takes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from areal_fast.core import NUM_COUNTERS
from areal_fast.service import meters, metrics, words
from areal_fast.service.meters import Metered, Sums
from areal_fast.service.metrics import Family, Metrics, render
from tests.unit.service.conftest import ADMIN, Service
from tests.unit.service.fakes import FakeExchange, run
from tests.unit.service.provider import Provider
from tests.unit.service.test_external import chat, register

Key = tuple[str, frozenset[tuple[str, str]]]
BOARD = {
    "workers": [
        {"pid": 1, "state": "ready", "restarts": 3},
        {"pid": None, "state": "restarting", "restarts": 1},
    ],
    "cleaner": {"pid": 1, "state": "ready", "restarts": 0},
    "stuck": [77],
    "cleanup": {"failing": 2, "last_run": 12.5, "last_run_s": 0.25, "kept_for_want_of_a_dump_path": 4},
}


def parsed(text: bytes) -> dict[Key, float]:
    """Every sample, by name and labels."""
    return {
        (sample.name.removeprefix("areal_fast_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


class Watched:
    """The service behind a Metered handler, and a scrape of it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.now = 0
        self.took_ns = 1_500_000
        arena = service.store.arena
        self.handler = Metered(service.routes, arena, self._clock)
        self.metrics = Metrics(arena, service.state, lambda: BOARD, 100.0)  # type: ignore[arg-type]

    def _clock(self) -> int:
        self.now += self.took_ns
        return self.now

    def ask(self, method: str, path: str, body: Any = b"", **options: Any) -> FakeExchange:
        exchange = FakeExchange(method, path, body, **options)
        run(self.handler(exchange))  # type: ignore[arg-type]
        return exchange

    def scrape(self) -> dict[Key, float]:
        exchange = FakeExchange("GET", "/metrics")
        self.metrics.serve(exchange)  # type: ignore[arg-type]
        assert exchange.status == 200
        kind = exchange.answer_headers[b"content-type"]
        assert kind == b"text/plain; version=0.0.4; charset=utf-8"
        return parsed(exchange.answer)

    def value(self, name: str, **labels: str) -> float:
        return self.scrape()[name, frozenset(labels.items())]


@pytest.fixture
def watched(service: Service) -> Watched:
    return Watched(service)


def test_requests_are_counted_by_route_and_class(watched: Watched) -> None:
    for method, path, body, key in [
        ("POST", "/rl/start_session", {"task_id": "a"}, ADMIN),
        ("POST", "/rl/start_session", {"task_id": "b"}, ADMIN),
        ("POST", "/rl/start_session", {"task_id": "b"}, "wrong"),
        ("GET", "/health", b"", None),
        ("GET", "/no/such/path", b"", None),
        ("GET", "/data/nothing", b"", None),
        ("POST", "/set_version", {"version": 7}, None),
    ]:
        watched.ask(method, path, body, key=key)
    found = {
        (dict(labels)["route"], dict(labels)["class"]): value
        for (name, labels), value in watched.scrape().items()
        if name == "requests_total" and value
    }
    assert found == {
        ("start_session", "2xx"): 2,
        ("start_session", "4xx"): 1,
        ("other", "2xx"): 1,
        ("other", "4xx"): 1,
        ("data", "4xx"): 1,
        ("control", "2xx"): 1,
    }
    assert watched.value("sessions_started_total") == 2
    assert watched.value("sessions", state="active") == 2
    assert watched.value("weight_version") == 7


@pytest.mark.parametrize(
    ("took_ns", "bucket"),
    [(0, "0.0005"), (500_000, "0.0005"), (500_001, "0.002"), (60 * 10**9, "60"), (61 * 10**9, "+Inf")],
)
def test_a_request_is_in_its_bucket_and_all_above(watched: Watched, took_ns: int, bucket: str) -> None:
    watched.took_ns = took_ns
    watched.ask("GET", "/health")
    samples = watched.scrape()
    bounds = [*map(metrics._number, meters.BOUNDS_S), "+Inf"]
    counts = [samples["request_seconds_bucket", frozenset({("route", "other"), ("le", le)})] for le in bounds]
    at = bounds.index(bucket)
    assert counts == [0.0] * at + [1.0] * (len(bounds) - at)
    assert samples["request_seconds_sum", frozenset({("route", "other")})] == pytest.approx(took_ns / 1e9)
    assert samples["request_seconds_count", frozenset({("route", "other")})] == 1


def test_a_handler_that_raises_is_a_5xx(watched: Watched) -> None:
    async def broken(exchange: Any) -> None:
        raise RuntimeError

    async def call() -> None:
        pending = Metered(broken, watched.service.store.arena)(FakeExchange("GET", "/health"))  # type: ignore[arg-type]
        assert pending is not None
        with pytest.raises(RuntimeError):
            await pending

    asyncio.run(call())
    assert watched.value("requests_total", **{"route": "other", "class": "5xx"}) == 1


def test_a_chat_counts_turn_and_tokens(watched: Watched) -> None:
    _, key = watched.service.start("t")
    message = {"messages": [{"role": "user", "content": "hello"}]}
    watched.ask("POST", "/chat/completions", message, key=key)
    prompt = watched.value("prompt_tokens_total")
    assert (watched.value("turns_total"), watched.value("standalone_chats_total")) == (1, 0)
    assert prompt == len("user:hello\n")
    assert watched.value("output_tokens_total") == len(watched.service.engine.text) + 1
    watched.ask("POST", "/chat/completions", message)
    watched.ask("POST", "/chat/completions", {**message, "store": False}, key=key)
    assert (watched.value("turns_total"), watched.value("standalone_chats_total")) == (1, 2)
    assert watched.value("prompt_tokens_total") == 3 * prompt


def test_a_chat_with_an_external_model_counts(watched: Watched) -> None:
    _, key = watched.service.start("t")
    with Provider() as provider:
        register(watched.service, name="ext", url=provider.url)
        for fields, by in (({}, key), ({"store": False}, key), ({}, None)):
            chat(watched.service, {"model": "ext", "messages": [], **fields}, by)
    assert (watched.value("turns_total"), watched.value("standalone_chats_total")) == (1, 2)


def test_an_export_counts_once_it_is_out(watched: Watched) -> None:
    session_id, key = watched.service.start("t")
    watched.service.chat(key)
    for arrived in (False, True):
        watched.ask("POST", "/rl/set_reward", {"reward": 1}, key=key)
        export = watched.ask("POST", "/export_trajectories", {"session_ids": [session_id]}, key=ADMIN)
        assert watched.value("exports_open") == 1
        export.sent(arrived)
    assert (watched.value("exports_delivered_total"), watched.value("exports_undelivered_total")) == (1, 1)


def test_the_board_is_told(watched: Watched) -> None:
    samples = watched.scrape()

    def of(name: str) -> dict[str, float]:
        return {dict(labels)["role"]: value for (n, labels), value in samples.items() if n == name}

    assert of("process_up") == {"worker-0": 1, "worker-1": 0, "cleaner": 1}
    assert of("process_restarts_total") == {"worker-0": 3, "worker-1": 1, "cleaner": 0}
    assert set(of("process_resident_bytes")) == {"worker-0", "cleaner"}
    plain = {name: value for (name, labels), value in samples.items() if not labels}
    assert (plain["processes_stuck"], plain["dumps_failing"], plain["sessions_kept"]) == (1, 2, 4)
    assert (plain["cleanup_start_time_seconds"], plain["cleanup_run_seconds"]) == (12.5, 0.25)


def test_sums_of_the_http_layers_are_carried_once(watched: Watched) -> None:
    class Stats:
        requests, failed, retries, connects, waited_s, engine_s = 5, 1, 0, 2, 0.5, 2.0

    class Source:
        def __init__(self) -> None:
            self.stats = Stats()
            self.connections = 1
            self.accepted, self.refused = 3, 0

    sums, old, new, server = Sums(watched.service.store.arena), Source(), Source(), Source()
    sums.watch(old)  # type: ignore[arg-type]
    for _ in range(2):
        sums.carry(server)  # type: ignore[arg-type]
    assert watched.value("engine_requests_total") == 5
    assert watched.value("pool_wait_seconds_total") == 0.5
    assert watched.value("engine_wait_seconds_total") == 2.0
    assert watched.value("http_connections_total") == 3
    sums.watch(new)  # type: ignore[arg-type]
    old.stats.requests, server.accepted = 6, 4
    sums.carry(server)  # type: ignore[arg-type]
    assert watched.value("engine_requests_total") == 11, "a replaced engine's last calls count, too"
    old.connections = 0
    sums.carry(server)  # type: ignore[arg-type]
    assert [client for client, _ in sums._clients] == [new]
    assert watched.value("http_connections_total") == 4


def test_escaping_comes_back_through_a_parser() -> None:
    nasty = 'a"b\\c\nd'
    text = render([Family("x", "gauge", "back\\slash\nand line", [("", {"state": nasty}, 1)])])
    assert parsed(text) == {("x", frozenset({("state", nasty)})): 1.0}
    assert next(iter(text_string_to_metric_families(text.decode()))).documentation == "back\\slash\nand line"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (True, "1"), (2**63, "9223372036854775808"), (0.5, "0.5"), (3.0, "3"), (1e300, "1e+300")],
)
def test_numbers(value: float, text: str) -> None:
    assert metrics._number(value) == text


def test_every_family_is_well_named_and_explained(watched: Watched) -> None:
    families = watched.metrics.families()
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    for family in families:
        assert family.help and family.kind in ("counter", "gauge", "histogram")
        assert family.name.endswith("_total") == (family.kind == "counter"), family.name
        assert family.samples, f"{family.name} is missing before anything happened"


def test_labels_are_bounded(watched: Watched) -> None:
    """No client can make the answer longer."""
    before = len(watched.scrape())
    for i in range(50):
        watched.ask("GET", f"/made/up/{i}")
        watched.ask("GET", f"/data/{i}")
        watched.service.start(f"task-{i}")
    assert len(watched.scrape()) == before


def test_no_two_meanings_share_a_counter() -> None:
    shape = ("FIRST", "SIZE", "SUM", "NUM_COUNTERS")
    events = [*words.CLEANUP_COUNTERS.values()]
    events += [
        number
        for name, number in vars(meters).items()
        if name.isupper() and name[0] != "_" and type(number) is int and name not in shape
    ]
    assert len(events) == len(set(events)) and max(events) < meters.FIRST
    assert meters.base(meters.ROUTES[-1]) + meters.SIZE <= NUM_COUNTERS
    assert set(meters.PATHS.values()) <= set(meters.ROUTES)
