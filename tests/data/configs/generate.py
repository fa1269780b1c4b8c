"""Makes the golden configurations: what this version of transformers writes into config.json for BERT.

Run once in each environment: `python tests/data/configs/generate.py` writes transformers-<version>.json, a list of
config.json objects.
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).parent
SMALL = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
CLASSES = (
    "BertModel",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
)


def written(model: transformers.PreTrainedModel) -> dict:
    """The config.json that a model's save_pretrained writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text())


def main() -> None:
    """Writes one config per model class, and one with every common option set."""
    configs = [written(getattr(transformers, name)(transformers.BertConfig(**SMALL))) for name in CLASSES]
    options = {
        "num_labels": 3,
        "problem_type": "multi_label_classification",
        "classifier_dropout": 0.2,
        "output_hidden_states": True,
        "output_attentions": True,
        "attn_implementation": "eager",
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-7,
        "name_or_path": "somewhere",
        "finetuning_task": "sst-2",
    }
    config = transformers.BertConfig(**SMALL, **options)
    configs.append(written(transformers.BertForSequenceClassification(config).to(torch.bfloat16)))
    file = HERE / f"transformers-{transformers.__version__}.json"
    file.write_text(json.dumps(configs, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
