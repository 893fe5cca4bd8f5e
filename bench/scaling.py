"""The scaling plan's numbers: `python bench/scaling.py`, writes the tables of docs/scaling.md.

Parameters are counted on models of the real shapes without memory (torch's meta device); work and
bytes follow from them. The formula of the work is held against the steps that were measured, in
results/bench_step.jsonl. What a GPU makes of it is ASSUMED below, in one place: replace the
assumptions by your own measurements and run this again. Where results/gpu.jsonl has lines, which
`bash bench/gpu.sh` writes on a GPU, the share of its peak and the speed of a sync are theirs.
"""
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.step import MODELS, WORKLOADS  # noqa: E402  (needs the path)

SHAPES = {  # text: hidden, layers, heads, kv heads, intermediate, vocabulary, tied head
    "2B": (1536, 28, 12, 2, 8960, 151936, True), "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "72B": (8192, 80, 64, 8, 29568, 152064, False)}
G, PROMPTS, PROMPT, COMPLETION, PATCHES, CONTEXT = 32, 32, 1024 + 100, 512, 4096, 2048
PEAK, MFU = 989e12, 0.35                     # bf16 flops/s of an H100; share in training, prefill
HBM, HBM_USED, SEQUENCES = 3.35e12, 0.6, 128  # bytes/s; share in decoding; at a time per replica
NVLINK, NETWORK, PCIE = 300e9, 40e9, 25e9    # bytes/s, one way, as NCCL reaches them
MEMORY = 80e9
MICRO_BATCH = 8                              # completions


def on_gpu(part: str, key: str, assumed: float) -> float:
    """The last measurement of a part of bench/gpu.py, or what is assumed without one."""
    path = ROOT / "results" / "gpu.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
    found = [line[key] for line in lines if line["part"] == part and key in line]
    return found[-1] if found else assumed


MFU = on_gpu("step-2b-long", "mfu", MFU)
GATHERED = on_gpu("gathering", "gb_per_second", PCIE / 1e9) * 1e9  # bytes/s from host memory


@dataclass
class Model:
    decoder: int       # parameters
    head: int
    vision: int
    hidden: int
    layers: int
    vision_size: int   # hidden size x layers
    kv_bytes: int      # of one token, bf16
    total: int


def on_meta(text: dict, vision: dict, tied: bool) -> Qwen2VLForConditionalGeneration:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=tied))


def count(text: dict, vision: dict, tied: bool) -> Model:
    model = on_meta(text, vision, tied)

    def size(module) -> int:
        return sum(p.numel() for p in module.parameters())

    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    kv_size = hidden // text["num_attention_heads"] * text["num_key_value_heads"]
    return Model(size(model.model.language_model.layers), size(model.lm_head),
                 size(model.model.visual), hidden, layers, vision["embed_dim"] * vision["depth"],
                 4 * layers * kv_size, size(model))


def published(name: str) -> tuple[dict, dict, bool]:
    """(text, vision, tied) of Qwen2-VL in this size."""
    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = SHAPES[name]
    return ({"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
             "num_key_value_heads": kv_heads, "intermediate_size": intermediate,
             "vocab_size": vocabulary},
            {"hidden_size": hidden, "embed_dim": 1280, "depth": 32, "num_heads": 16}, tied)


def work(model: Model, prompts: int, group: int, prompt: int, completion: int,
         patches: int) -> float:
    """Flops of a step that forwards `prompts` prompts once for `group` completions each."""
    sampled, tokens = prompts * group * completion, prompts * prompt + prompts * group * completion
    pairs = prompts * (prompt**2 / 2 + group * completion * (prompt + completion / 2))
    head = 7.4 * model.head * sampled  # seven tenths of its forward run twice
    return (6 * model.decoder * tokens + head
            + 12 * model.hidden * model.layers * pairs
            + prompts * patches * (6 * model.vision + 12 * model.vision_size * patches))


