"""GRPO on a vision-language model: `python train.py @ config.toml [key=value ...]`.

A step: roll out on the vLLM server (rollout.py), update the policy, send its weights (sync.py).
"""
import collections
import contextlib
import difflib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field, fields
from datetime import timedelta
from hashlib import file_digest
from pathlib import Path

# Before torch: threads that spin while they wait take a server's cores: 1.5 s a step, not 0.6 s.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy
import tomli
import torch
import transformers
from torch import Tensor, distributed
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import sync
from adapter import MultimodalAdapter
from batch import MultimodalBatch
from loss import group_advantages, grpo_loss, token_logprobs
from rollout import GenerateOutputs, Generator, ServerError, load_environment

ATTEMPTS = 3  # at anything that needs the server, and at finite numbers, before the run ends
CAUSES = ("weights that do not arrive, a server without --logprobs-mode processed_logprobs, other "
          "dtypes, kernels or pixel limits, or a model that vLLM computes in another way")
MEANS = ("ir", "ent", "kl", "masked_fraction", "clip_fraction")
SAMPLED = ("completion", "answer", "reward", "finish_reason")
MAY_BE_ZERO = ("mask_ratio_low", "max_dropped", "async_steps", "sync_to_vllm_every",
               "inference_gpus", "trainer_gpus")
AT_MOST = {"mask_ratio_low": 1, "clip_low": 1, "max_dropped": 1, "vllm_server_port": 65535}
FULL = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
LORA_SCALE = 2


