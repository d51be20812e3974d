"""Runs inside `.venv-areal`: AReaL's own RTensor over our backend, one scenario a run.

    python areal_rtensor.py node                  serves AReaL's own shard storage; prints its port
    python areal_rtensor.py exact PROXY NODE      every dtype through both backends, from both kinds of node
    python areal_rtensor.py cycles PROXY          1,000 lives of a shard; this process's memory meanwhile
    python areal_rtensor.py ray PROXY             Ray's object store beside ours
    python areal_rtensor.py ray_nodes             a proxy's shards through Ray's store, on another node

The checkout must be on PYTHONPATH. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import uuid
import warnings
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402
from areal.infra.rpc import rtensor  # noqa: E402
from areal.infra.rpc.rtensor import RTensor, TensorShardInfo  # noqa: E402

from areal_fast.integrations.rtensor import AReaLFastBackend, enable_rtensor  # noqa: E402

CYCLES, CYCLE_BYTES = 1000, 1 << 18


def tensors() -> dict[str, torch.Tensor]:
    """Of every dtype that AReaL's own JSON carries; awkward shapes and values among them."""
    torch.manual_seed(1)
    made = {
        "float32": torch.randn(3, 5),
        "float64": torch.randn(2, 2, dtype=torch.float64),
        "bfloat16": torch.tensor([0.1, -2.5, float("inf"), float("nan"), 1e-40]).to(torch.bfloat16),
        "int64": torch.arange(-3, 9).reshape(3, 4),
        "int32": torch.arange(4, dtype=torch.int32),
        "int16": torch.arange(4, dtype=torch.int16),
        "int8": torch.arange(-4, 4, dtype=torch.int8),
        "uint8": torch.arange(4, dtype=torch.uint8),
        "bool": torch.tensor([[True, False], [False, True]]),
        "scalar": torch.tensor(7.25),
        "empty": torch.empty(0, 4),
        "large": torch.randn(700, 1000),
    }
    return made


