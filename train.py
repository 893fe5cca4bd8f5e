"""GRPO on a vision-language model, in one command: `python train.py @ config.toml [key=value ...]`.

The loop is three calls: roll out the step's prompts on the vLLM server (rollout.py), take one
optimizer step on what came back (update), send the new weights to the server (sync.py). This
file owns the config, the policy's forward pass, the trainer and the command line.
"""
import contextlib
import difflib
import json
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import tomli
import torch
from torch import Tensor
from tqdm import tqdm

import sync
from adapter import MultimodalAdapter
from batch import MultimodalBatch
from loss import group_advantages, grpo_loss, token_logprobs
from rollout import GenerateOutputs, Generator, load_environment


@dataclass(frozen=True)
class MultimodalRLConfig:
    """Everything the trainer can be told; in TOML the keys of [trainer.args] (env_* in [env]).

    Raises ValueError naming the key whose value cannot be.
    """
    env_id: str = ""
    env_args: dict = field(default_factory=dict)
    run_name: str = "run"
    output_dir: str = "./outputs"        # everything is written to output_dir/run_name
    seed: int = 0

    max_steps: int = 500
    batch_size: int = 512                # completions per optimizer step
    rollouts_per_step: int = 16          # prompts per step; G = batch_size / rollouts_per_step
    micro_batch_size: int = 4            # completions per forward/backward: lower it for memory
    learning_rate: float = 1e-5
    warmup_steps: int = 0                # linear, then constant
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mask_ratio_low: float = 0.1          # tokens whose importance ratio lies outside are left out
    mask_ratio_high: float = 10.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    divide_by_std: bool = False          # of the group's rewards, as the first GRPO paper did
    share_prompt: bool | None = None     # unset: decided per micro-batch, by counting work
    gradient_checkpointing: bool = False
    freeze_vision: bool = False          # train the language model alone

    temperature: float = 1.0
    max_tokens: int = 512
    vllm_server_host: str = "0.0.0.0"    # a local name: train.py starts the server itself
    vllm_server_port: int = 8000
    vllm_server_timeout: float = 600     # seconds: to come up; also for a weight update
    generation_timeout: float = 600      # seconds: for one prompt's completions
    max_concurrent: int = 128            # requests (prompts) in flight
    sync_to_vllm_every: int = 1          # steps; 0 = never, on purpose

    log_every_steps: int = 10            # sampled rollouts are written
    save_every_steps: int = 0            # 0 = only at the end
    eval_every_steps: int = 0            # also before the first and after the last; 0 = never
    eval_samples: int = 1                # completions per held-out prompt
    wandb_project: str = ""              # set: log to Weights & Biases too

    def __post_init__(self):
        check_types(self, "")
        for name in ("max_steps", "batch_size", "rollouts_per_step", "micro_batch_size",
                     "learning_rate", "max_grad_norm", "temperature", "max_tokens",
                     "vllm_server_port", "vllm_server_timeout", "generation_timeout",
                     "max_concurrent", "log_every_steps", "eval_samples"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.batch_size % self.rollouts_per_step:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of rollouts_per_step "
                             f"{self.rollouts_per_step}: G = batch_size / rollouts_per_step")
        if self.group_size < 2:
            raise ValueError("batch_size / rollouts_per_step is G = 1, but GRPO compares completions "
                             "of one prompt: G must be at least 2")

    @property
    def group_size(self) -> int:
        """G, completions per prompt."""
        return self.batch_size // self.rollouts_per_step


@dataclass(frozen=True)
class RunConfig:
    """A config file: which model, on how many GPUs, with which trainer config."""
    model: str
    trainer: MultimodalRLConfig
    inference_gpus: int = 1
    inference_args: dict = field(default_factory=dict)  # any flags of the vLLM server
    trainer_gpus: int = 1


def check_types(config, where: str) -> None:
    """Raises ValueError if a field holds another type than it declares; an int may be a float."""
    for f in fields(config):
        value = getattr(config, f.name)
        allowed = {float: (float, int), bool | None: (bool, type(None))}.get(f.type, f.type)
        if not isinstance(value, allowed) or (isinstance(value, bool) and f.type in (int, float)):
            raise ValueError(f"{where}{f.name} must be {getattr(f.type, '__name__', f.type)}, "
                             f"not {value!r}")


