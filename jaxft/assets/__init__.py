"""The embedded model and data of the quickstart."""

from __future__ import annotations

from pathlib import Path

from jaxft.places import local


def tiny_folder() -> Path:
    """The Hugging Face folder of the embedded base, which `config.model = "tiny"` means."""
    return Path(__file__).parent / "tiny"


def model_folder(name: str | Path) -> Path:
    """The folder that a model's name means: "tiny" the embedded base, any other name itself."""
    return tiny_folder() if str(name) == "tiny" else local(name, "a model")


def quickstart_data(name: str) -> Path:
    """The JSONL file of the quickstart's rows: `train` or `heldout`."""
    return Path(__file__).parent / "quickstart" / f"{name}.jsonl"


def chat_templates() -> dict[str, Path]:
    """The Jinja files of jaxft's chat templates, by name; all mark what the assistant says."""
    return {
        path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
    }
