"""Texts of different lengths, in groups that a network takes at once."""

from collections.abc import Sequence

from common import ranks

# Logits that are held at once in training: half a GB of float32.
LOGITS_AT_ONCE = 1 << 27
MOST_PADDING = 0.15  # of a group of rows
FREE_PADDING = 64  # tokens of padding that a small group may have all the same


def group_by_tokens(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Return row numbers, shortest first, in groups that a network can take at once.

    lengths: tokens of each row.
    limit: tokens of a group at most, padding included; a longer row is a group of its own. A group
        also ends before its padding would be more than MOST_PADDING of it.
    """
    groups: list[list[int]] = []
    group: list[int] = []
    tokens_in_group = 0
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        length = lengths[row]
        area = (len(group) + 1) * length
        padding = area - tokens_in_group - length
        if group and (area > limit or padding > max(MOST_PADDING * area, FREE_PADDING)):
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


def tokens_of_logits(vocab_size: int) -> int:
    """Return of how many tokens the logits are held at once in training."""
    return max(1, LOGITS_AT_ONCE // vocab_size)


def own_micro_batches(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Return numbers of the texts whose gradient this process computes, in groups as above.

    lengths: tokens of each text of an optimizer step; all processes give the same.
    """
    own = deal_by_tokens(lengths, ranks.count())[ranks.rank()]
    groups = fill_by_tokens([lengths[number] for number in own], limit)
    return [[own[place] for place in group] for group in groups]


def deal_by_tokens(lengths: Sequence[int], shares: int) -> list[list[int]]:
    """Return numbers of texts, in order, in shares of about as many tokens each."""
    tokens = [0] * shares
    numbers: list[list[int]] = [[] for _ in range(shares)]
    # The longest first, each to the share that has the least.
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        least = tokens.index(min(tokens))
        tokens[least] += lengths[number]
        numbers[least].append(number)
    return [sorted(share) for share in numbers]
