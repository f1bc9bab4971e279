"""What `python -m data.show` prints of files that others wrote."""

import json

from data.show import show


def test_both_sides_of_a_pair_are_shown(tmp_path, capsys):
    """The beginning is grey; what is chosen and what is rejected are green, a line each."""
    row = {
        "conversation": [{"from": "human", "value": "Who?<think> Hm"}],
        "chosen": {"from": "gpt", "value": "so"},
        "rejected": {"from": "gpt", "value": "no"},
    }
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([row]))
    show(path, 1)
    expected = "\x1b[90mWho?<think> Hm\n\x1b[1;32m+ so\n- no\x1b[0m\n"
    assert capsys.readouterr().out == expected


def test_a_file_of_others_does_not_steer_the_terminal(tmp_path, capsys):
    """Its escape sequences are taken out; only those of the colours are printed."""
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": [{"content": "a \x1b[2J\x9b2J\x85 b"}]}))
    show(path, 1)
    assert capsys.readouterr().out == "\x1b[1;32ma [2J2J b\x1b[0m\n"
