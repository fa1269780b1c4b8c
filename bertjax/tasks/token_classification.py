"""Labels of tokens and words, and the entities that they spell: names in a text, parts of speech."""

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from bertjax.checks import check_choice
from bertjax.engine import Encoded, Window
from bertjax.errors import InputError
from bertjax.heads import BertForTokenClassification
from bertjax.packing import PackedBatch
from bertjax.tasks.base import Plan, Task, softmax
from bertjax.text_inputs import whole_number
from bertjax.tokenizer_files import shorten

AggregationStrategy = Literal["none", "simple", "first", "average", "max"]

# What windows share at most, unless the caller says: 64 tokens on either side are context enough for a label.
_MAX_STRIDE = 128
# Texts may be whole documents, so a few at a time keep memory flat.
_CHUNK = 32


@dataclass(frozen=True)
class Entity:
    """A token with a label; `text[start:end]` is what it stands for.

    Attributes:
        entity: the label as the configuration has it, such as "B-PER".
        score: its probability.
        index: the token's place in the whole text's row of tokens, special tokens included.
        word: the token, such as "##ing"; of an unknown one, its text.
        start: its first character.
        end: the one after its last.
    """

    entity: str
    score: float
    index: int
    word: str
    start: int
    end: int


@dataclass(frozen=True)
class EntityGroup:
    """Adjacent tokens with one label; `text[start:end]` is the entity.

    Attributes:
        entity_group: the label without its prefix, such as "PER".
        score: the mean probability of the labels of its tokens, or of its words.
        word: its tokens as the tokenizer decodes them, so in lower case where the tokenizer makes them so.
        start: its first character.
        end: the one after its last.
    """

    entity_group: str
    score: float
    word: str
    start: int
    end: int


@dataclass(frozen=True)
class WordLabel:
    """A word's label as the configuration has it, such as "B-PER", and its probability."""

    label: str
    score: float


class _Table(NamedTuple):
    """The tokens of some texts, one text after another and without special tokens; an entry for each.

    Attributes:
        owners: int [tokens], which text it belongs to.
        index: int [tokens], its place in that text's row of tokens, special tokens included.
        ids: int [tokens].
        start, end: int [tokens], its characters.
        scores: float32 [tokens, labels], probabilities.
    """

    owners: np.ndarray
    index: np.ndarray
    ids: np.ndarray
    start: np.ndarray
    end: np.ndarray
    scores: np.ndarray


class _Runs(NamedTuple):
    """Tokens or words that follow one another without a gap, each with its most probable label.

    Attributes:
        first: int [runs], its first token.
        label: int [runs].
        score: float32 [runs].
    """

    first: np.ndarray
    label: np.ndarray
    score: np.ndarray


