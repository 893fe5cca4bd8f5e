"""GRPO on a vision-language model: `python train.py @ config.toml [key=value ...]`.

Each step rolls out prompts on the vLLM server (rollout.py), updates the policy on what came back
and sends the new weights (sync.py). Here are the config, the forward pass, the loop, checkpoints.
"""
import collections
import contextlib
import difflib
import hashlib
import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy
import tomli
import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

import sync
from adapter import MultimodalAdapter
from batch import MultimodalBatch
from loss import group_advantages, grpo_loss, token_logprobs
from rollout import GenerateOutputs, Generator, ServerError, load_environment

ATTEMPTS = 3  # at anything that needs the server, and at finite numbers, before the run ends
CAUSES = ("weights that do not arrive, a server without --logprobs-mode processed_logprobs, "
          "another dtype or attention kernel, or other pixel limits in the server's processor")
MAY_BE_ZERO = ("mask_ratio_low", "max_dropped", "async_steps", "sync_to_vllm_every",
               "inference_gpus", "trainer_gpus")
AT_MOST = {"mask_ratio_low": 1, "clip_low": 1, "max_dropped": 1, "vllm_server_port": 65535}


@dataclass(frozen=True)
class MultimodalRLConfig:
    """All that a run can be told; ValueError names the key whose value cannot be."""
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
    vllm_server_host: str = "0.0.0.0"       # this machine: train.py starts the server itself
    vllm_server_port: int = 8000
    vllm_server_timeout: float = 600        # seconds to come up; also for a weight update
    generation_timeout: float = 600         # seconds for one prompt's completions
    max_concurrent: int = 128               # requests (prompts) in flight
    max_dropped: float = 0.5                # share of a step's completions that may fail
    mask_truncated: bool = False            # leave completions cut by max_tokens out of the loss
    kl_warning: float = 0.05                # mismatch KL of a step from which to warn
    async_steps: int = 1                    # rollouts ahead of the trainer; 0 = exactly on-policy
    sync_to_vllm_every: int = 1             # steps; 0 = never, on purpose
    log_every_steps: int = 10               # sampled rollouts are written
    save_every_steps: int = 0               # 0 = only at the end
    keep_checkpoints: int = 2               # the newest ones
    resume: bool | str = False              # true: from the newest whole checkpoint; or its path
    eval_every_steps: int = 0               # also before the first and after the last step
    eval_samples: int = 1                   # completions per held-out prompt
    wandb_project: str = ""                 # set: log to Weights & Biases too

    def __post_init__(self):
        for f in fields(self):
            value, kind = getattr(self, f.name), float | int if f.type is float else f.type
            if not isinstance(value, kind) or (isinstance(value, bool) and f.type in (int, float)):
                name = getattr(kind, "__name__", kind)
                raise ValueError(f"{f.name} must be {name}, not {value!r}")
            zero, most = f.default == 0 or f.name in MAY_BE_ZERO, AT_MOST.get(f.name, 1e12)
            if f.type in (int, float) and not (0 < value <= most or value == 0 and zero):
                least = "at least" if zero else "above"
                raise ValueError(f"{f.name} must be {least} 0 and at most {most:g}, not {value}")
        if self.max_tokens >= self.inference_args.get("max_model_len", math.inf):
            raise ValueError("max_tokens must be below max_model_len, which holds the prompt, too")
        if self.trainer_gpus > 1:
            raise ValueError(f"trainer.gpus must be 0 or 1, not {self.trainer_gpus}")
        if isinstance(self.resume, str) and not Path(self.resume, "checksums.json").exists():
            raise ValueError(f"resume must be true or a checkpoint's folder, not {self.resume!r}")
        if self.batch_size % self.rollouts_per_step or self.group_size < 2:
            raise ValueError(f"batch_size {self.batch_size} must be rollouts_per_step "
                             f"{self.rollouts_per_step} times G, the group size, at least 2")

    @property
    def group_size(self) -> int:  # G
        return self.batch_size // self.rollouts_per_step

    @property
    def local(self) -> bool:  # then train.py may start the server
        return self.vllm_server_host in ("0.0.0.0", "127.0.0.1", "localhost")

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.local else self.vllm_server_host
        return f"http://{host}:{self.vllm_server_port}"


