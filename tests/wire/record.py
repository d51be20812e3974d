"""Records exchanges with AReaL 1.0.4's own data proxy, in the form of the other transcripts.

    python tests/wire/record.py            # writes transcripts/30_areal_1.0.4_*.jsonl

The given recordings are of the pull request and of its successor's main branch; what is on PyPI answers
exports in another form, so its behaviour is recorded here, by running it (areal_env.py) against the
stand-in engine. Run it again when the scenario below grows; the replay then holds ours to what came out.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from areal_env import areal_python  # noqa: E402
from exchange import Reply, send  # noqa: E402
from proxy import original  # noqa: E402
from standin import StandIn  # noqa: E402

ADMIN = "areal-admin-key"
PLACEHOLDER_ENGINE, PLACEHOLDER_PROXY = "127.0.0.1:9100", "127.0.0.1:9230"
TRANSCRIPTS = Path(__file__).parent / "transcripts"


class Recorder:
    """Sends requests and keeps what came back. Addresses are written as the other recordings write them."""

    def __init__(self, address: str, engine: StandIn, flags: list[str]):
        self._address, self._engine = address, engine
        self.lines: list[dict[str, Any]] = [
            {
                "kind": "server",
                "implementation": "upstream AReaL-1.0.4",
                "flags": flags,
                "backend_addr": f"http://{PLACEHOLDER_ENGINE}",
            }
        ]

    def _plain(self, text: str) -> str:
        return text.replace(self._engine.address, PLACEHOLDER_ENGINE).replace(
            self._address, PLACEHOLDER_PROXY
        )

    def __call__(
        self,
        name: str,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = None,
        raw: bytes | None = None,
        content_type: str | None = "application/json",
    ) -> Reply:
        data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        headers = [] if key is None else [("Authorization", f"Bearer {key}")]
        if data and content_type:
            headers.append(("Content-Type", content_type))
        seen = len(self._engine.received)
        reply = send(self._address, method, path, headers, data)
        calls = [{"path": call.path, "body": call.raw.decode()} for call in self._engine.received[seen:]]
        self.lines.append(
            {
                "kind": "step",
                "n": len(self.lines),
                "name": name,
                "request": {
                    "method": method,
                    "path": path,
                    "headers": [["Host", PLACEHOLDER_PROXY], *map(list, headers)],
                    "body": self._text(data),
                },
                "response": {
                    "status": reply.status,
                    "headers": [
                        [k.lower(), v] for k, v in reply.headers if k.lower() not in ("date", "server")
                    ],
                    "body": self._text(reply.body),
                }
                | ({"transport_error": reply.broken} if reply.broken else {}),
                "backend_received": calls,
            }
        )
        return reply

    def _text(self, data: bytes) -> Any:
        try:
            return self._plain(data.decode())
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(data).decode()}

    # shorthands of the scenarios

    def start(self, task: str, **more: Any) -> list[tuple[str, str]]:
        body = {"task_id": task} | more
        reply = self(f"start {body}", "POST", "/rl/start_session", body, key=ADMIN).json()
        return [(member["session_id"], member["session_api_key"]) for member in reply["sessions"]]

    def chat(self, key: str | None, messages: list[dict[str, Any]], **more: Any) -> Reply:
        body = {"messages": messages, "max_tokens": 6} | more
        body = {name: value for name, value in body.items() if value is not ...}
        shown = {name: value for name, value in body.items() if name != "messages"}
        return self(f"chat {json.dumps(shown)}", "POST", "/chat/completions", body, key=key)

    def reward(self, key: str, reward: Any, **more: Any) -> Reply:
        return self(
            f"reward {reward} {more or ''}", "POST", "/rl/set_reward", {"reward": reward} | more, key=key
        )

    def export(self, name: str, ids: list[str], **more: Any) -> Reply:
        body = {"session_ids": ids} | more
        return self(f"export {name}", "POST", "/export_trajectories", body, key=ADMIN)

    def fetch(self, name: str, exported: Reply) -> Reply:
        traj = exported.json()["traj"]
        ids = [tensor["data"]["shard"]["data"]["shard_id"] for tensor in traj.values()]
        return self(f"batch fetch of {name}", "POST", "/data/batch", {"shard_ids": ids})


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def said(reply: Reply) -> dict[str, Any]:
    return assistant(reply.json()["choices"][0]["message"]["content"])


def trajectories(record: Recorder) -> None:
    """Sessions, groups, rewards and exports in 1.0's form, every tensor fetched."""
    record("health", "GET", "/health")
    [(one, key)] = record.start("solo")
    first = record.chat(key, [user("first question")])
    history = [user("first question"), said(first), user("and then?")]
    second = record.chat(key, history, max_tokens=30)
    record.chat(key, [*history, said(second), user("finally")], max_completion_tokens=2, max_tokens=...)
    record.reward(key, 0.5, interaction_id=first.json()["id"])
    record.reward(key, 0.7, interaction_id=second.json()["id"])
    record.reward(key, 0.9)
    record.fetch(
        "solo, discount 0.5", record.export("solo, discount 0.5", [one], discount=0.5, remove_session=False)
    )
    record.export("solo again, nothing ready", [one], remove_session=False)
    for number in range(3):
        record.chat(key, [user(f"episode {number}")])
        record.reward(key, float(number))
    record.fetch("trajectory 2", record.export("trajectory 2", [one], trajectory_id=2, remove_session=False))
    record.export("trajectory 99", [one], trajectory_id=99, remove_session=False)
    record.fetch("newest", record.export("newest", [one], remove_session=False))
    record.chat(key, [user("never rewarded")])
    record.fetch("oldest, removing", record.export("oldest, removing", [one]))
    record.chat(key, [user("standalone now")])
    record.reward(key, 1)
    record("health", "GET", "/health")
    members = record.start("team", group_size=3, api_key="captain")
    for number, (_, member_key) in enumerate(members[:2]):
        messages = [user("shared " * (number + 1))]
        for turn in range(number + 2):
            reply = record.chat(member_key, messages, max_tokens=[4, 30, 9][turn])
            messages += [said(reply), user(f"turn {turn}")]
        record.reward(member_key, number + 1)
    record.start("another", api_key="captain")
    names = [name for name, _ in members]
    group = record.export("group in another order", [names[1], "unknown", names[0], names[2]], discount=0.9)
    record.fetch("group", group)
    record.reward("captain", 1)
    record.export("group again", names)
    for bad in ({}, {"session_ids": None}, {"session_ids": "x"}, {"session_ids": [1]}, {"session_ids": []}):
        record(f"export {bad}", "POST", "/export_trajectories", bad, key=ADMIN)
    wrong: dict[str, Any]
    for wrong in ({"discount": "x"}, {"trajectory_id": 1.5}, {"remove_session": "maybe"}, {"group_id": 5}):
        record(f"export {wrong}", "POST", "/export_trajectories", {"session_ids": ["q"]} | wrong, key=ADMIN)
    record("export, no key", "POST", "/export_trajectories", {"session_ids": ["q"]})
    record("export, wrong key", "POST", "/export_trajectories", {"session_ids": ["q"]}, key="x")
    record("export, not JSON", "POST", "/export_trajectories", raw=b'{"session_ids": [', key=ADMIN)
    record("hitl chat", "POST", "/chat/completions", {"messages": [user("hitl")], "max_tokens": 4}, key=ADMIN)
    record.reward(ADMIN, 0.25)
    record.fetch("hitl", record.export("hitl", ["__hitl__"], remove_session=False))
    record("health", "GET", "/health")