@dataclass(frozen=True)
class MultimodalRLConfig:
    """All that a run can be told; ValueError names the key whose value cannot be."""
    model: str = ""                         # Hugging Face id or directory
    env_id: str = ""
    env_args: dict = field(default_factory=dict)
    inference_gpus: int = 1
    inference_args: dict = field(default_factory=dict)  # any flags of the vLLM server
    trainer_gpus: int = 1
    run_name: str = "run"                   # from here on: [trainer.args]
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
    lora_rank: int = 0                      # above 0: train adapters of all linear layers (peft)
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
            key, value, number = f.name, getattr(self, f.name), f.type in (int, float)
            kind, most = float | int if f.type is float else f.type, AT_MOST.get(key, 1e12)
            least = "at least" if f.default == 0 or key in MAY_BE_ZERO else "above"
            if not isinstance(value, kind) or number and isinstance(value, bool):
                raise ValueError(f"{key} must be {getattr(kind, '__name__', kind)}, not {value!r}")
            if number and not (0 < value <= most or value == 0 and least == "at least"):
                raise ValueError(f"{key} must be {least} 0 and at most {most:g}, not {value}")
        flags, resume = self.inference_args, self.resume  # max_model_len may be "32k" for vLLM
        if {"/", ":"} & {*self.vllm_server_host}:
            raise ValueError(f"vllm_server_host must be a name or address alone: {self.url}")
        if {"model", "port"} & {*flags}:
            raise ValueError("inference.args: set `model` and vllm_server_port instead")
        if isinstance(longest := flags.get("max_model_len"), int) and self.max_tokens >= longest:
            raise ValueError("max_tokens must be below max_model_len, which holds the prompt, too")
        if flags.get("enable_sleep_mode") and (self.async_steps or self.sync_to_vllm_every != 1):
            raise ValueError("enable_sleep_mode needs async_steps = 0 and sync_to_vllm_every = 1")
        if isinstance(resume, str) and not Path(resume, "checksums.json").exists():
            raise ValueError(f"resume must be true or a checkpoint's folder, not {resume!r}")
        if self.batch_size % self.rollouts_per_step or self.group_size < 2:
            raise ValueError(f"batch_size {self.batch_size} must be rollouts_per_step "
                             f"{self.rollouts_per_step} times G, the group size, at least 2")

    # What follows: G; where the server is, on how many GPUs (0: a CPU), how weights come to it
    group_size = property(lambda self: self.batch_size // self.rollouts_per_step)
    local = property(lambda self: self.vllm_server_host in ("0.0.0.0", "127.0.0.1", "localhost"))
    url = property(lambda self: "http://{}:{}".format(
        "127.0.0.1" if self.local else self.vllm_server_host, self.vllm_server_port))
    server_gpus = property(lambda self: max(1, self.inference_gpus) * torch.cuda.is_available())
    backend = property(lambda self: "gloo" if not self.server_gpus else
                       "nccl" if self.trainer_gpus else "ipc")  # on the server's own GPU


def load_config(path: str, overrides: list[str] = ()) -> MultimodalRLConfig:
    """A TOML file and overrides ("seed=1", "env.args.n=3", "model=X"); ValueError in one line."""
    names, prefix = [f.name for f in fields(MultimodalRLConfig)], "trainer.args."
    keys = {name.replace("_", ".", 1): name for name in names[:6]}  # model, env.id, env.args, ...
    keys |= {prefix + name: name for name in names[6:]}
    try:
        pairs, values = [*tomli.loads(Path(path).read_text()).items()], {}
        for override in overrides:  # a bare key is one of [trainer.args], a bare word a string
            key, equals, text = override.partition("=")
            if not equals:
                raise ValueError(f"override {override!r} is not key=value or table.key=value")
            key = key if "." in key or key == "model" else prefix + key
            try:
                pairs += tomli.loads(f"{key} = {text}").items()
            except tomli.TOMLDecodeError:
                pairs += tomli.loads(f"{key} = {json.dumps(text)}").items()
        for key, value in pairs:  # those of a table are appended
            if name := keys.get(key):
                merge = isinstance(value, dict) and isinstance(values.get(name), dict)
                values[name] = values[name] | value if merge else value
            elif isinstance(value, dict):
                pairs += [(f"{key}.{inner}", value[inner]) for inner in value]
            else:
                plain = {full.removeprefix(prefix): full for full in keys}
                near, *_ = difflib.get_close_matches(key.removeprefix(prefix), plain, cutoff=0)
                raise ValueError(f"unknown key {key!r}; did you mean {plain[near]!r}?")
        if not values.get("model") or not values.get("env_id"):
            raise ValueError('it must set model = "..." and [env] id = "..."')
        return MultimodalRLConfig(**values)
    except (OSError, ValueError) as error:  # tomli's errors are ValueErrors
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def vision_token_ids(model_config) -> list[int]:
    """The ids that stand for images and videos, and their brackets, from the model's config."""
    return sorted({value for name, value in model_config.to_dict().items()
                   if isinstance(value, int) and name.endswith(("token_id", "token_index"))
                   and any(word in name for word in ("image", "video", "vision", "audio"))})


class Policy(torch.nn.Module):
    """The model as a policy; all in one forward, head included, because of sharded weights."""

    def __init__(self, model, temperature: float, banned: list[int]):
        super().__init__()
        self.model, self.temperature, self.banned = model, temperature, banned

    def forward(self, batch: MultimodalBatch, share: bool) -> tuple[Tensor, Tensor]:
        """(logprobs, entropies), both (b, L), 0 off the loss mask."""
        mask, device = batch.loss_mask.bool(), batch.input_ids.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):  # weights are fp32
            states = self.forked_states(batch) if share else self.row_states(batch)  # (N, H)
            head = self.model.get_output_embeddings()
            found = token_logprobs(states, batch.input_ids[mask], head,
                                   self.temperature, self.banned)
        return tuple(values.new_zeros(mask.shape).masked_scatter(mask, values) for values in found)

    def row_states(self, batch: MultimodalBatch) -> Tensor:
        """(N, H), the state before each token in the loss, every row with its own prompt."""
        hidden = self.model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
            **batch.token_tensors(), **batch.images_of(batch.shown()))
        return hidden.last_hidden_state[:, :-1][batch.loss_mask[:, 1:].bool()]

    def forked_states(self, batch: MultimodalBatch) -> Tensor:
        """The same states, with each prompt and its images forwarded once.

        A prompt's cache is forked into one line per completion, whose gradients flow back through
        it and add up. Prompts are padded on the left: their last state is before all first tokens.
        """
        index, (prompts, completions, trained) = batch.prompt_index, batch.fork()
        own, shared = sum(batch.own, []), [*range(max(index.tolist()) + 1)]
        images, positions = batch.images_of(shared), self.positions(prompts, batch, shared)
        prompt = self.model.base_model(**prompts, **images, position_ids=positions, use_cache=True)
        prompt.past_key_values.batch_select_indices(index)
        length = trained.shape[1]  # the state of the last token is before nothing
        inputs = {key: tensor[:, :max(length - 1, 1)] for key, tensor in completions.items()}
        if own:  # images among the completions: count in whole rows, and cut
            rows = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            whole = self.positions(rows | batch.token_tensors(), batch, batch.shown())
            start = (batch.attention_mask * (batch.loss_mask.cumsum(1) == 0)).sum(1, keepdim=True)
            at = start + torch.arange(inputs["input_ids"].shape[1], device=start.device)
            at = at.clamp(max=whole.shape[-1] - 1).expand(*whole.shape[:-1], -1)
            positions = whole.gather(-1, at)
        else:
            positions = positions[..., index, -1:] + inputs["attention_mask"].cumsum(1)  # +1, ...
        inputs["attention_mask"] = torch.cat(
            [prompts["attention_mask"][index], inputs["attention_mask"]], 1)
        completion = self.model.base_model(**inputs, position_ids=positions, use_cache=True,
                                           past_key_values=prompt.past_key_values,
                                           **batch.images_of(own))
        before_first = prompt.last_hidden_state[index, -1:]  # (b, 1, H)
        return torch.cat([before_first, completion.last_hidden_state], 1)[:, :length][trained]

    def positions(self, prompts: dict[str, Tensor], batch: MultimodalBatch, shown) -> Tensor:
        """(P, W_p), or (3, P, W_p) of an M-RoPE model, which counts by itself."""
        count = getattr(self.model.base_model, "get_rope_index", None)
        if count is None or len(prompts) == 2:  # no token types: no images
            return (prompts["attention_mask"].cumsum(1) - 1).clamp(min=0)
        grids = {key: grid for key, grid in batch.images_of(shown).items() if "_thw" in key}
        return count(**prompts, **grids)[0]


