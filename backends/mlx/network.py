"""The network: Llama, Qwen2 and Qwen3, for training and for decoding with a KV cache.

The twins of PyTorch and MLX have the same files, classes and functions. Parameter names are
Hugging Face's, and whatever crosses to files outside `backends` is a list or a NumPy array. The
networks are our own, and not a library's, since they are what one comes to read.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn
from mlx.nn.utils import checkpoint

from backends.config import LoRAConfig, ModelConfig

# The periods of all pairs of dimensions, and the positions of all tokens, (B, T).
Rope = tuple[mx.array, mx.array]
# Stores the keys and values of one layer's new tokens, and returns those of all tokens so far.
LayerCache = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]


class Part(NamedTuple):
    """Columns of a packed row that see each other, and none of the others.

    mask: (1, 1, columns, columns) of bool, what a column sees; None: all before it.
    """

    start: int
    end: int
    mask: mx.array | None


class Linear(nn.Linear):
    """W x + b, in the type of x.

    An adapter adds scale * B A dropout(x) (LoRA, Hu et al. 2021, section 4.1). `quantize` leaves
    4 bits of W.
    """

    # A module of MLX is a dict of its arrays, and some of them come and go: "lora_A" (rank,
    # columns) and "lora_B" (rows, rank) of the adapter, "scales" and "biases" of W in 4 bits.
    scale: float
    dropout: float
    _dropout_key: mx.array  # the underscore keeps it out of the parameters

    def __call__(self, x: mx.array) -> mx.array:
        """Map vectors, (.., columns) -> (.., rows)."""
        if "scales" in self:
            y = mx.quantized_matmul(
                x,
                self.weight,
                self["scales"],
                self["biases"],
                transpose=True,
                group_size=64,
                bits=4,
            )
            if "bias" in self:
                y = y + self.bias.astype(x.dtype)
        elif "bias" in self:
            y = mx.addmm(self.bias.astype(x.dtype), x, self.weight.astype(x.dtype).T)
        else:
            y = x @ self.weight.astype(x.dtype).T
        if "lora_A" in self:
            if self.training and self.dropout:
                # The key is its own, so that a block that is computed again drops the same.
                kept = mx.random.bernoulli(1 - self.dropout, x.shape, self._dropout_key)
                x = x * kept / (1 - self.dropout)
            hidden = x @ self["lora_A"].astype(x.dtype).T
            y = y + self.scale * hidden @ self["lora_B"].astype(x.dtype).T
        return y

    # pyrefly: ignore[bad-override]
    def to_quantized(self, group_size: int, bits: int, mode: str = "affine") -> "Linear":
        """Keep W in few bits; mlx.nn.quantize calls this by name."""
        self.weight, self["scales"], self["biases"] = mx.quantize(self.weight, group_size, bits)
        return self


class Embedding(nn.Embedding):
    """Ids to vectors, and hidden states to logits.

    Under an adapter a few of its rows, those of `tokens`, are trained in place of the frozen ones.
    """

    rows: mx.array  # (tokens, columns)
    _tokens: mx.array  # ids
    _row_of_token: mx.array  # (vocab,): its row in `rows`, -1 for none

    def __call__(self, ids: mx.array) -> mx.array:
        """Look ids up, (..) -> (.., columns)."""
        x = self.weight[ids]
        if "rows" in self:
            row = self._row_of_token[ids]
            is_trained = row >= 0
            trained = self.rows[mx.maximum(row, 0)].astype(x.dtype)
            x = mx.where(is_trained[..., None], trained, x)
        return x

    def logits(self, x: mx.array) -> mx.array:
        """Return the logits of hidden states, (.., columns) -> (.., vocab), in float32."""
        y = (x @ self.weight.astype(x.dtype).T).astype(mx.float32)
        if "rows" in self:
            trained = (x @ self.rows.astype(x.dtype).T).astype(mx.float32)
            y = y.at[..., self._tokens].add(trained - y[..., self._tokens])
        return y

    def train_rows(self, tokens: list[int], rows: Any) -> None:
        """Train new rows in place of those of some tokens.

        tokens: ids.
        rows: array (tokens, columns), from which they begin.
        """
        self._tokens = mx.array(tokens)
        self.rows = mx.array(rows, mx.float32)
        self._row_of_token = mx.full(self.weight.shape[0], -1)
        self._row_of_token[self._tokens] = mx.arange(len(tokens))
        self.unfreeze(keys=["rows"], recurse=False)


class RMSNorm(nn.RMSNorm):
    """x over its root mean square, times a weight, in the type of x."""

    def __call__(self, x: mx.array) -> mx.array:
        """Normalize vectors, (.., columns) -> the same."""
        return mx.fast.rms_norm(x, self.weight.astype(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal attention in which groups of query heads share a key and value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Weight and bias of the three projections as one, in a copy for decoding.
        self._fused: tuple[mx.array, mx.array | None] | None = None
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

    def __call__(
        self,
        x: mx.array,
        rope: Rope,
        cache: LayerCache | None = None,
        mask: mx.array | None = None,
        parts: Sequence[Part] = (),
    ) -> mx.array:
        """Return what each position reads from those before it, (B, T, hidden) -> the same.

        cache: with it, keys and values of earlier passes are seen too.
        mask: (B, 1, T, keys), which keys a query sees; None: those up to its own position.
        parts: of a packed row, in order, which do not see each other.
        """
        rows, length, _ = x.shape
        queries_and_keys, v = self._project(x)
        # One call turns both, (B, heads, T, head_dim).
        turned = rotate(queries_and_keys.swapaxes(1, 2), rope)
        q, k = mx.split(turned, [self.config.num_attention_heads], 1)
        v = v.swapaxes(1, 2)
        if cache is not None:
            k, v = cache(k, v)  # (B, key and value heads, keys, head_dim)
        if parts:
            read = [
                _attend(q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], part_mask)
                for start, end, part_mask in parts
            ]
            y = mx.concatenate(read, 2)
        else:
            y = _attend(q, k, v, mask)
        y = y.swapaxes(1, 2).reshape(rows, length, -1)
        return self.o_proj(y)

    def _project(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Return queries and keys as heads side by side, and values, (B, T, heads, head_dim)."""
        heads = self.config.num_attention_heads
        key_heads = self.config.num_key_value_heads
        if self._fused is not None:
            weight, bias = self._fused
            all_heads = x @ weight.T
            if bias is not None:
                all_heads = all_heads + bias
            all_heads = all_heads.reshape(*x.shape[:2], heads + 2 * key_heads, -1)
            queries_and_keys, v = mx.split(all_heads, [heads + key_heads], 2)
            if not self.config.qk_norm:
                return queries_and_keys, v
            q, k = mx.split(queries_and_keys, [heads], 2)
        else:
            q = mx.unflatten(self.q_proj(x), -1, (heads, -1))
            k = mx.unflatten(self.k_proj(x), -1, (key_heads, -1))
            v = mx.unflatten(self.v_proj(x), -1, (key_heads, -1))
        if self.config.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        return mx.concatenate([q, k], 2), v


