"""ONNX: a merged model is exported whole, a replaced one is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rl_kernels as rl
from tests.conversion.common import relative_error
from tests.integration.models import MODELS, converted

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("name", MODELS)
def test_a_merged_model(name: str, tmp_path: Path) -> None:
    from onnxruntime import InferenceSession

    model, _ = converted(name)
    x = MODELS[name].inputs(5, torch.float32)
    expected = model(x)
    merged, example = rl.merge(model), MODELS[name].inputs(3, torch.float32)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(merged, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}
    path = str(tmp_path / "model.onnx")
    program.save(path)
    session = InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(torch.from_numpy(found), expected) < 1e-5


@pytest.mark.parametrize(("name", "op"), [("resnet", "mixed_conv"), ("vit", "mixed_linear"), ("bert", "mixed_linear")])
def test_a_replaced_model_is_refused(name: str, op: str) -> None:
    model, _ = converted(name)
    with pytest.raises(torch.onnx.OnnxExporterError, match=rf"rl_kernels\.{op}"):
        torch.onnx.export(model, (MODELS[name].inputs(3, torch.float32),), dynamo=True, verbose=False)
