"""Conversations: a policy that sees, answers, and sees again, trained on exactly what was said."""
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import time

import pytest
import torch

import rollout
from conftest import ROOT, free_port, gradients, make_trainer, noise, relative_difference
from rollout import Environment
from support import check
from support.images import load_image
from test_faults import command, running, timeless, wait_for_lines
from test_runs import metrics
from train import served


def asking(*images, text="What color is it?") -> list[dict]:
    return [{"role": "user", "content": [
        *[{"type": "image", "image": image} for image in images], {"type": "text", "text": text}]}]


def rows(count: int) -> list[dict]:
    return [{"prompt": asking(noise(56, 84, i)), "info": {"number": i}} for i in range(count)]


def three_more(say, completion, answer, number):
    """Three turns more, with one image each, but for every fourth prompt; sizes differ."""
    for turn in range(3):
        images = [noise(56 + 28 * turn, 56, 100 * number + turn)] if number % 4 else []
        completion = say(asking(*images, text=f"And {turn}?"))
    return {"last": completion}


def length(completion, answer, number, last=None):
    if isinstance(completion, list):
        return float(sum(len(message["content"]) for message in completion[::2]))
    return float(len(completion))


def talker(server, play=three_more, count=4, rewards=(length,), **options):
    """A trainer on the server whose environment answers."""
    options = {"max_tokens": 6, "temperature": 2.0, "async_steps": 0, **options}
    trainer = make_trainer(**{f.name: getattr(server, f.name) for f in dataclasses.fields(server)}
                           | options)
    trainer.environment = Environment(train=rows(count), eval=[], rewards=rewards, play=play)
    trainer.on_server(lambda: None)
    return trainer


def test_every_turn_is_trained_as_it_was_sampled(server):
    """Four turns, four images, temperature 2, truncated turns: trainer and server agree."""
    trainer = talker(server)
    outputs = trainer.generator.collect(trainer.generator.begin(0, 4, 8))
    assert len(outputs) == 32 and outputs.dropped == []
    assert {len(replies) for replies in outputs.replies} == {3}
    batch = trainer.build_batch(outputs)
    ends = trainer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    sampled = [[i for i, m in zip(ids, mask) if m]
               for ids, mask in zip(outputs.completion_ids, outputs.completion_mask)]
    assert [mask.sum().item() for mask in batch.loss_mask] == [len(ids) for ids in sampled]
    assert 0 < sum(ids.count(ends) for ids in sampled) < 4 * 32  # some turns were cut
    assert check.server(trainer.policy, batch, must_agree=True)["max"] < 1e-5
    with torch.no_grad():
        alone, _ = trainer.policy(batch, share=False)
        shared, _ = trainer.policy(batch, share=True)
    assert (alone - shared).abs().max() < 1e-5
    found = {}
    for share in (False, True):
        trainer.config = dataclasses.replace(trainer.config, share_prompt=share)
        found[share] = gradients(trainer, outputs)
    assert relative_difference(found[False], found[True]) < 1e-5
    assert trainer.update(outputs)["kl"] < 1e-6


@pytest.mark.parametrize("options", [{"micro_batch_size": 3}, {"gradient_checkpointing": True},
                                     {"lora_rank": 2}, {"share_prompt": False}])
def test_every_way_to_train_conversations_has_the_same_gradient(server, options):
    trainer = talker(server)
    outputs = trainer.generator.collect(trainer.generator.begin(1, 4, 8))
    other = make_trainer(**{**vars(trainer.config), **options})
    if "lora_rank" in options:  # its gradients are of other weights: only the loss is comparable
        batch = trainer.build_batch(outputs)
        with torch.no_grad():
            wanted, found = (t.policy(batch, share=True)[0] for t in (trainer, other))
        assert (wanted - found).abs().max() < 1e-5
        assert other.update(outputs)["grad_norm"] > 0
    else:
        wanted, found = (gradients(t, outputs) for t in (trainer, other))
        assert relative_difference(wanted, found) < 1e-5


