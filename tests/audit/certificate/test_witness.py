"""Witness files: what is whole and true is accepted, every planted fault is named."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from audit.adversary.threat import Linf
from audit.certificate.certificate import CertificateSettings, certify
from audit.certificate.collision_search import Layer, SearchEffort
from audit.certificate.equality import TIERS
from audit.certificate.witness import data_sha256, header_of, read, verify, write
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
        self.layer = Layer.of(Representation(self.net, "logits"))
        self.clean = torch.rand(24, 1, 6, 6, generator=keyed_generator(0))
        self.labels = torch.arange(24) % 4
        settings = CertificateSettings(tier=tier, effort=SearchEffort(hubs=1, neighbours=4))
        self.certificate = certify(self.layer, self.clean, self.labels, Linf(EPS), settings)
        self.header = header_of(self.certificate, "logits", Linf(EPS), (self.clean, self.labels), HASH)
        self.path = folder / "witness.safetensors"
        self.sha256 = write(self.path, self.certificate, self.header, self.labels)

    def verify(self, path=None, **changes):
        given = {"layer": self.layer, "clean": self.clean, "labels": self.labels, "weights_sha256": HASH, **changes}
        return verify(path or self.path, **given)

    def forged(self, folder, change=None, **claims):
        """Return a copy of the file with its tensors changed by a function, and its header by claims."""
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


def test_what_was_written_is_accepted_and_read_back(case):
    witness = case.verify()
    assert witness.header == case.header
    assert witness.header.bound.kept < 12
    assert case.certificate.pairs > 0
    assert torch.equal(witness.labels, case.labels)
    for ours, theirs in zip(witness.meetings, case.certificate.meetings, strict=True):
        assert torch.equal(ours, theirs)
    assert len(case.sha256) == 64


def test_the_same_certificate_gives_the_same_file(case, tmp_path):
    assert write(tmp_path / "again", case.certificate, case.header, case.labels) == case.sha256


def test_nothing_that_met_is_a_witness_too(case, tmp_path):
    none = certify(case.layer, case.clean, case.labels, Linf(0.0), CertificateSettings())
    header = header_of(none, "logits", Linf(0.0), (case.clean, case.labels), HASH)
    write(tmp_path / "none", none, header, case.labels)
    assert case.verify(tmp_path / "none").header.bound.certified == 1


def test_an_image_outside_its_ball_is_named(case, tmp_path):
    row, member = 5, int(case.certificate.meetings.members[5])

    def move(tensors):
        image, clean = tensors["moved"][row], case.clean[member].double()
        pixel = int((clean - 0.5).abs().argmin())
        image.view(-1)[pixel] = clean.view(-1)[pixel] + EPS + 1e-4
        return tensors

    with pytest.raises(IntegrityError, match=f"image {member} is moved by 0.0801 in linf"):
        case.verify(case.forged(tmp_path, move))


@pytest.mark.parametrize("value", [float("nan"), -1e-4, 1.0001])
def test_an_image_that_is_none_is_named(case, tmp_path, value):
    member = int(case.certificate.meetings.members[2])

    def move(tensors):
        # where the ball alone would allow it
        pixel = int((case.clean[member] - min(max(value, 0), 1)).abs().argmin()) if value == value else 0
        tensors["moved"][2].view(-1)[pixel] = value
        return tensors

    with pytest.raises(IntegrityError, match=f"image {member} is moved by"):
        case.verify(case.forged(tmp_path, move))


def test_an_image_moved_inside_its_ball_is_named_for_its_features(case, tmp_path):
    member = int(case.certificate.meetings.members[3])

    def back(tensors):
        tensors["moved"][3] = case.clean[member].double()
        return tensors

    with pytest.raises(IntegrityError, match=f"image {member} does not meet the others at target 0"):
        case.verify(case.forged(tmp_path, back))


def test_a_changed_weight_is_found_by_its_hash_and_by_its_features(case):
    network = copy.deepcopy(case.net)
    used = int(network[:3](case.clean).mean(0).argmax())
    network[3].weight[0, used] += 1e-3
    other = Layer.of(network)
    with pytest.raises(IntegrityError, match="is of weights weights-0, these are weights-1"):
        case.verify(layer=other, weights_sha256="weights-1")
    # a hash that lies does not help
    with pytest.raises(IntegrityError, match=r"image [0-9]+ does not meet"):
        case.verify(layer=other)


def test_a_layer_that_looks_at_the_whole_batch_has_no_witness(case):
    together = nn.Sequential(*case.net, nn.Softmax(dim=0))
    with pytest.raises(IntegrityError, match=r"no witness can hold for this layer: .* other images of its batch"):
        case.verify(layer=Layer.of(together))


def test_a_swapped_label_is_named(case, tmp_path):
    def swap(tensors):
        tensors["labels"][7] = 0
        return tensors

    assert case.labels[7] == 3
    with pytest.raises(IntegrityError, match="image 7 is of class 3, the witness says 0"):
        case.verify(case.forged(tmp_path, swap))
    swapped = case.labels.clone()
    swapped[9] = 2
    with pytest.raises(IntegrityError, match="image 9 is of class 2, the witness says 1"):
        case.verify(labels=swapped)


def test_other_images_are_found(case):
    with pytest.raises(IntegrityError, match="is of images and labels"):
        case.verify(clean=case.clean.clone().index_fill(0, torch.tensor(3), 0.5))
    with pytest.raises(IntegrityError, match="is of 24 images, these are 23"):
        case.verify(clean=case.clean[:23], labels=case.labels[:23])
    assert data_sha256(case.clean, case.labels) != data_sha256(case.clean.double(), case.labels)


@pytest.mark.parametrize("edit", [-1, 1])
def test_an_edited_bound_is_found(case, tmp_path, edit):
    kept = case.certificate.bound.kept
    with pytest.raises(IntegrityError, match=f"claims that at most {kept + edit} of 24 images are kept"):
        case.verify(case.forged(tmp_path, bound={"kept": kept + edit}))


def test_an_edited_bound_does_not_hide_behind_a_stopped_search(case, tmp_path):
    kept = case.certificate.bound.kept
    with pytest.raises(IntegrityError, match="claims that at most"):
        case.verify(case.forged(tmp_path, bound={"kept": kept - 1, "exact": False, "kind": "milp, stopped"}))
    # a larger one is what a search that was stopped may say
    stopped = case.forged(tmp_path, bound={"kept": kept + 1, "exact": False, "kind": "milp, stopped"})
    assert case.verify(stopped).header.bound.kept == kept + 1


@pytest.mark.parametrize("value", [0.0, 23.0, float("nan")])
def test_an_edited_bound_for_randomised_heads_is_found(case, tmp_path, value):
    with pytest.raises(IntegrityError, match="by randomised heads"):
        case.verify(case.forged(tmp_path, bound={"randomised": value}))


def test_an_edited_count_of_images_is_found(case, tmp_path):
    with pytest.raises(IntegrityError, match="of 240 images"):
        case.verify(case.forged(tmp_path, bound={"images": 240}))


def test_a_smaller_eps_is_found(case, tmp_path):
    threat = {"norm": "linf", "eps": EPS / 2, "pixel_range": [0, 1]}
    with pytest.raises(IntegrityError, match=r"image [0-9]+ is moved by"):
        case.verify(case.forged(tmp_path, threat=threat))


def test_an_image_that_visits_twice_counts_once(case, tmp_path):
    """Rows copied under another index would be another image's: the ball finds them."""

    def borrow(tensors):
        tensors["members"][0] = next(i for i in range(24) if i not in case.certificate.meetings.members)
        return tensors

    with pytest.raises(IntegrityError, match=r"image [0-9]+ is moved by"):
        case.verify(case.forged(tmp_path, borrow))


