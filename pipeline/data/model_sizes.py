"""Layers and width of a language model, from its configuration alone: no weights are fetched or read."""

from pipeline.data.model_files import local_directory
from pipeline.data.model_loading import as_user_error, quiet
from pipeline.data.models import layers_of
from pipeline.data.options import ModelOptions
from pipeline.errors import UserError


def sizes(options: ModelOptions) -> tuple[int, int]:
    """Layers that are read, and the width. Raises UserError for a model without a configuration, here or on the hub."""
    from transformers import AutoConfig

    directory = local_directory(options)
    if directory is not None and not (directory / "config.json").is_file():
        fix = "give a directory in Hugging Face format, or plan.n_layers and plan.d_model"
        raise UserError(f"model.path={options.path}: no config.json in {directory}; {fix}")
    with quiet(), as_user_error(options, "configuration"):
        if directory is not None:
            config = AutoConfig.from_pretrained(directory)
        else:
            config = AutoConfig.from_pretrained(options.path, revision=options.revision)
    text = config.get_text_config()
    return len(layers_of(options, text.num_hidden_layers)), text.hidden_size
