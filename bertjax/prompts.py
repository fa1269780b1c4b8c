"""Prompts: what sentence-transformers' models want put before a text."""

from collections.abc import Mapping

from bertjax.errors import InputError


def choose_prompt(prompts: Mapping[str, str], default: str | None, name: str | None, prompt: str | None) -> str:
    """The text to put before every input of a call; "" for none.

    Args:
        prompts: a model's prompts, by name.
        default: the name of the one to use where none is asked for, or None.
        name: the name of the one that is asked for, or None.
        prompt: a text that wins over both, or None.

    Raises:
        InputError: there is no prompt of that name, or `prompt` is no text.
    """
    if prompt is not None:
        if not isinstance(prompt, str):
            raise InputError(f"prompt is {prompt!r}, expected a text")
        return prompt
    name = default if name is None else name
    if name is None:
        return ""
    if name not in prompts:
        known = ", ".join(map(repr, prompts)) or "none"
        raise InputError(
            f"prompt_name {name!r} is not one of the model's prompts ({known}); pass prompt= (or --prompt)"
        )
    return prompts[name]
