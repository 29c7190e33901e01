"""How prompts are deployed: with which chat template, system message and prefix of the answer."""

from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar

from searchmerge.errors import SpecError
from searchmerge.evaluators.lm_harness.keys import PromptKeys

Task = TypeVar("Task", bound=PromptKeys)

_TAKEN = frozenset(
    {
        *("conversation", "messages", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
"""Arguments of ``apply_chat_template`` that are no template's."""


def prompted(task: Task, section: PromptKeys) -> Task:
    """Return the task with the section's keys where it says nothing of its own."""
    names = [key.name for key in fields(PromptKeys) if getattr(task, key.name) is None]
    return replace(task, **{name: getattr(section, name) for name in names})


def request_arguments(keys: PromptKeys, lm: Any, where: str) -> dict[str, Any]:
    """Return what makes lm-eval build its prompts so.

    Args:
        keys: How.
        lm: A :class:`ResidentLM`.
        where: The task, for messages: ``"tasks.math"``.

    Raises:
        SpecError: If the tokenizer has no such template, or a key needs one that is not there.
    """
    arguments: dict[str, Any] = {}
    if keys.system_instruction is not None:
        arguments["system_instruction"] = keys.system_instruction
    if not keys.chat_template:
        for key in ("fewshot_as_multiturn", "template_arguments"):
            if getattr(keys, key):
                raise SpecError(f"{where}.{key}: needs a chat_template; give on, or its name")
        return arguments
    if taken := [key for key in keys.template_arguments or {} if key in _TAKEN]:
        raise SpecError(
            f"{where}.template_arguments.{taken[0]}: is what prompts are made with; give what the "
            "template itself asks for, e.g. enable_thinking"
        )
    template = find_template(lm.tokenizer, asked=keys.chat_template, where=where)
    apply = partial(
        lm.apply_chat_template, template=template, arguments=keys.template_arguments or {}
    )
    multiturn = True if keys.fewshot_as_multiturn is None else keys.fewshot_as_multiturn
    return arguments | {
        "apply_chat_template": True,
        "fewshot_as_multiturn": multiturn,
        "chat_template": apply,
        "tokenizer_name": lm.tokenizer_name,
    }


def find_template(tokenizer: Any, *, asked: bool | str, where: str) -> str:
    """Return the text of a tokenizer's chat template.

    Args:
        tokenizer: It may have several templates, by name.
        asked: ``True`` for the only one, or the one named ``default``; a text for one by name.
        where: The task, for messages.

    Raises:
        SpecError: If there is no such template.
    """
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    if not templates:
        raise SpecError(
            f"{where}.chat_template: the tokenizer {tokenizer.name_or_path!r} has no chat template"
        )
    name = "default" if asked is True else asked
    if name not in templates:
        raise SpecError(
            f"{where}.chat_template: the tokenizer has no chat template named {name!r} "
            f"(it has: {', '.join(templates)})"
        )
    return str(templates[name])
