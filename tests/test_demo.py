"""The main job, kept very short: training, what it reports and writes, and the command line."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

import rl_kernels as rl
from rl_kernels.__main__ import COMMANDS, main
from rl_kernels.commands.demo import REPLACED, WHOLE, run_demo
from rl_kernels.systems.digits import SYSTEMS, Digits, System, build_model, load_digits, train
from rl_kernels.systems.models import DigitsResNet, DigitsViT

SMALL = {
    "DigitsResNet": System(lambda: DigitsResNet(4, (3, 5)), 1, 1, batch_size=256, learning_rate=5e-3),
    "DigitsViT": System(lambda: DigitsViT(dim=8, depth=5, heads=2), 1, 1, batch_size=256, learning_rate=3e-3),
}


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture
def small_systems(monkeypatch):
    for name, system in SMALL.items():
        monkeypatch.setitem(SYSTEMS, name, system)


def test_the_split_is_stratified_and_standardised(digits):
    assert digits.train_images.shape == (1437, 1, 8, 8) and digits.test_images.shape == (360, 1, 8, 8)
    assert digits.train_images.dtype == torch.float32 and digits.test_labels.dtype == torch.int64
    torch.testing.assert_close(digits.train_images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(digits.train_images.std(), torch.tensor(1.0))
    shares = [torch.bincount(labels) / len(labels) for labels in (digits.train_labels, digits.test_labels)]
    torch.testing.assert_close(*shares, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", SYSTEMS)
def test_models_map_images_to_logits_and_have_replaceable_blocks(name):
    system = SYSTEMS[name]
    assert build_model(system, seed=0)(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    whole, replaced = build_model(system, seed=0), build_model(system, seed=0, every=4)
    count = [sum(p.numel() for p in model.parameters()) for model in (whole, replaced)]
    assert count[1] < 0.9 * count[0]


def test_variants_start_from_the_same_weights_and_leave_the_global_seed_alone():
    system = SMALL["DigitsResNet"]
    state = torch.get_rng_state()
    whole, replaced = build_model(system, seed=3).state_dict(), build_model(system, seed=3, every=2).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    shared = [key for key in replaced if key in whole]
    assert len(shared) > len(whole) // 2
    for key in shared:
        assert torch.equal(replaced[key], whole[key]), key


@pytest.mark.parametrize("every", [None, 2], ids=["whole", "replaced"])
def test_training_learns_and_repeats_bit_for_bit(digits, every):
    def run():
        model = build_model(System(lambda: DigitsResNet(8, (3,)), 3, 3, 64, 5e-3), seed=0, every=every)
        steps = []
        history = train(
            model, digits, epochs=3, seed=0, batch_size=64, learning_rate=5e-3, on_step=lambda: steps.append(1)
        )
        return history, len(steps), model

    history, steps, model = run()
    assert steps == len(history.step_seconds) == 3 * 23
    assert history.train_loss[-1] < history.train_loss[0]
    assert history.test_accuracy[-1] > 0.5
    # Two moments of each parameter, and a step counter each.
    parameters = list(model.parameters())
    assert history.optimizer_bytes == sum(2 * p.nbytes + 4 for p in parameters)
    again, _, _ = run()
    assert (again.train_loss, again.test_accuracy) == (history.train_loss, history.test_accuracy)


def test_demo_reports_and_writes_everything(small_systems, tmp_path):
    threads = torch.get_num_threads()
    console = Console(file=io.StringIO(), width=80)
    results = run_demo(tmp_path / "new" / "folder", seeds=2, every=2, console=console)
    assert torch.get_num_threads() == threads

    printed = console.file.getvalue()
    assert "seed 1  DigitsViT     replaced" in printed
    for result in results:
        assert f"{result.parameters:,}" in printed
    assert "…" not in printed.split("accuracy (%)")[1]

    image = (tmp_path / "new" / "folder" / "demo.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 20_000

    record = json.loads((tmp_path / "new" / "folder" / "demo.json").read_text())
    assert record["schema"] == 2
    assert record["arguments"] == {
        "quick": False,
        "seeds": 2,
        "every": 2,
        "epochs": {"DigitsResNet": 1, "DigitsViT": 1},
    }
    assert record["versions"]["torch"] == torch.__version__ and record["machine"]["cores"] >= 1
    assert set(record["plans"]) == set(record["systems"]) == set(SYSTEMS)
    assert record["seconds"] > 0 and any("mixed_linear" in line for line in record["backends"])
    assert [(r["model"], r["variant"]) for r in record["results"]] == [
        (name, variant) for name in SYSTEMS for variant in (WHOLE, REPLACED)
    ]
    for whole, replaced in zip(record["results"][::2], record["results"][1::2], strict=True):
        assert replaced["parameters"] < whole["parameters"]
        assert replaced["optimizer_bytes"] < whole["optimizer_bytes"]
    for result in record["results"]:
        assert result["peak_bytes"] > 0 and result["step_seconds_median"] > 0
        assert 0 <= result["test_accuracy_mean"] <= 1 and result["test_accuracy_stdev"] >= 0
        assert [run["seed"] for run in result["runs"]] == [0, 1]
        for run in result["runs"]:
            assert len(run["train_loss"]) == len(run["test_accuracy"]) == 1
            assert len(run["step_seconds"]) == 6


def test_command_line_runs_the_demo(small_systems, tmp_path):
    result = CliRunner().invoke(
        main, ["demo", "--quick", "--seeds", "1", "--every", "2", "--output", str(tmp_path)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["arguments"]["quick"] and record["results"][0]["test_accuracy_stdev"] is None


@pytest.mark.parametrize("option", [["--every", "1"], ["--every", "99"], ["--seeds", "0"], ["--nonsense"]])
def test_command_line_refuses_bad_options(option):
    result = CliRunner().invoke(main, ["demo", *option])
    assert result.exit_code == 2 and option[0] in result.output


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_a_missing_extra_is_named(monkeypatch, tmp_path, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    result = CliRunner().invoke(main, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "pip install 'rl_kernels[demo]'" in result.output


def test_help_and_version_list_the_commands_without_importing_them():
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for name, (_, summary) in COMMANDS.items():
        assert name in result.output and summary.split(":")[0] in result.output
    assert rl.__version__ in CliRunner().invoke(main, ["--version"]).output
    assert CliRunner().invoke(main, ["nonsense"]).exit_code == 2
    program = "import sys; from rl_kernels.__main__ import main\nmain(['--help'], standalone_mode=False)\n"
    program += "assert not [m for m in ('matplotlib', 'sklearn', 'rl_kernels.commands.demo') if m in sys.modules]"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    result = CliRunner().invoke(main, [name, "--help"], catch_exceptions=False)
    assert result.exit_code == 0 and "Usage:" in result.output
