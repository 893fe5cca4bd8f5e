"""The vLLM process and its weights: start it, wait for it, stop it, send it the trainer's weights.

`python sync.py @ config.toml` runs the server alone, as vf-vllm does for verifiers. Weights travel
by vLLM's own RL API and engines: NCCL between GPUs; on a CPU the same engine meets over gloo. Its
routes let a caller run code: a server started here listens on 127.0.0.1 unless told otherwise.
"""
import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import requests
import torch
from torch import Tensor

from rollout import ServerError

# When the trainer ends, however it ends, its end of the pipe closes: kill the server's whole group.
GUARD = 'exec 3<&0; (read line <&3; kill -9 0) & exec "$@" </dev/null 3<&-'


def server_command(model: str, port: int, gpus: int, backend: str, args: dict) -> list[str]:
    """vLLM's OpenAI server for RL, gpus = 0: on the CPU. args: any flags, JSON-encoded or --no-."""
    flags = {"model": model, "port": port, "host": "127.0.0.1",
             "logprobs_mode": "processed_logprobs",
             "weight_transfer_config": {"backend": "ipc" if backend == "ipc" else "nccl"}}
    if not gpus:  # vLLM 0.32 crashes on a CPU when the prefill of a request with a seed is chunked
        flags |= {"worker_extension_cls": "sync.GlooWorker", "enable_chunked_prefill": False}
    elif gpus > 1 and not {"tensor_parallel_size", "data_parallel_size"} & args.keys():
        flags["tensor_parallel_size"] = gpus
    # not the `vllm` command: the CPU package's does not work
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for key, value in (flags | args).items():
        command.append(("--no-" if value is False else "--") + key.replace("_", "-"))
        if not isinstance(value, bool):
            command.append(value if isinstance(value, str) else json.dumps(value))
    return command


class Server:
    """The vLLM server at url while the context lasts: one that is up already, or our own process.

    log_path gets the output of our own. ValueError if it cannot start, TimeoutError if nothing
    answers in timeout seconds.
    """

    def __init__(self, url: str, timeout: float, command: list[str] = (), gpus: int = 0,
                 log_path: Path | None = None):
        self.url, self.timeout, self.command = url, timeout, command
        self.gpus, self.log_path, self.process = gpus, log_path, None

    def __enter__(self) -> "Server":
        self.command = () if self.is_healthy() else self.command
        try:
            self.restore()
            return self
        except BaseException:
            self.stop()
            raise

    def restore(self) -> None:
        """Start our own process (anew), or wait until somebody else's answers (again)."""
        self.stop()
        if self.command:
            self.start()
        start = time.monotonic()
        while not self.is_healthy():
            waited = time.monotonic() - start
            if self.process and self.process.poll() is not None:
                log = self.log_path.read_text(errors="replace")
                errors = " | ".join((re.findall(".*rror.*", log) or log.splitlines())[-3:])
                raise ValueError(f"vLLM ended with code {self.process.returncode} "
                                 f"({self.log_path}): {errors}")
            if waited > self.timeout:
                raise TimeoutError(f"no vLLM server at {self.url} after {waited:.0f} s (see vllm_"
                                   "server_timeout); start one: `python sync.py @ CONFIG`")
            if int(waited) % 5 == 0:
                print(f"waiting for the vLLM server at {self.url} ({waited:.0f} s)", flush=True)
            time.sleep(1)

    def start(self) -> None:
        """Run the command, in a session of its own, so that Ctrl-C reaches us alone."""
        address = urlsplit(self.url)
        try:
            socket.create_server((address.hostname, address.port)).close()
        except OSError as error:
            raise ValueError(f"vllm_server_port {address.port}: {error.strerror}, and not by a "
                             "healthy vLLM server; choose another port") from error
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ,
               "VLLM_SERVER_DEV_MODE": "1",  # the RL routes
               # of handles to weights on the same GPU
               "VLLM_ALLOW_INSECURE_SERIALIZATION": str(int('{"backend": "ipc"}' in self.command)),
               "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(self.gpus)))
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(["sh", "-c", GUARD, "sh", *self.command], env=env,
                                            stdout=log, stderr=log, stdin=subprocess.PIPE,
                                            start_new_session=True)

    def stop(self, *_) -> None:
        """End our own process; then the guard ends what is left of its group."""
        if self.process:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
            self.process.stdin.close()
            self.process.wait(20)

    __exit__ = stop

    def is_healthy(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.url}/health", timeout=5).ok
        return False