def test_images_of_earlier_turns_are_named_and_sent_again_to_a_server_that_forgot(server):
    def twice(say, completion, answer, number):
        for turn in range(2):
            if forgetful:
                trainer.server.call("reset_mm_cache")
            say(asking(noise(56, 56, 50 * number + turn)))

    found = {}
    for forgetful in (False, True):
        trainer, sent = talker(server, play=twice), []
        generator, call = trainer.generator, trainer.generator.call

        def counting(route, body=None, method="post"):
            if route == rollout.GENERATE:
                sent.append([part["url"] is not None for part in body["content_parts"]])
            return call(route, body, method)

        generator.call = counting
        outputs = generator.collect(generator.begin(0, 4, 1))
        found[forgetful] = outputs.completion_ids, outputs.completion_logprobs
        assert outputs.dropped == []
        if forgetful:
            assert [True, True, True] in sent
        else:
            assert sorted(sent) == 4 * [[False, False, True]] + 4 * [[False, True]]
    assert found[False][0] == found[True][0]
    ours, others = (sum(logprobs, []) for _, logprobs in found.values())
    assert ours == pytest.approx(others, abs=1e-5)


@pytest.mark.parametrize("share", [False, True])
def test_a_pixel_of_the_second_image_changes_the_second_answer_and_not_the_first(server, share):
    trainer = talker(server)
    outputs = trainer.generator.collect(trainer.generator.begin(0, 4, 2))
    row = next(i for i, replies in enumerate(outputs.replies) if replies[0].images)
    batch = trainer.build_batch(outputs)
    with torch.no_grad():
        before, _ = trainer.policy(batch, share)
        segment = batch.replies[row][0]
        first = sum(batch.image_rows["pixel_values"][:segment])
        batch.pixel_values[first] += 1
        after, _ = trainer.policy(batch, share)
    start = len(outputs.prompt_ids[row]) + outputs.replies[row][0].start
    changed = (before[row] - after[row]).abs()
    assert changed[:start].max() == 0 and changed[start:].max() > 1e-4
    others = [i for i in range(len(batch)) if i != row]
    assert (before[others] - after[others]).abs().max() < 1e-6


def test_what_the_environment_says_gets_no_gradient(server):
    """The loss does not change with the logprobs of its tokens."""
    trainer = talker(server)
    outputs = trainer.generator.collect(trainer.generator.begin(0, 4, 2))
    batch = trainer.build_batch(outputs)
    for row, replies in enumerate(outputs.replies):
        prompt = len(outputs.prompt_ids[row])
        assert batch.loss_mask[row, :prompt].sum() == 0
        for reply in replies:
            length = reply.encoded["input_ids"].shape[1]
            place = slice(prompt + reply.start, prompt + reply.start + length)
            assert batch.input_ids[row, place].tolist() == reply.encoded["input_ids"][0].tolist()
            assert batch.loss_mask[row, place].sum() == 0
        assert batch.loss_mask[row].sum() == sum(outputs.completion_mask[row])


def test_rewards_see_the_whole_conversation_and_what_the_environment_found(server):
    seen = []

    def look(completion, answer, number, last):
        seen.append((completion, number, last))
        return 1.0

    trainer = talker(server, rewards=[look])
    trainer.generator.collect(trainer.generator.begin(0, 2, 2))
    for completion, number, last in seen:
        assert [message["role"] for message in completion] == ["assistant", "user"] * 3 + [
            "assistant"]
        assert completion[-1]["content"] == last
        assert completion[1]["content"][-1]["text"] == "And 0?"


# ---- a history that is rewritten

def begins_anew(say, completion, answer, number):
    """Two turns, then two without their history, for odd prompts; four turns for the others."""
    say(asking(noise(56, 56, 50 + number), text="And 0?"))
    odd = bool(number % 2)
    say([{"role": "system", "content": "Be brief."}, *asking(noise(84, 56, number), text="Anew?")]
        if odd else asking(text="And 1?"), anew=odd)
    return {"last": say(asking(text="And last?"))}


