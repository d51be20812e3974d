"""Agents that speak something else than OpenAI chat: Anthropic's messages, OpenAI's responses, model lists.

Each request is translated to a chat (protocol/anthropic.py, protocol/responses.py) and served as that chat:
same template, budgets, recording, retries and external models. The key may be a bearer token or, as
Anthropic's client sends it, x-api-key. What is refused before a chat begins is refused in the API's own
form; unknown paths and methods are not (routes.py).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

from areal_fast.engine.tokenizer import TemplateFailed
from areal_fast.protocol import anthropic, responses
from areal_fast.protocol.chat import BadChat
from areal_fast.protocol.completions import Completion, Teller
from areal_fast.service.answers import NO_ENGINE, respond_json
from areal_fast.service.translated import Language, Translated

if TYPE_CHECKING:
    from areal_fast.http import Exchange
    from areal_fast.service.chat import Chats
    from areal_fast.service.external import Externals

Handler = Callable[["Exchange"], Awaitable[None] | None]


class _Anthropic:
    """The Language of one Messages request."""

    def __init__(self, asked: anthropic.Asked) -> None:
        self._asked = asked

    def whole(self, completion: Completion) -> bytes:
        return anthropic.reply(completion, self._asked)

    def stream(self) -> Teller:
        return anthropic.Events(self._asked)

    def refusal(self, status: int, message: str) -> bytes:
        return anthropic.error(status, message)


class _Responses:
    """The Language of one Responses request."""

    def __init__(self, asked: responses.Asked, created: int) -> None:
        self._asked = asked
        self._created = created

    def whole(self, completion: Completion) -> bytes:
        return responses.reply(completion, self._asked, self._created)

    def stream(self) -> Teller:
        return responses.Events(self._asked, self._created)

    def refusal(self, status: int, message: str) -> bytes:
        return responses.error(status, message)


class AgentApis:
    """Handlers of the agent APIs beside OpenAI chat. `model`: what the engine's model is called in lists;
    empty if there is no engine."""

    def __init__(self, chats: Chats, externals: Externals, model: str, started_s: float) -> None:
        self._chats = chats
        self._externals = externals
        self._model = model
        self._started_s = started_s

    def table(self) -> dict[str, dict[str, Handler]]:
        """For Routes."""
        return {
            "/v1/models": {"GET": self.models},
            "/models": {"GET": self.models},
            "/v1/models/": {"GET": self.model},
            "/models/": {"GET": self.model},
            "/v1/messages": {"POST": self.messages},
            "/v1/messages/count_tokens": {"POST": self.count_tokens},
            "/v1/responses": {"POST": self.responses},
            "/responses": {"POST": self.responses},
        }

    def messages(self, exchange: Exchange) -> Awaitable[None] | None:
        try:
            asked = anthropic.chat_of(exchange.body)
        except BadChat as error:
            exchange.respond(400, anthropic.error(400, str(error)))
            return None
        return self._chat(exchange, asked.chat, _Anthropic(asked))

    async def count_tokens(self, exchange: Exchange) -> None:
        """The size of the prompt that a Messages request would be, by the engine's tokenizer."""
        try:
            count = await self._chats.prompt_tokens(anthropic.chat_to_count(exchange.body))
        except (BadChat, TemplateFailed) as error:
            exchange.respond(400, anthropic.error(400, str(error)))
            return
        if count is None:
            exchange.respond(503, anthropic.error(503, NO_ENGINE))
        else:
            respond_json(exchange, {"input_tokens": count})

    def responses(self, exchange: Exchange) -> Awaitable[None] | None:
        try:
            asked = responses.chat_of(exchange.body)
        except BadChat as error:
            exchange.respond(400, responses.error(400, str(error)))
            return None
        return self._chat(exchange, asked.chat, _Responses(asked, int(time.time())))

    def _chat(self, exchange: Exchange, chat: bytes, language: Language) -> Awaitable[None] | None:
        return self._chats.serve(cast("Exchange", Translated(exchange, chat, language)))

    def models(self, exchange: Exchange) -> None:
        """The engine's model and the external ones, in OpenAI's form, or in Anthropic's for its client."""
        names = self._names()
        found: dict[str, Any] = {"data": [self._described(exchange, name) for name in names]}
        if _is_anthropic(exchange):
            found["has_more"] = False
            found["first_id"], found["last_id"] = (names[0], names[-1]) if names else (None, None)
        else:
            found["object"] = "list"
        respond_json(exchange, found)

    def model(self, exchange: Exchange) -> None:
        """One of them; 404 in the API's own form if there is none of that name (which may hold slashes)."""
        name = exchange.path.partition("/models/")[2]
        if name in self._names():
            respond_json(exchange, self._described(exchange, name))
            return
        language = anthropic if _is_anthropic(exchange) else responses
        exchange.respond(404, language.error(404, f"The model {name!r} does not exist"))

    def _names(self) -> list[str]:
        return [*filter(None, [self._model]), *self._externals.names]

    def _described(self, exchange: Exchange, name: str) -> dict[str, Any]:
        if _is_anthropic(exchange):
            since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started_s))
            return {"type": "model", "id": name, "display_name": name, "created_at": since}
        created = int(self._started_s)
        return {"id": name, "object": "model", "created": created, "owned_by": "areal_fast"}


def _is_anthropic(exchange: Exchange) -> bool:
    return exchange.headers.get(b"anthropic-version") is not None
