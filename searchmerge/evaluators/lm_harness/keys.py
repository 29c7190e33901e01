"""What a study may say of lm-eval tasks: of each, and of all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt, MinLen

from searchmerge.evaluators.evaluator import needed


@dataclass(frozen=True, kw_only=True)
class PromptKeys:
    """How a model is asked, and what is kept. A task's own keys come before the section's.

    Attributes:
        chat_template: ``True``: prompts are turns of the tokenizer's chat template; a text: of
            its template of that name; ``False`` or ``None``: plain text.
        system_instruction: Stands before the prompt; with a chat template it is the system's turn.
        fewshot_as_multiturn: Whether each few-shot example is a turn of the user and one of the
            assistant, as it is with a chat template where nothing is said.
        template_arguments: What else the chat template is given, e.g. ``enable_thinking``.
        gen_prefix: What the answer begins with; a template of the document, like lm-eval's.
        answers: Whether what the winner and the references say to held-out examples is kept.
    """

    chat_template: bool | str | None = None
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None
    template_arguments: Mapping[str, Any] | None = None
    gen_prefix: str | None = None
    answers: Literal["keep", "drop"] | None = None


_PARTS = ("select", "hold_out")

Positions = Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)]
"""Of examples in a split."""


@dataclass(frozen=True)
class Samples:
    """The examples that each part of a task is drawn from.

    Attributes:
        select: Positions in its split of those that trials see.
        hold_out: Positions in its split of those that only the confirmation sees.
    """

    select: Positions
    hold_out: Positions


@dataclass(frozen=True)
class LmTask(PromptKeys):
    """Which lm-eval task is scored, and how: the keys of a task of a study.

    Attributes:
        task: The name of a task, a group or a tag in lm-eval, the study's name of the task if
            ``None``; or a whole definition, as it would stand in a YAML file of lm-eval's.
        split: The split of its dataset whose examples are scored; of a group it may be a mapping
            from a member, or a group within, to its split, where ``rest`` is all others. Either
            may stand under ``select`` and ``hold_out``, where the two are of different splits.
        metric: The task's metric that decides, and others that are reported beside it; each may
            name its filter as lm-eval's results do: ``exact_match,flexible-extract``. None is
            the task's first.
        filter: One of the task's filters of the model's answers; its first if ``None``.
        num_fewshot: Examples that are shown before the question, 0 or more; what the task says
            if ``None``, and 0 if it says nothing.
        samples: Positions of the split's examples that are scored, 2 or more; or those of
            ``select`` and of ``hold_out``; all if ``None``.
        generation: Replaces arguments of the task's generation: ``max_gen_toks``, ``until``,
            ``temperature`` and others.
    """

    task: str | Mapping[str, Any] | None = None
    split: str | Mapping[str, str | Mapping[str, str]] = needed(
        "name the dataset split that is scored"
    )
    metric: tuple[str, ...] = ()
    filter: str | None = None
    num_fewshot: Annotated[int, Ge(0)] | None = None
    samples: Annotated[Positions, MinLen(2)] | Samples | None = None
    generation: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._check_split()
        self._check_samples()
        if self.filter is not None and (named := [m for m in self.metric if "," in m]):
            raise ValueError(f"metric {named[0]!r} names a filter, and filter another; give one")
        if len(set(self.metric)) != len(self.metric):
            raise ValueError("metric: one stands twice")

    def _check_split(self) -> None:
        if not isinstance(self.split, Mapping):
            return
        named = [part for part in _PARTS if part in self.split]
        if named and set(self.split) != set(_PARTS):
            raise ValueError(
                "split: select and hold_out stand together and alone; found "
                f"{', '.join(self.split)}"
            )
        nested = [name for name, its in self.split.items() if not isinstance(its, str)]
        if nested and not named:
            raise ValueError(f"split.{nested[0]}: name one split; found a mapping")

    def _check_samples(self) -> None:
        (split, samples), (other, others) = map(self._of, _PARTS)
        if isinstance(self.samples, tuple) and split != other:
            raise ValueError(
                "samples: positions in which split? give {select: [...], hold_out: [...]}"
            )
        is_shared = split == other and isinstance(self.samples, Samples)
        groups = [(*(samples or ()), *(others or ()))] if is_shared else [samples, others]
        if any(group is not None and len(set(group)) != len(group) for group in groups):
            raise ValueError("samples: a position stands twice")

    def _of(self, part: str) -> tuple[str | Mapping[str, Any], Positions | None]:
        """Return the split of a part, and the positions in it."""
        split, samples = self.split, self.samples
        of_part = split[part] if isinstance(split, Mapping) and part in split else split
        return of_part, getattr(samples, part) if isinstance(samples, Samples) else samples

    def by_part(self) -> "tuple[LmTask, ...]":
        """Return what is said of ``select`` and of ``hold_out``; one where that is the same."""
        pairs = [self._of(part) for part in _PARTS]
        different = pairs[:1] if pairs[0] == pairs[1] else pairs
        return tuple(replace(self, split=split, samples=samples) for split, samples in different)

    def metrics_and_filters(self) -> list[tuple[str | None, str | None]]:
        """Return each metric and the filter that goes with it; the first pair decides."""
        pairs = [metric.partition(",")[::2] for metric in self.metric]
        return [(metric, named or self.filter) for metric, named in pairs] or [(None, self.filter)]


_ELSEWHERE = {
    **dict.fromkeys(
        ("load_in_8bit", "load_in_4bit", "quantization_config", "bnb_4bit_quant_type"),
        "merged weights are written into the loaded model, which a quantised one cannot take; "
        "scoring: int8 scores candidates as rounded to int8",
    ),
    **dict.fromkeys(
        ("autogptq", "gptqmodel", "gguf_file", "delta"), "merged weights cannot be written into it"
    ),
    **dict.fromkeys(
        ("pretrained", "revision", "tokenizer"), "the study's base and experts name the models"
    ),
    "peft": "name the adapter as an expert",
    "dtype": "give the study's dtype",
    "device": "give device in the config",
    "max_length": "give lm_harness.max_length",
    **dict.fromkeys(("batch_size", "max_batch_size"), "give lm_harness.batch_tokens"),
    **dict.fromkeys(
        ("enable_thinking", "chat_template_args"), "give lm_harness.template_arguments"
    ),
    **dict.fromkeys(("parallelize", "device_map", "tp_plan"), "a worker's model is on one device"),
    "trust_remote_code": "give the study's trust_remote_code",
}
"""Arguments of lm-eval's model class that a study cannot give here, and what there is instead."""