def test_a_history_that_is_rewritten_becomes_one_row_per_unbroken_stretch(server):
    """Each row is what the policy saw when it spoke, and all rows have the whole's advantage."""
    seen = []

    def look(completion, answer, number, last):
        seen.append((number, [message["role"] for message in completion]))
        return length(completion, answer, number)

    trainer = talker(server, play=begins_anew, rewards=[look])
    outputs = trainer.generator.collect(trainer.generator.begin(0, 4, 4))
    numbers = [row["number"] for row in outputs.info]
    assert len(outputs) == 4 * 2 + 4 * 2 * 2 and outputs.dropped == []
    assert outputs.first_rows() == [row for row, number in enumerate(outputs.conversation)
                                    if outputs.conversation.index(number) == row]
    for number, roles in seen:  # rewards see all of it
        assert roles == ["assistant", "user", "assistant", *["system"] * (number % 2), "user",
                         "assistant", "user", "assistant"]
    batch = trainer.build_batch(outputs)
    assert check.server(trainer.policy, batch, must_agree=True)["max"] < 1e-5
    for row, number in enumerate(numbers):
        text = trainer.tokenizer.decode(outputs.prompt_ids[row] + outputs.completion_ids[row])
        is_first = row in outputs.first_rows()
        assert ("And 0?" in text) == is_first and ("Anew?" in text) == (not is_first)
        assert len(outputs.replies[row]) == (1 if number % 2 else 3)
    # The advantage is that of a group of four conversations, not of as many rows.
    for name in set(outputs.example_id):
        rewards = [outputs.reward[row] for row in outputs.first_rows()
                   if outputs.example_id[row] == name]
        for row, example in enumerate(outputs.example_id):
            if example == name:
                wanted = outputs.reward[row] - sum(rewards) / 4
                assert batch.advantages[row].item() == pytest.approx(wanted, abs=1e-5)
    found = {}
    for share in (False, True):
        trainer.config = dataclasses.replace(trainer.config, share_prompt=share)
        found[share] = gradients(trainer, outputs)
    assert relative_difference(found[False], found[True]) < 1e-5
    metrics = trainer.update(outputs)
    assert metrics["kl"] < 1e-6 and metrics["rewritten_histories"] == 8
    assert metrics["reward"] == pytest.approx(
        sum(outputs.reward[row] for row in outputs.first_rows()) / 16)


def written_groups(trainer, outputs, folder):
    """(the example, what is written of it) of two of the four groups of a step."""
    trainer.build_batch(outputs)
    trainer.records.write_rollouts(1, outputs, trainer.tokenizer)
    for example in list(dict.fromkeys(outputs.example_id))[::2]:
        yield example, json.loads((folder / f"{example}.json").read_text())


def test_a_stretch_is_written_with_what_the_policy_then_saw(server, tmp_path):
    trainer = talker(server, play=begins_anew, output_dir=str(tmp_path))
    outputs = trainer.generator.collect(trainer.generator.begin(0, 4, 2))
    folder = tmp_path / "colors" / "rollouts" / "step-1"
    for example, group in written_groups(trainer, outputs, folder):
        number = outputs.info[outputs.example_id.index(example)]["number"]
        kinds = ["policy", "environment", "policy", "environment", "policy", "environment"]
        if number % 2:
            kinds[3:4] = ["anew"]
        assert len(group["completions"]) == 2
        for said in group["completions"]:
            turns = said["turns"]
            assert [list(turn)[0] for turn in turns][:6] == kinds
            if number % 2:
                picture = load_image(folder / turns[3]["images"][0])
                assert picture.tobytes() == noise(84, 56, number).tobytes()


def test_conversations_of_a_group_are_compared_without_those_that_failed(server):
    counter = itertools.count()

    def play(say, completion, answer, number):
        if number == 1 and next(counter) == 0:
            raise KeyError("board")
        return {"said": completion}

    def compare(found):
        return [{"found": found, "rank": rank} for rank in range(len(found))]

    def rank(completion, answer, number, found, rank):
        assert found[rank]["said"] == completion[0]["content"]
        return float(rank)

    trainer = talker(server, play=play, rewards=[rank])
    trainer.environment = dataclasses.replace(trainer.environment, compare=compare)
    trainer.generator = None
    trainer.on_server(lambda: None)
    outputs = trainer.generator.collect(trainer.generator.begin(0, 4, 4))
    for example in range(4):
        ranks = [reward for reward, name in zip(outputs.reward, outputs.example_id)
                 if name == example]
        assert ranks == ([0, 1, 2] if example == 1 else [0, 1, 2, 3])
    assert outputs.dropped == ["example 1: KeyError: 'board'"]


