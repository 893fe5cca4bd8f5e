"""The vLLM process and its weights: start, wait, stop; and send it the trainer's new weights.

`python sync.py @ config.toml` runs the server alone, as `vf-vllm` does for verifiers. The weights
travel by vLLM's own RL API, which on GPUs is its NCCL trainer engine. vLLM has no engine for
CPUs, so this module registers a small one that broadcasts over gloo and reuses the rest.

These routes let a caller replace weights and run code, so the server that is started here
listens on 127.0.0.1 unless [inference.args] host says otherwise.
"""
import ctypes
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
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import requests
import torch

LOCAL_HOSTS = ("0.0.0.0", "127.0.0.1", "localhost", "::1")


def server_url(host: str, port: int) -> str:
    """0.0.0.0 is where a server listens, not where a client can connect."""
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def server_command(model: str, port: int, backend: str, args: dict, gpus: int) -> list[str]:
    """The command that starts vLLM's OpenAI server for RL; args are any vLLM flags.

    True becomes --flag, False --no-flag, tables and lists are JSON-encoded.
    """
    defaults = {"host": "127.0.0.1", "logprobs_mode": "processed_logprobs",
                "weight_transfer_config": {"backend": backend}}
    if backend == "gloo":
        defaults["worker_extension_cls"] = "sync.GlooWorkerExtension"
        # vLLM 0.32 crashes on a CPU when the prefill of a request with a seed is chunked
        defaults["enable_chunked_prefill"] = False
    elif gpus > 1 and not {"tensor_parallel_size", "data_parallel_size"} & args.keys():
        defaults["tensor_parallel_size"] = gpus
    # not the `vllm` command: the CPU package's does not work
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server",
               "--model", model, "--port", str(port)]
    for key, value in {**defaults, **args}.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
            command += [f"--{flag}", text]
    return command


class VLLMServer:
    """A vLLM server process of our own; a context manager that always stops it.

    Its output goes to log_path. Raises RuntimeError with the end of that log if it dies.
    """

    def __init__(self, command: list[str], url: str, log_path: Path, visible_gpus: str | None):
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ,
               "VLLM_SERVER_DEV_MODE": "1",  # the RL routes
               "PYTHONPATH": os.pathsep.join(filter(None, [  # workers import this module
                   str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))}
        if visible_gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = visible_gpus
        self.url, self.log_path = url, log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(log_path, "w") as log:
            # a session of its own: Ctrl-C reaches us alone, and we stop the whole group
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log,
                                            start_new_session=True, preexec_fn=die_with_parent)

    def __enter__(self) -> "VLLMServer":
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def alive(self) -> bool:
        """False, or RuntimeError with the reason, once the process has ended."""
        if self.process.poll() is None:
            return True
        tail = self.log_path.read_text(errors="replace").strip().splitlines()
        errors = [line for line in tail if "rror" in line][-3:] or tail[-3:]
        raise RuntimeError(f"the vLLM server ended with code {self.process.returncode} (log: "
                           f"{self.log_path}): " + " | ".join(line.strip() for line in errors))

    def stop(self) -> None:
        """SIGTERM to the server, then SIGKILL to what is left of its process group."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(20)


def die_with_parent() -> None:
    """In the child: ask Linux for SIGTERM when the trainer dies, however it dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def is_healthy(url: str) -> bool:
    """Whether a server answers its health route right now."""
    try:
        return requests.get(f"{url}/health", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def wait_until_healthy(url: str, timeout: float, server: VLLMServer | None = None) -> None:
    """Raises TimeoutError naming the URL, or RuntimeError if our own server died meanwhile."""
    start = time.monotonic()
    while not is_healthy(url):
        waited = time.monotonic() - start
        if server is not None:
            server.alive()
        if waited > timeout:
            raise TimeoutError(f"no vLLM server at {url} after {timeout:.0f} s; start one with "
                               "`python sync.py @ CONFIG`, or raise vllm_server_timeout")
        print(f"\rwaiting for the vLLM server at {url} ({waited:.0f} s)", end="", flush=True)
        time.sleep(1)
    print(f"\rthe vLLM server at {url} is up ({time.monotonic() - start:.0f} s)      ")


class CheckpointSource:
    """The model's weights under their checkpoint names, one layer at a time (vLLM WeightSource).

    Parameter names differ from checkpoint names for many families; transformers knows the way
    back. Tied weights are sent under every name: without lm_head vLLM would keep its old one.
    dtype: what goes over the wire (None: as they are).
    """

    def __init__(self, model, dtype: torch.dtype | None = None):
        self.model, self.dtype = model, dtype

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._stream(lambda p: getattr(p, "full_tensor", lambda: p)().detach())

    def metadata(self) -> list:
        from vllm.distributed.weight_transfer import ParamMeta
        stream = self._stream(lambda p: torch.empty(p.shape, dtype=p.dtype, device="meta"))
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in stream]

    def _stream(self, materialize) -> Iterator[tuple[str, torch.Tensor]]:
        from transformers.core_model_loading import revert_weight_conversion
        layers: dict[str, dict] = {}  # conversions never reach across layers
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            layer = re.match(r".*?\.\d+\.|", name).group()
            layers.setdefault(layer, {})[name] = parameter
        for layer in layers.values():
            full = {name: materialize(parameter) for name, parameter in layer.items()}
            for name, tensor in revert_weight_conversion(self.model, full).items():
                wire = self.dtype if self.dtype and tensor.is_floating_point() else tensor.dtype
                yield name, tensor.to(wire).contiguous()


