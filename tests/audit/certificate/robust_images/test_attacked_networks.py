"""No image is proved that an attack breaks: every bundled network, and the third-party networks."""

import copy
import os
from pathlib import Path

import pytest

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import TIERS
from audit.adversary.threat import L1, L2, Linf
from audit.certificate.robust_images.ledger import LedgerInputs, keep_ledger, proved_rows
from audit.certificate.robust_images.results import BoundEffort
from audit.config.yaml_source import read_config
from audit.run.cell import expand
from model_zoo.catalogue import bundled_names
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model

ROOT = Path(__file__).parents[4]
FOLDER = Path(os.environ.get("RVAUDIT_THIRD_PARTY", ROOT.parent / "shared"))
THIRD_PARTY = (
    "resnet20", "resnet56", "resnet2b", "cnn-a-adv", "cnn-a-mix4", "cnn-a-wide", "marabou-medium", "mnist-cnn-a-adv",
    "mnist-cnn-a-certified", "mnist-conv-small",
)  # fmt: skip


def check(network, images, labels, threat):
    """Attack after the ledger was kept without an attack: every image is bounded, and no proved one may fall."""
    precise = copy.deepcopy(network).double()
    effort = BoundEffort(slope_steps=3)
    ledger = keep_ledger(LedgerInputs(network, precise, images, labels), threat, images, effort)
    proved = proved_rows(ledger, precise, (images, labels), threat)
    robust = measure_accuracy(network, images, labels, threat, TIERS["audit"], 0).robust
    assert bool((proved <= robust).all())
    assert int(proved.sum()) == ledger.proved
    assert ledger.reason == ""
    return ledger.proved


@pytest.mark.parametrize(("place", "name"), tuple(enumerate(bundled_names())))
def test_no_bundled_network_loses_a_proved_image(place, name):
    """The three norms take turns."""
    network = load_model(f"bundled:{name}", SourceSettings(offline=True)).network.eval().requires_grad_(False)
    data = load_images("digits", ImageRequest(count=4))
    threat = (Linf(0.004), L2(0.02), L1(0.04))[place % 3]
    proved = check(network, data.images, data.labels, threat)
    assert proved > 0 or not name.startswith("digits-baseline-h-robust")


@pytest.mark.third_party
@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no third-party files in {FOLDER} (see RVAUDIT_THIRD_PARTY)")
@pytest.mark.parametrize("name", THIRD_PARTY)
def test_no_third_party_network_loses_a_proved_image(name, tmp_path):
    nets = "tests/third_party_nets.py"
    text = (ROOT / "tests" / "third_party.yaml").read_text()
    (tmp_path / "b.yaml").write_text(text.replace("../shared", str(FOLDER)).replace(nets, str(ROOT / nets)))
    (cell, *_) = [cell for cell in expand(read_config(tmp_path / "b.yaml")) if f"&name={name}&" in cell.ref]
    network = load_model(cell.ref, SourceSettings(trust_code=True, offline=True)).network.eval().requires_grad_(False)
    data = load_images(cell.dataset, ImageRequest(count=4))
    check(network, data.images, data.labels, cell.threat)
