"""Which blocks of a model are replaced, by which neighbours, and why others are not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, cast, get_args

from torch import nn

from rl_kernels.conversion.blocks import check_plain, count
from rl_kernels.conversion.grouping import Granularity
from rl_kernels.conversion.memory import STATES, Optimizer, buffer_bytes, bytes_of, format_bytes, parse_bytes
from rl_kernels.conversion.options import Boundaries, Level, Norms, Options, Share, at_least, one_of
from rl_kernels.conversion.plans import Plan
from rl_kernels.conversion.targets import Target, Targets
from rl_kernels.conversion.walk import find, siblings, stages, summary, walk
from rl_kernels.nn.coefficients import Constraint, Init


def plan(
    model: nn.Module,
    every: int | None = None,
    *,
    targets: Target | Sequence[Target] | None = None,
    offset: int | None = None,
    strict: bool = False,
    level: Level = "auto",
    init: Init = None,
    constraint: Constraint = "free",
    granularity: Granularity = "scalar",
    detach: Collection[int] = (),
    share: Share | None = None,
    norms: Norms = "mixed",
    window: int = 1,
    boundaries: Boundaries = "skipped",
    budget: int | str | None = None,
    optimizer: Optimizer = "adamw",
) -> Plan:
    """Plan which blocks of ``model`` run on a mix of their neighbours' weights (Replacement Learning,
    arXiv 2410.01239). The model stays as it is.

    A block is a child of a container (``nn.Sequential``, ``nn.ModuleList``) that holds two adjacent children of one
    class and equal parameter shapes, or children of a class that forms blocks elsewhere in the model; or one of three
    or more alike in an ``nn.ModuleDict``, or under numbered names (``block0``, ``block1``, ...) in any module. Blocks
    are walked in order over the whole model. A replacement falls due ``every`` blocks after the last one, and goes to
    the first block from there on that can be replaced: whose previous and next block in the same container have, for
    what is to be replaced, equal shapes, and are kept themselves. A layer that several blocks share stays.

    The defaults are the paper's rule, where it says. Its successor RepL (arXiv 2605.19533) transforms the neighbours'
    parameters more freely; its equations could not be read. So ``granularity``, ``window`` and ``boundaries`` are
    options of this package, and none of their values is claimed to be RepL's.

    Args:
        model: on any device, the meta device included.
        every: at least 2, as the neighbours of a replaced block are kept; 4 by default.
        targets: narrows what is replaced in a block (the paper's ViT: attention only). One or several of:
            ``"attention"`` (``nn.MultiheadAttention``, and the linear layers of modules called so), ``"mlp"`` (linear
            layers outside attention, and the layers of modules called so), ``"conv"``, ``"linear"``, ``"norm"``; a
            class of layers, or of modules that hold them; a function of a layer's path and the layer. None for every
            layer that can be replaced. Only what is replaced needs neighbours of its shape. A layer without a kernel
            of this package runs by its class's own forward (``rl_kernels.nn.ReplacementByForward``), which stores a
            mixed matrix: norms do so, and subclasses of torch's layers, and others where their class is a target.
        offset: number of the block, counted from 1, at which the first replacement falls due; ``every`` by default.
        strict: a block that is due and cannot be replaced is skipped, and the next falls due ``every`` blocks later.
        level: ``"block"``; ``"layer"``: every linear, convolution and attention layer that is a target counts as a
            block, its neighbours being the previous and the next of its class and kernel size in the order in which
            the model registers them; ``"auto"``: the layers where no block has neighbours of its shape, but for those
            whose neighbour stands beside them in one module, as a key beside a query, and not in a sequence or under a
            numbered name (``conv1``, ``conv2``).
        init: initial coefficients, as ``rl_kernels.nn.ReplacementLayer`` has them: None, two numbers (of the previous
            and the next), or ``"fit"``.
        constraint: ``"free"`` or ``"convex"``, as there.
        granularity: ``"scalar"``, as in the paper. Beyond it, by layer: ``"projection"``, a pair for each of an
            attention's projections, of query, key, value and output, also where one linear layer holds three of them;
            ``"head"``, a pair for each head in them, where a module says how many there are; ``"channel"``, a pair for
            each output channel. Layers that have no such groups have one pair each.
        detach: 0 or 1 or both: the neighbours (the previous, the next) that get no gradient from replaced blocks.
        share: ``"block"``: one pair of coefficients for a replaced block, as in the paper; ``"layer"``: one for each
            of its layers, as fc1 and fc2. None for ``"block"``, or ``"layer"`` where the granularity is not
            ``"scalar"``.
        norms: ``"mixed"``: the affine parameters of a replaced block's norms are mixed too, unless ``targets`` leaves
            them out; ``"own"``: they stay as they are. The paper does not say.
        window: how many neighbours on each side are mixed: 1, as in the paper. Beyond it, with 2 the previous and the
            next come first, then those at distance 2. These are left out where the container ends, where shapes
            differ, and where they are replaced; the plan lists a block's sources. The near two start at 0.5 each and
            the others at 0 (all alike where they are convex): the mix starts with the mean and the variance, and norms
            with the gain, of the paper's two sources. ``init`` takes ``2 * window`` numbers in this order, and
            ``detach`` their indices; the number of what is left out goes with it, and convex ones are scaled to the
            sum 1. A block that another is mixed from is not replaced.
        boundaries: ``"skipped"``: a block whose neighbours have other sizes stays, as the first of a stage. Beyond the
            paper, ``"blocks"``: stages whose names differ in one number follow one another (``layer1``, ``layer2``),
            and linear layers and convolutions whose sizes are multiples of one another are mixed. A larger neighbour is
            cut into blocks of the layer's shape, each a source with a coefficient, a smaller one is repeated: see
            ``rl_kernels.nn.SourceView``. What a neighbour lacks or has in another kernel size, depthwise or not, or
            ratio stays the block's own, norms of another length too; the plan says why. Each layer of such a block has
            coefficients of its own, whatever ``share`` says, and none of neighbours at a distance of more than 1. A
            neighbour's number (0.5, or of ``init``) is divided by the root of how many of its blocks are added in an
            output channel and of how often an input is repeated: the output starts with the variance that
            it has where sizes are equal, for weights that are initialised by their number of inputs.
        budget: instead of ``every``, the memory for training: an integer of bytes, or text such as ``"1.5 GiB"`` or
            ``"800 MB"``. Chosen is the largest ``every``, so the fewest replacements, with which parameters, gradients
            and the state of ``optimizer`` fit into it; a model that fits as it is gets these, too. Activations come on
            top: they are not counted, and replacement leaves them as they are.
        optimizer: whose state is counted, here and where the plan prints memory: ``"adamw"``, ``"adam"``, ``"sgd"`` or
            ``"sgd-momentum"``.

    Returns:
        The plan, for ``replace``. It also names what was due and skipped, and what stays a replaced block's own.

    Raises:
        ValueError: an argument out of its range, a model that holds replaced layers already, or one in which nothing
            can be replaced; or a budget that is too small for any ``every``. The message names the argument.
        TypeError: an argument of another type.
    """
    check_plain(model)
    limit = None if budget is None else parse_bytes("budget", budget)
    if limit is not None and every is not None:
        raise ValueError(f"budget: got {budget!r} with every={every}, expected one of the two")
    at_least("every", 4 if every is None else every, 2)
    if offset is not None:
        at_least("offset", offset, 1)
    one_of("level", level, get_args(Level))
    one_of("optimizer", optimizer, STATES)
    options = Options(cast(Any, init), constraint, granularity, cast(Any, detach), share, norms, window, boundaries)
    chosen = Targets(targets, norms, granularity)

    walked, slots = find(model, chosen, level, options)
    parameter_bytes, trainable_bytes = bytes_of(model.parameters())
    parameters, buffers, containers = count(model), buffer_bytes(model), stages(slots)

    def planned(every: int) -> Plan:
        first = every if offset is None else offset
        replaced, skipped = walk(slots, every, first, strict, options)
        return Plan(
            model=type(model).__name__,
            every=every,
            offset=first,
            strict=bool(strict),
            targets=chosen.labels,
            options=options,
            level=walked,
            fell_back=level == "auto" and walked == "layer",
            stages=containers,
            replaced=tuple(replaced),
            skipped=tuple(skipped),
            parameters=parameters,
            parameter_bytes=parameter_bytes,
            trainable_bytes=trainable_bytes,
            buffer_bytes=buffers,
            optimizer=optimizer,
            siblings=siblings(slots, replaced),
        )

    name = "every" if offset is None else "offset"
    if limit is not None:
        return _fitting(planned, range(len(slots), 1, -1), limit, budget, name)
    return _checked(planned(4 if every is None else every), name)


def _checked(made: Plan, name: str) -> Plan:
    """``made``, if it replaces anything; ``name`` is the argument that says where the first falls due."""
    if made.offset > made.blocks:
        expected = f"expected at most {made.blocks}, the number of {made.level}s in the model"
        raise ValueError(f"{name}: got {made.offset}, {expected}")
    if not made.replaced:
        raise ValueError(f"{name}: got {made.offset}, but nothing due can be replaced: {summary(made.skipped)}")
    return made


def _fitting(planned: Callable[[int], Plan], choices: Iterable[int], limit: int, budget: object, name: str) -> Plan:
    """The first of the plans for these ``every`` that replaces something and fits into ``limit`` bytes."""
    least: tuple[int, Plan] | None = None
    for every in choices:
        made = planned(every)
        if not made.replaced:
            continue
        size = made.memory().after.training
        if size <= limit:
            return made
        if least is None or size < least[0]:
            least = size, made
    if least is None:
        return _checked(planned(2), name)
    size, made = least
    raise ValueError(
        f"budget: got {budget!r}, expected at least {size} ({format_bytes(size)}): what parameters, gradients and the "
        f"state of {made.optimizer} take with every={made.every}"
    )
