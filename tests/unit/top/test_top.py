"""The terminal view: numbers from samples, what is wrong in words, pictures of every size, and a terminal."""

from __future__ import annotations

import http.server
import json
import math
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_fast.service import meters, words
from areal_fast.service.metrics import Metrics, render
from areal_fast.service.words import SharedState
from areal_fast.store import SessionStore
from areal_fast.top import main
from areal_fast.top import view as views
from areal_fast.top.picture import columns, fit, picture, short, spark, text
from areal_fast.top.samples import Sample, Source, Unreachable, address, parse
from areal_fast.top.view import View, amount, duration, quantile, size
from tests.model_arena import ModelArena

ROOT = Path(__file__).resolve().parents[3]
URL = "http://127.0.0.1:8082"
WATCHDOG_S = 90.0


class Proxy:
    """What a proxy would say, made by the code that says it."""

    def __init__(self) -> None:
        self.arena = ModelArena.create(64 << 20)
        self.arena.proc_enter(1)
        self.store = SessionStore(self.arena)
        self.state = SharedState(self.arena)
        ready = {"pid": os.getpid(), "state": "ready", "restarts": 0}
        self.board: dict[str, Any] = {
            "workers": [dict(ready), dict(ready)],
            "cleaner": dict(ready),
            "engine": dict(ready),
            "stuck": [],
            "cleanup": {},
        }
        self.metrics = Metrics(self.arena, self.state, lambda: self.board, 1.0)  # type: ignore[arg-type]

    def text(self) -> bytes:
        return render(self.metrics.families())

    def health(self) -> dict[str, Any]:
        return {"status": "ok", "backend": "http://engine:1", "cleanup": self.board["cleanup"]}

    def sample(self, at: float) -> Sample:
        return Sample(parse(self.text().decode()), self.health(), at)

    def requests(self, route: str, n: int, *, bucket: int = 1, status: int = 0) -> None:
        """status: 0, 1, 2 for 2xx, 4xx, 5xx."""
        first = meters.base(route)
        self.arena.count(first + bucket, n)
        self.arena.count(first + meters.SUM + 1 + status, n)


@pytest.fixture
def proxy() -> Proxy:
    return Proxy()


@pytest.fixture
def view(proxy: Proxy) -> View:
    made = View()
    made.add(proxy.sample(0.0))
    return made


def wrongs(view: View) -> list[str]:
    return [wrong.text for wrong in view.wrong()]


# -- numbers -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("q", "buckets", "expected"),
    [
        (0.5, [], None),
        (0.5, [(1.0, 0.0), (math.inf, 0.0)], None),
        (0.5, [(1.0, 10.0), (2.0, 10.0), (math.inf, 10.0)], 0.5),
        (0.5, [(1.0, 0.0), (2.0, 10.0), (math.inf, 10.0)], 1.5),
        (0.99, [(1.0, 50.0), (2.0, 100.0), (math.inf, 100.0)], 1.98),
        (0.99, [(1.0, 50.0), (2.0, 50.0), (math.inf, 100.0)], math.inf),
    ],
)
def test_quantiles(q: float, buckets: list[tuple[float, float]], expected: float | None) -> None:
    assert quantile(q, buckets) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "-"),
        (0.00085, "850 µs"),
        (0.0123, "12.3 ms"),
        (4.56, "4.56 s"),
        (math.inf, "> 60 s"),
        (3600, "60 min"),
    ],
)
def test_durations(value: float | None, said: str) -> None:
    assert duration(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (0.54, "0.5"),
        (9.96, "10"),
        (123.4, "123"),
        (999.6, "1.0k"),
        (12_345, "12.3k"),
        (2.5e6, "2.5M"),
    ],
)
def test_amounts(value: float, said: str) -> None:
    assert amount(value) == said


def test_numbers_never_grow_too_wide() -> None:
    for exponent in range(-6, 13):
        for digit in (1.0, 4.49, 9.94, 9.96, 9.9999):
            value = digit * 10.0**exponent
            if value < 1e9:
                assert len(amount(value)) <= 6 and len(duration(value)) <= 12
            assert len(size(value)) <= 9


