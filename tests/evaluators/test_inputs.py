"""Texts and images become the batches that an encoder is given."""

import json
from itertools import accumulate, combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, T5Config

from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.inputs import Images, Processors, Texts, cut_by_length
from tests.evaluators.classifiers import WORDS, make_experts, texts


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Make a folder with the base of each kind of encoder."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("bert", "vit")}
    for kind, folder in folders.items():
        make_experts(folder, kind)
    return {kind: folder / "base" for kind, folder in folders.items()}


class Unread:
    """Images on a disk: each is read, and counted, when it is looked up."""

    def __init__(self, files):
        self.files, self.n_read = files, 0

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        self.n_read += 1
        with Image.open(self.files[i]) as image:
            image.load()
            return image


@pytest.fixture
def images(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        Image.new("RGB", (12, 10), (50 * i, 200, 10)).save(file)
    return Unread(files)


@pytest.mark.parametrize("batch_tokens", [1, 24, 64, 4096])
def test_texts_are_batched_by_length_and_padded_as_their_tokenizer_does(encoders, batch_tokens):
    inputs = Texts([texts()], Processors(encoders["bert"], None), batch_tokens, "tasks.t")
    tokenizer = AutoTokenizer.from_pretrained(encoders["bert"])
    examples = [5, 3, 3, 17, 0, 11]
    places = []
    for batch, tokens in inputs.batches(examples):
        batch_texts = [texts()[examples[place]] for place in batch]
        expected = tokenizer(batch_texts, padding=True, truncation=True, return_tensors="pt")
        assert tokens.keys() == expected.keys()
        assert all(torch.equal(tokens[name], expected[name]) for name in expected)
        assert len(batch) == 1 or tokens["input_ids"].numel() <= batch_tokens
        places += batch
    assert sorted(places) == list(range(len(examples)))
    assert len(inputs) == len(texts())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 64))
def test_texts_are_cut_into_the_batches_that_take_least(sizes, batch_tokens):
    sizes = sorted(sizes, reverse=True)

    def cost(cuts):
        """Return what batches take that end at some places; too large ones take for ever."""
        total = 0.0
        for start, stop in pairwise((0, *cuts, len(sizes))):
            tokens = (stop - start) * sizes[start]
            fits = stop - start == 1 or tokens <= batch_tokens
            total += tokens + batch_tokens / 32 if fits else float("inf")
        return total

    made = cut_by_length(sizes, batch_tokens)
    assert sum(made) == len(sizes)
    inner = range(1, len(sizes))
    least = min(cost(cuts) for n in range(len(sizes)) for cuts in combinations(inner, n))
    assert cost(tuple(accumulate(made[:-1]))) == pytest.approx(least)


def test_a_text_is_cut_at_the_length_that_was_asked_for(encoders):
    inputs = Texts([["w1 " * 60, "w2"]], Processors(encoders["bert"], 5), 64, "tasks.t")
    (_, tokens), _ = inputs.batches([0, 1])
    assert tokens["attention_mask"].sum(1).tolist()[0] == 5
    inputs = Texts([["w1 " * 60, "w2"]], Processors(encoders["bert"], None), 64, "tasks.t")
    (_, tokens), _ = inputs.batches([0, 1])
    assert tokens["attention_mask"].sum(1).tolist()[0] == 24, "the model has no more positions"


def test_a_pair_of_texts_becomes_one_row(encoders):
    processors = Processors(encoders["bert"], None)
    inputs = Texts([["w1 w2", "w3"], ["w4", "w5 w6"]], processors, 64, "tasks.t")
    pair = AutoTokenizer.from_pretrained(encoders["bert"])("w3", "w5 w6", return_tensors="pt")
    [(places, tokens)] = inputs.batches([1])
    assert places == [0]
    assert torch.equal(tokens["input_ids"], pair["input_ids"])


def test_a_text_without_tokens_is_refused(encoders):
    with pytest.raises(SpecError, match=r"tasks\.t\.text: row 1 is '', without tokens"):
        Texts([["w1", ""]], Processors(encoders["bert"], None), 64, "tasks.t")


def test_a_tokenizer_that_knows_no_limit_takes_any_text(encoders, tmp_path):
    model = T5Config(vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoders["bert"]).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    [(_, tokens)] = Texts([["w1 " * 60]], Processors(tmp_path, None), 64, "tasks.t").batches([0])
    assert tokens["attention_mask"].sum() >= 60


def test_images_are_prepared_as_their_processor_does_and_read_once(encoders, images):
    inputs = Images(images, Processors(encoders["vit"], None), 2, "tasks.t")
    processor = AutoImageProcessor.from_pretrained(encoders["vit"])
    examples = [4, 1, 0]
    for _ in range(2):
        batches = list(inputs.batches(examples))
        assert [places for places, _ in batches] == [[0, 1], [2]]
        pixels = torch.cat([batch["pixel_values"] for _, batch in batches])
        for row, example in zip(pixels, examples, strict=True):
            image = Image.open(images.files[example])
            assert torch.equal(row, processor(images=image, return_tensors="pt").pixel_values[0])
        assert images.n_read == len(examples)


def test_a_model_of_one_channel_is_given_grey_images(encoders, images, tmp_path):
    config = AutoConfig.from_pretrained(encoders["vit"])
    config.num_channels = 1
    config.save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(
        encoders["vit"], image_mean=[0.5], image_std=[0.5]
    )
    processor.save_pretrained(tmp_path)
    [(_, batch)] = Images(images, Processors(tmp_path, None), 2, "tasks.t").batches([3])
    grey = Image.open(images.files[3]).convert("L")
    expected = processor(images=grey, return_tensors="pt").pixel_values
    assert expected.shape[1] == 1
    assert torch.equal(batch["pixel_values"], expected)


def test_an_image_that_cannot_be_read_fails_by_task_and_example(encoders, images):
    images.files[3].write_bytes(images.files[3].read_bytes()[:30])
    inputs = Images(images, Processors(encoders["vit"], None), 2, "tasks.t")
    with pytest.raises(EvaluationError, match=r"tasks\.t\.image: example 3 cannot be read"):
        list(inputs.batches([2, 3]))


def test_a_folder_without_an_image_processor_is_refused(encoders):
    with pytest.raises(SpecError, match=r"bert.*: the image processor cannot be loaded"):
        Processors(encoders["bert"], None).pixels()
