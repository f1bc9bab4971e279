"""What a run takes, said before it begins: parameters and memory, and with --dry-run also time.

Counted from shapes, to the byte: weights, gradients, the optimizer's state, the keys and values of
the rollouts, and logits. Not counted are the activations of a training step, what kernels need for
a moment, the framework itself and the data: --dry-run takes two training steps on random tokens,
in RL and evaluation also writes some tokens of all rollouts, and reports the most that was held.
"""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from backends.config import MATRICES, ModelConfig
from common import ranks
from common.batching import tokens_of_logits
from common.settings import ModelSettings
from data.batches import pack_texts
from data.trajectory import TAGS, Role, Trajectory
from model import LM

# Tokens of each rollout that --dry-run writes, twice; so many that CUDA records a step of them.
DECODED_TOKENS = 32

Kind = Literal["sft", "rl", "eval"]


# ---- counted from shapes -------------------------------------------------------------------------
@dataclass
class ParameterCounts:
    """How many numbers a network has, by how they are kept and trained."""

    blocks: int  # in the matrices of the blocks, which Muon trains and 4 bits are for
    rest: int  # embeddings, norms, biases
    adapter: int  # in the adapter's matrices
    tags: int  # embeddings of the tags, which are trained with an adapter

    @property
    def network(self) -> int:
        """Without an adapter."""
        return self.blocks + self.rest

    @property
    def beside_frozen(self) -> int:
        """What is trained where an adapter is."""
        return self.adapter + self.tags


def count_parameters(config: ModelConfig, settings: ModelSettings) -> ParameterCounts:
    """Count a network's parameters, and those of the adapter that the settings ask for."""
    shapes = {name: config.shape_of(name) for name in MATRICES}
    block = sum(rows * columns for rows, columns in shapes.values())
    query_size = shapes["q_proj"][0]
    key_size = shapes["k_proj"][0]
    small = 2 * config.hidden_size
    if config.qkv_bias:
        small += query_size + 2 * key_size
    if config.o_bias:
        small += config.hidden_size
    if config.qk_norm:
        small += 2 * config.head_dim
    vocabulary_matrices = 1 if config.tie_word_embeddings else 2
    embeddings = vocabulary_matrices * config.vocab_size * config.hidden_size
    adapter = sum(
        settings.lora_rank * (rows + columns)
        for name, (rows, columns) in shapes.items()
        if name in settings.lora_targets
    )
    tags = 0
    if settings.lora_rank:
        tags = vocabulary_matrices * len(TAGS) * config.hidden_size
    layers = config.num_hidden_layers
    return ParameterCounts(
        blocks=layers * block,
        rest=layers * small + config.hidden_size + embeddings,
        adapter=layers * adapter,
        tags=tags,
    )


def training_bytes(
    config: ModelConfig, settings: ModelSettings, muon: bool, scale_bytes: int
) -> dict[str, int]:
    """Return the bytes of weights, gradients and the optimizer's state, by name.

    Weights that are trained take 4 bytes, frozen ones those of --dtype or --bits. AdamW keeps two
    numbers of 4 bytes for each that is trained, Muon one for each in a matrix.
    scale_bytes: what 64 weights of 4 bits have beside them.
    """
    counts = count_parameters(config, settings)
    if settings.lora_rank:
        in_matrices = counts.adapter
        trained = counts.beside_frozen
        weights = 4 * trained + frozen_bytes(config, settings, scale_bytes)
    else:
        in_matrices = counts.blocks
        trained = counts.network
        weights = 4 * trained
    optimizer = 8 * trained
    if muon:
        optimizer -= 4 * in_matrices
    # Where several processes add them up, their message stands beside them.
    copies = 1 if ranks.count() == 1 else 2
    return {"weights": weights, "gradients": copies * 4 * trained, "optimizer": optimizer}


def frozen_bytes(config: ModelConfig, settings: ModelSettings, scale_bytes: int) -> int:
    """Return the bytes of the weights under an adapter."""
    counts = count_parameters(config, settings)
    number = bytes_of_number(settings)
    if settings.bits == 4:
        in_blocks = counts.blocks // 2 + counts.blocks // 64 * scale_bytes
    else:
        in_blocks = number * counts.blocks
    return in_blocks + number * counts.rest


def fused_weights(config: ModelConfig) -> int:
    """Return how many numbers are in the matrices that a copy for decoding fuses."""
    fused = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    shapes = [config.shape_of(name) for name in fused]
    return config.num_hidden_layers * sum(rows * columns for rows, columns in shapes)


