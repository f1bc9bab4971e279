"""Decoding on a GPU: each row has a slot of its own, and nothing waits for the CPU.

A GPU computes a step of hundreds of rows in the time that a CPU needs to ask for it. So what
`backends/decoder.py` decides on the CPU at each token stays on the device here: positions, which
rows run, and which ids end a row, as a table over the vocabulary. The CPU looks only now and then
whether any row is still writing. All shapes are the same in each step, so that CUDA can record the
calls of one and repeat them (a CUDA graph).

Rows that are one text are not read as one here, but for their prompts: to see whether they part,
the CPU would have to look at each token. The tokens are the same either way.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backends.decoder import SamplingParams
from backends.torch.network import Transformer

# Tokens between two looks at which rows still write. Those after the end of a row are not kept.
STEPS_BETWEEN_LOOKS = 8
# Tokens that the cache has room for at a time; then it grows, and a step is recorded anew.
STEPS_OF_A_CACHE = 128
# A step is recorded where so many are left at least, an estimate. To record waits for the GPU, and
# gives back the memory that PyTorch holds for later.
STEPS_WORTH_A_GRAPH = 24


class FixedSlots:
    """The state of rows that write, on the device; `step` is one token of all of them.

    position: (rows,), of the token that is read next.
    running: (rows,), which rows still write.
    ids, logprobs: (rows, steps), what they wrote; an id is -1 where a row did not run.
    """

    def __init__(self, network: Transformer, sampling: SamplingParams, length: np.ndarray) -> None:
        """Bring all that the steps need to the device.

        length: (rows,), tokens of each row that are in the cache.
        """
        stops_of_row, limits, temperatures, uniforms = sampling
        device = network.device

        def upload(values: np.ndarray) -> Tensor:
            # A copy: positions grow, and the arrays are the caller's.
            return torch.tensor(values, device=device)

        rows = len(limits)
        steps = int(limits.max())
        if uniforms is None:
            uniforms = np.zeros((rows, steps))
        self.longest = int(length.max())
        self.limits = upload(limits)
        self.position = upload(length)
        self.any_greedy = bool((temperatures == 0).any())
        self.all_greedy = bool((temperatures == 0).all())
        self.is_greedy = upload(temperatures == 0)
        # Dividing by 1 changes nothing, where dividing by 0 would.
        self.divisors = upload(np.where(temperatures == 0, 1, temperatures))[:, None]
        self.uniforms = upload(uniforms[:, :steps].astype(np.float32))
        kinds = {stops: kind for kind, stops in enumerate(dict.fromkeys(stops_of_row))}
        vocab_size = network.config.vocab_size
        is_stop = np.zeros((len(kinds), vocab_size), dtype=bool)
        for stops, kind in kinds.items():
            # A checkpoint may name ids that it has no token for.
            is_stop[kind, [stop for stop in stops if 0 <= stop < vocab_size]] = True
        self.is_stop = upload(is_stop)
        self.kind_of_row = upload(np.array([kinds[stops] for stops in stops_of_row]))
        self.rows = torch.arange(rows, device=device)
        self.running = torch.ones(rows, dtype=torch.bool, device=device)
        self.steps_done = torch.zeros(1, dtype=torch.int64, device=device)
        self.ids = torch.full((rows, steps), -1, device=device)
        self.logprobs = torch.zeros((rows, steps), device=device)

    def step(
        self,
        logits: Tensor,
        draw: Callable[[Tensor, Tensor, Tensor], Tensor],
        read: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Write a token in each row that runs, and read it into the cache; changes `logits`.

        logits: (rows, vocab), float32, of the token that comes next.
        draw: tokens by log-probabilities, rows and uniforms.
        read: the logits after tokens (rows,) at positions (rows,).
        """
        logprobs = (logits / self.divisors).log_softmax(-1)  # (rows, vocab)
        if self.all_greedy:
            tokens = logprobs.argmax(-1)
        else:
            uniforms = self.uniforms.index_select(1, self.steps_done)[:, 0]
            tokens = draw(logprobs, self.rows, uniforms)
            if self.any_greedy:
                tokens = torch.where(self.is_greedy, logprobs.argmax(-1), tokens)

        written = tokens.masked_fill(~self.running, -1)
        self.ids.index_copy_(1, self.steps_done, written[:, None])
        self.logprobs.index_copy_(1, self.steps_done, logprobs.gather(1, tokens[:, None]))
        self.steps_done += 1

        stopped = self.is_stop[self.kind_of_row, tokens]
        self.running &= ~stopped & (self.steps_done < self.limits)

        # A row that does not run writes beyond its end, where nobody looks.
        next_logits = read(tokens, self.position)
        logits.copy_(torch.where(self.running[:, None], next_logits, logits))
        self.position += self.running

    def run(
        self,
        step: Callable[[], None],
        fewest: int,
        make_room: Callable[[int], None],
        download: Callable[[Tensor], Any],
    ) -> int:
        """Write until no more than `fewest` rows do; return how many steps were made.

        step: makes one step of all rows.
        make_room: lets the cache have so many positions.
        download: waits for the device, and brings a tensor to the CPU.
        """
        most = self.ids.shape[1]
        for start in range(0, most, STEPS_OF_A_CACHE):
            end = min(start + STEPS_OF_A_CACHE, most)
            make_room(self.longest + end + 1)
            make_step = step
            done = start
            while done < end:
                steps = min(STEPS_BETWEEN_LOOKS, end - done)
                for _ in range(steps):
                    make_step()
                done += steps
                if int(download(self.running.sum())) <= fewest:
                    return done
                # Libraries have chosen their kernels in the first steps.
                is_first_look = done == start + STEPS_BETWEEN_LOOKS
                if is_first_look and end - done >= STEPS_WORTH_A_GRAPH and self.ids.is_cuda:
                    make_step = record(step)
        return most


def record(step: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels of a step as a CUDA graph; what is returned repeats it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
