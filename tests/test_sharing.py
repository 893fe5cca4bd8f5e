"""The forked prompt cache where it must not be used, and the options that go with it."""
import pytest
import torch

from conftest import canned, gradients, make_trainer, noise, relative_difference
from policy import ForkedLayer, StoredLayer
from test_smoke import GROUPS as MIXTURES

GROUPS = [([noise(56, 84)], [3, 6, 2, 4]), ([noise(84, 56), noise(56, 56, 1)], [5, 1, 3, 3])]
LONG_GROUPS = [([noise(56, 84), noise(28, 56, 2)], [3, 6, 2, 4, 1, 2, 5, 3]), ([], [2, 3, 1]),
               ([noise(84, 56, 1)], [5, 1, 3, 3, 2, 6, 4, 2])]


def test_a_detached_cache_is_noticed_and_prompts_are_not_shared(monkeypatch, capsys):
    """Its logprobs are right, only the gradient of the prompt and its image would be lost."""
    store = StoredLayer.update
    monkeypatch.setattr(StoredLayer, "update", lambda self, keys, values, *args, **kwargs: store(
        self, keys.detach(), values.detach(), *args, **kwargs))
    trainer = make_trainer(micro_batch_size=8)
    metrics = trainer.update(canned(trainer, GROUPS))
    assert metrics["shared_fraction"] == 0
    assert "prompts are not shared" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [NotImplementedError, IndexError])
def test_a_model_that_cannot_fork_its_cache_goes_on_row_by_row(monkeypatch, kind):
    def refuse(self, *args, **kwargs):
        raise kind("no such layer in linear attention")

    monkeypatch.setattr(ForkedLayer, "update", refuse)
    trainer = make_trainer(micro_batch_size=8)
    outputs = canned(trainer, GROUPS)
    assert [trainer.update(outputs)["shared_fraction"] for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"lora_rank": 4}])
def test_a_prompt_and_its_image_are_forwarded_once_for_all_micro_batches(options):
    """They were once per micro-batch: eight times with 32 completions, by 4."""
    found = []
    for size in (4, 8):
        trainer = make_trainer(share_prompt=True, micro_batch_size=size, **options)
        trainer.checked = True
        seen = []
        visual = trainer.model.base_model.visual
        visual.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        found.append(gradients(trainer, canned(trainer, LONG_GROUPS)))
        assert len(seen) == 1 + 2  # by canned(), and for the two prompts that have images
    assert relative_difference(*found) < 1e-6


@pytest.mark.parametrize("name", MIXTURES)
def test_gradient_checkpointing_shares_prompts_and_gives_the_same_gradient(name):
    alone, saving = (make_trainer(share_prompt=share, micro_batch_size=2,
                                  gradient_checkpointing=share) for share in (False, True))
    outputs = canned(alone, MIXTURES[name])
    assert relative_difference(gradients(alone, outputs), gradients(saving, outputs)) < 1e-5
    assert saving.update(outputs)["shared_fraction"] == 1


def test_prompts_are_as_few_as_a_micro_batch_has_rows():
    """However small the groups are, no more prompts than that are held at a time."""
    trainer = make_trainer()
    batch = trainer.build_batch(canned(trainer, [([noise(28, 28, i)], [2, 3]) for i in range(5)]))
    assert [[len(chunk), len(chunk.first_rows())] for chunk in batch.chunks(4)] == [
        [4, 2], [4, 2], [2, 1]]
    assert [len(chunk) for chunk in batch.chunks(1)] == [2] * 5
    assert [len(piece) for piece in batch.chunks(1)[0].pieces(1)] == [1, 1]
    assert [len(chunk) for chunk in batch.chunks(4, ranks=4)] == [2] * 5
    assert [len(chunk) for chunk in batch.chunks(4, ranks=10)] == [1] * 10


def test_gradient_checkpointing_switches_no_dropout_on():
    plain, saving = make_trainer(share_prompt=False), make_trainer(gradient_checkpointing=True)
    recomputed = []
    for trainer in (plain, saving):
        trainer.checked = True
        for module in trainer.model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
                module.register_forward_hook(lambda *_, found=trainer: recomputed.append(found))
    outputs = canned(plain, GROUPS)
    recomputed.clear()
    assert relative_difference(gradients(plain, outputs), gradients(saving, outputs)) < 1e-5
    assert recomputed.count(saving) > recomputed.count(plain)


@pytest.mark.parametrize("share", [False, True])
def test_a_frozen_vision_tower_gets_no_gradient_and_changes_no_other(share):
    whole, frozen = (make_trainer(share_prompt=share, freeze_vision=f) for f in (False, True))
    outputs = canned(whole, GROUPS)
    wanted, found = gradients(whole, outputs), gradients(frozen, outputs)
    assert found and not any(".visual." in name for name in found)
    assert relative_difference({name: wanted[name] for name in found}, found) < 1e-5


def test_one_completion_per_prompt_and_one_token_are_no_special_cases():
    for groups in ([([noise(56, 56)], [1])], [([noise(56, 56)], [1, 1]), ([], [1])]):
        found = [gradients(t := make_trainer(share_prompt=share), canned(t, groups))
                 for share in (False, True)]
        names = [name for name in found[0] if found[0][name].any()]
        assert relative_difference({n: found[0][n] for n in names} or {"": torch.ones(1)},
                                   {n: found[1][n] for n in names} or {"": torch.ones(1)}) < 1e-5