def _attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
    """Return scaled dot-product attention, by the layout that is fastest for grouped heads."""
    length, head_dim = q.shape[2:]
    visible: mx.array | str | None = mask
    if mask is None and length > 1:
        visible = "causal"
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5, mask=visible)


def rotate(x: mx.array, rope: Rope) -> mx.array:
    """Return x (B, heads, T, head_dim) with rotary position embedding.

    The layout is Hugging Face's: a pair is one dimension of a head's first half and the same one
    of its second half.
    """
    periods, positions = rope
    rows, heads, length, head_dim = x.shape
    # MLX's kernel takes one position a row: here each token is one.
    tokens = x.swapaxes(1, 2).reshape(rows * length, heads, 1, head_dim)
    turned = mx.fast.rope(
        tokens,
        head_dim,
        traditional=False,
        base=None,
        scale=1.0,
        offset=mx.broadcast_to(positions, (rows, length)).reshape(-1),
        freqs=periods,
    )
    return turned.reshape(rows, length, heads, head_dim).swapaxes(1, 2)


class MLP(nn.Module):
    """The gated feed-forward network of a block (SwiGLU, Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # The weight of gate and up as one, in a copy for decoding.
        self._fused: mx.array | None = None
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map hidden states, (.., hidden) -> the same."""
        if self._fused is not None:
            gate, up = mx.split(x @ self._fused.T, 2, -1)
        else:
            gate = self.gate_proj(x)
            up = self.up_proj(x)
        return self.down_proj(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each with a norm before it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(
        self,
        x: mx.array,
        rope: Rope,
        cache: LayerCache | None = None,
        mask: mx.array | None = None,
        parts: Sequence[Part] = (),
    ) -> mx.array:
        """Map hidden states, (B, T, hidden) -> the same; the others as in Attention."""
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, mask, parts)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """All that lies below the head; Hugging Face calls it `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
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

    def __init__(self, config: ModelConfig, dtype: str = "float32") -> None:
        super().__init__()
        self.config = config
        self.dtype: mx.Dtype = getattr(mx, dtype)
        self.lora = None
        self.bits = 16
        self.recompute = False
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size)
        # The underscore keeps it out of the parameters.
        self._periods = mx.array(1 / config.inverse_frequencies())
        # The layers drew initial weights that nobody will see. They are forgotten here, or the
        # chain of MLX's keys would grow with each copy.
        mx.random.seed(0)

    def __call__(
        self,
        ids: mx.array,
        positions: mx.array | None = None,
        caches: Sequence[LayerCache] | None = None,
        mask: mx.array | None = None,
        parts: Sequence[Part] = (),
    ) -> mx.array:
        """Return the hidden states of ids, (B, T) -> (B, T, hidden).

        positions: (B, T), of each token in its text; None: its column.
        caches: one for each layer; mask, parts: all as in Attention.
        """
        x = self.model.embed_tokens(ids).astype(self.dtype)
        if positions is None:
            positions = mx.arange(ids.shape[1])[None]
        rope = (self._periods, positions)
        for i, layer in enumerate(self.model.layers):
            if self.recompute and caches is None:

                def compute(x: mx.array, layer: Block = layer) -> mx.array:
                    return layer(x, rope, None, mask, parts)

                x = checkpoint(layer, compute)(x)
            else:
                x = layer(x, rope, caches[i] if caches else None, mask, parts)
        return self.model.norm(x)

    def logits(self, x: mx.array) -> mx.array:
        """Return the logits of hidden states, (.., hidden) -> (.., vocab), in float32."""
        return self.head.logits(x)

    @property
    def head(self) -> Embedding:
        """What maps hidden states to logits."""
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
