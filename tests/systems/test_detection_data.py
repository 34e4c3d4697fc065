"""Data sets with boxes: what is in them, splits that share no pixel, and batches that are a function of seed, epoch and
image.
"""

import math

import numpy as np
import pytest
import torch

from rl_kernels.systems.data import loading, sets
from rl_kernels.systems.detection import DetectionLoss, Detector, Scorer, detections, scenes, trees
from rl_kernels.systems.detection.boxes import pairwise_iou
from rl_kernels.systems.detection.data import BoxPictures, load, scored, targets_of
from rl_kernels.systems.detection.images import BoxImages, box_set
from rl_kernels.systems.detection.transforms import Augmentation


def assert_well_formed(part, classes):
    for index, (boxes, labels) in enumerate(zip(part.boxes, part.labels, strict=True)):
        height, width = part.read(index).shape[1:]
        assert boxes.dtype == torch.float32 and labels.dtype == torch.int64 and boxes.shape == (len(labels), 4)
        assert bool((boxes >= 0).all()) and bool((boxes <= torch.tensor([width, height] * 2)).all())
        assert bool((boxes[:, 2:] > boxes[:, :2]).all()) and bool((labels >= 0).all() & (labels < classes).all())


# Trees.


@pytest.fixture(scope="module")
def of_trees():
    return load("trees")


def test_trees_are_what_they_were(of_trees):
    found = [
        (len(part), sum(map(len, part.boxes)), sum(not len(each) for each in part.boxes))
        for part in (of_trees.train, of_trees.test)
    ]
    assert found == [(97, 751, 12), (62, 705, 0)], "tiles, boxes, tiles without a box"
    assert of_trees.classes == ("tree",) and of_trees.notes == ()
    assert of_trees.sha256 == "9df5a9c6cb9a184923a4ed59ae6b56daf9797787cf73f194ff45d1fd5b6e8c21"
    for part in (of_trees.train, of_trees.test):
        assert part.pixels.shape[1:] == (3, trees.TILE, trees.TILE) and part.pixels.dtype == torch.uint8
        assert_well_formed(part, 1)


SIZES = {
    name: size for name, size in zip(trees.FILES, ((2472, 2299), (1035, 1249), (400, 400), (400, 400)), strict=True)
}


def test_no_tile_of_training_shows_a_place_of_the_test(of_trees):
    train, test = ([tile for area in part for tile in trees.tiles(area)] for part in trees.areas(SIZES))
    assert (len(train), len(test)) == (len(of_trees.train), len(of_trees.test))
    for mine in train:
        for other in test:
            apart = (
                mine.right <= other.left
                or other.right <= mine.left
                or mine.bottom <= other.top
                or other.bottom <= mine.top
            )
            assert mine.image != other.image or apart
    assert {tile.image[:4] for tile in train} == {"2019"} and {tile.image[:4] for tile in test} == {
        "2019",
        "OSBS",
        "SOAP",
    }


def test_tiles_cover_their_area():
    area = trees.Area("any", 100, 7, 1032, 407)
    covered = torch.zeros(500, 1100, dtype=torch.bool)
    for tile in trees.tiles(area):
        assert (tile.right - tile.left, tile.bottom - tile.top) == (trees.TILE, trees.TILE)
        covered[tile.top : tile.bottom, tile.left : tile.right] = True
    assert int(covered.sum()) == 932 * 400 == int(covered[7:407, 100:1032].sum())
    with pytest.raises(ValueError, match="area: got 200 pixels"):
        trees.tiles(trees.Area("any", 0, 0, 200, 400))


def test_a_tile_has_the_boxes_that_it_shows_enough_of():
    tile = trees.Area("any", 100, 100, 356, 356)
    boxes = torch.tensor(
        [[110.0, 120, 130, 150], [96, 100, 106, 110], [93, 100, 103, 110], [300, 350, 340, 360], [0, 0, 20, 20]]
    )
    # The second shows six tenths, the third three, the fourth six.
    assert trees.boxes_in(boxes, tile).tolist() == [[10, 20, 30, 50], [0, 0, 6, 10], [200, 250, 240, 256]]


