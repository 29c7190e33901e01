"""The requests of a task of lm-eval's, each with its prompt: made once, when first asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

from searchmerge.evaluators.lm_harness.loading import explained, quiet


class TaskRequests:
    """The requests of one task.

    Args:
        name: The study's name of the task.
        task: lm-eval's task object.
        documents: Positions in the split of all examples.
        fewshot_seed: Seed of the choice of few-shot examples.
        prompting: Arguments of lm-eval's that say how prompts are made.
    """

    def __init__(
        self,
        name: str,
        task: Any,
        documents: Sequence[int],
        fewshot_seed: int,
        prompting: Mapping[str, Any],
    ) -> None:
        self._name = name
        self._task = task
        self._documents = documents
        self._prompting = prompting
        self._made: dict[int, list[Any]] = {}
        self._is_rendered = False
        with explained(name, "set the seed of its few-shot examples"):
            task.set_fewshot_seed(fewshot_seed)

    @property
    def is_chat(self) -> bool:
        """Whether prompts are turns of a chat template."""
        return bool(self._prompting.get("apply_chat_template"))

    @property
    def _draws_in_order(self) -> bool:
        """Whether each prompt's few-shot examples depend on the prompts made before it."""
        config = self._task.config
        fewshot = config.fewshot_config
        sampler = getattr(fewshot, "sampler", None) or (fewshot or {}).get("sampler")
        return bool(config.num_fewshot) and sampler != "first_n"

    def prompted_with(self, documents: Sequence[int]) -> list[int]:
        """Return the documents whose prompts have to be made, in this order, for those of some."""
        return sorted(self._documents if self._draws_in_order else documents)

    def of(self, examples: Sequence[int]) -> list[list[Any]]:
        """Return the requests of examples, made when they are first asked for.

        Where few-shot examples are drawn in order, those of all examples are made at once, as
        lm-eval does; else of these alone, so that a large task costs what is scored of it.
        """
        documents = [self._documents[example] for example in examples]
        missing = [document for document in documents if document not in self._made]
        if missing:
            lm_name = self._task.config.task
            with explained(self._name, f"make prompts of its task {lm_name!r}"), quiet():
                for document in self.prompted_with(missing):
                    self._made[document] = self._make(document)
            if not self._is_rendered:
                for template in ("doc_to_text", "doc_to_target", "doc_to_choice"):
                    _render_once(self._task, template)
                self._is_rendered = True
        return [self._made[document] for document in documents]

    def _make(self, document: int) -> list[Any]:
        task, chat = self._task, self._prompting
        doc = task.eval_docs[document]
        context = task.fewshot_context(
            doc,
            num_fewshot=task.config.num_fewshot or 0,
            gen_prefix=task.doc_to_prefix(doc),
            **{key: value for key, value in chat.items() if key != "tokenizer_name"},
        )
        requests = task.construct_requests(
            doc=doc,
            ctx=context,
            metadata=(task.config.task, document, task.config.repeats),
            apply_chat_template=chat.get("apply_chat_template", False),
            chat_template=chat.get("chat_template"),
        )
        requests = requests if isinstance(requests, list) else [requests]
        return sorted(requests, key=lambda request: request.idx)


def _render_once(task: Any, field: str) -> None:
    """Have a template of the task rendered once for each example; lm-eval compiles it each time.

    A task takes a function wherever it takes a template.
    """
    template = getattr(task.config, field, None)
    if not isinstance(template, str) or template in getattr(task, "features", ()):
        return
    render = getattr(task, field)
    rendered: dict[int, tuple[Any, Any]] = {}

    def look_up(doc: Any) -> Any:
        if id(doc) not in rendered:
            rendered[id(doc)] = (doc, render(doc, template))  # the document keeps its id
        return rendered[id(doc)][1]

    task.set_config(field, look_up)
