"""TRL's GRPOTrainer with the weights of a folder: steps of the same questions, without a tool.

Its policy writes the observations itself, as in RL-1. To be on its side, a completion ends at the
mean number of tokens that a rollout of ours samples, rows of like length go through the network
together, and nothing is computed twice to save memory.
"""

import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset  # pyrefly: ignore[missing-import]
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyrefly: ignore[missing-import]
from trl.trainer import grpo_trainer  # pyrefly: ignore[missing-import]

from common.errors import UserError
from data.questions import Question
from data.scores import exact_match
from data.trajectory import Codec
from speed.flops import TRAINING_PASSES, text_flops
from speed.ours import LEARNING_RATE, Ours
from speed.pairs import Timing


class Clock(TrainerCallback):
    """The seconds of the optimizer steps of the last training, sampling included."""

    started = 0.0
    seconds = 0.0

    def on_train_begin(self, *arguments: Any, **more: Any) -> None:
        """Begin to count."""
        self.seconds = 0.0

    def on_step_begin(self, *arguments: Any, **more: Any) -> None:
        """Take the time."""
        self.started = time.perf_counter()

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        """Add what the step took."""
        self.seconds += time.perf_counter() - self.started


class Trainer(GRPOTrainer):
    """GRPOTrainer on the ids of our prompts, with rows of like length together."""

    codec: Codec
    # Of all texts of the last training.
    prompt_lengths: list[int]
    completion_lengths: list[int]

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.codec.prompt(question) for question in prompts], None, {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        self.prompt_lengths += batch["prompt_mask"].sum(1).tolist()
        self.completion_lengths += batch["completion_mask"].sum(1).tolist()
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        # Rows of like length have columns of padding in common, which are cut off.
        prompt = int(inputs["prompt_mask"].sum(1).max())
        completion = int(inputs["completion_mask"].sum(1).max())
        shorter = dict(inputs)
        for name, value in inputs.items():
            if name in ("prompt_ids", "prompt_mask"):
                shorter[name] = value[:, -prompt:]
            elif torch.is_tensor(value) and value.ndim == 2:
                shorter[name] = value[:, :completion]
        return super()._compute_loss(model, shorter)


def sort_by_length(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch whose rows stand by length, in place of the trainer's random order."""
    lengths = batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)
    order = lengths.argsort()
    return {
        name: value[order] if torch.is_tensor(value) and value.ndim else value
        for name, value in batch.items()
    }


def grpo_steps(
    ours: Ours, steps: Sequence[Sequence[Question]], completion_tokens: int
) -> Callable[[], Timing]:
    """Return what makes some GRPO steps; a unit is a sampled token.

    steps: the questions of each, as many in one as in the other.
    completion_tokens: of a rollout at most.
    """
    if torch.cuda.device_count() > 1:
        raise UserError(
            "--only=rl: TRL would train on all GPUs; show it one, with CUDA_VISIBLE_DEVICES=0"
        )
    settings = ours.settings
    is_bfloat16 = ours.other_dtype == "bfloat16"
    questions = [question for step in steps for question in step]
    rows = len(steps[0]) * settings.rollouts
    prompt_tokens = max(len(ours.lm.codec.prompt(question.question)) for question in questions)
    at_once = rows_at_once(rows, prompt_tokens + completion_tokens, settings.micro_tokens)
    arguments = GRPOConfig(
        # Nothing is saved there.
        output_dir=tempfile.gettempdir(),
        use_cpu=ours.lm.network.device.type == "cpu",
        bf16=is_bfloat16,
        gradient_checkpointing=False,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=rows // at_once,
        num_generations=settings.rollouts,
        max_completion_length=completion_tokens,
        temperature=settings.temperature,
        learning_rate=LEARNING_RATE,
        max_steps=len(steps),
        shuffle_dataset=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset = Dataset.from_list(
        [{"prompt": question.question, "golden": question.golden_answers} for question in questions]
    )
    codec = ours.lm.codec
    policy: Any = AutoModelForCausalLM.from_pretrained(ours.folder, dtype=torch.float32)
    clock = Clock()
    grpo_trainer.shuffle_sequence_dict = sort_by_length
    trainer = Trainer(
        policy,
        lambda completion_ids, golden, **more: rewards(codec, completion_ids, golden),
        arguments,
        dataset,
        processing_class=codec.tokenizer,
        callbacks=[clock],
    )
    trainer.codec = codec
    trainer.remove_callback(PrinterCallback)

    def make_steps() -> Timing:
        trainer.prompt_lengths = []
        trainer.completion_lengths = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        sampled = sum(trainer.completion_lengths)
        lengths = [
            prompt + completion
            for prompt, completion in zip(
                trainer.prompt_lengths, trainer.completion_lengths, strict=True
            )
        ]
        flops = (1 + TRAINING_PASSES) * text_flops(ours.config, lengths, sampled)
        return Timing(clock.seconds, sampled, flops)

    return make_steps


def rows_at_once(rows: int, length: int, limit: int) -> int:
    """Return the largest part of some rows that holds no more than so many tokens.

    Of 240 rows of 100 tokens, 16 are at once with a limit of 1,600.
    """
    fitting = [part for part in range(1, rows + 1) if rows % part == 0 and part * length <= limit]
    return max(fitting, default=1)


def rewards(
    codec: Codec, completions: Sequence[list[int]], golden: Sequence[list[str]]
) -> list[float]:
    """Return 1 for each completion in whose last box a golden answer stands, and 0 else."""
    values = []
    for ids, answers in zip(completions, golden, strict=True):
        box = []
        if codec.boxed_id in ids:
            tail = ids[len(ids) - ids[::-1].index(codec.boxed_id) :]
            box = list(itertools.takewhile(lambda token: token not in codec.eos_ids, tail))
        values.append(exact_match(codec.decode(box), answers))
    return values
