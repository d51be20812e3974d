"""What can go wrong in a request's terms: refusals of the rules, with the texts clients know.

These classes say what happened, never how it is answered: the service maps each to its HTTP status (named
in the docstrings, from the wire page). `str(error)` is the text that stands in `{"detail": …}`; where the
original prints a Python KeyError, its quotes are part of the text. The arena's own refusals (no room, index
busy, log moved) are in `areal_fast.core`.
"""

from __future__ import annotations

from typing import Any


class ArealFastError(Exception):
    """Base of every refusal below."""


class InvalidBody(ArealFastError):
    """422: the body fails validation. `errors` is the list of `{type, loc, msg, input, ctx?}`."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__(errors[0]["msg"] if errors else "invalid body")
        self.errors = errors


class UnreadableBody(ArealFastError):
    """400: the body is no text in which JSON could be looked for, or JSON that no reader can hold."""

    def __init__(self) -> None:
        super().__init__("There was an error parsing the body")


class EmptySessionList(ArealFastError):
    """400: `session_ids` is empty."""

    def __init__(self) -> None:
        super().__init__("session_ids must be a non-empty list")


class KeyBound(ArealFastError):
    """409: the api key belongs to a live session without a ready trajectory."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"API key is already bound to active session {session_id}.")
        self.session_id = session_id


class SessionNotFound(ArealFastError):
    """404."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"Session {session_id} not found")
        self.session_id = session_id


class NoReadyTrajectories(ArealFastError):
    """409; 404 if the request named a trajectory (`named`)."""

    def __init__(self, session_id: str, *, named: bool = False) -> None:
        super().__init__(repr(f"No ready trajectories for session {session_id}"))
        self.named = named


class TrajectoryNotFound(ArealFastError):
    """404: the session has ready trajectories, but not this one."""

    def __init__(self, session_id: str, trajectory_id: int) -> None:
        super().__init__(repr(f"Trajectory {trajectory_id} not found for session {session_id}"))


class NoInteractions(ArealFastError):
    """400: a reward for a session that has nothing active."""

    def __init__(self) -> None:
        super().__init__("No interactions in session")


class InteractionNotFound(ArealFastError):
    """400: a reward for an interaction that is not among the active ones."""

    def __init__(self, interaction_id: str) -> None:
        super().__init__(f"Interaction {interaction_id} not found")


class ExportBusy(ArealFastError):
    """A live export holds the trajectory: wait a little and ask again. Not an answer to a client."""


class ShardRejected(ArealFastError):
    """400: the body is no tensor or array, or lies about its shape, dtype or data."""


class KeeperAway(ArealFastError):
    """503: the shard is on a GPU, and its keeper does not answer or cannot copy it. str() says why."""


class ShardsNotFound(ArealFastError):
    """400 of a batch: `shard_ids` are those that are missing, in request order."""

    def __init__(self, shard_ids: list[str]) -> None:
        super().__init__("One or more requested shards were not found")
        self.shard_ids = shard_ids
