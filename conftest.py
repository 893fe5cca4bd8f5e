"""What every test file shares: the tiny model, canned rollouts, and one vLLM server per session.

The server is started by the usual Python, in the background, when the tests have been collected;
those that need none run meanwhile. All other Python processes that the tests start, and that these
start, are forks of a process that has imported everything: see tests/processes.py.
"""
import contextlib
import os
import random
import socket
import sys
import tempfile
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train.py does, before torch

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.append(str(Path(__file__).parent / "tests"))  # as pytest does, for scripts that import this
import processes
from adapter import MultimodalAdapter
from loss import grpo_loss
from rollout import GenerateOutputs, Reply, Rollout
from support.config import MultimodalRLConfig, load_config
from support.owner import Lease
from sync import Server
from train import MultimodalGRPOTrainer

ROOT = Path(__file__).parent
TINY = str(ROOT / "models" / "tiny-qwen2-vl")
PYTHON = sys.executable  # the usual one; from the start of the session on, sys.executable forks


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def processes_with(word: str) -> list[str]:
    """Command lines of the running processes that mention the word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if word in command and "pytest" not in command:
            found.append(command)
    return found


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = random.Random(seed).randbytes(3 * width * height)
    return Image.frombytes("RGB", (width, height), pixels)


def canned(trainer, groups, seed=0) -> GenerateOutputs:
    """Rollouts without a server: groups = [(images, [completion length, ...], replies), ...].

    Replies, which may be left out, are the lists of images that an environment shows after the
    first completion and after further ones. The behavior logprobs are the model's own, but for a
    little noise.
    """
    rng, rollouts = random.Random(seed), []
    for example, (images, lengths, *replies) in enumerate(groups):
        prompt = [{"role": "user", "content": [{"type": "image", "image": i} for i in images]
                   + [{"type": "text", "text": "What color is the square? " * (1 + example % 2)}]}]
        ids = trainer.adapter.encode(prompt, images)["input_ids"][0].tolist()
        for i, length in enumerate(lengths):
            completion, mask, said = [], [], []
            for number, shown in enumerate([None, *sum(replies, [])]):
                if number > 0:
                    reply = canned_reply(trainer.adapter, prompt, shown, len(completion))
                    said.append(reply)
                    completion += reply.encoded["input_ids"][0].tolist()
                    mask += [0] * (reply.end - reply.start)
                completion += [rng.randrange(20, 250) for _ in range(length)]
                mask += [1] * length
            rollouts.append(Rollout(
                prompt=prompt, completion="x", answer="x", state={}, info={}, example_id=example,
                reward=float(i % 2 == example % 2), metrics={"accuracy": 0.0}, prompt_ids=ids,
                completion_ids=completion, completion_logprobs=[0.0] * len(completion),
                completion_mask=mask, replies=said, finish_reason="stop", images=images))
    outputs = GenerateOutputs.from_rollouts(rollouts)
    batch = trainer.build_batch(outputs)
    with torch.no_grad():
        logprobs, _ = trainer.policy(batch, share=False)
    for row, ids in enumerate(outputs.completion_ids):
        start = len(outputs.prompt_ids[row])
        exact = logprobs[row, start:start + len(ids)].tolist()
        outputs.completion_logprobs[row] = [p + rng.uniform(-0.1, 0.1) for p in exact]
    return outputs


def canned_reply(adapter, prompt: list[dict], images: list, start: int) -> Reply:
    """What an environment shows after a completion that ends at `start`."""
    history = [*prompt, {"role": "assistant", "content": "red"}]
    messages = [{"role": "user", "content": [{"type": "image", "image": i} for i in images]
                 + [{"type": "text", "text": "And now?"}]}]
    encoded = adapter.encode(messages, images, history)
    return Reply(start, start + encoded["input_ids"].shape[1], images, encoded)


def make_trainer(model_dir=TINY, **options) -> MultimodalGRPOTrainer:
    """A trainer on a fresh copy of the model, in fp32 on the CPU; no server, no environment."""
    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(model_dir)
    config = MultimodalRLConfig(**{
        "batch_size": 8, "rollouts_per_step": 2, "max_grad_norm": 1e9, **options})
    return MultimodalGRPOTrainer(model, processor.tokenizer, MultimodalAdapter(processor), config)


def gradients(trainer, outputs) -> dict[str, torch.Tensor]:
    """The gradient of one update's loss; the weights stay as they are."""
    class Keep:
        step = zero_grad = staticmethod(lambda: None)
        param_groups = [{}]

    optimizer, trainer.optimizer = trainer.optimizer, Keep
    trainer.update(outputs)
    trainer.optimizer = optimizer
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    optimizer.zero_grad()
    return found


def full_weights(policy) -> dict[str, torch.Tensor]:
    """Every weight of the model by its own name, whole, with adapters merged; on all ranks."""
    return {name: tensor for layer in policy.layers()
            for name, tensor in policy.gather(layer).items()}


def relative_difference(a: dict, b: dict) -> float:
    """|a - b| / |a| over all tensors together."""
    assert a.keys() == b.keys()
    return (sum((a[n] - b[n]).square().sum() for n in a)
            / sum(a[n].square().sum() for n in a)).sqrt().item()


def loss_of(ratios: list[float], advantage: float, **options) -> tuple[float, list, dict]:
    """(loss, gradient of each logprob, sums) of one completion whose tokens have these ratios."""
    behavior = torch.full((1, len(ratios)), -2.0)
    logprobs = (behavior + torch.tensor([ratios]).log()).requires_grad_()
    total, sums = grpo_loss(logprobs, torch.zeros_like(behavior), behavior,
                            torch.tensor([advantage]), torch.ones_like(behavior), len(ratios),
                            **MultimodalRLConfig(**options).loss_options())
    total.backward()
    return total.item(), logprobs.grad[0].tolist(), sums


def pytest_addoption(parser):
    parser.addoption("--all-families", action="store_true", help="a vLLM server for every family")


def pytest_sessionstart(session):
    stack = contextlib.ExitStack()
    session.config.add_cleanup(stack.close)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    sys.executable = stack.enter_context(processes.python(folder))


def pytest_collection_modifyitems(items):
    """Those that need the server come last: it needs a minute to start."""
    items.sort(key=lambda item: "server" in item.fixturenames)


@pytest.fixture(autouse=True)
def leases_end_with_the_test(monkeypatch):
    """A trainer that a test leaves behind in this process does not keep the server from others."""
    claimed, claim = [], Lease.claim

    def noted_claim(lease):
        claimed.append(lease)
        claim(lease)

    monkeypatch.setattr(Lease, "claim", noted_claim)
    yield
    for lease in claimed:
        lease.release()


@pytest.fixture(scope="session", autouse=True)
def starting_server(request, tmp_path_factory):
    """(config, what waits for its server) of the session; None if no test needs the server."""
    if not any("server" in item.fixturenames for item in request.session.items):
        yield None
        return
    config = load_config(str(ROOT / "config.toml"), [
        f"model={TINY}", f"output_dir={tmp_path_factory.mktemp('server')}",
        f"vllm_server_port={free_port()}", "eval_every_steps=0", "batch_size=32",
        "rollouts_per_step=4", "micro_batch_size=16"])
    server, pool = Server(config), ThreadPool(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", PYTHON)
        started = pool.apply_async(server.__enter__)
        while not (server.process or started.ready()):
            time.sleep(0.01)
    yield config, started.get
    server.stop()


@pytest.fixture(scope="session")
def server(starting_server):
    """The config of one real vLLM server with the tiny model, for all tests of the session."""
    config, wait = starting_server
    wait()
    return config
