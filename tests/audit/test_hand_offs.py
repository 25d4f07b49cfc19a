"""Trying hand-offs: planted faults are found and named first, numbers are what they say, and nothing is left out."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from tests.audit.faults import constant, much_too_loud, not_a_number, printed, redrawn, with_fault, zeroed

from recursivemas.audit import hand_off_views, records, verdicts
from recursivemas.audit.hand_offs import _Batch, _think, diagnose_edges
from recursivemas.audit.health import examine_links
from recursivemas.audit.records import Drift, EdgeDiagnosis, EdgeFigures, HandOff, MessageFigures, Reception, Split
from recursivemas.audit.variety import effective_rank, mean_cosine, spread
from recursivemas.errors import ConfigError, InputError
from recursivemas.evaluation.metrics import Mean
from recursivemas.links import RecursiveLink
from recursivemas.system import RecursiveSystem
from recursivemas.training.data import RoleSample, encode_turns
from recursivemas.training.inner import collect_pairs
from recursivemas.worlds import load_world

Conversations = list[list[RoleSample]]
ROUND = 2
"""In the second round of the ward all three edges are open, and senders are sure of their notes."""
EDGES = ("planner->critic", "critic->solver", "solver->planner")


@pytest.fixture(scope="module")
def ward() -> RecursiveSystem:
    return RecursiveSystem.from_pretrained("ward", device="cpu")


@pytest.fixture(scope="module")
def conversations() -> Conversations:
    return load_world("ward", 0).conversations("validation", 72, 0)


def diagnose(
    system: RecursiveSystem, conversations: Sequence[Sequence[RoleSample]], edge: str, round: int = ROUND
) -> EdgeDiagnosis:
    """The diagnosis of one edge in one round, from no more than the two turns that belong to it."""
    place = 3 * (round - 1) + EDGES.index(edge)
    [found] = diagnose_edges(system, [loop[place : place + 2] for loop in conversations])
    assert (found.figures.edge, found.figures.round) == (edge, round)
    return found


def causes(diagnosis: EdgeDiagnosis) -> list[str]:
    return [verdict.cause for verdict in diagnosis.verdicts]


# Planted faults


def test_the_bundled_system_has_no_fault_in_its_links(ward: RecursiveSystem, conversations: Conversations) -> None:
    found = {each.figures.edge: each for each in diagnose_edges(ward, conversations, rounds=[ROUND])}
    assert list(found) == list(EDGES)
    assert causes(found["critic->solver"]) == [verdicts.HEALTHY]
    of_agents = {verdicts.HEALTHY, verdicts.SENDER, verdicts.READER, verdicts.DOUBT}
    for each in found.values():
        assert set(causes(each)) <= of_agents
        assert each.losses.outer + each.losses.inner < verdicts.NAMED


@pytest.mark.parametrize(
    ("plant", "edge", "named"),
    [
        (zeroed, "planner->critic", [verdicts.QUIET, verdicts.OUTER]),
        (redrawn, "planner->critic", [verdicts.OUTER]),
        (redrawn, "critic->solver", [verdicts.OUTER]),
        (redrawn, "solver->planner", [verdicts.OUTER]),
        (constant, "critic->solver", [verdicts.COLLAPSED, verdicts.OUTER]),
        # A reader with a norm before every layer may read it all the same: then it is the only fault.
        (much_too_loud, "critic->solver", [verdicts.LOUD]),
        (not_a_number, "critic->solver", [verdicts.NOT_FINITE]),
    ],
)
def test_a_fault_of_an_outer_link_is_named_first(
    ward: RecursiveSystem,
    conversations: Conversations,
    plant: Callable[[RecursiveLink], RecursiveLink],
    edge: str,
    named: list[str],
) -> None:
    found = diagnose(with_fault(ward, edge, plant), conversations, edge)
    assert causes(found)[: len(named)] == named


@pytest.mark.parametrize("edge", ["critic->solver", "solver->planner"])
def test_a_fault_of_an_inner_link_is_named_first(
    ward: RecursiveSystem, conversations: Conversations, edge: str
) -> None:
    found = diagnose(with_fault(ward, edge.split("->")[0], redrawn), conversations, edge)
    assert causes(found)[0] == verdicts.INNER
    before = diagnose(ward, conversations, edge).figures.hand_off
    after = found.figures.hand_off
    assert before is not None
    assert after is not None
    assert after.drift.mean_distance.all.value > 2 * before.drift.mean_distance.all.value  # type: ignore[union-attr]
    # What reaches the reader in words, or from nobody, has not changed.
    for source in ("text", "words", "none"):
        assert after.received[source] == before.received[source]


def test_a_sender_that_cannot_write_its_text_is_named_first(
    ward: RecursiveSystem, conversations: Conversations, system: RecursiveSystem
) -> None:
    words = [[replace(turn, variant=None) for turn in loop[:4]] for loop in conversations[:3]]
    for each in diagnose_edges(system, words):
        assert causes(each)[0] == verdicts.SENDER
        assert each.figures.hand_off.sender.value == 0
    shuffled = [list(loop) for loop in conversations]
    for place, loop in enumerate(shuffled):
        # Notes on other patients: the reader can read them, but no sender would write them.
        other = conversations[place - 1][4].target
        loop[4] = replace(loop[4], target=other)
        loop[5] = replace(loop[5], messages={"critic": other})
    found = diagnose(ward, shuffled, "critic->solver")
    assert causes(found)[0] == verdicts.SENDER


def test_a_reader_that_cannot_read_is_named_first(ward: RecursiveSystem, conversations: Conversations) -> None:
    strange = [list(loop) for loop in conversations]
    for place, loop in enumerate(strange):
        loop[5] = replace(loop[5], target=conversations[place - 1][5].target)
        loop[6] = replace(loop[6], messages={"solver": loop[5].target})
    assert causes(diagnose(ward, strange, "critic->solver"))[0] == verdicts.READER


def test_a_link_that_was_never_trained_explains_what_is_lost(
    ward: RecursiveSystem, conversations: Conversations
) -> None:
    faulty = with_fault(ward, "critic->solver", redrawn)
    pairs = [loop[4:6] for loop in conversations]
    [found] = diagnose_edges(faulty, pairs, examine_links(faulty))
    assert causes(found)[:2] == [verdicts.OUTER_START, verdicts.OUTER]
    [found] = diagnose_edges(
        with_fault(ward, "critic", redrawn), pairs, examine_links(with_fault(ward, "critic", redrawn))
    )
    assert causes(found)[:2] == [verdicts.INNER_START, verdicts.INNER]
    [found] = diagnose_edges(ward, pairs, examine_links(ward))
    assert not {verdicts.OUTER_START, verdicts.INNER_START} & set(causes(found))


# Numbers


def test_variety_of_messages() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(7, 2, 5)
    vectors[3:, 1] = torch.nan  # four texts end before the second step
    pairs = [
        torch.cosine_similarity(a, b, dim=0).item()
        for step in (vectors[:, 0], vectors[:3, 1])
        for i, a in enumerate(step)
        for j, b in enumerate(step)
        if i != j
    ]
    assert mean_cosine(vectors) == pytest.approx(sum(pairs) / len(pairs))
    assert mean_cosine(torch.ones(4, 2, 5)) == pytest.approx(1)
    assert spread(vectors) == pytest.approx(1 - sum(pair**2 for pair in pairs) / len(pairs))
    assert spread(torch.ones(4, 2, 5)) == pytest.approx(0)
    # All on one line, to both sides: the mean cosine does not see it.
    line = torch.tensor([1.0, -1.0, 2.0, -3.0])[:, None, None] * torch.ones(5)
    assert mean_cosine(line) == pytest.approx(-1 / 3)
    assert spread(line) == pytest.approx(0)
    for nothing in (vectors[:1], torch.zeros(4, 2, 5)):
        assert mean_cosine(nothing) is None
        assert spread(nothing) is None


def test_effective_rank() -> None:
    torch.manual_seed(0)
    assert effective_rank(torch.randn(4000, 1, 8)) == pytest.approx(8, rel=0.02)
    line = torch.randn(50, 1, 1) * torch.randn(8)
    assert effective_rank(line + torch.randn(8)) == pytest.approx(1, rel=1e-4)
    # Steps that differ from each other only do not count.
    assert effective_rank(torch.cat([line, line + 100], dim=1)) == pytest.approx(1, rel=1e-4)
    assert effective_rank(torch.randn(3, 1, 40)) <= 2 + 1e-9  # type: ignore[operator]
    assert effective_rank(torch.ones(4, 2, 5)) is None


def test_messages_are_those_of_a_run(ward: RecursiveSystem, conversations: Conversations) -> None:
    """The first message of a loop depends on no note, so a run sends the same."""
    results = ward.run([loop[0].question for loop in conversations[:10]], num_rounds=1, trace="full")
    norms = torch.stack(
        [each.trace.message(round=1, source="planner", target="critic").norm(dim=-1) for each in results]
    )
    message = diagnose(ward, conversations[:10], "planner->critic", round=1).figures.message
    used_to = ward.agents["critic"].model.mean_embedding_norm
    assert message.loudness == pytest.approx(norms.mean().item() / used_to, rel=1e-4)
    assert message.loudness_spread == pytest.approx(norms.std(unbiased=False).item() / used_to, rel=1e-3)


def test_teacher_forced_states_are_those_that_training_reads(
    ward: RecursiveSystem, conversations: Conversations
) -> None:
    loops = conversations[:6]
    for role, place in (("planner", 3), ("critic", 1), ("solver", 5)):
        model = ward.agents[role].model
        pairs = collect_pairs(model, encode_turns([loop[place] for loop in loops], model, ward.prompts), with_end=True)
        with torch.no_grad():
            thoughts = _think(_Batch(ward, loops), (role, loops[0][place].round))
        steps = ward.settings.num_latent_steps
        kept = [(turn, step) for turn, step in zip(pairs.turn_of, pairs.place_of, strict=True) if step < steps]
        expected = pairs.states[[step < steps for step in pairs.place_of]]
        found = torch.stack([thoughts["teacher"][turn, step] for turn, step in kept])
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
        words = torch.tensor(
            [token for token, step in zip(pairs.token_ids, pairs.place_of, strict=True) if step < steps]
        )
        assert (torch.stack([thoughts["words"][turn, step] for turn, step in kept]) == model.embed(words)).all()


def test_batches_change_nothing(ward: RecursiveSystem, conversations: Conversations) -> None:
    told: list[tuple[int, int]] = []
    loops = [loop[:3] for loop in conversations[:10]]
    at_once = diagnose_edges(ward, loops)
    in_parts = diagnose_edges(ward, loops, batch_size=4, progress=lambda *counts: told.append(counts))
    assert told == [(4, 10), (8, 10), (10, 10)]
    for a, b in zip(at_once, in_parts, strict=True):
        flat = [torch.tensor(_numbers(records.to_plain(each))) for each in (a.figures, b.figures)]
        assert torch.allclose(*flat, rtol=1e-3, atol=1e-3)
        assert causes(a) == causes(b)


def _numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for part in value for number in _numbers(part)]
    return [float(value)] if isinstance(value, int | float) else []


def test_splits_add_up(ward: RecursiveSystem, conversations: Conversations) -> None:
    figures = diagnose(ward, conversations, "planner->critic").figures
    assert figures.n == len(conversations)
    hand_off = figures.hand_off
    assert list(hand_off.received) == list(records.SOURCES)
    for reception in hand_off.received.values():
        for split in (reception.success, reception.loss):
            assert split.all is not None
            assert split.right is not None
            assert split.wrong is not None
            assert split.sure is not None
            assert split.sure.n < split.right.n == round(hand_off.sender.value * figures.n)
            assert split.right.n + split.wrong.n == split.all.n == figures.n
            parts = sum(part.n * part.value for part in (split.right, split.wrong)) / figures.n
            assert split.all.value == pytest.approx(parts)
    assert len(hand_off.drift.cosine) == ward.settings.num_latent_steps
    assert hand_off.drift.cosine[0].all.value == pytest.approx(1)  # type: ignore[union-attr]
    assert hand_off.drift.distance[0].all.value == 0  # type: ignore[union-attr]


def test_messages_past_the_inner_link_only_where_the_system_says_so(
    ward: RecursiveSystem, conversations: Conversations
) -> None:
    settings = ward.settings.model_copy(update={"message": "outer"})
    paper = RecursiveSystem(ward.agents, ward.links, ward.pattern, ward.prompts, settings)
    hand_off = diagnose(paper, conversations[:6], "planner->critic").figures.hand_off
    assert list(hand_off.received) == ["text", "teacher", "rollout", "none"]


# From numbers to words


def of(value: float, n: int = 200) -> Split:
    same = Mean(value, 0.01, n)
    return Split(same, same, None, Mean(value, 0.01, n // 2))


def figures_of(
    *, loudness: float = 1.0, tokens: float = 2.0, nats: dict[str, float] | None = None, **success: float
) -> EdgeFigures:
    """An edge on which all goes well, but for what is given by source."""
    rates = {"text": 1.0, "words": 1.0, "teacher": 1.0, "rollout": 1.0, "none": 0.0, **success}
    losses = {"text": 0.1, "words": 0.1, "teacher": 0.1, "rollout": 0.1, "none": 3.0, **(nats or {})}
    near = Drift((of(1.0),) * 2, (of(0.0),) * 2, of(1.0), of(0.0))
    received = {source: Reception(of(rates[source]), of(losses[source])) for source in records.SOURCES}
    variety = records.Variety(cosine=0.5, spread=0.7, rank=9.0)
    message = MessageFigures(loudness, 0.1, variety, variety)
    return EdgeFigures("a->b", 1, 200, HandOff(Mean(1.0, 0.0, 200), Mean(tokens, 0.0, 200), received, near), message)


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        (figures_of(), [verdicts.HEALTHY]),
        (figures_of(rollout=0.5), [verdicts.INNER]),
        (figures_of(teacher=0.5, rollout=0.5), [verdicts.INNER]),  # words get through the outer link
        (figures_of(words=0.5), [verdicts.HEALTHY]),  # an outer link need not carry what it was not trained on
        (figures_of(words=0.5, teacher=0.5, rollout=0.5), [verdicts.OUTER]),
        (figures_of(words=0.5, teacher=0.5, rollout=0.5, loudness=9.0), [verdicts.LOUD, verdicts.OUTER]),
        (figures_of(words=0.5, teacher=0.5, rollout=0.5, tokens=7.0), [verdicts.CUT, verdicts.OUTER]),
        (figures_of(tokens=7.0), [verdicts.HEALTHY]),  # its beginning says enough
        (figures_of(words=0.3, teacher=0.3, rollout=0.1), [verdicts.OUTER, verdicts.INNER]),
        (figures_of(words=0.85, teacher=0.85, rollout=0.1), [verdicts.INNER, verdicts.OUTER]),  # the dearest goes first
        (figures_of(text=0.5, words=0.5, teacher=0.5, rollout=0.5), [verdicts.READER]),
        (figures_of(none=1.0, nats={"none": 0.1}), [verdicts.DEAF]),
        (figures_of(none=1.0), [verdicts.HEALTHY]),  # its text becomes likelier, though it is the same
        (figures_of(loudness=math.inf), [verdicts.NOT_FINITE]),
    ],
)
def test_causes_follow_from_the_numbers(figures: EdgeFigures, expected: list[str]) -> None:
    found = verdicts.judge(figures, verdicts.lay_losses(figures.hand_off))
    assert [verdict.cause for verdict in found] == expected
    assert all(verdict.reason and verdict.cause in verdicts.ADVICE for verdict in found)


def test_an_unsure_sender_is_not_laid_to_its_links() -> None:
    def unsure(**success: float) -> EdgeFigures:
        figures = figures_of(**success)
        received = {
            source: Reception(replace(each.success, sure=None), replace(each.loss, sure=None))
            for source, each in figures.hand_off.received.items()
        }
        return replace(figures, hand_off=replace(figures.hand_off, received=received))

    soft = unsure(words=0.6, teacher=0.6, rollout=0.6)
    broken = replace(
        soft,
        hand_off=unsure(
            words=0.6, teacher=0.6, rollout=0.6, nats=dict.fromkeys(("words", "teacher", "rollout"), 3.0)
        ).hand_off,
    )  # type: ignore[arg-type]
    for figures, cause in ((soft, verdicts.DOUBT), (broken, verdicts.OUTER)):
        assert verdicts.judge(figures, verdicts.lay_losses(figures.hand_off))[0].cause == cause


# What is refused, and how it is shown


def test_conversations_that_do_not_fit_are_refused(ward: RecursiveSystem, conversations: Conversations) -> None:
    loop = conversations[0]
    with pytest.raises(InputError, match="no conversations"):
        diagnose_edges(ward, [])
    with pytest.raises(ConfigError, match="rounds .7."):
        diagnose_edges(ward, [loop], rounds=[7])
    with pytest.raises(ConfigError, match="unknown role 'nurse'"):
        diagnose_edges(ward, [[replace(turn, role="nurse") for turn in loop]])
    with pytest.raises(InputError, match="conversation 2"):
        diagnose_edges(ward, [loop, loop[:5]])
    with pytest.raises(InputError, match="not by the book"):
        diagnose_edges(ward, [[loop[0], replace(loop[1], messages={"planner": "another note"})]])
    settings = ward.settings.model_copy(update={"num_latent_steps": 0})
    with pytest.raises(ConfigError, match="num_latent_steps is 0"):
        diagnose_edges(RecursiveSystem(ward.agents, ward.links, ward.pattern, ward.prompts, settings), [loop])


def test_json_is_complete_and_plain(ward: RecursiveSystem, conversations: Conversations) -> None:
    diagnosis = diagnose(ward, conversations[:6], "planner->critic")
    plain = json.loads(json.dumps(records.to_plain(diagnosis), allow_nan=False))
    assert set(plain) == {"figures", "losses", "verdicts"}
    assert set(plain["figures"]) == set(EdgeFigures.__dataclass_fields__)
    assert set(plain["figures"]["message"]) == set(MessageFigures.__dataclass_fields__)
    assert set(plain["figures"]["hand_off"]["received"]) == set(records.SOURCES)
    assert set(plain["figures"]["hand_off"]["received"]["text"]["success"]) == {"all", "right", "wrong", "sure"}
    assert plain["figures"]["hand_off"]["received"]["text"]["success"]["all"]["n"] == 6
    assert records.to_plain({"a": (math.nan, math.inf, 1.5)}) == {"a": [None, None, 1.5]}


def test_views_tell_every_edge_and_round(ward: RecursiveSystem, conversations: Conversations) -> None:
    diagnoses = diagnose_edges(ward, [loop[:4] for loop in conversations[:6]])
    tables = list(hand_off_views.tables(diagnoses))
    assert [table.row_count for table in tables] == [3] * 4
    printed(*tables)
    lines = list(hand_off_views.say_verdicts(diagnoses))
    assert {line.split(",")[0] for line in lines} == set(EDGES)
    figure = hand_off_views.draw(diagnoses)
    assert all(edge.replace(">", "&gt;") in figure for edge in EDGES)
    assert figure == hand_off_views.draw(diagnoses)
