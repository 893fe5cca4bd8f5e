"""Data as people have it: what reaches the model is what was meant, or one line says why not."""
import base64
import dataclasses
import http.server
import io
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from multiprocessing.pool import ThreadPool

import numpy
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import policy
from adapter import MultimodalAdapter
from batch import MultimodalBatch
from conftest import (ROOT, TINY, canned, free_port, gradients, make_trainer, noise,
                      relative_difference)
from loss import group_advantages, grpo_loss, token_logprobs
from policy import Policy, train_in_fp32
from rollout import Environment, GenerateOutputs, Generator, Job, render_prompt
from support import check
from support.config import MultimodalRLConfig
from support.images import check_public, load_image
from support.prompts import clean_prompt, row_prompt
from support.vllm_process import server_command
from sync import Server


def png(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---- pixels

def lazy_from_path(image, folder):
    image.save(folder / "a.png")
    return Image.open(folder / "a.png")


def lazy_from_zip(image, folder):
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("a.png", png(image))
    return Image.open(zipfile.ZipFile(folder / "a.zip").open("a.png"))


def open_file(image, folder):
    image.save(folder / "a.png")
    return open(folder / "a.png", "rb")


def drafted(image, folder):
    """A JPEG that the user has asked for at a quarter of its size, and in grey."""
    image.save(folder / "a.jpg")
    opened = Image.open(folder / "a.jpg")
    opened.draft("L", (image.width // 4, image.height // 4))
    return opened


def second_frame(image, _):
    frames = png(image, "MPO", save_all=True, append_images=[noise(400, 300, 1)])
    opened = Image.open(io.BytesIO(frames))
    opened.seek(1)
    return opened


SHARED = {
    "opened from a path": lazy_from_path,
    "opened from bytes": lambda image, _: Image.open(io.BytesIO(png(image))),
    "opened from an archive": lazy_from_zip,
    "lossless webp": lambda image, _: Image.open(io.BytesIO(png(image, "WEBP", lossless=True))),
    "a compressed tiff": lambda image, _: Image.open(
        io.BytesIO(png(image, "TIFF", compression="tiff_lzw"))),
    "a palette": lambda image, _: Image.open(io.BytesIO(png(image.convert("P"), "GIF"))),
    "drafted": drafted,
    "second frame": second_frame,
    "an open file": open_file,
    "a buffer": lambda image, _: io.BytesIO(png(image)),
    "decoded": lambda image, _: image.copy(),
}


@pytest.mark.parametrize("kind", SHARED)
def test_rows_that_share_an_image_all_see_its_pixels_and_leave_it_alone(tmp_path, kind):
    picture = noise(400, 300)
    for _ in range(5):
        shared, other = SHARED[kind](picture, tmp_path), SHARED[kind](picture, tmp_path)
        is_image = isinstance(shared, Image.Image)
        wanted = (other if is_image else picture).convert("RGB").tobytes()
        lazy = is_image and shared._im is None
        seen, start = [], threading.Barrier(16)

        def look():
            start.wait()
            seen.append(load_image(shared).tobytes())

        threads = [threading.Thread(target=look) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [wanted] * 16
        if lazy:
            assert shared._im is None and shared.fp is not None  # still as it was opened
        if is_image:
            assert shared.convert("RGB").tobytes() == wanted
        else:
            assert shared.tell() == 0 and shared.read() == png(picture)


def test_images_in_info_belong_to_one_thread_too(monkeypatch, tmp_path):
    """Rewards and adapters are given them, each in a thread of its own."""
    picture = noise(400, 300)
    shared = lazy_from_path(picture, tmp_path)
    monkeypatch.setattr(Generator, "call", lambda *_, **__: {"data": [{"id": "m"}]})
    rows = [{"prompt": "?", "info": {"views": [shared]}}] * 16
    generator = Generator(Environment(train=rows, eval=[], rewards=[length]), MultimodalRLConfig())

    def look(index: int) -> bytes:
        row, _, _ = generator.read(Job(rows, index, 1, 0))
        return row["info"]["views"][0].convert("RGB").tobytes()

    with ThreadPool(16) as pool:
        assert pool.map(look, range(16), chunksize=1) == [picture.tobytes()] * 16
    assert shared._im is None and shared.fp is not None


# ---- conversations

RED, BLUE = Image.new("RGB", (28, 28), "red"), Image.new("RGB", (56, 28), "blue")
TEXT = {"type": "text", "text": "What?"}


def user(*content):
    return [{"role": "user", "content": list(content)}]


def shown(row) -> tuple[list, list]:
    """What the model gets of a row: its parts in order, and its images."""
    messages, images = render_prompt(row_prompt(row))
    parts = []
    for message in messages:
        content = message["content"]
        for part in [{"text": content}] if isinstance(content, str) else content:
            parts.append(part.get("text", "IMAGE"))
    return parts, [image.tobytes() for image in images]


STRUCT = {"bytes": png(RED), "path": None}
ONE_SCHEMA = [{"type": "image", "text": None, "image": STRUCT, "image_url": None},
              {"type": "text", "text": "What?", "image": None, "image_url": None}]
GOOD = {
    "keys filled with None": user(*ONE_SCHEMA),
    "structs of Nones": user(ONE_SCHEMA[0], {**TEXT, "image": {"bytes": None, "path": None}}),
    "messages filled with None": [{**user(*ONE_SCHEMA)[0], "name": None, "tool_calls": None}],
    "tuples": ({"role": "user", "content": ({"type": "image", "image": RED}, TEXT)},),
    "arrays": numpy.array([{"role": "user", "content": numpy.array(ONE_SCHEMA)}]),
    "no type": user({"image": RED}, {"text": "What?"}),
    "a plain string among parts": user({"type": "image", "image": RED}, "What?"),
    "pixels in an array": user({"type": "image", "image": numpy.asarray(RED)}, TEXT),
    "a file in an array": user(
        {"type": "image", "image": numpy.frombuffer(png(RED), numpy.uint8)}, TEXT),
    "image_url without a dict": user(
        {"type": "image_url", "image_url": "data:image/png;base64,"
         + base64.b64encode(png(RED)).decode()}, TEXT),
    "under the key of another type": user({"type": "image", "image_url": {"url": None},
                                           "image": RED}, TEXT),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_conversation_in_any_form_shows_its_image_and_its_text(name):
    assert shown({"prompt": GOOD[name]}) == (["IMAGE", "What?"], [RED.tobytes()])


@pytest.mark.parametrize("prompt, column, parts", [
    ("<image>What?", {"images": [RED]}, ["IMAGE", "What?"]),
    ([{"role": "user", "content": "<image>A<image>B?"}], {"images": [RED, BLUE]},
     ["IMAGE", "A", "IMAGE", "B?"]),
    (user({"type": "text", "text": "A <image> B"}), {"image": RED}, ["A ", "IMAGE", " B"]),
    (user({"type": "image"}, TEXT, {"type": "image", "image": None}), {"images": (RED, BLUE)},
     ["IMAGE", "What?", "IMAGE"]),
    ("<image>What?", {"images": numpy.array([STRUCT, None], object)}, ["IMAGE", "What?"]),
    ("<image>What?", {"image": numpy.asarray(RED)}, ["IMAGE", "What?"]),
    (user({"type": "image", "image": RED}, TEXT), {"images": [RED]}, ["IMAGE", "What?"]),
    ("What?", {"images": []}, ["What?"]),
    ("What?", {"images": math.nan, "image": None}, ["What?"]),  # of a pandas table
    ([{"role": "system", "content": "<image>A"}, *user({"type": "image", "image": BLUE})],
     {"images": [], "image": STRUCT}, ["IMAGE", "A", "IMAGE"]),
])
def test_the_images_of_a_column_stand_where_the_prompt_says(prompt, column, parts):
    found = shown({"prompt": prompt, **column})
    wanted = [image.tobytes() for image in (RED, BLUE)][:parts.count("IMAGE")]
    assert found == (parts, wanted)


BAD = {
    "images in both columns": ({"prompt": "<image>?", "images": [RED], "image": BLUE}, "in both"),
    "images in the column behind an empty one": (
        {"prompt": "What?", "images": [], "image": RED}, "1 images in a column, .* shows 0"),
    "images beside the content": (
        {"prompt": [{"role": "user", "content": "What?", "images": ["a.png"]}]},
        "message 0 has images beside its content"),
    "a column of videos": ({"prompt": "<video>What?", "videos": ["a.mp4"]}, "column `videos`"),
    "no parts": ({"prompt": user()}, "message 0: content is empty"),
    "an array of no dimension": ({"prompt": numpy.array("What?")}, "not a list"),
    "a list in the list": ({"prompt": [user(TEXT)]}, "message 0 has no role"),
    "a list as a part": ({"prompt": user([TEXT])}, "part 0 is a list"),
    "another case": ({"prompt": user({"type": "TEXT", "text": "x"})}, "part 0 is of type 'TEXT'"),
    "two images in a part": ({"prompt": user({"type": "image", "image": [RED, BLUE]})},
                             "a list is no image"),
    "channels first": (
        {"prompt": user({"type": "image", "image": numpy.zeros((3, 30, 40), numpy.uint8)})},
        "cannot read image"),
    "a column that is not shown": ({"prompt": "What?", "images": [RED]}, "but its prompt shows 0"),
    "one image too many": ({"prompt": "<image>?", "images": [RED, BLUE]}, "2 images .* shows 1"),
    "one image too few": ({"prompt": "<image><image>?", "images": [RED]}, "image number 2"),
    "a marker without a column": ({"prompt": "<image>?", "pictures": [RED]}, "image number 1"),
    "an image part without image": ({"prompt": user({"type": "image"}, TEXT)}, "message 0, part 0"),
    "content None": ({"prompt": [{"role": "user", "content": None}]}, "message 0: content is None"),
    "no content": ({"prompt": [{"role": "user"}]}, "message 0: content is None"),
    "text None": ({"prompt": user({"type": "text", "text": None})}, "whose text is None"),
    "a number as text": ({"prompt": user({"type": "text", "text": 3})}, "whose text is 3"),
    "no role": ({"prompt": [{"content": "hi"}]}, "message 0 has no role"),
    "a video": ({"prompt": user({"type": "video", "video": "a.mp4"})}, "of type 'video'"),
    "nothing known": ({"prompt": user({"picture": RED})}, "of type None"),
    "an image in a text part": ({"prompt": user({**TEXT, "image": RED})},
                                "part 0 is of type 'text', but a text and an image are two"),
    "a text in an image part": ({"prompt": user({"type": "image", "image": RED, "text": "x"})},
                                "part 0 is of type 'image', but a text and an image are two"),
    "a picture as a part": ({"prompt": user(RED, TEXT)}, "part 0 is a Image"),
    "no prompt": ({"answer": "x"}, "no 'prompt'"),
    "an empty prompt": ({"prompt": []}, "prompt is empty"),
    "prompt None": ({"prompt": None}, "no 'prompt'"),
    "float pixels": ({"prompt": user({"type": "image", "image": numpy.zeros((9, 9))})},
                     "cannot read image"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_row_is_said_in_one_line(name):
    row, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        shown(row)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["<|image_pad|>", "a <|video_pad|> b"])
@pytest.mark.parametrize("images", [[], [RED]])
def test_a_quoted_placeholder_is_refused_where_the_prompt_is_made(text, images):
    adapter = make_trainer().adapter
    content = [{"type": "image", "image": image} for image in images]
    with pytest.raises(ValueError, match="message 0 quotes '<.(image|video)_pad.>'"):
        adapter.encode(user(*content, {"type": "text", "text": text}), images)
    with pytest.raises(ValueError, match="message 0 quotes"):
        clean_prompt([{"role": "user", "content": "x", "name": text}], reserved=[text])


def test_a_placeholder_of_two_texts_is_refused_as_one():
    parts = [{"type": "text", "text": "<|image"}, {"type": "text", "text": "_pad|>"}]
    with pytest.raises(ValueError, match="message 0 quotes '<.image_pad.>'"):
        clean_prompt(user(*parts), reserved=["<|image_pad|>"])
    between = user(parts[0], {"type": "image", "image": RED}, parts[1])
    assert clean_prompt(between, reserved=["<|image_pad|>"]) == between


FIRST = "{{ messages[0]['role'] }}{{ messages[0]['content'] }}"


@pytest.mark.parametrize("template, options, message, images", [
    (FIRST + "{{ note }}", {"note": "<|image_pad|>"}, {"role": "user", "content": "x"}, []),
    (FIRST, {}, {"role": "<|image", "content": "_pad|>"}, []),
    ("blind", {}, user({"type": "image", "image": RED}, TEXT)[0], [RED]),
    ("<|image_pad|>" * 2, {}, user({"type": "image", "image": RED}, TEXT)[0], [RED]),
])
def test_a_template_has_one_place_for_each_image(template, options, message, images):
    trainer = make_trainer(inference_args={"chat_template": "{# {} #}" + template,
                                           "chat_template_kwargs": options})
    with pytest.raises(ValueError, match=f"writes .* into a prompt of {len(images)} images"):
        trainer.adapter.encode([message], images)


def test_the_rows_of_the_user_stay_as_they_are():
    row = {"prompt": user(*ONE_SCHEMA), "images": [RED]}
    before = repr(row)
    shown(row)
    assert repr(row) == before


def length(completion, answer, **info):
    return float(len(completion))


def trainer_on(server, rows, **options):
    trainer = make_trainer(**{f.name: getattr(server, f.name) for f in dataclasses.fields(server)}
                           | {"max_dropped": 0.99, **options})
    trainer.environment = Environment(train=rows, eval=[], rewards=[length])
    trainer.on_server(lambda: None)
    return trainer


def test_rows_that_cannot_be_are_dropped_by_name_and_the_others_trained_exactly(server):
    """In every form, with a real server: the same tokens as the plain form, and kl 0."""
    pictures = [noise(56, 56), noise(56, 84, 1)]
    plain = {"prompt": user({"type": "image", "image": pictures[0]}, TEXT)}
    column = {"prompt": "<image>What?", "images": [Image.open(io.BytesIO(png(pictures[0])))]}
    quoting = {"prompt": user({"type": "image", "image": pictures[1]},
                              {"type": "text", "text": "<|image_pad|>"})}
    video = {"prompt": [{"role": "user", "content": "what is <|video_pad|>?"}]}
    blind = {"prompt": "What?", "images": pictures}
    rows = [plain, column, quoting, video, blind]
    trainer = trainer_on(server, rows)
    jobs = [Job(rows, i, 2, 0) for i in range(len(rows))]
    outputs = trainer.generator.collect(trainer.generator.submit(jobs))
    assert outputs.example_id == [0, 0, 1, 1]
    assert outputs.prompt_ids[0] == outputs.prompt_ids[2]
    for one, other in zip(outputs.completion_logprobs[:2], outputs.completion_logprobs[2:]):
        assert one == pytest.approx(other, abs=1e-5)
    for i, reason in ((2, "quotes"), (3, "quotes"), (4, "shows 0")):
        assert sum(f"example {i}: " in line and reason in line for line in outputs.dropped) == 2
    batch = trainer.build_batch(outputs)
    assert check.server(trainer.policy, batch, must_agree=True)["max"] < 1e-5
    trainer.environment = dataclasses.replace(trainer.environment, train=[blind, video])
    trainer.generator.environment = trainer.environment
    with pytest.raises(RuntimeError, match="4 completions failed and 0 did not"):
        trainer.generator.collect(trainer.generator.begin(0, 2, 2))


# ---- what the server is told about prompts reaches the trainer's processor

@pytest.mark.parametrize("flags", [{"mm_processor_kwargs": {"max_pixels": 56 * 56}},
                                   {"mm-processor-kwargs": '{"max_pixels": 3136}'}])
def test_pixel_limits_reach_the_processor_and_the_server_is_told_the_same(flags):
    trainer = make_trainer(inference_args=flags)
    image = noise(112, 112)
    encoded = trainer.adapter.encode(user({"type": "image", "image": image}, TEXT), [image])
    assert encoded["image_grid_thw"].tolist() == [[1, 4, 4]]  # 8 by 8 without the limit
    command = server_command(trainer.config)
    at = command.index("--mm-processor-kwargs")
    assert json.loads(command[at + 1]) == {"max_pixels": 3136}


@pytest.mark.slow
def test_server_and_processor_agree_about_pixel_limits_and_template_options(server, tmp_path):
    """The template of the tiny model ends with a word more if it is told not to think."""
    template = (ROOT / "models/tiny-qwen2-vl/chat_template.jinja").read_text()
    (tmp_path / "chat.jinja").write_text(
        template + "{% if enable_thinking is defined and not enable_thinking %}red{% endif %}")
    flags = {"mm_processor_kwargs": {"max_pixels": 28 * 28 * 4},
             "chat_template_kwargs": {"enable_thinking": False},
             "chat_template": str(tmp_path / "chat.jinja")}
    config = dataclasses.replace(server, vllm_server_port=free_port(), output_dir=str(tmp_path),
                                 inference_args={**server.inference_args, **flags})
    rows = [{"prompt": user({"type": "image", "image": noise(112, 112)}, TEXT)}]
    with Server(config):
        trainer = trainer_on(config, rows)
        outputs = trainer.generator.collect(trainer.generator.submit([Job(rows, 0, 2, 0)]))
        assert outputs.prompt_ids[0].count(trainer.model.config.image_token_id) == 4
        assert trainer.tokenizer.decode(outputs.prompt_ids[0]).endswith("assistant\nred")
        batch = trainer.build_batch(outputs)
        assert check.server(trainer.policy, batch, must_agree=True)["max"] < 1e-5


TEMPLATE = ("{% for m in messages %}{{ m['content'] }}{% endfor %}"
            "{% if enable_thinking is defined and not enable_thinking %}NO{% endif %}")


@pytest.mark.parametrize("flags, wanted", [
    ({}, "hi"), ({"chat_template_kwargs": {"enable_thinking": False}}, "hiNO"),
    ({"default-chat-template-kwargs": '{"enable_thinking": false}'}, "hiNO"),
])
def test_template_options_reach_request_and_processor(monkeypatch, flags, wanted):
    trainer = make_trainer(inference_args={"chat_template": TEMPLATE, **flags})
    encoded = trainer.adapter.encode([{"role": "user", "content": "hi"}], [])
    assert trainer.tokenizer.decode(encoded["input_ids"][0]) == wanted
    monkeypatch.setattr(Generator, "call", lambda *_, **__: {"data": [{"id": "m"}]})
    asked = Generator(None, trainer.config).chat["chat_template_kwargs"]
    assert asked == ({"enable_thinking": False} if flags else {})
    assert "--chat-template-kwargs" not in server_command(trainer.config)


def test_a_table_of_options_that_is_none_is_refused_by_name():
    for value in ("{bad", [1]):
        with pytest.raises(ValueError, match="mm_processor_kwargs must be a table"):
            make_trainer(inference_args={"mm_processor_kwargs": value}).adapter.encode(
                [{"role": "user", "content": "hi"}], [])


def test_a_processor_with_several_templates_uses_its_default():
    adapter = make_trainer().adapter
    prompt, images = user({"type": "image", "image": RED}, TEXT), [RED]
    wanted = adapter.encode(prompt, images)["input_ids"]
    adapter.processor.chat_template = {"default": adapter.processor.chat_template, "tools": "x"}
    assert torch.equal(adapter.encode(prompt, images)["input_ids"], wanted)


def test_a_template_that_stands_only_in_tokenizer_config_is_found(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    prompt, images = user({"type": "image", "image": RED}, TEXT), [RED]
    found, wanted = (MultimodalAdapter(AutoProcessor.from_pretrained(name)).encode(prompt, images)
                     for name in (folder, TINY))
    assert torch.equal(found["input_ids"], wanted["input_ids"])


# ---- batches

def tensors(**change) -> dict:
    """Two rows [prompt, prompt, completion, padding]."""
    ids = torch.tensor([[5, 6, 7, 0], [5, 6, 8, 0]])
    return {"input_ids": ids, "attention_mask": ids.sign(),
            "loss_mask": torch.tensor([[0, 0, 1, 0]] * 2),
            "behavior_logprobs": torch.tensor([[0.0, 0, -1, 0]] * 2), "rewards": torch.zeros(2),
            **change}


MASK = tensors()["loss_mask"]
GRIDS = torch.tensor([[1, 2, 4], [1, 4, 6]])


@pytest.mark.parametrize("name, given, wanted", [
    ("attention_mask", tensors()["input_ids"] > 0, [[1, 1, 1, 0]] * 2),
    ("attention_mask", tensors()["attention_mask"].int(), [[1, 1, 1, 0]] * 2),
    ("loss_mask", MASK.bool(), MASK.tolist()),
    ("loss_mask", MASK.float(), MASK.tolist()),
    ("input_ids", tensors()["input_ids"].int(), tensors()["input_ids"].tolist()),
    ("rewards", torch.tensor([1, 0]), [1.0, 0.0]),
    ("rewards", torch.tensor([True, False]), [1.0, 0.0]),
    ("rewards", torch.tensor([1, 0.5]).double(), [1.0, 0.5]),
    ("prompt_index", torch.tensor([0, 1]).int(), [0, 1]),
    ("behavior_logprobs", torch.tensor([[math.nan, math.nan, -1, math.inf]] * 2).double(),
     [[0.0, 0.0, -1.0, 0.0]] * 2),
    ("pixel_values", torch.ones(2, 3).bfloat16(), [[1.0] * 3] * 2),
])
def test_a_type_that_says_the_same_is_taken(name, given, wanted):
    found = getattr(MultimodalBatch(**tensors(**{name: given})), name)
    assert found.tolist() == wanted
    assert found.dtype in (torch.int64, torch.float32)


@pytest.mark.parametrize("change, message", [
    ({"input_ids": torch.ones(4).long()}, "input_ids is .4,., but must be .B, L"),
    ({"input_ids": torch.ones(2, 4)}, "input_ids of torch.float32 must be integers"),
    ({"input_ids": -tensors()["input_ids"]}, "input_ids of torch.int64 must be integers"),
    ({"input_ids": [[5, 6, 7, 0]]}, "input_ids must be a tensor, not list"),
    ({"attention_mask": MASK * 2}, "attention_mask of torch.int64 must be mask"),
    ({"attention_mask": None}, "attention_mask must be a tensor, not NoneType"),
    ({"loss_mask": MASK * 0.5}, "loss_mask of torch.float32 must be mask"),
    ({"behavior_logprobs": -MASK}, "behavior_logprobs of torch.int64 must be logprobs"),
    ({"behavior_logprobs": -MASK.bfloat16()}, "behavior_logprobs of torch.bfloat16"),
    ({"behavior_logprobs": MASK * math.nan}, r"behavior_logprobs must be finite.* \[0, 2\]"),
    ({"behavior_logprobs": torch.where(MASK > 0, -math.inf, 0.0)}, "behavior_logprobs must be fin"),
    ({"behavior_logprobs": MASK * 0.9}, "they are probabilities"),
    ({"behavior_logprobs": MASK * 9.0}, "another sign"),
    ({"rewards": torch.tensor([0, math.nan])}, r"rewards must be finite.* \[1\]"),
    ({"rewards": torch.tensor([0, 1j])}, "rewards of torch.complex64"),
    ({"rewards": [1.0, 0.0]}, "rewards must be a tensor, not list"),
    ({"rewards": torch.zeros(2, 1)}, r"rewards is \(2, 1\)"),
    ({"advantages": torch.tensor([math.inf, 0])}, r"advantages must be finite.* \[0\]"),
    ({"prompt_index": torch.tensor([0, -1])}, "prompt_index of torch.int64 must be integers"),
    ({"prompt_index": torch.tensor([False, True])}, "prompt_index of torch.bool"),
    ({"pixel_values": torch.ones(2, 3).byte()}, "pixel_values of torch.uint8 must be pixels"),
    ({"pixel_values": [torch.ones(3)] * 2}, "pixel_values must be a tensor, not list"),
    ({"extra_model_kwargs": {"image_sizes": [[1, 2]]}}, "image_sizes must be a tensor"),
    ({"extra_model_kwargs": {"mm_token_type_ids": torch.zeros(2, 3)}}, "token_type_ids is .2, 3"),
    ({"pixel_values": torch.zeros(2, 3), "image_rows": {"pixel_valus": [1, 1]}}, "'pixel_valus'"),
    ({"pixel_values": torch.zeros(2, 3), "image_rows": {"pixel_values": [3, -1]}}, "a number for"),
    # A number for each row instead of each prompt would give prompt 1 the image of row 1.
    ({"pixel_values": torch.zeros(2, 3), "prompt_index": torch.tensor([0, 0]),
      "image_rows": {"pixel_values": (1, 1)}}, "a number for each prompt .1. and reply"),
    ({"pixel_values": torch.zeros(2, 3), "prompt_index": torch.tensor([0, 2]),
      "image_rows": {"pixel_values": torch.tensor([1, 1])}}, "a number for each prompt .3. and reply"),
    ({"pixel_values": torch.zeros(2, 3), "prompt_index": torch.tensor([1, 0])}, "_values'. is mis"),
    ({"extra_model_kwargs": {"attention_mask": MASK}}, "'attention_mask'. are fields"),
    ({"pixel_values": torch.zeros(2, 3), "extra_model_kwargs": {"pixel_values": torch.ones(2, 3)}},
     "'pixel_values'. are fields"),
    ({"prompt_index": torch.tensor([0, 0]), "extra_model_kwargs": {
        "mm_token_type_ids": torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0]])}},
     "rows 0 and 1 are of prompt 0, but their mm_token_type_ids"),
    ({"pixel_values": torch.zeros(32, 3), "extra_model_kwargs": {"image_grid_thw": GRIDS},
      "image_rows": {"pixel_values": [24, 8], "image_grid_thw": [1, 1]}},
     r"have \[24, 8\] rows of pixel_values, but by image_grid_thw \[8, 24\]"),
])
def test_every_field_of_a_batch_is_refused_by_name(change, message):
    MultimodalBatch(**tensors())
    with pytest.raises(ValueError, match=message):
        MultimodalBatch(**tensors(**change))


def test_a_grid_as_wide_as_the_rows_is_no_token_tensor():
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    mask = torch.tensor([[0, 0, 1]] * 2)
    batch = MultimodalBatch(
        ids, ids.sign(), mask, -mask.float(), torch.zeros(2), torch.zeros(32, 3),
        {"image_grid_thw": GRIDS}, image_rows={"pixel_values": [8, 24], "image_grid_thw": [1, 1]})
    assert batch.select([1]).extra_model_kwargs["image_grid_thw"].tolist() == [[1, 4, 6]]


@pytest.mark.parametrize("counts", [(1, 1), numpy.array([1, 1]), torch.tensor([1, 1])])
def test_counts_of_images_may_be_of_any_type(counts):
    batch = MultimodalBatch(**tensors(), pixel_values=torch.zeros(2, 3),
                            image_rows={"pixel_values": counts})
    assert batch.image_rows == {"pixel_values": [1, 1]}


def test_a_gradient_does_not_flow_through_what_was_recorded():
    """Ratios against logprobs that follow the policy are always 1, and their gradient is 0."""
    trainer = make_trainer()
    outputs = canned(trainer, [([noise(56, 56)], [2, 5])])
    wanted = gradients(trainer, outputs)
    batch = trainer.adapter.build_batch(outputs)
    recorded = batch.behavior_logprobs.clone().requires_grad_()
    batch = dataclasses.replace(batch, behavior_logprobs=recorded)
    assert not batch.behavior_logprobs.requires_grad
    trainer.adapter.build_batch = lambda outputs: batch
    assert relative_difference(wanted, gradients(trainer, outputs)) == 0


def test_a_fork_without_a_beginning_or_a_row_is_refused():
    one_prompt = MultimodalBatch(**tensors(prompt_index=torch.tensor([0, 0]),
                                           loss_mask=torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0]])))
    with pytest.raises(ValueError, match="loss_mask: a row without a token in the loss"):
        one_prompt.completion_inputs()
    gap = MultimodalBatch(**tensors(prompt_index=torch.tensor([0, 2])))
    with pytest.raises(ValueError, match="prompt_index: a prompt has no row"):
        gap.prompt_inputs()
    assert gap.select([0, 1]).prompt_inputs()["input_ids"].tolist() == [[5, 6], [5, 6]]


class GridAlone(MultimodalAdapter):
    """The adapter of a first attempt: one row per completion, right-padded, no token types."""

    def build_batch(self, outputs):
        whole = MultimodalAdapter.build_batch(self, outputs)
        rows = whole.prompt_index.tolist()
        images = whole.images_of(rows)
        grids = images["image_grid_thw"]
        return MultimodalBatch(
            whole.input_ids, whole.attention_mask.bool(), whole.loss_mask.bool(),
            whole.behavior_logprobs, whole.rewards.long(), images["pixel_values"],
            {"image_grid_thw": grids})


@pytest.mark.parametrize("share", [False, True])
def test_token_types_are_derived_from_the_grid_alone(share):
    full, alone = make_trainer(share_prompt=share), make_trainer(share_prompt=share)
    outputs = canned(full, [([noise(56, 56)], [2, 5]), ([noise(84, 56, 1)], [3, 1])])
    alone.adapter = GridAlone(full.adapter.processor)
    assert relative_difference(gradients(full, outputs), gradients(alone, outputs)) < 1e-5


def test_groups_by_names_and_rewards_as_dicts_train_the_same():
    trainer = make_trainer()
    outputs = canned(trainer, [([noise(56, 56)], [2, 5]), ([], [3, 1])])
    wanted = gradients(trainer, outputs)
    columns = {f.name: getattr(outputs, f.name) for f in dataclasses.fields(outputs)}
    named = GenerateOutputs(**{**columns, "example_id": ["b", "b", "a", "a"],
                               "reward": [{"reward": int(reward)} for reward in outputs.reward]})
    trainer.policy.zero_grad()
    assert relative_difference(wanted, gradients(trainer, named)) == 0
    assert named.means()["reward"] == outputs.means()["reward"]


# ---- numbers

def test_a_bf16_checkpoint_is_trained_in_fp32():
    """At lr 1e-6 nearly every weight moves, as from an fp32 checkpoint; in bf16 hardly one does."""
    for dtype in (torch.bfloat16, torch.float16):
        model = AutoModelForImageTextToText.from_pretrained(TINY, dtype=dtype)
        trainer = make_trainer(learning_rate=1e-6)
        trained = type(trainer)(model, trainer.tokenizer, trainer.adapter, trainer.config)
        before = [p.detach().clone() for p in model.parameters()]
        trained.update(canned(trained, [([noise(56, 56)], [4, 3, 4, 2])]))
        moved = [(a != b).float().mean() for a, b in zip(before, model.parameters())]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert torch.stack(moved).median() > 0.9
    tiny = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.bfloat16)
    for model, options in ((tiny, {"lora_rank": 2, "freeze_vision": True}),
                           (trained.model.to(torch.float8_e4m3fn), {})):
        weights = Policy(model, MultimodalRLConfig(**options)).parameters()
        assert {p.dtype for p in weights} == {torch.float32}
    double = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float64)
    assert Policy(double, MultimodalRLConfig()).model.dtype == torch.float64


