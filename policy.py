"""The model as a policy: the logprobs of sampled tokens, with each prompt forwarded once.

A group of G completions shares one long prompt, most of it an image. The prompt is forwarded once
for all its completions in a micro-batch, through the vision tower too. Its key-value cache is
forked into one line per completion, and the gradients of all completions flow back through the
cache and add up in the one prompt. The result is that of forwarding each completion with its own
prompt, which is the other way here (row by row) and what the first is held against at start-up.

What of the model trains is decided here, too: LoRA adapters, a frozen vision tower, FSDP shards.
"""
import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

from batch import MultimodalBatch
from loss import token_logprobs
from support.token_types import with_token_types

FULL = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
LORA_SCALE = 2


class Policy(torch.nn.Module):
    """A Hugging Face image-text-to-text model as a policy, at the sampling temperature.

    All of the forward pass is in this module's own forward, the head included: the weights of a
    sharded model are whole only in there.
    """

    def __init__(self, model, config):
        super().__init__()
        self.model, self.temperature = model, config.temperature
        self.server_dtype = config.inference_args.get("dtype")
        self.banned = vision_token_ids(model.config)
        vars(self).update(logit_changes(model.config)[0])  # scale and cap
        self.completion_type = 0  # in the token types that a family wants beside the ids
        # In bf16 most of a small update would round to nothing: 0.4 % of the weights moved.
        if any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters()):
            model.float()
        model.eval()  # dropout would make the trainer another policy than the one that sampled
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():  # they alone must be in training mode, not their parts
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = True
        self.can_share = not config.gradient_checkpointing
        if config.lora_rank:
            add_adapters(model, config.lora_rank)
        if config.freeze_vision:
            freeze_vision(model)

    def ban(self, tokenizer, strings: list[str]) -> None:
        """Ban the tokens of these strings, too, which the processor takes for images."""
        ids = tokenizer.get_vocab()
        self.banned = sorted({*self.banned, *(ids[text] for text in strings if text in ids)})

    def forward(self, batch: MultimodalBatch, share: bool) -> tuple[Tensor, Tensor]:
        """(logprobs, entropies), both (b, L) fp32, and 0 where the loss mask is."""
        batch = with_token_types(batch, self.model, self.completion_type)
        mask = batch.loss_mask.bool()                                     # (b, L)
        with self.autocast():
            if share:
                states = self.shared_states(batch)                        # (N, H)
            else:
                states = self.row_states(batch)                           # (N, H)
            head = self.model.get_output_embeddings()
            logprobs, entropies = token_logprobs(                         # (N,) each
                states, batch.input_ids[mask], head, self.temperature, self.banned,
                scale=self.scale, cap=self.cap)
        return (logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs),
                entropies.new_zeros(mask.shape).masked_scatter(mask, entropies))

    def autocast(self):
        """On a GPU, where the weights are fp32 all the same, matrices are multiplied in bf16."""
        device = self.model.device.type
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

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

    def body(self, **inputs) -> tuple[Tensor, object]:
        """(the last hidden state (b, L, H), the key-value cache), by the model without its head."""
        body = self.model.base_model
        if body is self.model:  # some families have no module of all but the head
            inputs |= {"output_hidden_states": True, "logits_to_keep": 1}
        output = body(**inputs)
        if body is self.model:
            return output.hidden_states[-1], output.past_key_values
        return output.last_hidden_state, output.past_key_values

    def row_states(self, batch: MultimodalBatch) -> Tensor:
        """The hidden state before each token in the loss, every row with its own prompt; (N, H)."""
        states, _ = self.body(**self.whole_rows(batch))                   # (b, L, H)
        return states[:, :-1][batch.loss_mask[:, 1:].bool()]

    def shared_states(self, batch: MultimodalBatch) -> Tensor:
        """The same states, with each prompt and its images forwarded once; (N, H).

        Prompts are padded on the left, so that the last state of each is the one before the first
        token of all its completions.
        """
        fork, prompt_of = batch.fork(), batch.prompt_index                # prompt_of: (b,)
        P = len(fork.prompts["input_ids"])
        images = batch.images_of(list(range(P)))
        positions = self.positions(fork.prompts, images)                  # ([3,] P, W_p)
        prompt_states, cache = self.body(                                 # (P, W_p, H), P lines
            **fork.prompts, **images, position_ids=positions, use_cache=True)
        cache.batch_select_indices(prompt_of)  # changes it in place: one line per completion, b

        # Wanted is the state before each of the W_c tokens: the prompt's last one, and those of all
        # tokens but the last. A single token is forwarded all the same, for no model takes none.
        W_c = fork.trained.shape[1]
        kept = max(W_c - 1, 1)
        inputs = {key: tensor[:, :kept] for key, tensor in fork.completions.items()}
        own_mask = inputs.pop("attention_mask")                           # (b, kept)
        prompt_mask = fork.prompts["attention_mask"][prompt_of]           # (b, W_p)
        full_mask = torch.cat([prompt_mask, own_mask], 1)                 # (b, W_p + kept)
        later_images = batch.images_of([s for row in batch.replies for s in row])
        if later_images:
            own_positions = self.completion_positions(batch, kept)        # ([3,] b, kept)
        else:  # they count on from the prompt's last one
            own_positions = positions[..., prompt_of, -1:] + own_mask.cumsum(1)
        completion_states, _ = self.body(                                 # (b, kept, H)
            **inputs, **later_images, attention_mask=full_mask, position_ids=own_positions,
            use_cache=True, past_key_values=cache)

        before_first = prompt_states[prompt_of, -1:]                      # (b, 1, H)
        states = torch.cat([before_first, completion_states], 1)          # (b, 1 + kept, H)
        return states[:, :W_c][fork.trained]                              # (N, H)

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

    def shard(self) -> None:
        """FSDP2: every rank holds a slice of each block, of its gradient and optimizer state."""
        compute_dtype = torch.bfloat16 if torch.cuda.is_available() else None
        precision = MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32)
        blocks = self.model._no_split_modules
        for module in list(self.modules()):
            if type(module).__name__ in blocks:
                fully_shard(module, mp_policy=precision)
        fully_shard(self, mp_policy=precision)
        register_fsdp_forward_method(self, "model_logprobs")

    def full_weights(self) -> dict[str, Tensor]:
        """Every weight of the model by name, with adapters merged.

        Those of a sharded model are gathered, which all ranks must do, into a copy that rank 0
        alone gets.
        """
        if isinstance(self, FSDPModule):
            return merge_adapters(sharded.get_model_state_dict(self.model, options=FULL))
        return merge_adapters(self.model.state_dict())


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
            merged[target] = merged[target] + LORA_SCALE * b @ a
    return merged


def freeze_vision(model) -> None:
    """Freeze all but the language model and its head: the vision tower and its projector."""
    language = torch.nn.ModuleList([model.get_decoder(), model.get_output_embeddings()])
    kept = set(language.parameters())
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.requires_grad_(False)
