"""Where areal_fast answers otherwise than the recordings, on purpose: every difference by file and line,
and why.

A step that is in no table must match its recording. A reason starts with the section of the wire page
(WIRE.md) whose "differs" it carries out, with "after" and the line of an earlier difference that it follows
from, or says why the step is sent, but not judged.

`PLANS` says how a file is played where the recording alone does not: what the engine answered when that
cannot be read off the reply, which requests were in flight together, which replies are polled for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from exchange import Step, Transcript, events, match
from standin import EOS, Answer

if TYPE_CHECKING:
    from replay import Played

PAD = 151643
HELLO = 9707
EXPLODED = '{"error":{"message":"provider exploded"}}'
SLOW_DOWN = '{"error":{"message":"slow down"}}'
LONE_BYTE = 187
"""The token of byte 0xff, which is never valid UTF-8."""


@dataclass(frozen=True)
class Differs:
    """What to expect instead. `change`: members of the recorded JSON reply with other values; `body`:
    another body, of which the reply may hold more; `detail`: an error's text. `check` gets the whole replay
    and returns complaints.
    """

    why: str
    status: int | None = None
    detail: Any = None
    change: Mapping[str, Any] | None = None
    body: Any = None
    check: Callable[[Played], list[str]] | None = None
    engine: bool = True
    """False: what the engine was sent is not compared."""


@dataclass(frozen=True)
class OutOfScope:
    """Not judged. `sent`: the request is sent all the same, because later steps build on it."""

    why: str
    sent: bool = False


@dataclass(frozen=True)
class Overlap:
    """The request of line `line` was in flight: sent before line `before`, answered by the engine after
    `after`. `seen`: the engine gets it before the end; not if it waits in the proxy, while generation is
    paused.
    """

    line: int
    before: int
    after: int
    seen: bool = True


@dataclass(frozen=True)
class Plan:
    """`flags` replace the recorded ones (longer clocks, for slow machines). By line: `answers`, what the
    engine said where the reply does not tell; `aborts`, after how many of the tokens it aborted first;
    `pauses`, seconds that pass before the step. `polls`: repeated until the expected status comes, they
    waited for a clock. `empties`: no session may be left before these go out. `repeats`: steps of this name
    but the last were polls. By session: `callbacks`, how its callbacks are answered (the last answer stands),
    `holds`, after which line they are answered at all.
    """

    flags: Sequence[str] | None = None
    answers: Mapping[int, Sequence[Answer]] = field(default_factory=dict)
    aborts: Mapping[int, int] = field(default_factory=dict)
    overlaps: Sequence[Overlap] = ()
    pauses: Mapping[int, float] = field(default_factory=dict)
    polls: Sequence[int] = ()
    empties: Sequence[int] = ()
    repeats: str = ""
    callbacks: Mapping[str, Sequence[Answer]] = field(default_factory=dict)
    holds: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """A difference that many steps share."""

    applies: Callable[[Transcript, Step], bool]
    differs: Callable[[Step], Differs]


NO_INTERACTIONS = "No interactions in session"
NOT_READY = "'No ready trajectories for session {}'"


def _dumped(played: Played, recorded: dict[str, Any]) -> list[str]:
    """The dump files are those of the recording, equal as JSON but for ids; mode 0600; nothing temporary is
    left.
    """
    files = {path.name: path for path in (played.folder / "stale_dump").iterdir()}
    wanted = recorded["files"]
    found = [f"{name} was not written: {sorted(files)}" for name in wanted if name not in files]
    found += [f"{name} is one file too many" for name in files if name not in wanted]
    for name in wanted.keys() & files.keys():
        if (mode := files[name].stat().st_mode & 0o777) != 0o600:
            found.append(f"{name} has mode {mode:o}")
        expected = json.loads(played.names.rewrite(wanted[name]["raw"]))
        found += match(expected, json.loads(files[name].read_text()), played.names, name)
    return found


def _second_life(played: Played, _recorded: dict[str, Any]) -> list[str]:
    """A second session of the same id was dumped beside the first one's file, which is as it was."""
    folder = played.folder / "stale_dump"
    names = played.wait_for(
        lambda: sorted(folder.glob("ready-0-trajectory-0*.json*")), lambda found: len(found) == 2
    )
    rewards = [next(iter(json.loads(path.read_text()).values()))["reward"] for path in names]
    return [] if sorted(rewards) == [0.1, 0.7] else [f"rewards {rewards} in {names}"]


