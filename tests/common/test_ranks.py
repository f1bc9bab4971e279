"""Several processes that work on one run (common/ranks.py): together they do what one would do."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_here, run_in_shell, tiny_lm
from processes import DeadProcess, in_processes

import autocoa
import backends.torch as torch_backend
import model
from backends.torch import weights
from common import ranks
from common.errors import UserError, run_guarded
from common.runs import StageRun
from common.settings import StageSettings
from common.signals import Stopped, stopping_on_signals
from common.stage_files import list_checkpoints
from data.batches import Batch, language_batches, pair_batches
from data.questions import Question
from data.rollout_batch import RolloutBatch
from data.trajectory import Codec, Observation, Trajectory
from model import LM
from services.retrieval import Retriever
from train_rl import RLSettings, update_batches


def be_second(patch: pytest.MonkeyPatch) -> None:
    """Let this process be the second of two that have not met yet."""
    patch.setattr(ranks._group, "rank", 1)


# ---- a step of training --------------------------------------------------------------------------
def chains(codec: Codec) -> list[Trajectory]:
    """Return chains of several lengths, which begin alike."""
    return [
        codec.build("Who directed it?", [("think", "I recall Eva Moss." * count), ("answer", "A")])
        for count in (4, 1, 5, 2, 1)
    ]


def rl_batches(lm: LM) -> list[Batch]:
    """Return the tries of two groups of rollouts, one of which is skipped but for KL."""
    codec = lm.codec
    rollouts = chains(codec)[:4] + [codec.build("Who starred in it?", [("answer", "Ada")])] * 4
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    batch = RolloutBatch([Question("1", "", ["A"])] * 2, rollouts, rewards)
    advantages = autocoa.group_advantages(rewards)
    skipped = np.array([False, True])
    settings = RLSettings(kl=0.1, micro_tokens=60)
    return update_batches(batch, np.arange(8), advantages, skipped, lm, settings)


def train_steps(lm: LM) -> dict[str, Any]:
    """Return loss and gradients of a step of each kind, and the weights after it.

    The last kind has one text, which leaves nothing to the second process.
    """
    texts = chains(lm.codec)
    pairs = [(texts[0], texts[1]), (texts[2], texts[3])]
    kinds = {
        "nll": (autocoa.nll_loss, language_batches(texts, 60)),
        "pairs": (autocoa.contrastive_loss, pair_batches(pairs, 60, alpha=0.2)),
        "grpo": (autocoa.grpo_loss, rl_batches(lm)),
        "one text": (autocoa.nll_loss, language_batches(texts[:1], 60)),
    }
    found = {}
    for kind, (loss, batches) in kinds.items():
        network = torch_backend.copy_network(lm.network)
        optimizer = torch_backend.Optimizer(network)
        figures = torch_backend.train_step(network, optimizer, loss, batches, 1e-3, 1e-2)
        parameters = dict(network.named_parameters())
        gradients = {name: weight.grad.numpy() for name, weight in parameters.items()}
        state = {name: weight.detach().numpy() for name, weight in parameters.items()}
        found[kind] = (figures, gradients, state)
    return found


def test_a_step_of_two_processes_is_that_of_one(lm: LM) -> None:
    """Loss and gradient within 1e-5; and both take the same step, to the last bit.

    Guards: a text that both learn or none; a normaliser of one share; a mean over processes.
    """
    alone = train_steps(lm)
    first, second = in_processes(lambda: train_steps(lm))
    for kind, (figures, gradients, _) in alone.items():
        its_figures, its_gradients, its_weights = first[kind]
        for name, value in figures.items():
            assert its_figures[name] == pytest.approx(value, rel=1e-5), (kind, name)
        for name, gradient in gradients.items():
            np.testing.assert_allclose(its_gradients[name], gradient, atol=1e-5)
            assert its_weights[name].tobytes() == second[kind][2][name].tobytes()


# ---- what is divided, and what is told -----------------------------------------------------------
def test_items_are_divided_and_put_together_again() -> None:
    """Each is computed once, equal neighbours by one process, and all results come in order."""
    items = ["a", "a", "b", "c", "c", "c"]

    def compute(numbers: list[int], search: None) -> list[tuple[int, str]]:
        return [(ranks.rank(), items[number]) for number in numbers]

    expected = [(0, "a"), (0, "a"), (1, "b"), (0, "c"), (0, "c"), (0, "c")]
    assert in_processes(lambda: ranks.split(items, compute)) == [expected, expected]


def test_searches_are_made_together() -> None:
    """A tool is asked the queries of all, also where one process searches more often.

    Guards: a process that waits for one that has no more to ask; an answer to another's query.
    """
    asked: list[list[str]] = []

    def search(queries: list[str], trajectories: list[str]) -> list[str]:
        assert queries == trajectories
        asked.append(queries)
        return [f"{query}!" for query in queries]

    def compute(numbers: list[int], shared: Any) -> list[str]:
        answers = []
        for number in numbers:
            answers += shared([str(number)], [str(number)])
        return answers

    def work() -> tuple[list[str], list[list[str]]]:
        return ranks.split(range(3), compute, search), asked

    expected = (["0!", "1!", "2!"], [["0", "1"], ["2"]])
    assert in_processes(work) == [expected, expected]


def test_the_first_asks_services_and_its_errors_are_everyones() -> None:
    """Guards: each process that sends a retrieval server the same requests."""
    tool = Retriever("http://127.0.0.1:1", top_k=1)

    def answer(queries: list[str]) -> list[Observation]:
        if not queries:
            raise UserError("the server is down")
        return [Observation(f"{query}, said {ranks.rank()}") for query in queries]

    def work() -> tuple[str, str]:
        tool._ask = answer
        (observation,) = tool(["Eva"])
        with pytest.raises(UserError) as error:
            tool([])
        return observation.text, str(error.value)

    assert in_processes(work) == [("Eva, said 0", "the server is down")] * 2


# ---- how they end --------------------------------------------------------------------------------
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the step is saved; with --resume they go on after it.

    Guards: a process that waits for ever for one that has stopped.
    """
    monkeypatch.chdir(tmp_path)
    folder = Path("out", "nano", "sft2")

    def work() -> list[int]:
        lm = tiny_lm(codec)
        optimizer = torch_backend.Optimizer(lm.network)
        stage = StageRun(lm, optimizer, folder, StageSettings(), 5)
        steps = []
        with stopping_on_signals():
            try:
                for step in stage.steps():
                    steps.append(step)
                    if step == 1 and ranks.rank() == 1:
                        os.kill(os.getpid(), signal.SIGTERM)
            except Stopped as stopped:
                assert stopped.number == signal.SIGTERM
        return steps

    assert in_processes(work) == [[0, 1]] * 2
    assert [path.name for path in list_checkpoints(folder)] == ["2"]
    assert in_processes(work) == [[2, 3, 4]] * 2


