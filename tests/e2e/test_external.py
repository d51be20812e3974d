"""External models with several workers: what one is told, all know, those to come included."""

from __future__ import annotations

import json
import os
import signal

from tests.e2e.running import ADMIN, Proxy, wait_until
from tests.unit.service.provider import Provider


def test_every_worker_forwards_and_so_does_a_new_one() -> None:
    with Provider() as provider, Proxy("--backend-addr", "", workers=2) as proxy:
        body = {"name": "ext", "url": provider.url, "model": "m", "api_key": "secret-key"}
        assert proxy.ask("POST", "/register_model", body, key=ADMIN).status == 200
        assert proxy.ask("POST", "/register_model", {**body, "name": "more"}).status == 200
        session_id, key = proxy.start("x")
        with proxy.each_worker() as workers:
            for connection in workers.values():
                for name in ("ext", "more"):
                    assert proxy.chat(key, model=name, over=connection).body == b"{}"
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(set(proxy.worker_pids()) - set(workers)) == 2, "both have successors")
        with proxy.each_worker() as successors:
            for connection in successors.values():
                assert proxy.chat(key, model="more", over=connection).body == b"{}"
        assert len(provider.received) == 6
        assert {json.loads(call.body)["model"] for call in provider.received} == {"m"}
        assert proxy.reward(key).json["interaction_count"] == 6
        assert len(proxy.export(session_id).json["interactions"]) == 6
        assert proxy.chat(key).status == 503
        wait_until(lambda: proxy.log("settings_changed"), "the change is in the log")
        assert not proxy.log("secret-key")
