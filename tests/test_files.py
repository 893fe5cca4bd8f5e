"""Files, folders, signals and GPUs as users have them. No test here needs a server."""
import contextlib
import dataclasses
import errno
import fcntl
import io
import json
import math
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

import train
from adapter import MultimodalAdapter
from conftest import ROOT, TINY, canned, make_trainer, noise
from processes import kill
from support import vllm_process
from support.checkpoint import checksums, is_whole
from support.config import MultimodalRLConfig, load_config
from support.loading import load_model, trainer_gpu
from support.lock import owned, take
from sync import Server


def without_server(trainer, seconds: float = 0.0):
    """The trainer with a loop that trains on canned rollouts; `seconds` is how long they take."""
    outputs = canned(trainer, [([noise(56, 56)], [2, 3])])

    def roll_out():
        time.sleep(seconds)
        return outputs

    trainer.roll_out, trainer.send_weights, trainer.checked = roll_out, lambda: None, True
    return trainer


def at_step(trainer, *steps: int):
    """Save the trainer at each of these steps."""
    for step in steps:
        trainer.step = step
        trainer.save()
    return trainer


def saved(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("checkpoint-")}


def new_run(tmp_path: Path, **options):
    trainer = make_trainer(output_dir=str(tmp_path), **options)
    trainer.records.open(trainer.past_metrics)
    return trainer


# ---- resume with other values

def moved(trainer) -> torch.Tensor:
    """The head after one step of AdamW without a gradient: what weight decay alone does."""
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.param_groups[0]["lr"] = 0.5
    trainer.optimizer.step()
    return trainer.model.get_input_embeddings().weight.detach().clone()


def test_a_resumed_optimizer_has_the_new_values_and_a_line_says_so(tmp_path, capsys):
    before = at_step(new_run(tmp_path, weight_decay=0.1, learning_rate=1e-3), 1)
    weight = before.model.get_input_embeddings().weight.detach().clone()
    capsys.readouterr()
    after = make_trainer(output_dir=str(tmp_path), resume=True, weight_decay=0.4,
                         learning_rate=1e-4)
    said = capsys.readouterr().out
    assert "learning_rate: 0.001 -> 0.0001" in said and "weight_decay: 0.1 -> 0.4" in said
    assert after.optimizer.param_groups[0]["lr"] == 1e-4
    for group in before.optimizer.state.values():
        group["exp_avg"].zero_()
    assert torch.allclose(moved(after), weight * (1 - 0.5 * 0.4))


def test_what_makes_it_another_run_is_announced_and_nothing_else_is(tmp_path, capsys):
    at_step(new_run(tmp_path, env_args={"n": 3}), 1)
    capsys.readouterr()
    same = dict(output_dir=str(tmp_path), env_args={"n": 3}, resume=True)
    make_trainer(**same)
    assert "other values" not in capsys.readouterr().out
    make_trainer(**same | {"seed": 4, "batch_size": 16, "env_args": {"n": 5}, "max_steps": 7})
    [line] = [line for line in capsys.readouterr().out.splitlines() if "other values" in line]
    for change in ("seed: 0 -> 4", "batch_size: 8 -> 16", 'env_args: {"n": 3} -> {"n": 5}',
                   "max_steps: 500 -> 7"):
        assert change in line
    assert line.count("->") == 4


def test_a_checkpoint_that_does_not_know_its_config_is_resumed(tmp_path):
    at_step(new_run(tmp_path, weight_decay=0.1), 3)
    path = tmp_path / "run" / "checkpoint-3"
    state = torch.load(path / "trainer.pt", weights_only=True)
    del state["config"]
    torch.save(state, path / "trainer.pt")
    assert not is_whole(path)
    (path / "checksums.json").write_text(json.dumps(checksums(path)))
    trainer = make_trainer(output_dir=str(tmp_path), resume=True, weight_decay=0.2)
    assert trainer.step == 3 and trainer.optimizer.param_groups[0]["weight_decay"] == 0.2


def test_a_key_that_is_younger_than_the_checkpoint_had_its_default(tmp_path, capsys):
    at_step(new_run(tmp_path, temperature=0.5), 1)
    path = tmp_path / "run" / "checkpoint-1"
    state = torch.load(path / "trainer.pt", weights_only=True)
    config = json.loads(state["config"])
    del config["kl_warning"], config["max_steps"]
    torch.save(state | {"config": json.dumps(config | {"long_gone": 1})}, path / "trainer.pt")
    (path / "checksums.json").write_text(json.dumps(checksums(path)))
    capsys.readouterr()
    make_trainer(output_dir=str(tmp_path), resume=True, temperature=0.5, kl_warning=0.2)
    said = capsys.readouterr().out
    assert "other values than it had until then: kl_warning: null -> 0.2\n" in said


def test_a_checkpoint_of_more_gpus_is_resumed_on_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.zeros(16).byte()] * 4)
    at_step(new_run(tmp_path), 1)
    restored = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.extend)
    assert make_trainer(output_dir=str(tmp_path), resume=True).step == 1 and len(restored) == 2


def test_a_secret_stands_in_no_checkpoint_and_in_no_line(tmp_path, capfd):
    options = {"inference_args": {"api_key": "sk-secret-1", "dtype": "float32"},
               "env_args": {"judge_api_key": "sk-secret-2", "n": 1}}
    trainer = without_server(make_trainer(output_dir=str(tmp_path), max_steps=1, **options))
    trainer.train()
    make_trainer(output_dir=str(tmp_path), resume=True, inference_args={"api_key": "sk-secret-3"})
    said = "".join(capfd.readouterr())
    assert 'env_args: {"n": 1} -> {}' in said and "sk-secret" not in said
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"sk-secret" not in path.read_bytes(), path
    (tmp_path / "c.toml").write_text(HEAD + '[inference.args]\napi_key: "sk-secret-4"')
    with pytest.raises(ValueError) as error:
        load_config(str(tmp_path / "c.toml"))
    assert "at line 5" in str(error.value) and "sk-secret" not in str(error.value)


