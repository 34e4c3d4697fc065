"""The detector: sizes that are published, shapes, its options, what can be replaced in it, and what is refused."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rl_kernels as rl
from rl_kernels.systems.detection.modules import (
    GAM,
    SCMS,
    SPPF,
    Bottleneck,
    C2f,
    MultiScaleAttention,
    SteadyFeatures,
    SteadyWeights,
    steady_capture,
)
from rl_kernels.systems.detection.network import (
    BINS,
    SCALES,
    STRIDES,
    Detector,
    Predictions,
    cells,
    predictions,
    read_levels,
)

OPTIONS = {
    "plain": {},
    "gom": {"gom": True},
    "control": {"gom": "control"},
    "feature": {"scm": "feature"},
    "weights": {"scm": "weights"},
    "attention": {"scm": "attention"},
    "all": {"gom": True, "gom_groups": 8, "scm": "weights"},
}


def images(size=(32, 64), count=2, channels=3, dtype=torch.float32):
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def pico(classes=3, **options):
    torch.manual_seed(0)
    return Detector(classes, "pico", **options)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(scale, **options):
    with torch.device("meta"):
        return Detector(80, scale, **options)


# Sizes.


@pytest.mark.parametrize(("scale", "millions"), [("n", "3.2"), ("s", "11.2"), ("m", "25.9"), ("l", "43.7")])
def test_parameters_are_as_many_as_published(scale, millions):
    assert f"{parameters(on_meta(scale)) / 1e6:.1f}" == millions


@pytest.mark.parametrize("groups", [1, 2, 16])
@pytest.mark.parametrize("scale", SCALES)
def test_the_control_has_as_many_parameters(scale, groups):
    plain, gom, control = (parameters(on_meta(scale, gom=gom, gom_groups=groups)) for gom in (False, True, "control"))
    assert abs((control - plain) / (gom - plain) - 1) < 0.02
    if groups == 1:
        assert 24.9 < (gom - plain) / SCALES[scale].channels(1024) ** 2 < 25.2, "B4: 24.5 C^2 in the 7x7 convolutions"


@pytest.mark.parametrize(
    ("scale", "size"), [*((scale, (64, 96)) for scale in SCALES), ("n", (32, 32)), ("n", (640, 640))]
)
def test_shapes(scale, size):
    model = on_meta(scale)
    levels = model(images(size).to("meta"))
    sizes = [(size[0] // stride, size[1] // stride) for stride in STRIDES]
    assert [level.shape for level in levels] == [(2, 4 * BINS + 80, *each) for each in sizes]
    found = model.eval()(images(size).to("meta"))
    count = sum(height * width for height, width in sizes)
    assert isinstance(found, Predictions)
    assert found.boxes.shape == (2, count, 4) and found.scores.shape == (2, count, 80)


# What the head says.


def test_cells_by_hand():
    centres, strides = cells([(2, 3), (1, 2), (1, 1)], torch.float32, torch.device("cpu"))
    fine = [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]
    assert centres.tolist() == [*fine, [8, 8], [24, 8], [16, 16]]
    assert strides.tolist() == [8] * 6 + [16] * 2 + [32]


def test_boxes_by_hand():
    """The cell in row 1, column 2 of the first level is sure of its distances: 1, 2, 3 and 4 strides."""
    levels = [torch.zeros(1, 4 * BINS + 2, 64 // stride, 64 // stride) for stride in STRIDES]
    for side, distance in enumerate((1, 2, 3, 4)):
        levels[0][0, side * BINS + distance, 1, 2] = 100
    levels[0][0, 4 * BINS + 1, 1, 2] = 2
    boxes, scores = predictions(levels)
    x, y = 2.5 * 8, 1.5 * 8
    assert boxes[0, 8 + 2].tolist() == pytest.approx([x - 8, y - 16, x + 24, y + 32])
    assert scores[0, 8 + 2].tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-2))])
    assert boxes[0, -1].tolist() == pytest.approx([48 - 240, 48 - 240, 48 + 240, 48 + 240]), "even: 7.5 strides"


def test_biases_at_the_start():
    model = pico(classes=3, image_size=64)
    for box, kind, stride in zip(model.head.boxes, model.head.classes, STRIDES, strict=True):
        assert (box[2].bias == 1).all()
        assert kind[2].bias.tolist() == pytest.approx([math.log(5 / 3 / (64 / stride) ** 2)] * 3)
    levels = model(images((64, 64)))
    scores = predictions(levels).scores
    assert 2 < scores.sum().item() / 2 < 60, "about five objects a level"


# Options.


@pytest.mark.parametrize("name", OPTIONS)
def test_a_model_trains_and_predicts_in_every_precision(name):
    model = pico(**OPTIONS[name])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        typed = copy.deepcopy(model).to(dtype)
        levels = typed(images(dtype=dtype))
        assert all(level.dtype == dtype and level.isfinite().all() for level in levels)
        outputs = read_levels(levels)
        assert outputs.logits.dtype == outputs.centres.dtype == (dtype if dtype == torch.float64 else torch.float32)
        boxes, scores = typed.eval()(images(dtype=dtype))
        assert boxes.isfinite().all() and boxes.dtype == outputs.logits.dtype and ((scores >= 0) & (scores <= 1)).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        levels = model(images())
    assert all(level.dtype == torch.bfloat16 for level in levels)
    sum(level.float().square().sum() for level in levels).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["control", "feature", "all"])
def test_a_state_goes_into_another_model(name):
    model, other = pico(**OPTIONS[name]), Detector(3, "pico", **OPTIONS[name])
    for _ in range(2):
        model(images())
        model.follow()
    other.load_state_dict(model.state_dict())
    for ours, theirs in zip(model.eval()(images()), other.eval()(images()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_start_from_the_same_weights(name):
    plain, other = pico().state_dict(), pico(**OPTIONS[name]).state_dict()
    differing = {key for key in plain if not (key in other and torch.equal(plain[key], other[key]))}
    lengthened = {key for key in plain if key.startswith("backbone.stages.3.1.fuse.")}
    assert differing <= (lengthened if name == "control" else set())


def test_gam_is_two_gates():
    gam = GAM(16, groups=2).eval()
    assert gam.of_places[0].weight.shape == (4, 8, 7, 7) and gam.of_places[3].weight.shape == (16, 2, 7, 7)
    x = images(channels=16)
    gated = x * torch.sigmoid(gam.of_channels[2](torch.relu(gam.of_channels[0](x))))
    torch.testing.assert_close(gam(x), gated * gam.of_places(gated))
    assert (gam(x).abs() < x.abs()).all()


def test_the_pooling_of_sppf_is_that_of_larger_windows():
    sppf = SPPF(8, 12).eval()
    x = images(channels=8)
    reduced = sppf.reduce(x)
    pooled = [F.max_pool2d(reduced, size, 1, size // 2) for size in (5, 9, 13)]
    torch.testing.assert_close(sppf(x), sppf.fuse(torch.cat((reduced, *pooled), 1)))


def test_c2f_by_its_parts():
    for shortcut in (True, False):
        c2f = C2f(6, 8, 2, shortcut).eval()
        x = images(channels=6)
        first, second = c2f.split(x).chunk(2, 1)
        parts = [first, second]
        for block in c2f.blocks:
            y = block.conv2(block.conv1(parts[-1]))
            parts.append(parts[-1] + y if shortcut else y)
        torch.testing.assert_close(c2f(x), c2f.fuse(torch.cat(parts, 1)))


def test_steady_features_follow_the_mean():
    scm = SteadyFeatures(4, momentum=0.75)
    assert scm.logit.sigmoid().item() == pytest.approx(0.9)
    first, second = images(channels=4), 1 + images(channels=4)
    y = scm(first)
    expected = 0.25 * first.mean((0, 2, 3))
    torch.testing.assert_close(scm.steady, expected)
    torch.testing.assert_close(y, 0.9 * first + 0.1 * expected[:, None, None])
    scm(second)
    expected = 0.75 * expected + 0.25 * second.mean((0, 2, 3))
    torch.testing.assert_close(scm.steady, expected)
    scm.eval()(second)
    torch.testing.assert_close(scm.steady, expected)


def test_steady_features_fold_into_the_next_convolution():
    scm, conv = SteadyFeatures(4).double(), nn.Conv2d(4, 5, 1).double()
    for _ in range(3):
        scm(3 + images(channels=4, dtype=torch.float64))
    scale, shift = scm.eval().affine()
    assert shift.abs().min() > 0
    x = images(channels=4, dtype=torch.float64)
    weight = conv.weight * scale
    bias = conv.bias + conv.weight[..., 0, 0] @ shift
    torch.testing.assert_close(F.conv2d(x, weight, bias), conv(scm(x)))


def test_steady_weights_are_mixed_and_followed():
    scm = SteadyWeights(4, momentum=0.75)
    start = scm.average.clone()
    assert torch.equal(start, scm.conv.weight) and "average" in scm.state_dict()
    x = images(channels=4)
    torch.testing.assert_close(scm(x), scm.act(F.batch_norm(2 * scm.conv(x), None, None, training=True, eps=1e-3)))
    with torch.no_grad():
        scm.conv.weight.add_(1)
        scm.balance.s.fill_(0.5)
    scm.follow()
    torch.testing.assert_close(scm.average, start + 0.25)
    mixed = F.conv2d(x, 0.5 * (start + 1) + 1.5 * (start + 0.25))
    torch.testing.assert_close(scm(x), scm.act(F.batch_norm(mixed, None, None, training=True, eps=1e-3)))
    scm(x).square().sum().backward()
    assert scm.balance.s.grad.abs() > 0 and scm.conv.weight.grad.abs().sum() > 0
    model = pico(scm="weights")
    with torch.no_grad():
        model.backbone.steady.conv.weight.add_(1)
    before = model.backbone.steady.average.clone()
    model.follow()
    torch.testing.assert_close(model.backbone.steady.average, before + 0.005)


def test_multi_scale_attention_by_loops():
    attention = MultiScaleAttention(6, groups=2).double()
    x = images((4, 5), channels=6, dtype=torch.float64)
    y = attention(x)
    for image, group in itertools.product(range(2), range(2)):
        part = x[image, 3 * group : 3 * group + 3]
        rows = attention.along(part.mean(2)[None, :, :, None])[0, :, :, 0].sigmoid()
        columns = attention.along(part.mean(1)[None, :, :, None])[0, :, :, 0].sigmoid()
        gated = attention.norm((part * rows[:, :, None] * columns[:, None, :])[None])[0]
        local = attention.local(part[None])[0]
        gate = torch.einsum("c,chw->hw", gated.mean((1, 2)).softmax(0), local)
        gate = gate + torch.einsum("c,chw->hw", local.mean((1, 2)).softmax(0), gated)
        torch.testing.assert_close(y[image, 3 * group : 3 * group + 3], part * gate.sigmoid())


# Replacement Learning.


@pytest.mark.parametrize("scale", ["m", "l"])
def test_blocks_are_found(scale):
    plan = rl.plan(on_meta(scale).backbone, every=3)
    assert len(plan.replaced) >= 2 and plan.level == "block"
    assert all(block.class_name == "Bottleneck" and block.coefficients == 2 for block in plan.replaced)


def test_a_replaced_detector_trains():
    """Of pico's widths, with the depths of m."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCALES, "pico", SCALES["pico"]._replace(depth=0.67))
        model = pico()
    before = parameters(model)
    rl.replace(model.backbone, rl.plan(model.backbone, every=3))
    assert parameters(model) < before
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    rl.check(model, optimizer)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = sum(level.square().mean() for level in model(images((64, 96))))
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


