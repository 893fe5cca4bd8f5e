"""Makes models/tiny-qwen2-vl: a Qwen2-VL small enough to train on a laptop and to keep in git.

    python -m models.tiny_qwen2_vl

Nothing about it is a stand-in: it is the real architecture with two vision and two text layers, a
byte-level BPE tokenizer, Qwen's chat markup and a processor, and it loads wherever Qwen2-VL loads.
RL needs rewards that differ within a group, so the weights are warm-started on envs/colors.py with
labels that are right only part of the time. The result always answers with one color and
<|im_end|> but samples the right one in about 4 of 10 cases; what it saw is in the logits, for RL
to sharpen.
The same versions of the libraries on the same CPU write the same bytes.
"""
import random
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (GenerationConfig, Qwen2Tokenizer, Qwen2VLConfig,
                          Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor, Qwen2VLProcessor,
                          Qwen2VLVideoProcessor)

from envs.colors import COLORS, load_environment

OUT = Path(__file__).with_name("tiny-qwen2-vl")
STEPS, BATCH, LEARNING_RATE = 600, 64, 2e-3
LABELS_RIGHT = 0.22   # of the warm start's labels; the others are drawn at random
ROW_SEED = -1         # a seed that no run would choose: the warm start sees none of its drawings

CONTEXT = 4096
INIT = 0.1            # the usual 0.02 is for wide layers; 64 wide, it learns to see far later
# Beside <|endoftext|> and <|im_end|>, which are the pad and end tokens.
MARKUP = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
          "<|video_pad|>"]

# Renders what Qwen2-VL's own template renders, images as one <|image_pad|> each.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ['image', 'image_url'] -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# What the tokenizer learns its words from; every other text falls back to bytes.
TEXT = ["system\nYou are a helpful assistant.", "user\n", "assistant\n",
        "What color is the square? Answer with one word.",
        "What color is the circle? Answer with one word.",
        "How many shapes are in the image? Look at the picture and think step by step.",
        "The answer is zero one two three four five six seven eight nine ten.",
        *COLORS, *(f"The shape is {color}." for color in COLORS)]


def make_processor(texts: list[str]) -> Qwen2VLProcessor:
    """Its tokenizer learns whole words of these texts."""
    tokenizer = Qwen2Tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer = tokenizer.train_new_from_iterator(
        texts, vocab_size=512, new_special_tokens=MARKUP, show_progress=False)
    tokenizer.model_max_length = CONTEXT
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 448 * 448}  # areas, despite the names
    return Qwen2VLProcessor(Qwen2VLImageProcessor(size=pixels), tokenizer,
                            Qwen2VLVideoProcessor(size=pixels), chat_template=CHAT_TEMPLATE)


def make_model(tokenizer: Qwen2Tokenizer, rope_theta: float) -> Qwen2VLForConditionalGeneration:
    ids = tokenizer.get_vocab()
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 256,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": CONTEXT, "initializer_range": INIT, "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta,
                                "mrope_section": [4, 6, 6]}}  # sums to half of the head size, 32
    vision = {"depth": 2, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64,
              "initializer_range": INIT}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, dtype="float32",
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def warm_start(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor):
    """Supervised steps on labels that are right LABELS_RIGHT of the time."""
    rows = load_environment(num_train=STEPS * BATCH, seed=ROW_SEED).train
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
    for step in range(STEPS):
        texts, images = [], []
        for index in range(step * BATCH, (step + 1) * BATCH):
            row = rows[index]
            label = row["answer"] if rng.random() < LABELS_RIGHT else rng.choice(list(COLORS))
            prompt = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
            texts.append(prompt + label + "<|im_end|>")
            images.append(row["prompt"][0]["content"][0]["image"])
        inputs = processor(text=texts, images=images, padding=True, padding_side="left",
                           return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, :-2] = -100  # a row ends in the color, which is one token, and <|im_end|>
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step:3d}  loss {loss:.3f}", flush=True)


def make(out: Path, warm_start: Callable, texts: list[str] = TEXT,
         rope_theta: float = 10_000.0) -> None:
    """Write a warm-started checkpoint of this architecture, the same bytes each time."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # sums in another order are other sums
    torch.use_deterministic_algorithms(True)
    processor = make_processor(texts)
    model = make_model(processor.tokenizer, rope_theta)
    warm_start(model, processor)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {parameters:,} parameters, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    make(OUT, warm_start)
