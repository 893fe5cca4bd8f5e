"""The model as a policy: the logprobs of sampled tokens, with each prompt forwarded once.

A group of G completions shares one long prompt, most of it an image. The prompt is forwarded once
for all its completions, in however many micro-batches, through the vision tower too. Its keys and
values are forked into one line per completion; the gradients of all completions add up in them, and
flow back through the one prompt at the end. The result is that of forwarding each completion with
its own prompt, which is the other way here (row by row) and what the first is held against at
start-up.

What of the model trains is decided here, too: LoRA adapters, a frozen vision tower, FSDP shards.
"""
import contextlib
import re
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy,
                                    fully_shard, register_fsdp_forward_method)
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from batch import MultimodalBatch
from loss import token_logprobs
from support.ranks import receive
from support.token_types import with_token_types

LORA_SCALE = 2


class Prompts(NamedTuple):
    """P prompts that were forwarded, as their completions need them."""
    tensors: list[Tensor]  # the last state of each (P, 1, H); keys, values of each layer (P, .., W_p, D)
    mask: Tensor           # (P, W_p) 0 = padding, on the left
    positions: Tensor      # ([3,] P, 1) that of the last token


class StoredLayer(DynamicLayer):
    """Keeps the keys and values of prompts. A layer that is recomputed for its gradient may call
    it twice, as it may the next one: neither grows."""

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values


class ForkedLayer(DynamicLayer):
    """Shows each completion the keys and values of its prompt, then its own."""

    def __init__(self, keys: Tensor, values: Tensor, prompt_of: Tensor):
        super().__init__()
        self.keys, self.values, self.prompt_of = keys, values, prompt_of
        self.is_initialized = True

    def update(self, keys, values, *args, **kwargs):
        # index_select, for the gradient of [prompt_of] takes 70 times as long.
        prompt_keys = self.keys.to(keys.dtype).index_select(0, self.prompt_of)  # (b, .., W_p, D)
        prompt_values = self.values.to(values.dtype).index_select(0, self.prompt_of)
        return torch.cat([prompt_keys, keys], -2), torch.cat([prompt_values, values], -2)