def _in_flight_kept(played: Played, _recorded: dict[str, Any]) -> list[str]:
    """The session that was in flight past its time-out is dumped later, with its one interaction."""
    path = played.folder / "stale_dump" / "inflight-0-trajectory-0.json"
    played.wait_for(path.exists, bool)
    return [] if len(json.loads(path.read_text())) == 1 else [f"{path.name}: {path.read_text():.300}"]


def _no_code_was_run(played: Played, _recorded: dict[str, Any]) -> list[str]:
    return ["a PUT ran a command"] if (played.folder / "rce_proof").exists() else []


def _engine_across_pause(played: Played, recorded: dict[str, Any]) -> list[str]:
    """The aborted generation went on after the pause with prompt + tokens so far and the rest of the
    budget.
    """
    want = [(call["path"], json.loads(call["body"])) for call in recorded["requests"]]
    return played.match_calls(want, [(call.path, call.body) for call in played.calls_of[15]])


def _twenty_tries(played: Played, recorded: dict[str, Any]) -> list[str]:
    budgets = [call.body["sampling_params"]["max_new_tokens"] for call in played.calls_of[27]]
    return match(recorded["max_new_tokens"], budgets, played.names)


def _recorded_exactly(played: Played) -> list[str]:
    """The whole session comes back: every chat that succeeded and asked to be stored, in order, and no
    other.
    """
    expected = [chat.id for chat in played.chats if chat.session == "c-0" and chat.stored]
    exported = list(played.reply.json()["interactions"])
    return [] if exported == expected else [f"exported {exported} instead of {expected}"]


def _counted(played: Played) -> list[str]:
    """A session's first reward counts the chats that succeeded and asked to be stored."""
    reply = played.reply.json()
    expected = sum(chat.session == reply["session_id"] and chat.stored for chat in played.chats)
    count = reply["interaction_count"]
    return [] if count == expected else [f"interaction_count {count} instead of {expected}"]


