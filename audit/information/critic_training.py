"""Training of a critic, and its held-out estimate of the information between images and their representation.

The critic is trained on training images, the step is chosen on validation images (early stopping), and the value is
computed on held-out images.

Source: Belghazi et al. 2018 (MINE); Zhu, Zhang & Evans 2020, section 4.1.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import hypot, isfinite, log, sqrt
from statistics import fmean, stdev

import torch
from torch import Tensor, nn

from audit.flags import FlagCode, flag
from audit.information.bounds import BOUNDS, donsker_varadhan, infonce_terms, offsets
from audit.information.critics import build_critic
from audit.information.encoding import Division, EncodedSplits, Splits, encode_splits, label_surprise
from audit.information.estimator import MIEstimate
from audit.information.settings import CriticTraining
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoded, Encoder, Features, Images

_SEED_OFFSET = 1_000_003  # of the critics of further divisions


def estimate_mi(encoder: Encoder, images: Splits, training: CriticTraining, seed: int) -> MIEstimate:
    """Return the held-out estimate of I(X; g(X)) in nats; raises InvalidModelError if a feature is not finite."""
    return fit_critic(images, encode_splits(encoder, images, training.batch_size), training, seed)[1]


def fit_critic(
    images: Splits, encoded: EncodedSplits, training: CriticTraining, seed: int
) -> tuple[nn.Module, MIEstimate]:
    """Return a critic trained on fixed images and features, at its best validation step, and its held-out estimate."""
    trained = build_critic(
        images.train, encoded.train.features, training.shape, keyed_generator(seed, Purpose.CRITIC_WEIGHTS)
    )
    averaged = copy.deepcopy(trained).requires_grad_(False)
    optimiser = critic_optimiser(trained, training)
    batches = keyed_generator(seed, Purpose.CRITIC_BATCHES)
    curves = _LearningCurves()
    for step in range(training.steps + 1):
        if step % training.every == 0:
            curves.add(step, averaged, _infonce_terms(averaged, images.validation, encoded.validation))
            if step - curves.best_step >= training.patience:
                curves.stopped_early = True
                break
        if step < training.steps:
            value = critic_step(trained, optimiser, images.train, encoded.train.features, training, batches)
            _update_average(averaged, trained, training.averaging, step)
            if step % training.every == 0:
                curves.training_history.append((step, value))
    averaged.load_state_dict(curves.best_weights)
    return averaged.requires_grad_(True), _estimate(averaged, images, encoded, curves)


def estimate_fixed(
    images: Splits, encoded: EncodedSplits, training: CriticTraining, repeats: int, seed: int
) -> MIEstimate:
    """Return the mean held-out estimate of `repeats` critics of fixed images, each with its own division of them."""
    fits = [fit_division(images, encoded, training, seed, number)[1] for number in range(repeats)]
    return _mean(fits, len(images.test) / sum(map(len, images)))


def fit_division(
    images: Splits, encoded: EncodedSplits, training: CriticTraining, seed: int, number: int
) -> tuple[nn.Module, MIEstimate]:
    """Return the critic of the division of this number, and its held-out estimate."""
    division = Division.draw(images, seed, number)
    return fit_critic(division.of(images), division.encoded(encoded), training, seed + _SEED_OFFSET * number)


def _mean(estimates: Sequence[MIEstimate], share: float) -> MIEstimate:
    """Return the mean of estimates by several critics, each evaluated on another `share` of the same images.

    The standard error is that of all images and of the mean over critics. Learning curves are those of the first.
    """
    first, count = estimates[0], len(estimates)
    if count == 1:
        return first
    sampling = fmean(each.stderr for each in estimates) * sqrt(max(share, 1 / count))
    return replace(
        first,
        nats=fmean(each.nats for each in estimates),
        stderr=hypot(sampling, stdev(each.nats for each in estimates) / sqrt(count)),
        validated=fmean(each.validated for each in estimates),
        parts={name: fmean(each.parts[name] for each in estimates) for name in first.parts},
        flags=tuple(dict.fromkeys(flag for each in estimates for flag in each.flags)),
    )


@dataclass
class _LearningCurves:
    """Learning curves of a critic, and the weights with the best validation value."""

    best: float = -torch.inf
    best_error: float = 0.0
    best_step: int = 0
    stopped_early: bool = False
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[tuple[int, float]] = field(default_factory=list)
    training_history: list[tuple[int, float]] = field(default_factory=list)

    def add(self, step: int, critic: nn.Module, terms: Tensor) -> None:
        """Add a validation value, the mean of terms (N,), and keep the weights if it is the best."""
        value = float(terms.mean())
        self.history.append((step, value))
        if value > self.best or not self.best_weights:
            self.best, self.best_step, self.best_weights = value, step, copy.deepcopy(critic.state_dict())
            self.best_error = float(terms.std()) / sqrt(len(terms))


@torch.no_grad()
def _update_average(averaged: nn.Module, trained: nn.Module, decay: float, step: int) -> None:
    """Update the moving average of the weights, with a smaller decay in early steps to discount initial weights."""
    share = 1 - min(decay, (1 + step) / (10 + step)) if decay else 1.0
    torch._foreach_lerp_(list(averaged.parameters()), list(trained.parameters()), share)


def critic_step(
    critic: nn.Module,
    optimiser: torch.optim.Optimizer,
    images: Images,
    features: Features,
    training: CriticTraining,
    batches: torch.Generator,
) -> float:
    """Take one ascent step on a random batch of pairs and return the bound's value on it, in nats."""
    critic.train()
    chosen = torch.randperm(len(images), generator=batches)[: training.batch_size].to(images.device)
    value = BOUNDS[training.bound](critic(images[chosen], features[chosen]))
    optimiser.zero_grad()
    (-value).backward()
    optimiser.step()
    return float(value.detach())


