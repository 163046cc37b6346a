"""Table of all estimators: user-facing name to default settings. A new estimator is registered here."""

from audit.information.estimator import Estimator
from audit.information.label_entropy import LabelEntropy
from audit.information.label_information import LabelInformation
from audit.information.mine import Mine
from audit.information.released.estimator import Reference
from audit.information.sandwich import Sandwich

ESTIMATORS: dict[str, Estimator] = {
    "sandwich": Sandwich(),
    "mine": Mine(),
    "label-level": LabelEntropy(),
    "label-information": LabelInformation(),
    "ref-local": Reference(per_position=True),
    "ref-mean": Reference(per_position=False),
}