def parameters(record: Recorder) -> None:
    """What the engine is sent for every parameter of a chat; what bodies, rewards and versions may look
    like.
    """
    [(_, key)] = record.start("params")
    base = [{"role": "system", "content": "Be brief."}, user("Hello there")]
    variants: list[dict[str, Any]] = [
        {"temperature": 0.0}, {"temperature": 2}, {"temperature": 0.000001}, {"top_p": 1}, {"top_p": 0.01},
        {"top_p": 0.0}, {"frequency_penalty": -0.5}, {"frequency_penalty": 1}, {"stop": "x"}, {"stop": ["x"]},
        {"stop": ""}, {"seed": 42}, {"user": "u"}, {"n": 1.0}, {"n": 3},
        {"logprobs": True, "top_logprobs": 3},
        {"presence_penalty": 1.0}, {"store": True}, {"store": False}, {"metadata": {}}, {"metadata": None},
        {"max_total_tokens": 100}, {"max_total_tokens": 30}, {"max_total_tokens": 1},
        {"max_total_tokens": None},
        {"max_tokens": ..., "max_completion_tokens": 7}, {"max_tokens": ..., "max_completion_tokens": 0},
        {"max_tokens": ..., "max_total_tokens": 40}, {"max_tokens": None}, {"max_tokens": 40000},
        {"max_completion_tokens": None}, {"model": "default"}, {"model": ""}, {"model": None},
        {"tools": None},
        {"tools": []}, {"tool_choice": "auto"}, {"stream": False}, {"response_format": {"type": "text"}},
        {"extra_body": None}, {"extra_body": {}},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        {"parallel_tool_calls": False}, {"service_tier": "auto"}, {"ignore_eos": True},
        {"stream": True}, {"stream": True, "stream_options": {"include_usage": False}},
        {"stream": True, "max_tokens": 30}, {"stream": True, "max_tokens": 0},
    ]  # fmt: skip
    for variant in variants:
        record.chat(key, base, **variant)
    conversations: list[Any] = [
        [user("")], [user("  spaces  ")], [user("a\nb\n\nc")], [user("tab\there")], [user("emoji 👩‍👩‍👧 ok")],
        [user("ÅÄÖ ﬁ ½ １")], [user("e\u0301 vs é")], [user("<|endoftext|>")],
        [user("<tool_call>{}</tool_call>")],
        [user("x" * 600)], [user("1234567890 " * 20)], [user("你好，世界。" * 10)],
        [user("def f(x):\n    return x\n")],
        [user([{"type": "text", "text": "one"}])], [user([])], [assistant("I begin"), user("ok")],
        [assistant("only")],
        [{"role": "system", "content": "s"}], [user("a"), user("b")], [user("a"), assistant(""), user("b")],
        [user("a"), assistant(None), user("b")],
        [user("q"), {"role": "tool", "content": "42", "tool_call_id": "c"}],
        [{"role": "user", "content": "named", "name": "bob"}],
        [{"role": "developer", "content": "d"}, user("x")],
        [user("a") | {"extra": {"k": [1, None]}}], [{}], [5], [None], [[]], [user({"a": 1})], [user(True)],
    ]  # fmt: skip
    for messages in conversations:
        record.chat(key, messages)
    record("chat, BOM", "POST", "/chat/completions", raw=b'\xef\xbb\xbf{"messages": []}', key=key)
    record("chat, trailing garbage", "POST", "/chat/completions", raw=b'{"messages": []} x', key=key)
    record("chat, number", "POST", "/chat/completions", raw=b"5", key=key)
    record("/v1 path", "POST", "/v1/chat/completions", {"messages": base, "max_tokens": 3}, key=key)
    rewards: list[Any] = [
        "1e3",
        " 2 ",
        "-0.0",
        "0x10",
        "",
        "nan",
        "inf",
        -1.5,
        1e-320,
        10**30,
        False,
        "true",
        [],
        None,
    ]
    for reward in rewards:
        record.chat(key, [user(f"reward {reward}")])
        record.reward(key, reward)
    for version in (7, 0, -1, "7", 7.0, 7.5, None, True, [], 2**31, 2**63 - 1):
        record(f"set_version {version!r}", "POST", "/set_version", {"version": version})
    record("set_version, nothing", "POST", "/set_version", {})
    record("set_version, not JSON", "POST", "/set_version", raw=b"{")
    record("get_version", "GET", "/get_version")
    record("configure", "POST", "/configure", {"anything": 1})
    record("release", "POST", "/release_memory_occupation", {"tags": ["kv_cache"]})
    record("resume", "POST", "/resume_memory_occupation")
    for path in ("/", "/rl", "/rl/start_session/", "/health/", "/docs", "/chat/completions/"):
        record(f"GET {path}", "GET", path)
    for method, path in (("GET", "/rl/start_session"), ("PUT", "/chat/completions"), ("POST", "/health")):
        record(f"{method} {path}", method, path)
    record("health", "GET", "/health")


