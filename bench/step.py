"""How long one optimizer step takes, and how much memory, against TRL's on the same rollouts.

    python bench/step.py [short long8 long16 text head] [--rounds 3] [--trl-python PATH]
                         [--device cuda] [--model 2b]

Canned rollouts, no server: random images, random completions, a model of random weights. Timed
is everything from rollouts to new weights: image preprocessing, forward, loss, backward, clipping,
optimizer. The sides take turns (A B C A B C ...), each time in a fresh process, so that a machine
that slows down slows all of them and each has a peak memory of its own.

    shared   MultimodalGRPOTrainer.update, a prompt forwarded once for its G completions
    rows     the same with share_prompt=False: every completion with its prompt and image
    trl      TRL's GRPOTrainer, handed the same ids by its rollout_func and the same images

What favors TRL: with a rollout_func it preprocesses a prompt's images G times, but 2 G times when
it generates itself; and its clock stands still while its dataset decodes them. The gradient norm
of the first step stands in the raw lines: all sides must have computed the same thing.

`head` measures the LM head alone: logprobs, entropy and backward by loss.token_logprobs (chunked)
and by full logits (plain): extra memory, and how far values and gradients are apart.

Raw lines are appended to results/bench_step.jsonl; the table of this run is printed.
"""
import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PROCESSOR = ROOT / "models" / "tiny-qwen2-vl"
RAW = ROOT / "results" / "bench_step.jsonl"
SIDE = 448  # pixels: 1,024 patches, 256 image tokens
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Workload:
    """prompts x group completions of `tokens` tokens; one image per prompt, or none."""
    prompts: int
    group: int
    tokens: int
    prompt_tokens: int = 280  # image tokens included
    image: bool = True
    sides: tuple[str, ...] = ("shared", "rows", "trl")


WORKLOADS = {
    "short": Workload(4, 16, 32),
    "long8": Workload(2, 8, 256),
    "long16": Workload(1, 16, 256, sides=("shared", "rows")),
    "text": Workload(4, 8, 128, prompt_tokens=64, image=False),
    "head": Workload(1, 16, 256, sides=("chunked", "plain")),
}
# Qwen2-VL: tiny is what a CPU can repeat often; 2b has the shape of the published 2B model
VOCABULARY = {"tiny": 3_000, "2b": 151_936}
TEXT = {
    "tiny": dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
                 num_attention_heads=4, num_key_value_heads=2,
                 rope_parameters=dict(rope_type="default", rope_theta=1e4,
                                      mrope_section=[8, 12, 12])),
    "2b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
               num_attention_heads=12, num_key_value_heads=2,
               rope_parameters=dict(rope_type="default", rope_theta=1e6,
                                    mrope_section=[16, 24, 24])),
}
VISION = {
    "tiny": dict(depth=4, embed_dim=256, hidden_size=256, num_heads=4, mlp_ratio=4),
    "2b": dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16, mlp_ratio=4),
}


def make_model(size: str, processor, device: str):
    """Qwen2-VL with random weights in fp32, the same for every side."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    tokenizer = processor.tokenizer
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    ends = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id)
    config = Qwen2VLConfig(
        text_config=dict(TEXT[size], vocab_size=VOCABULARY[size], tie_word_embeddings=True, **ends),
        vision_config=VISION[size], tie_word_embeddings=True,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()})
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(config).to(device)


def canned_rollouts(workload: Workload, model, processor, adapter) -> list:
    """The same rollouts in every process, with the logprobs that this model gives them."""
    from PIL import Image
    from rollout import Rollout
    rng = random.Random(0)
    special = set(processor.tokenizer.all_special_ids)
    plain = [i for i in range(model.config.get_text_config().vocab_size) if i not in special]
    rollouts = []
    for group in range(workload.prompts):
        images = [Image.frombytes("RGB", (SIDE, SIDE), rng.randbytes(3 * SIDE * SIDE))
                  ] if workload.image else []

        def encode(digits: str) -> tuple[list[dict], dict]:
            parts = [{"type": "image", "image": image} for image in images]
            content = [*parts, {"type": "text", "text": digits}] if parts else digits
            prompt = [{"role": "user", "content": content}]
            return prompt, adapter.encode(prompt, images)

        room = workload.prompt_tokens - encode("")[1]["input_ids"].shape[1]
        prompt, encoded = encode("".join(rng.choice("0123456789") for _ in range(room)))
        prompt_ids = encoded["input_ids"][0].tolist()
        assert len(prompt_ids) == workload.prompt_tokens, "a digit is not one token"
        rewards = [0.0, 1.0, *(float(rng.random() < 0.5) for _ in range(workload.group - 2))]
        for reward in rewards:
            ids = rng.choices(plain, k=workload.tokens)
            rollouts.append(Rollout(
                prompt=prompt, completion="", answer="", state={}, info={}, example_id=group,
                reward=reward, metrics={}, prompt_ids=prompt_ids, completion_ids=ids,
                completion_logprobs=plain_logprobs(model, encoded, ids), finish_reason="length",
                images=images))
    return rollouts


def plain_logprobs(model, encoded: dict, ids: list[int]) -> list[float]:
    """What a server would have recorded: with them the importance ratio is 1, as in TRL's step."""
    import torch
    new = torch.tensor([ids])
    inputs = {key: torch.cat([tensor, {"input_ids": new, "attention_mask": new.new_ones(new.shape)}
                              .get(key, new.new_zeros(new.shape))], 1)
              if tensor.shape == encoded["input_ids"].shape else tensor
              for key, tensor in encoded.items()}
    inputs = {key: tensor.to(model.device) for key, tensor in inputs.items()}
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=len(ids) + 1).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, new[0, :, None].to(model.device))[:, 0].tolist()


