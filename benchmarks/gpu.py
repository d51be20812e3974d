"""GPU shards on this machine's first GPU: put, get and hold against a plain device copy of the same size, and
what the driver does where its documentation is silent (gpu_questions.py).

    python -m benchmarks gpu [--rounds 50] [--fake]

Method. A whole proxy with its keeper; one client in this process, which has a context on the GPU. For each
size, in interleaved rounds, wall time of:

    copy       cuMemcpyDtoD within this process, waited for: the yardstick
    put, get   the keeper's own client: reserve, copy in, commit; lease, copy out, release
    lease      lease and release, no copy
    c.put, c.get, c.hold   the same three through areal_fast.client, which finds the way by itself
    map, raw   the same shard read in host memory: the keeper's copy, mapped or over HTTP

A row has each one's median and quartiles, and for put, get, c.put and c.get the share of the copy's
bandwidth: the median over the rounds of copy / it. GB/s counts each byte once, though a device copy reads and
writes it. The result is kept in results/, with the machine, the card, the driver and the commit. Where there
is no GPU it says why and keeps nothing. `--fake` runs on the fake driver, whose memory is the host's: that
shows the protocol's cost and that this program works, no bandwidth, and is kept nowhere.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from areal_fast.client import Client, DeviceArray
from areal_fast.config import cuda_library
from areal_fast.core._cuda import KIND_HANDLE, CudaError, Device, Driver
from areal_fast.shards.gpu import GpuClient
from benchmarks import gpu_questions, machine
from tests import fakecuda
from tests.e2e.running import ADMIN, Proxy

SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20)
FAKE_SIZES = SIZES[:3]
COPIES = ("put", "get", "c.put", "c.get")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--fake", action="store_true", help="on the fake driver: the protocol's cost alone")
    flags = parser.parse_args()
    library = fakecuda.library() if flags.fake else cuda_library()
    os.environ["AREAL_FAST_LIBCUDA"] = library  # for the client, the proxy and the programs of the questions
    try:
        driver = Driver(library)
        device = driver.open(0)
    except CudaError as error:
        print(f"no GPU to measure: {error}")
        return 0
    sizes = FAKE_SIZES if flags.fake else SIZES
    pool = max(4 * sizes[-1], 64 << 20)
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "machine": machine.described(),
        "gpu": {"name": driver.name(0), "driver": driver.version, "fake": flags.fake},
        "rounds": flags.rounds,
        "answers": gpu_questions.answered(library, device),
    }
    with Proxy(
        "--gpu-pool-bytes", str(pool), "--arena-max-bytes", str(2 * pool), "--log-level", "warning",
        environment={"AREAL_FAST_LIBCUDA": library}, workers=1, log_level="warning",
    ) as proxy:  # fmt: skip
        result["rows"] = [measured(proxy, device, nbytes, flags.rounds) for nbytes in sizes]
    shown(result)
    if not flags.fake:
        print("kept in", machine.keep("gpu", result).relative_to(machine.RESULTS.parent))
    return 0


def measured(proxy: Proxy, device: Device, nbytes: int, rounds: int) -> dict[str, Any]:
    """One size's row: {"bytes": n, "us": {what: [lower quartile, median, upper quartile]}, "of_copy": …}."""
    source, target = device.alloc(nbytes), device.alloc(nbytes)
    scratch = device.create_pool(nbytes, KIND_HANDLE)
    array = DeviceArray(source, "uint8", (nbytes,))
    url = f"http://127.0.0.1:{proxy.port}"
    socket = proxy.ask("POST", "/data/gpu", {}).json["socket"]
    with (
        GpuClient.connect(socket, device.driver.path) as keeper,
        Client(url, ADMIN) as client,
        Client(url, ADMIN, ways=("map",)) as mapping,
        Client(url, ADMIN, ways=("raw",)) as reading,
    ):
        what: dict[str, Callable[[], object]] = {
            "copy": lambda: scratch.copy_in(0, source, nbytes),
            "put": lambda: keeper.put("k", source, "uint8", (nbytes,)),
            "get": lambda: keeper.get_into("k", target, nbytes),
            "lease": lambda: keeper.map("k").release(),
            "c.put": lambda: expect(client.put(array, "c").way, "gpu"),
            "c.get": lambda: expect(client.get("c").way, "gpu"),
            "c.hold": lambda: client.get("c", hold=True).release(),
            "map": lambda: expect(mapping.get("c").way, "map"),
            "raw": lambda: expect(reading.get("c").way, "raw"),
        }
        times: dict[str, list[float]] = {key: [] for key in what}
        for number in range(rounds + 1):
            for key, call in what.items():
                begun = time.perf_counter()
                call()
                if number:  # the first is for warming up
                    times[key].append((time.perf_counter() - begun) * 1e6)
        client.delete(["c", "k"])
    device.free(source)
    device.free(target)
    share = {
        key: statistics.median(c / t for c, t in zip(times["copy"], times[key], strict=True))
        for key in COPIES
    }
    quartiles = {key: statistics.quantiles(found, n=4) for key, found in times.items()}
    return {"bytes": nbytes, "us": quartiles, "of_copy": share}


def expect(way: str, wanted: str) -> None:
    """A figure of one way must not be another's."""
    if way != wanted:
        raise RuntimeError(f"a shard went by {way}, not by {wanted}")


def shown(result: dict[str, Any]) -> None:
    gpu = result["gpu"]
    print(f"{gpu['name']}, driver {gpu['driver']}, {result['rounds']} rounds; µs, median (quartiles), GB/s")
    for row in result["rows"]:
        print(f"{row['bytes'] >> 10} KiB")
        for what, (low, middle, high) in row["us"].items():
            speed = "" if what in ("lease", "c.hold") else f"  {row['bytes'] / middle / 1e3:.2f} GB/s"
            share = f"  {row['of_copy'][what]:.0%} of copy" if what in row["of_copy"] else ""
            print(f"  {what:7} {middle:9.0f} ({low:.0f} to {high:.0f}){speed}{share}")
    print(json.dumps(result["answers"], indent=1))


if __name__ == "__main__":
    sys.exit(main())
