"""Makes the golden sentence-transformers folders of the old layout, with the vectors the old version computes.

Run with sentence-transformers below 5.4 and transformers 4 installed: `python tests/data/sentence/generate.py`.
`transformer/` is a tiny random BERT with its tokenizer, `cases/NAME/` holds what a model made of it adds to that, and
`expected.npz` one array of vectors for each entry of `expected.json`. A case's modules.json says where the transformer
belongs; a file that a case has itself goes before the shared one. The vectors are computed in float64, so that a
comparison shows the rounding of one side only.
"""

import filecmp
import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import sentence_transformers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

HERE = Path(__file__).parent
WIDTH = 16
# Cased, so that lower-casing shows, and with letters that stripping accents would change.
VOCABULARY = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the The a cat Cat dog sat on mat red Red query passage : . , ! ? "
    "##s ##ting is caf Caf ##é é É un house ##boat 7 ##7"
).split()
TEXTS = [
    "The Cat sat on the mat.",
    "Red!",
    "",
    "a dog is sitting on a red houseboat, the cat sat on the cafés mat, the dog sat on the Red mat: 777",
    "É is é, Café is Caf",
    "unknown words zzz",
]
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
PROMPTS = {"query": "query: ", "passage": "the passage"}
ALL = {
    "pooling_mode_cls_token": True,
    "pooling_mode_max_tokens": True,
    "pooling_mode_mean_tokens": True,
    "pooling_mode_mean_sqrt_len_tokens": True,
    "pooling_mode_weightedmean_tokens": True,
    "pooling_mode_lasttoken": True,
}


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draws weights larger than a fresh module's, so that attention is uneven and activations leave their origin."""
    rng = np.random.default_rng(seed)
    for name, parameter in module.named_parameters():
        values = rng.normal(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.3, tuple(parameter.shape))
        parameter.data = torch.tensor(values, dtype=torch.float32)
    return module


def make_transformer(folder: Path) -> None:
    """Writes the shared transformer as the old version saves it."""
    with tempfile.TemporaryDirectory() as temporary:
        config = transformers.BertConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=24,
        )
        randomize(transformers.BertModel(config), 0).save_pretrained(temporary)
        Path(temporary, "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
        tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
        Path(temporary, "tokenizer_config.json").write_text(json.dumps(tokenizer))
        for target in (temporary, str(folder)):  # what is saved a second time no longer changes
            Transformer(temporary).save(target)
    (folder / "sentence_bert_config.json").unlink()


def cases(transformer: str) -> dict[str, tuple[SentenceTransformer, list[dict]]]:
    """The models, each with the options of the calls to record."""

    def model(*rest, first=None, **options):
        modules = [Transformer(transformer) if first is None else first, *rest]
        return SentenceTransformer(modules=modules, device="cpu", **options)

    found = {mode: (model(Pooling(WIDTH, pooling_mode=mode)), [{}]) for mode in MODES}
    found["all"] = model(Pooling(WIDTH, **ALL)), [{}, {"normalize_embeddings": True, "truncate_dim": 90}]
    dense = (Dense(WIDTH, 8), Dense(8, 5, bias=False, activation_function=torch.nn.Identity()))
    chain = (Pooling(WIDTH), *(randomize(module, seed) for seed, module in enumerate(dense, 1)), Normalize())
    named = [{}, {"prompt_name": "passage"}, {"prompt": ""}, {"prompt": "a", "prompt_name": "query"}]
    cut = [{"truncate_dim": 3}, {"truncate_dim": 3, "normalize_embeddings": True}]
    found["chain"] = model(*chain, prompts=PROMPTS, default_prompt_name="query"), named + cut
    # Without "cls": there the versions differ (the old one takes the prompt's first token).
    without = {flag: True for flag in ALL if "cls" not in flag}
    found["prompt_left_out"] = (
        model(Pooling(WIDTH, **without, include_prompt=False), prompts=PROMPTS),
        [{}, {"prompt_name": "query"}, {"prompt_name": "passage"}, {"prompt": "sat on the mat with 7 dogs, "}],
    )
    first = Transformer(transformer, max_seq_length=7, do_lower_case=True)
    first.save_in_root = False
    found["subfolder"] = model(Pooling(WIDTH), first=first), [{}, {"prompt": "The Red dog: "}]
    return found


def store(model: SentenceTransformer, shared: Path, target: Path) -> None:
    """Saves a model and keeps what differs from the shared transformer."""
    with tempfile.TemporaryDirectory() as temporary:
        saved = Path(temporary)
        model.save(temporary, create_model_card=False)
        at = saved / json.loads((saved / "modules.json").read_text())[0]["path"]
        for path in sorted(path for path in saved.rglob("*") if path.is_file()):
            twin = shared / path.name
            if path.parent == at and twin.exists() and filecmp.cmp(path, twin, shallow=False):
                continue
            destination = target / path.relative_to(saved)
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, destination)


def main() -> None:
    assert tuple(map(int, sentence_transformers.__version__.split(".")[:2])) < (5, 4), "writes another layout"
    for name in ("transformer", "cases"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    shared = HERE / "transformer"
    make_transformer(shared)
    calls, arrays = [], {}
    for name, (model, options) in cases(str(shared)).items():
        store(model, shared, HERE / "cases" / name)
        model.double()
        for each in options:
            arrays[str(len(calls))] = model.encode(TEXTS, **each).astype(np.float32)
            calls.append({"case": name, "options": each})
    np.savez(HERE / "expected.npz", **arrays)
    versions = {module.__name__: module.__version__ for module in (sentence_transformers, transformers, torch)}
    expected = {"versions": versions, "texts": TEXTS, "calls": calls}
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
