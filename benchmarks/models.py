"""Whole training steps: a model end to end, and the same model with blocks replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as aten
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import rl_kernels as rl
from benchmarks.cases import ModelCase
from benchmarks.contenders import TOLERANCE, Contender, Wrong
from benchmarks.rivals import name_of
from rl_kernels.systems.digits import optimizer_bytes
from rl_kernels.systems.models import DigitsResNet, DigitsViT, TransformerBlock

WHOLE = "end-to-end"
CLASSES = 100


def resnet32() -> nn.Module:
    """CIFAR's ResNet-32: three stages of five basic blocks, 16, 32 and 64 channels."""
    model = DigitsResNet(width=16, depths=(5, 5, 5), classes=CLASSES)
    model.stem[0] = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    return model


def vit_tiny() -> nn.Module:
    """ViT-Ti on patches of 4x4: 192 features, 12 blocks of 3 heads, 64 tokens and the class token."""
    model = DigitsViT(image_size=32, patch_size=4, dim=192, depth=1, heads=3, classes=CLASSES)
    model.patches = nn.Conv2d(3, 192, 4, stride=4)
    model.blocks = nn.Sequential(*(TransformerBlock(192, heads=3, mlp_ratio=4) for _ in range(12)))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"ResNet-32": resnet32, "ViT-Ti": vit_tiny}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True),
    "adamw": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05, fused=True),
}


def build_model(case: ModelCase, device: str, every: int | None) -> nn.Module:
    """The case's model from a fixed seed, whole or with a block in ``every`` replaced."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[case.model]()
    return (model if every is None else rl.replace(model, rl.plan(model, every=every))).to(device)


def batch_of(case: ModelCase, device: str) -> tuple[Tensor, Tensor]:
    """Random images ``(batch, 3, 32, 32)`` and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, 3, 32, 32, generator=generator)
    return images.to(device), torch.randint(CLASSES, (case.batch,), generator=generator).to(device)


def contender(case: ModelCase, device: str, backend: str | None) -> Contender:
    """A model's training step: end to end where ``backend`` is None, else with blocks replaced."""
    model = build_model(case, device, None if backend is None else case.every)
    optimizer = OPTIMIZERS[case.optimizer](model.parameters())
    images, labels = batch_of(case, device)
    dtype = getattr(torch, case.dtype)

    def step() -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            loss = aten.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def facts() -> Mapping[str, int]:
        parameters = list(model.parameters())
        state = optimizer_bytes(optimizer)
        held = sum(tensor.nbytes for tensor in (*parameters, *model.buffers())) + state
        return {"parameters": sum(p.numel() for p in parameters), "optimizer_bytes": state, "held_bytes": held}

    if backend is None:
        return Contender(WHOLE, step, facts=facts)
    check = partial(error_against_merged, model, images[:8])
    return Contender(
        name_of(backend), step, context=partial(rl.use_backend, backend), sources=2, check=check, facts=facts
    )


def error_against_merged(model: nn.Module, images: Tensor) -> float:
    """Relative error of the replaced model's logits against those of the plain model that it merges into.

    Raises:
        Wrong: it is more than ten layers' rounding.
    """
    merged = rl.merge(copy.deepcopy(model)).eval()
    training = model.training
    with torch.no_grad():
        found, expected = model.eval()(images), merged(images)
    model.train(training)
    allowed = 10 * TOLERANCE[torch.float32]
    error = float((found - expected).norm() / expected.norm())
    if not error <= allowed:
        raise Wrong(f"logits: relative error {error:.2g} to the merged model's, expected at most {allowed:.2g}")
    return error


def count_flops(case: ModelCase, device: str) -> int:
    """Floating-point operations of one end-to-end step's products, as torch counts them."""
    model = build_model(case, device, None)
    images, labels = batch_of(case, device)
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        aten.cross_entropy(model(images), labels).backward()
    return int(counter.get_total_flops())
