"""Random streams: unique purposes, and no call of `keyed_generator` with a bare integer for one."""

import ast
import subprocess
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path

import pytest
import torch

from audit.random_keys import Purpose, keyed_generator

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for package in ("audit", "model_zoo") for path in (ROOT / package).rglob("*.py"))


def purposes_of_calls(source):
    """Return (line, purpose name or None) of every call of `keyed_generator`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "keyed_generator":
            # the key is (seed, purpose, ...), or the purpose alone
            purpose = node.args[min(1, len(node.args) - 1)] if node.args and not node.keywords else None
            named = isinstance(purpose, ast.Attribute) and isinstance(purpose.value, ast.Name)
            found.append((node.lineno, purpose.attr if named and purpose.value.id == "Purpose" else None))
    return found


def test_values_are_unique():
    assert len({purpose.value for purpose in Purpose}) == len(Purpose.__members__)


def test_every_call_names_its_purpose():
    calls = {path: purposes_of_calls(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert sum(map(len, calls.values())) >= len(Purpose)
    unnamed = [f"{path.relative_to(ROOT)}:{line}" for path, found in calls.items() for line, name in found if not name]
    assert not unnamed


def test_every_purpose_is_used_in_one_module():
    users = defaultdict(set)
    for path in SOURCES:
        for _, name in purposes_of_calls(path.read_text(encoding="utf-8")):
            users[name].add(path.name)
    assert {name: files for name, files in users.items() if len(files) > 1} == {}
    assert set(users) == set(Purpose.__members__)


@pytest.mark.parametrize(
    "call",
    [
        "keyed_generator(seed, 91)",
        "keyed_generator(seed, _PURPOSE)",
        "keyed_generator(91)",
        "keyed_generator(seed)",
        "keyed_generator(*key)",
        "keyed_generator(seed, other.PURPOSE)",
        "random_keys.keyed_generator(seed, int(Purpose.HUBS))",
    ],
)
def test_a_raw_purpose_is_found(call):
    assert purposes_of_calls(f"\ndraws = {call}") == [(2, None)]
    assert purposes_of_calls("keyed_generator(seed, Purpose.HUBS, 3)") == [(1, "HUBS")]


def integers(*key):
    return tuple(torch.randint(0, 2**31, (4,), generator=keyed_generator(*key)).tolist())


def test_a_key_decides_its_stream():
    def drawn(*key):
        return tuple(torch.rand(4, generator=keyed_generator(*key)).tolist())

    assert drawn(0, Purpose.HUBS) == drawn(0, Purpose.HUBS)
    keys = [(seed, purpose) for seed in range(3) for purpose in Purpose]
    assert len({drawn(*key) for key in keys}) == len(keys)


def test_the_same_key_gives_the_same_stream():
    assert integers(3, 1, 4) == integers(3, 1, 4)
    assert keyed_generator(7).device.type == "cpu"


def test_different_keys_give_different_streams():
    keys = [
        (),
        *product(range(-3, 30)),
        *product(range(8), repeat=2),
        *product(range(5), repeat=3),
        (2**63,),
        (2**64 - 9,),
    ]
    assert len({integers(*key) for key in keys}) == len(keys)


def test_streams_of_neighbouring_seeds_are_uncorrelated():
    streams = torch.stack([torch.randn(2000, generator=keyed_generator(seed, 1)) for seed in range(6)])
    off_diagonal = torch.corrcoef(streams) - torch.eye(6)
    assert off_diagonal.abs().max() < 0.1


def test_a_key_gives_the_same_stream_in_another_process():
    code = (
        "import torch; from audit.random_keys import keyed_generator\n"
        "print(torch.randint(0, 2**31, (4,), generator=keyed_generator(3, 1, 4)).tolist())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == str(list(integers(3, 1, 4)))


def test_the_global_generator_is_not_used():
    before = torch.random.get_rng_state()
    keyed_generator(1, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
