"""Whether one text follows another, which BERT is pre-trained to tell."""

from collections.abc import Iterable, Mapping

from bertjax.engine import Window
from bertjax.heads import BertForNextSentencePrediction
from bertjax.tasks.base import Plan, Task, TextOrPair, softmax


class NextSentence(Task):
    """Tells whether the second text of a pair follows the first (Devlin et al. 2018, arXiv:1810.04805, section 3.1).

    It takes a `BertForNextSentencePrediction`, which also a checkpoint of `BertForPreTraining` can be loaded as.
    """

    kind = BertForNextSentencePrediction
    single = (str, tuple, Mapping)

    def __call__(
        self, inputs: TextOrPair | Iterable[TextOrPair], *, show_progress_bar: bool | None = None
    ) -> float | list[float]:
        """Judges a pair of texts or several.

        Args:
            inputs: a pair of texts (a tuple, or a mapping with text and text_pair), or an iterable of them.
            show_progress_bar: default: on a terminal, when it takes more than two seconds.

        Returns:
            The probability that the second text follows the first: the softmax of the two logits, at class 0. For
            several pairs, a list of them.

        Raises:
            InputError: an input is no pair of texts, with its position.
        """
        return self._answer(inputs, show_progress_bar)

    def plan(self) -> Plan:
        """See `Task.plan`."""

        def read(window: Window) -> list[float]:
            return softmax(window.per_row())[:, 0].tolist()

        return Plan(self._encode_pairs, self._run_pooled, read)