def test_rates_and_quantiles_are_of_the_window(proxy: Proxy) -> None:
    view = View()
    proxy.requests("chat", 1000, bucket=8)  # long ago
    view.add(proxy.sample(0.0))
    for second in range(1, 31):
        proxy.requests("chat", 20, bucket=2)
        proxy.arena.count(meters.TURNS, 20)
        view.add(proxy.sample(float(second)))
    chat = next(route for route in view.routes() if route.name == "chat")
    assert (chat.rate, chat.total) == (20.0, 1600)
    assert chat.p50 == pytest.approx(0.006) and chat.p99 is not None and chat.p99 <= 0.01
    assert view.seconds == views.WINDOW_S
    assert list(view.turns) == [20.0] * 30


def test_one_sample_says_no_rates(view: View, proxy: Proxy) -> None:
    assert view.rate("turns_total") == 0
    assert [route.p50 for route in view.routes()] == [None] * len(meters.ROUTES)
    assert all(process.cpu is None for process in view.processes())
    assert wrongs(view) == []


def test_another_proxy_begins_a_new_row(view: View, proxy: Proxy) -> None:
    proxy.arena.count(words.CLEANUPS, 5)
    view.add(proxy.sample(1.0))
    view.add(Proxy().sample(2.0))
    assert view.seconds == 0 and not view.turns


# -- what is wrong -----------------------------------------------------------------------------------------
def fail_requests(proxy: Proxy) -> None:
    proxy.requests("chat", 37)
    proxy.requests("chat", 3, status=2)


def fail_dumps(proxy: Proxy) -> None:
    failure = {"session_id": "x", "reason": "OSError: No space left on device"}
    proxy.board["cleanup"] = {"failing": 2, "failures": [failure]}


def fill(proxy: Proxy, share: float) -> None:
    stats = proxy.arena.stats()
    usable = stats["granules"] - stats.get("granules_keep", 0)
    proxy.arena.stats = lambda: stats | {"granules_used": int(share * usable)}  # type: ignore[method-assign]


def restart(proxy: Proxy) -> None:
    proxy.board["workers"][1]["restarts"] = 1


WRONG: list[tuple[Callable[[Proxy], object], str, bool]] = [
    (fail_requests, "chat: 3 of the last 40 requests failed (5xx)", True),
    (fail_dumps, "2 sessions cannot be dumped: OSError: No space left on device", True),
    (lambda p: fill(p, 0.93), "the arena is 93% full: at 100 % new turns are answered with 507", True),
    (lambda p: fill(p, 1.01), "the arena is full: new turns are answered with 507", True),
    (restart, "worker-1 died and was started again 0 s ago", True),
    (
        lambda p: p.board["workers"][0].update(state="restarting"),
        "worker-0 is not running, it is being started again",
        True,
    ),
    (lambda p: p.board.update(stuck=[1]), "1 killed process does not die", True),
    (
        lambda p: p.board.update(cleanup={"error": "KeyError: 3"}),
        "the cleaner's last run failed: KeyError: 3",
        True,
    ),
    (
        lambda p: p.board.update(cleanup={"kept_for_want_of_a_dump_path": 1}),
        "1 stale session is kept: there is no dump path",
        False,
    ),
    (lambda p: p.state.mark(True), "generation is paused", False),
    (
        lambda p: [p.arena.count(meters.ENGINE_REQUESTS, 9), p.arena.count(meters.ENGINE_FAILURES, 4)],
        "engine http://engine:1: 4 of the last 9 calls got no answer",
        True,
    ),
    (
        lambda p: [p.arena.count(meters.ENGINE_REQUESTS, 10), p.arena.count(meters.POOL_WAIT_NS, 2 * 10**9)],
        "engine calls wait 200 ms for a connection",
        False,
    ),
]


@pytest.mark.parametrize(("happens", "said", "bad"), WRONG, ids=[said[:40] for _, said, _ in WRONG])
def test_what_is_wrong_is_said(
    view: View, proxy: Proxy, happens: Callable[[Proxy], object], said: str, bad: bool
) -> None:
    happens(proxy)
    view.add(proxy.sample(1.0))
    assert view.wrong() == [(said, bad)]
    style = "bad" if bad else "warn"
    drawn = picture(view, URL, 200, 40, 0.0)
    assert [("● ", style), (said, style)] in drawn
    assert said in short(view, 0.0)


