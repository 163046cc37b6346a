"""Networks in ONNX files: the numbers of the original runtime, classes and shapes of the graph, hostile files."""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from audit.errors import CheckpointError, EnvironmentFault, IntegrityError, MismatchError, UsageError
from model_zoo.load import SourceSettings, identify, load_model
from model_zoo.lookup import check_model
from model_zoo.sources.onnx_files import OneByOne

OFFLINE = SourceSettings(offline=True)


def weights(name: str, *shape: int) -> onnx.TensorProto:
    seed = sum(name.encode())
    return numpy_helper.from_array(np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32), name)


def saved(path: Path, nodes: list, tensors: list, out: list, batch: int | str = "n", opset: int = 17) -> str:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, *out])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    onnx.save(model, path)
    return f"file:{path}"


def convolutional(
    path: Path, outputs: int, batch: int | str = "n", opset: int = 17, to: tuple[int, ...] = (0, -1)
) -> str:
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "conv"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", ["a"], ["b"]),
        node("Reshape", ["b", "flat"], ["c"]),
        node("Gemm", ["c", "weight", "bias"], ["y"], transB=1),
    ]
    tensors = [weights("conv", 5, 3, 3, 3), weights("weight", outputs, 80), weights("bias", outputs)]
    tensors.append(numpy_helper.from_array(np.array(to, dtype=np.int64), "flat"))
    return saved(path, nodes, tensors, [outputs], batch, opset)