# ---- saving

def with_generation_config(tmp_path: Path, values: dict) -> str:
    folder = shutil.copytree(TINY, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(values))
    return str(folder)


class NoServer:
    """A server that must not be asked for: what is wrong is known before."""

    def __enter__(self):
        raise AssertionError("the server was started")


@pytest.mark.parametrize("values, said", [
    ({"do_sample": False, "temperature": 0.3}, "temperature"),
    ({"do_sample": False, "top_p": 0.5}, "top_p"),
    ({"num_beams": 1, "length_penalty": 2.0}, "length_penalty"),
])
def test_a_model_that_cannot_be_saved_is_refused_before_the_server_starts(
        tmp_path, monkeypatch, values, said):
    monkeypatch.setattr(Server, "__enter__", NoServer.__enter__)
    config = load_config(str(ROOT / "config.toml"), [
        f"model={with_generation_config(tmp_path, values)}", f"output_dir={tmp_path}"])
    with pytest.raises(ValueError, match=f"could not be saved.*{said}"), train.served(config):
        pass
    assert list((tmp_path / "colors").iterdir()) == []


def test_a_processor_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path, monkeypatch):
    trainer = without_server(make_trainer(output_dir=str(tmp_path), max_steps=3))
    monkeypatch.setattr(trainer.adapter.processor, "save_pretrained",
                        lambda *_: json.dumps(object()))
    with pytest.raises(ValueError, match="could not be saved.*not JSON serializable"):
        trainer.train()
    assert trainer.step == 0


