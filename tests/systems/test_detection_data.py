"""Data sets with boxes: what is in them, splits that share no pixel, users' folders with all that may be wrong in them,
and batches that are a function of seed, epoch and image.
"""

import json
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from rl_kernels.systems.data import loading, sets
from rl_kernels.systems.detection import DetectionLoss, Detector, Scorer, detections, folders, scenes, trees
from rl_kernels.systems.detection.boxes import pairwise_iou
from rl_kernels.systems.detection.data import BoxPictures, load, scored, targets_of
from rl_kernels.systems.detection.images import BoxImages, Tally, box_set, read_picture, tidied
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


# Users' folders.


def save(path, size, mode="RGB", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[0], size[1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **more)


@pytest.fixture
def yolo(tmp_path):
    """Images 40 high and 80 wide, with a line each."""
    for part, count in (("train", 4), ("val", 2)):
        for number in range(count):
            save(tmp_path / part / "images" / f"{number}.png", (40, 80))
            text = tmp_path / part / "labels" / f"{number}.txt"
            text.parent.mkdir(exist_ok=True)
            text.write_text(f"{number % 2} 0.5 0.5 0.25 0.5\n")
    (tmp_path / "data.yaml").write_text("train: elsewhere\nnames: {0: cat, 1: dog}\n")
    return tmp_path


def line(yolo, text, number=0):
    (yolo / "train" / "labels" / f"{number}.txt").write_text(text)


def test_a_folder_of_text_files_is_a_set(yolo):
    with warnings.catch_warnings(action="error"):
        data = load(str(yolo))
    assert data.classes == ("cat", "dog") and (len(data.train), len(data.test)) == (4, 2) and data.notes == ()
    assert data.train.boxes[1].tolist() == [[30, 10, 50, 30]] and data.train.labels[1].tolist() == [1]
    assert load(yolo.name, str(yolo.parent)).sha256 == data.sha256, "a folder below the root"
    line(yolo, "0 0.5 0.5 0.25 0.51\n")
    assert load(str(yolo)).sha256 != data.sha256


@pytest.mark.parametrize("names", ["data.yaml list", "classes.txt"])
def test_the_other_layout_and_other_names(yolo, names):
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (yolo / kind).mkdir(exist_ok=True)
            (yolo / part / kind).rename(yolo / kind / part)
    (yolo / "data.yaml").unlink()
    (yolo / names.split()[0]).write_text("names: [cat, dog]" if "list" in names else "cat\ndog\n\n")
    data = load(str(yolo))
    assert data.classes == ("cat", "dog") and (len(data.train), len(data.test)) == (4, 2)


def test_boxes_that_are_none_are_counted(yolo):
    line(yolo, "0 0.0 0.5 0.5 0.5\n0 -0.5 0.5 0.5 0.5\n1 0.5 0.5 0 0.5\n\n1 0.1 0.1 0.3 0.1 0.3 0.5\n")
    line(yolo, "", 1)
    (yolo / "train" / "labels" / "2.txt").unlink()
    with pytest.warns(UserWarning, match="1 boxes outside of their image dropped"):
        data = load(str(yolo))
    assert [len(each) for each in data.train.boxes] == [2, 0, 0, 1]
    torch.testing.assert_close(data.train.boxes[0], torch.tensor([[0.0, 10, 20, 30], [8, 4, 24, 20]]))
    assert [note.partition(": ")[2] for note in data.notes] == [
        "1 boxes cut at the border of their image",
        "1 boxes outside of their image dropped",
        "1 boxes without an area dropped",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0.5 0.5 0.1 0.1\n2 0.5 0.5 0.1 0.1", "0.txt:2 has class 2, expected 0 to 1"),
        ("-1 0.5 0.5 0.1 0.1", "0.txt:1 has class -1, expected 0 to 1"),
        ("0.5 0.5 0.5 0.1 0.1", "0.txt:1 is '0.5 0.5"),
        ("0 0.5 0.5 0.1", "0.txt:1 is '0 0.5 0.5 0.1', expected a class and four numbers"),
        ("0 0.5 0.5 0.1 0.1 0.9", "0.txt:1 is '0 0.5 0.5 0.1 0.1 0.9', expected a class and four"),
        ("cat 0.5 0.5 0.1 0.1", "0.txt:1 is 'cat 0.5"),
        ("0 40 20 10 10", "0.txt:1 is '0 40 20 10 10', expected shares"),
        ("0 nan 0.5 0.1 0.1", "0.txt:1 is '0 nan"),
    ],
)
def test_lines_that_are_wrong_are_named(yolo, text, message):
    line(yolo, text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(str(yolo))


@pytest.mark.parametrize("content", [b"no image", b""])
def test_a_broken_file_among_many_is_skipped_by_name(yolo, content):
    (yolo / "train" / "images" / "1.png").write_bytes(content)
    with pytest.warns(UserWarning, match=r"1 images skipped: data: .*train/images/1\.png is no image"):
        data = load(str(yolo))
    assert [path.name for path in data.train.files] == ["0.png", "2.png", "3.png"]
    assert [each.tolist() for each in data.train.labels] == [[0], [0], [1]]


def test_a_file_that_ends_too_early_is_found(yolo, monkeypatch):
    path = yolo / "train" / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.warns(UserWarning, match=r"2\.png is no image"):
        assert len(load(str(yolo)).train) == 3
    # Where headers only are looked at, it is met later, and named.
    monkeypatch.setattr(folders, "READ_WHOLE", 0)
    data = load(str(yolo))
    with pytest.raises(ValueError, match=r"2\.png is no image"):
        BoxPictures(data.train, 64).__getitems__([(2, 0)])


def test_nothing_but_broken_files_is_an_error(yolo):
    for number in range(4):
        (yolo / "train" / "images" / f"{number}.png").write_text("no image")
    with pytest.raises(
        ValueError, match=r"none of the images of .*train/images can be used: .*4 images skipped.*0\.png"
    ):
        load(str(yolo))


@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGBA", "1"])
def test_other_pixels_become_three_channels_of_eight_bits(tmp_path, mode):
    path = tmp_path / "any.png"
    if mode == "I;16":
        Image.fromarray(np.array([[0, 255, 256, 65535]], dtype=np.uint16)).save(path)
        assert read_picture(path)[0, :, 0].tolist() == [0, 0, 1, 255]
    else:
        save(path, (4, 6), mode)
    pixels = read_picture(path)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
    assert mode in ("P", "RGBA") or bool((pixels[..., 0] == pixels[..., 2]).all())


def test_pictures_are_turned_as_they_say(yolo):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(yolo / "train" / "images" / "0.jpg", (40, 80), exif=exif)
    (yolo / "train" / "images" / "0.png").unlink()
    data = load(str(yolo))
    assert data.train.read(0).shape == (3, 80, 40)
    assert data.train.boxes[0].tolist() == [[15, 20, 25, 60]]


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "any.tif")
    with pytest.raises(ValueError, match=r"any\.tif has floating-point pixels"):
        read_picture(tmp_path / "any.tif")


