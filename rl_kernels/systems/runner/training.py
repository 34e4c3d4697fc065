"""The loop: from a config and an empty folder to final figures, and on from a checkpoint to the same ones."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import rl_kernels as rl
from rl_kernels._machine import git_state, machine, versions
from rl_kernels.conversion.blocks import count
from rl_kernels.conversion.zoo import import_timm, import_torchvision
from rl_kernels.nn.coefficients import Coefficients
from rl_kernels.systems import config as configs
from rl_kernels.systems.config import Config
from rl_kernels.systems.contract import Batches, Built, DataSet, ImageShape, System
from rl_kernels.systems.data import loading
from rl_kernels.systems.digits import optimizer_bytes
from rl_kernels.systems.registry import system as system_of
from rl_kernels.systems.runner import folder as files
from rl_kernels.systems.runner.engine import FabricEngine
from rl_kernels.systems.runner.folder import RunError
from rl_kernels.systems.runner.optimizing import (
    make_mixing,
    make_optimizer,
    make_schedule,
    seed_all,
)
from rl_kernels.systems.runner.reader import FabricReader
from rl_kernels.systems.runner.record import Record, cut_log
from rl_kernels.systems.runner.state import FORMAT, Progress, load_state, save_state
from rl_kernels.systems.runner.stopping import Listening, Stopped
from rl_kernels.testing import peak_memory

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def train(system: System[Any], config: Config, folder: Path, *, show: bool = True) -> dict[str, Any]:
    """Train from the beginning.

    Args:
        system: whose model and loss.
        config: of the system's own class.
        folder: a new or empty one.
        show: progress on standard error.

    Returns:
        The final figures, as ``metrics.json`` has them.

    Raises:
        RunError: the folder cannot be used, or a file in it cannot be written.
        Stopped: a signal asked for it; everything is written.
        ValueError, FileNotFoundError, ImportError: the config cannot be carried out; before the first step.
    """
    there = folder.exists()
    try:
        return _Run(system, config, folder, resumed=False, show=show).go()
    finally:
        if not there:
            with contextlib.suppress(OSError):  # Not empty: it began.
                folder.rmdir()


def resume(folder: Path, *, show: bool = True) -> dict[str, Any]:
    """Go on with a run that was stopped or killed, from its last checkpoint; a finished run says its figures again.

    Raises:
        RunError: no run is there, or its files do not belong together.
        Stopped: as of :func:`train`.
    """
    if (folder / files.METRICS).exists():
        return files.read_json(folder / files.METRICS)
    system, config = read_run(folder)
    return _Run(system, config, folder, resumed=True, show=show).go()


def read_run(folder: Path) -> tuple[System[Any], Config]:
    """Return the system and the config of the run in ``folder``.

    Raises:
        RunError: there is none, or one that this version does not know.
    """
    run = files.read_json(folder / files.RUN)
    try:
        system = system_of(run["system"])
        return system, configs.parse(system.config, run["config"])
    except (KeyError, ValueError) as error:
        raise RunError(f"{folder / files.RUN}: {error}") from error


def evaluate(folder: Path, *, checkpoint: str = "last", data: str | None = None) -> dict[str, Any]:
    """Evaluate a run's checkpoint on test images.

    Args:
        folder: of the run.
        checkpoint: ``"last"`` or ``"best"``.
        data: another data set's name or folder, with as many classes; None for the run's own.

    Returns:
        What the system's reading scores, ``images`` and the checkpoint's ``epoch``; those of average weights, too.
    """
    system, config = read_run(folder)
    run = _Run(system, config, folder, resumed=True, show=False)
    content = run.read_checkpoint(folder / f"{checkpoint}.pt")
    if content is None:
        raise RunError(f"{folder / f'{checkpoint}.pt'}: not there")
    return run.evaluate_only(content, data)


class _Run:
    """One run, in one process of it."""

    def __init__(self, system: System[Any], config: Config, folder: Path, *, resumed: bool, show: bool) -> None:
        import_torchvision()  # Before Fabric, which imports it where torchmetrics is installed.
        self.system, self.config, self.folder, self.resumed, self.show = system, config, folder, resumed, show
        self.reading = system.reading
        self.listening = Listening()
        self.last_scores: dict[str, float] = {}

    def go(self) -> dict[str, Any]:
        config = self.config
        data = self.reading.load(config.data)
        if not self.resumed and not launched_by_another():
            files.make_folder(self.folder)
        fabric = self._fabric()
        sha256 = data.sha256
        shape = self._prepare_data(data)
        if self.resumed and (recorded := files.read_json(self.folder / files.RUN)["data"]["sha256"]) != sha256:
            raise RunError(f"data: {data.name} has sha256 {sha256}, expected {recorded} as when the run began")

        with self.listening:
            content = self.read_checkpoint(self.folder / files.LAST) if self.resumed else None
            self._prepare_model(fabric, shape, begun=content is not None)
            if fabric.is_global_zero and not self.resumed:
                files.write_json(self.folder / files.RUN, self._described(sha256))
            progress = Progress()
            if content is not None:
                progress = load_state(content, self.bare, self.optimizer, self._average(), self.sharded)
                del content
            if self.resumed and fabric.is_global_zero:
                cut_log(self.folder, progress.step, progress.evaluated if progress.step else -1)
            fabric.barrier()
            return self._train(fabric, progress)

    def evaluate_only(self, content: dict[str, Any], name: str | None) -> dict[str, Any]:
        config = self.config
        own = self.reading.load(config.data)
        data = own if name is None else self.reading.load(dataclasses.replace(config.data, name=name))
        shape = self._prepare_data(own)
        if len(data.classes) != shape.classes:
            raise ValueError(f"data: got {len(data.classes)} classes of {data.name}, expected {shape.classes}")
        self.tests = self.reading.pictures(config, data.test, shape, False)
        fabric = self._fabric(alone=True)
        self.reader = FabricReader(fabric, config, shape)
        built = self._build(shape, begun=True)
        self.sharded, self.averaged = False, None
        self.bare = built.model
        if config.ema is not None:
            self.averaged = self._ema(built.model, config.ema)
        self.model = self._wrapped(fabric)
        load_state(content, self.bare, None, self._average(), False)
        figures = self._evaluated(self.model, self.tests)
        found = {"epoch": content["progress"]["evaluated"], "images": len(self.tests), **figures}
        average = self._average()
        if average is not None:
            found |= {f"{key}_ema": value for key, value in self._evaluated(average, self.tests).items()}
        return found

    def read_checkpoint(self, path: Path) -> dict[str, Any] | None:
        """The content of a checkpoint of this run; None if it was never written."""
        if not path.exists():
            return None
        content = files.read_checkpoint(path)
        if content.get("format") != FORMAT:
            raise RunError(f"{path}: got format {content.get('format')}, expected {FORMAT}")
        mine, theirs = (
            configs.flat_dict(self.config),
            configs.flat_dict(configs.parse(self.system.config, content["config"])),
        )
        differing = [f"{key} was {theirs[key]!r}, is {mine[key]!r}" for key in mine if mine[key] != theirs[key]]
        if differing:
            raise RunError(f"{path}: of another config than {files.RUN}: {'; '.join(differing)}")
        return content

    def _fabric(self, alone: bool = False) -> Fabric:
        """Lightning Fabric, launched: from here on there may be several processes."""
        try:
            from lightning_fabric import Fabric
            from lightning_fabric.strategies import ModelParallelStrategy
        except ImportError as error:
            raise ImportError("training needs Lightning Fabric: make systems, or rl_kernels[systems]") from error
        runtime = self.config.runtime
        if runtime.threads is not None:
            torch.set_num_threads(runtime.threads)
        torch.use_deterministic_algorithms(runtime.deterministic)
        strategy: Any = runtime.strategy
        if strategy == "fsdp2":
            strategy = ModelParallelStrategy(self._shard, data_parallel_size=runtime.devices, tensor_parallel_size=1)
        elif strategy == "auto" and runtime.devices > 1:
            strategy = "ddp"
        fabric = Fabric(
            accelerator=runtime.accelerator,
            devices=1 if alone else runtime.devices,
            strategy="auto" if alone else strategy,
            precision=runtime.precision,
        )
        fabric.launch()
        return fabric

    def _shard(self, model: nn.Module, mesh: Any) -> nn.Module:
        if self.built.plan is None:
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=mesh["data_parallel"])
            return model
        return rl.distributed.shard(model, self.built.plan, mesh=mesh["data_parallel"])

    def _prepare_data(self, data: DataSet) -> ImageShape:
        config, reading = self.config, self.reading
        trained, held = reading.split(config, data)
        if len(trained) < config.batch_size:
            raise ValueError(
                f"batch_size: got {config.batch_size}, expected at most {len(trained)}, the number of training images"
            )
        shape = self.shape = reading.shape(config, data, trained)
        self.training, self.unaugmented = (reading.pictures(config, trained, shape, each) for each in (True, False))
        self.tests = reading.pictures(config, data.test, shape, False)
        self.validation = None if held is None else reading.pictures(config, held, shape, False)
        self.steps = len(trained) // config.batch_size
        return shape

    def _build(self, shape: ImageShape, begun: bool) -> Built:
        """The model; of a run that has a checkpoint without the weights that it began with, which may be gone."""
        config = self.config
        if begun:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights=None))
        torch.manual_seed(config.seed)
        return self.system.build(config, shape)

    def _prepare_model(self, fabric: Fabric, shape: ImageShape, begun: bool) -> None:
        config, runtime = self.config, self.config.runtime
        self.reader = FabricReader(fabric, config, shape)
        self.sharded = runtime.strategy == "fsdp2"
        if self.sharded and config.ema is not None:
            raise ValueError(f"ema: got {config.ema} with runtime.strategy='fsdp2', expected null")
        self.built: Built = self._build(shape, begun)
        self.bare = self.built.model
        self.parameters = count(self.bare)
        self.trainable = sum(p.numel() for p in self.bare.parameters() if p.requires_grad)
        self.coefficients = sum(
            p.numel() for m in self.bare.modules() if isinstance(m, Coefficients) for p in m.parameters()
        )
        if runtime.channels_last:
            self.bare.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = None if config.ema is None else self._ema(self.bare, config.ema)
        if runtime.compile:
            for piece in self.system.pieces(self.bare):
                piece.compile()
        self.model = self._wrapped(fabric)
        optimizer = make_optimizer(config, self.bare, fused=not self.sharded)
        rl.check(self.bare, optimizer)
        self.schedule = make_schedule(config, optimizer, self.steps * config.epochs)
        self.optimizer = optimizer
        self.wrapped: Any = fabric.setup_optimizers(optimizer)
        if self.averaged is not None:
            self.averaged.to(fabric.device)
        self.mixing = make_mixing(config, shape.classes)

    def _wrapped(self, fabric: Fabric) -> nn.Module:
        pieces = [fabric.setup_module(piece) for piece in self.system.pieces(self.bare)]
        return self.system.wrap(self.bare, pieces)

    def _ema(self, model: nn.Module, decay: float) -> nn.Module:
        import_timm()
        from timm.utils import ModelEmaV3

        return ModelEmaV3(model, decay=decay)

    def _average(self) -> nn.Module | None:
        return None if self.averaged is None else self.averaged.module  # type: ignore[return-value]

    def _train(self, fabric: Fabric, progress: Progress) -> dict[str, Any]:
        config = self.config
        total = self.steps * config.epochs
        zero = fabric.is_global_zero
        with Record(
            self.folder if zero else None,
            total,
            progress.step,
            config.batch_size,
            show=self.show and zero,
            tensorboard=config.runtime.tensorboard,
        ) as record:
            if progress.step:
                record.say(f"going on after step {progress.step} of {total}")
            elif config.model.weights is not None:  # What they are worth here, before anything is learnt.
                record.epoch({"epoch": 0, "step": 0, **self._scores(), "seconds": 0.0})
            while progress.evaluated < config.epochs:
                self._finish_epoch(fabric, progress, record)
        metrics = self._metrics(fabric, progress)
        if zero:
            files.write_json(self.folder / files.METRICS, metrics)
        fabric.barrier()
        return metrics

    def _finish_epoch(self, fabric: Fabric, progress: Progress, record: Record) -> None:
        """Do what is left of an epoch, evaluate it and write a checkpoint."""
        config = self.config
        started, before = time.perf_counter(), progress.seconds
        epoch = progress.evaluated
        order = loading.Order(
            len(self.training),
            config.batch_size,
            config.seed,
            epoch,
            progress.step - epoch * self.steps,
            fabric.global_rank,
            fabric.world_size,
            shuffled=True,
        )
        if len(order):
            for batch in self.reader.loader(self.training, order):
                self._update(fabric, progress, record, batch)
                progress.seconds = before + time.perf_counter() - started
                self._stop_if_asked(fabric, progress)
        losses = progress.loss_sum / self.steps
        line: dict[str, Any] = {"epoch": epoch + 1, "step": progress.step, "train_loss": losses}
        scores = self.last_scores = self._scores()
        progress.seconds = before + time.perf_counter() - started
        record.epoch({**line, **scores, "seconds": progress.seconds})
        progress.evaluated, progress.loss_sum = epoch + 1, 0.0
        score = next(value for key, value in scores.items() if key.endswith(f"_{self.reading.score}"))
        better = score > progress.best or progress.best < 0  # A score may be no number.
        progress.best = score if better else progress.best
        content = self._checkpoint(progress)
        if fabric.is_global_zero:
            if better:
                files.write_checkpoint(self.folder / files.BEST, content)
            files.write_checkpoint(self.folder / files.LAST, content)
        self._stop_if_asked(fabric, progress, written=True)

    def _scores(self, of: str | None = None) -> dict[str, float]:
        """Figures, of the average weights as well, on images by which the best epoch is chosen, or ``of``."""
        kind = of or ("test" if self.validation is None else "validation")
        scored = self.validation if kind == "validation" and self.validation is not None else self.tests
        scores = {f"{kind}_{key}": value for key, value in self._evaluated(self.model, scored).items()}
        average = self._average()
        if average is not None:
            of_average = self._evaluated(average, scored)
            scores |= {f"{kind}_{key}_ema": value for key, value in of_average.items()}
        return scores

    def _evaluated(self, model: nn.Module, pictures: Any) -> dict[str, float]:
        return self.reading.evaluate(self.reader, model, pictures)

    def _update(self, fabric: Fabric, progress: Progress, record: Record, batch: loading.Batch) -> None:
        config = self.config
        started = time.perf_counter()
        self.schedule.step_update(progress.step)
        seed_all(config.seed, progress.step, fabric.global_rank)
        self.model.train()
        images, targets = self.reader.on_device(batch)
        if self.mixing is not None:
            images, targets = self.mixing(images, targets)
        loss = self._differentiate(fabric, images, targets)
        if config.optimizer.clip is not None:
            fabric.clip_gradients(self.model, self.wrapped, max_norm=config.optimizer.clip)
        self.wrapped.step()
        self.wrapped.zero_grad()
        self.system.updated(self.bare)
        if self.averaged is not None:
            self.averaged.update(self.bare)  # type: ignore[operator]
        value = float(fabric.all_reduce(loss, reduce_op="mean"))  # type: ignore[arg-type]
        progress.step += 1
        progress.loss_sum += value
        epoch = (progress.step - 1) // self.steps + 1
        rate = self.optimizer.param_groups[0]["lr"]
        seconds = time.perf_counter() - started
        record.step({"epoch": epoch, "step": progress.step, "loss": value, "learning_rate": rate, "seconds": seconds})

    def _differentiate(self, fabric: Fabric, images: Tensor, targets: Tensor) -> Tensor:
        """Add a batch's gradients, part by part; return its loss."""
        parts = self.config.accumulate
        loss = torch.zeros((), device=fabric.device)
        for number, (some, their) in enumerate(zip(images.chunk(parts), targets.chunk(parts), strict=True)):
            engine = FabricEngine(fabric, parts, number + 1 == parts)
            loss += self.system.step(self.config, self.model, some, their, engine) / parts
        return loss

    def _checkpoint(self, progress: Progress) -> dict[str, Any]:
        plain = configs.as_dict(self.config)
        return save_state(self.bare, self.optimizer, self._average(), progress, plain, self.sharded)

    def _stop_if_asked(self, fabric: Fabric, progress: Progress, written: bool = False) -> None:
        """Write a checkpoint where one is due, or before the run ends because a signal came."""
        every = self.config.runtime.checkpoint_steps
        due = every is not None and progress.step % every == 0
        number = self.listening.number
        if fabric.world_size > 1:  # A signal may reach one process only.
            number = int(fabric.all_reduce(torch.tensor(float(number), device=fabric.device), reduce_op="sum"))  # type: ignore[arg-type]
            number = signal.SIGTERM if number else 0
        if not (number or due):
            return
        if not written:
            content = self._checkpoint(progress)
            if fabric.is_global_zero:
                files.write_checkpoint(self.folder / files.LAST, content)
        fabric.barrier()
        if number:
            raise Stopped(number, f" after step {progress.step}; go on with: python -m rl_kernels resume {self.folder}")

    def _described(self, sha256: str) -> dict[str, Any]:
        config, git = self.config, git_state("--untracked-files=no")
        return {
            "system": self.system.name,
            "config": configs.as_dict(config),
            "versions": versions("torchvision", "timm", "lightning_fabric", "numpy"),
            "commit": None if git["commit"] is None else git["commit"] + "+" * bool(git["dirty"]),
            "machine": machine(),
            "backend": os.environ.get("RL_KERNELS_BACKEND", "auto"),
            "data": {
                "name": config.data.name,
                "sha256": sha256,
                "training_images": len(self.training),
                "validation_images": 0 if self.validation is None else len(self.validation),
                "test_images": len(self.tests),
            },
            "begun": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def _metrics(self, fabric: Fabric, progress: Progress) -> dict[str, Any]:
        """The final figures: of the last epoch, on test images, which nothing was chosen by."""
        test = self.last_scores if f"test_{self.reading.score}" in self.last_scores else self._scores("test")
        steps = [line["seconds"] for line in files.read_log(self.folder) if line["event"] == "step"]
        of_system = self.system.figures(self.config, self.bare, lambda: self._another_step(fabric), self._images)
        self.wrapped.zero_grad()  # The peak is that of a step which makes its own.
        return {
            **{key.removeprefix("test_"): value for key, value in test.items()},
            "parameters": self.parameters,
            "trainable_parameters": self.trainable,
            "coefficients": self.coefficients,
            "optimizer_bytes": optimizer_bytes(self.optimizer),
            "peak_bytes": self._peak(fabric),
            "step_seconds": statistics.median(steps) if steps else None,
            "images_per_second": self.config.batch_size / statistics.median(steps) if steps else None,
            "seconds": progress.seconds,
            "epochs": self.config.epochs,
            "steps": progress.step,
            **of_system,
        }

    def _peak(self, fabric: Fabric) -> int | None:
        """The most memory that one more step holds; None where several CPU processes share it."""
        if fabric.device.type == "cuda":
            return torch.cuda.max_memory_allocated(fabric.device)
        if fabric.world_size > 1:
            return None
        held = sum(tensor.nbytes for tensor in (*self.bare.parameters(), *self.bare.buffers()))
        held += optimizer_bytes(self.optimizer)
        average = self._average()
        held += 0 if average is None else sum(tensor.nbytes for tensor in average.state_dict().values())
        kept = self._one_batch()

        def step() -> None:
            self._another_step(fabric, kept)
            self.wrapped.step()
            self.wrapped.zero_grad()

        return held + kept[0].nbytes + peak_memory(step, "cpu")

    def _one_batch(self) -> tuple[Tensor, Tensor]:
        """What one forward takes."""
        some = [(index, 0) for index in range(self.config.batch_size // self.config.accumulate)]
        return self.reader.on_device(self.training.__getitems__(some))

    def _another_step(self, fabric: Fabric, batch: tuple[Tensor, Tensor] | None = None) -> None:
        """Compute a batch's gradients once more, for those who watch; nothing is trained by it."""
        self.model.train()
        self.system.step(self.config, self.model, *(batch or self._one_batch()), FabricEngine(fabric, 1, True))

    def _images(self, training: bool) -> Batches:
        return self.reader.all_of(self.unaugmented if training else self.tests)


def launched_by_another() -> bool:
    """Whether this process was started by the first one of its run."""
    return int(os.environ.get("LOCAL_RANK", "0")) > 0