def test_boxes_lie_on_their_trees(of_trees):
    """Crowns are less blue than what is around them: boxes that were moved would be bluer."""

    def colour(across, down):
        found = []
        for pixels, boxes in zip(of_trees.train.pixels.float(), of_trees.train.boxes, strict=True):
            for left, top, right, bottom in boxes.round().int().tolist():
                part = pixels[:, max(top + down, 0) : bottom + down, max(left + across, 0) : right + across]
                if part.numel():
                    found.append((part[1] - part[2]).mean())
        return torch.stack(found).mean()

    moved = [colour(*each) for each in ((40, 0), (-40, 0), (0, 40), (0, -40))]
    assert colour(0, 0) > max(moved) + 3


def test_a_file_of_boxes_in_another_form_is_named(tmp_path):
    path = tmp_path / "boxes.xml"
    for text in ("no XML", "<a><object><name>x</name><bndbox><xmin>1</xmin></bndbox></object></a>"):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path} is no file of boxes"):
            trees.read_voc(path)


# Scenes.


@pytest.fixture(scope="module")
def of_scenes():
    return load("scenes")


def test_scenes_are_what_they_were(of_scenes):
    assert (len(of_scenes.train), len(of_scenes.test)) == (384, 128)
    assert [sum(map(len, part.boxes)) for part in (of_scenes.train, of_scenes.test)] == [1724, 556]
    assert len(of_scenes.classes) == 10
    for part in (of_scenes.train, of_scenes.test):
        assert part.pixels.shape[1:] == (3, 96, 96)
        assert_well_formed(part, 10)
        assert {len(each) for each in part.boxes} == set(range(1, 9))
        assert set(torch.cat(part.labels).tolist()) == set(range(10))
        for boxes in part.boxes:
            assert bool((pairwise_iou(boxes, boxes).fill_diagonal_(0) < scenes.MAX_IOU).all())
        sides = torch.cat(part.boxes)
        assert int((sides[:, 2:] - sides[:, :2]).amin()) >= scenes.LEAST_SIDE


def test_a_scene_follows_from_its_number(of_scenes):
    for side, material in enumerate(scenes.materials(sets.load("animals"), sets.photographs())):
        part = (of_scenes.train, of_scenes.test)[side]
        for index in (0, 77):
            pixels, boxes, labels = scenes.scene(material, index, side)
            assert np.array_equal(pixels.transpose(2, 0, 1), part.pixels[index].numpy())
            assert boxes.tolist() == part.boxes[index].tolist() and labels.tolist() == part.labels[index].tolist()


def stand_in(count, size, photographs):
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (count, 1, size, size), dtype=np.uint8))
    part = sets.Images(torch.arange(count) % 10, pixels)
    other = sets.Images(part.labels, 255 - pixels)
    return sets.ImageSet("any", scenes.ANIMALS, part, other, 1, size, ""), {
        name: np.full((200, 200, 3), level, dtype=np.uint8) for name, level in photographs.items()
    }


def test_training_and_test_share_no_silhouette_and_no_photograph():
    data, photographs = stand_in(20, 8, {"china.jpg": 1, "coffee.png": 2, "chelsea.png": 3, "retina.jpg": 4})
    train, test = scenes.materials(data, photographs)
    assert [int(each[0, 0, 0]) for each in train.photographs] == [2, 4]
    assert [int(each[0, 0, 0]) for each in test.photographs] == [1, 3]
    assert not {each.tobytes() for each in train.silhouettes} & {each.tobytes() for each in test.silhouettes}
    assert set(scenes.TEST_PHOTOGRAPHS) < {*sets.PHOTOGRAPHS, "china.jpg", "flower.jpg"}


def test_a_box_is_around_what_is_visible_of_its_object():
    """White squares before black, or the reverse: edges can be read from the pixels."""
    square = np.zeros((1, 28, 28), dtype=np.uint8)
    square[0, 4:24, 9:20] = 255
    flat = [np.full((300, 300, 3), level, dtype=np.uint8) for level in (0, 255)]
    material = scenes.Material(square, np.zeros(1, dtype=np.int64), flat)
    alone = 0
    for index in range(60):
        pixels, boxes, _ = scenes.scene(material, index, 0, 96)
        grey = pixels.mean(2)
        if len(boxes) > 1:
            continue
        alone += 1
        behind = np.median(grey)
        differs = np.abs(grey - behind)
        left, top, right, bottom = scenes.tight_box(differs >= differs.max() / 2)
        assert np.abs(np.array([left, top, right, bottom]) - boxes[0]).max() <= 1
    assert alone > 3


