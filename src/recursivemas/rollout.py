"""Latent thoughts (eq. 1): a model feeds its own last hidden state back as its next input, m times over.

    h_{t+1} = f([E_{<=t}; R_in(h_t)])         H = [h_t, ..., h_{t+m-1}]

h_t is the state at the last position of the prompt, so m thoughts cost m - 1 forward steps of one position each.
`latent_rollout` keeps what it has read in a cache and works on batches; `latent_rollout_reference` reads everything
again at every step, of rows of one length, and is what the fast way is tested and timed against. Both take a
LanguageModel and a link; they know nothing of agents, rounds or text.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from recursivemas.cache import LatentCache
from recursivemas.models import LanguageModel

Link = Callable[[Tensor], Tensor]


def latent_rollout(
    model: LanguageModel,
    cache: LatentCache,
    state: Float[Tensor, "batch hidden_size"],
    inner_link: Link,
    num_latent_steps: int,
) -> Float[Tensor, "batch latent_step hidden_size"]:
    """The thoughts that follow what `cache` holds, of which `state` is the last hidden state.

    The cache grows, unless the model's steps are compiled: then it is left as it is.
    """
    thoughts = [state]
    growing = model.with_room(cache, num_latent_steps)
    for _ in range(num_latent_steps - 1):
        inputs_embeds = inner_link(thoughts[-1]).unsqueeze(1)
        thoughts.append(model.step(growing, inputs_embeds)[:, -1])
    return torch.stack(thoughts, dim=1)


def latent_rollout_reference(
    model: LanguageModel,
    inputs_embeds: Float[Tensor, "batch position hidden_size"],
    inner_link: Link,
    num_latent_steps: int,
) -> Float[Tensor, "batch latent_step hidden_size"]:
    """The same from the embeddings of a whole prompt, without padding, which is read again at every step."""
    thoughts: list[Tensor] = []
    for _ in range(num_latent_steps):
        thoughts.append(model.states_of_embeds(inputs_embeds)[:, -1])
        inputs_embeds = torch.cat([inputs_embeds, inner_link(thoughts[-1]).unsqueeze(1)], dim=1)
    return torch.stack(thoughts, dim=1)
