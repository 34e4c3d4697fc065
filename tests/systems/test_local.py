"""Local learning: where models are cut, what each loss reaches, and what the methods are made of."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rl_kernels as rl
from rl_kernels.conversion.zoo import import_timm, import_torchvision
from rl_kernels.systems import local
from rl_kernels.systems.contract import Plain
from rl_kernels.systems.local import METHODS, Method, split
from rl_kernels.systems.local.auxiliary import AuxiliaryNet, deeper_units
from rl_kernels.systems.local.chain import Chain
from rl_kernels.systems.local.cutting import _balanced, costs, cuts
from rl_kernels.systems.local.heads import Pool, contrast, make_head
from rl_kernels.systems.local.network import Judge
from rl_kernels.systems.models import DigitsResNet, DigitsViT, ResidualBlock
from rl_kernels.testing import peak_memory

SHAPE = (6, 1, 12, 12)


def resnet(depths=(2, 2, 2), width=4, classes=7):
    torch.manual_seed(0)
    return DigitsResNet(width, depths, classes)


def batch(shape=SHAPE, classes=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(*shape, generator=generator, dtype=dtype)
    return images, torch.arange(shape[0]) % classes


def cut(method, modules=3, model=None, **options):
    options = {"shape": SHAPE, "head_width": 8, **options}
    return split(resnet() if model is None else model, modules, method=method, **options)


# Where a model is cut.


def sequential():
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * 28 * 28, 5))


def of_torchvision(name):
    return import_torchvision().models.get_model(name, weights=None, num_classes=5)


def of_timm(name, **options):
    return import_timm().create_model(name, num_classes=5, **options)


MODELS = {
    "sequential": (sequential, 3),
    "resnet18": (lambda: of_torchvision("resnet18"), 9),
    "vit": (lambda: import_torchvision().models.VisionTransformer(32, 8, 4, 2, 16, 32, num_classes=5), 5),
    "convnext": (lambda: of_timm("convnext_atto"), 13),
    "timm vit": (lambda: of_timm("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3), 4),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_units_of_a_model_are_the_model(name):
    build, units = MODELS[name]
    model = build().eval()
    chain = Chain(model)
    assert len(chain) == units and chain.has_stem == (name != "sequential")
    x, _ = batch((2, 3, 32, 32))
    y = x
    for index in range(units):
        part = chain.part(index, index + 1)
        assert {id(p) for p in part.parameters()} <= {id(p) for p in model.parameters()}, "a copy"
        y = part(y)
    torch.testing.assert_close(y, model(x))
    torch.testing.assert_close(chain.part(1, units)(chain.part(0, 1)(x)), model(x))
    names = [key for index in range(units) for key in chain.part(index, index + 1).state_dict()]
    assert sorted(names) == sorted(model.state_dict())


class Skipping(nn.Module):
    """Two blocks that a skip around both joins, then two more; and a functional dropout, if wanted."""

    def __init__(self, dropout=False):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(4, 4) for _ in range(4))
        self.dropout = dropout

    def forward(self, x):
        x = F.dropout(x, training=self.training) if self.dropout else x + 0
        y = self.blocks[1](self.blocks[0](x)) + x
        return self.blocks[3](self.blocks[2](y)).mean((2, 3))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(4, 4) for _ in range(3))

    def forward(self, x):
        return self.blocks[0](self.blocks[2](self.blocks[1](self.blocks[0](x)))).mean((2, 3))


def test_what_a_skip_joins_is_one_unit():
    assert [unit.path for unit in Chain(Skipping()).units] == ["", "blocks.1", "blocks.2", "blocks.3"]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.ReLU(), "got ReLU, which has no chain of blocks"),
        (Skipping(dropout=True), r"does not always do the same outside of its blocks \(dropout\), expected modules"),
        (Tied(), "Tied, which runs on blocks.0.conv1.weight in two places"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LSTM(4, 4)), "whose forward cannot be traced|returns"),
    ],
    ids=["no blocks", "dropout", "tied", "not a tensor"],
)
def test_models_that_cannot_be_cut_are_refused(model, said):
    shape = (2, 4) if isinstance(model, nn.Sequential) else (2, 4, 8, 8)
    with pytest.raises(ValueError, match=said):
        split(model, 2, shape=shape)


def test_no_more_modules_than_units():
    with pytest.raises(ValueError, match=r"modules: got 8, expected at least 1 and at most 7, of which .*: what"):
        cut("dgl", 8)
    with pytest.raises(ValueError, match=r"shape: got \(6, 3, 12, 12\), which DigitsResNet cannot take"):
        cut("dgl", 2, shape=(6, 3, 12, 12))


def test_even_blocks_are_the_public_tables():
    """Of ResNet-32: [2,1]; [1,2] [2,1] [3,0]; [1,0] ... [3,2]; every block (InfoPro), the stem with one (MLAAN)."""
    chain = Chain(resnet((5, 5, 5)))
    found = {count: cuts(chain, count, "blocks", [])[1:-1] for count in (1, 2, 4, 8, 15, 16)}
    assert found[1] == [] and found[2] == [8] and found[4] == [4, 8, 12] and found[8] == [2, 4, 6, 8, 10, 12, 14]
    assert found[15] == list(range(2, 16)) and found[16] == list(range(1, 16))


def heaviest(weights, cut_at):
    return max(sum(weights[first:end]) for first, end in itertools.pairwise(cut_at))


def test_even_costs_are_the_best():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        size = int(torch.randint(1, 8, (), generator=generator))
        weights = torch.randint(0, 9, (size,), generator=generator).tolist()
        for count in range(1, size + 1):
            all_cuts = ([0, *inner, size] for inner in itertools.combinations(range(1, size), count - 1))
            found = _balanced(weights, count)
            assert sorted(set(found)) == found
            assert heaviest(weights, found) == min(heaviest(weights, each) for each in all_cuts)


def test_costs_are_those_of_the_model():
    model = resnet()
    found = costs(Chain(model), SHAPE)
    assert [cost.returns[1] for cost in found] == [4, 4, 4, 8, 8, 16, 7]
    assert found[-1].shape == (6, 16, 3, 3)
    convolution = 2 * 6 * 12 * 12 * 9
    assert found[0].flops == convolution * 1 * 4 and found[1].flops == 2 * convolution * 4 * 4
    maps = 4 * 6 * 4 * 12 * 12
    assert 4 * maps <= found[1].saved_bytes < 4.1 * maps, "of two convolutions and two activations; statistics"
    assert not any(parameter.is_meta for parameter in model.parameters())


# What a loss reaches.


class Watching(Plain):
    """Notes which parameters each backward reaches."""

    def __init__(self, net):
        self.names = {id(parameter): name for name, parameter in net.named_parameters()}
        self.parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self.reached = []

    def backward(self, loss):
        loss.backward()
        moved = (p for p in self.parameters if p.grad is not None and bool((p.grad != 0).any()))
        self.reached.append({self.names[id(p)] for p in moved})
        for parameter in self.parameters:
            parameter.grad = None


def holders(net, names):
    """Modules by number, and judges by name, that hold parameters."""
    module_of = {}
    for index, part in enumerate(net.pieces()[: net.modules_count]):
        module_of |= {f"model.{name}": index for name, _ in part.named_parameters()}
    return {module_of.get(name, ".".join(name.split(".")[:2])) for name in names}


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].end_to_end])
@pytest.mark.parametrize("first", [False, True])
def test_a_loss_reaches_its_span_and_no_more(name, first):
    net = cut(name, 4, supervise_first=first)
    watching = Watching(net)
    net.step(*batch(), engine=watching)
    span, alone = METHODS[name].span, METHODS[name].independent
    expected = []
    for index in range(4):
        reached = set()
        if index >= span - 1:
            reached |= {*range(index - span + 1, index + 1)} | ({f"judges.{index}"} if index < 3 else set())
        if alone and (index >= span - 1 or first):
            reached |= {index} | ({f"heads.{index}"} if index < 3 else set())
        expected += [reached] if reached else []
    assert [holders(net, names) for names in watching.reached] == expected


@pytest.mark.parametrize("name", METHODS)
def test_all_that_is_trained_learns(name):
    net = cut(name, 3)
    net.step(*batch())
    missing = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert not any(
        p.requires_grad for module in net.modules() for p in getattr(module, "average", nn.Module()).parameters()
    )


class Summing(Plain):
    def __init__(self):
        self.losses = []

    def backward(self, loss):
        self.losses.append(loss)


@pytest.mark.parametrize("name", ["dgl", "mlaan", "infopro-contrast"])
def test_one_backward_a_module_is_the_backward_of_the_sum(name):
    one, other = (cut(name, 4).double() for _ in range(2))
    other.load_state_dict(one.state_dict())
    images, targets = batch(dtype=torch.float64)
    one.step(images, targets)
    summing = Summing()
    other.step(images, targets, engine=summing)
    torch.stack(summing.losses).sum().backward()
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_one_module_is_back_propagation_whatever_the_method():
    images, targets = batch()
    plain = resnet()
    F.cross_entropy(plain(images), targets, label_smoothing=0.1).backward()
    for name in METHODS:
        net = cut(name, 1)
        assert not net.heads and not net.judges
        net.step(images, targets, smoothing=0.1)
        for mine, theirs in zip(net.model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)


def test_checkpointing_changes_nothing():
    """Neither gradients, nor what norms remember of the batch."""
    images, targets = batch()
    plain = resnet()
    F.cross_entropy(plain(images), targets).backward()
    net = cut("checkpointing", 4)
    net.step(images, targets)
    for mine, theirs in zip(net.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    for key, value in plain.state_dict().items():
        assert torch.equal(net.model.state_dict()[key], value), key


def test_modules_take_less_memory_than_the_whole():
    images, targets = batch((16, 1, 24, 24))
    peaks = []
    for modules in (1, 2, 4, 8):
        net = cut("greedy", modules, resnet((8, 0, 0), 8), shape=(2, 1, 24, 24))
        net.step(images, targets)
        peaks.append(peak_memory(lambda net=net: net.step(images, targets), "cpu"))
    assert all(more > 1.3 * less for more, less in itertools.pairwise(peaks)), peaks
    net = cut("checkpointing", 4, resnet((8, 0, 0), 8), shape=(2, 1, 24, 24))
    assert peak_memory(lambda: net.step(images, targets), "cpu") < 0.7 * peaks[0]


# What the methods are made of.


@pytest.mark.parametrize("statistics", ["own", "copied"])
def test_every_average_follows_its_block(statistics):
    """All of them: public code moves the last one only."""
    net = cut("mlaan", 4, momentum=0.9, statistics=statistics)
    followers = [module for module in net.modules() if isinstance(module, AuxiliaryNet)]
    assert len(followers) == 2
    before = [copy.deepcopy(each.average.state_dict()) for each in followers]
    with torch.no_grad():
        for parameter in net.model.parameters():
            parameter.add_(torch.randn_like(parameter))
        for buffer in net.model.buffers():
            buffer.add_(3)
    net.follow()
    own = net.model.state_dict()
    for each, was in zip(followers, before, strict=True):
        for key, now in each.average.state_dict().items():
            if "running" in key or "num_batches" in key:
                moved = statistics == "copied"
                assert torch.equal(now, was[key]) != moved, key
            else:
                torch.testing.assert_close(now, 0.9 * was[key] + 0.1 * own[key], rtol=1e-5, atol=1e-6)


def test_the_average_of_a_replaced_block_follows_what_it_computes():
    model = resnet((6,))
    rl.replace(model, rl.plan(model, every=3))
    net = cut("man", 3, model, momentum=0.0)
    follower = net.judges["0"].auxiliary
    assert isinstance(model.blocks[2].conv1, rl.nn.ReplacementConv2d)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    net.follow()
    assert torch.equal(dict(follower.average.named_parameters())["blocks.2.conv1.weight"], model.blocks[2].conv1.weight)


def test_copies_leap_to_the_end():
    found = costs(Chain(resnet((5, 5, 5))), SHAPE)
    # Units: 0 the stem, then three times five blocks. Tables of public code: [2,0] [3,0] [3,2] [3,4], ...
    assert [deeper_units(found, after, 4) for after in (1, 5, 6, 10, 12, 14)] == [
        [6, 11, 13, 15], [6, 11, 13, 15], [11, 13, 14, 15], [11, 13, 14, 15], [13, 14, 15], [15],
    ]  # fmt: skip
    assert (
        deeper_units(found, 1, 1) == [2] and deeper_units(found, 1, 2) == [6, 11] and deeper_units(found, 15, 4) == []
    )


@pytest.mark.parametrize("mixing", ["sum", "scaled", "weights"])
def test_a_copy_and_an_average_are_mixed(mixing):
    net = cut(Method(copies=1, mixing=mixing), 2).double().eval()
    auxiliary = net.judges["0"].auxiliary
    first, average = auxiliary.copies[0], auxiliary.average
    with torch.no_grad():
        for tensor in (*first.parameters(), *average.parameters()):
            tensor.add_(0.1 * torch.randn_like(tensor))
        if auxiliary.balance is not None:
            auxiliary.balance.s.fill_(0.7)
    x = torch.randn(2, *costs(Chain(resnet()), SHAPE)[3].shape[1:], dtype=torch.float64)
    if mixing == "weights":
        mixed = copy.deepcopy(first)
        with torch.no_grad():
            for one, a, e in zip(mixed.parameters(), first.parameters(), average.parameters(), strict=True):
                one.copy_(0.7 * a + 1.3 * e)
        expected = mixed(x)
    else:
        s, rest = (1.0, 1.0) if mixing == "sum" else (0.7, 1.3)
        expected = s * first(x) + rest * average(x)
    torch.testing.assert_close(auxiliary(x), expected)
    auxiliary.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in first.parameters()) and all(p.grad is None for p in average.parameters())
    if auxiliary.balance is not None:
        assert auxiliary.balance.s.grad.abs() > 0


def test_weights_are_mixed_without_a_tensor_of_them():
    """A gain of memory of this package's own: the block costs what a plain one costs."""
    net = cut(Method(copies=1, mixing="weights"), 2, resnet((4,), 64), shape=(2, 1, 4, 4))
    auxiliary = net.judges["0"].auxiliary
    x = torch.randn(2, 64, 4, 4)
    with torch.no_grad():
        auxiliary(x), auxiliary.copies[0](x)
        both = [peak_memory(lambda unit=unit: unit(x), "cpu") for unit in (auxiliary, auxiliary.copies[0])]
    assert both[0] < both[1] + 64 * 64 * 9 * 4, "a mixed weight was made"


