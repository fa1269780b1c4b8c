"""Words that are hidden, to be found again, and texts that follow one another: what BERT was pre-trained for."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import nnx

from bertjax.heads import BertForMaskedLM, BertForPreTraining
from bertjax.tokenizer import Tokenizer
from bertjax.training.masking import Masking
from bertjax.training.metrics import masked_lm_metrics
from bertjax.training.objective import Batch, Objective, Terms, model_objective
from bertjax.training.optimizer import Params
from bertjax.training.pretraining import blocks, sentence_pairs
from bertjax.training.rows import Rows
from bertjax.training.tasks.base import Draft, Examples, Layout, LearningTask, check_texts, of_segments, of_tokens


class FindMaskedWords(LearningTask):
    """Masked language modelling of texts of any length; which words are masked is drawn anew for every batch.

    Column: text. A text that is longer than `max_length` becomes several examples.

    Args:
        tokenizer: the tokenizer.
        max_length: the longest example in tokens.
        masking: which tokens are to be found again.
    """

    model_class = BertForMaskedLM

    def __init__(self, tokenizer: Tokenizer, max_length: int, *, masking: Masking):
        super().__init__(tokenizer, max_length)
        self.masking = masking

    def examples(self, rows: Rows) -> tuple[Examples, Rows]:
        """See `LearningTask`."""
        rows = check_texts(rows, "text")
        texts = self._bare([record["text"] for record in rows.records])
        ids = blocks(texts, self.max_length, self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)
        return Examples(ids, [np.zeros_like(each) for each in ids], np.arange(len(ids))[:, None]), rows

    def prepare(
        self, rng: np.random.Generator, examples: Examples, texts: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """See `LearningTask`."""
        return self.masking(rng, [examples.input_ids[text] for text in texts])

    def labels(self, draft: Draft) -> dict[str, np.ndarray]:
        """See `LearningTask`."""
        return {"labels": of_tokens(draft.packed, draft.made)}

    def objective(self, model: nnx.Module, layout: Layout) -> Objective:
        """See `LearningTask`; only the masked tokens are compared with the vocabulary."""

        def losses(params: Params, batch: Batch, key: Any) -> Terms:
            options = self._options(layout) | {"max_predictions": self._most(batch["input_ids"].size, layout.size)}
            return model_objective(model, **options).losses(params, batch, key)

        return Objective(losses, model_objective(model).counts)

    def metrics(self, model: nnx.Module, examples: Examples, losses: dict[str, float]) -> dict[str, float]:
        """The perplexity of the masked words: e to the power of their loss."""
        return {"perplexity": masked_lm_metrics(losses[self.terms[0]])["perplexity"]}

    def _most(self, positions: int, texts: int) -> int:
        """How many tokens of a batch are masked at most: of each text a part that is rounded, and at least one."""
        return min(int(self.masking.probability * positions) + texts, positions)

    def _options(self, layout: Layout) -> dict[str, int]:
        return {}

    def _bare(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of texts of any length, without special tokens."""
        encode = self.tokenizer.backend.encode_batch_fast
        parts = (texts[first : first + 256] for first in range(0, len(texts), 256))
        encodings = itertools.chain.from_iterable(encode(part, add_special_tokens=False) for part in parts)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]


class PreTrain(FindMaskedWords):
    """BERT's own pre-training: masked language modelling, and whether a text follows another.

    Column: text, a sentence a row, with an empty text behind each document. Which sentences make a pair is drawn once.

    Args:
        tokenizer, max_length, masking: see `FindMaskedWords`.
        seed: of the pairs.
    """

    model_class = BertForPreTraining
    terms = ("masked_lm_loss", "next_sentence_loss")

    def __init__(self, tokenizer: Tokenizer, max_length: int, *, masking: Masking, seed: int):
        super().__init__(tokenizer, max_length, masking=masking)
        self.seed = seed

    def examples(self, rows: Rows) -> tuple[Examples, Rows]:
        """See `LearningTask`."""
        rows = check_texts(rows, "text")
        documents = list(_documents(self._bare([record["text"].strip() for record in rows.records])))
        pairs = sentence_pairs(
            np.random.default_rng(self.seed),
            documents,
            self.max_length,
            self.tokenizer.cls_token_id,
            self.tokenizer.sep_token_id,
        )
        texts = np.arange(len(pairs.input_ids))[:, None]
        return Examples(pairs.input_ids, pairs.token_type_ids, texts, pairs.next_sentence_label), rows

    def labels(self, draft: Draft) -> dict[str, np.ndarray]:
        """See `LearningTask`."""
        follows = of_segments(draft, draft.examples.labels[draft.chosen])
        return super().labels(draft) | {"next_sentence_label": follows}

    def _options(self, layout: Layout) -> dict[str, int]:
        return {"max_segments": layout.segments}


def _documents(sentences: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Sentences up to each empty one."""
    for is_text, document in itertools.groupby(sentences, key=lambda ids: len(ids) > 0):
        if is_text:
            yield list(document)
