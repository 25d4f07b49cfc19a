"""The desk's two frozen agents: architectures and pretraining recipes.

Two families, two widths, two vocabularies. The tool-caller has to copy numbers and to keep account of what it has
tried, which takes it a layer and many steps more.
"""

from recursivemas.worlds.pretraining import AgentRecipe, ChatMarkers, small_config

AGENT_RECIPES = {
    "reflector": AgentRecipe(
        config=small_config("llama", 80),
        tokenizer="bpe",
        markers=ChatMarkers(user="[INST]", assistant="[/INST]", end="</s>"),
        num_train_steps=2600,
        lr=3e-3,
    ),
    "toolcaller": AgentRecipe(
        config=small_config("qwen3", 96, 3),
        tokenizer="word",
        markers=ChatMarkers(user="<|user|>", assistant="<|assistant|>", end="<|end|>"),
        num_train_steps=2800,
        lr=3e-3,
    ),
}
