"""The ward's three frozen agents: architectures and pretraining recipes.

Three families, three widths, three vocabularies: nothing but the links can carry a state from one to the next.
"""

from recursivemas.worlds.pretraining import AgentRecipe, ChatMarkers, small_config

AGENT_RECIPES = {
    "planner": AgentRecipe(
        config=small_config("qwen3", 96),
        tokenizer="word",
        markers=ChatMarkers(user="<|user|>", assistant="<|assistant|>", end="<|end|>"),
        num_train_steps=2600,
        lr=3e-3,
        drill_share=0.36,
    ),
    "critic": AgentRecipe(
        config=small_config("llama", 80),
        tokenizer="bpe",
        markers=ChatMarkers(user="[INST]", assistant="[/INST]", end="</s>"),
        num_train_steps=2400,
    ),
    "solver": AgentRecipe(
        config=small_config("qwen2", 80),
        tokenizer="bpe",
        markers=ChatMarkers(user="<turn:user>", assistant="<turn:model>", end="<turn:end>"),
        num_train_steps=2800,
    ),
}
