"""Training: an optimiser by optax, a pure step, parameters over devices.

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
"""

from bertjax.training.objective import Objective
from bertjax.training.optimizer import AdamW
from bertjax.training.state import TrainState, new_state
from bertjax.training.step import Metrics, train_step

__all__ = ["AdamW", "Metrics", "Objective", "TrainState", "new_state", "train_step"]