@contextlib.contextmanager
def full_disk():
    """Files of this process end at 200 kB; the weights take more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_on_a_full_disk_loses_nothing_and_is_tried_again(tmp_path):
    trainer = at_step(new_run(tmp_path, keep_checkpoints=1), 1)
    folder = tmp_path / "run"
    trainer.step = 2
    with full_disk(), pytest.raises(Exception):
        trainer.save()
    assert trainer.saved_step == 1 and is_whole(folder / "checkpoint-1")
    assert not (folder / "unfinished").exists()  # its space is free again
    trainer.save()
    assert trainer.saved_step == 2 and saved(folder) == {"checkpoint-2"}
    assert is_whole(folder / "checkpoint-2")


def test_metrics_that_a_full_disk_does_not_take_are_written_when_it_does(tmp_path, capsys):
    trainer = without_server(make_trainer(output_dir=str(tmp_path), max_steps=4,
                                          log_every_steps=1))
    path, log = tmp_path / "run" / "metrics.jsonl", trainer.log

    def log_on_a_full_disk(*arguments):
        if trainer.step not in (2, 3):
            return log(*arguments)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, hard))
        try:
            log(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    trainer.log = log_on_a_full_disk
    trainer.train()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert "rollouts of step 3 could not be written" in capsys.readouterr().out
    assert saved(tmp_path / "run") == {"checkpoint-4"}


def test_a_disk_that_is_full_in_the_middle_of_the_trainers_state_is_named(tmp_path):
    trainer = new_run(tmp_path)
    trainer.step, large, write = 1, torch.zeros(300_000), torch.save
    with pytest.MonkeyPatch.context() as patch, full_disk():
        patch.setattr(trainer.policy.model, "save_pretrained", lambda *_, **__: None)
        patch.setattr(torch, "save", lambda state, path: write([state, large], path))
        with pytest.raises(OSError, match="trainer.pt was cut: is the disk full"):
            trainer.save()
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "metrics.jsonl"]


def test_a_save_that_a_second_sigterm_interrupts_leaves_nothing_half_done(tmp_path, monkeypatch):
    trainer = at_step(new_run(tmp_path), 1)
    trainer.step = 2
    monkeypatch.setattr(trainer.adapter.processor, "save_pretrained", lambda *_: sys.exit(143))
    with pytest.raises(SystemExit):
        trainer.save()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"metrics.jsonl", "checkpoint-1"}
    assert is_whole(tmp_path / "run" / "checkpoint-1")


def failing(trainer, at_saves: set[int]):
    """The trainer with a processor whose saves of these numbers fail; 0 is the rehearsal."""
    processor, save = trainer.adapter.processor, trainer.adapter.processor.save_pretrained
    saves = iter(range(100))

    def save_pretrained(folder):
        if next(saves) in at_saves:
            raise OSError(28, "No space left on device")
        return save(folder)

    processor.save_pretrained = save_pretrained
    return trainer


def test_a_run_goes_on_when_a_save_fails_and_tries_it_after_the_next_step(tmp_path, capsys):
    # Saves: 1 rehearsal, step 2 fails, step 3 makes up for it, step 4, step 5 (the end).
    trainer = failing(without_server(make_trainer(
        output_dir=str(tmp_path), max_steps=5, save_every_steps=2, keep_checkpoints=9)), {1})
    trainer.train()
    assert saved(tmp_path / "run") == {"checkpoint-3", "checkpoint-4", "checkpoint-5"}
    assert "step 2 could not be saved" in capsys.readouterr().out


def test_the_last_save_is_tried_twice_and_then_ends_the_run_with_its_error(tmp_path):
    trainer = failing(without_server(make_trainer(output_dir=str(tmp_path), max_steps=1)), {1})
    trainer.train()
    assert saved(tmp_path / "run") == {"checkpoint-1"}
    trainer = failing(without_server(make_trainer(output_dir=str(tmp_path), max_steps=1)), {1, 2})
    with pytest.raises(OSError, match="No space left"):
        trainer.train()


def test_an_error_is_not_hidden_by_that_of_the_save_after_it(tmp_path):
    trainer = failing(without_server(make_trainer(
        output_dir=str(tmp_path), max_steps=9, save_every_steps=1)), {3})
    steps, log = [], trainer.log

    def judge(*arguments):
        steps.append(len(steps))
        if len(steps) == 3:
            raise RuntimeError("the judge is gone")
        log(*arguments)

    trainer.log = judge
    with pytest.raises(RuntimeError, match="the judge is gone"):
        trainer.train()
    assert saved(tmp_path / "run") == {"checkpoint-1", "checkpoint-2"}
    assert is_whole(tmp_path / "run" / "checkpoint-2")


# ---- what in a run folder is ours

def test_checkpoints_are_ordered_by_step_whatever_their_times(tmp_path):
    trainer, folder = new_run(tmp_path), tmp_path / "run"
    at_step(trainer, 8, 9)
    for step in (8, 9):
        os.utime(folder / f"checkpoint-{step}", (2e9, 2e9))  # by a sync tool, or a clock
    at_step(trainer, 10)
    assert saved(folder) == {"checkpoint-9", "checkpoint-10"}
    os.utime(folder / "checkpoint-9", (3e9, 3e9))
    assert make_trainer(output_dir=str(tmp_path), resume=True).step == 10


def test_what_stands_beside_checkpoints_is_neither_deleted_nor_resumed_nor_an_error(tmp_path):
    trainer, folder = at_step(new_run(tmp_path, keep_checkpoints=1), 1), tmp_path / "run"
    for name in ("checkpoint-best", "checkpoint-007", "checkpoint-1.bak", "checkpoint-99"):
        shutil.copytree(folder / "checkpoint-1", folder / name)
    with tarfile.open(folder / "checkpoint-1.tar.gz", "w:gz") as archive:
        archive.add(folder / "checkpoint-1")
    (folder / "checkpoint-latest").symlink_to("checkpoint-1")
    (folder / "checkpoint-98").symlink_to(folder / "checkpoint-best")
    (folder / "checkpoint-97").write_text("a file")
    (folder / "checkpoint-500").mkdir()  # of another trainer
    (folder / "checkpoint-500" / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-0").mkdir()
    others = saved(folder) - {"checkpoint-1", "checkpoint-99"}
    sums = {name: (folder / name / "checksums.json").read_text()
            for name in ("checkpoint-best", "checkpoint-007", "checkpoint-1.bak")}
    at_step(trainer, 2, 3)
    assert others <= saved(folder) and "checkpoint-1" not in saved(folder)
    assert saved(folder) - others <= {"checkpoint-3", "checkpoint-99"}
    for name, text in sums.items():
        assert is_whole(folder / name) and (folder / name / "checksums.json").read_text() == text
    assert make_trainer(output_dir=str(tmp_path), resume=True).step == 3


def test_what_stands_where_a_checkpoint_belongs_is_moved_aside_not_deleted(tmp_path):
    trainer, folder = new_run(tmp_path), tmp_path / "run"
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4" / "mine.txt").write_text("precious")
    (folder / "checkpoint-5").symlink_to(tmp_path)
    at_step(trainer, 4, 5)
    assert is_whole(folder / "checkpoint-4") and is_whole(folder / "checkpoint-5")
    [kept] = tmp_path.glob("run-past-*/checkpoint-4/mine.txt")
    assert kept.read_text() == "precious"
    [link] = tmp_path.glob("run-past-*/checkpoint-5")
    assert link.is_symlink() and tmp_path.is_dir()


def test_a_run_resumed_from_an_earlier_checkpoint_keeps_what_it_saves(tmp_path):
    folder = tmp_path / "run"
    at_step(new_run(tmp_path, keep_checkpoints=9), 2, 4, 6)
    trainer = make_trainer(output_dir=str(tmp_path), keep_checkpoints=1,
                           resume=str(folder / "checkpoint-2"))
    trainer.records.open(trainer.past_metrics)
    assert trainer.step == 2 and len(saved(folder)) == 3
    at_step(trainer, 3)
    assert saved(folder) == {"checkpoint-3"}
    assert make_trainer(output_dir=str(tmp_path), resume=True).step == 3
    assert {path.name for path in tmp_path.glob("run-past-*/*")} == {"checkpoint-4", "checkpoint-6"}


@pytest.mark.parametrize("name", [".DS_Store", "notes/why.md", "model.onnx"])
def test_a_harmless_extra_file_does_not_damage_a_checkpoint(tmp_path, name):
    at_step(new_run(tmp_path), 1)
    extra = tmp_path / "run" / "checkpoint-1" / name
    extra.parent.mkdir(exist_ok=True)
    extra.write_text("x")
    assert make_trainer(output_dir=str(tmp_path), resume=True).step == 1


@pytest.mark.parametrize("sums", ["{}", "[]", "null", '{"trainer.pt": "0"}'])
def test_sums_that_say_nothing_make_no_whole_checkpoint(tmp_path, sums):
    at_step(new_run(tmp_path), 1)
    (tmp_path / "run" / "checkpoint-1" / "checksums.json").write_text(sums)
    assert not is_whole(tmp_path / "run" / "checkpoint-1")


@pytest.mark.parametrize("removed", ["metrics.jsonl", "."])
def test_a_run_goes_on_when_a_user_removes_its_files(tmp_path, removed):
    trainer = without_server(make_trainer(output_dir=str(tmp_path), max_steps=4,
                                          save_every_steps=2))
    log = trainer.log

    def remove(*arguments):
        log(*arguments)
        if trainer.step == 1 and removed == ".":
            shutil.rmtree(tmp_path / "run")
        elif trainer.step == 1:
            os.remove(tmp_path / "run" / "metrics.jsonl")

    trainer.log = remove
    trainer.train()
    assert saved(tmp_path / "run") == {"checkpoint-2", "checkpoint-4"}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3, 4]
    again = make_trainer(output_dir=str(tmp_path), resume=True)
    again.records.open(again.past_metrics)
    assert again.step == 4 and saved(tmp_path / "run") == {"checkpoint-2", "checkpoint-4"}


def test_without_metrics_a_checkpoint_is_resumed_and_an_earlier_run_set_aside(tmp_path):
    trainer = new_run(tmp_path)
    os.remove(tmp_path / "run" / "metrics.jsonl")
    at_step(trainer, 7)  # no line was written since
    again = make_trainer(output_dir=str(tmp_path), resume=True)
    again.records.open(again.past_metrics)
    assert again.step == 7 and saved(tmp_path / "run") == {"checkpoint-7"}
    os.remove(tmp_path / "run" / "metrics.jsonl")
    at_step(new_run(tmp_path), 1)  # anew: not among the checkpoints of the earlier run
    assert saved(tmp_path / "run") == {"checkpoint-1"}
    assert list(tmp_path.glob("run-past-*/checkpoint-7"))


# ---- the run folder

@pytest.mark.parametrize("name", ["", " ", ".", "./", "..", "../other", "/tmp/run", "a/../..",
                                  "a/..", "run\n", "a/../b", "x" * 201, "a/" + "ä" * 101])
def test_a_run_name_that_is_no_folder_in_output_dir_is_refused(name):
    with pytest.raises(ValueError, match="run_name must name a folder in output_dir"):
        MultimodalRLConfig(run_name=name)


def test_other_run_names_are_folders_in_output_dir():
    for name in ("run", "my run.1", "sweep/lr-3", "läuft", "..x"):
        assert MultimodalRLConfig(run_name=name).run_dir == Path("outputs", name)
    with pytest.raises(ValueError, match="output_dir must not be empty"):
        MultimodalRLConfig(output_dir="")
    assert str(load_config(str(ROOT / "config.toml"), [f"model={TINY}", "output_dir=~/x"])
               .output_dir) == os.path.expanduser("~/x")


@pytest.mark.parametrize("what", ["a file", "a file in it", "/proc/no", "a broken link"])
def test_an_output_dir_that_cannot_be_written_is_found_before_the_server(
        tmp_path, monkeypatch, what):
    monkeypatch.setattr(Server, "__enter__", NoServer.__enter__)
    place = tmp_path / "out"
    if what == "a file":
        place.write_text("")
    elif what == "a file in it":
        place.mkdir()
        (place / "colors").write_text("")
    elif what == "a broken link":
        place.symlink_to(tmp_path / "nowhere" / "at" / "all")
    else:
        place = what
    config = load_config(str(ROOT / "config.toml"), [f"model={TINY}", f"output_dir={place}"])
    with pytest.raises(ValueError, match=f"{place}.* cannot be written .*see output_dir"):
        with train.served(config):
            pass


def test_an_output_dir_that_cannot_be_written_is_one_line_and_code_2():
    run = subprocess.run([sys.executable, "train.py", "@", "config.toml", "output_dir=/proc/no"],
                         cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and run.stderr.startswith("error: /proc/no/colors cannot be written")
    assert len(run.stderr.splitlines()) == 1 == len(run.stdout.splitlines())


RUNS = """
import contextlib, signal, sys
signal.signal(signal.SIGHUP, getattr(signal, {hangups!r}))
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import train
from support.config import command_line
from conftest import make_trainer
from test_files import without_server

