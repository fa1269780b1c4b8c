"""Which of several texts goes with one: the end of a story, the answer to a question."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bertjax.checks import check_choice
from bertjax.engine import Encoded, Window
from bertjax.errors import InputError
from bertjax.heads import BertForMultipleChoice
from bertjax.packing import PackedBatch
from bertjax.tasks.base import Plan, Task, check_reads_pairs, softmax
from bertjax.text_inputs import check_iterable, check_text

#: A text, and those that may go with it.
TextAndChoices = tuple[str, Sequence[str]] | Mapping[str, Any]

_KEYS = ("text", "choices")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The choice that goes best with a text.

    Attributes:
        index: its place among the choices.
        text: the choice.
        scores: of every choice, in order: probabilities that add up to 1 or, with `apply_softmax=False`, logits.
    """

    index: int
    text: str
    scores: list[float]


class MultipleChoice(Task):
    """Chooses between texts, with a `BertForMultipleChoice`, as SWAG asks for (Zellers et al. 2018, arXiv:1808.05326).

    Every choice is read together with the text, and scored by itself; there may be another number of them every time.
    """

    kind = BertForMultipleChoice
    single = (str, tuple, Mapping)

    def __call__(
        self,
        inputs: TextAndChoices | Iterable[TextAndChoices],
        *,
        apply_softmax: bool = True,
        show_progress_bar: bool | None = None,
    ) -> Choice | list[Choice]:
        """Chooses for a text or several.

        Args:
            inputs: a text and its choices (a tuple, or a mapping with text and choices), or an iterable of these.
            apply_softmax: make the scores of a text's choices add up to 1.
            show_progress_bar: default: on a terminal, when it takes more than two seconds.

        Returns:
            A `Choice`, or a list of them; of equal scores the first choice is taken.

        Raises:
            InputError: an input is not of this form, or has no choices, with its position; or `apply_softmax` is no
                bool.
            ConfigError: the model can't read two texts together.
        """
        return self._answer(inputs, show_progress_bar, apply_softmax=apply_softmax)

    def plan(self, *, apply_softmax: bool = True) -> Plan:
        """See `Task.plan`."""
        check_choice("apply_softmax", apply_softmax, (True, False))
        check_reads_pairs(self.model.config)

        def read(window: Window) -> list[Choice]:
            logits = window.per_row()[:, 0]
            ends = np.searchsorted(window.encoded.owners, np.arange(1, len(window.encoded.items)))
            parts = zip(window.encoded.items, np.split(logits, ends), strict=True)
            return [_chosen(choices, softmax(part) if apply_softmax else part) for (_, choices), part in parts]

        return Plan(self._encode_choices, self._run_pooled, read)

    def _encode_choices(self, items: list[TextAndChoices], position: int) -> Encoded:
        """A row for each choice of each text; what is longer than the model takes loses its end."""
        parsed = [_parsed(item, f"inputs[{index}]") for index, item in enumerate(items, position)]
        owners = np.repeat(np.arange(len(parsed)), [len(choices) for _, choices in parsed])
        texts = [parsed[owner][0] for owner in owners]
        choices = [choice for _, of_text in parsed for choice in of_text]
        return Encoded(parsed, self.tokenizer(texts, choices, max_length=self.max_length), owners)

    def _call(self, batch: PackedBatch, **options: Any) -> Any:
        return self.model.score(**batch.inputs(), **options)


def _chosen(choices: list[str], scores: np.ndarray) -> Choice:
    best = int(scores.argmax())
    return Choice(best, choices[best], scores.tolist())


def _parsed(item: Any, name: str) -> tuple[str, list[str]]:
    """The text and the choices of an input; `name` is for messages."""
    if isinstance(item, Mapping):
        if set(item) != set(_KEYS):
            raise InputError(f"{name} has the keys {sorted(map(str, item))}, expected 'text' and 'choices'")
        item = tuple(item[key] for key in _KEYS)
    if not isinstance(item, tuple) or len(item) != 2:
        raise InputError(f"{name} is no text with choices; pass a tuple, (text, choices), or a mapping with these keys")
    text, choices = item
    check_text(f"{name}: the text", text)
    check_iterable(f"{name}: choices", choices)
    choices = list(choices)
    if not choices:
        raise InputError(f"{name} has no choices")
    for index, choice in enumerate(choices):
        check_text(f"{name}: choice {index}", choice)
    return text, choices
