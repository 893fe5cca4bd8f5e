"""Prompts out, completions back: environments, and the calls to the vLLM server that samples.

An Environment holds prompts and reward functions. A Generator sends each prompt to the server in
one chat-completions request with n=G, and scores what comes back. Token ids and logprobs stay just
as they were sampled: nothing is tokenised again.
"""
import atexit
import contextlib
import functools
import importlib.util
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path

import requests
from PIL import Image

from support.config import stop_signals_kept
from support.http import Refusal, ServerError, call
from support.images import without_shared_images
from support.messages import ConversationOver, image_parts, render_prompt
from support.owner import step_of
from support.prompts import clean_prompt, row_prompt, template_options
from support.rewards import copied, number, scores
from support.task import Task, encoding_pool, without_limit
from support.text import describe, plain

TIMEOUT_HINT = " (see generation_timeout)"
GENERATE = "inference/v1/generate"  # vLLM's route for token ids


@dataclass(frozen=True)
class Environment:
    """What the policy is trained on; `load_environment(**args)` of an env module returns one.

    A row is {"prompt": chat messages, "answer": str, "info": dict (optional)}; other keys reach
    adapters through `state`. Images are message parts {"type": "image", "image": SOURCE} or
    {"type": "image_url", "image_url": {"url": SOURCE}}, SOURCE as in support.images.load_image; or
    stand in a column `images`, and parts {"type": "image"} or <image> in a text say where. A
    completion's reward is the weighted sum of the f(completion, answer, **info), which are called
    from any thread, and awaited if they are async.

    The completion that they see is the text of exactly the sampled ids, whatever the server's
    parsers make of them. Special tokens stand in it, unless skip_special_tokens, but for the
    end-of-turn token. The message that the server parsed is state["message"].

    An environment that answers has a play(say, completion, answer, **info), which goes on from the
    first completion: say(messages) sends messages of the environment, with images or without, and
    returns the policy's next completion; with say(messages, anew=True) the policy sees these alone,
    and nothing of what was said before. say is a Conversation: say.finish_reason tells whether the
    last completion was cut. Rewards are then given the messages after the prompt, and what play
    returned, a dict or None, as further info. The conversation ends where play does, or in a say()
    for which no turn (max_turns) or no room (max_model_len) is left.

    Where rewards need all conversations of a group, compare(found) is given what their plays
    returned, those that failed left out, and returns the further info of each, in this order.
    """
    train: Sequence[dict]
    eval: Sequence[dict]
    rewards: Sequence[Callable[..., float]]
    weights: Sequence[float] | None = None  # 1 each
    skip_special_tokens: bool = False       # in the text that rewards are given
    play: Callable[..., dict | None] | None = None
    compare: Callable[[list[dict]], list[dict]] | None = None
    tools: Sequence[dict] = ()              # that chat templates show, in OpenAI's form; play
                                            # finds the calls in the text of a completion

    def __post_init__(self):
        names = {getattr(reward, "__name__", None) for reward in self.rewards} - {None}
        weights = self.weights or [1.0] * len(self.rewards)
        if len(names) != len(self.rewards) or len(weights) != len(self.rewards):
            raise ValueError(f"each reward needs a __name__ of its own, and a weight: {names}")


@dataclass
class Reply:
    """What an environment said between two completions."""
    start: int                # its tokens are completion_ids[start:end]
    end: int
    images: list[Image.Image]
    encoded: object           # what the adapter made of it


@dataclass
class Rollout:
    """One completion of one prompt, or one conversation from it, as sampled and scored.

    A conversation that began anew has a Rollout for each stretch, with the same reward.
    """
    prompt: list[dict]
    completion: str | list[dict]      # of a conversation: the messages after the prompt
    answer: str
    state: dict                       # the row; "image_url": its first image as a data URI;
                                      # "message": the completion as the server parsed it
    info: dict
    example_id: int                   # the group: all completions of one prompt share it
    reward: float
    metrics: dict[str, float]         # unweighted value of each reward function
    prompt_ids: list[int]             # image placeholders already expanded, by the server
    completion_ids: list[int]         # all after the prompt; with end-of-turn tokens, if sampled
    completion_logprobs: list[float]  # of completion_ids, at the sampling temperature; replies: 0
    finish_reason: str                # "stop" or "length"
    images: list[Image.Image]
    encoded: object = None            # what the adapter made of (prompt, images), if it was asked
    finished: float = 0.0             # time.perf_counter()
    completion_mask: list[int] | None = None  # 1 = sampled, 0 = of a reply; None: all were sampled
    completion_versions: list[int | None] | None = None  # the step whose weights sampled a token,
                                                         # where the server says so
    replies: list[Reply] = field(default_factory=list)

    def __post_init__(self):
        if self.completion_mask is None:
            self.completion_mask = [1] * len(self.completion_ids)
        if self.completion_versions is None:
            self.completion_versions = [None] * len(self.completion_ids)


