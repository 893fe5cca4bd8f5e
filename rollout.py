"""Prompts out, completions back: environments, and the HTTP calls to the behavior policy.

An Environment is data and judgement: rows of chat prompts with images, and reward functions. A
Generator sends one chat-completions request per prompt with n=G to vLLM, scores what comes back and
hands over GenerateOutputs, with token ids and logprobs just as the server sampled them.
"""
import base64
import importlib
import inspect
import io
import random
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import requests
from PIL import Image, ImageOps
from requests.adapters import HTTPAdapter, Retry

# The sampling distribution must be the softmax that the trainer differentiates. Without these
# the server applies the model's generation_config.json (top_k=1 in Qwen2-VL's).
FULL_SOFTMAX = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Environment:
    """What the policy is trained on; `load_environment(**args)` of an env module returns one.

    A row is {"prompt": chat messages, "answer": str, "info": dict (optional)}; other keys reach
    adapters through `state`. Images are message parts {"type": "image", "image": SOURCE} or
    {"type": "image_url", "image_url": {"url": SOURCE}}, SOURCE as in load_image. A completion's
    reward is the sum of f(completion, answer, **info), weighted (default 1 each), from any thread.
    """
    train: Sequence[dict]
    eval: Sequence[dict]
    rewards: Sequence[Callable[..., float]]
    weights: Sequence[float] | None = None


@dataclass
class Rollout:
    """One completion of one prompt, as sampled and scored."""
    prompt: list[dict]
    completion: str
    answer: str
    state: dict                       # the row, and "image_url": its first image as a data URI
    info: dict
    example_id: int                   # the group: all completions of one prompt share it
    reward: float
    metrics: dict[str, float]         # unweighted value of each reward function
    prompt_ids: list[int]             # image placeholders already expanded, by the server
    completion_ids: list[int]         # with the end-of-turn token, if it was sampled
    completion_logprobs: list[float]  # of completion_ids, at the sampling temperature
    finish_reason: str                # "stop" or "length"
    images: list[Image.Image]
    encoded: object = None            # what the adapter made of (prompt, images), if it was asked


class GenerateOutputs(SimpleNamespace):
    """A step's completions as parallel lists, one for each field of Rollout.

    metrics alone is a dict, of one list per reward function. outputs.reward and
    outputs["reward"] both work.
    """

    @classmethod
    def from_rollouts(cls, rollouts: list[Rollout]) -> "GenerateOutputs":
        """Transpose; rollouts must not be empty."""
        columns = {f.name: [getattr(r, f.name) for r in rollouts] for f in fields(Rollout)}
        names = rollouts[0].metrics
        return cls(**columns | {"metrics": {n: [r.metrics[n] for r in rollouts] for n in names}})

    def __getitem__(self, name: str):
        return vars(self)[name]

    def __len__(self) -> int:
        return len(self.completion_ids)


def load_environment(env_id: str, args: dict) -> Environment:
    """Call my_env.load_environment(**args), or envs.my_env's; ValueError says where it looked."""
    name = env_id.replace("-", "_").split("/")[-1]
    for module_name in (name, f"envs.{name}"):
        try:
            loader = getattr(importlib.import_module(module_name), "load_environment", None)
        except ModuleNotFoundError as error:
            if error.name not in (module_name, "envs"):
                raise  # the environment is there; something that it imports is not
            continue
        if loader is not None:
            try:
                inspect.signature(loader).bind(**args)
            except TypeError as error:
                raise ValueError(f"environment {env_id!r}: load_environment() {error}") from error
            return loader(**args)
    raise ValueError(f"environment {env_id!r}: no load_environment() in a module {name!r} on "
                     f"sys.path ({sys.path[0] or '.'}, ...) or in {Path('envs', name + '.py')}")


def load_image(source, timeout: float = 20) -> Image.Image:
    """RGB pixels of a PIL image, path, URL, data URI, bytes or {"bytes", "path"}; or ValueError."""
    try:
        if isinstance(source, dict):  # Hugging Face datasets, undecoded
            source = source.get("bytes") or source.get("path")
        if isinstance(source, str) and source.startswith("data:"):
            source = base64.b64decode(source.split(",", 1)[1])
        elif isinstance(source, str) and source.startswith(("http://", "https://")):
            (response := requests.get(source, timeout=timeout)).raise_for_status()
            source = response.content
        source = io.BytesIO(source) if isinstance(source, bytes) else source
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:  # on white, as vLLM does
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read image {str(source)[:80]!r}: {error}") from error


