"""What a model writes after a prompt, without a script around it."""

from collections.abc import Sequence

from common import ranks
from common.progress import progress_bar
from common.settings import RolloutSettings
from data.trajectory import Role, Trajectory
from model import LM
from workflows.agent import Answered


def continue_prompts(
    lm: LM,
    prompts: Sequence[list[int]],
    stops: list[int],
    budget: int,
    settings: RolloutSettings,
    description: str | None = None,
) -> list[Answered]:
    """Return what the model writes after each prompt: up to a stop id, or `budget` tokens.

    Several processes share the prompts.
    """

    def write(share: list[int], search: None) -> list[Answered]:
        answered = []
        with progress_bar(len(share), description, "question") as bar:
            for start in range(0, len(share), settings.batch_rows):
                batch = [prompts[number] for number in share[start : start + settings.batch_rows]]
                ids, _ = lm.decoder(batch).decode(stops, [budget] * len(batch), 0.0)
                for prompt, new_ids in zip(batch, ids, strict=True):
                    trajectory = Trajectory()
                    trajectory.add(list(prompt), Role.PROMPT, 0)
                    trajectory.add(new_ids, Role.ANSWER, 1)
                    words = [token for token in new_ids if token not in lm.codec.eos_ids]
                    answered.append(Answered(lm.codec.decode(words), trajectory))
                bar.update(len(batch))
        return answered

    return ranks.split(prompts, write)
