"""GRPO on a vision-language model: `python train.py @ config.toml [key=value ...]`.

Each step is three calls: roll out the prompts on the vLLM server (rollout.py), update the policy on
what came back, send the new weights to the server (sync.py). This file owns the config, the forward
pass of the policy, the trainer and the command line.
"""
import collections
import contextlib
import difflib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import tomli
import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

import sync
from adapter import MultimodalAdapter
from batch import MultimodalBatch
from loss import group_advantages, grpo_loss, token_logprobs
from rollout import GenerateOutputs, Generator, load_environment

SAMPLED = ("completion", "answer", "reward", "finish_reason")  # what is written of a rollout
MAY_BE_ZERO = ("mask_ratio_low", "sync_to_vllm_every", "inference_gpus", "trainer_gpus")


@dataclass(frozen=True)
class MultimodalRLConfig:
    """All that a run can be told: `model`, [env], [inference], [trainer]; the rest [trainer.args].

    Raises ValueError naming the key whose value cannot be.
    """
    model: str = ""                         # Hugging Face id or directory
    env_id: str = ""
    env_args: dict = field(default_factory=dict)
    inference_gpus: int = 1
    inference_args: dict = field(default_factory=dict)  # any flags of the vLLM server
    trainer_gpus: int = 1
    run_name: str = "run"
    output_dir: str = "./outputs"           # everything is written to output_dir/run_name
    seed: int = 0
    max_steps: int = 500
    batch_size: int = 512                   # completions per optimizer step
    rollouts_per_step: int = 16             # prompts; G = batch_size / rollouts_per_step
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
    gradient_checkpointing: bool = False    # less memory, but prompts cannot be shared
    freeze_vision: bool = False             # train the language model alone
    temperature: float = 1.0
    max_tokens: int = 512
    vllm_server_host: str = "0.0.0.0"       # a local name: train.py starts the server itself
    vllm_server_port: int = 8000
    vllm_server_timeout: float = 600        # seconds to come up; also for a weight update
    generation_timeout: float = 600         # seconds for one prompt's completions
    max_concurrent: int = 128               # requests (prompts) in flight
    sync_to_vllm_every: int = 1             # steps; 0 = never, on purpose
    log_every_steps: int = 10               # sampled rollouts are written
    save_every_steps: int = 0               # 0 = only at the end
    eval_every_steps: int = 0               # also before the first and after the last step
    eval_samples: int = 1                   # completions per held-out prompt
    wandb_project: str = ""                 # set: log to Weights & Biases too

    def __post_init__(self):
        for f in fields(self):
            value, kind = getattr(self, f.name), float | int if f.type is float else f.type
            if not isinstance(value, kind) or (isinstance(value, bool) and f.type in (int, float)):
                name = getattr(f.type, "__name__", f.type)
                raise ValueError(f"{f.name} must be of type {name}, not {value!r}")
            may_be_zero = f.default == 0 or f.name in MAY_BE_ZERO
            if f.type in (int, float) and (value < 0 or value == 0 and not may_be_zero):
                raise ValueError(f"{f.name} must be above 0, not {value}")
        if self.batch_size % self.rollouts_per_step or self.group_size < 2:
            raise ValueError(f"batch_size {self.batch_size} must be rollouts_per_step "
                             f"{self.rollouts_per_step} times G, the group size, at least 2")

    @property
    def group_size(self) -> int:
        """G, completions per prompt."""
        return self.batch_size // self.rollouts_per_step

    @property
    def url(self) -> str:
        """Where the trainer finds the server; 0.0.0.0 is no place to connect to."""
        return (f"http://{self.vllm_server_host}:{self.vllm_server_port}"
                .replace("//0.0.0.0:", "//127.0.0.1:"))


KEYS = {"model": "model", "env.id": "env_id", "env.args": "env_args",  # in TOML -> in the config
        "inference.gpus": "inference_gpus", "inference.args": "inference_args",
        "trainer.gpus": "trainer_gpus"}
