"""Every estimator by the name users type, with its default settings."""

from audit.estimates import Estimator
from audit.labels import LabelInformation, LabelLevel
from audit.mine import Mine
from audit.reference import Reference
from audit.sandwich import Sandwich

ESTIMATORS: dict[str, Estimator] = {
    "sandwich": Sandwich(),
    "mine": Mine(),
    "label-level": LabelLevel(),
    "label-information": LabelInformation(),
    "ref-local": Reference(per_position=True),
    "ref-mean": Reference(per_position=False),
}
