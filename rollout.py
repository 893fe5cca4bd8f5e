"""Prompts out, completions back: environments, and the HTTP calls to the behavior policy.

A Generator sends one chat-completions request per prompt, with n=G, to vLLM and scores what comes
back; token ids and logprobs stay just as they were sampled.
"""
import atexit
import base64
import importlib.util
import io
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import requests
from PIL import Image, ImageOps

IMAGE_SECONDS, IMAGE_BYTES = 20, 2**26  # at most, of an image behind a URL
SESSIONS = threading.local()  # one requests.Session per thread


class ServerError(RuntimeError):
    """The server is gone, hangs or broke off: bring it back, send it the weights, try again."""


@dataclass(frozen=True)
class Environment:
    """What the policy is trained on; `load_environment(**args)` of an env module returns one.

    A row is {"prompt": chat messages, "answer": str, "info": dict (optional)}; other keys reach
    adapters through `state`. Images are message parts {"type": "image", "image": SOURCE} or
    {"type": "image_url", "image_url": {"url": SOURCE}}, SOURCE as in load_image. A completion's
    reward is the weighted sum of the f(completion, answer, **info), called from any thread.

    With several turns, reply(messages, answer, **info) is called after each completion, with the
    conversation so far, and returns the next messages, or None at its end. Rewards then get the
    list of all completions.
    """
    train: Sequence[dict]
    eval: Sequence[dict]
    rewards: Sequence[Callable[..., float]]
    weights: Sequence[float] | None = None  # 1 each
    reply: Callable[..., list[dict] | None] | None = None

    def __post_init__(self):
        names = {getattr(f, "__name__", None) for f in self.rewards} - {None}  # scores' names, too
        if not len(names) == len(self.rewards) == len(self.weights or self.rewards):
            raise ValueError(f"each reward needs a __name__ of its own, and a weight: {names}")


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
    completion_mask: list[int] | None = None  # 0 = not sampled: what the environment replied
    turns: list[tuple[int, dict]] = ()        # (its place in completion_ids, encoded) of a reply
    finished: float = 0.0             # time.perf_counter()


class GenerateOutputs(SimpleNamespace):
    """By attribute or key, a list for each field of Rollout; metrics alone is a dict of lists."""
    dropped: Sequence[str] = ()  # why some completions are missing

    @classmethod
    def from_rollouts(cls, rollouts: list[Rollout], dropped=()) -> "GenerateOutputs":  # 1 or more
        columns = {f.name: [getattr(r, f.name) for r in rollouts] for f in fields(Rollout)}
        columns["metrics"] = {n: [m[n] for m in columns["metrics"]] for n in rollouts[0].metrics}
        return cls(**columns, dropped=dropped)

    def means(self, prefix: str = "") -> dict[str, float]:
        """Of the reward, and of each reward function, whose names get the prefix."""
        values = {"reward": self.reward} | {prefix + k: v for k, v in self.metrics.items()}
        return {name: sum(column) / len(column) for name, column in values.items()}

    def __getitem__(self, name: str):
        return vars(self)[name]

    def __len__(self) -> int:
        return len(self.completion_ids)


def load_environment(env_id: str, args: dict) -> Environment:
    """Call my_env.load_environment(**args), or envs.my_env's; ValueError says what is wrong."""
    name, loaders = Path(env_id).stem.replace("-", "_"), []
    try:
        for module in filter(importlib.util.find_spec, (name, f"envs.{name}")):
            loaders.append(getattr(importlib.import_module(module), "load_environment", None))
        if not any(loaders):
            raise ValueError(f"no load_environment() in a module {name!r} on sys.path "
                             f"({sys.path[0] or '.'}, ...) or in envs/{name}.py")
        environment = next(filter(None, loaders))(**args)
        if not isinstance(environment, Environment) or not len(environment.train):
            raise ValueError("load_environment() must return an Environment with rows in train, "
                             f"not {environment!r:.99}")
        return environment
    except (TypeError, ValueError) as error:
        raise ValueError(f"environment {env_id!r}: {error}") from error