@contextlib.contextmanager
def served(config):
    yield without_server(make_trainer(output_dir=config.output_dir, max_steps=10_000), 0.1)

train.served = served
sys.argv = ["train.py", "@", {root!r} + "/config.toml", *sys.argv[1:]]
train.main(command_line("train.py"))
"""


@contextlib.contextmanager
def run_of(tmp_path: Path, hangups: str = "SIG_DFL", **options):
    """A process that trains run `run` in tmp_path, without a server, until it is told to stop."""
    words = [f"model={TINY}", f"output_dir={tmp_path}"]
    run = subprocess.Popen([sys.executable, "-c", RUNS.format(root=str(ROOT), hangups=hangups),
                            *words], cwd=ROOT, **options)
    try:
        wait_for_steps(tmp_path, 2, run)
        yield run
    finally:
        kill(run)
        run.wait()


def wait_for_steps(tmp_path: Path, count: int, run) -> None:
    path, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.02)


def test_a_run_folder_in_use_is_not_taken_and_its_owner_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "__enter__", NoServer.__enter__)
    with run_of(tmp_path) as run:
        owner = Path(f"/proc/{run.pid}/comm").read_text().strip()
        for resume in (False, True):
            second = without_server(make_trainer(output_dir=str(tmp_path), max_steps=1,
                                                 resume=resume))
            with pytest.raises(ValueError, match=f"run is in use by process {owner} on .*since"):
                second.train()
        config = load_config(str(ROOT / "config.toml"), [
            f"model={TINY}", f"output_dir={tmp_path}", "run_name=run"])
        with pytest.raises(ValueError, match=f"in use by process {owner}"), train.served(config):
            pass
        assert not list(tmp_path.glob("run-past-*"))
        wait_for_steps(tmp_path, 5, run)  # it was not disturbed
        without_server(make_trainer(output_dir=str(tmp_path), run_name="other",
                                    max_steps=1)).train()
    second = without_server(make_trainer(output_dir=str(tmp_path), max_steps=1))
    second.train()  # the first one was killed: nothing has to be cleaned up
    assert saved(tmp_path / "run") == {"checkpoint-1"}
    assert not list(tmp_path.glob("*.lock"))


def test_two_runs_after_each_other_in_one_process_are_two_owners(tmp_path):
    for _ in range(2):
        without_server(make_trainer(output_dir=str(tmp_path), max_steps=1)).train()
    assert len(list(tmp_path.glob("run-past-*"))) == 1


def test_a_run_folder_is_the_same_by_a_link_or_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "alias").symlink_to(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "linked").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    held = take(Path(f"{(tmp_path / 'run').resolve()}.lock"), Path("run"))
    for folder in ("run", "./run", "alias/run", "linked", str(tmp_path / "alias" / "linked")):
        with pytest.raises(ValueError, match=f"^{Path(folder)} is in use by process"):
            with owned(Path(folder)):
                pass
    held.close()
    with owned(Path("linked")):
        assert Path("run.lock").exists() and not Path("linked.lock").exists()


def test_a_run_folder_by_a_link_stays_one_when_a_run_starts_anew(tmp_path):
    (tmp_path / "disk" / "r").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "r")
    for _ in range(2):
        without_server(make_trainer(output_dir=str(tmp_path), max_steps=1)).train()
    assert (tmp_path / "run").is_symlink() and saved(tmp_path / "disk" / "r") == {"checkpoint-1"}
    [earlier] = (tmp_path / "disk").glob("r-past-*")
    assert {path.name for path in earlier.iterdir()} == {"metrics.jsonl", "checkpoint-1",
                                                         "rollouts", "report.html"}


def test_a_run_that_starts_anew_leaves_runs_and_files_in_its_folder_alone(tmp_path):
    outer, inner = tmp_path / "run", tmp_path / "run" / "lr-3"
    without_server(make_trainer(output_dir=str(tmp_path), max_steps=1)).train()
    at_step(new_run(outer, run_name="lr-3"), 5)
    (outer / "notes.md").write_text("mine")
    shutil.copytree(outer / "checkpoint-1", outer / "checkpoint-1 (copy)")
    without_server(make_trainer(output_dir=str(tmp_path), max_steps=2)).train()
    assert saved(inner) == {"checkpoint-5"} and (inner / "metrics.jsonl").exists()
    assert saved(outer) == {"checkpoint-2", "checkpoint-1 (copy)"}
    assert (outer / "notes.md").read_text() == "mine"
    assert list(tmp_path.glob("run-past-*/checkpoint-1"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_the_lock_of_another_user_is_respected_and_one_that_is_left_is_taken(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder, "run.lock")
        held = take(path, Path("run"))
        os.seteuid(65534)
        try:
            with pytest.raises(ValueError, match=f"run is in use by process {os.getpid()} on"):
                take(path, Path("run"))
            held.close()  # as when it was killed
            mine = take(path, Path("run"))
        finally:
            os.seteuid(0)
        assert mine.writable() and path.stat().st_uid == 65534
        mine.close()


def test_a_file_system_without_locks_is_said_to_be_one(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    without_server(make_trainer(output_dir=str(tmp_path), max_steps=1)).train()
    assert "run cannot be locked (No locks available)" in capsys.readouterr().out
    assert saved(tmp_path / "run") == {"checkpoint-1"}


# ---- a terminal that is closed

def test_sighup_finishes_the_step_and_saves(tmp_path):
    with run_of(tmp_path) as run:
        kill(run, signal.SIGHUP)
        assert run.wait(60) == 128 + signal.SIGHUP
        steps = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
        assert is_whole(tmp_path / "run" / f"checkpoint-{steps}")


STARTS = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.path[:0] = [{root!r}]
from support.config import command_line, mistakes

sys.argv = ["x.py", "@", {root!r} + "/config.toml"]
with mistakes():
    command_line("x.py")
    try:
        signal.raise_signal(signal.SIGHUP)
    finally:
        print("the server was stopped", file=open({out!r}, "w"))
"""


