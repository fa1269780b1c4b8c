"""Questions about documents of any length: the spans of text that answer them."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from bertjax.checks import check_choice, check_count
from bertjax.engine import Encoded, Window
from bertjax.errors import ConfigError, InputError
from bertjax.heads import BertForQuestionAnswering
from bertjax.packing import PackedBatch
from bertjax.tasks.base import Plan, Task, as_pair, check_reads_pairs, softmax
from bertjax.tokenizer import Tokenizer
from bertjax.tokens import Alignment

# What windows and their overlap are at most where the caller does not say.
_MAX_SEQ_LEN = 384
_DOC_STRIDE = 128
# Contexts are whole documents, so a few at a time keep memory flat.
_CHUNK = 32

#: A question and its context.
Question = tuple[str, str] | Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer, as a part of the context.

    Attributes:
        score: the probability of the span's start times that of its end, added up over all spans of this text. A text
            that stands in the overlap of two windows counts in both, so the sum may exceed 1.
        start: its first character in the context.
        end: the character after its last.
        answer: `context[start:end]`; "" says that the context has no answer, and then start and end are 0.
    """

    score: float
    start: int
    end: int
    answer: str


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Which spans are answers; the options of `QuestionAnswering.__call__` by their names."""

    top_k: int
    max_answer_len: int
    handle_impossible_answer: bool
    align_to_words: bool

    @property
    def spans_per_window(self) -> int:
        """How many spans of a window are considered: several may become one when they are widened to words."""
        return 2 * self.top_k + 10 if self.align_to_words else self.top_k


class QuestionAnswering(Task):
    """Finds the answer to a question in a context of any length.

    A context that is too long for one row is read in overlapping windows. The spans, their scores and their merging
    are those of the "question-answering" pipeline of transformers 4 with a fast tokenizer.
    """

    kind = BertForQuestionAnswering
    single = (str, tuple, Mapping)

    def __init__(self, model: BertForQuestionAnswering, tokenizer: Tokenizer, **options: Any):
        super().__init__(model, tokenizer, **options)
        check_reads_pairs(self.model.config)
        if tokenizer.cls_token_id not in tokenizer([""], [""]).input_ids[0][:1]:
            raise ConfigError("the tokenizer puts no [CLS] before a question, which stands for no answer; add it there")

    def __call__(
        self,
        inputs: Question | Iterable[Question],
        *,
        top_k: int = 1,
        doc_stride: int | None = None,
        max_answer_len: int = 15,
        max_seq_len: int | None = None,
        max_question_len: int | None = None,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
        show_progress_bar: bool | None = None,
    ) -> Answer | list[Answer] | list[Answer | list[Answer]]:
        """Answers one question, or several.

        In each window, start and end logits become probabilities by a softmax over the context's tokens and [CLS],
        which stands for "no answer". A span scores the product of its start's and its end's. The best spans of all
        windows are merged where their texts are equal but for case: scores are added, and the first one's place counts.

        Args:
            inputs: a mapping with the keys "question" and "context", a tuple (question, context), or an iterable of
                these.
            top_k: how many answers to give; there are fewer where the context has no more.
            doc_stride: how many tokens of context a window shares with the one before; default: 128, or half of
                `max_seq_len` where that is less.
            max_answer_len: the longest answer in tokens, before it is widened to whole words.
            max_seq_len: the longest window in tokens, with the question and the special tokens; default: 384, or what
                the model takes where that is less.
            max_question_len: keeps only the whole words within so many tokens of a question; default: all of it, which
                is also what the pipeline does with a fast tokenizer, whatever its own option says.
            handle_impossible_answer: also consider that there is no answer. Its score is the least of all windows':
                the probability that the answer starts at [CLS] times that it ends there.
            align_to_words: widen answers to whole words.
            show_progress_bar: default: where it takes longer than two seconds.

        Returns:
            For one input an `Answer`, or with `top_k` greater than 1 a list of at most so many, best first (of
            equal scores the one that comes first). For several inputs, a list of that. Where the context has no
            tokens, the answer is "" with score 0.

        Raises:
            InputError: an option is not usable; or an input is not of this form, its question or context is empty, or
                its question leaves too little of a window for the context (the message gives the position).
        """
        return self._answer(
            inputs,
            show_progress_bar,
            top_k=top_k,
            doc_stride=doc_stride,
            max_answer_len=max_answer_len,
            max_seq_len=max_seq_len,
            max_question_len=max_question_len,
            handle_impossible_answer=handle_impossible_answer,
            align_to_words=align_to_words,
        )

    def plan(
        self,
        *,
        top_k: int = 1,
        doc_stride: int | None = None,
        max_answer_len: int = 15,
        max_seq_len: int | None = None,
        max_question_len: int | None = None,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
    ) -> Plan:
        """See `Task.plan`."""
        check_choice("handle_impossible_answer", handle_impossible_answer, (True, False))
        check_choice("align_to_words", align_to_words, (True, False))
        choice = _Choice(
            top_k=check_count("top_k", top_k),
            max_answer_len=check_count("max_answer_len", max_answer_len),
            handle_impossible_answer=handle_impossible_answer,
            align_to_words=align_to_words,
        )
        max_seq_len, doc_stride = self._window_size(max_seq_len, doc_stride)
        if max_question_len is not None:
            max_question_len = check_count("max_question_len", max_question_len)
        encode = functools.partial(
            self._encode, max_seq_len=max_seq_len, doc_stride=doc_stride, max_question_len=max_question_len
        )
        return Plan(encode, self._run, functools.partial(_read, choice=choice), chunk=_CHUNK, max_length=max_seq_len)

    def _window_size(self, max_seq_len: int | None, doc_stride: int | None) -> tuple[int, int]:
        """The length of a window and the overlap of two, checked."""
        max_seq_len = min(self.max_length, _MAX_SEQ_LEN) if max_seq_len is None else max_seq_len
        max_seq_len = check_count("max_seq_len", max_seq_len)
        if max_seq_len > self.max_length:
            raise InputError(f"max_seq_len is {max_seq_len}, but this model takes at most {self.max_length} tokens")
        room = max_seq_len - self.tokenizer.num_special_tokens(pair=True)
        doc_stride = min(max_seq_len // 2, _DOC_STRIDE, max(room - 1, 0)) if doc_stride is None else doc_stride
        doc_stride = check_count("doc_stride", doc_stride, least=0)
        if room <= doc_stride:
            raise InputError(
                f"max_seq_len={max_seq_len} leaves {max(room, 0)} tokens besides the special ones, which is too few "
                f"for windows that share doc_stride={doc_stride}; use a larger max_seq_len or a smaller doc_stride"
            )
        return max_seq_len, doc_stride

    def _encode(
        self, items: list[Any], position: int, *, max_seq_len: int, doc_stride: int, max_question_len: int | None
    ) -> Encoded:
        """The windows over the contexts, each after its question."""
        examples = [_as_example(item, index) for index, item in enumerate(items, position)]
        questions, contexts = map(list, zip(*examples, strict=True))
        if max_question_len is not None:
            questions = self._cut(questions, max_question_len, position)
        size = {"max_length": max_seq_len, "stride": doc_stride}
        try:
            tokens, owners = self.tokenizer.windows(questions, contexts, **size, first_position=position)
        except InputError as error:
            self._refuse(questions, contexts, position, size, error)
        return Encoded(contexts, tokens, owners)

    def _cut(self, questions: list[str], max_question_len: int, position: int) -> list[str]:
        """The questions without the words that do not fit into so many tokens."""
        cut = []
        tokens = self.tokenizer(questions, return_alignment=True, first_position=position)
        for index, (question, alignment) in enumerate(zip(questions, tokens.alignments, strict=True)):
            own = np.flatnonzero(alignment.sequence_ids == 0)
            if len(own) > max_question_len:
                whole = own[alignment.word_ids[own] < alignment.word_ids[own[max_question_len]]]
                if not len(whole):
                    raise InputError(
                        f"inputs[{position + index}]: the question's first word has more than "
                        f"max_question_len={max_question_len} tokens"
                    )
                question = question[: alignment.offsets[whole[-1], 1]]
            cut.append(question)
        return cut

    def _refuse(
        self, questions: list[str], contexts: list[str], position: int, size: dict[str, int], error: InputError
    ) -> NoReturn:
        """Says by the names of the caller's options which question is too long: all else was checked before."""
        for index, (question, context) in enumerate(zip(questions, contexts, strict=True), position):
            try:
                self.tokenizer.windows([question], [context], **size)
            except InputError:
                count = len(self.tokenizer([question]).input_ids[0]) - self.tokenizer.num_special_tokens(pair=False)
                raise InputError(
                    f"inputs[{index}]: the question has {count} tokens, which is too many for windows of "
                    f"max_seq_len={size['max_length']} tokens that share doc_stride={size['stride']} tokens of "
                    "context; use a shorter question, a larger max_seq_len or a smaller doc_stride"
                ) from error
        raise error

    def _run(self, batch: PackedBatch) -> jax.Array:
        """Logits [rows, length, 2] of start and end."""
        output = self._call(batch)
        return jnp.stack([output.start_logits, output.end_logits], axis=-1)


