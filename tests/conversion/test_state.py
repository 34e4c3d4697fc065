"""Checkpoints and copies of replaced models."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import rl_kernels as rl
from rl_kernels.nn import ReplacementLayer
from tests.conversion.common import spread_out
from tests.conversion.toys import ResNet, ViT, encoder, image

MAKERS = {"ResNet": ResNet, "ViT": ViT, "encoder": encoder}


def converted(model: nn.Module, **options) -> nn.Module:
    rl.replace(model, rl.plan(model, every=3, **options))
    spread_out(model)
    return model


def batch(name: str) -> torch.Tensor:
    return torch.randn(2, 5, 8) if name == "encoder" else image(dtype=torch.float32)


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x)


def sources_inside(model: nn.Module) -> bool:
    """Whether every replaced layer refers to layers of this very model."""
    inside = {id(module) for module in model.modules()}
    layers = [module for module in model.modules() if isinstance(module, ReplacementLayer)]
    assert layers
    return all(
        id(source) in inside and id(layer.coefficient_module) in inside for layer in layers for source in layer.sources
    )


@pytest.fixture(params=MAKERS)
def name(request) -> str:
    return request.param


def test_a_state_dict_has_the_kept_parameters_once_and_the_coefficients(name):
    plain, model = MAKERS[name](), MAKERS[name]()
    plan = rl.plan(model, every=3)
    rl.replace(model, plan)
    gone = {f"{block.path}.{layer.path}.{p}" for block in plan.replaced for layer in block.layers for p in layer.shapes}
    come = {f"{b.path}.{b.layers[0].path}.mixing.coefficients" for b in plan.replaced}
    assert set(model.state_dict()) == set(plain.state_dict()) - gone | come
    assert {p for p, _ in model.named_parameters()} == {p for p, _ in plain.named_parameters()} - gone | come


def through_state_dict(model, path, make):
    twin = converted(make())
    assert str(twin.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    return twin


def through_saved_state_dict(model, path, make):
    torch.save(model.state_dict(), path)
    twin = converted(make())
    twin.load_state_dict(torch.load(path, weights_only=True), assign=True)
    return twin


def through_saved_model(model, path, make):
    torch.save(model, path)
    return torch.load(path, weights_only=False)


def through_pickle(model, path, make):
    return pickle.loads(pickle.dumps(model))


def through_deepcopy(model, path, make):
    return copy.deepcopy(model)


def through_safetensors_file(model, path, make):
    save_file(model.state_dict(), path)
    twin = converted(make())
    twin.load_state_dict(load_file(path))
    return twin


def through_safetensors_model(model, path, make):
    save_model(model, str(path))
    twin = converted(make())
    assert load_model(twin, str(path)) == (set(), [])
    return twin


def through_plan_and_meta(model, path, make):
    plan = rl.Plan.from_json(rl.plan(make(), every=3).to_json())
    with torch.device("meta"):
        twin = make()
    rl.replace(twin, plan).to_empty(device="cpu")
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize(
    "way",
    [
        through_state_dict,
        through_saved_state_dict,
        through_saved_model,
        through_pickle,
        through_deepcopy,
        through_safetensors_file,
        through_safetensors_model,
        through_plan_and_meta,
    ],
)
def test_round_trips(way, name, tmp_path):
    model = converted(MAKERS[name]())
    x = batch(name)
    expected = outputs(model, x)
    twin = way(model, tmp_path / "file", MAKERS[name])
    assert sources_inside(twin)
    assert torch.equal(outputs(twin, x), expected)
    with torch.no_grad():
        next(p for n, p in twin.named_parameters() if "mixing" in n).mul_(3)
    assert not torch.equal(outputs(twin, x), expected)
    assert torch.equal(outputs(model, x), expected)
    spread_out(twin)
    merged = rl.merge(twin)
    if name == "encoder":
        assert merged.use_nested_tensor and merged.layers[2].activation_relu_or_gelu == 1


def test_moving_and_casting_keeps_a_model_together():
    model = converted(ViT()).double()
    assert sources_inside(model)
    assert model(image()).dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in model.parameters())


# Plain checkpoints.


def test_a_plain_state_dict_loads_and_what_has_no_place_is_named(name):
    plain, model = MAKERS[name](), MAKERS[name]()
    spread_out(plain)
    plan = rl.plan(model, every=3)
    rl.replace(model, plan)
    spread_out(model)
    coefficients = {key: value.clone() for key, value in model.state_dict().items() if "mixing" in key}
    report = rl.load_plain_state_dict(model, plain.state_dict())
    gone = [f"{block.path}.{layer.path}.{p}" for block in plan.replaced for layer in block.layers for p in layer.shapes]
    assert sorted(report.unused) == sorted(gone)
    assert sorted(report.kept) == sorted(coefficients) and len(coefficients) == len(plan.replaced)
    for key, value in model.state_dict().items():
        assert torch.equal(value, coefficients.get(key, plain.state_dict().get(key)))
    unmatched = model.load_state_dict(plain.state_dict(), strict=False)
    assert (unmatched.missing_keys, unmatched.unexpected_keys) == (list(report.kept), list(report.unused))


def test_a_state_dict_of_its_own_loads_too():
    model = converted(ViT())
    report = rl.load_plain_state_dict(converted(ViT()), model.state_dict())
    assert report.unused == report.kept == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.bias"), r'Missing key\(s\) in state_dict: "head.bias"'),
        (lambda state: state.update({"tail": torch.ones(1)}), r'Unexpected key\(s\) in state_dict: "tail"'),
        (lambda state: state.update({"blocks.2.attn.tail": torch.ones(1)}), '"blocks.2.attn.tail"'),
        (lambda state: state.update({"head.bias": torch.ones(7)}), "size mismatch for head.bias"),
    ],
)
def test_other_keys_and_shapes_are_refused_and_nothing_is_written(change, message):
    model, state = converted(ViT()), ViT().state_dict()
    change(state)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=message) as raised:
        rl.load_plain_state_dict(model, state)
    assert "loading state_dict for ViT" in str(raised.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_version_of_a_checkpoint_counts():
    model, state = converted(ResNet()), ResNet().state_dict()
    for key in [key for key in state if "num_batches_tracked" in key]:
        del state[key]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bn1.num_batches_tracked"'):
        rl.load_plain_state_dict(model, state)
    del state._metadata  # As in checkpoints from before there were any.
    assert not any("num_batches" in key for key in rl.load_plain_state_dict(model, state).kept)


class Renaming(nn.Sequential):
    """Knows its parameters by older names, as torchvision's MLPBlock does."""

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for key in [key for key in state_dict if key.startswith(f"{prefix}old_")]:
            state_dict[key.replace("old_", "")] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_modules_may_rename_keys_while_they_load():
    def make() -> ViT:
        model = ViT(5)
        for block in model.blocks:
            block.mlp = Renaming(*block.mlp)
        return model

    model, plain = converted(make()), make()
    state = {key.replace("mlp.", "mlp.old_"): value for key, value in plain.state_dict().items()}
    report = rl.load_plain_state_dict(model, state)
    assert "blocks.2.mlp.0.weight" in report.unused
    assert torch.equal(model.blocks[1].mlp[0].weight, plain.blocks[1].mlp[0].weight)


def test_torch_save_of_a_model_needs_no_plan(tmp_path):
    buffer = io.BytesIO()
    model = converted(ViT())
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert loaded.state_dict().keys() == model.state_dict().keys()
