"""Prompts: what sentence-transformers' models want put before a text."""

from collections.abc import Mapping

import numpy as np

from bertjax.engine import Encoded
from bertjax.errors import InputError
from bertjax.text_inputs import check_text
from bertjax.tokenizer import Tokenizer


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
    if not isinstance(name, str) or name not in prompts:
        known = ", ".join(map(repr, prompts)) or "none"
        raise InputError(
            f"prompt_name {name!r} is not one of the model's prompts ({known}); pass prompt= (or --prompt)"
        )
    return prompts[name]


def encode_prompted(
    tokenizer: Tokenizer, max_length: int, prompt: str, name: str, texts: list[str], position: int
) -> Encoded:
    """A row of tokens for each text, with a prompt put before it.

    Args:
        tokenizer: the tokenizer.
        max_length: the longest row in tokens; a longer one loses its end.
        prompt: what `choose_prompt` returns.
        name: what the caller calls the texts, for messages.
        texts: the texts, as they were given.
        position: that of the first one, for messages.

    Raises:
        InputError: something in `texts` is not a text, with its position.
    """
    for index, text in enumerate(texts, position):
        check_text(f"{name}[{index}]", text)
    tokens = tokenizer([prompt + text for text in texts], max_length=max_length, first_position=position)
    return Encoded(texts, tokens, np.arange(len(texts)))