@pytest.mark.parametrize(("angle", "flipped"), [(0, False), (0, True), (30, False), (-30, True)])
@pytest.mark.parametrize("scale", [12, 20.5, 48])
def test_a_silhouette_is_cut_out_as_large_as_asked(scale, angle, flipped):
    silhouette = np.zeros((28, 28))
    silhouette[3:23, 8:18] = 1
    alpha = scenes.cut_out(silhouette, scale, angle, flipped)
    assert alpha.max() <= 1 + 1e-9 and alpha.min() >= 0
    assert alpha.sum() == pytest.approx(scale * scale / 2, rel=0.08), "its area"
    assert ((alpha > 0.1) & (alpha < 0.9)).sum() > scale, "an edge without a feather"


def test_sampling_is_exact_at_pixels_and_linear_between():
    array = np.arange(12.0).reshape(3, 4)
    rows, columns = np.meshgrid(np.arange(3) + 0.5, np.arange(4) + 0.5, indexing="ij")
    assert np.array_equal(scenes.sampled(array, rows, columns), array)
    assert scenes.sampled(array, np.array([1.0, 1.5, -3, 9]), np.array([1.0, 2, 1, 1])).tolist() == [2.5, 5.5, 0, 0]


def test_objects_hide_no_other():
    owner = np.full((30, 30), -1)
    owner[0:10, 0:10] = 0
    owner[5:15, 8:18] = 1
    assert scenes._allowed(owner, [100, 100])
    owner[0:10, 3:13] = 1
    assert not scenes._allowed(owner, [100, 100]), "less than 40 % of the first is left"
    owner[0:10, 0:10], owner[0:10, 4:14] = 0, 1
    assert scenes._allowed(owner, [100, 100])


@pytest.mark.parametrize("told", [{"size": 64}, {"train": 0}, {"test": -1}])
def test_scenes_that_cannot_be_are_refused(told):
    with pytest.raises(ValueError, match=f"{next(iter(told))}: got {next(iter(told.values()))}"):
        scenes.load_scenes(**told)


def test_silhouettes_of_which_nothing_is_left_are_refused():
    silhouettes = np.zeros((1, 28, 28), dtype=np.uint8)
    silhouettes[0, 0, 0] = silhouettes[0, 27, 27] = 128  # Two faint dots.
    material = scenes.Material(silhouettes, np.zeros(1, dtype=np.int64), [np.zeros((200, 200, 3), dtype=np.uint8)])
    with pytest.raises(ValueError, match="material: got silhouettes too thin"):
        scenes.scene(material, 0, 0)


def test_images_that_do_not_go_together_are_refused():
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="got those of 1 and 1 images, expected 2"):
        BoxImages((torch.zeros(0, 4),), (torch.zeros(0).long(),), pixels)
    with pytest.raises(ValueError, match=r"boxes\[0\], labels\[0\]: got shapes \(1, 4\) and \(0,\)"):
        BoxImages((torch.zeros(1, 4),), (torch.zeros(0).long(),), pixels[:1])
    images = BoxImages((torch.zeros(1, 4),), (torch.tensor([2]),), pixels[:1])
    with pytest.raises(ValueError, match=r"labels\[0\]: got \[2\], expected 0 to 1"):
        box_set("any", ["cat", "dog"], images, images)


# Batches.


@pytest.fixture(scope="module")
def few():
    """Twelve images of 48 by 64 with none to three boxes."""
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (12, 3, 48, 64), dtype=np.uint8))
    boxes = tuple(torch.tensor([[8.0 + n, 6, 30, 30]] * (n % 4)).reshape(-1, 4) for n in range(12))
    return BoxImages(boxes, tuple(torch.arange(len(each)) for each in boxes), pixels)


