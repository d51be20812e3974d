"""Telling the callback server that a trajectory is ready: POST {address}/callback/online_ready.

Each trajectory has a task of its own, so a receiver that is slow with one delays no other: 100 ms after it
became ready, if it has not been exported meanwhile, it is posted, again with back-off until an answer below
400 comes, or until it is exported, removed or dumped. Which worker does it, and that it is remembered, is the
store's (store/callbacks.py); once a second each worker looks for what a dead one left, and fires deadlines
of rewards that a dead one had set.

Between posts nothing is pinned: a session that is only waiting to be told of goes stale like any other.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

import aiohttp
import msgspec

from areal_fast.core import ArenaFull, CoreError
from areal_fast.store import callbacks

if TYPE_CHECKING:
    from areal_fast.service.log import Log
    from areal_fast.store import SessionStore
    from areal_fast.store.store import Told

FIRST_AFTER_S: Final = 0.1
FIRST_WAIT_S: Final = 0.1
LONGEST_WAIT_S: Final = 10.0
POST_TIMEOUT_S: Final = 10.0
MAX_CONNECTIONS: Final = 1024
LOOK_S: Final = 1.0
MAX_ANSWER_BYTES: Final = 500


class Callbacks:
    """One worker's deliveries. `start` on the loop; from then on `store` reports what becomes ready."""

    def __init__(self, store: SessionStore, log: Log, address: str, admin_api_key: str) -> None:
        self._store = store
        self._log = log
        self._url = f"{address.rstrip('/')}/callback/online_ready"
        self._headers = {
            "content-type": "application/json",
            "authorization": f"Bearer {admin_api_key}".encode().decode("latin-1"),
        }
        self._client: aiohttp.ClientSession | None = None
        self._tasks: dict[tuple[int, int, int], asyncio.Task[None]] = {}
        self._looking: asyncio.TimerHandle | None = None

    @property
    def open(self) -> int:
        """Trajectories that this worker has still to tell of."""
        return len(self._tasks)

    def start(self) -> None:
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS),
            timeout=aiohttp.ClientTimeout(total=POST_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=True,
        )
        self._store.on_ready = self._begin
        self._look()

    async def close(self) -> None:
        """Stop telling. What is not delivered is left to the others."""
        self._store.on_ready = None
        if self._looking is not None:
            self._looking.cancel()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.close()

    def _look(self) -> None:
        self._looking = asyncio.get_running_loop().call_later(LOOK_S, self._look)
        try:
            for told in callbacks.adopt(self._store):
                self._begin(told)
        except CoreError as error:
            self._log.warning("callbacks_wait", error=repr(error))

    def _begin(self, told: Told) -> None:
        key = (told.slot, told.created_ns, told.trajectory_id)
        if key not in self._tasks:
            task = asyncio.get_running_loop().create_task(self._deliver(told))
            self._tasks[key] = task
            task.add_done_callback(lambda done: self._ended(key, done))

    def _ended(self, key: tuple[int, int, int], task: asyncio.Task[None]) -> None:
        del self._tasks[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._log.error("callback_failed", error=repr(error))  # adopted again at the next look

    async def _deliver(self, told: Told) -> None:
        await asyncio.sleep(FIRST_AFTER_S)
        wait, failures = FIRST_WAIT_S, 0
        while (verdict := callbacks.look(self._store, told)) != "over":
            if verdict == "tell":
                why = await self._post(told)
                if not why:
                    await self._remember(told)
                    return
                failures += 1
                if failures in (1, 10, 100, 1000):
                    self._log.warning(
                        "callback_refused",
                        session=told.session_id,
                        trajectory=told.trajectory_id,
                        tries=failures,
                        why=why,
                    )
            await asyncio.sleep(wait * random.uniform(0.75, 1.0))
            wait = min(wait * 2, LONGEST_WAIT_S)

    async def _remember(self, told: Told) -> None:
        """COMMIT POINT of a delivery. A kill just before it: told once more by the next courier."""
        while True:
            try:
                callbacks.delivered(self._store, told)
                return
            except ArenaFull:
                await asyncio.sleep(LOOK_S)

    async def _post(self, told: Told) -> str:
        """ "" if it was taken, else why not."""
        assert self._client is not None
        body = msgspec.json.encode({"session_id": told.session_id, "trajectory_id": told.trajectory_id})
        try:
            async with self._client.post(
                self._url, data=body, headers=self._headers, allow_redirects=False
            ) as answer:
                if answer.status < 400:
                    return ""
                text = (await answer.content.read(MAX_ANSWER_BYTES)).decode("utf-8", "replace")
                return f"{answer.status} {text}".strip()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return str(error) or type(error).__name__