# ---- the end of a conversation

def test_max_turns_ends_a_conversation_and_it_is_scored(server):
    trainer = talker(server, max_turns=2)
    outputs = trainer.generator.collect(trainer.generator.begin(0, 2, 4))
    assert {len(replies) for replies in outputs.replies} == {1} and not outputs.dropped


def test_a_conversation_ends_where_the_context_does(server):
    def endless(say, completion, answer, number):
        while True:
            say(asking(text="And now? " * 10))

    trainer = talker(server, play=endless, max_turns=100)
    outputs = trainer.generator.collect(trainer.generator.begin(0, 2, 4))
    lengths = [len(p) + len(c) for p, c in zip(outputs.prompt_ids, outputs.completion_ids)]
    assert not outputs.dropped and max(lengths) <= 512
    assert min(lengths) > 512 - 6 - 100  # as long as the next reply did not fit
    assert trainer.update(outputs)["kl"] < 1e-6


def test_play_may_end_at_once(server):
    trainer = talker(server, play=lambda say, completion, answer, number: None)
    outputs = trainer.generator.collect(trainer.generator.begin(0, 2, 4))
    assert all(isinstance(completion, list) for completion in outputs.completion)
    assert trainer.update(outputs)["kl"] < 1e-6


# ---- faults

def raises(say, number):
    raise KeyError("board")


def nonsense(say, number):
    say(3)


def empty(say, number):
    say([])


def broken_image(say, number):
    say(asking(b"not an image"))


def quotes(say, number):
    say(asking(text="<|image_pad|>"))


def hangs(say, number):
    time.sleep(60)


@pytest.mark.parametrize("fault, said", [
    (raises, "KeyError: 'board'"), (nonsense, "not a list"), (empty, "the prompt is empty"),
    (broken_image, "cannot read image"), (quotes, "quotes '<|image_pad|>'"),
    (hangs, "no reply in 3 s")])
def test_a_reply_that_is_none_drops_its_conversation_alone(server, fault, said):
    def play(say, completion, answer, number):
        if number == 2:
            fault(say, number)
        return three_more(say, completion, answer, number)

    trainer = talker(server, play=play, generation_timeout=3)
    wanted = talker(server)
    jobs = trainer.generator.begin(0, 4, 2)
    outputs = trainer.generator.collect(jobs)
    assert outputs.example_id.count(2) == 0 and len(outputs) == 6 and len(outputs.dropped) == 2
    assert all(reason.startswith("example 2: ") and said in reason for reason in outputs.dropped)
    undisturbed = wanted.generator.collect(wanted.generator.begin(0, 4, 2))
    kept = [ids for ids, example in zip(undisturbed.completion_ids, undisturbed.example_id)
            if example != 2]
    assert outputs.completion_ids == kept


# ---- a run

def test_written_rollouts_show_every_turn_with_its_image(server, tmp_path):
    trainer = talker(server, output_dir=str(tmp_path), log_every_steps=1)
    outputs = trainer.generator.collect(trainer.generator.begin(0, 4, 2))
    folder = tmp_path / "colors" / "rollouts" / "step-1"
    for example, group in written_groups(trainer, outputs, folder):
        rows = [row for row, name in enumerate(outputs.example_id) if name == example]
        assert [said["reward"] for said in group["completions"]] == [outputs.reward[r] for r in rows]
        for row, said in zip(rows, group["completions"]):
            assert [list(turn)[0] for turn in said["turns"]] == ["policy", "environment"] * 3 + [
                "policy"]
            for turn, reply in zip(said["turns"][1::2], outputs.replies[row]):
                pictures = [load_image(folder / name).tobytes() for name in turn["images"]]
                assert pictures == [image.tobytes() for image in reply.images]