def test_a_folder_of_another_form_says_what_is_expected(yolo, tmp_path_factory):
    (yolo / "data.yaml").write_text("names: 3")
    with pytest.raises(ValueError, match=r"data.yaml has names 3, expected a list"):
        load(str(yolo))
    (yolo / "data.yaml").write_text("names: [")
    with pytest.raises(ValueError, match=r"data.yaml is no YAML"):
        load(str(yolo))
    (yolo / "data.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no data.yaml and no classes.txt"):
        load(str(yolo))
    (yolo / "classes.txt").write_text("cat\ndog")
    for path in (yolo / "val" / "labels").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no image of .*val/images has a text file in .*val/labels"):
        load(str(yolo))
    with pytest.raises(FileNotFoundError, match="has no images of training, expected FOLDER/train/images"):
        load(str(tmp_path_factory.mktemp("empty")))
    with pytest.raises(
        FileNotFoundError, match=r"got 'tree', expected a folder, .* trees, scenes; sets with boxes are not"
    ):
        load("tree", download=True)


@pytest.fixture
def coco(tmp_path):
    """COCO's own layout: ids of categories with a gap, a crowd, an image without annotations."""

    def write(part, names, changed=lambda read: None, at=None):
        images = [{"id": 10 + n, "file_name": name, "height": 40, "width": 80} for n, name in enumerate(names)]
        boxes = [
            {"id": 1, "image_id": 10, "category_id": 7, "bbox": [8, 4, 20, 10], "iscrowd": 0},
            {"id": 2, "image_id": 10, "category_id": 3, "bbox": [70, 30, 20, 20]},
            {"id": 3, "image_id": 10, "category_id": 3, "bbox": [0, 0, 80, 40], "iscrowd": 1},
        ]
        kinds = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
        read = {"images": images, "annotations": boxes, "categories": kinds}
        changed(read)
        path = tmp_path / (at or f"annotations/instances_{part}2017.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(read))
        return path

    for part in ("train", "val"):
        for name in ("a.png", "b.png"):
            save(tmp_path / f"{part}2017" / name, (40, 80))
        write(part, ("a.png", "b.png"))
        (tmp_path / "annotations" / f"captions_{part}2017.json").write_text("{}")
    write.folder = tmp_path
    return write


def test_a_folder_with_annotations_is_a_set(coco):
    data = load(str(coco.folder))
    assert data.classes == ("cat", "dog") and len(data.train) == len(data.test) == 2
    assert data.train.boxes[0].tolist() == [[8, 4, 28, 14], [70, 30, 80, 40]]
    assert data.train.labels[0].tolist() == [1, 0] and not len(data.train.boxes[1])
    assert [path.parent.name for path in (*data.train.files, *data.test.files)] == [
        *["train2017"] * 2,
        *["val2017"] * 2,
    ]
    assert any("1 boxes of crowds dropped" in note for note in data.notes)
    assert_well_formed(data.train, 2)
    pair = (coco.folder / "annotations" / f"instances_{part}2017.json" for part in ("train", "val"))
    for path in pair:
        path.rename(coco.folder / path.name)
        (path.parent / path.name.replace("instances", "captions")).unlink()
    by_files = load(",".join(str(coco.folder / f"instances_{part}2017.json") for part in ("train", "val")))
    assert by_files.sha256 == data.sha256 == load(str(coco.folder)).sha256


def test_a_json_beside_its_images_is_a_set(coco):
    for part in ("train", "val"):
        (coco.folder / f"{part}2017").rename(coco.folder / part)
        coco(part, ("a.png", "b.png"), at=f"{part}/_annotations.coco.json")
    for path in (coco.folder / "annotations").iterdir():
        path.unlink()
    assert len(load(str(coco.folder)).train) == 2


def test_what_is_wrong_with_a_json_is_named(coco):
    def wrong(message, changed):
        coco("train", ("a.png", "b.png"), changed)
        with pytest.raises(ValueError, match=r"instances_train2017.json" + message):
            load(str(coco.folder))

    wrong(
        r": annotation 1 has category 9, expected one of \[3, 7\]", lambda r: r["annotations"][0].update(category_id=9)
    )
    wrong(": annotation 2 is of image 99", lambda r: r["annotations"][1].update(image_id=99))
    wrong(r": annotation 1 has bbox \[1, 2, 3\], expected four", lambda r: r["annotations"][0].update(bbox=[1, 2, 3]))
    wrong(r": annotation 1 has bbox \[0, 0, nan", lambda r: r["annotations"][0].update(bbox=[0, 0, float("nan"), 1]))
    wrong(r" is not in COCO's form .*one of its images has no file_name", lambda r: r["images"][0].pop("file_name"))
    wrong(r" is not in COCO's form .*a category has id 'x'", lambda r: r["categories"][0].update(id="x"))
    wrong(r" is not in COCO's form", lambda r: r.pop("images"))
    wrong(" has no categories", lambda r: r["categories"].clear() or r["annotations"].clear())
    (coco.folder / "annotations" / "instances_train2017.json").write_text("no JSON")
    with pytest.raises(ValueError, match=r"instances_train2017.json is not in COCO's form"):
        load(str(coco.folder))


def test_images_that_are_not_what_a_json_says_are_skipped(coco):
    coco("train", ("a.png", "b.png", "missing.png"), lambda read: read["images"][1].update(width=79))
    with pytest.warns(UserWarning, match=r"2 images skipped: data: .*b\.png is 80x40, .*says 79x40; .*missing\.png"):
        assert [path.name for path in load(str(coco.folder)).train.files] == ["a.png"]
    coco("train", ("x.png", "y.png"))
    with pytest.raises(FileNotFoundError, match=r"names x\.png, which is in none of .*train2017"):
        load(str(coco.folder))


def test_files_of_other_categories_are_refused(coco):
    coco("val", ("a.png",), lambda read: read["categories"][0].update(name="wolf"))
    with pytest.raises(ValueError, match=r"instances_val2017.json has categories .*wolf.*, expected those of .*train"):
        load(str(coco.folder))


def test_files_that_may_both_be_meant_are_named(coco):
    (coco.folder / "annotations" / "instances_train2014.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"instances_train2014.json', 'instances_train2017.json'.* one file of training"
    ):
        load(str(coco.folder))


def test_boxes_are_tidied_by_hand():
    tally = Tally("any")
    boxes = torch.tensor(
        [[1.0, 1, 5, 5], [-3, 2, 4, 30], [20, 0, 25, 5], [3, 3, 3, 9], [5, 5, 2, 9], [9.8, 0, 10.2, 1]]
    )
    found, labels = tidied(boxes, torch.arange(6), (10, 10), tally)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1, 5, 5], [0, 2, 4, 10], [9.8, 0, 10, 1]]))
    assert labels.tolist() == [0, 1, 5] and (tally.clipped, tally.outside, tally.degenerate) == (1, 1, 2)


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
        assert bool(loss.isfinite()) and float(loss) > 0
    model.eval()
    with torch.no_grad():
        found = detections(*model(batch.images / 255))
    scorer = Scorer(("one", "two", "three"))
    scorer.update(found, batch.labels)
    scores = scorer.compute()
    assert scores.images == 2 and [each.boxes for each in scores.classes] == [1, 1, 1]
