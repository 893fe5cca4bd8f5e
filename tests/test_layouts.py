"""The GPU layouts, as far as they run without one: configs, flags and handshakes of vLLM's own."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import sync
from conftest import ROOT, make_trainer
from rollout import GenerateOutputs
from support.config import MultimodalRLConfig, load_config
from support.http import call
from support.vllm_process import server_command
from train import served

LAYOUTS = {  # config file -> (backend, flags of the server, GPUs of the server)
    "config.toml": ("gloo", {"tensor_parallel_size": 1, "dtype": "float32"}, 0),
    "configs/geometry3k-qwen2.5-vl-7b.toml": ("nccl", {"data_parallel_size": 4}, 4),
    "configs/grid.toml": ("gloo", {"tensor_parallel_size": 1, "dtype": "float32"}, 0),
    "configs/qwen2-vl-2b-24gb.toml": ("ipc", {"enable_sleep_mode": True}, 1),
    "configs/qwen2-vl-2b-shared-gpu.toml": ("ipc", {"enable_sleep_mode": True}, 1),
    "configs/qwen2-vl-7b.toml": ("nccl", {"tensor_parallel_size": 1}, 1),
    "configs/qwen2-vl-7b-node.toml": ("nccl", {"data_parallel_size": 4}, 4),
    "configs/qwen2-vl-72b-nodes.toml": ("nccl", {"tensor_parallel_size": 8, "host": "0.0.0.0"}, 8),
}


def test_every_config_file_is_a_layout():
    assert {"config.toml"} | {f"configs/{p.name}" for p in (ROOT / "configs").iterdir()} == {
        *LAYOUTS}


@pytest.mark.parametrize("path", LAYOUTS)
def test_the_layout_decides_backend_and_flags_and_vllm_understands_them(path, monkeypatch):
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    backend, flags, gpus = LAYOUTS[path]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    config = load_config(str(ROOT / path), ["vllm_server_host=127.0.0.1"])
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(
        server_command(config)[3:])
    assert config.backend == backend and config.server_gpus == gpus
    assert parsed.weight_transfer_config.backend == ("ipc" if backend == "ipc" else "nccl")
    assert {name: getattr(parsed, name) for name in flags} == flags
    assert parsed.logprobs_mode == "processed_logprobs" and parsed.limit_mm_per_prompt


def test_the_routes_that_are_called_exist(server):
    paths = call(f"{server.url}/openapi.json", method="get", timeout=10)["paths"]
    for route in ("/sleep", "/wake_up", "/pause", "/resume", "/weight_info", "/get_world_size",
                  "/update_weight_version", "/reset_encoder_cache", "/reset_mm_cache",
                  "/shutdown_weight_transfer_engine", "/start_weight_update", "/update_weights"):
        assert route in paths


def test_a_server_that_sleeps_is_woken_by_the_next_weights(monkeypatch):
    trainer, calls = make_trainer(async_steps=0, inference_args={"enable_sleep_mode": True}), []
    served = {"weight_version": "default"}

    def call(self, route, body=None, method="post"):
        if route == "update_weight_version":
            served["weight_version"] = body["new_version"]
        if route != "weight_info":
            calls.append(route)
        return served

    monkeypatch.setattr(sync.Server, "call", call)
    monkeypatch.setattr(sync.Server, "own_address", lambda self: "127.0.0.1")
    trainer.server.ours = True
    trainer.server.engine = SimpleNamespace(send_weights=lambda: calls.append("weights"))
    trainer.generator = SimpleNamespace(begin=lambda *_: None,
                                        collect=lambda _: GenerateOutputs())
    trainer.roll_out()
    trainer.step = 1
    assert calls[-1] == "sleep?level=1"
    trainer.send_weights()
    at = calls.index("sleep?level=1") + 1
    order = [route for route in calls[at:] if route in ("wake_up", "pause?mode=keep", "weights")]
    assert order == ["wake_up", "pause?mode=keep", "weights"]
    with pytest.raises(ValueError, match="enable_sleep_mode needs async_steps = 0"):
        MultimodalRLConfig(inference_args={"enable_sleep_mode": True})


def test_lengths_may_be_written_as_vllm_reads_them():
    config = MultimodalRLConfig(inference_args={"max_model_len": "32k"})
    command = server_command(config)
    assert command[command.index("--max-model-len") + 1] == "32k"


@pytest.mark.parametrize("kinds, caches", [
    (["full_attention", "sliding_attention"], True), (["linear_attention", "full_attention"], False),
    (["conv", "full_attention"], False), (None, True)])
def test_a_server_on_cpus_does_not_cache_the_prefixes_of_hybrids(tmp_path, kinds, caches):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"layer_types": kinds}}))
    command = server_command(MultimodalRLConfig(model=str(tmp_path)))
    assert ("--no-enable-prefix-caching" in command) == (not caches)


def test_ipc_meets_vllms_own_worker_engine(monkeypatch):
    """Handshake only: the handles of the tensors themselves need a GPU."""
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory, clients
    trainer = make_trainer()
    worker = WeightTransferEngineFactory.create_engine(
        WeightTransferConfig(backend="ipc"), SimpleNamespace(parallel_config=None,
                                                             model_config=None),
        torch.device("cpu"), trainer.model)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="0"))
    monkeypatch.setattr(clients.HTTPVLLMWeightSyncClient, "init_weight_transfer_engine",
                        lambda self, info: worker.init_transfer_engine(
                            worker.parse_init_info(info)))
    monkeypatch.setattr(sync.Server, "call", lambda *_, **__: {})
    monkeypatch.setattr(MultimodalRLConfig, "backend", "ipc")
    engine = trainer.server.meet(trainer.source)
    assert engine.packed and worker.packed and engine.source is trainer.source
    assert [m.name for m in engine.source.metadata()] == [name for name, _ in trainer.source]


def test_several_trainer_gpus_become_torchrun(monkeypatch):
    started = []

    def become(path, words):
        started.append(words)
        raise SystemExit  # this process is gone

    monkeypatch.setattr("os.execv", become)
    monkeypatch.setattr(sys, "argv", ["train.py", "@", "config.toml", "max_steps=3"])
    config = load_config(str(ROOT / "config.toml"), ["trainer.gpus=4"])
    with pytest.raises(SystemExit), served(config):
        pass
    assert started == [[sys.executable, "-m", "torch.distributed.run", "--standalone",
                        "--nproc-per-node=4", "train.py", "@", "config.toml", "max_steps=3"]]
