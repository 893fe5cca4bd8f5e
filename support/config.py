"""All that a run can be told: the keys with defaults and meanings, the TOML file, the command line."""
import contextlib
import difflib
import inspect
import json
import os
import re
import signal
import stat
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import tomli

from support.gpus import has_gpu
from support.text import plain

# Where a key stands in the file -> its field. All other fields are keys of [trainer.args].
PLACES = {"model": "model", "env.id": "env_id", "env.args": "env_args",
          "inference.gpus": "inference_gpus", "inference.args": "inference_args",
          "trainer.gpus": "trainer_gpus", "trainer.adapter": "adapter"}
TRAINER_ARGS = "trainer.args."

# By table, the keys whose values may be a file or folder that is there already. In any other table,
# as in [env.args], that may be every value with a slash.
PATHS = {"": ("model", "resume"),
         "inference_args": ("chat_template", "tokenizer", "hf_config_path")}
SECRET = re.compile("api[-_]?key|hf_token|password|secret", re.IGNORECASE)  # keys not written down

# What asks a run to end: Ctrl-C, a scheduler or `kill`, and the terminal that is closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Numbers must be above 0, but for these.
MAY_BE_ZERO = {"inference_gpus", "trainer_gpus", "seed", "warmup_steps", "weight_decay",
               "mask_ratio_low", "lora_rank", "max_dropped", "async_steps", "sync_to_vllm_every",
               "save_every_steps", "eval_every_steps"}
AT_MOST = {"mask_ratio_low": 1, "mask_ratio_high": 1e8, "clip_low": 1, "max_dropped": 1,
           "vllm_server_port": 65535, "temperature": 2, "seed": 2**23 - 1}  # seed << 40 is sent


