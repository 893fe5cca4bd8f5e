"""Can this run use a server that it did not start? Compared before anything is sent to it."""
import json
from pathlib import Path

from support.http import Refusal, ServerError, call, is_open
from support.task import Task
from support.text import plain

ADVICE = "start it with `python sync.py @ CONFIG`, or set another vllm_server_port"
SECONDS = 60  # for an answer, with its second try
NAMES = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}


def compare(config) -> bool:
    """Whether the server at config.url has RL routes; ValueError in one line if it is none for us.

    ServerError if it does not answer. Prints a warning if the routes answer anybody.
    """
    try:
        compare_model(config, ask(config.url, "v1/models")["data"][0])
        info = ask(config.url, "server_info?config_format=json")
        if info:
            compare_flags(config, info["vllm_config"])
    except (LookupError, TypeError, AttributeError) as error:  # it says something else
        raise ValueError(f"what answers at {config.url} is no vLLM server that this trainer "
                         f"knows: {ADVICE}") from error
    if config.sync_to_vllm_every and not info:
        raise ValueError(f"the server at {config.url} has no RL routes (/weight_info, /pause, "
                         f"...), by which it would get weights (VLLM_SERVER_DEV_MODE=1): {ADVICE}")
    if config.sync_to_vllm_every and is_open(config.url):
        print(f"warning: the RL routes of {config.url} answer everybody who reaches it, and let "
              "them run code there; a server that sync.py starts asks for a secret", flush=True)
    return bool(info)


def compare_model(config, served: dict) -> None:
    """The model that is served, and the longest sequence that it can be asked for."""
    model, longest = str(served.get("root") or served["id"]), served.get("max_model_len")
    if served["owned_by"] != "vllm":
        raise LookupError("owned_by")
    if not same_model(model, config.model):
        raise ValueError(f"the server at {config.url} has another model, {plain(model)!r}, than "
                         f"this run, {config.model!r}: {ADVICE}")
    wanted = config.inference_args.get("max_model_len")
    least = wanted if isinstance(wanted, int) else config.max_tokens + 1
    if isinstance(longest, int) and longest < least:
        raise ValueError(f"the server at {config.url} has max_model_len {longest}, but this run "
                         f"needs {least}: {ADVICE}")


def compare_flags(config, served: dict) -> None:
    """The flags of the server on which the exactness of a run, or its weight updates, depend."""
    model = served["model_config"]
    transfer = (served.get("weight_transfer_config") or {}).get("backend")
    backend = "ipc" if config.backend == "ipc" else "nccl"
    extension = served["parallel_config"].get("worker_extension_cls")
    wrong = None
    if model["logprobs_mode"] != "processed_logprobs":
        wrong = f"logprobs_mode {model['logprobs_mode']!r}, not 'processed_logprobs'"
    elif model.get("logits_processors"):
        wrong = f"logits_processors {model['logits_processors']}, which bend what is sampled"
    elif config.sync_to_vllm_every and transfer != backend:
        wrong = f"weight_transfer_config {transfer!r}, not {backend!r}"
    elif config.sync_to_vllm_every and config.backend == "gloo" and not extension:
        wrong = "no worker_extension_cls support.gloo.GlooWorker, by which weights go between CPUs"
    if wrong:
        raise ValueError(f"the server at {config.url} has {plain(wrong)}: {ADVICE}")


def ask(url: str, route: str) -> dict | None:
    """What the server answers to a GET; None if it has no such route."""
    try:
        asking = Task(lambda: call(f"{url}/{route}", method="get", timeout=30, pauses=(1,)))
        return asking.result(SECONDS, "answer")
    except Refusal as error:
        if error.status in (404, 405):
            return None
        raise ValueError("this is no vLLM server, or one that this run cannot use: "
                         f"{error}") from error
    except OSError as error:
        raise ServerError(f"{url} does not answer: {error}") from error


def same_model(served: str, ours: str) -> bool:
    """Whether both names are of models that have the same weights by name and shape.

    A trainer may start from a checkpoint of the model that is served, or know it by another path.
    Where the configuration of one cannot be read here, the last part of the names decides.
    """
    if served == ours:
        return True
    try:
        return architecture(served) == architecture(ours)
    except (OSError, ValueError):
        return Path(served).name == Path(ours).name


def architecture(model: str) -> dict:
    """The model's configuration without what names it."""
    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(model, local_files_only=True)  # it asks no hub
    return without_names(json.loads(config.to_json_string(use_diff=False)))


def without_names(config: dict) -> dict:
    """The nested configuration without the keys in NAMES."""
    kept = {}
    for key, value in config.items():
        if key not in NAMES:
            kept[key] = without_names(value) if isinstance(value, dict) else value
    return kept
