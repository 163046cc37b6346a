"""Every estimator by the name users type, with its default settings."""

from audit.information.estimator import Estimator
from audit.information.labels import LabelInformation, LabelLevel
from audit.information.mine import Mine
from audit.information.released.estimator import Reference
from audit.information.sandwich import Sandwich

ESTIMATORS: dict[str, Estimator] = {
    "sandwich": Sandwich(),
    "mine": Mine(),
    "label-level": LabelLevel(),
    "label-information": LabelInformation(),
    "ref-local": Reference(per_position=True),
    "ref-mean": Reference(per_position=False),
}
