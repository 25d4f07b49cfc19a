"""The released trainer's loss of one sample, as its procedure is documented: nothing kept between turns, no batch.

Every role in turn reads its prompt, with the messages it was sent in their slots, and after it the text it should
write, closed as the chat template closes it. The states at that text's tokens go through its inner link and the link of
each edge, and the first so many rows of what comes out are the message. Where the answering role stands, the
cross-entropy of its text is the loss. Written apart from the package's own loop, from which it takes models, links,
patterns and words alone.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from recursivemas.models import LanguageModel
from recursivemas.prompts import Slot
from recursivemas.system import RecursiveSystem


def released_loss(
    system: RecursiveSystem,
    question: str,
    texts: Mapping[str, str | Sequence[int]],
    *,
    answer: str,
    num_rounds: int,
    max_latent_tokens: int,
    all_rounds: bool = False,
) -> Tensor:
    """Cross-entropy of the answer of the last round, or the mean of all rounds'.

    `texts` are what every role is given to read before it sends; in the released trainer the answering role is given
    the answer. Tokens in the place of a text are read as they are.
    """
    pattern = system.pattern
    sent: dict[tuple[str, str], Tensor] = {}
    losses = []
    for round in range(1, num_rounds + 1):
        for role in pattern.roles:
            agent = system.agents[role]
            rows = [
                sent[segment.role, role] if isinstance(segment, Slot) else embedded(agent.model, segment)
                for segment in system.prompts.segments(
                    role, question, render_chat=agent.model.render_chat, round=round, is_last=round == num_rounds
                )
                if not isinstance(segment, Slot) or (segment.role, role) in sent
            ]
            prompt = torch.cat(rows)
            if role == pattern.answers:
                ids = closed(agent.model, answer)
                states = agent.model.states_of_embeds(torch.cat([prompt, agent.model.embed(ids)])[None])[0]
                logits = agent.model.logits(states)
                losses.append(functional.cross_entropy(logits[len(prompt) - 1 : -1], ids))
            text = texts[role]
            ids = closed(agent.model, text) if isinstance(text, str) else torch.tensor(text)
            states = agent.model.states_of_embeds(torch.cat([prompt, agent.model.embed(ids)])[None])[0]
            assistant = states[len(prompt) :]
            for edge in pattern.graph:
                if edge.source == role:
                    mapped = system.links[str(edge)](agent.inner_link(assistant))
                    sent[edge.source, edge.target] = mapped[:max_latent_tokens]
    return torch.stack(losses).mean() if all_rounds else losses[-1]


def embedded(model: LanguageModel, text: str) -> Tensor:
    """A piece of text as the model reads it."""
    return model.embed(torch.tensor(model.tokenizer.encode(text, add_special_tokens=False)))


def closed(model: LanguageModel, text: str) -> Tensor:
    """The tokens of a reply: everything that the chat template renders from its first letter on."""
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
    rendered = model.tokenizer.apply_chat_template(conversation, tokenize=False, enable_thinking=False)
    reply = rendered[rendered.rindex(text) :]
    return torch.tensor(model.tokenizer.encode(reply, add_special_tokens=False))
