"""Users' data sets, YOLO's text files and COCO's JSON, with all that may be wrong in them."""

import json
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from rl_kernels.systems.detection import BoxPictures, folders, load
from rl_kernels.systems.detection.images import Tally, read_picture, tidied


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