KEYS = {"model": "model", "env.id": "env_id", "env.args": "env_args",  # in TOML -> in the config
        "inference.gpus": "inference_gpus", "inference.args": "inference_args",
        "trainer.gpus": "trainer_gpus"}
KEYS |= {f"trainer.args.{f.name}": f.name for f in fields(MultimodalRLConfig)
         if f.name not in KEYS.values()}


def load_config(path: str, overrides: list[str] = ()) -> MultimodalRLConfig:
    """A TOML file and overrides ("seed=1", "env.args.n=3", "model=DIR"); ValueError in one line."""
    try:
        found = {}
        for table in (tomli.loads(Path(path).read_text()), *map(read_override, overrides)):
            for key, value in flatten(table):
                if key not in KEYS:
                    near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0)[0]
                    raise ValueError(f"unknown key {key!r}; did you mean {near!r}?")
                old = found.get(KEYS[key])
                both = isinstance(value, dict) and isinstance(old, dict)
                found[KEYS[key]] = old | value if both else value
        config = MultimodalRLConfig(**found)
        if not config.model or not config.env_id:
            raise ValueError('it must set model = "..." and [env] id = "..."')
        return config
    except (OSError, ValueError) as error:  # tomli's errors are ValueErrors
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def flatten(table: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, dict) and prefix + key not in KEYS:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def read_override(override: str) -> dict:
    """"key=value" as tables; a bare key is one of [trainer.args], a bare word a string."""
    key, equals, text = override.partition("=")
    key = key if "." in key or key == "model" else f"trainer.args.{key}"
    for value in (text, json.dumps(text)) if equals else ():
        with contextlib.suppress(tomli.TOMLDecodeError):
            return tomli.loads(f"{key} = {value}")
    raise ValueError(f"override {override!r} is not key=value or table.key=value")


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
    """Trains a Hugging Face image-text-to-text model, on its device, by GRPO against a vLLM server.

    The tokenizer is saved with checkpoints, unless the adapter has a processor. Only train() needs
    the server.
    """

    def __init__(self, model, tokenizer, adapter: MultimodalAdapter, config: MultimodalRLConfig):
        self.model, self.tokenizer, self.adapter, self.config = model, tokenizer, adapter, config
        self.device = next(model.parameters()).device
        on_gpu = self.device.type == "cuda"
        self.fp32 = not on_gpu and model.dtype == torch.float32
        self.environment = config.env_id and load_environment(config.env_id, config.env_args)
        if self.environment and config.eval_every_steps and not len(self.environment.eval):
            raise ValueError(f"eval_every_steps: {config.env_id!r} has no held-out split")
        self.run_dir = Path(config.output_dir, config.run_name)
        self.wandb = config.wandb_project and importlib.import_module("wandb").init(
            project=config.wandb_project, name=config.run_name, config=asdict(config))
        self.step = self.saved = self.bad_steps = self.stopping = 0
        self.banned = vision_token_ids(model.config)
        self.hidden_size = model.config.get_text_config().hidden_size
        self.logprobs = Policy(model, config.temperature, self.banned)
        # dropout would make the trainer another policy than the one that sampled; but
        # Hugging Face checkpoints gradients in training mode alone, and then without a cache
        model.train(config.gradient_checkpointing)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.can_share, self.calibrated = not config.gradient_checkpointing, False
        if config.freeze_vision:
            model.requires_grad_(False)
            for part in (model.get_decoder(), model.get_output_embeddings()):
                part.requires_grad_(True)
        self.optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad),
                                           config.learning_rate, weight_decay=config.weight_decay)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / max(1, config.warmup_steps)))
        self.ahead = collections.deque()  # steps whose rollouts are under way
        self.server, self.generator = sync.Server(config.url, config.vllm_server_timeout), None
        self.weights = sync.WeightSync(
            config.url, sync.CheckpointSource(model, torch.bfloat16 if on_gpu else None),
            "nccl" if on_gpu else "gloo", config.vllm_server_timeout)

    def train(self) -> None:
        """Roll out, update, sync, until max_steps. The server must be up, or come up in time.

        Continues an earlier run if config.resume says so. An error leaves a checkpoint behind.
        """
        config = self.config
        self.resume()
        self.connect()
        bar = tqdm(total=config.max_steps, initial=self.step)
        try:
            while self.step < config.max_steps and not self.stopping:
                if config.eval_every_steps and self.step % config.eval_every_steps == 0:
                    self.evaluate()
                clock = [time.perf_counter()]
                outputs = self.with_server(self.rollouts)
                clock.append(time.perf_counter())
                metrics = self.update(outputs)
                clock.append(time.perf_counter())
                if config.sync_to_vllm_every and self.step % config.sync_to_vllm_every == 0:
                    self.with_server(self.send_weights)
                clock.append(time.perf_counter())
                self.log(metrics, clock, outputs)
                bar.set_postfix({name: f"{metrics[name]:.3g}" for name in
                                 ("loss", "ir", "ent", "kl", "reward")}, refresh=False)
                bar.update()
                if config.save_every_steps and self.step % config.save_every_steps == 0:
                    self.save()
        except Exception:
            self.save()
            raise
        bar.close()
        self.save()
        if config.eval_every_steps and not self.stopping:
            self.evaluate()

    def stop(self, number: int = signal.SIGTERM, _frame=None) -> None:
        """End train() after the step at hand, with a checkpoint; the second time: exit at once."""
        if self.stopping:
            sys.exit(128 + number)
        self.stopping = number

    def connect(self) -> None:
        """Wait for the server; send it our weights, whatever it served before."""
        config = self.config
        if not self.server.is_healthy():
            self.server.restore()
        self.generator = Generator(self.environment, config.url, config,
                                   {i: -100 for i in self.banned},
                                   self.adapter.encode if self.adapter.processor else None)
        self.with_server(self.send_weights)

    def with_server(self, action):
        """action(); after a ServerError again, with the server restored and our weights on it."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                if attempt > 1:
                    self.server.restore()
                    self.weights.engine = None  # a new server knows nothing of the old group
                    self.send_weights()
                return action()
            except ServerError as error:
                if attempt == ATTEMPTS:
                    raise
                tqdm.write(f"{error}; restoring the server")
                self.ahead.clear()  # what was under way is lost, too

    def send_weights(self) -> None:
        if self.config.sync_to_vllm_every:
            self.weights.send(self.step)
            self.generator.version = self.step

    def rollouts(self) -> GenerateOutputs:
        """This step's completions; those of the next async_steps are begun in the background."""
        config = self.config
        end = min(self.step + 1 + config.async_steps, config.max_steps)
        for step in range(self.step + len(self.ahead), end):
            self.ahead.append(self.generator.begin(step, config.rollouts_per_step,
                                                   config.group_size))
        return self.ahead.popleft()()

    def update(self, outputs: GenerateOutputs) -> dict[str, float]:
        """One optimizer step on the given completions, without a server. Returns its metrics.

        Equal example_id make a group. ir, ent, kl and the like are means over forwarded tokens. If
        loss or gradient are not finite the step is skipped; RuntimeError at the third in a row.
        """
        config, batch = self.config, self.build_batch(outputs)
        num_tokens, sums = batch.loss_mask.sum().item(), collections.Counter()
        if num_tokens and not self.calibrated:
            self.calibrate(batch)
        for micro in batch.micro_batches(config.micro_batch_size):
            share = self.can_share and (config.share_prompt or config.share_prompt is None
                                        and micro.sharing_pays(self.hidden_size))
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
        finite = math.isfinite(sums["loss"] + grad_norm)
        if finite:
            self.optimizer.step()
        else:
            self.dump(batch)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        self.optimizer.zero_grad()
        lr = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        self.step += 1
        means = {name: sums[name] / max(sums["tokens"], 1)
                 for name in ("ir", "ent", "kl", "masked_fraction", "clip_fraction")}
        return {"step": self.step, "loss": sums["loss"], **means, "grad_norm": grad_norm.item(),
                "lr": lr, "skipped": int(not finite), "tokens": num_tokens,
                "shared_fraction": sums["shared"] / len(batch),
                "padding_fraction": 1 - sums["real"] / max(sums["cells"], 1),
                **rollout_metrics(batch, outputs)}

    def dump(self, batch: MultimodalBatch) -> None:
        """Write a batch without finite loss or gradient, as torch.load(weights_only=True) reads."""
        path = self.run_dir / f"bad-batch-{self.step + 1}.pt"
        self.run_dir.mkdir(parents=True, exist_ok=True)
        torch.save(vars(batch), path)
        tqdm.write(message := f"step {self.step + 1}: loss or gradient is not finite; see {path}")
        if self.bad_steps == ATTEMPTS - 1:
            raise RuntimeError(f"{message}. In a row: {ATTEMPTS}. Lower learning_rate, or look for "
                               "pixels or tokens that this model cannot compute")

    def build_batch(self, outputs: GenerateOutputs) -> MultimodalBatch:
        """The adapter's batch with advantages, and without sampled vision tokens."""
        batch = self.adapter.build_batch(outputs)
        if len(batch) != len(outputs):
            raise ValueError(f"build_batch made {len(batch)} rows of {len(outputs)} completions")
        batch = batch.cut_at(self.banned)
        if self.config.mask_truncated:
            batch.loss_mask[torch.tensor([f == "length" for f in outputs.finish_reason])] = 0
        batch.advantages = group_advantages(batch.rewards, torch.tensor(outputs.example_id),
                                            self.config.divide_by_std)
        return batch

    def calibrate(self, batch: MultimodalBatch) -> dict[str, float]:
        """Recompute a few completions, prompts shared and not; print how far the server's are off.

        Prompts will not be shared if that fails, or changes logprobs or gradient (as a detached
        cache would). RuntimeError if the server is another policy than the dtype explains.
        """
        self.calibrated, passes = True, []
        trained = batch.loss_mask.bool().any(1).nonzero()[:, 0]
        first = torch.linspace(0, max(0, len(trained) - 2), 4).long()  # and each one's neighbour
        rows = torch.cat([first, first + 1]).clamp(max=len(trained) - 1).unique()
        micro = batch.select(trained[rows[:self.config.micro_batch_size]]).to(self.device)
        exact, mean_exact = (1e-4, 1e-4) if self.fp32 else (0.2, 0.05)
        try:
            for share in (False, True)[:1 + self.can_share]:
                logprobs, _ = self.logprobs(micro, share)
                (logprobs.sum(1) @ torch.arange(1.0, len(micro) + 1).to(self.device)).backward()
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), math.inf)
                passes.append((logprobs.detach(), norm))
                self.model.zero_grad()
            (plain, plain_norm), (shared, norm) = passes[0], passes[-1]
            off = (plain - shared).abs().max()
            if not (off <= exact and abs(norm - plain_norm) <= 10 * exact * plain_norm):
                raise ValueError(f"logprobs differ by {off:.1e}, gradients {plain_norm}, {norm}")
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            if not passes:
                raise
            self.can_share = False
            self.model.zero_grad()
            tqdm.write("prompts are not shared, every completion is forwarded with its own: "
                       f"{type(error).__name__}: {str(error)[:200]}")
        off = (passes[0][0] - micro.behavior_logprobs)[micro.loss_mask.bool()]
        found = {"max": off.abs().max().item(), "mean": off.abs().mean().item(),
                 "kl": (off.expm1() - off).mean().item()}
        said = (f"trainer and server: logprobs of {len(off)} tokens differ by {found['max']:.1e}"
                f" at most, {found['mean']:.1e} in the mean; mismatch KL {found['kl']:.1e}")
        if self.generator and self.config.sync_to_vllm_every and found["mean"] > mean_exact:
            raise RuntimeError(f"{said}. These are different policies: {CAUSES}; or vLLM does not "
                               "compute this model as transformers does")
        tqdm.write(said)
        return found

    def evaluate(self) -> None:
        """Print and log the mean reward on the held-out split, sampled as in training."""
        outputs = self.with_server(lambda: self.generator.evaluate(self.config.eval_samples))
        means = {f"eval/{name}": sum(values) / len(outputs) for name, values in
                 {"reward": outputs.reward, **outputs.metrics}.items()}
        self.write({"step": self.step, **means})
        tqdm.write(f"step {self.step}: held-out reward {means['eval/reward']:.3f} "
                   f"({len(outputs)} completions)")

    def log(self, metrics: dict, clock: list[float], outputs: GenerateOutputs) -> None:
        """A line of metrics.jsonl; every log_every_steps three completions and their images."""
        seconds = [end - start for start, end in zip(clock, clock[1:])]
        self.write({**metrics, "tokens_per_second": metrics["tokens"] / sum(seconds),
                    "staleness": metrics["step"] - 1 - outputs.weight_version,
                    "seconds_waited": max(0.0, clock[0] - outputs.finished),
                    **dict(zip(("seconds_rollout", "seconds_train", "seconds_sync"), seconds))})
        for reason, count in collections.Counter(outputs.dropped).most_common(3):
            tqdm.write(f"step {self.step}: {count} completions dropped: {reason[:300]}")
        if metrics["kl"] > self.config.kl_warning:
            tqdm.write(f"step {self.step}: mismatch KL {metrics['kl']:.2g}, usually from {CAUSES}")
        if self.step % self.config.log_every_steps == 0:
            folder = self.run_dir / "rollouts" / f"step-{self.step}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(0, len(outputs), max(1, len(outputs) // 3)):
                record = {name: outputs[name][i] for name in
                          ("completion", "answer", "reward", "finish_reason")}
                record["prompt"] = self.tokenizer.decode(outputs.prompt_ids[i])
                (folder / f"{i}.json").write_text(json.dumps(record, default=str))
                for j, image in enumerate(outputs.images[i]):
                    image.save(folder / f"{i}-{j}.png")

    def write(self, metrics: dict[str, float]) -> None:
        with open(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if self.wandb:
            self.wandb.log(metrics, step=self.step)

    def save(self) -> None:
        """Write run_dir/checkpoint-STEP: for from_pretrained, for vLLM, and to resume from.

        It appears whole or not at all, and older ones go only after that.
        """
        if self.saved == self.step:
            return
        partial, target = self.run_dir / "unfinished", self.run_dir / f"checkpoint-{self.step}"
        shutil.rmtree(partial, ignore_errors=True)
        for part in (self.model, self.adapter.processor or self.tokenizer):
            part.save_pretrained(partial)
        name, keys, *rest = numpy.random.get_state()
        torch.save({"step": self.step, "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict(), "torch": torch.get_rng_state(),
                    "cuda": torch.cuda.get_rng_state_all(), "python": random.getstate(),
                    "numpy": (name, keys.tolist(), *rest),
                    "metrics_bytes": os.path.getsize(self.run_dir / "metrics.jsonl")},
                   partial / "trainer.pt")
        (partial / "checksums.json").write_text(json.dumps(checksums(partial)))
        os.sync()  # before the name says that it is whole
        partial.rename(target)
        os.sync()
        self.saved = self.step
        for path in self.checkpoints()[:-self.config.keep_checkpoints]:
            shutil.rmtree(path)

    def checkpoints(self) -> list[Path]:
        """Those of this run, the newest last."""
        return sorted(self.run_dir.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))

    def resume(self) -> None:
        """Load the checkpoint at config.resume, if True this run's newest whole one.

        What came after it, and a run that is not continued, is renamed. ValueError for a bad path.
        """
        wanted, own, past = self.config.resume, self.checkpoints(), f"past-{time.time():.0f}"
        for path in [Path(wanted)] if isinstance(wanted, str) else own[::-1] if wanted else []:
            if is_whole(path):
                state = self.load(path)
                break
            tqdm.write(f"{path} is damaged or incomplete")
        else:
            path = self.run_dir
            transformers.set_seed(self.config.seed)
            if isinstance(wanted, str):
                raise ValueError(f"resume = {wanted!r} is no whole checkpoint")
        metrics = self.run_dir / "metrics.jsonl"
        if path.resolve().parent == self.run_dir.resolve():
            metrics.touch()
            os.truncate(metrics, min(state["metrics_bytes"], os.path.getsize(metrics)))
            for later in own[own.index(self.run_dir / path.name) + 1:]:
                later.rename(self.run_dir / f"{past}-{later.name}")
        elif metrics.exists():
            self.run_dir.rename(f"{self.run_dir}-{past}")
        self.run_dir.mkdir(parents=True, exist_ok=True)
        metrics.touch()
        self.saved = self.step

    def load(self, path: Path) -> dict:
        """Weights, optimizer, scheduler, step and random generators of a checkpoint."""
        state = torch.load(path / "trainer.pt", weights_only=True)
        saved = type(self.model).from_pretrained(path, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]
        torch.set_rng_state(state["torch"])
        torch.cuda.set_rng_state_all(state["cuda"])
        random.setstate(state["python"])
        numpy.random.set_state(state["numpy"])
        tqdm.write(f"resumed from {path}")
        return state


