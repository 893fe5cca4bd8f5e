"""Gymnasium's FrozenLake, in a Python environment that has it, walked by hand and trained on."""
import json
import os
import subprocess

from conftest import ROOT
from test_faults import command
from test_verifiers import environment

WALK = """
import json
from envs.gym_env import load_environment

lake = load_environment("FrozenLake-v1", num_train=3, num_eval=2, is_slippery=False)
said = iter(["down", "right", "right", "down", "right"])
seen = []

def say(messages):
    seen.append(messages[0]["content"][0]["image"].tobytes())
    return next(said)

row = lake.train[2]
found = [lake.play(say, "down", "", **row["info"]),                  # to the goal, in six moves
         lake.play(lambda messages: "right", "down", "", seed=0),    # into a hole
         lake.play(lambda messages: "jump", "down", "", seed=0)]     # an answer that is no move
first = row["prompt"][0]["content"][0]["image"]
print(json.dumps({"found": found, "seen": len(seen), "pictures": len({*seen, first.tobytes()}),
                  "size": first.size, "rows": [len(lake.train), len(lake.eval)],
                  "reward": lake.rewards[0]([], "", seed=2, **found[0])}))
"""


def frozen_lake() -> str:
    return environment("1.4.0", "gymnasium", "[toy-text]")


def test_a_lake_is_crossed_and_every_move_is_seen():
    done = subprocess.run([frozen_lake(), "-c", WALK], cwd=ROOT, check=True, text=True,
                          stdout=subprocess.PIPE)
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "found": [{"total": 1.0}, {"total": 0.0}, {"total": 0.0}], "seen": 5, "pictures": 6,
        "size": [112, 112], "rows": [3, 2], "reward": 1.0}


def test_frozen_lake_is_trained_on(server, tmp_path):
    words = command(server, **{
        "env.id": "gym_env", "env.args.name": "FrozenLake-v1", "env.args.num_train": 8,
        "run_name": "lake", "output_dir": tmp_path, "max_steps": 2, "async_steps": 0,
        "max_turns": 3, "max_tokens": 4})
    subprocess.run([frozen_lake(), *words[1:]], cwd=ROOT, check=True, timeout=300, env=os.environ)
    lines = (tmp_path / "lake" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert all(json.loads(line)["kl"] < 1e-6 for line in lines)
