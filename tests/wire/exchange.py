"""Recorded exchanges: reading them, sending one request again, comparing two replies.

A transcript is JSON lines: one `server` line, then `step` lines (a request and the reply the original gave)
and `observation` lines. Ids, keys, ports and times differ from run to run, so a `Names` table maps what the
recording calls a thing to what this run calls it: it grows whenever two replies hold differing values of
one id-like shape in the same place, and every later request and expectation is rewritten with it. A value
that was mapped once must map to the same thing ever after: that is how "the same session", "the same shard"
are checked.

`compare` says how a reply departs from the recording, as sentences with a JSON path; an empty list is a pass.
A reply may hold members the recording lacks only where `extra` allows it.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ID_SHAPES = [
    re.compile(shape)
    for shape in (
        r"chatcmpl-[0-9a-f]{29}",
        r"grp-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
        r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
        r"[A-Za-z0-9_-]{43}",
    )
]
REPLY_TIMEOUT_S = 60.0
MISSING = object()


@dataclass
class Reply:
    """What came back. `broken`: the connection ended before the reply did; `status` 0: nothing came."""

    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    broken: str = ""

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    def json(self) -> Any:
        return json.loads(self.body)

    def __str__(self) -> str:
        broken = f" BROKEN: {self.broken}" if self.broken else ""
        return f"{self.status} {self.body[:600].decode('utf-8', 'replace')}{broken}"


@dataclass
class Step:
    line: int
    name: str
    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    reply: Reply
    engine_saw: list[dict[str, Any]] | None
    hangs_up_after_s: float | None


@dataclass
class Transcript:
    """One file. `observations` by line number, as recorded; `stem` is what the tables call it."""

    stem: str
    flags: list[str]
    backend: str
    dialect: str
    steps: list[Step]
    observations: dict[int, dict[str, Any]]


def _bytes(body: Any) -> bytes:
    if isinstance(body, dict):
        return base64.b64decode(body["base64"])
    return (body or "").encode("utf-8", "surrogatepass")


def load(path: Path) -> Transcript:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps, observations = [], {}
    for number, line in enumerate(lines):
        if line["kind"] == "observation":
            observations[number] = line
        if line["kind"] != "step":
            continue
        asked, came = line["request"], line.get("response") or {}
        reply = Reply(
            came.get("status") or 0,
            [(key, value) for key, value in came.get("headers") or []],
            _bytes(came.get("body")),
            came.get("transport_error", ""),
        )
        headers = [(key, value) for key, value in asked["headers"]]
        steps.append(
            Step(
                number,
                line["name"],
                asked["method"],
                asked["path"],
                headers,
                _bytes(asked.get("body")),
                reply,
                line.get("backend_received"),
                line.get("aborted_by_client_after_s"),
            )
        )
    server = lines[0]
    dialect = server["implementation"].removeprefix("upstream AReaL").strip("- ") or "pr1268"
    return Transcript(path.stem, server["flags"], server["backend_addr"], dialect, steps, observations)


class Names:
    """What the recording calls a thing → what this run calls it. Rewriting is textual; the names are long."""

    def __init__(self, known: dict[str, str]):
        self._known = dict(known)
        self._pattern: re.Pattern[str] | None = None

    def learn(self, recorded: str, actual: str) -> bool:
        """False if `recorded` is known by another name already."""
        if recorded in self._known:
            return self._known[recorded] == actual
        self._known[recorded] = actual
        self._pattern = None
        return True

    def knows(self, recorded: str) -> bool:
        return recorded in self._known

    def rewrite(self, text: str) -> str:
        if self._pattern is None:
            longest_first = sorted(self._known, key=len, reverse=True)
            self._pattern = re.compile("|".join(re.escape(name) for name in longest_first) or r"(?!)")
        return self._pattern.sub(lambda found: self._known[found.group()], text)

    def rewrite_bytes(self, data: bytes) -> bytes:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            return data
        return self.rewrite(text).encode("utf-8")


def send(
    address: str,
    method: str,
    path: str,
    headers: Iterable[tuple[str, str]],
    body: bytes,
    hang_up: threading.Event | None = None,
) -> Reply:
    """One request on a connection of its own, the headers exactly as given but for Host and Content-Length.

    With `hang_up` the reply is not read: the connection is closed once the event is set.
    """
    connection = http.client.HTTPConnection(address, timeout=REPLY_TIMEOUT_S)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    connection.putheader("Host", address)
    sized = method in ("POST", "PUT") or bool(body)
    for key, value in headers:
        if key.lower() == "content-length":
            sized = True
        elif key.lower() != "host":
            connection.putheader(key, value.encode("latin-1"))
    if sized:
        connection.putheader("Content-Length", str(len(body)))
    try:
        connection.endheaders(body)
        if hang_up is not None:
            hang_up.wait(REPLY_TIMEOUT_S)
            return Reply(0, broken="hung up by the client, as planned")
        response = connection.getresponse()
    except (OSError, http.client.HTTPException) as failure:
        return Reply(0, broken=f"{type(failure).__name__}: {failure}")
    finally:
        if hang_up is not None:
            connection.close()
    try:
        data, broken = response.read(), ""
    except http.client.IncompleteRead as failure:
        data, broken = failure.partial, "the reply ended early"
    except OSError as failure:
        data, broken = b"", f"{type(failure).__name__}: {failure}"
    finally:
        connection.close()
    return Reply(response.status, response.getheaders(), data, broken)


def _id_like(recorded: str, actual: str) -> bool:
    return any(shape.fullmatch(recorded) and shape.fullmatch(actual) for shape in ID_SHAPES)


def match(recorded: Any, actual: Any, names: Names, path: str = "$", extra: Iterable[str] = ()) -> list[str]:
    """How `actual` departs from `recorded` (already rewritten). `extra`: paths that may hold unrecorded
    members.
    """
    if isinstance(recorded, dict) and isinstance(actual, dict):
        return _match_objects(recorded, actual, names, path, extra)
    if isinstance(recorded, list) and isinstance(actual, list):
        if len(recorded) != len(actual):
            return [f"{path}: {len(actual)} items instead of {len(recorded)}: {actual!r:.300}"]
        pairs = enumerate(zip(recorded, actual, strict=True))
        return [line for i, (r, a) in pairs for line in match(r, a, names, f"{path}[{i}]", extra)]
    if path.endswith(".created") and isinstance(actual, int) and isinstance(recorded, int):
        return []
    same_type = type(recorded) is type(actual)
    if same_type and recorded == actual:
        return []
    if isinstance(recorded, str) and isinstance(actual, str) and _id_like(recorded, actual):
        return (
            [] if names.learn(recorded, actual) else [f"{path}: {actual} is not the {recorded} seen before"]
        )
    return [f"{path}: {actual!r:.300} instead of {recorded!r:.300}"]


def _match_objects(
    recorded: dict[str, Any], actual: dict[str, Any], names: Names, path: str, extra: Iterable[str]
) -> list[str]:
    found = []
    unseen = [key for key in actual if key not in recorded]
    for key, value in recorded.items():
        if key not in actual and unseen and _id_like(key, unseen[0]):
            found += match(key, unseen[0], names, f"{path}.<key>")
            key = unseen.pop(0)
        if key not in actual:
            found.append(f"{path}.{key}: missing")
        else:
            found += match(value, actual[key], names, f"{path}.{key}", extra)
    if unseen and path not in extra:
        found.append(f"{path}: unrecorded members {unseen}")
    ids = [key for key in actual if any(shape.fullmatch(key) for shape in ID_SHAPES)]
    expected = [names.rewrite(key) for key in recorded if any(shape.fullmatch(key) for shape in ID_SHAPES)]
    if not found and ids != expected:
        found.append(f"{path}: order {ids} instead of {expected}")
    return found


def events(body: bytes) -> list[Any]:
    """The payloads of a server-sent event stream; "[DONE]" stays a string."""
    payloads = []
    for block in body.decode("utf-8").split("\n\n"):
        if block.strip():
            data = "\n".join(line.removeprefix("data: ") for line in block.split("\n"))
            payloads.append(data if data == "[DONE]" else json.loads(data))
    return payloads


def match_streams(recorded: bytes, actual: bytes, names: Names) -> list[str]:
    """Streams are compared by what they add up to: where one chunk ends is the engine's business, not the
    wire's.
    """
    want, got = events(recorded), events(actual)
    if not got or got[-1] != want[-1]:
        return [f"stream ends with {got[-1:]!r:.200} instead of {want[-1]!r}"]
    if len(got) < 3:
        return [f"only {len(got)} events: {actual!r:.300}"]
    found = match(want[0], got[0], names, "$first") + match(want[-2], got[-2], names, "$last")
    said = {
        side: "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks[:-1])
        for side, chunks in (("want", want), ("got", got))
    }
    found += match(said["want"], said["got"], names, "$content")
    if len(want) > 3 and len(got) > 3:
        for number, chunk in enumerate(got[1:-2], 1):
            shape = json.loads(json.dumps(want[1]))
            shape["choices"][0]["delta"]["content"] = chunk["choices"][0]["delta"].get("content")
            found += match(shape, chunk, names, f"$event{number}")
    return found


def compare(recorded: Reply, actual: Reply, names: Names, extra: Iterable[str] = ()) -> list[str]:
    """Status, the headers that mean something, the body: JSON by value, a stream by what it adds up to."""
    if recorded.status != actual.status:
        return [f"status {actual.status} instead of {recorded.status}: {actual}"]
    found = [actual.broken] if actual.broken else []
    want_type, got_type = recorded.header("content-type"), actual.header("content-type")
    if want_type != got_type and (recorded.body or want_type != "text/html; charset=utf-8"):
        found.append(f"content-type {got_type} instead of {want_type}")
    if (allow := recorded.header("allow")) is not None:
        wanted = {method.strip() for method in allow.split(",")}
        offered = {method.strip() for method in (actual.header("allow") or "").split(",")}
        found += (
            [f"allow {sorted(offered)} instead of {sorted(wanted)}"]
            if not offered <= wanted | {"HEAD"}
            else []
        )
    body = names.rewrite_bytes(recorded.body)
    if (want_type or "").startswith("text/event-stream"):
        return found + match_streams(body, actual.body, names)
    try:
        want, got = json.loads(body), json.loads(actual.body)
    except ValueError:
        return found + (
            [] if body == actual.body else [f"body {actual.body!r:.300} instead of {body!r:.300}"]
        )
    return found + match(want, got, names, "$", extra)
