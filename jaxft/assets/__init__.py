"""The embedded model and data of the quickstart."""

from __future__ import annotations

from pathlib import Path

from jaxft.errors import UserError
from jaxft.runtime.storage import local, no_folder


def tiny_folder() -> Path:
    """The Hugging Face folder of the embedded base, which `config.model = "tiny"` means."""
    return Path(__file__).parent / "tiny"


def model_folder(name: str | Path, *, required: bool = True) -> Path:
    """The folder that a model's name means: "tiny" the embedded base, any other name itself.

    Raises UserError for a URL and, if it is `required`, for no folder, saying how a model of the hub becomes one.
    """
    if str(name) == "tiny":
        return tiny_folder()
    folder = local(name, "a model")
    if required and (not str(name) or not folder.is_dir()):
        what = "a model is a folder with config.json and safetensors, or tiny, the embedded one"
        raise no_folder(name, what) if str(name) else UserError(f"no model is given: {what}")
    return folder


def quickstart_data(name: str) -> Path:
    """The JSONL file of the quickstart's rows: `train` or `heldout`."""
    return Path(__file__).parent / "quickstart" / f"{name}.jsonl"


def chat_templates() -> dict[str, Path]:
    """The Jinja files of jaxft's chat templates, by name; all mark what the assistant says."""
    return {
        path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
    }
