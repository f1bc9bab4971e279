"""Weights and optimizer states that come from files: read, and compared with what is expected."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import weight_files

Shape = tuple[int, ...]
FLOAT_TYPES = ("float16", "bfloat16", "float32", "float64")


def read_shards(folder: str | Path, load_file: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Return {name: weight} of all weight files of a Hugging Face folder.

    load_file: reads one of them.
    Raises UserError for a file that is missing or cut short.
    """
    weights: dict[str, Any] = {}
    for file in weight_files(folder):
        try:
            weights.update(load_file(str(file)))
        # Each library has exceptions of its own.
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"model: {file} can't be read: {reason}; copy it again") from None
    return weights


def fitting_weights(
    weights: Mapping[str, Any], shapes: Mapping[str, Shape], tied: bool, source: object
) -> dict[str, Any]:
    """Return the weights that a network has parameters for: all of them, but for what is no weight.

    shapes: of the network's parameters, by name.
    tied: whether the head is the embedding, so that a head in the checkpoint is a copy of it.
    source: where the weights come from, for messages.
    Raises UserError with the parameter that is missing, not known, packed or of another shape.
    """
    fitting = {}
    for name, weight in weights.items():
        is_copy = tied and name == "lm_head.weight"
        # Rotary frequencies follow from config.json.
        if not is_copy and not name.endswith("rotary_emb.inv_freq"):
            fitting[name] = weight
    unmatched = sorted(shapes.keys() ^ fitting.keys())
    if unmatched:
        name = unmatched[0]
        fault = "missing" if name in shapes else "not one of this architecture"
        raise UserError(f"model: {source}: parameter {name} is {fault}")
    for name, shape in shapes.items():
        weight = fitting[name]
        if str(weight.dtype).rpartition(".")[2] not in FLOAT_TYPES:
            raise UserError(
                f"model: {source}: {name} holds {weight.dtype}, packed weights that config.json "
                "says nothing of; take the checkpoint they were made of, and --bits=4"
            )
        if tuple(weight.shape) != shape:
            raise UserError(
                f"model: {source}: {name} has shape {tuple(weight.shape)}, config.json says {shape}"
            )
    return fitting


def check_optimizer_state(state: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """Raise KeyError for an entry that one of the two lacks, or that has another shape.

    state: what an optimizer saved, with its step count.
    shapes: of the moments that an optimizer has, by name.
    """
    for name in sorted(shapes.keys() | (state.keys() - {"step"})):
        if name not in shapes or name not in state or tuple(state[name].shape) != shapes[name]:
            raise KeyError(name)
