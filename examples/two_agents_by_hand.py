"""A latent hand-off by hand: two small models, PyTorch and transformers, none of our classes between them.

A critic has read a case and would write a note; a solver would read it. Instead of the note, the solver gets the
critic's last hidden states. Three ways to do that break, and one does not. Run: python examples/two_agents_by_hand.py
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import recursivemas
from recursivemas.worlds import load_world

agents = Path(recursivemas.__file__).parent / "bundled/systems/ward/agents"
critic, solver = (AutoModelForCausalLM.from_pretrained(agents / r, dtype=torch.float32) for r in ("critic", "solver"))
critic_tok, solver_tok = (PreTrainedTokenizerFast.from_pretrained(agents / r) for r in ("critic", "solver"))


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@torch.no_grad()
def note_of(case, length=4):
    """The critic's greedy note, and the states that led to its words: one state a token, (4, 80)."""
    prompt = ids(critic_tok, f"[INST]{case} Note:") + ids(critic_tok, " Short note:[/INST]")
    states = []
    for _ in range(length):
        states.append(critic.model(torch.tensor([prompt])).last_hidden_state[0, -1])
        prompt.append(critic.lm_head(states[-1]).argmax().item())
    return prompt[-length:], torch.stack(states)


@torch.no_grad()
def diagnosis(case, message):
    """What the solver answers with `message` (vectors) in the slot of its prompt."""
    embed = solver.get_input_embeddings()
    before = embed(torch.tensor(ids(solver_tok, f"<turn:user>{case} Note:")))
    after = embed(torch.tensor(ids(solver_tok, " Diagnosis:<turn:model>")))
    states = solver.model(inputs_embeds=torch.cat([before, message, after])[None]).last_hidden_state
    return solver_tok.decode(solver.lm_head(states[0, -1]).argmax()).strip()


def as_solver_reads(note):
    """The same words as the solver embeds them."""
    return solver.get_input_embeddings()(torch.tensor(ids(solver_tok, critic_tok.decode(note)))).detach()


world = load_world("ward")
train = [note_of(sample.question) for sample in world.samples("train", 200, seed=0)]
H = torch.cat([states for _, states in train])  # (800, 80): the critic's states
E = torch.cat([as_solver_reads(note) for note, _ in train])  # (800, 80): the solver's embeddings of the same words
ridge = torch.linalg.solve(H.T @ H + 0.1 * torch.eye(80), H.T @ E)
channels = {
    "nothing (the solver alone)": lambda note, states: states[:0],
    "the note, as text": lambda note, states: as_solver_reads(note),
    "states as they are: both models are 80 wide, and it means nothing": lambda note, states: states,
    "states, sized like embeddings: still another language": lambda note, states: states * E.norm() / H.norm(),
    "states through a random matrix": lambda note, states: states @ torch.randn(80, 80) * E.norm() / H.norm() / 80**0.5,
    "states through a linear map fitted on 200 notes": lambda note, states: states @ ridge,
}
cases = world.samples("test", 200, seed=1)
notes = [note_of(sample.question) for sample in cases]
for name, channel in channels.items():
    answers = [diagnosis(sample.question, channel(*note)) for sample, note in zip(cases, notes, strict=True)]
    right = [s.metadata["posterior"].get(answer, 0.0) for s, answer in zip(cases, answers, strict=True)]
    print(f"{sum(right) / len(right):.3f}  {name}")
print(f"({len(cases)} cases; mean probability of the diagnosis given the whole case; standard error about .025)")
