"""adapter_config.json, as PEFT writes and reads it (huggingface/peft, src/peft/tuners/lora/config.py)."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bertjax.checks import check_number
from bertjax.errors import ConfigError
from bertjax.json_files import read_json
from bertjax.module_files import expect, expect_size, show
from bertjax.training.lora_settings import TARGETS, LoRA, matching

logger = logging.getLogger(__name__)

# Fields that say what is read here, or nothing of what an adapter computes. In any other, a value that is not empty
# asks for something else.
_KNOWN = frozenset(
    "auto_mapping base_model_name_or_path bias ensure_weight_tying inference_mode init_lora_weights lora_alpha "
    "lora_dropout megatron_core modules_to_save peft_type peft_version qalora_group_size r revision target_modules "
    "task_type use_rslora".split()
)
# Ways to draw an adapter that leave the kernels as they are.
_DRAWN = (None, True, False, "gaussian", "orthogonal", "eva")


class Adapters(NamedTuple):
    """What a configuration says.

    Attributes:
        lora: the settings.
        saved: the ends of the names of modules that are saved whole.
    """

    lora: LoRA
    saved: tuple[str, ...]


def config_of(lora: LoRA, task: str | None, saved: Sequence[str], base: str | Path | None, kind: str) -> dict[str, Any]:
    """PEFT's configuration of adapters. What its versions differ in is left to their defaults.

    Args:
        lora: the settings.
        task: PEFT's name for what the model is for, or None.
        saved: the heads that are saved beside the adapters.
        base: the folder or the name on the Hub of the model that was adapted.
        kind: the name of the model's class.
    """
    alpha = float(lora.alpha)
    mapping = {"base_model_class": kind, "parent_library": "transformers.models.bert.modeling_bert"}
    # PEFT gives every classifier both names.
    saved = [*saved, "score"] if task in ("SEQ_CLS", "TOKEN_CLS") else list(saved)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": None if task else mapping,
        "base_model_name_or_path": None if base is None else str(base),
        "revision": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": _modules(lora.targets),
        "modules_to_save": saved or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _modules(targets: Collection[str]) -> list[str] | str:
    """The targets as PEFT names them: by the ends of their names or, where these are ambiguous, by a pattern."""
    if "feed_forward.output" in targets and "attention.output" not in targets:
        names = "|".join(TARGETS[target].replace(".", "[.]") for target in targets)
        return rf".*[.]layer[.]\d+[.]({names})"
    return [TARGETS[target].removeprefix("attention.self.") for target in targets]


def read_config(file: Path, task: str | None, found: Collection[str], module: str) -> Adapters:
    """Reads a configuration.

    Args:
        file: the file.
        task: PEFT's name for what the model is for, or None for any.
        found: the targets of which there are tensors. The configuration may name more of them, which are then missing;
            of a pattern only the tensors tell what it matched.
        module: what PyTorch calls one of the encoder's layers.

    Raises:
        SourceError: it can't be read.
        ConfigError: it is malformed, or asks for what is not supported.
    """
    config = read_json(file, ConfigError)
    _check(file, config, task)
    rank, alpha = expect_size(file, config, "r"), config.get("lora_alpha")
    if rank is None:
        raise ConfigError(f"{file}: r is missing, the rank of the adapters")
    check_number(f"{file}: lora_alpha", alpha, lambda value: 0 < value < math.inf, "a number above 0", ConfigError)
    asked = _names(file, config, "target_modules")
    targets = {*found, *matching(asked, module)}
    if not targets:
        raise ConfigError(f"{file}: target_modules is {show(asked)}, none of which is a dense layer of the encoder")
    # Rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732), what is added is multiplied by alpha / sqrt(rank).
    scale = math.sqrt(rank) if expect(file, config, "use_rslora", bool, False) else 1.0
    return Adapters(
        LoRA(rank=rank, alpha=alpha * scale, targets=tuple(targets)), _names(file, config, "modules_to_save")
    )


def _check(file: Path, config: Mapping[str, Any], task: str | None) -> None:
    """Refuses a configuration that asks for more than plain LoRA, or is of another task."""
    supported = {"peft_type": ("LORA",), "bias": (None, "none"), "init_lora_weights": _DRAWN}
    if task is not None:
        supported["task_type"] = (None, task)
    odd = [name for name, values in supported.items() if config.get(name) not in values]
    odd += sorted(name for name, value in config.items() if name not in _KNOWN and value)
    if odd:
        given = ", ".join(f"{name}={show(config.get(name))}" for name in odd)
        expected = "LoRA without variants" + (f", for the task {task}" if task else "")
        raise ConfigError(f"{file}: {given}: not supported; expected {expected}")
    if config.get("lora_dropout"):
        logger.info("%s: lora_dropout concerns training only, and is not done here", file)


def _names(file: Path, config: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """A field that lists modules; of a pattern, nothing."""
    value = config.get(field)
    if value is None or isinstance(value, str):
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{file}: {field} is {show(value)}, expected a list of names")
    return tuple(value)
