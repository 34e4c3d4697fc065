"""Replaced models: values and gradients, options, refusals, and merging."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import rl_kernels as rl
from rl_kernels.nn import Coefficients, ReplacementLayer
from rl_kernels.nn.coefficients import fit
from tests.conversion.common import check_replaced, coefficients_of, fingerprint, join, relative_error
from tests.conversion.toys import ResNet, ViT, encoder, image, sequential, vgg


def replacements(model: nn.Module) -> dict[str, ReplacementLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ReplacementLayer)}


def converted(model: nn.Module, **options) -> nn.Module:
    return rl.replace(model, rl.plan(model, **options))


# Values and gradients, against parameters mixed by hand.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"every": 2},
        {"share": "layer"},
        {"granularity": "channel"},
        {"norms": "own"},
        {"targets": "conv", "detach": (0,)},
        {"constraint": "convex"},
        {"level": "layer"},
        {"init": "fit"},
    ],
    ids=str,
)
def test_a_resnet_34_has_the_gradients_of_one_mixed_by_hand(options):
    check_replaced(ResNet(), (image(),), **options)


@pytest.mark.parametrize("torch_attention", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"every": 2, "detach": (1,)},
        {"share": "layer", "init": (0.3, 0.9)},
        {"targets": "attention"},
        {"init": "fit"},
    ],
    ids=str,
)
def test_a_vit_has_the_gradients_of_one_mixed_by_hand(options, torch_attention):
    check_replaced(ViT(torch_attention=torch_attention), (image(),), **options)


@pytest.mark.parametrize("make", [lambda: ResNet((2, 2, 2, 2)), vgg], ids=["ResNet-18", "VGG"])
def test_single_layers_have_the_gradients_of_some_mixed_by_hand(make):
    check_replaced(make(), (image(),), every=3)


def test_a_plain_sequential_has_the_gradients_of_one_mixed_by_hand():
    check_replaced(sequential(), (torch.randn(4, 3, dtype=torch.float64),), every=2, share="layer")


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"bias": False}, {"activation": "gelu"}], ids=str)
def test_torchs_encoder_has_the_gradients_of_one_mixed_by_hand(options):
    model = encoder(**options)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
    # Outputs at padded positions are nobody's business: torch's paths differ there.
    check_replaced(model, (x,), lambda y: y * ~padding[..., None], {"src_key_padding_mask": padding}, every=3)


def test_torchs_decoder_has_the_gradients_of_one_mixed_by_hand():
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x, memory = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    check_replaced(nn.TransformerDecoder(layer, 5), (x, memory), every=2)


# Options.


def test_one_pair_serves_a_block_and_the_first_layer_holds_it():
    model = converted(ViT())
    held = [name for name, module in model.named_modules() if isinstance(module, Coefficients)]
    assert held == ["blocks.3.norm1.mixing", "blocks.7.norm1.mixing"]
    layers = replacements(model)
    assert len(layers) == 10
    assert len({id(layer.coefficient_module) for layer in layers.values()}) == 2
    assert [tuple(module.coefficients.shape) for module in model.modules() if isinstance(module, Coefficients)] == [
        (2,)
    ] * 2
    assert model.blocks[3].mlp[0].sources == (model.blocks[2].mlp[0], model.blocks[4].mlp[0])


def test_a_pair_a_layer_or_a_channel():
    model = converted(ViT(), share="layer")
    assert sum(isinstance(module, Coefficients) for module in model.modules()) == 10
    model = converted(ResNet(), granularity="channel")
    shapes = [tuple(module.coefficients.shape) for module in model.modules() if isinstance(module, Coefficients)]
    assert shapes == [(2, 8)] * 4 + [(2, 16)] * 4


def test_options_reach_the_layers():
    model = converted(ViT(), init=(0.25, 0.75), constraint="convex", detach=(1,))
    for layer in replacements(model).values():
        assert layer.detach == (1,) and layer.coefficient_module.constraint == "convex"
        torch.testing.assert_close(layer.coefficients, torch.tensor([0.25, 0.75]))
    assert converted(ViT()).blocks[3].attn.coefficients.tolist() == [0.5, 0.5]


def test_one_pair_is_fitted_to_all_weights_of_a_block():
    model = ResNet().double()
    plain = copy.deepcopy(model)
    plan = rl.plan(model, init="fit", targets="conv")
    rl.replace(model, plan)
    pairs = [
        [(plain.get_submodule(join(place, layer.path)).weight) for place in (block.path, *block.sources)]
        for block in plan.replaced[:1]
        for layer in block.layers
    ]
    own = torch.cat([weights[0].flatten() for weights in pairs])
    sources = torch.stack([torch.cat([weights[j].flatten() for weights in pairs]) for j in (1, 2)], 1)
    expected = torch.linalg.lstsq(sources, own[:, None]).solution.flatten()
    coefficients = model.layer2[2].conv1.coefficients
    assert coefficients.dtype == torch.float64
    torch.testing.assert_close(coefficients.detach(), expected.detach(), rtol=1e-9, atol=1e-9)

    by_layer = converted(copy.deepcopy(plain), init="fit", share="layer").layer2[2].conv1
    alone = fit(by_layer.fit_pairs(plain.layer2[2].conv1, by_layer.sources))
    torch.testing.assert_close(by_layer.coefficients.detach(), alone)
    assert relative_error(by_layer.coefficients, expected) > 1e-3


def test_precision_training_mode_and_running_statistics_are_kept():
    model = ResNet().bfloat16().eval()
    model(image(dtype=torch.bfloat16))
    model.layer2[2].bn1.train()
    means = [model.layer2[2].bn1.running_mean.fill_(3.0), model.layer3[2].bn2.running_mean.fill_(5.0)]
    converted(model)
    assert model.layer2[2].bn1.training and not model.layer2[2].conv1.training
    found = [model.layer2[2].bn1.running_mean, model.layer3[2].bn2.running_mean]
    assert all(torch.equal(*pair) for pair in zip(found, means, strict=True))
    assert model.layer2[2].conv1.coefficients.dtype == torch.float32
    assert model(image(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_coefficients_learn_where_the_block_did():
    model = ViT().requires_grad_(False)
    model.blocks[3].mlp[2].bias.requires_grad_(True)
    converted(model)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {"blocks.3.norm1.mixing.coefficients"}
    model = ViT().requires_grad_(False)
    model.blocks[3].mlp[2].bias.requires_grad_(True)
    converted(model, share="layer")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"blocks.3.mlp.2.mixing.coefficients"}


def test_a_replaced_model_trains():
    model = converted(ViT())
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, labels = image(16, dtype=torch.float32), torch.arange(16) % 5
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    unchanged = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    assert unchanged == []


def test_a_replaced_model_compiles():
    model = converted(ViT(5).double(), every=2)
    x = image()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


# torch's inference fast path.


def test_the_fast_path_is_off_only_where_it_would_pass_by_a_replaced_layer():
    model = nn.ModuleDict({"replaced": encoder(6), "kept": encoder(2)})
    converted(model, every=3)
    assert [layer.activation_relu_or_gelu for layer in model["replaced"].layers] == [1, 1, 0, 1, 1, 1]
    assert not model["replaced"].use_nested_tensor
    assert [layer.activation_relu_or_gelu for layer in model["kept"].layers] == [1, 1]
    assert model["kept"].use_nested_tensor
    rl.merge(model)
    assert [layer.activation_relu_or_gelu for layer in model["replaced"].layers] == [1] * 6
    assert model["replaced"].use_nested_tensor
    assert all(
        vars(a).keys() == vars(b).keys()
        for a, b in zip(
            model.modules(), nn.ModuleDict({"replaced": encoder(6), "kept": encoder(2)}).modules(), strict=True
        )
        if not isinstance(a, nn.MultiheadAttention)
    )


@pytest.mark.parametrize("targets", [None, "attention", "mlp", "norm"])
def test_evaluation_uses_the_mixed_weights(targets):
    model = encoder().eval()
    converted(model, every=3, targets=targets)
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    with torch.no_grad():
        for options in ({}, {"src_key_padding_mask": padding}):
            found = model(x, **options) * ~padding[..., None]
            expected = copy.deepcopy(model).train()(x, **options) * ~padding[..., None]
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(rl.merge(copy.deepcopy(model))(x, **options) * ~padding[..., None], expected)


# Refusals: nothing is changed on any error.


def other_shape(model):
    model.blocks[3].mlp[0] = nn.Linear(8, 17)


def other_class(model):
    model.blocks[3].mlp[0] = nn.Conv1d(8, 16, 1)


def absent(model):
    model.blocks[3].mlp = nn.Sequential()


def absent_neighbour(model):
    model.blocks[4].mlp = nn.Sequential()


def other_neighbour(model):
    model.blocks[8].mlp[2] = nn.Linear(17, 8)


def other_dtype(model):
    model.blocks[7].attn.double()


def shared(model):
    model.blocks[7].mlp[2].bias = model.head.weight = nn.Parameter(torch.zeros(8))


def hooked(model):
    model.blocks[7].mlp[0].register_forward_hook(lambda *args: None)


def own_forward(model):
    model.blocks[6].attn.forward = model.blocks[6].attn.forward


def replaced(model):
    converted(model, targets="mlp", offset=2)


def lazy(model):
    model.head = nn.LazyLinear(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_shape, r"got shapes {'weight': \(17, 8\).* at blocks.3.mlp.0, expected {'weight': \(16, 8\)"),
        (other_class, "got Conv1d at blocks.3.mlp.0, expected Linear as in the plan"),
        (absent, "got ViT without blocks.3.mlp.0"),
        (absent_neighbour, "got ViT without blocks.4.mlp.0"),
        (other_neighbour, "the layer at blocks.7.mlp.2 and its neighbours do not fit: .* got weight"),
        (other_dtype, "the layer at blocks.7.attn and its neighbours do not fit: .* got dtype"),
        (shared, "got shared parameters .*blocks.7.mlp.2.bias is also head.weight"),
        (hooked, "got hooks at blocks.7.mlp.0"),
        (own_forward, "got a layer at blocks.6.attn that cannot be mixed: .*forward of its own"),
        (replaced, r"got one with replaced layers \(blocks.1.mlp.0\)"),
        (lazy, "got head.weight uninitialised"),
    ],
)
def test_a_model_that_the_plan_does_not_fit_is_refused_and_left_alone(change, message):
    plan = rl.plan(ViT())
    model = ViT()
    change(model)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        rl.replace(model, plan)
    assert fingerprint(model) == before


def test_bad_plans_are_refused():
    model = ViT()
    plan = rl.plan(model)
    before = fingerprint(model)
    with pytest.raises(TypeError, match=r"^plan: got dict"):
        rl.replace(model, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^model: got str"):
        rl.replace("resnet34", plan)  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"^plan: got one that replaces nothing"):
        rl.replace(model, dataclasses.replace(plan, replaced=()))
    neighbours = [
        dataclasses.replace(plan.replaced[0], path=f"blocks.{i}", sources=(f"blocks.{i - 1}", f"blocks.{i + 1}"))
        for i in (3, 4)
    ]
    with pytest.raises(ValueError, match=r"^plan: got blocks.3.norm1 replaced twice or mixed from"):
        rl.replace(model, dataclasses.replace(plan, replaced=tuple(neighbours)))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.blocks[3].mlp.named_parameters()}
    whole = dataclasses.replace(plan.replaced[0].layers[0], path="mlp", class_name="Sequential", shapes=shapes, kind="")
    block = dataclasses.replace(plan.replaced[0], layers=(whole,))
    with pytest.raises(ValueError, match=r"^model: got Sequential at blocks.3.mlp, for which there is no replacement"):
        rl.replace(model, dataclasses.replace(plan, replaced=(block,)))
    assert fingerprint(model) == before


def test_replacing_twice_is_refused():
    model = ViT()
    plan = rl.plan(model)
    rl.replace(model, plan)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"^model: got one with replaced layers \(blocks.3.norm1\)"):
        rl.replace(model, plan)
    assert fingerprint(model) == before


# Merging.


def test_merging_frees_the_block_from_its_neighbours():
    model = rl.merge(converted(ResNet()))
    assert replacements(model) == {}
    assert [type(m) for m in model.modules()] == [type(m) for m in ResNet().modules()]
    assert model.state_dict().keys() == ResNet().state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    expected = (model.layer2[1].conv1.weight + model.layer2[3].conv1.weight) / 2
    torch.testing.assert_close(model.layer2[2].conv1.weight, expected)
    model.layer2[1].conv1.weight.data.zero_()
    assert model.layer2[2].conv1.weight.any()


def test_a_merged_model_can_be_planned_again():
    model = rl.merge(converted(ViT()))
    assert rl.plan(model) == rl.plan(ViT())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ViT(), "model: got ViT without replaced layers"),
        (rl.nn.ReplacementLinear([nn.Linear(3, 3)] * 2), "model: got a ReplacementLinear alone"),
    ],
)
def test_merging_needs_something_to_merge(model, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        rl.merge(model)


def test_coefficients_are_found_through_the_plan():
    model = ViT()
    plan = rl.plan(model)
    rl.replace(model, plan)
    assert set(coefficients_of(model, plan)) == set(replacements(model))
