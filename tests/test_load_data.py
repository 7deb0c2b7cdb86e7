"""Data: every accepted form, the cache, the splits, and samplers tested like dice."""

from fewshot.experiment import UserError
from fewshot.images import cache, glyphs, omniglot, pictures
from fewshot.tasks import episodes, splits
from fewshot.tasks.episodes import EpisodeSampler, draw_distinct
from fewshot.tasks.splits import load_dataset

import hashlib
import http.server
import itertools
import math
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import REPO, draw_folder, has_omniglot, known_dataset, one_line_error

from load_data import DataGenerator

# ----------------------------------------------------------------------------- the samplers


def decode(images):
    """(class, drawing) of images of `known_dataset`, for float images [..., 784]."""
    values = (images[..., :2] * 255).round().long()
    return values[..., 0], values[..., 1]


@pytest.mark.parametrize("N, K, Q, B", [(5, 1, 1, 3), (2, 3, 4, 7), (20, 5, 15, 2), (30, 1, 19, 1)])
def test_sampler_shapes_and_labels_match_images(N, K, Q, B):
    sampler = EpisodeSampler(known_dataset(), "train", N, K, Q, B, seed=3)
    support, support_labels, query, query_labels = sampler.sample()
    assert support.shape == (B, N * K, 1, 28, 28) and query.shape == (B, N * Q, 1, 28, 28)
    assert support.dtype == query.dtype == torch.float32
    assert support_labels.dtype == query_labels.dtype == torch.int64
    assert torch.equal(support_labels, torch.arange(N).repeat_interleave(K).expand(B, -1))
    support_class, support_drawing = decode(support.flatten(2))
    query_class, query_drawing = decode(query.flatten(2))
    for b in range(B):
        class_of_label = {int(y): int(c) for y, c in zip(support_labels[b], support_class[b], strict=True)}
        assert len(set(class_of_label.values())) == N
        assert [class_of_label[int(y)] for y in query_labels[b]] == query_class[b].tolist()
        assert query_labels[b].bincount().tolist() == [Q] * N
        used = list(zip(support_class[b].tolist(), support_drawing[b].tolist(), strict=True))
        used += zip(query_class[b].tolist(), query_drawing[b].tolist(), strict=True)
        assert len(set(used)) == N * (K + Q)  # support and query are disjoint


def test_one_hot_labels_are_those_of_the_integers():
    integer = EpisodeSampler(known_dataset(), "train", 5, 2, 3, 4, seed=1).sample()
    one_hot = EpisodeSampler(known_dataset(), "train", 5, 2, 3, 4, seed=1).sample(one_hot=True)
    for i in (1, 3):
        assert one_hot[i].dtype == torch.float32 and one_hot[i].shape == (*integer[i].shape, 5)
        assert torch.equal(one_hot[i].argmax(-1), integer[i]) and torch.all(one_hot[i].sum(-1) == 1)


def test_course_layout():
    N, K, B = 4, 3, 50
    images, labels = EpisodeSampler(known_dataset(), "train", N, K, 1, B, seed=5).sample_rows()
    assert images.shape == (B, K + 1, N, 784) and labels.shape == (B, K + 1, N, N)
    assert images.dtype == labels.dtype == torch.float32
    assert torch.equal(labels[:, :K], torch.eye(N).expand(B, K, N, N))
    classes, drawings = decode(images)
    assert torch.equal(classes[:, :1].expand(B, K, N), classes[:, :K])
    assert torch.equal(classes[:, 0].gather(1, labels[:, K].argmax(-1)), classes[:, K])
    pairs = (classes * 20 + drawings).flatten(1).sort(dim=1).values
    assert (pairs[:, 1:] != pairs[:, :-1]).all()


def assert_uniform(counts, expected, sigmas=5.0):
    """All observed counts within five standard deviations of a binomial with mean `expected`."""
    deviation = (counts - expected).abs().max() / math.sqrt(expected)
    assert deviation < sigmas, f"{deviation:.1f} sigma"


