"""A latent hand-off by hand: two small models, PyTorch and transformers, none of our classes between them.

A critic has read a case and a planner's note, and would write a note of its own; a solver would read it. Instead of
the note, the solver gets the critic's last hidden states. Three ways to do that break, and one does not.
Run: python examples/two_agents_by_hand.py
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
def note_of(turn, length=4):
    """The critic's greedy note, and the states that led to its words: one state a token, (4, 80)."""
    prompt = [f"[INST]{turn.question} Note:", turn.messages["planner"], " Short note:[/INST]"]
    tokens = [token for piece in prompt for token in ids(critic_tok, piece)]
    states = []
    for _ in range(length):
        states.append(critic.model(torch.tensor([tokens])).last_hidden_state[0, -1])
        tokens.append(critic.lm_head(states[-1]).argmax().item())
    return tokens[-length:], torch.stack(states)


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


def turns(split, n):
    """Turns of the critic in round 3: a case, the planner's note on it, and the disease it really is."""
    found = load_world("ward").role_samples(split, 4 * n, seed=0, role="critic")
    return [turn for turn in found if turn.round == 3][:n]


train = [note_of(turn) for turn in turns("train", 200)]
H = torch.cat([states for _, states in train])  # (800, 80): the critic's states
E = torch.cat([as_solver_reads(note) for note, _ in train])  # (800, 80): the solver's embeddings of the same words
ridge = torch.linalg.solve(H.T @ H + 0.1 * torch.eye(80), H.T @ E)
torch.manual_seed(0)
channels = {
    "nothing (the solver alone)": lambda note, states: states[:0],
    "the note, as text": lambda note, states: as_solver_reads(note),
    "states as they are: both models are 80 wide, and it means nothing": lambda note, states: states,
    "states, sized like embeddings: still another language": lambda note, states: states * E.norm() / H.norm(),
    "states through a random matrix": lambda note, states: states @ torch.randn(80, 80) * E.norm() / H.norm() / 80**0.5,
    "states through a linear map fitted on 200 notes": lambda note, states: states @ ridge,
}
cases = turns("test", 200)
notes = [note_of(turn) for turn in cases]
for name, channel in channels.items():
    answers = [diagnosis(turn.question, channel(*note)) for turn, note in zip(cases, notes, strict=True)]
    right = [turn.target.startswith(answer) for turn, answer in zip(cases, answers, strict=True)]
    print(f"{sum(right) / len(right):.3f}  {name}")
print(f"(share of right diagnoses in {len(cases)} held-out cases; standard error about .03)")
