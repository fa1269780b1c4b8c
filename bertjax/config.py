"""The configuration of a BERT encoder, under Hugging Face's names.

`BertConfig` holds every field that changes the numbers, checked when it is built, before anything is allocated.
`from_hf` reads a `config.json`; a field that is neither understood here nor known to be without effect on the encoder
is refused, because a field that is read and ignored is how a port goes quietly wrong. What is known to be without
effect is kept aside in `extra` and comes back from `to_hf` unchanged.
"""

import dataclasses
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bertjax import labels
from bertjax.errors import ConfigError
from bertjax.json_files import read_json

#: Activations by Hugging Face's names. "gelu" is the erf form; "gelu_new", "gelu_pytorch_tanh" and "gelu_fast" are
#: three spellings of the tanh approximation; "quick_gelu" is x * sigmoid(1.702 x).
ACTIVATIONS = (
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "gelu_fast",
    "quick_gelu",
    "relu",
    "silu",
    "swish",
    "tanh",
)

#: Where a token's place enters: "absolute" adds an embedding of it to the token's; "relative_key" adds the product of
#: the query and an embedding of the distance to each attention score (Shaw et al. 2018, arXiv:1803.02155), and
#: "relative_key_query" the key's product as well (Huang et al. 2020, arXiv:2009.13658).
POSITION_EMBEDDING_TYPES = ("absolute", "relative_key", "relative_key_query")

#: Sizes of the published English models (google-research/bert): layers, hidden size, heads.
PRESETS: Mapping[str, tuple[int, int, int]] = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}

# Upper bounds are far above any BERT that was ever published, and low enough that a hostile or garbled config can't
# ask for an absurd allocation.
_MAX_SIZE = 1 << 16
_MAX_LAYERS = 1 << 10
_MAX_ROWS = 1 << 24

