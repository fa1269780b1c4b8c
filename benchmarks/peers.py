"""The libraries that are compared: how each one loads a model and computes with it.

This runs in a worker's process, where the library's own environment may be all there is: nothing is imported at the
top that is not Python's own or numpy. A loader returns a `Loaded`; what it can't do it refuses with an `Absent`.
"""

import dataclasses
import functools
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


class Absent(Exception):
    """A peer that can't take part, and why."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a peer is asked to load.

    Attributes:
        model: a model's folder; None for the probes.
        dtype: "float32", "bfloat16" or "int8".
        device: "cpu" or "gpu".
        threads: how many threads the peer may use.
        exported: a folder where exported models are kept.
        probe_size: rows and columns of the probes' matrices.
    """

    model: Path | None
    dtype: str
    device: str
    threads: int
    exported: Path
    probe_size: int


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A peer that is ready.

    Attributes:
        run: computes on an input; the device may still be at it when this returns.
        wait: waits for what `run` returned.
        fetch: what `run` returned, as a numpy array.
        lengths: for texts: how many tokens each one has, as the model takes it.
        device_memory: the most memory of the accelerator that was ever taken, in bytes.
    """

    run: Callable[[Any], Any]
    wait: Callable[[Any], Any] = lambda result: result
    fetch: Callable[[Any], np.ndarray] = np.asarray
    lengths: Callable[[list[str]], list[int]] | None = None
    device_memory: Callable[[], int] | None = None


@dataclasses.dataclass(frozen=True)
class Peer:
    """One library.

    Attributes:
        imports: modules that it needs, in the order in which they are imported.
        loaders: by what is computed: "dense", "text", "train", "probe".
        dtypes: what it can compute in.
        gelu: which GELU it computes whatever the model says, if it does.
        elsewhere: whether it needs an environment of its own.
        prepare: makes what has to be made once, before loading is timed.
    """

    imports: tuple[str, ...]
    loaders: dict[str, Callable[[Setting], Loaded]]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    gelu: str | None = None
    elsewhere: bool = False
    prepare: Callable[[Setting], None] | None = None


# --- JAX ---


def _jax_loaded(setting: Setting, run: Callable[[Any], Any], fetch: Callable = np.asarray) -> Loaded:
    import jax

    device = jax.devices()[0]
    if setting.device == "gpu" and device.platform != "gpu":
        raise Absent("jax finds no GPU")
    peak = (lambda: device.memory_stats()["peak_bytes_in_use"]) if setting.device == "gpu" else None
    return Loaded(run, jax.block_until_ready, fetch, device_memory=peak)


def _attention(setting: Setting, attention: str) -> str:
    if attention == "cudnn" and setting.device != "gpu":
        raise Absent("cuDNN is for GPUs")
    return attention


def _bertjax_dense(setting: Setting, attention: str = "auto") -> Loaded:
    from bertjax import BertModel

    attention = _attention(setting, attention)
    model = BertModel.from_pretrained(setting.model, dtype=setting.dtype, attention=attention)
    return _jax_loaded(setting, lambda batch: model(batch["input_ids"]).last_hidden_state)


def _bertjax_text(setting: Setting, attention: str = "auto") -> Loaded:
    from bertjax import SentenceEncoder

    attention = _attention(setting, attention)
    encoder = SentenceEncoder.from_pretrained(setting.model, dtype=setting.dtype, attention=attention)
    loaded = _jax_loaded(setting, lambda texts: encoder.encode(texts, show_progress_bar=False))
    return dataclasses.replace(loaded, wait=lambda vectors: vectors)


def _bertjax_train(setting: Setting, attention: str = "auto") -> Loaded:
    import jax
    import optax

    from bertjax import BertForMaskedLM, functional

    attention = _attention(setting, attention)
    options = {"dtype": setting.dtype, "param_dtype": "float32", "attention": attention}
    options["unroll"] = True if setting.device == "gpu" else 1  # as `bertjax train` does it
    model = BertForMaskedLM.from_pretrained(setting.model, **options)
    apply, params = functional(model)
    optimizer = optax.adamw(**_ADAMW)

    @functools.partial(jax.jit, static_argnames="count", donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any, count: int) -> tuple[Any, Any, Any]:
        def loss_of(params: Any) -> Any:
            return apply(params, batch["input_ids"], labels=batch["labels"], max_predictions=count).loss

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)

    def run(batch: dict[str, np.ndarray]) -> Any:
        nonlocal params, state
        params, state, loss = step(params, state, batch, count=int((batch["labels"] != -100).sum()))
        return loss

    return _jax_loaded(setting, run)


def _flaxbert_dense(setting: Setting) -> Loaded:
    import jax
    import jax.numpy as jnp
    from transformers import FlaxBertModel

    model = FlaxBertModel.from_pretrained(setting.model, from_pt=True, dtype=jnp.dtype(setting.dtype))
    params = model.to_bf16(model.params) if setting.dtype == "bfloat16" else model.params

    @jax.jit
    def forward(params: Any, ids: Any) -> Any:
        return model(ids, params=params).last_hidden_state

    return _jax_loaded(setting, lambda batch: forward(params, batch["input_ids"]))


def _kerashub_dense(setting: Setting) -> Loaded:
    import jax
    import keras_hub

    backbone = keras_hub.models.BertBackbone.from_preset(str(setting.model), dtype=setting.dtype)
    groups = (backbone.trainable_variables, backbone.non_trainable_variables)
    variables = [[variable.value for variable in group] for group in groups]

    @jax.jit
    def forward(variables: Any, ids: Any) -> Any:
        rest = {"segment_ids": jax.numpy.zeros_like(ids), "padding_mask": jax.numpy.ones_like(ids)}
        outputs, _ = backbone.stateless_call(*variables, {"token_ids": ids, **rest}, training=False)
        return outputs["sequence_output"]

    return _jax_loaded(setting, lambda batch: forward(variables, batch["input_ids"]))


def _jax_probe(setting: Setting) -> Loaded:
    import jax
    import jax.numpy as jnp

    values = np.random.default_rng(0).integers(-8, 8, (setting.probe_size, setting.probe_size))
    matrix = jnp.asarray(values, setting.dtype)
    total = jnp.int32 if setting.dtype == "int8" else jnp.float32
    options = {"precision": "highest"} if setting.dtype == "float32" else {}
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=total, **options))
    return _jax_loaded(setting, lambda _: multiply(matrix, matrix))


# --- torch ---


def _torch_device(setting: Setting) -> str:
    import torch

    torch.set_num_threads(setting.threads)
    if setting.device == "gpu" and not torch.cuda.is_available():
        raise Absent("torch finds no GPU")
    return "cuda" if setting.device == "gpu" else "cpu"


def _torch_loaded(setting: Setting, run: Callable[[Any], Any]) -> Loaded:
    import torch

    def wait(_: Any) -> None:
        if setting.device == "gpu":
            torch.cuda.synchronize()

    peak = torch.cuda.max_memory_allocated if setting.device == "gpu" else None
    return Loaded(run, wait, lambda result: result.detach().float().cpu().numpy(), device_memory=peak)


def _compiled(call: Callable) -> Callable:
    import torch

    # A shape at a time, as the other peers compile: guessing dynamic shapes after the second one costs speed.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(call, dynamic=False)


def _torch_dense(setting: Setting, compiled: bool = False) -> Loaded:
    import torch
    from transformers import AutoModel

    device = _torch_device(setting)
    dtype = getattr(torch, setting.dtype)
    model = AutoModel.from_pretrained(setting.model, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    call = _compiled(model) if compiled else model

    @torch.inference_mode()
    def run(batch: dict[str, np.ndarray]) -> Any:
        return call(input_ids=torch.from_numpy(batch["input_ids"]).to(device)).last_hidden_state

    return _torch_loaded(setting, run)


def _torch_train(setting: Setting, compiled: bool = False) -> Loaded:
    import torch
    from transformers import AutoModelForMaskedLM

    device = _torch_device(setting)
    options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    model = AutoModelForMaskedLM.from_pretrained(setting.model, **options).to(device).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_ADAMW["learning_rate"], weight_decay=_ADAMW["weight_decay"], fused=True
    )
    call = _compiled(model) if compiled else model
    mixed = setting.dtype == "bfloat16"

    def run(batch: dict[str, np.ndarray]) -> Any:
        tensors = {name: torch.from_numpy(array).long().to(device) for name, array in batch.items()}
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            loss = call(**tensors).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return _torch_loaded(setting, run)


def _sentence_transformers_text(setting: Setting, attention: str = "sdpa") -> Loaded:
    import torch
    from sentence_transformers import SentenceTransformer

    if attention == "flash_attention_2" and (setting.device, setting.dtype) != ("gpu", "bfloat16"):
        raise Absent("flash attention, without which there is padding, is for bfloat16 on GPUs")
    options = {"dtype": getattr(torch, setting.dtype), "attn_implementation": attention}
    # The library's own default is small for a GPU.
    batch_size = 32 if setting.device == "cpu" else 512
    model = SentenceTransformer(str(setting.model), device=_torch_device(setting), model_kwargs=options)

    def lengths(texts: list[str]) -> list[int]:
        return [len(ids) for ids in model.tokenizer(texts, truncation=True, max_length=model.max_seq_length).input_ids]

    def run(texts: list[str]) -> np.ndarray:
        return model.encode(texts, batch_size=batch_size, show_progress_bar=False).astype(np.float32)

    return dataclasses.replace(_torch_loaded(setting, run), wait=lambda _: None, fetch=np.asarray, lengths=lengths)


def _torch_probe(setting: Setting) -> Loaded:
    import torch

    device = _torch_device(setting)
    values = np.random.default_rng(0).integers(-8, 8, (setting.probe_size, setting.probe_size))
    matrix = torch.from_numpy(values).to(device, getattr(torch, setting.dtype))
    multiply = torch._int_mm if setting.dtype == "int8" else torch.matmul

    @torch.inference_mode()
    def run(_: Any) -> Any:
        return multiply(matrix, matrix)

    return _torch_loaded(setting, run)


# --- ONNX Runtime ---


def _onnx_prepare(setting: Setting) -> None:
    """Exports in a process of its own, so that its memory is not counted."""
    command = [sys.executable, "-m", "benchmarks.export", str(setting.model), setting.dtype, str(setting.exported)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Absent(f"can't be exported: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")


def _onnx_session(setting: Setting) -> Any:
    import onnxruntime

    from benchmarks.export import exported

    if setting.device == "gpu" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise Absent("this onnxruntime has no CUDA provider")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    provider = "CUDAExecutionProvider" if setting.device == "gpu" else "CPUExecutionProvider"
    path = exported(setting.model, setting.dtype, setting.exported)
    return onnxruntime.InferenceSession(str(path), options, providers=[provider])


def _onnx_dense(setting: Setting) -> Loaded:
    session = _onnx_session(setting)

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        ids = batch["input_ids"].astype(np.int64)
        return session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]

    return Loaded(run)


def _onnx_text(setting: Setting) -> Loaded:
    """Tokenize, sort by length, run in batches of 32, mean pooling, unit length: what users write around a session."""
    import json

    from tokenizers import Tokenizer

    session = _onnx_session(setting)
    tokenizer = Tokenizer.from_file(str(setting.model / "tokenizer.json"))
    tokenizer.enable_truncation(json.loads((setting.model / "sentence_bert_config.json").read_text())["max_seq_length"])
    tokenizer.no_padding()

    def encode(rows: list[list[int]]) -> np.ndarray:
        width = max(map(len, rows))
        ids = np.array([row + [0] * (width - len(row)) for row in rows], np.int64)
        mask = (np.arange(width) < np.array([[len(row)] for row in rows])).astype(np.int64)
        hidden = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        mean = (hidden * mask[..., None]).sum(1, dtype=np.float32) / mask.sum(1, keepdims=True)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    def run(texts: list[str]) -> np.ndarray:
        rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        vectors = [encode([rows[i] for i in order[start : start + 32]]) for start in range(0, len(rows), 32)]
        return np.concatenate(vectors)[np.argsort(order)].astype(np.float32)

    return Loaded(run)


_ADAMW = {"learning_rate": 1e-4, "weight_decay": 0.01}

_unpadded_text = functools.partial(_sentence_transformers_text, attention="flash_attention_2")
_compiled_dense = functools.partial(_torch_dense, compiled=True)
_compiled_train = functools.partial(_torch_train, compiled=True)

_bertjax = {"dense": _bertjax_dense, "text": _bertjax_text, "train": _bertjax_train}
_bertjax_cudnn = {task: functools.partial(loader, attention="cudnn") for task, loader in _bertjax.items()}

#: By name, in the order in which they take turns.
PEERS: dict[str, Peer] = {
    "bertjax": Peer(("jax", "bertjax"), _bertjax, ("float32", "bfloat16", "int8")),
    "bertjax cudnn": Peer(("jax", "bertjax"), _bertjax_cudnn, ("bfloat16",)),
    "torch": Peer(("torch", "transformers"), {"dense": _torch_dense, "train": _torch_train}),
    "torch.compile": Peer(("torch", "transformers"), {"dense": _compiled_dense, "train": _compiled_train}),
    "sentence-transformers": Peer(("torch", "sentence_transformers"), {"text": _sentence_transformers_text}),
    "sentence-transformers unpadded": Peer(("torch", "sentence_transformers", "flash_attn"), {"text": _unpadded_text}),
    "onnxruntime": Peer(
        ("onnxruntime",), {"dense": _onnx_dense, "text": _onnx_text}, ("float32", "int8"), prepare=_onnx_prepare
    ),
    "flaxbert": Peer(("jax", "flax", "transformers"), {"dense": _flaxbert_dense}, elsewhere=True),
    "kerashub": Peer(("jax", "keras", "keras_hub"), {"dense": _kerashub_dense}, gelu="tanh", elsewhere=True),
    "matmul (jax)": Peer(("jax",), {"probe": _jax_probe}, ("float32", "bfloat16", "int8")),
    "matmul (torch)": Peer(("torch",), {"probe": _torch_probe}, ("float32", "bfloat16", "int8")),
}


def prepare(name: str, setting: Setting) -> None:
    """Makes ready whatever is not part of loading a peer. Raises `Absent` if it can't take part."""
    peer = PEERS[name]
    if setting.dtype not in peer.dtypes:
        raise Absent(f"does not compute in {setting.dtype}")
    for module in peer.imports:
        if importlib.util.find_spec(module) is None:
            raise Absent(f"can't be imported: there is no {module} in its environment")
    if peer.prepare is not None:
        peer.prepare(setting)


def load(name: str, task: str, setting: Setting) -> Loaded:
    """Loads a peer for a task. Raises `Absent` if it can't do it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PEERS[name].loaders[task](setting)