def test_sighup_before_the_first_step_stops_the_server_that_is_starting(tmp_path):
    script = STARTS.format(root=str(ROOT), out=str(tmp_path / "out"))
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120)
    assert run.returncode == 128 + signal.SIGHUP
    assert (tmp_path / "out").read_text() == "the server was stopped\n"


def test_a_closed_terminal_which_takes_no_line_and_hangs_up_twice_is_a_sigterm(tmp_path):
    terminal, end = pty.openpty()
    with run_of(tmp_path, stdin=end, stdout=end, stderr=end) as run:
        os.close(end)
        os.close(terminal)
        for _ in range(2):  # by the kernel, and by the shell
            kill(run, signal.SIGHUP)
            time.sleep(0.01)
        assert run.wait(60) == 128 + signal.SIGHUP
        steps = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
        assert is_whole(tmp_path / "run" / f"checkpoint-{steps}")


def test_a_run_under_nohup_goes_on_when_the_terminal_is_closed(tmp_path):
    with run_of(tmp_path, hangups="SIG_IGN") as run:
        kill(run, signal.SIGHUP)
        wait_for_steps(tmp_path, 6, run)
        kill(run, signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM


# ---- GPUs

@pytest.mark.parametrize("visible, gpus, for_server, for_trainer", [
    (None, 1, "0", 1), (None, 2, "0,1", 2), ("5", 1, "5", 1), ("3,1", 1, "3", 1),
    ("6, 7,2", 2, "6,7", 2), ("GPU-1f,GPU-2e", 1, "GPU-1f", 1),
    ("MIG-a,MIG-b", 1, "MIG-a", 0), ("MIG-GPU-x/1/0,MIG-GPU-x/2/0,4", 2,
                                    "MIG-GPU-x/1/0,MIG-GPU-x/2/0", 2),
])
def test_gpus_are_positions_in_the_users_list(
        tmp_path, monkeypatch, visible, gpus, for_server, for_trainer):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    used = pretend_cuda(monkeypatch)
    config = MultimodalRLConfig(model=TINY, inference_gpus=gpus)
    if visible != "5":  # which has none for the trainer
        load_model(config)
        assert used == [for_trainer]
        own = "MIG-b" if visible == "MIG-a,MIG-b" else visible
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == own
    started = {}

    def popen(_, env, **__):
        started.update(env)
        return SimpleNamespace(stdin=io.BytesIO())

    monkeypatch.setattr(subprocess, "Popen", popen)
    for _ in range(2):  # also when it is started again
        vllm_process.start(config, tmp_path / "log")
        assert started["CUDA_VISIBLE_DEVICES"] == for_server


def pretend_cuda(monkeypatch) -> list[int]:
    """As if there were GPUs; the list of the devices that are set."""
    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: self)
    return used