def test_what_cannot_be_mixed_is_named():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.PReLU()) for _ in range(4)), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"mixing: got 'weights' with a layer that cannot be mixed, .*PReLU"):
        split(model, 2, shape=(2, 4), method=Method(copies=1, mixing="weights"))


def test_the_model_stays_the_model():
    """It has no auxiliary parameter, it is what the network computes, and it loads where a plain one does."""
    images, targets = batch()
    net = cut("mlaan", 4)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(2):
        net.step(images, targets)
        optimizer.step()
        optimizer.zero_grad()
        net.follow()
    plain = resnet()
    assert net.model.state_dict().keys() == plain.state_dict().keys() and net.auxiliary_parameters() > 0
    plain.load_state_dict(net.model.state_dict())
    net.eval(), plain.eval()
    assert torch.equal(net(images), plain(images)) and torch.equal(net(images), net.model(images))
    twin = copy.deepcopy(net)
    assert torch.equal(twin(images), net(images))
    with torch.no_grad():
        twin.model.head.bias.add_(1)
    assert not torch.equal(twin(images), net(images)), "a copy runs on the copied model's layers"


def test_heads_have_the_classes_of_the_model():
    for name in ("greedy", "dgl", "infopro-softmax", "man", "mlaan"):
        net = cut(name, 3, resnet(classes=23))
        for judge in (*net.heads.values(), *net.judges.values()):
            assert judge.head[-1].out_features == 23


