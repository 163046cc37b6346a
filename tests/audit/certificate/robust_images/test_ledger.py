"""The ledger of images: its two sides, its limits on the population, its place in a witness file, and forged files."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.stats import binom
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import TIERS
from audit.adversary.threat import THREATS, Linf
from audit.certificate.dual_precision import DualPrecisionLayer
from audit.certificate.layers import CertificationInputs, CertificationSettings, certify_layers
from audit.certificate.robust_images.ledger import LedgerInputs, broken_rows, keep_ledger, proved_rows
from audit.certificate.robust_images.results import BoundEffort, Ledger, Slopes
from audit.certificate.robust_images.stored import check_ledger
from audit.certificate.witness import read_witness, verify_witness, witness_header, write_witness
from audit.errors import IntegrityError, UnknownNameError, UsageError
from audit.random_keys import keyed_generator
from audit.representation.layers import Representation

HASH = "weights-0"
THREAT = Linf(0.03)


def convolutional():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)
        )
        net[-1].weight.data *= 4
    return net.eval().requires_grad_(False)


def sample(count=40):
    net = convolutional()
    clean = torch.rand(count, 1, 8, 8, generator=keyed_generator(1))
    net[-1].bias -= net(clean).mean(0)
    labels = net(clean).argmax(1)
    labels[0] = (labels[0] + 1) % 3  # one image is misclassified
    return net, clean, labels


@pytest.fixture(scope="module")
def result():
    net, clean, labels = sample()
    inputs = CertificationInputs(net, clean, labels, 3)
    settings = CertificationSettings(attack=TIERS["smoke"], measured=("own",), ledger=True)
    return inputs, certify_layers(inputs, ["logits"], [THREAT], settings)[0]


@pytest.fixture(scope="module")
def witness(result, tmp_path_factory):
    inputs, (_, threat, certificate, ledger) = result
    path = tmp_path_factory.mktemp("ledger") / "w.safetensors"
    header = witness_header(certificate, "logits", threat, (inputs.clean, inputs.labels), HASH)
    write_witness(path, certificate, header, inputs.labels, ledger)
    return path


def verified(path, inputs):
    layer = DualPrecisionLayer.of(Representation(inputs.network, "logits"))
    return verify_witness(path, layer, inputs.clean, inputs.labels, HASH)


def forged(path, folder, change, **claims):
    with safe_open(path, "pt") as file:
        header, tensors = json.loads(file.metadata()["rvaudit"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    header["ledger"] |= claims
    save_file(change(tensors), folder / "forged", {"rvaudit": json.dumps(header)})
    return folder / "forged"


def test_the_adversarial_accuracy_lies_between_the_two_sides(result):
    _, (row, _, _, ledger) = result
    assert ledger.proved > 5
    assert len(ledger.broken) > 5
    assert row.proved <= row.heads["own"] <= 1 - row.broken
    assert row.proved + row.broken + row.undecided == pytest.approx(1)
    assert 0 in ledger.broken.tolist()
    low, high = row.kept_population
    assert low < row.proved <= 1 - row.broken < high


@pytest.mark.parametrize("norm", THREATS)
def test_proofs_and_adversarial_images_hold_in_every_norm(norm):
    net, clean, labels = sample(24)
    threat = THREATS[norm]({"linf": 0.02, "l2": 0.12, "l1": 0.4}[norm])
    attacked = measure_accuracy(net, clean, labels, threat, TIERS["audit"], 0)
    precise = convolutional().double()
    precise.load_state_dict(net.double().state_dict())
    net.float()
    ledger = keep_ledger(LedgerInputs(net, precise, clean, labels), threat, attacked.outcome.images)
    assert ledger.proved > 0
    proved = proved_rows(ledger, precise, (clean, labels), threat)
    assert int(proved.sum()) == ledger.proved
    assert bool((proved <= attacked.robust).all())
    moved = ledger.adversarial
    assert bool((threat.distance(moved, clean[ledger.broken].double()) <= threat.eps).all())
    assert bool((precise(moved).argmax(1) != labels[ledger.broken]).all())


def test_a_file_with_both_sides_is_accepted(result, witness):
    inputs, (_, _, certificate, ledger) = result
    found = verified(witness, inputs)
    assert found.header.ledger == {"images": 40, "proved": ledger.proved, "broken": len(ledger.broken), "passes": 150.0}
    assert found.header.bound == certificate.bound
    assert torch.equal(found.ledger.lines, ledger.lines)
    assert torch.equal(found.ledger.slopes.levels, ledger.slopes.levels)


def _outside(tensors):
    moved = tensors["ledger_adversarial"].clone()
    pixel = (moved[0] - 0.5).abs().argmin()  # far from the ends of the range
    moved[0].view(-1)[pixel] += 2 * THREAT.eps + 1e-4
    return tensors | {"ledger_adversarial": moved}


def _clean(tensors):
    return tensors | {"ledger_adversarial": torch.full_like(tensors["ledger_adversarial"], 0.5)}


def _another_proved(tensors):
    known = set(torch.cat([tensors[f"ledger_{name}"] for name in ("broken", "intervals", "lines")]).tolist())
    free = next(k for k in range(40) if k not in known)
    return tensors | {"ledger_lines": torch.cat([tensors["ledger_lines"][1:], torch.tensor([free])])}


def _twice(tensors):
    return tensors | {"ledger_lines": torch.cat([tensors["ledger_lines"][1:], tensors["ledger_broken"][:1]])}


def _beyond(tensors):
    return tensors | {"ledger_lines": torch.cat([tensors["ledger_lines"][1:], torch.tensor([40])])}


def _longer(tensors):
    return tensors | {"ledger_adversarial": tensors["ledger_adversarial"][1:].clone()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_outside, "adversarial image is not legal"),
        (_clean, "adversarial image is not legal at linf 0.03 or"),
        (_another_proved, "is claimed to be proved at linf 0.03, but its bound is not positive"),
        (_twice, "twice: an image is either proved or broken"),
        (_beyond, "the ledger names image 40, outside 0 to 39"),
        (_longer, "different lengths"),
        (lambda tensors: {k: v for k, v in tensors.items() if k != "ledger_lines"}, "holds the tensors"),
    ],
)
def test_forged_ledgers_are_refused(result, witness, tmp_path, change, message):
    with pytest.raises(IntegrityError, match=message):
        verified(forged(witness, tmp_path, change), result[0])


def test_claims_that_the_file_does_not_hold_are_refused(result, witness, tmp_path):
    with pytest.raises(IntegrityError, match="the ledger claims 39 images proved and"):
        verified(forged(witness, tmp_path, lambda same: same, proved=39), result[0])
    with pytest.raises(IntegrityError, match="are not complete"):
        read_witness(forged(witness, tmp_path, lambda same: same, passes="all"))


def test_another_network_does_not_have_the_proofs(result, witness):
    inputs = result[0]
    other = convolutional()
    other.load_state_dict(inputs.network.state_dict())
    other[-1].bias += torch.tensor([3.0, 0.0, -3.0])
    stored = read_witness(witness).ledger
    with pytest.raises(IntegrityError, match="claimed to be"):
        check_ledger(stored, other.double(), (inputs.clean, inputs.labels), THREAT)


def test_an_image_that_is_not_moved_breaks_only_a_wrong_answer():
    net, clean, labels = sample()
    precise = net.double()
    broken = broken_rows(precise, (clean, labels), Linf(0.0), clean.double())
    assert broken.tolist() == [True] + 39 * [False]


@pytest.mark.parametrize(("proved", "broken"), [(0, 0), (5, 20), (40, 0), (0, 40)])
def test_limits_on_the_population_are_those_of_the_binomial(proved, broken):
    where = torch.arange(40)
    nothing = torch.empty(0, 1, 1, 1)
    ledger = Ledger(40, where[:broken], nothing, where[:0], where[:proved], Slopes.none(), BoundEffort())
    low, high = ledger.population(0.9)
    if proved:
        assert binom.sf(proved - 1, 40, low) == pytest.approx(0.05)
    else:
        assert low == 0
    if broken:
        assert binom.cdf(40 - broken, 40, high) == pytest.approx(0.05)
    else:
        assert high == 1
    with pytest.raises(UsageError, match="confidence 95 is not between 0 and 1"):
        ledger.population(95)


def test_a_network_that_cannot_be_read_proves_nothing_and_says_why():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 3)).eval().requires_grad_(False)
    _, clean, labels = sample()
    inputs = CertificationInputs(net, clean, labels, 3)
    settings = CertificationSettings(attack=TIERS["smoke"], measured=(), ledger=True)
    row, *_, ledger = certify_layers(inputs, ["logits"], [THREAT], settings)[0]
    assert row.proved == 0
    assert "GELU '2' is not a supported operation for bounds" in row.ledger_reason
    assert ledger.undecided == 40 - len(ledger.broken)
    assert row.heads == {}


def test_an_unknown_head_is_refused():
    with pytest.raises(UnknownNameError, match=r"head 'linear'.*slf"):
        CertificationSettings(measured=("own", "linear"))
