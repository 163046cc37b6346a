"""Sanitise text from checkpoints and configuration files for display. Stdlib only."""

import re
import unicodedata

# whole terminal sequences first, so that no `[31m` is left over when the escape character goes
_TERMINAL_SEQUENCE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\^_]|\x9b[0-?]*[ -/]*[@-~]"
)
# control, format (bidirectional overrides, zero-width), surrogates, line and paragraph separators
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_FORMULA_STARTS = ("=", "+", "-", "@")
_FILES = ("file", "folder", "npz", "parquet")
_SCHEMES = (*_FILES, "bundled", "timm", "torchvision", "robustbench", "hf-hub")
_ENDS = {"input": 0, "penultimate": 2, "logits": 3}
_NORMS = {"linf": "ℓ∞", "l2": "ℓ2", "l1": "ℓ1"}


def plain_text(text: str) -> str:
    r"""Return text without terminal sequences, control characters and bidirectional overrides.

    >>> plain_text("\x1b[31mred\x1b[0m \u202etxt\nnext")
    'red txt next'
    """
    visible = _TERMINAL_SEQUENCE.sub("", text)
    spaced = re.sub(r"[\t\r\n\u2028\u2029]+", " ", visible)
    return "".join(letter for letter in spaced if unicodedata.category(letter) not in _HIDDEN)


def spreadsheet_text(text: str) -> str:
    """Return text that no spreadsheet reads as a formula: plain, and quoted where it starts like one.

    >>> spreadsheet_text("=1+1"), spreadsheet_text("resnet18")
    ("'=1+1", 'resnet18')
    """
    plain = plain_text(text)
    return f"'{plain}" if plain.lstrip().startswith(_FORMULA_STARTS) else plain


def shorten(text: str, width: int) -> str:
    """Return text of at most `width` characters, the middle left out: both ends of a reference are informative.

    >>> shorten("torchvision:resnet18/IMAGENET1K_V1", 15)
    'torchvisi…1K_V1'
    """
    if len(text) <= width:
        return text
    tail = (width - 1) // 3 + 1
    return f"{text[: width - tail - 1]}…{text[-tail:]}"


def short_name(reference: str) -> str:
    """Return the short name of a model or data set: no scheme, folders or options.

    >>> short_name("file:../nets/resnet2b.pth?arch=nets.py:resnet2b"), short_name("bundled:vgg-robust")
    ('resnet2b.pth', 'vgg-robust')
    """
    plain = plain_text(reference).strip()
    scheme, _, rest = plain.partition(":")
    if scheme not in _SCHEMES or not rest:
        return plain
    return rest.partition("?")[0].rstrip("/").rpartition("/")[2] if scheme in _FILES else rest


def format_eps(eps: float) -> str:
    """Return a radius as people write it: k/255 (k whole or half) unless the plain decimal is as short.

    >>> format_eps(8 / 255), format_eps(0.5 / 255), format_eps(0.2), format_eps(0.0)
    ('8/255', '0.5/255', '0.2', '0')
    """
    decimal = _shortest(eps)
    halves = round(eps * 510)
    is_fraction = halves > 0 and abs(eps * 510 - halves) <= 1e-9 * halves
    fraction = f"{_shortest(halves / 2)}/255"
    return fraction if is_fraction and len(fraction) < len(decimal) else decimal


def format_norm(norm: str) -> str:
    """Return the mathematical sign of a norm, or its name where it has none.

    >>> format_norm("linf")
    'ℓ∞'
    """
    return _NORMS.get(norm.lower(), plain_text(norm))


def layer_place(layer: str) -> tuple[int, list[tuple[int, str]]]:
    """Return the sort key of a layer: the input first, penultimate and logits last, numbers in names by size.

    >>> sorted(["logits", "features.10", "features.2", "input"], key=layer_place)
    ['input', 'features.2', 'features.10', 'logits']
    """
    pieces = re.findall(r"\d+|\D+", layer)
    return _ENDS.get(layer, 1), [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]


def plural(count: int, noun: str) -> str:
    """Return a count with its noun.

    >>> plural(1, "model"), plural(12, "model")
    ('1 model', '12 models')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _shortest(value: float) -> str:
    return repr(float(value)).removesuffix(".0")
