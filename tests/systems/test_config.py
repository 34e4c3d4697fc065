"""Presets, files and settings, one over the other; and what is refused."""

import pytest

from rl_kernels.systems import config as configs
from rl_kernels.systems.matrices import MATRICES
from rl_kernels.systems.registry import SYSTEMS, system
from rl_kernels.systems.replacement import PRESETS, ReplacementConfig


def resolve(*settings, preset=None, path=None):
    return configs.resolve(ReplacementConfig, PRESETS, preset, path, settings)


def test_what_comes_later_wins(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("epochs: 7\noptimizer:\n  learning_rate: 1e-2\nreplacement.every: 6\n")
    assert resolve(preset="short").epochs == 4
    made = resolve("learning_rate=3e-2", "replacement.detach=[0, 1]", "every=2", preset="short", path=path)
    assert (made.epochs, made.model.width, made.optimizer.learning_rate) == (7, 8, 3e-2)
    assert made.replacement.every == 2 and made.replacement.detach == (0, 1)


def test_null_is_the_whole_network():
    assert resolve("every=null").replacement.every is None


def test_every_preset_is_a_config_and_comes_back_from_its_record():
    for name in SYSTEMS:
        chosen = system(name)
        for preset in chosen.presets:
            made = configs.resolve(chosen.config, chosen.presets, preset)
            assert configs.parse(chosen.config, configs.as_dict(made)) == made, preset


@pytest.mark.parametrize("name", MATRICES)
def test_every_variant_of_an_experiment_is_a_config(name):
    matrix = MATRICES[name]
    chosen = system(matrix.system)
    made = [
        configs.resolve(
            chosen.config,
            chosen.presets,
            matrix.preset,
            None,
            [*matrix.shared, *(each.replace("{", "a/").replace("}", "") for each in settings)],
        )
        for settings in matrix.variants.values()
    ]
    assert len({repr(each) for each in made}) == len(made), "two variants are the same"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["epoch=3"], "there is no 'epoch'; near to it: epochs"),
        (["name=resnet20"], "may be model.name or data.name or optimizer.name or schedule.name"),
        (["epochs"], "set: got 'epochs', expected key=value"),
        (["epochs=many"], "epochs"),
        (["epochs=0"], "epochs: got 0, expected at least 1"),
        (["optimizer.name=adam"], "optimizer.name"),
        (["validation=1.5"], "data.validation: got 1.5, expected at least 0 and less than 1"),
        (["learning_rate=-1"], "optimizer.learning_rate: got -1"),
        (["learning_rate=.nan"], "optimizer.learning_rate: got nan"),
        (
            ["batch_size=30", "accumulate=4"],
            "batch_size: got 30, expected a multiple of runtime.devices * accumulate, 4",
        ),
        (["every=null", "control=removed"], "replacement.control: got 'removed' with replacement.every=null"),
        (["control=tied", "init=fit"], "replacement.init: got a value for control='tied'"),
        (["width={a: 1}"], "width"),
        (["every=two"], "replacement.every: got 'two', expected int | None"),
        (["precision=fp8"], "runtime.precision: got 'fp8', expected Literal["),
    ],
)
def test_what_is_refused_is_named(settings, words):
    with pytest.raises(ValueError) as raised:
        resolve(*settings)
    assert words in str(raised.value)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"preset: got 'long', expected one of 'short'"):
        resolve(preset="long")


@pytest.mark.parametrize(("text", "words"), [("- 1\n", "holds list"), ("a: [1", "is no YAML"), ("lr: 1", "no 'lr'")])
def test_a_file_that_is_no_config_is_refused(text, words, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        resolve(path=tmp_path / "config.yaml")