@pytest.mark.parametrize("options", [{"lora_rank": 2}, {"freeze_vision": True}])
def test_frozen_weights_keep_the_type_of_their_files_on_a_gpu(options, tmp_path, monkeypatch):
    """A 7B model with adapters took 33 GB instead of 17. Here on a CPU, as one GPU would hold it."""
    monkeypatch.setattr(policy, "train_in_fp32", lambda model, **_: train_in_fp32(model, True))

    def trainer_of(**more):
        plain = make_trainer(output_dir=str(tmp_path), learning_rate=1e-3, **options, **more)
        low = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.bfloat16)
        return type(plain)(low, plain.tokenizer, plain.adapter, plain.config)

    trainer, exact = trainer_of(), make_trainer(**options)
    assert {(p.requires_grad, p.dtype) for p in trainer.model.parameters()} == {
        (True, torch.float32), (False, torch.bfloat16)}
    outputs = canned(exact, [([noise(56, 56)], [4, 3, 4, 2])])
    trainer.checked = exact.checked = True  # the models differ by the rounding of bf16
    assert relative_difference(gradients(exact, outputs), gradients(trainer, outputs)) < 0.1
    trainer.update(outputs)
    trainer.records.open(trainer.past_metrics)
    trainer.save()
    resumed = trainer_of(resume=True)
    for one, other in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    resumed.checked = True
    trainer.update(outputs)
    resumed.update(outputs)
    assert all(torch.equal(one, other) for one, other in zip(
        trainer.model.parameters(), resumed.model.parameters(), strict=True))


