"""Tiny checkpoints of many vision-language families, so that tests can try each without a download.

    python models/families.py OUT_DIR [name ...]

writes OUT_DIR/<name>: random weights, a tokenizer, a chat template and an image processor. Each
directory loads through AutoModelForImageTextToText, AutoProcessor and AutoTokenizer, and in vLLM.

What makes a family hard to train is as in its published checkpoints: how pixels are laid out
(patches, tiles, padding), how an image becomes placeholder tokens, where the chat template puts
it, which special tokens stand for pixels, and whether the tokenizer adds a BOS of its own.
Sizes are not: two layers, width 64, an image is 4 to 88 tokens.

The weights are drawn wide. With the usual std of 0.02 a tiny model says nearly the same whatever
it sees, and a test that compares logprobs would pass with the wrong pixels.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SEED = 0
STD = 0.15
MERGES = 64  # byte pairs learned from TEXT, on top of the 256 bytes
TEXT = """Look at the picture and say what you see. What colour is the square? Is the circle to the
left or to the right of the triangle? How many shapes are there in the first image, and how many in
the second? Think step by step, then answer with one word: red, green, blue, yellow, black, white.
The answer is 1. Describe the image. There are 2 red squares and 3 blue circles."""


@dataclass(frozen=True)
class Family:
    """One family. A class is named by its name in transformers, followed by its arguments."""

    config: dict  # AutoConfig's; a special token stands for its id
    tokens: dict  # the tokenizer's attribute -> special token; their ids are 0, 1, 2, ...
    chat: str  # Jinja
    processor: tuple
    image_processor: tuple
    video_processor: tuple = ()  # families that take videos too do not load without one
    feature_extractor: tuple = ()  # nor do some that take sounds
    adds_bos: bool = False  # the tokenizer puts a BOS first, a second one after the template's
    newlines: bool = False  # vLLM looks for "\n" to "\n\n\n\n" as tokens (Gemma 3)
    nested_tower: bool = False  # see nest_tower
    transposed_experts: bool = False  # see transpose_experts


def chat_template(turn, image, end, answer, start="", images_first=False):
    """A chat template; turn and end are Jinja expressions of `message`, the rest is plain text."""
    # Sorting by type puts "image" before "text" and keeps the order within each.
    parts = "message['content']" + ("|sort(attribute='type')" if images_first else "")
    return (
        f"{start}{{% for message in messages %}}{{{{ {turn} }}}}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        f"{{% for part in {parts} %}}{{% if part['type'] == 'image' %}}{{{{ {image!r} }}}}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        f"{{{{ {end} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {answer!r} }}}}{{% endif %}}"
    )


# head_dim 32 is the smallest that all of vLLM's attention kernels take.
LANGUAGE = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=4096, rms_norm_eps=1e-5)
VISION = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
TILE = dict(image_size=56, patch_size=14)  # 16 patches
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
SQUARE = {"height": 56, "width": 56}
HYBRID = dict(
    layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=128, linear_value_head_dim=128)
GRIDS = [[56, 56], [56, 112], [112, 56], [112, 112]]

CHATML = dict(pad_token="<|endoftext|>", turn_token="<|im_start|>", eos_token="<|im_end|>")
CHATML_TURNS = dict(turn=r"'<|im_start|>' + message['role'] + '\n'", end=r"'<|im_end|>\n'",
                    answer="<|im_start|>assistant\n")
MISTRAL = dict(model_type="mistral", sliding_window=None)
LLAMA = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")

COHERE = dict(
    pad_token="<PAD>", bos_token="<BOS_TOKEN>", eos_token="<|END_OF_TURN_TOKEN|>",
    turn_token="<|START_OF_TURN_TOKEN|>", boi_token="<|START_OF_IMG|>",
    eoi_token="<|END_OF_IMG|>", image_token="<|IMG_PATCH|>",
    img_line_break_token="<|IMG_LINE_BREAK|>")


def cohere_chat(image):
    """Cohere's chat template, with its own placeholder of an image."""
    return chat_template(
        start="<BOS_TOKEN>", image=image, end="'<|END_OF_TURN_TOKEN|>'",
        turn="'<|START_OF_TURN_TOKEN|>' + message['role']",
        answer="<|START_OF_TURN_TOKEN|>assistant")