@pytest.mark.parametrize("name", ["linear", "dgl", "infopro"])
@pytest.mark.parametrize("shape", [(4, 8, 6, 5), (4, 9, 8), (4, 8)], ids=["images", "tokens", "vectors"])
def test_heads_take_what_modules_return(name, shape):
    head = make_head(name, shape, 5, last=(4, 16, 3, 3), width=8, first_token=True)
    assert head(torch.randn(shape)).shape == (4, 5)


def test_tokens_are_judged_by_the_class_token():
    net = split(DigitsViT(dim=8, heads=2, depth=3), 3, shape=(2, 1, 8, 8), method="greedy")
    assert net.first_token and [m.first_token for m in net.modules() if isinstance(m, Pool)] == [True, True]
    tokens = torch.randn(2, 5, 3)
    assert torch.equal(Pool(True)(tokens), tokens[:, 0]) and torch.equal(Pool(False)(tokens), tokens.mean(1))
    net.step(*batch((6, 1, 8, 8)))
    with pytest.raises(ValueError, match=r"method: got reconstruction with outputs of shape \(2, 17, 8\) of module 0"):
        split(DigitsViT(dim=8, heads=2, depth=3), 3, shape=(2, 1, 8, 8), method="infopro-softmax")


def test_contrast_is_the_paper_s_sum():
    features, targets = torch.randn(7, 5, dtype=torch.float64), torch.tensor([0, 1, 0, 2, 1, 0, 3])
    unit = F.normalize(features.float(), dim=1)
    terms = []
    for i in range(7):
        alike = [p for p in range(7) if p != i and targets[p] == targets[i]]
        if alike:
            others = [a for a in range(7) if a != i]
            log_sum = torch.logsumexp(torch.stack([unit[i] @ unit[a] / 0.07 for a in others]), 0)
            terms.append(-sum(unit[i] @ unit[p] / 0.07 - log_sum for p in alike) / len(alike))
    torch.testing.assert_close(contrast(features, targets), torch.stack(terms).mean())
    lonely = torch.randn(3, 4, requires_grad=True)
    contrast(lonely, torch.arange(3)).backward()
    assert torch.equal(lonely.grad, torch.zeros(3, 4)), "no pair: nothing to learn, and no NaN"


