"""GRPO on a vision-language model: `python train.py @ config.toml [key=value ...]`.

The trainer and its loop. A step has four acts: roll out, update the policy, send its weights to the
server that samples, log. What they need is elsewhere: the rollouts in rollout.py, the tensors in
adapter.py and batch.py, the forward pass in policy.py, the formula in loss.py, the server in sync.py.
"""
import os

# Before torch: threads that spin while they wait take a server's cores: 1.5 s a step, not 0.6 s.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __name__ == "__main__":  # the server takes longest to start, and needs nothing of what follows
    from support.start import begin
    CONFIG = begin("train.py")

import collections
import contextlib
import math
import signal
import statistics
import sys
import time

import torch
import transformers
from tqdm import tqdm

from adapter import MultimodalAdapter, load_adapter
from batch import MultimodalBatch
from loss import group_advantages, grpo_loss
from policy import Policy
from rollout import GenerateOutputs, Generator, load_environment
from support import check, checkpoint
from support.config import MultimodalRLConfig, mistakes, on_stop
from support.http import ServerError
from support.loading import load_model
from support.lock import owned
from support.prompts import reserved_strings
from support.ranks import add_up, become_torchrun, is_on_all_ranks, join_ranks, on_lead
from support.records import Records
from support.text import describe, print_plainly
from sync import CheckpointSource, Server

ATTEMPTS = 3  # at anything that needs the server, and at finite numbers, before the run ends
SHOWN = ("loss", "ir", "ent", "kl", "reward")  # in the progress bar


