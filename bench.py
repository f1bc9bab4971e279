"""Speed beside what one would take instead: mlx_lm (--backend=mlx) or transformers (torch).

    python bench.py                         # the agent in out/nano; --start names another stage
    python bench.py --backend=mlx
    python bench.py index 10000 1000000     # what an index of so many made-up passages costs

one answer      a prompt and 128 tokens
agents          as many different questions as --questions times --rollouts, with tool calls,
                greedy; the library decodes all rows of a turn together and keeps its caches over
                the calls (answers that are forced are left out on its side)
training        optimizer steps of a LoRA adapter (MLX: with that library's own trainer) or of all
                weights (torch)

Both sides have the same weights, texts and budgets, and run in turns; the figure is the median of
the ratios.
"""

import contextlib
import dataclasses
import io
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import model
from autocoa import nll_loss, rollout
from common.errors import UserError, run_guarded
from common.runs import find_start, run_folder, settle_dtype
from common.settings import AboveZero, ModelSettings, RolloutSettings, TaskRunSettings, main
from data.batches import language_batches
from data.sft_data import read_trajectories
from data.trajectory import Codec, Trajectory
from model import LM
from services.bm25 import open_index
from tasks import open_task
from tools import Library

ROUNDS = 5
ANSWER_TOKENS = 128
TRAINING_STEPS = 6
TRAINING_ROWS = 16  # of an optimizer step: chains of a middle length
CHAINS_TO_CHOOSE_FROM = 400
LEARNING_RATE = 1e-5
UNLIMITED = 10**9  # tokens that go through the network at once in training
DEFAULT_RANK = 8  # of the adapter, where --lora_rank does not say

INDEX_QUERIES = 200
PASSAGE_WORDS = 85
TITLE_WORDS = 3
QUERY_WORDS = 12
VOCABULARY = 500_000
ZIPF_EXPONENT = 1.2


@dataclass(kw_only=True)
class BenchSettings(ModelSettings, TaskRunSettings, RolloutSettings):
    """The settings of bench.py."""

    # The stage of the run whose network is timed; empty: rl2.
    start: str = ""
    # Questions of the comparison of agents, together with --rollouts.
    questions: AboveZero = 48
    # Times so many rows: each of them has a question of its own.
    rollouts: AboveZero = 5


# A library's batched generation with caches: (row numbers, ids that each row has to read, tokens
# that each may write) -> what each wrote, its stop token included.
Generate = Callable[[list[int], list[list[int]], list[int]], list[list[int]]]


# ---- agents with another library -----------------------------------------------------------------
def run_agents(
    generate: Generate,
    codec: Codec,
    prompts: Sequence[list[int]],
    search: Library,
    settings: RolloutSettings,
) -> list[list[int]]:
    """Put tool calls around a library's generation; return the ids of each whole text."""
    texts = [list(prompt) for prompt in prompts]
    unread = dict(enumerate(prompts))
    longest = settings.max_len - settings.forced_answer_room
    for _ in range(settings.max_actions + 1):
        rows = list(unread)
        budgets = [longest - len(texts[row]) for row in rows]
        queries = {}
        for row, ids in zip(rows, generate(rows, list(unread.values()), budgets), strict=True):
            texts[row] += ids
            if ids[-1] == codec.end_search_id and codec.search_id in ids:
                queries[row] = codec.last_query(ids)
        if not queries:
            break
        unread = {}
        observations = search(list(queries.values()))
        for row, observation in zip(queries, observations, strict=True):
            text = codec.fit(observation.text, settings.max_observation)
            ids = codec.wrap_observation(text)
            if len(texts[row]) + len(ids) < longest:
                texts[row] += ids
                unread[row] = ids
        if not unread:
            break
    return texts


