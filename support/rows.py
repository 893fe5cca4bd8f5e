"""What the model will see: `python -m support.check @ config.toml [key=value ...]`.

Shows three rows of each split as they are sent: the prompt as the chat template renders it, the
images with their sizes, what both come to in tokens, the answer, and what the answer itself is
worth as a completion. It needs neither server nor GPU, of the model its processor alone, and trains
nothing. All texts are searched for what the model would read as an image. Exit code 2 and one line
if something is wrong.
"""
import json

import transformers

from adapter import MultimodalAdapter, load_adapter
from rollout import Environment, load_environment
from support.config import MultimodalRLConfig, command_line, mistakes
from support.loading import check_hub, missing_model
from support.messages import render_prompt
from support.prompts import row_prompt
from support.rewards import scores
from support.text import describe, plain


def main() -> int:
    with mistakes():
        config = command_line("-m support.check")
        environment = load_environment(config.env_id, config.env_args)
        adapter = load_adapter(config.adapter, load_processor(config.model))
        adapter.server_args, adapter.tools = config.inference_args, environment.tools
        for split in ("train", "eval"):
            show_split(split, getattr(environment, split), environment, adapter, config)
    return 0


def load_processor(name: str):
    """That of a model, whose weights are left where they are; ValueError if there is none."""
    transformers.logging.disable_progress_bar()
    try:
        check_hub(name)
        return transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of a broken file, of the network, or of a model's own code
        raise ValueError(missing_model(name, error)) from error


def show_split(split: str, rows, environment: Environment, adapter: MultimodalAdapter,
               config: MultimodalRLConfig) -> None:
    """Its first row, one in the middle, and the last."""
    if hasattr(rows, "check"):
        rows.check(reserved=adapter.reserved())
    for index in sorted({0, len(rows) // 2, len(rows) - 1} & set(range(len(rows)))):
        print(f"---- {split}, row {index} of {len(rows)} (from 0)")
        row = dict(rows[index])
        try:
            show_row(row, environment, adapter, config)
        except Exception as error:  # of a chat template or processor
            raise ValueError(f"{split}, row {index}: {describe(error)}") from error


def show_row(row: dict, environment: Environment, adapter: MultimodalAdapter,
             config: MultimodalRLConfig) -> None:
    row["prompt"] = row_prompt(row, adapter.reserved())
    _, images = render_prompt(row["prompt"])
    text = adapter.render(row["prompt"])
    tokens = adapter.encode_text(text, images)["input_ids"].shape[1]
    for line in text.splitlines():
        print(f"  {plain(line)}")
    sizes = [f"{image.width} x {image.height}" for image in images]
    print(f"images: {len(images)}" + (f", of {', '.join(sizes)} pixels" if images else ""))
    print(f"tokens: {tokens}, {len(adapter.token_ids(text))} with an image as one; "
          f"max_tokens {config.max_tokens}, max_model_len "
          f"{config.inference_args.get('max_model_len', 'of the model')}")
    print(f"answer: {plain(str(row.get('answer', '')))}")
    print(f"reward of the answer itself: {own_reward(row, environment)}")


def own_reward(row: dict, environment: Environment) -> str:
    """What the answer is worth as a completion, in words."""
    if environment.play is not None:
        return "only a conversation has one"
    answer = row.get("answer", "")
    completion = answer if isinstance(answer, str) else json.dumps(answer)
    try:
        total, found = scores(environment, completion, answer, row.get("info") or {})
    except Exception as error:  # a reward of the user's fails in any way
        return f"none, {describe(error)}"
    each = ", ".join(f"{name} {value:g}" for name, value in found.items())
    return f"{total:g} ({each})"
