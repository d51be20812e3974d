"""The served document and the routing table name the same paths and methods; its references hold. Whether
the answers are as it says is for tests/fuzz/test_openapi_fuzz.py."""

from __future__ import annotations

import re

import msgspec

from areal_fast.service import openapi
from tests.unit.service.conftest import Service
from tests.unit.service.fakes import FakeExchange

OF_THE_WORKER = {"/metrics", "/admin/sessions", "/openapi.json", "/data/gpu"}


def test_every_route_is_in_it_with_its_methods_and_no_other(service: Service) -> None:
    told = {path: {m.upper() for m in of} for path, of in openapi.document()["paths"].items()}
    any_shard = told.pop("/data/{shard_id}")
    assert any_shard == set(service.routes._shard)
    below = {re.sub(r"\{\w+\}$", "", path): told.pop(path) for path in [*told] if path.endswith("}")}
    assert below == {path: set(service.routes._below[path]) for path in below} and below
    served = {
        path: set(methods) - (any_shard if path.startswith("/data/") else set())
        for path, methods in service.routes._table.items()
    }
    assert {path: methods for path, methods in told.items() if path not in OF_THE_WORKER} == {
        path: methods for path, methods in served.items() if path not in OF_THE_WORKER
    }
    assert set(told) >= OF_THE_WORKER


def test_its_references_hold_and_nothing_is_told_that_is_never_read() -> None:
    document = openapi.document()
    schemas = document["components"]["schemas"]
    used = set(re.findall(r'"#/components/schemas/(\w+)"', msgspec.json.encode(document).decode()))
    assert used <= set(schemas)
    assert {"StartSession", "SetReward", "ChatRequest"} <= used
    assert not {"images", "vision_messages", "sampled"} & set(schemas["ChatRequest"]["properties"])


def test_it_is_made_once() -> None:
    first, second = FakeExchange("GET", "/openapi.json"), FakeExchange("GET", "/openapi.json")
    openapi.serve(first)  # type: ignore[arg-type]
    openapi.serve(second)  # type: ignore[arg-type]
    assert first.status == 200
    assert openapi._encoded() is openapi._encoded()
    assert first.json == second.json == msgspec.json.decode(openapi._encoded())
