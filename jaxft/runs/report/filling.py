"""The page's templates, filled: what is given to them is text and is escaped, but for our own drawings."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from jaxft.runs.report import words


def filled(template: str, **values: Any) -> str:
    """The text of a template with these values, which may use each other's macros."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=words.plain,
        loader=jinja2.FunctionLoader(_own),
    )
    environment.globals["words"] = words
    parts = {"style": _own("page.css"), "script": _own("page.js")}
    environment.globals |= {f"{name}_digest": _digest(text) for name, text in parts.items()}
    environment.globals |= {name: Markup(text) for name, text in parts.items()}
    return environment.get_template(template).render(**values)


def _own(name: str) -> str:
    return resources.files("jaxft.runs.report").joinpath(name).read_text("utf-8")


def _digest(text: str) -> str:
    """By which the page's policy knows its own style and script, and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