@dataclass
class Failure:
    """A completion that there is none of, and why."""
    example_id: int
    error: BaseException

    def __str__(self) -> str:
        return f"example {self.example_id}: {describe(self.error)}"


@dataclass
class GenerateOutputs:
    """The rollouts of a step: a list for each field of Rollout, by attribute or by key.

    Stretches of one conversation stand side by side, and have the same number in `conversation`.
    """
    prompt: list[list[dict]] = field(default_factory=list)
    completion: list[str] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    state: list[dict] = field(default_factory=list)
    info: list[dict] = field(default_factory=list)
    example_id: list[int] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)  # by reward function
    prompt_ids: list[list[int]] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    completion_logprobs: list[list[float]] = field(default_factory=list)
    finish_reason: list[str] = field(default_factory=list)
    images: list[list[Image.Image]] = field(default_factory=list)
    encoded: list = field(default_factory=list)
    finished: list[float] = field(default_factory=list)
    completion_mask: list[list[int]] = field(default_factory=list)
    completion_versions: list[list[int | None]] = field(default_factory=list)
    replies: list[list[Reply]] = field(default_factory=list)
    conversation: list[int] = field(default_factory=list)  # a number; by default each has its own
    advantage: list[float] = field(default_factory=list)  # set by the trainer
    dropped: list[str] = field(default_factory=list)  # why some completions are missing
    weight_version: int = 0  # the step whose weights sampled these
    weight_owner: str = ""   # the trainer that had sent them

    def __post_init__(self):
        self.reward = [number(reward) for reward in self.reward]
        self.completion_mask = self.completion_mask or [[1] * len(ids) for ids in self.completion_ids]
        self.completion_versions = (self.completion_versions
                                    or [[None] * len(ids) for ids in self.completion_ids])
        self.replies = self.replies or [[] for _ in self.completion_ids]
        self.conversation = self.conversation or list(range(len(self.completion_ids)))

    @classmethod
    def from_rollouts(cls, rollouts: list[Rollout], dropped: Sequence[str] = ()):
        """At least one rollout; all of them scored by the same reward functions."""
        return cls.from_conversations([[rollout] for rollout in rollouts], dropped)

    @classmethod
    def from_conversations(cls, conversations: list[list[Rollout]], dropped: Sequence[str] = ()):
        """The same of conversations, each of which is a list of its stretches."""
        rollouts = [rollout for stretches in conversations for rollout in stretches]
        columns = {f.name: [getattr(rollout, f.name) for rollout in rollouts]
                   for f in fields(Rollout)}
        columns["metrics"] = {name: [rollout.metrics[name] for rollout in rollouts]
                              for name in rollouts[0].metrics}
        numbers = [number for number, stretches in enumerate(conversations) for _ in stretches]
        return cls(**columns, conversation=numbers, dropped=list(dropped))

    def first_rows(self) -> list[int]:
        """The first row of each conversation; most conversations have one row."""
        return [row for row, number in enumerate(self.conversation)
                if row == 0 or number != self.conversation[row - 1]]

    def places(self) -> list[int]:
        """Of each row, the place of its conversation in first_rows()."""
        return numbered(self.conversation)

    def means(self, prefix: str = "") -> dict[str, float]:
        """Over conversations, of the reward and of each reward function, whose names get the prefix."""
        rows, columns = self.first_rows(), {"reward": self.reward}
        for name, values in self.metrics.items():
            columns[prefix + name] = values
        return {name: sum(values[row] for row in rows) / len(rows)
                for name, values in columns.items()}

    def staleness(self, step: int) -> list[int]:
        """By how many steps the policy that sampled each token is older than that of this step.

        Where the server does not say it, at most as many as when the first request began.
        """
        ages = []
        for mask, versions in zip(self.completion_mask, self.completion_versions, strict=True):
            for sampled, version in zip(mask, versions, strict=True):
                if sampled:
                    ages.append(step - (self.weight_version if version is None else version))
        return ages or [0]

    def groups(self) -> list[int]:
        """Each completion's group by a number: equal where the example_id is, of whatever type."""
        return numbered(self.example_id)

    def __getitem__(self, name: str):
        return getattr(self, name)

    def __len__(self) -> int:
        return len(self.completion_ids)