@dataclass(frozen=True)
class MultimodalRLConfig:
    """All that a run can be told; ValueError names the key whose value cannot be."""
    model: str = ""                         # Hugging Face id or directory
    env_id: str = ""
    env_args: dict = field(default_factory=dict)
    inference_gpus: int = 1
    inference_args: dict = field(default_factory=dict)  # any flags of the vLLM server
    trainer_gpus: int = 1
    adapter: str = ""                       # "module:Class" of an adapter; unset: the built-in one

    # [trainer.args]
    run_name: str = "run"
    output_dir: str = "./outputs"           # everything is written to output_dir/run_name
    seed: int = 0
    max_steps: int = 500
    batch_size: int = 512                   # completions per step
    rollouts_per_step: int = 16             # prompts; G = batch_size / rollouts_per_step
    updates_per_rollout: int = 1            # optimizer steps that the prompts of a step are dealt to
    micro_batch_size: int = 4               # completions per forward: lower it for memory
    learning_rate: float = 1e-5
    warmup_steps: int = 0                   # linear, then constant
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mask_ratio_low: float = 0.1             # tokens outside are left out of the loss
    mask_ratio_high: float = 10.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    divide_by_std: bool = False             # advantages by the std of their group
    share_prompt: bool | None = None        # unset: decided per micro-batch, by counting work
    gradient_checkpointing: bool = False    # less memory, some more time
    attn_implementation: str = ""           # "sdpa", "flash_attention_2", ...; unset: the model's own
    cpu_offload: bool = False               # weights and moments in host memory, the block at work on
                                            # the GPU: less of its memory, more time
    freeze_vision: bool = False             # train the language model alone
    lora_rank: int = 0                      # above 0: train adapters of linear layers (peft)
    temperature: float = 1.0
    max_tokens: int = 512
    vllm_server_host: str = "0.0.0.0"       # this machine: train.py starts the server itself
    vllm_server_port: int = 8000
    vllm_server_timeout: float = 600        # seconds to come up; also for a weight update
    max_turns: int = 10                     # completions of a conversation, at most
    generation_timeout: float = 600         # seconds for a request, a reply, a group's rewards
    max_concurrent: int = 128               # requests (prompts) in flight
    max_dropped: float = 0.5                # share of a step's completions that may fail
    mask_truncated: bool = False            # leave completions cut by max_tokens out of the loss
    kl_warning: float | None = None         # mismatch KL of a step from which to warn; unset: 0.05,
                                            # or 1e-5 where equal weights differ by fp32 alone
    async_steps: int = 1                    # rollouts ahead of the trainer; 0 = exactly on-policy
    sync_to_vllm_every: int = 1             # steps; 0 = never, on purpose
    log_every_steps: int = 10               # rollouts are written; of first and last step, too
    save_every_steps: int = 0               # 0 = only at the end
    keep_checkpoints: int = 2               # the newest ones
    resume: bool | str = False              # true: from the newest whole checkpoint; or its path
    eval_every_steps: int = 0               # also before the first and after the last step
    eval_samples: int = 1                   # completions per held-out prompt
    wandb_project: str = ""                 # set: log to Weights & Biases too

    def __post_init__(self):
        for key in fields(self):
            check_value(key.name, key.type, getattr(self, key.name))
        flags = {flag.replace("-", "_"): value for flag, value in self.inference_args.items()}
        object.__setattr__(self, "inference_args", flags)  # however they are written
        self.check_batch()
        self.check_server()
        self.check_folder()
        if isinstance(self.resume, str) and not Path(self.resume, "checksums.json").exists():
            raise ValueError(f"resume must be true or a checkpoint's folder, not {self.resume!r}")

    def check_batch(self) -> None:
        if self.batch_size % self.rollouts_per_step or self.group_size < 2:
            raise ValueError(f"batch_size {self.batch_size} must be rollouts_per_step "
                             f"{self.rollouts_per_step} times G, the group size, at least 2")
        if self.updates_per_rollout > self.rollouts_per_step:
            raise ValueError(f"updates_per_rollout {self.updates_per_rollout} must be at most "
                             f"rollouts_per_step {self.rollouts_per_step}: each needs a prompt")

    def check_server(self) -> None:
        flags = self.inference_args
        if "/" in self.vllm_server_host or ":" in self.vllm_server_host:
            raise ValueError(f"vllm_server_host must be a name or address alone: {self.url}")
        if self.temperature < 0.01:
            raise ValueError(f"temperature must be at least 0.01 to the server, not {self.temperature}")
        if not isinstance(flags.get("api_key", ""), str):
            raise ValueError("inference.args.api_key must be a string")
        if "model" in flags or "port" in flags:
            raise ValueError("inference.args: set `model` and vllm_server_port instead")
        longest = flags.get("max_model_len")  # for vLLM it may be "32k", too
        if isinstance(longest, int) and 0 < longest <= self.max_tokens:
            raise ValueError("max_tokens must be below max_model_len, which holds the prompt, too")
        if flags.get("enable_sleep_mode") and (self.async_steps or self.sync_to_vllm_every != 1):
            raise ValueError("enable_sleep_mode needs async_steps = 0 and sync_to_vllm_every = 1")

    def check_folder(self) -> None:
        """The run folder must be below output_dir: a run moves what an earlier one left in it."""
        if not self.output_dir.strip():
            raise ValueError("output_dir must not be empty (an unset shell variable?)")
        name = Path(self.run_name)
        leaves = name.is_absolute() or ".." in name.parts or name == Path()
        too_long = len(os.fsencode(name.name)) > 200  # file systems take 255, with "-past-TIME"
        if leaves or too_long or not self.run_name.strip() or not self.run_name.isprintable():
            raise ValueError(f"run_name must name a folder in output_dir, not {self.run_name!r} "
                             "(an unset shell variable?)")

    @property
    def group_size(self) -> int:
        """G, the completions of a prompt."""
        return self.batch_size // self.rollouts_per_step

    @property
    def run_dir(self) -> Path:
        """Where all is that the run writes."""
        return Path(self.output_dir, self.run_name)

    @property
    def local(self) -> bool:
        """Whether the server is on this machine, where train.py may start it."""
        return self.vllm_server_host in ("0.0.0.0", "127.0.0.1", "localhost")

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.local else self.vllm_server_host
        return f"http://{host}:{self.vllm_server_port}"

    @property
    def server_gpus(self) -> int:
        """How many GPUs a server that we start gets; 0 is a CPU."""
        return max(1, self.inference_gpus) if has_gpu() else 0

    @property
    def backend(self) -> str:
        """How weights travel: over gloo between CPUs, NCCL between GPUs, IPC within one GPU."""
        if self.server_gpus == 0:
            return "gloo"
        return "nccl" if self.trainer_gpus else "ipc"

    def to_record(self) -> dict:
        """All keys and their values as they may be written down: without api_key and its like."""
        values = asdict(self)
        for name in ("inference_args", "env_args"):
            values[name] = {key: value for key, value in values[name].items()
                            if not SECRET.search(key)}
        return values

    def loss_options(self) -> dict[str, float]:
        """The keyword arguments of grpo_loss, which are keys of the same names."""
        from loss import grpo_loss
        names = inspect.getfullargspec(grpo_loss).kwonlyargs
        return {name: getattr(self, name) for name in names}


