"""Every vision-language family of models/families.py; three of them against a real vLLM server.

The others, and all after a change: `pytest tests/test_families.py --all-families`, one server
start each.
"""
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PaliGemmaConfig, modeling_layers
from vllm.distributed.weight_transfer import ParamMeta

from batch import MultimodalBatch
from conftest import (ROOT, canned, free_port, full_weights, gradients, make_trainer, noise,
                      relative_difference)
from models.families import FAMILIES, make
from policy import Policy
from support import check
from support.config import MultimodalRLConfig, load_config
from sync import CheckpointSource
from train import served

ON_A_SERVER = ["llava-1.5", "qwen3-vl", "smolvlm"]  # of different tensor layouts
PACKED = "minicpm-v-4.6"  # refused: its pixels lie side by side along the last dim
TRAINED = [name for name in FAMILIES if name != PACKED]
REFUSED = ["gemma3", "lfm2-vl", "exaone4.5", PACKED]  # by the check
UNSHARED = ["lfm2-vl", "qwen3.5"]  # their states, which are no cache of keys, cannot be forked


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        make(name, folder / name)
    return folder


def outputs_of(trainer, seed=0):
    """Completions of prompts with one, two and no images."""
    images = [noise(71, 53, seed), noise(64, 130, seed + 1)]
    return canned(trainer, [(images[:1], [3, 5, 2]), (images, [4, 2]), ([], [2, 3])])


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_trains_the_vision_tower_and_sharing_changes_nothing(checkpoints, name):
    found = []
    for share, seed in ((False, 0), (True, 0), (True, 7)):
        share &= name not in UNSHARED
        trainer = make_trainer(str(checkpoints / name), share_prompt=share, micro_batch_size=16)
        outputs = outputs_of(trainer, seed)
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


@pytest.mark.parametrize("name", [name for name in TRAINED if name not in UNSHARED])
def test_prompts_are_shared_under_gradient_checkpointing(checkpoints, name, monkeypatch):
    warnings = []
    monkeypatch.setattr(modeling_layers.logger, "warning_once", warnings.append)
    plain, saving = (make_trainer(str(checkpoints / name), share_prompt=True, micro_batch_size=2,
                                  gradient_checkpointing=saves) for saves in (False, True))
    calls = []
    for trainer in (plain, saving):
        for module in trainer.model.modules():
            if isinstance(module, modeling_layers.GradientCheckpointingLayer):
                module.register_forward_pre_hook(
                    lambda *_, caller=trainer: calls.append(caller))
    outputs = outputs_of(plain)
    calls.clear()
    assert relative_difference(gradients(plain, outputs), gradients(saving, outputs)) < 1e-5
    assert calls.count(saving) > calls.count(plain) and not warnings


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_sent_under_the_names_of_the_checkpoint_file(checkpoints, name):
    source = make_trainer(str(checkpoints / name)).source
    source.all_names = False
    sent = dict(source)
    saved = load_file(checkpoints / name / "model.safetensors")
    assert sent.keys() == saved.keys()
    assert all(torch.equal(sent[key], saved[key]) for key in saved)


@pytest.mark.parametrize("name", TRAINED)
def test_a_saved_checkpoint_has_the_names_and_shapes_of_the_one_it_came_from(
        checkpoints, name, tmp_path):
    trainer = make_trainer(str(checkpoints / name), output_dir=str(tmp_path), run_name="run")
    trainer.update(outputs_of(trainer))
    trainer.save()
    saved = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    first = load_file(checkpoints / name / "model.safetensors")
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in first.items()}
    assert any(not torch.equal(saved[name], first[name]) for name in first)
    again = make_trainer(str(tmp_path / "run" / "checkpoint-1"))
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.state_dict().values(),
                                                 again.model.state_dict().values(), strict=True))


def test_a_tied_head_is_sent_if_the_files_have_it(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "qwen2-vl", tmp_path / "qwen2-vl")
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    [head] = [weights[name] for name in weights if name.endswith("embed_tokens.weight")]
    save_file(weights | {"lm_head.weight": head.clone()}, folder / "model.safetensors")
    source = make_trainer(str(folder)).source
    source.all_names = False
    assert torch.equal(dict(source)["lm_head.weight"], head)


def test_weights_that_the_files_do_not_have_are_refused_by_name(checkpoints, monkeypatch):
    trainer = make_trainer(str(checkpoints / "qwen2-vl"))
    for name, tensor, said in (
            ("model.language_model.nonsense", torch.ones(3), "nonsense is .*no.*of that name"),
            ("model.language_model.norm.weight", torch.ones(3), r"norm.weight is \(3,\).*\(64,\)")):
        layers = trainer.policy.layers()
        layers[0] = layers[0] | {name: tensor}
        with monkeypatch.context() as patch:
            patch.setattr(trainer.policy, "layers", lambda: layers)
            with pytest.raises(ValueError, match=said):
                dict(trainer.source)


