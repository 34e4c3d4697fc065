"""Runs: their files, runs that are killed and go on to the same end, and what stops one before it begins."""

import copy
import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import rl_kernels as rl
from rl_kernels.systems import networks
from rl_kernels.systems.contract import ImageShape, Plain
from rl_kernels.systems.registry import system
from rl_kernels.systems.replacement import PRESETS
from rl_kernels.systems.runner import folder as files
from rl_kernels.systems.runner import training
from rl_kernels.systems.runner.folder import RunError

SYSTEM = system("replacement")


def train(config, folder):
    return training.train(SYSTEM, config, folder, show=False)


def weights(folder, name=files.LAST):
    return files.read_checkpoint(folder / name)["model"]


def assert_equal_weights(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key], key


def assert_close_weights(left, right):
    for key, value in left.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(
                right[key], value, rtol=1e-4, atol=1e-6, msg=lambda said, key=key: f"{key}: {said}"
            )


def log(folder):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in files.read_log(folder)]


def test_a_run_leaves_its_files(tiny, folder):
    metrics = train(tiny("limit=320", "epochs=3"), folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [files.RUN, files.LOG, files.LAST, files.BEST, files.METRICS]
    )
    assert files.read_json(folder / files.METRICS) == metrics
    losses = [line["train_loss"] for line in log(folder) if line["event"] == "epoch"]
    assert losses[0] > losses[1] > losses[2] and losses[2] < 1.9, "it learnt nothing"
    assert metrics["steps"] == 30 and metrics["epochs"] == 3
    assert metrics["coefficients"] == 4
    assert 0 <= metrics["optimizer_bytes"] - 8 * metrics["parameters"] < 1000, "two moments, and counters of steps"
    assert metrics["peak_bytes"] > 12 * metrics["parameters"] and metrics["step_seconds"] > 0
    run = files.read_json(folder / files.RUN)
    assert run["versions"]["torch"] == torch.__version__ and run["data"]["training_images"] == 320
    lines = log(folder)
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, 31))
    assert [line["epoch"] for line in lines if line["event"] == "epoch"] == [1, 2, 3]
    assert lines[-1]["test_accuracy"] == metrics["accuracy"] and lines[0]["loss"] > lines[-2]["loss"]
    assert training.evaluate(folder)["accuracy"] == metrics["accuracy"]
    assert training.resume(folder) == metrics, "a finished run says what it found"


OPTIONS = (
    "augmentation=crop",
    "mixup=0.2",
    "cutmix=0.5",
    "label_smoothing=0.1",
    "ema=0.9",
    "accumulate=2",
    "clip=1.0",
    "validation=0.1",
    "limit=110",
    "precision=bf16-mixed",
    "channels_last=true",
    "granularity=channel",
)


@pytest.mark.parametrize("options", [(), OPTIONS], ids=["plain", "every option"])
def test_equal_runs_are_equal(tiny, tmp_path, options):
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    for folder, seed in ((first, 1), (second, 1), (other, 2)):
        train(tiny(*options, f"seed={seed}"), folder)
    assert_equal_weights(weights(first), weights(second))
    assert log(first) == log(second) != log(other)
    found = training.evaluate(first)
    assert ("accuracy_ema" in found) == bool(options)


def test_accumulated_parts_are_one_batch(tiny, tmp_path):
    """Of a network without batch norm."""
    common = ("preset=digits-vit", "width=8", "optimizer.name=sgd")
    for name, parts in (("whole", 1), ("parts", 4)):
        train(tiny(*common, f"accumulate={parts}"), tmp_path / name)
    for key, value in weights(tmp_path / "whole").items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(weights(tmp_path / "parts")[key], value, rtol=1e-4, atol=1e-6)


