"""The network in MLX: Llama, Qwen2 and Qwen3, a KV cache that survives tool calls, log-probs, optimizer, train step.

Parameter names are Hugging Face's. Everything that crosses to other files is a list or a NumPy array.
"""
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.nn.utils import checkpoint
from mlx.utils import tree_flatten, tree_unflatten

from common import AT_ONCE, Problem, by_tokens, weight_files


# ---- network ------------------------------------------------------------------------------------------------------------
class Linear(nn.Linear):
    """W x + b in the type of x. An adapter adds scale B A dropout(x) (LoRA, Hu et al. 2021, section 4.1); `quantize` leaves 4 bits of W."""

    def __call__(self, x):
        if "scales" in self:
            y = mx.quantized_matmul(x, self.weight, self.scales, self.biases, transpose=True, group_size=64, bits=4)
            y = y + self.bias.astype(x.dtype) if "bias" in self else y
        elif "bias" in self:
            y = mx.addmm(self.bias.astype(x.dtype), x, self.weight.astype(x.dtype).T)
        else:
            y = x @ self.weight.astype(x.dtype).T
        if "lora_A" in self:
            if self.training and self.dropout:      # by a key of its own, so that a block that is computed again drops the same
                x = x * mx.random.bernoulli(1 - self.dropout, x.shape, self._key) / (1 - self.dropout)
            y = y + self.scale * (x @ self.lora_A.astype(x.dtype).T) @ self.lora_B.astype(x.dtype).T
        return y

    def to_quantized(self, group_size, bits, mode="affine"):
        self.weight, self.scales, self.biases = mx.quantize(self.weight, group_size, bits)
        return self


class Embedding(nn.Embedding):
    """Ids to vectors, and hidden states to logits.
    Under an adapter a few of its rows, those of `tokens`, are trained in place of the frozen ones."""

    def __call__(self, ids):
        x = self.weight[ids]
        if "rows" in self:
            slot = self._slot[ids]
            x = mx.where((slot >= 0)[..., None], self.rows[mx.maximum(slot, 0)].astype(x.dtype), x)
        return x

    def logits(self, x):
        y = (x @ self.weight.astype(x.dtype).T).astype(mx.float32)
        if "rows" in self:
            y = y.at[..., self._tokens].add((x @ self.rows.astype(x.dtype).T).astype(mx.float32) - y[..., self._tokens])
        return y

    def train_rows(self, tokens, rows):
        """tokens: ids; rows: array (tokens, columns)."""
        self._tokens, self.rows = mx.array(tokens), mx.array(rows, mx.float32)
        self._slot = mx.full(self.weight.shape[0], -1)                          # id -> its row, -1 for none
        self._slot[self._tokens] = mx.arange(len(tokens))
        self.unfreeze(keys=["rows"], recurse=False)


class RMSNorm(nn.RMSNorm):
    def __call__(self, x):
        return mx.fast.rms_norm(x, self.weight.astype(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, q, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, kv, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, kv, bias=c.qkv_bias)
        self.o_proj = Linear(q, c.hidden_size, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, eps=c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, eps=c.rms_norm_eps)

    def __call__(self, x, rope, cache=None, mask=None):
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, -1, self.c.head_dim)           # (B, T, heads, head_dim)
        k = self.k_proj(x).reshape(B, T, -1, self.c.head_dim)
        v = self.v_proj(x).reshape(B, T, -1, self.c.head_dim).swapaxes(1, 2)
        if self.c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = mx.split(rotate(mx.concatenate((q, k), 2).swapaxes(1, 2), rope), [self.c.num_attention_heads], 1)     # one call for both
        if cache is not None:
            k, v = cache(k, v)                                          # (B, kv heads, keys, head_dim)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.c.head_dim ** -0.5, mask="causal" if mask is None and T > 1 else mask)
        return self.o_proj(y.swapaxes(1, 2).reshape(B, T, -1))