def check_value(key: str, kind: type, value) -> None:
    """ValueError if the value is not of this type, or is a number that the key cannot be."""
    number = kind in (int, float)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (number and isinstance(value, bool)):
        name = getattr(kind, "__name__", kind)
        raise ValueError(f"{key} must be {name}, not {value!r}")
    if number:
        most = AT_MOST.get(key, 1e12)
        in_range = 0 <= value <= most if key in MAY_BE_ZERO else 0 < value <= most
        if not in_range:  # as NaN is not
            least = "at least" if key in MAY_BE_ZERO else "above"
            raise ValueError(f"{key} must be {least} 0 and at most {most:g}, not {value}")


def load_config(path: str, overrides: list[str] = ()) -> MultimodalRLConfig:
    """A TOML file and overrides ("seed=1", "env.args.n=3", "model=X"); ValueError in one line.

    A path in the file is looked for beside the file, then in the working directory; one of an
    override the other way round. What will be written, output_dir, is of the working directory.
    """
    in_file, in_words = {}, {}
    folders = [Path(path).parent, Path()]
    try:
        add_keys(in_file, parse_toml(Path(path).read_text("utf-8-sig")))
        for override in overrides:
            add_keys(in_words, parse_override(override))
        values = find_paths(in_file, folders)
        add_fields(values, find_paths(in_words, folders[::-1]))
        if not values.get("model") or not values.get("env_id"):
            raise ValueError('it must set model = "..." and [env] id = "..."')
        check_model_path(values["model"], folders)
        return MultimodalRLConfig(**values)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # tomli's errors are ValueErrors, too
        raise ValueError(f"{path}: {error}") from error


def find_paths(values: dict, folders: list[Path], table: str = "") -> dict:
    """The values by field, with what names a file or folder in one of these folders found there."""
    found = {}
    for key, value in values.items():
        if table == "inference_args":
            key = key.replace("-", "_")  # a flag may be written in both ways
        if isinstance(value, dict):
            value = find_paths(value, folders, key)
        elif isinstance(value, str):
            is_path = key in PATHS[table] if table in PATHS else "/" in value
            if is_path or key == "output_dir":
                value = os.path.expanduser(value)
            if is_path:
                value = find_path(value, folders)
        found[key] = value
    return found


def find_path(value: str, folders: list[Path]) -> str:
    """The value as a path in the first folder that has it; else the value, perhaps a hub's name."""
    for folder in folders:
        if value and os.path.exists(folder / value):
            return str(folder / value)
    return value


def check_model_path(model, folders: list[Path]) -> None:
    """ValueError if this can only be a path, and is none. The hub has NAME and OWNER/NAME."""
    looks_like_path = isinstance(model, str) and (model.startswith((".", "/", "~"))
                                                  or model.endswith("/") or model.count("/") > 1)
    if looks_like_path and not Path(model).exists():
        places = " or ".join(str(folder.resolve()) for folder in folders)
        raise ValueError(f"model: there is no folder {model!r}, seen from {places}")


def parse_toml(text: str) -> dict:
    """The table of a TOML text. If JSON or Python is the mistake, the error says it in TOML."""
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        place = re.search(r"at line (\d+)", str(error))
        if place is None:
            raise
        line = text.splitlines()[int(place[1]) - 1].strip()
        if SECRET.search(line):
            raise
        if re.search(r"[=:]\s*(None|null)\b", line):
            raise ValueError(f"{error}; TOML has no None: leave the key out") from error
        in_toml = toml_of_json(line)
        try:
            tomli.loads(in_toml)
        except tomli.TOMLDecodeError:
            raise error  # the first one: the mistake is another
        raise ValueError(f"{error}; JSON is not TOML, which writes {in_toml}") from error


