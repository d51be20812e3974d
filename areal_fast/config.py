"""Everything that can be set: type, range, default. Nothing else reads flags or the environment.

`parse` turns a command line into a frozen `Settings`, or raises `UsageError` with one line that names the
flag and says what is wrong (the command exits with 2). Unknown flags are ignored, as the original does;
`parse` returns them so that the caller can warn once.

`Settings` travels to the child processes as JSON on an inherited descriptor, never by argv or environment,
because it holds the admin key. Names carry their unit; the flag names are the original's.

Defaults that depend on the machine (workers, arena size) look at what this process may use: its CPU affinity
and cgroup quota, its cgroup's memory limit. Source of the flags and defaults: the wire page, "Command line".
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import math
import os
import shlex
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import msgspec

from areal_fast import __version__

DEFAULT_ADMIN_KEY = "areal-admin-key"
EMBEDDED = "embedded"
BYTE_TOKENIZER = "builtin:bytes"
MIN_ARENA_BYTES = 16 << 20
ARENA_SHARE = 0.05
FOR_EVER_S = 1e9
"""Thirty years. In nanoseconds, and added to any clock, it still is a 64-bit number."""
END_ARENA_BYTES = 1 << 40
"""Sizes below it are what the core can count."""
MAX_WORKERS = 24
CUDA_LIBRARY = "libcuda.so.1"
LOG_LEVELS = ("trace", "debug", "info", "warning", "error", "critical")


class UsageError(Exception):
    """A command line that cannot be obeyed. str() is the one line for the user; exit status 2."""


BODY_BYTES = (1 << 30) + (16 << 20)
"""Default limit of a request body where the arena is large: a raw shard of 1 GiB and its header."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One run's settings. Times in seconds, sizes in bytes."""

    host: str = "0.0.0.0"
    port: int = 8082
    serving_addr: str = ""
    """HOST:PORT as written into shards; filled in once the socket is bound."""
    backend_addr: str = "http://localhost:30000"
    """Base URL of the engine, "" for none. "embedded" until the supervisor has started that engine."""
    backend_embedded: bool = False
    backend_type: str = "sglang"
    tokenizer_path: str = ""
    trust_remote_code: bool = False
    log_level: str = "warning"
    request_timeout_s: float = 120.0
    set_reward_finish_timeout_s: float = 0.0
    session_timeout_s: float = 3600.0
    session_timeout_given: bool = False
    """Without a dump path, sessions that hold interactions expire only if the flag was given."""
    cleanup_interval_s: float = 60.0
    dump_path: str = ""
    admin_api_key: str = DEFAULT_ADMIN_KEY
    callback_server_addr: str = ""
    tool_call_parser: str = "qwen"
    reasoning_parser: str = "qwen3"
    engine_max_tokens: int | None = None
    chat_template_type: str = "hf"
    deterministic_sampling: bool = False
    areal_dialect: str = "1.0"
    workers: int = 1
    arena_max_bytes: int = 256 << 20
    shard_ttl_s: float = 86400.0
    gpu_pool_bytes: int = -1
    """Device memory for GPU shards, taken when the first one is offered. -1: 2 % of the device's; 0: none."""
    cuda_library: str = CUDA_LIBRARY
    data_auth: bool = False
    max_body_bytes: int = BODY_BYTES
    drain_s: float = 10.0
    hang_timeout_s: float = 10.0
    start_timeout_s: float = 60.0
    lifeline_fd: int = -1
    """Inherited end of a stream socket pair whose end of file stops the proxy (service/lifeline.py)."""
    external_models: dict[str, dict[str, str | None]] = {}
    """Registered while running (service/external.py), by name: url, model, api_key. No flag sets it."""

    @property
    def has_engine(self) -> bool:
        return bool(self.backend_addr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _number(kind: Callable[[str], float], low: float, *, above: bool = False) -> Callable[[str], float]:
    """A converter for argparse: `kind`, finite, ≥ low (or > low). Seconds beyond FOR_EVER_S are that."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            wanted = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        if value < low or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text} must be {'>' if above else '>='} {low:g}")
        return min(value, FOR_EVER_S) if kind is float else value

    return convert


def _port(text: str) -> int:
    value = int(_number(int, 0)(text))
    if value > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port number")
    return value


def _size(text: str) -> int:
    """Bytes, with an optional K, M, G or T (powers of 1024)."""
    digits, shift = text.strip().upper().removesuffix("B").removesuffix("I"), 0
    if digits and digits[-1] in "KMGT":
        shift = 10 * ("KMGT".index(digits[-1]) + 1)
        digits = digits[:-1]
    try:
        value = int(float(digits) * (1 << shift))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size (bytes, or with K, M, G)") from None
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} must be > 0")
    return value


def _size_or_none(text: str) -> int:
    """As _size, and 0."""
    return 0 if text.strip() == "0" else _size(text)


def _parser(prog: str) -> argparse.ArgumentParser:
    positive, non_negative, count = _number(float, 0, above=True), _number(float, 0), _number(int, 1)
    p = _Parser(
        prog=prog,
        description="The proxy between RL agents and an inference engine: it records every interaction.",
        epilog="Other commands, each with --help: areal-fast demo, top, dumps, embedded.",
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--version", action="version", version=f"areal-fast {__version__}")
    add("--host", default="0.0.0.0", help="address to listen on, IPv4 or IPv6")
    add("--port", type=_port, default=8082, help="0: any free one, printed at the start")
    add("--backend-addr", default=None, help="URL of the engine, '' for none, or 'embedded'")
    add("--backend-type", default="sglang", choices=("sglang", "vllm"))
    add("--tokenizer-path", default=None, help="a Hugging Face tokenizer folder, or builtin:bytes")
    add("--trust-remote-code", action="store_true", help="allow a tokenizer folder's own code")
    add("--log-level", default="warning", type=str.lower, choices=LOG_LEVELS)
    add("--request-timeout", type=positive, default=120.0, help="seconds, one engine call")
    add("--set-reward-finish-timeout", type=non_negative, default=0.0, help="seconds")
    add("--session-timeout-seconds", type=positive, default=None, help="default 3600")
    add("--stale-session-cleanup-interval-seconds", type=positive, default=60.0)
    add("--stale-session-dump-path", default="", help="folder for dumps of stale sessions")
    add("--admin-api-key", default=DEFAULT_ADMIN_KEY)
    add("--callback-server-addr", default="", help="URL to tell of ready trajectories, '' for none")
    add("--tool-call-parser", default="qwen", help="a format's name, none, sglang:NAME or vllm:NAME")
    add("--reasoning-parser", default="qwen3", help="whose tags reasoning has, or none")
    add("--engine-max-tokens", type=count, default=None, help="cap on prompt + answer")
    add("--chat-template-type", default="hf", choices=("hf", "concat"))
    add("--deterministic-sampling", action="store_true", help="seeds derived from the session's identity")
    add("--areal-dialect", default="auto", choices=("auto", "pr1268", "main-may", "1.0", "v2"))
    add("--workers", type=count, default=None, help="worker processes; default min(4, usable CPUs)")
    add("--arena-max-bytes", type=_size, default=None, help="shared memory limit; default 5%% of memory")
    add("--shard-ttl-seconds", type=non_negative, default=86400.0, help="0: shards never expire")
    add(
        "--gpu-pool-bytes",
        type=_size_or_none,
        default=-1,
        help="for GPU shards; default 2%% of a GPU, 0: none",
    )
    add("--data-auth", action="store_true", help="ask for the admin key on /data/*")
    add("--max-body-bytes", type=_size, default=None, help="largest request body; default twice the arena")
    add("--drain-seconds", type=non_negative, default=10.0, help="SIGTERM: time for requests in flight")
    add("--hang-timeout-seconds", type=positive, default=10.0, help="a worker silent so long is replaced")
    add("--start-timeout-seconds", type=positive, default=60.0, help="time for a process to become ready")
    add("--lifeline-fd", type=_number(int, 0), default=-1, help="inherited socket; its end stops the proxy")
    return p


def parse(
    argv: Sequence[str], environ: Mapping[str, str] | None = None, *, prog: str = "areal-fast serve"
) -> tuple[Settings, list[str]]:
    """Settings and the flags that nobody here knows. UsageError: one line, exit status 2."""
    try:
        args, unknown = _parser(prog).parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    embedded = args.backend_addr == EMBEDDED
    backend = "http://localhost:30000" if args.backend_addr is None else args.backend_addr
    tokenizer = args.tokenizer_path
    if tokenizer is None:
        if backend and not embedded:
            raise UsageError("argument --tokenizer-path: required when there is an engine")
        tokenizer = BYTE_TOKENIZER if embedded else ""
    _check_backend(backend, embedded=embedded)
    _check_callback(args.callback_server_addr)
    environment = os.environ if environ is None else environ
    _check_admin_key(args.host, args.admin_api_key, environment)
    workers = int(args.workers or min(4, usable_cpus()))
    if workers > MAX_WORKERS:
        raise UsageError(f"argument --workers: at most {MAX_WORKERS}, not {workers}")
    arena = args.arena_max_bytes or max(int(memory_limit_bytes() * ARENA_SHARE), 4 * MIN_ARENA_BYTES)
    if arena < MIN_ARENA_BYTES:
        raise UsageError(f"argument --arena-max-bytes: at least {MIN_ARENA_BYTES >> 20}M, not {arena} bytes")
    if arena >= END_ARENA_BYTES:
        raise UsageError(f"argument --arena-max-bytes: less than 1T, not {arena} bytes")
    timeout = args.session_timeout_seconds
    settings = Settings(
        host=args.host or "0.0.0.0",
        port=args.port,
        backend_addr=backend.rstrip("/"),
        backend_embedded=embedded,
        backend_type=args.backend_type,
        tokenizer_path=tokenizer_folder(tokenizer, environment),
        trust_remote_code=args.trust_remote_code,
        log_level=args.log_level,
        request_timeout_s=args.request_timeout,
        set_reward_finish_timeout_s=args.set_reward_finish_timeout,
        session_timeout_s=3600.0 if timeout is None else timeout,
        session_timeout_given=timeout is not None,
        cleanup_interval_s=args.stale_session_cleanup_interval_seconds,
        dump_path=args.stale_session_dump_path,
        admin_api_key=args.admin_api_key,
        callback_server_addr=args.callback_server_addr,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
        engine_max_tokens=None if args.engine_max_tokens is None else int(args.engine_max_tokens),
        chat_template_type=args.chat_template_type,
        deterministic_sampling=args.deterministic_sampling,
        areal_dialect=installed_dialect() if args.areal_dialect == "auto" else args.areal_dialect,
        workers=workers,
        arena_max_bytes=arena,
        shard_ttl_s=args.shard_ttl_seconds,
        gpu_pool_bytes=int(args.gpu_pool_bytes),
        cuda_library=cuda_library(environment),
        data_auth=args.data_auth,
        max_body_bytes=args.max_body_bytes or min(2 * arena, BODY_BYTES),
        drain_s=args.drain_seconds,
        hang_timeout_s=args.hang_timeout_seconds,
        start_timeout_s=args.start_timeout_seconds,
        lifeline_fd=int(args.lifeline_fd),
    )
    return settings, unknown


AREAL_MANAGES = ("--host", "--port", "--backend-addr", "--admin-api-key", "--callback-server-addr")
"""What only AReaL's controller can know of a proxy that it launches."""


def areal_switch(environ: Mapping[str, str] | None = None) -> bool:
    """AREAL_FAST: unset, empty or 0 is off, 1 is on. UsageError for anything else."""
    value = (os.environ if environ is None else environ).get("AREAL_FAST", "").strip()
    if value not in ("", "0", "1"):
        raise UsageError(f"AREAL_FAST={value}: 1 is on, 0 or nothing is off")
    return value == "1"


def switch_areal_off() -> None:
    """AREAL_FAST=0 where it was something else, for this process and those it will start."""
    if os.environ.get("AREAL_FAST"):
        os.environ["AREAL_FAST"] = "0"


def areal_arguments(
    options: Mapping[str, str | float | bool | None], environ: Mapping[str, str] | None = None
) -> list[str]:
    """The flags for a proxy that AReaL launches: those of AREAL_FAST_ARGS, then `options` (a flag's name with
    underscores and its value; True for a flag without one, None and False for none). UsageError if the proxy
    would not start with them, does not know one, or AReaL has to choose it."""
    try:
        given = shlex.split((os.environ if environ is None else environ).get("AREAL_FAST_ARGS", ""))
    except ValueError as error:
        raise UsageError(f"AREAL_FAST_ARGS: {error}") from None
    _check_areal_arguments("AREAL_FAST_ARGS", given)
    called: list[str] = []
    for name, value in options.items():
        if value is not None and value is not False:
            flag = "--" + name.replace("_", "-")
            called += [flag] if value is True else [f"{flag}={value}"]
    _check_areal_arguments("enable()", called)
    return [*given, *called]


def _check_areal_arguments(source: str, arguments: Sequence[str]) -> None:
    flags = {argument.partition("=")[0] for argument in arguments}
    refused = sorted(flags & {"-h", "--help", *AREAL_MANAGES})
    if refused:
        raise UsageError(f"{source}: argument {refused[0]}: AReaL's to choose")
    try:
        _, unknown = parse(["--backend-addr", "", "--host", "127.0.0.1", *arguments], {})
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None
    if unknown:
        raise UsageError(f"{source}: the proxy knows no {' '.join(unknown)}")


def cuda_library(environ: Mapping[str, str] | None = None) -> str:
    """The CUDA driver to open: AREAL_FAST_LIBCUDA (a path or name for dlopen), or the system's."""
    return (os.environ if environ is None else environ).get("AREAL_FAST_LIBCUDA") or CUDA_LIBRARY


def tokenizer_folder(path: str, environ: Mapping[str, str]) -> str:
    """`path`, or for a model's name on the Hugging Face hub ("Qwen/Qwen3-8B"), which AReaL's configurations
    may hold instead, the folder of it that a download by anybody here has left. Downloads nothing.

    Source: huggingface_hub's cache: models--ORG--NAME/refs/main names the commit, snapshots/COMMIT is the
    folder; HF_HUB_CACHE, HF_HOME or XDG_CACHE_HOME say where."""
    if not path or path == BYTE_TOKENIZER or path.startswith((".", "/", "~")) or path.count("/") > 1:
        return path
    cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    if not cache:
        home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
        cache = os.path.join(home, "hub")
    model = Path(cache).expanduser() / f"models--{path.replace('/', '--')}"
    try:
        folder = model / "snapshots" / (model / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return path
    return str(folder) if folder.is_dir() and not Path(path).exists() else path


def installed_dialect() -> str:
    """The dialect of the areal beside us: v2 if it has that tree, else 1.0. Looks without importing it."""
    try:
        found = importlib.util.find_spec("areal")
    except (ImportError, ValueError):
        return "1.0"
    folders = (found.submodule_search_locations if found else None) or ()
    return "v2" if any(Path(folder, "v2", "inference_service").is_dir() for folder in folders) else "1.0"


def _check_backend(backend: str, *, embedded: bool) -> None:
    if backend and not embedded and not backend.startswith("http://"):
        raise UsageError(f"argument --backend-addr: {backend!r} is not an http:// URL, '' or 'embedded'")


def _check_callback(address: str) -> None:
    if address and not _is_url(address):
        raise UsageError(f"argument --callback-server-addr: {address!r} is not an http:// or https:// URL")


def _is_url(address: str) -> bool:
    """Whether it can be posted to: http or https, a host, and a port that is one if given."""
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _check_admin_key(host: str, key: str, environ: Mapping[str, str]) -> None:
    """The well-known default key only where nobody else can reach it (as the original does)."""
    if not key:
        raise UsageError("argument --admin-api-key: must not be empty")
    if key != DEFAULT_ADMIN_KEY or environ.get("AREAL_ALLOW_DEFAULT_ADMIN_KEY", "0") == "1":
        return
    address = reachable_host(host)
    if not is_loopback(address):
        known_as = f"{host!r} ({address})" if address != host else repr(host)
        raise UsageError(
            f"argument --admin-api-key: the default key is refused on the non-loopback host {known_as}; "
            "give another one, or set AREAL_ALLOW_DEFAULT_ADMIN_KEY=1 in a trusted network"
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]").split("%", 1)[0]).is_loopback
    except ValueError:
        return False


def reachable_host(host: str) -> str:
    """`host`, or for a wildcard this machine's own address as others would dial it.

    First what its own name resolves to, else the source address of a route outwards (no packet is sent),
    else 127.0.0.1: the order AReaL itself uses, so both write the same node address."""
    if host not in ("", "0.0.0.0", "::"):
        return host
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_UNSPEC, socket.SOCK_DGRAM)
    except OSError:
        found = []
    for family, _, _, _, sockaddr in found:
        address = str(sockaddr[0])
        if family in (socket.AF_INET, socket.AF_INET6) and not is_loopback(address):
            return address
    for family, probe in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.connect((probe, 9))
                address = str(sock.getsockname()[0])
        except OSError:
            continue
        if not is_loopback(address):
            return address
    return "127.0.0.1"


def hostport(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def usable_cpus() -> int:
    """CPUs this process may run on: its affinity, capped by its cgroup's quota; at least 1."""
    cpus = len(os.sched_getaffinity(0))
    for folder in _cgroups("cpu"):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                cpus = min(cpus, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):
            continue
    return max(cpus, 1)


def memory_limit_bytes() -> int:
    """The machine's memory or the tightest limit of a cgroup this process is in, whichever is less."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _cgroups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                limit = min(limit, int((folder / name).read_text()))
            except (OSError, ValueError):
                continue
    return limit


def _cgroups(controller: str) -> list[Path]:
    """This process's cgroup folders for a controller (v1 or v2), with their ancestors, as far as visible."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup", controller if controllers else "")
        at = root / path.lstrip("/")
        while at.is_relative_to(root):
            folders.append(at)
            if at == root:
                break
            at = at.parent
    return folders


def python_command(module: str) -> list[str]:
    """How this package starts one of its own processes: same interpreter, same warnings filters."""
    return [sys.executable, *(f"-W{option}" for option in sys.warnoptions), "-m", module]


def wants_color(environ: Mapping[str, str] | None = None) -> bool:
    """Whether a terminal may be written to in colours. Source: no-color.org."""
    environ = os.environ if environ is None else environ
    return not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def child_environment() -> dict[str, str]:
    """The environment of a child: one thread for libraries that would start one a CPU."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
