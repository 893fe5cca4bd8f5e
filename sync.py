"""The vLLM process and its weights: start it, wait for it, stop it, send it the trainer's weights.

`python sync.py @ config.toml` runs the server alone, as vf-vllm does for verifiers. Weights travel
by vLLM's own RL API, on GPUs through its NCCL engine; for CPUs, where vLLM has none, a small engine
over gloo is registered. These routes let a caller run code: a server started here listens on
127.0.0.1 unless [inference.args] host says otherwise.
"""
import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import requests
import torch
from torch import Tensor

# When the trainer ends, however it ends, its end of the pipe closes: kill the server's whole group.
GUARD = 'exec 3<&0; (read line <&3; kill -9 0) & exec "$@" </dev/null 3<&-'
LOCAL_HOSTS = ("0.0.0.0", "127.0.0.1", "localhost")


def server_command(model: str, port: int, gpus: int, args: dict) -> list[str]:
    """vLLM's OpenAI server for RL, gpus = 0: on the CPU. args: any flags, JSON-encoded or --no-."""
    defaults = {"model": model, "port": port, "host": "127.0.0.1",
                "logprobs_mode": "processed_logprobs",
                "weight_transfer_config": {"backend": "nccl" if gpus else "gloo"}}
    if not gpus:
        defaults["worker_extension_cls"] = "sync.GlooWorkerExtension"
        # vLLM 0.32 crashes on a CPU when the prefill of a request with a seed is chunked
        defaults["enable_chunked_prefill"] = False
    elif gpus > 1 and not {"tensor_parallel_size", "data_parallel_size"} & args.keys():
        defaults["tensor_parallel_size"] = gpus
    # not the `vllm` command: the CPU package's does not work
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for key, value in {**defaults, **args}.items():
        flag = ("--no-" if value is False else "--") + key.replace("_", "-")
        text = value if isinstance(value, str) else json.dumps(value)
        command += [flag] if isinstance(value, bool) else [flag, text]
    return command