@pytest.mark.parametrize("name", TRAINED)
def test_the_policy_is_the_model_and_sees_no_later_token(checkpoints, name):
    trainer = make_trainer(str(checkpoints / name))
    batch = trainer.build_batch(outputs_of(trainer))
    found = check.forward(trainer.policy, batch)
    assert found["causal"] < 1e-5 and found["forward"] < 1e-5
    check.sharing(trainer.policy, batch)
    assert trainer.policy.can_share == (name not in UNSHARED)


def test_logits_that_are_capped_are_capped_in_the_policy(checkpoints):
    trainer = make_trainer(str(checkpoints / "gemma4"))
    batch = trainer.build_batch(outputs_of(trainer))
    assert trainer.policy.cap == 5.0
    trainer.policy.cap = None  # as before the family was known
    assert check.head_difference(trainer.policy, batch) > 0.1
    check.forward(trainer.policy, batch)
    assert trainer.policy.cap == 5.0


def test_a_cap_that_a_model_has_in_its_config_alone_is_left_out(checkpoints):
    trainer = make_trainer(str(checkpoints / "qwen2-vl"))
    trainer.model.config.text_config.final_logit_softcapping = 2.0
    policy = Policy(trainer.model, trainer.config)
    assert policy.cap == 2.0
    check.forward(policy, trainer.build_batch(outputs_of(trainer)))
    assert policy.cap is None


def test_logits_are_scaled_as_the_server_does_where_transformers_leaves_it_out(checkpoints, capsys):
    """vLLM divides those of a Granite model, LlavaNextForConditionalGeneration does not."""
    trainer = make_trainer(str(checkpoints / "granite-vision"))
    batch = trainer.build_batch(outputs_of(trainer))
    check.forward(trainer.policy, batch)
    assert trainer.policy.scale == 1
    trainer.policy.scale = 1 / 4
    with torch.no_grad():
        batch.behavior_logprobs, _ = trainer.policy(batch, share=False)
    trainer.policy.scale = 1
    assert check.server(trainer.policy, batch, must_agree=False)["max"] > 0.1
    assert check.server(trainer.policy, batch, must_agree=True)["max"] < 1e-6
    assert trainer.policy.scale == 1 / 4 and "scales logits by 0.25" in capsys.readouterr().out