@pytest.mark.parametrize("visible, gpus, shown", [
    ("5", 1, "5"), ("GPU-1f,GPU-2e", 2, "GPU-1f,GPU-2e"), ("MIG-a", 1, "MIG-a"),
    ("3,-1,2", 1, "3"), ("0,1,", 2, "0,1"), ("6,NoDevFiles", 1, "6"), (None, 4, "0,1,2,3")])
def test_too_short_a_list_of_gpus_is_refused(monkeypatch, visible, gpus, shown):
    """CUDA, too, sees no entry after the first that names no GPU."""
    pretend_cuda(monkeypatch)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=f"^inf.* ask for {gpus + 1} GPUs, but .*: {shown}$"):
        load_model(MultimodalRLConfig(model=TINY, inference_gpus=gpus))


def test_each_rank_and_a_trainer_that_shares_its_gpu_has_its_place(monkeypatch):
    config = MultimodalRLConfig(inference_gpus=2, trainer_gpus=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert trainer_gpu(config) == 3
    assert trainer_gpu(dataclasses.replace(config, vllm_server_host="10.0.0.7")) == 1
    monkeypatch.delenv("LOCAL_RANK")
    assert trainer_gpu(dataclasses.replace(config, trainer_gpus=0)) == 0
    assert trainer_gpu(dataclasses.replace(config, inference_gpus=0)) == 1  # its server takes one


# ---- numbers

@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}])
def test_weights_that_are_not_finite_are_not_saved_over_a_good_state(tmp_path, bad, options):
    trainer, folder = at_step(new_run(tmp_path, keep_checkpoints=1, **options), 1), tmp_path / "run"
    trained = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        trained[-1][1].view(-1)[-1] = bad
    trainer.step = 2
    with pytest.raises(ValueError, match=f"after step 2 are not finite: .*{trained[-1][0]}"):
        trainer.save()
    assert saved(folder) == {"checkpoint-1"} and is_whole(folder / "checkpoint-1")
    assert make_trainer(output_dir=str(tmp_path), resume=True, **options).step == 1


@pytest.mark.parametrize("explode_to", [math.inf, math.nan, 1e30])
def test_a_run_whose_weights_explode_ends_with_its_last_good_state(tmp_path, explode_to):
    """1e30 is finite, but the forward pass overflows."""
    trainer = without_server(make_trainer(output_dir=str(tmp_path), max_steps=4,
                                          save_every_steps=1, keep_checkpoints=1))
    step = trainer.optimizer.step

    def explode():
        step()
        if trainer.step == 2:
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.fill_(explode_to)

    trainer.optimizer.step = explode
    with pytest.raises((RuntimeError, ValueError), match="not finite"):
        trainer.train()
    assert saved(tmp_path / "run") == {"checkpoint-2"}
    good = make_trainer(output_dir=str(tmp_path), resume=True)
    assert good.step == 2 and all(p.isfinite().all() for p in good.model.parameters())


@pytest.mark.parametrize("skipped", [1, 2])
def test_skipped_steps_do_not_push_good_checkpoints_out(tmp_path, skipped):
    trainer = without_server(make_trainer(output_dir=str(tmp_path), max_steps=2 + skipped,
                                          save_every_steps=1, keep_checkpoints=1))
    outputs, build = trainer.roll_out(), trainer.adapter.build_batch

    def poisoned(outputs):
        batch = build(outputs)
        if trainer.step >= 2:
            batch.pixel_values[:] = math.nan
        return batch

    trainer.roll_out, trainer.adapter.build_batch = lambda: outputs, poisoned
    trainer.train()
    assert saved(tmp_path / "run") == {"checkpoint-2", f"checkpoint-{2 + skipped}"}
    lines = [json.loads(line, parse_constant=lambda word: pytest.fail(word))
             for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0] + [1] * skipped
    assert lines[1]["kl"] < 0.1 and lines[2]["kl"] is None


