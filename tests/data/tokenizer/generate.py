"""Write golden.json: small tokenizer folders, and what transformers 4.57 makes of them.

Run it with transformers 4.57 installed (`pip install transformers==4.57.1`): `python generate.py`. Everything in the
folders is made up here.
"""

import json
import string
import tempfile
from pathlib import Path

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

HERE = Path(__file__).parent

ROLES = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NAMES = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
WORDS = "the of and sun river stone quick light don an é naive cafe straße istanbul ﬁ".split()
LONG = ["x" * 50, "y" * 50]  # the halves of the longest word that a WordPiece model looks at
WORDS += "中 文 日本 한 — € 😀 . , ' ! ? - @".split()
PIECES = ["##" + piece for piece in [*string.ascii_lowercase, *string.digits, "ing", "ed", "ness", "é", "中", "ü"]]
SPECIAL = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES += [*LONG, *("##" + half for half in LONG)]
VOCAB = [*SPECIAL, *string.ascii_letters, *string.digits, *WORDS, *PIECES, "[ENT]"]

TEXTS = [
    "",
    "\x00\x01\x7f",
    "The river, the SUN and 42 stones!",
    "naïve café É é É Straße İSTANBUL ﬁ ǅ",
    "中文abc日本語 한국어 ①",
    "[CLS] a [MASK] of [SEP][PAD] [mask] [ENT] [ent] [unused0]",
    "x" * 100 + " " + "y" * 101,
    "tabs\tand\r\nlines\u00a0nbsp\u3000wide\u200bzero\u00adsoft\ufeffbom\u2028sep",
    "don ' t  an't n ' t he ' s @-@ 3.5 , - .",
    "😀😀 e\u0301\u0327 — €5",
    "quick light " * 6,
]
PAIRS = ["", "the sun", "", "é", "river of stone", "don't", "a b c d e f g h", "x", "中", "quick " * 25, "light"]
CALLS = [
    {"pairs": None, "max_length": None, "truncation": "longest_first"},
    {"pairs": None, "max_length": 2, "truncation": "longest_first"},
    {"pairs": None, "max_length": 7, "truncation": "only_first"},
    {"pairs": PAIRS, "max_length": None, "truncation": "longest_first"},
    {"pairs": PAIRS, "max_length": 4, "truncation": "longest_first"},
    {"pairs": PAIRS, "max_length": 14, "truncation": "longest_first"},
    {"pairs": [*PAIRS[:9], "quick", "light"], "max_length": 40, "truncation": "only_first"},
    {"pairs": ["the river " * 40] * len(PAIRS), "max_length": 90, "truncation": "only_second"},
]


def wordpiece(tokens: list[str], **flags: bool | None) -> tokenizers.Tokenizer:
    """A tokenizer as the `tokenizers` library itself makes it, with truncation and padding baked in."""
    backend = tokenizers.Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(**flags)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    sep, cls = (("[SEP]", tokens.index("[SEP]")), ("[CLS]", tokens.index("[CLS]")))
    backend.post_processor = processors.BertProcessing(sep, cls)
    backend.add_special_tokens(SPECIAL[:1] + SPECIAL[2:])
    backend.enable_truncation(5)
    backend.enable_padding(length=9, pad_id=0, pad_token="[PAD]")
    return backend


