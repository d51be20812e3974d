"""What does a long conversation cost? CPU and throughput of a chat by the messages before it, ours beside
the original.

    python -m benchmarks conversation_length [--rounds 3] [--quick] [--only ours] [--messages N …]

Every chat repeats a history that the proxy has seen (40 tokens a message) and says about 20 tokens that it
has not; 64 tokens are answered. So what is new is the same throughout, and what grows is what is repeated: as
bytes in the agent's request, and as ids in the engine's, which no proxy can leave out. `us_a_message` is what
a further message costs between the shortest and the longest, in CPU microseconds.
"""

from __future__ import annotations

import contextlib
import statistics
from typing import Any

from benchmarks import per_request
from benchmarks.command import Progress, begun, flags, kept, parsed
from benchmarks.scenarios import Prepared, Scenario, chats
from benchmarks.targets import CONNECTIONS, Target, engine, proxy, step_aside

LENGTHS = (2, 5, 10, 20, 50, 100, 200)
TOKENS_A_MESSAGE = 40
FRESH = 20


def scenario(messages: int) -> Scenario:
    def prepare(target: Target, count: int) -> Prepared:
        return chats(target, count, messages, messages * TOKENS_A_MESSAGE, FRESH)

    return prepare, 1_600, max(24, 160 - messages // 2)


def steps(by_length: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What the longest costs over the shortest, and a further message, in CPU microseconds."""
    lengths = sorted(map(int, by_length))
    first, last = (by_length[str(length)]["cpu_ms"] for length in (lengths[0], lengths[-1]))
    return {
        "last_over_first": last / first,
        "us_a_message": 1000 * (last - first) / (lengths[-1] - lengths[0]),
    }


def run(lengths: list[int], whose: list[str], rounds: int, quick: bool) -> dict[str, Any]:
    step_aside()
    measured: dict[str, dict[int, list[dict[str, float]]]] = {name: {} for name in whose}
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(engine())
        targets = [stack.enter_context(proxy(name, backend, *per_request.ARENA)) for name in whose]
        said = Progress(rounds * len(lengths) * len(targets))
        for number in range(rounds):
            for length in lengths:
                for target in targets[:: -1 if number % 2 else 1]:
                    one = per_request.measure(target, scenario(length), quick, CONNECTIONS)
                    measured[target.name].setdefault(length, []).append(one)
                    said(
                        f"{length:4} messages {target.name:9}{one['cpu_ms']:9.3f} ms CPU "
                        f"{one['per_second']:7.0f}/s p99 {one['p99_ms']:7.2f} ms"
                    )
    return {
        name: {str(length): per_request.summary(found) for length, found in by_length.items()}
        for name, by_length in measured.items()
    }


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--messages", type=int, action="append", help="of these lengths")
    parser.add_argument("--only", choices=("ours", "original"), help="one proxy alone")
    arguments = parsed(parser)
    lengths = arguments.messages or list(LENGTHS if not arguments.quick else LENGTHS[::3])
    whose = [arguments.only] if arguments.only else ["ours", "original"]
    result = begun("conversation_length", arguments, tokens_a_message=TOKENS_A_MESSAGE, fresh=FRESH)
    result["targets"] = run(lengths, whose, arguments.rounds, arguments.quick)
    result["growth"] = {name: steps(found) for name, found in result["targets"].items()}
    print(
        f"{'messages':9}"
        + "".join(f"{name + ', CPU ms':>18}{'/s':>8}" for name in whose)
        + "   CPU, times ours"
    )
    for length in map(str, lengths):
        line = f"{length:9}"
        for name in whose:
            one = result["targets"][name][length]
            line += f"{one['cpu_ms']:18.3f}{one['per_second']:8.0f}"
        if len(whose) == 2:
            mine, theirs = (result["targets"][name][length]["rounds"] for name in whose)
            found = [b["cpu_ms"] / a["cpu_ms"] for a, b in zip(mine, theirs, strict=True)]
            line += f"   {statistics.median(found):.1f}× [{min(found):.1f}, {max(found):.1f}]"
        print(line)
    for name, found in result["growth"].items():
        print(f"{name}: the longest costs {found['last_over_first']:.1f}× the shortest; "
              f"{found['us_a_message']:.2f} µs a further message")  # fmt: skip
    kept(result)


if __name__ == "__main__":
    main()
