"""Flags: coded remarks on a record, with the meaning of every code in one table. Imports no torch.

A record stores a flag as `"<code>: <particulars>"`. Rankings, tables, the report and this module read the code only.
"""

from enum import StrEnum


class FlagCode(StrEnum):
    """Everything that a record may be flagged with."""

    CONTRADICTED = "contradicted"
    UNTRUSTED = "untrusted"
    UNTRUSTED_SEARCH = "untrusted_search"
    GATED = "gated"
    SATURATED = "saturated"
    FEW_IMAGES = "few_images"
    TOO_FEW_IMAGES = "too_few_images"
    UNEVEN = "uneven"
    NEGATIVE = "negative"
    NOT_CONVERGED = "not_converged"
    SEARCH_NOT_CONVERGED = "search_not_converged"
    CERTIFICATE_TIGHTER = "certificate_tighter"
    OVER_FITTED = "over_fitted"
    WEAK_ATTACK = "weak_attack"
    UNPINNED = "unpinned"
    CODE_TRUSTED = "code_trusted"


MEANINGS: dict[FlagCode, str] = {
    FlagCode.CONTRADICTED: "a measurement, or the worst case of a smaller ball, refutes the estimate by the figures "
    "given; the model is shown but not ranked",
    FlagCode.UNTRUSTED: "the attack failed a trust check, so the adversarial accuracy is only an upper bound; the "
    "model is not ranked",
    FlagCode.UNTRUSTED_SEARCH: "the worst-case search failed a trust check and may have stopped short, so the "
    "worst-case information is only an upper bound; the model is not ranked",
    FlagCode.GATED: "the network failed a sanity check: it is broken or not the network it claims to be; its figures "
    "are shown but not ranked",
    FlagCode.SATURATED: "the estimate says little but the number of images: the worst case is at its ceiling, or the "
    "two estimates around the value are more than half a nat apart; the model is shown but not ranked",
    FlagCode.FEW_IMAGES: "the number of images limits the estimate a little: more images would raise it",
    FlagCode.TOO_FEW_IMAGES: "there are so few images a class that classifiers read much less of the labels than the "
    "features tell: no bound on heads is stated, and the model is shown but not ranked",
    FlagCode.UNEVEN: "a few features carry nearly all of the layer's variance, so that noise in units of the layer "
    "hides the others",
    FlagCode.NEGATIVE: "the estimate is negative, which mutual information cannot be: read it as zero within its error",
    FlagCode.NOT_CONVERGED: "the critic was not at its best when training stopped: the estimate is likely too small",
    FlagCode.SEARCH_NOT_CONVERGED: "the worst-case search still made progress when it ended: the worst-case "
    "information is likely too large by the order of the figure given",
    FlagCode.CERTIFICATE_TIGHTER: "the certified bound on any head is tighter than the estimated one on the same "
    "images, so the worst-case search missed what the certificate found: use the certified bound",
    FlagCode.OVER_FITTED: "the critic fits its training or validation images better than held-out ones: the estimate "
    "is likely off",
    FlagCode.WEAK_ATTACK: "a second attack found more errors than the named one: the adversarial accuracy is too high",
    FlagCode.UNPINNED: "the hash of the weights was recorded, not compared with a published one",
    FlagCode.CODE_TRUSTED: "the network was built by user code, under --trust-code",
}

UNRANKED = frozenset(
    {
        FlagCode.CONTRADICTED,
        FlagCode.UNTRUSTED,
        FlagCode.UNTRUSTED_SEARCH,
        FlagCode.GATED,
        FlagCode.SATURATED,
        FlagCode.TOO_FEW_IMAGES,
    }
)
"""Codes that keep a record out of every ranking."""


def flag(code: FlagCode, particulars: str) -> str:
    """Return a flag as records store it.

    >>> flag(FlagCode.NEGATIVE, "worst_nats -0.31 is below zero")
    'negative: worst_nats -0.31 is below zero'
    """
    return f"{code}: {particulars}"


def code_of(flag: str) -> FlagCode | None:
    """Return the code of a stored flag; None for a flag that this version does not know.

    >>> code_of("gated: failed determinism"), code_of("of another version")
    (<FlagCode.GATED: 'gated'>, None)
    """
    code = flag.partition(":")[0].strip()
    return FlagCode(code) if code in list(FlagCode) else None
