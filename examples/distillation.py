"""Distillation: an expert guides a learner, who answers. Run: python examples/distillation.py"""

from tiny import tiny_model

from recursivemas import RecursiveSystem

# The expert is larger, and of another architecture: a link maps its states into what the learner reads.
system = RecursiveSystem.build(
    pattern="distillation",
    agents={"expert": tiny_model("llama", hidden_size=64, seed=1), "learner": tiny_model("qwen3", seed=2)},
    num_rounds=2,
    num_latent_steps=8,
    max_new_tokens=24,
)
for name, link in system.links.items():
    print(f"link {name}: {link.config.source_size} -> {link.config.target_size} dimensions")

# The expert's guidance costs it a few latent steps; in text it would have to be written, word by word.
question = "Why is the sky blue?"
for channel in ("latent", "text"):
    usage = system.run(question, channel=channel).usage
    expert = [turn for turn in usage.turns if turn.role == "expert"]
    steps, tokens = (sum(getattr(turn, what) for turn in expert) for what in ("latent_steps", "generated_tokens"))
    print(f"{channel:7} the expert thinks {steps} latent steps and writes {tokens} tokens")

# Does the guidance matter? Two controls: the same system with empty slots, and the learner alone.
print("with the expert:", repr(system.run(question).text))
print("empty slots:    ", repr(system.run(question, channel="none").text))
print("learner alone:  ", repr(system.solo().run(question).text))
