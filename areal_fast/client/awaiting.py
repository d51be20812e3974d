"""The client for asyncio. What its calls do is in calls.py; here steps are carried out on an event loop.

It speaks through the project's own HTTP client: large bodies are read by the kernel into the memory that
tensors will lie in. An `AsyncClient` belongs to the loop that uses it; used in another (asyncio.run a second
time), it starts anew with connections of that loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, Self, TypeVar

from areal_fast import http
from areal_fast.client.calls import Calls, Form, Reward, Style
from areal_fast.client.chat import awaiting_chat
from areal_fast.client.errors import ClientError, TimedOut, Unreachable
from areal_fast.client.fetching import Fetcher
from areal_fast.client.references import Reference, Trajectory
from areal_fast.client.shards import WAYS, Shard, Way
from areal_fast.client.steps import (
    RETRIES,
    Answer,
    Ask,
    Observer,
    Request,
    Steps,
    Together,
    Wait,
)

if TYPE_CHECKING:
    from types import TracebackType

    import openai

T = TypeVar("T")


class AsyncSession:
    """As Session, to be awaited."""

    def __init__(self, client: AsyncClient, session_id: str, api_key: str, group_id: str = "") -> None:
        self._client = client
        self._chats: list[openai.AsyncOpenAI] = []
        self.id = session_id
        self.api_key = api_key
        self.group_id = group_id

    def __repr__(self) -> str:
        return f"<AsyncSession {self.id}>"

    def openai(self, **options: Any) -> openai.AsyncOpenAI:
        """As Session.openai, for asyncio."""
        chat = awaiting_chat(self._client.url, self.api_key, options)
        self._chats.append(chat)
        return chat

    async def set_reward(self, reward: float, interaction_id: str | None = None) -> Reward:
        """As Session.set_reward."""
        calls = self._client._calls
        return await self._client._run(calls.set_reward(self.api_key, reward, interaction_id))

    async def close(self) -> None:
        while self._chats:
            await self._chats.pop().close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncClient:
    """As Client, with every call to be awaited: `async with AsyncClient(…) as client`."""

    def __init__(
        self,
        base_url: str | None,
        admin_api_key: str | None = None,
        *,
        timeout_s: float = 60.0,
        retries: int = RETRIES,
        ways: Sequence[Way] = WAYS,
        observe: Observer | None = None,
    ) -> None:
        self.url = (base_url or "").rstrip("/")
        if base_url is not None:
            http.parse_base_url(self.url)
        self._timeout_s = timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._nodes: dict[str, http.Client] = {}
        fetcher = Fetcher(self.url, admin_api_key, retries, ways, timeout_s)
        self._observe = observe
        self._calls = Calls(self.url, admin_api_key, retries, fetcher)

    @property
    def ways(self) -> dict[Way, int]:
        """How many shards have come or gone which way so far."""
        return dict(self._calls.fetcher.counts)

    # -- sessions ------------------------------------------------------------------------------------------
    async def start_session(self, task_id: str, *, api_key: str | None = None) -> AsyncSession:
        """As Client.start_session."""
        return (await self.start_group(task_id, 1, api_key=api_key))[0]

    async def start_group(
        self, task_id: str, group_size: int, *, api_key: str | None = None
    ) -> list[AsyncSession]:
        """As Client.start_group."""
        started = await self._run(self._calls.start(task_id, api_key, group_size))
        return [
            AsyncSession(self, one.session_id, one.session_api_key, started.group_id)
            for one in started.members()
        ]

    def session(self, session_id: str, api_key: str) -> AsyncSession:
        """A session that somebody else has started. Asks nobody."""
        return AsyncSession(self, session_id, api_key)

    async def export(
        self,
        sessions: str | AsyncSession | Sequence[str | AsyncSession],
        *,
        form: Form = "batch",
        style: Style = "individual",
        discount: float = 1.0,
        trajectory_id: int | None = None,
        group_id: str | None = None,
        remove_session: bool = True,
        fetch: bool = True,
        delete: bool = True,
    ) -> Trajectory:
        """As Client.export."""
        several = [sessions] if isinstance(sessions, str | AsyncSession) else sessions
        export = self._calls.export(
            [one if isinstance(one, str) else one.id for one in several],
            form=form,
            style=style,
            discount=discount,
            trajectory_id=trajectory_id,
            group_id=group_id,
            remove_session=remove_session,
        )
        return await self._run(self._calls.export_tensors(export, delete=delete) if fetch else export)

    # -- shards --------------------------------------------------------------------------------------------
    async def get(self, shard: str | Reference, *, hold: bool = False) -> Shard:
        """As Client.get."""
        return (await self.get_many([shard], hold=hold))[0]

    async def get_many(self, shards: Sequence[str | Reference], *, hold: bool = False) -> list[Shard]:
        """As Client.get_many."""
        return await self._run(self._calls.get_many(shards, hold=hold))

    async def put(self, value: Any, shard_id: str | None = None) -> Reference:
        """As Client.put."""
        return await self._run(self._calls.put(value, shard_id))

    async def delete(self, shards: Sequence[str | Reference]) -> int:
        """As Client.delete."""
        return await self._run(self._calls.delete(shards))

    # -- the proxy -----------------------------------------------------------------------------------------
    async def health(self) -> dict[str, Any]:
        return await self._run(self._calls.health())

    async def get_version(self) -> int:
        """As Client.get_version."""
        return await self._run(self._calls.get_version())

    async def set_version(self, version: int) -> None:
        """As Client.set_version."""
        await self._run(self._calls.set_version(version))

    async def pause(self) -> None:
        """As Client.pause."""
        await self._run(self._calls.pause())

    async def resume(self) -> None:
        await self._run(self._calls.resume())

    async def close(self) -> None:
        self._calls.fetcher.close()
        nodes, self._nodes = self._nodes, {}
        if self._loop is asyncio.get_running_loop():
            for node in nodes.values():
                node.close()
            await asyncio.sleep(0)  # transports tell of their end on the loop's next turn

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- steps ---------------------------------------------------------------------------------------------
    async def _run(self, call: Steps[T]) -> T:
        try:
            step = next(call)
            while True:
                try:
                    result = await self._do(step)
                except Exception as error:
                    step = call.throw(error)
                else:
                    step = call.send(result)
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            call.close()  # a cancelled task must not leave a call half way

    async def _do(self, step: Any) -> Any:
        if isinstance(step, Ask):
            return await self._observed(step)
        if isinstance(step, Wait):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, Together):
            results = await asyncio.gather(*(self._run(call) for call in step.calls), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            return results
        return step.call() if step.brief else await asyncio.to_thread(step.call)

    async def _observed(self, ask: Ask) -> Answer:
        began = time.monotonic()
        error: ClientError | None = None
        try:
            return await self._send(ask)
        except ClientError as caught:
            error = caught
            raise
        finally:
            if self._observe is not None:
                self._observe(Request(ask.method, ask.path, began, time.monotonic(), error))

    async def _send(self, ask: Ask) -> Answer:
        headers = [(name.lower().encode(), value.encode()) for name, value in ask.headers]
        try:
            reply = await self._node(ask.url).request(
                ask.method, ask.path, b"".join(ask.body), timeout_s=self._timeout_s, headers=headers
            )
        except http.ConnectFailed as error:
            raise Unreachable(ask.what, str(error), sent=False) from error
        except http.Timeout:
            raise TimedOut(ask.what, self._timeout_s) from None
        except http.BrokenReply as error:
            raise Unreachable(ask.what, str(error), sent=True) from error
        named = {name.decode("latin-1"): value.decode("latin-1") for name, value in reply.headers}
        # CPython lets the only owner of bytes write them through a BytesIO; for any other it copies them.
        holder = BytesIO(reply.body)
        reply.body = b""
        return Answer(reply.status, named, holder.getbuffer())

    def _node(self, url: str) -> http.Client:
        """The connections to one server, of the running loop."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._nodes = loop, {}
        found = self._nodes.get(url)
        if found is None:
            # what may be repeated is known to the calls, not to the HTTP layer
            found = self._nodes[url] = http.Client(url, retry_stale=False)
        return found
