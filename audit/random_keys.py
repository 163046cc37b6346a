"""Seeded random generators, one independent stream for each seed and purpose."""

from enum import IntEnum, unique

import torch


@unique
class Purpose(IntEnum):
    """The use of a random stream; values are unique, so that two uses never share a stream."""

    LABEL_ATTACK = 1  # adversary: PGD stages of label attacks
    CANDIDATE_NOISE = 2  # adversary: random vertices of the ball
    HUBS = 7  # certificate: initial centres of k-means
    CERTIFICATE_SPLIT = 8  # certificate: split into optimisation and held-out images
    CLASSIFIER_TRAINING = 11  # training: classifiers, batches, shifts and attacks
    CRITIC_SPLIT = 21  # information: mine, train, validation and test images
    CRITIC_WEIGHTS = 22  # information: mine, initial weights
    CRITIC_BATCHES = 23  # information: mine, batches
    MINE_SEARCH = 31  # information: mine, batches of the worst-case search
    MINE_SEARCH_CRITIC = 32  # information: mine, critic updates during the search
    HYPOTHESIS_ORDER = 35  # training: label hypothesis, order of images
    HYPOTHESIS_NOISE = 36  # training: label hypothesis, stochastic encoders
    SANDWICH_READING = 41  # information: sandwich, noise draws of reported values
    SANDWICH_CHOICE = 42  # information: sandwich, noise draws that candidates are compared on
    SANDWICH_SEARCH = 43  # information: sandwich, noise draws of search steps
    SANDWICH_CENTRES = 44  # information: sandwich, initial centres of k-means
    SANDWICH_SCALE = 45  # information: sandwich, noise draws and images that choose the scale of the noise
    CHANNEL_SAMPLE = 51  # calibration: inputs
    CHANNEL_NOISE = 52  # calibration: channel noise
    CHANNEL_MAPS = 53  # calibration: random maps, patterns and networks of channels
    RELEASED_CRITIC = 61  # information: ref-local and ref-mean, initial weights
    RELEASED_BATCHES = 62  # information: ref-local and ref-mean, batches
    PROBE_FOLDS = 65  # information: probes, cross-validation folds
    PROBE_WEIGHTS = 66  # information: initial weights of probes
    EXTERNAL_ATTACK = 71  # adversary: seeds of other libraries
    PIXEL_ORDER = 72  # adversary: order of pixels
    TARGETED_MERGE = 75  # information: label level, PGD towards one answer
    PROBE_STRIDES = 76  # information: label information, random lengths of steps against probes
    PROBE_MIXES = 78  # information: label information, mixtures of rounds
    PROBE_PARTS = 79  # information: label information, parts of a sample whose readings form its learning curve
    EXTERNAL_STARTS = 77  # adversary: starting points for other libraries
    FLOOR_NOISE = 81  # run: smoothing noise of information floors
    CHECK_START = 91  # adversary: starts of gradient checks
    UNBOUNDED_ATTACK = 92  # adversary: check by an attack without a radius
    NETWORK_NOISE = 96  # adversary: a network's own randomness
    TRANSFER_ATTACK = 97  # adversary: transfer attack between classifiers
    CONVERGENCE_CHECK = 98  # adversary: longer against shorter PGD
    HALVING_SEARCH = 99  # adversary: PGD after halving the distance
    MI_TRAINING_ORDER = 101  # training: MI training, order of images
    MI_TRAINING_SHIFTS = 102  # training: MI training, shifts and flips
    MI_TRAINING_STARTS = 103  # training: MI training, random starts of PGD
    MI_TRAINING_CRITIC = 104  # training: MI training, critic weights and dropout
    FEATURE_READING = 111  # attribution: single features, noise draws of reported values
    FEATURE_SEARCH = 112  # attribution: single features, random starts of PGD
    INTERVAL_CHOICE = 121  # attribution: intervals, noise draws that candidates are compared on
    INTERVAL_CENTRES = 122  # attribution: intervals, initial centres of k-means
    INTERVAL_SHIFT = 123  # attribution: intervals, noise draws of mean shift
    RECEPTIVE_FIELD = 131  # attribution: random images and weights
    SALIENCY_DRAWS = 141  # attribution: saliency, noise draws
    HEAD_ORDER = 151  # training: heads, order of images
    HEAD_STARTS = 152  # training: heads, random starts of PGD
    HEAD_WEIGHTS = 153  # training: heads, initial weights and dropout
    HEAD_VALIDATION = 154  # training: heads, PGD for early stopping
    HEAD_FOLDS = 155  # run: halves of the images that the heads of encoders are cross-fitted on
    TRANSFER_CRAFTING = 161  # studies: PGD on substitute networks
    ADAPTIVE_SCORES = 162  # studies: PGD on single hypothesis scores
    FEATURE_DISPLACEMENT = 163  # studies: population, random starts of PGD on features


def keyed_generator(*key: int) -> torch.Generator:
    """Return a CPU generator for a key (seed, purpose, further indices).

    Different keys give independent streams. The same key gives the same stream on every device, with every batch size
    and after a resume.
    """
    state = 0x9E3779B97F4A7C15
    for part in key:
        # splitmix64 decorrelates neighbouring seeds
        state = (state + part + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state % 2**63)
