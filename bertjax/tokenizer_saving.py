"""The tokenizer_config.json that goes with a saved tokenizer.json."""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import models, normalizers

from bertjax.tokenizer_files import build_template, build_wordpiece, normalizer_flags


def config_to_save(
    backend: tokenizers.Tokenizer,
    special_tokens: Mapping[str, str | None],
    *,
    model_max_length: int | None,
    truncation_side: str,
    clean_up_tokenization_spaces: bool,
) -> dict[str, Any]:
    """The content of tokenizer_config.json, from which transformers gives the ids of this backend."""
    added = sorted(backend.get_added_tokens_decoder().items())
    config: dict[str, Any] = {
        # PreTrainedTokenizerFast runs tokenizer.json as it is; BertTokenizer (5.x) rebuilds the pipeline from the
        # vocabulary and the flags, so it is named only where that gives this very pipeline.
        "tokenizer_class": "BertTokenizer" if _is_plain_bert(backend, special_tokens) else "PreTrainedTokenizerFast",
        # Where this key exists, transformers ignores special_tokens_map.json and added_tokens.json, which an
        # earlier tokenizer may have left in the folder.
        "added_tokens_decoder": {str(index): token.__getstate__() for index, token in added},
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        "truncation_side": truncation_side,
        **special_tokens,
    }
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    if isinstance(backend.normalizer, normalizers.BertNormalizer):
        config |= normalizer_flags(backend.normalizer)
    return config


def _is_plain_bert(backend: tokenizers.Tokenizer, named: Mapping[str, str | None]) -> bool:
    """Whether `BertTokenizer` would rebuild this backend from its vocabulary, flags and added tokens."""
    if not isinstance(backend.model, models.WordPiece):
        return False
    if not isinstance(backend.normalizer, normalizers.BertNormalizer):
        return False
    if named["unk_token"] is None or named["cls_token"] is None or named["sep_token"] is None:
        return False
    vocab = backend.get_vocab(with_added_tokens=False)
    rebuilt = build_wordpiece(vocab, normalizer_flags(backend.normalizer), named["unk_token"])
    rebuilt.add_tokens([token for _, token in sorted(backend.get_added_tokens_decoder().items())])
    rebuilt.post_processor = build_template(rebuilt, named["cls_token"], named["sep_token"])
    return json.loads(rebuilt.to_str()) == json.loads(backend.to_str())