def numbered(names: list) -> list[int]:
    """Each name by a number, from 0 in the order of their first place; equal ones alike.

    >>> numbered(["b", "a", "b"])
    [0, 1, 0]
    """
    numbers = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


def load_environment(env_id: str, args: dict) -> Environment:
    """Call my_env.load_environment(**args), or envs.my_env's; ValueError says what is wrong."""
    try:
        with stop_signals_kept():
            environment = find_loader(env_id)(**args)
        if is_of_verifiers(environment):
            from support import verifiers_classic
            environment = Environment(**verifiers_classic.bridge(environment))
        if not isinstance(environment, Environment) or not len(environment.train):
            raise ValueError("load_environment() must return an Environment with rows in train, "
                             f"not {environment!r:.99}")
        return environment
    except (TypeError, ValueError) as error:
        raise ValueError(f"environment {env_id!r}: {plain(str(error))}") from error


def find_loader(env_id: str) -> Callable[..., Environment]:
    """The load_environment of the module that an environment's id names."""
    name = Path(env_id).stem.replace("-", "_")
    for module_name in (name, f"envs.{name}"):
        if importlib.util.find_spec(module_name):
            try:
                module = importlib.import_module(module_name)
            except (AttributeError, ImportError) as error:
                if "verifiers" not in str(error):
                    raise
                raise ValueError(f"{error}: environments of verifiers' classic API need verifiers "
                                 "0.3, those of verifiers.v1 verifiers 0.4") from error
            if hasattr(module, "load_environment"):
                return module.load_environment
    missing = (f"no load_environment() in a module {name!r} on sys.path "
               f"({sys.path[0] or '.'}, ...) or in envs/{name}.py")
    if importlib.util.find_spec("verifiers"):
        return functools.partial(load_taskset, env_id, missing)
    raise ValueError(f"{missing}; a package of the verifiers library needs that installed, too")


def load_taskset(env_id: str, missing: str, **args) -> Environment:
    """That of a package which has no load_environment(), but a taskset of verifiers 0.4."""
    from support import verifiers_v1
    try:
        return Environment(**verifiers_v1.bridge(env_id, args))
    except (AttributeError, ModuleNotFoundError) as error:
        raise ValueError(f"{missing}; and no taskset of verifiers: {error}") from error


def is_of_verifiers(environment) -> bool:
    """Whether an object is an environment of verifiers' classic API."""
    return any(kind.__module__.startswith("verifiers.") for kind in type(environment).__mro__)


@dataclass(frozen=True)
class Job:
    """n completions of one row, the first sampled with this seed, the next with seed + 1."""
    rows: Sequence[dict]
    index: int
    n: int
    seed: int
    trained: bool = True  # else the prompt need not be encoded


@dataclass(frozen=True)
class Pending:
    """Jobs that are under way."""
    jobs: list[Job]
    results: list[AsyncResult]  # of each, when it is sampled: what Generator.group returns


