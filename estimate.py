"""What a run will take, said before it starts: parameters, memory at the chosen sizes, and seconds a step, measured on two: by --dry-run on
random tokens, else on the first two of each stage.

Memory is counted from the shapes, in bytes: what stays (weights, gradients, optimizer, and in RL the reference), and what comes and goes
(activations of a micro-batch; the KV cache of the rollouts). Not counted: the framework itself and what its kernels use for a moment.
"""
import time

import numpy as np

import autocoa
import workflows
from autocoa import TAGS
from common import AT_ONCE, MATRICES


def matrices(c):
    """[(name, rows, columns)] of one block."""
    return [(n, *c.shape_of(n)) for n in MATRICES]


def parameters(c, s):
    """-> how many: {"blocks": those in the blocks' matrices, "rest": embeddings, norms, biases, "adapter",
    and "tags": their embeddings, trained with it}"""
    q, kv = c.shape_of("q_proj")[0], c.shape_of("k_proj")[0]
    block = sum(rows * columns for _, rows, columns in matrices(c))
    small = 2 * c.hidden_size + c.qkv_bias * (q + 2 * kv) + c.o_bias * c.hidden_size + c.qk_norm * 2 * c.head_dim
    adapter = sum(s.lora_rank * (rows + columns) for n, rows, columns in matrices(c) if n in s.lora_targets)
    L, heads = c.num_hidden_layers, 1 if c.tie_word_embeddings else 2
    return {"blocks": L * block, "rest": L * small + c.hidden_size + heads * c.vocab_size * c.hidden_size,
            "adapter": L * adapter, "tags": bool(s.lora_rank) * heads * len(TAGS) * c.hidden_size}


def kept(c, s, muon, scale_bytes):
    """Bytes of weights, of gradients and of the optimizer. Weights that are trained take 4 bytes, frozen ones those of --dtype or --bits.
    scale_bytes: what 64 weights of 4 bits have beside them."""
    n, size = parameters(c, s), 2 if s.dtype == "bfloat16" else 4
    if s.lora_rank:
        block = 0.5 + scale_bytes / 64 if s.bits == 4 else size
        in_matrices, trained = n["adapter"], n["adapter"] + n["tags"]
        weights = block * n["blocks"] + size * n["rest"] + 4 * trained
    else:
        in_matrices = n["blocks"]
        trained, weights = n["blocks"] + n["rest"], 4 * (n["blocks"] + n["rest"])
    return {"weights": weights, "gradients": 4 * trained, "optimizer": 8 * trained - 4 * in_matrices * muon}


def step_of_mlx(c, s, muon, group):
    """Bytes that an optimizer step makes beside what was, since arrays of MLX don't change. It takes `group` weights at
    a time, or one parameter that is larger: AdamW makes clipped gradients, weights and two moments; the iteration of
    Muon holds up to twenty numbers a weight (measured)."""
    n, one_shape = parameters(c, s), 2 * c.num_hidden_layers * c.hidden_size * c.intermediate_size         # gate_proj and up_proj
    if s.lora_rank:
        in_matrices, rest, largest = n["adapter"], n["tags"], 0
    else:
        in_matrices, rest, largest = (min(n["blocks"], one_shape) if muon else n["blocks"], n["rest"],
                                      c.hidden_size * max(c.vocab_size, c.intermediate_size))
    adamw = min(rest if muon else rest + in_matrices, max(group, largest))
    return 16 * max(adamw, 5 * min(in_matrices, max(group, largest and c.hidden_size * c.intermediate_size)) * muon)


def step_of_torch(c, s, muon):
    """Bytes that are there for a moment when the activations are gone: gradients of the vocabulary's matrix, which come
    from its use as head and as embedding and are summed (AdamW's one number for each weight of a parameter is less);
    Muon's momentum of all matrices, and eleven bytes a weight of those of one shape (measured)."""
    n, largest = parameters(c, s), 0 if s.lora_rank else c.hidden_size * c.vocab_size
    in_matrices = n["adapter"] if s.lora_rank else n["blocks"]
    return max(4 * (3 if c.tie_word_embeddings else 2) * largest,
               muon * (4 * in_matrices + 11 * min(in_matrices, 2 * c.num_hidden_layers * c.hidden_size * c.intermediate_size)))


