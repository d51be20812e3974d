"""The embedded engine over HTTP: both dialects, streams, pausing, aborting, and going wrong when told to."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from areal_fast.embedded import tokenizer

from .conftest import WATCHDOG_S, Engine, start_engine


def without_times(reply: Any) -> Any:
    body = reply.json
    for name in ("id", "e2e_latency"):
        body["meta_info"].pop(name)
    return body


# ---- SGLang --------------------------------------------------------------------------------------------


def test_generate_answers_as_sglang_does(engine: Engine) -> None:
    body = engine.generate([5, 6, 7], max_new_tokens=500, stop_token_ids=[256, 258]).json
    meta = body["meta_info"]
    assert body["output_ids"] == [token for _, token, _ in meta["output_token_logprobs"]]
    assert body["text"] == tokenizer.decode(body["output_ids"][:-1])
    assert meta["finish_reason"] == {"type": "stop", "matched": tokenizer.EOS_ID}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (3, len(body["output_ids"]))
    assert meta["weight_version"] and meta["id"]
    assert engine.generate([5, 6, 7], max_new_tokens=4).json["meta_info"]["finish_reason"] == {
        "type": "length",
        "length": 4,
    }
    assert "output_token_logprobs" not in engine.generate(return_logprob=False).json["meta_info"]


def test_the_same_prompt_gets_the_same_answer_however_it_is_written(engine: Engine) -> None:
    first = without_times(engine.generate([104, 105], max_new_tokens=50))
    blanks = engine.call(
        "POST",
        "/generate",
        b'{ "input_ids" : [ 104,\n\t105 ] ,"return_logprob":true,"sampling_params":{"max_new_tokens":50}}',
    )
    assert without_times(blanks) == first
    assert without_times(engine.generate(text="hi", max_new_tokens=50)) == first
    assert without_times(engine.generate([104, 106], max_new_tokens=50)) != first
    assert without_times(engine.generate([104, 105], max_new_tokens=50, sampling_seed=1)) != first
    assert without_times(engine.generate([104, 105], max_new_tokens=50, temperature=0.0)) == first


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_a_stream_tells_the_whole_again_and_again(engine: Engine, chunk_tokens: int) -> None:
    engine.configure(chunk_tokens=chunk_tokens)
    whole = engine.generate(max_new_tokens=70).json
    events = engine.generate(max_new_tokens=70, stream=True).events
    count = whole["meta_info"]["completion_tokens"]
    assert [e["meta_info"]["completion_tokens"] for e in events] == [
        min(n, count) for n in range(chunk_tokens, count + chunk_tokens, chunk_tokens)
    ]
    rows = whole["meta_info"]["output_token_logprobs"]
    for event in events:
        made = event["meta_info"]["completion_tokens"]
        assert event["meta_info"]["output_token_logprobs"] == rows[:made]
        assert event["output_ids"] == whole["output_ids"][:made]
        assert whole["text"].startswith(event["text"])
    assert [e["meta_info"]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
    assert events[-1]["text"] == whole["text"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"input_ids":[]}',
        b'{"input_ids":[[1]]}',
        b'{"input_ids":[1.5]}',
        b'{"input_ids":[-1]}',
        b'{"input_ids":["1"]}',
        b'{"input_ids":{}}',
        b'{"text":""}',
        b'{"text":3}',
        b'{"sampling_params":{}}',
        b'{"input_ids":[1],"sampling_params":{"max_new_tokens":-1}}',
        b'{"input_ids":[1],"sampling_params":[]}',
    ],
)
def test_a_request_that_makes_no_sense_is_400(engine: Engine, body: bytes) -> None:
    reply = engine.call("POST", "/generate", body)
    assert reply.status == 400
    assert reply.json["error"]["message"]


def test_stop_text_and_ignore_eos(engine: Engine) -> None:
    body = engine.generate(max_new_tokens=300, stop=[" the "]).json
    assert body["meta_info"]["finish_reason"] == {"type": "stop", "matched": " the "}
    assert " the " not in body["text"]
    assert bytes(body["output_ids"]).endswith(b" the ")
    body = engine.generate(max_new_tokens=300, ignore_eos=True).json
    assert body["meta_info"]["finish_reason"] == {"type": "length", "length": 300}


def test_routed_experts_have_a_row_for_each_token_but_the_last(engine: Engine) -> None:
    assert "routed_experts" not in engine.generate(return_routed_experts=True).json["meta_info"]
    engine.configure(routed_experts="3x2")
    meta = engine.generate([1] * 10, max_new_tokens=20, return_routed_experts=True).json["meta_info"]
    experts = np.frombuffer(base64.b64decode(meta["routed_experts"]), "<i4")
    assert experts.size == (10 + meta["completion_tokens"] - 1) * 3 * 2
    assert "routed_experts" not in engine.generate().json["meta_info"]


# ---- vLLM ----------------------------------------------------------------------------------------------


def test_completions_say_what_generate_says(engine: Engine) -> None:
    sglang = engine.generate([9, 9], max_new_tokens=400).json
    body = engine.complete([9, 9], max_tokens=400).json
    (choice,) = body["choices"]
    assert choice["text"] == sglang["text"]
    assert choice["finish_reason"] == sglang["meta_info"]["finish_reason"]["type"]
    assert [int(token.split(":")[1]) for token in choice["logprobs"]["tokens"]] == sglang["output_ids"]
    assert choice["logprobs"]["token_logprobs"] == [
        row[0] for row in sglang["meta_info"]["output_token_logprobs"]
    ]
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": len(sglang["output_ids"]),
        "total_tokens": 2 + len(sglang["output_ids"]),
    }
    assert engine.complete([9, 9], max_tokens=400, logprobs=None).json["choices"][0]["logprobs"] is None


def test_a_completion_stream_carries_only_what_is_new(engine: Engine) -> None:
    engine.configure(chunk_tokens=3)
    whole = engine.complete(max_tokens=90).json
    events = engine.complete(max_tokens=90, stream=True, stream_options={"include_usage": True}).events
    assert events.pop()["usage"] == whole["usage"]
    choices = [event["choices"][0] for event in events]
    expected = whole["choices"][0]
    assert "".join(choice["text"] for choice in choices) == expected["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [value for choice in choices for value in choice["logprobs"][name]]
        assert joined == expected["logprobs"][name]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == expected["finish_reason"]


def test_tokens_can_be_text(engine: Engine) -> None:
    choice = engine.complete("hello", max_tokens=300, return_tokens_as_token_ids=False).json["choices"][0]
    assert choice["logprobs"]["tokens"][-1] == "<|im_end|>"
    assert choice["text"].startswith("".join(choice["logprobs"]["tokens"][:3]))


@pytest.mark.parametrize("more", [{"max_tokens": 0}, {"n": 2}, {"prompt": [[1], [2]]}, {"prompt": None}])
def test_a_completion_that_makes_no_sense_is_400(engine: Engine, more: dict[str, Any]) -> None:
    reply = engine.call("POST", "/v1/completions", {"prompt": [1], **more})
    assert (reply.status, reply.json["error"]["type"]) == (400, "BadRequestError")


# ---- pausing, aborting, weights ------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_pausing_aborts_with_the_tokens_so_far(engine: Engine, stream: bool) -> None:
    whole = engine.generate(max_new_tokens=1000, ignore_eos=True).json
    engine.configure(token_latency_s=0.01, chunk_tokens=1)
    running = engine.generate(max_new_tokens=1000, ignore_eos=True, stream=stream, later=True)
    engine.wait(lambda stats: stats["in_flight"] == 1)
    assert engine.call("POST", "/pause_generation", {"mode": "abort"}).status == 200
    reply = running.result(WATCHDOG_S)
    body = reply.events[-1] if stream else reply.json
    made = body["meta_info"]["completion_tokens"]
    assert body["meta_info"]["finish_reason"]["type"] == "abort"
    assert made < 1000
    assert body["output_ids"] == whole["output_ids"][:made]
    assert len(body["meta_info"]["output_token_logprobs"]) == made


def test_while_paused_requests_wait(engine: Engine) -> None:
    engine.call("POST", "/pause_generation", {})
    waiting = [engine.generate(max_new_tokens=5, later=True), engine.complete(max_tokens=5, later=True)]
    assert engine.wait(lambda stats: stats["in_flight"] == 2)["paused"]
    assert not any(reply.done() for reply in waiting)
    engine.call("POST", "/continue_generation", {})
    assert waiting[0].result(WATCHDOG_S).json["meta_info"]["finish_reason"]["type"] == "length"
    assert waiting[1].result(WATCHDOG_S).json["choices"][0]["finish_reason"] == "length"


def test_pausing_in_place_holds_and_goes_on(engine: Engine) -> None:
    whole = engine.generate(max_new_tokens=40, ignore_eos=True).json
    engine.configure(token_latency_s=3600)
    running = engine.generate(max_new_tokens=40, ignore_eos=True, later=True)
    engine.wait(lambda stats: stats["in_flight"] == 1)
    engine.call("POST", "/pause_generation", {"mode": "in_place"})
    engine.configure(token_latency_s=0.0)  # so that it could end at once, were it not held
    second = engine.generate(max_new_tokens=3, later=True)
    assert engine.wait(lambda stats: stats["in_flight"] == 2)["completed"] is not None
    assert not running.done() and not second.done()
    engine.call("POST", "/continue_generation")
    assert running.result(WATCHDOG_S).json["output_ids"] == whole["output_ids"]
    assert second.result(WATCHDOG_S).status == 200


def test_aborting_one_request_leaves_the_others(engine: Engine) -> None:
    engine.configure(request_latency_s=3600)
    one = engine.generate(rid="one", later=True)
    other = engine.generate(rid="two", later=True)
    engine.wait(lambda stats: stats["in_flight"] == 2)
    assert engine.call("POST", "/abort_request", {"rid": "one"}).json["aborted"] == 1
    meta = one.result(WATCHDOG_S).json["meta_info"]
    assert meta["id"] == "one"
    assert meta["finish_reason"]["message"] == "Abort before prefill"
    assert meta["output_token_logprobs"] == []
    assert not other.done()
    assert engine.call("POST", "/abort_request", {"abort_all": True}).json["aborted"] == 1
    assert other.result(WATCHDOG_S).json["meta_info"]["finish_reason"]["type"] == "abort"


def test_vllm_pause_aborts_too(engine: Engine) -> None:
    engine.configure(request_latency_s=3600)
    running = engine.complete(later=True)
    engine.wait(lambda stats: stats["in_flight"] == 1)
    engine.call("POST", "/areal_pause_generation", {})
    choice = running.result(WATCHDOG_S).json["choices"][0]
    assert (choice["finish_reason"], choice["logprobs"]["tokens"]) == ("abort", [])
    engine.call("POST", "/areal_continue_generation", {})
    assert not engine.stats()["paused"]


def test_a_client_that_hangs_up_ends_its_generation(engine: Engine) -> None:
    engine.configure(request_latency_s=3600)
    before = engine.stats()["client_gone"]
    with socket.create_connection(("127.0.0.1", engine.port), timeout=WATCHDOG_S) as sock:
        body = b'{"input_ids":[1]}'
        sock.sendall(
            b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        engine.wait(lambda stats: stats["in_flight"] == 1)
    engine.wait(lambda stats: stats["in_flight"] == 0 and stats["client_gone"] == before + 1)


def test_weight_updates_move_the_version(engine: Engine) -> None:
    old = engine.stats()["weight_version"]
    first = engine.generate(max_new_tokens=30).json
    assert first["meta_info"]["weight_version"] == old
    reply = engine.call("POST", "/update_weights_from_disk", {"model_path": "/models/new"})
    assert reply.json["weight_version"] == str(int(old) + 1)
    second = engine.generate(max_new_tokens=30).json
    assert second["meta_info"]["weight_version"] == str(int(old) + 1)
    assert second["output_ids"] == first["output_ids"]
    engine.configure(vary_with_version=True)
    assert engine.generate(max_new_tokens=30).json["output_ids"] != first["output_ids"]
    engine.call("POST", "/update_weights_from_disk", {"model_path": "m", "weight_version": "77"})
    info = engine.call("GET", "/model_info").json
    assert (info["weight_version"], info["model_path"]) == ("77", "m")


@pytest.mark.parametrize(
    ("sleep", "wake"),
    [
        ("/release_memory_occupation", "/resume_memory_occupation"),
        ("/sleep?level=1", "/wake_up?tags=weights"),
    ],
)
def test_asleep_it_does_not_generate(engine: Engine, sleep: str, wake: str) -> None:
    assert engine.call("POST", sleep).status == 200
    assert engine.generate().status == 503
    assert engine.call("GET", "/is_sleeping").json == {"is_sleeping": True}
    assert engine.call("POST", wake).status == 200
    assert engine.generate().status == 200


# ---- going wrong on purpose ----------------------------------------------------------------------------


def test_every_nth_fails(engine: Engine) -> None:
    engine.configure(fail_every=3, fail_status=503)
    assert [engine.generate().status for _ in range(6)] == [200, 200, 503, 200, 200, 503]
    assert [engine.complete().status for _ in range(3)] == [200, 200, 503]
    engine.configure(fail_every=3)
    assert [engine.generate().status for _ in range(3)] == [200, 200, 500]


@pytest.mark.parametrize("tokens", [0, 5])
def test_every_nth_is_aborted(engine: Engine, tokens: int) -> None:
    engine.configure(abort_every=2, abort_after_tokens=tokens)
    assert engine.generate().json["meta_info"]["finish_reason"]["type"] != "abort"
    meta = engine.generate().json["meta_info"]
    assert (meta["finish_reason"]["type"], meta["completion_tokens"]) == ("abort", tokens)
    assert len(meta["output_token_logprobs"]) == tokens
    assert (meta["finish_reason"]["message"] == "Abort before prefill") == (tokens == 0)
    assert engine.complete().json["choices"][0]["finish_reason"] != "abort"
    assert engine.complete(stream=True).events[-1]["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize("stream", [False, True])
def test_every_nth_connection_breaks(engine: Engine, stream: bool) -> None:
    engine.configure(drop_every=2)
    assert engine.generate(stream=stream).status == 200
    dropped = engine.stats()["dropped"]
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        engine.generate(stream=stream)
    engine.wait(lambda stats: stats["dropped"] == dropped + 1 and stats["in_flight"] == 0)
    assert engine.generate(stream=stream).status == 200


def test_every_nth_hangs(engine: Engine) -> None:
    engine.configure(hang_every=1)
    hung = engine.stats()["hung"]
    with socket.create_connection(("127.0.0.1", engine.port), timeout=WATCHDOG_S) as sock:
        sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        engine.wait(lambda stats: stats["hung"] == hung + 1)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)
    engine.configure()
    assert engine.generate().status == 200


@pytest.mark.parametrize("mode", ["omit", "minus-9999"])
def test_logprobs_can_be_withheld(engine: Engine, mode: str) -> None:
    engine.configure(logprobs=mode)
    meta = engine.generate().json["meta_info"]
    logprobs = engine.complete().json["choices"][0]["logprobs"]
    if mode == "omit":
        assert "output_token_logprobs" not in meta
        assert logprobs is None
    else:
        assert {row[0] for row in meta["output_token_logprobs"]} == {-9999.0}
        assert set(logprobs["token_logprobs"]) == {-9999.0}


def test_length_and_latency(engine: Engine) -> None:
    engine.configure(output_tokens=64, request_latency_s=0.05, token_latency_s=0.001)
    meta = engine.generate(max_new_tokens=100).json["meta_info"]
    assert (meta["completion_tokens"], meta["finish_reason"]["type"]) == (64, "stop")
    assert meta["e2e_latency"] >= 0.05 + 64 * 0.001


@pytest.mark.parametrize("stream", [False, True])
def test_a_latency_that_is_lifted_ends_what_waits_for_it(engine: Engine, stream: bool) -> None:
    engine.configure(request_latency_s=3600)
    waiting = engine.generate(later=True, stream=stream)
    engine.wait(lambda stats: stats["in_flight"] == 1)
    engine.configure()
    assert waiting.result(WATCHDOG_S).status == 200


def test_bodies_are_kept_when_asked(engine: Engine) -> None:
    assert engine.stats()["bodies"] == []
    engine.configure(keep_bodies=2)
    for token in (1, 2, 3):
        engine.generate([token])
    assert [json.loads(kept["body"])["input_ids"] for kept in engine.stats()["bodies"]] == [[2], [3]]
    engine.configure()
    assert engine.stats()["bodies"] == []


@pytest.mark.parametrize(
    "body", [{"no_such_switch": 1}, {"fail_every": -1}, {"logprobs": "x"}, [], {"routed_experts": "2"}]
)
def test_bad_switches_are_refused_and_change_nothing(engine: Engine, body: Any) -> None:
    before = engine.call("GET", "/embedded/configure").json
    assert engine.call("POST", "/embedded/configure", body).status == 400
    assert engine.call("GET", "/embedded/configure").json == before


# ---- the process ---------------------------------------------------------------------------------------


def test_it_says_what_it_is(engine: Engine) -> None:
    for path in ("/model_info", "/get_model_info", "/server_info", "/get_server_info"):
        assert "not a model" in engine.call("GET", path).json["notice"]
    assert "not a model" in engine.call("GET", "/v1/models").json["data"][0]["notice"]
    assert engine.call("GET", "/health").status == engine.call("GET", "/health_generate").status == 200
    assert engine.call("POST", "/flush_cache").status == 200
    text = subprocess.run(
        [sys.executable, "-m", "areal_fast.embedded", "--help"], capture_output=True, text=True
    )
    assert "not a model" in " ".join(text.stdout.split())


def test_unknown_paths_and_methods(engine: Engine) -> None:
    assert engine.call("GET", "/nothing").status == 404
    reply = engine.call("GET", "/generate")
    assert (reply.status, reply.headers["allow"]) == (405, "POST, PUT")


def test_other_vocabularies() -> None:
    other, line = start_engine("--vocab-size", "151643", "--output-tokens", "9")
    try:
        assert "not a model" in line
        body = other.generate([1], stop_token_ids=[151643, 151645]).json
        assert body["text"] == ""
        assert body["output_ids"][-1] == 151645
        assert all(0 <= token < 151643 for token in body["output_ids"][:-1])
        assert other.call("POST", "/generate", {"text": "hi"}).status == 400
    finally:
        other.close()


@pytest.mark.parametrize("flags", [["--tokens", "x"], ["--fail-status", "99"], ["--vocab-size", "0"]])
def test_bad_flags_are_usage_errors(flags: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "areal_fast.embedded", "--port", "0", *flags], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "error" in done.stderr and "Traceback" not in done.stderr


def test_a_port_in_use_is_one_line_and_status_1(engine: Engine) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "areal_fast.embedded", "--port", str(engine.port)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_a_child_ignores_signals_and_goes_with_its_parents_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = subprocess.Popen(
            [sys.executable, "-m", "areal_fast.embedded", "--inherit-fd", str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        engine = Engine(child, listener.getsockname()[1])  # type: ignore[arg-type]
    try:
        assert engine.call("GET", "/health").status == 200
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
        assert engine.generate().status == 200
        out, _ = child.communicate(timeout=WATCHDOG_S)  # closes its standard input
        assert (child.returncode, out) == (0, b"")
    finally:
        child.kill()
        child.wait()
