"""For code written for Hugging Face transformers: its RegNet models, made with fused blocks.

    from regnet_fast.transformers import RegNetForImageClassification

    model = RegNetForImageClassification.from_pretrained("facebook/regnet-y-040")

Configurations, weights, keys, outputs and folders are transformers'.
"""

from __future__ import annotations

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "regnet_fast.transformers needs Hugging Face transformers: pip install 'regnet_fast[transformers]'"
    ) from error

from .models import rebuild

__all__ = ["RegNetForImageClassification", "RegNetModel"]


class RegNetModel(transformers.RegNetModel):
    """`transformers.RegNetModel` with its blocks rebuilt: the same configuration, methods, keys and outputs."""

    def __init__(self, config: transformers.RegNetConfig):
        super().__init__(config)
        rebuild(self)


class RegNetForImageClassification(transformers.RegNetForImageClassification):
    """`transformers.RegNetForImageClassification` with its blocks rebuilt: the same configuration, methods, keys and
    outputs.
    """

    def __init__(self, config: transformers.RegNetConfig):
        super().__init__(config)
        rebuild(self)
