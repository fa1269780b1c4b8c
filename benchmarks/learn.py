"""Real learning, beside PyTorch: the same start, the same batches, the same recipe, in turns.

    python -m benchmarks.learn entities MODEL --train FILE.conll --dev FILE.conll [--save NAME]
    python -m benchmarks.learn similarity MODEL --pairs FILE.csv [--save NAME]
    python -m benchmarks.learn words --text FILE [--save NAME]

`entities` tunes an encoder to tag words; `similarity` tunes a sentence model to human judgements of pairs, a fifth of
which are held out; `words` makes a vocabulary for texts and trains a new BERT on them by masked language modelling,
with a tenth of them held out. Two processes take turns of some steps each: bertjax with packed rows, PyTorch
(transformers, sentence-transformers) with the same texts padded to the longest of their batch. Both begin with the
weights of one folder; AdamW, no decay for biases and LayerNorm, linear warm-up and decay, clipping. In the end the two
folders that they save are evaluated by one program.
"""

import csv
import pickle
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import timing

_TURN = 20
_RECIPE = {"weight_decay": 0.01, "clip_norm": 1.0, "warmup": 0.1, "eps": 1e-8}
_KIND_OF = {"entities": "BertForTokenClassification", "words": "BertForMaskedLM"}


def work_in_jax(job: dict[str, Any]) -> Any:
    """Takes steps of bertjax's; returns what does so, and what saves the model."""
    import jax

    import bertjax
    from bertjax.training import AdamW, new_state, train_step
    from bertjax.training.objective import cosine_objective, model_objective

    if job["kind"] == "similarity":
        encoder = bertjax.SentenceEncoder.from_pretrained(job["start"])
        model, save = encoder.model, encoder.save_pretrained
        objective = cosine_objective(model, max_segments=job["segments"])
    else:
        model = bertjax.from_pretrained(job["start"], getattr(bertjax, _KIND_OF[job["kind"]]))
        tokenizer = bertjax.Tokenizer.from_folder(job["start"])
        options = {"max_predictions": job["most"]} if job["kind"] == "words" else {}
        objective = model_objective(model, **options)

        def save(folder: str) -> None:
            model.save_pretrained(folder, tokenizer=tokenizer)

    recipe = {name: _RECIPE[name] for name in ("weight_decay", "clip_norm", "eps")}
    rates = {"learning_rate": job["rate"], "warmup_steps": _RECIPE["warmup"]}
    optimizer = AdamW(**recipe, **rates).build(model, len(job["steps"]))
    state, step = [new_state(model, optimizer, seed=0)], train_step(model, optimizer, objective=objective)

    def take(batch: dict[str, np.ndarray]) -> Any:
        state[0], metrics = step(state[0], jax.device_put(batch))
        return metrics.loss

    def finish(folder: str) -> None:
        state[0].update(model)
        save(folder)

    return take, finish


def work_in_torch(job: dict[str, Any]) -> Any:
    """The same by PyTorch."""
    import torch
    import transformers

    torch.manual_seed(0)
    if job["kind"] == "similarity":
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(job["start"], device="cpu")
    else:
        names = {"entities": "AutoModelForTokenClassification", "words": "AutoModelForMaskedLM"}
        model = getattr(transformers, names[job["kind"]]).from_pretrained(job["start"])
    model.train()
    groups = [{"params": [], "weight_decay": _RECIPE["weight_decay"]}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[name.endswith("bias") or "LayerNorm" in name]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, lr=job["rate"], eps=_RECIPE["eps"])
    count = len(job["steps"])
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(_RECIPE["warmup"] * count), count)

    def loss_of(batch: dict[str, np.ndarray]) -> Any:
        texts = ragged(batch)
        if job["kind"] == "similarity":
            first, second = (
                model(padded([texts[place] for place in column if place >= 0]))["sentence_embedding"]
                for column in segments_of(batch, job["segments"])
            )
            labels = torch.tensor(batch["labels"][~np.isnan(batch["labels"])])
            return torch.nn.functional.mse_loss(torch.cosine_similarity(first, second), labels)
        return model(**padded(list(texts.values()))).loss

    def padded(texts: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        fill = {"input_ids": 0, "token_type_ids": 0, "labels": -100, "attention_mask": 0}
        texts = [text | {"attention_mask": np.ones_like(text["input_ids"])} for text in texts]
        return {
            name: torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(text[name], dtype=torch.long) for text in texts], True, fill[name]
            )
            for name in texts[0]
        }

    def take(batch: dict[str, np.ndarray]) -> Any:
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _RECIPE["clip_norm"])
        optimizer.step()
        schedule.step()
        return loss.detach()

    def finish(folder: str) -> None:
        model.eval()
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(job["start"]).save_pretrained(folder)

    return take, finish