def _as_example(item: Any, position: int) -> tuple[str, str]:
    """The question and the context of an input, checked."""
    question, context = as_pair(item, position, keys=("question", "context"))
    for name, text in (("question", question), ("context", context)):
        if not text:
            raise InputError(f"inputs[{position}]: the {name} is empty")
    return question, context


def _read(window: Window, choice: _Choice) -> list[Any]:
    """The answers to the window's inputs."""
    encoded = window.encoded
    logits = window.per_token()
    bounds = np.searchsorted(encoded.owners, np.arange(len(encoded.items) + 1))
    answers = []
    for context, first, last in zip(encoded.items, bounds[:-1], bounds[1:], strict=True):
        best = _answers(context, logits[first:last], encoded.tokens.alignments[first:last], choice)
        answers.append(best[0] if choice.top_k == 1 else best)
    return answers


def _answers(context: str, logits: list[np.ndarray], alignments: list[Alignment], choice: _Choice) -> list[Answer]:
    """The best answers out of all windows over one context."""
    null_scores = []
    found: dict[str, list] = {}  # score, start and end by text
    for row, alignment in zip(logits, alignments, strict=True):
        in_context = np.flatnonzero(alignment.sequence_ids == 1)
        # Of what is no context, only [CLS] takes part in the softmax: it is where "no answer" starts and ends.
        probabilities = softmax(row[np.append(0, in_context)].T)
        null_scores.append(float(probabilities[:, 0].prod()))
        scores, firsts, lasts = _best_spans(*probabilities[:, 1:], choice.spans_per_window, choice.max_answer_len)
        if choice.align_to_words:
            firsts, lasts = _widen(firsts, lasts, alignment.word_ids[in_context])
        offsets = alignment.offsets[in_context]
        spans = np.stack([offsets[firsts, 0], offsets[lasts, 1]], axis=1)
        for score, (start, end) in zip(scores.tolist(), spans.tolist(), strict=True):
            found.setdefault(context[start:end].lower(), [0.0, start, end])[0] += score
    answers = list(found.values())
    if choice.handle_impossible_answer:
        answers.append([min(null_scores), 0, 0])
    best = sorted(answers or [[0.0, 0, 0]], key=lambda answer: -answer[0])[: choice.top_k]
    return [Answer(score, start, end, context[start:end]) for score, start, end in best]