def sessions(record: Recorder) -> None:
    """Starting sessions and groups, keys and their owners, in 1.0."""
    for body in (
        {"task_id": "a"}, {"task_id": "a", "group_size": 2}, {"task_id": "a", "group_size": None},
        {"task_id": "a", "group_size": True}, {"task_id": "a", "group_size": " 2 "},
        {"task_id": "a", "group_size": "2.0"},
        {"task_id": "a", "group_size": 1e0}, {"task_id": "a", "group_size": []}, {"task_id": "a b/c?d#e%"},
        {"task_id": "\n"}, {"task_id": "ß" * 100}, {"task_id": "__hitl__"},
        {"task_id": "t", "api_key": " sp "},
        {"task_id": "t", "api_key": "k" * 500}, {"task_id": "t", "api_key": "ключ"},
        {"task_id": "t", "api_key": []},
        {"task_id": "t", "api_key": "k" * 500}, {"task_id": "t", "api_key": False}, {"TASK_ID": "t"},
        [["task_id", "x"]],
        7, True, "task_id",
    ):  # fmt: skip
        record(f"start {json.dumps(body)[:60]}", "POST", "/rl/start_session", body, key=ADMIN)
    [(name, key)] = record.start("owner", api_key="shared")
    record("bound", "POST", "/rl/start_session", {"task_id": "owner", "api_key": "shared"}, key=ADMIN)
    record.chat(key, [user("one")])
    record.reward(key, 1)
    [(second, _)] = record.start("owner", api_key="shared")
    record.chat("shared", [user("two")])
    record.reward("shared", 2)
    record.fetch("old owner", record.export("old owner", [name]))
    record.fetch("new owner", record.export("new owner", [second]))
    record("unbound", "POST", "/rl/start_session", {"task_id": "owner", "api_key": "shared"}, key=ADMIN)
    for content_type in (
        "application/json;charset=utf-8",
        "APPLICATION/JSON",
        "text/json",
        "application/ld+json",
        None,
    ):
        record(
            f"content type {content_type}",
            "POST",
            "/rl/start_session",
            {"task_id": "ct"},
            key=ADMIN,
            content_type=content_type,
        )
    record("health", "GET", "/health")


SCENARIOS: dict[str, Callable[[Recorder], None]] = {
    "30_areal_1.0.4_trajectories": trajectories,
    "31_areal_1.0.4_parameters": parameters,
    "32_areal_1.0.4_sessions": sessions,
}


def main() -> None:
    import tempfile

    import qwen_folder

    with tempfile.TemporaryDirectory() as folder, StandIn() as engine:
        tokenizer = qwen_folder.build(Path(folder) / "qwen")
        for name, scenario in SCENARIOS.items():
            with original(areal_python(), engine.url, tokenizer) as proxy:
                record = Recorder(proxy.address, engine, [])
                scenario(record)
            lines = [json.dumps(line, ensure_ascii=False, separators=(",", ":")) for line in record.lines]
            (TRANSCRIPTS / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(name, len(lines))


if __name__ == "__main__":
    main()
