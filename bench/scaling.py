"""The scaling plan's numbers: `python bench/scaling.py`, writes the tables of docs/scaling.md.

Parameters are counted on models of the real shapes without memory (torch's meta device); work and
bytes follow from them. The formula of the work is held against the steps that were measured, in
results/bench_step.jsonl, and that of the memory against results/gpu.jsonl. What a GPU makes of it is
ASSUMED below, in one place: replace the assumptions by your own measurements and run this again. The
share of a GPU's peak and the speed of reading weights for a sync are those of results/gpu.jsonl, to
which `bash bench/gpu.sh` adds lines on a GPU.
"""
import json
import statistics
import sys
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
PEAK = 989e12                                # bf16 flops/s of an H100
HBM, HBM_USED, SEQUENCES = 3.35e12, 0.6, 128  # bytes/s; share in decoding; at a time per replica
NVLINK, NETWORK = 300e9, 40e9                # bytes/s, one way, as NCCL reaches them
PINNED, PAGEABLE = 54e9, 1.4e9               # bytes/s to and from pinned memory, to fresh pageable
MEMORY, USABLE = 80e9, 0.9
MICRO_BATCH = 8                              # completions
KEPT = 90  # bytes of a layer per token (patch) and hidden unit, kept for the backward pass


def on_gpu(part: str, key: str, assumed: float) -> float:
    """The last measurement of a part of bench/gpu.py, or what is assumed without one."""
    found = [line[key] for line in GPU_LINES if line["part"] == part and key in line]
    return found[-1] if found else assumed


GPU_STEPS = {  # of bench/gpu.py: size, trained, completions at a time, tokens of each, checkpointed
    "step-2b": ("2B", "all", 16, 64, False), "step-2b-saving": ("2B", "all", 32, 512, True),
    "step-7b-lora": ("7B", "LoRA", 8, 512, False)}
GPU_FILE = ROOT / "results" / "gpu.jsonl"
GPU_LINES = [json.loads(line) for line in
             (GPU_FILE.read_text().splitlines() if GPU_FILE.exists() else ())]
MFU = on_gpu("step-7b-lora", "mfu", 0.35)  # share of the peak in training and in prefill
GATHERED = on_gpu("gathering", "gb_per_second", 4.0) * 1e9  # bytes/s from host memory


@dataclass
class Model:
    decoder: int       # parameters
    head: int
    vision: int
    hidden: int
    layers: int
    vision_hidden: int
    vision_layers: int
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
                 size(model.model.visual), hidden, layers, vision["embed_dim"], vision["depth"],
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
            + prompts * patches * (6 * model.vision + 12 * model.vision_hidden * model.vision_layers * patches))


def activations(model: Model, tokens: float, patches: float, checkpointed: bool,
                sharded: bool) -> float:
    """Bytes kept for the backward pass of so many tokens and patches.

    Checkpointed: the input of every layer, bf16 in a sharded model and else fp32, and all of one.
    """
    def of_layers(layers: int) -> int:
        return (2 if sharded else 4) * layers + KEPT if checkpointed else KEPT * layers

    return (of_layers(model.layers) * model.hidden * tokens
            + of_layers(model.vision_layers) * model.vision_hidden * patches)


def state(model: Model, how: str, each: int) -> float:
    """Bytes of weights, gradients and moments on each of so many GPUs; how: see plan()."""
    if how == "offloaded":  # at work: embeddings and head, and three blocks, with gradients
        rest = model.total - model.decoder - model.vision
        return 12 * (rest + 3 * model.decoder / model.layers)
    if how == "LoRA":  # of frozen weights bf16 alone
        return 2 * model.total / each
    # fp32 weights, gradients, two moments; one GPU alone keeps the weights' bf16 copies, too
    return (18 if each == 1 else 16) * model.total / each


def plan(model: Model, gpus: int, how: str) -> dict[str, float] | None:
    """Seconds and bytes of a step on half of the GPUs for each side; None if it does not fit.

    how: "all", of the weights are trained; "checkpointed", with gradient_checkpointing; "offloaded",
    with cpu_offload, too, and larger micro-batches; or "LoRA".
    """
    each, replica = gpus // 2, 1  # GPUs of a vLLM replica: the smallest for weights and KV cache
    while (2 * model.total + SEQUENCES * CONTEXT * model.kv_bytes) / replica > 0.9 * MEMORY:
        replica *= 2
    micro_batch = 2 * G if how == "offloaded" else MICRO_BATCH
    flops = work(model, PROMPTS, G, PROMPT, COMPLETION, PATCHES)
    images = max(1, micro_batch / G)  # of a micro-batch
    tokens = images * PROMPT + micro_batch * COMPLETION
    checkpointed = how in ("checkpointed", "offloaded")
    kept = activations(model, tokens, images * PATCHES, checkpointed,
                       sharded=each > 1 or how == "offloaded")
    held = state(model, how, each)
    if checkpointed:
        flops *= 8 / 6
    if replica > each or held + kept > USABLE * MEMORY:
        return None
    chunks = PROMPTS * G / micro_batch / each
    # FSDP: weights twice, gradients once; bf16 of every block
    wire = (0 if each == 1 else
            3 * 2 * model.total * (each - 1) / each / (NVLINK if each <= 8 else NETWORK) * chunks)
    if how == "offloaded":  # in fp32: weights for completions and prompts, and again; gradients
        wire += chunks * 4 * model.total / each * (4 / PINNED + 1 / PAGEABLE)
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
            "state": held, "activations": kept, "replica": replica,
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
    return lines


def on_gpus() -> list[str]:
    """The steps that bench/gpu.py measured, and what the formula says of their memory."""
    lines = ["| step | GPU | seconds | sampled tokens/s | of the peak | GB | GB by the formula |",
             "|---|---|---|---|---|---|---|"]
    for line in GPU_LINES:
        if line["part"] not in GPU_STEPS or "seconds" not in line:
            continue
        size, how, rows, length, checkpointed = GPU_STEPS[line["part"]]
        model = count(*published(size))
        tokens = 2 * 300 + rows * length  # two prompts, each with 1,024 patches
        counted = state(model, how, 1) + activations(
            model, tokens, 2 * 1024, checkpointed, sharded=False)
        lines.append(
            f"| {line['part']} | {line['device']} | {min(line['seconds']):.2f} | "
            f"{line['tokens_per_second']:,.0f} | {line.get('mfu', 0) * 100:.0f} % | "
            f"{line['peak_gb']:.1f} | {counted / 1e9:.1f} |")
    return lines


def main() -> None:
    path = ROOT / "docs" / "scaling.md"
    text = path.read_text()
    for name, lines in (("plan", planned()), ("gpus", on_gpus()), ("measured", measured())):
        before, rest = text.split(f"<!-- {name} -->\n")
        after = rest.split("<!-- end -->", 1)[1]
        text = f"{before}<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- end -->{after}"
        print(*lines, sep="\n")
    path.write_text(text)


if __name__ == "__main__":
    main()
