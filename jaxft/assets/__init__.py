"""The embedded model and data of the quickstart."""

from __future__ import annotations

from pathlib import Path

from jaxft.errors import UserError
from jaxft.runtime import hub
from jaxft.runtime.storage import local, no_folder


def tiny_folder() -> Path:
    """The Hugging Face folder of the embedded base, which `config.model = "tiny"` means."""
    return Path(__file__).parent / "tiny"


def model_folder(name: str | Path, *, required: bool = True, weights: bool = True) -> Path:
    """The folder that a model's name means.

    Args:
        name: a folder, "tiny" for the embedded base, or OWNER/NAME[@REVISION] of the hub, which is fetched.
        required: whether it must be there. If not, nothing is fetched either.
        weights: whether its weights are needed; of a model of the hub, only then they are fetched.

    Raises UserError for another URL, for what cannot be fetched and, if it is `required`, for no folder.
    """
    if str(name) == "tiny":
        return tiny_folder()
    if (repository := hub.meant(name)) is not None:
        if required:
            return hub.folder_of(repository, weights=weights)
        return hub.cached_folder(repository) or Path(repository.name)
    folder = local(name, "a model")
    if required and (not str(name) or not folder.is_dir()):
        what = "a model is a folder with config.json and safetensors, a name of the hub, or tiny, the embedded one"
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


def general_texts() -> Path:
    """The JSONL file of short texts on many things, on which `jaxft compare` sees what tuning forgets."""
    return Path(__file__).parent / "general.jsonl"