def load_image(source) -> Image.Image:
    """RGB pixels of a PIL image, path, URL, data URI, bytes or a dict of one; or ValueError."""
    try:
        if isinstance(source, dict):  # OpenAI's, or from Hugging Face datasets, undecoded
            source = source.get("url") or source.get("bytes") or source.get("path")
        if isinstance(source, str) and source.startswith("data:"):
            source = base64.b64decode(source.split(",", 1)[1])
        elif isinstance(source, str) and "://" in source:
            source = download(source)
        source = io.BytesIO(source) if isinstance(source, bytes) else source
        image = source if isinstance(source, Image.Image) else Image.open(source)
        # refused: animations (which frame is meant? MPO is of phones), no known range, bombs
        animated = getattr(image, "is_animated", False) and image.format != "MPO"
        if animated or image.mode in "IF" or image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.size} pixels, mode {image.mode}, animated: {animated}")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip it to white
            image = image.convert("I").point(lambda value: value / 257).convert("L")
        white = Image.new("RGBA", image.size, "white")  # as vLLM does with transparency
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything
        raise ValueError(f"cannot read image {str(source)[:80]!r}: {error}") from error


def download(url: str) -> bytes:
    """The body of a URL, http or https alone; ValueError if it is too large or too slow."""
    deadline, body = time.monotonic() + IMAGE_SECONDS, b""
    with requests.get(url, timeout=IMAGE_SECONDS, stream=True) as response:
        response.raise_for_status()
        while piece := response.raw.read1(2**16, decode_content=True):
            body += piece
            if len(body) > IMAGE_BYTES or time.monotonic() > deadline:
                raise ValueError(f"more than {IMAGE_BYTES} bytes or {IMAGE_SECONDS} seconds")
    return body


def png_data_uri(image: Image.Image) -> str:
    image.save(buffer := io.BytesIO(), "PNG", compress_level=1)  # lossless: both see the same
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def render_prompt(prompt: list[dict]) -> tuple[list[dict], list[Image.Image]]:
    """Chat messages -> (the same in OpenAI form with PNG data URIs, the images in order)."""
    messages, images = [{**m, "content": m["content"][:]} for m in prompt], []
    for parts in (m["content"] for m in messages if not isinstance(m["content"], str)):
        for i, part in enumerate(parts):
            if part["type"] in ("image", "image_url"):
                images.append(load_image(part[part["type"]]))
                parts[i] = {"type": "image_url", "image_url": {"url": png_data_uri(images[-1])}}
    return messages, images


def call(url: str, body: dict | None = None, method: str = "post", *, timeout: float,
         pauses: Sequence[float] = (0.5, 1, 2, 4)) -> dict:
    """What the server answers. ServerError without a connection, RuntimeError with a bad answer.

    After each pause it is tried again: the server is busy, or has closed an idle connection.
    """
    SESSIONS.own = session = getattr(SESSIONS, "own", None) or requests.Session()
    for pause in (*pauses, None):
        try:
            response = session.request(method, url, json=body, timeout=timeout)
            if response.ok:
                return response.json() if response.content else {}
            if pause is None or response.status_code < 500:
                raise RuntimeError(f"{url}: {response.status_code} {response.text[:500]}")
        except requests.ConnectionError as error:
            if pause is None or isinstance(error, requests.Timeout):
                raise ServerError(f"no connection to {url}: {error}") from error
        time.sleep(pause)