def _versions(*per_interaction: Sequence[int]) -> Callable[[Played], list[str]]:
    """Each output token has the version in force when its attempt was sent. The fourth of six shards is
    versions; the others are as recorded.
    """

    def check(played: Played) -> list[str]:
        assert played.step is not None
        recorded, came, found = played.step.reply.json(), played.reply.json(), []
        for number, (want, got) in enumerate(zip(recorded, came, strict=True)):
            if number % 6 != 3:
                found += match(want, got, played.names, f"$[{number}]")
                continue
            versions, mask = played.tensor(got), played.tensor(came[number - 2])
            expected = [-1] * mask.count(0) + list(per_interaction[number // 6])
            if versions != expected:
                found.append(f"$[{number}]: versions {versions} instead of {expected}")
        return found

    return check


def _same_chat(played: Played) -> list[str]:
    """As recorded, and the engine got the seed."""
    assert played.step is not None
    wanted = json.loads(played.step.body)["seed"]
    sent = played.calls[0].body["sampling_params"].get("sampling_seed")
    found = [] if sent == wanted else [f"sampling_seed {sent!r} instead of {wanted!r}"]
    return found + match(played.step.reply.json(), played.reply.json(), played.names)


def _has_one_interaction(played: Played) -> list[str]:
    exported = list(played.reply.json()["interactions"])
    return [] if exported == [played.chats[-1].id] else [f"exported {exported}"]


def _told(played: Played, session: str) -> list[Any]:
    """The callbacks that came for a session, in the recording's words."""
    return [
        {
            "path": call.path,
            "authorization": call.headers.get("authorization"),
            "content-type": call.headers.get("content-type"),
            "body": call.body,
        }
        for call in list(played.receiver.received)
        if call.body["session_id"] == session
    ]


def _told_until_taken(played: Played, recorded: dict[str, Any]) -> list[str]:
    """As often as recorded: until the receiver took it."""
    wanted = []
    for call in recorded["got"]:
        headers = {key.lower(): value for key, value in call["headers"]}
        kept = {name: headers[name] for name in ("authorization", "content-type")}
        wanted.append({"path": call["path"], **kept, "body": json.loads(call["body"])})
    came = played.wait_for(lambda: _told(played, "cb-0"), lambda told: len(told) >= len(wanted))
    return match(wanted, came, played.names)


def _not_told_again(played: Played, recorded: dict[str, Any]) -> list[str]:
    count = len(_told(played, "cb-0"))
    return [] if count == recorded["after"] else [f"{count} callbacks instead of {recorded['after']}"]


def _delays_no_other(played: Played, _recorded: dict[str, Any]) -> list[str]:
    """slow1 was exported (the step before) while slow0's receiver still kept the first post waiting."""
    came = played.wait_for(lambda: _told(played, "slow0-0"), bool)
    return [] if len(came) == 1 else [f"slow0 was told {len(came)} times"]


def _says(text: str) -> Callable[[Played], list[str]]:
    return lambda played: match(json.loads(text), played.reply.json(), played.names)


def _cut_stream(played: Played) -> list[str]:
    """What had come is passed on, then an error, and no [DONE]."""
    assert played.step is not None
    recorded, came = events(played.step.reply.body), events(played.reply.body)
    if len(came) != 2 or not (isinstance(came[1], dict) and came[1].get("error")):
        return [f"events {came}"]
    return match(recorded[0], came[0], played.names)


def _mixed(played: Played) -> list[str]:
    """The recorded interactions in order with the two that the original refused among them (sent at 23 and
    24, before the stream at 25): discounting starts from the end, so each reward has its own power of 0.5.
    """
    assert played.step is not None
    recorded = json.loads(played.names.rewrite_bytes(played.step.reply.body))["interactions"]
    came = played.reply.json()["interactions"]
    found = [] if len(came) == len(recorded) + 2 else [f"{len(came)} interactions"]
    rewards = [item["reward"] for item in came.values()]
    found += match([0.5**n for n in reversed(range(len(came)))], rewards, played.names, "$.rewards")
    ours = [entry for number, entry in enumerate(came.items()) if number not in (7, 8)]
    for (name, want), (identity, got) in zip(recorded.items(), ours, strict=True):
        same = dict.fromkeys(("reward",), got["reward"])
        found += match({name: want | same}, {identity: got}, played.names)
    return found


_CHAT = "Chat: bad input is 400 with the same detail text (the original: 500)"
_JSON = "Rules: malformed JSON or a body of the wrong kind is 400 or 422 everywhere, never 500"
_KEYS = "Rules: keys are compared in constant time, non-ASCII included"
_SHARD = "Shards: only tensors and arrays are stored, anything else is 400 and stores nothing"
_DTYPE = "Shards: every fixed-size torch dtype"
_STYLE = "Export: a bad style, or concat without the concat template, is 422 and consumes nothing"
_NAN = "Rewards: NaN and infinities are 422"
_BOUNDS = "Sessions: task_id up to 1 KiB of valid UTF-8 without NUL, else 422"
_ENGINE = "Chat: the engine's own error is 502 with its status and text"
_FLIGHT = "Rewards: an interaction still in flight belongs to the trajectory active when it started"
_NOT_STORED = "after the refused PUT: nothing was stored"
_REGISTER = "Rules: a body of the wrong kind is 400 or 422 everywhere"
_NO_ENGINE = "Rules: 503 if there is no engine"
_LATE = "after the shards that were refused: other totals"
_GONE = OutOfScope("after the export that was refused: its shards do not exist")

DIFFERENCES: dict[str, dict[int, Differs | OutOfScope]] = {
    "04a_tools_no_parser_installed": {
        2: Differs(
            "Chat, template hf: the rig's tokenizer numbers Qwen's tool tokens otherwise", engine=False
        ),
    },
    "02_start_session": {
        13: Differs(_KEYS, 403, "Invalid admin API key."),
        39: Differs(_BOUNDS, 422),
        40: Differs(_BOUNDS, 422),
        41: Differs(_BOUNDS, 422),
        46: Differs("after 39 to 41: three sessions fewer", change={"sessions": 14}),
        53: Differs("Sessions: the admin key as api_key is 400", 400),
        55: Differs("after 53: the admin key still means __hitl__", change={"session_id": "__hitl__"}),
        61: Differs("after 39 to 41 and 53: four fewer, and __hitl__", change={"sessions": 17}),
    },
    "03_chat": {
        8: Differs(_KEYS + ": an unknown key, so standalone", 200, body={"object": "chat.completion"}),
        11: Differs("Chat: seed is read; SGLang's sampling_seed", engine=False, check=_same_chat),
        20: Differs(_CHAT + "; it broke off an empty stream", 400),
        21: Differs(_CHAT + "; it broke off an empty stream", 400),
        25: Differs(_CHAT + "; it sent the word on to the engine", 400, engine=False),
        93: Differs(_ENGINE, 502),
        94: Differs(_ENGINE, 502),
        96: Differs(_ENGINE, 502),
        101: Differs("Rewards: a failed call counts for nothing", check=_counted),
        104: Differs("after 101: exactly what succeeded", check=_recorded_exactly),
    },
    "05_multiturn_export_individual": {
        30: OutOfScope("an empty request does not tell the dialects apart: auto misses 1.0's session_ids"),
        32: OutOfScope("1.0's request, which ours serves from the same process; it would remove the session"),
        35: Differs(_STYLE, 422),
        36: Differs("after 35: still there", 200),
        39: Differs(_STYLE, 422),
        40: Differs("after 39: still there", 200),
        **{line: Differs(_NAN, 422) for line in (42, 46, 50, 54)},
        **{
            line: Differs("after the refused reward", 409, NOT_READY.format("m-0"))
            for line in (43, 47, 51, 55)
        },
        **dict.fromkeys((44, 48, 52, 56), _GONE),
        58: Differs(
            "after 42 to 54: all five chats are in it", change={"interaction_count": 5, "trajectory_id": 6}
        ),
        59: Differs("Rewards: a discount that is no finite number is 422 as well", 422),
        61: Differs("after 42 to 54", change={"trajectory_id": 7}),
    },
    "06_set_reward": {
        6: Differs(_KEYS, 401, "Invalid or expired session API key."),
        30: Differs(_FLIGHT, 400, NO_INTERACTIONS),
        31: Differs("after 30", 409, NOT_READY.format("r-0")),
        33: Differs(
            _FLIGHT,
            200,
            body={
                "interaction_count": 1,
                "trajectory_id": 2,
                "trajectory_ready": True,
                "ready_transition": True,
            },
        ),
    },
    "09_rtensor_data": {
        **{line: Differs(_DTYPE, 200, body={"status": "ok"}) for line in (29, 31)},
        34: Differs(_DTYPE, 200, body={"data": "AACAPwAAAEA=", "dtype": "torch.float8_e4m3fn"}),
        **{line: Differs(_SHARD, 400) for line in (35, 39, 41, 43, 47, 49, 53, 57, 59)},
        **{line: Differs(_SHARD, 400) for line in (*range(67, 82, 2), *range(87, 98, 2))},
        **{line: Differs(_NOT_STORED, 404) for line in (36, 40, 42, 44, 48, 50, 54, 58, 60)},
        **{line: Differs(_NOT_STORED, 404) for line in (*range(68, 83, 2), *range(88, 97, 2))},
        **{line: Differs(_JSON, 400) for line in (99, 100, 101)},
        138: Differs(_NOT_STORED, 400, body={"missing_shard_ids": ["odd-str"]}),
        141: Differs(_LATE, body={"status": "ok", "cleared_count": 1}),
        142: Differs(_LATE, body={"status": "ok", "cleared_count": 0}),
        143: Differs(_LATE, body={"status": "ok", "cleared_count": 1}),
        144: Differs(_LATE, body={"status": "ok", "cleared_count": 0}),
        146: Differs(_JSON, 400),
        152: Differs(_NOT_STORED, 200, body={"status": "ok", "cleared_count": 1}),
        153: Differs("after 152", 404),
        155: Differs(_SHARD, 400),
        156: Differs("after 152 and 155", 404),
        157: Differs(_LATE, body={"status": "ok", "cleared_count": 0}),
    },
    "10_pause_continue_version": {
        9: Differs("Rules: wrong method 405 with Allow", 405),
        21: Differs("Chat, versions: pr1268 stamps 0 always", check=_versions([1] * 4 + [2] * 10, [2] * 10)),
        39: Differs(_JSON, 400),
        40: Differs(_JSON, 400),
        41: Differs(_JSON, 400),
        42: Differs("configure_backend: 400 if missing or not an http URL", 400),
        43: Differs("after 42: the good engine is still set", 200, body={"object": "chat.completion"}),
    },
    "12_external_models": {
        3: Differs(_JSON, 400),
        4: Differs(_JSON, 400),
        10: Differs(_REGISTER, 400, "model name is required"),
        11: Differs(_REGISTER, 400, "url must be an http:// or https:// URL"),
        23: Differs("Chat: null means absent", 200, body={"id": "ext-1"}),
        24: Differs("after 11: not registered, so the engine's", 200, body={"object": "chat.completion"}),
        26: Differs("Chat, external: unreachable is 502; the system's words for why", 502),
        27: Differs("Chat, external: unreachable is 502, streamed or not", 502),
        29: Differs("Chat, external: the provider's status and content", 500, check=_says(EXPLODED)),
        31: Differs("Chat, external: the provider's status and content", 429, check=_says(SLOW_DOWN)),
        32: Differs("Chat, external: broken off; the words of another HTTP client", check=_cut_stream),
        33: Differs("after 23 and 24: two more", change={"interaction_count": 10}),
        34: Differs("after 23 and 24: two more", check=_mixed),
        41: Differs(_STYLE, 422),
    },
    "12b_external_only_mode_no_backend": {
        4: Differs(_NO_ENGINE, 503),
        6: Differs(_NO_ENGINE, 503),
        11: Differs(_NO_ENGINE, 503),
        12: Differs(_NO_ENGINE, 503),
    },
    "14_stale_dump": {
        24: Differs("Chat: the engine's own error is 502", 502),
        39: Differs("Dumps: a session with a request in flight is not stale", change={"sessions": 1}),
        41: Differs(
            "after 39: the interaction is not lost",
            200,
            body={"interaction_count": 1, "trajectory_id": 0, "trajectory_ready": True},
        ),
    },
    "20_main_group_dialect": {
        23: OutOfScope("pr1268's request, which ours serves from the same process; it would export"),
        31: Differs(_STYLE, 422),
        35: Differs(_STYLE, 422),
        36: Differs("after 35: still there", check=_has_one_interaction),
        38: Differs("Rules: version is an int64 and no bool", 400, "'version' (int) is required"),
        39: Differs("Rules: version is an int64 and no bool", 400, "'version' (int) is required"),
        40: Differs("after 38 and 39", change={"version": 3}),
        45: Differs(_JSON, 400, "model name is required"),
        47: Differs(_JSON, 400),
        51: Differs(_ENGINE, 502),
        58: Differs("Chat, versions: main-may stamps 0 always", check=_versions([3] * 4)),
        60: Differs("after 36: its shards are there as well", body={"status": "ok", "cleared_count": 0}),
    },
    "31_areal_1.0.4_parameters": {
        13: Differs("Chat: seed is read; SGLang's sampling_seed", engine=False, check=_same_chat),
        85: Differs(
            "Rules: /v1/chat/completions too", body={"object": "chat.completion"}, status=200, engine=False
        ),
        87: Differs("after 85, and Rewards: a failed call counts for nothing", check=_counted),
        97: Differs(_NAN, 422),
        99: Differs(_NAN, 422),
        101: Differs("after 97 and 99", change={"interaction_count": 5, "trajectory_id": 3}),
        103: Differs("after 97 and 99", change={"trajectory_id": 4}),
        105: Differs("after 97 and 99", change={"trajectory_id": 5}),
        107: Differs("after 97 and 99", change={"trajectory_id": 6}),
        121: Differs("Rules: version is an int64 and no bool", 400, "'version' (int) is required"),
        126: Differs(_JSON, 400),
        129: Differs("Rules: tags are forwarded, which 1.0 forgets here", 200, engine=False),
        135: Differs("Rules: unknown path 404 JSON; FastAPI's own pages are not ours", 404),
        **dict.fromkeys((137, 138, 139), Differs("Rules: wrong method 405 with Allow", 405)),
    },
}


def _chat_refused(_transcript: Transcript, step: Step) -> bool:
    """Not the provider of an external model, whose answer is passed on."""
    own = "json" not in (step.reply.header("content-type") or "") or "detail" in step.reply.json()
    return step.path == "/chat/completions" and step.reply.status == 500 and own


def _flask_page(_transcript: Transcript, step: Step) -> bool:
    return step.reply.status in (404, 405) and "html" in (step.reply.header("content-type") or "")


def _same_text(step: Step) -> Differs:
    is_json = "json" in (step.reply.header("content-type") or "")
    return Differs(_CHAT, 400, step.reply.json()["detail"] if is_json else None)


def _json_error(step: Step) -> Differs:
    return Differs("Rules: unknown path 404 JSON; wrong method 405 with Allow", step.reply.status)


RULES = [Rule(_chat_refused, _same_text), Rule(_flask_page, _json_error)]

OBSERVATIONS: dict[str, dict[int, Callable[[Played, dict[str, Any]], list[str]] | OutOfScope]] = {
    "07_delayed_reward_callback": {8: _told_until_taken, 9: _not_told_again, 47: _delays_no_other},
    "09_rtensor_data": {98: _no_code_was_run},
    "10_pause_continue_version": {17: _engine_across_pause, 28: _twenty_tries},
    "14_stale_dump": {28: _dumped, 37: _second_life, 42: _in_flight_kept},
}

PLANS: dict[str, Plan] = {
    "03_chat": Plan(
        answers={
            93: [Answer([EOS])],
            94: [Answer([EOS])],
            95: [Answer([])],
            96: [Answer([61794])],
            97: [Answer([HELLO, PAD])],
            98: [Answer([HELLO, EOS, PAD, EOS])],
            99: [Answer([HELLO, EOS] * 4, "weird")],
            100: [Answer([LONE_BYTE] * 3, "length")],
        }
    ),
    "06_set_reward": Plan(
        answers={35: [Answer([HELLO] * 4, "length")]},
        overlaps=[Overlap(32, before=30, after=31)],
        polls=[36],
    ),
    "07_delayed_reward_callback": Plan(
        flags=["--set-reward-finish-timeout", "2.0", "--callback-server-addr", "http://127.0.0.1:9301/"],
        pauses={9: 1.0},
        polls=[10, 46, 51],
        repeats="poll export slow1",
        callbacks={
            "cb-0": [Answer(status=500), Answer(status=503), Answer()],
            "down-0": [Answer(dies=True)],
        },
        holds={"slow0-0": 47},
    ),
    "10_pause_continue_version": Plan(
        answers={
            27: [Answer([HELLO], "abort")] * 20,
            29: [Answer([HELLO], "abort")] * 6,
            30: [Answer([], "abort", text="Abort before prefill")] * 20,
        },
        aborts={15: 4},
        overlaps=[Overlap(15, before=11, after=14), Overlap(25, before=23, after=24, seen=False)],
    ),
    # recorded where no parser was installed
    "04a_tools_no_parser_installed": Plan(flags=["--tool-call-parser", "none"]),
    "14_stale_dump": Plan(
        flags=[
            "--session-timeout-seconds", "1.5",
            "--stale-session-cleanup-interval-seconds", "0.5",
            "--stale-session-dump-path", "RIG/stale_dump",
        ],
        answers={24: [Answer(status=500, text="engine is unwell")]},
        overlaps=[Overlap(40, before=39, after=39)],
        pauses={39: 2.5} | dict.fromkeys((*range(45, 49), *range(52, 56), *range(59, 63), 66), 0.6),
        polls=[27, 67, 72],
        empties=[38, 43, 50, 57, 64, 71],
    ),
    "12_external_models": Plan(
        answers={
            24: [Answer([HELLO, EOS])],
            27: [],
            28: [Answer(status=500, text=EXPLODED)],
            29: [Answer(status=500, text=EXPLODED)],
            30: [Answer(status=429, text=SLOW_DOWN)],
            31: [Answer(status=429, text=SLOW_DOWN)],
            32: [Answer(breaks_after=1)],
        }
    ),
    "20_main_group_dialect": Plan(
        flags=["--areal-dialect", "main-may"], answers={51: [Answer(status=500, text="engine is unwell")]}
    ),
}  # fmt: skip
