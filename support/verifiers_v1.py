"""verifiers' API of 0.4, verifiers.v1: a Taskset of Tasks, and an Env whose run() drives an agent.

verifiers gives the agent, which is a program of its own, the address of a server, and answers its
requests by a client. The program is a few lines in this process, and the client is ours. Failures
are in the errors of an episode or of its trace; each of them drops the conversation.
"""
import asyncio
import atexit
import contextlib
import importlib.metadata
import itertools
import sys
import threading
from collections.abc import Callable

VERSION = importlib.metadata.version("verifiers")
if not VERSION.startswith("0.4."):
    raise ValueError(f"a taskset of verifiers.v1 needs verifiers 0.4, not {VERSION}")

import aiohttp
import verifiers.v1 as vf
import verifiers.v1.interception.server as interception
from verifiers.v1.clients.train import serialize_completion
from verifiers.v1.dialects.chat import message_to_wire

from support.messages import ConversationOver
from support.rewards import event_loop
from support.verifiers_bridge import Policy, Rows, reward_functions, to_messages

ADDRESS = "http://policy.invalid"  # that of our client; nothing is ever sent there
INFINITE = 1000                    # tasks of a taskset without end

# verifiers finds a harness by its id: as a module of that name, with one harness in its __all__.
HARNESS = "in-process"
sys.modules["in_process"] = sys.modules[__name__]
__all__ = ["InProcess"]


def bridge(env_id: str, args: dict) -> dict:
    """The fields of an Environment of ours, which runs the taskset env_id.

    args are those of the taskset, but for the keys of the environment's own config (agent,
    timeout, ...) and these: num_eval, how many of the first tasks are held out (0), and num_train,
    how many of the others are trained (all; of a taskset without end 1000).
    """
    args = dict(args)
    num_eval, num_train = args.pop("num_eval", 0), args.pop("num_train", None)
    environment = vf.load_environment(configuration(env_id, args))
    if num_train is None and environment.taskset.INFINITE:
        num_train = INFINITE
    count = None if num_train is None else num_eval + num_train
    tasks = list(itertools.islice(environment.taskset, count))
    names = []
    for task in tasks[:1]:  # all are of one type
        names = [function.__name__ for function in task.hooks("reward") + task.hooks("metric")]
    rewards, weights = reward_functions(names)
    return {"train": Rows(tasks[num_eval:], to_row), "eval": Rows(tasks[:num_eval], to_row),
            "rewards": rewards, "weights": weights, "play": Runner(environment).play}


def configuration(env_id: str, args: dict) -> vf.EnvConfig:
    """Of the environment; its agent is in this process, unless args or the package have another."""
    kind = vf.env_config_type(env_id)
    agents = [name for name, field in kind.model_fields.items()
              if isinstance(field.default, vf.AgentConfig)]
    if len(agents) != 1:
        raise ValueError(f"it has the agents {agents}; one can be trained")
    settings = {key: value for key, value in args.items() if key in kind.model_fields}
    others = {key: value for key, value in args.items() if key not in kind.model_fields}
    settings["taskset"] = {**settings.get("taskset", {}), **others, "id": env_id}
    agent = {"runtime": {"type": "subprocess"}}
    if vf.default_harness_id(env_id) == "bash":  # verifiers' own default: the package has none
        agent["harness"] = {"id": HARNESS}
    settings[agents[0]] = {**agent, **settings.get(agents[0], {})}
    return vf.resolve_env_config(settings)


def to_row(task: vf.Task) -> dict:
    return {"prompt": first_messages(task.data.system_prompt, task.data.prompt),
            "answer": str(getattr(task.data, "answer", "")), "info": {"task": task}}


def first_messages(system: str | None, prompt) -> list[dict]:
    """The messages with which a conversation begins."""
    if prompt is None:
        raise ValueError("the task has no prompt: an environment that begins the conversation in "
                         "its run() cannot be trained yet")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = to_messages(prompt)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    return messages


