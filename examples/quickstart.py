"""Ask the bundled system a question, and look at what its agents hand each other. Run: python examples/quickstart.py"""

from recursivemas import RecursiveSystem
from recursivemas.worlds import load_world

system = RecursiveSystem.from_pretrained("ward")  # three frozen agents of three architectures; 0.8 M parameters
case = load_world("ward").samples("test", 1, seed=7)[0]
print(case.question, "\n")

result = system.run(case.question, num_rounds=3, trace="full")
print("answer:", result.text, "  truth:", case.target)
print(f"cost: {result.usage.generated_tokens} generated tokens, {result.usage.latent_steps} latent steps")

message = result.trace.message(round=1, source="planner", target="critic")
print("\nplanner->critic, round 1: a tensor of shape", tuple(message.shape))
for step, tokens in enumerate(result.trace.find(1, "planner", "critic").nearest, start=1):
    print(f"  latent {step} is nearest to", ", ".join(f"{token} ({cosine:.2f})" for token, cosine in tokens))

# The same agents, prompts and rounds, handing each other text; and the solver alone.
text = system.run(case.question, channel="text", num_rounds=3)
print("\nin text:", text.text, f"  ({text.usage.generated_tokens} generated tokens)")
for message in text.trace.messages:
    print(f"  round {message.round} {message.source}->{message.target}: {message.text}")
print("solver alone:", system.solo().run(case.question).text)