def check_keys(table: dict, valid: list[str], where: str) -> None:
    """Raises ValueError naming the first unknown key and the nearest valid one."""
    for key in table:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(valid)}"
            raise ValueError(f"unknown key {where}{key}; {hint}")


def load_config(path: str, overrides: list[str] = ()) -> RunConfig:
    """Read a TOML file, then overrides "learning_rate=1e-4" or "env.args.seed=1".

    Raises ValueError in one line naming the file, the key and the nearest valid one.
    """
    try:
        raw = tomli.loads(Path(path).read_text())
        for override in overrides:
            apply_override(raw, override)
        check_keys(raw, ["model", "env", "inference", "trainer"], "")
        env, inference, trainer = (raw.get(name, {}) for name in ("env", "inference", "trainer"))
        for name, table in (("env", env), ("inference", inference), ("trainer", trainer)):
            if not isinstance(table, dict):
                raise ValueError(f"{name} must be a table, not {table!r}")
            check_keys(table, ["id", "args"] if name == "env" else ["gpus", "args"], f"{name}.")
        if not isinstance(raw.get("model"), str) or not isinstance(env.get("id"), str):
            raise ValueError('it must set model = "..." and [env] id = "..."')
        args = trainer.get("args", {})
        check_keys(args, [f.name for f in fields(MultimodalRLConfig)], "trainer.args.")
        config = RunConfig(raw["model"], MultimodalRLConfig(
            **{"env_id": env["id"], "env_args": env.get("args", {}), **args}),
            inference.get("gpus", 1), inference.get("args", {}), trainer.get("gpus", 1))
        check_types(config, "")
        return config
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # tomli's errors are ValueErrors too
        raise ValueError(f"{path}: {error}") from error


def apply_override(raw: dict, override: str) -> None:
    """Set one key of the raw tables; a bare key is one of [trainer.args] (or `model`)."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"{override!r} is not key=value")
    try:
        value = tomli.loads(f"value = {text}")["value"]
    except tomli.TOMLDecodeError:
        value = text  # a bare string
    *tables, last = key.split(".") if "." in key or key == "model" else ["trainer", "args", key]
    for table in tables:
        raw = raw.setdefault(table, {})
        if not isinstance(raw, dict):
            raise ValueError(f"override {override!r}: {table} is not a table")
    raw[last] = value


def vision_token_ids(model_config) -> list[int]:
    """The ids that stand for images and videos, and their brackets, from the model's config."""
    ids = {value for name, value in model_config.to_dict().items()
           if isinstance(value, int) and name.endswith(("token_id", "token_index"))
           and any(word in name for word in ("image", "video", "vision", "audio"))}
    return sorted(i for i in ids if i >= 0)


