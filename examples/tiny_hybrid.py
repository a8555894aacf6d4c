"""A tiny hybrid language model in torch: a recurrent layer and a sliding window of attention, with random weights.

It stands for what engines serve (Qwen3-Next, Jamba, Falcon-H1, ...) in what matters here: its state after n tokens can
not be had by slicing the state after more. The state is one row a slot, and is overwritten in place at every step.
No row's numbers depend on another's, to the last bit, so a request gives the same tokens in any batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

VOCABULARY, WIDTH, STATE, WINDOW = 64, 32, 8, 16

State = dict[str, Tensor]


class TinyHybrid:
    """Greedy next tokens, one step for all slots at once."""

    def __init__(self, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).div(shape[-1] ** 0.5)

        self.embedding = weights(VOCABULARY, WIDTH) * 4
        self.decay = torch.rand((WIDTH, STATE), generator=random) * 0.5 + 0.5
        self.inward, self.outward = weights(WIDTH, STATE), weights(WIDTH, STATE)
        self.query, self.key, self.value = weights(WIDTH, WIDTH), weights(WIDTH, WIDTH), weights(WIDTH, WIDTH)
        self.head = weights(VOCABULARY, WIDTH)

    def empty(self, slots: int) -> State:
        """The state of ``slots`` requests that have not begun."""
        window = (slots, WINDOW, WIDTH)
        return {
            "ssm": torch.zeros(slots, WIDTH, STATE),
            "keys": torch.zeros(window),
            "values": torch.zeros(window),
            "position": torch.zeros(slots, dtype=torch.int64),
        }

    @torch.inference_mode()
    def step(self, tokens: Tensor, active: Tensor, state: State) -> Tensor:
        """Feed one token to each active slot, in place; what comes next, for every slot."""
        x = self.embedding[tokens]
        ssm = state["ssm"] * self.decay + x[..., None] * self.inward
        hidden = x + (ssm * self.outward).sum(-1)
        slots, position = torch.arange(len(tokens)), state["position"]
        keys, values = state["keys"].clone(), state["values"].clone()
        keys[slots, position % WINDOW] = _times(hidden, self.key)
        values[slots, position % WINDOW] = _times(hidden, self.value)
        scores = (keys * _times(hidden, self.query)[:, None]).sum(-1)
        unseen = torch.arange(WINDOW) > position[:, None]
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        hidden = hidden + (values * weights[..., None]).sum(1)
        for name, new in (("ssm", ssm), ("keys", keys), ("values", values), ("position", position + 1)):
            state[name][active] = new[active]
        return _times(hidden, self.head).argmax(-1)


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """A product whose rows do not depend on how many there are, as those of a matrix product would."""
    return (x[:, None, :] * matrix).sum(-1)
