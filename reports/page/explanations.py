"""What the flags of records mean, one sentence each; the table of codes is that of `audit.flags`."""

from audit.flags import MEANINGS, code_of
from reports.text import plain_text


def flag_name(flag: str) -> str:
    """Return the code of a flag without its particulars.

    >>> flag_name("contradicted: worst_nats 0.3 is under 0.5"), flag_name("not-converged")
    ('contradicted', 'not_converged')
    """
    return plain_text(flag).partition(":")[0].strip().replace("-", "_").replace(" ", "_").lower()


def explain(flag: str) -> str:
    """Return the meaning of a flag.

    >>> explain("code_trusted: vgg")
    'the network was built by user code, under --trust-code'
    """
    code = code_of(flag_name(flag))
    return MEANINGS[code] if code else "reported by the audit; see the notes of the model"