@contextlib.contextmanager
def run_server(command: list[str], gpus: int, log_path: Path) -> Iterator[subprocess.Popen]:
    """A vLLM server of our own while the context lasts; its output goes to log_path."""
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ,
           "VLLM_SERVER_DEV_MODE": "1",  # the RL routes
           "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}  # sync.py
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(gpus)))
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with open(log_path, "w") as log:  # a session of its own: Ctrl-C reaches us alone
        process = subprocess.Popen(["sh", "-c", GUARD, "sh", *command], env=env, stdout=log,
                                   stderr=log, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what is left of its process group
        process.wait(20)


def is_healthy(url: str) -> bool:
    """Whether a server answers its health route right now."""
    try:
        return requests.get(f"{url}/health", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def wait_until_healthy(url: str, timeout: float, process: subprocess.Popen | None = None,
                       log_path: Path | None = None) -> None:
    """Raises TimeoutError naming the URL, or RuntimeError if our own server died meanwhile."""
    start = time.monotonic()
    while not is_healthy(url):
        waited = time.monotonic() - start
        if process is not None and process.poll() is not None:
            lines = log_path.read_text(errors="replace").strip().splitlines()
            errors = " | ".join(([line for line in lines if "rror" in line] or lines)[-3:])
            raise RuntimeError(f"vLLM ended with code {process.returncode} ({log_path}): {errors}")
        if waited > timeout:
            raise TimeoutError(f"no vLLM server at {url} in vllm_server_timeout = {timeout:.0f} s; "
                               "start one with `python sync.py @ CONFIG`")
        if int(waited) % 5 == 0:
            print(f"waiting for the vLLM server at {url} ({waited:.0f} s)", flush=True)
        time.sleep(1)


class CheckpointSource:
    """The model's weights under their checkpoint names, layer by layer (a vLLM WeightSource).

    Parameter names differ from these for many families; transformers knows the way back. Tied
    weights go under every name: without lm_head vLLM would keep its old one. dtype: on the wire.
    """

    def __init__(self, model, dtype: torch.dtype | None = None):
        self.model, self.dtype = model, dtype

    @functools.cache  # names and shapes stay; the tensors are materialized for them only once
    def metadata(self) -> list:
        """(name, dtype, shape) of all that iteration yields."""
        from vllm.distributed.weight_transfer import ParamMeta
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, tensor); one layer at a time exists as a copy."""
        from transformers.core_model_loading import revert_weight_conversion
        layers: dict[str, dict] = {}  # no conversion reaches across layers
        for name, p in self.model.named_parameters(remove_duplicate=False):
            layers.setdefault(re.match(r".*?\.\d+\.|", name).group(), {})[name] = p
        for layer in layers.values():
            full = {k: getattr(p, "full_tensor", p.detach)().detach() for k, p in layer.items()}
            for name, tensor in revert_weight_conversion(self.model, full).items():
                yield name, tensor.to(self.dtype or tensor.dtype).contiguous()


class WeightSync:
    """Sends the trainer's weights to a vLLM server, by "nccl" (GPU to GPU) or "gloo" (CPU).

    Meets every worker in a new group, after shutting down one that an earlier trainer left. Every
    failure raises: nobody trains on with stale weights.
    """

    def __init__(self, url: str, source: CheckpointSource, backend: str, timeout: float):
        from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, nccl_engine
        self.url, self.timeout, server = url, timeout, urlsplit(url)
        self.call("shutdown_weight_transfer_engine")
        with socket.create_connection((server.hostname, server.port), timeout) as connection:
            address = connection.getsockname()[0]  # ours, as the server can reach it
        with socket.create_server((address, 0)) as probe:
            port = probe.getsockname()[1]
        workers = self.call("get_world_size", method="get")["world_size"]
        engine = (register_gloo() if backend == "gloo"
                  else nccl_engine.NCCLTrainerWeightTransferEngine)
        self.engine = engine.trainer_init(
            nccl_engine.NCCLTrainerInitInfo(address, port, workers + 1, rank=0),
            client=HTTPVLLMWeightSyncClient(url, timeout), source=source)

    def send(self, version: int) -> None:
        """One whole update, checked by weight_version. Requests in flight go on, with new weights.

        Every cache goes: image features are keyed by the image alone, not by the vision tower.
        """
        self.call("pause?mode=keep")
        self.engine.send_weights()
        self.call("update_weight_version", {"new_version": str(version)})
        for cache in ("prefix_cache?reset_running_requests=true", "mm_cache", "encoder_cache"):
            self.call(f"reset_{cache}")
        self.call("resume")
        served = self.call("weight_info", method="get")["weight_version"]
        if served != str(version):
            raise RuntimeError(f"{self.url} serves weights {served!r}, {version} was sent")

    def call(self, route: str, body: dict | None = None, method: str = "post") -> dict:
        """One HTTP call; raises requests.RequestException."""
        response = requests.request(method, f"{self.url}/{route}", json=body, timeout=self.timeout)
        response.raise_for_status()
        return response.json() if response.content else {}


@functools.cache
def register_gloo() -> type:
    """Register vLLM's NCCL engine with another transport as "gloo"; returns the trainer's side."""
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory, nccl_engine

    def join(info, rank: int):
        return stateless_init_torch_distributed_process_group(
            info.master_address, info.master_port, rank, info.world_size, "gloo",
            timeout=timedelta(seconds=300))

    class GlooEngine(nccl_engine.NCCLWeightTransferEngine):
        def init_transfer_engine(self, info) -> None:
            config = self.parallel_config
            rank = config.data_parallel_index * config.world_size + config.rank
            self.model_update_group = join(info, rank + info.rank_offset)

        def receive_weights(self, info) -> None:
            for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
                weight = torch.empty(shape, dtype=getattr(torch, dtype))
                self.model_update_group.broadcast(weight, 0).wait()
                self.model.load_weights([(name, weight)])

        def shutdown(self) -> None:
            self.model_update_group = None

    class GlooTrainerEngine(nccl_engine.NCCLTrainerWeightTransferEngine):
        @classmethod
        def trainer_init(cls, info, *, client, source):
            engine = cls(client=client, source=source)
            worker = {"master_address": info.master_address, "master_port": info.master_port,
                      "rank_offset": 1, "world_size": info.world_size}
            with ThreadPoolExecutor(1) as pool:  # both sides must rendezvous together
                joined = pool.submit(client.init_weight_transfer_engine, worker)
                engine.model_update_group = join(info, 0)
                joined.result()
            return engine

        def _broadcast(self, source, meta) -> None:
            for _, tensor in self._checked_iter(source, meta):
                self.model_update_group.broadcast(tensor, 0).wait()

    WeightTransferEngineFactory.register_engine("gloo", GlooEngine)
    return GlooTrainerEngine


def __getattr__(name: str):
    """vLLM's workers look up sync.GlooWorkerExtension; only then is vLLM imported here."""
    if name == "GlooWorkerExtension":
        register_gloo()
        return type(name, (), {})
    raise AttributeError(f"module 'sync' has no attribute {name!r}")


if __name__ == "__main__":
    from train import command_line, start_server
    config = command_line("sync.py")
    with start_server(config) as server:
        print(f"serving {config.model} at {config.url}; Ctrl-C stops it", flush=True)
        sys.exit(server.wait())