def entropy(logits: list[float]) -> float:
    hidden = torch.tensor([logits])
    return token_logprobs(hidden, torch.tensor([0]), torch.nn.Identity(), 1.0)[1].item()


def test_the_entropy_is_never_negative_nor_nan():
    assert entropy([0.0, 0.0, -math.inf]) == pytest.approx(math.log(2))
    assert entropy([1.0, -math.inf, -math.inf]) == 0
    assert entropy([0.0, math.log(3)]) == pytest.approx(0.562335, abs=1e-6)
    torch.manual_seed(0)
    hidden = 1e4 + 50 * torch.randn(500, 4096)
    entropies = token_logprobs(hidden, torch.zeros(500).long(), torch.nn.Identity(), 1.0)[1]
    wanted = torch.special.entr(hidden.double().softmax(-1)).sum(-1)
    assert entropies.min() >= 0
    assert torch.allclose(entropies.double(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("head", [torch.nn.Identity(), lambda hidden: hidden])
def test_banned_ids_leave_the_states_of_an_identity_head_alone(head):
    hidden = torch.randn(4, 6)
    before, targets = hidden.clone(), torch.tensor([0, 1, 2, 5])
    logprobs, _ = token_logprobs(hidden, targets, head, 1.0, [3], max_logits=12)
    bias = torch.tensor([0, 0, 0, -100.0, 0, 0])
    assert torch.equal(hidden, before)
    assert torch.allclose(logprobs, (before + bias).log_softmax(-1)[range(4), targets], atol=1e-6)


@pytest.mark.parametrize("options", [
    {}, {"scale": 0.25}, {"cap": 3.0, "scale": 2.0}, {"banned": [3, 7]}])
@pytest.mark.parametrize("kind", ["plain", "bias", "lora"])
def test_a_head_gives_the_gradients_of_its_logits(kind, options):
    """Of its own formula where it is a linear layer, and of autograd where it is something else."""
    def found(forward):
        torch.manual_seed(0)
        head, hidden = torch.nn.Linear(8, 40, bias=kind == "bias"), torch.randn(9, 8)
        if kind == "lora":
            head = peft_linear(head)
        hidden.requires_grad_()
        logprobs, entropies = forward(hidden, head)
        (logprobs * torch.randn(9)).sum().backward()
        return [logprobs, entropies, hidden.grad, *[p.grad for p in head.parameters()]]

    def wanted(hidden, head):
        logits = head(hidden) * options.get("scale", 1.0)
        if "cap" in options:
            logits = options["cap"] * torch.tanh(logits / options["cap"])
        bias = torch.zeros(40)
        bias[options.get("banned", [])] = -100
        logprobs = ((logits + bias) / 0.7).log_softmax(-1)
        return logprobs[range(9), targets], -(logprobs.exp() * logprobs).sum(-1)

    targets = torch.arange(10, 19)
    ours = found(lambda hidden, head: token_logprobs(
        hidden, targets, head, 0.7, max_logits=160, **options))
    for one, other in zip(ours, found(wanted), strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, atol=1e-5)


def peft_linear(head):
    """The layer with an adapter, as peft makes one of it."""
    import peft
    model = torch.nn.ModuleDict({"head": head})
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False), model)
    return model["head"]