def runtime(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path))
    fixed = session.get_inputs()[0].shape[0] == 1
    name = session.get_inputs()[0].name
    parts = images[:, None] if fixed else [images]
    return np.concatenate([session.run(None, {name: part})[0] for part in parts])


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).random((5, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
def test_outputs_are_those_of_the_runtime(tmp_path: Path, images: np.ndarray, opset: int) -> None:
    ref = convolutional(tmp_path / "net.onnx", 7, opset=opset)
    model = load_model(ref, OFFLINE)
    assert (model.num_classes, model.image_shape, model.entry.name) == (7, (3, 8, 8), "net")
    found = model.network(torch.from_numpy(images))
    assert np.abs(found.numpy() - runtime(tmp_path / "net.onnx", images)).max() < 1e-5
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    leaf = torch.from_numpy(images).requires_grad_()
    (gradient,) = torch.autograd.grad(model.network(leaf)[:, 0].sum(), leaf)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    check_model(ref)
    assert identify(ref, OFFLINE).weights_sha256 == model.entry.weights_sha256


def test_a_normalisation_outside_the_graph_is_an_option(tmp_path: Path, images: np.ndarray) -> None:
    ref = convolutional(tmp_path / "net.onnx", 7)
    mean, std = np.array([0.4, 0.5, 0.6], np.float32), np.array([0.2, 0.3, 0.25], np.float32)
    model = load_model(f"{ref}?mean=.4,.5,.6&std=.2,.3,.25&name=other&training=robust&trained_eps=8/255", OFFLINE)
    wanted = runtime(tmp_path / "net.onnx", (images - mean[:, None, None]) / std[:, None, None])
    assert np.abs(model.network(torch.from_numpy(images)).numpy() - wanted).max() < 1e-5
    assert (model.entry.name, model.entry.training, model.entry.trained_eps) == ("other", "robust", 8 / 255)


@pytest.mark.parametrize(("to", "loops"), [((1, -1), True), ((0, -1), False)])
def test_a_graph_for_one_image_takes_batches(
    tmp_path: Path, images: np.ndarray, to: tuple[int, int], loops: bool
) -> None:
    ref = convolutional(tmp_path / "one.onnx", 4, batch=1, to=to)
    model = load_model(ref, OFFLINE)
    assert isinstance(model.network, OneByOne) == loops
    found = model.network(torch.from_numpy(images)).numpy()
    assert np.abs(found - runtime(tmp_path / "one.onnx", images)).max() < 1e-5


def test_one_output_decides_between_two_classes(tmp_path: Path, images: np.ndarray) -> None:
    model = load_model(convolutional(tmp_path / "one.onnx", 1), OFFLINE)
    scores = model.network(torch.from_numpy(images)).numpy()
    wanted = runtime(tmp_path / "one.onnx", images)[:, 0]
    assert model.num_classes == 2
    assert np.abs(scores - np.stack([np.zeros(5), wanted], 1)).max() < 1e-5


def test_slices_of_every_kind(tmp_path: Path, images: np.ndarray) -> None:
    def constants(name: str, *values: int) -> onnx.TensorProto:
        return numpy_helper.from_array(np.array(values, dtype=np.int64), name)

    nodes = [helper.make_node("Slice", ["x", "s", "e", "a", "t"], ["b"]), helper.make_node("Flatten", ["b"], ["y"])]
    tensors = [constants("s", 6, 1, -3), constants("e", -9, 3, 99), constants("a", 2, 1, -1), constants("t", -2, 1, 1)]
    model = load_model(saved(tmp_path / "s.onnx", nodes, tensors, [24]) + "?num_classes=24", OFFLINE)
    found = model.network(torch.from_numpy(images)).numpy()
    assert np.array_equal(found, images[:, 1:3, 6::-2, -3:].reshape(5, -1))
    assert np.array_equal(found, runtime(tmp_path / "s.onnx", images))


def test_an_encoder_is_asked_for(tmp_path: Path) -> None:
    model = load_model(convolutional(tmp_path / "net.onnx", 7) + "?num_classes=0", OFFLINE)
    assert (model.num_classes, tuple(model.network(torch.rand(2, 3, 8, 8)).shape)) == (0, (2, 7))


def test_names_in_a_file_are_not_run_as_code(tmp_path: Path) -> None:
    ref = convolutional(tmp_path / "net.onnx", 7)
    model = onnx.load(tmp_path / "net.onnx")
    code = f'"), open("{tmp_path / "touched"}", "w"), ("'
    for node in model.graph.node:
        node.name = code
    onnx.save(model, tmp_path / "net.onnx")
    load_model(ref, OFFLINE).network(torch.rand(1, 3, 8, 8))
    assert not (tmp_path / "touched").exists()


def test_what_cannot_be_loaded_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = convolutional(tmp_path / "net.onnx", 7)
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(CheckpointError, match="is not a valid ONNX file"):
        load_model(f"file:{tmp_path / 'bad.onnx'}", OFFLINE)
    with pytest.raises(UsageError, match="an ONNX file holds its own architecture and weights; leave out arch="):
        load_model(f"{good}?arch=timm:resnet18", OFFLINE)
    with pytest.raises(EnvironmentFault, match=r"none\.onnx does not exist"):
        load_model(f"file:{tmp_path / 'none.onnx'}", OFFLINE)
    with pytest.raises(EnvironmentFault, match=r"ne\.onnx does not exist; did you mean .*net\.onnx"):
        check_model(f"file:{tmp_path / 'ne.onnx'}")
    with pytest.raises(IntegrityError, match="not the published"):
        load_model(f"{good}?sha256={'0' * 64}", OFFLINE)
    with pytest.raises(MismatchError, match="has 7 outputs for one image, but 9 classes were expected"):
        load_model(f"{good}?num_classes=9", OFFLINE)
    nodes = [helper.make_node("Det", ["x"], ["d"]), helper.make_node("Flatten", ["d"], ["y"])]
    with pytest.raises(MismatchError, match=r"onnx2torch cannot convert .*Det.*load its weights as a state dict"):
        load_model(saved(tmp_path / "det.onnx", nodes, [], [3]), OFFLINE)
    model = onnx.load(tmp_path / "net.onnx")
    onnx.save(model, tmp_path / "out.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    with pytest.raises(UsageError, match="keeps weights in other files; save it as one file"):
        load_model(f"file:{tmp_path / 'out.onnx'}", OFFLINE)
    monkeypatch.setitem(sys.modules, "onnx2torch", None)
    with pytest.raises(
        EnvironmentFault, match=r"needs onnx2torch, which is not installed; pip install 'rvaudit\[onnx\]"
    ):
        load_model(good, OFFLINE)


def test_a_network_exported_by_torch(tmp_path: Path, images: np.ndarray) -> None:
    """Batch norm, pooling, a residual connection and attention, written node by node as torch's exporter does."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "conv"], ["a"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["a", "scale", "shift", "mean", "var"], ["b"]),
        node("Add", ["b", "x"], ["c"]),
        node("MaxPool", ["c"], ["d"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Shape", ["d"], ["s"]),
        node("Slice", ["s", "zero", "two"], ["front"]),
        node("Concat", ["front", "rest"], ["to"], axis=0),
        node("Reshape", ["d", "to"], ["tokens"]),
        node("Transpose", ["tokens"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["t", "tokens"], ["m"]),
        node("Softmax", ["m"], ["p"], axis=-1),
        node("MatMul", ["p", "t"], ["o"]),
        node("ReduceMean", ["o"], ["r"], axes=[1], keepdims=0),
        node("Gemm", ["r", "weight", "bias"], ["y"], transB=1),
    ]
    tensors = [weights("conv", 3, 3, 3, 3), weights("scale", 3), weights("shift", 3), weights("mean", 3)]
    tensors += [
        numpy_helper.from_array(np.full(3, 0.7, np.float32), "var"),
        weights("weight", 6, 3),
        weights("bias", 6),
    ]
    tensors += [numpy_helper.from_array(np.array(v, np.int64), k) for k, v in
                (("zero", [0]), ("two", [2]), ("rest", [-1]))]  # fmt: skip
    model = load_model(saved(tmp_path / "net.onnx", nodes, tensors, [6], opset=13), OFFLINE)
    found = model.network(torch.from_numpy(images)).numpy()
    assert np.abs(found - runtime(tmp_path / "net.onnx", images)).max() < 1e-5
