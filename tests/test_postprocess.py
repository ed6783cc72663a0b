"""Triton's Python model beside our own answers, without a server."""

import json
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from adavipro_fast.export import to_triton
from adavipro_fast.method.calibration import Calibration

NAMES = ["cat", "dog"]


@pytest.fixture
def model(monkeypatch, tmp_path):
    """Build the model for tasks that have these links."""
    import importlib.util
    import sys

    backend = ModuleType("triton_python_backend_utils")
    backend.get_input_tensor_by_name = lambda request, name: request.get(name)
    backend.Tensor = lambda name, values: SimpleNamespace(name=name, values=values)
    backend.InferenceResponse = lambda output_tensors: output_tensors
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    path = to_triton.MODELS / "postprocess.py"
    spec = importlib.util.spec_from_file_location("postprocess", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def build(**facts):
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "about.json").write_text(json.dumps({"class_names": [NAMES]} | facts))
        built = module.TritonPythonModel()
        built.initialize({"model_repository": str(tmp_path), "model_version": "1"})
        return built

    return build


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_triton_gives_the_probability_that_predict_gives(model, link):
    calibration = Calibration(2.0, link=link)
    logits = torch.tensor([[-6.0, -8.0], [-9.0, -3.0]])
    built = model(temperatures=[calibration.temperature], links=[link])
    classes, probabilities = built.answer({"logits": SimpleNamespace(as_numpy=logits.numpy)})
    expected = calibration.probabilities(logits).amax(1)
    np.testing.assert_allclose(probabilities.values[:, 0], expected, rtol=1e-6)
    assert [row[0].decode() for row in classes.values] == ["cat", "dog"]


def test_repositories_of_older_versions_are_softmax(model):
    built = model(temperatures=[1.0])
    logits = torch.tensor([[-6.0, -8.0]])
    _, probabilities = built.answer({"logits": SimpleNamespace(as_numpy=logits.numpy)})
    assert probabilities.values[0, 0] == pytest.approx(0.8808, abs=1e-4)