# Fields of config.json that do not change what the encoder computes: they concern generation, training bookkeeping,
# the library that wrote the file, the heads, or the tokenizer. They are carried, not read.
_INERT_FIELDS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _num_labels adapters architectures
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout cls_token_id
    decoder_start_token_id directionality diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    eos_token_id eos_token_ids exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label keys_to_ignore_at_inference label2id language
    length_penalty mask_token_id max_length min_length model_max_length model_name name no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_attentions output_hidden_states output_past
    output_scores pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
    prefix problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sbert_ce_default_activation_function sentence_transformers sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p unk_token_id use_bfloat16 use_cache vocab_file xla_device
    """.split()
)

# How the names of other models' classes begin, of those whose tensors are called as BERT's are, or nearly.
_FOREIGN = (
    "Albert",
    "Camembert",
    "DebertaV2",
    "Deberta",
    "DistilBert",
    "Electra",
    "Ernie",
    "MPNet",
    "ModernBert",
    "NomicBert",
    "Roberta",
    "XLMRoberta",
    "Xmod",
)

# Fields that would change the computation in a way that bertjax does not implement. Each is accepted only at the
# value(s) that leave the plain encoder as it is.
_REFUSED_UNLESS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "is_decoder": ((False, None), "bertjax implements the encoder only"),
    "add_cross_attention": ((False, None), "bertjax implements the encoder only"),
    "is_encoder_decoder": ((False, None), "bertjax implements the encoder only"),
    "tie_encoder_decoder": ((False, None), "bertjax implements the encoder only"),
    "cross_attention_hidden_size": ((None,), "bertjax implements the encoder only"),
    "pruned_heads": (({}, None), "pruned heads are not supported; un-prune the checkpoint first"),
    "quantization_config": ((None,), "quantised weights are not supported; convert the original, unquantised model"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes and constants of a BERT encoder.

    Every field has the name and the default of Hugging Face's `BertConfig`. Instances are immutable and hashable, and
    building one with unusable values raises `ConfigError` that lists every problem.

    `extra` carries the fields of a `config.json` that do not change the encoder's numbers (labels, versions, ...), so
    that `to_hf` gives them back; it takes no part in equality or hashing. What heads need of it has properties, which
    check it when they are asked.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    position_embedding_type: str = "absolute"
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        problems = _problems(self)
        if problems:
            raise ConfigError("unusable BERT configuration: " + "; ".join(problems))

    @property
    def head_dim(self) -> int:
        """Width of one attention head, `hidden_size // num_attention_heads`."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_labels(self) -> int:
        """Number of classes of a classification head: as many as `extra` has in id2label, else its num_labels, else 2.

        Raises:
            ConfigError: the two contradict each other, or one is unusable. transformers believes id2label then, but
                only the weights can tell.
        """
        names, count = self.extra.get("id2label"), self.extra.get("num_labels")
        if names is not None and not (isinstance(names, Mapping) and names):
            raise ConfigError(f"id2label={reprlib.repr(names)}: expected an object with a name for every label")
        if count is not None:
            _check("num_labels", count, _size(_MAX_ROWS))
        if names is not None and count not in (None, len(names)):
            raise ConfigError(f"num_labels={count} but id2label names {len(names)} labels; correct one of the two")
        return len(names) if names is not None else count or 2

    @property
    def id2label(self) -> dict[int, str]:
        """The name of each of the `num_labels` labels, in order; LABEL_0, LABEL_1, ... where `extra` has no id2label.

        Raises:
            ConfigError: it does not name the labels 0, 1, 2, ... each once, or `num_labels` is unusable.
        """
        count, names = self.num_labels, self.extra.get("id2label")
        return labels.placeholders(count) if names is None else labels.names_by_id(names)

    @property
    def label2id(self) -> dict[str, int]:
        """The number of each label, by its name: the inverse of `id2label`, which alone says what a label means.

        `extra`'s label2id is compared with it. Placeholders (LABEL_0, ...) that transformers left there when the labels
        got their names are passed over, and names that it lacks are added.

        Raises:
            ConfigError: the two contradict each other, two labels have one name, or `id2label` is unusable.
        """
        return labels.ids_by_name(self.id2label, self.extra.get("label2id"))

    @property
    def problem_type(self) -> str | None:
        """What a sequence classifier is trained for, one of `labels.PROBLEM_TYPES`; None leaves it to the labels.

        Raises:
            ConfigError: it is something else.
        """
        kind = self.extra.get("problem_type")
        expected = f"expected null or one of {', '.join(labels.PROBLEM_TYPES)}"
        _check("problem_type", kind, (lambda value: value is None or value in labels.PROBLEM_TYPES, expected))
        return kind

    @property
    def classifier_dropout(self) -> float:
        """Dropout before a classifier: `extra`'s classifier_dropout, or `hidden_dropout_prob` where that is null.

        Raises:
            ConfigError: it is not a probability.
        """
        rate = self.extra.get("classifier_dropout")
        if rate is None:
            return self.hidden_dropout_prob
        _check("classifier_dropout", rate, _PROBABILITY)
        return rate

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the masked-LM head shares the word embeddings: `extra`'s tie_word_embeddings, by default True.

        Raises:
            ConfigError: it is not a boolean.
        """
        tied = self.extra.get("tie_word_embeddings", True)
        _check("tie_word_embeddings", tied, (lambda value: isinstance(value, bool), "expected true or false"))
        return tied

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "BertConfig":
        """Returns one of the published sizes: tiny, mini, small, medium, base or large.

        Args:
            name: a key of `PRESETS`.
            **overrides: fields to set differently, for instance `vocab_size`.

        Raises:
            ConfigError: the name is unknown or an override is unusable.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; known presets: {', '.join(PRESETS)}")
        unknown = sorted(set(overrides) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"unknown field {unknown[0]!r}; see the attributes of BertConfig")
        layers, hidden, heads = PRESETS[name]
        sizes = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "intermediate_size": 4 * hidden,
        }
        return cls(**(sizes | overrides))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, ignore: Iterable[str] = ()) -> "BertConfig":
        """Reads the contents of a Hugging Face `config.json`.

        Args:
            config: the parsed JSON object.
            ignore: unknown fields that the caller knows to have no effect on the encoder.

        Returns:
            The configuration; fields without effect on the encoder are kept in `extra`.

        Raises:
            ConfigError: it is not BERT's, asks for a decoder or for something else that is not implemented, has
                fields that are not known, or unusable values. One error names every problem.
        """
        problems = _foreign_problems(config, frozenset([ignore] if isinstance(ignore, str) else ignore))
        values = {name: config[name] for name in _FIELDS if name in config}
        problems += _value_problems(values)
        if problems:
            raise ConfigError("unusable BERT configuration: " + "; ".join(problems))
        extra = {name: value for name, value in config.items() if name not in _FIELDS and name != "model_type"}
        return cls(**values, extra=extra)

    @classmethod
    def from_file(cls, path: str | Path, *, ignore: Iterable[str] = ()) -> "BertConfig":
        """Reads a `config.json` file; see `from_hf`. Raises `SourceError` if the file can't be read."""
        path = Path(path)
        config = read_json(path, ConfigError)
        try:
            return cls.from_hf(config, ignore=ignore)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """Returns the contents of a `config.json` that transformers reads as this configuration."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        return {**self.extra, "model_type": "bert", **fields}


_FIELDS: Mapping[str, dataclasses.Field] = {
    field.name: field for field in dataclasses.fields(BertConfig) if field.name != "extra"
}


def _foreign_problems(config: Mapping[str, Any], ignore: frozenset[str]) -> list[str]:
    """What in a config.json is not BERT's encoder, or not known at all."""
    problems = []
    # The oldest checkpoints (pytorch-pretrained-bert, 2019) have no model_type; what is there is then checked by name.
    model_type = config.get("model_type", "bert")
    if model_type != "bert":
        problems.append(f"model_type is {reprlib.repr(model_type)}, bertjax reads 'bert' only")
    for name, (accepted, why) in _REFUSED_UNLESS.items():
        if name in config and config[name] not in accepted:
            problems.append(f"{name}={reprlib.repr(config[name])}: {why}")
    problems += _architecture_problems(config.get("architectures"))
    known = _INERT_FIELDS | _REFUSED_UNLESS.keys() | _FIELDS.keys() | {"model_type"} | ignore
    unknown = sorted(set(config) - known)
    if unknown:
        problems.append(
            f"unknown field(s) {_enumerate(unknown)}: if they do not change what the encoder computes, "
            "name them in `ignore`"
        )
    return problems


