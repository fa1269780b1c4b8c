"""A BERT as an ONNX file for ONNX Runtime, in float32 or with weights in int8."""

import hashlib
import os
import sys
import tempfile
from pathlib import Path


def exported(model: Path, dtype: str, folder: Path) -> Path:
    """The ONNX file of a model's encoder, made at the first call.

    Args:
        model: a Hugging Face folder.
        dtype: "float32", or "int8" for dynamic quantisation with a scale for each channel of a weight.
        folder: where the files are kept.
    """
    weights = (model / "model.safetensors").stat()
    key = hashlib.sha256(f"{model.resolve()} {weights.st_size} {weights.st_mtime_ns}".encode()).hexdigest()[:16]
    path = folder / f"onnx-{key}-{dtype}" / "model.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            if dtype == "int8":
                _quantize(exported(model, "float32", folder), made / "model.onnx")
            else:
                _export(model, made / "model.onnx")
            os.replace(made, path.parent)
    return path


def _export(model: Path, path: Path) -> None:
    """Exports with torch, then fuses attention, LayerNorm and GELU as ONNX Runtime's own tool for BERT does."""
    import torch
    from onnxruntime.transformers import optimizer
    from transformers import AutoModel

    bert = AutoModel.from_pretrained(model, attn_implementation="eager", dtype=torch.float32).eval()

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = bert

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids = torch.ones(2, 16, dtype=torch.int64)
    names, axes = ("input_ids", "attention_mask"), {0: "batch", 1: "length"}
    torch.onnx.export(
        Encoder(),
        (ids, ids),
        str(path),
        input_names=list(names),
        output_names=["last_hidden_state"],
        dynamic_axes=dict.fromkeys((*names, "last_hidden_state"), axes),
        dynamo=False,
    )
    config = bert.config
    fused = optimizer.optimize_model(
        str(path), model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
    )
    fused.save_model_to_file(str(path))


def _quantize(source: Path, path: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Shapes can't be inferred through fused operators, so the quantiser is told what everything in between is.
    options = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(source, path, per_channel=True, weight_type=QuantType.QInt8, extra_options=options)


if __name__ == "__main__":
    exported(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
