"""One step of the outer loop over a plain one: sample by sample, every prompt read whole, nothing kept between turns.

    python benchmarks/outer_step.py            the ward system, batch 8, three rounds; ratios within one run

Both compute the same loss and the same gradient (asserted). The plain loop is what one would write first: for each
question, each role in turn embeds its prompt with the messages in their slots, reads all of it with gradient, thinks
through its inner link on the cache of that reading, and maps its thoughts for the next; then the cross-entropy of the
answer of every round. It reads no prefix twice in a turn, and knows no batch.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from recursivemas import RecursiveSystem
from recursivemas.agents import Agent
from recursivemas.patterns import Edge
from recursivemas.prompts import Slot
from recursivemas.training.data import Question
from recursivemas.training.gradients import Backflow
from recursivemas.training.outer import OuterLoop, OuterSettings
from recursivemas.worlds import load_world


def read(agent: Agent, embeds: Tensor) -> tuple[DynamicCache, Tensor]:
    """Read a prompt: the cache, and the last hidden state."""
    cache = DynamicCache(config=agent.model.config)
    output = agent.model.decoder(inputs_embeds=embeds[None], past_key_values=cache, use_cache=True)
    return cache, output.last_hidden_state[:, -1]


def prompt_embeds(system: RecursiveSystem, agent: Agent, question: str, round: int, last: bool, inbox: dict) -> Tensor:
    """The embeddings of a prompt, with the messages in their slots."""
    pieces = []
    segments = system.prompts.segments(
        agent.role, question, render_chat=agent.model.render_chat, round=round, is_last=last
    )
    for segment in segments:
        if isinstance(segment, Slot):
            if segment.role in inbox:
                pieces.append(inbox[segment.role])
        else:
            pieces.append(agent.model.embed(torch.tensor(agent.model.encode(segment))))
    return torch.cat(pieces)


def plain_loss(system: RecursiveSystem, question: Question, num_rounds: int) -> Tensor:
    """The mean over rounds of the cross-entropy of one answer."""
    m = system.settings.num_latent_steps
    sent: dict[Edge, Tensor] = {}
    losses = []
    for round in range(1, num_rounds + 1):
        for role in system.pattern.roles:
            agent = system.agents[role]
            inbox = {edge.source: sent[edge] for edge in system.pattern.sources(role) if edge in sent}
            if role == system.pattern.answers:
                embeds = prompt_embeds(system, agent, question.text, round, True, inbox)
                labels = torch.tensor([*agent.model.encode(question.answer), agent.model.reply_end_id])
                answer = agent.model.embed(labels[:-1])
                states = agent.model.decoder(inputs_embeds=torch.cat([embeds, answer])[None]).last_hidden_state[0]
                losses.append(functional.cross_entropy(agent.model.logits(states[len(embeds) - 1 :]), labels))
            if role == system.pattern.answers and round == num_rounds:
                break
            cache, state = read(agent, prompt_embeds(system, agent, question.text, round, False, inbox))
            thoughts = [state]
            for _ in range(m - 1):
                step = agent.inner_link(thoughts[-1])[:, None]
                output = agent.model.decoder(inputs_embeds=step, past_key_values=cache, use_cache=True)
                thoughts.append(output.last_hidden_state[:, -1])
            for edge in system.pattern.graph:
                if edge.source == role:
                    sent[edge] = system.links[str(edge)](agent.inner_link(torch.cat(thoughts)))
    return torch.stack(losses).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7, help="medians over so many steps, the two taking turns")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    system = RecursiveSystem.from_pretrained("ward", dtype="float32", device="cpu")
    questions = [
        Question(id=each.id, text=each.question, answer=f"{each.target}.")
        for each in load_world("ward").samples("train", given.batch_size, 0)
    ]
    parameters = list(system.trainable_parameters().values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    settings = OuterSettings(batch_size=given.batch_size, num_rounds=given.rounds, anchor=0.0)

    def ours(batch: list[Question]) -> float:
        weights = dict.fromkeys(range(1, given.rounds + 1), 1 / given.rounds)
        backflow = Backflow(system.all_links)
        losses = OuterLoop(system, batch, settings).losses_by_round(batch, weights, backflow)
        loss = torch.stack([weights[round] * each.mean() for round, each in losses.items()]).sum()
        loss.backward()
        return loss.item()

    def plain(batch: list[Question]) -> float:
        total = 0.0
        for question in batch:
            loss = plain_loss(system, question, given.rounds) / len(batch)
            loss.backward()
            total += loss.item()
        return total

    def gradient_of(step: Callable[[list[Question]], float]) -> tuple[float, Tensor]:
        for parameter in parameters:
            parameter.grad = None
        loss = step(questions)
        return loss, torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])

    (loss, gradient), (expected, by_hand) = gradient_of(ours), gradient_of(plain)
    distance = ((gradient - by_hand).norm() / by_hand.norm()).item()
    assert abs(loss - expected) < 1e-5, (loss, expected)
    assert distance < 1e-4, distance
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(given.repeats):
        for name, step in (("ours", ours), ("plain", plain)):
            started = time.perf_counter()
            step(questions)
            seconds[name].append(time.perf_counter() - started)
    ratios = [slow / fast for fast, slow in zip(seconds["ours"], seconds["plain"], strict=True)]
    print(f"ward, batch {given.batch_size}, {given.rounds} rounds, {given.threads} thread(s), float32 on the CPU")
    print(f"gradients differ by {distance:.1e} of their norm")
    for name, values in seconds.items():
        print(f"{name:6} {1e3 * statistics.median(values):8.1f} ms a step")
    print(f"ratio  {statistics.median(ratios):8.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
