"""Schemathesis against a running proxy with two workers: whatever JSON comes, no fault of ours.

    pytest -m openapi                        # alone; short
    OPENAPI_EXAMPLES=2000 SEED=7 pytest -m openapi tests/fuzz       # longer, with another seed

Bodies that fit the served document and bodies that do not, with the admin key, a session's key or none. Every
answer must have a documented status, content type and form; 500 is never documented. Afterwards the same
workers serve, and their log tells of no fault.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.e2e.running import ADMIN, Proxy, wait_until

pytestmark = [pytest.mark.openapi, pytest.mark.timeout(1800)]

EXAMPLES = int(os.environ.get("OPENAPI_EXAMPLES", "25"))
SEED = int(os.environ.get("SEED", "20261123"))
WATCHDOG_S = 60.0
PATIENT = {"/chat/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/responses"}
"""Where a number asks for so many tokens: an engine that writes books is not what is tried here."""
BUDGETS = {"max_tokens", "max_completion_tokens", "max_total_tokens", "max_output_tokens"}
LEFT_OUT = {"/pause_generation"}
"""A chat waits while generation is paused: that is its answer. tests/e2e has it."""


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    print(f"SEED={SEED} OPENAPI_EXAMPLES={EXAMPLES}")
    with Proxy() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def document(proxy: Proxy) -> dict[str, Any]:
    answer = proxy.ask("GET", "/openapi.json")
    assert answer.status == 200
    found: dict[str, Any] = answer.json
    return found


def test_what_it_names_is_served(proxy: Proxy, document: dict[str, Any]) -> None:
    over = proxy.connection()
    for path, operations in document["paths"].items():
        answer = proxy.ask("PATCH", path.replace("{shard_id}", "some").replace("{model}", "m"), over=over)
        assert answer.status == 405, path
        assert {m.upper() for m in operations} <= set(answer.headers["allow"].split(", ")), path
    over.close()


def test_no_body_makes_a_fault_of_ours(proxy: Proxy, document: dict[str, Any]) -> None:
    """Bodies that fit and bodies that do not; each operation has its own seeded run."""
    import requests
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=f"http://127.0.0.1:{proxy.port}")
    conformance = [
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    pids = set(wait_until(proxy.worker_pids, "workers are ready"))
    _, session_key = proxy.start("fuzzed")
    keys = st.sampled_from([ADMIN, ADMIN, session_key, "unknown", None])
    asked = 0

    def fuzz(operation: Any, session: requests.Session) -> None:
        cases = st.one_of(
            operation.as_strategy(generation_mode=GenerationMode.POSITIVE),
            *([operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)] if operation.body else []),
        )

        @seed(SEED)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases, key=keys)
        def one(case: Any, key: str | None) -> None:
            nonlocal asked
            asked += 1
            if isinstance(case.body, dict) and operation.path in PATIENT:
                for name in BUDGETS & case.body.keys():
                    if isinstance(case.body[name], (int, float)):
                        case.body[name] = min(64, case.body[name])
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            response = case.call(session=session, headers=headers, timeout=WATCHDOG_S)
            assert response.status_code != 500, (operation.label, case.body, response.text)
            case.validate_response(response, checks=conformance)

        one()

    with requests.Session() as session:
        for found in schema.get_all_operations():
            operation = found.ok()
            if operation.path not in LEFT_OUT:
                fuzz(operation, session)
    assert asked > 3 * len(document["paths"])
    assert set(proxy.worker_pids()) == pids, "a worker died"
    assert proxy.log(r" fault ") == []
    _, key = proxy.start("afterwards")
    assert proxy.chat(key).status == 200
    assert proxy.reward(key).status == 200
