"""The network: Llama, Qwen2 and Qwen3, for training and for decoding with a KV cache.

The twins of PyTorch and MLX have the same files, classes and functions. Parameter names are
Hugging Face's, and whatever crosses to files outside `backends` is a list or a NumPy array. The
networks are our own, and not a library's, since they are what one comes to read.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from backends.config import LoRAConfig, ModelConfig

# The cosines and sines of all positions, (1 or B, 1, T, head_dim) each; the sines of a head's first
# half have a minus sign.
Rope = tuple[Tensor, Tensor]
# Stores the keys and values of one layer's new tokens, and returns those of all tokens so far.
LayerCache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Part(NamedTuple):
    """Columns of a packed row that see each other, and none of the others.

    mask: (1, 1, columns, columns), 0 for what a column sees, else -inf; None: all before it.
    """

    start: int
    end: int
    mask: Tensor | None


class PackedTexts(NamedTuple):
    """All parts of a packed row of texts, for attention in one call.

    Only where `Transformer.attends_to_texts_at_once`.
    ends: (texts + 1,), int32, the column after each text, after a 0.
    longest: tokens of the longest one.
    """

    ends: Tensor
    longest: int


class Linear(nn.Linear):
    """W x + b, in the type of x.

    An adapter adds scale * B A dropout(x) (LoRA, Hu et al. 2021, section 4.1). `quantize` leaves
    4 bits of W.
    """

    scale: float
    dropout: float
    quant_state: Any  # what bitsandbytes needs to unpack W

    def __init__(self, columns: int, rows: int, bias: bool) -> None:
        super().__init__(columns, rows, bias)
        self.lora_A: nn.Parameter | None = None  # (rank, columns)
        self.lora_B: nn.Parameter | None = None  # (rows, rank)
        self.packed: Tensor | None = None  # W in 4 bits

    # pyrefly: ignore[bad-override-param-name]
    def forward(self, x: Tensor) -> Tensor:
        """Map vectors, (.., columns) -> (.., rows)."""
        bias = None
        if self.bias is not None:
            bias = self.bias.to(x.dtype)
        if self.packed is None:
            y = functional.linear(x, self.weight.to(x.dtype), bias)
        else:
            # It takes seconds to load, and only --bits=4 needs it.
            import bitsandbytes

            y = bitsandbytes.matmul_4bit(
                x, self.packed.t(), quant_state=self.quant_state, bias=bias
            )
        if self.lora_A is not None and self.lora_B is not None:
            x = functional.dropout(x, self.dropout, self.training)
            hidden = functional.linear(x, self.lora_A.to(x.dtype))
            change = functional.linear(hidden, self.lora_B.to(x.dtype))
            y = y + self.scale * change
        return y


class Embedding(nn.Embedding):
    """Ids to vectors, and hidden states to logits.

    Under an adapter a few of its rows, those of `tokens`, are trained in place of the frozen ones.
    """

    rows: nn.Parameter | None  # (tokens, columns)
    tokens: Tensor  # ids
    row_of_token: Tensor  # (vocab,): its row in `rows`, -1 for none

    def __init__(self, vocab_size: int, columns: int) -> None:
        # To draw weights that are replaced anyway would load torch's compiler, for seconds.
        super().__init__(vocab_size, columns, _weight=torch.empty(vocab_size, columns))
        self.rows = None

    # pyrefly: ignore[bad-override-param-name]
    def forward(self, ids: Tensor) -> Tensor:
        """Look ids up, (..) -> (.., columns)."""
        x = super().forward(ids)
        if self.rows is not None:
            row = self.row_of_token[ids]
            is_trained = row >= 0
            trained = self.rows[row].to(x.dtype)
            x = torch.where(is_trained[..., None], trained, x)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of hidden states, (.., columns) -> (.., vocab), in float32."""
        y = functional.linear(x, self.weight.to(x.dtype)).float()
        if self.rows is not None:
            trained = functional.linear(x, self.rows.to(x.dtype)).float()
            y = y.index_copy(-1, self.tokens, trained)
        return y

    def train_rows(self, tokens: list[int], rows: Any) -> None:
        """Train new rows in place of those of some tokens.

        tokens: ids.
        rows: array (tokens, columns), from which they begin.
        """
        device = self.weight.device
        self.tokens = torch.tensor(tokens, device=device)
        self.rows = nn.Parameter(torch.tensor(rows, dtype=torch.float32, device=device))
        self.row_of_token = torch.full((self.num_embeddings,), -1, device=device)
        self.row_of_token[self.tokens] = torch.arange(len(tokens), device=device)