def test_every_number_that_is_not_finite_is_null(tmp_path):
    trainer = new_run(tmp_path)
    trainer.records.write({"step": 1, "a": math.nan, "b": {"c": [-math.inf, 2.5]}, "d": math.inf})
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "a": null, "b": {"c": [null, 2.5]}, "d": null}\n'


def test_a_mismatch_that_is_no_number_is_warned_of(tmp_path, capsys):
    trainer = new_run(tmp_path)
    outputs = SimpleNamespace(dropped=[])
    for kl, warned in ((math.nan, True), (0.06, True), (0.04, False)):
        trainer.records.write_step({"step": 2, "kl": kl}, outputs, None, 0.05)
        assert ("mismatch KL" in capsys.readouterr().out) == warned


# ---- the config as people write it, from where they are

HEAD = 'model = "x"\n[env]\nid = "colors"\n'


@pytest.mark.parametrize("text, hint", [
    ('[inference.args]\nlimit_mm_per_prompt = {"image": 4}', "limit_mm_per_prompt = { image = 4 }"),
    ('[inference.args]\nlimit_mm_per_prompt = {"image": 2, "video": 0}',
     "limit_mm_per_prompt = { image = 2, video = 0 }"),
    ('[inference.args]\nlimit_mm_per_prompt = {image: 4}', "limit_mm_per_prompt = { image = 4 }"),
    ('[env.args]\nmix = {"a": {"b": "c: d", "e": true}}', 'mix = { a = { b = "c: d", e = true } }'),
    ("[trainer.args]\nfreeze_vision = True", "freeze_vision = true"),
    ("[trainer.args]\nmax_steps: 5", "max_steps = 5"),
    ("[inference.args]\nlimit_mm_per_prompt = {'image': 4}", "limit_mm_per_prompt = { image = 4 }"),
    ('[env.args]\nlimit = {"image": 4,},', "limit = { image = 4 }"),
    ('[trainer.args]\n"max_steps": 5,', "max_steps = 5"),
    ("[trainer.args]\nfreeze_vision = TRUE", "freeze_vision = true"),
    ("[env.args]\nflags = [True, False,]", "flags = [true, false]"),
    ('[env.args]\nmix = {"a b": "True: {x}, ", "u": "http://h:1/{a}"}',
     'mix = { "a b" = "True: {x}, ", u = "http://h:1/{a}" }'),
])
def test_json_in_toml_is_answered_with_the_toml(tmp_path, text, hint):
    (tmp_path / "c.toml").write_text(HEAD + text)
    with pytest.raises(ValueError) as error:
        load_config(str(tmp_path / "c.toml"))
    assert str(error.value).endswith(f"TOML, which writes {hint}")
    assert "at line 5" in str(error.value)
    (tmp_path / "c.toml").write_text(HEAD + text.split("\n")[0] + "\n" + hint)
    load_config(str(tmp_path / "c.toml"))  # the hint can be followed


def test_other_mistakes_in_toml_get_no_such_hint(tmp_path):
    for text in ("[env.args]\nn = {a = 1 ]", "[env.args]\nn = [1,", "[env.args]\nn 3"):
        (tmp_path / "c.toml").write_text(HEAD + text)
        with pytest.raises(ValueError, match="c.toml") as error:
            load_config(str(tmp_path / "c.toml"))
        assert "JSON" not in str(error.value)
    for text in ("n = None", "n: null", 'x = {"n": None}'):
        (tmp_path / "c.toml").write_text(HEAD + "[env.args]\n" + text)
        with pytest.raises(ValueError, match="at line 5.*TOML has no None: leave the key out"):
            load_config(str(tmp_path / "c.toml"))


def test_a_file_of_a_windows_editor_and_flags_with_hyphens_are_read(tmp_path):
    (tmp_path / "c.toml").write_text("\ufeff" + HEAD + "[inference.args]\nmax-model-len = 600\n"
                                     'api-key = "sk-secret-1"\n', encoding="utf-8")
    config = load_config(str(tmp_path / "c.toml"), ["inference.args.chat-template=x.jinja"])
    assert config.inference_args == {"max_model_len": 600, "api_key": "sk-secret-1",
                                     "chat_template": "x.jinja"}
    assert "sk-secret-1" not in " ".join(vllm_process.server_command(config))
    with pytest.raises(ValueError, match="max_tokens must be below max_model_len"):
        load_config(str(tmp_path / "c.toml"), ["inference.args.max-model-len=512"])
    with pytest.raises(ValueError, match="api_key must be a string"):
        load_config(str(tmp_path / "c.toml"), ["inference.args.api_key=12345"])


def test_json_on_the_command_line_is_understood():
    config = load_config(str(ROOT / "config.toml"), [
        'inference.args.limit_mm_per_prompt={"image": 2}', 'env.args={"num_train": 3}'])
    assert config.inference_args["limit_mm_per_prompt"] == {"image": 2}
    assert config.inference_args["enforce_eager"] and config.env_args == {"num_train": 3}
    config = load_config(str(ROOT / "config.toml"), [
        "freeze_vision=True", "env.args.urls={'a b': 'http://h:1/{True}'}", "run_name=a:b {c}"])
    assert config.freeze_vision and config.run_name == "a:b {c}"
    assert config.env_args["urls"] == {"a b": "http://h:1/{True}"}


