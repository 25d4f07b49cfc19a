"""Links against the equations as printed, their sizes and their loudness."""

import pytest
import torch
from torch import Tensor

from recursivemas.errors import CheckpointError, ConfigError, NumericsError
from recursivemas.links import DESIGNS, RecursiveLink

KINDS = ("inner", "outer")


def make_link(kind: str, design: str, *, bias: bool | None = None, seed: int = 0) -> RecursiveLink:
    """A link whose every parameter is drawn at random, so that no branch is too small to be seen."""
    link = (
        RecursiveLink.inner(6, design=design, bias=bias)
        if kind == "inner"
        else RecursiveLink.outer(6, 4, design=design, bias=bias)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in link.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return link


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def linear(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def layer_norm(layer: torch.nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return layer.weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + layer.bias


def printed(link: RecursiveLink, h: Tensor) -> Tensor:
    """The table at the top of links.py, row by row."""
    residual = h if link.config.kind == "inner" else linear(link.w3, h) if link.w3 is not None else None
    match link.config.design:
        case "1-layer":
            return linear(link.w1, h)
        case "res-1-layer":
            return residual + linear(link.w1, h)
        case "2-layer":
            return linear(link.w2, gelu(linear(link.w1, h)))
        case "res-2-layer":
            return residual + linear(link.w2, gelu(linear(link.w1, h)))
        case "ln-2-layer":
            return layer_norm(link.target_norm, linear(link.w2, gelu(linear(link.w1, layer_norm(link.source_norm, h)))))
        case "ln-res-2-layer":
            inside = linear(link.w2, gelu(linear(link.w1, layer_norm(link.source_norm, h))))
            return layer_norm(link.target_norm, residual + inside)
    raise AssertionError(link.config.design)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("bias", [None, True, False])
def test_forward_is_the_printed_equation(kind: str, design: str, bias: bool | None) -> None:
    link = make_link(kind, design, bias=bias)
    h = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(link(h), printed(link, h))


@pytest.mark.parametrize("design", ["res-2-layer", "2-layer"])
def test_scale_multiplies_the_equation(design: str) -> None:
    link = make_link("outer", design)
    h = torch.randn(5, 6)
    link.scale.fill_(0.25)
    torch.testing.assert_close(link(h), 0.25 * printed(link, h))


def test_biases_are_as_in_the_paper_and_in_the_release() -> None:
    assert RecursiveLink.inner(4).w1.bias is None
    assert RecursiveLink.outer(4, 3, design="ln-res-2-layer").w3.bias is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_residual_link_is_nearly_its_residual(kind: str) -> None:
    link = RecursiveLink.inner(32) if kind == "inner" else RecursiveLink.outer(32, 24)
    h = torch.randn(10, 32)
    residual = h if kind == "inner" else linear(link.w3, h)
    assert 0 < (link(h) - residual).norm() < 0.02 * residual.norm()


# release.md 3.1
@pytest.mark.parametrize(
    ("hidden_size", "count"),
    [(1536, 4_727_808), (2048, 8_400_896), (2560, 13_122_560), (3072, 18_892_800), (4096, 33_579_008)],
)
def test_inner_links_have_as_many_parameters_as_the_released_ones(hidden_size: int, count: int) -> None:
    with torch.device("meta"):
        link = RecursiveLink.inner(hidden_size, design="ln-res-2-layer")
    assert sum(parameter.numel() for parameter in link.parameters()) == count


@pytest.mark.parametrize(
    ("source_size", "target_size", "count"),
    [
        (2048, 2048, 20_987_904),
        (2048, 1536, 14_169_088),
        (1536, 2048, 17_841_152),
        (2560, 3072, 42_490_880),
        (3072, 2560, 36_721_664),
        (4096, 2560, 44_588_032),
    ],
)
def test_outer_links_have_as_many_parameters_as_the_released_ones(
    source_size: int, target_size: int, count: int
) -> None:
    with torch.device("meta"):
        link = RecursiveLink.outer(source_size, target_size, design="ln-res-2-layer")
    assert sum(parameter.numel() for parameter in link.parameters()) == count


def test_intermediate_size_can_be_chosen() -> None:
    link = RecursiveLink.outer(6, 4, intermediate_size=5)
    assert link.w1.weight.shape == (5, 6)
    assert link.w2.weight.shape == (4, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_states_come_out_in_the_precision_they_came_in(dtype: torch.dtype) -> None:
    link = make_link("outer", "res-2-layer")
    h = torch.randn(3, 6).to(dtype)
    assert link(h).dtype == dtype
    # In between it is float32: only the result is rounded.
    assert torch.equal(link(h), link(h.float()).to(dtype))


def test_a_link_keeps_any_number_of_leading_dimensions() -> None:
    link = make_link("outer", "res-2-layer")
    for shape in [(6,), (2, 6), (2, 3, 6), (0, 6)]:
        assert link(torch.randn(shape)).shape == (*shape[:-1], 4)


def test_a_wrong_width_names_both_sizes() -> None:
    with pytest.raises(CheckpointError, match=r"expects 6-wide states, got 5-wide"):
        make_link("outer", "res-2-layer")(torch.randn(2, 5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("design", [design for design in DESIGNS if not DESIGNS[design].layer_norm])
def test_calibrate_gives_the_mean_norm_asked_for(kind: str, design: str) -> None:
    link = make_link(kind, design)
    states = torch.randn(50, 6)
    link.calibrate(states, 3.5)
    assert link(states).norm(dim=-1).mean().item() == pytest.approx(3.5, rel=1e-5)
    # Again: it is the norm that is set, not a factor.
    link.calibrate(states, 3.5)
    assert link(states).norm(dim=-1).mean().item() == pytest.approx(3.5, rel=1e-5)


@pytest.mark.parametrize("design", ["ln-2-layer", "ln-res-2-layer"])
def test_calibrate_sets_the_last_gain_of_a_design_with_layer_norms(design: str) -> None:
    link = RecursiveLink.outer(32, 24, design=design)
    states = torch.randn(50, 32)
    link.calibrate(states, 3.5)
    assert link.scale == 1
    assert link(states).norm(dim=-1).mean().item() == pytest.approx(3.5, rel=1e-3)


@pytest.mark.parametrize("fault", [0.0, float("nan")])
def test_a_link_that_returns_nothing_cannot_be_calibrated(fault: float) -> None:
    link = make_link("outer", "res-2-layer")
    with pytest.raises(NumericsError, match="mean output norm is (0.0|nan)"):
        link.calibrate(torch.full((3, 6), fault), 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("design", DESIGNS)
def test_redraw_keeps_the_form_and_the_loudness_but_no_weight(kind: str, design: str) -> None:
    link = RecursiveLink.inner(32, design=design) if kind == "inner" else RecursiveLink.outer(32, 24, design=design)
    link.calibrate(torch.randn(100, 32), 2.0)
    drawn = link.redraw(seed=1)
    assert drawn.config == link.config
    probe = torch.randn(2000, 32)
    loudness, expected = (each(probe).norm(dim=-1).mean().item() for each in (drawn, link))
    assert loudness == pytest.approx(expected, rel=0.05)
    for name in ("w1", "w2", "w3"):
        if getattr(link, name) is not None:
            assert not torch.isclose(getattr(link, name).weight, getattr(drawn, name).weight).any()


def test_redraw_follows_its_seed_and_leaves_the_random_state_alone() -> None:
    link = RecursiveLink.outer(6, 4)
    state = torch.get_rng_state()
    once, again, other = (link.redraw(seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(once.w1.weight, again.w1.weight)
    assert not torch.equal(once.w1.weight, other.w1.weight)
    assert not any(parameter.requires_grad for parameter in once.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"design": "res-2-layers"}, "did you mean 'res-2-layer'"),
        ({"design": "1-layer", "intermediate_size": -1}, "at least 1"),
    ],
)
def test_a_link_that_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RecursiveLink.outer(6, 4, **options)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0 -> 4"):
        RecursiveLink.outer(0, 4)


@pytest.mark.parametrize(
    ("kind", "design", "name"),
    [
        ("outer", "res-2-layer", "w3"),
        ("outer", "ln-res-2-layer", "w3"),
        ("outer", "1-layer", "w1"),
        ("inner", "1-layer", "w1"),
        ("inner", "res-2-layer", None),
        ("outer", "2-layer", None),
        ("outer", "ln-2-layer", None),
    ],
)
def test_the_residual_weight_is_the_linear_map_that_can_carry_a_message_alone(
    kind: str, design: str, name: str | None
) -> None:
    link = make_link(kind, design)
    assert link.residual_weight is (None if name is None else getattr(link, name))
