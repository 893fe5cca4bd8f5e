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
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import requests
import torch
from torch import Tensor

from rollout import ServerError, call

# How exceptions, with two lines of what they say, and mistakes in flags end vLLM's log.
ERRORS = r"(?m)^(?:\(.*?\) )?((?:[\w.]+Error|\S+: error): .*(?:\n.*){0,2})"
# When the trainer ends, however it ends, its end of the pipe closes: kill the server's group.
GUARD = 'exec 3<&0; (read line <&3; kill -9 0) & exec "$@" </dev/null 3<&-'


def server_command(config) -> list[str]:
    """vLLM's OpenAI server for RL; any flag of its by [inference.args], as JSON or --no-."""
    flags = {"model": config.model, "port": config.vllm_server_port, "host": "127.0.0.1",
             "logprobs_mode": "processed_logprobs",
             "enable_scale_out": True,  # prompts as token ids, for later turns
             "weight_transfer_config": {"backend": config.backend.replace("gloo", "nccl")}}
    if not config.server_gpus:  # vLLM 0.32 crashes when a CPU chunks a prefill that has a seed
        flags |= {"worker_extension_cls": "sync.GlooWorker", "enable_chunked_prefill": False}
    elif "data_parallel_size" not in config.inference_args:
        flags["tensor_parallel_size"] = config.server_gpus
    # not the `vllm` command: the CPU package's does not work
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for key, value in (flags | config.inference_args).items():
        command.append(("--no-" if value is False else "--") + key.replace("_", "-"))
        if not isinstance(value, bool):
            command.append(value if isinstance(value, str) else json.dumps(value))
    return command


