"""The generalist of a world: one model with about the parameters of a whole system, made from the texts of its agents.

It is of the answering agent's family, with its tokenizer, and is pretrained on what every agent was pretrained on, in
equal parts, and on as much of it as all of them together: the knowledge of a world in one place. Knows worlds; knows
nothing of systems or links.
"""

import numpy as np
from torch import Tensor

from recursivemas.baselines.finetuning import num_written, summed_loss
from recursivemas.models import LanguageModel
from recursivemas.prompts import PromptSet
from recursivemas.training.data import encode_turns
from recursivemas.training.loop import LoopSettings, Progress, RunDirectory, fit
from recursivemas.worlds import World
from recursivemas.worlds.pretraining import small_config

_WIDTHS = 8
"""A width is so many times a whole number: heads must divide it."""


def new_model(world: World, answers: str, num_parameters: int, *, device: str | None = None) -> LanguageModel:
    """A model with random weights, of the width at which it has about so many parameters."""
    recipe = world.agent_recipes[answers]
    num_layers = max(each.config["num_hidden_layers"] for each in world.agent_recipes.values())
    narrower: LanguageModel | None = None
    width = recipe.config["hidden_size"] // _WIDTHS * _WIDTHS
    while True:
        config = small_config(recipe.config["model_type"], width, num_layers)
        seed = recipe.seed + world.seed
        model = LanguageModel.from_config(config, world.tokenizer(answers), seed=seed, device=device)
        if model.num_parameters >= num_parameters:
            break
        narrower, width = model, width + _WIDTHS
    if narrower is not None and num_parameters - narrower.num_parameters < model.num_parameters - num_parameters:
        return narrower
    return model


def default_pretraining(world: World) -> LoopSettings:
    """As its agents were pretrained, on as many turns as all of them together, at the lowest of their rates."""
    recipes = list(world.agent_recipes.values())
    return LoopSettings(
        num_train_steps=sum(each.num_train_steps for each in recipes) // len(recipes),
        lr=min(each.lr for each in recipes),
        warmup_steps=max(each.warmup_steps for each in recipes),
        min_lr_ratio=recipes[0].min_lr_ratio,
        weight_decay=recipes[0].weight_decay,
        betas=recipes[0].betas,
        max_grad_norm=recipes[0].max_grad_norm,
        log_every=20,
        save_every=100,
    )


def pretrain(
    model: LanguageModel,
    world: World,
    settings: LoopSettings,
    *,
    run: RunDirectory | None = None,
    progress: Progress | None = None,
) -> None:
    """Train a model in place on the texts of all agents: in every step, of each agent what is one of its batches."""
    prompts = PromptSet.load(world.prompts)

    def loss_of_step(step: int) -> Tensor:
        samples = []
        for place, role in enumerate(world.roles):
            recipe = world.agent_recipes[role]
            rng = np.random.default_rng([recipe.seed, world.seed, place, step])
            samples += world.pretraining_batch(role, rng, recipe.batch_size)
        turns = encode_turns(samples, model, prompts)
        return summed_loss(model, turns) / num_written(turns)

    fit("pretraining", dict(model.network.named_parameters()), loss_of_step, settings, run=run, progress=progress)
