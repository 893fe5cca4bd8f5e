"""The server: whose it is, what it is asked, what it must not be told, and what rewards are given.

Faults of a foreign service are served by a small one here; all others are those of a real vLLM.
"""
import asyncio
import contextlib
import dataclasses
import datetime
import decimal
import fractions
import http.server
import json
import math
import os
import signal
import socket
import socketserver
import stat
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy
import pytest
import requests
import torch

import processes
import sync
from conftest import ROOT, TINY, free_port, make_trainer, noise
from rollout import Environment, Failure, Generator, Job
from support import gloo
from support import http as server_http
from support import other_server, owner, rewards, secret, server_flags, text, vllm_process
from support.config import MultimodalRLConfig
from test_faults import asking, command, generator_of, running, timeless, wait_for_lines
from test_runs import metrics
from train import served


def options_of(config, **changes) -> dict:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)} | changes


@contextlib.contextmanager
def service(routes: dict, key: str = ""):
    """The port of a service that answers {path: JSON, or (status, text)}; all else is a 404.

    With a key its /v1 routes want it, as vLLM's do with VLLM_API_KEY.
    """
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.split("?")[0]
            said = routes.get(path, (404, "not found"))
            if key and path.startswith("/v1") and self.headers["Authorization"] != f"Bearer {key}":
                said = (401, "Unauthorized")
            status, body = said if isinstance(said, tuple) else (200, json.dumps(said))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
        yield web.server_port
        web.shutdown()


def vllm_routes(flags=(), model=(), **more) -> dict:
    """What a vLLM server that fits says, but for the changes."""
    entry = {"id": "m", "root": TINY, "owned_by": "vllm", "max_model_len": 512, **dict(model)}
    served_flags = {"model_config": {"logprobs_mode": "processed_logprobs"},
                    "weight_transfer_config": {"backend": "nccl"},
                    "parallel_config": {"worker_extension_cls": "support.gloo.GlooWorker"},
                    **dict(flags)}
    return {"/health": (200, ""), "/v1/models": {"data": [entry]},
            "/server_info": {"vllm_config": served_flags}, "/weight_info": {
                "weight_version": "default"}, "/update_weight_version": {}, **more}


def config_for(port: int, **changes) -> MultimodalRLConfig:
    return MultimodalRLConfig(**{"model": TINY, "env_id": "colors", "vllm_server_port": port,
                                 "max_tokens": 8, "vllm_server_timeout": 5, **changes})


# ---- another server than ours