def started(folder, *settings, of="replacement"):
    told = [part for each in settings for part in ("--set", each)]
    command = [sys.executable, "-m", "rl_kernels", "train", of, "--preset", "digits", *told]
    return subprocess.Popen(
        [*command, "--out", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for_lines(process, folder, count):
    for _ in range(3000):
        if (folder / files.LOG).exists() and len((folder / files.LOG).read_text().splitlines()) >= count:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("no step within two and a half minutes")


RUN = ("width=4", "limit=320", "epochs=3", "batch_size=32", "checkpoint_steps=4", *OPTIONS[:3], "validation=0.1")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_a_run_that_ends_early_goes_on_to_the_same_end(number, tiny, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # In one thread, as this process computes, too.
    with started(broken, *RUN, "accelerator=cpu") as process:
        wait_for_lines(process, broken, 13)
        process.send_signal(number)
        said = process.communicate()[1]
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), said
    assert not (broken / files.METRICS).exists()
    done = files.read_checkpoint(broken / files.LAST)["progress"]["step"]
    assert 0 < done < 27
    if number == signal.SIGTERM:
        assert f"go on with: python -m rl_kernels resume {broken}" in said
        assert done == max(line["step"] for line in files.read_log(broken)), "a step was lost"
    with (broken / files.LOG).open("a") as file:
        file.write('{"event": "st')  # Cut short in the middle of a line.
    resumed = training.resume(broken, show=False)
    expected = train(tiny(*RUN), whole)
    assert_equal_weights(weights(whole), weights(broken))
    assert_equal_weights(weights(whole, files.BEST), weights(broken, files.BEST))
    assert log(whole) == log(broken)
    assert resumed["accuracy"] == expected["accuracy"] and resumed["loss"] == expected["loss"]


def test_runs_at_a_time_stop_together(tmp_path):
    """A terminal's Ctrl-C reaches every process."""
    out = tmp_path / "runs"
    told = [part for each in ("width=4", "epochs=60", "accelerator=cpu", "threads=1") for part in ("--set", each)]
    command = [sys.executable, "-m", "rl_kernels", "train", "replacement", "--preset", "digits", *told]
    command += ["--seeds", "2", "--jobs", "2", "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        for seed in (0, 1):
            wait_for_lines(process, out / f"seed-{seed}", 3)
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert "stopped by SIGINT; the same command goes on" in said.replace("\n", " "), said
    for seed in (0, 1):
        step = files.read_checkpoint(out / f"seed-{seed}" / files.LAST)["progress"]["step"]
        assert step == max(line["step"] for line in files.read_log(out / f"seed-{seed}")), "a step was lost"


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tiny, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(tiny(), whole)
    train(tiny(), broken)
    for name in (files.LAST, files.BEST, files.METRICS):
        (broken / name).unlink()
    training.resume(broken, show=False)
    assert log(whole) == log(broken)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_loses_no_checkpoint(tiny, folder, monkeypatch, call):
    config = tiny("epochs=2")
    real, calls = getattr(os, call), []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > 5:  # run.json, best.pt, last.pt, and some of the second epoch.
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(
            RunError, match=r"not written: .*No space left on device; what was there before is as it was"
        ):
            train(config, folder)
    assert files.read_checkpoint(folder / files.LAST)["progress"]["step"] in (3, 6)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")], "half a file was left"
    training.resume(folder, show=False)
    train(config, folder.parent / "whole")
    assert_equal_weights(weights(folder), weights(folder.parent / "whole"))


def test_a_folder_that_is_in_use_is_left_alone(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"holds thesis.tex, expected an empty or a new folder"):
        train(tiny(), tmp_path / "run")
    with pytest.raises(RunError, match=r"file cannot be written"):
        train(tiny(), tmp_path / "file")
    files.write_json(tmp_path / "run" / files.RUN, {})
    with pytest.raises(RunError, match=r"holds a run: `python -m rl_kernels resume"):
        train(tiny(), tmp_path / "run")


def test_files_that_do_not_belong_together_are_refused(tiny, folder):
    train(tiny(), folder)
    (folder / files.METRICS).unlink()
    run = files.read_json(folder / files.RUN)

    def changed(**more):
        files.write_json(folder / files.RUN, {**run, **more})
        with pytest.raises(RunError) as raised:
            training.resume(folder, show=False)
        return str(raised.value)

    of_another = {**run["config"], "epochs": 9}
    assert "last.pt: of another config than run.json: epochs was 2, is 9" in changed(config=of_another)
    assert "expected 0000 as when the run began" in changed(data={**run["data"], "sha256": "0000"})
    assert "system: got 'other'" in changed(system="other")
    assert "there is no 'epoch'" in changed(config={"epoch": 1})
    files.write_json(folder / files.RUN, run)
    (folder / files.LAST).write_bytes((folder / files.LAST).read_bytes()[:1000])
    with pytest.raises(RunError, match=r"last.pt: no checkpoint that can be read"):
        training.resume(folder, show=False)
    with pytest.raises(RunError, match=r"run.json: not there, expected the folder of a run"):
        training.resume(folder.parent / "nothing")


def test_nothing_is_written_for_a_run_that_cannot_be(tiny, folder):
    with pytest.raises(ValueError, match=r"batch_size: got 128, expected at most 96, the number of training images"):
        train(tiny("batch_size=128"), folder)
    with pytest.raises(ValueError, match=r"model.name: got 'resnet21', expected one of"):
        train(tiny("model.name=resnet21"), folder)
    assert not folder.exists() or not list(folder.iterdir())


def test_other_images_are_evaluated(tiny, folder, tmp_path):
    train(tiny("preset=short", "epochs=1", "width=4", "limit=64"), folder)
    assert training.evaluate(folder, data="animals")["images"] == 1944
    with pytest.raises(ValueError, match=r"data: got 2 classes"):
        from PIL import Image

        for part in ("train", "test"):
            for name in ("a", "b"):
                (tmp_path / "two" / part / name).mkdir(parents=True)
                Image.new("RGB", (8, 8)).save(tmp_path / "two" / part / name / "0.png")
        training.evaluate(folder, data=str(tmp_path / "two"))


def test_a_run_begins_with_the_weights_of_another(tiny, tmp_path):
    whole, on = tmp_path / "whole", tmp_path / "on"
    found = train(tiny("every=null"), whole)
    after = train(tiny(f"weights={whole}", "every=null", "learning_rate=0", "weight_decay=0"), on)
    before = next(line for line in log(on) if line["event"] == "epoch")
    assert before["epoch"] == before["step"] == 0 and before["test_accuracy"] == found["accuracy"]
    (on / files.METRICS).unlink()
    whole.rename(tmp_path / "kept")
    assert training.resume(on, show=False)["accuracy"] == after["accuracy"], "it needs them no more"
    assert training.evaluate(on)["accuracy"] == after["accuracy"]
    (tmp_path / "kept").rename(whole)
    fitted = SYSTEM.build(tiny(f"weights={whole}", "init=fit"), ImageShape(1, 8, 10)).model
    assert any(isinstance(module, rl.nn.ReplacementLayer) for module in fitted.modules())
    with pytest.raises(ValueError, match=r"model.weights: .* does not fit digits_resnet"):
        SYSTEM.build(tiny(f"weights={whole}", "width=8"), ImageShape(1, 8, 10))


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.startswith("imagenet")])
def test_presets_take_two_steps(preset, tiny, random_data, folder):
    shape = (3, 32, 10) if "paper" in preset or preset == "patches" else (1, 8 if "digits" in preset else 28, 10)
    random_data(*shape)
    small = ("batch_size=4", "epochs=1", "limit=8", f"width={24 if 'vit' in preset else 4}")
    assert train(tiny(f"preset={preset}", *small), folder)["steps"] == 2


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("imagenet")])
def test_presets_of_imagenet_differentiate_without_memory(preset, tiny):
    told = [f"preset={preset}", "width=null", "batch_size=2", "data.size=64"]
    with torch.device("meta"):
        config = tiny(*told)
        built = SYSTEM.build(config, ImageShape(3, 64, 1000))
        images, targets = torch.empty(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64)
        SYSTEM.step(config, built.model, images, targets, Plain())
    assert built.plan is not None and built.plan.replaced
    for name, parameter in built.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name


