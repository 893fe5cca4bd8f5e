"""Environments, prompts, pixels and sampled tokens on their way into a batch."""
import functools
import math

import pytest
import torch

from conftest import canned, make_trainer, noise
from rollout import Environment, load_environment


def test_a_changed_pixel_changes_the_logprobs():
    trainer, found = make_trainer(), []
    for color in (0, 255):
        image = noise(56, 56)
        image.paste(color, (20, 20, 30, 30))
        built = trainer.build_batch(canned(trainer, [([image], [4, 4])]))
        with torch.no_grad():
            found.append(trainer.policy(built, False)[0])
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_a_sampled_image_token_does_no_harm():
    trainer = make_trainer(micro_batch_size=8)
    outputs = canned(trainer, [([noise(56, 56)], [4, 4]), ([], [4, 4])])
    image_token = trainer.model.config.image_token_id
    assert image_token in trainer.policy.banned
    for share in (False, True):
        outputs.completion_ids[0][1] = outputs.completion_ids[2][0] = image_token
        built = trainer.build_batch(outputs)
        assert built.loss_mask.sum(1).tolist() == [1, 4, 0, 4]
        trainer.policy.can_share = share
        assert math.isfinite(trainer.update(outputs)["loss"])


def test_a_prompt_that_the_server_read_differently_is_refused():
    trainer = make_trainer()
    outputs = canned(trainer, [([noise(56, 56)], [4, 4])])
    wrong = outputs.prompt_ids[0][:5] + [9] + outputs.prompt_ids[0][6:]
    outputs.prompt_ids = [wrong, wrong]
    with pytest.raises(ValueError, match="from token 5 of the prompt on.*pixel limits"):
        trainer.build_batch(outputs)


def test_a_missing_environment_says_where_it_looked(monkeypatch, tmp_path):
    assert isinstance(load_environment("colors", {"num_train": 3}), Environment)
    with pytest.raises(ValueError, match=r"no-such-env.*module 'no_such_env'.*envs/no_such_env.py"):
        load_environment("no-such-env", {})
    with pytest.raises(ValueError, match="'colors'.*unexpected keyword argument 'num_trian'"):
        load_environment("colors", {"num_trian": 3})
    assert load_environment("envs/colors.py", {"num_train": 3}).train
    (tmp_path / "my_list.py").write_text("def load_environment(): return [1]")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'my-list': .* an Environment with rows .* not \[1\]"):
        load_environment("my-list", {})


def test_no_reward_is_lost_among_others_of_its_name():
    good, nameless = (lambda completion, answer: 1.0), functools.partial(max, 0)
    Environment(train=[{}], eval=[], rewards=[good, max], weights=[1.0, 0.5])
    for rewards, weights in (([good, lambda completion, answer: 0.0], None), ([nameless], None),
                             ([good, max], [1.0])):
        with pytest.raises(ValueError, match="needs a __name__ of its own, and a weight"):
            Environment(train=[{}], eval=[], rewards=rewards, weights=weights)