# What is refused.


@pytest.mark.parametrize("size", [(64, 100), (33, 64), (0, 32), (16, 32)])
def test_sizes_that_are_no_multiple_of_32(size):
    with pytest.raises(ValueError, match=r"images: got shape \(1, 3, \d+, \d+\), expected .* multiples of 32"):
        pico()(torch.zeros(1, 3, *size))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"images: got shape \(1, 1, 32, 32\), expected \(B, 3, H, W\)"):
        pico()(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="scale: got 'x', expected one of 'pico', 'n', 's', 'm', 'l'"):
        Detector(scale="x")
    with pytest.raises(ValueError, match="gom: got 'gam', expected one of False, True, 'control'"):
        Detector(gom="gam")
    with pytest.raises(ValueError, match="scm: got 'ema', expected one of 'off', 'feature', 'weights', 'attention'"):
        Detector(scm="ema")
    with pytest.raises(ValueError, match="classes: got 0, expected at least 1"):
        Detector(0)
    with pytest.raises(TypeError, match=r"classes: got 2\.5, expected an integer"):
        Detector(2.5)
    with pytest.raises(ValueError, match="channels, groups: got 128 and 3, expected"):
        pico(gom=True, gom_groups=3)
    with pytest.raises(ValueError, match="groups: got 3, expected a divisor of the 16 channels"):
        MultiScaleAttention(16, groups=3)
    with pytest.raises(ValueError, match="momentum: got 1, expected more than 0 and less than 1"):
        SteadyFeatures(4, momentum=1)
    with pytest.raises(ValueError, match="levels: got 1, expected 3"):
        read_levels([torch.zeros(1, 66, 2, 2)])
    with pytest.raises(ValueError, match="out_channels: got 5, expected an even number"):
        C2f(4, 5, 1)


def test_names():
    assert [type(steady_capture(kind, 8)) for kind in SCMS] == [
        nn.Identity, SteadyFeatures, SteadyWeights, MultiScaleAttention,
    ]  # fmt: skip
    assert Bottleneck(4, 6).conv1.conv.out_channels == 6