@pytest.mark.parametrize("control", ["removed", "tied", "frozen", "narrowed"])
def test_controls_are_what_they_say(control, tiny):
    def build(*settings):
        torch.manual_seed(0)
        return SYSTEM.build(tiny("preset=digits", "width=16", *settings), ImageShape(1, 8, 10)).model

    whole, replaced, model = build("every=null"), build(), build(f"control={control}")
    count = lambda m, wanted=(True, False): sum(p.numel() for p in m.parameters() if p.requires_grad in wanted)  # noqa: E731
    if control == "removed":
        assert sum(isinstance(block, torch.nn.Identity) for block in model.blocks) == 2
        assert count(model) == count(replaced) - 4
    if control == "tied":
        assert count(model, (True,)) == count(replaced) - 4
        merged = rl.merge(copy.deepcopy(model))
        assert torch.equal(merged.blocks[3].conv1.weight, merged.blocks[2].conv1.weight)
    if control == "frozen":
        assert count(model) == count(whole) and count(model, (True,)) < count(replaced)
    if control == "narrowed":
        assert abs(count(model) - count(replaced)) < 0.1 * count(replaced) and len(model.blocks) == 12
    model(torch.randn(2, 1, 8, 8)).sum().backward()


def test_networks_of_libraries_fit_the_images():
    for name in ("torchvision/resnet18", "timm/vit_tiny_patch16_224", "timm/resnet18"):
        with torch.device("meta"):
            model = networks.build(name, ImageShape(3, 64, 7))
            assert model(torch.empty(2, 3, 64, 64)).shape == (2, 7)
    with pytest.raises(ValueError, match="takes images of 3 channels, not 1"):
        networks.build("torchvision/resnet18", ImageShape(1, 64, 7))
    with pytest.raises(ValueError, match="torchvision has no 'resnet19'"):
        networks.build("torchvision/resnet19", ImageShape(3, 64, 7))
    with pytest.raises(ValueError, match=r"data.size: got 30, expected a multiple of 4"):
        networks.build("vit", ImageShape(3, 30, 7))