def critic_optimiser(critic: nn.Module, training: CriticTraining) -> torch.optim.Optimizer:
    """Return the AdamW optimiser of a critic."""
    rate, decay = training.learning_rate, training.weight_decay
    fused = next(critic.parameters()).device.type in ("cpu", "cuda")  # other devices may lack the kernel
    return torch.optim.AdamW(critic.parameters(), rate, weight_decay=decay, fused=fused)


@torch.no_grad()
def _infonce_terms(critic: nn.Module, images: Images, encoded: Encoded) -> Tensor:
    critic.eval()
    return infonce_terms(critic(images, encoded.features))


@torch.no_grad()
def _estimate(critic: nn.Module, images: Splits, encoded: EncodedSplits, curves: _LearningCurves) -> MIEstimate:
    critic.eval()
    scores = critic(images.test, encoded.test.features)
    by_critic, by_label = infonce_terms(scores), label_surprise(encoded.test.log_probs)
    # offsets from other images, so that the held-out scores are those of one fixed critic
    ratios = scores - offsets(critic(images.test, encoded.validation.features))[:, None]
    # without log-probabilities the critic's value is kept even if it is negative
    label_entropy_is_larger = encoded.test.log_probs.shape[1] > 0 and bool(by_label.mean() > by_critic.mean())
    terms = by_label if label_entropy_is_larger else by_critic
    count = len(images.test)
    return MIEstimate(
        nats=float(terms.mean()),
        stderr=float(terms.std()) / sqrt(count),
        images=count,
        ceiling=log(count),
        validated=max(curves.best, float(label_surprise(encoded.validation.log_probs).mean())),
        parts={
            "critic": float(by_critic.mean()),
            "labels": float(by_label.mean()),
            "donsker-varadhan": float(donsker_varadhan(ratios)),
        },
        history=tuple(curves.history),
        training_history=tuple(curves.training_history),
        flags=_training_flags(curves, by_critic),
    )


def _training_flags(curves: _LearningCurves, held_out: Tensor) -> tuple[str, ...]:
    """Return the flags of a fit: divergence, too few steps, overfitting; `held_out` are the critic's terms (N,)."""
    values = [value for _, value in curves.history]
    if not all(isfinite(value) for value in values):
        return (flag(FlagCode.NOT_CONVERGED, "the critic's value diverged during training"),)
    flags = []
    if len(values) > 2 and not curves.stopped_early:
        last, best = curves.history[-1][0], curves.best_step
        still_improving = last - best <= curves.history[1][0]
        reason = "the critic was still improving at its last step"
        if not still_improving:
            reason = f"training reached its last step {last} before early stopping; its best step was {best}"
        flags.append(flag(FlagCode.NOT_CONVERGED, reason))
    gain = curves.training_history[-1][1] - curves.training_history[0][1] if curves.training_history else 0.0
    if len(values) > 3 and curves.best_step <= curves.history[2][0] and gain > max(curves.best, 0) + 0.5:
        trained = f"while its training value rose to {curves.training_history[-1][1]:.2f}"
        flags.append(flag(FlagCode.OVER_FITTED, f"the critic was at its best at step {curves.best_step}, {trained}"))
    value, error = float(held_out.mean()), float(held_out.std()) / sqrt(len(held_out))
    if curves.best - value > 3 * hypot(error, curves.best_error):
        reason = f"the held-out value {value:.2f} is far below the validation value {curves.best:.2f}"
        flags.append(flag(FlagCode.OVER_FITTED, reason))
    return tuple(flags)
