"""What a task is outside of its model: tensors, a file that knows its base, and how large it is."""

import copy
import json
import re

import pytest
import torch
from torch import nn

from rl_kernels.conversion.zoo import import_torchvision
from rl_kernels.systems.models import DigitsResNet
from rl_kernels.systems.modulation import (
    KINDS,
    load_task,
    load_task_state_dict,
    modulate,
    save_task,
    task_parameters,
    task_state_dict,
    tasks_of,
)
from rl_kernels.systems.modulation.switched import Switched
from tests.systems.test_modulation import disturb, images, resnet, untouched


@pytest.mark.parametrize("norms", ["own", "affine", "frozen"])
def test_a_layer_in_two_places_is_saved_and_loaded(norms, tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.Linear(1, 5)
            self.again, self.norm_again = self.conv, self.norm

        def forward(self, x):
            return self.fc(self.norm_again(self.again(self.norm(self.conv(x)).relu())).mean((2, 3)))

    torch.manual_seed(0)
    base = Shared().eval()
    model = modulate(copy.deepcopy(base), "outer", 1, norms=norms, head=3)
    disturb(model)
    save_task(model, "task", tmp_path / "task.safetensors")
    load_task(base, tmp_path / "task.safetensors")
    assert torch.equal(base(images()), model(images()))


@pytest.mark.parametrize("norms", ["own", "affine", "frozen"])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_task_is_saved_and_loaded(kind, norms, tmp_path):
    model, x = resnet(), images()
    modulate(model, kind, 2, norms=norms, head=3, task="mine")
    disturb(model, "mine")
    model.train()(x)
    expected = model.eval()(x)
    save_task(model, "mine", tmp_path / "mine.safetensors")
    base = resnet()
    assert load_task(base, tmp_path / "mine.safetensors") == "mine"
    assert torch.equal(base(x), expected)
    assert load_task(base, tmp_path / "mine.safetensors", "twin") == "twin"
    assert torch.equal(base(x), expected) and tasks_of(base) == ("mine", "twin")
    state = task_state_dict(model, "mine")
    stored = sum(value.nbytes for value in state.values())
    assert stored <= (tmp_path / "mine.safetensors").stat().st_size < stored + 200 * len(state) + 2000
    disturb(base, "twin")
    load_task_state_dict(base, state, "twin")
    assert torch.equal(base(x), expected)


def test_a_base_is_known_by_what_the_task_runs_on(tmp_path):
    """Its own norms and its own classifier replace the base's, which may differ therefore."""
    path = tmp_path / "task.safetensors"
    for norms in ("own", "affine"):
        model = modulate(resnet(), "outer", 2, norms=norms, head=3)
        save_task(model, "task", path)
        other = resnet(classes=2)
        other.load_state_dict({k: v for k, v in resnet().state_dict().items() if "head" not in k}, strict=False)
        load_task(copy.deepcopy(other), path)
        with torch.no_grad():
            other.stem[1].running_mean += 1
        if norms == "own":
            load_task(other, path)
            assert torch.equal(other(images()), model(images()))
        else:
            with pytest.raises(ValueError, match="of another base"):
                load_task(other, path)
    save_task(modulate(resnet(), "outer", 2), "task", path)
    with pytest.raises(ValueError, match="of another base"):
        load_task(resnet(classes=2), path)


def test_a_file_that_does_not_fit(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "task.safetensors"
    save_task(modulate(resnet(), "outer", 2), "task", path)
    with safe_open(path, "pt") as file:
        about, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def refused(match, about=about, state=state, base=resnet, **options):
        save_file(state, path, about)
        model = base()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=match):
            load_task(model, path, **options)
        untouched(model, before)

    def told(**changed):
        return {**about, "options": json.dumps({**json.loads(about["options"]), **changed})}

    def another():
        model = resnet()
        with torch.no_grad():
            model.blocks[0].conv1.weight[0, 0, 0, 0] += 1e-3
        return model

    refused("is a task of another base: of the weights", base=another)
    refused("is a task of another base: of the weights", base=lambda: resnet().double())
    refused("is a task of another base: this model has no 'blocks.0.conv1'", base=lambda: DigitsResNet(8, (0, 0)))
    refused(r"got shape \(2, 8\) of 'stem.0.left', expected \(3, 8\)", about=told(rank=3))
    refused("got no 'blocks.0.conv1.scale', expected the", about=told(kind="channel"))
    refused("does not say what its task is made of: kind 'other'", about=told(kind="other"))
    refused("does not say what its task is made of: rank 0", about=told(rank=0))
    refused("does not say what its task is made of", about={**about, "options": "{}"})
    refused("has format 'other', expected 'rl_kernels task 1'", about={**about, "format": "other"})
    for name in ("task", "base", "options"):
        refused(f"does not say its {name!r}", about={key: value for key, value in about.items() if key != name})
    refused("rank 10000000000, of which its tensors have no more than", about=told(rank=10**10))
    refused("classes 10000000000, of which", about=told(classes=10**10, classifier="head"))
    refused("got no 'stem.0.left'", state={k: v for k, v in state.items() if k != "stem.0.left"})
    refused("got 'more', which the task has not", state={**state, "more": torch.zeros(1)})
    refused("task: got 'a.b', expected a name without dots", task="a.b")
    path.write_bytes(b"nothing")
    model = resnet()
    before = copy.deepcopy(model.state_dict())
    for name, match in ((path, "is no file of safetensors"), (tmp_path / "none", "is no file")):
        with pytest.raises(ValueError, match=match):
            load_task(model, name)
    untouched(model, before)


def test_a_state_of_another_rank():
    model = modulate(resnet(), "outer", 2)
    state = task_state_dict(modulate(resnet(), "outer", 3), "task")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=re.escape("got shape (3, 8) of 'stem.0.left', expected (2, 8)")):
        load_task_state_dict(model, state, "task")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path):
    from rl_kernels.systems.runner.folder import RunError

    model = modulate(resnet(), "outer", 2)
    with pytest.raises(RunError, match="not written"):
        save_task(model, "task", tmp_path / "none" / "task.safetensors")
    assert not (tmp_path / "none").exists()