KEYS |= {f"trainer.args.{f.name}": f.name for f in fields(MultimodalRLConfig)
         if f.name not in KEYS.values()}


def load_config(path: str, overrides: list[str] = ()) -> MultimodalRLConfig:
    """A TOML file and overrides ("seed=1", "env.args.n=3", "model=DIR"); ValueError in one line."""
    try:
        raw = tomli.loads(Path(path).read_text())
        for override in overrides:
            apply_override(raw, override)
        config = MultimodalRLConfig(**dict(settings(raw)))
        if not config.model or not config.env_id:
            raise ValueError('it must set model = "..." and [env] id = "..."')
        return config
    except (OSError, ValueError) as error:  # tomli's errors are ValueErrors
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def settings(table: dict, name: str = "") -> Iterator[tuple[str, object]]:
    """(config field, value) of every key; ValueError naming an unknown one and the nearest."""
    for key, value in table.items():
        path = f"{name}.{key}".removeprefix(".")
        if path in KEYS:
            yield KEYS[path], value
        elif isinstance(value, dict) and any(k.startswith(f"{path}.") for k in KEYS):
            yield from settings(value, path)
        else:
            valid = [k.removeprefix(f"{name}.") for k in KEYS if k.startswith(name)]
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
            where = f"[{name}]" if name else "the file"
            raise ValueError(f"unknown key {key!r} in {where}; {hint}")


def apply_override(raw: dict, override: str) -> None:
    """Set one key of the raw tables; a bare key is one of [trainer.args] (or `model`)."""
    key, equals, text = override.partition("=")
    try:
        value = tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        value = text  # a bare string
    *tables, last = key.split(".") if "." in key or key == "model" else ["trainer", "args", key]
    for table in tables:
        raw = raw.setdefault(table, {})
        if not isinstance(raw, dict) or not equals:
            raise ValueError(f"override {override!r} is not key=value or table.key=value")
    raw[last] = value


def vision_token_ids(model_config) -> list[int]:
    """The ids that stand for images and videos, and their brackets, from the model's config."""
    return sorted({value for name, value in model_config.to_dict().items()
                   if isinstance(value, int) and name.endswith(("token_id", "token_index"))
                   and any(word in name for word in ("image", "video", "vision", "audio"))})


