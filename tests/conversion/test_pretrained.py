"""Saving a replaced model to a folder, and loading it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

import rl_kernels as rl
from rl_kernels.nn import Coefficients, ReplacementBatchNorm2d, ReplacementByForward, ReplacementLinear
from tests.conversion.common import spread_out
from tests.conversion.toys import ResNet, ViT, encoder, image, sequential

RECORD = "rl_kernels.json"


class Upward(nn.Module):
    """Transposed convolutions in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.ConvTranspose2d(3, 3, 3) for _ in range(5)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Tied(nn.Module):
    """A language model in miniature: tied weights, and a buffer that no file holds."""

    scale: Tensor

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.blocks = sequential()[2:-1]
        self.head = nn.Linear(6, 11, bias=False)
        self.register_buffer("scale", torch.linspace(1, 2, 6), persistent=False)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(tokens) * self.scale))


def tokens() -> Tensor:
    return torch.arange(10).view(2, 5)


def pixels() -> Tensor:
    return image(dtype=torch.float32)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any]]] = {
    "linear": (sequential, lambda: torch.randn(2, 3), {}),
    "channel": (sequential, lambda: torch.randn(2, 3), {"granularity": "channel", "init": "fit"}),
    "convex": (sequential, lambda: torch.randn(2, 3), {"constraint": "convex", "init": (0.3, 0.7), "detach": [1]}),
    "conv": (ResNet, pixels, {"share": "layer"}),
    "conv, norms own": (ResNet, pixels, {"norms": "own", "init": "fit"}),
    "attention": (ViT, pixels, {}),
    "attention, channel": (ViT, pixels, {"granularity": "channel"}),
    "encoder": (encoder, lambda: torch.randn(2, 5, 8), {}),
    "transposed": (Upward, pixels, {}),
    "tied": (Tied, tokens, {}),
}


def replaced(make: Callable[[], nn.Module] = sequential, dtype: torch.dtype | None = None, **options: Any) -> nn.Module:
    model = make()
    rl.replace(model, rl.plan(model, every=3, **options))
    spread_out(model)
    if isinstance(model, Tied):
        model.scale.copy_(Tied().scale)  # No file holds it: it is as it is built.
    return (model if dtype is None else model.to(dtype)).eval()


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def same_state(found: nn.Module, expected: nn.Module) -> None:
    mine, theirs = found.state_dict(), expected.state_dict()
    assert list(mine) == list(theirs)
    for key in mine:
        assert mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]), key


def round_trip(model: nn.Module, folder: Path, build: Any, **options: Any) -> nn.Module:
    rl.save_pretrained(model, folder)
    loaded: nn.Module = rl.load_pretrained(folder, build, **options)
    return loaded


