"""What all strategies share: the Flower shell around a rule, its firewall and its checkpoints."""

from .strategy import RuleStrategy

__all__ = ["RuleStrategy"]
