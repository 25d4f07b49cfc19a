"""Low-rank adapters of a language model: put in, trained, and merged into its weights. Knows peft, and no data."""

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from recursivemas.errors import ConfigError
from recursivemas.models import LanguageModel
from recursivemas.training.methods import LoraSettings

if TYPE_CHECKING:
    from peft import PeftModel


class Adapters:
    """Adapters in a language model, in place; its own weights stay as they are until they are merged."""

    def __init__(self, model: LanguageModel, settings: LoraSettings, *, seed: int = 0) -> None:
        """Put new adapters in, in float32; at first they change nothing. Raises `ConfigError`."""
        self.model = model
        self._peft = _adapted(model, settings, seed)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return {name: each for name, each in self.model.network.named_parameters() if ".lora_" in name}

    def merge(self) -> LanguageModel:
        """The model with the adapters in its weights: no larger, and no slower, than before."""
        network: Any = self._peft.merge_and_unload()
        return LanguageModel(network, self.model.tokenizer)


def check_installed() -> None:
    """Raise `ConfigError` if the adapters' library is missing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft loads where it is installed
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ConfigError(
            "LoRA needs the package peft, which is not installed: pip install 'recursivemas[baselines]', or train all "
            "weights (--method full)"
        ) from None


def _adapted(model: LanguageModel, settings: LoraSettings, seed: int) -> "PeftModel":
    check_installed()
    from peft import LoraConfig, get_peft_model

    names = [name.rpartition(".")[2] for name, each in model.network.named_modules() if isinstance(each, nn.Linear)]
    for name in settings.target_modules:
        if name not in names:
            known = ", ".join(sorted(set(names)))
            raise ConfigError(f"lora.target_modules: the model has no linear layer '{name}' (it has: {known})")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.target_modules) or "all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about names that peft still uses
        torch.manual_seed(seed)
        adapted: PeftModel = get_peft_model(model.network, config)
    model.network.requires_grad_(False)
    return adapted.eval()
