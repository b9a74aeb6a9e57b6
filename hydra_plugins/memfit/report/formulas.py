"""The formulas behind each component, as the documentation gives them: its own text, rendered into the page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token

from hydra_plugins.memfit.base.paths import docs_dir
from hydra_plugins.memfit.memory.breakdown import COMPONENTS
from hydra_plugins.memfit.planning.problem import Plan

MEANINGS = {
    "weights": "parameters that stay on the GPU: the trainer's shards, the engine's copy",
    "gradients": "one for each parameter that is trained",
    "optimizer_states": "Adam's moments, and the temporaries of its step",
    "activations": "what the layers keep for the backward pass, and the engine's workspace",
    "logits": "everything with a vocabulary dimension: logits, their gradients, entropy",
    "kv_cache": "the engine's pool of keys and values",
    "communication_buffers": "gathered parameters and gradients, buckets of the weight sync",
    "engine_residual": "what a sleeping engine keeps on the GPU",
    "context": "CUDA context, communicators and library workspaces",
    "fragmentation": "reserved by the allocator and not usable; what no formula explains is here",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chapter:
    """Where the formulas of a kind of launch are written."""

    page: str
    heading: str = ""
    """The one section that is meant; empty: the whole page."""
    sections: Mapping[str, str] = field(default_factory=dict)
    """How the heading that a component belongs to begins; the chapter's first heading for those left out."""


_OBSERVED = "What is observed"
MODEL = Chapter(
    page="memory-model.md",
    sections={
        **dict.fromkeys(("weights", "gradients", "optimizer_states"), "Model states"),
        "activations": "Activations",
        "logits": "The loss head",
        "kv_cache": "The inference engine",
        "communication_buffers": "FSDP while a pass runs",
        **dict.fromkeys(("engine_residual", "context", "fragmentation"), _OBSERVED),
    },
)
GENERATION = Chapter(page="generation.md", heading="The memory model")
TPU = Chapter(page="tpu.md", heading="How exact")


@dataclass(frozen=True, kw_only=True, slots=True)
class Formulas:
    """One chapter as HTML."""

    page: str
    html: str
    anchors: Mapping[str, str]
    """Id of the heading by component."""


def chapter(plan: Plan) -> Chapter:
    """Return where the formulas that made ``plan`` are written."""
    if plan.problem.hardware.kind == "tpu":
        return TPU
    return GENERATION if {phase.name for phase in plan.estimate.phases} == {"generate"} else MODEL


def formulas(source: Chapter) -> Formulas:
    """Return ``source`` with an id for each heading; its links lead to other pages of the documentation and are left out."""
    text = (docs_dir() / source.page).read_text(encoding="utf-8")
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(_section(re.sub(r"<!--.*?-->", "", text), source.heading))
    headings: dict[str, str] = {}
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            title = _plain(inline)
            headings[title] = f"formula-{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}"
            token.attrSet("id", headings[title])
            token.tag = f"h{int(token.tag[1]) + 1}"
        elif token.type == "heading_close":
            token.tag = f"h{int(token.tag[1]) + 1}"
        _unlink(token)
    anchors = {name: _anchor(headings, source.sections.get(name, "")) for name in COMPONENTS}
    return Formulas(
        page=f"docs/{source.page}", html=markdown.renderer.render(tokens, markdown.options, {}), anchors=anchors
    )


def _section(text: str, heading: str) -> str:
    """Return the part of a page below ``## heading``; the whole page where no heading is named."""
    if not heading:
        return text
    found = re.search(rf"^## {re.escape(heading)}$.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[0] if found else text


def _plain(inline: Token) -> str:
    return "".join(child.content for child in inline.children or ())


def _unlink(token: Token) -> None:
    if token.children:
        token.children = [child for child in token.children if child.type not in ("link_open", "link_close", "image")]


def _anchor(headings: Mapping[str, str], beginning: str) -> str:
    return next((slug for title, slug in headings.items() if title.startswith(beginning)), "formulas")
