"""Every fork of forks/ applies, is right about its own values, and trains on the real server."""
import json
import re
import shutil
import subprocess

import pytest

from conftest import PYTHON, ROOT

FORKS = sorted(path.stem for path in (ROOT / "forks").glob("*.patch"))
LEFT_OUT = shutil.ignore_patterns(".*", "outputs", "results", "__pycache__", "bench", "*.jsonl")


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """The folder of a copy of the repository with a fork applied, by the fork's name."""
    copies = {}

    def copy(name: str):
        if name not in copies:
            folder = tmp_path_factory.mktemp("forks") / name
            shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
            subprocess.run(["git", "apply", ROOT / "forks" / f"{name}.patch"], cwd=folder,
                           check=True)
            copies[name] = folder
        return copies[name]

    return copy


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_is_right_about_its_values(forked, name):
    run = subprocess.run(
        [PYTHON, "-m", "pytest", "-q", "--noconftest", f"tests/test_fork_{name}.py"],
        cwd=forked(name), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_trains(forked, name, server, tmp_path):
    """Three updates with rollouts and syncs; each deals its prompts to two optimizer steps."""
    words = [f"model={server.model}", f"vllm_server_port={server.vllm_server_port}", "max_steps=3",
             f"output_dir={tmp_path}", "run_name=fork", "eval_every_steps=0", "batch_size=32",
             "rollouts_per_step=4", "updates_per_rollout=2"]
    if name == "new_environment":
        words += ["env.id=dots", "env.args={}"]
    if name == "reference_kl":
        words += ["reference_kl=0.1"]
    run = subprocess.run([PYTHON, "train.py", "@", "config.toml", *words], cwd=forked(name),
                         capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    steps = [json.loads(line) for line in (tmp_path / "fork/metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["skipped"] == 0 for step in steps)
    assert name == "new_environment" or max(step["grad_norm"] for step in steps) > 0


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_says_what_why_whence_and_where(name):
    header = (ROOT / "forks" / f"{name}.patch").read_text().split("diff --git")[0]
    assert re.search(r"(?m)^    \S", header)  # a formula
    for part in ("Why: ", "Source: ", "Places: "):
        assert part in header
    places = int(re.search(r"Places: (\d)", header)[1])
    line = re.search(rf"(?m)^\| \[`{name}`\].*\| (\d) \|$", (ROOT / "docs/forks.md").read_text())
    assert int(line[1]) == places
