import gc
import io
import os
import tarfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageDataset, create_transform
from torchvision.transforms import functional

from vitq.errors import InputError
from vitq.images import Images, open_images
from vitq.preparation import describe

CONFIG = {
    "input_size": [3, 16, 16], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3],
    "interpolation": "bicubic", "crop_pct": 0.8, "crop_mode": "center",
}  # fmt: skip


def picture(seed: int, width: int = 24, height: int = 20, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def class_folders(root: Path, classes: tuple[str, ...] = ("cat", "dog", "eel"), each: int = 8) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            picture(100 * label + i).save(root / name / f"{i}.png")
    return root


def flat_folder(root: Path, count: int = 40) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(root / f"{i:03}.png")
    return root


def tar_of(folder: Path, top: str = ".") -> Path:
    with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
        tar.add(folder, top)
    return folder.with_suffix(".tar")


def everything(images: Images) -> tuple[torch.Tensor, list[int]]:
    batches = list(images)
    return torch.cat([batch for batch, _ in batches]), [int(label) for _, labels in batches if labels is not None for label in labels]


def single(path: Path, config: dict = CONFIG) -> torch.Tensor:
    images = open_images(path, config)
    [(batch, labels)] = list(images)
    assert labels is None and not images.skipped and batch.dtype == torch.float32
    return batch[0]


def test_class_folders_are_what_timms_dataset_gives(tmp_path):
    root = class_folders(tmp_path / "x", ("c10", "c9", "C2"))
    images = open_images(root, CONFIG, None, batch_size=5)
    pixels, labels = everything(images)
    reference = ImageDataset(str(root), transform=create_transform(**CONFIG, is_training=False))
    expected = {reference.filename(i): reference[i] for i in range(len(reference))}
    assert images.class_names == ("C2", "c9", "c10") and images.labelled and images.num_listed == 24
    for name, image, label in zip(sorted(expected), pixels, labels, strict=True):
        assert torch.equal(image, expected[name][0]) and label == expected[name][1]


@pytest.mark.parametrize("top", [".", "dataset"])
def test_tar_is_the_folder(tmp_path, top):
    root = class_folders(tmp_path / "x")
    folder, tar = open_images(root, CONFIG, None), open_images(tar_of(root, top), CONFIG, None)
    assert tar.class_names == folder.class_names == ("cat", "dog", "eel")
    for a, b in zip(folder, tar, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not list(tmp_path.glob("*.pickle"))


def test_flat_sources_have_no_labels(tmp_path):
    root = flat_folder(tmp_path / "x", 3)
    for source in (root, tar_of(root), tar_of(root, "dataset")):
        images = open_images(source, CONFIG, class_names=("a", "b", "c"))
        assert not images.labelled and images.class_names == ()
        assert [labels for _, labels in images] == [None] and images.num_images == 3


def test_tar_of_tars(tmp_path):
    root = class_folders(tmp_path / "x", ("cat", "dog"), 2)
    outer = tmp_path / "outer.tar"
    with tarfile.open(outer, "w") as tar:
        for name in ("cat", "dog"):
            tar.add(tar_of(root / name), f"./{name}.tar")
    pixels, labels = everything(open_images(outer, CONFIG))
    assert labels == [0, 0, 1, 1] and torch.equal(pixels, everything(open_images(root, CONFIG))[0])


def test_every_pass_gives_the_same_and_reports(tmp_path):
    images = open_images(flat_folder(tmp_path), CONFIG, None, batch_size=16)
    seen = []
    first = [batch for batch, _ in images.batches(lambda done, total: seen.append((done, total)))]
    assert seen == [(16, 40), (32, 40), (40, 40)] and [len(batch) for batch in first] == [16, 16, 8]
    next(iter(images))
    assert all(torch.equal(a, b) for a, (b, _) in zip(first, images, strict=True))


def test_workers_change_nothing(tmp_path):
    root = class_folders(tmp_path / "x")
    (root / "cat" / "bad.png").write_bytes(b"no")
    state = torch.get_rng_state()
    for source in (root, tar_of(root)):
        alone, workers = (open_images(source, CONFIG, None, batch_size=5, workers=count) for count in (0, 2))
        for a, b in zip(alone, workers, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        assert alone.skipped == workers.skipped and len(alone.skipped) == 1
    assert torch.equal(state, torch.get_rng_state())


def test_subset_is_seeded_and_nested(tmp_path):
    root = flat_folder(tmp_path)

    def subset(count, seed):
        return open_images(root, CONFIG, count, seed)

    def rows(images):
        return {tuple(image[0, 0, :4].tolist()) for image in everything(images)[0]}

    assert subset(10, 0).digest == subset(10, 0).digest
    assert len({subset(10, 0).digest, subset(10, 1).digest, subset(11, 0).digest, subset(None, 0).digest}) == 4
    assert subset(40, 0).digest == subset(41, 1).digest == subset(None, 5).digest
    assert len(rows(subset(10, 0))) == 10 and rows(subset(5, 0)) < rows(subset(10, 0)) < rows(subset(None, 0))
    assert rows(subset(10, 0)) != rows(subset(10, 1))


def test_subset_is_this_one_on_every_platform(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:03}.png").write_bytes(b"x" * i)
    images = open_images(tmp_path, CONFIG, 4, seed=7)
    assert [entry.name for entry in images.loader.dataset.entries] == ["037.png", "008.png", "025.png", "013.png"]
    assert images.digest == "aebf39d474680f2f32352ac582089f7b70dffc66fb4ee90115b1edb373037660"


def test_digest_sees_names_and_sizes(tmp_path):
    root = flat_folder(tmp_path / "x", 4)
    before = open_images(root, CONFIG).digest
    assert before == open_images(tar_of(root), CONFIG).digest == open_images(root.rename(tmp_path / "moved"), CONFIG).digest
    root = tmp_path / "moved"
    (root / "000.png").write_bytes((root / "000.png").read_bytes() + b"x")
    changed = open_images(root, CONFIG).digest
    (root / "000.png").rename(root / "999.png")
    assert len({before, changed, open_images(root, CONFIG).digest}) == 3


def test_labels_are_the_models_where_the_names_match(tmp_path):
    root = class_folders(tmp_path / "x", ("cat", "dog"), 1)
    assert everything(open_images(root, CONFIG, class_names=("dog", "eel", "cat")))[1] == [2, 0]
    foreign = open_images(root, CONFIG, class_names=("n01", "n02"))
    assert everything(foreign)[1] == [0, 1] and foreign.class_names == ("cat", "dog")
    with pytest.raises(InputError, match="class folder 'dog' is none of the model's 2 classes, others are \\('cat'\\)"):
        open_images(root, CONFIG, class_names=("cat", "eel"))
    only = class_folders(tmp_path / "y", ("cat",), 2)
    assert everything(open_images(only, CONFIG, class_names=("dog", "cat")))[1] == [1, 1]
    picture(0).save(root / "stray.png")
    assert not open_images(root, CONFIG).labelled


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "RGB"])
def test_modes_become_rgb(tmp_path, mode):
    original = picture(1).convert("L" if mode == "LA" else "RGB").convert(mode)
    name = "a.jpg" if mode == "CMYK" else "a.png"
    original.save(tmp_path / name)
    with Image.open(tmp_path / name) as stored:
        assert stored.mode == mode
        expected = create_transform(**CONFIG, is_training=False)(stored.convert("RGB"))
    assert torch.equal(single(tmp_path), expected)


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency(tmp_path):
    picture(1).convert("P").save(tmp_path / "a.png", transparency=bytes(range(256)))
    with Image.open(tmp_path / "a.png") as stored:
        expected = create_transform(**CONFIG, is_training=False)(stored.convert("RGBA").convert("RGB"))
    assert torch.equal(single(tmp_path), expected)


def test_sixteen_bits_keep_their_brightness(tmp_path):
    eight = np.asarray(picture(1, mode="L"))
    Image.fromarray((eight.astype(np.uint16) << 8) + 77).save(tmp_path / "a.png")
    expected = create_transform(**CONFIG, is_training=False)(Image.fromarray(eight).convert("RGB"))
    assert torch.equal(single(tmp_path), expected)


@pytest.mark.parametrize(("orientation", "method"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)])
def test_exif_rotation_is_applied(tmp_path, orientation, method):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(1).save(tmp_path / "a.png", exif=exif)
    expected = create_transform(**CONFIG, is_training=False)(picture(1).transpose(method))
    assert torch.equal(single(tmp_path), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_one_pixel_images(tmp_path, size, crop_mode):
    Image.new("RGB", size, (255, 0, 51)).save(tmp_path / "a.png")
    channels = single(tmp_path, {**CONFIG, "crop_mode": crop_mode}).amax(dim=(1, 2))
    assert torch.allclose(channels, (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(CONFIG["mean"])) / torch.tensor(CONFIG["std"]))


def test_grayscale_model(tmp_path):
    picture(1).save(tmp_path / "a.png")
    config = {**CONFIG, "input_size": [1, 16, 16], "mean": [0.5], "std": [0.5]}
    assert torch.equal(single(tmp_path, config), create_transform(**config, is_training=False)(picture(1).convert("L")))


def huge_png(width: int, height: int) -> bytes:
    """A well-formed PNG header that announces a picture, with hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def bomb_in_chunk(kind: bytes, start: bytes) -> bytes:
    """A small PNG with a chunk of a hundred megabytes of zeros, compressed."""
    pressed = zlib.compressobj(9)
    data = start + b"".join(pressed.compress(bytes(10**7)) for _ in range(10)) + pressed.flush()
    whole = io.BytesIO()
    picture(1).save(whole, "PNG")
    content = whole.getvalue()
    header = 8 + 25  # signature and IHDR
    chunk = len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    return content[:header] + chunk + content[header:]


@cache
def bad_files() -> dict[str, tuple[bytes, str]]:
    """Content and reason by name."""
    whole = io.BytesIO()
    picture(1, 200, 200).save(whole, "JPEG")
    return {
        "truncated.jpg": (whole.getvalue()[: len(whole.getvalue()) // 2], "truncated"),
        "empty.png": (b"", "empty file"),
        "text.png": (b"hello", "no image"),
        "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),  # Pillow would start a program
        "bomb.png": (huge_png(50_000, 50_000), "decompression bomb"),
        "large.png": (huge_png(12_000, 12_000), "announces 12000x12000 pixels"),
        "text chunk.png": (bomb_in_chunk(b"zTXt", b"a\0\0"), "Decompressed data too large"),
        "profile.png": (bomb_in_chunk(b"iCCP", b"a\0\0"), "Decompressed data too large"),
        "international.png": (bomb_in_chunk(b"iTXt", b"a\0\1\0\0\0"), "Decompressed data too large"),
        "many tags.jpg": (b"II*\0\x08\0\0\0" + b"\xff\x1f" + b"\x01\x01\x04\0\xff\xff\xff\xff\0\0\0\0" * 8191, "no image"),
        "circle.jpg": (b"II*\0\x08\0\0\0" + b"\1\0" + b"\0\1\4\0\1\0\0\0\x0a\0\0\0" + b"\x08\0\0\0", "no image"),
        "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"><rect/></svg>', "no image"),
    }


@pytest.mark.parametrize("as_tar", [False, True])
@pytest.mark.parametrize("name", bad_files())
def test_bad_files_are_skipped_and_named_once(tmp_path, name, as_tar):
    content, reason = bad_files()[name]
    root = flat_folder(tmp_path / "x", 20)
    good = everything(open_images(root, CONFIG))[0]
    (root / name).write_bytes(content)
    images = open_images(tar_of(root) if as_tar else root, CONFIG, batch_size=4)
    for _ in range(2):
        assert torch.equal(everything(images)[0], good)
    assert len(images.skipped) == 1 and images.skipped[0].startswith(f"{name}: ") and reason in images.skipped[0]
    assert (images.num_listed, images.num_images) == (21, 20)


def test_strip_that_would_be_resized_to_an_enormous_picture(tmp_path):
    flat_folder(tmp_path, 20)
    Image.new("1", (1, 60_000)).save(tmp_path / "strip.png")
    images = open_images(tmp_path, {**CONFIG, "input_size": [3, 64, 64]})
    assert len(everything(images)[0]) == 20 and "1x60000 is too long" in images.skipped[0]


def test_pipes_and_broken_links_are_bad_files(tmp_path):
    flat_folder(tmp_path, 40)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    images = open_images(tmp_path, CONFIG)
    assert len(everything(images)[0]) == 40
    assert images.skipped == ["link.png: gone, or no regular file", "pipe.png: gone, or no regular file"]


def test_folders_with_names_of_pictures(tmp_path):
    flat_folder(tmp_path, 20)
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.png").mkdir()
    picture(20).save(tmp_path / "folder.png" / "inside.png")
    images = open_images(tmp_path, CONFIG)
    assert len(everything(images)[0]) == 21 and not images.skipped


def tar_with(path: Path, member: tarfile.TarInfo, content: bytes = b"") -> Path:
    """A tar of twenty pictures and one more member."""
    tar_of(flat_folder(path.with_suffix(""), 20))
    with tarfile.open(path, "a") as tar:
        tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_members_of_a_tar_that_are_no_files_are_not_listed(tmp_path, kind):
    member = tarfile.TarInfo("m.png")
    member.type, member.linkname = kind, "/etc/passwd"
    images = open_images(tar_with(tmp_path / "x.tar", member), CONFIG)
    assert len(everything(images)[0]) == 20 and not images.skipped


@pytest.mark.parametrize("name", ["../../outside.png", "/outside.png", "sub/../../outside.png"])
def test_members_of_a_tar_are_read_where_they_lie(tmp_path, name):
    whole = io.BytesIO()
    picture(20).save(whole, "PNG")
    member = tarfile.TarInfo(name)
    member.size = len(whole.getvalue())
    path = tar_with(tmp_path / "sub" / "x.tar", member, whole.getvalue())
    before = sorted(tmp_path.rglob("*"))
    assert len(everything(open_images(path, CONFIG))[0]) in (20, 21)
    assert sorted(tmp_path.rglob("*")) == before and not Path("/outside.png").exists()


@pytest.mark.parametrize("inside", [False, True])
def test_a_tar_with_a_member_of_terabytes_is_refused_at_once(tmp_path, inside):
    member = tarfile.TarInfo("enormous.png")
    member.size = 8 * 10**12
    path = tar_of(flat_folder(tmp_path / "x", 3))
    content = path.read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512) + member.tobuf(tarfile.GNU_FORMAT) + bytes(1000)
    if inside:
        outer = tarfile.TarInfo("x.tar")
        outer.size = len(content)
        path = tar_with(tmp_path / "y.tar", outer, content)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"\.tar cannot be read as a tar: unexpected end of data; make it again, or give the folder"):
        open_images(path, CONFIG)


def test_more_than_five_percent_bad_is_an_error(tmp_path):
    flat_folder(tmp_path, 38)
    for name in ("bad1.jpg", "bad2.jpg"):
        (tmp_path / name).write_bytes(b"no")
    assert len(everything(open_images(tmp_path, CONFIG))[0]) == 38  # 2 of 40 are 5 %
    (tmp_path / "bad3.jpg").write_bytes(b"no")
    with pytest.raises(InputError, match="3 of 41 images cannot be read, more than 5%: bad1.jpg: no image; bad2.jpg: .* Remove or replace"):
        everything(open_images(tmp_path, CONFIG))


def test_other_and_hidden_files_are_not_listed(tmp_path):
    flat_folder(tmp_path, 2)
    (tmp_path / ".cache").mkdir()
    for name in ("a.txt", "labels.json", "._000.png", ".cache/b.png"):
        (tmp_path / name).write_bytes(b"x")
    for source in (tmp_path, tar_of(tmp_path)):
        images = open_images(source, CONFIG)
        assert images.num_listed == 2 and not images.labelled


def test_array_of_uint8_is_transformed_in_either_layout(tmp_path):
    pixels = np.stack([np.asarray(picture(i)) for i in range(4)])
    root = flat_folder(tmp_path / "x", 4)
    expected = everything(open_images(root, CONFIG))[0]
    for name, array in (("nhwc", pixels), ("nchw", pixels.transpose(0, 3, 1, 2).copy())):
        save_file({"images": torch.from_numpy(array), "labels": torch.tensor([3, 1, 2, 0])}, tmp_path / f"{name}.safetensors")
        images = open_images(tmp_path / f"{name}.safetensors", CONFIG)
        got, labels = everything(images)
        assert torch.equal(got, expected) and labels == [3, 1, 2, 0] and images.labelled


def test_array_of_float32_is_taken_as_it_is(tmp_path):
    file, pixels = tmp_path / "images.safetensors", torch.randn(40, 3, 16, 16)
    save_file({"images": pixels}, file, metadata={"format": "vitq-images/1"})
    images = open_images(file, CONFIG, batch_size=7)
    assert torch.equal(everything(images)[0], pixels) and not images.labelled
    before = open_images(file, CONFIG, 5).digest
    pixels[7] = torch.nan
    save_file({"images": pixels}, file, metadata={"format": "vitq-images/1"})
    images = open_images(file, CONFIG)
    assert len(everything(images)[0]) == 39 and images.skipped == ["row 7: NaN or infinity"]
    assert open_images(file, CONFIG, 5).digest != before


@pytest.mark.parametrize(("tensors", "format", "text"), [
    ({"images": torch.zeros(2, 3, 16, 16)}, "pt", "`images` is F32 .* with format pt; it must be uint8"),
    ({"images": torch.zeros(2, 3, 8, 8)}, "vitq-images/1", r"it must be .* float32 \(N, 3, 16, 16\)"),
    ({"images": torch.zeros(2, 16, 16, dtype=torch.uint8)}, "pt", "it must be uint8"),
    ({"pixels": torch.zeros(1)}, "pt", "`images` is None"),
    ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "labels": torch.zeros(3, dtype=torch.int64)}, "pt", r"must be int64 \(2,\)"),
    ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "labels": torch.zeros(2)}, "pt", "`labels` must be int64"),
    ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "labels": torch.tensor([0, -1])}, "pt", "`labels` must be int64"),
    ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "labels": torch.tensor([0, 2])}, "pt", "holds label 2, but the model has 2"),
    ({"images": torch.zeros(0, 3, 4, 4, dtype=torch.uint8)}, "pt", "holds no images"),
])  # fmt: skip
def test_arrays_that_cannot_be_used(tmp_path, tensors, format, text):
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": format})
    with pytest.raises(InputError, match=text):
        open_images(tmp_path / "a.safetensors", CONFIG, class_names=("a", "b"))


def test_sources_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for name in ("cut.tar", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"damaged")
    tar_of(tmp_path / "empty")
    for name, text in (
        ("gone", "does not exist; give a folder of images, a .tar of one"), ("empty", r"holds no images \(.png, .jpg, .jpeg\); give"),
        ("empty.tar", "holds no images"), ("notes.txt", "is no source of images; give"), ("cut.tar", "cannot be read as a tar"),
        ("cut.safetensors", "cannot be read: .*make it again"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=text):
            open_images(tmp_path / name, CONFIG)


def test_arguments_that_cannot_be_used(tmp_path):
    flat_folder(tmp_path, 1)
    with pytest.raises(InputError, match="0 images in batches of 32 .* give at least 1"):
        open_images(tmp_path, CONFIG, 0)
    for wrong in ({"interpolation": "nonsense"}, {"mean": "abc"}, {"input_size": [3, 16]}, {"input_size": [4, 16, 16]}):
        with pytest.raises(InputError, match="the preprocessing .* correct the model's config"):
            open_images(tmp_path, {**CONFIG, **wrong})


def test_pixels_are_let_go_batch_by_batch(tmp_path):
    images = open_images(flat_folder(tmp_path, 40), CONFIG, None, batch_size=4)

    def alive() -> int:
        gc.collect()
        return sum(type(item) is torch.Tensor and item.shape[-2:] == (16, 16) for item in gc.get_objects())

    gc.freeze()  # what was there before, a million objects, is left aside
    try:
        counts = [alive() for _ in images]
        assert len(counts) == 10 and len(set(counts[1:])) == 1
        before, kept = alive(), list(images)
        assert alive() == before + len(kept)  # what is kept is counted
    finally:
        gc.unfreeze()


def test_description_is_what_the_transform_does():
    assert describe(CONFIG) == (
        "RGB, resize the short side to 20 (bicubic), center crop to 16x16, in [0, 1] minus mean (0.5, 0.4, 0.3) over std (0.2, 0.2, 0.3)"
    )
    assert "resize the long side to 20 (bicubic), pad to 16x16" in describe({**CONFIG, "crop_mode": "border"})
    for extent in (16, 224, 384):
        for crop_pct in (0.875, 0.9, 0.95, 1.0):
            config = {**CONFIG, "input_size": [3, extent, extent], "crop_pct": crop_pct}
            resize = create_transform(**config, is_training=False).transforms[0].size
            assert f"short side to {resize} (" in describe(config)


def test_preprocessing_against_plain_arithmetic(tmp_path):
    picture(3, 32, 16).save(tmp_path / "a.png")
    config = {**CONFIG, "crop_pct": 1.0}
    pixels = functional.pil_to_tensor(picture(3, 32, 16))[:, :, 8:24].float() / 255
    expected = (pixels - torch.tensor(CONFIG["mean"])[:, None, None]) / torch.tensor(CONFIG["std"])[:, None, None]
    assert torch.allclose(single(tmp_path, config), expected, atol=1e-6)