def png_data_uri(image: Image.Image) -> str:
    """Lossless, so that server and trainer see the same pixels."""
    image.save(buffer := io.BytesIO(), "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def render_prompt(prompt: list[dict]) -> tuple[list[dict], list[Image.Image]]:
    """Chat messages -> (the same in OpenAI form with PNG data URIs, the images in order)."""
    images = []

    def render(part: dict) -> dict:
        if part["type"] not in ("image", "image_url"):
            return part
        source = part[part["type"]]
        images.append(load_image(source.get("url", source) if isinstance(source, dict) else source))
        return {"type": "image_url", "image_url": {"url": png_data_uri(images[-1])}}

    return [{**m, "content": m["content"] if isinstance(m["content"], str)
             else [render(part) for part in m["content"]]} for m in prompt], images


class Generator:
    """Rolls out an environment's prompts on a vLLM OpenAI server, one request per prompt.

    config says how (MultimodalRLConfig); logit_bias keeps vision tokens from being sampled;
    encode(prompt, images) is called once per prompt, while others are still being sampled.
    """

    def __init__(self, environment: Environment, url: str, config, logit_bias: dict[int, float],
                 encode: Callable | None = None):
        if not len(environment.train):
            raise ValueError("the environment's train split is empty")
        self.environment, self.url, self.config, self.encode = environment, url, config, encode
        self.weights = environment.weights or [1.0] * len(environment.rewards)
        self.pool = ThreadPoolExecutor(config.max_concurrent, thread_name_prefix="rollout")
        self.local = threading.local()  # a session per thread
        self.request = {"model": self.call("get", "/v1/models")["data"][0]["id"],
                        "temperature": config.temperature, "max_tokens": config.max_tokens,
                        "logit_bias": {str(token): bias for token, bias in logit_bias.items()},
                        "logprobs": True, "return_token_ids": True, **FULL_SOFTMAX}

    def train_step(self, step: int, num_prompts: int, group_size: int) -> GenerateOutputs:
        """The step's prompts, group_size times each: they advance through shuffled epochs."""
        rows, jobs = self.environment.train, []
        for position in range(step * num_prompts, (step + 1) * num_prompts):
            epoch, offset = divmod(position, len(rows))
            if not jobs or offset == 0:
                order = list(range(len(rows)))
                random.Random(f"{self.config.seed}-{epoch}").shuffle(order)
            jobs.append((rows, order[offset], group_size, position * group_size))
        return self.run(jobs)

    def evaluate(self, num_samples: int = 1) -> GenerateOutputs:
        """Every held-out row, sampled at the training temperature with seeds of its own."""
        rows = self.environment.eval
        return self.run([(rows, i, num_samples, 2**39 + i * num_samples) for i in range(len(rows))])

    def run(self, jobs: list[tuple]) -> GenerateOutputs:
        """Jobs are (rows, index, n, first seed)."""
        groups = self.pool.map(lambda job: self.group(*job), jobs)
        return GenerateOutputs.from_rollouts([rollout for group in groups for rollout in group])

    def group(self, rows: Sequence[dict], index: int, n: int, seed: int) -> list[Rollout]:
        """One prompt's n completions, scored."""
        row = rows[index]
        messages, images = render_prompt(row["prompt"])
        # vLLM gives sample i of a request the seed + i: neighbours are n apart, none overlap
        reply = self.call("post", "/v1/chat/completions", {
            **self.request, "messages": messages, "n": n, "seed": (self.config.seed << 40) + seed})
        encoded = self.encode(row["prompt"], images) if self.encode else None
        info, answer, rollouts = row.get("info") or {}, row.get("answer", ""), []
        url = next((part["image_url"]["url"] for m in messages if not isinstance(m["content"], str)
                    for part in m["content"] if part["type"] == "image_url"), None)
        for choice in reply["choices"]:
            text = choice["message"]["content"] or ""
            scores = {f.__name__: float(f(text, answer, **info)) for f in self.environment.rewards}
            rollouts.append(Rollout(
                prompt=row["prompt"], completion=text, answer=answer, info=info, example_id=index,
                state={"image_url": url, **row}, images=images, encoded=encoded, metrics=scores,
                reward=sum(w * s for w, s in zip(self.weights, scores.values(), strict=True)),
                prompt_ids=reply["prompt_token_ids"], completion_ids=choice["token_ids"],
                completion_logprobs=[t["logprob"] for t in choice["logprobs"]["content"]],
                finish_reason=choice["finish_reason"]))
        return rollouts

    def call(self, method: str, route: str, body: dict | None = None) -> dict:
        """One HTTP call. Raises RuntimeError with what the server answered."""
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()
            # a server closes idle connections, perhaps just as we send; the seed makes it safe
            retry = Retry(5, backoff_factor=0.5, allowed_methods=None)
            self.local.session.mount("http://", HTTPAdapter(max_retries=retry))
        response = self.local.session.request(method, self.url + route, json=body,
                                              timeout=self.config.generation_timeout)
        if not response.ok:
            raise RuntimeError(f"{response.url}: {response.status_code} {response.text[:500]}")
        return response.json()
