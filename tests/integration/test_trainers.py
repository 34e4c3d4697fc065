"""Replaced models under Lightning and the Hugging Face Trainer: training, checkpoints, and what those turn on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import rl_kernels as rl
from rl_kernels.conversion.zoo import import_timm, import_transformers
from rl_kernels.nn import ReplacementLayer
from tests.conversion.common import mixed_by_hand
from tests.integration.models import SMALL

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

CLASSES = 3
BATCHES = 4
BATCH = 4
RATE = 1e-2
OPTIMIZERS = {  # By the Trainer's names.
    "adamw_torch": partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0),
    "sgd": partial(torch.optim.SGD, lr=RATE),
}
# Adam would hide the scale of a gradient, and so would clipping.
OPTIONS = [{}, {"optimizer": "sgd", "accumulate": 2}, {"optimizer": "sgd", "clip": 0.02}]


def timm_vit() -> nn.Module:
    create = import_timm().create_model
    return create("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=3, depth=5, num_classes=CLASSES)


def timm_resnet() -> nn.Module:
    import_timm()
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (5, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=CLASSES)


SETTINGS = dict(num_labels=CLASSES, num_hidden_layers=5, **SMALL)


def bert() -> nn.Module:
    transformers = import_transformers()
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=16, **SETTINGS)
    return transformers.BertForSequenceClassification(config)


def huggingface_vit() -> nn.Module:
    transformers = import_transformers()
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=8, **SETTINGS))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "timm_vit": (timm_vit, "blocks.2"),
    "timm_resnet": (timm_resnet, "layer1.2"),
    "bert": (bert, "bert.encoder.layer.2"),
    "vit": (huggingface_vit, "vit.layers.2"),
}


def planned(name: str) -> tuple[nn.Module, rl.Plan]:
    torch.manual_seed(1)
    model = MODELS[name][0]()
    plan = rl.plan(model, every=3)
    assert [block.path for block in plan.replaced] == [MODELS[name][1]]
    return model, plan


def converted(name: str) -> nn.Module:
    return rl.replace(*planned(name))


def batches(name: str, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(BATCHES):
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        if name == "bert":
            mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3] * (BATCH // 2))
            tokens = torch.randint(30, mask.shape, generator=generator)
            found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
        else:
            size = 16 if name == "vit" else 32
            images = torch.randn(BATCH, 3, size, size, generator=generator, dtype=dtype)
            found.append({"pixel_values": images, "labels": labels})
    return found


def loss_of(found: Any, batch: dict[str, Tensor]) -> Tensor:
    """timm's models return logits, those of transformers a loss too."""
    return cross_entropy(found if isinstance(found, Tensor) else found.logits, batch["labels"])


def inputs_of(batch: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    if "pixel_values" in batch:
        return (batch["pixel_values"],), {}
    return (), {key: value for key, value in batch.items() if key != "labels"}


class ByHand:
    """The plain model on weights mixed in plain torch, and what the state_dict of the replaced one is to hold."""

    def __init__(self, name: str):
        self.plain, self.plan = planned(name)
        self.plain.double()
        (block,) = self.plan.replaced
        self.coefficients = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)
        self.by_path = {f"{block.path}.{layer.path}": self.coefficients for layer in block.layers}
        self.replaced = mixed_by_hand(self.plain, self.plan, self.by_path).keys()

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        mixed = mixed_by_hand(self.plain, self.plan, self.by_path)
        return functional_call(self.plain, mixed, args, kwargs)

    def parameters(self) -> list[Tensor]:
        kept = [parameter for name, parameter in self.plain.named_parameters() if name not in self.replaced]
        return [*kept, self.coefficients]

    def state(self) -> dict[str, Tensor]:
        kept = {key: value for key, value in self.plain.state_dict().items() if key not in self.replaced}
        return {**kept, f"{next(iter(self.by_path))}.mixing.coefficients": self.coefficients.detach()}


def train(
    model: Callable[..., Any],
    parameters: Iterable[Tensor],
    data: Sequence[dict[str, Tensor]],
    accumulate: int = 1,
    clip: float | None = None,
    autocast: bool = False,
    optimizer: str = "adamw_torch",
) -> list[float]:
    """What the trainers are to do, in a loop; returns the losses."""
    parameters = list(parameters)
    stepper = OPTIMIZERS[optimizer](parameters)
    losses = []
    for number, batch in enumerate(data, start=1):
        args, kwargs = inputs_of(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model(*args, **kwargs), batch)
        (loss / accumulate).backward()
        losses.append(loss.item())
        if number % accumulate == 0:
            if clip is not None:
                assert torch.nn.utils.clip_grad_norm_(parameters, clip) > 2 * clip
            stepper.step()
            stepper.zero_grad()
    return losses


