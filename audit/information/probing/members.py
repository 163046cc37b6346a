"""Members of the panel: classifiers of features, each fitted on some samples and evaluated on others.

Every member returns log-probabilities of classes; what the panel makes of them is in `panel`.
"""

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from audit.information.probing.neighbours import NeighbourProbe, principal_directions, standard_units
from audit.information.probing.probes import fit_hidden, fit_linear
from audit.information.probing.settings import PanelSettings, ProbeTraining
from audit.types import Encoded, Features, Labels

LogProbs = npt.NDArray[np.float64]
_SMALLEST = 1e-12
_LEAST_DEVIATION = 2e-3  # of principal components, in standardised features


class Readers(NamedTuple):
    """Settings of the members: the panel's and those of its probes."""

    panel: PanelSettings
    probes: ProbeTraining


class Fitted(NamedTuple):
    """A fitted member: its log-probabilities (M, K) at any samples of indices (M,), and `honest` ones (N, K).

    The honest ones are those at the training samples by a fit that left each of them out, None if there are none.
    """

    predict: Callable[[Tensor], LogProbs]
    honest: LogProbs | None = None


class Sample:
    """Features (N, D) as members see them, with labels 0 to K - 1, and the network's log-probabilities if it has any.

    `standard` are the standardised features, `reduced` their whitened principal components where there are more than
    `components` features. No label enters either, so that they are computed from all samples.
    """

    def __init__(self, encoded: Encoded, labels: Labels, components: int) -> None:
        present, self.labels = labels.unique(return_inverse=True)
        self.classes, self._components = len(present), components
        own = of_present_classes(encoded, labels).log_probs
        self.own = own if own.shape[1] else None
        mean, deviation = standard_units(encoded.features)
        self._values = (encoded.features - mean) / deviation

    @cached_property
    def _principal(self) -> tuple[Features, Tensor]:
        directions, sizes = principal_directions(self._values, len(self._values))
        return self._values @ directions, sizes

    @property
    def rotated(self) -> bool:
        """Whether the standardised features are principal components, since there are more features than samples."""
        return self._values.shape[1] > len(self._values)

    @cached_property
    def standard(self) -> Features:
        """Standardised features, rotated to at most N dimensions, which loses nothing."""
        return self._principal[0] if self.rotated else self._values

    @cached_property
    def reduced(self) -> Features:
        """Standardised features, or `components` whitened principal components of more features."""
        if self._values.shape[1] <= self._components:
            return self._values
        principal, sizes = self._principal
        # components of rounding errors would be as large as the others
        kept = max(1, min(self._components, int((sizes > _LEAST_DEVIATION).sum())))
        return principal[:, :kept] / sizes[:kept].clamp_min(_SMALLEST)

    @cached_property
    def reduced_array(self) -> npt.NDArray[np.float64]:
        """The reduced features as an array."""
        return to_array(self.reduced)


def of_present_classes(encoded: Encoded, labels: Labels) -> Encoded:
    """Return an encoding with log-probabilities (N, K) of the K classes that occur among the labels, if it has any."""
    if encoded.log_probs.shape[1] == 0:
        return encoded
    return Encoded(encoded.features, encoded.log_probs[:, labels.unique()].log_softmax(1))


class Member(Protocol):
    """Fits one kind of classifier."""

    def __call__(self, sample: Sample, training: Tensor, readers: Readers, seed: int) -> Fitted:
        """Return the classifier fitted on the samples of indices `training` (M,)."""
        ...


def to_array(values: Tensor) -> npt.NDArray[np.float64]:
    """Return a tensor as a double precision array on the CPU."""
    return values.double().cpu().numpy()


def _linear(sample: Sample, training: Tensor, readers: Readers, seed: int) -> Fitted:  # noqa: ARG001
    # principal components are in the units of standardised features, which is what the penalty is meant for
    probe = fit_linear(
        sample.standard[training],
        sample.labels[training],
        sample.classes,
        readers.probes,
        standardise=not sample.rotated,
    )
    return _of_probe(probe, sample.standard)