# How large a task is.

SHARES = {
    # Per cent of the whole network, as systems of this kind are compared: modulators, then affine norms.
    "resnet18": {"channel": 0.04, "gate": 11.9, "outer": 0.31, "mixout": 1.31, "mlp": 0.23, "norms": 0.08},
    "resnet34": {"channel": 0.04, "gate": 11.5, "outer": 0.34, "mixout": 1.25, "mlp": 0.21, "norms": 0.08},
    "resnet50": {"channel": 0.10, "gate": 52.4, "outer": 0.31, "mixout": 3.33, "mlp": 0.13, "norms": 0.21},
}


@pytest.mark.parametrize("name", SHARES)
def test_shares_of_parameters(name):
    with torch.device("meta"):
        model = import_torchvision().models.get_model(name, weights=None)
        whole = sum(p.numel() for p in model.parameters())
        for kind in KINDS:
            modulate(model, kind, 16 if kind == "mixout" else 1, norms="frozen", task=kind)
        modulate(model, None, norms="own", task="norms")
        modulate(model, "outer", 4, task="default")
    found = {task: 100 * sum(p.numel() for p in task_parameters(model, task)) / whole for task in tasks_of(model)}
    for task, share in SHARES[name].items():
        assert found[task] == pytest.approx(share, abs=0.005 if share < 10 else 0.05), task
    assert 1.2 < found["default"] < 1.5, "about 1.4 % of the network"
    # In a file running statistics stand beside: two numbers a channel more, and a counter a norm.
    stored = sum(value.nbytes for value in task_state_dict(model, "default").values())
    norms = sum(isinstance(layer, Switched) and isinstance(layer.base, nn.BatchNorm2d) for layer in model.modules())
    parameters = sum(p.numel() for p in task_parameters(model, "default"))
    affine = sum(p.numel() for p in task_parameters(model, "norms"))
    assert stored == 4 * (parameters + affine) + 8 * norms
