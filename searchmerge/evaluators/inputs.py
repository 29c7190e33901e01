"""What an encoder is given: texts as tokens, images as pixels, in batches."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from searchmerge.checkpoints.files import in_one_line
from searchmerge.checkpoints.model_config import load_config
from searchmerge.errors import EvaluationError, SpecError
from searchmerge.evaluators.tokenizer import load_tokenizer

_IMAGE_CACHE_BYTES = 4 << 30
"""Up to this many bytes, the pixels of a task's images are prepared once and kept."""

_ONE_MORE = 1 / 32
"""Of a full batch: what it takes to run one more, however small it is."""

_LONGEST = 1 << 20
"""A text has no more tokens than this: tokenizers that know no limit speak of 10^30."""


class Inputs(Protocol):
    """What the model is given, example by example."""

    def __len__(self) -> int: ...

    @property
    def padding(self) -> int | None:
        """Return the token that fills the shorter texts of a batch; ``None`` without texts."""
        ...

    def batches(self, examples: Sequence[int]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yield places in ``examples`` and the model's inputs for them."""
        ...


class Processors:
    """The base's tokenizer and image processor, loaded when they are first needed.

    Args:
        model_dir: Where they are.
        max_length: Tokens after which a text is cut; the tokenizer's own if ``None``.
        trust_remote_code: Whether Python files of the model may run.
    """

    def __init__(
        self, model_dir: Path, max_length: int | None, *, trust_remote_code: bool = False
    ) -> None:
        self._model_dir = model_dir
        self._trust_remote_code = trust_remote_code
        self._max_length = max_length
        self._loaded: dict[str, Any] = {}

    def tokens(self, texts: Sequence[Sequence[str]]) -> list[dict[str, list[int]]]:
        """Return what the tokenizer makes of each text, or pair of texts."""
        tokenizer = self._tokenizer()
        options: dict[str, Any] = {"truncation": True, "max_length": self._window(tokenizer)}
        encoded = tokenizer(*texts, **options)
        return [
            {name: values[i] for name, values in encoded.items()} for i in range(len(texts[0]))
        ]

    @property
    def pad_token_id(self) -> int:
        """Return what fills the shorter texts of a batch: what the model takes for padding.

        Decoders classify the last token that is none. Where the model's configuration does not
        say, it is what the tokenizer pads with, or ends a text with, or 0.
        """
        config = load_config(self._model_dir, trust_remote_code=self._trust_remote_code)
        token = getattr(config.get_text_config(), "pad_token_id", None)
        if isinstance(token, int) and token >= 0:
            return token
        tokenizer = self._tokenizer()
        token = tokenizer.pad_token_id
        return int((tokenizer.eos_token_id if token is None else token) or 0)

    def pixels(self) -> Callable[[Any], Tensor]:
        """Return what makes an image the model's input, ``(channels, height, width)``.

        Images are made grey for a model of one channel, and red, green and blue for any other.
        """
        processor = self._image_processor()
        config = load_config(self._model_dir, trust_remote_code=self._trust_remote_code)
        mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"

        def prepare(image: Any) -> Tensor:
            made: Tensor = processor(images=image.convert(mode), return_tensors="pt")[
                "pixel_values"
            ][0]
            return made

        return prepare

    def _window(self, tokenizer: Any) -> int:
        config = load_config(self._model_dir, trust_remote_code=self._trust_remote_code)
        places = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        asked = self._max_length or _LONGEST
        return int(min(asked, places, tokenizer.model_max_length, _LONGEST))

    def _tokenizer(self) -> Any:
        if "tokenizer" not in self._loaded:
            self._loaded["tokenizer"] = load_tokenizer(
                self._model_dir, trust_remote_code=self._trust_remote_code
            )
        return self._loaded["tokenizer"]

    def _image_processor(self) -> Any:
        from transformers import AutoImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(
                self._model_dir,
                local_files_only=True,
                trust_remote_code=self._trust_remote_code,
            )
        except ImportError as error:
            raise SpecError(
                f"{self._model_dir}: images need another package: "
                "pip install 'searchmerge[vision]'"
            ) from error
        except (OSError, ValueError) as error:
            raise SpecError(
                f"{self._model_dir}: the image processor cannot be loaded: {in_one_line(error)}"
            ) from error


class Texts:
    """Texts, tokenised once; those of about the same length make a batch.

    Args:
        texts: The texts of all examples, or the first and the second of each pair.
        processors: Where the tokenizer comes from.
        batch_tokens: Tokens of a batch, padding included; a longer text is a batch by itself.
        where: Their place in the study, for messages.

    Raises:
        SpecError: If a text has no tokens.
    """

    def __init__(
        self,
        texts: Sequence[Sequence[str]],
        processors: Processors,
        batch_tokens: int,
        where: str,
    ) -> None:
        self._tokens = processors.tokens(texts)
        for row, tokens in enumerate(self._tokens):
            if not tokens["input_ids"]:
                raise SpecError(f"{where}.text: row {row} is {texts[0][row]!r}, without tokens")
        self._padding = {"input_ids": processors.pad_token_id}
        self._batch_tokens = batch_tokens

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def padding(self) -> int | None:
        """Return the token that fills the shorter texts of a batch."""
        return self._padding["input_ids"]

    def batches(self, examples: Sequence[int]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yield batches of padded tokens, the longest texts first."""
        sizes = [len(self._tokens[example]["input_ids"]) for example in examples]
        order = sorted(range(len(examples)), key=lambda place: (-sizes[place], examples[place]))
        for n_rows in cut_by_length([sizes[place] for place in order], self._batch_tokens):
            places, order = order[:n_rows], order[n_rows:]
            yield places, self._padded([self._tokens[examples[place]] for place in places])

    def _padded(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        return {
            name: torch.tensor(
                [
                    row[name] + [self._padding.get(name, 0)] * (width - len(row[name]))
                    for row in rows
                ]
            )
            for name in rows[0]
        }


def cut_by_length(sizes: Sequence[int], batch_tokens: int) -> list[int]:
    """Return how many texts make each batch, so that it takes the least to run them all.

    Args:
        sizes: Tokens of each text, longest first.
        batch_tokens: Tokens of a batch, padding included; a longer text is a batch by itself.
    """
    lengths, places = np.array(sizes, dtype=np.float64), np.arange(len(sizes))
    least = np.zeros(len(sizes) + 1)  # what the texts up to each take
    first_of = [0]  # where the last batch of those begins
    for stop in range(1, len(sizes) + 1):
        tokens = (stop - places[:stop]) * lengths[:stop]
        costs = np.where(tokens <= batch_tokens, least[:stop] + tokens, np.inf)
        costs[-1] = least[stop - 1] + tokens[-1]
        first_of.append(int(costs.argmin()))
        least[stop] = costs.min() + batch_tokens * _ONE_MORE
    cuts = [len(sizes)]
    while cuts[-1]:
        cuts.append(first_of[cuts[-1]])
    return [stop - start for stop, start in pairwise(cuts)][::-1]


class Images:
    """Images, prepared when first scored and kept while they take little memory.

    Args:
        images: Of all examples; each is read when it is looked up.
        processors: Where the image processor comes from.
        batch_images: Images of a batch.
        where: Their place in the study, for messages.
    """

    def __init__(self, images: Any, processors: Processors, batch_images: int, where: str) -> None:
        self._images = images
        self._where = where
        self._prepare = processors.pixels()
        self._batch_images = batch_images
        self._kept: dict[int, Tensor] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self._images)

    @property
    def padding(self) -> None:
        """Return that nothing is filled: images are of one size."""
        return

    def batches(self, examples: Sequence[int]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yield batches of pixels, in the order of ``examples``.

        Raises:
            EvaluationError: If an image cannot be read.
        """
        for start in range(0, len(examples), self._batch_images):
            batch = examples[start : start + self._batch_images]
            pixels = torch.stack([self._pixels(example) for example in batch])
            yield list(range(start, start + len(batch))), {"pixel_values": pixels}

    def _pixels(self, example: int) -> Tensor:
        if example in self._kept:
            return self._kept[example]
        try:
            pixels = self._prepare(self._images[example])
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises of broken files
            raise EvaluationError(
                f"{self._where}.image: example {example} cannot be read: {error}"
            ) from error
        if self._kept_bytes + pixels.nbytes <= _IMAGE_CACHE_BYTES:
            self._kept[example] = pixels
            self._kept_bytes += pixels.nbytes
        return pixels
