"""Parts: frozen agents, links, a pattern and prompts that fit together, whatever is done with them.

What does not fit is refused by name. Links are placed beside their senders, and sized by what their readers are used
to.

Knows agents, links, a pattern and prompts; knows nothing of questions, files or models by name.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from recursivemas.agents import Agent
from recursivemas.channels import choose_channels
from recursivemas.checkpoint import SystemSettings
from recursivemas.errors import CheckpointError, PatternError, unknown_name
from recursivemas.links import RecursiveLink
from recursivemas.models import LanguageModel
from recursivemas.patterns import Edge, Pattern
from recursivemas.prompts import PromptSet
from recursivemas.static import Backend

# Ordinary words, read once by every model of a new system to see how loud its links come out.
CALIBRATION_TEXT = (
    "A team of three is asked how many days a trip will take. The first draws up a plan, the second looks for "
    "mistakes in it, and the third works out the answer: two days by train, then one more on foot."
)


class Parts:
    """Frozen agents, a pattern, prompts, and the links between the agents."""

    def __init__(
        self,
        agents: Mapping[str, Agent],
        links: Mapping[str, RecursiveLink],
        pattern: Pattern,
        prompts: PromptSet,
        settings: SystemSettings | None = None,
        *,
        training: Mapping[str, Any] | None = None,
    ) -> None:
        """Put the parts together. `links` are the outer links by edge; inner links belong to the agents.

        Raises `PatternError` or `CheckpointError` if a part is missing, unknown, or does not fit.
        """
        self.agents = dict(agents)
        self.links = dict(links)
        self.pattern = pattern
        self.prompts = prompts
        self.settings = settings or SystemSettings()
        self.training = dict(training or {})
        self._check()

    def _check(self) -> None:
        self.prompts.variant(self.settings.variant)
        choose_channels(self.settings.channel, self.edge_names)
        for role in self.agents:
            if role not in self.pattern.roles:
                raise PatternError(f"pattern '{self.pattern.name}': " + unknown_name("role", role, self.pattern.roles))
        for role in self.pattern.roles:
            if role not in self.agents:
                raise PatternError(f"the pattern '{self.pattern.name}' needs an agent for the role '{role}'")
            inner = self.agents[role].inner_link.config
            self._check_width(f"inner link of '{role}'", inner.source_size, role, "thinks")
            self._check_slots(role)
        for name in self.links:
            if name not in self.edge_names:
                raise PatternError(f"pattern '{self.pattern.name}': " + unknown_name("edge", name, self.edge_names))
        for edge in self.pattern.graph:
            if str(edge) not in self.links:
                raise CheckpointError(f"the system has no link for the edge '{edge}'")
            config = self.links[str(edge)].config
            self._check_width(f"link '{edge}'", config.source_size, edge.source, "thinks")
            self._check_width(f"link '{edge}'", config.target_size, edge.target, "reads")

    def _check_slots(self, role: str) -> None:
        sources = {edge.source for edge in self.pattern.sources(role)}
        slots = self.prompts.slots(role)
        for slot in sorted(slots - sources):
            raise PatternError(
                f"prompt set '{self.prompts.name}', {role}: {unknown_name('slot', slot, sources)}; the pattern "
                f"'{self.pattern.name}' has no edge {slot}->{role}"
            )
        for source in sorted(sources - slots):
            raise PatternError(
                f"prompt set '{self.prompts.name}': no template of the {role} has the slot {{latents:{source}}}, so "
                f"the edge {source}->{role} of the pattern '{self.pattern.name}' would lead nowhere"
            )

    def _check_width(self, link: str, size: int, role: str, does: str) -> None:
        hidden_size = self.agents[role].model.hidden_size
        if size != hidden_size:
            raise CheckpointError(
                f"the {link} is made for {size}-wide states, but the {role} {does} in {hidden_size} dimensions; "
                "was it trained for another pair of models?"
            )

    @property
    def edge_names(self) -> list[str]:
        """The edges of the pattern, as `source->target`."""
        return [str(edge) for edge in self.pattern.graph]

    @property
    def through_inner_link(self) -> bool:
        """Whether R_out(R_in(H)) travels, or R_out(H)."""
        return self.settings.message == "inner+outer"

    @property
    def all_links(self) -> dict[str, RecursiveLink]:
        """Inner links by role and outer links by edge: all that is ever trained."""
        return {**{role: agent.inner_link for role, agent in self.agents.items()}, **self.links}

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of all links by `link/tensor` name. The language models have none that train."""
        return {
            f"{name}/{tensor}": parameter
            for name, link in self.all_links.items()
            for tensor, parameter in link.named_parameters()
        }

    @property
    def models(self) -> list[LanguageModel]:
        """The models of all agents; one that several share comes once."""
        return list({id(agent.model): agent.model for agent in self.agents.values()}.values())

    def compile(self, enabled: bool = True, *, backend: Backend = "inductor") -> None:
        """Let all agents think and write in compiled steps from here on, or no longer (see `LanguageModel.compile`).

        Results are the same. Of an agent that cannot be compiled a `CompileWarning` says why, and it runs as before.
        """
        for model in self.models:
            model.compile(enabled, backend=backend)

    def hash_into(self, digest: "hashlib._Hash") -> None:
        """Add all that answers depend on: settings, pattern, prompts, models and links."""
        for part in (self.settings, self.pattern, self.prompts):
            digest.update(part.model_dump_json().encode())
        for role, agent in sorted(self.agents.items()):
            model = agent.model
            digest.update(f"{role}\0{model.source}\0{model.revision}\0".encode())
            digest.update(b"" if model.source else model.fingerprint().encode())
        for name, link in sorted(self.all_links.items()):
            digest.update(name.encode())
            for tensor in link.state_dict().values():
                digest.update(tensor.detach().cpu().numpy().tobytes())

    @torch.no_grad()
    def calibrate(self, text: str) -> None:
        """Size every link by how its reader embeds this text (see `RecursiveLink.calibrate`)."""
        for role, agent in self.agents.items():
            ids = agent.model.encode(text)
            states = agent.model.states(torch.tensor([ids], device=agent.model.device))[0]
            agent.inner_link.calibrate(states, agent.model.embedding_norm(ids))
            for edge in self.pattern.graph:
                if edge.source == role:
                    reader = self.agents[edge.target].model
                    link = self.links[str(edge)]
                    sent = agent.inner_link(states) if self.through_inner_link else states
                    link.calibrate(sent, reader.embedding_norm(reader.encode(text)))

    def place_links(self) -> None:
        """Put every link on the device of the model that it takes states from; none trains from here on."""
        for agent in self.agents.values():
            agent.inner_link.to(agent.model.device).requires_grad_(False).eval()
        for edge in self.pattern.graph:
            self.links[str(edge)].to(self.agents[edge.source].model.device).requires_grad_(False).eval()

    @torch.no_grad()
    def redrawn(self, seed: int) -> tuple[dict[str, Agent], dict[str, RecursiveLink]]:
        """The agents and the links between them, with every link drawn anew, each as loud as the one it replaces.

        Loudness is compared on states of the senders while they read `CALIBRATION_TEXT`.
        """

        def seed_of(name: str) -> int:
            return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "big")

        agents: dict[str, Agent] = {}
        links: dict[str, RecursiveLink] = {}
        for role, agent in self.agents.items():
            ids = torch.tensor([agent.model.encode(CALIBRATION_TEXT)], device=agent.model.device)
            states = agent.model.states(ids)[0]
            inner = agent.inner_link.redraw(seed_of(role), states)
            agents[role] = Agent(role, agent.model, inner)
            for name, link in self.links.items():
                if Edge.parse(name).source == role:
                    old, new = (
                        (agent.inner_link(states), inner(states)) if self.through_inner_link else (states, states)
                    )
                    links[name] = link.redraw(seed_of(name), new, link(old).float().norm(dim=-1).mean().item())
        return agents, links