def test_batches_have_their_boxes_and_padding(few):
    batch = BoxPictures(few, 64).__getitems__([(0, 5), (3, 5), (1, 5)])
    assert batch.images.shape == (3, 3, 64, 64) and batch.images.dtype == torch.uint8
    assert torch.equal(batch.images[1, :, 8:56], few.pixels[3])
    assert batch.labels.dtype == torch.float32 and batch.labels.shape == (3, 3, 5)
    assert batch.labels[..., 0].tolist() == [[-1, -1, -1], [0, 1, 2], [0, -1, -1]]
    assert batch.labels[2, 0].tolist() == [0, 9, 14, 30, 38]
    targets = targets_of(batch.labels)
    assert targets.valid.sum(1).tolist() == [0, 3, 1] and targets.labels.dtype == torch.int64
    assert targets.labels.min() == 0 and torch.equal(targets.boxes, batch.labels[..., 1:])
    assert scored(batch.labels).tolist() == [True] * 3


@pytest.mark.parametrize("augmentation", [None, Augmentation()])
def test_an_image_that_is_not_scored_has_no_boxes(few, augmentation):
    batch = BoxPictures(few, 64, augmentation).__getitems__([(3, loading.NOT_COUNTED)])
    assert batch.images.shape == (1, 3, 64, 64) and batch.labels.tolist() == [[[-2, 0, 0, 0, 0]]]
    assert not targets_of(batch.labels).valid.any() and scored(batch.labels).tolist() == [False]


def test_labels_of_another_shape_are_refused():
    for function in (targets_of, scored):
        with pytest.raises(ValueError, match=r"labels: got shape \(2, 5\), expected \(B, M, 5\)"):
            function(torch.zeros(2, 5))


def test_an_image_without_boxes_has_a_row_of_padding(few):
    assert BoxPictures(few, 64).__getitems__([(0, 1)]).labels[..., 0].tolist() == [[-1]]


def rows(labels):
    return [[row for row in each.tolist() if row[0] >= 0] for each in labels]


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(mosaic=0.5), Augmentation(mosaic=0)])
def test_what_is_drawn_follows_from_index_and_seed(few, augmentation):
    made = BoxPictures(few, 64, augmentation)
    state = torch.random.get_rng_state()
    drawn = [(index, index % 3) for index in range(12)]
    batch = made.__getitems__(drawn)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was left elsewhere"
    for number, each in enumerate(drawn):
        torch.rand(1)
        alone = made.__getitems__([each])
        assert torch.equal(alone.images[0], batch.images[number])
        assert rows(alone.labels)[0] == rows(batch.labels)[number]
    assert len({made.__getitems__([(1, seed)]).images.numpy().tobytes() for seed in range(6)}) == 6
    assert not torch.equal(made.__getitems__([(1, 0)]).images, BoxPictures(few, 64).__getitems__([(1, 0)]).images)


def test_the_loader_takes_them(few):
    made = BoxPictures(few, 64, Augmentation())
    order = loading.Order(12, 4, 0, 0, 0, 0, 1, shuffled=True)
    batches = list(loading.loader(made, order, 0, pin=False))
    assert [batch.images.shape for batch in batches] == [(4, 3, 64, 64)] * 3
    assert all(isinstance(batch, loading.Batch) and batch.labels.shape[::2] == (4, 5) for batch in batches)


def test_a_size_that_the_network_cannot_take_is_refused(few):
    with pytest.raises(ValueError, match="size: got 100, expected a multiple of 32"):
        BoxPictures(few, 100)


def test_batches_go_through_the_detector(few):
    """Padding, images without boxes and images that are not scored are nothing to the loss and to the scores."""
    torch.manual_seed(0)
    model = Detector(3, "pico", image_size=64)
    made = BoxPictures(few, 64)
    batch = made.__getitems__([(0, 1), (3, 1), (2, loading.NOT_COUNTED)])
    for each in (made.__getitems__([(0, 1)]), batch):
        loss = DetectionLoss()(model(each.images / 255), targets_of(each.labels)).total
        assert 0 < float(loss.detach()) < math.inf
    model.eval()
    with torch.no_grad():
        found = detections(*model(batch.images / 255))
    scorer = Scorer(("one", "two", "three"))
    scorer.update(found, batch.labels)
    scores = scorer.compute()
    assert scores.images == 2 and [each.boxes for each in scores.classes] == [1, 1, 1]
