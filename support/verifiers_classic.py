"""verifiers' classic API, in its versions up to 0.3.1: vf.Environment, whose rollout() drives.

verifiers takes failures for a reward of 0: a reward function that raises, a timeout, an error of a
tool or of the model. Here each of them is an error, by which the conversation is dropped.
"""
import asyncio
import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator

try:
    import verifiers as vf
    from verifiers.clients import Client
    from verifiers.types import Response, ResponseMessage, ToolCall, Usage
except ImportError as error:
    raise ValueError("an environment of verifiers' classic API needs one of its last versions, as "
                     f"0.3.1 is, not {importlib.metadata.version('verifiers')}: {error}") from error

from support.messages import ConversationOver
from support.rewards import event_loop
from support.text import describe
from support.verifiers_bridge import Policy, Rows, causes, reward_functions, to_messages


class RewardError(BaseException):
    """A reward function raised. Not an Exception, which verifiers would turn into a reward of 0."""


def bridge(environment: vf.Environment) -> dict:
    """The fields of an Environment of ours, which runs this one."""
    names = []
    for rubric in all_rubrics(environment.rubric):
        names += [function.__name__ for function in rubric.funcs]
        rubric.funcs[:] = [raising(function, rubric) for function in rubric.funcs]
    rewards, weights = reward_functions(names)
    runner = Runner(environment)
    held_out = environment.build_eval_dataset() or []  # None if there is no such split
    return {"train": Rows(environment.get_dataset(), to_row), "eval": Rows(held_out, to_row),
            "rewards": rewards, "weights": weights, "play": runner.play, "tools": runner.tools,
            "compare": runner.compare if environment.rubric.has_group_rewards else None}


def all_rubrics(rubric: vf.Rubric) -> Iterator[vf.Rubric]:
    """This one and those that it groups."""
    yield rubric
    for member in getattr(rubric, "rubrics", ()):
        yield from all_rubrics(member)


def raising(function: Callable, rubric: vf.Rubric) -> Callable:
    """The reward function, with errors that verifiers does not take for a reward of 0."""
    is_group = rubric._is_group_func(function)

    @functools.wraps(function)  # verifiers reads from the signature what it wants to be given
    async def call(*args, **kwargs):
        try:
            value = function(*args, **kwargs)
            if inspect.isawaitable(value):
                value = await value
            return value if is_group else float(value)
        except Exception as error:
            raise RewardError(f"{function.__name__}: {describe(error)}") from error

    return call


def to_row(entry: dict) -> dict:
    """A row of ours; what a rollout of verifiers begins with is in its info."""
    return {"prompt": to_messages(entry["prompt"]), "answer": entry.get("answer") or "",
            "info": {"input": dict(entry)}}


class Runner:
    """Conversations, run and scored by the code of an environment."""

    def __init__(self, environment: vf.Environment):
        self.environment, self.rubric = environment, environment.rubric
        self.tools = to_tools(environment.tool_defs)

    def play(self, say: Callable, completion: str, answer: str, input: dict) -> dict:
        policy = Policy(say, completion, input["prompt"], self.tools)
        return policy.run(self.roll_out(input, PolicyClient(policy)), event_loop())

    async def roll_out(self, input: dict, client: Client) -> dict:
        """The score; or the state, if it can only be scored together with the others."""
        state = await self.environment.rollout(input, client, "policy", {})
        if state.get("error") is not None:
            raise RuntimeError(causes(state["error"]))
        if state.get("timed_out") or state.get("stop_condition") == "timeout_reached":
            raise TimeoutError("the environment's timeout_seconds are over")
        if self.rubric.has_group_rewards:
            return {"state": state}
        await self.rubric.score_rollout(state)
        await self.rubric.cleanup(state)
        return score(state)

    def compare(self, found: list[dict]) -> list[dict]:
        """The scores of all rollouts of a group, by rewards that see them together."""
        scoring = self.score_group([entry["state"] for entry in found])
        return asyncio.run_coroutine_threadsafe(scoring, event_loop()).result()

    async def score_group(self, states: list[vf.State]) -> list[dict]:
        await self.rubric.score_group(states)
        for state in states:
            await self.rubric.cleanup(state)
        return [score(state) for state in states]


def score(state: vf.State) -> dict:
    return {"score": {"reward": state["reward"], "metrics": state["metrics"] or {}}}


def to_tools(tool_defs: list | None) -> list[dict]:
    """Tools in OpenAI's form."""
    return [{"type": "function", "function": {
                "name": tool.name, "description": tool.description, "parameters": tool.parameters}}
            for tool in tool_defs or ()]


class PolicyClient(Client):
    """The client of one rollout. It has no server, and so nothing to translate or to close."""
    setup_client = to_native_tool = to_native_prompt = get_native_response = None
    raise_from_native_response = from_native_response = close = None

    def __init__(self, policy: Policy):
        super().__init__(None)
        self.policy = policy

    async def get_response(self, prompt: list, model: str, sampling_args: dict, tools=None,
                           **kwargs) -> Response:
        """The policy's next completion; how it is sampled is the trainer's business."""
        try:
            answer = await self.policy.ask(prompt, to_tools(tools))
        except ConversationOver as end:  # verifiers stops there, and scores what was said
            raise vf.OverlongPromptError(str(end)) from end
        calls = [ToolCall(id=call.id, name=call.name, arguments=call.arguments)
                 for call in answer.tool_calls]
        return Response(
            id="", created=0, model=model,
            usage=Usage(prompt_tokens=answer.prompt_tokens, reasoning_tokens=0,
                        completion_tokens=answer.completion_tokens,
                        total_tokens=answer.prompt_tokens + answer.completion_tokens),
            message=ResponseMessage(
                content=answer.text, tool_calls=calls or None, finish_reason=answer.finish_reason,
                is_truncated=answer.finish_reason == "length"))
