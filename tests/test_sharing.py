"""The forked prompt cache where it must not be used, and the options that go with it."""
import pytest
import torch
from transformers.cache_utils import DynamicCache

from conftest import canned, gradients, make_trainer, noise, relative_difference

GROUPS = [([noise(56, 84)], [3, 6, 2, 4]), ([noise(84, 56), noise(56, 56, 1)], [5, 1, 3, 3])]


def test_a_detached_cache_is_noticed_and_prompts_are_not_shared(monkeypatch, capsys):
    """Its logprobs are right, only the gradient of the prompt and its image would be lost."""
    select = DynamicCache.batch_select_indices

    def detach(self, indices):
        select(self, indices)
        for layer in self.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    monkeypatch.setattr(DynamicCache, "batch_select_indices", detach)
    trainer = make_trainer(micro_batch_size=8)
    metrics = trainer.update(canned(trainer, GROUPS))
    assert metrics["shared_fraction"] == 0
    assert "prompts are not shared" in capsys.readouterr().out


def test_a_model_that_cannot_fork_its_cache_goes_on_row_by_row(monkeypatch):
    def refuse(self, indices):
        raise NotImplementedError("no batch_select_indices for linear attention")

    monkeypatch.setattr(DynamicCache, "batch_select_indices", refuse)
    trainer = make_trainer(micro_batch_size=8)
    outputs = canned(trainer, GROUPS)
    assert [trainer.update(outputs)["shared_fraction"] for _ in range(2)] == [0, 0]


def test_gradient_checkpointing_gives_the_same_gradient_without_sharing():
    plain, saving = make_trainer(), make_trainer(gradient_checkpointing=True)
    outputs = canned(plain, GROUPS)
    assert relative_difference(gradients(plain, outputs), gradients(saving, outputs)) < 1e-5
    assert saving.update(outputs)["shared_fraction"] == 0


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
