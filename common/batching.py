"""Texts of different lengths, in groups that a network takes at once."""

from collections.abc import Sequence


def group_by_tokens(lengths: Sequence[int], limit: int, waste: float = 0.15) -> list[list[int]]:
    """Return row numbers, shortest first, in groups that a network can take at once.

    lengths: tokens of each row.
    limit: tokens of a group at most, padding included; a longer row is a group of its own.
    waste: a group ends before padding would be more than this share of it (64 tokens are free).
    """
    groups: list[list[int]] = []
    group: list[int] = []
    tokens_in_group = 0
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        length = lengths[row]
        area = (len(group) + 1) * length
        padding = area - tokens_in_group - length
        if group and (area > limit or padding > max(waste * area, 64)):
            groups.append(group)
            group = []
            tokens_in_group = 0
        group.append(row)
        tokens_in_group += length
    if group:
        groups.append(group)
    return groups


def fill_by_tokens(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Return numbers of texts that are packed without padding, in order, in groups.

    lengths: tokens of each text.
    limit: tokens of a group at most; a longer text is a group of its own.
    """
    groups: list[list[int]] = []
    tokens_in_group = 0
    for number, length in enumerate(lengths):
        if not groups or tokens_in_group + length > limit:
            groups.append([])
            tokens_in_group = 0
        groups[-1].append(number)
        tokens_in_group += length
    return groups