def cache_bytes(config: ModelConfig, settings: ModelSettings, rows: int, length: int) -> int:
    """Return the bytes of the keys and values of some rollouts."""
    key_size = config.shape_of("k_proj")[0]
    return 2 * bytes_of_number(settings) * config.num_hidden_layers * rows * length * key_size


def logits_bytes(config: ModelConfig, tokens: int) -> int:
    """Return the bytes of logits, which are float32."""
    return 4 * tokens * config.vocab_size


def bytes_of_number(settings: ModelSettings) -> int:
    """Return the bytes of an activation or a frozen weight."""
    return 2 if settings.dtype == "bfloat16" else 4


# ---- the report ----------------------------------------------------------------------------------
@dataclass
class Workload:
    """What a script does at once and in a step."""

    kind: Kind
    muon: bool
    rows: int  # rollouts that are decoded together
    rollouts: int  # of a step of RL; else 0
    batch_tokens: int  # tokens of an optimizer step that --dry-run times

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.kind != "eval"


def report(lm: LM, settings: Any, kind: Kind, loss: Callable[..., Any] | None) -> bool:
    """Print what a script takes; return whether it should go on, which --dry-run denies.

    settings: those of the script.
    loss: a loss function of language modelling; None for kind "eval".
    """
    workload = _workload(settings, kind)
    config = lm.network.config
    counts = count_parameters(config, settings)
    trained = ""
    if workload.trains and settings.lora_rank:
        millions = counts.beside_frozen / 1e6
        trained = f", {millions:,.2f} M trained (rank {settings.lora_rank})"
    elif workload.trains:
        trained = ", all trained"
    place = f"{lm.backend.NAME} on {lm.backend.describe_device(lm.network)}"
    number_type = str(lm.network.dtype).split(".")[-1]
    print(f"{counts.network / 1e6:,.2f} M parameters{trained}; {number_type}, {place}")
    _report_unseen_length(config.max_position_embeddings, settings.max_len)

    memory = _counted_memory(lm, settings, workload)
    parts = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in memory.items())
    sizes = f"{workload.rows} rows of {settings.max_len}"
    if workload.trains:
        sizes = f"micro-batches of up to {_tokens_at_once(settings, kind)} tokens, {sizes}"
    hint = "" if settings.dry_run else "; --dry-run measures the whole"
    print(f"memory in MB: {parts} ({sizes}); activations are not counted{hint}", flush=True)
    if not settings.dry_run:
        return True
    _measure(lm, settings, workload, loss)
    print("nothing was trained or written (--dry-run)")
    return False


def _report_unseen_length(longest: int, max_len: int) -> None:
    """Say so where a trajectory may be longer than any text that the network was made for."""
    if max_len > longest:
        print(
            f"max_len {max_len}: the checkpoint was made for texts of {longest} tokens "
            "at most (max_position_embeddings); beyond that it may write nonsense"
        )


def _workload(settings: Any, kind: Kind) -> Workload:
    """Return what a script does at once. In SFT too the model is asked, for data and samples."""
    if kind == "rl":
        rollouts = settings.questions * settings.rollouts
        rows = min(rollouts, settings.batch_rows)
        return Workload(kind, False, rows, rollouts, settings.micro_tokens)
    muon = kind == "sft" and settings.muon
    batch_tokens = settings.batch_tokens if kind == "sft" else 0
    return Workload(kind, muon, settings.batch_rows, 0, batch_tokens)


def _tokens_at_once(settings: Any, kind: Kind) -> int:
    """Return the tokens of the largest micro-batch.

    A pair is never cut, nor are the rollouts of a question, which at worst share nothing.
    """
    texts_together = settings.rollouts if kind == "rl" else 2
    return max(settings.micro_tokens, texts_together * settings.max_len)


