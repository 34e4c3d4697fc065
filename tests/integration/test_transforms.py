"""torch's transforms on other libraries' models, converted: what tests/transforms holds op by op, end to end."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, ExportedProgram, export
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import rl_kernels as rl
from tests.conversion.common import relative_error
from tests.integration.models import MODELS, converted
from tests.transforms.common import gradients

pytestmark = pytest.mark.integration

Named = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


def assert_same(found: Named, expected: Named, tolerance: float) -> None:
    """Relative to each one's norm; gradients that are nothing but rounding (of the keys' bias) to the largest's."""
    assert found.keys() == expected.keys()
    floor = 1e-4 * max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        assert relative_error(found[name], value, floor) < tolerance, name


@pytest.mark.parametrize("name", MODELS)
def test_compiled(name: str) -> None:
    """One graph for a model, its steps and a second instance of it; outputs and gradients are eager's."""
    model, _ = converted(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        x = MODELS[name].inputs(3, torch.float32)
        y, expected = compiled(x), model(x)
        assert relative_error(y, expected) < 1e-5
        assert_same(gradients(model, y), gradients(model, expected), 1e-4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    model.load_state_dict(converted(name)[0].state_dict())
    assert relative_error(compiled(x), model(x)) < 1e-5
    assert counter.frame_count == 1


def exported(model: nn.Module, x: Tensor, strict: bool) -> ExportedProgram:
    return export(model, (x,), strict=strict, dynamic_shapes=({0: Dim("batch", min=2)},))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
def test_exported(name: str, strict: bool) -> None:
    """An op a replaced layer, for every batch size, under the model's own names."""
    model, plan = converted(name)
    program = exported(model, MODELS[name].inputs(3, torch.float32), strict)
    ops = [node for node in program.graph.nodes if "rl_kernels.mixed" in str(node.target)]
    replaced = [layer for block in plan.replaced for layer in block.layers]
    assert len(ops) == sum("Linear" in layer.class_name or "Conv" in layer.class_name for layer in replaced)
    # Buffers that are not saved are constants.
    assert set(program.state_dict) == set(model.state_dict())
    x = MODELS[name].inputs(5, torch.float32)
    assert relative_error(program.module()(x), model(x)) < 1e-5


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles with g++")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")
def test_packaged(strict: bool, tmp_path: Path) -> None:
    """By AOTInductor, and loaded again."""
    model, _ = converted("vit")
    program = exported(model, MODELS["vit"].inputs(3, torch.float32), strict)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    x = MODELS["vit"].inputs(5, torch.float32)
    with torch.no_grad():
        assert relative_error(torch._inductor.aoti_load_package(path)(x), model(x)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_each_sample_and_of_an_ensemble(name: str) -> None:
    models = [converted(name, torch.float64)[0], converted(name, torch.float64)[0]]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(0.9)
    x = MODELS[name].inputs(3, torch.float64)
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]

    def loss(parameters: Named, buffers: Named, x: Tensor) -> Tensor:
        y: Tensor = functional_call(models[0], (parameters, buffers), (x[None],))
        return y.pow(3).sum()

    with sdpa_kernel(SDPBackend.MATH):
        found = vmap(vmap(grad(loss), (None, None, 0)), (0, 0, None))(parameters, buffers, x)
    for m, model in enumerate(models):
        for j, sample in enumerate(x):
            expected = gradients(model, model(sample[None]))
            assert_same({name: g[m, j] for name, g in found.items()}, expected, 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_forward_mode(name: str) -> None:
    """Tangents of all parameters, and of the coefficients alone, against differences."""
    model, _ = converted(name, torch.float64)
    x = MODELS[name].inputs(2, torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    directions = {name: torch.randn_like(p) for name, p in parameters.items()}
    mixing = {name: t * name.endswith("coefficients") for name, t in directions.items()}

    def along(tangents: Named, distance: float) -> Tensor:
        y: Tensor = functional_call(model, {n: p + distance * tangents[n] for n, p in parameters.items()}, (x,))
        return y

    for tangents in (directions, mixing):
        with sdpa_kernel(SDPBackend.MATH):
            _, tangent = jvp(lambda p: functional_call(model, p, (x,)), (parameters,), (tangents,))
        difference = (along(tangents, 1e-9) - along(tangents, -1e-9)) / 2e-9  # Short, so that few a ReLU turns
        assert difference.norm() > 1e-3
        assert relative_error(tangent, difference) < 1e-5


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_forward_mode_ends_at_torchs_fused_attention(name: str) -> None:
    """It has none on CPUs: torch says so, of a plain model as of a converted one."""
    x = MODELS[name].inputs(2, torch.float32)
    for model in (converted(name)[0], MODELS[name].build().eval()):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        with pytest.raises(NotImplementedError, match="forward AD with _scaled_dot_product_flash_attention_for_cpu"):
            jvp(lambda p, m=model: functional_call(m, p, (x,)), (parameters,), (parameters,))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str, half: torch.dtype) -> None:
    """As near to float32 as the model whose weights were mixed beforehand; gradients in float32."""
    model, _ = converted(name)
    merged = rl.merge(copy.deepcopy(model))
    x = MODELS[name].inputs(4, torch.float32)
    exact = model(x)
    errors = []
    for one in (model, merged):
        with torch.autocast("cpu", half):
            y = one(x).float()
        found = gradients(one, y)
        assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in found.values())
        errors.append(relative_error(y, exact))
    assert 0 < errors[0] < 2 * errors[1] + 1e-3


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_blocks(name: str, use_reentrant: bool) -> None:
    """Every block that holds replaced layers or their sources, each by itself."""
    model, plan = converted(name, torch.float64)
    x = MODELS[name].inputs(2, torch.float64)

    def backward() -> Named:
        model.zero_grad()
        model(x).pow(3).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = backward()
    blocks = {path: model.get_submodule(path) for block in plan.replaced for path in (block.path, *block.sources)}
    runs = dict.fromkeys(blocks, 0)
    for path, block in blocks.items():

        def run(*args: Any, path: str = path, forward: Any = block.forward, **kwargs: Any) -> Any:
            def once(*inner: Any) -> Any:
                runs[path] += 1
                return forward(*inner, **kwargs)

            return checkpoint(once, *args, use_reentrant=use_reentrant)

        block.forward = run
    assert_same(backward(), expected, 1e-12)
    assert set(runs.values()) == {2}


@pytest.mark.parametrize("name", MODELS)
def test_flops(name: str) -> None:
    """A replaced model's are those of the model it was made of, forward and backward."""
    model, _ = converted(name)
    x = MODELS[name].inputs(3, torch.float32)
    counts = []
    for one in (model, MODELS[name].build().eval()):
        with FlopCounterMode(display=False) as counter:
            one(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", MODELS)
def test_made_without_memory(name: str) -> None:
    """Built, planned and replaced on the meta device; given memory, then loaded."""
    with torch.device("meta"):
        model = MODELS[name].build().eval()
        rl.replace(model, rl.plan(model, every=4))
    assert all(parameter.is_meta for parameter in model.parameters())
    other, _ = converted(name)
    model.to_empty(device="cpu").load_state_dict(other.state_dict())
    for key, buffer in other.named_buffers():  # Those that are not saved.
        model.get_buffer(key).copy_(buffer)
    x = MODELS[name].inputs(2, torch.float32)
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)
