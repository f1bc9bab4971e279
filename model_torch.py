"""The network in PyTorch: Llama, Qwen2 and Qwen3, a KV cache that survives tool calls, log-probs, optimizer, train step.

Parameter names are Hugging Face's. Everything that crosses to other files is a list or a NumPy array.
"""
import math
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import AT_ONCE, Problem, by_tokens, weight_files


# ---- network ------------------------------------------------------------------------------------------------------------
class Linear(nn.Linear):
    """W x + b in the type of x. An adapter adds scale B A dropout(x) (LoRA, Hu et al. 2021, section 4.1); `quantize` leaves 4 bits of W."""

    def __init__(self, columns, rows, bias):
        super().__init__(columns, rows, bias)
        self.lora_A = self.lora_B = self.packed = None

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.packed is None:
            y = F.linear(x, self.weight.to(x.dtype), bias)
        else:
            import bitsandbytes
            y = bitsandbytes.matmul_4bit(x, self.packed.t(), quant_state=self.quant_state, bias=bias)
        if self.lora_A is not None:
            x = F.dropout(x, self.dropout, self.training)
            y = y + self.scale * F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return y


class Embedding(nn.Embedding):
    """Ids to vectors, and hidden states to logits.
    Under an adapter a few of its rows, those of `tokens`, are trained in place of the frozen ones."""

    def __init__(self, vocab, columns):
        # drawing what is replaced anyway would load torch's compiler, for seconds
        super().__init__(vocab, columns, _weight=torch.empty(vocab, columns))
        self.rows = self.tokens = None

    def forward(self, ids):
        x = super().forward(ids)
        if self.rows is not None:
            slot = self.slot[ids]
            x = torch.where((slot >= 0)[..., None], self.rows[slot].to(x.dtype), x)
        return x

    def logits(self, x):
        y = F.linear(x, self.weight.to(x.dtype)).float()
        return y if self.rows is None else y.index_copy(-1, self.tokens, F.linear(x, self.rows.to(x.dtype)).float())

    def train_rows(self, tokens, rows):
        """tokens: ids; rows: array (tokens, columns)."""
        device = self.weight.device
        self.tokens, self.rows = torch.tensor(tokens, device=device), nn.Parameter(torch.tensor(rows, dtype=torch.float32, device=device))
        self.slot = torch.full((self.num_embeddings,), -1, device=device)       # id -> its row, -1 for none
        self.slot[self.tokens] = torch.arange(len(tokens), device=device)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


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

    def forward(self, x, rope, cache=None, mask=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.c.head_dim)              # (B, T, heads, head_dim)
        k = self.k_proj(x).view(B, T, -1, self.c.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.c.head_dim).transpose(1, 2)
        if self.c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q.transpose(1, 2), rope), rotate(k.transpose(1, 2), rope)
        if cache is not None:
            k, v = cache(k, v)                                          # (B, kv heads, keys, head_dim)
        heads, kv = self.c.num_attention_heads, self.c.num_key_value_heads
        if mask is not None and kv < heads:     # the query heads of one key head become rows of one query: its keys are read once
            y = F.scaled_dot_product_attention(q.reshape(B, kv, -1, self.c.head_dim), k, v,
                                               attn_mask=mask.repeat(1, 1, heads // kv, 1)).reshape(q.shape)
        else:
            # CUDA's frugal kernel for float32 takes no groups, and the one that does keeps T x T numbers
            if kv < heads and x.is_cuda and x.dtype == torch.float32:
                k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=k.shape[1] < heads)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def rotate(x, rope):
    """Rotary position embedding of x (B, heads, T, head_dim), Hugging Face's layout: the two halves of a head are the pairs."""
    (cos, sin), (a, b) = rope, x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rope, cache=None, mask=None):
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
        self.config, self.dtype, self.lora, self.bits, self.recompute = config, getattr(torch, dtype), None, 16, False
        self.model = nn.Module()
        self.model.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size)
        self.register_buffer("inv_freq", torch.as_tensor(config.inv_freq()), persistent=False)

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    def forward(self, ids, start=0, caches=None, mask=None):
        """ids (B, T), at positions start (one for all rows, or one a row) and on -> hidden states (B, T, hidden)."""
        positions = torch.as_tensor(start, device=ids.device).reshape(-1, 1) + torch.arange(ids.shape[1], device=ids.device)
        angle = (positions[..., None].float() * self.inv_freq).repeat(1, 1, 2)[:, None]       # (1 or B, 1, T, head_dim)
        x = self.model.embed_tokens(ids).to(self.dtype)
        rope = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for i, layer in enumerate(self.model.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, use_reentrant=False)
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
    want = mask[:, 1:] > 0
    logits = model.logits(x[want]) / temperature                                    # (masked, vocab)
    picked = -F.cross_entropy(logits, ids[:, 1:][want], reduction="none")
    out = torch.zeros(ids.shape, device=ids.device)
    out[:, 1:][want] = picked
    return out


