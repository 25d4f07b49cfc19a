"""The relay's three frozen agents: architectures and pretraining recipes.

Three families, three vocabularies: nothing but the links can carry a state from one to the next. What agents learn last
is which hop to take when a short note has come: the number in it, plus one. At much higher learning rates some of that
stays unlearnt (the relation of another of the agent's own hops is taken), and so it does with batches of 48, and at
these rates from some initial weights: an examination finds such agents, and they are drawn again (`least_exact`).
"""

from recursivemas.worlds.pretraining import AgentRecipe, ChatMarkers, small_config

AGENT_RECIPES = {
    "planner": AgentRecipe(
        config=small_config("qwen3", 96, 3),
        tokenizer="word",
        markers=ChatMarkers(user="<|user|>", assistant="<|assistant|>", end="<|end|>"),
        num_train_steps=1250,
        lr=2e-3,
        drill_share=0.15,
        least_exact=0.995,
    ),
    "critic": AgentRecipe(
        config=small_config("llama", 80, 3),
        tokenizer="bpe",
        markers=ChatMarkers(user="[INST]", assistant="[/INST]", end="</s>"),
        num_train_steps=1450,
        lr=2.4e-3,
        drill_share=0.15,
        least_exact=0.995,
    ),
    "solver": AgentRecipe(
        config=small_config("qwen2", 80, 3),
        tokenizer="bpe",
        markers=ChatMarkers(user="<turn:user>", assistant="<turn:model>", end="<turn:end>"),
        num_train_steps=1400,
        lr=2e-3,
        drill_share=0.15,
        least_exact=0.995,
    ),
}
