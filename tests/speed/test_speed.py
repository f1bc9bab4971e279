"""bench.py's own part: ratios of pairs, counted operations, other trees."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import backends.torch as torch_backend
from common.errors import UserError
from common.files import write_jsonl
from data.batches import build_trie
from data.trajectory import Role, Trajectory
from model import LM
from speed import flops
from speed.against import time_stage
from speed.flops import forward_flops, text_flops, trie_flops
from speed.ours import Ours
from speed.pairs import Ceilings, Comparison, Timing, line_of, take_turns, to_json
from speed.serving import measure
from speed.settings import BenchSettings
from speed.trees import Tree, check_out


def text(ids: list[int]) -> Trajectory:
    """Return a text in which nothing is learned."""
    return Trajectory(ids, [0] * len(ids), [int(Role.THINK)] * len(ids))


def test_ratios_are_of_pairs_that_take_turns() -> None:
    """The machine is three times as slow for a whole pair: its ratio is that of the others.

    Guards: medians of each side divided by each other, and a first turn that counts.
    """
    seconds = {"ours": [9.0, 1.0, 3.0, 1.0], "theirs": [90.0, 2.0, 6.0, 4.0]}
    turns = []

    def side(name: str) -> Timing:
        turns.append(name)
        return Timing(seconds[name].pop(0), units=10, flops=2e9)

    comparison = take_turns("sft", "token", "x", lambda: side("ours"), lambda: side("theirs"), 3)
    assert turns == ["ours", "theirs"] * 4
    assert vars(comparison.ratio) == {"median": 2.0, "lowest": 2.0, "highest": 4.0}
    ceilings = Ceilings(ours=4.0, theirs=2.0)
    row = to_json(comparison, ceilings)
    assert row["ours"]["seconds_per_unit"] == {"median": 0.1, "lowest": 0.1, "highest": 0.3}
    assert (row["ours"]["gflops"], row["ours"]["share_of_ceiling"]) == (2.0, 0.5)
    # The other side may compute in another number type, and has a ceiling of its own.
    gflops = row["theirs"]["gflops"]
    assert row["theirs"]["share_of_ceiling"] == gflops / 2
    line = line_of(comparison, ceilings)
    assert "2.00 (2.00-4.00)" in line
    assert f"{gflops:.1f} ({gflops / 2:.0%})" in line


def test_a_ratio_is_by_the_unit() -> None:
    """The other side takes as long for half as many tokens."""
    pairs = [(Timing(1.0, 200, 0.0), Timing(1.0, 100, 0.0))]
    assert Comparison("sampling", "token", "x", pairs).ratio.median == 2.0


def test_a_slow_product_ends_the_search_for_the_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """No larger matrices where these are slow already: with MLX on Linux it took minutes."""
    tried = []

    def slow_product(size: int, _dtype: str, _device: str) -> Callable[[], None]:
        tried.append(size)
        return lambda: time.sleep(1.5 * flops.SLOW_PRODUCT)

    monkeypatch.setattr(flops, "_torch_product", slow_product)
    ceiling = flops.measure_ceiling(torch_backend, "float32", "cpu")
    assert tried == [flops.CPU_SIZES[0]]
    assert ceiling == pytest.approx(2 * tried[0] ** 3 / (1.5 * flops.SLOW_PRODUCT) / 1e9, rel=0.3)


def test_operations_are_two_a_weight_and_token(lm: LM) -> None:
    """By the network's own matrices. Torch's FlopCounterMode says the same, and takes seconds."""
    tokens = 12
    matrices = [weight.numel() for weight in lm.network.parameters() if weight.ndim == 2]
    # Scores of a query and a key, and the sum of values, in 2 layers of 2 heads.
    attention = 2 * 2 * (2 * 2 * 32) * tokens**2
    expected = 2 * tokens * sum(matrices) + attention
    assert forward_flops(lm.network.config, tokens, keys=tokens**2, predicted=tokens) == expected


def test_a_trie_counts_what_is_shared_once(lm: LM) -> None:
    """Equal texts cost what one does, different ones what both do."""
    config = lm.network.config
    same = build_trie([text([1, 2, 3]), text([1, 2, 3])])
    assert trie_flops(config, [same], 1) == text_flops(config, [3], 1)
    different = build_trie([text([1, 2, 3]), text([4, 2, 3])])
    assert trie_flops(config, [different], 2) == text_flops(config, [3, 3], 2)


SCRIPT = """
import json, pathlib, sys
if "--help" in sys.argv:
    print("  --run  --stage --start, --out  --rl2_steps   steps  --temperature --corpus")
else:
    given = dict(argument.split("=") for argument in sys.argv[1:])
    folder = pathlib.Path("out", given["--run"], given["--out"])
    folder.mkdir(parents=True)
    rows = [
        {"seconds": seconds, "tokens": 100, "length": 10.0, "policy_tokens": 5.0,
         "skipped_groups": 1, "given": given}
        for seconds in (50.0, 52.0, 54.0)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""


def test_a_tree_is_timed_by_its_scripts_and_logs(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the settings that it knows, and its first step does not count.

    Guards: a setting that a commit does not have yet, and memory that is got in the first step.
    """
    (tmp_path / "train_rl.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path.parent)
    corpus = f"{tmp_path.name}/train_rl.py"  # any file, as this folder sees it
    given = {"temperature": 0.5, "rl1_environment": "internal", "corpus": corpus}
    tree = Tree(tmp_path, tmp_path, given)
    for _ in range(2):  # the second one takes the place of the first
        rows = tree.train("train_rl.py", "bench", "--stage=rl2", "--rl2_steps=3", "--rl1_pool=rl1")
    known = {"--run": "bench", "--stage": "rl2", "--rl2_steps": "3", "--out": "timed"}
    assert rows[0].values["given"] == known | {
        "--temperature": "0.5",
        "--corpus": str(tmp_path / "train_rl.py"),
    }
    ours = Ours(lm, tmp_path, BenchSettings(questions=2))
    timing = time_stage("rl2", ours, rows)
    assert (timing.seconds, timing.units) == (4.0, 2)
    # Ten rollouts of ten tokens a step; of two groups one is learned, at three passes.
    once = 10 * text_flops(ours.config, [10], 5)
    assert math.isclose(timing.flops, 2 * once * (1 + 3 / 2))


def test_an_unknown_commit_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--against: git.*no-such-commit"):
        check_out("no-such-commit", tmp_path)


def test_a_retrieval_server_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three clients that each ask one query after the other are all answered."""
    monkeypatch.chdir(tmp_path)
    rows = [{"id": str(number), "contents": f'"T{number}"\nIt is x.'} for number in range(9)]
    write_jsonl(tmp_path / "passages.jsonl", rows)
    figures = measure("passages.jsonl", ["T1", "T2"], clients=3, seconds=1.0)
    assert figures["failures"] == 0
    assert figures["requests"] > 10
    assert 0 < figures["seconds_p50"] <= figures["seconds_p99"]
