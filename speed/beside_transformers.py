"""The transformers library with the weights of a folder: generate, and training on padded rows."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from data.trajectory import Trajectory
from speed.agents import Generate
from speed.flops import TRAINING_PASSES, text_flops
from speed.ours import LEARNING_RATE, Ours, training_work
from speed.pairs import Timing

NO_LABEL = -100  # of a token without loss, by the library's convention


class Transformers:
    """The library, asked for the same as ours."""

    name = "transformers"

    def __init__(self, ours: Ours) -> None:
        # Weights are read in no time.
        logging.disable_progress_bar()
        self.ours = ours
        self.codec = ours.lm.codec
        self.device = ours.lm.network.device
        self.dtype = getattr(torch, ours.other_dtype)
        network: Any = AutoModelForCausalLM.from_pretrained(ours.folder, dtype=self.dtype)
        self.network = network.eval().to(self.device)

    def answer(self, prompt: list[int], count: int) -> Timing:
        """Write so many tokens after one prompt, greedily."""
        self.network.generation_config.eos_token_id = None
        start = time.perf_counter()
        ids = torch.tensor([prompt], device=self.device)
        output = self._generate(ids, torch.ones_like(ids), count, stops=None)
        texts = output.sequences[:, len(prompt) :].tolist()
        seconds = time.perf_counter() - start
        flops = text_flops(self.ours.config, [len(prompt) + count], count)
        return Timing(seconds, count, flops, texts)

    def sample(self, groups: Sequence[list[int]], count: int) -> Timing:
        """Sample rollouts of some prompts up to their ends, or so many tokens."""
        stops = list(self.codec.eos_ids)
        rows_at_once = self.ours.settings.batch_rows
        written: list[list[int]] = []
        start = time.perf_counter()
        for first in range(0, len(groups), rows_at_once):
            ids, mask = _pad_left(groups[first : first + rows_at_once], self.device)
            output = self._generate(
                ids,
                mask,
                count,
                stops,
                do_sample=True,
                temperature=self.ours.settings.temperature,
                # By default the library draws from the 50 likeliest tokens.
                top_k=0,
                top_p=1.0,
            )
            written += self._up_to_stop(output.sequences[:, ids.shape[1] :], stops)
        seconds = time.perf_counter() - start
        lengths = [len(prompt) + len(ids) for prompt, ids in zip(groups, written, strict=True)]
        tokens = sum(map(len, written))
        return Timing(seconds, tokens, text_flops(self.ours.config, lengths, tokens), written)

    def generation(self) -> Generate:
        """Return a generation of rows that keeps the cache of the turn before."""
        stops = [*self.codec.eos_ids, self.codec.end_search_id]
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
            output = self._generate(ids, mask, max(budgets), stops, past_key_values=cache)
            written = self._up_to_stop(output.sequences[:, ids.shape[1] :], stops)
            own = torch.zeros(len(rows), output.sequences.shape[1] - ids.shape[1])
            for number, row in enumerate(written):
                own[number, : len(row)] = 1
            last_turn["rows"] = rows
            last_turn["ids"] = output.sequences
            last_turn["mask"] = torch.cat([mask, own.to(mask)], 1)
            last_turn["cache"] = output.past_key_values
            return [row[:budget] for row, budget in zip(written, budgets, strict=True)]

        return generate

    def _generate(
        self, ids: Tensor, mask: Tensor, count: int, stops: list[int] | None, **options: Any
    ) -> Any:
        """Write at most so many tokens on rows that are padded on their left."""
        settings = {"do_sample": False, **options}
        with torch.no_grad():
            return self.network.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=count,
                eos_token_id=stops,
                pad_token_id=0,
                return_dict_in_generate=True,
                **settings,
            )

    def _up_to_stop(self, written: Tensor, stops: list[int]) -> list[list[int]]:
        """Return what each row wrote up to its first stop; after it generate pads."""
        is_stop = torch.isin(written, torch.tensor(stops, device=self.device))
        lengths = (is_stop.cumsum(1) - is_stop.long() == 0).sum(1).tolist()
        return [row[:length] for row, length in zip(written.tolist(), lengths, strict=True)]

    def training(self, steps: Sequence[Sequence[Trajectory]]) -> Callable[[], Timing]:
        """Return what trains all weights on some steps of SFT, a step's texts as padded rows."""
        student: Any = AutoModelForCausalLM.from_pretrained(self.ours.folder, dtype=torch.float32)
        student = student.to(self.device).train()
        optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE)
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

        def train_step(step: Sequence[Trajectory]) -> None:
            optimizer.zero_grad()
            learned = sum(sum(text.mask[1:]) for text in step)
            for texts in padded_batches(step, self.ours.settings.micro_tokens):
                ids, mask, labels = _pad_right(texts, self.device)
                with autocast:
                    loss = student(
                        input_ids=ids,
                        attention_mask=mask,
                        labels=labels,
                        num_items_in_batch=learned,
                    ).loss
                loss.backward()
                # A trainer logs the loss; and so a GPU is waited for, as on our side.
                loss.item()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()

        def train() -> Timing:
            start = time.perf_counter()
            for step in steps:
                train_step(step)
            # A GPU is waited for.
            next(student.parameters()).flatten()[0].item()
            seconds = time.perf_counter() - start
            return Timing(seconds, *training_work(self.ours, steps, TRAINING_PASSES))

        return train


def padded_batches(step: Sequence[Trajectory], limit: int) -> list[list[Trajectory]]:
    """Return the texts of a step as they come, in batches of so many tokens, padding included."""
    batches: list[list[Trajectory]] = []
    longest = 0
    for text in step:
        longest = max(longest, len(text.ids))
        if not batches or (len(batches[-1]) + 1) * longest > limit:
            batches.append([])
            longest = len(text.ids)
        batches[-1].append(text)
    return batches


def _pad_left(rows: Sequence[list[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask of some rows: tensors of (rows, tokens)."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        start = longest - len(row)
        ids[number, start:] = torch.tensor(row)
        mask[number, start:] = 1
    return ids.to(device), mask.to(device)


def _pad_right(texts: Sequence[Trajectory], device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, attention mask and labels of some texts: tensors of (rows, tokens)."""
    longest = max(len(text.ids) for text in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, NO_LABEL)
    for row, text in enumerate(texts):
        end = len(text.ids)
        ids[row, :end] = torch.tensor(text.ids)
        mask[row, :end] = 1
        is_learned = torch.tensor(text.mask) > 0
        labels[row, :end][is_learned] = ids[row, :end][is_learned]
    return ids.to(device), mask.to(device), labels.to(device)
