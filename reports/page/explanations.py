"""What a flag means, in one sentence each; an unknown flag speaks for itself."""

from reports.text import plain_text

_SEARCH = "untrusted: the worst-case information"

_MEANINGS = {
    "contradicted": "a measurement refutes the estimate, or a smaller ball's worst case does: the flag says by which "
    "figures; the model is shown but not ranked",
    "untrusted": "the attack failed a check of trust, so the network may only seem robust: the accuracy is an upper "
    "bound, and the model is not ranked",
    _SEARCH: "the search for the worst case failed a check of trust, so it may have stopped short: "
    "the worst-case information is an upper bound, and the model is not ranked",
    "gated": "the network failed a gate: it is broken, or not what it should be; it is shown with its figures and not "
    "ranked",
    "saturated": "the estimate is limited by the number of images: with more it would be larger",
    "not_converged": "the critic was not at its best when training stopped: the estimate is likely too small",
    "over_fitted": "the critic knows its training or validation images better than others: the estimate is likely off",
    "unpinned": "the hash of the weights was not known beforehand, so they were taken as found",
    "code_trusted": "user code built the network",
    "weak_attack": "a second attack found more errors than the named one: the adversarial accuracy is too high",
    "negative": "the estimate came out under zero, which no MI is: read it as zero within its error",
    "noisy": "the seeds disagree by more than the difference that is being measured",
}


def flag_name(flag: str) -> str:
    """Return the name of a flag without its particulars.

    >>> flag_name("contradicted: worst_nats 0.3 is under 0.5"), flag_name("not-converged")
    ('contradicted', 'not_converged')
    """
    return plain_text(flag).partition(":")[0].strip().replace("-", "_").replace(" ", "_").lower()


def distrusts_search(flag: str) -> bool:
    """Return whether a flag says that the search for the worst-case information is not to be trusted."""
    return plain_text(flag).startswith(_SEARCH)


def distrusts_attack(flag: str) -> bool:
    """Return whether a flag says that the attack on the label is not to be trusted."""
    return flag_name(flag) == "untrusted" and not distrusts_search(flag)


def explain(flag: str) -> str:
    """Return what a flag means.

    >>> explain("unpinned:vgg")
    'the hash of the weights was not known beforehand, so they were taken as found'
    """
    name = _SEARCH if distrusts_search(flag) else flag_name(flag)
    near = [key for key in _MEANINGS if name.startswith(key)]
    return _MEANINGS[max(near, key=len)] if near else "reported by the audit; see the notes of the model"
