"""Rows of different lengths, grouped so that little padding goes through the network."""

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