def _counted_memory(lm: LM, settings: Any, workload: Workload) -> dict[str, int]:
    """Return the bytes of all that is counted, by name."""
    config = lm.network.config
    counts = count_parameters(config, settings)
    number = bytes_of_number(settings)
    # MLX keeps an offset beside the scale of 64 weights.
    scale_bytes = 2 * number if lm.backend.NAME == "mlx" else 4
    memory = training_bytes(config, settings, workload.muon, scale_bytes)
    if not workload.trains:
        # The base model stays beside the stage that is asked.
        networks = 1 if getattr(settings, "data", None) else 2
        memory = {"weights": networks * memory["weights"]}
    if workload.kind == "rl":
        memory["reference"] = 4 * counts.network
        if settings.lora_rank:
            # It shares the frozen weights, unless RL-1's adapter was merged into its own.
            memory["reference"] = 4 * counts.beside_frozen
            if settings.lora_merge:
                memory["reference"] += number * counts.network
    if not settings.lora_rank and settings.bits == 16:
        memory["copy for rollouts"] = number * fused_weights(config)
        if number < 4:
            memory["copy for rollouts"] += number * counts.network
    memory["KV cache"] = cache_bytes(config, settings, workload.rows, settings.max_len)
    logits = logits_bytes(config, workload.rows)
    if workload.trains:
        trained = min(_tokens_at_once(settings, workload.kind), tokens_of_logits(config.vocab_size))
        logits = max(logits, logits_bytes(config, trained))
    memory["logits"] = logits
    library = lm.backend.workspace(lm.network)
    if library:
        memory["cuBLAS"] = library
    return memory


# ---- measured by --dry-run -----------------------------------------------------------------------
def _measure(lm: LM, settings: Any, workload: Workload, loss: Callable[..., Any] | None) -> None:
    """Time a training step and the writing of a token, and print the most memory held."""
    resident_before = _resident_memory()
    step_seconds = 0.0
    if workload.trains:
        assert loss is not None, "training needs a loss"
        step_seconds = measure_step(lm, settings, workload, loss)
        print(f"time: {step_seconds:.2f} s an optimizer step of {workload.batch_tokens} tokens")
    if workload.kind != "sft":
        token_seconds = measure_decoding(lm, settings, workload.rows)
        print(f"time: {token_seconds:.3f} s a token of {workload.rows} rollouts")
        if workload.kind == "rl":
            _print_rl_step(settings, workload, step_seconds, token_seconds)
    peak = lm.backend.peak_memory()
    if peak is not None:
        print(f"measured: {peak / 1e6:,.0f} MB held at most, by {lm.backend.NAME}'s own count")
    else:
        print(
            f"measured: {_resident_memory() / 1e6:,.0f} MB of resident memory at most, "
            f"{resident_before / 1e6:,.0f} of them before the first step"
        )


def _print_rl_step(
    settings: Any, workload: Workload, step_seconds: float, token_seconds: float
) -> None:
    """Print what a step of RL takes at most, by its parts."""
    rollouts = workload.rollouts
    rounds = -(-rollouts // workload.rows)
    decoding = rounds * token_seconds * settings.max_len
    update = rollouts * settings.max_len / workload.batch_tokens * step_seconds
    print(
        f"time: {decoding + update:.1f} s a step of {rollouts} rollouts at most, if each has "
        f"{settings.max_len} tokens, all its own"
    )


def measure_step(lm: LM, settings: Any, workload: Workload, loss: Callable[..., Any]) -> float:
    """Return the seconds of an optimizer step on random tokens: the second of two.

    The learning rates are 0, so that the weights stay as they are.
    """
    lm.begin_stage(settings, settings.seed)
    optimizer = lm.backend.Optimizer(lm.network, workload.muon)
    length = min(settings.max_len, settings.micro_tokens)
    texts = max(1, settings.micro_tokens // length)
    rng = np.random.default_rng(0)
    random_ids = rng.integers(0, lm.network.config.vocab_size, (texts, length)).tolist()
    batch = pack_texts([Trajectory(ids, [1] * length, [Role.THINK] * length) for ids in random_ids])
    batch["norm"] = float(workload.batch_tokens)
    micro_batches = max(1, round(workload.batch_tokens / len(batch["ids"])))
    seconds = 0.0
    for _ in range(2):
        started = time.time()
        lm.backend.train_step(lm.network, optimizer, loss, [batch] * micro_batches, 0.0, 0.0)
        seconds = time.time() - started
    return seconds


def measure_decoding(lm: LM, settings: Any, rows: int) -> float:
    """Return the seconds of one token of all rollouts, at half of their length."""
    # Each another text: equal ones would share a slot of the cache.
    shape = (rows, settings.max_len // 2)
    prompts = np.random.default_rng(0).integers(0, lm.network.config.vocab_size, shape).tolist()
    decoder = lm.decoder(prompts)
    seconds = 0.0
    for _ in range(2):
        started = time.time()
        decoder.decode([], [DECODED_TOKENS] * rows, 0.0)
        seconds = time.time() - started
    return seconds / DECODED_TOKENS


def _resident_memory() -> int:
    """Return the most bytes of main memory that this process has held so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return usage if sys.platform == "darwin" else 1024 * usage