def test_infopro_s_weights_lie_in_line_and_pixels_come_back():
    net = cut("infopro-softmax", 4)
    assert [net.method.weights(index, 3) for index in range(3)] == [(6.0, 0.0), (3.5, 1.0), (1.0, 2.0)]
    assert net.method.weights(0, 1) == (6.0, 0.0)
    images, targets = batch()
    net.read_pixels((0.3,), (0.2,))
    caught = []
    handle = F.binary_cross_entropy_with_logits

    def watch(logits, pixels):
        caught.append((logits.shape, pixels))
        return handle(logits, pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "binary_cross_entropy_with_logits", watch)
        net.step(images, targets)
    assert len(caught) == 3
    for shape, pixels in caught:
        assert shape == images.shape
        torch.testing.assert_close(pixels, (images * 0.2 + 0.3).clamp(0, 1))


def test_patches_are_judged_apart():
    judge = Judge(None, make_head("linear", (2, 4, 6, 8), 5, last=(2, 4, 6, 8), width=8, first_token=False), None, 2)
    x = torch.randn(2, 4, 6, 8)
    cells = [x[:, :, a : a + 3, b : b + 4] for a in (0, 3) for b in (0, 4)]
    torch.testing.assert_close(judge(x).scores, torch.stack([judge.head(cell) for cell in cells]).mean(0))