def activations(c, s, tokens, learned, mlx=0):
    """Bytes that the forward pass of a micro-batch leaves for the backward pass. tokens: with padding; learned: those
    that carry loss; mlx: tokens of a row, where MLX computes them.

    A block keeps the inputs of its norms (2), its linear maps and its activation, and the queries, keys, values and
    output of attention; with bfloat16 also the trained matrices as they were cast. The head keeps log-probs, and its
    logits while it computes them. MLX keeps a little more of each, and the probabilities of attention, and makes more
    of one block as it goes back (measured on the CPU, float32: within a fifth).
    """
    size = 2 if s.dtype == "bfloat16" else 4
    h, q, kv, m = c.hidden_size, c.shape_of("q_proj")[0], c.shape_of("k_proj")[0], c.intermediate_size
    more, scores = bool(mlx), c.num_attention_heads * mlx
    block = tokens * size * ((4 + more) * h + (3 + more) * q + 2 * kv + (4 + more) * m + scores)
    if c.qk_norm:
        block += tokens * size * (q + kv)
    if s.lora_rank:
        block += tokens * size * s.lora_rank * len(s.lora_targets)
    elif size == 2:
        block += size * sum(rows * columns for _, rows, columns in matrices(c))
    L = c.num_hidden_layers
    head, back = (3 + more) * 4 * learned * c.vocab_size, more * tokens * size * (4 * h + 2 * m + 2 * scores)
    if s.checkpointing:         # a block is computed again when the logits are gone; MLX does both in an order of its own
        rest = block + back + head if mlx else max(block, head)
        return L * tokens * size * (1 + more) * h + 2 * tokens * size * h + rest
    return L * block + 2 * tokens * size * h + head + back


def cache(c, s, rows, length):
    """Bytes of keys and values of the rollouts, and of the logits of a step."""
    size = 2 if s.dtype == "bfloat16" else 4
    return 2 * size * c.num_hidden_layers * rows * length * c.shape_of("k_proj")[0] + 3 * 4 * rows * c.vocab_size


