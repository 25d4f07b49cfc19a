"""The expert and the learner: one architecture in two sizes, pretrained on texts that know all or a third.

Nothing else tells them apart: same family, same tokens, same form of answer. The expert has seven times as many
parameters, in more than three times as many layers.
"""

from recursivemas.worlds.pretraining import AgentRecipe, ChatMarkers, small_config

MARKERS = ChatMarkers(user="<|user|>", assistant="<|assistant|>", end="<|end|>")

AGENT_RECIPES = {
    # Thin and deep: an answer takes as many steps as it has layers, and that is what the learner saves.
    "expert": AgentRecipe(
        config=small_config("qwen3", 96, 7),
        tokenizer="word",
        markers=MARKERS,
        num_train_steps=700,
        batch_size=48,
        lr=2.5e-3,
    ),
    "learner": AgentRecipe(
        config=small_config("qwen3", 64, 2), tokenizer="word", markers=MARKERS, num_train_steps=1500, lr=4e-3
    ),
}
