"""A vLLM server of our own: its command line, its process, and what its log says when it ends."""
import contextlib
import errno
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub

from support import secret
from support.gpus import entries_at
from support.lock import owned
from support.text import plain

ROOT = Path(__file__).parent.parent  # where the server finds support.gloo
# How exceptions, with two lines of what they say, and mistakes in flags end vLLM's log.
ERRORS = r"(?m)^(?:\(.*?\) )?((?:[\w.]+Error|\S+: error): .*(?:\n.*){0,2})"
# When the trainer ends, however it ends, its end of the pipe closes: kill the server's group.
EARLY = {}  # {URL: process} of servers that were started before their trainer was ready
GUARD = 'exec 3<&0; (read line <&3; kill -9 0) & exec "$@" </dev/null 3<&-'


def server_command(config) -> list[str]:
    """vLLM's OpenAI server for RL, with the flags of [inference.args]."""
    engine = "nccl" if config.backend == "gloo" else config.backend
    flags = {"model": config.model, "port": config.vllm_server_port, "host": "127.0.0.1",
             "logprobs_mode": "processed_logprobs", "weight_transfer_config": {"backend": engine},
             "worker_extension_cls": "support.gloo.GlooWorker",
             "enable_scale_out": True}  # the route for token ids, by which later turns go
    if config.server_gpus == 0:
        flags["enable_chunked_prefill"] = False  # with a seed it crashes vLLM 0.32 on CPUs
        if any("attention" not in kind or "linear" in kind for kind in layer_types(config.model)):
            flags["enable_prefix_caching"] = False  # that of states needs chunked prefill
    elif "data_parallel_size" not in config.inference_args:
        flags["tensor_parallel_size"] = config.server_gpus
    flags |= config.inference_args
    flags.pop("chat_template_kwargs", None)  # no flag: every request says them
    flags.pop("api_key", None)  # which other users would read here; see start
    # The last middleware is the outermost one: nothing of the server is reached before it.
    own = flags.pop("middleware", [])
    middlewares = [*([own] if isinstance(own, str) else own), "support.secret.AskSecret"]
    # Not the `vllm` command: the CPU package's does not work.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for key, value in flags.items():
        flag = key.replace("_", "-")
        if value is True:
            command.append(f"--{flag}")
        elif value is False:
            command.append(f"--no-{flag}")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            command += [f"--{flag}", text]
    for name in middlewares:
        command += ["--middleware", name]
    return command


def layer_types(model: str) -> list[str]:
    """What the config of the model calls its layers; [] if it does not say."""
    path = Path(model, "config.json")
    try:
        if not path.exists():
            path = huggingface_hub.try_to_load_from_cache(model, "config.json")
        config = json.loads(Path(path).read_text())
        return list(config.get("text_config", config).get("layer_types") or ())
    except (OSError, TypeError, ValueError, AttributeError):  # the server says what is wrong
        return []


def start_early(config, log: Path) -> None:
    """Start the server before the trainer is ready for it, if start() would be called for sure.

    ValueError if the run's folder is another process's or cannot be written.
    """
    one_process = "RANK" not in os.environ and config.trainer_gpus <= 1
    if config.local and one_process:
        with owned(config.run_dir):  # it is free, and can be written; the run will take it
            pass
        with contextlib.suppress(OSError):  # which will be told when the trainer is ready
            check_port(config)
            EARLY[config.url] = start(config, log)


def start(config, log: Path) -> subprocess.Popen:
    """Run the server in a session of its own, so that Ctrl-C reaches the trainer alone.

    The log keeps what earlier servers of the run have said; where this one begins is log_start.
    """
    if config.url in EARLY:
        return EARLY.pop(config.url)
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ,
           "VLLM_SERVER_DEV_MODE": "1", secret.VARIABLE: secret.make(config.url),
           "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
           "VLLM_ALLOW_INSECURE_SERIALIZATION": "1" if config.backend == "ipc" else "0"}
    if config.server_gpus > 0:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(entries_at(0, config.server_gpus))
    if "api_key" in config.inference_args:
        env["VLLM_API_KEY"] = os.environ["VLLM_API_KEY"] = config.inference_args["api_key"]
    log_start = size_of(log)
    with open(log, "a") as out:
        process = subprocess.Popen(["sh", "-c", GUARD, "sh", *server_command(config)], env=env,
                                   stdout=out, stderr=out, stdin=subprocess.PIPE,
                                   start_new_session=True)
    process.log_start = log_start
    os.register_at_fork(after_in_child=process.stdin.close)  # only our own end counts
    return process


def check_port(config) -> None:
    """OSError at once, instead of after vLLM has started, if something else has the port."""
    port = config.vllm_server_port
    try:
        socket.create_server((config.inference_args.get("host", "127.0.0.1"), port)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"vllm_server_port {port}: Address already in use, by what is no vLLM "
                          "server, or by one that is only starting: set another one, or wait"
                          ) from error


def stop(process: subprocess.Popen) -> None:
    """End the server; then the guard ends what is left of its group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)  # one that hangs, or is about to start, does not hear it
    process.stdin.close()
    process.wait(20)


def size_of(log: Path) -> int:
    """Where in the log that begins which is written from now on."""
    return log.stat().st_size if log.exists() else 0


def first_error(log: Path) -> str:
    """The first error that a process of the server's has logged; "" if there is none."""
    found = re.search(r"(?m)^.* ERROR .*?\] (\w+Error: .*)$", log.read_text(errors="replace"))
    return plain(found[1])[:300] if found else ""


def last_line(log: Path) -> str:
    """What the server has logged last, without time and place."""
    lines = log.read_bytes()[-4000:].decode(errors="replace").splitlines() or [""]
    return plain(lines[-1].rpartition("] ")[2])[:60]


def last_errors(log: Path, start: int = 0) -> str:
    """The last errors in the log, or its last lines, from there on."""
    text = log.read_bytes()[start:].decode(errors="replace")
    errors = re.findall(ERRORS, text) or text.splitlines()
    return plain(" | ".join(errors[-2:]))