# With replaced layers.


def test_replaced_layers_keep_modules_apart():
    def replaced():
        model = resnet((6,))
        rl.replace(model, rl.plan(model, every=3))
        return model

    with pytest.raises(ValueError, match=r"modules 1 and 0 that are not apart: blocks.2.conv1 runs on blocks.1.conv1"):
        cut("dgl", 3, replaced(), foreign="refuse")
    model = replaced()
    net = cut("dgl", 3, model)
    assert model.blocks[2].conv1.detach == (0,)
    watching = Watching(net)
    net.step(*batch(), engine=watching)
    assert [holders(net, names) for names in watching.reached] == [{0, "judges.0"}, {1, "judges.1"}, {2}]
    assert any("mixing" in name for name in watching.reached[1]), "its coefficients learn"
    inside = cut("dgl", 2, replaced())
    assert inside.model.blocks[2].conv1.detach == (1,), "blocks 0 to 2 are one module, block 3 is of the next"


# Bad input.


def test_what_cannot_be_is_said():
    net = cut("mlaan", 3)
    images, targets = batch()
    with pytest.raises(ValueError, match="images: got a batch of 1, expected at least 2"):
        net.step(images[:1], targets[:1])
    with pytest.raises(ValueError, match="targets: got probabilities with a contrastive loss"):
        cut("infopro-contrast").step(images, torch.full((6, 7), 1 / 7))
    for options, said in (
        ({"method": "mlan"}, "method: got 'mlan', expected one of"),
        ({"cut": "time"}, "cut: got 'time', expected one of"),
        ({"modules": 0}, "modules: got 0"),
        ({"momentum": 2.0}, "momentum: got 2.0"),
        ({"patches": 0}, "patches: got 0"),
        ({"shape": (1, 1, 12, 12)}, r"shape: got \(1, 1, 12, 12\), expected that of a batch of at least two"),
    ):
        with pytest.raises(ValueError, match=said):
            cut(**{"method": "dgl", **options})
    with pytest.raises(TypeError, match=r"model: got str, expected an nn.Module"):
        split("resnet32", 2, shape=SHAPE)
    assert set(local.__all__) == {"METHODS", "LocalNetwork", "Method", "split"}


