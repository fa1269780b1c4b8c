"""How good predictions are, in numbers: thin functions over scikit-learn, scipy and seqeval.

A model that has diverged is to show it, and not to end a run: where one of its outputs is NaN, every metric is NaN.
What was expected of it is data, and is refused where it is wrong. Without any examples there is nothing to measure, and
that is an `InputError` everywhere.
"""

import collections
import importlib
import math
import re
import string
import warnings
from collections.abc import Collection, Sequence
from types import ModuleType

import numpy as np
from numpy.typing import ArrayLike

from bertjax.errors import InputError, SourceError

Tags = Sequence[Sequence[str]]

# A tag of an entity's token: what it is of the entity, and the entity's type, which some data sets do without.
_TAG = re.compile(r"O|[BIELSU](-.+)?", re.DOTALL)
# seqeval's schemes, and what a token of an entity may be; of several that fit, the first is meant.
_SCHEMES = {"IOB2": "BI", "IOE2": "IE", "IOBES": "BIES", "BILOU": "BILU"}
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Queries that are compared with all passages at a time.
_BLOCK = 1024
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def classification_metrics(logits: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Metrics of one label out of several, the one with the greatest logit.

    Args:
        logits: float [n, classes].
        labels: int [n], from 0 to classes - 1.

    Returns:
        accuracy; f1, the mean over the classes that occur; with two classes f1_positive, that of class 1, which GLUE
        reports (Wang et al. 2018, arXiv:1804.07461); matthews_correlation, 0 if only one class occurs.

    Raises:
        InputError: a shape, a type or a label is wrong.
    """
    sklearn = _library("sklearn.metrics")
    logits = _numbers("logits", logits, 2)
    labels = _classes(labels, *logits.shape)
    names = ["accuracy", "f1", *["f1_positive"] * (logits.shape[1] == 2), "matthews_correlation"]
    if np.isnan(logits).any():
        return dict.fromkeys(names, math.nan)
    found = logits.argmax(1)
    # scikit-learn warns of a single class, whose correlation is 0 / 0.
    varied = len(np.union1d(labels, found)) > 1
    metrics = {
        "accuracy": sklearn.accuracy_score(labels, found),
        "f1": sklearn.f1_score(labels, found, average="macro", zero_division=0.0),
        "f1_positive": sklearn.f1_score(labels, found, labels=[1], average="macro", zero_division=0.0),
        "matthews_correlation": sklearn.matthews_corrcoef(labels, found) if varied else 0.0,
    }
    return {name: float(metrics[name]) for name in names}


def choice_metrics(scores: Sequence[ArrayLike], labels: ArrayLike) -> dict[str, float]:
    """How often the right one of several texts has the greatest score.

    Args:
        scores: for each example, float [choices].
        labels: int [n], the place of the right one.

    Returns:
        accuracy, NaN if a score is.

    Raises:
        InputError: a shape or a type is wrong, or a label is no choice.
    """
    found = [_numbers(f"scores[{row}]", each, 1) for row, each in enumerate(scores)]
    if not found:
        raise InputError("there are no scores to measure")
    labels = _classes(labels, len(found), max(map(len, found)))
    counts = np.array([len(each) for each in found])
    _check_values("labels", labels, labels < counts, "one of the choices")
    if any(np.isnan(each).any() for each in found):
        return {"accuracy": math.nan}
    best = [int(each.argmax()) for each in found]
    return {"accuracy": float(_library("sklearn.metrics").accuracy_score(labels, best))}


def multilabel_metrics(logits: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Metrics of any number of labels at a time: those whose sigmoid is above 0.5.

    Args:
        logits: float [n, labels].
        labels: [n, labels], 1 for a label that is there and 0 for one that is not.

    Returns:
        f1_micro, over all decisions together; f1_macro, the mean over the labels, 0 for one that never occurs;
        accuracy, how often all labels are right.

    Raises:
        InputError: a shape, a type or a label is wrong.
    """
    sklearn = _library("sklearn.metrics")
    logits, labels = _numbers("logits", logits, 2), _numbers("labels", labels, 2)
    _check_shape("labels", labels, logits.shape)
    _check_values("labels", labels, (labels == 0) | (labels == 1), "0 or 1")
    if np.isnan(logits).any():
        return dict.fromkeys(("f1_micro", "f1_macro", "accuracy"), math.nan)
    expected, found = labels.astype(int), (logits > 0).astype(int)
    micro = sklearn.f1_score(expected.ravel(), found.ravel(), labels=[1], average="macro", zero_division=0.0)
    # scikit-learn takes a single column for two classes.
    several = labels.shape[1] > 1
    macro = sklearn.f1_score(expected, found, average="macro", zero_division=0.0) if several else micro
    return {"f1_micro": float(micro), "f1_macro": float(macro), "accuracy": float((expected == found).all(1).mean())}


def regression_metrics(values: ArrayLike, targets: ArrayLike) -> dict[str, float]:
    """Metrics of a number.

    Args:
        values: float [n], what was predicted.
        targets: float [n], what was expected.

    Returns:
        pearson and spearman, the correlations, NaN if either side is constant; mean_squared_error. All are NaN if a
        value is not finite.

    Raises:
        InputError: a shape or a type is wrong, or a target is not finite.
    """
    values, targets = _pairs("values", values, "targets", targets)
    with np.errstate(all="ignore"):
        error = float(np.square(values - targets).mean()) if np.isfinite(values).all() else math.nan
    return {**_correlations(values, targets), "mean_squared_error": error}


def similarity_metrics(cosines: ArrayLike, scores: ArrayLike) -> dict[str, float]:
    """How the cosines of pairs of texts go with the scores that people gave them; float [n] each.

    Returns:
        pearson and spearman; see `regression_metrics`, for the errors too.
    """
    return _correlations(*_pairs("cosines", cosines, "scores", scores))


def ranking_metrics(queries: ArrayLike, passages: ArrayLike) -> dict[str, float]:
    """How queries rank their own passages among all of them, by dot products.

    Args:
        queries: float [n, dim].
        passages: float [n, dim], of each query its own.

    Returns:
        accuracy, how often the own passage is the first, and mrr, the mean of 1 / its rank; of passages with the same
        score the own one is the last. Both are NaN if a score is.

    Raises:
        InputError: a shape or a type is wrong.
    """
    queries, passages = _numbers("queries", queries, 2), _numbers("passages", passages, 2)
    _check_shape("passages", passages, queries.shape)
    ranks = np.concatenate([_ranks(queries, passages, first) for first in range(0, len(queries), _BLOCK)])
    # No rank is above NaN: a model that has diverged does not find everything.
    accuracy = math.nan if np.isnan(ranks).any() else float((ranks == 1).mean())
    return {"accuracy": accuracy, "mrr": float((1 / ranks).mean())}


def _ranks(queries: np.ndarray, passages: np.ndarray, first: int) -> np.ndarray:
    """The ranks of some queries' own passages, counted from 1; NaN if the score is none."""
    scores = queries[first : first + _BLOCK] @ passages.T
    own = scores[np.arange(len(scores)), first + np.arange(len(scores))]
    return np.where(np.isnan(own), np.nan, (scores >= own[:, None]).sum(1))


def tagging_metrics(predicted: Tags, expected: Tags, *, names: Collection[str] | None = None) -> dict[str, float]:
    """Metrics of the tags of words, and of the entities that they stand for.

    The scheme is what the names of the tags allow: B- and I- for IOB2, with E- or S- for IOBES, with L- or U- for
    BILOU, I- and E- for IOE2. Names of IOB2 are taken for IOB1 if there I- begins what is expected, and never B-. An
    entity counts as found if its type and both ends are right (seqeval's strict mode; Tjong Kim Sang & De Meulder 2003,
    arXiv:cs/0306050).

    Args:
        predicted: the tags of each text.
        expected: likewise, as many.
        names: all tags that there are; default: those that occur, which may be too few to tell the scheme.

    Returns:
        accuracy, of tags; precision, recall and f1, of entities of all types together. If the names follow no scheme,
        as those of parts of speech, only accuracy and f1: the mean over the tags that occur.

    Raises:
        InputError: the two do not have the same lengths, or a tag is no string.
    """
    flat = _flat_tags("predicted", predicted), _flat_tags("expected", expected)
    lengths = [len(tags) for tags in predicted], [len(tags) for tags in expected]
    if lengths[0] != lengths[1]:
        text = next((text for text, pair in enumerate(zip(*lengths, strict=False)) if pair[0] != pair[1]), None)
        where = f"{len(predicted)} and {len(expected)} texts" if text is None else f"other lengths in text {text}"
        raise InputError(f"predicted and expected have {where}, expected as many tags in both")
    if not flat[0]:
        raise InputError("there are no tags to measure")
    sklearn = _library("sklearn.metrics")
    accuracy = {"accuracy": float(sklearn.accuracy_score(flat[1], flat[0]))}
    scheme = _scheme({*flat[0], *flat[1]} if names is None else set(names).union(*flat), expected)
    if scheme is None:
        return accuracy | {"f1": float(sklearn.f1_score(flat[1], flat[0], average="macro", zero_division=0.0))}
    return accuracy | _entity_metrics(predicted, expected, scheme)


def answer_metrics(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Metrics of answers to questions, as SQuAD defines them (Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1).

    Case, punctuation and articles do not count. As in SQuAD 2.0, an empty text says that there is no answer.

    Args:
        predicted: an answer to each question.
        answers: the answers that are right, for each question; none, or only empty ones, if it has no answer.

    Returns:
        exact_match, how many are right, and f1, the mean overlap in words with the most similar one; both from 0 to 1.

    Raises:
        InputError: the two do not have the same length, or something is no text.
    """
    if len(predicted) != len(answers) or not len(predicted):
        raise InputError(f"there are {len(predicted)} predicted answers and {len(answers)} expected ones")
    scores = []
    for number, (text, accepted) in enumerate(zip(predicted, answers, strict=True)):
        if isinstance(accepted, str) or not all(isinstance(each, str) for each in (text, *accepted)):
            raise InputError(f"question {number}: expected a text in predicted, and a list of texts in answers")
        found = _words(text)
        # An answer of nothing but articles and punctuation could not be told from none.
        wanted = [words for words in map(_words, accepted) if words] or [[]]
        scores.append((found in wanted, max(_overlap(found, words) for words in wanted)))
    exact, overlap = np.mean(scores, axis=0).tolist()
    return {"exact_match": exact, "f1": overlap}


def masked_lm_metrics(mean_loss: float) -> dict[str, float]:
    """The loss of a language model, a mean over tokens in nats, and its perplexity, e to that power."""
    loss = float(_numbers("mean_loss", mean_loss, 0))
    with np.errstate(over="ignore"):
        return {"loss": loss, "perplexity": float(np.exp(loss))}


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as problem:
        package = {"sklearn": "scikit-learn"}.get(name.partition(".")[0], name.partition(".")[0])
        message = f"{package} is needed to measure how good a model is ({problem}): pip install 'bertjax[train]'"
        raise SourceError(message) from None


def _numbers(name: str, value: ArrayLike, ndim: int) -> np.ndarray:
    """An array as float64, of so many axes and not empty."""
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError) as problem:
        raise InputError(f"{name} is no array of numbers ({problem})") from None
    if array.ndim != ndim or not array.size:
        raise InputError(f"{name} has the shape {list(array.shape)}, expected {ndim} axes and something along each")
    return array


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise InputError(f"{name} has the shape {list(array.shape)}, expected {list(shape)}")


def _check_values(name: str, array: np.ndarray, right: np.ndarray, expected: str) -> None:
    if not right.all():
        place = np.argwhere(~right)[0].tolist()
        raise InputError(f"{name} has {array[tuple(place)]:g} at {place}, expected {expected}")


def _classes(labels: ArrayLike, count: int, classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise InputError(f"labels has the dtype {labels.dtype}, expected integers")
    _check_shape("labels", labels, (count,))
    _check_values("labels", labels, (labels >= 0) & (labels < classes), f"a class from 0 to {classes - 1}")
    return labels


def _pairs(name: str, values: ArrayLike, other: str, targets: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    found, expected = _numbers(name, values, 1), _numbers(other, targets, 1)
    _check_shape(name, found, expected.shape)
    _check_values(other, expected, np.isfinite(expected), "a finite number")
    return found, expected


def _correlations(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """NaN where they are not defined: of a single pair, of a constant, of what is not finite."""
    stats = _library("scipy.stats")
    if len(found) < 2 or not np.isfinite(found).all():
        return {"pearson": math.nan, "spearman": math.nan}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        pearson, spearman = (measure(found, expected).statistic for measure in (stats.pearsonr, stats.spearmanr))
    return {"pearson": float(pearson), "spearman": float(spearman)}


def _flat_tags(name: str, texts: Tags) -> list[str]:
    for number, tags in enumerate(texts):
        if isinstance(tags, str) or not all(isinstance(tag, str) for tag in tags):
            raise InputError(f"{name}: text {number} is {tags!r:.60}, expected a list of tags")
    return [tag for tags in texts for tag in tags]


def _scheme(names: Collection[str], expected: Tags) -> str | None:
    """The scheme of the tags, as seqeval calls it, or None for tags of another kind."""
    if not all(map(_TAG.fullmatch, names)):
        return None
    letters = {name[0] for name in names} - {"O"}
    scheme = next((scheme for scheme, own in _SCHEMES.items() if letters <= set(own)), None)
    return "IOB1" if scheme == "IOB2" and _first_letters(expected) == {"I"} else scheme


def _first_letters(texts: Tags) -> set[str]:
    """What tags begin with that come after another type or none."""
    pairs = (pair for tags in texts for pair in zip(["O", *tags], tags, strict=False))
    return {tag[0] for before, tag in pairs if tag != "O" and (before == "O" or before[1:] != tag[1:])}


def _entity_metrics(predicted: Tags, expected: Tags, scheme: str) -> dict[str, float]:
    measure = _library("seqeval.metrics.v1").precision_recall_fscore_support
    texts = [list(tags) for tags in expected], [list(tags) for tags in predicted]
    options = {"average": "micro", "zero_division": 0, "scheme": getattr(_library("seqeval.scheme"), scheme)}
    precision, recall, f1, _ = measure(*texts, **options)
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1)}


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _overlap(found: list[str], wanted: list[str]) -> float:
    """The harmonic mean of precision and recall of words; without words on a side, whether both have none."""
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (collections.Counter(found) & collections.Counter(wanted)).total() / (len(found) + len(wanted))
