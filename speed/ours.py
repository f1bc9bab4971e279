"""This project, asked for the same as a library."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import model
from autocoa import nll_loss, random_stream, rollout
from data.batches import build_trie, language_batches
from data.trajectory import Role, Trajectory
from model import LM
from speed.flops import ADAPTER_PASSES, TRAINING_PASSES, text_flops, trie_flops
from speed.pairs import Timing
from speed.settings import BenchSettings
from tools import Library

LEARNING_RATE = 1e-5


class Ours:
    """The network of a stage, and what is timed with it."""

    def __init__(self, lm: LM, folder: Path, settings: BenchSettings) -> None:
        self.lm = lm
        self.config = lm.network.config
        self.folder = folder
        self.settings = settings

    @property
    def dtype(self) -> str:
        """The number type that the network computes with."""
        return str(self.lm.network.dtype).split(".")[-1]

    @property
    def other_dtype(self) -> str:
        """The number type of the other side."""
        return self.settings.other_dtype or self.dtype

    def answer(self, prompt: list[int], count: int) -> Timing:
        """Write so many tokens after one prompt, greedily."""
        start = time.perf_counter()
        ids, _ = self.lm.decoder([prompt]).decode([], [count], 0.0)
        seconds = time.perf_counter() - start
        return Timing(seconds, count, text_flops(self.config, [len(prompt) + count], count), ids)

    def sample(self, groups: Sequence[list[int]], count: int) -> Timing:
        """Sample rollouts of some prompts up to their ends, or so many tokens.

        groups: a prompt for each rollout; those of a question stand together.
        """
        rollouts = self.settings.rollouts
        streams = [
            random_stream(count, self.settings.seed, *divmod(number, rollouts))
            for number in range(len(groups))
        ]
        written: list[list[int]] = []
        start = time.perf_counter()
        for first in range(0, len(groups), self.settings.batch_rows):
            rows = slice(first, first + self.settings.batch_rows)
            prompts = groups[rows]
            ids, _ = self.lm.decoder(list(prompts)).decode(
                self.lm.codec.eos_ids,
                [count] * len(prompts),
                self.settings.temperature,
                np.stack(streams[rows]),
            )
            written += ids
        seconds = time.perf_counter() - start
        texts = [prompt + ids for prompt, ids in zip(groups, written, strict=True)]
        tries = [
            build_trie([_as_trajectory(text) for text in texts[first : first + rollouts]])
            for first in range(0, len(texts), rollouts)
        ]
        nodes = sum(len(trie.ids) for trie in tries)
        read_once = sum(len(prompt) for prompt in groups[::rollouts])
        flops = trie_flops(self.config, tries, nodes - read_once)
        return Timing(seconds, sum(map(len, written)), flops, written)

    def run_agents(self, prompts: list[list[int]], search: Library) -> Timing:
        """Roll out an agent on each prompt, greedily."""
        start = time.perf_counter()
        trajectories = rollout(self.lm.decoder, self.lm.codec, prompts, search, self.settings)
        seconds = time.perf_counter() - start
        texts = [trajectory.ids for trajectory in trajectories]
        predicted = sum(sum(trajectory.mask) for trajectory in trajectories)
        flops = text_flops(self.config, list(map(len, texts)), predicted)
        return Timing(seconds, len(texts), flops, texts)

    def training(
        self, steps: Sequence[Sequence[Trajectory]], lora_rank: int
    ) -> Callable[[], Timing]:
        """Return what trains a copy of the network on steps of SFT; a unit is a token with loss.

        lora_rank: of an adapter that is trained in place of all weights; 0: all weights.
        """
        settings = dataclasses.replace(self.settings, lora_rank=lora_rank)
        student = model.load(self.folder, settings)
        student.begin_stage(settings, settings.seed)
        backend = student.backend
        optimizer = backend.Optimizer(student.network, muon=False)

        def train() -> Timing:
            start = time.perf_counter()
            for step in steps:
                batches = language_batches(step, settings.micro_tokens)
                backend.train_step(
                    student.network, optimizer, nll_loss, batches, LEARNING_RATE, muon_lr=0.0
                )
            # A GPU is waited for.
            backend.to_numpy(next(iter(backend.trained_parameters(student.network).values())))
            seconds = time.perf_counter() - start
            passes = ADAPTER_PASSES if lora_rank else TRAINING_PASSES
            return Timing(seconds, *training_work(self, steps, passes))

        return train


def training_work(
    ours: Ours, steps: Sequence[Sequence[Trajectory]], passes: int
) -> tuple[float, float]:
    """Return the tokens with loss of some steps of SFT, and the operations that they take."""
    texts = [text for step in steps for text in step]
    learned = sum(sum(text.mask[1:]) for text in texts)
    lengths = [len(text.ids) for text in texts]
    return learned, passes * text_flops(ours.config, lengths, learned)


def _as_trajectory(ids: list[int]) -> Trajectory:
    """Return ids as a trajectory; for a trie nothing else counts."""
    return Trajectory(ids, [0] * len(ids), [int(Role.THINK)] * len(ids))
