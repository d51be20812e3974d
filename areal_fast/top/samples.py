"""Asking a proxy how it is: /metrics as numbers, /health as JSON.

One kept connection; whatever goes wrong is `Unreachable` with a reason in plain words. The answer is taken
for what it is, text from somewhere: bounded in size, and lines that are no samples are passed over.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

PREFIX: Final = "areal_fast_"
MAX_ANSWER_BYTES: Final = 4 << 20
TIMEOUT_S: Final = 3.0
_LINE: Final = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Labels = tuple[tuple[str, str], ...]


class Unreachable(Exception):
    """No answer, or none of a proxy. str() is the reason."""


class Sample:
    """Everything that was said at one moment. `at`: monotonic seconds."""

    def __init__(self, values: Mapping[tuple[str, Labels], float], health: dict[str, Any], at: float) -> None:
        self._values = values
        self.health = health
        self.at = at

    def get(self, name: str, **labels: str) -> float:
        """One value; 0 if it is not there."""
        return self._values.get((name, tuple(sorted(labels.items()))), 0.0)

    def by(self, name: str, label: str) -> dict[str, float]:
        """The values of a family by one label, in the answer's order."""
        return {
            dict(labels)[label]: value
            for (found, labels), value in self._values.items()
            if found == name and label in dict(labels)
        }

    def buckets(self, route: str) -> list[tuple[float, float]]:
        """(upper bound in seconds, requests up to it) of a route, ascending."""
        found = [
            (float(dict(labels)["le"]), value)
            for (name, labels), value in self._values.items()
            if name == "request_seconds_bucket" and ("route", route) in labels
        ]
        return sorted(found)


def parse(text: str) -> dict[tuple[str, Labels], float]:
    """Samples of an exposition, by name (without our prefix) and sorted labels."""
    return {(name.removeprefix(PREFIX), labels): value for name, labels, value in _samples(text)}


def _samples(text: str) -> Iterator[tuple[str, Labels, float]]:
    for line in text.splitlines():
        found = None if line.startswith("#") else _LINE.fullmatch(line)
        if found is None:
            continue
        try:
            value = float(found[3])
        except ValueError:
            continue
        labels = tuple(sorted((name, _unescaped(raw)) for name, raw in _LABEL.findall(found[2] or "")))
        yield found[1], labels, value


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: {"n": "\n"}.get(found[1], found[1]), text)


def address(text: str) -> str:
    """What a person may type (8082, host:8082, http://host:8082/) as a base URL. ValueError."""
    text = text.strip()
    if text.isdigit():
        text = f"127.0.0.1:{text}"
    if "://" not in text:
        text = "http://" + text
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(f"not an address of a proxy: {text!r}")
    return text.rstrip("/")


class Source:
    """A proxy to be asked. `ask` again and again."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._parts = urlsplit(url)
        self._connection: http.client.HTTPConnection | None = None

    def ask(self) -> Sample:
        """How it is now. Unreachable."""
        try:
            values = parse(self._get("/metrics").decode("utf-8", "replace"))
            health = json.loads(self._get("/health"))
        except (OSError, http.client.HTTPException) as error:
            self.close()
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Unreachable(f"no answer from {self.url}: {reason}") from None
        except (ValueError, RecursionError):
            self.close()
            raise Unreachable(f"{self.url} answers, but not as this proxy does") from None
        if not values or not isinstance(health, dict) or ("info" not in {name for name, _ in values}):
            raise Unreachable(f"{self.url} answers, but not as this proxy does")
        return Sample(values, health, time.monotonic())

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _get(self, path: str) -> bytes:
        fresh = self._connection is None
        try:
            return self._once(path)
        except (ConnectionError, http.client.BadStatusLine):
            if fresh:
                raise
        self.close()  # a kept connection whose worker is gone; another worker answers
        return self._once(path)

    def _once(self, path: str) -> bytes:
        if self._connection is None:
            secure = self._parts.scheme == "https"
            kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            host = self._parts.hostname or ""
            self._connection = kind(host, self._parts.port or (443 if secure else 80), timeout=TIMEOUT_S)
        self._connection.request("GET", self._parts.path + path)
        reply = self._connection.getresponse()
        body = reply.read(MAX_ANSWER_BYTES + 1)
        if len(body) > MAX_ANSWER_BYTES:
            raise http.client.HTTPException("the answer does not end")
        if reply.status != 200:
            raise http.client.HTTPException(f"{path} is answered with {reply.status}")
        return body
