"""How the Triton kernels' products are cut: pure functions of sizes and device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from rl_kernels.backends.gpu import heuristics, tuner
from rl_kernels.backends.gpu.heuristics import (
    A100,
    ADA,
    H100,
    Choice,
    Config,
    Device,
    Work,
    choose,
    estimate,
    use_config,
)
from rl_kernels.backends.triton.configs import (
    FLOAT32_CONFIGS,
    PRODUCT_CONFIGS,
    RESIDENT_CONFIGS,
    WGRAD_CONFIGS,
    choose_resident,
    resident_bytes,
)

DEVICES = (A100, ADA, H100)
SIZES = (0, 1, 7, 64, 257, 1000, 4096, 16384)


def forward(tokens: int, out_features: int, in_features: int) -> Work:
    """Two bfloat16 sources."""
    return Work(out_features, tokens, in_features, 4, 2, 2, 1.0)


def wgrad(tokens: int, out_features: int, in_features: int) -> Work:
    return Work(out_features, in_features, tokens, 2, 2, 0, 1.0)


def waves(work: Work, choice: Choice, device: Device) -> float:
    tiles = math.ceil(work.rows / choice.config.rows) * math.ceil(work.columns / choice.config.columns)
    return tiles * choice.splits / device.multiprocessors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("configs", [PRODUCT_CONFIGS, WGRAD_CONFIGS, FLOAT32_CONFIGS])
def test_every_choice_is_sound(configs: tuple[Config, ...], device: Device) -> None:
    """It fits the shared memory, its splits cover the sum without an empty one, and its partial sums are bounded."""
    for rows, columns, depth in itertools.product(SIZES, repeat=3):
        work = Work(rows, columns, depth, 4, 2, 2, 1.0)
        config, splits, steps = choose(work, configs, device)
        assert heuristics.shared_bytes(work, config) <= device.shared_bytes
        blocks = math.ceil(depth / config.depth)
        assert splits * steps >= blocks > (splits - 1) * steps or depth == 0
        assert splits == 1 or 4 * splits * rows * columns <= heuristics.WORKSPACE_BYTES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("configs", [PRODUCT_CONFIGS, FLOAT32_CONFIGS])
def test_outer_coefficients_fit_as_well(configs: tuple[Config, ...], device: Device) -> None:
    """Whatever the sources and the rank: where no configuration has room for them, a smaller one."""
    for (sources, rank), size in itertools.product(((1, 1), (1, 64), (4, 16), (8, 8)), (2, 4)):
        for rows, columns in itertools.product((1, 64, 4096), repeat=2):
            work = Work(rows, columns, 4096, size * sources, size, size, 1.0, terms=sources * rank)
            config, *_ = choose(work, configs, device)
            assert heuristics.shared_bytes(work, config) <= device.shared_bytes
            # What lies along both sides of a tile, in float32.
            without = heuristics.shared_bytes(work._replace(terms=0), config)
            side = 4 * sources * rank * (config.rows + config.depth)
            assert heuristics.shared_bytes(work, config) == without + config.stages * side


def test_large_products_take_the_large_tile() -> None:
    """Which reads the least through shared memory."""
    for work in (forward(8192, 4096, 4096), forward(16384, 8192, 8192)):
        choice = choose(work, PRODUCT_CONFIGS, H100)
        assert choice.config.rows * choice.config.columns == 128 * 256 and choice.splits == 1


def test_few_tokens_take_a_narrow_tile_and_read_every_source_once() -> None:
    """With enough programs for the whole device: a product of few tokens is bound by reading the sources."""
    for tokens in (1, 8, 16):
        for size in (1024, 4096):
            work = forward(tokens, size, size)
            choice = choose(work, PRODUCT_CONFIGS, H100)
            assert choice.config.columns == 16
            assert waves(work, choice, H100) >= 0.9
    for tokens, size in itertools.product((32, 64), (256, 1024, 4096)):
        assert choose(forward(tokens, size, size), PRODUCT_CONFIGS, H100).config.columns >= tokens


def test_a_long_sum_of_few_tiles_is_split() -> None:
    """And one that fills the device is not."""
    small = wgrad(65536, 256, 256)
    assert waves(small, choose(small, WGRAD_CONFIGS, H100), H100) >= 0.5
    assert choose(small, WGRAD_CONFIGS, H100).splits > 1
    assert choose(wgrad(4096, 8192, 8192), WGRAD_CONFIGS, H100).splits == 1
    assert choose(small._replace(max_splits=1), WGRAD_CONFIGS, H100).splits == 1


def test_taps_and_repeats_count() -> None:
    """A convolution's taps lengthen the sum, its groups fill the device."""
    tile = Work(256, 196, 256, 4, 2, 2, 1.0, taps=9)
    assert choose(tile, PRODUCT_CONFIGS, H100).splits > 1
    config = PRODUCT_CONFIGS[4]
    assert estimate(tile, config, 1, H100) > 5 * estimate(tile._replace(taps=1), config, 1, H100)
    assert choose(tile._replace(repeats=512), PRODUCT_CONFIGS, H100).splits == 1


