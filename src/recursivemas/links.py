"""RecursiveLink: the only trained part of a recursive system (sections 2.2 and 2.3 of arXiv 2604.25917).

A link maps the last hidden states of one frozen language model into the input-embedding space of a language model:
of the same one (inner, eq. 3) or of another (outer, eq. 4). This file knows nothing of models, tokens, agents or
rounds; where a size is needed, it is given the number.

    design            inner                        outer
    1-layer           W1 h                         W1 h
    res-1-layer       h + W1 h                     W3 h + W1 h
    2-layer           W2 gelu(W1 h)                W2 gelu(W1 h)
    res-2-layer       h + W2 gelu(W1 h)            W3 h + W2 gelu(W1 h)           eq. 3 and eq. 4: the default
    ln-2-layer        LN(W2 gelu(W1 LN h))         LN(W2 gelu(W1 LN h))
    ln-res-2-layer    LN(h + W2 gelu(W1 LN h))     LN(W3 h + W2 gelu(W1 LN h))    what the authors released

The first four are the rows of the paper's table 4. They end in one stored number, `scale * (...)`: 1.0 is the
equation as printed; `calibrate` sets it so that a link starts as loud as the embeddings its reader is used to (without
it, links were found 50 to 80 times too loud). In the designs of the authors' code, with a LayerNorm at either end, the
gain of the last one does that.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from recursivemas.errors import CheckpointError, ConfigError, NumericsError, unknown_name


class Design(NamedTuple):
    """One row of the table above."""

    num_layers: int
    residual: bool
    layer_norm: bool


DESIGNS = {
    "1-layer": Design(num_layers=1, residual=False, layer_norm=False),
    "res-1-layer": Design(num_layers=1, residual=True, layer_norm=False),
    "2-layer": Design(num_layers=2, residual=False, layer_norm=False),
    "res-2-layer": Design(num_layers=2, residual=True, layer_norm=False),
    "ln-2-layer": Design(num_layers=2, residual=False, layer_norm=True),
    "ln-res-2-layer": Design(num_layers=2, residual=True, layer_norm=True),
}
DEFAULT_DESIGN = "res-2-layer"

# Where a residual branch carries the message, the learned branch starts this small: at first the link is (nearly)
# its residual, and W1 still differs from unit to unit, so no two of them stay alike.
_RESIDUAL_START_STD = 1e-3


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """Everything needed to build a link again; the content of its `config.json`."""

    kind: str
    """`inner` (source and target are one model; the residual is the identity) or `outer` (the residual is W3)."""
    source_size: int
    """Hidden size of the model whose states come in."""
    target_size: int
    """Hidden size (width of the input embeddings) of the model that reads what goes out."""
    design: str = DEFAULT_DESIGN
    """A row of the table of designs."""
    intermediate_size: int | None = None
    """Rows of W1 in the two-layer designs. Default: the target size for an inner link, twice that for an outer one."""
    bias: bool | None = None
    """Whether W1, W2, W3 have biases. Default: as printed in the paper, no; in the designs with LayerNorms, yes."""

    def __post_init__(self) -> None:
        if self.design not in DESIGNS:
            raise ConfigError(unknown_name("link design", self.design, DESIGNS))
        if self.kind not in ("inner", "outer"):
            raise ConfigError(unknown_name("kind of link", self.kind, ("inner", "outer")))
        if min(self.source_size, self.target_size, self.intermediate_size or 1) < 1:
            raise ConfigError(f"a link needs sizes of at least 1, got {self.source_size} -> {self.target_size}")
        if self.kind == "inner" and self.source_size != self.target_size:
            raise ConfigError(
                f"an inner link feeds a model its own states, so both sizes must be equal; got {self.source_size} "
                f"and {self.target_size}. Use RecursiveLink.outer for two different models"
            )


class RecursiveLink(nn.Module):
    """A small residual map from hidden states into an input-embedding space (eq. 3 and eq. 4; see the table above).

    Build it with `RecursiveLink.inner(...)` or `RecursiveLink.outer(...)`.
    """

    scale: Tensor

    def __init__(self, config: LinkConfig) -> None:
        super().__init__()
        design = DESIGNS[config.design]
        bias = design.layer_norm if config.bias is None else config.bias
        intermediate_size = config.intermediate_size or config.target_size * (1 if config.kind == "inner" else 2)
        if design.num_layers == 1:
            intermediate_size = config.target_size
        self.config = config
        self.w1 = nn.Linear(config.source_size, intermediate_size, bias=bias)
        self.w2 = nn.Linear(intermediate_size, config.target_size, bias=bias) if design.num_layers == 2 else None
        has_w3 = design.residual and config.kind == "outer"
        self.w3 = nn.Linear(config.source_size, config.target_size, bias=bias) if has_w3 else None
        self.source_norm = nn.LayerNorm(config.source_size) if design.layer_norm else None
        self.target_norm = nn.LayerNorm(config.target_size) if design.layer_norm else None
        self.register_buffer("scale", torch.ones(()))
        if design.residual:
            last = self.w2 or self.w1
            nn.init.normal_(last.weight, std=_RESIDUAL_START_STD)
            if last.bias is not None:
                nn.init.zeros_(last.bias)

    @classmethod
    def inner(cls, hidden_size: int, *, design: str = DEFAULT_DESIGN, **options: Any) -> "RecursiveLink":
        """A link that feeds a model of width `hidden_size` its own states (eq. 3). Options: see `LinkConfig`."""
        return cls(LinkConfig(kind="inner", source_size=hidden_size, target_size=hidden_size, design=design, **options))

    @classmethod
    def outer(
        cls, source_size: int, target_size: int, *, design: str = DEFAULT_DESIGN, **options: Any
    ) -> "RecursiveLink":
        """A link from a model of width `source_size` to a reader of width `target_size` (eq. 4)."""
        return cls(LinkConfig(kind="outer", source_size=source_size, target_size=target_size, design=design, **options))

    @property
    def design(self) -> Design:
        """The properties of this link's design."""
        return DESIGNS[self.config.design]

    @property
    def residual_weight(self) -> nn.Linear | None:
        """The linear map that alone can carry a message (W3, or W1 of a one-layer design); alignment starts there.

        None for inner links with a residual (it is the identity) and for `2-layer` (nothing in it is linear).
        """
        if self.w3 is not None:
            return self.w3
        return self.w1 if self.design.num_layers == 1 and not self.design.residual else None

    def forward(self, states: Float[Tensor, "*batch source_size"]) -> Float[Tensor, "*batch target_size"]:
        """Map hidden states to vectors that the reader takes in place of input embeddings.

        Computed in the precision of the link (float32), returned in the precision of `states`.
        """
        if states.shape[-1] != self.config.source_size:
            raise CheckpointError(
                f"this {self.config.kind} link expects {self.config.source_size}-wide states, got "
                f"{states.shape[-1]}-wide ones; was it made for another pair of models?"
            )
        source = states.to(self.w1.weight.dtype)
        mapped = self.w1(source if self.source_norm is None else self.source_norm(source))
        if self.w2 is not None:
            mapped = self.w2(functional.gelu(mapped))
        if self.design.residual:
            mapped = mapped + (source if self.w3 is None else self.w3(source))
        if self.target_norm is not None:
            mapped = self.target_norm(mapped)
        return (self.scale * mapped).to(states.dtype)

    @torch.no_grad()
    def calibrate(self, states: Float[Tensor, "state source_size"], target_norm: float) -> None:
        """Make the mean norm of the outputs for `states` equal `target_norm` (the reader's mean embedding norm).

        Raises `NumericsError` if the link's outputs are zero or not finite.
        """
        if self.target_norm is not None:
            self.target_norm.weight.fill_(target_norm / self.config.target_size**0.5)
            return
        norm = self(states.float()).norm(dim=-1).mean()
        if not torch.isfinite(norm) or norm == 0:
            raise NumericsError(
                f"cannot size a link whose mean output norm is {norm.item()}; are the calibration states finite?"
            )
        self.scale.mul_(target_norm / norm)

    def redraw(
        self, seed: int, states: Float[Tensor, "state source_size"] | None = None, norm: float | None = None
    ) -> "RecursiveLink":
        """A link of the same form with weights drawn anew (the `random-link` control).

        On `states` (standard normal ones, if none are given) it is as loud as `norm` says; by default, as this link is.

        Every weight is redrawn from PyTorch's usual start, the small residual branches too. The identity in an inner
        link stays: it belongs to the design, not to what is trained.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = RecursiveLink(self.config)
            for module in drawn.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
            probe = torch.randn(256, self.config.source_size)
        states = probe.to(self.w1.weight.device) if states is None else states
        drawn.to(self.w1.weight.device, self.w1.weight.dtype)
        with torch.no_grad():
            drawn.calibrate(states, norm or self(states.float()).norm(dim=-1).mean().item())
        return drawn.requires_grad_(False).eval()

    def to_dict(self) -> dict[str, Any]:
        """The link's configuration as plain data."""
        return asdict(self.config)
