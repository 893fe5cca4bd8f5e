"""Every vision-language family of models/families.py; three of them against a real vLLM server.

The others, and all after a change: `pytest tests/test_families.py --all-families`, one server
start each.
"""
import pytest
import torch
from safetensors.torch import load_file

from conftest import canned, gradients, make_trainer, noise, relative_difference
from models.families import FAMILIES, make
from support import check

ON_A_SERVER = ["llava-1.5", "qwen3-vl", "smolvlm"]  # of different tensor layouts


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        make(name, folder / name)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_trains_the_vision_tower_and_sharing_changes_nothing(checkpoints, name):
    found = []
    for share, seed in ((False, 0), (True, 0), (True, 7)):
        trainer = make_trainer(str(checkpoints / name), share_prompt=share, micro_batch_size=16)
        images = [noise(71, 53, seed), noise(64, 130, seed + 1)]
        outputs = canned(trainer, [(images[:1], [3, 5, 2]), (images, [4, 2]), ([], [2, 3])])
        with torch.no_grad():
            logprobs, _ = trainer.policy(trainer.build_batch(outputs), share)
        found.append((logprobs, gradients(trainer, outputs)))
    (plain, plain_grad), (shared, shared_grad), (other, other_grad) = found
    assert (plain - shared).abs().max() < 1e-5
    assert relative_difference(plain_grad, shared_grad) < 1e-5
    tower = trainer.model.get_encoder(modality="image")
    names = {n for n, p in trainer.model.named_parameters()
             if any(p is q for q in tower.parameters())}
    trained = {n: g for n, g in shared_grad.items() if n in names and g.any()}
    assert len(trained) >= 0.8 * len(names.intersection(shared_grad)) > 0
    assert relative_difference(trained, {n: other_grad[n] for n in trained}) > 0.1
    assert (plain - other)[:5].abs().max() > 1e-2  # the rows that see images


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_sent_under_the_names_of_the_checkpoint_file(checkpoints, name):
    sent = dict(make_trainer(str(checkpoints / name)).source)
    saved = load_file(checkpoints / name / "model.safetensors")
    assert sent.keys() - saved.keys() <= {"lm_head.weight"} and not saved.keys() - sent.keys()
    assert all(torch.equal(sent[key], saved[key]) for key in saved)


@pytest.mark.parametrize("name", FAMILIES)
def test_server_and_trainer_agree(checkpoints, name, request, capsys):
    if name not in ON_A_SERVER and not request.config.getoption("--all-families"):
        pytest.skip("run with --all-families")
    code = check.main([str(checkpoints / name)])
    said = capsys.readouterr().out
    assert code == (1 if name == "gemma3" else 0), said
    assert ("conversations: exact, 4 turns" in said) == (name != "gemma3"), said
