"""Print every skipped test of a JUnit file and fail if one is not expected.

Usage: skips.py TESTS.xml EXPECTED CHROMIUM. EXPECTED holds regular expressions of reasons, one a line; CHROMIUM
holds what the installation of the browser printed: only where it says why there is none, tests may be skipped for it.
"""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

WITHOUT_BROWSER = "no Chromium on the path"


def skipped(results: Path) -> list[tuple[str, str]]:
    """Return every skipped test and its reason; one that fails as it is marked to is run, though pytest lists it."""
    cases = ElementTree.parse(results).getroot().iter("testcase")
    return [
        (f"{case.get('classname')}.{case.get('name')}", skip.get("message", ""))
        for case in cases
        for skip in case.findall("skipped")
        if skip.get("type") != "pytest.xfail"
    ]


def expected_reasons(expected: Path, chromium: Path) -> list[str]:
    """Return the regular expressions of the reasons that are no failure."""
    lines = expected.read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    found = chromium.read_text(encoding="utf-8")
    return patterns + ([WITHOUT_BROWSER] if found.startswith("no Chromium: ") else [])


def main(results: Path, expected: Path, chromium: Path) -> int:
    """Print the skipped tests and return 1 if one of them is not expected, else 0."""
    reasons, found = expected_reasons(expected, chromium), skipped(results)
    surprises = 0
    for name, reason in found:
        known = any(re.search(pattern, reason) for pattern in reasons)
        surprises += not known
        sys.stdout.write(f"{'skipped' if known else 'SKIPPED, not expected'}: {name}: {reason}\n")
    sys.stdout.write(f"{len(found)} tests skipped, {surprises} of them not expected\n")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
