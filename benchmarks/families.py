"""What plans save of other libraries' models, and what becomes of the rest: ``docs/families.md``."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import click
from torch import nn

from rl_kernels.conversion import Plan, plan
from rl_kernels.conversion.blocks import count
from rl_kernels.conversion.options import Options
from rl_kernels.conversion.targets import Targets
from rl_kernels.conversion.walk import Slot, find
from rl_kernels.conversion.zoo import build

EVERY = 2
TABLE = Path("docs/families.md")
FAMILIES = {
    "torchvision": (
        "resnet50 resnext50_32x4d vit_b_16 swin_t swin_v2_t densenet121 regnet_x_400mf efficientnet_v2_s "
        "shufflenet_v2_x1_0 mnasnet1_0 maxvit_t mobilenet_v3_large squeezenet1_1 googlenet deeplabv3_resnet50 "
        "lraspp_mobilenet_v3_large fasterrcnn_resnet50_fpn r3d_18 r2plus1d_18 raft_small"
    ),
    "timm": (
        "vit_tiny_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 eva02_small_patch14_224 "
        "swinv2_tiny_window8_256 maxvit_tiny_tf_224 mixer_b16_224 poolformer_s12 convnextv2_tiny levit_128 "
        "efficientformer_l1 fastvit_t8 mobilevit_s mobileone_s0 repvgg_b0 tf_efficientnet_b0 tf_efficientnet_cc_b0_4e "
        "coat_tiny resnetv2_50x1_bit nf_resnet50 pvt_v2_b0 resnext26ts"
    ),
    "transformers": (
        "gpt2 llama qwen3 opt bloom falcon mixtral t5 bert distilbert deberta-v2 albert convbert xlnet mamba mamba2 "
        "clip vit_mae segformer detr whisper wav2vec2 encodec"
    ),
}


@dataclass(frozen=True)
class Row:
    """One model: its parameters, what a plan saves of them, and why it does not save more."""

    model: str
    parameters: int
    saved: float
    replaced: str
    why: str

    def line(self) -> str:
        """The row of the table."""
        return f"| {self.model} | {self.parameters / 1e6:,.1f} M | {self.saved:.1f} % | {self.replaced} | {self.why} |"


def row(library: str, name: str) -> Row:
    """Plan one model with random weights, on the meta device where it can be built there."""
    model = build(f"{library}/{name}")
    size = count(model)
    try:
        made = plan(model, EVERY)
    except ValueError as error:
        reasons = str(error).partition("nothing can be replaced (")[2].rpartition("); expected")[0]
        return Row(name, size, 0.0, "none", "; ".join(reasons.split("; ")[:2]))
    _, slots = find(model, Targets(None, "mixed", "scalar"), "auto", Options())
    replaced = f"{len(made.replaced)} of {made.blocks} {made.level}s"
    return Row(name, size, 100 * made.saved / size, replaced, "; ".join(_rest(model, made, slots)))


def _rest(model: nn.Module, made: Plan, slots: Sequence[Slot]) -> Iterator[str]:
    """What holds the other parameters, shares below 3 % left out."""
    total = count(model)
    inside = sum(count(slot.block.module) for slot in slots)
    replaced = {block.path for block in made.replaced}
    sources = {path for block in made.replaced for path in block.sources}
    shares: Counter[str] = Counter({f"outside {made.level}s": total - inside})
    for slot in slots:
        path = slot.block.path
        if path in sources:
            shares["neighbours"] += count(slot.block.module)
        elif path not in replaced:
            why = "between replaced ones" if slot.obstacle is None else slot.obstacle.reason
            shares[f"not replaced ({why})"] += count(slot.block.module)
    for block in made.replaced:
        for part in block.kept:
            shares[f"kept in replaced {made.level}s: {part.class_name}"] += part.parameters
    for name, size in shares.most_common():
        if size >= 0.03 * total:
            yield f"{name} {100 * size / total:.0f} %"


def _heading() -> list[str]:
    libraries = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", *FAMILIES))
    return [
        "# What plans save of other libraries' models",
        "",
        f"`rl.plan(model, every={EVERY})` on models of their default sizes with random weights: at most half of the",
        "blocks, as a replaced block's neighbours are kept. The last column says where the other parameters are, or",
        "why nothing is replaced; shares below 3 % are left out. What makes a block, and which layers run by",
        "their own forward, is in [models.md](models.md). Parameters that are tied are counted once.",
        "",
        "Made by `python -m benchmarks families` with",
        f"{libraries}, Python {platform.python_version()}.",
    ]


@click.command("families")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=TABLE, show_default=True)
def families_command(output: Path) -> None:
    """Plan the models of other libraries, and write what is saved to a table. Needs them: make test-integration."""
    lines = _heading()
    for library, names in FAMILIES.items():
        lines += ["", f"## {library}", "", "| model | parameters | saved | replaced | the rest |"]
        lines.append("| --- | ---: | ---: | --- | --- |")
        for name in names.split():
            lines.append(row(library, name).line())
            click.echo(lines[-1])
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")
