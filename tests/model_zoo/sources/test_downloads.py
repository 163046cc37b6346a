"""Downloads from a faulty local server."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from audit.errors import CheckpointError, EnvironmentFault, IntegrityError
from model_zoo.sources.downloads import Download, fetch
from model_zoo.sources.hub import hub_file
from model_zoo.untrusted import file_sha256, verify_sha256

Server = tuple[str, dict[str, tuple[bytes, int | None]], list[str]]
BODY = b"weights " * 1000
DIGEST = sha256(BODY).hexdigest()


def _leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_file_is_fetched_once_and_its_hash_kept(server: Server, tmp_path: Path) -> None:
    url, answers, asked = server
    answers["/w.pth"] = (BODY, None)
    download = Download(url=f"{url}/w.pth", sha256=DIGEST[:8])
    target = tmp_path / "new" / "w.pth"
    assert fetch(download, target).read_bytes() == BODY
    assert fetch(download, target, offline=True) == target
    assert asked == ["/w.pth"]
    assert _leftovers(target.parent) == ["w.pth", "w.pth.sha256"]


def test_the_first_seen_hash_is_remembered(server: Server, tmp_path: Path) -> None:
    url, answers, _ = server
    answers["/w.pth"] = (BODY, None)
    target = fetch(Download(url=f"{url}/w.pth"), tmp_path / "w.pth")
    assert verify_sha256(target) == DIGEST
    target.write_bytes(BODY[:-1] + b"X")
    with pytest.raises(IntegrityError, match="not the first seen"):
        fetch(Download(url=f"{url}/w.pth"), target)


def test_a_file_with_another_hash_is_not_kept(server: Server, tmp_path: Path) -> None:
    url, answers, _ = server
    answers["/w.pth"] = (BODY, None)
    with pytest.raises(IntegrityError, match="not the published 00000000; it is not kept"):
        fetch(Download(url=f"{url}/w.pth", sha256="00000000"), tmp_path / "w.pth")
    assert _leftovers(tmp_path) == []
    (tmp_path / "there.pth").write_bytes(BODY)
    with pytest.raises(IntegrityError, match="not the published 00000000; delete it"):
        fetch(Download(url=f"{url}/w.pth", sha256="00000000"), tmp_path / "there.pth")


@pytest.mark.parametrize(
    ("body", "announced", "kind"),
    [
        (BODY, len(BODY) + 5000, "truncated"),
        (b"", 5000, "truncated"),
        (b"", None, "empty"),
        (b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>", None, "html"),
    ],
)
def test_invalid_bodies_are_refused(server: Server, tmp_path: Path, body: bytes, announced: Any, kind: str) -> None:
    url, answers, _ = server
    answers["/w.pth"] = (body, announced)
    with pytest.raises(CheckpointError) as caught:
        fetch(Download(url=f"{url}/w.pth", link="https://example.org/w"), tmp_path / "w.pth")
    assert caught.value.kind == kind
    assert kind == "truncated" or "https://example.org/w" in str(caught.value)
    assert _leftovers(tmp_path) == []


def test_offline_opens_no_socket_and_names_the_target_path(server: Server, tmp_path: Path) -> None:
    url, _, asked = server
    with pytest.raises(EnvironmentFault, match=r"w\.pth does not exist and offline mode .* put the file from"):
        fetch(Download(url=f"{url}/w.pth"), tmp_path / "w.pth", offline=True)
    assert asked == []


def test_unavailable_servers_are_environment_faults(server: Server, tmp_path: Path) -> None:
    url, _, _ = server
    with pytest.raises(EnvironmentFault, match=r"cannot fetch .*/none\.pth \(HTTPError\); put the file"):
        fetch(Download(url=f"{url}/none.pth"), tmp_path / "w.pth")
    with pytest.raises(EnvironmentFault, match="ConnectionError"):
        fetch(Download(url="http://127.0.0.1:9/w.pth"), tmp_path / "w.pth")


def test_an_unwritable_folder_is_an_environment_fault(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentFault, match="cannot write"):
        fetch(Download(url=f"{server[0]}/w.pth"), tmp_path / "file" / "w.pth")
    with pytest.raises(EnvironmentFault, match="cannot read"):
        file_sha256(tmp_path / "missing")


def test_hub_files_are_compared_with_the_hash_the_hub_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    blob = tmp_path / "blobs" / DIGEST
    blob.parent.mkdir()
    blob.write_bytes(BODY)
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(link))
    assert hub_file("a/b", "model.safetensors", tmp_path / "none", offline=True) == (link, True)
    blob.write_bytes(b"other")
    with pytest.raises(IntegrityError, match="the hub states"):
        hub_file("a/b", "model.safetensors", tmp_path / "none", offline=True)
    plain = tmp_path / "config.json"
    plain.write_text("{}")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(plain))
    assert hub_file("a/b", "config.json", tmp_path / "none", offline=True) == (plain, False)
    assert hub_file("a/b", "config.json", plain, offline=False) == (plain, False)


def test_a_missing_hub_file_offline_is_an_environment_fault(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"model\.safetensors of no/such is not on this machine and offline"):
        hub_file("no/such", "model.safetensors", tmp_path / "none", offline=True)