def test_compiled_models_train(tiny, tmp_path, monkeypatch):
    """By dynamo and autograd's tracing; inductor's own work is tests/transforms' matter, and takes a minute."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled(module, backend="aot_eager"))
    for name, chosen in (("eager", "false"), ("compiled", "true")):
        train(tiny(f"compile={chosen}", "epochs=1", "limit=32"), tmp_path / name)
    (left,), (right,) = ([x["loss"] for x in log(tmp_path / n) if x["event"] == "step"] for n in ("eager", "compiled"))
    assert right == pytest.approx(left, rel=1e-4)


WITHOUT_BATCH_STATISTICS = (
    *("model.name=digits_vit", "width=16", "limit=96", "epochs=1", "batch_size=32", "optimizer.name=sgd"),
    "accelerator=cpu",
)


def train_on_two(folder, *settings, of="replacement"):
    with started(folder, *settings, "devices=2", "threads=1", of=of) as process:
        said = process.communicate(timeout=280)[1]
    assert process.returncode == 0, said


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_are_one(strategy, tiny, folder):
    """Of a network without batch norm, whose statistics are of a process."""
    train_on_two(folder / "two", *WITHOUT_BATCH_STATISTICS, f"strategy={strategy}")
    expected = train(tiny(*WITHOUT_BATCH_STATISTICS), folder / "one")
    assert_close_weights(weights(folder / "one"), weights(folder / "two"))
    figures = json.loads((folder / "two" / files.METRICS).read_text())
    assert figures["accuracy"] == expected["accuracy"] and figures["parameters"] == expected["parameters"]
    assert training.evaluate(folder / "two")["accuracy"] == expected["accuracy"], (
        "a whole checkpoint, read by one process"
    )