@pytest.mark.parametrize("n, k", [(12, 3), (4, 3), (4, 4), (5, 1)])  # by rejection, and by keys
def test_draw_distinct_is_uniform_over_ordered_choices(n, k):
    drawn = draw_distinct(60_000, n, k, torch.Generator().manual_seed(1))
    assert drawn.min() >= 0 and drawn.max() < n
    codes = (drawn * n ** torch.arange(k)).sum(dim=1)
    counts = codes.bincount(minlength=n**k)
    possible = torch.tensor([sum(c * n**i for i, c in enumerate(p)) for p in itertools.permutations(range(n), k)])
    assert counts.sum() == counts[possible].sum()  # nothing but distinct choices
    assert_uniform(counts[possible], 60_000 / len(possible))


def test_class_image_and_query_order_frequencies():
    B, N, K = 20_000, 3, 1
    images, labels = EpisodeSampler(known_dataset(), "train", N, K, 1, B, seed=11).sample_rows()
    classes, drawings = decode(images)
    assert_uniform(classes[:, 0].flatten().bincount(minlength=30), B * N / 30)
    for row in (0, 1):
        pairs = classes[:, row] * 20 + drawings[:, row]
        assert_uniform(pairs.flatten().bincount(minlength=600), B * N / 600)
    order = labels[:, -1].argmax(-1)
    codes = order[:, 0] * 9 + order[:, 1] * 3 + order[:, 2]
    counts = codes.bincount(minlength=27)
    assert (counts > 0).sum() == 6
    assert_uniform(counts[counts > 0], B / 6)
    # The order of the queries says nothing about the order of the classes.
    assert_uniform(classes[:, 1, 0].bincount(minlength=30), B / 30)


def test_seed_state_and_reset():
    def stream(sampler, n=3):
        return torch.cat([sampler.sample_rows()[0] for _ in range(n)])

    make = lambda seed: EpisodeSampler(known_dataset(), "train", 5, 1, 1, 4, seed=seed)
    first, again, other = make(1), make(1), make(2)
    a = stream(first)
    assert torch.equal(a, stream(again)) and not torch.equal(a, stream(other))
    state = first.state_dict()
    ahead = stream(first)
    again.load_state_dict(state)
    assert torch.equal(ahead, stream(again))
    first.reset()
    assert torch.equal(a, stream(first))


def test_rotations_are_new_classes():
    data = known_dataset(num_classes=5)
    sampler = EpisodeSampler(data, "train", 20, 1, 1, 200, rotations=True)
    assert sampler.num_available == 20
    originals = torch.from_numpy(data.images)
    assert torch.equal(sampler.images[100:200], originals.rot90(1, (2, 3)))
    support, _, query, labels = sampler.sample()
    # The marked corner of a support image and its query are turned alike.
    corner = lambda x: torch.stack([x[..., 0, 1], x[..., -2, 0], x[..., -1, -2], x[..., 1, -1]], -1)
    turned = lambda x: (corner(x[:, :, 0]) > 0).float()
    has_drawing = (turned(support).sum(-1) > 0).gather(1, labels) & (turned(query).sum(-1) > 0)
    same = (turned(support).gather(1, labels[..., None].expand(-1, -1, 4)) == turned(query)).all(-1)
    assert has_drawing.float().mean() > 0.8 and same[has_drawing].all()


def test_within_alphabet_and_too_large_alphabet():
    sampler = EpisodeSampler(known_dataset(), "train", 10, 1, 1, 300, within_alphabet=True)
    classes, _ = decode(sampler.sample_rows()[0])
    alphabets = classes.flatten(1) // 10
    assert (alphabets == alphabets[:, :1]).all()
    assert_uniform(alphabets[:, 0].bincount(minlength=3), 100)
    with pytest.raises(UserError, match="no alphabet"):
        EpisodeSampler(known_dataset(), "train", 11, 1, 1, within_alphabet=True)


def test_fixed_labels_tie_a_class_to_one_label():
    sampler = EpisodeSampler(known_dataset(), "train", 4, 1, 1, 500, fixed_labels=True)
    images, labels = sampler.sample_rows()
    classes, _ = decode(images)
    assert torch.equal(classes % 4, labels.argmax(-1))


