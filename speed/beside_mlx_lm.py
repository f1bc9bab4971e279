"""mlx_lm with the weights of a folder: its generation, and its trainer of adapters."""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.optimizers
import mlx_lm
from mlx import core as mx
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.tuner import trainer, utils

from data.trajectory import Trajectory
from speed.agents import Generate
from speed.flops import ADAPTER_PASSES, text_flops
from speed.ours import LEARNING_RATE, Ours, training_work
from speed.pairs import Timing


class MlxLm:
    """The library, asked for the same as ours."""

    name = "mlx_lm"

    def __init__(self, ours: Ours) -> None:
        self.ours = ours
        self.codec = ours.lm.codec
        self.network: Any = mlx_lm.load(str(ours.folder))[0]
        self.network.set_dtype(getattr(mx, ours.other_dtype))

    def answer(self, prompt: list[int], count: int) -> Timing:
        """Write so many tokens after one prompt, greedily."""
        start = time.perf_counter()
        tokens = generate_step(mx.array(prompt), self.network, max_tokens=count)
        texts = [[int(token) for token, _ in tokens]]
        seconds = time.perf_counter() - start
        flops = text_flops(self.ours.config, [len(prompt) + count], count)
        return Timing(seconds, count, flops, texts)

    def generation(self) -> Generate:
        """Return a generation of rows by its BatchGenerator, which keeps their caches."""
        stops = [[token] for token in (*self.codec.eos_ids, self.codec.end_search_id)]
        caches: dict[int, Any] = {}

        def generate(
            rows: list[int], unread: list[list[int]], budgets: list[int]
        ) -> list[list[int]]:
            generator = BatchGenerator(
                self.network,
                stop_tokens=stops,
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

    def training(
        self, steps: Sequence[Sequence[Trajectory]], lora_rank: int
    ) -> Callable[[], Timing]:
        """Return what trains an adapter on some steps of as many texts, by its own trainer.

        The loss is on all tokens: the trainer masks none but a prompt.
        """
        student: Any = mlx_lm.load(str(self.ours.folder))[0]
        student.freeze()
        adapter = {
            "rank": lora_rank,
            "scale": self.ours.settings.lora_alpha / lora_rank,
            "dropout": 0.0,
            "keys": [_key(matrix) for matrix in self.ours.settings.lora_targets],
        }
        utils.linear_to_lora_layers(student, len(student.layers), adapter)

        class Clock(trainer.TrainingCallback):
            def __init__(self) -> None:
                self.times: list[float] = []

            def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
                self.times.append(time.perf_counter())

        def train() -> Timing:
            clock = Clock()
            texts = [(text.ids, 0) for step in steps for text in step]
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                arguments = trainer.TrainingArgs(
                    batch_size=len(steps[0]),
                    iters=len(steps) + 2,
                    steps_per_report=1,
                    max_seq_length=self.ours.settings.max_len,
                    adapter_file=str(Path(folder, "adapter.safetensors")),
                )
                trainer.train(
                    student,
                    mlx.optimizers.Adam(LEARNING_RATE),
                    texts,
                    args=arguments,
                    training_callback=clock,
                )
            # The first two steps compile.
            work = training_work(self.ours, steps, ADAPTER_PASSES)
            return Timing(clock.times[-1] - clock.times[1], *work)

        return train


def _key(matrix: str) -> str:
    if matrix[0] in "qkvo":
        return f"self_attn.{matrix}"
    return f"mlp.{matrix}"