class RMSNorm(nn.RMSNorm):
    """x over its root mean square, times a weight, in the type of x."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize vectors, (.., columns) -> the same."""
        return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal attention in which groups of query heads share a key and value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Weight and bias of the three projections as one, in a copy for decoding.
        self.fused: tuple[Tensor, Tensor | None] | None = None
        hidden_size = config.hidden_size
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = Linear(hidden_size, key_size, bias=config.qkv_bias)
        self.v_proj = Linear(hidden_size, key_size, bias=config.qkv_bias)
        self.o_proj = Linear(query_size, hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        cache: LayerCache | None = None,
        mask: Tensor | None = None,
        parts: Sequence[Part] | PackedTexts = (),
    ) -> Tensor:
        """Return what each position reads from those before it, (B, T, hidden) -> the same.

        cache: with it, keys and values of earlier passes are seen too.
        mask: (B, 1, T, keys), which keys a query sees; None: those up to its own position.
        parts: of a packed row, in order, which do not see each other.
        """
        rows, length, _ = x.shape
        queries_and_keys, v = self._project(x)
        # One call turns both, (B, heads, T, head_dim).
        turned = rotate(queries_and_keys.transpose(1, 2), rope)
        q, k = turned.split((self.config.num_attention_heads, v.shape[2]), 1)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache(k, v)  # (B, key and value heads, keys, head_dim)
        if isinstance(parts, PackedTexts):
            y = _attend_to_texts(q, k, v, parts)
        elif parts:
            # Not by slices: the gradient of each would be an array of the whole row.
            sizes = [end - start for start, end, _ in parts]
            split = zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True)
            read = [_attend(*heads, part.mask) for heads, part in zip(split, parts, strict=True)]
            y = torch.cat(read, 2)
        else:
            y = _attend(q, k, v, mask)
        y = y.transpose(1, 2).reshape(rows, length, -1)
        return self.o_proj(y)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys as heads side by side, and values, (B, T, heads, head_dim)."""
        heads = self.config.num_attention_heads
        key_heads = self.config.num_key_value_heads
        if self.fused is not None:
            all_heads = functional.linear(x, *self.fused).unflatten(-1, (heads + 2 * key_heads, -1))
            queries_and_keys, v = all_heads.split((heads + key_heads, key_heads), 2)
            if not self.config.qk_norm:
                return queries_and_keys, v
            q, k = queries_and_keys.split((heads, key_heads), 2)
        else:
            q = self.q_proj(x).unflatten(-1, (heads, -1))
            k = self.k_proj(x).unflatten(-1, (key_heads, -1))
            v = self.v_proj(x).unflatten(-1, (key_heads, -1))
        if self.config.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        return torch.cat((q, k), 2), v


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return scaled dot-product attention, by the layout that is fastest for grouped heads."""
    rows, heads, length, head_dim = q.shape
    key_heads = k.shape[1]
    attend = functional.scaled_dot_product_attention
    if key_heads < heads and _repeats_keys(q, mask):
        k = k.repeat_interleave(heads // key_heads, 1)
        v = v.repeat_interleave(heads // key_heads, 1)
    elif mask is not None and key_heads < heads:
        # The query heads of one key head become rows of one query, so that its keys are read once.
        group = heads // key_heads
        grouped_q = q.reshape(rows, key_heads, group * length, head_dim)
        if length == 1:
            # All rows of such a query look at one row of the mask, which is not copied for them.
            grouped_mask = mask.expand(-1, -1, group, -1)
        else:
            grouped_mask = mask.repeat(1, 1, group, 1)
        y = attend(grouped_q, k, v, attn_mask=grouped_mask)
        return y.reshape(q.shape)
    has_groups = k.shape[1] < heads
    return attend(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=has_groups)


def _repeats_keys(q: Tensor, mask: Tensor | None) -> bool:
    """Whether each query head gets keys and values of its own, where groups of them share some.

    On CUDA: its frugal kernels take no groups in float32, and none beside a mask; the one that does
    keeps T x T numbers. Queries side by side, as on a CPU, would need a copy of the mask for each
    head of a group, which every layer keeps for its gradient. One query a row needs none.
    """
    if not q.is_cuda:
        return False
    if mask is None:
        return q.dtype == torch.float32
    return q.shape[2] > 1


def _attend_to_texts(q: Tensor, k: Tensor, v: Tensor, texts: PackedTexts) -> Tensor:
    """Return causal attention inside each text, (1, heads, T, head_dim) -> the same, in one call.

    A call for each text would be thousands of small ones in a pass, for which a GPU waits.
    """
    # It loads torch's compiler, for seconds.
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (heads[0].transpose(0, 1) for heads in (q, k, v))  # (T, heads, head_dim)
    y = varlen_attn(
        q,
        k,
        v,
        texts.ends,
        texts.ends,
        texts.longest,
        texts.longest,
        window_size=(-1, 0),  # all before it
        enable_gqa=k.shape[1] < q.shape[1],
    )
    assert isinstance(y, Tensor)  # it is a pair where more is asked for
    return y.transpose(0, 1)[None]


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Return x (B, heads, T, head_dim) with rotary position embedding.

    The layout is Hugging Face's: a pair is one dimension of a head's first half and the same one
    of its second half.
    """
    cos, sin = rope
    first, second = x.chunk(2, -1)
    crossed = torch.cat((second, first), -1)
    return x * cos + crossed * sin


class MLP(nn.Module):
    """The gated feed-forward network of a block (SwiGLU, Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # The weight of gate and up as one, in a copy for decoding.
        self.fused: Tensor | None = None
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states, (.., hidden) -> the same."""
        if self.fused is not None:
            gate, up = functional.linear(x, self.fused).chunk(2, -1)
        else:
            gate = self.gate_proj(x)
            up = self.up_proj(x)
        return self.down_proj(functional.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each with a norm before it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        cache: LayerCache | None = None,
        mask: Tensor | None = None,
        parts: Sequence[Part] | PackedTexts = (),
    ) -> Tensor:
        """Map hidden states, (B, T, hidden) -> the same; the others as in Attention."""
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, mask, parts)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """All that lies below the head; Hugging Face calls it `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Transformer(nn.Module):
    """Ids to hidden states. `logits` is apart, since most positions never need them.

    dtype: of activations. Weights that are trained stay float32 whatever it is: each layer casts
        them as it uses them, so that gradients, their sum over micro-batches and the optimizer are
        float32. Frozen weights are kept in it.
    lora: the adapter that is trained; None where all weights are.
    bits: of a weight in the blocks' matrices; 4 after `quantize`.
    recompute: keep each block's input alone, and compute the block again for its gradient.
    """

    lora: LoRAConfig | None
    inverse_frequencies: Tensor

    def __init__(self, config: ModelConfig, dtype: str = "float32") -> None:
        super().__init__()
        self.config = config
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.lora = None
        self.bits = 16
        self.recompute = False
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size)
        frequencies = torch.as_tensor(config.inverse_frequencies())
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def attends_to_texts_at_once(self) -> bool:
        """Whether there is a kernel that takes PackedTexts: FlashAttention's, in bfloat16."""
        if self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return False
        if self.config.head_dim % 8 or self.config.head_dim > 256:
            return False
        return torch.cuda.get_device_capability(self.device) >= (8, 0)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
        mask: Tensor | None = None,
        parts: Sequence[Part] | PackedTexts = (),
    ) -> Tensor:
        """Return the hidden states of ids, (B, T) -> (B, T, hidden).

        positions: (B, T), of each token in its text; None: its column.
        caches: one for each layer; mask, parts: all as in Attention.
        """
        x = self.model.embed_tokens(ids).to(self.dtype)
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rope = self._rope(positions, x.dtype)
        for i, layer in enumerate(self.model.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, None, mask, parts, use_reentrant=False)
            else:
                x = layer(x, rope, caches[i] if caches else None, mask, parts)
        return self.model.norm(x)

    def _rope(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        angles = positions[:, None, :, None].float() * self.inverse_frequencies
        cos = angles.cos().to(dtype)  # (1 or B, 1, T, head_dim / 2)
        sin = angles.sin().to(dtype)
        # Both halves of a head turn by the same angle.
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of hidden states, (.., hidden) -> (.., vocab), in float32."""
        return self.head.logits(x)

    @property
    def head(self) -> Embedding:
        """What maps hidden states to logits."""
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
