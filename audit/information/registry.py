"""Registry of estimators: user-facing name to default settings and implementation. Imports no torch.

A new estimator is registered here; `audit.information.estimator.ESTIMATORS` and the sections of benchmark files follow.
"""

from typing import NamedTuple

from audit.information.probing.settings import LabelInformationSettings
from audit.information.settings import (
    EstimatorSettings,
    LabelEntropySettings,
    MineSettings,
    ReferenceSettings,
    SandwichSettings,
)


class Registration(NamedTuple):
    """The default settings of an estimator, and the dataclass that extends them, as `module:class`."""

    settings: EstimatorSettings
    implementation: str


_RELEASED = "audit.information.released.estimator:Reference"

REGISTRY: dict[str, Registration] = {
    "sandwich": Registration(SandwichSettings(), "audit.information.sandwich:Sandwich"),
    "mine": Registration(MineSettings(), "audit.information.mine:Mine"),
    "label-level": Registration(LabelEntropySettings(), "audit.information.label_entropy:LabelEntropy"),
    "label-information": Registration(
        LabelInformationSettings(), "audit.information.label_information:LabelInformation"
    ),
    "ref-local": Registration(ReferenceSettings(per_position=True), _RELEASED),
    "ref-mean": Registration(ReferenceSettings(per_position=False), _RELEASED),
}