def test_restarts_are_old_news_after_a_while(view: View, proxy: Proxy) -> None:
    restart(proxy)
    view.add(proxy.sample(1.0))
    for second in range(2, 70):
        view.add(proxy.sample(float(second)))
    assert wrongs(view) == []


def test_a_proxy_that_is_gone(view: View) -> None:
    view.lost("no answer from x: Connection refused")
    assert wrongs(view) == ["no answer from x: Connection refused; below is what it last said"]
    gone = View()
    gone.lost("no answer")
    assert "no answer" in text(picture(gone, URL, 80, 24, 0.0)) and "no answer" in short(gone, 0.0)


# -- pictures ----------------------------------------------------------------------------------------------
def everything(proxy: Proxy) -> View:
    """A busy proxy with everything wrong at once, and hostile texts."""
    view = View()
    proxy.board["workers"] = [dict(proxy.board["workers"][0]) for _ in range(24)]
    view.add(proxy.sample(0.0))
    for happens, _, _ in WRONG:
        happens(proxy)
    proxy.board["cleanup"] = {"failing": 1, "failures": [{"reason": "\x1b[2J\n漢字" * 60}], "last_run": 1.0}
    for route in meters.ROUTES:
        proxy.requests(route, 10**6)
    view.add(proxy.sample(1.0))
    return view


@pytest.mark.parametrize("height", [2, 5, 10, 24, 50])
@pytest.mark.parametrize("width", [20, 40, 80, 81, 132, 300])
def test_every_picture_fits(proxy: Proxy, view: View, width: int, height: int) -> None:
    for shown in (view, everything(proxy), View()):
        lines = picture(shown, URL, width, height, 0.0)
        assert len(lines) <= height
        for line in lines:
            assert columns("".join(part for part, _ in line)) <= width
            assert all(c.isprintable() for part, _ in line for c in part)


def test_a_usual_picture_is_whole_at_80_by_24(proxy: Proxy, view: View) -> None:
    proxy.requests("chat", 10)
    view.add(proxy.sample(1.0))
    drawn = text(picture(view, URL, 80, 24, 0.0))
    assert "…" not in drawn and "more" not in drawn
    for said in ("all is well", "sessions", "turns", *meters.ROUTES[1:2], "p99", "engine", "arena", "shards",
                 "cleanup", "worker-0", "worker-1", "cleaner", "running", "weights v0"):  # fmt: skip
        assert said in drawn, said


def test_what_does_not_fit_is_counted(proxy: Proxy) -> None:
    assert "and 3 more" not in text(picture(everything(proxy), URL, 80, 60, 0.0))
    drawn = text(picture(everything(proxy), URL, 80, 30, 0.0))
    assert "more" in drawn.splitlines()[-1]


def test_bars_and_cuts() -> None:
    assert spark([0, 1, 4, 8], 8) == " ▁▄█" and spark([1], 0) == ""
    assert (fit("abcdef", 4), fit("abc", 3), fit("漢字漢", 5), fit("x", 0)) == ("abc…", "abc", "漢字…", "")


# -- asking ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("8082", "http://127.0.0.1:8082"),
        ("host:1", "http://host:1"),
        ("http://host:1/", "http://host:1"),
        ("[::1]:80", "http://[::1]:80"),
        ("https://host/base", "https://host/base"),
    ],
)
def test_addresses(typed: str, url: str) -> None:
    assert address(typed) == url


@pytest.mark.parametrize("typed", ["", "ftp://host", "http://", "host:99999", "host:x"])
def test_no_addresses(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError):
        address(typed)
    with pytest.raises(SystemExit) as ended:
        main([typed])
    assert ended.value.code == 2


def test_parsing_passes_over_what_is_no_sample() -> None:
    found = parse(
        '# HELP x y\n# TYPE x counter\nareal_fast_x{a="b\\"c\\n",d="e"} 1.5\n\nrubbish\nx{ 3\ny NaNa\ny 2\n'
    )
    assert found == {("x", (("a", 'b"c\n'), ("d", "e"))): 1.5, ("y", ()): 2.0}


