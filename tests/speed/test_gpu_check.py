"""The checks of a GPU, at a tiny size on a CPU."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

import backends.torch as torch_backend
from backends.torch.fixed_slots import STEPS_BETWEEN_LOOKS, STEPS_WORTH_A_GRAPH
from common.memory import training_bytes
from speed import check_training, gpu_check
from speed.check_training import CPU_SIZES, LOSSES, Place, repeat_step, take_step
from speed.findings import Finding, run_checks
from speed.gpu_check import (
    CHECKS,
    GPU_SIZES,
    activation_bytes,
    compare_ways_to_write,
    count_launches,
    open_place,
    run_bench,
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Return the CPU, at a tiny size."""
    return open_place("cpu", tmp_path)


def test_all_checks_pass_on_a_cpu(place: Place, tmp_path: Path) -> None:
    """The script that runs on a GPU is the same, so that what breaks it is found here."""
    findings = run_checks(CHECKS, place, tmp_path / "report.json")
    assert [finding for finding in findings if finding.passed is False] == []
    checked = [finding.check for finding in findings if finding.passed]
    ways = [name for name in checked if name.startswith("two steps of")]
    # One in seven of 60.
    assert len(ways) == 9
    assert {name.split()[3].rstrip(",") for name in ways} == set(LOSSES)
    assert {
        "loss, CPU and device: how far apart",
        "a checkpoint goes on, on the CPU",
        "step 0 of two runs of one seed: weights after it",
        "launches of kernels and graphs, a token",
        "texts that CPU and device sample alike",
        "texts that shared and fixed slots write greedily alike",
    } <= set(checked)
    assert len(json.loads((tmp_path / "report.json").read_text())) == len(findings)
    ended = [finding for finding in findings if finding.check.startswith("seconds of")]
    assert len(ended) == len(CHECKS)


def test_launches_are_those_of_a_token(place: Place) -> None:
    """They do not depend on how long the prompts are, and on how many tokens are written.

    Guards: the network's copy for decoding, the prompts and the first steps, counted as tokens.
    """

    def operations(length: int, decoded: int) -> str:
        place.sizes = replace(CPU_SIZES, length=length, decoded=decoded)
        return list(count_launches(place))[-1].seen

    assert operations(12, 4) == operations(30, 12)


def test_too_many_launches_are_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up counts, since a CPU launches nothing: three kernels and a wait at each token.

    Guards: limits that nothing could exceed.
    """

    def count_calls(_place: Any, _lm: Any, tokens: int) -> dict[str, int]:
        return {
            "cudaLaunchKernel": 100 + 3 * tokens,
            "cudaStreamSynchronize": tokens,
            "aten::mm": 9,
        }

    monkeypatch.setattr(gpu_check, "_count_calls", count_calls)
    launches, waits, operations = count_launches(place)
    assert (launches.seen, launches.passed) == ("3", False)
    assert (waits.seen, waits.passed) == ("1", False)
    assert operations.seen == "0"


def test_launches_are_counted_of_recorded_steps() -> None:
    """Both texts of the count are long enough for a graph, or it would be counted in one alone."""
    shorter = GPU_SIZES.decoded // 2
    assert shorter - STEPS_BETWEEN_LOOKS >= STEPS_WORTH_A_GRAPH


def test_a_way_of_training_that_breaks(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a finding of its own, and the other ways are tried all the same."""

    def take_half(lm: Any, loss: str, *others: Any) -> dict[str, float]:
        if loss == "nll":
            raise RuntimeError("invalid dtype for bias")
        return take_step(lm, loss, *others)

    monkeypatch.setattr(check_training, "take_step", take_half)
    findings = list(check_training.train_in_all_ways(place))
    assert len(findings) == 9
    broken = [finding for finding in findings if not finding.passed]
    assert broken
    for finding in broken:
        assert finding.check.startswith("two steps of nll")
        assert finding.seen == "RuntimeError: invalid dtype for bias"


def break_gradient(step: int) -> Callable[..., Any]:
    """Return an optimizer's step that is another one in the second run of a seed."""
    take = torch_backend.Optimizer.step
    steps = []

    def other_step(optimizer: Any, gradients: Any, *rates: float) -> None:
        steps.append(optimizer)
        if len(steps) == step:
            name = next(iter(gradients))
            gradients[name] = -gradients[name]
        take(optimizer, gradients, *rates)

    return other_step


def test_a_step_that_is_not_repeated_is_found(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a comparison of losses alone, which are those before the step."""
    monkeypatch.setattr(torch_backend.Optimizer, "step", break_gradient(step=2))
    loss, norm, weights = repeat_step(place)
    assert [loss.passed, norm.passed, weights.passed] == [True, True, False]


def test_activations_stay_below_their_bound(place: Place, tmp_path: Path) -> None:
    """A training step on a CPU holds more than half of it and not more, by torch's own count.

    Guards: a bound that nothing could pass, or that nothing could fail.
    """
    place.sizes = replace(CPU_SIZES, width=256, layers=4, texts=8, length=64)
    lm = place.large_network()
    optimizer = lm.backend.Optimizer(lm.network, muon=False)
    take_step(lm, "nll", place.texts(), 1e-4, optimizer)
    lm.network.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        take_step(lm, "nll", place.texts(), 1e-4, optimizer)
    trace = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(trace))
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in json.loads(trace.read_text())["traceEvents"]
        if event.get("name") == "[memory]"
    ]
    held = 0
    peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    gradients = training_bytes(lm.network.config, place.settings(), False, 4)["gradients"]
    bound = activation_bytes(lm.network.config, tokens=8 * 64)
    assert bound / 2 < peak - gradients < bound


def test_slots_that_read_the_wrong_place_are_found(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards: a network that repeats one token, and so writes the same wherever it looks."""
    read = torch_backend.Decoder._read_in_all_slots

    def read_elsewhere(decoder: Any, tokens: Any, positions: Any) -> Any:
        return read(decoder, tokens, positions - 1)

    monkeypatch.setattr(torch_backend.Decoder, "_read_in_all_slots", read_elsewhere)
    findings = {finding.check: finding.passed for finding in compare_ways_to_write(place)}
    assert findings.pop("texts that shared and fixed slots write greedily alike") is False
    assert findings.pop("texts that shared and fixed slots sample alike") is False
    assert findings["texts that CPU and device sample alike"]


@pytest.mark.slow
def test_bench_is_a_part_of_the_check(place: Place) -> None:
    """A tiny agent is trained and timed beside transformers, as on a GPU."""
    options = ["--repeats=1", "--questions=2", "--rollouts=2", "--only=answer,sft"]
    findings: list[Finding] = list(run_bench(place, ["--width=64", "--layers=1"], options))
    assert [finding.check for finding in findings] == [
        "bench.py: answer, times as fast as transformers",
        "bench.py: sft, times as fast as transformers",
    ]