class Flaky(nn.Module):
    """Six blocks, of which chance skips some, or before which training does something of its own."""

    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(4, 4) for _ in range(6))
        self.kind = kind

    def forward(self, x):
        if self.kind == "noise" and self.training:
            x = x + torch.randn_like(x)
        for block in self.blocks:
            if self.kind == "depth" and torch.rand(()) < 0.5:
                continue
            x = block(x)
        y = x.mean((2, 3))
        return {"dict": {"logits": y}, "tuple": (y, None)}.get(self.kind, y)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("noise", r"does not always do the same outside of its blocks \(randn_like\)"),
        ("depth", r"does not always do the same outside of its blocks"),
        ("dict", "whose forward returns a .*dict, expected one tensor"),
        ("tuple", "whose forward returns a .*tuple, expected one tensor"),
    ],
)
def test_what_a_chain_would_freeze_is_refused(kind, said):
    model = Flaky(kind).train()
    model.blocks[1].eval()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=said):
        split(model, 2, shape=(2, 4, 8, 8))
    assert model.training and not model.blocks[1].training and model.blocks[2].conv1.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["dgl", "infopro-softmax", "mlaan"])
def test_heads_follow_the_model_s_dtype_and_device(name):
    net = cut(name, 3, resnet().double())
    images, targets = batch(dtype=torch.float64)
    net.step(images, targets)
    assert {tensor.dtype for tensor in net.parameters()} == {torch.float64}
    assert all(tensor.is_meta for tensor in cut(name, 3, resnet().to("meta")).parameters())