class Served:
    """A proxy's answers over HTTP; `answer` may be replaced. `asked` counts."""

    def __init__(self, proxy: Proxy) -> None:
        self.asked = 0
        self.connections = 0
        self.answer: Callable[[str], bytes] = lambda path: (
            proxy.text() if path == "/metrics" else json.dumps(proxy.health()).encode()
        )
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                outer.connections += 1

            def do_GET(self) -> None:
                outer.asked += 1
                body = outer.answer(self.path)
                self.send_response(200 if body else 404)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join(WATCHDOG_S)
        self.server.server_close()


@pytest.fixture
def served(proxy: Proxy) -> Iterator[Served]:
    made = Served(proxy)
    yield made
    made.close()


def test_asking_keeps_its_connection(served: Served) -> None:
    source = Source(served.url)
    try:
        assert source.ask().get("sessions", state="active") == 0
        source.ask()
        assert (served.asked, served.connections) == (4, 1)
    finally:
        source.close()


@pytest.mark.parametrize(
    "answer", [b"", b"hello", b'{"a": 1}', b"\xff\xff", b"x 1\n", b"[" * 100_000, b"x" * (5 << 20)]
)
def test_a_stranger_is_said_to_be_one(served: Served, answer: bytes) -> None:
    served.answer = lambda path: answer
    source = Source(served.url)
    with pytest.raises(Unreachable):
        source.ask()
    source.close()


def test_once_prints_one_picture(
    served: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("areal_fast.top.terminal.ONCE_S", 0.05)
    assert main([served.url, "--once"]) == 0
    out = capsys.readouterr().out
    assert "all is well" in out and "\x1b" not in out


def test_once_without_a_proxy_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["127.0.0.1:1", "--once"]) == 1
    assert "no answer from http://127.0.0.1:1: Connection refused" in capsys.readouterr().out


def test_without_a_terminal_it_is_lines(served: Served) -> None:
    command = [sys.executable, "-m", "areal_fast", "top", served.url, "--interval", "0.2"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as top:
        assert top.stdout is not None
        lines = [top.stdout.readline() for _ in range(3)]
        top.send_signal(signal.SIGINT)
        assert top.wait(WATCHDOG_S) == 0
    assert all("sessions=0 turns/s=0" in line and "\x1b" not in line for line in lines)


class Terminal:
    """`areal-fast top` in a pseudo terminal. `seen` grows as it is read."""

    def __init__(self, url: str, rows: int = 24, columns: int = 80) -> None:
        self.fd, theirs = pty.openpty()
        self.resize(rows, columns)
        command = [sys.executable, "-m", "areal_fast", "top", url, "--interval", "0.2"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}
        )
        os.close(theirs)
        self.seen = b""

    def resize(self, rows: int, columns: int) -> None:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def until(self, wanted: bytes) -> None:
        deadline = time.monotonic() + WATCHDOG_S
        while wanted not in self.seen:
            assert time.monotonic() < deadline, f"{wanted!r} did not come: {self.seen[-2000:]!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 65536)
                except OSError:  # EIO: the other end is closed
                    assert wanted in self.seen, self.seen[-2000:]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WATCHDOG_S)
        os.close(self.fd)


@pytest.fixture
def terminal(served: Served) -> Iterator[Terminal]:
    made = Terminal(served.url)
    yield made
    made.close()


LEFT = b"\x1b[?25h\x1b[?1049l"


@pytest.mark.parametrize("key", [b"q", b"Q", b"\x04"])
def test_a_key_ends_it_and_the_terminal_is_as_before(terminal: Terminal, key: bytes) -> None:
    terminal.until(b"all is well")
    assert b"\x1b[?1049h" in terminal.seen and LEFT not in terminal.seen
    os.write(terminal.fd, key)
    terminal.until(LEFT)
    assert terminal.process.wait(WATCHDOG_S) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_the_terminal_as_before(terminal: Terminal, number: int) -> None:
    terminal.until(b"all is well")
    terminal.process.send_signal(number)
    terminal.until(LEFT)
    assert terminal.process.wait(WATCHDOG_S) == 0


def test_it_follows_the_size(terminal: Terminal) -> None:
    terminal.until(("─" * 80).encode())
    terminal.resize(30, 120)
    terminal.until(("─" * 120).encode())


def test_it_goes_on_when_the_proxy_does_not(terminal: Terminal, served: Served) -> None:
    terminal.until(b"all is well")
    served.answer = lambda path: b""
    terminal.until(b"it last said")
    assert terminal.process.poll() is None