def assert_state(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """The same keys, of which the replaced block has its coefficients, and the same values to rounding."""
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-7, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


def assert_moved(model: nn.Module, start: Mapping[str, Tensor]) -> None:
    """The coefficients and both neighbours of every replaced layer are others than at the start."""
    names = {module: path for path, module in model.named_modules()}
    layers = [module for module in names if isinstance(module, ReplacementLayer)]
    assert layers
    for layer in layers:
        for module in (layer.coefficient_module, *layer.sources):
            for name, value in module.state_dict(prefix=f"{names[module]}.").items():
                assert not torch.equal(value, start[name]), name


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    args, kwargs = inputs_of(batch)
    with torch.no_grad():
        found = model.eval()(*args, **kwargs)
    return found if isinstance(found, Tensor) else found.logits


# Lightning.


@cache
def lightning_module() -> Any:
    import_timm()  # Lightning imports torchvision.
    import lightning.pytorch as lightning

    class Classifier(lightning.LightningModule):
        def __init__(self, name: str, dtype: str = "float64", optimizer: str = "adamw_torch"):
            super().__init__()
            self.save_hyperparameters()
            self.model = converted(name).to(getattr(torch, dtype))
            self.losses: list[float] = []

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            args, kwargs = inputs_of(batch)
            loss = loss_of(self.model(*args, **kwargs), batch)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return OPTIMIZERS[self.hparams.optimizer](self.parameters())

    return Classifier


def fit(module: Any, data: Any, path: Path, resume: Path | None = None, **options: Any) -> None:
    import lightning.pytorch as lightning

    silent = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=path)
    options = {"max_epochs": 1, "enable_checkpointing": False, **silent, **options}
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    lightning.Trainer(accelerator="cpu", devices=1, **options).fit(module, loader, ckpt_path=resume)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["timm_vit", "timm_resnet"])
def test_lightning_trains_as_by_hand(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    module, truth = lightning_module()(name, optimizer=options.get("optimizer", "adamw_torch")), ByHand(name)
    start = copy.deepcopy(module.model.state_dict())
    fit(
        module,
        batches(name),
        tmp_path,
        accumulate_grad_batches=options.get("accumulate", 1),
        gradient_clip_val=options.get("clip"),
    )
    losses = train(truth, truth.parameters(), batches(name), **options)
    torch.testing.assert_close(module.losses, losses, rtol=1e-9, atol=0.0)
    assert_state(module.model, truth.state())
    assert_moved(module.model, start)


def test_lightning_trains_in_bfloat16_by_autocast(tmp_path: Path) -> None:
    module, twin = lightning_module()("timm_vit", "float32"), converted("timm_vit")
    data = batches("timm_vit", torch.float32)
    start = copy.deepcopy(twin.state_dict())
    fit(module, data, tmp_path, precision="bf16-mixed")
    assert train(twin, twin.parameters(), data, autocast=True) == module.losses
    assert_state(module.model, twin.state_dict())
    assert_moved(module.model, start)


def test_lightning_resumes_from_its_checkpoint_and_loads_it(tmp_path: Path) -> None:
    kind, data = lightning_module(), batches("timm_resnet")
    from lightning.pytorch.callbacks import ModelCheckpoint

    whole, first, second = (kind("timm_resnet") for _ in range(3))
    fit(whole, data, tmp_path, max_epochs=2)
    save = ModelCheckpoint(dirpath=tmp_path, filename="first")
    fit(first, data, tmp_path, enable_checkpointing=True, callbacks=[save])
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1.0)  # What the checkpoint brings shows.
    fit(second, data, tmp_path, resume=tmp_path / "first.ckpt", max_epochs=2)
    assert whole.losses == first.losses + second.losses
    assert_state(second.model, whole.model.state_dict())

    loaded = kind.load_from_checkpoint(tmp_path / "first.ckpt")
    expected = outputs(first.model, data[0])
    assert torch.equal(outputs(loaded.model, data[0]), expected)
    assert not torch.equal(outputs(kind("timm_resnet").model, data[0]), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["first.ckpt"]


# The Hugging Face Trainer.


def trainer(model: nn.Module, data: Sequence[dict[str, Tensor]], path: Path, **options: Any) -> Any:
    transformers = import_transformers()
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{
            "num_train_epochs": 1,
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "logging_strategy": "no",
            "optim": "adamw_torch",
            **options,
        },
    )
    examples = [{key: value[j] for key, value in batch.items()} for batch in data for j in range(BATCH)]
    made = transformers.Trainer(model, arguments, train_dataset=examples)
    # Else it leaves the mean over accumulated batches to any model that takes **kwargs, and these do not see to it.
    made.model_accepts_loss_kwargs = False
    return made


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_the_trainer_trains_as_by_hand(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, truth = converted(name).double(), ByHand(name)
    start = copy.deepcopy(model.state_dict())
    trainer(
        model,
        batches(name),
        tmp_path,
        gradient_accumulation_steps=options.get("accumulate", 1),
        max_grad_norm=options.get("clip", 0.0),
        optim=options.get("optimizer", "adamw_torch"),
    ).train()
    truth.plain.train()
    train(truth, truth.parameters(), batches(name), **options)
    assert_state(model, truth.state())
    assert_moved(model, start)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_the_trainer_trains_with_gradient_checkpointing(name: str, tmp_path: Path) -> None:
    model, truth = converted(name).double(), ByHand(name)
    layer = next(module for module in model.modules() if isinstance(module, ReplacementLayer))
    runs: list[int] = []
    layer.register_forward_hook(lambda *_: runs.append(1))
    trainer(model, batches(name), tmp_path, gradient_checkpointing=True).train()
    assert len(runs) == 2 * BATCHES  # Once more in each backward.
    truth.plain.train()
    train(truth, truth.parameters(), batches(name))
    assert_state(model, truth.state())


def test_the_trainer_trains_in_bfloat16_by_autocast(tmp_path: Path) -> None:
    model, twin = converted("bert"), converted("bert").train()
    start = copy.deepcopy(model.state_dict())
    dtypes: list[torch.dtype] = []
    layer = next(module for module in model.modules() if isinstance(module, ReplacementLayer))
    layer.register_forward_hook(lambda _, inputs, y: dtypes.append(y.dtype))
    trainer(model, batches("bert"), tmp_path, bf16=True).train()
    assert dtypes == [torch.bfloat16] * BATCHES
    train(twin, twin.parameters(), batches("bert"), autocast=True)
    assert_state(model, twin.state_dict())
    assert_moved(model, start)


def test_the_trainer_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    data = batches("bert")
    whole, first, second = (converted("bert").double() for _ in range(3))
    trainer(whole, data, tmp_path / "whole").train()
    trainer(first, data, tmp_path / "parts", save_strategy="steps", save_steps=2, max_steps=2).train()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1.0)  # What the checkpoint brings shows.
    resumed = trainer(second, data, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert resumed.state.global_step == BATCHES
    assert_state(second, whole.state_dict())


def test_what_the_trainer_saves_loads_into_a_converted_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file, load_model

    data = batches("bert", torch.float32)
    model, again = converted("bert"), converted("bert")
    run = trainer(model, data, tmp_path)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    file = tmp_path / "saved" / "model.safetensors"
    # Layers of a block share their coefficients, which safetensors would refuse, or drop, were they registered twice.
    assert load_file(file).keys() == model.state_dict().keys()
    assert [key for key in load_file(file) if key.startswith("bert.encoder.layer.2.")] == [
        "bert.encoder.layer.2.attention.self.query.mixing.coefficients"
    ]
    expected = outputs(model, data[0])
    assert not torch.equal(outputs(again, data[0]), expected)
    assert load_model(again, file) == (set(), [])
    assert torch.equal(outputs(again, data[0]), expected)


def test_from_pretrained_names_what_a_replaced_checkpoint_lacks(tmp_path: Path) -> None:
    """It builds the plain model: what is to be loaded into a converted one is no checkpoint of that."""
    transformers = import_transformers()
    model, plan = planned("bert")
    block = plan.replaced[0]
    replaced = {f"{block.path}.{layer.path}.{name}" for layer in block.layers for name in layer.shapes}
    rl.replace(model, plan).save_pretrained(tmp_path)
    _, report = transformers.BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == replaced
    assert set(report["unexpected_keys"]) == {f"{block.path}.{block.layers[0].path}.mixing.coefficients"}


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_merged_model_goes_round_by_save_pretrained(name: str, tmp_path: Path) -> None:
    model, data = converted(name), batches(name, torch.float32)
    train(model, model.parameters(), data)
    expected = outputs(model, data[0])
    rl.merge(model).save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(outputs(again, data[0]), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs(again, data[0]), outputs(model, data[0]))