@dataclass
class Stretch:
    """A part of a conversation from which nothing is taken back: what is trained as one row.

    Completions stay as they were sampled, and all else as it was served: nothing is rendered or
    tokenised again. `messages` says the same to environments.
    """
    prompt: list[dict]
    images: list[Image.Image]  # of the prompt
    encoded: object            # what the adapter made of it
    prompt_ids: list[int]      # as served: an image is all of its tokens
    asked: list[int]           # all that was said, as the server is asked: an image is one token
    shown: list[dict]          # all images so far, as the server was sent them
    messages: list[dict] = field(default_factory=list)
    completion_ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    finish_reason: str = ""

    def __post_init__(self):
        self.messages = list(self.prompt)
        self.asked = list(self.asked)  # the conversations of a group begin with the same one

    def hear(self, choice: dict, text: str) -> None:
        """Add a completion."""
        ids = choice["token_ids"]
        self.completion_ids += ids
        self.mask += [1] * len(ids)
        self.logprobs += logprobs_of(choice)
        versions = [None] * len(ids)
        for span in choice.get("weight_versions") or ():  # of vLLM's route for token ids alone
            for place in range(span["start"], span["end"]):
                versions[place] = step_of(span["version"])
        self.versions += versions
        self.asked += ids
        self.finish_reason = choice["finish_reason"]
        self.messages.append({"role": "assistant", "content": text})

    def add_reply(self, messages: list[dict], images: list, encoded: dict, ids: list[int]) -> None:
        """Add what the environment said; the ids are the served ones."""
        start = len(self.completion_ids)
        self.replies.append(Reply(start, start + len(ids), images, encoded))
        self.completion_ids += ids
        self.mask += [0] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.versions += [None] * len(ids)
        self.messages += messages

    def fields(self) -> dict:
        """Those of a Rollout."""
        return {"prompt": self.prompt, "images": self.images, "encoded": self.encoded,
                "prompt_ids": self.prompt_ids, "completion": self.messages[len(self.prompt):],
                "completion_ids": self.completion_ids, "completion_mask": self.mask,
                "completion_logprobs": self.logprobs, "completion_versions": self.versions,
                "replies": self.replies, "finish_reason": self.finish_reason}


class Conversation:
    """A rollout of several turns, recorded as token ids, in one stretch or several."""

    def __init__(self, generator: "Generator", first: Stretch, choice: dict, seed: int):
        self.generator, self.adapter, self.seed = generator, generator.adapter, seed
        self.stretches = [first]
        self.turns = 0
        self.hear(choice)

    @property
    def said(self) -> list[dict]:
        """All messages after the first prompt."""
        first, *later = self.stretches
        return sum((stretch.messages for stretch in later), first.messages[len(first.prompt):])

    @property
    def finish_reason(self) -> str:
        """Of the last completion: "stop", or "length" if it was cut."""
        return self.stretches[-1].finish_reason

    def hear(self, choice: dict) -> str:
        """Add a completion; its text."""
        text = self.generator.text(choice)
        self.num_tokens = len(choice["token_ids"])  # of the last completion
        self.stretches[-1].hear(choice, text)
        self.turns += 1
        return text

    def say(self, messages: list[dict], anew: bool = False) -> str:
        """The policy's completion after these messages; ConversationOver if there cannot be one.

        With anew they are all that the policy sees: another stretch begins.
        """
        generator, last = self.generator, self.stretches[-1]
        if self.turns == generator.config.max_turns:
            raise ConversationOver(f"max_turns = {self.turns}")
        messages = clean_prompt(messages, reserved=generator.reserved)
        rendered, images = render_prompt(messages)
        new_images = image_parts(rendered)
        history, known, asked, shown = [], [], [], []
        if not anew:
            history, asked, shown = last.messages, last.asked, last.shown
            known = last.prompt_ids + last.completion_ids
        text = self.adapter.render(messages, history)
        encoded = generator.encoders.apply(self.adapter.encode_text, (text, images))
        length = len(known) + encoded["input_ids"].shape[1] + generator.config.max_tokens
        if length > generator.max_model_len:
            raise ConversationOver(f"{length} tokens, max_model_len {generator.max_model_len}")
        ids = self.adapter.token_ids(text)
        if asked and asked[-1] == ids[0]:  # the end of the turn, which the policy itself sampled
            ids = ids[1:]
        asked = asked + ids
        with without_limit():  # of the environment's time
            reply = generator.generate(asked, shown, new_images, self.seed, self.turns)
        # Nothing may be changed of what was served before, nor an image be left out of it.
        served = reply["prompt_token_ids"]
        shown = shown + new_images
        placed = len((reply.get("mm_placeholders") or {}).get("image", ()))
        if served[:len(known)] != known or placed != len(shown):
            raise ValueError(f"turn {self.turns + 1}: the server read the conversation otherwise, "
                             f"with {placed} of {len(shown)} images")
        new = served[len(known):]
        encoded = self.adapter.as_served(encoded, new, is_reply=not anew)
        if anew:
            self.stretches.append(Stretch(messages, images, encoded, new, asked, shown))
        else:
            last.add_reply(messages, images, encoded, new)
            last.asked, last.shown = asked, shown
        return self.hear(reply["choices"][0])

    __call__ = say