def test_logits_that_a_model_changes_in_an_unknown_way_are_refused(checkpoints, monkeypatch):
    trainer = make_trainer(str(checkpoints / "qwen2-vl"))
    forward = trainer.model.forward

    def louder(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits *= 1.5
        return output

    monkeypatch.setattr(trainer.model, "forward", louder)
    with pytest.raises(RuntimeError, match="cannot be trained: its logits are not those of its head"):
        trainer.update(outputs_of(trainer))


def test_completions_are_no_prefix_of_which_every_token_sees_all(monkeypatch):
    """In PaliGemma that is what a token type of 0 means, and 1 is right."""
    layers = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    model = AutoModelForImageTextToText.from_config(PaliGemmaConfig(
        image_token_index=90, projection_dim=64, initializer_range=0.2,
        vision_config=layers | {"model_type": "siglip_vision_model", "image_size": 28},
        text_config=layers | {"model_type": "gemma", "vocab_size": 99, "num_key_value_heads": 1,
                              "head_dim": 32, "initializer_range": 0.2}))
    policy = Policy(model, MultimodalRLConfig(model=""))
    ids, prompt = torch.arange(36).view(3, 12), torch.arange(12) < 5
    batch = MultimodalBatch(
        ids, torch.ones_like(ids), (~prompt).long().expand(3, 12), -torch.ones(3, 12),
        torch.zeros(3), extra_model_kwargs={"token_type_ids": torch.zeros_like(ids)})
    assert check.lookahead(policy, batch) > 1e-3
    assert check.forward(policy, batch)["causal"] < 1e-6 and policy.completion_type == 1
    monkeypatch.setattr(check, "lookahead", lambda policy, batch: 0.5)
    with pytest.raises(RuntimeError, match="cannot be trained: its tokens see later ones.*5.0e-01"):
        check.forward(policy, batch)


@pytest.mark.parametrize("name", TRAINED)
def test_merged_adapters_are_the_adapted_model(checkpoints, name, capsys):
    trainer = make_trainer(str(checkpoints / name), lora_rank=2)
    random = torch.Generator().manual_seed(0)
    adapters = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert adapters and all(".lora_" in n for n in adapters)
    assert not any(".router" in n or ".gate." in n for n in adapters)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.copy_(0.025 * torch.randn(parameter.shape, generator=random))
    batch = trainer.build_batch(outputs_of(trainer))
    other = make_trainer(str(checkpoints / name))
    with torch.no_grad():
        before = other.policy(batch, share=False)[0]
        other.model.load_state_dict(full_weights(trainer.policy))
        merged, adapted = (t.policy(batch, share=False)[0] for t in (other, trainer))
    rounding = 5e-5 if name in ("gemma4", "qwen3.5") else 1e-5  # they make more of what is rounded
    assert (merged - adapted).abs().max() < rounding < 1e-2 < (before - adapted).abs().max()
    has_experts = any(p.dim() == 3 and ".experts." in n
                      for n, p in trainer.model.named_parameters())
    assert ("weights of the experts are not trained" in capsys.readouterr().out) == has_experts


def test_pixels_that_are_packed_along_the_last_dim_are_refused(checkpoints):
    trainer = make_trainer(str(checkpoints / PACKED))
    with pytest.raises(ValueError, match="pixel_values .* along their last dim"):
        trainer.build_batch(outputs_of(trainer))


@pytest.mark.parametrize("name", FAMILIES)
def test_server_and_trainer_agree(checkpoints, name, request, capsys):
    if name not in ON_A_SERVER and not request.config.getoption("--all-families"):
        pytest.skip("run with --all-families")
    code = check.main([str(checkpoints / name)])
    said = capsys.readouterr().out
    assert code == (1 if name in REFUSED else 0), said
    assert ("conversations: exact, 4 turns" in said) == (name not in REFUSED), said


@pytest.mark.parametrize("name", ["qwen3-vl-moe", "gemma4"])
def test_a_run_trains_experts_and_tower_and_the_server_follows(checkpoints, name, tmp_path, request):
    if name == "gemma4" and not request.config.getoption("--all-families"):
        pytest.skip("run with --all-families")
    config = load_config(str(ROOT / "config.toml"), [
        f"model={checkpoints / name}", f"output_dir={tmp_path}", f"vllm_server_port={free_port()}",
        "max_steps=5", "rollouts_per_step=4", "batch_size=16", "async_steps=0", "max_tokens=8",
        "eval_every_steps=0", "inference.args.max_model_len=1024"])
    with served(config) as trainer:
        trainer.environment = dataclasses.replace(
            trainer.environment, weights=None,
            rewards=[lambda completion, answer, **info: float(len(completion))])
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and max(line["kl"] for line in lines) < 1e-6
    for part in ["mlp.experts.", "mlp.gate.", "visual."] if "moe" in name else ["vision_tower."]:
        assert {n for n in before if part in n} & moved


def test_a_limit_of_the_number_of_images_is_no_failure_of_the_others(checkpoints):
    """The words of a real server are those of the test below."""
    config = MultimodalRLConfig(model=str(checkpoints / "qwen2-vl"), inference_args={
        "limit_mm_per_prompt": '{"image": 1}'})
    comparison = check.Comparison(config, report=lambda record: None)
    assert comparison.verdict() == "safe to train"
    words = "400 At most 1 image(s) may be provided in one prompt."
    comparison.refused = {2: check.limit(words, config.inference_args)}
    assert comparison.verdict() == ("safe to train with 0 or 1 image; 2 images: the server allows "
                                    "at most 1, by its flag --limit-mm-per-prompt")
    own = {"limit_mm_per_prompt": {"image": {"count": 4, "width": 512}}}
    assert check.limit(words, own).endswith("vLLM takes no more of them with this model")
    comparison.refused = {0: "no", 2: "No"}
    assert comparison.verdict() == "safe to train with 1 image; 0 images: no; 2 images: No"


def test_the_check_says_what_the_server_says_of_weights_that_it_cannot_load(
        checkpoints, monkeypatch, capsys):
    """At once, and the log is kept; the trainer itself only sees that nobody receives them.

    This server allows a single image, which is none of the check's failures.
    """
    weights = CheckpointSource.__iter__

    def with_one_more(self):
        yield from weights(self)
        if self.version == 1:
            yield "model.nonsense.weight", torch.ones(3)

    monkeypatch.setattr(CheckpointSource, "__iter__", with_one_more)
    monkeypatch.setattr(CheckpointSource, "metadata", lambda self: [
        ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self])
    assert check.main([str(checkpoints / "qwen2-vl"), "--limit-mm-per-prompt", '{"image": 1}']) == 1
    said = capsys.readouterr().out
    assert "images: 1  weight_version: as loaded" in said and "weight_version: 0" in said
    assert "images: 2  not_possible: the server allows at most 1, by its flag --limit" in said
    verdict = said.splitlines()[-1]
    assert "do NOT train this model: weights 1 did not reach" in verdict
    assert "no module or parameter named 'nonsense'" in verdict
    log = Path(verdict.rpartition("(see ")[2].rstrip(")"))
    assert "nonsense" in log.read_text()
    shutil.rmtree(log.parent)
