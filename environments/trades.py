"""What is paid for what: exact match beside a second figure, and the file that holds both.

`python -m environments.trade_offs` measures them and plot.py draws them.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from common.files import parse_json, refusing_damage
from evaluation.figures import Estimate

TRADE_OFFS_FILE = "trade_offs.json"  # in the folder of a run


@dataclass
class TradePoint:
    """One stage."""

    folder: str
    label: str  # value of the setting
    x: float  # the second figure, mean over runs
    em: Estimate  # percent


@dataclass
class TradeOff:
    """EM against a second figure along one setting."""

    title: str
    x_title: str
    lines: dict[str, list[TradePoint]]  # name of a line -> its points


@dataclass
class TradeOffs:
    """The content of trade_offs.json."""

    runs: list[str]
    start_em: float  # of SFT-1&2, percent
    trade_offs: list[TradeOff]


def trade_offs_to_json(trade_offs: TradeOffs) -> str:
    """Return the text of trade_offs.json."""
    return json.dumps(asdict(trade_offs), indent=1, allow_nan=False) + "\n"


def read_trade_offs(path: Path) -> TradeOffs:
    """Return what a trade_offs.json holds. Raises UserError for another file."""
    refusal = (
        f"{path}: not what environments/trade_offs.py writes; "
        f"make it again with: python -m environments.trade_offs --run={path.parent.name}"
    )
    with refusing_damage(refusal):
        content = parse_json(path.read_text(encoding="utf-8"))
        trade_offs = []
        for values in content.pop("trade_offs"):
            lines = {
                name: [TradePoint(**(point | {"em": Estimate(**point["em"])})) for point in points]
                for name, points in values.pop("lines").items()
            }
            trade_offs.append(TradeOff(**values, lines=lines))
        return TradeOffs(**content, trade_offs=trade_offs)
