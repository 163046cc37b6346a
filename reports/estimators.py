"""Presentation of estimators: their order in reports, and the bound that Figure 2 draws for each."""

# the default for ranking first, replication last; a name stands with the family before its first dash
_ORDER = ("sandwich", "label-information", "label-level", "mine", "", "ref")
# smoothed information lies under a different quantity's curve, and label-level entropy limits no head
_NO_LIMIT = ("sandwich", "label-level")


def place(estimator: str) -> tuple[int, str]:
    """Return the sort key of an estimator: the default for ranking first, replications last.

    >>> sorted(["ref-local", "mine-infonce", "other", "sandwich", "label-level"], key=place)
    ['sandwich', 'label-level', 'mine-infonce', 'other', 'ref-local']
    """
    near = [i for i, name in enumerate(_ORDER) if name and (estimator == name or estimator.startswith(f"{name}-"))]
    return (near[0] if near else _ORDER.index(""), estimator)


def curve_of(estimator: str, quantity: str) -> str:
    """Return the bound on heads that Figure 2 draws: "fano" for label information, "theorem" for I(X; g(X)), or "".

    >>> curve_of("label-information", "I(Y; g(X))"), curve_of("mine-infonce", "I(X; g(X))")
    ('fano', 'theorem')
    >>> curve_of("sandwich", "I(X; g(X) + noise)")
    ''
    """
    if estimator in _NO_LIMIT:
        return ""
    if estimator == "label-information" or quantity.startswith("I(Y;"):
        return "fano"
    return "theorem" if quantity == "I(X; g(X))" else ""
