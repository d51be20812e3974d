"""The blocking client. What its calls do is in calls.py; here steps are carried out, one after another.

A `Client` may be used by several threads at once, and in a process forked after it was made.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self, TypeVar

from areal_fast.client.calls import Calls, Form, Reward, Style
from areal_fast.client.chat import blocking_chat
from areal_fast.client.connections import Connections
from areal_fast.client.errors import ClientError
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
MOST_THREADS = 16
"""Calls that run at once, one a node."""


class Session:
    """One episode: chat through it, reward it. Closing it ends its connections, not the session."""

    def __init__(self, client: Client, session_id: str, api_key: str, group_id: str = "") -> None:
        self._client = client
        self._chats: list[openai.OpenAI] = []
        self.id = session_id
        self.api_key = api_key
        self.group_id = group_id

    def __repr__(self) -> str:
        return f"<Session {self.id}>"  # its key is a secret

    def openai(self, **options: Any) -> openai.OpenAI:
        """A new `openai` client that chats in this session. options: as openai.OpenAI takes. It repeats
        requests whose connection broke; each repeat carries the same Idempotency-Key, so that no answer is
        recorded twice."""
        chat = blocking_chat(self._client.url, self.api_key, options)
        self._chats.append(chat)
        return chat

    def set_reward(self, reward: float, interaction_id: str | None = None) -> Reward:
        """Reward an interaction, the newest if none is named, and close the trajectory. InvalidRequest (400,
        422): nothing to reward, no such interaction, not a finite number; Unauthorized."""
        calls = self._client._calls
        return self._client._run(calls.set_reward(self.api_key, reward, interaction_id))

    def close(self) -> None:
        while self._chats:
            self._chats.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """A data proxy. base_url: plain http; None: no proxy of one's own, only shards by references that name
    their node. admin_api_key: needed to start sessions, to export, and for shards where the proxy runs with
    --data-auth. timeout_s: of each request as a whole. retries: repeats of what is safe to repeat. ways: how
    shards may travel, of "gpu", "map", "raw", "json"; the cheapest that both ends can do is taken. observe:
    is told of every request, repeats included; must not raise.

    Every call raises Unreachable, TimedOut, BadReply or the ProxyError that the refusal is.
    """

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
        self._connections = Connections(timeout_s)
        if base_url is not None:
            self._connections.check(self.url)
        fetcher = Fetcher(self.url, admin_api_key, retries, ways, timeout_s)
        self._observe = observe
        self._calls = Calls(self.url, admin_api_key, retries, fetcher)

    @property
    def ways(self) -> dict[Way, int]:
        """How many shards have come or gone which way so far."""
        return dict(self._calls.fetcher.counts)

    # -- sessions ------------------------------------------------------------------------------------------
    def start_session(self, task_id: str, *, api_key: str | None = None) -> Session:
        """Start one session. KeyBound (409): the api key belongs to a live one; Unauthorized; ArenaFull."""
        return self.start_group(task_id, 1, api_key=api_key)[0]

    def start_group(self, task_id: str, group_size: int, *, api_key: str | None = None) -> list[Session]:
        """Start `group_size` sessions of one task, all or none. The first takes api_key."""
        started = self._run(self._calls.start(task_id, api_key, group_size))
        return [
            Session(self, one.session_id, one.session_api_key, started.group_id) for one in started.members()
        ]

    def session(self, session_id: str, api_key: str) -> Session:
        """A session that somebody else has started. Asks nobody."""
        return Session(self, session_id, api_key)

    def export(
        self,
        sessions: str | Session | Sequence[str | Session],
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
        """Take the ready trajectory of one session or of several, as torch tensors.

        form: "batch" (AReaL 1.0's): one right-padded batch; sessions that are unknown or not ready are
        skipped, an empty result is false. "interactions" (of one session): each interaction by itself;
        NotFound, or NotReady before the reward. trajectory_id: another than the newest ready one.
        remove_session: also end the sessions. fetch: get the tensors; else only references, to be got later
        or elsewhere (`get_many`). delete: free the shards that were fetched.
        """
        export = self._calls.export(
            _ids(sessions),
            form=form,
            style=style,
            discount=discount,
            trajectory_id=trajectory_id,
            group_id=group_id,
            remove_session=remove_session,
        )
        return self._run(self._calls.export_tensors(export, delete=delete) if fetch else export)

    # -- shards --------------------------------------------------------------------------------------------
    def get(self, shard: str | Reference, *, hold: bool = False) -> Shard:
        """Fetch a shard by id or reference. ShardsNotFound. hold: as get_many."""
        return self.get_many([shard], hold=hold)[0]

    def get_many(self, shards: Sequence[str | Reference], *, hold: bool = False) -> list[Shard]:
        """Fetch shards, in order, from all their nodes at once. ShardsNotFound if any is missing.

        hold: leave a shard on a GPU where it is, and lend it until `Shard.release`, which says whether the
        bytes were the shard's all the time; not to be written. Nothing else changes by it."""
        return self._run(self._calls.get_many(shards, hold=hold))

    def put(self, value: Any, shard_id: str | None = None) -> Reference:
        """Store a torch tensor, a numpy array or a DeviceArray; its id is made up if none is given. Replaces
        another of the same id. The reference says which `way` it went, and `why` not a cheaper one.
        ArenaFull; TypeError for what is none of them."""
        return self._run(self._calls.put(value, shard_id))

    def delete(self, shards: Sequence[str | Reference]) -> int:
        """Delete shards; how many there were."""
        return self._run(self._calls.delete(shards))

    # -- the proxy -----------------------------------------------------------------------------------------
    def health(self) -> dict[str, Any]:
        return self._run(self._calls.health())

    def get_version(self) -> int:
        """The weight version in force."""
        return self._run(self._calls.get_version())

    def set_version(self, version: int) -> None:
        """Put a weight version in force, in every worker before this returns."""
        self._run(self._calls.set_version(version))

    def pause(self) -> None:
        """Pause generation, here and in the engine. EngineFailed; Busy (503): there is no engine."""
        self._run(self._calls.pause())

    def resume(self) -> None:
        self._run(self._calls.resume())

    def close(self) -> None:
        self._calls.fetcher.close()
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- steps ---------------------------------------------------------------------------------------------
    def _run(self, call: Steps[T]) -> T:
        try:
            step = next(call)
            while True:
                try:
                    result = self._do(step)
                except Exception as error:
                    step = call.throw(error)
                else:
                    step = call.send(result)
        except StopIteration as end:
            value: T = end.value
            return value

    def _do(self, step: Any) -> Any:
        if isinstance(step, Ask):
            return self._send(step)
        if isinstance(step, Wait):
            return time.sleep(step.seconds)
        if isinstance(step, Together):
            with ThreadPoolExecutor(min(len(step.calls), MOST_THREADS), "areal_fast-client") as threads:
                running = [threads.submit(self._run, call) for call in step.calls]
            return [one.result() for one in running]
        return step.call()

    def _send(self, ask: Ask) -> Answer:
        began = time.monotonic()
        error: ClientError | None = None
        try:
            return self._connections.send(ask)
        except ClientError as caught:
            error = caught
            raise
        finally:
            if self._observe is not None:
                self._observe(Request(ask.method, ask.path, began, time.monotonic(), error))


def _ids(sessions: str | Session | Sequence[str | Session]) -> list[str]:
    if isinstance(sessions, str | Session):
        sessions = [sessions]
    return [one if isinstance(one, str) else one.id for one in sessions]