class Conversation:
    """One rollout of several turns, recorded as token ids.

    They go in as they were sampled and served, nothing is tokenised twice: a row is exactly what
    the policy saw and said. `messages` is the same for environments.
    """

    def __init__(self, generator: "Generator", prompt: list[dict], seed: str):
        self.generator, self.seed, self.texts, self.finish_reason = generator, seed, [], ""
        self.messages, self.prompt_ids, self.urls, self.images = [], None, [], []
        self.ids, self.sampled, self.logprobs, self.turns = [], [], [], []  # after the prompt
        self.asked, self.served = [], []  # all tokens, an image as one placeholder; or as many
        self.encoded, self.new = None, prompt

    def begin(self, new: list[dict]) -> int:
        """Take the next messages in; how many of their tokens the last answer ended with."""
        adapter = self.generator.adapter
        new, images = render_prompt(new)
        ids = adapter.tokens(new, self.messages)
        overlap = int(self.asked[-1:] == ids[:1])  # the end of turn, if it was sampled
        self.encoded = adapter.encode(new, images, self.messages)
        self.messages, self.images = self.messages + new, self.images + images
        self.urls += [part["image_url"]["url"] for m in new for part in m["content"]
                      if isinstance(part, dict) and part["type"] == "image_url"]
        self.asked += ids[overlap:]
        return overlap

    def say(self, new: list[dict]) -> str:
        """The policy's answer to the next messages, images among them or not."""
        overlap = self.begin(new)
        seed = random.Random(f"{self.seed}-{len(self.texts)}").getrandbits(60)
        reply = self.generator.call("inference/v1/generate", {
            "token_ids": self.asked, "return_token_ids": True,
            "cache_salt": f"{self.seed}-{len(self.texts)}",  # a hit would change the last bits
            "content_parts": [{"type": "image_url", "url": url} for url in self.urls] or None,
            "sampling_params": {**self.generator.sampling, "seed": seed}})
        choice, tokenizer = reply["choices"][0], self.generator.adapter.processor.tokenizer
        text = tokenizer.decode(choice["token_ids"], skip_special_tokens=True)
        found = {"completion_ids": choice["token_ids"], "finish_reason": choice["finish_reason"],
                 "completion_logprobs": [t["logprob"] for t in choice["logprobs"]["content"]]}
        return self.hear(reply["prompt_token_ids"], found, text, overlap)

    def hear(self, served: list[int], found: dict, text: str, overlap: int | None = None) -> str:
        """Record an answer: to say, or, without overlap, one that was sampled by other means."""
        if overlap is None:
            overlap = self.begin(self.new)
        known, said = len(self.served), found["completion_ids"]
        between, encoded = served[known:], self.encoded
        if served[:known] != self.served or between != encoded["input_ids"][0, overlap:].tolist():
            raise ValueError(f"turn {len(self.texts) + 1}: processor and server differ")
        if self.prompt_ids is None:
            self.prompt_ids, self.first = served, encoded
        else:
            self.turns.append((len(self.ids), {
                key: tensor[:, overlap:] if tensor.shape == encoded["input_ids"].shape else tensor
                for key, tensor in encoded.items()}))
            self.ids, self.sampled = self.ids + between, self.sampled + [0] * len(between)
            self.logprobs += [0.0] * len(between)
        self.ids, self.sampled = self.ids + said, self.sampled + [1] * len(said)
        self.logprobs += found["completion_logprobs"]
        self.asked, self.served = self.asked + said, served + said
        self.texts.append(text)
        self.messages = self.messages + [{"role": "assistant", "content": text}]
        self.finish_reason = found["finish_reason"]
        return text

    def found(self) -> dict:
        """For Generator.score and Rollout."""
        return {"completion": self.texts, "completion_ids": self.ids, "turns": self.turns,
                "completion_logprobs": self.logprobs, "completion_mask": self.sampled,
                "finish_reason": self.finish_reason}