class Server:
    """A config's vLLM server: the one that is up, else, inside of `with`, a process of ours.

    Ours only on this machine; its output goes to output_dir/run_name-vllm.log. ValueError if it
    cannot start, TimeoutError if nothing answers in vllm_server_timeout seconds.
    """

    def __init__(self, config):
        self.config, self.url, self.patience = config, config.url, config.vllm_server_timeout
        self.ours, self.process = False, None
        self.engine = self.version = None  # our side of the transfer; the weights that it has
        direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        os.environ["no_proxy"] = f"{direct},{urlsplit(self.url).hostname}"  # it would not reach it

    def __enter__(self) -> "Server":
        self.ours = self.config.local and not self.is_healthy()
        try:
            self.restore()
            return self
        except BaseException:
            self.stop()
            raise

    def restore(self) -> None:
        """Start our own process (anew), or wait until somebody else's answers (again)."""
        self.stop()
        self.engine, self.version, start = None, None, time.monotonic()
        log = Path(self.config.output_dir, f"{self.config.run_name}-vllm.log")
        if self.ours:
            self.start(log)
        while not self.is_healthy():
            waited = time.monotonic() - start
            if self.process and self.process.poll() is not None:
                text = log.read_text(errors="replace")
                errors = " | ".join((re.findall(ERRORS, text) or text.splitlines())[-2:])
                raise ValueError(f"vLLM ended, code {self.process.returncode} ({log}): {errors}")
            if waited > self.patience:
                raise TimeoutError(f"no vLLM server at {self.url} after {waited:.0f} s (see vllm_"
                                   "server_timeout); start one: `python sync.py @ CONFIG`")
            if int(waited) % 5 == 0:
                print(f"waiting for the vLLM server at {self.url} ({waited:.0f} s)", flush=True)
            time.sleep(1)

    def start(self, log: Path) -> None:
        """Run our own, in a session of its own, so that Ctrl-C reaches us alone."""
        config = self.config
        path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ,
               "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": os.pathsep.join(path),
               "VLLM_ALLOW_INSECURE_SERIALIZATION": str(int(config.backend == "ipc"))}
        if config.server_gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(config.server_gpus)))
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                ["sh", "-c", GUARD, "sh", *server_command(config)], env=env, stdout=out,
                stderr=out, stdin=subprocess.PIPE, start_new_session=True)

    def stop(self, *_) -> None:
        """End our own process; then the guard ends what is left of its group."""
        if self.process:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)  # one that hangs, or is about to start, does not hear it
            self.process.stdin.close()
            self.process.wait(20)

    __exit__ = stop

    def is_healthy(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.url}/health", timeout=5).ok
        return False

    def call(self, route: str, body: dict | None = None, method: str = "post") -> dict:
        return call(f"{self.url}/{route}", body, method, pauses=(1,),
                    timeout=self.config.vllm_server_timeout)

    def send(self, source: "CheckpointSource", version: int) -> None:
        """One whole update, checked by weight_version; ServerError if anything of it fails.

        Requests in flight go on, with the new weights. Every cache goes: image features are keyed
        by the image alone, not by the vision tower.
        """
        try:
            if self.config.inference_args.get("enable_sleep_mode"):
                self.call("wake_up")
            engine, self.engine = self.engine or self.meet(source), None  # an error: meet again
            self.call("pause?mode=keep")
            engine.send_weights()
            self.call("update_weight_version", {"new_version": str(version)})
            for cache in ("prefix_cache?reset_running_requests=true", "mm_cache", "encoder_cache"):
                self.call(f"reset_{cache}")
            self.call("resume")
            served = self.call("weight_info", method="get")["weight_version"]
            if served != str(version):
                raise RuntimeError(f"it serves {served!r}")
            self.engine, self.version = engine, version
        except (OSError, RuntimeError) as error:
            raise ServerError(f"weights {version} did not reach {self.url}: {error}") from error

    def meet(self, source: "CheckpointSource"):
        """A new group with the workers, whoever's group they are in; the trainer's side of it."""
        from vllm.distributed.weight_transfer import (
            HTTPVLLMWeightSyncClient, ipc_engine, nccl_engine)
        client = HTTPVLLMWeightSyncClient(self.url, self.config.vllm_server_timeout)
        ends = {"client": client, "source": source}
        try:
            self.call("shutdown_weight_transfer_engine")
        except RuntimeError:  # a trainer died in an update: one that cannot be read ends it
            with contextlib.suppress(RuntimeError):
                self.call("update_weights", {"update_info": {}})
            self.call("shutdown_weight_transfer_engine")
        if self.config.backend == "ipc":
            return ipc_engine.IPCTrainerWeightTransferEngine.trainer_init(
                ipc_engine.IPCTrainerInitInfo(rank=0, packed=True), **ends)
        server = urlsplit(self.url)
        with socket.create_connection((server.hostname, server.port), 60) as connection:
            address = connection.getsockname()[0]  # ours, as the server can reach it
        with socket.create_server((address, 0)) as probe:
            port = probe.getsockname()[1]
        workers = self.call("get_world_size", method="get")["world_size"]
        if self.config.backend == "gloo":
            GlooWorker.use_gloo()
            self.call("collective_rpc", {"method": "use_gloo"})
        return nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(
            nccl_engine.NCCLTrainerInitInfo(address, port, workers + 1, rank=0,
                                            packed=self.config.backend == "nccl"), **ends)


class CheckpointSource:
    """A model's weights under their checkpoint names, layer by layer (a vLLM WeightSource).

    weights: by the model's names, which for many families are others; transformers knows the way
    back. Tied ones go under every name: without lm_head vLLM would keep its old one.
    """

    def __init__(self, model, weights: dict[str, Tensor]):
        self.model, self.weights = model, weights

    @functools.cache  # names and shapes stay; the tensors are materialized for them only once
    def metadata(self) -> list:
        from vllm.distributed.weight_transfer import ParamMeta
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def __iter__(self):
        """Yields (checkpoint name, tensor); one layer at a time exists as a copy."""
        from transformers.core_model_loading import revert_weight_conversion
        layers: dict[str, dict] = {}  # no conversion reaches across layers
        for name, tensor in self.weights.items():
            layers.setdefault(re.match(r".*?\.\d+\.|", name).group(), {})[name] = tensor
        device = self.model.device
        for layer in layers.values():
            for name, tensor in revert_weight_conversion(self.model, layer).items():
                dtype = torch.bfloat16 if device.type == "cuda" else tensor.dtype
                yield name, tensor.to(device, dtype).contiguous()


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
    from train import command_line, mistakes
    with mistakes(), Server(command_line("sync.py")) as server:
        print(f"serving at {server.url}; Ctrl-C stops it", flush=True)
        sys.exit(server.process.wait() if server.process else "somebody else's server, up already")
