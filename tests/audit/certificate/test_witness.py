"""Witness files: valid ones are accepted, and every planted fault is reported with the image it concerns."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from audit.adversary.threat import Linf
from audit.certificate.certificate import certify
from audit.certificate.collision_search import SearchEffort
from audit.certificate.dual_precision import DualPrecisionLayer
from audit.certificate.equality import EQUALITY_TIERS
from audit.certificate.settings import CertificateSettings
from audit.certificate.witness import data_sha256, read_witness, verify_witness, witness_header, write_witness
from audit.errors import EnvironmentFault, IntegrityError
from audit.random_keys import keyed_generator
from audit.representation.layers import Representation

HASH = "weights-0"
EPS = 0.08


class Case:
    """A layer, its images, its certificate, and a witness file of it."""

    def __init__(self, folder, tier="bit-identical at float32"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Flatten(), nn.Linear(36, 40), nn.ReLU(), nn.Linear(40, 4))
        self.net = net.eval().requires_grad_(False)
        self.layer = DualPrecisionLayer.of(Representation(self.net, "logits"))
        self.clean = torch.rand(24, 1, 6, 6, generator=keyed_generator(0))
        self.labels = torch.arange(24) % 4
        settings = CertificateSettings(tier=tier, effort=SearchEffort(hubs=1, neighbours=4))
        self.certificate = certify(self.layer, self.clean, self.labels, Linf(EPS), settings)
        self.header = witness_header(self.certificate, "logits", Linf(EPS), (self.clean, self.labels), HASH)
        self.path = folder / "witness.safetensors"
        self.sha256 = write_witness(self.path, self.certificate, self.header, self.labels)

    def verify(self, path=None, **changes):
        given = {"layer": self.layer, "clean": self.clean, "labels": self.labels, "weights_sha256": HASH, **changes}
        return verify_witness(path or self.path, **given)

    def forged(self, folder, change=None, **claims):
        """Return a copy of the file with its tensors changed by a function and its header by claims."""
        with safe_open(self.path, "pt") as file:
            header, tensors = json.loads(file.metadata()["rvaudit"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        tensors = (change or (lambda same: same))(tensors)
        header["bound"] |= claims.pop("bound", {})
        path = folder / "forged.safetensors"
        save_file(tensors, path, {"rvaudit": json.dumps(header | claims)})
        return path


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("witness"))


def test_a_written_witness_is_verified_and_read_back(case):
    witness = case.verify()
    assert witness.header == case.header
    assert witness.header.bound.kept < 12
    assert case.certificate.pairs > 0
    assert torch.equal(witness.labels, case.labels)
    for stored, original in zip(witness.collisions, case.certificate.collisions, strict=True):
        assert torch.equal(stored, original)
    assert len(case.sha256) == 64


def test_the_same_certificate_gives_the_same_file(case, tmp_path):
    assert write_witness(tmp_path / "again", case.certificate, case.header, case.labels) == case.sha256


def test_a_witness_without_collisions_is_accepted(case, tmp_path):
    none = certify(case.layer, case.clean, case.labels, Linf(0.0), CertificateSettings())
    header = witness_header(none, "logits", Linf(0.0), (case.clean, case.labels), HASH)
    write_witness(tmp_path / "none", none, header, case.labels)
    assert case.verify(tmp_path / "none").header.bound.certified == 1


def test_an_image_outside_its_ball_is_reported(case, tmp_path):
    row, member = 5, int(case.certificate.collisions.members[5])

    def move(tensors):
        image, clean = tensors["moved"][row], case.clean[member].double()
        pixel = int((clean - 0.5).abs().argmin())
        image.view(-1)[pixel] = clean.view(-1)[pixel] + EPS + 1e-4
        return tensors

    with pytest.raises(IntegrityError, match=f"image {member} is moved by 0.0801 in linf"):
        case.verify(case.forged(tmp_path, move))


@pytest.mark.parametrize("value", [float("nan"), -1e-4, 1.0001])
def test_illegal_pixels_are_reported(case, tmp_path, value):
    member = int(case.certificate.collisions.members[2])

    def move(tensors):
        # inside the ball, outside the pixel range
        pixel = int((case.clean[member] - min(max(value, 0), 1)).abs().argmin()) if value == value else 0
        tensors["moved"][2].view(-1)[pixel] = value
        return tensors

    with pytest.raises(IntegrityError, match=f"image {member} is moved by"):
        case.verify(case.forged(tmp_path, move))


def test_an_image_in_its_ball_with_other_features_is_reported(case, tmp_path):
    member = int(case.certificate.collisions.members[3])

    def back(tensors):
        tensors["moved"][3] = case.clean[member].double()
        return tensors

    with pytest.raises(IntegrityError, match=f"image {member} does not collide at target 0"):
        case.verify(case.forged(tmp_path, back))


def test_changed_weights_are_detected_by_hash_and_by_features(case):
    network = copy.deepcopy(case.net)
    used = int(network[:3](case.clean).mean(0).argmax())
    network[3].weight[0, used] += 1e-3
    other = DualPrecisionLayer.of(network)
    with pytest.raises(IntegrityError, match="is for weights with sha256 weights-0, not weights-1"):
        case.verify(layer=other, weights_sha256="weights-1")
    # a false hash does not hide it
    with pytest.raises(IntegrityError, match=r"image [0-9]+ does not collide"):
        case.verify(layer=other)


def test_a_layer_that_depends_on_the_batch_cannot_be_verified(case):
    together = nn.Sequential(*case.net, nn.Softmax(dim=0))
    with pytest.raises(IntegrityError, match=r"this layer cannot be certified: .* other images of its batch"):
        case.verify(layer=DualPrecisionLayer.of(together))


def test_a_changed_label_is_reported(case, tmp_path):
    def swap(tensors):
        tensors["labels"][7] = 0
        return tensors

    assert case.labels[7] == 3
    with pytest.raises(IntegrityError, match="image 7 has class 3, but 0 in the witness"):
        case.verify(case.forged(tmp_path, swap))
    swapped = case.labels.clone()
    swapped[9] = 2
    with pytest.raises(IntegrityError, match="image 9 has class 2, but 1 in the witness"):
        case.verify(labels=swapped)


def test_other_images_are_detected(case):
    with pytest.raises(IntegrityError, match="is for images and labels"):
        case.verify(clean=case.clean.clone().index_fill(0, torch.tensor(3), 0.5))
    with pytest.raises(IntegrityError, match="is for 24 images, not 23"):
        case.verify(clean=case.clean[:23], labels=case.labels[:23])
    assert data_sha256(case.clean, case.labels) != data_sha256(case.clean.double(), case.labels)


@pytest.mark.parametrize("edit", [-1, 1])
def test_an_edited_bound_is_detected(case, tmp_path, edit):
    kept = case.certificate.bound.kept
    with pytest.raises(IntegrityError, match=f"claims an upper bound of {kept + edit} of 24 images"):
        case.verify(case.forged(tmp_path, bound={"kept": kept + edit}))


def test_a_claimed_stopped_search_does_not_hide_an_edited_bound(case, tmp_path):
    kept = case.certificate.bound.kept
    with pytest.raises(IntegrityError, match="claims an upper bound of"):
        case.verify(case.forged(tmp_path, bound={"kept": kept - 1, "exact": False, "kind": "milp, stopped"}))
    # a larger bound may come from a stopped branch and bound
    stopped = case.forged(tmp_path, bound={"kept": kept + 1, "exact": False, "kind": "milp, stopped"})
    assert case.verify(stopped).header.bound.kept == kept + 1


@pytest.mark.parametrize("value", [0.0, 23.0, float("nan")])
def test_an_edited_bound_for_randomised_heads_is_detected(case, tmp_path, value):
    with pytest.raises(IntegrityError, match="for randomised heads"):
        case.verify(case.forged(tmp_path, bound={"randomised": value}))


def test_an_edited_count_of_images_is_detected(case, tmp_path):
    with pytest.raises(IntegrityError, match="of 240 images"):
        case.verify(case.forged(tmp_path, bound={"images": 240}))


def test_a_smaller_eps_is_detected(case, tmp_path):
    threat = {"norm": "linf", "eps": EPS / 2, "pixel_range": [0, 1]}
    with pytest.raises(IntegrityError, match=r"image [0-9]+ is moved by"):
        case.verify(case.forged(tmp_path, threat=threat))


def test_a_witness_assigned_to_another_image_is_detected(case, tmp_path):
    """A row with the index of another image lies outside the ball of that image."""

    def borrow(tensors):
        tensors["members"][0] = next(i for i in range(24) if i not in case.certificate.collisions.members)
        return tensors

    with pytest.raises(IntegrityError, match=r"image [0-9]+ is moved by"):
        case.verify(case.forged(tmp_path, borrow))


def test_a_near_miss_is_refused_for_any_claimed_noise_floor(tmp_path):
    case = Case(tmp_path, "bit-identical at float32")

    def shift(tensors):
        tensors["targets"] += 1e-3
        return tensors

    with pytest.raises(IntegrityError, match="which is not below noise floor"):
        case.verify(case.forged(tmp_path, shift, tier="below noise floor", noise=1.0))


def test_an_image_without_a_root_is_not_proved(case, tmp_path):

    def shift(tensors):
        # the first image is not moved
        tensors["moved"][0] = case.clean[int(tensors["members"][0])].double()
        return tensors

    first = int(case.certificate.collisions.members[0])
    with pytest.raises(IntegrityError, match=f"image {first} is not proved to collide at target 0"):
        case.verify(case.forged(tmp_path, shift, tier="proved"))


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_a_truncated_file_is_refused(case, tmp_path, share):
    whole = case.path.read_bytes()
    (tmp_path / "short").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(IntegrityError, match="is not a complete witness file"):
        case.verify(tmp_path / "short")


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"format": "other"}, "format 'other', legal: rvaudit-witness-1"),
        ({"tier": "sure"}, "tier 'sure', legal: proved"),
        ({"threat": {"norm": "l7", "eps": 0.1, "pixel_range": [0, 1]}}, "'l7'"),
        ({"threat": {"norm": "linf", "eps": 8, "pixel_range": [0, 1]}}, "outside"),
        ({"threat": None}, "no valid witness header"),
    ],
)
def test_an_invalid_header_is_refused(case, tmp_path, claims, message):
    with pytest.raises(IntegrityError, match=message):
        read_witness(case.forged(tmp_path, **claims))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "at"}, "a witness holds"),
        (lambda t: t | {"moved": t["moved"].float()}, "moved is torch.float32"),
        (lambda t: t | {"at": t["at"][1:]}, "different lengths"),
        (lambda t: t | {"at": t["at"] + 1000}, "a target that does not exist"),
    ],
)
def test_malformed_tensors_are_refused(case, tmp_path, change, message):
    with pytest.raises(IntegrityError, match=message):
        read_witness(case.forged(tmp_path, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"members": t["members"] + 24}, "outside 0 to 23"),
        (lambda t: t | {"moved": t["moved"][:, :, :5].contiguous()}, "not [(]1, 6, 6[)]"),
        (lambda t: t | {"targets": t["targets"][:, :3].contiguous()}, "targets have 3 features, but the layer has 4"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(case, tmp_path, change, message):
    with pytest.raises(IntegrityError, match=message):
        case.verify(case.forged(tmp_path, change))


def test_a_missing_header_or_file_is_refused(case, tmp_path):
    save_file({"labels": case.labels}, tmp_path / "bare")
    with pytest.raises(IntegrityError, match="no valid witness header"):
        read_witness(tmp_path / "bare")
    with pytest.raises(EnvironmentFault, match="there is no witness file"):
        read_witness(tmp_path / "absent")


@pytest.mark.parametrize("tier", EQUALITY_TIERS)
def test_a_witness_is_verified_at_its_tier(tmp_path, tier):
    case = Case(tmp_path, tier)
    assert case.verify().header.tier == tier
    assert case.certificate.bound.kept < 20


def test_the_layer_name_is_returned_unverified(case, tmp_path):
    """The caller builds the layer from this name."""
    write_witness(tmp_path / "named", case.certificate, replace(case.header, layer="penultimate"), case.labels)
    assert case.verify(tmp_path / "named").header.layer == "penultimate"