def _best_spans(
    start: np.ndarray, end: np.ndarray, count: int, max_answer_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The spans with the largest products of start's and end's probabilities.

    Args:
        start: float32 [tokens], the probability that a span starts at a token.
        end: float32 [tokens], that it ends there.
        count: how many spans to give at most.
        max_answer_len: how many tokens a span has at most.

    Returns:
        Their scores, first tokens and last tokens (inclusive), each [spans], best first; equal ones by their place.
    """
    tokens = np.arange(len(start))
    firsts, lengths = np.nonzero(tokens[:, None] + tokens[:max_answer_len] < len(start))
    lasts = firsts + lengths
    scores = start[firsts] * end[lasts]
    least = np.partition(scores, -count)[-count] if count < len(scores) else -np.inf
    candidates = np.flatnonzero(scores >= least)
    best = candidates[np.argsort(-scores[candidates], kind="stable")][:count]
    return scores[best], firsts[best], lasts[best]


def _widen(firsts: np.ndarray, lasts: np.ndarray, word_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spans of tokens, widened to whole words as far as the window has them; the tokens' word_ids count up."""
    begins = np.flatnonzero(np.diff(word_ids, prepend=-1))
    ends = np.append(begins[1:], len(word_ids)) - 1
    return (
        begins[np.searchsorted(begins, firsts, side="right") - 1],
        ends[np.searchsorted(begins, lasts, side="right") - 1],
    )
