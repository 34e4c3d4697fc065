"""Saving a replaced model to a folder, and loading it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

import rl_kernels as rl
from rl_kernels.conversion import folder as files
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


def changed(folder: Path, **fields: Any) -> None:
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, **fields}))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


class Stop(BaseException):
    """What a save is interrupted by."""


@pytest.mark.parametrize("error", [OSError("disk quota exceeded"), Stop()], ids=["error", "interrupt"])
@pytest.mark.parametrize("moves", range(7))
def test_a_save_that_fails_while_files_are_moved_leaves_the_older_one(moves, error, tmp_path, monkeypatch):
    rl.save_pretrained(replaced(Tied), tmp_path, max_shard_size=700)
    before = contents(tmp_path)
    real, calls = os.replace, []

    def failing(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == moves + 1:
            raise error
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises((OSError, Stop)) as raised:
        rl.save_pretrained(replaced(Tied), tmp_path)
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert re.search(r"could not be written, and it holds what it held before: disk quota", str(raised.value))
    assert contents(tmp_path) == before


def test_a_save_that_is_killed_while_files_are_moved_says_where_the_older_one_is(tmp_path, monkeypatch):
    model = replaced(Tied)
    rl.save_pretrained(model, tmp_path)
    real, calls = os.replace, []

    def failing(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) > 2:  # And for good, so that nothing is put back: as if nobody were there to do it.
            raise OSError("gone")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match=r"gone"):
        rl.save_pretrained(replaced(Tied), tmp_path)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"a save was cut short there: (.*) holds what was") as raised:
        rl.load_pretrained(tmp_path, Tied)
    there = re.search(r"there: (.*) holds", str(raised.value))
    assert there is not None
    same_state(rl.load_pretrained(there[1], Tied), model)


def test_a_full_disk_leaves_the_older_save(tmp_path, monkeypatch):
    rl.save_pretrained(replaced(), tmp_path)
    before = contents(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise files.safetensors("safetensors").SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"could not be written, and it holds what it held before: I/O error: No space"):
        rl.save_pretrained(replaced(ViT), tmp_path)
    assert contents(tmp_path) == before
    with pytest.raises(OSError, match="No space left"):
        rl.save_pretrained(replaced(), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"folder: .*file could not be written"):
        rl.save_pretrained(replaced(), tmp_path / "file")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OSError, match=r"model\.safetensors is a folder there"):
        rl.save_pretrained(replaced(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["file", "model.safetensors"]


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"steps": 3}

    def set_extra_state(self, state: Any) -> None: ...


def with_extra_state() -> nn.Module:
    return nn.Sequential(replaced(), Extra(2, 2))


def offloaded() -> nn.Module:
    model = replaced()
    model[3].to("meta")
    vars(model[3])["_hf_hook"] = object()
    return model


def quantised() -> nn.Module:
    model = replaced()
    model.register_buffer("packed", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    return model


def sparse() -> nn.Module:
    model = replaced()
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    return model


class Kind(ReplacementLinear):
    pass


def of_another_kind() -> nn.Module:
    model = sequential()
    model[5] = Kind((model[2], model[8]))
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: "model", TypeError, "model: got str, expected an nn.Module"),
        (sequential, ValueError, "model: got Sequential without replaced layers, expected one after replace: save a"),
        (lambda: rl.merge(replaced()), ValueError, "without replaced layers"),
        (lambda: replaced()[5], ValueError, "model: got a ReplacementLinear alone, expected a model that holds it"),
        (lambda: replaced()[5:], RuntimeError, "does not hold all that its replaced layers run on"),
        (lambda: replaced().to("meta"), ValueError, r"got 0\.weight on the meta device, expected weights in memory"),
        (offloaded, ValueError, r"got 3\.weight on the meta device \(accelerate has offloaded it\)"),
        (with_extra_state, ValueError, r"got 1\._extra_state of type dict, expected tensors only"),
        pytest.param(
            quantised,
            ValueError,
            r"got packed as torch\.Tensor of torch\.qint8 .*: quantise after loading",
            marks=pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
        ),
        (sparse, ValueError, r"got sparse as torch\.Tensor of torch\.float32 \(torch\.sparse_coo\)"),
        (of_another_kind, ValueError, r"got tests\..*Kind at 5, expected replaced layers of rl_kernels\.nn"),
    ],
)
def test_what_is_not_saved(make, error, message, tmp_path):
    model = make()
    with pytest.raises(error, match=message):
        rl.save_pretrained(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def wider() -> nn.Module:
    return sequential(width=7)


def of_others() -> nn.Module:
    return nn.Sequential(*(nn.ReLU() for _ in range(22)))


def other_head() -> nn.Module:
    return nn.Sequential(*sequential()[:-1], nn.Linear(6, 3))


def with_more() -> nn.Module:
    model = sequential()
    model.extra = nn.Parameter(torch.zeros(2))  # type: ignore[assignment]
    return model


def without_bias() -> nn.Module:
    return nn.Sequential(*sequential()[:-1], nn.Linear(6, 2, bias=False))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (None, ValueError, r"build: got none, and .* has no config\.json of transformers; expected a function"),
        (3, TypeError, "build: got int, expected a function that makes the plain model, or it"),
        (dict, TypeError, "build: got one that makes dict, expected an nn.Module"),
        (replaced, ValueError, r"build: got Sequential, .*: got one with replaced layers \(5\), expected none"),
        (
            lambda: sequential()[:4],
            ValueError,
            r"expected the model saved in .*: got Sequential without 5, expected it as",
        ),
        (wider, ValueError, r"got shapes {'weight': \(7, 7\), 'bias': \(7,\)} at 5, expected {'weight': \(6, 6\), "),
        (of_others, ValueError, "got ReLU at 5, expected Linear"),
        (other_head, ValueError, r"size mismatch for 20\.weight: .*\[2, 6\]\) from checkpoint, .*\[3, 6\]\)"),
        (with_more, ValueError, "expected the model saved in .*: it is not given extra"),
        (without_bias, ValueError, r"expected the model saved in .*: it has no place for 20\.bias"),
    ],
)
def test_builds_that_do_not_fit(build, error, message, tmp_path):
    rl.save_pretrained(replaced(), tmp_path)
    with pytest.raises(error, match=message):
        rl.load_pretrained(tmp_path, build)


def test_a_model_that_does_not_fit_keeps_its_weights(tmp_path):
    rl.save_pretrained(replaced(), tmp_path)
    model = other_head()
    before = {name: parameter.clone() for name, parameter in model[:5].named_parameters()}
    with pytest.raises(ValueError, match="size mismatch"):
        rl.load_pretrained(tmp_path, model)
    assert all(torch.equal(before[name], parameter) for name, parameter in model[:5].named_parameters())


def test_a_layer_whose_hooks_would_be_lost(tmp_path):
    rl.save_pretrained(replaced(), tmp_path)
    model = sequential()
    model[5].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"got hooks at 5 \(forward_hooks\), which would be lost"):
        rl.load_pretrained(tmp_path, model)


def test_folders_that_are_damaged(tmp_path):
    rl.save_pretrained(replaced(), tmp_path)
    weights, record = tmp_path / "model.safetensors", tmp_path / RECORD
    whole, text = weights.read_bytes(), record.read_text()

    def refused(error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            rl.load_pretrained(tmp_path, sequential)
        weights.write_bytes(whole)
        record.write_text(text)

    weights.write_bytes(whole[:-1])
    refused(ValueError, r"folder: got .*model\.safetensors, which is no whole safetensors file: ")
    weights.write_bytes(b"")
    refused(ValueError, "no whole safetensors file")
    weights.unlink()
    refused(FileNotFoundError, r"folder: got .* without model\.safetensors, which rl_kernels\.json names")
    record.write_text(text[:50])
    refused(ValueError, r"rl_kernels\.json, which is no JSON")
    record.write_text("[]")
    refused(ValueError, r"which is no record of a saved model")
    record.unlink()
    refused(FileNotFoundError, r"without rl_kernels\.json, expected what rl_kernels\.save_pretrained wrote")
    changed(tmp_path, format=2, versions={"rl_kernels": "9.0"})
    refused(ValueError, r"saved in format 2 by rl_kernels 9\.0, expected format 1: this is rl_kernels .*, and a newer")
    changed(tmp_path, replaced={"layers": [{}]})
    refused(ValueError, r"rl_kernels\.json, which does not read \(KeyError: 'paths'")
    changed(tmp_path, files=["../model.safetensors", "pytorch_model.bin"])
    refused(ValueError, "it is not given 0.weight")
    assert rl.load_pretrained(tmp_path, sequential) is not None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "Coefficients"}, "got a Coefficients at 5, expected a replaced layer"),
        ({"kind": "os.system"}, r"got a os\.system at 5"),
        ({"kind": "ReplacementLayerNorm"}, "the layer at 5 and its neighbours do not fit: sources"),
        ({"sources": ["2", "99"]}, "without 99, expected it as it was saved"),
        ({"sources": ["2", "5"]}, "got 5 mixed from a replaced layer"),
    ],
)
def test_records_that_were_changed(entry, message, tmp_path):
    rl.save_pretrained(replaced(), tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())["replaced"]
    record["layers"][0] |= entry
    changed(tmp_path, replaced=record)
    with pytest.raises(ValueError, match=message):
        rl.load_pretrained(tmp_path, sequential)


def test_weights_of_another_file(tmp_path):
    rl.save_pretrained(replaced(), tmp_path)
    save_file({"0.weight": torch.zeros(6, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"it is not given 0\.bias, .*, \.\.\.$"):
        rl.load_pretrained(tmp_path, sequential)


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: rl.save_pretrained(replaced(), tmp_path), lambda: rl.load_pretrained(tmp_path, sequential)):
        with pytest.raises(ImportError, match="need the package safetensors: pip install safetensors"):
            call()


def test_max_shard_size_is_checked(tmp_path):
    with pytest.raises(ValueError, match="max_shard_size: got 'much', expected an integer of bytes"):
        rl.save_pretrained(replaced(), tmp_path, max_shard_size="much")