def test_a_process_that_dies_ends_the_others(capsys: pytest.CaptureFixture) -> None:
    """At once, with one line that says how to go on."""

    def work() -> str:
        if ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(ranks.LostRankError) as lost:
            ranks.wait()
        return str(lost.value)

    started = time.monotonic()
    line, dead = in_processes(work)
    assert time.monotonic() - started < 30
    assert "another process has ended" in line
    assert isinstance(dead, DeadProcess)

    def lose() -> None:
        raise ranks.LostRankError(line)

    with pytest.raises(SystemExit) as end:
        run_guarded(lose, can_resume=True)
    assert end.value.code == 2
    assert "--resume" in capsys.readouterr().err


def test_the_first_prints_and_all_say_their_errors(tmp_path: Path) -> None:
    """Guards: each line as often as there are processes; an error of the second that is lost."""
    with pytest.MonkeyPatch.context() as patch:
        be_second(patch)
        done = run_here(tmp_path, "train_rl.py", "--rollouts=1")
    assert done.out == ""
    assert done.err.startswith("process 1: error: --rollouts: ")
    assert list(tmp_path.iterdir()) == []


# ---- what is refused -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("variable", "backend", "way_out"),
    [("MLX_RANK", "torch", "with torchrun"), ("WORLD_SIZE", "mlx", "with mlx.launch")],
)
def test_the_launcher_of_the_other_backend(
    variable: str, backend: str, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: several processes that each train alone, in one folder."""
    monkeypatch.setenv(variable, "2")
    with pytest.raises(UserError, match=way_out):
        model.choose_backend(backend)


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a traceback of CUDA's; and all processes on the first GPU."""
    taken = []
    monkeypatch.setattr(ranks._group, "count", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(weights, "_set_up_cuda", lambda: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert weights.pick_device("auto") == "cuda"
    assert taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="nproc-per-node=2"):
        weights.pick_device("cuda")


ENDS_AT_ONCE = """
import atexit
from torch import distributed
from backends.torch.ranks import join_ranks
from common import ranks

# What is registered first runs last.
atexit.register(lambda: print("still there" if distributed.is_initialized() else "left"))
join_ranks()
for number in range(20):
    assert ranks.gather({"from": [number] * 100}) == [{"from": [number] * 100}] * 2
"""


def test_processes_leave_before_python_ends(tmp_path: Path) -> None:
    """Under torchrun, in a script that ends right after a message: status 0, and nobody waits.

    Guards: threads of messages that let go of a value while Python ends. That aborted the process,
    and a run that was finished looked like one that had failed.
    """
    (tmp_path / "script.py").write_text(ENDS_AT_ONCE)
    done = run_in_shell(
        tmp_path, "-m", "torch.distributed.run", "--nproc-per-node=2", "--", "script.py"
    )
    assert done.status == 0, done.err[-2000:]
    assert done.out.split("\n")[:2] == ["left", "left"]
