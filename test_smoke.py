"""Read this first: what each module promises, as values. The last test runs the whole loop."""
import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from adapter import MultimodalAdapter
from batch import MultimodalBatch
from conftest import ROOT, TINY, canned, gradients, make_trainer, noise, relative_difference
from loss import group_advantages, grpo_loss, token_logprobs
from rollout import GenerateOutputs, render_prompt
from support import check
from support.config import MultimodalRLConfig, load_config
from support.images import load_image, png_data_uri
from support.vllm_process import server_command
from train import MultimodalGRPOTrainer, served

USERS_CONFIG = """
model = "Qwen/Qwen2-VL-7B-Instruct"
[env]
id = "your-multimodal-env"
[inference]
gpus = 1
[inference.args]
enforce_eager = true
max_model_len = 8192
limit_mm_per_prompt = { image = 4 }
[trainer]
gpus = 1
[trainer.args]
run_name = "my-vlm-training"
output_dir = "./outputs"
learning_rate = 1e-5
max_steps = 100
batch_size = 512
micro_batch_size = 4
rollouts_per_step = 16
mask_ratio_low = 0.1
mask_ratio_high = 10.0
temperature = 1.0
vllm_server_host = "0.0.0.0"
vllm_server_port = 8000
max_concurrent = 128
sync_to_vllm_every = 1
log_every_steps = 10
"""


# ---- loss.py

OPTIONS = {"mask_ratio_low": 0.1, "mask_ratio_high": 10.0, "clip_low": 0.2, "clip_high": 0.2}


@pytest.mark.parametrize("advantage, ratio, objective, masked, clipped", [
    (2.0, 1.0, 2.0, 0, 0),
    (2.0, 1.15, 2.3, 0, 0),      # inside the clip range: r A
    (2.0, 1.5, 2.4, 0, 1),       # A > 0, above: 1.2 A
    (2.0, 0.5, 1.0, 0, 0),       # A > 0, below: min keeps r A
    (-2.0, 1.5, -3.0, 0, 0),     # A < 0, above: min keeps r A
    (-2.0, 0.5, -1.6, 0, 1),     # A < 0, below: 0.8 A
    (2.0, 0.09, 0.0, 1, 0),      # left out, on either side of [0.1, 10]
    (-2.0, 11.0, 0.0, 1, 0),
])
def test_loss_is_the_hand_computed_value(advantage, ratio, objective, masked, clipped):
    logprobs = torch.tensor([[0.0, -1.0 + math.log(ratio), -9.0]])
    loss, sums = grpo_loss(logprobs, torch.ones(1, 3), torch.tensor([[0.0, -1.0, 0.0]]),
                           torch.tensor([advantage]), torch.tensor([[0, 1, 0]]), num_tokens=4,
                           **OPTIONS)
    assert loss.item() == pytest.approx(-objective / 4, rel=1e-5)
    assert (sums["masked_fraction"].item(), sums["clip_fraction"].item()) == (masked, clipped)
    assert sums["ir"].item() == pytest.approx(ratio, rel=1e-5)
    assert sums["kl"].item() == pytest.approx(ratio - math.log(ratio) - 1, rel=1e-4, abs=1e-7)
    assert (sums["tokens"].item(), sums["ent"].item()) == (1, 1)


def test_on_policy_gradient_is_the_advantage_over_n():
    logprobs = torch.tensor([[0.0, -1.0, -2.0], [0.0, -3.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
    loss, sums = grpo_loss(logprobs, torch.zeros(2, 3), logprobs.detach(), torch.tensor([1., -2.]),
                           mask, num_tokens=3, **OPTIONS)
    loss.backward()
    assert sums["ir"] == 3 and sums["kl"] == 0
    assert torch.allclose(logprobs.grad, torch.tensor([[0, -1, -1], [0, 2, 0]]) / 3)


@pytest.mark.parametrize("mask, behavior", [(0, -1.0), (1, -80.0), (1, 80.0)])
def test_nothing_to_learn_from_is_zero_not_nan(mask, behavior):
    logprobs = torch.full((1, 2), -1.0, requires_grad=True)
    loss, sums = grpo_loss(logprobs, torch.zeros(1, 2), torch.full((1, 2), behavior),
                           torch.tensor([1.0]), torch.tensor([[0, mask]]), num_tokens=mask, **OPTIONS)
    loss.backward()
    assert loss.item() == 0 and (logprobs.grad == 0).all()
    assert all(math.isfinite(value.item()) for value in sums.values())


def test_advantages_are_centered_by_group_and_exactly_zero_for_equal_rewards():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 5.0])
    groups = torch.tensor([7, 7, 7, 7, 2, 2, 2, 3])
    assert group_advantages(rewards, groups).tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    by_std = group_advantages(rewards, groups, divide_by_std=True)
    assert by_std[0].item() == pytest.approx(0.75 / (0.1875**0.5 + 1e-4))


def test_chunked_logprobs_equal_log_softmax_with_its_gradients():
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 50, bias=False), torch.randn(13, 8, requires_grad=True)
    targets, weight = torch.randint(5, 50, (13,)), torch.randn(13)
    logprobs, entropies = token_logprobs(hidden, targets, head, 0.7, [1, 3], max_logits=150)
    ours = torch.autograd.grad((logprobs * weight).sum(), [hidden, head.weight])
    bias = torch.zeros(50)
    bias[[1, 3]] = -100
    plain = ((head(hidden) + bias) / 0.7).log_softmax(-1)
    wanted = torch.autograd.grad((plain[range(13), targets] * weight).sum(), [hidden, head.weight])
    assert torch.allclose(logprobs, plain[range(13), targets], atol=1e-6)
    assert torch.allclose(entropies, -(plain.exp() * plain).sum(-1), atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, wanted))