def bits(tensor: torch.Tensor) -> tuple[str, list[int], bytes]:
    """dtype, shape and bytes; every NaN the same, since torch itself narrows one to 0x7fc0 or 0xffff as the
    tensor's length has it."""
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    flat = tensor.contiguous().view(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return str(tensor.dtype), list(tensor.shape), data


def node() -> None:
    from areal.infra.rpc.guard.data_blueprint import data_bp
    from flask import Flask
    from werkzeug.serving import make_server

    app = Flask("node")
    app.register_blueprint(data_bp)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    print(json.dumps({"port": server.server_port}), flush=True)
    server.serve_forever()


def exact(proxy: str, their_node: str) -> dict[str, Any]:
    """Names of tensors that our backend and the original's do not both give as they were."""
    import httpx
    import orjson
    from areal.infra.rpc.serialization import serialize_value

    ours, theirs = AReaLFastBackend(proxy), rtensor.HttpRTensorBackend()
    report: dict[str, Any] = {}
    for place, address in (("proxy", proxy), ("node", their_node)):
        infos, made = [], tensors()
        for tensor in made.values():
            if place == "proxy":
                infos.append(TensorShardInfo(ours.store(tensor), address))
            else:
                shard_id = str(uuid.uuid4())
                body = orjson.dumps(serialize_value(tensor))
                httpx.put(f"http://{address}/data/{shard_id}", content=body).raise_for_status()
                infos.append(TensorShardInfo(shard_id, address))
        mine, original = ours.fetch(infos), theirs.fetch(infos)
        report[place] = [
            name
            for name, true, a, b in zip(made, made.values(), mine, original, strict=True)
            if not bits(true) == bits(a) == bits(b)
        ]
        report[f"{place} ways"] = dict(ours.client.ways)
        asyncio.run(ours.delete(address, [info.shard_id for info in infos]))
        try:
            ours.fetch(infos[:1])
        except RuntimeError as error:
            report[f"{place} gone"] = "not found" in str(error)
    return report


def cycles(proxy: str) -> dict[str, Any]:
    backend = enable_rtensor(proxy, buffer_bytes=4 * CYCLE_BYTES)
    source = {"x": [torch.ones(CYCLE_BYTES // 4), (torch.arange(3),)], "text": "kept"}
    report: dict[str, Any] = {"wrong": 0}
    for number in range(CYCLES):
        remote = RTensor.remotize(source, node_addr=proxy)
        local = RTensor.localize(remote)
        report["wrong"] += not (
            torch.equal(local["x"][0], source["x"][0]) and torch.equal(local["x"][1][0], source["x"][1][0])
        )
        # cleared on the node only, as by another process: what this one has buffered must not add up
        for address, ids in RTensor.collect_shards(remote).items():
            asyncio.run(backend.delete(address, ids))
        if number == CYCLES // 5:
            report["early"] = resident_bytes()
    del remote, local
    report["late"] = resident_bytes()
    report["buffered_bytes"] = rtensor._fetch_buffer.nbytes
    remote = RTensor.remotize(source, node_addr=proxy)
    RTensor.localize(remote)
    report["buffered before clearing"] = rtensor.fetch_buffer_stats()["num_entries"]
    for address, ids in RTensor.collect_shards(remote).items():
        asyncio.run(RTensor.clear_node(address, ids))
    rtensor.clear_fetch_buffer()
    report["buffered at the end"] = rtensor.fetch_buffer_stats()["num_entries"]
    return report


def resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))


def with_ray(proxy: str) -> dict[str, Any]:
    import ray

    own = AReaLFastBackend().store(torch.full((2,), 5.0))  # Ray is not up yet: this process's storage
    size = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 << 20}
    ray.init(address="local", log_to_driver=False, **size)
    try:
        enable_rtensor()
        remote = RTensor.remotize([torch.arange(4), torch.ones(2)], node_addr="")
        elsewhere = AReaLFastBackend(proxy).store(torch.tensor([9]))
        mixed = [
            *remote,
            RTensor(TensorShardInfo(elsewhere, proxy), torch.empty(1, dtype=torch.int64, device="meta")),
            RTensor(TensorShardInfo(own, ""), torch.empty(2, device="meta")),
        ]
        values = [tensor.tolist() for tensor in RTensor.localize(mixed)]
        for address, ids in RTensor.collect_shards(mixed).items():
            asyncio.run(RTensor.clear_node(address, ids))
        return {
            "own": type(own).__name__,
            "kinds": [type(one.shard.shard_id).__name__ for one in mixed],
            "values": values,
            "left": rtensor.storage_stats()["num_tensors"],
        }
    finally:
        ray.shutdown()


def ray_nodes() -> dict[str, Any]:
    import ray
    from ray.cluster_utils import Cluster

    from areal_fast.integrations.ray import start_proxies

    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        here = ray.get_runtime_context().get_node_id()
        other = next(row["NodeID"] for row in ray.nodes() if row["NodeID"] != here)
        flags = ["--backend-addr", "embedded", "--workers", "1", "--arena-max-bytes", "64M"]
        (proxy,) = start_proxies([*flags, "--admin-api-key", "key"], nodes=[other])
        backend = enable_rtensor(through_ray=[proxy])
        made = [torch.randn(300, 300), torch.arange(5), torch.randn(1 << 15).to(torch.bfloat16)]
        there = AReaLFastBackend(proxy.address)
        ids = [there.store(tensor) for tensor in made]
        remote = [
            RTensor(TensorShardInfo(one, proxy.address), torch.empty_like(tensor, device="meta"))
            for one, tensor in zip(ids, made, strict=True)
        ]
        local = RTensor.localize(remote)
        report: dict[str, Any] = {
            "equal": [bits(a) == bits(b) for a, b in zip(local, made, strict=True)],
            "by http": dict(backend.client.ways),
        }
        for address, gone in RTensor.collect_shards(remote).items():
            asyncio.run(RTensor.clear_node(address, gone))
        report["left in ray"] = ray.get(proxy.actor.forget.remote(ids))
        try:
            backend.fetch([one.shard for one in remote])
        except RuntimeError as error:
            report["gone"] = "not found" in str(error)
        report["stopped"] = proxy.stop()
        return report
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    scenarios = {"node": node, "exact": exact, "cycles": cycles, "ray": with_ray, "ray_nodes": ray_nodes}
    print(json.dumps(scenarios[sys.argv[1]](*sys.argv[2:])))
