"""The command line: defaults, conversions, refusals in one line that names the flag."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import msgspec
import pytest

from areal_fast import config
from areal_fast.config import Settings, UsageError, installed_dialect, parse

LOCAL = ["--host", "127.0.0.1", "--backend-addr", "embedded"]


def settings(*argv: str) -> Settings:
    return parse([*LOCAL, *argv], {})[0]


def refusal(*argv: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        parse(argv, environ or {})
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_are_those_of_the_wire_page() -> None:
    s, unknown = parse(["--tokenizer-path", "/models/x", "--admin-api-key", "k"], {})
    assert unknown == []
    assert (s.host, s.port, s.backend_addr) == ("0.0.0.0", 8082, "http://localhost:30000")
    assert (s.backend_type, s.log_level, s.chat_template_type) == ("sglang", "warning", "hf")
    assert (s.request_timeout_s, s.set_reward_finish_timeout_s) == (120.0, 0.0)
    assert (s.session_timeout_s, s.session_timeout_given, s.cleanup_interval_s) == (3600.0, False, 60.0)
    assert (s.dump_path, s.callback_server_addr, s.engine_max_tokens) == ("", "", None)
    assert (s.tool_call_parser, s.reasoning_parser) == ("qwen", "qwen3")
    assert s.workers == min(4, config.usable_cpus())
    assert (
        config.MIN_ARENA_BYTES
        <= s.arena_max_bytes
        <= max(config.memory_limit_bytes() // 20, 4 * config.MIN_ARENA_BYTES)
    )


def test_what_areals_controller_passes_is_understood() -> None:
    line = (
        "--host 10.0.0.7 --port 31000 --tokenizer-path /m --admin-api-key secret --log-level warning "
        "--request-timeout 3600 --set-reward-finish-timeout 0.5 --callback-server-addr http://10.0.0.1:9 "
        "--tool-call-parser qwen25 --reasoning-parser qwen3 --chat-template-type hf "
        "--engine-max-tokens 4096 --backend-addr http://10.0.0.7:30000 --backend-type sglang"
    )
    s, unknown = parse(shlex.split(line), {})
    assert unknown == []
    assert (s.port, s.request_timeout_s, s.engine_max_tokens) == (31000, 3600.0, 4096)
    assert s.set_reward_finish_timeout_s == 0.5


def test_unknown_flags_are_given_back_with_their_values() -> None:
    _, unknown = parse([*LOCAL, "--zzz", "5", "--workers", "2"], {})
    assert unknown == ["--zzz", "5"]


def test_a_timeout_given_is_told_apart_from_the_default() -> None:
    assert settings("--session-timeout-seconds", "3600").session_timeout_given
    assert not settings().session_timeout_given


@pytest.mark.parametrize(
    ("text", "size"), [("33554432", 32 << 20), ("32M", 32 << 20), ("1.5g", 3 << 29), ("2GiB", 2 << 30)]
)
def test_sizes(text: str, size: int) -> None:
    assert settings("--arena-max-bytes", text).arena_max_bytes == size


@pytest.mark.parametrize("seconds", ["1e10", "1e300", "9" * 400])
def test_times_without_end_are_a_finite_one(seconds: str) -> None:
    """Whoever means never may say so; what is made of it, in nanoseconds, must stay a number."""
    for flag, name in (
        ("--session-timeout-seconds", "session_timeout_s"),
        ("--shard-ttl-seconds", "shard_ttl_s"),
        ("--set-reward-finish-timeout", "set_reward_finish_timeout_s"),
    ):
        if seconds.isdigit():
            assert "finite" in refusal(*LOCAL, flag, seconds)
        else:
            assert getattr(settings(flag, seconds), name) == config.FOR_EVER_S


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--port", "x"),
        ("--port", "70000"),
        ("--port", "-1"),
        ("--workers", "0"),
        ("--workers", "1000"),
        ("--workers", "2.5"),
        ("--request-timeout", "nan"),
        ("--request-timeout", "0"),
        ("--set-reward-finish-timeout", "-1"),
        ("--session-timeout-seconds", "0"),
        ("--session-timeout-seconds", "inf"),
        ("--stale-session-cleanup-interval-seconds", "0"),
        ("--arena-max-bytes", "lots"),
        ("--arena-max-bytes", "1M"),
        ("--arena-max-bytes", "900T"),
        ("--log-level", "loud"),
        ("--backend-type", "tgi"),
        ("--engine-max-tokens", "0"),
        ("--admin-api-key", ""),
        ("--drain-seconds", "-1"),
    ],
)
def test_a_bad_value_is_refused_by_the_flags_name(flag: str, value: str) -> None:
    assert flag in refusal(*LOCAL, flag, value)


def test_the_default_key_is_refused_by_the_host_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "host '10.0.0.7';" in refusal("--backend-addr", "", "--host", "10.0.0.7")
    monkeypatch.setattr(config, "reachable_host", lambda host: "10.1.2.3")
    assert "host '0.0.0.0' (10.1.2.3);" in refusal("--backend-addr", "")


@pytest.mark.parametrize(
    ("tree", "dialect"),
    [("areal/experimental/inference_service", "1.0"), ("areal/v2/inference_service", "v2"), ("", "1.0")],
)
def test_auto_means_the_areal_that_is_installed(
    tree: str, dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tree:
        (tmp_path / tree).mkdir(parents=True)
        (tmp_path / "areal" / "__init__.py").write_text("raise RuntimeError('looked at, not imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed_dialect() == dialect
    monkeypatch.undo()
    assert settings("--areal-dialect", "main-may").areal_dialect == "main-may"


def test_the_concat_template_and_every_dialect_can_be_asked_for() -> None:
    chosen = settings("--chat-template-type", "concat", "--areal-dialect", "v2")
    assert (chosen.chat_template_type, chosen.areal_dialect) == ("concat", "v2")


@pytest.mark.parametrize(
    "address", ["10.0.0.1:9", "ftp://10.0.0.1", "http://", "http://h:x", "http://h:0", "http://[::1", "//h"]
)
def test_callbacks_go_to_a_url(address: str) -> None:
    text = refusal(*LOCAL, "--callback-server-addr", address)
    assert "--callback-server-addr" in text and address in text and "\n" not in text


@pytest.mark.parametrize(
    "address", ["", "http://10.0.0.1:9/", "https://gateway.example/areal", "http://[::1]:9"]
)
def test_where_callbacks_may_go(address: str) -> None:
    assert settings("--callback-server-addr", address).callback_server_addr == address


def test_a_backend_that_is_no_url() -> None:
    assert "--backend-addr" in refusal(
        "--host", "::1", "--tokenizer-path", "x", "--backend-addr", "10.0.0.1:3"
    )


def test_the_tokenizer_is_required_with_an_engine_only() -> None:
    assert "--tokenizer-path" in refusal("--host", "127.0.0.1")
    assert not parse(["--host", "127.0.0.1", "--backend-addr", ""], {})[0].has_engine
    assert settings().tokenizer_path == config.BYTE_TOKENIZER


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_the_default_key_is_fine_on_loopback(host: str) -> None:
    assert (
        parse(["--host", host, "--backend-addr", "embedded"], {})[0].admin_api_key == config.DEFAULT_ADMIN_KEY
    )


def test_the_default_key_is_refused_where_others_can_reach_it() -> None:
    argv = ["--host", "10.1.2.3", "--backend-addr", "embedded"]
    assert "AREAL_ALLOW_DEFAULT_ADMIN_KEY" in refusal(*argv)
    assert "10.1.2.3" in refusal(*argv, environ={"AREAL_ALLOW_DEFAULT_ADMIN_KEY": "0"})
    assert parse(argv, {"AREAL_ALLOW_DEFAULT_ADMIN_KEY": "1"})
    assert parse([*argv, "--admin-api-key", "other"], {})


def test_hostport_brackets_ipv6() -> None:
    assert config.hostport("10.0.0.1", 80) == "10.0.0.1:80"
    assert config.hostport("fe80::1", 80) == "[fe80::1]:80"
    assert config.hostport("[fe80::1]", 80) == "[fe80::1]:80"


def test_a_wildcard_is_replaced_by_an_address_others_can_dial() -> None:
    address = config.reachable_host("0.0.0.0")
    assert address not in ("", "0.0.0.0", "::")
    assert config.reachable_host("10.9.8.7") == "10.9.8.7"


def test_settings_survive_the_trip_to_a_child() -> None:
    s = settings("--engine-max-tokens", "100", "--admin-api-key", "schlüssel")
    assert msgspec.json.decode(msgspec.json.encode(s), type=Settings) == s


# -- a model's name instead of a tokenizer folder ------------------------------------------------------------
def downloaded(cache: Path, name: str) -> Path:
    """A model in a cache, as huggingface_hub leaves it; its folder."""
    model = cache / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("c0ffee")
    (model / "snapshots" / "c0ffee").mkdir(parents=True)
    return model / "snapshots" / "c0ffee"


@pytest.mark.parametrize(
    ("where", "variables"),
    [
        ("", {"HF_HUB_CACHE": "{}"}),
        ("hub", {"HF_HOME": "{}"}),
        ("huggingface/hub", {"XDG_CACHE_HOME": "{}"}),
    ],
)
@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "gpt2"])
def test_a_models_name_is_its_folder_in_the_cache(
    tmp_path: Path, where: str, variables: dict[str, str], name: str
) -> None:
    folder = downloaded(tmp_path / where, name)
    environ = {key: value.format(tmp_path) for key, value in variables.items()}
    got, _ = parse(["--host", "127.0.0.1", "--tokenizer-path", name], environ)
    assert got.tokenizer_path == str(folder)
    for path in ("Qwen/another", "/m", "./Qwen/Qwen3-8B", "a/b/c", config.BYTE_TOKENIZER):
        got, _ = parse(["--host", "127.0.0.1", "--tokenizer-path", path], environ)
        assert got.tokenizer_path == path


def test_a_folder_beats_a_models_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloaded(tmp_path / "cache", "Qwen/Qwen3-8B")
    (tmp_path / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    environ = {"HF_HUB_CACHE": str(tmp_path / "cache")}
    assert config.tokenizer_folder("Qwen/Qwen3-8B", environ) == "Qwen/Qwen3-8B"
