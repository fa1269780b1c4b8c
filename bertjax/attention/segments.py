"""Which keys a query may look at, in the one form that every backend understands."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """A number for every query and every key; a query looks at the keys that have its own number. A pytree.

    Attributes:
        query: int32 [batch, queries], none below 0; None: every query's number is 1.
        key: int32 [batch, keys]; -1 for a key that no query looks at. None: every key's number is 1.
        mask: None, or the dense form, so that it is made once for many layers; see `with_mask`.
    """

    query: jax.Array | None = None
    key: jax.Array | None = None
    mask: jax.Array | None = None

    @classmethod
    def of(cls, attention_mask: jax.Array | None, segment_ids: jax.Array | None) -> "Segments":
        """What a model's inputs say.

        Every query looks at the keys that `attention_mask` leaves, also a query of padding, as in the reference; with
        `segment_ids`, at those of its own segment.

        Args:
            attention_mask: bool [batch, length], or None for no padding.
            segment_ids: int32 [batch, length], none below 0, or None for one text in a row.
        """
        if segment_ids is None:
            return cls(None, None if attention_mask is None else attention_mask.astype(jnp.int32))
        hidden = jnp.full_like(segment_ids, -1)
        return cls(
            segment_ids, segment_ids if attention_mask is None else jnp.where(attention_mask, segment_ids, hidden)
        )

    def dense_mask(self) -> jax.Array | None:
        """True where a query may look at a key: bool, broadcastable to [batch, heads, queries, keys]; None: at all."""
        if self.mask is not None or (self.query is None and self.key is None):
            return self.mask
        query = jnp.ones((1, 1), jnp.int32) if self.query is None else self.query
        key = jnp.ones((1, 1), jnp.int32) if self.key is None else self.key
        return query[:, None, :, None] == key[:, None, None, :]

    def with_mask(self) -> "Segments":
        """The same, with its dense form."""
        return dataclasses.replace(self, mask=self.dense_mask())
