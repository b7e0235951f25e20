"""Times one attention call, stage by stage, against dense attention on this machine."""

from lighthouse_core.profile.attention import Profile, run

__all__ = ["Profile", "run"]
