"""Cache of clean activations: exact values, one computation, memory mapping and recovery from damage."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from audit.representation.cache import ActivationCache
from audit.representation.layers import Representation, encode_layers
from audit.run.intermediate import remove_stale_files
from audit.types import Encoded

KEY = {"network": "a", "images": "b", "layer": "0", "reduce": "flatten"}


class Counted:
    """Return the same encoding at every call, and count the calls."""

    def __init__(self, rows=5, width=3, classes=2, dtype=torch.float32):
        self.calls = 0
        draws = torch.Generator().manual_seed(0)
        self.encoded = Encoded(
            torch.rand(rows, width, generator=draws).to(dtype), torch.rand(rows, classes, generator=draws)
        )

    def __call__(self):
        self.calls += 1
        return self.encoded


def equal(found, wanted):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("classes", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_are_computed_once_and_read_by_later_caches(tmp_path, classes, dtype):
    compute = Counted(classes=classes, dtype=dtype)
    for _ in range(2):
        cache = ActivationCache(tmp_path / "deep" / "er")
        assert equal(cache.get(KEY, compute), compute.encoded)
        assert equal(cache.get(dict(reversed(KEY.items())), compute), compute.encoded)
    assert compute.calls == 1
    (path,) = (tmp_path / "deep" / "er").iterdir()
    rows, width = compute.encoded.features.shape
    assert path.stat().st_size == 512 + rows * (width * dtype.itemsize + classes * 4)


@pytest.mark.parametrize("name", KEY)
def test_every_field_of_the_key_matters(tmp_path, name):
    cache, compute = ActivationCache(tmp_path), Counted()
    cache.get(KEY, compute)
    cache.get({**KEY, name: "other"}, compute)
    assert compute.calls == 2


def test_kinds_of_device_have_separate_files(tmp_path):
    compute = Counted()
    ActivationCache(tmp_path).get(KEY, compute)
    assert ActivationCache(tmp_path, torch.device("meta")).get(KEY, compute).features.device.type == "meta"
    assert compute.calls == 2


def test_without_a_folder_values_stay_in_memory():
    compute, cache = Counted(), ActivationCache(None)
    assert cache.get(KEY, compute).features is cache.get(KEY, compute).features
    assert compute.calls == 1
    ActivationCache(None).get(KEY, compute)
    assert compute.calls == 2


def test_in_an_unwritable_folder_values_stay_in_memory(tmp_path):
    (tmp_path / "file").write_text("in the way")
    compute, cache = Counted(), ActivationCache(tmp_path / "file")
    for _ in range(2):
        assert equal(cache.get(KEY, compute), compute.encoded)
    assert compute.calls == 1


DAMAGE = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "empty": lambda path: path.write_bytes(b""),
    "header lost": lambda path: path.write_bytes(bytes(512) + path.read_bytes()[512:]),
    "foreign": lambda path: save_file({"features": torch.zeros(2, 2)}, path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_computed_again(tmp_path, damage):
    compute = Counted()
    ActivationCache(tmp_path).get(KEY, compute)
    (path,) = tmp_path.iterdir()
    DAMAGE[damage](path)
    for _ in range(2):
        assert equal(ActivationCache(tmp_path).get(KEY, compute), compute.encoded)
    assert compute.calls == 2


def test_a_failed_computation_leaves_no_file(tmp_path):
    def batches(_missing):
        yield {"layer": Counted().encoded}
        assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ActivationCache(tmp_path).get_all({"layer": KEY}, batches)
    assert not list(tmp_path.iterdir())


def test_on_a_full_disk_values_stay_in_memory(tmp_path, monkeypatch):
    def full(_file):
        raise OSError(28, "No space left on device")

    compute, cache = Counted(), ActivationCache(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    assert equal(cache.get(KEY, compute), compute.encoded)
    assert equal(cache.get(KEY, compute), compute.encoded)
    assert compute.calls == 2  # once for the disk, once for memory
    assert not list(tmp_path.iterdir())


def test_temporary_files_match_the_cleanup_of_run_folders(tmp_path):
    folder = tmp_path / "partial" / "features"

    def killed(_missing):
        yield {"layer": Counted().encoded}
        (left,) = folder.iterdir()
        os.link(left, left.with_name(left.name[:-8] + "abcdefgh"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ActivationCache(folder).get_all({"layer": KEY}, killed)
    (left,) = folder.iterdir()
    os.utime(left, (0, 0))
    remove_stale_files(tmp_path)
    assert not list(folder.iterdir())


def resident(path):
    """The KiB of a mapped file that are resident in this process; None if it is not mapped."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    found = [re.search(r"^Rss:\s+(\d+)", part, re.MULTILINE) for part in parts if str(path) in part]
    return sum(int(each[1]) for each in found) if found else None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_reading_maps_the_file_and_loads_only_accessed_rows(tmp_path):
    def batches(_missing):
        for start in range(0, 64, 8):
            yield {"layer": Encoded(torch.full((8, 2**18), float(start)), torch.zeros(8, 2))}

    cache = ActivationCache(tmp_path)
    cache.get_all({"layer": KEY}, batches)
    (path,) = tmp_path.iterdir()
    found = ActivationCache(tmp_path).get(KEY, Counted())
    assert found.features.shape == (64, 2**18)  # 64 MiB
    assert resident(path) is not None
    assert float(found.features[40].sum()) == 40 * 2**18
    assert resident(path) < 8 * 1024  # one row is 1 MiB
    found.features[0] += 1  # a caller's writes do not reach the file
    assert float(ActivationCache(tmp_path).get(KEY, Counted()).features[0, 0]) == 0
    assert path.stat().st_size == 512 + 64 * (2**18 + 2) * 4


def test_missing_layers_are_computed_in_one_pass(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)).requires_grad_(
        False
    )
    images, requested, passes = torch.rand(10, 3, 2, 2), [], []
    network.register_forward_pre_hook(lambda _module, args: passes.append(len(args[0])))

    def batches(missing):
        requested.append(list(missing))
        return encode_layers([Representation(network, layer) for layer in missing], images, 4)

    def keys(*layers):
        return {layer: {**KEY, "layer": layer} for layer in layers}

    ActivationCache(tmp_path).get_all(keys("1"), batches)
    passes.clear()
    found = ActivationCache(tmp_path).get_all(keys("1", "2", "logits"), batches)
    assert requested == [["1"], ["2", "logits"]]
    assert passes.count(4) == 2  # batches of 4, 4 and 2 images
    assert passes.count(2) == 1
    for layer, encoded in found.items():
        wanted = [Representation(network, layer).encode(batch) for batch in images.split(4)]
        assert torch.equal(encoded.features, torch.cat([each.features for each in wanted]))
        assert torch.equal(encoded.log_probs, torch.cat([each.log_probs for each in wanted]))