def _hidden(sample: Sample, training: Tensor, readers: Readers, seed: int) -> Fitted:  # noqa: ARG001
    probe = fit_hidden(sample.reduced[training], sample.labels[training], sample.classes, readers.probes)
    return _of_probe(probe, sample.reduced)


def _of_probe(probe: nn.Module, features: Features) -> Fitted:
    return Fitted(lambda index: to_array(probe(features[index]).log_softmax(1)))


def _neighbours(sample: Sample, training: Tensor, readers: Readers, seed: int) -> Fitted:  # noqa: ARG001
    features = sample.reduced[training]
    probe = NeighbourProbe(features, sample.labels[training], sample.classes, readers.panel)
    honest = to_array(probe(features, torch.arange(len(training), device=training.device)))
    return Fitted(lambda index: to_array(probe(sample.reduced[index])), honest)


def _own(sample: Sample, training: Tensor, readers: Readers, seed: int) -> Fitted:  # noqa: ARG001
    own = sample.own
    assert own is not None
    return Fitted(lambda index: to_array(own[index]), to_array(own[training]))


def _boosted(sample: Sample, training: Tensor, readers: Readers, seed: int) -> Fitted:
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(
        max_iter=readers.panel.boosts,
        learning_rate=0.25,
        max_leaf_nodes=6,
        min_samples_leaf=5,
        max_bins=64,
        early_stopping=False,
        random_state=seed % 2**32,
    )
    _fit_trees(model, sample, training)
    return Fitted(lambda index: _tree_log_probs(model, sample, index))


def _forest(sample: Sample, training: Tensor, readers: Readers, seed: int) -> Fitted:
    from sklearn.ensemble import RandomForestClassifier

    trees, state = readers.panel.trees, seed % 2**32
    model = RandomForestClassifier(trees, min_samples_leaf=3, oob_score=True, random_state=state, n_jobs=1)
    with warnings.catch_warnings():
        # a sample that every tree was fitted on has no vote, which leaves it to the class shares
        warnings.filterwarnings("ignore", "Some inputs do not have OOB scores")
        _fit_trees(model, sample, training)
    honest = _all_classes(model.classes_, np.nan_to_num(model.oob_decision_function_), sample.classes)
    return Fitted(lambda index: _tree_log_probs(model, sample, index), honest)


class _TreeModel(Protocol):
    classes_: npt.NDArray[np.int64]

    def fit(self, values: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> object: ...

    def predict_proba(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]: ...


def _fit_trees(model: _TreeModel, sample: Sample, training: Tensor) -> None:
    index = training.cpu().numpy()
    with warnings.catch_warnings():
        # few images of many classes, such as photographs of ImageNet, are no regression problem
        warnings.filterwarnings("ignore", message="The number of unique classes", category=UserWarning)
        model.fit(sample.reduced_array[index], sample.labels.cpu().numpy()[index])


def _tree_log_probs(model: _TreeModel, sample: Sample, index: Tensor) -> LogProbs:
    shares = model.predict_proba(sample.reduced_array[index.cpu().numpy()])
    return _all_classes(model.classes_, shares, sample.classes)


def _all_classes(present: npt.NDArray[np.int64], shares: npt.NDArray[np.float64], classes: int) -> LogProbs:
    full = np.zeros((len(shares), classes))
    full[:, present] = shares[:, : len(present)]  # boosting returns two columns for a single class
    logs: LogProbs = np.log(full + _SMALLEST)
    return logs


MEMBERS: dict[str, Member] = {
    "linear": _linear,
    "hidden": _hidden,
    "neighbours": _neighbours,
    "boosted": _boosted,
    "forest": _forest,
    "own": _own,
}
"""Every member by its name in records; `own` is the network's own output, if the layer determines it."""
