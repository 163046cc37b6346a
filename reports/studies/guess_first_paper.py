"""The figures that "Guess First" prints, as data: accuracy in per cent by attack, access, radius and model."""

from typing import NamedTuple

from audit.errors import UnknownNameError

RECIPES = ("cnn", "c-dv", "c-js", "c-dv-ie", "c-js-ie", "vib")
TITLES = {"cnn": "CNN", "c-dv": "C-DV", "c-js": "C-JS", "c-dv-ie": "C-DV-IE", "c-js-ie": "C-JS-IE", "vib": "VIB"}


class Line(NamedTuple):
    """A line of the paper's tables: attack, access, norm and radius in pixel units."""

    attack: str
    access: str
    norm: str
    eps: float


# columns in the order of RECIPES. Source: Zhu 2020, Table 1 (MNIST) and Table 2 (Fashion-MNIST)
_MNIST = """
clean none - 0:     98.8 98.9 99.0 98.9 99.0 99.0
fgsm black linf .15: 65.6 84.7 88.0 91.1 89.8 83.6
fgsm black linf .30: 16.0 32.8 26.8 44.6 40.6 27.3
pgd black linf .15:  53.7 84.1 85.0 87.2 87.6 74.3
pgd black linf .30:  8.4 24.0 13.1 27.7 27.0 15.5
cw black l2 2:       63.4 76.0 74.4 79.3 74.8 66.7
fgsm white linf .15: 40.8 54.0 75.6 58.7 82.8 50.7
fgsm white linf .30: 13.4 23.8 74.4 31.9 81.1 19.1
pgd white linf .15:  4.4 26.2 69.8 38.0 78.0 11.4
pgd white linf .30:  0.0 4.8 29.7 7.4 50.0 1.0
cw white l2 2:       1.5 34.6 7.7 38.8 9.6 6.7
"""
_FASHION = """
clean none - 0:     91.7 91.3 92.0 90.4 91.0 92.3
fgsm black linf .15: 18.2 52.3 47.9 54.9 51.3 29.3
fgsm black linf .30: 9.6 24.2 19.8 28.8 24.7 15.3
pgd black linf .15:  12.4 48.6 45.7 48.0 47.6 24.6
pgd black linf .30:  4.8 15.3 11.8 15.9 14.5 6.6
cw black l2 2:       14.9 20.5 19.1 24.7 21.6 18.9
fgsm white linf .15: 14.4 32.6 43.5 33.8 49.3 27.9
fgsm white linf .30: 7.9 15.2 39.7 18.9 44.0 12.5
pgd white linf .15:  3.6 14.0 38.5 17.0 41.2 7.7
pgd white linf .30:  0.0 2.6 23.4 5.7 33.5 0.0
cw white l2 2:       0.0 8.4 2.9 11.7 3.5 0.0
"""


def _read(text: str) -> dict[Line, dict[str, float]]:
    table = {}
    for row in text.strip().splitlines():
        name, _, values = row.partition(":")
        attack, access, norm, eps = name.split()
        figures = map(float, values.split())
        table[Line(attack, access, norm.strip("-"), float(eps))] = dict(zip(RECIPES, figures, strict=True))
    return table


PAPER = {"mnist": _read(_MNIST), "fashion-mnist": _read(_FASHION)}


def published(dataset: str) -> dict[Line, dict[str, float]]:
    """Return the paper's table that rows of a data set are shown beside.

    The digits, which the paper does not have, stand beside its MNIST. Raises UnknownNameError for another set.
    """
    name = "mnist" if dataset == "digits" else dataset
    if name not in PAPER:
        raise UnknownNameError("data set of the paper", dataset, ("digits", *PAPER))
    return PAPER[name]