def test_frozen_modules_do_not_learn_and_others_do():
    net = cut("dgl", 3)
    for module in (net.model.blocks[4], net.model.blocks[5], net.model.head):
        module.requires_grad_(False)
    net.step(*batch())
    assert net.model.stem[0].weight.grad is not None and net.model.head.weight.grad is None
    with pytest.raises(ValueError, match="nothing requires a gradient"):
        cut("dgl", 3).requires_grad_(False).step(*batch())


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"mixing": "max"}, ValueError, "method.mixing: got 'max'"),
        ({"head": "deep"}, ValueError, "method.head: got 'deep'"),
        ({"span": 0}, ValueError, "method.span: got 0, expected at least 1"),
        ({"span": "2"}, TypeError, "method.span: got '2', expected an integer"),
        ({"copies": 1.5}, TypeError, "method.copies: got 1.5"),
        ({"reconstruction": 5}, ValueError, "method.reconstruction: got 5, expected two numbers"),
        ({"recognition": (1,)}, ValueError, r"method.recognition: got \(1,\), expected two numbers"),
        ({"independent_weight": -1}, ValueError, "method.independent_weight: got -1"),
        ({"checkpoint": True}, ValueError, "method.checkpoint: got True without end_to_end"),
    ],
)
def test_a_method_that_cannot_be_is_refused(options, error, said):
    with pytest.raises(error, match=said):
        Method(**options)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"modules": "4"}, TypeError, "modules: got '4', expected an integer"),
        ({"modules": True}, TypeError, "modules: got True"),
        ({"patches": 1.5}, TypeError, "patches: got 1.5"),
        ({"patches": 50}, ValueError, r"method: module 1 returns \(6, 8, 6, 6\), .* cannot take, with patches=50"),
        ({"momentum": "a"}, ValueError, "momentum: got 'a'"),
        ({"momentum": 1.0}, ValueError, "momentum: got 1.0"),
        ({"supervise_first": "yes"}, TypeError, "supervise_first: got 'yes'"),
        ({"shape": 32}, ValueError, "shape: got 32, expected that of a batch"),
        ({"shape": (2, 3, -1, 32)}, ValueError, "shape: got"),
        ({"shape": "2332"}, ValueError, "shape: got"),
    ],
)
def test_options_of_another_kind_are_refused(options, error, said):
    with pytest.raises(error, match=said):
        cut("mlaan", **{"modules": 3, **options})


def test_what_a_step_is_given_is_looked_at():
    net = cut("infopro-softmax", 3)
    images, targets = batch()
    with pytest.raises(TypeError, match=r"targets: got torch.int32, expected a tensor of int64 labels"):
        net.step(images, targets.int())
    with pytest.raises(TypeError, match="targets: got list"):
        net.step(images, targets.tolist())
    with pytest.raises(ValueError, match=r"images: got shape \(6, 1, 8, 8\), expected \(1, 12, 12\) each"):
        net.step(images[:, :, :8, :8], targets)
    with pytest.raises(ValueError, match=r"mean: got 2 numbers, expected 1"):
        net.read_pixels((0.1, 0.2), (1.0, 1.0))
    with pytest.raises(ValueError, match=r"std: got \[0.0\], expected positive"):
        net.read_pixels((0.1,), (0.0,))
    with pytest.raises(ValueError, match=r"pieces: got 0, expected 5"):
        net.wrap([])
    net.eval().step(images[:1], targets[:1])
    assert "modules: stem to blocks.1, blocks.2 to blocks.3, blocks.4 to blocks.5" in repr(net)