def rotate(x, rope):
    """Rotary position embedding of x (B, heads, T, head_dim), Hugging Face's layout: the two halves of a head are the pairs."""
    periods, start = rope
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=start, freqs=periods)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def __call__(self, x):
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = MLP(c)

    def __call__(self, x, rope, cache=None, mask=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Ids to hidden states. `logits` is apart, since most positions of a trajectory never need them.

    Weights that are trained stay float32, whatever `dtype` says: it is the type of activations, to which each layer
    casts its weights as it uses them, so that gradients, their sum over micro-batches and the optimizer are float32.
    Frozen weights are kept in it.
    lora: rank, alpha, dropout, targets and tokens of the adapter that is trained, None for all weights. recompute: keep
    each block's input alone, and compute the block again for its gradient.
    """

    def __init__(self, config, dtype="float32"):
        super().__init__()
        self.config, self.dtype, self.lora, self.bits, self.recompute = config, getattr(mx, dtype), None, 16, False
        self.model = nn.Module()
        self.model.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.model.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size)
        self._periods = mx.array(1 / config.inv_freq())     # the underscore keeps it out of the parameters
        # layers drew initial weights that nobody will see;
        # forgotten here, or the chain of MLX's keys grows with each copy
        mx.random.seed(0)

    def __call__(self, ids, start=0, caches=None, mask=None):
        """ids (B, T), at positions start (one for all rows, or one a row) and on -> hidden states (B, T, hidden)."""
        rope = self._periods, start
        x = self.model.embed_tokens(ids).astype(self.dtype)
        for i, layer in enumerate(self.model.layers):
            if self.recompute and caches is None:
                x = checkpoint(layer, lambda x, layer=layer: layer(x, rope))(x)
            else:
                x = layer(x, rope, caches[i] if caches else None, mask)
        return self.model.norm(x)

    def logits(self, x):
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).logits(x)


def logprobs(model, ids, mask, temperature=1.0):
    """Log-probability of each token given those before it. ids, mask (B, T) -> (B, T), 0 where mask is 0.

    The head runs on masked positions only. Column t is the log-prob of ids[:, t]; column 0 is always 0.
    """
    x = model(ids[:, :-1])
    row, column = (mx.array(i) for i in np.nonzero(np.array(mask[:, 1:])))
    if not row.size:
        return mx.zeros(ids.shape) + 0 * x.sum()
    logits = model.logits(x[row, column]) / temperature                             # (masked, vocab)
    picked = -nn.losses.cross_entropy(logits, ids[row, column + 1])
    return mx.zeros(ids.shape).at[row, column + 1].add(picked)


def score(model, batch, temperature=1.0):
    """`logprobs` without gradient, NumPy in and out."""
    return np.array(logprobs(model, mx.array(batch["ids"]), mx.array(batch["mask"]), temperature))


# ---- decoding -----------------------------------------------------------------------------------------------------------
class Decoder:
    """Rows that grow at their own pace on one KV cache: `decode` until a stop, `keep` the live rows, `feed` observations.

    Row b holds length[b] tokens; a key is visible to a query at position p if its own position is <= p, so a row needs no
    left padding and what lies beyond its length is never seen. The cache grows in blocks as rows grow.
    """
    BLOCK = 64

    def __init__(self, model, prompts):
        self.model, c = compute_copy(model), model.config
        first = {}
        order = [first.setdefault(tuple(p), len(first)) for p in prompts]           # equal prompts are prefilled once
        self.length = np.zeros(len(first), dtype=np.int64)
        dtype = model.dtype
        shape = (len(first), c.num_key_value_heads, 0, c.head_dim)
        self.k = [mx.zeros(shape, dtype) for _ in range(c.num_hidden_layers)]
        self.v = [mx.zeros(shape, dtype) for _ in range(c.num_hidden_layers)]
        self.logits = mx.zeros((len(first), c.vocab_size))
        self.pending = [[] for _ in first]          # a sampled token enters the cache with what comes after it
        self.feed([list(p) for p in first])
        self.keep(order)

    def keep(self, rows):
        """Rows of the cache to go on with, in this order; a row may be named more than once."""
        if rows == list(range(len(self.length))):
            return
        index = mx.array(rows)
        self.length = self.length[rows]
        used = int(self.length.max())
        self.k, self.v = [k[index, :, :used] for k in self.k], [v[index, :, :used] for v in self.v]
        self.logits = self.logits[index]
        self.pending = [list(self.pending[r]) for r in rows]

    def feed(self, sequences):
        """Append ids to each row, one list a row (may be empty)."""
        sequences = [p + s for p, s in zip(self.pending, sequences)]
        self.pending = [[] for _ in sequences]
        counts = np.array([len(s) for s in sequences])
        fed = np.flatnonzero(counts)
        for group in by_tokens(counts[fed], AT_ONCE):           # more rows than that fall out of a CPU's cache
            rows = fed[group]
            ids = np.zeros((len(rows), counts[rows].max()), dtype=np.int64)
            for i, row in enumerate(rows):
                ids[i, :counts[row]] = sequences[row]
            x = self._forward(mx.array(ids), rows)                                  # (rows, T, hidden)
            self.logits[mx.array(rows)] = self.model.logits(x[mx.arange(len(rows)), mx.array(counts[rows] - 1)])
            mx.eval(self.k, self.v, self.logits)
        self.length += counts

    def _forward(self, ids, rows=None):
        """ids (B, T), behind what the rows hold. rows: which rows of the cache these are; None: all."""
        T, length = ids.shape[1], self.length if rows is None else self.length[rows]
        start = mx.array(length)
        keys = int(length.max()) + T
        if keys > self.k[0].shape[2]:
            more = -(-keys // self.BLOCK) * self.BLOCK - self.k[0].shape[2]
            mx.clear_cache()            # or MLX keeps the room of each former size, which no later one fits
            self.k, self.v = [[mx.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in cache] for cache in (self.k, self.v)]
        even = rows is None and (length == length[0]).all()                         # all rows end at one place: they need no mask
        if even:
            start = at = int(length[0])
            mask = which = None
        else:
            positions = start[:, None] + mx.arange(T)                               # (B, T)
            mask = (mx.arange(keys) <= positions[..., None])[:, None]               # (B, 1, T, keys)
            which, at = None if rows is None else mx.array(rows), positions[:, None, :, None]

        def write(i):
            def put_in(cache, new):
                if even:
                    cache[:, :, at:at + T] = new
                    return cache, cache[:, :, :keys]
                own = cache if rows is None else cache[which]
                own = mx.put_along_axis(own, mx.broadcast_to(at, new.shape), new, axis=2)
                if rows is None:
                    return own, own[:, :, :keys]
                cache[which] = own
                return cache, own[:, :, :keys]

            def cache(k, v):
                self.k[i], k = put_in(self.k[i], k)
                self.v[i], v = put_in(self.v[i], v)
                return k, v
            return cache
        return self.model(ids, start, [write(i) for i in range(len(self.k))], mask)

    def decode(self, stops, limits, temperature, rng=None, leave=0.0):
        """Sample each row until a stop id or its limit (0: the row waits). Returns (ids, logprobs), a list a row.

        It may return when no more than this share of the rows, `leave`, is still writing: they can go on with the next call.

        temperature: one for all rows, or a list, one a row; 0 is greedy, with log-probs at 1. rng draws one uniform a row and
        step, whatever the backend.
        """
        limits = np.asarray(limits)
        temperatures = mx.array(np.broadcast_to(temperature, len(limits)), mx.float32)[:, None]
        greedy, temperatures = temperatures[:, 0] == 0, mx.where(temperatures == 0, 1.0, temperatures)
        all_greedy = bool(greedy.all())
        running = limits > 0
        ids, logps, steps = [], [], int(limits.max())
        if not steps:
            return [[] for _ in limits], [[] for _ in limits]
        for step in range(steps):
            z = self.logits if all_greedy else self.logits / temperatures
            logp = z - mx.logsumexp(z, -1, keepdims=True)                           # (rows, vocab)
            token = logp.argmax(-1)
            if not all_greedy:
                u = mx.array(rng.random((len(limits), 1)), mx.float32)
                token = mx.where(greedy, token, draw(logp, u))
            picked = mx.take_along_axis(logp, token[:, None], 1)[:, 0]
            mx.async_eval(token, picked)
            # the next step is on its way before this one's tokens are read:
            if step + 1 < steps:
                x = self.model.logits(self._forward(token[:, None])[:, 0])          # stopped rows write beyond their length
                mx.async_eval(x)
            token = np.array(token).astype(np.int64)                                # uint32 has no -1
            ids.append(np.where(running, token, -1))
            logps.append(np.array(picked))
            running = running & ~np.isin(token, stops) & (step + 1 < limits)
            if running.sum() <= leave * len(limits):
                break
            self.logits = x if running.all() else mx.where(mx.array(running)[:, None], x, self.logits)
            self.length += running
        ids, logps = np.stack(ids, 1), np.stack(logps, 1)
        counts = (ids >= 0).sum(1)
        self.pending = [p + list(map(int, r[n - 1:n])) for p, r, n in zip(self.pending, ids, counts)]
        return [r[:n].tolist() for r, n in zip(ids, counts)], [r[:n].tolist() for r, n in zip(logps, counts)]


def draw(logp, u):
    """The id at which each row's cumulative probability passes u of its total. logp (rows, vocab), u (rows, 1) in [0, 1) -> (rows,)

    Summed in blocks of 1024, then inside one: summed one after the other in float32, 50,000 probabilities end up to
    1e-5 from 1, in each library elsewhere, so that twins with the same u part. Never an id of probability 0.
    """
    below = 1 - 2 ** -23                                                                # float32 may round u up to 1
    p = mx.pad(mx.exp(logp), ((0, 0), (0, -logp.shape[1] % 1024))).reshape(len(logp), -1, 1024)       # (rows, blocks, 1024)
    ends = p.sum(-1).cumsum(-1)                                                         # (rows, blocks)
    target = mx.minimum(u, below) * ends[:, -1:]
    block = (ends <= target).sum(-1, keepdims=True)                                     # (rows, 1)
    start = mx.take_along_axis(mx.pad(ends, ((0, 0), (1, 0))), block, 1)
    inside = mx.take_along_axis(p, block[..., None], 1)[:, 0].cumsum(-1)                # (rows, 1024)
    return block[:, 0] * 1024 + (inside <= mx.minimum(target - start, below * inside[:, -1:])).sum(-1)


# ---- training -----------------------------------------------------------------------------------------------------------
class Optimizer:
    """Muon for the matrices of the blocks, AdamW for the rest; or AdamW for all (muon=False, as for pretrained models).

    seed: of dropout. Muon (Jordan 2024): momentum, then five Newton-Schulz steps towards the nearest orthogonal matrix, scaled by
    sqrt(max(1, rows/columns)). Matrices of one shape go through the iteration together.
    """
    GROUP = 1 << 22         # weights that are changed at a time: what a step makes of them lies beside what was

    def __init__(self, model, muon=True, seed=0):
        params = trained(model)
        self.model, self.step_count, self.seed, self.update = model, 0, seed, mx.compile(new_state)
        self.matrices = [n for n, p in params.items() if muon and p.ndim == 2 and ".layers." in n]
        self.m = {n: mx.zeros_like(p) for n, p in params.items()}
        self.v = {n: mx.zeros_like(p) for n, p in params.items() if n not in self.matrices}
        self.groups, last = [], {}
        for n, p in params.items():
            kind = p.shape if n in self.matrices else "AdamW"
            if kind not in last or sum(params[other].size for other in last[kind]) + p.size > self.GROUP:
                last[kind] = []
                self.groups.append(last[kind])
            last[kind].append(n)

    def state(self):
        """-> {name: array}: the step count and both moments, as either twin reads them."""
        return {"step": np.array([self.step_count])} | {f"{k}.{n}": np.array(x) for k in "mv" for n, x in getattr(self, k).items()}

    def load_state(self, state):
        """What `state` gave. Raises KeyError for an entry that one of the two lacks, or that has another shape."""
        own = {f"{k}.{n}": tuple(x.shape) for k in "mv" for n, x in getattr(self, k).items()}
        if odd := sorted(n for n in own.keys() | (state.keys() - {"step"})
                         if n not in own or n not in state or tuple(state[n].shape) != own[n]):
            raise KeyError(odd[0])
        self.step_count = int(state["step"][0])
        self.m, self.v = ({n: mx.array(state[f"{k}.{n}"]) for n in getattr(self, k)} for k in "mv")

    def step(self, grads, lr, muon_lr, momentum=0.95, beta1=0.9, beta2=0.98, eps=1e-8):
        self.step_count += 1
        # arrays: a number would be compiled in
        settings = [mx.array(float(x)) for x in (lr, muon_lr, momentum, beta1, beta2, eps, self.step_count)]
        params = trained(self.model)
        for names in self.groups:       # gradients are popped, so that those of a group are gone before the next
            old = [[state.pop(n) for n in names if n in state] for state in (params, self.m, self.v, grads)]
            new, m, v = self.update(*old, *settings)
            mx.eval(new, m, v)
            self.model.update(tree_unflatten(list(zip(names, new))))
            self.m.update(zip(names, m))
            self.v.update(zip(names, v))


def new_state(params, m, v, grads, lr, muon_lr, momentum, beta1, beta2, eps, step):
    """What a step makes of a group's parameters and moments, lists (v empty: Muon):
    a function without effects, so that it can be compiled."""
    if not v:
        m = [momentum * a + (1 - momentum) * g for a, g in zip(m, grads)]
        update = orthogonalize(mx.stack([(1 - momentum) * g + momentum * a for a, g in zip(m, grads)]))
        rows, columns = params[0].shape
        scale = muon_lr * max(1, rows / columns) ** 0.5
        return [p - scale * u for p, u in zip(params, update)], m, v
    m = [beta1 * a + (1 - beta1) * g for a, g in zip(m, grads)]
    v = [beta2 * b + (1 - beta2) * g.square() for b, g in zip(v, grads)]
    fix1, fix2 = 1 - beta1 ** step, 1 - beta2 ** step
    return [p - lr * a / fix1 / (mx.sqrt(b / fix2) + eps) for p, a, b in zip(params, m, v)], m, v


def orthogonalize(x):
    """Newton-Schulz on a stack of matrices (n, rows, columns), Muon's quintic coefficients."""
    tall = x.shape[1] > x.shape[2]
    x = x.swapaxes(1, 2) if tall else x
    x = x / (mx.sqrt(x.square().sum((1, 2), keepdims=True)) + 1e-7)      # not in bfloat16: most CPUs multiply that ten times slower
    for _ in range(5):
        a = x @ x.swapaxes(1, 2)
        x = mx.addmm(x, mx.addmm(a, a, a, alpha=2.0315, beta=-4.7750), x, beta=3.4445)
    return x.swapaxes(1, 2) if tall else x


def train_step(model, optimizer, loss_fn, batches, lr, muon_lr, temperature=1.0, max_norm=1.0):
    """One optimizer step over micro-batches (dicts of NumPy arrays, see autocoa's losses). -> {"loss", "grad_norm"}.

    Where loss or gradient is not finite, nothing is changed and the caller sees it in the figures.
    """
    def loss(b):
        return loss_fn(mx, logprobs(model, b["ids"], b["mask"], temperature), b)
    total, grads = 0.0, None
    model.train()
    for i, batch in enumerate(batches):
        if model.lora and model.lora.dropout:
            for j, m in enumerate(linears(model).values()):
                m._key = mx.random.key((((optimizer.seed * 10 ** 6 + optimizer.step_count) * 1000 + i) * 1000 + j) % 2 ** 63)
        value, new = nn.value_and_grad(model, loss)({k: mx.array(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()})
        new = dict(tree_flatten(new))
        grads = new if grads is None else {k: grads[k] + g for k, g in new.items()}
        del new                 # or this micro-batch's own are kept beside the sum
        mx.eval(value, grads)
        total += value.item()
    model.eval()
    norm = mx.sqrt(sum(g.square().sum() for g in grads.values())).item()
    if math.isfinite(total) and math.isfinite(norm):
        grads = {k: g * min(1.0, max_norm / (norm + 1e-6)) for k, g in grads.items()}      # clipped when a group of them is used
        optimizer.step(grads, lr, muon_lr)
    mx.clear_cache()            # buffers of shapes that the next micro-batches will not have
    return {"loss": total, "grad_norm": norm}


# ---- in and out ---------------------------------------------------------------------------------------------------------
def pick_device(name):
    """MLX picks the Apple GPU by itself where there is one; "cpu" is the other choice. Raises Problem for what is not there."""
    if name not in ("auto", "cpu"):
        raise Problem(f"--device: {name!r} is not one of auto, cpu, the choices of MLX; or take --backend=torch")
    mx.set_default_device(mx.gpu if name == "auto" and mx.is_available(mx.gpu) else mx.cpu)
    return name


def build(config, device="cpu", dtype="float32", frozen=False):
    """The network of a config, its weights still to be put; in dtype where they are to be frozen, so that they are never held in more."""
    network = Transformer(config, dtype).eval()
    if frozen:
        network.apply(lambda p: p.astype(network.dtype))
    return network


def workspace(model):
    """Bytes that the library of matrix products takes for itself
    (cuBLAS: 32 MiB on compute capability 9, else 8.1; by its documentation)."""
    return 0


def shapes(model):
    return {name: tuple(p.shape) for name, p in parameters(model).items()}


def parameters(model):
    return dict(tree_flatten(model.parameters()))


def load_weights(model, folder):
    """model.safetensors (or its shards) of a Hugging Face folder into the network. Raises Problem by parameter name."""
    put(model, read_weights(folder), folder)
    return model


def read_weights(folder):
    """-> {name: tensor}, in the folder's own precision. Raises Problem for a shard that is missing or cut short."""
    state = {}
    for f in weight_files(folder):
        try:
            state |= mx.load(str(f))
        except Exception as e:          # each library has its own
            raise Problem(f"model: {f} can't be read: {str(e).splitlines()[0]}; copy it again") from None
    return state


def to_array(x):
    """MLX's own as it is (`mx.array` would copy it, and a checkpoint would be there twice), another's as MLX's."""
    return x if isinstance(x, mx.array) else mx.array(x)


def to_numpy(x):
    """A tensor, or an array, as a float32 array."""
    return np.array(to_array(x).astype(mx.float32))


def with_rows(x, more, rows):
    """A matrix in its own precision, with the rows of `more` (NumPy) behind it, and `rows` {index: NumPy} in place of what was there."""
    x = to_array(x)
    x = mx.concatenate([x, mx.array(more).astype(x.dtype)])
    for i, row in rows.items():
        x[i] = mx.array(row)
    return x


def put(model, state, where):
    """Tensors or NumPy arrays into the network, by name.
    Raises Problem with the parameter that is missing, not known, packed or of another shape."""
    own = parameters(model)
    if model.config.tie_word_embeddings:
        state = {k: v for k, v in state.items() if k != "lm_head.weight"}
    state = {k: v for k, v in state.items() if not k.endswith("rotary_emb.inv_freq")}
    odd = sorted(set(own) ^ set(state))
    if odd:
        raise Problem(f"model: {where}: parameter {odd[0]} is {'missing' if odd[0] in own else 'not one of this architecture'}")
    for name, p in own.items():
        if str(state[name].dtype).rpartition(".")[2] not in ("float16", "bfloat16", "float32", "float64"):
            raise Problem(f"model: {where}: {name} holds {state[name].dtype}, packed weights that config.json says nothing of; "
                          "take the checkpoint they were made of, and --bits=4")
        if p.shape != tuple(state[name].shape):
            raise Problem(f"model: {where}: {name} has shape {tuple(state[name].shape)}, config.json says {p.shape}")
    model.update(tree_unflatten([(k, to_array(v).astype(own[k].dtype)) for k, v in state.items()]))
    mx.eval(model.parameters())


def save_weights(model, folder):
    mx.save_safetensors(str(Path(folder) / "model.safetensors"), parameters(model), metadata={"format": "pt"})


def copy(model):
    """A network of its own; frozen weights are shared."""
    twin = Transformer(model.config)
    for a, b in zip(model.modules(), twin.modules()):
        dict.update(b, {k: v for k, v in a.items() if isinstance(v, mx.array)})
        vars(b).update({k: set(v) if isinstance(v, set) else v for k, v in vars(a).items()})
    return twin


def compute_copy(model):
    """The network with all weights in its compute type: itself where they are."""
    if all(p.dtype in (model.dtype, mx.uint32) for p in parameters(model).values()):
        return model
    twin = copy(model)
    twin.apply(lambda p: p if p.dtype == mx.uint32 else p.astype(model.dtype))
    return twin


# ---- adapters -----------------------------------------------------------------------------------------------------------
def trained(model):
    """{name: parameter} of what training changes."""
    return dict(tree_flatten(model.trainable_parameters()))


def linears(model):
    """{name: Linear} of the blocks."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear) and ".layers." in n}


def embeddings(model):
    """{name: Embedding} of the tokens, and of the head where it has its own."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Embedding)}


def arrays(model, names):
    """-> {name: float32 array} of these parameters."""
    own = parameters(model)
    return {n: to_numpy(own[n]) for n in names}


def quantize(model, bits=4):
    """Keep 4 bits of each block's matrices (affine, groups of 64). Raises Problem where rows can't be cut into groups."""
    model.bits = bits
    for name, m in linears(model).items():
        if m.weight.shape[1] % 64:
            raise Problem(f"--bits=4: rows of {name} have {m.weight.shape[1]} weights, MLX wants a multiple of 64; take --bits=16")
        m.weight = m.weight.astype(model.dtype)
    nn.quantize(model, 64, bits, class_predicate=lambda name, m: isinstance(m, Linear) and ".layers." in name)
    mx.eval(model.parameters())


def adapt(model, lora, state):
    """Freeze the network and give it an adapter. lora: rank, alpha, dropout, targets, tokens;
    state: {name: array} of lora_A (rank, in), lora_B (out, rank) and the embeddings' rows (tokens, hidden)."""
    model.lora = lora
    model.apply(lambda p: p if p.dtype == mx.uint32 else p.astype(model.dtype))
    model.freeze()
    for name, m in linears(model).items():
        if name.split(".")[-1] in lora.targets:
            m.scale, m.dropout = lora.alpha / lora.rank, lora.dropout
            m.lora_A, m.lora_B = (mx.array(state[f"{name}.{x}"], mx.float32) for x in ("lora_A", "lora_B"))
            m.unfreeze(keys=["lora_A", "lora_B"], recurse=False)
    for name, m in embeddings(model).items():
        m.train_rows(lora.tokens, state[f"{name}.rows"])
    mx.eval(model.parameters())


def merge(model):
    """The adapter into the weights, which are float32 and trained again."""
    for m in linears(model).values():
        if "scales" in m:
            m.weight = mx.dequantize(m.weight, m.pop("scales"), m.pop("biases"), 64, 4)
        if "lora_A" in m:
            m.weight = m.weight.astype(mx.float32) + m.scale * m.pop("lora_B") @ m.pop("lora_A")
    for m in embeddings(model).values():
        if "rows" in m:
            m.weight = m.weight.astype(mx.float32)
            m.weight[m._tokens] = m.pop("rows")
    model.apply(lambda p: p.astype(mx.float32))
    model.unfreeze()
    model.lora, model.bits = None, 16
    mx.eval(model.parameters())
