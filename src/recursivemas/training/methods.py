"""How a system, or an agent in its place, is trained: the links of frozen agents, or one of the baselines.

    links         the links alone, agents frozen (recipe.py)
    lora          the answering agent alone, through low-rank adapters that are merged into its weights in the end
    full          the answering agent alone, all of its weights
    text          every agent on the turns of its role; they hand each other text
    generalist    one model with about the parameters of the whole system, on the text of all its agents

Settings of the baselines stand here, since a recipe holds them; how they are trained is in `baselines`. Steps, batches
and learning rates are those of a language model of some billion parameters; the tiny agents of a world need others.
"""

from pydantic import Field

from recursivemas.config import Config
from recursivemas.training.loop import LoopSettings

METHODS = ("links", "lora", "full", "text", "generalist")


class FineTuning(LoopSettings):
    """How the weights of a language model, or adapters to them, are trained on what it should write."""

    num_train_steps: int = Field(default=1000, ge=1)
    lr: float = Field(default=1e-5, gt=0)
    batch_size: int = Field(default=4, ge=1)
    """Turns of each step."""
    micro_batch_size: int | None = Field(default=1, ge=1)
    """Turns that are read at the same time: memory grows with them, and the loss is the same. Without a number all
    turns of the step."""
    validate_every: int = Field(default=100, ge=1)
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many validations without a better one."""


class LoraSettings(FineTuning):
    """Low-rank adapters: W becomes W + alpha / rank * B A, of which A and B are trained."""

    lr: float = Field(default=2e-4, gt=0)
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that are adapted (`q_proj`, ...); by default all but the output head."""


class TextSettings(FineTuning):
    """Of every agent of the role-trained text system."""

    adapters: bool = False
    """Train adapters (as `lora` says) in the place of all weights."""
    num_validation: int = Field(default=512, ge=1)
    """Turns of each role that are held out; the weights with the least loss on them are kept."""


class GeneralistSettings(FineTuning):
    """Of the one model in the place of all agents."""

    model: str | None = None
    """Its Hugging Face name, or directory. In a world a new one is made, and pretrained on the texts of all agents."""
    pretraining: LoopSettings | None = None
    """In a world: how. By default as its agents were, on as many turns as all of them together."""


class MethodSettings(Config):
    """Settings of each baseline."""

    lora: LoraSettings = LoraSettings()
    full: FineTuning = FineTuning()
    text: TextSettings = TextSettings()
    generalist: GeneralistSettings = GeneralistSettings()
