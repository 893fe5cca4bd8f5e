"""The layout: which module may import which, what a fork touches, and what a batch refuses."""
import ast
import contextlib
import dataclasses
import re

import pytest
import torch

import train
from adapter import MultimodalAdapter
from batch import MultimodalBatch
from conftest import ROOT, canned, gradients, make_trainer, noise, relative_difference
from support.config import MultimodalRLConfig, load_config
from support.task import encoding_pool

LEVELS = {  # an import goes down, or sideways between the modules of the middle
    "train": 3, "policy": 2, "adapter": 2, "rollout": 2, "sync": 2, "support": 2,
    "batch": 1, "loss": 1}


def code_lines(path) -> int:
    """Lines of 88 columns of a module's syntax tree, without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(
                body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
            body[0] = ast.Pass()
    lines = [line for line in ast.unparse(tree).splitlines() if line.strip() not in ("", "pass")]
    return sum(-(-len(line) // 88) for line in lines)


def test_the_sizes_in_the_readme_are_those_of_the_code():
    told = dict(re.findall(r"^\| `([\w./]+)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M))
    found = {f"{name}.py": code_lines(ROOT / f"{name}.py") for name in LEVELS if name != "support"}
    found["support/"] = sum(code_lines(path) for path in (ROOT / "support").glob("*.py"))
    assert {name: int(lines) for name, lines in told.items()} == {
        name: round(lines, -1) for name, lines in found.items()}


def test_every_link_of_the_documentation_leads_somewhere():
    def anchors(path) -> set[str]:
        titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
        return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}

    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            name, _, anchor = target.partition("#")
            if not target.startswith("http"):
                path = (page.parent / name).resolve() if name else page
                assert path.exists(), f"{page.name}: {target}"
                assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


def imports() -> dict[str, set[str]]:
    """{module: the modules of this project that it imports, in functions and main blocks, too}"""
    paths = list(ROOT.glob("*.py")) + list((ROOT / "support").glob("*.py"))
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    found = {}
    for name, path in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found[name] |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
        found[name] &= names.keys()
    return found


def test_nothing_else_is_at_the_top():
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert modules == LEVELS.keys() - {"support"} | {"conftest", "test_smoke"}


def test_imports_go_down_and_never_in_a_circle():
    found = imports()
    for module, imported in found.items():
        if module not in ("conftest", "test_smoke"):
            for other in imported:
                levels = [LEVELS[name.split(".")[0]] for name in (module, other)]
                assert levels[0] >= levels[1] and other != "train", f"{module} imports {other}"
    done = set()
    while done != found.keys():
        free = {module for module in found.keys() - done if found[module] <= done}
        assert free, f"a circle among {found.keys() - done}"
        done |= free


# ---- forks

def test_a_metric_of_the_loss_needs_one_place(monkeypatch):
    """grpo_loss returns it: the mean over the forwarded tokens is in the metrics of the step."""
    plain = train.grpo_loss

    def with_a_metric(logprobs, *tensors, **options):
        loss, sums = plain(logprobs, *tensors, **options)
        return loss, {**sums, "twice": 2 * sums["tokens"]}

    monkeypatch.setattr(train, "grpo_loss", with_a_metric)
    trainer = make_trainer()
    outputs = canned(trainer, [([noise(56, 56)], [3, 2])])
    assert trainer.update(outputs)["twice"] == 2
    outputs.finish_reason = ["length"] * 2
    truncated = make_trainer(mask_truncated=True)
    assert truncated.update(outputs)["twice"] == 0  # also where no token is trained


def test_a_key_of_the_loss_needs_its_field_alone():
    options = MultimodalRLConfig(clip_high=0.3).loss_options()
    assert options == {"mask_ratio_low": 0.1, "mask_ratio_high": 10.0, "clip_low": 0.2,
                       "clip_high": 0.3}


class OwnAdapter(MultimodalAdapter):
    """Made by its name in the config."""


def test_an_own_adapter_is_made_from_its_name_in_the_config(tmp_path):
    from adapter import load_adapter
    processor = make_trainer().adapter.processor
    config = load_config(ROOT / "config.toml", ["trainer.adapter=test_structure:OwnAdapter"])
    adapter = load_adapter(config.adapter, processor)
    assert type(adapter).__name__ == "OwnAdapter"
    assert adapter.processor is processor and adapter.tokenizer is processor.tokenizer
    assert type(load_adapter("", processor)) is MultimodalAdapter
    for name in ("test_structure:Missing", "no_such_module:Adapter", "test_structure", "json:loads"):
        with pytest.raises(ValueError, match=f"adapter '{name}' is not .module:Class."):
            load_adapter(name, processor)


def test_an_adapter_keeps_a_tokenizer_without_a_processor():
    tokenizer = make_trainer().tokenizer
    adapter = OwnAdapter(tokenizer=tokenizer)
    assert adapter.tokenizer is tokenizer and adapter.processor is None


# ---- several optimizer steps per batch of rollouts

GROUPS = [([noise(56, 56)], [3, 5]), ([], [4, 2]), ([noise(84, 56, 1)], [2, 6]), ([], [1, 4])]


def test_several_updates_take_the_prompts_in_turn_from_changed_weights():
    """The first takes prompts 0 and 2 as if alone; the second finds weights that have moved."""
    one, two = (make_trainer(updates_per_rollout=n, rollouts_per_step=4, learning_rate=1e-3)
                for n in (1, 2))
    outputs = canned(one, GROUPS)
    with torch.no_grad():  # sampled by this very policy: a ratio of 1 until something moves
        batch = one.build_batch(outputs)
        logprobs, _ = one.policy(batch, share=False)
    outputs.completion_logprobs = [row[mask.bool()].tolist()
                                   for row, mask in zip(logprobs, batch.loss_mask)]
    steps, take_step = [], two.optimizer_step
    two.optimizer_step = lambda batch: steps.append((batch, take_step(batch))) or steps[-1][1]
    assert one.update(outputs)["kl"] < 1e-9
    metrics = two.update(outputs)
    (first, first_metrics), (second, second_metrics) = steps
    assert [len(first), len(second)] == [4, 4] and first.loss_mask.sum() == 16
    assert torch.equal(first.pixel_values[:first.image_rows["pixel_values"][0]],
                       batch.pixel_values[:batch.image_rows["pixel_values"][0]])
    assert first_metrics["kl"] < 1e-9 < 1e-6 < second_metrics["kl"]
    assert metrics["kl"] == pytest.approx((first_metrics["kl"] + second_metrics["kl"]) / 2)
    assert metrics["step"] == 1 and metrics["tokens"] == 27 and metrics["skipped"] == 0


def test_the_gradient_of_a_part_is_that_of_its_prompts_alone():
    trainer = make_trainer(rollouts_per_step=4)
    outputs = canned(trainer, GROUPS)
    part = trainer.build_batch(outputs).parts(2)[1]
    alone = canned(trainer, GROUPS)
    keep = [2, 3, 6, 7]
    for field in dataclasses.fields(alone):
        column = getattr(alone, field.name)
        if isinstance(column, list) and column:
            setattr(alone, field.name, [column[row] for row in keep])
    wanted = gradients(trainer, alone)
    trainer.policy.zero_grad()
    trainer.gradients(turns := part.turns(4), [True] * len(turns), part.loss_mask.sum().item())
    found = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert relative_difference(wanted, {n: found[n] for n in wanted}) < 1e-5


def test_more_updates_than_prompts_are_refused():
    with pytest.raises(ValueError, match="updates_per_rollout 5 must be at most rollouts_per_step"):
        MultimodalRLConfig(batch_size=8, rollouts_per_step=4, updates_per_rollout=5)


# ---- what a batch of somebody's own adapter may get wrong without an error anywhere later

def tensors(**change) -> dict:
    """Two rows [prompt, prompt, completion, padding]."""
    ids = torch.tensor([[5, 6, 7, 0], [5, 6, 8, 0]])
    mask = torch.tensor([[0, 0, 1, 0]] * 2)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "loss_mask": mask,
            "behavior_logprobs": torch.zeros(2, 4), "rewards": torch.zeros(2), **change}


@pytest.mark.parametrize("change, message", [
    ({"attention_mask": torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]])}, "padding must be at the end"),
    ({"attention_mask": torch.tensor([[1, 0, 1, 0], [1, 1, 1, 0]])}, "padding must be at the end"),
    ({"loss_mask": torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]])}, "padding, where attention_mask is"),
    ({"prompt_index": torch.tensor([0, 0]), "input_ids": torch.tensor([[5, 6, 7, 0], [5, 9, 8, 0]])},
     "rows 0 and 1 are of prompt 0, but"),
    ({"prompt_index": torch.tensor([0, 0]), "loss_mask": torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0]])},
     "rows 0 and 1 are of prompt 0, but"),
    ({"prompt_index": torch.tensor([0, 0]), "pixel_values": torch.zeros(2, 3)},
     r"image_rows\['pixel_values'\] is missing"),
    ({"prompt_index": torch.tensor([0, 1]), "pixel_values": torch.zeros(2, 3),
      "image_rows": {"pixel_values": [2]}}, "a number for each prompt"),
])
def test_a_batch_that_would_train_something_else_is_refused(change, message):
    MultimodalBatch(**tensors())
    with pytest.raises(ValueError, match=message):
        MultimodalBatch(**tensors(**change))


def test_without_image_rows_every_row_shows_one_image():
    """An entry of the tensor each, or as many patches as its line of the grid says."""
    plain = MultimodalBatch(**tensors(pixel_values=torch.zeros(2, 3, 4, 4)))
    assert plain.image_rows == {"pixel_values": [1, 1]}
    grid = torch.tensor([[1, 2, 4], [1, 4, 6]])
    patches = MultimodalBatch(**tensors(pixel_values=torch.arange(32.0)[:, None],
                                        extra_model_kwargs={"image_grid_thw": grid}))
    assert patches.image_rows == {"pixel_values": [8, 24], "image_grid_thw": [1, 1]}
    assert patches.select([1]).pixel_values[:, 0].tolist() == list(range(8, 32))


def test_threads_that_encode_leave_the_trainer_its_own():
    (torch.ones(300, 300) @ torch.ones(300, 300)).sum()  # torch counts a thread's helpers in here
    before = torch.get_num_threads()
    with contextlib.closing(encoding_pool()) as pool:
        assert pool.apply(torch.get_num_threads) == 1
    assert torch.get_num_threads() == before