class Generator:
    """Rolls out an environment's prompts on a vLLM OpenAI server, one request per prompt.

    config: MultimodalRLConfig; banned: token ids never sampled; the adapter, if it has a processor,
    encodes prompts and later turns while others are still being sampled.
    """

    def __init__(self, environment: Environment, config, banned: list[int] = (), adapter=None):
        self.environment, self.config, self.adapter = environment, config, adapter
        self.url = config.url
        self.pool = ThreadPool(config.max_concurrent)  # daemons: a hung request keeps nobody here
        self.later = ThreadPool(config.max_concurrent if environment.reply else 1)  # conversations
        atexit.register(lambda: (self.pool.terminate(), self.later.terminate()))
        # The sampling distribution must be the softmax that the trainer differentiates. By itself
        # the server applies the model's generation_config.json (top_k=1 in Qwen2-VL's).
        self.request = {"model": self.call("v1/models", method="get")["data"][0]["id"],
                        "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
                        "temperature": config.temperature, "max_tokens": config.max_tokens,
                        "logit_bias": {str(i): -100 for i in banned}, "return_token_ids": True,
                        "logprobs": True}
        self.sampling = {key: self.request[key] for key in (
            "top_p", "top_k", "min_p", "repetition_penalty", "temperature", "max_tokens",
            "logit_bias")} | {"logprobs": 1}

    def call(self, route: str, body: dict | None = None, method: str = "post") -> dict:
        return call(f"{self.url}/{route}", body, method, timeout=self.config.generation_timeout)

    def begin(self, step: int, num_prompts: int, group_size: int) -> Callable[[], GenerateOutputs]:
        """The step's prompts, group_size times each, from shuffled epochs; see submit."""
        rows, jobs = self.environment.train, []
        for position in range(step * num_prompts, (step + 1) * num_prompts):
            epoch, offset = divmod(position, len(rows))
            if not jobs or offset == 0:
                order = list(range(len(rows)))
                random.Random(f"{self.config.seed}-{epoch}").shuffle(order)
            jobs.append((rows, order[offset], group_size, position * group_size))
        return self.submit(jobs)

    def evaluate(self, n: int = 1) -> GenerateOutputs:
        """Every held-out row n times, at the training temperature, with seeds of its own."""
        rows = self.environment.eval
        return self.submit([(rows, i, n, 2**39 + i * n) for i in range(len(rows))])()

    def submit(self, jobs: list[tuple]) -> Callable[[], GenerateOutputs]:
        """Start jobs of (rows, index, n, first seed); what is returned waits for them."""
        groups = [self.pool.apply_async(self.group, job) for job in jobs]
        return lambda: self.collect(jobs, groups)

    def collect(self, jobs: list[tuple], groups: list) -> GenerateOutputs:
        """What did not fail; `dropped` says why the rest did.

        ServerError if the server is lost or hangs, RuntimeError if more than max_dropped failed.
        """
        rollouts, dropped, waves = [], [], 2 + len(jobs) // self.config.max_concurrent
        deadline = time.monotonic() + waves * self.config.generation_timeout  # for rewards, too
        for (_, index, n, _), group in zip(jobs, groups, strict=True):
            try:
                found = group.get(max(0, deadline - time.monotonic()))
            except ServerError:
                raise
            except Exception as error:  # rows and images of an environment fail in any way
                found = [error] * n
            rollouts += [result for result in found if isinstance(result, Rollout)]
            dropped += [(index, why) for why in found if isinstance(why, Exception)]
        if any(isinstance(why, requests.Timeout) for _, why in dropped):
            try:  # to sample a token: the health route would not notice an engine that hangs
                self.call("v1/completions", {"prompt": "a", "max_tokens": 1})
            except requests.Timeout as error:
                raise ServerError(f"{self.url} hangs: {error}") from error
        reasons = [f"example {i}: {type(why).__name__}: {why}" for i, why in dropped]
        if not rollouts or len(dropped) > self.config.max_dropped * (len(dropped) + len(rollouts)):
            raise RuntimeError(
                f"{self.url}: {len(dropped)} completions failed and {len(rollouts)} did not (see "
                f"max_dropped); the last: {reasons[-1]}") from dropped[-1][1]
        return GenerateOutputs.from_rollouts(rollouts, reasons)

    def group(self, rows: Sequence[dict], index: int, n: int, seed: int) -> list:
        """One prompt's completions: for each a Rollout, or the exception why there is none."""
        row = rows[index]
        messages, images = render_prompt(row["prompt"])
        # vLLM gives sample i of a request the seed + i: neighbours are n apart, none overlap
        reply = self.call("v1/chat/completions", {
            **self.request, "messages": messages, "n": n, "seed": (self.config.seed << 40) + seed})
        url = next((part["image_url"]["url"] for m in messages for part in m["content"]
                    if isinstance(part, dict) and part["type"] == "image_url"), None)
        shared = {"prompt": row["prompt"], "answer": row.get("answer", ""), "example_id": index,
                  "info": row.get("info") or {}, "state": {"image_url": url, **row},
                  "images": images, "prompt_ids": reply["prompt_token_ids"],
                  "encoded": self.adapter and self.adapter.encode(row["prompt"], images)}
        first = [{"completion": choice["message"]["content"] or "",
                  "completion_ids": choice["token_ids"], "finish_reason": choice["finish_reason"],
                  "completion_logprobs": [t["logprob"] for t in choice["logprobs"]["content"]]}
                 for choice in reply["choices"]]
        if self.environment.reply:
            jobs = [(found, shared, f"{self.config.seed}-{seed + i}")
                    for i, found in enumerate(first)]
            return self.later.starmap(self.converse, jobs, chunksize=1)
        return [self.score(found, shared) for found in first]

    def converse(self, found: dict, shared: dict, seed: str) -> "Rollout | Exception":
        """The further turns of a first completion, scored; or the exception that ended them."""
        try:
            talk = Conversation(self, shared["prompt"], seed)
            talk.hear(shared["prompt_ids"], found, found["completion"])
            while talk.finish_reason == "stop":
                new = self.environment.reply(talk.messages, shared["answer"], **shared["info"])
                if not new:
                    break
                talk.say(new)
            return self.score(talk.found(), shared)
        except ServerError:
            raise
        except Exception as error:
            return error

    def score(self, found: dict, shared: dict) -> Rollout | Exception:
        """One completion with its reward, or what a reward function raised."""
        text, rewards = found["completion"], self.environment.rewards
        try:
            scores = {f.__name__: f(text, shared["answer"], **shared["info"]) for f in rewards}
            if not all(map(math.isfinite, scores.values())):
                raise ValueError(f"rewards must be finite numbers, not {scores}")
        except Exception as error:  # they, too, can fail in any way
            return error
        weights = self.environment.weights or [1.0] * len(scores)
        return Rollout(
            **found, finished=time.perf_counter(),
            reward=float(sum(w * x for w, x in zip(weights, scores.values(), strict=True))),
            metrics={name: float(x) for name, x in scores.items()}, **shared)


Environment.generator = Generator  # what rolls it out