# ---- batch.py and the forward pass

def test_docstring_examples_run():
    """In a process of their own: here the server that is starting may print into an example."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts)
             for path in (*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("envs/*.py"))
             if ">>> " in path.read_text() and path.stem != "test_smoke"]
    code = ("import doctest, importlib, json, sys; print(json.dumps({name: doctest.testmod("
            "importlib.import_module(name)) for name in sys.argv[1:]}))")
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    found = json.loads(done.stdout.splitlines()[-1])  # by name [failed, attempted]
    assert all(failed == 0 < attempted for failed, attempted in found.values()), done.stdout
    assert found["batch"][1] >= 4 and found["support.config"][1] == 1


def tensors(b=2, length=4, **change):
    mask = torch.ones(b, length, dtype=torch.long)
    mask[:, 0] = 0
    return {"input_ids": torch.ones(b, length, dtype=torch.long), "attention_mask": mask | 1,
            "loss_mask": mask, "behavior_logprobs": torch.zeros(b, length),
            "rewards": torch.zeros(b), **change}


@pytest.mark.parametrize("change, message", [
    ({"behavior_logprobs": torch.zeros(2, 3)}, r"behavior_logprobs is \(2, 3\), .*\(B, L\)"),
    ({"rewards": torch.zeros(3)}, r"rewards is \(3,\), .*\(B,\)"),
    ({"loss_mask": torch.ones(2, 4)}, "column 0"),
    ({"pixel_values": torch.zeros(5, 3)}, "pixel_values has 5 entries.*image_rows"),
])
def test_a_wrong_shape_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        MultimodalBatch(**tensors(**change))


def test_every_row_keeps_its_own_pixels():
    """0, 1 and 3 images of mixed sizes per row, in any order of the rows."""
    trainer = make_trainer()
    adapter = trainer.adapter
    groups = [([noise(56, 56, 1)], [2, 2]), ([], [3, 1]),
              ([noise(84, 56, 2), noise(28, 28, 3), noise(56, 112, 4)], [2, 4])]
    whole = adapter.build_batch(canned(trainer, groups))
    assert whole.prompt_index.tolist() == [0, 0, 1, 1, 2, 2]
    picked = whole.select(torch.tensor([5, 2, 1]))
    for row, (images, _) in zip(range(3), (groups[2], groups[1], groups[0])):
        got = picked.select(torch.tensor([row]))
        if images:
            wanted = adapter.processor.image_processor(images, return_tensors="pt")
            assert torch.equal(got.pixel_values, wanted["pixel_values"])
            assert torch.equal(got.extra_model_kwargs["image_grid_thw"], wanted["image_grid_thw"])
        else:
            assert got.pixel_values is None


GROUPS = {  # (images, completion lengths) per prompt
    "different lengths": [([noise(56, 56)], [1, 7, 3, 5])],
    "two images": [([noise(56, 84), noise(84, 56, 1)], [4, 2, 6])],
    "text only": [([], [3, 5, 2]), ([], [1, 4])],
    "a mixture": [([noise(56, 56)], [2, 6, 3]), ([], [4, 1]),
                  ([noise(84, 84), noise(56, 56, 2)], [5, 3, 2])],
    "conversations": [([noise(56, 56)], [2, 4, 3], [[noise(84, 56, 3)], [], [noise(28, 56, 4)]]),
                      ([], [3, 1], [[noise(56, 56, 5), noise(56, 84, 6)]]), ([], [2, 2], [[]]),
                      ([noise(56, 84, 7)], [3, 3], [[]]), ([noise(56, 56, 8)], [4, 2])],
}


@pytest.mark.parametrize("micro_batch_size", [16, 2])  # 2 splits the groups
@pytest.mark.parametrize("name", GROUPS)
def test_sharing_the_prompt_changes_nothing(name, micro_batch_size):
    found = []
    for share in (False, True):
        trainer = make_trainer(share_prompt=share, micro_batch_size=micro_batch_size)
        outputs = canned(trainer, GROUPS[name])
        batch = trainer.build_batch(outputs)
        with torch.no_grad():
            logprobs, entropies = trainer.policy(batch, share)
        found.append((logprobs, entropies, gradients(trainer, outputs)))
    (plain, plain_entropy, plain_grad), (shared, shared_entropy, shared_grad) = found
    assert (plain - shared).abs().max() < 1e-5
    assert (plain_entropy - shared_entropy).abs().max() < 1e-5
    assert relative_difference(plain_grad, shared_grad) < 1e-5
    assert any(".visual." in n and g.any() for n, g in plain_grad.items()) == (name != "text only")


@pytest.mark.parametrize("share", [False, True])
def test_micro_batches_add_up_to_the_full_gradient(share):
    found = []
    for size in (16, 3, 1):
        trainer = make_trainer(share_prompt=share, micro_batch_size=size)
        found.append(gradients(trainer, canned(trainer, GROUPS["a mixture"])))
    assert relative_difference(found[0], found[1]) < 1e-5
    assert relative_difference(found[0], found[2]) < 1e-5


def test_prompts_are_shared_by_default_and_dead_groups_are_not_forwarded():
    trainer = make_trainer(micro_batch_size=8)
    outputs = canned(trainer, [([noise(56, 56)], [3] * 4), ([noise(56, 56)], [3] * 4)])
    outputs.reward[4:] = [1.0] * 4
    metrics = trainer.update(outputs)
    assert metrics["shared_fraction"] == 0.5 and metrics["zero_advantage_groups"] == 0.5
    assert metrics["tokens"] == 24  # N still counts them
    outputs.reward[:] = [1.0] * 8
    metrics = trainer.update(outputs)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and metrics["kl"] > 0
    assert all(p.isfinite().all() for p in trainer.model.parameters())


# ---- adapter.py

def test_the_end_token_is_trained_also_when_it_is_the_padding():
    trainer = make_trainer()
    outputs = canned(trainer, [([noise(56, 56)], [3, 5])])
    outputs.completion_ids[0][-1] = 0  # what the rows are padded with
    built = trainer.build_batch(outputs)
    prompt = len(outputs.prompt_ids[0])
    assert built.loss_mask[0].tolist() == [0] * prompt + [1, 1, 1, 0, 0]
    assert built.attention_mask[0].tolist() == [1] * (prompt + 3) + [0, 0]


def test_a_custom_adapter_needs_build_batch_alone():
    class RewardsInverted(MultimodalAdapter):
        def build_batch(self, outputs):
            rows = [p + c for p, c in zip(outputs["prompt_ids"], outputs["completion_ids"])]
            ids = torch.tensor(rows)
            mask = torch.zeros_like(ids)
            mask[:, len(outputs.prompt_ids[0]):] = 1
            return MultimodalBatch(ids, torch.ones_like(ids), mask, -mask.float(),
                                   1 - torch.tensor(outputs.reward))

    trainer = make_trainer()
    outputs = canned(trainer, [([], [3, 3, 3, 3])])
    custom = MultimodalGRPOTrainer(trainer.model, trainer.tokenizer, RewardsInverted(),
                                   trainer.config)
    assert trainer.build_batch(outputs).advantages.tolist() == [0.5, -0.5, 0.5, -0.5]
    assert custom.build_batch(outputs).advantages.tolist() == [-0.5, 0.5, -0.5, 0.5]
    assert custom.update(outputs)["tokens"] == 12


# ---- rollout.py

def test_images_come_in_every_form(tmp_path):
    image = noise(30, 20)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for source in (image, tmp_path / "a.png", str(tmp_path / "a.png"), data, {"bytes": data},
                   {"path": str(tmp_path / "a.png"), "bytes": None}, png_data_uri(image)):
        assert load_image(source).tobytes() == image.tobytes()
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert load_image(clear).getpixel((0, 0)) == (255, 255, 255)
    (tmp_path / "bad.png").write_bytes(data[:40])
    for source in (tmp_path / "bad.png", tmp_path / "none.png", "data:image/png;base64,AAAA"):
        with pytest.raises(ValueError, match="cannot read image"):
            load_image(source)


def test_messages_become_openai_parts_in_order():
    a, b = noise(28, 28, 1), noise(28, 56, 2)
    messages, images = render_prompt([
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [
            {"type": "image", "image": a}, {"type": "text", "text": "?"},
            {"type": "image_url", "image_url": {"url": png_data_uri(b)}}]}])
    assert [i.size for i in images] == [(28, 28), (28, 56)] and messages[0]["content"] == "Look."
    assert [p["type"] for p in messages[1]["content"]] == ["image_url", "text", "image_url"]
    assert messages[1]["content"][2]["image_url"]["url"] == png_data_uri(b)


def test_outputs_answer_to_attributes_and_keys():
    outputs = GenerateOutputs(completion_ids=[[1], [2]], reward=[0.0, 1.0])
    assert outputs["reward"] is outputs.reward and len(outputs) == 2


# ---- train.py: the config

def test_the_users_config_loads_and_means_what_it_says(tmp_path):
    (tmp_path / "c.toml").write_text(USERS_CONFIG)
    config = load_config(tmp_path / "c.toml", ["max_steps=5", "env.args.n=3", "run_name=x",
                                               "inference.args.dtype=bfloat16"])
    assert (config.group_size, config.max_steps, config.env_args, config.run_name) == (
        32, 5, {"n": 3}, "x")
    command = server_command(config)
    for words in (["--enforce-eager", "--max-model-len", "8192"], ["--dtype", "bfloat16"],
                  ["--limit-mm-per-prompt", '{"image": 4}'], ["--host", "127.0.0.1"],
                  ["--weight-transfer-config", '{"backend": "nccl"}'],
                  ["--logprobs-mode", "processed_logprobs"]):
        at = command.index(words[0])
        assert command[at:at + len(words)] == words


@pytest.mark.parametrize("override, message", [
    ("learning_rat=1", "'trainer.args.learning_rat'; did you mean 'trainer.args.learning_rate'"),
    ("inference.gpu=1", "'inference.gpu'; did you mean 'inference.gpus'"),
    ("max_steps=ten", "max_steps must be int, not 'ten'"),
    ("max_steps=true", "max_steps must be int, not True"),
    ("learning_rate=-1.0", "learning_rate must be above 0"),
    ("batch_size=500", "batch_size 500 must be rollouts_per_step 16 times G"),
    ("batch_size=16", "the group size, at least 2"),
    ("max_steps", "is not key=value"),
])
def test_a_config_mistake_is_one_line_with_file_key_and_mend(tmp_path, override, message):
    (tmp_path / "c.toml").write_text(USERS_CONFIG)
    with pytest.raises(ValueError, match=f"c.toml: .*{message}") as error:
        load_config(tmp_path / "c.toml", [override])
    assert "\n" not in str(error.value)


def test_the_constructor_of_the_readme_contacts_no_server():
    config = MultimodalRLConfig(
        output_dir="outputs", env_id="colors", env_args={"num_train": 4}, learning_rate=1e-5,
        max_steps=100, rollouts_per_step=16, vllm_server_host="localhost", vllm_server_port=8000)
    trainer = make_trainer(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    assert trainer.config.group_size == 32 and len(trainer.environment.train) == 4


# ---- sync.py, and everything together

def test_weights_go_under_the_names_of_the_checkpoint_file():
    trainer = make_trainer()
    sent = dict(trainer.source)
    assert sent.pop("lm_head.weight").equal(sent["model.embed_tokens.weight"])  # they are tied
    trainer.source.all_names = False  # for a server that has no such module
    assert sent.keys() == dict(trainer.source).keys()
    with safe_open(f"{TINY}/model.safetensors", "pt") as file:
        assert sent.keys() == set(file.keys())
    assert "visual.blocks.0.attn.qkv.weight" in sent
    meta = trainer.source.metadata()
    assert [(m.name, m.shape) for m in meta] == [(n, tuple(t.shape)) for n, t in sent.items()]


def test_two_steps_on_a_real_server(server, tmp_path):
    """Weights change on both sides and agree; the metrics and a loadable checkpoint are left."""
    config = dataclasses.replace(server, max_steps=2, output_dir=str(tmp_path), log_every_steps=1)
    with served(config) as trainer:
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        assert trainer.server.lease.served().startswith("2 by run 'colors', process ")
        found = check.server(trainer.policy, trainer.build_batch(
            trainer.generator.collect(trainer.generator.begin(5, 4, 4))), must_agree=True)
    assert found["max"] < 1e-5  # a server with the old weights would be 1e-2 off
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
    lines = [json.loads(line) for line in open(tmp_path / "colors" / "metrics.jsonl")]
    assert [line["step"] for line in lines] == [1, 2] and all(line["kl"] < 1e-6 for line in lines)
    folder = tmp_path / "colors" / "rollouts" / "step-2"
    groups = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert [len(group["completions"]) for group in groups] == [8, 8]
    for group in groups:
        assert [load_image(folder / name).size[1] >= 56 for name in group["images"]] == [True]
        assert sum(said["advantage"] for said in group["completions"]) == pytest.approx(0, abs=1e-5)
    saved = make_trainer(str(tmp_path / "colors" / "checkpoint-2")).model
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), trainer.model.parameters()))