def test_a_near_miss_is_refused_whatever_noise_the_file_names(tmp_path):
    case = Case(tmp_path, "bit-identical at float32")

    def shift(tensors):
        tensors["targets"] += 1e-3
        return tensors

    with pytest.raises(IntegrityError, match="which is not below noise floor"):
        case.verify(case.forged(tmp_path, shift, tier="below noise floor", noise=1.0))


def test_a_near_miss_is_not_proved(case, tmp_path):
    """The same in float32, and 1e-12 apart: an exact root of another target is none of this one's."""

    def shift(tensors):
        # one feature that no pixel of the network could move alone would be needed; here the first image stays behind
        tensors["moved"][0] = case.clean[int(tensors["members"][0])].double()
        return tensors

    first = int(case.certificate.meetings.members[0])
    with pytest.raises(IntegrityError, match=f"image {first} is not shown to meet the others at target 0"):
        case.verify(case.forged(tmp_path, shift, tier="proved"))


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_a_truncated_file_is_refused(case, tmp_path, share):
    whole = case.path.read_bytes()
    (tmp_path / "short").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(IntegrityError, match="no whole witness file"):
        case.verify(tmp_path / "short")


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"format": "other"}, "format 'other', legal: rvaudit-witness-1"),
        ({"tier": "sure"}, "tier 'sure', legal: proved"),
        ({"threat": {"norm": "l7", "eps": 0.1, "pixel_range": [0, 1]}}, "'l7'"),
        ({"threat": {"norm": "linf", "eps": 8, "pixel_range": [0, 1]}}, "outside"),
        ({"threat": None}, "no legal witness header"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(case, tmp_path, claims, message):
    with pytest.raises(IntegrityError, match=message):
        read(case.forged(tmp_path, **claims))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "at"}, "a witness holds"),
        (lambda t: t | {"moved": t["moved"].float()}, "moved is torch.float32"),
        (lambda t: t | {"at": t["at"][1:]}, "not equally many"),
        (lambda t: t | {"at": t["at"] + 1000}, "a target that is not there"),
    ],
)
def test_tensors_that_make_no_sense_are_refused(case, tmp_path, change, message):
    with pytest.raises(IntegrityError, match=message):
        read(case.forged(tmp_path, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"members": t["members"] + 24}, "of 24"),
        (lambda t: t | {"moved": t["moved"][:, :, :5].contiguous()}, "not [(]1, 6, 6[)]"),
        (lambda t: t | {"targets": t["targets"][:, :3].contiguous()}, "targets have 3 features, the layer has 4"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(case, tmp_path, change, message):
    with pytest.raises(IntegrityError, match=message):
        case.verify(case.forged(tmp_path, change))


def test_a_file_without_a_header_or_no_file_is_refused(case, tmp_path):
    save_file({"labels": case.labels}, tmp_path / "bare")
    with pytest.raises(IntegrityError, match="no legal witness header"):
        read(tmp_path / "bare")
    with pytest.raises(EnvironmentFault, match="there is no witness file"):
        read(tmp_path / "absent")


@pytest.mark.parametrize("tier", TIERS)
def test_a_witness_is_of_one_tier(tmp_path, tier):
    case = Case(tmp_path, tier)
    assert case.verify().header.tier == tier
    assert case.certificate.bound.kept < 20


def test_weaker_claims_of_layers_are_the_files_own(case, tmp_path):
    """The layer's name is what the caller builds the layer from: it is handed back as it stands."""
    write(tmp_path / "named", case.certificate, replace(case.header, layer="penultimate"), case.labels)
    assert case.verify(tmp_path / "named").header.layer == "penultimate"