def unigram() -> tokenizers.Tokenizer:
    """A tokenizer in the manner of XLM-R, which some BERT checkpoints come with."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = ["▁the", "▁river", "▁", "▁s", "un", "stone", "中", *LONG, *string.ascii_lowercase]
    scores = [(piece, -1.0 - 0.1 * len(pieces) + 0.1 * i) for i, piece in enumerate(pieces)]
    backend = tokenizers.Tokenizer(models.Unigram([(token, 0.0) for token in special] + scores, unk_id=3))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([*special, tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return backend


def lines(tokens: list[str], end: str = "\n") -> str:
    """The text of a vocab.txt."""
    return end.join(tokens) + end


def folders() -> dict[str, dict[str, str]]:
    """Folder name to file name to content."""
    roman = ["<unk>" if token == "[UNK]" else "<s>" if token == "[CLS]" else token for token in VOCAB]
    ent = {"content": "[ENT]", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    named = {"cls_token": "<s>", "unk_token": {"content": "<unk>", "lstrip": False, "__type": "AddedToken"}}
    xlmr = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    vocab = {"vocab.txt": lines(VOCAB)}
    standard = dict(zip(ROLES, NAMES, strict=True))
    config = "tokenizer_config.json"
    content: dict[str, dict[str, str | dict]] = {
        "vocab_only": vocab,
        "cased": vocab | {config: {"do_lower_case": False, "max_len": 64}},
        "cased_no_accents": vocab | {config: {"do_lower_case": False, "strip_accents": True}},
        "uncased_accents": vocab | {config: {"strip_accents": False, "model_max_length": 16}},
        "japanese": vocab | {config: {"tokenize_chinese_chars": False, "model_max_length": int(1e30)}},
        "clean_up": vocab | {config: {"clean_up_tokenization_spaces": True}},
        "cut_left": vocab | {config: {"truncation_side": "left"}},
        "crlf": {"vocab.txt": lines(VOCAB, "\r\n")},
        "no_last_newline": {"vocab.txt": lines(VOCAB)[:-1]},
        "blank_lines": {"vocab.txt": lines([*VOCAB[:60], "", *VOCAB[60:], "", ""])},
        "duplicates": {"vocab.txt": lines([*VOCAB, "the", "[CLS]"])},
        "white_space_token": {"vocab.txt": lines(["\u3000", "\u2028", "\x85x", *VOCAB])},
        "renamed": {"vocab.txt": lines(roman), config: named},
        "no_mask": {"vocab.txt": lines([t for t in VOCAB if t != "[MASK]"]), config: {"mask_token": None}},
        "added": vocab
        | {
            "added_tokens.json": {"Sun River": len(VOCAB), "[E1]": len(VOCAB) + 1},
            "special_tokens_map.json": {"additional_special_tokens": ["[E1]", "[ENT]"]},
        },
        "decoder": vocab
        | {
            config: {"added_tokens_decoder": {str(VOCAB.index("[ENT]")): {**ent, "special": True}}},
            "special_tokens_map.json": {"cls_token": "[SEP]"},
        },
        "json": {
            "tokenizer.json": wordpiece(VOCAB, lowercase=True).to_str(),
            "vocab.txt": lines(VOCAB[::-1]),
            config: {"do_lower_case": True, "strip_accents": None, "tokenizer_class": "BertTokenizer"},
        },
        "json_cased": {
            "tokenizer.json": wordpiece(VOCAB, lowercase=False, handle_chinese_chars=False).to_str(),
            config: {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True, **standard},
        },
        "unigram": {
            "tokenizer.json": unigram().to_str(),
            config: {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": True, **xlmr},
        },
    }
    return {
        folder: {name: text if isinstance(text, str) else json.dumps(text) for name, text in files.items()}
        for folder, files in content.items()
    }


def results(folder: str, files: dict[str, str]) -> dict:
    """What transformers makes of one folder."""
    with tempfile.TemporaryDirectory() as path:
        for name, text in files.items():
            (Path(path) / name).write_text(text, encoding="utf-8", newline="")
        # Without it, transformers guesses a model type from the folder's random name.
        (Path(path) / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
        verbatim = "PreTrainedTokenizerFast" in files.get("tokenizer_config.json", "")
        oracle_class = transformers.PreTrainedTokenizerFast if verbatim else transformers.BertTokenizerFast
        oracle = oracle_class.from_pretrained(path)
    calls = []
    for call in CALLS:
        options = {"truncation": call["truncation"] if call["max_length"] else False, "max_length": call["max_length"]}
        out = oracle(TEXTS, call["pairs"], **options, return_token_type_ids=True)
        type_ids = ["".join(map(str, row)) for row in out["token_type_ids"]]  # as digits: a third of the size
        calls.append({"input_ids": out["input_ids"], "token_type_ids": type_ids})
    # From vocab.txt alone, 4.57 cleans up after decoding and 5.x does not; bertjax does as 5.x and as the file says.
    clean_up = "clean_up_tokenization_spaces" in files.get("tokenizer_config.json", "")
    decode = {"clean_up_tokenization_spaces": clean_up}
    return {
        "files": files,
        "calls": calls,
        "decoded": oracle.batch_decode(calls[0]["input_ids"], skip_special_tokens=True, **decode),
        "decoded_with_special": oracle.batch_decode(calls[3]["input_ids"], **decode),
        "ids": {role: getattr(oracle, role + "_id") for role in ROLES},
        "model_max_length": oracle.model_max_length if oracle.model_max_length < 1e20 else None,
    }


def main() -> None:
    """Write golden.json beside this file."""
    assert transformers.__version__.startswith("4.57."), transformers.__version__
    golden = {
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "texts": TEXTS,
        "calls": CALLS,
        "folders": {folder: results(folder, files) for folder, files in folders().items()},
    }
    text = json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n"
    (HERE / "golden.json").write_text(text.replace('"files":', '\n"files":'), encoding="utf-8")


if __name__ == "__main__":
    main()
