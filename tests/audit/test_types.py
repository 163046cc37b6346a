import subprocess
import sys
from itertools import product

import torch

from audit.random_keys import keyed_generator


def draw(*key):
    return tuple(torch.randint(0, 2**31, (4,), generator=keyed_generator(*key)).tolist())


def test_the_same_key_gives_the_same_stream():
    assert draw(3, 1, 4) == draw(3, 1, 4)
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
    assert len({draw(*key) for key in keys}) == len(keys)


def test_neighbouring_keys_are_unrelated():
    streams = torch.stack([torch.randn(2000, generator=keyed_generator(seed, 1)) for seed in range(6)])
    off_diagonal = torch.corrcoef(streams) - torch.eye(6)
    assert off_diagonal.abs().max() < 0.1


def test_a_key_gives_the_same_stream_in_another_process():
    code = (
        "import torch; from audit.types import keyed_generator\n"
        "print(torch.randint(0, 2**31, (4,), generator=keyed_generator(3, 1, 4)).tolist())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == str(list(draw(3, 1, 4)))


def test_keys_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    keyed_generator(1, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