@dataclass(frozen=True)
class LmHarnessSection(PromptKeys):
    """How lm-eval tasks are scored.

    Attributes:
        include_path: Folders of the user's own task YAMLs, from the study's folder on. They come
            before lm-eval's tasks of the same name; ``data_files`` in them are relative to the
            YAML's folder.
        batch_tokens: Tokens of one forward pass; by the device if ``None``.
        max_length: Window in tokens; the model's own if ``None``.
        model_args: What is given to transformers when the model and its tokenizer are loaded:
            ``attn_implementation``, ``add_bos_token``.
        fewshot_seed: Seed of the choice of few-shot examples.
        metadata: What lm-eval hands to tasks that ask for it, e.g. RULER's lengths.
        confirm_run_unsafe_code: Whether tasks are scored that run what a model has written.
        engine: What runs the model.
        vllm_memory: The part of the GPU's memory that vLLM may take.
    """

    include_path: tuple[str, ...] = ()
    batch_tokens: Annotated[int, Ge(64)] | None = None
    max_length: Annotated[int, Ge(2)] | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    fewshot_seed: int = 1234
    metadata: Mapping[str, Any] = field(default_factory=dict)
    confirm_run_unsafe_code: bool = False
    engine: Literal["transformers", "vllm"] = "transformers"
    vllm_memory: Annotated[float, Gt(0), Lt(1)] = 0.5

    def __post_init__(self) -> None:
        kinds = {"attn_implementation": str, "add_bos_token": bool}
        for key, value in self.model_args.items():
            if key in _ELSEWHERE:
                raise ValueError(f"model_args.{key}: not here: {_ELSEWHERE[key]}")
            if key not in kinds:
                raise ValueError(f"model_args.{key}: allowed are {', '.join(kinds)}")
            if not isinstance(value, kinds[key]):
                raise ValueError(
                    f"model_args.{key}: a {kinds[key].__name__} is needed; found {value!r}"
                )

    @property
    def loading(self) -> dict[str, Any]:
        """Return what the model is loaded with."""
        return {k: v for k, v in self.model_args.items() if k == "attn_implementation"}

    @property
    def add_bos_token(self) -> bool | None:
        """Return whether prompts begin with the token that begins a text, if that is said."""
        added = self.model_args.get("add_bos_token")
        return None if added is None else bool(added)