class Policy(torch.nn.Module):
    """A Hugging Face image-text-to-text model as a policy, at the sampling temperature.

    All of the forward pass is in this module's own forward, the head included: the weights of a
    sharded model are whole only in there.
    """

    def __init__(self, model, config):
        super().__init__()
        self.model, self.temperature = model, config.temperature
        self.device = model.device  # where it computes
        self.server_dtype = config.inference_args.get("dtype")
        self.banned = vision_token_ids(model.config)
        vars(self).update(logit_changes(model.config)[0])  # scale and cap
        self.completion_type = 0  # in the token types that a family wants beside the ids
        # transformers warns that a checkpointed layer has no cache; with ours it has, unasked.
        self.use_cache = not config.gradient_checkpointing
        model.eval()  # dropout would make the trainer another policy than the one that sampled
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():  # they alone must be in training mode, not their parts
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True
                    module._can_checkpoint_with_cache = True  # with ours: see StoredLayer
        self.can_share = True
        if config.lora_rank:
            add_adapters(model, config.lora_rank)
        if config.freeze_vision:
            freeze_vision(model)
        # FSDP wants one type for all weights of a block.
        is_sharded = distributed.is_initialized() or config.cpu_offload
        train_in_fp32(model, keep_frozen=model.device.type == "cuda" and not is_sharded)

    def ban(self, tokenizer, strings: list[str]) -> None:
        """Ban the tokens of these strings, too, which the processor takes for images."""
        ids = tokenizer.get_vocab()
        self.banned = sorted({*self.banned, *(ids[text] for text in strings if text in ids)})

    def forward(self, batch: MultimodalBatch, share: bool,
                prompts: Prompts | None = None) -> tuple[Tensor, Tensor]:
        """(logprobs, entropies), both (b, L) fp32, and 0 where the loss mask is.

        With share each prompt is forwarded once, here or, by shared_prompts(), before.
        """
        batch = with_token_types(batch, self.model, self.completion_type)
        mask = batch.loss_mask.bool()                                     # (b, L)
        with self.autocast():
            if share:
                states = self.shared_states(batch, prompts or self.prompt_states(batch))  # (N, H)
            else:
                states = self.row_states(batch)                           # (N, H)
            head = self.model.get_output_embeddings()
            logprobs, entropies = token_logprobs(                         # (N,) each
                states, batch.input_ids[mask], head, self.temperature, self.banned,
                scale=self.scale, cap=self.cap)
        return (logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs),
                entropies.new_zeros(mask.shape).masked_scatter(mask, entropies))

    @contextlib.contextmanager
    def shared_prompts(self, batch: MultimodalBatch):
        """Yields the prompts of a batch, forwarded once for all of its pieces().

        They are cut off from their own computation. There the gradients of all that is computed
        with them add up, in fp32; at the end they flow back through prompts and images, once.
        """
        prompts = self.read_prompts(batch)
        leaves = [tensor.detach().float().requires_grad_(tensor.requires_grad)
                  for tensor in prompts.tensors]
        yield prompts._replace(tensors=leaves)
        used = [(tensor, leaf.grad.to(tensor.dtype))
                for tensor, leaf in zip(prompts.tensors, leaves) if leaf.grad is not None]
        if used:
            torch.autograd.backward(*zip(*used))

    def read_prompts(self, batch: MultimodalBatch) -> Prompts:
        """The prompts of a batch by a forward pass of their own."""
        with self.autocast():
            return self.prompt_states(with_token_types(batch, self.model))

    def autocast(self):
        """On a GPU, where what trains is fp32 all the same, matrices are multiplied in bf16."""
        device = self.device.type
        is_mixed = any(is_low(p) for p in self.model.parameters())
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or is_mixed)

    def model_logprobs(self, batch: MultimodalBatch) -> Tensor:
        """The same logprobs by the logits of the model's own forward pass, without a gradient."""
        batch = with_token_types(batch, self.model, self.completion_type)
        mask = batch.loss_mask.bool()
        with torch.no_grad(), self.autocast():
            output = self.model(**self.whole_rows(batch))
        logits = output.logits[:, :-1][mask[:, 1:]].float() / self.temperature      # (N, V)
        logits[:, self.banned] -= 100 / self.temperature
        logprobs = logits.log_softmax(-1).gather(1, batch.input_ids[mask][:, None])  # (N, 1)
        return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)

    def whole_rows(self, batch: MultimodalBatch) -> dict:
        """Model inputs: every row with its own prompt."""
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask,
                "use_cache": False, **batch.token_tensors(),
                **batch.images_of(batch.row_segments())}

    def body(self, **inputs) -> Tensor:
        """The last hidden state (b, L, H), by the model without its head."""
        body = self.model.base_model
        if body is self.model:  # some families have no module of all but the head
            inputs |= {"output_hidden_states": True, "logits_to_keep": 1}
            return body(**inputs).hidden_states[-1]
        return body(**inputs).last_hidden_state

    def row_states(self, batch: MultimodalBatch) -> Tensor:
        """The hidden state before each token in the loss, every row with its own prompt; (N, H)."""
        states = self.body(**self.whole_rows(batch))                      # (b, L, H)
        return states[:, :-1][batch.loss_mask[:, 1:].bool()]

    def prompt_states(self, batch: MultimodalBatch) -> Prompts:
        """Each prompt and its images, forwarded once.

        Prompts are padded on the left, so that the last state of each is the one before the first
        token of all its completions.
        """
        inputs = batch.prompt_inputs()                                    # (P, W_p) each
        images = batch.images_of(list(range(len(inputs["input_ids"]))))
        positions = self.positions(inputs, images)                        # ([3,] P, W_p)
        cache = Cache(layer_class_to_replicate=StoredLayer)
        states = self.body(**inputs, **images, position_ids=positions,    # (P, W_p, H)
                           use_cache=self.use_cache, past_key_values=cache)
        tensors = [states[:, -1:]]
        for layer in cache.layers:
            tensors += [layer.keys, layer.values]
        return Prompts(tensors, inputs["attention_mask"], positions[..., -1:])

    def shared_states(self, batch: MultimodalBatch, prompts: Prompts) -> Tensor:
        """The same states as row_states() by the completions alone, after their prompts; (N, H).

        Wanted is the state before each of the W_c tokens: the prompt's last one, and those of all
        tokens but the last. A single token is forwarded all the same, for no model takes none.
        """
        inputs, trained = batch.completion_inputs()                       # (b, W_c) each
        prompt_of, W_c = batch.prompt_index, trained.shape[1]
        last_states, *tensors = prompts.tensors
        cache = Cache([ForkedLayer(keys, values, prompt_of)
                       for keys, values in zip(tensors[::2], tensors[1::2], strict=True)])
        kept = max(W_c - 1, 1)
        inputs = {key: tensor[:, :kept] for key, tensor in inputs.items()}
        own_mask = inputs.pop("attention_mask")                           # (b, kept)
        full_mask = torch.cat([prompts.mask[prompt_of], own_mask], 1)     # (b, W_p + kept)
        later_images = batch.images_of([s for row in batch.replies for s in row])
        if later_images:
            positions = self.completion_positions(batch, kept)            # ([3,] b, kept)
        else:  # they count on from the prompt's last one
            positions = prompts.positions[..., prompt_of, :] + own_mask.cumsum(1)
        states = self.body(                                               # (b, kept, H)
            **inputs, **later_images, attention_mask=full_mask, position_ids=positions,
            use_cache=self.use_cache, past_key_values=cache)
        before_first = last_states[prompt_of].to(states.dtype)            # (b, 1, H)
        states = torch.cat([before_first, states], 1)                     # (b, 1 + kept, H)
        return states[:, :W_c][trained]                                   # (N, H)

    def positions(self, inputs: dict[str, Tensor], images: dict[str, Tensor]) -> Tensor:
        """Of token-level inputs (n, W): (n, W), or (3, n, W) of an M-RoPE model, which counts them."""
        count = getattr(self.model.base_model, "get_rope_index", None)
        if count is None or inputs.keys() == {"input_ids", "attention_mask"}:  # no token types
            return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        grids = {key: grid for key, grid in images.items() if "_thw" in key}
        positions, _ = count(**inputs, **grids)
        return positions

    def completion_positions(self, batch: MultimodalBatch, width: int) -> Tensor:
        """([3,] b, width) positions of completions, counted in whole rows: they hold images."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask,
                  **batch.token_tensors()}
        whole = self.positions(inputs, batch.images_of(batch.row_segments()))  # ([3,] b, L)
        starts, _ = batch.spans()
        columns = torch.tensor(starts)[:, None] + torch.arange(width)          # (b, width)
        columns = columns.clamp(max=whole.shape[-1] - 1).to(whole.device)
        return whole.gather(-1, columns.expand(*whole.shape[:-1], width))

    def clip_gradients(self, most: float) -> float:
        """Scale the gradient down to this norm at most. Returns the norm that it had."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), most)
        if hasattr(norm, "full_tensor"):  # each rank has the norm of its shards
            norm = norm.full_tensor()
        return norm.item()

    def shard(self, offload: bool = False) -> None:
        """FSDP2: every rank holds a slice of each block, of its gradient and optimizer state.

        Rank 0 deals its weights out block by block, so that no other rank ever holds more than one
        beside its slices. With offload slices are in host memory, and a GPU has the blocks at work.
        """
        self.device, compute_dtype = torch.device("cpu"), None
        gpu = torch.cuda.is_available()
        if gpu:
            self.device = torch.device("cuda", torch.cuda.current_device())
            compute_dtype = torch.bfloat16
        options = {"mp_policy": MixedPrecisionPolicy(  # logprobs that go in stay fp32
                       compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
                   "offload_policy": CPUOffloadPolicy(pin_memory=False) if offload else
                   OffloadPolicy()}
        if not distributed.is_initialized():
            distributed.init_process_group(rank=0, world_size=1, store=distributed.HashStore())
        blocks = [module for module in self.modules()
                  if type(module).__name__ in self.model._no_split_modules]
        for module in [*blocks, self]:
            receive([tensor for tensor in [*module.parameters(), *module.buffers()]
                     if not isinstance(tensor, DTensor)], self.device)
            fully_shard(module, **options)
        if offload and gpu:
            for parameter in self.parameters():
                pin(parameter)
        register_fsdp_forward_method(self, "model_logprobs")
        register_fsdp_forward_method(self, "read_prompts")

    def layers(self) -> list[dict[str, Tensor]]:
        """The weights of each layer by name, as this rank holds them."""
        layers = {}
        for name, tensor in self.model.state_dict().items():
            layer = re.match(r".*?\.\d+\.|", name).group()  # "model.layers.3."; "" of none
            layers.setdefault(layer, {})[name] = tensor
        return list(layers.values())

    def gather(self, layer: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole weights of a layer, with adapters merged, where the policy computes.

        On a GPU they are bf16, before they are gathered, which all ranks must do at once.
        """
        dtype = torch.bfloat16 if self.device.type == "cuda" else None
        whole = {}
        for name, tensor in layer.items():
            tensor = tensor.detach().to(self.device).to(dtype=dtype)
            whole[name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return merge_adapters(whole)


def pin(parameter: DTensor) -> None:
    """Lock its host memory where it is, as long as it lives: a GPU reads it 12 times as fast.

    torch's own pin_memory takes powers of two: for the weights and gradients of 7B 118 GB, not 66.
    """
    cuda, tensor = torch.cuda.cudart(), parameter.to_local()
    error = cuda.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if error == cuda.cudaError.success:
        weakref.finalize(parameter, cuda.cudaHostUnregister, tensor.data_ptr()).atexit = False
    else:
        tqdm.write(f"cpu_offload: {tensor.nbytes:,} bytes could not be pinned: {error}")


def vision_token_ids(model_config) -> list[int]:
    """The ids that stand for images, videos and audio, and their brackets, from the config.

    They are banned from sampling: a model looks for the image of each placeholder, and the server
    for that of what becomes placeholders.
    """
    words = ("image", "video", "vision", "audio")
    ids = {value for name, value in model_config.to_dict().items()
           if isinstance(value, int) and name.endswith(("token_id", "token_index"))
           and any(word in name for word in words)}
    return sorted(ids)


def logit_changes(model_config) -> list[dict]:
    """What a family may do to the logits of its head, cap * tanh(scale * x / cap), by attributes.

    First what its config says, then parts of it: some families leave out what their config holds.
    """
    text = model_config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0
    scale /= getattr(text, "logits_scaling", None) or 1.0
    cap = getattr(text, "final_logit_softcapping", None)
    pairs = dict.fromkeys([(scale, cap), (1.0, cap), (scale, None), (1.0, None)])
    return [{"scale": scale, "cap": cap} for scale, cap in pairs]


def is_low(tensor: Tensor) -> bool:
    """Whether its numbers are of less than 32 bits."""
    return tensor.is_floating_point() and tensor.element_size() < 4


def train_in_fp32(model, keep_frozen: bool) -> None:
    """What trains in fp32: in bf16 most of a small update rounds to nothing (0.4 % of them moved).

    What is frozen stays as it was loaded, for the sake of memory, if it may.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        is_kept = keep_frozen and not tensor.requires_grad
        if is_low(tensor) and not is_kept:
            tensor.data = tensor.data.float()


def add_adapters(model, rank: int) -> None:
    """Train W + LORA_SCALE B A (LoRA, arXiv 2106.09685) in linear layers, as listed by adaptable()."""
    import peft
    # Hidden in a module without a config: of one whose experts it knows peft takes other layers.
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=adaptable(model)),
        torch.nn.ModuleList([model]))
    experts = [p.numel() for name, p in model.named_parameters()
               if ".experts." in name and ".lora_" not in name and p.dim() == 3]
    if experts:
        tqdm.write(f"lora_rank: the {sum(experts):,} weights of the experts are not trained: they "
                   "are no linear layers")


def adaptable(model) -> list[str]:
    """The names of the linear layers but the head and the routers of experts."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules()
            if type(module) is torch.nn.Linear and module is not head
            and name.rpartition(".")[2] not in ("gate", "router")]


def merge_adapters(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in a new dict, with W + LORA_SCALE B A under W's own name."""
    merged = {name.replace(".base_layer", ""): tensor for name, tensor in weights.items()
              if ".lora_" not in name}
    for name, a in weights.items():
        if ".lora_A." in name:
            b = weights[name.replace("_A.", "_B.")]
            target = name.replace(".lora_A.default", "")
            merged[target] = (merged[target] + LORA_SCALE * b @ a).to(merged[target].dtype)
    return merged


def freeze_vision(model) -> None:
    """Freeze all but the language model and its head: the vision tower and its projector."""
    language = torch.nn.ModuleList([model.get_decoder(), model.get_output_embeddings()])
    kept = set(language.parameters())
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.requires_grad_(False)
