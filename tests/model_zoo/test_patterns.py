"""Patterns of model references."""

from pathlib import Path

import pytest

from audit.errors import UnknownNameError
from model_zoo.catalogue import bundled_names, robustbench_rows
from model_zoo.entries import parse_ref
from model_zoo.lookup import expand_ref


def test_names_of_bundled_and_robustbench_models() -> None:
    assert expand_ref("bundled:*") == [f"bundled:{name}" for name in bundled_names()]
    found = expand_ref("robustbench:cifar10/L2/*2020*")
    expected = [row.entry.ref for row in robustbench_rows() if (row.dataset, row.threat) == ("cifar10", "L2")]
    assert found == [ref for ref in expected if "2020" in ref]
    assert len(found) > 3
    for pattern in ("bundled:cifar-*", "robustbench:cifar11/*"):
        with pytest.raises(UnknownNameError, match=r"unknown \w+ pattern"):
            expand_ref(pattern)


def test_files_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.pth", "a.pth", "c.safetensors", "[x].pth", "5%20?.pt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.pth").mkdir()
    assert expand_ref("file:*.pth?arch=timm:resnet18") == [
        f"file:{name}.pth?arch=timm:resnet18" for name in ("[x]", "a", "b")
    ]
    assert expand_ref(f"file:{tmp_path}/c.*") == [f"file:{tmp_path}/c.safetensors"]
    (odd,) = expand_ref("file:5*.pt")
    assert parse_ref(odd).target == "5%20?.pt"
    for unchanged in ("file:none-*.pth?arch=x", "file:[x].pth", "file:a.pth?arch=net*.py:f", "timm:resnet*"):
        assert expand_ref(unchanged) == [unchanged]
