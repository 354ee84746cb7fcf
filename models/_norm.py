"""The one normalisation that our models use.

BatchNorm mixes the records of a batch, so a record has no gradient of its own, and its running
statistics leave the client un-noised. GroupNorm (Wu and He, 1803.08494) normalises each record by
itself and keeps no statistics.
"""

from torch import nn

SMALLEST_GROUP = 8  # channels: a 1x1 map leaves a group nothing else, and 1 value normalises to 0
MOST_GROUPS = 32  # the paper's default


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a GroupNorm over ``channels`` with as many groups of at least 8 channels as fit.

    The groups are of one size, so their number divides the channels, and are at most 32; fewer than
    8 channels are one group.

    Differences: the paper fixes either 32 groups or 16 channels a group; neither divides the widths
    of MobileNetV3.

    >>> [group_norm(channels).num_groups for channels in (4, 16, 24, 64, 88, 512)]
    [1, 2, 3, 8, 11, 32]
    """
    fitting = (
        groups
        for groups in range(1, MOST_GROUPS + 1)
        if channels % groups == 0 and channels // groups >= SMALLEST_GROUP
    )
    return nn.GroupNorm(max(fitting, default=1), channels)
