"""Faults, each caused for real: killed servers and trainers, hung engines, bad data and numbers."""
import contextlib
import dataclasses
import io
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

import processes
import sync
from conftest import ROOT, canned, free_port, make_trainer, noise
from rollout import Environment, Generator, Job
from support import check
from support.checkpoint import checksums, is_whole
from support.http import is_healthy
from support.images import load_image
from test_runs import metrics
from train import served

CLOCKS = ("seconds", "tokens_per_second")  # differ from run to run, as nothing else does


def timeless(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines]


def command(config, **options) -> list[str]:
    """`python train.py` as the config says, on the server that is up."""
    words = [f"{f.name}={getattr(config, f.name)}" for f in dataclasses.fields(config)
             if f.name in ("model", "vllm_server_port", "batch_size", "rollouts_per_step",
                           "micro_batch_size", "output_dir", "eval_every_steps")]
    return [sys.executable, "train.py", "@", str(ROOT / "config.toml"), *words,
            *(f"{key}={value}" for key, value in options.items())]


@contextlib.contextmanager
def running(words: list[str], **options):
    """A process that does not outlive the test, whatever happens."""
    process = subprocess.Popen(words, cwd=ROOT, **options)
    try:
        yield process
    finally:
        processes.kill(process)
        process.wait()


def wait_for_lines(path: Path, count: int, run: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.02)


# ---- resume