def ragged(batch: dict[str, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
    """The texts of packed rows, by their row and segment as one number."""
    names = [name for name in ("input_ids", "token_type_ids", "labels") if batch.get(name, np.zeros(1)).ndim == 2]
    segments = batch["segment_ids"]
    found = {}
    for row, of_row in enumerate(segments):
        for segment in range(1, of_row.max() + 1):
            here = of_row == segment
            found[row * (segments.shape[1] // 8) + segment - 1] = {name: batch[name][row, here] for name in names}
    return found


def segments_of(batch: dict[str, np.ndarray], segments: int) -> np.ndarray:
    """Where the texts of pairs are, as `ragged` counts."""
    assert segments == batch["segment_ids"].shape[1] // 8
    return batch["places"]


def work(library: str, path: str) -> None:
    """A worker: takes steps, or saves the model, as it is asked to."""
    job = pickle.loads(Path(path).read_bytes())
    take, finish = {"jax": work_in_jax, "torch": work_in_torch}[library](job)

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        if "save" in request:
            finish(request["save"])
            return {}
        begin = time.perf_counter()
        losses = [float(loss) for loss in [take(batch) for batch in job["steps"][request["first"] : request["stop"]]]]
        return {"losses": losses, "seconds": time.perf_counter() - begin}

    timing.answer_requests(handle)


def compare(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Both train in turns; what each took and lost, and how many tokens the turns had."""
    path = folder / "job.pickle"
    path.write_bytes(pickle.dumps(job))
    workers = {name: timing.Worker("benchmarks.learn", "--work", name, str(path)) for name in ("jax", "torch")}
    turns: dict[str, list[Any]] = {"jax": [], "torch": []}
    tokens = []
    for first in range(0, len(job["steps"]), _TURN):
        stop = min(first + _TURN, len(job["steps"]))
        for name, worker in workers.items():
            turns[name].append(worker.ask(first=first, stop=stop))
        tokens.append(int(sum((batch["segment_ids"] > 0).sum() for batch in job["steps"][first:stop])))
        click.echo(f"{stop} of {len(job['steps'])} steps", err=True)
    for name, worker in workers.items():
        worker.ask(save=str(folder / name))
        worker.close()
    return {"turns": turns, "tokens": tokens}


def job_of(kind: str, start: Path, batches: Any, count: int, rate: float) -> dict[str, Any]:
    """A run of so many steps, with all its batches as numpy arrays."""
    made = [batches.make(step).arrays for step in range(count)]
    steps = [{name: np.asarray(array) for name, array in arrays.items()} for arrays in made]
    most = max(int((batch["labels"] != -100).sum()) for batch in steps) if kind == "words" else None
    return {
        "kind": kind,
        "start": str(start),
        "steps": steps,
        "rate": rate,
        "segments": batches.layout.segments,
        "most": most,
    }


def report(found: dict[str, Any], title: str, rows: list[list[str]]) -> str:
    """What was measured, for a person to read."""
    turns, tokens = found["turns"], np.array(found["tokens"])
    speed = {name: (tokens / [turn["seconds"] for turn in turns[name]]).tolist() for name in turns}
    # The first turns compile.
    later = slice(2, None) if len(tokens) > 4 else slice(None)
    ratio = (np.array(speed["jax"]) / speed["torch"])[later].tolist()
    curve = [["step", "bertjax", "torch"]]
    for place in sorted({*np.linspace(0, len(tokens) - 1, min(10, len(tokens))).astype(int).tolist()}):
        losses = [f"{np.mean(turns[name][place]['losses']):.4f}" for name in ("jax", "torch")]
        curve.append([str(sum(len(turn["losses"]) for turn in turns["jax"][: place + 1])), *losses])
    return "\n".join(
        [
            f"# {title}",
            "",
            timing.describe_machine(found["machine"]),
            "",
            f"`{found['command']}`",
            "",
            timing.table(rows),
            "",
            f"Training, real tokens per second, medians (least to largest) of turns of {_TURN} steps: bertjax "
            f"{timing.shown(speed['jax'][later])}, torch {timing.shown(speed['torch'][later])}; ratio "
            f"{timing.shown(ratio)}. Compiling is in the first turn: {turns['jax'][0]['seconds']:.1f} s, where torch "
            f"took {turns['torch'][0]['seconds']:.1f} s.",
            "",
            "Loss, the mean of a turn:",
            "",
            timing.table(curve),
        ]
    )


def finish(name: str | None, title: str, rows: list[list[str]], found: dict[str, Any]) -> None:
    """Prints a result, and writes it if it has a name."""
    found = {"machine": timing.machine(), **found}
    text = report(found, title, rows)
    click.echo(text)
    if name:
        click.echo(f"written to {timing.save(name, text, found)}")


@click.group()
def main() -> None:
    """Compares training with PyTorch's."""


@main.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--train", required=True, help="Tagged words to learn from.")
@click.option("--dev", required=True, help="Tagged words to evaluate on.")
@click.option("--epochs", default=3, show_default=True)
@click.option("--rate", default=3e-4, show_default=True, help="Learning rate.")
@click.option("--save", "name", help="Write the result to benchmarks/results under this name.")
def entities(model: Path, train: str, dev: str, epochs: int, rate: float, name: str | None) -> None:
    """Named entities: strict F1 on held-out sentences."""
    from bertjax import BertForTokenClassification, Tokenizer, from_pretrained
    from bertjax.training.batches import Batches
    from bertjax.training.rows import read_rows
    from bertjax.training.tasks.classification import names_of
    from bertjax.training.tasks.tagging import TagWords

    columns = {"tokens": "tokens", "tags": "tags"}
    rows, tokenizer = read_rows([train], columns), Tokenizer.from_folder(model)
    names = names_of([record["tags"] for record in rows.records])
    task = TagWords(tokenizer, 128, names=names)
    examples, held_out = (task.examples(each)[0] for each in (rows, read_rows([dev], columns)))
    fresh = {"fresh": "classifier", "id2label": dict(enumerate(names))}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        new = from_pretrained(model, BertForTokenClassification, **fresh)
        new.save_pretrained(folder / "start", tokenizer=tokenizer)
        batches = Batches(task, examples, batch_size=32)
        found = compare(job_of("entities", folder / "start", batches, epochs * batches.steps_per_epoch, rate), folder)
        scores = {each: task.metrics(from_pretrained(folder / each), held_out, {}) for each in ("jax", "torch")}
    table = [["", "bertjax", "torch"]]
    table += [[what, *(f"{scores[each][what]:.4f}" for each in scores)] for what in scores["jax"]]
    options = f"--epochs {epochs} --rate {rate:g}"
    found |= {
        "command": f"python -m benchmarks.learn entities MODEL --train FILE --dev FILE {options}",
        "scores": scores,
    }
    finish(name, f"Tagging entities: {timing.model_name(model)}, {Path(train).name}", table, found)


@main.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--pairs", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="sentence1, "
              "sentence2, score from 0 to 5, without a header.")  # fmt: skip
@click.option("--epochs", default=4, show_default=True)
@click.option("--rate", default=5e-5, show_default=True, help="Learning rate.")
@click.option("--save", "name", help="Write the result to benchmarks/results under this name.")
def similarity(model: Path, pairs: Path, epochs: int, rate: float, name: str | None) -> None:
    """Sentence similarity: Spearman's correlation on held-out pairs."""
    from bertjax import SentenceEncoder
    from bertjax.training.batches import Batches
    from bertjax.training.rows import Rows
    from bertjax.training.tasks.sentences import CompareTexts

    with open(pairs, newline="", encoding="utf-8") as lines:
        records = [{"text": first, "pair": second, "score": score} for first, second, score in csv.reader(lines)]
    order = np.random.default_rng(0).permutation(len(records))
    parts = np.split(order, [len(order) * 4 // 5])
    encoder = SentenceEncoder.from_pretrained(model)
    options = {"spec": encoder.spec, "columns": ["text", "pair"], "scale": 5.0}
    task = CompareTexts(encoder.tokenizer, encoder.max_seq_length, **options)
    examples, held_out = (
        task.examples(Rows([records[row] for row in part], [("", str(row)) for row in part]))[0] for part in parts
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        encoder.save_pretrained(folder / "start")
        batches = Batches(task, examples, batch_size=32)
        found = compare(job_of("similarity", folder / "start", batches, epochs * batches.steps_per_epoch, rate), folder)
        scores = {
            each: task.metrics(SentenceEncoder.from_pretrained(folder / each).model, held_out, {})
            for each in ("start", "jax", "torch")
        }
    table = [["", "before", "bertjax", "torch"]]
    table += [[what, *(f"{scores[each][what]:.4f}" for each in scores)] for what in scores["jax"]]
    said = f"python -m benchmarks.learn similarity MODEL --pairs FILE --epochs {epochs} --rate {rate:g}"
    found |= {"command": said, "scores": scores, "held_out": len(held_out)}
    finish(name, f"Similarity of {len(held_out)} held-out pairs: {timing.model_name(model)}", table, found)


@main.command()
@click.option("--text", required=True, help="A text a line.")
@click.option("--vocabulary", default=8000, show_default=True, help="Tokens of the vocabulary made for the texts.")
@click.option("--epochs", default=6, show_default=True)
@click.option("--rate", default=1e-3, show_default=True, help="Learning rate.")
@click.option("--size", default="mini", show_default=True, help="tiny, mini, small, ...")
@click.option("--save", "name", help="Write the result to benchmarks/results under this name.")
def words(text: str, vocabulary: int, epochs: int, rate: float, size: str, name: str | None) -> None:
    """A new BERT by masked language modelling: its loss on held-out texts, beside the entropy of single words."""
    from bertjax import from_pretrained
    from bertjax.training.batches import Batches

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        task, examples, held_out = new_bert(text, vocabulary, size, folder)
        batches = Batches(task, examples, batch_size=32)
        found = compare(job_of("words", folder / "start", batches, epochs * batches.steps_per_epoch, rate), folder)
        unseen = list(Batches(task, held_out, batch_size=32).all())
        models = {each: from_pretrained(folder / each) for each in ("start", "jax", "torch")}
        scores = {each: {"loss": held_out_loss(models[each], unseen)} for each in models}
    entropy = unigram_loss(examples.input_ids, unseen)
    table = [["loss on held-out texts", "nats"], ["single words, by their frequency", f"{entropy:.4f}"]]
    shown = {"start": "untrained", "jax": "bertjax", "torch": "torch"}
    table += [[shown[each], f"{scores[each]['loss']:.4f}"] for each in scores]
    options = f"--vocabulary {vocabulary} --size {size} --epochs {epochs} --rate {rate:g}"
    found |= {"command": f"python -m benchmarks.learn words --text FILE {options}"}
    found |= {"scores": scores, "unigram": entropy}
    finish(name, f"A new BERT-{size} by masked language modelling: {Path(text).name}", table, found)


def new_bert(text: str, vocabulary: int, size: str, folder: Path) -> tuple[Any, Any, Any]:
    """Saves a new BERT in `folder/start`; gives its task, examples to learn from, and those held out."""
    from flax import nnx

    from bertjax import BertConfig, BertForMaskedLM, Tokenizer
    from bertjax.training.masking import Masking
    from bertjax.training.rows import Rows, read_rows
    from bertjax.training.tasks.words import FindMaskedWords

    records = read_rows([text], {"text": "text"}).records
    order = np.random.default_rng(0).permutation(len(records))
    parts = [[records[row] for row in part] for part in np.split(order, [len(order) * 9 // 10])]
    tokenizer = Tokenizer.from_folder(vocabulary_of([record["text"] for record in parts[0]], vocabulary, folder))
    task = FindMaskedWords(tokenizer, 128, masking=Masking.of(tokenizer))
    sizes = {"vocab_size": tokenizer.backend.get_vocab_size(), "max_position_embeddings": 128}
    model = BertForMaskedLM(BertConfig.preset(size, **sizes), rngs=nnx.Rngs(0))
    model.save_pretrained(folder / "start", tokenizer=tokenizer)
    rows = (Rows(part, [("", str(row)) for row in range(len(part))]) for part in parts)
    return (task, *(task.examples(each)[0] for each in rows))


def vocabulary_of(texts: list[str], size: int, folder: Path) -> Path:
    """A folder with a WordPiece vocabulary of lower-case words that is made from texts."""
    from tokenizers import BertWordPieceTokenizer

    made = BertWordPieceTokenizer(lowercase=True)
    made.train_from_iterator(texts, vocab_size=size, show_progress=False)
    made.save_model(str(folder))
    return folder


def held_out_loss(model: Any, batches: list[Any]) -> float:
    """The mean loss of masked words."""
    total = count = 0.0
    for batch in batches:
        here = int((np.asarray(batch.arrays["labels"]) != -100).sum())
        total += float(model(**batch.arrays).loss) * here
        count += here
    return total / count


def unigram_loss(texts: list[np.ndarray], batches: list[Any]) -> float:
    """The mean of -log p of masked words, p from how often they are in the texts learnt from, each once more."""
    seen = Counter(np.concatenate(texts).tolist())
    total = sum(seen.values())
    labels = np.concatenate([np.asarray(batch.arrays["labels"]).ravel() for batch in batches])
    labels = labels[labels != -100].tolist()
    kinds = len(seen.keys() | set(labels))
    return float(np.mean([-np.log((seen[label] + 1) / (total + kinds)) for label in labels]))


if __name__ == "__main__":
    work(*sys.argv[2:]) if sys.argv[1:2] == ["--work"] else main(prog_name="python -m benchmarks.learn")
