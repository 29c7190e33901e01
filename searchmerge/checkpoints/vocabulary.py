"""One vocabulary of several models: a row for every token that base or an expert knows.

A row that the base does not have is merged among the experts that have it: their mean stands for
the base's, and an expert without the token has no task vector there. So a token that one expert
alone has comes out as that expert has it, whatever the coefficients.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from searchmerge.checkpoints.checkpoint import Checkpoint
from searchmerge.checkpoints.embeddings import is_vocabulary
from searchmerge.checkpoints.made_once import made_once
from searchmerge.checkpoints.tensor_files import TensorHeader
from searchmerge.checkpoints.tokenizer_files import AddedToken, Tokenizer, read_tokenizer
from searchmerge.errors import CheckpointError

_BASE = ""
"""What the base is called among the experts' names, none of which is empty."""
_NONE = -1
"""The row of a token that a model does not have."""


@dataclass(frozen=True)
class Union:
    """Which row of which model stands for every token.

    Attributes:
        models: Base and experts, as they were; the base under an empty name.
        rows: By model, its row of each token of the union, in order of id; -1 for none.
        added: The tokens that the base's tokenizer has to be told, in order of id.
    """

    models: Mapping[str, Checkpoint]
    rows: Mapping[str, tuple[int, ...]]
    added: tuple[AddedToken, ...]

    @property
    def n_rows(self) -> int:
        """Return the number of rows of the merged model's embeddings."""
        return len(self.rows[_BASE])

    def headers(self, model: str) -> dict[str, TensorHeader]:
        """Return what the tensors of a model with a row per token become."""
        base = self.models[_BASE].headers
        found = {}
        for name in self.tensors:
            own = self.models[model].headers.get(name)
            if own is not None:
                dtype = torch.promote_types(own.dtype, base[name].dtype)
                found[name] = TensorHeader(dtype, (self.n_rows, *base[name].shape[1:]))
        return found

    @property
    def tensors(self) -> list[str]:
        """Return the base's tensors that have a row per token."""
        base = self.models[_BASE].headers
        names = [name for name in base if is_vocabulary(name) and base[name].shape]
        n_rows = {base[name].shape[0] for name in names}
        return [name for name in names if base[name].shape[0] == max(n_rows)]

    def made(self, model: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a model with a row per token of the union."""
        weights = {name: checkpoint.weights() for name, checkpoint in self.models.items()}
        rows = {name: torch.tensor(own) for name, own in self.rows.items()}
        for name, header in self.headers(model).items():
            base = _with_rows(weights[_BASE][name], rows[_BASE], header)
            new = rows[_BASE] == _NONE
            total = torch.zeros(int(new.sum()), *header.shape[1:])
            counts = torch.zeros(len(total), dtype=torch.int64)
            for expert in self.models:
                if expert == _BASE or name not in weights[expert]:
                    continue
                own = rows[expert][new]
                total[own != _NONE] += weights[expert][name][own[own != _NONE]].float()
                counts += own != _NONE
            mean = total / counts.clamp(min=1).view(-1, *[1] * (total.ndim - 1))
            base[new] = mean.to(base.dtype)
            if model != _BASE:
                there = rows[model] != _NONE
                base[there] = weights[model][name][rows[model][there]].to(base.dtype)
            yield name, base


@dataclass(frozen=True)
class Extension:
    """The tensors of one model that have a row for every token of a union.

    Attributes:
        union: All models and their rows.
        model: Which of them.
        headers: What the tensors become.
    """

    union: Union = field(repr=False)
    model: str
    headers: Mapping[str, TensorHeader] = field(repr=False)

    @property
    def n_rows(self) -> int:
        """Return the number of rows."""
        return self.union.n_rows

    def key(self) -> str:
        """Return 64 hexadecimal digits that differ where any model or row differs."""
        prints = {name: model.fingerprint() for name, model in self.union.models.items()}
        identity = json.dumps([prints, {name: list(r) for name, r in self.union.rows.items()}])
        return hashlib.sha256(f"{self.model}\0{identity}".encode()).hexdigest()

    def file(self) -> Path:
        """Return the file of these tensors, which is made once.

        Raises:
            CheckpointError: If it cannot be written.
        """
        cache_dir = self.union.models[_BASE].cache_dir
        folder = cache_dir / "vocabularies" / self.key()[:32]
        return made_once(
            folder, self.headers, lambda: self.union.made(self.model), cache_dir=cache_dir
        )


def with_union(
    base: Checkpoint, experts: Mapping[str, Checkpoint]
) -> tuple[Checkpoint, dict[str, Checkpoint], tuple[AddedToken, ...]]:
    """Return base and experts with a row for every token that one of them knows.

    Args:
        base: The base model.
        experts: The experts, with the base's names.

    Returns:
        Both, and the tokens that are new to the base's tokenizer, in order of id.

    Raises:
        CheckpointError: If an expert's tokenizer is not the base's with tokens added.
    """
    models = {_BASE: base, **experts}
    if not (own := Union(models, {_BASE: ()}, ()).tensors):
        raise CheckpointError(
            f"vocabulary: union: no tensor of the base ({base.name}) has a row per token"
        )
    n_rows = {name: model.headers[own[0]].shape[0] for name, model in models.items()}
    tokenizers = {name: read_tokenizer(model.tokenizer_dir) for name, model in models.items()}
    ids, added = _all_tokens(base, experts, tokenizers)
    size = max([n_rows[_BASE], *(index + 1 for index in ids.values())])
    for name, expert in experts.items():
        if tokenizers[name] is None and n_rows[name] > n_rows[_BASE]:
            raise CheckpointError(
                f"vocabulary: union: expert {name!r} ({expert.name}) has {n_rows[name]} rows in "
                f"{own[0]!r}, the base {n_rows[_BASE]}, and no tokenizer that says of what"
            )
    rows = {
        name: _rows(ids, tokenizers[name], n_rows[name], size, is_base=name == _BASE)
        for name in models
    }
    union = Union(models, rows, added)
    extended = {name: _extended(union, name) for name in models}
    return extended.pop(_BASE), extended, added


def _all_tokens(
    base: Checkpoint, experts: Mapping[str, Checkpoint], tokenizers: Mapping[str, Tokenizer | None]
) -> tuple[dict[str, int], tuple[AddedToken, ...]]:
    """Return every token with its id: the base's as they are, then each expert's new ones."""
    ours = tokenizers[_BASE]
    ids = dict(ours.tokens) if ours is not None else {}
    added: list[AddedToken] = []
    for name, expert in experts.items():
        theirs = tokenizers[name]
        if theirs is None or expert.tokenizer_dir == base.tokenizer_dir:
            continue
        if ours is None or ours.model_digest is None or ours.model_digest != theirs.model_digest:
            raise CheckpointError(
                f"vocabulary: union: the tokenizer of expert {name!r} ({expert.name}) is not that "
                f"of the base ({base.name}) with tokens added, by their tokenizer.json"
            )
        for token in sorted(theirs.added, key=lambda token: token.index):
            if token.content not in ids:
                index = max(ids.values()) + 1
                ids[token.content] = index
                added.append(replace(token, index=index))
    return ids, tuple(added)


def _rows(
    ids: Mapping[str, int], tokenizer: Tokenizer | None, n_rows: int, size: int, *, is_base: bool
) -> tuple[int, ...]:
    """Return a model's row of each token; a row without a token is the base's alone."""
    if tokenizer is None or not tokenizer.tokens:  # as the base has them
        return tuple(row if row < n_rows else _NONE for row in range(size))
    rows = [row if is_base and row < n_rows else _NONE for row in range(size)]
    for token, index in ids.items():
        row = tokenizer.tokens.get(token, _NONE)
        rows[index] = row if row < n_rows else _NONE
    return tuple(rows)


def _extended(union: Union, name: str) -> Checkpoint:
    model = union.models[name]
    extension = Extension(union, name, union.headers(name))
    return replace(
        model,
        config=_sized(model.config, union.n_rows),
        headers={**model.headers, **extension.headers},
        extension=extension,
    )


def _sized(config: Mapping[str, Any], n_rows: int) -> dict[str, Any]:
    """Return a configuration with another number of tokens, wherever it says one."""
    key = "vocab_size"
    text = config.get("text_config")
    inner = {"text_config": {**text, key: n_rows}} if isinstance(text, Mapping) else {}
    return {**config, **inner, **({} if inner and key not in config else {key: n_rows})}


def _with_rows(tensor: Tensor, rows: Tensor, header: TensorHeader) -> Tensor:
    """Return a new tensor with these rows of another; zeros where there is none."""
    found = torch.zeros(header.shape, dtype=header.dtype)
    there = rows != _NONE
    found[there] = tensor[rows[there]].to(header.dtype)
    return found