@pytest.mark.parametrize("weights, bias", [("bf16", False), ("fp32", False), ("fp32", True)])
def test_the_gradient_of_the_head_is_as_exact_from_512_chunks_as_from_one(weights, bias):
    """fp32 weights under autocast, as on a GPU, and bf16 weights, as of a sharded model."""
    def error(chunks):
        torch.manual_seed(0)
        head, hidden = torch.nn.Linear(64, 256, bias=bias), torch.randn(1024, 64).bfloat16()
        targets, scale = torch.randint(256, (1024,)), torch.rand(1024)
        exact = torch.nn.Linear(64, 256, bias=bias).double()
        exact.load_state_dict({n: w.bfloat16() for n, w in head.state_dict().items()})
        logprobs = exact(hidden.double()).log_softmax(-1)[range(1024), targets]
        (logprobs * scale).sum().backward()
        if weights == "bf16":
            head = head.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=weights == "fp32"):
            logprobs, _ = token_logprobs(hidden, targets, head, 1.0, (), 256 * 1024 // chunks)
        (logprobs * scale).sum().backward()
        return max(((p.grad - q.grad).norm() / q.grad.norm()).item()
                   for p, q in zip(head.parameters(), exact.parameters()))

    assert error(1) < 4e-3
    assert error(512) < 4e-3


def test_integer_rewards_have_the_advantages_of_floats():
    groups = torch.tensor([4, 4, 4, 4])
    for rewards in (torch.tensor([1, 0, 0, 0]), torch.tensor([True, False, False, False])):
        assert group_advantages(rewards, groups).tolist() == [0.75, -0.25, -0.25, -0.25]


def test_a_nan_shows_in_the_loss_and_in_every_guard(capsys):
    logprobs, mask = torch.tensor([[0.0, math.nan]]), torch.tensor([[0, 1]])
    options = {"mask_ratio_low": 0.1, "mask_ratio_high": 10.0, "clip_low": 0.2, "clip_high": 0.2}
    for one, other in ((logprobs, -mask.float()), (-mask.float(), logprobs)):
        loss, _ = grpo_loss(one, torch.zeros(1, 2), other, torch.ones(1), mask, 1, **options)
        assert loss.isnan()
    trainer = make_trainer()
    batch = trainer.build_batch(canned(trainer, [([], [4, 3])]))
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match="different policies"):
        check.server(trainer.policy, batch, must_agree=True)
    assert math.isnan(check.largest_differences(trainer.policy, batch, [0, 0])[0])
    outputs = canned(make_trainer(), [([], [1, 1])])
    trainer.records.folder.mkdir(parents=True, exist_ok=True)
    trainer.records.write = lambda metrics: None
    trainer.records.write_step({"step": 2, "kl": math.nan}, outputs, trainer.tokenizer, 0.05)
    assert "mismatch KL nan" in capsys.readouterr().out


