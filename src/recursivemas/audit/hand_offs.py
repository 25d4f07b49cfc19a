"""Trying hand-offs: on every edge and in every round, what a reader makes of what it is sent, and where it is lost.

Conversations by the book (`World.conversations`) say what each role reads and should write. So every hand-off can be
tried on its own, with everything before it as it should be: the sender reads the note by the book; the reader's slot
holds the text by the book, or that text through the outer link, or the sender's latents while it is made to write that
text, or its latents as in a run, or nothing; and the reader's own text is compared with the book. What can be seen of
a link without a book is seen in health.py.

Knows systems and conversations; knows nothing of where these come from or of how findings are shown.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from recursivemas.agents import Message, PrefixStore, Reading
from recursivemas.audit.records import (
    SOURCES,
    SURE,
    Drift,
    EdgeDiagnosis,
    EdgeFigures,
    HandOff,
    LinkDiagnosis,
    MessageFigures,
    Reception,
    Split,
)
from recursivemas.audit.variety import Vectors, variety_of
from recursivemas.audit.verdicts import UNTRAINED, judge, lay_losses
from recursivemas.decoding import SamplingParams
from recursivemas.errors import ConfigError, InputError, unknown_name
from recursivemas.evaluation.metrics import Mean, mean
from recursivemas.models import LanguageModel
from recursivemas.patterns import Edge
from recursivemas.prompts import Segments
from recursivemas.rollout import latent_rollout
from recursivemas.system import RecursiveSystem
from recursivemas.training.data import RoleSample

Conversation = Sequence[RoleSample]
Place = tuple[str, int]
"""A turn of a conversation: role and round."""
Rows = dict[str, Tensor]
"""What was measured on one edge in one round, by name; one row a question."""


@torch.no_grad()
def diagnose_edges(
    system: RecursiveSystem,
    conversations: Sequence[Conversation],
    links: Sequence[LinkDiagnosis] = (),
    *,
    rounds: Collection[int] | None = None,
    batch_size: int = 200,
    progress: Callable[[int, int], None] | None = None,
) -> list[EdgeDiagnosis]:
    """Find out, for every edge and round, what is lost and why; in the order in which messages are sent.

    `conversations` are whole loops by the book, all with the same turns. `links` is what is known of the links by
    themselves. `rounds` are the rounds in which messages are sent; by default, all that the conversations have. Raises
    `ConfigError` or `InputError` if the conversations are not ones that this system can have.
    """
    untrained = {each.figures.link for each in links if any(found.cause == UNTRAINED for found in each.verdicts)}
    diagnoses = []
    for figures in _measure(system, conversations, rounds, batch_size, progress):
        losses = lay_losses(figures.hand_off)
        names = {"outer": figures.edge, "inner": Edge.parse(figures.edge).source}
        kinds = [kind for kind, name in names.items() if name in untrained]
        diagnoses.append(EdgeDiagnosis(figures, losses, judge(figures, losses, kinds)))
    return diagnoses


# --- conversations ----------------------------------------------------------------------------------------------------


class _Batch:
    """Some conversations with the system that plays them; what is read from the book alone is read once."""

    def __init__(self, system: RecursiveSystem, conversations: Sequence[Conversation]) -> None:
        self.system = system
        self.turns: dict[Place, list[RoleSample]] = {
            (turns[0].role, turns[0].round): list(turns) for turns in zip(*conversations, strict=True)
        }
        self._prefixes = PrefixStore()
        self._prompts: dict[Place, list[Segments]] = {}
        self._readings: dict[Place, Reading] = {}
        self._received: dict[Place, tuple[Tensor, Tensor]] = {}

    def texts(self, place: Place) -> list[str]:
        """What is written in a turn, by the book."""
        return [turn.target for turn in self.turns[place]]

    def read(self, place: Place, changes: Mapping[str, Message | None]) -> Reading:
        """A turn's prompts with the notes by the book in their slots; `changes`, by sender, stand in their place."""
        role, turns = place[0], self.turns[place]
        inbox: dict[str, Message | None] = {
            source: Message(texts=tuple(turn.messages.get(source, "") for turn in turns))
            for source in sorted({source for turn in turns for source in turn.messages})
        }
        given = {source: message for source, message in {**inbox, **changes}.items() if message is not None}
        return self.system.agents[role].read(self._prompts_of(place), given, self._prefixes)

    def read_by_the_book(self, place: Place) -> Reading:
        """The same with nothing changed."""
        if place not in self._readings:
            self._readings[place] = self.read(place, {})
        return self._readings[place]

    def received(self, place: Place, reading: Reading) -> tuple[Bool[Tensor, " row"], Float[Tensor, " row"]]:
        """Whether the text that follows a reading is the one by the book, and the cross-entropy of the latter."""
        agent, texts = self.system.agents[place[0]], self.texts(place)
        # A text that is longer than the longest one by the book is not in the book.
        longest = max(len(ids) for ids in agent.model.encode_batch(texts)) + 1
        replies = agent.speak(reading, SamplingParams(max_new_tokens=longest), [""] * len(texts))
        right = [reply.text.strip() == text.strip() for reply, text in zip(replies, texts, strict=True)]
        return torch.tensor(right), agent.loss(reading, texts).float().cpu()

    def received_by_the_book(self, place: Place) -> tuple[Bool[Tensor, " row"], Float[Tensor, " row"]]:
        """The same for a turn whose slots hold what they should."""
        if place not in self._received:
            self._received[place] = self.received(place, self.read_by_the_book(place))
        return self._received[place]

    def _prompts_of(self, place: Place) -> list[Segments]:
        if place not in self._prompts:
            self._prompts[place] = [
                self.system.prompts.segments(
                    turn.role,
                    turn.question,
                    render_chat=self.system.agents[turn.role].model.render_chat,
                    round=turn.round,
                    is_last=turn.round == turn.num_rounds,
                    variant=turn.variant or self.system.settings.variant,
                )
                for turn in self.turns[place]
            ]
        return self._prompts[place]