# ---- mlx_lm --------------------------------------------------------------------------------------
class MlxLm:
    """mlx_lm with the weights of a folder."""

    name = "mlx_lm"
    trains_adapter = True

    def __init__(
        self, folder: Path, base_folder: Path, codec: Codec, settings: BenchSettings
    ) -> None:
        # MLX and its library are imported where they are compared with: not every machine has them.
        import mlx_lm

        self.network = mlx_lm.load(str(folder))[0]
        self.base_folder = base_folder
        self.stops = [*codec.eos_ids, codec.end_search_id]
        self.settings = settings

    def answer(self, prompt: list[int], count: int) -> list[int]:
        """Write so many tokens after one prompt."""
        from mlx import core as mx
        from mlx_lm.generate import generate_step

        tokens = generate_step(mx.array(prompt), self.network, max_tokens=count)
        return [int(token) for token, _ in tokens]

    def generation(self) -> Generate:
        """Return a generation of rows by its BatchGenerator, which keeps their caches."""
        from mlx_lm.generate import BatchGenerator

        caches: dict[int, Any] = {}

        def generate(
            rows: list[int], unread: list[list[int]], budgets: list[int]
        ) -> list[list[int]]:
            generator = BatchGenerator(
                self.network,
                stop_tokens=[[token] for token in self.stops],
                completion_batch_size=len(rows),
                prefill_batch_size=len(rows),
            )
            # A row without a cache is new.
            row_caches: Any = [caches.get(row) for row in rows]
            numbers = generator.insert(unread, budgets, row_caches)
            row_of_number = dict(zip(numbers, rows, strict=True))
            written: dict[int, list[int]] = {row: [] for row in rows}
            while True:
                responses = generator.next_generated()
                if not responses:
                    break
                for response in responses:
                    row = row_of_number[response.uid]
                    written[row].append(response.token)
                    if response.finish_reason:
                        caches[row] = response.prompt_cache
            generator.close()
            return list(written.values())

        return generate

    def train(self, rows: list[list[int]], steps: int) -> float:
        """Return the seconds of so many optimizer steps of an adapter, by its own trainer."""
        import mlx.optimizers
        import mlx_lm
        from mlx_lm.tuner import trainer, utils

        class Clock(trainer.TrainingCallback):
            def __init__(self) -> None:
                self.times: list[float] = []

            def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
                self.times.append(time.perf_counter())

        student: Any = mlx_lm.load(str(self.base_folder))[0]
        student.freeze()
        rank = self.settings.lora_rank
        adapter = {
            "rank": rank,
            "scale": self.settings.lora_alpha / rank,
            "dropout": 0.0,
            "keys": [_mlx_lm_key(matrix) for matrix in self.settings.lora_targets],
        }
        utils.linear_to_lora_layers(student, len(student.layers), adapter)
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            arguments = trainer.TrainingArgs(
                batch_size=len(rows),
                iters=steps + 2,
                steps_per_report=1,
                max_seq_length=self.settings.max_len,
                adapter_file=str(Path(folder, "adapter.safetensors")),
            )
            trainer.train(
                student,
                mlx.optimizers.Adam(LEARNING_RATE),
                [(row, 0) for row in rows],
                args=arguments,
                training_callback=clock,
            )
        # The first two steps compile.
        return clock.times[-1] - clock.times[1]


def _mlx_lm_key(matrix: str) -> str:
    if matrix[0] in "qkvo":
        return f"self_attn.{matrix}"
    return f"mlp.{matrix}"