class Policy(torch.nn.Module):
    """The model as a policy: logprobs and entropies of the tokens in the loss.

    Everything from ids to logprobs happens in this one forward, head included, so that sharded
    parameters are gathered once.
    """

    def __init__(self, model, temperature: float, banned: list[int]):
        super().__init__()
        self.model, self.temperature, self.banned = model, temperature, banned

    def forward(self, batch: MultimodalBatch, share: bool) -> tuple[Tensor, Tensor]:
        """(logprobs, entropies), both (b, L), 0 off the loss mask."""
        states = self._forked_states(batch) if share else self._row_states(batch)  # (N, H)
        mask = batch.loss_mask.bool()
        found = token_logprobs(states, batch.input_ids[mask], self.model.get_output_embeddings(),
                               self.temperature, self.banned)
        zeros = torch.zeros(mask.shape, device=mask.device)
        return tuple(zeros.masked_scatter(mask, values) for values in found)

    def _images(self, batch: MultimodalBatch, per_row: bool) -> dict[str, Tensor]:
        """Image tensors, once per prompt or once per row, floats in the model's dtype."""
        prompts = batch.prompt_index.tolist() if per_row else None
        images = {}
        for key, tensor in batch.image_tensors().items():
            if per_row:
                pieces = tensor.split(batch.image_rows[key])
                tensor = torch.cat([pieces[p] for p in prompts])
            images[key] = tensor.to(self.model.dtype) if tensor.is_floating_point() else tensor
        return images

    def _row_states(self, batch: MultimodalBatch) -> Tensor:
        """The plain way: every row with its prompt and its images. States before loss tokens."""
        hidden = self.model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False,
            **batch.token_tensors(), **self._images(batch, per_row=True)).last_hidden_state
        return hidden[:, :-1][batch.loss_mask[:, 1:].bool()]

    def _forked_states(self, batch: MultimodalBatch) -> Tensor:
        """The prompt once: its cache is forked into one line per completion.

            prompt 0   [. . p p p p] --cache--+--> [a a a]      row 0
                                              +--> [b b b b b]  row 1
            prompt 1   [p p p p p p] --cache-----> [c c]        row 2

        Prompts are left-padded, so that each ends where its completions begin and column -1
        scores their first tokens; completions are right-padded. Gradients of all completions
        flow back through the forked cache and add up in the one prompt.
        """
        fork = batch.fork()
        width = fork.prompt_mask.shape[1]
        positions = self._positions(fork, batch)
        prompt = self.model.base_model(
            input_ids=fork.prompt_ids, attention_mask=fork.prompt_mask, use_cache=True,
            position_ids=positions[..., :width], **fork.prompt_tokens,
            **self._images(batch, per_row=False))
        cache = prompt.past_key_values
        cache.batch_select_indices(batch.prompt_index)
        first = prompt.last_hidden_state[:, -1][batch.prompt_index]  # (b, H)
        length = fork.completion_ids.shape[1]
        steps = max(length - 1, 1)  # the last token's own state predicts nothing
        rows = positions[..., batch.prompt_index, width:width + steps]
        mask = torch.cat([fork.prompt_mask[batch.prompt_index], fork.completion_mask], 1)
        rest = self.model.base_model(
            input_ids=fork.completion_ids[:, :steps], attention_mask=mask[:, :width + steps],
            position_ids=rows, past_key_values=cache, use_cache=True,
            **{key: tensor.new_zeros(len(batch), steps)
               for key, tensor in fork.prompt_tokens.items()}).last_hidden_state
        states = torch.cat([first[:, None], rest], 1)[:, :length]
        return states[fork.completion_loss_mask.bool()]

    def _positions(self, fork, batch: MultimodalBatch) -> Tensor:
        """(P, W) or (3, P, W): the prompt's and then its completions' positions.

        M-RoPE gives an image fewer positions than tokens; such models count for themselves.
        """
        width = fork.completion_ids.shape[1]
        mask = torch.nn.functional.pad(fork.prompt_mask, (0, width), value=1)
        count = getattr(self.model.base_model, "get_rope_index", None)
        if count is None or not fork.prompt_tokens:
            return (mask.cumsum(1) - 1).clamp(min=0)
        pad = {key: torch.nn.functional.pad(tensor, (0, width))
               for key, tensor in {"input_ids": fork.prompt_ids, **fork.prompt_tokens}.items()}
        grids = {key: t for key, t in batch.image_tensors().items() if key.endswith("_thw")}
        return count(**pad, **grids, attention_mask=mask)[0]


