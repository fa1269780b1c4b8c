"""Training: an optimiser by optax, a pure step, parameters over devices; and a trainer that runs from files.

The loop is the caller's own around a pure step:

    from bertjax import from_pretrained
    from bertjax.training import AdamW, new_state, train_step

    model = from_pretrained("MODEL", fresh="classifier", num_labels=2)
    optimizer = AdamW(learning_rate=3e-5, warmup_steps=100).build(model, total_steps=1000)
    state = new_state(model, optimizer, seed=0)
    step = train_step(model, optimizer)
    for batch in batches:
        state, metrics = step(state, batch)
    state.update(model)
    model.save_pretrained("tuned")

Or a file says it all, and the run goes on wherever it was ended (`bertjax train config.toml`):

    from bertjax.training.settings import read_settings
    from bertjax.training.setup import trainer_of

    trainer_of(read_settings("config.toml")).run()
"""

from bertjax.training.lora import add_lora, merge_lora
from bertjax.training.lora_files import load_adapter, save_adapter
from bertjax.training.lora_settings import LoRA
from bertjax.training.objective import Objective
from bertjax.training.optimizer import AdamW
from bertjax.training.state import TrainState, new_state
from bertjax.training.step import Metrics, train_step

__all__ = [
    "AdamW",
    "LoRA",
    "Metrics",
    "Objective",
    "TrainState",
    "add_lora",
    "load_adapter",
    "merge_lora",
    "new_state",
    "save_adapter",
    "train_step",
]