OTHER_MODEL = str(ROOT / "models" / "another")
NOT_OURS = {  # what answers -> what the one line says
    "a page": ({"/health": (200, "<html>ok</html>"), "/v1/models": (200, "<html>")}, "no vLLM serv"),
    "a service": ({"/health": {"status": "up"}}, "no vLLM server"),
    "a list": ({"/health": (200, ""), "/v1/models": [1]}, "no vLLM server"),
    "another engine": (vllm_routes(model={"owned_by": "llamacpp"}), "no vLLM server"),
    "an error": (vllm_routes() | {"/v1/models": (500, "\x1b[31mbroken\x1b[0m")}, "500 broken"),
    "another model": (vllm_routes(model={"root": OTHER_MODEL}), f"another model, '{OTHER_MODEL}'"),
    "a model of the hub": (vllm_routes(model={"root": "Qwen/other"}), "another model, 'Qwen/other'"),
    "a shorter one": (vllm_routes(model={"max_model_len": 8}), "max_model_len 8, but this run needs 9"),
    "raw logprobs": (vllm_routes({"model_config": {"logprobs_mode": "raw_logprobs"}}),
                     "logprobs_mode 'raw_logprobs', not 'processed_logprobs'"),
    "no transfer": (vllm_routes({"weight_transfer_config": None}), "weight_transfer_config None"),
    "another transfer": (vllm_routes({"weight_transfer_config": {"backend": "ipc"}}),
                         "weight_transfer_config 'ipc', not 'nccl'"),
    "workers without gloo": (vllm_routes({"parallel_config": {"worker_extension_cls": ""}}),
                             "no worker_extension_cls"),
    "no table": (vllm_routes() | {"/server_info": ["x"]}, "no vLLM server"),
    "an unknown table": (vllm_routes() | {"/server_info": {"x": 1}}, "no vLLM server"),
    "flags of another kind": (vllm_routes({"model_config": "x"}), "no vLLM server"),
    "models of another kind": (vllm_routes() | {"/v1/models": {"data": {}}}, "no vLLM server"),
    "a redirect": (vllm_routes() | {"/v1/models": (302, "")}, "302 Found"),
    "an empty table": ({"/health": {}, "/v1/models": {}, "/server_info": {}}, "no vLLM server"),
    "a plain vLLM": ({k: v for k, v in vllm_routes().items() if k in ("/health", "/v1/models")},
                     "no RL routes"),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_a_server_that_does_not_fit_is_refused_in_one_line_before_it_is_touched(name):
    routes, said = NOT_OURS[name]
    with service(routes) as port:
        start = time.monotonic()
        with pytest.raises(ValueError) as error, sync.Server(config_for(port)):
            pass
    assert said in str(error.value) and time.monotonic() - start < 4
    assert str(error.value).isprintable()


def test_a_server_that_fits_is_used_and_one_that_answers_everybody_is_warned_of(capsys):
    with service(vllm_routes()) as port, sync.Server(config_for(port)) as server:
        assert not server.ours and server.lease.listener
    assert f"warning: the RL routes of http://127.0.0.1:{port} answer everybody" in (
        capsys.readouterr().out)


def test_a_run_that_never_syncs_may_use_a_plain_vllm():
    routes, _ = NOT_OURS["a plain vLLM"]
    with service(routes) as port, sync.Server(config_for(port, sync_to_vllm_every=0)) as server:
        server.lease.check()


def test_the_length_that_the_config_asks_for_must_be_served():
    with service(vllm_routes()) as port:
        for longest, fits in ((512, True), (1024, False), ("1k", True)):
            config = config_for(port, inference_args={"max_model_len": longest})
            with contextlib.ExitStack() as stack:
                if not fits:
                    stack.enter_context(pytest.raises(ValueError, match="this run needs 1024"))
                stack.enter_context(sync.Server(config))


def test_a_checkpoint_of_the_served_model_is_the_same_model(tmp_path):
    trainer = make_trainer()
    trainer.model.save_pretrained(tmp_path / "tuned")
    assert other_server.same_model(TINY, str(tmp_path / "tuned"))
    assert other_server.same_model("/mounted/elsewhere/tiny-qwen2-vl", TINY)
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    config["vision_config"]["depth"] = 3
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    assert not other_server.same_model(TINY, str(tmp_path / "tuned"))


def test_the_command_line_says_it_in_one_line_with_code_2(tmp_path):
    routes, said = NOT_OURS["a plain vLLM"]
    with service(routes) as port:
        run = subprocess.run(
            [sys.executable, "train.py", "@", "config.toml", f"vllm_server_port={port}",
             f"output_dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and said in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_a_port_that_something_else_has_is_named_before_vllm_is_started(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = config_for(taken.getsockname()[1], output_dir=str(tmp_path))
        start = time.monotonic()
        with pytest.raises(OSError, match="Address already in use"), sync.Server(config):
            pass
    assert time.monotonic() - start < 15 and not list(tmp_path.iterdir())


class Raw(socketserver.StreamRequestHandler):
    """Answers with bytes, one every 0.2 seconds, for ever."""
    said = b""

    def handle(self):
        with contextlib.suppress(OSError):
            self.wfile.write(self.said)
            while self.said:
                self.wfile.write(b"x")
                time.sleep(0.2)


@pytest.mark.parametrize("said", [b"", b"\x15\x03\x01\x00\x02\x02\x50", b"HTTP/1.1 2",
                                  b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\nA: "])
def test_a_service_that_closes_drips_or_speaks_tls_is_no_server_within_seconds(said, tmp_path):
    handler = type("Handler", (Raw,), {"said": said})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as web:
        web.daemon_threads = True
        threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
        start = time.monotonic()
        with pytest.raises(OSError, match="Address already in use, by what is no vLLM server"):
            with sync.Server(config_for(web.server_address[1], output_dir=str(tmp_path))):
                pass
        assert time.monotonic() - start < 9
        web.shutdown()


def test_an_answer_that_drips_is_given_up(monkeypatch):
    """A body without an end, after a good start."""
    with service(vllm_routes()) as port:
        monkeypatch.setattr(other_server, "call", lambda *_, **__: time.sleep(60))
        monkeypatch.setattr(other_server, "SECONDS", 1)
        with pytest.raises(ValueError, match=f"127.0.0.1:{port} does not answer: no answer in 1 s"):
            with sync.Server(config_for(port)):
                pass


@pytest.mark.parametrize("said", [{}, [], {"weight_version": None}, (200, "<html>"), (204, "")])
def test_a_version_that_is_none_of_ours_is_lost_and_not_a_traceback(said):
    routes = vllm_routes()
    with service(routes) as port, sync.Server(config_for(port)) as server:
        routes["/weight_info"] = said
        with pytest.raises(server_http.ServerError, match="has weights 'None'|does not answer: "):
            server.lease.check()


@pytest.mark.parametrize("key, fits", [("", False), ("wrong", False), ("right", True)])
def test_the_api_key_of_the_environment_is_sent(key, fits, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", key)
    with service(vllm_routes(), key="right") as port, contextlib.ExitStack() as stack:
        if not fits:
            stack.enter_context(pytest.raises(ValueError, match="401 Unauthorized.*VLLM_API_KEY"))
        stack.enter_context(sync.Server(config_for(port)))


# ---- one owner, whose weights alone are trained on

def test_a_second_trainer_is_refused_at_once_and_told_who_the_first_is(server, tmp_path):
    config = dataclasses.replace(server, output_dir=str(tmp_path), run_name="first")
    words = command(dataclasses.replace(config, run_name="second"), max_steps=1, run_name="second")
    with served(config) as trainer:
        trainer.on_server(lambda: None)
        run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert run.returncode == 2
        assert f"is in use by run 'first', process {os.getpid()} on {socket.gethostname()}" in (
            run.stderr.splitlines()[-1])
        assert not (tmp_path / "second" / "metrics.jsonl").exists()
        trainer.server.lease.check()  # nothing has happened to it
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_first_trainer_that_was_killed_is_followed_and_one_that_is_stopped_is_not(
        server, tmp_path, end):
    config = dataclasses.replace(server, output_dir=str(tmp_path), run_name="first")
    words = command(config, run_name="first", max_steps=10_000)
    with running(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        wait_for_lines(tmp_path / "first" / "metrics.jsonl", 1, run)
        processes.kill(run, end)
        time.sleep(0.5)
        second = sync.Server(dataclasses.replace(config, run_name="second"))
        if end == signal.SIGSTOP:
            with pytest.raises(ValueError, match=r"in use by run 'first', process \d+ on"):
                second.lease.claim()
        else:
            second.lease.claim()
            second.lease.release()


def lease_at(port: int, monkeypatch, address="127.0.0.1") -> owner.Lease:
    """That of a trainer which reaches the server by this address of its own."""
    monkeypatch.setattr(sync.Server, "own_address", lambda self: address)
    return sync.Server(config_for(port)).lease


def test_an_owner_is_who_answers_with_its_own_token(monkeypatch):
    lease = lease_at(1, monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as silent, service({}) as web:
        for port, lives in ((silent.getsockname()[1], True), (web, False), (free_port(), False)):
            version = f"3 by run 'a', process 1 on \x1b[1mb [127.0.0.1:{port} f00d]"
            said = lease.living_owner(version)
            assert said == ("run 'a', process 1 on b" if lives else None)
    for version in ("default", "3", "", "3 by nobody", "3 by x [127.0.0.1:999999 f00d]"):
        assert lease.living_owner(version) is None


def test_an_owner_that_cannot_be_asked_is_not_taken_for_dead(monkeypatch):
    """One on the server's machine, asked from another; one behind a network that is down."""
    version = f"3 by x [127.0.0.1:{free_port()} f00d]"
    assert lease_at(1, monkeypatch, "10.0.0.7").living_owner(version) == "x"
    lease = lease_at(1, monkeypatch)
    assert lease.living_owner(version) is None
    for error, lives in ((OSError(113, "No route to host"), True), (TimeoutError(), True),
                         (ConnectionResetError(), False)):
        def fail(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(socket, "create_connection", fail)
            assert (lease.living_owner(version) == "x") == lives


def test_of_two_trainers_that_come_at_the_same_instant_one_owns_the_server(monkeypatch):
    """Both have read that nobody does; the other one writes last."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        theirs = {"weight_version": f"None by run 'b' [127.0.0.1:{other.getsockname()[1]} f00d]"}
        routes = vllm_routes()
        said = [{"weight_version": "default"}, theirs]

        class Changing(dict):
            def get(self, path, default):
                return said.pop(0) if path == "/weight_info" else super().get(path, default)

        monkeypatch.setattr(other_server, "is_open", lambda url: False)
        with service(Changing(routes)) as port:
            lease = sync.Server(config_for(port)).lease
            with pytest.raises(ValueError, match="in use by run 'b': wait for its end"):
                lease.claim()
            assert lease.listener is None and said == []


KILLED = """
import os, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from test_server import config_for
import sync
from support import other_server, vllm_process
other_server.is_open = lambda url: False
vllm_process.server_command = lambda config: ["sleep", "60"]
config = config_for({port}, output_dir={folder!r})
server = sync.Server(config)
server.lease.claim()
process = vllm_process.start(config, server.log)
if os.fork() == 0:
    os.closerange(0, 3)  # what a pool of processes of a reward leaves behind
    time.sleep(60)
    os._exit(0)
print(server.lease.version(3), process.pid, sep="\\n", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_forks_of_a_killed_trainer_hold_neither_its_server_nor_its_lease(tmp_path, monkeypatch):
    with service(vllm_routes()) as port:
        run = subprocess.run(
            [sys.executable, "-c", KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"),
                                                 port=port, folder=str(tmp_path))],
            cwd=ROOT, capture_output=True, text=True, timeout=60, start_new_session=True)
        version, pid = run.stdout.splitlines()[-2:]
        lease = lease_at(port, monkeypatch)
        assert owner.VERSION.fullmatch(version) and lease.living_owner(version) is None
    end = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


def somebody_sends(server, change) -> None:
    """Another trainer, not bound by any lease of ours, sends changed weights and goes."""
    other = make_trainer(**options_of(server))
    with torch.no_grad():
        for p in other.model.parameters():
            change(p)
    other.server.send(other.source)
    other.server.stop()


def restarted(server) -> None:
    """The server as if somebody had started it again: the base weights, and no owner."""
    other = make_trainer(**options_of(server))
    other.server.send(other.source)
    other.server.call("update_weight_version", {"new_version": "default"})
    other.server.stop()


FAULTS = {"restarted": restarted, "others": lambda server: somebody_sends(
    server, lambda p: p.mul_(1.2))}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("ahead, every", [(0, 3), (2, 2)])
def test_weights_that_we_did_not_send_are_never_trained_on(server, tmp_path, ahead, every, fault):
    """Twice the server has others: no token that was trained on has a logprob of theirs."""
    config = dataclasses.replace(server, output_dir=str(tmp_path), max_steps=6, async_steps=ahead,
                                 sync_to_vllm_every=every)
    steps = []  # (rollouts, the weights after so many steps)
    with served(config) as trainer:
        weights = [[p.detach().clone() for p in trainer.model.parameters()]]
        log = trainer.log

        def log_and_disturb(measured, outputs):
            steps.append(outputs)
            weights.append([p.detach().clone() for p in trainer.model.parameters()])
            log(measured, outputs)
            if trainer.step in (2, 4):
                FAULTS[fault](server)

        trainer.log = log_and_disturb
        trainer.train()
        for outputs in steps:
            batch, off = trainer.build_batch(outputs), []
            for version in weights if ahead else [weights[outputs.weight_version]]:
                with torch.no_grad():
                    for p, q in zip(trainer.model.parameters(), version):
                        p.copy_(q)
                    logprobs, _ = trainer.policy(batch, share=False)
                off.append((logprobs - batch.behavior_logprobs).abs()[batch.loss_mask.bool()])
            assert torch.stack(off).amin(0).max() < 1e-4  # with ahead, of some weights of ours
        assert {outputs.weight_owner for outputs in steps} == {trainer.server.lease.name}
    staleness = [line["staleness"] for line in metrics(config)]
    assert max(staleness) <= ahead + every - 1 and len(staleness) == 6
    if not ahead:
        assert staleness == [0, 1, 0, 0, 0, 1]  # sent: 0; again 2; 3; again 4; then none until 6


def test_a_run_whose_server_is_restarted_between_its_steps_is_the_same_run(server, tmp_path):
    found = []
    for name in ("undisturbed", "restarted"):
        config = dataclasses.replace(server, output_dir=str(tmp_path), run_name=name, max_steps=3)
        with served(dataclasses.replace(config, async_steps=0)) as trainer:
            log = trainer.log

            def log_and_disturb(measured, outputs):
                log(measured, outputs)
                if name == "restarted":
                    restarted(server)

            trainer.log = log_and_disturb
            trainer.train()
        found.append(timeless(metrics(config)))
    assert found[0] == found[1]


def test_a_server_that_another_trainer_has_taken_ends_the_run_by_its_name(server, tmp_path):
    with served(dataclasses.replace(server, output_dir=str(tmp_path))) as trainer:
        trainer.on_server(lambda: None)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            version = f"3 by run 'x', process 9 on y [127.0.0.1:{silent.getsockname()[1]} f00d]"
            trainer.server.call("update_weight_version", {"new_version": version})
            with pytest.raises(RuntimeError, match="taken by run 'x', process 9 on y: one trainer"):
                trainer.roll_out()


# ---- a server that is slow, and weights that exploded

def test_a_start_that_fails_is_tried_three_times(server, monkeypatch):
    for faults in ([TimeoutError("slow")], [ValueError("vLLM ended"), TimeoutError("slow")]):
        trainer, tried = make_trainer(**options_of(server)), []
        left = list(faults)

        def start(self):
            tried.append(1)
            if left:
                raise left.pop(0)
            return real(self)

        real = sync.Server.start
        with monkeypatch.context() as patch:
            patch.setattr(sync.Server, "start", start)
            trainer.server_is_lost = True
            outputs = trainer.roll_out()
        assert len(outputs) == 32 and len(tried) == len(faults) + 1
    trainer.server.start = lambda: tried.append(1) or exec("raise TimeoutError('slow')")
    tried.clear()
    with pytest.raises(TimeoutError, match="slow"):
        trainer.server.restore()
    assert len(tried) == 3


def test_a_foreign_server_that_comes_back_late_is_still_used():
    port = free_port()
    server = sync.Server(config_for(port, vllm_server_timeout=1))
    threads = []

    def late():
        time.sleep(3)
        with service_at(port, {"/health": (200, "")}):
            time.sleep(4)

    threads.append(threading.Thread(target=late))
    threads[0].start()
    server.restore()
    assert server_http.is_healthy(server.url)
    threads[0].join()


@contextlib.contextmanager
def service_at(port: int, routes: dict):
    """service(), at a port of one's choice."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, _ = routes.get(self.path, (404, ""))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
        yield
        web.shutdown()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named_and_not_sent(server, bad):
    trainer = make_trainer(**options_of(server))
    trainer.on_server(lambda: None)
    before = trainer.server.lease.served()
    with torch.no_grad():
        trainer.model.model.language_model.layers[1].mlp.up_proj.weight[3, 5] = bad
    trainer.step = 1
    with pytest.raises(ValueError, match=r"after step 1 are not finite: 1 of \d+, "
                                         r"model.language_model.layers.1.mlp.up_proj.weight"):
        trainer.send_weights()
    assert trainer.server.lease.served() == before
    clean = make_trainer(**options_of(server))
    assert len(clean.roll_out()) == 32


@pytest.mark.parametrize("same_trainer", [True, False])
def test_a_server_is_clean_after_it_was_sent_clean_weights(server, same_trainer):
    """Finite weights that overflow in the model leave NaN in the server's caches."""
    trainer = make_trainer(**options_of(server))
    before = trainer.roll_out()
    clean = [p.detach().clone() for p in trainer.model.parameters()]
    with torch.no_grad():
        for p in trainer.model.parameters():
            p *= 1e30
    trainer.send_weights()
    trainer.step = 1
    trainer.send_weights()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="logprobs are not finite, because its weights have "
                                               "exploded; lower learning_rate"):
            trainer.generator.collect(trainer.generator.begin(1, 8, 8))
    if not same_trainer:
        server_http.SPOILED.clear()  # the next one is another process
        trainer = make_trainer(**options_of(server))
    with torch.no_grad():
        for p, q in zip(trainer.model.parameters(), clean):
            p.copy_(q)
    trainer.step = 2
    trainer.send_weights()
    trainer.on_server(lambda: None)
    for step in (0, 1, 0):
        again = trainer.generator.collect(trainer.generator.begin(step, 4, 8))
        assert again.dropped == [] and len(again) == 32
    assert again.completion_ids == before.completion_ids
    assert torch.allclose(torch.tensor(sum(again.completion_logprobs, [])),
                          torch.tensor(sum(before.completion_logprobs, [])), atol=1e-5)


def test_an_update_that_breaks_leaves_a_server_that_answers_and_says_so(server, tmp_path):
    """A server of somebody else's may have other users: it must not stay paused for them."""
    trainer = make_trainer(**options_of(server))
    trainer.on_server(lambda: None)

    class Breaks:
        metadata, version = trainer.source.metadata, 5

        def __iter__(self):
            yield from list(trainer.source)[:20]
            raise RuntimeError("no memory")

    trainer.server.engine = None
    with pytest.raises(server_http.ServerError, match="weights 5 did not reach .*: no memory"):
        trainer.server.send(Breaks())
    assert trainer.server.call("is_paused", method="get") == {"is_paused": False}
    assert trainer.server.lease.served().startswith("None by run ")
    trainer.server.stop()
    assert len(trainer.roll_out()) == 32


def test_weights_that_the_server_does_not_know_end_the_run_at_once(server, monkeypatch):
    """No server that is started again would load them, and each try takes as long as a time-out."""
    # That time-out is the trainer's, which waits for workers that receive no more.
    monkeypatch.setattr(gloo, "timedelta", lambda seconds: datetime.timedelta(seconds=2))
    trainer = make_trainer(**options_of(server))
    monkeypatch.setattr(trainer.server, "restore", lambda: pytest.fail("it is no lost server"))
    weights = [*trainer.source, ("model.nonsense.weight", torch.ones(3))]
    with monkeypatch.context() as patch:
        patch.setattr(sync.CheckpointSource, "__iter__", lambda self: iter(weights))
        with pytest.raises(ValueError, match="weights 0 did not reach .* named 'nonsense'"):
            trainer.on_server(lambda: None)
    trainer.server.stop()
    assert len(trainer.roll_out()) == 32


@pytest.mark.parametrize("words, known", [  # as vLLM 0.32 and gloo have said them
    ("Attempted to load weight (torch.Size([3])) into parameter (torch.Size([64]))", True),
    ("start (0) + length (32) exceeds dimension size (3).", True),
    ("Timed out waiting 15000ms for recv operation to complete", False),
    ("CUDA out of memory. Tried to allocate 2.00 GiB", False)])
def test_only_a_weight_that_is_none_of_the_models_is_not_sent_again(monkeypatch, words, known):
    update = sync.Server(MultimodalRLConfig(model=TINY))

    def refused(source):
        update.refusal = server_http.Refusal(words, 500)
        raise update.refusal

    monkeypatch.setattr(update, "call", lambda *args, **kwargs: {})
    monkeypatch.setattr(update.lease, "claim", lambda: None)
    monkeypatch.setattr(update, "meet", refused)
    with pytest.raises(ValueError if known else server_http.ServerError, match="did not reach"):
        update.send(types.SimpleNamespace(version=0))


def test_caches_are_cleaned_when_nothing_samples_with_the_old_weights_any_more(server):
    trainer, asked = make_trainer(**options_of(server)), []
    call = trainer.server.call

    def noted(route, body=None, method="post"):
        asked.append((body or {}).get("method") or route.split("?")[0])
        return call(route, body, method)

    trainer.server.call = noted
    trainer.on_server(lambda: None)
    wanted = ["pause", "clean_caches", "reset_prefix_cache", "reset_mm_cache",
              "reset_encoder_cache", "update_weight_version", "resume"]
    assert asked[asked.index("pause"):-1] == wanted
    for spoiled in (False, True):  # the caches of a server that we have met are clean
        asked.clear()
        if spoiled:
            server_http.SPOILED.add(f"127.0.0.1:{server.vllm_server_port}")
        trainer.server.send(trainer.source)
        assert asked[asked.index("pause"):-1] == [w for w in wanted if spoiled or w != wanted[1]]


def test_completions_that_somebody_aborts_are_dropped(server):
    """A pause of another's, whose default is to abort what is running."""
    generator = generator_of(server, [asking(noise(56, 56, i)) for i in range(4)],
                             [lambda *_, **__: 1.0], max_tokens=400)
    generator.sampling |= {"ignore_eos": True, "max_tokens": 400}
    jobs = [Job(generator.environment.train, i, 8, 8 * i) for i in range(4)]
    generator.call("pause?mode=keep")  # however slow this machine is, none is done before the abort
    pending = generator.submit(jobs)
    while not all(result.ready() for result in pending.results):
        generator.call("pause?mode=abort")
        time.sleep(0.05)
    generator.call("resume")
    broken = [entry for job, result in zip(jobs, pending.results)
              for entry in generator.finish(job, result)]
    assert len(broken) == 32
    assert all("broke it off (abort)" in str(failure) for failure in broken)
    assert all(isinstance(failure, Failure) for failure in broken)


# ---- the secret

def test_without_the_secret_the_server_answers_nothing_but_health(server):
    assert requests.get(f"{server.url}/health", timeout=10).status_code == 200
    given = {secret.HEADER: secret.known(server.url)}
    for method, route in (("get", "v1/models"), ("post", "v1/chat/completions"), ("get", "metrics"),
                          ("post", "pause"), ("post", "collective_rpc"), ("get", "weight_info"),
                          ("get", "openapi.json"), ("get", "health/../weight_info"),
                          ("get", "nothing"), ("options", "v1/models"), ("get", "healthy")):
        url = f"{server.url}/{route}"
        # What a browser sends for a page of another site, without asking first.
        page = {"Origin": "http://evil.example", "Content-Type": "text/plain"}
        for headers in (page, page | {secret.HEADER: "x"}, page | {"Cookie": str(given)}):
            said = requests.request(method, url, headers=headers, timeout=10,
                                    data='{"method": "use_gloo"}' if method == "post" else None)
            assert said.status_code == 401 and given[secret.HEADER] not in said.text, route
    assert requests.get(f"{server.url}/weight_info", headers=given, timeout=10).ok


def test_the_secret_stands_in_no_command_line_no_log_and_no_file_of_others(server):
    path, word = secret.secret_file(server.url), secret.known(server.url)
    assert len(word) >= 32 and path.read_text() == word
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o077 == 0
    for words in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert word.encode() not in words.read_bytes()
    log = Path(server.output_dir, f"{server.run_name}-vllm.log").read_text()
    assert "AskSecret" in log and word not in log


def test_a_trainer_elsewhere_is_told_the_secret_by_its_environment(server, tmp_path, monkeypatch):
    word = secret.known(server.url)
    monkeypatch.setenv("HOME", str(tmp_path))  # where there is no such file
    monkeypatch.setattr(secret, "MADE", {})
    with pytest.raises(ValueError, match="401 this server asks for its secret.*VLM_SERVER_SECRET"):
        sync.Server(server).lease.claim()
    monkeypatch.setenv("VLM_SERVER_SECRET", "another")
    with pytest.raises(ValueError, match="401"):
        sync.Server(server).lease.claim()
    monkeypatch.setenv("VLM_SERVER_SECRET", word)
    lease = sync.Server(server).lease
    lease.claim()
    lease.release()


def test_the_secret_of_the_environment_is_used_and_files_are_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(secret, "MADE", {})
    url = "http://127.0.0.1:1234"
    first, second = secret.make(url), secret.make(url)
    assert first != second and secret.known(url) == second
    assert secret.known("http://elsewhere:1234") is None
    secret.secret_file(url).write_text("of a later server")
    secret.forget(url)
    assert secret.known(url) == "of a later server"
    monkeypatch.setenv("VLM_SERVER_SECRET", "chosen")
    assert secret.make(url) == "chosen"
    secret.forget(url)
    assert not secret.secret_file(url).exists()
    monkeypatch.delenv("VLM_SERVER_SECRET")
    monkeypatch.setenv("HOME", "/proc/none")  # nowhere to write: this process knows it
    assert secret.known(url) is None and secret.make(url) == secret.known(url)


@pytest.mark.parametrize("name", ["VLM_SERVER_SECRET", "VLLM_API_KEY"])
def test_a_secret_that_no_header_can_carry_is_refused_and_not_shown(name, monkeypatch, capfd):
    with service(vllm_routes()) as port:
        for word in ("two words", "two\nlines", "gr\u00fcn", "\x1b[1mx"):
            monkeypatch.setenv(name, word)
            with pytest.raises(ValueError, match=f"{name} must be of printable ASCII") as error:
                with sync.Server(config_for(port)):
                    pass
            assert word not in str(error.value) and word not in repr(error.value.__context__)
        monkeypatch.setenv(name, " word\n")  # as files and shells leave it
        assert list(secret.headers("http://x:1").values()) in (["word"], ["Bearer word"])
    assert secret.variable(name) == "word"


def test_the_middleware_asks_websockets_and_mounted_apps_too(monkeypatch):
    monkeypatch.setenv("VLM_SERVER_SECRET", "word")
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append(scope["path"])

    async def send(message):
        sent.append(message)

    guard = secret.AskSecret(app)
    header = [(secret.HEADER.lower().encode(), b"word")]
    for kind, path, root, headers in (
            ("http", "/health", "", []), ("http", "/api/health", "/api", []),
            ("http", "/pause", "", header), ("websocket", "/v1/realtime", "", header),
            ("http", "/pause", "", []), ("http", "/x/health", "", []),
            ("http", "/health/", "", []), ("websocket", "/health", "", []),
            ("http", "/pause", "", [(header[0][0], b"wor")])):
        scope = {"type": kind, "path": path, "root_path": root, "headers": headers}
        asyncio.run(guard(scope, None, send))
    assert reached == ["/health", "/api/health", "/pause", "/v1/realtime"]
    assert [m.get("status", m.get("code")) for m in sent if "body" not in m] == [
        401, 401, 401, 1008, 401]


def test_a_middleware_without_a_secret_does_not_let_everybody_pass(monkeypatch):
    for value in (None, ""):
        monkeypatch.delenv("VLM_SERVER_SECRET", raising=False)
        if value is not None:
            monkeypatch.setenv("VLM_SERVER_SECRET", value)
        with pytest.raises(ValueError, match="VLM_SERVER_SECRET is not set"):
            secret.AskSecret(None)


def test_own_middleware_and_keys_of_the_config_stand_beside_ours():
    config = MultimodalRLConfig(model=TINY, inference_args={"middleware": ["a.B", "c.D"],
                                                            "api_key": "word"})
    words = vllm_process.server_command(config)
    given = [words[i + 1] for i, word in enumerate(words) if word == "--middleware"]
    assert given == ["a.B", "c.D", "support.secret.AskSecret"] and "word" not in words
    for name in ("api-key", "max-model-len"):
        flags = {name: "word", "data-parallel-size": 2}
        config = MultimodalRLConfig(model=TINY, inference_args=flags)
        assert ("word" in vllm_process.server_command(config)) == (name != "api-key")


# ---- what is sampled

BENT = {"presence_penalty": 1.5, "frequency_penalty": -1.0, "repetition_penalty": 1.3,
        "temperature": 0.2, "top_k": 1, "top_p": 0.3, "min_p": 0.4, "max_tokens": 3}


@pytest.mark.parametrize("bent", [*[{k: v} for k, v in BENT.items()], BENT])
def test_no_default_of_model_or_server_bends_the_distribution(bent):
    """By vLLM's own translation of the request, with the defaults that a server may have."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    with service(vllm_routes()) as port:
        generator = Generator(Environment(train=[], eval=[], rewards=[]), config_for(port), [7])
    request = ChatCompletionRequest(messages=[], n=4, seed=1, **generator.sampling)
    plain, found = (request.to_sampling_params(8, defaults) for defaults in ({}, bent))
    assert found == plain
    assert (found.temperature, found.top_p, found.min_p, found.repetition_penalty) == (1, 1, 0, 1)
    assert (found.presence_penalty, found.frequency_penalty, found.min_tokens) == (0, 0, 0)
    assert found.top_k in (0, -1) and found.watermarking is False and found.max_tokens == 8


def test_every_default_that_the_server_knows_is_set_in_the_request():
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    with service(vllm_routes()) as port:
        generator = Generator(Environment(train=[], eval=[], rewards=[]), config_for(port))
    request = ChatCompletionRequest(messages=[])
    assert request._DEFAULT_SAMPLING_PARAMS.keys() <= generator.sampling.keys()


@pytest.mark.parametrize("key, value, fits", [
    ("temperature", 0.009, False), ("temperature", 2.001, False), ("temperature", 0.01, True),
    ("temperature", 2.0, True), ("seed", 2**23, False), ("seed", 2**23 - 1, True),
    ("seed", 2**40, False)])
def test_temperatures_and_seeds_that_the_server_bends_or_refuses_are_refused_here(key, value, fits):
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=f"{key} must be a"):
        MultimodalRLConfig(**{key: value})


def test_the_largest_seed_and_the_outermost_temperatures_are_sampled_with(server):
    for options in ({"seed": 2**23 - 1}, {"temperature": 2.0}, {"temperature": 0.01}):
        generator = generator_of(server, [asking(noise(56, 56))], [lambda *_, **__: 1.0], **options)
        assert len(generator.collect(generator.begin(0, 1, 4))) == 4


# ---- what rewards are given, and what they give

def canned_reply(*choices) -> dict:
    """A reply of the server: (token ids, finish_reason, message) of each completion."""
    return {"prompt_token_ids": [5, 6], "choices": [
        {"token_ids": ids, "finish_reason": reason, "message": message,
         "logprobs": {"content": [{"logprob": -1.0} for _ in ids]}} for ids, reason, message in choices]}


def rolled_out(reply: dict, functions, monkeypatch, row=None, **options):
    """The outputs of one job, whose completions the server replied."""
    tokenizer = make_trainer().tokenizer
    with service(vllm_routes()) as port:
        row = row or {"prompt": [{"role": "user", "content": "?"}]}
        environment = Environment(train=[row], eval=[], rewards=functions, **options)
        generator = Generator(environment, config_for(port, max_dropped=0.99,
                                                      generation_timeout=20),
                              decode=tokenizer.decode)
    monkeypatch.setattr(generator, "call", lambda *_: reply)
    job = Job(environment.train, 0, len(reply["choices"]), 0)
    return generator.collect(generator.submit([job])), tokenizer


@pytest.mark.parametrize("skip", [False, True])
def test_rewards_are_given_the_text_of_exactly_the_sampled_ids(monkeypatch, skip):
    """Whatever a parser made of it: nothing, a part, a call of a tool."""
    ids = make_trainer().tokenizer.get_vocab()
    red = make_trainer().tokenizer("red")["input_ids"]
    special, end = ids["<|vision_start|>"], ids["<|im_end|>"]
    seen = []

    def look(completion, answer, **info):
        seen.append(completion)
        return 1.0

    messages = [{"content": None, "reasoning": "red"}, {"content": "r"},
                {"content": "", "tool_calls": [{"function": {"name": "red"}}]}]
    outputs, tokenizer = rolled_out(canned_reply(
        ([special, *red, end], "stop", messages[0]), ([*red, special], "length", messages[1]),
        ([*red, end], "tool_calls", messages[2])), [look], monkeypatch, skip_special_tokens=skip)
    marked = "" if skip else "<|vision_start|>"
    assert seen == outputs.completion == [marked + "red", "red" + marked, "red"]
    assert [state["message"] for state in outputs.state] == messages
    assert outputs.completion_ids[0] == [special, *red, end]  # which is what is trained on


def test_on_a_real_server_rewards_see_the_sampled_tokens(server):
    seen = {}

    def look(completion, answer, **info):
        seen[completion] = seen.get(completion, 0) + 1
        return 1.0

    generator = generator_of(server, [asking(noise(56, 56))], [look], temperature=2.0)
    outputs = generator.collect(generator.submit([Job(generator.environment.train, 0, 48, 0)]))
    tokenizer = make_trainer().tokenizer
    for text_, ids, reason in zip(outputs.completion, outputs.completion_ids, outputs.finish_reason):
        assert text_ == tokenizer.decode(ids if reason == "length" else ids[:-1])
        assert seen[text_] > 0
    assert set(outputs.finish_reason) >= {"stop"}


class Says:
    """A reward that gives these in turn; exceptions are raised."""
    __name__ = "says"

    def __init__(self, *values):
        self.values = iter(values)

    def __call__(self, completion, answer, **info):
        value = next(self.values)
        if isinstance(value, BaseException):
            raise value
        return value


async def later(value):
    await asyncio.sleep(0.01)
    if isinstance(value, BaseException):
        raise value
    return value


@pytest.mark.parametrize("value, reward", [
    (decimal.Decimal("0.25"), 0.25), (fractions.Fraction(1, 4), 0.25), (numpy.float32(0.25), 0.25),
    (numpy.int64(3), 3.0), (torch.tensor(0.25), 0.25), (True, 1.0), ({"reward": 0.25}, 0.25),
    ("later", 0.25), ("later in a dict", 0.25)])
def test_numbers_of_every_kind_are_rewards(value, reward, monkeypatch):
    if isinstance(value, str):
        value = later({"reward": 0.25} if "dict" in value else 0.25)
    reply = canned_reply(*[([65, 66], "length", {})] * 3)
    outputs, _ = rolled_out(reply, [Says(1.0, value, 0)], monkeypatch, weights=[2.0])
    assert outputs.reward == [2.0, 2 * reward, 0.0] and outputs.dropped == []
    assert outputs.metrics == {"says": [1.0, reward, 0.0]}
    assert all(type(number) is float for number in outputs.reward + outputs.metrics["says"])


@pytest.mark.parametrize("value, said", [
    (SystemExit(3), "SystemExit: 3"), (KeyboardInterrupt(), "KeyboardInterrupt: without a word"),
    (decimal.Decimal("sNaN"), "ValueError"), (decimal.Decimal("Infinity"), "finite number"),
    (1j, "TypeError"), (10**400, "OverflowError"), ("1.0", "TypeError"), (None, "TypeError"),
    ({"score": 1}, "KeyError: 'reward'"), (1e308, "ValueError"), (StopIteration(), "without a word"),
    (ValueError("\x1b[2J\x1b]0;x\x07bad\r\nluck"), "ValueError: bad luck"),
    ("later", "OSError: gone"), ("later exit", "SystemExit: 4")])
def test_one_odd_reward_drops_its_completion_alone_with_a_reason(value, said, monkeypatch):
    if value == "later":
        value = later(OSError("gone"))
    elif value == "later exit":
        value = later(SystemExit(4))
    reply = canned_reply(*[([65, 66], "length", {})] * 4)
    start = time.monotonic()
    outputs, _ = rolled_out(reply, [Says(1.0, value, 0.5, later(1))], monkeypatch, weights=[10.0])
    assert outputs.reward == [10.0, 5.0, 10.0] and time.monotonic() - start < 10
    [reason] = outputs.dropped
    assert reason.startswith("example 0: ") and said in reason and reason.isprintable()


class Objects:
    """A reward that is an object, with an async __call__ or not."""
    __name__ = "objects"

    async def __call__(self, completion, answer, **info):
        return {"reward": fractions.Fraction(1, 2), "why": "half"}


class Subclass(float):
    pass


@pytest.mark.parametrize("value, reward", [
    (numpy.array([0.25]), 0.25), (numpy.array(0.25), 0.25), (torch.tensor([[0.25]]), 0.25),
    (numpy.bool_(True), 1.0), (Subclass(0.25), 0.25), ({"reward": numpy.int8(2), "x": 1}, 2.0)])
def test_arrays_of_one_number_are_rewards(value, reward, monkeypatch):
    reply = canned_reply(([65], "length", {}))
    outputs, _ = rolled_out(reply, [Says(value), Objects()], monkeypatch)
    assert outputs.reward == [reward + 0.5] and type(outputs.reward[0]) is float
    assert outputs.metrics == {"says": [reward], "objects": [0.5]}


class Unreadable(Exception):
    def __str__(self):
        raise OSError("no")


async def ends_its_loop(how):
    """In a task of its own, from which an exception reaches the loop itself."""
    async def child():
        if how == "stop":
            asyncio.get_running_loop().stop()
            return 1
        raise how

    await asyncio.gather(child())
    return 1


@pytest.mark.parametrize("value, said", [
    (asyncio.CancelledError(), "CancelledError: without a word"), (GeneratorExit(3), "Exit: 3"),
    (Unreadable(), "Unreadable: what it says cannot be read"), (numpy.zeros(2), "array of size 1"),
    ((x for x in "1"), "TypeError"), ({"reward": "1"}, "TypeError"),
    (OSError(5, "\x1b[2Jgone", "\x1b[1mfile"), "OSError: [Errno 5] gone: "),
    ("async SystemExit", "SystemExit: 4"), ("async KeyboardInterrupt", "KeyboardInterrupt"),
    ("async CancelledError", "CancelledError")])
def test_other_odd_rewards_drop_their_completion_alone(value, said, monkeypatch):
    if isinstance(value, str):
        kinds = {"SystemExit": SystemExit, "KeyboardInterrupt": KeyboardInterrupt,
                 "CancelledError": asyncio.CancelledError}
        value = ends_its_loop(kinds[value.split()[1]](4))
    reply = canned_reply(*[([65, 66], "length", {})] * 4)
    outputs, _ = rolled_out(reply, [Says(1.0, value, 0.5, later(1))], monkeypatch)
    assert outputs.reward == [1.0, 0.5, 1.0]
    [reason] = outputs.dropped
    assert said in reason and reason.isprintable()


def test_an_async_reward_that_stops_its_loop_stops_no_other(monkeypatch):
    reply = canned_reply(*[([65, 66], "length", {})] * 3)
    outputs, _ = rolled_out(reply, [Says(later(1), ends_its_loop("stop"), later(3))], monkeypatch)
    assert outputs.reward == [1.0, 1.0, 3.0]


def test_an_async_reward_that_blocks_the_loop_does_not_hold_up_all_others(monkeypatch):
    async def blocks():
        time.sleep(5)
        return 1

    monkeypatch.setattr(rewards, "PATIENCE", 0.5)
    threading.Thread(target=rewards.number, args=(blocks(),), daemon=True).start()
    time.sleep(0.2)
    start = time.monotonic()
    assert [rewards.number(later(i)) for i in range(3)] == [0, 1, 2]
    assert time.monotonic() - start < 3


def test_what_a_reward_does_to_its_arguments_reaches_no_other(monkeypatch):
    seen = []
    row = {"prompt": "?", "answer": ["a", {"b": [1]}], "info": {"wanted": [[1, 2], 3], "text": "t"}}

    def takes_away(completion, answer, wanted, **info):
        seen.append((json.dumps([answer, wanted]), info))
        answer[1]["b"].clear()
        wanted[0].pop()
        del wanted[1], answer[0]
        return 1.0

    def also(completion, answer, wanted, **info):
        return takes_away(completion, answer, wanted, **info)

    outputs, _ = rolled_out(canned_reply(*[([65], "length", {})] * 3), [takes_away, also],
                            monkeypatch, row=row)
    assert seen == [('[["a", {"b": [1]}], [[1, 2], 3]]', {"text": "t"})] * 6
    assert outputs.info == [{"wanted": [[1, 2], 3], "text": "t"}] * 3
    assert row["answer"] == ["a", {"b": [1]}]


@pytest.mark.parametrize("reason", ["abort", "error", "repetition", None])
def test_a_completion_that_the_server_broke_off_is_dropped(reason, monkeypatch):
    """It was not sampled to its end, and its last token is none that ends a turn."""
    reply = canned_reply(([65, 66], reason, {}), ([65, 66], "length", {}))
    outputs, _ = rolled_out(reply, [Says(1.0)], monkeypatch)
    assert outputs.finish_reason == ["length"] and outputs.reward == [1.0]
    assert outputs.dropped == [f"example 0: RuntimeError: the server broke it off ({reason})"]


def test_invalid_bytes_and_no_tokens_are_texts_too(monkeypatch):
    tokenizer = make_trainer().tokenizer
    [half, *_] = tokenizer("é")["input_ids"]
    end = tokenizer.get_vocab()["<|im_end|>"]
    reply = canned_reply(([half, end], "stop", {}), ([], "length", {}), ([end], "stop", {}))
    outputs, _ = rolled_out(reply, [Says(1.0, 2.0, 3.0)], monkeypatch)
    assert outputs.completion == [tokenizer.decode([half]), "", ""]
    assert outputs.reward == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("what", ["reward", "async reward", "row"])
def test_what_hangs_is_waited_for_as_long_as_said_and_the_pool_does_not_shrink(server, what):
    """Six prompts that hang, of twelve, with two requests at a time."""
    rows = [asking(noise(56, 56, i)) | {"info": {"hangs": i % 2}} for i in range(12)]

    def judge(completion, answer, hangs):
        if hangs and what == "async reward":
            return later_by_a_minute()
        if hangs and what == "reward":
            time.sleep(60)
        return 1.0

    async def later_by_a_minute():
        await asyncio.sleep(60)
        return 1.0

    class Rows(list):
        def __getitem__(self, i):
            if what == "row" and i % 2:
                time.sleep(60)
            return list.__getitem__(self, i)

    generator = generator_of(server, Rows(rows), [judge], generation_timeout=3, max_concurrent=2)
    good = [0, 2, 4, 6, 8, 10]
    for _ in range(2):
        jobs = [Job(generator.environment.train, i, 2, 2 * i) for i in range(12)]
        start = time.monotonic()
        outputs = generator.collect(generator.submit(jobs))
        waited = time.monotonic() - start
        assert outputs.example_id == [i for i in good for _ in range(2)]
        assert len(outputs.dropped) == 12
        assert all(f"no {what.split()[-1]} in 3 s" in reason for reason in outputs.dropped)
        assert waited < (3 + 4 if what != "row" else 3 * 3 + 6), waited  # rows: six, two at a time


def test_a_reward_that_hangs_loses_none_that_came_before_it(monkeypatch):
    class Waits(Says):
        def __call__(self, completion, answer, **info):
            value = super().__call__(completion, answer, **info)
            time.sleep(60 if value is None else 0)
            return value

    reply = canned_reply(*[([65, 66], "length", {})] * 4)
    monkeypatch.setattr(sys.modules[__name__], "config_for", lambda port, **_: MultimodalRLConfig(
        model=TINY, vllm_server_port=port, max_dropped=0.99, generation_timeout=1))
    outputs, _ = rolled_out(reply, [Waits(1.0, 0.5, None, 1.0)], monkeypatch)
    assert outputs.reward == [1.0, 0.5] and len(outputs.dropped) == 2


# ---- words of strangers

def test_what_strangers_say_is_printed_without_escape_sequences(tmp_path):
    evil = "\x1b[2J\x1b[31mred\x1b]8;;http://x\x07 \x9b5m\u202eevil\r\n\tnext\x00"
    assert text.plain(evil) == "red 5m evil next"
    with service({"/x": (400, evil)}) as port:
        with pytest.raises(RuntimeError) as error:
            server_http.call(f"http://127.0.0.1:{port}/x", timeout=5)
    assert str(error.value).isprintable() and "400 red" in str(error.value)
    (tmp_path / "vllm.log").write_text(f"ValueError: {evil}\nmore")
    assert vllm_process.last_errors(tmp_path / "vllm.log").isprintable()
    assert str(Failure(3, ValueError(evil))) == "example 3: ValueError: red 5m evil next"


def test_a_traceback_is_printed_without_escape_sequences(capsys):
    """Of strangers' words, causes and notes, too; its lines stay where they are."""
    evil = "\x1b[2J\x1b[31mred\x1b]8;;http://x\x07 \u202eevil\rnext"
    try:
        try:
            raise OSError(5, evil, evil)
        except OSError as error:
            error.add_note(evil)
            raise RuntimeError(f"a judge: {evil}") from error
    except RuntimeError as error:
        text.print_plainly(type(error), error, error.__traceback__)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.isprintable() for line in lines)
    assert "    raise OSError(5, evil, evil)" in lines
    assert "RuntimeError: a judge: red evil" in lines


def test_a_status_line_of_strangers_is_printed_plainly():
    class Evil(socketserver.StreamRequestHandler):
        def handle(self):
            self.rfile.readline()
            self.wfile.write(b"HTTP/1.1 418 \x1b[2J\x1b[31mred\r\nContent-Length: 0\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Evil) as web:
        threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
        with pytest.raises(server_http.Refusal) as error:
            server_http.call(f"http://127.0.0.1:{web.server_address[1]}/x", timeout=5)
        web.shutdown()
    assert str(error.value).isprintable() and str(error.value).endswith("/x: 418 red")


# ---- vf-vllm's command line

@pytest.mark.parametrize("words, wanted", [
    ("--model MODEL --port 8123 --tensor-parallel-size 2 --enforce-eager",
     {"model": TINY, "vllm_server_port": 8123, "inference_gpus": 2, "inference_args": {
         "tensor_parallel_size": 2, "enforce_eager": True}}),
    ("--model=MODEL --max-model-len=32k --gpu_memory_utilization 0.5 -dp 2 --no-enable-x",
     {"model": TINY, "inference_gpus": 2, "inference_args": {
         "max_model_len": "32k", "gpu_memory_utilization": 0.5, "data_parallel_size": 2,
         "enable_x": False}}),
    ("@ config.toml max_steps=3 --port 8123 --max-model-len 1024",
     {"vllm_server_port": 8123, "max_steps": 3, "env_id": "colors", "inference_args": {
         "enforce_eager": True, "dtype": "float32", "max_model_len": 1024,
         "limit_mm_per_prompt": {"image": 4}}}),
])
def test_the_flags_of_vf_vllm_are_understood(words, wanted, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["sync.py", *words.replace("MODEL", TINY).split()])
    config = server_flags.server_config()
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize("words, said", [
    ([], "usage: python sync.py @ config.toml"), (["--port", "8123"], "--model MODEL"),
    (["--model", "x", "--port", "8123", "y"], "'y' is no flag"),
    (["--model", "./none/such", "-tp", "two"], "there is no folder './none/such'"),
    (["--model", "x", "--port", "many"], "vllm_server_port must be int, not 'many'")])
def test_a_mistake_in_the_flags_is_one_line(words, said):
    run = subprocess.run([sys.executable, "sync.py", *words], cwd=ROOT, capture_output=True,
                         text=True, timeout=60)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and said in run.stderr
