"""Environments of verifiers that go wrong, share tools or rewards; each case is a line of JSON.

`python verifiers_cases.py PORT` runs in an environment of its own, that has verifiers; see
test_verifiers.py, which starts it and reads what it prints.
"""
import dataclasses
import importlib.metadata
import json
import signal
import sys

from conftest import ROOT, TINY, make_trainer
from rollout import Generator, load_environment
from support.config import load_config
from support.http import ServerError

CLASSIC = importlib.metadata.version("verifiers") < "0.4"
PLAIN_TEXT = Generator.text
CALL = 'I look. <tool_call>{"name": "look", "arguments": {"region": "top"}}</tool_call>'


def start(port: str):
    """The trainer of all cases, on the server that is up."""
    config = load_config(str(ROOT / "config.toml"), [
        f"model={TINY}", f"vllm_server_port={port}", "max_tokens=6", "rollouts_per_step=4",
        "batch_size=8", "micro_batch_size=8", "eval_every_steps=0", "env.id=of each case"])
    return make_trainer(**{**vars(config), "env_id": ""})


def roll_out(env_id: str, generation_timeout: float = 20, max_turns: int = 10, **args):
    """The outputs of four prompts, twice each."""
    TRAINER.config = dataclasses.replace(
        TRAINER.config, generation_timeout=generation_timeout, max_turns=max_turns)
    TRAINER.environment = load_environment(env_id, {"num_train": 4, **args})
    TRAINER.generator = None
    TRAINER.on_server(lambda: None)
    return TRAINER.generator.collect(TRAINER.generator.begin(0, 4, 2))


def say(case: str, outputs, **found) -> None:
    """Print what became of the case."""
    print(json.dumps({
        "case": case, "examples": sorted(outputs.example_id), "dropped": outputs.dropped,
        "reward": outputs.reward, "metrics": outputs.metrics,
        "turns": [len(replies) + 1 for replies in outputs.replies], **found}), flush=True)


def trained(outputs) -> float:
    """The mismatch KL of an update, between trainer and server."""
    kl = TRAINER.update(outputs)["kl"]
    TRAINER.send_weights()
    return kl


def other_version(module: str) -> None:
    """A package that needs another version of verifiers, or is none."""
    try:
        load_environment(module, {})
    except ValueError as error:
        print(json.dumps({"case": f"module {module}", "error": str(error)}), flush=True)


def fault(name: str, env_id: str, **args) -> None:
    say(name, roll_out(env_id, fault=name, **args))


def lost_server(env_id: str) -> None:
    """The server is gone in the second turn: ServerError, by which a trainer restores it."""
    def generate(*_):
        raise ServerError("gone")

    sample, Generator.generate = Generator.generate, generate
    try:
        roll_out(env_id)
    except ServerError as error:
        print(json.dumps({"case": "lost server", "error": str(error)}), flush=True)
    Generator.generate = sample


def group_rewards() -> None:
    outputs = roll_out("classic-colors", group=True)
    texts = [[message["content"].strip() for message in completion
              if message["role"] == "assistant"] for completion in outputs.completion]
    say("group", outputs, kl=trained(outputs), texts=texts, rows=outputs.example_id)


def empty(env_id: str) -> None:
    """Completions without a word are conversations like all others."""
    Generator.text = lambda generator, choice: ""
    say("empty", roll_out(env_id))
    Generator.text = PLAIN_TEXT


def tool_calls() -> None:
    """The first completion is taken for one that calls a tool, whatever was sampled."""
    import classic_colors
    def text(generator, choice):
        said = PLAIN_TEXT(generator, choice)
        if "message" in choice:  # the first turn is a chat completion, later ones are not
            return CALL
        return said

    Generator.text = text
    outputs = roll_out("classic-colors", tools=True)
    Generator.text = PLAIN_TEXT
    say("tools", outputs, kl=trained(outputs), looked=classic_colors.LOOKED,
        roles=[[message["role"] for message in said] for said in outputs.completion],
        replies=[said[1]["content"] for said in outputs.completion],
        shown=[tool["function"]["name"] for tool in TRAINER.adapter.tools])


if __name__ == "__main__":
    TRAINER = start(sys.argv[1])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    env_id = "classic-colors" if CLASSIC else "taskset-colors"
    for name in ("reward", "error", "image"):
        fault(name, env_id)
    fault("hangs", env_id, generation_timeout=3)
    say("max_turns", roll_out(env_id, max_turns=1))
    lost_server(env_id)
    empty(env_id)
    other_version("neither")
    if CLASSIC:
        fault("bug", env_id)
        outputs = roll_out(env_id, fault="rewrites")
        say("rewrites", outputs, kl=trained(outputs))
        say("timeout", roll_out(env_id, fault="hangs", timeout=1.0))
        group_rewards()
        tool_calls()
    else:
        other_version("classic")
    kept = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    print(json.dumps({"case": "signals", "kept": kept}), flush=True)