class TokenClassification(Task):
    """Finds entities in texts, or labels words, with a `BertForTokenClassification`.

    Results are those of transformers' token-classification pipeline, by the same names, for every text that the model
    takes at once. A longer one is not cut, but read by windows that overlap. Each token's label then comes from the
    window in which it is farthest from an edge, and entities are made of all the tokens of the text, so that no window
    splits, loses or doubles one.
    """

    kind = BertForTokenClassification

    def __call__(
        self,
        inputs: str | Iterable[str],
        *,
        aggregation_strategy: AggregationStrategy = "none",
        ignore_labels: Collection[str] = ("O",),
        stride: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[Any]:
        """Finds the entities of one text, or of each of several.

        Adjacent tokens make one entity where their labels are equal but for a prefix "B-" or "I-", and a "B-" begins a
        new one. "first", "average" and "max" give all tokens of a word one label before that. What continues a word is
        decided as in transformers: a token whose text has not as many characters as the token itself, "##" included,
        so that where the tokenizer drops a character inside a word (a combining accent), two words may count as one.

        Args:
            inputs: a text, or several.
            aggregation_strategy: "none" labels tokens; "simple" joins them; "first", "average" and "max" join words,
                with the label of a word's first token, of its tokens' mean probabilities, or of its surest token.
            ignore_labels: what to leave out: labels for "none" ("B-PER"), else labels without their prefix ("PER").
            stride: how many tokens a window over a long text shares with the one before; default: a quarter of its
                tokens, but at most 128.
            show_progress_bar: default: on a terminal, when it takes more than two seconds.

        Returns:
            The entities of the text, in order: a list of `Entity` for "none", else of `EntityGroup`. For several
            texts, a list of these lists.

        Raises:
            InputError: an input is no text (the message gives the position), or an option is not usable.
            ConfigError: the configuration's id2label is not usable.
        """
        return self._answer(
            inputs,
            show_progress_bar,
            aggregation_strategy=aggregation_strategy,
            ignore_labels=ignore_labels,
            stride=stride,
        )

    def label_words(
        self,
        inputs: Sequence[str] | Iterable[Sequence[str]],
        *,
        stride: int | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[Any]:
        """Labels the words of texts that are split already, such as those of a CoNLL file.

        The words of a text are joined by spaces, and each has the label of its first token, as is usual in training.
        To stream a corpus, pass `words=True` to `stream`.

        Args:
            inputs: the words of a text, a list or tuple of str; or those of several.
            stride: as in a call.
            show_progress_bar: as in a call.

        Returns:
            A `WordLabel` for each word, or None where the tokenizer leaves nothing of it (a lone control character).
            For several texts, a list of these lists.

        Raises:
            InputError: an input is no list of words (the message gives the position), or an option is not usable.
            ConfigError: as in a call.
        """
        is_one = isinstance(inputs, list | tuple) and inputs and all(isinstance(word, str) for word in inputs)
        labels = self._answer([inputs] if is_one else inputs, show_progress_bar, stride=stride, words=True)
        return labels[0] if is_one else labels

    def plan(
        self,
        *,
        aggregation_strategy: AggregationStrategy = "none",
        ignore_labels: Collection[str] = ("O",),
        stride: int | None = None,
        words: bool = False,
    ) -> Plan:
        """See `Task.plan`."""
        check_choice("aggregation_strategy", aggregation_strategy, get_args(AggregationStrategy))
        if isinstance(ignore_labels, str) or not isinstance(ignore_labels, Collection):
            raise InputError(f"ignore_labels is {ignore_labels!r}, expected a list of labels")
        names = self._names if aggregation_strategy == "none" else self._group_names
        ignored = [label for label, name in enumerate(names) if name in ignore_labels]
        room = self.max_length - self.tokenizer.num_special_tokens(pair=False)
        overlap = min(_MAX_STRIDE, room // 4) if stride is None else whole_number(stride, "stride")

        def encode(items: list[Any], position: int) -> Encoded:
            if not words:
                self._check_texts(items, position)
            texts = [_join_words(item, position + i) for i, item in enumerate(items)] if words else items
            tokens, owners = self.tokenizer.windows(
                texts, max_length=self.max_length, stride=overlap, first_position=position
            )
            return Encoded(items, tokens, owners)

        def read(window: Window) -> list[Any]:
            table = _whole_texts(window, overlap)
            if words:
                return self._label_words(table, window.encoded.items)
            return self._find_entities(table, window.encoded.items, aggregation_strategy, ignored)

        return Plan(encode, self._run, read, chunk=_CHUNK)

    def _run(self, batch: PackedBatch) -> jax.Array:
        return self._call(batch).logits

    @functools.cached_property
    def _names(self) -> list[str]:
        """The labels."""
        return list(self.model.config.id2label.values())

    @functools.cached_property
    def _group_names(self) -> list[str]:
        """The labels without their prefixes."""
        return [name.split("-", 1)[-1] for name in self._names]

    @functools.cached_property
    def _vocabulary(self) -> list[str]:
        """The token of each id."""
        return [self.tokenizer.id_to_token(index) or "" for index in range(self.tokenizer.vocab_size)]

    @functools.cached_property
    def _token_lengths(self) -> np.ndarray:
        """How many characters the token of each id has, those of "##" included."""
        return np.array([len(token) for token in self._vocabulary])

    @functools.cached_property
    def _join(self) -> Callable[[list[str]], str]:
        decoder = self.tokenizer.backend.decoder
        return " ".join if decoder is None else decoder.decode

    def _label_words(self, table: _Table, items: list[Sequence[str]]) -> list[list[WordLabel | None]]:
        """The labels of each item's words."""
        # Words are counted over all items, and characters as if a space followed each word.
        lengths = np.array([len(word) for words in items for word in words], np.int64)
        ends = np.cumsum(lengths + 1)
        item_words = np.cumsum([0, *map(len, items)])
        item_chars = np.append(0, ends)[item_words]
        # A token's end tells its word: some tokenizers count the space before a word as part of the token.
        words = np.searchsorted(ends, item_chars[table.owners] + table.end, side="right")
        words, tokens = np.unique(words, return_index=True)
        labels: list[WordLabel | None] = [None] * len(lengths)
        best = table.scores[tokens]
        for word, label, score in zip(words.tolist(), best.argmax(-1).tolist(), best.max(-1).tolist(), strict=True):
            labels[word] = WordLabel(self._names[label], score)
        return [labels[first:last] for first, last in itertools.pairwise(item_words.tolist())]

    def _find_entities(
        self, table: _Table, texts: list[str], strategy: AggregationStrategy, ignored: list[int]
    ) -> list[list[Any]]:
        """The entities of each text."""
        found: list[list[Any]] = [[] for _ in texts]
        if len(table.ids) == 0:
            return found
        pieces = self._pieces(table, texts)
        if strategy == "none":
            entities = self._tokens(table, pieces, ignored)
        elif strategy == "simple":
            runs = _label_runs(table.scores, np.arange(len(pieces)), strategy)
            entities = self._groups(table, runs, lambda i, j: pieces[i:j], ignored)
        else:
            first = np.flatnonzero(~self._continues_word(table, texts))
            bounds = [*first.tolist(), len(pieces)]

            def words(i: int, j: int) -> list[str]:
                return [self._join(pieces[begin:end]) for begin, end in itertools.pairwise(bounds[i : j + 1])]

            entities = self._groups(table, _label_runs(table.scores, first, strategy), words, ignored)
        for owner, entity in entities:
            found[owner].append(entity)
        return found

    def _pieces(self, table: _Table, texts: list[str]) -> list[str]:
        """Each token as a str; of an unknown one, its text."""
        pieces = [self._vocabulary[index] for index in table.ids.tolist()]
        for token in np.flatnonzero(self._is_unknown(table)).tolist():
            pieces[token] = texts[table.owners[token]][table.start[token] : table.end[token]]
        return pieces

    def _is_unknown(self, table: _Table) -> np.ndarray:
        unknown = self.tokenizer.unk_token_id
        return table.ids == (-1 if unknown is None else unknown)

    def _continues_word(self, table: _Table, texts: list[str]) -> np.ndarray:
        """Which tokens belong to the word of the token before; bool [tokens].

        By transformers' rules: of the lengths where the tokenizer marks the pieces that continue a word, and else of
        the spaces between tokens; an unknown token is a word.
        """
        if getattr(self.tokenizer.backend.model, "continuing_subword_prefix", None):
            continues = self._token_lengths[table.ids] != table.end - table.start
        else:
            places = zip(table.owners.tolist(), table.start.tolist(), strict=True)
            continues = np.array(
                [start > 0 and " " not in texts[owner][start - 1 : start + 1] for owner, start in places]
            )
        is_first = np.diff(table.owners, prepend=-1) != 0
        return continues & ~self._is_unknown(table) & ~is_first

    def _tokens(self, table: _Table, pieces: list[str], ignored: list[int]) -> Iterator[tuple[int, Entity]]:
        """The tokens whose labels count, each with the text it belongs to."""
        labels = table.scores.argmax(axis=-1)
        kept = np.flatnonzero(~np.isin(labels, ignored))
        columns = (table.owners[kept], kept, labels[kept], table.scores[kept, labels[kept]], table.index[kept])
        rows = zip(*(column.tolist() for column in (*columns, table.start[kept], table.end[kept])), strict=True)
        for owner, token, label, score, index, start, end in rows:
            yield owner, Entity(self._names[label], score, index, pieces[token], start, end)

    def _groups(
        self, table: _Table, runs: _Runs, words: Callable[[int, int], list[str]], ignored: list[int]
    ) -> Iterator[tuple[int, EntityGroup]]:
        """The runs whose labels count, joined, each group with the text it belongs to.

        `words(i, j)` spells the runs from `i` to before `j`, and is asked only for what is kept: it takes time.
        """
        first = self._group_starts(table.owners[runs.first], runs.label)
        last = np.append(first[1:], len(runs.first))
        label, score = runs.label[first], np.add.reduceat(runs.score, first) / (last - first)
        kept = ~np.isin(label, ignored)
        first, last, label, score = first[kept], last[kept], label[kept], score[kept]
        begin, end = runs.first[first], np.append(runs.first, len(table.ids))[last] - 1
        columns = (table.owners[begin], first, last, label, score, table.start[begin], table.end[end])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for owner, i, j, label, score, start, end in rows:
            yield owner, EntityGroup(self._group_names[label], score, self._join(words(i, j)), start, end)

    def _group_starts(self, owners: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Which runs do not continue the group of the run before: of another text or tag, or labelled "B-"."""
        tags = [name[2:] if name.startswith(("B-", "I-")) else name for name in self._names]
        tag = np.array([tags.index(tag) for tag in tags])[labels]
        begins = np.array([name.startswith("B-") for name in self._names])[labels]
        return np.flatnonzero((np.diff(owners, prepend=-1) != 0) | (np.diff(tag, prepend=-1) != 0) | begins)


def _join_words(words: Any, position: int) -> str:
    """The text of an item that is split into words."""
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise InputError(f"inputs[{position}] is {shorten(words)}, expected the list of a text's words")
    return " ".join(words)


def _whole_texts(window: Window, stride: int) -> _Table:
    """The tokens of each text, of which windows over it repeat some; each from where it is farthest from an edge."""
    tokens, owners = window.encoded.tokens, window.encoded.owners
    alignments = tokens.alignments
    rows = np.repeat(np.arange(len(tokens)), [len(ids) for ids in tokens.input_ids])
    columns = _count_up(rows)
    is_text = np.concatenate([alignment.sequence_ids for alignment in alignments]) >= 0
    rows, columns = rows[is_text], columns[is_text]
    place = _count_up(rows)
    # Of what two windows share, the first half is farther from an edge in the former, the second in the latter.
    follows = np.diff(owners, prepend=-1) == 0
    continued = np.append(follows[1:], False)
    begin = np.where(follows, (stride + 1) // 2, 0)
    end = np.bincount(rows, minlength=len(tokens)) - np.where(continued, stride // 2, 0)
    kept = (place >= begin[rows]) & (place < end[rows])
    source = np.flatnonzero(is_text)[kept]
    offsets = np.concatenate([alignment.offsets for alignment in alignments])[source]
    owner = owners[rows[kept]]
    return _Table(
        owners=owner,
        index=_count_up(owner) + (columns - place)[kept],
        ids=np.concatenate(tokens.input_ids)[source],
        start=offsets[:, 0],
        end=offsets[:, 1],
        scores=softmax(np.concatenate(window.per_token())[source]),
    )


def _count_up(groups: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each stretch of equal numbers."""
    is_first = np.diff(groups, prepend=-1) != 0
    everywhere = np.arange(len(groups))
    return everywhere - np.maximum.accumulate(np.where(is_first, everywhere, 0))


def _label_runs(scores: np.ndarray, first: np.ndarray, strategy: AggregationStrategy) -> _Runs:
    """Labels runs of tokens by their probabilities [tokens, labels]."""
    if strategy == "average":
        sizes = np.diff(first, append=len(scores)).astype(scores.dtype)
        of_runs = np.add.reduceat(scores, first) / sizes[:, None]
    elif strategy == "max":
        of_runs = scores[_surest(scores.max(axis=-1), first)]
    else:
        of_runs = scores[first]
    return _Runs(first, of_runs.argmax(axis=-1), of_runs.max(axis=-1))


def _surest(score: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The first token of the highest score in each run."""
    runs = np.repeat(np.arange(len(first)), np.diff(first, append=len(score)))
    highest = np.flatnonzero(score == np.maximum.reduceat(score, first)[runs])
    return highest[np.unique(runs[highest], return_index=True)[1]]
