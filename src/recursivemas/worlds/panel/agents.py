"""The panel's four frozen agents: architectures and pretraining recipes.

Three families, four widths, four vocabularies: nothing but the links can carry a state from one to the next. Half of
the batches are drills, which are short: most of what an agent reads in a whole case tells it nothing.
"""

from recursivemas.worlds.pretraining import AgentRecipe, ChatMarkers, small_config

AGENT_RECIPES = {
    "botanist": AgentRecipe(
        config=small_config("qwen3", 96),
        tokenizer="word",
        markers=ChatMarkers(user="<|user|>", assistant="<|assistant|>", end="<|end|>"),
        num_train_steps=1500,
        lr=3e-3,
        drill_share=0.5,
    ),
    "zoologist": AgentRecipe(
        config=small_config("llama", 80),
        tokenizer="bpe",
        markers=ChatMarkers(user="[INST]", assistant="[/INST]", end="</s>"),
        num_train_steps=1500,
        lr=3e-3,
        drill_share=0.5,
    ),
    "chemist": AgentRecipe(
        config=small_config("qwen2", 88),
        tokenizer="bpe",
        markers=ChatMarkers(user="<turn:user>", assistant="<turn:model>", end="<turn:end>"),
        num_train_steps=1500,
        batch_size=32,
        lr=3e-3,
        drill_share=0.5,
    ),
    "summarizer": AgentRecipe(
        config=small_config("qwen3", 104),
        tokenizer="word",
        markers=ChatMarkers(user="<|im_user|>", assistant="<|im_assistant|>", end="<|im_end|>"),
        num_train_steps=1200,
        batch_size=32,
        lr=3e-3,
        drill_share=0.75,
    ),
}