def test_shards_make_up_the_whole_meta_batch():
    make = lambda shard: EpisodeSampler(known_dataset(), "train", 5, 1, 2, 6, seed=4, shard=shard)
    whole, parts = make((0, 1)), [make((rank, 3)) for rank in range(3)]
    for _ in range(2):
        expected = whole.sample()
        got = [part.sample() for part in parts]
        for i in range(4):
            assert torch.equal(expected[i], torch.cat([g[i] for g in got]))
    with pytest.raises(UserError, match="--meta_batch_size 6 does not divide over 4"):
        make((0, 4))


def test_classes_of_different_size():
    data = known_dataset(num_classes=3)
    keep = np.r_[0:2, 20:25, 40:60]
    data = data._replace(images=data.images[keep], counts=np.array([2, 5, 20]))
    sampler = EpisodeSampler(data, "train", 3, 1, 1, 9000, seed=1)
    classes, drawings = decode(sampler.sample_rows()[0])
    for c, count in enumerate((2, 5, 20)):
        seen = drawings[classes == c].bincount()
        assert len(seen) == count
        assert_uniform(seen, 18_000 / count)
    with pytest.raises(UserError, match="--num_shot 1 plus --num_query 2 is more than the 2 images of .*character000"):
        EpisodeSampler(data, "train", 3, 1, 2)


def test_jitter_distorts_a_little_and_keeps_the_labels():
    data = load_dataset("glyphs")
    make = lambda jitter, **kw: EpisodeSampler(data, "train", 5, 1, 1, 8, seed=1, jitter=jitter, **kw)
    plain, jittered = make(0.0).sample_rows(), make(0.1).sample_rows()
    assert torch.equal(plain[1], jittered[1]) and jittered[0].min() >= 0 and jittered[0].max() <= 1
    ink = [x[0].flatten(0, 2) for x in (plain, jittered)]
    assert not torch.equal(*ink)
    assert torch.nn.functional.cosine_similarity(*ink).mean() > 0.7  # still the same characters
    halves = [make(0.1, shard=(rank, 2)).sample_rows()[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), jittered[0])
    still = episodes.distort(ink[0].view(-1, 1, 28, 28), torch.zeros(len(ink[0]), 4))
    assert torch.allclose(still.flatten(1), ink[0], atol=1e-5)


def test_shift_moves_the_ink_within_its_limit():
    """A dot in the middle: its centre moves evenly over the square of the limit, and nowhere without a shift."""
    data = known_dataset()
    images = np.zeros_like(data.images)
    images[:, :, 13:15, 13:15] = 255
    data = data._replace(images=images)
    grid = torch.arange(28.0) - 13.5

    def centres(**options):
        _, _, query, _ = EpisodeSampler(data, "train", 5, 1, 15, 20, seed=1, **options).sample()
        x = query.flatten(0, 2) / query.flatten(0, 2).sum(dim=(1, 2), keepdim=True)
        return torch.stack([(x.sum(dim=1) * grid).sum(dim=1), (x.sum(dim=2) * grid).sum(dim=1)])

    moved = centres(shift=0.2)  # of half the size: 2.8 pixels
    assert moved.abs().max() < 2.8 + 1e-3 and moved.abs().max() > 2.6
    assert abs(moved.std() - 2.8 / 3**0.5) < 0.1 and moved.mean(dim=1).abs().max() < 0.15
    assert centres().abs().max() < 1e-4


def test_more_classes_than_the_split_has():
    with pytest.raises(UserError, match="--num_classes 31 is more than the 30 classes"):
        EpisodeSampler(known_dataset(), "train", 31, 1, 1)


# ------------------------------------------------------------------------- the course's interface


def test_data_generator_like_the_course():
    torch.manual_seed(0)
    generator = DataGenerator(5, 3, "train", config={"dataset": "glyphs"})
    assert isinstance(generator, torch.utils.data.IterableDataset)
    images, labels = generator._sample()
    assert images.shape == (3, 5, 784) and labels.shape == (3, 5, 5)
    assert images.dtype == labels.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1
    assert 0.02 < images.mean() < 0.3  # ink is 1, paper is 0
    assert torch.equal(labels[:2], torch.eye(5).expand(2, 5, 5))
    assert sorted(labels[2].argmax(-1).tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="batch_type 'meta' is unknown"):
        DataGenerator(5, 3, "meta", config={"dataset": "glyphs"})


