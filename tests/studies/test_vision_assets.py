"""What the vision study is made of: its images, and who sees which."""

import numpy as np
import pytest
import torch
from datasets import load_dataset

from studies.vision import prepare
from studies.vision.glyphs import SYMBOLS, distort
from studies.vision.prepare import CLOTHES, LETTERS, clothes, save_rows


@pytest.fixture
def drawings():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 40, 40, generator=generator)


def test_the_clothes_are_enough_and_each_comes_once():
    images, labels, names = clothes()
    assert len(images) >= 3000
    assert images.shape[1:] == (28, 28)
    assert images.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in images}) == len(images)
    assert names == CLOTHES
    assert labels.unique().tolist() == list(range(len(names)))


def test_the_base_learns_no_character_of_a_task():
    symbols = {chr(point) for points in SYMBOLS.values() for point in points}
    assert len(symbols) > 100
    assert not symbols & set(LETTERS + LETTERS.lower() + "0123456789")


def test_images_that_are_drawn_depend_on_the_seed_alone(drawings):
    images, again, others = (
        distort(drawings, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert images.shape == (6, 28, 28)
    assert torch.equal(images, again)
    assert not torch.equal(images, others)


def test_an_expert_is_trained_on_no_image_that_the_study_sees():
    studied, trained = prepare.parts(5000)
    assert len(studied) == 1500
    assert sorted([*studied.tolist(), *trained.tolist()]) == list(range(5000))


def test_rows_are_read_as_they_were_saved(tmp_path, drawings):
    images = distort(drawings, torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    save_rows(images, labels, ("a", "b", "c"), tmp_path / "data" / "rows.parquet")
    rows = load_dataset(
        "parquet",
        data_files=str(tmp_path / "data" / "rows.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert rows["label"][:] == ["a", "c", "b", "b", "a", "c"]
    for row, image in zip(rows, images, strict=True):
        assert np.array_equal(np.asarray(row["image"]), image.numpy())
