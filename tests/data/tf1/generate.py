"""Makes tiny TensorFlow 1 checkpoints of google-research/bert's form, written by TensorFlow's own Saver.

Run with tensorflow-cpu installed: `python tests/data/tf1/generate.py`. `pretrained` is what run_pretraining.py leaves:
the encoder, both heads, Adam's slots and the step. `classifier` is what run_classifier.py leaves, without the slots,
and lies in two shards. `expected.npz` holds the weights by TensorFlow's names, as TensorFlow reads them back. The
graphs (*.meta), of no use to a reader of weights and far larger than the weights, are not kept.

`refused` holds what is no such checkpoint, without its data: a partitioned variable, TensorFlow's first format, and an
object checkpoint of TensorFlow 2.
"""

import json
import os
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
import numpy as np
import tensorflow as tf

HERE = Path(__file__).parent
CONFIG = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 8,
    "initializer_range": 0.02,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "type_vocab_size": 2,
    "vocab_size": 20,
}
HIDDEN, INNER = CONFIG["hidden_size"], CONFIG["intermediate_size"]


def dense(scope: str, inputs: int = HIDDEN, outputs: int = HIDDEN) -> dict[str, tuple[int, ...]]:
    """The variables of tf.layers.dense."""
    return {f"{scope}/kernel": (inputs, outputs), f"{scope}/bias": (outputs,)}


def norm(scope: str) -> dict[str, tuple[int, ...]]:
    """The variables of tf.contrib.layers.layer_norm."""
    return {f"{scope}/LayerNorm/gamma": (HIDDEN,), f"{scope}/LayerNorm/beta": (HIDDEN,)}


def encoder() -> dict[str, tuple[int, ...]]:
    """The variables of modeling.BertModel, by name."""
    shapes = {
        "bert/embeddings/word_embeddings": (CONFIG["vocab_size"], HIDDEN),
        "bert/embeddings/token_type_embeddings": (CONFIG["type_vocab_size"], HIDDEN),
        "bert/embeddings/position_embeddings": (CONFIG["max_position_embeddings"], HIDDEN),
        **norm("bert/embeddings"),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        scope = f"bert/encoder/layer_{layer}"
        for part in ("query", "key", "value"):
            shapes |= dense(f"{scope}/attention/self/{part}")
        shapes |= dense(f"{scope}/attention/output/dense") | norm(f"{scope}/attention/output")
        shapes |= dense(f"{scope}/intermediate/dense", HIDDEN, INNER)
        shapes |= dense(f"{scope}/output/dense", INNER, HIDDEN) | norm(f"{scope}/output")
    return shapes | dense("bert/pooler/dense")


PRETRAINING = {
    **dense("cls/predictions/transform/dense"),
    **norm("cls/predictions/transform"),
    "cls/predictions/output_bias": (CONFIG["vocab_size"],),
    "cls/seq_relationship/output_weights": (2, HIDDEN),
    "cls/seq_relationship/output_bias": (2,),
}
CLASSIFIER = {"output_weights": (3, HIDDEN), "output_bias": (3,)}


def save(folder: Path, name: str, variables: dict[str, np.ndarray], devices: int) -> None:
    """Saves variables as a checkpoint, with a shard for each device, and what TensorFlow reads back from it."""
    folder.mkdir(exist_ok=True)
    with tf.Graph().as_default():
        for index, (key, value) in enumerate(variables.items()):
            with tf.device(f"/cpu:{index % devices}"):
                tf.compat.v1.get_variable(key, initializer=value, use_resource=False)
        options = tf.compat.v1.ConfigProto(device_count={"CPU": devices})
        with tf.compat.v1.Session(config=options) as session:
            session.run(tf.compat.v1.global_variables_initializer())
            saver = tf.compat.v1.train.Saver(sharded=devices > 1)
            prefix = saver.save(session, str(folder / name), write_meta_graph=False, write_state=False)
    read = {key: tf.train.load_variable(prefix, key) for key, _ in tf.train.list_variables(prefix)}
    assert read.keys() == variables.keys()
    assert all((read[key] == variables[key]).all() for key in read)
    weights = {key: value for key, value in read.items() if not key.endswith(("adam_m", "adam_v", "global_step"))}
    np.savez_compressed(folder / "expected.npz", **weights)
    (folder / "bert_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def save_refused(folder: Path) -> None:
    """Saves checkpoints of the other kinds that TensorFlow writes, and leaves only what names their variables."""
    folder.mkdir(exist_ok=True)
    with tf.Graph().as_default():
        partitioner = tf.compat.v1.fixed_size_partitioner(2)
        tf.compat.v1.get_variable("part", (4, 3), partitioner=partitioner, use_resource=False)
        with tf.compat.v1.Session() as session:
            session.run(tf.compat.v1.global_variables_initializer())
            for name, version in (("partitioned.ckpt", "V2"), ("first_format.ckpt", "V1")):
                saver = tf.compat.v1.train.Saver(write_version=getattr(tf.compat.v1.train.SaverDef, version))
                saver.save(session, str(folder / name), write_meta_graph=False, write_state=False)
    tf.train.Checkpoint(step=tf.Variable(1)).write(str(folder / "objects.ckpt"))
    for data in folder.glob("*.data-*"):
        data.unlink()


def main() -> None:
    """Writes all checkpoints."""
    rng = np.random.default_rng(0)

    def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}

    shapes = encoder() | PRETRAINING
    slots = {f"{name}/{slot}": shape for name, shape in shapes.items() for slot in ("adam_m", "adam_v")}
    save(HERE / "pretrained", "bert_model.ckpt", draw(shapes | slots) | {"global_step": np.array(20, np.int64)}, 1)
    save(HERE / "classifier", "model.ckpt-30", draw(encoder() | CLASSIFIER), 2)
    save_refused(HERE / "refused")


if __name__ == "__main__":
    main()
