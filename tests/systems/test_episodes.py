"""Episodes: what is drawn, what either loop moves, and that the outer one differentiates through the inner."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F

from rl_kernels.__main__ import main
from rl_kernels.systems.modulation.episodes import (
    METHODS,
    Classes,
    FewShot,
    Learner,
    base,
    episodes,
    load_classes,
    run,
)

SMALL = {"ways": 3, "shots": 2, "queries": 2, "width": 4, "size": 8, "steps": 2, "meta_batch": 2, "base_steps": 2}


def classes(count=6, images=7, kind=torch.float32):
    generator = torch.Generator().manual_seed(0)
    patterns = 3 * torch.randn(count, 1, 1, 8, 8, generator=generator, dtype=kind)
    drawn = [pattern + torch.randn(images, 1, 8, 8, generator=generator, dtype=kind) for pattern in patterns]
    return Classes(drawn, drawn)


def few_shot(method="outer", **options):
    return FewShot(method=method, evaluated=4, **{**SMALL, **options})


def learner(method="outer", kind=torch.float32, **options):
    wanted = few_shot(method, **options)
    torch.manual_seed(0)
    return Learner(base(wanted, classes().training).to(kind), wanted)


def test_episodes_are_a_function_of_the_seed():
    """Of different classes in the labels' order, and of different images."""
    images = [torch.arange(5).reshape(5, 1, 1, 1) + 10.0 * label for label in range(6)]
    wanted = few_shot()
    first = next(episodes(images, wanted, 3, 1))
    again, other = (next(episodes(images, wanted, 3, seed)) for seed in (1, 2))
    assert torch.equal(first.support, again.support) and not torch.equal(first.support, other.support)
    assert first.support.shape == (3, 6, 1, 1, 1) and first.query.shape == (3, 6, 1, 1, 1)
    for support, query in zip(first.support.flatten(1), first.query.flatten(1), strict=True):
        labels = support // 10
        assert torch.equal(labels, query // 10) and len(labels.unique()) == 3
        assert torch.equal(labels.unique_consecutive()[first.support_labels], labels)
        assert len(torch.cat((support, query)).unique()) == 12


MOVED = {
    "maml": ("conv1", "norm1", "head"),
    "anil": ("head",),
    "norms": ("norm", "stem.1", "skip.1", "head"),
    "channel": ("scale", "head"),
    "outer": ("left", "right", "head"),
    "gate": ("gate", "head"),
    "mixout": ("down", "up", "head"),
}


@pytest.mark.parametrize("method", METHODS)
def test_which_parameters_either_loop_moves(method):
    each = learner(method)
    names = set(each.fast)
    assert all(any(word in name for name in names) for word in MOVED[method])
    if method != "maml":
        assert all(any(word in name for word in MOVED[method]) for name in names)
        assert not any(name.endswith("base.weight") for name in names)
    before = {name: value.detach().clone() for name, value in each.model.named_parameters()}
    each.learn(episodes(classes().training, each.wanted, 2, 0))
    changed = {name for name, value in each.model.named_parameters() if not torch.equal(value, before[name])}
    if method in ("maml", "anil"):
        assert any("conv1" in name for name in changed), "the outer loop moves the network"
    else:
        assert changed <= names and changed, "nothing else moves"


def test_the_network_may_be_learnt_beside_its_modulators():
    each = learner("outer", learn_base=True)
    before = each.model.stem[0].base.weight.detach().clone()
    each.learn(episodes(classes().training, each.wanted, 2, 0))
    assert not torch.equal(each.model.stem[0].base.weight, before) and "stem.0.base.weight" not in each.fast


@pytest.mark.parametrize("method", METHODS)
def test_adapting_is_gradient_descent(method):
    """By hand, with torch's own autograd; all episodes at once, as without gradients, as one by one."""
    each = learner(method, torch.float64, inner_steps=2)
    episode = next(episodes(classes(kind=torch.float64).training, each.wanted, 2, 0))
    found = each.after(episode)
    with torch.no_grad():
        torch.testing.assert_close(each.after(episode), found)
    for number in range(2):
        fast = {name: value.detach().clone().requires_grad_() for name, value in each.fast.items()}
        for _ in range(2):
            loss = F.cross_entropy(each.logits(fast, episode.support[number]), episode.support_labels)
            gradients = torch.autograd.grad(loss, [*fast.values()])
            fast = {
                k: (v - 0.1 * g).detach().requires_grad_() for (k, v), g in zip(fast.items(), gradients, strict=True)
            }
        torch.testing.assert_close(each.logits(fast, episode.query[number]), found[number])


@pytest.mark.parametrize("method", ["maml", "norms", "outer", "mixout"])
def test_the_outer_gradient(method, monkeypatch):
    """Of second order it is that of finite differences, which need a network whose gradients do not jump."""
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.softplus(x))

    def outer_loss(each, episode):
        labels = episode.query_labels.expand(2, -1)
        return F.cross_entropy(each.after(episode).flatten(0, 1), labels.flatten())

    gradients = {}
    for second_order in (True, False):
        each = learner(method, torch.float64, second_order=second_order, inner_rate=0.2)
        episode = next(episodes(classes(kind=torch.float64).training, each.wanted, 2, 0))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # Zeros are no place to differentiate at.
            for value in each.fast.values():
                value.add_(0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
        parameters = [*each.fast.values()]
        gradients[second_order] = torch.autograd.grad(outer_loss(each, episode), parameters)
        if second_order:
            directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
            losses = []
            for sign in (1e-6, -2e-6):
                with torch.no_grad():
                    for parameter, direction in zip(parameters, directions, strict=True):
                        parameter.add_(sign * direction)
                losses.append(float(outer_loss(each, episode)))
            numeric = (losses[0] - losses[1]) / 2e-6
            analytic = float(sum((g * d).sum() for g, d in zip(gradients[True], directions, strict=True)))
            assert analytic == pytest.approx(numeric, rel=1e-4)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(*gradients.values(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_equal_runs_are_equal_and_learn(method):
    first, second = (run([few_shot(method)], classes())[0] for _ in range(2))
    assert first["accuracy"] == second["accuracy"] and first["interval"] >= 0
    assert first["accuracy"] > 0.5, "classes that lie far from one another"


def test_sets_that_are_read(random_data):
    random_data(1, 8, 10, 40)
    found = load_classes(["random", "random"], 4)
    assert len(found.training) == 12 and len(found.test) == 8
    assert {len(each) for each in (*found.training, *found.test)} == {8} and found.test[0].shape[1:] == (1, 4, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "mlp"}, ValueError, "method: got 'mlp', expected one of 'maml'"),
        ({"ways": 0}, ValueError, "ways: got 0, expected at least 1"),
        ({"shots": 1.5}, TypeError, "shots: got 1.5, expected an integer"),
        ({"inner_rate": 0.0}, ValueError, "inner_rate: got 0.0, expected a number above 0"),
        ({"method": "maml", "learn_base": True}, ValueError, "learn_base: got True with method='maml'"),
        ({"ways": 9}, ValueError, "ways: got 9, expected at most 6, the classes that there are"),
        ({"shots": 6}, ValueError, "shots: got 8 with queries, expected at most 7, the images of a class"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        run([few_shot(**{**SMALL, **options})], classes())


def test_command(random_data, tmp_path):
    random_data(1, 8, 10, 40)
    small = [f"--set={key}={value}" for key, value in {**SMALL, "evaluated": 4}.items()]
    chosen = ["--variant", "maml-first-order", "--variant", "outer", "--json", str(tmp_path / "record.json")]
    found = CliRunner().invoke(main, ["few-shot", *chosen, *small, "--seeds", "2"])
    assert found.exit_code == 0, found.output
    assert "maml-first-order" in found.output and "outer" in found.output
    record = json.loads((tmp_path / "record.json").read_text())
    assert [*record["variants"]] == ["maml-first-order", "outer"]
    assert [each["seed"] for each in record["variants"]["outer"]] == [0, 1]
    for told, said in (
        ("--set=shot=1", "expected key=value, the key one of ways, shots"),
        ("--set=shots=x", "expected int"),
        ("--set=method=maml", "expected key=value"),
    ):
        found = CliRunner().invoke(main, ["few-shot", told])
        assert found.exit_code == 1 and said in found.output