class Policy(torch.nn.Module):
    """The model as a policy; all in one forward, head included, for the sake of sharded weights."""

    def __init__(self, model, temperature: float, banned: list[int]):
        super().__init__()
        self.model, self.temperature, self.banned = model, temperature, banned

    def forward(self, batch: MultimodalBatch, share: bool) -> tuple[Tensor, Tensor]:
        """(logprobs, entropies), both (b, L), 0 off the loss mask."""
        mask, device = batch.loss_mask.bool(), batch.input_ids.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):  # weights are fp32
            states = self.forked_states(batch) if share else self.row_states(batch)  # (N, H)
            found = token_logprobs(states, batch.input_ids[mask],
                                   self.model.get_output_embeddings(),
                                   self.temperature, self.banned)
        return tuple(values.new_zeros(mask.shape).masked_scatter(mask, values) for values in found)

    def row_states(self, batch: MultimodalBatch) -> Tensor:
        """(N, H), the state before each token in the loss, every row with its own prompt."""
        hidden = self.model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
            **batch.token_tensors(), **batch.images_of(batch.prompt_index.tolist()))
        return hidden.last_hidden_state[:, :-1][batch.loss_mask[:, 1:].bool()]

    def forked_states(self, batch: MultimodalBatch) -> Tensor:
        """The same states, with each prompt and its images forwarded once.

            prompt 0   [. . p p p p] --cache--+--> [a a a . .]   row 0
                                              +--> [b b b b b]   row 1
            prompt 1   [p p p p p p] --cache-----> [c c . . .]   row 2

        The prompt's cache is forked into one line per completion. Prompts are padded on the
        left, so that each ends where its completions begin and its last state is the one before
        their first tokens. Gradients of all completions flow back through the cache and add up.
        """
        index, (prompts, completions, trained) = batch.prompt_index, batch.fork()
        width, length = prompts["input_ids"].shape[1], trained.shape[1]
        steps = max(length - 1, 1)  # the state of the last token is before nothing
        positions = self.positions(prompts, length, batch)
        images = batch.images_of(range(len(prompts["input_ids"])))
        prompt = self.model.base_model(**prompts, **images, use_cache=True,
                                       position_ids=positions[..., :width])
        cache = prompt.past_key_values
        cache.batch_select_indices(index)
        inputs = {key: tensor[:, :steps] for key, tensor in completions.items()}
        inputs["attention_mask"] = torch.cat(
            [prompts["attention_mask"][index], inputs["attention_mask"]], 1)
        completion = self.model.base_model(
            **inputs, position_ids=positions[..., index, width:width + steps],
            past_key_values=cache, use_cache=True)
        before_first = prompt.last_hidden_state[index, -1:]  # (b, 1, H)
        return torch.cat([before_first, completion.last_hidden_state], 1)[:, :length][trained]

    def positions(self, prompts: dict[str, Tensor], length: int, batch: MultimodalBatch) -> Tensor:
        """(P, W_p + length), prompts and then completions; M-RoPE models count for themselves."""
        row = {key: pad(tensor, (0, length), value=int(key == "attention_mask"))
               for key, tensor in prompts.items()}
        count = getattr(self.model.base_model, "get_rope_index", None)
        if count is None or len(row) == 2:
            return (row["attention_mask"].cumsum(1) - 1).clamp(min=0)
        grids = {k: v for k, v in batch.image_tensors().items() if k.endswith("_thw")}
        return count(**row, **grids)[0]


