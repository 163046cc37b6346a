"""Random streams: every use of randomness draws from a generator keyed by a seed and its purpose."""

from enum import IntEnum, unique

import torch


@unique
class Purpose(IntEnum):
    """What a random stream is for. No two purposes share a value, so that no two streams coincide by accident."""

    LABEL_ATTACK = 1
    CANDIDATE_NOISE = 2
    HUBS = 7
    CERTIFICATE_SPLIT = 8
    CLASSIFIER_TRAINING = 11
    CRITIC_SPLIT = 21
    CRITIC_WEIGHTS = 22
    CRITIC_BATCHES = 23
    MINE_SEARCH = 31
    MINE_SEARCH_CRITIC = 32
    HYPOTHESIS_ORDER = 35
    HYPOTHESIS_NOISE = 36
    SANDWICH_READING = 41
    SANDWICH_CHOICE = 42
    SANDWICH_SEARCH = 43
    SANDWICH_CENTRES = 44
    CHANNEL_SAMPLE = 51
    CHANNEL_NOISE = 52
    CHANNEL_PIXELS = 53
    PROBE_FOLDS = 61
    PROBE_WEIGHTS = 62
    RELEASED_CRITIC = 65
    RELEASED_BATCHES = 66
    TARGETED_MERGE = 71
    PROBE_ATTACK = 72
    EXTERNAL_ATTACK = 75
    PIXEL_ORDER = 76
    FLOOR_NOISE = 81
    CHECK_START = 91
    UNBOUNDED_ATTACK = 92
    TRANSFER_ATTACK = 97
    CONVERGENCE_CHECK = 98
    HALVING_SEARCH = 99
    NETWORK_NOISE = 96
    MI_TRAINING_ORDER = 101
    MI_TRAINING_SHIFTS = 102
    MI_TRAINING_STARTS = 103
    MI_TRAINING_CRITIC = 104
    FEATURE_READING = 111
    FEATURE_SEARCH = 112
    INTERVAL_CHOICE = 121
    INTERVAL_CENTRES = 122
    INTERVAL_SHIFT = 123
    RECEPTIVE_FIELD = 131
    SALIENCY_DRAWS = 141
    HEAD_ORDER = 151
    HEAD_STARTS = 152
    HEAD_WEIGHTS = 153
    HEAD_VALIDATION = 154
    TRANSFER_CRAFTING = 161
    ADAPTIVE_SCORES = 162


def keyed_generator(*key: int) -> torch.Generator:
    """Return a CPU generator for a key such as (seed, purpose, restart).

    Different keys give unrelated streams; the same key gives the same stream on every device, batch size and
    resume point.
    """
    state = 0x9E3779B97F4A7C15
    for part in key:
        # splitmix64: neighbouring seeds end up far apart
        state = (state + part + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state % 2**63)
