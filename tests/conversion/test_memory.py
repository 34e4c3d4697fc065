"""The bytes that a plan counts, held against the model that it makes; and plans for a budget."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import rl_kernels as rl
from rl_kernels.__main__ import main
from rl_kernels.conversion.memory import STATES, Footprint, Memory, format_bytes, parse_bytes
from tests.conversion.toys import ResNet, ViT, image

GiB = 1024**3


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def measured(model: nn.Module, states: int) -> Footprint:
    trainable = sum(size(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return Footprint(
        sum(size(parameter) for parameter in model.parameters()),
        trainable,
        states * trainable,
        sum(size(tensor) for tensor in model.state_dict().values()),
    )


def half_frozen() -> nn.Module:
    model = ViT()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "blocks.7" in name)
    return model


MODELS: list[tuple[str, Callable[[], nn.Module]]] = [
    ("batch norms", ResNet),
    ("single layers", lambda: ResNet((2, 2, 2))),
    ("attention", ViT),
    ("float64", lambda: ViT().double()),
    ("bfloat16", lambda: ViT().bfloat16()),
    ("mixed precision", lambda: ViT().apply(lambda m: m.bfloat16() if isinstance(m, nn.Linear) else m)),
    ("half frozen", half_frozen),
    ("frozen", lambda: ViT().requires_grad_(False)),
]


@pytest.mark.parametrize(
    "options", [{}, {"share": "layer"}, {"granularity": "channel"}, {"norms": "own"}, {"targets": "conv"}], ids=str
)
@pytest.mark.parametrize("make", [make for _, make in MODELS], ids=[name for name, _ in MODELS])
def test_bytes_are_those_of_the_replaced_model(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    model = make()
    if options.get("targets") == "conv" and isinstance(model, ViT):
        options = {"targets": "mlp"}
    plan = rl.plan(model, **options)
    plain = copy.deepcopy(model)
    rl.replace(model, plan)
    for optimizer, states in STATES.items():
        memory = plan.memory(optimizer)  # type: ignore[arg-type]
        assert memory == Memory(optimizer, measured(plain, states), measured(model, states))  # type: ignore[arg-type]
        saved = memory.before.training - memory.after.training
        assert memory.saved.training == saved and (saved > 0 or options.get("granularity") == "channel")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw", torch.optim.AdamW),
        ("adam", torch.optim.Adam),
        ("sgd", lambda parameters: torch.optim.SGD(parameters, 0.1)),
        ("sgd-momentum", lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9)),
    ],
)
def test_states_are_those_of_torchs_optimizers(name: str, make: Callable[..., torch.optim.Optimizer]) -> None:
    model = ResNet()
    plan = rl.plan(model)
    rl.replace(model, plan)
    optimizer = make(model.parameters())
    model(image(dtype=torch.float32)).sum().backward()
    optimizer.step()
    state = [value for values in optimizer.state.values() for key, value in values.items() if key != "step"]
    after = plan.memory(name).after  # type: ignore[arg-type]
    assert after.optimizer == sum(size(value) for value in state if value is not None)
    assert after.gradients == sum(size(p.grad) for p in model.parameters() if p.grad is not None)


def test_buffers_out_of_the_state_dict_and_shared_ones() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    both = torch.zeros(5)
    model[0].register_buffer("kept", both)
    model[2].register_buffer("kept", both)
    model[0].register_buffer("left", torch.zeros(100), persistent=False)
    plan = rl.plan(model, every=2)
    assert plan.memory().before.checkpoint == 4 * (3 * 16 + 5)
    assert plan.memory().after.checkpoint == 4 * (2 * 16 + 2 + 5)


def test_meta_models_have_the_same_bytes() -> None:
    with torch.device("meta"):
        model = ResNet()
    assert rl.plan(model).memory() == rl.plan(ResNet()).memory()


def test_a_plan_prints_its_memory() -> None:
    plan = rl.plan(nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(3))), every=2)
    lines = [line.split() for line in str(plan).splitlines()]
    assert ["Memory", "in", "training,", "without", "activations"] in lines
    # 256 KiB a layer; three, of which one becomes 8 bytes.
    for row in (
        ["parameters", "768.0", "KiB", "512.0", "KiB", "256.0", "KiB"],
        ["gradients", "768.0", "KiB", "512.0", "KiB", "256.0", "KiB"],
        ["state", "of", "adamw", "1.5", "MiB", "1.0", "MiB", "512.0", "KiB"],
        ["together", "3.0", "MiB", "2.0", "MiB", "1024.0", "KiB"],
        ["a", "checkpoint", "768.0", "KiB", "512.0", "KiB", "256.0", "KiB"],
    ):
        assert row in lines
    plan = rl.plan(nn.Sequential(*(nn.Linear(256, 256) for _ in range(3))), every=2, optimizer="sgd")
    assert "state of sgd " in str(plan) and plan.memory().optimizer == "sgd"
    assert plan.memory("adam").after.optimizer == 2 * plan.memory().after.gradients


def test_unknown_optimizers_are_named() -> None:
    expected = r"^optimizer: got 'lion', expected one of 'adamw', 'adam', 'sgd', 'sgd-momentum'$"
    with pytest.raises(ValueError, match=expected):
        rl.plan(ViT()).memory("lion")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=expected):
        rl.plan(ViT(), optimizer="lion")  # type: ignore[arg-type]


# Older plans.


def older(plan: rl.Plan) -> str:
    """``plan`` as format 2 had it."""
    fields = json.loads(plan.to_json())
    for key in ("parameter_bytes", "trainable_bytes", "buffer_bytes", "bytes_assumed", "optimizer", "siblings"):
        del fields[key]
    for block in fields["replaced"]:
        del block["bytes_saved"], block["trainable_bytes_saved"]
    return json.dumps({**fields, "format": 2})


def test_plans_of_format_2_take_a_number_for_4_bytes_and_say_so(tmp_path: Path) -> None:
    plan = rl.plan(ViT().double(), every=4)
    found = rl.Plan.from_json(older(plan))
    assert found.bytes_assumed and not plan.bytes_assumed
    assert found.memory().before == Footprint(*(4 * plan.parameters * n for n in (1, 1, 2, 1)))
    assert found.memory().after == Footprint(*(4 * plan.parameters_after * n for n in (1, 1, 2, 1)))
    note = "A number is taken for 4 bytes: the plan is of an older version"
    assert note in str(found) and note not in str(plan)
    found.save(tmp_path / "plan.json")
    assert rl.Plan.load(tmp_path / "plan.json") == found
    assert json.loads(found.to_json())["format"] == 4
    rl.replace(ViT().double(), found)


def test_plans_of_version_0_1_0_have_assumed_bytes() -> None:
    plan = rl.Plan.load(Path(__file__).parent / "version_0_1_0" / "plan.json")
    assert plan.bytes_assumed and plan.memory().after.parameters == 4 * plan.parameters_after


# Sizes as text.


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, 1),
        ("1", 1),
        ("12 B", 12),
        ("1.5 GiB", 3 * GiB // 2),
        ("2gib", 2 * GiB),
        ("800 MB", 800_000_000),
        (" 4 kB ", 4000),
        ("4 KiB", 4096),
        ("1 TiB", 1024 * GiB),
    ],
)
def test_sizes_are_read(given: int | str, expected: int) -> None:
    assert parse_bytes("budget", given) == expected


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            "many",
            ValueError,
            r"budget: got 'many', expected an integer of bytes, or text such as '1.5 GiB' or '800 MB'",
        ),
        ("1.5 Gb s", ValueError, r"budget: got '1.5 Gb s'"),
        ("3 apples", ValueError, r"budget: got '3 apples'"),
        ("-3 GB", ValueError, r"budget: got '-3 GB'"),
        ("", ValueError, r"budget: got ''"),
        ("0 GB", ValueError, r"budget: got '0 GB', expected at least one byte"),
        (0, ValueError, r"budget: got 0, expected at least one byte"),
        (1.5, TypeError, r"budget: got 1.5, expected an integer of bytes"),
        (True, TypeError, r"budget: got True, expected an integer of bytes"),
    ],
)
def test_what_is_no_size_is_refused(given: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        rl.plan(ViT(), budget=given)  # type: ignore[arg-type]


def test_sizes_are_written() -> None:
    found = [format_bytes(number) for number in (0, 1023, 1024, 3 * GiB // 2, 5 * 1024**5, -2048)]
    assert found == ["0 B", "1023 B", "1.0 KiB", "1.5 GiB", "5120.0 TiB", "-2.0 KiB"]


# Budgets.


def needs(model: nn.Module, **options: Any) -> dict[int, int]:
    """The bytes of training by ``every``."""
    return {every: rl.plan(model, every, **options).memory().after.training for every in range(2, 9)}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_budget_gets_the_fewest_replacements_that_fit(optimizer: str) -> None:
    model = ViT(9)
    needed = needs(model, optimizer=optimizer)
    assert needed[2] < needed[3] < needed[5]
    for every, enough in needed.items():
        best = max(other for other, size in needed.items() if size <= enough)
        for budget in (enough, f"{enough} B"):
            plan = rl.plan(model, budget=budget, optimizer=optimizer)  # type: ignore[arg-type]
            assert plan == rl.plan(model, best, optimizer=optimizer)  # type: ignore[arg-type]
        assert every <= best
    assert rl.plan(model, budget=needed[3] - 1, optimizer=optimizer).every == 2  # type: ignore[arg-type]
    assert rl.plan(model, budget=needed[2], optimizer=optimizer).every == 2  # type: ignore[arg-type]


def test_a_budget_that_the_plain_model_keeps_gets_one_replacement() -> None:
    plan = rl.plan(ViT(9), budget="1 GiB")
    assert (plan.every, len(plan.replaced)) == (8, 1)  # The ninth is the last, which has one neighbour.


def test_a_budget_goes_with_the_other_options() -> None:
    model = ResNet()
    enough = rl.plan(model, 4, targets="conv", offset=2).memory().after.training
    plan = rl.plan(model, budget=enough, targets="conv", offset=2)
    assert plan.offset == 2 and plan.every >= 4 and plan.memory().after.training <= enough
    assert rl.plan(model, plan.every + 1, targets="conv", offset=2).memory().after.training > enough


def test_a_budget_that_nothing_fits_says_the_least() -> None:
    least = min(needs(ViT(9)).values())
    expected = (
        rf"^budget: got '1 kB', expected at least {least} \({format_bytes(least)}\): what parameters, gradients and "
        r"the state of adamw take with every=2$"
    )
    with pytest.raises(ValueError, match=expected):
        rl.plan(ViT(9), budget="1 kB")
    with pytest.raises(ValueError, match=rf"^budget: got {least - 1}, expected at least {least} "):
        rl.plan(ViT(9), budget=least - 1)


def test_a_budget_and_every_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"^budget: got '1 GiB' with every=4, expected one of the two$"):
        rl.plan(ViT(), 4, budget="1 GiB")
    with pytest.raises(ValueError, match=r"^offset: got 9, but nothing due can be replaced: blocks.8: last"):
        rl.plan(ViT(9), offset=9, budget="1 GiB")


def test_the_command_takes_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl_kernels.commands.plan.build", lambda name: ViT(9))
    enough = rl.plan(ViT(9), 3, optimizer="sgd").memory().after.training

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["plan", "vit", *arguments])
        return result.exit_code, result.output

    expected = rl.plan(ViT(9), budget=enough, optimizer="sgd")
    assert expected.every > 2
    assert run("--budget", str(enough), "--optimizer", "sgd") == (0, f"{expected}\n")
    assert run() == (0, f"{rl.plan(ViT(9), 4)}\n")
    code, output = run("--budget", "1 kB")
    assert code == 1 and output.startswith("Error: budget: got '1 kB', expected at least ")
    assert run("--budget", "1 GiB", "--every", "3")[1] == (
        "Error: budget: got '1 GiB' with every=3, expected one of the two\n"
    )
    assert run("--optimizer", "lion")[0] == 2