@pytest.mark.parametrize("workers", [0, 2])
def test_data_generator_streams(workers):
    def epochs(seed):
        torch.manual_seed(seed)
        generator = DataGenerator(3, 2, "train", config={"dataset": "glyphs"})
        loader = torch.utils.data.DataLoader(generator, batch_size=4, num_workers=workers)
        return [torch.stack([i for (i, _), _ in zip(loader, range(4), strict=False)]) for _ in range(2)]

    first, second = epochs(1)
    assert not torch.equal(first, second)  # epochs differ
    tasks = torch.cat([first, second]).reshape(-1, 2 * 3 * 784)
    assert len(tasks.unique(dim=0)) == len(tasks) == 32  # and so do workers
    again = epochs(1)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, epochs(2)[0])


def test_workers_draw_the_same_distribution():
    """With 0 and 4 workers every class, every label order of the queries is equally likely (chi-square, p > 1e-4)."""
    for workers in (0, 4):
        torch.manual_seed(3)
        generator = DataGenerator(3, 2, "val", config={"dataset": "glyphs"})
        of = {image.numpy().tobytes(): int(i) // 20 for i, image in enumerate(generator.sampler.images.flatten(1))}
        loader = torch.utils.data.DataLoader(generator, batch_size=50, num_workers=workers)
        classes, orders = torch.zeros(len(of) // 20 + 1), torch.zeros(6)
        for (images, labels), _ in zip(loader, range(40), strict=False):
            for image in (images[:, 0].flatten(0, 1) * 255).round().to(torch.uint8):
                classes[of[image.numpy().tobytes()]] += 1
            code = labels[:, 1].argmax(dim=-1) @ torch.tensor([9, 3, 1])
            for i, value in enumerate(code.unique()):
                orders[i] += (code == value).sum()
        classes = classes[classes > 0]
        assert len(classes) == 100 and classes.sum() == 6000 and orders.sum() == 2000
        for counts, limit in ((classes, 161.0), (orders, 26.0)):
            expected = counts.sum() / len(counts)
            assert ((counts - expected) ** 2 / expected).sum() < limit, workers


# --------------------------------------------------------------------------- splits and datasets


def test_splits_have_the_documented_sizes_and_share_no_class():
    for split, sizes in (("course", (1100, 100, 423)), ("lake", (864, 100, 659))):
        splits = load_dataset("glyphs", split=split).splits
        assert tuple(len(splits[part]) for part in ("train", "val", "test")) == sizes
        assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(1623))
    assert set(splits["test"]) == set(range(964, 1623))


def test_splits_are_the_same_on_every_machine():
    names = load_dataset("glyphs").names
    found = splits.make_splits("glyphs", names, "course")
    assert found["test"][:5].tolist() == [917, 183, 1441, 166, 738]
    # The order in which a file system lists the characters does not matter.
    turned = splits.make_splits("glyphs", names[::-1], "course")
    assert {names[i] for i in found["test"]} == {names[::-1][i] for i in turned["test"]}


def test_glyphs_are_characters():
    data = load_dataset("glyphs")
    assert data.images.shape == (1623 * 20, 1, 28, 28) and data.images.dtype == np.uint8
    assert 0.05 < data.images.mean() / 255 < 0.2
    assert (data.images.reshape(len(data.images), -1).max(1) > 128).all()  # nobody drew nothing
    flat = torch.from_numpy(data.images).view(1623, 20, -1).float()
    within = (flat[:, 0] - flat[:, 1]).norm(dim=1).mean()
    between = (flat[:-1, 0] - flat[1:, 1]).norm(dim=1).mean()
    assert within < 0.85 * between
    assert np.array_equal(glyphs.draw_glyphs(30), glyphs.draw_glyphs(30))


@pytest.fixture
def small_omniglot(tmp_path, monkeypatch):
    """Both archives with 4 and 3 invented characters in place of 964 and 659, and their digests."""
    drawings = glyphs.draw_glyphs(7, image_size=105).reshape(7, 20, 105, 105) > 127
    archives = {}
    parts = (("images_background", "Latin", range(4)), ("images_evaluation", "ULOG", range(4, 7)))
    for part, alphabet, characters in parts:
        sha = hashlib.sha256()
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as archive:
            for c in characters:
                for d in range(20):
                    paper = ~drawings[c, d]
                    png = iio.imwrite("<bytes>", paper, extension=".png")
                    archive.writestr(f"{part}/{alphabet}/character{c:02d}/{c:04d}_{d:02d}.png", png)
                    sha.update(np.packbits(paper).tobytes())
        archives[part] = (len(characters), sha.hexdigest())
    monkeypatch.setattr(omniglot, "ARCHIVES", archives)
    for room in (omniglot, cache):
        monkeypatch.setattr(room, "CACHE_FOLDER", tmp_path / "cache")
    monkeypatch.delenv("OMNIGLOT_DIR", raising=False)
    return tmp_path


def packed(folder):
    data = load_dataset("omniglot", str(folder))
    return data.images, data.names


def test_every_form_gives_the_same_array(small_omniglot, tmp_path):
    from_archives, names = packed(small_omniglot)
    assert from_archives.shape == (140, 1, 28, 28)
    assert names == [f"Latin/character{c:02d}" for c in range(4)] + [f"ULOG/character{c:02d}" for c in range(4, 7)]
    assert 0.03 < from_archives.mean() / 255 < 0.3  # ink is 255

    extracted = tmp_path / "extracted"
    for part in omniglot.ARCHIVES:
        with zipfile.ZipFile(small_omniglot / f"{part}.zip") as archive:
            archive.extractall(extracted)
    assert np.array_equal(packed(extracted)[0], from_archives) and packed(extracted)[1] == names

    resized = tmp_path / "course" / "omniglot_resized"
    for name, images in zip(names, from_archives.reshape(7, 20, 28, 28), strict=True):
        (resized / name).mkdir(parents=True)
        for d, image in enumerate(images):
            iio.imwrite(resized / name / f"{d:02d}.png", 255 - image)
    for folder in (resized, resized.parent):
        assert np.array_equal(packed(folder)[0], from_archives) and packed(folder)[1] == names
    # The files are left as they were: nothing is written into a folder that was only pointed at.
    assert {p.suffix for p in resized.parent.rglob("*") if p.is_file()} == {".png"}


def test_cache_is_used_checked_and_rebuilt(small_omniglot, monkeypatch, capsys):
    images, _ = packed(small_omniglot)
    packed_file = next((small_omniglot / "cache").iterdir())
    whole = packed_file.read_bytes()
    monkeypatch.setattr(omniglot, "read_image", lambda *_: pytest.fail("an image was opened"))
    assert np.array_equal(packed(small_omniglot)[0], images)
    monkeypatch.undo()  # also undoes small_omniglot: set it again
    archives = {"images_background": (4, None), "images_evaluation": (3, None)}
    monkeypatch.setattr(omniglot, "ARCHIVES", archives)
    for room in (omniglot, cache):
        monkeypatch.setattr(room, "CACHE_FOLDER", small_omniglot / "cache")
    monkeypatch.setattr(omniglot, "check_pixels", lambda *_: None)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], b"", bytes(flipped), b"not a zip" * 100):
        packed_file.write_bytes(damaged)
        assert np.array_equal(packed(small_omniglot)[0], images)
        assert "is damaged" in capsys.readouterr().err
        assert packed_file.read_bytes() == whole