class MultimodalGRPOTrainer:
    """Trains a Hugging Face image-text-to-text model, on its device, by GRPO with a vLLM server.

    The tokenizer is saved if the adapter has no processor. Only train() needs the server. Under
    torchrun every rank makes one, of the same model: it is sharded; rank 0 talks to the server.
    """

    def __init__(self, model, tokenizer, adapter: MultimodalAdapter, config: MultimodalRLConfig):
        self.model, self.tokenizer, self.adapter, self.config = model, tokenizer, adapter, config
        self.rank, self.world = join_ranks()
        self.run_dir, self.wandb = Path(config.output_dir, config.run_name), None
        self.environment = config.env_id and load_environment(config.env_id, config.env_args)
        if self.environment and config.eval_every_steps and not len(self.environment.eval):
            raise ValueError(f"eval_every_steps: {config.env_id!r} has no held-out split")
        if config.wandb_project and self.rank == 0:
            import wandb
            self.wandb = wandb.init(project=config.wandb_project, name=config.run_name,
                                    config=vars(config))
        self.step = self.saved = self.bad_steps = self.stopping = self.seconds_sync = 0
        self.past_metrics = ""  # of the run that goes on
        self.banned = vision_token_ids(model.config)
        # dropout would make the trainer another policy than the one that sampled; but
        # Hugging Face checkpoints gradients in training mode alone, and then without a cache
        model.train(config.gradient_checkpointing)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.can_share, self.calibrated = not config.gradient_checkpointing, False
        transformers.set_seed(config.seed)  # the same adapters on every rank
        if config.lora_rank:  # W + LORA_SCALE B A, in all linear layers but the head
            import peft
            peft.inject_adapter_in_model(peft.LoraConfig(
                r=config.lora_rank, lora_alpha=LORA_SCALE * config.lora_rank,
                target_modules="all-linear"), model)
        if config.freeze_vision:
            parts = torch.nn.ModuleList([model.get_decoder(), model.get_output_embeddings()])
            for p in {*model.parameters()} - {*parts.parameters()}:
                p.requires_grad_(False)
        self.logprobs = Policy(model, config.temperature, self.banned)
        if self.world > 1:
            shard(self.logprobs)
        self.device = model.device
        self.optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad),
                                           config.learning_rate, weight_decay=config.weight_decay)
        self.resume()
        self.source = sync.CheckpointSource(model, self.full_weights())
        self.server, self.generator = sync.Server(config), None
        self.ahead = collections.deque()  # steps whose rollouts are under way

    def train(self) -> None:
        """Sync, roll out, update, until max_steps; save, after errors too. Needs the server."""
        config, shown = self.config, ("loss", "ir", "ent", "kl", "reward")
        self.on_lead(self.open_run_dir)
        bar = tqdm(total=config.max_steps, initial=self.step, disable=self.rank > 0)
        try:
            while self.step < config.max_steps and not self.on_lead(lambda: self.stopping):
                self.with_server(self.evaluate)
                start = time.perf_counter()
                outputs = self.with_server(self.rollouts)
                sampled = time.perf_counter()
                metrics = self.update(outputs)
                self.on_lead(lambda: self.log(metrics, outputs, start, sampled))
                bar.set_postfix({name: metrics[name] for name in shown}, refresh=False)
                bar.update()
                if config.save_every_steps and self.step % config.save_every_steps == 0:
                    self.save()
        except Exception as error:
            if self.world == 1 or error is self.common_error:  # one rank alone cannot save
                self.save()
            raise
        bar.close()
        self.save()
        if self.step == config.max_steps:
            self.with_server(self.evaluate)

    def stop(self, number: int = signal.SIGTERM, _frame=None) -> None:
        """End train() after the step at hand, with a checkpoint; the second time: exit at once."""
        if self.stopping and self.world == 1:  # torchrun sends a second one by itself
            sys.exit(128 + number)
        self.stopping, self.server.patience = number, 0  # nor wait for a server any longer

    def on_lead(self, action):
        """action() on rank 0; every rank gets its result, or its exception."""
        found = [None, None]
        try:
            found[0] = action() if self.rank == 0 else None
        except Exception as error:
            found[1] = error
        if self.world > 1:
            distributed.broadcast_object_list(found)
        result, self.common_error = found
        if self.common_error:
            raise self.common_error
        return result

    def with_server(self, action=lambda: None):
        """action() on rank 0, on a server with our weights; restored, if lost, and tried again."""
        def attempts():
            for left in reversed(range(ATTEMPTS)):
                try:
                    self.generator = self.generator or self.environment.generator(
                        self.environment, self.config, self.banned,
                        self.adapter if self.adapter.processor else None)
                    has, every = self.server.version, self.config.sync_to_vllm_every
                    if every and (has is None or has < self.step // every * every):
                        start = time.perf_counter()
                        self.server.send(self.source, self.step)
                        self.seconds_sync = time.perf_counter() - start
                    return action()
                except ServerError as error:
                    if not left:
                        raise
                    tqdm.write(f"{error}; restoring the server")
                    self.ahead.clear()  # what was under way is lost, too
                    self.server.restore()

        return self.on_lead(attempts)

    def rollouts(self) -> GenerateOutputs:
        """This step's completions; those of the next async_steps are begun in the background."""
        config = self.config
        end = min(self.step + 1 + config.async_steps, config.max_steps)
        for step in range(self.step + len(self.ahead), end):
            collect = self.generator.begin(step, config.rollouts_per_step, config.group_size)
            self.ahead.append((collect, self.server.version or 0))
        collect, version = self.ahead.popleft()
        outputs = collect()
        outputs.weight_version = version
        if config.inference_args.get("enable_sleep_mode"):  # until the next weights
            self.server.call("sleep?level=1")
        return outputs

    def full_weights(self) -> dict[str, Tensor]:
        """Every weight by name, adapters folded in; of sharded ones a copy, on rank 0 alone."""
        return fold_adapters(self.model.state_dict() if self.world == 1 else
                             sharded.get_model_state_dict(self.model, options=FULL))

    def deal(self, batch: MultimodalBatch):
        """Yields this rank's micro-batches: (batch, are its prompts shared?, does it count?).

        Ranks must make the same calls of the sharded model. So those of one turn are alike: with
        images or without, and neighbours in length; who gets none repeats another's for nothing.
        """
        share, hidden = self.config.share_prompt, self.model.config.get_text_config().hidden_size
        micros = batch.micro_batches(self.config.micro_batch_size, self.world)
        for images in (True, False):
            alike = [micro for micro in micros if bool(micro.image_rows) == images]
            for start in range(0, len(alike), self.world):
                turn = alike[start:start + self.world]
                pays = all(m.sharing_pays(hidden) for m in turn) if share is None else share
                counts = self.rank < len(turn)
                yield turn[self.rank * counts].to(self.device), self.can_share and pays, counts

    def update(self, outputs: GenerateOutputs) -> dict[str, float]:
        """One optimizer step on the given completions, without a server. Returns its metrics.

        Equal example_id make a group. ir, ent, kl and the like are means over forwarded tokens. If
        loss or gradient are not finite the step is skipped; RuntimeError at the third in a row.
        """
        config, batch, sums = self.config, self.build_batch(outputs), collections.Counter()
        num_tokens = batch.loss_mask.sum().item()
        if num_tokens and not self.calibrated:
            self.calibrate(batch)
        for micro, share, counts in self.deal(batch):
            loss, part = grpo_loss(
                *self.logprobs(micro, share), micro.behavior_logprobs, micro.advantages,
                micro.loss_mask, num_tokens, mask_ratio_low=config.mask_ratio_low,
                mask_ratio_high=config.mask_ratio_high, clip_low=config.clip_low,
                clip_high=config.clip_high)
            (loss * self.world * counts).backward()  # FSDP takes the mean over the ranks
            real = micro.attention_mask
            part |= {"loss": loss, "real": real.sum(), "padding": (1 - real).sum(),
                     "shared": real[:, 0].sum() * share}
            sums.update({name: value.item() * counts for name, value in part.items()})
        if self.world > 1:
            values = torch.tensor([*sums.values()], dtype=torch.float64, device=self.device)
            distributed.all_reduce(values)
            sums = collections.Counter(dict(zip(sums, values.tolist())))
        norm = self.clip_gradients(config.max_grad_norm)
        lr = config.learning_rate * min(1.0, (self.step + 1) / max(1, config.warmup_steps))
        self.optimizer.param_groups[0]["lr"] = lr
        self.bad_steps = 0 if math.isfinite(sums["loss"] + norm) else self.bad_steps + 1
        if not self.bad_steps:
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self.bad_steps:
            self.on_lead(lambda: self.dump(batch))
        self.step += 1
        if config.sync_to_vllm_every and self.step % config.sync_to_vllm_every == 0:
            self.source.weights = self.full_weights()
        return {"step": self.step, "loss": sums["loss"], "grad_norm": norm, "lr": lr,
                **{name: sums[name] / max(sums["tokens"], 1) for name in MEANS},
                "skipped": int(self.bad_steps > 0), "tokens": num_tokens,
                "shared_fraction": sums["shared"] / len(batch),
                "padding_fraction": sums["padding"] / max(sums["padding"] + sums["real"], 1),
                **rollout_metrics(batch, outputs)}

    def clip_gradients(self, most: float) -> float:
        """Their norm, before they are clipped."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), most)
        return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()

    def dump(self, batch: MultimodalBatch) -> None:
        """Write a batch without finite loss or gradient, for torch.load(weights_only=True)."""
        path = self.run_dir / f"bad-batch-{self.step + 1}.pt"
        self.run_dir.mkdir(parents=True, exist_ok=True)
        torch.save(vars(batch), path)
        tqdm.write(said := f"step {self.step + 1}: loss or gradient is not finite; see {path}")
        if self.bad_steps == ATTEMPTS:
            raise RuntimeError(f"{said}. In a row: {ATTEMPTS}; lower learning_rate or mend data")

    def build_batch(self, outputs: GenerateOutputs) -> MultimodalBatch:
        """The adapter's batch with advantages, and without sampled vision tokens."""
        batch = self.adapter.build_batch(outputs).cut_at(self.banned)
        if len(batch) != len(outputs):
            raise ValueError(f"build_batch made {len(batch)} rows of {len(outputs)} completions")
        if self.config.mask_truncated:
            batch.loss_mask[torch.tensor([f == "length" for f in outputs.finish_reason])] = 0
        batch.advantages = group_advantages(batch.rewards, torch.tensor(outputs.example_id),
                                            self.config.divide_by_std)
        return batch

    def calibrate(self, batch: MultimodalBatch) -> dict[str, float]:
        """How far the server's logprobs of a few completions are off; RuntimeError if that is far.

        Prompts will not be shared if that fails, or changes logprobs or gradients of these.
        """
        def probe(share: bool) -> tuple[Tensor, float]:
            logprobs, _ = self.logprobs(micro, share)
            logprobs.sum().backward()
            norm = self.clip_gradients(math.inf)
            self.model.zero_grad()
            return logprobs.detach(), norm

        self.calibrated, trained = True, batch.loss_mask.any(1).nonzero()[:, 0]
        first = torch.linspace(0, max(0, len(trained) - 2), 2).long()  # and each one's neighbour
        rows = torch.cat([first, first + 1]).clamp(max=len(trained) - 1).unique()
        micro = batch.select(trained[rows[:self.config.micro_batch_size]]).to(self.device)
        exact = 1e-4 if self.device.type == "cpu" and self.model.dtype == torch.float32 else 0.2
        alone = probe(False)
        try:
            shared = probe(True) if self.can_share else alone
            torch.testing.assert_close(shared, alone, rtol=exact, atol=exact)
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            self.can_share = False  # a detached cache, say, would lose the prompts' gradients
            self.model.zero_grad()
            tqdm.write("prompts are not shared, every completion is forwarded with its own: "
                       + " ".join(str(error).split())[:200])
        off = (alone[0] - micro.behavior_logprobs)[micro.loss_mask.bool()]
        found = {"max": off.abs().max().item(), "mean": off.abs().mean().item(),
                 "kl": (off.expm1() - off).mean().item()}
        tqdm.write(said := f"trainer and server: logprobs of {len(off)} tokens differ by "
                   "{max:.1e} at most, {mean:.1e} in the mean; KL {kl:.1e}".format(**found))
        far = found["mean"] > min(exact, 0.05)
        if self.on_lead(lambda: far and self.server.version is not None):  # it has our weights
            self.common_error = RuntimeError(f"{said}. These are different policies, by {CAUSES}")
            raise self.common_error
        return found

    def evaluate(self) -> None:
        """Log the mean reward on the held-out split, sampled as in training, if that is due."""
        step, every = self.step, self.config.eval_every_steps
        if every and (step % every == 0 or step == self.config.max_steps):
            outputs = self.generator.evaluate(self.config.eval_samples)
            means = {f"eval/{name}": value for name, value in outputs.means().items()}
            self.write({"step": step, **means})
            tqdm.write(f"step {step}: held-out reward {means['eval/reward']:.3f}")

    def log(self, metrics: dict, outputs: GenerateOutputs, start: float, sampled: float) -> None:
        """A line of metrics.jsonl; every log_every_steps three completions and their images."""
        step, end = self.step, time.perf_counter()
        self.write({**metrics, "tokens_per_second": metrics["tokens"] / (end - start),
                    "staleness": step - 1 - outputs.weight_version,
                    "seconds_waited": max(0.0, start - max(outputs.finished)),
                    "seconds_rollout": sampled - start, "seconds_train": end - sampled,
                    "seconds_sync": self.seconds_sync})
        self.seconds_sync = 0.0
        for reason, count in collections.Counter(outputs.dropped).most_common(3):
            tqdm.write(f"step {step}: {count} completions dropped: {reason[:300]}")
        if metrics["kl"] > self.config.kl_warning:
            tqdm.write(f"step {step}: mismatch KL {metrics['kl']:.2g}, usually from {CAUSES}")
        if step % self.config.log_every_steps == 0:
            folder = self.run_dir / "rollouts" / f"step-{step}"
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(0, len(outputs), max(1, len(outputs) // 3)):
                sample = {key: outputs[key][i] for key in SAMPLED}
                sample["prompt"] = self.tokenizer.decode(outputs.prompt_ids[i])
                (folder / f"{i}.json").write_text(json.dumps(sample, default=str))
                for j, image in enumerate(outputs.images[i]):
                    image.save(folder / f"{i}-{j}.png")

    def write(self, metrics: dict[str, float]) -> None:
        with open(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if self.wandb:
            self.wandb.log(metrics, step=self.step)

    def save(self) -> None:
        """Write run_dir/checkpoint-STEP, for from_pretrained and vLLM too; whole or not at all."""
        if self.saved == self.step:
            return
        self.saved = self.step
        weights, optimizer = sharded.get_state_dict(self.model, self.optimizer, options=FULL)
        if self.rank > 0:
            return
        partial, target = self.run_dir / "unfinished", self.run_dir / f"checkpoint-{self.step}"
        for left_over in (partial, target):
            shutil.rmtree(left_over, ignore_errors=True)
        self.model.save_pretrained(partial, state_dict=fold_adapters(weights))
        (self.adapter.processor or self.tokenizer).save_pretrained(partial)
        name, keys, *rest = numpy.random.get_state()
        torch.save({"step": self.step, "optimizer": optimizer, "torch": torch.get_rng_state(),
                    "unfolded": weights if self.config.lora_rank else None,
                    "cuda": torch.cuda.get_rng_state_all(), "python": random.getstate(),
                    "numpy": (name, keys.tolist(), *rest),
                    "metrics": (self.run_dir / "metrics.jsonl").read_text()},
                   partial / "trainer.pt")
        (partial / "checksums.json").write_text(json.dumps(checksums(partial)))
        partial.rename(target)
        os.sync()  # all of it, before the oldest ones go
        for path in self.checkpoints()[:-self.config.keep_checkpoints]:
            shutil.rmtree(path)

    def checkpoints(self) -> list[Path]:
        """Those of this run, the newest last."""
        return sorted(self.run_dir.glob("checkpoint-*"), key=os.path.getmtime)

    def resume(self) -> None:
        """Load what config.resume asks for; ValueError if it is damaged or of another model."""
        wanted = self.config.resume
        found = [Path(wanted)] if isinstance(wanted, str) else self.checkpoints()[::-1] * wanted
        path = self.on_lead(lambda: next(filter(is_whole, found), None))
        if path is None:
            if isinstance(wanted, str):
                raise ValueError(f"resume = {wanted!r} is no whole checkpoint")
            return
        state = torch.load(path / "trainer.pt", weights_only=True, mmap=True)
        weights = state["unfolded"] or type(self.model).from_pretrained(
            path, dtype=self.model.dtype).state_dict()
        try:
            sharded.set_state_dict(self.model, self.optimizer, model_state_dict=weights,
                                   optim_state_dict=state["optimizer"], options=FULL)
        except RuntimeError as error:
            raise ValueError(f"{path} is of another model or lora_rank: {error!s:.300}") from error
        torch.set_rng_state(state["torch"])
        torch.cuda.set_rng_state_all(state["cuda"])
        random.setstate(state["python"])
        numpy.random.set_state(state["numpy"])
        self.step = self.saved = state["step"]
        if path.resolve().parent == self.run_dir.resolve():
            self.past_metrics = state["metrics"]
        tqdm.write(f"resumed from {path}")

    def open_run_dir(self) -> None:
        """Set the metrics back to the checkpoint's; the folder of a run given up is renamed."""
        metrics = self.run_dir / "metrics.jsonl"
        if metrics.exists() and not self.past_metrics:
            self.run_dir.rename(f"{self.run_dir}-past-{time.time_ns()}")
        self.run_dir.mkdir(parents=True, exist_ok=True)
        metrics.write_text(self.past_metrics)


def shard(policy: Policy) -> None:
    """FSDP2: every rank holds a slice of each block, of its gradient and its optimizer state."""
    bf16 = torch.bfloat16 if torch.cuda.is_available() else None
    precision = MixedPrecisionPolicy(bf16, reduce_dtype=torch.float32)
    blocks = policy.model._no_split_modules
    for module in [*(m for m in policy.modules() if type(m).__name__ in blocks), policy]:
        fully_shard(module, mp_policy=precision)


def fold_adapters(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + LORA_SCALE B A (LoRA, arXiv 2106.09685) under W's own name; in a new dict."""
    folded = {name.replace(".base_layer", ""): tensor for name, tensor in weights.items()
              if ".lora_" not in name}
    for name, a in weights.items():
        if ".lora_A." in name:
            plain, b = name.replace(".lora_A.default", ""), weights[name.replace("_A.", "_B.")]
            folded[plain] = folded[plain] + LORA_SCALE * b @ a
    return folded


def checksums(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of a checkpoint, but for the list of these itself."""
    return {os.path.relpath(path, folder): file_digest(path.open("rb"), "sha256").hexdigest()
            for path in folder.rglob("*") if path.is_file() and path.name != "checksums.json"}


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of the checkpoint is there, with the bytes that were written."""
    with contextlib.suppress(OSError, ValueError):
        if json.loads((checkpoint / "checksums.json").read_text()) == checksums(checkpoint):
            return True
    tqdm.write(f"{checkpoint} is damaged or incomplete")
    return False


def rollout_metrics(batch: MultimodalBatch, outputs: GenerateOutputs) -> dict[str, float]:
    """What the completions were like, whatever is done with them."""
    groups, lengths = torch.tensor(outputs.example_id), batch.loss_mask.sum(1).float()
    alive = len(groups[batch.advantages != 0].unique()) / len(groups.unique())
    return {**outputs.means("reward/"), "reward_std": batch.rewards.std(correction=0).item(),
            "zero_advantage_groups": 1 - alive, "completion_length": lengths.mean().item(),
            "completion_length_max": lengths.max().item(), "dropped": len(outputs.dropped),
            "truncated_fraction": outputs.finish_reason.count("length") / len(outputs)}


@contextlib.contextmanager
def mistakes():
    """An error in here is a mistake of the user's: one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
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


def join_ranks() -> tuple[int, int]:
    """(rank, number of ranks) of this process, grouped with the others if torchrun made it."""
    if "RANK" in os.environ and not distributed.is_initialized():
        distributed.init_process_group(timeout=timedelta(hours=2))  # rank 0 may restart a server
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # vLLM's groups have a store each
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


@contextlib.contextmanager
def served(config: MultimodalRLConfig):
    """Yields a trainer with its server: the one that is up, else, on this machine, our own."""
    if config.trainer_gpus > 1 and "RANK" not in os.environ:  # this process becomes torchrun
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                  f"--nproc-per-node={config.trainer_gpus}", *sys.argv])
    if join_ranks()[0] > 0:
        sys.stdout = open(os.devnull, "w")  # every rank finds the same
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        config.model, dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(config.model)
    if torch.cuda.is_available():  # after those of the server, unless it shares its one
        first = config.inference_gpus if config.local and config.trainer_gpus else 0
        torch.cuda.set_device(first + int(os.environ.get("LOCAL_RANK", 0)))
        model = model if distributed.is_initialized() else model.cuda()  # FSDP moves its slices
    adapter = MultimodalAdapter(processor)
    trainer = MultimodalGRPOTrainer(model, processor.tokenizer, adapter, config)
    with trainer.server if trainer.rank == 0 else contextlib.nullcontext():
        yield trainer


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        with mistakes():
            trainer = stack.enter_context(served(command_line("train.py")))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, trainer.stop)
        trainer.train()
        sys.exit(trainer.stopping and 128 + trainer.stopping)