class MultimodalGRPOTrainer:
    """Trains `model` on an environment by GRPO against a vLLM server.

    model: a Hugging Face image-text-to-text model, on the device where it shall be trained;
    tokenizer: saved with the checkpoints (the adapter's processor is, where it has one);
    adapter: a MultimodalAdapter. Construction contacts no server; train() needs one.
    """

    def __init__(self, model, tokenizer, adapter: MultimodalAdapter, config: MultimodalRLConfig):
        self.model, self.tokenizer, self.adapter, self.config = model, tokenizer, adapter, config
        self.device = next(model.parameters()).device
        self.environment = load_environment(config.env_id, config.env_args) if config.env_id else None
        self.run_dir = Path(config.output_dir, config.run_name)
        self.step = 0
        self.share = config.share_prompt  # None: not yet known to be exact for this model
        self.banned = vision_token_ids(model.config)
        self.policy = Policy(model, config.temperature, self.banned)
        # dropout would make the trainer another policy than the one that sampled; but
        # Hugging Face checkpoints gradients in training mode alone
        model.train(config.gradient_checkpointing)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            self.share = False
        if config.freeze_vision:
            model.requires_grad_(False)
            model.get_decoder().requires_grad_(True)
            model.get_output_embeddings().requires_grad_(True)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate,
                                           weight_decay=config.weight_decay)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / max(1, config.warmup_steps)))

    def train(self) -> None:
        """Roll out, update, sync, until max_steps. The server must be up, or come up in time."""
        config = self.config
        generator, weights = self._connect()
        bar = tqdm(range(self.step, config.max_steps), initial=self.step, total=config.max_steps)
        for _ in bar:
            if config.eval_every_steps and self.step % config.eval_every_steps == 0:
                self.evaluate(generator)
            clock = [time.perf_counter()]
            outputs = generator.train_step(self.step, config.rollouts_per_step, config.group_size)
            clock.append(time.perf_counter())
            metrics = self.update(outputs)
            clock.append(time.perf_counter())
            if weights and self.step % config.sync_to_vllm_every == 0:
                weights.send(self.step)
            clock.append(time.perf_counter())
            seconds = [end - start for start, end in zip(clock, clock[1:])]
            metrics |= dict(zip(("seconds_rollout", "seconds_train", "seconds_sync"), seconds),
                            tokens_per_second=metrics["tokens"] / sum(seconds))
            self.log(metrics, outputs)
            bar.set_postfix({name: f"{metrics[name]:.3g}"
                             for name in ("loss", "ir", "ent", "kl", "reward")})
            if config.save_every_steps and self.step % config.save_every_steps == 0:
                self.save()
        if config.eval_every_steps:
            self.evaluate(generator)
        self.save()
        if weights:
            weights.close()

    def update(self, outputs: GenerateOutputs) -> dict[str, float]:
        """One optimizer step on the given completions; needs no server. Returns its metrics.

        Completions of equal example_id are a group.
        """
        batch = self.adapter.build_batch(outputs)
        if len(batch) != len(outputs):
            raise ValueError(f"build_batch made {len(batch)} rows of {len(outputs)} completions")
        batch = batch.cut_at(self.banned)
        batch.advantages = group_advantages(batch.rewards, torch.tensor(outputs.example_id),
                                            self.config.divide_by_std)
        if self.share is None:
            self.share = self._sharing_is_exact(batch)
        num_tokens = batch.loss_mask.sum().item()
        loss, sums, cells, shared = 0.0, {}, 0, 0
        for micro in batch.micro_batches(self.config.micro_batch_size):
            share = self.share and (self.config.share_prompt or self._sharing_pays(micro))
            part, part_sums = self._loss(micro, num_tokens, share)
            part.backward()
            loss += part.item()
            sums = {name: sums.get(name, 0) + value.item() for name, value in part_sums.items()}
            cells += micro.input_ids.numel()
            sums["real"] = sums.get("real", 0) + micro.attention_mask.sum().item()
            shared += share * len(micro)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(),
                                                   self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        learning_rate = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        self.step += 1
        return {"step": self.step, "loss": loss, **self._ratios(sums, cells),
                "grad_norm": grad_norm.item(), "lr": learning_rate, "tokens": num_tokens,
                "shared_fraction": shared / len(batch), **self._rollout_metrics(batch, outputs)}

    def _loss(self, micro: MultimodalBatch, num_tokens: float, share: bool):
        """grpo_loss of one micro-batch, moved to the device."""
        config, micro = self.config, micro.to(self.device)
        logprobs, entropies = self._logprobs(micro, share)
        return grpo_loss(logprobs, micro.behavior_logprobs, entropies, micro.advantages,
                         micro.loss_mask, num_tokens, clip_low=config.clip_low,
                         clip_high=config.clip_high, mask_ratio_low=config.mask_ratio_low,
                         mask_ratio_high=config.mask_ratio_high)

    def _logprobs(self, micro: MultimodalBatch, share: bool) -> tuple[Tensor, Tensor]:
        """fp32 weights, computed in bf16 on a GPU and in fp32 on a CPU."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.policy(micro, share)

    def _sharing_pays(self, micro: MultimodalBatch) -> bool:
        return micro.sharing_pays(self.model.config.get_text_config().hidden_size)

    def _sharing_is_exact(self, batch: MultimodalBatch) -> bool:
        """Compute a few completions of one prompt both ways: logprobs and gradient norm.

        The gradient would be wrong, without any error, if a model's cache were detached.
        """
        prompts, counts = batch.prompt_index.unique(return_counts=True)
        rows = (batch.prompt_index == prompts[counts.argmax()]) & batch.loss_mask.bool().any(1)
        rows = rows.nonzero().flatten()[:3]
        if len(rows) < 2:
            return False
        micro, found = batch.select(rows).to(self.device), []
        try:
            for share in (False, True):
                logprobs, _ = self._logprobs(micro, share)
                (logprobs * torch.linspace(-1, 1, len(rows), device=self.device)[:, None]
                 ).sum().backward()
                grads = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
                found.append((logprobs.detach(), torch.stack(grads).norm()))
                self.optimizer.zero_grad()
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            self.optimizer.zero_grad()
            reason = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            (plain, plain_norm), (shared, shared_norm) = found
            difference = (plain - shared).abs().max().item()
            relative = abs(shared_norm / plain_norm - 1).item()
            loose = self.device.type == "cuda" or self.model.dtype != torch.float32
            if difference < (0.2 if loose else 1e-4) and relative < (0.1 if loose else 1e-3):
                return True
            reason = f"logprobs differ by {difference:.1e}, the gradient's norm by {relative:.1%}"
        tqdm.write(f"prompts are not shared, every completion is forwarded with its own: {reason}")
        return False

    def _ratios(self, sums: dict[str, float], cells: int) -> dict[str, float]:
        """Means over the forwarded tokens of the loss mask; fractions of them."""
        tokens = max(sums.get("tokens", 0), 1)
        return {"ir": sums.get("ir", 0) / tokens, "ent": sums.get("ent", 0) / tokens,
                "kl": sums.get("kl", 0) / tokens,
                "ratio_masked_fraction": sums.get("masked", 0) / tokens,
                "clip_fraction": sums.get("clipped", 0) / tokens,
                "padding_fraction": 1 - sums.get("real", 0) / max(cells, 1)}

    def _rollout_metrics(self, batch: MultimodalBatch, outputs: GenerateOutputs) -> dict:
        rewards, lengths = batch.rewards, batch.loss_mask.sum(1).float()
        groups = torch.tensor(outputs.example_id)
        alive = groups[batch.advantages != 0].unique()
        return {"reward": rewards.mean().item(), "reward_std": rewards.std(correction=0).item(),
                "zero_advantage_groups": 1 - len(alive) / len(groups.unique()),
                "completion_length": lengths.mean().item(),
                "completion_length_max": lengths.max().item(),
                "truncated_fraction": outputs.finish_reason.count("length") / len(outputs),
                **{f"reward/{name}": sum(values) / len(values)
                   for name, values in outputs.metrics.items()}}

    def _connect(self) -> tuple[Generator, sync.WeightSync | None]:
        """Wait for the server; send it our weights, whatever it served before."""
        config = self.config
        url = sync.server_url(config.vllm_server_host, config.vllm_server_port)
        sync.wait_until_healthy(url, config.vllm_server_timeout)
        if self.environment is None:
            raise ValueError("env_id is not set: there is nothing to train on")
        generator = Generator(
            self.environment, url, model=sync.served_model(url), temperature=config.temperature,
            max_tokens=config.max_tokens, seed=config.seed, max_concurrent=config.max_concurrent,
            timeout=config.generation_timeout, logit_bias={i: -100 for i in self.banned},
            encode=self.adapter.encode if self.adapter.processor else None)
        if not config.sync_to_vllm_every:
            return generator, None
        on_gpu = self.device.type == "cuda"
        source = sync.CheckpointSource(self.model, torch.bfloat16 if on_gpu else None)
        weights = sync.WeightSync(url, source, "nccl" if on_gpu else "gloo",
                                  config.vllm_server_timeout)
        weights.send(self.step)
        return generator, weights

    def evaluate(self, generator: Generator) -> float:
        """Mean reward on the held-out split, as the policy samples it in training; logged."""
        outputs = generator.evaluate(self.config.eval_samples)
        reward = sum(outputs.reward) / len(outputs)
        means = {f"eval/{name}": sum(v) / len(v) for name, v in outputs.metrics.items()}
        self._write({"step": self.step, "eval/reward": reward, **means})
        tqdm.write(f"step {self.step}: held-out reward {reward:.3f} ({len(outputs)} completions)")
        return reward

    def log(self, metrics: dict[str, float], outputs: GenerateOutputs) -> None:
        """A line of metrics.jsonl; every log_every_steps also three completions and their images."""
        self._write(metrics)
        if self.step % self.config.log_every_steps:
            return
        folder = self.run_dir / "rollouts" / f"step-{self.step}"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "rollouts.jsonl", "w") as file:
            for i in range(0, len(outputs), max(1, len(outputs) // 3)):
                names = [f"{i}-{j}.png" for j in range(len(outputs.images[i]))]
                for name, image in zip(names, outputs.images[i]):
                    image.save(folder / name)
                record = {name: outputs[name][i] for name in ("completion", "answer", "reward",
                                                              "finish_reason", "example_id")}
                file.write(json.dumps({"prompt": self.tokenizer.decode(outputs.prompt_ids[i]),
                                       **record, "images": names}, default=str) + "\n")

    def _write(self, metrics: dict[str, float]) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with open(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if self.config.wandb_project:
            import wandb
            if wandb.run is None:
                wandb.init(project=self.config.wandb_project, name=self.config.run_name,
                           config=asdict(self.config), dir=self.run_dir)
            wandb.log(metrics, step=self.step)

    def save(self) -> Path:
        """Write run_dir/checkpoint-STEP: from_pretrained and vLLM both load it."""
        folder = self.run_dir / f"checkpoint-{self.step}"
        self.model.save_pretrained(folder)
        (self.adapter.processor or self.tokenizer).save_pretrained(folder)
        return folder


def main(argv: list[str]) -> int:
    """The command line; exit code 2 and one line for a mistake in the config."""
    try:
        config = load_config(*parse_command_line(argv, "train.py"))
        trainer_config = config.trainer
        load_environment(trainer_config.env_id, trainer_config.env_args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, and so stops the server
    with serve(config) as server:
        trainer = build_trainer(config)
        sync.wait_until_healthy(
            sync.server_url(trainer_config.vllm_server_host, trainer_config.vllm_server_port),
            trainer_config.vllm_server_timeout, server)
        trainer.train()
    return 0


def parse_command_line(argv: list[str], program: str) -> tuple[str, list[str]]:
    """["@", "config.toml", "key=value", ...] -> (path, overrides)."""
    words = " ".join(argv[:1]).removeprefix("@").split() + argv[1:]
    if not argv or not argv[0].startswith("@") or not words:
        raise ValueError(f"usage: python {program} @ config.toml [key=value ...]")
    return words[0], words[1:]


def serve(config: RunConfig) -> contextlib.AbstractContextManager:
    """Our own server, if the host is this machine and none is up there; else a context of None."""
    trainer = config.trainer
    url = sync.server_url(trainer.vllm_server_host, trainer.vllm_server_port)
    if sync.is_healthy(url) or trainer.vllm_server_host not in sync.LOCAL_HOSTS:
        return contextlib.nullcontext()
    return start_server(config)


def start_server(config: RunConfig) -> sync.VLLMServer:
    """vLLM on the first inference_gpus GPUs, or on the CPU where there are none."""
    trainer, gpus = config.trainer, torch.cuda.device_count()
    command = sync.server_command(config.model, trainer.vllm_server_port,
                                  "nccl" if gpus else "gloo", config.inference_args,
                                  config.inference_gpus)
    visible = ",".join(map(str, range(config.inference_gpus))) if gpus else None
    url = sync.server_url(trainer.vllm_server_host, trainer.vllm_server_port)
    log_path = Path(trainer.output_dir, trainer.run_name, "vllm.log")
    return sync.VLLMServer(command, url, log_path, visible)


def build_trainer(config: RunConfig) -> MultimodalGRPOTrainer:
    """Model, processor and trainer from a config file, on the first GPU after the server's."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    device = f"cuda:{config.inference_gpus}" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.trainer.seed)
    model = AutoModelForImageTextToText.from_pretrained(config.model, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(config.model)
    return MultimodalGRPOTrainer(model.to(device), processor.tokenizer,
                                 MultimodalAdapter(processor), config.trainer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
