"""Environments of the verifiers library, each version of it in a Python environment of its own.

These environments hold verifiers and what it needs, and see all packages of the one that runs the
tests. They are built once, in a folder that VERIFIERS_ENVIRONMENTS names (else among the temporary
files); without a registry of packages the tests are skipped. What is trained is in
classic_colors.py and taskset_colors.py, and what goes wrong in verifiers_cases.py. What the runs
print is added to the file that VERIFIERS_RESULTS names, if it does.
"""
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import site
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from adapter import MultimodalAdapter
from conftest import PYTHON, ROOT, make_trainer
from rollout import load_environment
from support.verifiers_bridge import ToolCall, find_tool_calls, gist
from test_faults import command

FOLDER = Path(os.environ.get("VERIFIERS_ENVIRONMENTS", tempfile.gettempdir()))
UNREACHABLE = ("from versions: none", "could not resolve host", "connection", "timed out",
               "cannot find command 'git'")
CODEWORD = os.environ.get(
    "COLOR_CODEWORD", "git+https://github.com/PrimeIntellect-ai/verifiers"
    "@91d4f69e699b03f4b328b4afc1e10820bd25f798#subdirectory=environments/color_codeword")


def environment(version: str, package: str = "verifiers", extra: str = "") -> str:
    """The Python that has this version of a package; skips the test if it cannot be had."""
    seen = hashlib.sha256(f"{sys.prefix} {sys.version}".encode()).hexdigest()[:8]
    folder = FOLDER / f"{package}-{version}-{seen}"
    python = folder / "bin" / "python"
    with open(FOLDER / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run of the tests may be building it
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([PYTHON, "-m", "venv", folder], check=True)
            [packages] = folder.glob("lib/python*/site-packages")
            lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
            (packages / "packages_of_the_tests.pth").write_text("\n".join(lines))
            install(python, f"{package}{extra}=={version}")
            (folder / "complete").touch()
    return str(python)


def install(python: Path | str, *requirement: str) -> None:
    words = [python, "-m", "pip", "install", "--quiet", "--retries", "1", "--timeout", "20"]
    done = subprocess.run([*words, *requirement], capture_output=True, text=True)
    if done.returncode and any(sign in done.stderr.lower() for sign in UNREACHABLE):
        pytest.skip(f"{requirement[-1]} cannot be reached: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def record(version: str, lines: list[dict]) -> None:
    if "VERIFIERS_RESULTS" in os.environ:
        with open(os.environ["VERIFIERS_RESULTS"], "a") as file:
            for line in lines:
                text = json.dumps({"verifiers": version, **line})
                file.write(text.replace(f"{ROOT}/", "") + "\n")


def train(version: str, server, tmp_path, env_id: str, **options) -> list[dict]:
    """The metrics of three steps of `python train.py`."""
    python = environment(version)
    options = {"run_name": env_id, "env.id": env_id, "output_dir": tmp_path, "max_steps": 3,
               "async_steps": 0, "log_every_steps": 1, **options}
    words = command(server, **options)
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    subprocess.run([python, *words[1:]], cwd=ROOT, env=env, check=True, timeout=300)
    lines = (tmp_path / env_id / "metrics.jsonl").read_text().splitlines()
    steps = [{"environment": env_id, **json.loads(line)} for line in lines]
    record(version, steps)
    return steps


@pytest.mark.parametrize("version, env_id, names", [
    ("0.3.1", "classic-colors", ("accuracy", "brevity", "num_turns")),
    ("0.4.0", "taskset-colors", ("accuracy", "brevity", "turns"))])
def test_two_turns_with_images_are_trained(server, tmp_path, version, env_id, names):
    steps = train(version, server, tmp_path, env_id)
    assert len(steps) == 3
    for step in steps:
        accuracy, brevity, turns = [step[f"reward/{name}"] for name in names]
        weight = 1.0 if version == "0.3.1" else 0.5
        assert step["reward"] == pytest.approx(accuracy + weight * brevity)
        assert step["reward"] == step["reward/verifiers"] and turns == 2
        assert step["kl"] < 1e-6 and step["dropped"] == 0 and step["shared_fraction"] == 1
    group = json.loads(next((tmp_path / env_id / "rollouts" / "step-1").glob("*.json")).read_text())
    for said in group["completions"]:
        assert [list(turn)[0] for turn in said["turns"]] == ["policy", "environment", "policy"]
        assert len(said["turns"][1]["images"]) == 1


def test_color_codeword_is_trained_as_it_is_published(server, tmp_path):
    """verifiers' own example: three turns, an image each."""
    python = environment("0.4.0")
    find = "import importlib.util, sys; sys.exit(not importlib.util.find_spec('color_codeword'))"
    if subprocess.run([python, "-c", find]).returncode:
        install(python, "--no-deps", CODEWORD)
    steps = train("0.4.0", server, tmp_path, "color-codeword", batch_size=8, rollouts_per_step=2,
                  max_tokens=6, **{"env.args.images_per_turn": 1})
    assert len(steps) == 3
    for step in steps:
        assert step["kl"] < 1e-6 and step["dropped"] == 0
        assert step["reward"] == step["reward/exact_match"] <= step["reward/partial_match"]
    group = json.loads(next(
        (tmp_path / "color-codeword" / "rollouts" / "step-1").glob("*.json")).read_text())
    for said in group["completions"]:
        assert len(said["turns"]) == 5


# ---- what goes wrong, tools, and rewards of a group

@pytest.fixture(scope="module")
def cases(server, tmp_path_factory):
    """(version) -> the cases that verifiers_cases.py ran with it, by their names."""
    found, folder = {}, tmp_path_factory.mktemp("modules")
    (folder / "neither.py").write_text("")
    (folder / "classic.py").write_text(CLASSIC_MODULE)

    def run(version: str) -> dict[str, dict]:
        if version not in found:
            places = [str(ROOT), str(ROOT / "tests"), str(folder)]
            env = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
            done = subprocess.run(
                [environment(version), "tests/verifiers_cases.py", str(server.vllm_server_port)],
                cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
            lines = [line for line in done.stdout.splitlines() if line.startswith('{"case"')]
            found[version] = {case["case"]: case for case in map(json.loads, lines)}
            record(version, list(found[version].values()))
        return found[version]

    return run


CLASSIC_MODULE = "import verifiers as vf\n\nclass Mine(vf.MultiTurnEnv):\n    pass\n"
FAULTS = {"reward": "KeyError: 'board'", "error": "KeyError: 'board'",
          "image": "cannot read image", "hangs": "no reply in 3 s"}
CLASSIC_FAULTS = {"bug": "KeyError: 'board'", "timeout": "timeout_seconds"}


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0"])
def test_an_error_of_the_environment_is_no_reward_of_0(cases, version):
    """The first example is dropped, and named; the others are trained."""
    for name, said in (FAULTS | CLASSIC_FAULTS if version == "0.3.1" else FAULTS).items():
        case = cases(version)[name]
        assert case["examples"] == [1, 1, 2, 2, 3, 3] and len(case["dropped"]) == 2, name
        for reason in case["dropped"]:
            assert reason.startswith("example 0: ") and said in reason
        assert set(case["turns"]) == {2}


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0"])
def test_a_lost_server_is_an_error_of_ours_and_ends_and_silence_are_none(cases, version):
    found = cases(version)
    assert found["lost server"]["error"] == "gone"
    assert found["signals"]["kept"]
    for name, turns in {"max_turns": 1, "empty": 2}.items():
        assert found[name]["dropped"] == [] and found[name]["turns"] == [turns] * 8
    assert set(found["max_turns"]["metrics"]["accuracy"]) <= {0.0, 0.5}  # of one turn of two


def test_a_history_that_an_environment_rewrites_is_trained_in_stretches(cases):
    case = cases("0.3.1")["rewrites"]
    assert case["examples"] == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3] and case["dropped"] == []
    assert sorted(case["turns"]) == [1] * 4 + [2] * 6 and case["kl"] < 1e-6


def test_rewards_of_a_group_see_all_its_conversations(cases):
    case = cases("0.3.1")["group"]
    for row, text in enumerate(case["texts"]):
        others = [case["texts"][other] for other, example in enumerate(case["rows"])
                  if example == case["rows"][row]]
        rarity = float(others.count(text) == 1)
        assert case["metrics"]["rarity"][row] == rarity
        assert case["reward"][row] == pytest.approx(
            rarity + case["metrics"]["accuracy"][row] + case["metrics"]["brevity"][row])
    assert case["kl"] < 1e-6


def test_tools_are_called_for_real(cases):
    case = cases("0.3.1")["tools"]
    assert case["looked"] == ["top"] * 8 and case["shown"] == ["look"]
    assert case["roles"] == [["assistant", "tool", "assistant"]] * 8
    assert case["replies"] == ["It is red."] * 8 and case["kl"] < 1e-6
    assert case["metrics"]["look_calls"] == [1.0] * 8


def test_tool_calls_are_found_as_the_server_would_find_them():
    """As its parser "hermes": also one that max_tokens cut behind its JSON, but nothing half."""
    call = '<tool_call>{"name": "f", "arguments": {}}'
    assert find_tool_calls("no call", 1) == ("no call", [])
    assert find_tool_calls(f"a{call}", 1) == ("a", [ToolCall("call-1-0", "f", "{}")])
    assert len(find_tool_calls(f"a{call}</tool_call>\n{call}</tool_call>b", 1)[1]) == 2
    for wrong in ('<tool_call>{"name": "f"', '<tool_call>{"name": "f"}</tool_call>',
                  f"{call}</tool_call><tool_call>[]</tool_call>"):
        assert find_tool_calls(wrong, 1) == (wrong, [])


def test_prompts_show_the_tools_of_an_environment():
    tool = {"type": "function", "function": {"name": "look", "description": "Look.",
                                             "parameters": {"type": "object"}}}
    adapter = MultimodalAdapter(make_trainer().adapter.processor)
    adapter.server_args = {"chat_template": "{{ tools | tojson }}{{ messages[-1].content }}"}
    adapter.tools = [tool]
    assert adapter.render([{"role": "user", "content": "Hm"}]) == json.dumps([tool]) + "Hm"
    # The server writes them into a prompt in the same way.
    code = ("from vllm.entrypoints.openai.chat_completion import protocol\n"
            f"print(protocol.ChatCompletionToolsParam.model_validate({tool}).model_dump())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(tool)


def test_a_message_is_the_same_in_every_form():
    assert gist({"role": "user", "content": "a"}) == ("user", ["a"])
    url = {"url": "x", "detail": None}
    assert gist({"role": "user", "content": [
        {"type": "image_url", "image_url": url, "text": None},
        {"type": "text", "text": "a", "image_url": None}]}) == ("user", ["x", "a"])
    assert gist({"role": "assistant", "content": None}) == ("assistant", [])


# ---- versions

@pytest.mark.parametrize("version, module, said", [
    ("0.3.1", "neither", "a taskset of verifiers.v1 needs verifiers 0.4, not 0.3.1"),
    ("0.4.0", "neither", "no taskset of verifiers: "),
    ("0.4.0", "classic", "environments of verifiers' classic API need verifiers 0.3")])
def test_another_version_of_verifiers_is_named(cases, version, module, said):
    error = cases(version)[f"module {module}"]["error"]
    assert error.startswith(f"environment '{module}': ") and said in error


@pytest.mark.skipif(importlib.util.find_spec("verifiers") is not None, reason="it is installed")
def test_missing_verifiers_are_named(tmp_path, monkeypatch):
    (tmp_path / "classic.py").write_text(CLASSIC_MODULE)
    (tmp_path / "neither.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="No module named 'verifiers': environments of verifiers'"):
        load_environment("classic", {})
    with pytest.raises(ValueError, match="a package of the verifiers library needs that installed"):
        load_environment("neither", {})
