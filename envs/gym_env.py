"""A gymnasium environment with discrete actions, seen through its own pictures.

[env] id = "gym_env", args = { name = "FrozenLake-v1", is_slippery = false }: all further args go to
gymnasium.make. `actions` names the actions 0, 1, ... The seed of row i is i, held-out ones go on
from there; the reward is what the environment gave in all. An answer that is no action ends it.
"""
import threading
from contextlib import suppress

import gymnasium
from PIL import Image

from rollout import ConversationOver, Environment

DRAWING = threading.Lock()  # pygame, with which many of them draw, is not for several threads


def load_environment(name: str, actions: list[str] = ("left", "down", "right", "up"),
                     num_train: int = 256, num_eval: int = 64, size: int = 112, **options):
    question = {"type": "text", "text": f"Answer with one of: {', '.join(actions)}."}

    def begin(seed):
        world = gymnasium.make(name, render_mode="rgb_array", **options)
        world.reset(seed=seed)
        return world

    def look(world):
        with DRAWING:
            picture = Image.fromarray(world.render()).resize((size, size))
        return [{"role": "user", "content": [{"type": "image", "image": picture}, question]}]

    def play(say, completion, answer, seed):
        world, total, over = begin(seed), 0.0, False
        with suppress(ConversationOver):
            while completion.strip() in actions and not over:
                _, reward, ended, cut, _ = world.step(actions.index(completion.strip()))
                total, over = total + float(reward), ended or cut
                completion = "" if over else say(look(world))
        return {"total": total}

    def total_reward(completion, answer, seed, total):
        return total

    rows = [{"prompt": look(begin(seed)), "info": {"seed": seed}}
            for seed in range(num_train + num_eval)]
    return Environment(train=rows[:num_train], eval=rows[num_train:], rewards=[total_reward],
                       play=play)
