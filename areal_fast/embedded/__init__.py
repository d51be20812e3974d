"""An engine and a tokenizer that need no model: for trying, testing and benchmarking areal_fast.

`tokenizer` is the byte tokenizer `builtin:bytes`; `answers` chooses what is answered, `engine` paces it
and makes it fail on request, `server` speaks SGLang's and vLLM's HTTP API in front of it.
Nothing here learns or reasons: an answer is a hash of the prompt turned into
plausible words, with made-up log-probs. Never train on it.

This file imports nothing, so that the tokenizer can be loaded without the HTTP server and the other way
round.
"""
