"""peft's adapters in replaced models: the mix sees what they made of a source's weight, or says that it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import rl_kernels as rl
from rl_kernels.conversion.zoo import import_torchvision
from rl_kernels.nn import ReplacementLayer, ReplacementLinear
from tests.conversion.common import check_replaced, coefficients_of, mixed_by_hand, relative_error, spread_out
from tests.conversion.toys import image
from tests.integration.models import bert

pytestmark = pytest.mark.integration

QUERY = "encoder.layer.{}.attention.self.query"
REPLACED, PREVIOUS, NEXT, ELSEWHERE = (QUERY.format(n) for n in (3, 2, 4, 0))
REFUSED = (
    r"^sources: got a Linear \(query of BertSelfAttention\) with adapters \({}\), which the mix of its weight would "
    r"leave out; expected them merged \(merge_adapter, merge_and_unload\) or disabled$"
)
BY_LORA = REFUSED.format(r"peft\.tuners\.lora\.layer\.Linear")


def import_peft() -> Any:
    import_torchvision()  # peft imports transformers, and that torchvision.
    import peft

    return peft


def lora(*targets: str, **options: Any) -> Any:
    """Adapters that change what a layer computes from the start."""
    return import_peft().LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=[*targets], **options)


def adapted(model: nn.Module, *targets: str, **options: Any) -> Any:
    return import_peft().get_peft_model(model, lora(*targets, **options))


def replaced_bert() -> tuple[nn.Module, nn.Module, rl.Plan]:
    """A replaced model, its plain twin and the plan, in float64."""
    torch.manual_seed(3)
    model = bert().double().eval()
    spread_out(model)
    plain = copy.deepcopy(model)
    plan = rl.plan(model)
    spread_out(rl.replace(model, plan))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()}, strict=False)
    return model, plain, plan


def tokens() -> Tensor:
    return torch.randint(30, (2, 7), generator=torch.Generator().manual_seed(5))


def run(model: nn.Module) -> Tensor:
    return model(tokens()).last_hidden_state


def by_hand(plain: nn.Module, plan: rl.Plan, model: nn.Module) -> Tensor:
    coefficients = {path: module().detach() for path, module in coefficients_of(model, plan).items()}
    return functional_call(plain, mixed_by_hand(plain, plan, coefficients), (tokens(),)).last_hidden_state


def add_by_hand(plain: nn.Module, model: nn.Module, *paths: str) -> nn.Module:
    """What the adapters of ``model`` at ``paths`` say, added to the weights of a copy of ``plain``."""
    plain = copy.deepcopy(plain)
    for path in paths:
        layer = model.get_submodule(path)
        change = 3 / 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert change.norm() > 0.1 * layer.base_layer.weight.norm()
        with torch.no_grad():
            plain.get_submodule(path).weight += change
    return plain


# Adapters around a source.

ADAPTERS: dict[str, tuple[str, Callable[[nn.Module, str], Any]]] = {
    "lora": ("lora.layer.Linear", adapted),
    "injected": (
        "lora.layer.Linear",
        lambda model, path: import_peft().inject_adapter_in_model(lora(path), model),
    ),
    "dora": ("lora.layer.Linear", lambda model, path: adapted(model, path, use_dora=True)),
    "ia3": (
        "ia3.layer.Linear",
        lambda model, path: import_peft().get_peft_model(
            model, import_peft().IA3Config(target_modules=[path], feedforward_modules=[])
        ),
    ),
    "parameter": (
        "lora.layer.ParamWrapper",
        lambda model, path: adapted(model, target_parameters=[f"{path}.weight"]),
    ),
    "saved": ("", lambda model, path: adapted(model, ELSEWHERE, modules_to_save=[path])),
}


@pytest.mark.parametrize("path", [PREVIOUS, NEXT])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_around_a_source_are_refused(name: str, path: str) -> None:
    model, _, _ = replaced_bert()
    kind, apply = ADAPTERS[name]
    wrapper = f"peft.tuners.{kind}" if kind else "peft.utils.other.ModulesToSaveWrapper"
    message = REFUSED.format(wrapper.replace(".", r"\."))
    layer = model.get_submodule(REPLACED)
    apply(model, path)
    before = [(n, id(m)) for n, m in model.named_modules()]
    x = torch.randn(2, 16, dtype=torch.float64)
    for use in (
        lambda: run(model),
        lambda: run(copy.deepcopy(model)),
        lambda: layer(x),
        lambda: layer.weight,
        lambda: layer.bias,
        lambda: rl.merge(model),
    ):
        with pytest.raises(RuntimeError, match=message):
            use()
    assert [(n, id(m)) for n, m in model.named_modules()] == before


def test_every_linear_layer_as_a_target_is_refused_when_the_model_runs() -> None:
    model, _, _ = replaced_bert()
    adapters = import_peft().get_peft_model(model, import_peft().LoraConfig(target_modules="all-linear"))
    assert PREVIOUS in adapters.targeted_module_names and REPLACED not in adapters.targeted_module_names
    with pytest.raises(RuntimeError, match=BY_LORA):
        run(adapters)


@pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning")
def test_merged_and_disabled_adapters_are_what_the_mix_sees() -> None:
    model, plain, plan = replaced_bert()
    paths = (PREVIOUS, NEXT)
    adapters = adapted(model, *paths)
    changed = add_by_hand(plain, model, *paths)
    base, expected = by_hand(plain, plan, model), by_hand(changed, plan, model)
    assert relative_error(base, expected) > 1e-3

    adapters.merge_adapter()
    assert relative_error(run(adapters), expected) < 1e-12
    with adapters.disable_adapter(), pytest.raises(RuntimeError, match=BY_LORA):
        run(adapters)
    adapters.merge_adapter()  # The wrapper that ran before the refusal took its adapters out.
    adapters.unmerge_adapter()
    with pytest.raises(RuntimeError, match=BY_LORA):
        run(adapters)
    with adapters.disable_adapter():
        assert relative_error(run(adapters), base) < 1e-12
    with pytest.raises(RuntimeError, match=BY_LORA):
        run(adapters)

    unloaded = adapters.merge_and_unload()
    assert unloaded is model and model.get_submodule(REPLACED).sources[0] is model.get_submodule(PREVIOUS)
    assert relative_error(run(model), expected) < 1e-12
    assert relative_error(run(rl.merge(model)), expected) < 1e-12


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_a_wrapper_that_merges_by_running_another_layer_is_refused() -> None:
    model, _, _ = replaced_bert()
    path = PREVIOUS.replace("self.query", "output.LayerNorm")
    adapters = import_peft().get_peft_model(model, import_peft().LNTuningConfig(target_modules=[path]))
    message = r"^sources: got a LayerNorm \(LayerNorm of BertSelfOutput\) with adapters \(peft\.tuners\.ln_tuning\."
    with pytest.raises(RuntimeError, match=message):
        run(adapters)
    adapters.merge_adapter()
    with pytest.raises(RuntimeError, match=message):
        run(adapters)


def test_unloaded_adapters_leave_the_replaced_model_as_it_was() -> None:
    model, plain, plan = replaced_bert()
    adapted(model, PREVIOUS).unload()
    assert relative_error(run(model), by_hand(plain, plan, model)) < 1e-12


def test_adapters_around_attention_of_torch() -> None:
    vision = import_torchvision().models.VisionTransformer
    model = vision(image_size=16, patch_size=8, num_layers=5, num_heads=2, hidden_dim=16, mlp_dim=32).eval()
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero.
    rl.replace(model, rl.plan(model))
    replaced, last = (model.get_submodule(f"encoder.layers.encoder_layer_{n}.self_attention") for n in (3, 4))
    before = replaced.in_proj_weight.detach()
    adapters = adapted(model, "encoder.layers.encoder_layer_4.self_attention")
    x = image(2, 16, torch.float32)
    message = (
        r"^sources: got a MultiheadAttention \(self_attention of EncoderBlock\) with adapters "
        r"\(peft\.tuners\.lora\.layer\.MultiheadAttention\)"
    )
    with pytest.raises(RuntimeError, match=message):
        model(x)
    assert adapters.merge_and_unload() is model
    own = [source.in_proj_weight for source in replaced.sources]
    assert own[1] is last.in_proj_weight
    assert relative_error(replaced.in_proj_weight, (own[0] + own[1]) / 2) < 1e-6
    assert relative_error(replaced.in_proj_weight, before) > 1e-2
    assert relative_error(rl.merge(copy.deepcopy(model))(x), model(x)) < 1e-5


def test_rebinding_forgets_the_old_places() -> None:
    model, plain, _ = replaced_bert()
    layer = model.get_submodule(REPLACED)
    others = [plain.get_submodule(path) for path in (PREVIOUS, NEXT)]
    expected = layer.weight
    layer.rebind(*others)
    adapted(model, PREVIOUS)
    assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize("bind", ["made", "rebound"])
def test_an_adapted_layer_is_no_source(bind: str) -> None:
    model, _, _ = replaced_bert()
    layer = model.get_submodule(REPLACED)
    adapted(model, PREVIOUS)
    sources = [model.get_submodule(path) for path in (PREVIOUS, NEXT)]
    with pytest.raises(TypeError, match=r"^sources\[0\]: got peft\.tuners\.lora\.layer\.Linear, expected Linear$"):
        ReplacementLinear(sources) if bind == "made" else layer.rebind(*sources)


# Adapters around replaced layers and their coefficients.


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_a_replaced_layer_as_a_target_is_refused_by_peft(name: str) -> None:
    model, plain, plan = replaced_bert()
    with pytest.raises(ValueError, match=r"^Target module ReplacementLinear\([\s\S]* is not supported"):
        ADAPTERS[name][1](model, REPLACED)
    assert relative_error(run(model), by_hand(plain, plan, model)) < 1e-12


def test_coefficients_to_save_are_refused() -> None:
    model, _, _ = replaced_bert()
    adapted(model, ELSEWHERE, modules_to_save=["mixing"])
    with pytest.raises(
        TypeError, match=r"^mixing: got peft\.utils\.other\.ModulesToSaveWrapper, expected Coefficients"
    ):
        run(model)


# Adapters elsewhere in a replaced model.


def test_adapters_elsewhere_train_as_in_the_merged_model(tmp_path: Path) -> None:
    model, _, plan = replaced_bert()
    merged = rl.merge(copy.deepcopy(model))
    fresh = copy.deepcopy(model)
    excluded = [QUERY.format(n) for n in (2, 3, 4, 6, 7, 8)]
    ours = adapted(model, "query", exclude_modules=excluded)
    theirs = adapted(merged, "query", exclude_modules=excluded)
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if "lora_" in k}, strict=False)
    trained = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    assert len(trained) == 6 and all("lora_" in name for name in trained)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (ours, theirs)]
    start = run(ours).detach()
    for _ in range(2):
        for adapters, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            run(adapters)[:, :, 0].square().sum().backward()
            optimizer.step()
    for name in trained:
        gradient = ours.get_parameter(name).grad
        assert gradient.any() and relative_error(gradient, theirs.get_parameter(name).grad) < 1e-10, name
    end = run(ours)
    assert relative_error(end, run(theirs)) < 1e-12 and relative_error(end, start) > 1e-3

    ours.save_pretrained(tmp_path)
    again = import_peft().PeftModel.from_pretrained(fresh, tmp_path)
    assert relative_error(run(again), end) < 1e-12

    for module in coefficients_of(model, plan).values():
        module.requires_grad_(True)
    run(ours).square().sum().backward()
    assert all(module.coefficients.grad.all() for module in coefficients_of(model, plan).values())


# A plan for a model that has adapters already.


def test_a_plan_leaves_adapted_layers_as_they_are() -> None:
    model = bert()
    import_peft().inject_adapter_in_model(lora("query", "value"), model)
    model.requires_grad_(True)
    plan = rl.plan(model)
    own = {part.path: part.reason for part in plan.replaced[0].kept}
    reason = "it has adapters (peft.tuners.lora.layer.Linear)"
    assert own == {"attention.self.query": reason, "attention.self.value": reason}
    check_replaced(model, (tokens(),), lambda found: found.last_hidden_state)
    assert not any(
        isinstance(m, ReplacementLayer) for n, m in model.named_modules() if "base_layer" in n or "lora" in n
    )


def test_a_plan_passes_over_neighbours_with_adapters() -> None:
    model = bert()
    import_peft().inject_adapter_in_model(lora(PREVIOUS), model)
    plan = rl.plan(model)
    assert [block.path for block in plan.replaced] == ["encoder.layer.4"]
    assert plan.skipped[0].path == "encoder.layer.3"
    assert plan.skipped[0].detail == f"{PREVIOUS} has adapters (peft.tuners.lora.layer.Linear)"


@pytest.mark.parametrize("level", ["layer", "block", "auto"])
def test_adapters_are_no_layers_to_replace(level: Any) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    import_peft().inject_adapter_in_model(lora(*"01234"), model)
    with pytest.raises(ValueError, match=r"^model: got Sequential, in which nothing can be replaced"):
        rl.plan(model, level=level)


def test_a_plan_made_without_the_adapters_is_refused() -> None:
    model = bert()
    plan = rl.plan(model)
    import_peft().inject_adapter_in_model(lora(PREVIOUS), model)
    before = [(n, id(m)) for n, m in model.named_modules()]
    with pytest.raises(ValueError, match=r"sources\[0\]: got peft\.tuners\.lora\.layer\.Linear, expected Linear$"):
        rl.replace(model, plan)
    assert [(n, id(m)) for n, m in model.named_modules()] == before
