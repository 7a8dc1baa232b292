"""The demo model's training forward: Llama 4's text model as plain functions on tensors named as upstream names them.

transformers runs every expert on every token with zeroed inputs. Here the rows are sorted by expert first, so a token
costs one routed expert; chunked attention is a reshape instead of a mask. `train_demo.py` checks that transformers' own
forward gives the same loss from the saved weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Params = dict[str, Tensor]
ROW_MULTIPLE = 64


@dataclass(frozen=True)
class Preset:
    """The text model's sizes; field names are those of transformers' `Llama4TextConfig`."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 256
    intermediate_size_mlp: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_local_experts: int = 6
    interleave_moe_layer_step: int = 1
    use_qk_norm: bool = True
    attention_chunk_size: int = 128
    floor_scale: int = 128
    attn_scale: float = 0.1
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` has routed experts."""
        return (layer + 1) % self.interleave_moe_layer_step == 0

    def has_rope(self, layer: int) -> bool:
        """Whether `layer` has rotary positions and chunked attention: all but every fourth."""
        return (layer + 1) % 4 != 0


def preset(name: str, vocabulary: int) -> Preset:
    """`scout` is the shipped one; `maverick` interleaves dense and MoE layers and has many experts and no qk norm."""
    if name == "scout":
        return Preset(vocab_size=vocabulary)
    return Preset(
        vocab_size=vocabulary,
        intermediate_size=128,
        num_local_experts=32,
        interleave_moe_layer_step=2,
        use_qk_norm=False,
    )


def shapes(sizes: Preset) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the text model."""
    hidden, vocabulary = sizes.hidden_size, sizes.vocab_size
    found: dict[str, tuple[int, ...]] = {"language_model.model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(sizes.num_hidden_layers):
        prefix = f"language_model.model.layers.{layer}."
        found |= {prefix + name: shape for name, shape in _layer_shapes(sizes, sizes.is_moe(layer)).items()}
    return found | {
        "language_model.model.norm.weight": (hidden,),
        "language_model.lm_head.weight": (vocabulary, hidden),
    }


def _layer_shapes(sizes: Preset, moe: bool) -> dict[str, tuple[int, ...]]:
    hidden = sizes.hidden_size
    heads, kv = sizes.num_attention_heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
    attention = {"q": (heads, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, heads)}
    found: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
    found |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if not moe:
        return found | _mlp_shapes("feed_forward.", hidden, sizes.intermediate_size_mlp)
    experts, width = sizes.num_local_experts, sizes.intermediate_size
    return found | {
        "feed_forward.router.weight": (experts, hidden),
        "feed_forward.experts.gate_up_proj": (experts, hidden, 2 * width),
        "feed_forward.experts.down_proj": (experts, width, hidden),
        **_mlp_shapes("feed_forward.shared_expert.", hidden, width),
    }


def _mlp_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }


def initial(sizes: Preset, generator: torch.Generator) -> Params:
    """Random float32 weights that need gradients; residual outputs start small so that depth does not amplify."""
    params = {}
    for name, shape in shapes(sizes).items():
        if name.endswith("norm.weight"):
            value = torch.ones(shape)
        else:
            value = torch.randn(shape, generator=generator) * _deviation(name, sizes)
        params[name] = value.requires_grad_()
    return params


def _deviation(name: str, sizes: Preset) -> float:
    if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
        return 0.02 / (2 * sizes.num_hidden_layers) ** 0.5
    return 0.02 if "lm_head" not in name else 0.005


class _Gather(torch.autograd.Function):
    """`rows[order]`, an index past the end giving a zero row; every row is used at most once, at `back`.

    So the gradient is a gather too, where indexing would scatter row by row.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return _gather(rows, order)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return _gather(gradient, back), None, None


def _gather(rows: Tensor, order: Tensor) -> Tensor:
    return torch.cat((rows, rows.new_zeros(1, rows.shape[1]))).index_select(0, order)


def _sorted_by_expert(chosen: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Slots of a buffer sorted by expert: the token of each slot, the slot of each token, and slots per expert.

    Each expert's slots are rounded up to ROW_MULTIPLE, because a matrix product is compiled for every new row count.
    """
    tokens = len(chosen)
    padded = (counts + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    order = chosen.argsort(stable=True)
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    places = torch.arange(tokens) + shift[chosen[order]]
    token_of_slot = torch.full((int(padded.sum()),), tokens).scatter_(0, places, order)
    slot_of_token = torch.empty_like(order).scatter_(0, order, places)
    return token_of_slot, slot_of_token, padded.tolist()


@dataclass
class Routing:
    """What the routers did: the load-balancing loss and, per MoE layer, the tokens of each expert."""

    balance: Tensor
    counts: list[Tensor]


class TextModel:
    """The forward over `params`. `compute` is the dtype of the matrix products; norms and the router are float32."""

    def __init__(self, sizes: Preset, params: Params, compute: torch.dtype = torch.float32) -> None:
        self.sizes = sizes
        self.params = params
        self.compute = compute
        exponents = torch.arange(0, sizes.head_dim, 2) / sizes.head_dim
        self.frequencies = 1.0 / sizes.rope_theta**exponents

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Routing]:
        """Logits [batch, length, vocabulary] of `tokens` [batch, length] and what the routers did."""
        routing = Routing(torch.zeros(()), [])
        hidden = functional.embedding(tokens, self.params["language_model.model.embed_tokens.weight"])
        rotation = self._rotation(tokens.shape[1])
        for layer in range(self.sizes.num_hidden_layers):
            prefix = f"language_model.model.layers.{layer}."
            normed = self._norm(hidden, prefix + "input_layernorm.weight")
            hidden = hidden + self._attention(normed, prefix + "self_attn.", layer, rotation)
            normed = self._norm(hidden, prefix + "post_attention_layernorm.weight")
            hidden = hidden + self._feed_forward(normed, prefix + "feed_forward.", layer, routing)
        hidden = self._norm(hidden, "language_model.model.norm.weight")
        return self._linear(hidden.to(self.compute), "language_model.lm_head.weight"), routing

    def _linear(self, rows: Tensor, name: str) -> Tensor:
        return functional.linear(rows, self.params[name].to(self.compute))

    def _norm(self, rows: Tensor, name: str) -> Tensor:
        return _rms(rows, self.sizes.rms_norm_eps) * self.params[name]

    def _rotation(self, length: int) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(length).float(), self.frequencies)
        return angles.cos()[:, None, :, None], angles.sin()[:, None, :, None]

    def _attention(self, normed: Tensor, prefix: str, layer: int, rotation: tuple[Tensor, Tensor]) -> Tensor:
        sizes, (batch, length, _) = self.sizes, normed.shape
        normed = normed.to(self.compute)
        query, key, value = (
            self._linear(normed, f"{prefix}{name}_proj.weight").view(batch, length, -1, sizes.head_dim)
            for name in "qkv"
        )
        chunk = length
        if sizes.has_rope(layer):
            chunk = min(sizes.attention_chunk_size, length)
            query, key = self._positioned(query, rotation), self._positioned(key, rotation)
        else:
            query = query * self._temperature(length)
        mixed = _chunked_attention(query.float(), key.float(), value.float(), chunk).to(self.compute)
        return self._linear(mixed.reshape(batch, length, -1), prefix + "o_proj.weight")

    def _positioned(self, heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        turned = _rotate(heads.float(), *rotation)
        return _rms(turned, self.sizes.rms_norm_eps) if self.sizes.use_qk_norm else turned

    def _temperature(self, length: int) -> Tensor:
        steps = torch.floor((torch.arange(length).float() + 1.0) / self.sizes.floor_scale)
        return (torch.log1p(steps) * self.sizes.attn_scale + 1.0)[None, :, None, None]

    def _feed_forward(self, normed: Tensor, prefix: str, layer: int, routing: Routing) -> Tensor:
        if not self.sizes.is_moe(layer):
            return self._mlp(normed.to(self.compute), prefix)
        rows = normed.reshape(-1, normed.shape[-1])
        mixed = self._mlp(rows.to(self.compute), prefix + "shared_expert.") + self._routed(rows, prefix, routing)
        return mixed.view(normed.shape)

    def _mlp(self, rows: Tensor, prefix: str) -> Tensor:
        gate, up = (self._linear(rows, f"{prefix}{name}_proj.weight") for name in ("gate", "up"))
        return self._linear(functional.silu(gate) * up, prefix + "down_proj.weight")

    def _routed(self, rows: Tensor, prefix: str, routing: Routing) -> Tensor:
        logits = functional.linear(rows, self.params[prefix + "router.weight"])
        winner, chosen = logits.max(dim=1)
        counts = torch.bincount(chosen, minlength=self.sizes.num_local_experts)
        shares = counts.float() / len(chosen)
        routing.balance = routing.balance + len(shares) * (shares * logits.softmax(1).mean(0)).sum()
        routing.counts.append(counts)
        token_of_slot, slot_of_token, slots = _sorted_by_expert(chosen, counts)
        scaled = (rows * winner.sigmoid()[:, None]).to(self.compute)
        outputs = self._experts(_Gather.apply(scaled, token_of_slot, slot_of_token), slots, prefix)
        return _Gather.apply(outputs, slot_of_token, token_of_slot)

    def _experts(self, rows: Tensor, slots: list[int], prefix: str) -> Tensor:
        """Every expert on its own rows, which are contiguous."""
        gate_up = self.params[prefix + "experts.gate_up_proj"].to(self.compute)
        down = self.params[prefix + "experts.down_proj"].to(self.compute)
        outputs = []
        for expert, own in enumerate(rows.split(slots)):
            gate, up = (own @ gate_up[expert]).chunk(2, dim=-1)
            outputs.append((functional.silu(gate) * up) @ down[expert])
        return torch.cat(outputs)


def _rms(rows: Tensor, epsilon: float) -> Tensor:
    return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + epsilon)


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate neighbouring pairs of [batch, length, heads, head_dim] by their position's angles."""
    pairs = heads.unflatten(-1, (-1, 2))
    first, second = pairs[..., :1], pairs[..., 1:]
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1).flatten(-2)


def _chunked_attention(query: Tensor, key: Tensor, value: Tensor, chunk: int) -> Tensor:
    """Causal attention within chunks: [batch, length, heads, head_dim] in and out; length is a multiple of chunk."""
    groups = query.shape[2] // key.shape[2]
    key, value = (tensor.repeat_interleave(groups, dim=2) for tensor in (key, value))
    cut = [tensor.unflatten(1, (-1, chunk)).flatten(0, 1).transpose(1, 2) for tensor in (query, key, value)]
    mixed = functional.scaled_dot_product_attention(*cut, is_causal=True)
    return mixed.transpose(1, 2).reshape(query.shape)
