"""Deliberation: two agents read each other round by round, and one answers. Run: python examples/deliberation.py"""

from tiny import tiny_model

from recursivemas import RecursiveSystem

# One model plays both roles: one copy of the weights, with an inner link for each role. And the roles get other names.
system = RecursiveSystem.build(
    pattern="deliberation",
    roles={"toolcaller": "worker"},
    agents=dict.fromkeys(["reflector", "worker"], tiny_model("qwen3", seed=1)),
    num_latent_steps=4,
    max_new_tokens=12,
)
question = "Is 2027 a prime number?"
print("what the worker reads in the last round:\n" + system.prompts.template("worker", round=3, is_last=True), "\n")

# More rounds, same weights: `num_rounds` is one of the two dials, `num_latent_steps` the other.
for num_rounds in (1, 2, 3):
    result = system.run(question, num_rounds=num_rounds, trace="full")
    sent = [f"{each.source}->{each.target}" for each in result.trace.messages]
    print(
        f"{num_rounds} rounds: {len(sent)} messages, {result.usage.latent_steps} latent steps; answer {result.text!r}"
    )

# What the worker thought in round 1 is what the reflector reads in round 2. Silence it, and see what changes.
silent = system.run(question, num_rounds=2, channel={"worker->reflector": "none", "*": "latent"}, trace="full")
spoken = system.run(question, num_rounds=2, trace="full")
change = silent.trace.message(2, "reflector", "worker") - spoken.trace.message(2, "reflector", "worker")
share = change.norm() / spoken.trace.message(2, "reflector", "worker").norm()
print(f"without feedback the reflector's second message is {share:.0%} different")
