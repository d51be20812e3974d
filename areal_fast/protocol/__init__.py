"""The wire's messages and the rules of sessions, as pure code: no I/O, no clock, no arena.

Time is an argument, records come in as bytes and go out as bytes. Everything here can be tested by calling
it.
"""
