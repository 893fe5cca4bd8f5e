"""Rollouts ahead of the trainer, and weight updates while requests are running."""
import dataclasses
import threading
import time

import pytest
import requests
import torch

from conftest import make_trainer, noise
from rollout import Job
from support import secret
from test_faults import asking
from test_runs import metrics
from train import served


def test_rollouts_run_ahead_and_are_at_most_async_steps_stale(server, tmp_path):
    for ahead in (0, 1, 2):
        config = dataclasses.replace(server, output_dir=str(tmp_path), run_name=f"ahead-{ahead}",
                                     max_steps=6, async_steps=ahead)
        with served(config) as trainer:
            trainer.train()
        lines = metrics(config)
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert lines[0]["staleness"] == 0 and max(line["staleness"] for line in lines) == ahead
        assert all(line["kl"] < (1e-6 if line["staleness"] == 0 else 0.1) for line in lines)
        assert any(line["kl"] > 1e-9 for line in lines) == (ahead > 0)


def test_slow_rollouts_hide_behind_training(server, tmp_path):
    """Rollouts and training of 1.2 seconds each: together they take hardly more than one."""
    spent = {}
    for ahead in (0, 1):
        config = dataclasses.replace(server, output_dir=str(tmp_path), run_name=f"slow-{ahead}",
                                     max_steps=5, async_steps=ahead)
        with served(config) as trainer:
            update = trainer.update

            def slow_judge(completion, answer, **info):
                time.sleep(1.2 / config.group_size)
                return float(answer in completion)

            def slow_update(outputs):
                time.sleep(1.2)
                return update(outputs)

            trainer.environment = dataclasses.replace(trainer.environment, rewards=[slow_judge],
                                                      weights=None)
            trainer.update = slow_update
            trainer.train()
        spent[ahead] = sorted(sum(line[f"seconds_{part}"] for part in ("rollout", "train", "sync"))
                              for line in metrics(config)[1:])[2]
    assert spent[1] < 0.75 * spent[0], spent


def test_an_error_in_the_background_ends_the_run_with_its_own_words(server, tmp_path):
    config = dataclasses.replace(server, output_dir=str(tmp_path), async_steps=1)
    with served(config) as trainer:
        def fragile(completion, answer, **info):
            if trainer.step >= 1:
                raise OSError("the judge is gone")
            return 1.0

        trainer.environment = dataclasses.replace(trainer.environment, rewards=[fragile],
                                                  weights=None)
        with pytest.raises(RuntimeError, match="the judge is gone") as error:
            trainer.train()
    assert any(entry.name == "score" for entry in _frames(error.value))


def _frames(error):
    import traceback
    while error.__cause__:
        error = error.__cause__
    return traceback.extract_tb(error.__traceback__)


def tokens_sampled(url: str) -> float:
    """By the server since its start."""
    text = requests.get(f"{url}/metrics", timeout=10, headers=secret.headers(url)).text
    return sum(float(line.split()[-1]) for line in text.splitlines()
               if line.startswith("vllm:generation_tokens_total"))


@pytest.mark.timeout(120)
def test_a_request_in_flight_goes_on_with_the_new_weights(server, tmp_path):
    """Its tokens' logprobs are the old policy's before the update, the new one's after it."""
    trainer = make_trainer(**{f.name: getattr(server, f.name) for f in dataclasses.fields(server)})
    trainer.on_server(lambda: None)
    generator, image, replies = trainer.generator, noise(56, 56), []
    generator.sampling |= {"max_tokens": 440, "ignore_eos": True}
    rows = [asking(image)]
    generator.environment = dataclasses.replace(
        generator.environment, rewards=[lambda completion, answer, **info: 1.0], weights=None)
    old = [p.detach().clone() for p in trainer.model.parameters()]
    with torch.no_grad():  # before the requests begin: they take two seconds
        for p in trainer.model.parameters():
            p += 0.1 * p.std(correction=0) * torch.randn_like(p)
    sampled = tokens_sampled(server.url)
    running = threading.Thread(
        target=lambda: replies.append(generator.collect(
            generator.submit([Job(rows, 0, 48, 0)]))))
    running.start()
    while tokens_sampled(server.url) < sampled + 1000:  # of 48 x 440
        time.sleep(0.005)
    trainer.source.version = 1
    trainer.server.send(trainer.source)
    running.join(60)
    batch = trainer.build_batch(replies[0])
    mask, off = batch.loss_mask.bool(), []
    for weights in (None, old):
        with torch.no_grad():
            for p, q in zip(trainer.model.parameters(), weights or ()):
                p.copy_(q)
            logprobs, _ = trainer.policy(batch, share=False)
        off.append((logprobs - batch.behavior_logprobs).abs())
    for row in range(0, 48, 5):
        new_off, old_off = (values[row][mask[row]] for values in off)
        assert len(new_off) == 440
        after = int((new_off > 1e-4).nonzero().max()) + 1  # from here on the new weights fit
        assert 5 < after < 435
        assert old_off[:after].max() < 1e-4 < old_off[after:].max()
