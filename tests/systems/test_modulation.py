"""Kernel Modulation: what a task changes, what it leaves alone, what it stores, and what is refused."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rl_kernels as rl
from rl_kernels.conversion.zoo import import_timm, import_torchvision
from rl_kernels.systems.models import DigitsResNet, DigitsViT
from rl_kernels.systems.modulation import (
    KINDS,
    merge_task,
    modulate,
    remove_task,
    run_tasks,
    save_task,
    set_task,
    task_parameters,
    task_state_dict,
    tasks_of,
)
from rl_kernels.systems.modulation.switched import Switched

ON_ANY_LAYER = ("channel", "outer", "mixout")


def resnet(classes=7):
    """With running statistics that are not those of a new network."""
    torch.manual_seed(0)
    model = DigitsResNet(8, (1, 1), classes)
    model.train()(images())
    return model.eval()


def images(count=5, dtype=torch.float32):
    return torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(1), dtype=dtype)


def disturb(model, task="task", scale=0.3):
    """As if the task had learnt something."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in task_parameters(model, task):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def untouched(model, state):
    assert not any(isinstance(module, Switched) for module in model.modules())
    assert [*model.state_dict()] == [*state]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


# What is computed.


@pytest.mark.parametrize("norms", ["own", "affine", "frozen"])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_task_begins_as_the_base(kind, norms):
    model, x = resnet(), images()
    expected = model(x)
    assert modulate(model, kind, norms=norms) is model
    torch.testing.assert_close(model(x), expected)
    set_task(model, None)
    assert torch.equal(model(x), expected)


LAYERS = {
    "linear": (nn.Linear(6, 5), (4, 3, 6)),
    "no bias": (nn.Linear(6, 5, bias=False), (4, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (2, 4, 11)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), padding="same", padding_mode="circular"), (2, 3, 6, 5)),
    "reflect": (nn.Conv2d(3, 4, 3, stride=2, padding=(1, 2), padding_mode="reflect", bias=False), (2, 3, 6, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 5, 5)),
    "pointwise": (nn.Conv2d(4, 3, 1), (2, 4, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 3, 4, 3)),
    "unbatched": (nn.Conv2d(2, 3, 3), (2, 5, 5)),
    "empty": (nn.Conv2d(2, 3, 3), (0, 2, 5, 5)),
}