class WeightSync:
    """Sends the trainer's weights to a running vLLM server and checks that they arrived.

    backend: "nccl" (server and trainer on different GPUs) or "gloo" (CPU). Construction
    rendezvouses with every worker of the server; a group left by an earlier trainer is shut
    down first. Raises requests.HTTPError or RuntimeError when anything fails: training on must
    not be possible with stale weights.
    """

    def __init__(self, url: str, source: CheckpointSource, backend: str, timeout: float):
        from vllm.distributed.weight_transfer import (
            HTTPVLLMWeightSyncClient, WeightTransferTrainerFactory)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        class VersionedClient(HTTPVLLMWeightSyncClient):
            """Names the step in finish_weight_update, which the engine calls without it."""
            version = "0"

            def finish_weight_update(self, weight_version=None):
                super().finish_weight_update(self.version)

        self.url, self.timeout = url, timeout
        self.client = VersionedClient(url, timeout)
        self._post("shutdown_weight_transfer_engine")
        workers = self._get("get_world_size")["world_size"]
        address = local_address(url)
        info_cls = register_gloo() if backend == "gloo" else NCCLTrainerInitInfo
        info = info_cls(rank=0, master_address=address, master_port=free_port(address),
                        world_size=workers + 1)
        self.engine = WeightTransferTrainerFactory.trainer_init(info, client=self.client,
                                                                source=source)

    def send(self, version: int) -> None:
        """One whole update; the server's weight_version is `version` afterwards.

        Requests in flight are kept and go on with the new weights. Every cache goes: image
        features are keyed by the image alone, and would be those of the old vision tower.
        """
        self.client.version = str(version)
        self._post("pause", mode="keep")
        self.engine.send_weights()
        for cache in ("prefix", "mm", "encoder"):
            self._post(f"reset_{cache}_cache",
                       **({"reset_running_requests": "true"} if cache == "prefix" else {}))
        self._post("resume")
        served = self._get("weight_info")["weight_version"]
        if served != str(version):
            raise RuntimeError(f"{self.url} serves weights of version {served!r} after version "
                               f"{version} was sent")

    def close(self) -> None:
        """Leave the group; the server goes on with the weights that it has."""
        self._post("shutdown_weight_transfer_engine")
        self.engine.shutdown()

    def _post(self, route: str, **query) -> None:
        requests.post(f"{self.url}/{route}", params=query, timeout=self.timeout).raise_for_status()

    def _get(self, route: str) -> dict:
        response = requests.get(f"{self.url}/{route}", timeout=self.timeout)
        response.raise_for_status()
        return response.json()


