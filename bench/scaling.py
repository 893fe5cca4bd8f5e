"""The scaling plan's numbers: `python bench/scaling.py`, writes docs/scaling.md.

Parameters are counted on models of the real shapes without memory (torch's meta device); work and
bytes follow from them. What a GPU makes of that is ASSUMED below, in one place: replace the
assumptions by your own measurements and run this again.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {  # text: hidden, layers, heads, kv heads, intermediate; vocabulary, tied head
    "2B": (1536, 28, 12, 2, 8960, 151936, True), "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "72B": (8192, 80, 64, 8, 29568, 152064, False)}
G, PROMPTS, IMAGE_TOKENS, TEXT, COMPLETION, CONTEXT = 32, 32, 1024, 100, 512, 2048
PEAK, MFU = 989e12, 0.35                     # bf16 flops/s of an H100; share in training, prefill
HBM, HBM_USED, SEQUENCES = 3.35e12, 0.6, 128  # bytes/s; share in decoding; at a time per replica
NVLINK, NETWORK, PCIE = 300e9, 40e9, 25e9    # bytes/s, one way, as NCCL reaches them
MEMORY = 80e9


@dataclass
class Model:
    decoder: int    # parameters
    head: int
    vision: int
    hidden: int
    layers: int
    kv_bytes: int   # of one token, bf16
    total: int


def count(name: str) -> Model:
    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = SHAPES[name]
    config = Qwen2VLConfig(
        text_config={"hidden_size": hidden, "num_hidden_layers": layers,
                     "num_attention_heads": heads, "num_key_value_heads": kv_heads,
                     "intermediate_size": intermediate, "vocab_size": vocabulary},
        vision_config={"hidden_size": hidden, "embed_dim": 1280, "depth": 32, "num_heads": 16},
        tie_word_embeddings=tied)
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)

    def size(module) -> int:
        return sum(p.numel() for p in module.parameters())

    return Model(size(model.model.language_model.layers), size(model.lm_head),
                 size(model.model.visual), hidden, layers,
                 4 * layers * kv_heads * (hidden // heads), size(model))


def plan(model: Model, gpus: int) -> dict[str, float] | None:
    """Seconds and bytes of a step on half of the GPUs for each side; None if it does not fit."""
    each = gpus // 2
    replica = 1  # GPUs of one vLLM replica: the smallest that holds weights and the KV cache
    cache = SEQUENCES * CONTEXT * model.kv_bytes
    while (2 * model.total + cache) / replica > 0.9 * MEMORY:
        replica *= 2
    state = 16 * model.total / each  # fp32 weights, gradients, two moments
    # per token kept for the backward pass: about 34 bytes per hidden unit and layer (bf16)
    tokens_held = IMAGE_TOKENS + TEXT + 8 * COMPLETION  # a micro-batch of 8 completions
    activations = 34 * model.hidden * model.layers * tokens_held
    if replica > each or state + activations > 0.95 * MEMORY:
        return None
    prompt = PROMPTS * (IMAGE_TOKENS + TEXT)
    sampled = PROMPTS * G * COMPLETION
    pairs = PROMPTS * ((IMAGE_TOKENS + TEXT)**2 / 2 + G * COMPLETION * (IMAGE_TOKENS + TEXT
                                                                       + COMPLETION / 2))
    work = (6 * model.decoder * (prompt + sampled) + 8 * model.head * sampled  # the head twice
            + 6 * model.vision * PROMPTS * 4 * IMAGE_TOKENS
            + 12 * model.layers * model.hidden * pairs)
    gathered = 3 * 2 * model.total  # FSDP: weights twice, gradients once; bf16 of every block
    wire = 0 if each == 1 else gathered * (each - 1) / each / (NVLINK if each <= 8 else NETWORK)
    micro_batches = PROMPTS * G / 8 / each
    train = max(work / each / (PEAK * MFU), wire * micro_batches)
    replicas = each // replica
    running = min(SEQUENCES, PROMPTS * G / replicas)
    token = (2 * model.total + running * (IMAGE_TOKENS + TEXT + COMPLETION / 2) * model.kv_bytes
             ) / (replica * HBM * HBM_USED)  # seconds for one token of all that are running
    rollout = (sampled / replicas / running * token + 2 * model.total * prompt / replicas
               / (replica * PEAK * MFU))
    copied = 2 * 4 * model.total / PCIE if each > 1 else 0  # gathered to host memory, and back
    sync = copied + 2 * model.total / (NVLINK if gpus <= 8 else NETWORK)
    return {"train": train, "rollout": rollout, "sync": sync, "state": state,
            "activations": activations, "server": 2 * model.total / replica, "replica": replica,
            "train_rate": (prompt + sampled) / train / each,
            "rollout_rate": sampled / rollout / each}


def main() -> None:
    lines = []
    for name in SHAPES:
        model = count(name)
        for gpus in (2, 8, 64):
            found = plan(model, gpus)
            start = f"| {name} ({model.total / 1e9:.2f}) | {gpus // 2} + {gpus // 2} "
            if found is None:
                lines.append(start + "| does not fit | | | | | |")
                continue
            step = max(found["train"], found["rollout"]) + found["sync"]
            lines.append(
                start + f"| {found['state'] / 1e9:.0f} + {found['activations'] / 1e9:.0f} "
                f"| {found['server'] / 1e9:.0f} (TP {found['replica']}) "
                f"| {found['train_rate']:,.0f} | {found['rollout_rate']:,.0f} "
                f"| {found['sync']:.1f} | {found['train']:.0f} / {found['rollout']:.0f} / "
                f"{step:.0f} |")
    text = (ROOT / "docs" / "scaling.md").read_text()
    before, rest = text.split("<!-- table -->\n")
    after = rest.split("<!-- end -->")[1]
    header = ("| parameters (1e9) | GPUs: server + trainer | trainer: state + activations, GB "
              "| server: weights, GB | trained tokens/s per trainer GPU "
              "| sampled tokens/s per server GPU | sync, s | train / rollout / step, s |\n"
              "|---|---|---|---|---|---|---|---|\n")
    (ROOT / "docs" / "scaling.md").write_text(
        f"{before}<!-- table -->\n{header}" + "\n".join(lines) + f"\n<!-- end -->{after}")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