class MultimodalGRPOTrainer:
    """Trains a Hugging Face image-text-to-text model, on its device, by GRPO with a vLLM server.

    The tokenizer is saved if the adapter has no processor. Only train() needs the server. Under
    torchrun every rank makes one, of the same model: it is sharded; rank 0 talks to the server.
    """

    def __init__(self, model, tokenizer, adapter: MultimodalAdapter, config: MultimodalRLConfig):
        self.model, self.tokenizer, self.adapter, self.config = model, tokenizer, adapter, config
        self.rank, self.world = join_ranks()
        adapter.server_args = config.inference_args  # they change how a prompt is read
        self.environment = None
        if config.env_id:
            self.environment = load_environment(config.env_id, config.env_args)
            if config.eval_every_steps and not len(self.environment.eval):
                raise ValueError(f"eval_every_steps: {config.env_id!r} has no held-out split")
        self.records = Records(config) if self.rank == 0 else None

        transformers.set_seed(config.seed)  # so that LoRA adapters begin the same on every rank
        self.policy = Policy(model, config)
        self.policy.ban(tokenizer, reserved_strings(tokenizer, processor=adapter.processor))
        if self.world > 1 or config.cpu_offload:
            self.policy.shard(config.cpu_offload)
        self.device = self.policy.device
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], config.learning_rate,
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda" or config.cpu_offload)

        self.step = 0             # finished steps
        self.saved_step = 0       # that of the newest checkpoint
        self.save_failed = False  # the last time; it is tried again after the next step
        self.past_metrics = None  # the text of metrics.jsonl up to it, of a run that is resumed
        self.resume()

        self.source = CheckpointSource(self.policy)
        self.server = Server(config)
        self.server_is_lost = False
        self.generator = None                # made when the server is up
        self.ahead = collections.deque()     # (rollouts under way, their weight version) by step
        self.checked = False                 # whether server and sharing were, on the first batch
        self.good_row = None                 # one of the last micro-batch with finite logprobs
        self.half_updated = False            # some of a step's updates are done, but not all
        self.bad_steps = 0                   # optimizer steps in a row without finite numbers
        self.stopping = 0                    # the signal that asked to stop
        self.seconds = {}                    # of each act of the step at hand

    def train(self) -> None:
        """Train until max_steps; save at the end and after errors. Needs the server."""
        config = self.config
        with owned(config.run_dir):
            on_lead(self.rehearse_save)
            on_lead(lambda: self.records.open(self.past_metrics))
            self.bar = tqdm(total=config.max_steps, initial=self.step, disable=self.rank > 0)
            try:
                while self.step < config.max_steps and not on_lead(lambda: self.stopping):
                    self.evaluate()                  # every eval_every_steps, on held-out prompts
                    outputs = self.roll_out()        # vLLM samples G completions per prompt
                    metrics = self.update(outputs)   # adapter -> batch -> masked GRPO -> AdamW
                    self.send_weights()              # the policy that samples is the trained one
                    self.log(metrics, outputs)
                    self.save_if_due()
            except Exception as error:
                if is_on_all_ranks(error):
                    self.try_to_save()  # all ranks must take part
                raise
            self.bar.close()
            if not self.try_to_save():
                self.save()
            if self.step == config.max_steps:
                self.evaluate()
            on_lead(lambda: self.records.write_report())
            self.server.lease.release()  # to whoever comes next, while this process lives on

    # ---- act 1: roll out

    def roll_out(self) -> GenerateOutputs:
        """The completions of this step, sampled and scored."""
        with self.timed("rollout"):
            return self.on_server(self.next_rollouts)

    def next_rollouts(self) -> GenerateOutputs:
        """Wait for this step's rollouts; begin those of the next async_steps."""
        config, start = self.config, time.perf_counter()
        end = min(self.step + 1 + config.async_steps, config.max_steps)
        for step in range(self.step + len(self.ahead), end):
            pending = self.generator.begin(step, config.rollouts_per_step, config.group_size)
            self.ahead.append((pending, self.server.version or 0))
        pending, version = self.ahead.popleft()
        outputs = self.generator.collect(pending)
        self.server.lease.check()  # else somebody else's weights may have sampled these
        outputs.weight_version = version
        outputs.weight_owner = self.server.lease.name
        self.seconds["waited"] = max(0.0, start - max(outputs.finished, default=start))
        if config.inference_args.get("enable_sleep_mode"):  # until the next weights
            self.server.call("sleep?level=1")
        return outputs

    def evaluate(self) -> None:
        """Log the mean reward on the held-out split, sampled as in training, if that is due."""
        config, every = self.config, self.config.eval_every_steps
        if every and (self.step % every == 0 or self.step == config.max_steps):
            self.on_server(self.log_held_out)

    def log_held_out(self) -> None:
        means = self.generator.evaluate(self.config.eval_samples).means()
        self.server.lease.check()
        metrics = {f"eval/{name}": value for name, value in means.items()}
        self.records.write({"step": self.step, **metrics})
        tqdm.write(f"step {self.step}: held-out reward {means['reward']:.3f}")

    def on_server(self, action):
        """action() on rank 0, on a server that has our weights; every rank gets its result.

        A server that is lost, before or in the action, is restored, and the action tried again.
        """
        def attempt():
            for attempts_left in reversed(range(ATTEMPTS)):
                try:
                    self.ensure_server()
                    return action()
                except ServerError as error:
                    self.server_is_lost = True
                    if not attempts_left:
                        raise
                    tqdm.write(f"{error}; restoring the server")

        return on_lead(attempt, helper=self.source)

    def ensure_server(self) -> None:
        """A server that answers, has our weights, and is asked by a generator; on rank 0."""
        if self.server_is_lost:
            self.ahead.clear()  # the rollouts that were under way are lost, too
            self.server.restore()
            self.server_is_lost = False
        self.server.lease.claim()
        if self.config.sync_to_vllm_every and self.server.version is None:
            self.send()
        if self.generator is None:
            self.generator = Generator(
                self.environment, self.config, self.policy.banned, decode=self.tokenizer.decode,
                adapter=self.adapter if self.adapter.processor else None,
                reserved=reserved_strings(self.tokenizer, self.policy.banned,
                                          self.adapter.processor))

    # ---- act 2: update

    def update(self, outputs: GenerateOutputs) -> dict[str, float]:
        """Train on the given completions, without a server; the metrics of the step.

        Completions with the same example_id make a group. An optimizer step whose loss or gradient
        is not finite is skipped; RuntimeError at the third in a row.
        """
        with self.timed("train"):
            batch = self.build_batch(outputs)
            if not self.checked and batch.loss_mask.any():
                self.check_first(batch)
            updates = []
            for part in batch.parts(self.config.updates_per_rollout):
                updates.append(self.optimizer_step(part))
                self.half_updated = True
            self.step += 1
            self.half_updated = False
            means = {name: statistics.mean(update[name] for update in updates)
                     for name in updates[0]}
            return {"step": self.step, "lr": self.optimizer.param_groups[0]["lr"], **means,
                    **self.rollout_metrics(batch, outputs)}

    def build_batch(self, outputs: GenerateOutputs) -> MultimodalBatch:
        """The adapter's batch with advantages, and without sampled vision tokens."""
        batch = self.adapter.build_batch(outputs).cut_at(self.policy.banned)
        if len(batch) != len(outputs):
            raise ValueError(f"build_batch made {len(batch)} rows of {len(outputs)} completions")
        if self.config.mask_truncated:
            truncated = [reason == "length" for reason in outputs.finish_reason]
            batch.loss_mask[torch.tensor(truncated)] = 0
        if batch.advantages is None:  # else an adapter has its own
            first, groups = outputs.first_rows(), torch.tensor(outputs.groups())
            advantages = group_advantages(batch.rewards[first], groups[first],
                                          self.config.divide_by_std)
            batch.advantages = advantages[outputs.places()]  # each stretch has that of the whole
        outputs.advantage = batch.advantages.tolist()
        return batch

    def optimizer_step(self, batch: MultimodalBatch) -> dict[str, float]:
        """One step of AdamW on the batch; its metrics."""
        config = self.config
        turns = batch.turns(config.micro_batch_size, self.world)
        shares = [self.shares_prompts(turn) for turn in turns]
        loss, means = self.gradients(turns, shares, batch.loss_mask.sum().item())
        norm = self.policy.clip_gradients(config.max_grad_norm)
        warm = min(1.0, (self.step + 1) / max(1, config.warmup_steps))
        self.optimizer.param_groups[0]["lr"] = config.learning_rate * warm
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
            if turns:
                self.good_row = turns[0][0].select([0])
        self.optimizer.zero_grad()
        if not finite:
            on_lead(lambda: self.report_bad(batch))
        self.bad_steps = 0 if finite else self.bad_steps + 1

        chunks = [chunk for turn in turns for chunk in turn]
        masks = [piece.attention_mask for chunk in chunks
                 for piece in chunk.pieces(config.micro_batch_size)]
        forwarded = max(1, sum(mask.numel() for mask in masks))
        padding = forwarded - sum(mask.sum().item() for mask in masks)
        shared = sum(len(chunk) for turn, share in zip(turns, shares) for chunk in turn if share)
        return {"loss": loss, "grad_norm": norm, **means, "skipped": float(not finite),
                "shared_fraction": shared / len(batch), "padding_fraction": padding / forwarded}

    def gradients(self, turns: list[list[MultimodalBatch]], shares: list[bool],
                  num_tokens: int) -> tuple[float, dict[str, float]]:
        """Add the gradients of all micro-batches to the parameters.

        Returns the loss, and of each metric of grpo_loss the mean over the forwarded tokens.
        """
        options = self.config.loss_options()
        # The loss of one row without a token tells the names of its metrics, so that each of them
        # is there, as 0, also in a step in which nothing is forwarded.
        empty = torch.zeros(1, 1)
        _, token_sums = grpo_loss(empty, empty, empty, empty[0], empty, num_tokens=0, **options)
        sums = dict.fromkeys(["loss", *token_sums], 0.0)
        for turn, share in zip(turns, shares):
            # Every rank makes as many calls as the one with the most rows; those that it makes
            # beyond its own rows weigh nothing.
            chunk = turn[self.rank % len(turn)].to(self.device)
            pieces = chunk.pieces(self.config.micro_batch_size)
            own = len(pieces) if self.rank < len(turn) else 0
            calls = max(len(other.pieces(self.config.micro_batch_size)) for other in turn)
            with (self.policy.shared_prompts(chunk) if share
                  else contextlib.nullcontext()) as prompts:
                for number in range(calls):
                    micro = pieces[number % len(pieces)]
                    weight = float(number < own)
                    logprobs, entropies = self.policy(micro, share, prompts)
                    loss, token_sums = grpo_loss(
                        logprobs, entropies, micro.behavior_logprobs, micro.advantages,
                        micro.loss_mask, num_tokens, **options)
                    (loss * self.world * weight).backward()  # FSDP takes the mean over the ranks
                    for name, value in {"loss": loss, **token_sums}.items():
                        sums[name] += value.item() * weight
        sums = add_up(sums, self.device)
        loss, tokens = sums.pop("loss"), max(sums.pop("tokens"), 1)
        return loss, {name: value / tokens for name, value in sums.items()}

    def shares_prompts(self, turn: list[MultimodalBatch]) -> bool:
        """Whether the micro-batches of a turn are forwarded with each prompt once."""
        if not self.policy.can_share:
            return False
        if self.config.share_prompt is not None:
            return self.config.share_prompt
        hidden_size = self.model.config.get_text_config().hidden_size
        return all(micro.sharing_pays(hidden_size) for micro in turn)

    def report_bad(self, batch: MultimodalBatch) -> None:
        """Write a batch without finite loss or gradient; RuntimeError at the third in a row."""
        step = self.step + 1
        path = self.records.write_bad_batch(step, batch)
        message = f"step {step}: loss or gradient is not finite; see {path}"
        tqdm.write(message)
        if self.bad_steps + 1 == ATTEMPTS:
            raise RuntimeError(f"{message}. In a row: {ATTEMPTS}; lower learning_rate or mend data")

    def rollout_metrics(self, batch: MultimodalBatch,
                        outputs: GenerateOutputs) -> dict[str, float]:
        """What the completions of the step were like, whatever is done with them."""
        groups = torch.tensor(outputs.groups())
        lengths = [float(len(ids)) for ids in outputs.completion_ids]
        trained_groups = len(groups[batch.advantages != 0].unique())
        first = outputs.first_rows()
        return {**outputs.means("reward/"), "tokens": batch.loss_mask.sum().item(),
                "reward_std": batch.rewards[first].std(correction=0).item(),
                "rewritten_histories": len(outputs) - len(first),
                "zero_advantage_groups": 1 - trained_groups / len(groups.unique()),
                "completion_length": statistics.mean(lengths),
                "completion_length_max": max(lengths), "dropped": len(outputs.dropped),
                "truncated_fraction": outputs.finish_reason.count("length") / len(outputs)}

    def check_first(self, batch: MultimodalBatch) -> None:
        """Of a few completions: is it the model's policy, is sharing exact, and is it the server's?"""
        self.checked = True
        rows = batch.loss_mask.any(1).nonzero()[:, 0].tolist()
        ends = sorted({*rows[:2], *rows[-2:]})  # of the first prompt and of the last
        micro = batch.select(ends[:self.config.micro_batch_size]).to(self.device)
        check.forward(self.policy, micro)
        check.sharing(self.policy, micro)
        has_our_weights = on_lead(lambda: self.server.version is not None)
        check.server(self.policy, micro, must_agree=has_our_weights)

    # ---- act 3: send the weights

    def send_weights(self) -> None:
        """Send the server the new weights, every sync_to_vllm_every steps.

        If the server is lost here, it is restored, and gets them, before the next rollouts.
        """
        every = self.config.sync_to_vllm_every
        if every and self.step % every == 0:
            with self.timed("sync"):
                on_lead(self.try_to_send, helper=self.source)

    def send(self) -> None:
        """The weights of now; on rank 0, within on_lead()."""
        self.source.version = self.step
        self.server.send(self.source)

    def try_to_send(self) -> None:
        try:
            if self.ahead:  # their weights would not be known once there are new ones
                self.server.lease.check()
            self.send()
        except ServerError as error:
            tqdm.write(f"{error}; it is restored before the next rollouts")
            self.server_is_lost = True

    # ---- act 4: log, and what is kept of a run

    def log(self, metrics: dict[str, float], outputs: GenerateOutputs) -> None:
        """A line of metrics.jsonl; every log_every_steps a few completions and their images."""
        seconds = {"seconds_sync": 0.0}  # of a step without one
        seconds |= {f"seconds_{name}": value for name, value in self.seconds.items()}
        spent = self.seconds.get("rollout", 0) + self.seconds["train"]
        ages = outputs.staleness(self.step - 1)
        metrics = {**metrics, "tokens_per_second": metrics["tokens"] / spent,
                   "staleness": statistics.mean(ages), "staleness_max": max(ages), **seconds}
        self.seconds = {}
        same_weights = max(ages) == 0 and self.config.updates_per_rollout == 1
        largest_kl = self.config.kl_warning or check.largest_kl(self.policy, same_weights)
        on_lead(lambda: self.records.write_step(metrics, outputs, self.tokenizer, largest_kl))
        self.bar.set_postfix({name: metrics[name] for name in SHOWN}, refresh=False)
        self.bar.update()

    @contextlib.contextmanager
    def timed(self, act: str):
        start = time.perf_counter()
        yield
        self.seconds[act] = time.perf_counter() - start

    def save(self) -> None:
        """Write run_dir/checkpoint-STEP, for from_pretrained and vLLM too; whole or not at all."""
        if self.saved_step < self.step:
            self.check_policy()
            # A step that was skipped may be the sign of a spoiled state: no good one goes for it.
            keep = None if self.bad_steps else self.config.keep_checkpoints
            checkpoint.save(self.config, self.step, self.policy, self.optimizer,
                            self.adapter.processor or self.tokenizer, keep)
            self.saved_step = self.step

    def check_policy(self) -> None:
        """ValueError if the weights are not worth saving.

        They are between two updates of a step, which would be trained again. Or they have exploded:
        finite ones, too, may overflow when they are used.
        """
        reason = None
        if self.half_updated:
            reason = "the error came between two updates of a step"
        elif self.good_row is not None:
            with torch.no_grad():
                logprobs, _ = self.policy(self.good_row.to(self.device), share=False)
            if not logprobs.isfinite().all():
                reason = ("logprobs are not finite, because the weights have exploded; lower "
                          "learning_rate and resume from an earlier checkpoint")
        if reason:
            error = ValueError(reason)
            error.on_all_ranks = True  # each of them has made the same updates
            raise error

    def save_if_due(self) -> None:
        every = self.config.save_every_steps
        is_due = every > 0 and self.step % every == 0 and not self.bad_steps
        if is_due or self.save_failed:
            self.save_failed = not self.try_to_save()

    def try_to_save(self) -> bool:
        """Whether the state is saved; if not, a line says why, and the last good one is kept."""
        try:
            self.save()
            return True
        except Exception as error:  # disks, models and processors fail in any way
            if not is_on_all_ranks(error):
                raise
            tqdm.write(f"step {self.step} could not be saved, the newest checkpoint is of step "
                       f"{self.saved_step}: {describe(error)}")
            return False

    def rehearse_save(self) -> None:
        """Find out early, on rank 0, whether this run can be saved; ValueError if not."""
        checkpoint.rehearse(self.config, self.policy, self.adapter.processor or self.tokenizer)

    def resume(self) -> None:
        """Load what config.resume asks for; ValueError if it is damaged or of another model."""
        path = checkpoint.find(self.config.resume, self.config.run_dir)
        if path is not None:
            step, metrics = checkpoint.load(path, self.model, self.optimizer, self.config)
            self.step = self.saved_step = step
            if path.resolve().parent == self.config.run_dir.resolve():
                self.past_metrics = metrics

    def stop(self, number: int = signal.SIGTERM, _frame=None) -> None:
        """End train() after the step at hand, with a checkpoint; the second time: exit at once.

        A SIGHUP and another signal are one wish, for init systems send it beside a SIGTERM. With
        several ranks the second one changes nothing, for torchrun sends one by itself.
        """
        if self.stopping and self.world == 1 and signal.SIGHUP not in (self.stopping, number):
            sys.exit(128 + number)
        self.stopping = number
        self.server.patience = 0  # nor wait for a server any longer


@contextlib.contextmanager
def served(config: MultimodalRLConfig):
    """Yields a trainer with its server: the one that is up, else, on this machine, our own."""
    if config.trainer_gpus > 1 and "RANK" not in os.environ:
        become_torchrun(config.trainer_gpus)
    rank, _ = join_ranks()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # rank 0 prints for all
    with owned(config.run_dir):
        model, processor = load_model(config)
        adapter = load_adapter(config.adapter, processor)
        trainer = MultimodalGRPOTrainer(model, processor.tokenizer, adapter, config)
        on_lead(trainer.rehearse_save)
        # What is wrong up to here is known before the long wait for a server.
        with trainer.server if rank == 0 else contextlib.nullcontext():
            yield trainer


def main(config: MultimodalRLConfig) -> None:
    """Train, on a server that is stopped at the end. A mistake is one line, and exit code 2."""
    sys.excepthook = print_plainly
    with contextlib.ExitStack() as stack:
        with mistakes():
            trainer = stack.enter_context(served(config))
        on_stop(trainer.stop)
        trainer.train()
        if trainer.stopping:
            sys.exit(128 + trainer.stopping)


if __name__ == "__main__":
    main(CONFIG)