@pytest.mark.parametrize("name", CASES)
def test_what_is_loaded_is_what_was_saved(name, tmp_path):
    make, batch, options = CASES[name]
    model, x = replaced(make, **options), batch()
    expected = outputs(model, x)
    loaded = round_trip(model, tmp_path / "new" / "folder", make)
    same_state(loaded, model)
    assert [(n, type(m)) for n, m in loaded.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    assert torch.equal(outputs(loaded, x), expected)
    rl.check(loaded)
    assert torch.equal(outputs(rl.merge(loaded), x), outputs(rl.merge(model), x))


@pytest.mark.parametrize("name", ["channel", "convex", "conv, norms own"])
def test_coefficients_start_anew_where_they_started(name, tmp_path):
    make, _, options = CASES[name]
    model = replaced(make, **options)
    loaded = round_trip(model, tmp_path, make)
    for one in (model, loaded):
        for module in one.modules():
            if isinstance(module, Coefficients):
                module.reset_parameters()
    same_state(loaded, model)


def test_a_plain_file_of_weights_and_a_record_without_pickles(tmp_path):
    model = replaced()
    rl.save_pretrained(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", RECORD]
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["format"] == 1 and record["model"] == "torch.nn.modules.container:Sequential"
    assert record["versions"] == {"rl_kernels": rl.__version__, "torch": torch.__version__}
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1  # safetensors makes files that none but the owner reads.
    twin = replaced()
    assert load_model(twin, tmp_path / "model.safetensors") == (set(), [])


def test_dtypes_stay_and_can_be_chosen(tmp_path):
    model = replaced(Tied, torch.bfloat16)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16, torch.float32}
    loaded = round_trip(model, tmp_path, Tied)
    same_state(loaded, model)
    assert loaded.scale.dtype == torch.bfloat16
    assert torch.equal(outputs(loaded, tokens()), outputs(model, tokens()))
    half = rl.load_pretrained(tmp_path, Tied, dtype=torch.float16)
    assert half.head.weight.dtype == torch.float16 and half.head.weight is half.embedding.weight
    assert {module.coefficients.dtype for module in half.modules() if isinstance(module, Coefficients)} == {
        torch.float32
    }
    assert rl.load_pretrained(tmp_path, Tied, dtype=torch.float64).head.weight.dtype == torch.float64


def test_float64(tmp_path):
    model = replaced(ResNet, torch.float64)
    loaded = round_trip(model, tmp_path, ResNet, device="cpu")
    same_state(loaded, model)
    x = image()
    assert torch.equal(outputs(loaded, x), outputs(model, x))


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights_are_stored_once_and_tied_again(tie, tmp_path):
    model = replaced(Tied)
    loaded = round_trip(model, tmp_path, lambda: Tied(tie))
    assert "head.weight" not in load_file(tmp_path / "model.safetensors")
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(outputs(loaded, tokens()), outputs(model, tokens()))


def test_parameters_that_share_memory_are_each_written(tmp_path):
    model = replaced()
    flat = torch.randn(2, 6)
    model[3].weight.data, model[3].bias.data = flat[0], flat[1]
    same_state(round_trip(model, tmp_path, sequential), model)


def test_a_model_on_the_meta_device_is_filled(tmp_path):
    model = replaced(ViT)

    def empty() -> nn.Module:
        with torch.device("meta"):
            return ViT()

    loaded = round_trip(model, tmp_path, empty)
    same_state(loaded, model)
    with torch.device("meta"):
        tied = Tied()
    rl.save_pretrained(replaced(Tied), tmp_path)
    with pytest.raises(ValueError, match="scale on the meta device, which is in no file"):
        rl.load_pretrained(tmp_path, tied)
    tied = Tied()
    scale, tied.scale = tied.scale, tied.scale.to("meta")
    tied.to("meta").scale = scale
    loaded = rl.load_pretrained(tmp_path, tied)
    assert loaded is tied and loaded.head.weight is loaded.embedding.weight and not loaded.head.weight.is_meta
    outputs(loaded, tokens())


def test_a_recurrent_layer_on_the_meta_device_runs_on_what_is_loaded(tmp_path):
    def make() -> nn.Module:
        return nn.ModuleDict({"lstm": nn.LSTM(4, 4), "layers": sequential()})

    model = replaced(make)
    with torch.device("meta"):
        empty = make()
    loaded = round_trip(model, tmp_path, empty)
    x = torch.randn(3, 2, 4)
    assert torch.equal(loaded["lstm"](x)[0], model["lstm"](x)[0])


def test_what_is_trainable_is_as_built(tmp_path):
    def frozen() -> nn.Module:
        return sequential().requires_grad_(False)

    rl.save_pretrained(replaced(frozen), tmp_path)
    assert all(parameter.requires_grad for parameter in rl.load_pretrained(tmp_path, sequential).parameters())
    assert not any(parameter.requires_grad for parameter in rl.load_pretrained(tmp_path, frozen).parameters())
    assert rl.load_pretrained(tmp_path, sequential).training
    assert not rl.load_pretrained(tmp_path, sequential().eval()).training


def test_it_trains_on(tmp_path):
    loaded = round_trip(replaced(Tied), tmp_path, Tied)
    optimizer = torch.optim.SGD(loaded.parameters(), 0.1)
    rl.check(loaded, optimizer)
    before = {name: parameter.clone() for name, parameter in loaded.named_parameters()}
    loaded(tokens()).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in loaded.named_parameters())


