"""Everything that touches torchtitan 0.2.2; the next torchtitan costs this package alone."""

from lighthouse_core.titan import runtime  # noqa: F401  (first: it prepares torchtitan's import)
from lighthouse_core.titan.job import build_job, check_overrides
from lighthouse_core.titan.trainer import train

__all__ = ["build_job", "check_overrides", "train"]