def by_hand(kind, part, layer):
    """The weight and the bias that a kind is to make, written out."""
    weight, bias = layer.weight, part.bias
    rows = weight.flatten(1)
    if kind == "channel":
        factor = 1 + part.scale
        return weight * factor.reshape(-1, *(1,) * (weight.dim() - 1)), None if bias is None else bias * factor
    if kind == "outer":
        return (rows * (1 + part.left.t() @ part.right)).reshape(weight.shape), bias
    if kind == "mixout":
        groups = getattr(layer, "groups", 1)
        within = zip(rows.chunk(groups), part.up.chunk(groups), part.down.chunk(groups), strict=True)
        eye = torch.eye(len(rows) // groups, dtype=rows.dtype)
        return torch.cat([(eye + up @ down) @ mine for mine, up, down in within]).reshape(weight.shape), bias
    if kind == "gate":
        return weight * (1 + part.gate)[(..., *(None,) * (weight.dim() - 2))], bias
    hidden = weight.flatten(2) @ part.hidden.weight.t() + part.hidden.bias
    return weight + (F.gelu(hidden) @ part.out.weight.t() + part.out.bias).reshape(weight.shape), bias


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in KINDS
        for name, (layer, _) in LAYERS.items()
        if kind in ON_ANY_LAYER or not isinstance(layer, nn.Linear)
    ],
)
def test_values_and_gradients_are_those_of_the_formula(kind, name):
    layer, shape = LAYERS[name]
    torch.manual_seed(3)
    model = nn.Sequential(copy.deepcopy(layer).double())
    modulate(model, kind, 3, "all")
    disturb(model)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    switched, parameters = model[0], [*task_parameters(model, "task")]
    weight, bias = by_hand(kind, switched.part, switched.base)
    call = copy.copy(switched.base)
    expected = F.linear(x, weight, bias) if isinstance(layer, nn.Linear) else call._conv_forward(x, weight, bias)
    y = model(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(switched.weight, weight)
    assert (switched.bias is None) == (bias is None) and (bias is None or torch.allclose(switched.bias, bias))
    dy = torch.randn_like(y)
    pairs = zip(*(torch.autograd.grad(v, [x, *parameters], dy) for v in (y, expected)), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted)
    plain = merge_task(model, "task")
    assert type(plain[0]) is type(layer)
    torch.testing.assert_close(plain(x), y)


def test_half_precision_bases_have_coefficients_in_float32():
    model = resnet().bfloat16()
    expected = model(images(dtype=torch.bfloat16))
    modulate(model, "outer", 2)
    assert {p.dtype for n, p in model.named_parameters() if n.endswith((".left", ".right"))} == {torch.float32}
    torch.testing.assert_close(model(images(dtype=torch.bfloat16)), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    model = modulate(resnet(), kind)
    disturb(model, scale=0.05)
    expected = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images())
        F.cross_entropy(y, torch.zeros(len(y), dtype=torch.long)).backward()
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    assert all(p.grad is not None for p in task_parameters(model, "task"))


# What is shared.


@pytest.mark.parametrize("norms", ["own", "affine", "frozen"])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_training_a_task_leaves_the_base_and_other_tasks_alone(kind, norms):
    model, x = resnet(), images()
    before, alone = copy.deepcopy(model.state_dict()), model(x)
    modulate(model, "outer", 2, task="other")
    disturb(model, "other")
    other = model(x)
    modulate(model, kind, 2, norms=norms, head=4, task="mine")
    mine = [*task_parameters(model, "mine")]
    optimizer = torch.optim.SGD(mine, 0.1)
    model.train()
    for _ in range(2):
        F.cross_entropy(model(x), torch.arange(5) % 4).backward()
        assert all(p.grad is not None for p in mine)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert all(p.grad is None for p in model.parameters())
    learnt = model(x)
    assert learnt.shape == (5, 4)
    set_task(model, "other")
    assert torch.equal(model(x), other) and not torch.allclose(other, alone)
    set_task(model, None)
    assert torch.equal(model(x), alone)
    base = merge_task(model, None).state_dict()
    assert [*base] == [*before] and all(torch.equal(base[name], before[name]) for name in before)
    set_task(model, "mine")
    assert torch.equal(model(x), learnt)


def test_statistics_of_affine_norms_stay_the_bases():
    model = modulate(resnet(), None, norms="affine")
    model.train()(images())
    state = model.state_dict()
    for name in [key for key in state if ".base.running" in key]:
        assert torch.equal(state[name], state[name.replace(".base.", ".tasks.task.own.")])


def test_samples_of_several_tasks_in_one_batch():
    model, x = resnet(), images(6)
    for task, kind, head in (("a", "outer", 3), ("b", "mixout", 9), ("c", "channel", None)):
        modulate(model, kind, 2, head=head, task=task)
        disturb(model, task)
    set_task(model, "b")
    order = ["a", None, "c", "a", "b", "c"]
    y = run_tasks(model, x, order)
    assert y.shape == (6, 9)
    for sample, task in enumerate(order):
        set_task(model, task)
        alone = model(x[sample : sample + 1])[0]
        torch.testing.assert_close(y[sample, : len(alone)], alone)
        assert torch.isneginf(y[sample, len(alone) :]).all()
    set_task(model, "b")
    y[4, :2].sum().backward()
    with_gradient = {
        task for task in "abc" if any(p.grad is not None and p.grad.any() for p in task_parameters(model, task))
    }
    assert with_gradient == {"b"}
    run_tasks(model, x, ["a"] * 6)
    assert model.head.chosen == "b", "the choice is as it was"


def test_one_batch_of_features_of_any_shape():
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    for task in "ab":
        modulate(model, "outer", task=task)
        disturb(model, task)
    x = torch.randn(3, 2, 4, 4)
    y = run_tasks(model, x, ["b", "a", "b"])
    for sample, task in enumerate("bab"):
        set_task(model, task)
        torch.testing.assert_close(y[sample], model(x[sample : sample + 1])[0])


def test_a_layer_in_two_places_is_one():
    shared = nn.Conv2d(2, 2, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    modulate(model, "outer", 2)
    disturb(model)
    assert model[0] is model[2] and len(task_state_dict(model, "task")) == 3
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(merge_task(model, "task")(x), model(x))


def test_transformers():
    """Of attention the products of torch's own are passed over; what reads a weight by itself sees the task's."""
    torch.manual_seed(0)
    vit = DigitsViT(8, 2, 12, 2, 3).eval()
    x = torch.randn(2, 1, 8, 8)
    expected = vit(x)
    modulate(vit, "outer", 2, "linear")
    torch.testing.assert_close(vit(x), expected)
    assert not any("out_proj" in name for name in task_state_dict(vit, "task"))
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    modulate(layer, "outer", 2, "linear")
    disturb(layer)
    tokens = torch.randn(2, 5, 8)
    with torch.no_grad():
        fast = layer(tokens)
    torch.testing.assert_close(fast, layer(tokens))
    torch.testing.assert_close(merge_task(layer, "task")(tokens), fast)


def test_models_of_libraries():
    x = torch.randn(2, 3, 64, 64)
    for model in (
        import_torchvision().models.mobilenet_v2(num_classes=5),
        import_timm().create_model("efficientnet_b0", num_classes=5),
        import_timm().create_model("convnext_atto", num_classes=5),
    ):
        model.eval()
        expected = model(x)
        modulate(model, "outer", 1, head=None)
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
        disturb(model, scale=0.05)
        torch.testing.assert_close(merge_task(model, "task")(x), model(x), rtol=1e-3, atol=1e-3)


def test_copies_and_compiled_models():
    model = modulate(resnet(), "outer", 2)
    disturb(model)
    expected = model(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert tasks_of(other) == ("task",)
        assert torch.equal(other(images()), expected)
        set_task(other, None)
    assert torch.equal(model(images()), expected), "a copy's choice is its own"
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), expected)
    set_task(model, None)
    torch.testing.assert_close(compiled(images()), model(images()))


def checkpointed(reentrant=False):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            y = checkpoint(lambda x: self.conv(x).relu(), x, use_reentrant=reentrant)
            return self.fc(y.mean((2, 3)))

    torch.manual_seed(0)
    model = Net()
    for task in "ab":
        modulate(model, "outer", task=task)
        disturb(model, task)
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_does_not_compute_with_another_task(reentrant):
    """It computes layers again in backward: by then another task must not have been chosen, and none is silently."""
    x = images().requires_grad_()
    for switch in (
        lambda model: run_tasks(model, x, ["a", "b", "a", "b", "b"]).sum(),
        lambda model: [set_task(model, "a"), model(x).sum(), set_task(model, "b")][1],
        lambda model: sum([set_task(model, task), model(x).sum()][1] for task in "ab"),
    ):
        with pytest.raises(RuntimeError, match="where checkpointing computes a layer again in backward, after calls"):
            switch(checkpointed(reentrant)).backward()
    model, plain = checkpointed(reentrant), checkpointed(reentrant)
    for task in "abab":  # A task a step, in turns.
        for each in (model, plain):
            set_task(each, task)
        model(x).square().sum().backward()
        y = plain.fc(plain.conv(x).relu().mean((2, 3)))
        y.square().sum().backward()
        for found, expected in zip(task_parameters(model, task), task_parameters(plain, task), strict=True):
            torch.testing.assert_close(found.grad, expected.grad)
    set_task(model, "a")
    model(x)  # A call that no backward follows is forgotten when the mode is set.
    set_task(model, "b")
    model.train()(x).sum().backward()


def test_what_is_around_a_model_has_its_tasks():
    model = modulate(resnet(), "outer", 2, head=3, task="a")
    disturb(model, "a")
    expected = model(images())
    around = nn.DataParallel(model)
    assert tasks_of(around) == tasks_of(model) == ("a",)
    with pytest.raises(ValueError, match="task: got 'a', which the model has already"):
        modulate(around, "outer", 2, head=5, task="a")
    set_task(around, None)
    assert not torch.equal(model(images())[:, :3], expected)
    set_task(around, "a")
    assert torch.equal(around(images()), expected)


def test_a_task_is_removed():
    model = modulate(resnet(), "outer", 2, task="a")
    before = model.state_dict().keys()
    modulate(model, "mixout", 2, head=3, task="b")
    remove_task(model, "b")
    assert tasks_of(model) == ("a",) and {key for key in model.state_dict() if ".tasks." in key} <= before
    torch.testing.assert_close(model(images()), resnet()(images()))
    modulate(model, "channel", task="b")
    assert tasks_of(model) == ("a", "b")


def test_gradients_left_on_the_base_move_it_no_more():
    model, x = resnet(), images()
    expected = model(x)
    expected.sum().backward()
    modulate(model, "outer", 2, head=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).sum().backward()
    optimizer.step()
    set_task(model, None)
    assert torch.equal(model(x), expected)


# What is refused.


def hooked(add):
    model = resnet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        add(model.stem[0])
    return model


def single():
    return nn.Conv2d(2, 2, 3)


ERRORS = {
    "kind": (resnet, {"kind": "other"}, ValueError, "kind: got 'other', expected one of 'channel'"),
    "rank": (resnet, {"rank": 0}, ValueError, "rank: got 0, expected at least 1"),
    "half a rank": (resnet, {"rank": 0.5}, TypeError, "rank: got 0.5, expected an integer"),
    "norms": (resnet, {"norms": "all"}, ValueError, "norms: got 'all', expected one of 'own'"),
    "head": (resnet, {"head": 0}, ValueError, "head: got 0, expected at least 1"),
    "targets": (resnet, {"targets": "convs"}, ValueError, "targets: got 'convs', expected one of 'conv'"),
    "no target": (resnet, {"targets": []}, ValueError, "targets: got no path"),
    "no convolution": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)),
        {},
        ValueError,
        "targets: got 'conv', but the model has no convolution",
    ),
    "nothing but the classifier": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(3, 2)),
        {"targets": "linear", "head": 3},
        ValueError,
        "targets: got 'linear', but the model has no linear layer besides 1, the task's classifier",
    ),
    "no such path": (resnet, {"targets": ["stem.9"]}, ValueError, "targets: got 'stem.9', which is no module"),
    "a norm": (
        resnet,
        {"targets": ["stem.1"]},
        ValueError,
        "targets: got 'stem.1', which is BatchNorm2d, expected one",
    ),
    "the classifier": (resnet, {"targets": ["head"], "head": 2}, ValueError, "targets: got 'head', which head='head'"),
    "linear and gated": (
        resnet,
        {"targets": "all", "kind": "gate"},
        ValueError,
        "targets: got the linear layer 'head' with kind 'gate', expected convolutions",
    ),
    "no classifier": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3)),
        {"head": 2},
        ValueError,
        "head: got a number of classes, but the model has no linear layer",
    ),
    "another classifier": (
        resnet,
        {"head": 2, "classifier": "stem.0"},
        ValueError,
        "classifier: got 'stem.0', expected one of 'head'",
    ),
    "a classifier only": (resnet, {"classifier": "head"}, ValueError, "classifier: got 'head' without head"),
    "a name with dots": (resnet, {"task": "a.b"}, ValueError, "task: got 'a.b', expected a name without dots"),
    "a method's name": (resnet, {"task": "train"}, ValueError, "task: got 'train', expected a name"),
    "no name": (resnet, {"task": 3}, TypeError, "task: got int, expected a name"),
    "a single layer": (single, {}, ValueError, "model: got a single Conv2d, expected a model around it"),
    "hooks": (
        lambda: hooked(lambda layer: layer.register_forward_hook(lambda *_: None)),
        {},
        ValueError,
        "model: 'stem.0' has hooks (_forward_hooks), which a task would pass over",
    ),
    "an old weight norm": (
        lambda: hooked(torch.nn.utils.weight_norm),
        {},
        ValueError,
        "model: 'stem.0' has hooks (_forward_pre_hooks), which a task would pass over",
    ),
    "nothing of its own": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3)),
        {"kind": None},
        ValueError,
        "kind: got None without head, of a model without norms",
    ),
    "replaced": (
        lambda: rl.replace(deep := DigitsResNet(4, (4,)), rl.plan(deep, every=2)),
        {},
        ValueError,
        "model: 'blocks.1.conv1' runs on the weights of others, expected plain layers: call rl.merge first",
    ),
    "compiled": (
        lambda: torch.compile(resnet(), backend="eager"),
        {},
        ValueError,
        "model: got one that torch.compile made",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyConv2d(3, 3), nn.Conv2d(3, 3, 3)),
        {"targets": ["0"]},
        ValueError,
        "targets: got '0', which is LazyConv2d",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    build, options, kind, message = ERRORS[name]
    model = build()
    state = {} if name == "lazy" else copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=re.escape(message)):
        modulate(model, **options)
    if name != "lazy":
        untouched(model, state)


def test_errors_of_tasks():
    model = modulate(resnet(), "outer", 2, task="a")
    x = images()
    for call in (
        lambda: set_task(model, "b"),
        lambda: [*task_parameters(model, "b")],
        lambda: task_state_dict(model, "b"),
        lambda: merge_task(model, "b"),
        lambda: run_tasks(model, x, ["a"] * 4 + ["b"]),
        lambda: save_task(model, "b", "nowhere"),
    ):
        with pytest.raises(ValueError, match="task: got 'b', expected one of 'a'"):
            call()
    with pytest.raises(ValueError, match="task: got 'a', which the model has already"):
        modulate(model, "outer", 2, task="a")
    with pytest.raises(ValueError, match="tasks: got 2 names for 5 samples"):
        run_tasks(model, x, ["a", "a"])
    with pytest.raises(ValueError, match="task: got 'a', but the model has no task"):
        set_task(resnet(), "a")
