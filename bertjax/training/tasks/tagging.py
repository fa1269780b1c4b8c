"""Words and their tags."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bertjax.heads import BertForTokenClassification
from bertjax.losses import IGNORED
from bertjax.tasks.token_classification import TokenClassification
from bertjax.tokenizer import Tokenizer
from bertjax.tokens import Alignment
from bertjax.training.metrics import tagging_metrics
from bertjax.training.rows import Rows
from bertjax.training.tasks.base import Draft, Examples, LearningTask, of_tokens, single_texts
from bertjax.training.tasks.classification import label_id


class TagWords(LearningTask):
    """Token classification of texts that are split into words.

    Columns: tokens, a list of words, and tags, a list of as many names or numbers. The first token of a word has the
    word's tag, and the others are not scored, as `TokenClassification.label_words` reads them.

    Args:
        tokenizer: the tokenizer.
        max_length: the longest text in tokens; of longer ones, the words at the end are not learnt from.
        names: the tags' names, in the order of their numbers.
    """

    model_class = BertForTokenClassification
    best = ("f1", True)

    def __init__(self, tokenizer: Tokenizer, max_length: int, *, names: Sequence[str]):
        super().__init__(tokenizer, max_length)
        self.names = list(names)

    def examples(self, rows: Rows) -> tuple[Examples, Rows]:
        """See `LearningTask`."""
        ids = {name: number for number, name in enumerate(self.names)}
        found = [_tags(record, ids) for record in rows.records]
        rows = rows.refuse({index: tags for index, tags in enumerate(found) if isinstance(tags, str)})
        tags = [each for each in found if not isinstance(each, str)]
        words = [record["tokens"] for record in rows.records]
        tokens = self._tokenize([" ".join(each) for each in words], return_alignment=True)
        labels = [_of_first_tokens(*each) for each in zip(tokens.alignments, words, tags, strict=True)]
        return single_texts(tokens, labels, rows), rows

    def labels(self, draft: Draft) -> dict[str, np.ndarray]:
        """See `LearningTask`."""
        return {"labels": of_tokens(draft.packed, [draft.examples.labels[text] for text in draft.texts])}

    def metrics(
        self, model: BertForTokenClassification, examples: Examples, losses: dict[str, float]
    ) -> dict[str, float]:
        """See `metrics.tagging_metrics`. A word that the tokenizer leaves nothing of counts as tagged "O"."""
        ids = {name: number for number, name in enumerate(self.names)}
        expected = [[self.names[label_id(tag, ids)] for tag in record["tags"]] for record in examples.records]
        label = TokenClassification(model, self.tokenizer, max_length=self.max_length).label_words
        found = label([each["tokens"] for each in examples.records])
        predicted = [["O" if word is None else word.label for word in words] for words in found]
        return tagging_metrics(predicted, expected, names=self.names)


def _tags(record: dict[str, Any], ids: dict[str, int]) -> np.ndarray | str:
    words, tags = record["tokens"], record["tags"]
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        return f"its tokens are {words!r:.60}, expected a list of words"
    if not isinstance(tags, list) or len(tags) != len(words):
        return f"it has {len(words)} tokens and the tags {tags!r:.60}, expected a list of as many"
    numbers = [label_id(tag, ids) for tag in tags]
    wrong = [number for number in numbers if isinstance(number, str)]
    return wrong[0] if wrong else np.array(numbers, np.int32)


def _of_first_tokens(alignment: Alignment, words: list[str], tags: np.ndarray) -> np.ndarray:
    """The tag of each token that is the first of a word, int32 [tokens]; the words are joined by spaces."""
    ends = np.cumsum([len(word) + 1 for word in words])
    # A token's end tells its word: some tokenizers count the space before a word as part of the token.
    of_token = np.searchsorted(ends, alignment.offsets[:, 1], side="right")
    of_token = np.where(alignment.sequence_ids < 0, -1, of_token)
    labels = np.full(len(of_token), IGNORED, np.int32)
    found, first = np.unique(of_token, return_index=True)
    labels[first[found >= 0]] = tags[found[found >= 0]]
    return labels
