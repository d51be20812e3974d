"""openai clients for a session: configured, and safe to repeat.

The `openai` client repeats requests whose connection broke. With an Idempotency-Key, the same on every
repeat, the proxy can tell: it answers a chat that it has recorded from its record, and nothing is sampled or
recorded twice. The client has the key but sends it only if told the header's name; so these are subclasses
that tell it. Subclasses, so that the copies that `with_options` makes do it, too.

Their connections are plain HTTP: the TLS context that httpx would make for each client (tens of
milliseconds) trusts nobody here, since nothing uses it. openai is imported when the first client is made.
"""

from __future__ import annotations

import ssl
from functools import cache
from typing import TYPE_CHECKING, Any

from areal_fast.client.errors import ClientError

if TYPE_CHECKING:
    import openai

CHAT_RETRIES = 5


def blocking_chat(url: str, key: str, options: dict[str, Any]) -> openai.OpenAI:
    """A new client for this session key. options: as openai.OpenAI takes."""
    module = _openai()
    options.setdefault("http_client", module.DefaultHttpxClient(verify=_nobody()))
    return _idempotent("OpenAI")(base_url=url, api_key=key, **{"max_retries": CHAT_RETRIES, **options})  # type: ignore[no-any-return]


def awaiting_chat(url: str, key: str, options: dict[str, Any]) -> openai.AsyncOpenAI:
    """The same for asyncio."""
    module = _openai()
    options.setdefault("http_client", module.DefaultAsyncHttpxClient(verify=_nobody()))
    return _idempotent("AsyncOpenAI")(base_url=url, api_key=key, **{"max_retries": CHAT_RETRIES, **options})  # type: ignore[no-any-return]


def _openai() -> Any:
    try:
        import openai
    except ModuleNotFoundError as error:
        if error.name != "openai":
            raise
        raise ClientError("chatting needs the openai client: pip install 'areal-fast[client]'") from None
    return openai


@cache
def _idempotent(name: str) -> Any:
    """The openai class `name`, naming the header."""
    base = getattr(_openai(), name)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        self._idempotency_header = "Idempotency-Key"

    return type(name, (base,), {"__init__": init, "__doc__": base.__doc__})


@cache
def _nobody() -> ssl.SSLContext:
    """A TLS context without a single authority."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