class CheckpointSource:
    """A model's weights under their checkpoint names, layer by layer (a vLLM WeightSource).

    weights: by the model's names, which for many families are others; transformers knows the way
    back. Tied ones go under every name: without lm_head vLLM would keep its old one. From a GPU
    they go as bfloat16.
    """

    def __init__(self, model, weights: dict[str, Tensor], device: torch.device):
        self.model, self.weights, self.device = model, weights, device

    @functools.cache  # names and shapes stay; the tensors are materialized for them only once
    def metadata(self) -> list:
        """(name, dtype, shape) of all that iteration yields."""
        from vllm.distributed.weight_transfer import ParamMeta
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, tensor); one layer at a time exists as a copy."""
        from transformers.core_model_loading import revert_weight_conversion
        layers: dict[str, dict] = {}  # no conversion reaches across layers
        for name, tensor in self.weights.items():
            layers.setdefault(re.match(r".*?\.\d+\.|", name).group(), {})[name] = tensor
        for layer in layers.values():
            for name, tensor in revert_weight_conversion(self.model, layer).items():
                dtype = torch.bfloat16 if self.device.type == "cuda" else tensor.dtype
                yield name, tensor.to(self.device, dtype).contiguous()


class WeightSync:
    """Sends the trainer's weights to a vLLM server by vLLM's own engine: "nccl", "ipc", "gloo"."""

    def __init__(self, url: str, source: CheckpointSource, backend: str, timeout: float):
        self.url, self.source, self.backend, self.timeout = url, source, backend, timeout
        self.engine, self.asleep = None, False

    def sleep(self) -> None:
        """Leave the GPU memory of the server to the trainer until send() (vLLM's sleep mode)."""
        self.call("sleep?level=1")
        self.asleep = True

    def send(self, version: int) -> None:
        """One whole update, checked by weight_version; ServerError if anything of it fails.

        Requests in flight go on, with the new weights. Every cache goes: image features are keyed
        by the image alone, not by the vision tower.
        """
        try:
            if self.asleep:
                self.call("wake_up")
            self.asleep = False
            engine, self.engine = self.engine or self.meet(), None  # after an error: meet again
            self.call("pause?mode=keep")
            engine.send_weights()
            self.call("update_weight_version", {"new_version": str(version)})
            for cache in ("prefix_cache?reset_running_requests=true", "mm_cache", "encoder_cache"):
                self.call(f"reset_{cache}")
            self.call("resume")
            served = self.call("weight_info", method="get").json()["weight_version"]
        except (OSError, RuntimeError) as error:
            raise ServerError(f"weights {version} did not reach {self.url}: {error}") from error
        if served != str(version):
            raise ServerError(f"{self.url} serves weights {served!r}, {version} was sent")
        self.engine = engine

    def meet(self):
        """A new group with the workers, whoever's group they are in; the trainer's side of it."""
        from vllm.distributed.weight_transfer import (
            HTTPVLLMWeightSyncClient, ipc_engine, nccl_engine)
        client = HTTPVLLMWeightSyncClient(self.url, self.timeout)
        if not self.call("shutdown_weight_transfer_engine", check=False).ok:
            # a trainer died in the middle of an update: one that cannot be read ends it
            self.call("update_weights", {"update_info": {}}, check=False)
            self.call("shutdown_weight_transfer_engine")
        if self.backend == "ipc":
            return ipc_engine.IPCTrainerWeightTransferEngine.trainer_init(
                ipc_engine.IPCTrainerInitInfo(rank=0, packed=True),
                client=client, source=self.source)
        server = urlsplit(self.url)
        with socket.create_connection((server.hostname, server.port), self.timeout) as connection:
            address = connection.getsockname()[0]  # ours, as the server can reach it
        with socket.create_server((address, 0)) as probe:
            port = probe.getsockname()[1]
        workers = self.call("get_world_size", method="get").json()["world_size"]
        if self.backend == "gloo":
            GlooWorker.use_gloo()
            self.call("collective_rpc", {"method": "use_gloo"})
        return nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(
            nccl_engine.NCCLTrainerInitInfo(address, port, workers + 1, rank=0,
                                            packed=self.backend == "nccl"),
            client=client, source=self.source)

    def call(self, route: str, body: dict | None = None, method: str = "post", check: bool = True):
        """One HTTP call. ServerError if there is no answer or, unless told not to, a bad one."""
        try:
            response = requests.request(method, f"{self.url}/{route}", json=body,
                                        timeout=self.timeout)
            if check:
                response.raise_for_status()
            return response
        except requests.RequestException as error:
            raise ServerError(str(error)) from error


class Gloo:
    """A gloo group with the methods of vLLM's NCCL communicator, for machines without a GPU."""

    def __init__(self, address: str, port: int, rank: int, world_size: int, device=None):
        from vllm.distributed.utils import stateless_init_torch_distributed_process_group
        self.group = stateless_init_torch_distributed_process_group(
            address, port, rank, world_size, "gloo",
            timeout=timedelta(seconds=30))  # as long a worker waits for a trainer that was killed

    def broadcast(self, tensor: Tensor, src: int, stream=None) -> None:
        self.group.broadcast(tensor, src).wait()

    def destroy(self) -> None:
        self.group = None


class GlooWorker:
    """What vLLM's workers learn from --worker-extension-cls."""

    def use_gloo(self=None) -> None:
        """Let vLLM's NCCL engines, used as they are, meet over gloo in this process."""
        from vllm.distributed.weight_transfer import nccl_common
        nccl_common.stateless_init_process_group = Gloo
        torch.accelerator.current_device_index = torch.cuda.current_stream = lambda: None


if __name__ == "__main__":
    from train import command_line, make_server, mistakes
    with mistakes(), make_server(command_line("sync.py")) as server:
        print(f"serving at {server.url}; Ctrl-C stops it", flush=True)
        sys.exit(server.process.wait() if server.process else "somebody else's server, up already")