def local_address(url: str) -> str:
    """The address of this machine that the server can reach."""
    host = re.match(r"https?://([^:/]+)", url).group(1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # UDP: chooses a route, sends nothing
        return probe.getsockname()[0]


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


@functools.cache
def register_gloo() -> type:
    """Give vLLM's factories the backend "gloo": its NCCL engines with the transport replaced.

    Returns the init info class for the trainer's side.
    """
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group
    from vllm.distributed.weight_transfer import (
        WeightTransferEngineFactory, WeightTransferTrainerFactory, nccl_engine)

    class GlooGroup:
        """The two methods of PyNcclCommunicator that the engines call."""

        def __init__(self, info, rank: int):
            self.group = stateless_init_torch_distributed_process_group(
                info.master_address, info.master_port, rank, info.world_size, backend="gloo",
                timeout=timedelta(seconds=300))

        def broadcast(self, tensor: torch.Tensor) -> None:
            self.group.broadcast(tensor, 0).wait()

        def destroy(self) -> None:
            self.group = None

    class GlooEngine(nccl_engine.NCCLWeightTransferEngine):
        def init_transfer_engine(self, info) -> None:
            parallel = self.parallel_config
            rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
            self.model_update_group = GlooGroup(info, rank + info.rank_offset)

        def receive_weights(self, info) -> None:
            for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
                weight = torch.empty(shape, dtype=getattr(torch, dtype))
                self.model_update_group.broadcast(weight)
                self.model.load_weights([(name, weight)])

    class GlooTrainerInitInfo(nccl_engine.NCCLTrainerInitInfo):
        backend = "gloo"

    class GlooTrainerEngine(nccl_engine.NCCLTrainerWeightTransferEngine):
        @classmethod
        def trainer_init(cls, init_info, *, client, source=None):
            engine = cls(client=client, source=source, is_sender=init_info.is_sender)
            if engine.is_sender:
                worker = nccl_engine.NCCLWeightTransferInitInfo(
                    master_address=init_info.master_address, master_port=init_info.master_port,
                    rank_offset=1, world_size=init_info.world_size)
                with ThreadPoolExecutor(1) as pool:  # both sides must rendezvous together
                    joined = pool.submit(client.init_weight_transfer_engine, asdict(worker))
                    engine.model_update_group = GlooGroup(init_info, 0)
                    joined.result()
            return engine

        def _broadcast(self, source, meta) -> None:
            for _, tensor in self._checked_iter(source, meta) if self.is_sender else source:
                if self.is_sender:
                    self.model_update_group.broadcast(tensor)

    WeightTransferEngineFactory.register_engine("gloo", GlooEngine)
    WeightTransferTrainerFactory.register_engine("gloo", GlooTrainerEngine)
    return GlooTrainerInitInfo


def __getattr__(name: str):
    """vLLM's workers look up sync.GlooWorkerExtension; only then is vLLM imported here."""
    if name == "GlooWorkerExtension":
        register_gloo()
        return type(name, (), {})
    raise AttributeError(f"module 'sync' has no attribute {name!r}")


def served_model(url: str) -> str:
    """The name under which the server serves its model."""
    response = requests.get(f"{url}/v1/models", timeout=30)
    response.raise_for_status()
    return response.json()["data"][0]["id"]


def main(argv: list[str]) -> int:
    """Run the server of a config file until it ends or is interrupted."""
    from train import load_config, parse_command_line, start_server
    try:
        config = load_config(*parse_command_line(argv, "sync.py"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with start_server(config) as server:
        try:
            wait_until_healthy(server.url, config.trainer.vllm_server_timeout, server)
            print(f"serving {config.model}; log: {server.log_path}; Ctrl-C stops it", flush=True)
            return server.process.wait()
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
