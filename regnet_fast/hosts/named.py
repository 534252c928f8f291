"""Models of other hosts than timm by name, for the command line.

torchvision:regnet_y_400mf      with random weights
transformers:FOLDER             with the weights of a local folder, or of the hub
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_TORCHVISION, _TRANSFORMERS = "torchvision:", "transformers:"


def is_named(name: str) -> bool:
    """Whether a name is that of another host's model."""
    return name.startswith((_TORCHVISION, _TRANSFORMERS))


def build(name: str) -> nn.Module:
    """The model of such a name.

    Raises ValueError where there is none or its library is missing, and what transformers raises for a folder.
    """
    library, _, rest = name.partition(":")
    if f"{library}:" == _TORCHVISION:
        import torchvision

        names = torchvision.models.list_models(torchvision.models)  # which classify images
        if rest not in names:
            close = difflib.get_close_matches(rest, names, n=4)
            hint = f"Close: {', '.join(close)}" if close else "See torchvision.models.list_models()"
            raise ValueError(f"Unknown model ({rest}) of torchvision. {hint}")
        return torchvision.models.get_model(rest, weights=None)
    try:
        from transformers import AutoModelForImageClassification
    except ImportError:
        raise ValueError(f"{name} needs Hugging Face transformers: pip install 'regnet_fast[transformers]'") from None
    return AutoModelForImageClassification.from_pretrained(rest)


def results(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """What a model returns, by name: the fields of an output of transformers with every hidden state, else logits."""
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return {"logits": model(x)}
    found = dict(model(x, output_hidden_states=True))
    hidden = found.pop("hidden_states", None) or ()
    return {**{f"hidden state {i}": state for i, state in enumerate(hidden)}, **found}


def logits(result: Any) -> Tensor:
    """The logits in what a model returned."""
    return result["logits"] if isinstance(result, Mapping) else result