# ---- transformers --------------------------------------------------------------------------------
class Transformers:
    """The transformers library with the weights of a folder."""

    name = "transformers"
    trains_adapter = False

    def __init__(
        self, folder: Path, base_folder: Path, codec: Codec, settings: BenchSettings
    ) -> None:
        # torch, and transformers' models, which need it, are imported where they are compared with:
        # MLX and the index do without, and not every machine has torch.
        from transformers import AutoModelForCausalLM

        self.device = model.choose_backend("torch").pick_device(settings.device)
        self.network: Any = AutoModelForCausalLM.from_pretrained(folder).eval().to(self.device)
        self.base_folder = base_folder
        self.stops = [*codec.eos_ids, codec.end_search_id]

    def answer(self, prompt: list[int], count: int) -> list[int]:
        """Write so many tokens after one prompt."""
        import torch

        self.network.generation_config.eos_token_id = None
        ids = torch.tensor([prompt], device=self.device)
        output = self._generate(ids, torch.ones_like(ids), count, stops=None)
        return output.sequences[0, len(prompt) :].tolist()

    def _generate(
        self, ids: Any, mask: Any, count: int, stops: list[int] | None, cache: Any = None
    ) -> Any:
        import torch

        with torch.no_grad():
            return self.network.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=0,
                return_dict_in_generate=True,
            )

    def generation(self) -> Generate:
        """Return a generation of rows that keeps the cache of the turn before."""
        import torch

        last_turn: dict[str, Any] = {}

        def generate(
            rows: list[int], unread: list[list[int]], budgets: list[int]
        ) -> list[list[int]]:
            ids, mask = _pad_left(unread, self.device)
            cache = None
            if last_turn:
                cache = last_turn["cache"]
                positions = [last_turn["rows"].index(row) for row in rows]
                kept = torch.tensor(positions, device=self.device)
                cache.batch_select_indices(kept)
                ids = torch.cat([last_turn["ids"][kept], ids], 1)
                mask = torch.cat([last_turn["mask"][kept], mask], 1)
            output = self._generate(ids, mask, max(budgets), self.stops, cache)
            written = output.sequences[:, ids.shape[1] :]
            is_stop = torch.isin(written, torch.tensor(self.stops, device=self.device))
            # A row counts up to its first stop; then generate pads it.
            own = (is_stop.cumsum(1) - is_stop.long() == 0).long()
            last_turn["rows"] = rows
            last_turn["ids"] = output.sequences
            last_turn["mask"] = torch.cat([mask, own], 1)
            last_turn["cache"] = output.past_key_values
            lengths = own.sum(1).tolist()
            return [
                row[: min(length, budget)]
                for row, length, budget in zip(written.tolist(), lengths, budgets, strict=True)
            ]

        return generate

    def train(self, rows: list[list[int]], steps: int) -> float:
        """Return the seconds of so many optimizer steps of all weights, after a first one."""
        import torch
        from transformers import AutoModelForCausalLM

        student: Any = AutoModelForCausalLM.from_pretrained(self.base_folder)
        student = student.to(self.device).train()
        optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE)
        longest = max(len(row) for row in rows)
        padding = [[0] * (longest - len(row)) for row in rows]
        ids = torch.tensor(
            [row + zeros for row, zeros in zip(rows, padding, strict=True)], device=self.device
        )
        mask = torch.tensor(
            [[1] * len(row) + zeros for row, zeros in zip(rows, padding, strict=True)],
            device=self.device,
        )
        labels = ids.masked_fill(mask == 0, -100)

        def train_step() -> None:
            optimizer.zero_grad()
            loss = student(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            # A trainer logs the loss; and so a GPU is waited for, as on our side.
            loss.item()

        return _seconds_after_the_first(train_step, steps)


def _pad_left(rows: list[list[int]], device: Any) -> tuple[Any, Any]:
    """Return ids and attention mask of some rows: tensors of (rows, tokens)."""
    import torch

    longest = max(len(row) for row in rows)
    padding = [[0] * (longest - len(row)) for row in rows]
    ids = [zeros + row for row, zeros in zip(rows, padding, strict=True)]
    mask = [zeros + [1] * len(row) for row, zeros in zip(rows, padding, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


# ---- the comparisons -----------------------------------------------------------------------------
class Result(NamedTuple):
    """What one side took, and what it wrote."""

    seconds: float
    texts: list[list[int]]  # ids; none where it trained


def _timed(write: Callable[[], list[list[int]]]) -> Result:
    start = time.perf_counter()
    texts = write()
    return Result(time.perf_counter() - start, texts)


def _seconds_after_the_first(train_step: Callable[[], None], steps: int) -> float:
    """Return the seconds of so many steps; one more comes first, in which memory is got."""
    train_step()
    start = time.perf_counter()
    for _ in range(steps):
        train_step()
    return time.perf_counter() - start


@dataclass
class Ours:
    """This project, asked for the same as the library."""

    lm: LM
    base_folder: Path
    settings: BenchSettings
    trains_adapter: bool

    def answer(self, prompt: list[int], count: int) -> list[int]:
        """Write so many tokens after one prompt."""
        ids, _ = self.lm.decoder([prompt]).decode([], [count], 0.0)
        return ids[0]

    def run_agents(self, prompts: list[list[int]], search: Library) -> list[list[int]]:
        """Return the ids of a rollout for each prompt."""
        trajectories = rollout(self.lm.decoder, self.lm.codec, prompts, search, self.settings)
        return [trajectory.ids for trajectory in trajectories]

    def train(self, rows: list[Trajectory], steps: int) -> float:
        """Return the seconds of so many optimizer steps, after a first one."""
        settings = self.settings
        if not self.trains_adapter:
            settings = dataclasses.replace(settings, lora_rank=0)
        student = model.load(self.base_folder, settings)
        if self.trains_adapter:
            student.begin_stage(settings, settings.seed)
        backend = student.backend
        optimizer = backend.Optimizer(student.network, muon=False)
        learned = [Trajectory(row.ids, [1] * len(row.ids), row.role) for row in rows]
        batches = language_batches(learned, UNLIMITED)

        def train_step() -> None:
            backend.train_step(
                student.network, optimizer, nll_loss, batches, LEARNING_RATE, muon_lr=0.0
            )

        return _seconds_after_the_first(train_step, steps)


def compare(
    name: str, ours: Callable[[], Result], theirs: Callable[[], Result], note: str = ""
) -> None:
    """Run both sides in turns, and print medians and how many texts are the same."""
    pairs = [(ours(), theirs()) for _ in range(ROUNDS)]
    our_seconds = statistics.median(our.seconds for our, _ in pairs)
    their_seconds = statistics.median(their.seconds for _, their in pairs)
    ratio = statistics.median(their.seconds / our.seconds for our, their in pairs)
    our_texts = pairs[-1][0].texts
    their_texts = pairs[-1][1].texts
    if our_texts:
        same = sum(a == b for a, b in zip(our_texts, their_texts, strict=True))
        note = f"{same} of {len(our_texts)} texts are the same"
    print(f"{name:14}{our_seconds:8.2f}s{their_seconds:14.2f}s{ratio:7.1f}x  {note}", flush=True)


def run(settings: BenchSettings) -> None:
    """Compare one answer, agents with tool calls, and training; print a line each."""
    settle_dtype(settings)
    root = run_folder(settings)
    task = open_task(settings)
    folder = find_start(root, settings.start or "rl2", ["rl2"])
    lm = model.load(folder, settings)
    if lm.network.lora:
        raise UserError(
            f"{folder} holds an adapter; compare with --lora_merge, whose stages are whole networks"
        )
    settings = dataclasses.replace(settings, lora_rank=settings.lora_rank or DEFAULT_RANK)
    library_class = MlxLm if lm.backend.NAME == "mlx" else Transformers
    library = library_class(folder, root / "base", lm.codec, settings)
    ours = Ours(lm, root / "base", settings, library.trains_adapter)
    questions = task.questions("rl2", settings.questions * settings.rollouts)
    prompts = [lm.codec.prompt(question.question) for question in questions]
    rows = chains_of_middle_length(root / "data")
    row_ids = [row.ids for row in rows]
    search = task.rl_search

    print(f"{'':14}{'ours':>9}{library.name:>15}{'ratio':>8}")
    compare(
        "one answer",
        lambda: _timed(lambda: [ours.answer(prompts[0], ANSWER_TOKENS)]),
        lambda: _timed(lambda: [library.answer(prompts[0], ANSWER_TOKENS)]),
    )
    compare(
        "agents",
        lambda: _timed(lambda: ours.run_agents(prompts, search)),
        lambda: _timed(
            lambda: run_agents(library.generation(), lm.codec, prompts, search, settings)
        ),
    )
    compare(
        "training",
        lambda: Result(ours.train(rows, TRAINING_STEPS), []),
        lambda: Result(library.train(row_ids, TRAINING_STEPS), []),
        note=f"{TRAINING_STEPS} steps of {len(rows)} rows",
    )


def chains_of_middle_length(folder: Path) -> list[Trajectory]:
    """Return the rows of an optimizer step, from the SFT data of a run."""
    chains = read_trajectories(folder / "coa.jsonl")[:CHAINS_TO_CHOOSE_FROM]
    chains.sort(key=lambda chain: len(chain.ids))
    middle = len(chains) // 2
    half = TRAINING_ROWS // 2
    rows = chains[max(0, middle - half) : middle + half]
    if not rows:
        raise UserError(f"{folder} holds no chains; train with a larger --coa")
    return rows


# ---- what an index costs -------------------------------------------------------------------------
def index_cost(passages: int) -> None:
    """Print seconds to build and to load an index, ms a query, bytes on disk and peak memory.

    Words are drawn by Zipf's law.
    """
    rng = np.random.default_rng(passages)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "passages.jsonl")
        start = time.time()
        _write_passages(path, passages, rng)
        write_seconds = time.time() - start
        start = time.time()
        open_index(path, 3, folder)
        build_seconds = time.time() - start
        start = time.time()
        index = open_index(path, 3, folder)
        load_seconds = time.time() - start
        queries = [" ".join(_draw_words(rng, QUERY_WORDS)) for _ in range(INDEX_QUERIES)]
        start = time.time()
        index(queries)
        query_ms = 1000 * (time.time() - start) / INDEX_QUERIES
        index_files = [file for file in Path(folder, "index").rglob("*") if file.is_file()]
        index_bytes = sum(file.stat().st_size for file in index_files)
    print(
        f"{passages:,} passages (made in {write_seconds:.0f} s): built in {build_seconds:.1f} s, "
        f"loaded in {load_seconds:.2f} s, {query_ms:.2f} ms a query, "
        f"{index_bytes / 1e6:,.0f} MB on disk, {_peak_memory_gb():,.1f} GB of memory at most",
        flush=True,
    )


def _write_passages(path: Path, count: int, rng: np.random.Generator) -> None:
    with open(path, "w") as file:
        for number in range(count):
            words = _draw_words(rng, PASSAGE_WORDS)
            title = " ".join(words[:TITLE_WORDS])
            text = " ".join(words[TITLE_WORDS:])
            passage = {"id": str(number), "contents": f'"{title}"\n{text}'}
            file.write(json.dumps(passage) + "\n")


def _draw_words(rng: np.random.Generator, count: int) -> list[str]:
    numbers = np.minimum(rng.zipf(ZIPF_EXPONENT, count), VOCABULARY)
    return [f"w{number}" for number in numbers]


def _peak_memory_gb() -> float:
    """Return the most memory that this process had; macOS counts bytes, Linux kilobytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak / 1e9
    return peak / 1e6


def index_command(arguments: Sequence[str]) -> None:
    """Run `python bench.py index N ..`."""
    if not arguments or not all(text.isdecimal() for text in arguments):
        raise UserError("usage: python bench.py index PASSAGES ..")
    for text in arguments:
        index_cost(int(text))


if __name__ == "__main__":
    if sys.argv[1:2] == ["index"]:
        run_guarded(lambda: index_command(sys.argv[2:]))
    else:
        main(run, BenchSettings, __doc__)
