"""Fixtures of the model zoo tests: small networks, state dicts, and a local HTTP server."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from model_zoo.load import LoadedModel, SourceSettings

FACTORIES = """
import torch
from torch import nn

def head():
    return nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()

def small(num_classes=10):
    return nn.Sequential(*head(), nn.Linear(64, num_classes))

def tiny():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def broken():
    raise RuntimeError("out of paint")

def number():
    return 7
"""


def build_small(num_classes: int = 10) -> nn.Module:
    """Return a network for images of shape 3x8x8."""
    layers = (nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, num_classes))
    return nn.Sequential(*layers)


@pytest.fixture
def small() -> Callable[..., nn.Module]:
    return build_small


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(FACTORIES)
    return path


@pytest.fixture
def trusted(tmp_path: Path) -> SourceSettings:
    return SourceSettings(trust_code=True, offline=True, cache_dir=tmp_path / "cache", model_dir=tmp_path / "models")


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_small().state_dict()


class _Handler(BaseHTTPRequestHandler):
    answers: dict[str, tuple[bytes, int | None]] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        if self.path not in self.answers:
            self.send_error(404)
            return
        body, announced = self.answers[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, tuple[bytes, int | None]], list[str]]]:
    """Yield the address of a server, its bodies with Content-Length by path, and the list of requested paths."""
    handler = type("Handler", (_Handler,), {"answers": {}, "asked": []})
    http = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", handler.answers, handler.asked
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def offline(tmp_path: Path) -> SourceSettings:
    return SourceSettings(offline=True, cache_dir=tmp_path / "cache", model_dir=tmp_path / "models")


def _contract(model: LoadedModel) -> None:
    """Check eval mode, frozen parameters, output shape, and the gradient to the images."""
    assert not any(module.training for module in model.network.modules())
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert model.image_shape is not None
    images = torch.rand(1, *model.image_shape, requires_grad=True)
    scores = model.network(images)
    assert scores.shape == (1, model.num_classes)
    scores.square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


@pytest.fixture
def check_contract() -> Callable[[LoadedModel], None]:
    return _contract