def test_attributes_of_layers_are_those_of_the_build(tmp_path):
    def make() -> nn.Module:
        model = sequential()
        for layer in model:
            layer.note = "kept"
        return model

    model = replaced(make)
    merged = rl.merge(round_trip(model, tmp_path, make))
    assert all(layer.note == "kept" for layer in merged)


def test_a_model_that_was_merged_in_part(tmp_path):
    model = replaced(ViT, share="layer")
    model.set_submodule("blocks.2.mlp.0", model.blocks[2].mlp[0].merged())
    loaded = round_trip(model, tmp_path, ViT)
    assert type(loaded.blocks[2].mlp[0]) is nn.Linear
    same_state(loaded, model)
    x = pixels()
    assert torch.equal(outputs(loaded, x), outputs(model, x))


def test_layers_that_were_wired_by_hand(tmp_path):
    class Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Wired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
            self.norm = nn.ModuleList(Norm(4) for _ in range(3))
            self.bn = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
            self.again = self.fc[1]

        def forward(self, x: Tensor) -> Tensor:
            for layer in [*self.fc, *self.norm, self.again]:
                x = layer(x)
            return self.bn[1](x[:, :, None, None])

    model = Wired()
    model.mixing = Coefficients(torch.tensor([0.2, 0.3, 0.4]))
    three = [model.fc[0], model.fc[2], model.fc[4]]
    model.fc[1] = model.again = ReplacementLinear(three, coefficients=model.mixing)
    model.fc[3] = ReplacementLinear(three, init=(0.5, 0.25, 0.25), granularity="channel", constraint="convex")
    model.norm[1] = ReplacementByForward((model.norm[0], model.norm[2]), own=model.norm[1])
    own = model.bn[1]
    model.bn[1] = ReplacementBatchNorm2d((nn.BatchNorm2d(4), nn.BatchNorm2d(4)), own=own, affine="own")
    spread_out(model)
    loaded = round_trip(model, tmp_path, Wired)
    assert loaded.again is loaded.fc[1] and loaded.fc[1].coefficient_module is loaded.mixing
    same_state(loaded, model)
    x = torch.randn(3, 4)
    assert torch.equal(outputs(loaded, x), outputs(model, x))


def test_wrappers_are_left_out(tmp_path):
    model = replaced()
    rl.save_pretrained(torch.compile(model, backend="eager"), tmp_path)
    same_state(rl.load_pretrained(tmp_path, sequential), model)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number in (2, 5):  # A plain layer, and one that is replaced.
        model[number] = torch.compile(model[number], backend="eager")
    rl.save_pretrained(model, tmp_path)
    loaded = rl.load_pretrained(tmp_path, sequential).state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[key], expected[key]) for key in loaded)


def test_shards_have_an_index(tmp_path):
    model = replaced(Tied)
    rl.save_pretrained(model, tmp_path, max_shard_size=200)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 3
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= 200
        assert all(index["weight_map"][key] == shard for key in tensors)
    assert index["metadata"]["total_size"] == sum(p.numel() * p.element_size() for p in model.parameters())
    same_state(rl.load_pretrained(tmp_path, Tied), model)


def test_a_second_save_takes_the_place_of_the_first(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "config.json").write_text("{}")
    rl.save_pretrained(replaced(ViT), tmp_path, max_shard_size="1 KB")
    model = replaced()
    rl.save_pretrained(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors", RECORD]
    same_state(rl.load_pretrained(tmp_path, sequential), model)
    rl.save_pretrained(rl.load_pretrained(tmp_path, sequential), tmp_path)  # Over the file that it was read from.
    same_state(rl.load_pretrained(tmp_path, sequential), model)