def _enumerate(names: list[str]) -> str:
    """Names fields for a message: all that anyone would write, but not a million."""
    rest = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(map(reprlib.repr, names[:20])) + rest


def _architecture_problems(architectures: Any) -> list[str]:
    """Classes of other models: a relabelled RoBERTa has BERT's tensors, but begins its positions elsewhere."""
    if architectures is None:
        return []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        return [f"architectures={reprlib.repr(architectures)}: expected a list of names of classes"]
    foreign = [name for name in architectures if name.startswith(_FOREIGN)]
    return [f"architectures names {_enumerate(foreign)}, which is no BERT, whatever model_type says"] if foreign else []


def _problems(config: BertConfig) -> list[str]:
    return _value_problems({name: getattr(config, name) for name in _FIELDS})


def _value_problems(values: Mapping[str, Any]) -> list[str]:
    """Everything wrong with the given fields; those that are absent keep their (sound) default."""
    bad = {name for name, (accepts, _) in _CHECKS.items() if name in values and not accepts(values[name])}
    problems = [f"{name}={reprlib.repr(values[name])}: {_CHECKS[name][1]}" for name in _CHECKS if name in bad]
    full = {name: values.get(name, field.default) for name, field in _FIELDS.items()}
    # A relation means nothing where one of its sides is itself unusable.
    hidden, heads = full["hidden_size"], full["num_attention_heads"]
    if bad.isdisjoint({"hidden_size", "num_attention_heads"}) and hidden % heads:
        problems.append(f"hidden_size={hidden} is not divisible by num_attention_heads={heads}")
    pad, vocab = full["pad_token_id"], full["vocab_size"]
    if bad.isdisjoint({"pad_token_id", "vocab_size"}) and pad is not None and pad >= vocab:
        problems.append(f"pad_token_id={pad} is outside the vocabulary of {vocab}")
    return problems


def _is_int(low: int, high: int) -> Callable[[Any], bool]:
    # bool is a subclass of int in Python, but `"hidden_size": true` is a mistake
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(accepts: Callable[[float], bool]) -> Callable[[Any], bool]:
    # `accepts` compares with finite bounds, which NaN and infinity fail, and integers too large for a float as well
    def check(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and accepts(value)

    return check


_Check = tuple[Callable[[Any], bool], str]


def _size(high: int) -> _Check:
    return _is_int(1, high), f"expected an integer from 1 to {high}"


def _check(name: str, value: Any, check: _Check) -> None:
    accepts, expected = check
    if not accepts(value):
        raise ConfigError(f"{name}={reprlib.repr(value)}: {expected}")


_PROBABILITY: _Check = (_is_number(lambda value: 0 <= value < 1), "expected a number from 0 to less than 1")

_CHECKS: Mapping[str, _Check] = {
    "vocab_size": _size(_MAX_ROWS),
    "hidden_size": _size(_MAX_SIZE),
    "num_hidden_layers": _size(_MAX_LAYERS),
    "num_attention_heads": _size(_MAX_SIZE),
    "intermediate_size": _size(4 * _MAX_SIZE),
    "hidden_act": (
        lambda value: isinstance(value, str) and value in ACTIVATIONS,
        f"expected one of {', '.join(ACTIVATIONS)}",
    ),
    "hidden_dropout_prob": _PROBABILITY,
    "attention_probs_dropout_prob": _PROBABILITY,
    "max_position_embeddings": _size(_MAX_ROWS),
    "type_vocab_size": _size(_MAX_SIZE),
    "initializer_range": (_is_number(lambda value: 0 <= value <= 1000), "expected a number from 0 to 1000"),
    "layer_norm_eps": (_is_number(lambda value: 0 < value < 1), "expected a number between 0 and 1"),
    "pad_token_id": (
        lambda value: value is None or _is_int(0, _MAX_ROWS)(value),
        "expected a token id or null",
    ),
    "position_embedding_type": (
        lambda value: isinstance(value, str) and value in POSITION_EMBEDDING_TYPES,
        f"expected one of {', '.join(POSITION_EMBEDDING_TYPES)}",
    ),
}
