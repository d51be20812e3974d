"""The Grafana board asks for nothing that /metrics does not have, with the labels it has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.service.conftest import Service
from tests.unit.service.test_metrics import Watched

BOARD = Path(__file__).resolve().parents[3] / "grafana" / "areal_fast.json"
SELECTOR = re.compile(r"(areal_fast_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)(!=|=~|=)"([^"]*)"')
FROM_PROMETHEUS = {"instance"}


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(BOARD.read_text())
    return found


def queries(board: dict[str, Any]) -> list[tuple[str, str]]:
    """(panel's title, expression) of all."""
    return [(p["title"], t["expr"]) for p in board["panels"] for t in p.get("targets", ())]


def samples(service: Service) -> dict[str, list[dict[str, str]]]:
    """The labels of every sample, by its name."""
    found: dict[str, list[dict[str, str]]] = {}
    watched = Watched(service)
    for name, labels in watched.scrape():
        found.setdefault(f"areal_fast_{name}", []).append(dict(labels))
    return found


def test_every_query_finds_something(board: dict[str, Any], service: Service) -> None:
    known = samples(service)
    seen = 0
    for title, query in queries(board):
        for name, matchers in SELECTOR.findall(query):
            seen += 1
            assert name in known, f"{title}: there is no {name}"
            wanted = [m for m in MATCHER.findall(matchers) if m[0] not in FROM_PROMETHEUS]
            assert any(
                all(label in row and (row[label] == value) == (how == "=") for label, how, value in wanted)
                for row in known[name]
            ), f"{title}: nothing of {name} has {wanted}"
    assert seen > 40


def test_what_is_grouped_and_shown_by_is_a_label(board: dict[str, Any], service: Service) -> None:
    known = samples(service)
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            names = [name for name, _ in SELECTOR.findall(target["expr"])]
            labels = {label for name in names for row in known[name] for label in row} | FROM_PROMETHEUS
            groups = re.findall(r"(?:by|ignoring) \(([^)]*)\)", target["expr"])
            used = {label.strip() for group in groups for label in group.split(",")}
            used |= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert used <= labels, f"{panel['title']}: {used - labels} is no label of {names}"


def test_counters_are_asked_for_their_growth(board: dict[str, Any]) -> None:
    for title, query in queries(board):
        for found in re.finditer(r"areal_fast_\w+_(?:total|bucket|sum|count)\b", query):
            assert re.search(r"(?:rate|increase)\($", query[: found.start()]), f"{title}: {query}"


def test_every_metric_is_on_the_board(board: dict[str, Any], service: Service) -> None:
    on = {name for _, query in queries(board) for name, _ in SELECTOR.findall(query)}
    left = {re.sub(r"_(?:bucket|sum|count)$", "", name) for name in samples(service)} - {
        re.sub(r"_(?:bucket|sum|count)$", "", name) for name in on
    }
    assert left == {"areal_fast_info", "areal_fast_start_time_seconds"}


def test_panels_lie_side_by_side(board: dict[str, Any]) -> None:
    taken: dict[tuple[int, int], str] = {}
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