def test_failed_cache_write_does_not_stop_the_run(small_omniglot, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert len(packed(small_omniglot)[0]) == 140
    assert "cannot write the cache" in capsys.readouterr().err
    assert list((small_omniglot / "cache").iterdir()) == []


def rewrite(archive, change):
    """Copy an archive, letting change(name, data) -> (name, data) or None alter each member."""
    with zipfile.ZipFile(archive) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(archive, "w") as new:
        for member in filter(None, (change(*m) for m in members)):
            new.writestr(*member)


def test_damaged_archives_are_refused_with_the_remedy(small_omniglot):
    archive = small_omniglot / "images_background.zip"
    whole = archive.read_bytes()

    def refused(match):
        with pytest.raises(UserError, match=match):
            packed(small_omniglot)
        archive.write_bytes(whole)

    archive.write_bytes(whole[: len(whole) // 2])
    refused("images_background.zip is damaged .* download it again")
    archive.write_bytes(b"")
    refused("is damaged")
    flipped = bytearray(whole)
    flipped[200] ^= 255
    archive.write_bytes(bytes(flipped))
    refused("damaged|cannot read the image")
    rewrite(archive, lambda name, data: None if name.endswith("0003_19.png") else (name, data))
    refused("character03 has 19 drawings, want 4 with 20")
    rewrite(archive, lambda name, data: None if "character03" in name else (name, data))
    refused("3 characters, want 4 with 20")
    white = iio.imwrite("<bytes>", np.ones((105, 105), bool), extension=".png")
    rewrite(archive, lambda name, data: (name, white if name.endswith("0003_19.png") else data))
    refused("wrong pixel digest")
    rewrite(archive, lambda name, data: (name, b"text" if name.endswith("0003_19.png") else data))
    refused("cannot read the image .*0003_19.png")
    rewrite(archive, lambda name, data: ("../../" + name if name.endswith("0003_19.png") else name, data))
    refused("unsafe path")
    archive.unlink()
    with pytest.raises(UserError, match=r"has images_evaluation.zip but no images_background; put"):
        packed(small_omniglot)


def test_missing_folder_and_fallback(small_omniglot, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="--data_folder .*nowhere holds no Omniglot"):
        load_dataset("omniglot", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="cannot download .* put images_background.zip"):
        load_dataset("omniglot")
    monkeypatch.setattr(glyphs, "draw_glyphs", lambda n, size: np.full((n * 20, 1, size, size), 9, np.uint8))
    data = load_dataset("auto")
    assert data.name == "glyphs" and "GLYPHS" in capsys.readouterr().err
    monkeypatch.setenv("OMNIGLOT_DIR", str(small_omniglot))
    assert load_dataset("auto").name == "omniglot"
    (small_omniglot / "images_evaluation.zip").write_bytes(b"damaged")
    with pytest.raises(UserError, match="images_evaluation.zip is damaged"):
        load_dataset("auto")  # damaged data is an error, not a reason for glyphs


def test_download(small_omniglot, tmp_path, monkeypatch):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        asked = 0

        def __init__(self, *args):
            super().__init__(*args, directory=str(small_omniglot))

        def do_GET(self):
            Quiet.asked += 1
            if Quiet.asked == 1:
                return self.send_error(503)  # the first try fails
            return super().do_GET()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(omniglot, "DOWNLOAD_URL", f"http://127.0.0.1:{server.server_port}/")
    md5 = {p: hashlib.md5((small_omniglot / f"{p}.zip").read_bytes()).hexdigest() for p in omniglot.ARCHIVES}
    monkeypatch.setattr(omniglot, "ARCHIVE_MD5", md5 | {"images_evaluation": "0" * 32})
    with pytest.raises(UserError, match="images_evaluation.zip .the download is damaged"):
        load_dataset("omniglot")
    assert Quiet.asked == 1 + 1 + 3
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["images_background.zip"]  # no partial file is left
    monkeypatch.setattr(omniglot, "ARCHIVE_MD5", md5)
    assert len(load_dataset("omniglot").images) == 140
    server.shutdown()


def make_folder(root, classes, images_each, shape=(40, 30, 3), bright=False):
    rng = np.random.default_rng(list(root.name.encode()))
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(images_each):
            image = rng.integers(150 if bright else 0, 256 if bright else 200, shape, dtype=np.uint8)
            iio.imwrite(root / name / f"{i}.png", image)


def test_folder_datasets(tmp_path):
    make_folder(tmp_path / "flat", [f"class {i} é" for i in range(10)], 4)
    data = load_dataset("folder", str(tmp_path / "flat"), image_size=32)
    assert data.images.shape == (40, 3, 32, 32) and data.counts.tolist() == [4] * 10
    assert [len(data.splits[p]) for p in ("train", "val", "test")] == [6, 2, 2]
    support, *_ = EpisodeSampler(data, "train", 2, 1, 1).sample()
    assert support.shape == (1, 2, 3, 32, 32)

    for part, n in (("train", 4), ("val", 2), ("test", 3)):
        make_folder(tmp_path / "mini" / part, [f"n{part}{i}" for i in range(n)], 3, shape=(84, 84, 3))
    data = load_dataset("folder", str(tmp_path / "mini"), image_size=84)
    assert [len(data.splits[p]) for p in ("train", "val", "test")] == [4, 2, 3]
    assert all(data.names[i].startswith("val/") for i in data.splits["val"])

    make_folder(tmp_path / "paper", "abc", 2, shape=(28, 28), bright=True)
    paper = load_dataset("folder", str(tmp_path / "paper"))
    assert paper.images.shape == (6, 1, 28, 28) and paper.images.max() <= 255 - 150  # grey: ink is bright


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="--dataset folder needs --data_folder"):
        load_dataset("folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has 0 classes"):
        load_dataset("folder", str(tmp_path / "empty"))
    make_folder(tmp_path / "bad", "abc", 2)
    (tmp_path / "bad" / "a" / "0.png").write_text("not a picture")
    with pytest.raises(UserError, match="has 2 classes .*1 classes hold no readable picture"):
        (tmp_path / "bad" / "a" / "1.png").write_text("not a picture either")
        load_dataset("folder", str(tmp_path / "bad"))


def test_resize_keeps_the_mean_and_smooths():
    checks = np.indices((105, 105)).sum(0) % 2 * np.uint8(255)
    small = pictures.resize(checks[None, None], 28)
    assert small.shape == (1, 1, 28, 28) and small.dtype == np.uint8
    assert abs(small.mean() - 127.5) < 2 and small.std() < 10  # a nearest-pixel resize has std 127


@pytest.mark.thorough
def test_concurrent_first_runs_share_one_cache(tmp_path):
    """Two processes that begin to pack the same pictures at the same moment."""
    draw_folder(tmp_path / "pictures", [f"class{c}" for c in range(10)], 40)
    code = f"import sys, pathlib; sys.path.insert(0, {str(REPO)!r}); import load_data\n"
    code += "pathlib.Path(sys.argv[1]).touch()\n"
    code += "while not (pathlib.Path('0').exists() and pathlib.Path('1').exists()): pass\n"
    code += "print(load_data.load_dataset('folder', 'pictures').images.sum())"
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(i)], cwd=tmp_path, stdout=subprocess.PIPE) for i in range(2)
    ]
    outs = [run.communicate(timeout=3600)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0] and outs[0] == outs[1] and int(outs[0]) > 0
    assert len(list((tmp_path / "data").iterdir())) == 1


@has_omniglot
def test_real_omniglot():
    data = load_dataset("omniglot")
    assert data.images.shape == (1623 * 20, 1, 28, 28)
    assert len({n.split("/")[0] for n in data.names[:964]}) == 30
    assert {n.split("/")[0] for n in data.names[964:]} == omniglot.EVALUATION_ALPHABETS
    assert abs(data.images.mean() / 255 - 0.0806) < 0.001


def test_command_line(run_script, tmp_path, work):
    result = run_script("load_data.py", "--dataset", "glyphs")
    assert result.returncode == 0, result.stderr
    assert "1100 classes" in result.stdout and (work / "runs" / "episode.png").stat().st_size > 5000
    assert iio.imread(work / "runs" / "classes.png").shape == (560, 560)
    one_line_error(run_script("load_data.py", "--dataset", "folder", "--data_folder", tmp_path / "no"), "--data_folder")


def test_unknown_names():
    with pytest.raises(UserError, match="--dataset cifar is unknown"):
        load_dataset("cifar")
    with pytest.raises(UserError, match="--image_size 4 is out of range"):
        load_dataset("glyphs", image_size=4)
    assert Path("data").is_dir()