def test_a_configuration_is_no_deeper_than_the_sum() -> None:
    assert choose(forward(4096, 64, 3), PRODUCT_CONFIGS, H100).config.depth == heuristics.MIN_DEPTH
    with use_config(PRODUCT_CONFIGS[0], 8):
        assert choose(forward(4096, 64, 24), PRODUCT_CONFIGS, H100).config.depth == 32


def test_a_forced_configuration_is_taken() -> None:
    """Empty splits aside; and no longer afterwards."""
    with use_config(WGRAD_CONFIGS[3], 8):
        assert choose(wgrad(256, 999, 999), WGRAD_CONFIGS, H100) == (WGRAD_CONFIGS[3], 4, 1)
        assert choose_resident(forward(10**6, 16, 16), H100) is None
    assert choose(wgrad(256, 999, 999), WGRAD_CONFIGS, H100).config != WGRAD_CONFIGS[3]


def test_a_filter_stays_on_chip_where_it_fits_and_pays() -> None:
    work = Work(16, 128 * 32 * 32, 16, 4, 2, 2, 1.0, taps=9)
    for device, channels in itertools.product((A100, H100), (16, 32, 64)):
        found = choose_resident(work._replace(rows=channels, depth=channels), device)
        assert found is not None
        config, programs = found
        assert config.rows == channels and config in RESIDENT_CONFIGS
        assert resident_bytes(work, config, device) <= device.shared_bytes
        assert programs >= device.multiprocessors
    assert choose_resident(work._replace(rows=64, depth=64), ADA) is None, "too much shared memory"
    assert choose_resident(work._replace(rows=65), H100) is None
    assert choose_resident(work._replace(taps=25), H100) is None
    assert choose_resident(work._replace(columns=1000), H100) is None, "every program has one tile"
    assert choose_resident(work._replace(slowness=16.0), H100) is None, "float32"


def test_a_table_goes_before_the_estimate(tmp_path: Path) -> None:
    """What is found faster is kept, written, read again, and used where work and device are the same."""
    work = forward(1024, 1024, 1024)
    estimated, *others = heuristics.candidates(work, PRODUCT_CONFIGS, H100)
    assert choose(work, PRODUCT_CONFIGS, H100)[:2] == estimated
    chosen: list[tuple[Config, int]] = []

    def step() -> None:
        chosen.append(choose(work, PRODUCT_CONFIGS, H100)[:2])

    def seconds(step: Callable[[], object]) -> float:
        step()
        return 0.5 if chosen[-1] == others[2] else 1.0

    table = tuner.tune(step, tmp_path / "table.json", seconds)
    assert table == {(work, H100): others[2]} == tuner.load(tmp_path / "table.json")
    assert len(set(chosen)) == tuner.MAX_TIMED
    with heuristics.use_table(table):
        assert choose(work, PRODUCT_CONFIGS, H100)[:2] == others[2]
        assert choose(work, PRODUCT_CONFIGS, A100)[:2] == heuristics.candidates(work, PRODUCT_CONFIGS, A100)[0]
    assert choose(work, PRODUCT_CONFIGS, H100)[:2] == estimated
    assert tuner.tune(step, None, lambda step: 1.0) == {}, "nothing is faster"
    (tmp_path / "table.json").write_text('[{"work": 3}]')
    with pytest.raises(ValueError, match=r"table\.json: got no table of configurations"):
        tuner.load(tmp_path / "table.json")