def fed(c, s, rows, tokens, length):
    """Bytes that reading `tokens` in each row makes for a moment, AT_ONCE in one pass, behind a cache of `length`: one block's values, the
    mask, for grouped heads once for each of a group, and the keys and values that are read. MLX, by its own count,
    holds twice what torch does, caches included (the old and the new)."""
    rows = min(rows, max(1, AT_ONCE // tokens))
    size, kv = 2 if s.dtype == "bfloat16" else 4, c.shape_of("k_proj")[0]
    group = c.num_attention_heads // c.num_key_value_heads
    return size * rows * (tokens * (2 * c.intermediate_size + 3 * c.hidden_size)
                          + tokens * length * (1 + group * (group > 1)) + 2 * length * kv)


def show(lm, s, kind):
    """Print the estimate for a script. kind: sft, rl or eval. -> whether to go on"""
    c = lm.model.config
    n, size = parameters(c, s), 2 if s.dtype == "bfloat16" else 4
    whole = n["blocks"] + n["rest"]
    mlx = lm.backend.__name__ == "model_mlx"
    keep = kept(c, s, s.muon and kind == "sft", 2 * size if mlx else 4)      # MLX has an offset beside the scale
    library = {"cuBLAS": lm.backend.workspace(lm.model)} if lm.backend.workspace(lm.model) else {}
    # in SFT too: what the base model knows is asked, and each stage ends with samples
    rows = s.questions * s.rollouts if kind == "rl" else s.batch_rows
    rows, read = min(rows, s.batch_rows), s.max_observation
    if kind == "eval" and lm.codec.tok.chat_template:       # ReAct's examples are read by each row
        read = max(read, len(lm.codec.encode(workflows.REACT)) + 50)
    going = {"KV cache": (1 + mlx) * cache(c, s, rows, s.max_len), "reading": (1 + mlx) * fed(c, s, rows, min(read, s.max_len), s.max_len)}
    rollouts = sum(going.values())
    copy = 0 if size == 4 or s.lora_rank else size * whole           # the rollouts' own copy in the compute type
    if kind == "eval":
        keep = {"weights": keep["weights"] * (1 if s.data else 2)}      # the base model stays beside the stage that is asked
        peak = keep["weights"] + copy + rollouts
    else:
        # a trajectory is not cut, and a pair of SFT-1 is two
        tokens = max(s.micro_tokens, s.max_len * (2 if kind == "sft" else 1))
        going["activations"] = activations(c, s, tokens, tokens, mlx * s.max_len)
        if kind == "rl":
            # RL-2 has a base of its own where RL-1's adapter was merged into it
            keep["reference"] = 4 * (n["adapter"] + n["tags"] if s.lora_rank else whole) + size * whole * (s.lora_rank > 0 and s.lora_merge)
        muon = s.muon and kind == "sft"
        going["optimizer step"] = step_of_mlx(c, s, muon, lm.backend.Optimizer.GROUP) if mlx else step_of_torch(c, s, muon)
        peak = sum(keep.values()) + max(rollouts + copy, going["activations"], going["optimizer step"])
        if kind == "sft" and s.bits < 16:       # the base is asked for the data before it is quantised
            peak = max(peak, size * whole + rollouts + keep["weights"])
    print(f"{whole / 1e6:,.2f} M parameters"
          + ("" if kind == "eval"
             else f", {(n['adapter'] + n['tags']) / 1e6:,.2f} M trained (rank {s.lora_rank})" if s.lora_rank else ", all trained"))
    sizes = ([f"micro-batches of {tokens} tokens"] if kind != "eval" else []) + [f"{rows} rows of {s.max_len}"]
    print("memory in MB: " + ", ".join(f"{k} {v / 1e6:,.1f}" for k, v in (keep | going | library).items())
          + f"; together at most {(peak + sum(library.values())) / 1e6:,.0f}, beside the framework and the data "
          f"({', '.join(sizes)})", flush=True)
    if s.dry_run:
        if kind != "eval":
            step = step_seconds(lm, s, s.muon and kind == "sft")
            print(f"time: {step:.2f} s an optimizer step of {s.batch_tokens} tokens")
        if kind != "sft":
            token = decode_seconds(lm, s, rows)
            print(f"time: {token:.3f} s a token of {rows} rollouts")
        if kind == "rl":
            n = s.questions * s.rollouts
            print(f"time: {-(-n // rows) * token * s.max_len + n * s.max_len / s.batch_tokens * step:.1f} s a step of {n} "
                  f"rollouts at most, were each of {s.max_len} tokens, all its own")
        print("nothing was trained or written (--dry-run)")
    return not s.dry_run


def after_two(bar, i):
    """Say behind the second step of a stage that is under way what one takes. bar: its tqdm; i: the step that is done."""
    if i == bar.initial + 1:
        step, left = bar.format_dict["elapsed"] / 2, bar.total - i - 1
        with bar.external_write_mode():
            print(f"{bar.desc}: {step:.2f} s a step by the first two, {left * step / 60:.1f} minutes for the other {left}", flush=True)


def step_seconds(lm, s, muon):
    """Of the second of two optimizer steps of a copy on random tokens."""
    lm, rng = lm.copy(), np.random.default_rng(0)
    lm.adapt(s)
    optimizer = lm.backend.Optimizer(lm.model, muon=muon)
    length = min(s.max_len, s.micro_tokens)
    batch = {"ids": rng.integers(0, lm.model.config.vocab_size, (max(1, s.micro_tokens // length), length)), "norm": float(s.batch_tokens)}
    batch["mask"] = np.ones(batch["ids"].shape, np.float32)
    for _ in range(2):
        start = time.time()
        lm.backend.train_step(lm.model, optimizer, autocoa.nll_loss, [batch] * max(1, round(s.batch_tokens / batch["ids"].size)), 0.0, 0.0)
    return time.time() - start


def decode_seconds(lm, s, rows, tokens=8):
    """Of one token of all rollouts, in the second of two rounds, behind half of their length."""
    dec = lm.decoder([[1] * (s.max_len // 2)] * rows)
    for _ in range(2):
        start = time.time()
        dec.decode([], [tokens] * rows, 0.0)
    return (time.time() - start) / tokens