class MultimodalGRPOTrainer:
    """Trains a Hugging Face image-text-to-text model, where it is, by GRPO against a vLLM server.

    The tokenizer is saved with checkpoints, unless the adapter has a processor. Construction
    contacts no server; train() needs one.
    """

    def __init__(self, model, tokenizer, adapter: MultimodalAdapter, config: MultimodalRLConfig):
        self.model, self.tokenizer, self.adapter, self.config = model, tokenizer, adapter, config
        self.device = next(model.parameters()).device
        self.fp32 = self.device.type == "cpu" and model.dtype == torch.float32
        self.environment = config.env_id and load_environment(config.env_id, config.env_args)
        self.run_dir, self.step = Path(config.output_dir, config.run_name), 0
        self.banned = vision_token_ids(model.config)
        self.logprobs = Policy(model, config.temperature, self.banned)
        # dropout would make the trainer another policy than the one that sampled; but
        # Hugging Face checkpoints gradients in training mode alone, and then without a cache
        model.train(config.gradient_checkpointing)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.can_share = False if config.gradient_checkpointing else config.share_prompt
        if config.freeze_vision:
            model.requires_grad_(False)
            for part in (model.get_decoder(), model.get_output_embeddings()):
                part.requires_grad_(True)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, config.learning_rate,
                                           weight_decay=config.weight_decay)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / max(1, config.warmup_steps)))

    def train(self) -> None:
        """Roll out, update, sync, until max_steps. The server must be up, or come up in time."""
        config, (generator, weights) = self.config, self.connect()
        bar = tqdm(total=config.max_steps, initial=self.step)
        while self.step < config.max_steps:
            if config.eval_every_steps and self.step % config.eval_every_steps == 0:
                self.evaluate(generator)
            clock = [time.perf_counter()]
            outputs = generator.train_step(self.step, config.rollouts_per_step, config.group_size)
            clock.append(time.perf_counter())
            if bar.n == bar.initial:
                self.calibrate(outputs)
            metrics = self.update(outputs)
            clock.append(time.perf_counter())
            if weights and self.step % config.sync_to_vllm_every == 0:
                weights.send(self.step)
            clock.append(time.perf_counter())
            self.log(metrics, clock, outputs)
            bar.set_postfix({name: f"{metrics[name]:.3g}" for name in
                             ("loss", "ir", "ent", "kl", "reward")}, refresh=False)
            bar.update()
            if config.save_every_steps and self.step % config.save_every_steps == 0:
                self.save()
        bar.close()
        if config.eval_every_steps:
            self.evaluate(generator)
        self.save()

    def update(self, outputs: GenerateOutputs) -> dict[str, float]:
        """One optimizer step on the given completions, without a server. Returns its metrics.

        Equal example_id make a group. ir, ent, kl and the like are means over forwarded tokens.
        """
        config, batch = self.config, self.build_batch(outputs)
        if self.can_share is None:
            self.can_share = self.sharing_is_exact(batch)
        num_tokens, sums = batch.loss_mask.sum().item(), collections.Counter()
        for micro in batch.micro_batches(config.micro_batch_size):
            share = self.can_share and (config.share_prompt or micro.sharing_pays(
                self.model.config.get_text_config().hidden_size))
            micro = micro.to(self.device)
            loss, part = grpo_loss(
                *self.logprobs(micro, share), micro.behavior_logprobs, micro.advantages,
                micro.loss_mask, num_tokens, mask_ratio_low=config.mask_ratio_low,
                mask_ratio_high=config.mask_ratio_high, clip_low=config.clip_low,
                clip_high=config.clip_high)
            loss.backward()
            sums.update({name: value.item() for name, value in part.items()}, loss=loss.item(),
                        cells=micro.input_ids.numel(), real=micro.attention_mask.sum().item(),
                        shared=share * len(micro))
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        lr = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        self.step += 1
        means = {name: sums[name] / max(sums["tokens"], 1)
                 for name in ("ir", "ent", "kl", "masked_fraction", "clip_fraction")}
        return {"step": self.step, "loss": sums["loss"], **means, "grad_norm": grad_norm.item(),
                "lr": lr, "tokens": num_tokens, "shared_fraction": sums["shared"] / len(batch),
                "padding_fraction": 1 - sums["real"] / max(sums["cells"], 1),
                **rollout_metrics(batch, outputs)}

    def build_batch(self, outputs: GenerateOutputs) -> MultimodalBatch:
        """The adapter's batch with advantages, and without sampled vision tokens."""
        batch = self.adapter.build_batch(outputs)
        if len(batch) != len(outputs):
            raise ValueError(f"build_batch made {len(batch)} rows of {len(outputs)} completions")
        batch = batch.cut_at(self.banned)
        batch.advantages = group_advantages(batch.rewards, torch.tensor(outputs.example_id),
                                            self.config.divide_by_std)
        return batch

    def calibrate(self, outputs: GenerateOutputs) -> dict[str, float]:
        """Recompute the server's logprobs of some completions and print the largest difference.

        RuntimeError if the dtype does not explain it, unless weights are never synced, on purpose.
        """
        batch, differences = self.build_batch(outputs), []
        for rows in torch.linspace(0, len(batch) - 1, min(32, len(batch))).long().split(4):
            micro = batch.select(rows).to(self.device)
            with torch.no_grad():
                logprobs, _ = self.logprobs(micro, share=False)
            differences.append((logprobs - micro.behavior_logprobs)[micro.loss_mask.bool()])
        off = torch.cat(differences)
        found = {"max": off.abs().max().item(), "mean": off.abs().mean().item(),
                 "kl": (off.expm1() - off).mean().item()}
        tqdm.write(f"trainer and server: logprobs of {len(off)} tokens differ by {found['max']:.1e}"
                   f" at most, {found['mean']:.1e} in the mean; mismatch KL {found['kl']:.1e}")
        if found["mean"] > (1e-4 if self.fp32 else 0.05) and self.config.sync_to_vllm_every:
            raise RuntimeError(f"trainer and server are different policies ({found}): check "
                               "--logprobs-mode processed_logprobs, --dtype, the processor's pixel "
                               "limits, and whether vLLM computes this model as transformers does")
        return found

    def sharing_is_exact(self, batch: MultimodalBatch) -> bool:
        """Compute a few completions both ways; a detached cache would show in the gradient."""
        trained = batch.loss_mask.bool().any(1)
        if not trained.any():
            return False
        rows = trained & (batch.prompt_index == batch.prompt_index[trained].mode()[0])
        micro, found = batch.select(rows.nonzero()[:3, 0]).to(self.device), []
        try:
            for share in (False, True):
                logprobs, _ = self.logprobs(micro, share)
                (logprobs.sum(1) @ torch.arange(1.0, len(micro) + 1, device=self.device)).backward()
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), float("inf"))
                found.append((logprobs.detach(), norm))
                self.model.zero_grad()
            (plain, plain_norm), (shared, shared_norm) = found
            off, norm_off = (plain - shared).abs().max(), (shared_norm / plain_norm - 1).abs()
            if off < (1e-4 if self.fp32 else 0.2) and norm_off < (1e-3 if self.fp32 else 0.1):
                return True
            reason = f"logprobs differ by {off:.1e}, the gradient's norm by {norm_off:.1%}"
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            self.model.zero_grad()
            reason = f"{type(error).__name__}: {str(error)[:200]}"
        tqdm.write(f"prompts are not shared, every completion is forwarded with its own: {reason}")
        return False

    def connect(self) -> tuple[Generator, sync.WeightSync | None]:
        """Wait for the server; send it our weights, whatever it served before."""
        config, on_gpu = self.config, self.device.type == "cuda"
        if not self.environment or (config.eval_every_steps and not len(self.environment.eval)):
            raise ValueError("there is no environment, or no held-out split to evaluate on: check "
                             "env_id and eval_every_steps")
        sync.wait_until_healthy(config.url, config.vllm_server_timeout)
        generator = Generator(self.environment, config.url, config, {i: -100 for i in self.banned},
                              self.adapter.encode if self.adapter.processor else None)
        if not config.sync_to_vllm_every:
            return generator, None
        source = sync.CheckpointSource(self.model, torch.bfloat16 if on_gpu else None)
        weights = sync.WeightSync(config.url, source, "nccl" if on_gpu else "gloo",
                                  config.vllm_server_timeout)
        weights.send(self.step)
        return generator, weights

    def evaluate(self, generator: Generator) -> None:
        """Print and log the mean reward on the held-out split, sampled as in training."""
        outputs = generator.evaluate(self.config.eval_samples)
        means = {f"eval/{name}": sum(values) / len(outputs) for name, values in
                 {"reward": outputs.reward, **outputs.metrics}.items()}
        self.write({"step": self.step, **means})
        tqdm.write(f"step {self.step}: held-out reward {means['eval/reward']:.3f} "
                   f"({len(outputs)} completions)")

    def log(self, metrics: dict, clock: list[float], outputs: GenerateOutputs) -> None:
        """A line of metrics.jsonl; every log_every_steps three completions and their images."""
        seconds = [end - start for start, end in zip(clock, clock[1:])]
        self.write({**metrics, "tokens_per_second": metrics["tokens"] / sum(seconds),
                    **dict(zip(("seconds_rollout", "seconds_train", "seconds_sync"), seconds))})
        if self.step % self.config.log_every_steps == 0:
            folder = self.run_dir / "rollouts" / f"step-{self.step}"
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "rollouts.jsonl", "w") as file:
                for i in range(0, len(outputs), max(1, len(outputs) // 3)):
                    record = {name: outputs[name][i] for name in SAMPLED}
                    record["prompt"] = self.tokenizer.decode(outputs.prompt_ids[i])
                    file.write(json.dumps({"row": i, **record}, default=str) + "\n")
                    for j, image in enumerate(outputs.images[i]):
                        image.save(folder / f"{i}-{j}.png")

    def write(self, metrics: dict[str, float]) -> None:
        """Append to metrics.jsonl, and to Weights & Biases where it is asked for."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with open(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if self.config.wandb_project:
            import wandb
            run = wandb.run or wandb.init(project=self.config.wandb_project, dir=self.run_dir,
                                          name=self.config.run_name, config=asdict(self.config))
            run.log(metrics, step=self.step)

    def save(self) -> None:
        """Write run_dir/checkpoint-STEP, which from_pretrained and vLLM both load."""
        for part in (self.model, self.adapter.processor or self.tokenizer):
            part.save_pretrained(self.run_dir / f"checkpoint-{self.step}")


def rollout_metrics(batch: MultimodalBatch, outputs: GenerateOutputs) -> dict[str, float]:
    """What the completions were like, whatever is done with them."""
    groups, lengths = torch.tensor(outputs.example_id), batch.loss_mask.sum(1).float()
    alive = len(groups[batch.advantages != 0].unique()) / len(groups.unique())
    means = {"reward": outputs.reward} | {f"reward/{k}": v for k, v in outputs.metrics.items()}
    return {**{name: sum(values) / len(values) for name, values in means.items()},
            "reward_std": batch.rewards.std(correction=0).item(),
            "zero_advantage_groups": 1 - alive, "completion_length": lengths.mean().item(),
            "completion_length_max": lengths.max().item(),
            "truncated_fraction": outputs.finish_reason.count("length") / len(outputs)}


def command_line(program: str) -> MultimodalRLConfig:
    """sys.argv: "@ config.toml key=value ..."; exit code 2 and one line for a mistake."""
    words = " ".join(sys.argv[1:2]).removeprefix("@").split() + sys.argv[2:]
    try:
        if not words or not sys.argv[1].startswith("@"):
            raise ValueError(f"usage: python {program} @ config.toml [key=value ...]")
        config = load_config(words[0], words[1:])
        load_environment(config.env_id, config.env_args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for number in (signal.SIGINT, signal.SIGTERM):  # unwind, so that a server of ours is stopped
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    return config


@contextlib.contextmanager
def start_server(config: MultimodalRLConfig) -> Iterator[subprocess.Popen]:
    """vLLM on the first inference_gpus GPUs, or on the CPU where there are none; waits for it."""
    gpus = config.inference_gpus if torch.cuda.is_available() else 0
    command = sync.server_command(config.model, config.vllm_server_port, gpus,
                                  config.inference_args)
    log_path = Path(config.output_dir, config.run_name, "vllm.log")
    with sync.run_server(command, gpus, log_path) as process:
        sync.wait_until_healthy(config.url, config.vllm_server_timeout, process, log_path)
        yield process


@contextlib.contextmanager
def served(config: MultimodalRLConfig) -> Iterator[MultimodalGRPOTrainer]:
    """A trainer with its server: the one that is up, else our own, if the host is this machine."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    local = config.vllm_server_host in sync.LOCAL_HOSTS
    own = local and not sync.is_healthy(config.url)
    with start_server(config) if own else contextlib.nullcontext():
        model = AutoModelForImageTextToText.from_pretrained(config.model, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(config.model)
        if torch.cuda.is_available():  # on the first GPU that is not the server's
            model.to(f"cuda:{config.inference_gpus if local else 0}")
        adapter = MultimodalAdapter(processor)
        yield MultimodalGRPOTrainer(model, processor.tokenizer, adapter, config)


if __name__ == "__main__":
    with served(command_line("train.py")) as trainer:
        trainer.train()
