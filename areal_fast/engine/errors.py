"""What can go wrong between the proxy and its engine. The service answers each with the status named here."""

from __future__ import annotations


class EngineFault(Exception):
    """Base: the engine did not do what was asked. str() is the detail for the client."""

    status = 502


class EngineUnreachable(EngineFault):
    """No connection to the engine, or it broke before the answer was complete. HTTP 502."""


class EngineTimeout(EngineFault):
    """The engine did not answer within --request-timeout. HTTP 504."""

    status = 504


class EngineError(EngineFault):
    """The engine answered with an error, or with something that is no answer. HTTP 502, with its status and
    text."""
