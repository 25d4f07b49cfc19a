"""Tokenizers of tiny agents, made from the words of their world.

Every word is one token, with the same id wherever it stands in a text. Knows nothing of what the words mean.
"""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recursivemas.worlds.pretraining import AgentRecipe

PAD, UNK = "<pad>", "<unk>"
SPACE = "▁"
"""How the tokenizers write the space before a word."""


def build_tokenizer(
    recipe: AgentRecipe,
    words: Sequence[str],
    *,
    emphasis: Sequence[str] = (),
    digits: bool = False,
    tags: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """The tokenizer of an agent that reads these words, with its chat template.

    `emphasis` names words that count more when a BPE vocabulary is built, which changes the order of its merges. With
    `digits` every digit is a token, the same wherever it stands; the blank before a number is one of its own then.
    `tags` are tokens that are text: they are kept when a reply is decoded.
    """
    special = [PAD, UNK, recipe.markers.user, recipe.markers.assistant, recipe.markers.end]
    trainer: Any
    if recipe.tokenizer == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    elif recipe.tokenizer == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token=UNK))
        printable = [chr(code) for code in range(33, 127)]
        trainer = trainers.BpeTrainer(
            vocab_size=4000, special_tokens=special, initial_alphabet=[SPACE, *printable], show_progress=False
        )
    else:
        raise ValueError(f"tokenizer is {recipe.tokenizer!r}; tiny agents use 'word' or 'bpe'")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(left=False, right=True)]
    )
    steps = [
        pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always"),
        pre_tokenizers.Punctuation("isolated"),
    ]
    if digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    tokenizer.train_from_iterator([*words, *(word for word in emphasis for _ in range(3)), " ."], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    loaded = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=recipe.markers.end,
        additional_special_tokens=[recipe.markers.user, recipe.markers.assistant],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    loaded.chat_template = recipe.markers.template()
    return loaded


def numbered_words(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the words w0, w1, ..., for a model that means nothing: what it writes has as many words as tokens.

    The first two tokens are special; every other word is read as w0. The chat template adds nothing.
    """
    special = [PAD, "<end>"]
    words = [*special, *(f"w{number}" for number in range(vocab_size - len(special)))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    loaded = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token="<end>", padding_side="left")
    loaded.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return loaded
