"""Mixture: three specialists work side by side, and a summarizer answers. Run: python examples/mixture.py"""

from tiny import tiny_model

from recursivemas import RecursiveSystem
from recursivemas.drawing import text

# Two specialists share a model: its weights are there once, and the two think as one batch.
generalist, programmer = tiny_model("qwen3", seed=1), tiny_model("llama", hidden_size=48, seed=2)
system = RecursiveSystem.build(
    pattern="mixture",
    agents={"math": generalist, "science": generalist, "code": programmer, "summarizer": tiny_model("qwen2", seed=3)},
    num_rounds=2,
    num_latent_steps=4,
    max_new_tokens=16,
)
print(text.draw(system.pattern), "\n")

question = "How many bits does it take to number all atoms of a gram of iron?"
result = system.run(question, trace="full")
print("answer (of random models):", repr(result.text))

# In round 1 each specialist sends what it thought; in round 2 it reads what the summarizer sent back to it.
for message in result.trace.messages:
    print(f"  round {message.round}  {message.source}->{message.target}: {tuple(message.tensor().shape)}")

# Every edge can have a channel of its own: here the programmer writes, and also sends its latents.
told = system.run(question, channel={"code->summarizer": "both", "*": "latent"})
written = {turn.role: turn.generated_tokens for turn in told.usage.turns if turn.round == 1}
print("tokens written in round 1:", written)
