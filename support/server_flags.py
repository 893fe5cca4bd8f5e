"""The command line of sync.py: that of train.py, or vLLM's own flags, as vf-vllm takes them.

`python sync.py --model MODEL --port 8000 --tensor-parallel-size 1` needs no file. After
"@ config.toml" the same flags go over those of the file.
"""
import json
import math
import sys
from pathlib import Path

from support.config import (MultimodalRLConfig, add_keys, check_model_path, command_line,
                            exit_by_signal, on_stop, parse_override)

KEYS = {"model": "model", "port": "vllm_server_port"}  # all others are inference.args
SHORT = {"tp": "tensor_parallel_size", "dp": "data_parallel_size", "pp": "pipeline_parallel_size"}


def server_config() -> MultimodalRLConfig:
    """The config that sys.argv asks for; ValueError for a mistake."""
    words = sys.argv[1:]
    count = 0
    while count < len(words) and not words[count].startswith("-"):
        count += 1
    overrides = flags_to_overrides(words[count:])
    if count or not overrides:
        sys.argv[1:] = words[:count] + overrides
        return command_line("sync.py")
    on_stop(exit_by_signal)
    values = {}
    for override in overrides:
        add_keys(values, parse_override(override))
    if "model" not in values:
        raise ValueError("usage: python sync.py @ config.toml, or --model MODEL [--port 8000 ...]")
    check_model_path(values["model"], [Path()])
    if "inference_gpus" not in values:
        flags = values.get("inference_args", {})
        sizes = [flags.get(name, 1) for name in SHORT.values()]
        values["inference_gpus"] = math.prod(size for size in sizes if isinstance(size, int))
    return MultimodalRLConfig(**values, max_tokens=1)  # the trainer's business


def flags_to_overrides(words: list[str]) -> list[str]:
    """["--max-model-len", "512", "--enforce-eager"] as key=value words of a config.

    >>> flags_to_overrides(["--model", "x", "--port=80", "-tp", "2", "--enforce-eager"])
    ['model="x"', 'vllm_server_port=80', 'inference.args.tensor_parallel_size=2', 'inference.args.enforce_eager=true']
    """
    overrides = []
    for word in words:
        if word.startswith("-") and not is_number(word):
            flag, equals, text = word.lstrip("-").partition("=")
            name = flag.replace("-", "_")
            name = SHORT.get(name, name)
            overrides.append([name, text if equals else None])
        elif overrides and overrides[-1][1] is None:
            overrides[-1][1] = word
        else:
            raise ValueError(f"{word!r} is no flag, and the flag before it has its value already")
    return [override(name, text) for name, text in overrides]


def override(name: str, text: str | None) -> str:
    """One flag as key=value, its value in TOML; a flag without a value is true, or --no-X false."""
    key = KEYS.get(name, f"inference.args.{name}")
    if text is None and name.startswith("no_"):
        return f"inference.args.{name.removeprefix('no_')}=false"
    if text is None:
        return f"{key}=true"
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if name == "model" or not isinstance(value, (int, float)):
        return f"{key}={json.dumps(text)}"
    return f"{key}={text}"


def is_number(word: str) -> bool:
    """Whether a word that begins with "-" is a number, and so the value of a flag."""
    try:
        float(word)
        return True
    except ValueError:
        return False