class Runner:
    """Conversations, run and scored by the code of an environment."""

    def __init__(self, environment: vf.Env):
        self.environment, self.client = environment, PolicyClient()
        self.lock, self.loop = threading.Lock(), None
        self.context = vf.ModelContext(model="policy", client=vf.EvalClientConfig(
            base_url=ADDRESS, api_key_var="NONE"))

    def play(self, say: Callable, completion: str, answer: str, task: vf.Task) -> dict:
        self.serve()
        prompt = first_messages(task.data.system_prompt, task.data.prompt)
        policy = Policy(say, completion, prompt)
        return policy.run(self.roll_out(task, policy), self.loop)

    def serve(self) -> None:
        """Start what the environment needs to be up, with the first conversation in a loop.

        It is another loop if something has held up the last one.
        """
        with self.lock:
            loop = event_loop()
            if self.loop is not loop:
                use_client(self.client)
                serving = self.environment.serving()
                asyncio.run_coroutine_threadsafe(serving.__aenter__(), loop).result()
                self.loop = loop
                atexit.register(stop, serving, loop)

    async def roll_out(self, task: vf.Task, policy: Policy) -> dict:
        """The score of one episode."""
        def begin(trace: vf.Trace) -> None:
            self.client.policies[trace.id] = policy
            traces.append(trace)

        traces = []
        try:
            episode = await self.environment.run_episode(task, self.context, on_trace=begin)
        finally:
            for trace in traces:
                del self.client.policies[trace.id]
        check(episode)
        trace = episode.traces[-1]
        rewards = {name: reward.score for name, reward in trace.rewards.items() if reward}
        return {"score": {"reward": trace.reward, "metrics": {**rewards, **trace.metrics}}}


def check(episode: vf.Episode) -> None:
    """Raise what went wrong in an episode."""
    for part in (*episode.traces, episode):
        if part.is_timeout:
            raise TimeoutError("a timeout of the environment is over")
        if not part.ok:
            errors = [f"{error.type}: {error.message}" for error in part.errors]
            raise RuntimeError("; ".join(errors) or "the episode has failed without a word")
    if len(episode.traces) != 1:
        raise ValueError(f"{len(episode.traces)} conversations in an episode; one can be trained")


def stop(serving, loop: asyncio.AbstractEventLoop) -> None:
    """At the end of the process, for servers of tools that run in others."""
    closing = asyncio.run_coroutine_threadsafe(serving.__aexit__(None, None, None), loop)
    with contextlib.suppress(Exception):  # nobody is left to whom it matters
        closing.result(timeout=10)


def use_client(client: vf.Client) -> None:
    """Let verifiers' server answer the requests for ADDRESS by this client."""
    resolve = interception.resolve_client

    def resolve_client(config: vf.BaseClientConfig) -> vf.Client:
        return client if config.base_url == ADDRESS else resolve(config)

    interception.resolve_client = resolve_client


class PolicyClient(vf.Client):
    """The client of all conversations, each known by its trace."""

    def __init__(self):
        self.policies = {}

    async def get_response(self, dialect, body, sampling, session_id=None, turn=None,
                           headers=None) -> vf.Response:
        """The policy's next completion; how it is sampled is the trainer's business."""
        messages = [message_to_wire(message) for message in turn.prompt]
        tools = [tool.model_dump() for tool in turn.tools or ()]
        try:
            answer = await self.policies[turn.trace.id].ask(messages, tools)
        except ConversationOver:  # an end like that by verifiers' own limits: it is scored
            turn.trace.stop("context_length")
            raise
        response = vf.Response(
            id="", created=0, model=body["model"], finish_reason=answer.finish_reason,
            message=vf.AssistantMessage(content=answer.text),
            usage=vf.Usage(prompt_tokens=answer.prompt_tokens,
                           completion_tokens=answer.completion_tokens))
        response.raw = serialize_completion(response, body["model"])
        return response


class InProcessConfig(vf.HarnessConfig):
    """Nothing but what every harness has."""


class InProcess(vf.Harness[InProcessConfig]):
    """An agent that says what the model says. verifiers' own starts a process for each turn."""
    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls,
                     data) -> vf.ProgramResult:
        messages = first_messages(*self.resolve_prompt(data))
        without_limit = aiohttp.ClientTimeout(total=None)  # the play has one
        async with aiohttp.ClientSession(timeout=without_limit) as session, session.post(
                f"{endpoint}/chat/completions", headers={"Authorization": f"Bearer {secret}"},
                json={"model": ctx.model, "messages": messages}) as response:
            return vf.ProgramResult(int(not response.ok), "", await response.text())
