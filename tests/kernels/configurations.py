"""The configurations of a kernel that differ for Triton's interpreter."""

from collections.abc import Iterable
from typing import Any


def interpreted(configs: Iterable[Any]) -> list[Any]:
    """Those with tiles of their own: warps and stages are the compiler's. Of equal ones that with the fewest stages,
    which fits wherever another does.
    """
    found: dict[tuple, Any] = {}
    for config in sorted(configs, key=lambda one: getattr(one, "stages", 0)):
        found.setdefault(tuple(v for k, v in vars(config).items() if k not in ("warps", "stages")), config)
    return list(found.values())