def qwen(model_type, processor, patch, tied, vision, rope=MROPE, video="Qwen2VLVideoProcessor",
         text={}, **arguments):
    """Qwen2-VL and its successors: all patches in one flat list, two by two of them to a token."""
    token = (2 * patch) ** 2  # pixels
    pixels = dict(patch_size=patch, size={"shortest_edge": 4 * token, "longest_edge": 16 * token})
    eyes = dict(depth=2, num_heads=2, hidden_size=64, patch_size=patch) | vision
    return Family(
        config=dict(
            model_type=model_type, tie_word_embeddings=tied, vision_config=eyes,
            text_config=LANGUAGE | dict(rope_parameters=rope, tie_word_embeddings=tied) | text,
            image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
            vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>"),
        tokens=CHATML | dict(
            vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
            image_token="<|image_pad|>", video_token="<|video_pad|>"),
        chat=chat_template(image="<|vision_start|><|image_pad|><|vision_end|>", **CHATML_TURNS),
        processor=(processor, {}),
        image_processor=("Qwen2VLImageProcessor", pixels),
        video_processor=(video, pixels), **arguments)


def glm(model_type, name, text={}):
    """Patches as in Qwen2-VL; the placeholder of an image is that of a video's frame, too."""
    pixels = dict(patch_size=14, size={"shortest_edge": 56 ** 2, "longest_edge": 112 ** 2})
    media = {f"{m}_{end}_token": f"<|{word}_of_{m}|>" for m in ("image", "video")
             for end, word in (("start", "begin"), ("end", "end"))}
    return Family(
        config=dict(
            model_type=model_type, image_token_id="<|image|>", video_token_id="<|video|>",
            text_config=LANGUAGE | dict(rope_parameters=MROPE | dict(
                mrope_section=[2, 3, 3], partial_rotary_factor=0.5)) | text,
            vision_config=TILE | dict(depth=2, num_heads=2, hidden_size=64, out_hidden_size=64,
                                      intermediate_size=128),
            **{f"{k}_id": token for k, token in media.items()}),
        tokens=dict(
            pad_token="<|endoftext|>", eos_token="<|user|>", assistant_token="<|assistant|>",
            system_token="<|system|>", mask_token="[gMASK]", start_token="<sop>",
            image_token="<|image|>", video_token="<|video|>", **media),
        chat=chat_template(
            start="[gMASK]<sop>", turn=r"'<|' + message['role'] + '|>\n'", end="''",
            image="<|begin_of_image|><|image|><|end_of_image|>", answer="<|assistant|>\n"),
        processor=(f"{name}Processor", {}),
        image_processor=(f"{name}ImageProcessor", pixels),
        video_processor=(f"{name}VideoProcessor", pixels))


def llava_next(text, tower, layers, select, extra):
    """An overview and up to four tiles per image, whose padding is cut off again."""
    return Family(
        config=dict(
            model_type="llava_next", image_token_index="<image>", image_seq_length=16,
            image_grid_pinpoints=GRIDS, vision_feature_layer=layers,
            vision_feature_select_strategy=select, text_config=LANGUAGE | text,
            vision_config=VISION | TILE | tower),
        tokens=LLAMA | dict(image_token="<image>"),
        chat=chat_template(
            turn="message['role']|upper + ': '", image="<image>\n", answer="ASSISTANT:",
            end="'</s>' if message['role'] == 'assistant' else ' '"),
        processor=("LlavaNextProcessor", dict(
            patch_size=14, num_additional_image_tokens=extra,
            vision_feature_select_strategy=select)),
        image_processor=("LlavaNextImageProcessor", dict(
            size={"shortest_edge": 56}, crop_size=SQUARE, image_grid_pinpoints=GRIDS)),
        adds_bos=True, nested_tower=True)


def idefics(config, name, video={}):
    """Tiles and an overview, all images of a prompt in one row."""
    tiles = dict(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    return Family(
        config=config | dict(
            image_token_id="<image>", scale_factor=2, vision_config=VISION | TILE,
            text_config=LANGUAGE | dict(model_type="llama")),
        tokens=dict(
            pad_token="<|endoftext|>", bos_token="<|im_start|>", eos_token="<end_of_utterance>",
            image_token="<image>", fake_image_token="<fake_token_around_image>",
            global_image_token="<global-img>", video_token="<video>",
            **{f"tile_{r}_{c}": f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)}),
        chat=chat_template(
            start="<|im_start|>", turn="message['role']|capitalize + ': '", image="<image>",
            end=r"'<end_of_utterance>\n'", answer="Assistant:"),
        processor=(f"{name}Processor", dict(image_seq_len=4)),
        image_processor=(f"{name}ImageProcessor", tiles), **video)


def pixtral(config, patch, longest, merge, name="Pixtral", text=MISTRAL):
    """Images keep their shape and are padded to the largest; a token ends every row of patches."""
    begin = "{'system': '[SYSTEM_PROMPT]', 'user': '[INST]', 'assistant': ''}[message['role']]"
    end = "{'system': '[/SYSTEM_PROMPT]', 'user': '[/INST]', 'assistant': '</s>'}[message['role']]"
    return Family(
        config=config | dict(
            image_token_index="[IMG]",
            text_config=LANGUAGE | text, vision_config=VISION | dict(
                model_type="pixtral", image_size=longest, patch_size=patch)),
        tokens=LLAMA | dict(
            user_token="[INST]", user_end_token="[/INST]",
            system_token="[SYSTEM_PROMPT]", system_end_token="[/SYSTEM_PROMPT]",
            image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]"),
        chat=chat_template(start="<s>", turn=begin, image="[IMG]", end=end, answer=""),
        processor=(f"{name}Processor", dict(patch_size=patch, spatial_merge_size=merge)),
        image_processor=("PixtralImageProcessor", dict(
            size={"longest_edge": longest}, patch_size={"height": patch, "width": patch})),
        adds_bos=True)


FAMILIES = {
    "qwen2-vl": qwen(
        "qwen2_vl", "Qwen2VLProcessor", 14, tied=True, vision=dict(embed_dim=64, mlp_ratio=2)),
    "qwen2.5-vl": qwen(
        "qwen2_5_vl", "Qwen2_5_VLProcessor", 14, tied=False,
        vision=dict(out_hidden_size=64, intermediate_size=128, window_size=56,
                    fullatt_block_indexes=[1])),
    "qwen3-vl": qwen(
        "qwen3_vl", "Qwen3VLProcessor", 16, tied=True, video="Qwen3VLVideoProcessor",
        rope=MROPE | {"mrope_interleaved": True},  # transformers always does, vLLM has to be told
        vision=dict(out_hidden_size=64, intermediate_size=128, num_position_embeddings=16,
                    deepstack_visual_indexes=[0, 1])),
    # Every image becomes one square.
    "llava-1.5": Family(
        config=dict(
            model_type="llava", image_token_index="<image>", image_seq_length=16,
            text_config=LANGUAGE | dict(model_type="llama"),
            vision_config=VISION | TILE | dict(model_type="clip_vision_model")),
        tokens=LLAMA | dict(image_token="<image>"),
        chat=chat_template(
            turn="message['role']|upper + ': '", image="<image>\n", answer="ASSISTANT:",
            end="'</s>' if message['role'] == 'assistant' else ' '", images_first=True),
        processor=("LlavaProcessor", dict(  # the additional token is CLS; "default" drops it
            patch_size=14, num_additional_image_tokens=1,
            vision_feature_select_strategy="default")),
        image_processor=("CLIPImageProcessor", dict(size={"shortest_edge": 56}, crop_size=SQUARE)),
        adds_bos=True, nested_tower=True),
    # An overview and up to four tiles per image, padded to the most tiles of the batch.
    "llava-onevision": Family(
        config=dict(
            model_type="llava_onevision", image_token_index="<image>", video_token_index="<video>",
            image_grid_pinpoints=GRIDS, text_config=LANGUAGE | dict(model_type="qwen2"),
            vision_config=VISION | TILE | dict(
                model_type="siglip_vision_model", vision_use_head=False)),
        tokens=CHATML | dict(image_token="<image>", video_token="<video>"),
        chat=chat_template(
            turn="'<|im_start|>' + message['role'] + ' '", image="<image>\n", end="'<|im_end|>'",
            answer="<|im_start|>assistant\n", images_first=True),
        processor=("LlavaOnevisionProcessor", dict(
            num_image_tokens=16, vision_feature_select_strategy="full")),
        image_processor=("LlavaOnevisionImageProcessor", dict(
            size=SQUARE, image_grid_pinpoints=GRIDS)),
        video_processor=("LlavaOnevisionVideoProcessor", dict(size=SQUARE)),
        nested_tower=True),
    "smolvlm": idefics(dict(model_type="smolvlm"), "SmolVLM", video=dict(
        video_processor=("SmolVLMVideoProcessor", dict(
            size={"longest_edge": 56}, max_image_size={"longest_edge": 56})))),
    # The tiles of all images in one flat list, with nothing to say which are whose.
    "internvl": Family(
        config=dict(
            model_type="internvl", image_token_id="<IMG_CONTEXT>", image_seq_length=4,
            tie_word_embeddings=False, text_config=LANGUAGE | dict(model_type="qwen2"),
            vision_config=VISION | TILE),
        tokens=CHATML | dict(
            start_image_token="<img>", end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>", video_token="<video>"),
        chat=chat_template(image="<IMG_CONTEXT>\n", **CHATML_TURNS),
        processor=("InternVLProcessor", dict(image_seq_length=4)),
        image_processor=("GotOcr2ImageProcessor", dict(
            size=SQUARE, crop_to_patches=True, max_patches=4)),
        video_processor=("InternVLVideoProcessor", dict(size=SQUARE))),
    "mistral3": pixtral(
        dict(model_type="mistral3", spatial_merge_size=2, tie_word_embeddings=False),
        patch=14, longest=112, merge=2),
    "pixtral": pixtral(
        dict(model_type="llava", vision_feature_layer=-1, vision_feature_select_strategy="full"),
        patch=16, longest=64, merge=1),
    # The placeholder in the text (<start_of_image>) is not the one the pixels take the place of.
    "gemma3": Family(
        config=dict(
            model_type="gemma3", mm_tokens_per_image=4, boi_token_index="<start_of_image>",
            eoi_token_index="<end_of_image>", image_token_index="<image_soft_token>",
            text_config=LANGUAGE | dict(
                query_pre_attn_scalar=32, layer_types=["sliding_attention", "full_attention"]),
            vision_config=VISION | TILE | dict(vision_use_head=False)),
        tokens=dict(
            pad_token="<pad>", bos_token="<bos>", eos_token="<end_of_turn>",
            turn_token="<start_of_turn>", boi_token="<start_of_image>",
            eoi_token="<end_of_image>", image_token="<image_soft_token>"),
        chat=chat_template(
            start="<bos>", image="<start_of_image>", end=r"'<end_of_turn>\n'",
            turn=r"'<start_of_turn>' + message['role']|replace('assistant', 'model') + '\n'",
            answer="<start_of_turn>model\n"),
        processor=("Gemma3Processor", dict(image_seq_length=4)),
        image_processor=("Gemma3ImageProcessor", dict(size=SQUARE)),
        adds_bos=True, newlines=True, nested_tower=True),
    # A layer without and one with experts, and no rotary embedding in the second; the tiles of all
    # images in one flat list.
    "llama4": Family(
        config=dict(
            model_type="llama4", image_token_index="<|patch|>", boi_token_index="<|image_start|>",
            eoi_token_index="<|image_end|>",
            text_config=LANGUAGE | dict(
                intermediate_size=96, intermediate_size_mlp=128, num_local_experts=4,
                interleave_moe_layer_step=2, no_rope_layers=[1, 0]),
            vision_config=VISION | TILE | dict(  # what the adapter takes: 2 x 2 patches
                intermediate_size=256, vision_output_dim=64, projector_input_dim=64,
                projector_output_dim=64)),
        tokens=dict(
            bos_token="<|begin_of_text|>", eos_token="<|eot|>", pad_token="<|pad|>",
            header_start_token="<|header_start|>", header_end_token="<|header_end|>",
            image_token="<|image|>", patch_token="<|patch|>",
            image_start_token="<|image_start|>", image_end_token="<|image_end|>",
            tile_x_token="<|tile_x_separator|>", tile_y_token="<|tile_y_separator|>"),
        chat=chat_template(
            start="<|begin_of_text|>", image="<|image|>", end="'<|eot|>'",
            turn=r"'<|header_start|>' + message['role'] + '<|header_end|>\n\n'",
            answer="<|header_start|>assistant<|header_end|>\n\n"),
        processor=("Llama4Processor", dict(patch_size=14)),
        image_processor=("Llama4ImageProcessor", dict(size=SQUARE, max_patches=4)),
        adds_bos=True),
    # Images keep their shape and are padded, and their patches pooled; the logits are capped. Wider
    # heads in the layer of full attention. 70 tokens are the fewest that an image may be.
    "gemma4": Family(
        config=dict(
            model_type="gemma4", boi_token_id="<|image>", eoi_token_id="<image|>",
            image_token_id="<|image|>", video_token_id="<|video|>", audio_token_id="<|audio|>",
            boa_token_id="<|audio>", eoa_token_index="<audio|>",
            text_config=LANGUAGE | dict(
                layer_types=["sliding_attention", "full_attention"], global_head_dim=64,
                hidden_size_per_layer_input=0, final_logit_softcapping=5.0),
            vision_config=VISION | dict(
                num_key_value_heads=2, head_dim=32, patch_size=4, position_embedding_size=640,
                default_output_length=70)),
        tokens=dict(
            pad_token="<pad>", bos_token="<bos>", eos_token="<turn|>", turn_token="<|turn>",
            image_token="<|image|>", boi_token="<|image>", eoi_token="<image|>",
            audio_token="<|audio|>", boa_token="<|audio>", eoa_token="<audio|>",
            video_token="<|video|>"),
        chat=chat_template(
            start="<bos>", image="<|image|>", end=r"'<turn|>\n'",
            turn=r"'<|turn>' + message['role']|replace('assistant', 'model') + '\n'",
            answer="<|turn>model\n"),
        processor=("Gemma4Processor", dict(image_seq_length=70)),
        image_processor=("Gemma4ImageProcessor", dict(patch_size=4, max_soft_tokens=70)),
        video_processor=("Gemma4VideoProcessor", dict(patch_size=4)),
        feature_extractor=("Gemma4AudioFeatureExtractor", {}),
        adds_bos=True),
    "qwen3-vl-moe": qwen(
        "qwen3_vl_moe", "Qwen3VLProcessor", 16, tied=False, video="Qwen3VLVideoProcessor",
        rope=MROPE | {"mrope_interleaved": True},
        text=dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96,
                  norm_topk_prob=True),
        vision=dict(out_hidden_size=64, intermediate_size=128, num_position_embeddings=16,
                    deepstack_visual_indexes=[0, 1]),
        transposed_experts=True),
    # A layer of linear attention and one of full attention, whose heads turn by a quarter.
    "qwen3.5": qwen(
        "qwen3_5", "Qwen3VLProcessor", 16, tied=True, video="Qwen3VLVideoProcessor",
        rope=MROPE | dict(mrope_interleaved=True, mrope_section=[2, 1, 1],
                          partial_rotary_factor=0.25),
        text=HYBRID,
        vision=dict(out_hidden_size=64, intermediate_size=128, num_position_embeddings=16)),
    "glm-4.5v": glm(
        "glm4v_moe", "Glm4v", text=dict(
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=96,
            use_qk_norm=False)),
    "glm-4.6v": glm("glm46v", "Glm46V"),
    "llava-next": llava_next(
        MISTRAL, dict(model_type="clip_vision_model"),
        layers=-2, select="default", extra=1),
    # The features of several layers side by side, and logits that are divided.
    "granite-vision": llava_next(
        dict(model_type="granite", logits_scaling=4.0, attention_multiplier=0.2,
             embedding_multiplier=2.0, residual_multiplier=0.5),
        dict(model_type="siglip_vision_model", vision_use_head=False),
        layers=[-2, -1], select="full", extra=0),
    "idefics3": idefics(dict(model_type="idefics3"), "Idefics3"),
    # Tiles in one flat list, a line break after each; logits that are scaled.
    "cohere2-vision": Family(
        config=dict(
            model_type="cohere2_vision", image_token_id="<|IMG_PATCH|>",
            alignment_intermediate_size=128, text_config=LANGUAGE | dict(
                model_type="cohere2", logit_scale=0.25, rms_norm_eps=None,  # vLLM: none of RMSNorm
                layer_types=["sliding_attention", "full_attention"]),
            vision_config=VISION | TILE | dict(vision_use_head=False)),
        tokens=COHERE, chat=cohere_chat("<|IMG_PATCH|>"),
        processor=("Cohere2VisionProcessor", {}),
        image_processor=("Cohere2VisionImageProcessor", dict(  # patch_size: tokens along a tile
            size=SQUARE, patch_size=2, max_patches=4)),
        adds_bos=True, nested_tower=True),
    # Short convolutions with states of their own beside attention; patches of tiles, padded.
    "lfm2-vl": Family(
        config=dict(
            model_type="lfm2_vl", image_token_id="<image>", projector_hidden_size=64,
            text_config=LANGUAGE | dict(
                model_type="lfm2", layer_types=["conv", "full_attention"],
                block_auto_adjust_ff_dim=False, conv_dim=64, block_dim=64),  # vLLM asks for them
            vision_config=VISION | dict(patch_size=14, num_patches=64, vision_use_head=False)),
        tokens=CHATML | dict(
            bos_token="<|startoftext|>", image_token="<image>", image_start_token="<|image_start|>",
            image_end_token="<|image_end|>", image_thumbnail_token="<|img_thumbnail|>",
            **{f"tile_{r}_{c}": f"<|img_row_{r}_col_{c}|>" for r in (1, 2) for c in (1, 2)}),
        chat=chat_template(start="<|startoftext|>", image="<image>", **CHATML_TURNS),
        processor=("Lfm2VlProcessor", {}),
        image_processor=("Lfm2VlImageProcessor", dict(
            encoder_patch_size=14, tile_size=112, min_tiles=2, max_tiles=4, min_image_tokens=4,
            max_image_tokens=16)),
        adds_bos=True, nested_tower=True),
    # No M-RoPE; fewer heads for keys than for queries in the vision tower, too.
    "exaone4.5": qwen(
        "exaone4_5", "Exaone4_5_Processor", 14, tied=False,
        rope={"rope_type": "default", "rope_theta": 1e4},
        text=dict(model_type="exaone4", sliding_window=64,
                  layer_types=["sliding_attention", "full_attention"]),
        vision=dict(out_hidden_size=64, intermediate_size=128, window_size=56,
                    num_key_value_heads=1, fullatt_block_indexes=[1])),
    "glm-ocr": glm("glm_ocr", "Glm46V", text=dict(
        intermediate_size=192)),  # vLLM makes the projector as wide, transformers 3 x 64
    "lighton-ocr": pixtral(
        dict(model_type="lighton_ocr", image_token_id="[IMG]", spatial_merge_size=2),
        patch=14, longest=112, merge=2, name="LightOnOcr", text=dict(model_type="qwen3")),
    # The placeholder in the text is another token than that of pixels, and tiles have numbers. vLLM
    # has no class of its own for it, and runs that of transformers.
    "aya-vision": Family(
        config=dict(
            model_type="aya_vision", image_token_index="<|IMG_PATCH|>",
            text_config=LANGUAGE | dict(
                model_type="cohere2", logit_scale=0.25, rms_norm_eps=None,
                layer_types=["sliding_attention", "full_attention"]),
            vision_config=VISION | TILE | dict(
                model_type="siglip_vision_model", vision_use_head=False)),
        tokens=COHERE | dict(place_token="<image>", tile_token="TILE", all_token="TILE_GLOBAL"),
        chat=cohere_chat("<image>"),
        processor=("AyaVisionProcessor", dict(patch_size=14, img_size=56, downsample_factor=2)),
        image_processor=("GotOcr2ImageProcessor", dict(
            size=SQUARE, crop_to_patches=True, max_patches=4)),
        adds_bos=True, nested_tower=True),
    # Pixels of all patches along the last dim, and images that are numbered in the text.
    "minicpm-v-4.6": Family(
        config=dict(
            model_type="minicpmv4_6", image_token_id="<|image_pad|>",
            video_token_id="<|video_pad|>", insert_layer_id=0, image_size=112, max_slice_nums=4,
            text_config=LANGUAGE | HYBRID | dict(model_type="qwen3_5_text"),
            vision_config=VISION | TILE | dict(image_size=112)),
        tokens=CHATML | dict(
            image_token="<|image_pad|>", video_token="<|video_pad|>",
            image_start_token="<image>", image_end_token="</image>",
            slice_start_token="<slice>", slice_end_token="</slice>",
            image_id_start_token="<image_id>", image_id_end_token="</image_id>"),
        chat=chat_template(image="<|image_pad|>\n", **CHATML_TURNS),
        processor=("MiniCPMV4_6Processor", {}),
        image_processor=("MiniCPMV4_6ImageProcessor", dict(scale_resolution=112, max_slice_nums=4)),
        video_processor=("MiniCPMV4_6VideoProcessor", dict(
            scale_resolution=112, max_slice_nums=4))),
}


def make_tokenizer(family):
    """Byte-level BPE: any text encodes, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(family.tokens) + 256 + MERGES, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(family.tokens.values()))
    tokenizer.train_from_iterator([TEXT], trainer)
    if family.newlines:
        tokenizer.add_tokens(["\n" * n for n in (1, 2, 3, 4)])
    if family.adds_bos:
        bos = family.tokens["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    general = {"bos_token", "eos_token", "pad_token", "unk_token"} & set(family.tokens)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens={k: v for k, v in family.tokens.items() if k not in general},
        **{k: family.tokens[k] for k in general})


def make_processor(family, tokenizer):
    """The family's own processor around the tokenizer."""
    parts = {"tokenizer": tokenizer, "chat_template": family.chat}
    for part in ("image_processor", "video_processor", "feature_extractor"):
        if getattr(family, part):
            name, arguments = getattr(family, part)
            parts[part] = getattr(transformers, name)(**arguments)
    name, arguments = family.processor
    return getattr(transformers, name)(**parts, **arguments)


def make_model(family, tokenizer):
    """Wide random weights, the same on every run."""
    ids = {token: i for i, token in enumerate(family.tokens.values())}
    own = {k: ids.get(v, v) if isinstance(v, str) else v for k, v in family.config.items()}
    ends = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    own["text_config"] = own["text_config"] | ends | {"vocab_size": len(tokenizer)}
    config = transformers.AutoConfig.for_model(**own, **ends)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(SEED)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        for weight in model.parameters():  # a tied head comes once
            noise = STD * torch.randn_like(weight)
            # Vectors are norms and biases: they keep their centre, 1 or 0.
            weight.copy_(noise if weight.dim() > 1 else weight + noise)
    return model


def nest_tower(file):
    """Rename the vision tower's weights as the published checkpoints name them.

    transformers 5 saves a new CLIP or SigLIP tower as vision_tower.* and reads either name; vLLM
    reads only vision_tower.vision_model.*. Once loaded from such names, it is saved with them.
    """
    old, new = "vision_tower.", "vision_tower.vision_model."
    save_file({k.replace(old, new): v for k, v in load_file(file).items()}, file, {"format": "pt"})


def transpose_experts(file):
    """Write each weight of experts as the published checkpoints do, input before output.

    transformers 5 reads it either way round, and saves the other one; vLLM reads only this one.
    """
    weights = {k: v.transpose(1, 2).contiguous() if ".experts." in k else v
               for k, v in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


def make(name: str, directory: Path) -> None:
    """Write the checkpoint of the family into the directory. Raises KeyError if there is none."""
    if name not in FAMILIES:
        raise KeyError(f"no family {name!r}; there are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    tokenizer = make_tokenizer(family)
    make_model(family, tokenizer).save_pretrained(directory)
    if family.nested_tower:
        nest_tower(Path(directory) / "model.safetensors")
    if family.transposed_experts:
        transpose_experts(Path(directory) / "model.safetensors")
    make_processor(family, tokenizer).save_pretrained(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("name", nargs="*", help="default: all of " + ", ".join(FAMILIES))
    arguments = parser.parse_args()
    for name in arguments.name or FAMILIES:
        make(name, arguments.out_dir / name)
        print(arguments.out_dir / name)
