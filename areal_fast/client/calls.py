"""Every call of the client, as steps: what is asked, what may be repeated, what the reply means.

Safe to repeat: what reads; set_version, pause and resume (the same again); a shard's put (the same id, the
same bytes) and delete; a reward (the proxy takes a repeat with nothing new as the same); an export, which the
proxy gives again for 60 s if the first reply did not arrive. Not safe: start_session, which would leave a
second session behind. It is repeated only if nothing was sent. Source: the wire page.

A shard's way. `Fetcher` asks each node once which ways it knows (nodes.py) and takes the cheapest that fits;
what a way cannot serve goes the next one. JSON is the last and fits all.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from areal_fast.client import steps
from areal_fast.client.errors import BadReply
from areal_fast.client.references import Reference, Trajectory, trajectory
from areal_fast.client.steps import JSON, Ask, Steps, ask, bearer, decoded, together

if TYPE_CHECKING:
    from areal_fast.client.fetching import Fetcher
    from areal_fast.client.shards import Shard

T = TypeVar("T")
Form = Literal["batch", "interactions"]
Style = Literal["individual", "concat"]

_encode = msgspec.json.Encoder().encode


class StartedSession(msgspec.Struct, frozen=True):
    session_id: str
    session_api_key: str


class Started(msgspec.Struct, frozen=True):
    """A start's reply. Pull request 1268's original answers with the first two members, 1.0's with the last
    two, areal_fast with both."""

    session_id: str = ""
    api_key: str = ""
    group_id: str = ""
    sessions: tuple[StartedSession, ...] = ()

    def members(self) -> tuple[StartedSession, ...]:
        """BadReply if it names none."""
        if self.sessions:
            return self.sessions
        if not (self.session_id and self.api_key):
            raise BadReply("the reply to a start names no session")
        return (StartedSession(self.session_id, self.api_key),)


class Reward(msgspec.Struct, frozen=True):
    """What a reward did. `trajectory_ready`: it can be exported now; if not, when the proxy's finish time-out
    has passed. `ready_transition`: this call made it so."""

    session_id: str = ""
    interaction_count: int = 0
    trajectory_id: int | None = None
    trajectory_ready: bool = True
    ready_transition: bool = True


class _Version(msgspec.Struct):
    version: int


class _Cleared(msgspec.Struct):
    cleared_count: int


class Calls:
    """Calls to one proxy. url: its base URL, without a slash at the end."""

    def __init__(self, url: str, admin_api_key: str | None, retries: int, fetcher: Fetcher) -> None:
        self.url = url
        self._admin = bearer(admin_api_key)
        self._retries = retries
        self.fetcher = fetcher

    def _json(
        self,
        method: str,
        path: str,
        kind: type[T],
        body: Any = None,
        *,
        key: str | None = None,
        safe: bool = True,
    ) -> Steps[T]:
        headers = self._admin if key is None else bearer(key)
        pieces = () if body is None else (_encode(body),)
        request = Ask(self.url, method, path, pieces, (*headers, *((JSON,) if pieces else ())), safe)
        answer = yield from ask(request, self._retries)
        return decoded(answer, kind, request.what)

    # -- sessions ------------------------------------------------------------------------------------------
    def start(self, task_id: str, api_key: str | None, group_size: int) -> Steps[Started]:
        body: dict[str, Any] = {"task_id": task_id, "group_size": group_size}
        if api_key is not None:
            body["api_key"] = api_key
        return (yield from self._json("POST", "/rl/start_session", Started, body, safe=False))

    def set_reward(self, key: str, reward: float, interaction_id: str | None) -> Steps[Reward]:
        body: dict[str, Any] = {"reward": reward}
        if interaction_id is not None:
            body["interaction_id"] = interaction_id
        return (yield from self._json("POST", "/rl/set_reward", Reward, body, key=key))

    def export(
        self,
        session_ids: list[str],
        *,
        form: Form,
        style: Style,
        discount: float,
        trajectory_id: int | None,
        group_id: str | None,
        remove_session: bool,
    ) -> Steps[Trajectory]:
        """The trajectory with references; nothing fetched yet."""
        if form == "interactions" and len(session_ids) != 1:
            raise ValueError("the form `interactions` is of one session; several make a batch")
        body: dict[str, Any] = {"style": style, "discount": discount, "remove_session": remove_session}
        if trajectory_id is not None:
            body["trajectory_id"] = trajectory_id
        if form == "batch":
            body |= {"session_ids": session_ids, "group_id": group_id}
        else:
            body["session_id"] = session_ids[0]
        reply = yield from self._json("POST", "/export_trajectories", dict, body)
        return trajectory(reply, session_ids)

    def export_tensors(self, export: Steps[Trajectory], *, delete: bool) -> Steps[Trajectory]:
        """The same with its tensors, and its shards deleted if `delete`."""
        found = yield from export
        references = found.all_references()
        if not references:
            return found
        shards = yield from self.fetcher.get_many(references)
        tensors = yield from steps.work(lambda: [shard.tensor for shard in shards], brief=True)
        found.fill(dict(zip(references, tensors, strict=True)))
        for shard in shards:
            found.ways[shard.way] = found.ways.get(shard.way, 0) + 1
        if delete:
            yield from self.delete(references)
        return found

    # -- shards --------------------------------------------------------------------------------------------
    def get_many(self, references: Sequence[str | Reference], *, hold: bool = False) -> Steps[list[Shard]]:
        return (yield from self.fetcher.get_many([as_reference(one) for one in references], hold=hold))

    def put(self, value: Any, shard_id: str | None) -> Steps[Reference]:
        return (yield from self.fetcher.put(self.url, shard_id or str(uuid.uuid4()), value))

    def delete(self, references: Sequence[str | Reference]) -> Steps[int]:
        """How many there were."""
        by_node: dict[str, list[str]] = {}
        for one in map(as_reference, references):
            by_node.setdefault(self.fetcher.url_of(one.node), []).append(one.shard_id)
        calls = [self._delete_at(url, ids) for url, ids in by_node.items()]
        return sum((yield from together(calls))) if calls else 0

    def _delete_at(self, url: str, shard_ids: list[str]) -> Steps[int]:
        body = _encode({"shard_ids": shard_ids})
        request = Ask(url, "DELETE", "/data/clear", (body,), (*self._admin, JSON), safe=True)
        answer = yield from ask(request, self._retries)
        return decoded(answer, _Cleared, request.what).cleared_count

    # -- the proxy -----------------------------------------------------------------------------------------
    def health(self) -> Steps[dict[str, Any]]:
        return (yield from self._json("GET", "/health", dict))

    def get_version(self) -> Steps[int]:
        return (yield from self._json("GET", "/get_version", _Version)).version

    def set_version(self, version: int) -> Steps[None]:
        found = yield from self._json("POST", "/set_version", _Version, {"version": version})
        if found.version != version:
            raise BadReply(f"the proxy says version {found.version} after it was set to {version}")

    def pause(self) -> Steps[None]:
        yield from self._json("POST", "/pause_generation", dict, {})

    def resume(self) -> Steps[None]:
        yield from self._json("POST", "/continue_generation", dict, {})


def as_reference(one: str | Reference) -> Reference:
    return Reference(one) if isinstance(one, str) else one
