"""The zoo of silent bugs: its document says what was measured, and its bugs still bite."""
import re

import pytest
import torch

from bench import zoo
from conftest import ROOT, canned, gradients, make_trainer, noise, relative_difference

OF_THE_SERVER = {"never-synced", "tied-head-not-sent", "old-encoder-cache", "old-prefix-cache",
                 "sampled-placeholders", "failures-as-zero"}
BUGS = [name for name, entry in zoo.ZOO.items() if entry.twin]
IN_A_STEP = [name for name in BUGS if not zoo.ZOO[name].flags and name not in OF_THE_SERVER]


def test_the_table_of_the_zoo_is_that_of_its_raw_lines():
    text = zoo.DOC.read_text()
    assert text == zoo.with_table(text, zoo.records())
    assert {record["bug"] for record in zoo.records()} == zoo.ZOO.keys()


def test_every_bug_is_told_with_its_guard_and_a_test_that_exists():
    lines = zoo.DOC.read_text().split("<!-- bugs -->\n")[1].split("\n<!-- end -->")[0].split("\n")
    assert re.findall(r"(?m)^\| `([\w-]+)`", "\n".join(lines)) == BUGS
    tests = "".join(path.read_text() for path in [ROOT / "test_smoke.py",
                                                  *(ROOT / "tests").glob("test_*.py")])
    for line in lines[2:]:
        assert re.search(r"github.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", line)
        test = re.search(r"`(test_\w+)` \|$", line)
        assert f"def {test[1]}(" in tests
        for path, name in re.findall(r"`([\w/]+\.py): (\w+)`", line):
            assert re.search(rf"(def|class) {name}\b", (ROOT / path).read_text()), (path, name)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_bug_finds_what_it_patches_and_leaves_nothing(name):
    patches = [*zoo.ALARMS_OFF, *zoo.ZOO[name].patches]
    originals = [getattr(owner, attribute) for owner, attribute, _ in patches]
    with zoo.patched(*patches):
        for (owner, attribute, _), original in zip(patches, originals, strict=True):
            assert getattr(owner, attribute) is not original
    assert [getattr(owner, attribute) for owner, attribute, _ in patches] == originals


def test_the_caches_that_the_zoo_keeps_are_those_that_a_sync_empties():
    text = (ROOT / "sync.py").read_text()
    for route in ("pause?mode=keep", "reset_prefix_cache", "reset_mm_cache",
                  "reset_encoder_cache"):
        assert f'self.call("{route}' in text


REFUSED = {"expanded-twice": "the chat template writes", "retokenised": "one logprob for each"}


@pytest.mark.parametrize("name", IN_A_STEP)
def test_a_bug_of_the_zoo_changes_what_a_step_trains(name):
    """By the first gradient; bf16 weights by the weights after the first step."""
    options = {"temperature": 0.7, "micro_batch_size": 4}
    groups = [([noise(56, 56, 1)], [2, 5, 1, 3]), ([noise(56, 56, 2)], [4, 1, 1, 2])]
    outputs = canned(make_trainer(**options), groups)
    outputs.reward = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    outputs.encoded = []  # the adapter is asked
    for ids in outputs.completion_ids:
        ids[-1] = 1  # the end token

    def trained() -> dict[str, torch.Tensor]:
        trainer = make_trainer(**options)
        trainer.checked = True  # the alarms are not what is asked here
        if name != "bf16-weights":
            return gradients(trainer, outputs)
        trainer.update(outputs)
        return dict(trainer.model.state_dict())

    healthy = trained()
    with zoo.patched(*zoo.ZOO[name].patches):
        if name in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[name]):
                trained()
        else:
            changed = trained()
            shared = {key: tensor for key, tensor in healthy.items() if key in changed}
            assert relative_difference(shared, changed) > 1e-5