def run_ours(rollouts: list, workload: Workload, side: str, model, processor, adapter,
             timed: int) -> dict:
    from rollout import GenerateOutputs
    from train import MultimodalGRPOTrainer, MultimodalRLConfig
    trainer = MultimodalGRPOTrainer(model, processor.tokenizer, adapter, MultimodalRLConfig(
        batch_size=workload.prompts * workload.group, rollouts_per_step=workload.prompts,
        micro_batch_size=workload.group, share_prompt=side == "shared",
        learning_rate=LEARNING_RATE))
    outputs = GenerateOutputs.from_rollouts(rollouts)
    seconds, norms = [], []
    for _ in range(1 + timed):
        start = time.perf_counter()
        norms.append(trainer.update(outputs)["grad_norm"])  # ends in .item(): a GPU is done too
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "grad_norm": norms[0]}


def run_trl(rollouts: list, workload: Workload, side: str, model, processor, adapter,
            timed: int) -> dict:
    """TRL's own step: preprocessing, P forwards and backwards of G rows, optimizer."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    cuda = model.device.type == "cuda"
    group = workload.group
    digits = [r.prompt[0]["content"][-1]["text"] if r.images else r.prompt[0]["content"]
              for r in rollouts]
    rows = {tuple(r.prompt_ids + r.completion_ids): r for r in rollouts}
    seen = Counter()

    def rollout_func(prompts: list, trainer) -> dict:
        """The canned ids, whatever the prompts say, but they must say the same."""
        texts = [p[0]["content"] if isinstance(p[0]["content"], str) else p[0]["content"][-1]["text"]
                 for p in prompts]
        assert texts == digits, "TRL asked for other prompts, or in another order"
        return {"prompt_ids": [r.prompt_ids for r in rollouts],
                "completion_ids": [r.completion_ids for r in rollouts],
                "logprobs": [r.completion_logprobs for r in rollouts],
                "canned": [r.reward for r in rollouts]}

    def check(module, args, kwargs) -> None:
        """First step only: TRL's forward gets these ids, and each row its own image."""
        for i, row in enumerate(map(tuple, kwargs["input_ids"].tolist())):
            seen[row] += 1
            if workload.image:
                pixels = kwargs["pixel_values"].chunk(group)[i].cpu()
                wanted = adapter.encode(rows[row].prompt, rows[row].images)["pixel_values"]
                assert torch.equal(pixels, wanted), "TRL forwards other pixels"

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.start)
            hook.remove()

    columns = {"prompt": [[{"role": "user", "content": d}] for d in digits[::group]]}
    if workload.image:
        columns["images"] = [r.images for r in rollouts[::group]]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=group, num_generations=group,
            gradient_accumulation_steps=workload.prompts, max_steps=1 + timed, loss_type="dapo",
            max_completion_length=workload.tokens, learning_rate=LEARNING_RATE, temperature=1.0,
            beta=0.0, num_iterations=1, scale_rewards="none", use_vllm=False, bf16=cuda,
            gradient_checkpointing=False, use_cpu=not cuda, shuffle_dataset=False,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
        trainer = GRPOTrainer(model, lambda completions, canned, **_: canned, config,
                              Dataset.from_dict(columns), processing_class=processor,
                              callbacks=[clock], rollout_func=rollout_func)
        hook = model.register_forward_pre_hook(check, with_kwargs=True)
        trainer.train()
    assert seen == Counter(rows.keys()), "TRL forwards other ids"
    return {"seconds": clock.seconds[1:], "grad_norm": trainer.state.log_history[0]["grad_norm"]}


