"""What is refused when models are saved to a folder and loaded from it, and saves that fail."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import rl_kernels as rl
from rl_kernels.conversion import folder as files
from rl_kernels.nn import ReplacementLinear
from tests.conversion.test_pretrained import RECORD, Tied, replaced, same_state
from tests.conversion.toys import ViT, sequential


def changed(folder: Path, **fields: Any) -> None:
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, **fields}))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    with pytest.raises(OSError, match="there is none, as before: I/O error: No space left"):
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
    changed(tmp_path, format=3, versions={"rl_kernels": "9.0"})
    refused(
        ValueError, r"saved in format 3 by rl_kernels 9\.0, expected format 2 or 1: this is rl_kernels .*, and a newer"
    )
    changed(tmp_path, replaced={"layers": [{}]})
    refused(ValueError, r"rl_kernels\.json, which does not read \(KeyError: 'paths'")
    changed(tmp_path, replaced={**json.loads(text)["replaced"], "coefficients": {}})
    refused(ValueError, r"does not read \(KeyError: '5\.mixing'\)")
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


def with_arguments(classes: int, *, depth: int = 3) -> nn.Module:
    raise AssertionError("nothing is made")


@pytest.mark.parametrize(
    ("build", "options", "error", "said"),
    [
        (Tied, {"dtype": "bfloat16"}, TypeError, "dtype: got 'bfloat16', expected a torch.dtype, as torch.bfloat16"),
        (Tied, {"dtype": torch.int8}, ValueError, "dtype: got torch.int8, expected one of floating-point numbers"),
        (Tied, {"device": "gpu"}, ValueError, "device: got 'gpu', expected a device"),
        (with_arguments, {}, TypeError, "build: got with_arguments, which needs classes, expected a function without"),
    ],
)
def test_options_are_looked_at_first(build, options, error, said, tmp_path):
    with pytest.raises(error, match=said):
        rl.load_pretrained(tmp_path / "nothing is read", build, **options)
