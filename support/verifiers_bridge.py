"""What both APIs of the verifiers library need, to run their environments on our conversations.

verifiers' own code drives a rollout: its turns, tools and rewards. Where it would send a request to
a model server, it calls a client of ours (in verifiers_classic.py and verifiers_v1.py), and that
asks a Policy. A Policy answers the first request with the completion that was sampled for the whole
group, and every later one by say(): token ids and logprobs stay as they were sampled.
"""
import asyncio
import json
import queue
import re
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from support.messages import ConversationOver
from support.text import describe

# As vLLM's parser "hermes" reads calls. The last one may lack its end, where max_tokens cut it.
TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


@dataclass
class ToolCall:
    id: str
    name: str
    arguments: str  # JSON


@dataclass
class Answer:
    """A completion of the policy."""
    text: str                  # without the tool calls
    tool_calls: list[ToolCall]
    finish_reason: str         # "stop", "length" or "tool_calls"
    prompt_tokens: int
    completion_tokens: int


class Policy:
    """The policy in one conversation, for code that hands over all messages at each turn.

    say is the Conversation, `completion` the first thing that the policy says in it. verifiers runs
    in an event loop that many conversations share; the thread of the play waits in run() and
    answers from there, so that the play's limit of time is counted as for any other.
    """

    def __init__(self, say: Callable, completion: str, prompt: list, tools: list[dict] = ()):
        self.say, self.completion = say, completion
        self.tools = list(tools)           # that the prompt shows, in OpenAI's form
        self.known = to_messages(prompt)   # all that was said, as the environment has it
        self.turns = 0                     # completions
        self.error = None                  # the first one of a turn
        self.questions = queue.SimpleQueue()

    def run(self, rollout: Coroutine, loop: asyncio.AbstractEventLoop):
        """What the rollout returns; the error of a turn, if one failed, whatever became of it."""
        running = asyncio.run_coroutine_threadsafe(rollout, loop)
        running.add_done_callback(lambda _: self.questions.put(None))
        while (question := self.questions.get()) is not None:
            messages, tools, answer = question
            try:
                answer.set_result(self.answer(to_messages(messages), tools))
            except ConversationOver as end:  # an end like any other: what was said is scored
                answer.set_exception(end)
            except Exception as error:
                self.error = self.error or error
                answer.set_exception(error)
        if self.error is not None:
            raise self.error
        result = running.result()
        if self.turns == 0:
            raise ValueError("the environment asked for no completion")
        return result

    async def ask(self, messages: list, tools: list[dict] = ()) -> Answer:
        """The next completion of a conversation, from the thread that waits in run().

        ConversationOver if there is no turn or no room left for it.
        """
        answer = Future()
        self.questions.put((messages, list(tools), answer))
        return await asyncio.wrap_future(answer)

    def answer(self, messages: list[dict], tools: list[dict]) -> Answer:
        if tools != self.tools:
            raise ValueError(f"turn {self.turns + 1}: the environment offers other tools than its "
                             f"prompts show: {tools!r:.200}, not {self.tools!r:.200}")
        text = self.next_text(messages)
        self.turns += 1
        calls = []
        if self.tools:
            text, calls = find_tool_calls(text, self.turns)
        self.known = [*messages, {"role": "assistant", "content": text}]
        stretch, sampled = self.say.stretches[-1], self.say.num_tokens
        return Answer(text, calls, "tool_calls" if calls else self.say.finish_reason,
                      len(stretch.prompt_ids) + len(stretch.completion_ids) - sampled, sampled)

    def next_text(self, messages: list[dict]) -> str:
        """What the policy says after these messages.

        If they are not those that are known and new ones, the environment has rewritten what was
        said before, and the policy begins anew with all of them.
        """
        count = len(self.known)
        goes_on = [gist(message) for message in messages[:count]] == [gist(m) for m in self.known]
        if self.turns > 0 and goes_on and len(messages) > count:
            return self.say(messages[count:])
        if self.turns > 0:
            return self.say(messages, anew=True)
        if not goes_on or len(messages) > count:
            raise ValueError("the environment sends another prompt than that of its data set")
        return self.completion


class Rows(Sequence):
    """The entries of a data set of verifiers, each turned into a row when it is asked for."""

    def __init__(self, entries: Sequence, to_row: Callable[[object], dict]):
        self.entries, self.to_row = entries, to_row

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict:
        return self.to_row(self.entries[index])


def find_tool_calls(text: str, turn: int) -> tuple[str, list[ToolCall]]:
    """(the text before them, the calls); all of the text and no calls, if one is no valid JSON.

    >>> find_tool_calls('Hm. <tool_call>{"name": "zoom", "arguments": {"x": 1}}</tool_call>', 2)
    ('Hm. ', [ToolCall(id='call-2-0', name='zoom', arguments='{"x": 1}')])
    """
    calls = []
    try:
        for number, body in enumerate(TOOL_CALL.findall(text)):
            call = json.loads(body)
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            calls.append(ToolCall(f"call-{turn}-{number}", str(call["name"]), arguments))
    except (ValueError, KeyError, TypeError):
        return text, []
    return text.partition("<tool_call>")[0], calls


def to_messages(messages: list) -> list[dict]:
    """Chat messages as dicts, whether verifiers has them as these or as objects of its own."""
    return [message if isinstance(message, dict) else message.model_dump(exclude_none=True)
            for message in messages]


def gist(message: dict) -> tuple[str, list[str]]:
    """Who says what, by which two messages are compared, in whatever form they are."""
    content = message.get("content") or []
    if isinstance(content, str):
        content = [content]
    said = []
    for part in content:
        if isinstance(part, dict):
            part = part.get("text") or part.get("image_url") or part.get("image")
        said.append(part["url"] if isinstance(part, dict) else part)
    return message["role"], [part for part in said if part]


def reward_functions(names: list[str]) -> tuple[list[Callable], list[float]]:
    """(functions, weights) that report what verifiers has found: its reward, and its metrics."""
    def verifiers(completion, answer, score, **info) -> float:
        return score["reward"]

    def reporter(name: str) -> Callable:
        def report(completion, answer, score, **info) -> float:
            return score["metrics"].get(name) or 0.0
        report.__name__ = name
        return report

    names = [name for name in dict.fromkeys(names) if name != "verifiers"]
    return [verifiers, *map(reporter, names)], [1.0] + [0.0] * len(names)


def causes(error: BaseException) -> str:
    """An error and those behind it, as verifiers' own are often without a word."""
    said = [describe(error)]
    while (error := error.__cause__ or error.__context__) is not None:
        said.append(describe(error))
    return ", by ".join(said)