def run_head(side: str, size: str, device: str) -> dict:
    """The head alone on 4,096 tokens and a vocabulary of 151,936."""
    import torch
    from loss import token_logprobs
    torch.manual_seed(0)
    width, tokens = TEXT[size]["hidden_size"], WORKLOADS["head"].group * WORKLOADS["head"].tokens
    head = torch.nn.Linear(width, VOCABULARY["2b"], bias=False, device=device)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    targets = torch.randint(VOCABULARY["2b"], (tokens,), device=device)
    weights = torch.randn(tokens, device=device)  # a stand-in for the advantages

    def plain() -> tuple:
        every = head(hidden).float().log_softmax(-1)  # (N, V)
        with torch.no_grad():
            entropies = -(every.exp() * every).sum(-1)
        return every.gather(1, targets[:, None])[:, 0], entropies

    def measure(logprobs_and_entropies) -> list:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logprobs, entropies = logprobs_and_entropies()
        (logprobs * weights).sum().backward()
        found = [logprobs.detach(), entropies, hidden.grad, head.weight.grad]
        hidden.grad = head.weight.grad = None
        return found

    def chunked() -> tuple:
        return token_logprobs(hidden, targets, head, 1.0)

    before, start = peak_gb(device), time.perf_counter()
    found = measure(chunked if side == "chunked" else plain)
    result = {"extra_gb": peak_gb(device) - before, "seconds": [time.perf_counter() - start]}
    if side == "plain":  # its memory is measured; now the other way, to compare
        for name, a, b in zip(("logprob", "entropy", "hidden_grad", "weight_grad"), found,
                              measure(chunked), strict=True):
            result[f"{name}_difference"] = ((a - b).abs().max() / a.abs().max()).item()
    return result


def peak_gb(device: str) -> float:
    """The most memory that this process has held: on the GPU, or resident."""
    if device == "cuda":
        import torch
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def child(args) -> dict:
    """One side of one workload in this process."""
    if args.workloads == ["head"]:
        return run_head(args.child, args.model, args.device)
    import torch
    from transformers import AutoProcessor
    from adapter import MultimodalAdapter
    processor = AutoProcessor.from_pretrained(
        args.processor, size={"shortest_edge": 56 * 56, "longest_edge": SIDE * SIDE})
    adapter, workload = MultimodalAdapter(processor), WORKLOADS[args.workloads[0]]
    model = make_model(args.model, processor, args.device)
    rollouts = canned_rollouts(workload, model, processor, adapter)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_gb(args.device)
    run = run_trl if args.child == "trl" else run_ours
    result = run(rollouts, workload, args.child, model, processor, adapter, args.timed)
    return {**result, "before_gb": before, "peak_gb": peak_gb(args.device)}


def spawn(args, name: str, side: str) -> dict:
    """Run one side in a process of its own; its last line is the result."""
    command = [args.trl_python if side == "trl" else sys.executable, __file__, name,
               "--child", side, "--device", args.device, "--model", args.model,
               "--timed", str(args.timed), "--processor", args.processor]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(lines: list[dict]) -> str:
    """Medians over all timed steps of all rounds, as Markdown."""
    found = {}
    for line in lines:
        found.setdefault((line["workload"], line["side"]), []).append(line)
    # the parent's table is of this run only; raw lines of other runs stay in the file
    text = ["| workload | side | seconds per step | times shared | peak GB | times shared |",
            "|---|---|---|---|---|---|"]
    medians = {key: (statistics.median(s for line in group for s in line["seconds"]),
                     max(line.get("peak_gb", line.get("extra_gb")) for line in group))
               for key, group in found.items()}
    for (name, side), (seconds, memory) in medians.items():
        first = medians[name, WORKLOADS[name].sides[0]]
        label = f"{memory:.2f}" + (" extra" if name == "head" else "")
        text.append(f"| {name} | {side} | {seconds:.2f} | {seconds / first[0]:.2f} | {label} | "
                    f"{memory / first[1]:.2f} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=[], help=f"of {list(WORKLOADS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timed", type=int, default=2, help="steps per process, after one more")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="tiny", choices=list(TEXT))
    parser.add_argument("--processor", default=str(PROCESSOR))
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that has TRL")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args)))
        return
    trl = subprocess.run([args.trl_python, "-c", "import trl"], capture_output=True).returncode == 0
    lines = []
    for name in args.workloads or WORKLOADS:
        for turn in range(args.rounds):
            for side in WORKLOADS[name].sides:
                if side == "trl" and not trl:
                    continue
                lines.append({"workload": name, "side": side, "round": turn, "model": args.model,
                              "device": args.device, **spawn(args, name, side)})
                print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
                RAW.parent.mkdir(exist_ok=True)
                with RAW.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