def score(model, batch, temperature=1.0):
    """`logprobs` without gradient, NumPy in and out."""
    with torch.no_grad():
        ids, mask = (torch.as_tensor(batch[k], device=model.device) for k in ("ids", "mask"))
        return logprobs(model, ids, mask, temperature).cpu().numpy()


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
        self.k = [torch.zeros(shape, device=model.device, dtype=dtype) for _ in range(c.num_hidden_layers)]
        self.v = [torch.zeros(shape, device=model.device, dtype=dtype) for _ in range(c.num_hidden_layers)]
        self.logits = torch.zeros(len(first), c.vocab_size, device=model.device)
        self.pending = [[] for _ in first]          # a sampled token enters the cache with what comes after it
        self.feed([list(p) for p in first])
        self.keep(order)

    def keep(self, rows):
        """Rows of the cache to go on with, in this order; a row may be named more than once."""
        if rows == list(range(len(self.length))):
            return
        index = torch.as_tensor(rows, device=self.model.device)
        self.length = self.length[rows]
        used = int(self.length.max())
        for cache in (self.k, self.v):
            for i, x in enumerate(cache):           # layer by layer, or there were two caches for a moment
                cache[i] = x[index, :, :used]
        self.logits = self.logits[index]
        self.pending = [list(self.pending[r]) for r in rows]

    @torch.no_grad()
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
            x = self._forward(torch.as_tensor(ids, device=self.model.device), rows)                # (rows, T, hidden)
            self.logits[rows] = self.model.logits(x[np.arange(len(rows)), counts[rows] - 1])
        self.length += counts

    def _forward(self, ids, rows=None):
        """ids (B, T), behind what the rows hold. rows: which rows of the cache these are; None: all."""
        T, length = ids.shape[1], self.length if rows is None else self.length[rows]
        start = torch.as_tensor(length, device=ids.device)
        keys = int(length.max()) + T
        if keys > self.k[0].shape[2]:
            more = -(-keys // self.BLOCK) * self.BLOCK - self.k[0].shape[2]
            for cache in (self.k, self.v):
                for i, x in enumerate(cache):
                    cache[i] = F.pad(x, (0, 0, 0, more))
        positions = start[:, None] + torch.arange(T, device=ids.device)             # (B, T)
        future = torch.arange(keys, device=ids.device) > positions[..., None]       # (B, T, keys)
        mask = torch.zeros(future.shape, device=ids.device, dtype=self.k[0].dtype).masked_fill_(future, -torch.inf)[:, None]
        which = torch.as_tensor(np.arange(len(length)) if rows is None else rows, device=ids.device)

        def write(i):
            def cache(k, v):
                self.k[i][which[:, None], :, positions] = k.transpose(1, 2)
                self.v[i][which[:, None], :, positions] = v.transpose(1, 2)
                return [x[:, :, :keys] if rows is None else x[which, :, :keys] for x in (self.k[i], self.v[i])]
            return cache
        return self.model(ids, start, [write(i) for i in range(len(self.k))], mask)

    @torch.no_grad()
    def decode(self, stops, limits, temperature, rng=None, leave=0.0):
        """Sample each row until a stop id or its limit (0: the row waits). Returns (ids, logprobs), a list a row.

        It may return when no more than this share of the rows, `leave`, is still writing: they can go on with the next call.

        temperature: one for all rows, or a list, one a row; 0 is greedy, with log-probs at 1. rng draws one uniform a row and
        step, whatever the backend.
        """
        device, limits = self.model.device, np.asarray(limits)
        temperatures = torch.as_tensor(np.broadcast_to(temperature, len(limits)).copy(), device=device, dtype=torch.float32)[:, None]
        greedy, temperatures = temperatures[:, 0] == 0, torch.where(temperatures == 0, 1.0, temperatures)
        stop = torch.as_tensor(stops, device=device)
        left = torch.as_tensor(limits, device=device)
        running = left > 0
        ids, logps, steps = [], [], int(limits.max())
        if not steps:
            return [[] for _ in limits], [[] for _ in limits]
        for step in range(steps):
            logp = (self.logits / temperatures).log_softmax(-1)                           # (rows, vocab)
            token = logp.argmax(-1)
            if not greedy.all():
                u = torch.as_tensor(rng.random((len(limits), 1)), device=device, dtype=torch.float32)
                token = torch.where(greedy, token, draw(logp, u))
            ids.append(torch.where(running, token, -1))
            logps.append(logp.gather(1, token[:, None])[:, 0])
            running = running & ~torch.isin(token, stop) & (step + 1 < left)
            if running.sum() <= leave * len(limits):
                break
            x = self._forward(token[:, None])                                       # stopped rows write beyond their length
            self.logits = torch.where(running[:, None], self.model.logits(x[:, 0]), self.logits)
            self.length += running.cpu().numpy()
        ids, logps = torch.stack(ids, 1).cpu().numpy(), torch.stack(logps, 1).cpu().numpy()
        counts = (ids >= 0).sum(1)
        self.pending = [p + list(map(int, r[n - 1:n])) for p, r, n in zip(self.pending, ids, counts)]
        return [r[:n].tolist() for r, n in zip(ids, counts)], [r[:n].tolist() for r, n in zip(logps, counts)]


def draw(logp, u):
    """The id at which each row's cumulative probability passes u of its total. logp (rows, vocab), u (rows, 1) in [0, 1) -> (rows,)

    Summed in blocks of 1024, then inside one: summed one after the other in float32, 50,000 probabilities end up to
    1e-5 from 1, in each library elsewhere, so that twins with the same u part. Never an id of probability 0.
    """
    below = 1 - 2 ** -23                                                                # float32 may round u up to 1
    p = nn.functional.pad(logp.exp(), (0, -logp.shape[1] % 1024)).unflatten(1, (-1, 1024))            # (rows, blocks, 1024)
    ends = p.sum(-1).cumsum(-1)                                                         # (rows, blocks)
    target = u.clamp(max=below) * ends[:, -1:]
    block = (ends <= target).sum(-1, keepdim=True)                                      # (rows, 1)
    start = nn.functional.pad(ends, (1, 0)).gather(1, block)
    inside = p.take_along_dim(block[..., None], 1)[:, 0].cumsum(-1)                     # (rows, 1024)
    return block[:, 0] * 1024 + (inside <= torch.minimum(target - start, below * inside[:, -1:])).sum(-1)


# ---- training -----------------------------------------------------------------------------------------------------------
class Optimizer:
    """Muon for the matrices of the blocks, AdamW for the rest; or AdamW for all (muon=False, as for pretrained models).

    seed: of dropout. Muon (Jordan 2024): momentum, then five Newton-Schulz steps towards the nearest orthogonal matrix, scaled by
    sqrt(max(1, rows/columns)). Matrices of one shape go through the iteration together.
    """

    def __init__(self, model, muon=True, seed=0):
        params = trained(model)
        self.model, self.step_count, self.seed = model, 0, seed
        self.matrices = [n for n, p in params.items() if muon and p.dim() == 2 and ".layers." in n]
        self.m = {n: torch.zeros_like(p) for n, p in params.items()}
        self.v = {n: torch.zeros_like(p) for n, p in params.items() if n not in self.matrices}

    def state(self):
        """-> {name: array}: the step count and both moments, as either twin reads them."""
        return {"step": np.array([self.step_count])} | {f"{k}.{n}": x.cpu().numpy() for k in "mv" for n, x in getattr(self, k).items()}

    def load_state(self, state):
        """What `state` gave. Raises KeyError for an entry that one of the two lacks, or that has another shape."""
        own = {f"{k}.{n}": tuple(x.shape) for k in "mv" for n, x in getattr(self, k).items()}
        if odd := sorted(n for n in own.keys() | (state.keys() - {"step"})
                         if n not in own or n not in state or tuple(state[n].shape) != own[n]):
            raise KeyError(odd[0])
        self.step_count = int(state["step"][0])
        self.m, self.v = ({n: torch.tensor(state[f"{k}.{n}"], device=x.device) for n, x in getattr(self, k).items()} for k in "mv")

    @torch.no_grad()
    def step(self, grads, lr, muon_lr, momentum=0.95, beta1=0.9, beta2=0.98, eps=1e-8):
        self.step_count += 1
        params, shapes = trained(self.model), {}
        for name in self.matrices:
            m = self.m[name].lerp_(grads[name], 1 - momentum)
            shapes.setdefault(m.shape, []).append((name, grads[name].lerp(m, momentum)))
        for shape, group in shapes.items():
            update = orthogonalize(torch.stack([u for _, u in group]))
            scale = muon_lr * max(1, shape[0] / shape[1]) ** 0.5
            for (name, _), u in zip(group, update):
                params[name].sub_(u, alpha=scale)
        for name, v in self.v.items():
            m = self.m[name].lerp_(grads[name], 1 - beta1)
            v.mul_(beta2).addcmul_(grads[name], grads[name], value=1 - beta2)
            fix1, fix2 = 1 - beta1 ** self.step_count, 1 - beta2 ** self.step_count
            params[name].addcdiv_(m, (v / fix2).sqrt_().add_(eps), value=-lr / fix1)


def orthogonalize(x):
    """Newton-Schulz on a stack of matrices (n, rows, columns), Muon's quintic coefficients."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)       # not in bfloat16: most CPUs multiply that ten times slower
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def train_step(model, optimizer, loss_fn, batches, lr, muon_lr, temperature=1.0, max_norm=1.0):
    """One optimizer step over micro-batches (dicts of NumPy arrays, see autocoa's losses). -> {"loss", "grad_norm"}.

    Where loss or gradient is not finite, nothing is changed and the caller sees it in the figures.
    """
    model.zero_grad(set_to_none=True)
    model.train()
    if model.lora and model.lora.dropout:
        torch.manual_seed(optimizer.seed * 10 ** 6 + optimizer.step_count)
    total = 0.0
    for batch in batches:
        b = {k: torch.as_tensor(v, device=model.device) if isinstance(v, np.ndarray) else v for k, v in batch.items()}
        loss = loss_fn(torch, logprobs(model, b["ids"], b["mask"], temperature), b)
        loss.backward()
        total += loss.item()
    model.eval()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    if math.isfinite(total) and math.isfinite(norm):
        optimizer.step({n: p.grad for n, p in trained(model).items()}, lr, muon_lr)
    return {"loss": total, "grad_norm": norm}


# ---- in and out ---------------------------------------------------------------------------------------------------------
def pick_device(name):
    """"auto" takes CUDA where there is one, else the CPU. Raises Problem for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda", "mps"):
        raise Problem(f"--device: {name!r} is not one of auto, cpu, cuda, mps")
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise Problem(f"--device={name}: there is none here; use --device=cpu")
    return name


def build(config, device="cpu", dtype="float32", frozen=False):
    """The network of a config, its weights still to be put; in dtype where they are to be frozen, so that they are never held in more."""
    with torch.device("meta"):
        network = Transformer(config, dtype)
    network = (network.to(network.dtype) if frozen else network).to_empty(device=device)
    network.inv_freq = torch.as_tensor(config.inv_freq(), device=device)
    return network.eval()


def workspace(model):
    """Bytes that the library of matrix products takes for itself
    (cuBLAS: 32 MiB on compute capability 9, else 8.1; by its documentation)."""
    return (32 << 20 if torch.cuda.get_device_capability()[0] == 9 else 8_519_680) if model.device.type == "cuda" else 0


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def load_weights(model, folder):
    """model.safetensors (or its shards) of a Hugging Face folder into the network. Raises Problem by parameter name."""
    put(model, read_weights(folder), folder)
    return model


def read_weights(folder):
    """-> {name: tensor}, in the folder's own precision. Raises Problem for a shard that is missing or cut short."""
    state = {}
    for f in weight_files(folder):
        try:
            state |= load_file(f)
        except Exception as e:          # each library has its own
            raise Problem(f"model: {f} can't be read: {str(e).splitlines()[0]}; copy it again") from None
    return state


def to_numpy(x):
    """A tensor, or an array, as a float32 array."""
    return torch.as_tensor(x).detach().float().cpu().numpy()


def with_rows(x, more, rows):
    """A matrix in its own precision, with the rows of `more` (NumPy) behind it, and `rows` {index: NumPy} in place of what was there."""
    x = torch.as_tensor(x)
    x = torch.cat([x, torch.as_tensor(more).to(x)])
    for i, row in rows.items():
        x[i] = torch.as_tensor(row)
    return x


def put(model, state, where):
    """Tensors or NumPy arrays into the network, by name.
    Raises Problem with the parameter that is missing, not known, packed or of another shape."""
    own = dict(model.named_parameters())
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
        if p.shape != state[name].shape:
            raise Problem(f"model: {where}: {name} has shape {tuple(state[name].shape)}, config.json says {tuple(p.shape)}")
        p.data.copy_(torch.as_tensor(state[name]))


def save_weights(model, folder):
    save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, Path(folder) / "model.safetensors",
              metadata={"format": "pt"})


def copy(model):
    """A network of its own; frozen weights are shared."""
    shared = ([p for p in model.parameters() if not p.requires_grad]
              + [x for m in linears(model).values() if m.packed is not None for x in (m.packed, m.quant_state)])
    return deepcopy(model, {id(x): x for x in shared})


def compute_copy(model):
    """The network with all weights in its compute type: itself where they are."""
    if all(p.dtype == model.dtype for p in model.parameters()):
        return model
    packed = [x for m in linears(model).values() if m.packed is not None for x in (m.packed, m.quant_state)]
    # one by one: never all in four bytes again
    cast = {id(p): p if p.dtype == model.dtype else nn.Parameter(p.data.to(model.dtype), requires_grad=False)
            for p in model.parameters()}
    return deepcopy(model, {id(x): x for x in packed} | cast)


# ---- adapters -----------------------------------------------------------------------------------------------------------
def trained(model):
    """{name: parameter} of what training changes."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def linears(model):
    """{name: Linear} of the blocks."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear) and ".layers." in n}


def embeddings(model):
    """{name: Embedding} of the tokens, and of the head where it has its own."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Embedding)}


def arrays(model, names):
    """-> {name: float32 array} of these parameters."""
    own = dict(model.named_parameters())
    return {n: to_numpy(own[n]) for n in names}


def quantize(model, bits=4):
    """Keep 4 bits of each block's matrices (NF4, blocks of 64; QLoRA, Dettmers et al. 2023), by bitsandbytes.
    Raises Problem where that is not installed."""
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        raise Problem("--bits=4: with torch it needs bitsandbytes; pip install bitsandbytes") from None
    model.bits = bits
    for m in linears(model).values():
        m.packed, m.quant_state = quantize_4bit(m.weight.data.to(model.dtype), quant_type="nf4", blocksize=64)
        m.weight = None


def adapt(model, lora, state):
    """Freeze the network and give it an adapter. lora: rank, alpha, dropout, targets, tokens;
    state: {name: array} of lora_A (rank, in), lora_B (out, rank) and the embeddings' rows (tokens, hidden)."""
    model.lora = lora
    for p in model.parameters():
        p.requires_grad_(False)
        p.data = p.data.to(model.dtype)
    for name, m in linears(model).items():
        if name.split(".")[-1] in lora.targets:
            m.scale, m.dropout = lora.alpha / lora.rank, lora.dropout
            m.lora_A, m.lora_B = (nn.Parameter(torch.tensor(state[f"{name}.{x}"], dtype=torch.float32, device=model.device))
                                  for x in ("lora_A", "lora_B"))
    for name, m in embeddings(model).items():
        m.train_rows(lora.tokens, state[f"{name}.rows"])


def merge(model):
    """The adapter into the weights, which are float32 and trained again."""
    for m in linears(model).values():
        weight = m.weight
        if m.packed is not None:
            from bitsandbytes.functional import dequantize_4bit
            weight = dequantize_4bit(m.packed, m.quant_state)
            m.packed = m.quant_state = None
        weight = weight.data.float()
        if m.lora_A is not None:
            weight = weight + m.scale * m.lora_B.data @ m.lora_A.data
            m.lora_A = m.lora_B = None
        m.weight = nn.Parameter(weight)
    for m in embeddings(model).values():
        if m.rows is not None:
            m.weight.data = m.weight.data.float().index_copy(0, m.tokens, m.rows.data)
            m.rows = None
    for p in model.parameters():
        p.data = p.data.float()
        p.requires_grad_(True)
    model.lora, model.bits = None, 16