def plan(model: Model, gpus: int, how: str) -> dict[str, float] | None:
    """Seconds and bytes of a step on half of the GPUs for each side; None if it does not fit.

    how: "all", of the weights are trained; "checkpointed", with gradient_checkpointing; "offloaded",
    with cpu_offload, too, and larger micro-batches; or "LoRA".
    """
    each, replica = gpus // 2, 1  # GPUs of a vLLM replica: the smallest for weights and KV cache
    while (2 * model.total + SEQUENCES * CONTEXT * model.kv_bytes) / replica > 0.9 * MEMORY:
        replica *= 2
    # fp32 weights, gradients, two moments; of frozen weights bf16
    state = (2 if how == "LoRA" else 16) * model.total / each
    micro_batch = MICRO_BATCH
    if how == "offloaded":  # at work: embeddings and head, and three blocks, with gradients
        micro_batch = 2 * G
        rest = model.total - model.decoder - model.vision
        state = 12 * (rest + 3 * model.decoder / model.layers)
    flops = work(model, PROMPTS, G, PROMPT, COMPLETION, PATCHES)
    tokens = max(1, micro_batch / G) * PROMPT + micro_batch * COMPLETION
    # kept for the backward pass: about 34 bytes per token, hidden unit and layer (bf16)
    activations = 34 * model.hidden * model.layers * tokens
    if how in ("checkpointed", "offloaded"):  # inputs, and one layer; forwarded twice
        activations = (2 * model.layers + 34) * model.hidden * tokens
        flops *= 8 / 6
    if replica > each or state + activations > 0.95 * MEMORY:
        return None
    gathered = 3 * 2 * model.total  # FSDP: weights twice, gradients once; bf16 of every block
    wire = 0 if each == 1 else gathered * (each - 1) / each / (NVLINK if each <= 8 else NETWORK)
    chunks = PROMPTS * G / micro_batch / each
    wire *= chunks
    if how == "offloaded":  # to the GPU, in fp32, for completions and for prompts, and again
        wire += 16 * model.total / each * chunks / PCIE
    if how == "offloaded":  # the sync's, too
        gathering = 2 * model.total / GATHERED
    else:
        gathering = 2 * model.total / (NVLINK if each <= 8 else NETWORK) if each > 1 else 0
    train = max(flops / each / (PEAK * MFU), wire)
    sampled, replicas = PROMPTS * G * COMPLETION, each // replica
    running = min(SEQUENCES, PROMPTS * G / replicas)
    token = (2 * model.total + running * (PROMPT + COMPLETION / 2) * model.kv_bytes
             ) / (replica * HBM * HBM_USED)  # seconds for one token of all that are running
    prefill = 2 * model.total * PROMPTS * PROMPT / each / (PEAK * MFU)
    return {"train": train, "rollout": sampled / replicas / running * token + prefill,
            "sync": gathering + 2 * model.total / (NVLINK if gpus <= 8 else NETWORK),
            "state": state, "activations": activations, "replica": replica,
            "server": 2 * model.total / replica, "each": each, "sampled": sampled,
            "trained": PROMPTS * PROMPT + sampled}


def planned() -> list[str]:
    lines = ["| parameters (1e9) | GPUs: server + trainer | trained | trainer: state + "
             "activations, GB | server: weights, GB | trained tokens/s per trainer GPU | "
             "sampled tokens/s per server GPU | sync, s | train / rollout / step, s |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name in SHAPES:
        model = count(*published(name))
        for gpus in (2, 8, 64):
            start = f"| {name} ({model.total / 1e9:.2f}) | {gpus // 2} + {gpus // 2} |"
            plans = ((how, plan(model, gpus, how)) for how in ("all", "checkpointed", "offloaded"))
            fits = [(how, p) for how, p in plans if p]
            if not fits:
                lines.append(f"{start} does not fit | | | | | | |")
                continue
            how, p = fits[0]
            step = max(p["train"], p["rollout"]) + p["sync"]
            lines.append(
                f"{start} {how} | {p['state'] / 1e9:.0f} + {p['activations'] / 1e9:.0f} | "
                f"{p['server'] / 1e9:.0f} (TP {p['replica']}) | "
                f"{p['trained'] / p['train'] / p['each']:,.0f} | "
                f"{p['sampled'] / p['rollout'] / p['each']:,.0f} | {p['sync']:.1f} | "
                f"{p['train']:.0f} / {p['rollout']:.0f} / {step:.0f} |")
    return lines


def product_rate(size: int = 2048) -> float:
    """Flops per second of a plain fp32 matrix product on this machine, the best of ten."""
    a, seconds = torch.randn(size, size), []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def measured() -> list[str]:
    """The work of the steps of bench/step.py, by the same formula, and how fast it was done."""
    shape = MODELS["tiny"]
    model = count(shape["text"], shape["vision"], True)
    lines = ["| workload | side | Tflop | seconds | Gflop/s |", "|---|---|---|---|---|"]
    turns = {}  # seconds by workload and side
    for text in (ROOT / "results" / "bench_step.jsonl").read_text().splitlines():
        record = json.loads(text)
        if record["side"] in ("shared", "rows") and record["device"] == "cpu":
            turns.setdefault((record["workload"], record["side"]), []).extend(record["seconds"])
    for (name, side), seconds in turns.items():
        workload = WORKLOADS[name]
        once = side == "shared" and workload.image
        prompts, group = ((workload.prompts, workload.group) if once else
                          (workload.prompts * workload.group, 1))
        flops = work(model, prompts, group, workload.prompt_tokens, workload.tokens,
                     1024 * workload.image)
        median = statistics.median(seconds)
        lines.append(f"| {name} | {side} | {flops / 1e12:.2f} | {median:.2f} | "
                     f"{flops / median / 1e9:.0f} |")
    return [*lines, f"| a plain product of matrices | | | | {product_rate() / 1e9:.0f} |"]


def main() -> None:
    path = ROOT / "docs" / "scaling.md"
    text = path.read_text()
    for name, lines in (("plan", planned()), ("measured", measured())):
        before, rest = text.split(f"<!-- {name} -->\n")
        after = rest.split("<!-- end -->", 1)[1]
        text = f"{before}<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- end -->{after}"
        print(*lines, sep="\n")
    path.write_text(text)


if __name__ == "__main__":
    main()