def _check(system: RecursiveSystem, conversations: Sequence[Conversation]) -> None:
    """Raise `ConfigError` or `InputError` unless this system can have these conversations."""
    if not conversations:
        raise InputError("there are no conversations to try hand-offs on")
    if system.settings.num_latent_steps == 0:
        raise ConfigError("this system thinks no latent steps (num_latent_steps is 0), so nothing travels on its links")
    first = [(turn.role, turn.round) for turn in conversations[0]]
    for role, _ in first:
        if role not in system.agents:
            raise ConfigError(f"the conversations are not of this system: {unknown_name('role', role, system.agents)}")
    for number, conversation in enumerate(conversations, start=1):
        if [(turn.role, turn.round) for turn in conversation] != first:
            raise InputError(f"conversation {number} has other turns than the first; give only such as are alike")


def _hand_offs(system: RecursiveSystem, conversation: Conversation) -> list[tuple[Edge, Place, Place]]:
    """Every edge with the turn that sends and the turn that reads, in the order in which messages are sent."""
    places = [(turn.role, turn.round) for turn in conversation]
    found = []
    for role, round in places:
        for edge in system.pattern.graph:
            reader = edge.target, round + system.pattern.is_feedback(edge)
            if edge.source == role and reader in places:
                found.append((edge, (role, round), reader))
    return found


