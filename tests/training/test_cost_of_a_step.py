"""What a step computes, and in which precision: logits of answers alone, links in float32 over agents in bfloat16."""

from collections.abc import Callable

import pytest
import torch
from tests.conftest import FEW_WORDS, make_model
from torch import Tensor

from recursivemas.models import LanguageModel
from recursivemas.system import RecursiveSystem
from recursivemas.training.data import Question
from recursivemas.training.outer import OuterLoop, OuterSettings, train_outer

QUESTIONS = [
    Question(id=f"q-{n}", text=text, answer=answer)
    for n, (text, answer) in enumerate(
        [("Why?", "no"), ("What is seventeen plus twenty-five?", "forty-two"), ("Who is it?", "a fox")]
    )
]
SETTINGS = OuterSettings(num_train_steps=2, batch_size=3, log_every=1, warmup_steps=0, num_validation=2)


@pytest.mark.parametrize(("recompute", "rounds"), [(False, "every"), (True, "every"), (False, "last")])
def test_logits_are_computed_of_answers_alone(
    make_system: Callable[..., RecursiveSystem], recompute: bool, rounds: str
) -> None:
    system = make_system(prompts=FEW_WORDS, num_rounds=3)
    chosen = SETTINGS.model_copy(update={"recompute": recompute, "round_weights": rounds})
    loop = OuterLoop(system, QUESTIONS, chosen)
    for parameter in system.trainable_parameters().values():
        parameter.requires_grad_(True)
    positions: list[tuple[str, int]] = []
    hooks = []
    for role, agent in system.agents.items():

        def count(module: object, given: tuple[Tensor], result: Tensor, role: str = role) -> None:
            positions.append((role, given[0].shape[:-1].numel()))

        hooks.append(agent.model.network.get_output_embeddings().register_forward_hook(count))
    for part in loop.losses(0):
        part.backward()
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(0)
    drawn = [QUESTIONS[row] for row in torch.randint(3, (3,), generator=generator).tolist()]
    model = system.agents["solver"].model
    # The tokens of the answers and the end of each, for every round that counts; once more where turns are recomputed.
    answers = sum(len(model.encode(question.answer)) + 1 for question in drawn)
    times = (3 if rounds == "every" else 1) * (2 if recompute else 1)
    assert {role for role, _ in positions} == {"solver"}
    assert sum(number for _, number in positions) == times * answers


def test_gradients_reach_float32_links_through_bfloat16_agents() -> None:
    families = ("qwen3", "llama", "qwen2")
    models = {role: make_model(each) for role, each in zip(("planner", "critic", "solver"), families, strict=True)}
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        for model in models.values():
            model.network.to(dtype)
        system = RecursiveSystem.build(agents=models, prompts=FEW_WORDS, num_rounds=2, num_latent_steps=2)
        parameters = system.trainable_parameters()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for part in OuterLoop(system, QUESTIONS, SETTINGS).losses(0):
            part.backward()
        gradients[dtype] = torch.cat([each.grad.flatten() for each in parameters.values()])
        for name, parameter in parameters.items():
            assert parameter.dtype == parameter.grad.dtype == torch.float32, name
            assert parameter.grad.norm() > 0, name
    full, half = gradients.values()
    # Where forward and backward are rounded to eight bits, the direction is what stays.
    assert torch.nn.functional.cosine_similarity(full, half, dim=0) > 0.9
    before = {name: each.detach().clone() for name, each in parameters.items()}
    train_outer(system, QUESTIONS, SETTINGS)
    assert {each.dtype for each in parameters.values()} == {torch.float32}
    assert all(not torch.equal(each, before[name]) for name, each in parameters.items())
    assert {model.dtype for model in models.values()} == {torch.bfloat16}


def test_agents_in_eight_bits_are_trained_through(tmp_path: object) -> None:
    """See tests/test_quantization.py for what they compute."""
    pytest.importorskip("bitsandbytes")
    place = tmp_path / "model"  # type: ignore[operator]
    make_model("llama", intermediate_size=128).save_pretrained(place)
    whole, held = (LanguageModel.from_pretrained(place, device="cpu", quantization=each) for each in (None, "8bit"))
    print_of_weights = held.fingerprint()
    gradients = []
    for model in (whole, held):
        roles = ("planner", "critic", "solver")
        system = RecursiveSystem.build(
            agents=dict.fromkeys(roles, model), prompts=FEW_WORDS, num_rounds=2, num_latent_steps=2
        )
        parameters = system.trainable_parameters()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for part in OuterLoop(system, QUESTIONS, SETTINGS).losses(0):
            part.backward()
        gradients.append(torch.cat([each.grad.flatten() for each in parameters.values()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.9
    assert {each.dtype for each in parameters.values()} == {torch.float32}
    assert held.fingerprint() == print_of_weights
