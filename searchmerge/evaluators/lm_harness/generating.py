"""What lm-eval's requests ask to be generated: in which ways, how far, and from which seeds."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from searchmerge.errors import SpecError
from searchmerge.evaluators.causal.generation import GenerationOptions
from searchmerge.evaluators.causal.sampling import seed_of

_MAX_GEN_TOKENS = 256
"""Tokens to generate where a task does not say, as in lm-eval."""


def by_options(
    requests: Sequence[Any], tokenizer: Any
) -> Iterator[tuple[GenerationOptions, list[int]]]:
    """Yield the different ways of generating among requests, and which of them ask for each."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, request in enumerate(requests):
        groups[repr(request.args[1])].append(i)
    for members in groups.values():
        yield options_of(requests[members[0]].args[1], tokenizer), members


def options_of(arguments: Mapping[str, Any], tokenizer: Any) -> GenerationOptions:
    """Return the way of generating that a request's arguments ask for, without seeds."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    rest: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), _MAX_GEN_TOKENS))
    end = tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=False)
    stop = handle_stop_sequences(rest.pop("until", None), eos=end)
    max_new_tokens = rest.pop("max_gen_toks")
    if not rest.get("do_sample") and not rest.get("temperature"):
        rest.pop("temperature", None)
    return GenerationOptions(tuple(stop), max_new_tokens, rest)


def seeds_of(requests: Sequence[Any], seed: int) -> list[int]:
    """Return each request's seed.

    It depends on ``seed``, the request's task, example and number, and how often the same request
    stands before it.
    """
    times: Counter[tuple[object, ...]] = Counter()
    seeds = []
    for request in requests:
        key = request.task_name, request.doc_id, request.idx
        seeds.append(seed_of(seed, *key, times[key]))
        times[key] += 1
    return seeds


def room_for_prompt(max_new_tokens: int, window: int) -> int:
    """Return how many tokens of a prompt are left by those that are to be generated.

    Raises:
        SpecError: If there is none.
    """
    if max_new_tokens >= window:
        raise SpecError(
            f"generation.max_gen_toks: {max_new_tokens} tokens are to be generated; allowed are "
            f"up to {window - 1}, the model's window less one token of the prompt"
        )
    return window - max_new_tokens