def _measure(
    system: RecursiveSystem,
    conversations: Sequence[Conversation],
    rounds: Collection[int] | None,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> list[EdgeFigures]:
    _check(system, conversations)
    every = _hand_offs(system, conversations[0])
    chosen = [each for each in every if rounds is None or each[1][1] in rounds]
    if not chosen:
        known = sorted({sender[1] for _, sender, _ in every})
        raise ConfigError(f"nothing is handed on in the rounds {sorted(rounds or ())}; there are {known}")
    parts: dict[tuple[Edge, int], list[Rows]] = {(edge, sender[1]): [] for edge, sender, _ in chosen}
    for start in range(0, len(conversations), batch_size):
        batch = _Batch(system, conversations[start : start + batch_size])
        thoughts: dict[Place, Rows] = {}
        for edge, sender, reader in chosen:
            if sender not in thoughts:
                thoughts[sender] = _think(batch, sender)
            parts[edge, sender[1]].append(_rows(batch, edge, sender, reader, thoughts[sender]))
        if progress is not None:
            progress(min(start + batch_size, len(conversations)), len(conversations))
    return [
        _figures(system, edge, round, {name: torch.cat([part[name] for part in several]) for name in several[0]})
        for (edge, round), several in parts.items()
    ]


# --- one hand-off -----------------------------------------------------------------------------------------------------


class _Dictation:
    """In the place of an inner link: whatever is thought, the next token of the text is read.

    When a text has ended, the most probable word is read, as the agent would go on.
    """

    def __init__(self, model: LanguageModel, texts: Sequence[str]) -> None:
        self._model = model
        ids = [[*each, model.reply_end_id] for each in model.encode_batch(texts)]
        self.lengths = torch.tensor([len(each) for each in ids])
        """Tokens of each text, with the one that ends it: as many states predict a token of it."""
        longest = int(self.lengths.max())
        self._tokens = torch.tensor([each + [-1] * (longest - len(each)) for each in ids], device=model.device)
        self._read: list[Tensor] = []

    def __call__(self, states: Float[Tensor, "row hidden_size"]) -> Float[Tensor, "row hidden_size"]:
        tokens = self._model.logits(states).argmax(dim=-1)
        if len(self._read) < self._tokens.shape[1]:
            dictated = self._tokens[:, len(self._read)]
            tokens = torch.where(dictated < 0, tokens, dictated)
        self._read.append(self._model.embed(tokens))
        return self._read[-1]

    @property
    def words(self) -> Float[Tensor, "row token hidden_size"]:
        """The embeddings of all that was read."""
        return torch.stack(self._read, dim=1)


def _think(batch: _Batch, sender: Place) -> Rows:
    """The states H of a sender, rolled out and teacher-forced, and how far they are from each other."""
    agent = batch.system.agents[sender[0]]
    steps = batch.system.settings.num_latent_steps
    reading = batch.read_by_the_book(sender)
    rollout = agent.think(reading, steps)
    dictation = _Dictation(agent.model, batch.texts(sender))
    teacher = latent_rollout(agent.model, reading.cache.fork(), reading.state, dictation, steps)
    dictation(teacher[:, -1])  # the last state predicts a word, too
    is_text = torch.arange(steps) < dictation.lengths.unsqueeze(1)
    right, loss = batch.received_by_the_book(sender)
    a, b = rollout.float().cpu(), teacher.float().cpu()
    return {
        "right": right,
        "tokens": dictation.lengths.float() - 1,
        "probability": (-loss * dictation.lengths).exp(),
        "rollout": rollout,
        "teacher": teacher,
        "words": dictation.words,
        "cosine": functional.cosine_similarity(a, b, dim=-1).where(is_text, torch.nan),
        "distance": ((a - b).norm(dim=-1) / b.norm(dim=-1)).where(is_text, torch.nan),
    }


def _message(system: RecursiveSystem, edge: Edge, states: Vectors) -> Float[Tensor, "question latent_step target"]:
    """What the links make of a sender's states: R_out(R_in(H)), or R_out(H) if the system says so."""
    given = system.agents[edge.source].inner_link(states) if system.settings.message == "inner+outer" else states
    return system.links[str(edge)](given)


def _rows(batch: _Batch, edge: Edge, sender: Place, reader: Place, thoughts: Rows) -> Rows:
    """Everything measured on one edge in one round, for a batch."""
    system = batch.system
    if any(
        turn.target != next_turn.messages.get(edge.source)
        for turn, next_turn in zip(batch.turns[sender], batch.turns[reader], strict=True)
    ):
        raise InputError(f"not by the book: what the {edge.target} reads is not what the {edge.source} writes")
    rollout = _message(system, edge, thoughts["rollout"])
    slots: dict[str, Message | None] = {
        "teacher": Message(latents=_message(system, edge, thoughts["teacher"])),
        "rollout": Message(latents=rollout),
        "none": None,
    }
    if system.settings.message == "inner+outer":
        # Made for states, an outer link can make nothing of words unless it follows an inner link, which makes words.
        slots["words"] = Message(latents=system.links[str(edge)](thoughts["words"]))
    received = {"text": batch.received_by_the_book(reader)}
    for source, message in slots.items():
        received[source] = batch.received(reader, batch.read(reader, {edge.source: message}))
    return {
        "right": thoughts["right"],
        "tokens": thoughts["tokens"],
        "sure": thoughts["right"] & (thoughts["probability"] >= SURE),
        **{f"success/{source}": success.float() for source, (success, _) in received.items()},
        **{f"loss/{source}": loss for source, (_, loss) in received.items()},
        "cosine": thoughts["cosine"],
        "distance": thoughts["distance"],
        "messages": rollout.float().cpu(),
        "words": _words(system.agents[edge.target].model, batch.texts(sender), rollout.shape[1]),
    }


def _words(reader: LanguageModel, texts: Sequence[str], size: int) -> Vectors:
    """The reader's embeddings of the first tokens of each text; nan after its end."""
    words = torch.full((len(texts), size, reader.hidden_size), torch.nan)
    for row, ids in enumerate(reader.encode_batch(texts)):
        words[row, : len(ids)] = reader.embed(torch.tensor(ids[:size], dtype=torch.long)).float().cpu()
    return words


# --- numbers ----------------------------------------------------------------------------------------------------------


def _figures(system: RecursiveSystem, edge: Edge, round: int, rows: Rows) -> EdgeFigures:
    hand_off = HandOff(
        sender=mean(rows["right"].double().numpy()),
        tokens=mean(rows["tokens"].double().numpy()),
        received={
            source: Reception(_split(rows, f"success/{source}"), _split(rows, f"loss/{source}"))
            for source in SOURCES
            if f"success/{source}" in rows
        },
        drift=Drift(
            cosine=_splits(rows, "cosine"),
            distance=_splits(rows, "distance"),
            mean_cosine=_split(rows, "cosine"),
            mean_distance=_split(rows, "distance"),
        ),
    )
    return EdgeFigures(
        edge=str(edge),
        round=round,
        n=hand_off.sender.n,
        hand_off=hand_off,
        message=_message_figures(system, edge, rows["messages"], rows["words"]),
    )


def _split(rows: Rows, name: str) -> Split:
    """Means over all rows, and over those whose sender is right, wrong, or sure.

    Of values with latent steps, each row's mean over all but the first. Rows without a value (nan) are left out.
    """
    values, right, sure = rows[name], rows["right"], rows["sure"]
    if values.ndim > 1:
        values = values[:, 1:].nanmean(dim=1)
    known = ~values.isnan()
    return Split(*(_mean(values[known & group]) for group in (torch.ones_like(right), right, ~right, sure)))


def _splits(rows: Rows, name: str) -> tuple[Split, ...]:
    """The same for every latent step."""
    return tuple(_split({**rows, name: step}, name) for step in rows[name].unbind(1))


def _mean(values: Float[Tensor, " row"]) -> Mean | None:
    return mean(values.double().numpy()) if len(values) else None


def _message_figures(
    system: RecursiveSystem, edge: Edge, messages: Vectors, words: Float[Tensor, "text word hidden_size"]
) -> MessageFigures:
    norms = messages.norm(dim=-1) / system.agents[edge.target].model.mean_embedding_norm
    return MessageFigures(
        loudness=norms.mean().item(),
        loudness_spread=norms.std(unbiased=False).item(),
        messages=variety_of(messages),
        words=variety_of(words),
    )