def test_paths_are_found_beside_the_config_and_in_the_working_directory(tmp_path, monkeypatch):
    beside, here = tmp_path / "project", tmp_path / "here"
    for folder in (beside, here):
        (folder / "models").mkdir(parents=True)
    (beside / "models" / "mine").symlink_to(TINY)
    (here / "other").symlink_to(TINY)
    (beside / "chat.jinja").write_text("x")
    (beside / "c.toml").write_text('model = "models/mine"\n[env]\nid = "colors"\n[inference.args]\n'
                                   'chat_template = "chat.jinja"\n')
    monkeypatch.chdir(here)
    for path in (beside / "c.toml", Path("../project/c.toml")):
        config = load_config(str(path))
        assert Path(config.model).samefile(TINY)
        assert Path(config.inference_args["chat_template"]).read_text() == "x"
        assert load_config(str(path), ["model=other"]).model == "other"
        assert Path(load_config(str(path), ["model=models/mine"]).model).samefile(TINY)
    (here / "models" / "mine").mkdir()  # the file means its own neighbour, the words mean this one
    assert Path(load_config(str(path)).model).samefile(TINY)
    assert load_config(str(path), ["model=models/mine"]).model == "models/mine"
    assert load_config(str(path), ["model=Qwen/Qwen2-VL-7B-Instruct"]).model == (
        "Qwen/Qwen2-VL-7B-Instruct")
    at_step(new_run(beside / "outputs"), 1)
    checkpoint = load_config(str(path), ["resume=outputs/run/checkpoint-1"]).resume
    assert is_whole(Path(checkpoint))


def test_an_environment_and_its_data_are_found_beside_the_config(tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / "data" / "train.txt").write_text("red")
    (project / "beside_the_config.py").write_text(
        "from rollout import Environment\n"
        "def load_environment(path, split):\n"
        "    rows = [{'prompt': open(path).read(), 'answer': split}]\n"
        "    return Environment(train=rows, eval=[], rewards=[])\n")
    (project / "c.toml").write_text(f'model = "{TINY}"\n[env]\nid = "beside-the-config"\n'
                                    '[env.args]\npath = "data/train.txt"\nsplit = "data"\n')
    monkeypatch.chdir(tmp_path)
    run = subprocess.run([sys.executable, "-c", FINDS.format(root=str(ROOT))], text=True,
                         capture_output=True, timeout=120)
    assert run.stdout == "red data\n", run.stderr


FINDS = """
import sys
sys.path[:0] = [{root!r}]
from rollout import load_environment
from support.config import command_line

sys.argv = ["x.py", "@", "project/c.toml"]
config = command_line("x.py")
[row] = load_environment(config.env_id, config.env_args).train
print(row["prompt"], row["answer"])
"""


@pytest.mark.parametrize("model", ["./mine", "/no/such/model", "a/b/c", "~/no-such-model", "mine/",
                                   "../mine"])
def test_a_missing_folder_of_a_model_is_said_to_be_one(tmp_path, model):
    with pytest.raises(ValueError, match="model: there is no folder .*seen from") as error:
        load_config(str(ROOT / "config.toml"), [f"model={model}"])
    assert "ugging" not in str(error.value) and str(ROOT) in str(error.value)


@pytest.mark.parametrize("config, said", [
    ({"model_type": "qwen2"}, "is of model_type 'qwen2', for which transformers has no model that sees"),
    ({"model_type": "new", "auto_map": {"AutoConfig": "code.Config"}}, "brings code of its own"),
])
def test_a_model_without_eyes_or_with_code_of_its_own_is_refused_in_a_line(tmp_path, config, said):
    """And nobody is asked whether the code may run, at a terminal either."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(ValueError, match=f"^model: {tmp_path} {said}") as error:
        load_model(MultimodalRLConfig(model=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_name_that_may_be_of_the_hub_is_first_said_to_be_no_folder(monkeypatch, tmp_path):
    """And at once: transformers tries for most of a minute, with a line each time."""
    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", pytest.fail)
    monkeypatch.chdir(tmp_path)
    for name in ("models/tiny-qwen2-vl", "tiny"):
        with pytest.raises(ValueError, match=f"^model: there is no folder '{name}' .*{tmp_path}"):
            load_model(MultimodalRLConfig(model=name))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").write_text("version https://git-lfs.github.com/spec")
    with pytest.raises(ValueError, match="^model: tiny does not hold a whole model: Safetensor"):
        load_model(MultimodalRLConfig(model="tiny"))


@pytest.mark.parametrize("words, said", [
    ([], "environment 'colors': load_environment.. must return an Environment with rows"),
    (["model=models/no/more"], "model: there is no folder 'models/no/more', seen from"),
])
def test_train_runs_from_another_folder(tmp_path, words, said):
    """The model of the config is found, and envs/: the one mistake is the one that was made."""
    run = subprocess.run([sys.executable, str(ROOT / "train.py"), "@", str(ROOT / "config.toml"),
                          "env.args.num_train=0", *words], cwd=tmp_path, capture_output=True,
                         text=True, timeout=120)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("error: ") and said in run.stderr.replace("()", "..")


def test_an_adapter_without_a_processor_is_rehearsed_and_saved_with_the_tokenizer(tmp_path):
    trainer = make_trainer(output_dir=str(tmp_path))
    plain = train.MultimodalGRPOTrainer(trainer.model, trainer.tokenizer, MultimodalAdapter(),
                                        trainer.config)
    plain.rehearse_save()
    at_step(plain, 1)
    assert is_whole(tmp_path / "run" / "checkpoint-1")
    again = AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint-1")
    assert again.get_vocab() == plain.tokenizer.get_vocab()


def test_a_resume_that_trains_more_of_the_model_says_which_key_that_is(tmp_path):
    trainer = without_server(make_trainer(output_dir=str(tmp_path), max_steps=1,
                                          freeze_vision=True))
    trainer.train()
    with pytest.raises(ValueError, match="of it were trained .*freeze_vision: true -> false"):
        make_trainer(output_dir=str(tmp_path), resume=True)
