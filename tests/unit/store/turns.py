"""What the store's tests say often: a recorded turn, an export, its tensors."""

import base64
import json
from typing import Any

import numpy as np

from areal_fast.protocol.messages import ExportRequest
from areal_fast.store import Export, Session, SessionStore, Turn

NUMPY = {"torch.int64": "<i8", "torch.float32": "<f4", "torch.bool": "?", "torch.int32": "<i4"}


def commit(turn: Turn, prompt: list[int], output: list[int], version: int = 0) -> Turn:
    turn.commit(
        prompt_ids=np.array(prompt, np.int32),
        output_ids=np.array(output, np.int32),
        logprobs=np.array([-0.5 - i for i in range(len(output))], np.float32),
        version_runs=[(version, len(output))],
        stop_reason="stop",
    )
    return turn


def take(session: Session, prompt: list[int], output: list[int], version: int = 0) -> str:
    """One whole turn; its interaction id."""
    turn = session.begin_turn(reserve_tokens=len(prompt) + len(output))
    return commit(turn, prompt, output, version).interaction_id


def started(store: SessionStore, task: str = "t") -> Session:
    """A new session, pinned."""
    session = store.by_key(store.start(task).sessions[0][1])
    assert session is not None
    return session


def lives(store: SessionStore, session_id: str) -> bool:
    """Whether clients still find the session."""
    session = store.by_id(session_id)
    if session is not None:
        session.release()
    return session is not None


def ask(store: SessionStore, *session_ids: str, dialect: str = "pr1268", **more: Any) -> Export:
    if dialect != "pr1268":
        more.setdefault("remove_session", True)
    return store.begin_export(ExportRequest(list(session_ids), dialect=dialect, **more))  # type: ignore[arg-type]


def export(store: SessionStore, *session_ids: str, dialect: str = "pr1268", **more: Any) -> Any:
    """A delivered export's JSON."""
    done = ask(store, *session_ids, dialect=dialect, **more)
    done.delivered()
    return json.loads(done.body)


def fetch(store: SessionStore, reference: Any) -> np.ndarray[Any, Any]:
    """The tensor behind an RTensor, checked against what the reference says of it."""
    shard_id = reference["data"]["shard"]["data"]["shard_id"]
    body = store.shards.get_json(shard_id)
    assert body is not None, shard_id
    tensor = json.loads(body.whole())
    meta = reference["data"]["data"]
    assert (tensor["shape"], tensor["dtype"]) == (meta["shape"], meta["dtype"])
    return decode(tensor)


def decode(tensor: Any) -> np.ndarray[Any, Any]:
    raw = base64.b64decode(tensor["data"])
    return np.frombuffer(raw, NUMPY[tensor["dtype"]]).reshape(tensor["shape"])


def tokens(store: SessionStore, interaction: Any) -> list[int]:
    ids: list[int] = fetch(store, interaction["tensor_dict"]["input_ids"])[0].tolist()
    return ids


class Clock:
    """Monotonic nanoseconds a test moves."""

    def __init__(self) -> None:
        self.ns = 10**15

    def __call__(self) -> int:
        return self.ns

    def forward(self, seconds: float) -> None:
        self.ns += round(seconds * 1e9)
