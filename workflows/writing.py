"""What a model writes after a prompt, without a script around it."""

from collections.abc import Sequence

from common.settings import RolloutSettings
from data.trajectory import Role, Trajectory
from model import LM
from workflows.agent import Answered
from workflows.batches import in_batches


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

    def write(numbers: list[int], search: None) -> list[Answered]:
        batch = [prompts[number] for number in numbers]
        ids, _ = lm.decoder(batch).decode(stops, [budget] * len(batch), 0.0)
        answered = []
        for prompt, new_ids in zip(batch, ids, strict=True):
            trajectory = Trajectory()
            trajectory.add(list(prompt), Role.PROMPT, 0)
            trajectory.add(new_ids, Role.ANSWER, 1)
            words = [token for token in new_ids if token not in lm.codec.eos_ids]
            answered.append(Answered(lm.codec.decode(words), trajectory))
        return answered

    return in_batches(prompts, write, settings.batch_rows, description=description)
