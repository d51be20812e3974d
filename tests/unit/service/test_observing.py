"""docs/observing.md names every metric there is, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from tests.unit.service.conftest import Service
from tests.unit.service.test_metrics import Watched

PAGE = Path(__file__).resolve().parents[3] / "docs" / "observing.md"


def test_the_page_names_the_metrics(service: Service) -> None:
    page = PAGE.read_text()
    table = page[page.index("| name | labels |") : page.index("Worth an alert")]
    named = set(re.findall(r"`(\w+)`", table)) | {
        f"engine_{rest}" for rest in re.findall(r"`…_(\w+)`", table)
    }
    there = {family.name for family in Watched(service).metrics.families()}
    assert there - named == set()
    assert {name for name in named if name.endswith(("_total", "_bytes", "_seconds"))} <= there


def test_alerts_ask_for_what_is_there(service: Service) -> None:
    there = {f"areal_fast_{name}" for name, _ in Watched(service).scrape()}
    asked = set(re.findall(r"areal_fast_\w+", PAGE.read_text())) - {"areal_fast_"}
    asked -= {"areal_fast_json"}
    assert asked and asked <= there
