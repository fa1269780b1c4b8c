"""BERT on JAX and Flax NNX: strict weight conversion both ways, a jitted encoder, all heads, tasks, sentence vectors.

Names are loaded when they are first used, so that `import bertjax` costs little and starts no JAX backend.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Answer": "tasks.question_answering",
    "BertConfig": "config",
    "BertForMaskedLM": "heads",
    "BertForMultipleChoice": "heads",
    "BertForNextSentencePrediction": "heads",
    "BertForPreTraining": "heads",
    "BertForQuestionAnswering": "heads",
    "BertForSequenceClassification": "heads",
    "BertForTokenClassification": "heads",
    "BertModel": "model",
    "BertOutput": "model",
    "BertjaxError": "errors",
    "CheckpointError": "errors",
    "Choice": "tasks.multiple_choice",
    "ConfigError": "errors",
    "CrossEncoder": "tasks.rank",
    "Entity": "tasks.token_classification",
    "EntityGroup": "tasks.token_classification",
    "Fill": "tasks.fill_mask",
    "FillMask": "tasks.fill_mask",
    "InputError": "errors",
    "JobError": "errors",
    "Label": "tasks.classification",
    "MultipleChoice": "tasks.multiple_choice",
    "NextSentence": "tasks.next_sentence",
    "QuestionAnswering": "tasks.question_answering",
    "RankedDocument": "tasks.rank",
    "SentenceEncoder": "embedder",
    "SentenceModel": "sentence",
    "SourceError": "errors",
    "SparseEncoder": "tasks.sparse",
    "SparseVector": "tasks.sparse",
    "TextClassification": "tasks.classification",
    "TokenClassification": "tasks.token_classification",
    "Tokenizer": "tokenizer",
    "TokenizerError": "errors",
    "TrainingError": "errors",
    "WordLabel": "tasks.token_classification",
    "ZeroShotClassification": "tasks.zero_shot",
    "ZeroShotLabels": "tasks.zero_shot",
    "convert_checkpoint": "conversion",
    "describe": "reports",
    "export_encoder": "export",
    "from_pretrained": "pretrained",
    "functional": "model",
    "named_parameters": "reports",
    "parameter_table": "reports",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bertjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"bertjax.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