TALKING = '''
from conftest import noise
from rollout import Environment
from test_conversations import asking, length, rows, three_more


def load_environment(turns=4):
    return Environment(train=rows(12), eval=rows(4), rewards=[length], play=three_more)
'''


def talking(server, tmp_path, run_name: str, **options) -> list[str]:
    """The command of a run whose environment answers."""
    (tmp_path / "talking.py").write_text(TALKING)
    return command(server, **{"env.id": "talking", "run_name": run_name,
                              "output_dir": tmp_path, "max_tokens": 6, "temperature": 2.0,
                              "max_steps": 4, "save_every_steps": 1, "async_steps": 0, **options})


@pytest.fixture(scope="module")
def straight(server, tmp_path_factory):
    """(the environment variables of such a run, its metrics when nothing happens)."""
    folder = tmp_path_factory.mktemp("straight")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(
        [str(folder), str(ROOT), str(ROOT / "tests")])}
    subprocess.run(talking(server, folder, "straight"), cwd=ROOT, env=env, check=True)
    lines = timeless(metrics(dataclasses.replace(server, output_dir=str(folder),
                                                 run_name="straight")))
    assert len(lines) == 4 and all(line["kl"] < 1e-6 for line in lines)
    return env, lines


def test_a_killed_run_of_conversations_goes_on_bit_for_bit(server, straight, tmp_path):
    env, lines = straight
    with running(talking(server, tmp_path, "killed"), env=env) as run:
        wait_for_lines(tmp_path / "killed" / "metrics.jsonl", 2, run)
    subprocess.run(talking(server, tmp_path, "killed", resume="true"), cwd=ROOT, env=env,
                   check=True)
    killed = dataclasses.replace(server, output_dir=str(tmp_path), run_name="killed")
    assert timeless(metrics(killed)) == lines


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_that_dies_in_the_second_turn_changes_nothing(server, straight, tmp_path,
                                                               monkeypatch):
    """Of some conversations the first turn is done, of others the second; all are begun again."""
    (tmp_path / "talking.py").write_text(TALKING)
    monkeypatch.syspath_prepend(tmp_path)
    config = dataclasses.replace(
        server, env_id="talking", output_dir=str(tmp_path), max_tokens=6, temperature=2.0,
        max_steps=4, async_steps=0, vllm_server_port=free_port(), vllm_server_timeout=120)
    killed = []
    with served(config) as trainer:
        def play(say, completion, answer, number):
            def kill_and_say(messages):
                if trainer.step == 2 and not killed:
                    killed.append(trainer.server.process.pid)
                    os.killpg(killed[0], signal.SIGKILL)
                return say(messages)

            return three_more(kill_and_say, completion, answer, number)

        trainer.environment = dataclasses.replace(trainer.environment, play=play)
        trainer.train()
    assert killed and timeless(metrics(config)) == straight[1]


def test_the_age_of_a_token_is_that_of_the_weights_that_sampled_it(server):
    """Weights are sent while a later turn is about to be asked: it is of the new ones."""
    trainer = talker(server, play=None)
    sent = []

    def play(say, completion, answer, number):
        say(asking(text="And 1?"))
        if not sent:
            sent.append(True)
            trainer.step = 1
            trainer.send_weights()
        say(asking(text="And 2?"))

    trainer.environment = dataclasses.replace(trainer.environment, play=play)
    trainer.generator = None
    trainer.on_server(lambda: None)
    outputs = trainer.generator.collect(trainer.generator.begin(0, 1, 1))
    [mask], [versions], [replies] = (
        outputs.completion_mask, outputs.completion_versions, outputs.replies)
    turns = [versions[:replies[0].start], versions[replies[0].end:replies[1].start],
             versions[replies[1].end:]]
    assert [set(turn) for turn in turns] == [{None}, {0}, {1}]
    ages = outputs.staleness(2)
    assert ages == [2] * len(turns[0]) + [2] * len(turns[1]) + [1] * len(turns[2])
    assert len(ages) == sum(mask)