def test_a_killed_run_goes_on_bit_for_bit(server, tmp_path):
    """6 steps at once == 3 steps, SIGKILL, 3 steps: metrics and weights."""
    config = dataclasses.replace(server, output_dir=str(tmp_path), eval_every_steps=2)
    options = dict(save_every_steps=3, warmup_steps=4, weight_decay=0.1, max_steps=6)
    subprocess.run(command(config, run_name="straight", **options), cwd=ROOT, check=True,
                   timeout=120)
    folder = tmp_path / "killed"
    with running(command(config, run_name="killed", **options)) as run:
        wait_for_lines(folder / "metrics.jsonl", 6, run)  # past the checkpoint, which has 5
    assert is_whole(folder / "checkpoint-3") and not (folder / "checkpoint-6").exists()
    subprocess.run(command(config, run_name="killed", resume="true", **options), cwd=ROOT,
                   check=True, timeout=120)
    straight, killed = (timeless(metrics(dataclasses.replace(config, run_name=name)))
                        for name in ("straight", "killed"))
    assert [line["step"] for line in straight] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert straight == killed
    one, other = (tmp_path / run / "checkpoint-6" for run in ("straight", "killed"))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    one, other = (torch.load(path / "trainer.pt", weights_only=True) for path in (one, other))
    for i, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(moments[k], other["optimizer"]["state"][i][k]) for k in moments)
    assert torch.equal(one["torch"], other["torch"])
    for name in ("step", "python", "numpy"):
        assert one[name] == other[name]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_at_random_instants_lose_nothing_that_was_saved(server, tmp_path):
    """Half of them in the middle of saving. Each run resumes from the newest checkpoint."""
    config = dataclasses.replace(server, output_dir=str(tmp_path), run_name="killed", batch_size=8,
                                 eval_every_steps=0)
    folder, rng, last = tmp_path / "killed", random.Random(0), 0
    for trial in range(20):
        if trial % 2 == 0:  # else what an earlier kill left is there already
            shutil.rmtree(folder / "unfinished", ignore_errors=True)
        words = command(config, run_name="killed", resume="true", save_every_steps=1,
                        max_steps=10_000)
        with open(tmp_path / "out", "w") as out, running(words, stdout=out, stderr=out) as run:
            deadline = time.monotonic() + 120
            while not (folder / f"checkpoint-{last + 1}").exists() and (
                    trial % 2 or not (folder / "unfinished").exists()):
                assert time.monotonic() < deadline and run.poll() is None, (
                    tmp_path / "out").read_text()
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 2) if trial % 2 else rng.uniform(0, 0.04))
            processes.kill(run)
            assert run.wait() == -signal.SIGKILL
        text = (tmp_path / "out").read_text()
        assert last == 0 or f"resumed from {folder / f'checkpoint-{last}'}" in text
        whole = [int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*") if is_whole(p)]
        assert not whole or max(whole) >= last
        last = max(whole, default=0)
    subprocess.run(command(config, run_name="killed", resume="true", max_steps=last + 1), cwd=ROOT,
                   check=True, timeout=120)
    assert last >= 5
    assert [line["step"] for line in metrics(config)] == list(range(1, last + 2))
    assert len(list(folder.glob("checkpoint-*"))) == 2  # keep_checkpoints


def test_a_damaged_checkpoint_is_passed_over(server, tmp_path, capsys):
    config = dataclasses.replace(server, output_dir=str(tmp_path), max_steps=3, save_every_steps=1,
                                 keep_checkpoints=9)
    with served(config) as trainer:
        trainer.train()
    folder = tmp_path / "colors"
    os.truncate(folder / "checkpoint-3" / "trainer.pt", 1000)
    flipped = bytearray((folder / "checkpoint-2" / "model.safetensors").read_bytes())
    flipped[-100] ^= 1
    (folder / "checkpoint-2" / "model.safetensors").write_bytes(flipped)
    trainer = make_trainer(output_dir=str(tmp_path), run_name="colors", resume=True)
    trainer.records.open(trainer.past_metrics)
    assert trainer.step == 1 and len(metrics(config)) == 1
    said = capsys.readouterr().out
    assert "checkpoint-3 is damaged" in said and "checkpoint-2 is damaged" in said
    os.remove(folder / "checkpoint-1" / "trainer.pt")
    with pytest.raises(ValueError, match="is no whole checkpoint"):
        make_trainer(output_dir=str(tmp_path / "x"), resume=str(folder / "checkpoint-1"))


def test_a_fresh_run_sets_an_earlier_one_aside(server, tmp_path):
    config = dataclasses.replace(server, output_dir=str(tmp_path), max_steps=1)
    for _ in range(2):
        with served(config) as trainer:
            trainer.train()
    assert [line["step"] for line in metrics(config)] == [1]
    [earlier] = tmp_path.glob("colors-past-*")
    assert {p.name for p in earlier.iterdir()} == {"metrics.jsonl", "checkpoint-1", "rollouts",
                                                   "report.html"}


def test_sigterm_finishes_the_step_and_saves_and_a_second_one_stops_at_once(server, tmp_path):
    config = dataclasses.replace(server, output_dir=str(tmp_path))
    for count, code in ((1, 128 + signal.SIGTERM), (2, 128 + signal.SIGTERM)):
        path = tmp_path / f"run{count}" / "metrics.jsonl"
        with running(command(config, run_name=f"run{count}", max_steps=10_000)) as run:
            wait_for_lines(path, 2, run)
            for _ in range(count):
                processes.kill(run, signal.SIGTERM)
                time.sleep(0.1)
            assert run.wait(60) == code
        steps = path.read_text().count("\n")
        assert (tmp_path / f"run{count}" / f"checkpoint-{steps}").exists() == (count == 1)
    assert is_healthy(config.url)


# ---- the server

def rewards_of(config) -> list[float]:
    return [line["reward"] for line in metrics(config) if "loss" in line]


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """The metrics of a run without faults."""
    config = dataclasses.replace(server, max_steps=6,
                                 output_dir=str(tmp_path_factory.mktemp("undisturbed")))
    with served(config) as trainer:
        trainer.train()
    return timeless(metrics(config))


def engine_processes(log: Path) -> list[int]:
    """The vLLM processes that compute for the server whose log this is."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes() + (path / "comm").read_bytes()
            if (path / "fd" / "1").resolve() == log.resolve() and b"VLLM::" in words:
                found.append(int(path.name))
        except OSError:
            pass
    return found


class KillsWhileSending:
    """A weight source that kills the server once, in the middle of an update."""

    def __init__(self, source, kill, at_version):
        self.source, self.kill, self.at_version, self.sent = source, kill, at_version, 0
        self.version = source.version

    def metadata(self):
        return self.source.metadata()

    def __iter__(self):
        self.sent += 1
        for i, pair in enumerate(self.source):
            if self.sent == self.at_version and i == 20:
                self.kill()
            yield pair


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_our_server_dies_in_rollouts_and_in_a_sync_and_hangs_and_the_run_is_the_same(
        server, undisturbed, tmp_path):
    config = dataclasses.replace(server, output_dir=str(tmp_path), max_steps=6,
                                 vllm_server_port=free_port(), generation_timeout=15,
                                 vllm_server_timeout=120)
    with served(config) as trainer:
        group, done = (lambda: trainer.server.process.pid), []

        def accuracy(completion, answer, **info):
            if trainer.step == 2 and "killed" not in done:
                done.append("killed")
                os.killpg(group(), signal.SIGKILL)
            return real(completion, answer, **info)

        class Hangs(Sequence):
            """The data; a row of step 5 is never answered, for the engine is stopped."""
            def __len__(self):
                return len(environment.train)

            def __getitem__(self, i):
                if trainer.step == 4 and "hung" not in done:
                    done.append("hung")
                    engine = engine_processes(tmp_path / "colors-vllm.log")
                    assert len(engine) == 2
                    for pid in engine:
                        os.kill(pid, signal.SIGSTOP)
                return environment.train[i]

        environment = trainer.environment
        real = next(f for f in environment.rewards if f.__name__ == "accuracy")
        rewards = [accuracy if f is real else f for f in environment.rewards]
        trainer.environment = dataclasses.replace(environment, train=Hangs(), rewards=rewards)
        trainer.source = KillsWhileSending(
            trainer.source, lambda: os.killpg(group(), signal.SIGKILL), at_version=5)
        trainer.train()
    assert set(done) == {"killed", "hung"} and trainer.source.sent >= 5
    assert timeless(metrics(config)) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_of_somebody_else_is_waited_for(undisturbed, server, own_server, tmp_path):
    """It dies in the middle of a sync, and comes back by itself a while later."""
    config = dataclasses.replace(server, output_dir=str(tmp_path), max_steps=6,
                                 vllm_server_port=int(own_server.url.rsplit(":")[-1]))
    back = threading.Thread(target=own_server.restore)

    def kill():
        os.killpg(own_server.process.pid, signal.SIGKILL)
        back.start()

    with served(config) as trainer:
        assert not trainer.server.ours
        trainer.source = KillsWhileSending(trainer.source, kill, at_version=3)
        trainer.train()
    back.join(300)
    assert timeless(metrics(config)) == undisturbed


@pytest.fixture()
def own_server(server):
    """A server of the test's own, to be killed."""
    with sync.Server(dataclasses.replace(server, run_name="victim",
                                         vllm_server_port=free_port())) as victim:
        yield victim


@pytest.mark.parametrize("patience", [3, 600])
def test_a_server_that_never_comes_back_ends_the_run_with_a_checkpoint(server, tmp_path, patience):
    """After vllm_server_timeout, or when the run is told to stop."""
    port = free_port()
    config = dataclasses.replace(server, output_dir=str(tmp_path), vllm_server_timeout=patience)
    with served(config) as trainer:
        def leave(*_):
            trainer.server.url = trainer.generator.url = f"http://127.0.0.1:{port}"
            if patience == 600:
                threading.Timer(15, trainer.stop).start()
        trainer.log = lambda *_: leave() if trainer.step == 2 else None
        with pytest.raises(TimeoutError, match=f"no vLLM server at http://127.0.0.1:{port} after "
                                               ".* s .see vllm_server_timeout.; start one"):
            trainer.train()
    assert is_whole(tmp_path / "colors" / "checkpoint-2")


DIES = """
import os, signal, sys, time
sys.path[:0] = [{root!r}]
import support.gloo
from support.config import load_config
from train import served
instant = sys.argv[1]
with served(load_config("config.toml", sys.argv[2:])) as trainer:
    die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    if instant == "while meeting":
        support.gloo.Gloo = lambda *_: time.sleep(1) or die()  # the worker waits for us by then
    if instant == "while sending":
        source = list(trainer.source)
        class Dying:
            metadata, version = trainer.source.metadata, 0
            def __iter__(self):
                yield from source[:20]
                die()
        trainer.source = Dying()
    trainer.on_server(lambda: None)
    if instant == "before the end":
        trainer.server.engine.client.finish_weight_update = die
    if instant == "while paused":
        trainer.server.engine.send_weights = die
    trainer.source.version = 1
    trainer.server.send(trainer.source)
"""


@pytest.mark.parametrize("instant", ["while meeting", "while sending", "before the end",
                                     "while paused"])
def test_a_trainer_that_died_in_a_sync_leaves_a_server_that_the_next_one_can_use(
        server, tmp_path, instant):
    words = command(dataclasses.replace(server, output_dir=str(tmp_path)))[4:]
    run = subprocess.run([sys.executable, "-c", DIES.format(root=str(ROOT)), instant, *words],
                         cwd=ROOT, timeout=120)
    assert run.returncode == -signal.SIGKILL
    with served(dataclasses.replace(server, output_dir=str(tmp_path), max_steps=2)) as trainer:
        trainer.train()
    assert all(line["kl"] < 1e-6 for line in metrics(trainer.config))


def test_ten_trainers_in_a_row_use_one_server(server, tmp_path):
    for i in range(10):
        trainer = make_trainer(**{f.name: getattr(server, f.name)
                                  for f in dataclasses.fields(server)})
        with torch.no_grad():
            trainer.model.get_output_embeddings().weight *= 1 + i / 50
        trainer.on_server(lambda: None)  # and never says goodbye
        batch = trainer.build_batch(trainer.generator.collect(trainer.generator.begin(0, 2, 2)))
        assert check.server(trainer.policy, batch, must_agree=True)["max"] < 1e-5


def test_the_server_that_we_start_cannot_be_reached_from_other_machines(server):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent: which of our addresses looks outward?
        address = probe.getsockname()[0]
    with pytest.raises(OSError):
        socket.create_connection((address, server.vllm_server_port), 5)


# ---- the environment

def png(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A few bytes that claim to be a picture of 20,000 x 20,000 pixels."""
    import struct
    import zlib

    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def played(data: bytes) -> Image.Image:
    """An animation whose pixels and picture numbers are known, and whose file is closed."""
    image = Image.open(io.BytesIO(data))
    image.seek(1)
    image.load()
    image.fp = None
    return image


BAD_IMAGES = {
    "missing": "nowhere/to/be/found.png", "truncated": png(noise(56, 56))[:500], "empty": b"",
    "no image": b"hello", "no pixels": Image.new("RGB", (0, 5)), "a bomb": bomb(),
    "animated": png(noise(56, 56), "GIF", save_all=True, append_images=[noise(56, 56, 1)]),
    "animated png": png(noise(56, 56), save_all=True, append_images=[noise(56, 56, 1)]),
    "played": played(png(noise(56, 56), "GIF", save_all=True, append_images=[noise(56, 56, 1)])),
    "a local file by URL": "file:///etc/passwd", "ftp": "ftp://127.0.0.1/a.png",
    "nothing": None, "floats": Image.new("F", (56, 56)), "bad data URI": "data:image/png;base64,AA",
}


def asking(image, text="What color is the square?") -> dict:
    return {"prompt": [{"role": "user", "content": [{"type": "image", "image": image},
                                                    {"type": "text", "text": text}]}],
            "answer": "red"}


def generator_of(server, rows, rewards, **options) -> Generator:
    trainer = make_trainer(**{f.name: getattr(server, f.name) for f in dataclasses.fields(server)}
                           | {"max_dropped": 0.99, **options})
    trainer.environment = Environment(train=rows, eval=[], rewards=rewards)
    trainer.on_server(lambda: None)
    return trainer.generator


def length(completion, answer, **info):
    return float(len(completion))


def test_bad_images_and_prompts_are_dropped_by_name_and_change_nothing_else(server):
    good = [asking(noise(56, 56, i)) for i in range(3)]
    bad = {**{name: asking(image) for name, image in BAD_IMAGES.items()},
           "too long": asking(noise(56, 56), "What? " * 1000), "no prompt": {"answer": "red"}}
    rows = [good[0], *bad.values(), *good[1:]]
    generator = generator_of(server, rows, [length])
    places = [0, len(rows) - 2, len(rows) - 1]
    alone = generator.collect(generator.submit([Job(rows, i, 4, 100 * i) for i in places]))
    among = generator.collect(
        generator.submit([Job(rows, i, 4, 100 * i) for i in range(len(rows))]))
    for name in ("completion_ids", "completion_logprobs", "reward", "example_id"):
        assert among[name] == alone[name]
    assert alone.dropped == [] and len(among.dropped) == 4 * len(bad)
    for i, name in enumerate(bad, start=1):
        reasons = {reason for reason in among.dropped if reason.startswith(f"example {i}: ")}
        assert len(reasons) == 1, name
        if name in BAD_IMAGES and name != "no pixels":
            assert "cannot read image" in reasons.pop()
    assert any("maximum context length" in reason for reason in among.dropped)


def test_unusual_images_are_seen_as_they_are(server):
    """One pixel, CMYK, 16 bits, a palette: no drop, and trainer and server see the same."""
    ramp = Image.frombytes("I;16", (64, 64), b"".join(
        int(i * 65535 / 4095).to_bytes(2, "little") for i in range(4096)))
    read = load_image(png(ramp))
    assert read.getpixel((0, 0)) == (0, 0, 0) and read.getpixel((63, 63)) == (255, 255, 255)
    assert abs(read.getpixel((32, 32))[0] - 130) < 3  # Pillow alone makes it 255
    cmyk = noise(56, 56).convert("CMYK")
    assert load_image(png(cmyk, "JPEG")).mode == "RGB"
    rows = [asking(i) for i in (ramp, cmyk, noise(1, 1), noise(56, 56).convert("P"),
                                noise(56, 56).convert("1"), noise(300, 3))]
    trainer = make_trainer(**{f.name: getattr(server, f.name) for f in dataclasses.fields(server)})
    trainer.environment = Environment(train=rows, eval=[], rewards=[length])
    trainer.on_server(lambda: None)
    generator = trainer.generator
    outputs = generator.collect(generator.submit([Job(rows, i, 2, i * 2) for i in range(6)]))
    assert {int(reason.split()[1][:-1]) for reason in outputs.dropped} <= {5}  # too oblong, if any
    assert check.server(trainer.policy, trainer.build_batch(outputs), must_agree=True)["max"] < 1e-5


@pytest.mark.parametrize("seconds, size, pause", [(1, 2**20, 60), (1, 2**20, 0.2), (9, 50, 0)])
def test_an_image_url_that_hangs_drips_or_never_ends_is_given_up(monkeypatch, seconds, size, pause):
    monkeypatch.setattr("support.images.SECONDS", seconds)
    monkeypatch.setattr("support.images.BYTES", size)
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            connection, _ = listening.accept()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(1000):
                time.sleep(pause)
                connection.sendall(b"x")

    threading.Thread(target=serve, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(ValueError, match="cannot read image 'http://127.0.0.1"):
        load_image(f"http://127.0.0.1:{listening.getsockname()[1]}/a.png")
    assert time.monotonic() - start < 5
    listening.close()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "1.0", [1.0], KeyError("x")])
def test_a_bad_reward_drops_its_completion_alone(server, bad):
    seen = []

    def moody(completion, answer, **info):
        seen.append(completion)
        if len(seen) % 4 == 2:
            if isinstance(bad, Exception):
                raise bad
            return bad
        return True

    generator = generator_of(server, [asking(noise(56, 56))], [moody])
    outputs = generator.collect(generator.submit([Job(generator.environment.train, 0, 4, 0)]))
    assert outputs.reward == [1.0] * 3 and len(outputs.dropped) == 1
    assert outputs.dropped[0].startswith("example 0: ")


def test_a_reward_that_never_returns_is_given_up(server):
    generator = generator_of(server, [asking(noise(56, 56)), asking(noise(56, 56, 1))],
                             [lambda text, answer, slow=False: time.sleep(60 * slow) or 1.0],
                             generation_timeout=2)
    rows = generator.environment.train
    rows[1]["info"] = {"slow": True}
    outputs = generator.collect(generator.submit([Job(rows, 0, 4, 0), Job(rows, 1, 4, 4)]))
    assert len(outputs) == 4 and len(outputs.dropped) == 4


def test_too_many_failures_end_the_run_with_a_checkpoint_and_the_reason(server, tmp_path):
    config = dataclasses.replace(server, output_dir=str(tmp_path))
    with served(config) as trainer:
        def fragile(completion, answer, **info):
            if trainer.step == 2:
                raise OSError("the judge is gone")
            return 1.0

        trainer.environment = dataclasses.replace(trainer.environment, rewards=[fragile],
                                                  weights=None)
        with pytest.raises(RuntimeError, match="32 completions failed.*the judge is gone"):
            trainer.train()
    assert is_whole(tmp_path / "colors" / "checkpoint-2")
    assert [line["dropped"] for line in metrics(config)] == [0, 0]


# ---- completions and numbers

def test_truncated_and_empty_completions():
    trainer = make_trainer(mask_truncated=True)
    outputs = canned(trainer, [([noise(56, 56)], [4, 3, 0, 2])])
    outputs.finish_reason[0] = "length"
    built = trainer.build_batch(outputs)
    assert built.loss_mask.sum(1).tolist() == [0, 3, 0, 2]
    assert built.advantages.tolist() == [0.5, -0.5, 0.5, -0.5]  # its reward still counts
    assert trainer.update(outputs)["tokens"] == 5
    assert trainer.policy.can_share  # checked on the rows that are trained
    outputs.finish_reason = ["length"] * 4
    assert trainer.update(outputs)["tokens"] == make_trainer(mask_truncated=True).update(
        outputs)["tokens"] == 0  # nothing to learn from, and nothing to check
    assert make_trainer().build_batch(outputs).loss_mask.sum(1).tolist() == [4, 3, 0, 2]


def test_numbers_that_are_not_finite_skip_the_step_and_end_the_run_at_the_third(tmp_path):
    trainer = make_trainer(output_dir=str(tmp_path))
    good = canned(trainer, [([noise(56, 56)], [4, 3, 4, 2])])
    bad = canned(trainer, [([noise(56, 56)], [4, 3, 4, 2])])
    encoded = trainer.adapter.encode(bad.prompt[0], bad.images[0])
    encoded["pixel_values"][3, 3] = math.nan
    bad.encoded = [encoded] * 4
    trainer.update(good)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    assert [trainer.update(bad)["skipped"] for _ in range(2)] == [1, 1]
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
    assert trainer.update(good)["skipped"] == 0  # and the count starts again
    assert trainer.update(bad)["skipped"] == trainer.update(bad)["skipped"] == 1
    with pytest.raises(RuntimeError, match="not finite; see .*bad-batch-7.pt. In a row: 3"):
        trainer.update(bad)
    dumped = torch.load(tmp_path / "run" / "bad-batch-7.pt", weights_only=True)
    assert dumped["pixel_values"].isnan().any() and dumped["input_ids"].shape[0] == 4


def test_a_run_that_meets_nan_ends_with_a_checkpoint(server, tmp_path):
    config = dataclasses.replace(server, output_dir=str(tmp_path))
    with served(config) as trainer:
        build = trainer.adapter.build_batch

        def poisoned(outputs):
            batch = build(outputs)
            if trainer.step >= 2:
                batch.pixel_values[:] = math.nan
            return batch

        trainer.adapter.build_batch = poisoned
        with pytest.raises(RuntimeError, match="not finite"):
            trainer.train()
    assert [line["skipped"] for line in metrics(config)] == [0, 0, 1, 1]
    assert is_whole(tmp_path / "colors" / "checkpoint-4")


def test_nothing_in_a_checkpoint_is_unpickled(tmp_path):
    import pickle

    trainer = make_trainer(output_dir=str(tmp_path))
    trainer.records.open(trainer.past_metrics)
    trainer.step = 1
    trainer.save()

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"step": Evil()}, tmp_path / "run" / "checkpoint-1" / "trainer.pt")
    (tmp_path / "run" / "checkpoint-1" / "checksums.json").write_text(
        json.dumps(checksums(tmp_path / "run" / "checkpoint-1")))
    with pytest.raises(pickle.UnpicklingError):
        make_trainer(output_dir=str(tmp_path), resume=True)
    assert not (tmp_path / "executed").exists()


# ---- the command line

MISTAKES = {  # words after "@ config.toml" -> what the one line says
    "learning_rat=1": "unknown key 'trainer.args.learning_rat'; did you mean 'trainer.args.learning",
    "trainer.learning_rate=1": "unknown key 'trainer.learning_rate'; did you mean 'trainer.args.l",
    "inference.gpu=1": "did you mean 'inference.gpus'", "modle=x": "did you mean 'model'",
    "trainer.args=4": "unknown key 'trainer.args'", "env=colors": "did you mean 'env.id'",
    "max_steps=ten": "max_steps must be int, not 'ten'",
    "max_steps=1.5": "max_steps must be int, not 1.5",
    "max_steps=true": "max_steps must be int, not True", "max_steps": "is not key=value",
    "env.args=3": "env_args must be dict", "batch_size=250": "times G",
    "batch_size=16": "at least 2", "learning_rate=-1e-5": "learning_rate must be above 0",
    "learning_rate=nan": "learning_rate must be above 0", "temperature=0": "temperature must be abo",
    "micro_batch_size=0": "micro_batch_size must be above 0",
    "vllm_server_port=70000": "vllm_server_port must be above 0 and at most 65535",
    "mask_ratio_low=2.0": "mask_ratio_low must be at least 0 and at most 1",
    "max_tokens=512": "max_tokens must be below max_model_len",
    "vllm_server_host=http://127.0.0.1": "vllm_server_host must be a name or address alone",
    "inference.args.port=8001": "inference.args: set `model` and vllm_server_port instead",
    "resume=outputs/none": "resume must be true or a checkpoint's folder",
    "env.id=nothing": "environment 'nothing': no load_environment() in a module",
    "env.args.num_trian=3": "unexpected keyword argument 'num_trian'",
    "env.args.num_train=0": "must return an Environment with rows in train",
    "env.args.num_eval=0": "no held-out split", "wandb_project=x": "No module named 'wandb'",
    "model=no/such/model": "no/such/model", "output_dir=/proc/no": "/proc/no",
    "vllm_server_port=TAKEN": "Address already in use",
    "inference.args.enforce_eeger=true": "unrecognized arguments: --enforce-eeger",
    "inference.args.dtype=float33": "float33",
    "inference.args.tensor_parallel_size=0": "tensor_parallel_size Input should be greater than",
}
FILES = {
    'model = "x"\n[env]\nid = "colors"\n[inference.args]\nlimit_mm_per_prompt = {"image": 4}':
        "Expected '='", '[env]\nid = "colors"': "it must set model", "\xff\xfe": "Invalid",
    'model = "x"\n[env]\nid = "colors"\n[trainer.arg]\nmax_steps = 3': "unknown key 'trainer.arg",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_mistake_is_one_line_and_code_2_within_seconds(tmp_path):
    taken = socket.create_server(("127.0.0.1", 0))
    cases = [(["@", "config.toml", words.replace("TAKEN", str(taken.getsockname()[1])),
               *([] if "port" in words else [f"vllm_server_port={free_port()}"]),
               *([] if "output_dir" in words else [f"output_dir={tmp_path / str(i)}"])], said)
             for i, (words, said) in enumerate(MISTAKES.items())]  # each with a vllm.log of its own
    for i, (text, said) in enumerate(FILES.items()):
        (tmp_path / f"{i}.toml").write_text(text)
        cases.append((["@", str(tmp_path / f"{i}.toml")], said))
    cases += [(["@", "none.toml"], "none.toml: No such file"), (["@", "models"], "Is a directory"),
              (["config.toml"], "usage: python train.py @ config.toml"), ([], "usage: python train")]

    for words, said in cases:
        start = time.monotonic()
        with open(tmp_path / "out", "w") as out:
            code = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, stdout=out,
                                  stderr=out).returncode
        seconds = time.monotonic() - start
        *waiting, last = (tmp_path / "out").read_text().splitlines()
        assert code == 2 and seconds < 60 and last.startswith("error: ") and said in last, words
        assert all(line.startswith("waiting for the vLLM server") for line in waiting), waiting
