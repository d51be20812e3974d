"""The Python client: sessions, chats, rewards, exports as torch tensors, shards. Blocking and for asyncio.

    from areal_fast.client import Client

    with Client("http://localhost:8082", "areal-admin-key") as client:
        with client.start_session("task") as session:
            chat = session.openai()
            reply = chat.chat.completions.create(model="default", messages=[…])
            session.set_reward(1.0)
        batch = client.export(session)      # batch["input_ids"], batch["logprobs"], …

`steps` says what a call is made of, `calls` what each call does, `fetching` how shards travel; none of them
does I/O. `blocking` and `awaiting` carry steps out and are the public face. `errors` is what can go wrong.
Nothing here imports torch until a tensor is made, nor openai until a chat is.
"""

from areal_fast.client.awaiting import AsyncClient, AsyncSession
from areal_fast.client.blocking import Client, Session
from areal_fast.client.calls import Form, Reward, Style
from areal_fast.client.errors import (
    ArenaFull,
    BadReply,
    Busy,
    ClientError,
    Conflict,
    EngineFailed,
    InvalidRequest,
    KeyBound,
    NotFound,
    NotReady,
    ProxyError,
    ShardsNotFound,
    TimedOut,
    Unauthorized,
    Unreachable,
)
from areal_fast.client.references import Interaction, Reference, Trajectory
from areal_fast.client.shards import HOST_WAYS, WAYS, Shard, Way
from areal_fast.client.steps import Request
from areal_fast.shards.devices import DeviceArray

__all__ = [
    "HOST_WAYS",
    "WAYS",
    "ArenaFull",
    "AsyncClient",
    "AsyncSession",
    "BadReply",
    "Busy",
    "Client",
    "ClientError",
    "Conflict",
    "DeviceArray",
    "EngineFailed",
    "Form",
    "Interaction",
    "InvalidRequest",
    "KeyBound",
    "NotFound",
    "NotReady",
    "ProxyError",
    "Reference",
    "Request",
    "Reward",
    "Session",
    "Shard",
    "ShardsNotFound",
    "Style",
    "TimedOut",
    "Trajectory",
    "Unauthorized",
    "Unreachable",
    "Way",
]