# A string or a word, perhaps with the colon that makes it a key; the last comma of a list; a brace.
JSON_TOKEN = re.compile(
    r"""("(?:\\.|[^"\\])*"|'[^']*'|[\w.+-]+)(\s*:\s*)?|,\s*(?=[]}]|$)|\{\s*|\s*\}""")


def toml_of_json(line: str) -> str:
    """A line of JSON or Python, in TOML. What stands in strings stays as it is.

    >>> toml_of_json('"x": {"image": 4, "a b": [True, "True: {}"]},')
    'x = { image = 4, "a b" = [true, "True: {}"] }'
    """
    def in_toml(match: re.Match) -> str:
        word, colon = match.groups()
        if word is None:
            return {"{": "{ ", "}": " }", ",": ""}[match[0].strip()]
        if colon:
            bare = word.strip("\"'")
            return (bare if re.fullmatch(r"[\w-]+", bare) else word) + " = "
        return word.lower() if word.lower() in ("true", "false") else word

    return JSON_TOKEN.sub(in_toml, line)


def parse_override(override: str) -> dict:
    """The table that "key=value" would be in the file. A bare key is one of [trainer.args]."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} is not key=value or table.key=value")
    if "." not in key and key != "model":
        key = TRAINER_ARGS + key
    try:
        return tomli.loads(f"{key} = {toml_of_json(text)}")
    except tomli.TOMLDecodeError:  # a word without quotes is a string
        return tomli.loads(f"{key} = {json.dumps(text)}")


def add_keys(values: dict, table: dict, prefix: str = "") -> None:
    """Add the keys of a TOML table to the values by field."""
    places = PLACES | {TRAINER_ARGS + f.name: f.name for f in fields(MultimodalRLConfig)
                       if f.name not in PLACES.values()}
    for key, value in table.items():
        place = prefix + key
        name = places.get(place)
        if name:
            add_fields(values, {name: value})
        elif isinstance(value, dict):
            add_keys(values, value, place + ".")
        else:
            raise ValueError(f"unknown key {place!r}; did you mean {nearest(place, places)!r}?")


def add_fields(values: dict, added: dict) -> None:
    """Add values by field; tables of arguments are merged."""
    for name, value in added.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            value = values[name] | value
        values[name] = value


def nearest(place: str, places: dict) -> str:
    """The valid place most like this one, whether or not it was written with its table."""
    short = {valid.removeprefix(TRAINER_ARGS): valid for valid in places}
    [match] = difflib.get_close_matches(place.removeprefix(TRAINER_ARGS), short, n=1, cutoff=0)
    return short[match]


def command_line(program: str) -> MultimodalRLConfig:
    """The config that sys.argv asks for: "@ config.toml key=value ...", also "@config.toml".

    From here on the stop signals raise SystemExit, so that a server of ours is stopped.
    ValueError for a mistake in the words or in the file.
    """
    on_stop(exit_by_signal)
    words = sys.argv[1:]
    if words and words[0].startswith("@") and words[0] != "@":
        words = ["@", words[0][1:], *words[1:]]
    if len(words) < 2 or words[0] != "@":
        raise ValueError(f"usage: python {program} @ config.toml [key=value ...]")
    # Environments and adapters are modules, and may stand beside the config or where we are.
    sys.path += [os.path.dirname(os.path.abspath(words[1])), os.getcwd()]
    return load_config(words[1], words[2:])


def on_stop(handler) -> None:
    """Call handler(number, frame) at each stop signal, but for a SIGHUP that `nohup` ignores."""
    def handle(number: int, frame) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        handler(number, frame)

    for number in STOP_SIGNALS:
        ignored = signal.getsignal(number) == signal.SIG_IGN
        if number != signal.SIGHUP or not ignored:
            signal.signal(number, handle)


@contextlib.contextmanager
def stop_signals_kept():
    """For code that takes the stop signals over, as some environments do: they are given back."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def leave_terminal() -> None:
    """Write to nowhere instead of to a terminal that was closed, where every line is an error.

    Kernel and shell both send a SIGHUP then. The second one must not count as "stop at once".
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)


def exit_by_signal(number: int, _frame) -> None:
    sys.exit(128 + number)


@contextlib.contextmanager
def mistakes():
    """An error in here is a mistake of the user's: one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        print("error:", plain(str(error)), file=sys.stderr)
        sys.exit(2)