# ---- images by URL and by path

@pytest.fixture
def web():
    """A server on this machine: /a.png is a picture, /far redirects to .targets; .asked: all."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append((self.path, dict(self.headers)))
            if self.path == "/far":
                self.send_response(302)
                self.send_header("Location", self.server.targets.pop(0))
                self.end_headers()
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(png(RED))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("target", [
    "http://127.0.0.1:{port}/a.png", "/a.png", "http://localhost:{port}/a.png",
    "http://[::1]:{port}/a.png", "http://[::ffff:127.0.0.1]:{port}/a.png",
    "http://0x7f.1:{port}/a.png", "http://0.0.0.0:{port}/a.png", "http://169.254.169.254/latest",
    "http://2130706433:{port}/a.png", "http://0177.0.0.1:{port}/a.png",
    "http://127.0.0.1:{port}\\@1.1.1.1/a.png",  # the host is what stands before the backslash
    "http://[64:ff9b::7f00:1]/a.png", "http://[2002:7f00:1::]/a.png", "http://[::127.0.0.1]/a.png",
    "http://[fec0::1]/a.png", "http://me:secret@127.0.0.1:{port}/a.png", "http://10.0.0.1/a.png",
    "http://100.64.0.1/a.png", "file:///etc/passwd"])
def test_a_redirect_into_this_machine_or_its_network_is_refused(web, target):
    web.targets = [target.format(port=web.server_port)]
    with pytest.raises(ValueError, match="cannot read image.*is not a public address"):
        load_image(f"{web.url}/far")
    assert [path for path, _ in web.asked] == ["/far"]
    assert load_image(f"{web.url}/a.png").tobytes() == RED.tobytes()  # the row's own words


def test_a_redirect_to_a_public_address_is_followed_a_few_times(web, monkeypatch):
    monkeypatch.setattr("support.images.check_public", lambda url: None)
    web.targets = ["/far", "far", f"{web.url}/a.png"]
    assert load_image(f"{web.url}/far").tobytes() == RED.tobytes()
    web.targets = ["/far"] * 99
    with pytest.raises(ValueError, match="more than 5 redirects"):
        load_image(f"{web.url}/far")


@pytest.mark.parametrize("url", ["http://1.1.1.1/a.png", "https://[2606:4700::1111]/a.png",
                                 "http://a-name-that-a-proxy-knows.invalid/a.png"])
def test_public_addresses_are_public(url):
    check_public(url)


def test_credentials_of_the_user_are_not_sent_to_hosts_of_a_data_set(web, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    assert load_image(f"{web.url}/a.png").tobytes() == RED.tobytes()
    assert all("Authorization" not in headers for _, headers in web.asked)


def test_a_path_that_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "pipe", tmp_path / "link")
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 2**40)
    for path in (tmp_path / "pipe", str(tmp_path / "link"), "/dev/zero", tmp_path,
                 "/proc/self/status", tmp_path / "sparse", open("/proc/self/status", "rb"),
                 {"path": str(tmp_path / "pipe")}):
        with pytest.raises(ValueError, match="no regular file"):
            load_image(path)


MEMORY = """
import io, resource, sys
from PIL import Image
from support.images import load_image
load_image(Image.new("RGBA", (9, 9)))
buffer = io.BytesIO()
Image.new("1", (9400, 9400)).convert("P").save(buffer, "PNG")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_image(buffer.getvalue())
except ValueError as error:
    print(error, file=sys.stderr)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("kind", ["ICO", "EPS"])
def test_a_format_whose_size_is_not_known_before_or_that_runs_a_program_is_refused(kind):
    with pytest.raises(ValueError, match="cannot identify image file"):
        load_image(png(noise(64, 64), kind))


def test_a_small_file_of_89_megapixels_costs_no_memory():
    run = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, text=True, capture_output=True,
                         check=True, timeout=60)
    assert int(run.stdout) < 50 and "cannot read image" in run.stderr
    assert load_image(Image.new("L", (5000, 5000), 7)).getpixel((0, 0)) == (7, 7, 7)
