"""What decoder-only transformers share: embedding, layers, the norm after them, and the head."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from kivi_jax.models.layers import Attend, Embedding, Linear, project
from kivi_jax.promotion import with_usual_promotion


class Decoder(nnx.Module):
    """Tokens to hidden states, and hidden states to logits.

    Args:
        config: the family's configuration. Its `ropes` are each layer's rotary positions, None where there are none.
        layer: makes each of the `config.num_layers` layers, which is called as `layer(x, angles, layer_kv, attend)`.
        norm: makes the norm of the last layer's output.
        embedding: makes the table of the tokens' embeddings.
    """

    def __init__(
        self,
        config: Any,
        layer: Callable[..., nnx.Module],
        norm: Callable[..., nnx.Module],
        embedding: Callable[..., Embedding] = Embedding,
        *,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.embed = embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = norm(config, dtype=dtype, rngs=rngs)
        if not config.tied_head:
            self.head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, rngs=rngs)

    @with_usual_promotion
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        layers_kv: Sequence[Any],
        attend: Attend,
        lengths: Int[Array, "B #T"] | None = None,  # noqa: F821
    ) -> tuple[Float[Array, "B T hidden"], tuple[Any, ...]]:
        """Final hidden states of `tokens`, and every layer's KV as `attend` left it.

        `lengths` is how long the text is in the pass that computes each token (dynamic RoPE depends on it); by default
        all tokens of a row are of one pass, which ends with the last position.
        """
        ropes = self.config.ropes
        if lengths is None:
            lengths = positions.max(axis=1, keepdims=True) + 1
        angles = {
            rope: None if rope is None else rope.angles(positions, lengths, self.config.head_dim)
            for rope in dict.fromkeys(ropes)
        }
        x = self.embed(tokens)
        new_layers_kv = []
        for layer, rope, layer_kv in zip(self.layers, ropes, layers_kv, strict=True):
            x, layer_kv = layer(x, angles[rope], layer_kv, attend)
            new_layers_kv.append(layer_kv)
        return self.norm(x), tuple(new_layers_kv)

    @with_usual_promotion
    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """Next-token logits, float32."""
        kernel = self.embed.embedding if self.config.tied_head else self.head.kernel
        return project(hidden, kernel[...])