@functools.lru_cache(maxsize=2)
def shuffled(length: int, seed: str) -> list[int]:
    """The order of an epoch."""
    order = list(range(length))
    random.Random(seed).shuffle(order)
    return order


class Generator:
    """Rolls out an environment's prompts on a vLLM OpenAI server, one request per prompt.

    config: MultimodalRLConfig; banned: token ids never sampled; adapter: a MultimodalAdapter with a
    processor, which encodes each prompt and reply while others are still being sampled; decode(ids,
    skip_special_tokens=...) is that of the tokenizer; reserved: strings that no text may hold,
    because the model reads them as images.
    """

    def __init__(self, environment: Environment, config, banned: list[int] = (), adapter=None,
                 decode: Callable | None = None, reserved: Sequence[str] = ()):
        if environment and environment.play and adapter is None:
            raise ValueError("an environment with play() needs an adapter that has a processor")
        self.environment, self.config, self.adapter = environment, config, adapter
        self.decode, self.reserved = decode, reserved
        self.url = config.url
        self.pool = ThreadPool(config.max_concurrent)  # daemons: a hung request keeps nobody here
        atexit.register(self.pool.terminate)
        self.encoders = encoding_pool()
        model = self.call("v1/models", method="get")["data"][0]
        self.max_model_len = model.get("max_model_len", math.inf)
        # The sampling distribution must be the softmax that the trainer differentiates. By itself
        # the server applies the model's generation_config.json (top_k=1 in Qwen2-VL's), and what
        # its own flags say: so all that it knows is set here.
        self.sampling = {"temperature": config.temperature, "top_p": 1.0, "top_k": -1,
                         "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
                         "frequency_penalty": 0.0, "min_tokens": 0, "watermarking": False,
                         "max_tokens": config.max_tokens,
                         "logit_bias": {str(i): -100 for i in banned}}
        self.chat = {"model": model["id"], "return_token_ids": True, "logprobs": True,
                     "chat_template_kwargs": template_options(config.inference_args)}
        if environment and adapter:
            adapter.tools = environment.tools
        if environment and environment.tools:  # shown; calls are not for the server to find
            self.chat |= {"tools": list(environment.tools), "tool_choice": "none"}

    def call(self, route: str, body: dict | None = None, method: str = "post") -> dict:
        return call(f"{self.url}/{route}", body, method, timeout=self.config.generation_timeout)

    def begin(self, step: int, num_prompts: int, group_size: int) -> Pending:
        """Start sampling the prompts of a step, group_size times each, from shuffled epochs."""
        rows, seed = self.environment.train, self.config.seed
        jobs = []
        for position in range(step * num_prompts, (step + 1) * num_prompts):
            epoch, place = divmod(position, len(rows))
            index = shuffled(len(rows), f"{seed}-{epoch}")[place]
            jobs.append(Job(rows, index, group_size, seed=position * group_size))
        return self.submit(jobs)

    def evaluate(self, n: int = 1) -> GenerateOutputs:
        """Every held-out row n times, at the training temperature, with seeds of its own."""
        rows = self.environment.eval
        jobs = [Job(rows, i, n, seed=2**39 + i * n, trained=False)
                for i in range(len(rows))]
        return self.collect(self.submit(jobs))

    def submit(self, jobs: list[Job]) -> Pending:
        return Pending(jobs, [self.pool.apply_async(self.group, (job,)) for job in jobs])

    def collect(self, pending: Pending) -> GenerateOutputs:
        """Wait for what did not fail; its `dropped` says why the rest did.

        ServerError if the server is lost or hangs, RuntimeError if more than max_dropped failed.
        """
        conversations, failures = [], []
        for job, result in zip(pending.jobs, pending.results, strict=True):
            for entry in self.finish(job, result):
                if isinstance(entry, Failure):
                    failures.append(entry)
                else:
                    conversations.append(entry)
        if any(isinstance(failure.error, requests.Timeout) for failure in failures):
            self.check_engine()
        share = len(failures) / (len(failures) + len(conversations))
        if not conversations or share > self.config.max_dropped:
            last = failures[-1]
            raise RuntimeError(
                f"{self.url}: {len(failures)} completions failed and {len(conversations)} did not "
                f"(see max_dropped); the last: {last}") from last.error
        dropped = [str(failure) for failure in failures]
        return GenerateOutputs.from_conversations(conversations, dropped)

    def check_engine(self) -> None:
        """ServerError if no token can be sampled, which the health route does not notice."""
        try:
            self.call("v1/completions", {"prompt": "a", "max_tokens": 1})
        except requests.Timeout as error:
            raise ServerError(f"{self.url} hangs: {error}") from error

    def finish(self, job: Job, result: AsyncResult) -> list[list[Rollout] | Failure]:
        """What became of each completion of a job: its stretches, or why there are none.

        Rewards that hang are given up generation_timeout after the completions were sampled.
        """
        group, error = [], ValueError("the server did not return it")
        try:
            group, scoring = result.get()
            # Of conversations each has a limit of its own.
            limit = math.inf if self.environment.play else self.config.generation_timeout
            scoring.result(limit, "reward", TIMEOUT_HINT)
        except ServerError:
            raise
        except Exception as raised:  # rows and images of an environment fail in any way
            error = raised
        group = list(group)  # a reward that hangs may add to it later
        return group + [Failure(job.index, error)] * (job.n - len(group))

    def group(self, job: Job) -> tuple[list[list[Rollout] | Failure], Task]:
        """Sample all completions of one prompt; (those that are scored so far, the scoring).

        What others wrote (rows, rewards) runs in threads of its own: if it hangs, the pool does not
        shrink.
        """
        reading = Task(lambda: self.read(job))
        row, messages, images = reading.result(self.config.generation_timeout, "row", TIMEOUT_HINT)
        # Sample i of a request gets its seed + i: neighbouring requests are n apart, none overlap.
        reply = self.call("v1/chat/completions", {
            **self.chat, **self.sampling, "messages": messages, "n": job.n,
            "seed": self.seed(job)})
        shown = image_parts(messages)
        shared = {"prompt": row["prompt"], "answer": row.get("answer", ""),
                  "example_id": job.index, "info": row.get("info") or {},
                  "state": {"image_url": shown[0]["url"] if shown else None, **row},
                  "images": images, "prompt_ids": reply["prompt_token_ids"], "encoded": None}
        group = []
        return group, Task(lambda: self.score_group(job, reply["choices"], shared, shown, group))

    def seed(self, job: Job) -> int:
        """That of the job's first completion."""
        return (self.config.seed << 40) + job.seed

    def read(self, job: Job) -> tuple[dict, list[dict], list[Image.Image]]:
        """The row with its prompt in one form, the messages in OpenAI form, and their images."""
        row = without_shared_images(dict(job.rows[job.index]))
        row["prompt"] = row_prompt(row, self.reserved)
        return row, *render_prompt(row["prompt"])

    def score_group(self, job: Job, choices: list[dict], shared: dict, shown: list[dict],
                    group: list) -> None:
        """Add each completion, or the conversation that begins with it, to the group, rewarded."""
        if self.adapter and job.trained:
            encoded = self.encoders.apply(
                self.adapter.encode, (shared["prompt"], shared["images"]))
            shared["encoded"] = self.adapter.as_served(encoded, shared["prompt_ids"])
        if self.environment.play is None:
            for choice in choices:
                group.append(self.score(lambda: self.answer(choice, shared), shared))
            return
        self.play_group(job, choices, shared, shown, group)

    def play_group(self, job: Job, choices: list[dict], shared: dict, shown: list[dict],
                   group: list) -> None:
        """Hold the conversations that begin with these completions, side by side."""
        begin = functools.partial(Stretch, shared["prompt"], shared["images"], shared["encoded"],
                                  shared["prompt_ids"], shown=shown, asked=self.adapter.token_ids(
                                      self.adapter.render(shared["prompt"])))
        talks, played = [], []
        for offset, choice in enumerate(choices):
            play = functools.partial(self.play, begin(), choice, shared, self.seed(job) + offset)
            if self.environment.compare is None:
                play = functools.partial(self.score, play, shared)
            talks.append(Task(play))
        for talk in talks:
            try:
                result = talk.result(self.config.generation_timeout, "reply", TIMEOUT_HINT)
            except ServerError:
                raise
            except Exception as error:  # a timeout, or what a play that is compared later raised
                result = Failure(job.index, error)
            if isinstance(result, tuple):
                played.append(result)
            else:
                group.append(result)
        if played:
            self.compare(played, shared, group)

    def compare(self, played: list[tuple], shared: dict, group: list) -> None:
        """Add conversations to the group that are rewarded beside each other alone."""
        comparing = Task(lambda: self.environment.compare([found for *_, found in played]))
        infos = comparing.result(self.config.generation_timeout, "group reward", TIMEOUT_HINT)
        for (said, stretches, _), info in zip(played, infos, strict=True):
            group.append(self.score(lambda: (said, stretches, info), shared))

    def answer(self, choice: dict, shared: dict) -> tuple[str, list[dict], dict]:
        """(a completion, the fields of its Rollout, no further info)."""
        text = self.text(choice)
        return text, [{"completion": text, "completion_ids": choice["token_ids"],
                       "completion_logprobs": logprobs_of(choice),
                       "finish_reason": choice["finish_reason"],
                       "state": {"message": choice["message"], **shared["state"]}}], {}

    def play(self, first: Stretch, choice: dict, shared: dict,
             seed: int) -> tuple[list[dict], list[dict], dict]:
        """(a conversation, the fields of its Rollouts, what the environment found in it)."""
        talk, found = Conversation(self, first, choice, seed), None
        with contextlib.suppress(ConversationOver):
            found = self.environment.play(talk, talk.said[0]["content"],
                                          copied(shared["answer"]), **copied(shared["info"]))
        return talk.said, [stretch.fields() for stretch in talk.stretches], found or {}

    def score(self, roll_out: Callable, shared: dict) -> list[Rollout] | Failure:
        """What roll_out() gives, with its reward; or why there is none."""
        try:
            completion, stretches, found = roll_out()
            info = {**shared["info"], **found}
            reward, metrics = scores(self.environment, completion, shared["answer"], info)
        except ServerError:
            raise
        except BaseException as error:  # what environments are made of can fail in any way
            return Failure(shared["example_id"], error)
        finished = time.perf_counter()
        return [Rollout(**{**shared, **fields, "info": info}, reward=reward, metrics=metrics,
                        finished=finished) for fields in stretches]

    def generate(self, token_ids: list[int], shown: list[dict], new: list[dict], seed: int,
                 turn: int) -> dict:
        """A later turn's completion, by token ids; like first turns, max_concurrent at a time.

        Images that the server was shown before are named, not sent: it keeps what it made of them.
        """
        seed = random.Random(f"{seed}-{turn}").getrandbits(62)
        body = {"token_ids": token_ids, "return_token_ids": True,
                "sampling_params": {**self.sampling, "logprobs": 0, "seed": seed}}
        named = [{**part, "url": None} for part in shown]
        try:
            return self.pool.apply(self.call, (GENERATE, {**body, "content_parts": named + new}))
        except Refusal as error:
            if error.status != 400 or not shown:
                raise
        # It may have forgotten one of them.
        return self.pool.apply(self.call, (GENERATE, {**body, "content_parts": shown + new}))

    def text(self, choice: dict) -> str:
        """What the policy said: its sampled ids without the token that ends a turn, decoded."""
        ids, reason = choice["token_ids"], choice["finish_reason"]
        if reason not in ("stop", "tool_calls", "length"):
            raise RuntimeError(f"the server broke it off ({reason})")
        if reason != "length":
            ids = ids[:-1]
        return self.decode(ids, skip_special_tokens=self.environment.skip_special_tokens)


def logprobs_of(choice: dict) -> list[float]:
    """Those of the sampled tokens."""
    return [token["logprob"] for token in choice["logprobs"]["content"]]