def checksums(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of a checkpoint, but for the list of these itself."""
    sums = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "checksums.json":
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            sums[str(path.relative_to(folder))] = digest.hexdigest()
    return sums


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of the checkpoint is there, with the bytes that were written."""
    try:
        return json.loads((checkpoint / "checksums.json").read_text()) == checksums(checkpoint)
    except (OSError, ValueError):
        return False


def rollout_metrics(batch: MultimodalBatch, outputs: GenerateOutputs) -> dict[str, float]:
    """What the completions were like, whatever is done with them."""
    groups, lengths = torch.tensor(outputs.example_id), batch.loss_mask.sum(1).float()
    alive = len(groups[batch.advantages != 0].unique()) / len(groups.unique())
    means = {"reward": outputs.reward} | {f"reward/{k}": v for k, v in outputs.metrics.items()}
    return {**{name: sum(values) / len(values) for name, values in means.items()},
            "reward_std": batch.rewards.std(correction=0).item(),
            "zero_advantage_groups": 1 - alive, "completion_length": lengths.mean().item(),
            "completion_length_max": lengths.max().item(), "dropped": len(outputs.dropped),
            "truncated_fraction": outputs.finish_reason.count("length") / len(outputs)}


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
    """An error in here is a mistake of the user's: one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def command_line(program: str) -> MultimodalRLConfig:
    """sys.argv: "@ config.toml key=value ..."; ValueError for a mistake in it or in the config."""
    transformers.logging.disable_progress_bar()  # an error is one line
    for number in (signal.SIGINT, signal.SIGTERM):  # unwind, so that a server of ours is stopped
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    words = " ".join(sys.argv[1:2]).removeprefix("@").split() + sys.argv[2:]
    if not words or not sys.argv[1].startswith("@"):
        raise ValueError(f"usage: python {program} @ config.toml [key=value ...]")
    return load_config(words[0], words[1:])


def make_server(config: MultimodalRLConfig) -> sync.Server:
    """vLLM on the first inference_gpus GPUs, or on the CPU where there are none; to be entered."""
    gpus = config.inference_gpus if torch.cuda.is_available() else 0
    command = sync.server_command(config.model, config.vllm_server_port, gpus,
                                  config.inference_args)
    return sync.Server(config.url, config.vllm_server_timeout, config.local and command, gpus,
                       Path(config.output_dir, f"{config.run_name}-vllm.log"))


@contextlib.contextmanager
def served(config: MultimodalRLConfig) -> Iterator[MultimodalGRPOTrainer]:
    """A trainer with its server: the one that is up, else our own, if the host is this machine."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        config.model, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(config.model)
    if torch.cuda.is_available():  # on the first GPU that is not the server's
        model.to(f"cuda:{config.inference_gpus if config.local else 0}")
    adapter = MultimodalAdapter(processor)
    trainer = MultimodalGRPOTrainer(model, processor.tokenizer, adapter, config)
    with make_server(config) as trainer.server:
        yield trainer


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        with mistakes():
            trainer = stack.enter_context(served(command_line("train.py")))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, trainer.stop)
        trainer.train()
        sys.exit(trainer.stopping and 128 + trainer.stopping)
